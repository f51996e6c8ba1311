#!/usr/bin/env python3
"""Memory of models with different weights and KV caches: counted from shapes, or measured on a GPU.

    python benchmarks/memory.py --op count
    python benchmarks/memory.py --op measure --shapes llama-2-13b        # needs a GPU

count: bytes of the weights as they are stored, and of the pages of one sequence of --tokens tokens; then what fits on
a GPU: the largest batch of sequences of a length, and the longest sequence. That is what memory holds, whatever
positions the model knows. Activations, CUDA graphs and the CUDA context cannot be counted; --other-gb holds memory back
for them, and with its default, 0, what fits is an upper bound.

`paper` is what WKVQuant (arXiv 2402.12065) has. `linear + KV` gives it to the digit: linear layers and cache alone, at
exactly 16 or 4 bits, without the embedding, lm_head, norms, scales and zero points (0.16 bits more for a weight and
0.25 for an element of the cache).

measure: a vLLM engine with room for one sequence, on an otherwise idle GPU, at the peak of its prefill, in one step,
and of 16 decode steps, split into weights (every parameter and buffer), KV cache of --tokens tokens, activations (the
peak of what else torch has allocated, workspaces included), graphs (what torch has reserved beyond that peak, cached
memory included), and what torch knows nothing of (the CUDA context, libraries). total is their sum. Counted weights
and cache are beside them.

Variants are those of throughput.py. GB are 10^9 bytes, GiB 2^30.
"""

import argparse
import json
import math
import signal
import sys
from collections.abc import Iterator
from typing import Any

import torch
from cells import Row, run_cell, versions
from rich import box
from rich.console import Console
from rich.table import Table
from shapes import GROUP_SIZE, SHAPES, VARIANTS, Shape, Variant, model_config, names_of

from vllm_wkvquant.checkpoint import KV_PARAMS, QUANT_METHOD
from vllm_wkvquant.config import ConfigError
from vllm_wkvquant.layout import PageLayout

PAGE = 16  # tokens
SPARE_PAGES = 16  # of a measured engine
PAPER_GB = {"bf16": 27.1, "w4": 8.0, "w4kv4": 6.8}  # WKVQuant, LLaMA-2-13B, batch 1, length 2048
PAPER_SHAPE, PAPER_TOKENS = "llama-2-13b", 2048
TABLE_WIDTH = 200  # columns; a table that is cut is of no use


def weight_bytes(shape: Shape, variant: Variant) -> int:
    """Bytes of all weights; codes, scales and zero points where they have 4 bits, and the parameters of our cache."""
    other = 2 * shape.other_elements
    if variant.quant_method is None:
        return 2 * shape.linear_elements + other
    groups = shape.linear_elements // GROUP_SIZE
    params = 4 * len(KV_PARAMS) * shape.layers * shape.kv_heads * shape.head_size
    w4 = shape.linear_elements // 2 + 2 * groups + groups // 2 + other
    return w4 + (params if variant.quant_method == QUANT_METHOD else 0)


def page_bytes(shape: Shape, variant: Variant) -> int:
    """Bytes of a page of PAGE tokens, in all layers."""
    head = {
        "bfloat16": 4 * PAGE * shape.head_size,
        "fp8": 2 * PAGE * shape.head_size,
        "int4_per_token_head": PAGE * (shape.head_size + 2 * 4),  # an fp32 scale each for K and V
        "auto": PageLayout(shape.head_size, PAGE).nbytes,
    }
    return shape.layers * shape.kv_heads * head[variant.kv_cache_dtype]


def kv_bytes(shape: Shape, variant: Variant, tokens: int) -> int:
    """Bytes of the pages of one sequence."""
    return math.ceil(tokens / PAGE) * page_bytes(shape, variant)


