"""Who trains: gradients, FLOPs and memory are those of a stock model whose graph is cut by hand, and a frozen weight never moves."""

import copy
import pickle
import re
from dataclasses import replace

import pytest
import torch
from models import FAMILIES, Plain, batch, loss_of, make, run, spec_of
from scheduled import optimizer, same_weights
from scheduled import run as train
from torch.utils.flop_counter import FlopCounterMode

import growkern
from growkern import depth, trains
from growkern.errors import GrowthError, PlanError, UnsupportedModelError
from growkern.training.schedule import GrowthSchedule
from growkern.training.triggers import At

LAYERS = {"llama": "model.layers", "bert": "bert.encoder.layer", "gpt2": "transformer.h"}
STACK = dict(depth=depth.Stack())


def deep(family: str, tied: bool, n: int = 12, **changes) -> torch.nn.Module:
    key = "n_layer" if family == "gpt2" else "num_hidden_layers"
    return make(family, tied=tied, **{key: n}, **changes).train()


def backward(model, seed: int = 1) -> tuple[float, int, int, dict[str, torch.Tensor]]:
    """Return loss, FLOPs of the backward, bytes of the saved activations, and gradients."""
    model.zero_grad()
    torch.manual_seed(seed)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = loss_of(model, batch(seed=seed, n=4))
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), counter.get_total_flops(), sum(saved.values()), grads


def cut_by_hand(model, path: str, first: int) -> None:
    """Detach the input of a block of a stock model; all parameters go on requiring gradients."""

    def detach(module, args, kwargs):
        args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
        return args, {
            k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()
        }

    model.get_submodule(path)[first].register_forward_pre_hook(detach, with_kwargs=True)


@pytest.mark.parametrize(
    ("family", "tied"), [("llama", True), ("llama", False), ("bert", True), ("gpt2", True)]
)
def test_the_top_trains_as_in_a_stock_model_that_is_cut_there(family, tied):
    """Of 12 blocks, 3 train: 0.26 to 0.28 of the FLOPs and of the saved activations, as README says."""
    dropout = {"attention_dropout": 0.1} if family == "llama" else {}
    model = deep(family, tied, **dropout)
    whole = backward(model)
    cut = copy.deepcopy(model)
    cut_by_hand(cut, LAYERS[family], 9)
    expected = backward(cut)

    trains.Top(3).apply(model)
    found = backward(model)

    assert found[0] == expected[0] == whole[0]  # the forward, with its dropout
    assert found[1] == expected[1] and 0.255 < found[1] / whole[1] < 0.285
    assert 0.255 < found[2] / whole[2] < 0.285
    assert found[3].keys() == expected[3].keys() and len(found[3]) >= 19
    assert all(torch.equal(g, expected[3][name]) for name, g in found[3].items())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_below_is_what_the_input_of_the_block_depends_on(family):
    """The parameters that autograd reaches from the input of the upper block are below, and all others train."""
    model = make(family, tied=False)
    spec = spec_of(model) or growkern.describe(model)
    if spec.extra_stacks:
        with pytest.raises(PlanError, match=r"two stacks \(encoder.block and decoder.block\)"):
            trains.Top(1).apply(model)
        return
    block = model.get_submodule(spec.blocks.path)[-1]
    seen = []
    hook = block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    run(model, batch())
    hook.remove()
    reached, ahead = set(), [seen[0].grad_fn]
    while ahead:
        node = ahead.pop()
        if node in reached:
            continue
        reached.add(node)
        ahead += [other for other, _ in node.next_functions if other is not None]
    below = {node.variable for node in reached if hasattr(node, "variable")}

    trains.Top(1).apply(model, spec=spec)

    assert below == {p for p in model.parameters() if not p.requires_grad}


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_new_blocks_train_alone_wherever_they_are(family):
    """T5 too: its blocks are new in the encoder."""
    model = make(family, tied=True).train()
    report = growkern.expand_inplace(model, to={"layers": 4}, **STACK)
    stock = backward(model)

    trains.New().apply(model, report)
    found = backward(model)

    own = {n for n, _ in model.named_parameters() if n.startswith(tuple(f"{b}." for b in report.new_blocks))}  # fmt: skip
    assert found[3].keys() == own and report.new_blocks
    for name, g in found[
        3
    ].items():  # T5's decoder blocks add their gradients to the encoder in another order
        torch.testing.assert_close(g, stock[3][name], rtol=0, atol=1e-6 if family == "t5" else 0)
    assert found[1] < stock[1] and found[2] < stock[2]
    trains.New(head=True).apply(model, report)
    head = backward(model)[3].keys() - own
    assert head and not any(".layers." in n or ".layer." in n or ".block." in n for n in head)


