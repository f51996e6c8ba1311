"""The process of one measurement by throughput.py, memory.py or needles.py: a fresh engine.

    python benchmarks/engine_cell.py SPEC.json ROWS.jsonl

cells.py writes the specification, reads the rows and says what may be in them.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rows import make_params
from vllm import LLM, SamplingParams
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind

from vllm_wkvquant import ops
from vllm_wkvquant.checkpoint import KV_PREFIX, QUANT_METHOD

LOAD_FORMAT = "random"
SAMPLE_SECONDS = 0.25  # between looks at the engine's metrics
WARM_UP = 16  # requests before the measured ones, and output tokens of each


# at import, so that the engine's processes have it, too, however they are started
@register_model_loader(LOAD_FORMAT)
class RandomModelLoader(DummyModelLoader):
    """Any codes, norms and scales of 1, calibrated-like KV parameters; the rest is vLLM's dummy, within 1e-3 of 0.

    vLLM's dummy alone leaves codes as they were allocated and makes norms, hence keys and values, tiny. KV parameters
    come in through their own loader, so that everything derived from them sees these values.
    """

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        super().load_weights(model, model_config)
        params = make_params(model_config.get_total_num_kv_heads(), head_size=model_config.get_head_size())
        for name, parameter in model.named_parameters():
            leaf = name.rpartition(".")[2]
            if leaf.startswith(KV_PREFIX):
                parameter.weight_loader(parameter, getattr(params, leaf.removeprefix(KV_PREFIX)))
            elif parameter.dtype == torch.int32:
                parameter.data.random_(-(2**31), 2**31)
            elif parameter.is_floating_point() and parameter.dim() <= 1:
                parameter.data.fill_(1)


def make_engine(spec: dict[str, Any], **options: Any) -> LLM:
    """spec["engine"]: arguments of LLM; so are `options`."""
    if current_platform.is_cpu() and spec["engine"]["kv_cache_dtype"] == "int4_per_token_head":
        raise NotImplementedError("vLLM's CPU attention accepts int4_per_token_head and has no kernel for it")
    return LLM(**spec["engine"], disable_log_stats=False, **options)


def make_random_engine(spec: dict[str, Any]) -> LLM:
    """An engine that only its speed and memory can be measured of."""
    return make_engine(
        spec, load_format=LOAD_FORMAT, skip_tokenizer_init=True, dtype="bfloat16", enable_prefix_caching=False
    )


def prompts(llm: LLM, count: int, length: int) -> list[dict[str, Any]]:
    """Random tokens, the same in every process."""
    vocab = llm.llm_engine.model_config.get_vocab_size()
    tokens = torch.randint(vocab, (count, length), generator=torch.Generator().manual_seed(0))
    return [{"prompt_token_ids": row} for row in tokens.tolist()]


def sampling(output_len: int, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True, detokenize=False, **more)


def capacity(llm: LLM) -> int:
    """Tokens that the KV cache holds."""
    cache = llm.llm_engine.vllm_config.cache_config
    return cache.num_gpu_blocks * cache.block_size


def describe(llm: LLM) -> dict[str, Any]:
    """What every row says of its engine. kernels: of the 4-bit cache, where it is in use."""
    config = llm.llm_engine.vllm_config
    row = {
        "device": current_platform.get_device_name(),
        "kv_cache_tokens": capacity(llm),
        "kv_block_size": config.cache_config.block_size,
    }
    if config.model_config.quantization == QUANT_METHOD and config.cache_config.cache_dtype == "auto":
        row["kernels"] = ops.default_variant(current_platform.device_type, config.model_config.get_head_size())
    return row


def metric(llm: LLM, name: str) -> float:
    """A gauge or counter of the engine, "vllm:" left out."""
    return next(m.value for m in llm.get_metrics() if m.name == f"vllm:{name}")


def throughput(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One row: all requests at once, until the last one is done."""
    (point,) = spec["points"]
    requests, input_len, output_len = (point[name] for name in ("requests", "input_len", "output_len"))
    llm = make_random_engine(spec)
    warm_up = sampling(min(WARM_UP, output_len))
    llm.generate(prompts(llm, min(WARM_UP, requests), input_len), warm_up, use_tqdm=False)
    preempted = metric(llm, "num_preemptions")
    inputs = prompts(llm, requests, input_len)
    engine, running, next_look = llm.llm_engine, 0, 0.0
    start = time.perf_counter()
    for i, prompt in enumerate(inputs):
        engine.add_request(str(i), prompt, sampling(output_len, output_kind=RequestOutputKind.FINAL_ONLY))
    produced = 0
    while engine.has_unfinished_requests():
        produced += sum(len(output.outputs[0].token_ids) for output in engine.step())
        if running == 0 or time.perf_counter() >= next_look:
            running = max(running, int(metric(llm, "num_requests_running")))
            next_look = time.perf_counter() + SAMPLE_SECONDS
    seconds = time.perf_counter() - start
    if produced != requests * output_len:
        raise RuntimeError(f"{requests} requests produced {produced} tokens instead of {output_len} each")
    yield describe(llm) | {
        "seconds": round(seconds, 4),
        "output_tokens_per_s": round(produced / seconds, 1),
        "total_tokens_per_s": round((requests * input_len + produced) / seconds, 1),
        "peak_running": running,
        "preemptions": int(metric(llm, "num_preemptions") - preempted),
    }


