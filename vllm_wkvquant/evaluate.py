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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.utils.logging import disable_progress_bar

from vllm_wkvquant import reference
from vllm_wkvquant.checkpoint import Checkpoint, check_plain, read_config
from vllm_wkvquant.config import ConfigError, reason_of
from vllm_wkvquant.device import check_device, default_device, device_name
from vllm_wkvquant.hub import find_model
from vllm_wkvquant.layout import token_bytes
from vllm_wkvquant.output import Notes, Result
from vllm_wkvquant.past_only import past_only_attention
from vllm_wkvquant.reference import Simulation, fake_quantize
from vllm_wkvquant.text import read_tokens

ATTENTION = "wkvquant_past_only"
SAME = ("vocab_size", "hidden_size", "num_hidden_layers")  # of a model and its checkpoint
LOGIT_ROWS = 512  # rows of logits held at once: 512 x 152k vocabulary x fp32 is 0.3 GB
# a model's head, and its last hidden states [n - 1, hidden] in a window of n tokens
Scored = tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]


@dataclass
class SimulatedCache:
    """A KV cache inside a transformers model.

    layers: what the cache does in each layer; None: it keeps keys and values as they are. chunk: tokens of a step,
    which attend each other as they came; 0: every token is read from the cache, the current one too.
    """

    layers: Sequence[Simulation] | None = None
    chunk: int = 1

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
        if self.layers is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        positions = torch.arange(q.shape[0], device=q.device)
        past = self.layers[int(module.layer_idx)](k, v, positions)  # type: ignore[arg-type]
        past_key, past_value = (x.transpose(0, 1)[None] for x in past)
        scale, window = scaling if scaling is not None else q.shape[-1] ** -0.5, sliding_window or 0
        if self.chunk == 0:
            out, _ = sdpa_attention_forward(
                module, query.float(), past_key, past_value, attention_mask, scaling=scaling, **kwargs
            )
        elif self.chunk == 1:
            whole = past_only_attention(query.float(), key, value, past_key, past_value, scale, window)
            out = whole.transpose(1, 2)
        else:
            out = reference.past_only_attention(q, k, v, *past, scale, self.chunk, window)[None]
        return out.to(query.dtype), None


def load(kind: Any, folder: Path, **options: Any) -> Any:
    """`kind.from_pretrained`. Raises ConfigError."""
    if not sys.stderr.isatty():  # nor does loading fail where nobody reads its bars
        disable_progress_bar()
    try:
        return kind.from_pretrained(folder, **options)
    except Exception as error:  # transformers, its hub and safetensors have many kinds, which have no common base
        raise ConfigError(f"the model in {folder} cannot be loaded: {reason_of(error)}") from error


def load_plain(folder: Path, device: str, **options: Any) -> Any:
    """An unquantized model in transformers, which makes up weights that are not there. Raises ConfigError instead."""
    check_plain(folder, read_config(folder))
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, found = load(AutoModelForCausalLM, folder, **options)
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise ConfigError(f"{folder} lacks {len(missing)} tensors of its architecture, {missing[0]} first")
    if found["mismatched_keys"]:
        name, shape, expected = min(found["mismatched_keys"])
        raise ConfigError(f"{folder}: tensor {name} has shape {tuple(shape)}, its config asks for {tuple(expected)}")
    return model.eval().to(device)


