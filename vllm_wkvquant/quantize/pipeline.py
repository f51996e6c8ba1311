"""`wkvquant quantize`: check everything, then one decoder block after another, then the checkpoint.

Runs of the model go through the blocks together: the reference (4-bit weights, 16-bit cache) on all calibration
windows; on the held-out ones, each candidate (the same weights, a simulated 4-bit cache); and, where weights are
learned, the exact one (16-bit weights and cache) on all. Only their hidden states and one block, with the followers
that the recipe asks for, are in memory.
"""

import contextlib
import hashlib
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.func import functional_call

import vllm_wkvquant
from vllm_wkvquant.checkpoint import KV_PARAMS, kv_tensor_name, quantization_config
from vllm_wkvquant.config import ConfigError, KVCacheConfig
from vllm_wkvquant.quantize import kv
from vllm_wkvquant.quantize.adapters import ModelAdapter, describe
from vllm_wkvquant.quantize.attention import ATTENTION, QKV, CalibrationAttention
from vllm_wkvquant.quantize.calibration import SKIPPED, Windows, read_windows
from vllm_wkvquant.quantize.files import WriteError
from vllm_wkvquant.quantize.fold import fold_value
from vllm_wkvquant.quantize.learn import LearnedBlock, LearnedCache, LearnedWeight, learn
from vllm_wkvquant.quantize.recipes import LEARNED, SEARCHED, Recipe, Smoothing, find_recipe
from vllm_wkvquant.quantize.state import RunState, check_output, partial_directory
from vllm_wkvquant.quantize.weights import round_to_nearest
from vllm_wkvquant.quantize.writer import CheckpointWriter
from vllm_wkvquant.reference import KVParams, fake_quantize

LOGIT_ROWS = 512  # rows of logits held at once: 512 x 152k vocabulary x fp32 is 0.3 GB
REFERENCE = "reference"
EXACT = "exact"
FIRST = "first"
DEFAULT_SEQ_LEN = 2048

Progress = Callable[[int, int, str], None]  # (blocks done, blocks in all, what the last one came to)


@dataclass(frozen=True)
class Settings:
    """Arguments of `wkvquant quantize`. seq_len None: 2048, or fewer where the model has fewer positions."""

    model: Path
    out: Path
    calib_text: Path
    recipe: str = "rtn"
    samples: int = 32
    seq_len: int | None = None
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    shard_size: int = 5 * 10**9
    resume: bool = False


@dataclass(frozen=True)
class Plan:
    """A run that has passed every check."""

    settings: Settings
    recipe: Recipe
    adapter: ModelAdapter
    attention: CalibrationAttention
    windows: Windows
    kv: KVCacheConfig


def preflight(settings: Settings) -> Plan:
    """Everything that can be refused before long work. Raises ConfigError."""
    recipe = find_recipe(settings.recipe)
    check_output(settings.out, settings.resume)
    if settings.device.partition(":")[0] not in ("cpu", "cuda"):
        raise ConfigError(f"--device {settings.device} is neither cpu nor cuda")
    if settings.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here; use --device cpu")
    attention = CalibrationAttention()
    adapter = ModelAdapter(settings.model, ATTENTION)
    limit = int(adapter.config.max_position_embeddings)
    seq_len = min(DEFAULT_SEQ_LEN, limit) if settings.seq_len is None else settings.seq_len
    if not 2 * SKIPPED <= seq_len <= limit:
        raise ConfigError(
            f"--seq-len {seq_len} is outside {2 * SKIPPED} .. {limit}, the positions that the model knows"
        )
    if settings.samples < 4:
        raise ConfigError(f"--samples {settings.samples} is too few: at least 4, of which 2 are held out")
    windows = read_windows(settings.model, settings.calib_text, settings.samples, seq_len, settings.seed)
    kv_config = KVCacheConfig(
        head_size=adapter.head_size,
        num_kv_heads=adapter.num_kv_heads,
        num_hidden_layers=adapter.num_layers,
        key_shift=recipe.key_shift,
        key_hadamard=recipe.key_hadamard,
        value_hadamard=recipe.value_hadamard,
        rope=adapter.rope,
    )
    plan = Plan(settings, recipe, adapter, attention, windows, kv_config)
    check_disk(plan)
    return plan


