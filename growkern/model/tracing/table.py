"""A traced description as a table: why axes are fixed, and what the trace ran on."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from growkern.model.spec import ModelSpec
from growkern.model.spec_text import spec_text
from growkern.model.tracing.forward import Inputs
from growkern.model.tracing.naming import OUTPUT, Spaces
from growkern.model.tracing.terms import Dim, atoms


def table_of(
    spec: ModelSpec,
    inputs: Inputs,
    weights: Mapping[str, Sequence[Dim]],
    spaces: Spaces,
    reasons: Mapping[str, str],
    problem: str,
) -> str:
    """Return the table.

    Args:
        spec: The spec.
        inputs: What the forward was traced on.
        weights: First name of every tensor -> its dimensions.
        spaces: The named spaces.
        reasons: Container of blocks -> why it cannot gain blocks.
        problem: Why the config of a grown model may not build it; empty if it does.
    """
    pins = {name: _pins(weights.get(spec.ties.get(name, name), ()), spaces) for name in spec.tensors}  # fmt: skip
    notes = [f"{path} gains no blocks: {why}" for path, why in reasons.items()]
    notes = [note for note in notes if note not in spec.fixed.values()]
    if problem:
        notes.append(f"a checkpoint of a grown model may not load: {problem}")
    notes.append(f"traced on {', '.join(_named(inputs))}")
    return spec_text(spec, ", by tracing", pins, notes)


def _named(inputs: Inputs) -> Iterator[str]:
    """Yield every input with its dtype and shape."""
    if callable(inputs):
        yield "what a function calls the model with"
        return
    own: Any = inputs  # a tensor, or a mapping or sequence of anything
    named = own.items() if isinstance(own, Mapping) else enumerate([own] if isinstance(own, Tensor) else own)  # pyright: ignore  # fmt: skip
    for name, value in named:  # pyright: ignore[reportUnknownVariableType]
        shown = str(value)  # pyright: ignore[reportUnknownArgumentType]
        if isinstance(value, Tensor):
            shown = f"{str(value.dtype).removeprefix('torch.')} {'x'.join(map(str, value.shape))}"
        yield shown if isinstance(name, int) else f"{name} {shown}"


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
