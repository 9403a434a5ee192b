"""A checkpoint keeps a record of every growth, which gives the same plan again; plans that growkern 0.1 wrote are read too."""

import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from models import grow, make, spec_of, train
from torch.optim.swa_utils import AveragedModel

import growkern
from growkern import depth, shrink, vocab, width
from growkern.engine.history import recorded, replanned
from growkern.errors import PlanError
from growkern.model.describe import describe
from growkern.planning.growth_plan import GrowthPlan
from growkern.planning.growth_record import GrowthRecord, read

OLD = Path(__file__).parent / "histories"  # growkern 0.1 wrote whole plans, without a version


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_what_growkern_0_1_wrote_still_resumes(family):
    saved = json.loads((OLD / f"{family}.json").read_text())
    model = make(family, tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)

    growkern.resume(model, optim, saved["history"])

    assert {n: list(t.shape) for n, t in model.state_dict().items()} == saved["tensors"]
    groups = [[len(g["params"]), g.get("lr_factor", 1.0)] for g in optim.param_groups]
    assert groups == saved["groups"]
    assert model.config.growkern_history[0] != saved["history"][0]  # growkern now writes a record


METHODS = [
    *(
        dict(to={"hidden": 48, "ffn": 80, "kv_heads": 2}, width=getattr(width, name)())
        for name in width.__all__
        if name not in ("CopyExperts", "ShrinkPerturb")
    ),
    dict(to={"experts": 6}, width=width.CopyExperts((1.5, 2, 0, 1))),
    dict(to="1.5x", width=width.ShrinkPerturb(), state="drop"),
    dict(to="1.5x", width=width.Lossless(noise=0.3)),
    dict(to="2x", width=width.Net2Wider(noise=0.1, seed=7), state="asymmetric"),
    *(dict(to={"layers": 4}, depth=one) for one in (depth.Stack(), depth.Layers((0, 1, 1, 0)))),
    dict(to={"vocab": 80}, width=vocab.MeanCov(seed=3)),
    dict(to={"layers": 3, "ffn": 50}, dynamics="exact", seed=11),
]


@pytest.mark.parametrize("growth", METHODS, ids=str)
def test_a_few_hundred_bytes_give_the_same_plan_again(growth):
    family = "mixtral" if "experts" in growth["to"] else "llama"
    model = make(family, tied=True)
    plan = growkern.plan(model, **growth)

    text = recorded(plan, describe(model))
    again = replanned(read(text), describe(make(family, tied=True)))

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

    assert isinstance(GrowthPlan.from_json(read(text).plan), GrowthPlan)
    assert start.config.hidden_size == 48


def test_a_plan_that_was_edited_is_kept_whole():
    model = make("llama", tied=True)
    plan = growkern.plan(model, to="2x")
    edited = replace(plan, eps={name: 3.0 for name in plan.eps})

    assert GrowthPlan.from_json(read(recorded(edited, describe(model))).plan) == edited


def test_a_record_that_gives_another_plan_is_refused_before_anything_changes():
    model = make("llama", tied=True)
    record = GrowthRecord.of(growkern.plan(model, to="2x"))
    before = copy.deepcopy(model.state_dict())

    with pytest.raises(
        PlanError, match=r"growth 1 of 1 does not fit: .*plans another growth by Lossless"
    ):
        growkern.resume(model, None, [replace(record, seed=5).to_json()])

    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("to", [{"ffn": 200_000}, {"hidden": 240_000}, {"layers": 4000}], ids=str)
def test_a_record_of_absurd_sizes_is_refused_before_it_is_planned(to, monkeypatch):
    model = make("llama", tied=True)
    record = GrowthRecord.of(growkern.plan(model, to="2x"))
    planned = []
    monkeypatch.setattr("growkern.engine.history.build", lambda *args, **options: planned.append(1))
    with pytest.raises(
        PlanError, match="more than 256 times the source's sizes: the record is spoiled"
    ):
        growkern.resume(model, None, [replace(record, to=to).to_json()])
    assert not planned


