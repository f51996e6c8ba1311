"""`wkvquant write-text`: text of the model's own."""

import errno
import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
import types
from functools import partial as partial_of
from pathlib import Path

import pytest
import torch
from models import contents, save_text, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from vllm_wkvquant import cli, self_text
from vllm_wkvquant.quantize import files, launch, plan
from vllm_wkvquant.text import read_tokens


def run(model: Path, file: Path, *options: object) -> int:
    return cli.main(["write-text", str(model), str(file), *map(str, options)])


def test_texts_are_likely_to_the_model(smollm2, tmp_path: Path) -> None:
    """A text that the model wrote surprises it less than the same words of another order do."""
    options = ["--tokens", 100, "--length", 48, "--batch", 2]
    assert run(smollm2.path, tmp_path / "own.txt", *options) == 0
    ids, _ = read_tokens(smollm2.path, tmp_path / "own.txt", "text")
    assert len(ids) >= 100  # three texts, the last batch has but one
    model = AutoModelForCausalLM.from_pretrained(smollm2.path, dtype=torch.float32)

    def loss(tokens: list[int]) -> float:
        row = torch.tensor([[*tokens[:90]]])
        return model(row, labels=row).loss.item()

    shuffled = [ids[i] for i in torch.randperm(len(ids), generator=torch.Generator().manual_seed(0)).tolist()]
    assert loss(ids) < loss(shuffled) - 1
    assert run(smollm2.path, tmp_path / "again.txt", *options) == 0
    assert run(smollm2.path, tmp_path / "other.txt", *options, "--seed", 1) == 0
    own, again, other = ((tmp_path / f"{name}.txt").read_text() for name in ("own", "again", "other"))
    assert own == again != other
    assert not list(tmp_path.glob("*.partial"))


