"""Numbers and flags that no method can use are refused by name, for every argument of every method."""

from dataclasses import fields
from math import inf, nan

import pytest
import torch
from models import grow, make
from torch import nn

import growkern
from growkern import depth, shrink, vocab, width
from growkern.errors import PlanError

NO_NUMBERS = [
    nan,
    inf,
    -inf,
    "1",
    "a",
    True,
    None,
    [1],
    10**5000,
    -(10**5000),
    1e300,
    torch.ones(2),
]
NO_COUNTS = [-1, nan, 1.5, "1", True, [0], 10**5000]
NO_SEEDS = [nan, 0.5, "1", True, None, 10**30, -(10**30)]
NO_FLAGS = [1, "yes", None, nan]

WIDER, DEEPER, TOKENS = {"hidden": 48}, {"layers": 4}, {"vocab": 80}
TABLE = {  # method, argument -> values that are refused, target
    (width.Lossless, "noise"): ([v for v in NO_NUMBERS if v is not None] + [-1e-9, 1001], WIDER),
    (width.Net2Wider, "noise"): ([*NO_NUMBERS, -1, 1001], WIDER),
    (width.Net2Wider, "seed"): (NO_SEEDS, WIDER),
    (width.FPI, "seed"): (NO_SEEDS, WIDER),
    (width.AKI, "seed"): (NO_SEEDS, WIDER),
    (width.AKIPro, "seed"): (NO_SEEDS, {"ffn": 80}),
    (width.CopyAndPad, "std"): ([*NO_NUMBERS, 0, -1], WIDER),
    (width.HyperClone, "noise_db"): ([v for v in NO_NUMBERS if v is not None] + [-61], WIDER),
    (width.HyperClone, "general"): (NO_FLAGS, WIDER),
    (width.Lemon, "alpha"): ([*NO_NUMBERS, 0, 1, -0.5, 1e-320, 1 - 1e-16], WIDER),
    (depth.Stack, "ignore_first"): ([*NO_COUNTS, None], DEEPER),
    (depth.Stack, "ignore_last"): ([*NO_COUNTS, None], DEEPER),
    (depth.Interpose, "ignore_first"): ([*NO_COUNTS, None], DEEPER),
    (depth.Interpose, "ignore_last"): ([*NO_COUNTS, None], DEEPER),
    (depth.Interpose, "halve_branches"): (NO_FLAGS, DEEPER),
    (depth.TopCopies, "n"): ([*NO_COUNTS, 0, 3], DEEPER),
    (depth.Fresh, "init"): ([1, "draw", True, nan, [print], nn.Linear(2, 2).weight], DEEPER),
    (depth.Fresh, "block"): ([1, "Block", True, nan, [print]], DEEPER),
    (depth.Middle, "size"): ([*NO_COUNTS, 0, 3, -2], DEEPER),
    (depth.Layers, "order"): ([3, None, "0011", (0, 0.0, 1, 1), (0, True, 1, 1), (0, 1, "1", 1), (0, nan, 1, 1)], DEEPER),
    (vocab.MeanCov, "scale"): ([*NO_NUMBERS, -1], TOKENS),
    (vocab.MeanCov, "seed"): (NO_SEEDS, TOKENS),
    (shrink.WeightSelection, "layers"): ([1, "0", (True,), (0.0,), (nan,), (5,), (-1,)], {"layers": 1}),
    (shrink.FirstCopies, "layers"): ([1, "0", (True,), (0.0,), (nan,), (5,), (-1,)], {"layers": 1}),
}  # fmt: skip


def planned(model, method, to):
    if hasattr(method, "narrow"):
        return growkern.plan(model, to=to, shrink=method)
    return growkern.plan(
        model, to=to, **{"depth" if hasattr(method, "deepen") else "width": method}
    )


def said(value):
    return type(value).__name__ if isinstance(value, int | torch.Tensor) else repr(value)


def refused_wrongly(name, values, call):
    """Return the values that a call accepts, or refuses by another error than a PlanError that names the argument."""
    wrong = []
    for value in values:
        try:
            call(value)
            wrong.append(f"{said(value)}: accepted")
        except Exception as error:
            if not isinstance(error, PlanError) or name not in str(error):
                wrong.append(f"{said(value)}: {error!r}")
    return wrong


