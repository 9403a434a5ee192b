"""``shrink_inplace`` selects weights by the published indices, undoes a growth bit for bit, and leaves a model that stock classes load."""

import copy
import itertools

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES, LLAMA, Plain, batch, exact_norms, logits, make, spec_of, train
from pairwise import pairwise
from states import fail_at, same, state_of
from torch import nn

import growkern
from growkern import GrowthPlan, api, depth, width
from growkern.commit import optimizer as optim_target
from growkern.commit import param_groups as groups
from growkern.commit.commit import Undo
from growkern.errors import CheckpointError, CommitError, PlanError, UnsupportedModelError
from growkern.optimizer.update_scale import scale_of
from growkern.shrink import FirstCopies, WeightSelection

QUIET = width.Lossless(noise=0)
BACK = FirstCopies()
STOCK = [family for family in FAMILIES if family not in ("plain", "encoder", "encoder_post")]


def shrink(model, optim=None, **options):
    return growkern.shrink_inplace(model, optim, spec=spec_of(model), **options)


def started(family, *, tied=True, kind=torch.optim.AdamW, steps=3, **options):
    """Train a model and return it with its optimizer, in the middle of an accumulation."""
    model = make(family, tied=tied)
    optim = kind(model.parameters(), **({"lr": 3e-3, "weight_decay": 0.1} | options))
    train(model, optim, steps)
    logits(model, batch(9)).square().mean().backward()
    return model, optim


def twin(model, optim):
    """Copy model and optimizer, and the gradients, which deepcopy leaves out."""
    other, other_optim = copy.deepcopy((model, optim))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    return other, other_optim


def snapshot(model, optim):
    """Collect all that a run continues from: values, gradients, optimizer state, param groups, cached sizes and config."""
    config = copy.deepcopy(getattr(model, "config", None))
    if config is not None:
        config = config.to_dict()
        config.pop("growkern_history", None)
        if config.get("n_inner", 0) is None:  # GPT-2 derives n_inner until a growth writes a number
            config["n_inner"] = 4 * config["n_embd"]
        if config.get("head_dim", 0) is None:
            config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    return {
        "values": model.state_dict(),
        "shapes": [(name, p.shape) for name, p in model.named_parameters()],
        "grads": [p.grad for p in model.parameters() if p.grad is not None],
        "modules": [
            (name, {k: v for k, v in vars(m).items() if isinstance(v, (int, float, tuple, bool))})
            for name, m in model.named_modules()
        ],
        "buffers": dict(model.named_buffers()),
        "config": config,
        "optim": without_growths(optim.state_dict()),
    }


def without_growths(state_dict):
    """Return a state dict without the entries of a growth that say that nothing is scaled."""
    for group in state_dict["param_groups"]:
        group.pop("growth", None)
        if group.get("lr_factor") == pytest.approx(1.0):
            del group["lr_factor"]
        if not group.get("update_scale", {"scales": True})["scales"]:
            del group["update_scale"]
    return state_dict


# A growth taken back


STARTS = [
    ("llama", False, QUIET),
    ("llama", True, QUIET),
    ("gpt2", True, width.HyperClone()),
    ("bert", True, QUIET),
    ("mixtral", False, QUIET),
]
EVEN = [*itertools.product(STARTS, (2, 4), ("mup", "exact", None))]


