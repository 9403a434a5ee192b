"""Warmstarting: shrink, zero-pad and perturb. Mallik et al., arXiv:2605.13405; Ash, Adams, NeurIPS 2020, arXiv:1910.08475."""

from collections.abc import Mapping
from dataclasses import dataclass

from growkern.model.spec import ModelSpec
from growkern.planning.argument_checks import STRONGEST, wrong_number
from growkern.planning.decisions import StreamScale, WidthDecision
from growkern.planning.index_map import IndexMap
from growkern.planning.method_spaces import positions, refuse, solve_ties, spaces
from growkern.planning.vector import Vector

REASON = ("weights are shrunk and perturbed",)
NOTE = ("all matrices were shrunk and perturbed: the loss jumps.",)


@dataclass(frozen=True)
class ShrinkPerturb:
    """Shrink every matrix, pad it with zeros, and add the initialization of the target under muP: ``W' = shrink * pad(W) + N(0, sigma^2)``.

    ``sigma`` is ``std * sqrt(n / n')`` for a matrix whose fan-in grows from ``n`` to ``n'``, ``std * n / n'`` for an output matrix (an
    untied head, the router of experts), and ``std`` for embeddings. The noise is cut off at 3.45 ``sigma``. Biases and gains of norms
    have no noise and are not shrunk; a new bias is 0, a new gain the mean of the others. An embedding that the model multiplies by a
    power of ``hidden`` (Gemma) is scaled by the inverse of the factor's change too.

    No law relates the target's gradients to the source's, so the optimizer state cannot be carried: ``state="drop"`` is required.
    ``dynamics="mup"`` scales learning rates as muP does: by ``n / n'`` for matrices that read a space that grows, with Adam.

    Args:
        shrink: Factor on copied elements of matrices, from 0 (a new model) to 1.
        std: Standard deviation of the initialization at the source's widths: ``config.initializer_range`` of transformers.

    Preserves:
        Nothing.

    Example:
        >>> growkern.plan(model, to="2x", width=width.ShrinkPerturb(), state="drop").preserves
        'nothing'

    Reference:
        Mallik et al., "When is Warmstarting Effective for Scaling Language Models?", arXiv:2605.13405, and arXiv:2411.07340.
    """

    shrink: float = 0.4
    std: float = 0.02

    def widen(self, spec: ModelSpec, sizes: Mapping[str, int]) -> WidthDecision:
        """Return index maps and stream scales for the target ``sizes``.

        Raises:
            PlanError: ``shrink`` is not from 0 to 1, ``std`` is not above 0, or a size does not grow.
        """
        problems = [
            *wrong_number("shrink", self.shrink, 0, 1),
            *(
                f"{wrong} New coordinates with zeros as writer and reader never train."
                for wrong in wrong_number("std", self.std, 0, STRONGEST, above=True)
            ),
        ]
        refuse(spec, sizes, "ShrinkPerturb", problems)
        maps: dict[str, IndexMap] = {}
        stream_scales: dict[str, StreamScale] = {}
        for space in spaces(spec, sizes):
            maps[space.name] = IndexMap.tail(space.n_source, space.n_target)
            if space.name == "positions":
                stream_scales |= dict.fromkeys(space.streams, positions(maps[space.name]))
                continue
            ones = Vector.full(1.0, space.n_target)
            # muP's factor on learning rates; ``growkern.planning.perturbation`` takes it out of the weights
            fan_in = Vector.full(space.n_source / space.n_target, space.n_target)
            stream_scale = StreamScale(ones, fan_in, "zero", reads="zero")
            stream_scales |= dict.fromkeys(space.streams, stream_scale)
        solve_ties(spec, sizes, maps, stream_scales)
        return WidthDecision(
            maps, stream_scales, reasons=REASON, notes=NOTE, norms_kept=True, shrink=self.shrink, init_std=self.std,
        )  # fmt: skip
