"""The dual law: methods decide index maps, stream scales and blocks; the roles of axes decide the factors on weights and gradients.

    writer: weight x w, gradient x u        reader: weight x u, gradient x w
    gain of a norm from stream a to stream b: weight x w_b sqrt(f) / w_a, gradient x u_b w_a / sqrt(f)

where ``f`` is the factor by which the norm's mean square changes; the norm's epsilon changes by ``f`` too. The gain is the vector that
the norm multiplies with: the weight, or ``offset + weight`` in some models.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from growkern.errors import PlanError, raise_all
from growkern.model.size_values import size_value
from growkern.model.spec import AxisUse, Blocks, ModelSpec, writer_corrections
from growkern.planning.axis_scales import (
    axis_maps,
    gradients_exact,
    norm_factors,
    refuse_unsaid,
    symmetric_copies,
)
from growkern.planning.decisions import (
    BlockRow,
    DepthMethod,
    LayerOrder,
    ShrinkMethod,
    WidthDecision,
    WidthMethod,
)
from growkern.planning.epsilon import Eps
from growkern.planning.exactness import checked
from growkern.planning.growth_plan import AxisMap, GrowthPlan, TensorRow
from growkern.planning.options import DYNAMICS, STATES
from growkern.planning.perturbation import perturbed
from growkern.planning.sizes import stays
from growkern.planning.targets import Homes, by_pattern, homes_of, targets
from growkern.support.text import short


def build(
    spec: ModelSpec,
    sizes: Mapping[str, int],
    *,
    width: WidthMethod | None = None,
    depth: DepthMethod | None = None,
    shrink: ShrinkMethod | None = None,
    state: str = "exact",
    dynamics: str | None = "mup",
    seed: int = 0,
) -> GrowthPlan:
    """Plan a growth, or a shrink if ``shrink`` is given.

    Args:
        spec: Description of the source model.
        sizes: Every target size (``growkern.planning.sizes.resolve_sizes``).
        width: Width method.
        depth: Depth method.
        shrink: Shrink method, in place of ``width`` and ``depth``, for smaller targets.
        state: Mode of the optimizer state, one of ``growkern.planning.options.STATES``.
        dynamics: Mode of the learning rates: ``"mup"``, ``"exact"`` or None.
        seed: Seed of the noise and of all drawn weights.

    Returns:
        The plan.

    Raises:
        PlanError: An option or a method is invalid, or a method does not support the growth.
    """
    _check_request(spec, width, depth, shrink, state, dynamics, seed)
    wide = _wide(spec, sizes, width, shrink)
    if spec.blocks is None and sizes.get("layers") != spec.sizes.get("layers"):
        verb = "deepen" if shrink is None else "shrink"
        raise PlanError(
            f"cannot {verb} {spec.family}: the spec names no blocks; set ModelSpec(blocks=Blocks(...))."
        )
    deep = {stack.path: _decided(spec, stack, sizes, depth, shrink) for stack in spec.stacks}
    homes = {path: homes_of(order.blocks) for path, order in deep.items()}
    if shrink is None:
        refuse_unsaid(spec, sizes, wide)
    factors = norm_factors(spec, wide)
    axes = axis_maps(spec.axes, wide, factors, writer_corrections(spec, sizes))
    eps = Eps.of(spec, factors)
    mixed = axes if wide.next_layer else {}
    same_head_dim = sizes.get("head_dim") == spec.sizes.get("head_dim")
    plan = GrowthPlan(
        family=spec.family,
        source_sizes=dict(spec.sizes),
        target_sizes=dict(sizes),
        width=str(width if shrink is None else shrink),
        depth=str(depth if shrink is None else shrink),
        seed=seed,
        state=state,
        dynamics=dynamics,
        axes=axes,
        tensors=tuple(perturbed(rows_of(spec, deep, homes, mixed), spec, axes, wide, state)),
        blocks_path=spec.blocks.path if spec.blocks else "",
        blocks=deep[spec.blocks.path].blocks if spec.blocks else (),
        extra_stacks={stack.path: deep[stack.path].blocks for stack in spec.extra_stacks},
        ties=dict(spec.ties),
        counters=spec.counters,
        attributes=attributes(spec, homes, sizes),
        rebuilt_modules=() if same_head_dim else spec.rebuilt_from_config,
        eps=eps.of_targets(spec, homes),
        config={name: size_value(size, sizes) for name, size in spec.config.items()},
        config_lists=spec.config_lists,
        config_eps=eps.config,
        gradients_exact=not (wide.noise or wide.perturbs) and gradients_exact(spec, wide),
        reasons=(*dict.fromkeys(_reasons(spec, wide, deep.values(), factors)),),
        notes=(
            *wide.notes,
            *dict.fromkeys(note for order in deep.values() for note in order.notes),
            *(symmetric_copies(wide) if state in ("exact", "copy", "drop") else ()),
            *_notes_of_sizes(spec, sizes),
            *eps.notes,
        ),
    )
    return plan if wide.reasons else checked(plan, spec, wide)


def _reasons(
    spec: ModelSpec, wide: WidthDecision, deep: Iterable[LayerOrder], factors: Mapping[str, float | None]
) -> Iterator[str]:  # fmt: skip
    """Yield the reasons for which the function is not preserved: of the width method, of the depth method, and of norms."""
    yield from wide.reasons
    for order in deep:
        yield from order.reasons
    for stream, factor in factors.items():
        if factor is None:
            yield f"the norms of {stream!r} see unequal copies"
        elif factor != 1 and stream in (spec.non_affine_norms or ()):
            yield f"the norm without parameters on {stream!r} sees another mean square"


def _wide(
    spec: ModelSpec,
    sizes: Mapping[str, int],
    width: WidthMethod | None,
    shrink: ShrinkMethod | None,
) -> WidthDecision:
    """Return the decision of the shrink method, or else of the width method."""
    try:
        if shrink is not None:
            return shrink.narrow(spec, sizes)
        assert width is not None, "one of the two decides"
        return width.widen(spec, sizes)
    except ArithmeticError as error:
        raise PlanError(
            f"cannot plan by {short(width or shrink)}: a number is out of range ({error}); pass a smaller one."
        ) from None


def _check_request(
    spec: ModelSpec, width: object, depth: object, shrink: object, state: str, dynamics: str | None, seed: int
) -> None:  # fmt: skip
    """Raise PlanError for unknown options, an invalid seed, and methods of the wrong kind."""
    problems: list[str] = []
    if state not in STATES:
        problems.append(f"unknown state={state!r}; pass {', '.join(map(repr, STATES))}.")
    if dynamics not in DYNAMICS:
        problems.append(f"unknown dynamics={dynamics!r}; pass 'mup', 'exact' or None.")
    if type(seed) is not int or not 0 <= seed < 1 << 64:
        problems.append(f"seed={seed!r}: pass an int from 0 to 2**64 - 1.")
    if shrink is not None:
        expected = "a shrink method such as WeightSelection()"
        problems += _strange("method", "keep", expected, shrink)
    else:
        problems += _strange("width", "widen", "a width method such as Lossless()", width)
        problems += _strange("depth", "deepen", "a depth method such as IdentityBlocks()", depth)
    verb = "grow" if shrink is None else "shrink"
    raise_all(PlanError, f"cannot {verb} {spec.family}:", problems)


TAKES = {
    "widen": "expand_inplace takes it as width=",
    "deepen": "expand_inplace takes it as depth=",
    "narrow": "shrink_inplace takes it as method=",
}


def _strange(name: str, verb: str, expected: str, method: object) -> list[str]:
    if hasattr(method, verb) and not isinstance(method, type):
        return []
    takes = [f"; {who}" for own, who in TAKES.items() if hasattr(method, own) and own != verb]
    return [f"{name}: expected {expected}, got {short(method)}{''.join(takes)}."]


def _notes_of_sizes(spec: ModelSpec, sizes: Mapping[str, int]) -> Iterator[str]:
    """Yield notes on the widths that stay, and on a config that cannot be saved."""
    yield from stays(spec, sizes)
    yield from unsaved(spec, sizes)


def unsaved(spec: ModelSpec, sizes: Mapping[str, int]) -> Iterator[str]:
    """Yield a note if transformers would refuse to save the target's config."""
    if (
        spec.save_requires_multiple is not None
        and sizes[spec.save_requires_multiple[0]] % sizes[spec.save_requires_multiple[1]]
    ):
        whole, unit = spec.save_requires_multiple
        yield (
            f"save_pretrained refuses a {spec.family} whose {whole} ({sizes[whole]}) is no multiple of {unit} ({sizes[unit]}); "
            "torch.save does not."
        )


