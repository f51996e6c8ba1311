"""What a run will take, before it begins: FLOP and memory counted from the model and the recipe, time from a rehearsal.

The rehearsal is the first block with a few windows and one learning step. A part of the work takes as long in the run
as it took there, times its FLOP in the run over its FLOP there: so each part goes at its own measured rate.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from vllm_wkvquant.config import ConfigError
from vllm_wkvquant.quantize import kv
from vllm_wkvquant.quantize.blocks import first_hidden, quantize_block
from vllm_wkvquant.quantize.calibration import FIRST_TOKENS
from vllm_wkvquant.quantize.head import LOGIT_ROWS
from vllm_wkvquant.quantize.learn import replays, together
from vllm_wkvquant.quantize.plan import Plan, Storage, itemsize, packed_bytes
from vllm_wkvquant.quantize.recipes import NEEDED, Recipe
from vllm_wkvquant.quantize.runner import Ahead
from vllm_wkvquant.quantize.storage import free_bytes, pinned_bytes

logger = logging.getLogger("vllm.wkvquant")

FIXED = ("load", "clips", "round")  # parts of a block's work that take the same time for any number of windows


@dataclass(frozen=True)
class Estimate:
    """What a run takes.

    flop: of all matrix products, of all workers. seconds: without reading and writing files, and without what workers
    tell each other but in the rehearsal. rate: FLOP a second of a block's forward pass in the rehearsal. device_bytes,
    host_bytes: peaks of what worker 0 holds on its device and on the host, where the CPU is no device; Python and
    libraries are not in it. written: bytes that are written, most of them hidden states after each block, for
    `--resume`. left_out: of `Plan`.
    """

    flop: float
    seconds: float
    rate: float
    device_bytes: int
    host_bytes: int
    storage: Storage
    written: int
    workers: int
    left_out: str = ""


def estimate(plan: Plan, done: int = 0) -> Estimate:
    """The estimate of a run whose storage is settled (`place`), from its first `done` blocks on. It takes about one
    learning step twice."""
    small = rehearsal(plan)
    hidden = first_hidden(small)
    for _ in range(2):  # the first time, libraries set themselves up
        _, report = quantize_block(small, 0, hidden, Ahead(small))
    seconds, known = report["seconds"], block_flop(small, 0)
    rate = known["reference"] / seconds["reference"]
    layers = range(done, plan.adapter.num_layers)
    blocks = [block_flop(plan, layer) for layer in layers]
    packed = packed_bytes(plan.adapter)  # of blocks, each of which is written twice: as state, and in the checkpoint
    fixed = len(layers) * sum(seconds.get(name, 0.0) for name in FIXED)
    scaled = sum(seconds[name] * flop / known[name] for block in blocks for name, flop in block.items() if flop)
    head, tuning = head_flop(plan), tuning_flop(plan)
    # tuning goes forward and back as learning does
    tuned = tuning * seconds["learn"] / known["learn"] if tuning else 0.0
    return Estimate(
        flop=plan.workers.size * (sum(sum(block.values()) for block in blocks) + head + tuning),
        seconds=fixed + scaled + head / rate + tuned,
        rate=rate,
        device_bytes=0 if plan.settings.device == "cpu" else device_bytes(plan),
        host_bytes=host_bytes(plan),
        storage=plan.storage,
        written=len(layers) * (all_hidden_bytes(plan) + packed // plan.adapter.num_layers) + packed + outer_bytes(plan),
        workers=plan.workers.size,
        left_out=plan.left_out,
    )


def rehearsal(plan: Plan) -> Plan:
    """The run with the windows of one learning step and one held-out window."""
    learning, windows = plan.recipe.learning, plan.windows
    train = min(-(-learning.batch // plan.workers.size) if learning else 1, windows.statistics)
    few = replace(windows, tokens=torch.cat([windows.tokens[:train], windows.tokens[-1:]]), held_out=1)
    recipe = replace(plan.recipe, learning=replace(learning, epochs=1)) if learning else plan.recipe
    return replace(plan, windows=few, recipe=recipe)


# -- FLOP


def attention_flop(plan: Plan, layer: int) -> float:
    """Of one window: two products for every query and key that it sees."""
    config, length = plan.adapter.config, plan.windows.tokens.shape[1]
    types = getattr(config, "layer_types", None)
    sliding = getattr(config, "sliding_window", None) if not types or types[layer] == "sliding_attention" else None
    pairs = sum(min(i + 1, sliding or length) for i in range(length))
    return 4 * pairs * plan.adapter.num_heads * plan.adapter.head_size


def rotation_flop(plan: Plan) -> float:
    """Of one window's keys under a simulated cache, there and back."""
    adapter, length = plan.adapter, plan.windows.tokens.shape[1]
    return 4 * length * adapter.num_kv_heads * adapter.head_size**2 if plan.recipe.key_hadamard else 0


