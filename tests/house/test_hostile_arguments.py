"""Every argument of every public function, and every field of a spec, with values of other types: a GrowthError, and nothing changes."""

import copy
import inspect
import tempfile
import tracemalloc
from dataclasses import fields, replace

import pytest
import torch
from models import Plain, batch, make

import growkern
from growkern import At, GrowthSchedule, WhenPlateau, WhenSlope, width
from growkern.errors import GrowthError
from growkern.model import spec_check
from growkern.support.text import short

VALUES = (
    5,
    -1,
    True,
    float("nan"),
    "x",
    b"x",
    [],
    [5],
    [None],
    {},
    {3: 3},
    {"x": 5},
    object(),
    None,
    int,
    torch.ones(3),
    1 << 70,
)
CURVE = [(1e6 * i, 1.5 + 0.9 * i**-0.35) for i in range(1, 60)]


def pair():
    model = make("llama", tied=True)
    return {"model": model, "optim": torch.optim.AdamW(model.parameters(), lr=1e-3)}


def attached(**arguments):
    schedule = GrowthSchedule([At(step=2, to={"layers": 3})])
    schedule.attach(**arguments).remove()


def observed(**arguments):
    schedule = GrowthSchedule([WhenPlateau(to={"layers": 3})])
    schedule.observe(**arguments)


def attached_to_accelerate(**arguments):
    from accelerate import Accelerator

    schedule = GrowthSchedule([At(step=2, to={"layers": 3})])
    own = {"accelerator": Accelerator(cpu=True), "schedule": schedule} | pair()
    growkern.accelerate.attach(**own | arguments).remove()


def compared():
    return pair() | {
        "methods": [width.Lossless()],
        "batch": batch(),
        "to": {"layers": 3},
        "steps": 0,
    }


def inherits(**arguments):
    growkern.inherit.KnowledgeInheritance(**{"teacher": pair()["model"]} | arguments)


def attached_to_a_loss(**arguments):
    loss = growkern.inherit.KnowledgeInheritance(make("llama", tied=True))
    loss.attach(**pair() | arguments)


def fused():
    labels = torch.ones(3, dtype=torch.int64)
    return {"hidden": torch.ones(3, 4), "weight": torch.ones(5, 4), "labels": labels, "alpha": 0.5, "probs": torch.ones(3, 5)}  # fmt: skip


def stored(**arguments):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        own = {"teacher": pair()["model"], "batches": [{"input_ids": batch()}], "path": "s", "sampled": 3}  # fmt: skip
        growkern.inherit.store(**own | arguments)


