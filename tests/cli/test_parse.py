"""The command line parses sizes and methods; any other text is refused and never evaluated."""

import pytest

from growkern import depth, width
from growkern.cli.parse import depth_of, methods_of, sizes_of, width_of
from growkern.errors import PlanError


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["2x"], "2x"),
        (["hidden=1024,layers=24"], {"hidden": 1024, "layers": 24}),
        (["hidden=1.5x", " ffn = 2x , layers=3"], {"hidden": "1.5x", "ffn": "2x", "layers": 3}),
    ],
    ids=str,
)
def test_sizes_are_read(texts, expected):
    assert sizes_of(texts) == expected


@pytest.mark.parametrize(
    ("texts", "match"),
    [
        (["2x", "layers=3"], "cannot read '2x'; write 2x, or hidden=1024,layers=24"),
        (["hidden="], "cannot read 'hidden='"),
        (["hidden=2x,"], "cannot read ''"),
        (["hidden=2x", "hidden=64"], "hidden is named twice"),
    ],
    ids=str,
)
def test_sizes_that_cannot_be_read_are_refused(texts, match):
    with pytest.raises(PlanError, match=match):
        sizes_of(texts)


def named(value):
    """Return the id of a value: a function's name, so that every xdist worker collects equal ids."""
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize(
    ("read", "text", "expected"),
    [
        (width_of, "Lossless", width.Lossless()),
        (width_of, "HyperClone(noise_db=10)", width.HyperClone(noise_db=10)),
        (width_of, "Lossless(0.5, 'zero_pad')", width.Lossless(0.5, "zero_pad")),
        (width_of, "Lemon(alpha=-0.5)", width.Lemon(alpha=-0.5)),
        (depth_of, " Stack() ", depth.Stack()),
        (depth_of, "Layers((0, 1, 1))", depth.Layers((0, 1, 1))),
        (methods_of, "AKI() + Stack", (width.AKI(), depth.Stack())),
        (methods_of, "Stack", depth.Stack()),
    ],
    ids=named,
)
def test_methods_are_read_as_one_writes_them(read, text, expected):
    assert read(text) == expected


@pytest.mark.parametrize(
    ("read", "text", "match"),
    [
        (width_of, "Stack", "there is no method 'Stack'; the methods are AKI, "),
        (depth_of, "Lossless", "there is no method 'Lossless'; the methods are DepthUpscale, "),
        (width_of, "__import__('os').abort()", "cannot read"),
        (width_of, "Lossless(noise=open('x'))", "cannot read"),
        (width_of, "Lossless(*[1])", "cannot read"),
        (width_of, "Lossless(", "cannot read"),
        (width_of, "", "cannot read"),
        (width_of, "Lossless(loud=1)", "unexpected keyword argument 'loud'"),
        (width_of, "Lossless(noise='x')", "noise='x' is not of type float"),
        (width_of, "Lossless(norms='zero')", "norms='zero' is not of type .*isometric"),
        (width_of, "HyperClone(general=1)", "general=1 is not of type bool"),
        (width_of, f"Lossless(noise={'9' * 400})", r"noise=9+\.\.\.: a number is out of range"),
        (depth_of, "Stack(ignore_first=0.5)", "ignore_first=0.5 is not of type int"),
        (depth_of, "Layers((0, 'a'))", "is not of type tuple\\[int, ...\\]"),
        (depth_of, "Layers", "missing 1 required positional argument"),
        (methods_of, "Stack + FPI", "there is no method 'Stack'"),
        (methods_of, "FPI - Stack", "cannot read"),
    ],
    ids=named,
)
def test_anything_else_is_refused_and_never_evaluated(read, text, match):
    with pytest.raises(PlanError, match=match):
        read(text)


@pytest.mark.parametrize("name", [*width.__all__, *depth.__all__])
def test_every_method_can_be_named(name):
    text = f"{name}((0, 1))" if name == "Layers" else name

    assert type(methods_of(text)).__name__ == name
