# mypy: disallow-untyped-defs=False
"""`weights.FakeQuantize` on a GPU, each pass in one kernel: it is bound by memory, and torch makes 20 passes of it."""

import torch
import triton
import triton.language as tl

TILE = 2048  # weights of a program


@triton.jit
def _round(x):
    """To the nearest, ties to the even one, of -2^22 .. 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _load(weight, step, zero_point, offset, groups, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """A tile of groups: its rows, where its weights are, which rows there are, weights, step and zero point [ROWS, 1],
    codes before they are clamped to 0 .. 15; all fp32, as `weights._codes`."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    there = row < groups
    at = row.to(tl.int64) * GROUP + tl.arange(0, GROUP)[None, :]
    w = tl.load(weight + at, mask=there, other=0.0)
    s = tl.load(step + row, mask=there, other=1.0)
    z = tl.load(zero_point + row, mask=there, other=0.0)
    codes = tl.div_rn(w, tl.broadcast_to(s, (ROWS, GROUP))) + z
    if offset is not None:
        codes += tl.load(offset + at, mask=there, other=0.0)
    return row, at, there, w, s, z, _round(tl.minimum(tl.maximum(codes, -1.0), 16.0))


@triton.jit
def _forward(weight, step, zero_point, offset, out, groups, GROUP: tl.constexpr, ROWS: tl.constexpr):
    _, at, there, _, s, z, codes = _load(weight, step, zero_point, offset, groups, GROUP, ROWS)
    tl.store(out + at, (tl.minimum(tl.maximum(codes, 0.0), 15.0) - z) * s, mask=there)


@triton.jit
def _backward(
    grad,
    weight,
    low,
    step,
    zero_point,
    offset,
    of_weight,
    of_low,
    of_high,
    of_offset,
    groups,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    row, at, there, w, s, z, codes = _load(weight, step, zero_point, offset, groups, GROUP, ROWS)
    clamped = (codes > 15.0) | (codes < 0.0)
    out = (tl.minimum(tl.maximum(codes, 0.0), 15.0) - z) * s
    by_step = (out - tl.where(clamped, tl.load(low + row, mask=there, other=0.0), w)) / s
    g = tl.load(grad + at, mask=there, other=0.0)
    inside = tl.where(clamped, 0.0, g)
    high = tl.sum(g * by_step, 1, keep_dims=True) / 15.0
    tl.store(of_high + row, high, mask=there)
    tl.store(of_low + row, tl.sum(g - inside, 1, keep_dims=True) - high, mask=there)
    if of_weight is not None:
        tl.store(of_weight + at, inside, mask=there)
    if of_offset is not None:
        tl.store(of_offset + at, inside * s, mask=there)


def _launch(kernel, weight: torch.Tensor, step: torch.Tensor, *arguments) -> None:
    groups = step.numel()
    size = weight.numel() // groups
    rows = max(1, TILE // size)
    kernel[(triton.cdiv(groups, rows),)](*arguments, groups, GROUP=size, ROWS=rows)


def forward(
    weight: torch.Tensor, step: torch.Tensor, zero_point: torch.Tensor, offset: torch.Tensor | None
) -> torch.Tensor:
    """weight fp32 [out, in] as its codes give it. step, zero_point: fp32 [out, in / group]; offset: fp32 [out, in /
    group, group] or None. All contiguous, a group a power of two."""
    out = torch.empty_like(weight)
    _launch(_forward, weight, step, weight, step, zero_point, offset, out)
    return out


def backward(
    grad: torch.Tensor,
    weight: torch.Tensor,
    low: torch.Tensor,
    step: torch.Tensor,
    zero_point: torch.Tensor,
    offset: torch.Tensor | None,
    of_weight: bool,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`FakeQuantize.backward`: gradients to weight, where of_weight, to low, high and offset. grad: as weight; low:
    fp32 [out, in / group], a range's end."""
    to_weight = torch.empty_like(weight) if of_weight else None
    to_low, to_high = torch.empty_like(low), torch.empty_like(low)
    to_offset = None if offset is None else torch.empty_like(offset)
    found = to_weight, to_low, to_high, to_offset
    _launch(_backward, weight, step, grad, weight, low, step, zero_point, offset, *found)
    return found
