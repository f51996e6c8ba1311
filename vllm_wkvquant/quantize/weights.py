"""4-bit weights, asymmetric, in groups along the input: the grid, rounding to it, and its straight-through gradient.

A group's range [low, high] fixes its grid: step = (high - low) / 15 in the checkpoint's 16-bit type, zero_point =
round(-low / step), code = round(w / step + zero_point + offset) in 0..15, and the weight becomes step * (code -
zero_point). Rounding to nearest has offset 0; a learned offset in -0.5..0.5 chooses between the two neighbours.
"""

from dataclasses import dataclass
from typing import Any

import torch

from vllm_wkvquant.checkpoint import pack_weight

WEIGHT_QMAX = 15
CLIPS = tuple(1 - 0.05 * i for i in range(9))  # shares of a group's range that `search_clip` tries


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


def group_range(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest weight of each group, [out, in / group]; a range always holds 0, so that 0 stays 0."""
    groups = weight.view(weight.shape[0], -1, group_size)
    return groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)


def _grid(
    low: torch.Tensor, high: torch.Tensor, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """scale, step, which is scale in fp32, and zero_point fp32, of ranges fp32 [out, in / group] each."""
    scale = ((high - low) / WEIGHT_QMAX).to(scale_dtype)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # a group of zeros, or too small for the type
    step = scale.float()
    return scale, step, (-low / step).round_().clamp_(0, WEIGHT_QMAX)


def _codes(
    groups: torch.Tensor, step: torch.Tensor, zero_point: torch.Tensor, offset: torch.Tensor | None
) -> torch.Tensor:
    """Codes before they are clamped, in fp32 [out, in / group, group]."""
    codes = (groups / step[..., None]).add_(zero_point[..., None])
    if offset is not None:
        codes += offset
    return codes.round_()


def quantize_weight(
    weight: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    scale_dtype: torch.dtype,
    offset: torch.Tensor | None = None,
) -> QuantizedWeight:
    """Quantize weight [out, in] on the grids of the ranges low, high fp32 [out, in / group].

    offset: fp32 [out, in / group, group], added to codes before they are rounded.
    """
    groups = weight.float().view(*low.shape, -1)
    scale, step, zero_point = _grid(low, high, scale_dtype)
    codes = _codes(groups, step, zero_point, offset).clamp_(0, WEIGHT_QMAX).to(torch.uint8).flatten(1)
    return QuantizedWeight(codes, scale, zero_point.to(torch.uint8))


def round_to_nearest(weight: torch.Tensor, group_size: int, scale_dtype: torch.dtype) -> QuantizedWeight:
    """Quantize weight [out, in] with each group's own range."""
    return quantize_weight(weight, *group_range(weight.float(), group_size), scale_dtype)


def search_clip(
    weight: torch.Tensor, importance: torch.Tensor, group_size: int, scale_dtype: torch.dtype
) -> torch.Tensor:
    """Share of its range, one of CLIPS, that each group should keep, fp32 [out, in / group].

    The one with the least sum of importance * (error of the weight)^2. importance: fp32 [in], mean square of the input
    channel, which makes the sum the expected square of the output's error where channels are uncorrelated.
    """
    low, high = group_range(weight, group_size)
    scores = []
    for clip in CLIPS:
        error = quantize_weight(weight, clip * low, clip * high, scale_dtype).dequantize() - weight
        scores.append((error.square_() * importance).view(*low.shape, -1).sum(-1))
    return torch.tensor(CLIPS, device=weight.device)[torch.stack(scores).argmin(0)]


class FakeQuantize(torch.autograd.Function):
    """weight -> what `quantize_weight` makes of it, dequantized, with straight-through gradients.

    Every rounding counts as adding a constant. Inside 0..15 the zero point cancels: weight' = weight + step * (offset +
    constant). A clamped one is weight' = low + step * constant, because zero_point = -low / step + constant.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: torch.Tensor,
        low: torch.Tensor,
        high: torch.Tensor,
        offset: torch.Tensor | None,
        scale_dtype: torch.dtype,
    ) -> torch.Tensor:
        """weight fp32 [out, in]; low, high fp32 [out, in / group]; offset fp32 [out, in / group, group] or None."""
        _, step, zero_point = _grid(low, high, scale_dtype)
        if weight.is_cuda:
            from vllm_wkvquant.quantize import fused  # triton, which a CPU need not have

            weight = weight.contiguous()
            ctx.save_for_backward(weight, low, step, zero_point, offset)
            return fused.forward(weight, step, zero_point, offset)
        groups = weight.view(*low.shape, -1)
        codes, step = _codes(groups, step, zero_point, offset), step[..., None]
        clamped = (codes > WEIGHT_QMAX) | (codes < 0)
        out = codes.clamp_(0, WEIGHT_QMAX).sub_(zero_point[..., None]).mul_(step)
        by_step = None  # of the range, where that is learned
        if ctx.needs_input_grad[1]:
            by_step = torch.where(clamped, out - low[..., None], out - groups).div_(step)
        ctx.save_for_backward(step, clamped, by_step)
        ctx.has_offset = offset is not None
        return out.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Gradients to weight, low, high and offset."""
        if grads[0].is_cuda:
            from vllm_wkvquant.quantize import fused

            weight, low, step, zero_point, offset = ctx.saved_tensors
            grad, of_weight = grads[0].contiguous(), ctx.needs_input_grad[0]
            return *fused.backward(grad, weight, low, step, zero_point, offset, of_weight), None
        step, clamped, by_step = ctx.saved_tensors
        grad = grads[0].view_as(clamped)
        inside = grad.masked_fill(clamped, 0)
        low = high = None
        if by_step is not None:
            high = (grad * by_step).sum(-1) / WEIGHT_QMAX
            low = (grad - inside).sum(-1) - high
        return inside.view_as(grads[0]), low, high, inside * step if ctx.has_offset else None, None
