"""``torch.optim.AdamW`` with factors per row and per column of a parameter, stored in the parameter's state."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import StateDict

from growkern.distributed.shards import is_sharded
from growkern.optimizer.adamw_steady import Steady
from growkern.optimizer.adamw_torch import BLOCK, Hyper, Update, length, own_part, sizes
from growkern.optimizer.adamw_torch import adamw as torch_adamw
from growkern.optimizer.state_rules import SLICES
from growkern.support.dtypes import arithmetic

KEYS = frozenset(SLICES)
KERNEL_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
PLAIN = (Parameter, Tensor)
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
WHOLE = ("foreach", "fused", "capturable", "differentiable")  # options that rule out _in_blocks
NOTHING: dict[str, Tensor] = {}
Group = dict[str, Any]  # torch types a param group like this
State = dict[str, Tensor]
Mine = tuple[Tensor, bool]  # a parameter that growkern updates, and True if the kernel does
Vector = Tensor | Sequence[float] | None


class AdamW(torch.optim.AdamW):
    """``torch.optim.AdamW`` whose parameters may carry *slices*: factors per row and per column.

    Constructor, param groups and state keys are torch's, and checkpoints load both ways. A parameter is seen as a matrix: its last
    axis is the columns (C), all other axes, flattened, are the rows (R); a 1-d parameter is one row. ``state[p]`` may hold the
    keys below, in float32 (float64 for float64 parameters) and on the parameter's device; a missing key is neutral. ``set_slices``
    checks its arguments. Other modules may write the keys into the state themselves: every step checks the tensors' lengths.

    - ``lr_rows`` (R,), ``lr_cols`` (C,): factors on the learning rate of Adam's update, not on the decay;
    - ``eps_rows``, ``eps_cols``: factors on eps;
    - ``decay_rows``, ``decay_cols``: factors on the decoupled decay ``lr * weight_decay``;
    - ``born_rows``, ``born_cols``: the value of ``step`` when a row or column was created. The bias correction of an element uses
      its own step count ``t = step - max(born_rows[i], born_cols[j])``, which is 1 at its first update;
    - ``rewarm`` (2,): rho, tau. ``1 + (rho - 1) * min(t / tau, 1)`` is one more factor on lr of elements created after step 0.

    With ``lr_ij = lr_rows[i] * lr_cols[j]``, and ``eps_ij`` and ``decay_ij`` defined alike, a step computes::

        p -= lr * weight_decay * decay_ij * p
        p -= lr * lr_ij * warm(t) / (1 - beta1**t) * exp_avg / (sqrt(exp_avg_sq / (1 - beta2**t)) + eps * eps_ij)

    Of a sharded parameter (``DTensor``), slices are vectors of the whole parameter, the same in every process.

    On a CPU, torch updates parameters without slices, large ones block by block (the same bits, in less time). On a GPU, one
    Triton launch per combination of dtypes updates all dense real parameters, except those of groups that are capturable,
    differentiable or have a tensor as lr or beta.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, differentiable, fused: See ``torch.optim.AdamW``.

    Raises:
        ValueError: An option is out of range, as in ``torch.optim.AdamW``; see also ``set_slices``.

    Example:
        >>> optim = growkern.optim.AdamW(model.parameters(), lr=1e-3)
        >>> optim.set_slices(model.lm_head.weight, lr_cols=[0.5] * model.lm_head.in_features)
        >>> sorted(optim.state[model.lm_head.weight])
        ['exp_avg', 'exp_avg_sq', 'lr_cols', 'step']

    Reference:
        Loshchilov, Hutter, "Decoupled weight decay regularization", ICLR 2019, arXiv:1711.05101. Re-warm-up: "SPARKLING",
        arXiv:2602.02472.
    """

    __module__ = "growkern.optim"  # the public path of the class, and its key in the state rules

    _ours: dict[int, tuple[list[Mine], list[Tensor]]]
    _repeats: bool

    def set_slices(self, p: Tensor, **vectors: Vector) -> None:
        """Set slices of a parameter; slices that are not named stay. All arguments are checked before anything changes.

        Args:
            p: A dense real parameter of this optimizer. A parameter without state gets torch's initial state, so that its
                checkpoint also loads into ``torch.optim.AdamW``.
            vectors: Key -> numbers: R for ``*_rows``, C for ``*_cols``, 2 for ``rewarm``; None removes the key. ``born_*`` must lie
                between 0 and the parameter's current step; all others must be above 0.

        Raises:
            ValueError: A key is unknown, a length is wrong, a number is not finite or out of range, or the parameter is not in
                this optimizer, not dense or not real.
        """
        group = next((g for g in self.param_groups if any(p is q for q in g["params"])), None)
        if group is None:
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} is not in this optimizer; add it to a param group."
            )
        plain = type(p) in PLAIN or is_sharded(p)
        if p.is_complex() or p.layout != torch.strided or not plain:
            raise ValueError(
                f"slices are for dense real parameters, not {p.layout} {p.dtype} of class {type(p).__name__}."
            )
        state = self.state.get(p, {})
        step = float(state["step"]) if "step" in state else 0.0
        ready = {key: _checked(key, v, p, step) for key, v in vectors.items()}
        state = self.state[p]
        if "exp_avg" not in state and any(v is not None for v in ready.values()):
            begin(group, p, state)
        for key, vector in ready.items():
            if vector is None:
                state.pop(key, None)
            else:
                state[key] = vector

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a checkpoint of torch's AdamW or one with slices. Slices keep their dtype, whatever the parameter's dtype is."""
        final: list[StateDict] = []

        def restore(_: torch.optim.Optimizer) -> None:
            (loaded,) = final
            ids = chain.from_iterable(group["params"] for group in loaded["param_groups"])
            own = chain.from_iterable(group["params"] for group in self.param_groups)
            for i, p in zip(ids, own, strict=True):
                saved: State = loaded["state"].get(i, {})
                for key in KEYS.intersection(saved):
                    self.state[p][key] = saved[key].to(p.device, arithmetic(p.dtype), copy=True)

        # the last pre-hook sees the final state dict; the first post-hook restores the slices before the user's post-hooks run
        before = self.register_load_state_dict_pre_hook(lambda _, loaded: final.append(loaded))
        after = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _init_group(  # pyright: ignore[reportIncompatibleMethodOverride]  # torch calls it by position
        self, group: Group, *lists: list[Tensor]
    ) -> bool:
        """Pass torch's ``step`` the parameters that torch updates; update all others when the last group is initialized.

        torch's ``step`` runs unchanged, with closure and hooks, and calls ``_init_group`` for every group in turn.
        """
        if group is self.param_groups[0]:
            self._repeats = self._can_repeat()
            if not self._repeats:
                self.__dict__.pop(
                    "_steady", None
                )  # a step that raises leaves a table of other tensors
                self._ours = {id(g): self._split(g) for g in self.param_groups}
        if self._repeats:
            if group is self.param_groups[-1]:
                self._repeat()
            return False
        ours, rest = self._ours.get(id(group), ([], []))
        has_complex = super()._init_group({**group, "params": rest} if ours else group, *lists)
        if not torch.compiler.is_compiling() and not any(group[o] for o in WHOLE):
            _in_blocks(lists)
        if group is self.param_groups[-1]:
            split, self._ours = self._ours, {}
            with torch.no_grad():  # torch may have enabled grad for a differentiable group
                updates = [update for g in self.param_groups for update in self._updates(g, split)]
                self._launch(updates)
            self.__dict__["_steady"] = Steady.of(self, updates)
        return bool(has_complex)

    def _can_repeat(self) -> bool:
        """True when the kernel can update the tensors of the step before once more, as they are where they were."""
        steady: Steady | None = self.__dict__.get("_steady")
        if steady is None or torch.compiler.is_compiling():
            return False
        scaled = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        return scaled == (None, None) and steady.holds(self)

    def _repeat(self) -> None:
        from growkern.kernels.adamw import adamw_again

        steady: Steady = self.__dict__["_steady"]
        hypers = [_hyper(group) for group in self.param_groups if group["params"]]
        counts = steady.count()
        with torch.no_grad():
            adamw_again(self.__dict__["_tables"][steady.device], steady.grads, counts, hypers)

    def _split(self, group: Group) -> tuple[list[Mine], list[Tensor]]:
        """Split a group into parameters that growkern updates and parameters that torch updates; an error changes nothing."""
        compiling = torch.compiler.is_compiling()
        launches = not (
            compiling or group["capturable"] or group["differentiable"]
            or isinstance(group["lr"], Tensor) or isinstance(group["betas"][0], Tensor)
        )  # fmt: skip
        ours: list[Mine] = []
        rest: list[Tensor] = []
        for p in group["params"]:
            if p.grad is None:
                continue
            state: State = self.state.get(p, NOTHING)
            sliced = not KEYS.isdisjoint(state)
            if sliced:
                _check_sliced(p, state, group, compiling)
            fits = (sliced or launches) and _fits(p, state, sliced)
            if sliced or fits:
                ours.append((p, fits))
            else:
                rest.append(p)
        return ours, rest

    def _updates(
        self, group: Group, split: Mapping[int, tuple[list[Mine], list[Tensor]]]
    ) -> Iterator[tuple[Update, bool]]:
        hyper = _hyper(group)
        for p, fits in split[id(group)][0]:
            state: State = self.state[p]
            if "exp_avg" not in state:
                begin(group, p, state)
            assert p.grad is not None, "it was asked for"
            top = state["max_exp_avg_sq"] if group["amsgrad"] else None
            moments = state["exp_avg"], state["exp_avg_sq"]
            slices = {} if KEYS.isdisjoint(state) else state
            update = Update(p, p.grad, *moments, top, state["step"], hyper, slices)
            yield own_part(update) if is_sharded(p) else update, fits

    def _launch(self, updates: Sequence[tuple[Update, bool]]) -> None:
        """Count and run one step of all updates. Gradients are unscaled and steps skipped as in torch's fused AdamW."""
        scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        steps: dict[torch.device, list[Tensor]] = {}
        launches: dict[torch.device | None, list[Update]] = {}
        for u, fits in updates:
            steps.setdefault(u.step.device, []).append(u.step)
            launches.setdefault(u.p.device if fits else None, []).append(u)
        for device, same in steps.items():
            increment = torch.ones((), device=device)
            increment = increment if found_inf is None else increment - found_inf.to(device)
            torch._foreach_add_(same, increment)  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]
        for device, same in launches.items():
            if device is None:
                torch_adamw(same, scale, found_inf)
                continue
            from growkern.kernels.adamw import adamw
            from growkern.kernels.adamw_table import Table

            tables: dict[torch.device, Table] = self.__dict__.setdefault("_tables", {})
            adamw(same, tables.setdefault(device, Table()), scale, found_inf)


