"""The `cuda` variants: the shared library of csrc/cuda through ctypes.

Nothing reaches a pointer before its tensor's shape, dtype, strides and device are checked (arguments.py). What a
call needs besides its arguments (tables of a layer's parameters, a workspace for each stream) is made on first use, or
by `reserve`, which must come before a capture. A `Planner` does once a step what is the same in all of its layers.
"""

import functools
import math
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_char_p, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_wkvquant.arguments import (
    DTYPES,
    Served,
    check,
    check_attention,
    check_gather,
    check_heads,
    check_ints,
    check_lengths,
    check_params,
    check_write,
)
from vllm_wkvquant.native import LibraryError, open_library
from vllm_wkvquant.prepared import PreparedTables
from vllm_wkvquant.reference import STEP_PAIRS, KVParams, hadamard_block, slow_pairs

LIBRARY = Path(__file__).with_name("_wkvquant_cuda.so")
HEAD_SIZES = (64, 96, 128, 256)
SHARED_256 = 160 << 10  # sm_80 and sm_90 have more, sm_86, 89 and 120 99 KiB; the tables of a usual layer fit
CHUNK = 256  # csrc/cuda/common.cuh
CHEBYSHEV = 16
# Largest norm of a head's shift whose part of the scores may be rounded to fp16. At head size 128 and a random query
# the scores' standard error is 2e-3 then; rounding the keys to bf16, as a bf16 cache does, makes one of 1.6e-2.
PLAIN = 96.0
MOST_ROWS = 16  # kMaxRows, of a tile
UNIT, ITEM_WEIGHT = 32, 20  # kUnit tokens of the past, kItemWeight units
TABLED = 4  # steps whose tables the kernels keep in shared memory; csrc/cuda/api.h


class Params(Structure):
    """WkvCudaParams of csrc/cuda/api.h, which documents the fields."""

    _fields_ = [
        *[(name, c_void_p) for name in ("query_scale", "key_scale", "k_shift", "k_turned", "v_shift")],
        *[(name, c_void_p) for name in ("k_first", "v_first", "k_extra", "v_extra", "rope_turns")],
        *[(name, c_void_p) for name in ("basis", "slots", "slot_shift", "slot_turns", "chebyshev")],
        *[(name, c_int32) for name in ("num_kv_heads", "head_size", "rotary_pairs", "hadamard")],
        *[(name, c_int32) for name in ("fast_steps", "slow_steps", "plain_steps", "tabled")],
    ]


class CacheWrite(Structure):
    """WkvCudaCacheWrite of csrc/cuda/api.h."""

    _fields_ = [
        *[(name, c_void_p) for name in ("key", "value", "kv_cache", "slot_mapping", "positions")],
        *[(name, c_int64 * 2) for name in ("key_stride", "value_stride")],
        *[(name, c_int64) for name in ("block_stride", "num_blocks", "num_tokens")],
        *[(name, c_int32) for name in ("block_size", "dtype")],
    ]


class PlanStep(Structure):
    """WkvCudaPlan of csrc/cuda/api.h."""

    _fields_ = [
        *[(name, c_void_p) for name in ("seq_lens", "query_start_loc", "positions", "plan")],
        *[(name, c_int64) for name in ("num_positions", "most_past")],
        *[(name, c_int32) for name in ("num_seqs", "num_planned", "num_tokens")],
        *[(name, c_int32) for name in ("num_heads", "num_kv_heads", "head_size")],
        *[(name, c_int32) for name in ("queries", "teams", "num_sms", "sliding_window")],
    ]


