"""Check that a plan is one that the dual law gives for a model; a plan from a file is trusted in nothing."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from math import isclose

from growkern.errors import PlanError, raise_all
from growkern.model.size_values import size_value
from growkern.model.spec import ModelSpec, writer_corrections
from growkern.planning.axis_scales import axis_maps, gradients_exact, norm_factors
from growkern.planning.build import attributes, offset, rows_of
from growkern.planning.decisions import BlockRow, LayerOrder, WidthDecision
from growkern.planning.epsilon import Eps
from growkern.planning.exactness import TOLERANCE, close, inexact
from growkern.planning.growth_plan import UNREADABLE, AxisMap, GrowthPlan, TensorRow
from growkern.planning.perturbation import is_matrix
from growkern.planning.plan_fields import problems_of
from growkern.planning.sizes import resolve_sizes
from growkern.planning.targets import Homes, homes_of, targets
from growkern.planning.width_of_plan import width_of_plan, work
from growkern.support.text import short


def check(plan: GrowthPlan, spec: ModelSpec) -> None:
    """Raise PlanError for a plan that does not fit the model, such as a plan for another model or one edited by hand.

    Sizes, rows, attributes, config fields and epsilons must be those that the plan's blocks and axes give for the model; the axes must
    follow from one decision by the dual law; and the plan must not claim to preserve more than they do.
    """
    try:
        problems = [*problems_of(plan)]
    except UNREADABLE as error:  # a plan that Python made
        problems = [f"a field is of another type: {short(error)}."]
    raise_all(PlanError, "this is no plan of growkern:", problems)
    names = set(spec.tensors) - set(spec.ties)
    if plan.shrinks:  # dropped blocks have no rows
        stay = {path: {block.source for block in blocks} for path, blocks in plan.stacks.items()}
        places = {name: spec.block_of(name) for name in names}
        names = {
            n for n, at in places.items() if at is None or at[1] in stay.get(at[0].path, {at[1]})
        }
    if (
        plan.family != spec.family
        or dict(plan.source_sizes) != dict(spec.sizes)
        or {row.source for row in plan.tensors} != names
    ):
        raise PlanError(
            f"the plan is for a {short(plan.family)[1:-1]} of {short(dict(plan.source_sizes), 1000)}, this {spec.family} has "
            f"{dict(spec.sizes)}; plan again."
        )
    homes = {path: homes_of(blocks) for path, blocks in plan.stacks.items()}
    problems = [*_of_blocks(plan, spec)]
    if not problems:
        problems = [*_of_rows(plan, spec, homes, names), *_of_sizes(plan, spec, homes)]
    if not problems:
        problems = [*_of_axes(plan, spec, homes)]
    problems += _of_names(plan, spec)
    raise_all(
        PlanError,
        f"this plan for a {plan.family} does not fit the model; make it again by growkern.plan:",
        problems,
    )


def _of_names(plan: GrowthPlan, spec: ModelSpec) -> Iterator[str]:
    """Yield a problem for fields that the sizes and the spec alone decide."""
    if dict(plan.ties) != dict(spec.ties) or plan.counters != tuple(spec.counters):
        yield "its ties or counters are not the model's."
    grows = plan.target_sizes.get("head_dim") != spec.sizes.get("head_dim")
    if plan.rebuilt_modules != (tuple(spec.rebuilt_from_config) if grows else ()):
        yield "it rebuilds modules that do not follow from the config alone, or not all of them."
    config = {name: size_value(size, plan.target_sizes) for name, size in spec.config.items()}
    if dict(plan.config) != config or plan.config_lists != tuple(spec.config_lists):
        yield f"its config fields are not those that a {spec.family} of its sizes has."


def _of_blocks(plan: GrowthPlan, spec: ModelSpec) -> Iterator[str]:
    """Yield a problem for blocks that are not the model's and new blocks, or that the model does not support."""
    if (spec.blocks is None and (plan.blocks or plan.blocks_path)) or not all(
        stack.path in plan.stacks
        and _whole(plan, plan.stacks[stack.path], spec.sizes[stack.size], plan.target_sizes[stack.size])
        for stack in spec.stacks
    ) or len(plan.stacks) != len(spec.stacks):  # fmt: skip
        yield "its blocks are not the model's blocks and new blocks."
        return
    for stack in spec.stacks:
        blocks = plan.stacks[stack.path]
        if any(b.branch != 1 for b in blocks) and (stack.carries or not stack.branches):
            yield f"it scales the branches of {stack.path}, which the model does not support."
        if any(block.new and block.source < stack.first_copied for block in blocks):
            yield f"it copies a block of {stack.path} that is unlike all others."
        if stack.next_kinds and [stack.kinds[b.source] for b in blocks] != [
            *stack.kinds_at(len(blocks))
        ]:
            yield f"its blocks of {stack.path} are not of the kinds of their places."


