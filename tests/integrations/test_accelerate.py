"""A loop under Accelerate's wrappers that grows by a schedule ends with the same bits as a plain loop that grows by hand."""

from pathlib import Path

import pytest
import torch
from models import batch, loss_of, make
from scheduled import DEEPER, WIDER, pair, same_weights

import growkern
from growkern.errors import PlanError
from growkern.integrations.accelerate import attach
from growkern.integrations.bar import Bar
from growkern.training.schedule import GrowthSchedule
from growkern.training.triggers import At, WhenPlateau

accelerate = pytest.importorskip("accelerate")
event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


@pytest.fixture
def accelerator_of():
    def make_one(**options):
        accelerate.state.AcceleratorState._reset_state(True)  # a test may stand for two processes
        return accelerate.Accelerator(cpu=True, **options)

    return make_one


def parts(**options):
    model = make("llama", tied=True, **options)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    return model, optim


def cosine(optim):
    return torch.optim.lr_scheduler.LambdaLR(optim, lambda i: 1.0 - i / 10)


def train(accelerator, model, optim, scheduler, steps, *, first=0, each=lambda loss: None):
    for i in range(first, first + steps):
        with accelerator.accumulate(model):
            loss = loss_of(model, batch(seed=i))
            accelerator.backward(loss)
            optim.step()
            scheduler.step()
            optim.zero_grad()
        each(loss)


@pytest.mark.slow
@pytest.mark.parametrize("n_accumulated", [1, 2])
@pytest.mark.parametrize("late", [False, True], ids=["prepared", "built-on-the-wrapper"])
def test_the_loop_ends_with_the_weights_of_one_that_grows_by_hand(
    n_accumulated, late, accelerator_of
):
    accelerator = accelerator_of(gradient_accumulation_steps=n_accumulated)
    model, optim = parts()
    scheduler = None if late else cosine(optim)
    wrapped, optim = accelerator.prepare(model, optim)
    scheduler = accelerator.prepare(cosine(optim) if late else scheduler)
    schedule = GrowthSchedule([At(step=2, to=WIDER), At(step=4, to=DEEPER)])
    attach(accelerator, wrapped, optim, schedule)
    train(accelerator, wrapped, optim, scheduler, 6 * n_accumulated)

    by_hand, optim = parts()
    scheduler = cosine(optim)
    for i in range(6 * n_accumulated):
        (loss_of(by_hand, batch(seed=i)) / n_accumulated).backward()
        if (i + 1) % n_accumulated == 0:
            optim.step()
            if i + 1 == 2 * n_accumulated:
                growkern.expand_inplace(by_hand, optim, to=WIDER, seed=0, scheduler=scheduler)
            if i + 1 == 4 * n_accumulated:
                growkern.expand_inplace(by_hand, optim, to=DEEPER, seed=1, scheduler=scheduler)
            scheduler.step()
            optim.zero_grad()

    assert schedule.fired == [2, 4]
    assert isinstance(schedule.attachment.options["on_progress"], Bar)
    same_weights(model, by_hand)


def test_what_is_prepared_after_it_is_attached_still_grows(accelerator_of):
    accelerator = accelerator_of()
    model, optim = parts()
    schedule = GrowthSchedule([At(step=1, to=WIDER)])
    handle = attach(accelerator, model, optim, schedule, scheduler := cosine(optim))

    model, optim, scheduler = accelerator.prepare(model, optim, scheduler)
    train(accelerator, model, optim, scheduler, 2)

    assert model.config.hidden_size == 48
    handle.remove()
    assert schedule.attachment is None


def test_save_state_and_load_state_carry_the_schedule(accelerator_of, tmp_path):
    def prepared(**sizes):
        accelerator = accelerator_of()
        model, optim = parts(**sizes)
        scheduler = cosine(optim)
        model, optim, scheduler = accelerator.prepare(model, optim, scheduler)
        events = [At(step=2, to=WIDER, dynamics=None), WhenPlateau(patience=2, to=DEEPER, dynamics=None)]  # fmt: skip
        schedule = GrowthSchedule(events)
        attach(accelerator, model, optim, schedule)
        return accelerator, model, optim, scheduler, schedule

    accelerator, model, optim, scheduler, schedule = prepared()
    each = lambda loss: schedule.observe(loss=1.0)  # noqa: E731
    train(accelerator, model, optim, scheduler, 4, each=each)
    accelerator.save_state(str(tmp_path))
    train(accelerator, model, optim, scheduler, 3, first=4, each=each)

    grown = dict(hidden_size=48, num_attention_heads=8, num_key_value_heads=4, intermediate_size=80)
    grown |= dict(rms_norm_eps=5e-7)  # the growth has halved the epsilon
    accelerator, resumed, optim, scheduler, again = prepared(**grown)
    accelerator.load_state(str(tmp_path))
    assert again.fired == [2] and again.counts.n_steps == 4
    train(accelerator, resumed, optim, scheduler, 3, first=4, each=lambda loss: again.observe(loss=1.0))  # fmt: skip

    assert again.fired == schedule.fired == [2, 5]
    assert again.state_dict() == schedule.state_dict()
    same_weights(model, resumed)


