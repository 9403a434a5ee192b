"""Models with traps: a growth by tracing is refused or exact, in both modes, on inputs that the trace has not seen.

The oracle is the model's own forward before the growth.
"""

import pytest
import torch
import traps
from torch import Tensor

import growkern
from growkern.errors import GrowthError, UnsupportedModelError
from growkern.model.tracing.modes import training

WIDE, NARROW = {"hidden", "ffn", "heads", "layers"}, {"ffn", "heads", "layers"}
# what grows: less than a decoder without a trap, or other sizes; everything else grows in all of WIDE
GROWS = {
    "Grouped": {"hidden", "ffn", "ffn2", "heads", "layers"},
    "Doubled": {"hidden", "ffn", "ffn2", "heads", "layers"},
    "Halves": {"hidden", "ffn", "ffn2", "heads", "layers"},
    "Shared": WIDE - {"layers"},
    "LowRank": {"ffn", "ffn2", "heads"},
    **dict.fromkeys(("Width", "TrainingOnly", "TrainingScale", "Random", "Rolled", "Sorted", "Accumulated", "Maximum", "Length"), NARROW),
}  # fmt: skip
REFUSED = {"Routed": "experts.1.weight", "ShapeOnly": "like", "Detached": "permuted"}
FAST = {"TrainingOnly", "TrainingScale", "TrainingHead", "CachedSplit"}


def outputs(model: torch.nn.Module) -> list[Tensor]:
    """Return the outputs in both modes, on inputs of two lengths that are not those of the trace."""
    found = list[Tensor]()
    with torch.no_grad():
        for given in (traps.ids(12, seed=7), traps.ids(9, seed=3)):
            torch.manual_seed(5)
            found.append(model.eval()(given))
            with training(model):
                found.append(model(given))
    model.train()
    return found


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=[] if k.__name__ in FAST else [pytest.mark.slow]) for k in traps.TRAPS if k.__name__ not in REFUSED],
    ids=lambda kind: kind.__name__,
)  # fmt: skip
def test_a_trap_is_refused_or_grows_exactly(kind):
    spec = growkern.describe(traps.make(kind), inputs=traps.ids())
    assert {*spec.sizes} - {*spec.fixed} == GROWS.get(kind.__name__, WIDE)
    n_grown = 0
    for size in sorted(spec.sizes.keys() - spec.fixed.keys()):
        for factor in (2, 1.5):
            model = traps.make(kind)
            before, weights = outputs(model), [p.detach().clone() for p in model.parameters()]
            own = growkern.describe(model, inputs=traps.ids())
            try:
                growkern.expand_inplace(model, to={size: int(spec.sizes[size] * factor)}, spec=own)
            except GrowthError:
                pairs = zip(model.parameters(), weights, strict=True)
                assert factor != 2 and all(torch.equal(p, old) for p, old in pairs), size
            else:
                n_grown += 1
                for old, new in zip(before, outputs(model), strict=True):
                    torch.testing.assert_close(new, old, rtol=0, atol=1e-9)
    assert n_grown >= len(GROWS.get(kind.__name__, WIDE))


@pytest.mark.parametrize("name", [*REFUSED])
def test_a_trap_that_no_description_can_hold_is_refused_by_name(name):
    with pytest.raises(UnsupportedModelError, match=REFUSED[name]):
        growkern.describe(traps.make(getattr(traps, name)), inputs=traps.ids())
