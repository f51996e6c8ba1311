"""Learning the steps of all groups together, end to end, once every block has its codes.

Blocks are learned one after the other, each against the 16-bit model's hidden states; what those errors come to at the
logits none of them sees. Here the whole model does: codes and zero points stay, and the steps of the groups, the norms
and the biases move so that its predictions come closer to the 16-bit model's, under the 4-bit cache that it will be
served with. Nothing is added to the checkpoint: the same tensors have other values.

As the second phase of EfficientQAT (Chen et al., arXiv 2407.11062), with the 16-bit model's predictions in place of the
text's next token, and with the cache.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from vllm_wkvquant.checkpoint import unpack_steps
from vllm_wkvquant.quantize.calibration import SKIPPED
from vllm_wkvquant.quantize.head import LOGIT_ROWS
from vllm_wkvquant.quantize.learn import batches, fake_quantize_cache
from vllm_wkvquant.quantize.plan import Plan
from vllm_wkvquant.quantize.runner import BlockRunner
from vllm_wkvquant.quantize.storage import take
from vllm_wkvquant.reference import KVParams

SCALE = "weight_scale"
PACKED = ("weight_packed", SCALE, "weight_zero_point", "weight_shape")

SCORES = 4 << 30  # bytes of scores that a block may save for its gradients, where windows go through it together

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
    """step fp32 [out, groups] times code int8 [out, groups, group] -> weight `dtype` [out, in]; gradient to step."""

    @staticmethod
    def forward(ctx: Any, step: torch.Tensor, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        ctx.save_for_backward(codes)
        ctx.dtype = step.dtype
        return (codes * step[..., None]).to(dtype).flatten(1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (codes,) = ctx.saved_tensors
        return (grads[0].view(codes.shape).to(ctx.dtype) * codes).sum(-1), None, None


class TunedBlock:
    """One block whose codes stay.

    What is learned is flat, so that a small model on a GPU does not wait for Python: log, of what the steps of all its
    linear layers' groups are multiplied by; moved, what is added to all its norms and biases, in units of each one's
    root mean square.
    """

    def __init__(
        self, plan: Plan, layer: int, tensors: dict[str, torch.Tensor], cache: dict[str, torch.Tensor]
    ) -> None:
        """tensors: of the block, as `blocks.quantize_block` gives them; cache: its KV parameters by name."""
        adapter, device = plan.adapter, plan.settings.device
        self.prefix, self.dtype = adapter.block_prefix(layer), adapter.dtype
        self.compute = getattr(torch, plan.settings.dtype)
        positions = torch.arange(plan.windows.tokens.shape[1], device=device)
        self.cache = fake_quantize_cache(KVParams.build(plan.kv, **cache).to(device), positions)
        self.attention, self.module = plan.attention, adapter.empty_block(layer)
        self.runner = BlockRunner(plan, self.module, positions.numel())
        self.codes: dict[str, torch.Tensor] = {}
        steps, others, units = [], [], []
        for name in adapter.family.linears:
            packed = {suffix: tensors[f"{self.prefix}{name}.{suffix}"] for suffix in PACKED}
            self.codes[name] = unpack_steps(packed).to(device)
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
        groups = [codes.shape[:2] for codes in self.codes.values()]
        of_linear = zip(self.codes, groups, steps.split([g.numel() for g in groups]), strict=True)
        of_other = zip(self.shapes.items(), others.split([x.numel() for x in self.shapes.values()]), strict=True)
        return {n: x.view(g) for n, g, x in of_linear}, {n: x.view(shape) for (n, shape), x in of_other}

    def __call__(self, x: torch.Tensor, cache: bool) -> torch.Tensor:
        """Windows' hidden states [B, T, hidden] past the block, with the 4-bit cache or a 16-bit one."""
        steps, others = self._tuned()
        weights = {
            f"{name}.weight": StepTimesCode.apply(step, self.codes[name], self.compute) for name, step in steps.items()
        }
        weights |= {name: other.to(self.compute) for name, other in others.items()}
        self.attention.cache, self.attention.past_only = self.cache if cache else None, True
        return self.runner.run(self.module, weights, x)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Those of the checkpoint that may be other than before, by name, in its type on the CPU."""
        steps, others = self._tuned()
        named = {f"{name}.{SCALE}": step for name, step in steps.items()} | others
        return {self.prefix + name: x.detach().to(self.dtype).cpu() for name, x in named.items()}


@dataclass(frozen=True)
class Tuned:
    """tensors: of each block, those of the checkpoint that changed. kl: divergence from the 16-bit model on held-out
    windows, before and after each epoch, in nats a token; kept: after which of them `tensors` are. runs: hidden states
    of this worker's held-out windows after the last block, [N, T, hidden], with a 16-bit and with the 4-bit cache."""

    tensors: list[dict[str, torch.Tensor]]
    kl: list[float]
    kept: int
    runs: tuple[torch.Tensor, torch.Tensor]


def score_bytes(plan: Plan) -> int:
    """Scores of a window's attention under the simulated cache that are saved for gradients, with what is around."""
    return 16 * plan.windows.tokens.shape[1] ** 2 * plan.adapter.num_heads


