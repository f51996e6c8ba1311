#!/usr/bin/env python3
"""Speed of whole engines with different weights and KV caches, through vLLM's LLM, with random weights.

    python benchmarks/throughput.py --op throughput --shapes llama-2-13b --output OUT.jsonl
    python benchmarks/throughput.py --op step --shapes llama-3-8b --output OUT.jsonl

throughput: all requests at once, until the last is done. Random prompts of one length, outputs of one length, greedy.
step: the time of a decode step at each point, batch x context. The context is prefilled with random tokens; a time is
that of one `LLMEngine.step`, engine and caller in one process, in steps that decode one token of every sequence.

Variants: bf16, weights and cache; w4, the weights of this package (4 bits, groups of 128) with a bf16 cache; w4-fp8 and
w4-int4, the same with vLLM's fp8 and int4_per_token_head caches; w4kv4, the same with the cache of this package. Each
is measured in a process of its own. The baseline is measured first and last. A row's ratio is its speed over that of
the baseline, mean of both; rows are marked `discard` where the two differ by more than 3 %, or one of them failed.

With --output, a row is written as soon as it is there, and rows of the file that are of the same lengths, settings and
versions are not measured again, unless they have an error. After a change of the code or on another machine give a
new file. Models are a config.json and random weights (engine_cell.py): nothing is downloaded.
"""

import argparse
import json
import math
import signal
import statistics
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cells import Results, Row, run_cell, versions
from rich import box
from rich.console import Console
from rich.table import Table
from shapes import SHAPES, VARIANTS, model_config, names_of

from vllm_wkvquant.config import ConfigError

WORKLOADS = {  # requests, input and output tokens of each
    "llama-2-7b": (400, 512, 1536),
    "llama-2-13b": (400, 512, 1536),
    "llama-3-8b": (600, 4096, 2048),
    "tiny": (8, 32, 16),
}
MAX_SPREAD = 0.03  # between the two runs of the baseline
MAX_NUM_SEQS = 512  # of throughput: enough for the cache to be what limits them
SKIPPED_STEPS = 8  # before the measured ones
TABLE_WIDTH = 200  # columns; a table that is cut is of no use


@dataclass(frozen=True)
class Cell:
    """A process, what it measures (cells.py), and what each of its rows is known by, in the order of its points."""

    name: str
    spec: dict[str, Any]
    keys: list[Row]
    closing: bool  # the baseline's second


def workload(args: argparse.Namespace, shape: str) -> Row:
    """The point of throughput: the shape's, or what was given."""
    given = (args.requests, args.input_len, args.output_len)
    values = (default if own is None else own for own, default in zip(given, WORKLOADS[shape], strict=True))
    return dict(zip(("requests", "input_len", "output_len"), values, strict=True))


def decode_point(args: argparse.Namespace, batch: int, context: int) -> Row:
    """A point of step. room: tokens of a sequence while others are in their prefill, and in the steps after it."""
    if args.max_num_batched_tokens <= batch:
        raise ConfigError(f"--max-num-batched-tokens must be more than the largest batch, {batch}")
    prefill_steps = math.ceil(batch * context / (args.max_num_batched_tokens - batch))
    room = prefill_steps + SKIPPED_STEPS + args.steps + 2
    return {"batch": batch, "context": context, "steps": args.steps, "skipped": SKIPPED_STEPS, "room": room}


