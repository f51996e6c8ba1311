"""`report.html`: what a run did, as one page for people, without scripts and without files beside it.

What the result depends on is in `wkvquant.json`; the page has what the run took as well, so it differs every time.
"""

import math
import platform
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import cycle
from string import Template
from typing import Any

import torch
import transformers

from vllm_wkvquant.quantize.estimate import Estimate

COLORS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#7f7f7f",
    "#8c564b",
    "#b2a800",
    "#444444",
    "#c2185b",
)
WIDTH, HEIGHT, LEFT, BOTTOM = 560, 210, 52, 24  # of a chart, and of its margins for labels
BEFORE_TUNING = ", before all of them were tuned together"  # of what is not taken again after that
CHANNELS = 256  # points of a line of channels; more are joined, the largest of each group is shown

PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --line: #8884; --soft: #888; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
p { max-width: 75ch; margin: .3rem 0 .8rem; } .soft { color: var(--soft); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .9rem .2rem 0; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; } tr.chosen td { font-weight: 600; }
.charts { display: flex; flex-wrap: wrap; align-items: start; gap: 1.2rem; }
figure { margin: 0; width: ${width}px; max-width: 100%; }
figcaption { font-weight: 600; } svg { width: 100%; height: auto; display: block; }
svg text { font: 11px system-ui, sans-serif; fill: currentColor; } .grid { stroke: var(--line); }
.legend span { margin-right: .9rem; white-space: nowrap; font-size: 13px; }
.legend i { display: inline-block; width: .7em; height: .7em; margin-right: .3em; border-radius: 2px; }
.small { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: .6rem; }
.small figure { width: auto; } .small figcaption { font-weight: 400; font-size: 12px; }
</style>
<h1>$title</h1>
<p class="soft">$subtitle</p>
$body
</html>
""")


@dataclass(frozen=True)
class BlockDetail:
    """Of a block, beside its entry in `wkvquant.json`: seconds by what they went into, and fp32 [H, D] of its cache.

    k_raw, k_cached: largest |key| of each channel as attention has it, and as the cache codes it.
    """

    seconds: dict[str, float]
    k_smooth: torch.Tensor
    k_shift: torch.Tensor
    v_shift: torch.Tensor
    k_raw: torch.Tensor
    k_cached: torch.Tensor


@dataclass(frozen=True)
class Took:
    """What a run took. done: blocks that were there when it was resumed; seconds: of what comes after the last block;
    peaks: bytes of "host" and, if any, "device"."""

    done: int
    seconds: dict[str, float]
    peaks: dict[str, int]


def number(x: float, digits: int = 3) -> str:
    """With so many significant digits."""
    return f"{x:.{digits}g}"


def table(rows: Sequence[Sequence[str]], head: Sequence[str] = (), chosen: int | None = None) -> str:
    """An HTML table of text; chosen: the row that is set in bold."""

    def line(cells: Sequence[str], tag: str, attribute: str = "") -> str:
        return f"<tr{attribute}>" + "".join(f"<{tag}>{escape(c)}</{tag}>" for c in cells) + "</tr>"

    body = [line(row, "td", ' class="chosen"' if i == chosen else "") for i, row in enumerate(rows)]
    return "\n".join(["<table>", *([line(head, "th")] if head else []), *body, "</table>"])


class Scale:
    """Places values between low and high on pixels between start and stop."""

    def __init__(self, values: Sequence[float], start: float, stop: float, log: bool) -> None:
        finite = [v for v in values if math.isfinite(v) and (v > 0 or not log)] or [1.0]
        self.log, self.start, self.stop = log, start, stop
        self.low, self.high = (min(finite), max(finite)) if log else (min(0.0, *finite), max(0.0, *finite))
        if self.low == self.high:
            self.low, self.high = (self.low / 2, self.high * 2) if log else (self.low, self.high + 1)

    def __call__(self, value: float) -> float:
        """The pixel of a value; one that a logarithm has no place for is at the start."""
        if self.log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """About four values with labels."""
        if self.log:
            first, last = math.log10(self.low), math.log10(self.high)
            powers = range(math.ceil(first), math.floor(last) + 1)
            if len(powers) >= 2:
                return [10.0**p for p in powers][:: max(1, len(powers) // 4)]
            return [10 ** (first + i * (last - first) / 3) for i in range(4)]
        step = (self.high - self.low) / 4
        unit = 10 ** math.floor(math.log10(step))
        step = unit * next(m for m in (1, 2, 2.5, 5, 10) if m * unit >= step * 0.999)
        return [i * step for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def colored(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Names, each with its color."""
    return zip(names, cycle(COLORS), strict=False)


