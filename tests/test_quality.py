"""benchmarks/quality.py: what it measures on a tiny model, that it goes on where it stopped, and what it refuses."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import quality
import torch
from models import save_text, tiny_model
from safetensors.torch import load_file, save_file

from vllm_wkvquant import cli, evaluate

WINDOW, WINDOWS = 65, 3
ROWS = ["FP16", "W4", "kv4", "kv3", "kv2", "kv4_no_past_only", "kv4_no_hadamard", "kv4_no_smoothing", "kv4_no_shift"]
ROWS += ["kv4_slow_shift", "kv4_static_shift", "kv4_no_first", "fp8", "int4_per_token_head", "turboquant_4bit_nc"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a key bias, its checkpoint and a text."""
    path = tmp_path_factory.mktemp("quality")
    tiny_model(path / "model", "qwen2", key_bias=8.0)
    save_text(path / "text.txt", tokens=400)
    command = ["quantize", path / "model", path / "ckpt", "--calib-text", save_text(path / "calib.txt", seed=1)]
    command += ["--samples", 4, "--seq-len", 64, "--recipe", "rtn"]
    assert cli.main([str(x) for x in command]) == 0
    return path


def arguments(folder: Path, out: Path, *more: Any) -> list[str]:
    common = [folder / "model", "--checkpoint", f"own={folder / 'ckpt'}", "--text", f"letters={folder / 'text.txt'}"]
    return [str(x) for x in [*common, "--window", WINDOW, "--windows", WINDOWS, "--json", out, *more]]


