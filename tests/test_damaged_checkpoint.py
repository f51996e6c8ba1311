"""Damaged checkpoints, and what `wkvquant eval` does not take: each gets one line that says what is wrong."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import edit_config, edit_tensors, tiny_model
from quantizing import quantize_command

from vllm_wkvquant import cli
from vllm_wkvquant.checkpoint import INDEX_FILE, KV_PARAMS, kv_tensor_name

WHOLE = "a whole number of at least 1"


pytest_plugins = ["quantizing"]


@pytest.fixture
def damaged(checkpoint: Path, tmp_path: Path) -> Path:
    """The checkpoint, to be damaged."""
    (tmp_path / "damaged").mkdir()
    for file in checkpoint.iterdir():
        (tmp_path / "damaged" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "damaged"


@pytest.fixture
def inspect_refused(capsys: pytest.CaptureFixture[str]) -> Callable[[Path], str]:
    def run(path: Path) -> str:
        capsys.readouterr()
        assert cli.main(["inspect", str(path)]) == 2
        return capsys.readouterr().err.removeprefix("error: ").strip()

    return run


@pytest.fixture
def eval_refused(text: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[Path, Path], str]:
    def run(checkpoint: Path, baseline: Path) -> str:
        capsys.readouterr()
        arguments = ["--baseline", str(baseline), "--text", str(text), "--window", "32", "--windows", "1"]
        assert cli.main(["eval", str(checkpoint), *arguments]) == 2
        return capsys.readouterr().err.splitlines()[-1].removeprefix("error: ")

    return run


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "{index} is not valid JSON: "),
        ("\xff", "{index} is not valid JSON: "),
        ("[]", "{index} must be an object, got list"),
        ('{"weight_map": 1}', "{index}: weight_map must be an object of file names"),
        ('{"weight_map": {"a": 1}}', "{index}: weight_map must be an object of file names"),
    ],
)
def test_damaged_index(content: str, message: str, inspect_refused: Callable[[Path], str], damaged: Path) -> None:
    index = damaged / INDEX_FILE
    index.write_bytes(content.encode("latin1"))
    assert inspect_refused(damaged).startswith(message.format(index=index))


def test_missing_checkpoint(inspect_refused: Callable[[Path], str], tmp_path: Path) -> None:
    path = tmp_path / "nothing"
    assert inspect_refused(path) == f"{path} has no config.json; give the path of a local Hugging Face checkpoint"


def test_checkpoint_of_another_kind(inspect_refused: Callable[[Path], str], model: Path, copy: Path) -> None:
    assert inspect_refused(model) == f"{model} is not a wkvquant checkpoint (quant_method None)"
    edit_config(copy, quantization_config="gptq")
    assert inspect_refused(copy) == f"{copy} is not a wkvquant checkpoint (quant_method 'gptq')"
    file = model / "config.json"
    assert inspect_refused(file) == f"{file} is a file; give the directory that it is in"


@pytest.mark.parametrize("content", ["{", "{}", '{"settings": 1}', {"smoothing": "x"}, {"candidates": {}}])
def test_damaged_report(content: str | dict, inspect_refused: Callable[[Path], str], damaged: Path) -> None:
    file = damaged / "wkvquant.json"
    file.write_text(content if isinstance(content, str) else json.dumps(json.loads(file.read_text()) | content))
    assert re.match(f"{re.escape(str(file))} is not (valid JSON|a report of this package)", inspect_refused(damaged))


def test_architecture_that_is_not_named(
    damaged: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM asks for it, `inspect` shows what is there, and a name of `.` is that of the directory."""
    edit_config(damaged, architectures=None)
    monkeypatch.chdir(damaged)
    assert cli.main(["inspect", ".", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["checkpoint"], shown["architecture"]) == (damaged.name, None)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("param", KV_PARAMS)
def test_nan_in_a_kv_tensor(param: str, value: float, inspect_refused: Callable[[Path], str], damaged: Path) -> None:
    name = kv_tensor_name(1, param)
    edit_tensors(damaged, lambda tensors: tensors[name][1, 3].fill_(value))
    assert inspect_refused(damaged) == (
        f"KV tensor {name} contains NaN or infinity; the checkpoint is damaged, quantize again"
    )


def test_smoothing_of_zero(inspect_refused: Callable[[Path], str], damaged: Path) -> None:
    name = kv_tensor_name(1, "k_smooth")
    edit_tensors(damaged, lambda tensors: tensors[name][0, 0].zero_())
    assert inspect_refused(damaged) == f"KV tensor {name} must be positive everywhere"


def test_missing_kv_tensor(inspect_refused: Callable[[Path], str], damaged: Path) -> None:
    name = kv_tensor_name(1, "v_shift")
    edit_tensors(damaged, lambda tensors: tensors.pop(name))
    assert inspect_refused(damaged) == f"{damaged} lacks 1 tensors, {name} first; quantize the model again"


def test_kv_tensor_of_another_shape(inspect_refused: Callable[[Path], str], damaged: Path) -> None:
    name = kv_tensor_name(0, "k_shift")
    edit_tensors(damaged, lambda tensors: tensors.update({name: torch.zeros(1, 64)}))
    assert inspect_refused(damaged) == f"{damaged}: tensor {name} has shape (1, 64), its config asks for (2, 64)"


def test_nan_in_a_scale(inspect_refused: Callable[[Path], str], damaged: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight_scale"
    edit_tensors(damaged, lambda tensors: tensors[name][0, 0].fill_(float("nan")))
    assert inspect_refused(damaged) == (
        f"tensor {name} contains NaN or infinity; the checkpoint is damaged, quantize again"
    )


@pytest.mark.parametrize(
    ("name", "count", "first"),
    [
        ("model.layers.1.mlp.up_proj.", 4, "weight_packed"),
        ("model.layers.1.mlp.up_proj.weight_zero_point", 1, ""),
        ("model.layers.0.input_layernorm.", 1, "weight"),
        ("model.embed_tokens.", 1, "weight"),
        ("lm_head.", 1, "weight"),
    ],
)
def test_missing_weight(
    name: str, count: int, first: str, inspect_refused: Callable[[Path], str], damaged: Path
) -> None:
    edit_tensors(damaged, lambda tensors: [tensors.pop(n) for n in [*tensors] if n.startswith(name)])
    assert inspect_refused(damaged) == f"{damaged} lacks {count} tensors, {name}{first} first; quantize the model again"


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.embed_tokens.weight", torch.ones(100, 128), "has shape (100, 128), its config asks for (256, 128)"),
        ("model.layers.0.input_layernorm.weight", torch.ones(3), "has shape (3,), its config asks for (128,)"),
        ("model.layers.0.mlp.down_proj.weight_scale", torch.ones(128, 0), "has shape (128, 0), its config asks for"),
        ("model.layers.0.mlp.down_proj.weight_scale", torch.tensor(1.0), "has shape (), its config asks for (128, 2)"),
        ("model.layers.0.mlp.down_proj.weight_shape", torch.tensor([9]), "has shape (1,), its config asks for (2,)"),
        ("model.layers.0.mlp.down_proj.weight_shape", torch.tensor([9, 0]), "says [9, 0], its config asks for [128,"),
        ("model.layers.0.mlp.down_proj.weight_packed", torch.ones(128, 32), "is of type F32, must be I32"),
        ("model.norm.weight", torch.ones(128), "is of type F32, must be F16 or BF16"),
        (kv_tensor_name(1, "k_shift"), torch.ones(2, 64).half(), "is of type F16, must be F32"),
    ],
)
def test_tensor_that_does_not_fit(
    name: str, tensor: torch.Tensor, message: str, inspect_refused: Callable[[Path], str], damaged: Path
) -> None:
    edit_tensors(damaged, lambda tensors: tensors.update({name: tensor}))
    assert inspect_refused(damaged).startswith(f"{damaged}: tensor {name} {message}")


