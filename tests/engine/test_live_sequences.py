"""Random lives of a model; ``python tests/live_sequences.py`` runs more of them."""

import live_sequences
import pytest


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:Detected call of `lr_scheduler.step", "ignore:The .grad attribute of a Tensor"
)
@pytest.mark.parametrize("seed", range(6))
def test_a_random_life_of_a_model_keeps_what_has_to_hold(seed):
    live_sequences.live(seed)
