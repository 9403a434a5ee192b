"""Jobs of a campaign. Each job trains one run in a worker process and returns rows. Finished jobs are not run again."""

import csv
import os
import site
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import asdict, dataclass, field
from functools import cache
from hashlib import blake2b
from math import isfinite, nan
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

from bench.harness import cell, machine, slug
from bench.savings.campaign import RECIPES, Setup, Sizes
from growkern.cli.demo_run import (
    Corpus,
    Run,
    Training,
    build,
    flops_per_step,
    read_corpus,
    read_files,
)

KEY = (
    "text", "optimizer", "protocol", "hidden", "layers", "source_hidden", "source_layers", "recipe", "lr", "rate", "seed", "grow_at",
)  # fmt: skip
# flops and n_bytes: of the trunk, where the branch that anneals to the budget starts; loss: at the end of the branch, the budget
COLUMNS = (
    *KEY, "budget", "flops", "n_bytes", "n_params", "loss", "trunk_loss", "loss_before", "loss_after", "loss_landed", "seconds", "commit",
    "date", "device", "torch",
)  # fmt: skip
ROW = (*KEY, "budget")  # columns that identify a row
PLAIN = (
    "text",
    "optimizer",
    "protocol",
    "hidden",
    "layers",
    "lr",
    "seed",
)  # columns that identify a curve
CURVE = (
    *PLAIN, "flops", "n_bytes", "n_params", "train_loss", "loss",
)  # fmt: skip
FRESH = (
    10_000  # offset from the seed of a run to the seed of the fresh weights that perturb the run
)
POINTS = 24  # losses of the trunk on a curve, evenly spread in log-FLOPs
Key = tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """One run: plain, or grown at ``grow_at`` FLOPs from the snapshot of a plain run.

    Attributes:
        setup: Setup of the comparison.
        sizes: ``(hidden, layers)`` that the run ends with.
        lr: Peak learning rate; of a grown run, the rate of the source.
        seed: Seed of weights, batches and symmetry-breaking noise.
        recipe: Name of a recipe; empty for a plain run.
        rate: Factor on the learning rate after growth.
        grow_at: FLOPs at which the run grows.
        saves: FLOPs at which a plain run saves snapshots.
    """

    setup: Setup = field(repr=False, hash=False)
    sizes: tuple[int, int]
    lr: float
    seed: int
    recipe: str = ""
    rate: float = 1.0
    grow_at: float = 0.0
    saves: tuple[float, ...] = ()

    @property
    def key(self) -> Key:
        """Values of the columns ``KEY``, which identify the run in the file of rows."""
        source = tuple(self.setup.source.values()) if self.recipe else ("", "")
        at = f"{self.grow_at:.4g}" if self.recipe else ""
        values = (
            self.setup.text, self.setup.optimizer, protocol(self.setup), *self.sizes, *source, self.recipe,
            f"{self.lr:g}", f"{self.rate:g}", self.seed, at,
        )  # fmt: skip
        return tuple(map(str, values))

    @property
    def budgets(self) -> list[float]:
        """FLOPs of the budgets that the run can serve: budgets whose branch begins after the last growth."""
        via = RECIPES[self.recipe].via if self.recipe else ()
        last = max([self.grow_at, *(self.grow_at * multiple for _, multiple in via)])
        trunk = 1 - Training(**self.setup.training).anneal
        scratch, source = self.setup.target_sizes, self.setup.source_sizes
        more = {scratch: self.setup.beyond, source: self.setup.early}
        steps = sorted(self.setup.budgets + (() if self.recipe else more.get(self.sizes, ())))
        per = unit(self.setup)
        ends = [n * per for n in steps]
        return [end for end in ends if last <= trunk * end]

    def snapshot(self, work: Path, at: float) -> Path:
        """Return the path of the snapshot that a plain run saves and grown runs start from."""
        sizes = "x".join(map(str, self.setup.source.values()))
        run = f"{self.setup.text}-{self.setup.optimizer}-{protocol(self.setup)}-{sizes}"
        return work / f"{run}-lr{self.lr:g}-seed{self.seed}-at{at:.4g}.pt"


@dataclass
class Done:
    """Results of a job: a row per annealed branch, and points of the trunk's curve."""

    rows: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    curve: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])


def unit(setup: Setup) -> float:
    """Return the FLOPs of one step of the target."""
    return flops_per_step(build(setup.target, 0), Training(**setup.training))


def protocol(setup: Setup) -> str:
    """Return a digest of the training settings and of the amount of text, so that rows of other experiments are other rows."""
    settings = asdict(Training(**setup.training)) | {"n_bytes": setup.n_bytes}
    return blake2b(repr(sorted(settings.items())).encode(), digest_size=4).hexdigest()


