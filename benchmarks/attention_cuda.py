"""The GPU's part of attention.py: the CUDA kernels against FlashAttention 3 and the 4-bit caches of vLLM.

Every time is the median over replays of a CUDA graph of many calls, each on the next of several copies of the cache,
together larger than three times the L2 cache. Decode counts everything from roped q, k, v to the output but the write;
`write+decode` rows have both (max_error: against the two not overlapped).
What is made once a step for all layers is not in it: our plan and positions of tokens, a peer's scheduler metadata.
Those are `plan` rows.

Prefill is a chunk of one sequence over its past: `cuda` and `triton` are what the plugin does, keys and values
gathered by our kernel, FlashAttention over them, and vLLM's merge where they do not fit the workspace; `cuda-gather`
the gathering alone; `cuda-decode` the kernel of decodes, which takes any chunk; `fa3-bf16` FlashAttention 3 over a bf16
cache.

bytes of decode are those of past tokens, which must be read; read_fraction is bytes over time over B, the better of a
2 GiB device copy (read + written) and 2 GiB read-only reductions in the same process, the `bandwidth` rows; where an
H100 or H200 reads less than LEAST_BANDWIDTH, nothing else is measured. max_error
is against an fp64 reference over what the variant's cache holds, for the first sequence and KV head (prefill: and
its first queries). A peer that fails
gives a row with an `error` and no time.

    python benchmarks/attention.py --device cuda --op decode --no-peers --build old=a.so --build new=b.so

times decode (--build-ops decode,write+decode: both) with several builds of csrc/cuda, whose interface must be this
version's, in turns on the same caches; us is the median of their turns.
"""

import argparse
import contextlib
import functools
import importlib.util
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from rows import DTYPE, HEAD_SIZE, HEADS, PER_HEAD, Row, make_params, random_kv

from vllm_wkvquant import layout, native_cuda, ops, reference

COLD_BYTES = 160 << 20
SCALE = HEAD_SIZE**-0.5
BASE = 5e5  # of the rotary embedding, Llama 3's
PAGE = 16  # of the other peers' caches, vLLM's default
FILL = 8192  # tokens written at once
TURNS = 3  # of each build
LEAST_BANDWIDTH = {"H100 80GB HBM3": 2800, "H200": 4000}  # GB/s that an idle one reaches
SHAPES = (
    "8x1x1024,8x16x1024,8x64x1024,8x1x8192,8x1x32768,8x1x131072,8x16x8192,8x64x2048,8x8x32768,"
    "32x1x32768,32x8x32768,32x64x1024,4x8x32768"
)

Call = Callable[[int], object]  # on a copy of the cache