class PagedAttention(Structure):
    """WkvCudaAttention of csrc/cuda/api.h."""

    _fields_ = [
        *[(name, c_void_p) for name in ("query", "key", "value", "out", "lse", "kv_cache")],
        *[(name, c_void_p) for name in ("block_table", "plan", "workspace")],
        *[(f"{name}_stride", c_int64 * 2) for name in ("query", "key", "value", "out", "lse")],
        *[(name, c_int64) for name in ("block_table_stride", "block_stride", "num_blocks")],
        *[(name, c_int32) for name in ("num_heads", "block_size", "dtype")],
        *[(name, c_int32) for name in ("sliding_window", "queries", "teams", "num_sms")],
        ("scale", c_float),
        ("after_write", c_int32),
    ]


class Gather(Structure):
    """WkvCudaGather of csrc/cuda/api.h."""

    _fields_ = [
        *[(name, c_void_p) for name in ("key", "value", "keys", "values", "kv_cache")],
        *[(name, c_void_p) for name in ("block_table", "seq_lens", "query_start_loc", "first", "key_start_loc")],
        *[(f"{name}_stride", c_int64 * 2) for name in ("key", "value")],
        *[(name, c_int64) for name in ("block_table_stride", "block_stride", "num_blocks", "num_tokens", "num_keys")],
        *[(name, c_int32) for name in ("max_keys", "num_seqs", "block_size", "dtype")],
    ]


INSTALL = "pip install --force-reinstall --no-deps .` in a checkout of vllm-wkvquant, with nvcc on PATH"
BUILD = f"`WKVQUANT_CUDA=1 {INSTALL}"
STRUCTS = (Params, CacheWrite, PlanStep, PagedAttention, Gather)  # in the order of wkvquant_cuda_sizeof
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "wkvquant_cuda_sizeof": (c_int64, [c_int32]),
    "wkvquant_cuda_cache_write": (c_int32, [POINTER(CacheWrite), POINTER(Params), c_void_p]),
    "wkvquant_cuda_gather_kv": (c_int32, [POINTER(Gather), POINTER(Params), c_void_p]),
    "wkvquant_cuda_paged_attention": (c_int32, [POINTER(PagedAttention), POINTER(Params), c_void_p]),
    "wkvquant_cuda_plan": (c_int32, [POINTER(PlanStep), c_void_p]),
    "wkvquant_cuda_teams": (c_int32, [POINTER(Params), c_int32, c_int32, c_int64]),
    "wkvquant_cuda_shared_bytes": (c_int64, [POINTER(Params), c_int32, c_int32]),
    "wkvquant_cuda_workspace": (c_int64, []),
    "wkvquant_cuda_plan_bytes": (c_int64, []),
    "wkvquant_cuda_max_seqs": (c_int32, []),
    "wkvquant_cuda_error": (c_char_p, [c_int32]),
    "wkvquant_cuda_archs": (c_char_p, []),
}


def available() -> bool:
    """Whether this build has the library. Touches no driver: vLLM forks after importing plugins."""
    return LIBRARY.exists()


@functools.cache
def library() -> Any:
    """The loaded library. Raises FileNotFoundError where it was not built, LibraryError where it is not
    of this version."""
    if not available():
        raise FileNotFoundError(f"{LIBRARY.name} is not built; build it with {BUILD}")
    return load(LIBRARY)


def load(path: Path) -> Any:
    """The library of a build of this version's interface. Raises LibraryError for another."""
    return open_library(path, FUNCTIONS, STRUCTS, BUILD)


@dataclass(frozen=True)
class Prepared(Served):
    """The kernels' tables of one layer; `tensors` keeps alive what `fields` points to."""

    fields: Params
    tensors: dict[str, torch.Tensor]


def _chebyshev_coefficients(half_angles: torch.Tensor) -> torch.Tensor:
    """[n, 16]: even degrees of cos(a x) and odd degrees of sin(a x) over x in [-1, 1], for angles a [n], float64."""
    degree = torch.arange(CHEBYSHEV, dtype=torch.float64)
    node = math.pi * (degree + 0.5) / CHEBYSHEV
    angle = half_angles[:, None] * node.cos()
    values = torch.stack([angle.cos(), angle.sin()], 1)  # [n, 2, nodes]
    sums = values @ torch.cos(degree[:, None] * node).T * (2 / CHEBYSHEV)
    sums[..., 0] /= 2
    return torch.where(degree.long() % 2 == 0, sums[:, 0], sums[:, 1])


