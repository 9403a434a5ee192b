"""Text of a growth plan, for ``print(plan)``."""

from typing import TYPE_CHECKING

from growkern.support.text import fold, table

if TYPE_CHECKING:
    from growkern.planning.growth_plan import GrowthPlan, TensorRow


def plan_text(plan: "GrowthPlan") -> str:
    """Format a plan: sizes, new blocks, a line for every kind of tensor, the preserved property, and notes."""
    grown = [(k, n, plan.target_sizes[k]) for k, n in plan.source_sizes.items()]
    parts = [
        f"Shrink plan for {plan.family}: {plan.width}, state {plan.state!r}, dynamics {plan.dynamics!r}"
        if plan.shrinks
        else f"Growth plan for {plan.family}: {plan.width}, {plan.depth}, seed {plan.seed}, "
        f"state {plan.state!r}, dynamics {plan.dynamics!r}",
        table(
            ["size", "source", "target", ""],
            [[k, a, b, f"x {b / a:g}" if b != a and a else ""] for k, a, b in grown],
        ),
    ]
    parts += [
        f"{path if plan.extra_stacks else 'blocks'}  "
        + " ".join(f"{'+' * b.new}{b.source}{f' x {b.branch:g}' * (b.branch != 1)}" for b in blocks)
        + f"   (+ new, {'initialized anew; modules of' if plan.drawn else 'copy of'})"
        for path, blocks in plan.stacks.items()
        if any(block.new for block in blocks)
    ]
    if len(plan.blocks) < plan.source_sizes.get("layers", 0) and plan.blocks:
        parts.append(f"blocks  {' '.join(str(b.source) for b in plan.blocks)} stay")
    lines = dict.fromkeys(
        (
            fold(row.name),
            *map(_shape, plan.shapes(row)),
            _weight(row, s),
            _scale(a),
        )
        for row in plan.tensors
        for s, a in [plan.scales(row)]
        if plan.changes(row)
    )
    parts.append(
        table(
            ["tensor", "source", "target", "weight s", "gradient a"],
            [list(line) for line in lines],
        )
    )
    parts.append(
        plan.preserves_text,
    )
    return "\n\n".join(
        [*parts, *([("\n".join(f"note: {note}" for note in plan.notes))] if plan.notes else [])]
    )


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _weight(row: "TensorRow", scale: float | None) -> str:
    if row.drawn:
        return "initialized"
    return _scale(scale) if row.constant is None else f"all {row.constant:g}"


def _scale(value: float | None) -> str:
    return "varies" if value is None else f"{value:.6g}"
