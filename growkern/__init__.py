"""growkern: grow a transformer in the middle of training, in place: weights, gradients and optimizer state together."""

from importlib import import_module
from types import ModuleType

from growkern import depth, errors, inherit, optim, procedures, recipes, shrink, vocab, width
from growkern.advice.advice import Advice
from growkern.advice.adviser import advise
from growkern.analysis.comparison import Comparison, Outcome, compare
from growkern.analysis.utility import expert_utility
from growkern.analysis.verification import Verification, verify
from growkern.api import expand_inplace, plan, shrink_inplace
from growkern.engine.report import GrowthReport
from growkern.engine.upcycle import upcycle
from growkern.learning.learn import learn
from growkern.model.describe import describe
from growkern.model.hints import Hint
from growkern.model.layers import embedding, linear, norm, reader, writer
from growkern.model.size_values import Power
from growkern.model.spec import Blocks, ModelSpec
from growkern.optimizer.factors import Scale
from growkern.optimizer.update_scale import UpdateScale
from growkern.planning.growth_plan import GrowthPlan
from growkern.training import trains
from growkern.training.replay import resume
from growkern.training.schedule import GrowthSchedule
from growkern.training.slope import WhenSlope
from growkern.training.triggers import At, WhenPlateau

__version__ = "0.2.0"


_LAZY = {  # name -> room
    "accelerate": "integrations",
    "dcp": "checkpoints",
    "hf": "integrations",
    "lightning": "integrations",
}


def __getattr__(name: str) -> ModuleType:
    """Import ``growkern.hf``, ``growkern.lightning``, ``growkern.accelerate`` or ``growkern.dcp``, with its framework, on first use."""
    if name in _LAZY:
        return import_module(f"growkern.{_LAZY[name]}.{name}")
    raise AttributeError(f"module 'growkern' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names only."""
    return sorted((*__all__, *_LAZY, "__version__"))


__all__ = [
    "Advice",
    "At",
    "Blocks",
    "Comparison",
    "GrowthPlan",
    "GrowthReport",
    "GrowthSchedule",
    "Hint",
    "ModelSpec",
    "Outcome",
    "Power",
    "Scale",
    "UpdateScale",
    "Verification",
    "WhenPlateau",
    "WhenSlope",
    "advise",
    "compare",
    "depth",
    "describe",
    "embedding",
    "errors",
    "expand_inplace",
    "expert_utility",
    "inherit",
    "learn",
    "linear",
    "norm",
    "optim",
    "plan",
    "procedures",
    "reader",
    "recipes",
    "resume",
    "shrink",
    "shrink_inplace",
    "trains",
    "upcycle",
    "verify",
    "vocab",
    "width",
    "writer",
]