def block_flop(plan: Plan, layer: int) -> dict[str, float]:
    """Matrix products of a block, by the parts of its `Clock` that are not FIXED.

    Backward, a linear layer takes as much as forward for its weight and again for its input, and attention 2.5 times as
    much as forward, for its scores are computed again. The window needs no gradient, nor do the weights of followers.
    """
    adapter, recipe, learning = plan.adapter, plan.recipe, plan.recipe.learning
    samples, length = plan.windows.tokens.shape
    train, held_out = plan.windows.statistics, plan.windows.held_out
    sizes = {name: 2 * length * out * cols for name, (out, cols) in adapter.linear_shapes().items()}
    linear, attention = sum(sizes.values()), attention_flop(plan, layer)
    forward = linear + attention
    simulated = attention + rotation_flop(plan)
    flop: dict[str, float] = {
        "statistics": train * sizes[adapter.family.v_proj] if recipe.value_balance else 0,
        "reference": samples * forward + linear * plan.windows.first_tokens.numel() / length,
        "candidates": held_out * len(recipe.candidates) * (linear + simulated),
    }
    sets = len(kv.shift_counts(plan.kv)) if recipe.shift_pairs == NEEDED and plan.kv.key_shift == "rotating" else 1
    gram = 2 * length * adapter.num_heads**2 // adapter.num_kv_heads * adapter.head_size**2
    for count, windows in ((len(recipe.search), kv.SEARCH_WINDOWS), (sets if sets > 1 else 0, kv.SHIFT_WINDOWS)):
        if count and not recipe.learns_cache:
            of_window = attention + count * (simulated + gram)
            flop["search"] = flop.get("search", 0) + min(len(plan.workers.share(range(windows))), train) * of_window
    if learning:
        names = list(sizes)
        of_window = sum(sizes[name] for name in names[: names.index(adapter.family.o_proj)])
        step = 3 * linear - of_window + 3.5 * attention + (2 * rotation_flop(plan) if learning.cache else 0)
        followers = min(learning.followers, adapter.num_layers - 1 - layer)
        through_follower = 2 * linear + 3.5 * attention
        behind = layer == 0 or not learning.followers  # otherwise an earlier block has taken them there already
        flop["exact"] = (samples if behind else held_out) * forward
        flop["rounded"] = held_out * forward
        flop["statistics"] += train * forward
        new = followers if behind else int(followers == learning.followers)
        flop["targets"] = new * train * forward
        flop["learn"] = learning.epochs * train * (step + followers * through_follower)
    return flop


def head_flop(plan: Plan) -> float:
    """Of the logits of all runs that are compared after the last block."""
    runs = 1 + len(plan.recipe.candidates) + (2 if plan.recipe.learning else 0) + (5 if plan.recipe.tuning else 0)
    return runs * plan.windows.held_out * logits_flop(plan)


def logits_flop(plan: Plan) -> float:
    """Of a window's logits."""
    config = plan.adapter.config
    return 2 * plan.windows.tokens.shape[1] * config.vocab_size * config.hidden_size


