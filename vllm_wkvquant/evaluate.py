"""`wkvquant eval`: what 4-bit weights and a 4-bit cache cost in perplexity and KL divergence.

On transformers (the default) the specification is evaluated: every window runs once with the mask of past-only
quantization, keys and values of a token's own chunk as they are and everything before it through the quantizer. With
`--engine vllm` the real engine scores the same windows in prefill chunks, so its paged cache is what is measured; the
specification runs beside it with the same chunk.
"""

import argparse
import contextlib
import gc
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from vllm_wkvquant.checkpoint import Checkpoint, read_config
from vllm_wkvquant.config import ConfigError
from vllm_wkvquant.layout import token_bytes
from vllm_wkvquant.reference import KVParams, fake_quantize, past_only_attention
from vllm_wkvquant.text import read_tokens

ATTENTION = "wkvquant_past_only"
LOGIT_ROWS = 512  # rows of logits held at once: 512 x 152k vocabulary x fp32 is 0.3 GB


@dataclass
class PastOnlyCache:
    """Simulates the 4-bit cache inside a transformers model; `enabled` switches between it and a 16-bit cache."""

    params: list[KVParams]
    chunk: int
    enabled: bool = False

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
        """transformers' attention interface: query [1, Hq, T, D], key and value [1, H, T, D] -> [1, T, Hq, D]."""
        if not self.enabled:
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        positions = torch.arange(q.shape[0], device=q.device)
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        past = fake_quantize(k, v, positions, self.params[layer])
        scale = scaling if scaling is not None else q.shape[-1] ** -0.5
        out = past_only_attention(q, k, v, *past, scale, self.chunk, sliding_window or 0)
        return out.to(query.dtype)[None], None


