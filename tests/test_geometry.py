"""geometry.py: what it says of a config.json is what transformers makes of it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import in_subprocess
from models import CONFIGS, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from vllm_wkvquant.config import ConfigError
from vllm_wkvquant.geometry import ATTENTION, BIAS_KEYS, MLP, QKV, Geometry, check_biases, check_served, kind_of

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


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


def vllm_models(paths: list[Path]) -> Iterator[torch.nn.Module | None]:
    """vLLM's models of these config.json without weights; None where it refuses one."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.network_utils import get_open_port

    for number, path in enumerate(paths):
        config = EngineArgs(str(path), skip_tokenizer_init=True, dtype="float16").create_engine_config()
        with set_current_vllm_config(config):
            if number == 0:
                init_distributed_environment(1, 0, f"tcp://127.0.0.1:{get_open_port()}", 0, "gloo")
                ensure_model_parallel_initialized(1, 1)
            try:
                with torch.device("meta"):
                    model = initialize_model(config)
            except (AssertionError, ValueError):
                model = None
        yield model


def vllm_biases(paths: list[Path]) -> list[set[str]]:
    """Linear layers that have a bias in vLLM's models of these config.json."""
    fused = {"qkv_proj": QKV, "o_proj": ("o_proj",), "gate_up_proj": MLP[:2], "down_proj": MLP[2:]}
    out = []
    for model in vllm_models(paths):
        assert model
        names = [name.split(".") for name, _ in model.named_parameters()]
        out.append({layer for *_, linear, kind in names if kind == "bias" for layer in fused[linear]})
    return out


def test_biases_as_vllm(tmp_path: Path) -> None:
    """A model is refused where vLLM gives a bias to other layers than transformers, and where it does not it is not."""
    settings = [{}, *({key: True} for key in BIAS_KEYS), {"attention_bias": True, "qkv_bias": False}]
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2}
    configs, paths, stored = [], [], []
    for family, kind in CONFIGS.items():
        for number, changes in enumerate(settings):
            path = tmp_path / f"{family}-{number}"
            kind(**sizes, num_hidden_layers=1, vocab_size=256, **changes).save_pretrained(path)
            configs.append(json.loads((path / "config.json").read_text()) | {"architectures": [ARCHITECTURES[family]]})
            (path / "config.json").write_text(json.dumps(configs[-1]))
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
            names = [name.split(".") for name, _ in model.named_parameters()]
            stored.append({linear for *_, linear, part in names if part == "bias"})
            paths.append(path)
    refused = 0
    for config, ours, served in zip(configs, stored, in_subprocess(vllm_biases, paths), strict=True):
        assert {name for name, has in kind_of(config).of_vllm(config).items() if has} == served
        if ours == served:
            check_biases(config)
            continue
        refused += 1
        with pytest.raises(ConfigError, match=", ".join(n for n in (*ATTENTION, *MLP) if n in ours ^ served)):
            check_biases(config)
    assert refused == 10  # of 3 settings with Llama, 5 with Mistral, 2 with Qwen3


def vllm_windows(paths: list[Path]) -> list[list[int | None] | None]:
    """Sliding windows of the layers of vLLM's models of these config.json; None where it refuses one."""
    from vllm.model_executor.layers.attention import Attention

    out: list[list[int | None] | None] = []
    for model in vllm_models(paths):
        layers = [layer for layer in model.modules() if isinstance(layer, Attention)] if model else None
        out.append([layer.sliding_window for layer in layers] if layers else None)
    return out


def transformers_windows(path: Path) -> list[int | None]:
    """Those of transformers' layers: a Llama has none, a Mistral one in all, whatever layer_types says."""
    config = AutoConfig.from_pretrained(path)
    if config.model_type == "llama":
        return [None] * 2
    slides = ["sliding_attention"] * 2 if config.model_type == "mistral" else config.layer_types
    return [config.sliding_window if kind == "sliding_attention" else None for kind in slides]


def test_served_as_vllm(tmp_path: Path) -> None:
    """What is taken vLLM serves, with the windows that transformers gives."""
    sliding, full = ["sliding_attention"] * 2, ["full_attention"] * 2
    window, slides = {"sliding_window": 32}, {"use_sliding_window": True, "sliding_window": 32}
    settings: list[dict[str, Any]] = [{}, {"hidden_act": "gelu"}, window, {**window, "use_sliding_window": False}]
    settings += [{**slides, "layer_types": types} for types in (sliding, full, [*full[:1], *sliding[:1]])]
    of_qwen = [{**slides, "max_window_layers": n} for n in (0, 1, 2)]
    of_qwen += [{"max_window_layers": 1}, {**slides, "max_window_layers": 1, "sliding_window": None}]
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2}
    configs, paths = [], []
    for family, kind in CONFIGS.items():
        for number, changes in enumerate([*settings, *(of_qwen if family.startswith("qwen") else [])]):
            path = tmp_path / f"{family}-{number}"
            kind(**sizes, num_hidden_layers=2, vocab_size=256, sliding_window=None).save_pretrained(path)
            config = json.loads((path / "config.json").read_text()) | {"architectures": [ARCHITECTURES[family]]}
            config.pop("layer_types", None)
            configs.append(config | changes)
            (path / "config.json").write_text(json.dumps(configs[-1]))
            paths.append(path)
    taken = dict.fromkeys(CONFIGS, 0)
    for config, path, served in zip(configs, paths, in_subprocess(vllm_windows, paths), strict=True):
        try:
            check_served(config)
        except ConfigError:
            continue
        assert served == transformers_windows(path), (path.name, config)
        taken[config["model_type"]] += 1
    assert taken == {"llama": 1, "mistral": 4, "qwen2": 7, "qwen3": 7}
