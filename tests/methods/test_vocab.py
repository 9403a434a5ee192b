"""New rows equal the papers' formulas as plain loops, and the rows of ``resize_token_embeddings`` of transformers."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VOCAB, batch, grow, logits, make, train

import growkern
from growkern import vocab, width
from growkern.errors import PlanError

FAMILIES = ["llama", "gpt2", "bert", "mixtral", "opt", "gpt_neox"]
MORE = 9
LARGER = VOCAB + MORE


def mixed(seed=0, n=LARGER, missing=MORE):
    """Return the tokens of a tokenizer that has the source's tokens in another order, and new tokens between them."""
    tokens = [*range(VOCAB), *[-1] * missing]
    random.Random(seed).shuffle(tokens)
    return tokens[:n]


def helper(seed=0, n=LARGER):
    return torch.rand(n, 5, generator=torch.Generator().manual_seed(seed)) + 0.1


def clp(old, tokens, helper, top_k):
    """Compute the paper's loop: a sum over the shared tokens, weighted by cosine similarity in the helper's embedding."""
    both = [t for t, o in enumerate(tokens) if o >= 0]
    out = []
    for t, o in enumerate(tokens):
        if o >= 0:
            out.append(old[o])
            continue
        cos = {
            b: float(helper[t] @ helper[b] / (helper[t].norm() * helper[b].norm())) for b in both
        }
        best = sorted(both, key=lambda b: -cos[b])[: top_k or len(both)]
        total = sum(cos[b] for b in best)
        out.append(sum(cos[b] / total * old[tokens[b]] for b in best))
    return torch.stack(out)


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_clp_transfer_is_the_papers_loop(family, top_k):
    model = make(family, tied=False).double()
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 2)
    tokens = mixed()
    source = {name: p.detach().clone() for name, p in model.named_parameters()}
    moments = {
        name: optim.state[p]["exp_avg"].clone()
        for name, p in model.named_parameters()
        if p in optim.state
    }

    report = grow(
        model,
        optim,
        to={"vocab": LARGER},
        width=vocab.CLPTransfer(helper().double(), tokens, top_k),
    )

    assert report.preserves == "nothing" and "take probability" in str(report)
    kept = torch.tensor(tokens) >= 0
    for name, p in model.named_parameters():
        old = source[name]
        if p.shape == old.shape:
            assert torch.equal(p, old), name
            continue
        expected = clp(old, tokens, helper().double(), top_k)
        assert (p - expected).abs().max() < 1e-12, name
        if name in moments:
            found = optim.state[p]["exp_avg"]
            assert torch.equal(found[kept], moments[name][torch.tensor(tokens)[kept]]), name
            assert not found[~kept].any(), name
    assert model.config.vocab_size == LARGER
    train(model, optim, 2)


def test_a_token_that_the_helper_does_not_know_is_drawn():
    model = make("llama", tied=True).double()
    tokens, own = mixed(), helper().double()
    new = [t for t, o in enumerate(tokens) if o < 0]
    own[new] = 0.0
    old = model.model.embed_tokens.weight.detach().clone()

    grow(model, to={"vocab": LARGER}, width=vocab.CLPTransfer(own, tokens, seed=3))

    rows = model.model.embed_tokens.weight.detach()[new]
    assert ((rows - old.mean(0)) / old.std(0)).std() == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("tied", [True, False])
def test_mean_is_that_of_transformers(family, tied):
    one, two = make(family, tied=tied), make(family, tied=tied)

    grow(one, to={"vocab": LARGER}, width=vocab.MeanCov(scale=0.0))
    two.resize_token_embeddings(LARGER, mean_resizing=True)

    for (name, p), (_, q) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert p.shape == q.shape, name
        assert (p - q).abs().max() < 1e-3, name  # transformers draws rows with a covariance of 1e-9
    assert (logits(one, batch()) - logits(two, batch())).abs().max() < 1e-2


@settings(max_examples=10, deadline=None)
@given(st.floats(1e-3, 10.0), st.integers(0, 99))
def test_draws_have_the_mean_and_the_covariance_of_the_old_rows(scale, seed):
    generator = torch.Generator().manual_seed(seed)
    old = (
        torch.randn(50, 4, generator=generator, dtype=torch.float64)
        @ torch.randn(4, 4, generator=generator, dtype=torch.float64)
        + 2
    )

    rows = vocab.MeanCov(scale, seed).rows(old, 40_000)

    cov = torch.cov(old.T, correction=0) * scale
    assert (torch.cov(rows.T) - cov).abs().max() < 0.06 * cov.diagonal().max()
    assert (rows.mean(0) - old.mean(0)).abs().max() < 0.03 * math.sqrt(cov.diagonal().max())
    assert torch.equal(rows, vocab.MeanCov(scale, seed).rows(old, 40_000))


