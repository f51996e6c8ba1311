"""Folding V's transform into the weights around it, which leaves the model's function as it was.

With v' = H (v / s) per KV head the cache sees v', and o_proj undoes it: W_o v = (W_o diag(s) H) v' for a symmetric
orthonormal H. The fold is linear, so it holds for any mixture of tokens, current ones included.
"""

import torch

from vllm_wkvquant.reference import hadamard_matrix


def transform(size: int, hadamard: bool, device: torch.device) -> torch.Tensor:
    """H [D, D], the identity where there is no rotation."""
    return (hadamard_matrix(size) if hadamard else torch.eye(size)).to(device)


def fold_rows(rows: torch.Tensor, smooth: torch.Tensor, hadamard: bool) -> torch.Tensor:
    """v_proj's weight [H * D, in] or bias [H * D] as `fold_value` gives it, in fp32."""
    heads, size = smooth.shape
    forward = transform(size, hadamard, smooth.device) @ torch.diag_embed(1 / smooth)  # [H, D, D], v -> v'
    return (forward @ rows.float().view(heads, size, -1)).view_as(rows)


def fold_value(v_proj: torch.nn.Linear, o_proj: torch.nn.Linear, smooth: torch.Tensor, hadamard: bool) -> None:
    """Rewrite v_proj [H * D, in] and its bias, and o_proj [out, Hq * D], in place.

    smooth: fp32 [H, D], divided out of V's channels; query head j belongs to KV head j // (Hq / H).
    """
    heads, size = smooth.shape
    v_proj.weight.data = fold_rows(v_proj.weight, smooth, hadamard).to(v_proj.weight.dtype)
    if v_proj.bias is not None:
        v_proj.bias.data = fold_rows(v_proj.bias, smooth, hadamard).to(v_proj.bias.dtype)
    backward = torch.diag_embed(smooth) @ transform(size, hadamard, smooth.device)
    out = o_proj.weight.shape[0]
    columns = o_proj.weight.float().view(out, heads, -1, size)  # [out, H, Hq / H, D]
    folded = torch.einsum("ohgd,hde->ohge", columns, backward)
    o_proj.weight.data = folded.reshape_as(o_proj.weight).to(o_proj.weight.dtype)
