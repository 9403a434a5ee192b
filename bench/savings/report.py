"""Report of a campaign: a table and a verdict per budget, and a picture."""

from collections.abc import Collection, Iterator, Sequence
from math import inf, isnan, nan
from pathlib import Path
from statistics import mean, stdev

from matplotlib.figure import Figure
from rich.table import Table

from bench.savings.analysis import TUNING, Campaign, Losses, Saving
from bench.savings.campaign import SETUPS
from bench.savings.jobs import Job
from growkern.cli.demo_run import flops_needed


def tables(campaign: Campaign) -> Iterator[Table | str]:
    """Yield a table and a verdict for every budget. Runs that never grow are those of the seeds of the best grown run."""
    for b, flops in enumerate(campaign.budgets):
        best = campaign.best(b)
        table = Table(
            title=f"{flops:.3g} FLOPs ({campaign.setup.budgets[b]:,} steps of the target)",
            title_justify="left", caption=EDGE, caption_justify="left",
        )  # fmt: skip
        for name in ("run", "rate"):
            table.add_column(name, no_wrap=True)
        for name in ("n", "loss", "+-", "saves, charged", "saves, sunk", "headroom", "to default"):
            table.add_column(name, justify="right", no_wrap=True)
        seeds = [*best.losses] if best else campaign.seeds
        rows = [_grown(s, campaign.per) for s in campaign.savings(b)]
        rows += [_plain(campaign, b, seeds, *kind) for kind in KINDS]
        for _, cells in sorted(rows):
            table.add_row(*cells)
        yield table
        yield verdict(campaign, b)


KINDS = (("from scratch", "target_sizes"), ("never grows", "source_sizes"))
EDGE = "^: the lowest or the highest learning rate that was tried, so that a better one may exist"


def verdict(campaign: Campaign, budget: int) -> str:
    """Return, as text, whether growing saved compute at this budget."""
    best = campaign.best(budget)
    if best is None:
        return "No run has grown yet."
    scratch, never = (
        mean(campaign.on(getattr(campaign.setup, sizes), budget, best.losses).values())
        for _, sizes in KINDS
    )
    saved, low, high = best.charged
    single = " (the seed that chose)" if best.chose else " (one seed)"
    spread = single if isnan(low) else f" (90 % interval {low:+.0%} to {high:+.0%})"
    name = f"{best.variant.recipe}, grown at {best.variant.grow_at / campaign.per:.0f} steps"
    said = [
        f"Growing saves {saved:.0%} of the compute{spread}: {name}."
        if saved > 0 and not low <= 0
        else f"Growing does not save for certain: {saved:+.0%}{spread}, {name}."
        if saved > 0
        else f"Growing does not save: {saved:+.0%}{spread} at best, {name}.",
        f"With a source that is there already it saves {best.sunk[0]:+.0%}. A free and perfect growth there would save "
        f"{best.headroom:+.0%}, and {best.headroom_sunk:+.0%} with a source that is there already.",
    ]
    loss = mean(best.losses.values())
    if never < min(loss, scratch):
        said.append(
            f"The source that never grows ends lower ({never:.3f}, grown {loss:.3f}, from scratch {scratch:.3f}): the target is "
            "too large for this budget."
        )
    if campaign.at_edge(campaign.setup.target_sizes, budget, best.losses):
        said.append(
            "The rate of the runs from scratch is at the edge of those that were tried: the saving may be less."
        )
    return " ".join(said)


def describe(job: Job) -> str:
    """Describe a job in one line."""
    sizes = "x".join(map(str, job.sizes))
    how = f"{job.recipe} x{job.rate:g} @{job.grow_at:.3g}" if job.recipe else "plain"
    return f"{job.setup.text} {sizes} lr {job.lr:g} seed {job.seed} {how}"


