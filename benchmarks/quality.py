#!/usr/bin/env python3
"""What 4-bit weights and different KV caches cost a model, each on the same tokens.

    python benchmarks/quality.py MODEL --checkpoint rtn=CKPT --text wiki=wiki_test.txt --device cuda --json OUT.jsonl
    python benchmarks/quality.py MODEL --checkpoint best=CKPT --weights gptq=DIR --weights awq=DIR --text ...

Rows for every text and checkpoint: FP16, the model itself; W4, the checkpoint's weights with a 16-bit cache; and W4
with each cache of kv_peers.py, on the same weights. Parts of the cache that are folded into the weights (V's rotation
and balance) cannot be switched off here: give a checkpoint made without them beside the other. --weights adds rows W4
of weights that others have quantized, as weight_peers.py writes them.

Differences of perplexity are paired by token, in percent of what they are against. KL divergences are in nats a token,
of the full distributions. Every ± is a standard error, the larger of that over tokens and that over windows. lowest W4
is the W4 with the least perplexity in the table, whoever made it; differences from it are paired by window, which alone
is in their ±, and have the upper end of the 95 % interval in brackets. top-1: share of tokens whose likeliest successor
is FP16's. bits: of a quantized weight and of a KV element, with all scales and zero points. seconds: what quantizing
the weights took, where it is known. q1 .. q4: perplexity in the first to the last quarter of the window.

Checkpoints whose names differ in a number at the end, best-0 and best-1, are one recipe with several calibration seeds:
a second table has their means and, after ±, the standard deviation of a single one.

One line a row is appended to OUT.jsonl, after each pass over a text. Rows that are there, of the same model, text,
windows, device, type and weights, are not computed again; after a change of the code give a new file.
"""

import argparse
import functools
import gc
import hashlib
import json
import re
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from kv_peers import Variant, variants
from rich import box
from rich.console import Console
from rich.table import Table
from texts import write_stdlib
from weight_peers import PEER_FILE

from vllm_wkvquant.checkpoint import Checkpoint, ShardedTensors, read_config
from vllm_wkvquant.config import ConfigError
from vllm_wkvquant.device import device_name
from vllm_wkvquant.evaluate import (
    Scored,
    SimulatedCache,
    check_run,
    check_same,
    concatenate,
    difference,
    last_hidden,
    load_baseline,
    load_quantized,
    progress,
    read_windows,
    score,
    standard_errors,
)

REFERENCES = ("FP16", "W4")
TABLE_WIDTH = 240  # columns; a table that is cut is of no use


@functools.cache
def files_digest(path: Path) -> str:
    """Of the config and the weights of a checkpoint directory, read once in a process."""
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for file in sorted(set(ShardedTensors(path).files.values())):
        with (path / file).open("rb") as f:
            while part := f.read(1 << 24):
                digest.update(part)
    return digest.hexdigest()[:16]


def weight_bits(ckpt: Checkpoint) -> float:
    """Stored bits of a quantized weight, with its share of scale and zero point."""
    bits = weights = 0
    for name, (_, shape) in ckpt.tensors.headers().items():
        elements = torch.Size(shape).numel()
        if name.endswith(".weight_packed"):
            weights += 8 * elements
        if name.endswith((".weight_packed", ".weight_zero_point")):
            bits += 32 * elements
        elif name.endswith(".weight_scale"):
            bits += 16 * elements
    return bits / weights


