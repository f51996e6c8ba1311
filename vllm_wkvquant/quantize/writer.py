"""The checkpoint directory: safetensors shards with their index, config, report, and the model's tokenizer files."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from vllm_wkvquant.checkpoint import INDEX_FILE
from vllm_wkvquant.config import ConfigError
from vllm_wkvquant.quantize.files import sync_directory, write_bytes, write_json, write_tensors, writing

REPORT_FILE = "wkvquant.json"
PAGE_FILE = "report.html"
COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "generation_config.json",
    "chat_template*",
    "additional_chat_templates",
    "modules.json",  # with the next three what sentence-transformers makes of hidden states
    "config_sentence_transformers.json",
    "sentence_*_config.json",
    "[0-9]_*",
    "LICENSE*",
    "NOTICE*",
)


def companions(model: Path) -> list[Path]:
    """Files of a model that its checkpoint has, too: tokenizer, generation settings, pooling and licences."""
    files = []
    for source in sorted({path for pattern in COPIED for path in model.glob(pattern)}):
        files += [source] if source.is_file() else sorted(p for p in source.rglob("*") if p.is_file())
    return files


def check_companions(model: Path) -> None:
    """Raise ConfigError where one of them cannot be read."""
    for file in companions(model):
        try:
            file.open("rb").close()
        except OSError as error:
            raise ConfigError(f"{file} cannot be copied to the checkpoint: {error.strerror}") from error


def without_code(data: bytes) -> bytes:
    """A JSON file without `auto_map`, whose Python files a checkpoint does not have; as it is where it has none."""
    try:
        content = json.loads(data)
    except ValueError:
        return data
    if not isinstance(content, dict) or "auto_map" not in content:
        return data
    del content["auto_map"]
    return (json.dumps(content, indent=2) + "\n").encode()


def copy_companions(model: Path, directory: Path) -> None:
    """Copy `companions`, the tokenizer's config as `without_code`. Raises WriteError."""
    for file in companions(model):
        target = directory / file.relative_to(model)
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            data = file.read_bytes()
        write_bytes(target, without_code(data) if file.name == "tokenizer_config.json" else data)


class CheckpointWriter:
    """Writes one checkpoint into `directory`, which nobody reads until `close` has renamed it to `destination`.

    At most `shard_size` bytes of tensors are held; a tensor is never split, so a larger one makes a larger shard.
    """

    def __init__(self, directory: Path, destination: Path, shard_size: int) -> None:
        """Raises WriteError, as the others do."""
        self.directory, self.destination, self.shard_size = directory, destination, shard_size
        with writing(directory):
            if directory.exists():
                shutil.rmtree(directory)
            directory.mkdir()
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._total_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        """Append tensors, in this order."""
        for name, tensor in tensors.items():
            size = tensor.numel() * tensor.element_size()
            if self._pending and self._pending_bytes + size > self.shard_size:
                self._flush()
            self._pending[name] = tensor
            self._pending_bytes += size
            self._total_bytes += size

    def _shard(self, number: int) -> Path:
        return self.directory / f"shard-{number:05d}"

    def _flush(self) -> None:
        self._shards.append(list(self._pending))
        write_tensors(self._shard(len(self._shards)), self._pending)
        self._pending, self._pending_bytes = {}, 0

    def close(self, model: Path, config: dict[str, Any], report: dict[str, Any], page: str) -> None:
        """Name the shards, write everything else, and make the directory appear at its destination."""
        self._flush()
        count = len(self._shards)
        weight_map = {}
        for i, names in enumerate(self._shards, 1):
            file = f"model-{i:05d}-of-{count:05d}.safetensors"
            with writing(self._shard(i)):
                self._shard(i).rename(self.directory / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_bytes(self.directory / INDEX_FILE, (json.dumps(index, indent=2) + "\n").encode())
        write_json(self.directory / "config.json", config)
        write_json(self.directory / REPORT_FILE, report)
        write_bytes(self.directory / PAGE_FILE, page.encode())
        copy_companions(model, self.directory)
        with writing(self.destination):
            sync_directory(self.directory)
            self.directory.replace(self.destination)  # an empty directory there gives way
            sync_directory(self.destination.parent)
