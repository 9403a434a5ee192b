"""Compute staged target tensors from a plan and source tensors. No model is needed, and no live tensor is written.

Targets are cut into pieces; a backend writes the pieces of each device, all at once or one set of tensors after the other.
"""

from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec

import torch
from torch import Tensor

from growkern.distributed.gather import Gather
from growkern.distributed.shards import Box, box_of, is_sharded, joined, local, part
from growkern.errors import CommitError, GrowthError, PlanError, raise_all
from growkern.execution import torch_backend as reference
from growkern.execution.fills import Given
from growkern.execution.finite import check
from growkern.execution.grouping import grouped
from growkern.execution.measures import SumsOf
from growkern.execution.perturb import finish
from growkern.execution.pieces import Group
from growkern.execution.rows import SourceReader
from growkern.execution.sets import (
    Memory,
    RulesOf,
    TensorSet,
    grown_of,
    grows_grad,
    memory_mode,
    peak_of_stream,
    state_of,
    tensor_sets,
)
from growkern.execution.tiles import Job, Tiler
from growkern.optimizer.eight_bit import decoded, encoded, is_coded, n_broken, scale_key
from growkern.optimizer.state_rules import GRADIENT, VALUE, Rule
from growkern.planning.growth_plan import GrowthPlan, TensorRow
from growkern.support.laps import Laps
from growkern.support.memory import is_shared, stored_like, trim
from growkern.support.named_tensors import Tensors
from growkern.support.progress import Meter, Progress

NOTHING = "nan"  # backend that fills targets with NaN; a checkpoint overwrites them


