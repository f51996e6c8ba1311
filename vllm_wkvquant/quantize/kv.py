"""KV parameters of one layer from calibration statistics (docs/algorithm.md, "Keys and values")."""

from dataclasses import dataclass

import torch

from vllm_wkvquant.config import KVCacheConfig
from vllm_wkvquant.quantize.attention import QKV, past_only_attention
from vllm_wkvquant.quantize.calibration import SKIPPED
from vllm_wkvquant.quantize.recipes import Smoothing
from vllm_wkvquant.quantize.workers import ALONE, Workers
from vllm_wkvquant.reference import KVParams, fake_quantize, key_shift_at, rope_turns, rotate, transform_key

SMOOTH_LIMIT = 64.0  # a factor stays within 1/64 .. 64 of its head's mean
SEARCH_WINDOWS = 4  # windows on which the search compares: each costs an attention per smoothing


@dataclass(frozen=True)
class KVStatistics:
    """Of one layer, fp32 [H, D] each, over the calibration tokens but the first of each window.

    k_shift: mean key before the rotary embedding (after it for a static shift); k_deviation: largest deviation from
    the shift, after the rotary embedding; q_rms: root mean square of the queries of the KV head's group; v_shift: mean
    value; k_first, v_first: mean key and value of tokens at position 0.
    """

    k_shift: torch.Tensor
    k_deviation: torch.Tensor
    q_rms: torch.Tensor
    v_shift: torch.Tensor
    k_first: torch.Tensor
    v_first: torch.Tensor


def collect(
    windows: list[QKV],
    firsts: QKV | None,
    config: KVCacheConfig,
    device: str = "cpu",
    workers: Workers = ALONE,
) -> KVStatistics:
    """Statistics of captured windows of all workers, under the shift that `config` asks for.

    windows: this worker's, anywhere; one at a time is brought to `device`. firsts: tokens at position 0, [B, ...], or
    None where that position has no shifts of its own.
    """
    length, heads, size = windows[0][1].shape
    positions = torch.arange(length, device=device)
    zeros = torch.zeros(heads, size, device=device)
    turns = rope_turns(config.rope.inv_freq).to(device)
    k_means, v_means, q_squares = [], [], []
    for q, k, v in windows:
        key = k.to(device).float()
        if config.key_shift == "rotating":
            key = rotate(key, -positions, turns, 1 / config.rope.attention_scaling)
        k_means.append(key[SKIPPED:].mean(0))
        v_means.append(v.to(device)[SKIPPED:].float().mean(0))
        q_squares.append(q.to(device)[SKIPPED:].float().unflatten(1, (heads, -1)).square().mean((0, 2)))
    k_shift = zeros if config.key_shift == "none" else workers.mean(k_means)
    v_shift = workers.mean(v_means)
    known = key_shift_at(positions, KVParams.build(config, zeros + 1, k_shift, zeros))
    deviations = [(k.to(device).float() - known)[SKIPPED:].abs().amax(0) for _, k, _ in windows]
    return KVStatistics(
        k_shift=k_shift,
        k_deviation=workers.amax(deviations),
        q_rms=workers.mean(q_squares).sqrt(),
        v_shift=v_shift,
        k_first=known[0].clone() if firsts is None else firsts[1].float().mean(0),
        v_first=v_shift.clone() if firsts is None else firsts[2].float().mean(0),
    )


def channel_maxima(windows: list[QKV], params: KVParams | None, device: str, workers: Workers) -> torch.Tensor:
    """Largest |key| of each channel in all workers' windows, fp32 [H, D]: as attention has it, or as a cache of
    `params` codes it."""
    positions = torch.arange(windows[0][1].shape[0], device=device)
    maxima = []
    for _, k, _ in windows:
        key = k.to(device).float()
        key = key if params is None else transform_key(key, positions, params)
        maxima.append(key[SKIPPED:].abs().amax(0))
    return workers.amax(maxima)


def normalize(factors: torch.Tensor) -> torch.Tensor:
    """Scale positive factors [H, D] to a geometric mean of 1 per head, within 1 / SMOOTH_LIMIT .. SMOOTH_LIMIT."""
    log = factors.clamp_min(torch.finfo(torch.float32).tiny).log()
    return (log - log.mean(-1, keepdim=True)).exp().clamp(1 / SMOOTH_LIMIT, SMOOTH_LIMIT)


def smoothing_factors(smoothing: Smoothing, statistics: KVStatistics, rotary_dim: int) -> torch.Tensor:
    """k_smooth, fp32 [H, D].

    Error of channel c reaches the scores times k_smooth[c] |q[c]|, so a factor that falls with the queries moves the
    error to where they are small.
    """
    deviation = statistics.k_deviation
    if smoothing.tied:
        pair = deviation[:, :rotary_dim].unflatten(1, (2, -1)).amax(1)
        deviation = torch.cat([pair, pair, deviation[:, rotary_dim:]], 1)
    return normalize(deviation**smoothing.key / statistics.q_rms.clamp_min(1e-6) ** smoothing.query)


def attention_error(
    window: QKV, params: KVParams, exact: torch.Tensor, gram: torch.Tensor, scale: float, sliding_window: int
) -> torch.Tensor:
    """Squared error of a window's attention after o_proj, per KV head, fp64 [H].

    exact: attention with a 16-bit cache [T, Hq, D]; gram: o_proj's columns of each KV head times themselves,
    [H, g * D, g * D].
    """
    q, k, v = window
    positions = torch.arange(q.shape[0], device=q.device)
    past = fake_quantize(k, v, positions, params)
    error = past_only_attention(q, k, v, *past, scale, sliding_window) - exact
    e = error.unflatten(1, (gram.shape[0], -1)).transpose(0, 1).flatten(2)  # [H, T, g * D]
    return ((e @ gram) * e).sum((1, 2)).double()


def search(
    candidates: list[KVParams],
    windows: list[QKV],
    o_proj: torch.Tensor,
    scale: float,
    sliding_window: int,
    workers: Workers = ALONE,
) -> torch.Tensor:
    """Index int64 [H] of the candidate that errs least at the output of attention, for each KV head.

    o_proj: weight [hidden, Hq * D]. Errors of different heads are taken as uncorrelated.
    """
    heads = windows[0][1].shape[1]
    columns = o_proj.float().unflatten(1, (heads, -1)).transpose(0, 1)  # [H, hidden, g * D]
    gram = columns.transpose(1, 2) @ columns
    errors = torch.zeros(len(candidates), heads, dtype=torch.float64, device=o_proj.device)
    for window in windows[: len(workers.share(range(SEARCH_WINDOWS)))]:
        q, k, v = (x.to(o_proj.device) for x in window)
        exact = past_only_attention(q, k, v, k.float(), v.float(), scale, sliding_window)
        for i, params in enumerate(candidates):
            errors[i] += attention_error((q, k, v), params, exact, gram, scale, sliding_window)
    return workers.sum(errors).argmin(0)
