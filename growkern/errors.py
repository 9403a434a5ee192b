"""Errors that growkern raises. Every message names the request, the cause, the allowed values and a way out."""

import re

__all__ = [
    "CheckpointError",
    "CommitError",
    "GrowthError",
    "InsufficientMemoryError",
    "PlanError",
    "UnsupportedModelError",
    "UnsupportedOptimizerError",
]


class GrowthError(RuntimeError):
    """Base class of every growkern error. Model and optimizer are unchanged after it, unless a CommitError reports a failed rollback."""


class UnsupportedModelError(GrowthError):
    """growkern cannot grow the model, or cannot grow it in the way it is wrapped or stored."""


class UnsupportedOptimizerError(GrowthError):
    """growkern cannot grow the optimizer or its state, for example because the class or a state key is unknown."""


class PlanError(GrowthError, ValueError):
    """The requested growth cannot be planned."""


class InsufficientMemoryError(GrowthError):
    """The grown tensors do not fit in memory beside the source tensors."""


class CheckpointError(GrowthError):
    """A checkpoint is incomplete, cannot be written, or does not match the model or the optimizer after its growths."""


class CommitError(GrowthError):
    """A growth failed during execution and was rolled back; the message says so if the rollback failed too."""


SHOWN = 8  # maximum number of problem lines in one error


def raise_all(error: type[GrowthError], heading: str, problems: list[str]) -> None:
    """Raise ``error`` with one line per problem; do nothing if the list is empty.

    Problems that differ only in block indices share a line. Of more than ``SHOWN`` lines, the last one counts the problems not shown.
    """
    groups: dict[str, list[str]] = {}
    for problem in problems:
        groups.setdefault(re.sub(r"\.\d+(?=[.:']|$)", ".*", problem), []).append(problem)
    lines = [
        group[0] if len(group) == 1 else f"{k} ({len(group)} times)" for k, group in groups.items()
    ]
    if len(lines) > SHOWN:
        lines = [*lines[: SHOWN - 1], f"and {len(lines) - SHOWN + 1} more."]
    if lines:
        raise error("\n  ".join([heading, *lines]))
