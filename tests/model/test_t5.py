"""T5 grows with two stacks of blocks, a table of positions in the first block of each stack, three configs and a scaled head."""

import copy
import dataclasses

import pytest
import torch
import transformers
from models import batch, exact_norms, grow, logits, loss_of, make, run, train

import growkern
from growkern import depth, width
from growkern.errors import PlanError, UnsupportedModelError
from growkern.planning.index_map import IndexMap
from growkern.planning.method_spaces import even

DEEPER = {
    "encoder": {"layers": 5},
    "decoder": {"decoder_layers": 5},
    "both": {"layers": 3, "decoder_layers": 6, "hidden": 36},
}


def depths(model):
    return len(model.encoder.block), len(model.decoder.block)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("to", DEEPER.values(), ids=DEEPER)
def test_each_stack_deepens_by_itself_and_exactly(to, tied, monkeypatch):
    exact_norms(monkeypatch)
    model = make("t5", tied=tied).double().eval()
    before = logits(model, batch()).detach()
    firsts = [model.encoder.block[0], model.decoder.block[0]]

    report = grow(model, to=to)

    n = to.get("layers", 2), to.get("decoder_layers", 2)
    assert report.function_preserving and depths(model) == n
    assert report.n_new_blocks == sum(n) - 4
    assert (logits(model, batch()) - before).abs().max() < 1e-10
    assert [model.encoder.block[0], model.decoder.block[0]] == firsts
    for stack in (model.encoder, model.decoder):
        attentions = [block.layer[0].SelfAttention for block in stack.block]
        assert [a.has_relative_attention_bias for a in attentions] == [True] + [False] * (
            len(attentions) - 1
        )
        assert [a.layer_idx for a in attentions] == list(range(len(attentions)))
    assert [b.layer[1].EncDecAttention.layer_idx for b in model.decoder.block] == list(range(n[1]))


def test_the_three_configs_say_what_each_of_them_said(tmp_path):
    model = make("t5", tied=True)
    others = [m.config for m in (model, model.encoder, model.decoder)]

    grow(model, to=DEEPER["both"])
    model.save_pretrained(tmp_path)
    stock = type(model)(transformers.T5Config.from_pretrained(tmp_path))

    for name, part in {"": model, "encoder": model.encoder, "decoder": model.decoder}.items():
        expected = stock.get_submodule(name).config
        for field in ("num_layers", "num_decoder_layers", "d_model", "d_ff", "num_heads", "d_kv"):
            assert getattr(part.config, field) == getattr(expected, field), (name, field)
        inside = [vars(m)["config"] for m in part.modules() if "config" in vars(m)]
        assert name == "" or all(config is part.config for config in inside)
    assert all(config.d_model == 24 and config.num_layers == 2 for config in others)


@pytest.mark.parametrize("to", DEEPER.values(), ids=DEEPER)
def test_generation_with_a_cache_equals_generation_without(to):
    model = make("t5", tied=True).eval()
    grow(model, to=to)
    options = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False)
    caches = [transformers.DynamicCache(config=model.decoder.config) for _ in range(2)]
    held = transformers.EncoderDecoderCache(*caches)  # generate() would size a cache by num_layers

    with_cache = model.generate(batch(n=2), past_key_values=held, **options)
    without = model.generate(batch(n=2), use_cache=False, **options)

    assert torch.equal(with_cache, without) and len(held.self_attention_cache) == depths(model)[1]


@pytest.mark.parametrize("head", ["tied, scaled", "tied", "head of its own", "untied"])
def test_a_head_grows_as_it_is_and_loads_again(head, tmp_path, monkeypatch):
    """``scale_decoder_outputs`` does not say that the head is tied: transformers ties all tables, and unties a head of the checkpoint."""
    exact_norms(monkeypatch)
    model = make("t5", tied=head.startswith("tied"))
    model.config.scale_decoder_outputs = head == "tied, scaled"
    if head == "head of its own":  # T5 1.1 ties the tables and has a separate head
        model.encoder.embed_tokens.weight = model.decoder.embed_tokens.weight = model.shared.weight
        model.config.tie_word_embeddings = True
    model.double().eval()
    before = logits(model, batch()).detach()

    grow(model, to={"hidden": 36, "layers": 3, "decoder_layers": 3})
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()

    assert (model.lm_head.weight is model.shared.weight) == head.startswith("tied")
    assert (logits(model, batch()) - before).abs().max() < 1e-10
    assert loaded.config.scale_decoder_outputs == model.config.scale_decoder_outputs
    assert torch.equal(logits(loaded, batch()), logits(model, batch()))


@pytest.mark.parametrize("kind", ["T5Model", "T5EncoderModel"])
@pytest.mark.parametrize("ffn", ["relu", "gated-gelu"])
def test_without_a_head_or_a_decoder(kind, ffn, monkeypatch):
    exact_norms(monkeypatch)
    config = make("t5", tied=True, feed_forward_proj=ffn).config
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config).double().eval()
    before = run(model, batch()).last_hidden_state.detach()
    to = {"hidden": 48, "ffn": 99, "layers": 4}

    report = growkern.expand_inplace(
        model, to=to | ({"decoder_layers": 3} if kind == "T5Model" else {})
    )
    after = run(model, batch()).last_hidden_state

    assert report.function_preserving and model.config.num_layers == 4
    assert after.shape[-1] == 48 and (after[..., :24] - before).abs().max() < 1e-10


class OwnMaps:
    """A width method that draws another random map for every space of heads."""

    def widen(self, spec, sizes):
        wide = width.Lossless(noise=0).widen(spec, sizes)
        maps, stream_scales = dict(wide.maps), dict(wide.stream_scales)
        for space in [name for name in maps if name.startswith("heads.")]:
            maps[space] = IndexMap.drawn(spec.sizes["heads"], sizes["heads"], space)
            stream_scales[space] = even(maps[space])
        return dataclasses.replace(wide, maps=maps, stream_scales=stream_scales)


