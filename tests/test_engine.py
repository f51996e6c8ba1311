"""Real vLLM engines against the specification, step boundary by step boundary.

Past-only quantization makes results depend on which tokens shared a step. So each engine here records its steps, and
the reference (llama.py) computes the same model with the same boundaries: whatever the scheduler did (chunks, prefix
hits, preemption, speculation), the expected log-probabilities are known. One engine lives at a time, because vLLM's
parallel groups are global to a process.
"""

import itertools
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from ckpt import VOCAB, write_checkpoint
from engine import RecordingScheduler, Result, engine, generate, in_subprocess
from llama import ReferenceLlama
from safetensors.torch import load_file, save_file
from test_attention_backend import flash_stand_in
from transformers import AutoTokenizer
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from vllm_wkvquant import layout, ops
from vllm_wkvquant.checkpoint import KV_PARAMS
from vllm_wkvquant.config import ConfigError
from vllm_wkvquant.plugin import attention, prefill, vllm_version
from vllm_wkvquant.plugin import quantization as plugin_quantization
from vllm_wkvquant.plugin.attention import WKVQuantBackend
from vllm_wkvquant.plugin.eval_engine import ExactChunkScheduler, prompt_logprobs

# of a log-probability, in fp16: sums in another order, and codes that a last bit tips over. Quantizing the current
# token too costs several times as much, which the tests below assert. 0.03 with AVX-512, 0.04 seen without
TOLERANCE = 0.05


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(3, VOCAB) for _ in range(length)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def stress(tmp_path_factory) -> Path:
    """A shift far from the keys' mean makes their range, and so the cache, coarse."""
    return write_checkpoint(tmp_path_factory.mktemp("stress") / "model", shift=2.0)


@pytest.fixture
def scratch(tmp_path):
    return lambda **options: write_checkpoint(tmp_path / "model", **options)


def incarnations(result: Result) -> list[list[int]]:
    """Starts of the request's steps, cut where it was preempted and began again."""
    out: list[list[int]] = []
    for step in result.steps:
        if not out or step.start <= out[-1][-1]:
            out.append([])
        out[-1].append(step.start)
    return out


def expected(
    reference: ReferenceLlama, result: Result, before: list[int] | None = None, cache: str = "past_only"
) -> torch.Tensor:
    """What the result's log-probabilities should be. before: starts of the steps that filled a prefix it hit."""
    first = len(result.prompt)
    tokens = torch.tensor(result.tokens)
    runs = incarnations(result)
    ends = [next(s.start + s.count for s in reversed(result.steps) if s.start == run[-1]) for run in runs]
    ends[-1] = len(result.tokens) - 1
    parts, done = [], first
    for run, end in zip(runs, ends, strict=True):
        starts = [s for s in before or [] if s < run[0]] + run
        values = reference.logprobs(result.tokens[:end], starts, cache)
        wanted = torch.arange(done, end + 1)
        parts.append(values[wanted - 1, tokens[wanted]])
        done = end + 1
    return torch.cat(parts)


def mean_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().mean().item()


def check(reference: ReferenceLlama, result: Result, before: list[int] | None = None, factor: float = 0.5) -> None:
    """The engine is within TOLERANCE of past-only, and nearer to it than to a cache of everything by `factor`."""
    right = expected(reference, result, before)
    wrong = expected(reference, result, before, cache="all")
    assert mean_difference(right, result.logprobs) < TOLERANCE
    assert mean_difference(right, result.logprobs) < factor * mean_difference(right, wrong)


def attention_layers(llm) -> list:
    context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    return [layer for name, layer in sorted(context.items()) if name.endswith("attn")]


def is_4_bit(layer) -> bool:
    """By its backend, and by the tensor that vLLM bound to it."""
    ours = layer.attn_backend is WKVQuantBackend
    assert ours == (layer.kv_cache.dtype == torch.uint8 and layer.kv_cache.shape[3] == layout.token_bytes(64))
    return ours


# --- memory


