"""`wkvquant eval`: its mask, its arithmetic and its agreement with the engine."""

import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from models import tiny_model

from vllm_wkvquant import cli, reference
from vllm_wkvquant import evaluate as evaluation
from vllm_wkvquant.config import ConfigError
from vllm_wkvquant.evaluate import SimulatedCache, difference, evaluate, read_windows
from vllm_wkvquant.layout import token_bytes
from vllm_wkvquant.plugin.eval_engine import kv_cache_bytes


def layer(heads: int, head_size: int, shift: float) -> reference.KVParams:
    g = torch.Generator().manual_seed(0)
    inv_freq = [10000 ** (-2 * i / head_size) for i in range(head_size // 2)]
    return reference.KVParams(
        k_smooth=torch.rand(heads, head_size, generator=g) + 0.5,
        k_shift=shift * torch.randn(heads, head_size, generator=g),
        v_shift=torch.randn(heads, head_size, generator=g),
        key_hadamard=True,
        rope_turns=reference.rope_turns(inv_freq),
    )


@pytest.mark.parametrize(("chunk", "window"), [(1, 0), (7, 0), (16, 9), (64, 0)])
def test_whole_sequence_equals_stepping_through_pages(chunk: int, window: int) -> None:
    """One masked attention over a sequence gives what the paged cache gives, chunk after chunk."""
    length, heads, kv_heads, head_size, block = 45, 6, 2, 64, 16
    torch.manual_seed(1)
    params = layer(kv_heads, head_size, shift=5.0)
    positions = torch.arange(length)
    q = torch.randn(length, heads, head_size)
    k = torch.randn(length, kv_heads, head_size) + reference.key_shift_at(positions, params)
    v = torch.randn(length, kv_heads, head_size)
    past = reference.fake_quantize(k, v, positions, params)
    scale = head_size**-0.5
    whole = reference.past_only_attention(q, k, v, *past, scale, chunk, window)

    cache = torch.full((4, kv_heads, block, token_bytes(head_size)), 255, dtype=torch.uint8)
    table = torch.tensor([[2, 0, 3]], dtype=torch.int32)
    slots = table[0].long()[positions // block] * block + positions % block
    stepped = torch.empty_like(q)
    for first in range(0, length, chunk):
        last = min(first + chunk, length)
        new = slice(first, last)
        lens, starts = torch.tensor([last]), torch.tensor([0, last - first])
        reference.paged_attention(
            q[new], k[new], v[new], cache, table, lens, starts, params, scale, stepped[new], window
        )
        reference.cache_write(k[new], v[new], cache, slots[new], positions[new], params)
    torch.testing.assert_close(whole, stepped, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(("chunk", "window"), [(0, 0), (1, 0), (1, 9), (7, 0), (7, 9)])
def test_a_simulated_cache_keeps_the_chunk_as_it_came(chunk: int, window: int) -> None:
    """And nothing of it where the chunk is 0; far enough from each other to tell."""
    length, heads, kv_heads, head_size = 45, 6, 2, 64
    torch.manual_seed(1)
    params = layer(kv_heads, head_size, shift=5.0)
    q, k, v = torch.randn(length, heads, head_size), *torch.randn(2, length, kv_heads, head_size)
    past = reference.fake_quantize(k, v, torch.arange(length), params)
    module = torch.nn.Module()
    module.layer_idx, module.num_key_value_groups, module.is_causal = 0, heads // kv_heads, True  # type: ignore[assignment]
    cache = SimulatedCache([partial(reference.fake_quantize, params=params)], chunk)
    inputs = (x.transpose(0, 1)[None] for x in (q, k, v))
    out, _ = cache.attention(module, *inputs, None, scaling=0.1, sliding_window=window or None)
    spec = {
        own: reference.past_only_attention(q, *kv, *past, 0.1, max(chunk, 1), window)
        for own, kv in ((True, (k, v)), (False, past))
    }
    torch.testing.assert_close(out[0], spec[chunk > 0], atol=1e-4, rtol=1e-4)
    assert (spec[True] - spec[False]).abs().max() > 0.05


def test_past_only_mask_is_the_chunk() -> None:
    assert reference.past_only_mask(4).tolist() == torch.eye(4, dtype=torch.bool).tolist()
    expected = [[True, True, False], [True, True, False], [False, False, True]]
    assert reference.past_only_mask(3, 2).tolist() == expected


def test_difference_is_paired_by_token() -> None:
    """A constant difference has no error, however the losses themselves spread."""
    base = torch.randn(400, dtype=torch.float64).abs() * 5
    windows = [[0] * 101] * 4
    constant = difference(base + 0.01, base, windows)
    assert constant["mean"] == pytest.approx(0.01)
    assert constant["se"] < 1e-12
    assert constant["percent"] == pytest.approx(100 * math.expm1(0.01))
    noise = torch.randn(400, dtype=torch.float64)
    noisy = difference(base + noise, base, windows)
    assert noisy["se"] == pytest.approx(noise.std().item() / 20)
    assert noisy["percent_upper95"] > noisy["percent"]


def test_the_table_has_the_larger_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of windows here, in percent of what the perplexity is."""
    d = {"mean": 0.5, "se": 0.01, "se_window": 0.03, "percent": 60.0}
    result = {"tokens": 9, "text": "t", "engine": "transformers", "chunk": 1, "kv_bits_per_element": 4.5}
    result |= {"fp16_ppl": 1.0, "w4_ppl": 2.0, "w4kv4_ppl": 3.0, "kl_w4": 0.25, "kl_w4_se": 0.125}
    result["difference"] = dict.fromkeys(("w4_vs_fp16", "w4kv4_vs_w4", "w4kv4_vs_fp16"), d)
    monkeypatch.setattr(evaluation, "evaluate", lambda *_: result)
    assert cli.main(["eval", "ckpt", "--baseline", ".", "--text", "t"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("+60.00 % ± 4.80") == 3
    assert "0.2500 ± 0.1250" in shown


def test_windows_cover_the_text(smollm2) -> None:
    whole = read_windows(smollm2.checkpoint, smollm2.test_text, 512, 0)
    some = read_windows(smollm2.checkpoint, smollm2.test_text, 512, 3)
    assert some == whole[:3]
    assert all(len(w) == 512 for w in whole[:-1])
    assert 1 < len(whole[-1]) <= 512
    with pytest.raises(ConfigError, match="fewer than 100000 windows of 512"):
        read_windows(smollm2.checkpoint, smollm2.test_text, 512, 100000)


def test_all_current_costs_nothing(smollm2, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the whole window in one chunk nothing is past: W4KV4 is W4, to the rounding of fp32."""
    path, text = smollm2.path.absolute(), smollm2.test_text.absolute()
    monkeypatch.chdir(smollm2.checkpoint)
    result = evaluate(Path("."), path, text, window=128, windows=1, chunk=128)
    assert result["checkpoint"] == smollm2.checkpoint.name
    assert result["kl_w4"] < 1e-6
    assert result["w4kv4_ppl"] == pytest.approx(result["w4_ppl"], rel=1e-4)
    assert result["w4_ppl"] != pytest.approx(result["fp16_ppl"], rel=1e-3)


def test_engine_measures_what_the_specification_says(smollm2) -> None:
    """Perplexity from vLLM's paged cache, prefilled in chunks of 64, within 0.3 % of the reference at that chunk."""
    command = [sys.executable, "-m", "vllm_wkvquant.cli", "eval", smollm2.checkpoint, "--baseline", smollm2.path]
    command += ["--text", smollm2.test_text, "--window", "512", "--windows", "4", "--engine", "vllm", "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout)
    assert result["engine"] == "vllm"
    assert result["chunk"] == 64
    assert result["tokens"] == 4 * 511
    assert result["kv_bits_per_element"] == 4.5
    for name in ("fp16_ppl", "w4_ppl", "w4kv4_ppl"):
        assert result[name] == pytest.approx(result["reference"][name], rel=3e-3), name
    # the cache does lose something, so the agreement above is not that of two 16-bit caches
    assert result["reference"]["kl_w4"] > 1e-3
    assert result["se"]["w4kv4_vs_w4"] > 0


def test_the_engine_has_the_memory_of_a_window(tmp_path: Path) -> None:
    """Of Llama-2-7B's 16-bit cache, of which a token takes half a megabyte; and of fp32."""
    config = {"num_attention_heads": 32, "hidden_size": 4096, "num_hidden_layers": 32, "torch_dtype": "float16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    window = 2049 << 19
    assert window < kv_cache_bytes(tmp_path, 2049) < 1.3 * window
    config |= {"num_key_value_heads": 8, "head_dim": 64, "dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert kv_cache_bytes(tmp_path, 2050) - kv_cache_bytes(tmp_path, 2049) == 32 * 2 * 8 * 64 * 4


def test_a_gpu_is_given_back_before_the_engine_starts(smollm2, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(evaluation, "check_run", lambda *_: None)
    monkeypatch.setattr(evaluation, "device_name", lambda _: "a GPU")
    scores = {f"nll_{name}": torch.rand(62, dtype=torch.float64) for name in ("fp16", "w4", "w4kv4")}
    scores |= {"kl_w4_w4kv4": scores["nll_w4"], "top1_w4_w4kv4": scores["nll_w4"]}
    monkeypatch.setattr(evaluation, "score_transformers", lambda *_: done.append("transformers") or scores)
    monkeypatch.setattr(evaluation, "score_vllm", lambda *_: done.append("vllm") or scores)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("freed"))
    evaluate(smollm2.checkpoint, smollm2.path, smollm2.test_text, 32, 2, device="cuda", engine="vllm")
    assert done == ["transformers", "freed", "vllm"]


def test_bad_arguments_are_refused(smollm2, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is outside 2 \.\. 8192"):
        evaluate(smollm2.checkpoint, smollm2.path, smollm2.test_text, window=9000)
    with pytest.raises(ConfigError, match=r"is outside 2 \.\. 8191, .* but the one of the token that --engine vllm"):
        evaluate(smollm2.checkpoint, smollm2.path, smollm2.test_text, window=8192, engine="vllm")
    with pytest.raises(ConfigError, match=f"{smollm2.checkpoint} is not a checkpoint of this model: its vocab_size"):
        evaluate(smollm2.checkpoint, tiny_model(tmp_path / "other"), smollm2.test_text, window=128)
    (tmp_path / "empty").touch()
    with pytest.raises(ConfigError, match="empty has 0 tokens, of which none can be scored; give a longer text"):
        evaluate(smollm2.checkpoint, smollm2.path, tmp_path / "empty", window=128, windows=0)
    with pytest.raises(ConfigError, match="is not a wkvquant checkpoint"):
        evaluate(smollm2.path, smollm2.path, smollm2.test_text)
    with pytest.raises(ConfigError, match="does not exist"):
        evaluate(smollm2.checkpoint, smollm2.path, smollm2.test_text / "no", window=128)