OPTIMIZERS = {
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "growkern": lambda p: growkern.optim.AdamW(p, lr=1e-2),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("to_none", [True, False])
def test_a_frozen_weight_and_its_state_stay_as_they_are(kind, to_none):
    model = deep("llama", True, 4)
    optim = OPTIMIZERS[kind](model.parameters())
    growkern.expand_inplace(model, optim, to={"hidden": 48})  # under an UpdateScale
    train(model, optim, 3)
    trains.Top(1).apply(model)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    before = copy.deepcopy([(p.data, optim.state[p]) for p in frozen])

    for i in range(5):
        optim.zero_grad(set_to_none=to_none)
        loss_of(model, batch(seed=i)).backward()
        optim.step()

    assert len(frozen) > 20 and all(p.grad is None for p in frozen)
    for p, (value, state) in zip(frozen, before, strict=True):
        assert torch.equal(p, value)
        for key, held in state.items():
            assert torch.equal(torch.as_tensor(held), torch.as_tensor(optim.state[p][key]))
    moved = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in moved)


def test_mslt_in_a_plain_loop_trains_the_newest_blocks_each_time():
    """2 -> 4 -> 8 blocks: copies of frozen blocks train, and the counts of steps are those of who trained."""
    model = deep("llama", True, 2)
    optim = optimizer(model)
    top = dict(depth=depth.TopCopies(), trains=trains.Top())
    schedule = GrowthSchedule(
        [
            At(step=5, to={"layers": 4}, **top),
            At(step=10, to={"layers": 8}, **top),
            At(step=15, to=None, trains=trains.All()),
        ]
    )
    schedule.attach(model, optim)
    trained: list[set[int]] = []

    def look(i, loss):
        layers = enumerate(model.model.layers)
        flags = {n: {p.requires_grad for p in block.parameters()} for n, block in layers}
        assert all(len(own) == 1 for own in flags.values())
        trained.append({n for n, own in flags.items() if own == {True}})

    train(model, optim, 17, each=look)

    assert trained[3] == {0, 1} and trained[4] == trained[8] == {2, 3}
    assert trained[9] == trained[13] == {4, 5, 6, 7} and trained[14] == {*range(8)}
    steps = {
        n: {int(optim.state[p]["step"]) for p in block.parameters()}
        for n, block in enumerate(model.model.layers)
    }
    # blocks 4 and 5 copy 0 and 1, which had trained for 5 steps of 10
    assert steps == {0: {7}, 1: {7}, 2: {12}, 3: {12}, 4: {12}, 5: {12}, 6: {17}, 7: {17}}
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    hooks = [m._forward_pre_hooks for m in model.modules()]
    assert not any(hooks)


def test_a_schedule_of_one_stage_is_ordinary_training():
    one, other = deep("llama", True, 2), deep("llama", True, 2)
    optim, plain = optimizer(one), optimizer(other)
    events = [At(step=9, to={"layers": 4})]
    GrowthSchedule(events, trains=trains.Top(2)).attach(one, optim)
    frozen = one.model.embed_tokens
    train(one, optim, 1)
    assert not frozen(batch()).requires_grad and frozen.weight.requires_grad  # the head trains it

    GrowthSchedule(events, trains=trains.All()).attach(other, plain)
    alone = deep("llama", True, 2)
    by_hand = optimizer(alone)
    train(other, plain, 4)
    train(alone, by_hand, 4)
    same_weights(other, alone)


