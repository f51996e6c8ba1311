"""KV parameters of one layer from calibration statistics (docs/algorithm.md, "Steps")."""

from dataclasses import dataclass, replace

import torch

from vllm_wkvquant.config import KVCacheConfig
from vllm_wkvquant.past_only import past_only_attention
from vllm_wkvquant.quantize.attention import QKV
from vllm_wkvquant.quantize.calibration import SKIPPED
from vllm_wkvquant.quantize.recipes import Smoothing
from vllm_wkvquant.quantize.workers import ALONE, Workers
from vllm_wkvquant.reference import (
    KVParams,
    fake_quantize,
    key_shift_at,
    rope_turns,
    rotate,
    shift_steps,
    slow_pairs,
    transform_key,
)

SMOOTH_LIMIT = 64.0  # a factor stays within 1/64 .. 64 of its head's mean
SEARCH_WINDOWS = 4  # windows on which the search compares: each costs an attention per smoothing
SHIFT_WINDOWS = (
    8  # on which sets of rotary pairs that keep a shift are compared, the last ones: not those of the search
)
SHIFT_TOLERANCE = 0.02  # of the squared error of attention, which dropping the shift of rotary pairs may add


@dataclass(frozen=True)
class KVStatistics:
    """Of one layer, fp32 [H, D] each, over the calibration tokens but the first four of each window.

    k_shift: mean key before the rotary embedding (after it for a static shift); k_deviation: largest deviation from
    the shift, after the rotary embedding; q_rms: root mean square of the queries of the KV head's group; v_shift: mean
    value; k_first, v_first: mean key and value of tokens at position 0, of sequences of one token.
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
    k_deviation, at_0 = deviation(windows, k_shift, config, workers)
    return KVStatistics(
        k_shift=k_shift,
        k_deviation=k_deviation,
        q_rms=workers.mean(q_squares).sqrt(),
        v_shift=v_shift,
        k_first=at_0 if firsts is None else firsts[1].float().mean(0),
        v_first=v_shift.clone() if firsts is None else firsts[2].float().mean(0),
    )


def deviation(
    windows: list[QKV], k_shift: torch.Tensor, config: KVCacheConfig, workers: Workers
) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest |k_t - R_t k_shift| of each channel in all workers' windows, and R_0 k_shift, fp32 [H, D] each."""
    positions = torch.arange(windows[0][1].shape[0], device=k_shift.device)
    zeros = torch.zeros_like(k_shift)
    known = key_shift_at(positions, KVParams.build(config, zeros + 1, k_shift, zeros))
    deviations = [(k.to(known.device).float() - known)[SKIPPED:].abs().amax(0) for _, k, _ in windows]
    return workers.amax(deviations), known[0].clone()


def shift_counts(config: KVCacheConfig) -> list[int]:
    """Rotary pairs that are not slow and may keep a shift: as many as there is room for in each number of steps of the
    kernels, the fewest first, which is none where the slow ones fill theirs, and all of them last."""
    slow = int(slow_pairs(rope_turns(config.rope.inv_freq)).sum())
    fast = len(config.rope.inv_freq) - slow
    return [n for n in range(fast + 1) if n == fast or shift_steps(n + 1, slow) > shift_steps(n, slow)]


def shift_sets(statistics: KVStatistics, config: KVCacheConfig) -> list[torch.Tensor]:
    """Rotary pairs that may keep a shift, bool [n] each: the slow ones and as many others as `shift_counts` says.

    Of those others it is the ones that would lengthen keys most, in units of free^0.5, which gives all channels about
    the same share of that length if they keep their shift.
    """
    pairs = len(config.rope.inv_freq)
    shift, largest = (x[:, : 2 * pairs].unflatten(1, (2, pairs)) for x in (statistics.k_shift, statistics.k_deviation))
    length = shift.square().sum(1) / largest.amax(1).clamp_min(1e-6)
    share = (length / statistics.k_deviation.sum(1, keepdim=True).clamp_min(1e-6)).mean(0)
    slow = slow_pairs(rope_turns(config.rope.inv_freq)).to(share.device)
    order = share.masked_fill(slow, -1.0).argsort(descending=True, stable=True)
    sets = []
    for count in shift_counts(config):
        kept = slow.clone()
        kept[order[:count]] = True
        sets.append(kept)
    return sets


def keep_shift(
    statistics: KVStatistics,
    pairs: torch.Tensor,
    windows: list[QKV],
    config: KVCacheConfig,
    own_first: bool,
    workers: Workers = ALONE,
) -> KVStatistics:
    """`collect` of the same windows with a shift on these rotary pairs alone, bool [n].

    own_first: position 0 has a shift of its own, which stays whole.
    """
    kept = torch.ones(statistics.k_shift.shape[1], dtype=torch.bool, device=pairs.device)
    kept[: 2 * pairs.numel()] = pairs.repeat(2)
    k_shift = torch.where(kept, statistics.k_shift, 0)
    k_deviation, at_0 = deviation(windows, k_shift, config, workers)
    k_first = statistics.k_first if own_first else at_0
    return replace(statistics, k_shift=k_shift, k_deviation=k_deviation, k_first=k_first)


