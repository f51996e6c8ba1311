"""`reference.past_only_attention` by torch's fused kernels, with gradients, for steps of one token.

Calibration runs it, and so does the comparison of models; nothing in it grows with the square of the sequence but
where a sliding window is shorter.
"""

from functools import partial
from typing import Any

import torch
from transformers.integrations.sdpa_attention import repeat_kv

from vllm_wkvquant import reference

ROW_MULTIPLE = 32  # torch's memory-efficient kernel pads the rows of its log-sum-exps to it

aten = torch.ops.aten


def causal_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, tuple[Any, ...]]:
    """Causal attention of [B, H, T, D] by torch's fused kernels: its output, its log-sum-exps fp32 [B, H, T], and what
    `causal_backward` needs besides."""
    if not q.is_cuda:
        return *aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale), ()
    if q.dtype == torch.float32:
        out, lse, *rest = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, True, scale=scale)
        return out, lse[..., : q.shape[2]], tuple(rest)
    out, lse, *rest = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scale)
    return out, lse, tuple(rest)


def causal_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    saved: tuple[Any, ...],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients to q, k and v of a softmax over these scores and possibly others: out is what came of all of them, and
    lse their log-sum-exps. saved: of `causal_forward`."""
    if not q.is_cuda:
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, True, scale=scale
        )
    if q.dtype == torch.float32:
        lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % ROW_MULTIPLE))
        *grads, _ = aten._scaled_dot_product_efficient_attention_backward(
            grad, q, k, v, None, out, lse, *saved, 0.0, [True, True, True, False], True, scale=scale
        )
        return tuple(grads)
    starts_q, starts_k, longest_q, longest_k, seed, offset, _ = saved
    return aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse, starts_q, starts_k, longest_q, longest_k, 0.0, True, seed, offset, scale=scale
    )


class PastOnlyAttention(torch.autograd.Function):
    """Causal attention over keys and values from the cache, but a token's own as they came: [B, H, T, D] each.

    Without the first query and the last key, causal attention over the cache is attention over what is strictly past,
    to which a token's own score and value are added by log-sum-exp. Its gradients are those of one softmax over both
    sets of keys, so the kernel's backward pass gives them where it is told the output and log-sum-exp over both.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        past_k: torch.Tensor,
        past_v: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Output [B, H, T, D] in q's type; T > 1."""
        past, past_lse, saved = causal_forward(q[:, :, 1:], past_k[:, :, :-1], past_v[:, :, :-1], scale)
        own = (q.float() * k.float()).sum(-1) * scale
        lse = torch.cat([own[..., :1], torch.logaddexp(own[..., 1:], past_lse)], -1)
        p = (own - lse).exp_()
        out = p[..., None] * v.float()
        out[:, :, 1:].addcmul_((past_lse - lse[..., 1:]).exp_()[..., None], past.float())
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, past_k, past_v, out, lse, p)
        ctx.saved, ctx.scale = saved, scale  # seeds of a dropout that there is not, and lengths
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Gradients [B, H, T, D] to q, k, v, past_k and past_v, of one to the output; None to scale."""
        q, k, v, past_k, past_v, out, lse, p = ctx.saved_tensors
        grad = grads[0].contiguous()
        of_past = causal_backward(
            grad[:, :, 1:],
            q[:, :, 1:],
            past_k[:, :, :-1],
            past_v[:, :, :-1],
            out[:, :, 1:],
            lse[..., 1:].contiguous(),
            ctx.saved,
            ctx.scale,
        )
        grad = grad.float()
        own = p * (grad * (v.float() - out.float())).sum(-1) * ctx.scale
        of_q, of_k, of_v = own[..., None] * k, own[..., None] * q, p[..., None] * grad
        of_q[:, :, 1:] += of_past[0]
        of_past_k, of_past_v = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in of_past[1:])
        return of_q.to(q.dtype), of_k.to(k.dtype), of_v.to(v.dtype), of_past_k, of_past_v, None


def past_only_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    scale: float,
    sliding_window: int = 0,
) -> torch.Tensor:
    """`reference.past_only_attention` for chunk 1 of a batch of windows, in the query's type: no scores are kept.

    query [B, Hq, T, D]; key, value raw and past_key, past_value from the cache, all [B, H, T, D] -> [B, Hq, T, D].
    """
    kv = key, value, past_key, past_value
    group = query.shape[1] // key.shape[1]
    if query.shape[2] == 1:  # nothing is past
        return repeat_kv(value.to(query.dtype), group)
    if 0 < sliding_window < query.shape[2]:
        attend = partial(reference.past_only_attention, scale=scale, sliding_window=sliding_window)
        windows = zip(*(x.transpose(1, 2) for x in (query, *kv)), strict=True)
        return torch.stack([attend(*window) for window in windows]).transpose(1, 2).to(query.dtype)
    return PastOnlyAttention.apply(query, *(repeat_kv(x.to(query.dtype), group) for x in kv), scale)
