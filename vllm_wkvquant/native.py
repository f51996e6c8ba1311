"""The `cpp` variants: the shared library of csrc/cpu through ctypes.

Nothing reaches a pointer before it is checked here. The library is loaded on first use, after torch, so that both share
one OpenMP runtime. WKVQUANT_CPU_ISA=scalar|avx2|avx512 forces an instruction set, read once when the library loads.
"""

import ctypes
import functools
import os
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_char_p, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch

from vllm_wkvquant.layout import HEAD_SIZES, TILE, token_bytes
from vllm_wkvquant.prepared import PreparedTables
from vllm_wkvquant.reference import KVParams

LIBRARY = Path(__file__).with_name("_wkvquant_cpu.so")
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ERRORS = {
    1: (ValueError, "slot_mapping has a slot beyond the last block of kv_cache"),
    2: (ValueError, "query_start_loc, seq_lens and block_table do not fit each other or the rows of query"),
    3: (ValueError, "block_table names a block that kv_cache does not have"),
    4: (MemoryError, "no memory for the workspace of paged_attention"),
}


class Params(Structure):
    """WkvParams of csrc/cpu/api.h, which documents the fields."""

    _fields_ = [
        *[(name, c_void_p) for name in ("k_smooth", "k_shift", "v_shift", "k_first", "v_first", "rope_turns")],
        ("rope_scaling", c_float),
        *[(name, c_int32) for name in ("num_kv_heads", "head_size", "rotary_pairs", "key_hadamard")],
    ]


class CacheWrite(Structure):
    """WkvCacheWrite of csrc/cpu/api.h."""

    _fields_ = [
        *[(name, c_void_p) for name in ("key", "value", "kv_cache", "slot_mapping", "positions")],
        *[(name, c_int64 * 2) for name in ("key_stride", "value_stride")],
        *[(name, c_int64) for name in ("block_stride", "num_blocks", "num_tokens")],
        *[(name, c_int32) for name in ("block_size", "dtype")],
    ]


class PagedAttention(Structure):
    """WkvAttention of csrc/cpu/api.h."""

    _fields_ = [
        *[(name, c_void_p) for name in ("query", "key", "value", "out", "lse", "kv_cache")],
        *[(name, c_void_p) for name in ("block_table", "seq_lens", "query_start_loc")],
        *[(f"{name}_stride", c_int64 * 2) for name in ("query", "key", "value", "out", "lse")],
        *[(name, c_int64) for name in ("block_table_stride", "block_stride", "num_blocks", "num_tokens")],
        *[(name, c_int32) for name in ("max_blocks", "num_seqs", "num_heads", "block_size", "dtype")],
        ("sliding_window", c_int32),
        ("scale", c_float),
    ]


STRUCTS = (Params, CacheWrite, PagedAttention)  # in the order of wkvquant_sizeof
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "wkvquant_sizeof": (c_int64, [c_int32]),
    "wkvquant_isa": (c_char_p, [c_int32, POINTER(c_int32)]),
    "wkvquant_use_isa": (None, [c_int32]),
    "wkvquant_prepare": (c_void_p, [POINTER(Params)]),
    "wkvquant_release": (None, [c_void_p]),
    "wkvquant_cache_write": (c_int32, [POINTER(CacheWrite), c_void_p]),
    "wkvquant_paged_attention": (c_int32, [POINTER(PagedAttention), c_void_p]),
    "wkvquant_layout": (None, [c_int64, c_int64, POINTER(c_int64)]),
    "wkvquant_layout_k_word": (c_int64, [c_int64] * 4),
    "wkvquant_layout_v_half": (c_int64, [c_int64] * 4),
}
BUILD = "`pip install -e .` in a checkout of vllm-wkvquant"


class LibraryError(RuntimeError):
    """A library that is not of this version; the message says how to rebuild it."""


def open_library(
    path: Path, functions: dict[str, tuple[Any, list[Any]]], structs: Sequence[type[Structure]], build: str
) -> Any:
    """The library at `path`. Raises LibraryError where it lacks a function or has structs of other sizes.

    functions: name -> (type of the result, types of the arguments); the first gives the size of a struct by its index
    in `structs`. build: how to rebuild the library.
    """
    try:
        lib = ctypes.CDLL(str(path))
        for name, (result, arguments) in functions.items():
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise LibraryError(f"{path.name} cannot be used ({error}): rebuild it with {build}") from error
    sizeof = getattr(lib, next(iter(functions)))
    if any(sizeof(i) != ctypes.sizeof(struct) for i, struct in enumerate(structs)):
        raise LibraryError(f"{path.name} was built from another version: rebuild it with {build}")
    return lib


def available() -> bool:
    """Whether this build has the library."""
    return LIBRARY.exists()


def refusal() -> str | None:
    """Why the kernels cannot run; None where they can. Raises ValueError on a bad WKVQUANT_CPU_ISA."""
    try:
        library()
    except (FileNotFoundError, LibraryError) as error:
        return str(error)
    return None


