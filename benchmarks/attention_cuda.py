"""Times the CUDA kernels on one GPU against FlashAttention 3 (bf16, fp8) and vLLM's reshape_and_cache_flash.

    python benchmarks/attention_cuda.py --json rows.json

Every time is the median over replays of a CUDA graph of many calls, each on the next of several copies of the cache,
together larger than three times the L2 cache. read_fraction is the bytes of past tokens that must be read, over time,
over B; B is the better of a 2 GiB device copy (read + written) and a 2 GiB read-only reduction in the same process.
Decode counts everything from roped q, k, v to the output but the write; FlashAttention's scheduler metadata is made
outside of its time. Parameters are like calibrated ones: a rotating shift on every pair, smoothing, rotated keys.
"""

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable

import torch

from vllm_wkvquant import layout, native_cuda, reference
from vllm_wkvquant.reference import KVParams

HEADS, HEAD_SIZE = 32, 128
DTYPE = torch.bfloat16
COLD_BYTES = 160 << 20
SCALE = HEAD_SIZE**-0.5
DEFAULT = "8x1x1024,8x1x8192,8x1x32768,8x16x8192,8x64x2048,8x8x32768,32x1x32768,32x8x32768,4x8x32768"


def timed(calls: list[Callable[[], object]], seconds: float = 0.1) -> float:
    """Median microseconds of a call; `calls` take turns."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for call in calls[:4]:
        call()
    torch.cuda.synchronize()
    estimate = max((time.perf_counter() - start) / min(len(calls), 4), 5e-6)
    count = len(calls) * max(1, math.ceil(5e-4 / estimate / len(calls)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            calls[i % len(calls)]()
    replays = min(max(5, round(seconds / (estimate * count))), 100)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    graph.replay()
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) * 1e3 / count for a, b in itertools.pairwise(events)]
    return statistics.median(times)


def bandwidth() -> dict[str, float]:
    """GB/s of a copy (read + written) and of a reduction of 2 GiB."""
    a = torch.randn(1 << 29, device="cuda")
    b = torch.empty_like(a)
    copy = 2 * a.nbytes / timed([lambda: b.copy_(a)]) / 1e3
    return {"copy_gbps": copy, "read_gbps": max(a.nbytes / timed([f]) / 1e3 for f in (a.sum, a.amax))}


def make_params(kv_heads: int, kind: str) -> KVParams:
    g = torch.Generator().manual_seed(0)
    inv_freq = [5e5 ** (-2 * j / HEAD_SIZE) for j in range(HEAD_SIZE // 2)]
    gain = 0.0 if kind == "none" else 5.0
    return KVParams(
        k_smooth=torch.exp(0.3 * torch.randn(kv_heads, HEAD_SIZE, generator=g)),
        k_shift=gain * torch.randn(kv_heads, HEAD_SIZE, generator=g),
        v_shift=0.5 * torch.randn(kv_heads, HEAD_SIZE, generator=g),
        key_hadamard=True,
        rope_turns=reference.rope_turns(inv_freq) if kind != "none" else None,
    ).to("cuda")


def random_kv(params: KVParams, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (len(positions), *params.k_smooth.shape)
    key = torch.randn(shape, device="cuda") * params.k_smooth + reference.key_shift_at(positions, params)
    return key.to(DTYPE), (torch.randn(shape, device="cuda") + params.v_shift).to(DTYPE)


def shuffled(copies: int, batch: int, blocks: int) -> torch.Tensor:
    return torch.randperm(copies * batch * blocks, device="cuda").int().view(copies, batch, blocks)


def slots_of(table: torch.Tensor, first: int, count: int, block_size: int) -> torch.Tensor:
    p = torch.arange(first, first + count, device="cuda")
    return table[p // block_size].long() * block_size + p % block_size


def decode_rows(kv_heads: int, batch: int, context: int, args: argparse.Namespace, peak: float) -> list[dict]:
    params = make_params(kv_heads, "rotating")
    past, group = context - 1, HEADS // kv_heads
    token = layout.token_bytes(HEAD_SIZE) * kv_heads
    copies = math.ceil(COLD_BYTES / (batch * past * token))
    needed = batch * past * token
    q = torch.randn(batch, HEADS, HEAD_SIZE, device="cuda").to(DTYPE)
    new_key, new_value = random_kv(params, torch.full((batch,), past, device="cuda"))
    seq_lens = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
    rows = []

    def add(variant: str, us: float, **more: object) -> None:
        rows.append({
            "op": "decode", "variant": variant, "num_kv_heads": kv_heads, "batch": batch, "context": context,
            "us": round(us, 2), **more,
        })  # fmt: skip

    ours = []
    for block_size in args.blocks:
        blocks = math.ceil(context / block_size)
        table = shuffled(copies, batch, blocks)
        cache = torch.empty(table.numel(), kv_heads, block_size, token // kv_heads, dtype=torch.uint8, device="cuda")
        ours.append((block_size, table, cache))
    page_tables = {page: shuffled(copies, batch, math.ceil(context / page)) for page in args.pages}
    size = copies * batch * math.ceil(context / max(args.pages)) * max(args.pages)
    k16, v16 = (torch.empty(size, kv_heads, HEAD_SIZE, dtype=DTYPE, device="cuda") for _ in range(2))
    for first in range(0, past, 8192):
        positions = torch.arange(first, min(first + 8192, past), device="cuda")
        for i in range(batch):
            key, value = random_kv(params, positions)
            for c in range(copies):
                for block_size, table, cache in ours:
                    slots = slots_of(table[c, i], first, len(positions), block_size)
                    native_cuda.cache_write(key, value, cache, slots, positions, params)
                slots = slots_of(page_tables[args.pages[0]][c, i], first, len(positions), args.pages[0])
                k16[slots], v16[slots] = key, value
    for c in range(copies):
        for i in range(batch):
            slot = slots_of(page_tables[args.pages[0]][c, i], past, 1, args.pages[0])
            k16[slot], v16[slot] = new_key[i], new_value[i]

    out = torch.empty_like(q)
    for block_size, table, cache in ours:
        for kind in args.kinds:
            p = params if kind == "rotating" else make_params(kv_heads, kind)

            def attend(c: int, table=table, cache=cache, p=p) -> None:
                native_cuda.paged_attention(q, new_key, new_value, cache, table[c], seq_lens, starts, p, SCALE, out)

            us = timed([lambda c=c, attend=attend: attend(c) for c in range(copies)])
            more: dict[str, object] = {"block_size": block_size, "shift": kind}
            if kind == "rotating":
                attend(0)
                expected = torch.empty(1, group, HEAD_SIZE, dtype=torch.float64, device="cuda")
                one = KVParams(p.k_smooth[:1], p.k_shift[:1], p.v_shift[:1], True, p.rope_turns, p.rope_scaling)
                reference.paged_attention(
                    q[:1, :group], new_key[:1, :1], new_value[:1, :1], cache[:, :1], table[0, :1], seq_lens[:1],
                    starts[:2], one, SCALE, expected,
                )  # fmt: skip
                more["max_error"] = float(f"{(out[:1, :group].double() - expected).abs().max().item():.3g}")
            add("cuda", us, read_fraction=round(needed / us / 1e3 / peak, 4), gbps=round(needed / us / 1e3), **more)

    if args.no_peers:
        return rows
    from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func, get_scheduler_metadata

    descale = torch.ones(batch, kv_heads, device="cuda")
    for name in ("fa3-bf16", "fa3-fp8"):
        fp8 = name == "fa3-fp8"
        kc, vc = (x.to(torch.float8_e4m3fn) if fp8 else x for x in (k16, v16))
        query = q.to(torch.float8_e4m3fn) if fp8 else q
        for page in args.pages:
            table = page_tables[page]
            n = table.numel() * page
            kp, vp = (x[:n].view(-1, page, kv_heads, HEAD_SIZE) for x in (kc, vc))
            for splits in args.splits:
                plan = get_scheduler_metadata(
                    batch_size=batch, max_seqlen_q=1, max_seqlen_k=context, num_heads_q=HEADS, num_heads_kv=kv_heads,
                    headdim=HEAD_SIZE, cache_seqlens=seq_lens, qkv_dtype=kc.dtype, cu_seqlens_q=starts, page_size=page,
                    causal=True, num_splits=splits,
                )  # fmt: skip
                extra = {"q_descale": descale, "k_descale": descale, "v_descale": descale} if fp8 else {}

                def attend_peer(c: int, kp=kp, vp=vp, table=table, plan=plan, splits=splits, extra=extra, query=query):
                    return flash_attn_varlen_func(
                        q=query, k=kp, v=vp, max_seqlen_q=1, cu_seqlens_q=starts, max_seqlen_k=context,
                        seqused_k=seq_lens, block_table=table[c], softmax_scale=SCALE, causal=True,
                        scheduler_metadata=plan, num_splits=splits, fa_version=3, **extra,
                    )  # fmt: skip

                us = timed([lambda c=c, f=attend_peer: f(c) for c in range(copies)])
                read = needed / token * kv_heads * HEAD_SIZE * (2 if fp8 else 4)
                add(name, us, gbps=round(read / us / 1e3), page=page, num_splits=splits)
                if page == args.pages[0] and splits == args.splits[0]:
                    full = attend_peer(0)
                    error = (full.float() - out.float()).norm() / full.float().norm()
                    rows[-1]["relative_difference_to_cuda"] = float(f"{error.item():.3g}")
    best = {name: min(r["us"] for r in rows if r["variant"] == name) for name in ("fa3-bf16", "fa3-fp8")}
    for row in rows:
        row["ratio_to_bf16"] = round(best["fa3-bf16"] / row["us"], 3)
        row["ratio_to_fp8"] = round(best["fa3-fp8"] / row["us"], 3)
    return rows


def write_rows(tokens: int, peers: bool) -> list[dict]:
    kv_heads, block_size = 8, 64
    params = make_params(kv_heads, "rotating")
    count = max(1 << 15, tokens)
    slots = [torch.randperm(count, device="cuda")[:tokens] for _ in range(4)]
    positions = torch.arange(tokens, device="cuda")
    data = [random_kv(params, positions) for _ in range(4)]
    cache = torch.zeros(
        count // block_size, kv_heads, block_size, layout.token_bytes(HEAD_SIZE), dtype=torch.uint8, device="cuda"
    )
    k16, v16 = (torch.zeros(count // 16, 16, kv_heads, HEAD_SIZE, dtype=DTYPE, device="cuda") for _ in range(2))
    one = torch.ones(1, device="cuda")
    run = torch.arange(tokens, device="cuda")
    cases = {
        "cuda": lambda i: native_cuda.cache_write(*data[i], cache, slots[i], positions, params),
        "cuda, slots in order": lambda i: native_cuda.cache_write(*data[i], cache, run, positions, params),
    }
    if peers:
        from vllm import _custom_ops

        cases["reshape_and_cache_flash"] = lambda i: _custom_ops.reshape_and_cache_flash(
            *data[i], k16, v16, slots[i], "auto", one, one
        )
    rows = []
    for name, call in cases.items():
        us = timed([lambda i=i, call=call: call(i) for i in range(4)])
        rows.append({"op": "write", "variant": name, "tokens": tokens, "num_kv_heads": kv_heads, "us": round(us, 2)})
    for row in rows:
        row["ratio_to_bf16"] = round(rows[-1]["us"] / row["us"], 3)
    return rows


def main() -> None:
    """Command line."""
    ints = lambda s: [int(x) for x in s.split(",") if x]  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=DEFAULT, help="KV heads x batch x context")
    parser.add_argument("--blocks", type=ints, default=[64], help="block sizes of our cache")
    parser.add_argument("--pages", type=ints, default=[16], help="page sizes of FlashAttention's")
    parser.add_argument("--splits", type=ints, default=[0], help="num_splits of FlashAttention, 0: its own choice")
    parser.add_argument("--kinds", type=lambda s: s.split(","), default=["rotating"], help="rotating, none")
    parser.add_argument("--writes", type=ints, default=[1, 64, 8192])
    parser.add_argument("--no-peers", action="store_true", help="ours alone, where vLLM is not installed")
    parser.add_argument("--json", help="file for the rows, one JSON object a line")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows: list[dict] = []

    def emit(new: list[dict]) -> None:
        rows.extend(new)
        for row in new:
            print(json.dumps(row), flush=True)
        if args.json:
            with open(args.json, "w") as f:
                f.writelines(json.dumps(row) + "\n" for row in rows)

    found = bandwidth()
    peak = max(found.values())
    emit([{"op": "bandwidth", "device": torch.cuda.get_device_name(), **{k: round(v) for k, v in found.items()}}])
    for tokens in args.writes:
        emit(write_rows(tokens, not args.no_peers))
    for shape in filter(None, args.shapes.split(",")):
        kv_heads, batch, context = (int(x) for x in shape.split("x"))
        emit(decode_rows(kv_heads, batch, context, args, peak))
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
