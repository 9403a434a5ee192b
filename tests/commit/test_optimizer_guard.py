"""Learning-rate factors are never lost: by a state dict, a copy, a merge of split groups, or a file that never had them."""

import copy
import math

import pytest
import torch
import torch.distributed.checkpoint as dcp
from models import batch, loss_of, make, train
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

import growkern
from growkern import At, GrowthSchedule, width
from growkern.commit.optimizer_guard import history_in
from growkern.errors import PlanError
from growkern.optimizer.update_scale import scale_of

KINDS = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9),
    "two groups": lambda model: torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=1e-2,
    ),
    "growkern": lambda model: growkern.optim.AdamW(model.parameters(), lr=1e-2),
}


def started(kind="adamw", **growth):
    """Return a model and its optimizer, trained, grown and trained again."""
    model = make("llama", tied=False).double()
    optim = KINDS[kind](model)
    train(model, optim, 2)
    growkern.expand_inplace(model, optim, width=width.Net2Wider(), **growth)
    train(model, optim, 2)
    return model, optim


def fresh(model, kind="adamw"):
    """Return a new model of the grown model's config with the grown weights, and a new optimizer."""
    again = type(model)(model.config).double()
    again.load_state_dict(model.state_dict())
    return again, KINDS[kind](again)


def goes_on(model, optim, steps=3):
    """Return the losses of further steps."""
    losses = []
    for i in range(steps):
        loss = loss_of(model, batch(50 + i))
        optim.zero_grad()
        loss.backward()
        optim.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("dynamics", ["mup", "exact"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_alone_continues_the_run(kind, dynamics, tmp_path):
    """The file passes ``weights_only=True``; a second file, saved before any step, is as good as the first."""
    model, optim = started(kind, dynamics=dynamics)
    torch.save(optim.state_dict(), tmp_path / "optim.pt")
    again, other = fresh(model, kind)
    other.load_state_dict(torch.load(tmp_path / "optim.pt"))
    third, last = fresh(model, kind)
    last.load_state_dict(copy.deepcopy(other.state_dict()))

    expected = goes_on(model, optim)
    assert goes_on(again, other) == expected
    assert goes_on(third, last) == expected


def test_a_grown_optimizer_that_loads_takes_over_the_factors_of_the_file(tmp_path):
    model, optim = started()
    saved = copy.deepcopy(optim.state_dict())
    growkern.UpdateScale.remove(scale_of(optim))
    assert scale_of(optim) is None
    optim.load_state_dict(saved)
    train(model, optim, 1)
    assert scale_of(optim).scales

    plain, other = make("llama", tied=False).double(), None
    other = KINDS["adamw"](plain)
    train(plain, other, 2)
    growkern.expand_inplace(plain, other, width=width.Net2Wider(), dynamics=None)
    optim.load_state_dict(copy.deepcopy(other.state_dict()))
    train(model, optim, 1)
    assert not scale_of(optim).scales


def test_factors_survive_a_growth_right_after_the_load():
    model, optim = started()
    again, other = fresh(model)
    other.load_state_dict(copy.deepcopy(optim.state_dict()))
    for one, its in ((model, optim), (again, other)):
        growkern.expand_inplace(one, its, to={"ffn": "2x"}, seed=1)
    assert goes_on(again, other) == goes_on(model, optim)


def test_every_group_has_a_factor_of_its_rate():
    model, optim = started("two groups")
    assert [group["lr_factor"] for group in optim.param_groups] == [1.0, 1.0]

    model = make("llama", tied=False)
    optim = KINDS["two groups"](model)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optim, factor=1.0)
    train(model, optim, 1)
    growkern.expand_inplace(model, optim, width=width.HyperClone(), scheduler=scheduler)
    rates = [group["lr"] / group["lr_factor"] for group in optim.param_groups]
    assert len(rates) > 2 and rates == pytest.approx([1e-2] * len(rates))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("scheduled", [False, True], ids=["scaled", "split"])
@pytest.mark.parametrize("stored", [False, True], ids=["memory", "disk"])
def test_distributed_checkpoints_continue_the_run_or_are_refused(scheduled, stored, tmp_path):
    model = make("llama", tied=False).double()
    optim = KINDS["adamw"](model)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optim, factor=1.0) if scheduled else None
    train(model, optim, 2)
    growkern.expand_inplace(model, optim, width=width.HyperClone(), scheduler=scheduler)
    train(model, optim, 1)
    saved = copy.deepcopy(get_state_dict(model, optim))
    again, other = fresh(model)
    if stored:
        dcp.save(dict(zip("mo", saved, strict=True)), checkpoint_id=tmp_path, no_dist=True)
        into = dict(zip("mo", get_state_dict(again, other), strict=True))
        dcp.load(into, checkpoint_id=tmp_path, no_dist=True)
        saved = into["m"], into["o"]
    set_state_dict(again, other, model_state_dict=saved[0], optim_state_dict=saved[1])
    # on disk, the new optimizer's state dict was the template, which has no place for factors
    why = "no learning-rate factors" if stored else "a growth had split the groups"
    if scheduled or stored:
        with pytest.raises(PlanError, match=why):
            goes_on(again, other)
    else:
        assert goes_on(again, other) == goes_on(model, optim)


