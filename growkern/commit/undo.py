"""Reversible writes to live objects, for commit and its helpers."""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from growkern.distributed.storage import Swap, kept, swapped
from growkern.errors import CommitError
from growkern.support.interrupts import uninterrupted
from growkern.support.memory import Backup, keep_on_device

ATTEMPTS = 2

K = TypeVar("K")
V = TypeVar("V")


@dataclass
class Undo:
    """Log of writes that ``rollback`` undoes, latest first.

    Attributes:
        keep: Backs up tensors that are replaced.
        swap: Exchanges the storage of a parameter; see ``distributed.storage.swapped``.
    """

    keep: Backup = keep_on_device
    swap: Callable[[Tensor, Backup], Swap] = swapped
    rollbacks: list[Callable[[], object]] = field(default_factory=list[Callable[[], object]])

    def attribute(self, owner: object, name: str, value: object) -> None:
        """Replace the value of an attribute."""
        before = getattr(owner, name)
        self.rollbacks.append(lambda: setattr(owner, name, before))
        setattr(owner, name, value)

    def storage(self, p: Tensor, value: Tensor, grad: Tensor | None) -> None:
        """Give a parameter new storage and a new gradient; the parameter object stays."""
        write, restore = self.swap(p, self.keep)
        before_grad = None if p.grad is None or grad is None else kept(p.grad, self.keep)
        left = p.grad if grad is None else None

        def back() -> None:
            p.grad = None
            restore()
            p.grad = left if before_grad is None else before_grad()

        self.rollbacks.append(back)
        p.grad = None  # the setter of grad checks shapes
        write(value)
        p.grad = grad

    def set_dict(self, target: MutableMapping[K, V], content: Mapping[K, V]) -> None:
        """Replace the content of a dict; the dict object stays."""
        before = {key: self._kept(value, content.get(key)) for key, value in target.items()}

        def back() -> None:
            content = {key: value() for key, value in before.items()}
            target.clear()
            target.update(content)

        self.rollbacks.append(back)
        target.clear()
        target.update(content)

    def _kept(self, value: V, after: object) -> Callable[[], V]:
        if isinstance(value, Tensor) and after is not value:
            return kept(value, self.keep)  # pyright: ignore[reportReturnType]
        return lambda: value

    def set_list(self, target: list[V], content: Sequence[V]) -> None:
        """Replace the content of a list; the list object stays."""
        before = list(target)
        self.rollbacks.append(lambda: target.__setitem__(slice(None), before))
        target[:] = content

    def rollback(self) -> None:
        """Undo all writes, latest first; if the undo of a write fails, undo it and all earlier writes again.

        A second attempt succeeds where the undo of earlier writes has freed memory. Every step may run twice: it sets what was there
        before. An exception that is no ``Exception`` (SystemExit of a signal handler) is raised when all writes are undone.

        Raises:
            CommitError: A write could not be undone.
        """
        errors, interruptions = list[BaseException](), list[BaseException]()
        with uninterrupted():
            for _ in range(ATTEMPTS):
                errors.clear()
                left = 0  # number of writes to undo again
                for n, step in reversed([*enumerate(self.rollbacks, 1)]):
                    try:
                        step()
                    except BaseException as error:
                        errors.append(error)
                        left = max(left, n)
                interruptions += [e for e in errors if not isinstance(e, Exception)]
                self.rollbacks = self.rollbacks[:left]
            if errors:
                raise CommitError(
                    f"the growth failed, and {len(errors)} of its changes could not be rolled back ({errors[0]}): model and "
                    "optimizer are lost; load them from a checkpoint."
                )
        if interruptions:
            raise interruptions[0]
