"""Hugging Face's Trainer grows between a step and its checkpoint, and ends with the same bits as a plain loop that grows by hand."""

import json
import os
from pathlib import Path

import pytest
import torch
from models import Plain, Words, make
from scheduled import DEEPER, WIDER, same_weights

import growkern
from growkern.errors import PlanError
from growkern.integrations import hf
from growkern.training.schedule import GrowthSchedule
from growkern.training.triggers import At, WhenPlateau

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def trainer_of(model, out, **changes):
    """Make a Trainer with its defaults (fused AdamW, clipping, shuffling) and a cosine scheduler."""
    options = dict(
        output_dir=str(out), max_steps=6, per_device_train_batch_size=2, learning_rate=1e-2, lr_scheduler_type="cosine",
        logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    args = transformers.TrainingArguments(**(options | changes))
    words = Words(64)
    return transformers.Trainer(model=model, args=args, train_dataset=words, eval_dataset=words)


def recorded(model):
    """Return a list that fills with the keyword arguments of every forward call in training."""
    seen = []
    model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs) if m.training else None, with_kwargs=True
    )
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "n_accumulated"),
    [("adamw_torch_fused", 1), ("adafactor", 2), ("sgd", 1), ("adamw_8bit", 2)],
)
def test_the_trainer_ends_with_the_weights_of_a_loop_that_grows_by_hand(
    name, n_accumulated, tmp_path
):
    if "bit" in name:
        pytest.importorskip("bitsandbytes")
    model, by_hand = make("llama", tied=True), make("llama", tied=True)
    seen = recorded(model)
    trainer = trainer_of(model, tmp_path, gradient_accumulation_steps=n_accumulated, optim=name)
    schedule = GrowthSchedule([At(step=2, to=WIDER), At(step=4, to=DEEPER)])
    hf.attach(trainer, schedule)
    trainer.train()

    optim = trainer_of(by_hand, tmp_path, optim=name).create_optimizer()
    scheduler = transformers.get_scheduler("cosine", optim, 0, 6)
    by_hand.train()
    for i in range(6):
        for batch in seen[i * n_accumulated : (i + 1) * n_accumulated]:
            by_hand(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
        optim.step()
        scheduler.step()
        optim.zero_grad()
        if i == 1:
            growkern.expand_inplace(by_hand, optim, to=WIDER, seed=0, scheduler=scheduler)
        if i == 3:
            growkern.expand_inplace(by_hand, optim, to=DEEPER, seed=1, scheduler=scheduler)

    assert len(seen) == 6 * n_accumulated and ("fused" not in name or optim.defaults["fused"])
    assert schedule.fired == [2, 4]
    same_weights(model, by_hand)


def test_a_checkpoint_of_the_step_of_a_growth_holds_the_target_and_the_schedule(tmp_path):
    model = make("llama", tied=True)
    trainer = trainer_of(model, tmp_path, max_steps=4, save_strategy="steps", save_steps=1)
    hf.attach(trainer, GrowthSchedule([At(step=3, to=WIDER)]))
    trainer.train()

    hidden = [
        json.loads((tmp_path / f"checkpoint-{i}" / "config.json").read_text())["hidden_size"]
        for i in (2, 3)
    ]
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")

    assert hidden == [24, 48]
    saved = state["stateful_callbacks"]["GrowthCallback"]["attributes"]["schedule"]
    assert saved["fired"] == [3] and saved["counts"]["n_steps"] == 3
    same_weights(loaded, model)


def saving(model, out, events, **changes):
    """Make a Trainer that saves a checkpoint after each step, and attach a schedule to it."""
    trainer = trainer_of(model, out, save_strategy="steps", save_steps=1, **changes)
    schedule = GrowthSchedule(events)
    hf.attach(trainer, schedule)
    return trainer, schedule


def unscaled():
    return [At(step=3, to=WIDER, dynamics=None), At(step=5, to=DEEPER, dynamics=None)]


@pytest.fixture(scope="module")
def without_dynamics(tmp_path_factory):
    """Train to the end; return the model, the schedule and the folder of the checkpoints."""
    model, folder = make("llama", tied=True), tmp_path_factory.mktemp("unbroken")
    trainer, schedule = saving(model, folder, unscaled())
    trainer.train()
    return model, schedule, folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("at", "restores"),
    [(2, False), (3, False), (3, True)],
    ids=["before-a-growth", "after-one", "after-one-restore-callbacks"],
)
def test_a_resumed_run_goes_on_where_the_checkpoint_was(at, restores, without_dynamics, tmp_path):
    model, schedule, folder = without_dynamics
    checkpoint = str(folder / f"checkpoint-{at}")
    resumed = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    restored = dict(restore_callback_states_from_checkpoint=restores)
    trainer, again = saving(resumed, tmp_path, unscaled(), **restored)

    trainer.train(resume_from_checkpoint=checkpoint)

    assert again.fired == schedule.fired == [3, 5]
    assert again.state_dict() == schedule.state_dict()
    same_weights(model, resumed)