def decode_times(llm: LLM, point: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of the steps that decode one token of each of `batch` sequences of `context` tokens and a few."""
    engine, batch, context = llm.llm_engine, point["batch"], point["context"]
    block_size = engine.vllm_config.cache_config.block_size
    needed = batch * math.ceil((context + point["room"]) / block_size) * block_size
    if needed > capacity(llm):
        raise RuntimeError(f"{batch} x {context} needs {needed} tokens of KV cache, there are {capacity(llm)}")
    names = [f"{batch}x{context}-{i}" for i in range(batch)]
    params = sampling(point["room"], output_kind=RequestOutputKind.DELTA)
    start = time.perf_counter()
    for name, prompt in zip(names, prompts(llm, batch, context), strict=True):
        engine.add_request(name, prompt, params)
    try:
        # the first step that has a token of everyone still holds the end of a prefill
        while len(engine.step()) < batch:
            if not engine.has_unfinished_requests():
                raise RuntimeError(f"no step had tokens of all {batch} sequences")
        prefill_seconds = time.perf_counter() - start
        times = []
        for _ in range(point["skipped"] + point["steps"]):
            begin = time.perf_counter()
            produced = 0
            while not produced:  # a call that only queues a batch returns nothing
                produced = len(engine.step())
            times.append(1e3 * (time.perf_counter() - begin))
            if produced != batch:
                raise RuntimeError(f"a step had tokens of {produced} sequences out of {batch}")
    finally:
        engine.abort_request(names)
    times = sorted(times[point["skipped"] :])
    return {
        "ms": round(statistics.median(times), 3),
        "ms_p10": round(times[len(times) // 10], 3),
        "ms_p90": round(times[9 * len(times) // 10], 3),
        "prefill_seconds": round(prefill_seconds, 2),
    }


def step(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for each point; one that fails is a row with an error."""
    llm = make_random_engine(spec)
    mode = llm.llm_engine.vllm_config.compilation_config.cudagraph_mode
    common = describe(llm) | {"cudagraph_mode": getattr(mode, "name", str(mode))}
    for point in spec["points"]:
        try:
            yield common | decode_times(llm, point)
        except RuntimeError as error:
            yield common | {"error": f"{type(error).__name__}: {error}"}


def storage_bytes(tensors: Any) -> int:
    """Bytes of all storages that tensors, possibly several of one storage, live in."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def memory(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One row: where the GPU's memory is at the peak of one sequence's prefill and decode, in bytes."""
    (point,) = spec["points"]
    llm = make_random_engine(spec)
    (weights,) = llm.apply_model(lambda model: storage_bytes([*model.parameters(), *model.buffers()]))
    attention = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    cache = storage_bytes(layer.kv_cache for layer in attention.values())
    torch.cuda.empty_cache()  # what loading has left
    torch.cuda.reset_peak_memory_stats()
    llm.generate(prompts(llm, 1, point["tokens"] - WARM_UP), sampling(WARM_UP), use_tqdm=False)
    torch.cuda.synchronize()
    peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    free, total = torch.cuda.mem_get_info()
    yield describe(llm) | {
        "weights": weights,
        "kv_per_token": cache / capacity(llm),
        "activations": peak - weights - cache,
        "graphs": reserved - peak,
        "not_torch": total - free - reserved,
    }


def answers(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for each point: the greedy answers to its prompts, and how many tokens of each the prefix cache had.

    A prompt finds nothing in that cache but its own one of the point's `others`, where these are not None: they are
    answered before, as many at a time as the cache holds with their prompts.
    """
    llm = make_engine(spec, enable_prefix_caching=True)
    block = llm.llm_engine.vllm_config.cache_config.block_size

    def answer(prompts: list[list[int]], salts: list[str], max_tokens: int) -> list[Any]:
        inputs = [{"prompt_token_ids": p, "cache_salt": salt} for p, salt in zip(prompts, salts, strict=True)]
        return llm.generate(inputs, SamplingParams(temperature=0, max_tokens=max_tokens), use_tqdm=False)

    for number, point in enumerate(spec["points"]):
        prompts, others, max_tokens = point["prompts"], point["others"], point["max_tokens"]
        salts = [f"{number} {i}" for i in range(len(prompts))]
        at_once, outputs = len(prompts), []
        if others:
            longest = max(map(len, prompts + others)) + max_tokens
            at_once = max(1, capacity(llm) // (longest + 2 * block))
        start = time.perf_counter()
        for i in range(0, len(prompts), at_once):
            part = slice(i, i + at_once)
            if others:
                answer(others[part], salts[part], max_tokens=1)
            outputs += answer(prompts[part], salts[part], max_tokens)
        yield describe(llm) | {
            "seconds": round(time.perf_counter() - start, 1),
            "answers": [output.outputs[0].text for output in outputs],
            "cached": [output.num_cached_tokens or 0 for output in outputs],
        }


OPERATIONS: dict[str, Callable[[dict[str, Any]], Iterator[dict[str, Any]]]] = {
    "throughput": throughput,
    "step": step,
    "memory": memory,
    "answers": answers,
}


def main() -> None:
    """Append a row to the file as soon as it is there."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    with Path(sys.argv[2]).open("a") as file:
        for row in OPERATIONS[spec["op"]](spec):
            file.write(json.dumps(row) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
