"""What is wrapped around models, optimizers and schedulers; told by class name, as no framework is imported."""

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
