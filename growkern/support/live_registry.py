"""Which optimizers, modules and schedulers are alive, and which optimizer is inside ``step()``: known from the import of growkern on.

A scan of the heap costs 70 ms at a million objects, and does not see what ``gc.freeze()`` has put aside. So optimizers and
schedulers are registered by a ``__new__`` of their base classes, which constructors, ``copy`` and ``pickle`` all call. Modules, which
compiled code makes too (a slice of a ``ModuleList``), are registered by torch's hooks when they get a parameter or a submodule, and by
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
        """List the optimizers, modules and schedulers of this process that are alive."""
        return Live(*([*_alive[kind].values()] for kind in KINDS))

    def collected(self) -> "Live":
        """Empty these lists, collect unreachable reference cycles, and list what is still alive."""
        for things in self:
            things.clear()
        gc.collect()
        return Live.now()


def _register_instances(kind: type) -> None:
    """Give a class the ``__new__`` that registers its instances; the next ``__new__`` in the MRO gets the arguments."""

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
    """Have modules that are copied or unpickled registered."""
    set_state = cast(Any, nn.Module.__setstate__)

    @wraps(set_state)
    def __setstate__(self: nn.Module, state: dict[str, Any]) -> None:
        set_state(self, state)
        _register_module(self)

    nn.Module.__setstate__ = __setstate__


def _register_existing() -> None:
    """Register what was made before the import, by one scan of the heap, of what is frozen too."""
    if frozen := gc.get_freeze_count() > 0:
        gc.unfreeze()
    kinds = {made: kind for kind in KINDS for made in _subclasses(kind)}
    objects: list[Any] = gc.get_objects()
    for thing in compress(objects, map(kinds.__contains__, map(type, objects))):
        _alive[kinds[type(thing)]][id(thing)] = thing
    if frozen:
        gc.freeze()


def _subclasses(kind: type) -> Iterator[type]:
    """A class and all that inherit from it."""
    yield kind
    for made in kind.__subclasses__():
        yield from _subclasses(made)


@dataclass
class _Step:
    """A call of ``Optimizer.step``: the frame that runs it (0 once its own work is done), and the hook that says so."""

    frame: int
    code: CodeType
    done: RemovableHandle


_steps: WeakKeyDictionary[Optimizer, _Step] = WeakKeyDictionary()


def mid_step(optim: object) -> bool:
    """True inside ``optim.step()`` before its own work is done: in its pre-hooks, and in a closure."""
    step = _steps.get(optim) if isinstance(optim, Optimizer) else None
    frame = _getframe(1)
    while step is not None and step.frame and frame is not None:
        if (id(frame), frame.f_code) == (
            step.frame,
            step.code,
        ):  # a step that raised has left the stack
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
    hooks.move_to_end(step.done.id, last=False)  # before the post-hooks of others, which may grow
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