def test_a_growth_keeps_the_choice_and_its_new_blocks_train():
    model = deep("llama", False, 4)
    optim = optimizer(model)
    trains.Top(2).apply(model)
    frozen = {p for p in model.parameters() if not p.requires_grad}

    growkern.expand_inplace(model, optim, to={"hidden": 48, "layers": 6})

    assert frozen == {p for p in model.parameters() if not p.requires_grad}
    assert len(model.model.layers) == 6
    train(model, optim, 2)
    trains.All().apply(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_growth_that_fails_leaves_who_trains(monkeypatch):
    model = deep("llama", True, 4)
    optim = optimizer(model)
    GrowthSchedule(
        [At(step=2, to={"layers": 6}, trains=trains.New())], trains=trains.Top(1)
    ).attach(model, optim)
    train(model, optim, 1)
    flags = [p.requires_grad for p in model.parameters()]

    from growkern.commit import commit

    def fail(*_):
        raise RuntimeError("boom")

    with monkeypatch.context() as patch:
        patch.setattr(commit, "_attributes", fail)
        with pytest.raises(GrowthError, match="boom"):
            train(model, optim, 1)
    assert [p.requires_grad for p in model.parameters()] == flags and len(model.model.layers) == 4
    assert backward(model)[3].keys() == {n for n, p in model.named_parameters() if p.requires_grad}

    train(model, optim, 1)  # tries again
    assert len(model.model.layers) == 6
    assert sum(p.requires_grad for p in model.parameters()) == 18


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_frozen_and_thaw_on_their_own(copied):
    model = deep("llama", True, 4)
    before = backward(model)[3].keys()
    trains.Top(1).apply(model)
    own = backward(model)[3].keys()

    other = copied(model)
    assert backward(other)[3].keys() == own
    trains.All().apply(other)

    assert backward(other)[3].keys() == before
    assert backward(model)[3].keys() == own


def test_parameters_that_the_user_froze_stay_so():
    model = deep("llama", False, 4)
    model.lm_head.weight.requires_grad_(False)
    trains.Top(2).apply(model)
    trains.Top(3).apply(model)
    assert not model.lm_head.weight.requires_grad
    trains.All().apply(model)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]


def test_gradients_of_master_weights_go_too():
    model = deep("llama", False, 4).bfloat16()
    masters = {p: torch.nn.Parameter(p.detach().float()) for p in model.parameters()}
    for p, master in masters.items():
        p.grad, master.grad = torch.ones_like(p), torch.ones_like(master)

    trains.Top(1).apply(model, master_weights=masters)

    for p, master in masters.items():
        assert (p.grad is None) == (master.grad is None) == (not p.requires_grad)


def test_reentrant_checkpointing_is_refused_and_the_other_kind_is_exact():
    model, whole = deep("llama", True, 4), deep("llama", True, 4)
    whole.activation_checkpointing_enable({"use_reentrant": False})
    trains.Top(2).apply(model)
    expected = backward(model)
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(UnsupportedModelError, match=r"layers.2 is under reentrant.*use_reentrant\": False"):  # fmt: skip
        backward(model)
    trains.All().apply(model)
    with pytest.raises(UnsupportedModelError, match="layers.1 is under reentrant"):
        trains.Top(3).apply(model)
    assert all(p.requires_grad for p in model.parameters())

    model.activation_checkpointing_enable({"use_reentrant": False})
    trains.Top(2).apply(model)
    found = backward(model)
    assert found[1] < 0.6 * backward(whole)[1]  # and the blocks below are not computed again

    assert found[0] == expected[0] and found[3].keys() == expected[3].keys()
    assert all(torch.equal(g, expected[3][name]) for name, g in found[3].items())


@pytest.mark.parametrize("to", [{"layers": 4}, None])
def test_an_event_whose_choice_is_not_possible_changes_nothing(to):
    model = deep("llama", True, 2)
    optim = optimizer(model)
    schedule = GrowthSchedule([At(step=2, to=to, trains=trains.Top(1))])
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(PlanError, match="layers.0 is under reentrant"):
        schedule.attach(model, optim)
    model.activation_checkpointing_disable()
    schedule.attach(model, optim)
    train(model, optim, 1)
    model.activation_checkpointing_enable({"use_reentrant": True})

    with pytest.raises(UnsupportedModelError, match="layers.0 is under reentrant"):
        train(model, optim, 1)

    assert not schedule.fired and len(model.model.layers) == 2
    assert all(p.requires_grad for p in model.parameters())
    model.activation_checkpointing_enable({"use_reentrant": False})
    train(model, optim, 1)
    assert schedule.fired == [3] and len(model.model.layers) == (4 if to else 2)


