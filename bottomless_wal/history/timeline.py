"""When the states of a history were made, read from few headers: an edge lists every commit that it passes, with the server's time.

    states that can be restored  ·  ·  · ··········│··········│·········      each with the time that some edge tells
    headers that are read        ├───────┼─────────┼──────────┼┼┼┼┼┼┼┼┼       the fewest that list them all

Only states that can be restored are told: those that exact chains of edges lead to, or chains that a reset begins. Times are the server's,
in whole seconds where it tells no more (S3 does not), and may jump back with its clock. So a moment is looked up in their running maximum,
which never does.
"""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Final, NamedTuple

from ..core import pool
from ..core.errors import ConfigError, CorruptionError, RestoreError
from ..core.logs import get_logger
from ..formats.segment import LISTED_ROWS, CommitRecord, SegmentHeader
from .compaction import Vanished
from .log import RemoteLog
from .planner import reachable
from .segment_list import SegmentInfo

__all__ = ["moment_of", "ranges", "relisted", "restorable", "timeline", "txid_at"]

logger = get_logger(__name__)

_MOST_LIES: Final = 8  # edges that do not list what they should, before a state's time counts as unknown
_LISTINGS: Final = 5


def relisted(history: RemoteLog) -> Iterator[Sequence[SegmentInfo]]:
    """Listings of the edges, for as long as they are asked for: for what has to begin anew when edges vanish.

    Raises:
        RestoreError: nothing is stored, or edges have vanished again and again.
    """
    for _ in range(_LISTINGS):
        edges = history.edges()
        if not edges:
            raise RestoreError(
                f"nothing is stored as {history.name!r} in {history.store.describe()}",
                hint="`bottomless-wal ls` shows what is. Is it the right bucket, and the right database_id?",
            )
        yield edges
    raise RestoreError(
        f"segments of {history.name!r} vanished while they were read, again and again",
        hint="Another program deletes objects of this history. Try again when it is done.",
    )


def restorable(history: RemoteLog, edges: Sequence[SegmentInfo]) -> array[int]:
    """The txids that can be restored, ascending. Where the head is behind a gap, resets are looked for: they need nothing before."""
    found = set(reachable(edges))
    if edges and max(edge.post for edge in edges) not in found:
        begins = [edge._replace(pre=0) for edge in history.resets(edges, width=8)]
        found = set(reachable(sorted([*edges, *begins])))
    return array("Q", sorted(found - {0}))


def ranges(txids: Iterable[int]) -> list[tuple[int, int]]:
    """Runs of consecutive numbers: (first, last) of each. `txids` are ascending."""
    found: list[tuple[int, int]] = []
    for txid in txids:
        if found and found[-1][1] == txid - 1:
            found[-1] = (found[-1][0], txid)
        else:
            found.append((txid, txid))
    return found


def timeline(
    history: RemoteLog, edges: Sequence[SegmentInfo], *, wanted: Sequence[int] | None = None, width: int = 8
) -> Iterator[CommitRecord]:
    """Txid, state hash and the server's time of every state that can be restored, ascending; of the `wanted` ones, if those are given.

    What no sound header lists is left out.

    Raises:
        Vanished: list the edges anew. StoreError.
    """
    return _told(history, edges, restorable(history, edges) if wanted is None else wanted, width, frozenset())


def txid_at(history: RemoteLog, edges: Sequence[SegmentInfo], moment: datetime, *, width: int = 8) -> CommitRecord:
    """The last state that can be restored and was made not later than `moment` (naive: UTC).

    Raises:
        ConfigError: it is no datetime. RestoreError: the first one is later, or none has a time. Vanished: list the edges anew. StoreError.
    """
    if not isinstance(moment, datetime):
        raise ConfigError(
            f"{moment!r} is no datetime",
            hint="Such as datetime(2026, 11, 22, 10, 0, tzinfo=UTC); without a tzinfo it is in UTC.",
            option="timestamp",
            actual=repr(moment),
        )
    moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
    limit = moment.timestamp() * 1000
    best: CommitRecord | None = None
    first: CommitRecord | None = None
    for commit in timeline(history, edges, width=width):
        first = first or commit
        if commit.time_ms > limit:
            break  # whatever follows counts as no earlier
        best = commit
    if best is not None:
        return best
    if first is None:
        raise RestoreError(f"no state of {history.name!r} can be restored", hint="`bottomless-wal verify DB` shows what is wrong.")
    raise RestoreError(
        f"{history.name!r} has no state of {_text(moment)}: the earliest that can be restored is txid {first.txid}, "
        f"of {_text(moment_of(first))}",
        hint="Ask for a later moment. `bottomless-wal ls DB` shows what there is.",
        expected=_text(moment),
        actual=_text(moment_of(first)),
    )


class _Cover(NamedTuple):
    """An edge whose header is to be read, and the wanted txids that it should list."""

    edge: SegmentInfo
    txids: Sequence[int]


def _told(
    history: RemoteLog, edges: Sequence[SegmentInfo], wanted: Sequence[int], width: int, tried: frozenset[tuple[int, int]]
) -> Iterator[CommitRecord]:
    def load(cover: _Cover) -> SegmentHeader | None:
        try:
            header = history.header(cover.edge.pre, cover.edge.post)
        except CorruptionError as error:
            logger.warning("%s", error.message)
            return None
        if header is None:
            raise Vanished(f"the edge {cover.edge.pre} -> {cover.edge.post} of {history.name!r} is gone")
        return header

    covers = list(_cover(edges, wanted, tried))
    for cover, header in zip(covers, pool.ordered(load, covers, width), strict=True):
        listed = {commit.txid: commit for commit in header.commits} if header is not None else {}
        rest = [txid for txid in cover.txids if txid not in listed]
        if rest and len(tried) < _MOST_LIES:
            listed |= {commit.txid: commit for commit in _told(history, edges, rest, width, tried | {cover.edge[:2]})}
        for txid in cover.txids:
            if txid in listed:
                yield listed[txid]


def _cover(edges: Sequence[SegmentInfo], wanted: Sequence[int], tried: Collection[tuple[int, int]]) -> Iterator[_Cover]:
    """The fewest edges that list all of the `wanted` txids; what none lists is passed over. Those in `tried` are not asked again."""
    spans = sorted((_listed_from(edge), edge) for edge in edges if edge[:2] not in tried)
    at, next_span, far = 0, 0, None
    while at < len(wanted):
        while next_span < len(spans) and spans[next_span][0] < wanted[at]:
            edge = spans[next_span][1]
            far = edge if far is None or edge.post > far.post else far
            next_span += 1
        if far is None or far.post < wanted[at]:
            at += 1
            continue
        end = bisect.bisect_right(wanted, far.post, lo=at)
        yield _Cover(far, wanted[at:end])
        at = end


def _listed_from(edge: SegmentInfo) -> int:
    """After which txid the list of an edge begins."""
    return max(0, edge.post - LISTED_ROWS) if edge.pre == 0 else edge.pre


def _text(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def moment_of(commit: CommitRecord) -> datetime:
    return datetime.fromtimestamp(commit.time_ms / 1000, UTC)
