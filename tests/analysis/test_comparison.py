"""The table of ``growkern.compare`` equals growths and training steps made by hand."""

import copy

import pytest
import torch
from models import batch, grow, logits, loss_of, make, train
from states import same

import growkern
from growkern import depth, width
from growkern.errors import PlanError

TO = {"hidden": 48, "layers": 4}
METHODS = [
    width.Lossless(), width.FPI(maps="cyclic"), width.AKI(), width.HyperClone(), width.AKIPro(),
    (width.HyperClone(), depth.Stack()),
]  # fmt: skip


@pytest.fixture(scope="module")
def trained():
    model = make("llama", tied=True).double()
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 3)
    return model, optim


@pytest.mark.slow
def test_the_table_holds_what_growing_by_hand_shows_and_nothing_changes(trained):
    model, optim = trained
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optim.state_dict())
    batches, seen = [batch(seed=i) for i in range(3)], []

    found = growkern.compare(
        model, optim, to=TO, methods=METHODS, batch=batches, steps=4, on_outcome=seen.append
    )

    assert same((model.state_dict(), optim.state_dict()), (before, state))
    source, lossless, fpi, aki, clone, refused, both = found.outcomes
    assert seen == list(found.outcomes) and source.method == "(none)"
    assert refused.refused and "keeps the kv heads" in refused.refused and "AKIPro()" in str(found)
    assert (
        lossless.loss == pytest.approx(source.loss, abs=1e-6) != pytest.approx(aki.loss, abs=1e-6)
    )
    assert (
        fpi.preserves == clone.preserves == "function"
        and aki.preserves == both.preserves == "nothing"
    )
    assert lossless.n_equal == 0 < clone.n_equal and lossless.n_dead == 0
    twin, held = copy.deepcopy((model, optim))
    grow(twin, held, to=TO, width=width.AKI())
    assert aki.logits_error == pytest.approx(
        float((logits(twin, batches[0]) - logits(model, batches[0])).abs().max().detach())
    )
    for i in range(4):
        held.zero_grad()
        loss_of(twin, batches[i % 3]).backward()
        held.step()
    assert aki.loss_after == pytest.approx(float(loss_of(twin, batches[0]).detach()), abs=1e-9)
    assert aki.n_params == sum(p.numel() for p in twin.parameters())
    text = str(found)
    assert (
        "Lossless()" in text and "FPI(maps='cyclic')" in text and "HyperClone() + Stack()" in text
    )


def test_losses_are_those_of_what_is_held_out(trained):
    model, optim = trained
    other = batch(seed=9)

    found = growkern.compare(
        model, optim, to="2x", methods=[width.AKI()], batch=batch(), held_out=other, steps=2
    )

    twin, held = copy.deepcopy((model, optim))
    grow(twin, held, to="2x", width=width.AKI())
    assert found.outcomes[1].loss == pytest.approx(float(loss_of(twin, other).detach()), abs=1e-9)
    for _ in range(2):
        held.zero_grad()
        loss_of(twin, batch()).backward()
        held.step()
    assert found.outcomes[1].loss_after == pytest.approx(
        float(loss_of(twin, other).detach()), abs=1e-9
    )


def test_an_update_scale_comes_along(trained):
    model, optim = copy.deepcopy(trained)
    grow(model, optim, to={"ffn": 80}, dynamics="exact")
    twin, held = copy.deepcopy(trained)
    grow(twin, held, to={"ffn": 80}, dynamics="exact")

    found = growkern.compare(
        model, optim, to={"layers": 3}, methods=[depth.IdentityBlocks()], batch=batch(), steps=2
    )

    for _ in range(2):
        held.zero_grad()
        loss_of(twin, batch()).backward()
        held.step()
    assert found.outcomes[0].loss_after == pytest.approx(
        float(loss_of(twin, batch()).detach()), abs=1e-9
    )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(methods=[]), "expected width methods"),
        (dict(methods=[width.FPI]), "expected width methods"),
        (dict(methods=[(depth.Stack(), width.FPI())]), "expected width methods"),
        (dict(methods=[width.FPI()], steps=-1), "steps >= 0"),
        (dict(methods=[width.FPI()], batch=[]), "at least one batch"),
        (dict(methods=[width.FPI()], batch=torch.zeros(2, 3)), None),
    ],
    ids=str,
)
def test_what_compare_refuses(trained, options, match):
    model, optim = trained
    expected = PlanError if match else (PlanError, RuntimeError)

    with pytest.raises(expected, match=match):
        growkern.compare(model, optim, **{"batch": batch(), **options})
