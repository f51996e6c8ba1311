"""Calibration windows: tokens of a local text, a part of them held out for the choice between candidates."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from vllm_wkvquant.config import ConfigError
from vllm_wkvquant.quantize.workers import Workers
from vllm_wkvquant.text import read_tokens

FIRST_TOKENS = 256  # of these the mean key and value at position 0 is taken
HELD_OUT = 8  # windows that are enough to hold out of less than 16 times as many
SKIPPED = 4  # first positions, left out of every statistic: they carry massive activations that no other token has


@dataclass(frozen=True)
class Windows:
    """tokens: int64 [samples, seq_len], each window after `prefix`; the last `held_out` are in no statistic.

    prefix: what the tokenizer puts before every text, as it does when the model is served (Llama's BOS; often nothing).
    first_tokens: int64 [<= FIRST_TOKENS], may begin a sequence: the one that always does, or any of the text.
    """

    tokens: torch.Tensor
    held_out: int
    prefix: list[int]
    first_tokens: torch.Tensor

    @property
    def statistics(self) -> int:
        """Windows from which statistics are taken."""
        return self.tokens.shape[0] - self.held_out

    def share(self, workers: Workers) -> "Windows":
        """A worker's share of both kinds of windows; of the first tokens each has all."""
        train, held_out = (workers.share(part) for part in self.tokens.split([self.statistics, self.held_out]))
        return replace(self, tokens=torch.cat([train, held_out]), held_out=held_out.shape[0])


def held_out_of(samples: int) -> int:
    """How many of so many windows are held out: a quarter of few, a sixteenth of many."""
    return max(2, min(samples // 4, max(HELD_OUT, samples // 16)))


def samples_for(workers: int) -> int:
    """Of how many windows each of so many workers has one that is held out."""
    return (4 if workers <= HELD_OUT else 16) * workers


def draw(model: Path, text: Path, samples: int, seq_len: int, seed: int) -> tuple[torch.Tensor, list[int]]:
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
    return torch.tensor([[*prefix, *ids[i * own : (i + 1) * own]] for i in order]), prefix


def read_windows(
    model: Path, text: Path, samples: int, seq_len: int, seed: int, own_text: Path | None = None, own_samples: int = 0
) -> Windows:
    """Windows of the text, and as many as there shall be of another, which are held out alike."""
    tokens, prefix = draw(model, text, samples, seq_len, seed)
    if own_text and own_samples:
        tokens = torch.cat([tokens, draw(model, own_text, own_samples, seq_len, seed)[0]])
        tokens = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))]
    held_out = held_out_of(len(tokens))
    text_tokens = tokens[: len(tokens) - held_out].flatten()
    first = text_tokens[:: max(1, text_tokens.numel() // FIRST_TOKENS)][:FIRST_TOKENS]
    return Windows(tokens, held_out, prefix, torch.tensor(prefix[:1]) if prefix else first)
