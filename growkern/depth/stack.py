"""Depth growth by stacking the whole model on itself: not function preserving.

Gong et al., "Efficient Training of BERT by Progressively Stacking", ICML 2019; Du et al., "Stacking Your Transformers",
NeurIPS 2024, arXiv:2405.15319 (G_stack): target block ``l`` copies source block ``l mod n_source``.
"""

from dataclasses import dataclass

from growkern.methods import BlockRow, Depth


@dataclass(frozen=True)
class Stack:
    """Repeat the blocks from the bottom until the target depth is reached; optimizer state comes along."""

    def deepen(self, n_source: int, n_target: int) -> Depth:
        """Give the blocks of the target: ``l mod n_source``."""
        blocks = tuple(BlockRow(i % n_source, new=i >= n_source) for i in range(n_target))
        return Depth(
            blocks,
            reasons=("stacked blocks compute their function twice",) if n_target > n_source else (),
        )
