"""A traced description as a table: module, tensor, what each axis is, and what is fixed and why."""

import re
from collections.abc import Mapping, Sequence

from growkern.model.spec import ModelSpec
from growkern.model.tracing.naming import OUTPUT, Spaces
from growkern.model.tracing.terms import Dim, atoms

NUMBER = re.compile(r"\b\d+\b")  # of a block


def table_of(
    spec: ModelSpec,
    weights: Mapping[str, Sequence[Dim]],
    spaces: Spaces,
    reasons: Mapping[str, str],
    problem: str | None,
) -> str:
    """Return the table; blocks that are described alike are one row with ``*`` for their numbers.

    Args:
        spec: The spec.
        weights: First name of every tensor -> its dimensions.
        spaces: The named spaces.
        reasons: Container of blocks -> why it cannot gain blocks.
        problem: Why the config of a grown model may not build it.
    """
    rows = dict[tuple[str, ...], None]()
    for name, axes in spec.tensors.items():
        module, _, tensor = NUMBER.sub("*", name).rpartition(".")
        text = " | ".join(re.sub(r"\.\d+\b", "", str(axis)) for axis in axes)
        rows[module, tensor, text, _pins(weights.get(spec.ties.get(name, name), ()), spaces)] = None
    sizes = ", ".join(f"{name} {n}" for name, n in spec.sizes.items())
    lines = [f"{spec.family}, by tracing: {sizes}", ""]
    header = ("module", "tensor", "axes", "fixed because")
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(3)]
    for row in (header, *rows):
        lines.append("  ".join((*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3])).rstrip())  # fmt: skip
    lines.append("")
    lines += [f"{size} is fixed: {why}" for size, why in spec.fixed.items()]
    lines += [f"{size} grows by whole multiples only: {why}" for size, why in spec.whole_multiples.items()]  # fmt: skip
    if spec.hidden_is_heads:
        lines.append("hidden grows with heads: hidden = heads x head_dim")
    lines += [f"{path} gains no blocks: {why}" for path, why in reasons.items()]
    if problem:
        lines.append(f"a checkpoint of a grown model may not load: {problem}")
    folded = dict.fromkeys(f"{NUMBER.sub('*', name)} = {size}" for name, size in spec.attributes.items())  # fmt: skip
    lines += ["attributes: " + ", ".join(folded)] if folded else []
    lines += ["config: " + ", ".join(f"{n} = {size}" for n, size in spec.config.items())] if spec.config else []  # fmt: skip
    return "\n".join(lines).rstrip()


def _pins(dims: Sequence[Dim], spaces: Spaces) -> str:
    """Return why axes of a tensor are fixed."""
    why = dict[str, None]()
    for dim in dims:
        for atom in atoms(dim):
            if atom not in spaces.names:
                why |= dict.fromkeys(spaces.fixed.get(atom, {}))
    reasons = [*why]
    if len(reasons) > 1 and OUTPUT in reasons:
        reasons.remove(OUTPUT)
    return "; ".join(reasons[:2])