def make_cell(args: argparse.Namespace, shape: str, variant: str, closing: bool = False) -> Cell:
    """The cell of a variant, with all points that are asked for."""
    if args.op == "throughput":
        points = [workload(args, shape)]
        max_model_len = points[0]["input_len"] + points[0]["output_len"]
        max_num_seqs = MAX_NUM_SEQS
    else:
        points = [decode_point(args, batch, context) for batch, context in args.points]
        max_model_len = max(point["context"] + point["room"] for point in points)
        max_num_seqs = max(point["batch"] for point in points)
    engine = {
        "kv_cache_dtype": VARIANTS[variant].kv_cache_dtype,
        "max_model_len": max_model_len,
        "max_num_seqs": args.max_num_seqs or max_num_seqs,
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "gpu_memory_utilization": args.gpu_memory_utilization,
        "kv_cache_memory_bytes": None if args.kv_cache_gb is None else int(args.kv_cache_gb * 1e9),
        "block_size": args.block_size if variant == "w4kv4" else None,
        "enforce_eager": args.enforce_eager,
    }
    common = {"op": args.op, "shape": shape, "variant": variant, "closing": closing}
    keys = [common | point | {"engine": engine, "versions": versions()} for point in points]
    config = model_config(SHAPES[shape], VARIANTS[variant], max_model_len)
    spec = {"op": args.op, "config": config, "engine": engine, "points": points}
    return Cell(f"{shape} {variant}", spec, keys, closing)


def cells_of(args: argparse.Namespace, shape: str) -> list[Cell]:
    """The cells of a shape in their order, the baseline's first and last."""
    if args.baseline == "none":
        return [make_cell(args, shape, variant) for variant in args.variants]
    others = [variant for variant in args.variants if variant != args.baseline]
    first = [make_cell(args, shape, variant) for variant in [args.baseline, *others]]
    return [*first, make_cell(args, shape, args.baseline, closing=True)]


def measure(cells: list[Cell], results: Results, args: argparse.Namespace) -> None:
    """Put every row that `results` lacks. A closing baseline that is there closes no run that has something new."""
    anything_new = False
    for cell in cells:
        found = [results.find(key) for key in cell.keys]
        again = args.overwrite or (cell.closing and anything_new)
        missing = [i for i, row in enumerate(found) if again or row is None or "error" in row]
        if not missing:
            print(f"{cell.name}: already there", file=sys.stderr)
            continue
        print(f"{cell.name}: measuring", file=sys.stderr)
        spec = cell.spec | {"points": [cell.spec["points"][i] for i in missing]}
        rows, error = run_cell(spec, args.limit_seconds, in_process=args.op == "step")
        rows += [{"error": error or "no row"}] * (len(missing) - len(rows))
        for i, row in zip(missing, rows, strict=True):
            print(f"{cell.name}: {summary(row)}", file=sys.stderr)
            results.put(cell.keys[i], cell.keys[i] | row)
        anything_new = anything_new or any("error" not in row for row in rows)


def summary(row: Row) -> str:
    """A row's result in a few words."""
    if "error" in row:
        return row["error"]
    return f"{row['ms']:.2f} ms" if "ms" in row else f"{row['output_tokens_per_s']:.0f} output tokens/s"


def speed(row: Row) -> float:
    return row["output_tokens_per_s"] if row["op"] == "throughput" else 1 / row["ms"]


def compare(rows: list[Row], baseline: str) -> list[Row]:
    """The rows of a run with `ratio`, `baseline_spread` and `discard`, point by point; errors have no ratio."""
    compared = []
    for row in rows:
        same = [r for r in rows if all(r.get(name) == row.get(name) for name in ("batch", "context"))]
        ends = [speed(r) for r in same if r["variant"] == baseline and "error" not in r]
        row = row | {"baseline": baseline, "discard": True}
        if len(ends) == 2:
            spread = (max(ends) - min(ends)) / statistics.mean(ends)
            row |= {"baseline_spread": round(spread, 4), "discard": spread > MAX_SPREAD}
        if ends and "error" not in row:
            row["ratio"] = round(speed(row) / statistics.mean(ends), 4)
        compared.append(row)
    return compared


