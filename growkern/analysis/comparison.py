"""Compare growth methods on copies of a model, before one is chosen."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from math import nan
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from growkern.analysis.verification import verify
from growkern.api import expand_inplace
from growkern.distributed.shards import refuse_shards
from growkern.errors import GrowthError, PlanError, UnsupportedModelError, UnsupportedOptimizerError
from growkern.optimizer.describe import Optimizers, optimizers
from growkern.optimizer.update_scale import UpdateScale, scale_of
from growkern.planning.decisions import DepthMethod, WidthMethod
from growkern.planning.sizes import Target
from growkern.support.argument_types import misfits, typed_arguments
from growkern.support.html import html_lines, html_page, html_table
from growkern.support.text import short, table
from growkern.support.wrappers import unwrapped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Batch = Tensor | Mapping[str, object]
Method = WidthMethod | DepthMethod | tuple[WidthMethod, DepthMethod]
Loss = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class Outcome:
    """Result of one method.

    Attributes:
        method: The method as text; ``"(none)"`` is the source, trained on without growth.
        refused: Why the method cannot grow the model; if set, all other fields keep their defaults.
        preserves: What the growth preserves; see ``GrowthPlan.preserves``.
        logits_error: Largest absolute difference between the outputs of grown model and source.
        loss: Loss on ``held_out`` (default: the first batch) after growth, before any step.
        loss_after: Loss on the same batch after the steps.
        grad_norm: Global gradient norm on the same batch before any step, divided by the source's.
        n_dead: Number of elements without gradient in two steps.
        n_equal: Number of rows and columns that equal another one after two steps: they will stay equal.
        n_params: Number of parameters of the grown model.
        seconds: Wall time of the growth.
        n_bytes: Bytes written by the growth.

    Example:
        >>> comparison = growkern.compare(model, optim, methods=[width.HyperClone()], to="1.5x", batch=batch, steps=1)
        >>> source, hyperclone = comparison.outcomes
        >>> source.n_params, hyperclone.refused
        (10920, 'HyperClone: hidden 24 -> 36 is no whole multiple, and the paper clones whole multiples; use HyperClone(general=True)
        or Lossless(), which grow to any width.')
    """

    method: str
    refused: str | None = None
    preserves: str = "function"
    logits_error: float = nan
    loss: float = nan
    loss_after: float = nan
    grad_norm: float = nan
    n_dead: int = 0
    n_equal: int = 0
    n_params: int = 0
    seconds: float = nan
    n_bytes: int = 0


@dataclass(frozen=True)
class Comparison:
    """Result of ``compare``; ``print`` it.

    Attributes:
        outcomes: Outcome of the source, then of each method in the order of ``methods``.
        n_steps: Number of steps before ``loss_after``.

    Example:
        >>> print(growkern.compare(model, optim, methods=[width.Lossless(), width.AKI()], batch=batches, steps=2))
        method      preserves   logits off by  loss    after 2 steps  gradient norm  dead  equal  parameters  seconds  MB
        ----------  ----------  -------------  ------  -------------  -------------  ----  -----  ----------  -------  -----
        (none)      trajectory  0.0e+00        ...     ...            x 1            0     0      10,920      nan      0
        Lossless()  function    ...            ...     ...            x 1.44         0     0      40,272      ...      0.161
        AKI()       nothing     ...            ...     ...            x 0.951        0     572    40,272      ...      0.161
    """

    outcomes: tuple[Outcome, ...]
    n_steps: int

    def plot(self) -> "Figure":
        """Draw the losses of every method: after the growth, and after the steps, with the loss of the source that trains on.

        Returns:
            Figure of matplotlib on a transparent background, which light and dark pages show.

        Raises:
            ModuleNotFoundError: matplotlib is missing; the message has the pip command.

        Example:
            >>> comparison = growkern.compare(model, optim, methods=[width.Lossless(), width.AKI()], batch=batches, steps=2)
            >>> comparison.plot().savefig("methods.png")
        """
        from growkern.pictures.comparison import draw

        rows = [(o.method, o.loss, o.loss_after) for o in self.outcomes if o.refused is None]
        return draw(rows, self.n_steps, self._refused())

    def __str__(self) -> str:
        return "\n\n".join([table(self._head(), self._rows()), *self._refused()])

    def _repr_html_(self) -> str:
        return html_page("Comparison of growth methods", html_table(self._head(), self._rows()), html_lines(self._refused()))  # fmt: skip

    def _head(self) -> list[str]:
        return [
            "method", "preserves", "logits off by", "loss", f"after {self.n_steps} steps", "gradient norm", "dead", "equal",
            "parameters", "seconds", "MB",
        ]  # fmt: skip

    def _rows(self) -> list[list[str]]:
        return [
            [
                outcome.method, outcome.preserves, f"{outcome.logits_error:.1e}", f"{outcome.loss:.4f}", f"{outcome.loss_after:.4f}",
                f"x {outcome.grad_norm:.3g}", f"{outcome.n_dead:,}", f"{outcome.n_equal:,}", f"{outcome.n_params:,}",
                f"{outcome.seconds:.2g}", f"{outcome.n_bytes / 1e6:.3g}",
            ]
            for outcome in self.outcomes
            if outcome.refused is None
        ]  # fmt: skip

    def _refused(self) -> list[str]:
        return [
            f"{outcome.method}: {outcome.refused}" for outcome in self.outcomes if outcome.refused
        ]


@typed_arguments(PlanError, "to", "batch", "optim", model=UnsupportedModelError)
def compare(
    model: nn.Module,
    optim: Optimizers,
    *,
    methods: Sequence[Method],
    batch: Batch | Sequence[Batch],
    to: Target = "2x",
    steps: int = 10,
    loss: Loss | None = None,
    held_out: Batch | None = None,
    on_outcome: Callable[[Outcome], object] | None = None,
    **options: Any,
) -> Comparison:
    """Grow copies of a model by several methods, and train each for a few steps; the arguments are not changed.

    Args:
        model: Source model.
        optim: Optimizer of the model, or a list of optimizers.
        methods: Width methods, depth methods, or pairs of both.
        batch: Input: keyword arguments, or a tensor; the steps cycle through a sequence of batches.
        to: As in ``expand_inplace``.
        steps: Number of optimizer steps after each growth.
        loss: Function of a model and a batch; by default the output's ``loss``, or the cross entropy of the next token.
        held_out: Input for measuring losses and gradient norms; by default the first of ``batch``.
        on_outcome: Function that is called with every outcome as soon as it is measured.
        options: ``state``, ``dynamics``, ``spec``, ``seed``, ``backend``, ``state_rules``, ``memory``: as in ``expand_inplace``.

    Returns:
        One outcome for the source, then one per method. A method that refuses the model has an outcome too.

    Raises:
        PlanError: ``methods`` is empty or has an entry of another type, there is no batch, or ``steps`` is negative.
        UnsupportedModelError: The model is no module, or is sharded.
        UnsupportedOptimizerError: ``optim`` is None.

    Example:
        >>> comparison = growkern.compare(model, optim, methods=[width.Lossless(), width.AKI()], batch=batches, steps=2)
        >>> [(outcome.method, outcome.preserves) for outcome in comparison.outcomes]
        [('(none)', 'trajectory'), ('Lossless()', 'function'), ('AKI()', 'nothing')]
    """
    model, optims = unwrapped(model), optimizers(optim)
    refuse_shards(model, "compare")
    several: Any = [batch] if isinstance(batch, Tensor | Mapping) else batch
    batches: list[Batch] = [*several] if isinstance(several, Iterable) else [several]
    for problem in (wrong for one in batches for wrong in misfits("batch", one, Batch)):
        raise PlanError(problem)
    strange = [method for method in methods if _pair(method) is None]
    if not methods or strange:
        raise PlanError(
            f"methods: expected width methods, depth methods or pairs of both, got {short(strange or methods)}."
        )
    if not optims:
        raise UnsupportedOptimizerError(
            "optim: pass the optimizer of the model, or a list of optimizers."
        )
    if not batches or steps < 0:
        raise PlanError(
            f"compare takes at least one batch and steps >= 0; got {len(batches)} batches and steps={steps}."
        )
    measured = batches[0] if held_out is None else held_out
    measure = _Measure(
        model, optims, batches, measured, steps, loss or loss_of, dict(options, to=to)
    )
    outcomes: list[Outcome] = []
    for method in (None, *methods):
        outcomes.append(measure(method))
        if on_outcome is not None:
            on_outcome(outcomes[-1])
    return Comparison(tuple(outcomes), steps)


class _Measure:
    """Grows and trains copies of one model."""

    def __init__(
        self, model: nn.Module, optims: Sequence[Optimizer], batches: list[Batch], measured: Batch, steps: int, loss: Loss,
        options: dict[str, Any],
    ) -> None:  # fmt: skip
        self.model, self.optims, self.batches, self.steps = model, optims, batches, steps
        self.measured = measured
        self.loss, self.options = loss, options
        twin, held = self._copies()
        del held
        self.norm = self._losses(twin)[1]

    def __call__(self, method: Method | None) -> Outcome:
        """Measure one outcome; ``method=None`` trains the source on without growth."""
        source, (grown, optims) = self.model, self._copies()
        name, seconds, n_bytes, preserves = "(none)", nan, 0, "trajectory"
        if method is not None:
            width, depth = _pair(method) or (None, None)
            name = " + ".join(_text(part) for part in (width, depth) if part is not None)
            try:
                report = expand_inplace(grown, optims, width=width, depth=depth, **self.options)
            except GrowthError as error:
                return Outcome(name, refused=str(error))
            seconds, n_bytes = report.seconds, report.n_bytes_written
            preserves = report.preserves
        checked = verify(source, grown, self.measured)
        before, norm = self._losses(grown)
        for i in range(self.steps):
            grown.train()
            for optim in optims:
                optim.zero_grad()
            self.loss(grown, self.batches[i % len(self.batches)]).backward()  # pyright: ignore[reportUnknownMemberType]
            for optim in optims:
                optim.step()
        return Outcome(
            name,
            preserves=preserves,
            logits_error=checked.logits_error,
            loss=before,
            loss_after=self._losses(grown)[0],
            grad_norm=norm / self.norm if self.norm else nan,
            n_dead=sum(checked.dead.values()),
            n_equal=sum(checked.copies.values()),
            n_params=sum(p.numel() for p in grown.parameters()),
            seconds=seconds,
            n_bytes=n_bytes,
        )

    def _copies(self) -> tuple[nn.Module, list[Optimizer]]:
        """Copy model and optimizers; a copied optimizer has no hooks, so the hooks of ``UpdateScale`` are registered again."""
        scales = [scale_of(optim) for optim in self.optims]
        for scale in scales:
            if scale is not None:
                scale.restore()
        model, optims = copy.deepcopy((self.model, [*self.optims]))
        for optim, scale in zip(optims, scales, strict=True):
            if scale is not None and scale_of(optim) is None:
                UpdateScale(optim, {}).load_state_dict(scale.state_dict())
        return model, optims

    def _losses(self, model: nn.Module) -> tuple[float, float]:
        """Return loss and gradient norm on the held-out batch, in evaluation mode."""
        model.eval()
        model.zero_grad()
        loss = self.loss(model, self.measured)
        loss.backward()  # pyright: ignore[reportUnknownMemberType]
        grads = [p.grad.float().square().sum() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return float(loss.detach()), float(torch.stack(grads).sum().sqrt())


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Return the output's own loss, or the cross entropy of the next token.

    Raises:
        PlanError: The output has no loss, and output and batch do not have the logits and token ids of a cross entropy.
    """
    out: Any = model(**batch) if isinstance(batch, Mapping) else model(batch)
    if (loss := getattr(out, "loss", None)) is not None:
        return cast(Tensor, loss)
    logits = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    if not isinstance(logits, Tensor) or not isinstance(ids, Tensor) or ids.is_floating_point():
        raise PlanError(
            "this model gives no loss on this batch; pass loss=, a function of model and batch."
        )
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def _text(method: object) -> str:
    """Return a method as Python text, without arguments that equal their defaults."""
    if not is_dataclass(method):
        return str(method)
    values = [(f.name, getattr(method, f.name), f.default) for f in fields(method)]
    said = ", ".join(f"{name}={value!r}" for name, value, default in values if value != default)
    return f"{type(method).__name__}({said})"


def _pair(method: object) -> tuple[WidthMethod | None, DepthMethod | None] | None:
    """Return width and depth method of an entry of ``methods``; None if it is neither a method nor a pair."""
    if isinstance(method, tuple):
        both = cast(tuple[object, ...], method)
        if len(both) == 2 and hasattr(both[0], "widen") and hasattr(both[1], "deepen"):
            return cast(tuple[WidthMethod, DepthMethod], both)
        return None
    if isinstance(method, type):
        return None
    if hasattr(method, "widen"):
        return cast(WidthMethod, method), None
    return (None, cast(DepthMethod, method)) if hasattr(method, "deepen") else None
