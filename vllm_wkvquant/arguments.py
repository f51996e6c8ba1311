"""Arguments of the ops, checked before kernels get their pointers.

Values (slots, lengths, block tables) are not read, so that calls on a GPU can be captured into a graph.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_wkvquant.layout import TILE, token_bytes
from vllm_wkvquant.reference import KVParams

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # the numbers are those of csrc/*/api.h
MOST_STRIDE = 1 << 30  # elements; kernels of a GPU count the bytes of up to four in 32 bits


@dataclass(frozen=True)
class Served:
    """What tensors of a call must fit: the layer that its params are of.

    aligned: whether its kernels want rows and blocks aligned and not too far apart, as those of a GPU do.
    """

    device: torch.device
    num_kv_heads: int
    head_size: int
    aligned: ClassVar[bool] = True


def check(condition: bool, message: str) -> None:
    """Raise ValueError with this message where the condition does not hold."""
    if not condition:
        raise ValueError(message)


def _describe(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}, strides {tensor.stride()}, on {tensor.device}"


def check_params(params: KVParams, head_sizes: tuple[int, ...], kernels: str) -> None:
    """Raise ValueError where kernels of some head sizes do not take `params`."""
    heads, head_size = params.k_smooth.shape
    device = params.k_smooth.device
    check(
        head_size in head_sizes,
        f"head size {head_size} is not supported by the {kernels} kernels; supported: {list(head_sizes)}",
    )
    check((params.k_first is None) == (params.v_first is None), "params.k_first and params.v_first go together")
    for name in ("k_smooth", "k_shift", "v_shift", "k_first", "v_first"):
        tensor = getattr(params, name)
        if tensor is not None and not (
            tensor.shape == (heads, head_size)
            and tensor.dtype == torch.float32
            and tensor.is_contiguous()
            and tensor.device == device
        ):
            raise ValueError(
                f"params.{name} must be contiguous fp32 [{heads}, {head_size}] on {device}, got {_describe(tensor)}"
            )
    if params.rope_turns is not None:
        check_ints("params.rope_turns", params.rope_turns, torch.int64, 0, device)
        pairs = params.rope_turns.shape[0]
        check(2 * pairs <= head_size, f"{pairs} rotary pairs do not fit the head size {head_size}")


def _check_rows(name: str, tensor: torch.Tensor, rows: int, like: Served, heads: int, dtype: torch.dtype) -> None:
    shape = tensor.shape
    if not (
        len(shape) == 3
        and shape[0] >= rows
        and shape[1] == heads
        and shape[2] == like.head_size
        and tensor.dtype == dtype
        and tensor.stride(2) == 1
        and tensor.device == like.device
        and (not like.aligned or _rows_aligned(tensor))
    ):
        aligned = " and rows aligned to 4 elements, less than 2^30 apart" if like.aligned else ""
        raise ValueError(
            f"{name} must be {dtype} [>= {rows}, {heads}, {like.head_size}] on {like.device} with a contiguous last "
            f"dimension{aligned}, got {_describe(tensor)}"
        )


def _rows_aligned(tensor: torch.Tensor) -> bool:
    return (
        tensor.stride(0) % 4 == tensor.stride(1) % 4 == 0
        and max(tensor.stride()) < MOST_STRIDE
        and tensor.data_ptr() % (4 * tensor.element_size()) == 0
    )


def check_ints(name: str, tensor: torch.Tensor, dtype: torch.dtype, rows: int, device: torch.device) -> None:
    """Raise ValueError unless the tensor is a contiguous [>= rows] of this type on the device."""
    if not (
        tensor.ndim == 1
        and tensor.shape[0] >= rows
        and tensor.dtype == dtype
        and tensor.is_contiguous()
        and tensor.device == device
    ):
        raise ValueError(f"{name} must be contiguous {dtype} [>= {rows}] on {device}, got {_describe(tensor)}")


def _check_cache(kv_cache: torch.Tensor, like: Served) -> None:
    expected = token_bytes(like.head_size)
    shape = kv_cache.shape
    if not (
        kv_cache.dtype == torch.uint8
        and len(shape) == 4
        and shape[1] == like.num_kv_heads
        and shape[2] > 0
        and shape[2] % TILE == 0
        and shape[3] == expected
        and kv_cache.stride()[1:] == (shape[2] * expected, expected, 1)
        and kv_cache.device == like.device
        and (not like.aligned or _blocks_aligned(kv_cache))
    ):
        aligned = " at multiples of 16 bytes, less than 2^32 apart," if like.aligned else ""
        raise ValueError(
            f"kv_cache must be uint8 [num_blocks, {like.num_kv_heads}, block_size, {expected}] on {like.device} with "
            f"contiguous blocks{aligned} and a block_size that is a multiple of {TILE}, got {_describe(kv_cache)}"
        )


def _blocks_aligned(kv_cache: torch.Tensor) -> bool:
    return kv_cache.stride(0) % 16 == kv_cache.data_ptr() % 16 == 0 and kv_cache.stride(0) < 1 << 32


def _check_dtype(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {tensor.dtype}; supported: {[str(d) for d in DTYPES]}")


def check_write(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    positions: torch.Tensor,
    like: Served,
) -> None:
    """Raise ValueError where arguments of `cache_write` do not fit each other."""
    tokens = slot_mapping.shape[0]
    _check_dtype("key", key)
    _check_rows("key", key, tokens, like, like.num_kv_heads, key.dtype)
    _check_rows("value", value, tokens, like, like.num_kv_heads, key.dtype)
    check_ints("slot_mapping", slot_mapping, torch.int64, tokens, like.device)
    check_ints("positions", positions, torch.int64, tokens, like.device)
    _check_cache(kv_cache, like)


def check_lengths(seq_lens: torch.Tensor, query_start_loc: torch.Tensor, like: Served) -> None:
    """Raise ValueError unless these are int32 [num_seqs] and [>= num_seqs + 1] on the layer's device."""
    check_ints("seq_lens", seq_lens, torch.int32, seq_lens.shape[0], like.device)
    check_ints("query_start_loc", query_start_loc, torch.int32, seq_lens.shape[0] + 1, like.device)