@pytest.mark.slow
@pytest.mark.parametrize(("start", "factor", "dynamics"), pairwise(EVEN), ids=str)
def test_an_even_growth_is_taken_back_bit_for_bit(start, factor, dynamics):
    family, tied, method = start
    model, optim = started(family, tied=tied)
    source, source_optim = twin(model, optim)
    params = list(model.parameters())
    growkern.expand_inplace(model, optim, to=f"{factor}x", width=method, dynamics=dynamics)
    assert not same(snapshot(model, optim), snapshot(source, source_optim))

    report = shrink(model, optim, to=f"{1 / factor}x", method=BACK, dynamics=dynamics)

    assert same(snapshot(model, optim), snapshot(source, source_optim))
    assert all(p is q for p, q in zip(params, model.parameters(), strict=True))
    assert not report.function_preserving and "only where they are equal" in str(report)
    assert train(model, optim, 3, first=5) == train(source, source_optim, 3, first=5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_of_your_own_is_taken_back(tied):
    model, optim = started("plain", tied=tied)
    source, source_optim = twin(model, optim)
    sizes = spec_of(model).sizes
    growkern.expand_inplace(
        model, optim, to={"hidden": "2x", "positions": 96}, width=QUIET, spec=spec_of(model)
    )

    shrink(model, optim, to=sizes, method=BACK)

    assert same(snapshot(model, optim), snapshot(source, source_optim))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.Adam, {"amsgrad": True}),
        (torch.optim.Adafactor, {}),
        (torch.optim.Adagrad, {}),
        (growkern.optim.AdamW, {}),
    ],
    ids=lambda v: v.__name__ if isinstance(v, type) else "",
)
@pytest.mark.parametrize("dynamics", ["mup", "exact"])
def test_every_optimizer_gets_its_state_back(kind, options, dynamics):
    model, optim = started("llama", kind=kind, **options)
    source, source_optim = twin(model, optim)
    growkern.expand_inplace(model, optim, to="2x", width=QUIET, dynamics=dynamics)

    shrink(model, optim, method=BACK, dynamics=dynamics)

    assert same(snapshot(model, optim), snapshot(source, source_optim))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.AdamW, {"lr": 3e-3, "eps": 1e-4}),
        (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}),
        (growkern.optim.AdamW, {"lr": 3e-3, "eps": 1e-4}),
    ],
    ids=["AdamW", "SGD", "growkern"],
)
def test_a_run_that_was_wide_for_a_while_is_the_run_that_never_was(kind, options, monkeypatch):
    exact_norms(monkeypatch)
    model = make("llama", tied=True).double()
    optim = kind(model.parameters(), **options)
    train(model, optim, 10)
    source, source_optim = twin(model, optim)

    growkern.expand_inplace(model, optim, to="2x", width=QUIET, dynamics="exact")
    losses = train(model, optim, 5, first=10)
    shrink(model, optim, method=BACK, dynamics="exact")
    losses += train(model, optim, 5, first=15)

    expected = train(source, source_optim, 10, first=10)
    assert abs(expected[0] - expected[-1]) > 1e-4, "nothing was learned"
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 1e-9


def test_two_growths_are_taken_back_one_by_one():
    model, optim = started("llama")
    source, source_optim = twin(model, optim)
    growkern.expand_inplace(model, optim, to="2x", width=QUIET)
    middle = copy.deepcopy(optim.param_groups)
    growkern.expand_inplace(model, optim, to="2x", width=QUIET)

    shrink(model, optim, method=BACK)

    assert [g["lr"] for g in optim.param_groups] == [g["lr"] for g in middle]
    shrink(model, optim, method=BACK)
    assert same(snapshot(model, optim), snapshot(source, source_optim))


@pytest.mark.parametrize(
    ("grown_by", "layers"), [(depth.Stack(), None), (depth.IdentityBlocks(), (0, 2))]
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_added_blocks_are_dropped_again(family, grown_by, layers):
    model, optim = started(family)
    source, source_optim = twin(model, optim)
    params = list(model.parameters())
    growkern.expand_inplace(
        model, optim, to={"hidden": "2x", "layers": 4}, width=QUIET, depth=grown_by
    )

    shrink(model, optim, to={"hidden": "0.5x", "layers": 2}, method=FirstCopies(layers))

    assert same(snapshot(model, optim), snapshot(source, source_optim))
    assert [id(p) for p in model.parameters()] == [id(p) for p in params]
    assert train(model, optim, 3, first=5) == train(source, source_optim, 3, first=5)


def test_a_factor_that_is_no_power_of_2_comes_back_up_to_rounding():
    model, optim = started("llama")
    source, source_optim = twin(model, optim)
    growkern.expand_inplace(model, optim, to="3x", width=QUIET)

    shrink(model, optim, to={"hidden": 24}, method=BACK)

    (group,), (before,) = optim.param_groups, source_optim.param_groups
    assert group.keys() - before.keys() == {"lr_factor"}
    assert group["lr_factor"] == 1 and scale_of(optim) is None and "step" not in vars(optim)
    for key in ("lr", "weight_decay"):
        assert group[key] == pytest.approx(before[key], rel=1e-12)
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]
    for one, other in zip(model.parameters(), source.parameters(), strict=True):
        torch.testing.assert_close(one, other)


