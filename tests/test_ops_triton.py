"""The Triton kernels against the specification: tests of test_ops_cuda.py, compiled on a GPU, interpreted on a CPU."""

import logging
from dataclasses import replace
from pathlib import Path

import cases
import pytest
import test_ops_cuda
import torch
from interpreted import run_interpreted

pytest.importorskip("triton")

import triton_resources

from vllm_wkvquant import layout, native_cuda, native_triton, ops
from vllm_wkvquant.reference import KVParams

ON_GPU = torch.cuda.is_available()
kernels = pytest.mark.skipif(not ON_GPU and not native_triton.INTERPRETED, reason="runs in a process of its own")
gpu = pytest.mark.skipif(not ON_GPU, reason="torch sees no GPU")


def some(full: list, few: list) -> list:
    """Values of a parameter: the interpreter takes a second for what is nothing on a GPU."""
    return full if ON_GPU else few


@pytest.fixture
def triton():
    """test_ops_cuda.py with these kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_ops_cuda, "native_cuda", native_triton)
        patch.setattr(test_ops_cuda, "VARIANT", "triton")
        if not ON_GPU:
            patch.setattr(torch.Tensor, "cuda", lambda self: self.clone())
            patch.setattr(KVParams, "to", lambda self, device: self)
            patch.setattr(test_ops_cuda, "to_gpu", lambda case: case)
            patch.setattr(native_triton, "WRITE_ROWS", 128)  # fewer programs
        yield


@pytest.mark.skipif(ON_GPU or native_triton.INTERPRETED, reason="the kernels' tests run in this process")
def test_interpreted():
    run_interpreted(__file__, timeout=600)


@kernels
@pytest.mark.parametrize("head_size", layout.HEAD_SIZES)
@pytest.mark.parametrize("group", some([1, 3, 4, 7, 8, 16], [7]))
def test_heads(triton, head_size, group):
    test_ops_cuda.test_heads(head_size, group)


@kernels
@pytest.mark.parametrize("group", [1, 16, 20])
def test_group(triton, group):
    """A tile has 16 rows, 32, or those of a larger group."""
    case = cases.make_case([(70, 1), (9, 3)], cases.make_params(1, 64), group=group, dtype=torch.float16)
    test_ops_cuda.check(case)


@gpu
@pytest.mark.parametrize("dtype", list(test_ops_cuda.TOLERANCE))
@pytest.mark.parametrize("block_size", [16, 32, 48, 64, 128])
def test_page_boundaries(triton, dtype, block_size):
    test_ops_cuda.test_page_boundaries(dtype, block_size)


@kernels
def test_few_page_boundaries(triton):
    lengths = [(n, 1) for n in (0, 1, 47, 48, 63, 64, 65, 257)]
    test_ops_cuda.check(cases.make_case(lengths, cases.make_params(1, 128), block_size=48))


@kernels
@pytest.mark.parametrize("kind", ["rotating", "static", "none"])
@pytest.mark.parametrize("hadamard", [True, False])
@pytest.mark.parametrize("head_size", some(list(layout.HEAD_SIZES), [80]))
def test_parameters(triton, kind, hadamard, head_size):
    test_ops_cuda.test_parameters(kind, hadamard, head_size)


@kernels
@pytest.mark.parametrize(
    ("rotary_dim", "base", "scaling"),
    some([(32, 1e4, 1.0), (64, 1e6, 1.0), (128, 5e5, 1.35), (8, 1e4, 1.0)], [(8, 1e4, 1.35)]),
)
def test_rotary(triton, rotary_dim, base, scaling):
    test_ops_cuda.test_rotary(rotary_dim, base, scaling)


@kernels
@pytest.mark.parametrize("query_len", some([1, 2, 3, 5, 8, 9, 33, 130], [3, 9]))
@pytest.mark.parametrize("group", some([1, 4, 7], [3]))
def test_query_len(triton, query_len, group):
    test_ops_cuda.test_query_len(query_len, group)


@gpu
@pytest.mark.parametrize("window", [1, 2, 30, 128, 129, 400])
@pytest.mark.parametrize("query_len", [1, 4, 20])
def test_sliding_window(triton, window, query_len):
    test_ops_cuda.test_sliding_window(window, query_len)


@kernels
@pytest.mark.parametrize("window", [1, 30, 129])
def test_few_sliding_windows(triton, window):
    case = cases.make_case([(n, 4) for n in (5, 127, 300)], cases.make_params(1, 64), dtype=torch.float16)
    test_ops_cuda.check(case, sliding_window=window)


@kernels
def test_pages_before_a_window_may_be_gone(triton):
    """Their entries in the table name another sequence's pages or none, and bytes there may be any."""
    case = cases.make_case([(300, 1), (90, 1)], cases.make_params(2, 64), dtype=torch.float16, block_size=16)
    case.block_table[0, : (300 - 50 + 1) // 16] = -1
    test_ops_cuda.check(case, sliding_window=50)


@gpu
@pytest.mark.parametrize("head_size", layout.HEAD_SIZES)
def test_heads_with_a_sliding_window(triton, head_size):
    test_ops_cuda.test_heads_with_a_sliding_window(head_size, 4)


@gpu
@pytest.mark.parametrize("past", [8191, 131071])
@pytest.mark.parametrize("dtype", list(test_ops_cuda.TOLERANCE))
def test_long_with_large_shift(triton, past, dtype):
    test_ops_cuda.test_long_with_large_shift(past, dtype)


@kernels
@pytest.mark.parametrize("largest", some([7000, 32000, 60000], [60000]))
def test_large_values(triton, largest):
    test_ops_cuda.test_large_values(largest)


@kernels
def test_score_of_the_shift(triton):
    test_ops_cuda.test_score_of_the_shift()


@gpu
@pytest.mark.parametrize("heads", [1, 8])
def test_many_sequences(triton, heads):
    test_ops_cuda.test_many_sequences(heads)


@kernels
def test_requests_without_tokens(triton):
    test_ops_cuda.test_requests_without_tokens()


@kernels
def test_parts(triton, monkeypatch):
    """A past in parts gives what it gives as a whole, and parts are used."""
    case = test_ops_cuda.to_gpu(cases.make_case([(1300, 1), (40, 1)], cases.make_params(1, 64), dtype=torch.float16))
    assert native_triton._parts(2, 20, case.block_table, case.kv_cache) == 8
    split = test_ops_cuda.run(native_triton.paged_attention, case)
    monkeypatch.setattr(native_triton, "MAX_PARTS", 1)
    whole = test_ops_cuda.run(native_triton.paged_attention, case)
    for a, b in zip(split, whole, strict=True):
        assert (a[:2] - b[:2]).abs().max() < 2e-3


@kernels
@pytest.mark.parametrize("head_size", layout.HEAD_SIZES)
@pytest.mark.parametrize("dtype", some(list(test_ops_cuda.TOLERANCE), [torch.bfloat16]))
@pytest.mark.parametrize("hadamard", some([True, False], [True]))
def test_cache_write(triton, head_size, dtype, hadamard):
    test_ops_cuda.test_cache_write(head_size, dtype, hadamard)


@gpu
@pytest.mark.parametrize("head_size", layout.HEAD_SIZES)
@pytest.mark.parametrize("dtype", list(test_ops_cuda.TOLERANCE))
def test_gather(triton, head_size, dtype):
    test_ops_cuda.test_gather(head_size, dtype)


@kernels
@pytest.mark.parametrize(("kind", "hadamard", "head_size"), [("rotating", True, 80), ("static", False, 64)])
def test_parameters_of_a_gather(triton, kind, hadamard, head_size):
    params = cases.make_params(2, head_size, kind=kind, hadamard=hadamard)
    test_ops_cuda.check_gather(cases.make_case([(100, 4), (33, 20)], params, group=1, dtype=torch.float16))


@kernels
@pytest.mark.parametrize("block_size", [16, 48])
def test_gather_pieces(triton, block_size):
    test_ops_cuda.test_gather_pieces(block_size)


@kernels
def test_gather_of_large_numbers(triton):
    test_ops_cuda.test_gather_of_large_numbers()


@kernels
def test_nothing_to_do(triton):
    """No token, no sequence: nothing is launched, nothing is written."""
    case = test_ops_cuda.to_gpu(cases.make_case([(9, 1)], cases.make_params(1, 64)))
    case.seq_lens, case.query_start_loc = case.seq_lens[:0], case.query_start_loc[:1]
    out, lse = test_ops_cuda.run(native_triton.paged_attention, case)
    assert out.isnan().all()
    assert (lse == 7).all()


@gpu
def test_repeats_bit_for_bit(triton):
    test_ops_cuda.test_repeats_bit_for_bit()


@gpu
@pytest.mark.parametrize(("query_len", "dtype"), [(1, torch.float16), (3, torch.bfloat16)])
def test_graph_replay(triton, query_len, dtype):
    test_ops_cuda.test_graph_replay(query_len, dtype)


@kernels
def test_renewed_tables(triton):
    test_ops_cuda.test_renewed_tables()


def test_refusals(triton):
    case = cases.make_case([(20, 1)], cases.make_params(2, 64))
    if not native_triton.INTERPRETED:
        with pytest.raises(ValueError, match="on cpu; the Triton kernels run on a GPU"):
            test_ops_cuda.run(native_triton.paged_attention, case)
        return
    with pytest.raises(ValueError, match="kv_cache must be"):
        test_ops_cuda.run(native_triton.paged_attention, replace(case, kv_cache=case.kv_cache[:, :1]))


@pytest.fixture
def choose(monkeypatch):
    """default_variant of a GPU: (capability, shared memory, whether the CUDA kernels are built, head size) -> name."""

    def not_built():
        raise FileNotFoundError("not built")

    def default(capability, shared, built, head_size):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(native_cuda, "_shared_memory", lambda device: shared << 10)
        monkeypatch.setattr(native_cuda, "library", lambda: built or not_built())
        monkeypatch.setattr(native_cuda, "architectures", lambda: ["80", "90a"])
        ops.default_variant.cache_clear()
        return ops.default_variant("cuda", head_size)

    yield default
    ops.default_variant.cache_clear()


@pytest.mark.parametrize(
    ("capability", "shared", "built", "head_size", "variant"),
    [
        ((9, 0), 227, True, 128, "cuda"),
        ((9, 0), 227, True, 256, "cuda"),
        ((9, 0), 227, True, 80, "triton"),
        ((9, 0), 227, False, 128, "triton"),
        ((8, 0), 163, True, 256, "cuda"),
        ((8, 6), 99, True, 128, "cuda"),
        ((8, 9), 99, True, 256, "triton"),
        ((10, 0), 227, True, 128, "triton"),
        ((12, 0), 99, True, 128, "triton"),
        ((7, 5), 64, False, 128, "reference"),
    ],
)
def test_default(choose, capability, shared, built, head_size, variant):
    assert choose(capability, shared, built, head_size) == variant


def test_slower_kernels_are_warned_of(choose, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("vllm.wkvquant"), "propagate", True)
    with caplog.at_level(logging.WARNING, "vllm.wkvquant"):
        assert choose((9, 0), 227, False, 128) == "triton"
    (warning,) = [r.getMessage() for r in caplog.records]
    assert warning == "4-bit KV cache on cuda: Triton's kernels, which are slow; faster ones: not built"


def test_a_build_that_is_missing_is_named(monkeypatch):
    """With what builds it, in any kind of installation."""
    monkeypatch.setattr(native_cuda, "LIBRARY", Path("nothing.so"))
    native_cuda.library.cache_clear()
    assert native_cuda.refusal(128) == (
        "nothing.so is not built; build it with `WKVQUANT_CUDA=1 pip install --force-reinstall --no-deps .` in a "
        "checkout of vllm-wkvquant, with nvcc on PATH"
    )


def test_default_without_triton(choose, monkeypatch):
    monkeypatch.setattr(ops, "native_triton", None)
    assert choose((9, 0), 227, False, 128) == "reference"


@pytest.mark.skipif(native_triton.INTERPRETED, reason="Triton interprets")
def test_compiles():
    """Without a GPU, too; a CTA must find its shared memory on sm_86, which has 99 KiB."""
    for kernel in triton_resources.kernels(80, torch.bfloat16, 80).values():
        assert ".target sm_80" in kernel.asm["ptx"]
        assert kernel.metadata.shared <= 99 << 10
