"""The scaling law ``L(N, D) = E + A / N^a + B / D^b``, fitted to loss curves; posterior draws give the uncertainty.

N is the number of parameters, D the number of tokens, and losses are in nats. Exponents and noise are on a grid; at every grid
point the coefficients E, A and B have a Gaussian posterior in closed form, and the grid point is weighted by its marginal
likelihood. Draws with a negative coefficient are rejected. One curve alone cannot tell E from A / N^a: the draws then spread over
all splits that the prior allows, and every interval that depends on the split is wide.

Prior of the exponents: a = 0.35 and b = 0.37, each with a standard deviation of 0.1 (Hoffmann et al., "Training Compute-Optimal
Large Language Models", arXiv:2203.15556, refitted by Besiroglu et al., "Chinchilla Scaling: A replication attempt",
arXiv:2404.10102). Prior of E, A / N^a and B / D^b at the end of the first curve: each is half of the loss there, with a standard
deviation of half of the loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import isfinite, log, pi
from typing import cast

import torch
from torch import Tensor

from growkern.errors import PlanError, raise_all

Curve = Sequence[tuple[float, float]]  # (tokens, loss in nats)

EXPONENTS = (0.35, 0.37)  # prior means of a and b, arXiv:2404.10102
EXPONENT_SD = 0.1
GRID = [0.04 + 0.03 * i for i in range(26)]  # values of a and of b
NOISE = [
    0.001 * 10 ** (i / 3) for i in range(7)
]  # standard deviations of a point, as shares of the loss
RUN_SD = 0.01  # standard deviation between runs of one size (seed, learning rate), as a share of the loss
KEPT_RANGE = 10  # points with fewer than 1/10 of a curve's tokens are warm-up, and left out
N_BINS = 48  # points of a curve in the fit; neighboring points are averaged
N_INDEPENDENT = 12  # weight of a curve, in points: neighboring points are not independent
MIN_POINTS = 5
LEAST_FALL = 1e-4  # least fall of a curve, as a share of its loss
MOST_LOSS = 100.0  # nats; a larger value is no loss of a language model
N_DRAWS = 4000
MIN_DRAWS = 200


@dataclass(frozen=True)
class FittedCurve:
    """A loss curve as the fit uses it.

    Attributes:
        n_params: Number of parameters of the model.
        points: (tokens, loss in nats), averaged over neighboring points, without the warm-up.
        n_read: Number of points of the given curve.
        n_left_out: Number of warm-up points, which the fit leaves out.
    """

    n_params: float
    points: tuple[tuple[float, float], ...]
    n_read: int
    n_left_out: int


@dataclass(frozen=True)
class ScalingLaw:
    """Posterior draws of the law's five parameters, made by ``fit``.

    Attributes:
        draws: Shape (n_draws, 5): E, A / N^a and B / D^b at the reference in nats, a, b.
        reference: N and D at which ``draws`` gives A / N^a and B / D^b: the end of the first curve.
        curves: The curves as the fit uses them.
        noise: Shape (n_draws,): deviation of a run of another size from the law, in nats.

    Example:
        >>> curve = [(3e5 * i / 20, 1 + (i / 20) ** -0.3) for i in range(1, 21)]
        >>> low, middle, high = interval(fit([(58_656, curve)]).loss(58_656, 3e5))
        >>> abs(middle - 2) < 0.01  # the end of the curve
        True
    """

    draws: Tensor = field(repr=False)
    reference: tuple[float, float]
    curves: tuple[FittedCurve, ...] = field(repr=False)
    noise: Tensor = field(repr=False)

    def loss(self, n_params: float, tokens: float | Tensor) -> Tensor:
        """Predict the loss of a model of ``n_params`` parameters after ``tokens`` tokens, in nats: one value per draw."""
        e, at_n, at_d, a, b = self.draws.T
        n, d = self.reference
        tokens = torch.as_tensor(tokens, dtype=torch.float64, device="cpu")
        return e + at_n * (n_params / n) ** -a + at_d * (tokens / d) ** -b

    def tokens(self, n_params: float, loss: Tensor) -> Tensor:
        """Predict the tokens after which a model reaches a loss: one value per draw, infinite if the loss is never reached."""
        e, at_n, at_d, a, b = self.draws.T
        n, d = self.reference
        above = loss - e - at_n * (n_params / n) ** -a
        return torch.where(above > 0, d * (at_d / above.clamp_min(1e-300)) ** (1 / b), torch.inf)

    def __str__(self) -> str:
        e, at_n, at_d, a, b = self.draws.T
        n, d = self.reference
        named = {"E": e, "A": at_n * n**a, "B": at_d * d**b, "a": a, "b": b}
        values = ", ".join(f"{name} = {spread(values)}" for name, values in named.items())
        return f"L = E + A / N^a + B / D^b (nats; N parameters, D tokens): {values}"


def fit(curves: Sequence[tuple[float, Curve]], *, seed: int = 0) -> ScalingLaw:
    """Fit the law to the loss curves of one or more runs.

    Args:
        curves: Pairs of a number of parameters (without the input embedding) and a curve of (tokens, loss in nats). The first is the
            run of interest; every other run may deviate from the law by about 1 % of the loss (seed, learning rate).
        seed: Seed of the draws.

    Returns:
        Draws of the law. Points below a tenth of a curve's last tokens are warm-up and left out.

    Raises:
        PlanError: A curve has fewer than five points after its warm-up, does not fall, or holds a number that is not finite.

    Example:
        >>> curve = [(3e5 * i / 20, 1 + (i / 20) ** -0.3) for i in range(1, 21)]
        >>> law = fit([(58_656, curve), (28_000, [(tokens, loss + 0.1) for tokens, loss in curve])])
        >>> bool(law.loss(58_656, 1e6).median() < law.loss(28_000, 1e6).median())
        True

    Reference:
        Hoffmann et al., "Training Compute-Optimal Large Language Models", arXiv:2203.15556;
        Besiroglu et al., "Chinchilla Scaling: A replication attempt", arXiv:2404.10102.
    """
    check_curves(curves)
    read = tuple(_read(n, points) for n, points in curves)
    reference = read[0].n_params, read[0].points[-1][0]
    scale = read[0].points[-1][1]
    draws = _posterior(read, reference, scale, seed)
    noise = scale * RUN_SD * standard_normal(len(draws), seed=seed + 1)
    return ScalingLaw(draws, reference, read, noise)


def check_curves(curves: Sequence[tuple[float, Curve]]) -> None:
    """Raise PlanError if no law can be fitted to curves."""
    problems = [text for n, points in curves for text in _problems(n, points)]
    if not curves:
        problems.append("no curve was given. Pass at least the curve of the model that trains.")
    raise_all(PlanError, "cannot fit a law to these loss curves:", problems)


def standard_normal(*shape: int, seed: int) -> Tensor:
    """Draw standard normal numbers, float64 on the CPU whatever torch's defaults are."""
    return _normal(shape, _generator(seed))


