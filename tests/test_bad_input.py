"""Bad input: one clear line on stderr, exit status 2, and nothing half-written."""

import errno
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import contents, edit_config, edit_tensors, save_text, tiny_model
from quantizing import ARGUMENTS, interrupt, quantize_command

from vllm_wkvquant import cli
from vllm_wkvquant.checkpoint import INDEX_FILE
from vllm_wkvquant.config import reason_of
from vllm_wkvquant.quantize import blocks, state
from vllm_wkvquant.quantize.files import WriteError

# -- wkvquant quantize, before any work

pytest_plugins = ["quantizing"]


def test_missing_model(refused: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "nothing"
    assert refused(path) == f"{path} has no config.json; give the path of a local Hugging Face checkpoint"


def test_config_is_not_json(refused: Callable[..., str], copy: Path) -> None:
    (copy / "config.json").write_text("{")
    assert refused(copy).startswith(f"{copy}/config.json is not valid JSON: ")


def test_model_without_weights(refused: Callable[..., str], copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    assert refused(copy) == f"{copy} has neither {INDEX_FILE} nor model.safetensors"


def test_model_in_another_format(refused: Callable[..., str], copy: Path) -> None:
    for file in copy.glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    assert refused(copy) == (
        f"{copy} has neither {INDEX_FILE} nor model.safetensors; convert its *.bin files to safetensors"
    )


@pytest.mark.parametrize(
    ("dtype", "stored"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.float64, "F64")]
)
def test_weights_of_other_types(refused: Callable[..., str], copy: Path, dtype: torch.dtype, stored: str) -> None:
    """As quantized files have them, here without a word of it in config.json."""
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(copy, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    assert refused(copy) == (
        f"{copy}: tensor {name} is stored as {stored}, not in 16 or 32 bits; give the model that it was made from"
    )


def test_config_of_other_types(refused: Callable[..., str], copy: Path) -> None:
    edit_config(copy, num_hidden_layers="two")
    assert refused(copy).startswith(f"{copy}/config.json is not a valid model config: ")
    edit_config(copy, num_hidden_layers=2, rope_scaling="linear")
    assert refused(copy) == "rotary embedding 'linear' in config.json must be an object"
    edit_config(copy, rope_scaling=None, quantization_config="gptq")
    assert refused(copy) == f"{copy} is already quantized (gptq); give the model with its 16-bit weights"


def test_text_that_is_no_file(refused: Callable[..., str], model: Path, tmp_path: Path) -> None:
    assert refused(model, calib_text=tmp_path) == (
        f"calibration text {tmp_path} is not a regular file; give a UTF-8 text file"
    )


def test_missing_text(refused: Callable[..., str], model: Path, tmp_path: Path) -> None:
    path = tmp_path / "nothing.txt"
    assert refused(model, calib_text=path) == f"calibration text {path} does not exist; give a UTF-8 text file"


def test_short_text(refused: Callable[..., str], model: Path, tmp_path: Path) -> None:
    path = save_text(tmp_path / "short.txt", 100)
    assert refused(model, calib_text=path) == (
        f"calibration text {path} has 100 tokens, 4 samples of 32 need 128; give a longer text, or lower --samples or "
        f"--seq-len"
    )


def test_text_that_is_not_utf8(refused: Callable[..., str], model: Path, tmp_path: Path) -> None:
    path = tmp_path / "latin1.txt"
    path.write_bytes(b"\xff\xfe")
    assert refused(model, calib_text=path).startswith(f"calibration text {path} is not UTF-8: ")


def test_unsupported_architecture(refused: Callable[..., str], copy: Path) -> None:
    edit_config(copy, architectures=["GPT2LMHeadModel"], model_type="gpt2")
    assert refused(copy) == (
        f"architecture GPT2LMHeadModel of {copy} is not supported; supported: LlamaForCausalLM, MistralForCausalLM, "
        f"Qwen2ForCausalLM, Qwen3ForCausalLM"
    )


def test_bias_that_vllm_leaves_out(refused: Callable[..., str], tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "qwen3", num_layers=1, attention_bias=True)
    (model / "model.safetensors").unlink()  # it is refused before its weights are downloaded
    assert refused(model) == (
        "config.json gives o_proj a bias, which vLLM leaves out in this architecture: it would answer wrongly, so this "
        "model cannot be served"
    )


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_activation_and_attention_that_vllm_lacks(family: str, refused: Callable[..., str], tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", family, num_layers=1)
    (model / "model.safetensors").unlink()
    edit_config(model, hidden_act="gelu")
    assert refused(model) == (
        "config.json: hidden_act 'gelu' is not supported: vLLM has only silu in this architecture"
    )
    edit_config(model, hidden_act="silu", dual_chunk_attention_config={"chunk_size": 1024})
    assert refused(model) == (
        "config.json: dual_chunk_attention_config is not supported: neither calibration nor the 4-bit cache has dual "
        "chunk attention"
    )
    edit_config(model, dual_chunk_attention_config=None, is_causal=False)
    assert refused(model) == "config.json: is_causal false is not supported: vLLM gives such a model no KV cache"


WINDOWS = "config.json gives layers a sliding window (sliding_window, layer_types, use_sliding_window with "
SLIDING, FULL = ["sliding_attention"] * 2, ["full_attention"] * 2
OF_QWEN: list[tuple[dict[str, Any], bool]] = [
    ({"layer_types": [*FULL[:1], *SLIDING[:1]]}, True),
    ({"layer_types": FULL, "use_sliding_window": True, "sliding_window": 32}, True),  # all slide in vLLM 0.26
    ({"layer_types": SLIDING}, False),
    ({"layer_types": None, "max_window_layers": 1}, True),
    ({"max_window_layers": 2}, True),  # the same
    ({"max_window_layers": 0}, False),
    ({"max_window_layers": 1, "sliding_window": None}, False),
    ({"sliding_window": 32, "use_sliding_window": False}, False),
]


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        # vLLM's Llama, which is its Mistral, too, heeds these keys; transformers' Llama has no windows
        ("llama", [({"layer_types": SLIDING}, True), ({"layer_types": FULL}, False), ({"sliding_window": 32}, True)]),
        ("llama", [({"sliding_window": 32, "use_sliding_window": False}, True), ({"sliding_window": None}, False)]),
        # transformers' Mistral slides in all layers
        ("mistral", [({"sliding_window": 32}, False), ({"layer_types": SLIDING}, False)]),
        ("mistral", [({"sliding_window": 32, "layer_types": FULL}, True)]),
        ("mistral", [({"layer_types": [*FULL[:1], *SLIDING[:1]]}, True)]),
        ("mistral", [({"layer_types": FULL, "sliding_window": None}, False)]),
        ("qwen2", OF_QWEN),
        ("qwen3", OF_QWEN),
    ],
)
def test_windows_that_vllm_reads_otherwise(
    family: str, settings: list[tuple[dict[str, Any], bool]], refused: Callable[..., str], tmp_path: Path
) -> None:
    """Each setting with those before it."""
    model = tiny_model(tmp_path / "model", family, num_layers=2)
    (model / "model.safetensors").unlink()
    taken = f"{model} has neither {INDEX_FILE} nor model.safetensors"
    for changes, differ in settings:
        edit_config(model, **changes)
        assert refused(model).startswith(WINDOWS if differ else taken), changes


def test_quantized_model(refused: Callable[..., str], checkpoint: Path) -> None:
    assert refused(checkpoint) == (
        f"{checkpoint} is already quantized (wkvquant); give the model with its 16-bit weights"
    )


def test_group_size_that_does_not_divide(refused: Callable[..., str], tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "odd", num_layers=1, intermediate_size=80)
    assert refused(model) == (
        "model.layers.0.mlp.down_proj has 80 input features, which no group size of [128, 64, 32] divides; this model "
        "cannot be quantized"
    )


def test_head_size(refused: Callable[..., str], tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "odd", num_layers=1, head_size=32)
    assert refused(model) == "head size 32 is not supported; supported: [64, 80, 96, 128, 256]"


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_positions_that_are_not_indices(key: str, refused: Callable[..., str], copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    del config["rope_parameters"]
    (copy / "config.json").write_text(json.dumps(config))
    edit_config(copy, **{key: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}})
    assert refused(copy) == (
        "rotary embedding with mrope_section (M-RoPE) is not supported: positions are not indices in the sequence"
    )
    edit_config(copy, **{key: {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}})
    assert refused(copy) == (
        "rotary embedding 'dynamic' (dynamic NTK) is not supported: its frequencies change with the length"
    )
    edit_config(copy, **{key: {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0}})
    assert refused(copy) == "rotary embedding 'longrope' is not supported: its frequencies change with the length"
    edit_config(copy, **{key: {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}})
    assert refused(copy) == "partial_rotary_factor 0.5 is not supported: these models rotate all of a head"
    edit_config(copy, **{key: {"rope_type": "default", "rope_theta": 1e4}, "partial_rotary_factor": 0.5})
    assert refused(copy) == "partial_rotary_factor 0.5 is not supported: these models rotate all of a head"
    edit_config(copy, **{key: {"type": "spiral", "rope_type": "spiral", "rope_theta": 1e4}})
    assert refused(copy) == ("rotary embedding 'spiral' is not supported; supported: default, linear, llama3, yarn")


def test_missing_tensor(refused: Callable[..., str], copy: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(copy, lambda tensors: tensors.pop(name))
    assert refused(copy) == f"{copy} lacks 1 tensors of its architecture, {name} first"


def test_wrong_shape(refused: Callable[..., str], copy: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(copy, lambda tensors: tensors.update({name: torch.zeros(3, 128)}))
    assert refused(copy) == f"{copy}: tensor {name} has shape (3, 128), its config asks for (256, 128)"


def test_unknown_tensor(refused: Callable[..., str], copy: Path) -> None:
    edit_tensors(copy, lambda tensors: tensors.update({"model.layers.1.mlp.extra": torch.zeros(3)}))
    assert refused(copy) == f"{copy} has tensors that its architecture does not know, model.layers.1.mlp.extra first"


def test_head_beside_a_tied_one(refused: Callable[..., str], tmp_path: Path, text: Path) -> None:
    """Which of the two counts differs between readers, unless they are the same."""
    model, out = tiny_model(tmp_path / "tied", num_layers=1, tie_word_embeddings=True), tmp_path / "fine"
    name, embedding = "lm_head.weight", "model.embed_tokens.weight"
    edit_tensors(model, lambda tensors: tensors.update({name: tensors[embedding] + 1}))
    assert refused(model) == (
        f"{model}: tensor {name} is not the embedding, and its config has tie_word_embeddings; set that to false, or "
        f"delete the tensor"
    )
    edit_tensors(model, lambda tensors: tensors.update({name: tensors[embedding].clone()}))
    assert cli.main(quantize_command(model, text, out)) == 0


def test_truncated_weights(refused: Callable[..., str], copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert refused(copy).startswith(f"{file} is not a readable safetensors file: ")


def test_tokenizer(refused: Callable[..., str], copy: Path) -> None:
    for file in copy.glob("tokenizer*"):
        file.unlink()
    assert refused(copy).startswith(f"the tokenizer of {copy} cannot be loaded: ")


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_no_tokenizer(
    family: str, refused: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers makes up an empty one."""
    model = tiny_model(tmp_path / "model", family, num_layers=1)
    for file in model.glob("tokenizer*"):
        file.unlink()
    message = f"{model} has no tokenizer: 'a' has no tokens; add the tokenizer's files"
    assert refused(model) == message
    assert cli.main(["quantize", str(model), str(tmp_path / "out"), *ARGUMENTS]) == 2  # on text of its own
    assert cli.main(["write-text", str(model), str(tmp_path / "own.txt")]) == 2
    assert capsys.readouterr().err == f"error: {message}\n" * 2


def test_reason_of_several_lines() -> None:
    assert reason_of(OSError("one\n  two")) == "one two"
    assert reason_of(TimeoutError()) == "TimeoutError"
    assert reason_of(KeyError("model_type")) == "KeyError 'model_type'"
    assert len(reason_of(ValueError("word " * 1000))) <= 600


def test_output_not_empty(refused: Callable[..., str], model: Path, tmp_path: Path) -> None:
    out = tmp_path / "full"
    out.mkdir()
    (out / "file").touch()
    assert refused(model, out=out) == f"output directory {out} is not empty; give a new one or delete it"
    assert refused(model, "--resume", out=out) == f"output directory {out} is not empty; give a new one or delete it"


def test_output_that_nothing_can_be_renamed_to(
    refused: Callable[..., str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (Path("."), Path("/"), Path("..")):
        assert refused(model, out=path) == (
            f"output directory {path} has no name of its own; give the path of a new directory"
        )
    link, empty = tmp_path / "link", tmp_path / "empty"
    empty.mkdir()
    link.symlink_to(empty)
    symbolic = f"output directory {link} is a symbolic link; give the directory that it leads to, or a new one"
    assert refused(model, out=link) == symbolic
    empty.rmdir()
    assert refused(model, out=link) == symbolic
    monkeypatch.setattr(Path, "is_mount", lambda path: path == empty)
    empty.mkdir()
    assert refused(model, out=empty) == f"output directory {empty} is a mount point; give a new directory in it"


def test_gpu_that_is_not_here(refused: Callable[..., str], model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    message = "--device cuda:2: torch sees 2 GPUs here, the first is cuda:0"
    assert refused(model, "--device", "cuda:2") == message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "magic"], "recipe 'magic' does not exist; recipes: best, rtn, paper, static"),
        (["--samples", "3"], "--samples 3 is too few: at least 4, of which 2 are held out"),
        (["--seq-len", "513"], "--seq-len 513 is outside 8 .. 512, the positions that the model knows"),
        (["--seq-len", "0"], "--seq-len 0 is outside 8 .. 512, the positions that the model knows"),
        (["--seed", str(2**64)], f"--seed {2**64} is outside 0 .. 2^63 - 1"),
        (["--device", "tpu"], "--device tpu is neither cpu nor cuda nor a GPU by its number, as cuda:1"),
        (["--device", "cpu:0"], "--device cpu:0 is neither cpu nor cuda nor a GPU by its number, as cuda:1"),
        (["--device", "cuda:x"], "--device cuda:x is neither cpu nor cuda nor a GPU by its number, as cuda:1"),
    ],
)
def test_arguments(arguments: list[str], message: str, refused: Callable[..., str], model: Path) -> None:
    assert refused(model, *arguments) == message


@pytest.mark.parametrize("size", ["5 apples", "1.2.3GB", "."])
def test_size_of_shards(size: str, model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["quantize", str(model), str(tmp_path / "out"), "--calib-text", str(text), "--shard-size", size])
    assert stopped.value.code == 2
    assert f"{size!r} is not a size such as 5GB or 500MB" in capsys.readouterr().err


def test_little_disk(refused: Callable[..., str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_wkvquant.quantize import plan

    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100_000}))
    assert refused(model) == (
        f"{tmp_path} has 0.0001 GB free, this run needs about 0.00087 GB; free some space, choose another output "
        f"directory, or lower --samples or --seq-len"
    )


def test_disk_that_an_interrupted_run_has_taken(
    refused: Callable[..., str], model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on with as much less, and hidden states of 16 bits take half as much."""
    from vllm_wkvquant.quantize import plan

    def needed(*arguments: str) -> float:
        with monkeypatch.context() as patch:
            patch.setattr(plan.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
            found = re.search(r"this run needs about (\S+) GB", refused(model, *arguments))
        assert found
        return 1e9 * float(found[1])

    whole, halved = needed(), needed("--dtype", "bfloat16")
    assert whole - halved == pytest.approx(2 * 2 * (4 + 3 * 2) * 32 * 128, rel=0.1)
    interrupt(model, text, tmp_path / "out")
    held = sum(file.stat().st_size for file in (tmp_path / "out.wkvquant-partial").rglob("*"))
    assert needed("--resume") == pytest.approx(whole - held, rel=0.02)
    assert held > 0.2 * whole


def test_output_below_a_file(refused: Callable[..., str], model: Path, tmp_path: Path) -> None:
    """Nothing is kept where nothing can be written."""
    (tmp_path / "file").write_text("")
    message = refused(model, out=tmp_path / "file" / "out")
    assert "Not a directory" in message
    assert "--resume" not in message


# -- wkvquant quantize, on the way


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight"]
)
def test_nan_in_the_model(name: str, value: float, stopped: Callable[..., str], copy: Path) -> None:
    """Of a token that the text does not have, too."""
    edit_tensors(copy, lambda tensors: tensors[name].view(-1)[5].fill_(value))
    assert stopped(copy) == f"tensor {name} of {copy} contains NaN or infinity; give a sound model"


@pytest.mark.parametrize("recipe", ["rtn", "best"])
def test_float16_overflows(recipe: str, stopped: Callable[..., str], copy: Path, text: Path, tmp_path: Path) -> None:
    """Weights, and what they make of hidden states and logits; bfloat16 holds them."""
    advice = "overflows float16; use --dtype bfloat16 or float32"

    def scale(name: str, factor: float) -> None:
        edit_tensors(copy, lambda tensors: tensors[name].mul_(factor))

    up, down, head = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight"
    scale(up, 1e3)
    scale(down, 1e3)
    hidden = re.compile(f"block 1: hidden state of the run '(reference|exact)' {advice}")
    assert hidden.fullmatch(stopped(copy, "--recipe", recipe, "--dtype", "float16"))
    scale(up, 1e4)
    assert stopped(copy, "--recipe", recipe, "--dtype", "float16") == f"tensor {up} of {copy} {advice}"
    scale(up, 1e-7)
    scale(down, 1e-3)
    scale(head, 1e5)
    assert stopped(copy, "--recipe", recipe, "--dtype", "float16").endswith(f"on held-out windows {advice}")
    scale(head, 1e-5)
    scale(up, 1e3)
    scale(down, 1e3)
    command = quantize_command(copy, text, tmp_path / "fine")
    assert cli.main([*command, "--recipe", "rtn", "--dtype", "bfloat16"]) == 0


def test_a_loss_that_is_not_finite(stopped: Callable[..., str], model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "learn", lambda *_: [1.0, float("nan")])
    assert stopped(model, "--recipe", "best") == "block 0: loss has NaN or infinity in float32; is the model sound?"


# -- disk full


def limited(limit: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """`wkvquant` in a process whose files cannot grow beyond `limit` bytes (0: no limit)."""

    def set_limit() -> None:
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.run(
        [sys.executable, "-m", "vllm_wkvquant.cli", *arguments],
        preexec_fn=set_limit,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("where", ["block", "checkpoint"])
def test_disk_full(where: str, model: Path, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    """While a block is kept, and while the checkpoint is written: nothing at OUT, and --resume goes on from there."""
    out, partial = tmp_path / "out", tmp_path / "out.wkvquant-partial"
    # the only shard is larger than any file of the state
    shard = (checkpoint / "model-00001-of-00001.safetensors").stat().st_size
    limit, file = {"block": (50_000, "block-00000.safetensors"), "checkpoint": (shard - 1, "checkpoint/shard-00001")}[
        where
    ]
    arguments = quantize_command(model, text, out)
    run = limited(limit, arguments)
    assert run.returncode == 2, run.stderr
    assert run.stderr.splitlines()[-1] == (
        f"error: cannot write {partial}/{file}: File too large; {partial} keeps the finished blocks: free some space, "
        f"then run again with --resume"
    )
    assert not out.exists()
    assert not list(partial.rglob("*.tmp"))
    assert limited(0, [*arguments, "--resume"]).returncode == 0
    assert not partial.exists()
    assert contents(out) == contents(checkpoint)


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("mkdir", "out.wkvquant-partial"),
        ("mkdir", "checkpoint"),
        ("mkdir", "additional_chat_templates"),
        ("rename", "shard-00001"),
        ("replace", "checkpoint"),
    ],
)
def test_disk_full_of_directories(
    method: str, name: str, stopped: Callable[..., str], copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names take space, too."""
    (copy / "additional_chat_templates").mkdir()
    (copy / "additional_chat_templates/a.jinja").write_text("a")
    real = getattr(Path, method)

    def full(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(Path, method, full)
    message = stopped(copy)
    assert re.match(rf"cannot write \S+/{name}: No space left on device", message)
    kept = "keeps the finished blocks: free some space, then run again with --resume"
    assert message.endswith(kept) == (name != "out.wkvquant-partial")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("LICENSE", "cannot be copied to the checkpoint: Permission denied"),
        ("model.safetensors", "cannot be read: Permission denied"),
        ("config.json", "cannot be read: Permission denied"),
        ("calib.txt", "cannot be read: Permission denied"),
    ],
)
def test_file_that_may_not_be_read(
    name: str, message: str, refused: Callable[..., str], copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is found before any work; who runs these tests may read all."""
    (copy / "LICENSE").write_text("free")
    text, real = save_text(copy / "calib.txt"), Path.open

    def denied(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(Path, "open", denied)
    monkeypatch.setattr(Path, "read_text", lambda path, **options: denied(path, **options).read())
    assert refused(copy, calib_text=text).endswith(f"{copy / name} {message}")


def test_name_that_is_too_long(refused: Callable[..., str], model: Path, tmp_path: Path) -> None:
    long = "n" * 300
    assert refused(model, calib_text=Path(long)) == f"calibration text {long} cannot be read: File name too long"
    assert cli.main(["quantize", str(model), str(tmp_path / long), "--calib-text", "text", *ARGUMENTS]) == 2
    partial = tmp_path / ("n" * 250)  # with our suffix
    assert cli.main(["quantize", str(model), str(partial), "--calib-text", "text", *ARGUMENTS]) == 2


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(errno.EACCES, "Permission denied"), "put that right"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "free some space"),
        (RuntimeError("I/O error: Input/output error (os error 5)"), "put that right"),
    ],
)
def test_only_want_of_space_is_called_so(
    error: Exception, advice: str, stopped: Callable[..., str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, tensors: object) -> None:
        raise WriteError(path, error)

    monkeypatch.setattr(state, "write_tensors", fail)
    assert stopped(model).endswith(f"keeps the finished blocks: {advice}, then run again with --resume")


# -- output that nobody reads


def unread(arguments: list[str], *streams: str) -> tuple[int, str, str]:
    """Status of `wkvquant` and what it wrote to the others than these streams, whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    to = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | dict.fromkeys(streams, writer)
    command = [sys.executable, "-m", "vllm_wkvquant.cli", *arguments]
    run = subprocess.run(command, text=True, timeout=300, **to)  # type: ignore[call-overload]
    os.close(writer)
    return run.returncode, run.stdout or "", run.stderr or ""


@pytest.mark.parametrize("option", [["--json"], []])
def test_unread_result(option: list[str], checkpoint: Path) -> None:
    """Neither a traceback nor what Python says at its end of what it could not flush."""
    assert unread(["inspect", str(checkpoint), *option], "stdout") == (141, "", "")


def test_unread_evaluation(checkpoint: Path, model: Path, text: Path) -> None:
    command = ["eval", str(checkpoint), "--baseline", str(model), "--text", str(text), "--window", "32"]
    status, _, said = unread([*command, "--windows", "1"], "stdout")
    assert (status, "Traceback" in said) == (141, False)


@pytest.mark.parametrize("streams", [["stdout"], ["stdout", "stderr"]])
def test_unread_progress(streams: list[str], checkpoint: Path, model: Path, text: Path, tmp_path: Path) -> None:
    """The checkpoint is what a run is for: it is written, and the status says so."""
    out = tmp_path / "out"
    command = quantize_command(model, text, out)
    status, _, said = unread(command, *streams)
    assert (status, "Traceback" in said) == (0, False)
    assert contents(out) == contents(checkpoint)
    own = ["write-text", str(model), str(tmp_path / "own.txt"), "--tokens", "8", "--length", "8"]
    assert unread(own, *streams)[0] == 0
    assert (tmp_path / "own.txt").is_file()


def test_unread_refusal(tmp_path: Path) -> None:
    assert unread(["inspect", str(tmp_path / "no")], "stdout", "stderr")[0] == 2
