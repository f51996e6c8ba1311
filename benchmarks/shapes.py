"""Model shapes, and the weight and KV cache formats ("variants") that throughput.py and memory.py compare."""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from vllm_wkvquant import checkpoint
from vllm_wkvquant.config import KVCacheConfig, RopeConfig

GROUP_SIZE = 128
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """Architecture of a Llama: what its config.json says."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    rope_theta: float
    max_positions: int

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    @property
    def linear_elements(self) -> int:
        """Weights of all decoder layers that have 4 bits in a W4 model."""
        attention = 2 * (self.heads + self.kv_heads) * self.head_size * self.hidden
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def other_elements(self) -> int:
        """Weights that have 16 bits in every model: embedding, lm_head and norms."""
        return 2 * self.vocab * self.hidden + (2 * self.layers + 1) * self.hidden


SHAPES = {
    "llama-2-7b": Shape(32, 4096, 11008, 32, 32, 32000, 1e4, 4096),
    "llama-2-13b": Shape(40, 5120, 13824, 40, 40, 32000, 1e4, 4096),
    "llama-3-8b": Shape(32, 4096, 14336, 32, 8, 128256, 5e5, 8192),
    "tiny": Shape(2, 256, 512, 4, 2, 512, 1e4, 512),
}


@dataclass(frozen=True)
class Variant:
    """A format of weights and cache. quant_method: of config.json, None for 16 bits; kv_cache_dtype: vLLM's option."""

    quant_method: str | None
    kv_cache_dtype: str


VARIANTS = {
    "bf16": Variant(None, "bfloat16"),
    "w4": Variant("compressed-tensors", "bfloat16"),
    "w4-fp8": Variant("compressed-tensors", "fp8"),
    "w4-int4": Variant("compressed-tensors", "int4_per_token_head"),
    "w4kv4": Variant(checkpoint.QUANT_METHOD, "auto"),
}


def model_config(shape: Shape, variant: Variant, max_model_len: int) -> dict[str, Any]:
    """config.json of a model of this shape and format, for sequences of up to `max_model_len` tokens."""
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size,
        "vocab_size": shape.vocab,
        "max_position_embeddings": max(shape.max_positions, max_model_len),
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "tie_word_embeddings": False,
    }
    if variant.quant_method is None:
        return config
    kv = KVCacheConfig(
        head_size=shape.head_size,
        num_kv_heads=shape.kv_heads,
        num_hidden_layers=shape.layers,
        key_shift="rotating",
        key_hadamard=True,
        value_hadamard=True,
        rope=RopeConfig(
            tuple(shape.rope_theta ** (-2 * j / shape.head_size) for j in range(shape.head_size // 2)), shape.head_size
        ),
    )
    quantization = checkpoint.quantization_config(kv, dict.fromkeys(LINEARS, GROUP_SIZE))
    if variant.quant_method != checkpoint.QUANT_METHOD:  # the same weights, and no word of a cache
        quantization["quant_method"] = variant.quant_method
        del quantization[checkpoint.QUANT_METHOD]
    return config | {"quantization_config": quantization}


def names_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    """argparse type of a list of names, separated by commas, out of the known ones."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {list(known)}")
        return names

    return parse