OPTIONS = (
    "spec",
    "backend",
    "ema",
    "master_weights",
    "state_rules",
    "memory",
    "check",
    "on_progress",
)
GROWTH = (
    "to",
    "width",
    "depth",
    "state",
    "dynamics",
    "spec",
    "seed",
    "backend",
    "plan",
    "scheduler",
    *OPTIONS[2:],
)
CALLS = {  # public call -> the call, its valid arguments, and the names of further arguments
    "plan": (growkern.plan, pair, ("to", "width", "depth", "state", "dynamics", "spec", "seed", "master_weights", "state_rules", "shrink")),
    "expand_inplace": (growkern.expand_inplace, pair, GROWTH),
    "shrink_inplace": (
        growkern.shrink_inplace, pair, ("to", "method", "state", "dynamics", "spec", "backend", "plan", "scheduler", *OPTIONS[2:6])),
    "resume": (growkern.resume, pair, ("history", "scheduler", "ema", "master_weights", "spec")),
    "verify": (growkern.verify, lambda: {"source": pair()["model"], "target": pair()["model"], "batch": batch()}, ("optim",)),
    "compare": (growkern.compare, compared, ("loss", "held_out", "on_outcome", "state", "seed")),
    "learn": (
        growkern.learn, lambda: pair() | {"batches": [batch()], "to": {"layers": 3}, "steps": 1},
        ("width", "depth", "lr", "noise", "tie", "loss", "dynamics", "spec", "seed", "scheduler", "ema", "master_weights", "on_step")),
    "upcycle": (growkern.upcycle, lambda: pair() | {"experts": 2}, ("top_k", "std", "seed")),
    "expert_utility": (growkern.expert_utility, lambda: {"model": pair()["model"]}, ("optim", "spec")),
    "describe": (growkern.describe, lambda: {"model": pair()["model"]}, ("spec",)),
    "attach": (attached, pair, ("scheduler", "deferred", *OPTIONS)),
    "accelerate.attach": (attached_to_accelerate, dict, ("accelerator", "schedule", "model", "optim", "scheduler", *OPTIONS)),
    "hf.attach": (growkern.hf.attach, lambda: {"trainer": None, "schedule": GrowthSchedule([At(step=2)])}, ()),
    "lightning": (growkern.lightning.GrowthCallback, lambda: {"schedule": GrowthSchedule([At(step=2)])}, ("model", "tokens")),
    "observe": (observed, dict, ("tokens", "flops", "loss")),
    "GrowthSchedule": (GrowthSchedule, lambda: {"events": [At(step=2)]}, ("trains", "on_growth")),
    "At": (At, lambda: {"step": 2}, ("to", "width", "depth", "state", "dynamics", "seed", "tokens", "trains", "rewind", "rewarm")),
    "WhenPlateau": (WhenPlateau, dict, ("to", "metric", "patience", "min_delta", "mode")),
    "WhenSlope": (WhenSlope, lambda: {"tau": 0.1}, ("to", "metric", "window", "warmup")),
    "UpdateScale": (growkern.UpdateScale, lambda: {"optim": pair()["optim"], "scales": {}}, ("orders",)),
    "advise": (
        growkern.advise, lambda: {"curve": CURVE, "source": 1e5, "target": 3e5, "budget": 1e14},
        ("others", "kind", "recipe", "flops_per_token", "spent", "law", "seed")),
    "inherit": (inherits, dict, (
        "teacher", "top_k", "tau", "until", "sampled", "alpha", "peak", "renormalize", "vocab", "tokenizer", "seed")),
    "inherit.attach": (attached_to_a_loss, dict, ("model", "optim", "shift", "n_steps")),
    "inherit.fused_loss": (
        growkern.inherit.fused_loss, fused, ("index", "tau", "bias", "scale", "softcap", "ignore_index", "n_items", "backend")),
    "inherit.store": (stored, dict, ("teacher", "batches", "path", "sampled", "top_k", "tau", "tokenizer", "seed", "name")),
    "linear": (growkern.linear, lambda: {"name": "a", "reads": "b", "writes": "c"}, ("bias", "transposed")),
    "embedding": (growkern.embedding, lambda: {"name": "a", "rows": "b", "writes": "c"}, ()),
    "norm": (growkern.norm, lambda: {"name": "a", "reads": "b", "writes": "c", "kind": "rms"}, ("bias", "eps", "offset")),
    "reader": (growkern.reader, lambda: {"axis": "b"}, ()),
    "writer": (growkern.writer, lambda: {"axis": "b"}, ()),
}  # fmt: skip

SPEC_VALUES = (
    (5,), ({},), (None,), ((5,),), growkern.Power(5, "x"), growkern.Power("nope", 1), growkern.Power("hidden", float("nan")),
    growkern.Blocks(5), growkern.Blocks("blocks", identity=5), growkern.Blocks("blocks", size=5), (growkern.Blocks("x", outputs=5),),
)  # fmt: skip
MEANT = {  # a long run, and errors that the user's own function or model raises
    "steps": [repr(1 << 70)],
    "spec": [repr(int)],
    "batch": ["{}", "{'x': 5}", repr(torch.ones(3))],
    "held_out": ["{}", "{'x': 5}", repr(torch.ones(3))],
    "loss": [repr(int)],
    "on_outcome": [repr(int)],
    "batches": ["{}", "{'x': 5}", repr(torch.ones(3))],
    "on_step": [repr(int)],
}


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_an_argument_of_another_type_is_refused_by_name_or_works(call):
    function, valid, more = CALLS[call]
    bare = []
    for name in (*valid(), *more):
        for value in VALUES:
            if repr(value) in MEANT.get(name, ()):
                continue
            arguments = valid() | {name: value}
            try:
                function(**arguments)
            except GrowthError:
                pass
            except Exception as error:
                bare.append(f"{name}={value!r}: {error!r}"[:200])

    assert bare == []


def test_every_argument_of_the_public_functions_is_in_the_list():
    for call in (
        "plan",
        "expand_inplace",
        "shrink_inplace",
        "resume",
        "verify",
        "upcycle",
        "learn",
        "advise",
    ):
        function, valid, more = CALLS[call]

        assert {*valid(), *more} == {*inspect.signature(function).parameters}, call


@pytest.mark.slow
@pytest.mark.parametrize("field", [f.name for f in fields(growkern.ModelSpec)])
def test_a_field_of_a_spec_of_another_type_is_refused_by_name_or_works(field):
    model = Plain(tied=True)
    before, old = copy.deepcopy(model.state_dict()), getattr(model.spec(), field)
    part = next(iter(old), "x") if isinstance(old, dict) else "x"
    values = [*VALUES, *SPEC_VALUES, *({part: value} for value in (5, None, *SPEC_VALUES))]
    bare = []
    for value in values:
        try:
            growkern.expand_inplace(model, spec=replace(model.spec(), **{field: value}), to="2x")
            model = Plain(tied=True)
            before = copy.deepcopy(model.state_dict())
        except GrowthError:
            assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
        except Exception as error:
            bare.append(f"{field}={value!r}: {error!r}"[:200])

    assert bare == []


