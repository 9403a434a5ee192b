"""Registry of live optimizers, modules and schedulers, and of optimizers inside ``step()``, from the import of growkern on.

A scan of the heap costs 70 ms at a million objects, and does not see objects that ``gc.freeze()`` has frozen. So a ``__new__`` of the
base classes, which constructors, ``copy`` and ``pickle`` all call, registers optimizers and schedulers. Modules, which compiled code
also makes (a slice of a ``ModuleList``), are registered by torch's registration hooks when they get a parameter or a submodule, and by
``__setstate__``, which ``copy`` and ``pickle`` call.
"""

import gc
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import wraps
from itertools import compress
from sys import _getframe  # pyright: ignore[reportPrivateUsage]
from types import CodeType
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import (
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

KINDS: tuple[type[Any], ...] = (Optimizer, nn.Module, LRScheduler)
_alive: dict[type, WeakValueDictionary[int, Any]] = {kind: WeakValueDictionary() for kind in KINDS}


class Live(NamedTuple):
    """Live objects that may hold parameters."""

    optimizers: list[Optimizer]
    modules: list[nn.Module]
    schedulers: list[LRScheduler]

    @staticmethod
    def now() -> "Live":
        """List the live optimizers, modules and schedulers of this process."""
        return Live(*([*_alive[kind].values()] for kind in KINDS))

    def collected(self) -> "Live":
        """Empty these lists, collect unreachable reference cycles, and list the objects that are still alive."""
        for things in self:
            things.clear()
        gc.collect()
        return Live.now()


def _register_instances(kind: type) -> None:
    """Give a class a ``__new__`` that registers its instances and passes its arguments to the next ``__new__`` in the MRO."""

    def new(cls: Any, *args: Any, **kwargs: Any) -> Any:
        make: Any = super(kind, cls).__new__
        self = make(cls) if make is object.__new__ else make(cls, *args, **kwargs)
        _alive[kind][id(self)] = self
        return self

    new.__wrapped__ = kind.__init__  # pyright: ignore[reportFunctionMemberAccess] the signature of the class stays
    kind.__new__ = new


def _register_module(module: nn.Module, *_: object) -> None:
    if not torch.compiler.is_dynamo_compiling():
        _alive[nn.Module][id(module)] = module


def _register_copies() -> None:
    """Register every module that is copied or unpickled."""
    set_state = cast(Any, nn.Module.__setstate__)

    @wraps(set_state)
    def __setstate__(self: nn.Module, state: dict[str, Any]) -> None:
        set_state(self, state)
        _register_module(self)

    nn.Module.__setstate__ = __setstate__


def _register_existing() -> None:
    """Register the objects made before the import, by one scan of the heap that includes frozen objects."""
    if frozen := gc.get_freeze_count() > 0:
        gc.unfreeze()
    kinds = {made: kind for kind in KINDS for made in _subclasses(kind)}
    objects: list[Any] = gc.get_objects()
    for thing in compress(objects, map(kinds.__contains__, map(type, objects))):
        _alive[kinds[type(thing)]][id(thing)] = thing
    if frozen:
        gc.freeze()


def _subclasses(kind: type) -> Iterator[type]:
    """Yield a class and all its subclasses."""
    yield kind
    for made in kind.__subclasses__():
        yield from _subclasses(made)


@dataclass
class _Step:
    """A call of ``Optimizer.step``: id (0 after the update) and code of the frame that runs it, and the post-hook that sets the id to 0."""

    frame: int
    code: CodeType
    done: RemovableHandle


_steps: WeakKeyDictionary[Optimizer, _Step] = WeakKeyDictionary()


def mid_step(optim: object) -> bool:
    """True inside ``optim.step()`` before the update is done: in a pre-hook or a closure."""
    step = _steps.get(optim) if isinstance(optim, Optimizer) else None
    frame = _getframe(1)
    while step is not None and step.frame and frame is not None:
        if (id(frame), frame.f_code) == (
            step.frame,
            step.code,
        ):  # the frame of a step that raised is off the stack
            return True
        frame = frame.f_back
    return False


def _begin_step(optim: Optimizer, *_: object) -> None:
    if torch.compiler.is_dynamo_compiling():
        return
    frame, step = _getframe(1), _steps.get(optim)
    if step is None or step.done.id not in (step.done.hooks_dict_ref() or ()):
        step = _Step(0, frame.f_code, optim.register_step_post_hook(_end_step))
        _steps[optim] = step
    hooks = cast("OrderedDict[int, Any]", step.done.hooks_dict_ref())
    hooks.move_to_end(step.done.id, last=False)  # runs before other post-hooks, which may grow
    step.frame, step.code = id(frame), frame.f_code


def _end_step(optim: Optimizer, *_: object) -> None:
    if optim in _steps:
        _steps[optim].frame = 0


_register_instances(Optimizer)
_register_instances(LRScheduler)
register_module_parameter_registration_hook(_register_module)
register_module_module_registration_hook(_register_module)
_register_copies()
_register_existing()
register_optimizer_step_pre_hook(_begin_step)
