"""Calibration windows: tokens of a local text, a part of them held out for the choice between candidates."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from vllm_wkvquant.config import ConfigError

SKIPPED = 4  # first positions, left out of every statistic: they carry massive activations that no other token has


@dataclass(frozen=True)
class Windows:
    """tokens: int64 [samples, seq_len]; the last `held_out` windows take no part in any statistic."""

    tokens: torch.Tensor
    held_out: int

    @property
    def statistics(self) -> int:
        """Windows from which statistics are taken."""
        return self.tokens.shape[0] - self.held_out


def load_tokenizer(model: Path) -> Any:
    """The model's tokenizer. Raises ConfigError."""
    try:
        return AutoTokenizer.from_pretrained(model)
    except Exception as error:  # transformers raises anything here: OSError, ValueError, KeyError, the Rust side's own
        reason = str(error).splitlines()[0]
        raise ConfigError(f"the tokenizer of {model} cannot be loaded: {reason}") from error


def read_windows(model: Path, text: Path, samples: int, seq_len: int, seed: int) -> Windows:
    """`samples` distinct windows of `seq_len` tokens, drawn with `seed` from the text, without special tokens."""
    if not text.is_file():
        raise ConfigError(f"calibration text {text} does not exist; give a UTF-8 text file")
    try:
        content = text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"calibration text {text} is not UTF-8: {error}") from error
    ids = load_tokenizer(model)(content, add_special_tokens=False, verbose=False)["input_ids"]
    available = len(ids) // seq_len
    if available < samples:
        raise ConfigError(
            f"calibration text {text} has {len(ids)} tokens, {samples} samples of {seq_len} need {samples * seq_len}; "
            f"give a longer text, or lower --samples or --seq-len"
        )
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:samples].tolist()
    tokens = torch.tensor([ids[i * seq_len : (i + 1) * seq_len] for i in order])
    return Windows(tokens, held_out=max(2, samples // 4))
