"""Whose is the next txid: attempts whose outcome is unknown, and other writers.

A segment is stored under a key that nobody may have taken. A key that is taken is our own earlier attempt, whose answer was lost, or a
rival's commit: the segment itself tells which.

Invariants:

* *Own attempts are told by attempt number and content*: a segment is ours if and only if its pre hash is ours, and its attempt number and
  post hash are one of the attempts in doubt that the index lists.
* A replica that was overtaken stops (`Fencing.error`) and overwrites nothing, neither segments nor page objects.
* A segment that was stored where the history had been pruned is no part of it: `verify_still_head` finds out and deletes it.
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
    """Tells own attempts from those of other writers. Every method but `is_recent_head` expects `index` to be locked by the caller.

    `on_logged(position)` is called after each attempt that is adopted. `error` is set once another writer has gone on.
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
        self._local = local
        self._index = index
        self._history = history
        self._page_objects = page_objects
        self._home = remote_id
        self._on_logged = on_logged
        self._stored_last = (0, 0.0)  # (txid, when)

    def note_stored(self, txid: int, when: float) -> None:
        """Note that this process stored `txid` as the head, at `when` of the monotonic clock."""
        self._stored_last = (txid, when)

    def resolve_in_doubt(self) -> None:
        """Boot's look at an attempt whose outcome is unknown: adopted when it is stored and ours; a rival's is left to the policy."""
        header = self._index.load()
        if header is None or header.remote_id != self._home or not header.in_doubt:
            return
        if len(self._history.edges(since=header.txid)) > 1:
            return  # the history is further than this index: an old copy of it (a power loss), or a rival; no attempt is open
        found = self._history.segment(header.txid, header.txid + 1)
        if found is not None and self._is_own(header, found.header):
            self.adopt_in_doubt(header, found)

    @staticmethod
    def _is_own(header: IndexHeader, edge: SegmentHeader) -> bool:
        """Return whether `edge` is one of the attempts in doubt."""
        # (The edge with which a log begins anew, from page objects alone, leads from nothing to the state that the header tells.)
        return edge.pre_hash == (header.state if edge.pre else 0) and Attempt(edge.post_hash, edge.attempt) in header.in_doubt

    def stored(self, pre: int, post: int) -> Segment:
        """Return the segment whose key was taken. Raises ReplicationError when it is not there."""
        found = self._history.segment(pre, post)
        if found is None:
            raise ReplicationError(
                f"{keys.segment_key(self._history.name, pre, post)} was taken, and is not there",
                hint="Another program deletes objects of this history, or the store is not consistent. The commit stays pending.",
            )
        return found

    def adopt_in_doubt(self, header: IndexHeader, found: Segment) -> None:
        """The stored edge is our own earlier attempt: the index follows it. Or it is a rival's: FencedError."""
        edge = found.header
        if not self._is_own(header, edge):
            self._fence(
                f"{found.name} was written by another writer ({edge.writer[:WRITER_ID_SIZE].hex()}): {self._local.path} is at txid "
                f"{header.txid}, and the history has gone on without it"
            )
        logger.info("%s: %s is our own, from an attempt whose answer was lost", self._local.path, found.name)
        self.verify_still_head(edge)  # when it was stored nobody knows: perhaps where the history had been pruned
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
        # What was reached after it, locally, goes on from it.
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
        """Off the commit path no create-only write tells of a rival: before page objects are put or deleted there, look.

        Raises:
            FencedError: the history has gone on without this replica.
        """
        beyond = self._history.edges(since=header.txid)
        if len(beyond) == 1 and header.in_doubt:
            found = self._history.segment(header.txid, header.txid + 1)
            if found is not None and self._is_own(header, found.header):
                return  # our own attempt, which the next batch adopts
        if beyond:
            self._fence(
                f"{self._local.path} is at txid {header.txid}, and another writer has gone on to {max(edge.post for edge in beyond)}"
            )

    def require_recent_head(self, header: IndexHeader) -> None:
        """As `require_head`, unless this process has just stored the head itself."""
        if not self.is_recent_head(header):
            self.require_head(header)

    def is_recent_head(self, header: IndexHeader) -> bool:
        """Has this process stored this state itself, just now? Who was stopped since then may have been overtaken."""
        txid, stored = self._stored_last
        return txid >= header.txid and time.monotonic() - stored <= _PAUSE_SECONDS

    def require_body(self, edge: SegmentHeader, body: Body) -> None:
        """We were stopped between the upload of a body and its segment: a body that nobody names is garbage after a while."""
        if self._history.store.read(keys.log_prefix(self._history.name) + body.name, 0, 1) is None:
            self._delete_stray_segment(edge)
            raise ReplicationError(
                f"commit {edge.post} of {self._local.path} is not stored: its pages, uploaded long ago, were deleted meanwhile",
                hint="It stays pending, and goes anew with the next commit, flush() or open.",
            )

    def _delete_stray_segment(self, edge: SegmentHeader) -> None:
        """Deletes a segment of our own that nobody was told of."""
        self._history.forget(edge.pre, edge.post)
        self._history.store.delete([keys.segment_key(self._history.name, edge.pre, edge.post)])

    def verify_still_head(self, edge: SegmentHeader) -> None:
        """Nothing lies beyond the edge that we have stored: it was stored at the head, not where the history had been pruned.

        Raises:
            FencedError: something does. If nothing leads on from the edge itself, it is no part of the history, and is withdrawn.
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
            return True  # nobody can tell any more
        return header is not None and header.pre_hash == edge.post_hash

    def _fence(self, message: str) -> None:
        self.error = FencedError(
            message,
            hint="This replica has stopped and overwrites nothing. Re-base it with "
            f"`bottomless-wal restore --force {shlex.quote(self._local.path)}`, or make it the "
            "truth by opening it with initial_replication=force.",
        )
        raise self.error