def capacity(path: Path, **options) -> tuple[int, int, set]:
    """(tokens, bytes allocated, cache dtypes of the layers) in 256 MB."""
    with engine(path, kv_cache_memory_bytes=256 << 20, **options) as llm:
        cache = llm.llm_engine.vllm_config.cache_config
        storages = {layer.kv_cache.untyped_storage().data_ptr(): layer.kv_cache for layer in attention_layers(llm)}
        allocated = sum(t.untyped_storage().nbytes() for t in storages.values())
        dtypes = {layer.kv_cache.dtype for layer in attention_layers(llm)}
        assert len(attention_layers(llm)) == 3
        return cache.num_gpu_blocks * cache.block_size, allocated, dtypes


@pytest.mark.parametrize(("head_size", "ratio"), [(64, 3.5), (128, 3.7)])
def test_capacity_against_bf16(scratch, head_size: int, ratio: float) -> None:
    path = scratch(head_size=head_size, heads=4, kv_heads=2)
    ours, our_bytes, our_dtypes = capacity(path)
    theirs, their_bytes, their_dtypes = capacity(path, kv_cache_dtype="bfloat16", dtype="bfloat16")
    assert our_dtypes == {torch.uint8}
    assert their_dtypes == {torch.bfloat16}
    assert ours >= ratio * theirs
    for tokens, allocated, per_head in (
        (ours, our_bytes, layout.token_bytes(head_size)),
        (theirs, their_bytes, 4 * head_size),
    ):
        assert allocated == tokens * per_head * 2 * 3
        assert 0.99 * (256 << 20) < allocated <= 256 << 20


# --- the engine equals the specification


