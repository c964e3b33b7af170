"""Classify a local state against the history of its database.

The evidence is the content: the state hash, the position in the WAL, and the records of the local
index.

    AT_HEAD   the state hash is that of the head
    BEHIND    a segment lists the state hash, or the position in the WAL: after a power loss, or in an
              old disk image
    AHEAD     the local state came from the head by local commits. Either the local index was at the head:
              the inode is the same, and the change counter of page 1 has not gone back. In addition the
              WAL continues at the index's position, or there was no WAL and the recorded identity still
              matches the file. Or the WAL begins with the same frames with which the commit of the head
              ended. Or it is the next WAL after that one, and the main file below it is the head
    DIVERGED  anything else

AHEAD is checked before BEHIND: local commits may have led back to bytes of an earlier state. An old
disk image or an old backup does not have the evidence for AHEAD: a WAL, a recorded identity or a
recorded state.

An old backup beside a newer WAL can pass for AHEAD. The scan that follows detects it: a page has
changed that has no frame in the WAL. The state is then looked up as BEHIND after all.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final, NamedTuple

from ..core import pool
from ..core.errors import CorruptionError
from ..core.logs import get_logger
from ..formats.page import page_hash
from ..formats.segment import LISTED_ROWS, SegmentHeader
from ..formats.wal import WalPosition
from ..history.log import Head, RemoteLog
from ..history.planner import maximal_segments, newest, segments_reaching
from ..history.segment_list import SegmentInfo
from ..sqlite.database_reader import LocalDatabase
from ..sqlite.snapshot_reader import DatabaseShape
from .index import Identity, IndexHeader, IndexState, LocalIndex
from .wal_position import position_of

__all__ = ["Lineage", "LocalState", "Place", "classify", "earlier_txid", "local_state"]

logger = get_logger(__name__)

# Restarts of the WAL by programs that leave no WAL reset record. Salt 1 is random in a new WAL;
# it passes this check once in 65,536 times.
_MOST_RESTARTS: Final = 1 << 16


class Lineage(Enum):
    """Relation of a local state, which is not empty, to a history."""

    AT_HEAD = auto()
    BEHIND = auto()
    AHEAD = auto()
    DIVERGED = auto()


class Place(NamedTuple):
    """The relation of a local state to a history.

    `txid`: the txid of a state that is BEHIND, if the log lists it.
    """

    relation: Lineage
    txid: int | None = None


@dataclass(frozen=True, slots=True)
class LocalState:
    """The local state: state hash, position in the WAL, sizes and change counter.

    `page_size` is in bytes, `db_size` in pages. `change_counter` is that of page 1.
    """

    state: int
    position: WalPosition | None
    page_size: int
    db_size: int
    change_counter: int


def local_state(local: LocalDatabase, known: IndexHeader | None) -> LocalState:
    """Return the local state, found by a scan.

    Args:
        local: the local database.
        known: an index header that is proved. It makes the scan unnecessary when nothing is
            pending.

    Raises:
        SnapshotInvalidated, CorruptionError: as `LocalDatabase.pages`.
    """
    with local.snapshot() as tip:
        shape = local.shape(tip)
        position = position_of(local, tip)
        if known is not None and known.position == position:
            return LocalState(known.state, position, known.page_size, known.db_size, shape.change_counter)
        state = 0
        for pgno, page in local.pages(tip, shape):
            state ^= page_hash(pgno, page)
        return LocalState(state, position, shape.page_size, shape.db_size, shape.change_counter)


def classify(
    found: LocalState,
    head: Head,
    edges: Sequence[SegmentInfo],
    local: LocalDatabase,
    index: LocalIndex,
    history: RemoteLog,
    *,
    remote_id: bytes,
    width: int,
) -> Place:
    """Return the place of `found` in the history.

    Segments that are damaged are skipped with a warning.

    Args:
        found: the local state.
        head: the head of the history.
        edges: all segments of the history.
        local: the local database.
        index: the local index, which is locked.
        history: the log.
        remote_id: an index with another remote id is not used.
        width: how many requests are made at once.

    Raises:
        StoreError: the history could not be read.
    """
    if (found.state, found.page_size, found.db_size) == (head.state, head.page_size, head.db_size):
        return Place(Lineage.AT_HEAD)
    ended = _end_of(head, edges, history)
    if _outruns(found, ended, local):
        return Place(Lineage.AHEAD)
    header = _header_of(index, remote_id)
    if header is not None and _was_left_so(found, head, header, local):
        return Place(Lineage.AHEAD)
    if header is not None and (_is_known_pending(found, head, header) or _descends(found, head, header, local)):
        return Place(Lineage.AHEAD)
    txid = earlier_txid(found, segments_reaching(edges, head.txid), history, width)
    if txid is not None:
        return Place(Lineage.BEHIND, txid)
    # Load it again: the search took time, and a WAL restart writes its WAL reset record without the
    # index's lock.
    header = _header_of(index, remote_id)
    if header is not None and header.index_state is IndexState.BEING_REPLACED and header.state == found.state:
        return Place(Lineage.BEHIND)  # a fast-forward was interrupted after its WAL was removed
    if header is not None and _descends(found, head, header, local):
        return Place(Lineage.AHEAD)
    return Place(Lineage.AHEAD if _continues(head, ended, local) else Lineage.DIVERGED)


def _header_of(index: LocalIndex, remote_id: bytes) -> IndexHeader | None:
    header = index.load()
    return header if header is not None and header.remote_id == remote_id else None


def _end_of(head: Head, edges: Sequence[SegmentInfo], history: RemoteLog) -> WalPosition | None:
    """Return the WAL position at which the commit of the head ended.

    Returns None if its segment does not list it.
    """
    last = newest(edges)
    header = history.header(last.pre, last.post)
    return header.positions[-1] if header is not None and header.post == head.txid and header.positions else None


def _outruns(found: LocalState, ended: WalPosition | None, local: LocalDatabase) -> bool:
    """Return whether the local WAL holds the head's commit, and later commits.

    The local state then continues from the head, even if it has the same bytes as an earlier state.
    An old disk image or an old backup does not have such a WAL.
    """
    if ended is None or found.position is None:
        return False
    return 0 < ended.frame < found.position.frame and _begins_with(ended, local)


def _was_left_so(found: LocalState, head: Head, header: IndexHeader, local: LocalDatabase) -> bool:
    """Return whether the file is as its removed WAL left it, with unstored commits.

    The index was at the head at that time. The commits may have led back to the bytes of an earlier
    state.
    """
    if (header.txid, header.state) != (head.txid, head.state):
        return False
    gone = header.needs_scan and header.position is None and found.position is None
    return gone and header.identifies(local.path)


def _is_known_pending(found: LocalState, head: Head, header: IndexHeader) -> bool:
    """Return whether the index recorded this state as pending after the head.

    An attempt to store the state failed, or a close left it pending. The content is sufficient
    evidence, whatever happened to the timestamps and the WAL. A file that a reset is about to make
    the head has no identity in the index.
    """
    is_at_head = (header.txid, header.state) == (head.txid, head.state)
    return is_at_head and header.identity is not None and any(found.state == intent.post_hash for intent in header.in_doubt)


def earlier_txid(found: LocalState, edges: Iterable[SegmentInfo], history: RemoteLog, width: int) -> int | None:
    """Return the txid that `edges` list for the local state, or None.

    A position in a WAL identifies the segment that holds the commit. The txid at the end of that
    segment is returned.

    Args:
        found: the local state.
        edges: the segments, newest first.
        history: the log.
        width: how many requests are made at once.
    """
    for header in _listed(list(edges), history, width):
        txids = [commit.txid for commit in header.commits if commit.post == found.state]
        if txids:
            return max(txids)
        if header.pre and header.pre_hash == found.state:
            return header.pre
        if found.position is not None and found.position in header.positions:
            return header.post
    return None


def _listed(edges: Sequence[SegmentInfo], history: RemoteLog, width: int) -> Iterator[SegmentHeader]:
    """Yield headers that list everything that the headers of `edges` list.

    A merged segment that is sound replaces those that it was merged from.
    """

    def load(edge: SegmentInfo) -> SegmentHeader | None:
        try:
            return history.header(edge.pre, edge.post)
        except CorruptionError as error:
            logger.warning("%s", error.message)
            return None

    # A long snapshot lists only the end of the txids that it spans.
    telling = [edge for edge in edges if edge.pre or edge.post <= LISTED_ROWS]
    outer = maximal_segments(telling)[::-1]
    for edge, header in zip(outer, pool.ordered(load, outer, width), strict=True):
        if header is not None:
            yield header
        if header is None or len(header.commits) < edge.post - edge.pre or len(header.positions) >= LISTED_ROWS:
            inner = [other for other in telling if edge.pre <= other.pre and other.post <= edge.post and other != edge]
            yield from _listed(inner, history, width)
    longest = [edge for edge in edges if not edge.pre and edge.post > LISTED_ROWS]
    yield from (header for header in pool.ordered(load, longest, width) if header is not None)


def _descends(found: LocalState, head: Head, header: IndexHeader, local: LocalDatabase) -> bool:
    """Return whether the index was at the head, and this file continues from there.

    The proof is a WAL that continues, or the recorded identity. Without either, an old backup that
    was copied over the file looks the same as a file that another program has written to. The
    change counter seldom moves in WAL mode.
    """
    now = Identity.of(local.path)
    if header.identity is None or now is None or (header.txid, header.state) != (head.txid, head.state):
        return False
    if (header.identity.device, header.identity.inode) != (now.device, now.inode):
        return False
    if found.change_counter < header.change_counter:
        return False
    known, position = header.position, found.position
    if header.successor is not None and position is not None:
        wal = local.wal.header()
        if wal is not None and wal.position() == header.successor:
            return True  # every restart since then left a record, and no commit after it is stored
    if known is None:
        # There was no WAL. One that exists now was started on the file as it was then, or on the
        # head.
        return header.identifies(local.path) or (position is not None and _is_head_without_wal(head, local))
    if position is None:
        return False  # the WAL that contained the position was removed without a WAL reset record
    restarts = (position.salt1 - known.salt1) & 0xFFFFFFFF  # salt 1 is incremented at each restart; in a new WAL it is random
    if restarts:
        return restarts <= _MOST_RESTARTS
    return _begins_with(known, local)


def _continues(head: Head, ended: WalPosition | None, local: LocalDatabase) -> bool:
    """Return whether the local WAL continues from the commit of the head.

    It does if it begins with the same frames with which the commit of the head ended. It also does
    if it is the next WAL after that one, and the main file is the head. The second case occurs when
    the first commit to a restarted WAL was not stored. In addition, a power loss destroyed the
    local index, or left an older one on disk.
    """
    if ended is None:
        return False
    if ended.frame > 0 and _begins_with(ended, local):
        return True
    wal = local.wal.header()
    return wal is not None and (wal.salt1 - ended.salt1) & 0xFFFFFFFF == 1 and _is_head_without_wal(head, local)


def _is_head_without_wal(head: Head, local: LocalDatabase) -> bool:
    """Return whether the main file alone is the head.

    It is not if a checkpoint of its WAL has begun.
    """
    with local.read_transaction():
        tip = local.tip()
        if tip.header is None or tip.backfilled or tip.header.page_size != head.page_size:
            return False
        if os.path.getsize(local.path) < head.db_size * head.page_size:
            return False
        state = 0
        for pgno, page in local.pages(tip._replace(frames=0), DatabaseShape(head.page_size, head.db_size, 0)):
            state ^= page_hash(pgno, page)
        return state == head.state


def _begins_with(position: WalPosition, local: LocalDatabase) -> bool:
    with local.read_transaction():
        tip = local.tip()
        return (
            tip.header is not None
            and local.wal.header() == tip.header
            and (position.salt1, position.salt2) == (tip.header.salt1, tip.header.salt2)
            and position.frame <= tip.frames
            and local.wal.position(tip.header, position.frame) == position
        )
