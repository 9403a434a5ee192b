"""LEMON: Wang et al., "LEMON: Lossless model expansion", ICLR 2024, arXiv:2310.07999."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from growkern.errors import PlanError, raise_all
from growkern.model.size_values import space_of
from growkern.model.spec import ModelSpec
from growkern.planning.argument_checks import wrong_number
from growkern.planning.decisions import StreamScale, WidthDecision
from growkern.planning.index_map import IndexMap
from growkern.planning.method_spaces import normed, refuse, spaces
from growkern.planning.vector import Vector
from growkern.width.lossless import Lossless, Norms

RULES: dict[str, tuple[Norms, str]] = {
    "average": ("mean_pad", "layer"),
    "zero": ("zero_pad", "rms"),
}
EXPANSIONS = (*RULES, "circular", "random")
LEAST_SHARE = 1e-6


@dataclass(frozen=True)
class Lemon:
    """Exact expansion with an uneven split: copies diverge because their readers are unequal, without noise.

    Vectors that a norm reads are expanded with their mean (LayerNorm) or with zeros (RMSNorm), and circularly at whole multiples;
    readers of a pad are drawn. All other vectors are copied circularly.

    Args:
        expansion: ``"average"``, ``"zero"`` or ``"circular"`` (whole multiples only); None for the one that fits the model's norms.
            ``"random"``: as None, but new coordinates that no norm reads (heads, ffn) have drawn writers and zero readers.
        alpha: Share of the first of two copies. With more copies, the share of each is ``(1 - alpha) / alpha`` of the share of the
            copy before it. 0.5 splits evenly.

    Preserves:
        The function.

    Example:
        >>> growkern.plan(model, to="1.5x", width=width.Lemon()).preserves
        'function'

    Reference:
        Wang et al., "LEMON: Lossless model expansion", ICLR 2024, arXiv:2310.07999, figure 3.
    """

    expansion: Literal["average", "zero", "circular", "random"] | None = None
    alpha: float = 0.6

    def widen(self, spec: ModelSpec, sizes: Mapping[str, int]) -> WidthDecision:
        """Return index maps and stream scales for the target ``sizes``.

        Raises:
            PlanError: ``expansion`` is unknown or does not fit the model's norms, a post-norm model cannot have the width, a size does
                not grow, or ``alpha`` is not in (0, 1).
        """
        wrong = wrong_number("alpha", self.alpha, LEAST_SHARE, 1 - LEAST_SHARE)
        raise_all(PlanError, f"cannot widen {spec.family} by Lemon:", [*wrong])
        if self.expansion not in (None, *EXPANSIONS):
            raise PlanError(
                f"Lemon: expansion={self.expansion!r} is unknown; pass {', '.join(map(repr, EXPANSIONS))}."
            )
        refuse(spec, sizes, "Lemon")
        kinds = {kind for space in spaces(spec, sizes) for kind in space.norms}
        norms: Norms | None = "zero_pad" if kinds == {"rms"} else None
        if self.expansion == "circular":
            if broken := [s for s in spaces(spec, sizes) if s.norms and not s.whole]:
                space = broken[0]
                raise PlanError(
                    f"Lemon: a circular expansion from {space.n_source} to {space.n_target} sees unequal copies in its norms; "
                    "expansion='average' (LayerNorm) or expansion='zero' (RMSNorm) is exact."
                )
        elif self.expansion in RULES:
            norms, kind = RULES[self.expansion]
            if kinds - {kind}:
                other = "zero" if self.expansion == "average" else "average"
                raise PlanError(
                    f"Lemon: the {self.expansion} expansion is for {kind} norms; these are {', '.join(sorted(kinds))} norms: "
                    f"pass expansion={other!r}."
                )
        wide = Lossless(noise=0.0, norms=norms).widen(spec, sizes)
        maps, stream_scales = dict(wide.maps), dict(wide.stream_scales)
        for space in spaces(spec, sizes) if self.expansion == "random" else ():
            if not (space.norms or space.same or space.name == "positions"):
                maps[space.name] = IndexMap.tail(space.n_source, space.n_target)
                ones = Vector.full(1.0, space.n_target)
                stream_scales |= dict.fromkeys(
                    space.streams, StreamScale(ones, ones, "random_writer")
                )
        share = _share(self.alpha)
        tied = {spec.tensors[tied][-1].segments[0][0] for tied in spec.ties}
        for stream, stream_scale in stream_scales.items():
            index_map = maps[space_of(stream)]
            if stream in tied or stream in normed(spec) or index_map.is_identity:
                continue
            even = stream_scale.activation.zip(stream_scale.readout, lambda x, y: x * y)
            split = index_map.by_copy(share, pad=0.0)
            u = Vector.of(
                y if j < 0 else s / x
                for j, s, x, y in zip(
                    index_map.indices,
                    split.expanded(),
                    stream_scale.activation.expanded(),
                    even.expanded(),
                    strict=True,
                )
            )
            stream_scales[stream] = replace(stream_scale, readout=u)
        return replace(wide, maps=maps, stream_scales=stream_scales)


def _share(alpha: float) -> Callable[[int, int], float]:
    """Return the function that gives the share of the ``k``-th of some copies; each is ``(1 - alpha) / alpha`` times the one before."""
    ratio = (1 - alpha) / alpha

    @cache
    def total(count: int) -> float:
        return sum(ratio**i for i in range(count))

    def share(k: int, count: int) -> float:
        try:
            return ratio**k / total(count)
        except OverflowError:
            raise PlanError(
                f"Lemon: alpha={alpha!r} gives {count} copies shares beyond the range of floats; pass a number closer to 0.5."
            ) from None

    return share