def count_shifts(k_shift: torch.Tensor, config: KVCacheConfig) -> dict[str, int]:
    """Rotary pairs that have a shift in any head, fast and slow ones, and the product steps that they take."""
    turns = rope_turns(config.rope.inv_freq)
    used = (k_shift[:, : 2 * turns.numel()] != 0).any(0).unflatten(0, (2, -1)).any(0).cpu()
    slow = slow_pairs(turns)
    counts = {"fast": int((used & ~slow).sum()), "slow": int((used & slow).sum())}
    return counts | {"steps": shift_steps(**counts)}


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
    """Scale factors fp32 [H, D] to a geometric mean of 1 per head, within 1 / SMOOTH_LIMIT .. SMOOTH_LIMIT; those that
    are 0 have no part in that mean and become 1: a channel of zeros, as in a padded head, would draw all others up."""
    dead = factors == 0
    log = factors.log().masked_fill(dead, torch.nan)
    scaled = (log - log.nanmean(-1, keepdim=True)).exp().clamp(1 / SMOOTH_LIMIT, SMOOTH_LIMIT)
    return scaled.masked_fill(dead, 1)


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


def attend(window: QKV, past: tuple[torch.Tensor, torch.Tensor], scale: float, sliding_window: int) -> torch.Tensor:
    """`past_only_attention` of one window in fp32, past: its keys and values from the cache -> [T, Hq, D]."""
    q, k, v, past_k, past_v = (x.float().transpose(0, 1)[None] for x in (*window, *past))
    return past_only_attention(q, k, v, past_k, past_v, scale, sliding_window)[0].transpose(0, 1)


def attention_error(
    window: QKV, params: KVParams, exact: torch.Tensor, gram: torch.Tensor, scale: float, sliding_window: int
) -> torch.Tensor:
    """Squared error of a window's attention after o_proj, per KV head, fp64 [H].

    exact: attention with a 16-bit cache [T, Hq, D]; gram: o_proj's columns of each KV head times themselves,
    [H, g * D, g * D].
    """
    _, k, v = window
    past = fake_quantize(k, v, torch.arange(k.shape[0], device=k.device), params)
    error = attend(window, past, scale, sliding_window) - exact
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

    windows: this worker's, of which the first SEARCH_WINDOWS of all workers are looked at.
    """
    first = windows[: len(workers.share(range(SEARCH_WINDOWS)))]
    return attention_errors(candidates, first, o_proj, scale, sliding_window, workers).argmin(0)


def fewest_shifts(
    candidates: list[KVParams],
    windows: list[QKV],
    o_proj: torch.Tensor,
    scale: float,
    sliding_window: int,
    workers: Workers = ALONE,
) -> int:
    """Index of the first candidate that errs hardly more than the last one, whose shift is whole, over all KV heads.

    windows: this worker's, of which the last SHIFT_WINDOWS of all workers are looked at. The search has chosen what
    errs least on its own windows with the whole shift, which would count there as a merit of that shift.
    """
    if len(candidates) == 1:
        return 0
    count = workers.total(len(windows))
    last = [windows[i] for i in workers.positions(list(range(max(0, count - SHIFT_WINDOWS), count)))]
    errors = attention_errors(candidates, last, o_proj, scale, sliding_window, workers).sum(1)
    return int((errors <= (1 + SHIFT_TOLERANCE) * errors[-1]).int().argmax())


def attention_errors(
    candidates: list[KVParams],
    windows: list[QKV],
    o_proj: torch.Tensor,
    scale: float,
    sliding_window: int,
    workers: Workers = ALONE,
) -> torch.Tensor:
    """`attention_error` of each candidate on all workers' windows, fp64 [candidates, H].

    o_proj: weight [hidden, Hq * D]. Errors of different heads are taken as uncorrelated.
    """
    heads = candidates[0].k_shift.shape[0]
    columns = o_proj.float().unflatten(1, (heads, -1)).transpose(0, 1)  # [H, hidden, g * D]
    gram = columns.transpose(1, 2) @ columns
    errors = torch.zeros(len(candidates), heads, dtype=torch.float64, device=o_proj.device)
    for window in windows:
        q, k, v = (x.to(o_proj.device) for x in window)
        exact = attend((q, k, v), (k, v), scale, sliding_window)
        for i, params in enumerate(candidates):
            errors[i] += attention_error((q, k, v), params, exact, gram, scale, sliding_window)
    return workers.sum(errors)
