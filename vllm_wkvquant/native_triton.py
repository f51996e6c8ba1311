"""The `triton` variants: the ops on GPUs that the CUDA kernels do not serve, compiled by Triton on first use.

Simple rather than fast; csrc/cuda is the fast one. Importing this module fails where triton is not installed. Nothing
reaches a kernel before its tensor's shape, dtype, strides and device are checked; values on the device (slots, lengths,
block tables) are not read, so that calls can be captured into a graph once a call of the same shapes has compiled the
kernels and made the tables of the layer. With TRITON_INTERPRET=1 from the start of the process, tensors on the CPU are
taken and the kernels run in Triton's interpreter.
"""

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from vllm_wkvquant import triton_kernels
from vllm_wkvquant.arguments import Served, check_attention, check_gather, check_params, check_write
from vllm_wkvquant.layout import HEAD_SIZES, PageLayout
from vllm_wkvquant.prepared import PreparedTables
from vllm_wkvquant.reference import KVParams, hadamard_block

BASIS = 64  # tokens whose angles are tabulated, the most keys of a turn of attention's loops
MAX_PARTS = 32  # of a past, each with a program of its own
PART_KEYS = 256  # a part is no shorter
PART_ROWS = 1 << 14  # most (token, head, part) of a call that splits: 8.5 MB of workspace at head size 128
PROGRAMS = 512  # enough to fill a GPU
WRITE_ROWS = 16  # tokens of a program of the write
GATHER_ROWS = 16  # and of the gathering
NO_WINDOW = 1 << 30
INTERPRETED = not isinstance(triton_kernels.attention, triton.JITFunction)
OPERANDS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
if INTERPRETED:  # it has no products of bf16
    OPERANDS = dict.fromkeys(OPERANDS, tl.float32)


@dataclass(frozen=True)
class Prepared(Served):
    """The kernels' tables of one layer.

    shapes: their constants. write, attend: their arguments that are tables, in order, on the layer's device.
    """

    shapes: dict[str, int]
    write: tuple[torch.Tensor, ...]
    attend: tuple[torch.Tensor, ...]


