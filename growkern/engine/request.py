"""What one growth is asked for, in one object."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from growkern.commit.optimizer import Masters
from growkern.commit.undo import Undo
from growkern.execution.execute import Memory
from growkern.execution.tiles import Given
from growkern.model.spec import ModelSpec
from growkern.planning.growth_plan import GrowthPlan


@dataclass(frozen=True, slots=True)
class Request:
    """One growth or shrinking, as asked for. ``expand_inplace`` documents what users pass.

    Attributes:
        model: Changed in place, out of its wrappers.
        optims: Changed in place: none, or one.
        make_plan: The spec of ``model`` -> the plan, or PlanError.
        drop_state: True when the optimizer's state is cleared, so that no rule for it needs to be known.
        spec: Description of a model of the user's own.
        backend: ``"triton"``, ``"torch"``, ``"nan"``, or None.
        scheduler: The learning-rate scheduler that drives the optimizer, or a list of them.
        ema: Averages of the model, grown by the same plan; None when the user named none.
        master_weights: Parameter -> the copy in higher precision that the optimizer holds in its place.
        state_rules: State key -> order in the gradient, for an optimizer without state state_rules.
        memory: ``"stage"``, ``"lean"``, or None for the first that fits.
        new_rows: What writes the rows that copy no source row, where the width method does.
        undo: Writes of earlier growths that a failure of this one rolls back too (``all_or_nothing``).
    """

    model: nn.Module
    optims: tuple[Optimizer, ...]
    make_plan: Callable[[ModelSpec], GrowthPlan]
    drop_state: bool = False
    spec: ModelSpec | None = None
    backend: str | None = None
    scheduler: object | None = None
    ema: nn.Module | Sequence[nn.Module] | None = None
    master_weights: Masters | None = None
    state_rules: Mapping[str, int | None] | None = None
    memory: Memory | None = None
    new_rows: Given | None = None
    undo: Undo | None = None

    @property
    def optim(self) -> Optimizer | None:
        """The optimizer; None where there is none."""
        return self.optims[0] if self.optims else None