def _hyper(group: Group) -> Hyper:
    beta1, beta2 = map(float, group["betas"])
    lr, eps, decay = (float(group[key]) for key in ("lr", "eps", "weight_decay"))
    return Hyper(lr, beta1, beta2, eps, decay, bool(group["maximize"]))


def begin(group: Group, p: Tensor, state: State) -> None:
    """Write torch's initial state of a parameter into ``state``."""
    on_device = group["capturable"] or group["fused"]
    wide = torch.get_default_dtype() == torch.float64 and not group["fused"]
    state["step"] = torch.zeros(
        (), dtype=torch.float64 if wide else torch.float32, device=p.device if on_device else "cpu"
    )
    for key in MOMENTS if group["amsgrad"] else MOMENTS[:2]:
        state[key] = torch.zeros_like(p, memory_format=torch.preserve_format)


def _in_blocks(lists: Sequence[list[Tensor]]) -> None:
    """Split large CPU tensors into blocks whose temporaries stay in cache; torch's step is elementwise, so the bits are the same."""
    filled = [entries for entries in lists if entries]  # the last list holds the step counts
    whole = [*zip(*filled, strict=True)]
    for entries in filled:
        entries.clear()
    for *tensors, step in whole:
        n, p = tensors[0].numel(), tensors[0]
        cut = n > BLOCK and p.device.type == "cpu" and all(type(t) in PLAIN for t in tensors)
        cut = cut and all(t.is_contiguous() and t.numel() == n for t in tensors)
        parts = [t.detach().view(-1).split(BLOCK) if cut else (t,) for t in tensors]
        # clones for all blocks but the first: torch increments the real step count once
        counted = (step, *(step.clone() for _ in parts[0][1:]))
        for entries, own in zip(filled, (*parts, counted), strict=True):
            entries.extend(own)


