"""The `cpp` variants: the shared library of csrc/cpu through ctypes.

Nothing reaches a pointer before it is checked (arguments.py). The library is loaded on first use, after torch, so that
both share one OpenMP runtime. WKVQUANT_CPU_ISA=scalar|avx2|avx512 forces an instruction set, read once when the library
loads.
"""

import ctypes
import functools
import os
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_char_p, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_wkvquant.arguments import DTYPES, Served, check, check_attention, check_params, check_write
from vllm_wkvquant.layout import HEAD_SIZES
from vllm_wkvquant.prepared import PreparedTables
from vllm_wkvquant.reference import KVParams

LIBRARY = Path(__file__).with_name("_wkvquant_cpu.so")
ERRORS = {
    1: (ValueError, "slot_mapping has a slot beyond the last block of kv_cache"),
    2: (ValueError, "query_start_loc, seq_lens and block_table do not fit each other or the rows of query"),
    3: (ValueError, "block_table names a block that kv_cache does not have"),
    4: (MemoryError, "no memory for the workspace of paged_attention"),
    5: (ValueError, "the CPU kernels take 64 query heads to a KV head at most"),
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


@dataclass(frozen=True)
class Prepared(Served):
    """The library's tables of one layer."""

    handle: int
    aligned = False


def _make(params: KVParams) -> Prepared:
    heads, head_size = params.k_smooth.shape
    device, turns = params.k_smooth.device, params.rope_turns
    check(device.type == "cpu", f"params are on {device}; the C++ kernels run on a CPU")
    check_params(params, HEAD_SIZES, "CPU")
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
    return Prepared(device, heads, head_size, int(library().wkvquant_prepare(byref(fields))))


_prepared = PreparedTables(_make, lambda tables: library().wkvquant_release(tables.handle))


def renew(params: KVParams) -> None:
    """Make the tables of `params` again, if they were made."""
    _prepared.make_again(params)


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
    like = _prepared.of(params)
    check_write(key, value, kv_cache, slot_mapping, positions, like)
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
        num_tokens=slot_mapping.shape[0],
        block_size=kv_cache.shape[2],
        dtype=DTYPES[key.dtype],
    )
    status = library().wkvquant_cache_write(byref(args), like.handle)
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
    like = _prepared.of(params)
    rows = check_attention(
        query, key, value, kv_cache, block_table, seq_lens, query_start_loc, out, sliding_window, lse, like
    )
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
        num_seqs=seq_lens.shape[0],
        num_heads=query.shape[1],
        block_size=kv_cache.shape[2],
        dtype=DTYPES[query.dtype],
        sliding_window=sliding_window,
        scale=scale,
    )
    status = library().wkvquant_paged_attention(byref(args), like.handle)
    if status:
        _raise(status)
