"""Interrupted runs of `wkvquant quantize`: what is resumed, refused, deleted and kept."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import contents, edit_config, edit_tensors, save_text
from quantizing import interrupt, quantize_command, stop, stop_at
from safetensors.torch import save_file

from vllm_wkvquant import cli
from vllm_wkvquant.checkpoint import ShardedTensors
from vllm_wkvquant.quantize import blocks, pipeline, state, writer
from vllm_wkvquant.quantize.files import UNNAMED
from vllm_wkvquant.quantize.recipes import RECIPES
from vllm_wkvquant.quantize.state import RunState

pytest_plugins = ["quantizing"]


def test_interrupted_run_is_not_overwritten(
    refused: Callable[..., str], model: Path, text: Path, tmp_path: Path
) -> None:
    interrupt(model, text, tmp_path / "out")
    partial = tmp_path / "out.wkvquant-partial"
    assert refused(model) == f"{partial} holds an interrupted run; continue it with --resume or delete it"
    with open(partial / "lock") as lock:  # its process lives
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert refused(model) == f"another process is writing {partial}"


def test_resume_with_other_settings(
    refused: Callable[..., str],
    model: Path,
    copy: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interrupt(model, text, tmp_path / "out")
    partial = tmp_path / "out.wkvquant-partial"
    assert refused(model, "--resume", "--recipe", "static") == (
        f"{partial} was begun with other settings (recipe): recipe was 'rtn', now 'static'; use the same ones or "
        f"delete that directory"
    )
    assert refused(model, "--resume", "--recipe", "best") == (
        f"{partial} was begun with other settings (recipe): recipe was 'rtn', now 'best'; use the same ones or "
        f"delete that directory"
    )
    with monkeypatch.context() as patch:
        patch.setitem(RECIPES, "rtn", replace(RECIPES["rtn"], key_hadamard=False))
        changed = "(recipe.key_hadamard): recipe.key_hadamard was 'True', now 'False'; "
        assert refused(model, "--resume").startswith(f"{partial} was begun with other settings {changed}")
    assert refused(model, "--resume", "--seed", "1").startswith(
        f"{partial} was begun with other settings (calibration tokens, seed): "
    )
    edit_tensors(copy, lambda tensors: tensors["lm_head.weight"].zero_())
    assert refused(copy, "--resume").startswith(f"{partial} was begun with other settings (weight files): ")
    weights, before = copy / "model.safetensors", (model / "model.safetensors").stat()
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weights.stat().st_size == before.st_size
    assert refused(copy, "--resume").startswith(f"{partial} was begun with other settings (weight files): ")


@pytest.mark.parametrize(
    ("module", "name", "done"),
    [(pipeline, "quantize_block", 0), (blocks, "fold_value", 0), (RunState, "commit", 1), (pipeline, "judge", 2)],
)
@pytest.mark.parametrize("gone", [False, True])
def test_a_model_that_changes(
    module: Any,
    name: str,
    done: int,
    gone: bool,
    stopped: Callable[..., str],
    copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before a block is loaded, after that, between two, and after the last one: what has read it is not kept."""
    weights, real = copy / "model.safetensors", getattr(module, name)
    content = weights.read_bytes()

    def change(*args: Any) -> Any:
        if gone:
            weights.unlink(missing_ok=True)
        else:
            weights.write_bytes(content)
        return real(*args)

    os.utime(weights, ns=(0, 0))
    monkeypatch.setattr(module, name, change)
    changed = "has changed since this run began, and what comes of it would be a mixture; start again with a new output"
    lost = "cannot be read any more; put it back and go on with --resume"
    assert stopped(copy) == (f"{weights} {lost}" if gone else f"{weights} {changed} directory")
    run = tmp_path / "out.wkvquant-partial" / "run.json"
    assert (json.loads(run.read_text())["blocks_done"] if run.is_file() else 0) == done


