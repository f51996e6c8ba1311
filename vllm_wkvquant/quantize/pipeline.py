"""`wkvquant quantize`: check everything, then one decoder block after another, then all of them together where the
recipe says so, then the checkpoint.

Only the hidden states of all runs and one block, with the followers that the recipe asks for, are in memory. Several
workers run this same code, each on its share of the windows; worker 0 alone writes.
"""

import math
import resource
from collections.abc import Callable
from dataclasses import asdict, dataclass
from textwrap import shorten
from typing import Any

import torch

import vllm_wkvquant
from vllm_wkvquant.checkpoint import kv_tensor_name, quantization_config
from vllm_wkvquant.config import ConfigError
from vllm_wkvquant.quantize.adapters import describe, overflows
from vllm_wkvquant.quantize.blocks import (
    EXACT,
    REFERENCE,
    cache_tensors,
    first_hidden,
    of_all_workers,
    of_this_worker,
    quantize_block,
)
from vllm_wkvquant.quantize.estimate import Estimate, estimate, lighter, place
from vllm_wkvquant.quantize.files import WriteError
from vllm_wkvquant.quantize.head import Comparison, compare
from vllm_wkvquant.quantize.plan import Plan, Settings, fingerprint, preflight
from vllm_wkvquant.quantize.report import BlockDetail, Took, render
from vllm_wkvquant.quantize.runner import Ahead, Clock
from vllm_wkvquant.quantize.state import RunState, begun_before, partial_directory
from vllm_wkvquant.quantize.storage import stage
from vllm_wkvquant.quantize.tune import Tuned, tune
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
    asked = preflight(settings, workers)
    begun_with = fingerprint(asked)
    left_out, begun = begun_before(settings.out, begun_with) if workers.rank == 0 else (None, 0)
    plan = place_again(asked, left_out)
    layers = plan.adapter.num_layers
    if settings.dry_run:
        announce(estimate(plan, workers.total(begun)))
        return {}
    try:
        state = RunState(settings.out, begun_with, stage(plan), plan.left_out) if workers.rank == 0 else None
        done = workers.total(state.blocks_done if state else 0)
        estimated = estimate(plan, done)
        announce(estimated)
        hidden = of_this_worker(plan, state.hidden() if state else {}) if done else first_hidden(plan)
        progress(done, layers, "")
        ahead = Ahead(plan)
        for layer in range(done, layers):
            tensors, report = quantize_block(plan, layer, hidden, ahead)
            plan.adapter.tensors.check_unchanged()
            whole = of_all_workers(plan, hidden)
            if state:
                state.commit(tensors, report, whole)
            del whole
            losses = report.get("loss")
            progress(layer + 1, layers, f"loss {losses[0]:.3g} -> {losses[-1]:.3g}" if losses else "")
        del ahead
        if state:
            state.wait()
        clock = Clock(settings.device)
        runs, of_weights = judge(plan, hidden)
        chosen = choose(plan, runs)
        clock.lap("logits")
        tuned = tune_all(plan, state, hidden, chosen, progress) if plan.recipe.tuning else None
        clock.lap("tuning")
        took = Took(done, clock.seconds, peak_memory(settings.device))
        return finish(plan, state, runs, of_weights, chosen, tuned, estimated, took) if state else {}
    except WriteError as error:
        partial = partial_directory(settings.out)
        kept = f"; {partial} keeps the finished blocks: {error.remedy}, then run again with --resume"
        raise ConfigError(f"{error}{kept if partial.is_dir() else ''}") from error
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
            raise
        raise ConfigError(
            f"out of memory: {shorten(str(error), 200)}; what was finished is kept: free some, then run again with "
            "--resume, or delete that and give fewer --samples or a shorter --seq-len"
        ) from error


def place_again(plan: Plan, left_out: str | None) -> Plan:
    """`place`. left_out: what an interrupted run has left out, which worker 0 knows; None where it knows of none."""
    known = [None, *(name for name, _ in lighter(plan.recipe))]
    return place(plan, known[plan.workers.total(known.index(left_out))])


def judge(plan: Plan, hidden: dict[str, torch.Tensor]) -> tuple[dict[str, Comparison], dict[str, Comparison]]:
    """The candidates compared with the reference, and the reference with the exact run where there is one."""
    held_out = {n: hidden[n][plan.windows.statistics :] for n in (EXACT, REFERENCE) if n in hidden}
    runs = compare(plan, {REFERENCE: held_out[REFERENCE]} | {n: hidden[n] for n in plan.recipe.candidates})
    of_weights = compare(plan, held_out) if EXACT in hidden else {}
    check_comparisons(plan, of_weights)
    check_comparisons(plan, runs)
    return runs, of_weights


def check_comparisons(plan: Plan, runs: dict[str, Comparison]) -> None:
    """Raise ConfigError where a divergence or a perplexity is not finite."""
    for name, run in runs.items():
        if not (math.isfinite(run.kl.mean().item()) and math.isfinite(run.perplexity)):
            dtype = getattr(torch, plan.settings.dtype)
            raise ConfigError(f"divergence of the run {name!r} on held-out windows {overflows(dtype)}")


def choose(plan: Plan, runs: dict[str, Comparison]) -> str:
    """The candidate with the least KL divergence, which worker 0 knows. runs: of `judge`."""
    candidates = plan.recipe.candidates
    best = min(range(len(candidates)), key=lambda i: runs[candidates[i]].kl.mean().item())
    return candidates[plan.workers.total(best if plan.workers.rank == 0 else 0)]


