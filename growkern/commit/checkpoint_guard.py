"""Refuse checkpoints from before a growth, which torch would load in part, or which would corrupt memory later."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from growkern.errors import CheckpointError, PlanError
from growkern.planning.growth_plan import GrowthPlan
from growkern.planning.growth_record import read
from growkern.support.names import canonical

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Grown:
    """One growth of a model: its description, its record for the config, the tensor shapes of source and target, and the new blocks."""

    what: str
    record: str
    source: Shapes
    target: Shapes
    new_blocks: tuple[str, ...] = ()

    @staticmethod
    def by(plan: GrowthPlan, number: int, record: str) -> "Grown":
        """Describe the growth by a plan, the model's ``number``-th growth."""
        sizes = plan.source_sizes.items()
        changes = [
            f"{k} {n} -> {plan.target_sizes[k]}" for k, n in sizes if plan.target_sizes[k] != n
        ]
        kind = "shrinking" if plan.shrinks else "growth"
        return Grown(
            f"{kind} {number} ({', '.join(changes) or 'nothing changed'})",
            record,
            {row.source: plan.shapes(row)[0] for row in plan.tensors},
            {row.name: plan.shapes(row)[1] for row in plan.tensors},
            plan.new_blocks,
        )


class Guard:
    """Hook that checks state dicts loaded into a grown model. It stays on copies and pickles of the model."""

    def __init__(self) -> None:
        self.growths: list[Grown] = []

    def __call__(
        self, module: nn.Module, state_dict: Mapping[str, object], prefix: str, *rest: Any
    ) -> None:
        """Raise CheckpointError for a ``state_dict`` from before one of the model's growths; explain other shapes that do not fit."""
        shapes = {
            canonical(name.removeprefix(prefix)): tuple(t.shape)
            for name, t in state_dict.items()
            if name.startswith(prefix) and isinstance(t, Tensor)
        }
        live = {canonical(name): tuple(t.shape) for name, t in module.state_dict().items()}
        apart = [name for name, shape in shapes.items() if live.get(name, shape) != shape]
        for grown in self.growths:
            new = (grown.target.keys() - grown.source.keys()) & live.keys()
            whole = all(shapes.get(name) == shape for name, shape in grown.source.items())
            if whole and not new & shapes.keys() and (apart or new):
                why = f"the checkpoint has no {min(new)}" if new else ""
                if apart:
                    first_name = apart[0]
                    why = f"{first_name} has the shape {shapes[first_name]}, in the model {live[first_name]}"
                self._refuse(grown, why)
        for name in apart:
            for grown in self.growths:
                if grown.source.get(name) == shapes[name]:
                    why = f"{name} has the shape {shapes[name]}, in the model {live[name]}"
                    self._refuse(grown, why)
        if apart:
            errors: list[str] = rest[-1]  # torch raises them with its own
            errors.append(
                "growkern grows this model: if the checkpoint is from after a growth, build model and optimizer as at the start of "
                "the run, and call growkern.resume(model, optim, history) before loading."
            )

    def _refuse(self, grown: Grown, why: str) -> None:
        raise CheckpointError(
            f"this checkpoint is from before {grown.what}: {why}. Load the checkpoint into a model of the "
            "source's sizes, then grow the model; or load a checkpoint from after the growth."
        )


def guard_of(model: nn.Module) -> Guard | None:
    """Return the ``Guard`` of a model, or None."""
    by_id: Any = getattr(model, "_load_state_dict_pre_hooks")  # noqa: B009  (typed as private)
    hooks: list[Any] = [getattr(hook, "hook", hook) for hook in by_id.values()]  # torch wraps hooks
    return next((hook for hook in hooks if isinstance(hook, Guard)), None)


def guard_model(model: nn.Module) -> Guard:
    """Return the ``Guard`` of a model; register one if there is none."""
    guard = guard_of(model)
    if guard is None:
        guard = Guard()
        model.register_load_state_dict_pre_hook(guard)
    return guard


def growth_history(model: nn.Module) -> list[str]:
    """Return the growths that a model's config records, as JSON; for a model without such a config, those of this process.

    Raises:
        PlanError: ``config.growkern_history`` is not a list of recorded growths.
    """
    config = getattr(model, "config", None)
    if not records_growths(config) and (guard := guard_of(model)) is not None:
        return [grown.record for grown in guard.growths]
    return history_of(config)


def records_growths(config: object) -> bool:
    """True for a config that is saved with its model and takes a new field: not for a dataclass with slots, as torchtitan's."""
    return hasattr(config, "to_dict") and hasattr(config, "__dict__")


def history_of(config: object) -> list[str]:
    """Return the growths that a config records, as JSON; raise PlanError for anything but a list of recorded growths."""
    history: Any = getattr(config, "growkern_history", None)
    if history is None:
        return []
    try:
        if type(history) not in (list, tuple):
            raise TypeError
        for entry in history:  # pyright: ignore[reportUnknownVariableType]
            read(entry)  # pyright: ignore[reportUnknownArgumentType]
    except (PlanError, TypeError) as error:
        why = f" ({error})" if isinstance(error, PlanError) else ""
        raise PlanError(
            f"config.growkern_history is a {type(history).__name__}, not a list of recorded growths{why}: delete the field, or restore it "
            "from the checkpoint."
        ) from None
    return list(history)  # pyright: ignore[reportUnknownArgumentType]


def n_growths(model: nn.Module) -> int:
    """Return the number of a model's growths, in this process or before the model was saved."""
    guard = guard_of(model)
    return max(len(guard.growths) if guard else 0, len(growth_history(model)))
