"""The quantizer on tiny random models: what it writes, that it is what it ran, and that it survives being killed."""

import doctest
import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from models import clear_fast_bias, contents, save_text, tiny_model
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from vllm_wkvquant import cli, layout, native_cuda, past_only, reference
from vllm_wkvquant.checkpoint import KV_PARAMS, Checkpoint, ShardedTensors, kv_tensor_name
from vllm_wkvquant.config import KVCacheConfig, RopeConfig
from vllm_wkvquant.evaluate import ATTENTION, SimulatedCache, load_quantized
from vllm_wkvquant.inspect import inspect
from vllm_wkvquant.quantize import attention, blocks, kv, launch, plan
from vllm_wkvquant.quantize.adapters import ModelAdapter, group_size
from vllm_wkvquant.quantize.calibration import SKIPPED, held_out_of, read_windows, samples_for
from vllm_wkvquant.quantize.fold import fold_rows, fold_value
from vllm_wkvquant.quantize.pipeline import mean_and_se, quantize
from vllm_wkvquant.quantize.plan import Settings, preflight
from vllm_wkvquant.quantize.recipes import RECIPES, RTN, SEARCHED, Smoothing
from vllm_wkvquant.quantize.runner import Ahead
from vllm_wkvquant.quantize.weights import round_to_nearest
from vllm_wkvquant.quantize.workers import ALONE
from vllm_wkvquant.reference import fake_quantize

SAMPLES, SEQ_LEN = 4, 48


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return save_text(tmp_path / "calib.txt")


def settings(model: Path, out: Path, text: Path, **other: object) -> Settings:
    other = {"recipe": "rtn", **other}
    return Settings(model, out, text, samples=SAMPLES, seq_len=SEQ_LEN, **other)  # type: ignore[arg-type]


# families: name, and what is particular to it
FAMILIES = {
    "llama-yarn-tied": {
        "family": "llama",
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    },
    "llama-llama3-96": {
        "family": "llama",
        "head_size": 96,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    },
    "mistral-window-80": {"family": "mistral", "head_size": 80, "sliding_window": 16},
    "qwen2-bias-128": {"family": "qwen2", "head_size": 128, "key_bias": 30.0, "dtype": torch.float16},
    "qwen3-norm-256": {"family": "qwen3", "head_size": 256, "num_heads": 2, "num_kv_heads": 1, "num_layers": 2},
}


@pytest.mark.parametrize(
    ("name", "recipe"),
    [*((name, "rtn") for name in FAMILIES), ("llama-llama3-96", "best"), ("qwen2-bias-128", "paper")],
)
def test_streaming_equals_the_whole_model(name: str, recipe: str, tmp_path: Path, text: Path) -> None:
    """The KL reported from one block at a time is that of the written checkpoint run as a whole in transformers."""
    model = tiny_model(tmp_path / "model", **FAMILIES[name])
    report = quantize(settings(model, tmp_path / "out", text, recipe=recipe))
    windows = read_windows(model, text, SAMPLES, SEQ_LEN, seed=0)

    ckpt = Checkpoint(tmp_path / "out")
    cache = SimulatedCache([partial(fake_quantize, params=ckpt.kv_params(i)) for i in range(ckpt.kv.num_hidden_layers)])
    whole = load_quantized(ckpt, cache, torch.float32, "cpu")
    held_out = windows.tokens[windows.statistics :]
    with torch.inference_mode():
        whole.config._attn_implementation = "sdpa"
        exact = whole(held_out).logits.log_softmax(-1)
        whole.config._attn_implementation = ATTENTION
        logits = [whole(w[None], attention_mask=torch.ones(1, SEQ_LEN)).logits for w in held_out]
        quantized = torch.cat(logits).log_softmax(-1)
    kl = (exact.exp() * (exact - quantized)).sum(-1).mean().item()
    chosen = report["candidates"][report["smoothing"]]
    assert chosen["kl"] == min(c["kl"] for c in report["candidates"].values())
    found = report["tuning"]["cache"] if report["tuning"] else chosen
    assert found["kl"] == pytest.approx(kl, rel=2e-2)
    assert kl > 1e-5


def test_norms_and_biases_are_those_of_the_model(tmp_path: Path, text: Path) -> None:
    """Whatever type calibration runs in; v_proj's bias is folded from the model's, too."""
    model = tiny_model(tmp_path / "model", "qwen2", key_bias=30.0, dtype=torch.float16, num_layers=2)
    recipe = replace(RTN, value_balance=0.0)
    quantize(settings(model, tmp_path / "out", text, recipe=recipe, dtype="bfloat16"))
    source, made = ShardedTensors(model), ShardedTensors(tmp_path / "out")
    kept = [n for n in source.names() if n in made]
    assert len(kept) == 3 + 2 * 5  # embedding, norm and head; two norms and three biases of a block
    for name in kept:
        expected = source.get([name])[name]
        if name.endswith("v_proj.bias"):
            expected = fold_rows(expected, torch.ones(2, 64), hadamard=True).half()
        assert torch.equal(made.get([name])[name], expected), name


