"""Sets of tensors that grow together, and the memory mode and peak of a growth."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from growkern.distributed.shards import is_sharded, local, n_local
from growkern.errors import InsufficientMemoryError, PlanError
from growkern.execution.rows import SourceReader, n_bytes_gathered
from growkern.optimizer.eight_bit import N_BYTES, is_coded
from growkern.optimizer.state_rules import GRADIENT, MASTER, MASTER_GRAD, VALUE, Rule
from growkern.planning.growth_plan import GrowthPlan, TensorRow
from growkern.support.memory import free_bytes
from growkern.support.named_tensors import Tensors

Memory = Literal["stage", "lean"]
MEMORIES = ("stage", "lean")
RulesOf = Callable[[str], Mapping[str, Rule | None]]  # source name -> state key -> rule


@dataclass(frozen=True)
class TensorSet:
    """All targets of one source parameter or buffer: values, gradients and state, in all blocks.

    Attributes:
        tensors: Rows of the plan with this source.
        n_bytes: Bytes of the targets, per device.
        n_freed: Bytes of the sources that the targets replace, per device.
        n_gathered: Bytes that the gathering of the largest source takes, per device.
        n_whole: Bytes of the sources that the targets replace, in all processes.
    """

    tensors: tuple[TensorRow, ...]
    n_bytes: Mapping[torch.device, int]
    n_freed: Mapping[torch.device, int]
    n_gathered: Mapping[torch.device, int]
    n_whole: int


def changed_by_source(plan: GrowthPlan) -> list[list[TensorRow]]:
    """Group the changed rows of a plan by source."""
    by_source: dict[str, list[TensorRow]] = {}
    for row in plan.tensors:
        if plan.changes(row):
            by_source.setdefault(row.source, []).append(row)
    return [*by_source.values()]


def tensor_sets(
    plan: GrowthPlan, sources: Tensors, rules: RulesOf, reader: SourceReader
) -> list[TensorSet]:
    """Group changed rows by source, the largest sources first: in this order the peak of ``"lean"`` is lowest."""
    sets: list[TensorSet] = []
    for tensors in changed_by_source(plan):
        made: dict[torch.device, int] = {}
        freed: dict[torch.device, int] = {}
        gathered: dict[torch.device, int] = {}
        n_whole = 0
        read: dict[int, tuple[Tensor, list[tuple[TensorRow, Rule]]]] = {}
        for row in tensors:
            shape = plan.shapes(row)[1]
            for _, t, rule in grown_of(plan, row, sources, rules):
                coded = rule.quantized and is_coded(t)
                n = n_local(t, rule.shape(shape)) * (N_BYTES if coded else t.element_size())
                made[t.device] = made.get(t.device, 0) + n
                if not row.new:
                    freed[t.device] = freed.get(t.device, 0) + local(t).nbytes
                    n_whole += t.numel() * t.element_size()
                if is_sharded(t) and row.constant is None:
                    read.setdefault(id(t), (t, []))[1].append((row, rule))
        for t, members in read.values():
            n_more = n_bytes_gathered(t, reader.of(members, t))
            n_more *= 1 if all(row.next_layer_source is None for row, _ in members) else 2
            gathered[t.device] = max(gathered.get(t.device, 0), n_more)
        sets.append(TensorSet(tuple(tensors), made, freed, gathered, n_whole))
    return sorted(sets, key=lambda tensor_set: -tensor_set.n_whole)


def grown_of(
    plan: GrowthPlan, row: TensorRow, sources: Tensors, rules: RulesOf
) -> Iterator[tuple[str, Tensor, Rule]]:
    """Yield the tensors that grow with a row: state key ("" for the weight and its gradient), source, and rule."""
    yield "", sources.values[row.source], VALUE
    if grows_grad(row, sources):
        yield "", sources.grads[row.source], GRADIENT
    state = state_of(plan, row, sources)
    own: Mapping[str, Rule | None] = rules(row.source) if state else {}
    for key, t in state.items():
        if isinstance(t, Tensor) and (rule := own.get(key)) is not None:
            yield key, t, rule


def grows_grad(row: TensorRow, sources: Tensors) -> bool:
    return row.source in sources.grads and not row.new and row.constant is None


def state_of(plan: GrowthPlan, row: TensorRow, sources: Tensors) -> Mapping[str, object]:
    """Return the state that grows with a row; master weights grow even when all other state is dropped or fresh."""
    state = {} if row.drawn else sources.states.get(row.source, {})
    if row.state == "law" and plan.state != "drop":
        return state
    keys = {MASTER} if row.new or row.constant is not None else {MASTER, MASTER_GRAD}
    return {key: value for key, value in state.items() if key in keys}


def peaks(sets: list[TensorSet], memory: str) -> dict[torch.device, int]:
    """Return the peak bytes of a growth beyond its sources, per device."""
    now: dict[torch.device, int] = {}
    peak: dict[torch.device, int] = {}
    written: Mapping[torch.device, int] = {}  # sources that are backed up beside the next set
    for tensor_set in sets:
        for device, n_bytes in tensor_set.n_bytes.items():
            now[device] = now.get(device, 0) + n_bytes
            n_more = tensor_set.n_gathered.get(device, 0)
            peak[device] = max(peak.get(device, 0), now[device] + n_more)
        for device, n_bytes in written.items():
            now[device] -= n_bytes
        written = tensor_set.n_freed if memory == "lean" else {}
    return peak


def memory_mode(sets: list[TensorSet], memory: Memory | None) -> tuple[Memory, int]:
    """Return the fastest memory mode that fits, and its peak bytes.

    Raises:
        PlanError: ``memory`` is unknown.
        InsufficientMemoryError: No mode fits, or the given one does not; the message gives required and free memory.
    """
    if memory is not None and memory not in MEMORIES:
        raise PlanError(
            f"unknown memory={memory!r}; pass 'stage', 'lean', or None for the first mode that fits."
        )
    free = _free(sets)
    for mode in MEMORIES if memory is None else (memory,):
        needed = peaks(sets, mode)
        if _fits(needed, free):
            return mode, max(needed.values(), default=0)
    needs = {f" with memory={mode!r}": peaks(sets, mode) for mode in MEMORIES}
    raise InsufficientMemoryError(
        f"the grown tensors need, beside the source, {_figures(needs, free)}. "
        "Free memory, choose a smaller target, or grow with state='drop'."
    )


def peak_of_stream(sets: list[TensorSet]) -> int:
    """Return the peak bytes of a growth whose sources and targets enter and leave memory set by set: those of the largest set.

    Raises:
        InsufficientMemoryError: It does not fit; the message gives required and free memory.
    """
    needed: dict[torch.device, int] = {}
    for one in sets:
        for device, n_bytes in one.n_bytes.items():
            needed[device] = max(needed.get(device, 0), n_bytes + one.n_freed.get(device, 0))
    if not _fits(needed, free := _free(sets)):
        raise InsufficientMemoryError(
            f"the largest tensors need, each with its source, {_figures({'': needed}, free)}. Free memory, or choose a smaller target."
        )
    return max(needed.values(), default=0)


def _free(sets: list[TensorSet]) -> dict[torch.device, int | None]:
    devices = {device for tensor_set in sets for device in tensor_set.n_bytes}
    return {device: free_bytes(device) for device in devices}


def _fits(needed: Mapping[torch.device, int], free: Mapping[torch.device, int | None]) -> bool:
    return all((have := free[device]) is None or n <= have for device, n in needed.items())


def _figures(
    needs: Mapping[str, Mapping[torch.device, int]], free: Mapping[torch.device, int | None]
) -> str:
    lacks = [
        f"{needed[device] / 2**30:.2f} GiB on {device}{how}"
        for how, needed in needs.items()
        for device in free
    ]
    have = ", ".join(f"{(n or 0) / 2**30:.2f} GiB on {device}" for device, n in free.items())
    return f"{'; '.join(lacks)}; free: {have}"
