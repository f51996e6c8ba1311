"""Long chunks of a prefill on a GPU: FlashAttention over keys and values of past and step in one piece.

Every tile of a chunk's queries would dequantize the past anew, so it is done once, into a workspace of fixed size; a
longer past takes several passes, merged by log-sum-exp. The kernel of `ops.paged_attention` dequantizes where it
attends, which suits decodes and drafts.
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

from vllm_wkvquant import ops
from vllm_wkvquant.checkpoint import QUANT_METHOD
from vllm_wkvquant.layout import TILE
from vllm_wkvquant.reference import KVParams

SHORT = 16  # tokens of the longest query that is left to `ops.paged_attention`
WORKSPACE = 128 << 20  # bytes of keys and values, unless a step's own need more

# flash_attn_varlen_func of the version that vLLM picks
FlashAttention = Callable[..., Any]


def flash_attention(head_size: int, dtype: torch.dtype) -> FlashAttention | None:
    """What attends queries [T, heads, head_size] of `dtype` on this device; None where nothing does.

    vLLM's FlashAttention where it has one for them, xformers otherwise.
    """
    if not current_platform.is_cuda() or dtype not in (torch.float16, torch.bfloat16):
        return None
    version = get_flash_attn_version(head_size=head_size)
    if version is not None:
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

        return functools.partial(flash_attn_varlen_func, fa_version=version)
    return xformers_attention if importlib.util.find_spec("xformers") else None


def xformers_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    window_size: list[int] | None,
    return_softmax_lse: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`flash_attn_varlen_func` by xformers, whose masks need the lengths on the host: waits for the device."""
    from xformers.ops import fmha

    counts, lengths = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    mask = fmha.attn_bias.BlockDiagonalMask.from_seqlens(counts, lengths, device=q.device)
    if window_size is not None:
        mask = mask.make_local_attention_from_bottomright(window_size[0] + 1)
    elif causal:
        mask = mask.make_causal_from_bottomright()
    groups, each = k.shape[1], q.shape[1] // k.shape[1]
    k, v = (x[None, : sum(lengths), :, None].expand(-1, -1, -1, each, -1) for x in (k, v))
    query = q.unflatten(1, (groups, each))[None]
    found, lse = fmha.memory_efficient_attention_partial(query, k, v, mask, scale=softmax_scale)
    out.copy_(found[0].flatten(1, 2))
    return out, lse.reshape(q.shape[1], -1)


def extends_sequences(speculative: Any) -> bool:
    """Whether vLLM may ask for attention over more keys than the host is told of, which no chunk can have.

    The prefill of a draft model adds tokens to each sequence, on the device alone. Its layers may share a builder with
    the target's.
    """
    if speculative is None or not speculative.uses_draft_model():
        return False
    return speculative.draft_model_config.quantization == QUANT_METHOD