@dataclass(frozen=True)
class Quantized:
    """Quantized weights under their name, and a digest of their files.

    ckpt: the checkpoint that they are in; None for a plain model, which has dequantized ones. caches: to measure them
    with. made: bits of a weight and the seconds that it took to quantize them, None where it is not known.
    """

    name: str
    path: Path
    ckpt: Checkpoint | None
    caches: dict[str, Variant]
    made: dict[str, float | None]
    digest: str

    @classmethod
    def open(cls, name: str, path: Path, model: dict[str, Any], window: int, device: str) -> "Quantized":
        """A checkpoint of ours.

        Raises ConfigError where it is none of this model (its config.json) or too short for the window.
        """
        ckpt = Checkpoint(path)
        check_run(window, device, [model, ckpt.config])
        check_same(path, ckpt.config, model)
        made = {"weight_bits": weight_bits(ckpt), "seconds": None}
        return cls(name, path, ckpt, variants(ckpt, window, device), made, files_digest(path))

    @classmethod
    def open_plain(cls, name: str, path: Path, model: dict[str, Any], window: int, device: str) -> "Quantized":
        """A plain model with what weight_peers.py says of it, if it does. Raises ConfigError as `open`."""
        config = read_config(path)
        check_run(window, device, [model, config])
        check_same(path, config, model)
        if "quantization_config" in config:
            raise ConfigError(f"{path} is not a plain model; --weights takes what weight_peers.py writes")
        file = path / PEER_FILE
        peer = json.loads(file.read_text()) if file.is_file() else {}
        made = {"weight_bits": peer.get("bits_per_weight"), "seconds": peer.get("seconds")}
        return cls(name, path, None, {"W4": Variant(None, 1, 16)}, made, files_digest(path))

    def load(self, cache: SimulatedCache, dtype: torch.dtype, device: str) -> Any:
        """The model in transformers; with `cache`, where it is a checkpoint."""
        if self.ckpt is None:
            return load_baseline(self.path, dtype, device)
        return load_quantized(self.ckpt, cache, dtype, device)


@dataclass(frozen=True)
class Text:
    """A text under its name, as windows of tokens, and a digest of them."""

    name: str
    windows: list[list[int]]
    digest: str

    @classmethod
    def open(cls, name: str, path: Path, model: Path, window: int, count: int) -> "Text":
        """Raises ConfigError where it cannot be read or is too short."""
        windows = read_windows(model, path, window, count)
        return cls(name, windows, hashlib.sha256(json.dumps(windows).encode()).hexdigest()[:16])


class Results:
    """Rows in a file of JSON lines. settings: what all rows of this run have in common."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.rows: list[dict[str, Any]] = []
        if not path.parent.is_dir():
            raise ConfigError(f"{path.parent} is not a directory; --json needs one that exists")
        for number, line in enumerate(path.read_text().splitlines() if path.is_file() else [], 1):
            try:
                self.rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ConfigError(f"{path}, line {number}: not JSON ({error}); remove the line") from error

    def identity(self, text: Text, quantized: Quantized | None, row: str) -> dict[str, Any]:
        """The fields that make a row this one. quantized: None for FP16, which has no checkpoint."""
        own = {"text": text.name, "text_sha256": text.digest, "windows": len(text.windows)}
        of = (quantized.name, quantized.digest) if quantized else (None, None)
        return self.settings | own | {"checkpoint": of[0], "checkpoint_sha256": of[1], "row": row}

    def find(self, text: Text, quantized: Quantized | None, row: str) -> dict[str, Any] | None:
        """The row, if it was computed."""
        wanted = self.identity(text, quantized, row)
        return next((r for r in self.rows if r.items() >= wanted.items()), None)

    def add(self, text: Text, quantized: Quantized | None, row: str, measured: dict[str, Any]) -> None:
        """Append a row to the file."""
        self.rows.append(self.identity(text, quantized, row) | measured)
        with self.path.open("a") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")


def mean(x: torch.Tensor, windows: list[list[int]]) -> dict[str, float]:
    """Mean of per-token `x` and its standard errors."""
    se, se_window = standard_errors(x, windows)
    return {"mean": x.mean().item(), "se": se, "se_window": se_window}


def by_quarter(nll: torch.Tensor, windows: list[list[int]], window: int) -> list[float | None]:
    """Perplexity of the tokens predicted in each quarter of a window; None where no window reaches."""
    quarter = torch.cat([torch.arange(len(w) - 1) * 4 // (window - 1) for w in windows])
    return [nll[quarter == i].mean().exp().item() if bool((quarter == i).any()) else None for i in range(4)]


def summarize(scores: dict[str, torch.Tensor], row: str, windows: list[list[int]], window: int) -> dict[str, Any]:
    """What a row of the file holds of its per-token `score`; against itself it has nothing."""
    nll = scores[f"nll_{row}"]
    out: dict[str, Any] = {
        "tokens": nll.numel(),
        "ppl": nll.mean().exp().item(),
        "ppl_by_quarter": by_quarter(nll, windows, window),
        "nll_by_window": [part.sum().item() for part in nll.split([len(w) - 1 for w in windows])],
    }
    for reference in REFERENCES:
        if f"kl_{reference}_{row}" in scores:
            name = reference.lower()
            out[f"against_{name}"] = difference(nll, scores[f"nll_{reference}"], windows)
            out[f"kl_{name}"] = mean(scores[f"kl_{reference}_{row}"], windows)
            out[f"top1_{name}"] = scores[f"top1_{reference}_{row}"].mean().item()
    return out


def score_fp16(text: Text, model: Any) -> tuple[list[Scored], dict[str, torch.Tensor]]:
    """The model's head and last hidden states, on the CPU, of every window, and the `score` of the row FP16."""
    states, scores = [], []
    for tokens in progress(text.windows, f"{text.name}: FP16"):
        hidden = last_hidden(model, tokens)
        scores.append(score({"FP16": (model.lm_head, hidden)}, tokens))
        states.append((model.lm_head, hidden.cpu()))
    return states, concatenate(scores)


