"""`wkvquant inspect`: what a checkpoint holds, validated as it is read."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from vllm_wkvquant.checkpoint import Checkpoint, read_object
from vllm_wkvquant.config import ConfigError
from vllm_wkvquant.geometry import architecture_of
from vllm_wkvquant.layout import PageLayout, token_bytes
from vllm_wkvquant.output import Result

REPORT_FILE = "wkvquant.json"
BLOCK_SIZE = 64  # tokens of the page whose bytes are shown


def inspect(path: Path) -> dict[str, Any]:
    """Validate a checkpoint and describe it. Raises ConfigError naming the first thing that is wrong."""
    ckpt = Checkpoint(path)
    kv = ckpt.kv
    for layer in range(kv.num_hidden_layers):
        ckpt.kv_tensors(layer)
    if kv.key_shift == "rotating":
        _check_rope(ckpt)
    return {
        "checkpoint": path.absolute().name,
        "architecture": architecture_of(ckpt.config),
        "format_version": kv.format_version,
        "layout_version": kv.layout_version,
        "weights": _weights(ckpt),
        "kv_cache": _kv_cache(ckpt),
        "rope": {
            "rotary_dim": kv.rope.rotary_dim,
            "attention_scaling": kv.rope.attention_scaling,
            "inv_freq_max": max(kv.rope.inv_freq),
            "inv_freq_min": min(kv.rope.inv_freq),
        },
        **_report(path),
    }


def _check_rope(ckpt: Checkpoint) -> None:
    # here: transformers takes seconds, which what is refused before need not wait
    from transformers import AutoConfig

    from vllm_wkvquant.quantize.adapters import fields_that_fit
    from vllm_wkvquant.rope import check_same_rope

    with fields_that_fit(ckpt.path):
        check_same_rope(ckpt.kv.rope, AutoConfig.from_pretrained(ckpt.path))


def _weights(ckpt: Checkpoint) -> dict[str, Any]:
    quantized_bytes = other_bytes = 0
    for name, quantized in ckpt.weight_names():
        suffixes = ("_packed", "_scale", "_zero_point") if quantized else ("",)
        tensors = ckpt.tensors.get([name + suffix for suffix in suffixes])
        for part, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ConfigError(f"tensor {part} contains NaN or infinity; the checkpoint is damaged, quantize again")
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if quantized:
            quantized_bytes += size
        else:
            other_bytes += size
    quantized_elements = ckpt.geometry.layers * sum(out * columns for out, columns in ckpt.geometry.linears().values())
    return {
        "quantized_parameters": quantized_elements,
        "quantized_bytes": quantized_bytes,
        "bits_per_quantized_weight": 8 * quantized_bytes / quantized_elements,
        "other_bytes": other_bytes,
        "group_sizes": {linear.rpartition(".")[2]: size for linear, size in ckpt.group_sizes.items()},
    }


def _kv_cache(ckpt: Checkpoint) -> dict[str, Any]:
    kv = ckpt.kv
    page = PageLayout(kv.head_size, BLOCK_SIZE)
    heads = kv.num_kv_heads * kv.num_hidden_layers
    return {
        "head_size": kv.head_size,
        "num_kv_heads": kv.num_kv_heads,
        "num_hidden_layers": kv.num_hidden_layers,
        "key_shift": kv.key_shift,
        "key_hadamard": kv.key_hadamard,
        "value_hadamard": kv.value_hadamard,
        "bits_per_element": 8 * token_bytes(kv.head_size) / (2 * kv.head_size),
        "bytes_per_token": heads * token_bytes(kv.head_size),
        "bytes_per_token_16bit": heads * 4 * kv.head_size,
        "page": {
            "block_size": BLOCK_SIZE,
            "bytes_per_head": page.nbytes,
            "k_codes": 0,
            "v_codes": page.v_codes,
            "k_meta": page.k_meta,
            "v_meta": page.v_meta,
        },
    }


def _report(path: Path) -> dict[str, Any]:
    file = path / REPORT_FILE
    if not file.is_file():
        return {}
    report = read_object(file)
    try:
        of_cache = report["tuning"]["cache"] if report.get("tuning") else report["candidates"][report["smoothing"]]
        return {k: report[k] for k in ("settings", "smoothing", "candidates", "layers")} | {
            "tuning": report.get("tuning"),  # older ones have none
            "left_out": report.get("left_out"),
            "recipe": report["recipe"]["name"],
            "version": report["version"],
            "kl": float(of_cache["kl"]),
            "kl_se": float(of_cache["kl_se"]),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{file} is not a report of this package; nothing but `inspect` needs it: delete it"
        ) from error


def main(args: argparse.Namespace) -> int:
    """Run `wkvquant inspect`; returns the exit status."""
    result = inspect(args.checkpoint)
    if args.json:
        json.dump(result, sys.stdout)
        print()
        return 0
    weights, kv, page = result["weights"], result["kv_cache"], result["kv_cache"]["page"]
    table = Table(title=f"{escape(str(result['checkpoint']))}: {result['architecture']}", show_header=False)
    groups = ", ".join(f"{n} {g}" for n, g in weights["group_sizes"].items())
    ratio = kv["bytes_per_token_16bit"] / kv["bytes_per_token"]
    rows = {
        "versions": f"format {result['format_version']}, KV layout {result['layout_version']}",
        "4-bit weights": f"{weights['quantized_parameters'] / 1e6:.1f} M, {weights['quantized_bytes'] / 1e6:.1f} MB, "
        f"{weights['bits_per_quantized_weight']:.3f} bits each",
        "other weights": f"{weights['other_bytes'] / 1e6:.1f} MB",
        "group sizes": groups,
        "KV heads": f"{kv['num_kv_heads']} of {kv['head_size']} in {kv['num_hidden_layers']} layers",
        "KV cache": f"{kv['bits_per_element']:.3f} bits an element, {kv['bytes_per_token']} bytes a token "
        f"(16-bit: {kv['bytes_per_token_16bit']}, {ratio:.2f} times as much)",
        "KV transform": f"key shift {kv['key_shift']}, Hadamard on K {kv['key_hadamard']}, on V {kv['value_hadamard']}",
        "KV page": f"{page['bytes_per_head']} bytes a head and {page['block_size']} tokens: K codes at 0, V codes at "
        f"{page['v_codes']}, K scales at {page['k_meta']}, V scales at {page['v_meta']}",
        "rotary": f"{result['rope']['rotary_dim']} channels, frequencies {result['rope']['inv_freq_max']:.3g} to "
        f"{result['rope']['inv_freq_min']:.3g}, scaling {result['rope']['attention_scaling']:g}",
    }
    if "recipe" in result:
        without = f", without {result['left_out']}" if result["left_out"] else ""
        rows["recipe"] = f"{result['recipe']}{without}, smoothing {result['smoothing']}"
        rows["KL on calibration text"] = f"{result['kl']:.5f} (se {result['kl_se']:.5f})"
    for name, value in rows.items():
        table.add_row(name, value)
    console = Result()
    console.print(table)
    if "layers" in result:
        before = ", before all blocks were tuned together; shifts as written" if result["tuning"] else ""
        errors = Table(title=f"relative errors{before}")
        for column in ("layer", "weights", "hidden states, from the KV cache", "largest |k_shift|"):
            errors.add_column(column, justify="right")
        for i, layer in enumerate(result["layers"]):
            mean = sum(layer["weight_error"].values()) / len(layer["weight_error"])
            errors.add_row(str(i), f"{mean:.4f}", f"{layer['hidden_error']:.4f}", f"{layer['k_shift_max']:.1f}")
        console.print(errors)
    return 0
