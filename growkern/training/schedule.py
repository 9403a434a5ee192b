"""Growth schedules: an optimizer hook counts steps and fires events, and a state dict restores the progress after a restart."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from numbers import Real
from typing import TYPE_CHECKING, Any
from weakref import ref

from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Unpack  # a torch dependency; typing has Unpack from 3.11 on

from growkern.distributed.shards import has_shards, reshard
from growkern.engine.ddp import agree
from growkern.errors import PlanError, UnsupportedModelError, raise_all
from growkern.support.argument_types import typed_arguments
from growkern.support.html import html_page, html_table
from growkern.support.renamed import renamed_arguments
from growkern.support.text import short, table
from growkern.support.wrappers import unwrapped
from growkern.training.attachment import Attachment, OnGrowth
from growkern.training.options import Options, SpecOf
from growkern.training.outlook import outlook
from growkern.training.ramp import progress
from growkern.training.slope import WhenSlope
from growkern.training.trains import Trains
from growkern.training.triggers import (
    Counts,
    Event,
    disorder,
    read_state,
    target_of,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEAD = ["event", "to", "trigger", "state"]
logger = logging.getLogger("growkern")


class GrowthSchedule:
    """Events that grow a model during training; each event fires once, in order.

    Args:
        events: Growths with their triggers. An event waits until all previous events have fired.
        trains: Who trains until the first event, see ``growkern.trains``; None to leave that as it is.
        on_growth: Callbacks that get the event and the report after each growth.

    Attributes:
        events: Events of the schedule.
        trains: Who trains until the first event.
        on_growth: List of the callbacks; more can be appended.
        counts: Steps, tokens and compute so far.
        fired: Step at which each fired event fired.
        new_blocks: Names of the blocks that the last growth added.
        history: Records of the growths, as JSON; ``growkern.resume`` reads them.

    Raises:
        PlanError: Steps, tokens or sizes decrease from an event to a later event, or an event is invalid; every reason at once.

    Example:
        >>> events = [growkern.At(step=1, to={"hidden": 48}), growkern.WhenPlateau(patience=50, to={"layers": 4})]
        >>> schedule = growkern.GrowthSchedule(events)
        >>> attachment = schedule.attach(model, optim)
        >>> for batch in batches:
        ...     loss = model(**batch).loss
        ...     loss.backward()
        ...     optim.step()
        ...     optim.zero_grad()
        ...     schedule.observe(loss=loss)
        >>> print(schedule)
        event  to         trigger                       state
        -----  ---------  ----------------------------  ----------------------------------
            0  hidden=48  step 1                        fired at step 1
            1  layers=4   loss (min) not better for 50  waiting: best ..., 0 of 50 since
    """

    @typed_arguments(PlanError, "events")
    def __init__(
        self, events: Sequence[Event], *, trains: Trains | None = None, on_growth: Sequence[OnGrowth] = ()
    ) -> None:  # fmt: skip
        raise_all(PlanError, "cannot schedule these growths:", disorder(events))
        self.events, self.trains = tuple(events), trains
        self.on_growth = list(on_growth)
        self.counts = Counts()
        self.fired: list[int] = []
        self.history: list[str] = []
        self.new_blocks: list[str] = []
        self._attachment: ref[Attachment] | None = None

    @property
    def attachment(self) -> "Attachment | None":
        """The attachment of the schedule, or None. Only the optimizer's hook keeps the attachment alive."""
        return self._attachment() if self._attachment is not None else None

    @attachment.setter
    def attachment(self, attachment: "Attachment | None") -> None:
        self._attachment = ref(attachment) if attachment is not None else None

    @property
    def ahead(self) -> tuple[Event, ...]:
        """The events that have not fired."""
        return self.events[len(self.fired) :]

    @property
    def next_event(self) -> Event | None:
        """The first event that has not fired; None when all events have fired."""
        return self.ahead[0] if self.ahead else None

    @property
    def who_trains(self) -> Trains | None:
        """Who trains now, by the choice of the last event that fired; None for what the schedule leaves as it is."""
        return self.events[len(self.fired) - 1].trains if self.fired else self.trains

    @typed_arguments(PlanError, "metrics", "tokens")
    def observe(
        self,
        *,
        tokens: float | Tensor = 0,
        flops: float | None = None,
        **metrics: float | Tensor,
    ) -> None:
        """Report tokens, FLOPs and metrics of the last step or of an evaluation.

        The schedule keeps a metric only if the next event observes the metric. The curve of ``loss`` over tokens is kept for
        ``growkern.advise``. If several processes train one model, report the same numbers in each process: all processes have to
        grow at the same step.

        Args:
            tokens: Tokens of this step.
            flops: FLOPs of this step; None for 6 x tokens x parameters of the attached model, less where not everything trains. Reported
                after ``optim.step()``, the tokens of a step that grew the model count at the grown size.
            metrics: Values by metric name. Values that are not finite are ignored.

        Raises:
            PlanError: ``tokens`` or ``flops`` is negative or not finite, a metric is not one number, or the next event is a ``WhenSlope``
                and no FLOPs are known. Nothing is counted then, unless FLOPs are unknown.
        """
        self._refuse_lists(dict(metrics, tokens=tokens))
        n = float(tokens)
        if not all(isfinite(x) and x >= 0 for x in (n, flops or 0)):
            raise PlanError(
                f"observe(tokens={tokens}, flops={flops}): pass the numbers of this step, 0 or more."
            )
        self.counts.n_tokens += n
        if flops is None:
            flops = n * self.attachment.flops_per_token if self.attachment else 0.0
        self.counts.n_flops += flops
        self.counts.n_flops_of_size += flops
        self.observe_metrics(metrics)

    def observe_metrics(self, metrics: Mapping[str, float | Tensor]) -> None:
        """Report metrics as a mapping, for names that are not Python identifiers; see ``observe``.

        Args:
            metrics: Metric name -> value: a number, or a tensor of one element.

        Raises:
            PlanError: See ``observe``.
        """
        event = self.next_event
        observed = event.observes if event is not None else None
        self._refuse_lists(metrics)
        if "loss" in metrics:
            self.counts.curve.add(self.counts.n_tokens, metrics["loss"])
        if event is None or observed is None or observed not in metrics:
            return
        seen = metrics[observed]
        value = float(seen.detach() if isinstance(seen, Tensor) else seen)
        if isinstance(event, WhenSlope) and self.counts.n_flops <= 0:
            raise PlanError(
                f"{event.trigger}: no compute was reported. Pass observe(tokens=...) with every step once the schedule is "
                "attached, or observe(flops=...)."
            )
        if isfinite(value):
            point = self.counts.n_flops_of_size, value
            self.counts.points = event.keep([*self.counts.points, point])

    def _refuse_lists(self, metrics: Mapping[str, object]) -> None:
        """Raise PlanError for a number to read that is not one number; other metrics are not looked at."""
        observed = self.next_event.observes if self.next_event is not None else None
        for name in metrics.keys() & {"tokens", "loss", observed}:
            value = metrics[name]
            if not (isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)):
                raise PlanError(f"observe: expected one number as {name}, got {short(value)}.")

    @renamed_arguments(masters="master_weights", rules="state_rules")
    @typed_arguments(PlanError, "optim", model=UnsupportedModelError, spec=UnsupportedModelError)
    def attach(
        self, model: nn.Module, optim: Optimizer | Sequence[Optimizer], scheduler: object | None = None, *, deferred: bool = False,
        **options: Unpack[Options],
    ) -> "Attachment":  # fmt: skip
        """Grow inside ``optim.step()`` from now on. Call ``attach`` once, before the training loop.

        The hook runs at the end of the step, after backward. An autograd graph that is still alive cannot run backward after the
        step, with or without growth, because the step has overwritten the weights that the graph saved. No growth happens while a
        CUDA graph is captured. If a growth fails, ``optim.step()`` raises the error, the growth has changed nothing, and the next
        step tries again.

        Args:
            model: The model; wrappers of ``torch.compile`` and ``DistributedDataParallel`` are removed.
            optim: Optimizer of the model, or a list of optimizers; wrappers of Accelerate and Lightning are removed. Of several, list
                last the one that steps last: its step ends a training step.
            scheduler: The learning-rate scheduler that drives ``optim``, or a list of schedulers; updated by every growth.
            deferred: True to only count steps in ``optim.step()``; due events then fire when ``grow()`` of the attachment is called.
            options: ``spec``, ``backend``, ``ema``, ``master_weights``, ``state_rules``, ``memory``: see ``Options``.

        Returns:
            The attachment; ``remove()`` detaches the schedule.

        Raises:
            PlanError: The schedule is already attached, another schedule is attached to the optimizer, ``optim`` cannot be used, an
                option is unknown, or an event names an unknown size.
            UnsupportedModelError: The model cannot be grown.
        """
        reshard(unwrapped(model))
        if has_shards(unwrapped(model)):
            agree(unwrapped(model), str(self), "the schedule")
        return Attachment(self, model, optim, scheduler, options, deferred)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a restart needs, as plain JSON types: counts, steps of the fired events, records of the growths."""
        if self.attachment is not None:
            self.attachment.settle()
        points = [list(point) for point in self.counts.points]
        counts = asdict(self.counts) | {"points": points, "curve": self.counts.curve.state()}
        return {
            "counts": counts,
            "fired": list(self.fired),
            "history": list(self.history),
            "new_blocks": list(self.new_blocks),
            "events": [f"{target_of(event)} at {event.trigger}" for event in self.events],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the progress from a ``state_dict``; events that have not fired may differ from the saved schedule.

        Args:
            state: What ``state_dict`` returned.

        Raises:
            PlanError: ``state`` is not a state dict of a schedule, or its fired events are not the first events of this schedule.
        """
        counts, fired, history, new_blocks, events = read_state(state, self.events)
        own = self.state_dict()["events"]
        if events[: len(fired)] != own[: len(fired)]:
            raise PlanError(
                f"cannot go on with this schedule: the events that fired were {events[: len(fired)]}, and the schedule begins "
                f"with {own[: len(fired)]}. Keep the events that fired; later events may change."
            )
        if events[len(fired) : len(fired) + 1] != own[len(fired) : len(fired) + 1]:
            counts.points = []  # the points belong to another event
        self.counts, self.fired, self.history = counts, fired, history
        self.new_blocks = new_blocks
        if self.attachment is not None:
            self.attachment.choose()
            self.attachment.ramp.resume(self.attachment)

    def plot(
        self, model: nn.Module | None = None, *, total_steps: int | None = None, tokens_per_step: float | None = None,
        spec: SpecOf | None = None,
    ) -> "Figure":  # fmt: skip
        """Draw the run to come: number of parameters and FLOPs over the steps, with a mark at each growth.

        The growths are planned on a copy of the model without values; nothing is grown. A growth that no fixed step decides about is a
        window: from the step at which the growth may happen first, to the next growth at a fixed step or the end of the run.

        Args:
            model: Model of the present sizes; None for the attached model.
            total_steps: Number of steps of the run; None for a little more than the step of the last growth.
            tokens_per_step: Tokens of a step; None for the mean of what ``observe`` was told. Without it, FLOPs are those of a token.
            spec: Function from a custom model to its description; None for that of the attached model.

        Returns:
            Figure of matplotlib on a transparent background, which light and dark pages show.

        Raises:
            PlanError: There is no model, no fixed step decides about the last growth and ``total_steps`` is None, or the schedule goes
                on after ``total_steps``.
            GrowthError: An event cannot happen.
            ModuleNotFoundError: matplotlib is missing; the message has the pip command.

        Example:
            >>> schedule = growkern.GrowthSchedule([growkern.At(step=1000)])
            >>> schedule.plot(model, tokens_per_step=524288).savefig("run.png")
        """
        return outlook(self, model, total_steps, tokens_per_step, spec)

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles hold: they are not attached."""
        return {**vars(self), "_attachment": None}

    def __str__(self) -> str:
        return table(HEAD, self._rows())

    def _repr_html_(self) -> str:
        return html_page("Growth schedule", html_table(HEAD, self._rows()))

    def _rows(self) -> list[tuple[object, ...]]:
        rows: list[tuple[object, ...]] = []
        c, ends = progress(self)
        for i, event in enumerate(self.events):
            state = f"after event {i - 1}"
            if i < len(self.fired):
                state = f"fired at step {self.fired[i]:,}"
                if c < 1 and self.fired[i] + event.ramp - 1 == ends:
                    state += f"; ramp at {c:.2g}, 1 at step {ends:,}"
            elif i == len(self.fired):
                state = f"waiting: {event.progress(self.counts)}"
            rows.append((i, target_of(event), event.trigger, state))
        return rows
