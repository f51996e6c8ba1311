"""benchmarks/calibration.py: which blocks it measures, and what it makes of their times."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import calibration
import pytest

from vllm_wkvquant import cli
from vllm_wkvquant.quantize import blocks
from vllm_wkvquant.quantize.estimate import block_flop
from vllm_wkvquant.quantize.plan import Storage
from vllm_wkvquant.quantize.recipes import PAPER


def arguments(*more: Any) -> list[str]:
    common = ["--shape", "tiny", "--samples", 4, "--seq-len", 32, "--blocks", 2, "--dtype", "float32"]
    return [str(x) for x in [*common, *more]]


def measured(file: Path) -> dict[str, Any]:
    (line,) = file.read_text().splitlines()
    return json.loads(line)


def test_measured_blocks_have_all_their_followers(tmp_path: Path, monkeypatch) -> None:
    """And its FLOP are those of the preflight; the shape itself has too few blocks for that."""
    targets, plans = [], []

    def learn(learning: Any, block: Any, forward: Any, inputs: Any, of_block: Any, *rest: Any) -> Any:
        targets.append(len(of_block))
        return original(learning, block, forward, inputs, of_block, *rest)

    def preflight(settings: Any) -> Any:
        plans.append(of_settings(settings))
        return plans[-1]

    original, of_settings = blocks.learn, calibration.preflight
    monkeypatch.setattr(blocks, "learn", learn)
    monkeypatch.setattr(calibration, "preflight", preflight)
    out = tmp_path / "out.jsonl"
    assert calibration.main(arguments("--recipe", "paper", "--output", out, "--folder", tmp_path)) == 0
    assert PAPER.learning
    assert targets == [1 + PAPER.learning.followers] * 2
    assert calibration.SHAPES["tiny"].layers < 1 + PAPER.learning.followers
    row = measured(out)
    assert row["blocks_measured"] == 2
    assert row["pflop"] * 1e15 == pytest.approx(sum(sum(block_flop(plans[0], i).values()) for i in range(2)))
    assert set(row["seconds_by_part"]) >= {"exact", "learn", "reference", "candidates", "write"}
    assert row["peak_bytes"]["host"] > row["expected_bytes"]["host"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl"]


def test_projection(monkeypatch) -> None:
    """Mean time and FLOP of the measured blocks, for all blocks of the shape."""
    monkeypatch.setattr(calibration, "host_bytes", lambda plan: 1)
    plan: Any = type("Plan", (), {"settings": type("Settings", (), {"device": "cpu"}), "storage": Storage()})
    took = [calibration.Block({"learn": 50.0, "write": 10.0}, 2e15), calibration.Block({"learn": 30.0}, 4e15)]
    row = calibration.summarize(plan, replace(calibration.SHAPES["tiny"], layers=32), took, None, {"host": 2})
    assert row["projected_minutes"] == 24.0
    assert (row["pflop"], row["projected_pflop"]) == (6.0, 96.0)
    assert row["tflops"] == round(6e15 / 90 / 1e12, 3)
    assert row["seconds_by_part"] == {"learn": 80.0, "write": 10.0}


def test_tuning_is_measured(tmp_path: Path) -> None:
    """Of a shape with as many blocks as are measured, all of it."""
    out = tmp_path / "out.jsonl"
    assert calibration.SHAPES["tiny"].layers == 2
    assert calibration.main(arguments("--recipe", "best", "--output", out)) == 0
    row = measured(out)
    assert row["tuning_seconds"] > 0
    assert (row["without_tuning"], row["left_out"]) == (False, None)
    assert row["tuning_pflop"] > 0
    assert row["projected_pflop"] == pytest.approx(row["pflop"] + row["tuning_pflop"])


def test_projection_of_tuning(monkeypatch) -> None:
    """By its FLOP, beside that of the blocks by their number."""
    monkeypatch.setattr(calibration, "host_bytes", lambda plan: 1)
    monkeypatch.setattr(calibration, "tuning_flop", lambda plan, blocks=None: 4e15 if blocks == 32 else 1e15)
    plan: Any = type("Plan", (), {"settings": type("Settings", (), {"device": "cpu"}), "storage": Storage()})
    took = [calibration.Block({"learn": 30.0}, 2e15)]
    row = calibration.summarize(plan, replace(calibration.SHAPES["tiny"], layers=32), took, 60.0, {"host": 2})
    assert (row["tuning_seconds"], row["tuning_pflop"], row["projected_tuning_minutes"]) == (60.0, 1.0, 4.0)
    assert row["projected_minutes"] == 16.0 + 4.0
    assert row["projected_pflop"] == 64.0 + 4.0


def test_limit_and_rows_that_are_there(tmp_path: Path, monkeypatch, capsys) -> None:
    """A row of all blocks is shown again; one that the limit has cut is measured anew."""
    out = tmp_path / "out.jsonl"
    command = arguments("--recipe", "rtn", "--output", out)
    assert calibration.main([*command, "--limit-seconds", "0"]) == 0
    assert measured(out)["blocks_measured"] == 1
    assert calibration.main(command) == 0
    assert [json.loads(line)["blocks_measured"] for line in out.read_text().splitlines()] == [1, 2]
    monkeypatch.setattr(calibration, "run_shape", None)
    capsys.readouterr()
    assert calibration.main(command) == 0
    assert "2 blocks, 4 x 32" in capsys.readouterr().out


def test_a_projection_without_tuning_is_called_so(tmp_path: Path, capsys) -> None:
    out = tmp_path / "out.jsonl"
    command = arguments("--recipe", "best", "--output", out, "--limit-seconds", 0)
    assert calibration.main(command) == 0
    row = measured(out)
    assert row["without_tuning"]
    assert "tuning_seconds" not in row
    assert "blocks, without tuning, which was not measured" in capsys.readouterr().out


def test_the_model_alone(tmp_path: Path) -> None:
    """A whole model, which `wkvquant quantize` takes."""
    folder = tmp_path / "tiny"
    assert calibration.main(arguments("--write-model", folder)) == 0
    command = ["quantize", folder / "model", tmp_path / "out", "--calib-text", folder / "calib.txt", "--recipe", "rtn"]
    assert cli.main([str(x) for x in [*command, "--samples", 4, "--seq-len", 32]]) == 0
    assert json.loads((tmp_path / "out/config.json").read_text())["num_hidden_layers"] == 2
    assert calibration.main(arguments("--write-model", folder)) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--recipe", "none"], "recipe 'none' does not exist"),
        (["--blocks", 0], "--blocks 0 must be positive"),
        (["--output", "/no/such/place.jsonl"], "is not a directory"),
        (["--memory-budget-gb", 0.0001], "--memory-budget is 0.0001 GB"),
    ],
)
def test_bad_arguments_are_refused(more: list[Any], message: str, capsys) -> None:
    assert calibration.main(arguments(*more)) == 2
    assert message in capsys.readouterr().err
