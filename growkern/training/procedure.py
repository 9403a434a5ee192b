"""A schedule that tells what it will do over the whole run: steps, sizes, who trains, and the FLOPs of each stage."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from typing import TYPE_CHECKING

from torch import nn

from growkern.errors import PlanError
from growkern.model.describe import describe
from growkern.support.html import html_lines, html_page, html_table
from growkern.support.text import table
from growkern.support.wrappers import unwrapped
from growkern.training.options import SpecOf
from growkern.training.outlook import costs, run_picture, starts_of
from growkern.training.schedule import GrowthSchedule
from growkern.training.trains import ALL, Trains
from growkern.training.triggers import At, Event, target_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STAGES = ["from step", "steps", "grows, trains", "parameters", "FLOPs/step", "FLOPs", "state"]
MOST = 1e30  # steps, tokens of a step, parameters: the FLOPs of a run stay finite


@dataclass(frozen=True)
class Stage:
    """What happens between two events of a procedure.

    Attributes:
        what: Sizes that grow at its start, and who trains.
        start: Step at its start; None where a metric decides.
        n_steps: Number of steps; None where a metric decides.
        n_params: Number of parameters of the model.
        flops_per_step: FLOPs of a step.

    Example:
        >>> schedule = growkern.procedures.llama_pro(model, layers=4, at=10, total_steps=100, tokens_per_step=32)
        >>> [(stage.start, stage.n_steps, stage.n_params) for stage in schedule.stages]
        [(0, 10, 10920), (10, 90, 20232)]
    """

    what: str
    start: int | None
    n_steps: int | None
    n_params: int
    flops_per_step: float

    @property
    def flops(self) -> float | None:
        """FLOPs of the stage; None where its length is not known."""
        return None if self.n_steps is None else self.n_steps * self.flops_per_step


class Procedure(GrowthSchedule):
    """A growth schedule of a published procedure. ``print`` it before the run: it shows every stage and its FLOPs.

    FLOPs are those of Kaplan et al., arXiv:2001.08361: 6 per token and parameter, and less where not everything trains. What a stage
    saves, it saves at an equal number of steps; whether the loss is equal, the run shows. The stages are planned on a copy of the model
    without values.

    Args:
        name: Name of the procedure.
        model: Model of the starting sizes.
        events: See ``GrowthSchedule``.
        trains: See ``GrowthSchedule``.
        total_steps: Number of steps of the whole run.
        tokens_per_step: Tokens of a step, for the FLOPs.
        spec: Function from a custom model to its description; None for a model that growkern describes by itself.

    Attributes:
        stages: The stages, in order.
        scratch: FLOPs of as many steps of the target from scratch.

    Raises:
        PlanError: A number is out of range, or an event cannot happen, or comes after the end of the run.

    Example:
        >>> events = [growkern.At(step=100, to={"layers": 4}, trains=growkern.trains.New())]
        >>> print(growkern.procedures.Procedure("mine", model, events, total_steps=200, tokens_per_step=32))
        mine: 200 steps of 32 tokens
        <BLANKLINE>
        from step  steps  grows, trains                     parameters  FLOPs/step  FLOPs     state
        ---------  -----  --------------------------------  ----------  ----------  --------  -----
        0          100                                      10,920      2.1e+06     2.1e+08   now
        100        100    layers=4, trains New(head=False)  20,232      2.89e+06    2.89e+08
        <BLANKLINE>
        4.98e+08 FLOPs, 64% of the 7.77e+08 FLOPs for as many steps of the target from scratch
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        events: Sequence[Event],
        *,
        trains: Trains | None = None,
        total_steps: int,
        tokens_per_step: float,
        spec: SpecOf | None = None,
    ) -> None:
        check_run(name, total_steps, tokens_per_step)
        super().__init__(events, trains=trains)
        late = [
            event for event in events if isinstance(event, At) and (event.step or 0) >= total_steps
        ]
        if late:
            raise PlanError(
                f"{name}: the event at {late[0].trigger} comes after the end of a run of {total_steps:,} steps; make the run longer."
            )
        self.name, self.total_steps, self.tokens_per_step = name, total_steps, tokens_per_step
        self.stages = tuple(self._staged(unwrapped(model), spec))
        last = self.stages[-1]
        self.scratch = 6.0 * last.n_params * tokens_per_step * total_steps

    def _staged(self, model: nn.Module, spec: SpecOf | None) -> Iterator[Stage]:
        events: list[Event | None] = [None, *self.events]
        starts = [0, *(int(e.step) if isinstance(e, At) and e.step else None for e in self.events)]
        ends = [*starts[1:], self.total_steps]
        values = costs(model, self.events, self.trains, spec or (lambda _: None))
        for event, start, end, (n_params, flops) in zip(events, starts, ends, values, strict=True):
            who = event.trains if event else self.trains or ALL
            what = target_of(event) if event else "" if who.everything else f"trains {who}"
            n_steps = None if start is None or end is None else end - start
            yield Stage(what, start, n_steps, n_params, flops * self.tokens_per_step)

    @property
    def flops(self) -> float | None:
        """FLOPs of the whole run; None where a metric decides about the length of a stage."""
        known = [stage.flops for stage in self.stages]
        return None if None in known else sum(flops or 0.0 for flops in known)

    def plot(
        self, model: nn.Module | None = None, *, total_steps: int | None = None, tokens_per_step: float | None = None,
        spec: SpecOf | None = None,
    ) -> "Figure":  # fmt: skip
        """Draw the whole run: number of parameters and FLOPs over the steps; see ``GrowthSchedule.plot``.

        Args:
            model: Ignored; the procedure has planned its stages.
            total_steps: Number of steps of the run; None for the procedure's.
            tokens_per_step: Tokens of a step; None for the procedure's.
            spec: Ignored.

        Returns:
            Figure of matplotlib on a transparent background, which light and dark pages show.

        Example:
            >>> schedule = growkern.procedures.stack_bert(model, layers=(2, 4), steps=(100,), total_steps=300, tokens_per_step=32)
            >>> schedule.plot().savefig("run.png")
        """
        end, per_step = (
            float(total_steps or self.total_steps),
            tokens_per_step or self.tokens_per_step,
        )
        starts = [(0.0, 0.0), *starts_of(self.events, 0.0, end, per_step)]
        values = [(s.n_params, s.flops_per_step / self.tokens_per_step) for s in self.stages]
        return run_picture(self.name, [None, *self.events], starts, values, end, per_step)

    def __str__(self) -> str:
        return f"{self._title()}\n\n{table(STAGES, self._stage_rows())}\n\n{self._cost()}"

    def _repr_html_(self) -> str:
        return html_page(
            self._title(), html_table(STAGES, self._stage_rows()), html_lines([self._cost()])
        )

    def _title(self) -> str:
        return f"{self.name}: {self.total_steps:,} steps of {self.tokens_per_step:,.0f} tokens"

    def _cost(self) -> str:
        cost = f"{self.scratch:.3g} FLOPs for as many steps of the target from scratch"
        if self.flops is None:
            return cost
        return f"{self.flops:.3g} FLOPs, {self.flops / self.scratch:.0%} of the {cost}"

    def _stage_rows(self) -> list[tuple[object, ...]]:
        rows: list[tuple[object, ...]] = []
        for i, stage in enumerate(self.stages):
            fired = self.fired[i - 1] if 0 < i <= len(self.fired) else None
            state = "now" if i == len(self.fired) else f"from step {fired:,}" if fired else ""
            rows.append(
                (
                    "when it is due" if stage.start is None else f"{stage.start:,}",
                    "?" if stage.n_steps is None else f"{stage.n_steps:,}",
                    stage.what,
                    f"{stage.n_params:,}",
                    f"{stage.flops_per_step:.3g}",
                    "?" if stage.flops is None else f"{stage.flops:.3g}",
                    state,
                )
            )
        return rows


