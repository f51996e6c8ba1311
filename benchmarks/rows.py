"""What the benchmarks of all devices share: the row they print and the inputs they make."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from vllm_wkvquant import reference
from vllm_wkvquant.reference import KVParams

HEADS, HEAD_SIZE = 32, 128
DTYPE = torch.bfloat16
PER_HEAD = ("k_smooth", "k_shift", "v_shift", "k_first", "v_first")


@dataclass(kw_only=True)
class Row:
    """One line of output; what does not apply to it is None and left out.

    us: median time of a call; bytes: what the op must at least move; ratio_to_*: the peer's time over this one's.
    """

    op: str
    variant: str
    build: str | None = None
    device: str
    isa: str | None = None
    peer_isa: str | None = None
    batch: int
    query_len: int | None = None
    context: int
    num_query_heads: int = HEADS
    num_kv_heads: int
    head_size: int = HEAD_SIZE
    us: float | None = None
    peer_us: float | None = None
    bytes: int | None = None
    gbps: float | None = None
    ratio_to_bf16: float | None = None
    ratio_to_fp8: float | None = None
    read_fraction: float | None = None
    disturbed: bool | None = None
    max_error: float | None = None
    options: str | None = None
    error: str | None = None

    def present(self) -> dict[str, Any]:
        """Fields that apply, numbers rounded to what they are good for."""
        digits = {"us": 1, "peer_us": 1, "gbps": 2, "ratio_to_bf16": 3, "ratio_to_fp8": 3, "read_fraction": 3}
        present = {name: value for name, value in asdict(self).items() if value is not None}
        present |= {name: round(present[name], n) for name, n in digits.items() if name in present}
        if self.max_error is not None:
            present["max_error"] = float(f"{self.max_error:.3g}")
        return present


def make_params(kv_heads: int, base: float = 1e4, kind: str = "rotating", head_size: int = HEAD_SIZE) -> KVParams:
    """Smoothing around 1, rotated keys; a rotating shift of magnitude 5 and a sink at position 0.

    kind: rotating, a shift on every pair; slow, on pairs that turn by up to 5 in 128 tokens; some, on 8 more; none.
    """
    g = torch.Generator().manual_seed(0)
    inv_freq = [base ** (-2 * j / head_size) for j in range(head_size // 2)]

    def normal(gain: float) -> torch.Tensor:
        return gain * torch.randn(kv_heads, head_size, generator=g)

    smooth = torch.exp(normal(0.3))
    if kind == "none":
        return KVParams(smooth, torch.zeros_like(smooth), normal(0.5), key_hadamard=True, rope_turns=None)
    first = sum(x * 128 > 5 for x in inv_freq)  # pair that has a shift
    first = {"rotating": 0, "some": first - 8, "slow": first}[kind]
    shift = normal(5)
    shift.unflatten(1, (2, -1))[:, :, :first] = 0
    return KVParams(
        k_smooth=smooth,
        k_shift=shift,
        v_shift=normal(0.5),
        key_hadamard=True,
        rope_turns=reference.rope_turns(inv_freq),
        k_first=normal(5),
        v_first=normal(0.5),
    )


def random_kv(params: KVParams, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Roped keys and values [tokens, num_kv_heads, head_size] as the parameters expect them."""
    shape = (len(positions), *params.k_smooth.shape)
    key = torch.randn(shape, device=positions.device) * params.k_smooth + reference.key_shift_at(positions, params)
    value = torch.randn(shape, device=positions.device) + reference.value_shift_at(positions, params)
    return key.to(DTYPE), value.to(DTYPE)