def test_load_state_replays_the_growths_of_the_newest_checkpoint_that_accelerate_has_numbered(
    accelerator_of, tmp_path
):
    def prepared():
        numbers = accelerate.utils.ProjectConfiguration(
            project_dir=str(tmp_path), automatic_checkpoint_naming=True
        )
        accelerator = accelerator_of(project_config=numbers)
        model, optim = accelerator.prepare(*parts())
        attach(accelerator, model, optim, GrowthSchedule([At(step=1, to=WIDER)]))
        return accelerator, model, optim

    accelerator, model, optim = prepared()
    accelerator.save_state()
    train(accelerator, model, optim, cosine(optim.optimizer), 1)
    accelerator.save_state()
    accelerator, resumed, _ = prepared()
    accelerator.load_state()

    assert resumed.config.hidden_size == 48
    same_weights(model, resumed)


@pytest.mark.slow
def test_load_state_replays_growths_on_a_model_of_the_starting_sizes(accelerator_of, tmp_path):
    def prepared():
        accelerator, (model, optim) = accelerator_of(), parts()
        scheduler = cosine(optim)
        model, optim, scheduler = accelerator.prepare(model, optim, scheduler)
        deeper = At(step=3, to=DEEPER, trains=growkern.trains.New(head=True))
        schedule = GrowthSchedule([At(step=2, to=WIDER), deeper], trains=growkern.trains.Top(1))
        attach(accelerator, model, optim, schedule)
        return accelerator, model, optim, scheduler, schedule

    accelerator, model, optim, scheduler, schedule = prepared()
    train(accelerator, model, optim, scheduler, 4)
    assert sum(p.requires_grad for p in model.parameters()) == 11  # a block, the norm, the head
    accelerator.save_state(str(tmp_path))
    train(accelerator, model, optim, scheduler, 3, first=4)

    accelerator, resumed, optim, scheduler, again = prepared()
    accelerator.load_state(str(tmp_path))
    train(accelerator, resumed, optim, scheduler, 3, first=4)
    assert again.fired == [2, 3] and again.history == schedule.history
    assert again.attachment.n_params == sum(p.numel() for p in model.parameters())
    same_weights(model, resumed)


def test_growth_is_in_the_event_files(accelerator_of, tmp_path):
    accelerator = accelerator_of(log_with="tensorboard", project_dir=str(tmp_path))
    accelerator.init_trackers("growth")
    model, optim = parts()
    scheduler = cosine(optim)
    model, optim, scheduler = accelerator.prepare(model, optim, scheduler)
    attach(accelerator, model, optim, GrowthSchedule([At(step=2, to=WIDER)]))

    train(accelerator, model, optim, scheduler, 3)
    accelerator.end_training()

    (file,) = Path(tmp_path).rglob("events.out.tfevents.*")
    events = event_accumulator.EventAccumulator(str(file))
    events.Reload()
    n = sum(p.numel() for p in model.parameters())
    assert [(e.step, e.value) for e in events.Scalars("growth/hidden")] == [(2, 48.0)]
    assert [(e.step, e.value) for e in events.Scalars("growth/parameters")] == [(2, float(n))]
    (said,) = events.Tensors("growth/event/text_summary")
    assert said.step == 2
    assert (
        b"hidden 24 -> 48" in (text := said.tensor_proto.string_val[0])
        and f"{n:,}; ".encode() in text
    )


def test_a_second_schedule_is_refused_through_the_wrapper(accelerator_of):
    accelerator = accelerator_of()
    model, optim = accelerator.prepare(*parts())
    attach(accelerator, model, optim, GrowthSchedule([At(step=1)]))

    with pytest.raises(PlanError, match="drives this AdamW already"):
        attach(accelerator, model, optim, GrowthSchedule([At(step=2)]))