def deviation(fitted: FittedCurve, curve: Curve) -> float | None:
    """Return how far a fitted curve lies from a curve: mean of the absolute deviations at equal tokens, as shares of the loss.

    Returns:
        None if the curve has no losses at some tokens of the fitted curve.
    """
    last, bin_width = fitted.points[-1][0], KEPT_RANGE ** (1 / N_BINS)
    slack = bin_width**2  # a later end shifts the bins
    read = _binned([point for point in curve if point[0] <= slack * last], last)
    if not read or read[0][0] > slack * fitted.points[0][0] or slack * read[-1][0] < last:
        return None
    return sum(abs(_at(read, d) / loss - 1) for d, loss in fitted.points) / len(fitted.points)


def _at(points: Curve, tokens: float) -> float:
    """Return the loss of a curve at ``tokens``, log-linear between its points and constant beyond them."""
    for (d0, y0), (d1, y1) in pairwise(points):
        if tokens <= d1:
            return y0 + (y1 - y0) * max(0.0, log(tokens / d0)) / log(d1 / d0)
    return points[-1][1]


def interval(values: Tensor, level: float = 0.9) -> tuple[float, float, float]:
    """Return the lower end, median and upper end of the central interval of draws."""
    low, high = (1 - level) / 2, (1 + level) / 2
    quantiles = torch.quantile(values, _tensor([low, 0.5, high]))
    return float(quantiles[0]), float(quantiles[1]), float(quantiles[2])


def spread(values: Tensor) -> str:
    """Format draws as the median and the interval of 90 %."""
    low, middle, high = interval(values)
    return f"{middle:.3g} [{low:.3g}, {high:.3g}]"


