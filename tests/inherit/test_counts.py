"""Denominators, step counts and weights of the loss with a teacher: what is no count is refused, and an empty step changes nothing."""

import pytest
import torch
from models import VOCAB, batch, make

from growkern.errors import PlanError
from growkern.inherit import KnowledgeInheritance, fused_loss


def student():
    return make("llama", tied=False)


def attached(teacher=None, model=None, **options):
    model = model or student()
    loss = KnowledgeInheritance(teacher or make("llama", tied=False, seed=1), until=10, **options)
    loss.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    return loss, model


def data(seed=0):
    return {"input_ids": batch(seed), "labels": batch(seed)}


@pytest.mark.parametrize("n_items", [0, torch.tensor(0), torch.tensor([0.0]), None], ids=repr)
def test_a_step_without_a_predicted_position_has_a_loss_and_gradients_of_zero(n_items):
    loss, model = attached()

    value = loss({"input_ids": batch(), "labels": torch.full_like(batch(), -100)}, n_items=n_items)
    value.backward()

    assert value.shape == () and value == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


NO_COUNTS = -5, 0, 2.5, float("nan"), True
NO_TENSORS = [3, 4], True, -1, [-2.0], float("nan")


@pytest.mark.parametrize("n_items", [*NO_COUNTS, *map(torch.tensor, NO_TENSORS)], ids=repr)
@pytest.mark.parametrize("call", ["loss", "from_hidden", "fused_loss"])
def test_what_is_no_number_of_positions_is_refused(call, n_items):
    loss, _ = attached()
    h, w, labels = torch.randn(2, 16, 8), torch.randn(VOCAB, 8), batch()
    calls = dict(
        loss=lambda: loss(data(), n_items=n_items),
        from_hidden=lambda: loss.from_hidden(h, w, labels, data(), n_items=n_items),
        fused_loss=lambda: fused_loss(h, w, labels, n_items=n_items),
    )
    with pytest.raises(PlanError, match="n_items"):
        calls[call]()


def test_a_loss_that_counts_no_steps_is_refused():
    loss = KnowledgeInheritance(lambda b: b, until=10)
    with pytest.raises(PlanError, match="attach the loss first"):
        loss.from_hidden(torch.randn(2, 16, 8), torch.randn(VOCAB, 8), batch(), {})


def test_a_negative_number_of_steps_is_refused_and_nothing_is_attached():
    model = student()
    loss = KnowledgeInheritance(make("llama", tied=False, seed=1), until=10)
    with pytest.raises(PlanError, match="n_steps: -10 is no number of steps"):
        loss.attach(model, torch.optim.SGD(model.parameters()), n_steps=-10)
    for state in ({"n_steps": -10}, {"n_steps": 1.5}, {}):
        with pytest.raises(PlanError, match="is no number of steps"):
            loss.load_state_dict(state)
    assert loss.alpha == 1.0 and not model.lm_head._forward_pre_hooks


def test_the_figures_are_means_over_the_batch_whatever_the_denominator_is():
    loss, _ = attached(peak=0.5)
    loss(data())
    expected = [float(loss.ce), float(loss.kl)]

    value = float(loss(data(), n_items=120).detach())  # 30 positions of 120

    assert [float(loss.ce), float(loss.kl)] == pytest.approx(expected)
    assert value == pytest.approx((0.5 * expected[0] + 0.5 * 4 * expected[1]) / 4)


def test_there_is_no_divergence_where_the_teacher_did_not_run():
    loss, _ = attached()
    loss(data())
    with torch.no_grad():
        loss(data())
    assert loss.kl is None and loss.ce is not None


@pytest.mark.parametrize("overflows", [True, False])
def test_a_step_that_a_fused_optimizer_skips_is_not_counted(overflows):
    """GradScaler leaves the decision to a fused optimizer, which runs its hooks and skips the update."""
    model = student()
    optim = torch.optim.AdamW(model.parameters(), fused=True)
    loss = KnowledgeInheritance(make("llama", tied=False, seed=1), until=10)
    loss.attach(model, optim)
    scaler = torch.amp.GradScaler("cpu")
    before = model.lm_head.weight.detach().clone()

    scaler.scale(loss(data()) * (float("inf") if overflows else 1.0)).backward()
    scaler.step(optim)

    assert torch.equal(before, model.lm_head.weight) == overflows
    assert loss.n_steps == int(not overflows)


INDEX, WEIGHT = torch.zeros(2, 16, 3, dtype=torch.int64), torch.full((2, 16, 3), 0.3)
UNSOUND = {
    "columns of floats": (INDEX.float(), WEIGHT, "columns of integers"),
    "columns of bools": (INDEX.bool(), WEIGHT, "columns of integers"),
    "weights of integers": (INDEX, INDEX, "columns of integers"),
    "weights above a probability": (INDEX, WEIGHT * 7, "add up to 6.3"),
    "negative weights": (INDEX, -WEIGHT, "a weight is negative"),
    "dense weights above a probability": (None, torch.ones(2, 16, VOCAB), "add up to 66"),
}


@pytest.mark.parametrize(("index", "weight", "match"), UNSOUND.values(), ids=UNSOUND)
def test_weights_that_are_no_probabilities_are_refused(index, weight, match):
    hidden, head = torch.randn(2, 16, 8), torch.randn(VOCAB, 8)
    with pytest.raises(PlanError, match=match):
        fused_loss(hidden, head, batch(), index, weight, alpha=0.5)
    if index is not None:
        loss, _ = attached(lambda _: (index, weight))
        with pytest.raises(PlanError, match=match):
            loss(data())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounded_probabilities_are_accepted(dtype):
    probs = torch.randn(2, 16, VOCAB, generator=torch.Generator().manual_seed(0)).softmax(-1)
    assert fused_loss(torch.randn(2, 16, 8), torch.randn(VOCAB, 8), batch(), None, probs.to(dtype), alpha=0.5).loss.isfinite()  # fmt: skip


OPTIONS = {
    "renormalize all": (dict(renormalize=True), "renormalize divides the weights of top_k"),
    "renormalize draws": (dict(renormalize=True, sampled=5), "renormalize divides the weights"),
    "no vocabulary": (dict(vocab=0), "vocab: 0 is no number of tokens"),
    "a negative vocabulary": (dict(vocab=-3), "vocab: -3 is no number of tokens"),
}


@pytest.mark.parametrize(("options", "match"), OPTIONS.values(), ids=OPTIONS)
def test_options_that_say_nothing_are_refused(options, match):
    with pytest.raises(PlanError, match=match):
        KnowledgeInheritance(student(), **options)
