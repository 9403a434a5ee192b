"""Learning-rate schedules after a growth: back to an earlier position, and up again from 0."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR


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
    """Rates of optimizers that are lower during one step."""

    def __init__(self) -> None:
        self._before: list[tuple[dict[str, Any], Any]] = []

    def lower(self, optim: Optimizer, factor: float) -> None:
        """Multiply the rates of all groups by a factor until ``restore``."""
        for group in optim.param_groups:
            rate = group["lr"]
            self._before.append((group, rate.clone() if isinstance(rate, Tensor) else rate))
            _set(group, rate * factor)

    def restore(self) -> None:
        """Put the rates back."""
        while self._before:
            _set(*self._before.pop())


def _set(group: dict[str, Any], rate: Any) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
