"""benchmarks/texts.py: what is in the texts; the package of conversations is stood in for."""

import platform
import zipfile
from pathlib import Path

import pytest
import texts

from vllm_wkvquant.config import ConfigError


def test_python_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By path, without tests and packages, cut where asked."""
    library = tmp_path / "lib"
    for name in ("b.py", "a/z.py", "a/b.txt", "test/t.py", "a/tests/t.py", "site-packages/p/p.py"):
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(f"# {name}\n")
    monkeypatch.setattr(texts.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    whole = f"# Python {platform.python_version()}\n# a/z.py\n# b.py\n"
    for length in (len(whole), 30):
        texts.write_stdlib(tmp_path / "out.txt", length)
        assert (tmp_path / "out.txt").read_text() == whole[:length]
    with pytest.raises(ConfigError, match="has only"):
        texts.write_stdlib(tmp_path / "out.txt", len(whole) + 1)


def test_dialogue(tmp_path: Path) -> None:
    """Conversations once each, in the order of the files."""
    wheel = tmp_path / "corpus.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("chatterbot_corpus/data/english/b.yml", "conversations:\n- - third\n  - fourth\n  - fifth\n")
        archive.writestr(
            "chatterbot_corpus/data/english/a.yml", "conversations:\n- &x\n  - one\n  - |\n    two\n- *x\n"
        )
        archive.writestr("chatterbot_corpus/data/english/coding.yml", "conversations:\n- - code\n")
        archive.writestr("chatterbot_corpus/data/german/a.yml", "conversations:\n- - eins\n")
    texts.write_dialogue(tmp_path / "out.txt", wheel)
    assert (tmp_path / "out.txt").read_text() == "A: one\nB: two\n\nA: third\nB: fourth\nA: fifth\n"