@pytest.mark.parametrize("size", [1, 1000, 1 << 20])
def test_weights_are_known_by_a_sample(size: int, tmp_path: Path) -> None:
    """Of the same size and time: their first and last bytes, names, and what is large."""
    file = tmp_path / "model.safetensors"

    def digest(name: str, data: torch.Tensor) -> str:
        save_file({name: data.to(torch.uint8)}, file)
        os.utime(file, ns=(0, 0))
        return ShardedTensors(tmp_path).digest()

    places, zeros = torch.arange(size), torch.zeros(size)
    others = [places == 0, places == size - 1, (places >= size // 3) & (places < size // 3 + size // 60 + 4096)]
    found = [digest("a", zeros), *(digest("a", other) for other in others[: min(size, 3)]), digest("b", zeros)]
    assert len({*found}) == len(found)
    assert digest("a", zeros) == found[0]


def test_stopped_when_the_result_was_there(
    refused: Callable[..., str],
    model: Path,
    text: Path,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is left is to delete the state, also where that was stopped."""
    out, partial = tmp_path / "out", tmp_path / "out.wkvquant-partial"
    command = quantize_command(model, text, out)

    def stop_on_the_way(path: Path) -> None:
        next(path.glob("block-*")).unlink()
        stop()

    for stopping in (stop, stop_on_the_way):
        stop_at(state, "delete", command, stopping)
        assert refused(model) == f"{out} is finished; {partial} is left of its run: delete it, or let --resume do so"
        capsys.readouterr()
        assert cli.main([*command, "--resume"]) == 0
        assert capsys.readouterr().out == f"{out}: finished before; what was left of the run is deleted\n"
        assert not partial.exists()
        assert contents(out) == contents(checkpoint)
        shutil.rmtree(out)
    stop_at(writer, "copy_companions", command)  # before the result is renamed
    out.mkdir()
    (out / "config.json").write_text("{}")
    assert refused(model, "--resume") == f"output directory {out} is not empty; give a new one or delete it"
    shutil.rmtree(out)
    assert cli.main([*command, "--resume"]) == 0
    assert contents(out) == contents(checkpoint)


def test_a_finished_run_with_other_settings(
    refused: Callable[..., str],
    model: Path,
    copy: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is refused, and its state stays, as it does on a dry run."""
    out, partial = tmp_path / "out", tmp_path / "out.wkvquant-partial"
    command = quantize_command(model, text, out)

    stop_at(state, "delete", command)
    left = contents(partial)
    edit_config(copy, rms_norm_eps=1e-4)
    other_text = save_text(tmp_path / "other.txt", seed=1)
    made = f"{out} is finished and was made with other settings "
    assert refused(model, "--resume", "--recipe", "static") == (
        f"{made}(recipe): recipe was 'rtn', now 'static'; use the same ones or a new directory, or delete {partial}"
    )
    for arguments, differing in (
        (["--samples", "5"], "(calibration tokens, samples): "),
        (["--own-samples", "1"], "(own_samples): own_samples was 0, now 1; "),
        (["--seq-len", "48"], "(calibration tokens, seq_len): "),
        (["--dtype", "bfloat16"], "(dtype): dtype was 'float32', now 'bfloat16'; "),
        (["--recipe", "static", "--dry-run"], "(recipe): "),
    ):
        assert refused(model, "--resume", *arguments).startswith(f"{made}{differing}")
    assert refused(copy, "--resume").startswith(f"{made}(config.json, weight files): ")
    assert refused(model, "--resume", calib_text=other_text).startswith(f"{made}(calibration tokens): ")
    capsys.readouterr()
    assert cli.main([*command, "--resume", "--dry-run"]) == 0
    assert capsys.readouterr().out == f"{out}: finished before; what was left of the run would be deleted\n"
    assert contents(partial) == left
    assert cli.main([*command, "--resume"]) == 0
    assert not partial.exists()


def test_what_is_not_of_the_run_stays(
    model: Path,
    text: Path,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.wkvquant-partial"
    command = quantize_command(model, text, out)
    stays = f"; {partial} stays, for what is there is not of the run"
    theirs = {"folder/file": b"1", "block-00000.json.bak": b"2", "notes.txt": b"3", "block-00009.json/file": b"4"}
    for name, content in theirs.items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).write_bytes(content)
    assert cli.main(command) == 0
    assert capsys.readouterr().out.endswith(f" chosen{stays}\n")
    assert contents(partial) == theirs
    assert contents(out) == contents(checkpoint)
    shutil.rmtree(out)

    stop_at(state, "delete", command)
    # of a run that was killed
    for name in ("block-00001.safetensors.tmp", "hidden-00001.safetensors", "run.json.tmp", ".tmpR4QMZ0"):
        (partial / name).touch()
    capsys.readouterr()
    assert cli.main([*command, "--resume"]) == 0
    assert capsys.readouterr().out == f"{out}: finished before; what was left of the run is deleted{stays}\n"
    assert contents(partial) == theirs
    assert contents(out) == contents(checkpoint)


def test_files_that_a_killed_run_had_not_finished(
    refused: Callable[..., str], model: Path, text: Path, tmp_path: Path
) -> None:
    """They are not counted as what the run has already, and are deleted when its state is opened."""
    interrupt(model, text, tmp_path / "out")
    partial = tmp_path / "out.wkvquant-partial"
    whole, held = sorted(partial.iterdir()), state.held_bytes(tmp_path / "out")
    theirs = [partial / name for name in (".tmpR4QMZ", "notes.tmp", "block-00001.json.tmp0")]
    for name in (".tmpR4QMZ0", "block-00001.safetensors.tmp", "hidden-00002.safetensors.tmp", "run.json.tmp"):
        (partial / name).write_bytes(bytes(1000))
    assert state.held_bytes(tmp_path / "out") == held
    for file in theirs:
        file.touch()
    assert refused(model, "--resume", "--seed", "1").startswith(f"{partial} was begun with other settings ")
    assert sorted(partial.iterdir()) == sorted([*whole, *theirs])


def test_a_dry_run_counts_what_is_left(model: Path, text: Path, tmp_path: Path, monkeypatch) -> None:
    counted, real = [], pipeline.estimate
    monkeypatch.setattr(pipeline, "estimate", lambda plan, done=0: counted.append(done) or real(plan, done))
    interrupt(model, text, tmp_path / "out")
    command = quantize_command(model, text, tmp_path / "out", "--resume")
    assert cli.main([*command, "--dry-run"]) == 0
    assert cli.main(command) == 0
    assert counted == [0, 1, 1]


STATE = ["run.json", "block-00000.json", "block-00000.safetensors", "hidden-00001.safetensors"]


@pytest.mark.parametrize("name", STATE)
def test_state_that_is_damaged(
    name: str, model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after a power failure."""
    out, partial = tmp_path / "out", tmp_path / "out.wkvquant-partial"
    interrupt(model, text, out)
    (partial / name).write_bytes(b"")
    assert cli.main(quantize_command(model, text, out, "--resume")) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"error: {partial / name} is ")
    assert message.endswith(f"; delete {partial} to begin anew")


@pytest.mark.parametrize(
    ("kind", "text_of_it"),
    [(torch.OutOfMemoryError, "CUDA out of memory. "), (RuntimeError, "you can't allocate memory"), (MemoryError, "")],
)
def test_out_of_memory(
    kind: type[Exception],
    text_of_it: str,
    stopped: Callable[..., str],
    model: Path,
    checkpoint: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was finished is kept."""
    real = pipeline.quantize_block

    def fail(plan: Any, layer: int, *others: Any) -> Any:
        if layer == 1:
            raise kind(text_of_it)
        return real(plan, layer, *others)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "quantize_block", fail)
        assert stopped(model).startswith("out of memory: ")
    command = quantize_command(model, text, tmp_path / "out", "--resume")
    assert cli.main(command) == 0
    assert contents(tmp_path / "out").keys() == contents(checkpoint).keys()


def test_safetensors_leaves_a_file_of_that_name(tmp_path: Path) -> None:
    """Where it is killed while it writes."""
    code = "import torch; from safetensors.torch import save_file; save_file({'a': torch.zeros(1 << 27)}, 'file')"
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path) as process:
        seen: set[str] = set()
        while process.poll() is None and not seen:
            seen = {file.name for file in tmp_path.iterdir()}
        process.kill()
    assert len(seen) == 1
    assert UNNAMED.fullmatch(seen.pop())
