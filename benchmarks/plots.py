#!/usr/bin/env python3
"""Draws the rows of another benchmark as an SVG file.

    python benchmarks/plots.py docs/results/attention-h100.jsonl docs/results/attention-h100.svg

Of `attention.py --device cuda --json` the decode rows: bars are speeds over that of FlashAttention 3 on a bf16 cache,
the best of its options, for each KV heads x batch x context; dots, on the right axis, are read_fraction of this
package's kernel. Of `outliers.py --json` errors and peaks by layer, and the channels of the head with the largest key.
Needs matplotlib: `pip install -e .[plots]`.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

VARIANTS = {
    "fa3-fp8": ("FlashAttention 3, fp8 cache", "#9ecae1"),
    "int4_per_token_head": ("vLLM int4_per_token_head", "#fdae6b"),
    "turboquant_4bit_nc": ("vLLM turboquant_4bit_nc", "#bcbddc"),
    "cuda": ("4 bits, a shift on every pair", "#31a354"),
    "cuda, slow": ("4 bits, a shift on slow pairs", "#74c476"),
    "cuda, none": ("4 bits, no shift", "#c7e9c0"),
}


def best_times(rows: list[dict]) -> dict[tuple, dict[str, dict]]:
    """The fastest row of each (KV heads, batch, context) and variant."""
    best: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        if row["op"] != "decode" or not row.get("us"):
            continue
        variant = row["variant"]
        shift = row.get("options", "").rpartition("shift=")[2]
        if variant == "cuda" and shift in ("slow", "none"):
            variant = f"cuda, {shift}"
        found = best.setdefault((row["num_kv_heads"], row["batch"], row["context"]), {})
        if variant not in found or row["us"] < found[variant]["us"]:
            found[variant] = row
    return {shape: found for shape, found in best.items() if "fa3-bf16" in found}


def draw_decode(rows: list[dict]) -> Figure:
    """Raises SystemExit where no row has a bf16 peer."""
    best = best_times(rows)
    if not best:
        raise SystemExit("no decode row has a row of fa3-bf16 beside it")
    device = next(row["device"] for row in rows)
    figure, axis = plt.subplots(figsize=(12, 4.5))
    width = 0.8 / len(VARIANTS)
    for i, (variant, (label, color)) in enumerate(VARIANTS.items()):
        if not any(variant in found for found in best.values()):
            continue
        heights = [
            found["fa3-bf16"]["us"] / found[variant]["us"] if variant in found else 0.0 for found in best.values()
        ]
        places = [x + (i - (len(VARIANTS) - 1) / 2) * width for x in range(len(best))]
        axis.bar(places, heights, width, label=label, color=color)
    axis.axhline(1, color="black", linewidth=0.8)
    labels = [f"{heads} heads\n{batch} x {context // 1024}k" for heads, batch, context in best]
    axis.set_xticks(range(len(best)), labels, fontsize=8)
    axis.set_ylabel("times faster than FlashAttention 3, bf16 cache")
    axis.set_title(f"Decode attention, 32 query heads of 128, {device}")
    right = axis.twinx()
    fractions = [found["cuda"]["read_fraction"] if "cuda" in found else None for found in best.values()]
    right.plot(range(len(best)), fractions, "k.", label="read_fraction (right axis)")
    right.set_ylim(0, 1)
    right.set_ylabel("share of the measured bandwidth")
    handles, names = axis.get_legend_handles_labels()
    dots, dot_names = right.get_legend_handles_labels()
    axis.legend(handles + dots, names + dot_names, fontsize=8, loc="upper left")
    return figure


def draw_outliers(rows: list[dict]) -> Figure:
    """Of each layer, and of the head in which a component of a key is largest."""
    figure, ((keys, values), (peaks, channels)) = plt.subplots(2, 2, figsize=(12, 7))
    of_layers = (
        (keys, "key_error", "error of attention with keys in 4 bits"),
        (values, "value_error", "error of attention with values in 4 bits"),
        (peaks, "key_peak", "largest |component| of a key over its root mean square"),
    )
    for axis, name, title in of_layers:
        for stage in rows[0][name]:
            axis.plot([row["layer"] for row in rows], [row[name][stage] for row in rows], label=stage, marker=".")
        axis.set(title=title, xlabel="layer")
        axis.legend(fontsize=8)
    keys.set(yscale="log")
    values.set_ylim(bottom=0)
    row = max(rows, key=lambda row: max(row["channels"]["before"]))
    for stage, largest in row["channels"].items():
        channels.plot(largest, label=stage, drawstyle="steps-mid")
    channels.set(title=f"largest |component| by channel: layer {row['layer']}, head {row['head']}", xlabel="channel")
    channels.legend(fontsize=8)
    windows = f"{row['windows']} windows of {row['window']} tokens"
    figure.suptitle(f"{row['checkpoint']} on {row['text']}, {windows}, {row['device']}")
    return figure


def main() -> None:
    """Read the rows, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, metavar="ROWS.jsonl")
    parser.add_argument("svg", type=Path, metavar="OUT.svg")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.rows.read_text().splitlines()]
    plt.rcParams["svg.hashsalt"] = "wkvquant"  # the same input gives the same file
    figure = draw_outliers(rows) if "key_peak" in rows[0] else draw_decode(rows)
    figure.tight_layout()
    figure.savefig(args.svg, metadata={"Date": None})


if __name__ == "__main__":
    main()
