"""``growkern.learn`` grows the live model as any growth does: from the closed form, all or nothing, on any family and custom model."""

import contextlib
import copy
import logging

import pytest
import torch
from learned import BOTH, COPIES, closed_of, parts
from models import FAMILIES, batch, exact_norms, logits, loss_of, make, spec_of, train
from states import fail_at, same, state_of
from torch.func import functional_call

import growkern
from growkern import depth, width
from growkern.errors import CommitError, InsufficientMemoryError, PlanError, UnsupportedModelError
from growkern.learning import learn as machinery

BATCHES = [batch(seed=i) for i in range(4)]


def learned(model, optim=None, batches=BATCHES, **options):
    options = {"to": BOTH, "steps": 3, "loss": loss_of, "spec": spec_of(model)} | options
    return growkern.learn(model, optim, batches, **options)


def trained(family="llama", **options):
    model = make(family, tied=True, **options)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 2)
    return model, optim


@pytest.mark.parametrize("family", ["llama", "gpt2", "plain"])
def test_learning_of_no_step_is_expand_inplace(family):
    one, other = make(family, tied=True), make(family, tied=True)
    optims = [torch.optim.AdamW(model.parameters()) for model in (one, other)]
    for model, optim in zip((one, other), optims, strict=True):
        train(model, optim, 1)

    report = learned(one, optims[0], steps=0, depth=depth.Stack())
    growkern.expand_inplace(
        other, optims[1], to=BOTH, depth=depth.Stack(), state="drop", spec=spec_of(other)
    )

    assert same(dict(one.state_dict()), dict(other.state_dict()))
    assert [p.grad is None for p in one.parameters()] == [
        p.grad is None for p in other.parameters()
    ]
    assert [g["lr"] for g in optims[0].param_groups] == [g["lr"] for g in optims[1].param_groups]
    assert train(one, optims[0], 2) == train(other, optims[1], 2)
    assert report.learned.losses == () and "dropped" in str(report)


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_on_the_operators_lower_the_loss_in_every_family(family):
    model, ids = make(family, tied=True), batch(n=4)

    what = learned(model, None, [ids], steps=6, lr=1e-2, **COPIES).learned

    assert what.loss_after < what.losses[-1] < what.losses[0]
    assert what.loss_before == what.loss_closed_form
    with torch.no_grad():
        assert float(loss_of(model.eval(), ids)) == pytest.approx(what.loss_after, abs=1e-5)


@pytest.mark.parametrize("tie", ["use", "published", "shared"])
def test_learning_is_adamw_on_the_operators_under_functional_call(tie, monkeypatch):
    exact_norms(monkeypatch)
    model = make("qwen2", tied=True).double()
    *_, sources, target, operators = parts(model, tie=tie, noise=0.03, **COPIES)
    closed, wrapped = closed_of(target), Loss(target)

    def grown():
        return {n: closed[n] + operators.change(n, sources) for n in operators.pieces}

    optim = torch.optim.AdamW(operators.parameters.values(), weight_decay=0.0)
    losses = []
    for i in range(3):
        optim.param_groups[0]["lr"] = 1e-2 * (3 - i) / 3
        named = {f"model.{name}": value for name, value in grown().items()}
        loss = functional_call(wrapped, named, (BATCHES[i],))
        losses.append(loss.item())
        operators_grads = torch.autograd.grad(loss, [*operators.parameters.values()])
        for p, grad in zip(operators.parameters.values(), operators_grads, strict=True):
            p.grad = grad
        optim.step()

    report = learned(model, tie=tie, noise=0.03, lr=1e-2, **COPIES)

    wanted = functional_call(target.eval(), grown(), (batch(9),)).logits
    torch.testing.assert_close(logits(model.eval(), batch(9)), wanted, rtol=0, atol=1e-10)
    assert report.learned.losses == pytest.approx(losses, abs=1e-10)
    assert report.learned.n_numbers == operators.n_numbers
    assert not torch.allclose(logits(target, batch(9)), wanted, atol=1e-3)