def _whole(plan: GrowthPlan, blocks: Sequence[BlockRow], n_source: int, n_target: int) -> bool:
    """True when blocks hold every source block in order, plus copies; a plan that shrinks may leave source blocks out."""
    kept = [block.source for block in blocks if not block.new]
    within = all(0 <= block.source < max(1, n_source) for block in blocks)
    expected = sorted({*kept}) if plan.shrinks else list(range(n_source))
    return kept == expected and within and len(blocks) == n_target


def _of_sizes(plan: GrowthPlan, spec: ModelSpec, homes: Homes) -> Iterator[str]:
    """Yield a problem for target sizes that the model cannot have, and for attributes that are not those of the sizes."""
    try:
        resolve_sizes(spec, plan.target_sizes, shrink=plan.shrinks)
    except PlanError as error:
        yield str(error)
    if dict(plan.attributes) != attributes(spec, homes, plan.target_sizes):
        yield "its attributes are not the sizes that the target's modules cache."


def _of_rows(plan: GrowthPlan, spec: ModelSpec, homes: Homes, names: set[str]) -> Iterator[str]:
    """Yield a problem for every row that does not match the target."""
    expected = [(n, source) for source in names for n, _ in targets(spec, homes, source)]
    if sorted((row.name, row.source) for row in plan.tensors) != sorted(expected):
        yield "its rows are not the target's tensors."
        return
    target = replace(spec, sizes=plan.target_sizes)
    for row in plan.tensors:
        shape, wanted = plan.shapes(row)[1], target.shape(row.source)
        if shape != wanted or plan.shapes(row)[0] != spec.shape(row.source):
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
    kept = [row for row in plan.tensors if row.is_perturbed and row.noise_from and row.shrink == 1]
    if plan.state != "drop" and any(row.is_perturbed for row in plan.tensors if row not in kept):
        yield f"it perturbs weights under state={plan.state!r}, and not under 'drop'."
    if {*plan.axes} != {*spec.axes.values()}:
        yield "its axes are not the model's."
        return
    made = _made_rows(plan, spec, homes)
    for row, own in zip(plan.tensors, made, strict=True):
        off = [f.name for f in fields(row) if getattr(row, f.name) != getattr(own, f.name)]
        for field in off[:1]:
            yield f"{row.name}: {field} should be {short(getattr(own, field))}."


def _made_rows(plan: GrowthPlan, spec: ModelSpec, homes: Homes) -> list[TensorRow]:
    """Make the rows again from the blocks, the axes and what the rows say of their initialization."""
    new = {path: list[TensorRow]() for path in plan.stacks}
    for row in plan.tensors:
        place = spec.block_of(row.source)
        if row.new and place is not None:
            new[place[0].path].append(row)
    deep = {
        path: LayerOrder(
            blocks,
            identity=any(row.state == "fresh" and not row.drawn for row in new[path]),
            fresh=any(row.drawn for row in new[path]),
        )
        for path, blocks in plan.stacks.items()
    }
    mixed = any(row.next_layer_source for row in plan.tensors)
    # by name: a recorded plan may list its tensors in another order
    made = {own.name: own for own in rows_of(spec, deep, homes, plan.axes if mixed else {})}
    return [
        replace(
            made[row.name], shrink=row.shrink, noise_std=row.noise_std, noise_from=row.noise_from
        )
        if is_matrix(made[row.name], spec)
        else made[row.name]
        for row in plan.tensors
    ]


