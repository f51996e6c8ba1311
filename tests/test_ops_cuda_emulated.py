"""A part of test_ops_cuda.py with the CUDA kernels run by the CPU (tests/emulation), for machines without a GPU."""

import contextlib
import ctypes
import shutil
from types import SimpleNamespace

import cases
import pytest
import test_ops_cuda
import torch
from emulation.build import build

from vllm_wkvquant import native_cuda
from vllm_wkvquant.reference import KVParams

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="the headers of nvcc are needed")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_cuda, "LIBRARY", build(tmp_path_factory.mktemp("emulation")))
        patch.setattr(native_cuda, "_num_sms", lambda device: 3)
        patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        patch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
        patch.setattr(torch.Tensor, "cuda", lambda self: self.clone())
        patch.setattr(KVParams, "to", lambda self, device: self)
        patch.setattr(test_ops_cuda, "to_gpu", lambda case: case)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        patch.setattr(native_cuda, "_workspaces", {})
        patch.setattr(native_cuda, "_spares", {})
        patch.setattr(native_cuda, "_shared_memory", lambda device: 227 << 10)
        native_cuda.library.cache_clear()
        yield
        native_cuda.library.cache_clear()


@pytest.mark.parametrize("head_size", native_cuda.HEAD_SIZES)
@pytest.mark.parametrize("group", [1, 4, 7, 16])
def test_heads(emulated, head_size, group):
    test_ops_cuda.test_heads(head_size, group)


@pytest.mark.parametrize("block_size", [16, 48, 64])
def test_page_boundaries(emulated, block_size):
    test_ops_cuda.test_page_boundaries(torch.float32, block_size)


@pytest.mark.parametrize("kind", ["rotating", "static", "none"])
def test_parameters(emulated, kind):
    test_ops_cuda.test_parameters(kind, True, 96)


@pytest.mark.parametrize("hadamard", [True, False])
def test_outliers_of_a_query(emulated, hadamard):
    test_ops_cuda.test_outliers_of_a_query(8, hadamard)


@pytest.mark.parametrize("window", [1, 30, 129])
def test_sliding_window(emulated, window):
    test_ops_cuda.test_sliding_window(window, 4)


@pytest.mark.parametrize(("head_size", "group"), [(64, 8), (96, 4), (128, 1), (256, 8)])
def test_heads_with_a_sliding_window(emulated, head_size, group):
    test_ops_cuda.test_heads_with_a_sliding_window(head_size, group)