# Schedulers and groups


def scheduled(optim):
    return [
        torch.optim.lr_scheduler.LambdaLR(optim, lambda step: 1 / (1 + step)),
        torch.optim.lr_scheduler.ReduceLROnPlateau(optim, min_lr=1e-5),
    ]


def test_schedulers_that_are_handed_over_follow_both_ways():
    model, optim = started("llama")
    handed = scheduled(optim)
    base, least = list(handed[0].base_lrs), list(handed[1].min_lrs)
    lrs, state = [g["lr"] for g in optim.param_groups], copy.deepcopy(handed[0].state_dict())
    growkern.expand_inplace(model, optim, to="2x", width=QUIET, scheduler=handed)
    assert len(handed[0].base_lrs) > 1

    shrink(model, optim, method=BACK, scheduler=handed)

    assert [g["lr"] for g in optim.param_groups] == lrs
    assert (handed[0].base_lrs, handed[1].min_lrs) == (base, least)
    assert same(handed[0].state_dict(), state)
    train(model, optim, 1)
    handed[0].step()
    assert [g["lr"] for g in optim.param_groups] == [lr / 2 for lr in base]


@pytest.mark.slow
@pytest.mark.parametrize("handed", [False, True])
def test_hooks_give_back_what_a_growth_gave_them(handed):
    model, optim = started("llama")
    scheduler = scheduled(optim)[0]
    growkern.expand_inplace(model, optim, to="2x", width=QUIET)
    assert scale_of(optim).scales

    shrink(model, optim, method=BACK, scheduler=scheduler if handed else None)

    assert scale_of(optim) is None
    assert len(optim.param_groups) == len(scheduler.base_lrs) == 1
    train(model, optim, 1)
    scheduler.step()


def layer_wise(model):
    blocks = model.model.layers
    inside = {id(p) for block in blocks for p in block.parameters()}
    rest = [p for p in model.parameters() if id(p) not in inside]
    rows = [{"params": list(b.parameters()), "lr": 1e-3 * (i + 1)} for i, b in enumerate(blocks)]
    return torch.optim.AdamW([{"params": rest, "lr": 1e-4}, *rows])


def test_parameters_of_dropped_blocks_leave_no_trace_in_the_optimizer():
    model = make("llama", tied=True, num_hidden_layers=5)
    optim = layer_wise(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optim, [lambda s: 1 / (1 + s)] * 6)
    train(model, optim, 2)
    kept = [list(model.model.layers[i].parameters()) for i in (0, 2, 4)]

    shrink(model, optim, to={"layers": 3}, method=WeightSelection((0, 2, 4)), scheduler=scheduler)

    live = {id(p) for p in model.parameters()}
    assert {id(p) for g in optim.param_groups for p in g["params"]} == live
    assert {id(p) for p in optim.state} == live
    assert [g["initial_lr"] for g in optim.param_groups] == [1e-4, 1e-3, 3e-3, 5e-3]
    assert scheduler.base_lrs == [1e-4, 1e-3, 3e-3, 5e-3] and len(scheduler.lr_lambdas) == 4
    own = [list(block.parameters()) for block in model.model.layers]
    assert all(p is q for a, b in zip(own, kept, strict=True) for p, q in zip(a, b, strict=True))
    assert [block.self_attn.layer_idx for block in model.model.layers] == [0, 1, 2]
    fresh_model = make("llama", tied=True, num_hidden_layers=3)
    fresh_model.load_state_dict(model.state_dict())
    fresh = layer_wise(fresh_model)
    fresh.load_state_dict(copy.deepcopy(optim.state_dict()))
    assert train(model, optim, 3) == train(fresh_model, fresh, 3)
    scheduler.step()


