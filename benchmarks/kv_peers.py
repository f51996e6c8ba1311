"""KV caches as functions, to compare what they cost in quality: this project's, and vLLM's own.

Each function takes roped keys and values [T, H, D] at positions int64 [T] and returns, in fp32 [T, H, D], the keys and
values that attention reads from such a cache; `evaluate.SimulatedCache` runs a model on them. Written from the formats'
definitions in vLLM 0.32 (0.26 has the same, but for head sizes that are no powers of two) and held against vLLM's own
kernels by tests/test_kv_peers.py.

Rows that `variants` makes. Unless said otherwise a token of the step is attended as it came (past-only).

    W4                    no cache but the model's own, in 16 bits
    kv4                   the checkpoint's cache: reference.py
    kv3, kv2              the same with codes of 3 and 2 bits
    kv4_no_past_only      kv4, but the current token is read from the cache too
    kv4_no_hadamard       kv4 without the rotation of keys
    kv4_no_smoothing      kv4 with k_smooth = 1
    kv4_no_shift          kv4 without shifts after position 0
    kv4_slow_shift        kv4 with a shift of keys on slow rotary pairs alone (`reference.slow_pairs`)
    kv4_static_shift      kv4 with the mean of R_t k_shift over the window in place of R_t k_shift
    kv4_no_first          kv4 with position 0 shifted as any other
    fp8                   e4m3 with scale 1, vLLM's default for `--kv-cache-dtype fp8`; current tokens too
    int4_per_token_head   vLLM's 4-bit cache of that name; current tokens too
    turboquant_4bit_nc    vLLM's TurboQuant preset of that name, as it decodes: current tokens too, and the first two
                          and last two layers in 16 bits

The parts of kv4 are switched off one at a time and nothing is calibrated again, so such a row says what the part is
worth to this checkpoint, not how well a cache made without it could do. What is folded into the weights (V's balance
and its rotation) stays in every row; vLLM's caches get values with the rotation taken out, as they would see them, and
with the balance left in. Queries are exact everywhere, while FlashAttention 3 on an fp8 cache takes them in fp8 too.
vLLM rounds rotated keys and values to the model's type; here that is the type the model runs in.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch

from vllm_wkvquant.checkpoint import Checkpoint
from vllm_wkvquant.reference import (
    KVParams,
    Simulation,
    fake_quantize,
    hadamard_block,
    hadamard_matrix,
    key_shift_at,
    slow_pairs,
)

KV = tuple[torch.Tensor, torch.Tensor]
E4M3_MAX = 448.0
INT4_SEED = 0x9E3779B9  # of vLLM's signs
INT4_MIN_SCALE = 1e-6
TURBOQUANT_MIN_SCALE = 1e-8
TURBOQUANT_EXACT_LAYERS = 2  # at either end


@dataclass(frozen=True)
class Variant:
    """A cache: layers and chunk of `evaluate.SimulatedCache`, and the bits of an element with all metadata."""

    layers: Sequence[Simulation] | None
    chunk: int
    bits: float


def exact(key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor) -> KV:
    """A cache that keeps what it is given."""
    return key.float(), value.float()


def fp8(key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor) -> KV:
    """e4m3 with scale 1, to nearest, saturating, as on a GPU (vLLM's CPU cache rounds towards zero)."""
    k, v = (x.float().clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float() for x in (key, value))
    return k, v


def walsh_hadamard(x: torch.Tensor) -> torch.Tensor:
    """Unnormalized transform of the last dimension, a power of two: log2 rounds of sums and differences."""
    step = 1
    while step < x.shape[-1]:
        a, b = x.unflatten(-1, (-1, 2, step)).unbind(-2)
        x = torch.stack([a + b, a - b], -2).flatten(-3)
        step *= 2
    return x


@cache
def int4_signs(size: int) -> torch.Tensor:
    """fp32 [size] of 1 and -1, the same in every layer, head and server."""
    generator = torch.Generator().manual_seed(INT4_SEED)
    return 2 * torch.bernoulli(torch.full((size,), 0.5), generator=generator) - 1


def int4_rotate(x: torch.Tensor, inverse: bool = False) -> torch.Tensor:
    """H (signs * x) in blocks, fp32 [T, H, D]; the inverse up to the size of a block."""
    size = hadamard_block(x.shape[-1])
    blocks, signs = x.float().unflatten(-1, (-1, size)), int4_signs(size).to(x.device)
    out = walsh_hadamard(blocks) * signs if inverse else walsh_hadamard(blocks * signs)
    return out.flatten(-2)


def int4_encode(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [T, H, D] and the stored scale fp32 [T, H], whose four lowest bits are the zero point."""
    x = int4_rotate(x).to(x.dtype).float()
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp_min(INT4_MIN_SCALE)
    zero = (-low / scale + 0.5).trunc().clamp(0, 15)
    codes = (x * (1 / scale) + zero + 0.5).trunc().clamp(0, 15)
    stored = (scale.view(torch.int32) & ~15) | zero.int()
    return codes.to(torch.uint8), stored.view(torch.float32)[..., 0]


def int4_decode(codes: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """Inverse of `int4_encode` up to its error, fp32 [T, H, D]."""
    bits = stored.view(torch.int32)[..., None]
    x = (codes.float() - (bits & 15).float()) * (bits & ~15).view(torch.float32)
    return int4_rotate(x, inverse=True) / hadamard_block(x.shape[-1])


def int4_per_token_head(key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor) -> KV:
    """vLLM's cache of that name: a randomized Hadamard transform, then 4 bits asymmetric per token and head."""
    return int4_decode(*int4_encode(key)), int4_decode(*int4_encode(value))


@cache
def lloyd_max(levels: int) -> torch.Tensor:
    """Centroids fp32 [levels] of the scalar quantizer with the least squared error on a standard normal variable."""
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    centroids = normal.icdf((torch.arange(levels, dtype=torch.float64) + 0.5) / levels)
    infinity = torch.tensor([math.inf], dtype=torch.float64)
    for _ in range(2000):
        edges = torch.cat([-infinity, (centroids[1:] + centroids[:-1]) / 2, infinity])
        density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
        centroids = -density.diff() / normal.cdf(edges).diff()
    return centroids.float()


def turboquant_keys(key: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Rotated keys as TurboQuant returns them, fp32 [T, H, D]: direction by `centroids` [16], norm in fp16."""
    norm = key.float().norm(dim=-1, keepdim=True)
    direction = key.float() / (norm + 1e-8) @ hadamard_matrix(key.shape[-1]).to(key.device)
    nearest = centroids[torch.bucketize(direction, (centroids[1:] + centroids[:-1]) / 2, right=True)]
    return norm.half().float() * nearest / nearest.norm(dim=-1, keepdim=True)


def turboquant_values(value: torch.Tensor) -> torch.Tensor:
    """Values as TurboQuant returns them, fp32 [T, H, D]: 4 bits asymmetric per token and head, not rotated."""
    x = value.float()
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp_min(TURBOQUANT_MIN_SCALE)
    codes = ((x - low) / scale + 0.5).trunc().clamp(0, 15)
    return codes * scale.half().float() + low.half().float()


def turboquant_4bit_nc(key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor) -> KV:
    """vLLM's preset of that name, for head sizes that are powers of two."""
    size = key.shape[-1]
    centroids = lloyd_max(16).to(key.device) / math.sqrt(size)
    return turboquant_keys(key, centroids) @ hadamard_matrix(size).to(key.device), turboquant_values(value)


def unrotated(simulation: Simulation) -> Simulation:
    """The cache of values from before the Hadamard matrix was folded into v_proj."""

    def simulate(key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor) -> KV:
        matrix = hadamard_matrix(value.shape[-1]).to(value.device)
        past_key, past_value = simulation(key, (value.float() @ matrix).to(value.dtype), positions)
        return past_key, past_value @ matrix

    return simulate


def variants(ckpt: Checkpoint, window: int, device: str) -> dict[str, Variant]:
    """The caches of this module's docstring by name, in its order.

    Left out are kv4_no_hadamard where keys are not rotated, kv4_slow_shift and kv4_static_shift where their shift does
    not rotate, and turboquant_4bit_nc where the head size is no power of two. window: tokens over which a static shift
    is the mean.
    """
    layers, size = ckpt.kv.num_hidden_layers, ckpt.kv.head_size
    params = [ckpt.kv_params(i).to(device) for i in range(layers)]
    metadata = 32 / size  # a scale and a minimum or a zero point, per token and head

    def ours(change: Callable[[KVParams], KVParams], bits: int = 4, chunk: int = 1) -> Variant:
        simulations = [partial(fake_quantize, params=change(p), qmax=2**bits - 1) for p in params]
        return Variant(simulations, chunk, bits + metadata)

    def static(p: KVParams) -> KVParams:
        shift = key_shift_at(torch.arange(1, window, device=device), p).mean(0)
        return replace(p, k_shift=shift, rope_turns=None)

    def no_shift(p: KVParams) -> KVParams:
        return replace(p, k_shift=torch.zeros_like(p.k_shift), v_shift=torch.zeros_like(p.v_shift))

    def slow_shift(p: KVParams) -> KVParams:
        assert p.rope_turns is not None
        kept = torch.ones(size, dtype=torch.bool, device=device)
        kept[: 2 * p.rope_turns.numel()] = slow_pairs(p.rope_turns).repeat(2)
        return replace(p, k_shift=p.k_shift * kept)

    out = {"W4": Variant(None, 1, 16)} | {f"kv{bits}": ours(lambda p: p, bits) for bits in (4, 3, 2)}
    out["kv4_no_past_only"] = ours(lambda p: p, chunk=0)
    if ckpt.kv.key_hadamard:
        out["kv4_no_hadamard"] = ours(lambda p: replace(p, key_hadamard=False))
    out["kv4_no_smoothing"] = ours(lambda p: replace(p, k_smooth=torch.ones_like(p.k_smooth)))
    out["kv4_no_shift"] = ours(no_shift)
    if ckpt.kv.key_shift == "rotating":
        out["kv4_slow_shift"] = ours(slow_shift)
        out["kv4_static_shift"] = ours(static)
    out["kv4_no_first"] = ours(lambda p: replace(p, k_first=None, v_first=None))

    def peer(simulation: Simulation) -> Simulation:
        return unrotated(simulation) if ckpt.kv.value_hadamard else simulation

    out["fp8"] = Variant([peer(fp8)] * layers, 0, 8)
    out["int4_per_token_head"] = Variant([peer(int4_per_token_head)] * layers, 0, 4 + metadata)
    if hadamard_block(size) == size:
        ends = [exact] * min(TURBOQUANT_EXACT_LAYERS, layers // 2)
        inner = layers - 2 * len(ends)
        bits = (16 * 2 * len(ends) + (4 + 24 / size) * inner) / layers
        out["turboquant_4bit_nc"] = Variant([*ends, *[peer(turboquant_4bit_nc)] * inner, *ends], 0, bits)
    return out