def score_quantized(
    text: Text, quantized: Quantized, rows: list[str], model: Any, cache: SimulatedCache, fp16: list[Scored]
) -> dict[str, torch.Tensor]:
    """The `score` of W4 and these rows against FP16 and W4. fp16: FP16's head and states, of every window."""
    scores = []
    for tokens, (head, expected) in zip(progress(text.windows, f"{text.name}: {quantized.name}"), fp16, strict=True):
        states: dict[str, Scored] = {"FP16": (head, expected.to(model.device))}
        for row in dict.fromkeys(["W4", *rows]):
            cache.layers, cache.chunk = quantized.caches[row].layers, quantized.caches[row].chunk
            states[row] = (model.lm_head, last_hidden(model, tokens))
        scores.append(score(states, tokens, REFERENCES))
    return concatenate(scores)


def measure(
    model: Path,
    texts: list[Text],
    checkpoints: list[Quantized],
    rows: list[str],
    results: Results,
    device: str,
    dtype: torch.dtype,
) -> None:
    """Compute and append every row that `results` lacks. rows: the caches to measure, of those a checkpoint has."""
    window = results.settings["window"]
    missing = {
        (quantized.name, text.name): wanted
        for quantized in checkpoints
        for text in texts
        if (wanted := [r for r in quantized.caches if r in rows and not results.find(text, quantized, r)])
    }
    needed = [t for t in texts if not results.find(t, None, "FP16") or any(name == t.name for _, name in missing)]
    if not needed:
        return
    baseline: Any = load_baseline(model, dtype, device)
    fp16 = {}
    for text in needed:
        fp16[text.name], scores = score_fp16(text, baseline)
        if not results.find(text, None, "FP16"):
            results.add(
                text, None, "FP16", {"weight_bits": 16, "bits": 16} | summarize(scores, "FP16", text.windows, window)
            )
    del baseline
    gc.collect()
    for quantized in checkpoints:
        todo = [text for text in needed if (quantized.name, text.name) in missing]
        if not todo:
            continue
        cache = SimulatedCache()
        w4 = quantized.load(cache, dtype, device)
        for text in todo:
            wanted = missing[quantized.name, text.name]
            scores = score_quantized(text, quantized, wanted, w4, cache, fp16[text.name])
            for row in wanted:
                measured = summarize(scores, row, text.windows, window)
                results.add(text, quantized, row, quantized.made | {"bits": quantized.caches[row].bits} | measured)
        del w4
        gc.collect()


