"""A small random Llama in the checkpoint format, written without the quantizer, for engine tests."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from vllm_wkvquant import checkpoint
from vllm_wkvquant.config import KVCacheConfig, RopeConfig

GROUP = 32
VOCAB = 512


def quantize_weight(weight: torch.Tensor, group: int = GROUP) -> dict[str, torch.Tensor]:
    """Round-to-nearest asymmetric 4 bits in groups along the input, packed."""
    out, cols = weight.shape
    w = weight.float().view(out, cols // group, group)
    low, high = w.amin(-1).clamp_max(0), w.amax(-1).clamp_min(0)
    scale = ((high - low) / 15).clamp_min(1e-8).to(torch.bfloat16)
    zero = (-low / scale.float()).round().clamp(0, 15)
    codes = (w / scale.float()[..., None] + zero[..., None]).round().clamp(0, 15).view(out, cols)
    return checkpoint.pack_weight(codes.to(torch.uint8), scale, zero.to(torch.uint8))


def write_checkpoint(
    path: Path,
    head_size: int = 64,
    heads: int = 8,
    kv_heads: int = 4,
    layers: int = 3,
    hidden: int = 256,
    key_shift: str = "rotating",
    shift: float = 0.1,
    key_bias: float = 0.0,
    key_gain: float = 2.0,
    value_gain: float = 2.0,
    sliding_window: int | None = None,
    edit: dict[str, torch.Tensor | None] | None = None,
    section: dict[str, Any] | None = None,
    seed: int = 0,
) -> Path:
    """Write the model and return `path`.

    shift: size of the random shifts of keys and values; key_bias: of a random bias on k_proj, which k_shift then
    equals (a model like Qwen2, whose keys no plain 4-bit cache can hold). key_gain, value_gain: sharpen attention,
    which random weights leave uniform. edit: tensors replaced by name, or left out where None. section: keys replaced
    in the KV section of config.json.
    """
    torch.manual_seed(seed)
    options: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_size,
        "vocab_size": VOCAB,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if sliding_window is None:
        config: Any = LlamaConfig(**options, attention_bias=bool(key_bias))
        model: Any = LlamaForCausalLM(config)
    else:
        config = MistralConfig(**options, sliding_window=sliding_window)
        model = MistralForCausalLM(config)
    gains = {"q_proj": key_gain, "k_proj": key_gain, "v_proj": value_gain, "o_proj": value_gain, "lm_head": 20.0}
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, value in model.to(torch.bfloat16).state_dict().items():
        weight = value.clone()
        for part, gain in gains.items():
            if name.endswith(f"{part}.weight"):
                weight *= gain
        if "_proj.bias" in name:
            weight.zero_()
        if name.endswith("_proj.weight"):
            base = name.removesuffix("weight")
            tensors |= {base + suffix: t for suffix, t in quantize_weight(weight).items()}
        else:
            tensors[name] = weight
    shape = (kv_heads, head_size)
    for layer in range(layers):
        k_shift = shift * torch.randn(shape, generator=generator)
        if key_bias:
            k_shift = (key_bias * torch.randn(shape, generator=generator)).to(torch.bfloat16).float()
            tensors[f"model.layers.{layer}.self_attn.k_proj.bias"] = k_shift.flatten().to(torch.bfloat16)
        values = {
            "k_smooth": 0.5 + torch.rand(shape, generator=generator),
            "k_shift": torch.zeros(shape) if key_shift == "none" else k_shift,
            "v_shift": shift * torch.randn(shape, generator=generator),
        }
        values["k_first"] = k_shift + shift * torch.randn(shape, generator=generator)
        values["v_first"] = shift * torch.randn(shape, generator=generator)
        tensors |= {checkpoint.kv_tensor_name(layer, param): values[param] for param in checkpoint.KV_PARAMS}
    for name, tensor in (edit or {}).items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    kv = KVCacheConfig(
        head_size=head_size,
        num_kv_heads=kv_heads,
        num_hidden_layers=layers,
        key_shift=key_shift,
        key_hadamard=True,
        value_hadamard=False,
        rope=RopeConfig(tuple(1e4 ** (-2 * i / head_size) for i in range(head_size // 2)), head_size),
    )
    linears = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    quantization = checkpoint.quantization_config(kv, dict.fromkeys(linears, GROUP))
    quantization[checkpoint.QUANT_METHOD] |= section or {}
    data = config.to_dict() | {
        "architectures": [type(model).__name__],
        "dtype": "bfloat16",
        "quantization_config": quantization,
    }
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(data))
    save_file({k: v.contiguous() for k, v in tensors.items()}, path / "model.safetensors", metadata={"format": "pt"})
    return path
