"""Measure how far every method moves the logits of every family at twice the size: ``python tests/drift.py`` prints the README's table.

The models are tiny stock transformers with random weights, in float64. A drift is 0 where no logit moves by 1e-10; otherwise it is the
root mean square of the change divided by the root mean square of the logits. Because the weights are random, a drift shows how far from
exact a method is, and not what the method costs in training.
"""

import sys

import pytest
import torch
from models import FAMILIES, batch, exact_norms, grow, logits, make, spec_of

import growkern
from growkern import depth, width
from growkern.errors import PlanError

EXACT = 1e-10
WIDTHS = [
    width.Lossless(),
    width.Lossless(noise=1),
    width.FPI(),
    width.FPI(maps="cyclic"),
    width.Net2Wider(noise=0.1),
    width.AKI(),
    width.AKIPro(),
    width.HyperClone(),
    width.HyperClone(noise_db=10),
    width.Lemon(),
    width.FreshFeatures(),
    width.CopyAndPad(),
    width.CopyAndPad(norm="corrected"),
    width.Sparkling(),
    width.Sparkling("random", "copy"),
    width.Sparkling("copy", "zero"),
]
DEPTHS = [
    depth.IdentityBlocks(),
    depth.Stack(),
    depth.TopCopies(),
    depth.Interpose(),
    depth.Interpose(halve_branches=True),
    depth.DepthUpscale(),
    depth.Middle(),
    depth.Fresh(),
]
STOCK = [f for f in FAMILIES if f != "plain"]


def target_of(model, method):
    """Return twice the width for a width method (AKIPro keeps the kv heads) and twice the depth for a depth method."""
    spec = growkern.describe(model, spec_of(model))
    if hasattr(method, "deepen"):
        return {k: 2 * n for k, n in spec.sizes.items() if k in ("layers", "decoder_layers")}
    if isinstance(method, width.AKIPro) and "kv_heads" in spec.sizes:
        return {"hidden": "2x", "heads": "2x", "kv_heads": spec.sizes["kv_heads"]}
    return {"ffn": "2x"} if "hidden" in spec.fixed else "2x"


def source_of(family):
    """Return a new model of the family, always with the same weights."""
    model = make(family, tied=True, **({"num_hidden_layers": 4} if family == "modernbert" else {}))
    return model.double().eval()


@torch.no_grad()
def drifts(family, methods):
    """Return, per method, the relative drift and ``report.preserves``; None where the method refuses."""
    before = logits(source_of(family), batch())
    return [drift(source_of(family), method, before) for method in methods]


def drift(model, method, before):
    """Grow a model by a method and return its relative drift from the logits before, and ``report.preserves``; None if refused."""
    own = {"width": method} if hasattr(method, "widen") else {"depth": method}
    try:
        report = grow(model, to=target_of(model, method), **own)
    except PlanError:
        return None
    change = logits(model, batch()) - before
    if change.abs().max() < EXACT:
        return 0.0, report.preserves
    return float(change.square().mean().sqrt() / before.square().mean().sqrt()), report.preserves


def main() -> None:
    """Print the table, in markdown."""
    patch = pytest.MonkeyPatch()
    exact_norms(patch)
    torch.manual_seed(0)
    methods = [*WIDTHS, *DEPTHS]
    print("| family | " + " | ".join(f"`{one}`" for one in methods) + " |")
    print("|---|" + "---|" * len(methods))
    for family in STOCK:
        texts = ["-" if one is None else f"{one[0]:.2g}" for one in drifts(family, methods)]
        print(f"| {family} | " + " | ".join(texts) + " |", flush=True)
    patch.undo()


if __name__ == "__main__":
    sys.exit(main())