@pytest.mark.parametrize(("method", "name"), TABLE, ids=lambda v: getattr(v, "__name__", v))
def test_what_is_no_value_of_an_argument_is_refused_by_name(method, name):
    (values, to), model = TABLE[method, name], make("llama", tied=False)

    assert refused_wrongly(name, values, lambda v: planned(model, method(**{name: v}), to)) == []


def test_every_number_and_flag_of_every_method_is_in_the_table():
    methods = [
        getattr(module, name) for module in (width, depth, shrink) for name in module.__all__
    ]
    words = {"maps", "norm", "norms", "expansion", "fan_out", "fan_in", "remainder", "at"}
    arguments = {
        (method, field.name)
        for method in (*methods, vocab.Zero, vocab.MeanCov)
        for field in fields(method)
        if field.name not in words
    }
    inherited = {(width.AKI, "noise"), (width.AKIPro, "noise")}
    assert arguments - inherited == TABLE.keys()


# values at the bounds, and numbers of other types
ACCEPTED = [
    (width.Lossless(noise=0), WIDER), (width.Lossless(noise=1000), WIDER), (width.HyperClone(noise_db=-60), WIDER),
    (width.HyperClone(noise_db=600), WIDER), (width.Lemon(alpha=1e-6), WIDER), (width.Lemon(alpha=1 - 1e-6), WIDER),
    (width.CopyAndPad(std=1e-3), WIDER), (width.FPI(seed=-1), WIDER), (depth.Layers([0, 0, 1, 1]), DEEPER),
    (vocab.MeanCov(scale=0), TOKENS), (vocab.MeanCov(scale=1, seed=2**64 - 1), TOKENS), (shrink.FirstCopies(layers=[1]), {"layers": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "to"), ACCEPTED, ids=lambda v: str(v)[:40])
def test_values_at_the_bounds_are_accepted(method, to):
    plan = planned(make("llama", tied=False), method, to)

    assert all(v == v and abs(v) < inf for axis in plan.axes.values() for v, _ in axis.weight_scale.repeats)  # fmt: skip


def test_numbers_of_numpy_are_numbers():
    numpy = pytest.importorskip("numpy")
    method = width.Lemon(alpha=numpy.float32(0.75))

    assert planned(make("llama", tied=False), method, WIDER).target_sizes["hidden"] == 48


def test_shares_beyond_the_range_of_floats_are_refused():
    model = make("llama", tied=False)

    with pytest.raises(PlanError, match="alpha=1e-06 gives 60 copies shares beyond"):
        growkern.plan(model, to={"ffn": 2400}, width=width.Lemon(alpha=1e-6))


def test_a_seed_of_a_growth_is_checked():
    model, seeds = make("llama", tied=False), [v for v in NO_SEEDS if v is not None]

    assert refused_wrongly("seed", seeds, lambda v: grow(model, seed=v)) == []


TOKEN_LIST = [*range(66), *[-1] * 14]
CLP = {
    "helper": [None, [1.0], torch.full((80, 4), nan), torch.full((80, 4), inf), torch.ones(80)],
    "tokens": [None, 5, "abc", [True] * 80, [nan] * 80, [0.5] * 80, [10**30, *TOKEN_LIST[1:]]],
    "top_k": [0, -1, 1.5, nan, True, "3"],
    "seed": NO_SEEDS,
}


@pytest.mark.parametrize("name", CLP)
def test_arguments_of_clp_transfer_are_checked(name):
    model, right = make("llama", tied=False), dict(helper=torch.ones(80, 4), tokens=TOKEN_LIST)

    def call(value):
        planned(model, vocab.CLPTransfer(**right | {name: value}), TOKENS)

    assert refused_wrongly(name, CLP[name], call) == []


UPCYCLE = {
    "experts": [0, -1, 1.5, nan, True, "2", 10**5000],
    "top_k": [0, -1, 1.5, nan, True, "2", 3],
    "std": [*NO_NUMBERS, 0, -1],
    "seed": [*NO_SEEDS, -1],
}


@pytest.mark.parametrize("name", UPCYCLE)
def test_arguments_of_upcycling_are_checked(name):
    model, right = make("llama", tied=True), dict(experts=2, top_k=1)

    def call(value):
        growkern.upcycle(model, **right | {name: value})

    assert refused_wrongly(f"{name}=", UPCYCLE[name], call) == []
