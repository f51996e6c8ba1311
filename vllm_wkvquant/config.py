"""What a checkpoint says about its KV cache: frozen dataclasses, unknown keys rejected, one validator each.

The JSON form lives in `config.json` under `quantization_config["wkvquant"]` (docs/format.md).
"""

import dataclasses
import math
import reprlib
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_wkvquant.layout import HEAD_SIZES, LAYOUT_VERSION

FORMAT_VERSION = 1
MAX_REASON = 600  # characters; transformers lists all models that it knows
KEY_SHIFTS = ("rotating", "static", "none")


class ConfigError(ValueError):
    """A checkpoint or an argument that this package refuses; the message says what to do."""


def reason_of(error: Exception) -> str:
    """What an exception of another package says, on one line."""
    kind = type(error).__name__
    text = textwrap.shorten(str(error), MAX_REASON, placeholder=" ...")
    return f"{kind} {text}".strip() if isinstance(error, KeyError) or not text else text  # whose text is a key


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# field's type -> what its JSON must be
_JSON_TYPES: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    bool: ("true or false", lambda x: isinstance(x, bool)),
    int: ("a whole number of at least 1", lambda x: type(x) is int and x >= 1),
    float: ("a number", _is_number),
    str: ("a string", lambda x: isinstance(x, str)),
    tuple[float, ...]: ("a list of numbers", lambda x: isinstance(x, (list, tuple)) and all(map(_is_number, x))),
}


def _from_dict(cls: type, where: str, data: Any) -> Any:
    if not isinstance(data, dict):
        raise ConfigError(f"{where} must be an object, got {type(data).__name__}")
    names = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(data) - names)
    if unknown:
        raise ConfigError(f"{where} has unknown keys {unknown}; known: {sorted(names)}")
    required = {
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - set(data))
    if missing:
        raise ConfigError(f"{where} lacks the keys {missing}")
    for field in dataclasses.fields(cls):
        if field.name in data and field.type in _JSON_TYPES:
            what, is_it = _JSON_TYPES[field.type]
            if not is_it(data[field.name]):
                raise ConfigError(f"{where}.{field.name} must be {what}, got {reprlib.repr(data[field.name])}")
    return cls(**data)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of the model, neox style: channel j pairs with channel j + rotary_dim / 2.

    inv_freq: rotary_dim / 2 angular frequencies in radians per position, as the model uses them (after Llama 3 or
    YaRN scaling). attention_scaling: factor that the model multiplies into cos and sin (YaRN; otherwise 1).
    """

    inv_freq: tuple[float, ...]
    rotary_dim: int
    attention_scaling: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "inv_freq", tuple(float(f) for f in self.inv_freq))
        if self.rotary_dim % 2 or len(self.inv_freq) != self.rotary_dim // 2:
            raise ConfigError(f"rope: {len(self.inv_freq)} frequencies do not fit rotary_dim {self.rotary_dim}")
        if not all(math.isfinite(f) and 0 <= f <= math.pi for f in self.inv_freq):
            raise ConfigError("rope: every inv_freq must be finite and within [0, pi]")
        if not (math.isfinite(self.attention_scaling) and self.attention_scaling > 0):
            raise ConfigError(f"rope: attention_scaling {self.attention_scaling} is not a positive number")

    def is_close(self, other: "RopeConfig") -> bool:
        """Whether both rotate alike, up to the rounding of fp32."""
        ours, theirs = ((*rope.inv_freq, rope.attention_scaling) for rope in (self, other))
        return len(ours) == len(theirs) and all(
            math.isclose(a, b, rel_tol=1e-5) for a, b in zip(ours, theirs, strict=True)
        )


@dataclass(frozen=True)
class KVCacheConfig:
    """The KV section of a checkpoint.

    key_shift: "rotating" (k_shift is a bias before the rotary embedding and turns with the position), "static"
    (k_shift is subtracted after it, the paper's form) or "none". key_hadamard: keys are multiplied by the
    (block-diagonal) Hadamard matrix before they are quantized. value_hadamard: v_proj and o_proj have that matrix
    folded in; the cache does nothing for it.
    """

    head_size: int
    num_kv_heads: int
    num_hidden_layers: int
    key_shift: str
    key_hadamard: bool
    value_hadamard: bool
    rope: RopeConfig
    num_bits: int = 4
    format_version: int = FORMAT_VERSION
    layout_version: int = LAYOUT_VERSION

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise ConfigError(
                f"checkpoint format version {self.format_version} is not supported (this build reads "
                f"{FORMAT_VERSION}); quantize the model again or install the matching vllm-wkvquant"
            )
        if self.layout_version != LAYOUT_VERSION:
            raise ConfigError(
                f"KV page layout version {self.layout_version} is not supported (this build uses "
                f"{LAYOUT_VERSION}); quantize the model again or install the matching vllm-wkvquant"
            )
        if self.num_bits != 4:
            raise ConfigError(f"num_bits {self.num_bits} is not supported; the KV cache has 4 bits")
        if self.head_size not in HEAD_SIZES:
            raise ConfigError(f"head size {self.head_size} is not supported; supported: {list(HEAD_SIZES)}")
        if self.key_shift not in KEY_SHIFTS:
            raise ConfigError(f"key_shift {self.key_shift!r} is not one of {list(KEY_SHIFTS)}")
        if self.rope.rotary_dim > self.head_size:
            raise ConfigError(f"rotary_dim {self.rope.rotary_dim} exceeds the head size {self.head_size}")

    def check_model(self, head_size: int, num_kv_heads: int, num_hidden_layers: int) -> None:
        """Raise ConfigError where this is not the section of a model with these sizes."""
        facts = {
            "head size": (self.head_size, head_size),
            "number of KV heads": (self.num_kv_heads, num_kv_heads),
            "number of layers": (self.num_hidden_layers, num_hidden_layers),
        }
        for what, (ours, theirs) in facts.items():
            if ours != theirs:
                raise ConfigError(
                    f"quantization_config.wkvquant says {what} {ours}, the model has {theirs}; quantize the model again"
                )

    @classmethod
    def from_dict(cls, data: Any) -> "KVCacheConfig":
        """Parse `quantization_config["wkvquant"]`. Raises ConfigError."""
        if not isinstance(data, dict):
            raise ConfigError("quantization_config lacks its 'wkvquant' object; this is no wkvquant checkpoint")
        data = dict(data)
        if "rope" in data:
            data["rope"] = _from_dict(RopeConfig, "quantization_config.wkvquant.rope", data["rope"])
        return _from_dict(cls, "quantization_config.wkvquant", data)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; `from_dict` inverts it."""
        return dataclasses.asdict(self)
