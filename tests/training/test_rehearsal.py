"""A schedule is planned when it is attached: a growth that would fail at its step, and what it would leave behind, is said at once."""

import copy
import gc

import pytest
import torch
from models import FAMILIES, batch, loss_of, make, spec_of
from states import same, state_of
from torch import nn

import growkern
from growkern import At, GrowthSchedule, WhenPlateau, width
from growkern.errors import PlanError

WIDER, DEEPER = {"hidden": 48}, {"layers": 4}


def started(**options):
    model = make("llama", tied=True, **options)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def refused(events, match, model=None, optim=None, **options):
    """Attach a schedule that is refused, and see that nothing has changed."""
    if model is None:
        model, optim = started()
    before = state_of(model, optim)
    schedule = GrowthSchedule(events)
    with pytest.raises(PlanError, match=match) as error:
        schedule.attach(model, optim, **options)
    assert schedule.attachment is None and same(state_of(model, optim), before)
    assert not optim._optimizer_step_post_hooks and not optim._optimizer_step_pre_hooks
    return str(error.value)


@pytest.mark.parametrize(
    ("events", "match"),
    [
        ([At(step=5, to={"hidden": 49})], "hidden=49 at step 5"),
        ([At(step=5, to={"hidden": 50})], "save_pretrained refuses .* hidden"),
        ([At(step=5, to=WIDER), At(step=9, to={"heads": 9})], "heads=9 at step 9"),
        ([At(step=5, to=DEEPER), At(step=9, to={"hidden": 36}, width=width.HyperClone())], "at step 9"),
        ([WhenPlateau(patience=2, to=WIDER), At(step=9, to={"hidden": 97})], "hidden=97 at step 9"),
    ],
    ids=["heads", "saving", "second", "method", "plateau"],
)  # fmt: skip
def test_an_event_that_cannot_happen_is_refused_when_it_is_attached(events, match):
    """The second event starts at the sizes of the first."""
    refused(events, match)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_rehearsed_through_two_events(family):
    model = make(family, tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sizes = growkern.describe(model, spec_of(model)).sizes
    events = [At(step=1, to={"layers": 2 * sizes["layers"]}), At(step=2, to="2x")]
    if family == "modernbert":
        events = events[1:]  # its layers alternate, and grow by whole periods
    before = copy.deepcopy(model.state_dict())
    schedule = GrowthSchedule(events)
    spec = {"spec": spec_of} if spec_of(model) is not None else {}
    schedule.attach(model, optim, **spec)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    schedule.attachment.remove()
    odd = At(step=3, to={"hidden": 2 * sizes["hidden"] + 1}, width=width.HyperClone())
    with pytest.raises(PlanError, match="at step 3"):
        GrowthSchedule([*events, odd]).attach(model, optim, **spec)


def test_all_reasons_are_said_at_once():
    class Mine(torch.optim.AdamW):
        pass

    class EMAModel:  # as that of diffusers
        def __init__(self, params):
            self.shadow_params = [p.clone().detach() for p in params]

    model, _ = started()
    average = EMAModel(model.parameters())
    said = refused([At(step=5, to={"hidden": 49})], "hidden=49", model, Mine(model.parameters()))
    assert "Mine is not known" in said and "EMAModel.shadow_params" in said and "hidden=49" in said
    assert average.shadow_params


@pytest.mark.slow
def test_optimizers_that_keep_no_state_say_so():
    class Sign(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 1e-3})

        @torch.no_grad()
        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(group["lr"] * p.grad.sign())

    model, _ = started()
    optim = Sign(model.parameters())
    refused([At(step=1)], r"Sign is not known.*state_rules=", model, optim)
    GrowthSchedule([At(step=1)]).attach(model, optim, state_rules={})
    loss_of(model, batch()).backward()
    optim.step()
    assert model.config.hidden_size == 48


def test_an_optimizer_of_an_unknown_law_may_grow_if_every_event_drops_its_state():
    class Mine(torch.optim.AdamW):
        pass

    model, _ = started()
    optim = Mine(model.parameters())
    for states in (["drop", "exact"], ["exact", "drop"]):
        events = [At(step=5, to=WIDER, state=states[0]), At(step=9, to=DEEPER, state=states[1])]
        refused(events, "Mine is not known", model, optim)
    events = [At(step=5, to=WIDER, state="drop"), At(step=9, to=DEEPER, state="drop")]
    GrowthSchedule(events).attach(model, optim)


def test_an_average_that_nothing_refers_to_is_no_reason():
    class EMAModel:
        def __init__(self, params):
            self.shadow_params = [p.clone().detach() for p in params]
            self.itself = self  # only the garbage collector frees it

    model, optim = started()
    gc.disable()
    try:
        EMAModel(model.parameters())
        GrowthSchedule([At(step=5)]).attach(model, optim)
    finally:
        gc.enable()


class ModelEmaV2(nn.Module):
    """As that of timm: a copy of the model under ``module``."""

    def __init__(self, model):
        super().__init__()
        self.module = copy.deepcopy(model).eval()


class EMA(nn.Module):
    """As that of lucidrains: a copy of the model under ``ema_model``."""

    def __init__(self, model):
        super().__init__()
        self.online_model = [model]
        self.ema_model = copy.deepcopy(model)


