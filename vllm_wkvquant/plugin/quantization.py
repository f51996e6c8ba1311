"""The `wkvquant` quantization method: compressed-tensors weights, and the KV parameters of each attention layer."""

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
import vllm.envs as envs
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import FullAttentionSpec, get_kv_quant_mode

from vllm_wkvquant import ops
from vllm_wkvquant.checkpoint import KV_PARAMS, KV_PREFIX, QUANT_METHOD, check_kv_tensor, missing_kv_tensor
from vllm_wkvquant.config import ConfigError, KVCacheConfig
from vllm_wkvquant.layout import PageLayout
from vllm_wkvquant.plugin import lacks_w4_kernel
from vllm_wkvquant.plugin.attention import WKVQuantBackend
from vllm_wkvquant.reference import KVParams
from vllm_wkvquant.rope import check_same_rope

logger = init_logger("vllm.wkvquant")

# vLLM's own string for 4 bits and 4 bytes a token and head: it gives our pages their budget (and 0.26 their dtype)
CACHE_DTYPE = "int4_per_token_head"

# KV connectors that copy a block's bytes as they are, whatever is in them, or, the last two, take nothing from it
CONNECTORS = (
    "OffloadingConnector",
    "SimpleCPUOffloadConnector",
    "DecodeBenchConnector",
    "ExampleHiddenStatesConnector",
)


