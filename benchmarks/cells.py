"""Measurements of whole engines, each in a process of its own, and the file that keeps their rows.

A cell is one process, hence one fresh engine. Its specification is an object with
    op       a function of engine_cell.py
    config   config.json of the model, whose weights are random; without it `engine` names a model
    engine   arguments of vLLM's LLM
    points   what to measure with that engine: an object for each row
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import vllm_wkvquant
from vllm_wkvquant.config import ConfigError
from vllm_wkvquant.plugin import vllm_version

# what the caller has set wins
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_INT4_W4A8": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
# these say only that another process failed, after it said why
CONSEQUENCES = ("Engine core initialization failed", "EngineDeadError", "WorkerProc initialization failed")
LOG_LINES = 30

Row = dict[str, Any]


def versions() -> dict[str, str]:
    """Of what a measurement depends on."""
    return {"vllm": vllm_version(), "torch": str(torch.__version__), "vllm-wkvquant": vllm_wkvquant.__version__}


def last_exception(log: str) -> str | None:
    """The last line of the log that names an exception, without the prefix that vLLM's processes give it."""
    lines = (line for line in log.splitlines() if " WARNING " not in line)  # that was handled
    matches = (re.search(r"\b(?:[a-zA-Z_]\w*\.)*[A-Z]\w*(?:Error|Exception)(?:: .*)?$", line) for line in lines)
    found = [match[0] for match in matches if match]
    causes = [line for line in found if not any(c in line for c in CONSEQUENCES)]
    return (causes or found or [None])[-1]


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the process and its children, and wait until they have given back the GPU."""
    for _ in range(100):
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            break
        process.wait()
        time.sleep(0.1)


def run_cell(spec: dict[str, Any], limit_seconds: float, in_process: bool = False) -> tuple[list[Row], str | None]:
    """Rows of a cell, in the order of its points, and what ended it early, None where nothing did.

    in_process: keep the engine in the cell's own process, where its memory and its steps can be looked at.
    """
    environment = ENVIRONMENT | os.environ
    if in_process:
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    with tempfile.TemporaryDirectory(prefix="wkvquant-cell-") as name:
        folder = Path(name)
        rows, log = folder / "rows.jsonl", folder / "log"
        if "config" in spec:
            (folder / "model").mkdir()
            (folder / "model" / "config.json").write_text(json.dumps(spec["config"]))
            # a relative path is the same in every cell, and vLLM's cache of compiled code asks for that
            spec = spec | {"engine": spec["engine"] | {"model": "model"}}
        (folder / "spec.json").write_text(json.dumps(spec))
        rows.touch()
        command = [sys.executable, Path(__file__).with_name("engine_cell.py").resolve(), "spec.json", rows.name]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            error = None
            try:
                code = process.wait(limit_seconds)
                if code < 0:
                    error = f"ended by {signal.Signals(-code).name}"
                elif code:
                    error = last_exception(log.read_text(errors="replace")) or f"exit status {code}"
            except subprocess.TimeoutExpired:
                error = f"not done after {limit_seconds:g} s"
            finally:
                end_group(process)
        if error:
            print(*log.read_text(errors="replace").splitlines()[-LOG_LINES:], sep="\n", file=sys.stderr)
        return [json.loads(line) for line in rows.read_text().splitlines()], error


class Results:
    """Rows, each known by some of its fields, kept in a file of JSON lines where a path is given."""

    def __init__(self, path: Path | None) -> None:
        """Raises ConfigError where the file cannot be read or written."""
        self.path = path
        self.rows: list[Row] = []
        if path is None:
            return
        if not path.parent.is_dir():
            raise ConfigError(f"{path.parent} is not a directory; --output needs one that exists")
        for number, line in enumerate(path.read_text().splitlines() if path.is_file() else [], 1):
            try:
                self.rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ConfigError(f"{path}, line {number}: not JSON ({error}); remove the line") from error

    def find(self, key: Row) -> Row | None:
        """The row with these fields."""
        return next((row for row in self.rows if row.items() >= key.items()), None)

    def put(self, key: Row, row: Row) -> None:
        """Add `row`, which has the fields of `key`, in place of the one that had them."""
        at = next((i for i, r in enumerate(self.rows) if r.items() >= key.items()), len(self.rows))
        self.rows[at : at + 1] = [row]
        if self.path is not None:
            new = self.path.with_name(self.path.name + ".new")
            new.write_text("".join(json.dumps(r) + "\n" for r in self.rows))
            new.replace(self.path)