@dataclass(frozen=True)
class Build:
    """A library of the kernels, and its workspaces."""

    name: str
    path: Path
    workspaces: dict[tuple[torch.device, int], native_cuda.Workspace] = field(default_factory=dict)

    @functools.cached_property
    def library(self) -> Any:
        return native_cuda.load(self.path)

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Calls run this build."""
        with (
            mock.patch.object(native_cuda, "library", return_value=self.library),
            mock.patch.object(native_cuda, "_workspaces", self.workspaces),
        ):
            yield


def build(text: str) -> Build:
    """NAME=PATH of the command line."""
    name, _, path = text.partition("=")
    if not (name and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    if not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"{path} is not a file")
    return Build(name, Path(path).resolve())


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """Options of this module."""

    def ints(text: str) -> list[int]:
        return [int(x) for x in text.split(",") if x]

    group.add_argument("--shapes", default=SHAPES, help="KV heads x batch x context")
    group.add_argument("--blocks", type=ints, default=[64], help="block sizes of our cache")
    group.add_argument("--pages", type=ints, default=[16, 128], help="page sizes of FlashAttention's cache to try")
    group.add_argument("--splits", type=ints, default=[0, 2, 4, 8, 16, 32], help="num_splits of FlashAttention to try")
    group.add_argument("--kinds", type=lambda s: s.split(","), default=["rotating"], help="shifts, of rows.py")
    group.add_argument("--prefills", default="8x2048x32768,8x512x8192", help="KV heads x chunk x past")
    group.add_argument(
        "--variants", type=lambda s: s.split(","), default=["cuda"], help="ours of decode and prefill: cuda, triton"
    )
    group.add_argument("--decode-chunks", type=int, default=128, help="longest chunk for the kernel of decodes, too")
    group.add_argument("--writes", type=ints, default=[1, 64, 8192], help="tokens of a cache write")
    group.add_argument(
        "--build", action="append", default=[], type=build, metavar="NAME=PATH", help="libraries to compare in decode"
    )
    group.add_argument(
        "--build-ops", type=lambda s: s.split(","), default=["decode"], help="of builds: decode, write+decode"
    )
    group.add_argument("--seconds", type=float, default=0.1, help="of a build's turn")
    group.add_argument("--no-peers", action="store_true", help="ours alone, where vLLM is not installed")


@functools.cache
def capture_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def timed(call: Call, copies: int, seconds: float = 0.1) -> float:
    """Median microseconds of a call; the copies take turns."""
    for i in range(2):
        call(i % copies)
    torch.cuda.synchronize()
    start = time.perf_counter()
    tries = min(copies, 4)
    for i in range(tries):
        call(i)
    torch.cuda.synchronize()
    estimate = max((time.perf_counter() - start) / tries, 5e-6)
    count = copies * max(1, math.ceil(5e-4 / estimate / copies))
    graph = torch.cuda.CUDAGraph()
    stream = capture_stream()
    with torch.cuda.stream(stream):
        call(0)  # what a stream needs of its own is made before the capture
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(count):
                call(i % copies)
    replays = min(max(5, round(seconds / (estimate * count))), 100)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    graph.replay()
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) * 1e3 / count for a, b in itertools.pairwise(events))


def attempt(row: Row, measure: Callable[[Row], None]) -> Row:
    """The row, completed by `measure`, or with the error that ended it. An error that the device keeps is raised."""
    try:
        measure(row)
    except Exception as error:
        row.error = f"{type(error).__name__}: {error}"[:300]
    torch.cuda.synchronize()
    return row


def bandwidth_rows() -> list[Row]:
    """A copy (read + written) and reductions of 2 GiB."""
    a = torch.randn(1 << 29, device="cuda")
    b = torch.empty_like(a)
    device = torch.cuda.get_device_name()
    found = []
    for variant, call, moved in (
        ("copy", lambda i: b.copy_(a), 2 * a.nbytes),
        ("sum", lambda i: a.sum(), a.nbytes),
        ("amax", lambda i: a.amax(), a.nbytes),
    ):
        us = timed(call, 1)
        row = Row(op="bandwidth", variant=variant, device=device, batch=0, context=0, num_kv_heads=0)
        found.append(replace(row, us=us, bytes=moved, gbps=moved / us / 1e3))
    return found


def slots_of(table: torch.Tensor, first: int, count: int, block_size: int) -> torch.Tensor:
    """int64 slots of positions first .. first + count - 1 of the sequence that `table` [max_blocks] is of."""
    p = torch.arange(first, first + count, device="cuda")
    return table[p // block_size].long() * block_size + p % block_size


class Decode:
    """Inputs of a step that decodes one token of `batch` equal sequences, and block tables of copies of the cache."""

    def __init__(self, kv_heads: int, batch: int, context: int) -> None:
        self.kv_heads, self.batch, self.context, self.past = kv_heads, batch, context, context - 1
        self.params = make_params(kv_heads, BASE).to("cuda")
        self.token = layout.token_bytes(HEAD_SIZE) * kv_heads
        self.copies = math.ceil(COLD_BYTES / (batch * self.past * self.token))
        self.query = torch.randn(batch, HEADS, HEAD_SIZE, device="cuda").to(DTYPE)
        self.key, self.value = random_kv(self.params, torch.full((batch,), self.past, device="cuda"))
        self.seq_lens = torch.full((batch,), context, dtype=torch.int32, device="cuda")
        self.starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
        self.out = torch.empty_like(self.query)

    def tables(self, block_size: int) -> torch.Tensor:
        """int32 [copies, batch, max_blocks], shuffled."""
        blocks = math.ceil(self.context / block_size)
        order = torch.randperm(self.copies * self.batch * blocks, device="cuda")
        return order.int().view(self.copies, self.batch, blocks)

    def fill(self, caches: list["Cache"]) -> None:
        """Write the same past into every copy of every cache, and this step's token into those that read it there."""
        for first in range(0, self.past, FILL):
            positions = torch.arange(first, min(first + FILL, self.past), device="cuda")
            for i in range(self.batch):
                key, value = random_kv(self.params, positions)
                for cache, c in itertools.product(caches, range(self.copies)):
                    cache.write(key, value, slots_of(cache.table[c, i], first, len(positions), cache.block), positions)
        position = torch.tensor([self.past], device="cuda")
        for cache, c, i in itertools.product(caches, range(self.copies), range(self.batch)):
            if cache.holds_current:
                slot = slots_of(cache.table[c, i], self.past, 1, cache.block)
                cache.write(self.key[i : i + 1], self.value[i : i + 1], slot, position)

    def slots(self, table: torch.Tensor, block_size: int) -> list[torch.Tensor]:
        """int64 [batch] of this step's tokens, in every copy of `table` [copies, batch, max_blocks]."""
        return [copy[:, self.past // block_size].long() * block_size + self.past % block_size for copy in table]

    def exact(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """fp64 attention of the first sequence and KV head; keys, values: [context, head_size]."""
        rows = query[0, : HEADS // self.kv_heads].double()
        return torch.softmax(rows @ keys.double().T * SCALE, -1) @ values.double()

    def error(self, expected: torch.Tensor) -> float:
        """Largest difference of `out` to `expected` [group, head_size]."""
        return (self.out[0, : HEADS // self.kv_heads].double() - expected).abs().max().item()


class Cache:
    """A variant's cache of a step: `write` fills it, `attend` reads a copy of it."""

    holds_current = True
    block = PAGE

    def __init__(self, step: Decode) -> None:
        self.step = step
        self.table = step.tables(self.block)
        self.blocks = self.table.numel()


class Ours(Cache):
    """The 4-bit pages of this package."""

    holds_current = False

    def __init__(self, step: Decode, block: int) -> None:
        self.block = block
        super().__init__(step)
        shape = (self.blocks, step.kv_heads, block, layout.token_bytes(HEAD_SIZE))
        self.pages = torch.empty(shape, dtype=torch.uint8, device="cuda")

    def write(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor) -> None:
        native_cuda.cache_write(key, value, self.pages, slots, positions, self.step.params)

    def plan(self, params: reference.KVParams) -> Callable[[], native_cuda.Plan]:
        """The step's plan by the build in use, each of which makes its own, once."""
        s, made = self.step, dict[int, native_cuda.Plan]()

        def plan() -> native_cuda.Plan:
            library = id(native_cuda.library())
            if library not in made:
                planner = native_cuda.Planner([params], HEADS)
                made[library] = planner.plan(s.starts, s.seq_lens, s.batch, s.batch, self.table.shape[2] * self.block)
            return made[library]

        return plan

    def attend(self, params: reference.KVParams, variant: str) -> Call:
        s, plan = self.step, self.plan(params)

        def attend(c: int) -> None:
            ops.paged_attention(
                s.query, s.key, s.value, self.pages, self.table[c], s.seq_lens, s.starts, params, SCALE, s.out,
                variant=variant, plan=plan() if variant == "cuda" else None,
            )  # fmt: skip

        return attend

    def measure(self, row: Row, kind: str, variant: str) -> None:
        params = make_params(self.step.kv_heads, BASE, kind).to("cuda")
        attend = self.attend(params, variant)
        row.us = timed(attend, self.step.copies)
        attend(0)
        self.check(row, kind, params)

    def measure_builds(self, row: Row, kind: str, builds: list[Build], seconds: float) -> list[Row]:
        """A row of each, of decode or of write and decode."""
        params = make_params(self.step.kv_heads, BASE, kind).to("cuda")
        attend = self.attend(params, "cuda") if row.op == "decode" else self.write_and_attend(params)
        found = [(replace(row, build=x.name), x, list[float]()) for x in builds]

        def turn(row: Row, x: Build, times: list[float]) -> None:
            with x.used():
                if not times:
                    self.step.out.fill_(math.nan)
                    attend(0)
                    self.check(row, kind, params)
                times.append(timed(attend, self.step.copies, seconds))
            row.us = statistics.median(times)

        for i in range(TURNS):
            for row, x, times in found[:: -1 if i % 2 else 1]:
                if row.error is None:
                    attempt(row, functools.partial(turn, x=x, times=times))
        return [row for row, _, _ in found]

    def check(self, row: Row, kind: str, params: reference.KVParams) -> None:
        """Look at the error of the first sequence and KV head."""
        s = self.step
        row.options = f"block_size={self.block} shift={kind}"
        first = {n: tensor[:1] for n in PER_HEAD if (tensor := getattr(params, n)) is not None}
        expected = torch.empty(1, HEADS // s.kv_heads, HEAD_SIZE, dtype=torch.float64, device="cuda")
        reference.paged_attention(
            s.query[:1, : expected.shape[1]], s.key[:1, :1], s.value[:1, :1], self.pages[:, :1], self.table[0, :1],
            s.seq_lens[:1], s.starts[:2], replace(params, **first), SCALE, expected,
        )  # fmt: skip
        row.max_error = s.error(expected[0])

    def write_and_attend(self, params: reference.KVParams) -> Call:
        """One after the other as the plugin calls them."""
        s, plan = self.step, self.plan(params)
        slots, positions = s.slots(self.table, self.block), (s.seq_lens - 1).long()

        def both(c: int) -> None:
            native_cuda.cache_write(s.key, s.value, self.pages, slots[c], positions, params)
            native_cuda.paged_attention(
                s.query, s.key, s.value, self.pages, self.table[c], s.seq_lens, s.starts, params, SCALE, s.out,
                after_write=True, plan=plan(),
            )  # fmt: skip

        return both

    def measure_both(self, row: Row, kind: str) -> None:
        """Write and decode."""
        s = self.step
        params = make_params(s.kv_heads, BASE, kind).to("cuda")
        both = self.write_and_attend(params)
        row.us = timed(both, s.copies)
        row.options = f"block_size={self.block} shift={kind}"
        both(0)
        right = s.out.clone()
        native_cuda.paged_attention(
            s.query, s.key, s.value, self.pages, self.table[0], s.seq_lens, s.starts, params, SCALE, s.out
        )
        row.max_error = (right - s.out).abs().max().item()


class Flash(Cache):
    """FlashAttention 3 on a bf16 cache, or on an fp8 one with an fp8 query."""

    def __init__(self, step: Decode, page: int) -> None:
        self.block = page
        super().__init__(step)
        self.best: list[int] = []  # num_splits on a bf16 cache
        shape = (self.blocks * page, step.kv_heads, HEAD_SIZE)
        self.keys, self.values = (torch.zeros(shape, dtype=DTYPE, device="cuda") for _ in range(2))

    def write(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor) -> None:
        self.keys[slots], self.values[slots] = key, value

    def plan(self, dtype: torch.dtype, splits: int) -> torch.Tensor:
        from vllm.vllm_flash_attn.flash_attn_interface import get_scheduler_metadata

        s = self.step
        return get_scheduler_metadata(
            batch_size=s.batch, max_seqlen_q=1, max_seqlen_k=s.context, num_heads_q=HEADS, num_heads_kv=s.kv_heads,
            headdim=HEAD_SIZE, cache_seqlens=s.seq_lens, qkv_dtype=dtype, cu_seqlens_q=s.starts, page_size=self.block,
            causal=True, num_splits=splits,
        )  # fmt: skip

    def measure(self, row: Row, fp8: bool, tries: list[int], write: bool = False) -> None:
        """write: the write of the step's tokens before it."""
        from vllm import _custom_ops
        from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func

        s = self.step
        slots, one = s.slots(self.table, self.block), torch.ones(1, device="cuda")
        dtype = torch.float8_e4m3fn if fp8 else DTYPE
        keys, values = (x.to(dtype).view(-1, self.block, s.kv_heads, HEAD_SIZE) for x in (self.keys, self.values))
        query, ones = s.query.to(dtype), torch.ones(s.batch, s.kv_heads, device="cuda")
        scales = {"q_descale": ones, "k_descale": ones, "v_descale": ones} if fp8 else {}

        def attend_with(splits: int) -> Call:
            plan = self.plan(dtype, splits)

            def attend(c: int) -> torch.Tensor:
                if write:
                    _custom_ops.reshape_and_cache_flash(s.key, s.value, keys, values, slots[c], "auto", one, one)
                return flash_attn_varlen_func(
                    q=query, k=keys, v=values, max_seqlen_q=1, cu_seqlens_q=s.starts, max_seqlen_k=s.context,
                    seqused_k=s.seq_lens, block_table=self.table[c], softmax_scale=SCALE, causal=True,
                    scheduler_metadata=plan, num_splits=splits, fa_version=3, **scales,
                )  # fmt: skip

            return attend

        row.us, best = min((timed(attend_with(splits), s.copies), splits) for splits in tries)
        row.options = f"page={self.block} num_splits={best}"
        if not fp8:
            self.best = [best]
        s.out.copy_(attend_with(best)(0))
        slots = slots_of(self.table[0, 0], 0, s.context, self.block)
        seen = (x.view(-1, s.kv_heads, HEAD_SIZE)[slots, 0] for x in (keys, values))
        row.max_error = s.error(s.exact(query, *seen))


class Int4(Cache):
    """vLLM's int4_per_token_head: (token, head) holds K codes, K scale, V codes and V scale in 2 x 68 bytes."""

    def __init__(self, step: Decode) -> None:
        super().__init__(step)
        half = HEAD_SIZE // 2 + 4
        data = torch.zeros(self.blocks, PAGE, step.kv_heads, 2 * half, dtype=torch.uint8, device="cuda")
        self.keys, self.values = data.split(half, -1)
        scales = data.view(torch.float32)
        self.key_scales, self.value_scales = scales[..., half // 4 - 1], scales[..., half // 2 - 1]

    def write(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor) -> None:
        from vllm.v1.attention.ops.int4_per_token_head import reshape_and_cache_int4

        reshape_and_cache_int4(
            key, value, self.keys, self.values, slots, k_scale_cache=self.key_scales, v_scale_cache=self.value_scales
        )

    def measure(self, row: Row) -> None:
        from vllm.v1.attention.backends.triton_attn import MIN_LAUNCH_GRID_SIZE_2D, NUM_PAR_SOFTMAX_SEGMENTS
        from vllm.v1.attention.ops.int4_per_token_head import unified_attention_int4

        s = self.step
        few = MIN_LAUNCH_GRID_SIZE_2D // s.kv_heads  # up to so many sequences it splits contexts
        parts = (few, HEADS, NUM_PAR_SOFTMAX_SEGMENTS)

        def attend(c: int) -> None:
            unified_attention_int4(
                s.query, self.keys, self.values, s.out, cu_seqlens_q=s.starts, max_seqlen_q=1, seqused_k=s.seq_lens,
                max_seqlen_k=s.context, softmax_scale=SCALE, window_size=(-1, -1), block_table=self.table[c],
                softcap=0, sinks=None, alibi_slopes=None, use_alibi_sqrt=False, qq_bias=None, output_scale=None,
                mm_prefix_range=None, k_scale_cache=self.key_scales, v_scale_cache=self.value_scales,
                seq_threshold_3D=few, num_par_softmax_segments=NUM_PAR_SOFTMAX_SEGMENTS,
                softmax_segm_output=output, softmax_segm_max=top, softmax_segm_expsum=total,
            )  # fmt: skip

        output = torch.empty(*parts, HEAD_SIZE, device="cuda")
        top, total = torch.empty(parts, device="cuda"), torch.empty(parts, device="cuda")
        row.us = timed(attend, s.copies)
        row.options = f"page={PAGE}"


class TurboQuant(Cache):
    """vLLM's turboquant_4bit_nc: (token, head) holds K codes, K norm, V codes, V scale and V zero."""

    def __init__(self, step: Decode) -> None:
        from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
        from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig

        super().__init__(step)
        self.config = TurboQuantConfig.from_cache_dtype("turboquant_4bit_nc", HEAD_SIZE)
        shape = (self.blocks, PAGE, step.kv_heads, self.config.slot_size_aligned)
        self.slots = torch.zeros(shape, dtype=torch.uint8, device="cuda")
        self.turn = reference.hadamard_matrix(HEAD_SIZE).float().to("cuda")
        self.centroids = get_centroids(HEAD_SIZE, self.config.centroid_bits).to("cuda", torch.float32)
        ordered = self.centroids.sort().values
        self.midpoints = (ordered[:-1] + ordered[1:]) / 2

    def write(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor) -> None:
        from vllm.v1.attention.ops.triton_turboquant_store import triton_turboquant_store

        triton_turboquant_store(
            key, value, self.slots, slots, self.turn, self.midpoints, self.config.key_mse_bits,
            self.config.key_packed_size, self.config.effective_value_quant_bits, self.config.key_fp8,
        )  # fmt: skip

    def measure(self, row: Row) -> None:
        from vllm.v1.attention.ops.triton_turboquant_decode import triton_turboquant_decode_attention

        s = self.step
        splits = 32  # vLLM's own, fixed for graphs
        parts = torch.empty(s.batch, HEADS, splits, HEAD_SIZE + 1, device="cuda")
        lse = torch.empty(s.batch, HEADS, device="cuda")

        def attend(c: int) -> None:
            triton_turboquant_decode_attention(
                s.query, self.slots, self.table[c], s.seq_lens, self.turn, self.centroids, SCALE,
                self.config.key_mse_bits, self.config.key_packed_size, self.config.effective_value_quant_bits,
                self.config.key_fp8, self.config.norm_correction, self.turn, parts, s.out, lse,
                max_num_kv_splits=splits,
            )  # fmt: skip

        row.us = timed(attend, s.copies)
        row.options = f"page={PAGE} splits={splits}"


class XFormers(Cache):
    """xformers on a bf16 cache whose sequences lie in one piece each."""

    def __init__(self, step: Decode) -> None:
        super().__init__(step)
        self.table = torch.arange(self.blocks, dtype=torch.int32, device="cuda").view_as(self.table)
        self.room = self.table.shape[-1] * PAGE  # tokens of a sequence
        shape = (self.blocks * PAGE, step.kv_heads, HEAD_SIZE)
        self.keys, self.values = (torch.zeros(shape, dtype=DTYPE, device="cuda") for _ in range(2))

    def write(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor) -> None:
        self.keys[slots], self.values[slots] = key, value

    def measure(self, row: Row) -> None:
        from xformers.ops import fmha

        s = self.step
        group = HEADS // s.kv_heads
        mask = fmha.attn_bias.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
            [1] * s.batch, self.room, [s.context] * s.batch, device=torch.device("cuda")
        )
        query = s.query.unflatten(1, (s.kv_heads, group))[None]
        keys, values = (
            x.view(s.copies, 1, -1, s.kv_heads, 1, HEAD_SIZE).expand(-1, -1, -1, -1, group, -1)
            for x in (self.keys, self.values)
        )
        tries = {}
        for op in (fmha.triton_splitk.FwOp, fmha.flash.FwOp):

            def attend(c: int, op: Any = op) -> torch.Tensor:
                return fmha.memory_efficient_attention_forward(query, keys[c], values[c], mask, scale=SCALE, op=op)

            try:
                tries[op.NAME] = timed(attend, s.copies), attend
            except (ValueError, NotImplementedError) as error:
                print(f"xformers {op.NAME}: {error}", file=sys.stderr)
        row.options, (row.us, best) = min(tries.items(), key=lambda item: item[1][0])
        s.out.copy_(best(0)[0].flatten(1, 2))
        row.max_error = s.error(s.exact(s.query, self.keys[: s.context, 0], self.values[: s.context, 0]))


def decode_rows(kv_heads: int, batch: int, context: int, args: argparse.Namespace, peak: float) -> Iterator[Row]:
    """Ours, then the peers; ratios need the peers' times, so rows come together."""
    step = Decode(kv_heads, batch, context)
    common = {"device": torch.cuda.get_device_name(), "batch": batch, "context": context, "num_kv_heads": kv_heads}
    found: list[Row] = []

    def add(variant: str, token_bytes: int, measure: Callable[[Row], None], op: str = "decode") -> None:
        row = Row(op=op, variant=variant, bytes=batch * step.past * token_bytes * kv_heads, **common)
        found.append(attempt(row, measure))

    def add_both(variant: str, token_bytes: int, measure: Callable[[Row], None]) -> None:
        add(variant, token_bytes, measure, "write+decode")

    ours = [Ours(step, block) for block in args.blocks]
    step.fill(list(ours))
    for cache, kind in itertools.product(ours, args.kinds):
        if args.build:
            for op in args.build_ops:
                row = Row(op=op, variant="cuda", bytes=batch * step.past * step.token, **common)
                found += cache.measure_builds(row, kind, args.build, args.seconds)
            continue
        for variant in args.variants:

            def measure_ours(row: Row, cache: Ours = cache, kind: str = kind, variant: str = variant) -> None:
                cache.measure(row, kind, variant)

            add(variant, layout.token_bytes(HEAD_SIZE), measure_ours)
        add_both(
            "cuda", layout.token_bytes(HEAD_SIZE), lambda row, cache=cache, kind=kind: cache.measure_both(row, kind)
        )
    del ours, cache
    if not args.no_peers:
        for page in args.pages:
            flash = Flash(step, page)
            step.fill([flash])
            for variant, fp8 in (("fa3-bf16", False), ("fa3-fp8", True)):

                def measure_flash(row: Row, flash: Flash = flash, fp8: bool = fp8) -> None:
                    flash.measure(row, fp8, args.splits)

                add(variant, HEAD_SIZE * (2 if fp8 else 4), measure_flash)
            add_both("fa3-bf16", HEAD_SIZE * 4, lambda row, flash=flash: flash.measure(row, False, flash.best, True))
        plan = Row(op="plan", variant="fa3", **common)

        def measure_plan(row: Row) -> None:
            row.us = timed(lambda i: flash.plan(DTYPE, 0), 1)

        found.append(attempt(plan, measure_plan))
        del flash

        for variant, peer, token_bytes in (
            ("int4_per_token_head", Int4, HEAD_SIZE + 8),
            ("turboquant_4bit_nc", TurboQuant, HEAD_SIZE + 6),
            *([("xformers", XFormers, 4 * HEAD_SIZE)] if importlib.util.find_spec("xformers") else []),
        ):

            def measure_peer(row: Row, peer: type[Int4 | TurboQuant | XFormers] = peer) -> None:
                cache = peer(step)
                step.fill([cache])
                cache.measure(row)

            add(variant, token_bytes, measure_peer)
    best: dict[tuple[str, str], float] = {}
    for row in found:
        if row.us:
            best[row.op, row.variant] = min(row.us, best.get((row.op, row.variant), row.us))
    for row in found:
        if row.us and row.bytes:
            row.gbps = row.bytes / row.us / 1e3
            row.read_fraction = row.gbps / peak
            bf16, fp8 = best.get((row.op, "fa3-bf16")), best.get((row.op, "fa3-fp8"))
            row.ratio_to_bf16, row.ratio_to_fp8 = bf16 and bf16 / row.us, fp8 and fp8 / row.us
    yield from found


class Prefill:
    """Inputs of a step that computes a chunk of one sequence over its past, which both our pages and bf16 ones hold."""

    block = 64
    checked = 64  # queries whose error is looked at

    def __init__(self, kv_heads: int, count: int, past: int) -> None:
        self.kv_heads, self.count, self.past, self.context = kv_heads, count, past, past + count
        self.params = make_params(kv_heads, BASE).to("cuda")
        self.query = torch.randn(count, HEADS, HEAD_SIZE, device="cuda").to(DTYPE)
        self.key, self.value = random_kv(self.params, torch.arange(past, self.context, device="cuda"))
        self.seq_lens = torch.tensor([self.context], dtype=torch.int32, device="cuda")
        self.starts = torch.tensor([0, count], dtype=torch.int32, device="cuda")
        self.out = torch.empty_like(self.query)
        blocks = math.ceil(self.context / self.block)
        self.table = torch.randperm(blocks, device="cuda").int()[None]
        token = layout.token_bytes(HEAD_SIZE)
        self.pages = torch.empty(blocks, kv_heads, self.block, token, dtype=torch.uint8, device="cuda")
        # bf16 keys and values in order
        shape = (math.ceil(self.context / 256) * 256, kv_heads, HEAD_SIZE)
        self.keys, self.values = (torch.zeros(shape, dtype=DTYPE, device="cuda") for _ in range(2))
        for first in range(0, past, FILL):
            positions = torch.arange(first, min(first + FILL, past), device="cuda")
            key, value = random_kv(self.params, positions)
            slots = slots_of(self.table[0], first, len(positions), self.block)
            native_cuda.cache_write(key, value, self.pages, slots, positions, self.params)
            self.keys[positions], self.values[positions] = key, value
        self.keys[past : self.context], self.values[past : self.context] = self.key, self.value

    def parameters(self, kind: str) -> reference.KVParams:
        return make_params(self.kv_heads, BASE, kind).to("cuda")

    def error(self, expected: torch.Tensor) -> float:
        return (self.out[: len(expected), : expected.shape[1]].double() - expected).abs().max().item()

    def measure_decode(self, row: Row, kind: str) -> None:
        params = self.parameters(kind)
        planner = native_cuda.Planner([params], HEADS)
        plan = planner.plan(self.starts, self.seq_lens, 1, self.count, self.table.shape[1] * self.block)

        def attend(c: int) -> None:
            native_cuda.paged_attention(
                self.query, self.key, self.value, self.pages, self.table, self.seq_lens, self.starts, params, SCALE,
                self.out, plan=plan,
            )  # fmt: skip

        row.us = timed(attend, 1)
        row.options = f"block_size={self.block} shift={kind}"
        attend(0)
        self.check(row, params)

    def measure_gather(self, row: Row, kind: str, variant: str) -> None:
        params = self.parameters(kind)
        keys, values = torch.empty(2, self.context, self.kv_heads, HEAD_SIZE, dtype=torch.float16, device="cuda")
        ends = self.seq_lens.new_tensor([0, self.context])

        def gather(c: int) -> None:
            ops.gather_kv(
                self.key, self.value, self.pages, self.table, self.seq_lens, self.starts, ends[:1], ends, self.context,
                params, keys, values, variant,
            )  # fmt: skip

        row.us = timed(gather, 1)
        row.bytes = keys.nbytes + values.nbytes + layout.token_bytes(HEAD_SIZE) * self.kv_heads * self.past
        row.gbps = row.bytes / row.us / 1e3
        row.options = f"block_size={self.block} shift={kind}"

    def check(self, row: Row, params: reference.KVParams) -> None:
        """Look at the error of the first queries and KV head."""
        n, group = min(self.checked, self.count), HEADS // self.kv_heads
        first = {name: tensor[:1] for name in PER_HEAD if (tensor := getattr(params, name)) is not None}
        expected = torch.empty(n, group, HEAD_SIZE, dtype=torch.float64, device="cuda")
        reference.paged_attention(
            self.query[:n, :group], self.key[:n, :1], self.value[:n, :1], self.pages[:, :1], self.table,
            self.seq_lens - self.count + n, self.starts.clamp_max(n), replace(params, **first), SCALE, expected,
        )  # fmt: skip
        row.max_error = self.error(expected)

    def measure(self, row: Row, kind: str, variant: str) -> None:
        from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func

        from vllm_wkvquant.plugin import prefill

        params = self.parameters(kind)
        common = SimpleNamespace(
            num_reqs=1, num_actual_tokens=self.count, max_query_len=self.count, query_start_loc=self.starts,
            query_start_loc_cpu=self.starts.cpu(), seq_lens=self.seq_lens, block_table_tensor=self.table,
            seq_lens_cpu_upper_bound=self.seq_lens.cpu(),
        )  # fmt: skip
        flash = functools.partial(flash_attn_varlen_func, fa_version=3)
        room = prefill.room(self.count, self.kv_heads, HEAD_SIZE)
        chunks = prefill.split_chunks(common, 1, flash, room, 0)
        gather = functools.partial(ops.gather_kv, variant=variant)

        def attend(c: int) -> None:
            prefill.attend(chunks, self.query, self.key, self.value, self.pages, params, SCALE, self.out, 0)

        with mock.patch.object(ops, "gather_kv", gather):
            row.us = timed(attend, 1)
            attend(0)
        row.options = f"block_size={self.block} shift={kind} passes={len(chunks.passes)}"
        self.check(row, params)

    def measure_flash(self, row: Row, page: int | None) -> None:
        """page: of the cache; None: keys and values in one piece."""
        from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func

        keys, values, where = self.keys, self.values, {}
        if page is None:
            where = {"cu_seqlens_k": self.starts.new_tensor([0, self.context])}
        else:
            table = torch.randperm(len(keys) // page, device="cuda")
            where = {"seqused_k": self.seq_lens, "block_table": table.int()[None]}
            keys, values = (torch.empty_like(x).view(-1, page, *x.shape[1:]) for x in (keys, values))
            keys[table], values[table] = self.keys.view_as(keys), self.values.view_as(values)

        def attend(c: int) -> None:
            flash_attn_varlen_func(
                q=self.query, k=keys, v=values, out=self.out, cu_seqlens_q=self.starts, max_seqlen_q=self.count,
                max_seqlen_k=self.context, softmax_scale=SCALE, causal=True, fa_version=3, **where,
            )  # fmt: skip

        row.us = timed(attend, 1)
        row.options = f"page={page}" if page else "in one piece"
        attend(0)
        self.check_raw(row)

    def measure_xformers(self, row: Row) -> None:
        from xformers.ops import fmha

        group = HEADS // self.kv_heads
        mask = fmha.attn_bias.BlockDiagonalMask.from_seqlens(
            [self.count], [self.context], device=torch.device("cuda")
        ).make_causal_from_bottomright()
        query = self.query.unflatten(1, (self.kv_heads, group))[None]
        keys, values = (
            x[None, : self.context, :, None].expand(-1, -1, -1, group, -1) for x in (self.keys, self.values)
        )
        op = fmha.flash.FwOp

        def attend(c: int) -> torch.Tensor:
            return fmha.memory_efficient_attention_forward(query, keys, values, mask, scale=SCALE, op=op)

        row.us = timed(attend, 1)
        row.options = op.NAME
        self.out.copy_(attend(0)[0].flatten(1, 2))
        self.check_raw(row)

    def check_raw(self, row: Row) -> None:
        """Look at the error of the first queries and KV head over the bf16 cache."""
        n, group = min(self.checked, self.count), HEADS // self.kv_heads
        keys, values = (x[: self.past + n, 0].double() for x in (self.keys, self.values))
        scores = torch.einsum("qhd,kd->hqk", self.query[:n, :group].double(), keys) * SCALE
        hidden = torch.ones(n, self.past + n, dtype=torch.bool, device="cuda").triu(self.past + 1)
        row.max_error = self.error(
            torch.einsum("hqk,kd->qhd", scores.masked_fill(hidden, -math.inf).softmax(-1), values)
        )


def prefill_rows(kv_heads: int, count: int, past: int, args: argparse.Namespace) -> Iterator[Row]:
    """Ours with and without FlashAttention over the chunk, then the peer."""
    step = Prefill(kv_heads, count, past)
    found: list[Row] = []

    def add(variant: str, measure: Callable[[Row], None]) -> None:
        row = Row(
            op="prefill", variant=variant, device=torch.cuda.get_device_name(), batch=1, query_len=count,
            context=step.context, num_kv_heads=kv_heads,
        )  # fmt: skip
        found.append(attempt(row, measure))

    for kind in args.kinds:
        for variant in args.variants:
            if not args.no_peers:
                add(variant, lambda row, kind=kind, variant=variant: step.measure(row, kind, variant))
            add(f"{variant}-gather", lambda row, kind=kind, variant=variant: step.measure_gather(row, kind, variant))
        if count <= args.decode_chunks:
            add("cuda-decode", lambda row, kind=kind: step.measure_decode(row, kind))
    if not args.no_peers:
        for page in (None, *args.pages):
            add("fa3-bf16", lambda row, page=page: step.measure_flash(row, page))
        if importlib.util.find_spec("xformers"):
            add("xformers", step.measure_xformers)
    bf16 = min((row.us for row in found if row.variant == "fa3-bf16" and row.us), default=None)
    for row in found:
        row.ratio_to_bf16 = bf16 / row.us if bf16 and row.us and not row.variant.endswith("-gather") else None
    yield from found


def plan_row(kv_heads: int, batch: int, context: int) -> Row:
    """The plan of a step and its tokens' positions, which the plugin's metadata builder makes once for all layers."""
    row = Row(
        op="plan", variant="cuda", device=torch.cuda.get_device_name(), batch=batch, context=context,
        num_kv_heads=kv_heads,
    )  # fmt: skip

    def measure(row: Row) -> None:
        lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")
        starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
        positions = torch.empty(batch, dtype=torch.int64, device="cuda")
        planner = native_cuda.Planner([make_params(kv_heads, BASE).to("cuda")], HEADS)
        row.us = timed(lambda i: planner.plan(starts, lengths, batch, batch, context, positions), 1)

    return attempt(row, measure)


def write_rows(tokens: int, peers: bool) -> Iterator[Row]:
    """Tokens into random slots, and ours into slots in order, too."""
    kv_heads, block, count = 8, 64, max(1 << 15, tokens)
    params = make_params(kv_heads, BASE).to("cuda")
    token = layout.token_bytes(HEAD_SIZE)
    copies = math.ceil(COLD_BYTES / (count * kv_heads * token))  # of ours; a peer's have more bytes
    slots = [torch.randperm(count, device="cuda")[:tokens] for _ in range(copies)]
    in_order = torch.arange(tokens, device="cuda")
    data = [random_kv(params, in_order) for _ in range(copies)]
    pages = torch.zeros(copies, count // block, kv_heads, block, token, dtype=torch.uint8, device="cuda")

    def reshape_and_cache() -> Call:
        from vllm import _custom_ops

        shape = (copies, count // PAGE, PAGE, kv_heads, HEAD_SIZE)
        k16, v16 = (torch.zeros(shape, dtype=DTYPE, device="cuda") for _ in "kv")
        one = torch.ones(1, device="cuda")
        return lambda i: _custom_ops.reshape_and_cache_flash(*data[i], k16[i], v16[i], slots[i], "auto", one, one)

    def ours(where: list[torch.Tensor]) -> Callable[[], Call]:
        return lambda: lambda i: native_cuda.cache_write(*data[i], pages[i], where[i], in_order, params)

    cases = [("cuda", token, ours(slots), None), ("cuda", token, ours([in_order] * copies), "slots in order")]
    if peers:
        cases.append(("reshape_and_cache_flash", 4 * HEAD_SIZE, reshape_and_cache, f"page={PAGE}"))
    found = []
    for variant, written, make, options in cases:
        moved = tokens * kv_heads * (4 * HEAD_SIZE + written)
        row = Row(
            op="write", variant=variant, device=torch.cuda.get_device_name(), batch=1, query_len=tokens,
            context=tokens, num_kv_heads=kv_heads, bytes=moved, options=options,
        )  # fmt: skip

        def measure(row: Row, make: Callable[[], Call] = make) -> None:
            row.us = timed(make(), copies)
            row.gbps = row.bytes / row.us / 1e3

        found.append(attempt(row, measure))
    bf16 = next((row.us for row in found if row.variant == "reshape_and_cache_flash"), None)
    for row in found:
        row.ratio_to_bf16 = bf16 / row.us if bf16 and row.us else None
    yield from found


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """All rows of the GPU that the arguments ask for."""
    if args.build:  # also writes the caches
        native_cuda.LIBRARY = args.build[0].path
    torch.manual_seed(0)
    measured = bandwidth_rows()
    yield from measured
    peak = max(row.gbps for row in measured)
    device = torch.cuda.get_device_name()
    least = next((gbps for name, gbps in LEAST_BANDWIDTH.items() if name in device), 0)
    if peak < least:
        raise SystemExit(f"{device} reads {peak:.0f} GB/s, less than {least}: the run is invalid; is the GPU in use?")
    for tokens in args.writes if args.op in ("write", "all") else []:
        yield from write_rows(tokens, not args.no_peers)
    for shape in filter(None, args.prefills.split(",") if args.op in ("prefill", "all") else []):
        yield from prefill_rows(*(int(x) for x in shape.split("x")), args)
        torch.cuda.empty_cache()
    for shape in filter(None, args.shapes.split(",") if args.op in ("decode", "all") else []):
        kv_heads, batch, context = (int(x) for x in shape.split("x"))
        yield plan_row(kv_heads, batch, context)
        yield from decode_rows(kv_heads, batch, context, args, peak)
        torch.cuda.empty_cache()