def test_zero_costs_old_tokens_what_log_sum_exp_says():
    """The logits of old tokens stay, and those of the 66 new tokens are 0, so that each adds exp(0) to the sum in the softmax."""
    model = make("llama", tied=True).double()
    before = logits(model, batch()).detach()

    grow(model, to={"vocab": 2 * VOCAB}, width=vocab.Zero())

    paid = before.log_softmax(-1) - logits(model, batch()).log_softmax(-1)[..., :VOCAB]
    expected = (1 + VOCAB / before.exp().sum(-1, keepdim=True)).log()
    assert (paid - expected).abs().max() < 1e-12


def test_a_grown_vocabulary_is_saved_and_loaded(tmp_path):
    model = make("gpt2", tied=True).eval()
    grow(model, to={"vocab": LARGER}, width=vocab.MeanCov())

    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()

    assert torch.equal(logits(loaded, batch()), logits(model, batch()))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("memory", ["stage", "lean"])
def test_new_tokens_are_the_same_whatever_writes_them(backend, memory):
    expected, model = (make("llama", tied=False) for _ in range(2))
    method = vocab.CLPTransfer(helper(), mixed())
    grow(expected, to={"vocab": LARGER}, width=method)

    grow(model, to={"vocab": LARGER}, width=method, backend=backend, memory=memory)

    for (name, p), (_, q) in zip(
        model.named_parameters(), expected.named_parameters(), strict=True
    ):
        assert torch.equal(p, q), name


REFUSED = [
    (width.Lossless(), {"vocab": LARGER}, r"growkern\.vocab grows vocab"),
    (vocab.Zero(), {"vocab": LARGER, "hidden": 48}, "hidden: Zero does not grow it"),
    (vocab.MeanCov(scale=-1.0), {"vocab": LARGER}, "scale=-1.0"),
    (vocab.CLPTransfer(helper(), mixed()[:-1]), {"vocab": LARGER}, "tokens has 74 entries, the target 75"),
    (vocab.CLPTransfer(helper()[:-1], mixed()), {"vocab": LARGER}, "helper has 74 rows"),
    (vocab.CLPTransfer(helper(), [-1] * LARGER), {"vocab": LARGER}, "no token of the source"),
    (vocab.CLPTransfer(helper(), [0] * LARGER), {"vocab": LARGER}, "twice"),
    (vocab.CLPTransfer(helper(), [VOCAB, *[-1] * (LARGER - 1)]), {"vocab": LARGER}, "names 66, the tokens of the source end at 65"),
    (vocab.CLPTransfer(helper(), mixed(), top_k=0), {"vocab": LARGER}, "top_k=0"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "to", "match"), REFUSED, ids=range(len(REFUSED)))
def test_what_does_not_fit_is_refused(method, to, match):
    with pytest.raises(PlanError, match=match):
        growkern.plan(make("llama", tied=False), to=to, width=method)


def test_a_plan_alone_does_not_know_the_new_rows():
    model = make("llama", tied=True)
    plan = growkern.plan(model, to={"vocab": LARGER}, width=vocab.MeanCov())
    before = {name: p.clone() for name, p in model.named_parameters()}

    with pytest.raises(PlanError, match="pass the method as width= beside plan="):
        grow(model, plan=growkern.GrowthPlan.from_json(plan.to_json()))

    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_similarities_that_cancel_say_nothing():
    model = make("llama", tied=True).double()
    old = model.model.embed_tokens.weight.detach().clone()
    tokens = [*range(VOCAB), *[-1] * MORE]
    own = torch.ones(LARGER, 2).double()
    own[: VOCAB // 2, 1], own[VOCAB // 2 : VOCAB, 1] = 1.0, -1.0
    own[VOCAB:, 0] = 0.0  # cosine similarities to the source's tokens sum to 0

    grow(model, to={"vocab": LARGER}, width=vocab.CLPTransfer(own, tokens))

    rows = model.model.embed_tokens.weight.detach()[VOCAB:]
    assert rows.isfinite().all() and rows.abs().max() < 3 * old.abs().max()


def test_a_helper_that_is_not_finite_and_tokens_that_are_none_are_refused():
    own = helper()
    own[3, 2] = float("nan")
    for method, match in (
        (vocab.CLPTransfer(own, mixed()), "not finite"),
        (vocab.CLPTransfer(helper(), [0.5, *mixed()[1:]]), "tokens has 0.5"),
        (vocab.CLPTransfer(helper(), mixed(), top_k=2.5), "top_k=2.5"),
        (vocab.MeanCov(scale="a"), "scale='a'"),
    ):
        with pytest.raises(PlanError, match=match):
            growkern.plan(make("llama", tied=True), to={"vocab": LARGER}, width=method)


def test_tokens_may_be_a_tensor_and_a_schedule_may_grow_the_vocabulary():
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    method = vocab.CLPTransfer(helper(), torch.tensor(mixed()))
    schedule = growkern.GrowthSchedule([growkern.At(step=2, to={"vocab": LARGER}, width=method)])
    schedule.attach(model, optim)

    train(model, optim, 4)

    expected = make("llama", tied=True)
    assert model.config.vocab_size == LARGER != expected.config.vocab_size
