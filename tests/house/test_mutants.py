"""The text that a mutant of ``tests/mutants.py`` replaces occurs once in the code; ``make mutants`` runs the tests against the mutants."""

from pathlib import Path

import pytest
from mutants import MUTANTS

import growkern


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_changes_one_place(name):
    mutant = MUTANTS[name]
    text = Path(growkern.__file__).parent.joinpath(mutant.path).read_text()
    assert text.count(mutant.old) == 1 and mutant.old != mutant.new
