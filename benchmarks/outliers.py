#!/usr/bin/env python3
"""Outliers of keys before and after a checkpoint's cache takes them, and what that is worth in each layer.

    python benchmarks/outliers.py CHECKPOINT --text wiki_test.txt --json OUT.jsonl
    python benchmarks/plots.py OUT.jsonl OUT.svg

The model runs with its 4-bit weights and a 16-bit cache. In each layer its own queries, keys and values also go through
attention with only the keys, or only the values, in a 4-bit cache: as they came, shifted, then smoothed, and then
rotated as the checkpoint has it (values are smoothed and rotated in the weights, so there is only their shift to leave
out). A layer's error is the mean over tokens of |difference|^2 / |output|^2 of its attention. A row is a layer; its
peak is the largest |component| of a key over the root mean square of its components, the mean over tokens and heads:
2.4 for 64 and 2.6 for 128 normal numbers.
"""

import argparse
import json
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vllm_wkvquant.checkpoint import Checkpoint
from vllm_wkvquant.config import ConfigError
from vllm_wkvquant.device import device_name
from vllm_wkvquant.evaluate import (
    SimulatedCache,
    check_run,
    last_hidden,
    load_quantized,
    progress,
    read_windows,
)
from vllm_wkvquant.reference import KVParams, fake_quantize, past_only_attention, transform_key

KEY_STAGES = ("as they came", "shifted", "and smoothed", "and rotated")
VALUE_STAGES = ("as they came", "shifted")
SIGNIFICANT = 4  # digits of what is written


def key_stages(params: KVParams) -> dict[str, KVParams]:
    """The cache's parameters with one more part at each stage."""
    shifted = replace(params, k_smooth=torch.ones_like(params.k_smooth), key_hadamard=False)
    zero = torch.zeros_like(params.k_shift)
    stages = (
        replace(shifted, k_shift=zero, k_first=None, rope_turns=None),
        shifted,
        replace(params, key_hadamard=False),
        params,
    )
    return dict(zip(KEY_STAGES, stages, strict=True))


def value_stages(params: KVParams) -> dict[str, KVParams]:
    """As `key_stages`."""
    as_they_came = replace(params, v_shift=torch.zeros_like(params.v_shift), v_first=None)
    return dict(zip(VALUE_STAGES, (as_they_came, params), strict=True))


def relative_error(output: torch.Tensor, exact: torch.Tensor) -> float:
    """Of [T, Hq, D]: the mean over tokens of |output - exact|^2 / |exact|^2."""
    return ((output - exact).square().sum((1, 2)) / exact.square().sum((1, 2))).mean().item()


def peak(x: torch.Tensor) -> float:
    """Of [T, H, D]: the mean over tokens and heads of the largest |component| over their root mean square."""
    return (x.abs().amax(-1) / x.square().mean(-1).sqrt()).mean().item()