@pytest.mark.parametrize(
    ("family", "part", "first"),
    [
        ("qwen2", "_proj.bias", "k_proj.bias"),
        ("qwen2", "k_proj.bias", "k_proj.bias"),
        ("qwen3", "q_norm", "q_norm.weight"),
    ],
)
def test_tensor_that_every_block_lacks(
    family: str, part: str, first: str, inspect_refused: Callable[[Path], str], text: Path, tmp_path: Path
) -> None:
    model, out = tiny_model(tmp_path / "model", family, num_layers=1), tmp_path / "out"
    assert cli.main(quantize_command(model, text, out)) == 0
    assert cli.main(["inspect", str(out)]) == 0
    edit_tensors(out, lambda tensors: [tensors.pop(n) for n in [*tensors] if part in n])
    assert f"tensors, model.layers.0.self_attn.{first} first; quantize the model again" in inspect_refused(out)


def test_tensor_that_nothing_asks_for(inspect_refused: Callable[[Path], str], damaged: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.bias"
    edit_tensors(damaged, lambda tensors: tensors.update({name: torch.ones(128)}))
    assert inspect_refused(damaged) == (
        f"{damaged} has 1 tensors that its config does not ask for, {name} first; quantize the model again"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 5}, "quantization_config.wkvquant says number of layers 2, the model has 5; quantize"),
        ({"num_key_value_heads": 4}, "quantization_config.wkvquant says number of KV heads 2, the model has 4;"),
        ({"head_dim": 128}, "quantization_config.wkvquant says head size 64, the model has 128; quantize the model"),
        (
            {"bias": True},
            "config.json: bias gives q_proj, k_proj, v_proj, o_proj a bias in vLLM, which this model lacks;",
        ),
        (
            {"attention_bias": True, "architectures": ["Qwen3ForCausalLM"]},
            "config.json gives o_proj a bias, which vLLM leaves out in this architecture",
        ),
        ({"hidden_size": 256}, "{path}: tensor model.embed_tokens.weight has shape (256, 128), its config asks for"),
        ({"vocab_size": "256"}, "config.json: vocab_size must be a whole number of at least 1, got '256'"),
        ({"architectures": "Llama"}, "config.json: architectures must be a list of names, got 'Llama'"),
        (
            {"architectures": ["GPT"]},
            "config.json: architecture GPT is not supported; supported: llama, mistral, qwen2,",
        ),
    ],
)
def test_config_of_another_model(
    changes: dict[str, object], message: str, inspect_refused: Callable[[Path], str], damaged: Path
) -> None:
    edit_config(damaged, **changes)
    assert inspect_refused(damaged).startswith(message.format(path=damaged))


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (
            {"rope_type": "default", "rope_theta": 1.01e4},
            "quantize the model with this rope, or serve with an explicit",
        ),
        (YARN, "the checkpoint's keys turn with another rotary embedding than the model's, {"),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, "dynamic NTK"),
        ({"rope_type": "default", "rope_theta": "many"}, "{path}/config.json is not a valid model config: "),
    ],
)
def test_rope_of_another_model(
    rope: dict[str, object], message: str, inspect_refused: Callable[[Path], str], damaged: Path
) -> None:
    """As vLLM refuses it; a shift that does not turn is at home under any."""
    edit_config(damaged, rope_parameters=rope)
    assert message.replace("{path}", str(damaged)) in inspect_refused(damaged)
    section = json.loads((damaged / "config.json").read_text())["quantization_config"]
    edit_config(damaged, quantization_config={**section, "wkvquant": {**section["wkvquant"], "key_shift": "static"}})
    assert cli.main(["inspect", str(damaged)]) == 0