def tuning_flop(plan: Plan, blocks: int | None = None) -> float:
    """Of tuning all blocks together: each window forward, again where gradients come to a block, and back, which takes
    as much for weights and again for inputs, and 2.5 times as much for attention; held-out windows forward. blocks: of
    the model, if not its own number."""
    tuning, linears = plan.recipe.tuning, plan.adapter.linear_shapes().values()
    layers = range(plan.adapter.num_layers if blocks is None else blocks)
    if not tuning:
        return 0.0
    linear = 2 * plan.windows.tokens.shape[1] * sum(out * cols for out, cols in linears) * len(layers)
    attention = sum(attention_flop(plan, layer) for layer in layers)
    rotation = len(layers) * rotation_flop(plan)
    of_cache = rotation if tuning.cache else 0
    windows, held_out, head = plan.windows.statistics, plan.windows.held_out, logits_flop(plan)
    learned = tuning.epochs * windows * (4 * linear + 4.5 * attention + 3 * of_cache + 3 * head)
    compared = (tuning.epochs + 1) * held_out * (linear + attention + of_cache + 2 * head)
    return learned + compared + held_out * (2 * (linear + attention) + rotation)


# -- memory


def hidden_bytes(plan: Plan, taken: Callable[[int], int] = int) -> int:
    """Hidden states of all runs. taken: by so many bytes of one run."""
    samples, length = plan.windows.tokens.shape
    token = plan.adapter.config.hidden_size * itemsize(plan)
    runs = [samples] * (2 if plan.recipe.learning else 1) + [plan.windows.held_out] * len(plan.recipe.candidates)
    return sum(taken(windows * length * token) for windows in runs) + taken(FIRST_TOKENS * token)


def all_hidden_bytes(plan: Plan) -> int:
    """Hidden states of all workers' windows."""
    return hidden_bytes(replace(plan, windows=plan.all_windows))


def captured_bytes(plan: Plan) -> int:
    """Queries, keys and values of one block, of the windows that statistics are taken from."""
    adapter = plan.adapter
    tokens = plan.windows.statistics * plan.windows.tokens.shape[1] * itemsize(plan)
    return tokens * (adapter.num_heads + 2 * adapter.num_kv_heads) * adapter.head_size


def followers(plan: Plan) -> int:
    """Blocks that the recipe's loss looks ahead."""
    return plan.recipe.learning.followers if plan.recipe.learning else 0


def target_bytes(plan: Plan, taken: Callable[[int], int] = int) -> int:
    """Hidden states after each follower. taken: as of `hidden_bytes`."""
    tokens = plan.windows.statistics * plan.windows.tokens.shape[1] * itemsize(plan)
    return followers(plan) * taken(tokens * plan.adapter.config.hidden_size)


def block_bytes(plan: Plan) -> int:
    """A block in the calibration's type."""
    return plan.adapter.numel(plan.adapter.block_names(0)) * itemsize(plan)


def window_bytes(plan: Plan) -> int:
    """A window's tensors inside a block: inputs and outputs of its linear layers, and half as much around them."""
    return 6 * plan.windows.tokens.shape[1] * sum(o + c for o, c in plan.adapter.linear_shapes().values())


def simulated_bytes(plan: Plan) -> int:
    """What attention under a simulated cache saves of a window for its gradients: every step of the rounding of keys
    and values in fp32, and for every query head what goes into attention and comes out of it."""
    adapter = plan.adapter
    of_token = 52 * adapter.num_kv_heads + 6 * itemsize(plan) * adapter.num_heads
    return of_token * plan.windows.tokens.shape[1] * adapter.head_size


def rounding_bytes(plan: Plan) -> int:
    """A block and its followers, a window in it, and a weight that is rounded: in fp32, its groups, codes, errors."""
    adapter = plan.adapter
    sizes = [o * c for o, c in adapter.linear_shapes().values()]
    packed = int(sum(sizes) * 0.6) if plan.settings.device == "cpu" else 0
    rounded = max(sizes) * (20 if itemsize(plan) == 4 else 26)
    return (1 + followers(plan)) * block_bytes(plan) + packed + rounded + window_bytes(plan) + simulated_bytes(plan)


