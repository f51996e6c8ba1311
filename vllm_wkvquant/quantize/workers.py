"""The workers of a run: each takes its share of the windows through a block, and all know what comes of all windows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

Items = TypeVar("Items", torch.Tensor, range, list[int])


@dataclass(frozen=True)
class Workers:
    """One of `size` workers, which torch.distributed connects; alone, it says what it is given.

    Of any windows, worker r has r, r + size, r + 2 size, ... A sum over windows is each worker's sum, added up: it is
    that of one worker but for the order of additions, and the same number on every worker.
    """

    rank: int = 0
    size: int = 1

    def share(self, windows: Items) -> Items:
        """This worker's part of all windows."""
        return windows[self.rank :: self.size]

    def positions(self, windows: list[int]) -> list[int]:
        """Where this worker has those of these windows that it has."""
        return [i // self.size for i in windows if i % self.size == self.rank]

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Add up all workers' `x`, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def mean(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Mean of what windows came to, one part each, over all workers' windows."""
        return self.sum(torch.stack([*parts]).sum(0)) / self.total(len(parts))

    def amax(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Elementwise largest of what windows came to, over all workers' windows."""
        largest = torch.stack([*parts]).amax(0)
        if self.size > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest

    def total(self, count: int) -> int:
        """Sum of all workers' counts."""
        return int(self.sum(torch.tensor(count)))

    def agree(self, tensors: Sequence[torch.Tensor]) -> None:
        """Make these what they are on worker 0."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def gather(self, share: torch.Tensor) -> torch.Tensor:
        """All windows, on the CPU of worker 0; of no use on the others."""
        if self.size == 1:
            return share
        count, share = self.total(share.shape[0]), share.cpu().contiguous()
        if self.rank:
            dist.send(share, 0)
            return share
        whole = share.new_empty(count, *share.shape[1:])
        whole[:: self.size] = share
        for rank in range(1, self.size):
            part = torch.empty_like(whole[rank :: self.size])
            dist.recv(part, rank)
            whole[rank :: self.size] = part
        return whole

    def spread(self, whole: torch.Tensor | None) -> torch.Tensor:
        """What worker 0 has on its CPU, on every worker's."""
        if self.size > 1:
            described = [None if whole is None else (whole.shape, whole.dtype)]
            dist.broadcast_object_list(described)
            if whole is None and described[0]:
                shape, dtype = described[0]
                whole = torch.empty(shape, dtype=dtype)
        assert whole is not None
        self.agree([whole])
        return whole

    def spread_all(self, whole: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
        """What worker 0 has by name on its CPU, on every worker's."""
        names: list[list[str] | None] = [None if whole is None else [*whole]]
        if self.size > 1:
            dist.broadcast_object_list(names)
        return {name: self.spread(None if whole is None else whole[name]) for name in names[0] or []}


ALONE = Workers()
