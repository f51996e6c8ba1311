"""Learning steps and codes of all groups together, end to end, once every block has its own.

Blocks are learned one after the other, each against the 16-bit model's hidden states; what those errors come to at the
logits none of them sees. Here the whole model does: zero points stay, and the steps of the groups, the norms, the
biases, the codes and the cache's parameters move so that its predictions come closer to the 16-bit model's, under the
4-bit cache that it will be served with. Nothing is added to the checkpoint: the same tensors have other values.

Steps, norms and biases as in the second phase of EfficientQAT (Chen et al., arXiv 2407.11062), with the 16-bit model's
predictions in place of the text's next token, and with the cache. A code begins in the middle of its interval and
becomes its neighbour once the signs of its gradients have taken it half a step; their size is such that chance alone
hardly does.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from vllm_wkvquant.checkpoint import KV_PARAMS, pack_weight, unpack_codes
from vllm_wkvquant.quantize.blocks import cache_tensors
from vllm_wkvquant.quantize.calibration import SKIPPED
from vllm_wkvquant.quantize.head import LOGIT_ROWS
from vllm_wkvquant.quantize.learn import (
    Entry,
    Replayed,
    SignDescent,
    batches,
    fake_quantize_cache,
    gradient_scale,
    replays,
    together,
)
from vllm_wkvquant.quantize.plan import Plan
from vllm_wkvquant.quantize.recipes import Tuning
from vllm_wkvquant.quantize.runner import BlockRunner
from vllm_wkvquant.quantize.storage import take
from vllm_wkvquant.quantize.weights import WEIGHT_QMAX
from vllm_wkvquant.reference import KVParams, key_shift_at, value_shift_at

SCALE = "weight_scale"
PACKED = ("weight_packed", SCALE, "weight_zero_point", "weight_shape")

Note = Callable[[int, float], None]  # (epochs done, KL divergence on held-out windows after them)


class Rounded(torch.autograd.Function):
    """x fp32 as `dtype` has it, with the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


