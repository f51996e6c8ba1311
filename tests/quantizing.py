"""What tests of `wkvquant quantize` share: a tiny model and text, runs that are refused or stop on the way."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from models import save_text, tiny_model

from vllm_wkvquant import cli
from vllm_wkvquant.quantize.state import RunState

ARGUMENTS = ["--samples", "4", "--seq-len", "32", "--recipe", "rtn"]


def quantize_command(model: Path, text: Path, out: Path, *more: str) -> list[str]:
    return ["quantize", str(model), str(out), "--calib-text", str(text), *ARGUMENTS, *more]


def interrupt(model: Path, text: Path, out: Path) -> None:
    """Leave the state of a run that stopped after its first block."""

    def stop(self: RunState, *args: object) -> None:
        commit(self, *args)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    commit, RunState.commit = RunState.commit, stop  # type: ignore[method-assign,assignment]
    try:
        assert cli.main(quantize_command(model, text, out)) == 130
    finally:
        RunState.commit = commit  # type: ignore[method-assign]


def stop(*_: object) -> None:
    raise KeyboardInterrupt


def stop_at(place: Any, name: str, command: list[str], how: Any = stop) -> None:
    """Run a command that is interrupted where `place.name` is called."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, name, how)
        assert cli.main(command) == 130


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), num_layers=2)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text(tmp_path_factory.mktemp("text") / "calib.txt")


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """The model, to be damaged."""
    (tmp_path / "copy").mkdir()
    for file in model.iterdir():
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "copy"


@pytest.fixture(scope="module")
def checkpoint(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("checkpoint") / "out"
    assert cli.main(quantize_command(model, text, out)) == 0
    return out


@pytest.fixture
def refused(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `wkvquant quantize`, expects it to be refused, and returns the message."""

    def run(model: Path, *arguments: str, out: Path | None = None, calib_text: Path = text) -> str:
        target = out or tmp_path / "out"
        before = sorted(target.iterdir()) if target.is_dir() else None
        capsys.readouterr()
        status = cli.main(quantize_command(model, calib_text, target, *arguments))
        shown = capsys.readouterr().err
        assert status == 2
        assert (sorted(target.iterdir()) if target.is_dir() else None) == before
        assert shown.startswith("error: ")
        assert shown.count("\n") == 1
        return shown.removeprefix("error: ").strip()

    return run


@pytest.fixture
def stopped(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `wkvquant quantize`, expects it to be refused after it began, and returns the message."""

    def run(model: Path, *arguments: str) -> str:
        out = tmp_path / "out"
        shutil.rmtree(tmp_path / "out.wkvquant-partial", ignore_errors=True)
        capsys.readouterr()
        command = quantize_command(model, text, out, *arguments)
        assert cli.main(command) == 2
        assert not out.exists()
        return capsys.readouterr().err.splitlines()[-1].removeprefix("error: ")

    return run
