"""Resolve in-doubt attempts, and detect a second writer.

A segment is stored under a key that must not exist yet. If the key exists, the segment is this
replica's earlier attempt, whose answer was lost, or a second writer's commit. The segment itself
shows which.

Invariants:

* *Own attempts are recognised by attempt number and content*. A segment is an own attempt if and
  only if its pre hash matches, and the index lists its attempt number and post hash as in doubt.
* A replica that a second writer has overtaken stops (`Fencing.error`). It overwrites neither
  segments nor page objects.
* A segment that was stored where the history had been pruned is not part of it. `verify_still_head`
  detects and deletes it.
"""

from __future__ import annotations

import shlex
import time
from array import array
from collections.abc import Callable
from typing import Final

from ..core.errors import CorruptionError, FencedError, ReplicationError, StoreError
from ..core.failpoints import failpoint
from ..core.logs import get_logger
from ..formats import keys
from ..formats.segment import WRITER_ID_SIZE, Body, Segment, SegmentHeader
from ..formats.wal import WalPosition
from ..history.log import RemoteLog
from ..history.segment_list import SegmentInfo
from ..sqlite.database_reader import LocalDatabase
from .index import UNKNOWN_SIZE, Attempt, IndexHeader, LocalIndex, changed
from .page_objects import PageObjects

__all__ = ["Fencing"]

logger = get_logger(__name__)

_PAUSE_SECONDS: Final = 2.0


