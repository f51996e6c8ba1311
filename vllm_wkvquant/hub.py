"""Models by the names that the Hugging Face hub knows them by."""

import re
from collections.abc import Callable
from pathlib import Path

from vllm_wkvquant.config import ConfigError, reason_of
from vllm_wkvquant.quantize.writer import COPIED

WEIGHTS = "*.safetensors"
OTHERS = ["*.json", "*.jinja", "*.txt", *COPIED]  # config, index, tokenizer and what else a checkpoint has, too
FOLDERS = [f"{pattern}/*" for pattern in COPIED]  # whose files are copied, too
UNUSED = ["*/*", "consolidated*.safetensors"]  # Mistral's own format: the same weights again


def find_model(model: Path, check: Callable[[Path], object] = lambda folder: None) -> Path:
    """A model's directory: `model`, or where the hub's model of this name is kept, downloaded if need be.

    check: called with the directory when all but the weights is there, to refuse the model before they are loaded.
    Raises ConfigError where there is neither, and what `check` raises.
    """
    name = str(model)
    if model.exists() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return model
    from huggingface_hub import snapshot_download

    def download(patterns: list[str], unused: list[str]) -> Path:
        try:
            return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=unused))
        except Exception as error:  # of the hub, its HTTP library or the file system: they have no common base
            raise ConfigError(
                f"{name} is no directory here and cannot be had from the hub: {reason_of(error)}"
            ) from error

    check(download(OTHERS, UNUSED))
    download(FOLDERS, [])
    return download([*OTHERS, WEIGHTS], UNUSED)
