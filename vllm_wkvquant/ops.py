"""The operations of the cache, and the one table of their variants.

    cache_write       new K/V -> page
    paged_attention   past tokens from the page, the step's own tokens as they came -> output
    gather_kv         past tokens from the page, the step's own as they came -> fp16 keys and values in one piece

`TABLE[op][variant]` holds every implementation; tests and benchmarks iterate it. `reference` is the specification.
vLLM's attention op is opaque to torch.compile, so these are plain functions and need no fake kernels.
"""

import functools
import logging
from collections.abc import Callable, Sequence

import torch

from vllm_wkvquant import native, native_cuda, reference
from vllm_wkvquant.reference import KVParams

try:
    from vllm_wkvquant import native_triton
except ModuleNotFoundError:  # triton comes with torch's builds for GPUs alone
    native_triton = None  # type: ignore[assignment]

logger = logging.getLogger("vllm.wkvquant")

TABLE: dict[str, dict[str, Callable[..., None]]] = {
    "cache_write": {"reference": reference.cache_write},
    "paged_attention": {"reference": reference.paged_attention},
    "gather_kv": {"reference": reference.gather_kv},
}
if native.available():
    TABLE["cache_write"]["cpp"] = native.cache_write
    TABLE["paged_attention"]["cpp"] = native.paged_attention
if native_cuda.available():
    TABLE["cache_write"]["cuda"] = native_cuda.cache_write
    TABLE["paged_attention"]["cuda"] = native_cuda.paged_attention
    TABLE["gather_kv"]["cuda"] = native_cuda.gather_kv
if native_triton is not None:
    TABLE["cache_write"]["triton"] = native_triton.cache_write
    TABLE["paged_attention"]["triton"] = native_triton.paged_attention
    TABLE["gather_kv"]["triton"] = native_triton.gather_kv
CAPTURED = ("cuda", "triton")  # variants whose calls can be captured into a graph


@functools.cache
def default_variant(device_type: str, head_size: int) -> str:
    """The variant used on a device type ("cpu", "cuda"): the best one this build has. Chosen once, logged once."""
    if device_type == "cpu":
        refusal = native.refusal()
        if refusal is None:
            logger.info("4-bit KV cache on cpu: compiled kernels, %s", native.isa())
            return "cpp"
    elif device_type == "cuda":
        refusal = native_cuda.refusal(head_size)
        if refusal is None:
            major, minor = torch.cuda.get_device_capability()
            logger.info("4-bit KV cache on cuda: compiled kernels, compute capability %d.%d", major, minor)
            return "cuda"
        other = "triton is not installed" if native_triton is None else native_triton.refusal()
        if other is None:
            logger.warning("4-bit KV cache on cuda: Triton's kernels, which are slow; faster ones: %s", refusal)
            return "triton"
        refusal = f"{refusal}; {other}"
    else:
        refusal = "there are none for it"
    logger.warning("4-bit KV cache on %s: slow reference; compiled kernels: %s", device_type, refusal)
    return "reference"


def reserve(params: KVParams, max_seqs: int = 0) -> None:
    """Make what the default variant would make on its first call with `params`, so that calls can be captured.

    max_seqs: sequences of the largest call, where that is known. Raises ValueError where a variant does not take so
    many. `triton` compiles a kernel in the first call of its shapes, which must come before the capture all the same.
    """
    variant = default_variant(params.k_smooth.device.type, params.k_smooth.shape[1])
    if variant == "cuda":
        native_cuda.reserve(params, max_seqs)
    elif variant == "triton":
        native_triton.prepare(params)


@torch.inference_mode()  # tables may have been made in it
def renew(params: KVParams, new: KVParams) -> None:
    """Give `params` the numbers of `new`, of the same layer, wherever they are: addresses stay, for captured graphs.

    Raises ValueError, with nothing changed, where such a graph would not fit them.
    """
    native_cuda.renew(params, new)
    for name, tensor in vars(params).items():
        if isinstance(tensor, torch.Tensor):
            tensor.copy_(getattr(new, name))
    native.renew(params)
    if native_triton is not None:
        native_triton.renew(params)


def planner(layers: Sequence[KVParams], num_heads: int, sliding_window: int) -> native_cuda.Planner | None:
    """What plans a step of layers with these parameters; None: the variant plans nothing. num_heads: query heads."""
    smooth = layers[0].k_smooth
    if default_variant(smooth.device.type, smooth.shape[1]) != "cuda":
        return None
    return native_cuda.Planner(layers, num_heads, sliding_window)