def _decided(
    spec: ModelSpec,
    stack: Blocks,
    sizes: Mapping[str, int],
    depth: DepthMethod | None,
    shrink: ShrinkMethod | None,
) -> LayerOrder:
    """Return the layer order of a stack; in a model of several stacks, a stack of unchanged depth keeps the source's order."""
    n_source, n_target = spec.sizes[stack.size], sizes[stack.size]
    if not n_source and not (n_target and hasattr(depth, "block")):
        what = f"{n_target} by {short(depth)}: there is no block to copy; grow by depth=Fresh(), which initializes new blocks."
        if not n_target:
            what = f"0: a model without blocks grows in width only together with {stack.size}. Name {stack.size} in to=; use depth=Fresh()."
        raise PlanError(f"cannot take this {spec.family} from 0 {stack.size} to {what}")
    if spec.extra_stacks and n_target == n_source:  # the depth method is for another stack
        return LayerOrder(tuple(map(BlockRow, range(n_source))))
    if shrink is not None:
        kept = shrink.keep(n_source, n_target)
        if stack.next_kinds and [stack.kinds[b.source] for b in kept.blocks] != [
            *stack.kinds_at(n_target)
        ]:
            raise PlanError(
                f"cannot shrink {spec.family} to {n_target} {stack.size}: its blocks are of several kinds, and the blocks that stay would "
                "stand at places of other kinds; leave out whole periods of blocks, or none."
            )
        return kept
    assert depth is not None, "one of the two decides"
    return _deepened(spec, stack, depth, sizes)


