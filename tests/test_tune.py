"""Tuning all blocks together: what it may change, that it runs what is served, that it makes no model worse."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import save_text, tiny_model
from safetensors.torch import load_file, save_file

from vllm_wkvquant import cli
from vllm_wkvquant.checkpoint import Checkpoint, unpack_weight
from vllm_wkvquant.config import ConfigError
from vllm_wkvquant.evaluate import SimulatedCache, load_quantized
from vllm_wkvquant.quantize import blocks, learn, tune
from vllm_wkvquant.quantize.calibration import read_windows
from vllm_wkvquant.quantize.learn import SignDescent
from vllm_wkvquant.quantize.pipeline import quantize
from vllm_wkvquant.quantize.plan import Settings, preflight
from vllm_wkvquant.quantize.recipes import BEST, RTN, Tuning
from vllm_wkvquant.quantize.runner import Ahead
from vllm_wkvquant.quantize.writer import CheckpointWriter
from vllm_wkvquant.reference import fake_quantize

SAMPLES, SEQ_LEN = 12, 48
TUNING = Tuning(epochs=6, batch=1, rate=1e-2)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("tune")
    return tiny_model(root / "model", "qwen2", key_bias=3.0, num_layers=2), save_text(root / "calib.txt")


def make(files: tuple[Path, Path], out: Path, tuning: Tuning | None, **options: Any) -> dict[str, Any]:
    """The report of `best` with an epoch of learning and this tuning."""
    assert BEST.learning
    learning = dataclasses.replace(BEST.learning, epochs=1, batch=1, few=0)
    recipe = dataclasses.replace(BEST, learning=learning, tuning=tuning)
    model, text = files
    return quantize(Settings(model, out, text, recipe=recipe, samples=SAMPLES, seq_len=SEQ_LEN, **options))


@pytest.fixture(scope="module")
def made(files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Where a checkpoint lies that was tuned, `tuned`, and one that was not, `plain`; the report of the first."""
    root = tmp_path_factory.mktemp("made")
    make(files, root / "plain", None)
    make(files, root / "steps", TUNING)
    return root, make(files, root / "tuned", dataclasses.replace(TUNING, code_sigmas=2.0, cache_rate=1e-2))


def test_predictions_come_closer(made: tuple[Path, dict[str, Any]]) -> None:
    """On windows that took no part."""
    tuning = made[1]["tuning"]
    assert len(tuning["epochs"]) == 7
    assert tuning["kept"] == min(range(7), key=lambda i: tuning["epochs"][i])
    assert tuning["epochs"][tuning["kept"]] < 0.95 * tuning["epochs"][0]


