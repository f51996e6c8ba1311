"""The kernels of learned weights against `weights.FakeQuantize` in torch: compiled on a GPU, interpreted on a CPU."""

import pytest
import torch
from interpreted import run_interpreted

pytest.importorskip("triton")

import triton_resources

from vllm_wkvquant import native_triton
from vllm_wkvquant.quantize import fused
from vllm_wkvquant.quantize.weights import FakeQuantize, _grid, group_range

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
kernels = pytest.mark.skipif(not ON_GPU and not native_triton.INTERPRETED, reason="runs in a process of its own")


@pytest.mark.skipif(ON_GPU or native_triton.INTERPRETED, reason="the kernels' tests run in this process")
def test_interpreted() -> None:
    run_interpreted(__file__, timeout=300)


@kernels
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("learned", ["offset", "ends", "weight"])
def test_is_that_of_torch(size: int, scale_dtype: torch.dtype, learned: str) -> None:
    """Clipped ranges, so that codes are clamped at both ends; a group of zeros, one all positive, one too small for
    the scale's type; a number of groups that fills no whole tile."""
    torch.manual_seed(0)
    weight = torch.randn(37, 3 * size) * torch.logspace(-3, 2, 37)[:, None]
    weight[0] = 0
    weight[1].abs_()
    weight[2] *= 1e-12
    weight[3, 0] = 1e4
    low, high = (0.6 * end for end in group_range(weight, size))
    offset = torch.rand(37, 3, size) - 0.5 if learned == "offset" else None
    inputs = [weight, low, high, *([] if offset is None else [offset])]
    exact = [x.clone().requires_grad_() for x in inputs]
    expected = FakeQuantize.apply(*(exact if offset is not None else [*exact, None]), scale_dtype)
    grad = torch.randn_like(weight)
    expected_grads = torch.autograd.grad(expected, exact, grad)

    _, step, zero_point = _grid(low, high, scale_dtype)
    on_device = [x if x is None else x.to(DEVICE) for x in (weight, low, step, zero_point, offset)]
    found = fused.forward(weight.to(DEVICE), *on_device[2:])
    torch.testing.assert_close(found.cpu(), expected.detach(), rtol=0, atol=0)
    grads = fused.backward(grad.to(DEVICE), *on_device, of_weight=learned == "weight")
    assert (grads[0] is None) == (learned != "weight")
    assert (grads[3] is None) == (learned != "offset")
    for a, b in zip(grads, expected_grads, strict=False):
        if a is not None:
            torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-4 * b.abs().max().item())


@pytest.mark.skipif(not ON_GPU, reason="torch sees no GPU")
def test_a_gpu_takes_the_kernels() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 256)
    low, high = group_range(weight, 128)
    results = []
    for device in ("cpu", "cuda"):
        inputs = [x.to(device).requires_grad_() for x in (weight, low, high, torch.full((64, 2, 128), 0.2))]
        out = FakeQuantize.apply(*inputs, torch.bfloat16)
        results.append([x.cpu() for x in (out, *torch.autograd.grad(out.square().sum(), inputs))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(native_triton.INTERPRETED, reason="compiled in the other process")
@pytest.mark.parametrize("arch", [80, 90])
def test_compiles_without_spills(arch: int) -> None:
    """For GPUs that need not be here, with all that is learned and with as little as may be."""
    shape = {"GROUP": 128, "ROWS": fused.TILE // 128}
    ranges = ["low", "step", "zero_point"]
    found = ["out", "of_weight", "of_low", "of_high", "of_offset"]
    types = dict.fromkeys(["grad", "weight", "offset", *ranges, *found], "*fp32")
    for kernel, absent in ((fused._forward, "offset"), (fused._backward, "of_weight"), (fused._backward, "of_offset")):
        compiled = triton_resources.compile_kernel(kernel, shape | {absent: None}, types, arch)
        assert triton_resources.usage(compiled)[1] == 0
