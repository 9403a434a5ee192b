"""Attributes of modules that cache sizes: found by value, decided by growing a copy and following its forward."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from growkern.model.size_values import Power, Size, Sum, size_value
from growkern.model.spec import ModelSpec
from growkern.model.tracing.candidates import Key, Numbers, Option, candidates
from growkern.model.tracing.hollow import hollow, is_large, zeros
from growkern.model.tracing.mapped_weights import is_low, mapped_distance, run_mapped
from growkern.model.tracing.naming import Spaces
from growkern.model.tracing.permutation import rounds_as_far
from growkern.model.tracing.tape import Tape
from growkern.model.tracing.terms import Dim
from growkern.model.tracing.trial import (
    CONFIG,
    Outcome,
    Steps,
    Tensors,
    grown_copy,
    mapped,
    run_against,
    set_config,
    set_values,
    tolerance,
)
from growkern.model.tracing.values import Scaling

TRIES = 60
# largest relative difference that says nothing of a choice: norms are float32
ROUNDING = 64 * torch.finfo(torch.float32).eps


@dataclass
class Attributes:
    """The sizes that modules cache.

    Attributes:
        sizes: ``"module.attribute"`` -> size.
        config: Field of configs that are none of transformers -> size.
        coupled: True when hidden grows with heads only: the model divides hidden by the number of heads.
        fixed: Size that cannot grow -> why.
        scaled: Scalings that grow with the attributes.
        tries: Number of forwards that the search took.
    """

    sizes: dict[str, Size] = field(default_factory=dict[str, Size])
    config: dict[str, Size] = field(default_factory=dict[str, Size])
    coupled: bool = False
    fixed: dict[str, str] = field(default_factory=dict[str, str])
    scaled: set[Scaling] = field(default_factory=set[Scaling])
    tries: int = 0


def trial_sizes(spaces: Spaces, grow: Sequence[str]) -> dict[str, int]:
    """Return sizes for a trial: hidden and heads twice, all others twice or three times."""
    return {
        size: n * (2 if size.startswith(("hidden", "heads", "kv_heads")) or i % 2 else 3)
        for i, (size, n) in enumerate(spaces.sizes.items())
        if size in grow
    }


@dataclass(frozen=True)
class _Goal:
    sizes: Mapping[str, int]
    lengths: Mapping[Dim, int]  # of the atoms
    maps: Mapping[Dim, Sequence[int]]
    fields: Mapping[str, int]  # of the config


class Search:
    """Tries what attributes may be on grown copies of a model.

    Args:
        model: The source.
        inputs: Its inputs.
        tape: Its trace.
        spaces: Its spaces.
        spec: Its tensors and ties.
        numbers: Numbers of a model that is built from the grown config.
    """

    def __init__(
        self, model: nn.Module, inputs: Any, tape: Tape, spaces: Spaces, spec: ModelSpec, numbers: Numbers
    ) -> None:  # fmt: skip
        self.model, self.inputs, self.tape, self.spaces, self.spec = model, inputs, tape, spaces, spec  # fmt: skip
        dims = {name: value.dims for name, value in tape.weights.items()}
        self.own = Tensors(dims, spec.tensors, spec.ties)
        self.options = candidates(model, tape, spaces, numbers)
        self.groups: dict[Key, list[Key]] = defaultdict(list)  # one decision for all blocks
        for path, name in self.options:
            self.groups[re.sub(r"\.\d+", ".*", path), name].append((path, name))
        self.layers = {stack.size for stack in spec.stacks}
        self.limit = tolerance(model)
        self.tries = 0

    def choice(self, ranks: Mapping[Key, int]) -> dict[Key, Option]:
        """Return the expression of every attribute, where groups have taken other options than the first."""
        return {
            key: self.options[key][min(ranks.get(group, 0), len(self.options[key]) - 1)]
            for group, keys in self.groups.items()
            for key in keys
        }

    def outcomes(self, to: Mapping[str, int], start: Mapping[Key, int], budget: int) -> tuple[Outcome, dict[Key, int]]:  # fmt: skip
        """Climb from a choice of options to one under which the grown copy follows the trace and returns its output."""
        goal, output = self._goal(to), self.tape.output
        by_shapes = output is None or is_large(self.model)
        expected = None if output is None or by_shapes else mapped(output, self.tape.output_dims, goal.maps)  # fmt: skip
        stand_in = (hollow if self.tape.hollow else zeros) if by_shapes else None
        grown = grown_copy(self.model, self.own, goal.maps, stand_in)
        set_config(grown, goal.fields)

        def attempt(ranks: Mapping[Key, int]) -> Outcome:
            self.tries += 1
            before = set_values(grown, self._values(goal, ranks))
            outcome = run_against(grown, self.inputs, self.tape.steps, goal.lengths, expected, self.tape.scalings)  # fmt: skip
            for held, name, value in reversed(before):
                held[name] = value
            return outcome

        ranks, best = dict(start), attempt(start)
        while not passed(best, self.limit) and self.tries < budget:
            step = next(self._steps(best, ranks, attempt, budget), None)
            step = step or self._together(best, ranks, attempt)
            if step is None:
                break
            best, ranks = step
        powers = [g for g, keys in self.groups.items() if any(isinstance(o, Power) for o in self.options[keys[0]])]  # fmt: skip
        if not budget or not powers:
            return best, ranks
        if not by_shapes and not is_low(self.model):
            return self._sure(powers, best, ranks, attempt, self.limit)
        if not passed(best, self.limit):  # its copies do not run
            return best, ranks

        def exact(ranks: Mapping[Key, int]) -> Outcome:
            return replace(attempt(ranks), error=self._error(goal, ranks))

        best, ranks = self._sure(powers, exact(ranks), ranks, exact, float("inf"))
        wrong = best.error > self.limit and not rounds_as_far(
            self.model, self.inputs, self.own, self.moved, best.error
        )
        return (best if wrong else replace(best, error=0.0)), ranks

    def _goal(self, to: Mapping[str, int]) -> "_Goal":
        sizes = self.spaces.sizes | dict(to)
        lengths, every = self.spaces.at(sizes), {**self.spec.sizes, **sizes}
        maps = {atom: [j % atom.size for j in range(n)] for atom, n in lengths.items()}
        fields = {
            name: int(size_value(e, every))
            for name, e in self.spec.config.items()
            if e not in self.layers
        }
        return _Goal(every, lengths, maps, fields)

    def _values(self, goal: "_Goal", ranks: Mapping[Key, int]) -> dict[Key, float]:
        return {key: _value(option, goal.sizes) for key, option in self.choice(ranks).items()}

    def _error(self, goal: "_Goal", ranks: Mapping[Key, int]) -> float:
        """Return the error of a forward with values, whose weights no memory holds."""

        def prepare(copy: nn.Module) -> nn.Module:
            set_config(copy, goal.fields)
            set_values(copy, self._values(goal, ranks))
            return copy

        steps = Steps(self.tape.scalings, goal.lengths)
        after = run_mapped(
            self.model, self.inputs, self.own, goal.maps, prepare=prepare, mode=steps
        )
        return mapped_distance(self.moved, after, self.tape.output_dims, goal.maps)

    @cached_property
    def moved(self) -> object:
        """The output of the source with moved weights."""
        return run_mapped(self.model, self.inputs, self.own, {})

    def _sure(
        self, powers: Sequence[Key], best: Outcome, ranks: dict[Key, int], attempt: Any, limit: float
    ) -> tuple[Outcome, dict[Key, int]]:  # fmt: skip
        """Undo choices for numbers that move the output less than the limit: a number may be a power of a size by chance.

        Equal numbers are tried together first, as the scale of all attention in a model, and that all stay last.
        """
        options = {group: tuple(self.options[self.groups[group][0]]) for group in powers}
        equal = [[g for g in powers if options[g] == own] for own in dict.fromkeys(options.values())]  # fmt: skip
        named = [[g for g in own if g[1] == name] for own in equal for name in {g[1]: 0 for g in own}]  # fmt: skip
        sets = [*equal, *named, *([g] for g in powers)]
        changes = [dict.fromkeys(own, rank) for own in sets for rank in range(len(options[own[0]]))]
        changes.append({g: len(options[g]) - 1 for g in powers})
        # where several choices are wrong, one change alone may not show; a second turn takes every improvement
        for share in (0.1, 1.0):
            current, own = best, {**dict.fromkeys(powers, 0), **ranks}
            for change in changes:
                if current.error < ROUNDING or {**own, **change} == own:
                    continue
                outcome = attempt({**own, **change})
                if passed(outcome, limit) and outcome.error < share * current.error:
                    current, own = outcome, {**own, **change}
            if current.error < best.error / 10:
                best, ranks = current, own
        return best, ranks

    def _steps(
        self, best: Outcome, ranks: Mapping[Key, int], attempt: Any, budget: int
    ) -> Iterator[tuple[Outcome, dict[Key, int]]]:
        """Yield better outcomes that differ in one decision, nearest to the operation that differs first."""
        at = self._module(best)

        def apart(group: Key) -> int:
            return -sum(a == b for a, b in zip(group[0].split("."), at.split("."), strict=False))

        for group in sorted(self.groups, key=apart):
            for rank in range(max(len(self.options[k]) for k in self.groups[group])):
                if rank == ranks.get(group, 0) or self.tries >= budget:
                    continue
                tried = {**ranks, group: rank}
                outcome = attempt(tried)
                if outcome.rank > best.rank:
                    yield outcome, tried

    def _together(self, best: Outcome, ranks: Mapping[Key, int], attempt: Any) -> tuple[Outcome, dict[Key, int]] | None:  # fmt: skip
        """Return a better outcome where several numbers of the module that fails first are sizes, such as the lengths of a split."""
        at = self._module(best)
        held = [
            group
            for group, keys in self.groups.items()
            if group[0] == at and not ranks.get(group, 0)
            if not any(isinstance(x, str) for x in self._first(keys[0])) and len(self.options[keys[0]]) > 1
        ]  # fmt: skip
        tried = {**ranks, **dict.fromkeys(held, 1)}
        outcome = attempt(tried)
        if not held or outcome.rank <= best.rank:
            return None
        for group in held:  # what need not be a size stays a number
            without = {**tried, group: 0}
            own = attempt(without)
            if own.rank >= outcome.rank:
                outcome, tried = own, without
        return outcome, tried

    def _first(self, key: Key) -> Sequence[str | int]:
        first = self.options[key][0]
        return [*first] if isinstance(first, tuple | Sum) else [""]

    def _module(self, outcome: Outcome) -> str:
        """Return the module that runs the first operation that differs, without the numbers of blocks."""
        at = self.tape.steps[min(outcome.agreed, len(self.tape.steps) - 1)].module
        return re.sub(r"\.\d+", ".*", at)


def _value(option: Any, sizes: Mapping[str, int]) -> float:
    """Return the value of an option at sizes."""
    if isinstance(option, float):
        return option
    return size_value(option, sizes) if isinstance(option, Power) else int(size_value(option, sizes))  # fmt: skip


def passed(outcome: Outcome, limit: float) -> bool:
    """True when a copy went as the trace says and returned the source's output."""
    return outcome.finished and not outcome.blame and outcome.error < limit