def test_inspect_says_what_the_cache_costs_after_tuning(
    made: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    root, report = made
    for name, cost in (("tuned", report["tuning"]["cache"]), ("plain", None)):
        assert cli.main(["inspect", str(root / name)]) == 0
        shown = capsys.readouterr().out
        assert cost is None or f"{cost['kl']:.5f} (se {cost['kl_se']:.5f})" in shown
        assert ("before all blocks were tuned" in " ".join(shown.split())) == (cost is not None)


def test_what_is_reported_of_shifts_is_what_is_written(made: tuple[Path, dict[str, Any]]) -> None:
    root, report = made
    for layer, block in enumerate(report["layers"]):
        found, before = (Checkpoint(root / n).kv_params(layer).k_shift.abs().max().item() for n in ("tuned", "plain"))
        assert block["k_shift_max"] == pytest.approx(found)
        assert found != pytest.approx(before, rel=1e-6)


TUNED = ("weight_scale", "layernorm.weight", "q_proj.bias", "k_proj.bias", "v_proj.bias")
CODES_AND_CACHE = ("weight_packed", "wkv_k_smooth", "wkv_k_shift", "wkv_v_shift")


@pytest.mark.parametrize(("name", "changing"), [("tuned", (*TUNED, *CODES_AND_CACHE)), ("steps", TUNED)])
def test_what_tuning_changes(made: tuple[Path, dict[str, Any]], name: str, changing: tuple[str, ...]) -> None:
    """Steps, norms and biases of the blocks, their codes if they may move, and nothing else."""
    plain, tuned = (Checkpoint(made[0] / n).tensors for n in ("plain", name))
    names = list(plain.headers())
    assert list(tuned.headers()) == names
    before, after = plain.get(names), tuned.get(names)
    assert {n: t.dtype for n, t in after.items()} == {n: t.dtype for n, t in before.items()}
    changed = {name for name in names if not torch.equal(before[name], after[name])}
    assert changed == {name for name in names if name.endswith(changing)}


def test_moving_codes_helps(made: tuple[Path, dict[str, Any]]) -> None:
    """On windows that took no part."""
    tuned, steps = (json.loads((made[0] / n / "wkvquant.json").read_text())["tuning"] for n in ("tuned", "steps"))
    assert tuned["both"]["kl"] < steps["both"]["kl"]


def test_the_checkpoint_is_what_was_compared(files: tuple[Path, Path], made: tuple[Path, dict[str, Any]]) -> None:
    """Perplexity and divergence of the report are those of the files, read by what `wkvquant eval` reads them with."""
    root, report = made
    windows = read_windows(*files, SAMPLES, SEQ_LEN, seed=0)
    ckpt, cache = Checkpoint(root / "tuned"), SimulatedCache()
    model: Any = load_quantized(ckpt, cache, torch.float32, "cpu")
    params = [ckpt.kv_params(layer) for layer in range(2)]
    simulated = [lambda k, v, at, p=p: fake_quantize(k, v, at, p) for p in params]
    losses: dict[str, list[torch.Tensor]] = {"weights": [], "both": []}
    with torch.inference_mode():
        for tokens in windows.tokens[windows.statistics :]:
            for name, cache.layers in (("weights", None), ("both", simulated)):
                losses[name].append(model(tokens[None], labels=tokens[None], use_cache=False).loss)
    for name, of_windows in losses.items():
        assert report["tuning"]["perplexity"][name] == pytest.approx(
            torch.stack(of_windows).mean().exp().item(), rel=1e-4
        )


def test_before_tuning_the_model_is_the_candidate(made: tuple[Path, dict[str, Any]], files: tuple[Path, Path]) -> None:
    """With a rate of 0 nothing changes: perplexities after tuning are those before."""
    root, _ = made
    report = make(files, root / "still", Tuning(epochs=1, batch=4, rate=0.0, code_sigmas=1e9))
    assert report["tuning"]["kept"] == 0
    found = report["tuning"]["perplexity"]
    assert found["weights"] == pytest.approx(report["perplexity"]["reference"], rel=1e-5)
    assert found["both"] == pytest.approx(report["perplexity"][report["smoothing"]], rel=1e-4)
    for name in ("weights", "cache"):
        before = report["weights"] if name == "weights" else report["candidates"][report["smoothing"]]
        assert report["tuning"][name]["kl"] == pytest.approx(before["kl"], rel=1e-2)


def test_tensors_of_a_tuned_block_are_made_as_they_are_written(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host has no room for those of all blocks beside a GPU that holds their codes."""
    made: list[str] = []
    tensors, add = tune.TunedBlock.tensors, CheckpointWriter.add
    monkeypatch.setattr(tune.TunedBlock, "tensors", lambda block: (made.append("block"), tensors(block))[1])
    monkeypatch.setattr(CheckpointWriter, "add", lambda *args: (made.append("written"), add(*args)))
    make(files, tmp_path / "out", Tuning(epochs=1, batch=4, rate=0.0))
    assert made == ["written", "block", "written", "block", "written"]


def test_what_makes_it_worse_is_not_kept(made: tuple[Path, dict[str, Any]], files: tuple[Path, Path]) -> None:
    """A rate at which the model falls apart leaves it as it was."""
    root, _ = made
    report = make(files, root / "apart", Tuning(epochs=2, batch=4, rate=30.0, code_sigmas=0.1))
    assert report["tuning"]["kept"] == 0
    plain, apart = (Checkpoint(root / name) for name in ("plain", "apart"))
    for name, quantized in plain.weight_names():
        assert torch.equal(plain.weight(name, quantized), apart.weight(name, quantized)), name


def test_the_cache_is_in_the_loop(made: tuple[Path, dict[str, Any]], files: tuple[Path, Path]) -> None:
    """Without it other steps are found, and the divergence that is followed is that of a 16-bit cache."""
    root, tuned = made
    report = make(files, root / "16-bit", dataclasses.replace(TUNING, cache=False))
    assert report["tuning"]["epochs"][0] != tuned["tuning"]["epochs"][0]
    assert report["tuning"]["weights"]["kl"] < report["weights"]["kl"]
    a, b = (Checkpoint(root / name).tensors.get([SCALE_OF_O])[SCALE_OF_O] for name in ("tuned", "16-bit"))
    assert not torch.equal(a, b)


SCALE_OF_O = "model.layers.0.self_attn.o_proj.weight_scale"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_replayed_steps_tune_alike(files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Divergences with steps as CUDA graphs are those without."""
    tuning = dataclasses.replace(TUNING, code_sigmas=2.0, cache_rate=1e-2)
    found = []
    for weights in (0, learn.REPLAYED):
        monkeypatch.setattr(learn, "REPLAYED", weights)
        report = make(files, tmp_path / str(weights), tuning, device="cuda")
        found.append(torch.tensor(report["tuning"]["epochs"]))
    assert found[0].min() < 0.95 * found[0][0]
    torch.testing.assert_close(*found, rtol=2e-2, atol=0)


def test_gradients_do_not_vanish_in_float16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are those of fp32, of predictions so alike that fp16 would have none."""
    model, text = tiny_model(tmp_path / "model", num_layers=1), save_text(tmp_path / "calib.txt")
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] /= 16
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    recipe = dataclasses.replace(
        BEST,
        learning=dataclasses.replace(BEST.learning, epochs=1, few=0),
        tuning=Tuning(epochs=1, batch=SAMPLES, rate=0.0, cache=False),  # a cache's codes tip
    )
    plan = preflight(Settings(model, tmp_path / "out", text, recipe=recipe, samples=SAMPLES, seq_len=SEQ_LEN))
    hidden, adam = blocks.first_hidden(plan), tune.adam
    found: list[list[torch.Tensor]] = []

    def spy(groups: list[tuple[list[torch.Tensor], float]], device: str) -> torch.optim.Adam:
        def take(optimizer: torch.optim.Adam, *_: Any) -> None:
            found.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])

        optimizer = adam(groups, device)
        optimizer.register_step_pre_hook(take)
        return optimizer

    monkeypatch.setattr(tune, "adam", spy)
    with torch.no_grad():
        block, _ = blocks.quantize_block(plan, 0, hidden, Ahead(plan))
        for dtype in ("float32", "float16"):
            of_type = dataclasses.replace(plan, settings=dataclasses.replace(plan.settings, dtype=dtype))
            tune.tune(of_type, [block], recipe.candidates[0], hidden[blocks.EXACT].to(getattr(torch, dtype)))
    for exact, half in zip(*found, strict=True):
        assert (half - exact).norm() < 0.05 * exact.norm()


def test_gradients_of_step_and_offset() -> None:
    """Those of the product, and its value that of the checkpoint's weight."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-15, 16, (6, 3, 32), generator=generator, dtype=torch.int8)
    step = torch.rand(6, 3, generator=generator, dtype=torch.float64).requires_grad_()
    offset = torch.zeros(codes.shape, dtype=torch.float64).requires_grad_()
    weight = tune.StepTimesCode.apply(step, offset, codes, torch.float64)
    torch.testing.assert_close(weight, (codes * step[..., None]).flatten(1))
    pull = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    expected = torch.autograd.grad((((codes + offset) * step[..., None]).flatten(1) * pull).sum(), (step, offset))
    of_step, of_offset = torch.autograd.grad((weight * pull).sum(), (step, offset))
    torch.testing.assert_close((of_step, of_offset * step[..., None]), expected)


def packed_codes(made: tuple[Path, dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A linear layer's tensors by suffix."""
    name = "model.layers.1.mlp.down_proj"
    tensors = Checkpoint(made[0] / "plain").tensors.get([f"{name}.{suffix}" for suffix in tune.PACKED])
    return {n.rpartition(".")[2]: t for n, t in tensors.items()}


def test_unpacked_weights_are_step_times_code(made: tuple[Path, dict[str, Any]]) -> None:
    packed = packed_codes(made)
    codes = tune.Codes(packed, "cpu", None)
    assert codes.steps.dtype == torch.int8
    assert codes.steps.min() >= -15
    weight = tune.StepTimesCode.apply(packed["weight_scale"].float(), None, codes.steps, torch.float32)
    assert torch.equal(weight, unpack_weight(packed))
    again = codes.pack(packed["weight_scale"])
    assert all(torch.equal(again[suffix], packed[suffix]) for suffix in tune.PACKED)


def test_chance_takes_no_code_to_its_neighbour() -> None:
    """Signs of which each is as likely come to the standard deviation that the reach is made for."""
    tuning, steps = dataclasses.replace(TUNING, code_sigmas=3.0), 140
    walk = torch.zeros(20000)
    descent = SignDescent([walk], [tune.code_reach(tuning, steps)], steps)
    generator = torch.Generator().manual_seed(0)
    for done in range(steps):
        descent.schedule(done)
        descent.step([torch.randn(walk.shape, generator=generator)])
    assert walk.std().item() == pytest.approx(0.5 / 3, rel=0.03)


def test_a_code_moves_once_half_a_step_has_been_gone(made: tuple[Path, dict[str, Any]]) -> None:
    """And never past the last one, however far its weight is pushed."""
    codes = tune.Codes(packed_codes(made), "cpu", torch.float32)
    before, zero = codes.steps.clone(), codes.zero[..., None]
    assert codes.offset is not None
    codes.offset.data.fill_(0.4)
    codes.move()
    assert torch.equal(codes.steps, before)
    codes.offset.data.add_(0.2)
    codes.move()
    inner = before + zero < 15
    assert torch.equal(codes.steps, before + inner)
    torch.testing.assert_close(codes.offset.data, torch.where(inner, -0.4, 0.5))
    codes.offset.data.fill_(-100)
    codes.move()
    assert torch.equal(codes.steps + zero, torch.zeros_like(codes.steps))
    assert bool((codes.offset == -0.5).all())


def test_tuning_needs_learning() -> None:
    with pytest.raises(ConfigError, match="'rtn' has tuning without learning"):
        dataclasses.replace(RTN, tuning=Tuning(epochs=1, batch=1, rate=1e-3))
