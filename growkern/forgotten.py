"""Live objects that a growth would leave behind: other optimizers, modules outside the model, schedulers."""

import gc
from collections.abc import Sequence
from itertools import compress
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from growkern.errors import UnsupportedModelError, UnsupportedOptimizerError


class Live(NamedTuple):
    """Live objects that may hold parameters; a scan of the heap, some 50 ms."""

    optimizers: list[Optimizer]
    modules: list[nn.Module]
    schedulers: list[LRScheduler]

    @staticmethod
    def scan() -> "Live":
        """Find them all."""
        objects: list[object] = gc.get_objects()
        types: list[object] = [*map(type, objects)]  # loops in C: there are some 400,000
        wanted: dict[object, int] = {}
        for t in {*types}:
            for i, kind in enumerate((Optimizer, nn.Module, LRScheduler)):
                if isinstance(t, type) and issubclass(t, kind):
                    wanted[t] = i
        found: tuple[list[Any], list[Any], list[Any]] = [], [], []
        for thing in compress(objects, map(wanted.__contains__, types)):
            found[wanted[type(thing)]].append(thing)
        return Live(*found)


def refuse_forgotten(model: nn.Module, optim: Optimizer | None, live: Live) -> None:
    """Look for live objects that the growth would leave behind: optimizers with state, modules that share a parameter.

    Raises:
        UnsupportedOptimizerError: Another optimizer holds state of the parameters; its next step would fail, or corrupt
            memory under ``fused=True``.
        UnsupportedModelError: A module outside the model holds one of its parameters (a head tied to this backbone).
    """
    params = {id(p): name for name, p in model.named_parameters()}
    inside = {id(m) for m in model.modules()}

    def optimizers(live: Live) -> list[str]:
        others = [o for o in live.optimizers if o is not optim and hasattr(o, "state")]
        others = [o for o in others if optim is None or o.state is not optim.state]
        return [_kind(o) for o in others if any(id(p) in params for p in o.state)]

    def modules(live: Live) -> list[str]:
        others = [m for m in live.modules if id(m) not in inside and "_parameters" in vars(m)]
        shared = [(m, p) for m in others for p in m.parameters(recurse=False) if id(p) in params]
        return [f"{type(m).__name__} ({params[id(p)]})" for m, p in shared]

    if optimizers(live) or modules(live):
        gc.collect()  # what was let go may only wait for its turn
        live, title = Live.scan(), f"cannot grow this {type(model).__name__}:"
        if others := optimizers(live):
            raise UnsupportedOptimizerError(
                f"{title} another live optimizer holds state of its parameters ({', '.join(others)}), "
                "which would not be grown. Pass it as optim, or clear its .state and let it go."
            )
        if others := modules(live):
            raise UnsupportedModelError(
                f"{title} modules outside it hold its parameters ({', '.join(others[:3])}) and would not be grown. "
                "Pass the whole model."
            )


def forgotten_schedulers(optim: Optimizer, handed: Sequence[object], live: Live) -> list[str]:
    """Class names of live schedulers that drive the optimizer and were not handed over."""

    def found(live: Live) -> list[str]:
        drivers = [s for s in live.schedulers if getattr(s, "optimizer", None) is optim]
        return [type(s).__name__ for s in drivers if not any(s is one for one in handed)]

    return found(live) and (gc.collect(), found(Live.scan()))[1]


def _kind(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"