def by_window(row: dict[str, Any], other: dict[str, Any], windows: list[list[int]]) -> dict[str, float] | None:
    """`difference` of two rows paired by window; None for one window, or where a row of an older file has no sums."""
    if len(windows) < 2 or not all("nll_by_window" in r for r in (row, other)):
        return None
    lengths = torch.tensor([len(w) - 1 for w in windows])
    sums = (torch.tensor(r["nll_by_window"], dtype=torch.float64) for r in (row, other))
    return difference(*((s / lengths).repeat_interleave(lengths) for s in sums), windows)


def print_table(text: Text, rows: list[dict[str, Any]]) -> None:
    """A Markdown table of a text's rows."""

    def percent(d: dict[str, float] | None) -> str:
        # the error of exp(x) is exp(x) times that of x
        return f"{d['percent']:+.2f} ± {(100 + d['percent']) * max(d['se'], d['se_window']):.2f}" if d else ""

    def nats(d: dict[str, float] | None) -> str:
        return f"{d['mean']:.4f} ± {max(d['se'], d['se_window']):.4f}" if d else ""

    def number(x: float | None, digits: int) -> str:
        return "" if x is None else f"{x:.{digits}f}"

    lowest = min((r for r in rows if r["row"] == "W4"), key=lambda r: r["ppl"], default=None)

    def to_lowest(row: dict[str, Any]) -> str:
        if lowest is None or row is lowest or row["row"] == "FP16":
            return ""
        d = by_window(row, lowest, text.windows)
        return f"{percent(d)} ({d['percent_upper95']:+.2f})" if d else ""

    names = ["checkpoint", "row", "bits", "perplexity", "% to FP16", "% to W4", "% to lowest W4"]
    names += ["KL(FP16 ‖ row)", "KL(W4 ‖ row)", "top-1", "seconds", "q1", "q2", "q3", "q4"]
    table = Table(*names, box=box.MARKDOWN)
    for row in rows:
        table.add_row(
            row["checkpoint"] or "",
            row["row"],
            ", ".join(b for b in (number(row.get("weight_bits"), 2), number(row["bits"], 2)) if b),
            number(row["ppl"], 3),
            *(percent(row.get(f"against_{r.lower()}")) for r in REFERENCES),
            to_lowest(row),
            *(nats(row.get(f"kl_{r.lower()}")) for r in REFERENCES),
            number(row.get("top1_fp16"), 4),
            number(row.get("seconds"), 0),
            *(number(ppl, 3) for ppl in row["ppl_by_quarter"]),
        )
    print(f"\n{text.name}: {rows[0]['tokens']} tokens in {len(text.windows)} windows of {rows[0]['window']}")
    if lowest:
        print(f"lowest W4: {lowest['checkpoint']}")
    Console(width=TABLE_WIDTH).print(table, highlight=False)


