"""The picture of a comparison: the loss of every method after the growth, and after some steps."""

from collections.abc import Sequence

from growkern.pictures.figure import INK, SOURCE, TARGET, Picture, blank, legend, name_rows, style


def draw(rows: Sequence[tuple[str, float, float]], n_steps: int, refused: Sequence[str]) -> Picture:
    """Draw a comparison.

    Args:
        rows: Method, loss after the growth, and loss after the steps; the first row is the source.
        n_steps: Number of steps.
        refused: Text for every method that cannot grow the model.
    """
    figure = blank("growth methods compared", 1.2 + 0.35 * len(rows), "\n".join(refused))
    axes, at = figure.add_subplot(), [*range(len(rows))]
    style(axes, "")
    for y, (_, before, after) in enumerate(rows):
        axes.plot([before, after], [y, y], "-", color=TARGET, linewidth=2, alpha=0.5)
    axes.plot([loss for _, loss, _ in rows], at, "o", color=SOURCE, markersize=8, fillstyle="none", label="after the growth")  # fmt: skip
    axes.plot([loss for *_, loss in rows], at, "o", color=TARGET, markersize=5, label=f"after {n_steps} steps")  # fmt: skip
    axes.axvline(rows[0][2], color=INK, linewidth=0.8, linestyle=":")
    axes.set_xlabel("loss (nats)")
    name_rows(axes, [f"{name}  {before:.4f} → {after:.4f}" for name, before, after in rows])
    legend(axes)
    return figure
