"""Depth growth by blocks that start as the identity: exact.

Wu et al., "LLaMA Pro: Progressive LLaMA with Block Expansion", ACL 2024, arXiv:2401.02415: copies of blocks with zero
attention output and down projections, spread evenly. A new post-norm block also takes over the last norm of the block before it.
"""

from dataclasses import dataclass

from growkern.depth.layer_order import spread
from growkern.planning.decisions import LayerOrder


@dataclass(frozen=True)
class IdentityBlocks:
    """Insert blocks that compute the identity, spread evenly (LLaMA Pro's positions where the numbers of blocks divide).

    The attention output and down projections of a new block are 0 (in Gemma 2: the gains of the norms behind these projections). All
    other weights are copies of the block before it.

    Preserves:
        The function; in post-norm models up to the epsilon of the norms.

    Example:
        >>> growkern.plan(model, to={"layers": 4}, depth=depth.IdentityBlocks()).preserves
        'function'

    Reference:
        Wu et al., "LLaMA Pro: Progressive LLaMA with Block Expansion", ACL 2024, arXiv:2401.02415.
    """

    def deepen(self, n_source: int, n_target: int) -> LayerOrder:
        """Return the blocks of the target, with the new blocks spread evenly behind the source blocks."""
        return LayerOrder(spread(n_source, n_target), identity=True)
