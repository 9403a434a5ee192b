"""Data of the campaigns: recipes, and setups of sizes, budgets, growth points and learning rates."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from growkern import depth, width

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Recipe:
    """Growth settings of a run.

    Attributes:
        growth: Arguments of ``expand_inplace``.
        rates: Factors on the learning rate after growth; the best factor on seed 0 is measured on the other seeds.
        rewarm: Steps over which the learning rate rises again after growth.
        keep: Share of the grown weights in an average with fresh weights ("shrink and perturb", Ash and Adams,
            arXiv:1910.08475, as an interpolation: D'Oro et al., ICLR 2023).
        via: Intermediate sizes, each with the FLOPs, as a multiple of the growth point's FLOPs, at which the run grows on.
    """

    growth: Mapping[str, Any] = field(default_factory=dict[str, Any])
    rates: tuple[float, ...] = (1.0,)
    rewarm: int = 0
    keep: float = 1.0
    via: tuple[tuple[Sizes, float], ...] = ()


ONE_RATE: dict[str, Any] = {"dynamics": None}
DROPPED: dict[str, Any] = {"dynamics": None, "state": "drop"}
FRESH = width.Sparkling("random", "zero")
COPIES = width.Lossless(noise=1)

RECIPES: dict[str, Recipe] = {
    # width
    "default": Recipe(),
    "default, one rate": Recipe(ONE_RATE, (0.5, 1.0)),
    "default, dropped": Recipe(DROPPED, (0.5, 1.0), rewarm=60),
    "noise 0": Recipe({"width": width.Lossless(noise=0)}),
    "noise 0.3": Recipe({"width": width.Lossless(noise=0.3)}),
    "noise 1": Recipe({"width": COPIES}),
    "noise 1, one rate": Recipe({**ONE_RATE, "width": COPIES}, (0.5, 1.0)),
    "noise 1, dropped": Recipe({**DROPPED, "width": COPIES}, (0.5, 1.0), rewarm=60),
    "noise 2": Recipe({"width": width.Lossless(noise=2)}),
    "noise 2, one rate": Recipe({**ONE_RATE, "width": width.Lossless(noise=2)}, (0.5, 1.0)),
    "noise 4, one rate": Recipe({**ONE_RATE, "width": width.Lossless(noise=4)}, (0.5, 1.0)),
    "HyperClone": Recipe({**ONE_RATE, "width": width.HyperClone(noise_db=10)}, (0.5, 1.0)),
    "Lemon": Recipe({**ONE_RATE, "width": width.Lemon()}, (0.5, 1.0)),
    "AKI": Recipe({**ONE_RATE, "width": width.AKI()}, (0.5, 1.0)),
    "CopyAndPad, as published": Recipe({**ONE_RATE, "width": width.CopyAndPad()}, (0.5, 1.0)),
    "FPI": Recipe({**ONE_RATE, "width": width.FPI()}, (0.5, 1.0)),
    "Net2Wider": Recipe({**ONE_RATE, "width": width.Net2Wider(noise=0.1)}, (0.5, 1.0)),
    "Sparkling": Recipe(
        {**ONE_RATE, "state": "asymmetric", "width": width.Sparkling()}, (0.5, 1.0)
    ),
    "Sparkling fresh": Recipe({**DROPPED, "width": FRESH}, (0.5, 1.0), rewarm=60),
    "Sparkling fresh, state": Recipe({**ONE_RATE, "width": FRESH}, (0.5, 1.0)),
    "FreshFeatures": Recipe({**ONE_RATE, "width": width.FreshFeatures()}, (0.5, 1.0)),
    "FreshFeatures, dropped": Recipe(
        {**DROPPED, "width": width.FreshFeatures()}, (0.5, 1.0), rewarm=60
    ),
    "shrink and perturb": Recipe({**DROPPED, "width": COPIES}, (0.5, 1.0), rewarm=60, keep=0.5),
    "shrink and perturb 0.8": Recipe({**DROPPED, "width": COPIES}, (0.5, 1.0), rewarm=60, keep=0.8),
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
    "Middle": Recipe({**ONE_RATE, "depth": depth.Layers((0, 1, 0, 1, 0, 1, 2, 3))}),
    "Stack by twos": Recipe(
        {**DROPPED, "depth": depth.Stack()}, rewarm=60, via=(({"layers": 4}, 2.0),)
    ),
    # width and depth
    "Sparkling fresh and Stack": Recipe(
        {**DROPPED, "width": FRESH, "depth": depth.Stack()}, (0.5, 1.0), rewarm=60
    ),
    "Sparkling fresh, then Stack": Recipe(
        {**DROPPED, "width": FRESH, "depth": depth.Stack()},
        (0.5, 1.0),
        rewarm=60,
        via=(({"hidden": 64}, 2.0),),
    ),
}


@dataclass(frozen=True)
class Setup:
    """One comparison. Budgets and growth points are FLOPs, in units of a step of the target.

    Attributes:
        source: Sizes of the source, which also trains on without growing.
        target: Sizes of the target, which also trains from scratch.
        budgets: FLOPs, in steps of the target, at which annealed losses are compared.
        beyond: Further budgets, which only the target from scratch reaches; for grown runs that end below the target from scratch
            at the last of ``budgets``.
        early: Further budgets, which only the source reaches: the growth points, where the annealed loss gives the source's worth.
        grow_at: FLOPs of the source, in steps of the target, at which it grows.
        lrs: Peak learning rates of the target that are tried on seed 0.
        source_lrs: Peak learning rates of the source that are tried on seed 0.
        recipes: Names of recipes in ``RECIPES``.
        text: ``"python"``, ``"c++"`` or ``"packages"``.
        n_bytes: Maximum bytes of text.
        optimizer: ``"adamw"`` or ``"muon"``.
        landing: Steps after the last growth at which the trunk's loss is measured again.
        training: Fields of ``growkern.cli.demo_run.Training`` that differ from its defaults.
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
    beyond: tuple[int, ...] = ()
    early: tuple[int, ...] = ()
    training: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def source_sizes(self) -> tuple[int, int]:
        """Width and depth of the source."""
        return self.source["hidden"], self.source["layers"]

    @property
    def target_sizes(self) -> tuple[int, int]:
        """Width and depth of the target."""
        return self.target["hidden"], self.target["layers"]


NAMES = tuple(RECIPES)
STACK, BOTH = NAMES.index("Stack"), NAMES.index("Sparkling fresh and Stack")
WIDTHS, DEPTHS = NAMES[:STACK], NAMES[STACK:BOTH]

RATES = (2e-3, 4e-3, 8e-3)
SOURCE_RATES = (4e-3, 8e-3, 16e-3)
SMALL = {"hidden": 32, "layers": 4}
WIDTH = Setup(
    SMALL, {"hidden": 64, "layers": 4}, (512, 854, 1366), (205,), RATES, SOURCE_RATES,
    ("default", "default, one rate", "Sparkling fresh"), beyond=(2186,),
    early=(102, 205, 384),
)  # fmt: skip
DEPTH = Setup(
    {"hidden": 32, "layers": 2}, {"hidden": 32, "layers": 8}, (500, 1000, 2000), (200,), RATES,
    RATES, tuple(name for name in DEPTHS if name not in ("Middle", "TopCopies")), beyond=(3000,),
    early=(100, 200, 375),
)  # fmt: skip

SETUPS: dict[str, Setup] = {
    "smoke": Setup(
        {"hidden": 32, "layers": 1}, {"hidden": 64, "layers": 1}, (8, 16), (2,), (4e-3, 8e-3), (8e-3,),
        ("default", "default, one rate"), n_bytes=1_000_000, landing=3,
        training={"n_eval": 8, "n_trunk": 4, "warmup": 4},
    ),
    "width": WIDTH,
    "width, all": replace(WIDTH, recipes=WIDTHS),
    "width, points": replace(
        WIDTH, grow_at=(102, 384, 768), early=(*WIDTH.early, 768), recipes=("default, one rate", "Sparkling fresh"),
    ),
    "width, c++": replace(
        WIDTH, text="c++", lrs=(*RATES, 16e-3),
        recipes=("default, one rate", "noise 1, one rate", "Sparkling fresh", "Sparkling fresh, state"),
    ),
    "width, muon": replace(
        WIDTH, optimizer="muon", lrs=(*RATES, 16e-3), source_lrs=(2e-3, *SOURCE_RATES),
        recipes=("default, dropped", "Sparkling fresh", "FreshFeatures, dropped"),
    ),
    "wider": replace(
        WIDTH, source={"hidden": 64, "layers": 4}, target={"hidden": 128, "layers": 4}, lrs=(1e-3, 2e-3, 4e-3),
        source_lrs=(1e-3, *RATES), recipes=("default, one rate", "Sparkling fresh"),
    ),
    "depth": DEPTH,
    "depth, points": replace(DEPTH, grow_at=(100, 375), recipes=("Stack, dropped", "IdentityBlocks")),
    "depth, long": replace(
        DEPTH, budgets=(2000, 4500), beyond=(), early=(800,), grow_at=(800,), lrs=(1e-3, *RATES),
        recipes=("Stack, dropped", "IdentityBlocks"),
    ),
    "depth, twice": replace(
        DEPTH, source={"hidden": 32, "layers": 4}, source_lrs=SOURCE_RATES, recipes=("Stack", "Middle", "Interpose", "TopCopies"),
    ),
    "both": replace(
        WIDTH, source={"hidden": 32, "layers": 2}, source_lrs=(2e-3, *SOURCE_RATES), recipes=("default, one rate", *NAMES[BOTH:]),
    ),
    "gpu": Setup(
        {"hidden": 512, "layers": 3}, {"hidden": 512, "layers": 12}, (6_000, 12_000, 24_000), (1_500, 4_000),
        (5e-4, 1e-3, 2e-3), (5e-4, 1e-3, 2e-3), ("Stack, dropped", "IdentityBlocks"), text="packages",
        n_bytes=1_000_000_000, training={"batch": 64, "seq": 512, "warmup": 200},
    ),
}  # fmt: skip
