"""What is computed for a checkpoint, by name. A recipe is data; pipeline.py is the one place that acts on it."""

from dataclasses import dataclass

from vllm_wkvquant.config import ConfigError


@dataclass(frozen=True)
class Smoothing:
    """How k_smooth comes from calibration statistics (kv.py, `smoothing_factors`).

    kind: "none"; "free" (deviation ** alpha per channel); "tied" (the same, one value for the two channels of a rotary
    pair); "balanced" ((deviation / query) ** alpha: error goes where queries are small); "searched" (per head, whichever
    of the other candidates errs least at the attention's output).
    """

    kind: str
    alpha: float = 0.0

    @property
    def name(self) -> str:
        """As reported: "free^0.5"."""
        return f"{self.kind}^{self.alpha:g}" if self.alpha else self.kind


@dataclass(frozen=True)
class Recipe:
    """One way of making a checkpoint.

    key_shift: as in `KVCacheConfig`. smoothings: candidates for the whole model; the one with the least KL divergence
    on held-out calibration text is kept. value_balance: scale V's channels by (value / o_proj column) ** value_balance
    before they are folded.
    """

    name: str
    summary: str
    key_shift: str
    key_hadamard: bool
    value_hadamard: bool
    value_balance: float
    smoothings: tuple[Smoothing, ...]


RECIPES = {
    r.name: r
    for r in (
        Recipe(
            name="rtn",
            summary="rotating key shift, smoothing, Hadamard on K and V; weights rounded to nearest",
            key_shift="rotating",
            key_hadamard=True,
            value_hadamard=True,
            value_balance=0.0,
            smoothings=(
                Smoothing("none"),
                Smoothing("free", 0.3),
                Smoothing("free", 0.5),
                Smoothing("tied", 0.3),
                Smoothing("tied", 0.5),
                Smoothing("tied", 0.7),
                Smoothing("balanced", 0.3),
                Smoothing("balanced", 0.5),
                Smoothing("searched"),
            ),
        ),
        Recipe(
            name="static",
            summary="WKVQuant's static form: shift after the rotary embedding, smoothing of K and V, no Hadamard",
            key_shift="static",
            key_hadamard=False,
            value_hadamard=False,
            value_balance=0.5,
            smoothings=(Smoothing("free", 0.5), Smoothing("free", 0.7), Smoothing("free", 1.0)),
        ),
    )
}


def find_recipe(name: str) -> Recipe:
    """The recipe of that name. Raises ConfigError."""
    if name not in RECIPES:
        raise ConfigError(f"recipe {name!r} does not exist; recipes: {', '.join(RECIPES)}")
    return RECIPES[name]