@cache
def corpus(text: str, n_bytes: int, device: str) -> Corpus:
    """Read one of the texts: Python's library, the C++ headers of torch, or the Python of all installed packages."""
    if text == "python":
        return read_corpus(n_bytes, device)
    if text == "c++":
        files = sorted((Path(torch.__file__).parent / "include").rglob("*.h"))
    else:
        roots = [sysconfig.get_path("stdlib"), *site.getsitepackages()]
        files = sorted({path for root in roots for path in Path(root).rglob("*.py")})
    return read_files(files, n_bytes, device, text)


def run(job: Job, work: Path, device: str) -> Done:
    """Train one run through all budgets."""
    if device == "cpu":
        torch.set_num_threads(1)
    else:
        torch.set_float32_matmul_precision("high")
    return _Trial(job, work, device).run()


class _Trial:
    """A job in progress: the trunk, events by FLOPs, and results."""

    def __init__(self, job: Job, work: Path, device: str) -> None:
        self.job, self.work, self.started, self.done = job, work, perf_counter(), Done()
        setup = job.setup
        self.training = Training(**setup.training)
        self.ends = job.budgets
        self.losses: list[float] = []
        self.grown: dict[str, float] = {}
        sizes = setup.source if job.recipe else {"hidden": job.sizes[0], "layers": job.sizes[1]}
        text = corpus(setup.text, setup.n_bytes, device)
        self.trunk = Run(sizes, job.lr, job.seed, text, self.training, optimizer=setup.optimizer)
        self.events: list[tuple[float, Callable[[], object]]] = []
        if job.recipe:
            at = job.snapshot(work, job.grow_at)
            self.trunk.restore(_read(at))
            self._plan_growths()
        else:
            first, last = (
                setup.budgets[0] * unit(setup) / 20,
                self.ends[-1] * (1 - self.training.anneal),
            )
            for i in range(POINTS):
                self.events.append((first * (last / first) ** (i / (POINTS - 1)), self._point))
            for at in job.saves:
                self.events.append((at, lambda at=at: self._save(at)))
        self.events.sort(key=lambda event: event[0])

    def run(self) -> Done:
        """Train the trunk, and anneal a branch for every budget that the run can serve."""
        for end in self.ends:
            start = (1 - self.training.anneal) * end
            while self.events and self.events[0][0] <= start:
                flops, event = self.events.pop(0)
                self.losses += self.trunk.train_until(flops)
                event()
            self.losses += self.trunk.train_until(start)
            self._branch(end)
        return self.done

    def _branch(self, end: float) -> None:
        trunk = self.trunk
        values = dict(zip(KEY, self.job.key, strict=True)) | {
            "budget": end, "n_params": trunk.n_params, "trunk_loss": trunk.evaluate(), "loss": trunk.annealed(end)[1],
            "flops": trunk.flops, "n_bytes": trunk.n_bytes, "seconds": perf_counter() - self.started,
        }  # fmt: skip
        self.done.rows.append(values | self.grown | machine())

    def _point(self) -> None:
        trunk, recent = self.trunk, self.losses
        if not recent:
            return
        values = dict(zip(KEY, self.job.key, strict=True)) | {
            "flops": trunk.flops, "n_bytes": trunk.n_bytes, "n_params": trunk.n_params,
            "train_loss": sum(recent) / len(recent), "loss": trunk.evaluate(),
        }  # fmt: skip
        self.done.curve.append(values)
        self.losses = []

    def _save(self, at: float) -> None:
        path = self.job.snapshot(self.work, at)
        part = path.with_suffix(f".{os.getpid()}.part")  # another campaign may save the same run
        torch.save(self.trunk.snapshot(), part)
        part.rename(path)

    def _plan_growths(self) -> None:
        """Schedule the first growth now and, if the recipe has intermediate sizes, further growths later."""
        recipe, at = RECIPES[self.job.recipe], self.job.grow_at
        stages = [*(sizes for sizes, _ in recipe.via), self.job.setup.target]
        times = [0.0, *(at * multiple for _, multiple in recipe.via)]
        for i, (when, sizes) in enumerate(zip(times, stages, strict=True)):
            self.events.append((when, lambda i=i, sizes=sizes: self._grow(i, sizes)))

    def _grow(self, i: int, sizes: Sizes) -> None:
        recipe, trunk = RECIPES[self.job.recipe], self.trunk
        before = trunk.evaluate()
        rate = self.job.rate if i == 0 else 1.0
        trunk.grow(
            to=dict(sizes), seed=self.job.seed + i, rate=rate, rewarm=recipe.rewarm, **recipe.growth
        )
        if i == 0 and recipe.keep < 1:
            shrink_and_perturb(trunk.model, build(sizes, self.job.seed + FRESH), recipe.keep)
        self.grown |= {"loss_before": before, "loss_after": trunk.evaluate()}
        self.events.append((trunk.flops + self.job.setup.landing * trunk.cost, self._land))
        self.events.sort(key=lambda event: event[0])

    def _land(self) -> None:
        self.grown["loss_landed"] = self.trunk.evaluate()


