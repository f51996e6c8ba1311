"""The specification itself: its identities in float64, its angles against exact integers."""

import math
from dataclasses import replace

import pytest
import torch
from cases import make_case, make_params, run_attention

from vllm_wkvquant import reference
from vllm_wkvquant.config import KVCacheConfig, RopeConfig
from vllm_wkvquant.layout import HEAD_SIZES
from vllm_wkvquant.reference import KVParams


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_hadamard(head_size: int) -> None:
    """Orthonormal, symmetric, blocks of the largest power of two that divides the size."""
    h = reference.hadamard_matrix(head_size, torch.float64)
    n = reference.hadamard_block(head_size)
    assert head_size % n == 0
    assert (head_size // n) % 2 == 1
    assert torch.allclose(h @ h, torch.eye(head_size, dtype=torch.float64), atol=1e-12)
    assert torch.equal(h, h.T)
    outside = torch.block_diag(*[torch.ones(n, n)] * (head_size // n)) == 0
    assert not h[outside].any()
    assert torch.allclose(h[~outside].abs(), torch.tensor(n**-0.5, dtype=torch.float64))


def test_angles_against_integers() -> None:
    """Angles at positions up to 128k are inv_freq * position modulo one turn, within 1e-5 rad.

    The oracle works with Python integers: inv_freq as the exact fraction that its double is, and pi to 60 digits.
    """
    pi_digits = 314159265358979323846264338327950288419716939937510582097494
    scale = 10**59
    positions = [0, 1, 2, 17, 4095, 32768, 131071]
    inv_freq = [1.0, *[5e5 ** (-2 * j / 128) for j in range(1, 64)]]
    angles = reference.rope_angles(torch.tensor(positions), reference.rope_turns(inv_freq))
    for i, position in enumerate(positions):
        for j, frequency in enumerate(inv_freq):
            numerator, denominator = frequency.as_integer_ratio()
            turn = 2 * pi_digits
            rest = (position * numerator * scale) % (turn * denominator)  # angle * scale * denominator
            exact = rest / (denominator * scale)
            error = (angles[i, j].item() - exact + math.pi) % (2 * math.pi) - math.pi
            assert abs(error) < 1e-5, (position, frequency)


def test_angles_wrap_together() -> None:
    """A write and a read of one position use bit-identical angles, in any batch."""
    turns = reference.rope_turns([1.0, 0.3, 1e-4])
    positions = torch.arange(130000, 131072)
    assert torch.equal(
        reference.rope_angles(positions, turns)[500], reference.rope_angles(positions[500:501], turns)[0]
    )


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize(("kind", "partial"), [("rotating", False), ("rotating", True), ("static", False)])
def test_score_identity(head_size: int, kind: str, partial: bool) -> None:
    """q . k = H (q s) . H ((k - R delta) / s) + q . R delta, for the key and for its codes."""
    g = torch.Generator().manual_seed(0)
    params = make_params(2, head_size, kind=kind, rotary_dim=head_size // 2 if partial else None, scaling=1.3)
    positions = torch.tensor([0, 5, 100000])
    q, k = (torch.randn(3, 2, head_size, generator=g, dtype=torch.float64) for _ in range(2))
    h = reference.hadamard_matrix(head_size, torch.float64)
    smooth, shift = params.k_smooth.double(), reference.key_shift_at(positions, params, torch.float64)
    query, key = (q * smooth) @ h, ((k - shift) / smooth) @ h
    assert torch.allclose((q * k).sum(-1), (query * key).sum(-1) + (q * shift).sum(-1), atol=1e-9)
    codes, scale, minimum = reference.quantize_tokens(key)
    dequantized = reference.dequantize_tokens(codes, scale, minimum, torch.float64)
    past = (dequantized @ h) * smooth + shift
    direct = scale.double() * (query * codes).sum(-1) + minimum.double() * query.sum(-1) + (q * shift).sum(-1)
    assert torch.allclose((q * past).sum(-1), direct, atol=1e-9)


def test_rotation_is_neox() -> None:
    """Channel j pairs with j + rotary_dim / 2; channels behind the rotary dimension do not move; scaling is applied."""
    turns = reference.rope_turns([0.5])
    x = torch.tensor([[[1.0, 0.0, 3.0]]])
    out = reference.rotate(x, torch.tensor([2]), turns, 2.0)
    assert torch.allclose(out, torch.tensor([[[2 * math.cos(1.0), 2 * math.sin(1.0), 3.0]]]))


def test_first_position_has_its_own_shift() -> None:
    """A sink far from all other tokens, but where it is expected, costs position 0 nothing; without it, much."""
    params = make_params(2, 64)
    positions = torch.tensor([0, 1])
    far = torch.tensor([1.0, 0.0])[:, None, None]
    params = replace(params, k_first=params.k_shift + 500, v_first=params.v_shift - 30)
    key = reference.key_shift_at(positions, replace(params, k_first=None, v_first=None)) + 500 * far
    value = params.v_shift - 30 * far + 0.01 * torch.randn(2, 2, 64)
    k, v = reference.fake_quantize(key, value, positions, params)
    torch.testing.assert_close(k, key, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(v, value, atol=5e-3, rtol=0)
    plain = replace(params, k_first=None, v_first=None, v_shift=torch.zeros_like(params.v_shift))
    k, _ = reference.fake_quantize(key, value, positions, plain)
    assert (k - key)[0].abs().max() > 0.05
    assert torch.equal(reference.value_shift_at(positions, params)[1], params.v_shift)


@pytest.mark.parametrize("kind", ["static", "none"])
def test_shift_without_rotation(kind: str) -> None:
    """A static shift is the same at every position but the first, and no shift is zero."""
    params = make_params(2, 64, kind=kind)
    shift = reference.key_shift_at(torch.tensor([1, 77777]), params)
    assert torch.equal(shift[0], shift[1])
    assert torch.equal(shift[0], params.k_shift)
    assert bool(shift.any()) == (kind == "static")


def test_params_from_config() -> None:
    """`KVParams.build` takes angles and scaling only for a rotating shift."""
    for kind in ("rotating", "static", "none"):
        rope = RopeConfig((1.0,) * 32, 64, 1.2)
        config = KVCacheConfig(64, 2, 1, kind, True, True, rope)
        params = KVParams.build(config, *[torch.ones(2, 64)] * 3)
        assert (params.rope_turns is not None) == (kind == "rotating")
        assert params.rope_scaling == (1.2 if kind == "rotating" else 1.0)


def test_quantize_range() -> None:
    """Codes use 0 and 15, errors stay within half a step, constant rows are exact up to fp16, huge rows stay finite."""
    x = torch.randn(50, 2, 64, generator=torch.Generator().manual_seed(0))
    codes, scale, minimum = reference.quantize_tokens(x)
    assert codes.amin(-1).eq(0).all()
    assert codes.amax(-1).eq(15).all()
    error = (reference.dequantize_tokens(codes, scale, minimum) - x).abs().amax(-1)
    assert bool((error <= 0.5 * scale.float() + 4e-3 * x.abs().amax(-1)).all())
    constant = reference.dequantize_tokens(*reference.quantize_tokens(torch.full((1, 1, 64), 0.75)))
    assert torch.equal(constant, torch.full((1, 1, 64), 0.75))
    huge = reference.dequantize_tokens(*reference.quantize_tokens(1e6 * x))
    assert bool(huge.isfinite().all())


def test_past_only_mask() -> None:
    """Chunk 1 leaves the diagonal, a chunk of the whole length leaves everything, 2 leaves blocks of two."""
    assert torch.equal(reference.past_only_mask(4), torch.eye(4, dtype=torch.bool))
    assert bool(reference.past_only_mask(4, 4).all())
    assert reference.past_only_mask(3, 2).tolist() == [[True, True, False], [True, True, False], [False, False, True]]


@pytest.mark.parametrize(("chunk", "window"), [(1, 0), (4, 0), (5, 3)])
def test_past_only_attention_is_the_op(chunk: int, window: int) -> None:
    """Attention of a whole sequence under the mask is what the paged op gives chunk after chunk."""
    params = make_params(2, 64)
    length = 23
    case = make_case([(0, length)], params, group=2, block_size=16)
    positions = torch.arange(length)
    key, value = case.key[:length], case.value[:length]
    past = reference.fake_quantize(key, value, positions, params)
    whole = reference.past_only_attention(case.query[:length], key, value, *past, case.scale, chunk, window)
    slots = case.block_table[0].long()[positions // 16] * 16 + positions % 16
    query = case.query
    for first in range(0, length, chunk):
        n = min(chunk, length - first)
        case.query, case.key, case.value = query[first : first + n], key[first : first + n], value[first : first + n]
        case.seq_lens = torch.tensor([first + n], dtype=torch.int32)
        case.query_start_loc = torch.tensor([0, n], dtype=torch.int32)
        out, _ = run_attention(reference.paged_attention, case, sliding_window=window)
        assert torch.allclose(out, whole[first : first + n], atol=2e-5)
        step = slice(first, first + n)
        reference.cache_write(key[step], value[step], case.kv_cache, slots[step], positions[step], params)
