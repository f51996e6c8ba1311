"""Where work runs: what `--device` may say, and what results call it."""

import re

import torch

from vllm_wkvquant.config import ConfigError


def default_device() -> str:
    """Where work runs if nothing is said: on the GPU that torch sees, if it sees one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str) -> None:
    """Raise ConfigError unless there is such a device here."""
    found = re.fullmatch(r"cpu|cuda(?::(\d+))?", device)
    if found is None:
        raise ConfigError(f"--device {device} is neither cpu nor cuda nor a GPU by its number, as cuda:1")
    if device == "cpu":
        return
    if not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here; use --device cpu")
    if int(found[1] or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {device}: torch sees {torch.cuda.device_count()} GPUs here, the first is cuda:0")


def device_name(device: str) -> str:
    """What results name as the machine: "cpu", or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