def _checked(key: str, vector: Vector, p: Tensor, step: float) -> Tensor | None:
    """Return the vector of a slice key as a new tensor, or raise ValueError."""
    if key not in KEYS:
        raise ValueError(f"{key!r} is no slice; the slices are {', '.join(SLICES)}.")
    if vector is None:
        return None
    values = torch.as_tensor(vector).detach()
    if values.is_complex():
        raise ValueError(f"{key} is {values.dtype}; pass real numbers.")
    values = values.to(p.device, arithmetic(p.dtype), copy=True)
    n, shape = length(key, p.shape), tuple(p.shape)
    if values.shape != (n,):
        raise ValueError(
            f"{key} has shape {tuple(values.shape)}; a parameter of shape {shape} needs ({n},)."
        )
    if not values.isfinite().all():
        raise ValueError(f"{key} of {shape} has numbers that are not finite; pass finite ones.")
    least = values.min().item() if n else 1.0
    if key.startswith("born"):
        if least < 0 or (n and values.max().item() > step):
            raise ValueError(
                f"{key} of {shape} must be between 0 and the step of the parameter, {step:g}."
            )
    elif least <= 0:
        raise ValueError(f"{key} of {shape} has {least:g}; pass numbers above 0.")
    return values.contiguous()


def _check_sliced(p: Tensor, state: Mapping[str, Tensor], group: Group, compiling: bool) -> None:
    """Raise RuntimeError for a parameter that cannot be updated with its slices, which another module may have written."""

    def name() -> str:
        return f"a parameter of shape {tuple(p.shape)} with slices"

    g = p.grad
    if p.layout != torch.strided or (g is not None and g.layout != torch.strided):
        raise RuntimeError(
            f"AdamW does not support sparse gradients: {name()} has one; use SparseAdam for it."
        )
    if p.is_complex():
        raise RuntimeError(
            f"{name()} is {p.dtype}; slices are for real parameters: set_slices(p, key=None) removes a slice."
        )
    if type(p) not in PLAIN and not is_sharded(p):
        raise RuntimeError(
            f"{name()} is of class {type(p).__name__}; slices are for plain parameters: set_slices(p, key=None) removes a slice."
        )
    for option in ("capturable", "differentiable"):
        if group[option]:
            raise RuntimeError(
                f"{name()} is in a {option} group; set_slices(p, key=None) removes a slice."
            )
    if compiling:
        raise RuntimeError(f"step() cannot be compiled: {name()} is updated; call step() eagerly.")
    for key in MOMENTS:
        if key in state and state[key].shape != p.shape:
            shape = tuple(state[key].shape)
            raise RuntimeError(f"{key} of {name()} is {shape}; grow it with its parameter.")
    n_rows, n_cols = sizes(p.shape)
    dtype, device = arithmetic(p.dtype), p.device
    for key in SLICES:
        if key not in state:
            continue
        v, n = state[key], n_rows if key.endswith("rows") else n_cols if key != "rewarm" else 2
        if v.shape != (n,) or v.dtype != dtype or v.device != device or not v.is_contiguous():
            raise RuntimeError(
                f"{key} of {name()} is {tuple(v.shape)}, {v.dtype}, on {v.device}; set_slices makes the contiguous ({n},), "
                f"{dtype}, on {device} that step() needs."
            )


