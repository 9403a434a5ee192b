"""Registry of live optimizers, modules and schedulers, and of optimizers inside ``step()``, from the import of growkern on.

A scan of the heap costs 0.1 s at a million objects, and does not see objects that ``gc.freeze()`` has frozen. So a ``__new__`` of the
base classes, which constructors, ``copy`` and ``pickle`` all call, registers optimizers and schedulers. Modules, which compiled code
also makes (a slice of a ``ModuleList``), are registered by torch's registration hooks when they get a parameter or a submodule, and by
``__setstate__``, which ``copy`` and ``pickle`` call.
"""

import gc
from collections import OrderedDict
from collections.abc import Iterator
from functools import wraps
from itertools import compress
from sys import _getframe  # pyright: ignore[reportPrivateUsage]
from types import CodeType
from typing import Any, NamedTuple, cast
from weakref import WeakValueDictionary

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import register_optimizer_step_pre_hook

from growkern.support.names import named_modules

KINDS: tuple[type[Any], ...] = (Optimizer, nn.Module, LRScheduler)
CALLS = {nn.Module._call_impl.__code__, nn.Module._wrapped_call_impl.__code__}  # pyright: ignore
_alive: dict[type, WeakValueDictionary[int, Any]] = {kind: WeakValueDictionary() for kind in KINDS}


class Live(NamedTuple):
    """Live objects that may hold parameters."""

    optimizers: list[Optimizer]
    modules: list[nn.Module]
    schedulers: list[LRScheduler]

    @staticmethod
    def now() -> "Live":
        """List the live optimizers, modules and schedulers of this process."""
        return Live(*(_listed(_alive[kind]) for kind in KINDS))

    def collected(self) -> "Live":
        """Empty these lists, collect unreachable reference cycles, and list the objects that are still alive."""
        for things in self:
            things.clear()
        gc.collect()
        return Live.now()


def _listed(things: WeakValueDictionary[int, Any]) -> list[Any]:
    """List the values while other threads may register more: ``valuerefs`` copies in one step, ``values`` does not."""
    return [thing for ref in things.valuerefs() if (thing := ref()) is not None]


def _register_instances(kind: type) -> None:
    """Give a class a ``__new__`` that registers its instances and passes its arguments to the next ``__new__`` in the MRO."""

    def new(cls: Any, *args: Any, **kwargs: Any) -> Any:
        make: Any = super(kind, cls).__new__
        self = object.__new__(cls) if make is object.__new__ else make(cls, *args, **kwargs)
        _alive[kind][id(self)] = self
        return self

    new = torch._disable_dynamo(new)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage] as torch's add_param_group
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
    kinds = {id(made): kind for kind in KINDS for made in _subclasses(kind)}
    objects: list[object] = gc.get_objects()
    for thing in compress(objects, (id(type(thing)) in kinds for thing in objects)):
        _alive[kinds[id(type(thing))]][id(thing)] = thing
    if frozen:
        gc.freeze()


def _subclasses(kind: type) -> Iterator[type]:
    """Yield a class and all its subclasses."""
    yield kind
    for made in kind.__subclasses__():
        yield from _subclasses(made)


class _Step:
    """The latest call of an optimizer's ``step``; a post-hook of the optimizer, which ends the call.

    Attributes:
        frame: ``id`` of the frame that runs ``step``; 0 after the update.
    """

    frame = 0

    def __call__(self, *_: object) -> None:
        _running.pop(self.frame, None)
        self.frame = 0


# by the id of the frame; a step that raised stays until another step has the id
_running: dict[int, tuple[_Step, CodeType]] = {}


def mid_step(optim: object) -> bool:
    """True inside ``optim.step()`` before the update is done: in a pre-hook or a closure."""
    step = _step_of(optim)[1] if isinstance(optim, Optimizer) else None
    frame = _getframe(1)
    while step is not None and step.frame and frame is not None:
        if _running.get(id(frame)) == (step, frame.f_code):
            return True
        frame = frame.f_back
    return False


def in_pass(model: nn.Module) -> str | None:
    """Return what is running, inside a backward or inside the forward of a part of the model; None outside.

    A call of the whole model does not count: a training loop may be inside a ``forward``.
    """
    if torch._C._current_graph_task_id() != -1:  # pyright: ignore
        return "a backward"
    frame, parts = _getframe(1), {id(m) for _, m in named_modules(model) if m is not model}
    while frame is not None:
        if frame.f_code in CALLS and id(frame.f_locals[frame.f_code.co_varnames[0]]) in parts:
            return "a forward"
        frame = frame.f_back
    return None


def _step_of(optim: Optimizer) -> tuple[int | None, _Step | None]:
    """Return the key of the post-hook among the optimizer's hooks, and the post-hook."""
    hooks: dict[int, Any] = optim._optimizer_step_post_hooks  # pyright: ignore[reportPrivateUsage]
    return next(((key, h) for key, h in hooks.items() if isinstance(h, _Step)), (None, None))


def _begin_step(optim: Optimizer, *_: object) -> None:
    hooks: Any = optim._optimizer_step_post_hooks  # pyright: ignore[reportPrivateUsage]
    if torch.compiler.is_dynamo_compiling() or not isinstance(hooks, OrderedDict):
        return
    key, step = _step_of(optim)
    if step is None:
        step = _Step()
        key = optim.register_step_post_hook(step).id
    hooks.move_to_end(key, last=False)  # runs before other post-hooks, which may grow
    frame = _getframe(1)
    step.frame = id(frame)
    _running[step.frame] = step, frame.f_code


_register_instances(Optimizer)
_register_instances(LRScheduler)
register_module_parameter_registration_hook(_register_module)
register_module_module_registration_hook(_register_module)
_register_copies()
_register_existing()
register_optimizer_step_pre_hook(_begin_step)
