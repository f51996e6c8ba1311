"""Checkpoints of changed recipes: each change does what its name says, and runs can be cut off and repeated."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import ablate
import pytest
import torch
from models import save_text, tiny_model

from vllm_wkvquant.checkpoint import Checkpoint
from vllm_wkvquant.config import ConfigError
from vllm_wkvquant.quantize import blocks, pipeline
from vllm_wkvquant.quantize.recipes import BEST, PAPER, RTN


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ablate")
    tiny_model(path / "model", "qwen2", num_layers=3, key_bias=8.0)
    save_text(path / "calib.txt", seed=1)
    return path


def arguments(folder: Path, out: Path, *more: Any) -> list[str]:
    common = [folder / "model", out, "--calib-text", folder / "calib.txt", "--samples", 4, "--seq-len", 32]
    return [str(x) for x in [*common, *more]]


def fields(recipe: Any) -> dict[str, Any]:
    flat = {f"recipe.{k}": v for k, v in vars(recipe).items() if k not in ("name", "learning")}
    return flat | {f"learning.{k}": v for k, v in vars(recipe.learning).items()} if recipe.learning else flat


def test_a_variant_changes_what_it_names() -> None:
    """One field of its recipe, or the two that are one part; none is its recipe, and no two are the same."""
    several = {"one_smoothing": 2, "no_smoothing": 2, "learned_cache": 4}
    seen = []
    for name, variant in ablate.VARIANTS.items():
        assert variant.name == name
        base = next(r for r in (BEST, PAPER, RTN, ablate.STATIC) if name.split("_")[0] == r.name)
        changed = {k for k, v in fields(variant).items() if fields(base)[k] != v}
        part = name.partition("_")[2]
        assert len(changed) == (several.get(part, 1) if part else 0), name
        assert fields(variant) not in seen
        seen.append(fields(variant))


def test_every_variant_makes_a_checkpoint(folder: Path, tmp_path: Path, capsys) -> None:
    """With other codes or other cache parameters than its recipe; and a second run makes nothing."""
    assert ablate.main(arguments(folder, tmp_path)) == 0
    capsys.readouterr()
    rows = [json.loads(line) for line in (tmp_path / ablate.ROWS).read_text().splitlines()]
    assert [row["variant"] for row in rows] == list(ablate.VARIANTS)
    assert all(row["kl_cache"] > 0 and row["seconds"] > 0 for row in rows)
    assert all((row["kl_weights"] is None) == (ablate.VARIANTS[row["variant"]].learning is None) for row in rows)

    def tensors(name: str) -> dict[str, torch.Tensor]:
        ckpt = Checkpoint(tmp_path / f"{name}-0")
        return ckpt.tensors.get([n for n in ckpt.tensors.shapes() if ".layers." in n])

    for name, variant in ablate.VARIANTS.items():
        base, _, part = name.partition("_")
        report = json.loads((tmp_path / f"{name}-0" / "wkvquant.json").read_text())
        assert report["recipe"] == ablate.as_written(dataclasses.asdict(variant))
        mine, other = tensors(name), tensors(base)
        assert mine.keys() == other.keys()
        same = all(torch.equal(mine[n], other[n]) for n in mine)
        assert same == (not part), name

    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/wkvquant.json")}
    assert ablate.main(arguments(folder, tmp_path, "--variants", "best,best_mse")) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/wkvquant.json")} == made
    printed = capsys.readouterr().out
    assert f"--checkpoint best-0={tmp_path}/best-0 --checkpoint best_mse-0=" in printed
    best = next(row for row in rows if row["variant"] == "best")
    assert f"{best['kl_weights']:.4f} ± {best['kl_weights_se']:.4f}" in printed

    assert ablate.main(arguments(folder, tmp_path, "--variants", "best", "--dtype", "bfloat16")) == 2
    assert "best-0 was made with another dtype" in capsys.readouterr().err


def test_a_seed_is_another_checkpoint(folder: Path, tmp_path: Path) -> None:
    assert ablate.main(arguments(folder, tmp_path, "--variants", "rtn", "--seeds", "3,4")) == 0
    seeds = [json.loads((tmp_path / f"rtn-{s}" / "wkvquant.json").read_text())["settings"]["seed"] for s in (3, 4)]
    assert seeds == [3, 4]


def test_one_that_fails_does_not_stop_the_others(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def refuse(settings: Any, *args: Any) -> dict[str, Any]:
        if settings.recipe.name == "static":
            raise ConfigError("no such luck")
        return pipeline.quantize(settings, *args)

    monkeypatch.setattr(ablate, "quantize", refuse)
    assert ablate.main(arguments(folder, tmp_path, "--variants", "static,rtn")) == 1
    assert "no such luck" in capsys.readouterr().out
    assert (tmp_path / "rtn-0" / "wkvquant.json").is_file()


def test_an_interrupted_one_goes_on(folder: Path, tmp_path: Path, monkeypatch) -> None:
    command = arguments(folder, tmp_path, "--variants", "rtn")
    made = []

    def until(last: int) -> Any:
        def quantize_block(plan: Any, layer: int, hidden: Any) -> Any:
            if layer > last:
                raise KeyboardInterrupt
            made.append(layer)
            return blocks.quantize_block(plan, layer, hidden)

        return quantize_block

    monkeypatch.setattr(pipeline, "quantize_block", until(0))
    with pytest.raises(KeyboardInterrupt):
        ablate.main(command)
    monkeypatch.setattr(pipeline, "quantize_block", until(2))
    assert ablate.main(command) == 0
    assert made == [0, 1, 2]


def test_unknown_variants_are_refused(folder: Path, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        ablate.main(arguments(folder, tmp_path, "--variants", "best_no_such_part"))
    assert "'best_no_such_part' is not one of rtn, static, best, paper" in capsys.readouterr().err
