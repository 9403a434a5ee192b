"""The operations of two models without values: equal for equal functions, and the first that differs has a name."""

import pytest
import torch
from torch import Tensor, nn

from growkern.model.tracing.forward import call_model, distance
from growkern.model.tracing.hollow import Hollow, hollow_copy
from growkern.model.tracing.program import Unfilled, first_difference, program_of


class Block(nn.Module):
    """A block that scales, adds waves and masks."""

    def __init__(
        self, scale: float = 0.5, wave: float = 1.0, turned: bool = False, last: int = 0
    ) -> None:
        super().__init__()
        self.up, self.down, self.scale, self.turned, self.last = nn.Linear(6, 6), nn.Linear(6, 6), scale, turned, last  # fmt: skip
        self.register_buffer("waves", wave * torch.arange(6.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        first, second = (self.down, self.up) if self.turned else (self.up, self.down)
        x = first(x) * self.scale + self.waves
        room = torch.empty_like(self.waves).expand(x.shape).clone()
        room[:] = x.masked_fill(torch.arange(6) < 3, 0.0)
        x = second(room)
        return x[:, self.last :].relu()


def difference(**own: object) -> str | None:
    x = torch.ones(2, 6)
    programs = [program_of(hollow_copy(model), lambda m: call_model(m, x)) for model in (Block(), Block(**own))]  # pyright: ignore  # fmt: skip
    assert len(programs[0]) > 5
    return first_difference(*programs)


def test_equal_models_run_equal_operations():
    assert difference() is None
    assert difference(wave=1 + 1e-7) is None  # constants round


@pytest.mark.parametrize(
    ("own", "where"),
    [
        (dict(scale=0.25), "mul in the model"),
        (dict(wave=2.0), "add in the model"),
        (dict(turned=True), "t in down"),
        (dict(last=1), "slice in the model"),
    ],
)
def test_first_difference_has_a_name(own, where):
    assert difference(**own) == where


def test_operations_that_are_missing_differ():
    operations = program_of(hollow_copy(Block()), lambda m: call_model(m, torch.ones(2, 6)))

    assert first_difference(operations, operations[:-1]) == "its last operation"


def test_models_are_built_without_memory_for_their_weights():
    with Unfilled():
        layer = nn.Linear(1 << 20, 1 << 20)  # 4 TB
        nn.init.trunc_normal_(layer.weight)  # asks whether numbers are outside

    assert isinstance(layer.weight, nn.Parameter) and isinstance(layer.weight, Hollow)


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ([1.0, 2.0, 4.0], 0.0),
        ([1.0, 2.0, 3.0], 0.25),
        ([1.0, float("nan"), 4.0], float("inf")),
        ([1.0, float("inf"), 4.0], float("inf")),
    ],
)
def test_distance(after, expected):
    assert distance(torch.tensor(after), torch.tensor([1.0, 2.0, 4.0])) == expected
    with_infinity = torch.tensor([*after, -float("inf")]), torch.tensor([1.0, 2.0, 4.0, -float("inf")])  # fmt: skip
    assert distance(*with_infinity) == expected