def read(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.fixture(scope="module")
def rows(folder: Path) -> dict[str, dict[str, Any]]:
    assert quality.main(arguments(folder, folder / "all.jsonl")) == 0
    return {row["row"]: row for row in read(folder / "all.jsonl")}


def test_every_row_is_there_once(folder: Path, rows: dict[str, dict[str, Any]]) -> None:
    assert [row["row"] for row in read(folder / "all.jsonl")] == ROWS
    assert {row["tokens"] for row in rows.values()} == {WINDOWS * (WINDOW - 1)}
    assert {row["checkpoint"] for name, row in rows.items() if name != "FP16"} == {"own"}


def test_numbers_are_those_of_wkvquant_eval(folder: Path, rows: dict[str, dict[str, Any]]) -> None:
    """FP16, W4 and kv4, which `wkvquant eval` has too."""
    expected = evaluate.evaluate(folder / "ckpt", folder / "model", folder / "text.txt", WINDOW, WINDOWS)
    for name, row in (("fp16", "FP16"), ("w4", "W4"), ("w4kv4", "kv4")):
        assert rows[row]["ppl"] == pytest.approx(expected[f"{name}_ppl"], rel=1e-5)
    kv4 = rows["kv4"]
    for against in ("w4", "fp16"):
        measured, known = kv4[f"against_{against}"], expected["difference"][f"w4kv4_vs_{against}"]
        assert measured == pytest.approx(known, rel=1e-3, abs=1e-4)
    assert kv4["kl_w4"]["mean"] == pytest.approx(expected["kl_w4"], rel=1e-3)
    assert max(kv4["kl_w4"]["se"], kv4["kl_w4"]["se_window"]) == pytest.approx(expected["kl_w4_se"], rel=1e-3)
    assert kv4["top1_w4"] == pytest.approx(expected["top1_agreement"])


def test_rows_order_as_they_must(rows: dict[str, dict[str, Any]]) -> None:
    """Fewer bits lose more, and without a shift the bias of the keys takes the range."""
    kl = {name: row["kl_w4"]["mean"] for name, row in rows.items() if "kl_w4" in row}
    assert 0 < kl["kv4"] < kl["kv3"] < kl["kv2"]
    assert kl["kv4"] < kl["kv4_no_shift"]
    assert kl["kv4"] < kl["int4_per_token_head"]
    assert "kl_w4" not in rows["W4"]
    assert "kl_fp16" not in rows["FP16"]
    assert rows["W4"]["kl_fp16"]["mean"] > 0


def test_quarters_make_up_the_window(rows: dict[str, dict[str, Any]]) -> None:
    for row in rows.values():
        quarters = torch.tensor(row["ppl_by_quarter"], dtype=torch.float64)
        assert quarters.log().mean().exp().item() == pytest.approx(row["ppl"])
    nll = torch.tensor([1.0, 1, 2, 2, 3, 3, 4, 4, 1, 1, 2], dtype=torch.float64)
    full, part = [0] * 9, [0] * 4
    expected = torch.tensor([1.0, 2, 3, 4]).exp().tolist()
    assert quality.by_quarter(nll, [full, part], 9) == pytest.approx(expected)
    assert quality.by_quarter(nll[:3], [part], 9)[2:] == [None, None]


def test_rows_of_the_file_are_not_computed_again(
    folder: Path, rows: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch, capsys
) -> None:
    out = tmp_path / "out.jsonl"
    assert quality.main(arguments(folder, out, "--row", "kv4")) == 0
    assert [row["row"] for row in read(out)] == ["FP16", "kv4"]
    begun = out.read_text()
    assert quality.main(arguments(folder, out, "--row", "kv2", "--row", "W4", "--row", "kv4")) == 0
    assert out.read_text().startswith(begun)
    assert [row["row"] for row in read(out)] == ["FP16", "kv4", "W4", "kv2"]
    for row in read(out):
        assert row["ppl"] == pytest.approx(rows[row["row"]]["ppl"])

    def unexpected(*_: Any) -> None:
        raise AssertionError("a model was loaded though nothing was missing")

    monkeypatch.setattr(quality, "load_baseline", unexpected)
    capsys.readouterr()
    assert quality.main(arguments(folder, out, "--row", "kv2")) == 0
    assert len(read(out)) == 4
    printed = capsys.readouterr().out
    assert "| own        | kv2 " in printed
    assert "no_shift" not in printed
    # another window is another row
    with pytest.raises(AssertionError, match="nothing was missing"):
        quality.main(arguments(folder, out, "--row", "kv2", "--window", 33))


def test_rows_are_of_these_weights(folder: Path, tmp_path: Path) -> None:
    """Other weights under the same names are measured again: of the checkpoint its rows, of the model all."""
    for name in ("model", "ckpt"):
        shutil.copytree(folder / name, tmp_path / name)
    shutil.copy(folder / "text.txt", tmp_path / "text.txt")
    out = tmp_path / "out.jsonl"

    def measured(change: str = "") -> list[str]:
        """Rows added once a norm of the model or the checkpoint is doubled."""
        if change:
            file = next((tmp_path / change).glob("*.safetensors"))
            tensors = load_file(file)
            tensors["model.norm.weight"] *= 2
            save_file(tensors, file, metadata={"format": "pt"})
        quality.files_digest.cache_clear()
        before = len(read(out)) if out.is_file() else 0
        assert quality.main(arguments(tmp_path, out, "--row", "W4")) == 0
        return [row["row"] for row in read(out)[before:]]

    assert measured() == ["FP16", "W4"]
    assert measured() == []
    assert measured("ckpt") == ["W4"]
    assert measured("model") == ["FP16", "W4"]


@pytest.fixture(scope="module")
def peers(folder: Path) -> Path:
    """Plain models beside the model: `same`, what `wkvquant eval` takes for FP16, and `near`, whose weights are off."""
    for name, noise in (("same", 0.0), ("near", 0.002)):
        shutil.copytree(folder / "model", folder / name)
        file = folder / name / "model.safetensors"
        tensors = load_file(file)
        g = torch.Generator().manual_seed(0)
        tensors = {n: (t + noise * torch.randn(t.shape, generator=g)).to(t.dtype) for n, t in tensors.items()}
        save_file(tensors, file, metadata={"format": "pt"})
    peer = {"method": "gptq", "bits_per_weight": 4.25, "seconds": 12.4}
    (folder / "near" / "peer.json").write_text(json.dumps(peer))
    return folder


def test_weights_of_others_are_rows(peers: Path, rows: dict[str, dict[str, Any]], tmp_path: Path, capsys) -> None:
    """A plain model is a row W4, and every row of the table is compared with the W4 of least perplexity."""
    out = tmp_path / "out.jsonl"
    more = ["--weights", f"same={peers / 'same'}", "--weights", f"near={peers / 'near'}", "--row", "W4", "--row", "kv2"]
    assert quality.main(arguments(peers, out, *more)) == 0
    measured = {(row["checkpoint"], row["row"]): row for row in read(out)}
    assert list(measured) == [(None, "FP16"), ("own", "W4"), ("own", "kv2"), ("same", "W4"), ("near", "W4")]
    same, near = measured["same", "W4"], measured["near", "W4"]
    assert same["ppl"] == pytest.approx(rows["FP16"]["ppl"])
    assert same["kl_fp16"]["mean"] == pytest.approx(0, abs=1e-9)
    assert 0 < near["kl_fp16"]["mean"] < rows["W4"]["kl_fp16"]["mean"]
    assert (same["weight_bits"], same["seconds"]) == (None, None)
    assert (near["weight_bits"], near["seconds"]) == (4.25, 12.4)
    assert (measured["own", "kv2"]["weight_bits"], measured["own", "kv2"]["seconds"]) == (4 + 20 / 128, None)

    printed = capsys.readouterr().out
    lowest = min((row for row in measured.values() if row["row"] == "W4"), key=lambda row: row["ppl"])
    assert f"lowest W4: {lowest['checkpoint']}\n" in printed
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    column = lines[0].index("% to lowest W4")
    for row, line in zip(measured.values(), lines[2:], strict=True):
        if row is lowest or row["row"] == "FP16":
            assert line[column] == ""
        else:
            percent = 100 * (row["ppl"] / lowest["ppl"] - 1)
            assert line[column].startswith(f"{percent:+.2f} ± ")
            assert float(line[column].partition("(")[2].rstrip(")")) > percent
    assert lines[-1][lines[0].index("seconds")] == "12"


def test_seeds_have_a_mean_and_a_spread(folder: Path, tmp_path: Path, capsys) -> None:
    other = tmp_path / "other"
    command = ["quantize", folder / "model", other, "--calib-text", folder / "calib.txt", "--seed", 1]
    command += ["--samples", 4, "--seq-len", 64, "--recipe", "rtn"]
    assert cli.main([str(x) for x in command]) == 0
    given = [f"rtn-0={folder / 'ckpt'}", f"rtn-1={other}", f"single-0={other}", f"plain={other}"]
    more = [x for name in given for x in ("--checkpoint", name)]
    out = tmp_path / "out.jsonl"
    assert quality.main(arguments(folder, out, *more, "--row", "W4", "--row", "kv2")) == 0
    printed = capsys.readouterr().out
    table = printed[printed.index("| checkpoints") :]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    assert [line[:3] for line in lines[2:]] == [["rtn", "W4", "2"], ["rtn", "kv2", "2"]]
    kl = [r["kl_w4"]["mean"] for r in read(out) if r["row"] == "kv2" and (r["checkpoint"] or "").startswith("rtn-")]
    assert kl[0] != kl[1]
    assert lines[3][-1] == f"{(kl[0] + kl[1]) / 2:.4f} ± {abs(kl[0] - kl[1]) / 2**0.5:.4f}"
    assert lines[2][-1] == ""


def test_differences_by_window_are_those_of_difference() -> None:
    """Mean and the windows' standard error, from sums alone; nothing where windows cannot tell an error."""
    windows = [[0] * 9, [0] * 9, [0] * 4]
    a, b = torch.randn(2, 19, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = [{"nll_by_window": [part.sum().item() for part in x.split([8, 8, 3])]} for x in (a, b)]
    expected, found = evaluate.difference(a, b, windows), quality.by_window(*rows, windows)
    assert found["mean"] == pytest.approx(expected["mean"])
    assert found["se_window"] == pytest.approx(expected["se_window"])
    assert found["se"] <= found["se_window"]
    assert found["percent_upper95"] == pytest.approx(
        100 * (torch.tensor(expected["mean"] + 1.96 * expected["se_window"]).exp().item() - 1), rel=1e-5
    )
    assert quality.by_window(rows[0], {}, windows) is None
    assert quality.by_window({"nll_by_window": [1.0]}, {"nll_by_window": [2.0]}, windows[:1]) is None


def test_python_sources_are_a_text(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    command = [folder / "model", "--python-stdlib", 3000, "--window", 64, "--windows", 2, "--json", out]
    assert quality.main([str(x) for x in command]) == 0
    assert [(row["text"], row["row"], row["windows"]) for row in read(out)] == [("python", "FP16", 2)]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--row", "kv5"], r"--row kv5 is not one of \['W4', 'kv4'"),
        (["--windows", -1], "must not be negative"),
        (["--windows", 100], "fewer than 100 windows of 65"),
        (["--window", 513], r"outside 2 \.\. 512"),
        (["--text", "letters=elsewhere.txt"], "two texts have the same name"),
        (["--text", "python=elsewhere.txt", "--python-stdlib", 9], "two texts have the same name"),
        (["--text", "other=/no/such.txt"], "does not exist"),
        (["--checkpoint", "other=/no/such"], "has no config.json"),
        (["--weights", "other=/no/such"], "has no config.json"),
        (["--weights", "own=elsewhere"], "two checkpoints have the same name"),
        (["--json", "/no/such/out.jsonl"], "is not a directory"),
        (["--python-stdlib", 10**10], "has only"),
    ],
)
def test_bad_arguments_are_refused(folder: Path, tmp_path: Path, capsys, more: list[Any], message: str) -> None:
    assert quality.main(arguments(folder, tmp_path / "out.jsonl", *more)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert re.search(message, error), error


def test_a_checkpoint_of_another_model_is_refused(folder: Path, tmp_path: Path, capsys) -> None:
    other = tiny_model(tmp_path / "other", "qwen2", hidden_size=256)
    command = arguments(folder, tmp_path / "out.jsonl")
    assert quality.main([str(other), *command[1:]]) == 2
    assert "is not a checkpoint of this model: its hidden_size differs" in capsys.readouterr().err


def test_a_checkpoint_is_no_plain_model(folder: Path, tmp_path: Path, capsys) -> None:
    command = arguments(folder, tmp_path / "out.jsonl", "--weights", f"other={folder / 'ckpt'}")
    assert quality.main(command) == 2
    assert "is not a plain model" in capsys.readouterr().err


def test_a_damaged_file_of_results_is_named(folder: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text('{"row": "FP16"}\n{"row": \n')
    assert quality.main(arguments(folder, out)) == 2
    assert f"{out}, line 2: not JSON" in capsys.readouterr().err


def test_names_need_a_path(folder: Path, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        quality.main(arguments(folder, tmp_path / "out.jsonl", "--text", "wiki.txt"))
    assert "'wiki.txt' is not NAME=PATH" in capsys.readouterr().err