def learning_bytes(plan: Plan) -> int:
    """A block and its followers with a step's activations, and weights that are learned.

    Of a weight: itself and its fake-quantized value in fp32 and in the calibration's type, its offset, what is saved
    for its gradient on a CPU (1 byte, 5 where ranges are learned; a GPU's kernel computes it again), the sum of
    gradients, and that of a window.
    """
    adapter, learning, size = plan.adapter, plan.recipe.learning, itemsize(plan)
    if not learning:
        return 0
    windows = together(learning, plan.settings.device)
    copies = 0 if size == 4 else 4 + size
    weights = sum(o * c for o, c in adapter.linear_shapes().values())
    saved = (5 if learning.clip_rate else 1) if plan.settings.device == "cpu" else 0
    learned = weights * (copies + 12 + saved + size + (4 if learning.rounding else 0))
    step = windows * ((1 + followers(plan)) * window_bytes(plan) + learning.cache * simulated_bytes(plan))
    return (1 + followers(plan)) * block_bytes(plan) + steps_held(plan, weights) * step + learned


def steps_held(plan: Plan, weights: int) -> int:
    """Steps whose activations there is room for, with so many weights in a block: a CUDA graph keeps its own, beside
    those of a step that it is not."""
    return 2 if replays(weights, plan.settings.device, plan.workers) else 1


