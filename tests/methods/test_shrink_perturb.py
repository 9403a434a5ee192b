"""ShrinkPerturb equals its formula element by element, draws muP's initialization, and claims to preserve nothing."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from models import grow, make, train

import growkern
from growkern import GrowthPlan, width
from growkern.errors import CommitError, PlanError
from growkern.model.describe import describe
from growkern.planning.check import check

FAMILIES = ["llama", "mixtral", "qwen3_moe"]
STD, CUT_OFF = 0.02, 3.46
# written by hand, not taken from the specs: the power of n / n' in the standard deviation of a matrix
POWERS = {
    "embed_tokens.weight": 0.0, "lm_head.weight": 1.0, "mlp.gate.weight": 1.0, "q_proj.weight": 0.5, "k_proj.weight": 0.5,
    "v_proj.weight": 0.5, "o_proj.weight": 0.5, "gate_proj.weight": 0.5, "up_proj.weight": 0.5, "down_proj.weight": 0.5,
    "gate_up_proj": 0.5, "down_proj": 0.5,
}  # fmt: skip


def power(name):
    return next(p for end, p in POWERS.items() if name.endswith(end))


def padded(name, old, shape):
    """Return a matrix with zeros behind its old rows and columns; gate and up are two matrices in one tensor."""
    if name.endswith("gate_up_proj"):
        half = shape[0], shape[1] // 2, shape[2]
        return torch.cat([padded("", part, half) for part in old.chunk(2, 1)], 1)
    new = torch.zeros(shape, dtype=old.dtype)
    for at in torch.cartesian_prod(*(torch.arange(n) for n in old.shape[:-1])).view(-1, old.dim() - 1):  # fmt: skip
        row = tuple(at.tolist())
        new[row][: old.shape[-1]] = old[row]
    return new


def grown(family, to="2x", shrink=0.4, *, tied=False, **options):
    """Return a source's tensors, the tensors of the grown model, and the report."""
    model = make(family, tied=tied).double()
    source = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = grow(model, to=to, width=width.ShrinkPerturb(shrink=shrink, std=STD), state="drop", **options)  # fmt: skip
    return source, {name: p.detach() for name, p in model.named_parameters()}, report