def spec_with(**changes):
    model = Plain(tied=True)
    return growkern.expand_inplace(model, spec=replace(model.spec(), **changes), to="2x")


REFUSED = {  # what was accepted, and did harm later or nothing; what the error names
    "memory": (lambda: attached(**pair(), memory="x"), "memory: expected 'stage' or 'lean'"),
    "a check": (lambda: attached(**pair(), check=5), "check: expected Tensor"),
    "a text": (lambda: attached(**pair(), check="x"), "check: expected Tensor"),
    "a batch": (lambda: attached(**pair(), check=torch.ones(3)), "check: the forward failed before"),
    "a scheduler": (lambda: attached(**pair(), scheduler=[5]), "scheduler: int is not"),
    "a tau": (lambda: WhenSlope(tau=-1), "finite tau above 0"),
    "a metric": (lambda: WhenPlateau(metric=5), "metric: expected str, got 5"),
    "a step": (lambda: At(step=True), "step: expected number or None, got True"),
    "a schedule": (lambda: growkern.lightning.GrowthCallback(5), "schedule: expected GrowthSchedule"),
    "an optimizer": (lambda: growkern.plan(pair()["model"], [pair()["optim"], 5]), r"optim\[1\]: expected a torch.optim"),
    "a module": (lambda: spec_with(rebuilt_from_config=("x",)), "x: rebuilt_from_config names this module"),
    "modules": (lambda: spec_with(rebuilt_from_config="abc"), "rebuilt_from_config: expected tuple of str, got 'abc'"),
    "cached sizes": (lambda: spec_with(cached_sizes=5), "cached_sizes: expected mapping"),
    "a stream": (
        lambda: spec_with(activation_scales={"zz": growkern.Power("hidden", 1)}), "activation_scales: no tensor has the stream 'zz'"),
    "a kind": (lambda: spec_with(non_affine_norms={"residual": "zz"}), r"non_affine_norms\['residual'\]: expected 'rms' or 'layer'"),
    "an output": (lambda: spec_with(blocks=growkern.Blocks("blocks", outputs=("zz",))), "blocks.0.zz: Blocks names this tensor"),
    "a tie": (lambda: spec_with(ties={"head.weight": "zz"}), "ties: 'zz' is not in tensors"),
    "a fraction": (lambda: spec_with(rotary=1.5), "rotary=1.5 is not the fraction of head_dim"),
    "no head": (lambda: spec_with(sizes=Plain().spec().sizes | {"heads": 0}), "sizes: heads is 0"),
    "a counter": (lambda: spec_with(counters=("zz",)), "counters: 'zz' is not in tensors"),
    "a size": (lambda: spec_with(save_requires_multiple=("hidden", "zz")), "save_requires_multiple: the size 'zz' is not in sizes"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_was_accepted_is_refused_by_name(what):
    call, names = REFUSED[what]

    with pytest.raises(GrowthError, match=names):
        call()


def test_a_report_that_cannot_be_read_counts_nothing():
    schedule = GrowthSchedule([At(step=2)])
    for numbers in ({"loss": torch.ones(3)}, {"loss": "y"}, {"tokens": "x"}, {"flops": -1.0}):
        with pytest.raises(GrowthError):
            schedule.observe(**{"tokens": 5} | numbers)

    assert schedule.counts.n_tokens == 0 and schedule.counts.n_flops == 0


def test_families_pass_the_check_of_a_spec_that_users_write():
    for family in ("llama", "gpt2", "bert", "t5", "mixtral", "vit"):
        assert [*spec_check.problems(growkern.describe(make(family, tied=True)))] == []


def test_a_value_is_printed_in_an_error_in_bounded_memory():
    """A list that holds one list many times is small, and prints as 12 million characters."""
    entry, model = [[0] * 2000] * 2000, make("llama", tied=True)
    for call in (
        lambda: growkern.resume(model, None, entry),
        lambda: growkern.plan(model, to=entry),
        lambda: growkern.expand_inplace(model, width=entry),
    ):
        tracemalloc.start()
        with pytest.raises(GrowthError) as raised:
            call()
        assert tracemalloc.get_traced_memory()[1] < 2**22 and len(str(raised.value)) < 2000
        tracemalloc.stop()


@pytest.mark.parametrize(
    "value", [(1,), (), [], {}, {"a": [1, (2, "x\n y")]}, 1.5, None, {1: {2: ()}}, b"x", "x  y"]
)
def test_a_small_value_is_printed_as_python_prints_it(value):
    assert short(value) == " ".join(repr(value).split())
