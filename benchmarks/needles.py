#!/usr/bin/env python3
"""Retrieval from long contexts through vLLM's LLM: does a model find codes in a text as well with a 4-bit cache?

    python benchmarks/needles.py MODEL CKPT --text wiki_test.txt --output OUT.jsonl
    python benchmarks/needles.py MODEL CKPT --text wiki_test.txt --output OUT.jsonl --lengths 4096,16384,32768

Sentences like "One of the special magic numbers for pass key is: 4821337." (needles) stand at known depths of a real
text, and a question follows it. Tasks: passkey, one code; multi, four codes of named things, one asked for; multi-all,
all four asked for. An answer is right where its first numbers are the codes asked for. Answers are greedy. A code has
at least 5 tokens.

Modes: chunked, prompts are prefilled in chunks of at most --chunk tokens, all together; cached, each text was in a
prompt with another question before, and its needles come from the prefix cache (a row is an error unless they do). In
both the needles are at least --chunk tokens before the question, so that it reads them from the paged cache.

Variants, each in a process of its own, all on the same prompts: fp16, MODEL; w4, the weights of CKPT with a 16-bit
cache; w4kv4, CKPT as it is; w4-fp8 and w4-int4, the same weights with vLLM's fp8 and int4_per_token_head caches.

A length counts where fp16 answers at least 90 % of a task's trials in a mode. Over the n trials that count, of which
`gained` are right where the other variant is wrong and `lost` the other way round, a difference is
100 (gained - lost) / n points. Its 95 % interval is Bonett and Price's for paired proportions, McNemar's standard error
after one trial more of either kind, without which it would be 0 +- 0 where no trial differs:
    100 (g - l +- 1.96 sqrt((g + l - (g - l)^2) / (n + 2))),  g = (gained + 1) / (n + 2),  l = (lost + 1) / (n + 2)

A row for each variant, task, length and mode is kept in OUT.jsonl. Rows that are there, of the same prompts, weights,
settings and versions, are not computed again unless they have an error, and tables show all that are there. After a
change of the code or on another machine give a new file. Nothing is downloaded.
"""

import argparse
import hashlib
import json
import math
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cells import Results, Row, run_cell, versions
from needle_prompts import TASKS, Prompts, Trial, numbers
from quality import files_digest
from rich import box
from rich.console import Console
from rich.table import Table
from shapes import names_of

from vllm_wkvquant.checkpoint import Checkpoint, read_config
from vllm_wkvquant.config import ConfigError

MODES = ("chunked", "cached")
COUNTS = 0.9  # of fp16's answers are right where a length counts
Z = 1.96  # of a 95 % interval
MAX_NUM_SEQS = 256
# of the engine, what changes no result but by rounding
UNIMPORTANT = ("model", "max_model_len", "max_num_seqs", "gpu_memory_utilization", "kv_cache_memory_bytes")
TABLE_WIDTH = 200  # columns; a table that is cut is of no use


@dataclass(frozen=True)
class Variant:
    """quantized: CKPT, not MODEL. kv_cache_dtype: vLLM's option, None for the model's own type."""

    quantized: bool
    kv_cache_dtype: str | None


VARIANTS = {
    "fp16": Variant(False, None),
    "w4": Variant(True, None),
    "w4-fp8": Variant(True, "fp8"),
    "w4-int4": Variant(True, "int4_per_token_head"),
    "w4kv4": Variant(True, "auto"),
}
DEFAULT_VARIANTS = ["fp16", "w4", "w4kv4"]


