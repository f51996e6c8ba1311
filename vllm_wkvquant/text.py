"""Text of a local file as tokens of a model."""

import re
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from vllm_wkvquant.checkpoint import read_config
from vllm_wkvquant.config import ConfigError, reason_of

PIECE = 1 << 22  # characters tokenized at once, for which a tokenizer takes more than 100 bytes each
SLACK = PIECE // 16  # characters more in which a good place to cut is looked for
# before a line that is not blank or indented, where a tokenizer begins afresh, or nearly; any line; a space
CUTS = tuple(re.compile(pattern) for pattern in (r"\n(?=\S)", r"\n", r"(?=\s)"))


def load_tokenizer(model: Path) -> Any:
    """The model's tokenizer. Raises ConfigError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except Exception as error:  # transformers raises anything here: OSError, ValueError, KeyError, the Rust side's own
        raise ConfigError(f"the tokenizer of {model} cannot be loaded: {reason_of(error)}") from error
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:  # transformers makes up an empty one for Qwen
        raise ConfigError(f"{model} has no tokenizer: 'a' has no tokens; add the tokenizer's files")
    return tokenizer


def prefix_of(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text, as it does with a served prompt: Llama's BOS, often nothing."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    special = tokenizer("a")["input_ids"]
    return special[: special.index(plain[0])] if plain and plain[0] in special else []


def check_known(ids: Iterable[int], model: Path, tokenizer: Any, where: str) -> None:
    """Raise ConfigError for a token that the model has no embedding for: a tokenizer may have been given more."""
    if not (model / "config.json").is_file():  # of a tokenizer alone
        return
    size, last = read_config(model).get("vocab_size"), max(ids, default=0)
    if isinstance(size, int) and last >= size:
        raise ConfigError(
            f"{where} has the token {tokenizer.decode([last])!r}, number {last}, and {model} embeddings of {size}; "
            f"enlarge its embedding (resize_token_embeddings), or use the tokenizer that it was trained with"
        )


def pieces_of(content: str) -> Iterator[str]:
    """`content` in pieces of PIECE characters and at most SLACK more, which end where the first of CUTS that is there
    says, or after all of these characters."""
    begin = 0
    while begin < len(content):
        least, most = begin + PIECE, begin + PIECE + SLACK
        cuts = (cut.search(content, least, most) for cut in (CUTS if most < len(content) else CUTS[:1]))
        end = next((cut.end() for cut in cuts if cut), most)
        yield content[begin:end]
        begin = end


def read_tokens(model: Path, file: Path, what: str) -> tuple[array, list[int]]:
    """Tokens of a UTF-8 file, of which special ones are those that it spells out, and `prefix_of` the tokenizer.

    what: name of the file in errors. Raises ConfigError.
    """
    try:
        if not file.is_file():
            fault = "is not a regular file" if file.exists() else "does not exist"
            raise ConfigError(f"{what} {file} {fault}; give a UTF-8 text file")
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} {file} is not UTF-8: {error}") from error
    except OSError as error:
        raise ConfigError(f"{what} {file} cannot be read: {error.strerror}") from error
    tokenizer = load_tokenizer(model)
    ids, prefix = array("i"), prefix_of(tokenizer)
    for piece in pieces_of(content):
        ids.extend(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"])
    check_known(ids, model, tokenizer, f"{what} {file}")
    check_known(prefix, model, tokenizer, "what the tokenizer puts before a text")
    return ids, prefix
