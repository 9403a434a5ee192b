"""Check that a growth loses no element: where a source is finite its target is finite, and a second moment above 0 stays above 0.

Most targets need no pass over their elements. A scale of at most 1 makes no finite number infinite, noise does so only if it is large,
and the only other numbers in a target are the statistics of its source (means, rows of a method). So ``suspects`` tests statistics,
noise and the few targets with larger scales, all on the device, and only what fails the test is compared element by element.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from growkern.errors import CommitError, raise_all
from growkern.execution import torch_backend as reference
from growkern.execution.fills import BROKEN
from growkern.execution.grouping import grouped
from growkern.execution.measures import CHUNK, MOST, norms_of, of_each
from growkern.execution.tiles import Job, Tiler
from growkern.optimizer.state_rules import Rule
from growkern.planning.growth_plan import TensorRow
from growkern.support.dtypes import arithmetic

NameOf = Callable[[TensorRow, Tensor], str]  # row and target -> name for the user
Statistics = Sequence[tuple[Sequence[Job], list[Tensor]]]
CLEAR = "Clear it before the growth."
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by element size of a float


def check(tiler: Tiler, jobs: Sequence[Job], statistics: Statistics, name_of: NameOf) -> list[str]:
    """Check the targets of jobs that have run; compute means again over finite elements where only the others made them not finite.

    Args:
        tiler: The tiler that cut the targets.
        jobs: The jobs.
        statistics: Jobs, and of each a mean or rows that its target has (``Grouped.statistics``).
        name_of: Function from a row and its target to the name of the tensor.

    Returns:
        Notes on optimizer state that is not finite or has become 0.

    Raises:
        CommitError: Elements would become NaN or infinite; the message names every tensor.
    """
    lost, zeroed = suspects(tiler, jobs, statistics)
    problems, notes = list[str](), list[str]()
    for job in lost:
        row, source, target, rule, *_ = job
        n_lost, name = _n_lost(tiler, job), name_of(row, target)
        n_broken = int(source.isfinite().logical_not().sum())
        if n_broken == source.numel() and rule.is_weight:
            continue  # a model whose checkpoint is not loaded yet (growkern.resume)
        if n_lost and n_broken and not rule.is_weight and rule.missing == "mean":
            _write(tiler, job, finite_only=True)
            n_lost = _n_lost(tiler, job)
            if not n_lost:
                notes.append(
                    f"{name}: {_some(n_broken, source.numel())} not finite, and so are their copies; elements that copy none start "
                    "from the mean of the finite elements."
                )
        if n_lost:
            problems.append(_problem(name, n_lost, n_broken, source, rule))
    raise_all(CommitError, "cannot grow these tensors, so nothing was changed:", problems)
    counts = {name_of(job[0], job[2]): n for job in zeroed if (n := _n_zeroed(tiler, job))}
    if counts:
        names = ", ".join([*counts][:3]) + ("..." if len(counts) > 3 else "")
        notes.append(
            f"{sum(counts.values())} second moments became 0, because their dtype holds no smaller number ({names}): the optimizer "
            "divides their next updates by its epsilon alone."
        )
    return notes


def suspects(
    tiler: Tiler, jobs: Sequence[Job], statistics: Statistics
) -> tuple[list[Job], list[Job]]:
    """Return the jobs whose targets may not be finite, and the jobs whose second moments may be 0; synchronize once per device."""
    larger: dict[tuple[torch.device, torch.dtype], list[Job]] = defaultdict(list)
    noisy: dict[tuple[torch.device, torch.dtype, float], list[Job]] = defaultdict(list)
    may_zero: dict[tuple[torch.device, torch.dtype, float], list[Job]] = defaultdict(list)
    flags: dict[torch.device, list[tuple[Sequence[Job], Tensor]]] = defaultdict(list)
    zeros: dict[torch.device, list[tuple[Sequence[Job], Tensor]]] = defaultdict(list)
    for job in jobs:
        row, source, target, rule, tiling, *_ = job
        if tiling is None or not target.is_floating_point() or not source.numel():
            continue
        reach = job.reach
        if reach.largest > 1 or row.offset or row.noise_std:
            larger[source.device, arithmetic(target.dtype)].append(job)
        elif reach.noise and rule.is_weight:
            noisy[source.device, target.dtype, reach.noise].append(job)
        if reach.smallest < 1 and 2 in (rule.weight, rule.grad) and not rule.quantized:
            may_zero[source.device, source.dtype, reach.smallest].append(job)
    for (device, _), members in larger.items():
        norms = norms_of([job.target for job in members], 2)
        flags[device].append((members, norms.isfinite().logical_not()))
    for (device, dtype, noise), members in noisy.items():
        limits = torch.finfo(dtype)
        room = limits.max * limits.eps / 4  # half a unit in the last place of the largest number
        stds = torch.stack([tiler.stds[job.row.source] for job in members])
        strongest = stds * (noise * 2 * reference.BYTES_MEAN)
        flags[device].append((members, (strongest < room).logical_not()))
    for members, made in statistics:
        if members[0].source.numel() and members[0].target.is_floating_point():
            flags[made[0].device].append((members, _broken(made)))
    for (device, _, smallest), members in may_zero.items():
        zeros[device].append((members, _may_zero([job.source for job in members], smallest)))
    return [*_flagged(flags)], [*_flagged(zeros)]


def _broken(statistics: Sequence[Tensor]) -> Tensor:
    """Return True for each statistic, all of one shape, that is not finite, or whose sum is not, (n,)."""
    if statistics[0].numel() > CHUNK:  # rows of a method
        statistics = of_each(Tensor.sum, statistics)
    return torch.stack([*statistics]).view(len(statistics), -1).sum(1).isfinite().logical_not()


def _flagged(flags: Mapping[torch.device, list[tuple[Sequence[Job], Tensor]]]) -> Iterator[Job]:
    """Yield every job with a flag that is True, once."""
    for entries in flags.values():
        jobs = [job for jobs, _ in entries for job in jobs]
        raised = cast(list[bool], torch.cat([flag for _, flag in entries]).tolist())  # pyright: ignore[reportUnknownMemberType]
        by_target = {id(job[2]): job for job, flag in zip(jobs, raised, strict=True) if flag}
        yield from by_target.values()


def _problem(name: str, n_lost: int, n_broken: int, source: Tensor, rule: Rule) -> str:
    """Return the error line of a tensor."""
    if n_broken:
        return (
            f"{name}: {_some(n_broken, source.numel())} not finite, and a noise strength or a mean that is measured over all elements "
            f"would spread that to {n_lost} target elements. {BROKEN if rule.is_weight else CLEAR}"
        )
    dtype, limit = str(source.dtype).removeprefix("torch."), torch.finfo(source.dtype).max
    way_out = "Convert the model to a dtype of a wider range" if rule.is_weight else CLEAR[:-1]
    return (
        f"{name}: {n_lost} target elements would exceed the largest {dtype}, {limit:g}. {way_out}, or make its largest elements "
        "smaller."
    )


def _some(n: int, total: int) -> str:
    return f"{n} of {total} elements {'is' if n == 1 else 'are'}"


def _n_lost(tiler: Tiler, job: Job) -> int:
    """Count the target elements that are not finite, although the source elements that they copy are."""
    source, target, above = job.source, job.target, job.next_layer
    marked, marked_above = (_marked(t) for t in (source, above))
    copied = _gathered(tiler, job, marked, marked_above)
    return int((target.isfinite().logical_not() & copied.isfinite()).sum())


def _marked(source: Tensor | None) -> Tensor | None:
    """Return 0 for every finite element and NaN for all others."""
    return source if source is None else source - source


def _n_zeroed(tiler: Tiler, job: Job) -> int:
    """Count the target elements that are 0, although the source elements that they copy are above 0."""
    source, target, above = job.source, job.target, job.next_layer
    return int(((_gathered(tiler, job, source, above) > 0) & (target == 0)).sum())


def _gathered(tiler: Tiler, job: Job, source: Tensor | None, above: Tensor | None) -> Tensor:
    """Return copies of other numbers in the place of a job's source, unscaled and without noise; pads are 0."""
    row, _, target, rule, *_ = job
    assert source is not None, "a job has a source"
    plain = replace(rule, weight=0, grad=0, is_weight=False, missing="zero")
    copied = torch.zeros_like(target)
    _write(tiler, tiler.job(row, source, copied, plain, above, job.box, job.mean))
    return copied


