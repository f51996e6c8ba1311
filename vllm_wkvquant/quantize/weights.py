"""4-bit weights, asymmetric, in groups along the input."""

from dataclasses import dataclass

import torch

from vllm_wkvquant.checkpoint import pack_weight

WEIGHT_QMAX = 15


@dataclass(frozen=True)
class QuantizedWeight:
    """codes uint8 [out, in] and zero_point uint8 [out, in / group], both 0..15; scale 16-bit [out, in / group]."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """scale * (code - zero_point), fp32 [out, in]."""
        groups = self.codes.float().view(*self.scale.shape, -1)
        return ((groups - self.zero_point.float()[..., None]) * self.scale.float()[..., None]).flatten(1)

    def pack(self) -> dict[str, torch.Tensor]:
        """compressed-tensors' tensors by suffix, on the CPU."""
        return pack_weight(self.codes.cpu(), self.scale.cpu(), self.zero_point.cpu())


def round_to_nearest(weight: torch.Tensor, group_size: int, scale_dtype: torch.dtype) -> QuantizedWeight:
    """Quantize weight [out, in] with each group's own range, which always holds 0 (so that 0 stays 0)."""
    groups = weight.float().view(weight.shape[0], -1, group_size)
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    scale = ((high - low) / WEIGHT_QMAX).to(scale_dtype)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # a group of zeros, or too small for the type
    step = scale.float()
    zero_point = (-low / step).round().clamp(0, WEIGHT_QMAX)
    codes = (groups / step[..., None] + zero_point[..., None]).round().clamp(0, WEIGHT_QMAX)
    return QuantizedWeight(codes.to(torch.uint8).flatten(1), scale, zero_point.to(torch.uint8))
