"""benchmarks/attention.py: its arguments, and the turns of several builds of the CUDA kernels."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attention
import attention_cuda
import pytest
import torch
from attention_cuda import TURNS, Build, Ours
from rows import Row

from vllm_wkvquant import native_cuda


def row(**more: Any) -> Row:
    return Row(op="decode", variant="cuda", device="any", batch=1, context=2, num_kv_heads=1, **more)


@pytest.mark.parametrize("text", ["build.so", "=build.so", "new=", "new=missing.so"])
def test_bad_builds(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["attention.py", "--device", "cuda", "--build", text])
    with pytest.raises(SystemExit):
        attention.main()
    assert "is not" in capsys.readouterr().err


def test_builds_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.so", "b.so"):
        (tmp_path / name).touch()
    seen = []

    def rows(args: Any) -> list[Row]:
        seen.extend(args.build)
        return [row(build=x.name) for x in args.build]

    monkeypatch.setattr(attention_cuda, "rows", rows)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    files = [f"--build={name}={tmp_path / file}" for name, file in (("old", "a.so"), ("new", "b.so"))]
    monkeypatch.setattr(sys, "argv", ["attention.py", "--device", "cuda", "--json", *files])
    attention.main()
    assert [(x.name, x.path.name) for x in seen] == [("old", "a.so"), ("new", "b.so")]
    assert '"build": "new"' in capsys.readouterr().out


def test_builds_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each runs its own library; one that fails is left out of later turns."""
    ran = []

    def timed(call: Any, copies: int, seconds: float) -> float:
        ran.append(native_cuda.library())
        if ran[-1] == "broken":
            raise RuntimeError("no kernel")
        return float(len(ran))

    builds = [Build(name, Path(name)) for name in ("old", "broken", "new")]
    for x in builds:
        x.__dict__["library"] = x.name
    monkeypatch.setattr(attention_cuda, "timed", timed)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(attention_cuda, "make_params", lambda *args: SimpleNamespace(to=lambda device: None))
    ours: Any = Ours.__new__(Ours)
    ours.step = SimpleNamespace(kv_heads=1, copies=1, out=torch.empty(1))
    ours.attend = lambda params, variant: lambda c: None
    ours.check = lambda row, kind, params: None
    found = ours.measure_builds(row(), "none", builds, 0.1)
    assert ran == ["old", "broken", "new", "new", "old", "old", "new"]
    assert [(x.build, x.us, x.error) for x in found] == [
        ("old", 5, None), ("broken", None, "RuntimeError: no kernel"), ("new", 4, None)
    ]  # fmt: skip
    assert TURNS == 3


def test_shifts_are_drawn_apart() -> None:
    """A bar of the rows with a shift on every pair shows no other's time, be it the fastest."""
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    import plots

    times = {"rotating": 4.0, "slow": 3.0, "none": 2.0}
    rows = [row(us=us, options=f"block_size=64 shift={kind}", read_fraction=1 / us) for kind, us in times.items()]
    peer = Row(op="decode", variant="fa3-bf16", device="any", batch=1, context=2, num_kv_heads=1, us=6.0)
    figure = plots.draw_decode([x.present() for x in (*rows, peer)])
    bars = {c.get_label(): [bar.get_height() for bar in c] for c in figure.axes[0].containers}
    assert bars == {
        "4 bits, a shift on every pair": [1.5],
        "4 bits, a shift on slow pairs": [2.0],
        "4 bits, no shift": [3.0],
    }