@dataclass(frozen=True)
class Point:
    """The trials of a task and length in a mode. others: prompts that fill the prefix cache; None: it is not used."""

    task: str
    length: int
    mode: str
    trials: list[Trial]
    others: list[list[int]] | None
    max_tokens: int

    @property
    def name(self) -> str:
        return f"{self.task} {self.length} {self.mode}"

    def spec(self) -> dict[str, Any]:
        """What the cell is told."""
        return {"prompts": [t.prompt for t in self.trials], "others": self.others, "max_tokens": self.max_tokens}

    def key(self) -> Row:
        """Fields of its rows."""
        digest = hashlib.sha256(json.dumps(self.spec()).encode()).hexdigest()[:16]
        own = {"task": self.task, "length": self.length, "mode": self.mode, "trials": len(self.trials)}
        return own | {"prompts_sha256": digest}

    def score(self, row: Row) -> Row:
        """A row of the cell with what is right in it, or its error."""
        for i, (trial, cached) in enumerate(zip(self.trials, row["cached"], strict=True)):
            if self.others and cached < trial.end:
                return {"error": f"prompt {i}: {cached} tokens from the prefix cache, its needles end at {trial.end}"}
        correct = [
            int(numbers(answer, len(trial.codes)) == trial.codes)
            for trial, answer in zip(self.trials, row["answers"], strict=True)
        ]
        depths = [trial.depth for trial in self.trials]
        return row | {"accuracy": sum(correct) / len(correct), "correct": correct, "depths": depths}


def make_points(args: argparse.Namespace) -> list[Point]:
    """All points of a run, modes of the same trials. Raises ConfigError where prompts cannot be made."""
    prompts = Prompts(args.model, args.text, args.digits)
    count = math.ceil(args.trials / len(args.lengths))
    points = []
    for task in args.tasks:
        for length in args.lengths:
            trials = prompts.trials(task, length, args.depths, count, args.chunk, args.seed)
            for mode in args.modes:
                others = [t.prompt[: t.shared] + prompts.other_question for t in trials] if mode == "cached" else None
                points.append(Point(task, length, mode, trials, others, prompts.answer_tokens(TASKS[task])))
    return points


