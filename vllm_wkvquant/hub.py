"""Models by the names that the Hugging Face hub knows them by."""

import re
from collections.abc import Callable
from pathlib import Path

from vllm_wkvquant.config import ConfigError, reason_of

WEIGHTS = "*.safetensors"
OTHERS = ["*.json", "*.jinja", "*.txt", "*.model"]  # config, index, tokenizer
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

    def download(*patterns: str) -> Path:
        try:
            return Path(snapshot_download(name, allow_patterns=[*OTHERS, *patterns], ignore_patterns=UNUSED))
        except Exception as error:  # of the hub, its HTTP library or the file system: they have no common base
            raise ConfigError(
                f"{name} is no directory here and cannot be had from the hub: {reason_of(error)}"
            ) from error

    check(download())
    return download(WEIGHTS)