def stored_tokens(llm, result: Result) -> list:
    """What the pages hold of the result's computed tokens, by layer, as (codes, scale, minimum) of K and V."""
    positions = torch.arange(len(result.tokens) - 1)
    out = {}
    for layer in attention_layers(llm):
        block_size = layer.kv_cache.shape[2]
        slots = torch.tensor(result.blocks)[positions // block_size] * block_size + positions % block_size
        stored = layout.load(layer.kv_cache, slots.to(layer.kv_cache.device), layer.head_size)
        out[extract_layer_index(layer.layer_name)] = tuple(tuple(x.cpu() for x in part) for part in stored)
    return [out[i] for i in range(len(out))]


def test_decode_of_a_real_model_equals_the_specification(smollm2) -> None:
    """64 decode steps of SmolLM2, all but one token past, teacher-forced on the engine's greedy tokens.

    Rounding to 4 bits makes 30 layers chaotic: a change in the last bit of one activation tips a code, which tips
    others, so two right computations soon hold different codes. Hence two questions, each with a sharp answer. The
    pages hold the codes of the specification, but for ones that lay on a boundary; and with the codes of the pages the
    specification gives the engine's log-probabilities.
    """
    tokenizer = AutoTokenizer.from_pretrained(smollm2.checkpoint)
    text = tokenizer(smollm2.test_text.read_text()[:4000])["input_ids"]
    prompts = [text[:40], text[100:164], tokenizer("One, two, three, four, five,")["input_ids"], text[200:220]]
    with engine(smollm2.checkpoint, kv_cache_memory_bytes=64 << 20) as llm:
        # the pages are free when a request is done, and hold its tokens until the next one
        runs = [(result, stored_tokens(llm, result)) for tokens in prompts for result in generate(llm, [tokens], 65)]
    reference = ReferenceLlama(smollm2.checkpoint)
    errors, distances = [], []
    for result, stored in runs:
        first, last = len(result.prompt), len(result.tokens) - 1
        starts = [s.start for s in result.steps]
        assert starts == [0, *range(first, first + 64)]
        positions = torch.arange(first, last)

        def logprobs(cache: str, result=result, stored=stored, starts=starts, positions=positions) -> torch.Tensor:
            values = reference.logprobs(result.tokens[:-1], starts, cache, stored)
            return values[positions, torch.tensor(result.tokens)[positions + 1]]

        error = mean_difference(result.logprobs[1:], logprobs("past_only"))
        for i, layer in enumerate(reference.stored):
            for (ours, *_), (right, *_) in zip(stored[i], layer, strict=True):
                steps = (ours.int() - right.int()).abs()
                assert (steps > 0).float().mean() < 0.03, i
                assert steps.max() <= 2, i
        assert error <= 0.01
        errors.append(error)
        distances.append(mean_difference(logprobs("past_only"), logprobs("all")))
    # reading the current token from the cache, too, would have been seen
    assert sum(distances) > 2 * sum(errors)


@pytest.fixture(scope="class", params=["one op", "gathered chunks"])
def coarse(stress, request):
    """The engine, and one that treats chunks as on a GPU, in passes of 128 keys, with FlashAttention stood in for."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "gathered chunks":
            patch.setattr(attention, "_captures", lambda device_type, head_size: True)
            patch.setattr(prefill, "flash_attention", lambda head_size, dtype: flash_stand_in)
            patch.setattr(prefill, "WORKSPACE", 0)
        gather, gathered = ops.gather_kv, []
        patch.setattr(ops, "gather_kv", lambda *args: (gathered.append(args[8]), gather(*args)))
        with engine(stress) as llm:
            yield llm, ReferenceLlama(stress)
        assert max(gathered, default=0) == (128 if request.param == "gathered chunks" else 0)


class TestScheduling:
    """One engine with a coarse cache, where steps shared or not make a difference of 0.1 and more."""

    def test_decode(self, coarse) -> None:
        llm, reference = coarse
        (result,) = generate(llm, [prompt(40)], 65)
        assert [s.start for s in result.steps] == [0, *range(40, 104)]
        right, wrong = (expected(reference, result, cache=c)[1:] for c in ("past_only", "all"))
        distance = mean_difference(right, wrong)
        assert distance >= 0.1
        assert mean_difference(right, result.logprobs[1:]) <= distance / 2

    def test_chunked_prefill(self, coarse) -> None:
        llm, reference = coarse
        (result,) = generate(llm, [prompt(200, seed=3)], 16)
        assert [(s.start, s.count) for s in result.steps[:4]] == [(0, 64), (64, 64), (128, 64), (192, 8)]
        check(reference, result)

    def test_prefix_hit(self, coarse) -> None:
        """Pages another request filled serve this one: the donor's boundaries before the hit, its own after."""
        llm, reference = coarse
        text = prompt(150, seed=4)
        (donor,) = generate(llm, [text], 2)
        (result,) = generate(llm, [text[:130]], 16)
        assert result.cached == 128
        assert result.steps[0].start == 128
        before = [s.start for s in donor.steps]
        assert before[:3] == [0, 64, 128]
        check(reference, result, before)
        # recomputed from nothing, but in the same chunks, it is the same
        assert llm.llm_engine.reset_prefix_cache()
        (again,) = generate(llm, [text[:130]], 16)
        assert again.cached == 0
        assert again.output == result.output
        assert mean_difference(again.logprobs, result.logprobs) < 0.01

    def test_mixed_batch(self, coarse) -> None:
        """Prefill chunks and decodes of different lengths share steps."""
        llm, reference = coarse
        results = generate(llm, [prompt(n, seed=10 + n) for n in (1, 17, 90, 33, 140)], 24)
        shared = {s.number for s in results[0].steps} & {s.number for s in results[4].steps}
        assert len(shared) > 10
        for result in results:
            check(reference, result)


def test_preemption_and_recompute(stress) -> None:
    """Seven blocks for two requests that come to need four each."""
    with engine(stress, num_gpu_blocks_override=8, max_model_len=192, enable_prefix_caching=False) as llm:
        results = generate(llm, [prompt(50 + i, seed=i) for i in range(2)], 60)
        assert RecordingScheduler.preemptions > 0
        assert llm.llm_engine.vllm_config.cache_config.num_gpu_blocks == 8
    reference = ReferenceLlama(stress)
    again = [r for r in results if len(incarnations(r)) > 1]
    assert again
    for result in again:
        assert len(result.output) == 60
        check(reference, result)


def speculate(path: Path, text: list[int]) -> Result:
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 2}
    with engine(path, speculative_config=speculation) as llm:
        return generate(llm, [text], 48)[0]


