"""A state dict that does not fit the sizes of a model that grows: torch's error says what growkern needs first."""

import copy

import pytest
import torch
from models import Plain, make, train

import growkern
from growkern import At, GrowthSchedule


def attached(family):
    model = Plain(tied=True) if family == "plain" else make(family, tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = GrowthSchedule([At(step=1, to={"hidden": 48, "layers": 3})])
    spec = {"spec": Plain.spec} if family == "plain" else {}
    schedule.attach(model, optim, **spec)
    return model, optim, schedule


@pytest.mark.parametrize("family", ["llama", "plain"])
@pytest.mark.parametrize("to", [{"hidden": 48}, {"hidden": 48, "layers": 3}])
def test_a_checkpoint_from_after_a_growth_is_named_before_the_growth(family, to):
    model, _, _ = attached(family)
    grown = copy.deepcopy(model)
    growkern.expand_inplace(grown, to=to, spec=grown.spec() if family == "plain" else None)

    with pytest.raises(RuntimeError, match=r"growkern grows this model.*call growkern\.resume"):
        model.load_state_dict(grown.state_dict())


def test_names_that_no_growth_adds_get_torchs_error_alone():
    model, _, _ = attached("llama")

    with pytest.raises(RuntimeError, match="Unexpected") as raised:
        model.load_state_dict(model.state_dict() | {"adapter.weight": torch.ones(2)})

    assert "growkern" not in str(raised.value)


def test_more_blocks_load_where_the_user_asks_for_no_strictness():
    model, _, _ = attached("llama")
    deeper = copy.deepcopy(model)
    growkern.expand_inplace(deeper, to={"layers": 4})

    found = model.load_state_dict(deeper.state_dict(), strict=False)

    assert found.unexpected_keys and not found.missing_keys


def test_a_checkpoint_of_the_models_own_sizes_loads_before_and_after_a_growth():
    model, optim, schedule = attached("llama")
    for n_fired in (0, 1):
        assert len(schedule.fired) == n_fired
        saved = copy.deepcopy(model.state_dict())
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        model.load_state_dict(saved)
        assert all(torch.equal(t, saved[name]) for name, t in model.state_dict().items())
        train(model, optim, 1)