def check_disk(plan: Plan) -> None:
    """Raise ConfigError unless the file system has room for the checkpoint and the state of the run."""
    adapter, windows = plan.adapter, plan.windows
    block = adapter.numel(adapter.block_names(0)) * adapter.num_layers
    # 4-bit codes with a 16-bit scale and a zero point per group of at least 32, held twice: as state and as shards
    checkpoint = 2 * int(block * (0.5 + 2.5 / min(adapter.group_sizes.values()))) + 2 * adapter.numel(
        adapter.outer_names()
    )
    runs = windows.tokens.shape[0] * (2 if plan.recipe.learning else 1)
    runs += windows.held_out * len(plan.recipe.candidates)
    hidden = 2 * 4 * runs * windows.tokens.shape[1] * adapter.config.hidden_size
    existing = next(p for p in (plan.settings.out.absolute(), *plan.settings.out.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(existing).free
    if free < checkpoint + hidden:
        raise ConfigError(
            f"{existing} has {free / 1e9:.2g} GB free, this run needs about {(checkpoint + hidden) / 1e9:.2g} GB; "
            f"free some space, choose another output directory, or lower --samples or --seq-len"
        )


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def fingerprint(plan: Plan) -> dict[str, Any]:
    """What the bytes of the result depend on; a resumed run must agree with the interrupted one in all of it."""
    settings, model = plan.settings, plan.settings.model
    files = sorted({*plan.adapter.tensors.files.values()})
    stats = [(f, (model / f).stat().st_size, (model / f).stat().st_mtime_ns) for f in files]
    return {
        "version": vllm_wkvquant.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "recipe": settings.recipe,
        "samples": settings.samples,
        "seq_len": plan.windows.tokens.shape[1],
        "seed": settings.seed,
        "device": settings.device,
        "dtype": settings.dtype,
        "config.json": _digest(model / "config.json"),
        "calibration tokens": hashlib.sha256(plan.windows.tokens.numpy().tobytes()).hexdigest()[:16],
        "weight files": hashlib.sha256(repr(stats).encode()).hexdigest()[:16],
    }


@torch.no_grad()
def quantize(settings: Settings, progress: Progress = lambda done, total, note: None) -> dict[str, Any]:
    """Quantize a model; returns the report. Raises ConfigError on bad input and where the disk is full."""
    plan = preflight(settings)
    layers = plan.adapter.num_layers
    try:
        state = RunState(settings.out, fingerprint(plan))
        hidden = state.hidden() if state.blocks_done else first_hidden(plan)
        progress(state.blocks_done, layers, "")
        for layer in range(state.blocks_done, layers):
            tensors, report, hidden = quantize_block(plan, layer, hidden)
            state.commit(tensors, report, hidden)
            losses = report.get("loss")
            progress(layer + 1, layers, f"loss {losses[0]:.3g} -> {losses[-1]:.3g}" if losses else "")
        return finish(plan, state, hidden)
    except WriteError as error:
        raise ConfigError(
            f"{error}; {partial_directory(settings.out)} keeps the finished blocks: free some space, then run again "
            f"with --resume"
        ) from error


def first_hidden(plan: Plan) -> dict[str, torch.Tensor]:
    """Embeddings: the reference's, and the exact run's if there is one, on all windows [N, T, hidden], the reference's
    on tokens at position 0 [B, 1, hidden], and each candidate's on the held-out windows."""
    embedding = plan.adapter.load_embedding().to(plan.adapter.dtype)
    dtype = getattr(torch, plan.settings.dtype)
    hidden = torch.nn.functional.embedding(plan.windows.tokens, embedding).to(dtype)
    held_out = hidden[plan.windows.statistics :]
    first = torch.nn.functional.embedding(plan.windows.first_tokens()[:, None], embedding).to(dtype)
    runs = {REFERENCE: hidden, FIRST: first} | {name: held_out.clone() for name in plan.recipe.candidates}
    return runs | ({EXACT: hidden.clone()} if plan.recipe.learning else {})


class BlockRunner:
    """Runs one decoder block over windows that live on the CPU."""

    def __init__(self, plan: Plan, block: torch.nn.Module, seq_len: int) -> None:
        self.attention, self.block = plan.attention, block
        self.device = plan.settings.device
        position = torch.arange(seq_len, device=self.device)[None]
        dtype = getattr(torch, plan.settings.dtype)
        rotary = plan.adapter.rotary.to(self.device)
        self.rope = rotary(torch.empty(0, dtype=dtype, device=self.device), position)

    def __call__(
        self, window: torch.Tensor, params: KVParams | None = None, captured: list[QKV] | None = None
    ) -> torch.Tensor:
        """[T, hidden] -> [T, hidden], both on the CPU. params: simulate the cache; captured: keep q, k, v there."""
        self.attention.cache = None if params is None else partial(fake_quantize, params=params)
        self.attention.captured = captured
        return self.run(self.block, {}, window).cpu()

    def run(self, block: torch.nn.Module, weights: dict[str, torch.Tensor], window: torch.Tensor) -> torch.Tensor:
        """A block with some of its parameters replaced, by name: [T, hidden] -> [T, hidden] on the device."""
        x = window.to(self.device)[None]
        return functional_call(block, weights, (x,), {"attention_mask": None, "position_embeddings": self.rope})[0]

    def first(self, tokens: torch.Tensor) -> tuple[torch.Tensor, QKV]:
        """Tokens that are sequences of their own: [B, 1, hidden] -> [B, 1, hidden] on the CPU, and their q, k, v."""
        self.attention.cache, self.attention.captured = None, []
        cosine, sine = self.rope
        rope = cosine[:, :1], sine[:, :1]
        after = self.block(tokens.to(self.device), attention_mask=None, position_embeddings=rope).cpu()
        return after, self.attention.captured[0]


def quantize_block(
    plan: Plan, layer: int, hidden: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, torch.Tensor]]:
    """One block: its tensors for the checkpoint (each candidate's k_smooth), its report, the hidden states after it."""
    adapter, recipe, windows = plan.adapter, plan.recipe, plan.windows
    block = adapter.load_block(layer, getattr(torch, plan.settings.dtype), plan.settings.device)
    runner = BlockRunner(plan, block, windows.tokens.shape[1])
    reference = hidden[REFERENCE]

    exact = torch.stack([runner(w) for w in hidden[EXACT]]) if recipe.learning else None

    v_proj, o_proj = (block.get_submodule(n) for n in (adapter.family.v_proj, adapter.family.o_proj))
    norm = block.get_submodule(adapter.family.attention_norm)
    v_smooth = torch.ones(adapter.num_kv_heads, adapter.head_size, device=plan.settings.device)
    if recipe.value_balance:
        v_smooth = balance_value(plan, norm, v_proj, o_proj, reference[: windows.statistics])
    fold_value(v_proj, o_proj, v_smooth, recipe.value_hadamard)  # type: ignore[arg-type]

    learned = learn_block(plan, layer, runner, reference, exact) if exact is not None else None
    tensors, weight_error = quantize_weights(adapter, layer, block, learned)

    captured: list[QKV] = []
    after = torch.empty_like(reference)
    for i, window in enumerate(reference):
        after[i] = runner(window, captured=captured if i < windows.statistics else None)
    first, firsts = runner.first(hidden[FIRST])
    statistics = kv.collect(captured, firsts, plan.kv, recipe.first_shift)
    if learned and learned.cache:
        statistics = replace(statistics, **learned.cache.shifts())
        params = {LEARNED: learned.cache.params()}
    else:
        params = layer_params(plan, statistics, captured, o_proj.weight)  # type: ignore[arg-type]
    out = {REFERENCE: after, FIRST: first} | ({EXACT: exact} if exact is not None else {})
    errors = {}
    target = after[windows.statistics :]
    for name, candidate in params.items():
        out[name] = torch.stack([runner(window, params=candidate) for window in hidden[name]])
        errors[name] = relative_error(out[name][:, SKIPPED:], target[:, SKIPPED:])
        tensors[f"{name}.k_smooth"] = candidate.k_smooth.cpu()
    tensors |= {p: getattr(statistics, p).cpu() for p in KV_PARAMS if p != "k_smooth"}
    report: dict[str, Any] = {
        "weight_error": weight_error,
        "hidden_error": errors,
        "k_shift_max": statistics.k_shift.abs().max().item(),
        "k_deviation_max": statistics.k_deviation.max().item(),
    }
    if learned:
        report["loss"] = learned.losses
    return tensors, report, out


def learn_block(
    plan: Plan, layer: int, runner: BlockRunner, reference: torch.Tensor, exact: torch.Tensor
) -> LearnedBlock:
    """What the recipe learns of a block, learned.

    reference: the block's input; exact: the 16-bit model's output after it; both [N, T, hidden].
    """
    adapter, recipe, family = plan.adapter, plan.recipe, plan.adapter.family
    learning, block, train = recipe.learning, runner.block, plan.windows.statistics
    assert learning is not None
    captured: list[QKV] = []
    with input_squares(block, family.linears if learning.clip == "searched" else ()) as squares:
        for window in reference[:train]:
            runner(window, captured=captured if learning.cache else None)
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
    cache = None
    if learning.cache:
        _, k, v = captured[0]
        statistics = kv.collect(captured, (k[:1], k[:1], v[:1]), plan.kv, first_shift=False)
        smooth = kv.smoothing_factors(recipe.smoothings[0], statistics, plan.kv.rope.rotary_dim)
        cache = LearnedCache(KVParams.build(plan.kv, smooth, statistics.k_shift, statistics.v_shift))
    learned = LearnedBlock(weights, cache, block, family.v_proj, family.o_proj)

    dtype, device = getattr(torch, plan.settings.dtype), plan.settings.device
    last = min(layer + learning.followers, adapter.num_layers - 1)
    followers = [adapter.load_block(i, dtype, device) for i in range(layer + 1, last + 1)]
    targets = [exact[:train]]
    for follower in followers:
        targets.append(torch.stack([runner.run(follower, {}, w).cpu() for w in targets[-1]]))

    def forward(weights: dict[str, torch.Tensor], window: torch.Tensor) -> list[torch.Tensor]:
        plan.attention.cache = cache.fake if cache else None
        out = [runner.run(block, weights, window)]
        plan.attention.cache = None
        for follower in followers:
            out.append(runner.run(follower, {}, out[-1]))
        return out

    plan.attention.captured = None
    learned.losses = learn(learning, learned, forward, reference[:train], targets, plan.settings.seed + layer)
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
    """s_v fp32 [H, D]: (rms of V / norm of o_proj's columns) ** value_balance, normalized per head.

    Dividing by s_v spreads the range evenly; the error of channel c then reaches the output times s_v[c] |column c|.
    """
    heads, size = plan.adapter.num_kv_heads, plan.adapter.head_size
    squares = torch.zeros(heads, size, device=plan.settings.device)
    for window in windows:
        value = v_proj(norm(window.to(plan.settings.device)))[SKIPPED:].float().view(-1, heads, size)
        squares += (value - value.mean(0)).square().mean(0)
    columns = o_proj.weight.float().square().sum(0).view(heads, -1, size).sum(1)  # type: ignore[operator]
    ratio = (squares / windows.shape[0] / columns.clamp_min(1e-12)).sqrt()
    return kv.normalize(ratio**plan.recipe.value_balance)


def quantize_weights(
    adapter: ModelAdapter, layer: int, block: torch.nn.Module, learned: LearnedBlock | None
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Round a block's linear layers in place, to nearest or as learned; returns all its tensors by checkpoint name, and
    each layer's error."""
    prefix = adapter.block_prefix(layer)
    codes = {}
    if learned:
        learned.fold()
        codes = learned.quantize()
    tensors, errors = {}, {}
    quantized_names = {f"{name}.weight" for name in adapter.family.linears}
    for name, parameter in block.named_parameters():
        if name not in quantized_names:  # norms and biases: run what is stored
            tensors[prefix + name] = parameter.to(adapter.dtype).cpu()
            parameter.data = parameter.to(adapter.dtype).to(parameter.dtype)
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
) -> dict[str, KVParams]:
    """Each candidate's parameters of one layer, by its name."""

    def build(k_smooth: torch.Tensor) -> KVParams:
        return KVParams.build(plan.kv, k_smooth, **{p: getattr(statistics, p) for p in KV_PARAMS if p != "k_smooth"})

    def factors(smoothing: Smoothing) -> torch.Tensor:
        return kv.smoothing_factors(smoothing, statistics, plan.kv.rope.rotary_dim)

    params = {s.name: build(factors(s)) for s in plan.recipe.smoothings}
    if plan.recipe.search:
        grid = torch.stack([factors(s) for s in plan.recipe.search])
        best = kv.search(
            [build(s) for s in grid], captured, o_proj, plan.attention.scale, plan.attention.sliding_window
        )
        params[SEARCHED] = build(grid[best, torch.arange(best.numel(), device=grid.device)])
    return params


def divergence(plan: Plan, exact: torch.Tensor, runs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """KL(exact || run) of the next token in nats, fp64 [tokens], by run; all are hidden states [N, T, hidden]."""
    device = plan.settings.device
    head = plan.adapter.load_head(getattr(torch, plan.settings.dtype), device)
    parts: dict[str, list[torch.Tensor]] = {n: [] for n in runs}
    for i in range(0, exact.shape[0] * exact.shape[1], LOGIT_ROWS):
        rows = slice(i, i + LOGIT_ROWS)
        p = head(exact.flatten(0, 1)[rows].to(device)).float().log_softmax(-1)
        for name, run in runs.items():
            q = head(run.flatten(0, 1)[rows].to(device)).float().log_softmax(-1)
            parts[name].append((p.exp() * (p - q)).sum(-1).double().cpu())
    return {name: torch.cat(p) for name, p in parts.items()}


def finish(plan: Plan, state: RunState, hidden: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Choose the candidate, write the checkpoint, clean up."""
    adapter, settings, statistics = plan.adapter, plan.settings, plan.windows.statistics
    reference = hidden[REFERENCE][statistics:]
    kl = divergence(plan, reference, {name: hidden[name] for name in plan.recipe.candidates})
    chosen = min(kl, key=lambda name: kl[name].mean().item())

    def se(x: torch.Tensor) -> float:
        return x.std().item() / math.sqrt(x.numel())

    candidates = {
        name: {"kl": x.mean().item(), "kl_se": se(x), "above_chosen_se": se(x - kl[chosen])} for name, x in kl.items()
    }
    weights = None
    if plan.recipe.learning:
        (x,) = divergence(plan, hidden[EXACT][statistics:], {REFERENCE: reference}).values()
        weights = {"kl": x.mean().item(), "kl_se": se(x)}
    layers = []
    writer = CheckpointWriter(state.directory / "checkpoint", settings.out, settings.shard_size)
    writer.add({n: t.to(adapter.dtype) for n, t in adapter.tensors.get(adapter.outer_names()).items()})
    for layer in range(adapter.num_layers):
        tensors = state.block(layer)
        smooth = {name: tensors.pop(f"{name}.k_smooth") for name in kl}
        tensors["k_smooth"] = smooth[chosen]
        named = {kv_tensor_name(layer, p): tensors.pop(p) for p in KV_PARAMS}
        writer.add(dict(sorted({**tensors, **named}.items())))
        block = state.report(layer)
        layers.append({**block, "hidden_error": block["hidden_error"][chosen]})
    report = {
        "version": vllm_wkvquant.__version__,
        "recipe": asdict(plan.recipe),
        "settings": {
            "samples": settings.samples,
            "held_out": plan.windows.held_out,
            "seq_len": plan.windows.tokens.shape[1],
            "seed": settings.seed,
            "device": settings.device,
            "dtype": settings.dtype,
        },
        "model": describe(adapter),
        "smoothing": chosen,
        "candidates": candidates,
        "weights": weights,
        "layers": layers,
    }
    config = adapter.output_config(quantization_config(plan.kv, adapter.group_sizes))
    writer.close(settings.model, config, report)
    state.close()
    return report
