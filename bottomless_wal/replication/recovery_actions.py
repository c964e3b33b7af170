"""What an opening does, once it is decided: each action of `recovery_plan` that changes the local file, the index or the log.

Invariants: everything happens under the local index's lock; whatever fails leaves local file and bucket as they were; a file is replaced
only by a verified one, and only when nobody has it open.
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
    """What an opening has found. `head`, `local` and `place` are known where the action needs them."""

    identity: Identity | None
    edges: Sequence[SegmentInfo]
    listed_ms: int  # when the head was seen to be the head
    known_head: Head | None = None
    known_local: LocalState | None = None
    place: Place | None = None

    @property
    def head(self) -> Head:
        """The head of the history."""
        if self.known_head is None:
            raise AssertionError("this action needs a history")
        return self.known_head

    @property
    def local(self) -> LocalState:
        """The state of the local file."""
        if self.known_local is None:
            raise AssertionError("this action needs a local state")
        return self.known_local

    @property
    def earlier(self) -> int | None:
        """The txid of the earlier state that the local file is at, if the log tells it."""
        return self.place.txid if self.place is not None else None

    def now(self, path: str) -> Situation:
        """The same, after a change to the file at `path` that was made here."""
        return replace(self, identity=Identity.of(path))


class Actions:
    """The actions of an opening. Every method expects the index of `replicator` to be locked."""

    def __init__(self, replicator: Replicator, progress: Progress | None) -> None:
        self.replicator = replicator
        self.local = replicator.local
        self.index = replicator.index
        self.history = replicator.history
        self.progress = progress

    def start(self, found: Situation) -> IndexHeader:
        """Begin with an empty index: the first commit is 0 -> 1."""
        # Files beside an empty one are SQLite's to judge: another process may be making it a database right now.
        if not os.path.exists(self.local.path):
            quarantine_sidecar_files(self.local.path)
        self.replicator.is_paused = True
        return self.index.mark_open(self.replicator.fresh())

    def resume(self, header: IndexHeader) -> IndexHeader:
        """Go on from `header`, which can be believed."""
        self.index.mark_open(header)
        return self.replicator.batch()

    def initial(self, found: Situation) -> IndexHeader:
        """Store the whole local database as the beginning of a log."""
        self._say_what_is_gone()
        self._convert()
        before = self.index.load()
        if before is not None and before.remote_id == self.replicator.remote_id and before.index_state is IndexState.UNPROVED:
            return self._begin_at(before)  # a restore from page objects alone was cut off
        return self.index.mark_open(self.replicator.upload_initial(self.replicator.fresh()))

    def catch_up(self, found: Situation) -> IndexHeader:
        """Store what the local file has beyond the head, if it has anything."""
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
        # No identity: should this die half-way, the file must not pass for a descendant of the head.
        header = self.replicator.fresh().at(head.txid, head.state, head.page_size, 0).needing_scan()
        return self.index.mark_open(self.replicator.upload_reset(header))

    def keep_local(self, found: Situation) -> IndexHeader:
        """The index takes the head's hashes; the next commit then carries every page that differs."""
        logger.warning(
            "%s diverged from its history (txid %d): kept as it is; the next commit carries every difference (initial_replication=skip)",
            self.local.path,
            found.head.txid,
        )
        self._convert()
        self.replicator.is_paused = True
        header = self._learn(self.replicator.fresh(), found)
        # No identity: until a commit has made it so, the file is no descendant of the head, and the policy is asked again.
        return self.index.mark_open(header.needing_scan())

    def fast_forward(self, found: Situation) -> IndexHeader:
        """Replace the local file, which is at `found.earlier` (None: a fast-forward was cut off, so it is not known), by the head."""
        # By its hash the index now says that this is an earlier state (see `lineage`): the place in the WAL, which may be all that told
        # it, goes before the file does.
        txid, state = found.earlier, found.local.state
        self.local.close()
        with exclusive_access(self.local.path):
            pass  # a process that has it open needs the index as it is
        header = self.index.mark_being_replaced(self.replicator.unknown(), state)
        self.index.pages.clear()
        # The main file must be whole by itself before its WAL goes: a crash in between leaves an earlier state, not a torn one.
        with self._plain() as connection:
            connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 0)
            connection.execute("PRAGMA schema_version").fetchall()  # one that has never read checkpoints nothing
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
        """Put the head in place of an empty or missing local file."""
        return self._restore(found)

    def _restore(self, found: Situation, header: IndexHeader | None = None, place: str = "") -> IndexHeader:
        """Put the head in place of the local file, which is at `place` if it is not empty."""
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
        """Put what the page objects hold in place of an empty or missing local file."""
        with self._alone(found), scratch(self.local.path, self.index.pages) as into:
            header = self.replicator.fresh()
            rebuilt = rebuild_from_pages(self.history, into, width=self.replicator.config.concurrency, progress=self.progress)
            if rebuilt is None:
                raise StoreError(f"the page objects of {self.history.name!r} vanished while they were looked at", hint="Try again.")
            # No identity: should this die before the log begins anew, the next open lets it begin, at this very txid.
            header = self.index.begin_rebased(header, rebuilt.txid, rebuilt.state)
            self.local.close()
            replace_atomically(into.path, into.fd, self.local.path)
        header = self._begin_at(header)
        return self.index.mark_open(changed(header, view_txid=header.txid, backlog=None))

    # --- their parts ---------------------------------------------------------------------------------------------------

    def _say_what_is_gone(self) -> None:
        """The bucket holds no history where the index knows one: somebody has deleted it, or an expiry rule has."""
        before = self.index.load()
        if before is not None and before.remote_id == self.replicator.remote_id and before.txid:
            logger.error(
                "the log of %s, which was at txid %d, is gone from %s: it begins anew with the local file",
                self.local.path,
                before.txid,
                self.history.store.describe(),
            )

    def _convert(self) -> None:
        """A rollback-journal database becomes a WAL one. Only once it is decided that the local file stays."""
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
        """The local file is, or descends from, the head, and the index was lost or stale: it is made anew."""
        local, head = found.local, found.head
        before = self.index.load()
        header = self.replicator.unknown()
        # Killed, or cut off from the store, before the entries are there: this header keeps the file's descent, and asks for them.
        header = self.index.identify(header.at(*head), self.local.path)
        if before is not None and before.remote_id != header.remote_id:
            before = None
        position = before.position if before is not None and before.txid <= head.txid else None
        if before is None and local.state != head.state:
            # It descends by its WAL, which begins with the head's frames: what differs has a frame beyond them.
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
        # The scan finds the position, and the difference if there is one.
        header = changed(header, needs_scan=True, change_counter=local.change_counter)
        header = self.index.identify(header, self.local.path)
        return self.index.mark_open(self.replicator.upload_difference(header))

    def _learn(self, header: IndexHeader, found: Situation) -> IndexHeader:
        header = rebuild_index_from_log(self.history, self.index, header, found.head, found.edges, width=self.replicator.config.concurrency)
        return changed(header, proved_ms=found.listed_ms)

    @contextlib.contextmanager
    def _alone(self, found: Situation) -> Iterator[None]:
        """Nobody has the file open, and it is still what it was when the decision was made."""
        self.local.close()
        with exclusive_access(self.local.path):
            if Identity.of(self.local.path) != found.identity:
                raise SnapshotInvalidated(f"{self.local.path} was written to meanwhile")
            yield

    def _begin_at(self, header: IndexHeader) -> IndexHeader:
        """The log begins anew with the snapshot edge 0 -> txid of `header`, so that the line of txids goes on."""
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
        # Until a connection reads, another program can write to it and leave no trace but in its timestamps.
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
    """Return why the local file at `path`, which is at `place` of its history, cannot be moved forward."""
    quoted = shlex.quote(path)
    return RestoreError(
        f"{path} is at {place} of its history and cannot be moved forward to the head: {cause.message.rstrip('.')}. "
        "Its content was not changed",
        hint=f"Make the local file the head: `bottomless-wal reset --from-local {quoted}`. "
        f"`bottomless-wal ls {quoted}` shows the states that can be restored before.",
    )
