#!/usr/bin/env python3
"""Write the same model with its residual stream turned by a random orthogonal matrix, Q.

    python benchmarks/turn.py MODEL OUTPUT

The turned model computes what MODEL does, but no weight is where it was: a model whose weights were on some grid once
(a GGUF file's, say) keeps no trace of it, which a quantizer could find again. A comparison that holds on MODEL and not
on the turned model is one of grids.

RMS norms of the residual stream are folded into the linear layers that read it (q, k, v, gate, up, lm_head) and set to
ones, since only x / |x| turns as x does; norms inside attention (Qwen3's, of queries and keys) stay. With rows x:

    embedding, what a layer adds      x' = x Q
    W that reads diag(norm) x         W' = W diag(norm) Q
    W, b of o_proj, down_proj         W' = Q^T W, b' = Q^T b

An lm_head that was tied to the embedding becomes a tensor of its own, because it has the norm in it. Q is that of the
QR decomposition of a seeded Gaussian matrix with R's diagonal made positive. All is computed in float64 on the CPU and
rounded once, to --dtype: in 16 bits the logits are not to the bit those of MODEL, so compare with the turned model.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from vllm_wkvquant.checkpoint import read_config
from vllm_wkvquant.config import ConfigError
from vllm_wkvquant.quantize.adapters import Family, check_supported
from vllm_wkvquant.quantize.files import WriteError
from vllm_wkvquant.quantize.writer import copy_companions

ATTENTION_READERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP_READERS = ("mlp.gate_proj", "mlp.up_proj")
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
MLP_NORM = "post_attention_layernorm"


def orthogonal(size: int, seed: int) -> torch.Tensor:
    """A random orthogonal matrix fp64 [size, size], the same wherever `seed` is the same."""
    gaussian = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q, r = torch.linalg.qr(gaussian)
    return q * r.diagonal().sign()  # QR leaves the signs of the columns open


@torch.no_grad()
def turn(model: PreTrainedModel, family: Family, seed: int, dtype: torch.dtype) -> None:
    """Turn the residual stream in place and untie the head; all weights get `dtype`."""
    q = orthogonal(model.config.hidden_size, seed)

    def fold(norm: torch.nn.Module, readers: list[torch.nn.Module]) -> None:
        for linear in readers:
            turned = (linear.weight.double() * norm.weight.double()) @ q
            linear.weight = torch.nn.Parameter(turned.to(dtype))
        norm.weight.fill_(1)

    # the head before the embedding, which it may be
    fold(model.get_submodule(family.norm), [model.get_submodule(family.head)])
    model.config.tie_word_embeddings = False
    embedding = model.get_submodule(family.embedding)
    embedding.weight.data = (embedding.weight.double() @ q).to(dtype)
    for block in model.get_submodule(family.layers):
        fold(block.get_submodule(family.attention_norm), [block.get_submodule(n) for n in ATTENTION_READERS])
        fold(block.get_submodule(MLP_NORM), [block.get_submodule(n) for n in MLP_READERS])
        for linear in (block.get_submodule(n) for n in WRITERS):
            linear.weight.data = (q.T @ linear.weight.double()).to(dtype)
            if linear.bias is not None:
                linear.bias.data = (linear.bias.double() @ q).to(dtype)
    model.to(dtype)


def run(args: argparse.Namespace) -> None:
    """Raises ConfigError or WriteError."""
    family = check_supported(args.model, read_config(args.model))
    if args.output.exists():
        raise ConfigError(f"{args.output} exists; give another directory")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    dtype = getattr(torch, args.dtype) if args.dtype else model.dtype
    tied = model.config.tie_word_embeddings
    turn(model, family, args.seed, dtype)
    model.save_pretrained(args.output)
    copy_companions(args.model, args.output)
    print(f"{args.output}: residual stream turned with seed {args.seed}, in {str(dtype).removeprefix('torch.')}")
    if tied:
        head = model.get_submodule(family.head).weight
        print(f"lm_head is no longer the embedding, which takes {head.numel() * head.element_size()} bytes more")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for bad input."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL", help="directory of a Hugging Face checkpoint")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="directory to create")
    parser.add_argument("--seed", type=int, default=0, help="of Q (%(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the result (MODEL's own)")
    try:
        run(parser.parse_args(argv))
    except (ConfigError, WriteError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
