"""What checkpoints keep of growths: records that give the same plan again, and the plans that growkern 0.1 wrote."""

import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from models import grow, make, spec_of, train

import growkern
from growkern import depth, shrink, vocab, width
from growkern.engine.history import recorded, replanned
from growkern.errors import PlanError
from growkern.model.describe import describe
from growkern.planning.growth_plan import GrowthPlan
from growkern.planning.growth_record import GrowthRecord, read

OLD = Path(__file__).parent / "histories"  # written by growkern 0.1: whole plans, without a version


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_what_growkern_0_1_wrote_still_resumes(family):
    saved = json.loads((OLD / f"{family}.json").read_text())
    model = make(family, tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)

    growkern.resume(model, optim, saved["history"])

    assert {n: list(t.shape) for n, t in model.state_dict().items()} == saved["tensors"]
    groups = [[len(g["params"]), g.get("lr_factor", 1.0)] for g in optim.param_groups]
    assert groups == saved["groups"]
    assert model.config.growkern_history[0] != saved["history"][0]  # it keeps less of it now


METHODS = [
    *(
        dict(to={"hidden": 48, "ffn": 80, "kv_heads": 2}, width=getattr(width, name)())
        for name in width.__all__
    ),
    dict(to="1.5x", width=width.Lossless(noise=0.3)),
    dict(to="2x", width=width.Net2Wider(noise=0.1, seed=7), state="asymmetric"),
    *(dict(to={"layers": 4}, depth=one) for one in (depth.Stack(), depth.Layers((0, 1, 1, 0)))),
    dict(to={"vocab": 80}, width=vocab.MeanCov(seed=3)),
    dict(to={"layers": 3, "ffn": 50}, dynamics="exact", seed=11),
]


@pytest.mark.parametrize("growth", METHODS, ids=str)
def test_a_few_hundred_bytes_give_the_same_plan_again(growth):
    model = make("llama", tied=True)
    plan = growkern.plan(model, **growth)

    text = recorded(plan, describe(model))
    again = replanned(read(text), describe(make("llama", tied=True)))

    assert again == plan and again.to_json() == plan.to_json() and len(text) < 500


def test_a_shrinking_is_on_record_too():
    model = make("llama", tied=True)
    growkern.expand_inplace(model, to="2x", width=width.Lossless(noise=0))
    start = copy.deepcopy(model)
    growkern.shrink_inplace(model, to="0.5x", method=shrink.FirstCopies())

    growkern.resume(start, None, model.config.growkern_history)

    assert start.config.hidden_size == model.config.hidden_size == 24
    assert len(model.config.growkern_history[-1]) < 500


@dataclass(frozen=True)
class Own:
    """A width method that growkern does not know."""

    def widen(self, spec, sizes):
        return width.Lossless(noise=0.5).widen(spec, sizes)


def test_of_a_method_of_the_users_own_the_whole_plan_is_kept():
    model = make("llama", tied=True)
    start = copy.deepcopy(model)
    growkern.expand_inplace(model, to="2x", width=Own())

    (text,) = model.config.growkern_history
    growkern.resume(start, None, [text])

    assert isinstance(read(text), GrowthPlan)
    assert start.config.hidden_size == 48


def test_a_plan_that_was_edited_is_kept_whole():
    model = make("llama", tied=True)
    plan = growkern.plan(model, to="2x")
    edited = replace(plan, eps={name: 3.0 for name in plan.eps})

    assert read(recorded(edited, describe(model))) == edited


def test_a_record_that_gives_another_plan_is_refused_before_anything_changes():
    model = make("llama", tied=True)
    record = GrowthRecord.of(growkern.plan(model, to="2x"))
    before = copy.deepcopy(model.state_dict())

    with pytest.raises(
        PlanError, match=r"growth 1 of 1 does not fit: .*plans another growth by Lossless"
    ):
        growkern.resume(model, None, [replace(record, seed=5).to_json()])

    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


RECORDS = {
    "later": ({"version": 2}, r"recorded in version 2, .* reads version 1: install"),
    "unknown": ({"colour": "red"}, "unexpected keyword argument 'colour'"),
    "lacking": ({"width": None}, "missing 1 required .* 'width'"),
    "sizes": ({"to": {"wings": 2}}, "sizes are not those of a model"),
    "no number": ({"to": {"hidden": "wide"}}, "sizes are not those of a model"),
}


@pytest.mark.parametrize(("change", "match"), RECORDS.values(), ids=RECORDS)
def test_a_record_that_cannot_be_read_is_refused_by_name(change, match):
    data = json.loads(GrowthRecord.of(growkern.plan(make("llama", tied=True))).to_json())
    data |= change
    data = {key: value for key, value in data.items() if value is not None or key == "dynamics"}

    with pytest.raises(PlanError, match=match):
        read(json.dumps(data))


def test_a_plan_reads_what_it_lacks_as_defaults_and_refuses_what_it_does_not_know():
    plan = growkern.plan(make("llama", tied=True), to="2x", dynamics="mup")
    data = json.loads(plan.to_json())
    assert data["version"] == 1
    lacking = {k: v for k, v in data.items() if k not in ("version", "notes", "dynamics", "others")}

    assert GrowthPlan.from_json(json.dumps(lacking)) == replace(plan, notes=())
    with pytest.raises(PlanError, match="unexpected keyword argument 'colour'"):
        GrowthPlan.from_json(json.dumps(data | {"colour": "red"}))
    with pytest.raises(PlanError, match=r"missing 1 required .* 'family'"):
        GrowthPlan.from_json(json.dumps({k: v for k, v in data.items() if k != "family"}))
    with pytest.raises(PlanError, match="version 2, and this growkern reads versions up to 1"):
        GrowthPlan.from_json(json.dumps(data | {"version": 2}))


def test_a_model_of_the_users_own_resumes_by_records_of_its_schedule():
    model = make("plain", tied=True)
    start = copy.deepcopy(model)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = growkern.GrowthSchedule([growkern.At(step=1, to="2x")])
    schedule.attach(model, optim, spec=spec_of)
    train(model, optim, 2)
    other = torch.optim.AdamW(start.parameters(), lr=1e-3)

    growkern.resume(start, other, schedule.state_dict()["history"], spec=spec_of)

    assert len(schedule.history[0]) < 500
    assert {n: p.shape for n, p in start.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    with pytest.raises(PlanError, match="the record is of a"):
        growkern.resume(start, other, schedule.history, spec=spec_of)
    assert grow(start, to="1.5x").function_preserving
