"""The `wkvquant` command: quantize | write-text | inspect | eval."""

import argparse
import re
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import vllm_wkvquant
from vllm_wkvquant.config import ConfigError
from vllm_wkvquant.output import Notes, complain, to_nowhere
from vllm_wkvquant.quantize.recipes import DEFAULT, RECIPES

if TYPE_CHECKING:
    from vllm_wkvquant.quantize.estimate import Estimate

MODEL = "directory of a Hugging Face checkpoint, or a model's name on the hub"
DEVICE = "cpu, cuda, or a GPU by its number, as cuda:1 (cuda where torch sees a GPU)"
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MB" or "4GiB"."""
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 500MB")
    size = int(float(match[1]) * UNITS[match[2].upper()])
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be at least one byte")
    return size


def add_quantize_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `wkvquant quantize`."""
    recipes = "\n".join(f"  {r.name:8s} {r.summary}" for r in RECIPES.values())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "Make a checkpoint with 4-bit weights and calibrated 4-bit KV cache parameters from a Hugging Face causal LM.\n"
        "One decoder block is in memory at a time, but while the model writes its own text. A run that was stopped\n"
        "goes on with --resume."
    )
    parser.epilog = f"recipes:\n{recipes}"
    parser.add_argument("model", type=Path, metavar="MODEL", help=MODEL)
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to create; it must be new or empty")
    parser.add_argument(
        "--calib-text",
        type=Path,
        metavar="FILE",
        help="UTF-8 text to calibrate on (what the model writes itself, as write-text does, beside OUT)",
    )
    parser.add_argument("--recipe", default=DEFAULT, metavar="NAME", help="see below (%(default)s)")
    parser.add_argument(
        "--samples", type=int, default=32, help="windows of text; of 32 to 128 of them 8 are held out (%(default)s)"
    )
    parser.add_argument(
        "--own-samples",
        type=int,
        default=0,
        metavar="N",
        help="windows that the model writes itself, beside those of FILE: as many as --samples keep more of what FILE "
        "does not show (%(default)s)",
    )
    parser.add_argument("--seq-len", type=int, help="tokens in a window (2048, or what the model has)")
    parser.add_argument("--seed", type=int, default=0, help="which windows of the text are drawn (%(default)s)")
    parser.add_argument("--device", help=DEVICE)
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of the calibration runs; the checkpoint keeps the model's own type (float32 on a CPU, bfloat16 on a GPU)",
    )
    parser.add_argument(
        "--shard-size", type=parse_size, default="5GB", metavar="SIZE", help="largest file of weights (%(default)s)"
    )
    parser.add_argument(
        "--memory-budget",
        type=parse_size,
        metavar="SIZE",
        help="memory to use, on a GPU the GPU's, of each worker: hidden states that do not fit are kept on the host "
        "(what is free)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="processes that share the windows, one to a GPU; the result is that of one but for rounding (%(default)s)",
    )
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="run the workers on a Ray cluster whose hosts all see MODEL, OUT and FILE: host:port, auto for the one "
        "that this host is in, local for one on this host that ends with the run",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what the run will take, and stop")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run towards OUT")


def duration(seconds: float) -> str:
    """ "40 s", "25 min", "3.2 h"."""
    for unit, size, limit in (("s", 1, 100), ("min", 60, 100), ("h", 3600, 100)):
        if seconds < limit * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds / 86400:.2g} days"


def estimate_table(estimate: "Estimate") -> Table:
    """What a run will take, for people."""
    table = Table(title="what this run takes (estimated)", show_header=False)
    on_device = f"GPU {estimate.device_bytes / 1e9:.3g} GB, host " if estimate.device_bytes else ""
    where = ""
    if on_device:
        on_host = [name for name, device in asdict(estimate.storage).items() if device == "cpu"]
        where = f"; kept on the host between uses: {', '.join(on_host) or 'nothing'}"
    table.add_row("work", f"{estimate.flop / 1e15:.3g} PFLOP")
    table.add_row("time", f"{duration(estimate.seconds)} at {estimate.rate / 1e12:.3g} TFLOP/s, files not counted")
    whose = f" of the first of {estimate.workers} workers" if estimate.workers > 1 else ""
    table.add_row(f"memory{whose}", f"{on_device}{estimate.host_bytes / 1e9:.3g} GB{where}")
    table.add_row("written", f"{estimate.written / 1e9:.3g} GB")
    if estimate.left_out:
        table.add_row("left out", f"{estimate.left_out}: too little memory; this costs accuracy")
    return table


def run_quantize(args: argparse.Namespace) -> int:
    """Run `wkvquant quantize`; returns the exit status."""
    from vllm_wkvquant import self_text
    from vllm_wkvquant.checkpoint import read_config
    from vllm_wkvquant.device import default_device
    from vllm_wkvquant.hub import find_model
    from vllm_wkvquant.quantize import launch
    from vllm_wkvquant.quantize.adapters import check_supported
    from vllm_wkvquant.quantize.estimate import place
    from vllm_wkvquant.quantize.plan import Settings, asked_again, check_arguments, preflight_without_text
    from vllm_wkvquant.quantize.state import check_output, finish, is_finished, others

    finished = args.resume and is_finished(args.out)
    device = args.device or default_device()
    if not finished:
        check_output(args.out, args.resume)  # these two again below, but a download may come before that
    check_arguments(args.recipe, args.samples, device, args.seed)
    if args.own_samples < 0:
        raise ConfigError(f"--own-samples {args.own_samples} must not be negative")
    if args.own_samples and args.calib_text is None:
        raise ConfigError("--own-samples come to those of --calib-text, without which all samples are the model's own")
    model = find_model(args.model, lambda folder: check_supported(folder, read_config(folder)))
    settings = Settings(
        model=model,
        out=args.out,
        calib_text=args.calib_text or Path(),  # or what is written below
        recipe=args.recipe,
        samples=args.samples,
        own_samples=args.own_samples,
        seq_len=args.seq_len,
        seed=args.seed,
        device=device,
        dtype=args.dtype or ("float32" if device == "cpu" else "bfloat16"),
        shard_size=args.shard_size,
        resume=args.resume,
        memory_budget=args.memory_budget,
        dry_run=args.dry_run,
        workers=args.workers,
        ray=args.ray,
    )
    if finished:
        finish(args.out, asked_again(settings), args.dry_run)
        then = "would be deleted" if args.dry_run else f"is deleted{others(args.out)}"
        Notes().say(f"{args.out}: finished before; what was left of the run {then}")
        return 0
    if args.calib_text is None or args.own_samples:
        if args.ray or args.dry_run:
            instead = "leave out --own-samples" if args.own_samples else "give one with --calib-text"
            raise ConfigError(f"{'--ray' if args.ray else '--dry-run'} writes no text; {instead}")
        if args.workers != 1:
            launch.check(settings)
        plan, count = preflight_without_text(settings), args.own_samples or args.samples
        if args.workers == 1:
            place(plan)  # before long work; workers find out together
        own_text = self_text.text_for(args.out, model, count, plan.windows.tokens.shape[1], args.seed, device)
        settings = replace(settings, own_text=own_text) if args.own_samples else replace(settings, calib_text=own_text)
    console, out = Notes(stderr=True), Notes()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
        console=console,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task("checking", total=None, left="")
        first: tuple[int, float] | None = None  # blocks that were done when the first one began, and when that was

        def announce(estimate: "Estimate") -> None:
            console.print(estimate_table(estimate))
            bar.update(task, description="blocks")

        def progress(done: int, total: int, note: str) -> None:
            nonlocal first
            now = time.monotonic()
            first = first or (done, now)
            left = ""
            if first[0] < done < total:
                left = f"{duration((total - done) * (now - first[1]) / (done - first[0]))} left"
            bar.update(task, description=f"blocks {note}", completed=done, total=total, left=left)
            if not console.is_terminal:  # a log: one line a block
                console.say(" ".join(filter(None, (f"block {done}/{total}", note, left))))

        report = launch.run(settings, progress, announce)
    if not report:
        return 0
    table = Table(title="candidates for the smoothing of keys, on held-out calibration text")
    for column in ("", "KL(16-bit cache || 4-bit cache)", "se"):
        table.add_column(column, justify="right")
    for name, row in report["candidates"].items():
        style = "bold" if name == report["smoothing"] else None
        table.add_row(name, f"{row['kl']:.5f}", f"{row['kl_se']:.5f}", style=style)
    out.print(table)
    if report["weights"]:
        w = report["weights"]
        out.print(f"KL(16-bit || 4-bit weights) there {w['kl']:.5f} (se {w['kl_se']:.5f})", highlight=False)
    if report["tuning"]:
        w, c, b = (report["tuning"][name] for name in ("weights", "cache", "both"))
        out.print(
            f"tuned all together: KL(16-bit || 4-bit weights) {w['kl']:.5f}, KL(16-bit cache || 4-bit cache) "
            f"{c['kl']:.5f}, KL(16-bit || 4-bit weights and cache) {b['kl']:.5f}",
            highlight=False,
        )
    without = f", without {report['left_out']}, which did not fit in memory" if report["left_out"] else ""
    out.say(f"{settings.out}: {report['smoothing']} chosen{without}{others(settings.out)}")
    return 0


def add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `wkvquant inspect`."""
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="checkpoint that `wkvquant quantize` wrote")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run_inspect(args: argparse.Namespace) -> int:
    """Run `wkvquant inspect`; returns the exit status."""
    from vllm_wkvquant import inspect

    return inspect.main(args)


