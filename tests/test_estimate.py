"""What a run is said to take: FLOP against PyTorch's counter, time by proportion, memory and where hidden states go."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from models import save_text, tiny_model
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from vllm_wkvquant import cli
from vllm_wkvquant.config import ConfigError
from vllm_wkvquant.quantize import blocks, estimate, tune
from vllm_wkvquant.quantize.attention import QKV
from vllm_wkvquant.quantize.pipeline import quantize
from vllm_wkvquant.quantize.plan import Plan, Settings, Storage, preflight
from vllm_wkvquant.quantize.recipes import RECIPES, Tuning
from vllm_wkvquant.quantize.runner import Ahead
from vllm_wkvquant.quantize.writer import PAGE_FILE

SAMPLES, SEQ_LEN, LAYERS = 12, 48, 3

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("estimate")
    return tiny_model(root / "model", num_layers=LAYERS), save_text(root / "calib.txt")


@pytest.fixture
def plan(files: tuple[Path, Path], tmp_path: Path):
    def make(recipe: str, **settings: Any) -> Plan:
        model, text = files
        return preflight(
            Settings(model, tmp_path / "out", text, recipe=recipe, samples=SAMPLES, seq_len=SEQ_LEN, **settings)
        )

    return make


def counter() -> FlopCounterMode:
    """PyTorch's counter, which leaves out the CPU's fused attention: two products forward and five back, causal."""

    def product(query: torch.Size) -> int:
        batch, heads, length, size = query
        return 2 * batch * heads * size * (length * (length + 1) // 2)

    mapping = {
        flash: lambda query, *_, **__: 2 * product(query),
        flash_backward: lambda _, query, *__, **___: 5 * product(query),
    }
    return FlopCounterMode(display=False, custom_mapping=mapping)


@pytest.mark.parametrize(("recipe", "layer"), [*((name, 0) for name in RECIPES), ("paper", LAYERS - 1)])
def test_flop_are_those_of_the_products(recipe: str, layer: int, plan) -> None:
    """Of one epoch, and of a block whose targets those before it have left."""
    p = plan(recipe)
    if p.recipe.learning:
        p = dataclasses.replace(p, recipe=estimate.rehearsal(p).recipe)
    hidden, ahead = blocks.first_hidden(p), Ahead(p)
    with torch.no_grad():
        for before in range(layer):
            blocks.quantize_block(p, before, hidden, ahead)
        with counter() as counted:
            blocks.quantize_block(p, layer, hidden, ahead)
    assert sum(estimate.block_flop(p, layer).values()) == pytest.approx(counted.get_total_flops(), rel=0.05)


def test_flop_of_tuning_are_those_of_the_products(plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the simulated cache; more blocks take more in proportion, but for the head."""
    p = plan("best")
    p = dataclasses.replace(
        p, recipe=dataclasses.replace(p.recipe, tuning=Tuning(2, 4, 1e-3, code_sigmas=3.0, cache_rate=1e-3))
    )
    hidden, ahead, made = blocks.first_hidden(p), Ahead(p), []
    with torch.no_grad():
        for layer in range(LAYERS):
            tensors, _ = blocks.quantize_block(p, layer, hidden, ahead)
            made.append(tensors)
        with counter() as counted:
            tune.tune(p, made, p.recipe.candidates[0], hidden[blocks.EXACT])
    assert estimate.tuning_flop(p) == pytest.approx(counted.get_total_flops(), rel=0.05)
    monkeypatch.setattr(estimate, "logits_flop", lambda _: 0.0)
    assert estimate.tuning_flop(p, 2 * LAYERS) == pytest.approx(2 * estimate.tuning_flop(p))