def find_attributes(search: Search) -> Attributes:
    """Decide what every attribute is, which sizes can grow, and whether hidden grows with heads only."""
    spaces, result = search.spaces, Attributes()
    free = [size for size in spaces.sizes if size not in search.spec.fixed]
    if not free:
        return result
    best, ranks = search.outcomes(trial_sizes(spaces, free), {}, TRIES)
    units = [
        u
        for u in (
            ("hidden",),
            ("heads", "kv_heads"),
            *((s,) for s in free if s not in ("hidden", "heads", "kv_heads")),
        )
        if {*u} & {*free}
    ]
    if not passed(best, search.limit):
        kept = list[str]()
        for unit in units:
            own, tried = search.outcomes(trial_sizes(spaces, [*kept, *unit]), ranks, search.tries + TRIES // 2)  # fmt: skip
            if passed(own, search.limit):
                kept, ranks = [*kept, *unit], tried
            else:
                why = own.blame or f"its growth moves the output by {own.error:.1e}"
                if "heads" not in spaces.sizes and any(a.size == spaces.sizes.get(unit[0]) for a in spaces.head_dims):  # fmt: skip
                    why = f"one head is as long as {unit[0]}, and attention multiplies activations over it ({why})"
                result.fixed |= dict.fromkeys([s for s in unit if s in free], why)
        free = [s for s in free if s in kept]
    alone = {
        unit: search.outcomes(trial_sizes(spaces, unit), ranks, 0)[0]
        for unit in units
        if {*unit} <= {*free} | {"kv_heads"}
    }
    failed = [unit for unit, outcome in alone.items() if not passed(outcome, search.limit)]
    if ("hidden",) in failed and ("heads", "kv_heads") in failed:
        result.coupled = True
        failed = [u for u in failed if u not in (("hidden",), ("heads", "kv_heads"))]
    result.scaled = {
        s for own in (best, *alone.values()) if passed(own, search.limit) for s in own.scaled
    }
    for unit in failed:
        own = [size for size in unit if size in free]
        result.fixed |= dict.fromkeys(own, f"it does not grow alone: {alone[unit].blame}")
    for (path, name), e in search.choice(ranks).items():
        if isinstance(e, Power) or (isinstance(e, tuple | Sum) and any(isinstance(x, str) for x in e)):  # fmt: skip
            target = result.config if path == CONFIG else result.sizes
            target[name if path == CONFIG else f"{path}.{name}".lstrip(".")] = (
                e[0] if isinstance(e, tuple) and len(e) == 1 and isinstance(e[0], str) else e
            )  # pyright: ignore
    result.tries = search.tries
    return result
