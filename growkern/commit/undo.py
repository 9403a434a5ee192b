"""Reversible writes to live objects, for commit and its helpers."""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from growkern.errors import CommitError
from growkern.support.memory import Backup, keep_on_device

K = TypeVar("K")
V = TypeVar("V")


@dataclass
class Undo:
    """Log of writes that ``rollback`` undoes, latest first. ``keep`` backs up tensors that are replaced."""

    keep: Backup = keep_on_device
    rollbacks: list[Callable[[], object]] = field(default_factory=list[Callable[[], object]])

    def attribute(self, owner: object, name: str, value: object) -> None:
        """Replace the value of an attribute."""
        before = getattr(owner, name)
        self.rollbacks.append(lambda: setattr(owner, name, before))
        setattr(owner, name, value)

    def storage(self, p: Tensor, value: Tensor, grad: Tensor | None) -> None:
        """Give a parameter new storage and a new gradient; the parameter object stays."""
        before = self.keep(p.detach())
        before_grad = None if p.grad is None or grad is None else self.keep(p.grad)
        left = p.grad if grad is None else None

        def back() -> None:
            p.grad = None
            with torch.no_grad():
                p.set_(torch.empty(0, dtype=p.dtype, device=p.device))  # pyright: ignore[reportArgumentType]  # frees memory for the source
                p.set_(before())  # pyright: ignore[reportArgumentType]
            p.grad = left if before_grad is None else before_grad()

        self.rollbacks.append(back)
        p.grad = None  # the setter of grad checks shapes
        with torch.no_grad():
            p.set_(value)  # pyright: ignore[reportArgumentType]
        p.grad = grad

    def set_dict(self, target: MutableMapping[K, V], content: Mapping[K, V]) -> None:
        """Replace the content of a dict; the dict object stays."""
        before = {key: self._kept(value, content.get(key)) for key, value in target.items()}

        def back() -> None:
            kept = {key: value() for key, value in before.items()}
            target.clear()
            target.update(kept)

        self.rollbacks.append(back)
        target.clear()
        target.update(content)

    def _kept(self, value: V, after: object) -> Callable[[], V]:
        if isinstance(value, Tensor) and after is not value:
            return self.keep(value)  # pyright: ignore[reportReturnType]
        return lambda: value

    def set_list(self, target: list[V], content: Sequence[V]) -> None:
        """Replace the content of a list; the list object stays."""
        before = list(target)
        self.rollbacks.append(lambda: target.__setitem__(slice(None), before))
        target[:] = content

    def rollback(self) -> None:
        """Undo all writes. A write whose undo fails is tried again once, after the other undos have freed their memory.

        Raises:
            CommitError: A write could not be undone.
        """
        for last in (False, True):
            failed: list[Callable[[], object]] = []
            errors: list[Exception] = []
            while self.rollbacks:
                step = self.rollbacks.pop()
                try:
                    step()
                except Exception as error:
                    failed.append(step)
                    errors.append(error)
            self.rollbacks = failed[::-1]
            if failed and last:
                raise CommitError(
                    f"the growth failed, and {len(failed)} of its changes could not be rolled back ({errors[0]}): model and "
                    "optimizer are lost; load them from a checkpoint."
                )
