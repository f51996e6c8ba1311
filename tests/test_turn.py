"""benchmarks/turn.py: the turned model computes what the model does, and its weights are on no grid."""

from pathlib import Path
from typing import Any

import pytest
import torch
import turn
from models import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_wkvquant import cli
from vllm_wkvquant.checkpoint import ShardedTensors
from vllm_wkvquant.quantize.weights import round_to_nearest

GRID = 32  # weights of a group that the 4-bit grid of the model below is for


def logits(model: Path) -> torch.Tensor:
    tokens = torch.randint(97, 123, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)(tokens).logits


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        ("llama", {}),
        ("qwen2", {"tie_word_embeddings": True, "key_bias": 8.0}),
        ("qwen3", {}),
    ],
)
def test_the_function_stays(tmp_path: Path, family: str, config: dict[str, Any], capsys) -> None:
    model = tiny_model(tmp_path / "model", family, dtype=torch.float32, **config)
    assert turn.main([str(model), str(tmp_path / "turned")]) == 0
    expected, turned = logits(model), logits(tmp_path / "turned")
    assert expected.std() > 0.5
    torch.testing.assert_close(turned, expected, rtol=0, atol=2e-5)
    untied = "takes 131072 bytes more" in capsys.readouterr().out  # 256 tokens x 128 channels x fp32
    assert untied == config.get("tie_word_embeddings", False)
    tensors = ShardedTensors(tmp_path / "turned")
    norms = tensors.get([n for n in tensors.names() if n.endswith(("layernorm.weight", "model.norm.weight"))])
    assert len(norms) == 7
    assert all((norm == 1).all() for norm in norms.values())
    text = "some text"
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (model, tmp_path / "turned")]
    assert tokenizers[0](text)["input_ids"] == tokenizers[1](text)["input_ids"]


def test_weights_leave_their_grid(tmp_path: Path) -> None:
    """A group of a model that was 4-bit once has at most 16 different weights; turned, hardly two are the same."""
    path = tiny_model(tmp_path / "model", dtype=torch.float16)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for linear in (m for m in model.model.modules() if isinstance(m, torch.nn.Linear)):
        linear.weight.data = round_to_nearest(linear.weight.data, GRID, torch.float16).dequantize()
    model.half().save_pretrained(path)
    assert turn.main([str(path), str(tmp_path / "turned"), "--seed", "3"]) == 0

    def different(model: Path) -> torch.Tensor:
        """Distinct weights of every group of the linear layers of a model."""
        tensors = ShardedTensors(model)
        linears = tensors.get([n for n in tensors.names() if n.endswith("proj.weight")])
        groups = torch.cat([w.reshape(-1, GRID) for w in linears.values()])
        return 1 + (groups.sort().values.diff() > 0).sum(-1)

    assert different(path).max() <= 16
    assert different(tmp_path / "turned").min() > 20


def test_the_seed_and_the_type_are_those_asked_for(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", num_layers=1)
    weights = {}
    for name, more in {"a": [], "b": [], "c": ["--seed", "1"], "d": ["--dtype", "float32"]}.items():
        assert turn.main([str(model), str(tmp_path / name), *more]) == 0
        weights[name] = ShardedTensors(tmp_path / name).get(["model.layers.0.mlp.down_proj.weight"])
    a, b, c, d = (next(iter(w.values())) for w in weights.values())
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert (a.dtype, d.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(a, d.bfloat16())
    q = turn.orthogonal(128, 0)
    torch.testing.assert_close(q @ q.T, torch.eye(128, dtype=torch.float64), rtol=0, atol=1e-13)


def test_a_turned_model_can_be_quantized(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", tie_word_embeddings=True, num_layers=1)
    assert turn.main([str(model), str(tmp_path / "turned")]) == 0
    text = tmp_path / "text.txt"
    text.write_text("letters " * 100)
    command = ["quantize", tmp_path / "turned", tmp_path / "ckpt", "--calib-text", text, "--samples", 4]
    assert cli.main([str(x) for x in [*command, "--seq-len", 32]]) == 0


def test_bad_arguments_are_refused(tmp_path: Path, capsys) -> None:
    model = tiny_model(tmp_path / "model", num_layers=1)
    for arguments, message in (
        ([model, model], "exists; give another directory"),
        ([tmp_path / "none", tmp_path / "out"], "has no config.json"),
    ):
        assert turn.main([str(x) for x in arguments]) == 2
        assert message in capsys.readouterr().err
