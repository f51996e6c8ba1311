"""benchmarks/outliers.py: rows are what each part of the cache does to one layer, and looking changes nothing."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import outliers
import pytest
import torch
from models import save_text, tiny_model

from vllm_wkvquant import cli, reference
from vllm_wkvquant.checkpoint import Checkpoint
from vllm_wkvquant.evaluate import SimulatedCache, last_hidden, load_quantized, read_windows

WINDOW, WINDOWS, LAYERS = 48, 3, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose keys have a bias, and its checkpoint."""
    path = tmp_path_factory.mktemp("outliers")
    model = tiny_model(path / "model", "qwen2", num_layers=LAYERS, key_bias=20.0)
    text = save_text(path / "text.txt")
    options = ["--calib-text", str(text), "--recipe", "rtn", "--samples", "8", "--seq-len", str(WINDOW)]
    assert cli.main(["quantize", str(model), str(path / "ckpt"), *options]) == 0
    return path


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[dict[str, Any]]:
    command = [folder / "ckpt", "--text", folder / "text.txt", "--window", WINDOW, "--windows", WINDOWS]
    assert outliers.main([str(x) for x in [*command, "--json", folder / "out.jsonl"]]) == 0
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def test_each_part_helps_keys_with_a_bias(rows: list[dict[str, Any]]) -> None:
    assert [row["layer"] for row in rows] == [*range(LAYERS)]
    for row in rows:
        errors = [row["key_error"][stage] for stage in outliers.KEY_STAGES]
        assert errors[1] < errors[0] / 10  # it is the shift that a bias needs
        assert errors[-1] < errors[0] / 10
        assert 2 < row["key_peak"]["and rotated"] < 3  # of normal numbers
        assert max(row["channels"]["before"]) > 15 > 10 > max(row["channels"]["after"])
        assert 0 < row["value_error"]["shifted"] < 0.1


def test_a_row_is_of_its_layers_own_keys_and_values(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Computed again, one token at a time, from what the layers are given in a plain run."""
    ckpt = Checkpoint(folder / "ckpt")
    windows = read_windows(folder / "ckpt", folder / "text.txt", WINDOW, WINDOWS)
    seen: list[tuple[torch.Tensor, ...]] = []

    class Capture(SimulatedCache):
        def attention(self, module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(tuple(x[0].transpose(0, 1) for x in (query, key, value)))
            return super().attention(module, query, key, value, *args, **kwargs)

    model = load_quantized(ckpt, Capture(), torch.float32, "cpu")
    hidden = [last_hidden(model, w) for w in windows]
    layer = 1
    params = ckpt.kv_params(layer)
    without = replace(params, k_smooth=torch.ones_like(params.k_smooth), key_hadamard=False)
    errors = {"shifted": [], "and rotated": []}
    for q, k, v in seen[layer::LAYERS]:
        group, scale = q.shape[1] // k.shape[1], q.shape[2] ** -0.5
        for stage, of_stage in (("shifted", without), ("and rotated", params)):
            past, _ = reference.fake_quantize(k, v, torch.arange(WINDOW), of_stage)
            for i in range(WINDOW):
                outputs = []
                for keys in (k, torch.cat([past[:i], k[i:]])):
                    scores = torch.einsum("hd,thd->ht", q[i], keys[: i + 1].repeat_interleave(group, 1)) * scale
                    outputs.append(
                        torch.einsum("ht,thd->hd", scores.softmax(-1), v[: i + 1].repeat_interleave(group, 1))
                    )
                exact, output = outputs
                errors[stage].append(((output - exact).square().sum() / exact.square().sum()).item())
    for stage, of_tokens in errors.items():
        assert rows[layer]["key_error"][stage] == pytest.approx(sum(of_tokens) / len(of_tokens), rel=0.01), stage

    layers = [outliers.Layer(ckpt.kv_params(i)) for i in range(LAYERS)]
    spied = load_quantized(ckpt, outliers.Spy(layers, 1 / WINDOWS), torch.float32, "cpu")
    torch.testing.assert_close(last_hidden(spied, windows[0]), hidden[0], rtol=1e-4, atol=1e-4)


def test_bad_input_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = str(folder / "text.txt")
    assert outliers.main([str(folder / "model"), "--text", text]) == 2
    assert "is not a wkvquant checkpoint" in capsys.readouterr().err
    assert outliers.main([str(folder / "ckpt"), "--text", text, "--window", "100000"]) == 2
    assert "--window 100000 is outside" in capsys.readouterr().err


def test_rows_are_drawn(folder: Path, rows: list[dict[str, Any]]) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    import plots

    figure = plots.draw_outliers(rows)
    lines = [len(axis.lines) for axis in figure.axes]
    assert lines == [4, 2, 4, 2]
