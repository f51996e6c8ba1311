"""The checkpoint on disk (docs/format.md): names, `quantization_config`, and a reader that validates.

Weights are compressed-tensors `pack-quantized` (asymmetric uint4 in groups along the input), written by
`quantize/writer.py`; KV parameters are five fp32 tensors [num_kv_heads, head_size] per layer.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vllm_wkvquant.config import ConfigError, KVCacheConfig
from vllm_wkvquant.geometry import (
    KV_PARAMS,
    KV_PREFIX,
    Geometry,
    check_biases,
    check_served,
    group_sizes,
    kv_tensor_name,
    stored_tensors,
)
from vllm_wkvquant.reference import KVParams

QUANT_METHOD = "wkvquant"
INDEX_FILE = "model.safetensors.index.json"
SAMPLES, SAMPLE_BYTES = 64, 4096  # of a file of weights, to know it by: to read all of it takes minutes


def check_kv_tensor(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raise ConfigError unless `tensor` has this shape, is finite and, for a smoothing factor, positive."""
    if tuple(tensor.shape) != shape:
        raise ConfigError(f"KV tensor {name} has shape {tuple(tensor.shape)}, expected {shape}")
    if not bool(torch.isfinite(tensor).all()):
        raise ConfigError(f"KV tensor {name} contains NaN or infinity; the checkpoint is damaged, quantize again")
    if name.endswith("k_smooth") and not bool((tensor > 0).all()):
        raise ConfigError(f"KV tensor {name} must be positive everywhere")


def missing_kv_tensor(name: str) -> ConfigError:
    """The error for a KV tensor that the checkpoint lacks."""
    return ConfigError(f"KV tensor {name} is missing from the checkpoint; quantize the model again")


def config_groups(group_sizes: dict[str, int]) -> dict[str, Any]:
    """compressed-tensors' `config_groups`: one per distinct weight group size.

    group_sizes: linear layer's last name ("down_proj") -> its group size.
    """
    groups = {}
    for i, size in enumerate(sorted(set(group_sizes.values()), reverse=True)):
        names = "|".join(sorted(n for n, s in group_sizes.items() if s == size))
        groups[f"group_{i}"] = {
            "targets": [f"re:.*\\.({names})$"],
            "format": "pack-quantized",
            "input_activations": None,
            "output_activations": None,
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": False,
                "strategy": "group",
                "group_size": size,
                "actorder": None,
                "dynamic": False,
            },
        }
    return groups


def quantization_config(kv: KVCacheConfig, group_sizes: dict[str, int]) -> dict[str, Any]:
    """`quantization_config` of config.json. group_sizes: of `config_groups`."""
    return {
        "quant_method": QUANT_METHOD,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": config_groups(group_sizes),
        "kv_cache_scheme": None,
        QUANT_METHOD: kv.to_dict(),
    }


