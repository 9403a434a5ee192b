"""growkern: grow a transformer in the middle of training, in place: weights, gradients and optimizer state together."""

from growkern import depth, errors, width
from growkern.api import expand_inplace, plan
from growkern.describe import describe
from growkern.plan import GrowthPlan
from growkern.report import GrowthReport
from growkern.spaces import Blocks, ModelSpec, embedding, linear, norm, reader, writer
from growkern.verify import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "Blocks",
    "GrowthPlan",
    "GrowthReport",
    "ModelSpec",
    "Verification",
    "depth",
    "describe",
    "embedding",
    "errors",
    "expand_inplace",
    "linear",
    "norm",
    "plan",
    "reader",
    "verify",
    "width",
    "writer",
]
