"""benchmarks/throughput.py and memory.py: engines of a tiny shape on the CPU, the order of a run, and the counts."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import cells
import memory
import pytest
import shapes
import throughput
import torch
from engine import engine
from rows import make_params
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_wkvquant import layout, ops, reference
from vllm_wkvquant.checkpoint import KV_PARAMS
from vllm_wkvquant.config import ConfigError, KVCacheConfig
from vllm_wkvquant.plugin import lacks_w4_kernel

GB = "0.0006"  # of cache: few blocks, so that the sequences of a bf16 cache wait for each other


def arguments(out: Path, op: str, *more: Any) -> list[str]:
    common = ["--op", op, "--shapes", "tiny", "--output", out, "--enforce-eager", "--kv-cache-gb", GB, "--json"]
    return [str(x) for x in [*common, *more]]


def read(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def frequencies(shape: shapes.Shape) -> list[float]:
    return [shape.rope_theta ** (-2 * j / shape.head_size) for j in range(shape.head_size // 2)]


def test_throughput_through_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of 4 bits holds more sequences; what is there is not measured again."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # half the processes to start
    out = tmp_path / "rows.jsonl"
    command = arguments(out, "throughput", "--variants", "w4,w4kv4", "--baseline", "none")
    assert throughput.main(command) == 0
    w4, w4kv4 = rows = read(out)
    assert [row["variant"] for row in rows] == ["w4", "w4kv4"]
    for row in rows:
        assert "error" not in row
        assert row["output_tokens_per_s"] == pytest.approx(8 * 16 / row["seconds"], rel=0.02)
        assert row["total_tokens_per_s"] == pytest.approx(8 * 48 / row["seconds"], rel=0.02)
        assert row["versions"]["torch"] == torch.__version__
    assert w4["peak_running"] < w4kv4["peak_running"] == 8
    assert w4kv4["kv_cache_tokens"] > 3 * w4["kv_cache_tokens"]
    assert "kernels" not in w4
    assert w4kv4["kernels"] == ops.default_variant(w4kv4["device"], 64)
    run(monkeypatch, [], command)
    assert read(out) == rows


def test_step_through_an_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = ["--points", "2x100,16x200", "--steps", 3, "--max-num-batched-tokens", 64]
    command = arguments(tmp_path / "rows.jsonl", "step", "--variants", "w4kv4", "--baseline", "none", *points)
    assert throughput.main(command) == 0
    fits, too_large = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert 0 < fits["ms_p10"] <= fits["ms"] <= fits["ms_p90"]
    assert fits["cudagraph_mode"] == "NONE"
    assert "16 x 200 needs" in too_large["error"]


def test_engine_has_the_weights_of_its_variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """KV parameters are calibrated-like in the parameters and in what was derived from them; bytes are as counted."""
    if lacks_w4_kernel():
        pytest.skip("weights have no codes on a CPU without AVX-512: they are dequantized")
    import engine_cell

    shape, variant = shapes.SHAPES["tiny"], shapes.VARIANTS["w4kv4"]
    (tmp_path / "config.json").write_text(json.dumps(shapes.model_config(shape, variant, 128)))
    with engine(tmp_path, load_format=engine_cell.LOAD_FORMAT, dtype="bfloat16", max_model_len=128) as llm:
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        expected = make_params(shape.kv_heads, head_size=shape.head_size)
        assert len(layers) == shape.layers
        for layer in layers.values():
            for name in KV_PARAMS:
                # made while bf16 was the default type
                torch.testing.assert_close(
                    getattr(layer.wkv_params, name), getattr(expected, name), rtol=0.02, atol=1e-3
                )
            assert layer.wkv_params.key_hadamard
            assert torch.equal(layer.wkv_params.rope_turns, reference.rope_turns(frequencies(shape)))
        model = llm.apply_model(lambda model: {name: p.detach().clone() for name, p in model.named_parameters()})[0]
        assert bool((model["model.norm.weight"] == 1).all())
        codes = model["model.layers.0.mlp.down_proj.weight_packed"].view(torch.uint8)
        assert len(codes.unique()) == 256
        # the GPU's counters, which a CPU lacks
        monkeypatch.setattr(engine_cell, "make_random_engine", lambda spec: llm)
        for name in ("empty_cache", "reset_peak_memory_stats", "synchronize"):
            monkeypatch.setattr(torch.cuda, name, lambda: None)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 100 << 20)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 120 << 20)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (50 << 20, 200 << 20))
        (row,) = engine_cell.memory({"points": [{"tokens": 64}]})
    assert row["kv_per_token"] * memory.PAGE == pytest.approx(memory.page_bytes(shape, variant), rel=0.01)
    counted = memory.weight_bytes(shape, variant)
    assert counted <= row["weights"] < 1.2 * counted  # the rotary embedding's table is large in so small a model
    cache = row["kv_per_token"] * row["kv_cache_tokens"]
    assert row["weights"] + cache + row["activations"] == pytest.approx(100 << 20)
    assert (row["graphs"], row["not_torch"]) == (20 << 20, 30 << 20)


def test_int4_per_token_head_is_refused_on_a_cpu() -> None:
    """vLLM's results would be wrong."""
    import engine_cell

    with pytest.raises(NotImplementedError, match="no kernel"):
        engine_cell.make_engine({"engine": {"kv_cache_dtype": "int4_per_token_head"}})


