"""Prompt log-probabilities from a real engine, prefilled in chunks of a known size."""

from pathlib import Path
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

from vllm_wkvquant.checkpoint import kv_elements, read_config

SPARE_TOKENS = 4 * 128  # a few pages: a window need not fill its last one, and vLLM keeps one for itself


class ExactChunkScheduler(Scheduler):
    """Raises unless every step prefills one sequence by exactly min(chunk, what is left of it)."""

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        output = super().schedule(*args, **kwargs)
        chunk = self.scheduler_config.max_num_batched_tokens
        if len(output.num_scheduled_tokens) > 1:
            raise RuntimeError(f"expected one sequence a step, got {output.num_scheduled_tokens}")
        for request_id, count in output.num_scheduled_tokens.items():
            request = self.requests[request_id]
            # super() has already counted this step's tokens as computed
            expected = min(chunk, request.num_tokens - request.num_computed_tokens + count)
            if count != expected:
                raise RuntimeError(f"expected a chunk of {expected} tokens, vLLM scheduled {count}")
        return output


def kv_cache_bytes(ckpt: Path, tokens: int) -> int:
    """Cache for so many tokens of a model in its own type, and a few pages more."""
    config = read_config(ckpt)
    element = 4 if config.get("dtype", config.get("torch_dtype")) == "float32" else 2
    return (tokens + SPARE_TOKENS) * kv_elements(config) * element


def prompt_logprobs(
    ckpt: str,
    windows: list[list[int]],
    chunk: int,
    kv_cache_dtype: str = "auto",
    dtype: str = "auto",
    quantization: str | None = None,
    **engine_options: Any,
) -> list[list[float]]:
    """Natural-log probabilities of tokens 1 .. n - 1 of each window of n tokens, from vLLM.

    Windows run one after the other, each prefilled `chunk` tokens a step with prefix caching off, so that all but the
    step's own chunk comes from the paged cache; `ExactChunkScheduler` stops the engine should vLLM do anything else.
    ckpt: a wkvquant checkpoint or any Hugging Face model. engine_options: more arguments of `vllm.LLM`.
    """
    from vllm import LLM, SamplingParams

    length = max(len(w) for w in windows) + 1  # a token is generated
    options: dict[str, Any] = {
        "quantization": quantization,
        "dtype": dtype,
        "kv_cache_dtype": kv_cache_dtype,
        "max_model_len": length,
        "kv_cache_memory_bytes": kv_cache_bytes(Path(ckpt), length),
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        **engine_options,
        "max_num_seqs": 1,
        "max_num_batched_tokens": chunk,
        "enable_chunked_prefill": True,
        "enable_prefix_caching": False,
        "async_scheduling": False,
        "scheduler_cls": ExactChunkScheduler,
    }
    llm = LLM(ckpt, **options)
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    out = []
    for window in windows:
        (result,) = llm.generate({"prompt_token_ids": window}, sampling, use_tqdm=False)
        steps: Any = result.prompt_logprobs
        out.append([step[token].logprob for step, token in zip(steps[1:], window[1:], strict=True)])
    llm.llm_engine.engine_core.shutdown()
    return out
