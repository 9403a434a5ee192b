"""The demo: a byte-level Llama trains on the source text of Python's library, doubles its width, gains layers and trains on.

The baselines at equal FLOPs are the target from scratch, at the best of three learning rates, and the source, which never grows.
All runs see the same text and the same batches under one WSD schedule, annealed to zero. The verdict is computed from these runs.
All figures rest on one seed; ``python -m bench.savings`` measures with several.
"""

# pyright: reportUnknownMemberType=false
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from growkern.cli.demo_picture import draw
from growkern.cli.demo_run import (
    Growth,
    Line,
    Run,
    Training,
    build,
    flops_needed,
    flops_per_step,
    parted,
    read_corpus,
    tuned,
)
from growkern.engine.report import GrowthReport
from growkern.errors import GrowthError

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

Sizes = Mapping[str, int]
TOLERANCE = 1e-4  # nats by which a growth may move the validation loss
FIRST = 0.5  # share of the budget at which the curve of the runs from scratch begins
SEVERAL = "These figures rest on one seed; python -m bench.savings measures with several"


@dataclass(frozen=True, slots=True)
class Setup:
    """Sizes and training of the demo.

    Attributes:
        source: Sizes of the source.
        growths: Share of the budget, and target sizes, of each growth.
        target: Sizes after the last growth.
        budget: FLOPs of every run, in steps of the target.
        lr: Peak learning rate of the source; growths multiply learning rates by the factors of ``dynamics="mup"``.
        scratch_lrs: Peak learning rates at which the target trains from scratch.
        training: Training settings of all runs.
        n_points: Approximate number of validation losses on a curve.
        n_bytes: Maximum bytes of text.
    """

    source: Sizes = field(default_factory=lambda: {"hidden": 32, "layers": 4})
    growths: tuple[tuple[float, str | Sizes], ...] = ((0.25, "2x"), (0.5, {"layers": 6}))
    target: Sizes = field(default_factory=lambda: {"hidden": 64, "layers": 6})
    budget: int = 640
    lr: float = 8e-3
    scratch_lrs: tuple[float, ...] = (2e-3, 4e-3, 8e-3)
    training: Training = field(default_factory=Training)
    n_points: int = 16
    n_bytes: int = 6_000_000


FULL = Setup()
QUICK = Setup(
    source={"hidden": 32, "layers": 2},
    growths=((0.25, "2x"), (0.5, {"layers": 3})),
    target={"hidden": 64, "layers": 3},
    budget=24,
    training=Training(warmup=5, n_eval=8, n_trunk=8),
    n_points=5,
    n_bytes=1_000_000,
)


def run(
    out: Path, *, seed: int = 0, compare: bool = True, device: str = "cpu", setup: Setup = FULL
) -> Path:
    """Train, grow, train on, compare, and draw.

    Args:
        out: Folder of the picture; created if missing.
        seed: Seed of weights, batches and growth noise.
        compare: True to also train the target from scratch and the source without growth, at equal FLOPs.
        device: Name of the torch device to train on.
        setup: Sizes and training.

    Returns:
        Path of the picture.

    Raises:
        GrowthError: A growth moved the validation loss by more than 1e-4, or Python's source text is not installed.
        ModuleNotFoundError: An extra is missing.
    """
    # a missing extra raises now, not after minutes
    import matplotlib  # noqa: F401  # pyright: ignore[reportUnusedImport]
    import transformers  # noqa: F401  # pyright: ignore[reportUnusedImport]
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    out.mkdir(parents=True, exist_ok=True)
    text = read_corpus(setup.n_bytes, device)
    (console := Console()).print(
        f"{len(text[0]):,} bytes of Python's library to train on, {len(text[1]):,} held out, on {device}"
    )
    budget = setup.budget * flops_per_step(build(setup.target, seed, "meta"), setup.training)
    name, loss = TextColumn("{task.description}"), TextColumn("loss {task.fields[loss]}")
    with Progress(
        name, BarColumn(), TaskProgressColumn(), loss, TimeElapsedColumn(), console=console
    ) as bars:

        def train(name: str, sizes: Sizes, lr: float, *ends: float, grows: bool = False) -> Line:
            trunk = Run(sizes, lr, seed, text, setup.training)
            growths = [(share * budget, to) for share, to in setup.growths] if grows else []
            every = budget / setup.n_points
            return _train(name, trunk, [*ends, budget], growths, every, seed, bars)

        lines = [train("grown", setup.source, setup.lr, grows=True)]
        if compare:
            after = budget - lines[0].growths[0].flops  # what the grown run spends after its source
            for lr in setup.scratch_lrs:
                title = f"from scratch, lr {lr:g}"
                lines.append(train(title, setup.target, lr, FIRST * budget, after))
            lines.append(train("never grows", setup.source, setup.lr))
    console.print(summary(lines))
    draw(lines, verdict(lines), path := out / "loss.png")
    console.print(f"{verdict(lines)}\n\n{path}", highlight=False, markup=False, soft_wrap=True)
    return path


