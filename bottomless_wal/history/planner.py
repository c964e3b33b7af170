"""The cheapest chain of segments that leads to a state. No I/O.

One pass over a list in the order of keys is enough: a segment that leads to a state is listed before the segments that lead on from it.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from .segment_list import SegmentInfo

__all__ = ["ExcludedSegments", "maximal_segments", "newest", "plan", "reachable", "segments_reaching"]

_REQUEST_COST: Final = 64 << 10  # a request costs about as much as these bytes
_MOST_OPEN: Final = 16384  # states that are remembered though nothing may begin there any more


class _Way(NamedTuple):
    """The cheapest way to a state: its last step, and the way before it. What no better way needs is forgotten with it."""

    cost: int
    step: SegmentInfo
    before: _Way | None


def newest(edges: Iterable[SegmentInfo]) -> SegmentInfo:
    """Of the edges that end at the head, the shortest: as a rule the head's own commit, which knows its place in the WAL."""
    return max(edges, key=lambda edge: (edge.post, edge.pre))


def plan(
    edges: Iterable[SegmentInfo], target: int, *, start: int = 0, overlapping: bool = False, wholes: Collection[tuple[int, int]] = ()
) -> list[SegmentInfo] | None:
    """The cheapest chain of edges from txid `start` to `target`; None if there is none. `edges` are in the order of their keys.

    `wholes` are edges (pre, post) known to carry a whole database, so that the chain may begin with them. Cost is the number of
    requests and bytes. With `overlapping`, an edge may also begin before the state reached so far: its pages are those of its end,
    so it leads there from any state that it spans.
    """
    if target == start:
        return []
    usable = (edge for edge in edges if start < edge.post <= target)
    way = (_overlapping(usable, start, wholes) if overlapping else _exact(usable, start, wholes)).get(target)
    if way is None:
        return None
    chain: list[SegmentInfo] = []
    while way is not None:
        chain.append(way.step)
        way = way.before
    return chain[::-1]


def _exact(edges: Iterable[SegmentInfo], start: int, wholes: Collection[tuple[int, int]]) -> dict[int, _Way | None]:
    """The cheapest way to each state that is still of interest at the end of `edges`."""
    best: dict[int, _Way | None] = {start: None}
    most = _MOST_OPEN
    for edge in edges:
        if len(best) > most:
            best = {txid: way for txid, way in best.items() if txid >= edge.pre}  # nothing begins before any more
            most = max(_MOST_OPEN, 2 * len(best))
        if edge.pre in best:
            _improve(best, edge, best[edge.pre])
        if edge[:2] in wholes:
            _improve(best, edge, None)
    return best


def _overlapping(edges: Iterable[SegmentInfo], start: int, wholes: Collection[tuple[int, int]]) -> dict[int, _Way | None]:
    """As `_exact`; of all states that an edge spans, it begins at the one that is cheapest to reach."""
    best: dict[int, _Way | None] = {start: None}
    # The states from which no later one is as cheap, ascending: the first of them at or after a txid is the cheapest from there on.
    txids, costs = [start], [0]
    for post, group in itertools.groupby(sorted(edges, key=lambda edge: (edge.post, edge.pre)), lambda edge: edge.post):
        for edge in group:
            at = bisect.bisect_left(txids, edge.pre)
            if at < len(txids):
                _improve(best, edge, best[txids[at]])
            if edge[:2] in wholes:
                _improve(best, edge, None)
        way = best.get(post)
        if way is not None:
            while costs and costs[-1] >= way.cost:
                txids.pop()
                costs.pop()
            txids.append(post)
            costs.append(way.cost)
    return best


def _improve(best: dict[int, _Way | None], edge: SegmentInfo, way: _Way | None) -> None:
    known = best.get(edge.post)
    cost = (way.cost if way is not None else 0) + edge.size + edge.body + _REQUEST_COST
    if known is None or cost < known.cost:
        best[edge.post] = _Way(cost, edge, way)


def segments_reaching(edges: Sequence[SegmentInfo], head: int) -> Iterator[SegmentInfo]:
    """The edges from which exact chains lead on to `head`, and those from 0; the last in the order of their keys first.

    What is left over is no part of the history: such as the commit of a writer that was away, stored where all had been pruned.
    """
    states = {head}
    for at in range(len(edges) - 1, -1, -1):
        edge = edges[at]
        if edge.pre == 0:
            yield edge
        elif edge.post in states:
            states.add(edge.pre)
            yield edge


def maximal_segments(edges: Iterable[SegmentInfo]) -> list[SegmentInfo]:
    """Those of `edges` that lie within no other one, ascending."""
    found: list[SegmentInfo] = []
    for edge in sorted(edges, key=lambda edge: (edge.pre, -edge.post)):
        if not found or edge.post > found[-1].post:
            found.append(edge)
    return found


def reachable(edges: Iterable[SegmentInfo], start: int = 0) -> Iterator[int]:
    """The txids that exact chains from `start` lead to, each once, `start` first. `edges` are in the order of their keys."""
    states, most = {start}, _MOST_OPEN
    yield start
    for edge in edges:
        if edge.pre in states and edge.post not in states:
            if len(states) > most:
                states = {txid for txid in states if txid >= edge.pre}
                most = max(_MOST_OPEN, 2 * len(states))
            states.add(edge.post)
            yield edge.post


class ExcludedSegments:
    """Edges that the plans to come go round. Of two that do not fit together either may be wrong: the earlier one, such as a commit that
    was stored where the history had been pruned, is left out first; if the later one does not fit again, it was that one."""

    def __init__(self) -> None:
        self._out: set[tuple[int, int]] = set()
        self._instead: dict[tuple[int, int], tuple[int, int]] = {}  # later edge -> the earlier one that was left out because of it

    def without(self, edges: Iterable[SegmentInfo]) -> list[SegmentInfo]:
        """Those of `edges` that are not suspected."""
        return [edge for edge in edges if edge[:2] not in self._out]

    def blame(self, edge: SegmentInfo, before: SegmentInfo | None, edges: Sequence[SegmentInfo], target: int) -> None:
        """`edge` is damaged, is gone, or does not follow `before` (if that is given)."""
        if before is not None and edge[:2] not in self._instead:
            rest = [other for other in self.without(edges) if other[:2] != before[:2]]
            if plan(rest, target) is not None:
                self._instead[edge[:2]] = before[:2]
                self._out.add(before[:2])
                return
        if edge[:2] in self._instead:
            self._out.discard(self._instead[edge[:2]])
        self._out.add(edge[:2])
