"""Attention backend of the 4-bit cache: it lays out pages, finds positions, and calls the ops."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)

from vllm_wkvquant import ops, reference
from vllm_wkvquant.layout import HEAD_SIZES, TILE, PageLayout, token_bytes
from vllm_wkvquant.plugin import prefill
from vllm_wkvquant.reference import KVParams


class WKVQuantBackend(AttentionBackend):
    """Pages are uint8 [num_blocks, num_kv_heads, block_size, token_bytes], each (block, head) contiguous."""

    # the write needs the positions that only the metadata has, and forward() is where the metadata arrives
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # vLLM looks the name up in AttentionBackendEnum

    @staticmethod
    def get_impl_cls() -> type["WKVQuantImpl"]:
        return WKVQuantImpl

    @staticmethod
    def get_builder_cls() -> type["WKVQuantMetadataBuilder"]:
        return WKVQuantMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(TILE)]

    @classmethod
    def validate_configuration(cls, *args: Any, **kwargs: Any) -> list[str]:
        """vLLM asks a backend that it is to choose for layers; `WKVQuantKVCacheMethod` gives this one to its own."""
        return ["it is chosen by a wkvquant checkpoint; leave out --attention-backend"]

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        """vLLM before 0.29 asks the backend for the shape."""
        return (num_blocks, num_kv_heads, block_size, token_bytes(head_size))

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        """vLLM before 0.29: physical order of that shape; blocks come first even when layers share one allocation."""
        return (1, 0, 2, 3, 4) if include_num_layers_dimension else (0, 1, 2, 3)

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """vLLM from 0.28 on sizes pages from the spec."""
        return replace(spec, state_content_bytes=token_bytes(spec.head_size))

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        """vLLM from 0.29 on: the physical orders in which one (block, head) is contiguous."""
        from vllm.v1.kv_cache_interface import KVCacheLayout

        return (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)


@dataclass
class WKVQuantMetadata(AttentionMetadata):
    """Arguments of the ops for one step, on the device; see `ops`.

    query_start_loc int32 [num_seqs + 1], seq_lens int32 [num_seqs] and block_table int32 [num_seqs, max_blocks] are of
    the sequences before `chunks`, which is None on a CPU; slot_mapping and positions int64 [T] of all of the step's.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    positions: torch.Tensor
    chunks: prefill.Chunks | None
    plan: Any  # of `ops.planner`, or None


