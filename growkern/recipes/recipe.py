"""A recipe of growth with its measured savings."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, isnan
from typing import Any, cast

from growkern.errors import PlanError, raise_all
from growkern.support.text import table

Interval = tuple[float, float, float]  # lower end, median, upper end: 90 % of the draws
KINDS = {"width": ("width",), "depth": ("depth",), "both": ("width", "depth")}  # kind -> what grows
NOT_NEGATIVE = "a finite number of 0 or more"


class Growth(Mapping[str, Any]):
    """Arguments of ``expand_inplace`` that cannot be changed: one mapping serves every growth of the process. ``dict(growth)`` copies."""

    __slots__ = ("_arguments",)

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self._arguments = dict(arguments)

    def __getitem__(self, name: str) -> Any:
        return self._arguments[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arguments)

    def __len__(self) -> int:
        return len(self._arguments)

    def __repr__(self) -> str:
        return repr(self._arguments)


@dataclass(frozen=True)
class Saved:
    """Measured savings of a recipe, as shares of the FLOPs that the tuned target from scratch needs for the same loss.

    Attributes:
        setup: Name of the sizes and the text in ``bench/savings/campaign.py``.
        grown_at: FLOPs at the growth.
        budget: FLOPs of the whole run.
        charged: Saving with the FLOPs of both phases charged: lower end of the 90 % interval over seeds, mean, upper end.
        sunk: Saving without the source's FLOPs: lower end of the 90 % interval over seeds, mean, upper end.
        headroom: Saving of a free and perfect growth, with the FLOPs of both phases charged.
        n_seeds: Number of seeds, without the seed that tuned learning rates; 0 if only the tuning seed has run: no interval.

    Example:
        >>> saved = growkern.recipes.RECIPES["Sparkling fresh"].saved[0]
        >>> saved.setup, saved.charged, saved.n_seeds
        ('width', (0.309, 0.36, 0.411), 3)
    """

    setup: str
    grown_at: float
    budget: float
    charged: Interval
    sunk: Interval
    headroom: float
    n_seeds: int


@dataclass(frozen=True)
class Recipe:
    """A recipe of growth with its measured savings; ``print`` it.

    A recipe does not say how large the target is: ``to=`` has to name what the recipe's ``kind`` grows. The default of
    ``expand_inplace``, ``to="2x"``, grows width alone, so that a recipe for depth without ``to={"layers": ...}`` would double the width.
    ``lr_factor`` and ``rewarm`` belong to the training loop: ``expand_inplace`` does not apply them.

    Attributes:
        name: Name in the rows of ``bench/results/savings-*.csv``.
        kind: ``"width"``, ``"depth"`` or ``"both"``.
        kept: Share of the worth of the source's training that the growth keeps; 1 for a free and perfect growth. The worth is the number
            of FLOPs after which the target from scratch reaches the source's loss. Mean over runs.
        sd: Standard deviation of ``kept`` of a single run, over seeds and setups.
        n: Number of measured runs: setups, growth points and seeds.
        growth: Arguments of ``expand_inplace`` and of events, besides ``to``; a mapping that cannot be changed.
        lr_factor: Factor on all learning rates after the growth, besides the factors of ``dynamics``. ``growth`` does not contain the
            factor: multiply the ``lr`` of the param groups, and the scheduler's ``base_lrs``.
        rewarm: Steps over which the learning rate rises again from zero if the state is dropped. The training loop has to apply the
            warm-up, like ``lr_factor``.
        saved: Measured savings by setup and budget.
        worth: Mean and standard deviation of the ratio of the measured to the predicted worth of the source's training. The measurement
            uses annealed losses, the prediction a law fitted to losses at a constant learning rate; a small model at a large learning
            rate gains more from annealing.
        pace: Mean and standard deviation, over runs, of the FLOPs that a FLOP after the growth is worth to the target from scratch: 1 for
            a free and perfect growth, less than 1 if copies stay alike, more than 1 if the target trains slowly from scratch. A run that
            grows after g of B FLOPs ends at the loss of the target from scratch after ``pace * (B - g) + kept * worth`` FLOPs.

    Raises:
        PlanError: A field has a value of another kind; every field at once.

    Example:
        >>> recipe = growkern.recipes.RECIPES["Sparkling fresh"]
        >>> recipe.kind, recipe.how
        ('width', "dynamics=None, state='drop', width=Sparkling(fan_out='random', fan_in='zero'), learning rate x 0.5, 60 steps of warm-up")
        >>> report = growkern.expand_inplace(model, optim, to="2x", **recipe.growth)
        >>> for group in optim.param_groups:
        ...     group["lr"] *= recipe.lr_factor  # and the scheduler's base_lrs
        >>> stack = growkern.recipes.RECIPES["Stack"]  # of the kind "depth"
        >>> event = growkern.At(step=1000, to={"layers": "2x"}, **stack.growth)
        >>> both = growkern.recipes.RECIPES["Sparkling fresh and Stack"]  # of the kind "both"
        >>> event = growkern.At(step=1000, to={"hidden": "2x", "layers": "2x"}, **both.growth)
    """

    name: str
    kind: str
    kept: float
    sd: float
    n: int
    growth: Mapping[str, Any] = field(default_factory=dict[str, Any], hash=False)
    lr_factor: float = 1.0
    rewarm: int = 0
    saved: tuple[Saved, ...] = ()
    worth: tuple[float, float] = (1.0, 0.0)
    pace: tuple[float, float] = (1.0, 0.0)

    def __post_init__(self) -> None:
        spread = f"mean and standard deviation, each {NOT_NEGATIVE}"
        checks = (
            ("kind", f"one of {', '.join(KINDS)}", self.kind in [*KINDS]),
            ("kept", "a finite number", _is_finite(self.kept)),
            ("sd", NOT_NEGATIVE, _is_not_negative(self.sd)),
            ("n", "a whole number of 0 or more", type(self.n) is int and self.n >= 0),
            ("growth", "a mapping of arguments of expand_inplace", _is_mapping(self.growth)),
            ("worth", spread, _is_spread(self.worth)),
            ("pace", spread, _is_spread(self.pace)),
        )
        problems = [
            f"{name}={getattr(self, name)!r}: pass {wanted}."
            for name, wanted, is_right in checks
            if not is_right
        ]
        raise_all(PlanError, f"recipe {self.name!r}:", problems)
        object.__setattr__(self, "growth", Growth(self.growth))

    @property
    def how(self) -> str:
        """Arguments of ``expand_inplace``, learning-rate factor and warm-up, as text."""
        if not self.n:
            return "not measured"
        said = [f"{name}={value!r}" for name, value in self.growth.items()]
        said += [f"learning rate x {self.lr_factor:g}"] if self.lr_factor != 1 else []
        said += [f"{self.rewarm} steps of warm-up"] if self.rewarm else []
        return ", ".join(said) or "the defaults of expand_inplace"

    @property
    def runs(self) -> str:
        """Number of measured runs, as text."""
        return f"{self.n} run" if self.n == 1 else f"{self.n} runs"

    @property
    def effect(self) -> str:
        """``kept`` and ``pace`` with their intervals of 90 %, as text."""
        pace, sd = self.pace
        return (
            f"keeps {self.kept:.0%} +- {1.645 * self.sd:.0%} of what the source's training is worth, and then trains at {pace:.2f} +- "
            f"{1.645 * sd:.2f} x the pace of the target from scratch"
        )

    def __str__(self) -> str:
        header = [
            "setup",
            "grown at",
            "FLOPs",
            "saves, charged",
            "saves, sunk",
            "headroom",
            "seeds",
        ]
        rows = [
            [
                s.setup, f"{s.grown_at:.3g}", f"{s.budget:.3g}", share(s.charged), share(s.sunk), f"{s.headroom:.0%}",
                s.n_seeds or "the one that tuned",
            ]
            for s in self.saved
        ]  # fmt: skip
        lines = [
            f"{self.name} ({self.kind}): {self.how}",
            f"It {self.effect}, in {self.runs}.",
        ]
        return "\n".join([*lines, "", table(header, rows)] if rows else lines)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _is_mapping(value: object) -> bool:
    return isinstance(value, Mapping)


def _is_not_negative(value: object) -> bool:
    return _is_finite(value) and cast(float, value) >= 0


def _is_spread(values: object) -> bool:
    """Return True for a pair of finite numbers of 0 or more."""
    pair = cast(Sequence[object], values) if isinstance(values, tuple | list) else ()
    return len(pair) == 2 and all(map(_is_not_negative, pair))


def share(interval: Interval) -> str:
    """Format a measured share, with the interval if there is one: ``18 % [11, 24]``."""
    low, middle, high = interval
    spread = "" if isnan(low) else f" [{100 * low:.0f}, {100 * high:.0f}]"
    return f"{100 * middle:.0f} %{spread}"
