"""Hidden states that a GPU's host keeps: pinned where it can, and the same windows as ever. Pinning has a stand-in."""

import dataclasses
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import save_text, tiny_model

from vllm_wkvquant.quantize import estimate, state, storage
from vllm_wkvquant.quantize.blocks import first_hidden
from vllm_wkvquant.quantize.files import WriteError
from vllm_wkvquant.quantize.plan import Plan, Settings, preflight

SAMPLES, SEQ_LEN = 8, 32


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    root = tmp_path_factory.mktemp("storage")
    model, text = tiny_model(root / "model", num_layers=2), save_text(root / "calib.txt")
    return preflight(Settings(model, root / "out", text, recipe="paper", samples=SAMPLES, seq_len=SEQ_LEN))


@pytest.fixture
def of_gpu(plan: Plan) -> Plan:
    """The same, for a GPU that leaves hidden states on the host."""
    return dataclasses.replace(plan, settings=dataclasses.replace(plan.settings, device="cuda"))


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What has been pinned."""
    made: list[torch.Tensor] = []

    def pin(self: torch.Tensor) -> torch.Tensor:
        made.append(self.clone())
        return made[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    return made


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    monkeypatch.setattr(storage.logger, "propagate", True)
    storage.warn_pageable.cache_clear()
    with caplog.at_level(logging.WARNING, "vllm.wkvquant"):
        yield caplog
    storage.warn_pageable.cache_clear()


def test_nothing_is_pinned_without_a_gpu(plan: Plan, of_gpu: Plan, pinned: list[torch.Tensor]) -> None:
    run = torch.randn(3, 4, 5)
    assert storage.keep(plan, run, "cpu") is run
    first_hidden(plan)
    assert storage.keep(of_gpu, run, "meta").device.type == "meta"  # stands for the GPU's own memory
    assert pinned == []


def test_all_runs_are_pinned_on_the_host_of_a_gpu(plan: Plan, of_gpu: Plan, pinned: list[torch.Tensor]) -> None:
    expected, runs = first_hidden(plan), first_hidden(of_gpu)
    assert runs.keys() == expected.keys()
    for name, run in runs.items():
        assert torch.equal(run, expected[name]), name
        assert any(run is x for x in pinned), name
    addresses = {run.untyped_storage().data_ptr() for run in expected.values()}
    assert len(addresses) == len(expected)  # runs go their own ways


def test_what_cannot_be_pinned_is_kept_as_it_is(
    of_gpu: Plan, monkeypatch: pytest.MonkeyPatch, warned: pytest.LogCaptureFixture
) -> None:
    def fail(self: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.Tensor, "pin_memory", fail)
    run = torch.randn(3, 4, 5)
    assert storage.keep(of_gpu, run, "cpu") is run
    assert storage.keep(of_gpu, run, "cpu") is run
    (warning,) = warned.messages
    assert "slower to move: CUDA error: out of memory" in warning


@pytest.mark.parametrize("workers", [1, 2])
def test_no_more_is_pinned_than_half_of_what_is_free(
    workers: int,
    of_gpu: Plan,
    pinned: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    warned: pytest.LogCaptureFixture,
) -> None:
    of_gpu = dataclasses.replace(of_gpu, workers=dataclasses.replace(of_gpu.workers, size=workers))
    run = torch.zeros(3, 100)
    assert storage.pinned_bytes(run.nbytes) == 2048
    monkeypatch.setattr(storage, "free_bytes", lambda device: 2 * workers * 2048 - 1)
    assert storage.keep(of_gpu, run, "cpu") is run
    assert "too little is free" in warned.messages[0]
    assert pinned == []
    monkeypatch.setattr(storage, "free_bytes", lambda device: 2 * workers * 2048)
    assert storage.keep(of_gpu, run, "cpu") is pinned[0]


@pytest.mark.parametrize(("size", "taken"), [(1, 1), (2, 2), (3, 4), (2**32, 2**32), (2**32 + 1, 2**33)])
def test_powers_of_two(size: int, taken: int) -> None:
    assert storage.pinned_bytes(size) == taken


def test_the_estimate_counts_what_is_pinned(of_gpu: Plan) -> None:
    """Of the reference, the exact run, one candidate, and the targets of five followers."""
    token = of_gpu.adapter.config.hidden_size * 4
    samples, held_out, train = SAMPLES * SEQ_LEN * token, 2 * SEQ_LEN * token, 6 * SEQ_LEN * token
    assert (samples, held_out) == (2**17, 2**15)
    assert train < storage.pinned_bytes(train) == 2**17
    of_runs = 2 * samples + held_out + 256 * token
    assert estimate.hidden_bytes(of_gpu) == estimate.hidden_bytes(of_gpu, storage.pinned_bytes) == of_runs
    assert estimate.target_bytes(of_gpu) == 5 * train
    assert estimate.target_bytes(of_gpu, storage.pinned_bytes) == 5 * 2**17
    block = 2 * of_gpu.adapter.numel(of_gpu.adapter.block_names(0))
    captured = estimate.captured_bytes(of_gpu)
    assert estimate.host_bytes(of_gpu) == block + of_runs + 5 * 2**17 + captured + of_runs  # and a copy to be written


def test_a_gpu_goes_on_while_a_block_is_written(
    of_gpu: Plan, plan: Plan, pinned: list[torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is what the hidden states were, and an error comes out of the call after."""
    assert storage.stage(plan) is None
    go_on, write = threading.Event(), state.write_tensors

    def slowly(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        assert go_on.wait(60)
        write(path, tensors)

    monkeypatch.setattr(state, "write_tensors", slowly)
    run = state.RunState(tmp_path / "out", {"a": 1}, storage.stage(of_gpu))
    hidden = {"reference": torch.ones(3, 4, 5)}
    run.commit({"x": torch.ones(1)}, {}, hidden)
    hidden["reference"] += 1
    assert not (run.directory / "run.json").exists()
    go_on.set()
    run.commit({"x": torch.ones(1)}, {}, hidden)
    run.wait()
    assert len(pinned) == 1
    torch.testing.assert_close(run.hidden(), {"reference": 2 * torch.ones(3, 4, 5)})
    assert json.loads((run.directory / "run.json").read_text())["blocks_done"] == 2

    def fail(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        raise WriteError(path, OSError(28, "No space left on device"))

    monkeypatch.setattr(state, "write_tensors", fail)
    run.commit({"x": torch.ones(1)}, {}, hidden)
    with pytest.raises(WriteError, match="No space left"):
        run.commit({"x": torch.ones(1)}, {}, hidden)
    assert json.loads((run.directory / "run.json").read_text())["blocks_done"] == 2


def test_windows_are_taken_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    run = torch.randn(4, 3, 2)
    assert torch.equal(storage.take(run, [2, 0], torch.device("cpu")), run[[2, 0]])
    copies: list[tuple[torch.Tensor, Any]] = []
    copy = torch.Tensor.to

    def note(self: torch.Tensor, device: torch.device, **how: Any) -> torch.Tensor:
        copies.append((self, how))
        return copy(self, device, **how)

    monkeypatch.setattr(torch.Tensor, "to", note)
    taken = storage.take(run, [2, 0], torch.device("meta"))  # stands for a GPU
    assert (taken.device.type, taken.shape) == ("meta", (2, 3, 2))
    assert [how for _, how in copies] == 2 * [{"non_blocking": True}]
    for (window, _), i in zip(copies, [2, 0], strict=True):
        assert window.data_ptr() == run[i].data_ptr()  # the pinned memory itself, no copy of it


@pytest.mark.parametrize("group", ["/", "/docker/0123"])
def test_a_container_limits_what_is_free(group: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the group is seen as the root, and where it has a path; files that the kernel keeps are as good as free."""
    machine = storage.free_bytes("cpu")
    (tmp_path / "own").write_text(f"4:memory:/elsewhere\n0::{group}\n")
    monkeypatch.setattr(storage, "OWN_GROUP", tmp_path / "own")
    monkeypatch.setattr(storage, "GROUPS", tmp_path / "groups")
    for limit, folder in (("10000", "groups"), ("max", "groups/docker")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "memory.max").write_text(f"{limit}\n")
        (tmp_path / folder / "memory.current").write_text("9000\n")
        (tmp_path / folder / "memory.stat").write_text("anon 3000\ninactive_file 5000\nactive_file 500\n")
    assert list(storage.left_by_groups()) == [6500]
    assert storage.free_bytes("cpu") == 6500
    (tmp_path / "groups" / "memory.max").write_text("max\n")
    assert list(storage.left_by_groups()) == []
    assert storage.free_bytes("cpu") > machine / 2
