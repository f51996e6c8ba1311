"""Tiny random models with tokenizers, saved as Hugging Face checkpoints, texts, what was made of them, and damages."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from vllm_wkvquant.checkpoint import INDEX_FILE
from vllm_wkvquant.quantize.writer import PAGE_FILE
from vllm_wkvquant.reference import SLOW_TURN

CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
VOCABULARY = 256


def save_tokenizer(path: Path) -> None:
    """A tokenizer of one token per character, 256 in all, with a chat template."""
    tokenizer = Tokenizer(models.WordLevel({chr(i): i for i in range(VOCABULARY)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", eos_token="\x02", bos_token="\x01")
    fast.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    fast.save_pretrained(path)


def save_text(path: Path, tokens: int = 8192, seed: int = 0) -> Path:
    """A text of `tokens` characters, which are as many tokens."""
    ids = torch.randint(97, 123, (tokens,), generator=torch.Generator().manual_seed(seed))
    path.write_text("".join(map(chr, ids.tolist())))
    return path


def contents(directory: Path) -> dict[str, bytes]:
    """All files of a result but the page, which has times in it."""
    files = [p for p in sorted(directory.rglob("*")) if p.is_file() and p.name != PAGE_FILE]
    return {str(p.relative_to(directory)): p.read_bytes() for p in files}


def tiny_model(
    path: Path,
    family: str = "llama",
    head_size: int = 64,
    num_layers: int = 3,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    hidden_size: int = 128,
    intermediate_size: int = 256,
    key_bias: float = 0.0,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: str = "5GB",
    seed: int = 0,
    **config: Any,
) -> Path:
    """Save a random model and its tokenizer under `path`; returns `path`.

    key_bias: largest bias of the key projection (needs qwen2, or `attention_bias=True`). Weights are large enough for
    attention to be far from uniform. config: further fields of the transformers config.
    """
    torch.manual_seed(seed)
    settings = {
        "tie_word_embeddings": False,
        "max_position_embeddings": 512,
        "sliding_window": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **config,
    }
    if family == "llama":
        settings.pop("sliding_window")
    cfg = CONFIGS[family](
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_size,
        **settings,
    )
    model = AutoModelForCausalLM.from_config(cfg, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                gain = 2.0 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1.0
                parameter.normal_(0, gain / parameter.shape[1] ** 0.5)
            elif name.endswith("k_proj.bias"):
                parameter.uniform_(-key_bias, key_bias)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
            else:
                parameter.uniform_(0.5, 1.5)  # norms
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    save_tokenizer(path)
    return path


def clear_fast_bias(path: Path, layers: list[int], head_size: int = 64, base: float = 10000.0) -> None:
    """Leave the key biases of these layers of a `tiny_model` to the rotary pairs that are slow."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    fast = base ** (-torch.arange(0, head_size, 2) / head_size) > SLOW_TURN
    for layer in layers:
        tensors[f"model.layers.{layer}.self_attn.k_proj.bias"].view(-1, head_size)[:, fast.repeat(2)] = 0
    save_file(tensors, file, {"format": "pt"})


def edit_config(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = next(path.glob("*.safetensors"))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    index = path / INDEX_FILE
    if index.is_file():
        index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, file.name)}))