def check_stages(
    name: str, model: nn.Module, layers: Sequence[int], steps: Sequence[int], n_open: int, spec: SpecOf | None
) -> None:  # fmt: skip
    """Raise PlanError unless the stages fit each other and the model; ``n_open``: number of stages at the end without a length."""
    check_steps(name, len(layers), steps, n_open)
    if any(one >= other for one, other in pairwise(layers)):
        raise PlanError(f"{name}: layers={tuple(layers)} do not rise from stage to stage.")
    model = unwrapped(model)
    n = describe(model, spec(model) if spec else None, values=False).sizes.get("layers")
    if n != layers[0]:
        raise PlanError(
            f"{name}: the first stage has {layers[0]} blocks, and the model {n}; pass layers=({n}, ...)."
        )


def check_steps(name: str, n_stages: int, steps: Sequence[int], n_open: int) -> None:
    """Raise PlanError unless there is a number of steps for every stage but the last ``n_open``."""
    if len(steps) != n_stages - n_open or not steps:
        raise PlanError(
            f"{name}: {n_stages} stages need {max(1, n_stages - n_open)} numbers of steps, and {len(steps)} were passed."
        )
    if any(n < 1 for n in steps):
        raise PlanError(f"{name}: steps={tuple(steps)}; pass numbers of steps of 1 or more.")


def check_run(name: str, total_steps: int, tokens_per_step: float) -> None:
    """Raise PlanError unless a run has a step, and a step has tokens."""
    check_least(name, 1, total_steps=total_steps)
    check_least(name, 0, above=True, tokens_per_step=tokens_per_step)


def check_least(name: str, least: int, *, above: bool = False, **numbers: float) -> None:
    """Raise PlanError unless each argument has a number from ``least`` (or above it) and below ``MOST``."""
    for key, n in numbers.items():
        if not least <= n < MOST or (above and n == least):
            shown = f"{MOST:g} or more" if MOST <= n < inf else f"{n}"
            raise PlanError(
                f"{name}: {key}={shown}; pass a number {'above' if above else 'from'} {least}, below {MOST:g}."
            )