@dataclass(frozen=True)
class TunedRuns:
    """A tuned model, and on held-out windows its weights compared with the 16-bit model, its cache with the same
    weights and a 16-bit cache, and both with the 16-bit model."""

    tuned: Tuned
    weights: Comparison
    cache: Comparison
    both: Comparison


def tune_all(
    plan: Plan, state: RunState | None, hidden: dict[str, torch.Tensor], chosen: str, progress: Progress
) -> TunedRuns:
    """Tune all blocks together; empties `hidden`."""
    layers, tuning = plan.adapter.num_layers, plan.recipe.tuning
    assert tuning
    epochs, exact = tuning.epochs, hidden.pop(EXACT)
    hidden.clear()
    blocks = (plan.workers.spread_all(state.block(layer) if state else None) for layer in range(layers))
    tuned = tune(
        plan,
        blocks,
        chosen,
        exact,
        lambda done, kl: progress(layers, layers, f"all together {done}/{epochs}, KL {kl:.4g}"),
    )
    w4, w4kv4 = tuned.runs
    of_both = compare(plan, {EXACT: exact[plan.windows.statistics :], REFERENCE: w4, chosen: w4kv4})
    of_cache = compare(plan, {REFERENCE: w4, chosen: w4kv4})
    check_comparisons(plan, of_both)
    return TunedRuns(tuned, of_both[REFERENCE], of_cache[chosen], of_both[chosen])


def mean_and_se(x: torch.Tensor) -> dict[str, float]:
    """Of a divergence [N, T]. The error is the larger of that over tokens and that over windows, whose tokens have a
    text in common."""
    se, se_window = (part.std().item() / math.sqrt(part.numel()) for part in (x, x.mean(1)))
    return {"kl": x.mean().item(), "kl_se": max(se, se_window)}


def finish(
    plan: Plan,
    state: RunState,
    runs: dict[str, Comparison],
    of_weights: dict[str, Comparison],
    chosen: str,
    tuned: TunedRuns | None,
    estimated: Estimate,
    took: Took,
) -> dict[str, Any]:
    """Write the checkpoint, clean up. runs, of_weights: of `judge`."""
    adapter, settings = plan.adapter, plan.settings
    perplexity = {name: run.perplexity for name, run in runs.items()}
    kl = {name: runs[name].kl for name in plan.recipe.candidates}
    candidates = {
        name: {**mean_and_se(x), "above_chosen_se": mean_and_se(x - kl[chosen])["kl_se"]} for name, x in kl.items()
    }
    weights = None
    if of_weights:
        weights = mean_and_se(of_weights[REFERENCE].kl)
        perplexity[EXACT] = of_weights[EXACT].perplexity
    layers, details = [], []
    writer = CheckpointWriter(state.result(), settings.out, settings.shard_size)
    state.mark()
    writer.add({n: t.to(adapter.dtype) for n, t in adapter.tensors.get(adapter.outer_names()).items()})
    for layer in range(adapter.num_layers):
        tensors, block = state.block(layer), state.report(layer)
        params, raw = cache_tensors(tensors, chosen), tensors["k_channels"]
        cached = tensors[f"{chosen}.k_channels"]
        own = {n: t for n, t in tensors.items() if n.startswith(adapter.block_prefix(layer))}
        if tuned:
            of_tuned = tuned.tuned.blocks[layer]
            own, params = of_tuned.tensors(), of_tuned.cache.tensors()
        writer.add(dict(sorted({**own, **{kv_tensor_name(layer, p): t for p, t in params.items()}}.items())))
        seconds = block.pop("seconds")  # not in wkvquant.json, which is the same whenever it is made
        details.append(BlockDetail(seconds, params["k_smooth"], params["k_shift"], params["v_shift"], raw, cached))
        written = {"k_shift_max": params["k_shift"].abs().max().item()}
        layers.append({**block, **written, "hidden_error": block["hidden_error"][chosen]})
    report = {
        "version": vllm_wkvquant.__version__,
        "recipe": asdict(plan.recipe),
        "left_out": plan.left_out or None,
        "settings": {
            "samples": plan.all_windows.tokens.shape[0],
            "own_samples": settings.own_samples,
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
        "tuning": tuned and describe_tuning(tuned),
        "layers": layers,
    }
    config = adapter.output_config(quantization_config(plan.kv, adapter.group_sizes))
    adapter.tensors.check_unchanged()
    page = render(settings.out.name, report, details, estimated, took)
    writer.close(settings.model, config, report, page)
    state.close()
    return report


def describe_tuning(tuned: TunedRuns) -> dict[str, Any]:
    """For the report: what the others of its entries come to after tuning, and how that went."""
    return {
        "epochs": [kl if math.isfinite(kl) else None for kl in tuned.tuned.kl],
        "kept": tuned.tuned.kept,
        "weights": mean_and_se(tuned.weights.kl),
        "cache": mean_and_se(tuned.cache.kl),
        "both": mean_and_se(tuned.both.kl),
        "perplexity": {"weights": tuned.weights.perplexity, "both": tuned.both.perplexity},
    }


def peak_memory(device: str) -> dict[str, int]:
    """Most bytes that this process has held on the host and, where that is not all, on the device."""
    peaks = {"host": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    return peaks if device == "cpu" else {**peaks, "device": torch.cuda.max_memory_allocated(device)}