def test_groups_of_weights(inspect_refused: Callable[[Path], str], damaged: Path) -> None:
    where, again = "quantization_config.config_groups", "quantize the model again"

    def refused_with(change: Callable[[dict[str, Any]], object]) -> str:
        config = json.loads((damaged / "config.json").read_text())
        section = json.loads(json.dumps(config["quantization_config"]))
        change(section)
        edit_config(damaged, quantization_config=section)
        message = inspect_refused(damaged)
        edit_config(damaged, **config)
        return message

    def weights(**changes: object) -> str:
        return refused_with(lambda s: s["config_groups"]["group_0"]["weights"].update(changes))

    assert refused_with(lambda s: s.pop("config_groups")) == f"{where} is missing or damaged; {again}"
    assert refused_with(lambda s: s.update(config_groups={"a": 1})) == f"{where} is missing or damaged; {again}"
    assert refused_with(lambda s: s.update(config_groups={})) == f"{where} has 0 groups for self_attn.q_proj; {again}"
    assert weights(num_bits=8) == f"{where}: num_bits of self_attn.q_proj must be 4, got 8; {again}"
    assert (
        weights(group_size=96) == f"{where}: group_size 96 of self_attn.q_proj does not divide its 128 columns; {again}"
    )
    assert "q_proj.weight_scale has shape (256, 1), its config asks for (256, 4)" in weights(group_size=32)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "layout_version",
            9,
            "KV page layout version 9 is not supported (this build uses 1); quantize the model again or install the "
            "matching vllm-wkvquant",
        ),
        (
            "format_version",
            9,
            "checkpoint format version 9 is not supported (this build reads 1); quantize the model again or install "
            "the matching vllm-wkvquant",
        ),
        ("num_bits", 8, "num_bits 8 is not supported; the KV cache has 4 bits"),
        ("head_size", 72, "head size 72 is not supported; supported: [64, 80, 96, 128, 256]"),
        ("key_shift", "odd", "key_shift 'odd' is not one of ['rotating', 'static', 'none']"),
        ("rope", 1, "quantization_config.wkvquant.rope must be an object, got int"),
        ("key_hadamard", "false", "quantization_config.wkvquant.key_hadamard must be true or false, got 'false'"),
        ("value_hadamard", None, "quantization_config.wkvquant.value_hadamard must be true or false, got None"),
        ("num_kv_heads", "4", f"quantization_config.wkvquant.num_kv_heads must be {WHOLE}, got '4'"),
        ("num_kv_heads", 0, f"quantization_config.wkvquant.num_kv_heads must be {WHOLE}, got 0"),
        ("num_hidden_layers", True, f"quantization_config.wkvquant.num_hidden_layers must be {WHOLE}, got True"),
        ("head_size", 64.0, f"quantization_config.wkvquant.head_size must be {WHOLE}, got 64.0"),
        ("key_shift", ["none"], "quantization_config.wkvquant.key_shift must be a string, got ['none']"),
        ("rotary_dim", "64", f"quantization_config.wkvquant.rope.rotary_dim must be {WHOLE}, got '64'"),
        ("inv_freq", None, "quantization_config.wkvquant.rope.inv_freq must be a list of numbers, got None"),
        ("inv_freq", ["1"], "quantization_config.wkvquant.rope.inv_freq must be a list of numbers, got ['1']"),
        ("inv_freq", [True], "quantization_config.wkvquant.rope.inv_freq must be a list of numbers, got [True]"),
        ("attention_scaling", "1", "quantization_config.wkvquant.rope.attention_scaling must be a number, got '1'"),
    ],
)
def test_kv_section(
    key: str, value: object, message: str, inspect_refused: Callable[[Path], str], damaged: Path
) -> None:
    section = json.loads((damaged / "config.json").read_text())["quantization_config"]
    kv = section["wkvquant"]
    (kv["rope"] if key in kv["rope"] else kv)[key] = value
    edit_config(damaged, quantization_config=section)
    assert inspect_refused(damaged) == message