def check_heads(heads: int, kv_heads: int) -> None:
    """Raise ValueError unless so many query heads share the KV heads evenly."""
    check(heads > 0 and heads % kv_heads == 0, f"{heads} query heads do not share {kv_heads} KV heads evenly")


def _check_sequences(
    block_table: torch.Tensor, seq_lens: torch.Tensor, query_start_loc: torch.Tensor, like: Served
) -> None:
    seqs = seq_lens.shape[0]
    check_lengths(seq_lens, query_start_loc, like)
    if not (
        block_table.ndim == 2
        and block_table.shape[0] >= seqs
        and block_table.dtype == torch.int32
        and block_table.stride(1) == 1
        and block_table.device == like.device
        and (not like.aligned or block_table.stride(0) < MOST_STRIDE)
    ):
        near = " and rows less than 2^30 apart" if like.aligned else ""
        raise ValueError(
            f"block_table must be int32 [>= {seqs}, max_blocks] on {like.device} with a contiguous last "
            f"dimension{near}, got {_describe(block_table)}"
        )


def check_gather(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    first: torch.Tensor,
    key_start_loc: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    like: Served,
) -> None:
    """Raise ValueError where arguments of `gather_kv` do not fit each other."""
    _check_dtype("key", key)
    _check_rows("key", key, key.shape[0], like, like.num_kv_heads, key.dtype)
    _check_rows("value", value, key.shape[0], like, like.num_kv_heads, key.dtype)
    for name, tensor in (("keys", keys), ("values", values)):
        _check_rows(name, tensor, keys.shape[0], like, like.num_kv_heads, torch.float16)
        check(tensor.is_contiguous(), f"{name} must be contiguous, got {_describe(tensor)}")
    _check_cache(kv_cache, like)
    _check_sequences(block_table, seq_lens, query_start_loc, like)
    check_ints("first", first, torch.int32, seq_lens.shape[0], like.device)
    check_ints("key_start_loc", key_start_loc, torch.int32, seq_lens.shape[0] + 1, like.device)


def check_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    out: torch.Tensor,
    sliding_window: int,
    lse: torch.Tensor | None,
    like: Served,
) -> int:
    """The rows that a call has. Raises ValueError where its arguments do not fit each other."""
    kv_heads = like.num_kv_heads
    _check_dtype("query", query)
    check(query.ndim == 3, f"query must be [T, num_heads, head_size], got {_describe(query)}")
    rows, heads = query.shape[:2]
    check_heads(heads, kv_heads)
    _check_rows("query", query, rows, like, heads, query.dtype)
    rows = min(rows, out.shape[0], key.shape[0], value.shape[0])
    _check_rows("key", key, rows, like, kv_heads, query.dtype)
    _check_rows("value", value, rows, like, kv_heads, query.dtype)
    _check_rows("out", out, rows, like, heads, query.dtype)
    _check_cache(kv_cache, like)
    _check_sequences(block_table, seq_lens, query_start_loc, like)
    check(sliding_window >= 0, f"sliding_window {sliding_window} is negative")
    if lse is not None and not (
        lse.ndim == 2
        and lse.shape[0] >= rows
        and lse.shape[1] == heads
        and lse.dtype == torch.float32
        and lse.device == like.device
    ):
        raise ValueError(f"lse must be fp32 [>= {rows}, {heads}] on {like.device}, got {_describe(lse)}")
    return int(rows)
