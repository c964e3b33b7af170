"""Where a local state stands in a history, told by content: its hash, its place in a WAL, and what the local index remembers.

    HEAD      its state hash is the head's
    EARLIER   a segment lists its state hash, or its place in the WAL: a power loss, an old image of the machine
    DESCENDS  it came from the head by local commits: the local index stood at the head, on the same inode, page 1's change counter has
              not gone back, and the WAL goes on where the index left it, or there was none and the file is, by its recorded
              identity, the one that was left; or the WAL begins with the very frames that the head's commit ended with, or lies,
              as the next one after that, upon a main file that is the head
    UNKNOWN   anything else

DESCENDS is asked before EARLIER: local commits may have led back to bytes that have been there before, and no old image and no old
backup has what proves the descent (a WAL, a recorded identity, a recorded state). An old backup beside a newer WAL is told by the scan
that follows: a page has changed that the WAL has no frame of. Then it is EARLIER after all, if it is.
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

_MOST_RESTARTS: Final = 1 << 16  # of the WAL by programs that leave no seal; a random salt passes once in 65,536 times


class Lineage(Enum):
    """How a local state that is not empty stands to a history."""

    AT_HEAD = auto()
    BEHIND = auto()
    AHEAD = auto()
    DIVERGED = auto()


class Place(NamedTuple):
    """The relation of a local state to a history; of an EARLIER one its txid, if the log tells it."""

    relation: Lineage
    txid: int | None = None


@dataclass(frozen=True, slots=True)
class LocalState:
    """The local state: its hash, its end in the WAL, page size in bytes, size in pages, page 1's change counter."""

    state: int
    position: WalPosition | None
    page_size: int
    db_size: int
    change_counter: int


def local_state(local: LocalDatabase, known: IndexHeader | None) -> LocalState:
    """The local state, by a scan; `known`, an index that can be believed, spares it when nothing is pending.

    Raises:
        SnapshotLost, CorruptionError: as `LocalDatabase.pages`.
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
    """The place of `found` in the history with `edges` and `head`; `index` is locked and of `home`, `width` requests go at once.

    Raises:
        StoreError: the history could not be read. (Segments that are damaged are passed over, with a warning.)
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
    header = _header_of(index, remote_id)  # that took its time, and whoever restarts the WAL leaves a seal without asking for the lock
    if header is not None and header.index_state is IndexState.BEING_REPLACED and header.state == found.state:
        return Place(Lineage.BEHIND)  # a fast-forward was cut off after its WAL had gone
    if header is not None and _descends(found, head, header, local):
        return Place(Lineage.AHEAD)
    return Place(Lineage.AHEAD if _continues(head, ended, local) else Lineage.DIVERGED)


def _header_of(index: LocalIndex, remote_id: bytes) -> IndexHeader | None:
    header = index.load()
    return header if header is not None and header.remote_id == remote_id else None


def _end_of(head: Head, edges: Sequence[SegmentInfo], history: RemoteLog) -> WalPosition | None:
    """Where the head's commit ended in the WAL that it was made in; None when its segment does not tell."""
    last = newest(edges)
    header = history.header(last.pre, last.post)
    return header.positions[-1] if header is not None and header.post == head.txid and header.positions else None


def _outruns(found: LocalState, ended: WalPosition | None, local: LocalDatabase) -> bool:
    """Does the local WAL hold the head's commit, and more after it? Then it goes on from there, even if it leads back to the very bytes
    of an earlier state: no old image and no old backup has such a WAL."""
    if ended is None or found.position is None:
        return False
    return 0 < ended.frame < found.position.frame and _begins_with(ended, local)


def _was_left_so(found: LocalState, head: Head, header: IndexHeader, local: LocalDatabase) -> bool:
    """Is this the very file that the index, at the head, saw its WAL go into with commits that are not stored? They may have led back
    to the bytes of an earlier state, too."""
    if (header.txid, header.state) != (head.txid, head.state):
        return False
    gone = header.needs_scan and header.position is None and found.position is None
    return gone and header.identifies(local.path)


def _is_known_pending(found: LocalState, head: Head, header: IndexHeader) -> bool:
    """Return whether the index tells that this very state was reached from the head by local commits.

    An attempt to store it failed, or a close left it pending. Whatever became of timestamps and WAL, the content is proof enough. (A file
    that is about to be made the head by a reset has no identity in the index.)
    """
    is_at_head = (header.txid, header.state) == (head.txid, head.state)
    return is_at_head and header.identity is not None and any(found.state == intent.post_hash for intent in header.in_doubt)


def earlier_txid(found: LocalState, edges: Iterable[SegmentInfo], history: RemoteLog, width: int) -> int | None:
    """Return the txid that `edges`, the newest first, list for the local state; None if they do not list it.

    A place in a WAL tells the segment that holds the commit. Its end is returned.
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
    """Headers that list all that those of `edges` do. A merged edge spares those that it was merged from, if it is sound."""

    def load(edge: SegmentInfo) -> SegmentHeader | None:
        try:
            return history.header(edge.pre, edge.post)
        except CorruptionError as error:
            logger.warning("%s", error.message)
            return None

    # A long snapshot lists but the end of what it spans.
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
    """Return whether the index stood at the head, and this very file provably went on from there.

    What proves it is the WAL that goes on, or the recorded identity. Without either an old backup, copied over the file, looks the same
    as a file that another program has written to: the change counter seldom moves in WAL mode.
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
            return True  # each restart since then was seen, and nothing of it is stored yet
    if known is None:
        # The WAL had gone. One that is there now lies upon the file as it was left, or upon the head.
        return header.identifies(local.path) or (position is not None and _is_head_without_wal(head, local))
    if position is None:
        return False  # the WAL, which held what the position tells, is gone without a seal
    restarts = (position.salt1 - known.salt1) & 0xFFFFFFFF  # salt 1 increments at each restart, and is random in a new WAL
    if restarts:
        return restarts <= _MOST_RESTARTS
    return _begins_with(known, local)


def _continues(head: Head, ended: WalPosition | None, local: LocalDatabase) -> bool:
    """Does the local WAL begin with the very frames that the head's commit ended with, or lie upon the head as the next WAL?

    The latter it does when the first commit to a restarted WAL was not stored, and the local index was lost, or older on the disk, with
    the power.
    """
    if ended is None:
        return False
    if ended.frame > 0 and _begins_with(ended, local):
        return True
    wal = local.wal.header()
    return wal is not None and (wal.salt1 - ended.salt1) & 0xFFFFFFFF == 1 and _is_head_without_wal(head, local)


def _is_head_without_wal(head: Head, local: LocalDatabase) -> bool:
    """Return whether the main file alone, of which the WAL has changed nothing yet, is the head."""
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
