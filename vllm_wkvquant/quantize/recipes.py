"""What is computed for a checkpoint, by name. A recipe is data; pipeline.py is the one place that acts on it."""

from dataclasses import dataclass

from vllm_wkvquant.config import ConfigError

SEARCHED = "searched"


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


@dataclass(frozen=True)
class Recipe:
    """One way of making a checkpoint.

    key_shift: as in `KVCacheConfig`. value_balance: scale V's channels by (value / o_proj column) ** value_balance
    before they are folded. smoothings: candidates, each for the whole model. search: where not empty, one candidate
    more, `SEARCHED`: per layer and KV head, whichever of these errs least at the attention's output. The candidate with
    the least KL divergence on held-out calibration text is kept.
    """

    name: str
    summary: str
    key_shift: str
    key_hadamard: bool
    value_hadamard: bool
    first_shift: bool
    value_balance: float
    smoothings: tuple[Smoothing, ...]
    search: tuple[Smoothing, ...] = ()

    @property
    def candidates(self) -> list[str]:
        """Names of all candidates."""
        return [s.name for s in self.smoothings] + [SEARCHED] * bool(self.search)


RECIPES = {
    r.name: r
    for r in (
        Recipe(
            name="rtn",
            summary="rotating key shift, smoothing, Hadamard on K and V; weights rounded to nearest",
            key_shift="rotating",
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
        ),
        Recipe(
            name="static",
            summary="WKVQuant's static form: shift after the rotary embedding, smoothing of K and V, no Hadamard",
            key_shift="static",
            key_hadamard=False,
            value_hadamard=False,
            first_shift=False,
            value_balance=0.5,
            smoothings=(Smoothing(0.5), Smoothing(0.7), Smoothing(1.0)),
        ),
    )
}


def find_recipe(name: str) -> Recipe:
    """The recipe of that name. Raises ConfigError."""
    if name not in RECIPES:
        raise ConfigError(f"recipe {name!r} does not exist; recipes: {', '.join(RECIPES)}")
    return RECIPES[name]
