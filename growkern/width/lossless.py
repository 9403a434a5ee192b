"""Lossless width growth: the target computes the source's function exactly.

New coordinates are pads, which copy no source coordinate (Zhang et al., arXiv:2104.11390), and norms are corrected for pads: by a zero
pad (RMSNorm), a mean pad, or centering with a zero pad (LayerNorm). Or new coordinates are copies: even splits at whole multiples
(Net2Net: Chen et al., arXiv:1511.05641), isometric scaling or pads at other widths, with twin noise (HyperCloning: Samragh et al.,
arXiv:2409.12903). The pads and the epsilon rules are LEMON's (Wang et al., arXiv:2310.07999).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import sqrt
from typing import Literal

from growkern.errors import PlanError
from growkern.model.size_values import space_of
from growkern.model.spec import ModelSpec
from growkern.planning.argument_checks import STRONGEST, wrong_number
from growkern.planning.axis_scales import mean_square_factor
from growkern.planning.decisions import StreamScale, WidthDecision
from growkern.planning.index_map import IndexMap
from growkern.planning.method_spaces import (
    GROWS,
    INNER,
    Space,
    even,
    normed,
    refuse,
    solve_ties,
    spaces,
    splits,
)
from growkern.planning.vector import Vector
from growkern.width import head_dim_and_experts

Norms = Literal["isometric", "zero_pad", "mean_pad", "centre_pad"]
NORM_KINDS: dict[str, str] = {
    "isometric": "rms",
    "zero_pad": "rms",
    "mean_pad": "layer",
    "centre_pad": "layer",
}
PADS: dict[str, Norms] = {"rms": "zero_pad", "layer": "mean_pad"}


TWIN_NOISE = 1.0  # strength of the twin noise on copies under ``noise=None``


@dataclass(frozen=True)
class Lossless:
    """Grow width and preserve the function.

    By default new coordinates are pads: the writers of new residual coordinates are 0 (LayerNorm: the mean) and their readers drawn,
    new heads and FFN units have drawn rows and zero readers, and norms are corrected. Of the methods that preserve the function, this
    one ended with the lowest loss (the guide "What growing pays"). Pads are not exact everywhere: if norms write the residual stream
    (post-norm, Gemma 2), are of several kinds, may read a stream behind an activation function, or (at whole multiples) need an epsilon
    that no config field holds for all of them (OPT, Qwen3), and for head_dim, experts and kv heads that split, new coordinates are
    copies with twin noise of strength 1. ``norms`` requests pads under norms nevertheless, where pads are exact.

    Args:
        noise: None for the default above. A number replaces pads by copies and is the strength of their twin noise, in standard
            deviations of the weight: ``+N`` on one copy's column, ``-N`` on its twin's, so that the function is preserved. 0 leaves
            equal copies, which stay equal forever. Readers of zero and mean pads do not affect the function; they are always drawn
            with the standard deviation of the weight.
        norms: Rule for coordinates that norms read: ``"zero_pad"`` (RMSNorm), ``"mean_pad"`` or ``"centre_pad"`` (LayerNorm; default
            ``"mean_pad"``). With ``noise``, the rule applies only at a width that is no whole multiple, and ``"isometric"`` (RMSNorm)
            is allowed too, as the default.

    Preserves:
        The function. With ``noise=0`` and no pads also the gradient, and under ``dynamics="exact"`` the trajectory.

    Example:
        >>> growkern.plan(model, to="2x", width=width.Lossless()).preserves
        'function'
        >>> growkern.plan(model, to="2x", width=width.Lossless(noise=0), dynamics="exact").preserves
        'trajectory'

    Reference:
        Zhang et al., arXiv:2104.11390 (copy and pad); Wang et al., "LEMON: Lossless model expansion", ICLR 2024, arXiv:2310.07999
        (pads under norms); Samragh et al., arXiv:2409.12903 (twin noise). growkern's own rules: the guide "How it works".
    """

    noise: float | None = None
    norms: Norms | None = None

    def widen(self, spec: ModelSpec, sizes: Mapping[str, int]) -> WidthDecision:
        """Return index maps and stream scales for the target ``sizes``.

        Args:
            spec: Description of the source model.
            sizes: Every target size.

        Returns:
            A pad or an exact split of every space.

        Raises:
            PlanError: A size does not grow, a post-norm model cannot have the width, or ``norms`` does not fit the model's norms or
                ``noise``.
        """
        problems: list[str] = []
        pads = self.noise is None
        noise = TWIN_NOISE if self.noise is None else self.noise
        problems += wrong_number("noise", noise, 0, STRONGEST)
        if self.norms is not None and self.norms not in list(NORM_KINDS):
            problems.append(
                f"norms={self.norms!r} is unknown; pass {', '.join(map(repr, NORM_KINDS))}."
            )
        elif pads and self.norms == "isometric":
            problems.append("norms='isometric' makes copies; pass the noise= of the copies too.")
        problems += [*head_dim_and_experts.problems(spec, sizes)]
        refuse(spec, sizes, "Lossless", problems, (*GROWS, *INNER, "top_k"))
        maps: dict[str, IndexMap] = {}
        stream_scales: dict[str, StreamScale] = {}
        index_map, stream_scale = (
            cache(self._index_map),
            cache(_stream_scale),
        )  # blocks share index maps and stream scales
        scaled = {*normed(spec), "positions"}
        apart = splits(spec, sizes)
        for space in spaces(spec, sizes):
            if head_dim_and_experts.is_split(space, apart):
                maps[space.name] = head_dim_and_experts.split(space)
                stream_scales |= dict.fromkeys(space.streams, even(maps[space.name]))
                continue
            if space.name in INNER and not space.same:
                maps[space.name] = head_dim_and_experts.index_map(spec, space)
                stream_scales |= dict(head_dim_and_experts.stream_scales(space, maps[space.name]))
                continue
            how = self._rule(spec, space)
            maps[space.name] = index_map(space.n_source, space.n_target, how)
            for stream in space.streams:
                normal = stream in scaled, stream in spec.raw, space.name in spec.squares_kept
                stream_scales[stream] = stream_scale(maps[space.name], how, *normal)
        solve_ties(spec, sizes, maps, stream_scales)
        notes, joint = (
            (*head_dim_and_experts.notes(spec, sizes),),
            head_dim_and_experts.joint(spec, maps, apart),
        )
        return WidthDecision(
            maps, stream_scales, float(noise), notes=notes, joint=joint, promised=True
        )

    def _rule(self, spec: ModelSpec, space: Space) -> str | None:
        """Return how a space grows: a rule for norms, ``"random_writer"``, ``"positions"``, or None for an even split."""
        if space.name == "positions":
            return "positions"
        free = not space.norms and not (spec.unsaid and space.name == "residual")
        if self.noise is None and free and (spec.post_norm or not spec.sandwiched):
            return "random_writer"
        pads = self.noise is None and space.norms and not space.same
        if pads and (self.norms or _pads_last(spec, space)):
            return rule_of(spec, space, self.norms or PADS[next(iter(space.norms))])
        return None if space.whole or not space.norms else rule_of(spec, space, self.norms)

    def _index_map(self, n_source: int, n_target: int, how: str | None) -> IndexMap:
        if n_source == n_target:
            return IndexMap.identity(n_source)
        if how == "mean_pad" and self.noise is not None:
            return IndexMap.padded(n_source, n_target)
        padded = how in ("zero_pad", "mean_pad", "centre_pad", "positions", "random_writer")
        return (IndexMap.tail if padded else IndexMap.cyclic)(n_source, n_target)


def _pads_last(spec: ModelSpec, space: Space) -> bool:
    """True when pads are exact, also after a reload, and train.

    Pads change the epsilon of the norms that read them, so one config field must hold it for all norms of the model (OPT has no such
    field; Qwen3 shares it with norms that do not grow). If a norm writes the residual stream (Gemma 2), a pad's gain in a new block and
    the activation that the gain multiplies would both be 0, and neither would train.
    """
    if len(space.norms) != 1 or spec.post_norm or spec.sandwiched:
        return False
    held = not spec.config or (
        spec.config_eps and len({space_of(norm.reads) for _, _, norm in spec.norms()}) == 1
    )
    corrected = not (space.activated or {*space.streams} & {*(spec.non_affine_norms or ())})
    return bool(held and corrected)


def rule_of(spec: ModelSpec, space: Space, norms: Norms | None) -> Norms:
    """Return the rule for a space that norms read; raise PlanError if no rule is exact, or if ``norms`` is for another kind of norm."""
    n_source, n_target = space.n_source, space.n_target
    low = n_target // n_source * n_source
    nearest = f"nearest whole multiples: {', '.join(str(n) for n in (low, low + n_source))}"
    if space.whole:
        nearest = "width.Lossless() without norms= makes copies, which are exact here"
    ask = f"cannot widen {spec.family} from {space.size} {n_source} to {n_target} exactly:"
    if spec.post_norm:
        raise PlanError(
            f"{ask} where norms write the residual stream (post-norm), only whole multiples keep the function; {nearest}."
        )
    if space.norms != {"rms"} and {*space.streams} & {*(spec.non_affine_norms or ())}:
        raise PlanError(
            f"{ask} a norm without parameters has no gain to correct, so only whole multiples keep the function; {nearest}."
        )
    if len(space.norms) > 1:
        raise PlanError(f"{ask} its norms are of several kinds; {nearest}.")
    if space.activated:
        raise PlanError(
            f"{ask} a norm reads {space.activated[0]!r}, perhaps behind an activation function, and only copies at whole multiples are "
            f"exact there; {nearest}."
        )
    kind = next(iter(space.norms))
    how: Norms = norms or ("isometric" if kind == "rms" else "mean_pad")
    if NORM_KINDS[how] != kind:
        raise PlanError(
            f"{ask} norms={how!r} is for {NORM_KINDS[how]} norms; these are {kind} norms: leave norms= out."
        )
    if how == "centre_pad" and (raw := sorted(spec.raw & {*space.streams})):
        raise PlanError(
            f"{ask} norms='centre_pad' subtracts the mean, and a linear layer reads {raw[0]!r} without a norm: leave norms= out."
        )
    return how


def _stream_scale(
    index_map: IndexMap, how: str | None, normed: bool, raw: bool, squares_kept: bool
) -> StreamScale:
    """Return the scale of a stream; one whose mean square is kept is multiplied by the root of what the mean square loses."""
    own = _unkept(index_map, how, normed, raw)
    if not (normed and squares_kept and how) or how == "positions":
        return own
    loss = sqrt(mean_square_factor(index_map, own.activation) or 1.0)
    w, u = own.activation.map(lambda x: x / loss), own.readout.map(lambda x: x * loss)
    return replace(own, activation=w, readout=u)


def _unkept(index_map: IndexMap, how: str | None, normed: bool, raw: bool) -> StreamScale:
    """Return the scale of a stream whose mean square may change."""
    n_copies = max((count for count, _ in index_map.counts.repeats), default=1)
    if how == "isometric" and normed:
        root = index_map.per_copy(lambda c: 1 / sqrt(c), pad=1.0)
        return StreamScale(root, root)
    w = Vector.full(1.0, index_map.n_target)
    u = index_map.per_copy(lambda c: 1 / c, pad=1 / n_copies)
    if how == "random_writer":
        return StreamScale(w, u, "random_writer")
    mean = how in ("mean_pad", "positions") and normed
    reads = "zero" if how == "mean_pad" and raw else None  # without a norm in front, the mean stays
    centered = how == "centre_pad" and normed
    return StreamScale(w, u, "mean" if mean else "zero", reads, centered)