def together(plan: Plan) -> int:
    """Windows that go through the model at once: a GPU is faster with all of a batch."""
    assert plan.recipe.tuning
    return 1 if plan.settings.device == "cpu" else max(1, min(plan.recipe.tuning.batch, SCORES // score_bytes(plan)))


def tune(
    plan: Plan,
    blocks: Iterable[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]],
    exact: torch.Tensor,
    note: Note = lambda done, kl: None,
) -> Tuned:
    """Tune the model; it becomes what it is after the epoch with the least divergence on held-out windows.

    blocks: each one's tensors and KV parameters, as `TunedBlock` takes them; exact: the 16-bit model's hidden states
    after the last block, of this worker's windows, [N, T, hidden].
    """
    tuning, workers = plan.recipe.tuning, plan.workers
    assert tuning is not None
    model = TunedModel(plan, [TunedBlock(plan, i, *block) for i, block in enumerate(blocks)], exact)
    parameters = [p for block in model.blocks for p in (block.log, block.moved)]
    windows = workers.total(plan.windows.statistics)
    an_epoch = -(-windows // tuning.batch)
    optimizer = torch.optim.Adam(parameters, lr=tuning.rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / (tuning.epochs * an_epoch))
    best, kept = [p.detach().clone() for p in parameters], 0
    kl = [model.held_out(tuning.cache)]
    note(0, kl[0])
    for done, batch in enumerate(batches(windows, tuning, plan.settings.seed), 1):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        for part in model.parts(workers.positions(batch)):
            model.backward(part, tuning.cache, len(batch))
        for parameter in parameters:
            workers.sum(parameter.grad)  # type: ignore[arg-type]
        optimizer.step()
        schedule.step()
        if done % an_epoch == 0:
            kl.append(model.held_out(tuning.cache))
            note(done // an_epoch, kl[-1])
            if kl[-1] < kl[kept]:
                best, kept = [p.detach().clone() for p in parameters], len(kl) - 1
    for parameter, value in zip(parameters, best, strict=True):
        parameter.data.copy_(value)
    workers.agree([p.data for p in parameters])
    runs = model.run_held_out(cache=False), model.run_held_out(cache=True)
    return Tuned([block.tensors() for block in model.blocks], kl, kept, runs)


class TunedModel:
    """All blocks between the embedding and the head; exact: of `tune`."""

    def __init__(self, plan: Plan, blocks: list[TunedBlock], exact: torch.Tensor) -> None:
        self.plan, self.blocks, self.exact = plan, blocks, exact
        self.device, self.compute = plan.settings.device, getattr(torch, plan.settings.dtype)
        self.embedding = plan.adapter.load_embedding().to(plan.adapter.dtype)
        self.head = plan.adapter.load_head(self.compute, self.device)

    def parts(self, windows: Sequence[int]) -> list[Sequence[int]]:
        """The windows as many at a time as go through the model together."""
        size = together(self.plan)
        return [windows[i : i + size] for i in range(0, len(windows), size)]

    def held_out_windows(self) -> list[Sequence[int]]:
        """This worker's, by parts."""
        return self.parts(range(self.plan.windows.statistics, self.exact.shape[0]))

    def hidden(self, windows: Sequence[int], cache: bool) -> torch.Tensor:
        """This worker's windows after the last block, [B, T, hidden]; with gradients, each block is computed again."""
        tokens = self.plan.windows.tokens[list(windows)]
        x = torch.nn.functional.embedding(tokens, self.embedding).to(self.device, self.compute)
        for block in self.blocks:
            if torch.is_grad_enabled():
                x = checkpoint(block, x, cache, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, cache)
        return x

    def divergence(self, hidden: torch.Tensor, windows: Sequence[int]) -> Iterator[torch.Tensor]:
        """Sum over windows of the mean over tokens of KL(16-bit model || this one), of hidden states [B, T, hidden]
        before the head. A part of the sum at a time: all logits would be the peak of memory."""
        exact = take(self.exact, list(windows), hidden.device)[:, SKIPPED:].flatten(0, 1)
        found = hidden[:, SKIPPED:].flatten(0, 1)
        for i in range(0, found.shape[0], LOGIT_ROWS):
            rows = slice(i, i + LOGIT_ROWS)
            expected, logp = (self.head(x[rows]).float().log_softmax(-1) for x in (exact, found))
            yield (expected.exp() * (expected - logp)).sum() / (hidden.shape[1] - SKIPPED)

    def backward(self, windows: Sequence[int], cache: bool, batch: int) -> None:
        """Add these windows' part of the gradients of the mean loss of `batch` windows."""
        with torch.enable_grad():
            hidden = self.hidden(windows, cache)
            last = hidden.detach().requires_grad_()
            for part in self.divergence(last, windows):
                (part / batch).backward()
            hidden.backward(last.grad)

    def held_out(self, cache: bool) -> float:
        """Mean divergence of all workers' held-out windows; infinite where it is no number."""
        found = torch.zeros((), dtype=torch.float64, device=self.device)
        for windows in self.held_out_windows():
            for part in self.divergence(self.hidden(windows, cache), windows):
                found += part
        workers = self.plan.workers
        kl = workers.sum(found).item() / workers.total(self.plan.windows.held_out)
        return kl if math.isfinite(kl) else math.inf

    def run_held_out(self, cache: bool) -> torch.Tensor:
        """Hidden states of this worker's held-out windows after the last block, [N, T, hidden] on the CPU."""
        return torch.cat([self.hidden(windows, cache).cpu() for windows in self.held_out_windows()])