def _fits(p: Tensor, state: Mapping[str, Tensor], sliced: bool) -> bool:
    """True when the kernel can update the parameter: on a GPU, dense, all tensors of one memory layout, no tensor subclass."""
    g, dtype = p.grad, p.dtype
    if not p.is_cuda or type(p) not in PLAIN or type(g) is not Tensor or g.layout != torch.strided:
        return False
    allowed = (dtype,) if dtype == torch.float64 else (dtype, torch.float32)
    moments = [state[key] for key in MOMENTS if key in state]
    if "step" in state and state["step"].is_cuda and state["step"].dtype != torch.float32:
        return False  # the kernel reads a step on the device as float32
    if dtype not in KERNEL_DTYPES or g.dtype not in allowed:
        return False
    for t in moments:
        if (
            t.shape != p.shape
            or not t.is_cuda
            or t.dtype not in allowed
            or t.dtype != moments[0].dtype
        ):
            return False
    if p.is_contiguous() and g.is_contiguous():
        return all(t.is_contiguous() for t in moments)
    strides = p.stride()
    return not sliced and _is_dense(p) and all(t.stride() == strides for t in (g, *moments))


def _is_dense(t: Tensor) -> bool:
    """True when the elements of a tensor fill its memory without gaps, in any order of axes."""
    expected = 1
    for stride, n in sorted(zip(t.stride(), t.shape, strict=True)):
        if n > 1 and stride != expected:
            return False
        expected *= n
    return True
