"""What the model's head makes of the hidden states after the last block."""

from dataclasses import dataclass

import torch

from vllm_wkvquant.quantize.plan import Plan

LOGIT_ROWS = 512  # rows of logits held at once: 512 x 152k vocabulary x fp32 is 0.3 GB


@dataclass(frozen=True)
class Comparison:
    """Of a run with the one it is compared with, fp64: KL divergence of the next token in nats, [N, T]; negative log
    likelihood of the text's next token, [N, T - 1]."""

    kl: torch.Tensor
    nll: torch.Tensor

    @property
    def perplexity(self) -> float:
        """Of the text."""
        return self.nll.mean().exp().item()


def compare(plan: Plan, runs: dict[str, torch.Tensor]) -> dict[str, Comparison]:
    """Every run compared with the first, which is one of them; on worker 0, of all workers' windows.

    runs: hidden states [N, T, hidden] of this worker's held-out windows.
    """
    device, tokens = plan.settings.device, plan.windows.tokens[plan.windows.statistics :]
    head = plan.adapter.load_head(getattr(torch, plan.settings.dtype), device)
    following = tokens.roll(-1, 1).flatten()
    kl: dict[str, list[torch.Tensor]] = {n: [] for n in runs}
    nll: dict[str, list[torch.Tensor]] = {n: [] for n in runs}
    for i in range(0, following.numel(), LOGIT_ROWS):
        rows = slice(i, i + LOGIT_ROWS)
        first = None
        for name, run in runs.items():
            logp = head(run.flatten(0, 1)[rows].to(device)).float().log_softmax(-1)
            first = logp if first is None else first
            kl[name].append((first.exp() * (first - logp)).sum(-1).double().cpu())
            nll[name].append(-logp.gather(1, following[rows, None].to(device))[:, 0].double().cpu())

    def of_all(parts: list[torch.Tensor]) -> torch.Tensor:
        return plan.workers.gather(torch.cat(parts).view(tokens.shape))

    return {name: Comparison(of_all(kl[name]), of_all(nll[name])[:, :-1]) for name in runs}
