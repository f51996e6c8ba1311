"""Attention of the calibration runs: a transformers attention function that captures q, k, v or simulates the cache."""

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv

from vllm_wkvquant.past_only import past_only_attention
from vllm_wkvquant.reference import Simulation

ATTENTION = "wkvquant_calibration"

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # roped query [T, Hq, D], roped key [T, H, D], value [T, H, D]


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
        group = query.shape[1] // key.shape[1]
        if query.shape[2] == 1:
            if self.captured is not None:
                self.captured.append((query[:, :, 0], key[:, :, 0], value[:, :, 0]))
            return repeat_kv(value, group).transpose(1, 2), None
        self.scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        self.sliding_window = sliding_window or 0
        if self.captured is not None:
            self.captured += zip(*(x.transpose(1, 2) for x in (query, key, value)), strict=True)
        past = key, value
        if self.cache is not None:
            positions = torch.arange(query.shape[2], device=query.device)
            past_key, past_value = self.cache(key.transpose(1, 2), value.transpose(1, 2), positions)
            past = past_key.transpose(1, 2), past_value.transpose(1, 2)
        own = (key, value) if self.past_only else past
        if self.cache is None and not 0 < self.sliding_window < query.shape[2]:
            # torch's kernel for fp32 on a GPU wants a key for every query head
            keys, values = (repeat_kv(x, group) for x in (key, value))
            out = scaled_dot_product_attention(query, keys, values, is_causal=True, scale=self.scale)
        else:
            out = past_only_attention(query, *own, *past, self.scale, self.sliding_window)
        return out.to(query.dtype).transpose(1, 2), None