@pytest.mark.parametrize("kind", [ModelEmaV2, EMA, torch.optim.swa_utils.AveragedModel])
def test_averages_of_every_library_are_found_and_grow_if_they_are_passed(kind):
    model, optim = started()
    average = kind(model)
    refused([At(step=1)], f"{kind.__name__} of a LlamaForCausalLM .* ema=", model, optim)
    with pytest.raises(growkern.errors.UnsupportedModelError, match="pass the average as ema="):
        growkern.expand_inplace(model, optim)

    schedule = GrowthSchedule([At(step=1)])
    schedule.attach(model, optim, ema=average)
    loss_of(model, batch()).backward()
    optim.step()
    assert schedule.fired == [1]
    assert {p.shape for p in average.parameters()} == {p.shape for p in model.parameters()}


def test_another_optimizer_with_state_is_refused_when_a_schedule_is_attached():
    model, other = started()
    loss_of(model, batch()).backward()
    other.step()
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    refused([At(step=5)], "another live optimizer has state", model, optim)


@pytest.mark.parametrize("hidden", [48, 72])
def test_a_model_that_has_reached_the_sizes_of_events_may_be_attached(hidden):
    """The schedule's state is loaded after it is attached."""
    model, optim = started()
    growkern.expand_inplace(model, optim, to={"hidden": hidden})
    wider = [At(step=1, to=WIDER), At(step=2, to={"hidden": 72})]
    schedule = GrowthSchedule([*wider, At(step=3, to=DEEPER)])
    schedule.attach(model, optim)
    assert schedule.attachment is not None


def test_a_model_that_cannot_be_copied_is_planned_at_its_steps():
    class Uncopied:
        def __deepcopy__(self, memo):
            raise TypeError("no copy")

    model, optim = started()
    model.tracker = Uncopied()
    GrowthSchedule([At(step=5, to=WIDER)]).attach(model, optim)


@pytest.mark.parametrize("kind", ["closes over the model", "reads a value"])
def test_a_spec_that_a_copy_without_values_cannot_answer_is_asked_at_the_steps(kind):
    model = make("plain", tied=True)
    model.register_buffer("n", torch.tensor(4), persistent=False)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def spec(given):
        return model.spec() if kind == "closes over the model" else (int(given.n), given.spec())[1]

    schedule = GrowthSchedule([At(step=1, to={"ffn": 192}), At(step=2, to={"ffn": 384})])
    schedule.attach(model, optim, spec=spec)
    for seed in range(2):
        loss_of(model, batch(seed)).backward()
        optim.step()
        optim.zero_grad()
    assert schedule.fired == [1, 2]


def test_other_parts_in_the_same_optimizer_that_read_the_model_are_refused():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = make("bert", tied=True), nn.Linear(24, 3)

    whole = Classifier()
    optim = torch.optim.AdamW(whole.parameters(), lr=1e-3)
    before = state_of(whole.body, optim)
    with pytest.raises(growkern.errors.UnsupportedModelError, match=r"part of a Classifier.*head\.weight"):  # fmt: skip
        growkern.expand_inplace(whole.body, optim)
    assert same(state_of(whole.body, optim), before)

    growkern.expand_inplace(whole.body, optim, to={"ffn": 80, "layers": 3})  # hidden stays
    assert whole.body.config.num_hidden_layers == 3
    own = torch.optim.AdamW(whole.body.parameters(), lr=1e-3)
    optim.state.clear()
    growkern.expand_inplace(whole.body, own)
    assert whole.body.config.hidden_size == 48


def test_a_backend_that_cannot_run_is_refused_when_it_is_attached():
    refused([At(step=5, to=WIDER)], "backend='cuda13' is unknown", backend="cuda13")


class Own(torch.optim.AdamW):
    """An optimizer whose law growkern does not know."""


@pytest.mark.parametrize(
    ("events", "rules", "match"),
    [
        ([At(step=5, to={"hidden": 24})], None, "hidden=24 at step 5: the model has these sizes already"),
        ([At(step=5, to={"layers": 1})], None, "layers=1 at step 5: the model has these sizes already"),
        ([At(step=5, to=WIDER)], {"exp_avg": 1, "exp_avg_sq": 2}, "unknown state 'step'"),
        ([At(step=5, to=WIDER)], {"exp_avg": 1, "exp_avg_sq": 2, "step": None, "stp": None}, "no parameter has the state stp"),
        ([At(step=5, to=WIDER)], {}, "unknown state 'exp_avg'|unknown state 'step'"),
    ],
    ids=["same", "smaller", "forgotten", "typo", "stateless"],
)  # fmt: skip
def test_what_only_the_first_step_tells_is_said_at_the_first_step(events, rules, match):
    model = make("llama", tied=True)
    optim = (Own if rules is not None else torch.optim.AdamW)(model.parameters(), lr=1e-3)
    GrowthSchedule(events).attach(model, optim, state_rules=rules)
    loss_of(model, batch()).backward()

    with pytest.raises(PlanError, match=match):
        optim.step()


def test_optimizers_that_step_inside_a_backward_are_refused_at_the_first_step():
    model = make("llama", tied=True)
    optims = {p: torch.optim.AdamW([p], lr=1e-3) for p in model.parameters()}
    GrowthSchedule([At(step=5, to=WIDER)]).attach(model, [*optims.values()])

    def steps(p):
        optims[p].step()
        optims[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(steps)

    with pytest.raises(PlanError, match="an optimizer steps inside a backward"):
        loss_of(model, batch()).backward()
