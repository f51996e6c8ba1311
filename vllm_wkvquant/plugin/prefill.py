"""Long chunks of a prefill on a GPU: FlashAttention over the step's own tokens, our kernel over the past, merged.

The kernel of `ops.paged_attention` attends the step's own tokens one key at a time, which suits decodes and drafts.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

from vllm_wkvquant import ops
from vllm_wkvquant.reference import KVParams

SHORT = 16  # tokens of the longest query that is left to `ops.paged_attention`

# flash_attn_varlen_func of the version that vLLM picks
FlashAttention = Callable[..., Any]


def flash_attention(head_size: int, dtype: torch.dtype) -> FlashAttention | None:
    """vLLM's FlashAttention on this device; None where it has none for queries [T, heads, head_size] of `dtype`."""
    if not current_platform.is_cuda() or dtype not in (torch.float16, torch.bfloat16):
        return None
    version = get_flash_attn_version(head_size=head_size)
    if version is None:
        return None
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    return functools.partial(flash_attn_varlen_func, fa_version=version)


@dataclass
class Chunks:
    """The sequences of a step from the first long query on, which come last. Tensors are on the device.

    first, num_tokens: their tokens in the step. num_seqs: sequences before them. has_past: False where none of them
    has any. query_start_loc, seq_lens, block_table: as in `ops.paged_attention`, counted from `first`.
    """

    flash: FlashAttention
    first: int
    num_tokens: int
    num_seqs: int
    max_query_len: int
    has_past: bool
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor


def split_chunks(common: CommonAttentionMetadata, threshold: int, flash: FlashAttention) -> Chunks | None:
    """The step's chunks, or None where every query has at most `threshold` tokens. Waits for nothing on the device."""
    short, long, first, _ = split_decodes_and_prefills(common, decode_threshold=threshold)
    if long == 0:
        return None
    starts, lens = common.query_start_loc_cpu[short:], common.seq_lens_cpu_upper_bound
    return Chunks(
        flash=flash,
        first=first,
        num_tokens=int(starts[-1]) - first,
        num_seqs=short,
        max_query_len=common.max_query_len,
        has_past=lens is None or bool((lens[short:] > starts.diff()).any()),
        query_start_loc=common.query_start_loc[short:] - first,
        seq_lens=common.seq_lens[short:],
        block_table=common.block_table_tensor[short:],
    )


def attend(
    chunks: Chunks,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    params: KVParams,
    scale: float,
    out: torch.Tensor,
    sliding_window: int,
) -> None:
    """Write the rows of `out` that are the chunks'. Arguments are the step's, as in `ops.paged_attention`."""
    rows = slice(chunks.first, chunks.first + chunks.num_tokens)
    query, out = query[rows], out[rows]
    found = chunks.flash(
        q=query,
        k=key[rows],
        v=value[rows],
        out=out,
        cu_seqlens_q=chunks.query_start_loc,
        cu_seqlens_k=chunks.query_start_loc,
        max_seqlen_q=chunks.max_query_len,
        max_seqlen_k=chunks.max_query_len,
        softmax_scale=scale,
        causal=True,
        window_size=[sliding_window - 1, 0] if sliding_window else None,
        return_softmax_lse=chunks.has_past,
    )
    if not chunks.has_past:
        return
    past = torch.empty_like(out)
    past_lse = torch.empty(query.shape[1], query.shape[0], dtype=torch.float32, device=query.device)
    ops.past_attention(
        query,
        kv_cache,
        chunks.block_table,
        chunks.seq_lens,
        chunks.query_start_loc,
        params,
        scale,
        past,
        past_lse.T,
        sliding_window,
    )
    merge_attn_states(out, past, past_lse, out, found[1])
