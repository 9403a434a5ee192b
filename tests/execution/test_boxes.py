"""A box of a target, written from narrowed pieces, is that part of the whole target bit for bit: weights with noise, moments, pads."""

from dataclasses import replace

import pytest
import torch
from models import make

from growkern import depth, plan, width
from growkern.distributed.shards import Box
from growkern.engine.sources import tensors_of
from growkern.errors import UnsupportedModelError
from growkern.execution import torch_backend
from growkern.execution.execute import Execution
from growkern.execution.grouping import grouped
from growkern.execution.perturb import perturb
from growkern.execution.tiles import Tiler
from growkern.model.describe import describe
from growkern.optimizer.state_rules import GRADIENT, SQUARE, VALUE
from growkern.support.named_tensors import Tensors

METHODS = {
    "default": dict(to={"hidden": 36, "ffn": "1.5x", "layers": 3}),
    "random maps": dict(to={"hidden": 36, "ffn": "1.5x"}, width=width.FPI()),
    "pads": dict(to={"hidden": 36, "ffn": "1.5x"}, width=width.CopyAndPad()),
    "next layer": dict(to={"hidden": 48, "ffn": "2x"}, width=width.AKI()),
    "interpolated": dict(to={"layers": 4}, depth=depth.Interpose()),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("n", [2, 3, 7])
def test_boxes_are_parts_of_the_whole_target(family, method, n):
    model = make(family, tied=True)
    made, spec = plan(model, seed=3, **METHODS[method]), describe(model)
    rules = {"exp_avg": GRADIENT, "exp_avg_sq": SQUARE}
    sources = tensors_of(model, (), spec)
    sources.states = {
        name: {key: torch.rand_like(t) for key in rules} for name, t in sources.values.items()
    }
    execution = Execution(made, sources, lambda _: rules)
    jobs = [job for one in execution.sets for job in execution.jobs(one, Tensors())]
    assert {job.rule for job in jobs} == {VALUE, GRADIENT, SQUARE}
    tiler = Tiler(made)
    tiler.measure(jobs, lambda device: None)
    torch_backend.expand(grouped(tiler, jobs).groups)

    for axis in range(2):
        parts, wholes = [], []
        for job in jobs:
            shape = tuple(job.target.shape)
            if axis < len(shape) and (axis == 0 or len(shape) == 2):
                step = -(-shape[axis] // n)
                for first in range(0, shape[axis], step):
                    size = min(step, shape[axis] - first)
                    ranges = [(0, m) for m in shape]
                    ranges[axis] = first, size
                    wholes.append(job.target.narrow(axis, first, size))
                    target = torch.full_like(wholes[-1].contiguous(), float("nan"))
                    parts.append(job._replace(target=target, box=Box(tuple(ranges), shape)))
        torch_backend.expand(grouped(tiler, parts).groups)
        assert all(torch.equal(part.target, t) for part, t in zip(parts, wholes, strict=True))
        assert len(parts) >= len(jobs) // 2


@pytest.mark.parametrize("noise_from", [0, 1, 3])
@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("n", [2, 3, 7])
def test_a_box_gets_its_part_of_the_noise_that_the_whole_weight_gets(n, axis, noise_from):
    row = next(row for row in plan(make("llama", tied=True), to="2x").tensors if not row.new)
    row = replace(row, shrink=0.5, noise_std=0.1, noise_from=noise_from)
    source = torch.randn(4, 6, 5)
    target = source.clone()
    perturb(row, 3, target)

    step = -(-source.shape[axis] // n)
    parts = [*source.clone().split(step, axis)]
    for i, part in enumerate(parts):
        ranges = [(0, m) for m in source.shape]
        ranges[axis] = i * step, part.shape[axis]
        perturb(row, 3, part := part.contiguous(), Box(tuple(ranges), tuple(source.shape)))
        parts[i] = part

    assert torch.equal(torch.cat(parts, axis), target)
    assert torch.equal(target[:noise_from], source[:noise_from])
    assert (target[noise_from:] != source[noise_from:]).all()


def test_a_box_that_is_no_rectangle_of_the_matrix_is_refused():
    box = Box(((0, 4), (1, 2), (0, 5)), (4, 6, 5))

    assert box.rectangle(1) == ((0, 4), (5, 10))
    with pytest.raises(
        UnsupportedModelError, match="sharded along axis 1, .* shard it along axis 0"
    ):
        box.rectangle(2)
