"""The law of optimizer state: a table by optimizer class, because a state key has different meanings in different classes.

A state tensor is gathered like its parameter and multiplied by a power of ``s``, the factor on the weight, and a power of ``a``,
the factor on the gradient. Scalars (``step``) are kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import sqrt
from typing import Literal

from growkern.errors import UnsupportedOptimizerError


@dataclass(frozen=True)
class Rule:
    """Growth rule of one state tensor: gather it, and multiply it by ``s ** weight * a ** grad``.

    Attributes:
        weight: Power of ``s``.
        grad: Power of ``a``.
        is_weight: True for state that is a copy of the weight and gets the weight's noise, pads and centering too.
        missing: State of an element that copies no source element: ``"zero"``, or ``"mean"`` of the state of all copied elements.
            Ignored for weights.
        first_copy_only: True when the first copy of every source element keeps the state, and the other copies count as elements
            that copy none.
        reduced: Axis of the parameter, counted from the end, over which the state is a mean; None if the state has all axes.
        keepdim: True when the state keeps the reduced axis with size 1.
        quantized: True when the state may be stored in 8 bits (``growkern.optimizer.eight_bit``).
    """

    weight: float = 0
    grad: float = 0
    is_weight: bool = False
    missing: Literal["zero", "mean"] = "zero"
    first_copy_only: bool = False
    reduced: int | None = None
    keepdim: bool = True
    quantized: bool = False

    def shape(self, of: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the state of a parameter of shape ``of``."""
        if self.reduced is None:
            return of
        axis = len(of) + self.reduced
        return (*of[:axis], *((1,) if self.keepdim else ()), *of[axis + 1 :])


VALUE = Rule(weight=1, is_weight=True)
GRADIENT = Rule(grad=1)
SQUARE = Rule(grad=2, missing="mean")
GATHERED = Rule()


@dataclass(frozen=True)
class Law:
    """How the state of one optimizer class grows.

    Attributes:
        rules: State key -> rule; None for a scalar that is kept.
        lr: Powers of ``s`` and ``a`` in the learning-rate factor that keeps the source's dynamics; None if unknown.
        decays: Param group keys that are divided by the learning-rate factor, which keeps the decay per step (decoupled decay, SGD).
        rates: State keys that hold a learning rate and are multiplied by the learning-rate factor.
        matrix: True when the step of a matrix is orthogonalized, so that the learning-rate factor depends on its shape (Muon).
        resets: True when the state is a history that cannot be grown and is reset.
        lr_without: A param group option, and the value of ``lr`` when a group has the option off.
        slices: True when the optimizer itself applies factors per row and column (``growkern.optim.AdamW``).
        together: State keys that a fused step needs for all parameters or for none, so that new parameters start with zeros.
    """

    rules: Mapping[str, Rule | None]
    lr: tuple[float, float] | None = (1, 0)
    decays: tuple[str, ...] = ()
    rates: tuple[str, ...] = ()
    matrix: bool = False
    resets: bool = False
    lr_without: tuple[str, tuple[float, float]] | None = None
    slices: bool = False
    together: tuple[str, ...] = ()

    def lr_factor(self, weight_scale: float | None, grad_scale: float | None) -> float | None:
        """The learning-rate factor of a tensor; None if it is unknown or differs between elements."""
        if self.lr is None:
            return None
        factor = 1.0
        for scale, power in zip((weight_scale, grad_scale), self.lr, strict=True):
            if power and scale is None:
                return None
            factor *= (scale or 1.0) ** power
        return factor

    def grown(self, state: str, *, source_units: bool = False) -> Mapping[str, Rule | None]:
        """The rules under a mode of ``state=``.

        Args:
            state: ``"exact"``: the law. ``"copy"``: gather unscaled. ``"asymmetric"``: gather the first copy unscaled, start the
                other copies from 0 (SPARKLING, arXiv:2602.02472). ``"zero_pad"``: the law for the first copy, 0 for the others.
            source_units: True when the optimizer keeps the source's units (``UpdateScale``): state that is not in the units of the
                weights is then gathered unscaled.
        """

        def grown_rule(rule: Rule | None) -> Rule | None:
            if rule is None or rule.is_weight:
                return rule
            own = source_units and (rule.weight, rule.grad) != (1, 0)
            if own or state in ("copy", "asymmetric"):
                rule = replace(rule, weight=0, grad=0)
            if state in ("asymmetric", "zero_pad"):
                rule = replace(rule, first_copy_only=True, missing="zero")
            return rule

        return {key: grown_rule(rule) for key, rule in self.rules.items()}


