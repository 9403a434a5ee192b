"""Watch the steps of an optimizer by a wrapper of ``optim.step``: no hook of torch runs when a step raises."""

from collections.abc import Callable
from functools import wraps
from types import MethodType
from typing import Any, cast
from weakref import ref

from torch.optim import Optimizer


class WatchedStep:
    """A wrapper of ``optim.step``.

    Attributes:
        running: True inside a step.
    """

    def __init__(self, optim: Optimizer, raised: Callable[[], object]) -> None:
        """Wrap the step.

        Args:
            optim: The optimizer.
            raised: Called when a step has raised an exception, before the caller sees it.
        """
        self.running, self._optim = False, ref(optim)
        self._before, step = vars(optim).get("step"), cast("Callable[..., Any]", optim.step)

        # a method of the optimizer, as torch's schedulers expect of ``optim.step``
        @wraps(getattr(step, "__func__", step))
        def watched(optim: Optimizer, *args: Any, **kwargs: Any) -> Any:
            self.running = True
            try:
                return step(*args, **kwargs)
            except BaseException:
                raised()
                raise
            finally:
                self.running = False

        self._step = MethodType(watched, optim)
        vars(optim)["step"] = self._step

    def remove(self) -> None:
        """Unwrap the step, unless others have wrapped it since."""
        optim = self._optim()
        if optim is None or vars(optim).get("step") is not self._step:
            return
        del optim.step
        if self._before is not None:
            vars(optim)["step"] = self._before
