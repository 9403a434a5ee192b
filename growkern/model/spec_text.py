"""Text of a spec, for ``print(spec)``: module, tensor, what each axis is, and what is fixed and why."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from growkern.model.spec import ModelSpec

NUMBER = re.compile(r"\b\d+\b")  # of a block


def spec_text(
    spec: "ModelSpec",
    how: str = "",
    reasons: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> str:
    """Return the table; blocks that are described alike are one row with ``*`` for their numbers.

    Args:
        spec: The spec.
        how: How the spec was made, such as ``", by tracing"``.
        reasons: Tensor -> why axes of it are fixed.
        notes: Lines for the end of the text.
    """
    own, rows = reasons or {}, dict[tuple[str, ...], None]()
    for name, axes in spec.tensors.items():
        module, _, tensor = NUMBER.sub("*", name).rpartition(".")
        text = " | ".join(re.sub(r"\.\d+\b", "", str(axis)) for axis in axes)
        rows[module, tensor, text, own.get(name, "")] = None
    sizes = ", ".join(f"{name} {n}" for name, n in spec.sizes.items())
    lines = [f"{spec.family}{how}: {sizes}", ""]
    header = ("module", "tensor", "axes", "fixed because" if own else "")
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(3)]
    for row in (header, *rows):
        cells = (*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3])
        lines.append("  ".join(cells).rstrip())
    lines.append("")
    lines += [f"{size} is fixed: {why}" for size, why in spec.fixed.items()]
    lines += [
        f"{size} grows by whole multiples only: {why}" for size, why in spec.whole_multiples.items()
    ]
    if spec.hidden_is_heads:
        lines.append("hidden grows with heads: hidden = heads x head_dim")
    lines += notes
    folded = [f"{NUMBER.sub('*', name)} = {size}" for name, size in spec.attributes.items()]
    fields = [f"{name} = {size}" for name, size in spec.config.items()]
    for what, found in (("attributes", folded), ("config", fields)):
        if found:
            lines.append(f"{what}: " + ", ".join(dict.fromkeys(found)))
    return "\n".join(lines).rstrip()
