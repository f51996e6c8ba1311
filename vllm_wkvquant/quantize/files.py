"""Files that are whole or absent: written beside their place, flushed to the disk, renamed."""

import contextlib
import errno
import fcntl
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from vllm_wkvquant.config import ConfigError

UNNAMED = re.compile(r"\.tmp[0-9A-Za-z]{6}")  # of safetensors, until it renames it; a killed process leaves it


def lock(file: IO[str], what: Path) -> None:
    """Hold an open file, with which goes `what`, until it is closed. Raises ConfigError where another process does."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(f"another process is writing {what}") from error


class WriteError(Exception):
    """A file that could not be written, most often for want of space; `remedy` is what to do before trying again."""

    def __init__(self, path: Path, error: Exception) -> None:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        number = error.errno if isinstance(error, OSError) else None
        if code := re.search(r"\(os error (\d+)\)", reason):  # safetensors' writer is Rust and wraps it in prose
            number = int(code[1])
            reason = os.strerror(number)
        full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        self.remedy = "free some space" if full else "put that right"
        super().__init__(f"cannot write {path}: {reason}")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises WriteError where `path`, or what the system names in it, cannot be written."""
    try:
        yield
    except OSError as error:
        raise WriteError(Path(error.filename or path), error) from error


def sync_directory(path: Path) -> None:
    """Make renames inside a directory durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def commit(temporary: Path, path: Path) -> None:
    """Flush `temporary` to the disk and give it its name."""
    with open(temporary, "rb") as f:
        os.fsync(f.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Raises WriteError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(data)
        commit(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise WriteError(path, error) from error


def write_json(path: Path, data: Any) -> None:
    """Raises WriteError."""
    write_bytes(path, (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode())


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """One safetensors file, without metadata but its format. Raises WriteError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file({n: t.contiguous() for n, t in tensors.items()}, temporary, metadata={"format": "pt"})
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # safetensors' files are the owner's alone; a server is often another user
        commit(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise WriteError(path, error) from error