class WKVQuantMetadataBuilder(AttentionMetadataBuilder[WKVQuantMetadata]):
    """Positions and the plan live in buffers for good: a replayed graph finds fresh values where it looked before.

    With a GPU's kernels, decode steps are captured whole: all that the ops read is either in buffers of vLLM's that
    keep their address, or in these, and what they allocate is reserved here, before the first capture.
    """

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        PageLayout(kv_cache_spec.head_size, kv_cache_spec.block_size)
        tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self._flash, self._room, self._window, self._planner = None, 0, 0, None
        planners: list[Any] = []
        self._block_size = kv_cache_spec.block_size
        if _captures(device.type, kv_cache_spec.head_size):
            compilation = vllm_config.compilation_config
            tokens = max(tokens, compilation.max_cudagraph_capture_size or 0)
            layers = [compilation.static_forward_context[name] for name in layer_names]
            for layer in layers:
                ops.reserve(layer.wkv_params, vllm_config.scheduler_config.max_num_seqs)
            # layers with and without a window share a spec without vLLM's hybrid cache manager
            kinds: dict[tuple[int, int], list[KVParams]] = {}
            for layer in layers:
                kinds.setdefault((layer.num_heads, layer.impl.sliding_window), []).append(layer.wkv_params)
            windows = {window for _, window in kinds}
            self._window = 0 if 0 in windows else max(windows)
            planners = [x for kind, params in kinds.items() if (x := ops.planner(params, *kind)) is not None]
            if len(kinds) == 1 and planners:  # else every call plans for itself
                self._planner = planners[0]
            if not prefill.extends_sequences(vllm_config.speculative_config):
                self._flash = prefill.flash_attention(kv_cache_spec.head_size, vllm_config.model_config.dtype)
        if self._flash is not None:
            self._init_reorder_batch_threshold(prefill.SHORT, supports_spec_as_decode=True)
            self._room = prefill.room(tokens, kv_cache_spec.num_kv_heads, kv_cache_spec.head_size)
        for planner in planners:  # a step that one refuses would end the engine
            seqs, block = vllm_config.scheduler_config.max_num_seqs, kv_cache_spec.block_size
            planned = min(tokens, seqs * (self.reorder_batch_threshold or tokens))  # long queries are chunks
            planner.check_steps(seqs, planned, -(-vllm_config.model_config.max_model_len // block) * block)
        self._tokens = torch.arange(tokens, dtype=torch.int64, device=device)
        self._positions = torch.zeros_like(self._tokens)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Decode steps of equal length with a GPU's kernels, none with the reference, which reads lengths."""
        if _captures(current_platform.device_type, vllm_config.model_config.get_head_size()):
            return AttentionCGSupport.UNIFORM_BATCH
        return AttentionCGSupport.NEVER

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> WKVQuantMetadata:
        """Metadata of a step of T = num_actual_tokens tokens, padding among them where a graph is replayed.

        Of common_attn_metadata it takes query_start_loc int32 [num_seqs + 1], seq_lens int32 [num_seqs],
        block_table_tensor int32 [num_seqs, max_blocks] and slot_mapping int64 [>= T]. Raises NotImplementedError unless
        attention is causal.
        """
        common = common_attn_metadata
        if common.causal is not True:
            raise NotImplementedError("wkvquant: non-causal attention is not supported by the 4-bit KV cache")
        count = common.num_actual_tokens
        tokens, positions = self._tokens[:count], self._positions[:count]
        if count > self._tokens.shape[0]:  # padded beyond the scheduler's limit, hence beyond all captured batches
            tokens = torch.arange(count, dtype=torch.int64, device=self.device)
            positions = torch.empty_like(tokens)
        chunks, plan = None, None
        if self._flash is not None and self.reorder_batch_threshold is not None:
            threshold = self.reorder_batch_threshold
            chunks = prefill.split_chunks(common, threshold, self._flash, self._room, self._window)
        seqs = common.seq_lens.shape[0] if chunks is None else chunks.num_seqs
        if self._planner is None:
            reference.token_positions(common.query_start_loc, common.seq_lens, tokens, positions)
        else:
            plan = self._planner.plan(
                common.query_start_loc,
                common.seq_lens,
                seqs,
                count if chunks is None else chunks.first,
                common.block_table_tensor.shape[1] * self._block_size,
                positions,
            )
        return WKVQuantMetadata(
            query_start_loc=common.query_start_loc[: seqs + 1],
            seq_lens=common.seq_lens[:seqs],
            block_table=common.block_table_tensor[:seqs],
            slot_mapping=common.slot_mapping[:count],
            positions=positions,
            chunks=chunks,
            plan=plan,
        )


def _captures(device_type: str, head_size: int) -> bool:
    """Whether steps can be captured: a GPU's kernels have fixed grids, the reference walks sequences on the host."""
    return ops.default_variant(device_type, head_size) in ops.CAPTURED


class WKVQuantImpl(AttentionImpl[WKVQuantMetadata]):
    """Past tokens from the pages, the step's own as they came. Construction refuses what the ops do not compute."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        refusals = {
            "ALiBi": alibi_slopes is not None,
            "a logits soft cap": bool(logits_soft_cap),
            "attention sinks": sinks is not None,
            "cross-layer KV sharing": kv_sharing_target_layer_name is not None,
            f"{AttentionType(attn_type).value} attention": attn_type != AttentionType.DECODER,
        }
        for what, present in refusals.items():
            if present:
                raise NotImplementedError(
                    f"wkvquant: {what} is not supported by the 4-bit KV cache; serve this model with an explicit "
                    "--kv-cache-dtype"
                )
        if head_size not in HEAD_SIZES:
            raise ValueError(f"head size {head_size} is not supported; supported: {list(HEAD_SIZES)}")
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        # vLLM, like us, counts the query's own position: W sees positions t - W + 1 .. t. Backends write "none" as
        # None or -1.
        self.sliding_window = sliding_window if sliding_window and sliding_window > 0 else 0

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: WKVQuantMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query, output: [>= T, num_heads, head_size]; key, value: [>= T, num_kv_heads, head_size]."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("wkvquant: fused output quantization is not supported by the 4-bit KV cache")
        if attn_metadata is None:  # a profiling run has no pages yet; it counts what is allocated in it
            if _captures(output.device.type, self.head_size):
                ops.reserve(layer.wkv_params)
            if prefill.flash_attention(self.head_size, output.dtype) is not None:
                prefill.profile(output, self.num_kv_heads)
            return output.fill_(0)
        m = attn_metadata
        # first: a sequence may be given another's prefix from the cache in the very step that computes it
        ops.cache_write(key, value, kv_cache, m.slot_mapping, m.positions, layer.wkv_params)
        if m.chunks is not None:
            prefill.attend(
                m.chunks, query, key, value, kv_cache, layer.wkv_params, self.scale, output, self.sliding_window
            )
            query = query[: m.chunks.first]
        if query.shape[0]:
            ops.paged_attention(
                query,
                key,
                value,
                kv_cache,
                m.block_table,
                m.seq_lens,
                m.query_start_loc,
                layer.wkv_params,
                self.scale,
                output,
                self.sliding_window,
                after_write=m.chunks is None,
                plan=m.plan,
            )
        return output
