"""Errors that users meet: each names what is at fault, and offers a way out."""

import copy
import json

import pytest
import torch
from models import make, train

import growkern
from growkern import depth, shrink, vocab, width
from growkern.errors import GrowthError
from growkern.planning.growth_plan import GrowthPlan
from growkern.planning.growth_record import GrowthRecord


def grow(family="llama", tied=True, **growth):
    return growkern.expand_inplace(make(family, tied=tied), **growth)


def trained(**growth):
    model = make("llama", tied=False)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 1)
    return growkern.expand_inplace(model, optim, **growth)


def another_optimizer():
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 1)
    growkern.expand_inplace(model)


def a_stranger():
    model = make("llama", tied=True)
    growkern.expand_inplace(model, torch.optim.AdamW(torch.nn.Linear(2, 2).parameters()))


def a_tied_head_outside():
    model = make("llama", tied=True)
    head = torch.nn.Linear(24, 66, bias=False)
    head.weight = model.lm_head.weight
    growkern.expand_inplace(model)
    assert head


def an_average():
    model = make("llama", tied=True)
    average = torch.optim.swa_utils.AveragedModel(model)
    growkern.expand_inplace(model)
    assert average


def on_the_meta_device():
    growkern.expand_inplace(make("llama", tied=True).to("meta"))


def an_old_checkpoint():
    model = make("llama", tied=True)
    before = copy.deepcopy(model.state_dict())
    growkern.expand_inplace(model)
    model.load_state_dict(before)


def another_model():
    plan = growkern.plan(make("llama", tied=True))
    growkern.expand_inplace(make("gpt2", tied=True), plan=plan)


def in_the_wrong_order():
    model = make("llama", tied=True)
    start = copy.deepcopy(model)
    growkern.expand_inplace(model, to="2x")
    growkern.expand_inplace(model, to={"layers": 4})
    growkern.resume(start, None, model.config.growkern_history[::-1])


def a_later_record():
    record = json.loads(GrowthRecord.of(growkern.plan(make("llama", tied=True))).to_json())
    growkern.resume(make("llama", tied=True), None, [json.dumps(record | {"version": 9})])


def an_unknown_class():
    class Own(torch.optim.Adam):
        pass

    model = make("llama", tied=True)
    optim = Own(model.parameters(), lr=1e-3)
    train(model, optim, 1)
    growkern.expand_inplace(model, optim)


def twice_attached():
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        schedule = growkern.GrowthSchedule([growkern.At(step=1)])
        schedule.attach(model, optim)


ERRORS = {  # what is done, what the error must name, and the way out that it must offer
    "a size that there is not": (lambda: grow(to={"hiden": 48}), "'hiden'", "did you mean 'hidden'"),
    "a size that is smaller": (lambda: grow(to={"ffn": 20}), "ffn: the target 20", "shrink_inplace"),
    "a factor that is none": (lambda: grow(to="twice"), "'twice'", "such as '2x'"),
    "a width that is not whole": (lambda: grow(to={"ffn": "1.33x"}), "1.33x of 40", r"nearest: 53, 54"),
    "nothing grows": (lambda: grow(to={"hidden": 24}), "equals its source", "name a larger size"),
    "heads that do not fit": (lambda: grow(to={"heads": 5}), "heads: 5", r"nearest: 4, 6"),
    "post-norm": (lambda: grow("bert", to={"hidden": 36}), "hidden 24 to 36", "nearest whole multiples: 24, 48"),
    "norms of another kind": (lambda: grow(width=width.Lossless(norms="mean_pad")), "mean_pad", "these are rms norms"),
    "norms that ask for copies": (lambda: grow(width=width.Lossless(norms="isometric")), "isometric", "pass their noise="),
    "a depth method as width": (lambda: grow(width=depth.Stack()), "Stack", "takes it as depth="),
    "a way to shrink as width": (lambda: grow(width=shrink.FirstCopies()), "FirstCopies", "shrink_inplace takes it"),
    "a state that there is not": (lambda: grow(state="keep"), "'keep'", "'exact', "),
    "a plan and a wish": (
        lambda: grow(plan=growkern.plan(make("llama", tied=True)), to="3x"), "plan", "leave to=, width="),
    "no plan at all": (lambda: grow(plan={}), "dict", r"GrowthPlan\.from_json"),
    "a plan for another model": (another_model, "the plan is for a llama", "plan anew"),
    "a plan of a later version": (
        lambda: GrowthPlan.from_json('{"version": 9}'), "version 9", "install the growkern that wrote it"),
    "a record of a later version": (a_later_record, "version 9", "install the growkern that wrote"),
    "a history in the wrong order": (in_the_wrong_order, "growth 2 of 2 does not fit", "growth 1 ends at"),
    "an optimizer that was forgotten": (another_optimizer, "AdamW", "Pass it as optim"),
    "an optimizer of another model": (a_stranger, "no parameter of this LlamaForCausalLM", "pass the optimizer that trains it"),
    "an optimizer that is not known": (an_unknown_class, "Own", "state_rules="),
    "a head outside": (a_tied_head_outside, r"Linear \(model.embed_tokens.weight\)", "Pass the whole model"),
    "an average that was forgotten": (an_average, "AveragedModel", "pass it as ema="),
    "no weights": (on_the_meta_device, "model.embed_tokens.weight: is on the meta device", "load the weights first"),
    "a model that is not known": (lambda: growkern.expand_inplace(torch.nn.Linear(2, 2)), "Linear", "spec="),
    "an old checkpoint": (an_old_checkpoint, r"growth 1 \(hidden 24 -> 48", "Load it into a model as it was, then grow"),
    "a vocabulary by a width method": (
        lambda: grow(to={"vocab": 80}), r"vocab: Lossless does not grow it \(66 -> 80\)", r"growkern\.vocab grows vocab"),
    "a vocabulary that is another": (
        lambda: grow(to={"vocab": 80, "hidden": 48}, width=vocab.Zero()), "hidden: Zero does not grow it",
        "width.Lossless grows hidden, in a call of its own"),
    "two schedules": (twice_attached, "a schedule of 1 events drives this AdamW", r"into one schedule, or remove\(\)"),
    "a scheduler that is none": (lambda: trained(to="2x", scheduler=object()), "object", "expected a torch.optim.lr_scheduler"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "names", "way_out"), ERRORS.values(), ids=ERRORS)
def test_an_error_names_what_is_at_fault_and_offers_a_way_out(call, names, way_out):
    with pytest.raises(GrowthError) as raised:
        call()

    said = str(raised.value)
    assert raised.match(names) and raised.match(way_out)
    assert len(said.splitlines()) <= 9 and said[0].islower()
