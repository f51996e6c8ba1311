#!/usr/bin/env python3
"""Checkpoints of recipes with one part changed, to show what each part is worth.

    python benchmarks/ablate.py MODEL OUT --calib-text wiki_calib.txt --device cuda
    python benchmarks/ablate.py MODEL OUT --calib-text wiki_calib.txt --variants best,best_clipping --seeds 0,1,2

OUT/VARIANT-SEED is a checkpoint like those of `wkvquant quantize` with the same options. What is there is not made
again, what was interrupted goes on, and a variant that fails does not keep the others from being made. The table, whose
rows OUT/ablate.jsonl keeps, has the seconds that each took and what it came to on held-out calibration text: KL
divergences in nats a token, of 4-bit from 16-bit weights and of the 4-bit cache from a 16-bit one, and perplexity. That
is enough to choose by; a seed draws the held-out windows, too, so compare variants of the same seed. For the table on
other texts run the command that is printed at the end.

untuned is best without the tuning of all blocks together: what is learned block by block shows there, and sooner.

Parts of the cache that need no other checkpoint, and caches of others, are rows of quality.py.
"""

import argparse
import gc
import json
import shlex
import sys
import time
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import own_text
import torch
from rich import box
from rich.console import Console
from rich.table import Table

import vllm_wkvquant
from vllm_wkvquant.config import ConfigError
from vllm_wkvquant.device import device_name
from vllm_wkvquant.quantize.calibration import held_out_of
from vllm_wkvquant.quantize.estimate import Estimate
from vllm_wkvquant.quantize.pipeline import quantize
from vllm_wkvquant.quantize.plan import Settings
from vllm_wkvquant.quantize.recipes import ALL, BEST, PAPER, RTN, SLOW, STATIC, Recipe, Smoothing
from vllm_wkvquant.quantize.state import partial_directory

TABLE_WIDTH = 160
ROWS = "ablate.jsonl"