def _write(tiler: Tiler, job: Job, *, finite_only: bool = False) -> None:
    """Run one job by the torch backend."""
    reference.expand(grouped(tiler, [job], finite_only=finite_only).groups)


def _may_zero(sources: Sequence[Tensor], scale: float) -> Tensor:
    """Return True for each source, of one dtype, of which a factor ``scale`` may round an element above 0 to 0: (n,) on the device.

    Elements of 0 are common (rows of tokens that never occurred). The bits of positive floats are in the order of the floats, and minus 1
    as unsigned integers they put 0 last, so one minimum finds the smallest element above 0.
    """
    dtype, on_cpu = sources[0].dtype, sources[0].device.type == "cpu"
    limits, kind = torch.finfo(dtype), INTEGERS[dtype.itemsize]
    most = torch.tensor(limits.smallest_normal * limits.eps / scale, dtype=dtype).view(kind)
    largest, first = torch.iinfo(kind).max, int(most)

    def lowest(source: Tensor) -> Tensor:
        """Return the smallest element above 0, as an integer minus 1; on a CPU any larger integer where no element is in question."""
        parts: tuple[Tensor, ...] = torch.split(source.flatten().view(kind), CHUNK if on_cpu else MOST)  # fmt: skip
        low = [(part + largest).amin() for part in parts if not on_cpu or part.amin() <= first]
        return torch.stack(low).amin() if low else torch.tensor(largest, dtype=kind)

    return torch.stack(of_each(lowest, sources)) <= int(most + largest)
