"""The arguments of one growth, in one object."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn
from torch.optim import Optimizer

from growkern.commit.optimizer import Masters
from growkern.commit.undo import Undo
from growkern.engine.forward_check import Check
from growkern.execution.sets import Memory
from growkern.execution.tiles import Given
from growkern.model.initial import Initialize
from growkern.model.spec import ModelSpec
from growkern.planning.growth_plan import GrowthPlan
from growkern.support.progress import Progress


@dataclass(frozen=True, slots=True)
class Request:
    """Request for one growth or shrinking. ``expand_inplace`` documents the arguments of users.

    Attributes:
        model: Source model without wrappers; changed in place.
        optims: Optimizers of the model, each of other parameters; changed in place.
        make_plan: Function from the spec of ``model`` to the plan; raises PlanError.
        methods: The methods that ``make_plan`` builds with, by the name of their argument; None where it does not build.
        drop_state: True when the optimizer's state is cleared, so that it needs no rule.
        spec: Description of a custom model.
        backend: ``"triton"``, ``"torch"``, ``"nan"``, or None.
        scheduler: The learning-rate scheduler that drives an optimizer, or a list of schedulers.
        ema: Averages of the model, grown by the same plan; None if the user passed none.
        master_weights: Parameter -> the copy in higher precision that an optimizer holds in its place.
        state_rules: State key -> order in the gradient, for an optimizer without a known law.
        memory: ``"stage"``, ``"lean"``, or None for the first that fits.
        new_rows: The width method's function that writes rows without a source row; None for a method without one.
        init: The depth method's function that initializes a module of a new block in place; None for the model's own code.
        block: The depth method's block for a model without blocks; None to build the block from the config.
        first: Path of a stack without blocks -> the block that stands in for block 0 while the growth runs.
        check_of: Function from the spec of ``model`` to a batch, or to a function from the model to its outputs, on which the grown model
            is compared with the source; to None where it is not.
        split: For each optimizer, True when a recorded growth split its param groups; None to split them where ``scheduler`` follows.
        on_progress: Callback with the bytes written and the total bytes.
        undo: Writes of earlier growths that a failure of this growth rolls back too (``all_or_nothing``).
    """

    model: nn.Module
    optims: tuple[Optimizer, ...]
    make_plan: Callable[[ModelSpec], GrowthPlan]
    drop_state: bool = False
    methods: Mapping[str, object] | None = None
    spec: ModelSpec | None = None
    backend: str | None = None
    scheduler: object | None = None
    ema: nn.Module | Sequence[nn.Module] | None = None
    master_weights: Masters | None = None
    state_rules: Mapping[str, int | None] | None = None
    memory: Memory | None = None
    new_rows: Given | None = None
    init: Initialize | None = None
    block: object | None = None
    first: Mapping[str, nn.Module] = field(default_factory=dict[str, nn.Module])
    check_of: Callable[[ModelSpec], Check | None] = lambda _: None
    split: Sequence[bool] | None = None
    on_progress: Progress | None = None
    undo: Undo | None = None
