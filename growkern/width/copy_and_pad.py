"""Copy and pad: ``W' = [[W, A], [B, C]]``. Zhang et al., 2021, arXiv:2104.11390."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from growkern.model.spec import ModelSpec
from growkern.planning.argument_checks import STRONGEST, wrong_number
from growkern.planning.decisions import StreamScale, WidthDecision
from growkern.planning.index_map import IndexMap
from growkern.planning.method_spaces import Space, normed, positions, refuse, solve_ties, spaces
from growkern.planning.vector import Vector
from growkern.width.lossless import rule_of


@dataclass(frozen=True)
class CopyAndPad:
    """Keep every weight in place; a new coordinate has zero writers and drawn readers or the reverse, so that old outputs stay.

    The writers of new residual coordinates are zero and their readers drawn; new FFN units and heads have drawn rows and zero columns.
    (The paper also mentions the reverse. With it, two zeros that are multiplied never train: queries and keys, gates and values.)

    Args:
        norm: ``"as_published"`` does not change norms, although they see more coordinates: not exact. ``"corrected"`` scales gains
            and epsilons (RMSNorm), or pads with the mean (LayerNorm): exact.
        std: Standard deviation of drawn weights, in standard deviations of the tensor.

    Preserves:
        The function with ``norm="corrected"``; nothing with ``norm="as_published"``.

    Example:
        >>> growkern.plan(model, to="2x", width=width.CopyAndPad(norm="corrected")).preserves
        'function'

    Reference:
        Zhang et al., 2021, arXiv:2104.11390. The corrected norms use LEMON's pads (Wang et al., ICLR 2024, arXiv:2310.07999).
    """

    norm: Literal["as_published", "corrected"] = "as_published"
    std: float = 1.0

    def widen(self, spec: ModelSpec, sizes: Mapping[str, int]) -> WidthDecision:
        """Return index maps and stream scales for the target ``sizes``.

        Raises:
            PlanError: ``std`` is not positive, the model is post-norm and ``norm="corrected"``, or a size does not grow.
        """
        problems = [
            f"{wrong} A new coordinate with zeros as writer and reader never trains."
            for wrong in wrong_number("std", self.std, 0, STRONGEST, above=True)
        ]
        if self.norm not in ("as_published", "corrected"):
            problems.append(f"norm={self.norm!r} is unknown; pass 'as_published' or 'corrected'.")
        refuse(spec, sizes, "CopyAndPad", problems)
        maps: dict[str, IndexMap] = {}
        stream_scales: dict[str, StreamScale] = {}
        reasons: dict[str, None] = {}
        for space in spaces(spec, sizes):
            maps[space.name] = IndexMap.tail(space.n_source, space.n_target)
            ones = Vector.full(1.0, space.n_target)
            if space.name == "positions":
                stream_scales |= dict.fromkeys(space.streams, positions(maps[space.name]))
            elif not space.norms:
                stream_scales |= dict.fromkeys(
                    space.streams, StreamScale(ones, ones, "random_writer")
                )
            else:
                stream_scales |= self._normed(spec, space, ones)
                if self.norm == "as_published" and not space.same:
                    reasons[
                        f"norms see {space.n_target} coordinates, {space.n_source} of them the source's"
                    ] = None
        solve_ties(spec, sizes, maps, stream_scales)
        kept = self.norm == "as_published"
        return WidthDecision(
            maps,
            stream_scales,
            reasons=tuple(reasons),
            drawn=self.std,
            norms_kept=kept,
            promised=not kept,
        )

    def _normed(self, spec: ModelSpec, space: Space, ones: Vector) -> dict[str, StreamScale]:
        """Return the scales of the streams of a space that norms read."""
        mean = False
        if self.norm == "corrected" and not space.same:
            rms = space.norms == {"rms"}
            mean = rule_of(spec, space, "zero_pad" if rms else None) == "mean_pad"
        scaled = normed(spec)
        silent = {*spec.raw} if mean else set[str]()  # without a norm in front, the mean stays
        return {
            stream: StreamScale(
                ones,
                ones,
                "mean" if mean and stream in scaled else "zero",
                "zero" if stream in silent else None,
            )
            for stream in space.streams
        }
