"""`wkvquant inspect`: what a checkpoint holds, validated as it is read."""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from vllm_wkvquant.checkpoint import Checkpoint, read_object
from vllm_wkvquant.config import ConfigError
from vllm_wkvquant.layout import PageLayout, token_bytes

REPORT_FILE = "wkvquant.json"
BLOCKS = "model.layers."
IN_BLOCK = [f"self_attn.{name}_proj.weight" for name in "qkvo"]
IN_BLOCK += [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
IN_BLOCK += [f"{name}_layernorm.weight" for name in ("input", "post_attention")]
BLOCK_SIZE = 64  # tokens of the page whose bytes are shown


def inspect(path: Path) -> dict[str, Any]:
    """Validate a checkpoint and describe it. Raises ConfigError naming the first thing that is wrong."""
    ckpt = Checkpoint(path)
    kv = ckpt.kv
    for layer in range(kv.num_hidden_layers):
        ckpt.kv_tensors(layer)
    return {
        "checkpoint": path.absolute().name,
        "architecture": next(iter(ckpt.config.get("architectures") or []), None),
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


def _check_names(ckpt: Checkpoint) -> None:
    """Raise ConfigError where a weight is missing: what all models have, and in every block what any of them has, which
    biases are among. transformers would know all of it, but takes seconds to import."""
    found = {name for name, _ in ckpt.weight_names()}
    of_blocks = {name.removeprefix(BLOCKS).partition(".")[2] for name in found if name.startswith(BLOCKS)}
    expected = {f"{BLOCKS}{i}.{name}" for i in range(ckpt.kv.num_hidden_layers) for name in of_blocks.union(IN_BLOCK)}
    expected |= {"model.embed_tokens.weight", "model.norm.weight"}
    if not ckpt.config.get("tie_word_embeddings"):
        expected.add("lm_head.weight")
    missing = sorted(expected - found)
    if missing:
        raise ConfigError(f"{ckpt.path} lacks {len(missing)} weights, {missing[0]} first; quantize the model again")


def _weights(ckpt: Checkpoint) -> dict[str, Any]:
    _check_names(ckpt)
    shapes = ckpt.tensors.shapes()
    quantized_elements = quantized_bytes = other_bytes = 0
    groups: dict[str, int] = {}
    for name, quantized in ckpt.weight_names():
        if not quantized:
            tensor = ckpt.tensors.get([name])[name]
            if not bool(torch.isfinite(tensor).all()):
                raise ConfigError(f"tensor {name} contains NaN or infinity; the checkpoint is damaged, quantize again")
            other_bytes += tensor.numel() * tensor.element_size()
            continue
        base = name.removesuffix("weight")
        suffixes = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
        tensors = ckpt.tensors.get([base + s for s in suffixes])
        out, cols = tensors[base + "weight_shape"].tolist()
        scale = tensors[base + "weight_scale"]
        expected = {
            "weight_packed": (out, math.ceil(cols / 8)),
            "weight_scale": (out, scale.shape[-1]),
            "weight_zero_point": (math.ceil(out / 8), scale.shape[-1]),
            "weight_shape": (2,),
        }
        for suffix, shape in expected.items():
            if shapes[base + suffix] != shape:
                raise ConfigError(f"tensor {base + suffix} has shape {shapes[base + suffix]}, expected {shape}")
        if not bool(torch.isfinite(scale).all()):
            raise ConfigError(f"tensor {base}weight_scale contains NaN or infinity; the checkpoint is damaged")
        groups[base[:-1].rpartition(".")[2]] = cols // scale.shape[-1]
        quantized_elements += out * cols
        quantized_bytes += sum(tensors[base + s].numel() * tensors[base + s].element_size() for s in suffixes[:3])
    if not quantized_elements:
        raise ConfigError(f"{ckpt.path} has no quantized weights")
    return {
        "quantized_parameters": quantized_elements,
        "quantized_bytes": quantized_bytes,
        "bits_per_quantized_weight": 8 * quantized_bytes / quantized_elements,
        "other_bytes": other_bytes,
        "group_sizes": groups,
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
        return {k: report[k] for k in ("settings", "smoothing", "candidates", "layers")} | {
            "tuning": report.get("tuning"),  # older ones have none
            "left_out": report.get("left_out"),
            "recipe": report["recipe"]["name"],
            "version": report["version"],
        }
    except (KeyError, TypeError) as error:
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
    table = Table(title=f"{result['checkpoint']}: {result['architecture']}", show_header=False)
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
        chosen = result["tuning"]["cache"] if result["tuning"] else result["candidates"][result["smoothing"]]
        without = f", without {result['left_out']}" if result["left_out"] else ""
        rows["recipe"] = f"{result['recipe']}{without}, smoothing {result['smoothing']}"
        rows["KL on calibration text"] = f"{chosen['kl']:.5f} (se {chosen['kl_se']:.5f})"
    for name, value in rows.items():
        table.add_row(name, value)
    console = Console()
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
