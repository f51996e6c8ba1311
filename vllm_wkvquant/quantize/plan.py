"""What `wkvquant quantize` was asked for, and everything that can be checked before long work."""

import hashlib
import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers

import vllm_wkvquant
from vllm_wkvquant.config import ConfigError, KVCacheConfig
from vllm_wkvquant.device import check_device
from vllm_wkvquant.quantize.adapters import ModelAdapter
from vllm_wkvquant.quantize.attention import ATTENTION, CalibrationAttention
from vllm_wkvquant.quantize.calibration import SKIPPED, Windows, held_out_of, read_windows, samples_for
from vllm_wkvquant.quantize.recipes import DEFAULT, Recipe, find_recipe
from vllm_wkvquant.quantize.state import check_output, held_bytes
from vllm_wkvquant.quantize.workers import ALONE, Workers
from vllm_wkvquant.quantize.writer import check_companions

DEFAULT_SEQ_LEN = 2048


@dataclass(frozen=True)
class Settings:
    """Arguments of `wkvquant quantize`.

    recipe: its name, or a recipe that has none there. own_text: what the model wrote, of which own_samples windows come
    to those of calib_text. seq_len None: 2048, or fewer where the model has fewer positions.
    memory_budget: bytes of the device's memory, None for what is free. dry_run: estimate, and do nothing. workers:
    processes that share the windows; ray: address of the Ray cluster that they are on, "local" for one on this host,
    None for processes of this host.
    """

    model: Path
    out: Path
    calib_text: Path
    recipe: str | Recipe = DEFAULT
    samples: int = 32
    seq_len: int | None = None
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    shard_size: int = 5 * 10**9
    resume: bool = False
    memory_budget: int | None = None
    dry_run: bool = False
    workers: int = 1
    ray: str | None = None
    own_text: Path | None = None
    own_samples: int = 0


@dataclass(frozen=True)
class Storage:
    """Devices of what is kept between its uses.

    hidden: of all runs' hidden states; targets: of those after each follower, which outputs are compared with;
    captured: of a block's queries, keys and values.
    """

    hidden: str = "cpu"
    targets: str = "cpu"
    captured: str = "cpu"


@dataclass(frozen=True)
class Plan:
    """A run that has passed every check, as one of its workers sees it.

    windows: this worker's; all_windows: of all workers. left_out: what the recipe that was asked for has beyond this
    one, for want of memory, in words (estimate.py, `place`).
    """

    settings: Settings
    recipe: Recipe
    adapter: ModelAdapter
    attention: CalibrationAttention
    windows: Windows
    all_windows: Windows
    kv: KVCacheConfig
    workers: Workers = ALONE
    storage: Storage = Storage()
    left_out: str = ""


def check_arguments(recipe: str | Recipe, samples: int, device: str, seed: int = 0) -> Recipe:
    """What can be refused without the model. Raises ConfigError."""
    found = recipe if isinstance(recipe, Recipe) else find_recipe(recipe)
    check_device(device)
    if samples < 4:
        raise ConfigError(f"--samples {samples} is too few: at least 4, of which 2 are held out")
    check_seed(seed)
    return found


def check_seed(seed: int) -> None:
    """Raise ConfigError for what torch's generators do not take."""
    if not 0 <= seed < 2**63:
        raise ConfigError(f"--seed {seed} is outside 0 .. 2^63 - 1")


def check_workers(workers: int, windows: int) -> None:
    """Raise ConfigError unless each of so many workers has one of the windows that are held out."""
    if workers < 1:
        raise ConfigError(f"--workers {workers} is less than one")
    held_out = held_out_of(windows)
    if held_out < workers:
        raise ConfigError(
            f"--workers {workers} is more than the {held_out} windows that are held out; raise --samples to "
            f"{samples_for(workers)}, or use fewer"
        )


def window_length(seq_len: int | None, limit: int) -> int:
    """--seq-len or its default, for a model with `limit` positions. Raises ConfigError."""
    length = min(DEFAULT_SEQ_LEN, limit) if seq_len is None else seq_len
    if not 2 * SKIPPED <= length <= limit:
        raise ConfigError(f"--seq-len {length} is outside {2 * SKIPPED} .. {limit}, the positions that the model knows")
    return length


def opened(settings: Settings) -> tuple[CalibrationAttention, ModelAdapter, int]:
    """The model, whose attention it first replaces, and the tokens of a window. Raises ConfigError."""
    attention = CalibrationAttention()
    adapter = ModelAdapter(settings.model, ATTENTION)
    return attention, adapter, window_length(settings.seq_len, int(adapter.config.max_position_embeddings))


def preflight(settings: Settings, workers: Workers = ALONE) -> Plan:
    """Everything that can be refused before long work. Raises ConfigError."""
    recipe = check_arguments(settings.recipe, settings.samples, settings.device, settings.seed)
    check_workers(workers.size, settings.samples + settings.own_samples)
    if ":" in settings.device:  # graphs and Triton's kernels run on the current GPU
        torch.cuda.set_device(settings.device)
    if workers.rank == 0:  # who writes
        check_output(settings.out, settings.resume)
    attention, adapter, seq_len = opened(settings)
    own = settings.own_text, settings.own_samples
    windows = read_windows(settings.model, settings.calib_text, settings.samples, seq_len, settings.seed, *own)
    return plan_of(settings, recipe, adapter, attention, windows, workers)