def picture(campaign: Campaign, path: Path) -> None:
    """Draw annealed losses over FLOPs: from scratch, the source that never grows, and five recipes, on equal seeds.

    The recipes are the lowest one of every budget, then those that were measured at most budgets.
    """
    figure = Figure(figsize=(9, 5.4), dpi=150, layout="tight")
    axes = figure.add_subplot()
    for (name, sizes), color in zip(KINDS, ("#9a6700", "#57606a"), strict=True):
        curve = campaign.curve(getattr(campaign.setup, sizes))
        axes.plot(
            [c / 1e12 for c, _ in curve], [loss for _, loss in curve], "o-", color=color, label=name
        )
    points: dict[str, list[tuple[float, float]]] = {}
    for b, flops in enumerate(campaign.budgets):
        shown = campaign.savings(b)
        for s in (s for s in shown if s.n_seeds == shown[0].n_seeds):
            name = f"{s.variant.recipe}, grown at {s.variant.grow_at / campaign.per:.0f}"
            points.setdefault(name, []).append((flops / 1e12, mean(s.losses.values())))
    lowest = (
        {
            min(points, key=lambda name: dict(points[name]).get(c / 1e12, inf)): 0
            for c in campaign.budgets
        }
        if points
        else {}
    )
    more = sorted(points, key=lambda name: (-len(points[name]), points[name][-1][1]))
    for name in [*(lowest | dict.fromkeys(more))][:5]:
        axes.plot(*zip(*points[name], strict=True), "s--", markersize=4, linewidth=1, label=name)
    axes.set(
        xscale="log", xlabel="training compute, both phases (10¹² FLOPs)",
        ylabel="annealed held-out loss (nats per byte)",
        title="{} wide, {} blocks, grown to {} wide, {} blocks ({} text, {})".format(
            *campaign.setup.source_sizes, *campaign.setup.target_sizes, campaign.setup.text, campaign.setup.optimizer
        ),
    )  # fmt: skip
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8)
    figure.savefig(path)


TABLES = "width", "depth", "depth, twice"  # setups with a table of all recipes in README
MORE = "width, c++", "width, muon", "wider", "both"  # setups whose best recipe is in README


def readme(rows: list[dict[str, str]]) -> Iterator[str]:
    """Yield the tables of README: the lowest recipe of every setup that has run, and all recipes of the setups in ``TABLES``."""
    ran = {name: Campaign(SETUPS[name], rows) for name in TABLES + MORE}
    ran = {name: campaign for name, campaign in ran.items() if campaign.complete and campaign.grown}
    yield overview(ran)
    yield from (markdown(ran[name]) for name in TABLES if name in ran)


def markdown(campaign: Campaign) -> str:
    """Return README's table of a setup: landing loss of every recipe, and loss and savings at the first and the last budget."""
    first, last = 0, len(campaign.budgets) - 1
    steps = campaign.setup.budgets
    header = ["run", f"after {campaign.setup.landing} steps"]
    for b in (first, last):
        header += [f"loss at {steps[b]:,}", "saves, charged", "saves, sunk"]
    lines = [header, ["---"] * len(header)]
    kept = {
        b: {s.variant.recipe: s for s in campaign.savings(b) if _early(campaign, s)}
        for b in (first, last)
    }
    for name, s in kept[last].items():
        landed = campaign.landing(s.variant)
        cells = [
            f"`{name}`" + (" (seed 0)" if s.chose else ""),
            "" if landed is None else f"{landed:.3f}",
        ]
        for b in (first, last):
            cells += _cells(kept[b][name]) if name in kept[b] else ["", "", ""]
        lines.append(cells)
    for name, sizes in KINDS:
        cells = [name, ""]
        for b in (first, last):
            cells += [_mean(campaign, b, sizes, campaign.seeds), "", ""]
        lines.append(cells)
    lines.append(
        [
            "headroom",
            "",
            *(cell for b in (first, last) for cell in ("", f"{_headroom(campaign, b):.0%}", "")),
        ]
    )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _mean(campaign: Campaign, budget: int, sizes: str, seeds: Collection[int]) -> str:
    """Return the mean loss of runs that never grow, on the seeds of a grown run; ``^`` if their rate is at the edge."""
    size: tuple[int, int] = getattr(campaign.setup, sizes)
    edge = "^" if campaign.at_edge(size, budget, seeds) else ""
    return f"{mean(campaign.on(size, budget, seeds).values()):.3f}{edge}"