def make_engine(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Arguments of vLLM's LLM for a variant."""
    variant = VARIANTS[name]
    dtype = args.dtype or read_config(args.model).get("dtype") or "bfloat16"
    return {
        "model": str((args.checkpoint if variant.quantized else args.model).resolve()),
        "dtype": dtype,
        "kv_cache_dtype": variant.kv_cache_dtype or dtype,
        "max_model_len": max(args.lengths),
        "max_num_seqs": min(MAX_NUM_SEQS, args.max_num_batched_tokens),
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "long_prefill_token_threshold": args.chunk,
        "gpu_memory_utilization": args.gpu_memory_utilization,
        "kv_cache_memory_bytes": None if args.kv_cache_gb is None else int(args.kv_cache_gb * 1e9),
        "enforce_eager": args.enforce_eager,
    }


def make_key(args: argparse.Namespace, name: str) -> Row:
    """Fields of all rows of a variant."""
    engine = {k: v for k, v in make_engine(args, name).items() if k not in UNIMPORTANT}
    checkpoint = files_digest(args.checkpoint) if VARIANTS[name].quantized else None
    weights = {"model_sha256": files_digest(args.model), "checkpoint_sha256": checkpoint}
    return {"variant": name, "model": args.model.name} | weights | {"engine": engine, "versions": versions()}


def measure(args: argparse.Namespace, name: str, points: list[Point], keys: list[Row], results: Results) -> None:
    """Put every row of a variant that `results` lacks. keys: of the points' rows."""
    found = [results.find(key) for key in keys]
    missing = [i for i, row in enumerate(found) if row is None or "error" in row]
    if not missing:
        print(f"{name}: already there", file=sys.stderr)
        return
    print(f"{name}: measuring {len(missing)} rows", file=sys.stderr)
    spec = {"op": "answers", "engine": make_engine(args, name), "points": [points[i].spec() for i in missing]}
    rows, error = run_cell(spec, args.limit_seconds)
    rows = [points[i].score(row) for i, row in zip(missing, rows, strict=False)]
    rows += [{"error": error or "no row"}] * (len(missing) - len(rows))
    for i, row in zip(missing, rows, strict=True):
        said = row.get("error") or f"{100 * row['accuracy']:.1f} % right, {row['seconds']} s"
        print(f"{name} {points[i].name}: {said}", file=sys.stderr)
        results.put(keys[i], keys[i] | row)


def paired(gained: int, lost: int, n: int) -> tuple[float, float, float]:
    """Difference in points between two variants of `n` trials each, and the ends of its 95 % interval."""
    more, fewer = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    middle = more - fewer
    half = Z * math.sqrt((more + fewer - middle**2) / (n + 2))
    return 100 * (gained - lost) / n, 100 * (middle - half), 100 * (middle + half)


@dataclass(frozen=True)
class Outcome:
    """A trial, and by variant whether it was answered right. counts: whether its length does."""

    task: str
    length: int
    mode: str
    depth: float
    right: dict[str, int]
    counts: bool


def outcomes(points: list[Point], rows: dict[str, list[Row | None]]) -> list[Outcome]:
    """Of all trials. rows: by variant, of each point; what is missing or an error is left out."""
    out = []
    for i, point in enumerate(points):
        done = {name: row for name in rows if (row := rows[name][i]) and "error" not in row}
        counts = "fp16" in done and done["fp16"]["accuracy"] >= COUNTS
        for t, trial in enumerate(point.trials):
            right = {name: row["correct"][t] for name, row in done.items()}
            out.append(Outcome(point.task, point.length, point.mode, trial.depth, right, counts))
    return out


def groups(trials: list[Outcome], *fields: str) -> dict[tuple[Any, ...], list[Outcome]]:
    """The trials by the values of some of their fields."""
    found: dict[tuple[Any, ...], list[Outcome]] = {}
    for trial in trials:
        found.setdefault(tuple(getattr(trial, field) for field in fields), []).append(trial)
    return found


def percent(trials: list[Outcome], variant: str) -> str:
    """Of a variant's answers, how many are right."""
    right = [trial.right[variant] for trial in trials if variant in trial.right]
    return f"{100 * sum(right) / len(right):.1f}" if right else ""


def print_table(title: str, names: list[str], rows: list[list[Any]]) -> None:
    """A Markdown table."""
    table = Table(*names, box=box.MARKDOWN)
    for row in rows:
        table.add_row(*map(str, row))
    print(f"\n{title}")
    Console(width=TABLE_WIDTH).print(table, highlight=False)


def difference_rows(trials: list[Outcome], variants: list[str]) -> list[list[Any]]:
    """Of every variant to w4 and to fp16."""
    rows: list[list[Any]] = []
    for ours in variants:
        for theirs in ("w4", "fp16"):
            pairs = [(t.right[ours], t.right[theirs]) for t in trials if {ours, theirs} <= t.right.keys()]
            if ours in (theirs, "fp16") or not pairs:
                continue
            gained, lost = pairs.count((1, 0)), pairs.count((0, 1))
            difference, low, high = paired(gained, lost, len(pairs))
            values = [f"{difference:+.2f}", f"{low:+.2f} .. {high:+.2f}", gained, lost, len(pairs)]
            rows.append([f"{ours} - {theirs}", *values])
    return rows


def print_tables(trials: list[Outcome], variants: list[str]) -> None:
    """Right answers by length and by depth, and differences."""
    rows = [
        [*key, len(these), "yes" if these[0].counts else "no", *(percent(these, v) for v in variants)]
        for key, these in groups(trials, "task", "mode", "length").items()
    ]
    title = f"Right answers in %; a length counts where fp16 has {100 * COUNTS:g} %"
    print_table(title, ["task", "mode", "length", "trials", "counts", *variants], rows)
    counted = [trial for trial in trials if trial.counts]
    rows = [
        [*key, len(these), *(percent(these, v) for v in variants)]
        for key, these in groups(counted, "task", "mode", "depth").items()
        if TASKS[key[0]].asked == 1
    ]
    print_table("By depth, of the lengths that count", ["task", "mode", "depth", "trials", *variants], rows)
    by_task = groups(counted, "task", "mode")
    over_all = {("all", *key): these for key, these in groups(counted, "mode").items()}
    rows = [[*key, *row] for key, these in (by_task | over_all).items() for row in difference_rows(these, variants)]
    names = ["task", "mode", "difference", "points", "95 % interval", "gained", "lost", "trials"]
    print_table("Differences over the lengths that count", names, rows)


def numbers_of(kind: type) -> Callable[[str], list[Any]]:
    """argparse type of a list of numbers, separated by commas."""

    def parse(text: str) -> list[Any]:
        try:
            return [kind(x) for x in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers, separated by commas") from error

    return parse


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL", help="the model that the checkpoint was made from")
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="what `wkvquant quantize` made from MODEL")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text that the codes are hidden in")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="OUT.jsonl", help="file that keeps the rows, for another run"
    )
    parser.add_argument(
        "--lengths",
        type=numbers_of(int),
        default=[2048, 4096, 6144, 8192],
        help="tokens of a prompt and the room for its answer (2048,4096,6144,8192)",
    )
    parser.add_argument(
        "--depths",
        type=numbers_of(float),
        default=[0.0, 0.25, 0.5, 0.75, 1.0],
        help="of the needle asked for: 0 is the start of the text, 1 is --chunk tokens before its end "
        "(0,0.25,0.5,0.75,1)",
    )
    parser.add_argument(
        "--trials", type=int, default=400, help="of each task and mode, over all lengths and depths (%(default)s)"
    )
    parser.add_argument("--tasks", type=names_of(TASKS), default=list(TASKS), help=f"out of {','.join(TASKS)} (all)")
    parser.add_argument("--modes", type=names_of(MODES), default=list(MODES), help=f"out of {','.join(MODES)} (all)")
    parser.add_argument(
        "--variants",
        type=names_of(VARIANTS),
        default=DEFAULT_VARIANTS,
        help=f"to measure, out of {','.join(VARIANTS)} ({','.join(DEFAULT_VARIANTS)})",
    )
    parser.add_argument("--digits", type=int, default=7, help="of a code (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of texts and codes (%(default)s)")
    parser.add_argument(
        "--chunk", type=int, default=256, help="most tokens of a prompt that one step prefills (%(default)s)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16"),
        help="of activations and 16-bit caches (what MODEL's config.json says)",
    )
    parser.add_argument(
        "--max-num-batched-tokens", type=int, default=8192, help="tokens of a step, of all prompts (%(default)s)"
    )
    parser.add_argument(
        "--gpu-memory-utilization", type=float, default=0.9, help="share of the GPU that vLLM may use (%(default)s)"
    )
    parser.add_argument(
        "--kv-cache-gb", type=float, help="size of the KV cache in 10^9 bytes (what --gpu-memory-utilization leaves)"
    )
    parser.add_argument("--enforce-eager", action="store_true", help="neither CUDA graphs nor compilation")
    parser.add_argument(
        "--limit-seconds", type=float, default=1800, help="a process that takes longer is an error (%(default)s)"
    )
    return parser


def check(args: argparse.Namespace) -> None:
    """Raises ConfigError on bad input that nothing else finds."""
    positions = read_config(args.model).get("max_position_embeddings", math.inf)
    if max(args.lengths) > positions:
        raise ConfigError(f"--lengths {max(args.lengths)} is more than the {positions} positions of {args.model}")
    if not all(0 <= depth <= 1 for depth in args.depths):
        raise ConfigError(f"--depths {args.depths} must be in 0 .. 1")
    for option in ("trials", "chunk", "digits"):
        if getattr(args, option) < 1:
            raise ConfigError(f"--{option} {getattr(args, option)} must be positive")
    Checkpoint(args.checkpoint)


def run(args: argparse.Namespace) -> None:
    """Measure what is missing and print the tables. Raises ConfigError on bad input."""
    check(args)
    results = Results(args.output)
    points = make_points(args)
    own = [point.key() for point in points]
    keys = {name: [make_key(args, name) | key for key in own] for name in VARIANTS}
    for name in args.variants:
        measure(args, name, points, keys[name], results)
    rows = {name: [results.find(key) for key in keys[name]] for name in VARIANTS}
    shown = [name for name in VARIANTS if any(rows[name])]
    print_tables(outcomes(points, rows), shown)


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