def preflight_without_text(settings: Settings) -> Plan:
    """The same before the model has written its text, with windows that have no values. Raises ConfigError.

    calib_text of `settings` is the text that is given, where own_samples come to it.
    """
    recipe = check_arguments(settings.recipe, settings.samples, settings.device, settings.seed)
    attention, adapter, seq_len = opened(settings)
    if settings.own_samples:
        read_windows(settings.model, settings.calib_text, settings.samples, seq_len, settings.seed)
    count = settings.samples + settings.own_samples
    windows = Windows(torch.empty(count, seq_len, device="meta"), held_out_of(count), [], torch.empty(0))
    return plan_of(settings, recipe, adapter, attention, windows)


def plan_of(
    settings: Settings,
    recipe: Recipe,
    adapter: ModelAdapter,
    attention: CalibrationAttention,
    windows: Windows,
    workers: Workers = ALONE,
) -> Plan:
    """A plan with all `windows`, once the disk and the model's outer tensors are found fit. Raises ConfigError."""
    recipe = recipe.of(windows.statistics)
    kv_config = KVCacheConfig(
        head_size=adapter.head_size,
        num_kv_heads=adapter.num_kv_heads,
        num_hidden_layers=adapter.num_layers,
        key_shift=recipe.key_shift,
        key_hadamard=recipe.key_hadamard,
        value_hadamard=recipe.value_hadamard,
        rope=adapter.rope,
    )
    plan = Plan(settings, recipe, adapter, attention, windows.share(workers), windows, kv_config, workers)
    if workers.rank == 0:
        check_disk(plan)
        check_companions(settings.model)
        adapter.check_outer()
    return plan


def packed_bytes(adapter: ModelAdapter) -> int:
    """All blocks: 4-bit codes with a 16-bit scale and a zero point per group of at least 32."""
    block = adapter.numel(adapter.block_names(0)) * adapter.num_layers
    return int(block * (0.5 + 2.5 / min(adapter.group_sizes.values())))


def itemsize(plan: Plan) -> int:
    """Bytes of an element of the calibration's type."""
    return getattr(torch, plan.settings.dtype).itemsize


def check_disk(plan: Plan) -> None:
    """Raise ConfigError unless the file system has room for the checkpoint and the state of the run, beside what an
    interrupted run has there already."""
    adapter, windows = plan.adapter, plan.all_windows
    checkpoint = 2 * packed_bytes(adapter) + 2 * adapter.numel(adapter.outer_names())  # blocks as state and as shards
    runs = windows.tokens.shape[0] * (2 if plan.recipe.learning else 1)
    runs += windows.held_out * len(plan.recipe.candidates)
    # one state of them is written before the last one is deleted
    hidden = 2 * itemsize(plan) * runs * windows.tokens.shape[1] * adapter.config.hidden_size
    needed = checkpoint + hidden - held_bytes(plan.settings.out)
    existing = next(p for p in (plan.settings.out.absolute(), *plan.settings.out.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ConfigError(
            f"{existing} has {free / 1e9:.2g} GB free, this run needs about {needed / 1e9:.2g} GB; "
            f"free some space, choose another output directory, or lower --samples or --seq-len"
        )


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def asked_for(settings: Settings, recipe: Recipe, adapter: ModelAdapter, seq_len: int) -> dict[str, Any]:
    """The part of `fingerprint` that is neither of the packages nor of the text."""
    return {
        "recipe": recipe.name,
        "samples": settings.samples,
        "own_samples": settings.own_samples,
        "seq_len": seq_len,
        "seed": settings.seed,
        "workers": settings.workers,
        "device": settings.device,
        "dtype": settings.dtype,
        "config.json": _digest(settings.model / "config.json"),
        "weight files": adapter.tensors.digest(),
    }


def of_tokens(windows: Windows) -> dict[str, Any]:
    """The part of `fingerprint` that is of the text."""
    return {"calibration tokens": hashlib.sha256(windows.tokens.numpy().tobytes()).hexdigest()[:16]}


def fingerprint(plan: Plan) -> dict[str, Any]:
    """What the bytes of the result depend on, but for what is left out of the recipe; a resumed run must agree with the
    interrupted one in all of it. plan: as it was asked for, before `place`."""
    parts = [field.name for field in fields(plan.recipe) if field.name not in ("name", "summary")]
    return {
        "version": vllm_wkvquant.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **asked_for(plan.settings, plan.recipe, plan.adapter, plan.windows.tokens.shape[1]),
        **{f"recipe.{part}": repr(getattr(plan.recipe, part)) for part in parts},
        **of_tokens(plan.all_windows),
    }


def asked_again(settings: Settings) -> dict[str, Any]:
    """The part of `fingerprint` that is asked for, to compare a finished run with. Raises ConfigError.

    calib_text of `settings` may be Path(). Text that the model has written is not looked at: it may be gone by now.
    """
    recipe = check_arguments(settings.recipe, settings.samples, settings.device, settings.seed)
    _, adapter, seq_len = opened(settings)
    asked = asked_for(settings, recipe, adapter, seq_len)
    if settings.own_samples or settings.calib_text == Path():
        return asked
    windows = read_windows(settings.model, settings.calib_text, settings.samples, seq_len, settings.seed)
    return {**asked, **of_tokens(windows)}