def test_parameters_that_train_and_are_in_no_optimizer_are_named(caplog):
    model = deep("llama", False, 2)
    trains.Top(1).apply(model)
    optim = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    GrowthSchedule([At(step=1, to=None)], trains=trains.Top(1)).attach(model, optim)
    assert "in no optimizer" not in caplog.text

    train(model, optim, 1)

    assert re.search(r"All\(\): 10 parameters train and are in no optimizer \(model.embed_tokens.weight\)", caplog.text)  # fmt: skip


def test_a_shrinking_that_drops_all_that_trains_is_refused():
    model = deep("llama", True, 4)
    trains.Top(2).apply(model)
    with pytest.raises(GrowthError, match="the blocks that train would be dropped"):
        growkern.shrink_inplace(model, to={"layers": 2})
    assert len(model.model.layers) == 4 and sum(p.requires_grad for p in model.parameters()) < 39
    trains.All().apply(model)
    growkern.shrink_inplace(model, to={"layers": 2})
    assert len(model.model.layers) == 2


def test_a_gradient_from_below_is_refused_where_it_is_seen():
    model = deep("llama", True, 4)
    trains.Top(2).apply(model)
    model.enable_input_require_grads()
    with pytest.raises(UnsupportedModelError, match=r"layers.2 is the lowest.*input needs a grad"):
        loss_of(model, batch())
    with torch.no_grad():
        loss_of(model, batch())
    trains.Top(2).apply(model)
    loss_of(model, batch())


@pytest.mark.slow
def test_choices_never_use_up_the_recompilations_that_dynamo_allows():
    model = deep("llama", True, 10)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for n in range(1, 11):  # one more than 8 is an error under fullgraph
        trains.Top(n).apply(model)
        compiled(batch())


@pytest.mark.slow
def test_a_compiled_model_has_one_graph_and_the_gradients_of_an_eager_one():
    model = deep("llama", True, 4)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    ids = batch(seed=1, n=4)
    compiled(ids)
    trains.Top(2).apply(model)
    expected = backward(model)[3]
    model.zero_grad()
    explained = torch._dynamo.explain(model)(ids)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)

    torch.manual_seed(1)
    logits = compiled(ids).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()

    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6)


def saved_and_loaded(schedule: GrowthSchedule) -> dict:
    return pickle.loads(pickle.dumps(schedule.state_dict()))


def stages() -> GrowthSchedule:
    return GrowthSchedule(
        [
            At(step=3, to={"layers": 4}, depth=depth.Stack(), trains=trains.New(head=True)),
            At(step=6, to=None, trains=trains.Top(1)),
            At(step=8, to={"hidden": 48}),
        ],
        trains=trains.Top(1),
    )


SLOW_STOPS = [pytest.param(stop, marks=pytest.mark.slow) for stop in (1, 4, 6, 7, 8, 9)]


@pytest.mark.parametrize("stop", [3, *SLOW_STOPS])
def test_a_run_that_is_saved_and_resumed_ends_as_the_unbroken_run(stop):
    whole = deep("llama", True, 2)
    optim, schedule = optimizer(whole), stages()
    schedule.attach(whole, optim)
    train(whole, optim, 10)
    assert schedule.fired == [3, 6, 8] and len(schedule.history) == 2

    first = deep("llama", True, 2)
    optim, schedule = optimizer(first), stages()
    schedule.attach(first, optim)
    train(first, optim, stop)
    saved = saved_and_loaded(schedule), copy.deepcopy((first.state_dict(), optim.state_dict()))

    model = deep("llama", True, 2, seed=1)
    optim, schedule = optimizer(model), stages()
    schedule.load_state_dict(saved[0])
    growkern.resume(model, optim, saved[0]["history"])
    model.load_state_dict(saved[1][0])
    optim.load_state_dict(saved[1][1])
    schedule.attach(model, optim)
    train(model, optim, 10 - stop, first=stop)

    same_weights(model, whole)
    assert schedule.fired == [3, 6, 8]


