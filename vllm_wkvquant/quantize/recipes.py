"""What is computed for a checkpoint, by name. A recipe is data; pipeline.py is the one place that acts on it."""

from dataclasses import dataclass, replace

from vllm_wkvquant.config import ConfigError

SEARCHED, LEARNED = "searched", "learned"
ALL, NEEDED, SLOW = "all", "needed", "slow"


@dataclass(frozen=True)
class Smoothing:
    """k_smooth = deviation ** key / query_rms ** query per channel (kv.py, `smoothing_factors`); none where both are 0.

    tied: the two channels of a rotary pair share the larger deviation.
    """

    key: float = 0.0
    query: float = 0.0
    tied: bool = False

    @property
    def name(self) -> str:
        """As reported: "tied^0.5", "free^0.7/q^0.4"."""
        if not self.key and not self.query:
            return "none"
        return f"{'tied' if self.tied else 'free'}^{self.key:g}" + (f"/q^{self.query:g}" if self.query else "")


def capped(epochs: int, most: int, windows: int) -> int:
    """Epochs over so many windows that go over `most` in all, or hardly more, where it is not 0."""
    return min(epochs, max(1, round(most / windows))) if most else epochs


@dataclass(frozen=True)
class Learning:
    """What is learned of a block, and how (learn.py).

    clip: how a group's range starts and is held: "searched" for the share of it that loses least, kept in 0.3 .. 1,
    "whole" for all of it, kept there too, or "sigmoid", the paper's. rounding: learn which of its two neighbours a
    weight becomes. cache: learn k_smooth, k_shift, v_shift and the smoothing of V with the weights, under a simulated
    cache; otherwise the weights are learned under a 16-bit cache and the cache's parameters are taken from statistics
    afterwards. past_only: the simulated cache leaves a token's own key and value as they are. optimizer: of the
    weights, "sign" (rate: how far the rounding may move in all, clip_rate: how far an end of the range) or "adamw"
    (both: learning rate), and clip_rate 0 leaves the range where it starts; the cache's is AdamW with learning rate
    cache_rate. batch: windows a step. most: how many windows all epochs go over at most, so that more text takes no
    longer; 0: any number. few: so many windows or fewer are learned from one at a time, in few_epochs. loss: a key of
    `learn.LOSSES`. skip_first: leave the first positions of a window out of it, as out of every statistic. followers:
    how many of the following blocks, in 16 bits, the output is also compared after.
    """

    clip: str
    rounding: bool
    cache: bool
    optimizer: str
    epochs: int
    batch: int
    rate: float
    clip_rate: float
    loss: str
    cache_rate: float = 0.0
    followers: int = 0
    most: int = 0
    few: int = 0
    few_epochs: int = 0
    past_only: bool = True
    skip_first: bool = False

    def of(self, windows: int) -> "Learning":
        """What this is with so many windows to learn from."""
        if windows > self.few:
            return replace(self, epochs=capped(self.epochs, self.most, windows))
        return replace(self, batch=1, epochs=self.few_epochs, few=0)


@dataclass(frozen=True)
class Tuning:
    """What is learned of all blocks together once each has its codes (tune.py): steps of the groups, norms, biases,
    codes, and the cache's parameters.

    rate: Adam's at the beginning, in units of the logarithm of a step and of the root mean square of a norm or bias; it
    falls linearly to 0. cache_rate: the same of the smoothing of keys, in its logarithm, and of the shifts, in units of
    the largest cached key and of a head's root mean square shift of values; 0: they stay. code_sigmas: by how many
    standard deviations of what chance would do the signs of its gradients must agree for a code to become its
    neighbour; 0: codes stay. batch: windows a step. most: as in `Learning`. few: so many windows or fewer are gone over
    few_epochs times, since they are soon known by heart. cache: under the simulated 4-bit cache, a token's own key and
    value as they are; otherwise under a 16-bit one.
    """

    epochs: int
    batch: int
    rate: float
    code_sigmas: float = 0.0
    cache_rate: float = 0.0
    most: int = 0
    few: int = 0
    few_epochs: int = 0
    cache: bool = True

    def of(self, windows: int) -> "Tuning":
        """What this is with so many windows to learn from."""
        if windows > self.few:
            return replace(self, epochs=capped(self.epochs, self.most, windows))
        return replace(self, epochs=self.few_epochs, few=0)