def test_groups_stay_empty_where_a_scheduler_is_left_out():
    model = make("llama", tied=True, num_hidden_layers=3)
    optim = layer_wise(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optim, lambda s: 1 / (1 + s))
    train(model, optim, 2)

    shrink(model, optim, to={"layers": 2})

    assert [len(g["params"]) > 0 for g in optim.param_groups] == [True, True, True, False]
    train(model, optim, 2)
    scheduler.step()


def test_names_of_a_group_and_masters_follow():
    model = make("llama", tied=True, num_hidden_layers=3).bfloat16()
    master_weights = {p: nn.Parameter(p.detach().float()) for p in model.parameters()}
    names = [name for name, _ in model.named_parameters()]
    optim = torch.optim.AdamW(list(zip(names, master_weights.values(), strict=True)), lr=1e-3)
    for master in master_weights.values():
        master.grad = torch.ones_like(master)
    optim.step()
    with torch.no_grad():
        [p.copy_(master) for p, master in master_weights.items()]

    shrink(model, optim, to={"hidden": 12, "layers": 2}, master_weights=master_weights)

    assert optim.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    assert [id(p) for p in master_weights] == [id(p) for p in model.parameters()]
    assert [id(m) for m in optim.param_groups[0]["params"]] == [
        id(m) for m in master_weights.values()
    ]
    for p, master in master_weights.items():
        assert torch.equal(p, master.detach().bfloat16()) and master.shape == p.shape
        assert optim.state[master]["exp_avg"].shape == p.shape


# Weight Selection


