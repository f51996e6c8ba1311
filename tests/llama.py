"""A plain-torch Llama that computes what the engine should, given the engine's own step boundaries.

Only reference.py stands for the cache here. Roundings are the engine's: weights and activations of 16 bits, fp32
inside a norm, a product or attention.
"""

import torch
import torch.nn.functional as F

from vllm_wkvquant import reference
from vllm_wkvquant.checkpoint import Checkpoint
from vllm_wkvquant.layout import Quantized


class ReferenceLlama:
    """Llama, Qwen2 without its extras, or Mistral, from a wkvquant checkpoint."""

    def __init__(self, path, dtype: torch.dtype = torch.float16) -> None:
        self.dtype = dtype
        self.ckpt = ckpt = Checkpoint(path)
        self.config = ckpt.config
        # fp32 holding 16-bit values: a product accumulates in fp32 either way, and no step converts them again
        self.weights = {name: ckpt.weight(name, q).to(self.dtype).float() for name, q in ckpt.weight_names()}
        self.params = [ckpt.kv_params(i) for i in range(ckpt.kv.num_hidden_layers)]

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x.float(), self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")).to(self.dtype)

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        x = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return x.to(self.dtype) * self.weights[f"{name}.weight"].to(self.dtype)

    def _rope(self, x: torch.Tensor) -> torch.Tensor:
        rope = self.ckpt.kv.rope
        angles = torch.arange(x.shape[0])[:, None].float() * torch.tensor(rope.inv_freq)
        cos, sin = angles.cos().to(self.dtype).float()[:, None], angles.sin().to(self.dtype).float()[:, None]
        a, b = x.float().chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(self.dtype)

    def logprobs(
        self,
        tokens: list[int],
        starts: list[int],
        cache: str = "past_only",
        stored: list[tuple[Quantized, Quantized]] | None = None,
    ) -> torch.Tensor:
        """fp32 [len(tokens), vocabulary] log-probabilities of the token after each one.

        starts: first position of each step. cache: "past_only", "all" (the step's own tokens quantized too) or "none".
        stored: what an engine's pages hold of these tokens, by layer; past tokens are then read from it. What the
        reference would have stored is left in `self.stored` either way.
        """
        self.stored = []
        length, kv = len(tokens), self.ckpt.kv
        position = torch.arange(length)
        step = torch.bucketize(position, torch.tensor(sorted(set(starts))), right=True)
        same = {
            "past_only": step[:, None] == step[None],
            "all": torch.zeros(length, length, dtype=torch.bool),
            "none": torch.ones(length, length, dtype=torch.bool),
        }[cache]
        hidden_keys = position[None] > position[:, None]
        window = self.config.get("sliding_window")
        if window:
            hidden_keys |= position[None] <= position[:, None] - window
        heads = self.config["num_attention_heads"]
        # vLLM's fused norm sees the residual sum before it is rounded
        x = self.weights["model.embed_tokens.weight"][torch.tensor(tokens)]
        for i, params in enumerate(self.params):
            layer = f"model.layers.{i}"
            h, x = self._norm(x, f"{layer}.input_layernorm"), x.to(self.dtype)
            q, k, v = (
                self._linear(h, f"{layer}.self_attn.{n}_proj").view(length, -1, kv.head_size) for n in ("q", "k", "v")
            )
            q, k = self._rope(q), self._rope(k)
            self.stored.append(reference.quantize(k, v, position, params))
            past_k, past_v = reference.dequantize(*(stored or self.stored)[i], position, params)
            out = torch.empty(q.shape, dtype=torch.float32)
            for head in range(heads):
                g = head * kv.num_kv_heads // heads
                query = q[:, head].float()
                scores = torch.where(same, query @ k[:, g].float().T, query @ past_k[:, g].T) * kv.head_size**-0.5
                p = scores.masked_fill(hidden_keys, -torch.inf).softmax(-1)
                current = p.masked_fill(~same, 0)
                out[:, head] = current @ v[:, g].float() + (p - current) @ past_v[:, g]
            x = x.float() + self._linear(out.flatten(1).to(self.dtype), f"{layer}.self_attn.o_proj")
            h, x = self._norm(x, f"{layer}.post_attention_layernorm"), x.to(self.dtype)
            gate = F.silu(self._linear(h, f"{layer}.mlp.gate_proj"))
            x = x.float() + self._linear(gate * self._linear(h, f"{layer}.mlp.up_proj"), f"{layer}.mlp.down_proj")
        head_name = "lm_head" if "lm_head.weight" in self.weights else "model.embed_tokens"
        return self._linear(self._norm(x, "model.norm"), head_name).float().log_softmax(-1)
