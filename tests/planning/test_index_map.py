"""Index maps and vectors equal computations on plain lists."""

from math import isclose

import hypothesis.strategies as st
from hypothesis import given

from growkern.planning.index_map import PAD, IndexMap, concat_maps, pair_copies
from growkern.planning.vector import Vector, concat_vectors

sizes = st.integers(1, 12)


@st.composite
def maps(draw):
    n = draw(sizes)
    return IndexMap.of(draw(st.lists(st.integers(-1, n - 1), max_size=20)), n)


@st.composite
def vectors(draw):
    return Vector.of(draw(st.lists(st.sampled_from([0.5, 1.0, 2.0]), max_size=12)))


@given(maps())
def test_runs_tile_the_target_and_give_back_the_indices(m):
    assert [run.target for run in m.runs] == [
        sum(r.length for r in m.runs[:i]) for i in range(len(m.runs))
    ]
    assert len(m.indices) == m.n_target == sum(run.length for run in m.runs)
    assert IndexMap.of(m.indices, m.n_source) == m
    assert tuple(m.counts.expanded()) == tuple(m.indices.count(j) for j in range(m.n_source))
    assert m.has_pads == (PAD in m.indices)


@given(sizes, st.integers(0, 40))
def test_cyclic_and_padded_maps_are_what_they_say(n, more):
    assert IndexMap.cyclic(n, n + more).indices == tuple(i % n for i in range(n + more))
    whole = (n + more) // n * n
    assert IndexMap.padded(n, n + more).indices == tuple(
        i % n if i < whole else PAD for i in range(n + more)
    )
    assert IndexMap.identity(n).is_identity and IndexMap.cyclic(n, n).is_identity


@given(maps(), maps())
def test_products_and_concatenations_are_row_major(a, b):
    product = a.product(b)
    assert product.indices == tuple(
        PAD if PAD in (i, j) else i * b.n_source + j for i in a.indices for j in b.indices
    )
    assert (product.n_source, product.n_target) == (
        a.n_source * b.n_source,
        a.n_target * b.n_target,
    )
    joined = concat_maps([a, b])
    assert joined.indices == a.indices + tuple(
        PAD if j == PAD else j + a.n_source for j in b.indices
    )


@given(vectors(), vectors())
def test_vectors_are_lists_of_numbers(v, w):
    assert v.outer(w).expanded() == [x * y for x in v.expanded() for y in w.expanded()]
    assert concat_vectors([v, w]).expanded() == v.expanded() + w.expanded()
    assert v.map(lambda x: x + 1).expanded() == [x + 1 for x in v.expanded()]
    assert v.zip(v, lambda x, y: x - y).expanded() == [0.0] * len(v)
    assert v.uniform == (v.expanded()[0] if len(set(v.expanded())) == 1 else None)
    assert Vector.of(v.expanded()) == v


@given(maps())
def test_an_even_split_sums_to_one_over_the_copies(m):
    u = m.per_copy(lambda c: 1 / c, pad=0.0).expanded()
    for j, count in enumerate(m.counts.expanded()):
        assert count == 0 or isclose(sum(x for x, i in zip(u, m.indices, strict=True) if i == j), 1)


@given(maps())
def test_twins_cancel_over_the_copies_of_every_coordinate(m):
    signs, partners = (
        found.expanded() if isinstance(found, Vector) else found.indices for found in pair_copies(m)
    )

    for j, count in enumerate(m.counts.expanded()):
        mine = [i for i, source in enumerate(m.indices) if source == j]
        drawn = {partners[i] for i in mine}
        assert all(sum(signs[i] for i in mine if partners[i] == p) == 0 for p in drawn)
        assert sum(signs[i] != 0 for i in mine) == count // 2 * 2
    assert all(signs[i] == 0 for i, source in enumerate(m.indices) if source == PAD)
