"""What a campaign compares, as data: recipes, and setups of sizes, budgets, growth points and learning rates."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from growkern import depth, width

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Recipe:
    """How a run grows.

    Attributes:
        growth: Arguments of ``expand_inplace``.
        rates: Factors on the learning rate after growth; the best on seed 0 is measured on the other seeds.
        rewarm: Steps over which the learning rate rises again after growth.
        via: Sizes on the way to the target, each with the multiple of the growth point's FLOPs at which the run leaves it.
    """

    growth: Mapping[str, Any] = field(default_factory=dict[str, Any])
    rates: tuple[float, ...] = (1.0,)
    rewarm: int = 0
    via: tuple[tuple[Sizes, float], ...] = ()


ONE_RATE: dict[str, Any] = {"dynamics": None}
DROPPED: dict[str, Any] = {"dynamics": None, "state": "drop"}
FRESH = width.Sparkling("random", "zero")

RECIPES: dict[str, Recipe] = {
    # width
    "default": Recipe(),
    "noise 0": Recipe({"width": width.Lossless(noise=0)}),
    "noise 0.3": Recipe({"width": width.Lossless(noise=0.3)}),
    "default, one rate": Recipe(ONE_RATE, (0.5, 1.0)),
    "default, dropped": Recipe(DROPPED, (0.5, 1.0), rewarm=60),
    "HyperClone": Recipe({**ONE_RATE, "width": width.HyperClone(noise_db=10)}, (0.5, 1.0)),
    "Lemon": Recipe({**ONE_RATE, "width": width.Lemon()}, (0.5, 1.0)),
    "AKI": Recipe({**ONE_RATE, "width": width.AKI()}, (0.5, 1.0)),
    "CopyAndPad": Recipe({**ONE_RATE, "width": width.CopyAndPad(norm="corrected")}, (0.5, 1.0)),
    "Sparkling fresh": Recipe({**DROPPED, "width": FRESH}, (0.5, 1.0), rewarm=60),
    "Sparkling fresh, state": Recipe({**ONE_RATE, "width": FRESH}, (0.5, 1.0)),
    "FreshFeatures": Recipe({**ONE_RATE, "width": width.FreshFeatures()}, (0.5, 1.0)),
    "FreshFeatures, dropped": Recipe(
        {**DROPPED, "width": width.FreshFeatures()}, (0.5, 1.0), rewarm=60
    ),
    # depth
    "Stack": Recipe({**ONE_RATE, "depth": depth.Stack()}),
    "Stack, dropped": Recipe({**DROPPED, "depth": depth.Stack()}, rewarm=60),
    "Interpose": Recipe({**ONE_RATE, "depth": depth.Interpose(halve_branches=True)}),
    "Interpose, dropped": Recipe(
        {**DROPPED, "depth": depth.Interpose(halve_branches=True)}, rewarm=60
    ),
    "IdentityBlocks": Recipe({**ONE_RATE, "depth": depth.IdentityBlocks()}),
    "TopCopies": Recipe({**ONE_RATE, "depth": depth.TopCopies()}),
    "Fresh": Recipe({**ONE_RATE, "depth": depth.Fresh()}),
    "Stack by twos": Recipe(
        {**DROPPED, "depth": depth.Stack()}, rewarm=60, via=(({"layers": 4}, 2.0),)
    ),
}


@dataclass(frozen=True)
class Setup:
    """One comparison. Budgets and growth points are in steps of the target, as FLOPs are counted.

    Attributes:
        source: Sizes of the source, which also trains on without growing.
        target: Sizes of the target, which also trains from scratch.
        budgets: FLOPs, in steps of the target, at which annealed losses are compared.
        grow_at: FLOPs of the source, in steps of the target, at which it grows.
        lrs: Peak learning rates of the target that are tried on seed 0.
        source_lrs: Likewise, of the source.
        recipes: Names of ``RECIPES``.
        text: ``"python"``, ``"c++"`` or ``"packages"``.
        n_bytes: Bytes of text, at most.
        optimizer: ``"adamw"`` or ``"muon"``.
        landing: Steps after the last growth at which the trunk's loss is taken once more.
        training: Fields of ``growkern.demo_run.Training`` that differ from its defaults.
    """

    source: Sizes
    target: Sizes
    budgets: tuple[int, ...]
    grow_at: tuple[int, ...]
    lrs: tuple[float, ...]
    source_lrs: tuple[float, ...]
    recipes: tuple[str, ...]
    text: str = "python"
    n_bytes: int = 12_000_000
    optimizer: str = "adamw"
    landing: int = 100
    training: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def source_sizes(self) -> tuple[int, int]:
        """Width and depth of the source."""
        return self.source["hidden"], self.source["layers"]

    @property
    def target_sizes(self) -> tuple[int, int]:
        """Width and depth of the target."""
        return self.target["hidden"], self.target["layers"]


WIDTHS = tuple(RECIPES)[: tuple(RECIPES).index("Stack")]
DEPTHS = tuple(RECIPES)[tuple(RECIPES).index("Stack") :]

SETUPS: dict[str, Setup] = {
    "smoke": Setup(
        {"hidden": 32, "layers": 1}, {"hidden": 64, "layers": 1}, (8, 16), (2,), (4e-3, 8e-3), (8e-3,),
        ("default", "default, one rate"), n_bytes=1_000_000, landing=3,
        training={"n_eval": 8, "n_trunk": 4, "warmup": 4},
    ),
    "width": Setup(
        {"hidden": 32, "layers": 4}, {"hidden": 64, "layers": 4}, (512, 854, 1366), (205,), (2e-3, 4e-3, 8e-3),
        (4e-3, 8e-3, 16e-3),
        ("default", "default, one rate", "default, dropped", "Sparkling fresh", "FreshFeatures", "HyperClone"),
    ),
    "depth": Setup(
        {"hidden": 32, "layers": 2}, {"hidden": 32, "layers": 8}, (1000, 2000, 4000), (200, 900),
        (4e-3, 8e-3, 16e-3), (4e-3, 8e-3, 16e-3), DEPTHS,
    ),
    "gpu": Setup(
        {"hidden": 512, "layers": 3}, {"hidden": 512, "layers": 12}, (6_000, 12_000, 24_000), (1_500, 4_000),
        (5e-4, 1e-3, 2e-3), (5e-4, 1e-3, 2e-3), ("Stack, dropped", "IdentityBlocks"), text="packages",
        n_bytes=1_000_000_000, training={"batch": 64, "seq": 512, "warmup": 200},
    ),
}  # fmt: skip