def test_two_optimizers_grow_under_accelerate(accelerator_of):
    accelerator, model = accelerator_of(), make("llama", tied=True)
    optims = pair(model)
    wrapped, *both = accelerator.prepare(model, *optims, *map(cosine, optims))
    prepared, schedulers = both[:2], both[2:]
    schedule = GrowthSchedule([At(step=2, to=WIDER)])
    attach(accelerator, wrapped, prepared, schedule)
    for i in range(4):
        accelerator.backward(loss_of(wrapped, batch(seed=i)))
        for one in (*prepared, *schedulers):
            one.step()
        for optim in prepared:
            optim.zero_grad()

    by_hand = make("llama", tied=True)
    optims = pair(by_hand)
    schedulers = [cosine(optim) for optim in optims]
    for i in range(4):
        loss_of(by_hand, batch(seed=i)).backward()
        for optim in optims:
            optim.step()
        if i == 1:
            growkern.expand_inplace(by_hand, optims, to=WIDER, scheduler=schedulers)
        for one in (*optims, *schedulers):
            one.zero_grad() if one in optims else one.step()
    assert schedule.fired == [2]
    same_weights(model, by_hand)


def test_schedulers_of_another_model_are_left_alone(accelerator_of):
    accelerator, (model, optim), other = accelerator_of(), parts(), torch.nn.Linear(2, 2)
    of_other = torch.optim.SGD(other.parameters(), lr=0.1)
    schedulers = [cosine(optim), cosine(of_other)]
    model, optim, *_, scheduler, _ = accelerator.prepare(model, optim, other, of_other, *schedulers)
    schedule = GrowthSchedule([At(step=1, to=WIDER)])

    attachment = attach(accelerator, model, optim, schedule)
    train(accelerator, model, optim, scheduler, 2)

    assert schedule.fired == [1] and attachment.schedulers == schedulers[:1]


def test_load_state_replays_growths_on_averages_and_master_weights(accelerator_of, tmp_path):
    def prepared():
        accelerator, model = accelerator_of(), make("llama", tied=True).bfloat16()
        masters = {p: torch.nn.Parameter(p.detach().float()) for p in model.parameters()}
        average = torch.optim.swa_utils.AveragedModel(model)
        model, optim = accelerator.prepare(model, torch.optim.AdamW(masters.values(), lr=1e-2))
        schedule = GrowthSchedule([At(step=1, to=WIDER)])
        attach(accelerator, model, optim, schedule, ema=average, master_weights=masters)
        return accelerator, model, optim, masters, average

    accelerator, model, optim, masters, _ = prepared()
    accelerator.backward(loss_of(model, batch()))
    for p, master in masters.items():
        master.grad, p.grad = p.grad.float(), None
    optim.step()
    accelerator.save_state(str(tmp_path))

    accelerator, resumed, _, masters, average = prepared()
    accelerator.load_state(str(tmp_path))

    same_weights(model, resumed)
    assert [p.shape for p in masters.values()] == [p.shape for p in masters]
    assert average.module.config.hidden_size == 48 and masters.keys() == {*resumed.parameters()}


@pytest.mark.slow
def test_a_schedule_that_is_attached_again_is_saved_once_and_one_that_is_removed_replays_nothing(
    accelerator_of, tmp_path
):
    accelerator = accelerator_of()
    model, optim = parts()
    model, optim, scheduler = accelerator.prepare(model, optim, cosine(optim))
    schedule = GrowthSchedule([At(step=1, to=WIDER)])
    attach(accelerator, model, optim, schedule).remove()
    attach(accelerator, model, optim, schedule)
    train(accelerator, model, optim, scheduler, 2)
    accelerator.save_state(str(tmp_path))

    accelerator = accelerator_of()
    start, optim = accelerator.prepare(*parts())
    attach(accelerator, start, optim, GrowthSchedule([At(step=1, to=WIDER)])).remove()

    with pytest.raises(RuntimeError, match="size mismatch"):
        accelerator.load_state(str(tmp_path))
    assert len([*tmp_path.glob("custom_checkpoint_*.pkl")]) == 1
    assert start.config.hidden_size == 24


def test_a_step_that_raises_under_a_grad_scaler_leaves_the_weights(accelerator_of, monkeypatch):
    """With a GradScaler, Accelerate calls the method ``step`` that it took from the optimizer before the growth."""
    accelerator = accelerator_of()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    model = make("llama", tied=True)
    wrapped, optim = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    schedule = GrowthSchedule([At(step=2, to=WIDER, dynamics="exact")])
    attach(accelerator, wrapped, optim, schedule)
    scheduler = cosine(optim.optimizer)
    for i in range(4):
        accelerator.backward(loss_of(wrapped, batch(seed=i)))
        optim.step()
        optim.zero_grad()
    accelerator.backward(loss_of(wrapped, batch(seed=5)))
    before = [p.detach().clone() for p in model.parameters()]

    def fails(*_):
        raise RuntimeError("boom")

    monkeypatch.setattr(torch.optim.AdamW, "_init_group", fails)
    with pytest.raises(RuntimeError, match="boom"):
        optim.step()

    assert schedule.fired == [2] and scheduler
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