def _posterior(
    curves: Sequence[FittedCurve], reference: tuple[float, float], scale: float, seed: int
) -> Tensor:
    """Draw (E, A / N^a, B / D^b, a, b) from the posterior; reject draws with a negative coefficient."""
    rows = [(i, c.n_params, d, loss) for i, c in enumerate(curves) for d, loss in c.points]
    weights = [min(1.0, N_INDEPENDENT / len(curves[i].points)) for i, *_ in rows]
    w, y = _tensor(weights), _tensor([loss for *_, loss in rows])
    n, d = (_tensor([row[c] / reference[c - 1] for row in rows]) for c in (1, 2))
    a, b, sigma = torch.meshgrid(
        _tensor(GRID), _tensor(GRID), scale * _tensor(NOISE), indexing="ij"
    )
    a, b, sigma = a.reshape(-1), b.reshape(-1), sigma.reshape(-1)
    ones = torch.ones(len(a), len(rows), dtype=torch.float64, device="cpu")
    columns = [ones, n ** -a[:, None], d ** -b[:, None]]
    columns += [ones * _tensor([float(i == k) for i, *_ in rows]) for k in range(1, len(curves))]
    x = torch.stack(columns, -1)  # (grid, points, coefficients); every other run has an offset
    mean = _tensor([scale / 2] * 3 + [0.0] * (len(curves) - 1))
    precision = _tensor([scale / 2] * 3 + [scale * RUN_SD] * (len(curves) - 1)) ** -2
    weighted = x.mT * (w / sigma[:, None] ** 2)[:, None, :]
    posterior = weighted @ x + torch.diag(precision)
    towards = weighted @ y + precision * mean
    factor = cast(Tensor, torch.linalg.cholesky(posterior))
    center = torch.cholesky_solve(towards[..., None], factor)[..., 0]
    evidence = (
        -w.sum() / 2 * (2 * pi * sigma**2).log() - (w * y**2).sum() / sigma**2 / 2
        - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) + (center * towards).sum(-1) / 2
    )  # fmt: skip
    for exponent, known in zip((a, b), EXPONENTS, strict=True):
        evidence = evidence - ((exponent - known) / EXPONENT_SD) ** 2 / 2
    generator = _generator(seed)
    cells = torch.multinomial(
        (evidence - evidence.max()).exp(), 5 * N_DRAWS, True, generator=generator
    )
    normal = _normal((len(cells), x.shape[-1], 1), generator)
    moved = cast(Tensor, torch.linalg.solve_triangular(factor[cells].mT, normal, upper=True))[
        ..., 0
    ]
    drawn = torch.cat([(center[cells] + moved)[:, :3], a[cells, None], b[cells, None]], -1)
    kept = drawn[(drawn[:, :3] > 0).all(-1)][:N_DRAWS]
    if len(kept) < MIN_DRAWS:
        raise PlanError(
            f"cannot fit a law to these loss curves: only {len(kept)} of {len(drawn):,} draws have E, A and B above 0. The curves do "
            "not look like E + A / N^a + B / D^b; leave out curves of other data, batch sizes or learning-rate schedules."
        )
    return kept


def _problems(n_params: float, curve: Curve) -> list[str]:
    """Return the reasons why a curve cannot be fitted."""
    name = f"the curve of {n_params:,.0f} parameters"
    if not n_params > 0 or not isfinite(n_params):
        return [f"n_params={n_params}: pass a number of parameters above 0."]
    wrong = [
        (i, p)
        for i, p in enumerate(curve)
        if not (p[0] > 0 and isfinite(p[0]) and 0 < p[1] < MOST_LOSS)
    ]
    if wrong:
        i, (tokens, loss) = wrong[0]
        return [
            f"{name} has {len(wrong)} points that are no numbers, have no tokens, or no loss in nats; the first is point {i}: "
            f"tokens={tokens}, loss={loss}. Leave such points out; convert perplexities to their logarithms."
        ]
    if any(later[0] <= earlier[0] for earlier, later in pairwise(curve)):
        return [
            f"the tokens of {name} do not rise. Sort its points, drop the repeated steps of a resumed run, and count tokens from the start "
            "of the run."
        ]
    points = list(_read(n_params, curve).points) if curve else []
    if len(points) < MIN_POINTS:
        return [
            f"{name} has {len(points)} points after its warm-up (tokens above 1/{KEPT_RANGE} of the last), fewer than {MIN_POINTS}. "
            "Train longer, or log the loss more often."
        ]
    xs = [log(d) for d, _ in points]
    middle = sum(xs) / len(xs)
    slope = sum((x - middle) * loss for x, (_, loss) in zip(xs, points, strict=True))
    fall = -slope / sum((x - middle) ** 2 for x in xs) * (xs[-1] - xs[0])
    if fall < LEAST_FALL * abs(points[-1][1]):
        return [
            f"{name} does not fall: {points[0][1]:.4g} nats at {points[0][0]:,.0f} tokens, {points[-1][1]:.4g} at "
            f"{points[-1][0]:,.0f}. Advice needs a run that learns."
        ]
    return []


def _read(n_params: float, curve: Curve) -> FittedCurve:
    """Drop the warm-up, and average neighboring points in bins of equal width in log tokens."""
    last = curve[-1][0]
    late = [point for point in curve if point[0] * KEPT_RANGE >= last]
    return FittedCurve(n_params, tuple(_binned(late, last)), len(curve), len(curve) - len(late))


def _binned(curve: Curve, last: float) -> list[tuple[float, float]]:
    """Average neighboring points in bins of equal width in log tokens, counted back from ``last``."""
    bins: dict[int, list[tuple[float, float]]] = {}
    for tokens, loss in curve:
        bins.setdefault(int(N_BINS * log(last / tokens) / log(KEPT_RANGE)), []).append(
            (tokens, loss)
        )
    return sorted(
        (sum(d for d, _ in some) / len(some), sum(y for _, y in some) / len(some))
        for some in bins.values()
    )


def _tensor(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed % (1 << 64))


def _normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
