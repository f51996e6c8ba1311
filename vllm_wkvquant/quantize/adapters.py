"""What the quantizer needs to know of a model family, and the models it refuses before any long work."""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from vllm_wkvquant.checkpoint import ShardedTensors, check_plain, read_config
from vllm_wkvquant.config import ConfigError, reason_of
from vllm_wkvquant.geometry import architecture_of, check_biases, check_served
from vllm_wkvquant.layout import HEAD_SIZES
from vllm_wkvquant.rope import check_rope, rope_config

HALF_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}  # by the names in safetensors' headers
STORED = (*HALF_DTYPES, "F32")
GROUP_SIZES = (128, 64, 32)  # what vLLM's 4-bit kernels take, largest first


@dataclass(frozen=True)
class Family:
    """Module paths of a decoder-only family in transformers; the defaults are those of Llama and its kin."""

    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    rotary: str = "model.rotary_emb"
    norm: str = "model.norm"
    head: str = "lm_head"
    attention: str = "self_attn"
    attention_norm: str = "input_layernorm"
    v_proj: str = "self_attn.v_proj"
    o_proj: str = "self_attn.o_proj"
    linears: tuple[str, ...] = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )


# architecture -> family; a new family with this block structure is one more row
FAMILIES = {
    name: Family() for name in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
}


def check_supported(path: Path, config: dict[str, Any]) -> Family:
    """The family of a raw config.json. Raises ConfigError for a model that cannot be quantized, naming the reason."""
    architecture = architecture_of(config)
    if architecture not in FAMILIES:
        raise ConfigError(f"architecture {architecture} of {path} is not supported; supported: {', '.join(FAMILIES)}")
    check_plain(path, config)
    check_biases(config)
    check_served(config)
    for key in ("rope_parameters", "rope_scaling"):  # of transformers 5, and before it
        check_rope(config.get(key) or {})
    return FAMILIES[architecture]


def not_finite(tensors: dict[str, torch.Tensor]) -> str | None:
    """Name of the first of these tensors of one device that has NaN or infinity, which is waited for once."""
    ends = torch.stack([torch.stack([*tensor.aminmax()]).float() for tensor in tensors.values()])
    return next((name for name, fine in zip(tensors, ends.isfinite().all(1).tolist(), strict=True) if not fine), None)


def overflows(dtype: torch.dtype) -> str:
    """What to say of something that is not finite in calibration runs of this type."""
    if dtype == torch.float16:
        return "overflows float16; use --dtype bfloat16 or float32"
    return f"has NaN or infinity in {str(dtype).removeprefix('torch.')}; is the model sound?"


def group_size(in_features: int) -> int | None:
    """Weights that share a scale: 128, else the largest smaller power of two that divides; None where none does."""
    return next((g for g in GROUP_SIZES if in_features % g == 0), None)