def tuning_bytes(plan: Plan) -> int:
    """All codes with the steps, what is learned and Adam's state, hidden states before every block, the head with a
    part of its logits, and one block with its weights, what is saved for their gradients, and windows in it.

    Where codes move, they are there again as of the best epoch, and each has an offset with its gradient.
    """
    adapter, config, tuning = plan.adapter, plan.adapter.config, plan.recipe.tuning
    if not tuning:
        return 0
    length, size = plan.windows.tokens.shape[1], itemsize(plan)
    shapes = {name.rpartition(".")[2]: rows * cols for name, (rows, cols) in adapter.linear_shapes().items()}
    weights = sum(shapes.values())
    groups = sum(count // adapter.group_sizes[name] for name, count in shapes.items())
    others = adapter.numel(adapter.block_names(0)) - weights
    windows = together(tuning, plan.settings.device)
    shifts = 8 * length * adapter.num_kv_heads * adapter.head_size
    codes = weights * (2 + 2 * size if tuning.code_sigmas else 1)
    kept = adapter.num_layers * (codes + 29 * (groups + others) + shifts)
    kept += adapter.num_layers * windows * length * config.hidden_size * size
    head = config.vocab_size * (config.hidden_size * size + 24 * LOGIT_ROWS)
    step = weights * (12 + 2 * size) + windows * (window_bytes(plan) + tuning.cache * simulated_bytes(plan))
    return kept + head + steps_held(plan, weights) * step


def working_bytes(plan: Plan, captured: int = 0) -> int:
    """The most that is computed with at once, besides what is kept of windows: a block, or the head. captured: bytes of
    what is `captured_bytes`, which is gone while weights are learned."""
    config = plan.adapter.config
    head = config.vocab_size * (config.hidden_size * itemsize(plan) + 16 * LOGIT_ROWS)
    return max(rounding_bytes(plan) + captured, learning_bytes(plan), tuning_bytes(plan), head)


def outer_bytes(plan: Plan) -> int:
    """Tensors outside the blocks, in 16 bits."""
    return 2 * plan.adapter.numel(plan.adapter.outer_names())


def device_bytes(plan: Plan) -> int:
    """Peak on the device."""
    device, storage = plan.settings.device, plan.storage
    kept = hidden_bytes(plan) * (storage.hidden == device) + target_bytes(plan) * (storage.targets == device)
    return kept + working_bytes(plan, captured_bytes(plan) * (storage.captured == device))


def host_bytes(plan: Plan) -> int:
    """Peak on worker 0's host: while a block is computed, while it is written, or while the checkpoint is."""
    adapter, settings, storage = plan.adapter, plan.settings, plan.storage
    if settings.device == "cpu":
        computed, hidden, targets = device_bytes(plan), hidden_bytes(plan), target_bytes(plan)
    else:
        hidden = hidden_bytes(plan, pinned_bytes) * (storage.hidden == "cpu")
        targets = target_bytes(plan, pinned_bytes) * (storage.targets == "cpu")
        captured = captured_bytes(plan) * (storage.captured == "cpu")
        computed = 2 * adapter.numel(adapter.block_names(0)) + hidden + targets + captured
    gathered = all_hidden_bytes(plan) if plan.workers.size > 1 else 0
    # a copy that is written while a GPU goes on
    staged = hidden_bytes(replace(plan, windows=plan.all_windows), pinned_bytes) * (settings.device != "cpu")
    outer = outer_bytes(plan)
    shard = min(settings.shard_size, packed_bytes(adapter) + outer)
    tuned = 0  # codes of all blocks, while they are written
    if plan.recipe.tuning and settings.device == "cpu":
        tuned = adapter.num_layers * sum(rows * columns for rows, columns in adapter.linear_shapes().values())
    return staged + max(computed, hidden + targets + gathered, max(hidden, tuned) + outer + shard)


def place(plan: Plan, left_out: str | None = None) -> Plan:
    """The run with what is kept between its uses on the device, or as much of it as fits in the budget: first what is
    captured, last the targets.

    The budget is `--memory-budget`, or the memory that is free on the device (the CPU's is the host's, an equal part of
    it for each worker); a GPU's host must have room for the rest. Tuning alone needs the codes of the whole model at
    once, and several times that where it moves them: where that does not fit, codes stay, or it is left out of the
    recipe, and that is said. left_out: what an interrupted run that goes on has left out, neither more nor less. Raises
    ConfigError where no placement fits.
    """
    device, given = plan.settings.device, plan.settings.memory_budget
    own = free_bytes(device) // (plan.workers.size if device == "cpu" else 1) if given is None else given
    # the least that a worker has, and below the most that one needs: all workers decide alike
    budget = -int(plan.workers.amax([torch.tensor(-own)]))
    limit = f"--memory-budget is {budget / 1e9:.3g} GB"
    if given is None:
        limit = f"{budget / 1e9:.3g} GB are free (--memory-budget overrules that)"
    what = "memory" if device == "cpu" else "GPU memory"
    placements = [(device, device, device), (device, "cpu", device), ("cpu", "cpu", device), ("cpu", "cpu", "cpu")]
    least: list[int] = []  # bytes that each recipe needs
    for without, recipe in lighter(plan.recipe):
        if left_out not in (None, without):
            continue
        for storage in [Storage(*devices) for devices in dict.fromkeys(placements)]:
            placed = replace(plan, recipe=recipe, storage=storage, left_out=without)
            taken = host_bytes(placed) if device == "cpu" else device_bytes(placed)
            needed = int(plan.workers.amax([torch.tensor(taken)]))
            if needed <= budget:
                check_host(placed)
                if least and plan.workers.rank == 0:
                    logger.warning(
                        "%s is left out, which costs accuracy: it needs about %.3g GB of %s, and %s",
                        without,
                        least[-1] / 1e9,
                        what,
                        limit,
                    )
                return placed
        least.append(needed)
    if left_out is not None:
        raise ConfigError(
            f"to go on as it began, this run needs about {least[-1] / 1e9:.3g} GB of {what}, {limit}; free some memory "
            f"or give --memory-budget"
        )
    raise ConfigError(
        f"this run needs about {least[-1] / 1e9:.3g} GB of {what}, {limit}; lower --samples, --seq-len or "
        f"--shard-size, or calibrate in --dtype bfloat16"
    )


def check_host(plan: Plan) -> None:
    """Raise ConfigError where worker 0 computes on a GPU and its host has too little memory for the rest."""
    needed, free = host_bytes(plan), free_bytes("cpu")
    if plan.workers.rank == 0 and plan.settings.device != "cpu" and needed > free:
        raise ConfigError(
            f"this run needs about {needed / 1e9:.3g} GB of the host's memory, {free / 1e9:.3g} GB are free; lower "
            f"--samples, --seq-len or --shard-size"
        )


def lighter(recipe: Recipe) -> list[tuple[str, Recipe]]:
    """The recipe, and the same with less tuning, as far as it has some: (what is left out, recipe)."""
    recipes = [("", recipe)]
    if recipe.tuning and recipe.tuning.code_sigmas:
        kept = replace(recipe.tuning, code_sigmas=0.0)
        recipes.append(("moving codes when all blocks are tuned together", replace(recipe, tuning=kept)))
    if recipe.tuning:
        recipes.append(("tuning all blocks together", replace(recipe, tuning=None)))
    return recipes