def load_baseline(path: Path, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """The unquantized model in transformers. Raises ConfigError."""
    return load_plain(path, device, dtype=dtype, attn_implementation="sdpa")


def load_quantized(ckpt: Checkpoint, cache: SimulatedCache, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """The checkpoint's model in transformers with its weights dequantized to `dtype`, and `cache` in its attention."""
    AttentionInterface.register(ATTENTION, cache.attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    config = load(AutoConfig, ckpt.path)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION)
    state = {name: ckpt.weight(name, quantized).to(dtype) for name, quantized in ckpt.weight_names()}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)  # whose names and shapes `Checkpoint` has checked
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
    windows = [w for w in ([*prefix, *ids[i : min(i + own, stop)]] for i in range(0, stop, own)) if len(w) > 1]
    if not windows:
        raise ConfigError(f"{text} has {len(ids)} tokens, of which none can be scored; give a longer text")
    return windows


def check_run(window: int, device: str, models: list[dict[str, Any]], engine: str = "transformers") -> None:
    """Raise ConfigError where this window does not fit the models of these config.json, or the device is not here."""
    generated = int(engine == "vllm")
    limit = min(c.get("max_position_embeddings") or window + generated for c in models) - generated
    if not 2 <= window <= limit:
        less = " but the one of the token that --engine vllm generates" if generated else ""
        raise ConfigError(f"--window {window} is outside 2 .. {limit}, the positions that the model knows{less}")
    check_device(device)


def check_same(path: Path, config: dict[str, Any], model: dict[str, Any]) -> None:
    """Raise ConfigError where the config.json of the checkpoint at `path` is not of this model."""
    differing = [key for key in SAME if config.get(key) != model.get(key)]
    if differing:
        raise ConfigError(f"{path} is not a checkpoint of this model: its {differing[0]} differs")


def progress(items: list[list[int]], what: str) -> Iterator[list[int]]:
    """The items, with a bar on stderr."""
    yield from track(items, description=what, console=Notes(stderr=True), transient=True)


@torch.inference_mode()
def last_hidden(model: Any, tokens: list[int]) -> torch.Tensor:
    """Last hidden states [n - 1, hidden] of a window, which predict its tokens 1 .. n - 1."""
    ids = torch.tensor([tokens], device=model.device)
    return model.model(ids, use_cache=False).last_hidden_state[0, :-1]


@torch.inference_mode()
def score(rows: dict[str, Scored], tokens: list[int], references: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """Per-token tensors fp64 [n - 1] of a window, on the CPU.

    `nll_ROW` of every row, and of every row against every other that `references` names `kl_REFERENCE_ROW`,
    KL(REFERENCE || ROW) in nats, and `top1_REFERENCE_ROW`, 1.0 where both have the same likeliest token.
    """
    parts: dict[str, list[torch.Tensor]] = {}

    def put(name: str, part: torch.Tensor) -> None:
        parts.setdefault(name, []).append(part.double().cpu())

    for i in range(0, len(tokens) - 1, LOGIT_ROWS):
        target = torch.tensor(tokens[1:][i : i + LOGIT_ROWS])

        def log_probabilities(name: str, start: int = i) -> torch.Tensor:
            head, hidden = rows[name]
            return head(hidden[start : start + LOGIT_ROWS]).float().log_softmax(-1)

        known = {name: log_probabilities(name) for name in references}
        for name in rows:
            logp = known[name] if name in known else log_probabilities(name)
            put(f"nll_{name}", -logp.gather(1, target.to(logp.device)[:, None])[:, 0])
            for other, expected in known.items():
                if other != name:
                    put(f"kl_{other}_{name}", (expected.exp() * (expected - logp)).sum(-1))
                    put(f"top1_{other}_{name}", expected.argmax(-1) == logp.argmax(-1))
    return {name: torch.cat(p) for name, p in parts.items()}


def concatenate(windows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The `score` of several windows as one."""
    return {name: torch.cat([w[name] for w in windows]) for name in windows[0]}


def free_memory(device: str) -> None:
    """Give back the memory of models that are gone."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def score_transformers(
    ckpt: Checkpoint, baseline: Path, windows: list[list[int]], chunk: int, device: str, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """`score` over all windows of the rows "fp16", "w4" and "w4kv4", the last against "w4"."""
    model: Any = load_baseline(baseline, dtype, device)
    fp16 = [score({"fp16": (model.lm_head, last_hidden(model, w))}, w) for w in progress(windows, "FP16")]
    del model
    free_memory(device)
    cache = SimulatedCache(chunk=chunk)
    model = load_quantized(ckpt, cache, dtype, device)
    params = [ckpt.kv_params(i).to(device) for i in range(ckpt.kv.num_hidden_layers)]
    caches: dict[str, Sequence[Simulation] | None] = {
        "w4": None,
        "w4kv4": [partial(fake_quantize, params=p) for p in params],
    }
    w4 = []
    for tokens in progress(windows, "W4 and W4KV4"):
        rows = {}
        for name, cache.layers in caches.items():
            rows[name] = (model.lm_head, last_hidden(model, tokens))
        w4.append(score(rows, tokens, ("w4",)))
    return concatenate(fp16) | concatenate(w4)


def score_vllm(ckpt: Checkpoint, baseline: Path, windows: list[list[int]], chunk: int) -> dict[str, torch.Tensor]:
    """Per-token fp64 `nll_ROW` from vLLM's prompt log-probabilities, prefilled in chunks of `chunk` tokens."""
    from vllm_wkvquant.plugin.eval_engine import prompt_logprobs

    # any explicit type gives vLLM's own cache; the model's own type loses nothing
    own = str(ckpt.config.get("dtype", "bfloat16"))
    runs = {"fp16": (str(baseline), "auto"), "w4": (str(ckpt.path), own), "w4kv4": (str(ckpt.path), "auto")}
    out = {}
    for name, (path, kv_cache_dtype) in runs.items():
        logprobs = prompt_logprobs(path, windows, chunk, kv_cache_dtype=kv_cache_dtype)
        out[f"nll_{name}"] = -torch.tensor([lp for window in logprobs for lp in window], dtype=torch.float64)
    return out


def standard_errors(x: torch.Tensor, windows: list[list[int]]) -> tuple[float, float]:
    """Standard error of the mean of per-token `x`, and the same with windows as the independent units."""
    se = (x.std() / math.sqrt(x.numel())).item()
    lengths = [len(w) - 1 for w in windows]
    sums = torch.stack([part.sum() for part in (x - x.mean()).split(lengths)])
    n = len(lengths)
    return se, math.sqrt(n / (n - 1)) * sums.norm().item() / x.numel() if n > 1 else se


def difference(a: torch.Tensor, b: torch.Tensor, windows: list[list[int]]) -> dict[str, float]:
    """Perplexity of nll `a` over that of `b`, paired by token.

    mean and se: of the difference in nats a token; se_window: the same with windows as the independent units.
    percent, percent_upper95: 100 (exp(mean) - 1), and with mean + 1.96 max(se, se_window).
    """
    mean = (a - b).mean().item()
    se, se_window = standard_errors(a - b, windows)
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
    diffs = {k: difference(scores[f"nll_{a}"], scores[f"nll_{b}"], windows) for k, (a, b) in pairs.items()}
    out: dict[str, Any] = {f"{n}_ppl": scores[f"nll_{n}"].mean().exp().item() for n in ("fp16", "w4", "w4kv4")}
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
    """The JSON object that `wkvquant eval --json` prints. Raises ConfigError on bad input."""
    ckpt = Checkpoint(ckpt_path)
    model = read_config(baseline)
    check_run(window, device, [ckpt.config, model], engine)
    check_same(ckpt_path, ckpt.config, model)
    chunk = chunk or (64 if engine == "vllm" else 1)
    tokens = read_windows(baseline, text, window, windows)
    scores = score_transformers(ckpt, baseline, tokens, chunk, device, dtype)
    result = {
        "engine": engine,
        "checkpoint": ckpt_path.absolute().name,
        "text": text.name,
        "window": window,
        "windows": len(tokens),
        "tokens": scores["nll_w4"].numel(),
        "chunk": chunk,
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "kv_bits_per_element": 8 * token_bytes(ckpt.kv.head_size) / (2 * ckpt.kv.head_size),
    }
    reference = summarize(scores, tokens)
    kl = scores["kl_w4_w4kv4"]
    reference |= {"kl_w4": kl.mean().item(), "kl_w4_se": max(standard_errors(kl, tokens))}
    reference["top1_agreement"] = scores["top1_w4_w4kv4"].mean().item()
    if engine == "transformers":
        return result | reference
    free_memory(device)  # for vLLM, which takes most of a GPU's
    # the engine gives no full distribution, so the divergence is the specification's
    measured = summarize(score_vllm(ckpt, baseline, tokens, chunk), tokens)
    return result | measured | {k: reference[k] for k in ("kl_w4", "kl_w4_se")} | {"reference": reference}


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
            find_model(args.baseline, lambda folder: check_plain(folder, read_config(folder))),
            args.text,
            args.window,
            args.windows,
            args.chunk,
            args.device or default_device(),
            args.engine,
            getattr(torch, args.dtype),
        )
    if args.json:
        json.dump(result, sys.stdout)
        print()
        return 0
    text = escape(str(result["text"]))
    table = Table(title=f"{result['tokens']} tokens of {text}, {result['engine']}, chunk {result['chunk']}")
    for column in ("", "perplexity", "against FP16", "against W4"):
        table.add_column(column, justify="right")

    def cell(name: str) -> str:
        d = result["difference"].get(name)
        # the error of exp(x) is exp(x) times that of x
        return f"{d['percent']:+.2f} % ± {(100 + d['percent']) * max(d['se'], d['se_window']):.2f}" if d else ""

    for name in ("fp16", "w4", "w4kv4"):
        against_w4 = cell("w4kv4_vs_w4") if name == "w4kv4" else ""
        table.add_row(name.upper(), f"{result[f'{name}_ppl']:.3f}", cell(f"{name}_vs_fp16"), against_w4)
    console = Result()
    console.print(table)
    kl = f"{result['kl_w4']:.4f} ± {result['kl_w4_se']:.4f}"
    console.print(f"KL(W4 || W4KV4) {kl}, {result['kv_bits_per_element']} bits per KV element")
    return 0