class Loss(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return loss_of(self.model, ids)


def test_the_live_model_is_grown_as_by_expand_inplace_apart_from_its_values():
    model, optim = trained()
    scheduler = torch.optim.lr_scheduler.StepLR(optim, 5)
    other, other_optim = trained()
    other_scheduler = torch.optim.lr_scheduler.StepLR(other_optim, 5)
    held = [*model.parameters()]

    report = learned(model, optim, scheduler=scheduler)
    growkern.expand_inplace(other, other_optim, to=BOTH, state="drop", scheduler=other_scheduler)

    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == {
        k: tuple(v.shape) for k, v in other.state_dict().items()
    }
    assert {*held} < {*model.parameters()}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    mine, theirs = model.config.to_dict(), other.config.to_dict()
    assert mine == theirs
    groups = [
        [{k: v for k, v in g.items() if k != "params"} for g in o.param_groups]
        for o in (optim, other_optim)
    ]
    assert groups[0] == groups[1]
    assert scheduler.base_lrs == other_scheduler.base_lrs
    assert not optim.state and all(p.grad is None for p in model.parameters())
    assert report.preserves == "nothing" and report.grad_norm_factor is None
    assert report.new_blocks == ("model.layers.1", "model.layers.3")
    train(model, optim, 2)


@pytest.mark.parametrize(
    ("when", "error", "to"),
    [
        ("loss", ValueError("loss"), BOTH),
        ("step", KeyboardInterrupt(), BOTH),
        ("commit", RuntimeError("commit"), BOTH),
        ("commit", RuntimeError("commit"), {"layers": 4}),  # which changes no storage of the source
    ],
    ids=["loss", "step", "commit", "commit-layers"],
)
def test_a_failure_leaves_everything_bitwise_unchanged(when, error, to, monkeypatch):
    model, optim = trained()
    scheduler = torch.optim.lr_scheduler.StepLR(optim, 5)
    before, calls = state_of(model, optim, scheduler), []

    def loss(target, ids):
        calls.append(1)
        if when == "loss" and len(calls) == 4:
            raise error
        return loss_of(target, ids)

    def on_step(n, value):
        if when == "step" and n == 2:
            raise error

    if when == "commit":
        fail_at(monkeypatch, machinery, "stored_like", error, call=9)
    with pytest.raises(type(error)):
        learned(model, optim, to=to, loss=loss, on_step=on_step, scheduler=scheduler)

    assert same(before, state_of(model, optim, scheduler))
    train(model, optim, 1)


class Drawn:
    """Batches in the order of the global generator, as a DataLoader with ``shuffle=True`` draws them."""

    def __iter__(self):
        return iter([BATCHES[i] for i in torch.randperm(len(BATCHES))])


def nan(target, ids):
    return loss_of(target, ids) * float("nan")


ENDS = {
    "success": ({}, None),
    "closed form": ({"steps": 0}, None),
    "shuffled batches": ({"batches": Drawn(), "noise": 0.03}, None),
    "drawn blocks": ({"depth": depth.Fresh(init=lambda m: [torch.nn.init.normal_(p) for p in m.parameters(recurse=False)])}, None),
    "a loss that is not finite": ({"loss": nan}, CommitError),
    "nothing to learn": ({"batches": Drawn(), "to": {"vocab": 80}, "width": growkern.vocab.Zero()}, PlanError),
    "a loss of another model": ({"batches": Drawn(), "loss": lambda m, ids: torch.rand(())}, PlanError),
}  # fmt: skip


@pytest.mark.parametrize(("options", "error"), ENDS.values(), ids=ENDS)
def test_the_draws_of_the_run_are_not_shifted(options, error):
    model = make("gpt2", tied=True, resid_pdrop=0.1, embd_pdrop=0.1).train()
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)

    with pytest.raises(error) if error else contextlib.nullcontext():
        learned(model, **options)

    assert torch.equal(torch.rand(3), wanted)


