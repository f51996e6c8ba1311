"""Folding V's transform into the weights around it, which leaves the model's function as it was.

With v' = H (v / s) per KV head the cache sees v', and o_proj undoes it: W_o v = (W_o diag(s) H) v' for a symmetric
orthonormal H. The fold is linear, so it holds for any mixture of tokens, current ones included.
"""

import torch

from vllm_wkvquant.reference import hadamard_matrix


def fold_value(v_proj: torch.nn.Linear, o_proj: torch.nn.Linear, smooth: torch.Tensor, hadamard: bool) -> None:
    """Rewrite v_proj [H * D, in] and its bias, and o_proj [out, Hq * D], in place.

    smooth: fp32 [H, D], divided out of V's channels; query head j belongs to KV head j // (Hq / H).
    """
    heads, size = smooth.shape
    matrix = hadamard_matrix(size) if hadamard else torch.eye(size)
    matrix = matrix.to(v_proj.weight.device)
    forward = matrix @ torch.diag_embed(1 / smooth)  # [H, D, D], v -> v'
    backward = torch.diag_embed(smooth) @ matrix
    rows = v_proj.weight.float().view(heads, size, -1)
    v_proj.weight.data = (forward @ rows).view_as(v_proj.weight).to(v_proj.weight.dtype)
    if v_proj.bias is not None:
        bias = v_proj.bias.float().view(heads, size, 1)
        v_proj.bias.data = (forward @ bias).view_as(v_proj.bias).to(v_proj.bias.dtype)
    out = o_proj.weight.shape[0]
    columns = o_proj.weight.float().view(out, heads, -1, size)  # [out, H, Hq / H, D]
    folded = torch.einsum("ohgd,hde->ohge", columns, backward)
    o_proj.weight.data = folded.reshape_as(o_proj.weight).to(o_proj.weight.dtype)
