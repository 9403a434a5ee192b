"""The attachment of a schedule to an optimizer: a post-step hook that grows the model after a step."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal
from weakref import ref

import torch
from torch import nn
from torch.optim import Optimizer

from growkern.api import expand_inplace, plan
from growkern.commit.checkpoint_guard import guard_model, n_growths
from growkern.commit.frozen import frozen_of, refuse_reentrant_blocks
from growkern.commit.optimizer_guard import OptimGuard, check_loaded, optim_guard_of
from growkern.engine.ddp import Ranks
from growkern.engine.forward_check import Check, ForwardCheck
from growkern.engine.freezing import choose, release
from growkern.engine.report import GrowthReport
from growkern.engine.sources import tensors_of
from growkern.errors import GrowthError, PlanError, raise_all
from growkern.execution.execute import compile_ahead
from growkern.model.describe import describe, lacks_inputs
from growkern.model.spec import ModelSpec
from growkern.optimizer.describe import describe_optimizers, optimizers
from growkern.optimizer.schedulers import check_scheduler
from growkern.planning.growth_plan import GrowthPlan
from growkern.support.interrupts import uninterrupted
from growkern.support.wrappers import listed, unwrapped
from growkern.training.last_call import LastCall
from growkern.training.loss_curve import LossCurve
from growkern.training.options import Options, spec_function
from growkern.training.ramp import Ramp, width_of
from growkern.training.rehearsal import problems, problems_after_a_step, unheld
from growkern.training.rewind import Rewarm, rewind
from growkern.training.skipped import is_skipped
from growkern.training.trains import flops_per_token
from growkern.training.triggers import Event, unknown_sizes

if TYPE_CHECKING:
    from growkern.training.schedule import GrowthSchedule

logger = logging.getLogger("growkern")
OnGrowth = Callable[[Event, GrowthReport], object]


class Attachment:
    """A schedule attached to one model and its optimizers; ``GrowthSchedule.attach`` makes it.

    The optimizers' step hooks keep the attachment alive. The attachment holds only weak references to optimizers and schedulers.

    Attributes:
        schedule: The growth schedule.
        model: The model that grows, without wrappers.
        options: Arguments that all growths share.
        deferred: True when an integration calls ``grow``, False when the step hook does.
        undescribed: True until the first step describes a model that only a batch can describe.
        chosen: True when those train whom the schedule says.
        ramp: The ramp of the last growth.
        stepped: True when the last optimizer has stepped since the last call of ``grow``.
        on_growth: Callbacks that run after each growth, after the callbacks of the schedule.
    """

    def __init__(
        self, schedule: "GrowthSchedule", model: nn.Module, optim: Optimizer | Sequence[Optimizer],
        scheduler: object | None,
        options: Options, deferred: bool,
    ) -> None:  # fmt: skip
        self.schedule, self.on_growth = schedule, list[OnGrowth]()
        self.model: nn.Module = unwrapped(model)
        self.options, self.deferred, self.stepped = options, deferred, False
        self._flops: float | None = None  # per token; None where everything trains
        self.chosen = True  # False while others train than those whom the schedule says
        self.tried = False  # True once the first step has shown what attach could not see
        # number of growths, and of parameters, before the growth in progress; None when no growth is in progress
        self._running: tuple[int, int] | None = None
        self._take: Any = torch.compiler.disable(_take)
        title = f"cannot attach this schedule of {len(schedule.events)} events:"
        if unknown := sorted(options.keys() - Options.__annotations__.keys()):
            raise PlanError(
                f"{title} unknown options {', '.join(unknown)}. Known: {', '.join(Options.__annotations__)}; "
                "set to=, width=, depth=, state= and dynamics= on the events."
            )
        optims = _optimizers(schedule, optim, title)
        live = [unwrapped(s) for s in listed(scheduler) if s is not None]
        check_scheduler(optims, live)
        self._schedulers: list[ref[Any]] = [*map(ref, live)]
        self._optims, self._hooks = [ref(one) for one in optims], list[Any]()
        self.undescribed = options.get("spec") is None and lacks_inputs(self.model)
        if not self.undescribed:
            self._examine(optims)
        self.ramp, self._last_call = Ramp(), None
        if any(event.rewarm for event in schedule.events):
            self._hooks += [Rewarm(one, self._rewarms) for one in optims]
        self._hooks += [one.register_step_post_hook(self._after_step) for one in optims]
        if self._check() is True or self.undescribed:
            self._last_call = LastCall(self.model)
            self._hooks.append(self._last_call)
        schedule.attachment = self
        try:
            self.choose()
            self.ramp.resume(self)
        except BaseException:
            self.remove()
            raise
        counts = schedule.counts
        if counts.n_tokens and not counts.n_flops:  # tokens were observed before the attachment
            counts.n_flops = counts.n_flops_of_size = 6.0 * counts.n_tokens * self.n_params

    def _examine(self, optims: Sequence[Optimizer]) -> None:
        """Describe the model and guard it; raise for growths of the schedule that would fail."""
        schedule = self.schedule
        title = f"cannot attach this schedule of {len(schedule.events)} events:"
        spec = describe(self.model, self.spec_of(self.model))
        raise_all(PlanError, title, unknown_sizes(schedule.ahead, spec))
        raise_all(PlanError, title, problems(self))
        check = self._check()
        if check is not None and check is not True:
            ranks = Ranks(self.model, ())
            with ranks.together():  # raises now if the forward fails on the batch
                ForwardCheck(self.model, check, ranks.before_forward)
        self._guard(optims, spec)
        compile_ahead(tensors_of(self.model, optims, spec).all(), self.options.get("backend"))

    def describe_by_call(self) -> bool:
        """Describe a model by its last call, which is forgotten, and examine it; return False if a call has to be waited for."""
        if self._last_call is not None and not self._last_call.describe():
            return False
        if self._last_call is not None and self._check() is not True:
            self._last_call.remove()
        self._examine(self.optims)
        self.undescribed = False
        return True

    def _guard(self, optims: Sequence[Optimizer], spec: ModelSpec) -> None:
        """Guard model and optimizers against checkpoints of other sizes, before the first growth too."""
        masters, rules = self.options.get("master_weights"), self.options.get("state_rules")
        described = describe_optimizers(
            self.model, optims, spec, drop=True, state_rules=rules, master_weights=masters
        )
        for one, known in zip(optims, described, strict=True):
            check_loaded(one)
            if optim_guard_of(one) is None:
                OptimGuard(known.rules, "", model=self.model).register(one)
        guard_model(self.model)

    @property
    def n_params(self) -> int:
        """Number of parameters of the model."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def flops_per_token(self) -> float:
        """FLOPs of a training step per token: 6 per parameter where everything trains; see ``growkern.training.trains.flops_per_token``."""
        return 6.0 * self.n_params if self._flops is None else self._flops

    @property
    def optims(self) -> list[Optimizer]:
        """The optimizers that are alive."""
        return [optim for reference in self._optims if (optim := reference()) is not None]

    @property
    def schedulers(self) -> list[Any]:
        """The learning-rate schedulers that are alive."""
        return [live for reference in self._schedulers if (live := reference()) is not None]

    def remove(self) -> None:
        """Detach the schedule from its optimizers, and let everything train that it has frozen. A second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        if self.schedule.attachment is self:
            self.schedule.attachment = None
            if self.schedule.who_trains is not None:
                release(self.model)

    def grow(self) -> list[tuple[Event, GrowthReport]]:
        """Fire every due event, in order, if the last optimizer has stepped since the last call.

        Returns:
            The events that fired, with their reports.

        Raises:
            GrowthError: A growth failed and changed nothing; its event has not fired.
            PlanError: A remaining event needs tokens or FLOPs, and two steps have reported none.
        """
        schedule, grown = self.schedule, list[tuple[Event, GrowthReport]]()
        if len(self.optims) < len(self._optims) or not self.stepped or self.undescribed:
            return grown
        self.stepped = False
        self.settle()
        if not self.chosen:  # the last step has raised an error in between
            self.choose()
        silent = [e.trigger for e in schedule.ahead if e.silent(schedule.counts)]
        if silent and schedule.counts.n_steps > 1:
            raise PlanError(
                f"cannot tell when to grow ({'; '.join(silent)}): {schedule.counts.n_steps} steps have reported no tokens. "
                "Call schedule.observe(tokens=...) with every step."
            )
        while (event := schedule.next_event) is not None and event.due(schedule.counts):
            if not event.trains.everything:
                refuse_reentrant_blocks(self.model)  # before the growth, which is not taken back
            if event.to is None:
                self._turn(event)
                continue
            if self.ramp.c < 1:
                break  # the event waits until the ramp has ended
            report = self._expand(event)
            self.choose()
            if not event.trains.everything:
                report = replace(report, notes=(*report.notes, self.told))
            grown.append((event, report))
            for call in (*schedule.on_growth, *self.on_growth):
                call(event, report)
        if schedule.who_trains is not None and schedule.who_trains.varies:
            self.choose()
        return grown

    def make_plan(self, event: Event) -> GrowthPlan:
        """Plan the growth of an event at the model's current sizes, without growing the model."""
        options, spec = self.options, self.spec_of(self.model)
        # a model built at a grown size may have no growth history
        before = max(len(self.schedule.history), n_growths(self.model))
        return plan(
            self.model, self.optims, to=event.to or {}, width=width_of(event, self.model, spec), depth=event.depth, state=event.state,
            dynamics=event.dynamics, spec=spec, seed=before if event.seed is None else event.seed,
            state_rules=options.get("state_rules"), master_weights=options.get("master_weights"),
        )  # fmt: skip

    def _rewarms(self) -> float:
        """Return the factor on the rates in the next step: they rise after an event with ``rewarm``."""
        schedule = self.schedule
        n = schedule.events[len(schedule.fired) - 1].rewarm if schedule.fired else 0
        since = schedule.counts.n_steps - schedule.fired[-1] if n else 0
        return min(1.0, (since + 1) / n) if n else 1.0

    def _after_step(self, optim: Optimizer, args: object, kwargs: object) -> None:
        if optim is self._optims[-1]():
            self._take(self, optim)  # torch.compile does not trace _take

    def _expand(self, event: Event) -> GrowthReport:
        schedule, options, made = self.schedule, self.options, self.make_plan(event)
        check, live = self._check(), self.schedulers
        last = self._last_call and self._last_call.call
        self._running = n_growths(self.model), self.n_params
        try:
            report = expand_inplace(
                self.model, self.optims, plan=made, width=None if event.ramp else event.width, dynamics=made.dynamics,
                spec=self.spec_of(self.model),
                state_rules=options.get("state_rules"), backend=options.get("backend"), scheduler=live or None, ema=options.get("ema"),
                master_weights=options.get("master_weights"), memory=options.get("memory"), check=last if check is True else check,
                depth=event.depth, on_progress=options.get("on_progress"),
            )  # fmt: skip
        finally:
            self.settle()
        sizes = ", ".join(
            f"{name} {n:,} -> {report.target_sizes[name]:,}"
            for name, n in report.source_sizes.items()
            if report.target_sizes[name] != n
        )
        logger.info(
            "step %d: grew %s: %s; parameters %s -> %s; %.3g s", schedule.counts.n_steps, report.family, sizes,
            f"{report.n_params_source:,}", f"{report.n_params_target:,}", report.seconds,
        )  # fmt: skip
        return self.ramp.noted(report)

    def settle(self) -> None:
        """Record the growth in progress, if it has completed.

        Runs after errors too, and again in ``grow`` and ``state_dict``: SIGINT may arrive after a growth's last write, or in this method.
        """
        running, schedule = self._running, self.schedule
        if running is None:
            return
        n_before, n_params = running
        with uninterrupted():
            self._running = None
            if n_growths(self.model) > n_before:
                growth = guard_model(self.model).growths[-1]
                self._fire()
                schedule.counts.n_flops_of_size *= self.n_params / n_params
                schedule.history.append(growth.record)
                schedule.new_blocks = list(growth.new_blocks)
                schedule.counts.curve = LossCurve(last=schedule.counts.n_tokens)
                self.ramp.begin(self)

    def _fire(self) -> None:
        """Count the next event as fired, and rewind the schedulers; who trains is chosen next."""
        schedule, event = self.schedule, self.schedule.ahead[0]
        schedule.fired.append(schedule.counts.n_steps)
        schedule.counts.points = []
        self.chosen = False
        if event.rewind is not None:
            schedule.counts.n_flops_of_size /= event.rewind
            for scheduler in self.schedulers:
                rewind(scheduler, event.rewind)

    def _turn(self, event: Event) -> None:
        """Fire an event that grows nothing."""
        with uninterrupted():
            self._fire()
        self.choose()
        logger.info("step %d: %s", self.schedule.counts.n_steps, self.told)

    @property
    def told(self) -> str:
        """Who trains, as a sentence."""
        n = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        what = (
            f"{n:,} of {self.n_params:,} parameters train from here on ({self.schedule.who_trains})"
        )
        return f"{what}; the gradient norm, and with it clipping, is theirs."

    def choose(self) -> None:
        """Let those train whom the schedule says, if others do.

        Raises:
            PlanError: The model has no such blocks.
            UnsupportedModelError: See ``growkern.commit.frozen.freeze``.
        """
        schedule, who = self.schedule, self.schedule.who_trains
        self.chosen, self._flops = False, None
        if who is None or (who.everything and frozen_of(self.model) is None):
            self.chosen = True
            return
        spec = describe(self.model, self.spec_of(self.model))
        frozen = who.frozen(spec, schedule.new_blocks, schedule.counts.n_steps)
        choose(self.model, frozen, self.options.get("master_weights"))
        self._flops = flops_per_token(self.model, spec, frozen)
        if not who.varies and (names := unheld(self)):
            logger.warning(
                "%s: %d parameters train and are in no optimizer (%s): add a param group.",
                who,
                len(names),
                names[0],
            )
        self.chosen = True

    def _check(self) -> Check | Literal[True] | None:
        own, check = self.options.get("spec") is not None, self.options.get("check")
        if check is None:
            return True if own else None
        return None if check is False else check

    def spec_of(self, model: nn.Module) -> ModelSpec | None:
        """Return the description of a custom model at its present sizes; None for a model of a known family."""
        of = spec_function(self.options.get("spec"))
        return of(model) if of else None


