"""Text of a local file as tokens of a model."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from vllm_wkvquant.config import ConfigError, reason_of


def load_tokenizer(model: Path) -> Any:
    """The model's tokenizer. Raises ConfigError."""
    try:
        return AutoTokenizer.from_pretrained(model)
    except Exception as error:  # transformers raises anything here: OSError, ValueError, KeyError, the Rust side's own
        raise ConfigError(f"the tokenizer of {model} cannot be loaded: {reason_of(error)}") from error


def prefix_of(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text, as it does with a served prompt: Llama's BOS, often nothing."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    special = tokenizer("a")["input_ids"]
    return special[: special.index(plain[0])] if plain and plain[0] in special else []


def read_tokens(model: Path, file: Path, what: str) -> tuple[list[int], list[int]]:
    """Tokens of a UTF-8 file without special ones, and `prefix_of` the tokenizer.

    what: name of the file in errors. Raises ConfigError.
    """
    if not file.is_file():
        fault = "is not a regular file" if file.exists() else "does not exist"
        raise ConfigError(f"{what} {file} {fault}; give a UTF-8 text file")
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} {file} is not UTF-8: {error}") from error
    tokenizer = load_tokenizer(model)
    return tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"], prefix_of(tokenizer)