class Execution:
    """A growth that is ready to run: its peak memory is known and fits.

    Attributes:
        tiler: ``Tiler`` of the plan; executions that share a tiler add the same noise to values of the same name.
        memory: ``"stage"``: every target beside every source, then one swap. ``"lean"``: set by set, with sources freed in between.
        peak_bytes: Peak memory beyond the memory in use before, on the device with the highest peak.
        n_read: Bytes read so far, for targets and for statistics.
        n_written: Bytes written so far.
        meter: Counts the bytes written for the caller's progress.
        notes: Notes on optimizer state for the user, so far.
        laps: Seconds so far that were spent on cutting targets into pieces, and on writing them.
        of_average: True for tensors of an average of the model.
    """

    def __init__(
        self,
        plan: GrowthPlan,
        sources: Tensors,
        rules: RulesOf,
        *,
        backend: str | None = None,
        memory: Memory | None = None,
        streams: bool = False,
        tiler: Tiler | None = None,
        given: Given | None = None,
        on_progress: Progress | None = None,
        gather: Gather | None = None,
    ) -> None:
        """Check that the plan fits the tensors and that the targets fit in memory; see ``execute``.

        ``gather``: gathers sharded sources; None where none is sharded.
        ``streams``: nobody keeps sources and targets, as in the growth of a checkpoint; see ``peak_of_stream``.

        Raises:
            PlanError: The plan is for tensors of other shapes; ``memory`` is unknown.
            InsufficientMemoryError: The targets do not fit. The message gives required and free memory.
        """
        self.plan, self.sources, self.backend = plan, sources, backend
        self.rules, self.tiler = rules, tiler or Tiler(plan, given)
        shapes = [
            f"{row.source}: has shape {tuple(sources.values[row.source].shape)}, the plan is for {plan.shapes(row)[0]}; plan again"
            for row in plan.tensors
            if tuple(sources.values[row.source].shape) != plan.shapes(row)[0]
        ]
        raise_all(PlanError, f"this plan for a {plan.family} does not fit:", shapes)
        self.reader = SourceReader(plan, self.tiler)
        self.sets = tensor_sets(plan, sources, self.rules, self.reader)
        self.memory: Memory
        self.memory, self.peak_bytes = (
            ("lean", peak_of_stream(self.sets)) if streams else memory_mode(self.sets, memory)
        )
        self.streams, self.gather = streams, gather
        self.n_read: int = 0
        self.n_written: int = 0
        n_bytes = sum(sum(one.n_bytes.values()) for one in self.sets)
        self.meter = Meter(n_bytes, on_progress)
        self.laps = Laps()
        self.notes: list[str] = []
        if n_shared := sum(map(is_shared, sources.values.values())):
            self.notes.append(
                f"{n_shared} tensors are in shared memory, as before; a process that opened them earlier still has the source's."
            )
        self.of_average = False
        compile_ahead(self.sources.all(), backend)

    def of(self, sources: Tensors) -> "Execution":
        """Return the same growth, with the same noise, of other tensors with these names (an average of the model)."""
        average = Execution(
            self.plan, sources, lambda _: {}, backend=self.backend, memory=self.memory, tiler=self.tiler, gather=self.gather,
        )  # fmt: skip
        average.of_average = True
        return average

    def parts(self) -> Iterator[Tensors]:
        """Yield the targets at once, or set by set; references to a set's sources are dropped first, so that their memory can be freed."""
        self.laps.start()
        if self.memory == "stage" and self.gather is None:
            staged = Tensors()
            jobs = [job for tensor_set in self.sets for job in self.jobs(tensor_set, staged)]
            self._run(jobs, staged)
            for tensor_set in self.sets:
                self._coded(tensor_set, staged)
                self._stored(tensor_set, staged)
            self.meter.reach(self.meter.total)
            self.laps.end("write")
            yield staged
            return
        done, whole = 0, Tensors()
        if self.gather is not None and self.backend != NOTHING:
            rows = [row for tensor_set in self.sets for row in tensor_set.tensors]
            grown = (
                (row, *one)
                for row in rows
                for one in grown_of(self.plan, row, self.sources, self.rules)
            )
            self.reader.measure(grown, self._kernel_of_squares, self.gather)
        for tensor_set in self.sets:
            self.laps.start()
            staged = Tensors()
            for jobs in self._sourced(self.jobs(tensor_set, staged)):
                self._run(jobs, staged)
                del jobs
            self._coded(tensor_set, staged)
            self._stored(tensor_set, staged)
            done += sum(tensor_set.n_bytes.values())
            self.meter.reach(done)
            self.laps.end("write")
            if self.gather is not None:
                trim()  # gathered sources lie between targets
            if self.memory == "stage":
                whole.values |= staged.values
                whole.grads |= staged.grads
                whole.states |= staged.states
                continue
            self.sources.forget(tensor_set.tensors[0].source)
            yield staged
            if (
                self.streams
            ):  # elsewhere, the last references to sources go when their backups are written
                trim()
        if self.memory == "stage":
            yield whole

    def _sourced(self, jobs: list[Job]) -> Iterator[list[Job]]:
        if self.gather is None or self.backend == NOTHING:
            return iter([jobs])
        return self.reader.sourced(jobs, self.gather)

    def _run(self, jobs: list[Job], staged: Tensors) -> None:
        if self.backend == NOTHING:
            for target in (job.target for job in jobs):
                target.fill_(float("nan") if target.is_floating_point() else 0)
            return
        tiler = self.tiler
        self.n_read += tiler.measure(jobs, self._kernel_of_squares)
        made = grouped(tiler, jobs)
        self.n_read += made.n_read + sum(group.n_read for group in made.groups)
        self.n_written += sum(group.n_written for group in made.groups)
        self.laps.end("cut")
        _run(made.groups, self.backend, self.meter)
        for job in jobs:
            finish(job, self.plan)
        self.notes += check(
            tiler, jobs, made.statistics, lambda row, target: self._name(row, target, staged)
        )

    def _kernel_of_squares(self, device: torch.device) -> SumsOf | None:
        if _chosen(self.backend, device) == "torch":
            return None
        from growkern.kernels import ahead
        from growkern.kernels.squares import sums_of_squares

        ahead.finish()
        return sums_of_squares

    def _name(self, row: TensorRow, target: Tensor, staged: Tensors) -> str:
        """Return the name of the source of a staged tensor for the user."""
        whose = f"{row.source} of an average" if self.of_average else row.source
        place = target.data_ptr()
        grad, state = staged.grads.get(row.name), staged.states.get(row.name, {})
        if grad is not None and local(grad).data_ptr() == place:
            return f"the gradient of {whose}"
        held = {key: t for key, t in state.items() if isinstance(t, Tensor)}
        keys = [key for key, t in held.items() if local(t).data_ptr() == place]
        return f"state {keys[0]!r} of {whose}" if keys else whose

    def _stored(self, tensor_set: TensorSet, staged: Tensors) -> None:
        """Give the targets of a set the memory format and the kind of memory of their sources."""
        for row in tensor_set.tensors:
            name, new, sources = row.source, row.name, self.sources
            if is_sharded(staged.values[new]):
                continue
            staged.values[new] = stored_like(sources.values[name], staged.values[new])
            if new in staged.grads:
                staged.grads[new] = stored_like(sources.grads[name], staged.grads[new])
            if not (state := staged.states.get(new)):
                continue
            before = sources.states[name]
            for key, t in state.items():
                old = before.get(key)
                if isinstance(t, Tensor) and isinstance(old, Tensor):
                    state[key] = stored_like(old, t)

    def _coded(self, tensor_set: TensorSet, staged: Tensors) -> None:
        """Quantize the grown state again where the source state is stored in 8 bits."""
        for row in tensor_set.tensors:
            if not (state := staged.states.get(row.name)):
                continue
            before, rules = self.sources.states[row.source], self.rules(row.source)
            quantized = (key for key in state if (rule := rules.get(key)) and rule.quantized)
            for key in [key for key in quantized if is_coded(before.get(key))]:
                values, scales, code = (
                    x for x in (state[key], state[scale_key(key)], before[f"qmap{key[-1]}"])
                    if isinstance(x, Tensor)
                )  # fmt: skip
                state[key], state[scale_key(key)] = encoded(values, scales, code)

    def jobs(self, tensor_set: TensorSet, staged: Tensors) -> list[Job]:
        """Allocate the targets of a set and return their jobs; counters, and scalar state of new blocks, are written here."""
        jobs: list[Job] = []
        for row in tensor_set.tensors:
            source, shape = self.sources.values[row.source], self.plan.shapes(row)[1]
            staged.values[row.name], target, box = _empty(source, shape)
            if row.source in self.plan.counters:
                numbers = torch.arange(shape[-1], device=target.device).expand(shape)
                target.copy_(numbers if box is None else numbers[box.slices])
                self.n_written += target.numel() * target.element_size()
                continue
            next_layer = row.next_layer_source or row.source
            jobs.append(
                self.tiler.job(row, source, target, VALUE, self.sources.values[next_layer], box)
            )
            if grows_grad(row, self.sources):
                grad = self.sources.grads[row.source]
                staged.grads[row.name], target, box = _empty(grad, shape)
                above = self.sources.grads.get(next_layer, grad)
                jobs.append(self.tiler.job(row, grad, target, GRADIENT, above, box))
            if not (source_state := state_of(self.plan, row, self.sources)):
                continue
            state = staged.states[row.name] = dict[str, object]()
            above = {**source_state, **self.sources.states.get(next_layer, {})}
            rules = self.rules(row.source)
            for key, value in source_state.items():
                rule = rules[key]
                if rule is None or not isinstance(value, Tensor):
                    if row.new and key not in state:
                        state[key] = value.clone() if isinstance(value, Tensor) else value
                    continue
                pairs = {key: (value, above[key])}
                if rule.quantized and is_coded(value):
                    if n := n_broken(source_state, key):  # other elements will share its blocks
                        raise CommitError(
                            f"state {key!r} of {row.source}: the scales of {n} blocks are not finite, and would spread over the blocks "
                            "of the target. Clear the state of this parameter before the growth. Nothing was changed."
                        )
                    both = (decoded(held, key) for held in (source_state, above))
                    pairs = dict(zip((key, scale_key(key)), zip(*both, strict=True), strict=True))
                for k, (v, other) in pairs.items():
                    state[k], grown, box = _empty(v, rule.shape(shape))
                    above_v = other if isinstance(other, Tensor) else v
                    mean = self.reader.means.get((row.name, k))
                    jobs.append(self.tiler.job(row, v, grown, rule, above_v, box, mean))
        return jobs