@register_quantization_config(QUANT_METHOD)
class WKVQuantConfig(CompressedTensorsConfig):
    """Weights are compressed-tensors `pack-quantized`; `kv` describes the cache. A bad section is a ConfigError."""

    kv: KVCacheConfig
    # under an explicit --kv-cache-dtype no layer has these tensors, and the checkpoint is plain W4
    _ignore_unexpected_suffixes: Any = (
        *CompressedTensorsConfig._ignore_unexpected_suffixes,
        *(f".{KV_PREFIX}{param}" for param in KV_PARAMS),
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not args and not kwargs:  # vLLM found no section to call `from_config` with
            raise ConfigError(
                "the model has no quantization_config: give a directory that `wkvquant quantize` wrote, or leave out "
                "--quantization"
            )
        super().__init__(*args, **kwargs)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "WKVQuantConfig":
        kv = KVCacheConfig.from_dict(config.get(QUANT_METHOD))
        self: Any = super().from_config(config)
        self.kv = kv
        return self

    def get_name(self) -> Any:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """vLLM's kernels of 4-bit weights have no float32; what stands in for them on a CPU has."""
        dtypes: list[torch.dtype] = super().get_supported_act_dtypes()
        return [d for d in dtypes if d != torch.float32 or lacks_w4_kernel()]

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """vLLM asks twice for an attention layer, the second time after loading: the first answer holds."""
        if not isinstance(layer, Attention):
            return super().get_quant_method(layer, prefix)
        if hasattr(layer, "quant_method"):
            return layer.quant_method
        vllm_config = get_current_vllm_config()
        if vllm_config.lora_config is not None and not _is_draft(vllm_config):
            raise ConfigError(
                "wkvquant: LoRA adapters are not supported: v_proj and o_proj of this checkpoint are folded, and an "
                "adapter of the original model does not fit them; merge it into the model before `wkvquant quantize`"
            )
        _warn_of_w4a8(vllm_config.model_config.dtype)
        if not takes_4_bits(layer, prefix, vllm_config.cache_config):
            return super().get_quant_method(layer, prefix)
        if re.fullmatch(r"\d+\.attn", prefix):  # of vLLM up to 0.28, which keeps such layers outside of the model
            raise NotImplementedError(
                "wkvquant: --model-impl transformers of this vLLM has no place for the checkpoint's KV tensors; use "
                "--model-impl vllm, a newer vLLM, or an explicit --kv-cache-dtype"
            )
        return WKVQuantKVCacheMethod(self)


def _is_draft(vllm_config: Any) -> bool:
    """Whether the model that is being built is the draft of another one, whose adapters are not for it."""
    speculative = getattr(vllm_config, "speculative_config", None)
    if speculative is None or speculative.draft_model_config is speculative.target_model_config:  # n-grams have this
        return False
    return vllm_config.model_config is speculative.draft_model_config


def takes_4_bits(layer: Attention, prefix: str, cache_config: Any) -> bool:
    """Whether the layer's cache is ours: a decoder layer, no explicit cache dtype, and not skipped by name.

    A skipped layer's own dtype reads "auto" like any other, so the list is consulted here as well.
    """
    # subclasses bring their own cache spec and backend
    if type(layer) is not Attention or layer.attn_type != AttentionType.DECODER or cache_config.cache_dtype != "auto":
        return False
    skip = getattr(cache_config, "kv_cache_dtype_skip_layers", None)
    if not skip:
        return True
    windowed = layer.sliding_window is not None and "sliding_window" in skip
    if windowed:
        logger.warning_once(
            "wkvquant: layers with a window keep a 16-bit cache (--kv-cache-dtype-skip-layers sliding_window). Where "
            "others have none, vLLM makes all pages as large as theirs, and the 4-bit cache saves no memory."
        )
    return not windowed and str(extract_layer_index(prefix)) not in skip


def _warn_of_w4a8(dtype: Any) -> None:
    # the test that vLLM's CPUWNA16 kernel makes; on CUDA nothing of the kind happens
    if (
        current_platform.is_cpu()
        and getattr(envs, "VLLM_CPU_INT4_W4A8", False)
        and dtype == torch.bfloat16
        and torch.cpu._is_amx_tile_supported()
    ):
        logger.warning_once(
            "vLLM will quantize activations to 8 bits on this host (AMX): the weights run as W4A8, not W4A16. "
            "Set VLLM_CPU_INT4_W4A8=0 to keep 16-bit activations."
        )


def local_heads(total: int, local: int, rank: int, world_size: int) -> slice:
    """KV heads of a tensor-parallel rank: a share of them, or one shared by several ranks where they are fewer."""
    if local * world_size == total:
        return slice(rank * local, (rank + 1) * local)
    if local != 1 or world_size % total:
        raise ConfigError(f"{total} KV heads cannot be spread over tensor parallel size {world_size}")
    first = rank // (world_size // total)
    return slice(first, first + 1)


def _sleep_is_safe() -> bool:
    """Whether vLLM gives the pages a pool of their own, so that sleep keeps the tables and buffers made beside them."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner  # too much to import where no one sleeps

    return "kv_cache_allocation_context" in inspect.signature(GPUModelRunner.initialize_kv_cache).parameters


def _check_connectors(transfer: Any) -> None:
    """Raise NotImplementedError for a KV connector, alone or among others, that may not move whole pages."""
    waiting = [] if transfer is None else [vars(transfer)]
    while waiting:
        connector = waiting.pop()
        name, path = connector.get("kv_connector"), connector.get("kv_connector_module_path")
        options = connector.get("kv_connector_extra_config") or {}
        for option in ("secondary_tiers", "spec_module_path"):
            if options.get(option):
                raise NotImplementedError(
                    f"wkvquant: {option} of a KV connector may keep pages under names that do not tell 4-bit pages "
                    "from others, nor one quantization of the model from another; leave it out, or serve with an "
                    "explicit --kv-cache-dtype"
                )
        if options.get("kv_offload_backend") == "disk" and not options.get("use_page_cache"):
            raise NotImplementedError(
                "wkvquant: without the page cache files take pieces of whole sectors, and 4-bit pages are none; add "
                "use_page_cache to kv_connector_extra_config, or leave out kv_offload_backend"
            )
        if name == "MultiConnector" and not path:
            waiting += options.get("connectors", [])
        elif name is not None and (name not in CONNECTORS or path):
            raise NotImplementedError(
                f"wkvquant: the KV connector {name} is not known to move whole pages, and tokens cut out of a 4-bit "
                f"page are garbage; use one of {', '.join(CONNECTORS)}, or serve with an explicit --kv-cache-dtype"
            )


def _sizes_windowed_pages() -> bool:
    """Whether vLLM asks the backend for the bytes of a page, which came with 0.28."""
    return hasattr(AttentionBackend, "customize_spec")


def _full_attention_spec(layer: Any, vllm_config: Any) -> FullAttentionSpec:
    """The spec of a layer whose pages stay allocated behind its window, in place of vLLM's SlidingWindowSpec."""
    return FullAttentionSpec(
        block_size=vllm_config.cache_config.block_size,
        num_kv_heads=layer.num_kv_heads,
        head_size=layer.head_size,
        dtype=layer.kv_cache_torch_dtype,
        kv_quant_mode=get_kv_quant_mode(layer.kv_cache_dtype),
        sliding_window=layer.sliding_window,
    )


class KVParameter(nn.Parameter):
    """A KV tensor, of which the kernels have tables that a copy into it would not change.

    What makes them anew is `process_weights_after_loading`; vLLM's loaders that call it copy into `.data`. To copy what
    the tables were made of is allowed: vLLM does so when it wakes up. A reload makes them of parameters of its own,
    which vLLM throws away; those that stay know by `method`, the layer's.
    """

    method: "WKVQuantKVCacheMethod"
    kv_param: str

    def copy_(self, other: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if self.method.are_in_tables(self.kv_param, other):
            return self.data.copy_(other, non_blocking)
        raise NotImplementedError(
            "wkvquant: KV parameters cannot be updated in kernel format; reload weights in checkpoint format "
            "(is_checkpoint_format=True), or leave the wkv_* tensors out"
        )


class WKVQuantKVCacheMethod(BaseKVCacheMethod):
    """Registers the KV tensors of one layer, swaps its backend, and builds its KVParams once they are loaded."""

    quant_config: WKVQuantConfig

    def __init__(self, quant_config: WKVQuantConfig) -> None:
        super().__init__(quant_config)
        self._in_tables: dict[str, torch.Tensor] = {}  # what the tables were made of, on the host
        self._serving: dict[str, Any] = {}  # the first parameters, which a reload brings back
        self._damaged: dict[str, ConfigError] = {}  # of a reload, which goes on

    def create_weights(self, layer: Any) -> None:
        """Register wkv_* fp32 [this rank's KV heads, head_size], NaN until loaded, and swap the layer's backend.

        Raises ConfigError where the checkpoint is not this model's, NotImplementedError for what the cache does not do.
        """
        vllm_config = get_current_vllm_config()
        self._check(layer, vllm_config)
        self._dummy = str(vllm_config.load_config.load_format) == "dummy"
        self._loaded: set[str] = set()
        for param in KV_PARAMS:
            # NaN, because vLLM does not tell when a checkpoint lacks a tensor
            data = torch.full((layer.num_kv_heads, layer.head_size), float("nan"), dtype=torch.float32)
            parameter: Any = KVParameter(data, requires_grad=False)
            parameter.method, parameter.kv_param = self, param
            parameter.weight_loader = self._loader(f"{layer.layer_name}.{KV_PREFIX}{param}")
            layer.register_parameter(KV_PREFIX + param, parameter)

        chosen = layer.impl
        layer.kv_cache_dtype = CACHE_DTYPE
        layer.kv_cache_torch_dtype = torch.uint8
        layer.attn_backend = WKVQuantBackend
        layer.backend = AttentionBackendEnum.CUSTOM
        layer.impl = WKVQuantBackend.get_impl_cls()(
            layer.num_heads,
            layer.head_size,
            chosen.scale,
            layer.num_kv_heads,
            getattr(chosen, "alibi_slopes", None),
            layer.sliding_window,
            CACHE_DTYPE,
            getattr(chosen, "logits_soft_cap", None),
            layer.attn_type,
            layer.kv_sharing_target_layer_name,
            sinks=getattr(chosen, "sinks", None),
        )
        if layer.sliding_window is not None and not _sizes_windowed_pages():
            # its SlidingWindowSpec would have a byte for each of our 4 bits
            layer.get_kv_cache_spec = functools.partial(_full_attention_spec, layer)

    def _check(self, layer: Any, vllm_config: Any) -> None:
        kv, model, parallel = self.quant_config.kv, vllm_config.model_config, vllm_config.parallel_config
        kv.check_model(layer.head_size, model.get_total_num_kv_heads(), model.get_total_num_hidden_layers())
        # a draft sleeps with its target, and its own config does not say so
        sleeper = vllm_config.speculative_config.target_model_config if _is_draft(vllm_config) else model
        sleeps = sleeper.enable_sleep_mode and not _sleep_is_safe()
        unsupported = {
            "values of another size than keys": getattr(layer, "head_size_v", layer.head_size) != layer.head_size,
            "prefix-LM attention": bool(getattr(layer, "use_mm_prefix", False)),
            "M-RoPE": bool(model.uses_mrope),
            "decode context parallelism": parallel.decode_context_parallel_size > 1,
            "sleep mode of this vLLM, which keeps the weights alone,": sleeps,
            "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
            "batch invariance (VLLM_BATCH_INVARIANT)": envs.VLLM_BATCH_INVARIANT,
        }
        for what, present in unsupported.items():
            if present:
                raise NotImplementedError(
                    f"wkvquant: {what} is not supported by the 4-bit KV cache; serve this model with an explicit "
                    "--kv-cache-dtype"
                )
        _check_connectors(vllm_config.kv_transfer_config)
        if kv.key_shift == "rotating":
            check_same_rope(kv.rope, model.hf_text_config)  # --hf-overrides may say else
        if vllm_config.cache_config.block_size is not None:
            PageLayout(layer.head_size, vllm_config.cache_config.block_size)

    def _loader(self, name: str) -> Callable[[Any, torch.Tensor], None]:
        kv = self.quant_config.kv

        def load(param: Any, loaded: torch.Tensor) -> None:
            kv_param: str = param.kv_param
            try:
                check_kv_tensor(name, loaded, (kv.num_kv_heads, kv.head_size))
            except ConfigError as error:
                if not self._in_tables:
                    raise
                self._damaged[kv_param] = error
                of_rank = torch.full_like(param, float("nan"))
            else:
                rank, world_size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
                of_rank = loaded[local_heads(loaded.shape[0], param.shape[0], rank, world_size)]
            if self._serving.get(kv_param) is param and not self.are_in_tables(kv_param, of_rank):
                raise NotImplementedError(
                    f"wkvquant: {name} cannot be loaded into a model that is running, whose kernels would not see it; "
                    "use reload_weights, or leave the wkv_* tensors out"
                )
            param.data.copy_(of_rank)
            self._loaded.add(name)

        return load

    def are_in_tables(self, kv_param: str, tensor: torch.Tensor) -> bool:
        """Whether the kernels' tables were made of these values."""
        return kv_param in self._in_tables and torch.equal(tensor.cpu(), self._in_tables[kv_param])

    def process_weights_after_loading(self, layer: Any) -> None:
        """Make layer.wkv_params of the loaded tensors. Raises ConfigError for one that is missing or damaged.

        A reload keeps the ones before then, and where kernels in graphs cannot take the new ones: an exception would
        leave layers half loaded that vLLM never loads again, and a cache works with any it has.
        """
        try:
            self._make_params(layer)
        except ValueError as error:
            if not self._in_tables:
                raise
            logger.error("wkvquant: %s keeps the KV tensors from before the reload: %s", layer.layer_name, error)
            for param, before in self._in_tables.items():
                getattr(layer, KV_PREFIX + param).data.copy_(before)
        self._damaged.clear()

    def _make_params(self, layer: Any) -> None:
        tensors = {}
        for param in KV_PARAMS:
            if param in self._damaged:
                raise self._damaged[param]
            name = f"{layer.layer_name}.{KV_PREFIX}{param}"
            # without Parameter's shell: offloading may point that elsewhere later
            data = getattr(layer, KV_PREFIX + param).data
            if self._dummy and name not in self._loaded:
                data.fill_(float(param == "k_smooth"))
            if bool(data.isnan().all()):
                raise missing_kv_tensor(name)
            # some loaders copy into parameters and never call theirs
            check_kv_tensor(name, data, (layer.num_kv_heads, layer.head_size))
            tensors[param] = data
        params = KVParams.build(self.quant_config.kv, **tensors)
        on_host = {param: data.cpu().clone() for param, data in tensors.items()}
        if hasattr(layer, "wkv_params"):  # loaded again: vLLM keeps the first parameters' storage, and so do graphs
            ops.renew(layer.wkv_params, params)
            if not all(torch.equal(data, self._in_tables[param]) for param, data in on_host.items()):
                logger.warning_once(
                    "wkvquant: the reload changed KV tensors, which pages from before it were not written with: reset "
                    "the prefix cache, with running requests and KV connectors, before the next request"
                )
        else:
            layer.wkv_params = params
        self._in_tables = on_host
        for param in on_host:
            self._serving.setdefault(param, getattr(layer, KV_PREFIX + param))
