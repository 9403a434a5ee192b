"""The report of a growth, as data and as a table."""

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from growkern.planning.growth_plan import KEPT, Preserves
from growkern.support.html import html_lines, html_page, html_table
from growkern.support.text import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

N_STEPS = 3  # the longest, in the text of a report
SIZES = ["size", "source", "target", ""]


@dataclass(frozen=True)
class Learned:
    """What ``growkern.learn`` has learned. Losses are in evaluation mode on the first batch, unless said otherwise.

    Attributes:
        tie: Which axes share a matrix.
        n_numbers: Number of learned numbers in all operators.
        steps: Number of steps on the operators.
        loss_closed_form: Loss of the closed form, without learning.
        loss_before: Loss at the start of learning; it differs from the closed form's where noise was added to the operators.
        loss_after: Loss after learning.
        losses: Loss of every step, in training mode on the step's batch.
        n_bytes: Memory for learning beyond the source, without activations.
        seconds: Wall time of the learning.
        n_frozen: Number of target tensors in the closed form because their source has ``requires_grad=False``.
    """

    tie: str
    n_numbers: int
    steps: int
    loss_closed_form: float
    loss_before: float
    loss_after: float
    losses: tuple[float, ...]
    n_bytes: int
    seconds: float
    n_frozen: int = 0

    def facts(self) -> list[tuple[object, ...]]:
        """Return lines for the report."""
        fell = (
            f"{self.loss_before:.4g} at the start, {self.loss_after:.4g} after learning (first batch; "
            f"closed form {self.loss_closed_form:.4g})"
        )
        frozen = f"{self.n_frozen} tensors, in the closed form: requires_grad=False"
        return [
            ("learned", f"{self.n_numbers:,} numbers (tie={self.tie!r}) in {self.steps} steps, {self.seconds:.3g} s"),
            *([("not learned", frozen)] if self.n_frozen else []),
            ("loss", fell),
            ("memory of learning", f"{_size(self.n_bytes)} beyond the source, and activations"),
            ("moments", "dropped: those of the source say nothing about learned weights"),
        ]  # fmt: skip


