"""geometry.py: what it says of a config.json is what transformers makes of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from vllm_wkvquant.geometry import Geometry


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of all weights before they are quantized."""
    geometry = Geometry.of(config)
    linears = {f"{name}.weight": shape for name, shape in geometry.linears().items()}
    of_block = {**linears, **geometry.others(config)}
    blocks = {f"model.layers.{i}.{name}": shape for i in range(geometry.layers) for name, shape in of_block.items()}
    return {**geometry.outer(config), **blocks}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("llama", {"num_key_value_heads": None, "head_dim": None}),
        ("mistral", {"num_heads": 16, "hidden_size": 64}),
        ("qwen2", {"num_heads": 64, "hidden_size": 64}),
        ("qwen3", {"tie_word_embeddings": True}),
        ("qwen3", {"attention_bias": True}),
    ],
)
@pytest.mark.parametrize("gone", [(), ("num_key_value_heads",), ("head_dim",)])
def test_as_transformers(family: str, options: dict[str, Any], gone: tuple[str, ...], tmp_path: Path) -> None:
    """Without keys that have a default, too, and under null, which is another."""
    nulls = {name: options[name] for name in options if options[name] is None}
    model = tiny_model(tmp_path / "model", family, num_layers=2, **{n: v for n, v in options.items() if n not in nulls})
    config = json.loads((model / "config.json").read_text()) | nulls
    for name in gone:
        config.pop(name, None)
    (model / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    expected = {name: tuple(p.shape) for name, p in made.named_parameters()}  # a tied head is named once
    assert shapes(config) == expected
    for architectures in ([], None):  # by the model type
        assert shapes(config | {"architectures": architectures}) == expected
