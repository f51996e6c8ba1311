"""Where work runs: what `--device` may say, and what results call it."""

import torch

from vllm_wkvquant.config import ConfigError


def check_device(device: str) -> None:
    """Raise ConfigError unless there is such a device here."""
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise ConfigError(f"--device {device} is neither cpu nor cuda")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here; use --device cpu")


def device_name(device: str) -> str:
    """What results name as the machine: "cpu", or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
