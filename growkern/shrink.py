"""Shrink methods: each selects source coordinates and source blocks to keep, and gives the stream scales of the target."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from growkern.errors import PlanError, raise_all
from growkern.model.spec import ModelSpec, writer_corrections
from growkern.planning.decisions import BlockRow, LayerOrder, StreamScale, WidthDecision
from growkern.planning.index_map import IndexMap
from growkern.planning.method_spaces import spaces, tied_streams
from growkern.planning.vector import Vector

__all__ = ["FirstCopies", "WeightSelection"]


def __dir__() -> list[str]:
    return __all__


SHRINKS = ("hidden", "heads", "kv_heads", "ffn", "positions", "layers")


@dataclass(frozen=True)
class WeightSelection:
    """Keep evenly spaced coordinates of every space, unscaled, and the first layers.

    Coordinate ``i`` of ``n`` keeps source coordinate ``i * N / n`` of ``N`` where ``n`` divides ``N``, else ``i * (N - 1) / (n - 1)``,
    rounded (halves to even). Kept elements keep their gradients and optimizer state. The paper selects along each axis of each
    tensor separately; WeightSelection selects coordinates of a space, so heads stay whole and fused q, k and v agree. Of the
    positions, the first are kept.

    Args:
        layers: The source layers to keep, in order; None for the first.

    Preserves:
        Nothing.

    Example:
        >>> growkern.plan(model, to="0.5x", shrink=shrink.WeightSelection()).preserves
        'nothing'

    Reference:
        Xu et al., "Initializing Models with Larger Ones", ICLR 2024, arXiv:2311.18823.
    """

    layers: tuple[int, ...] | None = None

    def narrow(self, spec: ModelSpec, sizes: Mapping[str, int]) -> WidthDecision:
        """Give index maps and stream scales for the target ``sizes``; raise PlanError for a size that does not shrink."""
        _refuse(spec, sizes, "WeightSelection")
        reasons = ("selected weights do not make up for the others",)
        return _narrowed(spec, sizes, _spaced, lambda _: 1.0, reasons)

    def keep(self, n_source: int, n_target: int) -> LayerOrder:
        """Give the kept blocks; raise PlanError unless ``layers`` names ``n_target`` source layers in ascending order."""
        return _kept(self.layers, n_source, n_target, "WeightSelection")


@dataclass(frozen=True)
class FirstCopies:
    """Undo an even growth: keep the first copy of every coordinate, and multiply its readers by the number of copies.

    FirstCopies inverts ``width.Lossless(noise=0)``, ``width.HyperClone()`` and ``depth.Stack()`` at whole multiples, bit for bit at
    powers of 2 (except in Gemma 2 and T5, whose embedding or head is scaled by ``sqrt(hidden)``): weights, gradients, optimizer
    state, and learning rates under the ``dynamics`` of the growth. Where copies have diverged, the training of the other copies is
    discarded. Gains and epsilons of norms are kept, and so are the first positions.

    Args:
        layers: The source layers to keep, in order; None for the first. ``(0, 2)`` undoes ``IdentityBlocks`` from 2 to 4 layers.

    Preserves:
        Nothing, unless the copies are equal: then the function.

    Example:
        >>> growkern.plan(model, to="0.5x", shrink=shrink.FirstCopies()).preserves
        'nothing'

    Reference:
        growkern's own: the even splits of Net2Net (arXiv:1511.05641) and HyperCloning (arXiv:2409.12903), read backwards.
    """

    layers: tuple[int, ...] | None = None

    def narrow(self, spec: ModelSpec, sizes: Mapping[str, int]) -> WidthDecision:
        """Give index maps and stream scales for the target ``sizes``.

        Raises:
            PlanError: A width that does not divide the source's; a size that does not shrink.
        """
        uneven = {
            space.size: f"{space.size}: {space.n_target} does not divide {space.n_source}, so there are no even copies; "
            "use WeightSelection(), which shrinks to any size."
            for space in spaces(spec, sizes)
            if space.n_source % space.n_target and space.name != "positions"
        }
        _refuse(spec, sizes, "FirstCopies", *uneven.values())
        reasons = ("the other copies are dropped, which is exact only where they are equal",)
        return _narrowed(spec, sizes, _first, float, reasons)

    def keep(self, n_source: int, n_target: int) -> LayerOrder:
        """Give the kept blocks; raise PlanError unless ``layers`` names ``n_target`` source layers in ascending order."""
        return _kept(self.layers, n_source, n_target, "FirstCopies")


def _refuse(spec: ModelSpec, sizes: Mapping[str, int], who: str, *problems: str) -> None:
    unsupported = [
        f"{name}: {who} does not shrink it ({spec.sizes[name]} -> {n}); it shrinks {', '.join(SHRINKS)}."
        for name, n in sizes.items()
        if n != spec.sizes[name] and name not in SHRINKS
    ]
    raise_all(PlanError, f"cannot shrink {spec.family}:", [*unsupported, *problems])


def _narrowed(
    spec: ModelSpec,
    sizes: Mapping[str, int],
    index_map: Callable[[int, int], IndexMap],
    u: Callable[[int], float],
    reasons: tuple[str, ...],
) -> WidthDecision:
    """Return index maps and stream scales of the kept coordinates; ``u`` maps the number of copies to the factor on readers."""
    maps: dict[str, IndexMap] = {}
    stream_scales: dict[str, StreamScale] = {}
    made: dict[tuple[bool, int, int], tuple[IndexMap, StreamScale]] = {}  # shared by blocks
    for space in spaces(spec, sizes):
        key = (space.name == "positions", space.n_source, space.n_target)
        if key not in made:
            places, n_source, n = key
            ones = Vector.full(1.0, n)
            stream_scale = StreamScale(ones, ones if places else Vector.full(u(n_source // n), n))
            made[key] = (_first if places else index_map)(n_source, n), stream_scale
        maps[space.name], stream_scale = made[key]
        stream_scales |= dict.fromkeys(space.streams, stream_scale)
    factors = writer_corrections(spec, sizes)
    for stream, origin in [
        *tied_streams(spec)
    ]:  # a tied head has the embedding's factor; the final norm compensates
        ones, factor = stream_scales[origin].activation, factors.get(origin, 1.0)
        w = stream_scales[origin].readout.map(lambda c, f=factor: c / f)
        stream_scales[stream] = StreamScale(w, ones.map(lambda _, f=factor: f))
    narrower = any(sizes[name] != n for name, n in spec.sizes.items() if name != "layers")
    return WidthDecision(maps, stream_scales, reasons=reasons if narrower else (), norms_kept=True)


def _first(n_source: int, n_target: int) -> IndexMap:
    return IndexMap.of(range(n_target), n_source)


def _spaced(n_source: int, n_target: int) -> IndexMap:
    if n_source % n_target == 0:
        return IndexMap.of(range(0, n_source, n_source // n_target), n_source)
    step = Fraction(n_source - 1, n_target - 1)
    return IndexMap.of((round(i * step) for i in range(n_target)), n_source)


def _kept(layers: tuple[int, ...] | None, n_source: int, n_target: int, who: str) -> LayerOrder:
    if layers is not None and not isinstance(layers, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PlanError(
            f"{who}: layers={layers!r} is not valid; pass the layers to keep, such as (0, 2)."
        )
    order = (*range(n_target),) if layers is None else (*layers,)
    known = all(type(i) is int and 0 <= i < n_source for i in order)
    if not known or [*order] != sorted({*order}):
        raise PlanError(
            f"{who}: layers={layers!r} must name layers of 0 to {n_source - 1} in ascending order, each once."
        )
    if len(order) != n_target:
        raise PlanError(
            f'{who}: layers={layers!r} names {len(order)} layers, and the target has {n_target}; pass to={{"layers": {len(order)}}}.'
        )
    reasons = ("blocks are dropped",) if n_target < n_source else ()
    return LayerOrder(tuple(map(BlockRow, order)), reasons=reasons)
