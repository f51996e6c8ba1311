"""Learned weights and cache parameters: gradients, agreement with what is stored, and that learning learns."""

import contextlib
import dataclasses
import itertools

import pytest
import torch
from models import save_text, tiny_model

from vllm_wkvquant import reference
from vllm_wkvquant.checkpoint import Checkpoint, ShardedTensors, unpack_weight
from vllm_wkvquant.config import ConfigError
from vllm_wkvquant.quantize import blocks, learn, pipeline
from vllm_wkvquant.quantize.adapters import ModelAdapter
from vllm_wkvquant.quantize.estimate import Estimate
from vllm_wkvquant.quantize.plan import Settings, preflight
from vllm_wkvquant.quantize.recipes import BEST, PAPER, RECIPES, RTN, Learning, Smoothing, Tuning
from vllm_wkvquant.quantize.weights import (
    WEIGHT_QMAX,
    FakeQuantize,
    group_range,
    quantize_weight,
    round_to_nearest,
    search_clip,
)

GROUP = 32
LEARNING = dataclasses.replace(BEST.learning, epochs=10, few=0)
assert LEARNING
ESTIMATE = Estimate(1, 1, 1, 1, 1, "cpu", 1, 1)  # for tests that count learning, of which a rehearsal has some


def ranges(weight: torch.Tensor, clip: float) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = group_range(weight, GROUP)
    return clip * low, clip * high