def published(n_source: int, n_target: int) -> list[int]:
    """Compute the indices along one axis as the authors' code does, in float64."""
    if n_source % n_target == 0:
        return [i * (n_source // n_target) for i in range(n_target)]
    linspace = torch.linspace(0, n_source - 1, n_target, dtype=torch.float64)
    return torch.round(linspace).long().tolist()


def halfway(n_source: int, n_target: int) -> bool:
    """Whether an index lies halfway between two integers, where the rounding of floats decides."""
    ends = range(n_target) if n_target > 1 else ()
    return any(2 * i * (n_source - 1) % (2 * (n_target - 1)) == n_target - 1 for i in ends)


@pytest.mark.slow
@settings(max_examples=30)
@given(ffn=st.integers(1, 40), groups=st.integers(1, 2), hidden=st.integers(1, 24))
def test_weight_selection_is_the_published_formula(ffn, groups, hidden):
    to = {"ffn": ffn, "hidden": hidden, "heads": 2 * groups, "kv_heads": groups}
    if to == {"ffn": 40, "hidden": 24, "heads": 4, "kv_heads": 2}:
        return
    model, source = make("llama", tied=False), make("llama", tied=False)

    shrink(model, to=to)

    rows, heads = published(24, hidden), published(2, groups)
    layer, of = model.model.layers[1], source.model.layers[1]
    q = of.self_attn.q_proj.weight.view(2, 2, 6, 24)  # kv heads, heads of a group, head_dim, hidden
    got = layer.self_attn.q_proj.weight.view(groups, 2, 6, hidden)
    for i, j, k, n in itertools.product(range(groups), range(2), range(6), range(hidden)):
        assert got[i, j, k, n] == q[heads[i], j, k, rows[n]]
    if not halfway(40, ffn):
        inner = published(40, ffn)
        for i, n in itertools.product(range(hidden), range(ffn)):
            assert layer.mlp.down_proj.weight[i, n] == of.mlp.down_proj.weight[rows[i], inner[n]]
            assert layer.mlp.up_proj.weight[n, i] == of.mlp.up_proj.weight[inner[n], rows[i]]
    for i in range(hidden):
        assert model.model.norm.weight[i] == source.model.norm.weight[rows[i]]


@given(n=st.integers(1, 300), m=st.integers(1, 300))
def test_indices_are_the_published_ones_at_any_size(n, m):
    n, m = max(n, m), min(n, m)
    spec = Plain(width=4, n_head=1).spec()
    sizes = {**spec.sizes, "ffn": n}
    narrow = WeightSelection().narrow(_sized(spec, sizes), {**sizes, "ffn": m})

    found = list(narrow.maps["ffn.0"].indices)

    expected = published(n, m)
    if halfway(n, m):
        assert all(abs(i - j) <= 1 for i, j in zip(found, expected, strict=True))
    else:
        assert found == expected
    assert found == sorted(set(found)) and found[0] == 0


def _sized(spec, sizes):
    return type(spec)(**{**vars(spec), "sizes": sizes})


def test_halves_go_to_the_even_index():
    spec = Plain(width=4, n_head=1).spec()
    sizes = {**spec.sizes, "ffn": 4}
    narrow = WeightSelection().narrow(_sized(spec, sizes), {**sizes, "ffn": 3})

    assert narrow.maps["ffn.0"].indices == (0, 2, 3)  # the indices are 0, 1.5 and 3


def test_fused_heads_stay_whole_and_state_goes_along():
    model, optim = started("gpt2")
    source, source_optim = twin(model, optim)

    shrink(model, optim, to={"hidden": 12, "positions": 16})

    heads, rows = [0, 2], list(range(0, 24, 2))
    for name in ("weight", "grad", "exp_avg", "exp_avg_sq"):
        got, of = (_c_attn(m, o, name) for m, o in ((model, optim), (source, source_optim)))
        got, of = got.view(12, 3, 2, 6), of.view(24, 3, 4, 6)
        for i, part, head, k in itertools.product(range(12), range(3), range(2), range(6)):
            assert got[i, part, head, k] == of[rows[i], part, heads[head], k]
    wpe, before = model.transformer.wpe.weight, source.transformer.wpe.weight
    assert torch.equal(wpe, before[:16, ::2])


def _c_attn(model, optim, name):
    p = model.transformer.h[1].attn.c_attn.weight
    if name == "weight":
        return p
    return p.grad if name == "grad" else optim.state[p][name]


# The shrunk model is an ordinary model


@pytest.mark.parametrize(
    "method", [WeightSelection(), BACK], ids=["WeightSelection", "FirstCopies"]
)
@pytest.mark.parametrize("family", STOCK)
def test_a_stock_model_of_the_small_config_takes_over(family, method):
    model, optim = started(family)
    to = {"hidden": 12} | ({} if family in ("qwen3_moe", "modernbert") else {"layers": 1})

    shrink(model, optim, to=to, method=method, dynamics=None)

    config = copy.deepcopy(model.config)
    fresh = type(model)(config)
    fresh.load_state_dict(model.state_dict())
    assert fresh.config.hidden_size == 12
    assert torch.equal(logits(fresh.eval(), batch()), logits(model.eval(), batch()))
    again = torch.optim.AdamW(fresh.parameters(), lr=3e-3, weight_decay=0.1)
    again.load_state_dict(copy.deepcopy(optim.state_dict()))
    assert train(fresh, again, 2) == train(model, optim, 2)


@pytest.mark.parametrize("layers", [(0, 3, 4), None])
def test_layer_types_follow_the_layers_that_stay(layers):
    model = make("modernbert", tied=True, num_hidden_layers=6, global_attn_every_n_layers=2)
    types = list(model.config.layer_types)
    assert len(set(types)) > 1

    shrink(model, to={"layers": 3}, method=WeightSelection(layers))

    assert model.config.layer_types == [types[i] for i in layers or range(3)]


def test_averages_shrink_too():
    model, optim = started("llama")
    ema = torch.optim.swa_utils.AveragedModel(model)
    alone = copy.deepcopy(model)

    shrink(model, optim, to={"hidden": 12, "layers": 1}, ema=ema)

    shrink(alone, to={"hidden": 12, "layers": 1}, ema=())
    assert same(ema.module.state_dict(), alone.state_dict())
    ema.update_parameters(model)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"memory": "lean"}, {"backend": "triton"}], ids=str)
