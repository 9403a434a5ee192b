"""Hugging Face's Trainer with a teacher ends with the weights of a plain loop on the models' own logits, with one denominator per step."""

import pytest
import torch
import torch.nn.functional as F
from inherited import distillation
from models import VOCAB, make
from scheduled import same_weights

import growkern
from growkern.errors import PlanError, UnsupportedModelError
from growkern.inherit import KnowledgeInheritance, store

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
LENGTH = 12


class Corpus(torch.utils.data.Dataset):
    """Rows of 12 tokens; every other row has few labels, so that micro-batches have unequal counts."""

    def __init__(self, starts=False):
        self.starts = starts

    def __len__(self):
        return 24

    def __getitem__(self, i):
        ids = torch.randint(0, VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(i))
        labels = ids.clone()
        labels[: 9 * (i % 2)] = -100
        row = {"input_ids": ids, "labels": labels}
        return row | ({"teacher_at": i * LENGTH} if self.starts else {})


def trainer_of(model, out, data=None, **changes):
    options = dict(
        output_dir=str(out), max_steps=4, per_device_train_batch_size=2, learning_rate=0.1, logging_steps=1, save_strategy="no",
        report_to=[], use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, optim="sgd", lr_scheduler_type="constant",
    )  # fmt: skip
    args = transformers.TrainingArguments(**(options | changes))
    data = data or Corpus()
    return transformers.Trainer(model=model, args=args, train_dataset=data, eval_dataset=data)


def teacher(family="llama"):
    return make(family, tied=True, seed=1)


def recorded(model):
    seen = []
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs) if m.training else None, with_kwargs=True)  # fmt: skip
    return seen


def labels_of(ids):
    """Return the labels of the corpus's rows with these tokens."""
    rows = {tuple(row["input_ids"].tolist()): row["labels"] for row in map(Corpus().__getitem__, range(24))}  # fmt: skip
    return torch.stack([rows[tuple(i.tolist())] for i in ids])


def by_hand(family, seen, n_accumulated, until):
    """Train a copy on the recorded batches, by a plain loop on whole logits."""
    model, source = make(family, tied=True), teacher(family).eval()
    optim = torch.optim.SGD(model.parameters(), lr=0.1)
    shift = int(family != "bert")
    for step in range(4):
        alpha = max(0.0, 1 - step / until)
        given = seen[step * n_accumulated : (step + 1) * n_accumulated]
        labels = [labels_of(g["input_ids"])[:, shift:].flatten() for g in given]
        n_items = sum(int((y != -100).sum()) for y in labels)
        for inputs, y in zip(given, labels, strict=True):
            keep, end = y != -100, LENGTH - shift
            z = model(**inputs).logits[:, :end].flatten(0, 1)[keep]
            with torch.no_grad():
                t = source(**inputs).logits[:, :end].flatten(0, 1)[keep]
            kl = distillation(z, t, 2.0) * len(z)
            ((1 - alpha) * F.cross_entropy(z, y[keep], reduction="sum") + alpha * kl).div(n_items).backward()  # fmt: skip
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optim.step()
        optim.zero_grad()
    return model


@pytest.mark.slow
@pytest.mark.parametrize("n_accumulated", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_the_trainer_ends_with_the_weights_of_a_plain_loop(family, n_accumulated, tmp_path):
    model = make(family, tied=True)
    seen = recorded(model)
    trainer = trainer_of(model, tmp_path, gradient_accumulation_steps=n_accumulated)
    loss = KnowledgeInheritance(teacher(family), until=3)
    growkern.hf.inherit(trainer, loss)

    trainer.train()

    expected = by_hand(family, seen, n_accumulated, until=3)
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=2e-6, msg=name)
    alphas = [row["alpha"] for row in trainer.state.log_history if "alpha" in row]
    assert alphas == pytest.approx([1, 2 / 3, 1 / 3, 0])
    assert all("labels" not in given for given in seen)


def test_alpha_of_zero_is_the_stock_trainer(tmp_path):
    models, source = [make("llama", tied=True) for _ in range(2)], teacher()
    for model, inherits in zip(models, (True, False), strict=True):
        trainer = trainer_of(model, tmp_path, gradient_accumulation_steps=2)
        if inherits:
            growkern.hf.inherit(trainer, KnowledgeInheritance(source, until=1, peak=0.0))
        trainer.train()

    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=2e-6)


