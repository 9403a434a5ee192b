"""Growths on a schedule: a hook on the optimizer counts steps and fires events, and a state survives a restart."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from typing import Any
from weakref import ref

from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Unpack  # of torch; typing has them from 3.11 on

from growkern.errors import PlanError, raise_all
from growkern.support.renamed import renamed_arguments
from growkern.support.text import table
from growkern.training.attachment import Attachment, OnGrowth, Options
from growkern.training.triggers import (
    Counts,
    Event,
    WhenSlope,
    disorder,
    read_state,
    target_of,
)

logger = logging.getLogger("growkern")


class GrowthSchedule:
    """Events that grow a model while it trains: in order, each once.

    Args:
        events: What grows when. An event waits for those before it.
        on_growth: Called after each growth with the event and its report.

    Attributes:
        events: As given.
        on_growth: As given; a list that may be added to.
        counts: Steps, tokens and compute so far.
        fired: The step at which each event fired, of those that did.
        history: The plans that ran, as JSON (``GrowthPlan.from_json`` reads them).

    Raises:
        PlanError: Events that cannot follow each other, all at once: steps or tokens going backwards, sizes that shrink.

    Example:
        >>> schedule = GrowthSchedule([At(step=1000, to={"hidden": 1024}), WhenPlateau(patience=50, to={"layers": 24})])
        >>> schedule.attach(model, optim, scheduler)
    """

    def __init__(self, events: Sequence[Event], *, on_growth: Sequence[OnGrowth] = ()) -> None:
        raise_all(PlanError, "cannot schedule these growths:", disorder(events))
        self.events = tuple(events)
        self.on_growth = list(on_growth)
        self.counts = Counts()
        self.fired: list[int] = []
        self.history: list[str] = []
        self._attachment: ref[Attachment] | None = None

    @property
    def attachment(self) -> "Attachment | None":
        """Where the schedule is at work; the optimizer's hook alone keeps it alive."""
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
        """The event that is waited for; None when all have fired."""
        return self.ahead[0] if self.ahead else None

    def observe(
        self,
        *,
        tokens: float | Tensor = 0,
        flops: float | None = None,
        **metrics: float | Tensor,
    ) -> None:
        """Report what the last step, or an evaluation, showed.

        A metric is read when the next event looks at it. The curve of ``loss`` over tokens is kept for ``growkern.advise``.

        Where several processes train one model, report the same numbers in each: all have to grow at the same step.

        Args:
            tokens: Tokens of this step.
            flops: Compute of this step; None for 6 x tokens x parameters of the attached model.
            metrics: Values by name. What is not finite says nothing and is passed over.

        Raises:
            PlanError: ``WhenSlope`` waits for a metric, and nothing has said what compute it took.
        """
        n = float(tokens)
        if not all(isfinite(x) and x >= 0 for x in (n, flops or 0)):
            raise PlanError(f"observe(tokens={tokens}, flops={flops}): of this step, 0 or more.")
        self.counts.n_tokens += n
        if flops is None:
            flops = 6.0 * n * self.attachment.n_params if self.attachment else 0.0
        self.counts.n_flops += flops
        self.observe_metrics(metrics)

    def observe_metrics(self, metrics: Mapping[str, float | Tensor]) -> None:
        """Report values under names that are no Python identifiers: ``observe``, with a mapping.

        Raises:
            PlanError: As ``observe``.
        """
        if "loss" in metrics:
            self.counts.curve.add(self.counts.n_tokens, metrics["loss"])
        event = self.next_event
        if event is None or event.observes is None or event.observes not in metrics:
            return
        seen = metrics[event.observes]
        value = float(seen.detach() if isinstance(seen, Tensor) else seen)
        if isinstance(event, WhenSlope) and self.counts.n_flops <= 0:
            raise PlanError(
                f"{event.trigger}: no compute was reported. Pass observe(tokens=...) with every step once the schedule is "
                "attached, or observe(flops=...)."
            )
        if isfinite(value):
            self.counts.points = event.keep([*self.counts.points, (self.counts.n_flops, value)])

    @renamed_arguments(masters="master_weights", rules="state_rules")
    def attach(
        self, model: nn.Module, optim: Optimizer, scheduler: object | None = None, *, deferred: bool = False,
        **options: Unpack[Options],
    ) -> "Attachment":  # fmt: skip
        """Grow inside ``optim.step()`` from now on: one line before the loop.

        The hook runs when the step is done, after backward. A graph that is still alive then cannot be walked backward any more,
        grown or not: the step itself has written the weights it saved. Nothing grows while a CUDA graph is captured. When a
        growth fails, its error leaves ``optim.step()``, nothing has changed, and the next step tries again.

        Args:
            model: The model; ``torch.compile`` and ``DistributedDataParallel`` are looked through.
            optim: Its optimizer; wrappers of Accelerate and Lightning are looked through.
            scheduler: The learning-rate scheduler that drives ``optim``, or a list of them; they follow the growth.
            deferred: Only count steps there; what is due grows when ``grow()`` of the result is called.
            options: ``spec``, ``backend``, ``ema``, ``state_rules``, ``memory``: see ``Options``.

        Returns:
            The attachment; ``remove()`` takes it off.

        Raises:
            PlanError: The schedule is attached already, or another one is attached to the optimizer; an unknown option.
            UnsupportedModelError: The model cannot be grown.
        """
        return Attachment(self, model, optim, scheduler, options, deferred)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a restart needs, as plain JSON types: counts, what fired, the plans that ran."""
        if self.attachment is not None:
            self.attachment.settle()
        points = [list(point) for point in self.counts.points]
        counts = asdict(self.counts) | {"points": points, "curve": self.counts.curve.state()}
        return {
            "counts": counts,
            "fired": list(self.fired),
            "history": list(self.history),
            "events": [f"{target_of(event)} at {event.trigger}" for event in self.events],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state_dict``; events that have not fired may differ from those it was written with.

        Raises:
            PlanError: Not a state dict of a schedule, or one whose events that fired are not this schedule's.
        """
        counts, fired, history, events = read_state(state, len(self.events))
        own = self.state_dict()["events"]
        if events[: len(fired)] != own[: len(fired)]:
            raise PlanError(
                f"cannot go on with this schedule: the growths that ran were {events[: len(fired)]}, and it begins with "
                f"{own[: len(fired)]}. Leave those as they were; later ones may change."
            )
        if events[len(fired) : len(fired) + 1] != own[len(fired) : len(fired) + 1]:
            counts.points = []  # another event's observations
        self.counts, self.fired, self.history = counts, fired, history

    def __str__(self) -> str:
        rows: list[tuple[object, ...]] = []
        for i, event in enumerate(self.events):
            state = f"after event {i - 1}"
            if i < len(self.fired):
                state = f"fired at step {self.fired[i]:,}"
            elif i == len(self.fired):
                state = f"waiting: {event.progress(self.counts)}"
            rows.append((i, target_of(event), event.trigger, state))
        return table(["event", "to", "trigger", "state"], rows)
