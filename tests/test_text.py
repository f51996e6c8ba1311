"""text.py: files as tokens, in pieces."""

import tracemalloc
from pathlib import Path

import pytest
from models import tiny_model

from vllm_wkvquant import text
from vllm_wkvquant.text import load_tokenizer, pieces_of, read_tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), num_layers=1)


def test_pieces_end_at_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not within blank or before indented lines; a text that is no longer than a piece, and one of one line, is one."""
    monkeypatch.setattr(text, "PIECE", 4)
    for content in ("", "abcd", "abcdefghij"):
        assert [*pieces_of(content)] == ([content] if content else [])
    content = "ab\ncdef\n\n\n  g\nh\n12345\n\n"
    assert [*pieces_of(content)] == ["ab\ncdef\n\n\n  g\n", "h\n12345\n\n"]


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


def test_special_tokens_that_are_spelled_out(smollm2, tmp_path: Path) -> None:
    """They are tokens of the text, which gets no others."""
    (tmp_path / "text.txt").write_text("a <|im_start|> b")
    ids, _ = read_tokens(smollm2.path, tmp_path / "text.txt", "text")
    special = set(load_tokenizer(smollm2.path).all_special_ids)
    assert [i in special for i in ids] == [False, False, True, False]
