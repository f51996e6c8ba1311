"""Text that a model writes itself, to calibrate on: what it was trained on shows there, whatever text is at hand.

Sequences begin with a random token and go on by sampling at temperature 1, as in LLM-QAT (arXiv 2305.17888), which
distills quantized models on nothing else.
"""

import argparse
import contextlib
import gc
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.progress import track
from transformers import AutoConfig, GenerationConfig

from vllm_wkvquant.checkpoint import ShardedTensors, check_plain, kv_elements, read_config
from vllm_wkvquant.config import ConfigError
from vllm_wkvquant.device import check_device, default_device
from vllm_wkvquant.evaluate import load, load_plain
from vllm_wkvquant.hub import find_model
from vllm_wkvquant.output import Notes
from vllm_wkvquant.quantize.files import WriteError, lock, write_bytes
from vllm_wkvquant.quantize.plan import check_seed
from vllm_wkvquant.text import check_known, load_tokenizer, prefix_of, read_tokens

BATCH = 16  # texts at a time on a CPU
MAX_BATCH = 128  # on a GPU, which takes hardly longer for more, as far as this share of it holds their keys and values
CACHE_SHARE = 0.4


def check(args: argparse.Namespace) -> None:
    """Refuse what can be before long work, and find the model. Raises ConfigError."""
    args.device = args.device or default_device()
    check_device(args.device)
    if not args.file.parent.is_dir():
        raise ConfigError(f"the directory of {args.file} does not exist")
    if args.file.exists():
        raise ConfigError(f"{args.file} exists; give a new name")
    for name, least in (("tokens", 1), ("length", 2), ("batch", 1)):  # a text has a token that is given
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise ConfigError(f"--{name} {getattr(args, name)} must be at least {least}")
    check_seed(args.seed)
    args.model = find_model(args.model, lambda folder: check_plain(folder, read_config(folder)))
    check_plain(args.model, read_config(args.model))
    positions = positions_of(args.model)
    if args.length > positions:
        raise ConfigError(f"--length {args.length} is more than the {positions} positions that the model knows")


def positions_of(model: Path) -> int:
    """Tokens that the model can have after its prefix."""
    positions = getattr(load(AutoConfig, model), "max_position_embeddings", None)
    if not isinstance(positions, int):
        raise ConfigError(f"{model / 'config.json'} has no max_position_embeddings, which texts must fit in")
    return positions - len(prefix_of(load_tokenizer(model)))


def batch_for(model: Path, length: int, device: str) -> int:
    """Texts at a time, where nothing else is said."""
    if not device.startswith("cuda"):
        return BATCH
    of_text = length * 2 * kv_elements(read_config(model))
    fit = CACHE_SHARE * torch.cuda.get_device_properties(device).total_memory / of_text
    return int(min(MAX_BATCH, 2 ** math.floor(math.log2(max(1, fit)))))


def rows_of(tokens: int, length: int, batch: int) -> list[int]:
    """Texts of each batch, until they have so many tokens."""
    texts = -(-tokens // length)
    return [min(batch, texts - begin) for begin in range(0, texts, batch)]


def write(folder: Path, length: int, rows: list[int], done: int, seed: int, device: str) -> Iterator[list[str]]:
    """Texts of `length` tokens, rows[i] in batch i, of which `done` are there. On a CPU in float32."""
    tokenizer = load_tokenizer(folder)
    dtype = "auto" if device.startswith("cuda") else torch.float32
    model = load_plain(folder, device, dtype=dtype)
    # nothing else of the model's settings for serving, which `generate` would fill what is not given from
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    prefix = torch.tensor(prefix_of(tokenizer), dtype=torch.long)
    check_known(prefix.tolist(), folder, tokenizer, "what the tokenizer puts before a text")
    special = set(tokenizer.all_special_ids)
    known = min(len(tokenizer), model.config.get_text_config().vocab_size)  # either may have more than the other
    first = torch.tensor([i for i in range(known) if i not in special])
    for number in range(done, len(rows)):
        torch.manual_seed(((seed << 20) + number) % 2**63)  # so that a batch is the same whoever wrote those before it
        starts = first[torch.randint(len(first), (rows[number], 1))]
        prompt = torch.cat([prefix.expand(rows[number], -1), starts], 1).to(device)
        with torch.inference_mode():
            out = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                min_new_tokens=length - 1,  # an end of text is never drawn
                max_new_tokens=length - 1,
                pad_token_id=tokenizer.pad_token_id or 0,
            )
        yield tokenizer.batch_decode(out, skip_special_tokens=True)


