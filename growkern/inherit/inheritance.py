"""Knowledge inheritance: the loss of a student that learns from a teacher, then from the data alone."""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from growkern.errors import PlanError, UnsupportedModelError
from growkern.inherit.head import Head, shifts_labels
from growkern.inherit.linear_loss import (
    IGNORED,
    Losses,
    Terms,
    check_items,
    check_numbers,
    linear_loss,
)
from growkern.inherit.stored import Stored, agreed_tau
from growkern.inherit.targets import Targets
from growkern.inherit.teachers import Called, Live, model_inputs, refuse_student, refuse_width
from growkern.optimizer.describe import optimizers
from growkern.support.argument_types import typed_arguments
from growkern.support.wrappers import unwrapped

Function = Callable[[Mapping[str, Any]], tuple[Tensor, Tensor]]
UNTIL, TAU = 55_000, 2.0  # of the paper's code


class KnowledgeInheritance:
    """The loss ``(1 - a) * CE + a * tau**2 * KL(teacher || student)``, whose ``a`` falls to 0 in the course of training.

    The logits of the whole batch never exist: the input of the student's head is caught, and logits turn into their gradient chunk by
    chunk. Once ``a`` is 0 for good, the teacher does not run and is released; the cross entropy that remains is still chunked. Under
    ``torch.no_grad`` the loss is the cross entropy alone, so that curves of the validation do not jump with ``a``.

    A teacher of another domain for each sequence, or several teachers, is a function of the batch; a chain of models is one
    ``KnowledgeInheritance`` after the other.

    Args:
        teacher: A model; a folder that ``store`` has written, or a ``Stored``; or a function from a batch to columns and weights, both
            (batch, length, K), where column -1 is padding and equal columns add up.
        top_k: Use the teacher's ``top_k`` largest probabilities only. With ``sampled`` None too: all probabilities. For models only.
        sampled: Use this many draws from the teacher, without bias. For models only.
        tau: Temperature of both distributions. Default: 2, or the temperature of the stored logits.
        until: Optimizer steps until ``a`` is 0. Default: 55,000, the paper's 44 % of its run; ``alpha="constant"`` has none.
        alpha: How ``a`` falls from ``peak``: ``"linear"`` in steps; ``"heaviside"``: at ``until``; ``"constant"``: never.
        peak: ``a`` at the first step.
        renormalize: Divide the weights of ``top_k`` by their sum, as the paper does. Right only for a teacher whose top holds nearly all
            probability; by default the tail is neither rewarded nor punished.
        vocab: Number of tokens of the tokenizer, where teacher and student pad it to different widths.
        tokenizer: The student's tokenizer, compared with that of stored logits.
        seed: Seed of the draws.

    Attributes:
        n_steps: Optimizer steps so far.
        tau: The temperature.
        ce: Cross entropy of the last batch, mean over its predicted positions, without a gradient; None before.
        kl: Divergence from the teacher on the last batch, likewise; None before, and where the teacher did not run. With ``sampled`` the
            gradient is that of the divergence in expectation, and ``kl`` and the loss are not: they contain the entropy of the draws, and
            a student that equals its teacher has a ``kl`` above 0. Watch ``ce``.

    Raises:
        PlanError: An argument is out of range, or does not suit the teacher.
        CheckpointError: The folder holds no complete stored logits.

    Example:
        >>> loss = growkern.inherit.KnowledgeInheritance(teacher, sampled=64, until=1000)
        >>> loss.attach(model, optim)
        >>> for batch in batches:
        ...     optim.zero_grad()
        ...     loss(batch).backward()
        ...     optim.step()

        Under accumulation, all micro-batches share one denominator:

        >>> n_items = loss.count(batches)
        >>> for batch in batches:
        ...     loss(batch, n_items=n_items).backward()

        In a Trainer of transformers, ``growkern.hf.inherit(trainer, loss)`` does all of this. With Accelerate:

        .. code-block:: python

            model, optim = accelerator.prepare(model, optim)
            loss.attach(model, optim)
            accelerator.register_for_checkpointing(loss)   # the step count
            with accelerator.accumulate(model):            # for every batch
                accelerator.backward(loss(batch))
                optim.step()

        With Lightning:

        .. code-block:: python

            class Module(LightningModule):
                def on_train_start(self):
                    self.loss.remove()   # of an earlier fit
                    self.loss.attach(self.model, self.optimizers())
                def training_step(self, batch):
                    return self.loss(batch)
                def on_save_checkpoint(self, checkpoint):
                    checkpoint["inherit"] = self.loss.state_dict()
                def on_load_checkpoint(self, checkpoint):
                    self.loss.load_state_dict(checkpoint["inherit"])

    Reference:
        Qin et al., "Knowledge Inheritance for Pre-trained Language Models", NAACL 2022, arXiv:2105.13880.
    """

    @typed_arguments(PlanError)
    def __init__(
        self,
        teacher: nn.Module | str | Path | Stored | Function,
        top_k: int | None = None,
        tau: float | None = None,
        until: int | None = None,
        *,
        sampled: int | None = None,
        alpha: Literal["linear", "constant", "heaviside"] = "linear",
        peak: float = 1.0,
        renormalize: bool = False,
        vocab: int | None = None,
        tokenizer: object | None = None,
        seed: int = 0,
    ) -> None:
        if alpha == "constant" and until is not None:
            raise PlanError(
                'alpha="constant" has no end; leave until= out, or pass alpha="heaviside".'
            )
        counts = dict(until=until, top_k=top_k, sampled=sampled, vocab=vocab)
        units = "steps", "weights", "weights", "tokens"
        for (name, value), unit in zip(counts.items(), units, strict=True):
            if value is not None and value < 1:
                raise PlanError(f"{name}: {value} is no number of {unit}; pass 1 or more.")
        if top_k is not None and sampled is not None:
            raise PlanError("top_k and sampled exclude each other; pass one of them.")
        if renormalize and isinstance(teacher, nn.Module) and top_k is None:
            raise PlanError(
                "renormalize divides the weights of top_k by their sum, and other weights have the sum 1; leave it out."
            )
        check_numbers(peak, TAU if tau is None else tau)
        self.alpha_form, self.peak, self.seed, self.vocab = alpha, peak, seed, vocab
        self.until = math.inf if alpha == "constant" else until or UNTIL
        self.n_steps, self._n_calls = 0, 0
        self.ce: Tensor | None = None
        self.kl: Tensor | None = None
        self._model: nn.Module | None = None
        self._head: Head | None = None
        self._handles: list[Any] = []
        self._shift: bool | None = None
        self._teacher: Live | Stored | Called | None = None
        if isinstance(teacher, nn.Module):
            self.tau = TAU if tau is None else float(tau)
            self._teacher = Live(teacher, top_k, sampled, self.tau, vocab, renormalize)
            return
        if top_k is not None or sampled is not None:
            raise PlanError(
                "top_k and sampled choose from a model's logits, and this teacher gives weights; leave them out."
            )
        if isinstance(teacher, str | Path):
            teacher = Stored(teacher, renormalize=renormalize)
        elif not isinstance(teacher, Stored) and vocab is not None:
            raise PlanError("vocab: this teacher gives its own weights; leave vocab out.")
        elif renormalize:
            raise PlanError(
                "renormalize: this teacher gives its own weights; leave renormalize out."
            )
        self._teacher = teacher if isinstance(teacher, Stored) else Called(teacher)
        self.tau = agreed_tau(teacher, tau, tokenizer) if isinstance(teacher, Stored) else float(tau or TAU)  # fmt: skip

    @property
    def alpha(self) -> float:
        """Share of the teacher at the current step."""
        left = 1.0 if self.alpha_form != "linear" else 1 - self.n_steps / self.until
        return self.peak * left if self.n_steps < self.until else 0.0

    @typed_arguments(PlanError, "optim", model=UnsupportedModelError)
    def attach(
        self,
        model: nn.Module | None,
        optim: Optimizer | list[Optimizer] | tuple[Optimizer, ...],
        *,
        shift: bool | None = None,
        n_steps: int | None = None,
    ) -> None:
        """Catch the input of the model's head in calls of the loss, and count the steps of the optimizer.

        Args:
            model: The student, wrapped or not; None for a model that calls ``from_hidden``.
            optim: The optimizer, or a list of optimizers, of which the first is counted.
            shift: True if the output of a position predicts the label of the next one; None: as the model's own loss of a few tokens
                says, or its class name where the model cannot be asked.
            n_steps: Steps so far, of a run that goes on; None: leave the count.

        Raises:
            PlanError: The teacher has another vocabulary, or is the student; the loss is already attached.
            UnsupportedModelError: The model has no linear output head. Nothing is attached.
        """
        if self._handles:
            raise PlanError("this loss is already attached; call remove() first.")
        counted = optimizers(optim)
        if not counted:
            raise PlanError("optim: pass the optimizer of the model, or a list of optimizers.")
        steps = self.n_steps if n_steps is None else _steps(n_steps)
        self._shift = shift
        if model is not None:
            self._shift = shifts_labels(model) if shift is None else shift
            if isinstance(self._teacher, Live):
                refuse_student(self._teacher.model, model)
            head = Head(model)
            try:
                self._check_width(head.width)
            except PlanError:
                head.remove()
                raise
            self._model, self._head = model, head
            self._handles.append(head)
        self.n_steps = steps
        self._handles.append(counted[0].register_step_post_hook(self._stepped))
        self._release_if_over()

    def remove(self) -> None:
        """Detach from model and optimizer."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._model, self._head = [], None, None

    def __call__(
        self,
        batch: Mapping[str, Any],
        *,
        n_items: Tensor | int | None = None,
        model: nn.Module | None = None,
    ) -> Tensor:
        """Run the student, and the teacher while ``alpha`` is above 0, and return the loss.

        Args:
            batch: Inputs of the model, and ``labels`` (batch, length), where -100 marks positions that are not predicted; for stored
                logits ``teacher_at`` too. The labels are not passed to the model.
            n_items: Predicted positions of all micro-batches of the step (``count``); None: of this batch. Without a predicted position
                the loss and its gradients are 0.
            model: Wrapper of the attached model to call; None: what was attached.

        Returns:
            The loss, a scalar.

        Raises:
            PlanError: The loss is not attached to a model, or the batch does not fit the teacher.
            UnsupportedModelError: The model changes its logits in an unknown way; see ``from_hidden``.
        """
        if self._head is None or self._model is None:
            raise PlanError("attach the loss to a model first: loss.attach(model, optim).")
        check_items(n_items)
        student = self._model if model is None else model
        labels = self._labels(batch)
        hidden, output = self._head.hidden(student, model_inputs(batch, student))
        linear, head = self._head.linear, self._head
        losses = self._losses(
            hidden, linear.weight, linear.bias, labels, batch, n_items, head.scale, head.cap, head.dtype
        )  # fmt: skip
        config: Any = getattr(unwrapped(self._model), "config", None)
        aux = getattr(output, "aux_loss", None)  # of routers; a model adds it to a loss of its own
        return losses.loss if aux is None else losses.loss + config.router_aux_loss_coef * aux

    @typed_arguments(PlanError)
    def from_hidden(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        batch: Mapping[str, Any],
        *,
        bias: Tensor | None = None,
        scale: float = 1.0,
        softcap: float | None = None,
        n_items: Tensor | int | None = None,
    ) -> Tensor:
        """Return the loss for a model of your own, from the input and the weight of its linear head.

        Args:
            hidden: Input of the head (batch, length, D).
            weight: Weight of the head (V, D).
            labels: Label of every position, shifted already (batch, length); -100 is not predicted.
            batch: What the teacher gets.
            bias: Bias of the head (V,).
            scale: Factor of the logits.
            softcap: Cap of the scaled logits.
            n_items: See ``__call__``.

        Raises:
            PlanError: The loss is not attached to an optimizer, the shapes do not fit, or the batch does not fit the teacher.
        """
        if not self._handles:
            raise PlanError("attach the loss first, so that it counts steps: loss.attach(None, optim).")  # fmt: skip
        check_numbers(0.0, self.tau, scale, softcap)
        check_items(n_items)
        return self._losses(hidden, weight, bias, labels, {**batch, "labels": labels}, n_items, scale, softcap).loss  # fmt: skip

    def count(self, batches: Iterable[Mapping[str, Any]]) -> int:
        """Return the number of predicted positions of several batches: the one denominator of an accumulated step.

        Args:
            batches: The micro-batches of the step, with ``labels``.

        Raises:
            PlanError: The loss is not attached to a model, and nobody said whether labels are shifted; or a batch has no labels.
        """
        if self._shift is None:
            raise PlanError(
                "count needs to know whether the labels are those of the next position: attach the loss to a model, or pass shift=."
            )
        return sum(int((self._labels(batch) != IGNORED).sum()) for batch in batches)

    def state_dict(self) -> dict[str, int]:
        """Return the number of steps."""
        return {"n_steps": self.n_steps}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue at the number of steps of ``state_dict``; raise PlanError if the state has no such number.

        Args:
            state: What ``state_dict`` returned.
        """
        self.n_steps = _steps(state.get("n_steps"))
        self._release_if_over()

    def _losses(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, batch: Mapping[str, Any],
        n_items: Tensor | int | None, scale: float, cap: float | None, dtype: torch.dtype | None = None,
    ) -> Losses:  # fmt: skip
        alpha = self.alpha if torch.is_grad_enabled() else 0.0
        if alpha:
            self._check_width(len(weight))  # the vocabulary may have grown since attach

        def targets_of(keep: Tensor) -> Targets:
            return self._targets(batch, keep, len(weight))

        terms = Terms(alpha, self.tau, float(scale), cap and float(cap), dtype=dtype)
        losses = linear_loss(hidden, weight, bias, labels, terms, n_items, targets_of if alpha else None)  # fmt: skip
        self.ce, self.kl = losses.ce, losses.kl if alpha else None
        return losses

    def _targets(self, batch: Mapping[str, Any], keep: Tensor, width: int) -> Targets:
        if self._teacher is None:
            raise PlanError(
                f"the teacher was released at step {self.until}; make a new KnowledgeInheritance to go back to an earlier step."
            )
        seed = (self.seed << 40) + (self.n_steps << 12) + self._n_calls
        self._n_calls += 1
        if isinstance(self._teacher, Stored):
            width = min(self.vocab or width, width)
        return self._teacher(batch, keep, width, seed % (1 << 63))

    def _labels(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the label of every position."""
        labels: Any = batch.get("labels")
        if not isinstance(labels, Tensor):
            raise PlanError("the batch has no labels; pass labels of shape (batch, length).")
        if isinstance(shifted := batch.get("shift_labels"), Tensor):  # as transformers' losses do
            return shifted
        return nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:] if self._shift else labels

    def _check_width(self, student: int) -> None:
        if self._teacher is not None and self._teacher.width is not None:
            refuse_width(self._teacher.width, student, self.vocab)

    def _stepped(self, optim: Optimizer, *_: object) -> None:
        overflow = getattr(
            optim, "found_inf", None
        )  # GradScaler calls a fused optimizer, which skips the update itself
        if isinstance(overflow, Tensor) and overflow.item():
            return
        self.n_steps, self._n_calls = self.n_steps + 1, 0
        self._release_if_over()

    def _release_if_over(self) -> None:
        """Let go of the teacher once alpha is 0 for good."""
        if self.n_steps >= self.until:
            if isinstance(self._teacher, Live) and self._teacher.head is not None:
                self._teacher.head.remove()
            self._teacher = None


def _steps(n_steps: int | None) -> int:
    if not isinstance(n_steps, int) or isinstance(n_steps, bool) or n_steps < 0:
        raise PlanError(f"n_steps: {n_steps!r} is no number of steps; pass an integer, 0 or more.")
    return n_steps
