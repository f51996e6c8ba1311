"""What the model's head makes of the hidden states after the last block."""

import torch

from vllm_wkvquant.quantize.plan import Plan

LOGIT_ROWS = 512  # rows of logits held at once: 512 x 152k vocabulary x fp32 is 0.3 GB


def divergence(plan: Plan, exact: torch.Tensor, runs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """KL(exact || run) of the next token in nats, fp64 [tokens], by run; all are hidden states [N, T, hidden]."""
    device = plan.settings.device
    head = plan.adapter.load_head(getattr(torch, plan.settings.dtype), device)
    parts: dict[str, list[torch.Tensor]] = {n: [] for n in runs}
    for i in range(0, exact.shape[0] * exact.shape[1], LOGIT_ROWS):
        rows = slice(i, i + LOGIT_ROWS)
        p = head(exact.flatten(0, 1)[rows].to(device)).float().log_softmax(-1)
        for name, run in runs.items():
            q = head(run.flatten(0, 1)[rows].to(device)).float().log_softmax(-1)
            parts[name].append((p.exp() * (p - q)).sum(-1).double().cpu())
    return {name: torch.cat(p) for name, p in parts.items()}