def test_a_loss_that_is_not_finite_is_refused_and_nothing_changes():
    model, optim = trained()
    before = state_of(model, optim)

    with pytest.raises(CommitError, match="the loss of step 1 of 3 is nan"):
        learned(model, optim, loss=lambda target, ids: loss_of(target, ids) * float("nan"))

    assert same(before, state_of(model, optim))


def test_what_the_growth_refuses_is_refused_before_the_first_step():
    model, optim = trained()
    average = torch.optim.swa_utils.AveragedModel(model)
    before, steps = state_of(model, optim), []

    with pytest.raises(UnsupportedModelError, match="pass the average as ema="):
        learned(model, optim, on_step=lambda *step: steps.append(step))

    assert steps == [] and same(before, state_of(model, optim))
    del average


CASES = {
    "no batch": ([], {}, "0 batches for 3 steps"),
    "an iterator that ends": (iter(BATCHES[:2]), {}, "2 batches for 3 steps"),
    "steps": (BATCHES, {"steps": -1}, "steps=-1: pass 0 or more"),
    "lr": (BATCHES, {"lr": 0.0}, "lr=0.0: pass a positive number"),
    "noise": (BATCHES, {"noise": float("nan")}, "noise=nan"),
    "tie": (BATCHES, {"tie": "all"}, "tie: expected 'use' or 'published' or 'shared', got 'all'"),
    "another model's loss": (BATCHES, {"loss": lambda m, ids: torch.ones(())}, "loss has no gradient"),
    "no scalar": (BATCHES, {"loss": lambda m, ids: logits(m, ids)}, "returns a scalar tensor"),
    "nothing to learn": (BATCHES, {"to": {"vocab": 80}, "width": growkern.vocab.Zero()}, "no size"),
}  # fmt: skip


@pytest.mark.parametrize(("batches", "options", "message"), CASES.values(), ids=CASES)
def test_what_cannot_be_learned_is_refused(batches, options, message):
    model, optim = trained()
    before = state_of(model, optim)

    with pytest.raises(PlanError, match=message):
        learned(model, optim, batches, **options)

    assert same(before, state_of(model, optim))


def test_a_model_of_several_processes_is_refused(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(make("llama", tied=True))
        for model in (wrapped, wrapped.module):
            with pytest.raises(PlanError, match="trained by several processes"):
                learned(model)
    finally:
        torch.distributed.destroy_process_group()


def test_learning_that_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(machinery, "free_bytes", lambda device: 1000)

    with pytest.raises(InsufficientMemoryError, match=r"learning needs, .* on cpu"):
        learned(make("llama", tied=True))


def test_averages_grow_by_the_learned_operators():
    model, optim = trained()
    average = torch.optim.swa_utils.AveragedModel(model)
    with torch.no_grad():
        average.module.model.norm.weight.mul_(2)

    learned(model, optim, ema=average, **COPIES)

    params = dict(model.named_parameters())
    for name, p in average.module.named_parameters():
        factor = 2 if name == "model.norm.weight" else 1
        assert torch.equal(p, factor * params[name])


def test_master_weights_grow_by_the_learned_operators():
    model = make("llama", tied=True).bfloat16()
    masters = {p: torch.nn.Parameter(p.detach().float()) for p in model.parameters()}
    optim = torch.optim.AdamW(masters.values())
    for master in masters.values():
        master.grad = torch.ones_like(master)

    report = learned(model, optim, master_weights=masters, lr=1e-2, **COPIES)

    assert report.learned.loss_after != report.learned.loss_before
    for p in model.parameters():
        torch.testing.assert_close(masters[p].bfloat16(), p, rtol=2**-7, atol=1e-6)
        assert masters[p].grad is None and masters[p].dtype == torch.float32
    assert len(masters) == len([*model.parameters()])


def test_low_precision_weights_are_learned_in_float32():
    model = make("llama", tied=True).bfloat16()
    *_, operators = parts(model, **COPIES)

    report = learned(model, lr=1e-2, **COPIES)

    assert {p.dtype for p in operators.parameters.values()} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert report.learned.loss_after < report.learned.loss_before


def test_a_checkpoint_of_a_learned_growth_resumes(tmp_path):
    model, optim = trained()
    report = learned(model, optim, **COPIES)
    train(model, optim, 2)
    saved = {"model": model.state_dict(), "optim": optim.state_dict()}
    torch.save(saved, tmp_path / "saved.pt")

    again = make("llama", tied=True)
    other = torch.optim.AdamW(again.parameters(), lr=1e-3)
    saved = torch.load(tmp_path / "saved.pt")
    growkern.resume(again, other, report.history)
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["optim"])

    assert train(again, other, 3, first=5) == train(model, optim, 3, first=5)


