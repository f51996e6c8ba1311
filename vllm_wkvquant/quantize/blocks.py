"""One decoder block: every run of the model goes through it, and its weights and cache parameters are found on the way.

Runs: the reference (4-bit weights, 16-bit cache) on all calibration windows; on the held-out ones, each candidate (the
same weights, a simulated 4-bit cache); and, where weights are learned, the exact one (16-bit weights and cache) on all.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from vllm_wkvquant.checkpoint import KV_PARAMS
from vllm_wkvquant.config import ConfigError
from vllm_wkvquant.quantize import kv
from vllm_wkvquant.quantize.adapters import ModelAdapter, not_finite, overflows
from vllm_wkvquant.quantize.attention import QKV
from vllm_wkvquant.quantize.calibration import SKIPPED, Windows
from vllm_wkvquant.quantize.fold import fold_rows, fold_value
from vllm_wkvquant.quantize.learn import LearnedBlock, LearnedCache, LearnedWeight, learn, relative_mse
from vllm_wkvquant.quantize.plan import Plan
from vllm_wkvquant.quantize.recipes import ALL, LEARNED, SEARCHED, SLOW, Smoothing
from vllm_wkvquant.quantize.runner import Ahead, BlockRunner, Clock
from vllm_wkvquant.quantize.storage import keep
from vllm_wkvquant.quantize.weights import round_to_nearest
from vllm_wkvquant.reference import KVParams

REFERENCE = "reference"
EXACT = "exact"
FIRST = "first"


def first_hidden(plan: Plan) -> dict[str, torch.Tensor]:
    """Embeddings: the reference's, and the exact run's if there is one, on all windows [N, T, hidden], the reference's
    on tokens at position 0 [B, 1, hidden], and each candidate's on the held-out windows."""
    embedding = plan.adapter.load_embedding().to(plan.adapter.dtype)
    dtype = getattr(torch, plan.settings.dtype)

    def embed(tokens: torch.Tensor) -> torch.Tensor:
        return keep(plan, torch.nn.functional.embedding(tokens, embedding).to(dtype), plan.storage.hidden)

    tokens, held_out = plan.windows.tokens, plan.windows.tokens[plan.windows.statistics :]
    runs = {REFERENCE: embed(tokens), FIRST: embed(plan.windows.first_tokens[:, None])}
    runs |= {name: embed(held_out) for name in plan.recipe.candidates}
    return runs | ({EXACT: embed(tokens)} if plan.recipe.learning else {})