@dataclass
class Layer:
    """What is collected of one layer: means over windows, and the largest |component| of each channel, fp32 [H, D]."""

    params: KVParams
    key_error: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KEY_STAGES, 0.0))
    value_error: dict[str, float] = field(default_factory=lambda: dict.fromkeys(VALUE_STAGES, 0.0))
    peak: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KEY_STAGES, 0.0))
    channels: dict[str, torch.Tensor] = field(default_factory=dict)

    def see(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attend: partial[torch.Tensor], share: float
    ) -> torch.Tensor:
        """Add a window, q [T, Hq, D] and k, v [T, H, D] in fp32, of which there are 1 / share; its exact output."""
        positions = torch.arange(q.shape[0], device=q.device)
        exact = attend(q, k, v, k, v)
        for stage, params in key_stages(self.params).items():
            past, _ = fake_quantize(k, v, positions, params)
            self.key_error[stage] += share * relative_error(attend(q, k, v, past, v), exact)
            stored = transform_key(k, positions, params)
            self.peak[stage] += share * peak(stored)
            largest = stored.abs().amax(0)
            self.channels[stage] = torch.maximum(self.channels.get(stage, largest), largest)
        for stage, params in value_stages(self.params).items():
            _, past = fake_quantize(k, v, positions, params)
            self.value_error[stage] += share * relative_error(attend(q, k, v, k, past), exact)
        return exact

    def row(self) -> dict[str, Any]:
        """For JSON. channels: of the head with the largest component, before and after."""
        before, after = (self.channels[stage] for stage in (KEY_STAGES[0], KEY_STAGES[-1]))
        head = int(before.amax(-1).argmax())

        def rounded(values: dict[str, float]) -> dict[str, float]:
            return {name: float(f"{x:.{SIGNIFICANT}g}") for name, x in values.items()}

        return {
            "key_error": rounded(self.key_error),
            "value_error": rounded(self.value_error),
            "key_peak": rounded(self.peak),
            "head": head,
            "channels": {
                "before": [float(f"{x:.{SIGNIFICANT}g}") for x in before[head].tolist()],
                "after": [float(f"{x:.{SIGNIFICANT}g}") for x in after[head].tolist()],
            },
        }


class Spy(SimulatedCache):
    """A 16-bit cache that shows each layer its queries, keys and values. share: of one window in all."""

    def __init__(self, layers: list[Layer], share: float) -> None:
        super().__init__()
        self.seen, self.share = layers, share

    def attention(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """As of `SimulatedCache`."""
        q, k, v = (x[0].transpose(0, 1).float() for x in (query, key, value))
        attend = partial(
            past_only_attention, scale=scaling or q.shape[-1] ** -0.5, chunk=1, sliding_window=sliding_window or 0
        )
        out = self.seen[int(module.layer_idx)].see(q, k, v, attend, self.share)  # type: ignore[arg-type]
        return out.to(query.dtype)[None], None


@torch.inference_mode()
def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each layer. Raises ConfigError on bad input."""
    ckpt = Checkpoint(args.checkpoint)
    check_run(args.window, args.device, [ckpt.config])
    windows = read_windows(args.checkpoint, args.text, args.window, args.windows)
    layers = [Layer(ckpt.kv_params(i).to(args.device)) for i in range(ckpt.config["num_hidden_layers"])]
    model = load_quantized(ckpt, Spy(layers, 1 / len(windows)), torch.float32, args.device)
    for tokens in progress(windows, "windows"):
        last_hidden(model, tokens)
    common = {
        "checkpoint": args.checkpoint.name,
        "text": args.text.name,
        "window": args.window,
        "windows": len(windows),
        "device": device_name(args.device),
        "versions": {"torch": torch.__version__},
    }
    return [common | {"layer": i} | layer.row() for i, layer in enumerate(layers)]


def print_table(rows: list[dict[str, Any]]) -> None:
    """The mean over layers and the worst layer, as Markdown."""
    print("| 4-bit | mean error | worst layer | mean peak |\n| --- | --- | --- | --- |")
    for what, name, stages in (("keys", "key_error", KEY_STAGES), ("values", "value_error", VALUE_STAGES)):
        for stage in stages:
            errors = [row[name][stage] for row in rows]
            worst = max(range(len(rows)), key=errors.__getitem__)
            of_peak = f"{sum(row['key_peak'][stage] for row in rows) / len(rows):.2f}" if what == "keys" else ""
            mean = sum(errors) / len(rows)
            print(f"| {what}, {stage} | {mean:.2e} | {errors[worst]:.2e} ({rows[worst]['layer']}) | {of_peak} |")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for bad input."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="written by `wkvquant quantize`")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text")
    parser.add_argument("--window", type=int, default=512, help="tokens in a window (%(default)s)")
    parser.add_argument("--windows", type=int, default=8, help="windows; 0 is the whole text (%(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="OUT.jsonl", help="write the rows here")
    args = parser.parse_args(argv)
    try:
        rows = measure(args)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_table(rows)
    if args.json:
        args.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
