"""What a teacher says about the predicted positions of a batch: a model that runs, stored logits, or a function."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from growkern.errors import PlanError, UnsupportedModelError
from growkern.inherit.head import Head, is_encoder_decoder, linear_head, logits_of
from growkern.inherit.linear_loss import given_targets
from growkern.inherit.targets import Pair, Targets, refuse_length, sampled, top
from growkern.support.wrappers import unwrapped

Batch = Mapping[str, Any]
# batch, flat positions that are predicted, width of the student's logits, seed of the draws -> targets
Teacher = Callable[[Batch, Tensor, int, int], Targets]
VECTORS = "inputs_embeds", "decoder_inputs_embeds", "encoder_outputs"  # keys of a batch
OWN = "labels", "teacher_at", "shift_labels"  # keys of a batch that the model does not get


class Live:
    """A model as teacher: it runs in eval mode, without gradients, and its logits exist chunk by chunk.

    A model without a linear output head makes the logits of the whole batch.
    """

    def __init__(
        self, model: nn.Module, top_k: int | None, n_samples: int | None, tau: float, vocab: int | None, renormalize: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.top_k, self.n_samples = model.eval(), top_k, n_samples
        self.tau, self.vocab, self.renormalize = tau, vocab, renormalize
        try:
            _refuse_large(top_k, len(linear_head(unwrapped(model)).weight))
            self.head: Head | None = Head(model)
        except UnsupportedModelError:
            self.head = None

    @property
    def width(self) -> int | None:
        """Number of columns of the teacher's logits; None if it is known only after a forward."""
        return None if self.head is None else self.head.width

    @torch.no_grad()
    def __call__(self, batch: Batch, keep: Tensor, width: int, seed: int) -> Targets:
        """Run the teacher on a batch; raise PlanError for a batch of the student's vectors."""
        for key in VECTORS:
            if batch.get(key) is not None:
                raise PlanError(
                    f"{key}: these are vectors of the student, which mean nothing to the teacher; pass input_ids, or a function as teacher."
                )
        place = next(self.model.parameters(), keep).device
        inputs = {k: v.to(place) if isinstance(v, Tensor) else v for k, v in model_inputs(batch, self.model).items()}  # fmt: skip
        if self.model.training:
            self.model.eval()
        if self.head is not None:
            rows = self.head.hidden(self.model, inputs)[0]
            logits = self.head.logits
        else:
            rows = logits_of(self.model(**inputs))
            refuse_width(rows.shape[-1], width, self.vocab)
            _refuse_large(self.top_k, rows.shape[-1])
            logits = _widened
        refuse_length(rows.shape[:-1], batch["labels"].shape)
        rows = rows.reshape(-1, rows.shape[-1])[keep.to(place)]
        generator = torch.Generator(place).manual_seed(seed)

        @torch.no_grad()
        def targets(chunk: slice) -> Pair:
            index, weight = self.select(logits(rows[chunk]), width, generator)
            return None if index is None else index.to(keep.device), weight.to(keep.device)

        return targets

    def select(self, logits: Tensor, width: int, generator: torch.Generator) -> Pair:
        """Return the teacher's distribution over the student's columns; columns that only one of them has get no weight."""
        columns = min(self.vocab or width, width, logits.shape[-1])
        logits = logits[:, :columns]
        if self.top_k is not None:
            return top(logits, min(self.top_k, columns), self.tau, renormalize=self.renormalize)
        if self.n_samples is not None:
            return sampled(logits, self.n_samples, self.tau, generator)
        probs = (logits / self.tau).softmax(-1)
        return None, nn.functional.pad(probs, (0, width - columns))


class Called:
    """A function from a batch to the teacher's columns and weights, both (batch, length, K); -1 pads the columns."""

    width = None

    def __init__(self, function: Callable[[Batch], tuple[Tensor, Tensor]]) -> None:
        self.function = function

    @torch.no_grad()
    def __call__(self, batch: Batch, keep: Tensor, width: int, seed: int) -> Targets:
        """Call the function, and check what it returns."""
        given: Any = self.function(batch)
        if not _is_pair(given):
            raise PlanError(
                f"teacher: the function returned a {type(given).__name__}; return a tuple of columns and weights, both (batch, length, K)."
            )
        index: Tensor = given[0]
        probs: Tensor = given[1]
        return given_targets(index, probs, keep, width, batch["labels"].shape, "teacher")


def _is_pair(given: Any) -> bool:
    return isinstance(given, tuple) and [isinstance(t, Tensor) for t in given] == [True, True]  # pyright: ignore[reportUnknownVariableType]


def model_inputs(batch: Batch, model: nn.Module) -> dict[str, Any]:
    """Return what a model gets of a batch: no labels, so that it computes no loss, but the decoder inputs that it makes of labels.

    Raises:
        PlanError: An encoder-decoder makes no decoder inputs of labels, and the batch has none.
    """
    inputs = {key: value for key, value in batch.items() if key not in OWN}
    bare = unwrapped(model)
    prepare: Any = getattr(bare, "prepare_decoder_input_ids_from_labels", None)
    if inputs.keys() & {"decoder_input_ids", "decoder_inputs_embeds"}:
        return inputs
    if prepare is None and is_encoder_decoder(bare):
        raise PlanError(
            f"a {type(bare).__name__} makes no decoder inputs of the labels by itself; pass decoder_input_ids (batch, length) in the batch."
        )
    if prepare is not None:
        inputs["decoder_input_ids"] = prepare(labels=batch["labels"])
    return inputs


def _refuse_large(top_k: int | None, width: int) -> None:
    if top_k is not None and top_k > width:
        raise PlanError(
            f"top_k: {top_k} is more than the vocabulary of {width}; pass at most {width}, or None for all."
        )


def refuse_width(teacher: int, student: int, vocab: int | None) -> None:
    """Raise PlanError if teacher and student have different vocabularies, unless ``vocab`` says that both pad one."""
    if vocab is not None and vocab > min(teacher, student):
        raise PlanError(
            f"vocab: {vocab} tokens are more than the {teacher} columns of the teacher or the {student} of the student; pass "
            "len(tokenizer) of the tokenizer of both."
        )
    if vocab is None and teacher != student:
        raise PlanError(
            f"the teacher has a vocabulary of {teacher}, and the student of {student}. A teacher of another tokenizer cannot teach: "
            "choose one of the student's tokenizer. If both have one tokenizer and pad it differently, pass vocab=len(tokenizer)."
        )


def refuse_student(teacher: nn.Module, student: nn.Module) -> None:
    """Raise PlanError if the teacher trains with the student."""
    own = {id(p) for p in unwrapped(student).parameters()}
    if any(id(p) in own for p in teacher.parameters()):
        raise PlanError(
            "the teacher has parameters of the student, and would change with it; pass copy.deepcopy(model) as the teacher."
        )


def _widened(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
