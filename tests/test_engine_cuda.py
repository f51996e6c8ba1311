"""A real engine on a GPU, with and without CUDA graphs, against the specification on the CPU."""

from typing import Any

import pytest
import torch
from engine import Result, engine, generate
from llama import ReferenceLlama
from test_engine import mean_difference, stored_tokens
from transformers import AutoTokenizer
from vllm.compilation import monitor

from vllm_wkvquant import ops
from vllm_wkvquant.plugin import prefill

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")

SIZES = {"cudagraph_capture_sizes": [1, 2, 4, 8]}
MODES: dict[str, dict[str, Any]] = {
    "eager": {},
    "decode steps": {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"} | SIZES},
    "default": {"compilation_config": SIZES},
    "default, second runner": {"compilation_config": SIZES},
}
CHUNK = 192  # tokens of a step
STEPS = 24


def check(reference: ReferenceLlama, result: Result, stored: list, starts: list[int]) -> None:
    """Codes of the pages and log-probabilities of the output are those of the specification with these starts.

    The log-probabilities are those of the pages' own codes: test_engine.py says why.
    """
    positions = torch.arange(len(result.prompt) - 1, len(result.tokens) - 1)

    def logprobs(cache: str) -> torch.Tensor:
        values = reference.logprobs(result.tokens[:-1], starts, cache, stored)
        return values[positions, torch.tensor(result.tokens)[positions + 1]]

    right = logprobs("past_only")
    pairs = [pair for layers in zip(stored, reference.stored, strict=True) for pair in zip(*layers, strict=True)]
    steps = torch.cat([(ours[0].int() - theirs[0].int()).abs().flatten() for ours, theirs in pairs])
    error, distance = mean_difference(result.logprobs, right), mean_difference(logprobs("all"), right)
    differ = (steps > 0).float().mean().item()
    print(
        f"{len(result.prompt)} tokens: {error:.4f}, {distance:.4f} if all were quantized; {differ:.4f} of codes differ"
    )
    assert error <= 0.01
    assert differ < 0.03
    assert distance > 2 * error


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", ops.CAPTURED)
def test_generation_equals_the_specification(smollm2, mode: str, variant: str, monkeypatch) -> None:
    """Prompts together, one longer than a step; then again, when their first tokens are in the cache of prefixes."""
    if variant not in ops.TABLE["paged_attention"]:
        pytest.skip(f"this build lacks {variant}")
    monkeypatch.setattr(ops, "default_variant", lambda device_type, head_size: variant)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(int(mode.endswith("second runner"))))
    # the first runner forbids captures once it has made its own, for the process, and the second does not allow them
    monitor.set_cudagraph_capturing_enabled(True)
    past = []
    attend = prefill.attend
    monkeypatch.setattr(prefill, "attend", lambda chunks, *args: (past.append(chunks.passes), attend(chunks, *args)))
    tokenizer = AutoTokenizer.from_pretrained(smollm2.checkpoint)
    text = tokenizer(smollm2.test_text.read_text()[:6000])["input_ids"]
    prompts = [text[:40], text[100:164], text[300:780]]
    options = {
        "max_model_len": 1024,
        "kv_cache_memory_bytes": 256 << 20,
        "max_num_batched_tokens": CHUNK,
        "gpu_memory_utilization": 0.5,  # others may use the GPU, and the cache has its size
        "enforce_eager": mode == "eager",
    }
    runs = []
    with engine(smollm2.checkpoint, **options, enable_prefix_caching=True, **MODES[mode]) as llm:
        first = generate(llm, prompts, STEPS)
        runs += [(result, stored_tokens(llm, result), [s.start for s in result.steps]) for result in first]
        assert any(past), "no chunk had a past"
        again = generate(llm, prompts, STEPS)
        for before, result in zip(first, again, strict=True):
            begin = result.steps[0].start
            assert begin == result.cached > 0
            starts = [s.start for s in before.steps if s.start < begin] + [s.start for s in result.steps]
            runs.append((result, stored_tokens(llm, result), starts))
    reference = ReferenceLlama(smollm2.checkpoint)
    for result, stored, starts in runs:
        check(reference, result, stored, starts)
