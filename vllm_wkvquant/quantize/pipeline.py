"""`wkvquant quantize`: check everything, then one decoder block after another, then the checkpoint.

Only the hidden states of all runs and one block, with the followers that the recipe asks for, are in memory. Several
workers run this same code, each on its share of the windows; worker 0 alone writes.
"""

import math
import resource
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

import vllm_wkvquant
from vllm_wkvquant.checkpoint import KV_PARAMS, kv_tensor_name, quantization_config
from vllm_wkvquant.config import ConfigError
from vllm_wkvquant.quantize.adapters import describe
from vllm_wkvquant.quantize.blocks import (
    EXACT,
    REFERENCE,
    first_hidden,
    of_all_workers,
    of_this_worker,
    quantize_block,
)
from vllm_wkvquant.quantize.estimate import Estimate, estimate, place
from vllm_wkvquant.quantize.files import WriteError
from vllm_wkvquant.quantize.head import Comparison, compare
from vllm_wkvquant.quantize.plan import Plan, Settings, fingerprint, preflight
from vllm_wkvquant.quantize.report import BlockDetail, render
from vllm_wkvquant.quantize.runner import Ahead
from vllm_wkvquant.quantize.state import RunState, partial_directory
from vllm_wkvquant.quantize.storage import stage
from vllm_wkvquant.quantize.workers import ALONE, Workers
from vllm_wkvquant.quantize.writer import CheckpointWriter

Progress = Callable[[int, int, str], None]  # (blocks done, blocks in all, what the last one came to)
Announce = Callable[[Estimate], None]


@torch.no_grad()
def quantize(
    settings: Settings,
    progress: Progress = lambda done, total, note: None,
    announce: Announce = lambda estimate: None,
    workers: Workers = ALONE,
) -> dict[str, Any]:
    """Quantize a model; returns the report, which is empty for a dry run and on workers other than 0.

    Raises ConfigError on bad input and a full disk.
    """
    plan = place(preflight(settings, workers))
    layers = plan.adapter.num_layers
    if settings.dry_run:
        announce(estimate(plan))
        return {}
    try:
        state = RunState(settings.out, fingerprint(plan), stage(plan)) if workers.rank == 0 else None
        done = workers.total(state.blocks_done if state else 0)
        estimated = estimate(plan)
        announce(estimated)
        hidden = of_this_worker(plan, state.hidden() if state else {}) if done else first_hidden(plan)
        progress(done, layers, "")
        ahead = Ahead(plan)
        for layer in range(done, layers):
            tensors, report = quantize_block(plan, layer, hidden, ahead)
            whole = of_all_workers(plan, hidden)
            if state:
                state.commit(tensors, report, whole)
            del whole
            losses = report.get("loss")
            progress(layer + 1, layers, f"loss {losses[0]:.3g} -> {losses[-1]:.3g}" if losses else "")
        del ahead
        if state:
            state.wait()
        runs, of_weights = judge(plan, hidden)
        return finish(plan, state, runs, of_weights, estimated) if state else {}
    except WriteError as error:
        raise ConfigError(
            f"{error}; {partial_directory(settings.out)} keeps the finished blocks: free some space, then run again "
            f"with --resume"
        ) from error


def judge(plan: Plan, hidden: dict[str, torch.Tensor]) -> tuple[dict[str, Comparison], dict[str, Comparison]]:
    """The candidates compared with the reference, and the reference with the exact run where there is one."""
    held_out = {n: hidden[n][plan.windows.statistics :] for n in (EXACT, REFERENCE) if n in hidden}
    runs = compare(plan, {REFERENCE: held_out[REFERENCE]} | {n: hidden[n] for n in plan.recipe.candidates})
    return runs, compare(plan, held_out) if EXACT in hidden else {}


def finish(
    plan: Plan,
    state: RunState,
    runs: dict[str, Comparison],
    of_weights: dict[str, Comparison],
    estimated: Estimate,
) -> dict[str, Any]:
    """Choose the candidate, write the checkpoint, clean up. runs, of_weights: of `judge`."""
    adapter, settings = plan.adapter, plan.settings
    perplexity = {name: run.perplexity for name, run in runs.items()}
    kl = {name: runs[name].kl for name in plan.recipe.candidates}
    chosen = min(kl, key=lambda name: kl[name].mean().item())

    def se(x: torch.Tensor) -> float:
        return x.std().item() / math.sqrt(x.numel())

    candidates = {
        name: {"kl": x.mean().item(), "kl_se": se(x), "above_chosen_se": se(x - kl[chosen])} for name, x in kl.items()
    }
    weights = None
    if of_weights:
        x = of_weights[REFERENCE].kl
        weights = {"kl": x.mean().item(), "kl_se": se(x)}
        perplexity[EXACT] = of_weights[EXACT].perplexity
    layers, details = [], []
    writer = CheckpointWriter(state.directory / "checkpoint", settings.out, settings.shard_size)
    writer.add({n: t.to(adapter.dtype) for n, t in adapter.tensors.get(adapter.outer_names()).items()})
    for layer in range(adapter.num_layers):
        tensors, block = state.block(layer), state.report(layer)
        raw = tensors.pop("k_channels")
        channels = {name: tensors.pop(f"{name}.k_channels") for name in kl}
        smooth = {name: tensors.pop(f"{name}.k_smooth") for name in kl}
        params = {p: tensors.pop(p) for p in KV_PARAMS if p != "k_smooth"} | {"k_smooth": smooth[chosen]}
        writer.add(dict(sorted({**tensors, **{kv_tensor_name(layer, p): t for p, t in params.items()}}.items())))
        seconds = block.pop("seconds")  # not in wkvquant.json, which is the same whenever it is made
        details.append(
            BlockDetail(seconds, smooth[chosen], params["k_shift"], params["v_shift"], raw, channels[chosen])
        )
        layers.append({**block, "hidden_error": block["hidden_error"][chosen]})
    report = {
        "version": vllm_wkvquant.__version__,
        "recipe": asdict(plan.recipe),
        "settings": {
            "samples": settings.samples,
            "held_out": plan.all_windows.held_out,
            "seq_len": plan.windows.tokens.shape[1],
            "seed": settings.seed,
            "device": settings.device,
            "dtype": settings.dtype,
            "workers": plan.workers.size,
        },
        "model": describe(adapter),
        "smoothing": chosen,
        "candidates": candidates,
        "weights": weights,
        "perplexity": perplexity,
        "layers": layers,
    }
    config = adapter.output_config(quantization_config(plan.kv, adapter.group_sizes))
    page = render(settings.out.name, report, details, estimated, peak_memory(settings.device))
    writer.close(settings.model, config, report, page)
    state.close()
    return report


def peak_memory(device: str) -> dict[str, int]:
    """Most bytes that this process has held on the host and, where that is not all, on the device."""
    peaks = {"host": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    return peaks if device == "cpu" else {**peaks, "device": torch.cuda.max_memory_allocated(device)}
