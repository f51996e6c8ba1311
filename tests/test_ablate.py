"""Checkpoints of changed recipes: each change does what its name says, and runs can be cut off and repeated."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ablate
import pytest
import torch
from models import save_text, tiny_model

from vllm_wkvquant.checkpoint import Checkpoint
from vllm_wkvquant.config import ConfigError, KVCacheConfig
from vllm_wkvquant.quantize import blocks, estimate, pipeline
from vllm_wkvquant.quantize.recipes import RTN, Recipe
from vllm_wkvquant.reference import KVParams, key_shift_at


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ablate")
    tiny_model(path / "model", "qwen2", num_layers=3, key_bias=8.0)
    save_text(path / "calib.txt", seed=1)
    return path


def as_of_many(recipe: Recipe) -> Recipe:
    """Which few windows change nothing of, in fewer epochs."""
    learning, tuning = recipe.learning, recipe.tuning
    return dataclasses.replace(
        recipe,
        learning=learning and dataclasses.replace(learning, few=0, epochs=max(1, learning.epochs // 10)),
        tuning=tuning and dataclasses.replace(tuning, few=0, epochs=max(1, tuning.epochs // 3)),
    )


@pytest.fixture(scope="module", autouse=True)
def variants() -> Iterator[None]:
    """Without what recipes do where windows are few, as they are here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablate, "VARIANTS", {name: as_of_many(v) for name, v in ablate.VARIANTS.items()})
        yield


def arguments(folder: Path, out: Path, *more: Any) -> list[str]:
    common = [folder / "model", out, "--calib-text", folder / "calib.txt", "--samples", 4, "--seq-len", 32]
    return [str(x) for x in [*common, *more]]


def fields(recipe: Any) -> dict[str, Any]:
    flat = {f"recipe.{k}": v for k, v in vars(recipe).items() if k not in ("name", "learning")}
    return flat | {f"learning.{k}": v for k, v in vars(recipe.learning).items()} if recipe.learning else flat


def read(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / ablate.ROWS).read_text().splitlines()]


def test_a_variant_changes_what_it_names() -> None:
    """One field of its recipe, or those that are one part; none is its recipe, and no two are the same."""
    several = {"one_smoothing": 2, "no_smoothing": 2, "learned_cache": 4}
    several |= {"searched_clip": 2, "clipping_alone": 2, "no_folding": 2, "80_epochs": 2}
    seen = []
    for name, variant in ablate.VARIANTS.items():
        assert variant.name == name
        base = ablate.VARIANTS[name.split("_")[0]]
        changed = {k for k, v in fields(variant).items() if fields(base)[k] != v}
        part = name.partition("_")[2]
        count = several.get(part, 1) if part else 0
        count = {"paper_no_clipping": 2, "best_no_smoothing": 3}.get(name, count)
        assert len(changed) == count, name
        assert fields(variant) not in seen
        seen.append(fields(variant))


# those of untuned change what those of best do
MADE = [name for name in ablate.VARIANTS if not name.startswith("untuned_") or name == "untuned_no_folding"]


