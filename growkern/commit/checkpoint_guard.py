"""Refuse checkpoints from before a growth, which torch would load in part, or which would corrupt memory later."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from growkern.errors import CheckpointError, PlanError
from growkern.optimizer.state_rules import Rule
from growkern.planning.growth_plan import GrowthPlan
from growkern.planning.growth_record import read

Shapes = Mapping[str, tuple[int, ...]]
WAY_OUT = "Load a checkpoint from after the growth, or load this one before growing."


@dataclass(frozen=True)
class Grown:
    """One growth of a model: its description, its record for the config, and the tensor shapes of source and target."""

    what: str
    record: str
    source: Shapes
    target: Shapes

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
        )


class Guard:
    """Hook that checks state dicts loaded into a grown model. It stays on copies and pickles of the model."""

    def __init__(self) -> None:
        self.growths: list[Grown] = []

    def __call__(
        self, module: nn.Module, state_dict: Mapping[str, object], prefix: str, *_: object
    ) -> None:
        """Raise CheckpointError for a ``state_dict`` from before one of the model's growths."""
        shapes = {
            name.removeprefix(prefix): tuple(t.shape)
            for name, t in state_dict.items()
            if name.startswith(prefix) and isinstance(t, Tensor)
        }
        live = {name: tuple(t.shape) for name, t in module.state_dict().items()}
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

    def _refuse(self, grown: Grown, why: str) -> None:
        raise CheckpointError(
            f"this checkpoint is from before {grown.what}: {why}. Load the checkpoint into a model of the "
            "source's sizes, then grow the model; or load a checkpoint from after the growth."
        )


class OptimGuard:
    """Hook that checks state dicts loaded into a grown optimizer: torch checks no shapes, and ``fused=True`` writes out of bounds."""

    def __init__(self, rules: Mapping[str, Rule | None], what: str) -> None:
        self.rules, self.what = rules, what

    def __call__(self, optim: Optimizer, state_dict: Mapping[str, Any]) -> None:
        """Raise CheckpointError for state whose shapes do not fit the optimizer's parameters."""
        saved: list[int] = [i for group in state_dict["param_groups"] for i in group["params"]]
        params: list[Tensor] = [p for group in optim.param_groups for p in group["params"]]
        if len(saved) != len(params):
            raise CheckpointError(
                f"this optimizer checkpoint has {len(saved)} parameters, and the optimizer has {len(params)} since {self.what}. {WAY_OUT}"
            )
        for i, p in zip(saved, params, strict=True):
            entries: dict[str, object] = state_dict["state"].get(i, {})
            for key, value in entries.items():
                rule = self.rules.get(key)
                if not isinstance(value, Tensor) or rule is None:
                    continue
                if tuple(value.shape) != (shape := rule.shape(tuple(p.shape))):
                    raise CheckpointError(
                        f"this optimizer checkpoint is from before {self.what}: {key!r} of parameter {i} has the shape "
                        f"{tuple(value.shape)}, and the optimizer needs {shape}. {WAY_OUT}"
                    )


def guard_of(model: nn.Module) -> Guard | None:
    """Return the ``Guard`` of a model, or None."""
    by_id: Any = getattr(model, "_load_state_dict_pre_hooks")  # noqa: B009  (typed as private)
    hooks: list[Any] = [getattr(hook, "hook", hook) for hook in by_id.values()]  # torch wraps hooks
    return next((hook for hook in hooks if isinstance(hook, Guard)), None)


def optim_guard_of(optim: Optimizer) -> OptimGuard | None:
    """Return the ``OptimGuard`` of an optimizer, or None."""
    by_id: Any = optim._optimizer_load_state_dict_pre_hooks  # pyright: ignore[reportPrivateUsage]
    hooks: list[Any] = [*by_id.values()]
    return next((hook for hook in hooks if isinstance(hook, OptimGuard)), None)


def growth_history(model: nn.Module) -> list[str]:
    """Return the growths that a model's config records, as JSON.

    Raises:
        PlanError: ``config.growkern_history`` is not a list of recorded growths.
    """
    return history_of(getattr(model, "config", None))


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
