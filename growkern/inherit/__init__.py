"""Knowledge inheritance: a student learns from a teacher that runs, or from its stored logits, and then from the data alone."""

from growkern.inherit.inheritance import KnowledgeInheritance
from growkern.inherit.linear_loss import Losses, fused_loss
from growkern.inherit.store import store
from growkern.inherit.stored import Stored
from growkern.inherit.targets import sampled, top

__all__ = ["KnowledgeInheritance", "Losses", "Stored", "fused_loss", "sampled", "store", "top"]


def __dir__() -> list[str]:
    return __all__
