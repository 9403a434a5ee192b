"""Step hooks that convert weights and gradients to the optimizer's units before a step, and convert its update back after the step.

The optimizer sees ``p / s`` and ``p.grad / a``; its update of ``p / s`` is multiplied by ``s`` and added to ``p``. All terms of its
step (epsilon, weight decay of either kind, bounds, averages) then act in these units, for any optimizer, element by element.
"""

from collections.abc import Callable, Mapping, Set
from dataclasses import fields
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.optim import Optimizer

from growkern.errors import PlanError, UnsupportedOptimizerError
from growkern.optimizer.factors import (
    Scale,
    divide_,
    multiply_,
    raised,
    rescale_,
    scale_grad_,
    times,
)
from growkern.optimizer.state_rules import VALUES
from growkern.optimizer.watched_step import WatchedStep
from growkern.support.argument_types import typed_arguments
from growkern.support.interrupts import uninterrupted
from growkern.support.text import short

KEY = "update_scale"  # of a param group: True in a live optimizer that has an UpdateScale, its factors in a state dict


def offset_of(key: str, offset: float) -> float:
    """Return the constant that the model adds to a state tensor in the units of the weights: 0 for steps and averages of updates."""
    return offset if not key or key in VALUES else 0.0


class UpdateScale:
    """Scale the updates of an optimizer, element by element and in every step, without a change to its param groups or schedulers.

    A copy of the scaled parameters exists between the two hooks of a step. When ``optim.step()`` raises an exception, the parameters are
    converted back at once. Two kinds of steps cannot be watched, and leave that to ``restore``, ``optim.state_dict()`` or the next step:
    the first one of an optimizer that has loaded factors, and those of a loop that kept the method ``optim.step``. An element that is
    not finite in the optimizer's units keeps its value. ``optim.state_dict()`` contains the factors, and an optimizer that has loaded it
    gets its ``UpdateScale`` before its next step.

    Args:
        optim: Any optimizer.
        scales: Parameter -> one factor on its update, or a ``Scale``.
        orders: State key -> powers of ``s`` and ``a`` in its units. State in the units of the weights (``ax`` of ASGD, ``z`` of
            schedule-free) is converted with the weights in every step; all other state stays in the optimizer's units until
            ``remove``.

    Raises:
        PlanError: A parameter is not in the optimizer, a factor does not fit its parameter, or the optimizer already has an
            ``UpdateScale``.
        UnsupportedOptimizerError: ``optim`` is no optimizer.

    Example:
        >>> linear = torch.nn.Linear(2, 2, bias=False)
        >>> optim = torch.optim.SGD(linear.parameters(), lr=1.0)
        >>> growkern.UpdateScale(optim, {linear.weight: 0.5})
        UpdateScale(SGD, 1 parameters)
        >>> before, linear.weight.grad = linear.weight.detach().clone(), torch.ones(2, 2)
        >>> optim.step()
        >>> torch.allclose(linear.weight, before - 0.5)
        True
    """

    @typed_arguments(PlanError, "scales", optim=UnsupportedOptimizerError)
    def __init__(
        self,
        optim: Optimizer,
        scales: Mapping[Tensor, Scale] | Mapping[Tensor, float],
        *,
        orders: Mapping[str, tuple[float, float]] | None = None,
    ) -> None:
        if not isinstance(scales, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PlanError(
                f"UpdateScale: expected a mapping from parameters to factors, got {short(scales)}."
            )
        if scale_of(optim) is not None:
            raise PlanError(
                "this optimizer already has an UpdateScale; call remove() of that UpdateScale first."
            )
        self.optim, self.orders = optim, dict(orders or {})
        self.scales = _checked(optim, scales)
        # further factors, which a ramp changes in every step, and when it ends; state dicts leave them out
        self.masks: dict[Tensor, Scale] = {}
        self.ramp = ""
        self._before: dict[Tensor, dict[str, Tensor]] = {}  # by state key; "" is the parameter
        self._grads: dict[Tensor, ref[Tensor]] = {}  # gradients in the optimizer's units
        self._hooks: list[Any] = []
        self._step: WatchedStep | None = None
        try:
            self._hooks.append(optim.register_state_dict_post_hook(self._pack))
            self._hooks.append(optim.register_step_pre_hook(self._enter))
            self._hooks.append(optim.register_state_dict_pre_hook(self._saves))
            for group in optim.param_groups:
                group[KEY] = True
            self._step = WatchedStep(optim, self.restore)
        except BaseException:
            self.detach()
            raise

    def remove(self) -> None:
        """Remove the hooks, and convert the optimizer's state to the model's units.

        Raises:
            PlanError: A state tensor has another number of axes than its parameter; nothing has changed.
        """
        self.restore()
        adopt(self.optim)  # factors that were loaded since the last step
        entries = [(p, scale, key) for p, scale in self.scales.items() for key in self._own(p)]
        for p, _, key in entries:
            if self.optim.state[p][key].dim() != p.dim():
                raise PlanError(
                    f"UpdateScale: the state {key!r} has not the axes of its parameter, so it cannot be converted; clear the state first."
                )
        with torch.no_grad():
            for p, scale, key in entries:
                for factors, power in zip(
                    (scale.update, scale.grad), self.orders[key], strict=True
                ):
                    t = self.optim.state[p][key]
                    multiply_(t, tuple(raised(f, power, n) for f, n in zip(factors, t.shape, strict=False)))  # fmt: skip
        self.detach()

    def detach(self) -> None:
        """Remove the hooks without a change to the optimizer's state."""
        for hook in self._hooks:
            hook.remove()
        for group in self.optim.param_groups:
            group.pop(KEY, None)
        if self._step is not None:
            self._step.remove()

    def restore(self) -> None:
        """Convert parameters from the optimizer's units back to the model's, keeping the update."""
        with torch.no_grad(), uninterrupted():
            while self._before:
                p, before = self._before.popitem()
                scale = self._scale(p)
                for key, t in self.tensors(p).items():
                    if (old := before.get(key)) is None:  # the step created this state
                        rescale_(t, scale.update, offset_of(key, scale.offset), multiply_)
                        continue
                    seen = rescale_(old.clone(), scale.seen, offset_of(key, scale.offset), divide_)
                    moved = (t - seen).masked_fill_(~seen.isfinite(), 0.0)  # not inf - inf
                    if scale.gain != 1.0:
                        decayed = seen.mul_(-self._decay(p))
                        moved = (moved - decayed) * scale.gain + decayed
                    t.copy_(old + multiply_(moved, scale.update))
                grad = self._grads.pop(p)()  # None or another: a step raised, and zero_grad ran
                if grad is not None and grad is p.grad:
                    scale_grad_(grad, scale.grad, multiply_)

    def second_moment(self, p: Tensor, square: Tensor) -> Tensor:
        """Return a second moment of the optimizer in the units of the parameter's gradient.

        Args:
            p: The parameter.
            square: Its second moment, such as ``exp_avg_sq``; stays as it is.
        """
        grad = self._scale(p).grad
        factors = tuple(raised(f, 2.0, n) for f, n in zip(grad, square.shape, strict=False))
        return multiply_(square.clone(), factors) if factors else square

    def state_dict(self) -> dict[str, Any]:
        """Return the factors, keyed by the parameter's position in the optimizer's param groups, and ``orders``."""
        places = self._places()
        return {
            "scales": {places[p]: _plain(scale) for p, scale in self.scales.items()},
            "orders": self.orders,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the factors of another run of the same optimizer.

        Args:
            state: What ``state_dict`` returned.

        Raises:
            PlanError: ``state`` is no state dict of ``UpdateScale``, or the factors do not fit the parameters.
        """
        if not {"scales", "orders"} <= state.keys():
            raise PlanError(
                "UpdateScale: cannot read this state; pass what UpdateScale.state_dict() returned."
            )
        params = {place: p for p, place in self._places().items()}
        saved = {int(place): scale for place, scale in state["scales"].items()}
        if unknown := [place for place in saved if place not in params]:
            raise PlanError(
                f"UpdateScale: the optimizer has no parameter at {unknown[:5]}; build the optimizer with the same groups."
            )
        scales = {(p := params[place]): _read(scale, p) for place, scale in saved.items()}
        self.scales = _checked(self.optim, scales)
        self.orders = {key: (powers[0], powers[1]) for key, powers in state["orders"].items()}

    def _pack(self, optim: Optimizer, state_dict: dict[str, Any]) -> None:
        """Replace the mark in each param group of a state dict by the factors of the group's parameters, keyed by position."""
        for group, packed in zip(optim.param_groups, state_dict["param_groups"], strict=True):
            if group.get(KEY) is not True:  # loaded, and not adopted before the first step
                continue
            at = {i: self.scales[p] for i, p in enumerate(group["params"]) if p in self.scales}
            scales = {i: _plain(scale) for i, scale in at.items()}
            packed[KEY] = {"scales": scales, "orders": dict(self.orders)}

    def _saves(self, optim: Optimizer) -> None:
        if self._step is None or not self._step.running:  # after a step that raised unwatched
            self.restore()

    def _places(self) -> dict[Tensor, int]:
        params = [p for group in self.optim.param_groups for p in group["params"]]
        return {p: i for i, p in enumerate(params)}

    def _scale(self, p: Tensor) -> Scale:
        return times(self.scales.get(p), self.masks.get(p))

    def tensors(self, p: Tensor) -> dict[str, Tensor]:
        """Return the parameter, under ``""``, and its state in the units of the weights, by state key.

        Args:
            p: The parameter.
        """
        state = self.optim.state.get(p, {})
        keys = [key for key, powers in self.orders.items() if powers == (1, 0)]
        return {"": p} | {k: state[k] for k in keys if isinstance(state.get(k), Tensor)}

    def _own(self, p: Tensor) -> list[str]:
        """Keys of the state that stays in the optimizer's units; none without gradient factors."""
        state: Mapping[str, Any] = self.optim.state.get(p, {}) if self.scales[p].grad else {}
        return [k for k, powers in self.orders.items() if powers != (1, 0) and isinstance(state.get(k), Tensor)]  # fmt: skip

    def _decay(self, p: Tensor) -> float:
        group = next(g for g in self.optim.param_groups if any(q is p for q in g["params"]))
        return float(group["lr"]) * float(group.get("weight_decay", 0.0))

    def _into(self) -> None:
        with torch.no_grad(), uninterrupted():
            for p in self.scales | self.masks:
                if p.grad is None:
                    continue
                scale, tensors = self._scale(p), self.tensors(p)
                self._grads[p] = ref(p.grad)
                self._before[p] = {key: t.clone() for key, t in tensors.items()}
                for key, t in tensors.items():
                    rescale_(t, scale.seen, offset_of(key, scale.offset), divide_)
                scale_grad_(p.grad, scale.grad, divide_)

    def _enter(
        self, optim: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self.restore()
        # the constructor cannot register the post-hook: it may run inside a step hook, while torch iterates over the hooks
        if len(self._hooks) == 3:
            self._hooks.append(optim.register_step_post_hook(self._leave))
            hooks: Any = optim._optimizer_step_post_hooks  # pyright: ignore[reportPrivateUsage]
            # first, so that all other post-hooks see parameters in the model's units
            hooks.move_to_end(self._hooks[-1].id, last=False)
        closure: Callable[[], Any] | None = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._into()
            return None

        def evaluated() -> Any:  # the closure runs the model, in the model's units
            self.restore()
            with torch.enable_grad():
                loss = closure()
            self._into()
            return loss

        if len(args) > 1:
            return (args[0], evaluated, *args[2:]), kwargs
        return args, kwargs | {"closure": evaluated}

    def _leave(self, optim: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.restore()

    def __repr__(self) -> str:
        return f"UpdateScale({type(self.optim).__name__}, {len(self.scales)} parameters)"


def scale_of(optim: Optimizer) -> UpdateScale | None:
    """Return the ``UpdateScale`` of an optimizer, or None."""
    hooks: list[Any] = list(getattr(optim, "_optimizer_step_pre_hooks", {}).values())
    owners = [getattr(hook, "__self__", None) for hook in hooks]
    return next((owner for owner in owners if isinstance(owner, UpdateScale)), None)


def refuse_mid_ramp(scale: UpdateScale) -> None:
    """Raise PlanError while a ramp masks what the last growth added."""
    if scale.masks:
        raise PlanError(
            f"cannot grow during a ramp, which masks what the last growth added: {scale.ramp}. Train until then, or leave ramp= out."
        )


def adopt(optim: Optimizer) -> None:
    """Give an optimizer the ``UpdateScale`` of the state dict that it has loaded, if the state dict contains one.

    Raises:
        PlanError: The factors do not fit the parameters; or the optimizer is a copy, which lost the hooks of its ``UpdateScale``.
    """
    entries = [(group, group[KEY]) for group in optim.param_groups if KEY in group]
    loaded = [(group, entry) for group, entry in entries if entry is not True]
    scale = scale_of(optim)
    if not loaded:
        if entries and scale is None:
            raise PlanError(
                f"this {type(optim).__name__} is a copy of an optimizer with an UpdateScale, and copies lose hooks: load the "
                "original's state_dict() into the copy."
            )
        return
    try:
        scales = {
            (p := group["params"][int(i)]): _read(values, p)
            for group, entry in loaded
            for i, values in entry.get("scales", {}).items()
        }
        orders = {
            key: (a, b) for _, entry in loaded for key, (a, b) in entry.get("orders", {}).items()
        }
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise PlanError(
            f"the state dict's factors of the learning rates do not fit this {type(optim).__name__} ({error!r}): build the "
            "optimizer with the param groups of the run that saved them."
        ) from None
    scales = _checked(optim, scales)
    if scale is None:
        UpdateScale(optim, scales, orders=orders)
        return
    scale.scales, scale.orders = scales, orders
    for group, _ in loaded:
        group[KEY] = True


def _read(values: Mapping[str, Any], p: Tensor) -> Scale:
    """Return the scale that ``_plain`` wrote, with its tensors on the device of the parameter."""

    def moved(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return tuple(moved(v) for v in value)  # pyright: ignore[reportUnknownVariableType]
        return value.to(p.device) if isinstance(value, Tensor) else value

    return Scale(**{name: moved(value) for name, value in values.items()})


def _plain(scale: Scale) -> dict[str, Any]:
    """Return a scale as types that ``torch.load(weights_only=True)`` reads."""
    return {f.name: getattr(scale, f.name) for f in fields(scale)}


def _checked(optim: Optimizer, scales: Mapping[Tensor, float] | Mapping[Tensor, Scale]) -> dict[Tensor, Scale]:  # fmt: skip
    """Return a ``Scale`` for each parameter; raise PlanError for one that does not fit."""
    held = {id(q) for group in optim.param_groups for q in group["params"]}
    return {p: _checked_scale(optim, held, p, scale) for p, scale in scales.items()}


def _checked_scale(optim: Optimizer, held: Set[int], p: Tensor, scale: float | Scale) -> Scale:
    if not isinstance(p, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PlanError(f"UpdateScale: expected parameters as keys, got {short(p)}.")
    if id(p) not in held:
        raise PlanError(
            f"UpdateScale: this {type(optim).__name__} has no such parameter of shape {tuple(p.shape)}; add it to a param group."
        )
    full = scale if isinstance(scale, Scale) else Scale((scale, *(1.0,) * (p.dim() - 1)))
    n_axes = max(1, p.dim())
    lengths = [len(factors) for factors in (full.update, full.grad, full.seen) if factors]
    if not 0 < full.gain < float("inf") or any(n != n_axes for n in lengths):
        raise PlanError(
            f"UpdateScale: a parameter of shape {tuple(p.shape)} takes one factor per axis and a positive gain, not {full}."
        )
    for factors in (full.update, full.grad, full.seen):
        for axis, factor in enumerate(factors):
            n = p.shape[axis] if p.dim() else 1
            ok = (
                factor.shape == (n,)
                and (factor.is_meta or bool(torch.isfinite(factor).all() and (factor > 0).all()))
                if isinstance(factor, Tensor)
                else isinstance(factor, int | float) and 0 < factor < float("inf")  # pyright: ignore[reportUnnecessaryIsInstance]
            )
            if not ok:
                raise PlanError(
                    f"UpdateScale: axis {axis} of the parameter of shape {tuple(p.shape)} takes a positive number, or {n} of "
                    f"them, not {factor!r}."
                )
    return full
