"""A loss curve is what a plain loop over all losses of the run gives, also over a restart in the middle."""

import json
import random
from math import isfinite

import pytest
import torch

from growkern.training.loss_curve import GROWTH, LossCurve


def plain_curve(losses):
    """Means of the losses between points, each point 5 % beyond the one before; repeated or falling token counts are left out."""
    seen, groups = 0.0, [[]]
    for tokens, loss in losses:
        if tokens > seen:
            seen = tokens
            groups[-1].append((tokens, loss))
            if len(groups) == 1 or tokens >= GROWTH * groups[-2][-1][0]:
                groups.append([])
    points = [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups if group]
    return [(x, y) for x, y in points if isfinite(y)]


@pytest.mark.parametrize("seed", range(4))
def test_a_curve_holds_the_means_of_a_plain_loop(seed):
    rng, tokens, losses = random.Random(seed), 0.0, []
    for _ in range(400):
        tokens += rng.choice([-5.0, 0.0, 0.0, 1.0, 10.0, 30.0])
        losses.append((tokens, rng.choice([rng.uniform(1, 5)] * 30 + [float("nan"), float("inf")])))
    curve = LossCurve()

    for i, (x, y) in enumerate(losses):
        curve.add(x, torch.tensor(y) if i % 2 else y)
        if i == 200:
            curve = LossCurve.from_state(json.loads(json.dumps(curve.state())))

    read, expected = curve.read(), plain_curve(losses)
    assert len(expected) > 30 and [x for x, _ in read] == [x for x, _ in expected]
    assert [y for _, y in read] == pytest.approx([y for _, y in expected], rel=1e-6)
