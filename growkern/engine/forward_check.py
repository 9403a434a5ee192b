"""Check a growth by the model's forward: once before the growth, and once on the grown model while everything can still be undone."""

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from growkern.distributed.shards import gathered, is_sharded, reshard
from growkern.engine.compile_cache import eagerly
from growkern.errors import CommitError, GrowthError, PlanError
from growkern.model.describe import overlaps
from growkern.model.tracing.forward import modules_entered, named_tensors
from growkern.model.tracing.rounding import PRECISION, RandomRounding

logger = logging.getLogger("growkern")

Check = Tensor | Mapping[str, object] | Sequence[object] | Callable[[nn.Module], object]
SMALL = 1e-3  # output below which rounding is absolute
LEAST = 1e-8  # relative; plans neglect epsilons below 1e-10
FEW = 16  # elements of an output, of which two roundings at random may both be small
# relative to the largest output, where rounding was not measured: norms of transformers round to float32 in any dtype
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class Size(NamedTuple):
    """How large a tensor is.

    Attributes:
        largest: The largest absolute value.
        mean: Root of the mean square.
    """

    largest: float
    mean: float


def _size(old: Tensor, new: Tensor | None = None) -> Size:
    """Return how large the finite elements of a tensor are, or how far they are from those of another."""
    both = old.isfinite() if new is None else old.isfinite() & new.isfinite()
    kind = torch.promote_types(old.dtype, torch.float32)
    values = (old.to(kind) if new is None else new.to(kind) - old.to(kind))[both]
    if not values.numel():
        return Size(0.0, 0.0)
    return Size(float(values.abs().max()), float(values.double().square().mean().sqrt()))