def room(tokens: int, num_kv_heads: int, head_size: int) -> int:
    """Keys that the workspace holds where steps have up to `tokens` tokens."""
    least = -(-tokens // TILE) * TILE + 4 * TILE  # the step's own, and past before them
    return max(WORKSPACE // (2 * 2 * num_kv_heads * head_size) // TILE * TILE, least)


def profile(output: torch.Tensor, num_kv_heads: int) -> None:
    """Let a profiling run see the memory of `attend`. output: [tokens, heads, head_size] of the largest step."""
    tokens, _, head_size = output.shape
    n = room(tokens, num_kv_heads, head_size)
    seen = [output.new_empty(2, n, num_kv_heads, head_size, dtype=torch.float16)]
    seen += [output.new_empty(output.shape, dtype=torch.float16) for _ in range(4)]  # queries, output, two passes'


@dataclass
class Pass:
    """Keys gathered together, and the queries that attend them. Tensors are on the device.

    seqs, rows: which of the chunks' sequences and tokens. first, key_start_loc, max_keys: as in `ops.gather_kv`.
    num_keys: of all sequences, less up to `missing`. query_start_loc: from the first of `rows`. own: the keys end with
    the step's own.
    """

    seqs: slice
    rows: slice
    first: torch.Tensor
    key_start_loc: torch.Tensor
    max_keys: int
    num_keys: int
    missing: int
    query_start_loc: torch.Tensor
    own: bool


@dataclass
class Chunks:
    """The sequences of a step from the first long query on, which come last. Tensors are on the device.

    first, num_tokens: their tokens in the step. num_seqs: sequences before them. query_start_loc, seq_lens,
    block_table: as in `ops.paged_attention`, counted from `first`. passes: in order, those of a sequence that needs
    several one after the other; none where no sequence has a past. room: most keys of a pass.
    """

    flash: FlashAttention
    first: int
    num_tokens: int
    num_seqs: int
    max_query_len: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    passes: list[Pass]
    room: int


def split_chunks(
    common: CommonAttentionMetadata, threshold: int, flash: FlashAttention, room: int, window: int
) -> Chunks | None:
    """The step's chunks, or None where every query has at most `threshold` tokens. Waits for nothing on the device.

    room: keys that a pass can have. window: sliding window that all layers have, before which pages may be gone, or 0.
    """
    short, long, first, _ = split_decodes_and_prefills(common, decode_threshold=threshold)
    if long == 0 or common.seq_lens_cpu_upper_bound is None:
        return None
    chunks = Chunks(
        flash=flash,
        first=first,
        num_tokens=int(common.query_start_loc_cpu[-1]) - first,
        num_seqs=short,
        max_query_len=common.max_query_len,
        query_start_loc=common.query_start_loc[short:] - first,
        seq_lens=common.seq_lens[short:],
        block_table=common.block_table_tensor[short:],
        passes=[],
        room=room,
    )
    starts = [int(x) - first for x in common.query_start_loc_cpu[short:]]
    # exact but for sequences with drafts, of which it counts those that may be rejected
    lens = common.seq_lens_cpu_upper_bound[short:].tolist()
    if all(n == b - a for n, a, b in zip(lens, starts, starts[1:], strict=False)):
        return chunks
    plan = _plan(starts, lens, room, window, threshold)
    numbers = async_tensor_h2d([x for p in plan for x in (*p.first, 0, p.count)], chunks.seq_lens.device, torch.int32)
    for p in plan:
        n = len(p.first)
        begin, (bounds, numbers) = numbers[:n], numbers[n:].split([2, len(numbers) - n - 2])
        if p.own:
            bounds = torch.zeros(n + 1, dtype=torch.int32, device=begin.device)
            counts = (chunks.seq_lens[p.seqs] - begin).clamp_min_(0)
            torch.cumsum(counts, 0, dtype=torch.int32, out=bounds[1:])
        rows = slice(starts[p.seqs.start], starts[p.seqs.stop])
        query_start_loc = chunks.query_start_loc[p.seqs.start : p.seqs.stop + 1] - rows.start
        found = Pass(p.seqs, rows, begin, bounds, p.count, p.total, p.missing, query_start_loc, p.own)
        chunks.passes.append(found)
    return chunks


@dataclass
class _Planned:
    """A pass on the host. count: keys of the sequence that has most; total: of all, less up to `missing`."""

    seqs: slice
    first: list[int]
    count: int
    own: bool
    total: int = 0
    missing: int = 0


def _plan(starts: list[int], lens: list[int], room: int, window: int, slack: int) -> list[_Planned]:
    """Passes of at most `room` keys over sequences of `lens` tokens, whose queries are starts[i] .. starts[i + 1] - 1.

    A sequence of more keys has passes of its own, all but the last over past tokens alone. Lengths are exact, but
    may be by less than `slack` too large where there are no more queries than that.
    """
    plan: list[_Planned] = []
    full = False
    for i, length in enumerate(lens):
        queries = starts[i + 1] - starts[i]
        if queries == 0:  # padding
            continue
        shorter = slack if queries <= slack else 0  # that it may be
        begin = max(0, length - queries - window + 1 - shorter) // TILE * TILE if window else 0
        alone = length - begin > room
        while length - begin > room:
            # the last pass is as long as can be, so it starts well inside the past
            count = min(room, -(-(length - begin - room) // TILE) * TILE)
            plan.append(_Planned(slice(i, i + 1), [begin], count, own=False, total=count))
            begin += count
        keys = length - begin
        if alone or full or not plan or plan[-1].total + keys > room or plan[-1].seqs.stop < i:
            plan.append(_Planned(slice(i, i), [], 0, own=True))
        last, full = plan[-1], alone
        last.seqs = slice(last.seqs.start, i + 1)
        last.first.append(begin)
        last.count = max(last.count, keys)
        last.total += keys
        last.missing += min(shorter, keys)
    return plan


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
    query, key, value, out = query[rows], key[rows], value[rows], out[rows]
    options = {
        "max_seqlen_q": chunks.max_query_len,
        "softmax_scale": scale,
        "window_size": [sliding_window - 1, 0] if sliding_window else None,
    }
    if not chunks.passes:
        chunks.flash(
            q=query, k=key, v=value, out=out, cu_seqlens_q=chunks.query_start_loc, max_seqlen_k=chunks.max_query_len,
            cu_seqlens_k=chunks.query_start_loc, causal=True, **options,
        )  # fmt: skip
        return
    if sliding_window and not all(p.own for p in chunks.passes):
        # its layers see less than a pass holds, but others of the same pages see all
        ops.paged_attention(
            query, key, value, kv_cache, chunks.block_table, chunks.seq_lens, chunks.query_start_loc, params, scale,
            out, sliding_window,
        )  # fmt: skip
        return
    # in fp16 even for bf16: it would round the keys a second time, to 8 bits
    query = query.to(torch.float16)
    found = out if out.dtype == torch.float16 else torch.empty_like(query)
    room = query.new_empty(2, chunks.room, *key.shape[1:])
    before: tuple[torch.Tensor, torch.Tensor] | None = None
    for p in chunks.passes:
        # a tile that a sequence ends in has rows beyond it: times no weight, but NaN times 0 is NaN
        keys, values = room[:, : p.num_keys]
        values[p.num_keys - p.missing :].zero_()
        ops.gather_kv(
            key[p.rows],
            value[p.rows],
            kv_cache,
            chunks.block_table[p.seqs],
            chunks.seq_lens[p.seqs],
            p.query_start_loc,
            p.first,
            p.key_start_loc,
            p.max_keys,
            params,
            keys,
            values,
        )
        to = found[p.rows] if p.own else torch.empty_like(found[p.rows])
        lse = chunks.flash(
            q=query[p.rows],
            k=keys,
            v=values,
            out=to,
            cu_seqlens_q=p.query_start_loc,
            cu_seqlens_k=p.key_start_loc,
            max_seqlen_k=p.max_keys,
            causal=p.own,
            return_softmax_lse=True,
            **options,
        )[1]
        if before is not None:
            merged_lse = None if p.own else torch.empty_like(lse)
            merge_attn_states(to, *before, to, lse, merged_lse)
            lse = lse if merged_lse is None else merged_lse
        before = None if p.own else (to, lse)
    if found is not out:
        out.copy_(found)