def test_unknown_key_in_the_kv_section(inspect_refused: Callable[[Path], str], damaged: Path) -> None:
    section = json.loads((damaged / "config.json").read_text())["quantization_config"]
    edit_config(damaged, quantization_config={**section, "wkvquant": {**section["wkvquant"], "surprise": 1}})
    assert inspect_refused(damaged).startswith("quantization_config.wkvquant has unknown keys ['surprise']; known: ")


# -- wkvquant eval


def test_baseline_that_is_quantized(eval_refused: Callable[[Path, Path], str], checkpoint: Path, copy: Path) -> None:
    """By us, whose weights transformers does not find, or by others."""
    advice = "give the model with its 16-bit weights"
    assert eval_refused(checkpoint, checkpoint) == f"{checkpoint} is already quantized (wkvquant); {advice}"
    edit_config(copy, quantization_config={"quant_method": "gptq"})
    assert eval_refused(checkpoint, copy) == f"{copy} is already quantized (gptq); {advice}"


def test_baseline_without_all_its_weights(
    eval_refused: Callable[[Path, Path], str], checkpoint: Path, copy: Path
) -> None:
    """transformers draws what is missing."""
    name, file = "model.layers.1.mlp.up_proj.weight", copy / "model.safetensors"
    edit_tensors(copy, lambda tensors: tensors.update({name: torch.zeros(3, 128)}))
    assert eval_refused(checkpoint, copy) == (
        f"{copy}: tensor {name} has shape (3, 128), its config asks for (256, 128)"
    )
    edit_tensors(copy, lambda tensors: tensors.pop(name))
    assert eval_refused(checkpoint, copy) == f"{copy} lacks 1 tensors of its architecture, {name} first"
    file.write_bytes(file.read_bytes()[:1000])
    assert eval_refused(checkpoint, copy).startswith(f"the model in {copy} cannot be loaded: Error while deserializing")
    file.unlink()
    assert eval_refused(checkpoint, copy).startswith(f"the model in {copy} cannot be loaded: Error no file named ")


def test_a_damaged_checkpoint_is_not_evaluated(
    eval_refused: Callable[[Path, Path], str], damaged: Path, model: Path
) -> None:
    """It is refused as by `inspect`, before the model is scored."""
    name = "model.layers.1.mlp.up_proj.weight_shape"
    edit_tensors(damaged, lambda tensors: tensors.update({name: torch.tensor([256])}))
    assert eval_refused(damaged, model) == f"{damaged}: tensor {name} has shape (1,), its config asks for (2,)"
    section = json.loads((damaged / "config.json").read_text())["quantization_config"]
    section["wkvquant"]["num_hidden_layers"] = 1
    edit_config(damaged, quantization_config=section)
    assert eval_refused(damaged, model).startswith(
        "quantization_config.wkvquant says number of layers 1, the model has 2;"
    )