def _train(
    name: str, trunk: Run, ends: Sequence[float], growths: list[tuple[float, str | Sizes]], every: float, seed: int,
    bars: "Progress",
) -> Line:  # fmt: skip
    """Train a trunk with its growths, and anneal a branch to each of ``ends``. Every run uses this function."""
    done, start = Line(name), perf_counter()
    bar = bars.add_task(name, total=ends[-1], loss="")
    measured = 0.0
    for end in ends:
        while trunk.flops < (1 - trunk.training.anneal) * end:
            if growths and trunk.flops >= growths[0][0]:
                done.growths.append(grow(trunk, growths.pop(0)[1], seed, bars))
            loss = trunk.step()
            if trunk.flops >= measured:
                done.curve.append((trunk.flops, trunk.evaluate()))
                measured = trunk.flops + every
            bars.update(bar, completed=trunk.flops, loss=f"{loss:.3f}")
        done.curve.append((trunk.flops, trunk.evaluate()))
        done.starts.append(done.curve[-1])
        done.ends.append(trunk.annealed(end))
    bars.update(bar, completed=ends[-1], loss=f"{done.loss:.3f}")
    done.seconds, done.n_params = perf_counter() - start, trunk.n_params
    return done


def grow(trunk: Run, to: str | Sizes, seed: int, bars: "Progress") -> Growth:
    """Grow a run by the default methods, and show the report and the loss before and after.

    Raises:
        GrowthError: The growth moved the validation loss.
    """
    before = trunk.evaluate()
    report = trunk.grow(to=to, seed=seed)
    growth = Growth(trunk.flops, label(report), before, trunk.evaluate())
    moved = abs(growth.after - growth.before)
    row = growth.label, f"{growth.before:.7f}", f"{growth.after:.7f}", f"{moved:.1e}"
    bars.console.print(f"\n{report}\n", highlight=False, markup=False, soft_wrap=True)
    bars.console.print(_table(("growth", "validation loss before", "after", "difference"), [row]))
    if not moved <= TOLERANCE:  # NaN raises too
        raise GrowthError(
            f"{growth.label}: the validation loss went from {row[1]} to {row[2]}; growth may move it by {TOLERANCE:g}."
        )
    return growth


def label(report: GrowthReport) -> str:
    """Return the first size that grew, as text: ``width 64 → 128``."""
    name, n = next(
        (name, n) for name, n in report.source_sizes.items() if report.target_sizes[name] != n
    )
    return f"{'width' if name == 'hidden' else name} {n} → {report.target_sizes[name]}"


def summary(lines: list[Line]) -> "Table":
    """Return a table with one row per run."""
    rows = [
        (
            line.name,
            f"{line.loss:.4f}",
            f"{line.flops:.3e}",
            f"{line.n_params:,}",
            f"{line.seconds:.0f}",
        )
        for line in lines
    ]
    head = ("run", "annealed loss", "FLOPs", "parameters", "seconds")
    return _table(head, rows)


def verdict(lines: list[Line]) -> str:
    """Return the measured result in a few lines; the first line is the title of the picture."""
    grown, *others = lines
    if not others:
        labels = ", ".join(growth.label for growth in grown.growths)
        moved = max(abs(growth.after - growth.before) for growth in grown.growths)
        return f"Grown while it trained: {labels}\nno growth moved the validation loss by more than {moved:.1e}"
    _, scratch, never = parted(lines)
    curve = tuned(scratch)
    need, beyond = flops_needed(curve, grown.loss)
    spent, source = grown.flops, grown.growths[0].flops
    (_, later), (_, equal) = curve[-2:]
    beaten = never.loss < min(grown.loss, equal)
    sentences = [
        f"Growing {_saves(1 - spent / need, beyond)}, both phases charged{'; never growing beats both' if beaten else ''}",
        f"Where the source is there already, growing {_saves(1 - (spent - source) / need, beyond)}",
        f"Grown: {grown.loss:.3f} nats per byte. From scratch, best of {len(scratch)} learning rates: {equal:.3f} at equal FLOPs, "
        f"{later:.3f} at the FLOPs after the source",
    ]
    if beaten:
        sentences.append(
            f"The source that never grows ends lower, at {never.loss:.3f}: the target is too large for this budget"
        )
    return "\n".join([*sentences, SEVERAL])


def _saves(share: float, beyond: bool) -> str:
    """Describe a share of saved FLOPs; ``beyond``: the curve from scratch was extrapolated."""
    about = "about " if beyond else ""
    if abs(share) < 0.005:
        return f"saves {about}nothing"
    if share > 0:
        return f"saves {about}{share:.0%} of the compute"
    return f"does not save: {about}{-share:.0%} more compute"


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> "Table":
    from rich.table import Table

    table = Table(*header, header_style="bold")
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    return table