@functools.cache
def library() -> Any:
    """The loaded library. Raises FileNotFoundError where it was not built, LibraryError where it is not
    of this version, ValueError on a bad WKVQUANT_CPU_ISA."""
    if not available():
        raise FileNotFoundError(f"{LIBRARY.name} is not built; run {BUILD}")
    lib = open_library(LIBRARY, FUNCTIONS, STRUCTS, BUILD)
    _choose(lib, os.environ.get("WKVQUANT_CPU_ISA") or None)
    return lib


def _isas(lib: Any) -> dict[str, tuple[int, bool]]:
    """Name -> (index, whether this CPU has it), best first."""
    found: dict[str, tuple[int, bool]] = {}
    supported = c_int32()
    while (name := lib.wkvquant_isa(len(found), byref(supported))) is not None:
        found[name.decode()] = (len(found), bool(supported.value))
    return found


_chosen = ""


def _choose(lib: Any, name: str | None) -> None:
    global _chosen
    known = _isas(lib)
    if name is None:
        name = next(isa for isa, (_, supported) in known.items() if supported)
    if name not in known:
        raise ValueError(f"instruction set {name!r} is unknown; this build has {sorted(known)}")
    index, supported = known[name]
    if not supported:
        raise ValueError(f"this CPU lacks the instruction set {name!r}")
    lib.wkvquant_use_isa(index)
    _chosen = name


def isas() -> list[str]:
    """Instruction sets that this build has and this CPU can run, best first."""
    return [name for name, (_, supported) in _isas(library()).items() if supported]


def isa() -> str:
    """The instruction set in use."""
    library()
    return _chosen


def use_isa(name: str | None) -> None:
    """Use an instruction set from now on, None: the best. Raises ValueError where it is unknown or the CPU lacks it."""
    _choose(library(), name)


def _make(params: KVParams) -> int:
    heads, head_size = params.k_smooth.shape
    _check(head_size in HEAD_SIZES, f"head size {head_size} is not supported; supported: {list(HEAD_SIZES)}")
    _check((params.k_first is None) == (params.v_first is None), "params.k_first and params.v_first go together")
    for name in ("k_smooth", "k_shift", "v_shift", "k_first", "v_first"):
        tensor = getattr(params, name)
        if tensor is None:
            continue
        _check(
            tensor.shape == (heads, head_size)
            and tensor.dtype == torch.float32
            and tensor.is_contiguous()
            and tensor.device.type == "cpu",
            f"params.{name} must be contiguous fp32 [{heads}, {head_size}] on the CPU, got {_describe(tensor)}",
        )
    turns = params.rope_turns
    if turns is not None:
        _check(
            turns.ndim == 1
            and turns.dtype == torch.int64
            and turns.is_contiguous()
            and turns.device.type == "cpu"
            and 2 * turns.shape[0] <= head_size,
            f"params.rope_turns must be contiguous int64 [rotary_dim / 2] on the CPU, got {_describe(turns)}",
        )
    fields = Params(
        k_smooth=params.k_smooth.data_ptr(),
        k_shift=params.k_shift.data_ptr(),
        v_shift=params.v_shift.data_ptr(),
        k_first=None if params.k_first is None else params.k_first.data_ptr(),
        v_first=None if params.v_first is None else params.v_first.data_ptr(),
        rope_turns=None if turns is None else turns.data_ptr(),
        rope_scaling=params.rope_scaling,
        num_kv_heads=heads,
        head_size=head_size,
        rotary_pairs=0 if turns is None else turns.shape[0],
        key_hadamard=params.key_hadamard,
    )
    return int(library().wkvquant_prepare(byref(fields)))


def _release(handle: int) -> None:
    library().wkvquant_release(handle)


_prepared = PreparedTables(_make, _release)


def renew(params: KVParams) -> None:
    """Make the tables of `params` again, if they were made."""
    _prepared.make_again(params)


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _describe(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}, strides {tensor.stride()}, on {tensor.device}"


def _check_rows(name: str, tensor: torch.Tensor, rows: int, heads: int, head_size: int, dtype: torch.dtype) -> None:
    shape = tensor.shape
    if not (
        len(shape) == 3
        and shape[0] >= rows
        and shape[1] == heads
        and shape[2] == head_size
        and tensor.dtype == dtype
        and tensor.stride(2) == 1
        and tensor.device.type == "cpu"
    ):
        raise ValueError(
            f"{name} must be {dtype} [>= {rows}, {heads}, {head_size}] on the CPU with a contiguous last dimension, "
            f"got {_describe(tensor)}"
        )


def _check_ints(name: str, tensor: torch.Tensor, dtype: torch.dtype, rows: int) -> None:
    if not (
        tensor.ndim == 1
        and tensor.shape[0] >= rows
        and tensor.dtype == dtype
        and tensor.is_contiguous()
        and tensor.device.type == "cpu"
    ):
        raise ValueError(f"{name} must be contiguous {dtype} [>= {rows}] on the CPU, got {_describe(tensor)}")