def add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `wkvquant eval`."""
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="checkpoint that `wkvquant quantize` wrote")
    parser.add_argument("--baseline", type=Path, required=True, metavar="MODEL", help=f"what it was made from: {MODEL}")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text to score")
    parser.add_argument("--window", type=int, default=2048, help="tokens in a window, each scored afresh (%(default)s)")
    parser.add_argument("--windows", type=int, default=10, help="number of windows; 0 is the whole text (%(default)s)")
    parser.add_argument(
        "--chunk",
        type=int,
        help="tokens attended as they are before they become past: the prefill chunk (transformers: 1, vllm: 64)",
    )
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers", help="(%(default)s)")
    parser.add_argument("--device", help=f"of --engine transformers: {DEVICE}")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the transformers run"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run_eval(args: argparse.Namespace) -> int:
    """Run `wkvquant eval`; returns the exit status."""
    from vllm_wkvquant import evaluate

    return evaluate.main(args)


def add_write_text_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `wkvquant write-text`."""
    parser.description = (
        "Write text that the model makes up itself, from random first tokens on. `wkvquant quantize` writes what it\n"
        "needs itself; this is for other uses, and for what another GPU shall write."
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help=MODEL)
    parser.add_argument("file", type=Path, metavar="FILE", help="text file to create")
    parser.add_argument("--tokens", type=int, default=1 << 17, help="how many, at least (%(default)s)")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a text (%(default)s)")
    parser.add_argument("--batch", type=int, help="texts at a time (16 on a CPU, what fits and at most 128 on a GPU)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (%(default)s)")
    parser.add_argument("--device", help=DEVICE)


