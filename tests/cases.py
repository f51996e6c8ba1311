"""Random inputs of the ops, for tests and benchmarks."""

import math
from dataclasses import dataclass

import torch

from vllm_wkvquant import layout, reference
from vllm_wkvquant.reference import KVParams


def make_params(
    heads: int,
    head_size: int,
    shift: float = 5.0,
    rotary_dim: int | None = None,
    kind: str = "rotating",
    hadamard: bool = True,
    base: float = 1e4,
    scaling: float = 1.0,
    seed: int = 0,
) -> KVParams:
    """Parameters like calibrated ones: a shift of magnitude `shift` on every channel and smoothing around 1.

    kind: "rotating", "static" (no angles) or "none" (a shift of zero, at position 0 as well).
    """
    g = torch.Generator().manual_seed(seed)
    dim = head_size if rotary_dim is None else rotary_dim
    inv_freq = [base ** (-2 * j / dim) for j in range(dim // 2)]
    amount = 0.0 if kind == "none" else shift
    return KVParams(
        k_smooth=torch.exp(0.3 * torch.randn(heads, head_size, generator=g)),
        k_shift=amount * torch.randn(heads, head_size, generator=g),
        v_shift=0.1 * amount * torch.randn(heads, head_size, generator=g),
        key_hadamard=hadamard,
        rope_turns=reference.rope_turns(inv_freq) if kind == "rotating" else None,
        rope_scaling=scaling if kind == "rotating" else 1.0,
        k_first=None if kind == "none" else shift * torch.randn(heads, head_size, generator=g),
        v_first=None if kind == "none" else 0.1 * shift * torch.randn(heads, head_size, generator=g),
    )


@dataclass
class Case:
    """Arguments of `ops.paged_attention` but for out and lse, for sequences of (past, query_len)."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    kv_cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    params: KVParams
    scale: float
    past_slots: torch.Tensor


def make_case(
    lengths: list[tuple[int, int]],
    params: KVParams,
    group: int = 4,
    block_size: int = 32,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    pad: int = 3,
    query_gain: float = 1.0,
) -> Case:
    """Pages in shuffled order with 0xFF in every slot that holds no past token (a NaN as fp16), q, k, v cut from one
    fused qkv tensor with `pad` rows too many."""
    g = torch.Generator().manual_seed(seed)
    heads, head_size = params.k_smooth.shape
    blocks = [max(1, -(-(past + n) // block_size)) for past, n in lengths]
    order = torch.randperm(sum(blocks) + 2, generator=g).int()
    table = torch.full((len(lengths), max(blocks)), -1, dtype=torch.int32)
    used = 0
    for i, n in enumerate(blocks):
        table[i, :n] = order[used : used + n]
        used += n
    kv_cache = torch.full((len(order), heads, block_size, layout.token_bytes(head_size)), 255, dtype=torch.uint8)
    slots = []
    for i, (past, _) in enumerate(lengths):
        p = torch.arange(past)
        slots.append(table[i].long()[p // block_size] * block_size + p % block_size)
        step = 1 << 14  # bounds the reference's temporaries
        for first in range(0, past, step):
            chunk = p[first : first + step]
            shift = reference.key_shift_at(chunk, params)
            k = torch.randn(len(chunk), heads, head_size, generator=g) * params.k_smooth + shift
            v = torch.randn(len(chunk), heads, head_size, generator=g) + params.v_shift
            reference.cache_write(k, v, kv_cache, slots[-1][first : first + step], chunk, params)
    tokens = sum(n for _, n in lengths)
    qkv = torch.randn(tokens + pad, (group + 2) * heads * head_size, generator=g).to(dtype)
    q, k, v = qkv.split([group * heads * head_size, heads * head_size, heads * head_size], -1)
    starts = [0]
    for _, n in lengths:
        starts.append(starts[-1] + n)
    query = q.unflatten(-1, (group * heads, head_size))
    query.mul_(query_gain)
    return Case(
        query=query,
        key=k.unflatten(-1, (heads, head_size)),
        value=v.unflatten(-1, (heads, head_size)),
        kv_cache=kv_cache,
        block_table=table,
        seq_lens=torch.tensor([past + n for past, n in lengths], dtype=torch.int32),
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        params=params,
        scale=1 / math.sqrt(head_size),
        past_slots=torch.cat(slots) if slots else torch.empty(0, dtype=torch.int64),
    )


def run_attention(implementation, case: Case, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) with NaN and 7 in the rows that the op must leave alone."""
    out = torch.full(case.query.shape, math.nan, dtype=case.query.dtype)
    lse = torch.full(case.query.shape[:2], 7.0)
    implementation(
        case.query,
        case.key,
        case.value,
        case.kv_cache,
        case.block_table,
        case.seq_lens,
        case.query_start_loc,
        case.params,
        case.scale,
        out,
        lse=lse,
        **options,
    )
    return out, lse
