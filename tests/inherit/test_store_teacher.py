"""A store belongs to one teacher, holds what a running teacher would say, and loses little when it ends early."""

import copy

import pytest
import torch
from models import VOCAB, batch, make

from growkern.errors import CheckpointError, PlanError, UnsupportedModelError
from growkern.inherit import KnowledgeInheritance, Stored, store


def teacher(seed=1, **changes):
    return make("llama", tied=False, seed=seed, **changes)


def given(seed=0):
    return {"input_ids": batch(seed), "labels": batch(seed)}


def attached(teacher, model=None, **options):
    model = model or make("llama", tied=True)
    loss = KnowledgeInheritance(teacher, until=10, **options)
    loss.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    return loss


@pytest.mark.parametrize("kind", ["other weights", "one weight", "another dtype"])
def test_another_teacher_of_the_same_class_is_refused(kind, tmp_path):
    source = teacher()
    store(source, [given()], tmp_path / "s", sampled=5)
    other = teacher(seed=2) if kind == "other weights" else copy.deepcopy(source)
    if kind == "one weight":
        other.lm_head.weight.data[3, 4] *= 1.01
    other = other.bfloat16() if kind == "another dtype" else other

    with pytest.raises(CheckpointError, match="holds logits of other arguments .weights"):
        store(other, [given()], tmp_path / "s", sampled=5)

    assert store(copy.deepcopy(source), [given()], tmp_path / "s", sampled=5).n_rows == 32


def test_a_store_that_fails_keeps_what_the_teacher_said(tmp_path):
    source, ran = teacher(), []

    def broken():
        yield from map(given, range(2))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store(source, broken(), tmp_path / "s", sampled=5)
    source.register_forward_hook(lambda *_: ran.append(1))
    made = store(source, map(given, range(3)), tmp_path / "s", sampled=5)
    whole = store(teacher(), map(given, range(3)), tmp_path / "whole", sampled=5)

    assert len(ran) == 1
    at, ids = torch.arange(6) * 16, torch.cat([batch(i) for i in range(3)])
    for mine, other in zip(made.read(at, ids), whole.read(at, ids), strict=True):
        assert torch.equal(mine, other)


def test_an_encoder_decoder_cannot_be_stored(tmp_path):
    with pytest.raises(UnsupportedModelError, match="depend on the labels too"):
        store(make("t5", tied=True), [given()], tmp_path / "s")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("key", ["inputs_embeds", "decoder_inputs_embeds", "encoder_outputs"])
def test_vectors_of_the_student_do_not_reach_the_teacher(key):
    loss = attached(teacher())
    with pytest.raises(PlanError, match=f"{key}: these are vectors of the student"):
        loss._teacher(given() | {key: torch.randn(2, 16, 24)}, torch.arange(4), VOCAB, 0)


def test_an_encoder_decoder_that_makes_no_decoder_inputs_asks_for_them():
    import transformers

    sizes = dict(
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        pad_token_id=0,
    )
    config = transformers.BlenderbotSmallConfig(
        vocab_size=VOCAB, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32, eos_token_id=2, **sizes
    )  # fmt: skip
    model = transformers.BlenderbotSmallForConditionalGeneration(config)
    loss = attached(lambda b: b, model, peak=0.0)
    with pytest.raises(PlanError, match="pass decoder_input_ids"):
        loss(given())
    assert loss(given() | {"decoder_input_ids": batch(3)}).isfinite()


@pytest.mark.parametrize(
    "options", [dict(top_k=VOCAB), dict(top_k=VOCAB, renormalize=True)], ids=str
)
def test_vocab_means_the_same_for_a_stored_and_a_running_teacher(options, tmp_path):
    source, n = teacher(), VOCAB - 6
    tokens = {k: v.clamp_max(n - 1) for k, v in given().items()}
    store(source, [tokens], tmp_path / "s", top_k=VOCAB)
    live = attached(source, vocab=n, **options)
    values = [live(tokens), None]
    stored = Stored(tmp_path / "s", renormalize=options.get("renormalize", False))
    starts = {"teacher_at": torch.tensor([0, 16])}

    values[1] = attached(stored, vocab=n)(tokens | starts)

    torch.testing.assert_close(values[1], values[0], rtol=1e-3, atol=0)  # float16 weights
    assert float(abs(attached(stored)(tokens | starts) - values[0]).detach()) > 0.01


def test_draws_in_the_padding_leave_a_distribution(tmp_path):
    store(teacher(), [given()], tmp_path / "s", sampled=40)
    loss = attached(tmp_path / "s", vocab=VOCAB - 20)
    keep = torch.arange(32)

    targets = loss._targets(given() | {"teacher_at": torch.tensor([0, 16])}, keep, VOCAB)
    index, weight = targets(slice(0, 32))

    torch.testing.assert_close(weight.sum(1), torch.ones(32))
    assert not weight[index >= VOCAB - 20].any()
