"""Stage 1 of bert2BERT: a step is the step of a stock model of the lowest blocks, of which the top blocks and the head train."""

import copy

import pytest
import torch
from models import batch, loss_of, make
from scheduled import optimizer, same_weights
from scheduled import run as train

import growkern
from growkern import trains
from growkern.errors import PlanError
from growkern.training.schedule import GrowthSchedule
from growkern.training.trains import flops_per_token
from growkern.training.triggers import At

STACKS = {
    "llama": ("model", "layers"),
    "bert": ("bert.encoder", "layer"),
    "gpt2": ("transformer", "h"),
}
LATER = [At(step=1000, to=None)]


def deep(family: str, n: int = 6, tied: bool = True) -> torch.nn.Module:
    key = "n_layer" if family == "gpt2" else "num_hidden_layers"
    return make(family, tied=tied, **{key: n}).train()


def attached(model, size: int = 2, seed: int = 0, **optim_options):
    optim = optimizer(model, **optim_options)
    schedule = GrowthSchedule(LATER, trains=trains.SubModels(size, seed=seed))
    return optim, schedule, schedule.attach(model, optim)


def blocks_that_train(model, family: str) -> list[int]:
    owner, name = STACKS[family]
    blocks = getattr(model.get_submodule(owner), name)
    return [i for i, b in enumerate(blocks) if any(p.requires_grad for p in b.parameters())]


def cut(model, family: str, n: int) -> torch.nn.Module:
    """Return a stock copy of a model with its lowest blocks only, of which everything trains."""
    other = copy.deepcopy(model)
    trains.All().apply(other)
    owner, name = STACKS[family]
    place = other.get_submodule(owner)
    setattr(place, name, torch.nn.ModuleList([*getattr(place, name)][:n]))
    if family == "llama":
        other.config.num_hidden_layers = n
    return other


def gradients(model) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(1)
    loss = loss_of(model, batch(seed=1))
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}  # fmt: skip


@pytest.mark.parametrize("family", STACKS)
def test_loss_and_gradients_are_those_of_the_cut_model(family):
    model = deep(family, tied=False)
    optim, _, _ = attached(model)
    seen = set()
    for i in range(6):
        own = blocks_that_train(model, family)
        assert own == [own[0], own[0] + 1]
        loss, grads = gradients(model)
        expected_loss, expected = gradients(cut(model, family, own[-1] + 1))
        assert loss == expected_loss
        assert grads.keys() < expected.keys()
        assert all(torch.equal(g, expected[name]) for name, g in grads.items())
        assert len(dict(model.named_parameters())) > len(expected) or own[-1] == 5
        seen.add(own[0])
        train(model, optim, 1, first=i)
    assert len(seen) > 1


def test_sub_models_cost_what_the_top_of_the_cut_model_costs():
    model = deep("llama", tied=False)
    spec = growkern.describe(model)
    for frozen in trains.SubModels(2).choices(spec, ()):
        small = cut(model, "llama", frozen.n_blocks)
        own = growkern.describe(small)
        expected = flops_per_token(small, own, trains.Top(2).frozen(own, ()))
        assert flops_per_token(model, spec, frozen) == expected


def test_a_block_steps_when_it_is_drawn_and_the_head_always():
    model = deep("llama", tied=False)
    optim, _, _ = attached(model)
    drawn = []
    hook = optim.register_step_pre_hook(lambda *_: drawn.append(blocks_that_train(model, "llama")))

    train(model, optim, 30)

    hook.remove()
    for i, block in enumerate(model.model.layers):
        n = sum(i in own for own in drawn)
        steps = {int(optim.state[p]["step"]) for p in block.parameters()}
        assert steps == {n} and 4 <= n <= 16  # 10 of 30 are expected
    assert int(optim.state[model.lm_head.weight]["step"]) == 30
    assert model.model.embed_tokens.weight not in optim.state


def test_draws_depend_on_the_seed_and_on_the_number_of_the_step_alone():
    def draws(seed: int, start: int = 0) -> list[int]:
        spec = growkern.describe(deep("llama"))
        who = trains.SubModels(2, seed=seed)
        return [who.frozen(spec, (), i).n_blocks for i in range(start, 60)]

    assert draws(0) == draws(0) != draws(1)
    assert draws(0, 30) == draws(0)[30:]
    assert {*draws(0)} == {2, 4, 6} and min(map(draws(0).count, (2, 4, 6))) >= 10


def test_sub_models_of_the_whole_depth_are_the_top_of_all_blocks():
    one, other = deep("llama", 4), deep("llama", 4)
    optim, _, _ = attached(one, 4)
    by_hand = optimizer(other)
    trains.Top(4).apply(other)

    train(one, optim, 4)
    train(other, by_hand, 4)

    same_weights(one, other)


def test_the_whole_model_is_evaluated_and_errors_leave_it_whole():
    model = deep("llama")
    attached(model, seed=1)
    assert blocks_that_train(model, "llama") != [4, 5]
    whole = deep("llama").eval()
    with torch.no_grad():
        assert torch.equal(model.eval()(batch()).logits, whole(batch()).logits)
    model.train()

    def boom(*_):
        raise RuntimeError("boom")

    hook = model.lm_head.register_forward_pre_hook(boom)
    with pytest.raises(RuntimeError, match="boom"):
        model(batch())
    hook.remove()
    assert len(model.model.layers) == 6 and len([*model.named_parameters()]) == len([*whole.named_parameters()])  # fmt: skip


def test_a_resumed_run_goes_on_as_the_unbroken_one():
    whole = deep("llama")
    optim, schedule, _ = attached(whole)
    train(whole, optim, 9)

    first = deep("llama")
    optim, schedule, _ = attached(first)
    train(first, optim, 4)
    saved = copy.deepcopy((first.state_dict(), optim.state_dict(), schedule.state_dict()))

    model = make("llama", tied=True, num_hidden_layers=6, seed=1).train()
    optim = optimizer(model)
    model.load_state_dict(saved[0])
    optim.load_state_dict(saved[1])
    again = GrowthSchedule(LATER, trains=trains.SubModels(2))
    again.load_state_dict(saved[2])
    again.attach(model, optim)
    train(model, optim, 5, first=4)

    same_weights(model, whole)


@pytest.mark.slow
def test_a_compiled_model_has_a_graph_per_sub_model_and_the_losses_of_an_eager_one():
    def losses(compiled: bool) -> list[float]:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = deep("llama", 4)
        optim, _, _ = attached(model)
        forward = torch.compile(model, backend="eager") if compiled else model
        found = []
        for i in range(8):
            ids = batch(seed=i)
            optim.zero_grad()
            logits = forward(ids).logits[:, :-1].flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
            loss.backward()
            optim.step()
            found.append(loss.item())
        return found

    assert losses(True) == losses(False)
    losses(True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]


def test_what_cannot_be_divided_or_applied_by_hand_is_refused():
    model = deep("llama")
    with pytest.raises(PlanError, match="6 blocks do not divide into sub-models of 4"):
        attached(model, 4)
    with pytest.raises(PlanError, match="two stacks"):
        GrowthSchedule(LATER, trains=trains.SubModels(1)).attach(
            t5 := make("t5", tied=True), optimizer(t5)
        )
    with pytest.raises(PlanError, match="pass it to a GrowthSchedule"):
        trains.SubModels(2).apply(model)
    with pytest.raises(PlanError, match="size=0 blocks"):
        trains.SubModels(0)