def _read(path: Path) -> Any:
    try:
        return torch.load(path, weights_only=False)
    except Exception as error:
        raise SystemExit(
            f"{path}: the snapshot cannot be read ({error}). Delete the file; its run runs again."
        ) from None


@torch.no_grad()
def shrink_and_perturb(model: nn.Module, fresh: nn.Module, keep: float) -> None:
    """Average every parameter with the parameter of a fresh model of the same sizes: ``keep * p + (1 - keep) * fresh``."""
    for p, new in zip(model.parameters(), fresh.parameters(), strict=True):
        p.lerp_(new.to(p.device), 1 - keep)


class Ledger:
    """The files of rows: annealed losses in ``savings-<device>.csv``, trunk curves in ``savings-<device>-curves.csv``."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"savings-{slug(machine()['device'])}"
        self.rows_path, self.curve_path = folder / f"{name}.csv", folder / f"{name}-curves.csv"

    def rows(self) -> list[dict[str, str]]:
        """Return all rows so far."""
        return read_rows(self.rows_path)

    def finished(self, job: Job) -> bool:
        """Return True if every budget that the job can serve has a row."""
        return {(*job.key, f"{end:.5g}") for end in job.budgets} <= self._known()

    def append(self, done: Done) -> None:
        """Append the results of a job that the files do not contain yet; the first row of a file comes with a header."""
        known = self._known()
        rows = [row for row in done.rows if tuple(str(cell(row[k])) for k in ROW) not in known]
        curves = {tuple(row[k] for k in PLAIN) for row in read_rows(self.curve_path)}
        points = [p for p in done.curve if tuple(str(cell(p[k])) for k in PLAIN) not in curves]
        _append(self.rows_path, COLUMNS, rows)
        _append(self.curve_path, CURVE, points)

    def _known(self) -> set[tuple[str, ...]]:
        return {tuple(row[name] for name in ROW) for row in self.rows()}


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file; none if there is no file. A last line that a kill has truncated is ignored.

    Raises:
        SystemExit: A row is incomplete, a loss is not finite, two rows of a run have different losses, or the file is of an older version.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    rows = list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))
    if rows and "protocol" not in rows[0]:
        raise SystemExit(f"{path}: the rows have no column 'protocol'; move the file away.")
    seen: dict[tuple[str, ...], str] = {}
    for line, row in enumerate(rows, 2):
        if None in row or None in row.values() or not isfinite(_number(row.get("loss"))):
            raise SystemExit(
                f"{path}, line {line}: not a whole row of the campaign. Delete the line; its run runs again."
            )
        if (
            "budget" in row
            and seen.setdefault(tuple(row[k] for k in ROW), row["loss"]) != row["loss"]
        ):
            raise SystemExit(
                f"{path}, line {line}: another row of the same run has another loss. Delete the wrong one."
            )
    return rows


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return nan


def _append(path: Path, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    if path.exists():  # remove a last line that a kill has truncated
        with path.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
    is_new = not path.exists() or not path.stat().st_size
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows({k: cell(v) for k, v in row.items()} for row in rows)


def run_all(
    jobs: Iterable[Job], ledger: Ledger, work: Path, *, pool: Executor, device: str, on_done: Callable[[Job, Done, str], object]
) -> None:  # fmt: skip
    """Run jobs that have no rows yet in the worker processes of a pool.

    ``on_done`` gets the job, its results, and the count of finished jobs in this round, as text. A plain run runs again if a snapshot
    that grown runs start from is missing.
    """
    work.mkdir(parents=True, exist_ok=True)
    known: list[Job] = []
    for job in dict.fromkeys(jobs):
        missing = [at for at in job.saves if not job.snapshot(work, at).exists()]
        if missing or not ledger.finished(job):
            known.append(job)
    futures = {pool.submit(run, job, work, device): job for job in known}
    for n, future in enumerate(as_completed(futures), 1):
        job, done = futures[future], future.result()
        ledger.append(done)
        on_done(job, done, f"{n}/{len(known)}")
