"""Analysis of a campaign's rows: tuned curves, savings under both accountings, headroom, paired differences, intervals."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import log
from statistics import mean, stdev

from bench.savings.campaign import Setup
from bench.savings.jobs import protocol, unit
from growkern.cli.demo_run import flops_needed

Losses = Mapping[int, float]  # seed -> annealed loss
Curve = Sequence[tuple[float, float]]  # (FLOPs, loss); FLOPs rise and losses fall
TUNING = 0  # the tuning seed, which no figure includes unless no other seed has run
REFERENCE = "default"
T90 = (
    6.314,
    2.920,
    2.353,
    2.132,
    2.015,
    1.943,
    1.895,
    1.860,
    1.833,
)  # Student's t at 95 %, of 1, 2, ... degrees of freedom


@dataclass(frozen=True)
class Variant:
    """A recipe at one growth point, with one factor on the learning rate."""

    recipe: str
    grow_at: float  # FLOPs of the source
    lr: float
    rate: float


@dataclass(frozen=True)
class Saving:
    """Savings of a variant at a budget, as shares of the FLOPs that the target from scratch needs for the same loss.

    A point is the saving of the mean loss over the seeds; its interval is Student's, of 90 %, with the spread of the savings of single
    seeds, where the grown run of a seed is compared with the runs from scratch of the same seed.

    Attributes:
        charged: Saving with the source's FLOPs charged to the run.
        sunk: Saving with an existing source, whose FLOPs are not counted.
        beyond: True if the loss lies outside of the curve of the runs from scratch, so that the curve was extrapolated.
    """

    variant: Variant
    budget: float
    losses: Losses
    charged: tuple[float, float, float]
    sunk: tuple[float, float, float]
    headroom: float
    headroom_sunk: float
    difference: tuple[float, float] | None  # paired, to the reference: mean, standard error
    beyond: bool

    @property
    def n_seeds(self) -> int:
        """Number of seeds, without the tuning seed."""
        return len(set(self.losses) - {TUNING})

    @property
    def chose(self) -> bool:
        """True if only the tuning seed has run, whose figures are no measurement."""
        return set(self.losses) == {TUNING}


def at(curve: Curve, flops: float) -> float:
    """Return the loss of a curve at ``flops``, log-linear between its points and beyond them."""
    pairs = [*pairwise(curve)]
    inside = next((p for p in pairs if p[0][0] <= flops <= p[1][0]), None)
    (c0, l0), (c1, l1) = inside or (pairs[0] if flops < curve[0][0] else pairs[-1])
    return l0 + (l1 - l0) * (log(flops) - log(c0)) / (log(c1) - log(c0))


class Campaign:
    """The rows of one setup."""

    def __init__(self, setup: Setup, rows: Iterable[Mapping[str, str]]) -> None:
        self.setup, self.per = setup, unit(setup)
        self.budgets = [steps * self.per for steps in setup.budgets]
        self.reach = [steps * self.per for steps in (*setup.budgets, *setup.beyond, *setup.early)]
        self.plain: dict[tuple[tuple[int, int], float, int], dict[int, float]] = defaultdict(dict)
        self.grown: dict[tuple[Variant, int], dict[int, float]] = defaultdict(dict)
        self.landed: dict[Variant, dict[int, float]] = defaultdict(dict)
        same = setup.text, setup.optimizer, protocol(setup)
        for row in rows:
            sizes = int(row["hidden"]), int(row["layers"])
            if (row["text"], row["optimizer"], row["protocol"]) != same:
                continue
            budget = min(
                range(len(self.reach)), key=lambda i: abs(self.reach[i] - float(row["budget"]))
            )
            if abs(self.reach[budget] / float(row["budget"]) - 1) > 1e-3:
                continue
            seed, loss = int(row["seed"]), float(row["loss"])
            if not row["recipe"]:
                self.plain[sizes, float(row["lr"]), budget][seed] = loss
            elif (
                sizes == setup.target_sizes
                and (
                    int(row["source_hidden"]),
                    int(row["source_layers"]),
                )
                == setup.source_sizes
            ):
                variant = Variant(
                    row["recipe"], float(row["grow_at"]), float(row["lr"]), float(row["rate"])
                )
                self.grown[variant, budget][seed] = loss
                if row["loss_landed"]:
                    self.landed[variant][seed] = float(row["loss_landed"])

    @property
    def complete(self) -> bool:
        """True when the tuning seed has run source and target to every budget."""
        sizes = self.setup.source_sizes, self.setup.target_sizes
        return all(self.tried(size, b) for size in sizes for b in range(len(self.budgets)))

    def best_lr(self, sizes: tuple[int, int], budget: int) -> float:
        """Return the learning rate whose run of these sizes ends lowest at a budget, on the tuning seed.

        At a growth point, return the rate of the run that grows: the best rate at the first budget.
        """
        if budget >= len(self.setup.budgets) + len(self.setup.beyond):
            budget = 0
        tried = self._tried(sizes, budget)
        return min(tried, key=lambda lr: tried[lr])

    def rate(self, sizes: tuple[int, int], budget: int, seeds: Collection[int]) -> float:
        """Return the learning rate of the runs of these sizes that grown runs of ``seeds`` are compared with.

        Of the rates that all of ``seeds`` have run (the best ones of the tuning seed at any budget), it is the best one on these very
        seeds, which favors the runs that never grow. A source at a growth point keeps the rate of the run that grows.
        """
        plain = {
            lr: [losses[seed] for seed in seeds]
            for (s, lr, b), losses in self.plain.items()
            if (s, b) == (sizes, budget) and losses.keys() >= {*seeds}
        }
        early = budget >= len(self.setup.budgets) + len(self.setup.beyond)
        if early or not seeds or not plain:
            return self.best_lr(sizes, budget)
        return min(plain, key=lambda lr: mean(plain[lr]))

    def at_edge(self, sizes: tuple[int, int], budget: int, seeds: Collection[int]) -> bool:
        """Return True if the learning rate is the lowest or the highest that was tried, so that a better one may exist."""
        tried = self._tried(sizes, budget)
        return self.rate(sizes, budget, seeds) in (min(tried), max(tried))

    def tuned(self, sizes: tuple[int, int], budget: int) -> Losses:
        """Return the losses of the plain run at its best rate; of the tuning seed alone if no other seed has run."""
        return self.on(sizes, budget, ())

    def on(
        self, sizes: tuple[int, int], budget: int, seeds: Collection[int], of: Collection[int] = ()
    ) -> Losses:
        """Return the losses of the plain run at its rate on ``seeds``, of ``of`` (default: of ``seeds``).

        Where none of them has run, return all losses that were measured.
        """
        return _on(self.plain[sizes, self.rate(sizes, budget, seeds), budget], of or seeds)

    @cached_property
    def seeds(self) -> list[int]:
        """Seeds, without the tuning seed, that all runs from scratch have; the tuning seed if there is no other."""
        seeds_by_budget = [
            set(self.tuned(self.setup.target_sizes, b)) for b in range(len(self.budgets))
        ]
        return sorted(set.intersection(*seeds_by_budget))

    def curve(
        self, sizes: tuple[int, int], seeds: Collection[int] | None = None, of: Collection[int] = ()
    ) -> Curve:
        """Return annealed losses at the rates of ``seeds``, averaged over ``of`` (default: over ``seeds``).

        The points are at all budgets, and at ``beyond`` and ``early`` budgets that all seeds have.
        """
        drawn = seeds or self.seeds
        points: list[tuple[float, float]] = []
        for b, flops in enumerate(self.reach):
            if b >= len(self.budgets) and not self._ran(sizes, b, {TUNING, *drawn}):
                continue
            points.append((flops, mean(self.on(sizes, b, drawn, of).values())))
        return sorted(points)

    def tried(self, sizes: tuple[int, int], budget: int) -> bool:
        """Return True if the tuning seed has run these sizes to this budget."""
        return bool(self._tried(sizes, budget))

    def _tried(self, sizes: tuple[int, int], budget: int) -> dict[float, float]:
        """Return learning rate -> annealed loss of the tuning seed."""
        return {
            lr: losses[TUNING]
            for (s, lr, b), losses in self.plain.items()
            if s == sizes and b == budget and TUNING in losses
        }

    def _ran(self, sizes: tuple[int, int], budget: int, seeds: set[int]) -> bool:
        tried = self.tried(sizes, budget)
        return tried and seeds <= {*self.plain[sizes, self.best_lr(sizes, budget), budget]}

    def headroom(self, budget: int, grow_at: float, seeds: Collection[int] | None = None) -> float:
        """Return the share of FLOPs that a free and perfect growth would save.

        After such a growth the target trains on from the point of its own curve that has the source's loss. If the source's
        ``grow_at`` FLOPs are worth ``c`` FLOPs of the target, a run of budget ``B`` ends at the loss that costs
        ``B - grow_at + c`` FLOPs from scratch.
        """
        whole = self.budgets[budget] - grow_at + self.worth(grow_at, seeds)
        return 1 - self.budgets[budget] / whole

    def worth(self, grow_at: float, seeds: Collection[int] | None = None) -> float:
        """Return the FLOPs that the target from scratch needs for the annealed loss of the source at a growth point."""
        source, target = (
            self.curve(sizes, seeds) for sizes in (self.setup.source_sizes, self.setup.target_sizes)
        )
        return flops_needed(target, at(source, grow_at))[0]

    def variants(self, budget: int) -> list[Variant]:
        """Return every recipe at every growth point of this budget, with the best rate on the tuning seed."""
        best: dict[tuple[str, float], tuple[float, Variant]] = {}
        for (variant, b), losses in self.grown.items():
            if b == budget and TUNING in losses:
                key = variant.recipe, variant.grow_at
                if key not in best or losses[TUNING] < best[key][0]:
                    best[key] = losses[TUNING], variant
        return [variant for _, variant in best.values()]

    def saving(self, variant: Variant, budget: int) -> Saving:
        """Return the savings of a variant: means over seeds, and intervals."""
        losses = _measured(self.grown[variant, budget])
        scratch = self.setup.target_sizes
        common = set(losses).intersection(
            *(self.plain[scratch, self.best_lr(scratch, b), b] for b in range(len(self.budgets)))
        )
        seeds = sorted(common) or self.seeds
        losses = {seed: losses[seed] for seed in seeds} if common else losses

        def shares(drawn: Sequence[int]) -> tuple[float, float, bool]:
            curve = self.curve(self.setup.target_sizes, seeds, drawn)
            need, beyond = flops_needed(curve, mean(_on(losses, drawn).values()))
            spent = self.budgets[budget]
            return 1 - spent / need, 1 - (spent - variant.grow_at) / need, beyond

        charged, sunk, beyond = shares(seeds)
        each = [shares([seed]) for seed in seeds]
        spent, worth = self.budgets[budget], self.worth(variant.grow_at, seeds)
        whole = spent - variant.grow_at + worth
        return Saving(
            variant, self.budgets[budget], losses,
            _interval(charged, [c for c, *_ in each]), _interval(sunk, [s for _, s, _ in each]),
            1 - spent / whole, 1 - (spent - variant.grow_at) / whole, self._difference(variant, budget, losses), beyond,
        )  # fmt: skip

    def savings(self, budget: int) -> list[Saving]:
        """Return the savings of every variant: the most seeds first, and of equal seeds the lowest loss first."""
        savings = [self.saving(variant, budget) for variant in self.variants(budget)]
        return sorted(savings, key=lambda s: (-s.n_seeds, mean(s.losses.values())))

    def best(self, budget: int) -> Saving | None:
        """Return the saving of the variant that was lowest on the tuning seed, among those with the most other seeds."""
        savings = self.savings(budget)
        compared = [s for s in savings if s.n_seeds == savings[0].n_seeds]
        return min(compared, key=lambda s: self.grown[s.variant, budget][TUNING], default=None)

    def landing(self, variant: Variant) -> float | None:
        """Return the mean loss of the trunk ``setup.landing`` steps after the growth; None if no run got that far."""
        losses = _measured(self.landed[variant])
        return mean(losses.values()) if losses else None

    def _difference(
        self, variant: Variant, budget: int, losses: Losses
    ) -> tuple[float, float] | None:
        same = [
            v
            for v in self.variants(budget)
            if v.recipe == REFERENCE and v.grow_at == variant.grow_at
        ]
        if not same:
            return None
        other = _measured(self.grown[same[0], budget])
        paired = [losses[seed] - other[seed] for seed in losses if seed in other]
        if not paired:
            return None
        return mean(paired), stdev(paired) / len(paired) ** 0.5 if len(paired) > 1 else float("nan")


def _measured(losses: Losses) -> Losses:
    """Return the losses without the tuning seed; all losses if no other seed has run."""
    return {s: v for s, v in losses.items() if s != TUNING} or losses


def _on(losses: Losses, seeds: Iterable[int]) -> Losses:
    """Return the losses of ``seeds``; all measured losses if none of ``seeds`` has run."""
    return {s: losses[s] for s in seeds if s in losses} or _measured(losses)


def _interval(point: float, values: Sequence[float]) -> tuple[float, float, float]:
    """Return a point with Student's interval of 90 % from the values of the seeds; NaN for a single seed."""
    if len(values) < 2:
        return point, float("nan"), float("nan")
    half = T90[min(len(values) - 1, len(T90)) - 1] * stdev(values) / len(values) ** 0.5
    return point, point - half, point + half
