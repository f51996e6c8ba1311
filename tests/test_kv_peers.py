"""The simulated caches of benchmarks/kv_peers.py: against vLLM's own kernels where it has them, else by definition.

The kernels run in Triton's interpreter, on the CPU, in exact fp32 (no fused multiply-add, no approximate division):
the whole write and the whole attention of int4_per_token_head, and TurboQuant's store and its dequantization of a
cached prefix. On a GPU vLLM rotates through a 16-bit tensor-core kernel instead of the butterfly that it has for the
CPU, which is the one this compares with. fp8 has no such peer: the interpreter and vLLM's CPU cache truncate.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import kv_peers
import pytest
import torch
from ckpt import write_checkpoint

from vllm_wkvquant import layout, reference
from vllm_wkvquant.checkpoint import Checkpoint
from vllm_wkvquant.evaluate import SimulatedCache, last_hidden, load_quantized
from vllm_wkvquant.reference import hadamard_matrix, key_shift_at, slow_pairs, value_shift_at

TOKENS, HEADS, KV_HEADS = 24, 4, 2
SIZES = {64: torch.float32, 96: torch.float32, 128: torch.bfloat16}


def case(size: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tokens of all sizes, with an outlier channel and a bias; one is zero, one constant, one has one channel."""
    g = torch.Generator().manual_seed(size)
    magnitude = torch.logspace(-4, 3, TOKENS)[:, None, None]
    kv = [magnitude * torch.randn(TOKENS, KV_HEADS, size, generator=g) for _ in range(2)]
    for x in kv:
        x[:, 0, 5] += 20
        x[4:8] += 3
        x[1:4] = 0
        x[2] = -2.5
        x[3, :, 7] = 9
    query = torch.randn(TOKENS, HEADS, size, generator=g)
    return {name: x.to(dtype) for name, x in zip(("query", "key", "value"), (query, *kv), strict=True)}


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, dict[str, torch.Tensor]]]:
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("vllm")
    torch.save({size: case(size, dtype) for size, dtype in SIZES.items()}, folder / "in.pt")
    command = [sys.executable, Path(__file__).parent / "vllm_kv.py", folder / "in.pt", folder / "out.pt"]
    subprocess.run(command, check=True, env=os.environ | {"TRITON_INTERPRET": "1"}, timeout=600)
    return torch.load(folder / "out.pt")


@pytest.mark.parametrize("size", SIZES)
def test_int4_stores_vllms_bytes(vllm, size: int) -> None:
    """Rotation, codes, scale and zero point: every bit."""
    inputs, stored = case(size, SIZES[size]), vllm[size]["int4"]
    assert torch.equal(kv_peers.int4_rotate(inputs["key"]), stored["rotated"])
    for name in ("key", "value"):
        codes, scale = kv_peers.int4_encode(inputs[name])
        even, odd = codes.unflatten(-1, (-1, 2)).unbind(-1)
        assert torch.equal(even | odd << 4, stored[f"{name[0]}_bytes"])
        assert torch.equal(scale.view(torch.int32), stored[f"{name[0]}_scale"].view(torch.int32))


@pytest.mark.parametrize("size", SIZES)
def test_int4_reads_what_vllm_reads(vllm, size: int) -> None:
    """Attention over the decoded keys and values is vLLM's over its bytes, the current token included."""
    inputs = case(size, SIZES[size])
    past = kv_peers.int4_per_token_head(inputs["key"], inputs["value"], torch.arange(TOKENS))
    ours = reference.past_only_attention(inputs["query"], *past, *past, size**-0.5)
    # a bf16 query is rotated and rounded in vLLM, and so is its output; values reach 3000
    tolerance = 1e-5 if SIZES[size] == torch.float32 else 2e-2
    theirs = vllm[size]["int4"]["out"].float()
    assert (ours - theirs).norm() < tolerance * theirs.norm()


