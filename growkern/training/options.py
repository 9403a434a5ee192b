"""Options that all growths of an attached schedule share."""

from collections.abc import Callable, Mapping, Sequence

from torch import nn
from typing_extensions import TypedDict  # a torch dependency; typing's is complete from 3.11 on

from growkern.commit.optimizer import Masters
from growkern.engine.forward_check import Check
from growkern.execution.sets import Memory
from growkern.model.spec import ModelSpec
from growkern.support.progress import Progress

SpecOf = Callable[[nn.Module], ModelSpec]  # of a custom model at its present sizes


class Options(TypedDict, total=False):
    """Arguments of ``expand_inplace`` that all growths of an attached schedule share; arguments that differ are fields of the events.

    Attributes:
        spec: Description of a custom model, or a function from the model to its description: every growth changes the sizes.
        backend: See ``expand_inplace``.
        ema: See ``expand_inplace``.
        master_weights: See ``expand_inplace``.
        state_rules: See ``expand_inplace``.
        memory: See ``expand_inplace``.
        on_progress: See ``expand_inplace``.
        check: True to check each growth by the forward on the last batch of the model; or see ``expand_inplace``. Default: True where the
            model is described by ``spec``, else False.
    """

    spec: ModelSpec | SpecOf | None
    backend: str | None
    ema: nn.Module | Sequence[nn.Module] | None
    master_weights: Masters | None
    state_rules: Mapping[str, int | None] | None
    memory: Memory | None
    on_progress: Progress | None
    check: Check | bool | None


def spec_function(spec: ModelSpec | SpecOf | None) -> SpecOf | None:
    """Return the option ``spec`` as a function from the model to its description."""
    return (lambda _: spec) if isinstance(spec, ModelSpec) else spec
