#!/usr/bin/env python3
"""Generate with SmolLM2-135M through vLLM on the CPU as FP16, W4 and W4KV4, and print one table.

Usage: demo.py MODEL CKPT TEXT   (`make demo` calls it)
Every row is its own process: an engine with the same memory for its KV cache, the same prompts and settings. FP16 and
W4 keep a bf16 cache (`--kv-cache-dtype bfloat16`); W4KV4 is the checkpoint as it is.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from safetensors import safe_open

ROWS = {"FP16": "bfloat16", "W4": "bfloat16", "W4KV4": "auto"}
KV_MEMORY = 256 << 20
PROMPTS = [
    "The capital of France is",
    "In Python, a list comprehension is",
    "Water boils at a lower temperature on a mountain because",
    "The three primary colours are",
]
COPIES, TOKENS = 4, 128


def weight_bytes(model: Path) -> int:
    """Bytes of all tensors in a checkpoint's safetensors files."""
    total = 0
    for file in model.glob("*.safetensors"):
        with safe_open(file, framework="pt") as f:
            total += sum(t.numel() * t.element_size() for t in map(f.get_tensor, f.keys()))
    return total


def generate(model: str, kv_cache_dtype: str, out: str) -> None:
    """One row, in its own process: writes a JSON object to the file `out`, since vLLM prints to both streams."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        dtype="bfloat16",
        kv_cache_dtype=kv_cache_dtype,
        kv_cache_memory_bytes=KV_MEMORY,
        max_model_len=2048,
        enforce_eager=True,
        enable_prefix_caching=False,
    )
    prompts = PROMPTS * COPIES

    def seconds(tokens: int) -> float:
        start = time.perf_counter()
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True), use_tqdm=False)
        return time.perf_counter() - start

    seconds(4)  # warm-up
    decode = min(seconds(TOKENS + 1) - seconds(1) for _ in range(2))
    text = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)
    cache = llm.llm_engine.vllm_config.cache_config
    capacity = cache.num_gpu_blocks * cache.block_size
    result = {
        "capacity": capacity,
        "tokens_per_s": len(prompts) * TOKENS / decode,
        "text": [o.outputs[0].text for o in text],
    }
    Path(out).write_text(json.dumps(result))


def run_row(model: Path, kv_cache_dtype: str) -> dict:
    """`generate` in a subprocess, so that every engine starts from nothing."""
    environment = {**os.environ, "VLLM_CPU_INT4_W4A8": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        command = [sys.executable, __file__, "--row", str(model), kv_cache_dtype, str(out)]
        if subprocess.run(command, env=environment).returncode or not out.exists():
            sys.exit(f"demo: the engine failed for {model} with --kv-cache-dtype {kv_cache_dtype}")
        return json.loads(out.read_text())


def main() -> None:
    """Run the three rows and the evaluation; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=10)
    args = parser.parse_args()

    console = Console(width=110)
    rows = {}
    for name, kv_cache_dtype in ROWS.items():
        console.print(f"generating through vLLM: {name}")
        rows[name] = run_row(args.model if name == "FP16" else args.checkpoint, kv_cache_dtype)
    console.print(f"perplexity of {args.windows} windows of {args.window} tokens")
    command = [sys.executable, "-m", "vllm_wkvquant.cli", "eval", args.checkpoint, "--baseline", args.model]
    command += ["--text", args.text, "--window", str(args.window), "--windows", str(args.windows), "--json"]
    evaluated = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)

    table = Table(title=f"{args.model.name} on this CPU through vLLM, {len(PROMPTS) * COPIES} sequences at once")
    for column in ("", "weights MB", "KV bytes/token", "KV tokens in 256 MiB", "decode tokens/s", "perplexity"):
        table.add_column(column, justify="right")
    for name, row in rows.items():
        weights = weight_bytes(args.model if name == "FP16" else args.checkpoint)
        table.add_row(
            name,
            f"{weights / 1e6:.1f}",
            f"{KV_MEMORY / row['capacity']:.0f}",
            f"{row['capacity']}",
            f"{row['tokens_per_s']:.0f}",
            f"{evaluated[f'{name.lower()}_ppl']:.3f}",
        )
    for name, row in rows.items():
        console.print(f"[bold]{name}[/bold]")
        for prompt, text in zip(PROMPTS, row["text"], strict=True):
            console.print(f"  {prompt}[italic]{text}[/italic]".replace("\n", " "), highlight=False)
    console.print(table)
    console.print(
        f"KL(W4 || W4KV4) {evaluated['kl_w4']:.4f}; {evaluated['kv_bits_per_element']} bits per KV element; "
        f"{evaluated['tokens']} tokens scored"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--row"]:
        generate(*sys.argv[2:5])
    else:
        main()
