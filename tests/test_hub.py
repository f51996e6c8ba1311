"""Models by their names on the hub: from its cache on this machine, and what is refused before a download."""

import json
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects
from models import contents, save_text, tiny_model

from vllm_wkvquant import cli
from vllm_wkvquant.hub import FOLDERS, OTHERS, UNUSED, WEIGHTS, find_model
from vllm_wkvquant.quantize.writer import COPIED, companions

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot of org/tiny in a cache of the hub's, which is offline in all tests."""
    kept = tmp_path / "cache/models--org--tiny"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs/main").write_text(REVISION)
    tiny_model(kept / "snapshots" / REVISION)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return kept / "snapshots" / REVISION


def test_a_model_of_the_hub_is_quantized(hub: Path, tmp_path: Path) -> None:
    text, out = save_text(tmp_path / "calib.txt"), tmp_path / "out"
    options = ["--calib-text", str(text), "--recipe", "rtn", "--samples", "4", "--seq-len", "48"]
    assert cli.main(["quantize", "org/tiny", str(out), *options]) == 0
    assert cli.main(["quantize", str(hub), str(tmp_path / "again"), *options]) == 0
    assert contents(out) == contents(tmp_path / "again")
    evaluation = ["eval", str(out), "--baseline", "org/tiny", "--text", str(text), "--window", "32", "--windows", "2"]
    assert cli.main([*evaluation, "--json"]) == 0


def test_directories_are_taken_as_they_are(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/tiny").mkdir(parents=True)
    for name in ("org/tiny", "no-such", "../no", "/no/such", "a/b/c"):
        assert find_model(Path(name)) == Path(name)


def test_an_unsupported_model_is_refused_before_its_weights(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, download = [], huggingface_hub.snapshot_download

    def recorded(name: str, allow_patterns: list[str], **options: object) -> str:
        asked.append(allow_patterns)
        return download(name, allow_patterns=allow_patterns, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", recorded)
    config = json.loads((hub / "config.json").read_text())
    (hub / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    command = ["quantize", "org/tiny", str(tmp_path / "out"), "--calib-text", str(save_text(tmp_path / "calib.txt"))]
    assert cli.main(command) == 2
    assert "GPT2LMHeadModel" in capsys.readouterr().err
    assert asked == [OTHERS]
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").touch()
    assert cli.main(command) == 2  # an output directory that is not empty costs no download at all
    assert asked == [OTHERS]
    assert find_model(Path("org/tiny")) == hub
    assert asked[1:] == [OTHERS, FOLDERS, [*OTHERS, WEIGHTS]]


def test_what_is_downloaded() -> None:
    """Of Mistral's repositories neither the copy of the weights nor what is in folders."""
    wanted = ["config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json", "tekken.json"]
    others = ["README.md", "consolidated.safetensors", "consolidated-00001-of-00002.safetensors", "original/a.json"]
    assert [
        *filter_repo_objects([*wanted, *others], allow_patterns=[*OTHERS, WEIGHTS], ignore_patterns=UNUSED)
    ] == wanted


def test_all_that_is_copied_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint made by a name on the hub has the files of one made from a copy of the repository."""
    local, snapshot = tmp_path / "local", tmp_path / "snapshot"
    names = ["LICENSE", "LICENSES/MIT.txt", "NOTICE", "tokenizer_config.json", "onnx/tokenizer.json", "README.md"]
    for pattern in COPIED:
        name = pattern.replace("*", "x").replace("[0-9]", "1")
        names += [f"{name}/file"] if name in ("additional_chat_templates", "1_x") else [name]
    for name in names:
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        (local / name).touch()

    def download(_: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / name).touch()
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_model(Path("org/tiny")) == snapshot
    expected = [p.relative_to(local) for p in companions(local)]
    assert len(expected) == len(names) - 2
    assert [p.relative_to(snapshot) for p in companions(snapshot)] == expected
    assert sorted(p for p in snapshot.rglob("*") if p.is_file()) == sorted(companions(snapshot))


def test_an_unknown_name_is_refused(hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (
        ["quantize", "org/other", str(tmp_path / "out"), "--calib-text", "any.txt"],
        ["write-text", "org/other", str(tmp_path / "own.txt")],
    ):
        assert cli.main(command) == 2
        assert "org/other is no directory here and cannot be had from the hub: " in capsys.readouterr().err
