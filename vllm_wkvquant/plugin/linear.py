"""W4 layers where vLLM has no kernel for them: its library for CPUs without AVX-512 lacks `cpu_gemm_wna16`."""

import os

import torch
from torch import nn
from torch.nn.functional import linear
from vllm.logger import init_logger
from vllm.model_executor.kernels.linear import MPLinearKernel, MPLinearLayerConfig, register_linear_kernel
from vllm.platforms import current_platform

from vllm_wkvquant.checkpoint import unpack_weight

logger = init_logger("vllm.wkvquant")

WITHOUT_OP = ("CPUWNA16LinearKernel", "ZentorchWNA16LinearKernel")  # vLLM takes them for usable anyway


class DequantizedLinearKernel(MPLinearKernel):
    """Weights dequantized once, to 32 bits: these CPUs multiply numbers of 16 bits several times slower."""

    @classmethod
    def get_min_capability(cls) -> int:
        """Of a GPU; there is none."""
        return -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        """What `wkvquant quantize` writes: 4 bits with zero points."""
        return c.zero_points and c.weight_type.size_bits == 4, "only asymmetric 4-bit weights are dequantized"

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Put weight [out, in] in the place of its codes."""
        logger.warning_once(
            "vLLM has no kernel for 4-bit weights on a CPU without AVX-512: they are dequantized and take twice the "
            "memory of a 16-bit model's. The 4-bit KV cache is as on other CPUs."
        )
        w_q, w_s, w_zp = self._get_weight_params(layer)
        assert w_zp is not None
        in_size, out_size = self.config.partition_weight_shape
        tensors = {"weight_packed": w_q.data, "weight_scale": w_s.data, "weight_zero_point": w_zp.data}
        weight = unpack_weight(tensors | {"weight_shape": torch.tensor([out_size, in_size])})
        for name in (self.w_q_name, self.w_s_name, self.w_zp_name):
            delattr(layer, str(name))
        layer.register_parameter(self.w_q_name, nn.Parameter(weight, requires_grad=False))

    def apply_weights(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [.., in] -> [.., out]."""
        out = linear(x.float(), getattr(layer, self.w_q_name), None if bias is None else bias.float())
        return out.to(x.dtype)


def register() -> None:
    """Let vLLM choose this kernel rather than its own."""
    disabled = os.environ.get("VLLM_DISABLED_KERNELS", "").split(",")
    names = dict.fromkeys(filter(None, [*disabled, *WITHOUT_OP]))  # a child process inherits them
    os.environ["VLLM_DISABLED_KERNELS"] = ",".join(names)
    register_linear_kernel(DequantizedLinearKernel, current_platform._enum, "mp")