def run_write_text(args: argparse.Namespace) -> int:
    """Run `wkvquant write-text`; returns the exit status."""
    from vllm_wkvquant import self_text

    return self_text.main(args)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command. Nothing heavy is imported before a command runs."""
    parser = argparse.ArgumentParser(prog="wkvquant", description="4-bit weights and a 4-bit paged KV cache for vLLM")
    parser.add_argument("--version", action="version", version=f"vllm-wkvquant {vllm_wkvquant.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    quantize = commands.add_parser("quantize", help="make a checkpoint from a Hugging Face model")
    add_quantize_arguments(quantize)
    quantize.set_defaults(run=run_quantize)
    writing = commands.add_parser("write-text", help="let a model write text to calibrate on")
    add_write_text_arguments(writing)
    writing.set_defaults(run=run_write_text)
    look = commands.add_parser("inspect", help="show and validate a checkpoint")
    add_inspect_arguments(look)
    look.set_defaults(run=run_inspect)
    evaluation = commands.add_parser("eval", help="measure perplexity and KL divergence")
    add_eval_arguments(evaluation)
    evaluation.set_defaults(run=run_eval)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status: 0, 2 for bad input, 130 when interrupted, 141
    when nobody reads the output any more."""
    args = build_parser().parse_args(argv)
    try:
        status = args.run(args)
        sys.stdout.flush()  # here, where it is known what to do if nobody reads
        return status
    except BrokenPipeError:
        to_nowhere(sys.stdout)
        return 141  # as SIGPIPE ends others
    except ConfigError as error:
        complain(f"error: {error}")
        return 2
    except OSError as error:  # of a path that cannot be, or a directory that may not be entered
        complain(f"error: {f'{error.filename}: {error.strerror}' if error.filename else error}")
        return 2
    except KeyboardInterrupt:
        more = "; the same command goes on with --resume" if args.run is run_quantize else ""
        complain(f"interrupted{more}")
        return 130


if __name__ == "__main__":
    sys.exit(main())