def test_a_schedule_prints_who_trains():
    text = str(stages())

    assert re.search(r"layers=4, trains New\(head=True\)", text), text
    assert re.search(r"1 +trains Top\(n=1, head=True\)", text), text
    assert "hidden=48 " in text


def test_detaching_lets_everything_train():
    model = deep("llama", True, 4)
    optim = optimizer(model)
    attachment = stages().attach(model, optim)
    assert not all(p.requires_grad for p in model.parameters())

    attachment.remove()

    assert all(p.requires_grad for p in model.parameters())


def test_a_schedule_leaves_a_choice_that_was_made_by_hand_until_its_event():
    model = deep("llama", False, 4)
    optim = optimizer(model)
    trains.Top(2).apply(model)
    flags = [p.requires_grad for p in model.parameters()]
    attachment = GrowthSchedule([At(step=3, to={"layers": 5})]).attach(model, optim)
    train(model, optim, 2)
    assert [p.requires_grad for p in model.parameters()] == flags
    attachment.remove()
    assert [p.requires_grad for p in model.parameters()] == flags

    GrowthSchedule([At(step=1, to={"layers": 5})]).attach(model, optim)
    train(model, optim, 1)
    assert all(p.requires_grad for p in model.parameters())


REFUSED = {
    "more than there are": (dict(trains=trains.Top(5)), [], "from the start: Top: 5 blocks"),
    "nothing new": ({}, [At(step=1, to={"hidden": 48}, trains=trains.New())], "no block is new"),
    "no number": ({}, [At(step=1, to=None, trains=trains.Top())], "pass the number of blocks"),
    "later": (
        {},
        [At(step=1, to={"layers": 4}), At(step=2, to=None, trains=trains.Top(5))],
        "5 blocks cannot train in a model of 4",
    ),
}


@pytest.mark.parametrize(("start", "events", "match"), REFUSED.values(), ids=REFUSED)
def test_choices_that_a_model_cannot_make_are_refused_when_attached(start, events, match):
    model = deep("llama", True, 2)
    schedule = GrowthSchedule(events or [At(step=1, to={"layers": 4})], **start)
    with pytest.raises(PlanError, match=match):
        schedule.attach(model, optimizer(model))
    assert all(p.requires_grad for p in model.parameters()) and schedule.attachment is None


@pytest.mark.parametrize(
    ("make_it", "match"),
    [
        (lambda: trains.Top(0), "n=0 blocks cannot train"),
        (lambda: trains.Top(-1), "n=-1"),
        (lambda: trains.Top(True), "n: expected"),
        (lambda: trains.Top("2"), "n: expected"),
        (lambda: trains.New(head="yes"), "head: expected"),
        (lambda: At(step=1, trains="top"), "trains: expected"),
        (lambda: GrowthSchedule([At(step=1)], trains=trains.Top), "trains: expected"),
    ],
)
def test_wrong_arguments_are_refused_by_name(make_it, match):
    with pytest.raises(PlanError, match=match):
        make_it()


def test_top_blocks_of_a_model_without_blocks_are_refused():
    model = deep("llama", True, 0)
    with pytest.raises(PlanError, match=r"has no blocks, .* grow it by depth=Fresh\(\) first"):
        trains.Top(1).apply(model)
    assert all(p.requires_grad for p in model.parameters())


def test_new_without_a_growth_or_of_another_model_is_refused():
    model = deep("llama", True, 2)
    with pytest.raises(PlanError, match="no block is new"):
        trains.New().apply(model)
    report = growkern.expand_inplace(deep("llama", True, 2), to={"layers": 5})
    with pytest.raises(PlanError, match="the report is not that of this model's last growth"):
        trains.New().apply(model, report)
    report = growkern.expand_inplace(model, to={"layers": 4})
    last = growkern.expand_inplace(model, to={"layers": 8})
    with pytest.raises(PlanError, match="pass the last report"):
        trains.New().apply(model, report)
    assert all(p.requires_grad for p in model.parameters())
    trains.New().apply(model, last)


def frozen_by_user(n: int = 2):
    model = deep("llama", False, n)
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    return model, optimizer(model)


