"""Checkpoints from before a growth, loaded after it: refused by name, where torch would load a part, or corrupt memory later."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from growkern.errors import CheckpointError, PlanError
from growkern.optimizer.state_rules import Rule
from growkern.planning.growth_plan import GrowthPlan

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Grown:
    """One growth that a model has been through: what changed, what its tensors were before, and what checkpoints keep of it."""

    what: str
    record: str
    source: Shapes
    target: Shapes

    @staticmethod
    def by(plan: GrowthPlan, number: int, record: str) -> "Grown":
        """Of a plan, the ``number``-th."""
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
    """Looks at what is loaded into a grown model; a hook of the model, which goes with its copies and pickles."""

    def __init__(self) -> None:
        self.growths: list[Grown] = []

    def __call__(
        self, module: nn.Module, state_dict: Mapping[str, object], prefix: str, *_: object
    ) -> None:
        """Raise CheckpointError for a ``state_dict`` of the model as it was before one of its growths."""
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
                why = f"it has no {min(new)}" if new else ""
                if apart:
                    one = apart[0]
                    why = f"{one} has the shape {shapes[one]}, in the model {live[one]}"
                self._refuse(grown, why)
        for name in apart:
            for grown in self.growths:
                if grown.source.get(name) == shapes[name]:
                    why = f"{name} has the shape {shapes[name]}, in the model {live[name]}"
                    self._refuse(grown, why)

    def _refuse(self, grown: Grown, why: str) -> None:
        raise CheckpointError(
            f"this checkpoint is from before {grown.what}: {why}. Load it into a model as it was, then grow; or load one "
            "from after it."
        )


class OptimGuard:
    """Looks at what is loaded into the optimizer of a grown model: torch checks no shapes, and ``fused=True`` writes beyond them."""

    def __init__(self, rules: Mapping[str, Rule | None], what: str) -> None:
        self.rules, self.what = rules, what

    def __call__(self, optim: Optimizer, state_dict: Mapping[str, Any]) -> None:
        """Raise CheckpointError for state that does not fit."""
        saved: list[int] = [i for group in state_dict["param_groups"] for i in group["params"]]
        params: list[Tensor] = [p for group in optim.param_groups for p in group["params"]]
        if len(saved) != len(params):
            raise CheckpointError(
                f"this optimizer checkpoint holds {len(saved)} parameters, the optimizer {len(params)} since {self.what}."
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
                        f"{tuple(value.shape)}, which would have to be {shape}."
                    )


def guard_of(model: nn.Module) -> Guard | None:
    """The guard that a model has."""
    found: Any = getattr(model, "_load_state_dict_pre_hooks")  # noqa: B009  (typed as private)
    hooks: list[Any] = [getattr(hook, "hook", hook) for hook in found.values()]  # torch wraps them
    return next((hook for hook in hooks if isinstance(hook, Guard)), None)


def optim_guard_of(optim: Optimizer) -> OptimGuard | None:
    """The guard that an optimizer has."""
    found: Any = optim._optimizer_load_state_dict_pre_hooks  # pyright: ignore[reportPrivateUsage]
    hooks: list[Any] = [*found.values()]
    return next((hook for hook in hooks if isinstance(hook, OptimGuard)), None)


def growth_history(model: nn.Module) -> list[str]:
    """The growths that a model's config says it has been through, as JSON.

    Raises:
        PlanError: The config holds something else.
    """
    found: Any = getattr(getattr(model, "config", None), "growkern_history", None) or []
    if not isinstance(found, list | tuple) or not all(isinstance(one, str) for one in found):  # pyright: ignore[reportUnknownVariableType]
        raise PlanError(
            f"config.growkern_history is {found!r}, not a list of growths on record: take it out of the config, or restore it "
            "from the checkpoint."
        )
    return list(found)  # pyright: ignore[reportUnknownArgumentType]


def n_growths(model: nn.Module) -> int:
    """Growths that a model has been through, here or before it was saved."""
    guard = guard_of(model)
    return max(len(guard.growths) if guard else 0, len(growth_history(model)))
