"""Running decoder blocks over windows: the one that is quantized, and the 16-bit ones that follow it."""

import time
from collections import deque
from functools import partial
from itertools import islice

import torch
from torch.func import functional_call

from vllm_wkvquant.quantize.attention import QKV
from vllm_wkvquant.quantize.plan import Plan
from vllm_wkvquant.quantize.storage import keep
from vllm_wkvquant.reference import KVParams, fake_quantize


class Clock:
    """Seconds of one block by what they went into: `lap` names what was done since the last one."""

    def __init__(self, device: str) -> None:
        self.device, self.seconds = device, dict[str, float]()
        self._last = time.perf_counter()

    def lap(self, what: str) -> None:
        """The device is waited for."""
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[what] = self.seconds.get(what, 0.0) + now - self._last
        self._last = now


class BlockRunner:
    """Runs one decoder block over windows that are kept on the CPU or on the device."""

    def __init__(self, plan: Plan, block: torch.nn.Module, seq_len: int) -> None:
        self.attention, self.block = plan.attention, block
        self.device, self.storage = plan.settings.device, plan.storage
        position = torch.arange(seq_len, device=self.device)[None]
        dtype = getattr(torch, plan.settings.dtype)
        rotary = plan.adapter.rotary.to(self.device)
        self.rope = rotary(torch.empty(0, dtype=dtype, device=self.device), position)

    def __call__(
        self, window: torch.Tensor, params: KVParams | None = None, captured: list[QKV] | None = None
    ) -> torch.Tensor:
        """[T, hidden] in storage -> [T, hidden] on the device. params: simulate the cache; captured: add q, k, v to
        it, in storage."""
        self.attention.cache = None if params is None else partial(fake_quantize, params=params)
        self.attention.captured = None if captured is None else []
        after = self.run(self.block, {}, window)
        if captured is not None:
            where = self.storage.captured
            captured += [(q.to(where), k.to(where), v.to(where)) for q, k, v in self.seen()]
        return after

    def seen(self) -> list[QKV]:
        """What attention has captured, which it captures no longer."""
        captured, self.attention.captured = self.attention.captured or [], None
        return captured

    def advance(self, run: torch.Tensor, params: KVParams | None = None) -> None:
        """Take windows [N, T, hidden] past the block, in place."""
        for i, window in enumerate(run):
            run[i].copy_(self(window, params))

    def run(self, block: torch.nn.Module, weights: dict[str, torch.Tensor], window: torch.Tensor) -> torch.Tensor:
        """A block with some of its parameters replaced, by name: [T, hidden] or [B, T, hidden] -> the same on the
        device."""
        x = window.to(self.device, non_blocking=True).view(-1, *window.shape[-2:])
        after = functional_call(block, weights, (x,), {"attention_mask": None, "position_embeddings": self.rope})
        return after.view(window.shape)

    def first(self, tokens: torch.Tensor) -> tuple[torch.Tensor, QKV]:
        """Tokens that are sequences of their own: [B, 1, hidden] -> [B, 1, hidden] in storage; their q, k, v."""
        self.attention.cache, self.attention.captured = None, []
        cosine, sine = self.rope
        rope = cosine[:, :1], sine[:, :1]
        after = self.block(tokens.to(self.device), attention_mask=None, position_embeddings=rope)
        return after.to(self.storage.hidden), self.seen()[0]


class Ahead:
    """The 16-bit model on the windows to learn from, as far ahead of the block as the recipe compares its output.

    blocks: those that follow the block, on the device; runs: hidden states after each of them, [N, T, hidden] where
    `Storage.targets` says. Both roll on with the block, so that each is loaded and computed once.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.blocks: deque[torch.nn.Module] = deque()
        self.runs: deque[torch.Tensor] = deque()
        self._spare: list[torch.Tensor] = []  # of a run that the block has reached: to pin anew takes long

    def _read(self, layer: int) -> torch.nn.Module:
        settings = self.plan.settings
        return self.plan.adapter.load_block(layer, getattr(torch, settings.dtype), settings.device)

    def _room(self, exact: torch.Tensor) -> torch.Tensor:
        where = self.plan.storage.targets
        return keep(self.plan, torch.empty(exact.shape, dtype=exact.dtype, device=where), where)

    def take_block(self, layer: int) -> torch.nn.Module:
        """The block itself, the caller's from here on."""
        return self.blocks.popleft() if self.blocks else self._read(layer)

    def advance(self, runner: BlockRunner, exact: torch.Tensor) -> None:
        """Take the exact run of all windows [N, T, hidden] past the block, in place."""
        done = 0
        if self.runs:
            run = self.runs.popleft()
            done = run.shape[0]
            exact[:done].copy_(run)
            self._spare.append(run)
        runner.advance(exact[done:])

    def load(self, layer: int) -> None:
        """Have the blocks that follow this one."""
        learning, layers = self.plan.recipe.learning, self.plan.adapter.num_layers
        last = min(layer + (learning.followers if learning else 0), layers - 1)
        self.blocks.extend(self._read(i) for i in range(layer + 1 + len(self.blocks), last + 1))

    def targets(self, runner: BlockRunner, exact: torch.Tensor) -> list[torch.Tensor]:
        """The exact run's windows [N, T, hidden], and what they are after each of the blocks that follow."""
        for follower in islice(self.blocks, len(self.runs), None):
            before = self.runs[-1] if self.runs else exact
            run = self._spare.pop() if self._spare else self._room(exact)
            for after, window in zip(run, before, strict=True):
                after.copy_(runner.run(follower, {}, window))
            self.runs.append(run)
        return [exact, *self.runs]