def _of_axes(plan: GrowthPlan, spec: ModelSpec, homes: Homes) -> Iterator[str]:
    """Yield a problem for axes that do not follow from one decision, and for claims and epsilons that do not follow from it."""
    needed, allowed = work(plan, spec)
    if needed > allowed:
        yield f"its axes have too few runs for their {needed:,} coordinates."
        return
    wrong = list[str]()
    for norms_kept in (False, True):
        try:
            wide = width_of_plan(plan, spec, norms_kept=norms_kept)
            factors = norm_factors(spec, wide)
            own = [*_differing(plan, spec, wide, factors), *_of_eps(plan, spec, homes, factors)]
            if not own:
                yield from _claims(plan, spec, wide)
                return
        except (ArithmeticError, PlanError) as error:
            own = [f"its axes do not follow from one decision: {error}"]
        wrong = wrong or own
    yield from wrong


def _differing(
    plan: GrowthPlan, spec: ModelSpec, wide: WidthDecision, factors: Mapping[str, float | None]
) -> Iterator[str]:
    """Yield a problem for every axis that the decision does not give."""
    made = axis_maps(spec.axes, wide, factors, writer_corrections(spec, plan.target_sizes))
    equal = dict[tuple[int, int], bool]()  # most axes of blocks share an axis map
    for name, axis in plan.axes.items():
        pair = id(axis), id(made[name])
        if pair not in equal:
            equal[pair] = _equal(axis, made[name])
        if not equal[pair]:
            yield f"the axis {name!r} does not follow from the other axes by the dual law."


def _equal(left: AxisMap, right: AxisMap) -> bool:
    return (
        left.index_map == right.index_map
        and close(left.weight_scale, right.weight_scale)
        and close(left.grad_scale, right.grad_scale)
        and (left.pad, left.centered) == (right.pad, right.centered)
        and (left.noise, left.drawn) == (right.noise, right.drawn)
    )


def _of_eps(
    plan: GrowthPlan, spec: ModelSpec, homes: Homes, factors: Mapping[str, float | None]
) -> Iterator[str]:
    eps = Eps.of(spec, factors)
    own, made = dict(plan.eps), eps.of_targets(spec, homes)
    if own.keys() != made.keys() or not all(_near(own[k], made[k]) for k in own):
        yield "its epsilon factors are not those by which the target's norms see other mean squares."
    if (plan.config_eps is None) != (eps.config is None) or not (
        plan.config_eps is None
        or eps.config is None
        or (plan.config_eps[0] == eps.config[0] and _near(plan.config_eps[1], eps.config[1]))
    ):
        yield "its config_eps is not the field and the factor of the target's norms."


def _near(left: float, right: float) -> bool:
    return isclose(left, right, rel_tol=TOLERANCE)


def _claims(plan: GrowthPlan, spec: ModelSpec, wide: WidthDecision) -> Iterator[str]:
    """Yield a problem for a plan that claims to preserve more than its axes and blocks do."""
    noisy = bool(wide.noise) or any(row.is_perturbed for row in plan.tensors)
    exact = not noisy and gradients_exact(spec, wide, relative=plan.gradients_exact)
    copies = any(n > 1 for a in {*plan.axes.values()} for n, _ in a.index_map.counts.repeats)
    if plan.gradients_exact != exact and (
        copies or not exact
    ):  # noise without copies shows in no axis
        yield f"gradients_exact should be {exact}."
    if not plan.reasons and (why := [*inexact(plan, spec, wide)]):
        yield f"it claims to preserve the function, but {why[0]}."