@dataclass(frozen=True)
class GrowthReport:
    """Report of a growth.

    Attributes:
        family: Model family.
        source_sizes: Named sizes before.
        target_sizes: Named sizes after.
        n_params_source: Number of parameters before.
        n_params_target: Number of parameters after.
        new_blocks: Names of the added blocks (``"model.layers.1"``).
        preserves: ``"nothing"``, ``"function"``, ``"gradient"`` or ``"trajectory"``; see ``GrowthPlan.preserves``.
        reasons: Why the function is not preserved; empty when it is.
        n_bytes_read: Bytes read from source tensors: once each, and once more where noise or a mean is measured.
        n_bytes_written: Bytes written to target tensors, once each.
        n_bytes_received: Bytes of sharded source tensors that this process received from the others.
        seconds: Wall time of the growth.
        steps: Step -> its seconds: scan of the live objects, describe, plan, check (the forward passes), cut into pieces, write, commit.
        memory: ``"stage"``: all targets beside all sources. ``"lean"``: one set of tensors after the other.
        peak_bytes: Peak memory beyond the memory in use before, on the device with the highest peak.
        lr_factors: Learning-rate factor of the law -> number of parameter tensors; None for a factor that is not one number.
        lr_applied: True when learning rates follow the law, by param groups, by ``UpdateScale`` or by the optimizer itself.
        grad_norm_factor: The law's factor on the global gradient norm, pads and new blocks left out; None without gradients and second
            moments.
        noisy: True when twin noise was added or coordinates copy nothing: the gradient norm then exceeds the law's.
        history: Records of all growths of the model so far, as JSON, this growth last; ``growkern.resume`` reads them.
        notes: Notes for the user on the next steps.
        learned: What a learned growth has learned; None for a growth by a closed form.

    Example:
        >>> print(growkern.expand_inplace(model, optim, to={"hidden": 48, "layers": 3}))
        Grew llama
        <BLANKLINE>
        size        source  target
        ----------  ------  ------  -------
        hidden      24      48      x 2
        heads       4       8       x 2
        kv_heads    2       4       x 2
        ffn         40      80      x 2
        layers      2       3       x 1.5
        parameters  10,920  58,800  x 5.385
        <BLANKLINE>
        preserves            the function
        new blocks           model.layers.2
        moved                106 kB read, 235 kB written, ... s, ... GB/s
        time                 ...
        peak memory          235 kB beyond the source (stage)
        learning rate        unchanged for 22, x 0.7071 for 7 tensors
        <BLANKLINE>
        note: ...
    """

    family: str
    source_sizes: dict[str, int]
    target_sizes: dict[str, int]
    n_params_source: int
    n_params_target: int
    new_blocks: tuple[str, ...]
    preserves: Preserves
    reasons: tuple[str, ...]
    n_bytes_read: int
    n_bytes_written: int
    n_bytes_received: int
    seconds: float
    steps: dict[str, float]
    memory: str
    peak_bytes: int
    lr_factors: dict[float | None, int]
    lr_applied: bool
    grad_norm_factor: float | None
    noisy: bool
    history: tuple[str, ...]
    notes: tuple[str, ...]
    learned: Learned | None = None

    @property
    def function_preserving(self) -> bool:
        """True when the target computes the same function as the source, up to rounding."""
        return self.preserves != "nothing"

    @property
    def n_new_blocks(self) -> int:
        """Number of added blocks."""
        return len(self.new_blocks)

    def plot(self) -> "Figure":
        """Draw the report: what grew, the time of every step, bytes, learning-rate factors, and the gradient-norm factor.

        Returns:
            Figure of matplotlib on a transparent background, which light and dark pages show.

        Raises:
            ModuleNotFoundError: matplotlib is missing; the message has the pip command.

        Example:
            >>> growkern.expand_inplace(model, optim).plot().savefig("growth.png")
        """
        from growkern.pictures.report import draw

        rows = [*_grown(self), ("parameters", self.n_params_source, self.n_params_target)]
        steps = [(name, s, f"{s:.3g} s") for name, s in self.steps.items()]
        memory = [
            (name, float(n), _size(n))
            for name, n in (
                ("read", self.n_bytes_read), ("written", self.n_bytes_written), ("received", self.n_bytes_received),
                ("peak beyond the source", self.peak_bytes),
            )
        ]  # fmt: skip
        factors = [(text, float(n), f"{n:,}") for text, n in self._factors().items()]
        applied = "" if self.lr_applied or not factors else " (recommended, not applied)"
        norm = dict(self._norm()).get("gradient norm")
        return draw(
            f"{_title(self)}, {_preserved(self)}", rows, (f"time: {self.seconds:.3g} s", steps), memory,
            (f"tensors per learning-rate factor{applied}", factors), f"gradient norm {norm}" if norm else "",
        )  # fmt: skip

    def __str__(self) -> str:
        facts = "\n".join(f"{k:<20} {v}" for k, v in self._facts())
        text = [_title(self), table(SIZES, self._rows()), facts]
        return "\n\n".join(
            [*text, *(["\n".join(f"note: {note}" for note in self.notes)] if self.notes else [])]
        )

    def _repr_html_(self) -> str:
        notes = html_lines([f"note: {note}" for note in self.notes])
        return html_page(
            _title(self), html_table(SIZES, self._rows()), html_table(["", ""], self._facts()), notes
        )  # fmt: skip

    def _rows(self) -> list[tuple[object, ...]]:
        n, m = self.n_params_source, self.n_params_target
        rows = [(k, n, m, f"x {m / n:.4g}" if n else "") for k, n, m in _grown(self)]
        rows.append(("parameters", n, m, f"x {m / max(1, n):.4g}"))
        return [(name, f"{n:,}", f"{m:,}", ratio) for name, n, m, ratio in rows]

    def _factors(self) -> dict[str, int]:
        """Return learning-rate factor as text -> number of tensors."""
        counts: Counter[str] = Counter()
        for factor, n in self.lr_factors.items():
            changed = "one factor per element" if factor is None else f"x {factor:.4g}"
            counts["unchanged" if changed == "x 1" else changed] += n
        return dict(counts)

    def _norm(self) -> list[tuple[str, str]]:
        if self.grad_norm_factor is None:
            return []
        new = "what is new adds to it: measure"
        advice = new if self.noisy else "scale a clipping threshold alike"
        return [("gradient norm", f"x {self.grad_norm_factor:.3g} by the law; {advice}")]

    def _facts(self) -> list[tuple[object, ...]]:
        rate = (self.n_bytes_read + self.n_bytes_written) / max(self.seconds, 1e-9) / 1e9
        received = f"{_size(self.n_bytes_received)} received, " if self.n_bytes_received else ""
        factors = ", ".join(f"{text} for {n}" for text, n in self._factors().items())
        factors = factors and f"{factors} tensors"
        longest = sorted(self.steps.items(), key=lambda item: -item[1])[:N_STEPS]
        facts: list[tuple[object, ...]] = [
            ("preserves", _preserved(self).removeprefix("preserves ")),
            (
                "moved",
                f"{received}{_size(self.n_bytes_read)} read, {_size(self.n_bytes_written)} written, {self.seconds:.3g} s, {rate:.3g} GB/s",
            ),
            ("time", ", ".join(f"{name} {n / max(self.seconds, 1e-9):.0%}" for name, n in longest)),
            ("peak memory", f"{_size(self.peak_bytes)} beyond the source ({self.memory})"),
            (
                "learning rate",
                f"{factors or 'unchanged'}{'' if self.lr_applied or not factors else ' (recommended, not applied)'}",
            ),
            *self._norm(),
        ]
        if self.new_blocks:
            facts.insert(1, ("new blocks", ", ".join(self.new_blocks)))
        return facts + ([] if self.learned is None else self.learned.facts())


def _title(report: GrowthReport) -> str:
    """Return whether the model grew or shrank, and its family."""
    shrank = any(report.target_sizes[name] < n for name, n in report.source_sizes.items())
    return f"{'Shrank' if shrank else 'Grew'} {report.family}"


def _grown(report: GrowthReport) -> list[tuple[str, int, int]]:
    """Return name, source size and target size of every size that changed."""
    return [(k, n, m) for k, n in report.source_sizes.items() if (m := report.target_sizes[k]) != n]


def _preserved(report: GrowthReport) -> str:
    """Return what the growth preserves, with the reasons if it preserves nothing."""
    return KEPT.get(report.preserves, "preserves nothing: ") + "; ".join(report.reasons)


def _size(n_bytes: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.3g} {unit}"
    return f"{n_bytes} B"


def growth_metrics(report: GrowthReport) -> dict[str, float]:
    """Return the metrics that integrations log for a growth: target sizes, parameter count and seconds, as floats."""
    sizes = {f"growth/{name}": float(n) for name, n in report.target_sizes.items()}
    return sizes | {
        "growth/parameters": float(report.n_params_target),
        "growth/seconds": report.seconds,
    }


def growth_event(report: GrowthReport) -> str:
    """Return a growth in one line, the text that integrations log: what grew, and what the growth preserves."""
    n = ("parameters", report.n_params_source, report.n_params_target)
    grown = ", ".join(f"{name} {a:,} -> {b:,}" for name, a, b in [*_grown(report), n])
    return f"{_title(report)}: {grown}; {_preserved(report)}."