def test_a_model_that_has_learned_grows_again():
    model, optim = trained()
    learned(model, optim, to={"hidden": "2x"})
    ids = batch()
    before = logits(model.eval(), ids)

    growkern.expand_inplace(model, optim, to={"layers": 3})
    learned(model, optim, to={"hidden": 72})

    assert before.isfinite().all() and model.config.hidden_size == 72
    assert len(model.config.growkern_history) == 3
    train(model, optim, 1)


def test_gradient_checkpointing_does_not_change_what_is_learned():
    plain, checkpointed = make("llama", tied=True).train(), make("llama", tied=True).train()
    checkpointed.activation_checkpointing_enable()

    for model in (plain, checkpointed):
        learned(model, **COPIES)

    assert same(dict(plain.state_dict()), dict(checkpointed.state_dict()))


def draw(module):
    for p in module.parameters(recurse=False):
        torch.nn.init.trunc_normal_(p, std=0.02) if p.dim() > 1 else torch.nn.init.ones_(p)


@pytest.mark.parametrize(("n", "drawn"), [(0, depth.Fresh()), (2, depth.Fresh(init=draw))])
def test_first_blocks_and_drawn_blocks_are_fixed_addends(n, drawn):
    one, other, third = (make("llama", tied=True, num_hidden_layers=n) for _ in range(3))
    growth = {"to": {"hidden": 48, "layers": n + 2}, "width": width.FPI(), "depth": drawn}

    report = learned(one, steps=0, **growth)
    growkern.expand_inplace(other, state="drop", **growth)
    what = learned(third, batches=[batch()], **growth).learned

    assert same(dict(one.state_dict()), dict(other.state_dict())) and len(report.new_blocks) == 2
    assert what.loss_after < what.loss_before
    assert all(p.isfinite().all() for p in third.parameters())


def test_gradients_in_flight_are_dropped_where_nothing_is_learned_too():
    model, optim = trained()

    learned(model, optim, to={"layers": 4}, depth=depth.Stack())

    assert [name for name, p in model.named_parameters() if p.grad is not None] == []


FROZEN = {
    "layers of a shared row": dict(tie="shared", to={"layers": 4}, depth=depth.Stack()),
    "a shared matrix": dict(tie="shared", to={"hidden": 48}),
    "noise": dict(noise=0.03, **COPIES),
    "noise alone": dict(noise=0.03, steps=0, **COPIES),
    "width": dict(to={"hidden": 48}),
    "published": dict(tie="published", **COPIES),
}


