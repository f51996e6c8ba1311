"""Learning one block's rounding, clipping and, in the paper's recipe, cache parameters by gradient descent.

The block is run on what the quantized blocks before it produce, and its output is compared with that of the 16-bit
model, which had its own blocks before: so a block also learns to undo the error that it receives.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from vllm_wkvquant.quantize.calibration import SKIPPED
from vllm_wkvquant.quantize.recipes import Learning, Tuning
from vllm_wkvquant.quantize.storage import take
from vllm_wkvquant.quantize.weights import FakeQuantize, QuantizedWeight, group_range, quantize_weight, search_clip
from vllm_wkvquant.quantize.workers import ALONE, Workers
from vllm_wkvquant.reference import (
    FP16_MAX,
    QMAX,
    KVParams,
    Simulation,
    hadamard_matrix,
    key_shift_at,
    value_shift_at,
)

CLIP_MIN = 0.3  # a group keeps at least this share of its range
SIGMOID_INIT = 4.0  # of the paper's gamma and beta: 98 % of the range
REPLAYED = 1 << 26  # weights of a block whose steps may be a CUDA graph, which keeps a step's memory to itself

# (the block's weights by parameter name, hidden states [B, T, hidden]) -> hidden states after the block, and after each
# of its followers
Forward = Callable[[dict[str, torch.Tensor], torch.Tensor], list[torch.Tensor]]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (output, target) [.., T, hidden] -> [..]
Entry = tuple[torch.Tensor, list[torch.Tensor]]  # one or more windows' (inputs, targets), of each follower


class LearnedWeight:
    """One linear layer's weight fp32 [out, in], with what is learned of its quantization.

    low, high: share of each end of a group's range that is kept, through a sigmoid in the paper's recipe, [out, in /
    group]; offset: what is added to a code before it is rounded, [out, in / group, group], or None.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        group_size: int,
        scale_dtype: torch.dtype,
        learning: Learning,
        importance: torch.Tensor | None,
    ) -> None:
        """importance: fp32 [in], mean square of the layer's input channels, where the clip is searched."""
        self.weight, self.group_size, self.scale_dtype = weight.float(), group_size, scale_dtype
        self.range = group_range(self.weight, group_size)
        self.sigmoid, self.clipping = learning.clip == "sigmoid", learning.clip_rate > 0
        shape = weight.shape[0], weight.shape[1] // group_size
        if learning.clip == "searched":
            assert importance is not None
            clip = search_clip(self.weight, importance, group_size, scale_dtype)
        else:
            clip = torch.full(shape, SIGMOID_INIT if self.sigmoid else 1.0, device=weight.device)
        self.low, self.high = (clip.clone().requires_grad_(self.clipping) for _ in range(2))
        self.offset = None
        if learning.rounding:
            self.offset = torch.zeros(*shape, group_size, device=weight.device).requires_grad_()

    def parameters(self) -> list[torch.Tensor]:
        """What is learned: of the clipping, then of the rounding."""
        return self._of_clipping() + self._of_rounding()

    def rates(self, learning: Learning) -> list[float]:
        """Of each parameter."""
        return [learning.clip_rate] * len(self._of_clipping()) + [learning.rate] * len(self._of_rounding())

    def _of_clipping(self) -> list[torch.Tensor]:
        return [self.low, self.high] * self.clipping

    def _of_rounding(self) -> list[torch.Tensor]:
        return [] if self.offset is None else [self.offset]

    def project(self) -> None:
        """Bring every parameter back to where it may be."""
        for clip in () if self.sigmoid else self._of_clipping():
            clip.clamp_(CLIP_MIN, 1)
        if self.offset is not None:
            self.offset.clamp_(-0.5, 0.5)

    def clips(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Share of each end of a group's range that is kept, [out, in / group] each."""
        return (self.low.sigmoid(), self.high.sigmoid()) if self.sigmoid else (self.low, self.high)

    def _range(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = self.range if weight is self.weight else group_range(weight, self.group_size)
        keep_low, keep_high = self.clips()
        return keep_low * low, keep_high * high

    def fake(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        """The weight as its codes will give it, with straight-through gradients. weight: in place of its own."""
        weight = self.weight if weight is None else weight
        return FakeQuantize.apply(weight, *self._range(weight), self.offset, self.scale_dtype)

    def quantize(self, weight: torch.Tensor | None = None) -> QuantizedWeight:
        """The codes of `fake`."""
        weight = self.weight if weight is None else weight
        return quantize_weight(weight, *self._range(weight), self.scale_dtype, self.offset)


def straight_through(rounded: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`rounded` with the gradient of `x`."""
    return x + (rounded - x).detach()


def fake_quantize_tokens(x: torch.Tensor) -> torch.Tensor:
    """`reference.quantize_tokens` and back, with straight-through gradients; the range's ends get theirs, too."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    minimum = low.clamp(-FP16_MAX, FP16_MAX)
    minimum = straight_through(minimum.half().float(), minimum)
    scale = ((high - low) / QMAX).clamp_max(FP16_MAX)
    scale = straight_through(scale.half().float(), scale)
    codes = (x - minimum) * (1 / scale.masked_fill(scale <= 0, math.inf))  # 0, without a gradient, where all are equal
    codes = straight_through(codes.round(), codes).clamp(0, QMAX)
    return codes * scale + minimum


@functools.cache
def rotation(head_size: int, device: torch.device) -> torch.Tensor:
    """`hadamard_matrix` there, which the device is waited for once."""
    return hadamard_matrix(head_size).to(device)


def fake_quantize_cache(params: KVParams, positions: torch.Tensor) -> Simulation:
    """`reference.fake_quantize` with straight-through gradients, of windows [.., T, H, D] at these positions [T]."""
    h = rotation(params.k_smooth.shape[-1], params.k_smooth.device) if params.key_hadamard else None
    k_shift, v_shift = key_shift_at(positions, params), value_shift_at(positions, params)

    def fake(key: torch.Tensor, value: torch.Tensor, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert at.shape == positions.shape
        k = (key.float() - k_shift) / params.k_smooth
        k = fake_quantize_tokens(k) if h is None else fake_quantize_tokens(k @ h) @ h
        return k * params.k_smooth + k_shift, fake_quantize_tokens(value.float() - v_shift) + v_shift

    return fake


class LearnedCache:
    """A layer's cache parameters [H, D] while they are learned: k_shift, v_shift, and smoothing of K and V as logs.

    The smoothing of V is a factor on what `fold_value` has folded, and is folded in its turn.
    """

    def __init__(self, start: KVParams) -> None:
        """start: where learning begins; its other parts stay."""
        self.start = start
        self.k_shift = start.k_shift.clone().requires_grad_()
        self.v_shift = start.v_shift.clone().requires_grad_()
        self.log_k = start.k_smooth.log().requires_grad_()
        self.log_v = torch.zeros_like(start.k_smooth).requires_grad_()

    def parameters(self) -> list[torch.Tensor]:
        """What is learned."""
        return [self.k_shift, self.v_shift, self.log_k, self.log_v]

    def params(self) -> KVParams:
        """The parameters as the cache will have them. What `start` has of position 0 is not learned."""
        first = self.start.v_first
        return replace(
            self.start,
            k_smooth=self.log_k.exp(),
            k_shift=self.k_shift,
            v_shift=self.v_shift,
            v_first=None if first is None else first / self.log_v.exp(),
        )

    def shifts(self) -> dict[str, torch.Tensor]:
        """All shifts by their names in the checkpoint."""
        first = torch.zeros(1, dtype=torch.long, device=self.k_shift.device)
        params = self.params()
        return {
            "k_shift": self.k_shift.detach(),
            "v_shift": self.v_shift.detach(),
            "k_first": key_shift_at(first, params)[0].detach().clone(),
            "v_first": value_shift_at(first, params)[0].detach().clone(),
        }

    def fake(
        self, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`fake_quantize_cache`, with gradients to what is learned."""
        return fake_quantize_cache(self.params(), positions)(key, value, positions)


class LearnedBlock:
    """All that is learned of one block; losses: the mean loss of each epoch, once it is.

    weights: by the linear layers' module path; v_proj, o_proj: paths of those that the smoothing of V is folded into.
    """

    def __init__(
        self,
        weights: dict[str, LearnedWeight],
        cache: LearnedCache | None,
        block: torch.nn.Module,
        v_proj: str,
        o_proj: str,
    ) -> None:
        self.weights, self.cache, self.v_proj, self.o_proj = weights, cache, v_proj, o_proj
        self.v_linear: torch.nn.Linear = block.get_submodule(v_proj)  # type: ignore[assignment]
        self.o_linear: torch.nn.Linear = block.get_submodule(o_proj)  # type: ignore[assignment]
        self.dtype = self.v_linear.weight.dtype  # that the block runs in; what is learned is fp32
        self.losses: list[float] = []

    def parameters(self) -> list[torch.Tensor]:
        """What is learned: of the weights, then of the cache."""
        of_cache = self.cache.parameters() if self.cache else []
        return [p for w in self.weights.values() for p in w.parameters()] + of_cache

    def clips(self) -> dict[str, dict[str, float]]:
        """Mean and least share of a range that each linear layer's groups keep at an end."""
        clips = {name: torch.stack(w.clips()) for name, w in self.weights.items()}
        return {name: {"mean": c.mean().item(), "min": c.min().item()} for name, c in clips.items()}

    def project(self) -> None:
        """Bring every parameter back to where it may be."""
        for weight in self.weights.values():
            weight.project()

    def _folded(self) -> dict[str, torch.Tensor]:
        """Weights that the smoothing of V changes: v_proj's rows divided by it, o_proj's columns times it."""
        if self.cache is None:
            return {}
        v, o = self.weights[self.v_proj].weight, self.weights[self.o_proj].weight
        smooth = self.cache.log_v.exp()
        heads, size = smooth.shape
        group = o.shape[1] // (heads * size)
        columns = smooth[:, None].expand(heads, group, size).reshape(-1)
        return {self.v_proj: v / smooth.reshape(-1, 1), self.o_proj: o * columns}

    def fold_bias(self, bias: torch.Tensor) -> torch.Tensor:
        """v_proj's bias, which `fold_value` has folded, with the smoothing of V that is learned; fp32 in, fp32 out."""
        return bias if self.cache is None else bias / self.cache.log_v.exp().flatten()

    def fake(self) -> dict[str, torch.Tensor]:
        """Parameters as the checkpoint will give them, by name, with straight-through gradients."""
        folded, bias = self._folded(), self.v_linear.bias
        fake = {f"{name}.weight": w.fake(folded.get(name)) for name, w in self.weights.items()}
        if self.cache is not None and bias is not None:
            fake[f"{self.v_proj}.bias"] = self.fold_bias(bias.float())
        return fake

    def fold(self) -> None:
        """Give v_proj and o_proj the weights that `quantize` rounds, once codes are taken."""
        for name, folded in self._folded().items():
            linear = self.v_linear if name == self.v_proj else self.o_linear
            linear.weight.data = folded.detach().to(self.dtype)

    def quantize(self) -> dict[str, QuantizedWeight]:
        """The codes of `fake`, by module path."""
        folded = self._folded()
        return {name: w.quantize(folded.get(name)) for name, w in self.weights.items()}


def relative_mse(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Of windows [.., T, hidden], the mean over tokens of |error|^2 / |target|^2: a token of massive activations counts
    as one token.

    The norm before the next block divides by a token's length, so its relative error is what that block sees.
    """
    output, target = output.float(), target.float()
    return ((output - target).square().sum(-1) / target.square().sum(-1)).mean(-1)


def mae(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Of windows [.., T, hidden], the mean absolute error (arXiv 2402.12065, section 4.3)."""
    return (output.float() - target.float()).abs().mean((-2, -1))


def mse(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Of windows [.., T, hidden], the mean squared error, which `mae` is instead of."""
    return (output.float() - target.float()).square().mean((-2, -1))


LOSSES: dict[str, Loss] = {"relative_mse": relative_mse, "mae": mae, "mse": mse}


def loss_of(learning: Learning) -> Loss:
    """The recipe's loss of windows [.., T, hidden], without their first positions where it leaves them out."""
    loss, first = LOSSES[learning.loss], SKIPPED if learning.skip_first else 0
    return lambda output, target: loss(output[..., first:, :], target[..., first:, :])


def together(learning: Learning | Tuning, device: str) -> int:
    """Windows that go through a block at once: a GPU is faster with all of a batch, a CPU needs the memory less."""
    return 1 if device == "cpu" else learning.batch


def batches(windows: int, learning: Learning | Tuning, seed: int) -> Iterator[list[int]]:
    """Windows of each step, of all workers: every epoch has each once.

    A batch has one window of every residue modulo its size, so that workers whose number divides the size have equal
    parts of it.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(learning.epochs):
        residues = [range(i, windows, learning.batch) for i in range(min(learning.batch, windows))]
        orders = [[r[j] for j in torch.randperm(len(r), generator=generator).tolist()] for r in residues]
        yield from ([order[i] for order in orders if i < len(order)] for i in range(len(orders[0])))


class SignDescent:
    """Steps by the sign of the gradient, of a size that falls linearly to 0: a parameter moves by its reach at most.

    So an offset can reach every neighbour, and none depends on the size of its gradient (SignRound, arXiv 2309.05516).
    """

    def __init__(self, parameters: list[torch.Tensor], reaches: list[float], steps: int) -> None:
        self.parameters, self.steps = parameters, steps
        self.sizes = [2 * reach / (steps + 1) for reach in reaches]
        self.left = torch.ones((), device=parameters[0].device if parameters else "cpu")

    def schedule(self, done: int) -> None:
        """Say how many steps have been taken."""
        self.left.fill_(1 - done / self.steps)

    def step(self, gradients: list[torch.Tensor]) -> None:
        """One step down."""
        for parameter, gradient, size in zip(self.parameters, gradients, self.sizes, strict=True):
            parameter.addcmul_(gradient.sign_(), self.left.to(gradient.dtype), value=-size)


class AdamW:
    """torch's AdamW without decay."""

    def __init__(self, parameters: list[torch.Tensor], rates: list[float]) -> None:
        self.parameters = parameters
        groups: dict[float, list[torch.Tensor]] = {}
        for parameter, rate in zip(parameters, rates, strict=True):
            groups.setdefault(rate, []).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [{"params": group, "lr": rate} for rate, group in groups.items()],
            weight_decay=0.0,
            capturable=parameters[0].is_cuda,
        )

    def schedule(self, done: int) -> None:
        """Nothing: the rate stays."""

    def step(self, gradients: list[torch.Tensor]) -> None:
        """One step down."""
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()


def learn(
    learning: Learning,
    block: LearnedBlock,
    forward: Forward,
    inputs: torch.Tensor,
    targets: list[torch.Tensor],
    seed: int,
    workers: Workers = ALONE,
) -> list[float]:
    """Change what `block` learns so that `forward` takes inputs to targets; returns the mean loss of each epoch.

    inputs: this worker's windows [N, T, hidden]; targets: the same after the block and after each follower, whose
    losses are averaged. All workers take the same steps, with the gradients of all their windows.
    """
    windows = workers.total(inputs.shape[0])
    parameters, of_cache = block.parameters(), block.cache.parameters() if block.cache else []
    steps = learning.epochs * -(-windows // learning.batch)
    of_weights = parameters[: len(parameters) - len(of_cache)]
    rates = [rate for weight in block.weights.values() for rate in weight.rates(learning)]
    sign = learning.optimizer == "sign"
    optimizers: list[SignDescent | AdamW] = []
    if of_weights:
        optimizers.append(SignDescent(of_weights, rates, steps) if sign else AdamW(of_weights, rates))
    if of_cache:
        optimizers.append(AdamW(of_cache, [learning.cache_rate] * len(of_cache)))
    device = block.v_linear.weight.device
    size, loss = together(learning, device.type), loss_of(learning)
    # times a loss's number of elements, gradients to them are about 1 and sums of those over tokens, to weights, up to
    # 8e4 (blocks of SmolLM2-135M): 64 times less is far from both ends of float16
    scale = gradient_scale(block.dtype, inputs.shape[-2:].numel() / 64)

    def step(windows: list[Entry]) -> list[torch.Tensor]:
        gradients, of_windows = batch_gradients(block, forward, loss, scale, windows, workers)
        for optimizer in optimizers:
            optimizer.step(gradients[: len(optimizer.parameters)])
            del gradients[: len(optimizer.parameters)]  # as large as the block
        block.project()
        return of_windows

    weights = sum(w.weight.numel() for w in block.weights.values())
    take_step = Replayed(step) if replays(weights, device.type, workers) else step
    losses: list[torch.Tensor] = []  # read at the end: a GPU is not waited for in between
    for done, batch in enumerate(batches(windows, learning, seed)):
        mine = workers.positions(batch)
        parts = [mine[i : i + size] for i in range(0, len(mine), size)]
        for optimizer in optimizers:
            optimizer.schedule(done)
        losses += take_step([(take(inputs, part, device), [take(t, part, device) for t in targets]) for part in parts])
    workers.agree(parameters)
    return workers.mean(torch.cat(losses).cpu().view(learning.epochs, -1).unbind(1)).tolist()


Step = Callable[[list[Entry]], list[torch.Tensor]]  # a batch's windows -> losses


def replays(weights: int, device: str, workers: Workers) -> bool:
    """Whether steps of a block with so many weights, or of a model of such, are `Replayed`: on a GPU of one worker."""
    return device != "cpu" and workers.size == 1 and weights <= REPLAYED


class Replayed:
    """Steps on a GPU, each but the first as a CUDA graph, which is of the second.

    A step of a small block is thousands of kernels of a few microseconds, which Python launches more slowly than they
    run. One with windows of other shapes is taken as it is.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        self.shapes: list[torch.Size] | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.windows: list[Entry] = []
        self.losses: list[torch.Tensor] = []

    def __call__(self, windows: list[Entry]) -> list[torch.Tensor]:
        """One step."""
        shapes = [x.shape for x in tensors_of(windows)]
        if self.shapes != shapes:  # in the first, libraries set themselves up
            self.shapes = self.shapes or shapes
            return self.step(windows)
        if self.graph is None:
            self.graph, self.windows = torch.cuda.CUDAGraph(), windows
            # a thread may be writing what an earlier block came to
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.losses = self.step(windows)
        for held, x in zip(tensors_of(self.windows), tensors_of(windows), strict=True):
            held.copy_(x)
        self.graph.replay()
        return [loss.clone() for loss in self.losses]


def tensors_of(windows: list[Entry]) -> list[torch.Tensor]:
    """Inputs and targets."""
    return [x for inputs, targets in windows for x in (inputs, *targets)]


def gradient_scale(dtype: torch.dtype, factor: float) -> float:
    """What to multiply a loss by while its gradients go through tensors of `dtype`: 1, but for float16, where those of
    a mean over many elements would be less than the least number, the power of two up to `factor`."""
    return 2.0 ** math.floor(math.log2(factor)) if dtype == torch.float16 else 1.0


def batch_gradients(
    block: LearnedBlock,
    forward: Forward,
    loss_function: Loss,
    scale: float,
    windows: list[Entry],
    workers: Workers,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Gradients fp32 of the sum of the losses of all workers' windows, by `block.parameters()`; losses of this
    worker's, which are (inputs, targets) of one or more each. scale: a `gradient_scale`, in nothing that is returned.
    """
    parameters, direct = block.parameters(), block.cache.parameters() if block.cache else []
    with torch.enable_grad():
        fake = block.fake()
    # the graph of the weights is walked once a step, that of the block once for each entry of `windows`
    leaves = {name: t.detach().to(block.dtype).requires_grad_() for name, t in fake.items()}
    sources = [*leaves.values(), *direct]
    found: list[torch.Tensor | None] = [None] * len(sources)
    losses = []
    for window, targets in windows:
        with torch.enable_grad():
            after = forward(leaves, window)
            parts = [loss_function(o, t) for o, t in zip(after, targets, strict=True)]
            of_windows = torch.stack(parts).mean(0)
            loss = of_windows.sum() * scale
        for i, part in enumerate(torch.autograd.grad(loss, sources, allow_unused=True)):
            total = found[i]
            if part is not None:
                found[i] = part.float() if total is None else total.add_(part)
        losses.append(of_windows.detach())
    sums = [torch.zeros_like(t, dtype=torch.float32) if x is None else x for t, x in zip(sources, found, strict=True)]
    for total in sums:
        if scale != 1:
            total.div_(scale)
        workers.sum(total)
    learned = [(t, total) for t, total in zip(fake.values(), sums, strict=False) if t.requires_grad]
    gradients: tuple[torch.Tensor | None, ...] = (None,) * len(parameters)
    if learned:
        outputs, totals = zip(*learned, strict=True)
        gradients = torch.autograd.grad(outputs, parameters, totals, allow_unused=True)
    by_cache = [None] * (len(parameters) - len(direct)) + sums[len(fake) :]
    return [_sum(a, b) for a, b in zip(gradients, by_cache, strict=True)], losses


def _sum(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor:
    parts = [x for x in (a, b) if x is not None]
    return parts[0] + parts[1] if len(parts) == 2 else parts[0]