def print_seeds(rows: list[dict[str, Any]]) -> None:
    """A Markdown table of mean and standard deviation over checkpoints that differ in their seed; of none, nothing."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["checkpoint"] and (found := re.fullmatch(r"(.+)-\d+", row["checkpoint"])):
            groups.setdefault((found[1], row["row"]), []).append(row)
    groups = {key: of for key, of in groups.items() if len(of) > 1}
    if not groups:
        return

    def spread(values: list[float | None], digits: int) -> str:
        known = [v for v in values if v is not None]
        return f"{statistics.mean(known):.{digits}f} ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""

    table = Table(
        "checkpoints", "row", "seeds", "perplexity", "% to FP16", "% to W4", "KL(FP16 ‖ row)", "KL(W4 ‖ row)",
        box=box.MARKDOWN,
    )  # fmt: skip
    for (name, row), of in groups.items():
        table.add_row(
            name,
            row,
            str(len(of)),
            spread([r["ppl"] for r in of], 3),
            *(spread([r.get(f"against_{ref.lower()}", {}).get("percent") for r in of], 2) for ref in REFERENCES),
            *(spread([r.get(f"kl_{ref.lower()}", {}).get("mean") for r in of], 4) for ref in REFERENCES),
        )
    Console(width=TABLE_WIDTH).print(table, highlight=False)


def named_path(argument: str) -> tuple[str, Path]:
    """NAME=PATH of the command line."""
    name, separator, path = argument.partition("=")
    if not (name and separator and path):
        raise argparse.ArgumentTypeError(f"{argument!r} is not NAME=PATH")
    return name, Path(path)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL", help="the model that the checkpoints were made from")
    parser.add_argument(
        "--checkpoint",
        type=named_path,
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="a checkpoint that `wkvquant quantize` made from MODEL, and its name in the rows; may be repeated",
    )
    parser.add_argument(
        "--weights",
        type=named_path,
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="a plain model with weights of MODEL that others have quantized, and its name; may be repeated",
    )
    parser.add_argument(
        "--text",
        type=named_path,
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="UTF-8 text to score, and its name in the rows; may be repeated",
    )
    parser.add_argument(
        "--python-stdlib",
        type=int,
        metavar="N",
        help="also score the text `python`: N characters of this interpreter's sources, as texts.py writes them",
    )
    parser.add_argument(
        "--row",
        action="append",
        default=[],
        metavar="ROW",
        help="measure this one beside FP16: W4 or a cache of kv_peers.py; may be repeated (all of them)",
    )
    parser.add_argument("--window", type=int, default=2048, help="tokens in a window, each scored afresh (%(default)s)")
    parser.add_argument("--windows", type=int, default=10, help="number of windows; 0 is the whole text (%(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="type of the model (%(default)s)"
    )
    parser.add_argument("--json", type=Path, required=True, metavar="OUT.jsonl", help="file that rows are appended to")
    return parser


def run(args: argparse.Namespace) -> None:
    """Measure what is missing and print the tables. Raises ConfigError on bad input."""
    python = ["python"] if args.python_stdlib is not None else []
    for what, names in (
        ("checkpoints", [n for n, _ in args.checkpoint + args.weights]),
        ("texts", [n for n, _ in args.text] + python),
    ):
        if len(set(names)) < len(names):
            raise ConfigError(f"two {what} have the same name: {names}")
    if args.windows < 0:
        raise ConfigError(f"--windows {args.windows} must not be negative")
    config = read_config(args.model)
    check_run(args.window, args.device, [config])
    checkpoints = [
        opened(name, path, config, args.window, args.device)
        for opened, given in ((Quantized.open, args.checkpoint), (Quantized.open_plain, args.weights))
        for name, path in given
    ]
    known = list(dict.fromkeys(row for quantized in checkpoints for row in quantized.caches))
    unknown = [row for row in args.row if row not in known]
    if unknown:
        raise ConfigError(f"--row {unknown[0]} is not one of {known}")
    with tempfile.TemporaryDirectory() as folder:
        files = list(args.text)
        if args.python_stdlib is not None:
            files.append(("python", Path(folder) / "python.txt"))
            write_stdlib(files[-1][1], args.python_stdlib)
        if not files:
            raise ConfigError("nothing to score; give --text NAME=FILE or --python-stdlib N")
        texts = [Text.open(name, path, args.model, args.window, args.windows) for name, path in files]
    device = device_name(args.device)
    model = {"model": args.model.name, "model_sha256": files_digest(args.model)}
    settings = model | {"window": args.window, "device": device, "dtype": args.dtype}
    results = Results(args.json, settings)
    rows = args.row or known
    measure(args.model, texts, checkpoints, rows, results, args.device, getattr(torch, args.dtype))
    for text in texts:
        found = [results.find(text, None, "FP16")]
        found += [results.find(text, q, row) for q in checkpoints for row in known if row in rows]
        print_table(text, [row for row in found if row])
        print_seeds([row for row in found if row])


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