def print_table(rows: list[Row]) -> None:
    """A Markdown table of the rows of a run."""
    names = ["variant", "ratio", "discard", "kv_cache_tokens", "kernels", "device", "error"]
    lengths = {
        "throughput": ["output_tokens_per_s", "total_tokens_per_s", "seconds", "peak_running", "preemptions"],
        "step": ["batch", "context", "ms", "ms_p10", "ms_p90", "prefill_seconds", "cudagraph_mode"],
    }
    names[1:1] = lengths[rows[0]["op"]]
    table = Table(*names, box=box.MARKDOWN)
    for row in rows:
        cut = row | {"error": textwrap.shorten(row.get("error", ""), 60)}
        table.add_row(*(str(cut.get(name, "")) for name in names))
    settings = {name: rows[0][name] for name in ("requests", "input_len", "output_len", "steps") if name in rows[0]}
    print(f"\n{rows[0]['op']}, {rows[0]['shape']}, {settings}, {rows[0]['versions']}")
    Console(width=TABLE_WIDTH).print(table, highlight=False)


def points(text: str) -> list[tuple[int, int]]:
    """Batch x context, separated by commas."""
    try:
        return [(int(batch), int(context)) for batch, context in (p.split("x") for p in text.split(","))]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 1x32768,16x8192") from error


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=["throughput", "step"], required=True, help="what to measure")
    parser.add_argument(
        "--shapes", type=names_of(SHAPES), default=["llama-2-13b"], help=f"out of {','.join(SHAPES)} (llama-2-13b)"
    )
    parser.add_argument(
        "--variants", type=names_of(VARIANTS), default=list(VARIANTS), help=f"out of {','.join(VARIANTS)} (all)"
    )
    parser.add_argument(
        "--baseline",
        choices=[*VARIANTS, "none"],
        default="w4",
        help="what ratios are to, measured first and last; none: no ratios (%(default)s)",
    )
    parser.add_argument("--requests", type=int, help="throughput: number of requests (by shape: 400 or 600)")
    parser.add_argument("--input-len", type=int, help="throughput: tokens of a prompt (by shape: 512 or 4096)")
    parser.add_argument("--output-len", type=int, help="throughput: tokens of an output (by shape: 1536 or 2048)")
    parser.add_argument(
        "--points",
        type=points,
        default=points("1x32768,16x8192,64x2048"),
        help="step: batch x context, separated by commas (1x32768,16x8192,64x2048)",
    )
    parser.add_argument("--steps", type=int, default=50, help="step: measured steps (%(default)s)")
    parser.add_argument(
        "--gpu-memory-utilization", type=float, default=0.9, help="share of the GPU that vLLM may use (%(default)s)"
    )
    parser.add_argument(
        "--kv-cache-gb", type=float, help="size of the KV cache in 10^9 bytes (what --gpu-memory-utilization leaves)"
    )
    parser.add_argument(
        "--max-num-seqs", type=int, help=f"sequences at once ({MAX_NUM_SEQS}; step: the largest batch of the points)"
    )
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192, help="tokens of a step (%(default)s)")
    parser.add_argument("--block-size", type=int, help="tokens of a page of w4kv4 (vLLM's choice)")
    parser.add_argument("--enforce-eager", action="store_true", help="neither CUDA graphs nor compilation")
    parser.add_argument(
        "--limit-seconds", type=float, default=1800, help="a process that takes longer is an error (%(default)s)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.jsonl", help="file that keeps the rows, for another run")
    parser.add_argument("--overwrite", action="store_true", help="measure again what is in the file")
    parser.add_argument("--json", action="store_true", help="print one JSON object a row instead of tables")
    return parser


def run(args: argparse.Namespace) -> None:
    """Measure what is missing and print it, shape by shape. Raises ConfigError on bad input."""
    results = Results(args.output)
    for shape in args.shapes:
        cells = cells_of(args, shape)
        measure(cells, results, args)
        keys = [key for cell in cells for key in cell.keys]
        rows = [row for key in keys if (row := results.find(key)) is not None]
        if args.baseline != "none":
            rows = compare(rows, args.baseline)
            for key, row in zip(keys, rows, strict=True):
                results.put(key, row)
        if args.json:
            print(*(json.dumps(row) for row in rows), sep="\n", flush=True)
        else:
            print_table(rows)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for bad input. Rows with an error are no failure."""
    args = build_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the cell's processes as Ctrl-C does
    try:
        run(args)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
