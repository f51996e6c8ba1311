"""benchmarks/weight_peers.py: what a method is given and what becomes of its result. The libraries are not run here."""

import json
from pathlib import Path

import pytest
import torch
import weight_peers
from models import save_text, tiny_model

from vllm_wkvquant.checkpoint import ShardedTensors
from vllm_wkvquant.quantize.calibration import read_windows
from vllm_wkvquant.quantize.weights import QuantizedWeight, round_to_nearest

SAMPLES, SEQ_LEN, SEED = 4, 32, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers have groups of 64 and of 128, and a text."""
    path = tmp_path_factory.mktemp("peers")
    tiny_model(path / "model", hidden_size=192, num_layers=1, dtype=torch.float16, tie_word_embeddings=True)
    save_text(path / "calib.txt")
    return path


def command(folder: Path, out: Path, *more: str) -> list[str]:
    common = [folder / "model", out, "--method", "gptq", "--calib-text", folder / "calib.txt"]
    return [str(x) for x in [*common, "--samples", SAMPLES, "--seq-len", SEQ_LEN, "--seed", SEED, *more]]


def nearest(weight: torch.Tensor, group_size: int) -> QuantizedWeight:
    return round_to_nearest(weight, group_size, torch.float16)


def replace(monkeypatch: pytest.MonkeyPatch, broken: bool = False) -> list[weight_peers.Task]:
    """In place of GPTQ, round to nearest in fp16 and double the norms. Returns the tasks that it was given."""
    tasks = []

    def method(task: weight_peers.Task) -> weight_peers.Result:
        tasks.append(task)
        changed, scales = {"model.norm.weight": 2 * task.model.model.norm.weight.data}, {}
        for name, layer in task.layers().items():
            quantized = nearest(layer.weight.data, task.group_sizes[name.rpartition(".")[2]])
            changed[f"{name}.weight"] = quantized.dequantize().half() * (torch.nan if broken else 1)
            scales[f"{name}.weight"] = quantized.scale
        return changed, scales

    monkeypatch.setitem(weight_peers.METHODS, "gptq", (method, "torch"))
    monkeypatch.setattr(weight_peers, "version", lambda name: f"version of {name}")
    return tasks


def test_a_method_gets_our_windows_and_groups(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = replace(monkeypatch)
    assert weight_peers.main(command(folder, tmp_path / "out")) == 0
    (task,) = tasks
    expected = read_windows(folder / "model", folder / "calib.txt", SAMPLES, SEQ_LEN, SEED).tokens
    assert torch.equal(torch.cat([batch["input_ids"] for batch in task.batches]), expected)
    assert all((batch["attention_mask"] == 1).all() for batch in task.batches)
    groups = {name.rpartition(".")[2]: task.group_sizes[name.rpartition(".")[2]] for name in task.layers()}
    assert groups == dict.fromkeys(groups, 64) | {"o_proj": 128, "down_proj": 128}
    assert len(groups) == 7
    assert task.model.dtype == torch.float16
    assert not task.symmetric


def test_a_method_gets_windows_of_the_models_own_text(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks, own = replace(monkeypatch), tmp_path / "own.txt"
    own.write_text("z" * 4000)
    more = ["--own-text", str(own)]
    assert weight_peers.main([*command(folder, tmp_path / "out"), *more]) == 2
    assert "belong together" in capsys.readouterr().err
    assert weight_peers.main([*command(folder, tmp_path / "out"), *more, "--own-samples", "3"]) == 0
    windows = torch.cat([batch["input_ids"] for batch in tasks[0].batches])
    expected = read_windows(folder / "model", folder / "calib.txt", SAMPLES, SEQ_LEN, SEED, own, 3).tokens
    assert torch.equal(windows, expected)
    assert (windows == ord("z")).all(1).sum() == 3
    assert json.loads((tmp_path / "out" / weight_peers.PEER_FILE).read_text())["calibration"]["own_samples"] == 3


def test_the_result_is_a_plain_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the codes stand for, in fp32 where the method left it in fp16; all else as it was or as it left it."""
    replace(monkeypatch)
    assert weight_peers.main(command(folder, tmp_path / "out")) == 0
    before, after = ShardedTensors(folder / "model"), ShardedTensors(tmp_path / "out")
    assert before.names() == after.names()
    old, new = before.get(before.names()), after.get(after.names())
    for name in old:
        assert new[name].dtype == torch.float32
        if name.endswith("proj.weight"):
            group = 128 if name.endswith(("o_proj.weight", "down_proj.weight")) else 64
            assert torch.equal(new[name], nearest(old[name], group).dequantize())
        else:
            assert torch.equal(new[name], (2 if name == "model.norm.weight" else 1) * old[name].float())
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize(("more", "bits"), [([], 20), (["--symmetric"], 16)])
def test_what_it_took_is_recorded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], bits: int
) -> None:
    replace(monkeypatch)
    assert weight_peers.main(command(folder, tmp_path / "out", *more)) == 0
    peer = json.loads((tmp_path / "out" / weight_peers.PEER_FILE).read_text())
    narrow, wide = 192 * (256 + 2 * 128 + 2 * 256), 256 * 192 + 256 * 192  # weights in groups of 64 and of 128
    expected = 4 + bits * (narrow / 64 + wide / 128) / (narrow + wide)
    assert peer["bits_per_weight"] == pytest.approx(expected)
    assert peer["calibration"] == {"text": "calib.txt", "samples": SAMPLES, "own_samples": 0, "seq_len": SEQ_LEN}
    assert peer["seconds"] > 0
    assert peer["peak_bytes"]["host"] > 0
    assert peer["versions"]["llmcompressor"] == "version of llmcompressor"


def test_codes_survive_a_narrow_type() -> None:
    """Weights that were rounded to bf16 are on their grid again, with the scale in 16 bits."""
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    groups = weight.view(8, 2, 128)
    scale = (groups.amax(-1) - groups.amin(-1)) / 15  # fp32: not yet what a checkpoint holds
    codes = (groups / scale[..., None]).round()
    rounded = (codes * scale[..., None]).flatten(1).bfloat16()
    expected = (codes * scale.half().float()[..., None]).flatten(1)
    assert torch.equal(weight_peers.on_16bit_scale(rounded, scale, torch.float16), expected)


def test_bad_input_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    replace(monkeypatch, broken=True)
    for arguments, message in (
        (command(folder, folder / "model"), "is not empty"),
        (command(folder, tmp_path / "out", "--samples", "10000"), "give a longer text"),
        (command(folder, tmp_path / "out"), "with NaN or infinity; try another --dtype"),
    ):
        assert weight_peers.main(arguments) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setitem(weight_peers.METHODS, "gptq", (weight_peers.gptq, "no_such_library"))
    assert weight_peers.main(command(folder, tmp_path / "out")) == 2
    assert "No module named 'no_such_library'; install benchmarks/peers-requirements.txt" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