@pytest.mark.parametrize(
    "method", [WeightSelection(), BACK], ids=["WeightSelection", "FirstCopies"]
)
def test_every_way_gives_the_same_bits(method, options):
    model, optim = started("llama")
    other, other_optim = twin(model, optim)
    to = {"ffn": 40, "hidden": 12} if method == BACK else {"ffn": 41, "heads": 2, "kv_heads": 1}
    to["layers"] = 1  # the interpreter takes long for each run, and the heads have the fewest
    for one, own in ((model, optim), (other, other_optim)):
        # 41 runs of length 1 are gathered by an index
        growkern.expand_inplace(one, own, to={"ffn": 80})

    shrink(model, optim, to=to, method=method, backend="torch")
    shrink(other, other_optim, to=to, method=method, **options)

    assert same(snapshot(model, optim), snapshot(other, other_optim))


def test_a_plan_can_be_printed_kept_and_run():
    model, optim = started("llama")
    other, other_optim = twin(model, optim)
    plan = growkern.plan(model, optim, to={"hidden": 12, "layers": 1}, shrink=WeightSelection((1,)))
    text = str(plan)

    shrink(model, optim, plan=GrowthPlan.from_json(plan.to_json()))

    shrink(other, other_optim, to={"hidden": 12, "layers": 1}, method=WeightSelection((1,)))
    assert same(snapshot(model, optim), snapshot(other, other_optim))
    assert "Shrink plan for llama: WeightSelection" in text and "blocks  1 stay" in text
    assert "not function preserving" in text


@pytest.mark.slow
@pytest.mark.parametrize("layers", [None, (1, 2)])
def test_resume_replays_what_shrank(layers):
    model = make("llama", tied=True, num_hidden_layers=3)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    start = copy.deepcopy(model)
    train(model, optim, 2)
    growkern.expand_inplace(model, optim, to="2x")
    method = WeightSelection(layers)
    shrink(model, optim, to={"hidden": 36, "ffn": 50, "layers": 2}, method=method)
    growkern.expand_inplace(model, optim, to={"ffn": 60})
    train(model, optim, 1)
    again = torch.optim.AdamW(start.parameters(), lr=1e-3)

    growkern.resume(start, again, model.config.growkern_history)
    start.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(optim.state_dict()))

    assert train(start, again, 3) == train(model, optim, 3)


def test_checkpoints_of_the_wide_model_are_refused_and_those_of_the_first_one_load():
    model, optim = started("llama")
    first, first_optim = copy.deepcopy((model.state_dict(), optim.state_dict()))
    to = {"hidden": "2x", "layers": 4}
    growkern.expand_inplace(model, optim, to=to, width=QUIET, depth=depth.Stack())
    wide, wide_optim = copy.deepcopy((model.state_dict(), optim.state_dict()))

    shrink(model, optim, to={"hidden": 24, "layers": 2}, method=BACK)

    with pytest.raises(CheckpointError, match=r"before shrinking 2 \(hidden 48 -> 24"):
        model.load_state_dict(wide)
    with pytest.raises(CheckpointError, match="shrinking 2"):
        optim.load_state_dict(wide_optim)
    model.load_state_dict(first)
    optim.load_state_dict(first_optim)


# Refused, or taken back


STAGES = {
    "plan": (api, "build"),
    "dicts": (Undo, "set_dict"),
    "lists": (Undo, "set_list"),
    "values": (Undo, "storage"),
    "attributes": (Undo, "attribute"),
    "optimizer": (optim_target, "_optimizer"),
    "groups": (groups, "_joined"),
    "last check": (optim_target, "check_state"),
}


