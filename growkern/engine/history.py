"""Growths on record: plan -> the text that a checkpoint keeps, and that text -> the same plan."""

from typing import Any

from growkern import depth, shrink, vocab, width
from growkern.errors import GrowthError, PlanError
from growkern.model.spec import ModelSpec
from growkern.planning.build import build
from growkern.planning.growth_plan import GrowthPlan
from growkern.planning.growth_record import GrowthRecord, digest
from growkern.planning.method_text import method_of, parsed

WIDTHS: dict[str, type] = {name: getattr(width, name) for name in width.__all__}
DEPTHS: dict[str, type] = {name: getattr(depth, name) for name in depth.__all__}
SHRINKS: dict[str, type] = {name: getattr(shrink, name) for name in shrink.__all__}
VOCABS: dict[str, type] = {method.__name__: method for method in (vocab.Zero, vocab.MeanCov)}


def recorded(plan: GrowthPlan, spec: ModelSpec) -> str:
    """What a checkpoint keeps of a growth, as JSON: a record where it gives the plan again, else the plan.

    Args:
        plan: The plan.
        spec: The spec that it was made of.
    """
    record = GrowthRecord.of(plan)
    try:
        replanned(record, spec)
    except (
        GrowthError
    ):  # a method of the user's own, one that holds tensors, or a plan that was edited
        return plan.to_json()
    return record.to_json()


def replanned(record: GrowthRecord, spec: ModelSpec) -> GrowthPlan:
    """Make the plan of a record again.

    Raises:
        PlanError: This growkern knows no such method, or plans another growth of the model.
    """
    if record.family != spec.family or dict(record.source_sizes) != dict(spec.sizes):
        raise PlanError(
            f"the record is of a {record.family} of {dict(record.source_sizes)}; this {spec.family} has {dict(spec.sizes)}."
        )
    names = {"width": (record.width, WIDTHS | VOCABS), "depth": (record.depth, DEPTHS)}
    if record.shrinks:
        names = {"shrink": (record.width, SHRINKS)}
    methods: dict[str, Any] = {
        name: method_of(parsed(text), text, known) for name, (text, known) in names.items()
    }
    plan = build(
        spec, dict(record.target_sizes), state=record.state, dynamics=record.dynamics, seed=record.seed, **methods,
    )  # fmt: skip
    if digest(plan) != record.digest:
        raise PlanError(
            f"this growkern plans another growth by {record.width} and {record.depth} than the one on record (digest "
            f"{digest(plan)}, recorded {record.digest}): the model is another one, or growkern has changed; install the version "
            "that wrote the checkpoint, load it there, and save it."
        )
    return plan
