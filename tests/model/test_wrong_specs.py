"""No wrong description of an axis passes both the permutation test and the check of a growth, unless the output does not depend on it."""

import pytest
import wrong_specs
import zoo

from growkern.model.tracing.inputs import example_inputs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "n"), [("phi3", 30), ("gpt_bigcode", 40), ("bart", 150), ("falcon", 30)]
)
def test_no_wrong_description_passes(name, n):
    total, seen, rest = wrong_specs.survey(name)

    assert total.total() >= n and seen.total() > 0.9 * total.total()
    for outcome, wrong in rest:
        assert not outcome.startswith("WRONG"), wrong
        model = zoo.make(name)
        if outcome == "exact":
            assert not wrong_specs.matters(model, example_inputs(model), wrong.tensor), wrong


def test_autograd_tells_a_bias_of_keys_from_one_of_values():
    model = zoo.make("bart")
    at = "model.encoder.layers.0.self_attn"
    found = [wrong_specs.matters(model, example_inputs(model), f"{at}.{name}.bias") for name in ("k_proj", "v_proj")]  # fmt: skip
    assert found == [False, True]
