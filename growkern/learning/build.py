"""Build the operators of a plan at the start of learning."""

from collections.abc import Collection

import torch
from torch import Tensor

from growkern.errors import PlanError
from growkern.learning.operators import Layers, Operators, Values
from growkern.learning.pieces import AxisStart, Cutter, Piece, Tie
from growkern.model.spec import ModelSpec
from growkern.planning.growth_plan import GrowthPlan, TensorRow


def build_operators(
    spec: ModelSpec, plan: GrowthPlan, sources: Values, *, frozen: Collection[str] = (), tie: Tie = "use", noise: float = 0.0
) -> Operators:  # fmt: skip
    """Build the operators that start as a plan.

    Args:
        spec: Description of the source model.
        plan: The plan.
        sources: Parameters of the source model by name; only parameters are learned. Coefficients over a tensor that is 0 in the
            source have no gradient, and are left out.
        frozen: Names of the sources that do not require gradients; target tensors that grow from them stay in the closed form.
        tie: Which axes share a matrix; see ``growkern.learn``.
        noise: Largest noise on the operators at the start, drawn from the plan's seed; coefficients over layers keep the sum 1.

    Returns:
        The operators, as changes from their start.

    Raises:
        PlanError: The plan changes no size that is learned, all that it changes is frozen, or axes that share a matrix have different
            index maps.
    """
    made, cutter = Operators(tie), Cutter(spec, plan, tie)
    live = {name: tensor for name, tensor in sources.items() if bool(tensor.any())}
    for row in plan.tensors:
        if row.source not in sources or row.source in frozen:
            made.n_frozen += row.source in sources
            continue
        layers = _layers(spec, plan, row, sources if tie == "shared" else live, tie)
        pieces = cutter.pieces(row)
        learned = layers is not None or any(axis.matrix for piece in pieces for axis in piece.axes)
        read = {row.source} if layers is None else {*layers.sources.values()}
        if learned and read & live.keys():
            made.pieces[row.name] = pieces
            if layers is not None:
                made.layers[row.name] = layers
    if not made.pieces:
        raise PlanError(
            f"cannot learn this growth of a {plan.family}: no size that grows has operators. Name hidden, heads, ffn or layers in "
            "to=; a growth of vocab, positions or head_dim alone is expand_inplace's."
            + (
                f" {n} tensors have requires_grad=False: let some train."
                if (n := made.n_frozen)
                else ""
            )
        )
    if tie == "shared":
        _mix(spec, made)
    generator = torch.Generator().manual_seed(plan.seed & (1 << 63) - 1)
    like = [sources[pieces[0].row.source] for pieces in made.pieces.values()]
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in like) else torch.float32

    def add(name: str, value: Tensor) -> None:
        made.parameters[name] = value.to(like[0].device, dtype).requires_grad_()

    for name, axis in _matrices(made).items():
        add(name, noise * torch.rand(axis.shape, generator=generator, dtype=torch.float64))
    for name, layers in made.layers.items():
        if layers.name not in made.parameters:
            own = made.pieces[name][0].row.source
            add(layers.name, _coefficients(own, layers, noise, generator))
    for name, _, members in made.mixes.values():
        if name not in made.parameters:
            add(name, torch.zeros(len(members), len(members)))
    return made


def _coefficients(own: str, layers: Layers, noise: float, generator: torch.Generator) -> Tensor:
    """Return the change of the coefficients over layers by noise, which keeps the sum 1; the source layer may be left out as 0."""
    n = 1 + max(layers.sources)
    start = torch.zeros(n, dtype=torch.float64)
    start[[k for k, name in layers.sources.items() if name == own]] = 1.0
    drawn = noise * torch.rand(n, generator=generator, dtype=torch.float64)
    return (start + drawn) / (1 + drawn.sum()) - start


def _layers(
    spec: ModelSpec, plan: GrowthPlan, row: TensorRow, among: Values, tie: Tie
) -> Layers | None:
    """Return the coefficients of a tensor over the source blocks that are in ``among``; None outside of stacks that get deeper."""
    place = spec.block_of(row.name)
    if place is None:
        return None
    stack, index, inner = place
    n = spec.sizes[stack.size]
    if [block.source for block in plan.stacks[stack.path]] == [*range(n)]:
        return None
    shape = spec.shape(row.source)
    names = {k: f"{stack.path}.{k}.{inner}" for k in range(n)}
    same = {k: name for k, name in names.items() if name in among and among[name].shape == shape}
    if tie == "shared":
        return Layers(f"layers {stack.path}.{index}", same)
    return Layers(f"layers {row.name}", dict(enumerate(same.values())))


def _matrices(made: Operators) -> dict[str, AxisStart]:
    """Return an axis for every matrix; raise PlanError where axes that share a matrix start differently."""
    axes: dict[str, AxisStart] = {}
    for axis in (
        axis for pieces in made.pieces.values() for piece in pieces for axis in piece.axes
    ):
        if axis.matrix is None:
            continue
        first = axes.setdefault(axis.matrix, axis)
        if first is not axis and (first.shape, first.entries) != (axis.shape, axis.entries):
            raise PlanError(
                f"cannot share one matrix between all axes of {axis.matrix!r}: the width method gives them different index maps. Pass "
                "a width method with one index map per size, such as width.FPI(maps='cyclic') or width.Lossless(), or tie='use'."
            )
    return axes


def _mix(spec: ModelSpec, made: Operators) -> None:
    """Mix the matrices of a block whose axes have the same kinds and sizes."""
    groups: dict[tuple[str, str], list[Piece]] = {}
    for name, pieces in made.pieces.items():
        place = spec.block_of(name)
        for piece in pieces if place is not None and len(pieces[0].axes) > 1 else ():
            block = f"{place[0].path}.{place[1]}" if place else ""
            groups.setdefault((block, "; ".join(axis.kind for axis in piece.axes)), []).append(
                piece
            )
    for (_, kinds), members in groups.items():
        for index, piece in enumerate(members if len(members) > 1 else ()):
            made.mixes[piece] = f"{len(members)} tensors {kinds}", index, members