@pytest.mark.slow
def test_a_model_of_the_starting_sizes_is_resumed_bitwise(tmp_path):
    def parts(out):
        model = make("llama", tied=True)
        events = [At(step=2, to=WIDER), At(step=4, to=DEEPER)]
        return model, *saving(model, out, events)

    model, trainer, _ = parts(tmp_path)
    trainer.train()

    for at in (1, 3, 5):
        checkpoint = str(tmp_path / f"checkpoint-{at}")
        resumed, trainer, schedule = parts(tmp_path / f"resumed-{at}")
        if at == 3:  # by hand, or by itself
            hf.resume(trainer, checkpoint)
        trainer.train(resume_from_checkpoint=checkpoint)

        assert schedule.fired == [2, 4]
        same_weights(model, resumed)
        with pytest.raises(PlanError, match="has no schedule"):
            hf.resume(trainer, str(tmp_path))


@pytest.mark.slow
def test_a_run_that_begins_from_a_grown_checkpoint_replays_what_its_optimizer_has_seen(tmp_path):
    first = make("llama", tied=True)
    growkern.expand_inplace(first, to={"ffn": 48})
    first.save_pretrained(tmp_path / "start")

    def parts(out):
        model = type(first).from_pretrained(tmp_path / "start")
        return model, *saving(model, out, [At(step=3, to=WIDER)])

    model, trainer, _ = parts(tmp_path)
    trainer.train()
    for at in (2, 4):  # before and after the growth of this run
        again, trainer, schedule = parts(tmp_path / f"again-{at}")
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
        assert schedule.fired == [3] and len(again.config.growkern_history) == 2
        same_weights(model, again)


class Own(Plain):
    """A model that transformers does not know."""

    def forward(self, input_ids, labels=None):
        scores = super().forward(input_ids)
        loss = torch.nn.functional.cross_entropy(scores[:, :-1].flatten(0, 1), labels[:, 1:].flatten())  # fmt: skip
        return {"loss": loss, "logits": scores}


@pytest.mark.slow
def test_a_model_of_your_own_is_resumed_bitwise_with_its_average_scheduler_and_tokens(tmp_path):
    def parts(out):
        torch.manual_seed(0)
        model = Own(tied=False)
        average = torch.optim.swa_utils.AveragedModel(model)
        trainer = trainer_of(
            model, out, save_strategy="steps", save_steps=1, include_num_input_tokens_seen="all"
        )
        trainer.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda i: 1 - i / 9)  # fmt: skip
        schedule = GrowthSchedule([At(step=2, to=WIDER), At(tokens=5 * 24, to=DEEPER)])
        hf.attach(trainer, schedule, spec=Plain.spec, ema=average)
        return model, average, trainer, schedule

    model, _, trainer, schedule = parts(tmp_path)
    trainer.train()
    resumed, average, trainer, again = parts(tmp_path / "resumed")
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))

    assert again.fired == schedule.fired == [2, 5]
    assert again.state_dict() == schedule.state_dict() and again.counts.n_tokens == 6 * 24
    assert {n: p.shape for n, p in average.module.named_parameters()} == {n: p.shape for n, p in resumed.named_parameters()}  # fmt: skip
    same_weights(model, resumed)


@pytest.mark.slow
def test_growths_of_a_checkpoint_are_replayed_on_master_weights(tmp_path):
    def parts(out):
        model = make("llama", tied=True).bfloat16()
        masters = {p: torch.nn.Parameter(p.detach().float()) for p in model.parameters()}
        trainer = trainer_of(model, out, max_steps=1, save_strategy="steps", save_steps=1)
        trainer.optimizer = optim = torch.optim.AdamW(masters.values(), lr=1e-2)

        def take_gradients(*_):
            for p, master in masters.items():
                master.grad = p.grad.float()

        optim.register_step_pre_hook(take_gradients)
        hf.attach(trainer, GrowthSchedule([At(step=1, to=WIDER)]), master_weights=masters)
        return model, masters, trainer

    _, _, trainer = parts(tmp_path)
    trainer.train()
    resumed, masters, trainer = parts(tmp_path / "resumed")
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))

    assert resumed.config.hidden_size == 48 and {*masters} == {*resumed.parameters()}
    assert all(master.shape == p.shape for p, master in masters.items())