@pytest.mark.parametrize("clip", [1.0, 0.6])
def test_fake_weights_are_the_stored_ones(clip: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(24, 96)
    weight[2] = 0
    low, high = ranges(weight, clip)
    offset = torch.rand(24, 3, GROUP) - 0.5
    stored = quantize_weight(weight, low, high, torch.float16, offset).dequantize()
    torch.testing.assert_close(FakeQuantize.apply(weight, low, high, offset, torch.float16), stored, rtol=0, atol=0)
    nearest = round_to_nearest(weight, GROUP, torch.float16).dequantize()
    if clip == 1.0:
        torch.testing.assert_close(FakeQuantize.apply(weight, low, high, None, torch.float16), nearest, rtol=0, atol=0)


@pytest.mark.parametrize("clip", [1.0, 0.6])
def test_straight_through_gradients(clip: float) -> None:
    """By autograd through the same formula with every rounding replaced by the identity plus a constant."""
    torch.manual_seed(0)
    weight = torch.randn(8, 64).requires_grad_()
    low, high = (r.detach().requires_grad_() for r in ranges(weight.detach(), clip))
    offset = (0.9 * (torch.rand(8, 2, GROUP) - 0.5)).requires_grad_()
    upstream = torch.randn(8, 64)
    sources = [weight, low, high, offset]
    got = torch.autograd.grad(FakeQuantize.apply(*sources, torch.float32), sources, upstream)

    step = (high - low) / WEIGHT_QMAX
    zero_point = learn.straight_through((-low / step).round(), -low / step)[..., None]
    codes = weight.view(8, 2, GROUP) / step[..., None] + zero_point + offset
    codes = learn.straight_through(codes.round(), codes).clamp(0, WEIGHT_QMAX)
    out = ((codes - zero_point) * step[..., None]).view(8, 64)
    if clip < 1:
        assert (codes.detach().round() == WEIGHT_QMAX).any()
    expected = torch.autograd.grad(out, sources, upstream)
    for name, a, b in zip(("weight", "low", "high", "offset"), got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3, msg=lambda m, name=name: f"{name}: {m}")


def test_clip_is_searched_by_importance() -> None:
    """One outlier a group: kept where its channel matters, clipped where it does not; small groups vary."""
    torch.manual_seed(0)
    weight = 0.1 * torch.randn(16, GROUP)
    weight[:, 0] = 1.0
    matters, does_not = torch.ones(GROUP), torch.ones(GROUP)
    matters[0], does_not[0] = 1e4, 1e-6
    assert search_clip(weight, matters, GROUP, torch.float16).mean() > 0.95
    assert search_clip(weight, does_not, GROUP, torch.float16).mean() < 0.8


@pytest.mark.parametrize("recipe", ["paper", "rotating", "rotating, first"])
def test_fake_cache_is_the_specification(recipe: str) -> None:
    torch.manual_seed(0)
    tokens, heads, size = 40, 2, 64
    inv_freq = [1e4 ** (-2 * i / size) for i in range(size // 2)]
    start = reference.KVParams(
        k_smooth=0.5 + torch.rand(heads, size),
        k_shift=torch.randn(heads, size),
        v_shift=torch.randn(heads, size),
        key_hadamard=recipe != "paper",
        rope_turns=reference.rope_turns(inv_freq) if recipe != "paper" else None,
        k_first=5 * torch.randn(heads, size) if "first" in recipe else None,
        v_first=5 * torch.randn(heads, size) if "first" in recipe else None,
    )
    cache = learn.LearnedCache(start)
    if "first" in recipe:  # the values of position 0 are divided by the smoothing, too
        torch.nn.init.normal_(cache.log_v, std=0.3)
        torch.testing.assert_close(cache.params().v_first * cache.log_v.exp(), start.v_first)
    k, v = (torch.randn(tokens, heads, size).requires_grad_() for _ in range(2))
    positions = torch.arange(tokens)
    got = cache.fake(k, v, positions)
    with torch.no_grad():
        expected = reference.fake_quantize(k, v, positions, cache.params())
    for a, b in zip(got, expected, strict=True):
        # a last bit may tip a code; no more than a few of 5120
        assert ((a - b).abs() > 1e-4).sum() <= 4
    gradients = torch.autograd.grad(sum(x.square().sum() for x in got), [*cache.parameters()[:3], k, v])
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradients)
    shifts = cache.shifts()
    at_first = reference.key_shift_at(torch.zeros(1, dtype=torch.long), cache.params())[0]
    torch.testing.assert_close(shifts["k_first"], at_first, rtol=0, atol=0)


@pytest.mark.parametrize("skip_first", [False, True])
def test_losses_are_of_the_positions_they_should_be(skip_first: bool) -> None:
    """Per window: means over tokens (and channels); a relative error counts a long token as one token."""
    target = torch.ones(2, 10, 4)
    target[1, 7] = 1000.0
    output = target.clone()
    output[0, 2] += 1.0  # left out where the first positions are
    output[:, 7] *= 1.5
    tokens = 6 if skip_first else 10
    early = 0.0 if skip_first else 1.0
    expected = {
        "mae": [(0.5 + early) / tokens, 500 / tokens],
        "mse": [(0.25 + early) / tokens, 250_000 / tokens],
        "relative_mse": [(0.25 + early) / tokens, 0.25 / tokens],
    }
    assert expected.keys() == learn.LOSSES.keys()
    for name, values in expected.items():
        loss = learn.loss_of(dataclasses.replace(LEARNING, loss=name, skip_first=skip_first))
        torch.testing.assert_close(loss(output, target), torch.tensor(values))
        torch.testing.assert_close(loss(output[1], target[1]), torch.tensor(values[1]))


@pytest.mark.parametrize("loss", learn.LOSSES)
def test_gradients_do_not_vanish_in_float16(loss: str, monkeypatch) -> None:
    """They are those of fp32, of as many elements and followers as a model of ordinary size has."""
    torch.manual_seed(0)
    length, hidden, inner, followers = 2048, 2048, 32, 5
    found: dict[torch.dtype, list[torch.Tensor]] = {}
    original = learn.batch_gradients

    def spy(block, *rest):
        gradients, losses = original(block, *rest)
        found[block.dtype] = [g.clone() for g in gradients]
        return gradients, losses

    monkeypatch.setattr(learn, "batch_gradients", spy)
    learning = dataclasses.replace(LEARNING, loss=loss, epochs=1, batch=1, clip_rate=0.1)
    weight, window = torch.randn(hidden, inner) / inner**0.5, torch.randn(1, length, hidden)
    target = window + window[..., :inner] @ weight.T

    def forward(weights: dict[str, torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
        return [x + x[..., :inner] @ weights["v.weight"].T] * (1 + followers)

    for dtype in (torch.float32, torch.float16):
        block = torch.nn.ModuleDict({"v": torch.nn.Linear(inner, hidden, bias=False, dtype=dtype)})
        learned = learn.LearnedWeight(weight, GROUP, torch.float16, learning, torch.ones(inner))
        with torch.no_grad():
            of_block = learn.LearnedBlock({"v": learned}, None, block, "v", "v")
            learn.learn(learning, of_block, forward, window.to(dtype), [target.to(dtype)] * (1 + followers), seed=0)
    for exact, half in zip(found[torch.float32], found[torch.float16], strict=True):
        assert (half - exact).norm() < 0.02 * exact.norm()


def test_an_offset_reaches_its_neighbour() -> None:
    """How far a parameter moves if all gradients agree: rate of the rounding, clip_rate of the range's ends."""
    learning = dataclasses.replace(LEARNING, rate=0.5, clip_rate=0.125)
    weight = learn.LearnedWeight(torch.randn(1, GROUP), GROUP, torch.float16, learning, torch.ones(GROUP))
    before = [p.detach().clone() for p in weight.parameters()]
    descent = learn.SignDescent(weight.parameters(), weight.rates(learning), steps=7)
    gradient = torch.tensor([1.0, -3.0, 0.0])
    with torch.no_grad():
        for done in range(7):
            descent.schedule(done)
            descent.step(
                [gradient[:1].clone()[None], gradient[1:2].clone()[None], gradient.repeat(11)[None, None, :GROUP]]
            )
    moved = [(p - b).detach().flatten() for p, b in zip(weight.parameters(), before, strict=True)]
    torch.testing.assert_close(moved[0], torch.tensor([-0.125]))
    torch.testing.assert_close(moved[1], torch.tensor([0.125]))
    torch.testing.assert_close(moved[2][:3], torch.tensor([-0.5, 0.5, 0.0]))


def test_every_window_once_an_epoch() -> None:
    got = list(learn.batches(10, dataclasses.replace(LEARNING, epochs=3, batch=4), seed=1))
    assert [len(b) for b in got] == [4, 4, 2] * 3
    assert all(sorted(itertools.chain(*got[i : i + 3])) == list(range(10)) for i in (0, 3, 6))
    assert got != list(learn.batches(10, dataclasses.replace(LEARNING, epochs=3, batch=4), seed=2))


def test_a_token_without_a_range_has_a_gradient_that_is_a_number() -> None:
    x = torch.stack([torch.zeros(GROUP), torch.full((GROUP,), 1.5), torch.linspace(-1, 1, GROUP)])[:, None]
    x.requires_grad_()
    learn.fake_quantize_tokens(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_few_windows_are_learned_from_one_at_a_time(model, tmp_path) -> None:
    """And in epochs of their own."""
    of_many = dataclasses.replace(LEARNING, epochs=40, batch=4, few=9, few_epochs=10)
    assert of_many.of(10) == of_many
    assert of_many.of(9) == dataclasses.replace(of_many, epochs=10, batch=1, few=0)
    tuning = Tuning(epochs=5, batch=4, rate=1e-3, few=9, few_epochs=2)
    recipe = dataclasses.replace(BEST, learning=of_many, tuning=tuning)
    for samples, batch, tuning in ((12, 1, 2), (16, 4, 5)):  # a quarter of the samples is held out
        plan = preflight(dataclasses.replace(settings(model, tmp_path, recipe=recipe), samples=samples))
        assert plan.recipe.learning
        assert plan.recipe.tuning
        assert (plan.recipe.learning.batch, plan.recipe.learning.epochs) == (batch, 10 * batch)
        assert plan.recipe.tuning.epochs == tuning
    assert preflight(settings(model, tmp_path, recipe=RTN)).recipe == RTN


def test_more_windows_take_fewer_epochs() -> None:
    """Of all windows about as many as 40 epochs over 30 of them, and each at least once."""
    learning = dataclasses.replace(LEARNING, epochs=40, most=1200)
    assert [learning.of(windows).epochs for windows in (20, 30, 31, 64, 5000)] == [40, 40, 39, 19, 1]
    tuning = Tuning(epochs=5, batch=4, rate=1e-3, most=150)
    assert [tuning.of(windows).epochs for windows in (20, 30, 60, 5000)] == [5, 5, 2, 1]
    resolved = BEST.of(240)
    assert resolved.learning
    assert resolved.tuning
    assert (resolved.learning.epochs, resolved.tuning.epochs) == (30, 5)
    assert resolved.of(240) == resolved


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("learn")
    return tiny_model(root / "model", "qwen2", head_size=64, key_bias=3.0, num_layers=2), save_text(root / "calib.txt")


def settings(model, out, **options) -> Settings:
    path, text = model
    return Settings(path, out, text, samples=12, seq_len=48, **options)


def run(model, out, monkeypatch, learning: Learning | None, **recipe) -> dict:
    """The report of `best` or `paper` with parts of it changed."""
    base = PAPER if recipe.pop("paper", False) else BEST
    monkeypatch.setitem(RECIPES, "trial", dataclasses.replace(base, name="trial", learning=learning, **recipe))
    return pipeline.quantize(settings(model, out, recipe="trial"))


def test_learning_beats_rounding_and_each_part_helps(model, tmp_path, monkeypatch) -> None:
    """KL to the 16-bit model on windows that took no part: nothing learned > clips > rounding, with or without."""
    kl = {}
    for name, change in {
        "nothing": {"rounding": False, "rate": 0.0, "epochs": 1},
        "clip": {"rounding": False, "clip_rate": 0.5},
        "rounding": {},
        "both": {"clip_rate": 0.5},
    }.items():
        report = run(model, tmp_path / name, monkeypatch, dataclasses.replace(LEARNING, **change))
        kl[name] = report["weights"]["kl"]
        assert all(len(layer["loss"]) == change.get("epochs", 10) for layer in report["layers"])
    assert max(kl["rounding"], kl["both"]) < 0.9 * kl["clip"] < 0.9 * kl["nothing"], kl


@pytest.mark.parametrize("paper", [False, True])
def test_windows_may_go_through_the_block_together(model, tmp_path, monkeypatch, paper: bool) -> None:
    """As they do on a GPU: losses are those of one after the other, under a simulated cache as well."""
    monkeypatch.setattr(pipeline, "estimate", lambda *_: ESTIMATE)
    learning = dataclasses.replace(PAPER.learning if paper else LEARNING, batch=4, epochs=2)
    losses = []
    for size in (1, 3):
        monkeypatch.setattr(learn, "together", lambda *args, size=size: size)
        report = run(model, tmp_path / str(size), monkeypatch, learning, paper=paper)
        losses.append([layer["loss"] for layer in report["layers"]])
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=2e-3, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("paper", [False, True])
def test_a_replayed_step_is_the_step(model, tmp_path, monkeypatch, paper: bool) -> None:
    """Losses with steps as CUDA graphs are those without, where the last batch of an epoch is a smaller one, too."""
    learning = dataclasses.replace(PAPER.learning if paper else LEARNING, batch=4, epochs=4)
    base = dataclasses.replace(PAPER if paper else BEST, name="trial", learning=learning)
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(graph), replay(graph)))
    losses = []
    for weights in (0, learn.REPLAYED):
        monkeypatch.setattr(learn, "REPLAYED", weights)
        report = pipeline.quantize(settings(model, tmp_path / str(weights), recipe=base, device="cuda"))
        losses.append([layer["loss"] for layer in report["layers"]])
        assert bool(replays) == bool(weights)
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=5e-3, atol=0)


def test_the_paper_learns(model, tmp_path, monkeypatch) -> None:
    """Losses fall, shift, smoothing and clips move, and followers take part as far as there are any."""
    assert PAPER.learning
    seen = []
    original = learn.learn

    def spy(learning, block, forward, inputs, targets, *rest):
        seen.append(len(targets))
        before = [p.detach().clone() for p in block.parameters()]
        losses = original(learning, block, forward, inputs, targets, *rest)
        assert losses[-1] < losses[0]
        assert all((a != b).any() for a, b in zip(before, block.parameters(), strict=True))
        return losses

    monkeypatch.setattr(blocks, "learn", spy)
    monkeypatch.setattr(pipeline, "estimate", lambda *_: ESTIMATE)
    report = run(model, tmp_path / "out", monkeypatch, dataclasses.replace(PAPER.learning, followers=1), paper=True)
    assert seen == [2, 1]
    assert report["smoothing"] == "learned"
    params = Checkpoint(tmp_path / "out").kv_params(0)
    assert params.k_first is not None
    torch.testing.assert_close(params.k_first, params.k_shift, rtol=0, atol=0)


def test_what_is_reported_of_the_values_smoothing_is_folded(model, tmp_path, monkeypatch) -> None:
    """Its start and what is learned: v_proj's bias is divided by both."""
    source = tiny_model(tmp_path / "model", "qwen2", num_layers=1, dtype=torch.float16)
    assert PAPER.learning
    learning = dataclasses.replace(PAPER.learning, epochs=2, batch=1)
    report = run((source, model[1]), tmp_path / "out", monkeypatch, learning, paper=True)
    name = "model.layers.0.self_attn.v_proj.bias"
    bias, folded = (ShardedTensors(path).get([name])[name].float() for path in (source, tmp_path / "out"))
    factors = bias / folded
    expected = [factors.min().item(), factors.max().item()]
    assert report["layers"][0]["v_smooth"] == pytest.approx(expected, rel=2e-3)


def test_targets_are_the_16_bit_models_wherever_a_run_begins(tmp_path, monkeypatch) -> None:
    """After the block and two followers, where there are as many; each block is read once, and again on resuming."""
    layers, followers = 5, 2
    model = tiny_model(tmp_path / "model", num_layers=layers), save_text(tmp_path / "calib.txt")
    learning = dataclasses.replace(PAPER.learning, followers=followers, epochs=1)
    seen: list[list[torch.Tensor]] = []
    read: list[int] = []
    original, load = learn.learn, ModelAdapter.load_block

    def spy(learning, block, forward, inputs, targets, *rest):
        seen.append([t.clone() for t in targets])
        if len(seen) == stop:
            raise KeyboardInterrupt
        return original(learning, block, forward, inputs, targets, *rest)

    def reading(adapter, layer, *rest):
        read.append(layer)
        return load(adapter, layer, *rest)

    monkeypatch.setattr(blocks, "learn", spy)
    monkeypatch.setattr(pipeline, "estimate", lambda *_: ESTIMATE)
    plan = preflight(settings(model, tmp_path / "plan", recipe="paper"))
    with torch.no_grad():
        exact = [blocks.first_hidden(plan)[blocks.EXACT][: plan.windows.statistics]]
        for layer in range(layers):
            runner = blocks.BlockRunner(plan, load(plan.adapter, layer, torch.float32, "cpu"), 48)
            exact.append(torch.stack([runner(window) for window in exact[-1]]))
    monkeypatch.setattr(ModelAdapter, "load_block", reading)
    stop = 0
    run(model, tmp_path / "whole", monkeypatch, learning, paper=True)
    assert read == [*range(layers)]
    expected = [exact[layer + 1 : layer + 2 + followers] for layer in range(layers)]
    torch.testing.assert_close(seen, expected, rtol=0, atol=0)

    seen.clear()
    read.clear()
    stop = 3
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "resumed", monkeypatch, learning, paper=True)
    seen.clear()
    stop = 0
    pipeline.quantize(settings(model, tmp_path / "resumed", recipe="trial", resume=True))
    assert read == [0, 1, 2, 3, 4, 2, 3, 4]
    torch.testing.assert_close(seen, expected[2:], rtol=0, atol=0)
    shards = [sorted((tmp_path / name).glob("*.safetensors")) for name in ("whole", "resumed")]
    assert [f.read_bytes() for f in shards[0]] == [f.read_bytes() for f in shards[1]]


@pytest.mark.parametrize(("recipe", "summed"), [("best", 7), ("paper", 0)])
def test_inputs_are_squared_only_for_a_searched_clip(model, tmp_path, monkeypatch, recipe: str, summed: int) -> None:
    seen = []
    original = blocks.input_squares

    @contextlib.contextmanager
    def spy(*args):
        with original(*args) as squares:
            yield squares
        seen.append(len(squares))

    monkeypatch.setattr(blocks, "input_squares", spy)
    monkeypatch.setattr(pipeline, "estimate", lambda *_: ESTIMATE)
    pipeline.quantize(settings(model, tmp_path / "out", recipe=recipe))
    assert seen == [summed, summed]


@pytest.fixture
def smoothed(model, tmp_path) -> tuple[blocks.BlockRunner, ModelAdapter, learn.LearnedBlock]:
    """The first block's runner, and what `paper` learns of it, with some smoothing of V."""
    plan = preflight(settings(model, tmp_path / "out", recipe="paper"))
    adapter, family = plan.adapter, plan.adapter.family
    block = adapter.load_block(0, torch.float32, "cpu")
    assert PAPER.learning
    weights = {
        name: learn.LearnedWeight(block.get_submodule(name).weight, 64, torch.float16, PAPER.learning, torch.ones(1))
        for name in family.linears
    }
    ones = torch.ones(adapter.num_kv_heads, adapter.head_size)
    cache = learn.LearnedCache(reference.KVParams(ones, 0 * ones, 0 * ones, False, None))
    with torch.no_grad():
        cache.log_v.copy_(torch.randn(ones.shape, generator=torch.Generator().manual_seed(0)))
    learned = learn.LearnedBlock(weights, cache, block, family.v_proj, family.o_proj)
    return blocks.BlockRunner(plan, block, 48), adapter, learned


def test_folding_learned_smoothing_keeps_the_function(smoothed, monkeypatch) -> None:
    """Without rounding, weights folded with any smoothing of V give the block's own output."""
    runner, adapter, learned = smoothed
    monkeypatch.setattr(FakeQuantize, "apply", lambda weight, *_: weight)
    window = torch.randn(48, adapter.config.hidden_size)
    with torch.no_grad():
        found = runner.run(runner.block, learned.fake(), window)
        torch.testing.assert_close(found, runner(window), rtol=1e-4, atol=1e-4)


def test_errors_are_those_of_folded_weights(smoothed) -> None:
    """Which the codes are of: all are small."""
    runner, adapter, learned = smoothed
    with torch.no_grad():
        folded = learned._folded()
        tensors, errors = blocks.quantize_weights(adapter, 0, runner.block, {}, learned)
    assert 0 < max(errors.values()) < 0.15
    for name in (adapter.family.v_proj, adapter.family.o_proj):
        prefix = f"{adapter.block_prefix(0)}{name}."
        stored = unpack_weight({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        assert errors[name] == pytest.approx(blocks.relative_error(stored, folded[name]), rel=1e-5)


def test_gradients_that_overflow_are_refused(model, tmp_path, monkeypatch) -> None:
    """Where their sizes count, and where the loss, of a single step, shows nothing."""
    assert PAPER.learning
    monkeypatch.setattr(pipeline, "estimate", lambda *_: ESTIMATE)
    monkeypatch.setattr(learn, "gradient_scale", lambda *_: 2.0**40)
    recipe = dataclasses.replace(PAPER, learning=dataclasses.replace(PAPER.learning, epochs=1, batch=12))
    with pytest.raises(ConfigError, match="block 0: gradient of the loss overflows float16; use --dtype bfloat16"):
        pipeline.quantize(settings(model, tmp_path / "out", recipe=recipe, dtype="float16"))


def test_same_seed_same_bytes(model, tmp_path) -> None:
    for name in ("a", "b"):
        pipeline.quantize(settings(model, tmp_path / name, recipe="best"))
    files = [sorted(p for p in (tmp_path / n).rglob("*") if p.suffix == ".safetensors") for n in ("a", "b")]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]


def test_recipes_start_where_they_say() -> None:
    assert PAPER.smoothings == (Smoothing(0.5),)
    assert PAPER.learning
    assert torch.sigmoid(torch.tensor(learn.SIGMOID_INIT)) > 0.98
    assert (PAPER.learning.followers, PAPER.learning.epochs, PAPER.learning.loss) == (5, 5, "mae")
