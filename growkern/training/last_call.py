"""The last call of a model that a schedule drives: the batch of a check, and of the description of a model that no family knows."""

import torch
from torch import nn

from growkern.engine.forward_check import Call
from growkern.errors import UnsupportedModelError
from growkern.model.describe import describe
from growkern.support.live_registry import Live
from growkern.support.wrappers import unwrapped


class LastCall:
    """Keeps the arguments of a model's last forward, until it is removed.

    Args:
        model: The model, without wrappers.

    Attributes:
        call: The last call; None before the first.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self._compiled = model, False
        self.call: Call | None = None
        self._hooks = [model.register_forward_pre_hook(self._record, with_kwargs=True)]

    def _record(self, _: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if not torch.compiler.is_compiling():
            self.call = Call(self.model, args, kwargs)

    def describe(self) -> bool:
        """Describe the model by its last call; later descriptions of the model take the same inputs.

        Returns:
            False if a call has to be waited for: ``torch.compile`` leaves the hooks of the model out, and not those of its wrapper.

        Raises:
            UnsupportedModelError: No call was seen, or see ``growkern.describe``.
        """
        if self.call is not None:
            describe(self.model, inputs=self.call.inputs)
            return True
        around = [
            m for m in Live.now().modules if m is not self.model and unwrapped(m) is self.model
        ]
        if self._compiled or not around:
            raise UnsupportedModelError(
                f"no family describes {type(self.model).__name__}, and no call of it was seen that could be traced (model.compile() hides "
                "them): pass spec=lambda model: growkern.describe(model, inputs=batch)."
            )
        self._hooks += [m.register_forward_pre_hook(self._record, with_kwargs=True) for m in around]  # fmt: skip
        self._compiled = True
        return False

    def remove(self) -> None:
        """Stop keeping calls, and forget the last."""
        for hook in self._hooks:
            hook.remove()
        self.call = None
