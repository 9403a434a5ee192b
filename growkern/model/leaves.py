"""Sizes that modules of torch keep as attributes: which attribute is which axis of the module's weight."""

from collections.abc import Mapping
from functools import cache

# class name of a leaf module, or of its base -> attribute that caches a size -> axis of the module's weight
LEAVES: dict[str, dict[str, int]] = {
    "Linear": {"out_features": 0, "in_features": 1},
    "Conv1D": {"nx": 0, "nf": 1},
    "Embedding": {"num_embeddings": 0, "embedding_dim": 1},
    "LayerNorm": {"normalized_shape": 0},
    "RMSNorm": {"normalized_shape": 0},
    "_BatchNorm": {"num_features": 0},
    "Conv2d": {"out_channels": 0, "in_channels": 1},
}


@cache
def cached_sizes(kind: type) -> Mapping[str, int]:
    """Return the attributes that cache sizes of the weight in modules of a class: attribute -> axis of the weight."""
    return next(
        (LEAVES[base.__name__] for base in kind.__mro__ if base.__name__ in LEAVES),
        dict[str, int](),
    )
