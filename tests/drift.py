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
    depth.Fresh(),
]
STOCK = [f for f in FAMILIES if f != "plain"]


def target_of(model, method):
    """Return twice the width for a width method (AKIPro keeps the kv heads) and twice the depth for a depth method."""
    sizes = growkern.describe(model, spec_of(model)).sizes
    if hasattr(method, "deepen"):
        return {name: 2 * n for name, n in sizes.items() if name in ("layers", "decoder_layers")}
    if isinstance(method, width.AKIPro) and "kv_heads" in sizes:
        return {"hidden": "2x", "heads": "2x", "kv_heads": sizes["kv_heads"]}
    grows = growkern.describe(model, spec_of(model)).fixed
    return {"ffn": "2x"} if "hidden" in grows else "2x"


def drift(family, method):
    """Return the relative drift and ``report.preserves``; None where the method refuses."""
    model = make(family, tied=True, **({"num_hidden_layers": 4} if family == "modernbert" else {}))
    model = model.double().eval()
    own = {"width": method} if hasattr(method, "widen") else {"depth": method}
    before = logits(model, batch()).detach()
    try:
        report = grow(model, to=target_of(model, method), **own)
    except PlanError:
        return None
    change = logits(model, batch()).detach() - before
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
        cells = [drift(family, one) for one in methods]
        texts = ["-" if one is None else f"{one[0]:.2g}" for one in cells]
        print(f"| {family} | " + " | ".join(texts) + " |", flush=True)
    patch.undo()


if __name__ == "__main__":
    sys.exit(main())
