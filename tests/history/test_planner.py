"""The way through a history: the cheapest chain of edges, exact at every link; overlapping and resets only when asked for."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bottomless_wal.history.planner import maximal_segments, plan, reachable
from bottomless_wal.history.segment_list import SegmentInfo, SegmentList


def edge(pre: int, post: int, size: int = 100) -> SegmentInfo:
    return SegmentInfo(pre, post, size, 0.0)


edges = st.lists(
    st.tuples(st.integers(0, 7), st.integers(1, 8), st.integers(1, 1 << 20)).filter(lambda e: e[0] < e[1]).map(lambda e: edge(*e)),
    max_size=9,
    unique_by=lambda e: (e.pre, e.post),
).map(sorted)


def cost(chain: list[SegmentInfo]) -> int:
    return sum(step.size + (64 << 10) for step in chain)


def every_chain(usable: list[SegmentInfo], start: int, target: int) -> list[list[SegmentInfo]]:
    if start == target:
        return [[]]
    return [[e, *rest] for e in usable if e.pre == start and e.post <= target for rest in every_chain(usable, e.post, target)]


@given(edges, st.integers(0, 8), st.integers(0, 8))
def test_it_is_the_cheapest_of_all_chains_and_none_where_there_is_none(usable: list[SegmentInfo], start: int, target: int) -> None:
    chains = every_chain(usable, start, target) if start <= target else []
    chain = plan(usable, target, start=start)
    assert (chain is None) == (not chains)
    if chain is not None:
        assert [start, *(e.post for e in chain)] == [*(e.pre for e in chain), target]
        assert cost(chain) == min(map(cost, chains))


@given(edges, st.integers(1, 8))
def test_overlapping_edges_may_begin_before_the_state_reached(usable: list[SegmentInfo], target: int) -> None:
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
    assert plan(sorted([*commits, edge(0, 90, 5000)]), 100) == [edge(0, 90, 5000), *commits[90:]]


def test_a_reset_needs_nothing_before_it() -> None:
    history = [edge(0, 1), edge(3, 4), edge(4, 5)]
    assert plan(history, 5) is None
    assert plan(history, 5, wholes={(3, 4)}) == [edge(3, 4), edge(4, 5)]


def test_what_lies_beyond_the_target_is_not_used() -> None:
    assert plan([edge(0, 3), edge(0, 1), edge(1, 2)], 2) == [edge(0, 1), edge(1, 2)]
    assert plan([edge(0, 3)], 2) is None


@given(edges)
def test_what_can_be_reached_is_what_has_a_plan(usable: list[SegmentInfo]) -> None:
    found = list(reachable(usable))
    assert len(found) == len(set(found))
    assert set(found) == {txid for txid in range(9) if plan(usable, txid) is not None}


@given(edges, st.integers(0, 8))
def test_what_is_passed_is_forgotten_and_not_missed(usable: list[SegmentInfo], target: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        known = plan(usable, target), set(reachable(usable))
        patch.setattr("bottomless_wal.history.planner._MOST_OPEN", 1)
        assert (plan(usable, target), set(reachable(usable))) == known


@given(edges)
def test_edges_are_kept_in_few_bytes_and_come_back_as_they_were(usable: list[SegmentInfo]) -> None:
    kept = SegmentList(usable).with_bodies({(e.pre, e.post): e.size for e in usable[::2]})
    expected = [e._replace(body=e.size) if number % 2 == 0 else e for number, e in enumerate(usable)]
    assert list(kept) == expected
    assert [kept[number] for number in range(len(kept))] == kept[:] == expected
    if expected:
        assert kept[-1] == expected[-1]


@given(edges)
def test_the_outermost_edges_span_all_that_the_others_do_and_none_spans_another(usable: list[SegmentInfo]) -> None:
    found = maximal_segments(usable)
    assert found == sorted(found)
    for one in usable:
        assert any(outer.pre <= one.pre and one.post <= outer.post for outer in found)
    assert not any(one != other and one.pre <= other.pre and other.post <= one.post for one in found for other in found)


def test_edges_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="order"):
        SegmentList([edge(3, 4), edge(0, 1)])