def _make(params: KVParams) -> Prepared:
    device = params.k_smooth.device
    heads, head_size = params.k_smooth.shape
    check_params(params, HEAD_SIZES, "Triton")
    if device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"params are on {device}; the Triton kernels run on a GPU")
    host = params.to("cpu")
    norm = 1 / math.sqrt(hadamard_block(head_size)) if params.key_hadamard else 1.0
    turns = host.rope_turns if host.rope_turns is not None else torch.empty(0, dtype=torch.int64)
    pairs = turns.shape[0]
    shift = host.k_shift.double()
    shift[:, : 2 * pairs] *= params.rope_scaling
    k_first = shift if host.k_first is None else host.k_first.double()
    v_first = host.v_shift if host.v_first is None else host.v_first
    rotary = max(16, triton.next_power_of_2(pairs))
    angle = torch.zeros(rotary, BASIS, dtype=torch.float64)
    angle[:pairs] = turns.double()[:, None] * (2 * math.pi / 2.0**64) * torch.arange(BASIS)
    smooth = host.k_smooth.double()

    def put(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(torch.int64 if tensor.dtype == torch.int64 else torch.float32).contiguous().to(device)

    k_shift, v_shift, turns = put(shift), put(host.v_shift), put(turns)
    return Prepared(
        device=device,
        num_kv_heads=heads,
        head_size=head_size,
        shapes={
            "D": head_size,
            "COLUMNS": triton.next_power_of_2(head_size),
            "PAIRS": pairs,
            "HADAMARD": hadamard_block(head_size).bit_length() - 1 if params.key_hadamard else 0,
        },
        write=(put(norm / smooth), k_shift, v_shift, put(k_first), put(v_first), turns),
        attend=(
            put(smooth * norm),
            k_shift,
            put(k_first - shift),
            v_shift,
            put(v_first.double() - host.v_shift.double()),
            turns,
            torch.cat([_halves(angle.cos()), _halves(angle.sin())]).to(device),
        ),
    )


def _halves(x: torch.Tensor) -> torch.Tensor:
    """fp16 [2, ...] whose sum is x to 22 bits."""
    high = x.half()
    return torch.stack([high, (x - high.double()).half()])


_prepared = PreparedTables(_make)


def prepare(params: KVParams) -> Prepared:
    """The kernels' tables of `params`, made once per object: `renew` them when its tensors have changed."""
    return _prepared.of(params)


def renew(params: KVParams) -> None:
    """Make the tables of `params` again, if they were made, where they are: graphs have their addresses."""
    old = _prepared.find(params)
    if old is not None:
        new = _make(params)
        for tensor, other in zip(old.write + old.attend, new.write + new.attend, strict=True):
            tensor.copy_(other)


def refusal() -> str | None:
    """Why the kernels cannot run on the current device; None where they can."""
    if torch.version.hip is not None:
        return "Triton's need an NVIDIA GPU"
    if torch.cuda.get_device_capability() < (8, 0):
        return "Triton's need compute capability 8.0"
    return None


def _device(like: Prepared) -> Any:
    return torch.cuda.device(like.device) if like.device.type == "cuda" else contextlib.nullcontext()


def _page(like: Prepared, kv_cache: torch.Tensor) -> dict[str, int]:
    page = PageLayout(like.head_size, kv_cache.shape[2])
    return {
        "BLOCK_SIZE": page.block_size,
        "PAGE": page.nbytes,
        "V_CODES": page.v_codes,
        "K_META": page.k_meta,
        "V_META": page.v_meta,
    }


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
    tokens = slot_mapping.shape[0]
    if not tokens:
        return
    with _device(like):
        triton_kernels.write[triton.cdiv(tokens, WRITE_ROWS), like.num_kv_heads](
            key,
            value,
            kv_cache,
            slot_mapping,
            positions,
            *like.write,
            *key.stride()[:2],
            *value.stride()[:2],
            kv_cache.stride(0),
            tokens,
            kv_cache.shape[0] * kv_cache.shape[2],
            **like.shapes,
            **_page(like, kv_cache),
            ROWS=WRITE_ROWS,
        )


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
    seqs = seq_lens.shape[0]
    if not seqs or not max_keys:
        return
    with _device(like):
        triton_kernels.gather[triton.cdiv(max_keys, GATHER_ROWS), seqs, like.num_kv_heads](
            key,
            value,
            keys,
            values,
            kv_cache,
            block_table,
            seq_lens,
            query_start_loc,
            first,
            key_start_loc,
            like.attend[0],
            *like.write[1:],
            *key.stride()[:2],
            *value.stride()[:2],
            block_table.stride(0),
            kv_cache.stride(0),
            key.shape[0],
            min(keys.shape[0], values.shape[0]),
            kv_cache.shape[0],
            HEADS=like.num_kv_heads,
            **like.shapes,
            **_page(like, kv_cache),
            ROWS=GATHER_ROWS,
            num_warps=4,
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
) -> None:
    """`ops.paged_attention` on a GPU."""
    like = prepare(params)
    tokens = check_attention(
        query, key, value, kv_cache, block_table, seq_lens, query_start_loc, out, sliding_window, lse, like
    )
    seqs, heads = seq_lens.shape[0], query.shape[1]
    if not tokens or not seqs:
        return
    group = heads // like.num_kv_heads
    rows, keys, warps = _tile(tokens * group / seqs, group, like.head_size, query.dtype)
    parts = _parts(max(seqs, tokens * group // rows) * like.num_kv_heads, tokens * heads, block_table, kv_cache)
    found, found_lse, part_strides = out, lse, (0, 0)
    if parts > 1:
        found = torch.empty(parts, tokens, heads, like.head_size, dtype=torch.float32, device=like.device)
        found_lse = torch.empty(parts, tokens, heads, dtype=torch.float32, device=like.device)
        part_strides = (found.stride(0), found_lse.stride(0))
    with _device(like):
        triton_kernels.attention[tokens // (rows // group) + seqs, like.num_kv_heads, parts](
            query,
            key,
            value,
            found,
            found_lse,
            kv_cache,
            block_table,
            seq_lens,
            query_start_loc,
            *like.attend,
            *query.stride()[:2],
            *key.stride()[:2],
            *value.stride()[:2],
            *found.stride()[-3:-1],
            part_strides[0],
            *((0, 0) if found_lse is None else found_lse.stride()[-2:]),
            part_strides[1],
            block_table.stride(0),
            kv_cache.stride(0),
            tokens,
            seqs,
            kv_cache.shape[0],
            parts,
            min(sliding_window, NO_WINDOW) or NO_WINDOW,
            scale,
            **like.shapes,
            **_page(like, kv_cache),
            ROTARY=like.attend[-1].shape[1],
            GROUP=group,
            ROWS=rows,
            KEYS=keys,
            BASIS=BASIS,
            PART_TURNS=PART_KEYS // keys,
            OPERAND=OPERANDS[query.dtype],
            num_warps=warps,
            num_stages=2,
        )
        if parts > 1:
            triton_kernels.combine[tokens, heads](
                found,
                found_lse,
                out,
                lse,
                query_start_loc,
                *out.stride()[:2],
                *((0, 0) if lse is None else lse.stride()),
                tokens,
                seqs,
                HEADS=heads,
                D=like.head_size,
                COLUMNS=like.shapes["COLUMNS"],
                PARTS=parts,
            )


def _tile(per_seq: float, group: int, head_size: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """(ROWS, KEYS, warps) for a mean of `per_seq` rows: little to spill, and no more shared memory than sm_86 has."""
    rows, keys, warps = (16, 64, 4) if per_seq <= 16 else (32, 32, 4)
    if head_size > 128:
        rows, keys, warps = (16, 16, 8) if dtype == torch.float32 else (rows, 32, 8)
    needed = triton.next_power_of_2(group)
    return (rows, keys, warps) if needed <= rows else (needed, min(keys, 32), 8)


def _parts(programs: int, rows: int, block_table: torch.Tensor, kv_cache: torch.Tensor) -> int:
    """Parts of a past, a power of two: as many as fill the GPU, but none shorter than needed nor too much workspace.

    programs: those of one part; rows: (token, head) of the call. From shapes alone.
    """
    longest = block_table.shape[1] * kv_cache.shape[2]
    parts = 1
    while (
        parts < MAX_PARTS
        and parts * PART_KEYS < longest
        and parts * programs < PROGRAMS
        and 2 * parts * rows <= PART_ROWS
    ):
        parts *= 2
    return parts
