"""W4 layers on CPUs for which vLLM has no kernel: the plugin's own, on any CPU."""

import os

import pytest
import torch
from torch import nn
from vllm.model_executor.kernels.linear import MPLinearLayerConfig
from vllm.scalar_type import scalar_types

from vllm_wkvquant import plugin
from vllm_wkvquant.checkpoint import pack_weight
from vllm_wkvquant.plugin import linear

OUT, IN, GROUP = 48, 128, 32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_products_are_those_of_the_dequantized_weight(dtype: torch.dtype, bias: bool) -> None:
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (OUT, IN), generator=g, dtype=torch.uint8)
    zero = torch.randint(0, 16, (OUT, IN // GROUP), generator=g, dtype=torch.uint8)
    scale = (torch.rand(OUT, IN // GROUP, generator=g) / 16 + 1e-3).to(dtype)
    layer = nn.Module()
    for name, tensor in pack_weight(codes, scale, zero).items():
        layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    config = MPLinearLayerConfig((IN, OUT), (IN, OUT), scalar_types.uint4, dtype, GROUP, zero_points=True)
    kernel = linear.DequantizedLinearKernel(config, "weight_packed", "weight_scale", "weight_zero_point")
    kernel.process_weights_after_loading(layer)
    x = torch.randn(5, IN, generator=g).to(dtype)
    b = torch.randn(OUT, generator=g).to(dtype) if bias else None
    steps = scale.double().repeat_interleave(GROUP, 1)
    weight = (codes.double() - zero.double().repeat_interleave(GROUP, 1)) * steps
    expected = x.double() @ weight.T + (0 if b is None else b.double())
    out = kernel.apply_weights(layer, x, b)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


def test_symmetric_weights_are_left_to_others() -> None:
    config = MPLinearLayerConfig((IN, OUT), (IN, OUT), scalar_types.uint4b8, torch.bfloat16, GROUP, zero_points=False)
    can, why = linear.DequantizedLinearKernel.can_implement(config)
    assert not can
    assert why


def test_kernels_that_cannot_run_are_not_chosen() -> None:
    """And those that can are: with the op, vLLM's own."""
    plugin.register()
    disabled = os.environ.get("VLLM_DISABLED_KERNELS", "").split(",")
    assert plugin.lacks_w4_kernel() == (not torch.cpu._is_avx512_supported())
    assert (set(linear.WITHOUT_OP) <= set(disabled)) == plugin.lacks_w4_kernel()
