"""Text that a model writes itself, to calibrate on: what it was trained on shows there, whatever text is at hand.

Sequences begin with a random token and go on by sampling at temperature 1, as in LLM-QAT (arXiv 2305.17888), which
distills quantized models on nothing else.
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from transformers import AutoModelForCausalLM

from vllm_wkvquant.config import ConfigError
from vllm_wkvquant.quantize.plan import check_device
from vllm_wkvquant.text import load_tokenizer, prefix_of


def check(args: argparse.Namespace) -> None:
    """Everything that can be refused before long work. Raises ConfigError."""
    check_device(args.device)
    if not args.file.parent.is_dir():
        raise ConfigError(f"the directory of {args.file} does not exist")
    if args.file.exists():
        raise ConfigError(f"{args.file} exists; give a new name")
    for name in ("tokens", "length", "batch"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} {getattr(args, name)} must be at least 1")


def load(folder: Path, device: str) -> Any:
    """The model in its own dtype on a GPU, in float32 on a CPU. Raises ConfigError."""
    dtype = "auto" if device.startswith("cuda") else torch.float32
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"the model in {folder} cannot be loaded: {str(error).splitlines()[0]}") from error
    return model.to(device).eval()


def write(folder: Path, tokens: int, length: int, batch: int, seed: int, device: str) -> Iterator[list[str]]:
    """Texts of `length` tokens, `batch` at a time, until there are `tokens`. Raises ConfigError."""
    tokenizer = load_tokenizer(folder)
    model = load(folder, device)
    limit = int(model.config.max_position_embeddings)
    prefix = torch.tensor(prefix_of(tokenizer), dtype=torch.long)
    if length + len(prefix) > limit:
        raise ConfigError(f"--length {length} is more than the {limit - len(prefix)} positions that the model knows")
    special = set(tokenizer.all_special_ids)
    first = torch.tensor([i for i in range(len(tokenizer)) if i not in special])
    torch.manual_seed(seed)
    for begin in range(0, tokens, batch * length):
        rows = min(batch, -(-(tokens - begin) // length))
        starts = first[torch.randint(len(first), (rows, 1))]
        prompt = torch.cat([prefix.expand(rows, -1), starts], 1).to(device)
        with torch.inference_mode():
            out = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                repetition_penalty=1.0,  # whatever the model's own settings for serving say
                min_new_tokens=length - 1,  # an end of text is never drawn
                max_new_tokens=length - 1,
                pad_token_id=tokenizer.pad_token_id or 0,
            )
        yield tokenizer.batch_decode(out, skip_special_tokens=True)


def main(args: argparse.Namespace) -> int:
    """`wkvquant write-text`: the file appears whole or not at all. Returns the exit status."""
    check(args)
    batches = write(args.model, args.tokens, args.length, args.batch, args.seed, args.device)
    count = -(-args.tokens // (args.batch * args.length))
    texts = [text for batch in track(batches, "writing", count) for text in batch]
    partial = args.file.with_name(args.file.name + ".partial")
    partial.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    os.replace(partial, args.file)
    print(f"{args.file}: {len(texts)} texts of {args.length} tokens")
    return 0
