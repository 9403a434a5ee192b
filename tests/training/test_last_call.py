"""A schedule describes a model that no family knows by the model's last call before the first step."""

from copy import deepcopy

import pytest
import torch
import transformers
from models import VOCAB, Plain, batch, make
from torch import Tensor, nn

import growkern
from growkern import At, GrowthSchedule, width
from growkern.errors import PlanError, UnsupportedModelError


def own(kind: type[nn.Module] = Plain) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = kind().double()
    return model, torch.optim.AdamW(model.parameters(), 1e-3)


def train(model: nn.Module, optim: torch.optim.Optimizer, steps: range, **kwargs: Tensor) -> list[float]:  # fmt: skip
    losses = []
    for step in steps:
        optim.zero_grad()
        out = model(batch(step), **kwargs)
        out = out if isinstance(out, Tensor) else out.logits
        loss = nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), batch(step)[:, 1:].flatten())
        loss.backward()
        optim.step()
        losses.append(float(loss.detach()))
    return losses


def test_a_model_that_no_family_knows_grows_twice_by_its_last_call():
    unbroken, optim = own()
    expected = train(unbroken, optim, range(6))
    model, optim = own()
    GrowthSchedule(
        [
            At(step=2, to="2x", width=width.HyperClone(), dynamics="exact"),
            At(step=4, to="2x", width=width.HyperClone(), dynamics="exact"),
        ]
    ).attach(model, optim)

    losses = train(model, optim, range(6))

    assert losses == pytest.approx(expected, rel=1e-12) and model.wte.embedding_dim == 96


class Called(Plain):
    """Takes a second argument by name, on which the last layer depends."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Linear(24, 24)

    def forward(self, ids: Tensor, *, shifts: Tensor | None = None) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln_f(x if shifts is None else x + shifts * self.shift(x)))


def test_named_arguments_of_the_last_call_are_inputs_too():
    model, optim = own(Called)
    GrowthSchedule([At(step=2, to="2x")]).attach(model, optim)

    train(model, optim, range(3), shifts=torch.ones(1).double())

    assert model.shift.weight.shape == (48, 48)


def test_a_parameter_that_the_last_call_did_not_reach_is_refused_by_name_at_the_first_step():
    model, optim = own(Called)
    GrowthSchedule([At(step=9, to="2x")]).attach(model, optim)

    with pytest.raises(UnsupportedModelError, match=r"shift\.weight: the forward does not use it"):
        train(model, optim, range(1))


def test_events_are_examined_at_the_first_step():
    model, optim = own()
    GrowthSchedule([At(step=9, to={"experts": 8})]).attach(model, optim)

    with pytest.raises(PlanError, match="experts"):
        train(model, optim, range(1))

    model, optim = own()
    GrowthSchedule([At(step=9, to={"hidden": 36}, width=width.HyperClone())]).attach(model, optim)

    with pytest.raises(PlanError, match="hidden.*36"):
        train(model, optim, range(1))


def test_calls_are_kept_until_the_first_step_and_of_unknown_models_only():
    model, optim = own()
    GrowthSchedule([At(step=9, to="2x")]).attach(model, optim)
    known = make("llama", tied=True)
    GrowthSchedule([At(step=9, to="2x")]).attach(known, torch.optim.AdamW(known.parameters()))
    assert len(model._forward_pre_hooks) == 1 and not known._forward_pre_hooks

    train(model, optim, range(1))

    assert not model._forward_pre_hooks


def test_a_removed_schedule_keeps_no_calls():
    model, optim = own()
    attachment = GrowthSchedule([At(step=9, to="2x")]).attach(model, optim)

    attachment.remove()

    assert not model._forward_pre_hooks


def test_model_that_was_not_called_is_refused_with_a_way_out():
    model, optim = own()
    GrowthSchedule([At(step=9, to="2x")]).attach(model, optim)

    with pytest.raises(UnsupportedModelError, match=r"spec=lambda model: growkern\.describe"):
        optim.step()


@pytest.mark.slow
def test_calls_of_a_compiled_model_are_seen():
    model, optim = own()
    compiled = torch.compile(model, backend="eager")
    schedule = GrowthSchedule([At(step=3, to="2x")])
    schedule.attach(model, optim)

    train(compiled, optim, range(4))

    assert schedule.fired == [3] and model.wte.embedding_dim == 48


def phi() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    config = transformers.PhiConfig(
        hidden_size=48, num_attention_heads=4, num_hidden_layers=2, vocab_size=VOCAB, intermediate_size=80, max_position_embeddings=64
    )  # fmt: skip
    model = transformers.PhiForCausalLM(config).double()
    return model, torch.optim.AdamW(model.parameters(), 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("build", [own, phi], ids=lambda build: build.__name__)
def test_several_growths_of_a_traced_model_are_resumed(build):
    """After the first replayed growth the weights are NaN, which no forward could compare."""
    events = [At(step=2, to="2x"), At(step=4, to={"layers": 3}), At(step=6, to={"ffn": "2x"})]
    model, optim = build()
    GrowthSchedule(events).attach(model, optim)
    train(model, optim, range(8))
    saved = deepcopy((model.state_dict(), optim.state_dict()))
    again, optim_again = build()

    def described(model: nn.Module) -> growkern.ModelSpec:
        return growkern.describe(model, inputs=batch())

    growkern.resume(again, optim_again, saved[1], spec=described if build is own else None)
    again.load_state_dict(saved[0])
    optim_again.load_state_dict(saved[1])

    assert train(again, optim_again, range(8, 11)) == train(model, optim, range(8, 11))