def _operand_a(rows: torch.Tensor, other: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """matrix float64 [n, 16 * steps] as high and low fp16 in the order in which mma threads hold operand A.

    rows, other: int64 [*tiles, 8], rows of the matrix that are rows g and g + 8 of a tile. Returns int32
    [*tiles, steps, (high, low), 32 lanes, 4].
    """
    high = matrix.half()
    parts = torch.stack([high, (matrix - high.double()).half()])  # [2, n, columns]
    lane = torch.arange(32)
    register, half = torch.arange(4), torch.arange(2)
    # register 0: (row g, k 2t + half), 1: row g + 8, 2: k + 8, 3: both
    row = torch.where(register % 2 == 0, rows[..., lane // 4, None], other[..., lane // 4, None])  # [*tiles, 32, 4]
    k = 2 * (lane % 4)[:, None, None] + half + 8 * (register // 2)[:, None]  # [32, 4, 2]
    column = 16 * torch.arange(matrix.shape[1] // 16)[:, None, None, None] + k  # [steps, 32, 4, 2]
    out = parts[:, row[..., None, :, :, None], column]  # [2, *tiles, steps, 32, 4, 2]
    return out.movedim(0, -4).contiguous().view(torch.int32).squeeze(-1)


def _make(params: KVParams) -> Prepared:
    device = params.k_smooth.device
    heads, head_size = params.k_smooth.shape
    check_params(params, HEAD_SIZES, "CUDA")
    host = params.to("cpu")
    norm = 1 / math.sqrt(hadamard_block(head_size)) if params.key_hadamard else 1.0
    shift = host.k_shift.double()
    turns = host.rope_turns if host.rope_turns is not None else torch.empty(0, dtype=torch.int64)
    pairs = turns.shape[0]
    shift[:, : 2 * pairs] *= params.rope_scaling
    theta = turns.double() * (2 * math.pi / 2.0**64)
    used = ((shift[:, :pairs] != 0) | (shift[:, pairs : 2 * pairs] != 0)).any(0)
    half = CHUNK / 2
    is_slow = slow_pairs(turns)  # at most 5 radians over half a chunk, which 16 Chebyshev polynomials stand for
    fast, slow = torch.nonzero(used & ~is_slow).flatten(), torch.nonzero(used & is_slow).flatten()
    if slow.numel() <= STEP_PAIRS:  # as many functions as they are worth
        fast, slow = torch.cat([fast, slow]), slow[:0]
    elif room := -fast.numel() % STEP_PAIRS:
        fast, slow = torch.cat([fast, slow[:room]]), slow[room:]
    fast_steps, slow_steps = -(-fast.numel() // 8), -(-slow.numel() // 8)
    steps = fast_steps + (slow_steps > 0)
    size = shift[:, : 2 * pairs].unflatten(-1, (2, pairs)).norm(dim=1)  # [heads, pairs]
    fast = fast[size.amax(0)[fast].argsort(stable=True)]
    if size.norm(dim=1).amax() <= PLAIN:
        plain_steps = steps
    else:
        plain_steps = int((size[:, fast].square().cumsum(1).amax(0) <= PLAIN**2).sum()) // 8
    slots = torch.full((8 * (fast_steps + slow_steps),), -1, dtype=torch.int64)
    slots[: fast.numel()] = fast
    slots[8 * fast_steps : 8 * fast_steps + slow.numel()] = slow
    padding, slots = slots < 0, slots.clamp_min(0)
    slot_turns = turns[slots] if pairs else slots
    slot_shift = torch.stack([shift[:, slots], shift[:, (slots + pairs) % head_size]], -1)
    slot_shift[:, padding] = 0
    x = torch.arange(CHUNK // 2, dtype=torch.float64) + 0.5  # the other half of the chunk mirrors this one
    functions = torch.zeros(CHUNK // 2, 16 * steps, dtype=torch.float64)
    functions[:, 0 : 2 * fast.numel() : 2] = (x[:, None] * theta[fast]).cos()
    functions[:, 1 : 2 * fast.numel() : 2] = (x[:, None] * theta[fast]).sin()
    chebyshev = torch.zeros(CHEBYSHEV, 16 * slow_steps, dtype=torch.float64)
    if slow_steps:
        functions[:, -CHEBYSHEV:] = torch.cos(torch.arange(CHEBYSHEV) * torch.acos(x / half)[:, None])
        coefficients = _chebyshev_coefficients(theta[slow] * half).T  # [degrees, pairs]
        chebyshev[0::2, 0 : 2 * slow.numel() : 2] = coefficients[0::2]
        chebyshev[1::2, 1 : 2 * slow.numel() : 2] = coefficients[1::2]
    # rows g and g + 8 of m-tile x of a group of 32 are tokens 4g + 2x and the next
    token = 32 * torch.arange(4)[:, None, None] + 2 * torch.arange(2)[:, None] + 4 * torch.arange(8)
    degree = torch.arange(8)
    basis = _operand_a(token, token + 1, functions).transpose(1, 2)
    chebyshev = _operand_a(degree, degree + 8, chebyshev)
    tabled = 0 < steps <= TABLED and plain_steps == steps
    if tabled:
        pieces = basis[..., 0, :, :], chebyshev[:, 0], slot_turns.contiguous().view(torch.int32)
        basis = torch.cat([x.flatten() for x in pieces])
    tensors = {
        "query_scale": (host.k_smooth.double() * norm).float(),
        "key_scale": (norm / host.k_smooth.double()).float(),
        "k_shift": shift.float(),
        "k_turned": torch.cat([-shift[:, pairs : 2 * pairs], shift[:, :pairs], 0 * shift[:, 2 * pairs :]], 1).float(),
        "v_shift": host.v_shift.float(),
        "rope_turns": turns,
        "basis": basis,
        "slots": slots.int(),
        "slot_shift": slot_shift.float(),
        "slot_turns": slot_turns,
        "chebyshev": chebyshev,
    }
    if host.k_first is not None and host.v_first is not None:
        tensors["k_first"], tensors["v_first"] = host.k_first.float(), host.v_first.float()
        tensors["k_extra"] = (host.k_first.double() - shift).float()
        tensors["v_extra"] = (host.v_first.double() - host.v_shift.double()).float()
    tensors = {name: tensor.contiguous().to(device) for name, tensor in tensors.items()}
    fields = Params(
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        num_kv_heads=heads,
        head_size=head_size,
        rotary_pairs=pairs,
        hadamard=params.key_hadamard,
        fast_steps=fast_steps,
        slow_steps=slow_steps,
        plain_steps=plain_steps,
        tabled=tabled,
    )
    return Prepared(device, heads, head_size, fields, tensors)


_prepared = PreparedTables(_make)


def prepare(params: KVParams) -> Prepared:
    """The kernels' tables of `params`, made once per object: `renew` them when its tensors have changed."""
    return _prepared.of(params)


def renew(params: KVParams, new: KVParams) -> None:
    """Put the tables of `new` where those of `params` are, if they were made: graphs and planners have their addresses.

    Raises ValueError, with nothing changed, where a graph would not fit the new ones.
    """
    old = _prepared.find(params)
    if old is None:
        return
    made = _make(new)
    check(
        _constants(old) == _constants(made),
        "the new shift of keys has other rotary pairs than the kernels are prepared for; restart the engine",
    )
    for name, tensor in old.tensors.items():
        tensor.copy_(made.tensors[name])


def _constants(tables: Prepared) -> tuple[list[int], dict[str, torch.Size]]:
    """What graphs and planners have copies of: the numbers among the fields, and the shapes of the tables."""
    numbers = [getattr(tables.fields, field[0]) for field in Params._fields_ if field[1] is c_int32]
    return numbers, {name: tensor.shape for name, tensor in tables.tensors.items()}


def refusal(head_size: int) -> str | None:
    """Why the kernels cannot run on the current device; None where they can."""
    try:
        library()
    except (FileNotFoundError, LibraryError) as error:
        return str(error)
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < (8, 0):
        return "they need compute capability 8.0"
    archs = architectures()
    if not any(_runs_on(arch, major, minor) for arch in archs):
        has = ", ".join(f"sm_{arch}" for arch in archs)
        return (
            f"{LIBRARY.name} has code for {has}, none for this GPU's sm_{major}{minor}: rebuild it with "
            f"`WKVQUANT_CUDA=1 WKVQUANT_CUDA_ARCHS={major}{minor} {INSTALL}"
        )
    if head_size not in HEAD_SIZES:
        return f"they have head sizes {list(HEAD_SIZES)}, not {head_size}"
    if head_size == 256 and _shared_memory(torch.device("cuda")) < SHARED_256:
        return f"they need {SHARED_256 >> 10} KiB of shared memory for head size 256"
    return None


def architectures() -> list[str]:
    """What the library has code for, as in sm_<architecture>."""
    return library().wkvquant_cuda_archs().decode().split("_")


def _runs_on(arch: str, major: int, minor: int) -> bool:
    """Whether code for sm_<arch> runs on a compute capability: of the same major one, but for `a` on no newer one."""
    number, exact = arch.rstrip("af"), arch.endswith("a")
    of_major, of_minor = divmod(int(number), 10)
    return major == of_major and (minor == of_minor if exact else minor >= of_minor)


def _shared_memory(device: torch.device) -> int:
    """Most bytes of a CTA."""
    properties: Any = torch.cuda.get_device_properties(device)  # the stubs lack the field
    return int(properties.shared_memory_per_block_optin)


@dataclass(frozen=True)
class Workspace:
    """Partial results, and the plan of calls that are given none."""

    partial: torch.Tensor
    plan: torch.Tensor


# A workspace must start as zeros and serve one stream. Memory made while a stream captures would be zeroed by the
# replays of that one graph alone, so a stream that is first seen capturing takes one of the device's spare ones.
_workspaces: dict[tuple[torch.device, int], Workspace] = {}
_spares: dict[torch.device, list[Workspace]] = {}
SPARES = 2  # a step is captured on one stream, or on two where vLLM overlaps two halves of a batch


def _new_workspace(device: torch.device) -> Workspace:
    partial = torch.zeros(library().wkvquant_cuda_workspace(), dtype=torch.uint8, device=device)
    return Workspace(partial, _new_plan(device))


def _new_plan(device: torch.device) -> torch.Tensor:
    return torch.empty(library().wkvquant_cuda_plan_bytes(), dtype=torch.uint8, device=device)


def _workspace(device: torch.device, stream: int) -> Workspace:
    found = _workspaces.get((device, stream))
    if found is None:
        if torch.cuda.is_current_stream_capturing():
            if not _spares.get(device):
                raise RuntimeError("paged_attention: no workspace is left for a captured stream; call reserve() first")
            found = _spares[device].pop()
        else:
            found = _new_workspace(device)
        _workspaces[device, stream] = found
    return found


def reserve(params: KVParams, max_seqs: int) -> None:
    """Make what calls with `params` need, on the device's first stream or captured on another.

    max_seqs: sequences of the largest call. Raises ValueError where the kernels do not take so many. A graph keeps the
    addresses of the tables: `params` must outlive it.
    """
    device, most = prepare(params).device, library().wkvquant_cuda_max_seqs()
    check(
        max_seqs <= most,
        f"the CUDA kernels take {most} sequences at once, not {max_seqs}; allow fewer (--max-num-seqs) or serve with "
        "an explicit --kv-cache-dtype",
    )
    with torch.cuda.device(device):
        spares = _spares.setdefault(device, [])
        while len(spares) < SPARES and not torch.cuda.is_current_stream_capturing():
            spares.append(_new_workspace(device))  # anew where earlier captures took them
        # steps run on the first stream; others are for captures, which may never call the kernels
        if all(of != device for of, _ in _workspaces):
            _workspace(device, torch.cuda.current_stream().cuda_stream)


@functools.cache
def _num_sms(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _raise(op: str, status: int) -> None:
    raise RuntimeError(f"{op}: CUDA error {status}, {library().wkvquant_cuda_error(status).decode()}")


def cache_write(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    positions: torch.Tensor,
    params: KVParams,
) -> None:
    """`ops.cache_write` on a GPU. Slots beyond the last block are skipped."""
    like = prepare(params)
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
    with torch.cuda.device(like.device):
        stream = torch.cuda.current_stream().cuda_stream
        status = library().wkvquant_cuda_cache_write(byref(args), byref(like.fields), stream)
    if status:
        _raise("cache_write", status)


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
    """`ops.gather_kv` on a GPU. Rows beyond `keys` are left out."""
    like = prepare(params)
    check_gather(key, value, kv_cache, block_table, seq_lens, query_start_loc, first, key_start_loc, keys, values, like)
    args = Gather(
        key=key.data_ptr(),
        value=value.data_ptr(),
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        kv_cache=kv_cache.data_ptr(),
        block_table=block_table.data_ptr(),
        seq_lens=seq_lens.data_ptr(),
        query_start_loc=query_start_loc.data_ptr(),
        first=first.data_ptr(),
        key_start_loc=key_start_loc.data_ptr(),
        key_stride=key.stride()[:2],
        value_stride=value.stride()[:2],
        block_table_stride=block_table.stride(0),
        block_stride=kv_cache.stride(0),
        num_blocks=kv_cache.shape[0],
        num_tokens=key.shape[0],
        num_keys=min(keys.shape[0], values.shape[0]),
        max_keys=max_keys,
        num_seqs=seq_lens.shape[0],
        block_size=kv_cache.shape[2],
        dtype=DTYPES[key.dtype],
    )
    with torch.cuda.device(like.device):
        stream = torch.cuda.current_stream().cuda_stream
        status = library().wkvquant_cuda_gather_kv(byref(args), byref(like.fields), stream)
    if status:
        _raise("gather_kv", status)


@dataclass(frozen=True)
class Plan(Served):
    """Who does what in the attention of one step's sequences, for every layer that has these heads and this window.

    `tensor` is written on the device, by the stream that `Planner.plan` was called on, and again by each later call.
    """

    tensor: torch.Tensor
    num_heads: int
    sliding_window: int
    num_seqs: int
    num_tokens: int
    most_past: int
    queries: int
    teams: int


class Planner:
    """Plans a step once for all of its layers, and finds the positions of its tokens, in one kernel.

    layers: parameters of each layer, all of the same heads. num_heads: query heads of each. The plan lives in one
    buffer for good, so that a replayed graph finds the fresh one where it looked before.
    """

    def __init__(
        self, layers: Sequence[KVParams], num_heads: int, sliding_window: int = 0, tensor: torch.Tensor | None = None
    ) -> None:
        tables = [prepare(params) for params in layers]
        served = {Served(x.device, x.num_kv_heads, x.head_size) for x in tables}
        check(len(served) == 1, "layers of one plan must have the same heads and device")
        self.like = served.pop()
        check_heads(num_heads, self.like.num_kv_heads)
        self.num_heads, self.sliding_window = num_heads, sliding_window
        self.tensor = _new_plan(self.like.device) if tensor is None else tensor
        self._fields = [x.fields for x in tables]
        self._teams: dict[int, int] = {}

    def plan(
        self,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        num_planned: int,
        num_tokens: int,
        most_past: int,
        positions: torch.Tensor | None = None,
    ) -> Plan:
        """The plan of the first `num_planned` sequences, whose queries are among the step's first `num_tokens` tokens.

        query_start_loc, seq_lens: as in `ops.paged_attention`, of all sequences of the step. most_past: tokens that a
        row of the block table has room for. positions: int64 [T], written as `reference.token_positions` does.
        Sequences whose queries lie beyond num_tokens are skipped. Raises ValueError where so many tokens, each with a
        past of most_past, would be more work than the kernels can count.
        """
        like, lib = self.like, library()
        seqs, most = seq_lens.shape[0], lib.wkvquant_cuda_max_seqs()
        check(0 <= num_planned <= seqs, f"{num_planned} of {seqs} sequences cannot be planned")
        check(num_planned <= most, f"{num_planned} sequences are more than the {most} that the CUDA kernels take")
        check_lengths(seq_lens, query_start_loc, like)
        if positions is not None:
            check_ints("positions", positions, torch.int64, 0, like.device)
        queries = -(-num_tokens // max(num_planned, 1))
        self._check_work(num_planned, num_tokens, most_past, queries)
        with torch.cuda.device(like.device):
            teams = self._teams_for(queries)
            args = PlanStep(
                seq_lens=seq_lens.data_ptr(),
                query_start_loc=query_start_loc.data_ptr(),
                positions=None if positions is None else positions.data_ptr(),
                plan=self.tensor.data_ptr(),
                num_positions=0 if positions is None else positions.shape[0],
                most_past=most_past,
                num_seqs=seqs,
                num_planned=num_planned,
                num_tokens=num_tokens,
                num_heads=self.num_heads,
                num_kv_heads=like.num_kv_heads,
                head_size=like.head_size,
                queries=queries,
                teams=teams,
                num_sms=_num_sms(like.device),
                sliding_window=self.sliding_window,
            )
            status = lib.wkvquant_cuda_plan(byref(args), torch.cuda.current_stream().cuda_stream)
        if status:
            _raise("plan", status)
        return Plan(
            like.device, like.num_kv_heads, like.head_size, self.tensor, self.num_heads, self.sliding_window,
            num_planned, num_tokens, most_past, queries, teams,
        )  # fmt: skip

    def check_steps(self, max_seqs: int, max_tokens: int, most_past: int) -> None:
        """Raise ValueError where a step of up to so many sequences and tokens could be too much work for `plan`."""
        for queries in range(1, MOST_ROWS + 1):  # shorter ones are in smaller tiles, so that fewer can be more work
            self._check_work(max_seqs, min(max_seqs * queries, max_tokens), most_past, queries)
        self._check_work(max_seqs, max_tokens, most_past, MOST_ROWS)

    def _check_work(self, num_planned: int, num_tokens: int, most_past: int, queries: int) -> None:
        if self._most_work(num_planned, num_tokens, most_past, queries) >= 1 << 31:
            raise ValueError(
                f"a step of {num_tokens} tokens that may each have a past of {most_past} is more work than the CUDA "
                "kernels can count; lower --max-num-seqs, --max-num-batched-tokens or --max-model-len"
            )

    def _most_work(self, num_planned: int, num_tokens: int, most_past: int, queries: int) -> int:
        """Upper bound of the length of the plan's line (csrc/cuda/attention_plan.cuh), which is counted in 32 bits."""
        kv_heads, window = self.like.num_kv_heads, self.sliding_window
        group = self.num_heads // kv_heads
        # rows of a tile, as with_shape of attention_kernel.cuh has them
        rows = 4 if queries * group <= 4 else 8 if queries * group <= 8 or self.like.head_size > 128 else MOST_ROWS
        tiles = (num_tokens * group + (rows - 1) * min(num_planned, num_tokens)) // rows
        units = max(-(-most_past // UNIT), 1)
        if window:
            units = min(units, (window + UNIT - 3) // UNIT + 1)  # that window - 1 tokens are in, wherever they begin
        return tiles * kv_heads * (units + ITEM_WEIGHT)

    def _teams_for(self, queries: int) -> int:
        """Teams of warps that a CTA has room for in every layer."""
        queries = min(queries, MOST_ROWS)  # more make no difference
        if queries not in self._teams:
            most = _shared_memory(self.like.device)
            of_layers = [library().wkvquant_cuda_teams(byref(x), self.num_heads, queries, most) for x in self._fields]
            check(min(of_layers) > 0, f"{most} bytes of shared memory on {self.like.device} are too few")
            self._teams[queries] = min(of_layers)
        return self._teams[queries]


def _check_plan(
    plan: Plan, like: Served, heads: int, sliding_window: int, seqs: int, rows: int, most_past: int
) -> None:
    wanted = (like.device, like.num_kv_heads, like.head_size, heads, sliding_window)
    has = (plan.device, plan.num_kv_heads, plan.head_size, plan.num_heads, plan.sliding_window)
    check(
        has == wanted,
        f"a plan for (device, KV heads, head size, heads, window) {has} does not fit a layer that has {wanted}",
    )
    check(
        plan.num_seqs <= seqs and plan.num_tokens <= rows and plan.most_past <= most_past,
        f"a plan of {plan.num_seqs} sequences and {plan.num_tokens} tokens over at most {plan.most_past} does not fit "
        f"{seqs} sequences, {rows} rows and a block table of {most_past} tokens",
    )


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
    after_write: bool = False,
    plan: Plan | None = None,
) -> None:
    """`ops.paged_attention` on a GPU. Sequences whose queries lie beyond the rows of query are skipped."""
    like = prepare(params)
    rows = check_attention(
        query, key, value, kv_cache, block_table, seq_lens, query_start_loc, out, sliding_window, lse, like
    )
    seqs, heads, most_past = seq_lens.shape[0], query.shape[1], block_table.shape[1] * kv_cache.shape[2]
    if seqs == 0 or rows == 0:
        return
    with torch.cuda.device(like.device):
        stream = torch.cuda.current_stream().cuda_stream
        workspace = _workspace(like.device, stream)
        if plan is None:
            planner = Planner([params], heads, sliding_window, workspace.plan)
            plan = planner.plan(query_start_loc, seq_lens, seqs, rows, most_past)
            after_write = False  # what ran last is the planner
        else:
            _check_plan(plan, like, heads, sliding_window, seqs, rows, most_past)
        args = PagedAttention(
            query=query.data_ptr(),
            key=key.data_ptr(),
            value=value.data_ptr(),
            out=out.data_ptr(),
            lse=None if lse is None else lse.data_ptr(),
            kv_cache=kv_cache.data_ptr(),
            block_table=block_table.data_ptr(),
            plan=plan.tensor.data_ptr(),
            workspace=workspace.partial.data_ptr(),
            query_stride=query.stride()[:2],
            key_stride=key.stride()[:2],
            value_stride=value.stride()[:2],
            out_stride=out.stride()[:2],
            lse_stride=(0, 0) if lse is None else lse.stride(),
            block_table_stride=block_table.stride(0),
            block_stride=kv_cache.stride(0),
            num_blocks=kv_cache.shape[0],
            num_heads=heads,
            block_size=kv_cache.shape[2],
            dtype=DTYPES[query.dtype],
            sliding_window=sliding_window,
            queries=plan.queries,
            teams=plan.teams,
            num_sms=_num_sms(like.device),
            scale=scale,
            after_write=after_write,
        )
        status = library().wkvquant_cuda_paged_attention(byref(args), byref(like.fields), stream)
    if status:
        _raise("paged_attention", status)