RECORDS = {
    "later": ({"version": 2}, r"recorded in version 2, .* reads version 1: install"),
    "unknown": ({"colour": "red"}, "unexpected keyword argument 'colour'"),
    "lacking": ({"width": None}, "missing 1 required .* 'width'"),
    "sizes": ({"to": {"wings": 2}}, "sizes are not those of a model"),
    "too large": ({"to": {"layers": 200_000}}, "layers: the target 200,000 is not from 1 to 4,096"),
    "larger than any float": (
        {"to": {"ffn": 10**30}},
        "ffn: the target .* is not from 1 to 262,144",
    ),
    "a method that is a number": ({"width": 3}, "a method, a state or a digest is no text"),
    "no family": ({"family": []}, "a family, a method"),
    "no sizes": ({"to": []}, "no mapping from names"),
    "pairs": ({"source_sizes": [["hidden", 24]]}, "no mapping from names"),
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
    with pytest.raises(
        PlanError, match="read the plan: this plan is of version 2, .* up to 1"
    ) as at:
        GrowthPlan.from_json(json.dumps(data | {"version": 2}))
    assert "PlanError" not in str(at.value) and "pass text" not in str(at.value)


JUNK = {
    "source_sizes": None, "attributes": [1], "eps": {"a": "b"}, "ties": {"a": 1}, "blocks_path": 3, "depth": None, "reasons": [None],
    "seed": "0", "config_eps": [1, 2], "notes": [3], "counters": [1],
}  # fmt: skip


@pytest.mark.parametrize("key", JUNK)
def test_junk_in_a_plan_is_refused_when_it_is_read(key):
    data = json.loads(growkern.plan(make("llama", tied=True), to={"layers": 3}).to_json())

    with pytest.raises(PlanError, match="cannot read the plan"):
        GrowthPlan.from_json(json.dumps(data | {key: JUNK[key]}))


PARTS = [("tensors", k) for k in ("factor", "constant", "state", "name")]
PARTS += [("blocks", k) for k in ("source", "branch")]


@pytest.mark.parametrize(("part", "key"), PARTS)
def test_junk_in_a_row_or_a_block_is_refused_when_it_is_read(part, key):
    data = json.loads(growkern.plan(make("llama", tied=True), to={"layers": 3}).to_json())
    data[part][0][key] = [1]

    with pytest.raises(PlanError, match="cannot read the plan"):
        GrowthPlan.from_json(json.dumps(data))


@pytest.mark.parametrize("junk", [5, "abc", [5], {"a": 1}], ids=str)
def test_a_config_whose_history_is_junk_is_refused_by_name(junk):
    model = make("llama", tied=True)
    model.config.growkern_history = junk

    for call in (growkern.resume, growkern.expand_inplace):
        with pytest.raises(
            PlanError, match="config.growkern_history is .*, not a list of recorded growths"
        ):
            call(model)
    assert model.config.hidden_size == 24


@pytest.mark.parametrize("history", [5, [5], "abc"], ids=str)
def test_a_history_that_is_none_is_refused(history):
    with pytest.raises(PlanError, match="history: expected a list of recorded growths"):
        growkern.resume(make("llama", tied=True), None, history)


def test_a_record_of_another_family_is_refused():
    record = GrowthRecord.of(growkern.plan(make("llama", tied=True), to="2x"))

    with pytest.raises(PlanError, match="the record is of a mistral of .*this llama has"):
        growkern.resume(
            make("llama", tied=True), None, [replace(record, family="mistral").to_json()]
        )


def _wrong_digest(records):
    return [records[0].to_json(), replace(records[1], digest="0" * 32).to_json()]


def _unknown_method(records):
    return [records[0].to_json(), replace(records[1], depth="Tower()").to_json()]


def _another_family(records):
    return [records[0].to_json(), replace(records[1], family="mistral").to_json()]


@pytest.mark.slow
@pytest.mark.parametrize("spoiled", (_wrong_digest, _unknown_method, _another_family))
@pytest.mark.parametrize("optimizer", (torch.optim.AdamW, torch.optim.SGD, None))
def test_a_later_growth_that_does_not_fit_takes_the_earlier_ones_back(spoiled, optimizer):
    model = make("llama", tied=True)
    start, average = copy.deepcopy(model), AveragedModel(model)
    grown = optimizer and optimizer(model.parameters(), lr=1e-3)
    growkern.expand_inplace(model, grown, to="2x", ema=())
    growkern.expand_inplace(model, grown, to={"layers": 3}, ema=())
    good = model.config.growkern_history
    optim = optimizer and optimizer(start.parameters(), lr=1e-3)
    scheduler = optim and torch.optim.lr_scheduler.ConstantLR(optim)
    average.module = copy.deepcopy(start)
    before = copy.deepcopy((start, average, optim and optim.state_dict(), start.config.to_dict()))
    names, ids = dict(start.named_parameters()), [id(p) for p in start.parameters()]

    with pytest.raises(
        PlanError, match=r"(?s)growth 2 of 2 does not fit: .* Nothing was changed\."
    ):
        growkern.resume(start, optim, spoiled([*map(read, good)]), scheduler=scheduler, ema=average)

    for now, was in ((start, before[0]), (average, before[1])):
        assert str(now) == str(was)
        assert_same(now.state_dict(), was.state_dict())
    assert [id(p) for p in start.parameters()] == ids and dict(start.named_parameters()) == names
    assert (optim and optim.state_dict()) == before[2] and start.config.to_dict() == before[3]
    # resume can be tried again
    growkern.resume(start, optim, good, scheduler=scheduler, ema=average)
    assert start.config.num_hidden_layers == average.module.config.num_hidden_layers == 3
    if optim is not None:
        start.load_state_dict(model.state_dict())
        train(start, optim, 1)


def assert_same(now, was):
    assert now.keys() == was.keys()
    for name in now:
        assert torch.equal(now[name], was[name]), name


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
    growkern.resume(start, other, schedule.history, spec=spec_of)  # nothing is ahead
    assert {n: p.shape for n, p in start.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    assert grow(start, to="1.5x").function_preserving