def test_new_blocks_train_in_a_model_that_the_user_has_frozen():
    """LLaMA Pro on a model of which nothing trained, or the head alone."""
    model, optim = frozen_by_user()
    new = At(step=1, to={"layers": 4}, depth=depth.Fresh(at="even"), trains=trains.New())
    schedule = GrowthSchedule([new])
    schedule.attach(model, optim)
    train(model, optim, 1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}

    train(model, optim, 3)

    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    names = tuple(f"{block}." for block in schedule.new_blocks)
    assert moved == {n for n in before if n.startswith(names)} and len(moved) == 18

    by_hand = deep("llama", False, 2).requires_grad_(False)
    report = growkern.expand_inplace(by_hand, to={"layers": 4})
    trains.New().apply(by_hand, report)
    assert sum(p.requires_grad for p in by_hand.parameters()) == 18


def test_sub_models_of_which_one_would_not_train_are_refused_when_attached():
    model, optim = frozen_by_user(4)
    model.lm_head.weight.requires_grad_(False)
    model.model.layers[0].requires_grad_(True)
    with pytest.raises(PlanError, match="from the start: no parameter of the model would train"):
        GrowthSchedule([At(step=9)], trains=trains.SubModels(1)).attach(model, optim)


def test_a_choice_of_which_nothing_is_in_the_optimizer_is_refused_when_attached():
    model = deep("llama", False, 4)
    optim = torch.optim.AdamW(model.model.layers[0].parameters())
    with pytest.raises(PlanError, match="none of the parameters that would train is in the optimizer"):  # fmt: skip
        GrowthSchedule([At(step=2, to=None, trains=trains.Top(1))]).attach(model, optim)


def test_lbfgs_is_refused_because_it_moves_what_has_no_gradient():
    model = deep("llama", False, 4)
    optim = torch.optim.LBFGS(model.parameters())
    with pytest.raises(PlanError, match="LBFGS moves all of its parameters"):
        trains.Top(1).apply(model)
    with pytest.raises(PlanError, match="LBFGS moves all of its parameters"):
        GrowthSchedule([At(step=2, to=None, trains=trains.Top(1))]).attach(model, optim)
    assert all(p.requires_grad for p in model.parameters())


def test_an_attached_schedule_is_copied_and_pickled_without_its_attachment():
    model = deep("llama", True, 2)
    optim, schedule = optimizer(model), stages()
    schedule.attach(model, optim)
    train(model, optim, 2)
    for copied in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert copied.state_dict() == schedule.state_dict() and copied.attachment is None


def test_a_model_of_which_nothing_would_train_is_refused():
    model = Plain(n_layer=2, tied=False)
    for p in model.blocks[1].parameters():
        p.requires_grad_(False)
    with pytest.raises(PlanError, match="no parameter of the model would train"):
        trains.Top(1, head=False).apply(model, spec=model.spec())


class Bare(Plain):
    """A model whose embedding is a parameter of the model itself, tied to its head."""

    def __init__(self):
        super().__init__(n_layer=3, tied=True)
        self.table = self.wte.weight
        del self.wte

    def forward(self, ids):
        x = self.table[ids] + self.wpe(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln_f(x))

    def spec(self):
        spec = Plain(n_layer=3, tied=True).spec()
        tensors = {"table" if n == "wte.weight" else n: axes for n, axes in spec.tensors.items()}
        return replace(spec, tensors=tensors, ties={"head.weight": "table"})


def test_a_tied_embedding_that_is_in_no_module_of_its_own_is_refused():
    model = Bare()
    with pytest.raises(UnsupportedModelError, match="cannot freeze table .* the model itself"):
        trains.Top(1).apply(model, spec=model.spec())
    assert all(p.requires_grad for p in model.parameters())
    trains.Top(1, head=False).apply(model, spec=model.spec())  # where the head is frozen too
    assert backward(model)[3].keys() == {n for n, _ in model.named_parameters() if "blocks.2." in n}


def test_a_choice_is_kept_by_averages_and_their_new_blocks():
    model = deep("llama", True, 4)
    optim = optimizer(model)
    trains.Top(1).apply(model)
    average = torch.optim.swa_utils.AveragedModel(model)

    growkern.expand_inplace(model, optim, to={"layers": 6}, ema=average)

    with torch.no_grad():
        loss_of(average.module, batch())
    trains.All().apply(average.module)
    assert not any(m._forward_pre_hooks for m in average.modules())
