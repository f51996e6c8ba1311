"""Run vLLM's own KV cache kernels on the CPU, in Triton's interpreter, and save what they store and return.

    TRITON_INTERPRET=1 python vllm_kv.py IN.pt OUT.pt

IN: cases by name, each with "key" and "value" [T, H, D] and "query" [T, Hq, D] of one type. OUT: by the same
names "int4" and, where the head size is a power of two, "turboquant".
"""

import sys

import torch
from triton.backends import backends

if not torch.cuda.is_available():
    backends["cpu"] = backends["nvidia"]  # vLLM's CPU build wants such a backend; the interpreter uses none

from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
from vllm.v1.attention.ops import triton_turboquant_decode as turboquant
from vllm.v1.attention.ops.int4_per_token_head import reshape_and_cache_int4, single_rht, unified_attention_int4
from vllm.v1.attention.ops.triton_turboquant_store import triton_turboquant_store

BLOCK = 16


def int4(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """Bytes [T, H, D / 2] and scales [T, H] after one write, and causal attention [T, Hq, D] over them."""
    tokens, heads, size = key.shape
    blocks = -(-tokens // BLOCK)
    slots = torch.arange(tokens)
    caches = [torch.zeros(blocks, BLOCK, heads, size // 2, dtype=torch.uint8) for _ in range(2)]
    scales = [torch.zeros(blocks, BLOCK, heads) for _ in range(2)]
    reshape_and_cache_int4(key, value, *caches, slots, k_scale_cache=scales[0], v_scale_cache=scales[1])
    out = torch.zeros_like(query)
    unified_attention_int4(
        query,
        *caches,
        out,
        cu_seqlens_q=torch.tensor([0, tokens], dtype=torch.int32),
        max_seqlen_q=tokens,
        seqused_k=torch.tensor([tokens], dtype=torch.int32),
        max_seqlen_k=tokens,
        softmax_scale=size**-0.5,
        window_size=(-1, -1),
        block_table=torch.arange(blocks, dtype=torch.int32)[None],
        softcap=0.0,
        sinks=None,
        alibi_slopes=None,
        use_alibi_sqrt=False,
        qq_bias=None,
        output_scale=None,
        mm_prefix_range=None,
        k_scale_cache=scales[0],
        v_scale_cache=scales[1],
    )
    stored = {"k_bytes": caches[0], "v_bytes": caches[1], "k_scale": scales[0], "v_scale": scales[1]}
    return {n: x.flatten(0, 1)[:tokens] for n, x in stored.items()} | {"rotated": single_rht(key.float()), "out": out}


def turboquant_4bit(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """Keys (rotated) and values fp16 [T, H, D] that the cache returns for what was stored, and the centroids [16]."""
    tokens, heads, size = key.shape
    blocks = -(-tokens // BLOCK)
    packed = size // 2 + 2
    cache = torch.zeros(blocks, BLOCK, heads, packed + size // 2 + 4, dtype=torch.uint8)
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    centroids = get_centroids(size, 4)
    midpoints = (centroids[1:] + centroids[:-1]) / 2
    slots = torch.arange(tokens, dtype=torch.int32)
    triton_turboquant_store(key, value, cache, slots, matrix / size**0.5, midpoints, 4, packed, 4)
    k, v = (torch.zeros(1, heads, tokens, size, dtype=torch.float16) for _ in range(2))
    turboquant._tq_full_dequant_kv[(tokens, heads)](
        cache,
        torch.arange(blocks, dtype=torch.int32)[None],
        centroids,
        k,
        v,
        *k.stride()[:3],
        *v.stride()[:3],
        *cache.stride()[:3],
        blocks,
        HEAD_DIM=size,
        BLOCK_SIZE=BLOCK,
        NUM_KV_HEADS=heads,
        MSE_BYTES=size // 2,
        KPS=packed,
        VQB=4,
        VAL_DATA_BYTES=size // 2,
        MSE_BITS=4,
        KEY_FP8=0,
        BLOCK_D=size,
        NORM_CORRECTION=1,
    )
    return {"k": k[0].transpose(0, 1), "v": v[0].transpose(0, 1), "centroids": centroids}


def main() -> None:
    """Every case of IN."""
    source, target = sys.argv[1:]
    out = {}
    for name, case in torch.load(source).items():
        out[name] = {"int4": int4(**case)}
        size = case["key"].shape[-1]
        if size & (size - 1) == 0:
            out[name]["turboquant"] = turboquant_4bit(**case)
    torch.save(out, target)


if __name__ == "__main__":
    main()