@pytest.fixture(scope="module")
def made(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all of MADE have been made."""
    out = tmp_path_factory.mktemp("made")
    assert ablate.main(arguments(folder, out, "--variants", ",".join(MADE))) == 0
    return out


def test_every_variant_makes_a_checkpoint(made: Path) -> None:
    """Recorded under its own name, with other tensors than its recipe: all parts of the cache alone leave the codes."""
    rows = read(made)
    assert [row["variant"] for row in rows] == MADE
    assert all(row["kl_cache"] > 0 and row["seconds"] > 0 for row in rows)
    assert all((row["kl_weights"] is None) == (ablate.VARIANTS[row["variant"]].learning is None) for row in rows)
    of_cache = {"one_smoothing", "no_smoothing", "static_shift", "no_key_shift", "no_first_shift", "no_key_hadamard"}
    of_cache |= {part for part in ablate.BEST_VARIANTS if "tuning" in part}  # in so few steps no code moves
    of_cache |= {"all_shift_pairs", "slow_shift_pairs"}
    same = {"all_shift_pairs", "tuning_no_codes", "tuning_2_sigmas"}  # may be what is needed; no code moves

    def tensors(name: str) -> dict[str, torch.Tensor]:
        ckpt = Checkpoint(made / f"{name}-0")
        return ckpt.tensors.get([n for n in ckpt.tensors.headers() if ".layers." in n])

    def report_of(name: str) -> dict[str, Any]:
        return json.loads((made / f"{name}-0" / "wkvquant.json").read_text())

    for name in MADE:
        variant = ablate.VARIANTS[name]
        base, _, part = name.partition("_")
        report = report_of(name)
        assert report["recipe"] == ablate.as_written(dataclasses.asdict(variant))
        assert report["recipe"]["name"] == name
        mine, other = tensors(name), tensors(base)
        assert mine.keys() == other.keys()
        differing = {n.rpartition(".")[2] for n in mine if not torch.equal(mine[n], other[n])}
        if "tuning" in part:  # of which the same may be kept, what was before it or after the first step
            assert report["tuning"]["epochs"] != report_of(base)["tuning"]["epochs"] or part in same, name
        else:
            assert bool(differing) == bool(part) or part in same, name
        assert ("weight_packed" in differing) == bool(part and part not in of_cache), name


@pytest.mark.parametrize("base", ["rtn", "best"])
def test_a_cache_lacks_the_part_that_it_is_named_after(made: Path, base: str) -> None:
    def parameters(part: str) -> tuple[KVCacheConfig, KVParams]:
        ckpt = Checkpoint(made / f"{base}{part}-0")
        return ckpt.kv, ckpt.kv_params(1)

    whole, params = parameters("")
    assert (whole.key_shift, whole.key_hadamard, whole.value_hadamard) == ("rotating", True, True)
    assert (params.k_smooth != 1).any()
    assert not torch.equal(params.k_first, params.k_shift)

    for part, channels in (("_slow_shift_pairs", 40), ("_all_shift_pairs", 64)):  # at this base 20 pairs are slow
        assert (parameters(part)[1].k_shift != 0).any(0).sum() == channels
    assert (parameters("_no_smoothing")[1].k_smooth == 1).all()
    static, with_static = parameters("_static_shift")
    assert static == dataclasses.replace(whole, key_shift="static")
    assert (with_static.k_shift - params.k_shift).abs().max() > 0.1  # the mean of keys that have been turned
    none, without = parameters("_no_key_shift")
    assert none == dataclasses.replace(whole, key_shift="none")
    assert (without.k_shift == 0).all()
    assert parameters("_no_key_hadamard")[0] == dataclasses.replace(whole, key_hadamard=False)
    assert parameters("_no_value_hadamard")[0] == dataclasses.replace(whole, value_hadamard=False)
    at_first = parameters("_no_first_shift")[1]
    torch.testing.assert_close(
        at_first.k_first, key_shift_at(torch.zeros(1, dtype=torch.long), params_after(at_first))[0]
    )
    torch.testing.assert_close(at_first.v_first, at_first.v_shift)
    ranges = [
        json.loads((made / f"{base}{part}-0" / "wkvquant.json").read_text())["layers"][1]["v_smooth"]
        for part in ("", "_no_balance")
    ]
    assert ranges[0][0] < 0.9 < 1.1 < ranges[0][1]
    assert ranges[1] == [1, 1]


def params_after(params: KVParams) -> KVParams:
    """With position 0 shifted as any other."""
    return dataclasses.replace(params, k_first=None, v_first=None)


def test_what_is_there_is_shown_and_not_made_again(folder: Path, made: Path, tmp_path: Path, capsys) -> None:
    for name in ("best-0", "best_mse-0"):
        shutil.copytree(made / name, tmp_path / name)
    shutil.copy(made / ablate.ROWS, tmp_path)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    command = arguments(folder, tmp_path, "--variants", "best,best_mse")
    capsys.readouterr()
    assert ablate.main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == files
    printed = capsys.readouterr().out
    assert f"--checkpoint best-0={tmp_path}/best-0 --checkpoint best_mse-0=" in printed
    best = next(row for row in read(made) if row["variant"] == "best")
    kl = f"{best['kl_weights']:.4f} ± {best['kl_weights_se']:.4f}"
    assert cells(printed)["best"][2:4] == [f"{best['seconds']:.0f}", kl]

    # the row may be lost, or be that of another checkpoint that was there before: what the report says is shown
    (tmp_path / ablate.ROWS).write_text(json.dumps(best | {"kl_cache": 9.0, "seconds": 123456}) + "\n")
    assert ablate.main(command) == 0
    printed = capsys.readouterr().out
    assert cells(printed)["best"][2:4] == ["", kl]
    assert "123456" not in printed


def cells(printed: str) -> dict[str, list[str]]:
    """The table's rows by their first cell."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    return {line[0]: line for line in lines}


def test_other_settings_than_those_of_a_checkpoint_are_refused(
    folder: Path, made: Path, tmp_path: Path, capsys
) -> None:
    """By name, and before anything is made."""
    shutil.copytree(made / "best-0", tmp_path / "best-0")
    assert ablate.main(arguments(folder, tmp_path, "--variants", "rtn,best", "--dtype", "bfloat16")) == 2
    assert "best-0 was made with another dtype" in capsys.readouterr().err
    assert not (tmp_path / "rtn-0").exists()
    shutil.copytree(made / "best-0", tmp_path / "best_mse-0")
    assert ablate.main(arguments(folder, tmp_path, "--variants", "best_mse")) == 2
    assert "best_mse-0 was made with another recipe" in capsys.readouterr().err


def test_what_was_made_of_few_windows_is_known_again(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(ablate.VARIANTS, "untuned", ablate.UNTUNED)
    command = arguments(folder, tmp_path, "--variants", "untuned")
    assert ablate.main(command) == 0
    made = json.loads((tmp_path / "untuned-0" / "wkvquant.json").read_text())["recipe"]["learning"]
    assert (made["batch"], made["epochs"]) == (1, 10)
    assert ablate.main(command) == 0
    assert len(read(tmp_path)) == 1


def test_windows_of_the_models_own_text(folder: Path, tmp_path: Path, capsys) -> None:
    """Beside those of the text; what was made without them is not taken for it."""
    own = tmp_path / "own.txt"
    own.write_text((folder / "calib.txt").read_text()[::-1])
    plain = arguments(folder, tmp_path / "out", "--variants", "rtn")
    mixed = [*plain, "--own-text", str(own), "--own-samples", "4"]
    for _ in range(2):
        assert ablate.main(mixed) == 0
    (row,) = read(tmp_path / "out")
    assert (row["settings"]["samples"], row["settings"]["own_samples"]) == (8, 4)
    assert ablate.main(plain) == 2
    assert "made with another samples" in capsys.readouterr().err
    assert ablate.main(mixed[:-2]) == 2
    assert "belong together" in capsys.readouterr().err


def test_a_seed_is_another_checkpoint(folder: Path, tmp_path: Path) -> None:
    assert ablate.main(arguments(folder, tmp_path, "--variants", "rtn", "--seeds", "3,4")) == 0
    seeds = [json.loads((tmp_path / f"rtn-{s}" / "wkvquant.json").read_text())["settings"]["seed"] for s in (3, 4)]
    assert seeds == [3, 4]


def test_one_that_fails_does_not_stop_the_others(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    errors = {"static": ConfigError("no such luck"), "best": torch.OutOfMemoryError("too large")}

    def refuse(settings: Any, *args: Any) -> dict[str, Any]:
        if error := errors.get(settings.recipe.name):
            raise error
        return pipeline.quantize(settings, *args)

    monkeypatch.setattr(ablate, "quantize", refuse)
    assert ablate.main(arguments(folder, tmp_path, "--variants", "static,best,rtn")) == 1
    printed = capsys.readouterr()
    assert cells(printed.out)["static"][-1] == "no such luck"
    assert cells(printed.out)["best"][-1] == "OutOfMemoryError: too large"
    assert printed.err.endswith("error: 2 of 3 failed: static-0, best-0\n")
    assert [row["variant"] for row in read(tmp_path)] == ["rtn"]
    assert "--checkpoint rtn-0=" in printed.out
    assert "--checkpoint static-0=" not in printed.out


def test_one_that_lacks_memory_for_a_part_fails(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """It would be another variant under its name."""
    monkeypatch.setattr(estimate, "tuning_bytes", lambda plan: 10**15 if plan.recipe.tuning else 0)
    assert ablate.main(arguments(folder, tmp_path, "--variants", "best")) == 1
    assert cells(capsys.readouterr().out)["best"][-1].startswith("tuning all blocks together does not fit in memory")
    assert not (tmp_path / "best-0").exists()
    monkeypatch.undo()
    assert ablate.main(arguments(folder, tmp_path, "--variants", "best")) == 0


def test_an_interrupted_one_goes_on(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    command = arguments(folder, tmp_path, "--variants", "rtn")
    made = []

    def until(last: int) -> Any:
        def quantize_block(plan: Any, layer: int, *state: Any) -> Any:
            if layer > last:
                raise KeyboardInterrupt
            made.append(layer)
            return blocks.quantize_block(plan, layer, *state)

        return quantize_block

    monkeypatch.setattr(pipeline, "quantize_block", until(0))
    with pytest.raises(KeyboardInterrupt):
        ablate.main(command)
    monkeypatch.setattr(pipeline, "quantize_block", until(2))
    with monkeypatch.context() as patch:
        patch.setitem(ablate.VARIANTS, "rtn", dataclasses.replace(RTN, value_balance=0.0))
        assert ablate.main(command) == 1
    assert "begun with other settings (recipe.value_balance): " in capsys.readouterr().err
    block = tmp_path / "rtn-0.wkvquant-partial" / "block-00000.json"
    report = json.loads(block.read_text())
    block.write_text(json.dumps(report | {"seconds": {"load": 1000.0}}))
    assert ablate.main(command) == 0
    assert made == [0, 1, 2]
    assert 1000 < read(tmp_path)[0]["seconds"] < 1100  # with those of the block that was done before


def test_unknown_variants_are_refused(folder: Path, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        ablate.main(arguments(folder, tmp_path, "--variants", "best_no_such_part"))
    assert "'best_no_such_part' is not one of rtn, static, best, untuned, paper" in capsys.readouterr().err
