"""What ``to=`` takes."""

import pytest
from models import make

import growkern
from growkern.errors import PlanError


@pytest.mark.parametrize(
    ("family", "by_field", "by_size"),
    [
        ("llama", {"hidden_size": 48, "num_hidden_layers": 3}, {"hidden": 48, "layers": 3}),
        ("llama", {"num_attention_heads": 8, "num_key_value_heads": 4}, {"heads": 8, "kv_heads": 4}),
        ("mistral", {"intermediate_size": "2x"}, {"ffn": "2x"}),
        ("gpt2", {"n_embd": "2x", "n_layer": 3, "n_positions": 64}, {"hidden": "2x", "layers": 3, "positions": 64}),
        ("bert", {"vocab_size": 128}, {"vocab": 128}),
        ("t5", {"d_model": "2x", "num_decoder_layers": 3}, {"hidden": "2x", "decoder_layers": 3}),
    ],
)  # fmt: skip
def test_a_field_of_the_config_names_the_size_that_it_holds(family, by_field, by_size):
    model = make(family, tied=True)
    width = growkern.vocab.MeanCov() if "vocab" in by_size else None

    plans = [growkern.plan(model, to=to, width=width) for to in (by_field, by_size)]

    assert plans[0].to_json() == plans[1].to_json()
    assert plans[0].target_sizes != plans[0].source_sizes


def test_a_size_that_is_named_twice_is_refused():
    with pytest.raises(
        PlanError, match=r"'hidden_size' is the size 'hidden', which is named too; leave one out"
    ):
        growkern.plan(make("llama", tied=True), to={"hidden": 48, "hidden_size": 48})