def _empty(like: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Box | None]:
    """Return an uninitialized tensor that is placed as another, the part of it that this process holds, and where that part lies."""
    if not is_sharded(like):
        target = like.new_empty(shape)
        return target, target, None
    own = part(like, shape)
    return joined(own, like, shape), own, box_of(like, shape)


def execute(
    plan: GrowthPlan,
    sources: Tensors,
    rules: Mapping[str, Rule | None],
    *,
    backend: str | None = None,
) -> Tensors:
    """Compute every target tensor that differs from its source.

    Args:
        plan: The plan.
        sources: Live tensors by source name; they are only read.
        rules: State key -> rule (``Law.grown``), of every tensor; None for state that is kept.
        backend: ``"triton"``, ``"torch"``, or None for triton on a GPU and torch elsewhere.

    Returns:
        Staged tensors by target name, in fresh storage. Scalar state is copied for new blocks only.

    Raises:
        PlanError: The plan is for tensors of other shapes.
        InsufficientMemoryError: The targets do not fit beside the sources. The message gives required and free memory.
        GrowthError: The backend cannot run.
    """
    return next(Execution(plan, sources, lambda _: rules, backend=backend, memory="stage").parts())


def unavailable(backend: str, device: torch.device) -> list[str]:
    """Return the reasons why a backend cannot run on a device; empty when it can."""
    if backend == "torch":
        return []
    if backend != "triton":
        return [f"backend={backend!r} is unknown; pass 'triton', 'torch' or None"]
    if find_spec("triton") is None:
        return ["triton is not installed; use backend='torch'"]
    from triton import knobs  # pyright: ignore  (untyped, and imported only where it is used)

    interpreted = bool(knobs.runtime.interpret)  # pyright: ignore
    if device.type != ("cpu" if interpreted else "cuda"):
        return [
            f"triton{' (interpreted)' if interpreted else ''} does not run on {device.type}; use backend='torch'"
        ]
    return []


