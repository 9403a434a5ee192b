"""Depth methods copy the blocks of live models, and their optimizer state, in the published order."""

import copy

import pytest
import torch
from models import batch, grow, logits, loss_of, make, train

import growkern
from growkern import depth, width
from growkern.errors import PlanError

METHODS = {
    depth.Stack(): [0, 1, 0, 1, 0],
    depth.Stack(remainder="top"): [0, 1, 0, 1, 1],
    depth.Interpose(): [0, 0, 0, 1, 1],
    depth.TopCopies(n=1): [0, 1, 1, 1, 1],
    depth.Layers((0, 1, 1, 0, 1)): [0, 1, 1, 0, 1],
    depth.Middle(size=1): [0, 0, 0, 0, 1],
}


def blocks_of(model):
    return model.get_submodule(growkern.describe(model).blocks.path)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_blocks_and_their_state_are_copied_in_the_published_order(family, method):
    model = make(family, tied=True)
    next(blocks_of(model)[0].parameters()).requires_grad_(False)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 2)
    source = [
        [
            (p.detach().clone(), p.requires_grad, copy.deepcopy(optim.state.get(p, {})))
            for p in block.parameters()
        ]
        for block in blocks_of(model)
    ]

    report = grow(model, optim, to={"layers": 5}, depth=method)

    assert not report.function_preserving and "twice" in str(report)
    for block, origin in zip(blocks_of(model), METHODS[method], strict=True):
        for p, (value, trains, state) in zip(block.parameters(), source[origin], strict=True):
            assert torch.equal(p, value) and p.requires_grad == trains
            assert all(torch.equal(optim.state[p][key], state[key]) for key in state)
    train(model, optim, 1)


def test_identity_blocks_zero_the_outputs_that_are_buffers():
    model = make("plain", tied=True).double()
    for block in model.blocks:
        bias = block.down._parameters.pop("bias")
        block.down.register_buffer("bias", bias.detach())
    before = logits(model, batch()).detach()

    grow(model, to={"layers": 4})

    assert (logits(model, batch()) - before).abs().max() < 1e-12
    assert [bool(block.down.bias.any()) for block in model.blocks] == [True, False, True, False]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_halved_branches_are_nearly_exact_and_so_are_their_gradients(family):
    """The branches are small, so that blocks nearly commute: the error is of second order in the branches, 1e-3 squared."""
    model = make(family, tied=False).double().eval()
    outputs = growkern.describe(model).blocks.branches
    with torch.no_grad():
        for block in blocks_of(model):
            for name, p in block.named_parameters():
                if name in outputs:
                    offset = float(family == "gemma2")  # Gemma's gain is 1 + weight
                    small = 1e-4 if offset else 1e-3  # the output of a norm is large
                    p.copy_(small * (p + offset) - offset)
    optim = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.5)
    train(model, optim, 1)
    before = logits(model, batch()).detach()

    grow(model, optim, to={"layers": 6}, depth=depth.Interpose(halve_branches=True))

    assert (logits(model, batch()) - before).abs().max() < 1e-5 < before.abs().max()
    for block, origin in zip(blocks_of(model), [0, 0, 0, 1, 1, 1], strict=True):
        assert torch.equal(
            next(block.parameters()), next(blocks_of(model)[3 * origin].parameters())
        )
    model.zero_grad()
    loss_of(model, batch(seed=0)).backward()
    for name, p in model.named_parameters():
        state = optim.state[p]["momentum_buffer"]
        assert (p.grad - state).norm() < 2e-2 * p.grad.norm(), name


def test_branches_after_norms_are_not_scaled():
    model = make("bert", tied=True)

    with pytest.raises(PlanError, match="cannot scale the branches of bert: its norms come after"):
        growkern.plan(model, to={"layers": 4}, depth=depth.Interpose(halve_branches=True))


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_bert2bert_in_one_call_is_to_widen_and_then_to_stack_with_the_rest_from_the_top(family):
    models = [make(family, tied=True) for _ in range(2)]
    optims = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in models]
    for model, optim in zip(models, optims, strict=True):
        train(model, optim, 2)
    aki, stack = width.AKI(maps="cyclic"), depth.Stack(remainder="top")

    grow(models[0], optims[0], to={"hidden": "2x", "layers": 5}, width=aki, depth=stack)
    grow(models[1], optims[1], to="2x", width=aki)
    grow(models[1], optims[1], to={"layers": 5}, depth=stack)

    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q), name
        one, two = optims[0].state[p], optims[1].state[q]
        assert all(torch.equal(one[key], two[key]) for key in one), name
    losses = [train(model, optim, 3) for model, optim in zip(models, optims, strict=True)]
    assert losses[0] == losses[1]


def test_compound_grow_is_depth_ffn_and_length_at_once():
    """CompoundGrow (arXiv:2010.12562) copies layer l mod Ls, tiles the ffn and adds positions; without depth, CompoundGrow is exact."""
    model = make("gpt2", tied=True).double().eval()
    source = {name: p.detach().clone() for name, p in model.named_parameters()}
    to = {"layers": 4, "ffn": "2x", "positions": "2x"}
    before = logits(make("gpt2", tied=True).double().eval(), batch()).detach()

    report = grow(model, to=to, width=width.HyperClone(), depth=depth.Stack())

    assert report.preserves == "nothing"
    for i in range(4):
        old = f"transformer.h.{i % 2}.mlp."
        up, down = (model.transformer.h[i].mlp.get_submodule(n).weight for n in ("c_fc", "c_proj"))
        assert torch.equal(up, source[f"{old}c_fc.weight"].repeat(1, 2))
        assert torch.equal(down, source[f"{old}c_proj.weight"].repeat(2, 1) / 2)
    wide = make("gpt2", tied=True).double().eval()
    assert grow(wide, to={"ffn": "2x", "positions": "2x"}).preserves == "function"
    assert (logits(wide, batch()) - before).abs().max() < 1e-10