def test_a_gpu_writes_as_many_texts_as_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of one text of 1000 tokens are 2 layers x 2 x 2 heads x 64 x 2 bytes a token, 1.024 MB."""
    model = tiny_model(tmp_path / "model", head_size=64, num_layers=2)
    config = AutoConfig.from_pretrained(model)
    assert (config.num_hidden_layers, config.num_key_value_heads, config.head_dim) == (2, 2, 64)
    assert self_text.batch_for(model, 1000, "cpu") == self_text.BATCH
    found = []
    for megabytes in (1, 5.13, 100, 10**6):
        memory = types.SimpleNamespace(total_memory=megabytes * 1e6)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, memory=memory: memory)
        found.append(self_text.batch_for(model, 1000, "cuda"))
    assert found == [1, 2, 32, 128]


def stopping(*args, write=self_text.write) -> object:
    """`self_text.write`, interrupted after the first batch."""
    yield next(write(*args))
    raise KeyboardInterrupt


def test_an_interrupted_run_goes_on(smollm2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """With the text of one that was not interrupted, and not with other settings."""
    options = ["--tokens", 60, "--length", 12, "--batch", 2]
    write, own, partial = self_text.write, tmp_path / "own.txt", tmp_path / "own.txt.partial"
    with monkeypatch.context() as patch:
        patch.setattr(self_text, "write", stopping)
        assert run(smollm2.path, own, *options) == 130
    assert list(tmp_path.iterdir()) == [partial]
    with partial.open("a") as file:
        file.write('["half a li')  # as a run that was killed leaves it
    assert run(smollm2.path, own, *options, "--seed", 1) == 2
    assert "other settings" in capsys.readouterr().err
    seen = []
    monkeypatch.setattr(self_text, "write", lambda *args: seen.append(args[3]) or write(*args))
    assert run(smollm2.path, own, *options) == 0
    assert seen == [1]
    assert list(tmp_path.iterdir()) == [own]
    assert run(smollm2.path, tmp_path / "whole.txt", *options) == 0
    assert own.read_text() == (tmp_path / "whole.txt").read_text()
    assert len(own.read_text()) > 60


def test_two_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is refused, also where the first has ended just before it looks."""
    model, own = tiny_model(tmp_path / "model", num_layers=1), tmp_path / "own.txt"
    options, partial = ["--tokens", 16, "--length", 16], tmp_path / "own.txt.partial"
    with partial.open("w") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        assert run(model, own, *options) == 2
    assert capsys.readouterr().err.endswith(f"error: another process is writing {partial}\n")
    partial.unlink()
    monkeypatch.setattr(self_text, "lock", lambda *_: own.touch())
    assert run(model, own, *options) == 2
    assert capsys.readouterr().err == f"error: {own} exists; another process has just written it\n"
    assert not partial.exists()


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first of three texts; the same command goes on once there is room."""
    model, own, partial = (
        tiny_model(tmp_path / "model", num_layers=1),
        tmp_path / "own.txt",
        tmp_path / "own.txt.partial",
    )
    options = ["--tokens", 30, "--length", 10, "--batch", 1, "--seed", 2**63 - 1]
    assert run(model, tmp_path / "whole.txt", *options) == 0
    with monkeypatch.context() as patch:
        patch.setattr(self_text, "write", stopping)
        assert run(model, own, *options) == 130
    kept = partial.read_text()
    command = [sys.executable, "-m", "vllm_wkvquant.cli", "write-text", model, own, *options]
    set_limit = partial_of(resource.setrlimit, resource.RLIMIT_FSIZE, (len(kept) + 5, len(kept) + 5))
    done = subprocess.run([*map(str, command)], preexec_fn=set_limit, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"error: cannot write {partial}: File too large; {partial} keeps the finished texts: free some space, then run "
        f"the same command again"
    )
    assert partial.read_text().startswith(kept)
    assert run(model, own, *options) == 0
    assert own.read_text() == (tmp_path / "whole.txt").read_text()
    own.unlink()
    partial.write_text('{"model": "')  # where not even the settings had room
    assert run(model, own, *options) == 0
    assert [*tmp_path.glob("own*")] == [own]


def test_a_model_is_quantized_on_text_of_its_own(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text is enough, is kept, and is used again; the same text given by name makes the same checkpoint."""
    model = tiny_model(tmp_path / "model")
    options = ["--recipe", "rtn", "--samples", "4", "--seq-len", "48"]
    assert cli.main(["quantize", str(model), str(tmp_path / "out"), *options]) == 0
    (own,) = tmp_path.glob("out.own-*.txt")
    ids, _ = read_tokens(model, own, "text")
    assert len(ids) >= 4 * 48
    given = ["--calib-text", str(own)]
    assert cli.main(["quantize", str(model), str(tmp_path / "again"), *options, *given]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "again")
    shutil.rmtree(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(self_text, "write_file", None)
        assert cli.main(["quantize", str(model), str(tmp_path / "out"), *options]) == 0
    edit = load_file(model / "model.safetensors")
    save_file({n: t.flip(0) for n, t in edit.items()}, model / "model.safetensors", {"format": "pt"})
    shutil.rmtree(tmp_path / "out")
    assert cli.main(["quantize", str(model), str(tmp_path / "out"), *options]) == 0
    assert len([*tmp_path.glob("out.own-*.txt")]) == 2  # other weights write another text
    assert cli.main(["quantize", str(model), str(tmp_path / "seeded"), *options, "--seed", "1"]) == 0
    assert next(tmp_path.glob("seeded.own-*.txt")).read_text() != own.read_text()
    for option in (["--dry-run"], ["--ray", "local"]):
        assert cli.main(["quantize", str(model), str(tmp_path / "none"), *options, *option]) == 2
        assert f"{option[0]} writes no text; give one with --calib-text" in capsys.readouterr().err
    for option in (["--samples", "3"], ["--seq-len", "99999"], ["--recipe", "none"]):  # before any text is written
        assert cli.main(["quantize", str(model), str(tmp_path / "none"), *options, *option]) == 2
        assert option[1] in capsys.readouterr().err
    assert not list(tmp_path.glob("none*"))


def test_a_text_of_its_own_that_is_empty(tmp_path: Path) -> None:
    """It is written again."""
    model = tiny_model(tmp_path / "model", num_layers=1)
    command = ["quantize", str(model), str(tmp_path / "out"), "--recipe", "rtn", "--samples", "4", "--seq-len", "48"]
    assert cli.main(command) == 0
    (own,) = tmp_path.glob("out.own-*.txt")
    written = own.read_text()
    shutil.rmtree(tmp_path / "out")
    own.write_text("")
    assert cli.main(command) == 0
    assert own.read_text() == written


def test_a_text_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, own, flushed = tiny_model(tmp_path / "model", num_layers=1), tmp_path / "own.txt", []
    commit = files.commit

    def watched(temporary: Path, path: Path) -> None:
        assert not path.exists()
        flushed.append((path, temporary.read_text()))
        commit(temporary, path)

    monkeypatch.setattr(files, "commit", watched)
    assert run(model, own, "--tokens", 16, "--length", 16) == 0
    assert flushed == [(own, own.read_text())]
    assert [*tmp_path.glob("own*")] == [own]
    own.unlink()

    def full(temporary: Path, path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(files, "commit", full)
    assert run(model, own, "--tokens", 16, "--length", 16) == 2
    assert [*tmp_path.glob("own*")] == [tmp_path / "own.txt.partial"]


def test_a_model_is_quantized_on_both(tmp_path: Path, capsys) -> None:
    """On windows of a text and on those of the model's own, which stay beside the checkpoint."""
    model, text = tiny_model(tmp_path / "model"), save_text(tmp_path / "calib.txt")
    command = ["quantize", str(model), str(tmp_path / "out"), "--recipe", "rtn", "--samples", "4", "--seq-len", "48"]
    assert cli.main([*command, "--own-samples", "3"]) == 2
    assert "--own-samples come to those of --calib-text" in capsys.readouterr().err
    command += ["--calib-text", str(text)]
    for options, reason in ((["-1"], "must not be negative"), (["3", "--dry-run"], "leave out --own-samples")):
        assert cli.main([*command, "--own-samples", *options]) == 2
        assert reason in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))
    assert cli.main([*command, "--own-samples", "5"]) == 0
    (own,) = tmp_path.glob("out.own-*.txt")
    assert len(read_tokens(model, own, "text")[0]) >= 5 * 48
    settings = json.loads((tmp_path / "out" / "wkvquant.json").read_text())["settings"]
    assert (settings["samples"], settings["own_samples"]) == (9, 5)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "9 windows of 48 tokens, 5 of them written by the model, 2 held out" in page


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "top_k": 1, "temperature": 0.1, "min_p": 1.0},
        {"no_repeat_ngram_size": 1, "repetition_penalty": 2.0},
        {"num_beams": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"suppress_tokens": list(range(97, 123))},
        {"max_time": 1e-4},
        {"stop_strings": ["a"]},
    ],
)
def test_settings_for_serving_do_not_count(settings: dict[str, object], tmp_path: Path) -> None:
    """But for the token that ends a text, which is never drawn."""
    model, options = tiny_model(tmp_path / "model", num_layers=1), ["--tokens", 256, "--length", 64]
    ends, file = {"eos_token_id": [*range(97, 110)]}, model / "generation_config.json"
    file.write_text(json.dumps(ends))
    assert run(model, tmp_path / "plain.txt", *options) == 0
    file.write_text(json.dumps(ends | settings))
    assert run(model, tmp_path / "own.txt", *options) == 0
    own = (tmp_path / "own.txt").read_text()
    assert own == (tmp_path / "plain.txt").read_text()
    assert not set("abcdefghijklm") & set("".join(text[1:] for text in own.split("\n\n")))


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It begins with those that both have: of 10256 none of the added ones."""
    model, own = tiny_model(tmp_path / "model", num_layers=1), tmp_path / "own.txt"
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"<{i}>" for i in range(10000)])
    tokenizer.save_pretrained(model)
    assert run(model, own, "--tokens", 64, "--length", 8) == 0
    assert len(own.read_text()) > 32


@pytest.mark.parametrize("given", [False, True])
def test_what_can_be_refused_is_before_a_text_is_written(
    given: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether all windows are the model's own or some."""
    model, out, name = tiny_model(tmp_path / "model"), tmp_path / "out", "model.layers.0.mlp.up_proj.weight"
    monkeypatch.setattr(self_text, "text_for", None)
    command = ["quantize", str(model), str(out), "--recipe", "rtn", "--samples", "4", "--seq-len", "48"]
    if given:
        command += ["--calib-text", str(save_text(tmp_path / "calib.txt")), "--own-samples", "8"]

    def refused(*options: str) -> str:
        capsys.readouterr()
        assert cli.main([*command, *options]) == 2
        return capsys.readouterr().err.removeprefix("error: ").removesuffix("\n")

    held_out = 3 if given else 2
    assert refused("--workers", "0") == "--workers 0 is less than one"
    assert refused("--workers", "50").startswith(f"--workers 50 is more than the {held_out} windows that are held out;")
    assert refused("--seed", str(2**63)) == f"--seed {2**63} is outside 0 .. 2^63 - 1"
    if given:
        assert refused("--calib-text", "no") == "calibration text no does not exist; give a UTF-8 text file"
    with monkeypatch.context() as patch:
        patch.setattr(plan.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
        assert refused().startswith(f"{tmp_path} has 1e-06 GB free, this run needs about 0.001")
    assert "GB of memory, --memory-budget is 0.0001 GB; lower --samples" in refused("--memory-budget", "100KB")
    file = model / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"model.norm.weight": torch.full((128,), float("nan"))}, file, {"format": "pt"})
    assert refused() == f"tensor model.norm.weight of {model} contains NaN or infinity; give a sound model"
    save_file({n: t for n, t in tensors.items() if n != name}, file, {"format": "pt"})
    assert refused() == f"{model} lacks 1 tensors of its architecture, {name} first"
    assert not list(tmp_path.glob("out*"))


