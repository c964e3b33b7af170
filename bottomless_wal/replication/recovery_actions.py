"""Carry out the action that recovery at open has decided on.

These are the actions of `recovery_plan`. They change the local file, the index or the log.

Invariants:

* Everything happens under the local index's lock.
* A failure leaves the local file and the bucket as they were.
* A file is replaced only by a verified file, and only when no process has it open.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import apsw

from ..core.errors import ConflictError, RestoreError, StoreError
from ..core.failpoints import failpoint
from ..core.logs import get_logger
from ..history.log import Head
from ..history.page_table import IndexCorrupt
from ..history.planner import newest
from ..history.restore import Progress, Rebuilt, rebuild, rebuild_from_pages
from ..history.scratch import Scratch, scratch
from ..history.segment_list import SegmentInfo
from ..sqlite.replace import exclusive_access, open_elsewhere, quarantine_sidecar_files, replace_atomically
from ..sqlite.snapshot_reader import SnapshotInvalidated
from .index import UNKNOWN_SIZE, Identity, IndexHeader, IndexState, changed
from .index_rebuild import rebuild_index_from_file, rebuild_index_from_log
from .lineage import LocalState, Place
from .replicator import Replicator

__all__ = ["Actions", "Situation", "cut_off"]

logger = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Situation:
    """The findings of recovery at open.

    The optional fields are set where the action needs them.

    `listed_ms`: when the listing showed `head` as the head, in milliseconds since 1970.
    """

    identity: Identity | None
    edges: Sequence[SegmentInfo]
    listed_ms: int
    known_head: Head | None = None
    known_local: LocalState | None = None
    place: Place | None = None

    @property
    def head(self) -> Head:
        """Return the head of the history."""
        if self.known_head is None:
            raise AssertionError("this action needs a history")
        return self.known_head

    @property
    def local(self) -> LocalState:
        """Return the state of the local file."""
        if self.known_local is None:
            raise AssertionError("this action needs a local state")
        return self.known_local

    @property
    def earlier(self) -> int | None:
        """Return the txid of the earlier state that the local file is at.

        Returns None if the log does not list it.
        """
        return self.place.txid if self.place is not None else None

    def now(self, path: str) -> Situation:
        """Return this situation with the present identity of the file at `path`.

        Call it after a change to the file that was made here.
        """
        return replace(self, identity=Identity.of(path))


class Actions:
    """The actions of recovery at open.

    The caller must hold the lock of the index of `replicator`.
    """

    def __init__(self, replicator: Replicator, progress: Progress | None) -> None:
        self.replicator = replicator
        self.local = replicator.local
        self.index = replicator.index
        self.history = replicator.history
        self.progress = progress

    def start(self, found: Situation) -> IndexHeader:
        """Start with an empty index: the first commit is 0 -> 1."""
        # Leave the files beside an empty database file to SQLite: another process may be creating
        # the database now.
        if not os.path.exists(self.local.path):
            quarantine_sidecar_files(self.local.path)
        self.replicator.is_paused = True
        return self.index.mark_open(self.replicator.fresh())

    def resume(self, header: IndexHeader) -> IndexHeader:
        """Continue from `header`, which is proved."""
        self.index.mark_open(header)
        return self.replicator.batch()

    def initial(self, found: Situation) -> IndexHeader:
        """Store the whole local database as the first segment of a log."""
        self._say_what_is_gone()
        self._convert()
        before = self.index.load()
        if before is not None and before.remote_id == self.replicator.remote_id and before.index_state is IndexState.UNPROVED:
            return self._begin_at(before)  # a restore from page objects alone was interrupted
        return self.index.mark_open(self.replicator.upload_initial(self.replicator.fresh()))

    def catch_up(self, found: Situation) -> IndexHeader:
        """Store the commits of the local file that follow the head, if there are any."""
        head = found.head
        self._convert()
        header = self.index.load()
        if (
            header is not None
            and header.remote_id == self.replicator.remote_id
            and head == (header.txid, header.state, header.page_size, header.db_size)
        ):
            self.index.mark_open(header.needing_scan())
            try:
                return self.replicator.batch()
            except IndexCorrupt as lost:
                logger.warning("%s: %s", self.local.path, lost)
        return self._take_over(found)

    def reset(self, found: Situation) -> IndexHeader:
        """Make the local file the head."""
        head = found.head
        failpoint("before reset")
        self._convert()
        # Without an identity an interrupted reset cannot make the file pass for AHEAD of the head.
        header = self.replicator.fresh().at(head.txid, head.state, head.page_size, 0).needing_scan()
        return self.index.mark_open(self.replicator.upload_reset(header))

    def keep_local(self, found: Situation) -> IndexHeader:
        """Keep the local file, and fill the index with the head's page hashes.

        The next commit then carries every page that differs.
        """
        logger.warning(
            "%s diverged from its history (txid %d): kept as it is; the next commit carries every difference (initial_replication=skip)",
            self.local.path,
            found.head.txid,
        )
        self._convert()
        self.replicator.is_paused = True
        header = self._learn(self.replicator.fresh(), found)
        # Without an identity the file is not AHEAD of the head until a commit is stored. The next
        # open applies the policy again.
        return self.index.mark_open(header.needing_scan())

    def fast_forward(self, found: Situation) -> IndexHeader:
        """Replace the local file, which is an earlier state, by the head.

        The file is at `found.earlier`. None: a fast-forward was interrupted, so the txid is not
        known.
        """
        # The position in the WAL may be the only evidence that this is an earlier state, and it is
        # lost before the file is replaced. The state hash in the index takes its place (see
        # `lineage`).
        txid, state = found.earlier, found.local.state
        self.local.close()
        with exclusive_access(self.local.path):
            pass  # fail before the index changes: a process that has the file open needs the index
        header = self.index.mark_being_replaced(self.replicator.unknown(), state)
        self.index.pages.clear()
        # Checkpoint before the WAL is removed: a crash in between then leaves an earlier state, not
        # a torn file.
        with self._plain() as connection:
            connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 0)
            connection.execute("PRAGMA schema_version").fetchall()  # a connection that has never read checkpoints nothing
            try:
                connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
            except apsw.BusyError as error:
                raise open_elsewhere(self.local.path) from error
        failpoint("after fold")
        place = f"txid {txid}" if txid is not None else f"state {state:016x}"
        header = self._restore(found.now(self.local.path), header, place)
        logger.warning(
            "%s was at %s, an earlier state of its history: moved forward to the head, txid %d", self.local.path, place, found.head.txid
        )
        return header

    def restore(self, found: Situation) -> IndexHeader:
        """Restore the head to an empty or missing local file."""
        return self._restore(found)

    def _restore(self, found: Situation, header: IndexHeader | None = None, place: str = "") -> IndexHeader:
        """Replace the local file by the head.

        `place` describes the state of a file that is not empty.
        """
        width, path = self.replicator.config.concurrency, shlex.quote(self.local.path)
        with self._alone(found), scratch(self.local.path, self.index.pages) as into:
            header = header or self.replicator.fresh()
            try:
                rebuilt = rebuild(self.history, into, found.head.txid, found.edges, width=width, progress=self.progress, arguments=path)
            except RestoreError as error:
                if place:
                    raise cut_off(self.local.path, place, error) from error
                raise
            return self._put_in_place(into, rebuilt, header, found.listed_ms)

    def restore_pages(self, found: Situation) -> IndexHeader:
        """Restore the content of the page objects to an empty or missing local file."""
        with self._alone(found), scratch(self.local.path, self.index.pages) as into:
            header = self.replicator.fresh()
            rebuilt = rebuild_from_pages(self.history, into, width=self.replicator.config.concurrency, progress=self.progress)
            if rebuilt is None:
                raise StoreError(f"the page objects of {self.history.name!r} vanished while they were looked at", hint="Try again.")
            # Without an identity the next open after a crash stores the first segment of the new
            # log, at this txid.
            header = self.index.begin_rebased(header, rebuilt.txid, rebuilt.state)
            self.local.close()
            replace_atomically(into.path, into.fd, self.local.path)
        header = self._begin_at(header)
        return self.index.mark_open(changed(header, view_txid=header.txid, backlog=None))

    # --- their parts ---------------------------------------------------------------------------------------------------

    def _say_what_is_gone(self) -> None:
        """Log an error if the index records a history and the bucket has none.

        The objects of the history were deleted, or have expired.
        """
        before = self.index.load()
        if before is not None and before.remote_id == self.replicator.remote_id and before.txid:
            logger.error(
                "the log of %s, which was at txid %d, is gone from %s: it begins anew with the local file",
                self.local.path,
                before.txid,
                self.history.store.describe(),
            )

    def _convert(self) -> None:
        """Switch a rollback-journal database to WAL mode.

        Call it only after the decision to keep the local file.
        """
        self.local.close()
        with self._plain() as connection:
            if connection.execute("PRAGMA journal_mode").get == "wal":
                return
            failpoint("before conversion")
            if connection.execute("PRAGMA journal_mode=wal").get != "wal":
                raise ConflictError(
                    f"{self.local.path} cannot be switched to WAL mode",
                    hint="Another program has it open, or its file system has no shared memory. Close it and open again.",
                )
            failpoint("after conversion")

    @contextlib.contextmanager
    def _plain(self) -> Iterator[apsw.Connection]:
        connection = self.local.connect_plain()
        try:
            yield connection
        finally:
            connection.close()

    def _take_over(self, found: Situation) -> IndexHeader:
        """Rebuild an index that was lost or stale.

        The local file is the head, or comes from it.
        """
        local, head = found.local, found.head
        before = self.index.load()
        header = self.replicator.unknown()
        # After a crash or a store error this header keeps the evidence that the file comes from the
        # head. It also requests that the entries are rebuilt.
        header = self.index.identify(header.at(*head), self.local.path)
        if before is not None and before.remote_id != header.remote_id:
            before = None
        position = before.position if before is not None and before.txid <= head.txid else None
        if before is None and local.state != head.state:
            # The evidence is the WAL, which begins with the head's frames. Every page that differs
            # has a frame after them.
            last = self.history.header(*newest(found.edges)[:2])
            position = last.positions[-1] if last is not None and last.positions else None
        change_counter = min(local.change_counter, before.change_counter) if before is not None else local.change_counter
        header = self.index.begin_rebuild(header, position, change_counter)
        self.index.pages.clear()
        failpoint("after clear")
        if local.state == head.state:
            header = rebuild_index_from_file(self.local, self.history, self.index, header, head, found.edges)
            header = changed(header, proved_ms=found.listed_ms)
        else:
            header = self._learn(header, found)
        # The scan sets the position, and finds the difference if there is one.
        header = changed(header, needs_scan=True, change_counter=local.change_counter)
        header = self.index.identify(header, self.local.path)
        return self.index.mark_open(self.replicator.upload_difference(header))

    def _learn(self, header: IndexHeader, found: Situation) -> IndexHeader:
        header = rebuild_index_from_log(self.history, self.index, header, found.head, found.edges, width=self.replicator.config.concurrency)
        return changed(header, proved_ms=found.listed_ms)

    @contextlib.contextmanager
    def _alone(self, found: Situation) -> Iterator[None]:
        """Hold exclusive access to the file.

        The file must be unchanged since the decision was made.

        Raises:
            SnapshotInvalidated: the file has changed.
        """
        self.local.close()
        with exclusive_access(self.local.path):
            if Identity.of(self.local.path) != found.identity:
                raise SnapshotInvalidated(f"{self.local.path} was written to meanwhile")
            yield

    def _begin_at(self, header: IndexHeader) -> IndexHeader:
        """Store the first segment of a new log: the snapshot 0 -> txid of `header`.

        The txids continue.
        """
        return self.index.mark_open(self.replicator.upload_rebased(header))

    def _put_in_place(self, into: Scratch, rebuilt: Rebuilt, header: IndexHeader, proved_ms: int) -> IndexHeader:
        path = self.local.path
        self.local.close()
        made = os.fstat(into.fd)
        replace_atomically(into.path, into.fd, path)
        header = changed(
            header.at(rebuilt.txid, rebuilt.state, rebuilt.page_size, rebuilt.db_size),
            view_txid=min(rebuilt.view_txid, rebuilt.txid),
            view_size=UNKNOWN_SIZE,
            position=None,
            proved_ms=proved_ms,
        )
        header = self.index.identify(header, path)
        # Until a connection of this process reads, a write by another program changes nothing but
        # the timestamps.
        is_untouched = header.identity is not None and header.identity[1:4] == (
            made.st_ino,
            rebuilt.page_size * rebuilt.db_size,
            made.st_mtime_ns,
        )
        header = changed(
            header,
            needs_scan=not (is_untouched and header.is_settled),
            change_counter=int.from_bytes(os.pread(into.fd, 4, 24), "big"),
        )
        if header.backlog is None and self.replicator.config.pages == "commit":
            header = header.pages_postponed(header.txid)
        logger.info("%s: restored at txid %d (%d pages)", path, header.txid, header.db_size)
        return self.index.mark_open(header)


def cut_off(path: str, place: str, cause: RestoreError) -> RestoreError:
    """Return the error for a local file that cannot be moved to the head.

    The file at `path` is at `place` of its history.
    """
    quoted = shlex.quote(path)
    return RestoreError(
        f"{path} is at {place} of its history and cannot be moved forward to the head: {cause.message.rstrip('.')}. "
        "Its content was not changed",
        hint=f"Make the local file the head: `bottomless-wal reset --from-local {quoted}`. "
        f"`bottomless-wal ls {quoted}` shows the states that can be restored before.",
    )