class ForwardCheck:
    """Outputs of a model before its growth, to compare with those of the grown model, in evaluation mode and on equal random numbers.

    Args:
        model: The source model, without wrappers.
        check: A batch (a tensor or a sequence of positional arguments, or a mapping of keyword arguments), or a function from the model
            to its outputs, which must not change the model.
        vote: Called before each forward begins, which gathers shards: raises a GrowthError where another process has failed.

    Raises:
        GrowthError: What ``vote`` raises.
        PlanError: ``check`` is neither, the forward failed or changed a parameter, or its outputs contain no finite floating-point number.
    """

    def __init__(self, model: nn.Module, check: Check, vote: Callable[[], object]) -> None:
        if not isinstance(check, Tensor | Mapping | Sequence) and not callable(check):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PlanError(f"check: expected a batch or a function of the model, got {type(check).__name__}.")  # fmt: skip
        self.model, self.check, self.vote = model, check, vote
        self.kind = next((p.device.type for p in model.parameters()), "cpu")
        self.dtypes = {p.dtype for p in model.parameters()}  # in which the forward computes
        if (precision := torch.get_float32_matmul_precision()) in PRECISION:
            self.dtypes.add(PRECISION[precision])
        self.noise, self.eps = dict[str, Size](), 0.0
        try:
            self.before = self._of_source()
        except GrowthError:
            raise
        except Exception as error:
            raise PlanError(
                f"check: the forward failed before the growth: {type(error).__name__}: {error}"
            ) from error
        if not any(t.isfinite().any() for t in self.before.values()):
            raise PlanError(
                "check: the outputs of the forward contain no finite floating-point number to compare; pass a function of the model that "
                "returns a tensor of them."
            )

    def measure_rounding(self) -> None:
        """Run the forward of the source with results that are rounded at random: a right growth moves its outputs about as far."""
        if any(
            map(is_sharded, self.model.parameters())
        ):  # their operations are not those of one process
            return
        for seed in range(2):
            mode = RandomRounding(seed)
            try:
                after = self._of_source(mode)
            except GrowthError:
                raise
            except Exception as error:  # the forward may not run under a mode
                logger.debug("the rounding of the forward was not measured: %s", error)
                self.noise.clear()
                return
            self.eps = max(self.eps, mode.eps)
            for name, old in self.before.items():
                new = after.get(name)
                if new is None or new.shape != old.shape:
                    continue
                if torch.equal(new.isfinite(), old.isfinite()):
                    own, known = _size(old, new), self.noise.get(name, Size(0.0, 0.0))
                    self.noise[name] = Size(*map(max, own, known))

    def compare(self, *, preserved: bool) -> tuple[str, ...]:
        """Run the forward of the grown model.

        Args:
            preserved: True when the plan preserves the function: every output then has to be the source's, up to rounding in its dtype.

        Returns:
            Notes for the report: that nothing could be compared, because every output grew.

        Raises:
            CommitError: The forward failed or changed a parameter, returned nothing to compare, an output is not finite where the
                source's was, or an output moved.
        """
        running, versions = list[str](), _versions(self.model)
        try:
            after = self._outputs(running)
        except GrowthError:
            raise
        except Exception as error:
            at = running[-1] if running else ""
            raise CommitError(
                f"check: the forward of the grown model failed in {at or type(self.model).__name__}: {type(error).__name__}: {error}. "
                "The growth was taken back; if a module keeps a size that the spec does not name, name it in attributes=."
            ) from error
        if changed := _changed(versions, self.model):
            raise CommitError(f"check: {changed} The growth was taken back.")
        if not after.keys() & self.before.keys():
            raise CommitError(
                f"check: the forward of the grown model returned none of the outputs of the source ({', '.join([*self.before][:5])}). The "
                "growth was taken back: pass a function that returns the same outputs in every call."
            )
        # the others are hidden states, which grew
        pairs = {n: (t, after[n]) for n, t in self.before.items() if n in after and after[n].shape == t.shape}  # fmt: skip
        for name, (old, new) in pairs.items():
            self._compare(name, old, new, preserved)
        if any(old.isfinite().any() for old, _ in pairs.values()):
            return ()
        return (
            "check= ran the forward of the grown model, but compared nothing: every output has another shape than the source's.",
        )

    def _compare(self, name: str, old: Tensor, new: Tensor, preserved: bool) -> None:
        if bool((old.isfinite() & ~new.isfinite()).any()):
            raise CommitError(
                f"check: {name} of the grown model is not finite. The growth was taken back."
            )
        moved, scale = _size(old, new), _size(old)
        least = SMALL if old.dim() else 1.0  # a loss: its error is that of the logits
        noise = self.noise.get(name)
        if noise is None:
            limit = max(TOLERANCE.get(dtype, 0.0) for dtype in self.dtypes | {old.dtype})
            wrong = moved.largest > limit * max(least, scale.largest)
        else:
            eps = max(torch.finfo(old.dtype).eps, LEAST, self.eps if old.numel() < FEW else 0.0)
            wrong = moved.largest > 4 * max(noise.largest, eps * max(least, scale.largest))
            wrong |= moved.mean > 3 * max(noise.mean, eps * max(least, scale.mean))
        if preserved and wrong:
            by = f" (rounding moves it by {noise.largest:.1g})" if noise else ""
            raise CommitError(
                f"check: {name} moved by {moved.largest:.3g} (its largest value is {scale.largest:.3g}), and the plan promises the "
                f"source's function{by}. The growth was taken back: the spec lacks something that forward computes, such as a norm without "
                "parameters or a cached size. If this output is a figure of hidden values, pass check= as a function that returns the "
                "others."
            )

    def _of_source(self, mode: AbstractContextManager[object] | None = None) -> dict[str, Tensor]:
        """Run the forward of the source."""
        versions = _versions(self.model)
        outputs = self._outputs([], mode)
        if changed := _changed(versions, self.model):
            raise PlanError(f"check: {changed}")
        return outputs

    def _outputs(self, running: list[str], mode: AbstractContextManager[object] | None = None) -> dict[str, Tensor]:  # fmt: skip
        """Run the forward; ``running`` fills with the names of the modules in progress, outermost first."""
        devices = {p.device.index for p in self.model.parameters() if p.device.type == "cuda"}
        entered = set[str]()

        def each() -> None:
            if not entered:
                self.vote()
            if torch.is_autocast_enabled(self.kind):
                self.dtypes.add(torch.get_autocast_dtype(self.kind))

        with _unchanged(self.model), torch.random.fork_rng([*devices]), torch.no_grad(), eagerly():
            torch.default_generator.manual_seed(0)
            for index in devices:  # torch.manual_seed would seed devices that are not saved here
                with torch.cuda.device(index):
                    torch.cuda.manual_seed(0)
            try:
                with modules_entered(self.model, running, entered, each=each, unwind=False), mode or nullcontext():  # fmt: skip
                    outputs = self._run()
            finally:
                reshard(self.model)  # a forward leaves the parameters of the root gathered
        found = ((name, t) for name, t in named_tensors(outputs) if t.is_floating_point())
        return {name or "the output": gathered(t).detach().clone() for name, t in found}

    def _run(self) -> object:
        check, model = self.check, self.model  # pyright: ignore[reportUnknownVariableType]
        if isinstance(check, Tensor):
            return model(check)
        if isinstance(check, Mapping):
            return model(**check)
        return model(*check) if isinstance(check, Sequence) else check(model)