# a shrinking calls these stages several times; the number is that of a later call
OFTEN = {"dicts": 4, "lists": 4, "values": 4, "attributes": 4, "groups": 3}
CALLS = [(stage, call) for stage in STAGES for call in sorted({1, OFTEN.get(stage, 1)})]


@pytest.mark.parametrize(("stage", "call"), CALLS)
def test_a_failure_at_any_stage_leaves_everything_bitwise_unchanged(stage, call, monkeypatch):
    model, optim = started("llama", tied=False)
    scheduler = torch.optim.lr_scheduler.StepLR(optim, 100)
    to = {"hidden": 48, "layers": 4}
    growkern.expand_inplace(model, optim, to=to, scheduler=scheduler)
    train(model, optim, 1)
    before = state_of(model, optim, scheduler)
    failures = fail_at(monkeypatch, *STAGES[stage], RuntimeError("boom"), call)

    with pytest.raises((RuntimeError, CommitError), match="boom"):
        shrink(model, optim, to={"hidden": 24, "layers": 2}, method=BACK, scheduler=scheduler)

    assert failures
    assert same(state_of(model, optim, scheduler), before)
    monkeypatch.undo()
    train(model, optim, 1)


HALF = {"to": "0.5x"}
REFUSED = {
    "larger": (
        {"to": {"hidden": 48}},
        "the target 48 is larger than the source 24; grow",
    ),
    "factor above 1": ({"to": "2x"}, "larger than the source 24; grow the model by expand_inplace"),
    "equal": ({"to": {"hidden": 24}}, "name a smaller size"),
    "nothing": ({"to": {"ffn": 0}}, "ffn: the target 0 is not a size; name at least 1"),
    "negative": ({"to": {"layers": -1}}, "layers: the target -1 is not a size"),
    "no layers": ({"to": {"layers": 0}}, "layers: the target 0 is not a size"),
    "not whole": ({"to": {"ffn": "0.3x", "hidden": "0.1x"}}, "not whole"),
    "heads": ({"to": {"heads": 3}}, "heads: 3 is not a multiple of kv_heads=2; nearest: 2, 4"),
    "groups": ({"to": {"kv_heads": 1, "heads": 4}}, "would grow the groups of 2; name heads=2"),
    "vocab": ({"to": {"vocab": 33}}, "vocab: WeightSelection does not shrink it"),
    "head_dim": ({"to": {"head_dim": 3}}, "head_dim: WeightSelection does not shrink it"),
    "head_dim first": (
        {"to": {"head_dim": 3}, "method": BACK},
        "head_dim: FirstCopies does not shrink it",
    ),
    "no divisor": (
        {"to": {"hidden": 16, "ffn": 30}, "method": BACK},
        r"(?s)hidden: 16 does not divide 24.*WeightSelection\(\).*ffn: 30 does not divide 40",
    ),
    "unknown": ({"to": {"hiden": 12}}, "did you mean 'hidden'"),
    "a method that grows": ({"method": width.AKI()}, "AKI.*expand_inplace takes it as width="),
    "a depth method": ({"method": depth.Stack()}, "Stack.*expand_inplace takes it as depth="),
    "no method": ({"method": "first"}, "expected a shrink method such as WeightSelection"),
    "a class": ({"method": FirstCopies}, "expected a shrink method such as WeightSelection"),
    "too few layers": (
        {"to": {"layers": 1}, "method": WeightSelection((0, 1))},
        'layers=\\(0, 1\\) names 2 layers, and the target has 1; pass to={"layers": 2}',
    ),
    "layers of nowhere": (
        {"to": {"layers": 1}, "method": WeightSelection((2,))},
        "must name layers of 0 to 1",
    ),
    "layers in no order": (
        {"to": {"hidden": 12}, "method": WeightSelection((1, 0))},
        "in ascending order, each once",
    ),
    "a layer twice": ({"to": {"hidden": 12}, "method": FirstCopies((0, 0))}, "each once"),
    "state": ({"state": "asymmetric"}, "not known to a shrinking; pass 'exact', 'copy', 'drop'"),
    "no state": ({"state": "keep"}, "not known to a shrinking"),
    "dynamics": ({"dynamics": "half"}, "unknown dynamics='half'"),
    "plan": ({"plan": "x"}, "expected a GrowthPlan, got str"),
}