def load_quantized(ckpt: Checkpoint, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """The checkpoint's model in transformers, with its weights dequantized to `dtype`."""
    config = AutoConfig.from_pretrained(ckpt.path)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION)
    state = {name: ckpt.weight(name, quantized).to(dtype) for name, quantized in ckpt.weight_names()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected:
        raise ConfigError(f"{ckpt.path} has weights that its architecture does not know: {unexpected[:4]}")
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if set(missing) - tied:
        raise ConfigError(f"{ckpt.path} lacks the weights {sorted(set(missing) - tied)[:4]}")
    model.tie_weights()
    return model.eval().to(device)


def read_windows(tokenizer_path: Path, text: Path, window: int, count: int) -> list[list[int]]:
    """The text as `count` windows of `window` tokens, or all of it for 0, each after the tokenizer's prefix."""
    ids, prefix = read_tokens(tokenizer_path, text, "text")
    own = window - len(prefix)
    if count and len(ids) < count * own:
        raise ConfigError(
            f"{text} has {len(ids)} tokens, fewer than {count} windows of {window}; give a longer text or --windows 0"
        )
    stop = count * own if count else len(ids)
    return [w for w in (prefix + ids[i : min(i + own, stop)] for i in range(0, stop, own)) if len(w) > 1]


def _progress(items: list[list[int]], what: str) -> Iterator[list[int]]:
    yield from track(items, description=what, console=Console(stderr=True), transient=True)


@torch.inference_mode()
def _hidden(model: PreTrainedModel, tokens: list[int], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden states [n - 1, hidden] of a window and the tokens [n - 1] they predict."""
    ids = torch.tensor(tokens, device=device)
    return model.model(ids[None], use_cache=False).last_hidden_state[0, :-1], ids[1:]


@torch.inference_mode()
def _score(
    head: Callable[[torch.Tensor], torch.Tensor], hidden: list[torch.Tensor], target: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Per token: negative log-likelihood of each hidden state, and KL(first || last) and top-1 agreement of two."""
    parts: dict[str, list[torch.Tensor]] = {}
    for i in range(0, target.shape[0], LOGIT_ROWS):
        rows = slice(i, i + LOGIT_ROWS)
        logp = [head(h[rows]).float().log_softmax(-1) for h in hidden]
        for j, lp in enumerate(logp):
            nll = -lp.gather(1, target[rows, None])[:, 0]
            parts.setdefault(f"nll{j}", []).append(nll.double().cpu())
        if len(logp) == 2:
            parts.setdefault("kl", []).append((logp[0].exp() * (logp[0] - logp[1])).sum(-1).double().cpu())
            parts.setdefault("top1", []).append((logp[0].argmax(-1) == logp[1].argmax(-1)).double().cpu())
    return {name: torch.cat(p) for name, p in parts.items()}


def score_transformers(
    ckpt: Checkpoint, baseline: Path | None, windows: list[list[int]], chunk: int, device: str, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Per-token tensors fp64 over all windows: nll of "w4", "w4kv4" and, with a baseline, "fp16"; "kl"; "top1"."""
    cache = PastOnlyCache([ckpt.kv_params(i).to(device) for i in range(ckpt.kv.num_hidden_layers)], chunk)
    AttentionInterface.register(ATTENTION, cache.attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    out: dict[str, list[torch.Tensor]] = {}
    if baseline is not None:
        model: Any = AutoModelForCausalLM.from_pretrained(baseline, dtype=dtype, attn_implementation="sdpa")
        model = model.eval().to(device)
        for tokens in _progress(windows, "FP16"):
            hidden, target = _hidden(model, tokens, device)
            out.setdefault("fp16", []).append(_score(model.lm_head, [hidden], target)["nll0"])
        del model
        gc.collect()
    model = load_quantized(ckpt, dtype, device)
    for tokens in _progress(windows, "W4 and W4KV4"):
        states = []
        for cache.enabled in (False, True):
            hidden, target = _hidden(model, tokens, device)
            states.append(hidden)
        scores = _score(model.lm_head, states, target)
        for name, key in (("w4", "nll0"), ("w4kv4", "nll1"), ("kl", "kl"), ("top1", "top1")):
            out.setdefault(name, []).append(scores[key])
    return {name: torch.cat(parts) for name, parts in out.items()}


def score_vllm(ckpt: Checkpoint, baseline: Path, windows: list[list[int]], chunk: int) -> dict[str, torch.Tensor]:
    """Per-token nll fp64 from vLLM's prompt log-probabilities, prefilled in chunks of `chunk` tokens."""
    from vllm_wkvquant.plugin.eval_engine import prompt_logprobs

    # any explicit type gives vLLM's own cache; the model's own type loses nothing
    own = str(ckpt.config.get("dtype", "bfloat16"))
    runs = {"fp16": (str(baseline), "auto"), "w4": (str(ckpt.path), own), "w4kv4": (str(ckpt.path), "auto")}
    out = {}
    for name, (path, kv_cache_dtype) in runs.items():
        logprobs = prompt_logprobs(path, windows, chunk, kv_cache_dtype=kv_cache_dtype)
        out[name] = -torch.tensor([lp for window in logprobs for lp in window], dtype=torch.float64)
    return out


def _se(x: torch.Tensor) -> float:
    return (x.std() / math.sqrt(x.numel())).item()


def difference(a: torch.Tensor, b: torch.Tensor, windows: list[list[int]]) -> dict[str, float]:
    """Perplexity of nll `a` over that of `b`, paired by token.

    mean and se: of the difference in nats a token; se_window: the same with windows as the independent units.
    percent, percent_upper95: 100 (exp(mean) - 1), and with mean + 1.96 max(se, se_window).
    """
    d = a - b
    mean, se = d.mean().item(), _se(d)
    lengths = [len(w) - 1 for w in windows]
    sums = torch.stack([part.sum() for part in (d - d.mean()).split(lengths)])
    n = len(lengths)
    se_window = math.sqrt(n / (n - 1)) * sums.norm().item() / d.numel() if n > 1 else se
    return {
        "mean": mean,
        "se": se,
        "se_window": se_window,
        "percent": 100 * math.expm1(mean),
        "percent_upper95": 100 * math.expm1(mean + 1.96 * max(se, se_window)),
    }


def summarize(scores: dict[str, torch.Tensor], windows: list[list[int]]) -> dict[str, Any]:
    """Perplexities and paired differences of per-token nll tensors."""
    pairs = {"w4_vs_fp16": ("w4", "fp16"), "w4kv4_vs_w4": ("w4kv4", "w4"), "w4kv4_vs_fp16": ("w4kv4", "fp16")}
    diffs = {k: difference(scores[a], scores[b], windows) for k, (a, b) in pairs.items() if b in scores}
    out: dict[str, Any] = {f"{n}_ppl": scores[n].mean().exp().item() for n in ("fp16", "w4", "w4kv4") if n in scores}
    return {**out, "se": {k: d["se"] for k, d in diffs.items()}, "difference": diffs}


def evaluate(
    ckpt_path: Path,
    baseline: Path,
    text: Path,
    window: int = 2048,
    windows: int = 10,
    chunk: int | None = None,
    device: str = "cpu",
    engine: str = "transformers",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """The JSON object that `wkvquant eval --json` prints (docs/algorithm.md). Raises ConfigError on bad input."""
    ckpt = Checkpoint(ckpt_path)
    limit = min(c.get("max_position_embeddings", window) for c in (ckpt.config, read_config(baseline)))
    if not 2 <= window <= limit:
        raise ConfigError(f"--window {window} is outside 2 .. {limit}, the positions that the model knows")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here; use --device cpu")
    chunk = chunk or (64 if engine == "vllm" else 1)
    tokens = read_windows(baseline, text, window, windows)
    scores = score_transformers(ckpt, baseline, tokens, chunk, device, dtype)
    result = {
        "engine": engine,
        "checkpoint": ckpt_path.name,
        "text": text.name,
        "window": window,
        "windows": len(tokens),
        "tokens": scores["w4"].numel(),
        "chunk": chunk,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "kv_bits_per_element": 8 * token_bytes(ckpt.kv.head_size) / (2 * ckpt.kv.head_size),
    }
    reference = summarize(scores, tokens)
    reference |= {"kl_w4": scores["kl"].mean().item(), "kl_w4_se": _se(scores["kl"])}
    reference["top1_agreement"] = scores["top1"].mean().item()
    if engine == "transformers":
        return result | reference
    # the engine gives no full distribution, so the divergence is the specification's
    measured = summarize(score_vllm(ckpt, baseline, tokens, chunk), tokens)
    return result | measured | {"kl_w4": reference["kl_w4"], "reference": reference}


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Sends what vLLM and the processes it starts print to stderr, so that stdout holds the result alone."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)


def main(args: argparse.Namespace) -> int:
    """Run `wkvquant eval`; returns the exit status."""
    if args.chunk is not None and args.chunk < 1:
        raise ConfigError(f"--chunk {args.chunk} must be at least 1")
    if args.windows < 0:
        raise ConfigError(f"--windows {args.windows} must not be negative")
    with stdout_to_stderr():
        result = evaluate(
            args.checkpoint,
            args.baseline,
            args.text,
            args.window,
            args.windows,
            args.chunk,
            args.device,
            args.engine,
            getattr(torch, args.dtype),
        )
    if args.json:
        json.dump(result, sys.stdout)
        print()
        return 0
    table = Table(title=f"{result['tokens']} tokens of {result['text']}, {result['engine']}, chunk {result['chunk']}")
    for column in ("", "perplexity", "against FP16", "against W4"):
        table.add_column(column, justify="right")

    def cell(name: str) -> str:
        d = result["difference"].get(name)
        return f"{d['percent']:+.2f} % (se {100 * d['se']:.2f})" if d else ""

    for name in ("fp16", "w4", "w4kv4"):
        against_w4 = cell("w4kv4_vs_w4") if name == "w4kv4" else ""
        table.add_row(name.upper(), f"{result[f'{name}_ppl']:.3f}", cell(f"{name}_vs_fp16"), against_w4)
    console = Console()
    console.print(table)
    console.print(f"KL(W4 || W4KV4) {result['kl_w4']:.4f}, {result['kv_bits_per_element']} bits per KV element")
    return 0