def without_factors(state_dict):
    """Return a state dict as files were before they contained factors."""
    saved = copy.deepcopy(state_dict)
    for group in saved["param_groups"]:
        for key in ("lr_factor", "update_scale", "growth"):
            del group[key]
    return saved


def test_state_of_a_grown_model_without_factors_is_refused_at_attach_and_at_the_first_step():
    model, optim = started()
    again, other = fresh(model)
    other.load_state_dict(without_factors(optim.state_dict()))
    before = copy.deepcopy(again.state_dict())
    for call in (
        lambda: goes_on(again, other),
        lambda: growkern.GrowthSchedule([growkern.At(step=9)]).attach(again, other),
    ):
        with pytest.raises(PlanError, match=r"growkern\.resume.*lr_factor"):
            call()
    assert all(torch.equal(t, before[name]) for name, t in again.state_dict().items())

    for group in other.param_groups:  # the way out that the error names
        group["lr_factor"] = 1.0
    assert all(map(math.isfinite, goes_on(again, other)))


@pytest.mark.parametrize("rate", [1e-2, 0.0], ids=["trains", "warms up from zero"])
def test_an_optimizer_that_begins_with_a_grown_model_trains_and_resumes(rate):
    model, _ = started()
    again, other = fresh(model)
    other.param_groups[0]["lr"] = rate
    goes_on(again, other)
    other.param_groups[0]["lr"] = 1e-2
    goes_on(again, other, 1)
    third, last = fresh(again)
    last.load_state_dict(copy.deepcopy(other.state_dict()))
    assert goes_on(third, last) == goes_on(again, other)


def test_a_copy_that_lost_its_hooks_does_not_step():
    model, optim = started()
    again, other = copy.deepcopy((model, optim))
    before = copy.deepcopy(again.state_dict())
    with pytest.raises(PlanError, match="load the original's state_dict"):
        goes_on(again, other)
    assert all(torch.equal(t, before[name]) for name, t in again.state_dict().items())

    other.load_state_dict(copy.deepcopy(optim.state_dict()))
    assert goes_on(again, other) == goes_on(model, optim)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda entry: entry.update(scales=5),
        lambda entry: entry["scales"].update({999: next(iter(entry["scales"].values()))}),
        lambda entry: next(iter(entry["scales"].values())).update(gain=float("nan")),
        lambda entry: next(iter(entry["scales"].values())).update(other=1),
        lambda entry: next(iter(entry["scales"].values())).update(update=(2.0,) * 5),
    ],
    ids=["number", "place", "nan", "field", "axes"],
)
def test_spoiled_factors_of_a_state_dict_are_refused(spoil):
    model, optim = started()
    again, other = fresh(model)
    saved = copy.deepcopy(optim.state_dict())
    spoil(saved["param_groups"][0]["update_scale"])
    other.load_state_dict(saved)
    with pytest.raises(PlanError, match="factor"):
        goes_on(again, other)


