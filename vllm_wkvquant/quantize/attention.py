"""Attention of the calibration runs: a transformers attention function that captures q, k, v or simulates the cache."""

import math
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from vllm_wkvquant.reference import Simulation

ATTENTION = "wkvquant_calibration"
QUERY_ROWS = 512  # rows of scores held at once: keeps them in cache and lets causality halve the work

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # roped query [T, Hq, D], roped key [T, H, D], value [T, H, D]


def past_only_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    scale: float,
    sliding_window: int = 0,
) -> torch.Tensor:
    """`reference.past_only_attention` for chunk 1, in half the work: one set of scores, their diagonal replaced.

    query [T, Hq, D]; key, value raw and past_key, past_value from the cache, all [T, H, D] fp32. Returns [T, Hq, D].
    """
    length, heads, size = key.shape
    group = query.shape[1] // heads
    q = query.float().view(length, heads, group, size).permute(1, 2, 0, 3)  # [H, g, T, D]
    k, v = past_key.permute(1, 2, 0)[:, None], past_value.transpose(0, 1)[:, None]  # [H, 1, D, T], [H, 1, T, D]
    own = (q * key.float().transpose(0, 1)[:, None]).sum(-1)  # [H, g, T]
    correction = (value.float() - past_value).transpose(0, 1)[:, None]
    position = torch.arange(length, device=query.device)
    out = []
    for first in range(0, length, QUERY_ROWS):
        rows = position[first : first + QUERY_ROWS]
        start, stop = max(0, first - sliding_window + 1) if sliding_window else 0, first + rows.numel()
        cols = position[start:stop]
        scores = q[:, :, first:stop] @ k[..., start:stop]
        index = torch.arange(rows.numel(), device=query.device)
        scores[:, :, index, rows - start] = own[:, :, first:stop]
        hidden = cols[None] > rows[:, None]
        if sliding_window:
            hidden |= cols[None] <= rows[:, None] - sliding_window
        p = scores.mul_(scale).masked_fill_(hidden, -math.inf).softmax(-1)
        own_p = p[:, :, index, rows - start, None]
        out.append(p @ v[..., start:stop, :] + own_p * correction[..., first:stop, :])
    return torch.cat(out, 2).permute(2, 0, 1, 3).reshape(length, heads * group, size)


def raw_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, sliding_window: int = 0
) -> torch.Tensor:
    """Causal attention over a 16-bit cache; shapes as in `past_only_attention`."""
    if sliding_window and sliding_window < query.shape[0]:
        return past_only_attention(query, key, value, key.float(), value.float(), scale, sliding_window)
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)[0].transpose(0, 1)


class CalibrationAttention:
    """The attention of the block under calibration, registered with transformers under `ATTENTION`.

    cache: the simulated cache, or None for a 16-bit one. past_only: a token's own key and value do not pass through
    it. captured: receives (query, key, value) of each window where it is a list.
    """

    def __init__(self) -> None:
        self.cache: Simulation | None = None
        self.past_only = True
        self.captured: list[QKV] | None = None
        self.scale = 1.0
        self.sliding_window = 0
        AttentionInterface.register(ATTENTION, self)

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """transformers' attention interface: query [B, Hq, T, D], key and value [B, H, T, D] -> [B, T, Hq, D].

        A batch of sequences of one token, [B, Hq, 1, D], is captured as B tokens; each attends itself alone.
        """
        if query.shape[2] == 1:
            if self.captured is not None:
                self.captured.append((query[:, :, 0], key[:, :, 0], value[:, :, 0]))
            return value.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(1, 2), None
        self.scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        self.sliding_window = sliding_window or 0
        plain = self.cache is None and not 0 < self.sliding_window < query.shape[2]
        if query.shape[0] > 1 and self.captured is None and plain:
            out = scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=self.scale, enable_gqa=True
            ).transpose(1, 2)
        elif self.captured is None and self.cache is not None:
            out = self._simulated(query, key, value)
        else:
            windows = zip(*(x.transpose(1, 2) for x in (query, key, value)), strict=True)
            out = torch.stack([self._window(q, k, v) for q, k, v in windows])
        return out.to(query.dtype), None

    def _simulated(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Windows under the cache, the heads of all together: shapes as of `__call__`."""
        assert self.cache is not None
        positions = torch.arange(query.shape[2], device=query.device)
        past = self.cache(key.transpose(1, 2), value.transpose(1, 2), positions)  # [B, T, H, D] each
        past_k, past_v = (x.transpose(0, 1).flatten(1, 2) for x in past)  # [T, B * H, D]
        q, k, v = (x.permute(2, 0, 1, 3).flatten(1, 2) for x in (query, key, value))
        own = (k, v) if self.past_only else (past_k, past_v)
        out = past_only_attention(q, *own, past_k, past_v, self.scale, self.sliding_window)
        return out.unflatten(1, (query.shape[0], -1)).transpose(0, 1)

    def _window(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """One sequence: query [T, Hq, D], key and value [T, H, D] -> [T, Hq, D]."""
        if self.captured is not None:
            self.captured.append((q, k, v))
        if self.cache is None:
            return raw_attention(q, k, v, self.scale, self.sliding_window)
        positions = torch.arange(q.shape[0], device=q.device)
        past = self.cache(k, v, positions)
        own = (k, v) if self.past_only else past
        return past_only_attention(q, *own, *past, self.scale, self.sliding_window)