def _deepened(
    spec: ModelSpec, stack: Blocks, depth: DepthMethod, sizes: Mapping[str, int]
) -> LayerOrder:
    """Return the layer order of a depth method, adapted to the stack.

    New blocks copy no block before ``first_copied``, and a block of the kind of their place; the stack's reasons for inexact identity
    blocks are added. Raises PlanError if the stack does not support the branch factors, the identity blocks or the copies.
    """
    n_layers, n_target = spec.sizes[stack.size], sizes[stack.size]
    deep = depth.deepen(n_layers, n_target)
    if any(block.branch != 1 for block in deep.blocks) and (stack.carries or not stack.branches):
        why = (
            "its norms come after the branches" if stack.carries else "its spec does not name them"
        )
        raise PlanError(
            f"cannot scale the branches of {spec.family}: {why}; choose a depth method without branch factors, such as Stack()."
        )
    if not any(block.new for block in deep.blocks):
        return deep
    if deep.identity and not stack.identity:
        raise PlanError(
            f"cannot add identity blocks to {spec.family}: its ModelSpec does not list the tensors to zero. "
            "Set Blocks(identity={...}), or choose depth=Stack()."
        )
    first = stack.first_copied
    if first >= max(1, n_layers):
        raise PlanError(
            f"cannot deepen {spec.family} from {n_layers}: its first {first} blocks are unlike all others, and no other block can "
            f"be copied; start from a model of {first + 1} blocks or more."
        )
    blocks = (replace(b, source=max(b.source, first)) if b.new else b for b in deep.blocks)
    if stack.next_kinds:
        blocks = by_pattern([*blocks], stack)
    own = stack.reasons if deep.identity else ()
    return replace(deep, blocks=tuple(blocks), reasons=(*deep.reasons, *own))


def attributes(spec: ModelSpec, homes: Homes, sizes: Mapping[str, int]) -> dict[str, float]:
    """Return ``"module.attribute"`` of the target -> value, for every size and block index that a module caches."""
    own = {
        name: index if size == "block" else size_value(size, sizes)
        for source, size in spec.attributes.items()
        for name, index in targets(spec, homes, source)
    }
    return own | {
        name: spec.tensors[tensor][axis].size(sizes)
        for source, (tensor, axis) in spec.cached_sizes.items()
        for name, _ in targets(spec, homes, source)
    }


def rows_of(
    spec: ModelSpec,
    deep: Mapping[str, LayerOrder],
    homes: Homes,
    mixed: Mapping[str, AxisMap],
) -> Iterator[TensorRow]:
    """Yield the row of every target tensor; tensors that grow along a ``mixed`` axis take their later copies from the next layer."""
    for source, axes in spec.tensors.items():
        if source in spec.ties:
            continue
        own = tuple(map(spec.axes.__getitem__, axes))
        place = spec.block_of(source)
        added = offset(axes)
        for name, index in targets(spec, homes, source):
            if place is None:
                yield TensorRow(name, source, own, offset=added)
                continue
            stack, _, inner = place
            blocks = deep[stack.path]
            row = TensorRow(name, source, own, new=blocks.blocks[index].new, offset=added)
            row = _with_next(row, spec, axes, mixed, *place) if mixed else row
            yield _in_block(row, stack, blocks, index, inner)


def offset(axes: Sequence[AxisUse]) -> float:
    """Return the offset that the model adds to a norm's weight to get the gain; 0 for other tensors."""
    for axis in axes:
        if axis.norm:
            return axis.norm.offset
    return 0.0


def _with_next(
    row: TensorRow,
    spec: ModelSpec,
    axes: Sequence[AxisUse],
    mixed: Mapping[str, AxisMap],
    stack: Blocks,
    index: int,
    inner: str,
) -> TensorRow:
    """Set the next layer's tensor as source of the later copies along the first written axis that grows, if there is a next layer."""
    next_layer = f"{stack.path}.{index + 1}.{inner}"
    for at, (axis, key) in enumerate(zip(axes, row.axes, strict=True)):
        if (
            axis.role != "reader"
            and not mixed[key].index_map.is_identity
            and next_layer in spec.tensors
        ):
            return replace(row, next_layer_source=next_layer, next_layer_axis=at)
    return row


def _in_block(row: TensorRow, stack: Blocks, deep: LayerOrder, index: int, inner: str) -> TensorRow:
    """Complete the row of tensor ``inner`` (name inside the block) in target block ``index``: branch factor, constant, initialization."""
    block = deep.blocks[index]
    if block.branch != 1:  # scales output weights and inner gradients
        own = "factor" if inner in stack.branches else "grad_factor"
        row = replace(row, **{own: block.branch})
    if deep.fresh and block.new:
        return replace(row, drawn=True, state="fresh", next_layer_source=None, next_layer_axis=0)
    if not deep.identity:
        return row
    if inner in stack.carries:
        after = deep.blocks[index + 1] if index + 1 < len(deep.blocks) else None
        moves_on = after is not None and after.new and after.source == block.source
        return replace(row, constant=stack.carries[inner], state="fresh") if moves_on else row
    return replace(row, constant=stack.identity.get(inner), state="fresh") if block.new else row
