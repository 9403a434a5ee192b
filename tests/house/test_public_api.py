"""growkern has the documented public names and signatures, modules show their public names only, and old names warn."""

import inspect
import json
from functools import partial
from types import ModuleType

import pytest
import torch
from models import make

import growkern
from growkern.planning.growth_plan import GrowthPlan

NAMES = [
    "Advice",
    "At",
    "Blocks",
    "Comparison",
    "GrowthPlan",
    "GrowthReport",
    "GrowthSchedule",
    "Hint",
    "ModelSpec",
    "Outcome",
    "Power",
    "Scale",
    "UpdateScale",
    "Verification",
    "WhenPlateau",
    "WhenSlope",
    "advise",
    "compare",
    "depth",
    "describe",
    "embedding",
    "errors",
    "expand_inplace",
    "expert_utility",
    "inherit",
    "learn",
    "linear",
    "norm",
    "optim",
    "plan",
    "procedures",
    "reader",
    "recipes",
    "resume",
    "shrink",
    "shrink_inplace",
    "trains",
    "upcycle",
    "verify",
    "vocab",
    "width",
    "writer",
]
ROOMS = [name for name in NAMES if isinstance(getattr(growkern, name), ModuleType)]
ROOMS += [
    pytest.param(name, marks=pytest.mark.slow) for name in ("accelerate", "dcp", "hf", "lightning")
]
REQUIRED = inspect.Parameter.empty
SIGNATURES = {  # positional parameters, keyword-only parameters, return annotation
    "expand_inplace": (
        {"model": REQUIRED, "optim": None},
        {
            "to": "2x",
            "width": None,
            "depth": None,
            "state": "exact",
            "dynamics": "mup",
            "spec": None,
            "seed": None,
            "backend": None,
            "plan": None,
            "scheduler": None,
            "ema": None,
            "master_weights": None,
            "state_rules": None,
            "memory": None,
            "check": None,
            "on_progress": None,
        },
        "GrowthReport",
    ),
    "shrink_inplace": (
        {"model": REQUIRED, "optim": None},
        {
            "to": "0.5x",
            "method": None,
            "state": "exact",
            "dynamics": "mup",
            "spec": None,
            "backend": None,
            "plan": None,
            "scheduler": None,
            "ema": None,
            "master_weights": None,
            "state_rules": None,
            "memory": None,
        },
        "GrowthReport",
    ),
    "plan": (
        {"model": REQUIRED, "optim": None},
        {
            "to": "2x",
            "width": None,
            "depth": None,
            "state": "exact",
            "dynamics": "mup",
            "spec": None,
            "seed": None,
            "master_weights": None,
            "state_rules": None,
            "shrink": None,
        },
        "GrowthPlan",
    ),
}


def test_dir_shows_the_public_names_and_no_machinery():
    assert dir(growkern) == sorted([*NAMES, "accelerate", "dcp", "hf", "lightning", "__version__"])


@pytest.mark.parametrize("name", ROOMS)
def test_dir_of_a_module_shows_its_public_names(name):
    module = getattr(growkern, name)

    assert dir(module) == sorted(module.__all__) and len({*module.__all__}) == len(module.__all__)
    assert all(hasattr(module, key) for key in module.__all__)


def test_public_names_are_exactly_these():
    assert growkern.__all__ == NAMES


def test_every_public_name_exists():
    assert [name for name in NAMES if not hasattr(growkern, name)] == []


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_the_documented_one(name):
    positional, keyword_only, returns = SIGNATURES[name]

    signature = inspect.signature(getattr(growkern, name))

    kinds = inspect.Parameter
    parameters = signature.parameters.values()
    assert {
        p.name: p.default for p in parameters if p.kind is kinds.POSITIONAL_OR_KEYWORD
    } == positional
    assert {p.name: p.default for p in parameters if p.kind is kinds.KEYWORD_ONLY} == keyword_only
    assert len(parameters) == len(positional) + len(keyword_only)
    assert signature.return_annotation is getattr(growkern, returns)


def test_verify_takes_source_target_and_batch():
    assert list(inspect.signature(growkern.verify).parameters)[:3] == ["source", "target", "batch"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("lawful", "gradients_exact"),
        ("kept", "preserves_text"),
        ("path", "blocks_path"),
        ("rows", "tensors"),
        ("others", "extra_stacks"),
        ("rebuilt", "rebuilt_modules"),
    ],
)
def test_old_names_of_a_plan_work_and_warn(old, new):
    plan = growkern.plan(make("llama", tied=True))
    with pytest.warns(DeprecationWarning, match=f"of GrowthPlan is called {new} now"):
        assert getattr(plan, old) is getattr(plan, new)
    with pytest.warns(DeprecationWarning, match="next_layer_axis"):
        assert plan.tensors[0].upper_axis == 0
    assert GrowthPlan.from_json(plan.to_json()) == plan


def test_the_json_of_a_plan_keeps_its_names_so_that_digests_on_record_hold():
    data = json.loads(growkern.plan(make("t5", tied=True), to={"hidden": "2x"}).to_json())

    assert {"others", "rebuilt"} <= data.keys()
    assert all(
        {"pieces"} == axis["weight_scale"].keys() and "centred" in axis
        for axis in data["axes"].values()
    )


def _calls(model, optim):
    schedule = growkern.GrowthSchedule([growkern.At(step=1)])
    return {
        "plan": partial(growkern.plan, model, optim),
        "expand_inplace": partial(growkern.expand_inplace, model, optim),
        "shrink_inplace": partial(growkern.shrink_inplace, model, optim),
        "resume": partial(growkern.resume, model, optim),
        "attach": partial(schedule.attach, model, optim),
    }


@pytest.mark.parametrize("call", ("plan", "expand_inplace", "shrink_inplace", "resume", "attach"))
def test_old_names_of_arguments_work_and_warn(call):
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters())
    run = _calls(model, optim)[call]
    with pytest.raises(TypeError, match=r"got both master_weights= and masters=, its old name"):
        run(masters={}, master_weights={})
    with pytest.warns(DeprecationWarning, match="masters= is called master_weights= now"):
        run(masters={})
    if call not in ("resume", "attach"):
        run = _calls(make("llama", tied=True), None)[call]
        with pytest.warns(DeprecationWarning, match="rules= is called state_rules= now"):
            run(rules=None)


@pytest.mark.parametrize(
    ("old", "new", "value"),
    [
        ("others", "extra_stacks", (growkern.Blocks("decoder", size="decoder_layers"),)),
        ("leaves", "cached_sizes", {"head.out_features": ("head.weight", 0)}),
        ("powers", "activation_scales", {"residual": growkern.Power("hidden", -0.5)}),
        ("rebuilt", "rebuilt_from_config", ("rotary",)),
        ("saved", "save_requires_multiple", ("hidden", "heads")),
    ],
)
def test_old_names_of_a_model_spec_work_and_warn(old, new, value):
    make_spec = partial(growkern.ModelSpec, "custom", {"hidden": 8}, {})
    spec = make_spec(**{new: value})

    with pytest.warns(DeprecationWarning, match=f"growkern: {old}= is called {new}= now"):
        assert make_spec(**{old: value}) == spec != make_spec()
    with pytest.warns(DeprecationWarning, match=f"attribute of ModelSpec is called {new} now"):
        assert getattr(spec, old) is getattr(spec, new)
    both = {old: value, new: value}
    with pytest.raises(TypeError, match=rf"ModelSpec\(\) got both {new}= and {old}=, its old name"):
        make_spec(**both)