def _optimizers(schedule: "GrowthSchedule", optim: object, title: str) -> list[Optimizer]:
    """Return the optimizers of a schedule that is about to be attached; raise PlanError if it cannot be attached to them."""
    try:
        optims = [*optimizers(optim)]  # pyright: ignore[reportArgumentType]  (it checks the type)
    except GrowthError as error:
        raise PlanError(f"{title} {error}") from error
    if not optims:
        raise PlanError(f"{title} optim: pass the optimizer of the model, or a list of optimizers.")
    if schedule.attachment is not None:
        raise PlanError(
            f"{title} the schedule is already attached to an optimizer; call schedule.attachment.remove() first."
        )
    for one in optims:
        if (other := _attachment_of(one)) is not None:
            raise PlanError(
                f"{title} a schedule of {len(other.schedule.events)} events drives this {type(one).__name__} "
                "already. Put all events into one schedule, or call remove() of the other attachment first."
            )
    return optims


def _attachment_of(optim: Optimizer) -> Attachment | None:
    """Return the attachment whose step hook is on the optimizer, or None."""
    hooks: list[object] = [*optim._optimizer_step_post_hooks.values()]  # pyright: ignore[reportPrivateUsage]
    owners = [getattr(hook, "__self__", None) for hook in hooks]
    return next((owner for owner in owners if isinstance(owner, Attachment)), None)


def _take(self: Attachment, optim: Optimizer) -> None:
    if is_skipped(optim):
        return
    self.ramp.count(self)
    self.stepped = True
    try:
        if not self.tried:
            if self.undescribed and not self.describe_by_call():
                return
            title = "the growths of this schedule will fail:"
            raise_all(PlanError, title, problems_after_a_step(self))
            self.tried = True
        if not self.deferred:
            self.grow()
    except BaseException:
        # the error keeps GradScaler from deleting these attributes, and the next step would unscale twice
        vars(optim).pop("grad_scale", None)
        vars(optim).pop("found_inf", None)
        raise
