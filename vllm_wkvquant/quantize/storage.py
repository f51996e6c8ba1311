"""Hidden states between their uses: on the device, or on the host, from where windows are moved to it one at a time.

On a GPU's host they are in pinned memory, which the GPU reads by itself: a copy to it is queued before the work that
needs it and not waited for. Copies back are, so that what is read on the host is whole.
"""

import functools
import logging
from collections.abc import Iterator
from pathlib import Path

import torch

from vllm_wkvquant.quantize.plan import Plan
from vllm_wkvquant.quantize.state import Stage

PINNED_SHARE = 0.5  # of what is free on the host, at most: what is pinned cannot be given to anyone else

OWN_GROUP, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")

logger = logging.getLogger("vllm.wkvquant")


def keep(plan: Plan, run: torch.Tensor, where: str) -> torch.Tensor:
    """A run [N, T, hidden] on `where`, of `plan.storage`: pinned where that is a GPU's host and can pin as much."""
    run = run.to(where)
    if where != "cpu" or plan.settings.device == "cpu":
        return run
    if pinned_bytes(run.nbytes) > PINNED_SHARE * free_bytes("cpu") / plan.workers.size:
        warn_pageable("too little is free")
        return run
    try:
        return run.pin_memory()
    except RuntimeError as error:
        warn_pageable(str(error))
        return run


def stage(plan: Plan) -> Stage | None:
    """For `RunState`: hidden states are copied to memory of the host of their own, where a GPU computes meanwhile."""
    if plan.settings.device == "cpu":
        return None
    copies: dict[str, torch.Tensor] = {}

    def copy(hidden: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for name, run in hidden.items():
            if name not in copies:
                copies[name] = keep(plan, torch.empty(run.shape, dtype=run.dtype), "cpu")
            copies[name].copy_(run)
        return copies

    return copy


def take(run: torch.Tensor, windows: list[int], device: torch.device) -> torch.Tensor:
    """These windows of a run [N, T, hidden] on the device, [len(windows), T, hidden]."""
    if run.device == device:
        return run[torch.tensor(windows)]
    return torch.stack([run[i].to(device, non_blocking=True) for i in windows])


def pinned_bytes(size: int) -> int:
    """Bytes that PyTorch pins for so many: a power of two."""
    return 1 << (size - 1).bit_length()


@functools.cache
def warn_pageable(reason: str) -> None:
    """Say so once."""
    logger.warning("hidden states are not all in pinned memory of the host, and slower to move: %s", reason)


def free_bytes(device: str) -> int:
    """Memory that is free on the device."""
    if device != "cpu":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo") as f:
        fields = dict(line.split(":") for line in f)
    return min([1024 * int(fields["MemAvailable"].split()[0]), *left_by_groups()])


def left_by_groups() -> Iterator[int]:
    """Memory that each of this process's control groups (version 2) with a limit leaves it, which a container's is one
    of. What the kernel keeps there of files it gives up for others."""
    own = [line.removeprefix("0::/") for line in OWN_GROUP.read_text().splitlines() if line.startswith("0::/")]
    folders = [folder for path in own for folder in (GROUPS / path, *(GROUPS / path).parents)]
    for folder in folders:
        if not folder.is_relative_to(GROUPS) or not (folder / "memory.max").is_file():
            continue
        limit = (folder / "memory.max").read_text().strip()
        if limit != "max":
            used = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            files = int(used["inactive_file"]) + int(used["active_file"])
            yield max(0, int(limit) - int((folder / "memory.current").read_text()) + files)
