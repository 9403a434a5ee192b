"""The docstring of every method has the sections Preserves, Reference and Example, an entry per argument, and an example that runs."""

import doctest
import re

import pytest
import torch
from models import make

import growkern
from growkern import depth, shrink, vocab, width

METHODS = [getattr(room, name) for room in (width, depth, shrink) for name in room.__all__]
METHODS += [vocab.Zero, vocab.MeanCov, vocab.CLPTransfer]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_a_method_says_what_it_does_and_its_example_runs(method):
    said = method.__doc__
    names = dict(growkern=growkern, width=width, depth=depth, shrink=shrink, vocab=vocab)
    names |= dict(torch=torch, model=make("llama", tied=True), mixture=make("mixtral", tied=True))
    (test,) = doctest.DocTestFinder(recurse=False).find(method, method.__name__, globs=names)
    runner = doctest.DocTestRunner(verbose=False)
    ran = runner.run(test)

    assert ran.attempted >= 1 and ran.failed == 0
    missing = [part for part in ("Preserves:", "Example:", "Reference:") if part not in said]
    arguments = set(getattr(method, "__dataclass_fields__", ()))
    missing += [name for name in arguments if not re.search(rf"^ +{name}: ", said, re.MULTILINE)]
    assert not missing, missing