class StepTimesCode(torch.autograd.Function):
    """step fp32 [out, groups] times code int8 [out, groups, group], less its zero point, -> weight `dtype` [out, in];
    gradients to step and to offset [out, groups, group] or None, straight through the rounding that codes have had: to
    offset that of the weight, which has the same sign."""

    @staticmethod
    def forward(
        ctx: Any, step: torch.Tensor, offset: torch.Tensor | None, codes: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.save_for_backward(codes)
        ctx.step, ctx.offset = step.dtype, None if offset is None else offset.dtype
        return (codes * step[..., None]).to(dtype).flatten(1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (codes,) = ctx.saved_tensors
        of_weight = grads[0].view(codes.shape)
        of_offset = None if ctx.offset is None else of_weight.to(ctx.offset)
        return (of_weight.to(ctx.step) * codes).sum(-1), of_offset, None, None


class Codes:
    """A linear layer's codes while they are learned.

    steps: code - zero point, int8 [out, groups, group]; zero: int8 [out, groups]; offset: how far each weight is from
    its code, -0.5..0.5 [out, groups, group], where codes are learned.
    """

    def __init__(self, packed: dict[str, torch.Tensor], device: str, offset_dtype: torch.dtype | None) -> None:
        """packed: of the checkpoint, by suffix."""
        codes, zero = (x.to(device) for x in unpack_codes(packed))
        self.steps, self.zero, self.offset = codes - zero[..., None], zero, None
        if offset_dtype is not None:
            self.offset = torch.zeros(codes.shape, dtype=offset_dtype, device=device).requires_grad_()

    def move(self) -> None:
        """Take weights that have left their code's interval to the next code, or back to the edge of the last."""
        assert self.offset is not None
        offset, zero = self.offset.data, self.zero[..., None]
        moved = self.steps + offset.round().clamp_(-WEIGHT_QMAX, WEIGHT_QMAX).to(torch.int8)
        codes = torch.minimum(torch.maximum(moved, -zero), WEIGHT_QMAX - zero)
        offset.sub_(codes - self.steps).clamp_(-0.5, 0.5)
        self.steps.copy_(codes)

    def pack(self, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        """compressed-tensors' tensors by suffix, with these scales [out, groups]."""
        codes = (self.steps + self.zero[..., None]).flatten(1)
        return pack_weight(codes.cpu(), scale, self.zero.cpu())


class TunedCache:
    """A layer's cache parameters, of which the smoothing of keys and both shifts are learned where `rate` is not 0.

    A rotary pair without a shift remains without.
    """

    def __init__(self, start: KVParams, key_maxima: torch.Tensor, rate: float) -> None:
        """key_maxima: fp32 [H, D], of what the cache rounds of keys."""
        self.start = start
        shifted = start.k_shift != 0
        self.k_unit = start.k_smooth * key_maxima.mean(-1, keepdim=True) * shifted
        self.v_unit = start.v_shift.square().mean(-1, keepdim=True).sqrt()
        self.learned = [torch.zeros_like(start.k_shift).requires_grad_() for _ in range(3)] if rate else []

    def params(self) -> KVParams:
        """The parameters as the cache will have them."""
        if not self.learned:
            return self.start
        log, of_keys, of_values = self.learned
        return replace(
            self.start,
            k_smooth=self.start.k_smooth * log.exp(),
            k_shift=self.start.k_shift + of_keys * self.k_unit,
            v_shift=self.start.v_shift + of_values * self.v_unit,
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """All parameters by their names in the checkpoint, on the CPU."""
        params, first = self.params(), torch.zeros(1, dtype=torch.long, device=self.start.k_shift.device)
        found = {p: getattr(params, p) for p in KV_PARAMS}
        found |= {"k_first": key_shift_at(first, params)[0], "v_first": value_shift_at(first, params)[0]}
        return {p: x.detach().cpu().clone() for p, x in found.items()}  # a file has each tensor once


class TunedBlock:
    """What is learned of one block.

    All but codes is flat, so that a small model on a GPU does not wait for Python: log, of what the steps of all its
    linear layers' groups are multiplied by; moved, what is added to all its norms and biases, in units of each one's
    root mean square.
    """

    def __init__(self, plan: Plan, layer: int, tensors: dict[str, torch.Tensor], chosen: str) -> None:
        """tensors: of the block, as `quantize_block` gives them; chosen: the candidate whose cache it has."""
        adapter, device = plan.adapter, plan.settings.device
        self.prefix, self.dtype = adapter.block_prefix(layer), adapter.dtype
        self.compute = getattr(torch, plan.settings.dtype)
        self.positions = torch.arange(plan.windows.tokens.shape[1], device=device)
        assert plan.recipe.tuning
        parameters = cache_tensors(tensors, chosen)
        if not plan.recipe.first_shift:  # what position 0 has follows the others
            del parameters["k_first"], parameters["v_first"]
        params = KVParams.build(plan.kv, **parameters).to(device)
        self.cache = TunedCache(params, tensors[f"{chosen}.k_channels"].to(device), plan.recipe.tuning.cache_rate)
        # of parameters that stay, once
        self.fixed = None if self.cache.learned else fake_quantize_cache(params, self.positions)
        self.attention, self.module = plan.attention, adapter.empty_block(layer)
        self.runner = BlockRunner(plan, self.module, self.positions.numel())
        learned = self.compute if plan.recipe.tuning.code_sigmas else None
        self.codes: dict[str, Codes] = {}
        steps, others, units = [], [], []
        for name in adapter.family.linears:
            packed = {suffix: tensors[f"{self.prefix}{name}.{suffix}"] for suffix in PACKED}
            self.codes[name] = Codes(packed, device, learned)
            steps.append(packed[SCALE].float().flatten())
        quantized = {f"{name}.weight" for name in self.codes}
        names = sorted(n.removeprefix(self.prefix) for n in adapter.block_names(layer))
        self.shapes = {n: tensors[self.prefix + n].shape for n in names if n not in quantized}  # of norms and biases
        for name in self.shapes:
            stored = tensors[self.prefix + name].float().flatten()
            others.append(stored)
            units.append(stored.square().mean().sqrt().expand(stored.shape))
        self.steps, self.others, self.units = (torch.cat(parts).to(device) for parts in (steps, others, units))
        self.log, self.moved = (torch.zeros_like(x).requires_grad_() for x in (self.steps, self.others))

    def _tuned(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """fp32, rounded as they are stored: steps [out, groups] by linear layer, norms and biases by name."""
        steps = Rounded.apply(self.steps * self.log.exp(), self.dtype)
        others = Rounded.apply(self.others + self.moved * self.units, self.dtype)
        groups = [codes.zero.shape for codes in self.codes.values()]
        of_linear = zip(self.codes, groups, steps.split([g.numel() for g in groups]), strict=True)
        of_other = zip(self.shapes.items(), others.split([x.numel() for x in self.shapes.values()]), strict=True)
        return {n: x.view(g) for n, g, x in of_linear}, {n: x.view(shape) for (n, shape), x in of_other}

    def __call__(self, x: torch.Tensor, cache: bool) -> torch.Tensor:
        """Windows' hidden states [B, T, hidden] past the block, with the 4-bit cache or a 16-bit one."""
        steps, others = self._tuned()
        weights = {}
        for name, step in steps.items():
            codes = self.codes[name]
            weights[f"{name}.weight"] = StepTimesCode.apply(step, codes.offset, codes.steps, self.compute)
        weights |= {name: other.to(self.compute) for name, other in others.items()}
        self.attention.cache, self.attention.past_only = None, True
        if cache:
            self.attention.cache = self.fixed or fake_quantize_cache(self.cache.params(), self.positions)
        return self.runner.run(self.module, weights, x)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The block's tensors of the checkpoint, by name, in its types on the CPU."""
        steps, others = self._tuned()
        named = {name: x.detach().to(self.dtype).cpu() for name, x in others.items()}
        for name, step in steps.items():
            packed = self.codes[name].pack(step.detach().to(self.dtype).cpu())
            named |= {f"{name}.{suffix}": x for suffix, x in packed.items()}
        return {self.prefix + name: x for name, x in named.items()}


@dataclass(frozen=True)
class Tuned:
    """blocks: on the device, since a GPU's host may have no room for all of them at once. kl: divergence from the
    16-bit model on held-out windows, before and after each epoch, in nats a token; kept: after which of them the others
    are. runs: hidden states of this worker's held-out windows after the last block, [N, T, hidden], with a 16-bit and
    with the 4-bit cache."""

    blocks: list[TunedBlock]
    kl: list[float]
    kept: int
    runs: tuple[torch.Tensor, torch.Tensor]


def code_reach(tuning: Tuning, steps: int) -> float:
    """How far signs that all agree take a weight, in steps of its group, so that signs of which each is as likely have
    half a step as `code_sigmas` standard deviations: `SignDescent`'s sizes fall linearly, and their squares add up to
    (2 reach)^2 / (3 steps)."""
    return math.sqrt(3 * steps) / (4 * tuning.code_sigmas) if tuning.code_sigmas else 0.0


def adam(groups: list[tuple[list[torch.Tensor], float]], device: str) -> torch.optim.Adam:
    """Of groups with these rates, whose steps on a GPU may be replayed."""
    gpu = device != "cpu"
    of_group = [
        {"params": group, "lr": torch.tensor(rate, device=device) if gpu else rate, "first": rate}
        for group, rate in groups
    ]
    return torch.optim.Adam(of_group, capturable=gpu)


def schedule(optimizer: torch.optim.Adam, left: float) -> None:
    """Make rates this share of what they were first."""
    for group in optimizer.param_groups:
        rate = left * group["first"]
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def tune(
    plan: Plan,
    blocks: Iterable[dict[str, torch.Tensor]],
    chosen: str,
    exact: torch.Tensor,
    note: Note = lambda done, kl: None,
) -> Tuned:
    """Tune the model; it becomes what it is after the epoch with the least divergence on held-out windows.

    blocks: each one's tensors, and chosen, as `TunedBlock` takes them; exact: the 16-bit model's hidden states
    after the last block, of this worker's windows, [N, T, hidden].
    """
    tuning, workers = plan.recipe.tuning, plan.workers
    assert tuning is not None
    model = TunedModel(plan, [TunedBlock(plan, i, block, chosen) for i, block in enumerate(blocks)], exact)
    of_weights = [p for block in model.blocks for p in (block.log, block.moved)]
    of_caches = [p for block in model.blocks for p in block.cache.learned]
    parameters = of_weights + of_caches
    codes = [c for block in model.blocks for c in block.codes.values() if c.offset is not None]
    offsets = [c.offset for c in codes if c.offset is not None]
    windows = workers.total(plan.windows.statistics)
    an_epoch = -(-windows // tuning.batch)
    steps = tuning.epochs * an_epoch
    rates = [(of_weights, tuning.rate), (of_caches, tuning.cache_rate)]
    optimizer = adam([(group, rate) for group, rate in rates if group], model.device)
    of_codes = SignDescent(offsets, [code_reach(tuning, steps)] * len(offsets), steps)
    state = [p.data for p in parameters] + [c.steps for c in codes]
    best, kept = [x.clone() for x in state], 0
    kl = [model.held_out(tuning.cache)]
    note(0, kl[0])

    def step(entries: list[Entry]) -> list[torch.Tensor]:
        batch = workers.total(sum(x.shape[0] for x, _ in entries))
        # times the number of tokens, gradients to logits are differences of probabilities, and those to weights up to
        # 2e3 (SmolLM2-135M)
        scale = gradient_scale(model.compute, batch * plan.windows.tokens.shape[1])
        for parameter in [*parameters, *offsets]:
            parameter.grad = None
        for x, (expected,) in entries:
            model.backward(x, expected, tuning.cache, batch, scale)
        for parameter in [*parameters, *offsets]:
            if parameter.grad is None:  # no window of this batch is this worker's, or the cache is a 16-bit one
                parameter.grad = torch.zeros_like(parameter)
            workers.sum(parameter.grad)
        if scale != 1:
            for parameter in parameters:  # fp32; of offsets only the signs count
                parameter.grad.div_(scale)  # type: ignore[union-attr]
        optimizer.step()
        of_codes.step([x.grad for x in offsets])  # type: ignore[misc]
        for c in codes:
            c.move()
        return []

    weights = sum(c.steps.numel() for c in model.blocks[0].codes.values())
    take_step = Replayed(step) if replays(weights, model.device, workers) else step
    for done, batch in enumerate(batches(windows, tuning, plan.settings.seed), 1):
        schedule(optimizer, 1 - (done - 1) / steps)
        of_codes.schedule(done - 1)
        take_step([model.entry(part) for part in model.parts(workers.positions(batch))])
        if done % an_epoch == 0:
            kl.append(model.held_out(tuning.cache))
            note(done // an_epoch, kl[-1])
            if kl[-1] < kl[kept]:
                kept = len(kl) - 1
                for value, x in zip(best, state, strict=True):
                    value.copy_(x)
    for value, x in zip(best, state, strict=True):
        x.copy_(value)
    workers.agree(state)
    for c in codes:
        c.offset = None  # not kept with the blocks
    runs = model.run_held_out(cache=False), model.run_held_out(cache=True)
    return Tuned(model.blocks, kl, kept, runs)


class TunedModel:
    """All blocks between the embedding and the head; exact: of `tune`."""

    def __init__(self, plan: Plan, blocks: list[TunedBlock], exact: torch.Tensor) -> None:
        self.plan, self.blocks, self.exact = plan, blocks, exact
        self.device, self.compute = plan.settings.device, getattr(torch, plan.settings.dtype)
        self.embedding = plan.adapter.load_embedding().to(plan.adapter.dtype)
        self.head = plan.adapter.load_head(self.compute, self.device)

    def parts(self, windows: Sequence[int]) -> list[Sequence[int]]:
        """The windows as many at a time as go through the model together."""
        assert self.plan.recipe.tuning
        size = together(self.plan.recipe.tuning, self.device)
        return [windows[i : i + size] for i in range(0, len(windows), size)]

    def held_out_windows(self) -> list[Sequence[int]]:
        """This worker's, by parts."""
        return self.parts(range(self.plan.windows.statistics, self.exact.shape[0]))

    def entry(self, windows: Sequence[int]) -> Entry:
        """This worker's windows before the first block and, in the 16-bit model, after the last, [B, T, hidden]."""
        tokens = self.plan.windows.tokens[list(windows)]
        x = torch.nn.functional.embedding(tokens, self.embedding).to(self.device, self.compute)
        return x, [take(self.exact, list(windows), x.device)]

    def hidden(self, x: torch.Tensor, cache: bool) -> torch.Tensor:
        """Windows past all blocks, [B, T, hidden]; with gradients, each block is computed again."""
        for block in self.blocks:
            if torch.is_grad_enabled():
                x = checkpoint(block, x, cache, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, cache)
        return x

    def divergence(self, hidden: torch.Tensor, exact: torch.Tensor) -> Iterator[torch.Tensor]:
        """Sum over windows of the mean over tokens of KL(16-bit model || this one), of hidden states [B, T, hidden]
        before the head. A part of the sum at a time: all logits would be the peak of memory."""
        exact, found = (x[:, SKIPPED:].flatten(0, 1) for x in (exact, hidden))
        for i in range(0, found.shape[0], LOGIT_ROWS):
            rows = slice(i, i + LOGIT_ROWS)
            expected, logp = (self.head(x[rows]).float().log_softmax(-1) for x in (exact, found))
            yield (expected.exp() * (expected - logp)).sum() / (hidden.shape[1] - SKIPPED)

    def backward(self, x: torch.Tensor, exact: torch.Tensor, cache: bool, batch: int, scale: float) -> None:
        """Add the part of windows x to the gradients of `scale` times the mean loss of `batch` windows; both as of
        `entry`."""
        with torch.enable_grad():
            hidden = self.hidden(x, cache)
            last = hidden.detach().requires_grad_()
            for part in self.divergence(last, exact):
                (part / batch * scale).backward()
            hidden.backward(last.grad)

    def held_out(self, cache: bool) -> float:
        """Mean divergence of all workers' held-out windows; infinite where it is no number."""
        found = torch.zeros((), dtype=torch.float64, device=self.device)
        for x, (exact,) in map(self.entry, self.held_out_windows()):
            for part in self.divergence(self.hidden(x, cache), exact):
                found += part
        workers = self.plan.workers
        kl = workers.sum(found).item() / workers.total(self.plan.windows.held_out)
        return kl if math.isfinite(kl) else math.inf

    def run_held_out(self, cache: bool) -> torch.Tensor:
        """Hidden states of this worker's held-out windows after the last block, [N, T, hidden] on the CPU."""
        return torch.cat([self.hidden(self.entry(w)[0], cache).cpu() for w in self.held_out_windows()])