def _early(campaign: Campaign, s: Saving) -> bool:
    """Return True if the variant grows at the setup's first growth point, which all recipes share."""
    return abs(s.variant.grow_at / campaign.per / campaign.setup.grow_at[0] - 1) < 0.01


def _headroom(campaign: Campaign, budget: int) -> float:
    return campaign.headroom(budget, campaign.setup.grow_at[0] * campaign.per)


def _cells(s: Saving) -> list[str]:
    return [
        f"{mean(s.losses.values()):.3f}",
        _share(s.charged, "~" if s.beyond else ""),
        _share(s.sunk, ""),
    ]


def overview(campaigns: dict[str, Campaign]) -> str:
    """Return README's short table: for every setup and budget, the tuned runs and the recipe that was lowest on the tuning seed."""
    header = [
        "setup",
        "FLOPs (steps)",
        "from scratch",
        "never grows",
        "grown",
        "recipe",
        "saves, charged",
        "saves, sunk",
        "headroom",
    ]
    lines = [header, ["---"] * len(header)]
    for name, campaign in campaigns.items():
        setup = campaign.setup
        for b, flops in enumerate(campaign.budgets):
            best = campaign.best(b)
            if best is None:
                continue
            plain = [_mean(campaign, b, sizes, best.losses) for _, sizes in KINDS]
            loss, charged, sunk = _cells(best)
            at = f"`{best.variant.recipe}` at {best.variant.grow_at / campaign.per:.0f}" + (
                " (seed 0)" if best.chose else ""
            )
            lines.append(
                [
                    name,
                    f"{flops:.1e} ({setup.budgets[b]:,})",
                    *plain,
                    loss,
                    at,
                    charged,
                    sunk,
                    f"{best.headroom:.0%}",
                ]
            )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _grown(s: Saving, per: float) -> tuple[tuple[int, float], list[str]]:
    mark = "~" if s.beyond else ""
    middle, error = s.difference or (nan, nan)
    difference = "" if isnan(middle) else f"{middle:+.4f}"
    difference += "" if isnan(error) else f" +- {error:.4f}"
    name = f"{s.variant.recipe} @{s.variant.grow_at / per:.0f}"
    rate = f"{s.variant.lr:g} x {s.variant.rate:g}"
    name += " (seed 0)" if s.chose else ""
    cells = [_share(s.charged, mark), _share(s.sunk, mark), f"{s.headroom:+.0%}", difference]
    return (-s.n_seeds, mean(s.losses.values())), [name, rate, *_losses(s.losses), *cells]


def _plain(
    campaign: Campaign, budget: int, seeds: Sequence[int], name: str, sizes: str
) -> tuple[tuple[int, float], list[str]]:
    size: tuple[int, int] = getattr(campaign.setup, sizes)
    losses = campaign.on(size, budget, seeds)
    curve = campaign.curve(campaign.setup.target_sizes, seeds)
    need, beyond = flops_needed(curve, mean(losses.values()))
    saved = f"{'~' if beyond else ''}{1 - campaign.budgets[budget] / need:+.0%}"
    edge = "^" if campaign.at_edge(size, budget, seeds) else ""
    lr = f"{campaign.rate(size, budget, seeds):g}{edge}"
    order = -len(set(losses) - {TUNING}), mean(losses.values())
    return order, [name, lr, *_losses(losses), saved, "", "", ""]


def _losses(losses: Losses) -> list[str]:
    values = [*losses.values()]
    error = f"{stdev(values) / len(values) ** 0.5:.4f}" if len(values) > 1 else "-"
    return [str(len(values)), f"{mean(values):.4f}", error]


def _share(share: tuple[float, float, float], mark: str) -> str:
    point, low, high = share
    return f"{mark}{point:+.0%}" + ("" if isnan(low) else f" [{low:+.0%}, {high:+.0%}]")