def compile_ahead(tensors: Iterable[Tensor], backend: str | None) -> None:
    """Start to compile, in other threads, the kernels that a growth of tensors on a GPU launches."""
    kinds: dict[torch.device, set[torch.dtype]] = {}
    for device, dtype in {(tensor.device, tensor.dtype) for tensor in tensors}:
        if device.type == "cuda":
            kinds.setdefault(device, set()).add(dtype)
    for device, dtypes in kinds.items():
        if _wanted(backend, device) == "triton" and not unavailable("triton", device):
            from growkern.kernels import ahead

            ahead.start(dtypes, device)


def _wanted(backend: str | None, device: torch.device) -> str:
    """Return the backend that was asked for, or else the one that suits a device."""
    suits = device.type == "cuda" and not unavailable("triton", device)
    return backend or ("triton" if suits else "torch")


def _chosen(backend: str | None, device: torch.device) -> str:
    """Return the backend that runs on a device; raise GrowthError if the backend that was asked for cannot."""
    chosen = _wanted(backend, device)
    if reasons := unavailable(chosen, device):
        raise GrowthError(f"cannot run backend={backend!r}: {'; '.join(reasons)}.")
    return chosen


def _run(groups: list[Group], backend: str | None, meter: Meter) -> None:
    by_device: dict[torch.device, list[Group]] = {}
    for group in groups:
        by_device.setdefault(group.targets[0].device, []).append(group)
    for device, members in by_device.items():
        rest = members
        if _chosen(backend, device) == "triton":
            from growkern.kernels import ahead
            from growkern.kernels.expand import DTYPES, expand

            ahead.finish()
            expand([group for group in members if group.targets[0].dtype in DTYPES])
            rest = [
                group for group in members if group.targets[0].dtype not in DTYPES
            ]  # bool, small integers
        reference.expand(rest, lambda n_bytes: meter.reach(meter.done + n_bytes))
