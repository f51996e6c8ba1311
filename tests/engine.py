"""Engines for tests: in this process where they can be, with a record of every step the scheduler took."""

import contextlib
import gc
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

# read by vLLM when it starts; in this process, errors keep their type and the scheduler can be looked at
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
# an engine in this process must not pin the threads of the tests that follow
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_INT4_W4A8", "0")
os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))

import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.v1.core.sched.scheduler import Scheduler


@dataclass(frozen=True)
class Step:
    """Tokens [start, start + count) of one request, computed in one forward pass."""

    number: int
    request: str
    start: int
    count: int


class RecordingScheduler(Scheduler):
    """Keeps what it scheduled, so that a reference can use the same step boundaries."""

    steps: list[Step] = []  # noqa: RUF012 - vLLM makes the instance, so the record is the class's
    blocks: dict[str, list[int]] = {}  # noqa: RUF012 - of the one KV cache group, by request
    preemptions = 0
    number = 0

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        output = super().schedule(*args, **kwargs)
        cls = type(self)
        cls.number += 1
        for request, count in output.num_scheduled_tokens.items():
            start = self.requests[request].num_computed_tokens - count
            cls.steps.append(Step(cls.number, request, start, count))
            (cls.blocks[request],) = self.kv_cache_manager.get_block_ids(request)
        return output

    def _preempt_request(self, *args: Any, **kwargs: Any) -> Any:
        type(self).preemptions += 1
        return super()._preempt_request(*args, **kwargs)


@contextlib.contextmanager
def engine(path: Any, **options: Any) -> Iterator[LLM]:
    """An eager LLM with small limits; the caller's options win."""
    defaults = {
        "skip_tokenizer_init": True,
        "dtype": "float16",  # three more bits than bfloat16: what is left of a difference is not rounding
        "enforce_eager": True,
        "max_model_len": 512,
        "kv_cache_memory_bytes": 32 << 20,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 8,
        "block_size": 32,
        "scheduler_cls": RecordingScheduler,
        "disable_log_stats": False,
    }
    llm = LLM(str(path), **(defaults | options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


@dataclass(frozen=True)
class Result:
    """prompt + output tokens of one request, the log-probabilities of its output tokens, its steps and its pages."""

    prompt: list[int]
    output: list[int]
    logprobs: torch.Tensor
    cached: int
    steps: list[Step]
    blocks: list[int]

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output


def in_subprocess(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args) in a fresh process, for an engine that spoils its process for the next one."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def generate(llm: LLM, prompts: list[list[int]], max_tokens: int, **sampling: Any) -> list[Result]:
    """Greedy generation of all prompts together."""
    params = SamplingParams(
        temperature=0, max_tokens=max_tokens, logprobs=0, detokenize=False, ignore_eos=True, **sampling
    )
    RecordingScheduler.steps.clear()
    RecordingScheduler.blocks.clear()
    RecordingScheduler.preemptions = 0
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    results = []
    for prompt, out in zip(prompts, outputs, strict=True):
        tokens = list(out.outputs[0].token_ids)
        values = [step[token].logprob for token, step in zip(tokens, out.outputs[0].logprobs, strict=True)]
        # vLLM appends a random suffix to the request's number
        steps = [s for s in RecordingScheduler.steps if s.request.split("-")[0] == out.request_id.split("-")[0]]
        blocks = RecordingScheduler.blocks[steps[-1].request] if steps else []
        results.append(Result(prompt, tokens, torch.tensor(values), out.num_cached_tokens or 0, steps, blocks))
    return results