def linear_and_kv_bytes(shape: Shape, variant: Variant, tokens: int) -> float:
    """Bytes of linear layers and cache at exactly the bits of their elements."""
    weight_bits = 16 if variant.quant_method is None else 4
    kv_bits = {"bfloat16": 16, "fp8": 8}.get(variant.kv_cache_dtype, 4)
    elements = 2 * tokens * shape.layers * shape.kv_heads * shape.head_size
    return (shape.linear_elements * weight_bits + elements * kv_bits) / 8


def largest_batch(shape: Shape, variant: Variant, tokens: int, memory: float) -> int:
    """Sequences of `tokens` tokens that fit into `memory` bytes beside the weights."""
    return max(0, int((memory - weight_bytes(shape, variant)) // kv_bytes(shape, variant, tokens)))


def longest_context(shape: Shape, variant: Variant, memory: float) -> int:
    """Tokens of one sequence, in whole pages, that fit into `memory` bytes beside the weights."""
    return max(0, int((memory - weight_bytes(shape, variant)) // page_bytes(shape, variant))) * PAGE


def with_units(sizes: dict[str, float]) -> Row:
    """Bytes by name, in GB and GiB."""
    gb = {f"{name}_gb": round(size / 1e9, 3) for name, size in sizes.items()}
    return gb | {f"{name}_gib": round(size / 2**30, 3) for name, size in sizes.items()}


def count(name: str, variant: str, args: argparse.Namespace) -> Row:
    """A row of bytes and of what fits."""
    shape, form = SHAPES[name], VARIANTS[variant]
    weights, kv = weight_bytes(shape, form), kv_bytes(shape, form, args.tokens)
    row: Row = {"op": "count", "shape": name, "variant": variant, "tokens": args.tokens}
    row |= with_units({"weights": weights, "kv": kv, "total": weights + kv})
    row["linear_and_kv_gb"] = round(linear_and_kv_bytes(shape, form, args.tokens) / 1e9, 3)
    if (name, args.tokens) == (PAPER_SHAPE, PAPER_TOKENS) and variant in PAPER_GB:
        row["paper_gb"] = PAPER_GB[variant]
    row["other_gb"] = args.other_gb
    row["fits"] = {}
    for gpu in args.gpus:
        memory = (gpu - args.other_gb) * 1e9
        batches = {str(tokens): largest_batch(shape, form, tokens, memory) for tokens in args.contexts}
        row["fits"][f"{gpu:g}"] = {"batch": batches, "context": longest_context(shape, form, memory)}
    return row


def measure(name: str, variant: str, args: argparse.Namespace) -> Row:
    """A row of what an engine occupies, or of its error."""
    shape, form = SHAPES[name], VARIANTS[variant]
    engine = {
        "kv_cache_dtype": form.kv_cache_dtype,
        "max_model_len": args.tokens,
        "max_num_seqs": 1,
        "max_num_batched_tokens": args.tokens,
        "kv_cache_memory_bytes": kv_bytes(shape, form, args.tokens) + SPARE_PAGES * page_bytes(shape, form),
    }
    config = model_config(shape, form, args.tokens)
    spec = {"op": "memory", "config": config, "engine": engine, "points": [{"tokens": args.tokens}]}
    row: Row = {"op": "measure", "shape": name, "variant": variant, "tokens": args.tokens, "versions": versions()}
    print(f"{name} {variant}: measuring", file=sys.stderr)
    rows, error = run_cell(spec, args.limit_seconds, in_process=True)
    if not rows:
        return row | {"error": error or "no row"}
    (seen,) = rows
    parts = {part: seen[part] for part in ("weights", "activations", "graphs", "not_torch")}
    parts["kv"] = seen["kv_per_token"] * args.tokens
    row |= {"device": seen["device"], "kv_per_token": seen["kv_per_token"]}
    counted = {"counted_weights": weight_bytes(shape, form), "counted_kv": kv_bytes(shape, form, args.tokens)}
    return row | with_units(parts | {"total": sum(parts.values())} | counted)


def table(title: str, names: list[str], rows: list[list[Any]]) -> None:
    """A Markdown table."""
    made = Table(*names, box=box.MARKDOWN)
    for row in rows:
        made.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row))
    print(f"\n{title}")
    Console(width=TABLE_WIDTH).print(made, highlight=False)


def print_counts(rows: list[Row], args: argparse.Namespace) -> None:
    """What models and caches take, and what fits."""
    columns = ["weights_gb", "kv_gb", "total_gb", "total_gib", "linear_and_kv_gb"]
    table(
        f"Counted: one sequence of {args.tokens} tokens; activations and CUDA graphs not included",
        ["shape", "variant", "weights GB", "KV GB", "sum GB", "sum GiB", "linear + KV GB", "paper GB"],
        [[r["shape"], r["variant"], *(r[c] for c in columns), str(r.get("paper_gb", ""))] for r in rows],
    )
    fits = [
        [r["shape"], r["variant"], gpu, *fit["batch"].values(), fit["context"]]
        for r in rows
        for gpu, fit in r["fits"].items()
    ]
    table(
        f"What fits with {args.other_gb:g} GB held back for activations, CUDA graphs and the CUDA context",
        ["shape", "variant", "GPU GB", *(f"batch of {tokens}" for tokens in args.contexts), "longest context"],
        fits,
    )


def print_measured(rows: list[Row], args: argparse.Namespace) -> None:
    """Where the memory is."""
    columns = ["weights", "counted_weights", "kv", "counted_kv", "activations", "graphs", "not_torch", "total"]
    names = ["shape", "variant", *(f"{column.replace('_', ' ')} GB" for column in columns), "total GiB", "error"]
    values = [
        [*(r.get(f"{column}_gb", "") for column in columns), r.get("total_gib", ""), r.get("error", "")] for r in rows
    ]
    table(
        f"Measured: one sequence of {args.tokens} tokens, {versions()}",
        names,
        [[r["shape"], r["variant"], *v] for r, v in zip(rows, values, strict=True)],
    )


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""

    def numbers(kind: type) -> Any:
        return lambda text: [kind(x) for x in text.split(",")]

    assert __doc__ is not None
    shapes = ["llama-2-7b", "llama-2-13b", "llama-3-8b"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=["count", "measure"], default="count", help="(%(default)s)")
    parser.add_argument(
        "--shapes", type=names_of(SHAPES), default=shapes, help=f"out of {','.join(SHAPES)} ({','.join(shapes)})"
    )
    parser.add_argument(
        "--variants", type=names_of(VARIANTS), default=list(VARIANTS), help=f"out of {','.join(VARIANTS)} (all)"
    )
    parser.add_argument("--tokens", type=int, default=2048, help="length of the one sequence (%(default)s)")
    parser.add_argument(
        "--contexts", type=numbers(int), default=[2048, 8192], help="count: lengths for the largest batch (2048,8192)"
    )
    parser.add_argument("--gpus", type=numbers(float), default=[24, 40, 80], help="count: sizes in GB (24,40,80)")
    parser.add_argument(
        "--other-gb", type=float, default=0.0, help="count: held back for what cannot be counted (%(default)s)"
    )
    parser.add_argument(
        "--limit-seconds",
        type=float,
        default=900,
        help="measure: limit of an engine (%(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a row instead of tables")
    return parser


def run(args: argparse.Namespace) -> None:
    """Print the rows. Raises ConfigError where there is nothing to measure on."""
    if args.op == "measure" and not torch.cuda.is_available():
        raise ConfigError("--op measure needs a CUDA device, and there is none; --op count needs none")

    def rows() -> Iterator[Row]:
        for shape in args.shapes:
            for variant in args.variants:
                yield (count if args.op == "count" else measure)(shape, variant, args)

    if args.json:
        for row in rows():
            print(json.dumps(row), flush=True)
    else:
        (print_counts if args.op == "count" else print_measured)(list(rows()), args)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for bad input. Rows with an error are no failure."""
    args = build_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the engine's processes as Ctrl-C does
    try:
        run(args)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
