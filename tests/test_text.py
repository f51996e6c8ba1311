"""text.py: files as tokens, in pieces."""

import tracemalloc
from pathlib import Path

import pytest
from models import save_text, tiny_model
from transformers import AutoTokenizer

from vllm_wkvquant import cli, text
from vllm_wkvquant.text import load_tokenizer, pieces_of, read_tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), num_layers=1)


def test_pieces_end_at_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not within blank or before indented lines, if there is another one; a text that is hardly longer is one piece."""
    monkeypatch.setattr(text, "PIECE", 4)
    monkeypatch.setattr(text, "SLACK", 12)
    for content in ("", "abcd", "abcdefghij", "abcde\n fgh i"):
        assert [*pieces_of(content)] == ([content] if content else [])
    content = "ab\ncdef\n\n\n  g\nh\n12345\n\n"
    assert [*pieces_of(content)] == ["ab\ncdef\n\n\n  g\n", "h\n12345\n\n"]


@pytest.mark.parametrize(
    ("content", "begin"),
    [
        (" = a title = \n \n text of a line . \n" * 99, " "),  # WikiText
        ("\n" * 999, "\n"),
        ("words of one line " * 99, " "),  # text8
        ("x" * 999, "x"),
    ],
)
def test_pieces_are_bounded(content: str, begin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no line is a good one to begin with: they end before some line, else before a space, else anywhere."""
    monkeypatch.setattr(text, "PIECE", 100)
    monkeypatch.setattr(text, "SLACK", 40)
    pieces = [*pieces_of(content)]
    assert "".join(pieces) == content
    assert max(map(len, pieces)) <= 140
    assert min(map(len, pieces[:-1])) >= 100
    assert all(piece.startswith(begin) for piece in pieces[1:])
    assert all(piece.endswith("\n") for piece in pieces[:-1]) == ("\n" in content)


def test_pieces_have_nearly_the_tokens_of_the_whole(smollm2, monkeypatch: pytest.MonkeyPatch) -> None:
    content, tokenizer = smollm2.test_text.read_text(), load_tokenizer(smollm2.path)
    whole = tokenizer(content, add_special_tokens=False)["input_ids"]
    assert [*read_tokens(smollm2.path, smollm2.test_text, "text")[0]] == whole
    monkeypatch.setattr(text, "PIECE", 10_000)
    pieces = len([*pieces_of(content)])
    assert pieces > 10
    found = [*read_tokens(smollm2.path, smollm2.test_text, "text")[0]]
    assert tokenizer.decode(found) == tokenizer.decode(whole) == content
    assert abs(len(found) - len(whole)) <= pieces  # of spaces before the end of a line


def test_memory_of_tokens(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four bytes each, beside the text's own and a piece's."""
    monkeypatch.setattr(text, "PIECE", 1000)
    content = "\n".join(["abcdefghi"] * 20_000)
    file = tmp_path / "text.txt"
    file.write_text(content)
    read_tokens(model, file, "text")  # imports
    tracemalloc.start()
    ids, _ = read_tokens(model, file, "text")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(ids) == len(content)
    assert peak < 12 * len(content)


def test_a_token_that_the_model_does_not_have(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only where the text has it."""
    more, file = tmp_path / "more", save_text(tmp_path / "text.txt")
    more.mkdir()
    for part in model.iterdir():
        (more / part.name).write_bytes(part.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(more)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(more)
    options = ["--samples", "4", "--seq-len", "32", "--recipe", "rtn"]
    assert cli.main(["quantize", str(more), str(tmp_path / "fine"), "--calib-text", str(file), *options]) == 0
    file.write_text(f"<extra>{file.read_text()}")
    reason = f"has the token '<extra>', number 256, and {more} embeddings of 256; enlarge its embedding"
    assert cli.main(["quantize", str(more), str(tmp_path / "out"), "--calib-text", str(file), *options]) == 2
    assert f"error: calibration text {file} {reason}" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))
    command = ["eval", str(tmp_path / "fine"), "--baseline", str(more), "--text", str(file), "--window", "32"]
    assert cli.main(command) == 2
    assert f"error: text {file} {reason}" in capsys.readouterr().err


def test_special_tokens_that_are_spelled_out(smollm2, tmp_path: Path) -> None:
    """They are tokens of the text, which gets no others."""
    (tmp_path / "text.txt").write_text("a <|im_start|> b")
    ids, _ = read_tokens(smollm2.path, tmp_path / "text.txt", "text")
    special = set(load_tokenizer(smollm2.path).all_special_ids)
    assert [i in special for i in ids] == [False, False, True, False]
