"""Loss curves: a compact record of a run's losses over tokens, and the files that curves are read from."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from torch import Tensor

from growkern.errors import PlanError

GROWTH = (
    1.05  # a point covers 5 % more tokens than the point before: 47 points for ten times the tokens
)


@dataclass
class LossCurve:
    """Mean losses over tokens, at points spaced evenly in log tokens.

    Losses stay tensors on their device until ``read`` or ``state`` is called, so that no step waits for a GPU.

    Attributes:
        points: Pairs of token count and mean loss since the previous point, in nats.
        last: Token count at the last loss.
        total: Sum of the losses since the last point.
        n_open: Number of losses since the last point.
    """

    points: list[tuple[float, float | Tensor]] = field(
        default_factory=list[tuple[float, float | Tensor]]
    )
    last: float = 0.0
    total: float | Tensor = 0.0
    n_open: int = 0

    def add(self, tokens: float, loss: float | Tensor) -> None:
        """Record the loss of a step that ends at ``tokens`` tokens of the run; a loss without new tokens is ignored."""
        if tokens <= self.last:
            return
        self.total = self.total + (
            loss.detach().float().mean() if isinstance(loss, Tensor) else loss
        )
        self.last, self.n_open = tokens, self.n_open + 1
        if not self.points or tokens >= GROWTH * self.points[-1][0]:
            self.points.append((tokens, self.total / self.n_open))
            self.total, self.n_open = 0.0, 0

    def read(self) -> list[tuple[float, float]]:
        """Return all points with a finite loss; the losses since the last point, if any, give a further point."""
        rest = [(self.last, self.total / self.n_open)] if self.n_open else []
        read = [(tokens, float(loss)) for tokens, loss in [*self.points, *rest]]
        return [(tokens, loss) for tokens, loss in read if isfinite(loss)]

    def state(self) -> dict[str, Any]:
        """Return the record as plain JSON types."""
        points = [[tokens, float(loss)] for tokens, loss in self.points]
        return {
            "points": points,
            "last": self.last,
            "total": float(self.total),
            "n_open": self.n_open,
        }

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> "LossCurve":
        """Build a curve from the result of ``state``; an empty mapping gives a curve without points."""
        points: list[tuple[float, float | Tensor]] = [
            (float(x), float(y)) for x, y in state.get("points", ())
        ]
        last, total = float(state.get("last", 0)), float(state.get("total", 0))
        return LossCurve(points, last, total, int(state.get("n_open", 0)))


def read_curve(path: Path, tokens_per_step: float | None = None) -> list[tuple[float, float]]:
    """Read a loss curve from a file.

    Args:
        path: A CSV file with the columns ``tokens`` (or ``step``) and ``loss``, or a ``trainer_state.json`` of transformers' Trainer.
        tokens_per_step: Tokens per step; required if the file counts steps.

    Returns:
        (tokens, loss in nats), in the order of the file. Rows without a loss, or at 0 tokens, are skipped.

    Raises:
        PlanError: The file cannot be read, lacks a column, holds text in place of a number, or counts steps while ``tokens_per_step`` is
            None; or ``tokens_per_step`` is not positive.

    Example:
        >>> n_bytes = Path("loss.csv").write_text("step,loss\\n100,4.5\\n200,4.1\\n")
        >>> read_curve(Path("loss.csv"), tokens_per_step=1024)
        [(102400.0, 4.5), (204800.0, 4.1)]
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # utf-8-sig strips a byte-order mark
        if path.suffix == ".json":
            log: Sequence[Mapping[str, Any]] = json.loads(text)["log_history"]
            rows = [row for row in log if isinstance(row, dict) and "loss" in row]  # pyright: ignore[reportUnnecessaryIsInstance]
        else:
            rows = list[Mapping[str, Any]](csv.DictReader(text.splitlines()))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, csv.Error) as error:
        raise PlanError(
            f"cannot read a loss curve from {path}: {error!r}. Expected a CSV file, or a trainer_state.json."
        ) from None
    if not rows or "loss" not in rows[0]:
        names = ", ".join(map(str, rows[0]))[:100] if rows else "no rows"
        raise PlanError(
            f"cannot read a loss curve from {path}: the file has {names}. Expected the columns tokens (or step) and loss, or the "
            "log_history of a trainer_state.json; columns are separated by commas."
        )
    column = next(
        (
            name
            for name in ("tokens", "num_input_tokens_seen", "step")
            if any(row.get(name) for row in rows)
        ),
        None,
    )
    if column is None or (column == "step" and tokens_per_step is None):
        problem = "counts steps" if column else f"has {', '.join(map(str, rows[0]))}"
        raise PlanError(
            f"cannot tell the tokens of {path}, which {problem}: add a column tokens, or pass tokens_per_step (--tokens-per-step)."
        )
    if tokens_per_step is not None and not (isfinite(tokens_per_step) and tokens_per_step > 0):
        raise PlanError(f"tokens_per_step={tokens_per_step}: pass a number above 0.")
    each = (tokens_per_step or 1.0) if column == "step" else 1.0
    logged = [
        row
        for row in rows
        if row.get("loss") not in (None, "") and row.get(column) not in (None, "")
    ]
    try:
        return [
            (float(row[column]) * each, float(row["loss"])) for row in logged if float(row[column])
        ]
    except (TypeError, ValueError, KeyError) as error:
        raise PlanError(f"cannot read a loss curve from {path}: {error}.") from None
