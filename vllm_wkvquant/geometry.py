"""The tensors of a checkpoint by its config.json: names, shapes and types.

transformers knows those of a model, too, but takes seconds to import.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_wkvquant.config import ConfigError, KVCacheConfig

KV_PARAMS = ("k_smooth", "k_shift", "v_shift", "k_first", "v_first")
KV_PREFIX = "wkv_"
# types as safetensors' headers call them
INT32, INT64, FLOAT32, HALF = ("I32",), ("I64",), ("F32",), ("F16", "BF16")


def kv_tensor_name(layer: int, param: str) -> str:
    """Name of a KV tensor in the checkpoint: the path of vLLM's Attention module, then `wkv_<param>`."""
    return f"model.layers.{layer}.self_attn.attn.{KV_PREFIX}{param}"


@dataclass(frozen=True)
class Kind:
    """What differs between model types.

    biases: linear layer -> the key of config.json that gives it a bias, or True where it always has one. of_vllm:
    config.json -> linear layer -> whether vLLM gives it one. head_norms: queries and keys have a norm each.
    window_keys: it slides only with use_sliding_window, from max_window_layers on. kv_heads, head_size: where
    config.json lacks the key; None: as many as query heads, and hidden size over those.
    """

    of_vllm: Callable[[dict[str, Any]], dict[str, Any]]
    biases: Mapping[str, str | bool] = field(default_factory=dict)
    head_norms: bool = False
    window_keys: bool = False
    kv_heads: int | None = None
    head_size: int | None = None

    def biased(self, config: dict[str, Any]) -> list[str]:
        """Linear layers that have a bias by a config.json."""
        return [name for name, key in self.biases.items() if key is True or (key and config.get(key))]


QKV, MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj")
ATTENTION = (*QKV, "o_proj")
BIAS_KEYS = ("attention_bias", "bias", "qkv_bias", "mlp_bias")


def _vllm_llama(config: dict[str, Any]) -> dict[str, Any]:
    attention = config.get("attention_bias") or config.get("bias")
    of_qkv = dict.fromkeys(QKV, config.get("qkv_bias", attention))
    return {**of_qkv, "o_proj": attention, **dict.fromkeys(MLP, config.get("mlp_bias"))}


KINDS = {
    "llama": Kind(_vllm_llama, dict.fromkeys(ATTENTION, "attention_bias") | dict.fromkeys(MLP, "mlp_bias")),
    "mistral": Kind(_vllm_llama, kv_heads=8),  # in vLLM a Llama
    "qwen2": Kind(lambda config: dict.fromkeys(QKV, True), dict.fromkeys(QKV, True), window_keys=True, kv_heads=32),
    "qwen3": Kind(
        lambda config: dict.fromkeys(QKV, config.get("attention_bias")),
        dict.fromkeys(ATTENTION, "attention_bias"),
        head_norms=True,
        window_keys=True,
        kv_heads=32,
        head_size=128,
    ),
}


def architecture_of(config: dict[str, Any]) -> str | None:
    """The first of `architectures` in a config.json. Raises ConfigError."""
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"config.json: architectures must be a list of names, got {names!r}")
    return next(iter(names), None)


def kind_of(config: dict[str, Any]) -> Kind:
    """By the architecture, as vLLM, or where none is named by the model type. Raises ConfigError."""
    named = architecture_of(config) or str(config.get("model_type"))
    kind = KINDS.get(named.removesuffix("ForCausalLM").lower())
    if kind is None:
        raise ConfigError(f"config.json: architecture {named} is not supported; supported: {', '.join(KINDS)}")
    return kind


def check_biases(config: dict[str, Any]) -> None:
    """Raise ConfigError where vLLM gives a bias to other layers than transformers, which neither would notice."""
    kind = kind_of(config)
    stored = kind.biased(config)
    served = [name for name, has in kind.of_vllm(config).items() if has]
    if left_out := [name for name in stored if name not in served]:
        raise ConfigError(
            f"config.json gives {', '.join(left_out)} a bias, which vLLM leaves out in this architecture: it would "
            f"answer wrongly, so this model cannot be served"
        )
    if unset := [name for name in served if name not in stored]:
        keys = ", ".join(key for key in BIAS_KEYS if config.get(key) and key not in kind.biases.values())
        raise ConfigError(
            f"config.json: {keys} gives {', '.join(unset)} a bias in vLLM, which this model lacks; set {keys} to false"
        )


def check_served(config: dict[str, Any]) -> None:
    """Raise ConfigError for a model that vLLM refuses, or whose attention it computes in another way. Biases aside."""
    act = config.get("hidden_act", "silu")
    if act != "silu":
        raise ConfigError(f"config.json: hidden_act {act!r} is not supported: vLLM has only silu in this architecture")
    if config.get("dual_chunk_attention_config"):
        raise ConfigError(
            "config.json: dual_chunk_attention_config is not supported: neither calibration nor the 4-bit cache has "
            "dual chunk attention"
        )
    if config.get("is_causal") is False:
        raise ConfigError("config.json: is_causal false is not supported: vLLM gives such a model no KV cache")
    if _windows_differ(config):
        raise ConfigError(
            "config.json gives layers a sliding window (sliding_window, layer_types, use_sliding_window with "
            "max_window_layers) in a way that vLLM refuses, or reads otherwise than transformers, in this architecture"
        )


