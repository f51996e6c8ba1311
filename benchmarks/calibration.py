#!/usr/bin/env python3
"""How long `wkvquant quantize` takes for a model of a given shape, from a few of its blocks.

    python benchmarks/calibration.py --shape llama-2-7b --recipe paper --device cuda --output OUT.jsonl

Makes a model of random weights that has the blocks to be measured and those that follow them in the loss, and takes
hidden states through them with the functions, and with the settings, of `wkvquant quantize`, the state after each block
written to the disk. So every measured block has all its followers, as most blocks of a whole model have. Random
weights and text cost what real ones do, but their losses say nothing.

Where the recipe tunes all blocks together, the measured ones are. That is projected by FLOP, since the head's part of
it does not grow with the blocks. Where --limit-seconds leaves blocks out, nothing is tuned, which is said, and the next
command measures them all again.

projected: minutes for all blocks of the shape at the mean time of those measured, and for tuning them; the comparison
of the logits and the writing of the checkpoint are not in it. PFLOP: of the measured blocks, without their tuning,
counted from shapes (estimate.py); TFLOP/s: these over their time. Memory is the peak of this process, beside what the
preflight of `wkvquant quantize` expects, which leaves Python and libraries out.

For a whole run of `wkvquant quantize`, and for one that is interrupted, the model can be made alone:

    python benchmarks/calibration.py --shape llama-2-7b --device cuda --write-model DIR
    wkvquant quantize DIR/model OUT --calib-text DIR/calib.txt --recipe paper --samples 128 --seq-len 2048 --device cuda
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from shapes import SHAPES, VARIANTS, Shape, model_config
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import vllm_wkvquant
from vllm_wkvquant.config import ConfigError
from vllm_wkvquant.device import check_device, device_name
from vllm_wkvquant.quantize.blocks import EXACT, first_hidden, of_all_workers, quantize_block
from vllm_wkvquant.quantize.estimate import block_flop, device_bytes, host_bytes, place, tuning_flop
from vllm_wkvquant.quantize.pipeline import peak_memory
from vllm_wkvquant.quantize.plan import Plan, Settings, fingerprint, preflight
from vllm_wkvquant.quantize.recipes import DEFAULT, find_recipe
from vllm_wkvquant.quantize.runner import Ahead
from vllm_wkvquant.quantize.state import RunState
from vllm_wkvquant.quantize.storage import stage
from vllm_wkvquant.quantize.tune import tune

TABLE_WIDTH = 140


@dataclass(frozen=True)
class Block:
    """What a measured block took: seconds of each of its parts, and FLOP."""

    seconds: dict[str, float]
    flop: float

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def write_model(path: Path, shape: Shape, layers: int, seq_len: int, device: str) -> None:
    """A model of `layers` blocks of this shape with random weights, and a tokenizer whose tokens are numbers."""
    path.mkdir()
    config = model_config(shape, VARIANTS["bf16"], seq_len) | {"num_hidden_layers": layers}
    (path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.bfloat16)
    generator = torch.Generator(device).manual_seed(0)
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        tensor = torch.ones(parameter.shape, device=device)
        if parameter.dim() == 2:
            tensor = torch.randn(parameter.shape, generator=generator, device=device) / parameter.shape[1] ** 0.5
        parts = name.split(".")
        file = f"model-{parts[2]}.safetensors" if "layers" in parts else "model-outer.safetensors"
        files.setdefault(file, {})[name] = tensor.to(torch.bfloat16).cpu()
    for file, tensors in files.items():
        save_file(tensors, path / file)
    index = {name: file for file, tensors in files.items() for name in tensors}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    words = Tokenizer(models.WordLevel({str(i): i for i in range(shape.vocab)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0").save_pretrained(path)


def write_text(path: Path, shape: Shape, tokens: int) -> None:
    """As many random tokens."""
    ids = torch.randint(shape.vocab, (tokens,), generator=torch.Generator().manual_seed(0))
    path.write_text(" ".join(map(str, ids.tolist())))


def write_inputs(folder: Path, args: argparse.Namespace, layers: int) -> None:
    """folder/model and folder/calib.txt, with as much text as the windows take."""
    write_model(folder / "model", SHAPES[args.shape], layers, args.seq_len, args.device)
    write_text(folder / "calib.txt", SHAPES[args.shape], args.samples * args.seq_len)


def measure(plan: Plan, count: int, limit_seconds: float) -> tuple[list[Block], float | None]:
    """Take hidden states through the first `count` blocks, or as many as the limit allows, at least one. What they
    took, and the seconds that tuning them together did, where the recipe does that and all were taken."""
    state = RunState(plan.settings.out, fingerprint(plan), stage(plan))
    hidden, ahead = first_hidden(plan), Ahead(plan)
    blocks: list[Block] = []
    tuned: list[dict[str, torch.Tensor]] = []
    began = time.perf_counter()
    for layer in range(count):
        spent = time.perf_counter() - began
        if blocks and spent + spent / len(blocks) > limit_seconds:
            break
        flop = plan.workers.size * sum(block_flop(plan, layer).values())
        tensors, report = quantize_block(plan, layer, hidden, ahead)
        tuned.append(tensors)
        start = time.perf_counter()
        state.commit(tensors, report, of_all_workers(plan, hidden))
        blocks.append(Block({**report["seconds"], "write": time.perf_counter() - start}, flop))
        print(f"block {layer + 1}/{count}: {blocks[-1].total:.1f} s", file=sys.stderr)
    start = time.perf_counter()
    state.close()
    blocks[-1].seconds["write"] += time.perf_counter() - start
    if not plan.recipe.tuning or len(blocks) < plan.adapter.num_layers:
        return blocks, None
    exact = hidden.pop(EXACT)
    hidden.clear()
    start = time.perf_counter()
    tune(
        plan,
        tuned,
        plan.recipe.candidates[0],
        exact,
        lambda done, kl: print(f"all together, {done} epochs", file=sys.stderr),
    )
    return blocks, time.perf_counter() - start


def summarize(
    plan: Plan, shape: Shape, blocks: list[Block], tuning_seconds: float | None, peak: dict[str, int]
) -> dict[str, Any]:
    """What a row has of the measured blocks. tuning_seconds: of `measure`; peak: of `peak_memory`."""
    seconds = sum(block.total for block in blocks)
    flop = sum(block.flop for block in blocks)
    parts = list(dict.fromkeys(name for block in blocks for name in block.seconds))
    expected = {"host": host_bytes(plan)}
    if plan.settings.device != "cpu":
        expected["device"] = device_bytes(plan)
    projected, projected_flop = seconds / len(blocks) * shape.layers, flop / len(blocks) * shape.layers
    tuning: dict[str, float] = {}
    if tuning_seconds is not None:
        own, whole = tuning_flop(plan), tuning_flop(plan, shape.layers)
        projected, projected_flop = projected + tuning_seconds * whole / own, projected_flop + whole
        tuning = {
            "tuning_seconds": round(tuning_seconds, 2),
            "tuning_pflop": own / 1e15,
            "projected_tuning_minutes": round(tuning_seconds * whole / own / 60, 2),
        }
    return {
        "blocks_measured": len(blocks),
        "seconds": round(seconds, 2),
        "seconds_by_part": {name: round(sum(b.seconds.get(name, 0.0) for b in blocks), 2) for name in parts},
        "seconds_by_block": [round(block.total, 2) for block in blocks],
        **tuning,
        "projected_minutes": round(projected / 60, 2),
        "pflop": flop / 1e15,
        "projected_pflop": projected_flop / 1e15,
        "tflops": round(flop / seconds / 1e12, 3),
        "storage": asdict(plan.storage),
        "peak_bytes": peak,
        "expected_bytes": expected,
    }


def key_of(args: argparse.Namespace) -> dict[str, Any]:
    """What a row is known by."""
    names = ("shape", "recipe", "samples", "seq_len", "blocks", "dtype", "memory_budget_gb")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    versions |= {"vllm-wkvquant": vllm_wkvquant.__version__}
    own = {name: getattr(args, name) for name in names}
    return {"op": "calibration", **own, "device": device_name(args.device), "versions": versions}


def run_shape(args: argparse.Namespace) -> dict[str, Any]:
    """Make the model and measure it. Raises ConfigError as `wkvquant quantize`."""
    shape, learning = SHAPES[args.shape], find_recipe(args.recipe).learning
    layers = args.blocks + (learning.followers if learning else 0)
    with tempfile.TemporaryDirectory(prefix="wkvquant-calibration-", dir=args.folder) as name:
        folder = Path(name)
        write_inputs(folder, args, layers)
        settings = Settings(
            model=folder / "model",
            out=folder / "out",
            calib_text=folder / "calib.txt",
            recipe=args.recipe,
            samples=args.samples,
            seq_len=args.seq_len,
            device=args.device,
            dtype=args.dtype,
            memory_budget=None if args.memory_budget_gb is None else int(args.memory_budget_gb * 1e9),
        )
        if args.device != "cpu":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            plan = place(preflight(settings))
            blocks, tuning_seconds = measure(plan, args.blocks, args.limit_seconds)
        lacking = {
            "left_out": plan.left_out or None,
            "without_tuning": find_recipe(args.recipe).tuning is not None and tuning_seconds is None,
        }
        return summarize(plan, shape, blocks, tuning_seconds, peak_memory(args.device)) | lacking


def print_row(row: dict[str, Any]) -> None:
    """A Markdown table of seconds by part, and the rest in lines."""
    table = Table("part", "seconds", "%", box=box.MARKDOWN)
    for name, seconds in row["seconds_by_part"].items():
        table.add_row(name, f"{seconds:.1f}", f"{100 * seconds / row['seconds']:.0f}")
    print(f"\n{row['shape']}, {row['recipe']}, {row['blocks_measured']} blocks, {row['samples']} x {row['seq_len']}")
    print(f"{row['device']}, {row['dtype']}, kept on {row['storage']}, {row['versions']}")
    Console(width=TABLE_WIDTH).print(table, highlight=False)
    if "tuning_seconds" in row:
        print(f"tuned together in {row['tuning_seconds']:.1f} s, {row['projected_tuning_minutes']:.1f} minutes in all")
    # of older rows nothing is known
    without = ", without tuning, which was not measured" if row.get("without_tuning") else ""
    print(f"projected: {row['projected_minutes']:.1f} minutes for {SHAPES[row['shape']].layers} blocks{without}")
    if row.get("left_out"):
        print(f"left out for want of memory: {row['left_out']}")
    print(f"{row['pflop']:.4g} PFLOP measured, {row['projected_pflop']:.4g} in all, {row['tflops']} TFLOP/s")
    for where, peak in row["peak_bytes"].items():
        print(f"peak on {where}: {peak / 1e9:.2f} GB, {row['expected_bytes'][where] / 1e9:.2f} expected")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-2-7b", help="(%(default)s)")
    parser.add_argument("--recipe", default=DEFAULT, help="of `wkvquant quantize` (%(default)s)")
    parser.add_argument("--blocks", type=int, default=4, help="blocks to measure (%(default)s)")
    parser.add_argument(
        "--samples", type=int, default=128, help="windows of text, some of which are held out as there (%(default)s)"
    )
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens in a window (%(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16", help="of the runs (%(default)s)"
    )
    parser.add_argument("--memory-budget-gb", type=float, help="memory to use, in 10^9 bytes (what is free)")
    parser.add_argument(
        "--limit-seconds", type=float, default=3600, help="measure no further block that would end later (%(default)s)"
    )
    parser.add_argument("--folder", type=Path, help="where the model and the state of the run are put (the system's)")
    parser.add_argument(
        "--write-model", type=Path, metavar="DIR", help="only make the whole model and text for it, in a new directory"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.jsonl", help="file that keeps the rows, for another run")
    return parser


def run(args: argparse.Namespace) -> None:
    """Measure, unless --output has it, and print; or only make the model. Raises ConfigError on bad input."""
    if args.blocks < 1:
        raise ConfigError(f"--blocks {args.blocks} must be positive")
    find_recipe(args.recipe)
    check_device(args.device)
    if args.write_model:
        if args.write_model.exists():
            raise ConfigError(f"{args.write_model} is there already; --write-model makes a new directory")
        args.write_model.mkdir(parents=True)
        write_inputs(args.write_model, args, SHAPES[args.shape].layers)
        return
    if args.output and not args.output.absolute().parent.is_dir():
        raise ConfigError(f"{args.output.absolute().parent} is not a directory; --output needs one that exists")
    key = key_of(args)
    lines = args.output.read_text().splitlines() if args.output and args.output.is_file() else []
    rows = [row for row in map(json.loads, lines) if row.items() >= key.items()]
    row = next((row for row in rows if row["blocks_measured"] == args.blocks), None)  # --limit-seconds may leave fewer
    if row is None:
        row = key | run_shape(args)
        if args.output:
            with args.output.open("a") as file:
                file.write(json.dumps(row) + "\n")
    print_row(row)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for bad input."""
    try:
        run(build_parser().parse_args(argv))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