@pytest.mark.parametrize(
    ("stored", "said", "expected"),
    [
        (torch.float16, None, torch.float16),
        (torch.float16, "float32", torch.float16),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float32, None, torch.bfloat16),
        (torch.float32, "float16", torch.float16),
    ],
)
def test_type_of_what_stays_16_bit(
    stored: torch.dtype, said: str | None, expected: torch.dtype, tmp_path: Path
) -> None:
    """The config's, or the stored one where the config gives none of 16 bits."""
    model = tiny_model(tmp_path / "model", num_layers=1, dtype=stored)
    config = json.loads((model / "config.json").read_text())
    del config["dtype"]
    (model / "config.json").write_text(json.dumps(config | ({"torch_dtype": said} if said else {})))
    adapter = ModelAdapter(model, "sdpa")
    assert adapter.dtype == expected
    assert adapter.output_config({})["dtype"] == str(expected).removeprefix("torch.")


def test_code_that_is_not_copied_is_not_named(tmp_path: Path, text: Path) -> None:
    """With --trust-remote-code the checkpoint loads as without."""
    model, out = tiny_model(tmp_path / "model", num_layers=1), tmp_path / "out"
    before = {}
    for name, auto in (("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")):
        before[name] = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(before[name] | {"auto_map": {auto: "code.Own"}}))
    quantize(settings(model, out, text))
    assert "auto_map" not in json.loads((out / "config.json").read_text())
    assert json.loads((out / "tokenizer_config.json").read_text()) == before["tokenizer_config.json"]
    AutoConfig.from_pretrained(out, trust_remote_code=True)
    assert AutoTokenizer.from_pretrained(out, trust_remote_code=True)("a")["input_ids"]


def test_reference_pass_gives_the_whole_models_logits(tmp_path: Path, text: Path) -> None:
    model = tiny_model(tmp_path / "model", "qwen2", head_size=128, key_bias=30.0)
    s = settings(model, tmp_path / "out", text)
    with torch.inference_mode():
        plan = preflight(s)
        hidden, ahead = blocks.first_hidden(plan), Ahead(plan)
        for layer in range(plan.adapter.num_layers):
            blocks.quantize_block(plan, layer, hidden, ahead)
        streamed = plan.adapter.load_head(torch.float32, "cpu")(hidden[blocks.REFERENCE])
    quantize(s)
    whole = load_quantized(Checkpoint(tmp_path / "out"), SimulatedCache(), torch.float32, "cpu")
    whole.config._attn_implementation = "sdpa"
    with torch.inference_mode():
        expected = whole(plan.windows.tokens).logits
    torch.testing.assert_close(streamed, expected, rtol=1e-3, atol=1e-3)


def test_checkpoint_on_disk(tmp_path: Path, text: Path) -> None:
    """Names, types, shards, config and copied files, from a sharded model."""
    model = tiny_model(tmp_path / "model", max_shard_size="200KB", intermediate_size=320)
    assert len(list(model.glob("*.safetensors"))) > 2
    quantize(settings(model, tmp_path / "out", text, shard_size=100_000))
    out = tmp_path / "out"
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 2
    assert [s.name for s in shards] == [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]
    ckpt = Checkpoint(out)
    assert ckpt.config["quantization_config"]["quant_method"] == "wkvquant"
    groups = ckpt.config["quantization_config"]["config_groups"]
    assert {g["weights"]["group_size"]: g["targets"] for g in groups.values()} == {
        128: ["re:.*\\.(gate_proj|k_proj|o_proj|q_proj|up_proj|v_proj)$"],
        64: ["re:.*\\.(down_proj)$"],
    }
    before = json.loads((model / "config.json").read_text())
    assert {k: v for k, v in ckpt.config.items() if k != "quantization_config"} == before
    for layer in range(3):
        for param in KV_PARAMS:
            tensor = ckpt.tensors.get([kv_tensor_name(layer, param)])[kv_tensor_name(layer, param)]
            assert (tensor.dtype, tuple(tensor.shape)) == (torch.float32, (2, 64))
    original = AutoModelForCausalLM.from_pretrained(model).state_dict()
    written = dict(ckpt.weight_names())
    assert set(written) == set(original)
    for name, quantized in written.items():
        assert quantized == ("proj" in name)
        if not quantized:
            assert torch.equal(ckpt.weight(name, False), original[name])
    scale = ckpt.tensors.get(["model.layers.0.mlp.down_proj.weight_scale"])["model.layers.0.mlp.down_proj.weight_scale"]
    assert (scale.dtype, tuple(scale.shape)) == (torch.bfloat16, (128, 5))
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / file).read_bytes() == (model / file).read_bytes()
    assert (
        AutoTokenizer.from_pretrained(out)("abc")["input_ids"]
        == AutoTokenizer.from_pretrained(model)("abc")["input_ids"]
    )
    assert not (tmp_path / "out.wkvquant-partial").exists()
    assert {p.stat().st_mode for p in out.iterdir()} == {text.stat().st_mode}  # readable to whom the umask lets


