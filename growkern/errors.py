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


def __dir__() -> list[str]:
    return __all__


class GrowthError(RuntimeError):
    """Base class of every growkern error. Model and optimizer are unchanged after it, unless a CommitError reports a failed rollback.

    Example:
        >>> try:
        ...     growkern.expand_inplace(model, optim, to={"hidden": 12})
        ... except growkern.errors.GrowthError as error:
        ...     print(type(error).__name__, model.config.hidden_size)
        PlanError 24
    """


class UnsupportedModelError(GrowthError):
    """The model cannot be grown, or cannot be grown in the way it is wrapped or stored.

    Example:
        >>> growkern.expand_inplace(torch.nn.Bilinear(2, 2, 2))
        Traceback (most recent call last):
        growkern.errors.UnsupportedModelError: no family describes torch.nn.modules.linear.Bilinear, and no inputs can be made ...
    """


class UnsupportedOptimizerError(GrowthError):
    """The optimizer or its state cannot be grown, for example because the class or a state key is unknown.

    Example:
        >>> optim.state[model.lm_head.weight]["slow"] = torch.zeros_like(model.lm_head.weight)
        >>> growkern.expand_inplace(model, optim)
        Traceback (most recent call last):
        growkern.errors.UnsupportedOptimizerError: cannot grow the state of this AdamW:
          model.embed_tokens.weight: unknown state 'slow'; known: step, exp_avg, exp_avg_sq, max_exp_avg_sq. ...
    """


class PlanError(GrowthError, ValueError):
    """The requested growth cannot be planned, or an argument is not valid; it is a ``ValueError`` too.

    Example:
        >>> growkern.plan(model, to={"hidden": 12})
        Traceback (most recent call last):
        growkern.errors.PlanError: cannot grow llama to {'hidden': 12}:
          hidden: the target 12 is smaller than the source 24; shrink the model by shrink_inplace.
    """


class InsufficientMemoryError(GrowthError):
    """The grown tensors do not fit in memory beside the source tensors. The message gives required and free bytes.

    Example:
        >>> growkern.expand_inplace(model, to={"hidden": 2**18, "ffn": 2**18})
        Traceback (most recent call last):
        growkern.errors.InsufficientMemoryError: ...
    """


class CheckpointError(GrowthError):
    """A checkpoint is incomplete, cannot be written, or does not match the model or the optimizer after its growths.

    Example:
        >>> growkern.inherit.Stored("logits")
        Traceback (most recent call last):
        growkern.errors.CheckpointError: logits has no index.json, so it holds no complete stored logits. ...
    """


class CommitError(GrowthError):
    """A growth failed during execution and was rolled back; the message says so if the rollback failed too.

    Example:
        >>> growkern.expand_inplace(model, check=lambda model: torch.tensor(1.0 * model.config.hidden_size))
        Traceback (most recent call last):
        growkern.errors.CommitError: check: the output moved by 24 (its largest value is 24), and the plan promises the source's ...
    """


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
