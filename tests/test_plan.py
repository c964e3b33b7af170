"""The way through a history: the cheapest chain of edges, exact at every link; overlapping and resets only when asked for."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from bottomless_wal.history import Edge, plan


def edge(pre: int, post: int, size: int = 100) -> Edge:
    return Edge(pre, post, size, 0.0)


edges = st.lists(
    st.tuples(st.integers(0, 7), st.integers(1, 8), st.integers(1, 1 << 20)).filter(lambda e: e[0] < e[1]).map(lambda e: edge(*e)),
    max_size=9,
    unique_by=lambda e: (e.pre, e.post),
)


def cost(chain: list[Edge]) -> int:
    return sum(step.size + (64 << 10) for step in chain)


def every_chain(usable: list[Edge], start: int, target: int) -> list[list[Edge]]:
    if start == target:
        return [[]]
    return [[e, *rest] for e in usable if e.pre == start and e.post <= target for rest in every_chain(usable, e.post, target)]


@given(edges, st.integers(0, 8), st.integers(0, 8))
def test_it_is_the_cheapest_of_all_chains_and_none_where_there_is_none(usable: list[Edge], start: int, target: int) -> None:
    chains = every_chain(usable, start, target) if start <= target else []
    chain = plan(usable, target, start=start)
    assert (chain is None) == (not chains)
    if chain is not None:
        assert [start, *(e.post for e in chain)] == [*(e.pre for e in chain), target]
        assert cost(chain) == min(map(cost, chains))


@given(edges, st.integers(1, 8))
def test_overlapping_edges_may_begin_before_the_state_reached(usable: list[Edge], target: int) -> None:
    chain = plan(usable, target, overlapping=True)
    if chain is None:
        assert plan(usable, target) is None
        return
    assert chain[0].pre == 0
    assert chain[-1].post == target
    for before, after in itertools.pairwise(chain):
        assert after.pre <= before.post < after.post


def test_a_snapshot_is_taken_rather_than_many_commits() -> None:
    commits = [edge(n, n + 1) for n in range(100)]
    assert plan([*commits, edge(0, 90, 5000)], 100) == [edge(0, 90, 5000), *commits[90:]]


def test_a_reset_needs_nothing_before_it() -> None:
    history = [edge(0, 1), edge(3, 4), edge(4, 5)]
    assert plan(history, 5) is None
    assert plan(history, 5, wholes={(3, 4)}) == [edge(3, 4), edge(4, 5)]


def test_what_lies_beyond_the_target_is_not_used() -> None:
    assert plan([edge(0, 3), edge(0, 1), edge(1, 2)], 2) == [edge(0, 1), edge(1, 2)]
    assert plan([edge(0, 3)], 2) is None
