"""The errors growkern raises. Each says what was asked, what is at fault, what is allowed and the way out."""

import re


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


SHOWN = 8  # lines of problems that one error has at most


def raise_all(error: type[GrowthError], heading: str, problems: list[str]) -> None:
    """Raise ``error`` with a line for every problem; do nothing when there is none.

    Problems that differ by the indices of blocks share a line, and what comes after ``SHOWN`` lines is counted.
    """
    groups: dict[str, list[str]] = {}
    for problem in problems:
        groups.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", problem), []).append(problem)
    lines = [one[0] if len(one) == 1 else f"{k} ({len(one)} times)" for k, one in groups.items()]
    if len(lines) > SHOWN:
        lines = [*lines[: SHOWN - 1], f"and {len(lines) - SHOWN + 1} more."]
    if lines:
        raise error("\n  ".join([heading, *lines]))