def cache_write(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    positions: torch.Tensor,
    params: KVParams,
    variant: str | None = None,
) -> None:
    """Quantize new tokens into their pages: shift, smooth, rotate, range, pack, scatter.

    key, value: fp16, bf16 or fp32 [>= T, num_kv_heads, head_size], key after the rotary embedding; the last dimension
    contiguous, rows may be strided (views into a fused qkv). kv_cache: uint8 [num_blocks, num_kv_heads, block_size,
    token_bytes], layout.py. slot_mapping: int64 [T], block * block_size + index; negative slots are padding and
    skipped. positions: int64 [>= T], index of each token in its sequence. variant: a key of
    `TABLE["cache_write"]`; the device's default otherwise. Compiled variants may store finite numbers for a token that
    has others. Raises ValueError on shapes that do not fit.
    """
    implementation = TABLE["cache_write"][variant or default_variant(key.device.type, key.shape[-1])]
    implementation(key, value, kv_cache, slot_mapping, positions, params)


def paged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    params: KVParams,
    scale: float,
    out: torch.Tensor,
    sliding_window: int = 0,
    lse: torch.Tensor | None = None,
    variant: str | None = None,
    after_write: bool = False,
    plan: native_cuda.Plan | None = None,
) -> None:
    """Causal attention of the step's queries over past tokens in the pages and the step's own raw keys and values.

    query: fp16, bf16 or fp32 [>= T, num_heads, head_size]; key, value: [>= T, num_kv_heads, head_size] of the same
    dtype, T = query_start_loc[-1]; last dimension contiguous, rows may be strided. kv_cache: as in `cache_write`;
    slots at and after seq_len - query_len are never read, whatever they hold. block_table: int32 [num_seqs,
    max_blocks]. seq_lens: int32 [num_seqs], tokens of each sequence including this step's. query_start_loc: int32
    [num_seqs + 1]. scale: factor on q . k. out: [>= T, num_heads, head_size] of query's dtype, written. sliding_window:
    a query sees the last `sliding_window` positions, itself included; 0 is all. lse: fp32 [>= T, num_heads], written
    with the natural-log-sum-exp of the scaled scores where given. Rows at and after T are left alone. after_write: the
    call before it on this stream is the step's `cache_write`, and every argument is older than that: a GPU may start
    one while the other still runs. plan: of these sequences, by `planner`; a variant that wants one makes it where none
    is given. `cuda` takes seq_lens and query_start_loc from the plan.
    """
    variant = variant or default_variant(query.device.type, query.shape[-1])
    TABLE["paged_attention"][variant](
        query, key, value, kv_cache, block_table, seq_lens, query_start_loc, params, scale, out, sliding_window, lse,
        **({"after_write": after_write, "plan": plan} if variant == "cuda" else {}),
    )  # fmt: skip


def gather_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    first: torch.Tensor,
    key_start_loc: torch.Tensor,
    max_keys: int,
    params: KVParams,
    keys: torch.Tensor,
    values: torch.Tensor,
    variant: str | None = None,
) -> None:
    """Keys and values of some sequences as attention sees them, in one piece: past tokens dequantized, with their shift
    and without rotation and smoothing; the step's own as they came. For long chunks of a prefill, which see the past so
    often that it is dequantized once rather than by every tile of their queries.

    key, value, kv_cache, block_table, seq_lens, query_start_loc: as in `paged_attention`. Of sequence i, rows
    key_start_loc[i] .. key_start_loc[i + 1] - 1 (int32 [num_seqs + 1]) get the tokens from position first[i] (int32
    [num_seqs], a multiple of 16) on, none of them beyond the sequence. max_keys: at least the most rows of a sequence.
    keys, values: fp16 [>= key_start_loc[-1], num_kv_heads, head_size], contiguous, written; larger numbers become
    +-65504. A CPU has the reference alone: nothing there calls this.
    """
    variant = variant or default_variant(keys.device.type, keys.shape[-1])
    implementation = TABLE["gather_kv"]["reference" if variant == "cpp" else variant]
    implementation(
        key, value, kv_cache, block_table, seq_lens, query_start_loc, first, key_start_loc, max_keys, params, keys,
        values,
    )  # fmt: skip
