"""Check that a plan fits a model."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import isfinite

from growkern.errors import PlanError, raise_all
from growkern.model.spec import ModelSpec
from growkern.planning.build import Homes, attributes, homes_of, offset, targets
from growkern.planning.decisions import BlockRow
from growkern.planning.growth_plan import GrowthPlan
from growkern.planning.options import DYNAMICS, STATES


def check(plan: GrowthPlan, spec: ModelSpec) -> None:
    """Raise PlanError for a plan that does not fit the model, such as a plan for another model or one edited by hand."""
    names = set(spec.tensors) - set(spec.ties)
    if plan.shrinks:  # dropped blocks have no rows
        stay = {path: {block.source for block in blocks} for path, blocks in plan.stacks.items()}
        places = {name: spec.block_of(name) for name in names}
        names = {
            n for n, at in places.items() if at is None or at[1] in stay.get(at[0].path, {at[1]})
        }
    if dict(plan.source_sizes) != dict(spec.sizes) or {row.source for row in plan.tensors} != names:
        raise PlanError(
            f"the plan is for a {plan.family} of {dict(plan.source_sizes)}, this {spec.family} has {dict(spec.sizes)}; plan again."
        )
    homes = {path: homes_of(blocks) for path, blocks in plan.stacks.items()}
    if {*plan.stacks} != {stack.path for stack in spec.stacks} or not all(
        _whole(plan, plan.stacks[s.path], spec.sizes[s.size], plan.target_sizes.get(s.size))
        for s in spec.stacks
    ):
        problems = ["its blocks are not the model's blocks and new blocks."]
    else:
        problems = [*_of_rows(plan, spec, homes, names)]
        if dict(plan.attributes) != attributes(spec, homes, plan.target_sizes):
            problems.append("its attributes are not the sizes that the target's modules cache.")
    if not problems:
        eps = {f"{name.removesuffix('.weight')}.{norm.eps}" for name, _, norm in spec.norms()}
        eps = {name for source in eps for name, _ in targets(spec, homes, source)}
        numbers = all(isfinite(f) and f > 0 for f in plan.eps.values())
        if not set(plan.eps) <= eps or not numbers:
            problems = ["its epsilon factors are not positive numbers for the target's norms."]
    if not set(plan.rebuilt_modules) <= set(spec.rebuilt_from_config):
        problems.append("it rebuilds modules that do not follow from the config alone.")
    if dict(plan.ties) != dict(spec.ties) or tuple(plan.counters) != tuple(spec.counters):
        problems.append("its ties or counters are not the model's.")
    states = {row.state for row in plan.tensors}
    if plan.state not in STATES or plan.dynamics not in DYNAMICS or not states <= {"law", "fresh"}:
        problems.append(f"its state {plan.state!r} or dynamics {plan.dynamics!r} is not known.")
    raise_all(
        PlanError,
        f"this plan for a {plan.family} does not fit the model; make it again by growkern.plan:",
        problems,
    )


def _of_rows(plan: GrowthPlan, spec: ModelSpec, homes: Homes, names: set[str]) -> Iterator[str]:
    """Yield a problem for every row that does not match the target."""
    expected = [(n, source) for source in names for n, _ in targets(spec, homes, source)]
    if sorted((row.name, row.source) for row in plan.tensors) != sorted(expected):
        yield "its rows are not the target's tensors."
    target = replace(spec, sizes=plan.target_sizes)
    for row in plan.tensors:
        known = set(row.axes) <= set(plan.axes)
        shape, wanted = plan.shapes(row)[1] if known else row.axes, target.shape(row.source)
        if shape != wanted:
            yield f"{row.name}: has shape {shape}, the target needs {wanted}."
        if row.drawn and not row.new:
            yield f"{row.name}: is initialized anew, but its block is not new."
        if row.offset != offset(spec.tensors[row.source]):
            yield f"{row.name}: has another offset than the model."
        if row.next_layer_source is not None and (
            row.next_layer_source not in names
            or spec.shape(row.next_layer_source) != spec.shape(row.source)
            or row.next_layer_axis not in range(len(row.axes))
        ):
            yield f"{row.name}: takes rows of {row.next_layer_source}, which has another shape."


def _whole(
    plan: GrowthPlan, blocks: Sequence[BlockRow], n_source: int, n_target: int | None
) -> bool:
    """True when blocks hold every source block in order, plus copies; a plan that shrinks may leave source blocks out."""
    kept = [block.source for block in blocks if not block.new]
    within = all(0 <= block.source < n_source for block in blocks)
    expected = sorted({*kept}) if plan.shrinks else list(range(n_source))
    return kept == expected and within and len(blocks) == n_target
