"""Stored logits teach like the teacher that made them; a killed store goes on; logits of anything else are refused by name."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from inherited import formula, spread
from models import VOCAB, make

from growkern.errors import CheckpointError, GrowthError, PlanError
from growkern.inherit import KnowledgeInheritance, Stored, store, top
from growkern.inherit.stored import tokenizer_hash

N, LENGTH = 12, 16


def corpus(n=N, seed=0, length=LENGTH):
    return torch.randint(0, VOCAB, (n, length), generator=torch.Generator().manual_seed(seed))


def batches(ids, size=3):
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(size)]  # fmt: skip


def teacher(**changes):
    return make("llama", tied=False, seed=1, **changes)


def attached(loss):
    model = make("llama", tied=True)
    loss.attach(model, torch.optim.AdamW(model.parameters()))
    return model


def rows(ids, which):
    """Return a shuffled batch of the corpus, with the starts of its sequences."""
    picked = ids[which]
    return {"input_ids": picked, "labels": picked, "teacher_at": torch.tensor(which) * ids.shape[1]}  # fmt: skip


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir())}


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(sys.modules[store.__module__], "ROWS", 4 * LENGTH)


@pytest.mark.parametrize("renormalize", [False, True])
def test_shuffled_batches_get_the_rows_of_their_positions(renormalize, small_shards, tmp_path):
    ids, source = corpus(), teacher()
    made = store(source, batches(ids), tmp_path / "s", top_k=VOCAB - 4)
    loss = KnowledgeInheritance(tmp_path / "s", renormalize=renormalize)
    model, which = attached(loss), [7, 2, 11]
    with torch.no_grad():
        z = source(ids[which]).logits[:, :-1].flatten(0, 1)
    index, weight = top(z, VOCAB - 4, 2.0, renormalize=renormalize)
    student = model(ids[which]).logits[:, :-1].flatten(0, 1)
    expected = formula(student, ids[which][:, 1:].flatten(), spread(index, weight, VOCAB), 1.0, 2.0)

    value = loss(rows(ids, which))

    assert len(made.shards) == 2 and made.n_rows == N * LENGTH and made.held_mass > 0.5
    torch.testing.assert_close(value, expected, rtol=1e-3, atol=0)  # float16 weights


def test_float16_weights_keep_the_held_mass_to_float32(tmp_path):
    ids, source = corpus(), teacher()
    made = store(source, batches(ids), tmp_path / "s", top_k=10, tau=1.0)
    with torch.no_grad():
        exact = top(source(ids).logits.flatten(0, 1), 10, 1.0)[1]

    weight = made.read(torch.arange(N) * LENGTH, ids)[1].flatten(0, 1)

    torch.testing.assert_close(weight.sum(1), exact.sum(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(weight, exact, rtol=1e-3, atol=0)


def test_samples_sum_to_one_and_are_drawn_from_the_teacher(tmp_path):
    ids, source = corpus(), teacher()
    made = store(source, batches(ids), tmp_path / "s", sampled=50)
    index, weight = made.read(torch.arange(N) * LENGTH, ids)
    with torch.no_grad():
        p = (source(ids).logits.flatten(0, 1) / 2).softmax(-1)

    dense = spread(index.flatten(0, 1), weight.flatten(0, 1), VOCAB)

    assert made.header.kind == "sampled" and made.header.k == 50 and made.held_mass == 1.0
    torch.testing.assert_close(dense.sum(1), torch.ones(N * LENGTH), rtol=1e-6, atol=0)
    error = (p * (1 - p) / 50).sqrt()
    assert 0.9 < float(((dense - p) / error).square().mean()) < 1.1


def test_a_store_takes_the_bytes_that_its_report_says(tmp_path):
    made = store(teacher(), batches(corpus()), tmp_path / "s", top_k=10)

    per_position = 10 * (2 + 2) + 4 + 2  # columns, weights, mass, token
    files = sum(p.stat().st_size for p in (tmp_path / "s").glob("*.safetensors"))
    assert made.n_bytes == files and N * LENGTH * per_position <= files < N * LENGTH * per_position + 2000  # fmt: skip
    text = str(made)
    assert "top, 10 per position, tau 2" in text and "192 in sequences of 16" in text
    assert "hold" in text and "Store with sampled=64" in text


def test_renormalizing_a_flat_top_warns(tmp_path):
    store(teacher(), batches(corpus()), tmp_path / "s", top_k=3)

    with pytest.warns(
        UserWarning, match=r"The top 3 hold \d+% of the teacher's probability at tau 2"
    ):
        KnowledgeInheritance(tmp_path / "s", renormalize=True)


@pytest.mark.parametrize("kind", [dict(top_k=5), dict(sampled=7)], ids=str)
def test_an_interrupted_store_goes_on_and_ends_with_the_same_bytes(kind, small_shards, tmp_path):
    ids, source, ran = corpus(), teacher(), []
    store(source, batches(ids), tmp_path / "whole", **kind)

    def broken():
        yield from batches(ids)[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store(source, broken(), tmp_path / "s", **kind)
    with pytest.raises(CheckpointError, match="store was interrupted. Run the same store again"):
        Stored(tmp_path / "s")
    (tmp_path / "s" / "teacher-00001.part").write_bytes(b"half a shard")
    source.register_forward_hook(lambda *_: ran.append(1))
    store(source, batches(ids), tmp_path / "s", **kind)

    at = torch.arange(N) * LENGTH
    for mine, other in zip(
        *(Stored(tmp_path / n).read(at, ids) for n in ("s", "whole")), strict=True
    ):
        assert torch.equal(mine, other)
    assert len(ran) == 1  # of four batches


@pytest.mark.slow
def test_a_killed_store_goes_on(tmp_path):
    here = Path(__file__)
    process = subprocess.Popen(
        [sys.executable, str(here), str(tmp_path / "s")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(here.parents[1])])},
        stdout=subprocess.DEVNULL,
    )
    try:
        limit = time.monotonic() + 60
        while not (tmp_path / "s" / "teacher-00001.safetensors").exists():
            assert process.poll() is None and time.monotonic() < limit
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "s" / "index.json").exists()
    whole = store(teacher(), batches(corpus()), tmp_path / "whole", sampled=7)

    made = store(teacher(), batches(corpus()), tmp_path / "s", sampled=7)

    at = torch.arange(N) * LENGTH
    for mine, other in zip(made.read(at, corpus()), whole.read(at, corpus()), strict=True):
        assert torch.equal(mine, other)


def test_a_complete_store_is_extended_by_a_longer_corpus_and_left_alone_by_the_same(tmp_path):
    ids, source = corpus(), teacher()
    store(source, batches(ids[:6]), tmp_path / "s", sampled=7)
    before = contents(tmp_path / "s")
    store(source, batches(ids[:6]), tmp_path / "s", sampled=7)
    assert contents(tmp_path / "s") == before

    longer = store(source, batches(ids), tmp_path / "s", sampled=7)

    assert longer.n_rows == N * LENGTH and len(longer.shards) == 2


def test_masked_language_models_need_the_masks_that_the_teacher_saw(tmp_path):
    ids, source = corpus(), make("bert", tied=True, seed=1)
    masked = ids.clone()
    masked[:, ::4] = 3
    store(source, batches(masked), tmp_path / "s", sampled=20)
    loss = KnowledgeInheritance(tmp_path / "s")
    student = make("bert", tied=True)
    loss.attach(student, torch.optim.AdamW(student.parameters()))
    given = {"input_ids": masked[:2], "labels": ids[:2], "teacher_at": torch.tensor([0, LENGTH])}

    assert loss(given).isfinite()

    given["input_ids"] = ids[:2]
    with pytest.raises(PlanError, match="for masked language models, one draw of the masks"):
        loss(given)


def test_padding_of_the_stored_vocabulary_is_left_out(tmp_path):
    ids, wide = corpus(), teacher(vocab_size=VOCAB + 14)
    store(wide, batches(ids), tmp_path / "s", top_k=VOCAB + 14)
    loss = KnowledgeInheritance(tmp_path / "s", vocab=VOCAB)
    model = attached(loss)
    with torch.no_grad():
        q = (wide(ids[:3]).logits[:, :-1].flatten(0, 1) / 2).softmax(-1)[:, :VOCAB]
    z = model(ids[:3]).logits[:, :-1].flatten(0, 1)

    value = loss(rows(ids, [0, 1, 2]))

    expected = formula(z, ids[:3, 1:].flatten(), q / q.sum(1, keepdim=True), 1.0, 2.0)
    torch.testing.assert_close(value, expected, rtol=2e-3, atol=0)


class Tokenizer:
    def __init__(self, *words):
        self.words = words

    def get_vocab(self):
        return {word: i for i, word in enumerate(self.words)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "s"
    store(teacher(), batches(corpus()), path, sampled=5, tokenizer=Tokenizer("a", "b"))
    return path


def asked(folder, **changes):
    loss = KnowledgeInheritance(folder)
    attached(loss)
    loss(rows(corpus(), [1, 2]) | changes)


def without_starts(folder):
    loss = KnowledgeInheritance(folder)
    attached(loss)
    loss({"input_ids": corpus()[:2], "labels": corpus()[:2]})


def of_another_vocabulary(folder):
    loss = KnowledgeInheritance(folder)
    model = make("llama", tied=True, vocab_size=80)
    loss.attach(model, torch.optim.AdamW(model.parameters()))


def again(folder, ids=None, **options):
    store(
        teacher(),
        batches(corpus() if ids is None else ids),
        folder,
        **dict(sampled=5, tokenizer=Tokenizer("a", "b")) | options,
    )


def two_lengths(folder):
    store(teacher(), batches(corpus(3)) + batches(corpus(3, length=8)), folder.parent / "l")


REFUSED = {
    "another tokenizer": (lambda f: KnowledgeInheritance(f, tokenizer=Tokenizer("b", "a")), "logits for another tokenizer"),
    "another temperature": (lambda f: KnowledgeInheritance(f, tau=1.0), "tau: 1 is not the temperature of the stored logits, 2"),
    "another vocabulary": (of_another_vocabulary, "vocabulary of 66, and the student of 80"),
    "another corpus": (lambda f: asked(f, input_ids=corpus(seed=5)[1:3]), "position 16 of .* is token"),
    "another length": (lambda f: asked(f, input_ids=corpus()[1:3, :8], labels=corpus()[1:3, :8]), "sequences of 16 tokens. Cut the corpus"),
    "a start between sequences": (lambda f: asked(f, teacher_at=torch.tensor([3, 16])), "3 is not the start of a sequence"),
    "a start behind the corpus": (lambda f: asked(f, teacher_at=torch.tensor([0, N * LENGTH])), "has 192 positions"),
    "no starts": (without_starts, "input_ids and teacher_at"),
    "a choice from what is stored": (lambda f: KnowledgeInheritance(f, sampled=3), "this teacher gives weights"),
    "stored with other arguments": (lambda f: again(f, sampled=6), "holds logits of other arguments .k: 5 and 6."),
    "stored by another tokenizer": (lambda f: again(f, tokenizer=Tokenizer("b")), "holds logits of other arguments .tokenizer"),
    "stored of another corpus": (lambda f: again(f, corpus(seed=3)), "the tokens at position 0 are not those"),
    "stored of a longer corpus": (lambda f: again(f, corpus()[:6]), "the batches have 96 positions, and .* holds 192"),
    "a folder that is none": (lambda f: Stored(f.parent), "holds no complete stored logits. Pass a folder"),
    "too many weights": (lambda f: again(f.parent / "k", sampled=None, top_k=67), "top_k: 67 is more than the vocabulary of 66"),
    "two choices": (lambda f: again(f.parent / "k", top_k=3), "exclude each other"),
    "no weights": (lambda f: again(f.parent / "k", sampled=0), "sampled: 0 is no number"),
    "no batch": (lambda f: store(teacher(), [], f.parent / "k"), "batches: there is none"),
    "a batch without tokens": (lambda f: store(teacher(), [{"x": 1}], f.parent / "k"), "has input_ids of shape"),
    "sequences of two lengths": (two_lengths, "8 tokens follows sequences of 16"),
    "batches out of order": (lambda f: store(teacher(), [rows(corpus(), [1, 0])], f.parent / "o"), "in the order of the corpus"),
    "a tokenizer that is none": (lambda f: KnowledgeInheritance(f, tokenizer=5), "a int has no get_vocab"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "match"), REFUSED.values(), ids=REFUSED)
def test_logits_of_something_else_are_refused_with_a_way_out(call, match, folder):
    before = contents(folder)

    with pytest.raises(GrowthError, match=match):
        call(folder)

    assert contents(folder) == before
    assert not (folder.parent / "k").exists()


def test_the_same_tokenizer_is_accepted(folder):
    assert KnowledgeInheritance(folder, tokenizer=Tokenizer("a", "b")).tau == 2.0
    assert tokenizer_hash(Tokenizer("a", "b")) == Stored(folder).header.tokenizer


@pytest.mark.parametrize("text", ["{", "[]", '{"header": {}}'], ids=["cut", "list", "fields"])
def test_a_damaged_index_is_refused_and_made_anew_by_the_same_store(text, tmp_path):
    path = tmp_path / "s"
    again(path)
    before = contents(path)
    (path / "index.json").write_text(text)

    with pytest.raises(CheckpointError, match="rewrites the index"):
        Stored(path)

    again(path)
    assert contents(path) == before


def test_a_missing_or_damaged_shard_is_refused(tmp_path):
    path = tmp_path / "s"
    again(path)
    shard = path / "teacher-00000.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="run the same store again"):
        asked(path)
    shard.unlink()
    with pytest.raises(CheckpointError, match="is missing; run the same store again"):
        Stored(path)


def slowly(ids):
    for given in batches(ids):
        yield given
        time.sleep(0.2)


if __name__ == "__main__":
    sys.modules[store.__module__].ROWS = 3 * LENGTH
    store(teacher(), slowly(corpus()), sys.argv[1], sampled=7)