def by_order(key: str, order: int | None) -> Rule | None:
    """The rule of a state key whose order in the gradient the user has given."""
    if order is None:
        return None
    if type(order) is not int or not 0 <= order <= 2:
        raise UnsupportedOptimizerError(
            f"state_rules: {key!r} has the order {order!r}; pass the order in the gradient, 0 (copied unscaled), 1 or 2, "
            "or None for state that is kept."
        )
    return (GATHERED, GRADIENT, SQUARE)[order]


def muon_adjustment(shape: tuple[int, ...], how: str | None) -> float:
    """The factor of ``torch.optim.Muon`` on its learning rate (``adjust_lr_fn``)."""
    rows, cols = shape[:2]
    if how == "match_rms_adamw":
        return 0.2 * sqrt(max(rows, cols))
    return sqrt(max(1, rows / cols)) if how in (None, "original") else 1.0


ADAM: dict[str, Rule | None] = {
    "step": None,
    "exp_avg": GRADIENT,
    "exp_avg_sq": SQUARE,
    "max_exp_avg_sq": SQUARE,
}
DECAY = ("weight_decay",)
MASTER, MASTER_GRAD = (
    "master",
    "master.grad",
)  # state keys under which the master weights of a parameter and their gradient grow
STEP: dict[str, Rule | None] = {"step": None}
OWN = "torch.optim"

