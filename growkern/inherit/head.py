"""The output head of a model: its input is caught, so that the model makes no logits."""

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from growkern.distributed.shards import is_sharded
from growkern.errors import UnsupportedModelError
from growkern.inherit.linear_loss import IGNORED
from growkern.support.text import one_line
from growkern.support.wrappers import unwrapped

logger = logging.getLogger("growkern")
CAUSAL, UNSHIFTED = ("ForCausalLM", "LMHeadModel"), ("ForMaskedLM", "ForConditionalGeneration")
WAY_OUT = "call loss.from_hidden(hidden, weight, labels, batch) with the input and the weight of your own head"


class Head:
    """The linear output head of a model, with the scale and the softcap that the model applies to its logits.

    Attributes:
        linear: The head.
        scale: Factor of the logits.
        cap: Softcap of the scaled logits.
    """

    def __init__(self, model: nn.Module) -> None:
        """Find the head and hook it.

        Raises:
            UnsupportedModelError: The model names no head, or the head is no plain linear map.
        """
        bare = unwrapped(model)
        self.name = type(bare).__name__
        self.linear = linear_head(bare)
        self.scale, self.cap = _scale_and_cap(bare)
        self._n_rows: int | None = (
            None  # positions that the head sees; None: all, and nothing is caught
        )
        self._caught: Tensor | None = None
        self._is_known = False  # True once the model's own logits have been compared
        self._dtype = self.linear.weight.dtype
        self._handle = self.linear.register_forward_pre_hook(self._catch)

    @property
    def width(self) -> int:
        """Number of columns of the logits."""
        return self.linear.weight.shape[0]

    def remove(self) -> None:
        """Remove the hook."""
        self._handle.remove()

    def hidden(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """Run the model, whose head sees no position; return the head's input (..., D) and the model's output.

        The first time, the head sees one position, whose logits are compared with those of ``linear``, ``scale`` and ``cap``.

        Raises:
            UnsupportedModelError: The forward does not call the head once, or changes the logits in an unknown way.
        """
        self._n_rows, self._caught = int(not self._is_known), None
        try:
            output = model(**inputs)
        finally:
            self._n_rows, caught, self._caught = None, self._caught, None
        if caught is None:
            raise UnsupportedModelError(
                f"the forward of this {self.name} did not call the output head that it had when the loss was attached. If the head was "
                "replaced, as resize_token_embeddings does, call loss.remove() and loss.attach(model, optim). If the model was compiled "
                f"before attach, call torch.compiler.reset(); else {WAY_OUT}."
            )
        if not self._is_known:
            self._compare(caught, output)
            self._is_known = True
        return caught, output

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the head's logits in the last forward: Accelerate casts inside the forward only."""
        return self._dtype

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the scaled and capped logits of rows (n, D), at least in float32."""
        given: Any = self.linear.bias  # None without a bias, whatever the annotation says
        weight, bias = (
            self.linear.weight.to(self._dtype),
            None if given is None else given.to(self._dtype),
        )
        with torch.autocast(hidden.device.type, enabled=False):
            z = nn.functional.linear(hidden.to(self._dtype), weight, bias)
            z = z.to(torch.promote_types(z.dtype, torch.float32)) * self.scale
        return z if self.cap is None else self.cap * torch.tanh(z / self.cap)

    def _catch(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self._n_rows is None:
            return None
        if self._caught is not None:
            raise UnsupportedModelError(
                f"the forward of this {self.name} calls its output head more than once; {WAY_OUT}."
            )
        self._caught, kind = args[0], args[0].device.type
        casts = torch.is_autocast_enabled(kind)
        self._dtype = torch.get_autocast_dtype(kind) if casts else self.linear.weight.dtype
        return (args[0][..., : self._n_rows, :], *args[1:])

    @torch.no_grad()
    def _compare(self, hidden: Tensor, output: Any) -> None:
        given = logits_of(output)
        ours = self.logits(hidden[..., :1, :])
        if not bool(ours.isfinite().all()):
            raise UnsupportedModelError(
                f"the logits of this {self.name} are not finite; check its weights and the inputs: NaN and infinity teach nothing."
            )
        dtypes = given.dtype, hidden.dtype, self._dtype
        coarse = max(torch.finfo(dtype).eps for dtype in dtypes)
        error = float((given - ours).abs().max()) if given.shape == ours.shape else float("inf")
        tolerance = max(4 * coarse, 3e-4)  # a few roundings; 3e-4: the order of a sum in float32
        if not error <= tolerance * float(ours.abs().max()):
            raise UnsupportedModelError(
                f"this {self.name} changes the logits of its head in a way that growkern does not know: they are not the head's output "
                f"times {self.scale:g}{'' if self.cap is None else f', capped at {self.cap:g}'}; {WAY_OUT}, and pass scale= and softcap=."
            )


def linear_head(bare: nn.Module) -> nn.Linear:
    """Return the output head of a model without wrappers.

    Raises:
        UnsupportedModelError: The model names no head, or the head is no plain linear map.
    """
    name = type(bare).__name__
    find: Any = getattr(bare, "get_output_embeddings", None)
    head = find() if find is not None else None
    if head is None:
        raise UnsupportedModelError(
            f"this {name} names no output head: get_output_embeddings() is missing or returns None. Define the method, or {WAY_OUT}."
        )
    if any(map(is_sharded, bare.parameters())):
        raise UnsupportedModelError(
            f"this {name} is sharded, and the fused loss reads the whole weight of the head; distill by a loss of your own."
        )
    plain = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
    plain = plain and "forward" not in vars(head)  # accelerate.dispatch_model patches it
    plain = plain and head.weight.dim() == 2  # a shard of FSDP or ZeRO is flat
    if not plain or type(head.weight.data) is not Tensor or not head.weight.is_floating_point():
        raise UnsupportedModelError(
            f"the output head of this {name} is a {type(head).__name__}, and not a linear map with an ordinary weight. Merge its "
            f"adapters and dequantize it, or {WAY_OUT}."
        )
    return head


def shifts_labels(model: nn.Module) -> bool:
    """Return True if a position's output predicts the label of the next position: as the model's own loss says, else its class name.

    Raises:
        UnsupportedModelError: The model's loss is neither of the two, or there is none and the class name does not say.
    """
    bare = unwrapped(model)
    get: Any = getattr(bare, "get_base_model", None)
    base = bare if get is None else get()
    name = type(base).__name__
    said, failure = _loss_shifts(bare)
    if said is not None:
        return said
    if name.endswith((*CAUSAL, *UNSHIFTED)):
        decodes = name.endswith("ForConditionalGeneration") and not is_encoder_decoder(base)
        shifts = name.endswith(CAUSAL) or decodes
        if failure:
            logger.warning(
                "the loss of this %s could not be asked whether it shifts the labels (%s); by its class name, shift=%s. Pass shift= to "
                "attach to decide it.", name, failure, shifts,
            )  # fmt: skip
        return shifts
    raise UnsupportedModelError(
        f"cannot see whether the labels of a {name} are those of the next position: its name ends in none of "
        f"{', '.join((*CAUSAL, *UNSHIFTED))}. Pass shift=True or shift=False to attach."
    )


def is_encoder_decoder(bare: nn.Module) -> bool:
    """Return True if the config of a model, or of its language model, says that a decoder attends to an encoder."""
    config: Any = getattr(bare, "config", None)
    get: Any = getattr(config, "get_text_config", None)
    configs = [config, config if get is None else get()]
    return any(getattr(c, "is_encoder_decoder", False) is True for c in configs)


def _loss_shifts(bare: nn.Module) -> tuple[bool | None, str]:
    """Ask a model for its loss of a few tokens, of which one has a label; return None if it has no such loss, and what it raised.

    A label of the first position is predicted by the first output, or by none. The call leaves gradients and random states alone.

    Raises:
        UnsupportedModelError: The loss is not the cross entropy of either output.
    """
    sparse = any(getattr(m, "attention_type", "") == "block_sparse" for m in bare.modules())
    if sparse or not callable(getattr(bare, "get_output_embeddings", None)):
        return (
            None,
            "",
        )  # BigBird gives its sparse attention up for good when it sees a short sequence
    for at in range(2):
        try:
            given = _one_label(bare, at)
        except Exception as error:  # this model needs other inputs, or has no loss
            return None, one_line(error)
        if given is None or math.isnan(given[1]):
            return None, ""
        own, ours, tolerance = given
        if at == 0 and (math.isnan(own) or own == 0):
            continue
        if abs(own - ours) <= tolerance * max(1.0, abs(ours)):
            return at == 1, ""
        break
    raise UnsupportedModelError(
        f"cannot see whether the labels of this {type(bare).__name__} are those of the next position: its own loss is the cross entropy "
        "of its logits neither with the label of a position nor with the next one. Pass shift=True or shift=False."
    )


@torch.no_grad()
def _one_label(bare: Any, at: int) -> tuple[float, float, float] | None:
    """Return a model's loss with a label at position ``at`` alone, the cross entropy of the first output with it, and a tolerance."""
    weight = linear_head(bare).weight
    # a token outside would break a CUDA device, and raise no error here
    n = min(len(weight), len(bare.get_input_embeddings().weight))
    ids = (torch.arange(4, device=weight.device)[None] + n // 2) % n
    labels = torch.full_like(ids, IGNORED)
    labels[0, at] = n // 3
    devices = [weight.device] if weight.is_cuda else []
    with torch.random.fork_rng(devices):
        # forward: hooks are for the calls of the training
        output: Any = bare.forward(input_ids=ids, labels=labels)
    loss, logits = getattr(output, "loss", None), logits_of(output)
    if not isinstance(loss, Tensor):
        return None
    aux: Any = getattr(output, "aux_loss", None)
    config: Any = getattr(bare, "config", None)
    own = float(loss) - (0.0 if aux is None else float(config.router_aux_loss_coef * aux))
    ours = nn.functional.cross_entropy(logits[0, :1].float(), labels[0, at : at + 1])
    return own, float(ours), max(1e-4, 2 * torch.finfo(logits.dtype).eps)


def logits_of(output: Any) -> Tensor:
    """Return the logits in a model's output."""
    if isinstance(output, Tensor):
        return output
    return output.logits if hasattr(output, "logits") else output[0]


def _scale_and_cap(bare: nn.Module) -> tuple[float, float | None]:
    config: Any = getattr(bare, "config", None)
    get: Any = getattr(config, "get_text_config", None)
    config = config if get is None else get()
    scale = 1.0
    for name, power in (("logit_scale", 1), ("lm_head_multiplier", 1), ("logits_scaling", -1)):
        value = getattr(config, name, None)
        scale *= float(value) ** power if isinstance(value, int | float) and value else 1.0
    cap = getattr(config, "final_logit_softcapping", None)
    return scale, float(cap) if cap else None
