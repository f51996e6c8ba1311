"""Times the cache write and paged attention against vLLM's own ops.

    python benchmarks/attention.py --device cpu --op all --json
    python benchmarks/attention.py --device cuda --json          # attention_cuda.py says how and has more options

On a CPU the peer is vLLM's bf16 op on the same threads.
Ours and the peer's call alternate; a row's ratio is the median over pairs of the peer's time over ours. Every call
takes the next of several copies of the cache, together larger than the last-level cache. Attention counts everything
from the roped q, k, v to the output but the write. Parameters are like calibrated ones: a rotating shift on every pair,
smoothing and the Hadamard rotation of keys.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import attention_cuda
import torch
from rows import DTYPE, HEAD_SIZE, HEADS, PER_HEAD, Row, make_params, random_kv

from vllm_wkvquant import layout, native, ops, reference

KV_HEADS, BLOCK_SIZE = 8, 64
COLD_BYTES = 96 << 20  # of all copies of our cache: three times the last-level cache of the development machine
MAX_PEER_BYTES = 8 << 30
SAMPLE_SECONDS = 3e-3


class Peer:
    """vLLM's CPU attention on a bf16 cache."""

    def __init__(self, blocks: int) -> None:
        from vllm import _custom_ops
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        self.ops = _custom_ops
        self.isa = _get_attn_isa(DTYPE, BLOCK_SIZE, HEAD_SIZE)
        cache = torch.zeros(blocks, KV_HEADS, 2 * BLOCK_SIZE, HEAD_SIZE, dtype=DTYPE)
        self.key_cache, self.value_cache = cache.chunk(2, dim=2)

    def write(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        self.ops.cpu_attn_reshape_and_cache(key, value, self.key_cache, self.value_cache, slots, self.isa)

    def plan(self, seq_lens: torch.Tensor, query_start_loc: torch.Tensor) -> torch.Tensor:
        """Once a step, so outside of the measured time."""
        return self.ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(seq_lens),
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            head_dim=HEAD_SIZE,
            seq_lens=seq_lens,
            dtype=DTYPE,
            query_start_loc=query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=True,
        )

    def attend(self, query: torch.Tensor, out: torch.Tensor, table: torch.Tensor, step: "Step", plan: torch.Tensor):
        self.ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=self.key_cache,
            value_cache=self.value_cache,
            output=out,
            query_start_loc=step.query_start_loc,
            seq_lens=step.seq_lens,
            scale=HEAD_SIZE**-0.5,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=table,
            softcap=0,
            scheduler_metadata=plan,
            s_aux=None,
        )


@dataclass
class Step:
    """Lengths of a step of `batch` equal sequences."""

    batch: int
    past: int
    query_len: int

    def __post_init__(self) -> None:
        self.seq_lens = torch.full((self.batch,), self.past + self.query_len, dtype=torch.int32)
        self.query_start_loc = torch.arange(self.batch + 1, dtype=torch.int32) * self.query_len
        self.blocks = self.batch * math.ceil((self.past + self.query_len) / BLOCK_SIZE)


def tables(step: Step, copies: int) -> list[torch.Tensor]:
    """Block tables of several copies of the cache, in shuffled pages."""
    g = torch.Generator().manual_seed(1)
    return list(torch.randperm(step.blocks * copies, generator=g).int().view(copies, step.batch, -1))