@pytest.mark.parametrize("how", ["embedding", "block", "trains"])
@pytest.mark.parametrize("options", FROZEN.values(), ids=FROZEN)
def test_frozen_parameters_get_the_closed_form_and_the_others_learn(options, how):
    model, optim = trained()
    frozen = model.model.layers[0] if how == "block" else model.model.embed_tokens
    frozen.requires_grad_(False)
    if how == "trains":
        growkern.trains.Top(1).apply(model)
    other = copy.deepcopy(model)
    methods = {"to": BOTH} | {k: v for k, v in options.items() if k in ("to", "width", "depth")}
    plan = growkern.plan(model, state="drop", **methods)
    sources = {n for n, p in model.named_parameters() if not p.requires_grad}

    report = learned(model, optim, lr=1e-2, **options)

    growkern.expand_inplace(other, plan=plan)
    params, closed = dict(model.named_parameters()), dict(other.named_parameters())
    stays = {row.name for row in plan.tensors if row.source in sources}
    assert [name for name in stays if not torch.equal(params[name], closed[name])] == []
    assert any(not torch.equal(params[name], closed[name]) for name in params)
    assert [p.requires_grad for p in params.values()] == [p.requires_grad for p in closed.values()]
    assert report.learned.n_frozen == len(stays) > 0
    assert f"{len(stays)} tensors, in the closed form: requires_grad=False" in str(report)


def test_a_model_of_frozen_parameters_alone_is_refused():
    model = make("llama", tied=True).requires_grad_(False)

    with pytest.raises(PlanError, match="20 tensors have requires_grad=False: let some train"):
        learned(model, to={"hidden": 48})


def test_default_loss_batches_in_a_mapping_and_progress(caplog, monkeypatch):
    model, seen = make("llama", tied=True), []
    monkeypatch.setattr("growkern.learning.learner.SECONDS", 0.0)

    with caplog.at_level(logging.INFO, "growkern"):
        report = growkern.learn(
            model, None, {"input_ids": batch(), "labels": batch()}, to=BOTH, steps=2,
            on_step=lambda n, loss: seen.append((n, loss)),
        )  # fmt: skip

    assert seen == [*enumerate(report.learned.losses, 1)]
    assert "learning: step 2 of 2, loss" in caplog.text


def test_the_report_tells_what_was_learned():
    model, optim = trained()

    report = learned(model, optim, noise=0.03, **COPIES)

    what, text = report.learned, str(report)
    assert f"{what.n_numbers:,} numbers (tie='use') in 3 steps" in text
    assert f"{what.loss_before:.4g} at the start, {what.loss_after:.4g} after learning" in text
    assert (
        f"closed form {what.loss_closed_form:.4g}" in text
        and what.loss_closed_form < what.loss_before
    )
    assert "moments              dropped" in text and "warm the learning rate up again" in text
    assert "the operators were learned" in text
    tensors = sum(p.numel() * 4 for p in model.parameters())
    assert what.n_bytes == 3 * tensors + 16 * what.n_numbers


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_copies_stay_equal_without_noise_and_the_report_says_so(noise):
    model = make("llama", tied=True)

    report = learned(model, to={"ffn": "2x"}, width=width.FPI(maps="cyclic"), noise=noise, lr=1e-2)

    up = model.model.layers[0].mlp.up_proj.weight
    assert torch.allclose(up[:40], up[40:], rtol=0, atol=1e-6) == (noise == 0)
    assert any("equal copies stay equal" in note for note in report.notes) == (noise == 0)


def test_a_caller_without_gradients_learns_too():
    one, other, again = (make("llama", tied=True) for _ in range(3))

    learned(one, **COPIES)
    with torch.no_grad():
        learned(other, **COPIES)
    with torch.inference_mode():
        learned(again, **COPIES)

    assert same(dict(one.state_dict()), dict(other.state_dict()))
    assert same(dict(one.state_dict()), dict(again.state_dict()))


def test_equal_seeds_learn_equal_bits():
    ends = []
    for _ in range(2):
        model = make("llama", tied=True)
        learned(model, noise=0.03, seed=7, width=width.HyperClone(noise_db=10))
        ends.append(copy.deepcopy(model.state_dict()))

    assert same(dict(ends[0]), dict(ends[1]))
