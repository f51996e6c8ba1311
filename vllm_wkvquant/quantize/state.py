"""What a run has done so far, on disk, so that a killed one loses at most the block it was in and, where blocks are
written while the next one is computed, the one before.

    OUT.wkvquant-partial/
      lock                        held while a process writes
      run.json                    settings; what is left out for want of memory; how many blocks are done; whether the
                                  result is being written
      block-00000.safetensors     tensors of a finished block, KV parameters of every candidate among them
      block-00000.json            its report
      hidden-00001.safetensors    hidden states of all windows before block 1
      checkpoint/                 the result while it is written; renamed to OUT

`run.json` is renamed into place after the files that it speaks of, so it never speaks of one that is not whole.
"""

import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from vllm_wkvquant.checkpoint import read_object
from vllm_wkvquant.config import ConfigError
from vllm_wkvquant.quantize.files import UNNAMED, lock, write_json, write_tensors, writing

SUFFIX = ".wkvquant-partial"
LOCK = "lock"  # held by the process that writes
RUN = "run.json"
RESULT = "checkpoint"
OF_BLOCKS = re.compile(r"(block|hidden)-\d{5,}\.(safetensors|json)")
UNFINISHED = re.compile(rf"({OF_BLOCKS.pattern}|{re.escape(RUN)})\.tmp|{UNNAMED.pattern}")

Stage = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def partial_directory(out: Path) -> Path:
    """Where a run towards `out` keeps its state: beside it, so that the final rename stays on one file system."""
    return out.with_name(out.name + SUFFIX)


def held_bytes(out: Path) -> int:
    """Bytes of the files that an interrupted run towards `out` has left, but for those that it had not finished."""
    files = (file for file in partial_directory(out).rglob("*") if file.is_file())
    return sum(file.stat().st_size for file in files if not UNFINISHED.fullmatch(file.name))


def check_output(out: Path, resume: bool) -> None:
    """Raise ConfigError unless a run may write to `out`, and a directory can be renamed to it."""
    if out.name in ("", ".."):
        raise ConfigError(f"output directory {out} has no name of its own; give the path of a new directory")
    if out.is_symlink():
        raise ConfigError(
            f"output directory {out} is a symbolic link; give the directory that it leads to, or a new one"
        )
    if out.is_mount():
        raise ConfigError(f"output directory {out} is a mount point; give a new directory in it")
    partial = partial_directory(out)
    if is_finished(out):
        raise ConfigError(f"{out} is finished; {partial} is left of its run: delete it, or let --resume do so")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"output directory {out} is not empty; give a new one or delete it")
    if not resume and (partial / RUN).is_file():
        if (partial / LOCK).is_file():
            with open(partial / LOCK) as file:
                lock(file, partial)
        raise ConfigError(f"{partial} holds an interrupted run; continue it with --resume or delete it")


def is_finished(out: Path) -> bool:
    """Whether a run towards `out` was stopped after its result came to its place, and before its state was deleted."""
    partial = partial_directory(out)
    if not (partial / RUN).is_file() or (partial / RESULT).exists() or not (out / "config.json").is_file():
        return False
    return bool(read_object(partial / RUN).get("result_begun"))


def finish(out: Path, asked: dict[str, Any], dry_run: bool) -> None:
    """Delete the state of a run that `is_finished`, or only check. Raises ConfigError.

    asked: of the settings that the run shall have had.
    """
    partial = partial_directory(out)
    before = read_object(partial / RUN)["settings"]
    if differing := difference({name: before.get(name) for name in asked}, asked):
        raise ConfigError(
            f"{out} is finished and was made with other settings {differing}; use the same ones or a new directory, or "
            f"delete {partial}"
        )
    if dry_run:
        return
    try:
        with open(partial / LOCK, "w") as file:
            lock(file, partial)
            delete(partial)
    except OSError as error:
        raise ConfigError(f"{partial} cannot be deleted: {error.strerror}") from error


def difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Names of the settings that differ, and what the first of them was and is; "" where none does."""
    differing = sorted(k for k in {*before, *now} if before.get(k) != now.get(k))
    if "recipe" in differing:  # which says it of its parts
        differing = [k for k in differing if not k.startswith("recipe.")]
    if not differing:
        return ""
    k = differing[0]
    was, new = (shorten(repr(said.get(k)), 200, placeholder=" ...") for said in (before, now))
    return f"({', '.join(differing)}): {k} was {was}, now {new}"


def delete(partial: Path) -> None:
    """Delete a run's state, `run.json` last: it says what the rest is. What no run writes stays, in its directory."""
    delete_files(partial, UNFINISHED)
    delete_files(partial, OF_BLOCKS)
    for name in (RUN, LOCK):
        (partial / name).unlink(missing_ok=True)
    if not any(partial.iterdir()):
        partial.rmdir()


def delete_files(partial: Path, names: re.Pattern[str]) -> None:
    """Delete the files of a run's state that have such names."""
    for file in partial.iterdir():
        if names.fullmatch(file.name) and not file.is_dir():
            file.unlink()