@pytest.mark.parametrize("size", [64, 128])
def test_turboquant_returns_what_vllm_returns(vllm, size: int) -> None:
    """Every key and value, to the fp16 that vLLM's dequantization rounds to."""
    inputs, theirs = case(size, SIZES[size]), vllm[size]["turboquant"]
    keys = kv_peers.turboquant_keys(inputs["key"], theirs["centroids"])
    torch.testing.assert_close(keys.half(), theirs["k"], rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(kv_peers.turboquant_values(inputs["value"]).half(), theirs["v"], rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(kv_peers.lloyd_max(16) / size**0.5, theirs["centroids"], rtol=1e-3, atol=0)
    past, _ = kv_peers.turboquant_4bit_nc(inputs["key"], inputs["value"], torch.arange(TOKENS))
    ours = past @ reference.hadamard_matrix(size)
    assert (ours - theirs["k"]).norm() < 1e-3 * ours.norm()


def test_fp8_is_the_nearest_e4m3() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = values[values.isfinite()]
    x = torch.cat([case(64, torch.float32)["key"], 1e3 * torch.randn(3, KV_HEADS, 64)])
    past, _ = kv_peers.fp8(x, x, torch.arange(len(x)))
    distance = (x.clamp(-448, 448)[..., None] - values).abs().amin(-1)
    assert torch.equal((x.clamp(-448, 448) - past).abs(), distance)
    assert past.abs().max() == 448


def code(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Asymmetric, per token and head."""
    low, step = x.amin(-1, keepdim=True), (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / (2**bits - 1)
    return low.half().float() + ((x - low.half().float()) / step.half().float()).round() * step.half().float()


def test_variants_switch_off_what_they_say(tmp_path: Path) -> None:
    """Each against the formula of the cache, with the part in question left out."""
    window = 40
    ckpt = Checkpoint(write_checkpoint(tmp_path / "ckpt", layers=1, shift=2.0))
    p = ckpt.kv_params(0)
    positions = torch.arange(window)
    shift, value_shift = key_shift_at(positions, p), value_shift_at(positions, p)
    key = shift + torch.randn(shift.shape) * p.k_smooth
    value = value_shift + torch.randn(shift.shape)
    assert p.k_first is not None
    assert p.v_first is not None
    zero = torch.zeros_like(shift)
    first_only, value_first_only = zero.clone(), zero.clone()
    first_only[0], value_first_only[0] = p.k_first, p.v_first
    slow_only = key_shift_at(positions, replace(p, k_shift=p.k_shift * slow_pairs(p.rope_turns).repeat(2)))
    assert 0 < slow_pairs(p.rope_turns).sum() < 32
    fixed = shift[1:].mean(0).expand_as(shift).clone()
    fixed[0] = p.k_first
    unlike_first, value_unlike_first = shift.clone(), value_shift.clone()
    unlike_first[0], value_unlike_first[0] = p.k_shift, p.v_shift  # R_0 is the identity
    one, h, eye = torch.ones_like(p.k_smooth), hadamard_matrix(64), torch.eye(64)
    expected = {
        "kv4": (4, shift, value_shift, p.k_smooth, h),
        "kv3": (3, shift, value_shift, p.k_smooth, h),
        "kv2": (2, shift, value_shift, p.k_smooth, h),
        "kv4_no_past_only": (4, shift, value_shift, p.k_smooth, h),
        "kv4_no_hadamard": (4, shift, value_shift, p.k_smooth, eye),
        "kv4_no_smoothing": (4, shift, value_shift, one, h),
        "kv4_no_shift": (4, first_only, value_first_only, p.k_smooth, h),
        "kv4_slow_shift": (4, slow_only, value_shift, p.k_smooth, h),
        "kv4_static_shift": (4, fixed, value_shift, p.k_smooth, h),
        "kv4_no_first": (4, unlike_first, value_unlike_first, p.k_smooth, h),
    }
    variants = kv_peers.variants(ckpt, window, "cpu")
    assert [name for name in variants if name.startswith("kv")] == list(expected)
    for name, (bits, k_shift, v_shift, smooth, matrix) in expected.items():
        variant = variants[name]
        assert variant.layers is not None
        past_key, past_value = variant.layers[0](key, value, positions)
        exact = (code((key - k_shift) / smooth @ matrix, bits) @ matrix) * smooth + k_shift
        assert (past_key - exact).abs().max() < 1e-3, name
        assert (past_value - v_shift - code(value - v_shift, bits)).abs().max() < 1e-3, name
        assert variant.bits == bits + 0.5
        assert variant.chunk == (0 if name == "kv4_no_past_only" else 1)


def test_bits_count_the_bytes_of_each_format(tmp_path: Path) -> None:
    ckpt = Checkpoint(write_checkpoint(tmp_path / "ckpt", layers=6))
    bits = {name: v.bits for name, v in kv_peers.variants(ckpt, 32, "cpu").items()}
    elements = 2 * 64
    assert bits["W4"] == 16
    assert bits["kv4"] == layout.token_bytes(64) * 8 / elements
    assert bits["fp8"] == 8
    assert bits["int4_per_token_head"] == 2 * (64 // 2 + 4) * 8 / elements
    assert bits["turboquant_4bit_nc"] == (4 * 16 + 2 * (64 // 2 + 2 + 64 // 2 + 4) * 8 / elements) / 6


def test_vllms_caches_see_values_as_they_were(tmp_path: Path) -> None:
    """With H folded into v_proj, and TurboQuant's outer layers in 16 bits."""
    folded = Checkpoint(write_checkpoint(tmp_path / "folded", layers=5, section={"value_hadamard": True}))
    plain = Checkpoint(write_checkpoint(tmp_path / "plain", layers=5))
    positions, h = torch.arange(TOKENS), hadamard_matrix(64)
    key, value = (case(64, torch.float32)[n] for n in ("key", "value"))
    for name in ("fp8", "int4_per_token_head", "turboquant_4bit_nc"):
        ours, theirs = (kv_peers.variants(c, 32, "cpu")[name].layers[2] for c in (folded, plain))
        past_key, past_value = ours(key, value @ h, positions)
        expected_key, expected_value = theirs(key, value, positions)
        assert torch.equal(past_key, expected_key)
        # a value on the edge between two codes may take the other one
        assert ((past_value @ h - expected_value).abs() < 1e-4 * (1 + value.abs())).float().mean() > 0.99
    outer = kv_peers.variants(plain, 32, "cpu")["turboquant_4bit_nc"].layers
    assert [f is kv_peers.exact for f in outer] == [True, True, False, True, True]


@pytest.mark.parametrize("sliding_window", [None, 20])
@pytest.mark.parametrize("chunk", [0, 1, 7])
def test_a_cache_that_keeps_everything_changes_nothing(tmp_path: Path, chunk: int, sliding_window: int | None) -> None:
    ckpt = Checkpoint(write_checkpoint(tmp_path / "ckpt", sliding_window=sliding_window))
    cache = SimulatedCache(chunk=chunk)
    model = load_quantized(ckpt, cache, torch.float32, "cpu")
    tokens = torch.randint(0, 512, (50,)).tolist()
    own = last_hidden(model, tokens)
    cache.layers = [kv_peers.exact] * 3
    torch.testing.assert_close(last_hidden(model, tokens), own, atol=1e-4, rtol=1e-4)
    cache.layers = [kv_peers.int4_per_token_head] * 3
    assert (last_hidden(model, tokens) - own).abs().max() > 1e-2