def slots_of(table: torch.Tensor, first: int, count: int) -> torch.Tensor:
    p = torch.arange(first, first + count)
    return (table[:, p // BLOCK_SIZE].long() * BLOCK_SIZE + p % BLOCK_SIZE).flatten()


def compare(
    ours: list[Callable[[], None]], peers: list[Callable[[], None]], pairs: int
) -> tuple[float, float, float, bool]:
    """(us, peer us, ratio, disturbed) of alternating calls through the copies."""

    def sample(calls: Iterator[Callable[[], None]], n: int) -> float:
        start = time.perf_counter()
        for _ in range(n):
            next(calls)()
        return (time.perf_counter() - start) / n

    def forever(calls: list[Callable[[], None]]) -> Iterator[Callable[[], None]]:
        while True:
            yield from calls

    a, b = forever(ours), forever(peers)
    sample(a, 2), sample(b, 2)
    n_a, n_b = (max(1, round(SAMPLE_SECONDS / sample(calls, 3))) for calls in (a, b))
    times = [(sample(a, n_a), sample(b, n_b)) for _ in range(pairs)]
    mine, theirs = sorted(t[0] for t in times), sorted(t[1] for t in times)
    spread = (theirs[9 * pairs // 10] - theirs[pairs // 10]) / statistics.median(theirs)
    ratio = statistics.median(t[1] / t[0] for t in times)
    return statistics.median(mine) * 1e6, statistics.median(theirs) * 1e6, ratio, spread > 0.2


def attention_row(op: str, step: Step, pairs: int) -> Row:
    params = make_params(KV_HEADS)
    token = layout.token_bytes(HEAD_SIZE) * KV_HEADS
    ours_bytes = step.blocks * BLOCK_SIZE * token
    peer_bytes = step.blocks * BLOCK_SIZE * KV_HEADS * HEAD_SIZE * 4
    copies = min(math.ceil(COLD_BYTES / ours_bytes), max(1, MAX_PEER_BYTES // peer_bytes))
    copy_tables = tables(step, copies)
    blocks = step.blocks * copies
    cache = torch.zeros(blocks, KV_HEADS, BLOCK_SIZE, layout.token_bytes(HEAD_SIZE), dtype=torch.uint8)
    peer = Peer(blocks)
    torch.manual_seed(2)
    for first in range(0, step.past, 4096):
        positions = torch.arange(first, min(first + 4096, step.past))
        key, value = random_kv(params, positions)
        for table in copy_tables:
            for sequence in table:
                slots = slots_of(sequence[None], first, len(positions))
                ops.cache_write(key, value, cache, slots, positions, params)
                peer.write(key, value, slots)
    tokens = step.batch * step.query_len
    key, value = random_kv(params, torch.arange(step.past, step.past + step.query_len).repeat(step.batch))
    query = torch.randn(tokens, HEADS, HEAD_SIZE).to(DTYPE)
    out, peer_out = torch.empty_like(query), torch.empty_like(query)
    for table in copy_tables:
        peer.write(key, value, slots_of(table, step.past, step.query_len))
    plan = peer.plan(step.seq_lens, step.query_start_loc)
    scale = HEAD_SIZE**-0.5

    def attend(table: torch.Tensor) -> Callable[[], None]:
        return lambda: ops.paged_attention(
            query, key, value, cache, table, step.seq_lens, step.query_start_loc, params, scale, out
        )

    def attend_peer(table: torch.Tensor) -> Callable[[], None]:
        return lambda: peer.attend(query, peer_out, table, step, plan)

    us, peer_us, ratio, disturbed = compare(
        [attend(t) for t in copy_tables], [attend_peer(t) for t in copy_tables], pairs
    )
    attend(copy_tables[0])()
    # One sequence and one KV head are enough for the error, and all that fits in fp64.
    group = HEADS // KV_HEADS
    first = replace(params, **{n: getattr(params, n)[:1] for n in PER_HEAD})
    n = min(step.query_len, 64)
    expected = torch.empty(n, group, HEAD_SIZE, dtype=torch.float64)
    reference.paged_attention(
        query[:n, :group],
        key[:n, :1],
        value[:n, :1],
        cache[:, :1],
        copy_tables[0][:1],
        torch.tensor([step.past + n], dtype=torch.int32),
        torch.tensor([0, n], dtype=torch.int32),
        first,
        scale,
        expected,
    )
    moved = step.batch * step.past * token + 2 * query.nbytes + key.nbytes + value.nbytes
    return Row(
        **common(op, peer),
        batch=step.batch,
        query_len=step.query_len,
        context=step.past + step.query_len,
        us=us,
        peer_us=peer_us,
        bytes=moved,
        gbps=moved / us / 1e3,
        ratio_to_bf16=ratio,
        disturbed=disturbed,
        max_error=(out[:n, :group].double() - expected).abs().max().item(),
    )


def common(op: str, peer: Peer) -> dict[str, Any]:
    return {
        "op": op,
        "variant": ops.default_variant("cpu", HEAD_SIZE),
        "device": "cpu",
        "isa": native.isa(),
        "peer_isa": peer.isa,
        "num_kv_heads": KV_HEADS,
    }


def write_row(tokens: int, pairs: int) -> Row:
    params = make_params(KV_HEADS)
    step = Step(1, 0, tokens)
    token = layout.token_bytes(HEAD_SIZE) * KV_HEADS
    copies = math.ceil(COLD_BYTES / (step.blocks * BLOCK_SIZE * token))
    copy_tables = tables(step, copies)
    cache = torch.zeros(step.blocks * copies, KV_HEADS, BLOCK_SIZE, layout.token_bytes(HEAD_SIZE), dtype=torch.uint8)
    peer = Peer(step.blocks * copies)
    positions = torch.arange(tokens)
    key, value = random_kv(params, positions)
    slots = [slots_of(table, 0, tokens) for table in copy_tables]

    def write(where: torch.Tensor) -> Callable[[], None]:
        return lambda: ops.cache_write(key, value, cache, where, positions, params)

    def write_peer(where: torch.Tensor) -> Callable[[], None]:
        return lambda: peer.write(key, value, where)

    us, peer_us, ratio, disturbed = compare([write(s) for s in slots], [write_peer(s) for s in slots], pairs)
    expected = torch.zeros_like(cache)
    reference.cache_write(key, value, expected, slots[0], positions, params)
    # Where rounding ties, codes differ by one and are equally good: how much farther than the reference are we?
    exact = reference.transform_key(key, positions, params), value.float() - reference.value_shift_at(positions, params)
    seen, wanted = (layout.load(c, slots[0], HEAD_SIZE) for c in (cache, expected))
    error = max(
        ((reference.dequantize_tokens(*a) - x).abs() - (reference.dequantize_tokens(*b) - x).abs()).max().item()
        for a, b, x in zip(seen, wanted, exact, strict=True)
    )
    moved = key.nbytes + value.nbytes + tokens * token
    return Row(
        **common("write", peer),
        batch=1,
        query_len=tokens,
        context=tokens,
        us=us,
        peer_us=peer_us,
        bytes=moved,
        gbps=moved / us / 1e3,
        ratio_to_bf16=ratio,
        disturbed=disturbed,
        max_error=error,
    )


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """All rows of the CPU that the arguments ask for."""
    if args.op in ("write", "all"):
        yield write_row(2048, args.pairs)
    for batch in args.batches if args.op in ("decode", "all") else []:
        for context in args.contexts:
            yield attention_row("decode", Step(batch, context - 1, 1), args.pairs)
    for past, query_len in [(0, 2048), (8192, 512)] if args.op in ("prefill", "all") else []:
        yield attention_row("prefill", Step(1, past, query_len), args.pairs)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--op", choices=["decode", "write", "prefill", "all"], default="all")
    parser.add_argument("--contexts", type=lambda s: [int(x) for x in s.split(",")], default=[1024, 8192, 32768])
    parser.add_argument("--batches", type=lambda s: [int(x) for x in s.split(",")], default=[1, 8])
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    attention_cuda.add_arguments(parser.add_argument_group("with --device cuda"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = [
        "op",
        "build" if args.build else "variant",
        "num_kv_heads",
        "batch",
        "query_len",
        "context",
        "us",
        "peer_us",
        "gbps",
        "ratio_to_bf16",
    ]
    names += ["ratio_to_fp8", "read_fraction", "disturbed", "max_error", "options", "error"]
    if not args.json:
        print("  ".join(f"{n:>13}" for n in names))
    for row in rows(args) if args.device == "cpu" else attention_cuda.rows(args):
        data = row.present()
        print(json.dumps(data) if args.json else "  ".join(f"{data.get(n, '')!s:>13}" for n in names), flush=True)


if __name__ == "__main__":
    main()