@pytest.mark.parametrize("to", ["2x", "1.5x"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_element_is_shrunk_padded_and_perturbed(family, to):
    source, shrunk, report = grown(family, to)
    _, drawn, _ = grown(family, to, shrink=0.0)
    ratio = 2 / 3 if to == "1.5x" else 1 / 2

    assert report.preserves == "nothing" and "shrunk and perturbed" in str(report)
    for name, old in source.items():
        new = shrunk[name]
        if old.dim() == 1:
            assert torch.equal(new[: len(old)], old) and torch.allclose(new[len(old) :], old.mean())
            continue
        off = new - drawn[name] - 0.4 * padded(name, old, new.shape)  # equal seeds draw equal noise
        assert off.abs().max() < 1e-14, name
        sigma = STD * ratio ** power(name)
        noise = drawn[name] / sigma
        # six standard errors; the kurtosis of a sum of four uniform numbers is 2.7, so that of the variance is 1.7 / n
        assert abs(noise.mean()) < 6 / noise.numel() ** 0.5, name
        assert abs(noise.var() - 1) < 6 * (1.7 / noise.numel()) ** 0.5, name
        assert noise.abs().max() <= CUT_OFF, name


def test_noise_is_independent_across_elements_tensors_and_seeds():
    _, drawn, _ = grown("llama", shrink=0.0)
    _, again, _ = grown("llama", shrink=0.0)
    _, other, _ = grown("llama", shrink=0.0, seed=1)
    first = drawn["model.layers.0.mlp.up_proj.weight"] / STD * 2**0.5
    pairs = [drawn[f"model.layers.{i}.mlp.{n}_proj.weight"] for i, n in ((1, "up"), (0, "gate"))]
    pairs += [other["model.layers.0.mlp.up_proj.weight"]]
    shifted = [(first[1:], first[:-1]), (first[:, 1:], first[:, :-1])]

    assert all(torch.equal(p, again[name]) for name, p in drawn.items())
    for left, right in [*((first, p / STD * 2**0.5) for p in pairs), *shifted]:
        assert abs((left * right).mean()) < 5 / left.numel() ** 0.5
    share = (first.abs() < 1).double().mean()  # 0.6827 of a normal
    assert abs(share - 0.6827) < 0.03


def test_a_tied_matrix_is_an_embedding_and_new_blocks_draw_their_own():
    source, new, _ = grown("llama", {"hidden": "2x", "layers": 4}, tied=True, depth=growkern.depth.Stack())  # fmt: skip
    noise = new["model.embed_tokens.weight"].clone()
    noise[:, :24] -= 0.4 * source["model.embed_tokens.weight"]
    up = [new[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(4)]

    assert float(noise.std()) == pytest.approx(STD, rel=0.1)
    for i, j in ((0, 2), (1, 3)):  # copies of one block
        assert not torch.equal(up[i], up[j])
        assert float((up[i] - up[j]).std()) == pytest.approx(STD, rel=0.1)  # of both: sqrt(2) sigma


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_master_weights_averages_and_lean_memory_get_the_same_noise(dtype):
    made = []
    for memory in ("stage", "lean"):
        model = make("llama", tied=True).to(dtype)
        masters = {p: torch.nn.Parameter(p.detach().float()) for p in model.parameters()}
        average = torch.optim.swa_utils.AveragedModel(model)
        grow(
            model, torch.optim.AdamW(masters.values()), to="1.5x", width=width.ShrinkPerturb(), state="drop", master_weights=masters,
            ema=average, memory=memory,
        )  # fmt: skip
        for name, p in model.named_parameters():
            # one rounding each of the law and of the sum
            unit = torch.finfo(dtype).eps * masters[p].abs().max()
            assert (p.float() - masters[p]).abs().max() <= unit, name
            assert torch.equal(p, average.module.get_parameter(name)), name
        made.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*made, strict=True))


def test_state_must_be_dropped_and_the_learning_rates_are_those_of_mup():
    model = make("llama", tied=False)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    train(model, optim, 2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PlanError, match="no law relates gradients .* pass state='drop'"):
        grow(model, optim, to="2x", width=width.ShrinkPerturb())
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert len(optim.state) == len([*model.parameters()])

    report = grow(model, optim, to="2x", width=width.ShrinkPerturb(), state="drop")
    held = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert report.grad_norm_factor is None
    train(
        model, optim, 1
    )  # the first step of Adam moves every element with a gradient by the learning rate
    for name, p in model.named_parameters():
        moved = (p.detach() - held[name]).abs().quantile(0.9)
        factor = 0.5 if p.dim() == 2 and power(name) else 1.0  # Adam under muP: 1 / fan-in
        assert float(moved) == pytest.approx(1e-3 * factor, rel=0.01), name


def test_a_tensor_that_is_perturbed_in_parts_has_the_same_noise(monkeypatch):
    _, whole, _ = grown("llama")
    monkeypatch.setattr("growkern.execution.perturb.MOST", 200)
    _, parts, _ = grown("llama")

    assert all(torch.equal(p, parts[name]) for name, p in whole.items())


@pytest.mark.slow
def test_training_goes_on_and_resume_replays_the_growth():
    model = make("mixtral", tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=3e-3)
    train(model, optim, 3)
    grow(model, optim, to="2x", width=width.ShrinkPerturb(shrink=0.5, std=0.03), state="drop")
    losses = [train(model, optim, 1)[0] for _ in range(40)]  # of one batch
    assert losses[-1] < losses[0] - 1
    saved = copy.deepcopy((model.state_dict(), optim.state_dict()))

    fresh = make("mixtral", tied=True, seed=1)
    again = torch.optim.AdamW(fresh.parameters(), lr=3e-3)
    growkern.resume(fresh, again, model.config.growkern_history)
    fresh.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    assert train(fresh, again, 3, first=40) == train(model, optim, 3, first=40)


def edited(plan, change):
    return GrowthPlan.from_json(json.dumps(change(json.loads(plan.to_json()))))


def _row(name, **values):
    def change(data):
        next(row for row in data["tensors"] if row["name"] == name).update(values)
        return data

    return change


EDITS = {
    "state": (lambda data: data | {"state": "exact"}, "perturbs weights under state='exact'"),
    "part": (
        lambda data: data | {"state": "exact", "tensors": [row | {"noise_from": 1} for row in data["tensors"]]},
        "perturbs weights under state='exact'",
    ),
    "claim": (lambda data: data | {"reasons": []}, "claims to preserve the function, but weights are shrunk or perturbed"),
    "gain": (_row("model.norm.weight", noise_std=0.1), "noise_std should be 0.0"),
    "negative": (_row("lm_head.weight", noise_std=-0.1), "out of range"),
    "text": (_row("lm_head.weight", shrink="half"), "out of range"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "match"), EDITS.values(), ids=EDITS)
def test_a_plan_is_json_and_an_edited_one_is_refused(change, match):
    model = make("llama", tied=False)
    plan = growkern.plan(model, to="2x", width=width.ShrinkPerturb(), state="drop")

    assert GrowthPlan.from_json(plan.to_json()) == plan
    assert "0.4 + N(0, 0.0141^2)" in str(plan) and "0.4 + N(0, 0.01^2)" in str(plan)
    check(plan, describe(model))
    with pytest.raises(PlanError, match=match):
        check(edited(plan, change), describe(model))


def test_plans_without_noise_keep_their_json_so_that_digests_on_record_hold():
    rows = json.loads(growkern.plan(make("llama", tied=True), to="2x").to_json())["tensors"]
    plan = growkern.plan(make("llama", tied=True), to="2x", width=width.ShrinkPerturb(), state="drop")  # fmt: skip

    assert not any({"shrink", "noise_std"} & row.keys() for row in rows)
    assert any({"shrink", "noise_std"} <= row.keys() for row in json.loads(plan.to_json())["tensors"])  # fmt: skip
    assert all(row.is_perturbed == (len(row.axes) > 1) for row in plan.tensors)
    assert all(plan.changes(replace(row, axes=())) == row.is_perturbed for row in plan.tensors)


WRONG = [dict(shrink=-0.1), dict(shrink=1.1), dict(shrink=float("nan")), dict(std=0.0), dict(std=-1.0), dict(std=True)]  # fmt: skip


@pytest.mark.parametrize("options", WRONG)
def test_wrong_numbers_are_refused(options):
    with pytest.raises(PlanError, match=f"{next(iter(options))}=.* is not valid"):
        growkern.plan(make("llama", tied=True), to="2x", width=width.ShrinkPerturb(**options), state="drop")  # fmt: skip


def test_noise_that_a_dtype_cannot_hold_is_refused():
    model = make("llama", tied=True).half()
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(65000.0)
    before = copy.deepcopy(model.state_dict())

    with pytest.raises(
        CommitError, match="embed_tokens.weight: .* would exceed the largest float16"
    ):
        grow(model, to="2x", width=width.ShrinkPerturb(shrink=1.0, std=500.0), state="drop")
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