def test_a_model_that_does_not_say_how_many_positions_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers knows."""
    model, own, seen = tiny_model(tmp_path / "model", num_layers=1), tmp_path / "own.txt", []
    config = json.loads((model / "config.json").read_text())
    del config["max_position_embeddings"]
    (model / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(self_text, "text_for", lambda *args: seen.append(args[3]) or own)
    monkeypatch.setattr(launch, "run", lambda settings, *_: seen.append(settings.calib_text))
    assert cli.main(["quantize", str(model), str(tmp_path / "out"), "--recipe", "rtn", "--samples", "4"]) == 0
    assert seen == [2048, own]


def test_a_place_where_no_text_can_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, file = tiny_model(tmp_path / "model", num_layers=1), save_text(tmp_path / "file")
    assert cli.main(["quantize", str(model), str(file / "out"), "--recipe", "rtn", "--samples", "4"]) == 2
    assert capsys.readouterr().err.endswith(f"error: the directory {file} cannot be made: File exists\n")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--length", "100000"], "--length 100000 is more than the "),
        (["--length", "1"], "--length 1 must be at least 2"),
        (["--tokens", "0"], "--tokens 0 must be at least 1"),
        (["--seed", "99999999999999999999"], "--seed 99999999999999999999 is outside 0 .. 2^63 - 1"),
        (["--device", "tpu"], "--device tpu is neither cpu nor cuda nor a GPU by its number, as cuda:1"),
    ],
)
def test_bad_input_is_refused(
    smollm2, tmp_path: Path, options: list[str], reason: str, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the model is loaded."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    assert run(smollm2.path, tmp_path / "own.txt", *options) == 2
    assert reason in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_bad_files_are_refused(smollm2, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there.txt").touch()
    assert run(smollm2.path, tmp_path / "there.txt") == 2
    assert "exists; give a new name" in capsys.readouterr().err
    assert run(smollm2.path, tmp_path / "nowhere" / "own.txt") == 2
    assert "does not exist" in capsys.readouterr().err
    assert run(tmp_path / "no-model", tmp_path / "own.txt") == 2
    assert "no-model has no config.json" in capsys.readouterr().err


def test_a_model_without_all_its_weights_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Or with quantized ones, which transformers does not know: it would draw them."""
    model, name = tiny_model(tmp_path / "model", num_layers=1), "model.layers.0.mlp.up_proj.weight"
    file, options = model / "model.safetensors", ["--tokens", 16, "--length", 16]
    tensors = load_file(file)
    save_file({n: t for n, t in tensors.items() if n != name}, file, {"format": "pt"})
    assert run(model, tmp_path / "own.txt", *options) == 2
    assert capsys.readouterr().err.endswith(f"error: {model} lacks 1 tensors of its architecture, {name} first\n")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "wkvquant"}}))
    assert run(model, tmp_path / "own.txt", *options) == 2
    advice = "give the model with its 16-bit weights"
    assert capsys.readouterr().err == f"error: {model} is already quantized (wkvquant); {advice}\n"
    assert [*tmp_path.iterdir()] == [model]