def test_time_is_that_of_the_rehearsal_in_proportion(plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine windows to learn from, three held out, twelve in all; in the rehearsal one, one, and two."""
    p = plan("best")
    rehearsed = {"load": 1.0, "clips": 1.0, "round": 1.0, "exact": 2.0, "learn": 100.0, "candidates": 1.0}
    monkeypatch.setattr(estimate, "quantize_block", lambda *_: (None, {"seconds": known}))
    monkeypatch.setattr(estimate, "head_flop", lambda _: 0.0)
    monkeypatch.setattr(estimate, "tuning_flop", lambda _: 0.0)
    seconds = {}
    for name in ["", *rehearsed]:
        known = dict.fromkeys((*rehearsed, "statistics", "rounded", "targets", "reference", "search"), 1e-9)
        if name:
            known[name] = rehearsed[name]
        seconds[name] = estimate.estimate(p).seconds
    known = dict.fromkeys((*rehearsed, "statistics", "rounded", "targets", "reference", "search"), 1.0)
    whole, rest = estimate.estimate(p), estimate.estimate(p, LAYERS - 1)
    assert rest.seconds == pytest.approx(whole.seconds / LAYERS, rel=0.1)  # later blocks have no other targets here
    assert rest.flop == pytest.approx(whole.flop / LAYERS, rel=0.1)
    hidden = estimate.all_hidden_bytes(p) * (LAYERS - 1)
    assert hidden < whole.written - rest.written < hidden + estimate.packed_bytes(p.adapter)
    expected = {"load": 1, "clips": 1, "round": 1, "exact": 12, "learn": 10 * 9 * 100, "candidates": 3}
    for name, of_block in expected.items():
        assert seconds[name] - seconds[""] == pytest.approx(LAYERS * of_block, rel=1e-6), name


@pytest.mark.parametrize("recipe", ["rtn", "best"])
def test_stored_bytes_are_what_is_stored(recipe: str, plan) -> None:
    p = plan(recipe)
    hidden = blocks.first_hidden(p)
    held = sum(t.nbytes for name, t in hidden.items() if name != blocks.FIRST)
    assert 0 <= estimate.hidden_bytes(p) - held <= 256 * p.adapter.config.hidden_size * 4
    captured: list[QKV] = []
    runner = blocks.BlockRunner(p, p.adapter.load_block(0, torch.float32, "cpu"), SEQ_LEN)
    for window in hidden[blocks.REFERENCE][: p.windows.statistics]:
        runner(window, captured=captured)
    assert estimate.captured_bytes(p) == sum(x.nbytes for qkv in captured for x in qkv)


def test_what_fits_is_on_the_gpu(plan) -> None:
    """With a byte less the targets move to the host, then hidden states, then what is captured; then it is refused."""
    p = plan("paper")

    def placed(budget: int) -> Plan:
        settings = dataclasses.replace(p.settings, device="cuda", memory_budget=budget)
        return estimate.place(dataclasses.replace(p, settings=settings))

    run = placed(10**12)
    hidden, targets, captured = (
        estimate.hidden_bytes(run),
        estimate.target_bytes(run),
        estimate.captured_bytes(run),
    )
    needed = [
        hidden + targets + estimate.working_bytes(run, captured),
        hidden + estimate.working_bytes(run, captured),
        estimate.working_bytes(run, captured),
        estimate.working_bytes(run),
    ]
    assert needed[2] >= needed[3] >= estimate.learning_bytes(run)
    storages = [("cuda", "cuda", "cuda"), ("cuda", "cpu", "cuda"), ("cpu", "cpu", "cuda"), ("cpu", "cpu", "cpu")]
    steps = [(n, s) for n, s, more in zip(needed, storages, [10**12, *needed], strict=False) if n < more]
    on_host = []
    for budget, expected in steps:
        run = placed(budget)
        assert dataclasses.astuple(run.storage) == expected
        assert estimate.device_bytes(run) == budget
        on_host.append(estimate.host_bytes(run))
    assert on_host == sorted(on_host)
    assert on_host[-1] > on_host[0] + targets
    with pytest.raises(ConfigError, match=r"needs about .* GB of GPU memory, --memory-budget is"):
        placed(needed[-1] - 1)


def test_tuning_that_does_not_fit_is_left_out(
    plan, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """First of codes, then altogether, and said; everything else stays. What fits neither way is refused."""
    p = plan("best")
    p = dataclasses.replace(p, recipe=dataclasses.replace(p.recipe, tuning=Tuning(2, 4, 1e-3, code_sigmas=3.0)))
    without = dataclasses.replace(p.recipe, tuning=None)
    steps = dataclasses.replace(p.recipe, tuning=Tuning(2, 4, 1e-3))
    bare = estimate.device_bytes(dataclasses.replace(p, recipe=without))

    def tuning_bytes(q: Plan) -> int:
        """As of a large model: so small a one learns in more than it is tuned in."""
        return bare * {p.recipe: 4, steps: 2, without: 0}[q.recipe]

    monkeypatch.setattr(estimate, "tuning_bytes", tuning_bytes)

    def placed(budget: int) -> Plan:
        return estimate.place(dataclasses.replace(p, settings=dataclasses.replace(p.settings, memory_budget=budget)))

    assert placed(5 * bare).recipe == p.recipe
    assert not caplog.records
    assert placed(3 * bare).recipe == steps
    assert "moving codes when all blocks are tuned together is left out, which costs accuracy" in caplog.text
    caplog.clear()
    assert placed(2 * bare - 1).recipe == without
    assert "tuning all blocks together is left out, which costs accuracy" in caplog.text
    with pytest.raises(ConfigError, match="this run needs about"):
        placed(bare // 100)
    assert [placed(n * bare).left_out for n in (5, 3)] == ["", estimate.lighter(p.recipe)[1][0]]


GOES_ON = "to go on as it began, this run needs about .* GB of memory, --memory-budget is .*; free some memory or give"


@pytest.mark.parametrize(("lacking", "lacked_before"), [(0, 2), (1, 0), (2, 1)])
def test_a_resumed_run_leaves_out_what_it_did(
    lacking: int,
    lacked_before: int,
    files: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also where more fits now; where less does, it is refused. lacking: how many of codes and tuning do not fit."""
    model, text = files
    out, budget, best, now = tmp_path / "out", 10**12, RECIPES["best"], lacked_before
    assert best.learning
    assert best.tuning
    learning = dataclasses.replace(best.learning, epochs=1, few=0)
    recipe = dataclasses.replace(best, learning=learning, tuning=dataclasses.replace(best.tuning, epochs=1, few=0))
    lighter = [lighter for _, lighter in estimate.lighter(recipe)]

    def tuning_bytes(p: Plan) -> int:
        return 2 * budget if p.recipe in lighter[:now] else 0

    monkeypatch.setattr(estimate, "tuning_bytes", tuning_bytes)
    settings = Settings(model, out, text, recipe=recipe, samples=4, seq_len=32, memory_budget=budget)

    def stop(done: int, total: int, note: str) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(settings, stop)
    now, again = lacking, dataclasses.replace(settings, resume=True)
    if lacking > lacked_before:
        with pytest.raises(ConfigError, match=GOES_ON):
            quantize(again)
        now = lacked_before
    told: list[estimate.Estimate] = []
    report = quantize(again, announce=told.append)
    shown = ["", "moving codes when all blocks are tuned together", "tuning all blocks together"][lacked_before]
    assert (told[0].left_out, report["left_out"]) == (shown, shown or None)
    assert report["recipe"] == dataclasses.asdict(lighter[lacked_before])
    assert bool(report["tuning"]) == (lacked_before < 2)
    assert (f"want of memory, which costs accuracy: {shown}." in (out / PAGE_FILE).read_text()) == bool(shown)
    capsys.readouterr()
    Console().print(cli.estimate_table(told[0]))
    assert ("left out" in capsys.readouterr().out) == bool(shown)
    assert cli.main(["inspect", str(out)]) == 0
    assert ("best, without " in capsys.readouterr().out) == bool(shown)


def test_free_memory_is_the_budget(plan, monkeypatch: pytest.MonkeyPatch) -> None:
    p = plan("rtn")
    assert estimate.place(p).storage == Storage()
    monkeypatch.setattr(estimate, "free_bytes", lambda device: 1000)
    with pytest.raises(ConfigError, match=r"1e-06 GB are free \(--memory-budget overrules that\); lower --samples"):
        estimate.place(p)


def test_what_is_gathered_and_written_must_fit_on_the_host(plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU in the budget, on a GPU in what is free beside it."""
    p = plan("rtn")
    device = estimate.device_bytes(p)
    assert estimate.host_bytes(p) >= device
    monkeypatch.setattr(estimate, "host_bytes", lambda plan: 3 * device)

    def placed(budget: int, on: str) -> Plan:
        settings = dataclasses.replace(p.settings, device=on, memory_budget=budget)
        return estimate.place(dataclasses.replace(p, settings=settings))

    placed(3 * device, "cpu")
    with pytest.raises(ConfigError, match=r"needs about .* GB of memory, --memory-budget is .* or --shard-size"):
        placed(3 * device - 1, "cpu")
    monkeypatch.setattr(estimate, "free_bytes", lambda device: 3 * device_bytes)
    device_bytes = device
    placed(10 * device, "cuda")
    device_bytes = device - 1
    with pytest.raises(ConfigError, match=r"needs about .* GB of the host's memory, .* GB are free; lower --samples"):
        placed(10 * device, "cuda")


def test_tuned_codes_are_on_a_cpu_while_the_checkpoint_is_written(plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte for each weight, of all blocks; on a GPU's host they are not."""
    p = plan("best")
    for name in ("device_bytes", "hidden_bytes", "target_bytes", "captured_bytes"):
        monkeypatch.setattr(estimate, name, lambda *_: 0)
    untuned = dataclasses.replace(p, recipe=dataclasses.replace(p.recipe, tuning=None))
    weights = sum(
        p.adapter.load_block(0, torch.float32, "cpu").get_submodule(n).weight.numel() for n in p.adapter.family.linears
    )
    for device, codes in (("cpu", LAYERS * weights), ("cuda", 0)):
        on = dataclasses.replace(p.settings, device=device)
        tuned, rounded = (estimate.host_bytes(dataclasses.replace(q, settings=on)) for q in (p, untuned))
        assert tuned - rounded == codes


def test_dry_run_prints_the_estimate_and_writes_nothing(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, text = files
    command = ["quantize", str(model), str(tmp_path / "out"), "--calib-text", str(text), "--samples", "4"]
    command += ["--seq-len", "32", "--recipe", "best", "--dry-run"]
    assert cli.main(command) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    for row in ("PFLOP", "TFLOP/s", "GB"):
        assert row in shown.err
    assert list(tmp_path.iterdir()) == []
    assert cli.main([*command, "--memory-budget", "100KB"]) == 2
    assert "GB of memory, --memory-budget is 0.0001 GB; lower --samples" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "shown"), [(9.4, "9.4 s"), (99, "99 s"), (100, "1.7 min"), (7200, "2 h"), (1e6, "12 days")]
)
def test_durations(seconds: float, shown: str) -> None:
    assert cli.duration(seconds) == shown