def of_all_workers(plan: Plan, hidden: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Hidden states of all windows, on worker 0; of no use on the others."""
    if plan.workers.size == 1:
        return hidden
    whole = {}
    for name, run in hidden.items():
        parts = [part for part in split(run, plan.windows) if part.shape[0]] if name != FIRST else []
        whole[name] = torch.cat([plan.workers.gather(part) for part in parts]) if parts else run
    return whole


def of_this_worker(plan: Plan, whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `of_all_workers` gave, handed out again. whole: empty but on worker 0; emptied there."""
    hidden = first_hidden(plan)  # for the names and shapes
    for name, run in hidden.items():
        of_all = plan.workers.spread(whole.pop(name, None))
        if name == FIRST:
            run.copy_(of_all)
            continue
        for mine, part in zip(split(run, plan.windows), split(of_all, plan.all_windows), strict=True):
            mine.copy_(plan.workers.share(part))
    return hidden


def split(run: torch.Tensor, windows: Windows) -> tuple[torch.Tensor, ...]:
    """The windows of statistics, none in a candidate's run, and those held out."""
    return run.split([run.shape[0] - windows.held_out, windows.held_out])


def quantize_block(
    plan: Plan, layer: int, hidden: dict[str, torch.Tensor], ahead: Ahead
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """One block: its tensors for the checkpoint, each candidate's k_smooth and what its keys come to (k_channels, the
    report's) among them, and its report; takes `hidden` and `ahead` past it."""
    adapter, recipe, train, workers = plan.adapter, plan.recipe, plan.windows.statistics, plan.workers
    clock = Clock(plan.settings.device)
    block = ahead.take_block(layer)
    runner = BlockRunner(plan, block, plan.windows.tokens.shape[1])
    reference = hidden[REFERENCE]
    clock.lap("load")
    if recipe.learning:
        ahead.advance(runner, hidden[EXACT])
        clock.lap("exact")

    v_proj, o_proj = (block.get_submodule(n) for n in (adapter.family.v_proj, adapter.family.o_proj))
    norm = block.get_submodule(adapter.family.attention_norm)
    v_smooth = torch.ones(adapter.num_kv_heads, adapter.head_size, device=plan.settings.device)
    if recipe.value_balance:
        v_smooth = balance_value(plan, norm, v_proj, o_proj, reference[:train])
    fold_value(v_proj, o_proj, v_smooth, recipe.value_hadamard)  # type: ignore[arg-type]
    clock.lap("statistics")

    learned = None
    output_error = {}
    if recipe.learning:
        output_error["rounded"] = rounded_error(plan, runner, reference[train:], hidden[EXACT][train:])
        clock.lap("rounded")
        learned = learn_block(plan, layer, runner, ahead, reference, hidden[EXACT], hidden[FIRST], clock)
    others = other_tensors(plan, layer, v_smooth, learned)
    tensors, weight_error = quantize_weights(adapter, layer, block, others, learned)
    clock.lap("round")

    captured: list[QKV] = []
    for i, window in enumerate(reference):
        reference[i].copy_(runner(window, captured=captured if i < train else None))
    hidden[FIRST], firsts = runner.first(hidden[FIRST])
    clock.lap("reference")
    statistics = kv.collect(captured, firsts if recipe.first_shift else None, plan.kv, plan.settings.device, workers)
    clock.lap("statistics")
    if learned and learned.cache:
        statistics = replace(statistics, **learned.cache.shifts())
        params = {LEARNED: learned.cache.params()}
        v_smooth = v_smooth * learned.cache.log_v.exp()  # all that is folded: these recipes have no rotation
    else:
        statistics, params = layer_params(plan, statistics, captured, o_proj.weight)  # type: ignore[arg-type]
    clock.lap("search")
    tensors["k_channels"] = kv.channel_maxima(captured, None, plan.settings.device, workers).cpu()
    for name, candidate in params.items():
        tensors[f"{name}.k_channels"] = kv.channel_maxima(captured, candidate, plan.settings.device, workers).cpu()
    clock.lap("statistics")
    errors = {}
    for name, candidate in params.items():
        runner.advance(hidden[name], candidate)
        errors[name] = hidden_error(plan, hidden[name], reference[train:])
        tensors[f"{name}.k_smooth"] = candidate.k_smooth.cpu()
    tensors |= {p: getattr(statistics, p).cpu() for p in KV_PARAMS if p != "k_smooth"}
    clock.lap("candidates")
    report: dict[str, Any] = {
        "weight_error": weight_error,
        "hidden_error": errors,
        "k_shift_max": statistics.k_shift.abs().max().item(),
        "k_deviation_max": statistics.k_deviation.max().item(),
        "shift_pairs": kv.count_shifts(statistics.k_shift, plan.kv) if plan.kv.key_shift == "rotating" else None,
        "v_smooth": [v_smooth.min().item(), v_smooth.max().item()],
        "seconds": clock.seconds,
    }
    if learned:
        output_error["learned"] = mean_loss(plan, reference[train:], hidden[EXACT][train:])
        report |= {"loss": learned.losses, "output_error": output_error, "clip": learned.clips()}
    check_finite(plan, layer, hidden, tensors, report, learned.parameters() if learned else [])
    return tensors, report


def check_finite(
    plan: Plan,
    layer: int,
    hidden: dict[str, torch.Tensor],
    tensors: dict[str, torch.Tensor],
    report: dict[str, Any],
    learned: list[torch.Tensor],
) -> None:
    """Raise ConfigError where a run's hidden states, a loss, a tensor or something learned of a finished block is not
    finite."""
    written = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    fine = all(map(math.isfinite, report.get("loss", [])))
    what = None
    if fine and not all(parameter.isfinite().all() for parameter in learned):  # codes of a NaN are anything
        what = "gradient of the loss"
    elif run := not_finite(hidden):
        what = f"hidden state of the run {run!r}"
    elif not fine:
        what = "loss"
    elif name := not_finite(written):
        what = name
    if what:
        raise ConfigError(f"block {layer}: {what} {overflows(getattr(torch, plan.settings.dtype))}")


def cache_tensors(tensors: dict[str, torch.Tensor], chosen: str) -> dict[str, torch.Tensor]:
    """KV parameters by name of what `quantize_block` gave, with the smoothing of this candidate."""
    return {p: tensors[f"{chosen}.{p}" if p == "k_smooth" else p] for p in KV_PARAMS}


def mean_loss(plan: Plan, run: Iterable[torch.Tensor], exact: torch.Tensor) -> float:
    """`relative_mse` of all workers' windows but their first positions; run, exact: this worker's, [N, T, hidden]."""
    device = plan.settings.device
    pairs = ((a.to(device), b.to(device)) for a, b in zip(run, exact, strict=True))
    return plan.workers.mean([relative_mse(a[SKIPPED:], b[SKIPPED:]) for a, b in pairs]).item()


def hidden_error(plan: Plan, run: torch.Tensor, reference: torch.Tensor) -> float:
    """|run - reference| / |reference| of all workers' windows but their first positions; both [N, T, hidden]."""
    squares = torch.zeros(2, dtype=torch.float64, device=plan.settings.device)
    for window, exact in zip(run, reference, strict=True):
        a, b = (x[SKIPPED:].to(squares.device).float() for x in (window, exact))
        squares += torch.stack([(a - b).square().sum(), b.square().sum()])
    error, size = plan.workers.sum(squares).sqrt().tolist()
    return error / max(size, 1e-30)


def rounded_error(plan: Plan, runner: BlockRunner, inputs: torch.Tensor, exact: torch.Tensor) -> float:
    """`mean_loss` of the block with its weights rounded to nearest, for comparison with what is learned."""
    weights = {}
    for name in plan.adapter.family.linears:
        weight: Any = runner.block.get_submodule(name).weight
        size = plan.adapter.group_sizes[name.rpartition(".")[2]]
        weights[f"{name}.weight"] = round_to_nearest(weight, size, plan.adapter.dtype).dequantize().to(weight.dtype)
    return mean_loss(plan, (runner.run(runner.block, weights, w) for w in inputs), exact)


def learn_block(
    plan: Plan,
    layer: int,
    runner: BlockRunner,
    ahead: Ahead,
    reference: torch.Tensor,
    exact: torch.Tensor,
    first: torch.Tensor,
    clock: Clock,
) -> LearnedBlock:
    """What the recipe learns of a block, learned.

    reference: the block's input; exact: the 16-bit model's output after it; both [N, T, hidden]. first: input of tokens
    at position 0, [B, 1, hidden].
    """
    adapter, recipe, family = plan.adapter, plan.recipe, plan.adapter.family
    learning, block, train = recipe.learning, runner.block, plan.windows.statistics
    assert learning is not None
    captured: list[QKV] = []
    with input_squares(block, family.linears if learning.clip == "searched" else ()) as squares:
        for window in reference[:train]:
            runner(window, captured=captured if learning.cache else None)
    for square in squares.values():
        plan.workers.sum(square)
    cache = None
    if learning.cache:
        firsts = runner.first(first)[1] if recipe.first_shift else None
        statistics = kv.collect(captured, firsts, plan.kv, plan.settings.device, plan.workers)
        smooth = kv.smoothing_factors(recipe.smoothings[0], statistics, plan.kv.rope.rotary_dim)
        own = (statistics.k_first, statistics.v_first) if recipe.first_shift else (None, None)
        cache = LearnedCache(KVParams.build(plan.kv, smooth, statistics.k_shift, statistics.v_shift, *own))
    del captured
    clock.lap("statistics")
    weights = {
        name: LearnedWeight(
            block.get_submodule(name).weight,  # type: ignore[arg-type]
            adapter.group_sizes[name.rpartition(".")[2]],
            adapter.dtype,
            learning,
            squares.get(name),
        )
        for name in family.linears
    }
    learned = LearnedBlock(weights, cache, block, family.v_proj, family.o_proj)
    clock.lap("clips")

    ahead.load(layer)
    clock.lap("load")
    targets = ahead.targets(runner, exact[:train])
    clock.lap("targets")

    def forward(weights: dict[str, torch.Tensor], window: torch.Tensor) -> list[torch.Tensor]:
        plan.attention.cache, plan.attention.past_only = cache.fake if cache else None, learning.past_only
        out = [runner.run(block, weights, window)]
        plan.attention.cache, plan.attention.past_only = None, True
        for follower in ahead.blocks:
            out.append(runner.run(follower, {}, out[-1]))
        return out

    seed = plan.settings.seed + layer
    learned.losses = learn(learning, learned, forward, reference[:train], targets, seed, plan.workers)
    clock.lap("learn")
    return learned


@contextlib.contextmanager
def input_squares(block: torch.nn.Module, linears: tuple[str, ...]) -> Iterator[dict[str, torch.Tensor]]:
    """Sums the squares of the input channels of linear layers while it lasts: fp32 [in] by module path."""
    squares: dict[str, torch.Tensor] = {}

    def add(name: str, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        square = args[0].float().flatten(0, -2)[SKIPPED:].square().sum(0)
        squares[name] = squares[name] + square if name in squares else square

    hooks = [block.get_submodule(n).register_forward_pre_hook(partial(add, n)) for n in linears]
    try:
        yield squares
    finally:
        for hook in hooks:
            hook.remove()


def balance_value(
    plan: Plan, norm: torch.nn.Module, v_proj: torch.nn.Module, o_proj: torch.nn.Module, windows: torch.Tensor
) -> torch.Tensor:
    """s_v fp32 [H, D]: (deviation of V / norm of o_proj's columns) ** value_balance, normalized per head; 1 where one
    of them is 0.

    Dividing by s_v spreads the range evenly; the error of channel c then reaches the output times s_v[c] |column c|.
    """
    heads, size = plan.adapter.num_kv_heads, plan.adapter.head_size
    variances = []
    for window in windows:
        value = v_proj(norm(window.to(plan.settings.device)))[SKIPPED:].float().view(-1, heads, size)
        variances.append((value - value.mean(0)).square().mean(0))
    columns = o_proj.weight.float().square().sum(0).view(heads, -1, size).sum(1)  # type: ignore[operator]
    ratio = (plan.workers.mean(variances) / columns.clamp_min(1e-12)).sqrt().masked_fill(columns == 0, 0)
    return kv.normalize(ratio**plan.recipe.value_balance)


def other_tensors(
    plan: Plan, layer: int, v_smooth: torch.Tensor, learned: LearnedBlock | None
) -> dict[str, torch.Tensor]:
    """A block's norms and biases by parameter name, in the model's type: as they are stored, whatever type calibration
    runs in, and v_proj's bias folded in fp32."""
    adapter, prefix, v_bias = plan.adapter, plan.adapter.block_prefix(layer), f"{plan.adapter.family.v_proj}.bias"
    quantized = {f"{prefix}{name}.weight" for name in adapter.family.linears}
    adapter.tensors.check_unchanged()
    stored = adapter.tensors.get([n for n in adapter.block_names(layer) if n not in quantized])
    others = {n.removeprefix(prefix): t for n, t in stored.items()}
    if v_bias in others:
        bias = fold_rows(others[v_bias].to(v_smooth.device), v_smooth, plan.recipe.value_hadamard)
        others[v_bias] = learned.fold_bias(bias) if learned else bias
    return {name: t.to(adapter.dtype).cpu() for name, t in others.items()}


def quantize_weights(
    adapter: ModelAdapter,
    layer: int,
    block: torch.nn.Module,
    others: dict[str, torch.Tensor],
    learned: LearnedBlock | None,
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Round a block's linear layers in place, to nearest or as learned; returns all its tensors by checkpoint name, and
    each layer's error. others: of `other_tensors`."""
    prefix = adapter.block_prefix(layer)
    codes = {}
    if learned:
        codes = learned.quantize()
        learned.fold()
    tensors, errors = {}, {}
    for name, other in others.items():  # run what is stored
        tensors[prefix + name] = other
        parameter = block.get_parameter(name)
        parameter.data = other.to(parameter.device, parameter.dtype)
    for name in adapter.family.linears:
        linear: Any = block.get_submodule(name)
        quantized = codes.get(name) or round_to_nearest(
            linear.weight, adapter.group_sizes[name.rpartition(".")[2]], adapter.dtype
        )
        weight = quantized.dequantize()
        errors[name] = relative_error(weight, linear.weight)
        linear.weight.data = weight.to(linear.weight.dtype)
        tensors |= {f"{prefix}{name}.{suffix}": t for suffix, t in quantized.pack().items()}
    return tensors, errors


def relative_error(x: torch.Tensor, exact: torch.Tensor) -> float:
    """|x - exact| / |exact|."""
    return ((x.float() - exact.float()).norm() / exact.float().norm().clamp_min(1e-30)).item()


def layer_params(
    plan: Plan, statistics: kv.KVStatistics, captured: list[QKV], o_proj: torch.Tensor
) -> tuple[kv.KVStatistics, dict[str, KVParams]]:
    """Each candidate's parameters of one layer, by its name, and the statistics under the shift that they have.

    statistics: under a shift on all rotary pairs.
    """
    recipe = plan.recipe
    grid = recipe.search or recipe.smoothings[:1]
    best = torch.zeros(statistics.k_shift.shape[0], dtype=torch.int64, device=statistics.k_shift.device)

    def build(of: kv.KVStatistics, k_smooth: torch.Tensor) -> KVParams:
        return KVParams.build(plan.kv, k_smooth, **{p: getattr(of, p) for p in KV_PARAMS if p != "k_smooth"})

    def factors(of: kv.KVStatistics, smoothing: Smoothing) -> torch.Tensor:
        return kv.smoothing_factors(smoothing, of, plan.kv.rope.rotary_dim)

    def best_factors(of: kv.KVStatistics) -> torch.Tensor:
        return torch.stack([factors(of, s) for s in grid])[best, torch.arange(best.numel(), device=best.device)]

    compared = (captured, o_proj, plan.attention.scale, plan.attention.sliding_window, plan.workers)
    if recipe.search:
        best = kv.search([build(statistics, factors(statistics, s)) for s in grid], *compared)
    if recipe.shift_pairs != ALL and plan.kv.key_shift == "rotating":
        sets = kv.shift_sets(statistics, plan.kv)
        kept = [
            kv.keep_shift(statistics, pairs, captured, plan.kv, recipe.first_shift, plan.workers)
            for pairs in (sets[:1] if recipe.shift_pairs == SLOW else sets)
        ]
        statistics = kept[kv.fewest_shifts([build(of, best_factors(of)) for of in kept], *compared)]
    params = {s.name: build(statistics, factors(statistics, s)) for s in recipe.smoothings}
    if recipe.search:
        params[SEARCHED] = build(statistics, best_factors(statistics))
    return statistics, params