@pytest.mark.parametrize(("options", "match"), REFUSED.values(), ids=REFUSED)
def test_is_refused_before_anything_changes(options, match):
    model, optim = started("llama")
    before = state_of(model, optim)

    with pytest.raises(PlanError, match=match):
        shrink(model, optim, **options)

    assert same(state_of(model, optim), before)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"to": {"hidden": 12}}, "shrink the model by shrink_inplace"),
        ({"width": WeightSelection()}, "width: expected a width method.*shrink_inplace takes it"),
        ({"depth": FirstCopies()}, "depth: expected a depth method.*shrink_inplace takes it"),
    ],
)
def test_growth_names_the_other_way(options, match):
    with pytest.raises(PlanError, match=match):
        growkern.expand_inplace(make("llama", tied=True), **options)


def test_plans_are_run_by_those_they_are_for():
    model = make("llama", tied=True)
    up = growkern.plan(model)
    down = growkern.plan(model, to="0.5x", shrink=WeightSelection())

    with pytest.raises(PlanError, match="run the plan by shrink_inplace"):
        growkern.expand_inplace(model, plan=down)
    with pytest.raises(PlanError, match="run the plan by expand_inplace"):
        shrink(model, plan=up)
    with pytest.raises(PlanError, match="already says what to shrink"):
        shrink(model, plan=down, method=BACK)
    with pytest.raises(PlanError, match="leave width=, depth= and seed= out"):
        growkern.plan(model, to="0.5x", shrink=BACK, width=QUIET)
    with pytest.raises(PlanError, match="plan again"):
        shrink(make("llama", tied=True, num_hidden_layers=3), plan=down)


def test_a_plan_whose_layers_are_no_layers_in_order_is_refused():
    model = make("llama", tied=True, num_hidden_layers=3)
    text = growkern.plan(model, to={"layers": 2}, shrink=WeightSelection((0, 2))).to_json()
    swapped = text.replace('{"branch": 1.0, "new": false, "source": 0}', "X").replace(
        '{"branch": 1.0, "new": false, "source": 2}', '{"branch": 1.0, "new": false, "source": 0}'
    )
    swapped = swapped.replace("X", '{"branch": 1.0, "new": false, "source": 2}')
    assert swapped != text

    with pytest.raises(PlanError, match="blocks are not the model's blocks"):
        shrink(model, plan=GrowthPlan.from_json(swapped))


def test_a_model_without_blocks_keeps_its_depth():
    model = Plain()
    spec = _blockless(model.spec())

    with pytest.raises(PlanError, match="cannot shrink plain: the spec names no blocks"):
        growkern.shrink_inplace(model, to={"layers": 1}, spec=spec)
    with pytest.raises(UnsupportedModelError, match="expected a torch.nn.Module"):
        growkern.shrink_inplace("model")
    growkern.shrink_inplace(model, to={"hidden": 12}, spec=spec)
    assert model.wte.embedding_dim == 12


def _blockless(spec):
    return type(spec)(**{**vars(spec), "blocks": None})


def test_dropped_state_leaves_no_state():
    model, optim = started("llama")

    report = shrink(model, optim, state="drop")

    assert not optim.state and "was dropped" in str(report)
    train(model, optim, 2)


def test_the_default_halves_every_width():
    config = transformers.LlamaConfig(**LLAMA, head_dim=6)
    model = transformers.LlamaForCausalLM(config)

    report = growkern.shrink_inplace(model)

    assert report.target_sizes | {"vocab": 66} == {
        "hidden": 12, "heads": 2, "kv_heads": 1, "head_dim": 6, "ffn": 20, "layers": 2, "vocab": 66,
    }  # fmt: skip
    assert str(report).startswith("Shrank llama")
    assert report.reasons == ("selected weights do not make up for the others",)
    assert config.hidden_size == 24
