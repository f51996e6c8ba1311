"""Settings every test shares, and the real model that `make test` puts under demo/."""

import os
from dataclasses import dataclass
from pathlib import Path

if worker := os.environ.get("PYTEST_XDIST_WORKER"):  # gwN: its share of the cores, before threads are counted
    cores, workers = sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.sched_setaffinity(0, cores[int(worker.removeprefix("gw")) :: workers] or cores)

import pytest
import torch

pytest.register_assert_rewrite("quantizing")  # of which tests load the fixtures by `pytest_plugins`
os.environ.setdefault("VLLM_CPU_INT4_W4A8", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

torch.set_num_threads(min(torch.get_num_threads(), 8))  # small work on many cores is slower than on few

DEMO = Path(os.environ.get("WKVQUANT_DEMO", Path(__file__).parent.parent / "demo"))


@dataclass(frozen=True)
class RealModel:
    """SmolLM2-135M: the Hugging Face checkpoint, ours made from it, and two texts."""

    path: Path
    checkpoint: Path
    calib_text: Path
    test_text: Path


@pytest.fixture(scope="session")
def smollm2() -> RealModel:
    model = RealModel(DEMO / "smollm2-135m", DEMO / "smollm2-135m-wkvquant", DEMO / "calib.txt", DEMO / "test.txt")
    if not (model.checkpoint / "config.json").is_file():
        pytest.fail(f"{model.checkpoint} is missing: `make test` builds it before it runs pytest")
    return model
