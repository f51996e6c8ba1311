#!/usr/bin/env python3
"""Quantize a model's weights to 4 bits with the public quantizers, for benchmarks/quality.py to compare with.

    pip install -r benchmarks/peers-requirements.txt        # in an environment of its own
    PYTHONPATH=. python benchmarks/weight_peers.py MODEL OUTPUT --method gptq --calib-text wiki_calib.txt

    gptq        llm-compressor's GPTQModifier, whose default is act-order "static"
    awq         llm-compressor's AWQModifier, then its QuantizationModifier to the nearest code
    autoround   AutoRound with the settings of its command `auto-round-best` but the number of windows: 1000 iterations

All get the windows that `wkvquant quantize` draws from the same text with the same arguments (all of them, where it
holds some out), its groups (128 weights along the input, or the largest power of two that divides), and its 16-bit
scales; lm_head and embedding stay. Settings that are not mentioned are the libraries' own. Codes are asymmetric, as
ours; with --symmetric there are no zero points.

A model in float16 wants another --dtype: AWQ sums the squared errors of a window in the model's type (SmolLM2's reach
1.3e5 with 2048 tokens, float16 65504), and AutoRound's gradients, of a mean over a whole batch, are subnormal in it
(2e-4 of an output's error with SmolLM2). float32 does for gptq and awq, bfloat16 for autoround, which works in it with
a float32 model, too. AWQ alone may have TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 with float32: float16's mantissa without
its range.

OUTPUT is a plain transformers model in float32 that holds what the codes stand for, scale * (code - zero_point), so
that it runs wherever the model does, and peer.json: method, settings, versions, bits of a quantized weight with its
share of scale and zero point, seconds (of quantizing alone, without loading and writing), peak memory in bytes.
"""

import argparse
import importlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import own_text
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from vllm_wkvquant.checkpoint import config_groups
from vllm_wkvquant.config import ConfigError
from vllm_wkvquant.quantize.adapters import ModelAdapter
from vllm_wkvquant.quantize.calibration import read_windows
from vllm_wkvquant.quantize.files import WriteError, write_json
from vllm_wkvquant.quantize.pipeline import peak_memory
from vllm_wkvquant.quantize.state import check_output
from vllm_wkvquant.quantize.writer import copy_companions
from vllm_wkvquant.text import load_tokenizer

PEER_FILE = "peer.json"
LIBRARIES = ("torch", "transformers", "llmcompressor", "auto-round", "compressed-tensors")
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Task:
    """What a method works on. batches: int64 [1, seq_len] each, a window; group_sizes: of the adapter."""

    path: Path
    model: PreTrainedModel
    group_sizes: dict[str, int]
    batches: list[Batch]
    symmetric: bool
    iterations: int
    seed: int
    device: str

    def layers(self) -> dict[str, torch.nn.Module]:
        """The linear layers to quantize, by path."""
        return {n: m for n, m in self.model.named_modules() if n.rpartition(".")[2] in self.group_sizes}


# parameters that the method changed, by name; scales [out, in / group] of quantized weights, by the weight's name
Result = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]


def compress(task: Task, modifiers: list[Any]) -> Result:
    """Run llm-compressor, block after block."""
    from compressed_tensors.offload import disable_onloading
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from llmcompressor import oneshot
    from torch.utils.data import DataLoader

    if task.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # it takes the GPU that it sees
    torch.manual_seed(task.seed)
    loader = DataLoader(task.batches, batch_size=None)
    count, length = len(task.batches), task.batches[0]["input_ids"].shape[1]
    oneshot(
        model=task.model,
        dataset=loader,
        recipe=modifiers,
        num_calibration_samples=count,
        max_seq_length=length,
        pipeline="sequential",
    )
    scales = {}
    with disable_onloading():  # not to the GPU: that would be the peak of its memory
        changed = dict(task.model.state_dict())
        for name, layer in task.layers().items():
            args, scale = layer.quantization_scheme.weights, layer.weight_scale.data
            changed[f"{name}.weight"] = fake_quantize(layer.weight.data, scale, layer.weight_zero_point.data, args)
            scales[f"{name}.weight"] = scale
    return changed, scales


def schemes(task: Task) -> dict[str, Any]:
    """`config_groups` for llm-compressor, with our groups."""
    from compressed_tensors.quantization import QuantizationScheme

    groups = config_groups(task.group_sizes)
    for group in groups.values():
        group["weights"]["symmetric"] = task.symmetric
    return {name: QuantizationScheme(**group) for name, group in groups.items()}


def gptq(task: Task) -> Result:
    from llmcompressor.modifiers.gptq import GPTQModifier

    return compress(task, [GPTQModifier(config_groups=schemes(task), ignore=["lm_head"])])


def awq(task: Task) -> Result:
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    if task.device == "cpu":  # it pins its inputs without asking whether there is a device to copy them to
        IntermediatesCache.pin_memory = lambda *_: None
    return compress(task, [AWQModifier(), QuantizationModifier(config_groups=schemes(task), ignore=["lm_head"])])


