"""Text of a growth plan, for ``print(plan)``, and HTML, for notebooks."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from growkern.support.html import html_lines, html_more, html_page, html_table
from growkern.support.text import fold, table

if TYPE_CHECKING:
    from growkern.planning.growth_plan import GrowthPlan, TensorRow

SIZES = ["size", "source", "target", ""]
TENSORS = ["tensor", "source", "target", "weight s", "gradient a"]


def plan_text(plan: "GrowthPlan") -> str:
    """Format a plan: sizes, new blocks, a line for every kind of tensor, the preserved property, and notes."""
    notes = "\n".join(f"note: {note}" for note in plan.notes)
    parts = [
        title(plan), table(SIZES, _sizes(plan)), *_blocks(plan), table(TENSORS, [list(line) for line in tensor_lines(plan)]),
        plan.preserves_text,
    ]  # fmt: skip
    return "\n\n".join([*parts, *([notes] if notes else [])])


def plan_html(plan: "GrowthPlan") -> str:
    """Format a plan as HTML; the tensors are folded."""
    lines = [*tensor_lines(plan)]
    return html_page(
        title(plan),
        html_table(SIZES, _sizes(plan)),
        html_lines([*_blocks(plan), plan.preserves_text, *(f"note: {note}" for note in plan.notes)]),
        html_more(f"{len(lines)} kinds of tensors", html_table(TENSORS, lines)),
    )  # fmt: skip


def title(plan: "GrowthPlan") -> str:
    """Return the first line: the model, the methods and the modes."""
    if plan.shrinks:
        return f"Shrink plan for {plan.family}: {plan.width}, state {plan.state!r}, dynamics {plan.dynamics!r}"
    return (
        f"Growth plan for {plan.family}: {plan.width}, {plan.depth}, seed {plan.seed}, state {plan.state!r}, "
        f"dynamics {plan.dynamics!r}"
    )


def _sizes(plan: "GrowthPlan") -> list[list[object]]:
    grown = [(k, n, plan.target_sizes[k]) for k, n in plan.source_sizes.items()]
    return [[k, a, b, f"x {b / a:g}" if b != a and a else ""] for k, a, b in grown]


def _blocks(plan: "GrowthPlan") -> Iterator[str]:
    """Yield a line for every stack with new blocks, and a line for the blocks that stay where blocks are removed."""
    for path, blocks in plan.stacks.items():
        if any(block.new for block in blocks):
            sources = " ".join(
                f"{'+' * b.new}{b.source}{f' x {b.branch:g}' * (b.branch != 1)}" for b in blocks
            )
            kind = "initialized anew; modules of" if plan.drawn else "copy of"
            yield f"{path if plan.extra_stacks else 'blocks'}  {sources}   (+ new, {kind})"
    if len(plan.blocks) < plan.source_sizes.get("layers", 0) and plan.blocks:
        yield f"blocks  {' '.join(str(b.source) for b in plan.blocks)} stay"


def tensor_lines(plan: "GrowthPlan") -> dict[tuple[str, str, str, str, str], "TensorRow"]:
    """Return a line for every kind of tensor that changes, as in ``TENSORS``, with the first tensor of the kind."""
    lines = dict[tuple[str, str, str, str, str], "TensorRow"]()
    for row in plan.tensors:
        if plan.changes(row):
            s, a = plan.scales(row)
            source, target = map(_shape, plan.shapes(row))
            lines.setdefault((fold(row.name), source, target, _weight(row, s), _scale(a)), row)
    return lines


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _weight(row: "TensorRow", scale: float | None) -> str:
    if row.drawn:
        return "initialized"
    if row.is_perturbed and scale is not None:
        where = " on copies" if row.noise_from else ""
        return f"{row.shrink * scale:.6g} + N(0, {row.noise_std:.3g}^2){where}"
    return _scale(scale) if row.constant is None else f"all {row.constant:g}"


def _scale(value: float | None) -> str:
    return "varies" if value is None else f"{value:.6g}"