@contextlib.contextmanager
def going_on(partial: Path) -> Iterator[None]:
    """Turns what cannot be written into a ConfigError, which says how to go on."""
    try:
        yield
    except (OSError, WriteError) as error:
        failed = WriteError(Path(error.filename or partial), error) if isinstance(error, OSError) else error
        kept = f"; {partial} keeps the finished texts: {failed.remedy}, then run the same command again"
        raise ConfigError(f"{failed}{kept if partial.is_file() else ''}") from error


def read_partial(lines: TextIO, settings: dict[str, Any]) -> list[list[str]]:
    """Batches that an interrupted run with the same settings has written. Raises ConfigError where they are others."""
    first = json.dumps(settings) + "\n"
    lines.seek(0)
    content = lines.read()
    if first.startswith(content):  # a new file, or one of a run that got no further
        lines.truncate(0)
        lines.write(first)
        lines.flush()
        return []
    whole = [line for line in content.splitlines(keepends=True) if line.endswith("\n")]
    if not whole or whole[0] != first:
        raise ConfigError(f"{lines.name} is of a run with other settings; repeat those, or delete it")
    lines.truncate(sum(len(line.encode()) for line in whole))  # the last line may have been cut
    return [json.loads(line) for line in whole[1:]]


def write_file(file: Path, model: Path, tokens: int, length: int, batch: int, seed: int, device: str) -> int:
    """Texts that `model` wrote, their number. `file` appears whole or not at all.

    FILE.partial keeps the batches that are there, a JSON line each: the same call goes on. Raises ConfigError.
    """
    settings = {"model": str(model), "tokens": tokens, "length": length, "batch": batch, "seed": seed, "device": device}
    partial, rows = file.with_name(file.name + ".partial"), rows_of(tokens, length, batch)
    with going_on(partial), partial.open("a+", encoding="utf-8") as lines:
        lock(lines, partial)
        batches = read_partial(lines, settings)
        try:
            if file.exists():
                raise ConfigError(f"{file} exists; another process has just written it")
            new = write(model, length, rows, len(batches), seed, device)
            console = Notes(stderr=True)
            for texts in track(new, "writing", total=len(rows), completed=len(batches), console=console):
                batches.append(texts)
                lines.write(json.dumps(texts) + "\n")
                lines.flush()
        finally:
            if not batches:
                partial.unlink(missing_ok=True)
        write_bytes(file, ("\n\n".join(text for texts in batches for text in texts) + "\n").encode())
        partial.unlink(missing_ok=True)
    return sum(rows)


def text_for(out: Path, model: Path, samples: int, seq_len: int, seed: int, device: str) -> Path:
    """Text of the model's own for `samples` windows of `seq_len` tokens, kept beside `out`; what is there is used."""
    length, texts = min(seq_len, positions_of(model)), samples + 1
    weights = ShardedTensors(model).digest()
    while True:
        named = json.dumps([str(model.resolve()), weights, texts, length, seed, device])
        file = out.with_name(f"{out.name}.own-{hashlib.sha256(named.encode()).hexdigest()[:8]}.txt")
        if file.is_file() and file.stat().st_size == 0:  # as one that was not flushed is after a power failure
            file.unlink()
        if not file.exists():
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"the directory {file.parent} cannot be made: {error.strerror}") from error
            write_file(file, model, texts * length, length, batch_for(model, length, device), seed, device)
            gc.collect()
            if device.startswith("cuda"):
                torch.cuda.empty_cache()  # what is free is what the quantizer counts on
        count = len(read_tokens(model, file, "text")[0])
        if count >= samples * length:
            return file
        texts = texts * samples * length // count + 1  # words that were cut differently have fewer tokens now


def main(args: argparse.Namespace) -> int:
    """`wkvquant write-text`. Returns the exit status."""
    check(args)
    batch = args.batch or batch_for(args.model, args.length, args.device)
    texts = write_file(args.file, args.model, args.tokens, args.length, batch, args.seed, args.device)
    Notes().say(f"{args.file}: {texts} texts of {args.length} tokens")
    return 0
