"""Figures of the campaign: recipes at growth points and budgets, with the curves of the plain runs."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import mean

from bench.harness import RESULTS
from bench.savings.analysis import TUNING, Campaign, Saving, Variant
from bench.savings.campaign import SETUPS, Setup
from bench.savings.jobs import protocol, read_rows
from growkern.advice.scaling import Curve, ScalingLaw, fit

JUDGED = "width", "width, c++", "wider", "depth", "depth, twice", "both"
VOCAB = 256

TrunkKey = tuple[str, tuple[int, int], float, int]  # text, sizes, learning rate, seed


@dataclass(frozen=True, eq=False)
class Trunk:
    """The curve of a plain run: parameters without the input embedding, FLOPs of a byte, and (bytes, held-out loss)."""

    n_params: int
    flops_per_token: float
    points: Curve

    def until(self, flops: float) -> "Trunk":
        """Return the curve up to ``flops``."""
        return replace(
            self, points=[p for p in self.points if p[0] * self.flops_per_token <= flops * 1.001]
        )


@dataclass(frozen=True)
class Figure:
    """Measurement of a recipe at a growth point and a budget."""

    setup: str
    kind: str  # what grows: "width", "depth" or "both"
    variant: Variant
    budget: float  # FLOPs
    saving: Saving
    annealed: float  # worth of the source's training in FLOPs: what the target from scratch needs for the source's annealed loss
    worth: float  # ratio of ``annealed`` to the prediction by a law of the trunks' losses
    losses: Mapping[str, float]  # final losses of from scratch, never grow and grow now
    source: Trunk  # trunk of a seed that grew; the adviser sees the curve up to the growth
    target: Trunk  # trunk of the target; the adviser sees its size, the calibration its curve

    @property
    def charged(self) -> float:
        """Share of the FLOPs that is saved, both phases charged."""
        return self.saving.charged[0]

    @property
    def sunk(self) -> float:
        """Share of the FLOPs that is saved with an existing source."""
        return self.saving.sunk[0]

    @property
    def need(self) -> float:
        """FLOPs that the target from scratch needs for the final loss."""
        return self.budget / (1 - self.charged)


class Rows:
    """The committed rows of a device, by setup."""

    def __init__(
        self, folder: Path = RESULTS, keep: Callable[[int], bool] = lambda seed: True
    ) -> None:
        """Read the rows of a folder; ``keep`` selects the seeds.

        Raises:
            SystemExit: The folder has rows of several devices. Each device has its own version of the texts, and so its own losses.
        """
        self.laws: dict[tuple[Trunk, Trunk | None], ScalingLaw] = {}
        self.before: dict[tuple[Trunk, float], Trunk] = {}
        self.trunks: dict[TrunkKey, Trunk] = {}
        paths = sorted(folder.glob("savings-*.csv"))
        files = [p for p in paths if not p.stem.endswith("-curves")]
        if len(files) > 1:
            names = ", ".join(p.name for p in files)
            raise SystemExit(
                f"{folder} has rows of several devices: {names}. Move all but one out of it."
            )
        rows = [row for p in files for row in read_rows(p)]
        rows = [row for row in rows if keep(int(row["seed"]))]
        self.seeds = sorted({int(row["seed"]) for row in rows} - {TUNING})
        self.protocols = {protocol(SETUPS[name]) for name in JUDGED}
        for path in (p for p in paths if p.stem.endswith("-curves")):
            self._read_curves(read_rows(path))
        self.campaigns = {name: Campaign(SETUPS[name], rows) for name in JUDGED}

    def _read_curves(self, rows: Sequence[Mapping[str, str]]) -> None:
        points: dict[TrunkKey, list[Mapping[str, str]]] = {}
        for row in rows:
            if row["optimizer"] == "adamw" and row["protocol"] in self.protocols:
                sizes = int(row["hidden"]), int(row["layers"])
                key = row["text"], sizes, float(row["lr"]), int(row["seed"])
                points.setdefault(key, []).append(row)
        for key, own in points.items():
            each = float(own[-1]["flops"]) / float(own[-1]["n_bytes"])
            curve = [(float(row["n_bytes"]), float(row["loss"])) for row in own]
            self.trunks.setdefault(
                key, Trunk(int(own[0]["n_params"]) - VOCAB * key[1][0], each, curve)
            )

    def trunk(
        self, text: str, sizes: tuple[int, int], lr: float | None, seeds: Iterable[int]
    ) -> Trunk | None:
        """Return the curve of a size at a learning rate on a text, of the first of ``seeds`` that has a curve."""
        keys = [(text, sizes, lr, seed) for seed in seeds if lr is not None]
        return next((self.trunks[key] for key in keys if key in self.trunks), None)

    @cached_property
    def figures(self) -> list[Figure]:
        """All figures of the campaign."""
        return [
            f for name, campaign in self.campaigns.items() for f in self._figures(name, campaign)
        ]

    def _figures(self, name: str, campaign: Campaign) -> Iterator[Figure]:
        setup = campaign.setup
        plain = setup.target_sizes, setup.source_sizes
        for b, budget in enumerate(campaign.budgets):
            for v in campaign.variants(b):
                saving = campaign.saving(v, b)
                last = campaign.best_lr(setup.target_sizes, len(campaign.budgets) - 1)
                source = self.trunk(setup.text, setup.source_sizes, v.lr, sorted(saving.losses))
                target = self.trunk(setup.text, setup.target_sizes, last, campaign.seeds)
                if source is None or target is None:
                    continue  # the curves are written with the last budget of a run
                law = self.law(source, target)
                at_growth = law.loss(source.n_params, v.grow_at / source.flops_per_token)
                worth = (
                    float(law.tokens(target.n_params, at_growth).median()) * target.flops_per_token
                )
                seeds = sorted(set(saving.losses) & set(campaign.seeds)) or None
                annealed = campaign.worth(v.grow_at, seeds)
                ends = [
                    *(campaign.on(sizes, b, saving.losses) for sizes in plain),
                    saving.losses,
                ]
                losses = {
                    option: mean(by_seed.values())
                    for option, by_seed in zip(
                        ("from scratch", "never grow", "grow now"), ends, strict=True
                    )
                }
                yield Figure(
                    name,
                    kind(setup),
                    v,
                    budget,
                    saving,
                    annealed,
                    annealed / worth,
                    losses,
                    source,
                    target,
                )

    def law(self, first: Trunk, second: Trunk | None) -> ScalingLaw:
        """Return the scaling law of one or two curves; every law is fitted once."""
        if (first, second) not in self.laws:
            self.laws[first, second] = fit([(t.n_params, t.points) for t in (first, second) if t])
        return self.laws[first, second]

    def rate(self, text: str, sizes: tuple[int, int]) -> float | None:
        """Return the best learning rate of a size on a text at the largest budget."""
        for campaign in self.campaigns.values():
            setup = campaign.setup
            if text == setup.text and sizes in (setup.source_sizes, setup.target_sizes):
                b = max((b for s, _, b in campaign.plain if s == sizes), default=None)
                return None if b is None else campaign.best_lr(sizes, b)
        return None


def single_seeds(folder: Path = RESULTS) -> dict[int, Rows]:
    """Return the rows of every seed alone, together with the rows of the tuning seed, whose figures are those of single runs."""
    seeds = Rows(folder).seeds
    return {seed: Rows(folder, lambda s, seed=seed: s in (TUNING, seed)) for seed in seeds}


def kind(setup: Setup) -> str:
    """Return what grows in a setup: ``"width"``, ``"depth"`` or ``"both"``."""
    wider, deeper = (a != b for a, b in zip(setup.source_sizes, setup.target_sizes, strict=True))
    return "both" if wider and deeper else "width" if wider else "depth"
