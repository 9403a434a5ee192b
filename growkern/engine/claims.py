"""One growth at a time: a growth claims its model, its optimizers and all their tensors until it ends."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any
from weakref import WeakSet

from torch import nn
from torch.optim import Optimizer

from growkern.errors import GrowthError
from growkern.support.names import named_parameters


class _Claim:
    """The objects of a growth, kept alive, by ``id``. A claim ends with its growth, at the latest when its owner's frame is gone."""

    def __init__(self, things: dict[int, tuple[object, str]]) -> None:
        self.things = things


_claims: WeakSet[_Claim] = WeakSet()
_lock = Lock()


@contextmanager
def claimed(
    model: nn.Module,
    optims: Sequence[Optimizer] = (),
    ema: object = None,
    master_weights: object = None,
) -> Generator[None, None, None]:
    """Claim a model, its optimizers, averages and master weights until the block ends. Growths of other models run side by side.

    Raises:
        GrowthError: A growth that is running, in another thread or around this call, has claimed one of the objects.
    """
    several: list[Any] = [*ema] if isinstance(ema, list | tuple) else [ema]  # checked later
    averages = [average for average in several if isinstance(average, nn.Module)]
    masters: Any = master_weights if isinstance(master_weights, Mapping) else {}  # pyright: ignore[reportUnknownVariableType]
    things: dict[int, tuple[object, str]] = {
        id(p): (p, "one of its master weights") for p in masters.values()
    }
    things |= {id(optim): (optim, "its optimizer") for optim in optims}
    for module, whose in (*((m, " of one of its averages") for m in averages), (model, "")):
        things |= {id(p): (p, f"{name}{whose}") for name, p in named_parameters(module)}
        things[id(module)] = module, f"the {'average' if whose else 'model'}"
    claim = _Claim(things)
    with _lock:
        taken = {i for other in _claims for i in other.things}
        shared = [what for i, (_, what) in reversed(things.items()) if i in taken]
        if not shared:
            _claims.add(claim)
    if shared:
        raise GrowthError(
            f"cannot grow this {type(model).__name__}: a growth that is running in this process also changes {shared[0]}. Call again "
            "when that growth has ended. Nothing was changed."
        )
    try:
        yield
    finally:
        _claims.discard(claim)