@contextlib.contextmanager
def fields_that_fit(path: Path) -> Iterator[None]:
    """Turns what transformers says of a field of config.json into a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # transformers, huggingface_hub and torch have many kinds for a field that does not fit
        raise ConfigError(f"{path}/config.json is not a valid model config: {reason_of(error)}") from error


class ModelAdapter:
    """A model on disk: its geometry, the names of its tensors, and its modules without weights.

    config: the transformers config; skeleton: the model on the meta device; rope: the model's own frequencies, as the
    KV section of the checkpoint stores them.
    """

    def __init__(self, path: Path, attention: str) -> None:
        """attention: name under which the attention function is registered with transformers."""
        self.path = path
        self.raw_config = read_config(path)
        self.family = check_supported(path, self.raw_config)
        self.tensors = ShardedTensors(path)
        with fields_that_fit(path):
            self.config: PreTrainedConfig = AutoConfig.from_pretrained(path)
        config = self.config
        check_rope(config.rope_parameters)  # where transformers has gathered keys from elsewhere in config.json
        self.num_layers = int(config.num_hidden_layers)
        self.num_heads = int(config.num_attention_heads)
        self.num_kv_heads = int(config.num_key_value_heads)
        self.head_size = int(getattr(config, "head_dim", None) or config.hidden_size // self.num_heads)
        self.tied = bool(config.tie_word_embeddings)
        if self.head_size not in HEAD_SIZES:
            raise ConfigError(f"head size {self.head_size} is not supported; supported: {list(HEAD_SIZES)}")
        # of the tensors that stay 16-bit, and of the scales. The skeleton below sets the config's dtype to its own.
        self.dtype = self._half_dtype()
        with fields_that_fit(path), torch.device("meta"):
            self.skeleton: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation=attention
            )
        # on the CPU: buffers of the meta skeleton have no values
        self.rotary: torch.nn.Module = type(self.skeleton.get_submodule(self.family.rotary))(config=config)
        self.rope = rope_config(config)
        self._shapes = self._check_tensors()
        self.group_sizes = self._check_groups()

    def _half_dtype(self) -> torch.dtype:
        """The config's type, or the stored embedding's where that is no 16-bit one; bf16 for a model in fp32."""
        dtype = self.config.dtype
        if isinstance(dtype, torch.dtype) and dtype in HALF_DTYPES.values():
            return dtype
        stored, _ = self.tensors.headers().get(f"{self.family.embedding}.weight", ("", ()))
        return HALF_DTYPES.get(stored, torch.bfloat16)

    def _check_tensors(self) -> dict[str, tuple[int, ...]]:
        expected = {n: tuple(p.shape) for n, p in self.skeleton.named_parameters(remove_duplicate=False)}
        if self.tied:
            expected.pop(f"{self.family.head}.weight", None)
        headers = self.tensors.headers()
        shapes = {name: shape for name, (_, shape) in headers.items()}
        absent = sorted(n for n in expected if n not in shapes)
        if absent:
            raise ConfigError(f"{self.path} lacks {len(absent)} tensors of its architecture, {absent[0]} first")
        for name, shape in expected.items():
            if shapes[name] != shape:
                raise ConfigError(f"{self.path}: tensor {name} has shape {shapes[name]}, its config asks for {shape}")
            if headers[name][0] not in STORED:
                raise ConfigError(
                    f"{self.path}: tensor {name} is stored as {headers[name][0]}, not in 16 or 32 bits; give the model "
                    "that it was made from"
                )
        # rotary_emb.inv_freq: a buffer that old Llama checkpoints carry; a tied head may be stored all the same
        ignored = {n for n in shapes if n.endswith("rotary_emb.inv_freq")} | {f"{self.family.head}.weight"}
        unknown = sorted(set(shapes) - set(expected) - ignored)
        if unknown:
            raise ConfigError(f"{self.path} has tensors that its architecture does not know, {unknown[0]} first")
        return expected

    def _check_groups(self) -> dict[str, int]:
        sizes = {}
        for linear in self.family.linears:
            name = f"{self.block_prefix(0)}{linear}"
            in_features = self._shapes[f"{name}.weight"][1]
            size = group_size(in_features)
            if size is None:
                raise ConfigError(
                    f"{name} has {in_features} input features, which no group size of {list(GROUP_SIZES)} divides; "
                    f"this model cannot be quantized"
                )
            sizes[linear.rpartition(".")[2]] = size
        return sizes

    def check_finite(self, name: str) -> None:
        """Raise ConfigError where a tensor has NaN or infinity as it is stored."""
        if not_finite(self.tensors.get([name])):
            raise ConfigError(f"tensor {name} of {self.path} contains NaN or infinity; give a sound model")

    def check_outer(self) -> None:
        """`check_finite` of all tensors outside the blocks. Raises ConfigError for a head beside a tied one, too."""
        for name in self.outer_names():
            self.check_finite(name)
        names = [f"{self.family.embedding}.weight", f"{self.family.head}.weight"]
        if self.tied and names[1] in self.tensors:
            # transformers takes it, vLLM the embedding
            embedding, head = self.tensors.get(names).values()
            if not torch.equal(embedding, head):
                raise ConfigError(
                    f"{self.path}: tensor {names[1]} is not the embedding, and its config has tie_word_embeddings; set "
                    f"that to false, or delete the tensor"
                )

    def block_prefix(self, layer: int) -> str:
        """Prefix of a decoder block's tensors, with its dot."""
        return f"{self.family.layers}.{layer}."

    def block_names(self, layer: int) -> list[str]:
        """Tensors of one decoder block."""
        return [n for n in self._shapes if n.startswith(self.block_prefix(layer))]

    def outer_names(self) -> list[str]:
        """Tensors outside the decoder blocks: embedding, final norm and, unless tied, head."""
        return [n for n in self._shapes if not n.startswith(f"{self.family.layers}.")]

    def numel(self, names: list[str]) -> int:
        """Elements of these tensors together."""
        return sum(torch.Size(self._shapes[n]).numel() for n in names)

    def linear_shapes(self) -> dict[str, tuple[int, ...]]:
        """[out, in] of a block's linear layers, by module path; all blocks have the same."""
        return {n: self._shapes[f"{self.block_prefix(0)}{n}.weight"] for n in self.family.linears}

    def load_block(self, layer: int, dtype: torch.dtype, device: str) -> torch.nn.Module:
        """One decoder block with its weights, [out, in] each; freed by the caller dropping it. Raises ConfigError where
        one of them is not finite, or the model has changed."""
        self.tensors.check_unchanged()
        prefix, block = self.block_prefix(layer), self.empty_block(layer)
        loaded = {n: t.to(device, dtype) for n, t in self.tensors.get(self.block_names(layer)).items()}
        if name := not_finite(loaded):
            self.check_finite(name)
            raise ConfigError(f"tensor {name} of {self.path} {overflows(dtype)}")
        block.load_state_dict({n.removeprefix(prefix): t for n, t in loaded.items()}, assign=True)
        return block.requires_grad_(False)

    def empty_block(self, layer: int) -> torch.nn.Module:
        """One decoder block without weights, on the meta device."""
        with torch.device("meta"):
            meta = self.skeleton.get_submodule(f"{self.family.layers}.{layer}")
            return type(meta)(self.config, layer).eval()

    def load_embedding(self) -> torch.Tensor:
        """Token embedding [vocabulary, hidden] as stored."""
        name = f"{self.family.embedding}.weight"
        return self.tensors.get([name])[name]

    def load_head(self, dtype: torch.dtype, device: str) -> torch.nn.Sequential:
        """Final norm and language-model head: hidden [..., hidden] -> logits [..., vocabulary].
        Raises ConfigError where the model has changed."""
        self.tensors.check_unchanged()
        family = self.family
        head_name = f"{family.embedding if self.tied else family.head}.weight"
        loaded = self.tensors.get([f"{family.norm}.weight", head_name])
        with torch.device("meta"):
            norm_type: Any = type(self.skeleton.get_submodule(family.norm))
            norm = norm_type(self.config.hidden_size, eps=self.config.rms_norm_eps)
            head = torch.nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        norm.load_state_dict({"weight": loaded[f"{family.norm}.weight"].to(device, dtype)}, assign=True)
        head.load_state_dict({"weight": loaded[head_name].to(device, dtype)}, assign=True)
        return torch.nn.Sequential(norm, head).requires_grad_(False)

    def output_config(self, quantization_config: dict[str, Any]) -> dict[str, Any]:
        """config.json of the quantized model: the model's own, with `quantization_config` and the stored dtype, without
        `auto_map`, whose Python files a checkpoint does not have."""
        config = {k: v for k, v in self.raw_config.items() if k not in ("torch_dtype", "auto_map")}
        return {**config, "dtype": str(self.dtype).removeprefix("torch."), "quantization_config": quantization_config}


def describe(adapter: ModelAdapter) -> dict[str, Any]:
    """Geometry for the report."""
    return {
        "architecture": adapter.raw_config["architectures"][0],
        "num_hidden_layers": adapter.num_layers,
        "num_attention_heads": adapter.num_heads,
        "num_key_value_heads": adapter.num_kv_heads,
        "head_size": adapter.head_size,
        "rope": dataclasses.asdict(adapter.rope),
    }
