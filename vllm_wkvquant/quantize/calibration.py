"""Calibration windows: tokens of a local text, a part of them held out for the choice between candidates."""

from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_wkvquant.config import ConfigError
from vllm_wkvquant.text import read_tokens

FIRST_TOKENS = 256  # of these the mean key and value at position 0 is taken
SKIPPED = 4  # first positions, left out of every statistic: they carry massive activations that no other token has


@dataclass(frozen=True)
class Windows:
    """tokens: int64 [samples, seq_len], each window after `prefix`; the last `held_out` are in no statistic.

    prefix: what the tokenizer puts before every text, as it does when the model is served (Llama's BOS; often nothing).
    """

    tokens: torch.Tensor
    held_out: int
    prefix: list[int]

    @property
    def statistics(self) -> int:
        """Windows from which statistics are taken."""
        return self.tokens.shape[0] - self.held_out

    def first_tokens(self) -> torch.Tensor:
        """int64 [<= FIRST_TOKENS] tokens that may begin a sequence: the one that always does, or any of the text."""
        if self.prefix:
            return torch.tensor(self.prefix[:1])
        tokens = self.tokens[: self.statistics].flatten()
        return tokens[:: max(1, tokens.numel() // FIRST_TOKENS)][:FIRST_TOKENS]


def read_windows(model: Path, text: Path, samples: int, seq_len: int, seed: int) -> Windows:
    """`samples` distinct windows of `seq_len` tokens, drawn with `seed` from the text, each after the prefix."""
    ids, prefix = read_tokens(model, text, "calibration text")
    own = seq_len - len(prefix)
    available = len(ids) // own
    if available < samples:
        raise ConfigError(
            f"calibration text {text} has {len(ids)} tokens, {samples} samples of {seq_len} need {samples * seq_len}; "
            f"give a longer text, or lower --samples or --seq-len"
        )
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:samples].tolist()
    tokens = torch.tensor([prefix + ids[i * own : (i + 1) * own] for i in order])
    return Windows(tokens, max(2, samples // 4), prefix)
