"""What is wrapped around models, optimizers and schedulers; told by class name, as no framework is imported."""

from inspect import currentframe
from typing import Any

WRAPPERS = {  # class in the MRO -> attribute that holds what is wrapped
    "AcceleratedOptimizer": "optimizer",
    "AcceleratedScheduler": "scheduler",
    "DistributedDataParallel": "module",
    "LightningOptimizer": "optimizer",
    "OptimizedModule": "_orig_mod",
}


def unwrapped(thing: Any) -> Any:
    """The model, optimizer or scheduler inside wrappers, or the thing itself."""
    for kind in type(thing).__mro__:
        if kind.__name__ in WRAPPERS:
            return unwrapped(getattr(thing, WRAPPERS[kind.__name__]))
    return thing


def mid_step(optim: object) -> bool:
    """True inside ``optim.step()`` before it has returned: in its pre-hooks, and in a closure."""
    frame = currentframe()
    while frame is not None:
        names = frame.f_locals if frame.f_code.co_name == "wrapper" else {}
        if names.get("self") is optim and "func" in names and "out" not in names:
            return frame.f_code.co_filename.endswith("optimizer.py")
        frame = frame.f_back
    return False