EIGHT_BITS: dict[str, Rule | None] = {
    "step": None,
    "state1": replace(GRADIENT, quantized=True),
    "state2": replace(SQUARE, quantized=True),
} | dict.fromkeys(("qmap1", "qmap2", "absmax1", "absmax2"))
FACTORS = ("lr", "eps", "decay", "born")  # of growkern.optim.AdamW, each per row and per column
SLICES = (*(f"{name}_{side}" for name in FACTORS for side in ("rows", "cols")), "rewarm")
LAWS: dict[str, Law] = {
    "growkern.optim.AdamW": Law(
        ADAM | dict.fromkeys(SLICES), decays=DECAY, slices=True
    ),  # growkern.optimizer.lr_scaling grows the slices
    f"{OWN}.asgd.ASGD": Law(
        STEP | {"ax": VALUE, "eta": None, "mu": None},
        lr=(1, -1),
        decays=("weight_decay", "lambd"),
        rates=("eta",),
    ),
    f"{OWN}.adadelta.Adadelta": Law(
        STEP | {"square_avg": SQUARE, "acc_delta": Rule(weight=2, missing="mean")}, lr=(0, 0)
    ),
    f"{OWN}.Adafactor": Law(
        STEP
        | {
            "variance": SQUARE,
            "row_var": replace(SQUARE, reduced=-1),
            "col_var": replace(SQUARE, reduced=-2),
        },
        lr=(0, 0),
    ),
    f"{OWN}.adagrad.Adagrad": Law(STEP | {"sum": SQUARE}),
    f"{OWN}.adam.Adam": Law(ADAM),
    f"{OWN}.adamw.AdamW": Law(ADAM, decays=DECAY),
    f"{OWN}.adamax.Adamax": Law(
        STEP | {"exp_avg": GRADIENT, "exp_inf": replace(GRADIENT, missing="mean")}
    ),
    f"{OWN}.lbfgs.LBFGS": Law({}, lr=(0, 0), resets=True),
    f"{OWN}.Muon": Law({"momentum_buffer": GRADIENT}, lr=(0.5, -0.5), decays=DECAY, matrix=True),
    f"{OWN}.nadam.NAdam": Law(ADAM | {"mu_product": None}),
    f"{OWN}.radam.RAdam": Law(ADAM),
    f"{OWN}.rmsprop.RMSprop": Law(
        STEP | {"square_avg": SQUARE, "momentum_buffer": GATHERED, "grad_avg": GRADIENT}
    ),
    f"{OWN}.rprop.Rprop": Law(
        STEP | {"prev": GRADIENT, "step_size": Rule(weight=1, missing="mean")}, lr=(0, 0)
    ),
    f"{OWN}.sgd.SGD": Law(
        {"momentum_buffer": GRADIENT}, lr=(1, -1), decays=DECAY, together=("momentum_buffer",)
    ),
    f"{OWN}.sparse_adam.SparseAdam": Law(ADAM),
    "lion_pytorch.lion_pytorch.Lion": Law({"exp_avg": GRADIENT}, decays=DECAY),
    "schedulefree.adamw_schedulefree.AdamWScheduleFree": Law(
        {"z": VALUE, "exp_avg_sq": SQUARE}, decays=DECAY
    ),
    "schedulefree.radam_schedulefree.RAdamScheduleFree": Law(
        {"z": VALUE, "exp_avg_sq": SQUARE}, decays=DECAY
    ),
    "schedulefree.sgd_schedulefree.SGDScheduleFree": Law({"z": VALUE}, lr=(1, -1), decays=DECAY),
    "transformers.optimization.Adafactor": Law(
        STEP
        | {
            "exp_avg": Rule(weight=1),  # an average of updates, learning rate included
            "exp_avg_sq": SQUARE,
            "exp_avg_sq_row": replace(SQUARE, reduced=-1, keepdim=False),
            "exp_avg_sq_col": replace(SQUARE, reduced=-2, keepdim=False),
            "RMS": None,
        },
        lr=(0, 0),
        lr_without=("scale_parameter", (1, 0)),
    ),
    **{
        f"bitsandbytes.optim.{name.lower()}.{paged}{name}{bits}": Law(
            EIGHT_BITS, decays=() if name == "Adam" else DECAY
        )
        for name in ("Adam", "AdamW", "Lion")
        for paged in ("", "Paged")
        for bits in ("", "8bit", "32bit")
    },
}


VALUES = {  # state keys that are copies of weights: what the model adds to the weight, it adds to them
    key for law in LAWS.values() for key, rule in law.rules.items() if rule and rule.is_weight
}


@dataclass(frozen=True)
class OptimSpec:
    """Description of an optimizer: class and names, never values.

    Attributes:
        kind: Qualified class name.
        groups: Names of the model's parameters in each param group.
        states: Parameter name -> its state keys.
        law: Law of the state; None if unknown.
        coupled: Names of parameters whose weight decay is added to the gradient.
        adjusts: Parameter name -> ``adjust_lr_fn`` of Muon, which adjusts the learning rate to the parameter's shape.
    """

    kind: str
    groups: tuple[tuple[str, ...], ...]
    states: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    law: Law | None = None
    adjusts: Mapping[str, str | None] = field(default_factory=dict[str, str | None])
    coupled: frozenset[str] = frozenset()

    @cached_property
    def names(self) -> frozenset[str]:
        """Names of the parameters that are in a param group or have state."""
        return frozenset(name for group in self.groups for name in group) | self.states.keys()

    @property
    def rules(self) -> Mapping[str, Rule | None]:
        """Growth rules of the state; empty if the law is unknown."""
        return self.law.rules if self.law else dict[str, Rule | None]()