class Fencing:
    """Distinguish own attempts from those of a second writer.

    The caller must hold the lock of `index`, except for `is_recent_head`. `on_logged(position)` is
    called after each attempt that is adopted. `error` is set once a second writer has stored a
    commit.
    """

    def __init__(
        self,
        local: LocalDatabase,
        index: LocalIndex,
        history: RemoteLog,
        page_objects: PageObjects,
        *,
        remote_id: bytes,
        on_logged: Callable[[WalPosition | None], None],
    ) -> None:
        self.error: FencedError | None = None
        self._is_unchanged = False  # the fenced state had nothing to store
        self._local = local
        self._index = index
        self._history = history
        self._page_objects = page_objects
        self._home = remote_id
        self._on_logged = on_logged
        self._stored_last = (0, 0.0)  # (txid, when)

    def note_stored(self, txid: int, when: float) -> None:
        """Record that this process stored `txid` as the head.

        `when` is a time of the monotonic clock.
        """
        self._stored_last = (txid, when)

    def resolve_in_doubt(self) -> None:
        """Resolve an in-doubt attempt during recovery at open.

        The attempt is adopted if it is stored and this replica's. A second writer's segment is left
        to the policy.
        """
        header = self._index.load()
        if header is None or header.remote_id != self._home or not header.in_doubt:
            return
        if len(self._history.edges(since=header.txid)) > 1:
            # The history is ahead of this index. The index is an old copy (after a power loss), or
            # a second writer has stored commits. No attempt is in doubt then.
            return
        found = self._history.segment(header.txid, header.txid + 1)
        if found is not None and self._is_own(header, found.header):
            self.adopt_in_doubt(header, found)

    @staticmethod
    def _is_own(header: IndexHeader, edge: SegmentHeader) -> bool:
        """Return whether `edge` is one of the in-doubt attempts."""
        # The first segment of a log that restarts, from page objects alone, leads from 0 to the
        # state of the header.
        return edge.pre_hash == (header.state if edge.pre else 0) and Attempt(edge.post_hash, edge.attempt) in header.in_doubt

    def stored(self, pre: int, post: int) -> Segment:
        """Return the segment whose key exists.

        Raises:
            ReplicationError: the segment was not found.
        """
        found = self._history.segment(pre, post)
        if found is None:
            raise ReplicationError(
                f"{keys.segment_key(self._history.name, pre, post)} was taken, and is not there",
                hint="Another program deletes objects of this history, or the store is not consistent. The commit stays pending.",
            )
        return found

    def adopt_in_doubt(self, header: IndexHeader, found: Segment) -> None:
        """Update the index from a stored segment that is an own earlier attempt.

        Raises:
            FencedError: the segment is a second writer's.
        """
        edge = found.header
        if not self._is_own(header, edge):
            self._fence(
                f"{found.name} was written by another writer ({edge.writer[:WRITER_ID_SIZE].hex()}): {self._local.path} is at txid "
                f"{header.txid}, and the history has gone on without it"
            )
        logger.info("%s: %s is our own, from an attempt whose answer was lost", self._local.path, found.name)
        self.verify_still_head(edge)  # the time of the put is unknown: the history may have been pruned there
        failpoint("within adopt")
        position = edge.positions[-1] if edge.positions else None
        with self._local.read_transaction():
            tip = self._local.tip()
            wal = tip.header
            known = (
                position is not None
                and wal is not None
                and self._local.wal.header() == wal
                and (position.salt1, position.salt2) == (wal.salt1, wal.salt2)
                and position.frame <= tip.frames
                and self._local.wal.position(wal, position.frame) == position
            )
        header = self._index.adopted(header, position if known else None)
        if edge.whole:
            header = changed(header, view_size=UNKNOWN_SIZE)
        pgnos, hashes = array("I"), array("Q")
        for pgno, known_hash in self._history.tables(found):
            pgnos.append(pgno)
            hashes.append(known_hash)
        # Later local states continue from this segment.
        own = header.in_doubt.index(Attempt(edge.post_hash, edge.attempt))
        noted = [Attempt(later.post_hash, 0) for later in header.in_doubt[own + 1 :]]
        header = self._index.record_segment(
            header, edge, pgnos, hashes, proved_ms=edge.time_ms, change_counter=header.change_counter, noted=noted
        )
        if known:
            self._on_logged(position)
        self.require_head(header)
        self._page_objects.put(header, (page for block in self._history.blocks(found) for page in block))

    def require_head(self, header: IndexHeader) -> None:
        """Check that the index is at the head.

        Off the commit path no create-only write detects a second writer. Call this before page
        objects are put or deleted there.

        Raises:
            FencedError: the history has continued without this replica.
        """
        beyond = self._history.edges(since=header.txid)
        if len(beyond) == 1 and header.in_doubt:
            found = self._history.segment(header.txid, header.txid + 1)
            if found is not None and self._is_own(header, found.header):
                return  # an own attempt, which the next batch adopts
        if beyond:
            self._fence(
                f"{self._local.path} is at txid {header.txid}, and another writer has gone on to {max(edge.post for edge in beyond)}"
            )

    def require_head_though_unchanged(self, header: IndexHeader) -> None:
        """Check as `require_head`, for a local state that has nothing to store.

        Raises:
            FencedError: another writer has gone on. `forgive_unchanged` lets an open look again.
        """
        try:
            self.require_head(header)
        except FencedError:
            self._is_unchanged = True
            raise

    def forgive_unchanged(self) -> bool:
        """Return whether the fenced state had nothing to store; if so, forget the error.

        Only an open may do so: it compares the local file with the new head next, and moves it
        forward.
        """
        if not self._is_unchanged:
            return False
        self.error, self._is_unchanged = None, False
        return True

    def require_recent_head(self, header: IndexHeader) -> None:
        """Do as `require_head`, unless this process has just stored the head itself."""
        if not self.is_recent_head(header):
            self.require_head(header)

    def is_recent_head(self, header: IndexHeader) -> bool:
        """Return whether this process has just stored this state itself.

        A process that was suspended since then may have been overtaken.
        """
        txid, stored = self._stored_last
        return txid >= header.txid and time.monotonic() - stored <= _PAUSE_SECONDS

    def require_body(self, edge: SegmentHeader, body: Body) -> None:
        """Check that the body of a stored segment still exists.

        The process may have been suspended between the upload of the body and its segment. A body
        that no segment names is garbage after a while.

        Raises:
            ReplicationError: the body was deleted; the segment is deleted, too.
        """
        if self._history.store.read(keys.log_prefix(self._history.name) + body.name, 0, 1) is None:
            self._delete_stray_segment(edge)
            raise ReplicationError(
                f"commit {edge.post} of {self._local.path} is not stored: its pages, uploaded long ago, were deleted meanwhile",
                hint="It stays pending, and goes anew with the next commit, flush() or open.",
            )

    def _delete_stray_segment(self, edge: SegmentHeader) -> None:
        """Delete a segment of this replica that was not acknowledged."""
        self._history.forget(edge.pre, edge.post)
        self._history.store.delete([keys.segment_key(self._history.name, edge.pre, edge.post)])

    def verify_still_head(self, edge: SegmentHeader) -> None:
        """Check that no segment follows the one that this replica has stored.

        If none does, it was stored at the head, and not where the history had been pruned.

        Raises:
            FencedError: a segment does. If none continues from the stored segment itself, that one
                is a stray: it is deleted.
        """
        beyond = self._history.edges(since=edge.post)
        if not beyond:
            return
        head = max(other.post for other in beyond)
        if any(self._leads_on(edge, other) for other in beyond if other.pre == edge.post):
            self._fence(f"{self._local.path} stored commit {edge.post}, and another writer has gone on from it, to txid {head}, since then")
        try:
            self._delete_stray_segment(edge)
        except StoreError as error:
            logger.error("%s: a stray commit stays in the log, where no restore follows it: %s", self._local.path, error.message)
        self._fence(
            f"{self._local.path} was away for too long: its commit {edge.post} was stored where the history, which is at txid {head} "
            f"by now, had been pruned"
        )

    def _leads_on(self, edge: SegmentHeader, other: SegmentInfo) -> bool:
        try:
            header = self._history.header(other.pre, other.post)
        except CorruptionError as error:
            logger.warning("%s", error.message)
            return True  # the evidence is damaged: keep the segment
        return header is not None and header.pre_hash == edge.post_hash

    def _fence(self, message: str) -> None:
        self.error = FencedError(
            message,
            hint="This replica has stopped and overwrites nothing. Re-base it with "
            f"`bottomless-wal restore --force {shlex.quote(self._local.path)}`, or make it the "
            "truth by opening it with initial_replication=force.",
        )
        raise self.error