def autoround(task: Task) -> Result:
    from auto_round import AutoRound

    layers = task.layers()
    rounding = AutoRound(
        task.model,
        load_tokenizer(task.path),
        scheme="W4A16",
        sym=task.symmetric,
        layer_config={n: {"group_size": task.group_sizes[n.rpartition(".")[2]]} for n in layers},
        dataset=task.batches,
        nsamples=len(task.batches),
        seqlen=task.batches[0]["input_ids"].shape[1],
        iters=task.iterations,
        batch_size=8,
        seed=task.seed,
        device_map=task.device,
    )
    rounding.quantize()
    weights = {f"{n}.weight": m.weight.data for n, m in layers.items()}
    return weights, {f"{n}.weight": m.scale for n, m in layers.items()}


# a method, and the library that it is in
METHODS: dict[str, tuple[Callable[[Task], Result], str]] = {
    "gptq": (gptq, "llmcompressor"),
    "awq": (awq, "llmcompressor"),
    "autoround": (autoround, "auto_round"),
}


def on_16bit_scale(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp32 [out, in] with the codes that `weight` has on `scale` [out, in / group], and the scale rounded to `dtype`.

    weight is scale * (code - zero_point) up to the rounding of its own type, so that the quotient is all but whole.
    """
    step = scale.float()[..., None]
    steps = (weight.float().view(*scale.shape, -1) / step).round()
    return (steps * step.to(dtype).float()).flatten(1)


def bits_per_weight(adapter: ModelAdapter, symmetric: bool) -> float:
    """Of a quantized weight: its code, and its share of a 16-bit scale and a 4-bit zero point."""
    extra = 16 if symmetric else 20
    bits = total = 0.0
    for name, (rows, columns) in adapter.linear_shapes().items():
        bits += rows * columns * (4 + extra / adapter.group_sizes[name.rpartition(".")[2]])
        total += rows * columns
    return bits / total


def run(args: argparse.Namespace) -> None:
    """Raises ConfigError or WriteError."""
    check_output(args.output, resume=False)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here; use --device cpu")
    own_text.check_options(args)
    method, library = METHODS[args.method]
    try:
        importlib.import_module(library)  # which is not timed
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error}; install benchmarks/peers-requirements.txt in an environment of its own") from error
    adapter = ModelAdapter(args.model, "sdpa")
    own = args.own_text, args.own_samples
    tokens = read_windows(args.model, args.calib_text, args.samples, args.seq_len, args.seed, *own).tokens
    batches = [{"input_ids": t[None], "attention_mask": torch.ones_like(t[None])} for t in tokens]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto" if args.dtype is None else args.dtype)
    dtype = model.dtype
    task = Task(
        args.model, model, adapter.group_sizes, batches, args.symmetric, args.iterations, args.seed, args.device
    )
    began = time.perf_counter()
    changed, scales = method(task)
    seconds = time.perf_counter() - began
    memory = peak_memory(args.device)
    result = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    for name, parameter in result.named_parameters():
        if name in scales:
            parameter.data = on_16bit_scale(changed[name].cpu(), scales[name].cpu(), adapter.dtype)
        elif name in changed:
            parameter.data = changed[name].float().cpu()
        if not parameter.isfinite().all():
            raise ConfigError(f"{args.method} left {name} with NaN or infinity; try another --dtype")
    result.save_pretrained(args.output)
    copy_companions(args.model, args.output)
    peer = {
        "method": args.method,
        "symmetric": args.symmetric,
        "iterations": args.iterations if args.method == "autoround" else None,
        "group_sizes": adapter.group_sizes,
        "bits_per_weight": bits_per_weight(adapter, args.symmetric),
        "calibration": {
            "text": args.calib_text.name,
            "samples": len(tokens),
            "own_samples": args.own_samples,
            "seq_len": args.seq_len,
        },
        "seed": args.seed,
        "dtype": str(dtype).removeprefix("torch."),
        "float32_matmul": torch.get_float32_matmul_precision(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "seconds": seconds,
        "peak_bytes": memory,
        "versions": {name: version(name) for name in LIBRARIES},
    }
    write_json(args.output / PEER_FILE, peer)
    print(f"{args.output}: {args.method}, {peer['bits_per_weight']:.3f} bits a weight, {seconds:.0f} s")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for bad input."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL", help="directory of a Hugging Face checkpoint")
    parser.add_argument(
        "output", type=Path, metavar="OUTPUT", help="directory to create; it must not exist or be empty"
    )
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--calib-text", type=Path, required=True, metavar="FILE", help="UTF-8 text to calibrate on")
    parser.add_argument("--samples", type=int, default=128, help="windows of text (%(default)s)")
    own_text.add_options(parser)
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens in a window (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which windows are drawn, and the method's (%(default)s)")
    parser.add_argument("--symmetric", action="store_true", help="codes without zero points")
    parser.add_argument("--iterations", type=int, default=1000, help="of autoround, for each block (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(%(default)s)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the model while it is quantized (its own, as the libraries' examples do)",
    )
    try:
        run(parser.parse_args(argv))
    except (ConfigError, WriteError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
