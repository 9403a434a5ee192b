"""Learning-rate schedules after a growth: back to an earlier position, and up again from 0."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from growkern.optimizer.watched_step import WatchedStep


def unable(schedulers: Iterable[object]) -> Iterator[str]:
    """Yield the class names of schedulers whose rates do not follow from their position alone, so that they cannot be rewound."""
    for scheduler in schedulers:
        closed = hasattr(scheduler, "_get_closed_form_lr")
        if not closed and not isinstance(scheduler, LambdaLR | OneCycleLR):
            yield type(scheduler).__name__


def rewind(scheduler: Any, rho: float) -> None:
    """Move a scheduler from position ``S`` to ``S / rho``, and set the rates of its optimizer's groups to those of the new position."""
    scheduler.last_epoch = round(scheduler.last_epoch / rho)
    scheduler._get_lr_called_within_step = True  # else torch warns
    try:
        rates = getattr(scheduler, "_get_closed_form_lr", scheduler.get_lr)()
    finally:
        scheduler._get_lr_called_within_step = False
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        _set(group, rate)
    scheduler._last_lr = [*rates]


class Rewarm:
    """Lowers the rates of an optimizer inside its steps, and only there: whatever a step raises, the rates are the schedulers' afterwards.

    Attributes:
        factor: Function that returns the factor on all rates in the next step.
    """

    def __init__(self, optim: Optimizer, factor: Callable[[], float]) -> None:
        self.factor = factor
        self._rates: list[tuple[dict[str, Any], Any]] = []
        self._hooks = [
            optim.register_step_pre_hook(self._lower),
            optim.register_step_post_hook(self._end),
        ]
        hooks: Any = optim._optimizer_step_post_hooks  # pyright: ignore[reportPrivateUsage]
        hooks.move_to_end(
            self._hooks[1].id, last=False
        )  # first: in a later one, a scheduler may step
        self._step = WatchedStep(optim, self._end)

    def remove(self) -> None:
        """Put the rates back, and leave the optimizer alone."""
        self._end()
        for hook in self._hooks:
            hook.remove()
        self._step.remove()

    def _lower(self, optim: Optimizer, *_: object) -> None:
        self._end()
        if (factor := self.factor()) == 1:
            return
        for group in optim.param_groups:
            rate = group["lr"]
            self._rates.append((group, rate.clone() if isinstance(rate, Tensor) else rate))
            _set(group, rate * factor)

    def _end(self, *_: object) -> None:
        while self._rates:
            _set(*self._rates.pop())


def _set(group: dict[str, Any], rate: Any) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
