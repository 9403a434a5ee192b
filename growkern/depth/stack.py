"""Depth growth by stacking the model, or its top, on itself: not function preserving.

Gong et al., "Efficient Training of BERT by Progressively Stacking", ICML 2019; Du et al., "Stacking Your Transformers",
NeurIPS 2024, arXiv:2405.15319 (G_stack): target layer ``l`` copies source layer ``l mod n_source``. bert2BERT (Chen et al., ACL 2022,
arXiv:2110.07143): whole stacks, and the remaining layers from the top. MSLT (Yang et al., arXiv:2011.13635) and gradual stacking: copies
of the top layers.
"""

from dataclasses import dataclass
from typing import Literal

from growkern.depth.layer_order import around, between, blocks
from growkern.errors import PlanError
from growkern.planning.argument_checks import wrong_layer
from growkern.planning.decisions import LayerOrder
from growkern.support.text import short

REASON = ("stacked blocks compute their function twice",)


@dataclass(frozen=True)
class Stack:
    """Repeat the layers, with their optimizer state, until the target depth is reached.

    Args:
        remainder: Source layers of an incomplete stack: the ``"bottom"`` layers (StackBERT, G_stack: ``l mod n_source``) or the
            ``"top"`` layers (bert2BERT).
        ignore_first: Layers at the bottom that are not repeated.
        ignore_last: Layers at the top that are not repeated.

    Preserves:
        Nothing.

    Example:
        >>> plan = growkern.plan(model, to={"layers": 5}, depth=depth.Stack())
        >>> [block.source for block in plan.blocks]
        [0, 1, 0, 1, 0]

    Reference:
        Gong et al., "Efficient Training of BERT by Progressively Stacking", ICML 2019; Du et al., "Stacking Your Transformers: A Closer
        Look at Model Growth for Efficient LLM Pre-Training", NeurIPS 2024, arXiv:2405.15319.
    """

    remainder: Literal["bottom", "top"] = "bottom"
    ignore_first: int = 0
    ignore_last: int = 0

    def deepen(self, n_source: int, n_target: int) -> LayerOrder:
        """Return the blocks of the target; raise PlanError if the ignored layers leave none to repeat."""
        if self.remainder not in ("bottom", "top"):
            raise PlanError(
                f"Stack: remainder={self.remainder!r} is unknown; pass 'bottom' or 'top'."
            )
        n, m = between(n_source, n_target, self.ignore_first, self.ignore_last, "Stack")
        rest = m % n
        order = [*range(n)] * (m // n) + [
            *(range(rest) if self.remainder == "bottom" else range(n - rest, n))
        ]
        order = around(order, n_source, self.ignore_first, self.ignore_last)
        return LayerOrder(blocks(order, n_source, "Stack"), reasons=REASON if m > n else ())


@dataclass(frozen=True)
class TopCopies:
    """Append copies of the top layers (MSLT, gradual stacking).

    Args:
        n: Number of top layers that are copied, repeatedly until the target depth is reached; None for the number of added layers,
            at most all layers.

    Preserves:
        Nothing.

    Example:
        >>> plan = growkern.plan(model, to={"layers": 4}, depth=depth.TopCopies(n=1))
        >>> [block.source for block in plan.blocks]
        [0, 1, 1, 1]

    Reference:
        Yang et al., "Progressively Stacking 2.0: A Multi-stage Layerwise Training Method for BERT Training Speedup",
        arXiv:2011.13635.
    """

    n: int | None = None

    def deepen(self, n_source: int, n_target: int) -> LayerOrder:
        """Return the blocks of the target; raise PlanError unless ``n`` is from 1 to the source depth."""
        n_new = n_target - n_source
        n = min(n_new, n_source) if self.n is None else self.n
        if wrong_layer(n) or (n_new and not 1 <= n <= n_source):
            raise PlanError(
                f"TopCopies: n={short(n)} is not a number of layers of this model; pass 1 to {n_source}."
            )
        top = [*range(n_source - n, n_source)]
        order = [*range(n_source), *(top[i % n] for i in range(n_new))]
        return LayerOrder(blocks(order, n_source, "TopCopies"), reasons=REASON if n_new else ())