def test_pages_before_a_window_may_be_gone(emulated):
    """Their entries in the table name another sequence's pages or none, and bytes there may be any."""
    case = cases.make_case([(300, 1), (90, 1)], cases.make_params(2, 64), dtype=torch.float16, block_size=16)
    case.block_table[0, : (300 - 50 + 1) // 16] = -1
    test_ops_cuda.check(case, sliding_window=50)


def test_query_len(emulated):
    test_ops_cuda.test_query_len(9, 4)


@pytest.mark.parametrize("head_size", native_cuda.HEAD_SIZES)
def test_gather(emulated, head_size):
    test_ops_cuda.test_gather(head_size, torch.bfloat16)


@pytest.mark.parametrize("block_size", [16, 48])
def test_gather_pieces(emulated, block_size):
    test_ops_cuda.test_gather_pieces(block_size)


@pytest.mark.parametrize(("kind", "hadamard"), [("rotating", False), ("static", True), ("none", True)])
def test_parameters_of_a_gather(emulated, kind, hadamard):
    test_ops_cuda.test_parameters_of_a_gather(kind, hadamard, 256)


def test_rotary_of_a_gather(emulated):
    test_ops_cuda.test_rotary_of_a_gather(12, 1e4, 1.35)


def test_gather_far_from_the_start(emulated):
    test_ops_cuda.test_gather_far_from_the_start()


def test_gather_of_large_numbers(emulated):
    test_ops_cuda.test_gather_of_large_numbers()


@pytest.mark.parametrize("group", [1, 4])
def test_long(emulated, group):
    test_ops_cuda.test_long(group, "rotating")


@pytest.mark.parametrize("count", [1, 3, 6, 20])
def test_equal_sequences(emulated, count):
    test_ops_cuda.test_equal_sequences(count)


@pytest.mark.parametrize(("heads", "parts"), [(1, 6), (2, 3), (3, 2)])
@pytest.mark.parametrize("group", [4, 8])
def test_parts_of_an_item(emulated, heads, parts, group):
    test_ops_cuda.test_parts_of_an_item(heads, parts, group)


def test_many_parts_of_an_item(emulated, monkeypatch):
    monkeypatch.setattr(native_cuda, "_num_sms", lambda device: 12)
    for parts in (10, 11, 16, 17, 24):
        test_ops_cuda.test_parts_of_an_item(1, parts, 4)


@pytest.mark.parametrize("query_len", [1, 3, 9])
def test_one_plan_serves_all_layers(emulated, query_len):
    test_ops_cuda.test_one_plan_serves_all_layers(query_len)


@pytest.mark.parametrize("seqs", [1, 40, 1100])
def test_positions(emulated, seqs):
    test_ops_cuda.test_positions(seqs)


def test_a_plan_that_does_not_fit_is_refused(emulated):
    test_ops_cuda.test_a_plan_that_does_not_fit_is_refused()


def test_work_that_cannot_be_counted_is_refused(emulated):
    test_ops_cuda.test_work_that_cannot_be_counted_is_refused()


@pytest.mark.parametrize(("head_size", "group"), [(64, 1), (128, 3), (256, 7)])
@pytest.mark.parametrize(("seqs", "tokens"), [(7, 300), (40, 40), (20, 64), (3, 4)])
def test_no_step_is_more_work_than_was_checked(emulated, monkeypatch, head_size, group, seqs, tokens):
    planner, checked = native_cuda.Planner([cases.make_params(2, head_size)], 2 * group), []
    most_work = planner._most_work
    monkeypatch.setattr(planner, "_most_work", lambda *args: checked.append(most_work(*args)) or checked[-1])
    planner.check_steps(seqs, tokens, 1000)
    for n in range(1, seqs + 1):
        assert max(most_work(n, t, 1000, -(-t // n)) for t in range(n, tokens + 1)) <= max(checked)


@pytest.mark.parametrize("window", [0, 1, 34, 66])
@pytest.mark.parametrize(("head_size", "group"), [(64, 1), (128, 3), (128, 8), (256, 7)])
def test_work_is_bounded(emulated, window, head_size, group):
    test_ops_cuda.test_work_is_bounded(window, head_size, group)


def test_more_sequences_than_threads(emulated):
    test_ops_cuda.test_more_sequences_than_threads()


def test_rotary(emulated):
    test_ops_cuda.test_rotary(32, 1e4, 1.35)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_long_with_large_shift(emulated, dtype):
    test_ops_cuda.test_long_with_large_shift(8191, dtype)


@pytest.mark.parametrize("largest", [7000, 32000, 60000])
def test_large_values(emulated, largest):
    test_ops_cuda.test_large_values(largest)


def test_score_of_the_shift(emulated):
    test_ops_cuda.test_score_of_the_shift()


def test_requests_without_tokens(emulated):
    test_ops_cuda.test_requests_without_tokens()


@pytest.mark.parametrize("head_size", native_cuda.HEAD_SIZES)
def test_cache_write(emulated, head_size):
    test_ops_cuda.test_cache_write(head_size, torch.bfloat16, True)


def test_renewed_tables(emulated):
    test_ops_cuda.test_renewed_tables()


def test_tables_of_another_shape_are_refused(emulated):
    test_ops_cuda.test_tables_of_another_shape_are_refused()


def test_capture_without_a_reserved_workspace_is_refused(emulated, monkeypatch):
    test_ops_cuda.test_capture_without_a_reserved_workspace_is_refused(monkeypatch)


def test_reserve(emulated, monkeypatch):
    """A capture takes a spare workspace, a stream keeps its own, and too many sequences are refused."""
    case = cases.make_case([(20, 1)], cases.make_params(1, 64))
    device = case.params.k_smooth.device
    monkeypatch.setattr(native_cuda, "_spares", {})
    monkeypatch.setattr(native_cuda, "_workspaces", {})
    native_cuda.reserve(case.params, 4096)
    native_cuda.reserve(case.params, 4096)
    own, spares = native_cuda._workspaces[device, 0], list(native_cuda._spares[device])
    assert len(spares) == native_cuda.SPARES
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    test_ops_cuda.check(case)
    assert native_cuda._workspace(device, 0) is own
    assert native_cuda._workspace(device, 1) is spares.pop()
    assert native_cuda._workspace(device, 2) is spares.pop()
    with pytest.raises(RuntimeError, match="reserve"):
        native_cuda._workspace(device, 3)
    with pytest.raises(ValueError, match=r"take 4096 sequences.*--max-num-seqs"):
        native_cuda.reserve(case.params, 4097)
    # spares that captures took are made anew, but not within one; a further stream gets a workspace on its first call
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=4))
    native_cuda.reserve(case.params, 1)
    assert not native_cuda._spares[device]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    native_cuda.reserve(case.params, 1)
    assert len(native_cuda._spares[device]) == native_cuda.SPARES
    assert {stream for _, stream in native_cuda._workspaces} == {0, 1, 2}


def test_rows_far_apart_are_refused(emulated):
    test_ops_cuda.test_rows_far_apart_are_refused()


def test_structs(emulated):
    lib = native_cuda.library()
    for i, struct in enumerate(native_cuda.STRUCTS):
        assert lib.wkvquant_cuda_sizeof(i) == ctypes.sizeof(struct)


def test_library_of_another_version(emulated, monkeypatch):
    """Its structs have other sizes: it is not called."""
    with monkeypatch.context() as patch:
        patch.setattr(native_cuda, "STRUCTS", native_cuda.STRUCTS[1:])
        native_cuda.library.cache_clear()
        assert native_cuda.refusal(128) == (
            f"emulated.so was built from another version: rebuild it with {native_cuda.BUILD}"
        )
    native_cuda.library.cache_clear()
    assert native_cuda.library()


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (["80", "90a"], (8, 0), True),
        (["80", "90a"], (8, 9), True),
        (["86"], (8, 0), False),
        (["80", "90a"], (9, 0), True),
        (["80"], (9, 0), False),
        (["100a"], (10, 3), False),
        (["100f"], (10, 3), True),
        (["100a", "120"], (12, 1), True),
        (["90a"], (12, 0), False),
    ],
)
def test_architectures(emulated, archs, capability, runs, monkeypatch):
    """Code runs on newer compute capabilities of the same major one, but for the `a` kind."""
    assert native_cuda.architectures() == ["80", "90a"]
    monkeypatch.setattr(native_cuda, "architectures", lambda: archs)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert (native_cuda.refusal(128) is None) == runs


def test_another_gpu_is_refused_by_name(emulated, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 0))
    assert native_cuda.refusal(128) == (
        "emulated.so has code for sm_80, sm_90a, none for this GPU's sm_120: rebuild it with `WKVQUANT_CUDA=1 "
        "WKVQUANT_CUDA_ARCHS=120 pip install --force-reinstall --no-deps .` in a checkout of vllm-wkvquant, with nvcc "
        "on PATH"
    )
