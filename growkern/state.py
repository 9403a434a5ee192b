"""The law of optimizer state: one table, keyed by optimizer class, because a key means different things in different classes.

A state tensor of order ``k`` in the gradient is gathered like its parameter and multiplied by ``a ** k``, where ``a`` is the
factor on the gradient. Scalars (``step``) are kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Law:
    """How the state of one optimizer class grows.

    Attributes:
        orders: State key -> order in the gradient; None for a scalar that is kept.
        lr: Which factor on the learning rate keeps the source's dynamics: ``"s"``, or ``"s/a"`` for plain gradient steps.
        keeps_decay: True when the same dynamics want weight decay divided by that factor (decoupled decay, SGD).
    """

    orders: Mapping[str, int | None]
    lr: Literal["s", "s/a"]
    keeps_decay: bool = False

    def lr_factor(self, weight_scale: float | None, grad_scale: float | None) -> float | None:
        """The factor on the learning rate of a tensor; None where it is not one number."""
        if weight_scale is None or (self.lr == "s/a" and grad_scale is None):
            return None
        return weight_scale if self.lr == "s" or grad_scale is None else weight_scale / grad_scale


ADAM: dict[str, int | None] = {"step": None, "exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}

LAWS: dict[str, Law] = {
    "torch.optim.adam.Adam": Law(ADAM, lr="s"),
    "torch.optim.adamw.AdamW": Law(ADAM, lr="s", keeps_decay=True),
    "torch.optim.sgd.SGD": Law({"momentum_buffer": 1}, lr="s/a", keeps_decay=True),
}


@dataclass(frozen=True)
class OptimSpec:
    """What growkern knows of an optimizer: class and names, never values.

    Attributes:
        kind: Qualified class name.
        groups: Names of the model's parameters in each param group.
        states: Parameter name -> its state keys.
    """

    kind: str
    groups: tuple[tuple[str, ...], ...]
    states: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])

    @property
    def law(self) -> Law | None:
        """The law of this class; None when it is not known."""
        return LAWS.get(self.kind)