def test_self_attentions_of_a_stack_share_the_heads_of_their_table(monkeypatch):
    """The table's columns must go where the heads of every block go, or scores get another head's positions."""
    exact_norms(monkeypatch)
    model = make("t5", tied=True).double().eval()
    before = logits(model, batch()).detach()

    report = grow(model, to={"heads": 7}, width=OwnMaps())

    assert report.function_preserving
    assert (logits(model, batch()) - before).abs().max() < 1e-10


def test_a_plan_of_two_stacks_prints_and_goes_through_json():
    model = make("t5", tied=True)
    plan = growkern.plan(model, to=DEEPER["both"])

    again = growkern.GrowthPlan.from_json(plan.to_json())

    assert again == plan
    assert "encoder.block  0 1 +1" in str(plan) and "decoder.block  0 +1 +1 1 +1 +1" in str(plan)


def test_a_grown_model_resumes_from_its_history(tmp_path):
    model = make("t5", tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 1)
    grow(model, optim, to=DEEPER["both"])
    train(model, optim, 1)
    saved = copy.deepcopy((model.state_dict(), optim.state_dict()))

    other = make("t5", tied=True, seed=1)
    other_optim = torch.optim.AdamW(other.parameters(), lr=1e-3)
    growkern.resume(other, other_optim, history=model.config.growkern_history)
    other.load_state_dict(saved[0])
    other_optim.load_state_dict(saved[1])

    assert train(other, other_optim, 2, first=2) == train(model, optim, 2, first=2)


ORDERS = {
    depth.Stack(): [0, 1, 1, 1, 1],
    depth.TopCopies(n=1): [0, 1, 1, 1, 1],
    depth.Layers((0, 1, 0, 1, 1)): [0, 1, 1, 1, 1],
}


@pytest.mark.parametrize("method", ORDERS, ids=str)
@pytest.mark.parametrize("which", ["encoder", "decoder"])
def test_depth_methods_copy_blocks_of_one_stack_but_not_its_first(which, method):
    model = make("t5", tied=True)
    source = [copy.deepcopy(block) for block in model.get_submodule(which).block]

    report = grow(model, to=DEEPER[which], depth=method)

    blocks = model.get_submodule(which).block
    assert not report.function_preserving and sum(depths(model)) == 7
    for block, origin in zip(blocks, ORDERS[method], strict=True):
        for p, q in zip(block.parameters(), source[origin].parameters(), strict=True):
            assert torch.equal(p, q)


def test_new_blocks_of_both_stacks_train_and_are_in_the_optimizer():
    model = make("t5", tied=True).double()
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 2)
    source = copy.deepcopy(model)

    grow(model, optim, to=DEEPER["both"])
    given = {"input_ids": batch(n=16).flip(1), "decoder_input_ids": batch(n=16)}
    found = growkern.verify(source, model, given, optim)

    assert not (found.dead or found.copies or found.state or found.unheld), str(found)
    names = [n for n, p in model.named_parameters() for group in optim.param_groups for q in group["params"] if p is q]  # fmt: skip
    assert len(names) == len(dict(model.named_parameters()))


@pytest.mark.parametrize(
    ("changes", "to", "match"),
    [
        ({"num_decoder_layers": 1}, {"decoder_layers": 2}, "unlike all others"),
        ({}, {"decoder_layers": 1}, "by shrink_inplace"),
        ({}, {"decoder_layers": 5000}, "name at most 4,096"),
    ],
    ids=str,
)
def test_what_t5_cannot_is_refused(changes, to, match):
    with pytest.raises(PlanError, match=match):
        grow(make("t5", tied=True, **changes), to=to)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"config": {"nowhere.d_model": "hidden"}}, "names 'nowhere', but the model has no such"),
        (
            {"extra_stacks": (growkern.Blocks("decoder", size="decoder_layers"),)},
            "the model has no ModuleList or ModuleDict here",
        ),
        (
            {"extra_stacks": (growkern.Blocks("decoder.block", size="depth"),)},
            "the spec says depth=None",
        ),
    ],
    ids=str,
)
def test_a_spec_with_stacks_or_configs_that_are_not_there_is_refused(changes, match):
    model = make("t5", tied=True)
    spec = dataclasses.replace(growkern.describe(model), cached_sizes={}, **changes)

    with pytest.raises(UnsupportedModelError, match=match):
        growkern.describe(model, spec)


def test_a_plan_whose_second_stack_is_another_is_refused():
    model = make("t5", tied=True)
    text = growkern.plan(model, to=DEEPER["decoder"]).to_json()
    first, second = '{"branch": 1.0, "new": false, "source": 0}', '{"branch": 1.0, "new": false, "source": 1}'  # fmt: skip
    plan = growkern.GrowthPlan.from_json(text.replace(first, second))

    with pytest.raises(PlanError, match="its blocks are not the model's blocks"):
        grow(model, plan=plan)


def test_a_growth_that_fails_leaves_both_stacks_as_they_were():
    model = make("t5", tied=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    configs = [m.config for m in (model, model.encoder, model.decoder)]
    model.decoder.block[1].layer[1].register_buffer("extra", None)
    model.decoder.block[1].unpicklable = (i for i in ())

    with pytest.raises(growkern.errors.CommitError, match="cannot copy block decoder.block.1"):
        grow(model, to=DEEPER["both"])

    assert depths(model) == (2, 2)
    assert [m.config for m in (model, model.encoder, model.decoder)] == configs
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], p) for name, p in before.items())
    loss_of(model, batch()).backward()