def others(out: Path) -> str:
    """What to say where `delete` has left something; "" where it has not."""
    partial = partial_directory(out)
    return f"; {partial} stays, for what is there is not of the run" if partial.exists() else ""


def begun_before(out: Path, settings: dict[str, Any]) -> tuple[str | None, int]:
    """What an interrupted run towards `out` with these settings goes on without, "" for nothing, and its finished
    blocks; (None, 0) where there is no such run."""
    file = partial_directory(out) / RUN
    run = _object(file) if file.is_file() else {}
    return (run.get("left_out"), run["blocks_done"]) if run.get("settings") == settings else (None, 0)


def _object(file: Path) -> dict[str, Any]:
    try:
        return read_object(file)
    except ConfigError as error:
        raise ConfigError(f"{error}; delete {file.parent} to begin anew") from error


class RunState:
    """The state of one run; holds a lock on its directory as long as the process lives."""

    def __init__(self, out: Path, settings: dict[str, Any], stage: Stage | None = None, left_out: str = "") -> None:
        """Open the state of a run towards `out`, or begin one. Raises ConfigError where `settings` differ from it.

        stage: copies hidden states to where they remain until it is called again. With it, blocks are written while the
        caller goes on. left_out: of `Plan`, for `begun_before`.
        """
        self._stage, self._writing = stage, Future[None]()
        self._writing.set_result(None)
        self._writer = ThreadPoolExecutor(1)
        self.directory = partial_directory(out)
        self._settings, self._left_out = settings, left_out
        self.blocks_done = 0
        with writing(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.directory / LOCK, "w")  # noqa: SIM115, held until the process ends
        lock(self._lock, self.directory)
        with writing(self.directory):
            delete_files(self.directory, UNFINISHED)
        if (self.directory / RUN).is_file():
            self._resume()

    def _resume(self) -> None:
        run = _object(self.directory / RUN)
        if differing := difference(run["settings"], self._settings):
            raise ConfigError(
                f"{self.directory} was begun with other settings {differing}; use the same ones or delete that "
                f"directory"
            )
        self.blocks_done = run["blocks_done"]

    def _file(self, kind: str, number: int, suffix: str = "safetensors") -> Path:
        return self.directory / f"{kind}-{number:05d}.{suffix}"

    def _tensors(self, kind: str, number: int) -> dict[str, torch.Tensor]:
        file = self._file(kind, number)
        try:
            return load_file(file)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{file} is damaged: {error}; delete {self.directory} to begin anew") from error

    def hidden(self) -> dict[str, torch.Tensor]:
        """Hidden states before block `blocks_done`, by what `commit` called them."""
        return self._tensors("hidden", self.blocks_done)

    def block(self, layer: int) -> dict[str, torch.Tensor]:
        """Tensors of a finished block."""
        return self._tensors("block", layer)

    def report(self, layer: int) -> dict[str, Any]:
        """Report of a finished block."""
        return _object(self._file("block", layer, "json"))

    def commit(self, tensors: dict[str, torch.Tensor], report: dict[str, Any], hidden: dict[str, torch.Tensor]) -> None:
        """Keep a finished block and the hidden states after it. Raises WriteError; where writing goes on, the next call
        or `wait` does."""
        self.wait()
        if self._stage is None:
            self._write(self.blocks_done, tensors, report, hidden)
        else:
            hidden = self._stage(hidden)
            self._writing = self._writer.submit(self._write, self.blocks_done, tensors, report, hidden)
        self.blocks_done += 1

    def wait(self) -> None:
        """Until everything is written. Raises WriteError."""
        self._writing.result()

    def _write(
        self, layer: int, tensors: dict[str, torch.Tensor], report: dict[str, Any], hidden: dict[str, torch.Tensor]
    ) -> None:
        write_tensors(self._file("block", layer), tensors)
        write_json(self._file("block", layer, "json"), report)
        write_tensors(self._file("hidden", layer + 1), hidden)
        self._write_run(layer + 1)
        with writing(self._file("hidden", layer)):
            self._file("hidden", layer).unlink(missing_ok=True)

    def _write_run(self, blocks_done: int, result_begun: bool = False) -> None:
        run = {"settings": self._settings, "left_out": self._left_out, "blocks_done": blocks_done}
        run["result_begun"] = result_begun
        write_json(self.directory / RUN, run)

    def result(self) -> Path:
        """Where the result is written until it is renamed to its place, once `mark` is called."""
        return self.directory / RESULT

    def mark(self) -> None:
        """Note that `result` is there: once it is not, it has come to its place. Raises WriteError."""
        self._write_run(self.blocks_done, result_begun=True)

    def close(self) -> None:
        """Delete the state, once the result is at its place."""
        self.wait()
        self._writer.shutdown()
        with writing(self.directory):
            delete(self.directory)
        self._lock.close()