SPEC = {"op": "step", "config": {}, "engine": {}, "points": []}


def test_a_cell_that_fails_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for Python, called with engine_cell.py, the specification and the file of rows."""
    program = tmp_path / "python"
    program.write_text(
        '#!/bin/sh\ntest -f model/config.json && echo \'{"ms": 1}\' > $3\necho "ValueError: no"\nexit 1\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    assert cells.run_cell(SPEC, limit_seconds=10) == ([{"ms": 1}], "ValueError: no")


def test_a_cell_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nkill -SEGV $$\n")
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    assert cells.run_cell(SPEC, limit_seconds=10) == ([], "ended by SIGSEGV")


def test_a_cell_that_takes_too_long_is_ended() -> None:
    assert cells.run_cell(SPEC, limit_seconds=0.2) == ([], "not done after 0.2 s")


def test_ending_a_group_ends_its_children() -> None:
    process = subprocess.Popen(
        ["bash", "-c", "sleep 600 & echo $!; wait"], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    cells.end_group(process)
    assert process.returncode == -9
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("nothing of the kind", None),
        ("(Main pid=7) WARNING 11-23 [base.py:3] ValueError: Tokenizer not available\n", None),
        (
            "x\nTraceback (most recent call last):\n  raise ValueError(y)\nValueError: no: room\n",
            "ValueError: no: room",
        ),
        (
            "(EngineCore pid=7) ERROR 11-23 [core.py:9] torch.OutOfMemoryError: CUDA out of memory.\n"
            "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}\n",
            "torch.OutOfMemoryError: CUDA out of memory.",
        ),
        (
            "vllm.v1.engine.exceptions.EngineDeadError: see above",
            "vllm.v1.engine.exceptions.EngineDeadError: see above",
        ),
    ],
)
def test_last_exception(log: str, expected: str | None) -> None:
    assert cells.last_exception(log) == expected


class Fake:
    """Stands in for run_cell: speeds in the order of the calls, None for a failure."""

    def __init__(self, speeds: list[float | None]) -> None:
        self.speeds, self.specs = speeds, []

    def __call__(self, spec: dict[str, Any], *_: Any, **__: Any) -> tuple[list[dict[str, Any]], str | None]:
        self.specs.append(spec)
        speed = self.speeds.pop(0)
        if speed is None:
            return [], "exit status 1"
        if spec["op"] == "step":
            return [{"ms": 1 / speed} for _ in spec["points"]], None
        return [{"output_tokens_per_s": speed}], None


def run(monkeypatch: pytest.MonkeyPatch, speeds: list[float | None], command: list[str]) -> Fake:
    fake = Fake(speeds)
    monkeypatch.setattr(throughput, "run_cell", fake)
    assert throughput.main(command) == 0
    assert not fake.speeds
    return fake


def test_baseline_is_measured_at_both_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "rows.jsonl"
    run(monkeypatch, [100, 150, 102], arguments(out, "throughput", "--variants", "w4,w4kv4"))
    rows = read(out)
    assert [(row["variant"], row["closing"]) for row in rows] == [("w4", False), ("w4kv4", False), ("w4", True)]
    assert [row["ratio"] for row in rows] == [0.9901, 1.4851, 1.0099]
    assert {row["baseline_spread"] for row in rows} == {0.0198}
    assert {row["discard"] for row in rows} == {False}


@pytest.mark.parametrize("last", [104, None])
def test_run_with_a_moved_or_missing_baseline_is_discarded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: float | None
) -> None:
    out = tmp_path / "rows.jsonl"
    run(monkeypatch, [100, 150, last], arguments(out, "throughput", "--variants", "w4kv4"))
    assert [row["discard"] for row in read(out)] == [True, True, True]


def test_an_error_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = arguments(tmp_path / "rows.jsonl", "throughput", "--variants", "bf16,w4kv4", "--baseline", "none")
    run(monkeypatch, [100, None], command)
    assert [row.get("error") for row in read(tmp_path / "rows.jsonl")] == [None, "exit status 1"]
    (spec,) = run(monkeypatch, [150], command).specs
    assert spec["engine"]["kv_cache_dtype"] == "auto"
    assert [row["output_tokens_per_s"] for row in read(tmp_path / "rows.jsonl")] == [100, 150]
    assert "error" not in read(tmp_path / "rows.jsonl")[1]


def test_an_error_that_stays_costs_no_new_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = arguments(tmp_path / "rows.jsonl", "throughput", "--variants", "w4-fp8,w4kv4")
    run(monkeypatch, [100, None, 150, 100], command)
    run(monkeypatch, [None], command)
    assert [row.get("ratio") for row in read(tmp_path / "rows.jsonl")] == [1, None, 1.5, 1]


def test_a_new_variant_is_closed_by_a_new_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "rows.jsonl"
    run(monkeypatch, [100, 150, 102], arguments(out, "throughput", "--variants", "w4kv4"))
    fake = run(monkeypatch, [80, 110], arguments(out, "throughput", "--variants", "w4kv4,bf16"))
    assert ["quantization_config" in spec["config"] for spec in fake.specs] == [False, True]
    assert {row["variant"]: row["discard"] for row in read(out)} == {"w4": True, "w4kv4": True, "bf16": True}
    run(monkeypatch, [], arguments(out, "throughput", "--variants", "w4kv4,bf16"))
    run(monkeypatch, [100, 80, 150, 100], arguments(out, "throughput", "--variants", "bf16,w4kv4", "--overwrite"))
    assert {row["variant"]: row["ratio"] for row in read(out)} == {"w4": 1.0, "bf16": 0.8, "w4kv4": 1.5}
    assert len(read(out)) == 4


def test_step_measures_the_missing_points_and_compares_point_by_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "rows.jsonl"
    run(monkeypatch, [2, 3, 2], arguments(out, "step", "--variants", "w4kv4", "--points", "4x64,1x128"))
    rows = read(out)
    assert [(row["batch"], row["context"]) for row in rows] == 3 * [(4, 64), (1, 128)]
    assert [row["ratio"] for row in rows] == [1, 1, 1.5, 1.5, 1, 1]
    fake = run(monkeypatch, [2, 3, 2], arguments(out, "step", "--variants", "w4kv4", "--points", "4x64,1x128,2x32"))
    assert [[point["batch"] for point in spec["points"]] for spec in fake.specs] == [[2], [2], [4, 1, 2]]


def test_room_is_enough_for_the_steps_of_a_prefill() -> None:
    """64 sequences of 2048 tokens, 8192 a step less one for each that decodes: 17 steps."""
    args = throughput.build_parser().parse_args(["--op", "step", "--steps", "10"])
    assert throughput.decode_point(args, 64, 2048)["room"] == 17 + throughput.SKIPPED_STEPS + 10 + 2
    with pytest.raises(ConfigError, match="largest batch"):
        throughput.decode_point(args, 8192, 16)


def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argument in (["--shapes", "llama-9"], ["--variants", "w3"], ["--points", "8"]):
        with pytest.raises(SystemExit):
            throughput.main(["--op", "step", *argument])
    assert throughput.main(arguments(tmp_path / "no" / "rows.jsonl", "step")) == 2
    (tmp_path / "rows.jsonl").write_text("{")
    assert throughput.main(arguments(tmp_path / "rows.jsonl", "step")) == 2
    assert "line 1: not JSON" in capsys.readouterr().err


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_config_of_a_variant(name: str) -> None:
    shape = shapes.SHAPES[name]
    plain, w4, w4kv4 = (shapes.model_config(shape, shapes.VARIANTS[v], 9000) for v in ("bf16", "w4", "w4kv4"))
    assert "quantization_config" not in plain
    assert plain["max_position_embeddings"] == 9000
    theirs, ours = w4["quantization_config"], w4kv4["quantization_config"]
    kv = KVCacheConfig.from_dict(ours.pop("wkvquant"))
    assert (kv.num_kv_heads, kv.head_size, kv.rope.inv_freq) == (
        shape.kv_heads,
        shape.head_size,
        tuple(frequencies(shape)),
    )
    assert theirs == ours | {"quant_method": "compressed-tensors"}


@pytest.mark.parametrize(("name", "billions"), [("llama-2-7b", 6.738), ("llama-2-13b", 13.016), ("llama-3-8b", 8.030)])
def test_shapes_have_the_parameters_of_the_models(name: str, billions: float) -> None:
    shape = shapes.SHAPES[name]
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shapes.model_config(shape, shapes.VARIANTS["bf16"], 1)))
    count = sum(p.numel() for p in model.parameters())
    assert count == shape.linear_elements + shape.other_elements
    assert count / 1e9 == pytest.approx(billions, abs=5e-4)
    assert memory.weight_bytes(shape, shapes.VARIANTS["bf16"]) == 2 * count


def test_counts_of_the_papers_model(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--shapes", "llama-2-13b", "--variants", "bf16,w4,w4kv4", "--json"]
    assert memory.main(command) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [round(row["total_gb"], 1) for row in rows] == [27.7, 8.9, 7.7]
    assert [round(row["linear_and_kv_gb"], 1) for row in rows] == [row["paper_gb"] for row in rows] == [27.1, 8.0, 6.8]
    assert [row["weights_gb"] for row in rows] == [26.032, 7.248, 7.252]


def test_what_fits() -> None:
    shape = shapes.SHAPES["llama-3-8b"]
    for variant in shapes.VARIANTS.values():
        weights, page = memory.weight_bytes(shape, variant), memory.page_bytes(shape, variant)
        sequence = memory.kv_bytes(shape, variant, 100)
        assert sequence == 7 * page
        assert memory.largest_batch(shape, variant, 100, weights + 3 * sequence) == 3
        assert memory.largest_batch(shape, variant, 100, weights + 3 * sequence - 1) == 2
        assert memory.longest_context(shape, variant, weights + 3 * page) == 48
        assert memory.longest_context(shape, variant, weights + 3 * page - 1) == 32
        assert memory.largest_batch(shape, variant, 100, weights - 1) == 0
        assert memory.longest_context(shape, variant, weights - 1) == 0
    assert memory.kv_bytes(shape, shapes.VARIANTS["w4kv4"], 16) == 16 * layout.token_bytes(128) * 8 * 32


def test_tables_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert memory.main(["--contexts", "1024"]) == 0
    out = capsys.readouterr().out
    assert "batch of 1024" in out
    assert "8.93" in out


def test_measuring_memory_needs_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert memory.main(["--op", "measure"]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_measured_rows_are_held_against_the_count(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {"device": "GPU", "kv_per_token": 217600.0, "weights": 7.3e9, "activations": 1e9, "graphs": 2e9}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(memory, "run_cell", lambda spec, *_, **__: ([seen | {"not_torch": 5e8}], None))
    command = ["--op", "measure", "--shapes", "llama-2-13b", "--variants", "w4kv4"]
    assert memory.main([*command, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["kv_gb"] == row["counted_kv_gb"] == 0.446
    assert row["counted_weights_gb"] == 7.252
    assert row["total_gb"] == pytest.approx(7.3 + 1 + 2 + 0.5 + 0.446)
    monkeypatch.setattr(memory, "run_cell", lambda spec, *_, **__: ([], "ValueError: no"))
    assert memory.main(command) == 0
    assert "ValueError: no" in capsys.readouterr().out