def two_groups(model, *, backwards=False):
    """Return AdamW with decay for matrices only; ``backwards``: the parameters of each group in reverse order."""
    parts = [[p for p in model.parameters() if (p.dim() == 2) == wide] for wide in (True, False)]
    parts = [part[::-1] for part in parts] if backwards else parts
    return torch.optim.AdamW([{"params": part, "weight_decay": 0.1 * (i == 0)} for i, part in enumerate(parts)], lr=1e-2)  # fmt: skip


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("backwards", [False, True])
def test_factors_by_position_do_not_meet_parameters_in_another_order(backwards):
    """``torch.distributed.checkpoint`` stores state by name, so it loads into groups that list their parameters in another order."""
    model = make("llama", tied=False).double()
    optim = two_groups(model)
    train(model, optim, 2)
    growkern.expand_inplace(
        model, optim, to={"hidden": 48}, width=width.HyperClone(), dynamics="exact"
    )
    saved = copy.deepcopy(get_state_dict(model, optim))
    again = type(model)(copy.deepcopy(model.config)).double()
    other = two_groups(again, backwards=backwards)
    set_state_dict(again, other, model_state_dict=saved[0], optim_state_dict=saved[1])

    if backwards:
        with pytest.raises(PlanError, match="list the parameters in another order"):
            goes_on(again, other)
    else:
        assert goes_on(again, other) == goes_on(model, optim)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("dynamics", ["mup", "exact", None])
def test_full_state_dicts_of_distributed_checkpoints_continue_a_resumed_run(dynamics):
    model = make("llama", tied=False).double()
    optim = two_groups(model)
    train(model, optim, 2)
    growkern.expand_inplace(model, optim, width=width.HyperClone(), dynamics=dynamics)
    full = StateDictOptions(full_state_dict=True)
    saved = copy.deepcopy(get_state_dict(model, optim, options=full))
    again = make("llama", tied=False).double()
    other = two_groups(again)
    growkern.resume(again, other, model.config.growkern_history)
    set_state_dict(again, other, model_state_dict=saved[0], optim_state_dict=saved[1], options=full)

    assert goes_on(again, other) == goes_on(model, optim)


def test_a_state_dict_that_is_saved_again_before_a_step_keeps_its_growths():
    model, optim = started()
    saved = copy.deepcopy(optim.state_dict())
    again, other = fresh(model)
    GrowthSchedule([At(step=100, to={"layers": 4})]).attach(again, other)
    other.load_state_dict(copy.deepcopy(saved))

    assert history_in(other.state_dict()) == history_in(saved) != []


def unfrozen(kind, growth, held):
    """Grow with a frozen block and train it afterwards: in the optimizer from the start (``held``), or in a group that is added later."""
    model = make("llama", tied=False).double()
    block = [*model.model.layers[0].parameters()]
    for p in block:
        p.requires_grad_(False)
    optim = kind([p for p in model.parameters() if held or p.requires_grad], lr=1e-2)
    train(model, optim, 2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optim, lambda step: 1.0) if growth.pop("scheduled", False) else None  # fmt: skip
    report = growkern.expand_inplace(model, optim, width=width.Lossless(noise=0), scheduler=scheduler, **growth)  # fmt: skip
    train(model, optim, 1)
    for p in block:
        p.requires_grad_()
    return model, optim, block, report


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize(
    "growth", [{}, {"dynamics": "exact"}, {"scheduled": True}], ids=["mup", "exact", "groups"]
)
def test_parameters_that_join_after_a_growth_are_refused_without_a_factor(kind, growth):
    model, optim, block, report = unfrozen(kind, dict(growth), held=False)
    assert any("into a param group before the growth" in note for note in report.notes)
    optim.add_param_group({"params": block, "lr": 1e-2})
    before = [p.detach().clone() for p in model.parameters()]

    loss_of(model, batch()).backward()
    with pytest.raises(PlanError, match=r"\(such as model.layers.0.*lr_factor=1.0"):
        optim.step()

    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    optim.param_groups[-1]["lr_factor"] = 1.0
    optim.step()


def test_frozen_parameters_of_a_group_and_other_groups_join_without_a_word():
    model, optim, _, report = unfrozen(torch.optim.AdamW, {}, held=True)
    assert not any("into a param group before the growth" in note for note in report.notes)
    optim.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})  # a new head
    goes_on(model, optim, 1)
    for options in ({"dynamics": None}, {"to": {"layers": 3}}):  # no factors
        model, optim, block, _ = unfrozen(torch.optim.AdamW, options, held=False)
        optim.add_param_group({"params": block})
        goes_on(model, optim, 1)
