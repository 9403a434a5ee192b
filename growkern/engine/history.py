"""Growth records: convert a plan to the JSON that a checkpoint stores, and a record back to the same plan."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from growkern import depth, shrink, vocab, width
from growkern.errors import GrowthError, PlanError
from growkern.model.spec import ModelSpec
from growkern.planning.build import build
from growkern.planning.growth_plan import GrowthPlan
from growkern.planning.growth_record import GrowthRecord, digest
from growkern.planning.method_text import method_of, parsed
from growkern.width.drawn import Drawn

WIDTHS: dict[str, type] = {name: getattr(width, name) for name in width.__all__}
DEPTHS: dict[str, type] = {name: getattr(depth, name) for name in depth.__all__}
SHRINKS: dict[str, type] = {name: getattr(shrink, name) for name in shrink.__all__}
LARGEST_FACTOR = 256  # between sizes of one growth on record; planning takes memory in proportion
VOCABS: dict[str, type] = {method.__name__: method for method in (vocab.Zero, vocab.MeanCov)}


def recorded(
    plan: GrowthPlan,
    spec: ModelSpec,
    split: Sequence[bool] | None = None,
    methods: Mapping[str, object] | None = None,
) -> str:
    """Return the JSON that a checkpoint stores of a growth: its record, with the plan itself where the record does not reproduce it.

    Args:
        plan: The plan.
        spec: Description of the source model that the plan was made for.
        split: For each optimizer, True when the growth splits its param groups.
        methods: The methods that ``build`` made this plan of this spec with; None for a plan from elsewhere, which is planned again.
    """
    record = GrowthRecord.of(plan, split)
    try:
        if methods != methods_of(record):
            replanned(record, spec)
    except GrowthError:  # a custom method, a method that holds tensors, or an edited plan
        record = replace(record, plan=plan.to_json())
    return record.to_json()


def methods_of(record: GrowthRecord) -> dict[str, Any]:
    """Return the methods of a record by the name of their argument of ``build``; raise PlanError for a text that names none."""
    widths = WIDTHS | VOCABS | {"Drawn": Drawn}
    names = {"width": (record.width, widths), "depth": (record.depth, DEPTHS)}
    if record.shrinks:
        names = {"shrink": (record.width, SHRINKS)}
    return {name: method_of(parsed(text), text, known) for name, (text, known) in names.items()}


def replanned(record: GrowthRecord, spec: ModelSpec) -> GrowthPlan:
    """Make the plan of a record again.

    Raises:
        PlanError: The method is unknown, the record is for another model, or the new plan differs from the recorded plan.
    """
    if record.plan is not None:
        plan = GrowthPlan.from_json(record.plan)
        if digest(plan) != record.digest:
            raise PlanError(
                f"the plan on record has the digest {digest(plan)}, not {record.digest}."
            )
        return plan
    if record.family != spec.family or dict(record.source_sizes) != dict(spec.sizes):
        raise PlanError(
            f"the record is of a {record.family} of {dict(record.source_sizes)}, and this {spec.family} has {dict(spec.sizes)}: build "
            "the model with the sizes of the record."
        )
    if far := [
        f"{name} {n:,}"
        for name, n in record.to.items()
        if n > LARGEST_FACTOR * max(1, spec.sizes[name])
    ]:
        raise PlanError(
            f"the record grows to {', '.join(far)}, more than {LARGEST_FACTOR} times the source's sizes: the record is spoiled; restore it "
            "from the checkpoint."
        )
    plan = build(
        spec, dict(record.target_sizes), state=record.state, dynamics=record.dynamics, seed=record.seed, **methods_of(record),
    )  # fmt: skip
    if digest(plan) != record.digest:
        raise PlanError(
            f"this growkern plans another growth by {record.width} and {record.depth} than the one on record (digest "
            f"{digest(plan)}, recorded {record.digest}): the model is another one, or growkern has changed; install the growkern "
            "that wrote the checkpoint."
        )
    return plan