Versions = Mapping[str, tuple[object, ...]]


def _versions(model: nn.Module) -> Versions:
    """Return the name of every parameter -> ids of parameter and gradient, the numbers of writes to them, and whether it trains."""
    return {
        name: (id(p), id(p.grad), _writes(p), _writes(p.grad), p.requires_grad)
        for name, p in model.named_parameters()
    }


def _writes(t: Tensor | None) -> int:
    return 0 if t is None or t.is_inference() else t._version


def _changed(before: Versions, model: nn.Module) -> str | None:
    """Return an error if a forward has changed the parameters of a model or their gradients."""
    after = _versions(model)
    for name in [*before, *after]:
        if before.get(name) != after.get(name):
            return (
                f"the forward changed the parameter {name} or its gradient; pass a batch, or a function that computes outputs and leaves "
                "the model as it is."
            )
    return None


@contextmanager
def _unchanged(model: nn.Module) -> Generator[None]:
    """Put a model into evaluation mode; afterwards put back the mode of each of its modules, and the buffers that forward has changed."""
    modes = {m: m.training for m in model.modules()}
    holders: list[Any] = [*modes]
    buffers = [
        (m._buffers, name, b, b.clone())
        for m in holders
        for name, b in m._buffers.items()
        if b is not None and not overlaps(b)  # no forward can write overlapping elements in place
    ]
    model.eval()
    try:
        yield
    finally:
        model.train(modes[model])
        for module, mode in modes.items():
            module.training = mode
        for held, name, buffer, before in buffers:
            held[name] = buffer.copy_(before)


class Call:
    """A call of a model, to repeat under the same autocast; the arguments lose their graph, which is large."""

    def __init__(self, model: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:  # fmt: skip
        self.args = tuple(map(_detached, args))
        self.kwargs = {name: _detached(value) for name, value in kwargs.items()}
        self.device = device = next(model.parameters()).device.type
        self.cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

    def __call__(self, model: nn.Module) -> object:
        with torch.autocast(self.device, dtype=self.cast, enabled=self.cast is not None):
            return self.plain(model)

    def plain(self, model: nn.Module) -> object:
        """Call a model without autocast."""
        return model(*self.args, **self.kwargs)

    @property
    def inputs(self) -> Check:
        """The arguments as a batch, where one kind of arguments is all, else a function that calls a model without autocast."""
        return self.plain if self.args and self.kwargs else self.args or self.kwargs


def _detached(value: object) -> object:
    return value.detach() if isinstance(value, Tensor) else value