@dataclass(frozen=True)
class Recipe:
    """One way of making a checkpoint.

    key_shift: as in `KVCacheConfig`. shift_pairs: which rotary pairs keep a rotating shift that is not learned: ALL of
    them, SLOW ones, or those and as many others as are NEEDED (kv.py, `shift_sets`). value_balance: scale V's channels
    by (value / o_proj column) ** value_balance before they are folded. smoothings: candidates, each for the whole
    model. search: where not empty, one candidate more, `SEARCHED`: per layer and KV head, whichever of these errs least
    at the attention's output. The candidate with the least KL divergence on held-out calibration text is kept.
    """

    name: str
    summary: str
    key_shift: str
    shift_pairs: str
    key_hadamard: bool
    value_hadamard: bool
    first_shift: bool
    value_balance: float
    smoothings: tuple[Smoothing, ...]
    search: tuple[Smoothing, ...] = ()
    learning: Learning | None = None
    tuning: Tuning | None = None

    def __post_init__(self) -> None:
        if self.tuning and not self.learning:
            raise ConfigError(f"recipe {self.name!r} has tuning without learning, which runs the 16-bit model for it")

    def of(self, windows: int) -> "Recipe":
        """What this is with so many windows to learn from."""
        learning, tuning = self.learning and self.learning.of(windows), self.tuning and self.tuning.of(windows)
        return replace(self, learning=learning, tuning=tuning)

    @property
    def learns_cache(self) -> bool:
        """Whether the cache's parameters are learned: from the first smoothing on, and nothing is left to choose."""
        return self.learning is not None and self.learning.cache

    @property
    def candidates(self) -> list[str]:
        """Names of all candidates."""
        if self.learns_cache:
            return [LEARNED]
        return [s.name for s in self.smoothings] + [SEARCHED] * bool(self.search)


RTN = Recipe(
    name="rtn",
    summary="rotating key shift, smoothing, Hadamard on K and V; weights rounded to nearest",
    key_shift="rotating",
    shift_pairs=NEEDED,
    key_hadamard=True,
    value_hadamard=True,
    first_shift=True,
    value_balance=0.5,
    smoothings=(Smoothing(0.5), Smoothing(0.5, tied=True)),
    search=(
        Smoothing(),
        *(Smoothing(key, query) for key in (0.3, 0.5, 0.7) for query in (0.0, 0.2, 0.4)),
        *(Smoothing(0.9, query) for query in (0.2, 0.4)),
    ),
)
STATIC = Recipe(
    name="static",
    summary="WKVQuant's static form: shift after the rotary embedding, smoothing of K and V, no Hadamard",
    key_shift="static",
    shift_pairs=ALL,
    key_hadamard=False,
    value_hadamard=False,
    first_shift=False,
    value_balance=0.5,
    smoothings=(Smoothing(0.5), Smoothing(0.7), Smoothing(1.0)),
)
BEST = replace(
    RTN,
    name="best",
    summary="the cache of rtn; ranges of weights searched, rounding learned block by block, all of it then end to end",
    learning=Learning(
        clip="searched",
        rounding=True,
        cache=False,
        optimizer="sign",
        epochs=60,
        batch=4,
        most=7200,
        few=16,
        few_epochs=10,
        rate=0.5,
        clip_rate=0.0,
        loss="relative_mse",
        skip_first=True,
    ),
    tuning=Tuning(epochs=10, batch=4, rate=1e-3, code_sigmas=3.0, cache_rate=3e-3, most=1200, few=16, few_epochs=2),
)
PAPER = replace(
    STATIC,
    name="paper",
    summary="WKVQuant: learned clipping, shift and smoothing, cross-block reconstruction over 5 blocks (slow)",
    smoothings=(Smoothing(0.5),),
    learning=Learning(
        clip="sigmoid",
        rounding=False,
        cache=True,
        optimizer="adamw",
        epochs=5,
        batch=1,
        rate=0.0,
        clip_rate=1e-2,
        cache_rate=1e-3,
        loss="mae",
        followers=5,
    ),
)
RECIPES = {r.name: r for r in (BEST, RTN, PAPER, STATIC)}
DEFAULT = BEST.name


def find_recipe(name: str) -> Recipe:
    """The recipe of that name. Raises ConfigError."""
    if name not in RECIPES:
        raise ConfigError(f"recipe {name!r} does not exist; recipes: {', '.join(RECIPES)}")
    return RECIPES[name]
