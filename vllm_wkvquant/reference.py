"""The executable specification of the 4-bit cache in plain torch; every kernel is tested against it.

Per KV head of size D, position t, static smoothing s and shift delta, orthonormal Hadamard H, rotary rotation R_t:

    k'_t = H ((k_t - K_t) / k_smooth)                      v'_t = v_t - V_t
    K_t = R_t k_shift, V_t = v_shift                       K_0 = k_first, V_0 = v_first
    minimum = fp16(min x'), scale = fp16((max x' - min x') / 15), code = round((x' - minimum) / scale) in 0..15
    q . k_t  =  H (q * k_smooth) . (scale_t code_t + minimum_t)  +  q . K_t
    out_past =  sum_t p_t (scale_t code_t + minimum_t + V_t)

Position 0 has shifts of its own: it is the attention sink of most models, much attention goes there, and its
key and value lie far from all others but hardly depend on the token (docs/algorithm.md).
H and the smoothing of V are folded into v_proj and o_proj offline (quantize/fold.py), so the cache sees v' up to its
shift. Past tokens (positions < seq_len - query_len) are read from the page; the tokens of the step are attended as
they came (past-only quantization, arXiv 2402.12065 section 4.1).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from vllm_wkvquant import layout
from vllm_wkvquant.config import KVCacheConfig
from vllm_wkvquant.layout import Quantized

# A simulated cache: keys and values [T, H, D] at positions int64 [T] -> the same as attention sees them once they are
# past, fp32 [T, H, D] each. `fake_quantize` with its params bound is this project's.
Simulation = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

QMAX = 15
FP16_MAX = 65504.0
# What a shift costs the GPU kernels, in steps of a matrix product (native_cuda.py): rotary pairs that turn by at most
# SLOW_TURN radians a token are one together, the others one for every STEP_PAIRS.
SLOW_TURN = 5.0 / 128
STEP_PAIRS = 8


@dataclass(frozen=True)
class KVParams:
    """KV parameters of one layer, on the device of its cache.

    k_smooth, k_shift, v_shift: fp32 [num_kv_heads, head_size]. key_hadamard: rotate keys before quantizing.
    rope_turns: int64 [rotary_dim / 2] of `rope_turns`, or None for a shift that does not rotate. rope_scaling:
    factor on cos and sin (YaRN). k_first, v_first: fp32 [num_kv_heads, head_size], shifts at position 0 as the cache
    sees keys and values there; None: position 0 is like any other.
    """

    k_smooth: torch.Tensor
    k_shift: torch.Tensor
    v_shift: torch.Tensor
    key_hadamard: bool
    rope_turns: torch.Tensor | None
    rope_scaling: float = 1.0
    k_first: torch.Tensor | None = None
    v_first: torch.Tensor | None = None

    @classmethod
    def build(
        cls,
        config: KVCacheConfig,
        k_smooth: torch.Tensor,
        k_shift: torch.Tensor,
        v_shift: torch.Tensor,
        k_first: torch.Tensor | None = None,
        v_first: torch.Tensor | None = None,
    ) -> "KVParams":
        """Parameters of a layer from its checkpoint tensors [num_kv_heads, head_size] and the KV section."""
        rotating = config.key_shift == "rotating"
        return cls(
            k_smooth=k_smooth.float().contiguous(),
            k_shift=k_shift.float().contiguous(),
            v_shift=v_shift.float().contiguous(),
            key_hadamard=config.key_hadamard,
            rope_turns=rope_turns(config.rope.inv_freq).to(k_shift.device) if rotating else None,
            rope_scaling=config.rope.attention_scaling if rotating else 1.0,
            k_first=None if k_first is None else k_first.float().contiguous(),
            v_first=None if v_first is None else v_first.float().contiguous(),
        )

    def to(self, device: torch.device | str) -> "KVParams":
        """The same parameters on another device."""
        moved: dict[str, Any] = {n: v.to(device) for n, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **moved)


def hadamard_block(head_size: int) -> int:
    """Size of the Hadamard blocks: the largest power of two that divides the head size (16 for 80, 32 for 96)."""
    return head_size & -head_size


def hadamard_matrix(head_size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Orthonormal, symmetric [head_size, head_size]: blocks of Sylvester's construction on the diagonal."""
    n = hadamard_block(head_size)
    h = torch.ones(1, 1, dtype=dtype)
    while h.shape[0] < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return torch.block_diag(*[h / math.sqrt(n)] * (head_size // n))


def rope_turns(inv_freq: tuple[float, ...] | list[float]) -> torch.Tensor:
    """Angles per position as a fixed-point fraction of a turn: round(2^64 inv_freq / 2 pi), as wrapped int64 [n].

    `position * turns` in wrapping 64-bit arithmetic is the angle modulo one turn, exact at any position, so a write
    and a read that use it cannot disagree.
    """
    turns = [round(f / (2 * math.pi) * 2.0**64) & (2**64 - 1) for f in inv_freq]
    return torch.tensor([t - 2**64 if t >= 2**63 else t for t in turns], dtype=torch.int64)


def slow_pairs(turns: torch.Tensor) -> torch.Tensor:
    """bool [n]: the rotary pairs of `rope_turns` that turn by at most SLOW_TURN a token."""
    return turns.double().abs() * (2 * math.pi / 2.0**64) <= SLOW_TURN


def shift_steps(fast: int, slow: int) -> int:
    """Product steps of a layer in which so many rotary pairs that are not slow, and so many that are, have a shift."""
    if slow <= STEP_PAIRS:
        fast, slow = fast + slow, 0
    return -(-fast // STEP_PAIRS) + (slow > 0)


def rope_angles(positions: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """float64 radians in [-pi, pi), shape [*positions, n], from int64 positions and `rope_turns`."""
    fraction = positions.long()[..., None] * turns  # wraps modulo 2^64, as it must
    return fraction.double() * (2 * math.pi / 2.0**64)


def rotate(x: torch.Tensor, positions: torch.Tensor, turns: torch.Tensor, scaling: float) -> torch.Tensor:
    """scaling * R_t x for neox rotary pairs (j, j + n): x [T, H, D], positions [T], turns [n]; same dtype as x."""
    n = turns.shape[0]
    angles = rope_angles(positions, turns)[:, None]
    cos, sin = (scaling * angles.cos()).to(x.dtype), (scaling * angles.sin()).to(x.dtype)
    a, b = x[..., :n], x[..., n : 2 * n]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., 2 * n :].expand(*a.shape[:-1], -1)], -1)


def key_shift_at(positions: torch.Tensor, params: KVParams, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """K_t, [T, H, D]: the part of the keys that is known from the position alone."""
    shift = params.k_shift.to(dtype)[None].expand(positions.shape[0], -1, -1)
    if params.rope_turns is not None:
        shift = rotate(shift, positions, params.rope_turns, params.rope_scaling)
    return _at_first(positions, params.k_first, shift)


def value_shift_at(positions: torch.Tensor, params: KVParams, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """V_t, [T, H, D]."""
    shift = params.v_shift.to(dtype)[None].expand(positions.shape[0], -1, -1)
    return _at_first(positions, params.v_first, shift)


def _at_first(positions: torch.Tensor, first: torch.Tensor | None, shift: torch.Tensor) -> torch.Tensor:
    if first is None:
        return shift
    return torch.where((positions == 0)[:, None, None], first.to(shift.dtype), shift)


def transform_key(key: torch.Tensor, positions: torch.Tensor, params: KVParams) -> torch.Tensor:
    """k'_t, fp32 [T, H, D], of roped keys [T, H, D] at positions [T]."""
    x = (key.float() - key_shift_at(positions, params)) / params.k_smooth
    return x @ hadamard_matrix(key.shape[-1]).to(x.device) if params.key_hadamard else x


def quantize_tokens(x: torch.Tensor, qmax: int = QMAX) -> Quantized:
    """Dynamic asymmetric quantization of x [T, H, D] per token and head."""
    x = x.float()
    low, high = x.amin(-1), x.amax(-1)
    minimum = low.clamp(-FP16_MAX, FP16_MAX).half()
    scale = ((high - low) / qmax).clamp_max(FP16_MAX).half()
    inverse = torch.where(scale > 0, 1 / scale.float(), 0)
    codes = ((x - minimum.float()[..., None]) * inverse[..., None]).round().clamp(0, qmax)
    return codes.to(torch.uint8), scale, minimum


def dequantize_tokens(
    codes: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """scale * code + minimum, [T, H, D]."""
    return codes.to(dtype) * scale.to(dtype)[..., None] + minimum.to(dtype)[..., None]


def fake_quantize(
    key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor, params: KVParams, qmax: int = QMAX
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [T, H, D] as attention sees them once they are past: what the cache returns, in fp32."""
    k, v = quantize(key, value, positions, params, qmax)
    return dequantize(k, v, positions, params)


def quantize(
    key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor, params: KVParams, qmax: int = QMAX
) -> tuple[Quantized, Quantized]:
    """What the cache stores of roped keys and values [T, H, D] at positions [T]."""
    k = quantize_tokens(transform_key(key, positions, params), qmax)
    return k, quantize_tokens(value.float() - value_shift_at(positions, params), qmax)


def dequantize(
    key: Quantized,
    value: Quantized,
    positions: torch.Tensor,
    params: KVParams,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [T, H, D] that the cache returns for what it stored at positions [T]."""
    k = dequantize_tokens(*key, dtype)
    if params.key_hadamard:
        k = k @ hadamard_matrix(k.shape[-1], dtype).to(k.device)
    k = k * params.k_smooth.to(dtype) + key_shift_at(positions, params, dtype)
    return k, dequantize_tokens(*value, dtype) + value_shift_at(positions, params, dtype)


def token_positions(
    query_start_loc: torch.Tensor, seq_lens: torch.Tensor, tokens: torch.Tensor, out: torch.Tensor
) -> None:
    """Index of each of the step's tokens in its sequence, int64, without a host copy of either input.

    query_start_loc [num_seqs + 1] and seq_lens [num_seqs]: as in `ops.paged_attention`; tokens: arange(len(out)).
    Padding after query_start_loc[-1] gets positions of no meaning, none negative.
    """
    ends = query_start_loc[1:]
    seq = torch.searchsorted(ends[:-1], tokens, right=True)  # what follows the last end is of the last sequence, too
    torch.add(tokens, (seq_lens - ends)[seq], out=out)
    out.clamp_min_(0)


def cache_write(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    positions: torch.Tensor,
    params: KVParams,
) -> None:
    """Specification of `ops.cache_write`."""
    keep = slot_mapping >= 0
    slots, positions = slot_mapping[keep].long(), positions[: keep.shape[0]][keep]
    key, value = key[: keep.shape[0]][keep], value[: keep.shape[0]][keep]
    layout.store(kv_cache, slots, *quantize(key, value, positions, params))


def paged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    params: KVParams,
    scale: float,
    out: torch.Tensor,
    sliding_window: int = 0,
    lse: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> None:
    """Specification of `ops.paged_attention`, computed in `dtype`."""
    block_size, head_size = kv_cache.shape[2], query.shape[-1]
    group = query.shape[1] // kv_cache.shape[1]
    starts = query_start_loc.tolist()
    for i, seq_len in enumerate(seq_lens.tolist()):
        first, last = starts[i], starts[i + 1]
        if first == last:
            continue
        past = seq_len - (last - first)
        # a window's caller may have freed the pages before it
        start = max(0, past - sliding_window + 1) if sliding_window else 0
        p = torch.arange(start, past, device=query.device)
        slots = block_table[i].long()[p // block_size] * block_size + p % block_size
        k, v = dequantize(*layout.load(kv_cache, slots, head_size), p, params, dtype)
        k, v = (torch.cat([old, new[first:last].to(dtype)]) for old, new in ((k, key), (v, value)))
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", query[first:last].to(dtype), k) * scale
        q_pos = torch.arange(past, seq_len, device=query.device)[:, None]
        k_pos = torch.arange(start, start + k.shape[0], device=query.device)[None]
        hidden = k_pos > q_pos
        if sliding_window:
            hidden |= k_pos <= q_pos - sliding_window
        scores = scores.masked_fill(hidden, -math.inf)
        out[first:last] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).to(out.dtype)
        if lse is not None:
            lse[first:last] = scores.logsumexp(-1).T.to(lse.dtype)


def gather_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    first: torch.Tensor,
    key_start_loc: torch.Tensor,
    max_keys: int,
    params: KVParams,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """Specification of `ops.gather_kv`."""
    block_size, head_size = kv_cache.shape[2], keys.shape[-1]
    starts, rows = query_start_loc.tolist(), key_start_loc.tolist()
    for i, (seq_len, begin) in enumerate(zip(seq_lens.tolist(), first.tolist(), strict=True)):
        past = seq_len - (starts[i + 1] - starts[i])
        end = begin + rows[i + 1] - rows[i]
        p = torch.arange(begin, max(begin, min(end, past)), device=key.device)
        slots = block_table[i].long()[p // block_size] * block_size + p % block_size
        old = dequantize(*layout.load(kv_cache, slots, head_size), p, params)
        new = slice(starts[i] + max(begin, past) - past, starts[i] + max(end, past) - past)
        for out, past_rows, step in zip((keys, values), old, (key, value), strict=True):
            found = torch.cat([past_rows, step[new].float()])
            out[rows[i] : rows[i + 1]] = found.clamp(-FP16_MAX, FP16_MAX).to(out.dtype)


def past_only_mask(length: int, chunk: int = 1, device: torch.device | str = "cpu") -> torch.Tensor:
    """bool [length, length]: True where query i attends key j as it came, because both are in one chunk of a prefill.

    Keys before the chunk are past and come from the cache; keys after the query stay hidden by the causal mask.
    """
    step = torch.arange(length, device=device) // chunk
    return step[:, None] == step[None, :]


def past_only_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    scale: float,
    chunk: int = 1,
    sliding_window: int = 0,
) -> torch.Tensor:
    """Causal attention of a whole sequence under `past_only_mask(chunk)`, in fp32.

    query [T, Hq, D]; key, value: raw [T, H, D]; past_key, past_value: the same tokens from the cache
    (`fake_quantize`). Returns [T, Hq, D] fp32.
    """
    length = query.shape[0]
    raw = past_only_mask(length, chunk, query.device)
    pos = torch.arange(length, device=query.device)
    seen = pos[None] <= pos[:, None]
    if sliding_window:
        seen &= pos[None] > pos[:, None] - sliding_window
    out = torch.nn.functional.scaled_dot_product_attention(
        query.float().transpose(0, 1)[None],
        torch.cat([past_key, key]).float().transpose(0, 1)[None],
        torch.cat([past_value, value]).float().transpose(0, 1)[None],
        attn_mask=torch.cat([seen & ~raw, seen & raw], 1),
        scale=scale,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)
