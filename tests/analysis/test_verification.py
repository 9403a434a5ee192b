"""``growkern.verify`` finds another function, equal copies, dead elements, wrong optimizer state and parameters that no optimizer holds."""

import copy

import torch
from models import batch, grow, make, train
from states import same, state_of

import growkern
from growkern import width


def case(**options):
    model = make("gpt2", tied=True)
    optim = torch.optim.AdamW(model.parameters())
    train(model, optim, 2)
    source = copy.deepcopy(model)
    grow(model, optim, **({"to": "2x"} | options))
    return source, model, optim


def test_a_good_growth_is_ok_and_prints_a_table():
    found = growkern.verify(*case()[:2], batch(n=16), case()[2])

    assert found.same_function and not found.dead and not found.copies
    assert "logits error" in str(found) and "DEAD" not in str(found)


def test_equal_copies_are_found():
    source, model, optim = case(width=width.Lossless(noise=0))

    found = growkern.verify(source, model, batch(n=16), optim)

    assert found.ok and found.copies and "STAY EQUAL" in str(found)


def test_another_function_is_found():
    source, model, optim = case()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] += 0.1

    found = growkern.verify(source, model, batch(), optim)

    assert not found.ok and "DIFFERENT" in str(found)


def test_dead_elements_are_found():
    source, model, optim = case()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[:, 5] = 0
        model.transformer.h[0].mlp.c_fc.bias[5] = 0
        model.transformer.h[0].mlp.c_proj.weight[5] = 0

    found = growkern.verify(source, model, batch(), optim)

    assert (
        found.dead["transformer.h.0.mlp.c_fc.weight"] == 48
        and found.dead["transformer.h.0.mlp.c_proj.weight"] == 48
    )


def test_wrong_state_and_forgotten_parameters_are_found():
    source, model, optim = case()
    p = model.transformer.h[0].mlp.c_fc.weight
    optim.state[p]["exp_avg"] = torch.zeros(24, 96)
    for group in optim.param_groups:
        group["params"] = [q for q in group["params"] if q is not model.transformer.ln_f.bias]

    found = growkern.verify(source, model, batch(), optim)

    assert found.state == ("transformer.h.0.mlp.c_fc.weight: exp_avg (24, 96)",)
    assert found.unheld == ("transformer.ln_f.bias",) and "NOT TRAINED" in str(found)


def test_nothing_that_is_passed_in_is_changed():
    source, model, optim = case()
    model.train()
    source_optim = torch.optim.SGD(source.parameters())
    before = state_of(model, optim), state_of(source, source_optim)

    growkern.verify(source, model, {"input_ids": batch(), "labels": batch()}, optim)

    assert model.training and same((state_of(model, optim), state_of(source, source_optim)), before)


def test_backbones_without_a_head_are_checked_as_far_as_they_compare():
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    sizes = dict(
        hidden_size=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=40,
        num_hidden_layers=2,
    )
    model = LlamaModel(LlamaConfig(**sizes, vocab_size=66, bos_token_id=0, eos_token_id=1))
    source = copy.deepcopy(model)

    growkern.expand_inplace(model, to={"layers": 3})
    deeper = growkern.verify(source, model, batch(n=16))
    growkern.expand_inplace(model, to="2x")
    wider = growkern.verify(source, model, batch(n=16))

    assert deeper.same_function and not deeper.dead
    assert not wider.same_function and "NOT COMPARABLE" in str(wider)