def test_ngram_speculation(tiny) -> None:
    """Drafts are accepted, and the tokens are those of plain greedy decoding."""
    text = prompt(12) * 6
    # n-gram drafts load numba, whose llvmlite makes vLLM's next CPU engine of the process fail in its scan of modules
    result = in_subprocess(speculate, tiny, text)
    with engine(tiny) as llm:
        (plain,) = generate(llm, [text], 48)
    decodes = result.steps[2:]
    assert any(s.count > 1 for s in decodes)
    accepted = [b.start - a.start for a, b in itertools.pairwise(decodes)]
    assert sum(a > 1 for a in accepted) > 3
    assert result.output == plain.output
    check(ReferenceLlama(tiny), result)


def test_draft_model(tiny, monkeypatch) -> None:
    """A checkpoint of ours as its own draft, on the paths of a GPU: a complete prefill of it has all accepted."""
    monkeypatch.setattr(attention, "_captures", lambda device_type, head_size: True)
    monkeypatch.setattr(prefill, "flash_attention", lambda head_size, dtype: flash_stand_in)
    speculation = {"method": "draft_model", "model": str(tiny), "num_speculative_tokens": 3}
    with engine(tiny, speculative_config=speculation, max_num_batched_tokens=256) as llm:
        results = generate(llm, [prompt(12) * 6, prompt(100, seed=9)], 48)
    reference = ReferenceLlama(tiny)
    for result in results:
        check(reference, result)
        accepted = [b.start - a.start for a, b in itertools.pairwise(result.steps[1:])]
        assert sum(accepted) > 3 * len(accepted)