def _windows_differ(config: dict[str, Any]) -> bool:
    """Whether transformers and any vLLM may give a layer different windows. Both read alike: no window for a Llama,
    which has none in transformers, one in all layers for a Mistral, in all or none for a Qwen. Defaults are those of
    transformers."""
    kind, types = kind_of(config), config.get("layer_types")
    slides = config.get("sliding_window", None if kind is KINDS["llama"] else 4096) is not None
    types = {str(t) for t in types} if isinstance(types, list) else set()
    if len(types) > 1:
        return True
    if kind is KINDS["llama"]:
        return slides or "sliding_attention" in types
    if not kind.window_keys:
        return slides and types == {"full_attention"}
    if not (slides and config.get("use_sliding_window")):
        return False
    return types != {"sliding_attention"} if types else config.get("max_window_layers", 28) != 0


def _size(config: dict[str, Any], key: str, default: int | None = None) -> int:
    size = default if config.get(key) is None else config[key]
    if type(size) is not int or size < 1:
        raise ConfigError(f"config.json: {key} must be a whole number of at least 1, got {size!r}")
    return size


@dataclass(frozen=True)
class Geometry:
    """Sizes of a model."""

    kind: Kind
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Geometry":
        """Of a config.json. Raises ConfigError."""
        kind = kind_of(config)
        hidden, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
        # null is another default than no key at all
        kv_heads = heads if "num_key_value_heads" in config or kind.kv_heads is None else kind.kv_heads
        head_size = hidden // heads if "head_dim" in config or kind.head_size is None else kind.head_size
        return cls(
            kind=kind,
            layers=_size(config, "num_hidden_layers"),
            hidden=hidden,
            intermediate=_size(config, "intermediate_size"),
            heads=heads,
            kv_heads=_size(config, "num_key_value_heads", kv_heads),
            head_size=_size(config, "head_dim", head_size),
            vocabulary=_size(config, "vocab_size"),
        )

    def linears(self) -> dict[str, tuple[int, int]]:
        """[out, in] of a block's linear layers, which are quantized."""
        of_queries, of_keys = self.heads * self.head_size, self.kv_heads * self.head_size
        return {
            "self_attn.q_proj": (of_queries, self.hidden),
            "self_attn.k_proj": (of_keys, self.hidden),
            "self_attn.v_proj": (of_keys, self.hidden),
            "self_attn.o_proj": (self.hidden, of_queries),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    def others(self, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """Shapes of a block's norms and biases."""
        norms = {f"{name}_layernorm.weight": (self.hidden,) for name in ("input", "post_attention")}
        if self.kind.head_norms:
            norms |= {f"self_attn.{name}_norm.weight": (self.head_size,) for name in "qk"}
        biased = self.kind.biased(config)
        rows = self.linears().items()
        biases = {f"{name}.bias": (out,) for name, (out, _) in rows if name.rpartition(".")[2] in biased}
        return {**norms, **biases}

    def outer(self, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """Shapes of what is outside the blocks."""
        embedding = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        head = {} if config.get("tie_word_embeddings") else {"lm_head.weight": (self.vocabulary, self.hidden)}
        return {**embedding, "model.norm.weight": (self.hidden,), **head}


def group_sizes(section: dict[str, Any], geometry: Geometry, weights: dict[str, Any]) -> dict[str, int]:
    """Columns that share a scale in each of `geometry.linears()`, by the `config_groups` of `section`.

    weights: what each group must say of its weights beside that. Raises ConfigError.
    """
    where, again = "quantization_config.config_groups", "quantize the model again"
    out = {}
    try:
        groups = [(g["targets"], dict(g["weights"])) for g in section["config_groups"].values()]
        for name, (_, columns) in geometry.linears().items():
            of = [w for targets, w in groups if any(re.match(t.removeprefix("re:"), f".{name}") for t in targets)]
            if len(of) != 1:
                raise ConfigError(f"{where} has {len(of)} groups for {name}; {again}")
            for key, value in weights.items():
                if of[0].get(key) != value:
                    raise ConfigError(f"{where}: {key} of {name} must be {value!r}, got {of[0].get(key)!r}; {again}")
            size = _size(of[0], "group_size")
            if columns % size:
                raise ConfigError(
                    f"{where}: group_size {size} of {name} does not divide its {columns} columns; {again}"
                )
            out[name] = size
    except ConfigError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, re.error) as error:
        raise ConfigError(f"{where} is missing or damaged; {again}") from error
    return out


def stored_tensors(
    config: dict[str, Any], kv: KVCacheConfig, groups: dict[str, int]
) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """Types, of which it has one, and shape of every tensor of a checkpoint (docs/format.md).

    groups: of `group_sizes`.
    """
    geometry = Geometry.of(config)
    out: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {n: (HALF, s) for n, s in geometry.outer(config).items()}
    for layer in range(geometry.layers):
        block = f"model.layers.{layer}."
        out |= {block + name: (HALF, shape) for name, shape in geometry.others(config).items()}
        for name, (rows, columns) in geometry.linears().items():
            scales = columns // groups[name]
            out |= {
                f"{block}{name}.weight_packed": (INT32, (rows, math.ceil(columns / 8))),
                f"{block}{name}.weight_scale": (HALF, (rows, scales)),
                f"{block}{name}.weight_zero_point": (INT32, (math.ceil(rows / 8), scales)),
                f"{block}{name}.weight_shape": (INT64, (2,)),
            }
        out |= {kv_tensor_name(layer, param): (FLOAT32, (kv.num_kv_heads, kv.head_size)) for param in KV_PARAMS}
    return out
