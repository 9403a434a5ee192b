"""Rows that processes read of a sharded source, against index maps read coordinate by coordinate."""

import random
from dataclasses import replace

import pytest
import torch
from models import make

from growkern import plan, width
from growkern.execution.rows import SourceReader, rows_read
from growkern.execution.tiles import Tiler
from growkern.optimizer.state_rules import SQUARE, VALUE
from growkern.planning.index_map import PAD, IndexMap

EMPTY = torch.empty(0)


def maps_of(seed: int) -> list[IndexMap]:
    """Return two maps from one source: copies in any order and pads."""
    draw = random.Random(seed)
    n = draw.randint(1, 12)
    return [
        IndexMap.of([draw.randrange(-1, n) for _ in range(draw.randint(1, 30))], n)
        for _ in range(2)
    ]


def parts(n: int, n_parts: int) -> list[set[int]]:
    """Return the rows of each process, as torch cuts them."""
    chunks = [{*chunk.tolist()} for chunk in torch.arange(n).chunk(n_parts)]
    return chunks + [set()] * (n_parts - len(chunks))


def expanded(ranges) -> list[int]:
    return [i for first, n in ranges for i in range(first, first + n)]


@pytest.mark.parametrize("n_parts", [1, 2, 3, 8])
@pytest.mark.parametrize("seed", range(20))
def test_processes_read_the_rows_that_their_targets_copy(seed, n_parts):
    maps = maps_of(seed)

    rows = rows_read(maps, n_parts)

    held = parts(maps[0].n_source, n_parts)
    assert [{*expanded([one])} for one in rows.held] == held
    for process in range(n_parts):
        own = [(one, parts(one.n_target, n_parts)[process]) for one in maps]
        needed = {one.indices[i] for one, targets in own for i in targets} - {PAD}
        assert expanded(rows.read[process]) == sorted(needed)
        assert rows.n_received[process] == len(needed - held[process])


@pytest.mark.parametrize("n_parts", [2, 3, 8])
@pytest.mark.parametrize("seed", range(20))
def test_what_is_sent_is_what_is_taken(seed, n_parts):
    rows = rows_read(maps_of(seed), n_parts)

    transfers = [rows.transfer(process) for process in range(n_parts)]
    for process, own in enumerate(transfers):
        assert own.n_sent == [other.n_taken[process] for other in transfers]
        assert own.n_sent[process] == 0 and own.moves == any(rows.n_received)
        at = iter((own.sent + own.first).tolist())
        for other, n in zip(transfers, own.n_sent, strict=True):
            skipped = sum(other.n_taken[:process])
            assert other.taken[skipped : skipped + n].tolist() == [next(at) for _ in range(n)]


def chosen(made, name: str, rule=VALUE, n_parts=4):
    row = next(row for row in made.tensors if row.name == name)
    return SourceReader(made, Tiler(made)).among([(row, rule)], EMPTY, n_parts)


UP, GAIN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"
CHOICES = {  # growth, target, rule, by rows
    "pads": (dict(to={"ffn": 80}), UP, VALUE, True),
    "mean of a moment": (dict(to={"ffn": 80}), UP, SQUARE, True),
    "copies": (dict(to={"ffn": 80}, width=width.HyperClone()), UP, VALUE, True),
    "new block": (dict(to={"layers": 4}), "model.layers.3.mlp.up_proj.weight", VALUE, True),
    "mean of gains": (dict(to={"hidden": 48}), GAIN, VALUE, False),
    "next layer": (dict(to={"ffn": 80}, width=width.AKI()), UP, VALUE, False),
    "reduced state": (dict(to={"ffn": 80}), UP, replace(SQUARE, reduced=-1, keepdim=False), False),
}


@pytest.mark.parametrize("case", CHOICES)
def test_a_source_is_gathered_whole_where_all_of_it_is_needed(case):
    growth, name, rule, by_rows = CHOICES[case]

    assert (chosen(plan(make("llama", tied=False), **growth), name, rule) is not None) == by_rows


def test_a_source_is_gathered_whole_where_a_process_reads_as_many_rows():
    made = plan(make("llama", tied=False), to={"ffn": 80}, width=width.HyperClone())

    assert chosen(made, UP, n_parts=2) is None  # each of 2 reads all rows
    assert max(chosen(made, UP, n_parts=4).n_received) == 20  # 20 of 40, of which none is its own