@pytest.mark.parametrize("freed", [True, False])
def test_sliding_window(scratch, monkeypatch, freed: bool) -> None:
    """freed: pages behind the window, which vLLM before 0.28 is not let do."""
    path = scratch(sliding_window=48, shift=1.0)
    if not freed:
        monkeypatch.setattr(plugin_quantization, "_sizes_windowed_pages", lambda: False)
    with engine(path) as llm:
        assert all(layer.impl.sliding_window == 48 for layer in attention_layers(llm))
        specs = [layer.get_kv_cache_spec(llm.llm_engine.vllm_config) for layer in attention_layers(llm)]
        assert all(isinstance(spec, SlidingWindowSpec) == plugin_quantization._sizes_windowed_pages() for spec in specs)
        (result,) = generate(llm, [prompt(150)], 48)
    reference = ReferenceLlama(path)
    check(reference, result)
    error = mean_difference(expected(reference, result), result.logprobs)
    # one position more or less would show
    for window in (47, 49):
        reference.config["sliding_window"] = window
        assert mean_difference(expected(reference, result), result.logprobs) > 2 * error


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_tensor_parallel(scratch, monkeypatch, kv_heads: int) -> None:
    """Two ranks with two KV heads each, or with a copy each of the only one."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = scratch(kv_heads=kv_heads, shift=1.0)
    with engine(path, tensor_parallel_size=2, distributed_executor_backend="mp") as llm:
        (result,) = generate(llm, [prompt(100)], 32)
    check(ReferenceLlama(path), result)


@pytest.mark.parametrize("head_size", [80, 96, 256])
def test_head_sizes(scratch, head_size: int) -> None:
    path = scratch(head_size=head_size, heads=4, kv_heads=2, hidden=320 if head_size == 80 else 256, shift=1.0)
    with engine(path) as llm:
        (result,) = generate(llm, [prompt(100)], 32)
    check(ReferenceLlama(path), result)


def test_biased_keys(scratch) -> None:
    """Head size 128 and a bias of 8 on keys of size 1, as Qwen2 has: the rotating shift takes it out."""
    path = scratch(head_size=128, heads=4, kv_heads=2, key_bias=8.0, shift=0.5)
    with engine(path) as llm:
        (result,) = generate(llm, [prompt(100)], 64)
    reference = ReferenceLlama(path)
    right = mean_difference(expected(reference, result), result.logprobs)
    assert right < 3 * TOLERANCE
    # a cache that leaves the shift to the quantizer could not be mistaken for this one
    plain = {param: torch.full((2, 128), float(param == "k_smooth")) for param in KV_PARAMS}
    reference.params = [type(p).build(reference.ckpt.kv, **plain) for p in reference.params]
    assert mean_difference(expected(reference, result), result.logprobs) > 3 * right


# --- what the user asks for wins


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8", "int4_per_token_head"])
def test_explicit_cache_dtype_is_vllms_own(tiny, dtype: str) -> None:
    if dtype != "bfloat16" and not torch.cpu._is_avx512_supported():
        pytest.skip("vLLM has this cache on CPUs with AVX-512 alone")
    if dtype == "int4_per_token_head" and vllm_version() >= "0.33":
        pytest.skip("from 0.33 on vLLM refuses this cache on a CPU, where it has no kernel for it")
    with engine(tiny, kv_cache_dtype=dtype, dtype="bfloat16") as llm:
        for layer in attention_layers(llm):
            assert layer.attn_backend.__module__.startswith("vllm.")
            assert layer.kv_cache_dtype == dtype
            assert not [name for name, _ in layer.named_parameters() if "wkv" in name]
        if dtype == "bfloat16":
            (result,) = generate(llm, [prompt(100)], 32)
            reference = ReferenceLlama(tiny, torch.bfloat16)
            assert mean_difference(expected(reference, result, cache="none"), result.logprobs) < TOLERANCE


def test_skipped_layers_keep_16_bits(tiny) -> None:
    with engine(tiny, kv_cache_dtype_skip_layers=["1"]) as llm:
        assert [is_4_bit(layer) for layer in attention_layers(llm)] == [True, False, True]
        (result,) = generate(llm, [prompt(100)], 16)
    assert len(set(result.output)) > 1


def test_flag_and_detection_give_the_same(tiny) -> None:
    outputs = []
    for quantization in (None, "wkvquant"):
        with engine(tiny, quantization=quantization) as llm:
            assert llm.llm_engine.vllm_config.model_config.quantization == "wkvquant"
            assert all(is_4_bit(layer) for layer in attention_layers(llm))
            outputs.append(generate(llm, [prompt(100)], 16)[0].output)
    assert outputs[0] == outputs[1]


def test_dummy_weights(tiny) -> None:
    with engine(tiny, load_format="dummy") as llm:
        for layer in attention_layers(llm):
            assert bool((layer.wkv_params.k_smooth == 1).all())
        (result,) = generate(llm, [prompt(100)], 4)
    assert bool(result.logprobs.isfinite().all())


def test_reloaded_weights(tiny, tmp_path) -> None:
    """Those of another checkpoint, into the same tensors: a captured graph has the addresses. Damaged ones before."""
    other = write_checkpoint(tmp_path / "other", seed=1)
    damaged = shutil.copytree(other, tmp_path / "damaged")
    weights = load_file(damaged / "model.safetensors")
    del weights["model.layers.0.self_attn.attn.wkv_v_shift"]
    weights["model.layers.1.self_attn.attn.wkv_k_shift"].fill_(torch.nan)
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    prompts = [prompt(100)]
    with engine(other) as llm:
        expected = generate(llm, prompts, 16)
    with engine(tiny) as llm:
        assert generate(llm, prompts, 16)[0].output != expected[0].output
        before = [(id(x.wkv_params), x.wkv_params.k_smooth.data_ptr()) for x in attention_layers(llm)]
        tensors = [("model.layers.1.self_attn.attn.wkv_k_shift", torch.zeros(4, 64))]
        with pytest.raises(NotImplementedError, match="cannot be updated in kernel format"):
            llm.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors, "is_checkpoint_format": False})
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(damaged)})
        llm.reset_prefix_cache()
        assert bool(generate(llm, prompts, 4)[0].logprobs.isfinite().all())
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
        after = [(id(x.wkv_params), x.wkv_params.k_smooth.data_ptr()) for x in attention_layers(llm)]
        assert after == before == [(id(x.wkv_params), x.wkv_k_smooth.data_ptr()) for x in attention_layers(llm)]
        llm.reset_prefix_cache()
        reloaded = generate(llm, prompts, 16)
    assert reloaded[0].output == expected[0].output
    torch.testing.assert_close(reloaded[0].logprobs, expected[0].logprobs)


# --- bad input, as a user of LLM(...) sees it

NAME = "model.layers.2.self_attn.attn.wkv_v_shift"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"edit": {NAME: torch.full((4, 64), torch.nan)}},
            f"KV tensor {NAME} contains NaN or infinity; the checkpoint is damaged, quantize again",
        ),
        ({"edit": {NAME: None}}, f"KV tensor {NAME} is missing from the checkpoint; quantize the model again"),
        ({"edit": {NAME: torch.ones(4, 32)}}, f"KV tensor {NAME} has shape (4, 32), expected (4, 64)"),
        (
            {"section": {"layout_version": 2}},
            "KV page layout version 2 is not supported (this build uses 1); quantize the model again or install the "
            "matching vllm-wkvquant",
        ),
        (
            {"section": {"num_hidden_layers": 4}},
            "quantization_config.wkvquant says number of layers 4, the model has 3; quantize the model again",
        ),
    ],
)
def test_bad_checkpoints_are_refused(scratch, options: dict, message: str) -> None:
    # a ConfigError as it is, or inside pydantic's report on vLLM's configuration: both are ValueErrors
    with pytest.raises(ValueError, match=re.escape(message)) as error, engine(scratch(**options)):
        pass
    if "section" not in options:
        assert isinstance(error.value, ConfigError)
        assert str(error.value) == message


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e6},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 1024},
    ],
)
def test_another_rope_is_refused(tiny, rope: dict) -> None:
    message = "quantize the model with this rope, or serve with an explicit --kv-cache-dtype"
    with pytest.raises(ConfigError, match=message), engine(tiny, hf_overrides={"rope_parameters": rope}):
        pass


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_adapters_are_refused(tiny, dtype: str) -> None:
    """Under a cache of vLLM's own, too: the weights are folded all the same."""
    message = "LoRA adapters are not supported: .* merge it into the model before `wkvquant quantize`"
    with pytest.raises(ConfigError, match=message), engine(tiny, enable_lora=True, kv_cache_dtype=dtype):
        pass


def test_unsupported_block_size_is_refused(tiny) -> None:
    with pytest.raises(ValueError, match="block size 24 is not a multiple of 16"), engine(tiny, block_size=24):
        pass


# --- evaluation


def test_prompt_logprobs_in_exact_chunks(stress) -> None:
    windows = [prompt(150, seed=1), prompt(100, seed=2)]
    got = prompt_logprobs(str(stress), windows, 64, dtype="float16", kv_cache_memory_bytes=32 << 20)
    reference = ReferenceLlama(stress)
    for window, values in zip(windows, got, strict=True):
        assert len(values) == len(window) - 1
        target = torch.tensor(window[1:])[:, None]
        starts = list(range(0, len(window), 64))
        right, wrong = (
            reference.logprobs(window, starts, cache)[:-1].gather(1, target)[:, 0] for cache in ("past_only", "all")
        )
        values = torch.tensor(values)
        assert mean_difference(right, values) < 0.25 * mean_difference(right, wrong)


def test_other_chunks_stop_the_engine(tiny) -> None:
    with (
        pytest.raises(RuntimeError, match="expected one sequence a step"),
        engine(tiny, scheduler_cls=ExactChunkScheduler) as llm,
    ):
        generate(llm, [prompt(20), prompt(30)], 2)