def _check_cache(kv_cache: torch.Tensor, heads: int, head_size: int) -> None:
    expected = token_bytes(head_size)
    shape = kv_cache.shape
    if not (
        kv_cache.dtype == torch.uint8
        and len(shape) == 4
        and shape[1] == heads
        and shape[2] > 0
        and shape[2] % TILE == 0
        and shape[3] == expected
        and kv_cache.stride()[1:] == (shape[2] * expected, expected, 1)
        and kv_cache.device.type == "cpu"
    ):
        raise ValueError(
            f"kv_cache must be uint8 [num_blocks, {heads}, block_size, {expected}] on the CPU with contiguous blocks "
            f"and a block_size that is a multiple of {TILE}, got {_describe(kv_cache)}"
        )


def _dtype(name: str, tensor: torch.Tensor) -> int:
    code = DTYPES.get(tensor.dtype)
    if code is None:
        raise ValueError(f"{name} has dtype {tensor.dtype}; supported: {[str(d) for d in DTYPES]}")
    return code


def _raise(status: int) -> None:
    kind, message = ERRORS[status]
    raise kind(message)


def cache_write(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    positions: torch.Tensor,
    params: KVParams,
) -> None:
    """`ops.cache_write` on the CPU."""
    handle = _prepared.of(params)
    heads, head_size = params.k_smooth.shape
    tokens = slot_mapping.shape[0]
    dtype = _dtype("key", key)
    _check_rows("key", key, tokens, heads, head_size, key.dtype)
    _check_rows("value", value, tokens, heads, head_size, key.dtype)
    _check_ints("slot_mapping", slot_mapping, torch.int64, tokens)
    _check_ints("positions", positions, torch.int64, tokens)
    _check_cache(kv_cache, heads, head_size)
    args = CacheWrite(
        key=key.data_ptr(),
        value=value.data_ptr(),
        kv_cache=kv_cache.data_ptr(),
        slot_mapping=slot_mapping.data_ptr(),
        positions=positions.data_ptr(),
        key_stride=key.stride()[:2],
        value_stride=value.stride()[:2],
        block_stride=kv_cache.stride(0),
        num_blocks=kv_cache.shape[0],
        num_tokens=tokens,
        block_size=kv_cache.shape[2],
        dtype=dtype,
    )
    status = library().wkvquant_cache_write(byref(args), handle)
    if status:
        _raise(status)


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
) -> None:
    """`ops.paged_attention` on the CPU."""
    handle = _prepared.of(params)
    kv_heads, head_size = params.k_smooth.shape
    dtype = _dtype("query", query)
    _check(query.ndim == 3, f"query must be [T, num_heads, head_size], got {_describe(query)}")
    rows, heads = query.shape[:2]
    _check(heads > 0 and heads % kv_heads == 0, f"{heads} query heads do not share {kv_heads} KV heads evenly")
    _check_rows("query", query, rows, heads, head_size, query.dtype)
    rows = min(rows, key.shape[0], value.shape[0], out.shape[0])
    _check_rows("key", key, rows, kv_heads, head_size, query.dtype)
    _check_rows("value", value, rows, kv_heads, head_size, query.dtype)
    _check_rows("out", out, rows, heads, head_size, query.dtype)
    _check_cache(kv_cache, kv_heads, head_size)
    seqs = seq_lens.shape[0]
    _check_ints("seq_lens", seq_lens, torch.int32, seqs)
    _check_ints("query_start_loc", query_start_loc, torch.int32, seqs + 1)
    if not (
        block_table.ndim == 2
        and block_table.shape[0] >= seqs
        and block_table.dtype == torch.int32
        and block_table.stride(1) == 1
        and block_table.device.type == "cpu"
    ):
        raise ValueError(f"block_table must be int32 [>= {seqs}, max_blocks] on the CPU, got {_describe(block_table)}")
    _check(sliding_window >= 0, f"sliding_window {sliding_window} is negative")
    if lse is not None and not (
        lse.ndim == 2
        and lse.shape[0] >= rows
        and lse.shape[1] == heads
        and lse.dtype == torch.float32
        and lse.device.type == "cpu"
    ):
        raise ValueError(f"lse must be fp32 [>= {rows}, {heads}] on the CPU, got {_describe(lse)}")
    args = PagedAttention(
        query=query.data_ptr(),
        key=key.data_ptr(),
        value=value.data_ptr(),
        out=out.data_ptr(),
        lse=None if lse is None else lse.data_ptr(),
        kv_cache=kv_cache.data_ptr(),
        block_table=block_table.data_ptr(),
        seq_lens=seq_lens.data_ptr(),
        query_start_loc=query_start_loc.data_ptr(),
        query_stride=query.stride()[:2],
        key_stride=key.stride()[:2],
        value_stride=value.stride()[:2],
        out_stride=out.stride()[:2],
        lse_stride=(0, 0) if lse is None else lse.stride(),
        block_table_stride=block_table.stride(0),
        block_stride=kv_cache.stride(0),
        num_blocks=kv_cache.shape[0],
        num_tokens=rows,
        max_blocks=block_table.shape[1],
        num_seqs=seqs,
        num_heads=heads,
        block_size=kv_cache.shape[2],
        dtype=dtype,
        sliding_window=sliding_window,
        scale=scale,
    )
    status = library().wkvquant_paged_attention(byref(args), handle)
    if status:
        _raise(status)
