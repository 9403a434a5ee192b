"""Find the optimizer that a scheduler drives. Schedulers are only read."""

from collections.abc import Sequence

from torch.optim import Optimizer

from growkern.errors import PlanError
from growkern.support.wrappers import listed, unwrapped

OWN = (
    "torch.optim.lr_scheduler",
    "torch.optim.swa_utils",
)  # modules whose schedulers multiply the rate of each group


def schedulers(scheduler: object | None) -> list[object]:
    """Flatten a scheduler, or a list of them, into all schedulers, nested ones included."""
    if scheduler is None:
        return []
    if (several := listed(scheduler)) != [scheduler]:
        return [s for entry in several for s in schedulers(entry)]
    inner: list[object] = list(getattr(scheduler, "_schedulers", []))
    return [scheduler, *schedulers(inner)]


def check_scheduler(optims: Sequence[Optimizer], scheduler: object | None) -> None:
    """Raise PlanError for a scheduler that drives another optimizer, or for an object that is no scheduler."""
    if not optims and scheduler is not None:
        raise PlanError("scheduler: the optimizer of the scheduler is missing; pass it as optim.")
    for s in schedulers(scheduler):
        if hasattr(s, "optimizer") and all(driven_by(s) is not optim for optim in optims):
            raise PlanError(
                f"scheduler: this {type(s).__name__} drives another optimizer; pass the scheduler that drives optim."
            )
        if not callable(getattr(s, "step", None)):
            raise PlanError(
                f"scheduler: {type(s).__name__} is not a learning-rate scheduler; "
                "expected a torch.optim.lr_scheduler, or a list of schedulers."
            )


def schedulers_of(optim: Optimizer, scheduler: object | None) -> list[object]:
    """Return the schedulers that drive an optimizer, of a scheduler or a list of them; schedulers that name no optimizer are among them."""
    if (several := listed(scheduler)) != [scheduler]:
        return [s for entry in several for s in schedulers_of(optim, entry)]
    drives = not hasattr(scheduler, "optimizer") or driven_by(scheduler) is optim
    return [] if scheduler is None or not drives else [scheduler]


def driven_by(scheduler: object) -> object:
    """Return the optimizer that a scheduler drives, without the wrappers of frameworks."""
    return unwrapped(getattr(scheduler, "optimizer", None))


def follows(scheduler: object | None) -> bool:
    """True when split param groups keep their learning-rate factors: all schedulers are torch's own, and none has a nonzero ``eta_min``.

    A subclass may set one rate for all groups, or keep rates of its own that the growth does not know.
    """
    return all(
        type(s).__module__ in OWN and not getattr(s, "eta_min", 0) for s in schedulers(scheduler)
    )