@pytest.mark.parametrize(
    ("has_gpu", "options", "device", "dtype"),
    [
        (False, [], "cpu", "float32"),
        (True, [], "cuda", "bfloat16"),
        (True, ["--device", "cpu"], "cpu", "float32"),
        (True, ["--dtype", "float32"], "cuda", "float32"),
        (True, ["--device", "cuda:1"], "cuda:1", "bfloat16"),
    ],
)
def test_a_gpu_is_taken_and_calibrates_in_16_bits(
    has_gpu: bool,
    options: list[str],
    device: str,
    dtype: str,
    tmp_path: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where nothing else is said."""
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(plan, "check_device", lambda device: None)
    monkeypatch.setattr(launch, "run", lambda settings, *_: seen.append(settings) or sys.exit(0))
    model = tiny_model(tmp_path / "model", num_layers=1)
    with pytest.raises(SystemExit):
        cli.main(["quantize", str(model), str(tmp_path / "out"), "--calib-text", str(text), *options])
    assert [(settings.device, settings.dtype) for settings in seen] == [(device, dtype)]


def test_a_gpu_by_number_is_the_current_one(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(plan, "check_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_device", seen.append)
    model = tiny_model(tmp_path / "model", num_layers=1)
    for device in ("cpu", "cuda", "cuda:1"):
        preflight(settings(model, tmp_path / "out", text, device=device))
    assert seen == ["cuda:1"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_models_own_16_bits_are_kept(dtype: torch.dtype, tmp_path: Path, text: Path) -> None:
    model = tiny_model(tmp_path / "model", num_layers=1, dtype=dtype)
    quantize(settings(model, tmp_path / "out", text))
    ckpt = Checkpoint(tmp_path / "out")
    assert ckpt.config["dtype"] == str(dtype).removeprefix("torch.")
    names = ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight_scale")
    assert {t.dtype for t in ckpt.tensors.get(list(names)).values()} == {dtype}


def test_tied_embeddings_are_stored_once(tmp_path: Path, text: Path) -> None:
    model = tiny_model(tmp_path / "model", tie_word_embeddings=True, num_layers=1)
    quantize(settings(model, tmp_path / "out", text))
    assert "lm_head.weight" not in Checkpoint(tmp_path / "out").tensors


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes(recipe: str, tmp_path: Path, text: Path) -> None:
    model = tiny_model(tmp_path / "model", "qwen2", head_size=128, key_bias=30.0, num_layers=2)
    report = quantize(settings(model, tmp_path / "out", text, recipe=recipe))
    section = Checkpoint(tmp_path / "out").kv
    r = RECIPES[recipe]
    assert (section.key_shift, section.key_hadamard, section.value_hadamard) == (
        r.key_shift,
        r.key_hadamard,
        r.value_hadamard,
    )
    assert list(report["candidates"]) == r.candidates
    assert (SEARCHED in r.candidates) == bool(r.search)


@pytest.mark.parametrize("recipe", ["rtn", "best", "paper"])
def test_calibration_in_16_bits_agrees(recipe: str, tmp_path: Path, text: Path) -> None:
    model = tiny_model(tmp_path / "model", "qwen2", num_layers=2)
    for dtype in ("float32", "bfloat16"):
        quantize(settings(model, tmp_path / dtype, text, dtype=dtype, recipe=recipe))
    exact, rounded = (Checkpoint(tmp_path / dtype).kv_params(1) for dtype in ("float32", "bfloat16"))
    most = 0.2 if recipe == "rtn" else 0.3  # the least difference tips what is learned
    both = (rounded.k_shift != 0) & (exact.k_shift != 0)  # which pairs have a shift tips, too
    assert both.float().mean() >= 0.5
    assert blocks.relative_error(rounded.k_shift[both], exact.k_shift[both]) < most
    assert blocks.relative_error(rounded.v_shift, exact.v_shift) < most


def test_same_seed_same_bytes(tmp_path: Path, text: Path) -> None:
    model = tiny_model(tmp_path / "model", num_layers=2)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        quantize(settings(model, tmp_path / name, text, seed=seed))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a") != contents(tmp_path / "c")


def test_key_shift_is_the_bias(tmp_path: Path, text: Path) -> None:
    """Keys that are hardly more than a bias: the rotating shift finds it, whatever the position."""
    model = tiny_model(tmp_path / "model", "qwen2", head_size=128, key_bias=100.0, num_layers=1)
    bias = AutoModelForCausalLM.from_pretrained(model).state_dict()["model.layers.0.self_attn.k_proj.bias"].float()
    quantize(settings(model, tmp_path / "out", text))
    params = Checkpoint(tmp_path / "out").kv_params(0)
    torch.testing.assert_close(params.k_shift, bias.view(2, 128), rtol=0, atol=2.0)
    assert bias.abs().max() > 90


def test_pairs_that_need_no_shift_have_none(tmp_path: Path, text: Path) -> None:
    """Two layers of keys with large biases, the first's on slow pairs alone."""
    model = tiny_model(tmp_path / "model", "qwen2", num_layers=2, key_bias=30.0)
    clear_fast_bias(model, [0])
    layers = quantize(settings(model, tmp_path / "out", text))["layers"]
    ckpt = Checkpoint(tmp_path / "out")
    slow = reference.slow_pairs(reference.rope_turns(ckpt.kv.rope.inv_freq))
    assert slow.sum() == 20
    for layer in range(2):
        found = ckpt.kv_tensors(layer)
        shift = found["k_shift"].unflatten(1, (2, 32))
        has_shift = (shift != 0).any(1).any(0)
        assert (shift[:, :, has_shift] != 0).all()
        assert has_shift[slow].all()
        assert (found["k_first"] != 0).all()
        count = int(has_shift.sum()) - 20
        assert count in ([0, 8] if layer == 0 else [12])
        assert layers[layer]["shift_pairs"] == {"fast": count, "slow": 20, "steps": 1 + -(-count // 8)}
        prepared = native_cuda._make(ckpt.kv_params(layer)).fields
        assert prepared.fast_steps + (prepared.slow_steps > 0) == layers[layer]["shift_pairs"]["steps"]


# -- parts


@pytest.mark.parametrize("head_size", layout.HEAD_SIZES)
@pytest.mark.parametrize("bias", [False, True])
def test_fold_preserves_the_function(head_size: int, bias: bool) -> None:
    """o_proj(mixture of v_proj(x)) stays; the folded values are H (v / s)."""
    torch.manual_seed(0)
    heads, group, hidden, tokens = 2, 3, 64, 7
    v_proj = torch.nn.Linear(hidden, heads * head_size, bias=bias).double().requires_grad_(False)
    o_proj = torch.nn.Linear(heads * group * head_size, hidden, bias=bias).double().requires_grad_(False)
    x = torch.randn(tokens, hidden, dtype=torch.float64)
    mixture = torch.rand(heads * group, tokens, tokens, dtype=torch.float64)
    smooth = 0.25 + torch.rand(heads, head_size)

    def values() -> torch.Tensor:
        return v_proj(x).view(tokens, heads, head_size)

    def output() -> torch.Tensor:
        mixed = torch.einsum("hqk,khd->qhd", mixture, values().repeat_interleave(group, 1))
        return o_proj(mixed.flatten(1))

    before, expected = values(), output()
    fold_value(v_proj, o_proj, smooth, hadamard=True)
    torch.testing.assert_close(output(), expected, rtol=1e-5, atol=1e-5)
    rotated = (before / smooth) @ reference.hadamard_matrix(head_size, torch.float64)
    torch.testing.assert_close(values(), rotated, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_packed_weights_are_compressed_tensors_own(size: int, dtype: torch.dtype) -> None:
    """What compressed-tensors decompresses from our tensors is what the quantizer ran."""
    torch.manual_seed(0)
    weight = torch.randn(48, 384) + 0.5
    weight[3] = 0
    quantized = round_to_nearest(weight, size, dtype)
    args = QuantizationArgs(num_bits=4, type="int", symmetric=False, strategy="group", group_size=size)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    theirs = PackedQuantizationCompressor.decompress(quantized.pack(), scheme)["weight"]
    ours = quantized.dequantize()
    torch.testing.assert_close(theirs.float(), ours.to(dtype).float(), rtol=0, atol=0)
    step = quantized.scale.float().repeat_interleave(size, 1)
    # half a step, and at the ends of a range what rounding the scale to 8 bits moves them (15 steps of 2^-9)
    assert ((ours - weight).abs() <= 0.54 * step + 1e-6).all()
    assert (ours[3] == 0).all()


def test_group_size() -> None:
    assert [group_size(n) for n in (4096, 576, 96, 80, 33)] == [128, 64, 32, None, None]


GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"))


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("sliding_window", [0, 100, 700])
def test_fast_attention_is_the_reference(sliding_window: int, group: int, dtype: torch.dtype, device: str) -> None:
    """Output and gradients of a batch, with and without a window, and with one longer than the sequence."""
    torch.manual_seed(0)
    length, heads, size, scale = 301, 2, 64, 0.3
    q = torch.randn(2, group * heads, length, size)
    k, v, past_k, past_v = torch.randn(4, 2, heads, length, size)
    inputs = [x.to(device, dtype).requires_grad_() for x in (q, k, v, past_k, past_v)]
    ours = past_only.past_only_attention(*inputs, scale, sliding_window)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    windows = zip(*(x.transpose(1, 2) for x in exact), strict=True)
    spec = torch.stack([reference.past_only_attention(*w, scale, 1, sliding_window) for w in windows]).transpose(1, 2)
    grad = torch.randn_like(spec)
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 8e-2}
    torch.testing.assert_close(ours.float(), spec, **tolerance)
    found = torch.autograd.grad(ours, inputs, grad.to(dtype))
    for a, b in zip(found, torch.autograd.grad(spec, exact, grad), strict=True):
        torch.testing.assert_close(a.float(), b, **tolerance)


def test_attention_of_one_token_is_its_value() -> None:
    q, (k, v, past_k, past_v) = torch.randn(1, 4, 1, 64), torch.randn(4, 1, 2, 1, 64)
    out = past_only.past_only_attention(q, k, v, past_k, past_v, 0.3)
    torch.testing.assert_close(out, v.repeat_interleave(2, 1))


@pytest.mark.parametrize("sliding_window", [None, 100])
def test_attention_of_a_16_bit_cache(sliding_window: int | None) -> None:
    """What is captured is of each window, and the output is the reference's."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, 301, 64), torch.randn(2, 2, 301, 64), torch.randn(2, 2, 301, 64)
    own = attention.CalibrationAttention()
    own.captured = []
    out, _ = own(torch.nn.Module(), q, k, v, None, scaling=0.3, sliding_window=sliding_window)
    assert len(own.captured) == 2
    for window, captured in zip(out, own.captured, strict=True):
        query, key, value = captured
        spec = reference.past_only_attention(query, key, value, key, value, 0.3, 1, sliding_window or 0)
        torch.testing.assert_close(window, spec, rtol=1e-4, atol=1e-5)


def kv_config(key_shift: str = "rotating", scaling: float = 1.0) -> KVCacheConfig:
    rope = RopeConfig(tuple(10000 ** (-i / 16) for i in range(16)), 32, scaling)
    return KVCacheConfig(64, 2, 1, key_shift, key_hadamard=True, value_hadamard=True, rope=rope)


@pytest.mark.parametrize("scaling", [1.0, 1.3])
def test_statistics(scaling: float) -> None:
    """Keys made from a bias before a partial rotary embedding: the shift is the bias, the deviation what was added."""
    torch.manual_seed(0)
    config = kv_config(scaling=scaling)
    bias = 50 * torch.randn(2, 64)
    noise = torch.randn(4, 200, 2, 64)
    noise -= noise[:, SKIPPED:].mean((0, 1))
    turns = reference.rope_turns(config.rope.inv_freq)
    positions = torch.arange(200)
    keys = [reference.rotate(bias + n, positions, turns, scaling) for n in noise]
    queries = torch.full((200, 4, 64), 3.0)
    queries[:, 2:] = 5
    values = torch.randn(200, 2, 64) + 7
    keys[0][:SKIPPED] = values[:SKIPPED] = 1e6  # massive activations, which no statistic may see
    firsts = queries[:3], keys[0][:3] + torch.randn(3, 2, 64), values[:3] + torch.randn(3, 2, 64)
    windows = [(queries, k, values) for k in keys]
    found = kv.collect(windows, firsts, config)
    torch.testing.assert_close(found.k_shift, bias, rtol=0, atol=1e-3)
    turned = torch.stack([reference.rotate(n, positions, turns, scaling) for n in noise])
    torch.testing.assert_close(found.k_deviation, turned[:, SKIPPED:].abs().amax((0, 1)), rtol=0, atol=1e-3)
    torch.testing.assert_close(found.q_rms, torch.tensor([3.0, 5.0])[:, None].expand(2, 64))
    torch.testing.assert_close(found.v_shift, values[SKIPPED:].mean(0))
    torch.testing.assert_close(found.k_first, firsts[1].mean(0))
    torch.testing.assert_close(found.v_first, firsts[2].mean(0))
    plain = kv.collect(windows, None, config)
    torch.testing.assert_close(plain.k_first, reference.rotate(found.k_shift[None], positions[:1], turns, scaling)[0])
    torch.testing.assert_close(plain.v_first, found.v_shift)


def rotary(base: float, pairs: int) -> KVCacheConfig:
    """Of heads of 64 or 128, all of which rotates."""
    inv_freq = tuple(base ** (-i / pairs) for i in range(pairs))
    return replace(kv_config(), head_size=2 * pairs, rope=RopeConfig(inv_freq, 2 * pairs))


@pytest.mark.parametrize(
    ("config", "counts"),
    [
        (rotary(1e4, 32), [0, 8, 12]),
        (rotary(1e5, 32), [0, 8, 10]),  # SmolLM2
        (rotary(1e6, 32), [0, 8]),  # Qwen2.5 of 0.5B
        (rotary(5e5, 64), [0, 8, 16]),  # Llama 3
        (replace(kv_config(), rope=RopeConfig((1.0,) * 11 + (0.01,) * 5, 32)), [3, 11]),  # slow ones fill no step
        (replace(kv_config(), rope=RopeConfig((0.01,) * 16, 32)), [0]),
    ],
)
def test_shifts_fill_whole_steps_of_the_kernels(config: KVCacheConfig, counts: list[int]) -> None:
    assert kv.shift_counts(config) == counts
    turns = reference.rope_turns(config.rope.inv_freq)
    slow = reference.slow_pairs(turns)
    for count in range(len(turns) - int(slow.sum()) + 1):
        shift = torch.zeros(config.num_kv_heads, config.head_size)
        shift[1, len(turns) : 2 * len(turns)][slow] = 1
        shift[0, : len(turns)][torch.nonzero(~slow).flatten()[:count]] = 1
        ones = torch.ones_like(shift)
        prepared = native_cuda._make(reference.KVParams.build(config, ones, shift, ones)).fields
        found = kv.count_shifts(shift, config)
        assert (found["fast"], found["slow"]) == (count, int(slow.sum()))
        assert found["steps"] == prepared.fast_steps + (prepared.slow_steps > 0)


def keys_with_bias(config: KVCacheConfig, bias: torch.Tensor) -> list[attention.QKV]:
    """Eight windows of 300 queries, keys and values that are random but for a bias of the keys [H, D]."""
    torch.manual_seed(0)
    turns, positions = reference.rope_turns(config.rope.inv_freq), torch.arange(300)
    made = []
    for _ in range(8):
        q, k, v = torch.randn(3, 300, *bias.shape)
        made.append((2 * q, reference.rotate(k + bias, positions, turns, 1.0), v))
    return made


@pytest.mark.parametrize("search", [(), RTN.search])
@pytest.mark.parametrize("strong", [0, 3, 11])
def test_a_shift_is_kept_where_it_matters(strong: int, search: tuple[Smoothing, ...]) -> None:
    """A weak bias on all pairs, strong ones on slow pairs and on so many fast ones, of either head."""
    config = rotary(1e4, 32)
    bias = torch.full((2, 64), 0.02)
    bias[:, 46:50] = 20.0
    fast = torch.randperm(12, generator=torch.Generator().manual_seed(1))[:strong]
    bias[torch.arange(strong) % 2, fast] = 10.0
    windows = keys_with_bias(config, bias)
    statistics = kv.collect(windows, None, config)
    plan = SimpleNamespace(
        recipe=replace(RTN, search=search, first_shift=False),
        kv=config,
        attention=SimpleNamespace(scale=0.125, sliding_window=0),
        workers=ALONE,
    )
    o_proj = torch.randn(32, 128)
    kept, params = blocks.layer_params(plan, statistics, windows, o_proj)  # type: ignore[arg-type]
    has_shift = (kept.k_shift != 0).any(0).view(2, 32)
    assert torch.equal(has_shift[0], has_shift[1])
    assert has_shift[0, 12:].all()
    assert has_shift[0, fast].all()
    assert has_shift[0, :12].sum() == {0: 0, 3: 8, 11: 12}[strong]
    assert torch.equal(kept.k_shift[kept.k_shift != 0], statistics.k_shift[kept.k_shift != 0])
    for name, candidate in params.items():
        assert torch.equal(candidate.k_shift, kept.k_shift), name
    smooth = kv.smoothing_factors(Smoothing(0.5), kept, 64)
    assert torch.equal(params["free^0.5"].k_smooth, smooth)

    plan.recipe = replace(plan.recipe, shift_pairs="slow")
    slow, _ = blocks.layer_params(plan, statistics, windows, o_proj)  # type: ignore[arg-type]
    assert torch.equal((slow.k_shift != 0).any(0), torch.arange(64) % 32 >= 12)
    plan.recipe = replace(plan.recipe, shift_pairs="all")
    assert blocks.layer_params(plan, statistics, windows, o_proj)[0] is statistics  # type: ignore[arg-type]


def test_deviations_are_from_the_shift_that_is_kept() -> None:
    config = rotary(1e4, 32)
    windows = keys_with_bias(config, 10 * torch.randn(2, 64))
    statistics = kv.collect(windows, (windows[0][0][:3], windows[0][1][:3], windows[0][2][:3]), config)
    pairs = torch.arange(32) % 3 > 0
    kept = kv.keep_shift(statistics, pairs, windows, config, own_first=True)
    turns, positions = reference.rope_turns(config.rope.inv_freq), torch.arange(300)
    shift = torch.where(pairs.repeat(2), statistics.k_shift, 0)
    known = reference.rotate(shift.expand(300, -1, -1), positions, turns, 1.0)
    expected = torch.stack([k - known for _, k, _ in windows])[:, SKIPPED:].abs().amax((0, 1))
    torch.testing.assert_close(kept.k_shift, shift, rtol=0, atol=0)
    torch.testing.assert_close(kept.k_deviation, expected)
    dropped = ~pairs.repeat(2)
    assert (kept.k_deviation[:, dropped].mean(1) > 2 * statistics.k_deviation[:, dropped].mean(1)).all()
    assert torch.equal(kept.k_first, statistics.k_first)
    as_any_other = kv.keep_shift(statistics, pairs, windows, config, own_first=False)
    torch.testing.assert_close(as_any_other.k_first, shift, rtol=0, atol=0)
    for name in ("q_rms", "v_shift", "v_first"):
        assert torch.equal(getattr(kept, name), getattr(statistics, name))


def test_first_position_is_calibrated_on_what_begins_a_sequence(tmp_path: Path, text: Path) -> None:
    """Any token of the text, or the BOS where the tokenizer puts one before every text, windows included."""
    model = tiny_model(tmp_path / "model", num_layers=2)
    windows = read_windows(model, text, SAMPLES, SEQ_LEN, seed=0)
    assert windows.prefix == []
    assert set(windows.first_tokens.tolist()) <= set(windows.tokens[: windows.statistics].flatten().tolist())
    assert windows.first_tokens.numel() > 16
    quantize(settings(model, tmp_path / "out", text))
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    captured: list[torch.Tensor] = []
    whole.model.layers[0].self_attn.k_proj.register_forward_hook(lambda m, x, y: captured.append(y))
    with torch.inference_mode():
        whole(windows.first_tokens[:, None])
    # position 0 is not rotated; the first block's keys feel no rounding but that of k_proj itself
    k_first = Checkpoint(tmp_path / "out").kv_tensors(0)["k_first"]
    assert blocks.relative_error(k_first.flatten(), captured[0][:, 0].mean(0)) < 0.2

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    bos = tokenizer.token_to_id("\x01")
    tokenizer.post_processor = TemplateProcessing(single="\x01 $A", special_tokens=[("\x01", bos)])
    tokenizer.save(str(model / "tokenizer.json"))
    begun = read_windows(model, text, SAMPLES, SEQ_LEN, seed=0)
    assert begun.prefix == begun.first_tokens.tolist() == [bos]
    assert begun.tokens.shape == windows.tokens.shape
    assert (begun.tokens[:, 0] == bos).all()


def test_smoothing_factors() -> None:
    deviation = torch.tensor([[1.0, 4.0, 16.0, 1.0, 1e9, 0.0]]).repeat(2, 1)
    rest = dict.fromkeys(("v_shift", "k_first", "v_first"), deviation)
    found = kv.KVStatistics(k_shift=deviation, k_deviation=deviation, q_rms=torch.full((2, 6), 4.0), **rest)
    tied = kv.smoothing_factors(Smoothing(0.5, tied=True), found, rotary_dim=4)
    torch.testing.assert_close(tied[:, :2], tied[:, 2:4])
    assert ((tied >= 1 / kv.SMOOTH_LIMIT) & (tied <= kv.SMOOTH_LIMIT)).all()
    assert (kv.smoothing_factors(Smoothing(), found, 4) == 1).all()
    plain = replace(found, k_deviation=deviation[:, :4], q_rms=found.q_rms[:, :4])
    free = kv.smoothing_factors(Smoothing(0.5), plain, 4)
    torch.testing.assert_close(free[0] / free[0, 0], torch.tensor([1.0, 2.0, 4.0, 1.0]))
    torch.testing.assert_close(free.log().mean(-1), torch.zeros(2))
    assert [s.name for s in (Smoothing(), Smoothing(0.5), Smoothing(0.5, tied=True), Smoothing(0.7, 0.4))] == [
        "none",
        "free^0.5",
        "tied^0.5",
        "free^0.7/q^0.4",
    ]


def test_channels_of_zeros_leave_the_others_their_factors() -> None:
    """As padded heads and pruned models have them, and a head of nothing else; factors of the rest are those of it."""
    torch.manual_seed(0)
    deviation, dead = 10 ** torch.randn(3, 64), torch.arange(64) % 4 == 0
    deviation[1] = deviation[0] * ~dead
    deviation[2] = 0
    rest = dict.fromkeys(("k_shift", "v_shift", "k_first", "v_first"), deviation)
    statistics = kv.KVStatistics(k_deviation=deviation, q_rms=torch.full((3, 64), 4.0), **rest)
    found = kv.smoothing_factors(Smoothing(0.5), statistics, 64)
    live = replace(statistics, k_deviation=deviation[:1, ~dead], q_rms=statistics.q_rms[:1, ~dead])
    torch.testing.assert_close(found[1:2, ~dead], kv.smoothing_factors(Smoothing(0.5), live, 0))
    assert (found[1, dead] == 1).all()
    assert (found[2] == 1).all()


def test_balance_of_values_is_that_of_live_channels() -> None:
    """Those that have values and columns of o_proj; the others have factors of 1."""
    torch.manual_seed(0)
    size, dead = 64, torch.arange(64) % 4
    v_proj, o_proj = torch.nn.Linear(32, size, bias=False), torch.nn.Linear(2 * size, 32, bias=False)
    windows = torch.randn(2, 48, 32)

    def balance(v: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
        v_proj.weight.data, o_proj.weight.data = v, o
        adapter = SimpleNamespace(num_kv_heads=1, head_size=v.shape[0])
        run = SimpleNamespace(adapter=adapter, settings=SimpleNamespace(device="cpu"), recipe=RTN, workers=ALONE)
        return blocks.balance_value(run, torch.nn.Identity(), v_proj, o_proj, windows)  # type: ignore[arg-type]

    with torch.no_grad():
        v, o = v_proj.weight * torch.randn(size, 1).exp(), o_proj.weight.unflatten(1, (2, size))
        live = balance(v[dead > 1], o[..., dead > 1].flatten(1))
        found = balance(v * (dead != 0)[:, None], (o * (dead != 1)).flatten(1))
    torch.testing.assert_close(found[:, dead > 1], live)
    assert (found[:, dead <= 1] == 1).all()


def test_search_takes_the_better_candidate_of_each_head() -> None:
    """Head 0 has one wide channel and gains from smoothing; head 1 has none and loses from the same factors."""
    torch.manual_seed(0)
    config = kv_config()
    q, k, v = torch.randn(3, 96, 2, 64)
    k[:, 0, 5] *= 50
    q[:, 0, 5] /= 50
    smooth = torch.ones(2, 64)
    smooth[:, 5] = 50
    zeros = torch.zeros(2, 64)
    candidates = [reference.KVParams.build(config, s, zeros, zeros) for s in (torch.ones(2, 64), smooth)]
    best = kv.search(candidates, [(q, k, v)], torch.randn(32, 128), scale=0.125, sliding_window=0)
    assert best.tolist() == [1, 0]


def test_held_out_windows() -> None:
    """A quarter of few, a sixteenth of many, never fewer of more, and one for every worker of as many as are named."""
    counts = [held_out_of(n) for n in range(4, 600)]
    assert counts == sorted(counts)
    assert [held_out_of(n) for n in (4, 12, 32, 128, 256, 512)] == [2, 3, 8, 8, 16, 32]
    for workers in range(2, 40):
        assert held_out_of(samples_for(workers)) == workers


def test_calibration_windows(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", num_layers=1)
    text = save_text(tmp_path / "t.txt", 4000)
    windows = read_windows(model, text, samples=12, seq_len=100, seed=3)
    assert (windows.tokens.shape, windows.held_out, windows.statistics) == ((12, 100), 3, 9)
    characters = torch.tensor([ord(c) for c in text.read_text()]).view(40, 100)
    matches = (windows.tokens[:, None] == characters[None]).all(-1)
    assert (matches.sum(1) == 1).all()
    assert matches.sum(0).max() == 1  # no window twice


def test_windows_of_two_texts(tmp_path: Path) -> None:
    """As many of each as was said, and of both among those that are held out; another seed, another order."""
    model = tiny_model(tmp_path / "model", num_layers=1)
    text, own = save_text(tmp_path / "t.txt", 4000), tmp_path / "own.txt"
    own.write_text("z" * 4000)
    both = [read_windows(model, text, 12, 100, seed, own, 12) for seed in (3, 3, 4)]
    assert torch.equal(both[0].tokens, both[1].tokens)
    for windows in both:
        assert (windows.tokens.shape, windows.held_out) == ((24, 100), 6)
        of_own = (windows.tokens == ord("z")).all(-1)
        assert of_own.sum() == 12
        assert 0 < of_own[-6:].sum() < 6
        of_text = {tuple(row.tolist()) for row in windows.tokens[~of_own]}
        alone = read_windows(model, text, 12, 100, 3 if windows is not both[2] else 4).tokens
        assert of_text == {tuple(row.tolist()) for row in alone}
    assert not torch.equal(both[0].tokens, both[2].tokens)


def test_errors_of_a_divergence_are_those_of_windows() -> None:
    """Where windows differ by more than their tokens do, and of tokens where they do not."""
    torch.manual_seed(0)
    x = torch.rand(8, 100, dtype=torch.float64)
    of_tokens = x.std().item() / 800**0.5
    found = mean_and_se(x - x.mean(1, keepdim=True))
    assert found["kl_se"] == pytest.approx(of_tokens, rel=0.05)
    assert found["kl"] == pytest.approx(0)
    apart = 10 * torch.arange(8)[:, None] + x
    found = mean_and_se(apart)
    assert found["kl"] == pytest.approx(35.5, rel=0.01)
    assert found["kl_se"] == pytest.approx(10 * torch.arange(8.0).std().item() / 8**0.5, rel=0.02)


# -- interruption

KILL = """
import os, signal, sys
from vllm_wkvquant import cli
from vllm_wkvquant.quantize import files
commit, calls = files.commit, 0
def killing(temporary, path):
    global calls
    calls += 1
    if calls == int(sys.argv[1]):
        print("killed before", path.name, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    commit(temporary, path)
files.commit = killing
sys.exit(cli.main(sys.argv[2:]))
"""


def test_killed_and_resumed_gives_the_same_bytes(tmp_path: Path, text: Path) -> None:
    """SIGKILL inside three blocks, drawn with a fixed seed, and once inside the final writing."""
    layers = 6
    model = tiny_model(tmp_path / "model", num_layers=layers)
    common = [str(model), "--calib-text", str(text), "--samples", str(SAMPLES), "--seq-len", str(SEQ_LEN)]
    common += ["--shard-size", "200KB", "--recipe", "best"]
    assert cli.main(["quantize", common[0], str(tmp_path / "whole"), *common[1:]]) == 0
    expected = contents(tmp_path / "whole")

    writes = 4  # per block: tensors, report, hidden states, run.json
    stops = torch.randperm(layers, generator=torch.Generator().manual_seed(7))[:3].sort().values.tolist()
    steps = torch.randint(1, writes + 1, (3,), generator=torch.Generator().manual_seed(8)).tolist()
    out = tmp_path / "out"
    partial = tmp_path / "out.wkvquant-partial"
    command = ["quantize", common[0], str(out), *common[1:]]
    done = 0
    for i, (block, step) in enumerate([*zip(stops, steps, strict=True), (layers, 2)]):
        call = (block - done) * writes + step
        resume = ["--resume"] if i else []
        run = subprocess.run(
            [sys.executable, "-c", KILL, str(call), *command, *resume], capture_output=True, text=True, timeout=300
        )
        assert run.returncode == -9, run.stderr
        assert "killed before" in run.stdout
        assert not out.exists()
        done = json.loads((partial / "run.json").read_text())["blocks_done"] if (partial / "run.json").exists() else 0
        assert done == block
    assert cli.main([*command, "--resume"]) == 0
    assert contents(out) == expected
    assert not partial.exists()


# -- command


def test_quantize_and_inspect_from_the_command(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model(tmp_path / "model", "qwen3", head_size=128, num_layers=2)
    out = tmp_path / "out"
    arguments = ["--calib-text", str(text), "--samples", "4", "--seq-len", "32"]
    assert cli.main(["quantize", str(model), str(out), *arguments]) == 0
    shown = capsys.readouterr()
    assert re.search(r"^block 1/2 loss [\d.]+ -> [\d.]+ [\d.]+ s left$", shown.err, re.MULTILINE)
    assert re.search(r"^block 2/2 loss [\d.]+ -> [\d.]+$", shown.err, re.MULTILINE)
    assert SEARCHED in shown.out
    assert cli.main(["inspect", str(out)]) == 0
    assert "4.250 bits an element" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["inspect", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["kv_cache"]["bits_per_element"] == 4.25
    assert result["kv_cache"]["bytes_per_token"] == 2 * 2 * 136
    assert result["kv_cache"]["bytes_per_token_16bit"] == 2 * 2 * 512
    assert result["kv_cache"]["page"] == {
        "block_size": 64,
        "bytes_per_head": 8704,
        "k_codes": 0,
        "v_codes": 4096,
        "k_meta": 8192,
        "v_meta": 8448,
    }
    assert result["weights"]["group_sizes"]["o_proj"] == 128
    assert result["weights"]["quantized_parameters"] == 2 * (128 * 128 * (4 + 2 + 2 + 4) + 3 * 128 * 256)
    assert len(result["layers"]) == 2
    assert result["layers"][1]["hidden_error"] > 0


def test_inspect_reads_every_file_it_describes(tmp_path: Path, text: Path) -> None:
    model = tiny_model(tmp_path / "model", num_layers=1)
    quantize(settings(model, tmp_path / "out", text))
    weights = inspect(tmp_path / "out")["weights"]
    kv_bytes = len(KV_PARAMS) * 2 * 64 * 4
    shape_bytes = 7 * 16
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    total = weights["quantized_bytes"] + weights["other_bytes"] + kv_bytes + shape_bytes
    assert index["metadata"]["total_size"] == total


def test_worked_example_of_the_format() -> None:
    """docs/format.md: the offsets and bytes it shows are those of layout.py."""
    document = Path(__file__).parent.parent / "docs" / "format.md"
    result = doctest.testfile(str(document), module_relative=False)
    assert result.attempted >= 10
    assert result.failed == 0
