"""Rotary embeddings of transformers' configs: which are supported, and their frequencies."""

from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from vllm_wkvquant.config import ConfigError, RopeConfig

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def check_rope(rope: Any) -> None:
    """Raise ConfigError for one whose angles are no fixed multiples of the index in the sequence, or that leaves a part
    of a head as it is."""
    if not isinstance(rope, dict):
        raise ConfigError(f"rotary embedding {rope!r} in config.json must be an object")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if "mrope_section" in rope or kind == "mrope":
        raise ConfigError(
            "rotary embedding with mrope_section (M-RoPE) is not supported: positions are not indices in the sequence"
        )
    if kind == "dynamic":
        raise ConfigError(
            "rotary embedding 'dynamic' (dynamic NTK) is not supported: its frequencies change with the length"
        )
    if kind == "longrope":
        raise ConfigError("rotary embedding 'longrope' is not supported: its frequencies change with the length")
    if (share := rope.get("partial_rotary_factor") or 1) != 1:  # which vLLM heeds, and transformers' modules do not
        raise ConfigError(f"partial_rotary_factor {share} is not supported: these models rotate all of a head")
    if kind not in ROPE_TYPES:
        raise ConfigError(f"rotary embedding {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}")


def rope_config(config: PreTrainedConfig) -> RopeConfig:
    """Frequencies and scaling that a model of this transformers config uses; all families compute them as Llama."""
    with torch.device("cpu"):
        rotary = LlamaRotaryEmbedding(config)  # type: ignore[arg-type]
    inv_freq = rotary.get_buffer("inv_freq")
    return RopeConfig(tuple(inv_freq.double().tolist()), 2 * inv_freq.numel(), float(rotary.attention_scaling))


def check_same_rope(rope: RopeConfig, config: PreTrainedConfig) -> None:
    """Raise ConfigError unless a model of this transformers config rotates keys as `rope`, which their shifts turn by,
    says."""
    try:
        check_rope(config.rope_parameters)
    except ConfigError as error:
        raise ConfigError(f"{error}; serve with an explicit --kv-cache-dtype") from error
    if not rope.is_close(rope_config(config)):
        raise ConfigError(
            f"the checkpoint's keys turn with another rotary embedding than the model's, {config.rope_parameters}; "
            "quantize the model with this rope, or serve with an explicit --kv-cache-dtype"
        )