def legend(names: Iterable[str]) -> str:
    """Names beside their colors."""
    items = (f'<span><i style="background:{color}"></i>{escape(name)}</span>' for name, color in colored(names))
    return f'<div class="legend">{"".join(items)}</div>'


def frame(scale: Scale, count: int) -> list[str]:
    """Horizontal lines of a chart with their values, and the numbers of blocks below."""
    parts = []
    for tick in scale.ticks():
        y = scale(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for i in range(0, count, max(1, -(-count // 12))):
        parts.append(f'<text x="{column(i, count):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{i}</text>')
    return parts


def column(i: int, count: int) -> float:
    """Middle of the i-th of `count` columns."""
    return LEFT + (i + 0.5) * (WIDTH - LEFT) / count


def svg(parts: Sequence[str], width: int = WIDTH, height: int = HEIGHT) -> str:
    """The drawing of these elements."""
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'


def lines(title: str, series: dict[str, list[float]], log: bool = False) -> str:
    """A figure with one line a series, over blocks."""
    scale = Scale([v for values in series.values() for v in values], HEIGHT - BOTTOM, 8, log)
    count = max(len(values) for values in series.values())
    parts = frame(scale, count)
    for name, color in colored(series):
        values = series[name]
        points = [(column(i, count), scale(v)) for i, v in enumerate(values)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        for i, (x, y) in enumerate(points):
            label = escape(f"{name}, block {i}: {number(values[i])}")
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{color}"><title>{label}</title></circle>')
    return f"<figure><figcaption>{escape(title)}</figcaption>{svg(parts)}{legend(series)}</figure>"


def stacks(title: str, columns: list[dict[str, float]]) -> str:
    """A figure with one column a block, of what it adds up from."""
    names = list(dict.fromkeys(name for c in columns for name in c))
    scale = Scale([sum(c.values()) for c in columns], HEIGHT - BOTTOM, 8, log=False)
    parts, width = frame(scale, len(columns)), 0.8 * (WIDTH - LEFT) / len(columns)
    for i, c in enumerate(columns):
        below = 0.0
        for name, color in colored(names):
            value = c.get(name, 0.0)
            y, base = scale(below + value), scale(below)
            parts.append(
                f'<rect x="{column(i, len(columns)) - width / 2:.1f}" y="{y:.1f}" width="{width:.1f}" '
                f'height="{base - y:.1f}" fill="{color}"><title>{escape(f"{name}, block {i}: {number(value)} s")}'
                f"</title></rect>"
            )
            below += value
    return f"<figure><figcaption>{escape(title)}</figcaption>{svg(parts)}{legend(names)}</figure>"


def channels(layer: int, raw: torch.Tensor, cached: torch.Tensor, scale: Scale) -> str:
    """A small figure of the largest |key| of every channel of a block, raw and cached."""
    parts = []
    for maxima, color in ((raw, COLORS[1]), (cached, COLORS[0])):
        flat = [part.max().item() for part in maxima.flatten().chunk(CHANNELS)]
        path = " ".join(f"{170 * i / len(flat):.1f},{scale(v):.1f}" for i, v in enumerate(flat))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}"/>')
    peak = f"{number(raw.max().item())} → {number(cached.max().item())}"
    return f"<figure><figcaption>block {layer}: {peak}</figcaption>{svg(parts, 170, 60)}</figure>"


def peakedness(maxima: torch.Tensor) -> float:
    """Largest channel over the median one, of the head where that is most."""
    return (maxima.amax(-1) / maxima.median(-1).values.clamp_min(1e-9)).max().item()


def section(title: str, text: str, *figures: str) -> str:
    """A part of the page."""
    return f'<h2>{title}</h2><p>{text}</p><div class="charts">{"".join(figures)}</div>'


def quality(report: dict[str, Any]) -> str:
    """What weights and cache cost on the held-out windows."""
    perplexity = report["perplexity"]
    names = {"exact": "16-bit weights and cache", "reference": "4-bit weights, 16-bit cache"}
    rows = [[text, "", number(perplexity[run], 5)] for run, text in names.items() if run in perplexity]
    if report["weights"]:
        rows[1][1] = plus_minus(report["weights"])
    chosen = len(rows) + list(report["candidates"]).index(report["smoothing"])
    for name, candidate in report["candidates"].items():
        rows.append([f"4-bit weights and cache, {name}", plus_minus(candidate), number(perplexity[name], 5)])
    if report["tuning"]:
        tuned, ppl = report["tuning"], report["tuning"]["perplexity"]
        rows.append(["4-bit weights tuned all together", plus_minus(tuned["weights"]), number(ppl["weights"], 5)])
        rows.append(["these weights with the 4-bit cache", plus_minus(tuned["cache"]), number(ppl["both"], 5)])
    text = "On the held-out windows of the calibration text. The divergence of the weights is from the 16-bit model, "
    text += "that of a cache from the same weights with a 16-bit cache. The row in bold was chosen."
    if report["left_out"]:
        text += f" Left out for want of memory, which costs accuracy: {escape(report['left_out'])}."
    return f"<h2>Quality</h2><p>{text}</p>" + table(rows, ("", "KL divergence", "perplexity"), chosen)


def plus_minus(row: dict[str, float]) -> str:
    """A divergence with its standard error."""
    return f"{row['kl']:.5f} ± {row['kl_se']:.5f}"


def errors(report: dict[str, Any]) -> str:
    """Of weights, of a block's output before and after learning, and of the hidden states under the cache."""
    layers, learning = report["layers"], report["recipe"]["learning"]
    figures, text = [], "Of what is written, block by block."
    if report["tuning"]:
        text = f"Block by block{BEFORE_TUNING}."
    if learning:
        of_output = {k: [layer["output_error"][k] for layer in layers] for k in ("rounded", "learned")}
        losses = {"first epoch": [x["loss"][0] for x in layers], "last epoch": [x["loss"][-1] for x in layers]}
        figures.append(lines("output of a block, squared relative error", of_output, log=True))
        figures.append(lines(f"loss while learning ({learning['loss']})", losses, log=True))
        text += (
            " The output of a block is compared with that of the 16-bit model, on held-out windows: with the weights "
        )
        text += "learned, and with the same weights rounded to nearest on the same input."
    of_weights = {n: [layer["weight_error"][n] for layer in layers] for n in layers[0]["weight_error"]}
    figures.append(lines("weights, relative error", of_weights))
    of_cache = {"4-bit against 16-bit cache": [layer["hidden_error"] for layer in layers]}
    figures.append(lines("hidden states, relative error", of_cache))
    return section("Errors", text, *figures)


def clipping(layers: list[dict[str, Any]]) -> str:
    """Shares of their ranges that groups of weights keep."""
    figures = []
    for key, title in (("mean", "mean of all groups"), ("min", "least of all groups")):
        figures.append(lines(title, {n: [layer["clip"][n][key] for layer in layers] for n in layers[0]["clip"]}))
    return section("Clipping", "The share of its range that a group of weights keeps at either end.", *figures)


def transform(layers: list[dict[str, Any]], blocks: list[BlockDetail]) -> str:
    """Ranges of smoothing factors and shifts."""
    factors = {
        "K, largest": [b.k_smooth.max().item() for b in blocks],
        "K, least": [b.k_smooth.min().item() for b in blocks],
        "V, largest": [layer["v_smooth"][1] for layer in layers],
        "V, least": [layer["v_smooth"][0] for layer in layers],
    }
    shifts = {"K": [b.k_shift.abs().max().item() for b in blocks], "V": [b.v_shift.abs().max().item() for b in blocks]}
    figures = [lines("factors", factors, log=True), lines("largest shift", shifts)]
    if layers[0]["shift_pairs"]:
        counts = {n: [float(layer["shift_pairs"][n]) for layer in layers] for n in layers[0]["shift_pairs"]}
        figures.append(lines("rotary pairs with a shift, and steps that they take in a kernel", counts))
    text = "Over the channels of a block. Factors have a geometric mean of 1 in a head; those of V are in the weights."
    return section("Smoothing and shift", text, *figures)


def outliers(blocks: list[BlockDetail], tuned: bool) -> str:
    """The largest key of every channel before and after the cache's transform."""
    peaked = {
        "cached": [peakedness(b.k_cached) for b in blocks],
        "raw": [peakedness(b.k_raw) for b in blocks],
    }
    largest = {
        "cached": [b.k_cached.max().item() for b in blocks],
        "raw": [b.k_raw.max().item() for b in blocks],
    }
    scale = Scale([x for b in blocks for k in (b.k_raw, b.k_cached) for x in k.flatten().tolist()], 58, 2, log=True)
    small = "".join(channels(i, b.k_raw, b.k_cached, scale) for i, b in enumerate(blocks))
    text = "The largest |key| of a channel: raw, as attention has it, and cached, after shift, smoothing and rotation. "
    text += f"Of all blocks{BEFORE_TUNING}. " if tuned else ""
    text += "Last, every channel of all heads of a block, on one logarithmic scale for all, with the largest of each."
    figures = (
        lines("largest channel over the median, worst head", peaked, log=True),
        lines("largest channel", largest, log=True),
    )
    return section("Outlier channels of keys", text, *figures) + f'<div class="small">{small}</div>'


def costs(blocks: list[BlockDetail], estimate: Estimate, took: Took) -> str:
    """Time and memory, estimated and taken."""
    seconds = sum(sum(b.seconds.values()) for b in blocks[took.done :]) + sum(took.seconds.values())
    since = f"from block {took.done} on, where it was resumed" if took.done else "all blocks, logits, tuning"
    peaks = took.peaks
    rows = [
        [f"seconds, {since}, files not counted", number(estimate.seconds), number(seconds)],
        ["PFLOP", number(estimate.flop / 1e15), ""],
        ["GB on the host", number(estimate.host_bytes / 1e9), number(peaks["host"] / 1e9)],
    ]
    if "device" in peaks:
        rows.append(["GB on the GPU", number(estimate.device_bytes / 1e9), number(peaks["device"] / 1e9)])
    text = "Python and libraries are in the memory taken on the host, and not in the estimate. "
    text += "Of several workers, seconds and memory are the first's."
    taken = table(rows, ("", "estimated", "taken"))
    return section("Time and memory", text, taken, stacks("seconds of a block", [b.seconds for b in blocks]))


def flatten(values: dict[str, Any], prefix: str = "") -> list[list[str]]:
    """Rows of a table from nested dictionaries; what is none is left out."""
    rows = []
    for name, value in values.items():
        if isinstance(value, dict):
            rows += flatten(value, f"{prefix}{name}.")
        elif value is not None:
            rows.append([prefix + name, str(value)])
    return rows


def render(name: str, report: dict[str, Any], blocks: list[BlockDetail], estimate: Estimate, took: Took) -> str:
    """The page. name: of the result; report: as in `wkvquant.json`."""
    model, settings, layers = report["model"], report["settings"], report["layers"]
    versions = {
        "vllm-wkvquant": report["version"],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "Python": platform.python_version(),
        "platform": platform.platform(),
    }
    sections = [
        quality(report),
        errors(report),
        clipping(layers) if report["recipe"]["learning"] else "",
        transform(layers, blocks),
        outliers(blocks, bool(report["tuning"])),
        costs(blocks, estimate, took),
        "<h2>Recipe</h2>" + table(flatten(report["recipe"])),
        "<h2>Settings</h2>" + table(flatten(settings)),
        "<h2>Versions</h2>" + table(flatten(versions)),
    ]
    own = f", {settings['own_samples']} of them written by the model" if settings["own_samples"] else ""
    subtitle = (
        f"{model['num_hidden_layers']} blocks, {model['num_key_value_heads']} KV heads of {model['head_size']}; "
        f"{settings['samples']} windows of {settings['seq_len']} tokens{own}, {settings['held_out']} held out; "
        f"{settings['dtype']} on {settings['device']}; {time.strftime('%Y-%m-%d %H:%M')}"
    )
    title = f"{name}: {model['architecture']}, recipe {report['recipe']['name']}"
    return PAGE.substitute(title=escape(title), subtitle=escape(subtitle), body="\n".join(sections), width=str(WIDTH))
