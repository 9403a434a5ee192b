"""Width methods: each gives an index map per space and a stream scale per stream."""

from growkern.width.bert2bert import AKI, FPI, AKIPro, Net2Wider
from growkern.width.copy_and_pad import CopyAndPad
from growkern.width.copy_experts import CopyExperts
from growkern.width.fresh_features import FreshFeatures
from growkern.width.hyperclone import HyperClone
from growkern.width.lemon import Lemon
from growkern.width.lossless import Lossless
from growkern.width.shrink_perturb import ShrinkPerturb
from growkern.width.sparkling import Sparkling

__all__ = [
    "AKI",
    "FPI",
    "AKIPro",
    "CopyAndPad",
    "CopyExperts",
    "FreshFeatures",
    "HyperClone",
    "Lemon",
    "Lossless",
    "Net2Wider",
    "ShrinkPerturb",
    "Sparkling",
]


def __dir__() -> list[str]:
    return __all__
