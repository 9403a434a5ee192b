"""The errors growkern raises. Each says what was asked, what is at fault, what is allowed and the way out."""


class GrowthError(RuntimeError):
    """Base of every error growkern raises. When one is raised, model and optimizer are as they were."""


class UnsupportedModelError(GrowthError):
    """The model, or the way it is wrapped or stored, is one growkern cannot grow."""


class UnsupportedOptimizerError(GrowthError):
    """The optimizer, or state in it, is one whose law is not known."""


class PlanError(GrowthError, ValueError):
    """The growth that was asked for cannot be planned."""


class InsufficientMemoryError(GrowthError):
    """The grown tensors do not fit beside the source."""


class CheckpointError(GrowthError):
    """A checkpoint is incomplete, cannot be written, or is not of the model, or the optimizer, as growths have left it."""


class CommitError(GrowthError):
    """A growth failed on its way; everything was put back."""


def raise_all(error: type[GrowthError], heading: str, problems: list[str]) -> None:
    """Raise ``error`` with every problem on a line of its own; do nothing when there is none."""
    if problems:
        raise error("\n  ".join([heading, *problems]))