def learning(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with something else about what it learns."""
    assert recipe.learning is not None
    return replace(recipe, learning=replace(recipe.learning, **changes))


def tuning(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with these fields of its tuning changed."""
    assert recipe.tuning is not None
    return replace(recipe, tuning=replace(recipe.tuning, **changes))


def cache_variants(recipe: Recipe) -> dict[str, Recipe]:
    """Without each part of the cache that the weights depend on, or whose statistics others depend on."""
    one = replace(recipe, smoothings=(Smoothing(0.5),), search=())
    still = tuning(one, cache_rate=0.0) if one.tuning else one
    return {
        "all_shift_pairs": replace(recipe, shift_pairs=ALL),
        "slow_shift_pairs": replace(recipe, shift_pairs=SLOW),
        "one_smoothing": one,
        "no_smoothing": replace(still, smoothings=(Smoothing(),)),
        "static_shift": replace(recipe, key_shift="static"),
        "no_key_shift": replace(recipe, key_shift="none"),
        "no_first_shift": replace(recipe, first_shift=False),
        "no_balance": replace(recipe, value_balance=0.0),
        "no_key_hadamard": replace(recipe, key_hadamard=False),
        "no_value_hadamard": replace(recipe, value_hadamard=False),
    }


def learned_cache(recipe: Recipe) -> Recipe:
    """The cache learned with the weights, from the smoothing of `one_smoothing`, which is what to compare it with."""
    return replace(learning(recipe, cache=True, cache_rate=1e-3), smoothings=(Smoothing(0.5),), search=())


def learning_variants(recipe: Recipe) -> dict[str, Recipe]:
    """With something else about how weights are learned, block by block."""
    return {
        "searched_clip": learning(recipe, rounding=False, epochs=1),  # nothing is learned
        "clipping": learning(recipe, clip_rate=0.5),
        "clipping_0.1": learning(recipe, clip_rate=0.1),
        "clipping_alone": learning(recipe, rounding=False, clip_rate=0.5),
        "rate_0.25": learning(recipe, rate=0.25),
        "rate_1": learning(recipe, rate=1.0),
        "no_folding": replace(recipe, value_balance=0.0, value_hadamard=False),
        "whole_range": learning(recipe, clip="whole"),
        "mse": learning(recipe, loss="mse"),
        "all_positions": learning(recipe, skip_first=False),
        "one_follower": learning(recipe, followers=1),
        "20_epochs": learning(recipe, epochs=20),
        "40_epochs": learning(recipe, epochs=40),
        "80_epochs": learning(recipe, epochs=80, most=0),
        "batch_1": learning(recipe, batch=1),
        "learned_cache": learned_cache(recipe),  # the paper's; without it the cache is from statistics
    }


UNTUNED = replace(BEST, name="untuned", tuning=None)
TUNING_VARIANTS = {
    "tuning_no_codes": tuning(BEST, code_sigmas=0.0),
    "tuning_no_cache_parameters": tuning(BEST, cache_rate=0.0),
    "tuning_16_bit_cache": tuning(BEST, cache=False),
    "tuning_rate_3e-4": tuning(BEST, rate=3e-4),
}
BEST_VARIANTS = learning_variants(BEST) | TUNING_VARIANTS | cache_variants(BEST)
FOLDED = ("no_balance", "no_value_hadamard")  # parts of the cache that weights have to be learned with
UNTUNED_VARIANTS = learning_variants(UNTUNED) | {name: cache_variants(UNTUNED)[name] for name in FOLDED}
PAPER_VARIANTS = {
    "no_followers": learning(PAPER, followers=0),
    "one_follower": learning(PAPER, followers=1),
    "mse": learning(PAPER, loss="mse"),
    "no_clipping": learning(PAPER, clip="whole", clip_rate=0.0),  # its sigmoid would start at 98 %
    "no_learned_cache": learning(PAPER, cache=False),
    "no_past_only": learning(PAPER, past_only=False),
}
VARIANTS = {
    variant.name: variant
    for variant in [
        *(RTN, STATIC, BEST, UNTUNED, PAPER),
        *(replace(v, name=f"rtn_{name}") for name, v in cache_variants(RTN).items()),
        *(replace(v, name=f"best_{name}") for name, v in BEST_VARIANTS.items()),
        *(replace(v, name=f"untuned_{name}") for name, v in UNTUNED_VARIANTS.items()),
        *(replace(v, name=f"paper_{name}") for name, v in PAPER_VARIANTS.items()),
    ]
}


def as_written(value: Any) -> Any:
    """What JSON makes of it."""
    return json.loads(json.dumps(value))


def finished(settings: Settings) -> dict[str, Any] | None:
    """The report of the checkpoint, if it has been made. Raises ConfigError where it was made otherwise."""
    file = settings.out / "wkvquant.json"
    if not file.is_file():
        return None
    report = json.loads(file.read_text())
    made = {"own_samples": 0} | report["settings"] | {"recipe": report["recipe"]}
    made["device"], _, _ = made["device"].partition(":")
    samples = settings.samples + settings.own_samples
    wanted = {
        "recipe": as_written(asdict(settings.recipe.of(samples - held_out_of(samples)))),
        "samples": samples,
        "own_samples": settings.own_samples,
        "seed": settings.seed,
        "device": settings.device.partition(":")[0],
        "dtype": settings.dtype,
    }
    if settings.seq_len is not None:
        wanted["seq_len"] = settings.seq_len
    for name, value in wanted.items():
        if made[name] != value:
            raise ConfigError(f"{settings.out} was made with another {name}; remove it, or give another OUT")
    return report


def summary(settings: Settings, report: dict[str, Any]) -> dict[str, Any]:
    """What the table has of a report, and what that was computed from."""
    weights, perplexity, chosen = report["weights"], report["perplexity"], report["smoothing"]
    cache, ppl = report["candidates"][chosen], (perplexity["reference"], perplexity[chosen])
    if report["tuning"]:
        weights, cache = report["tuning"]["weights"], report["tuning"]["cache"]
        ppl = report["tuning"]["perplexity"]["weights"], report["tuning"]["perplexity"]["both"]
    return {
        "variant": settings.recipe.name,
        "seed": settings.seed,
        "model": settings.model.name,
        "text": settings.calib_text.name,
        "settings": report["settings"],
        "kl_weights": weights and weights["kl"],
        "kl_weights_se": weights and weights["kl_se"],
        "kl_cache": cache["kl"],
        "kl_cache_se": cache["kl_se"],
        "ppl_w4": ppl[0],
        "ppl_w4kv4": ppl[1],
        "ppl_16_bit": perplexity.get("exact"),
    }


def check_whole(estimate: Estimate) -> None:
    """Raise ConfigError where a part of the recipe is left out, which makes it another variant than it is called."""
    if estimate.left_out:
        raise ConfigError(f"{estimate.left_out} does not fit in memory and would be left out; free some memory")


def make(settings: Settings) -> dict[str, Any]:
    """Make one checkpoint, or go on with it; its row. Raises ConfigError as `quantize`."""
    name = settings.out.name
    blocks = partial_directory(settings.out).glob("block-*.json")  # that an interrupted run has done
    before = sum(sum(json.loads(file.read_text())["seconds"].values()) for file in blocks)
    start = time.perf_counter()
    report = quantize(
        replace(settings, resume=True),
        lambda done, total, note: print(f"{name}: block {done}/{total} {note}", file=sys.stderr),
        check_whole,
    )
    return summary(settings, report) | {
        "seconds": round(before + time.perf_counter() - start, 1),
        "device": device_name(settings.device),
        "versions": {"torch": torch.__version__, "vllm-wkvquant": vllm_wkvquant.__version__},
    }


def failure(settings: Settings, error: Exception) -> dict[str, Any]:
    """The row of a checkpoint that could not be made, which is said at once; what is no bad input is shown whole."""
    message = str(error)
    if not isinstance(error, ConfigError):
        traceback.print_exception(error)
        message = f"{type(error).__name__}: {error}"
    print(f"error: {settings.out.name}: {message}", file=sys.stderr)
    return {"variant": settings.recipe.name, "seed": settings.seed, "error": message}


def print_table(rows: list[dict[str, Any]]) -> None:
    """A Markdown table."""

    def nats(row: dict[str, Any], name: str) -> str:
        return f"{row[name]:.4f} ± {row[name + '_se']:.4f}" if row.get(name) is not None else ""

    def number(x: float | None, digits: int) -> str:
        return "" if x is None else f"{x:.{digits}f}"

    names = ["variant", "seed", "seconds", "KL(16 ‖ W4)", "KL(W4 ‖ W4KV4)", "16 bits", "W4", "W4KV4", "error"]
    table = Table(*names, box=box.MARKDOWN)
    for row in rows:
        table.add_row(
            row["variant"],
            str(row["seed"]),
            number(row.get("seconds"), 0),
            nats(row, "kl_weights"),
            nats(row, "kl_cache"),
            *(number(row.get(name), 3) for name in ("ppl_16_bit", "ppl_w4", "ppl_w4kv4")),
            row.get("error", ""),
        )
    Console(width=TABLE_WIDTH).print(table, highlight=False)


def variant_names(text: str) -> list[str]:
    """argparse type of names out of VARIANTS."""
    names = text.split(",")
    if unknown := [name for name in names if name not in VARIANTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(VARIANTS)}")
    return names


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL", help="directory of a Hugging Face checkpoint")
    parser.add_argument("out", type=Path, metavar="OUT", help="directory of the checkpoints, made if need be")
    parser.add_argument("--calib-text", type=Path, required=True, metavar="FILE", help="UTF-8 text to calibrate on")
    parser.add_argument(
        "--variants", type=variant_names, default=list(VARIANTS), help=f"out of {', '.join(VARIANTS)} (all)"
    )
    parser.add_argument(
        "--seeds", type=lambda s: [int(x) for x in s.split(",")], default=[0], help="calibration seeds (0)"
    )
    parser.add_argument(
        "--samples", type=int, default=128, help="windows of text, up to 16 of which are held out (%(default)s)"
    )
    own_text.add_options(parser)
    parser.add_argument("--seq-len", type=int, help="tokens in a window (2048, or what the model has)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the runs (%(default)s)"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Make what is missing, print what is there; returns the exit status. Raises ConfigError on bad input."""
    own_text.check_options(args)
    args.out.mkdir(parents=True, exist_ok=True)
    wanted = [
        Settings(
            model=args.model,
            out=args.out / f"{variant}-{seed}",
            calib_text=args.calib_text,
            recipe=VARIANTS[variant],
            samples=args.samples,
            own_text=args.own_text,
            own_samples=args.own_samples,
            seq_len=args.seq_len,
            seed=seed,
            device=args.device,
            dtype=args.dtype,
        )
        for variant in args.variants
        for seed in args.seeds
    ]
    reports = [finished(settings) for settings in wanted]  # before any work
    file = args.out / ROWS
    known = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    rows = []
    for settings, report in zip(wanted, reports, strict=True):
        if report is not None:
            own = summary(settings, report)  # of a checkpoint that was removed there may be another row
            rows.append(next((row for row in known if row.items() >= own.items()), own))
            continue
        try:
            rows.append(make(settings))
        except Exception as error:
            rows.append(failure(settings, error))
        else:
            with file.open("a") as lines:
                lines.write(json.dumps(rows[-1]) + "\n")
        gc.collect()  # a GPU's memory, after one that failed for want of it
    print_table(rows)
    ready, failed = (
        [f"{row['variant']}-{row['seed']}" for row in rows if ("error" in row) == wrong] for wrong in (False, True)
    )
    if ready:
        command = ["python", "benchmarks/quality.py", str(args.model)]
        command += [x for name in ready for x in ("--checkpoint", f"{name}={args.out / name}")]
        command += ["--text", "NAME=FILE", "--row", "W4", "--row", "kv4", "--device", args.device]
        print(shlex.join([*command, "--dtype", args.dtype, "--json", "OUT.jsonl"]))
    if failed:
        print(f"error: {len(failed)} of {len(rows)} failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0; 1 where a variant failed; 2 for bad input."""
    try:
        return run(build_parser().parse_args(argv))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