def test_a_step_without_a_predicted_position_changes_no_weight(tmp_path):
    model = make("llama", tied=True)
    rows = [row | {"labels": torch.full((LENGTH,), -100)} for row in map(Corpus().__getitem__, range(24))]  # fmt: skip
    trainer = trainer_of(model, tmp_path, rows)
    growkern.hf.inherit(trainer, KnowledgeInheritance(teacher(), until=4))

    trainer.train()

    same_weights(model, make("llama", tied=True))
    assert [row["loss"] for row in trainer.state.log_history if "loss" in row] == [0.0] * 4


def test_stored_logits_reach_the_loss_and_not_the_model(tmp_path):
    ids = torch.stack([Corpus()[i]["input_ids"] for i in range(24)])
    store(teacher(), [{"input_ids": ids}], tmp_path / "s", top_k=VOCAB)
    models, data = [make("llama", tied=True) for _ in range(2)], Corpus(starts=True)
    live = teacher()
    for model, source in zip(models, (live, tmp_path / "s"), strict=True):
        trainer = trainer_of(model, tmp_path, data)
        growkern.hf.inherit(trainer, KnowledgeInheritance(source, until=4))
        trainer.train()
        evaluated = trainer.evaluate()

    assert evaluated["eval_loss"] == trainer_of(models[1], tmp_path).evaluate()["eval_loss"]
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)  # weights in float16


def test_a_resumed_run_ends_with_the_weights_of_an_unbroken_one(tmp_path):
    models, ran = [make("llama", tied=True) for _ in range(2)], []
    options = dict(save_strategy="steps", save_steps=2)
    for model, checkpoint in zip(models, (None, str(tmp_path / "checkpoint-2")), strict=True):
        trainer = trainer_of(model, tmp_path, **options)
        source = teacher()
        source.register_forward_hook(lambda *_: ran.append(1))
        growkern.hf.inherit(trainer, KnowledgeInheritance(source, until=3))
        trainer.train(resume_from_checkpoint=checkpoint)

    same_weights(*models)
    assert len(ran) == 3 + 1


def test_growth_and_inheritance_share_a_trainer(tmp_path):
    model = make("llama", tied=True)
    trainer = trainer_of(model, tmp_path)
    loss = KnowledgeInheritance(make("llama", tied=True), until=4)
    growkern.hf.inherit(trainer, loss)
    growkern.hf.attach(trainer, growkern.GrowthSchedule([growkern.At(step=2)]))

    trainer.train()

    assert model.config.hidden_size == 48 and loss.n_steps == 4
    assert not model.lm_head._forward_pre_hooks


def inherited(tmp_path, model=None, trainer=None, **changes):
    own = trainer or trainer_of(model or make("llama", tied=True), tmp_path, **changes)
    growkern.hf.inherit(own, KnowledgeInheritance(teacher(), until=4))
    return own


class OwnLoss(transformers.Trainer):
    def compute_loss(self, *args, **kwargs):
        return 2 * super().compute_loss(*args, **kwargs)


def own_loss(path):
    args = transformers.TrainingArguments(output_dir=str(path), use_cpu=True, report_to=[])
    inherited(path, trainer=OwnLoss(make("llama", tied=True), args))


REFUSED = {
    "a loss of its own": (own_loss, PlanError, "the OwnLoss has a compute_loss of its own"),
    "twice": (lambda path: inherited(path, trainer=inherited(path)), PlanError, "inherits already"),
    "label smoothing": (lambda path: inherited(path, label_smoothing_factor=0.1), PlanError, "label smoothing"),
    "no head": (lambda path: inherited(path, make("llama", tied=True).model), UnsupportedModelError, "names no output head"),
    "no trainer": (lambda path: growkern.hf.inherit(None, KnowledgeInheritance(teacher())), PlanError, "expected a transformers.Trainer"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "match"), REFUSED.values(), ids=REFUSED)
def test_a_trainer_that_cannot_inherit_is_refused(call, error, match, tmp_path):
    with pytest.raises(error, match=match):
        call(tmp_path)