def pack_weight(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> dict[str, torch.Tensor]:
    """compressed-tensors' tensors of one linear layer, by suffix.

    codes: uint8 [out, in] in 0..15; scale: [out, in / group]; zero_point: uint8 [out, in / group] in 0..15.
    """
    # here and below: it takes seconds, which who reads no weights need not wait
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    return {
        "weight_packed": pack_to_int32((codes.to(torch.int8) - 8), 4),
        "weight_scale": scale.contiguous(),
        "weight_zero_point": pack_to_int32((zero_point.to(torch.int8) - 8), 4, packed_dim=0).contiguous(),
        "weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
    }


def unpack_codes(tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [out, in / group, group] and zero points int8 [out, in / group], 0..15, of `pack_weight`'s tensors."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    shape = torch.Size(tensors["weight_shape"].tolist())
    of_groups = torch.Size(tensors["weight_scale"].shape)
    codes = unpack_from_int32(tensors["weight_packed"], 4, shape) + 8
    zero = unpack_from_int32(tensors["weight_zero_point"], 4, of_groups, packed_dim=0) + 8
    return codes.view(*of_groups, -1), zero


def unpack_weight(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Dequantized weight fp32 [out, in] from `pack_weight`'s tensors: scale * (code - zero_point)."""
    codes, zero = unpack_codes(tensors)
    return ((codes - zero[..., None]).float() * tensors["weight_scale"].float()[..., None]).flatten(1)


class ShardedTensors:
    """Read access by name to the safetensors files of a Hugging Face checkpoint directory, sharded or not.

    Raises ConfigError where the directory, its files or a tensor are missing or unreadable.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise ConfigError(f"{path} is not a directory; give the path of a local Hugging Face checkpoint")
        index = path / INDEX_FILE
        if index.is_file():
            self.files: dict[str, str] = read_object(index).get("weight_map", {})
            if not isinstance(self.files, dict) or not all(isinstance(f, str) for f in self.files.values()):
                raise ConfigError(f"{index}: weight_map must be an object of file names")
        elif (path / "model.safetensors").is_file():
            with self._open("model.safetensors") as f:
                self.files = dict.fromkeys(f.keys(), "model.safetensors")
        else:
            other = "; convert its *.bin files to safetensors" if any(path.glob("*.bin")) else ""
            raise ConfigError(f"{path} has neither {INDEX_FILE} nor model.safetensors{other}")
        absent = sorted(f for f in set(self.files.values()) if not (path / f).is_file())
        if absent:
            raise ConfigError(f"{path} lacks the shards {absent} that its index names")
        self._stats_at_first = {file: self._stat(file) for file in sorted(set(self.files.values()))}

    @contextlib.contextmanager
    def _open(self, file: str) -> Iterator[Any]:
        try:
            (self.path / file).open("rb").close()  # which says more of what it cannot open
            with safe_open(self.path / file, framework="pt") as f:
                yield f
        except SafetensorError as error:
            raise ConfigError(f"{self.path / file} is not a readable safetensors file: {error}") from error
        except OSError as error:
            raise ConfigError(f"{self.path / file} cannot be read: {error.strerror or error}") from error

    def _stat(self, file: str) -> tuple[int, int] | None:
        try:
            stat = (self.path / file).stat()
        except OSError:
            return None
        return stat.st_size, stat.st_mtime_ns

    def check_unchanged(self) -> None:
        """Raise ConfigError where a file is gone, or has another size or time of change than it had at first."""
        for file, before in self._stats_at_first.items():
            if self._stat(file) != before:
                if self._stat(file) is None:
                    lost = "cannot be read any more; put it back and go on with --resume"
                    raise ConfigError(f"{self.path / file} {lost}")
                raise ConfigError(
                    f"{self.path / file} has changed since this run began, and what comes of it would be a mixture; "
                    f"start again with a new output directory"
                )

    def digest(self) -> str:
        """Of the files' names, sizes, times of change and samples: other weights have another."""
        named = [(file, stat, self._sample(file)) for file, stat in self._stats_at_first.items()]
        return hashlib.sha256(repr(named).encode()).hexdigest()[:16]

    def _sample(self, file: str) -> str:
        """SHA-256 of a file's header and of SAMPLES blocks that are evenly spaced over its tensors."""
        with (self.path / file).open("rb") as f:
            size = f.seek(0, os.SEEK_END)
            f.seek(0)
            begin = min(size, 8 + int.from_bytes(f.read(8), "little"))
            f.seek(0)
            digest = hashlib.sha256(f.read(begin))
            for i in range(SAMPLES):
                f.seek(begin + max(0, size - begin - SAMPLE_BYTES) * i // (SAMPLES - 1))
                digest.update(f.read(SAMPLE_BYTES))
        return digest.hexdigest()

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self.files)

    def headers(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type, as safetensors calls it, and shape of every tensor, from the headers of the files alone."""
        out = {}
        for file in sorted(set(self.files.values())):
            with self._open(file) as f:
                stored = set(f.keys())
                for name in (n for n, place in self.files.items() if place == file):
                    if name not in stored:
                        raise ConfigError(f"{self.path / file} lacks the tensor {name} that the index places there")
                    part = f.get_slice(name)
                    out[name] = part.get_dtype(), tuple(part.get_shape())
        return out

    def get(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Load tensors by name, opening each shard once."""
        by_file: dict[str, list[str]] = {}
        for name in names:
            if name not in self.files:
                raise ConfigError(f"{self.path} has no tensor {name}")
            by_file.setdefault(self.files[name], []).append(name)
        out = {}
        for file, members in by_file.items():
            with self._open(file) as f:
                for name in members:
                    out[name] = f.get_tensor(name)
        return out


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a checkpoint directory. Raises ConfigError."""
    file = Path(path) / "config.json"
    if not file.is_file():
        if Path(path).is_file():
            raise ConfigError(f"{path} is a file; give the directory that it is in")
        raise ConfigError(f"{path} has no config.json; give the path of a local Hugging Face checkpoint")
    return read_object(file)


def quant_method(config: dict[str, Any]) -> Any:
    """What a config.json says that its weights are quantized by; None where it says nothing."""
    section = config.get("quantization_config") or {}
    return section.get("quant_method") if isinstance(section, dict) else section


def check_plain(path: Path, config: dict[str, Any]) -> None:
    """Raise ConfigError where the model of this config.json is a quantized one."""
    if config.get("quantization_config"):
        raise ConfigError(
            f"{path} is already quantized ({quant_method(config)}); give the model with its 16-bit weights"
        )


def kv_elements(config: dict[str, Any]) -> int:
    """Elements of K and V that a token has in all layers of a model with this config.json."""
    heads = config["num_attention_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    return 2 * int(config["num_hidden_layers"] * (config.get("num_key_value_heads") or heads) * head_size)


def read_object(file: Path) -> dict[str, Any]:
    """A JSON file with an object. Raises ConfigError."""
    try:
        data = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON: {error}") from error
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{file} must be an object, got {type(data).__name__}")
    return data


class Checkpoint:
    """A wkvquant checkpoint: config, dequantized weights and validated KV parameters.

    group_sizes: columns that share a scale, by a linear layer's path in its block.
    """

    def __init__(self, path: str | Path) -> None:
        """Raises ConfigError unless config.json with its sections and the tensors' headers are of one model."""
        self.path = Path(path)
        self.config = read_config(self.path)
        method = quant_method(self.config)
        if method != QUANT_METHOD or not isinstance(self.config["quantization_config"], dict):
            raise ConfigError(f"{path} is not a wkvquant checkpoint (quant_method {method!r})")
        self.kv = KVCacheConfig.from_dict(self.config["quantization_config"].get(QUANT_METHOD))
        self.geometry = Geometry.of(self.config)
        check_biases(self.config)
        check_served(self.config)
        self.kv.check_model(self.geometry.head_size, self.geometry.kv_heads, self.geometry.layers)
        of_weights = next(iter(config_groups({"": 1}).values()))["weights"]
        del of_weights["group_size"]
        self.group_sizes = group_sizes(self.config["quantization_config"], self.geometry, of_weights)
        self.tensors = ShardedTensors(self.path)
        self._check_tensors()

    def _check_tensors(self) -> None:
        expected, found = stored_tensors(self.config, self.kv, self.group_sizes), self.tensors.headers()
        again = "quantize the model again"
        if absent := sorted(set(expected) - set(found)):
            raise ConfigError(f"{self.path} lacks {len(absent)} tensors, {absent[0]} first; {again}")
        if unknown := sorted(set(found) - set(expected)):
            raise ConfigError(
                f"{self.path} has {len(unknown)} tensors that its config does not ask for, {unknown[0]} first; {again}"
            )
        for name, (types, shape) in expected.items():
            dtype, stored = found[name]
            if stored != shape:
                raise ConfigError(f"{self.path}: tensor {name} has shape {stored}, its config asks for {shape}")
            if dtype not in types:
                raise ConfigError(f"{self.path}: tensor {name} is of type {dtype}, must be {' or '.join(types)}")
        linears = self.geometry.linears()
        said = self.tensors.get([name for name in expected if name.endswith(".weight_shape")])
        for name, value in said.items():
            asked = linears[".".join(name.split(".")[3:5])]
            if tuple(value.tolist()) != asked:
                raise ConfigError(f"{self.path}: tensor {name} says {value.tolist()}, its config asks for {[*asked]}")

    def kv_tensors(self, layer: int) -> dict[str, torch.Tensor]:
        """fp32 [num_kv_heads, head_size] by parameter name; raises ConfigError on a damaged one."""
        shape = (self.kv.num_kv_heads, self.kv.head_size)
        out = {}
        for param in KV_PARAMS:
            name = kv_tensor_name(layer, param)
            out[param] = self.tensors.get([name])[name]
            check_kv_tensor(name, out[param], shape)
        return out

    def kv_params(self, layer: int) -> KVParams:
        """KVParams of one layer, on the CPU."""
        return KVParams.build(self.kv, **self.kv_tensors(layer))

    def weight_names(self) -> Iterator[tuple[str, bool]]:
        """(Hugging Face parameter name, quantized?) of every model weight; KV tensors are left out."""
        for name in self.tensors.names():
            if name.endswith(".weight_packed"):
                yield name.removesuffix("_packed"), True
            elif not name.endswith((".weight_scale", ".weight_zero_point", ".weight_shape")) and (
                f".{KV_PREFIX}" not in name
            ):
                yield name, False

    def weight(self, name: str, quantized: bool) -> torch.Tensor:
        """One model weight; a quantized one is dequantized to fp32."""
        if not quantized:
            return self.tensors.get([name])[name]
        suffixes = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
        base = name.removesuffix("weight")
        loaded = self.tensors.get([base + s for s in suffixes])
        return unpack_weight({s: loaded[base + s] for s in suffixes})