def test_a_callback_that_was_removed_replays_nothing(tmp_path):
    model = make("llama", tied=True)
    trainer, _ = saving(model, tmp_path, [At(step=1, to=WIDER)], max_steps=1)
    trainer.train()
    start = make("llama", tied=True)
    trainer = trainer_of(start, tmp_path)
    trainer.remove_callback(hf.attach(trainer, GrowthSchedule([At(step=1, to=WIDER)])))

    with pytest.raises(Exception, match="size mismatch"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert start.config.hidden_size == 24


@pytest.mark.slow
def test_a_checkpoint_of_a_run_without_a_schedule_counts_the_trainers_steps(tmp_path):
    model = make("llama", tied=True)
    trainer_of(model, tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()

    trainer = trainer_of(model, tmp_path, save_strategy="steps", save_steps=2)
    schedule = GrowthSchedule([At(step=4, to=WIDER)])
    hf.attach(trainer, schedule)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))

    assert schedule.fired == [4] and schedule.counts.n_steps == 6
    assert (tmp_path / "checkpoint-6").exists()


def test_growth_is_in_the_event_files_and_no_loss_is_lost(tmp_path):
    model = make("llama", tied=True)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(tmp_path / "runs")
    trainer = trainer_of(model, tmp_path, report_to=["tensorboard"])
    hf.attach(trainer, GrowthSchedule([At(step=2, to=WIDER)]))
    try:
        trainer.train()
    finally:
        del os.environ["TENSORBOARD_LOGGING_DIR"]

    (file,) = Path(tmp_path / "runs").rglob("events.out.tfevents.*")
    events = event_accumulator.EventAccumulator(str(file))
    events.Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}  # fmt: skip
    assert scalars["train/growth/hidden"] == [(2, 48.0)]
    n = sum(p.numel() for p in model.parameters())
    assert scalars["train/growth/parameters"] == [(2, float(n))]
    assert [step for step, _ in scalars["train/loss"]] == [1, 2, 3, 4, 5, 6]
    (said,) = events.Tensors("train/growth/event/text_summary")
    assert said.step == 2
    assert (
        b"hidden 24 -> 48" in (text := said.tensor_proto.string_val[0])
        and f"{n:,}; ".encode() in text
    )


@pytest.mark.slow
def test_the_trainers_metrics_and_tokens_fire_events(tmp_path):
    model = make("llama", tied=True)
    trainer = trainer_of(
        model, tmp_path, eval_strategy="steps", eval_steps=1, include_num_input_tokens_seen="all"
    )  # fmt: skip
    events = [
        WhenPlateau(metric="eval_loss", patience=2, min_delta=100, to=WIDER),
        At(tokens=5 * 24, to=DEEPER),
    ]
    schedule = GrowthSchedule(events)
    hf.attach(trainer, schedule)

    trainer.train()

    # three evaluations precede step 4; five batches of 24 tokens precede the second growth
    assert schedule.fired == [4, 5]
    assert schedule.counts.n_tokens == 6 * 24


def test_tokens_that_the_trainer_does_not_count_are_refused(tmp_path):
    trainer = trainer_of(make("llama", tied=True), tmp_path)

    with pytest.raises(PlanError, match='include_num_input_tokens_seen="all"'):
        hf.attach(trainer, GrowthSchedule([At(tokens=100)]))


def test_a_second_schedule_is_refused_until_the_first_is_taken_off(tmp_path):
    trainer = trainer_of(make("llama", tied=True), tmp_path)
    first = hf.attach(trainer, GrowthSchedule([At(step=1)]))

    with pytest.raises(PlanError, match="another schedule is attached"):
        hf.attach(trainer, GrowthSchedule([At(step=2)]))
    trainer.remove_callback(first)
    hf.attach(trainer, GrowthSchedule([At(step=2)]))


@pytest.mark.slow
def test_the_best_model_is_one_of_the_final_size(tmp_path):
    model = make("llama", tied=True)
    trainer = trainer_of(
        model, tmp_path, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    hf.attach(trainer, GrowthSchedule([At(step=3, to=WIDER)]))

    trainer.train()  # the "best" of all evaluations comes before the growth

    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert max(losses) > max(losses[2:])
    assert trainer.state.best_metric == max(losses[2:])
    assert model.config.hidden_size == model.get_input_embeddings().embedding_dim == 48


@pytest.mark.slow
def test_a_second_train_and_a_run_that_failed_leave_no_hook_behind(tmp_path, monkeypatch):
    model = make("llama", tied=True)
    trainer = trainer_of(model, tmp_path, max_steps=2)
    schedule = GrowthSchedule([At(step=3, to=WIDER)])
    hf.attach(trainer, schedule)
    trainer.train()
    assert schedule.attachment is None and schedule.fired == []

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "training_step", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.train()
    trainer.train()

    assert schedule.fired == [3] and schedule.attachment is None
