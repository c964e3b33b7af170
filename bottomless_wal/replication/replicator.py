"""Store local commits as segments, one batch at a time.

A batch holds the local index's lock.

A batch passes through these states. If the process is killed between two of them, the next batch of
any process recovers:

    check     resolve an in-doubt attempt; compare the index's position with the wal-index
    read      read the new frames, the last of each page; if the position proves nothing, scan the whole snapshot
    record    add an in-doubt attempt to the index:      killed after: the next batch checks the log first
              post hash and random attempt number
    put       store one segment, create-only             killed after: the next batch adopts the segment, which
                                                         is one of the in-doubt attempts
    update    write page hashes, then the index's header killed between: as before
    pages     put page objects (`page_objects`), then    killed within: the next batch puts the backlog
              advance the view txid

Two rules make this correct:

* *A position is used only if it is proved* (`wal_position`). Otherwise the database is scanned.
* *Own attempts are recognised by attempt number and content* (`fencing`). Any other segment with
  the next key is from a second writer.

A new attempt number is drawn for each attempt with new content. A second machine that makes the
same change at the same moment is therefore a second writer. A copied directory shares with its
original only the attempts made before the copy. Those are attempts to store one and the same
commit.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Final

from ..core.config import Config
from ..core.errors import ReplicationError
from ..core.failpoints import failpoint
from ..core.logs import get_logger
from ..formats.segment import WRITER_ID_SIZE, CommitRecord, SegmentHeader
from ..formats.wal import WalPosition
from ..history.log import FENCE_HORIZON_SECONDS, RemoteLog
from ..history.page_table import IndexCorrupt
from ..sqlite.database_reader import LocalDatabase
from ..sqlite.snapshot_reader import DatabaseShape, SnapshotInvalidated, WalState
from .changes import Change, stage_difference, stage_frames, stage_whole
from .fencing import Fencing
from .index import Identity, IndexHeader, IndexState, LocalIndex, WalResetRecord, boot_id, changed
from .lineage import local_state
from .page_objects import PageObjects
from .wal_position import PositionStatus, position_of, position_status

__all__ = ["Replicator", "remote_id_of"]

logger = get_logger(__name__)

_LOOKS: Final = 4
_SUSPECT_SECONDS: Final = 2.0


def remote_id_of(config: Config, name: str) -> bytes:
    """Return 16 bytes that identify the history of an index.

    They are a hash of endpoint, bucket and database name.
    """
    return hashlib.sha256("\0".join((config.endpoint, config.bucket, name)).encode()).digest()[:16]


class IndexAdvanced(SnapshotInvalidated):
    """The index has changed because an earlier attempt was adopted.

    Start the batch again.
    """


class Replicator:
    """Write the log of one database.

    The caller must hold the lock of `index`, except for the constructor.

    `on_logged(position)` is called after each stored segment, still under the lock.
    """

    def __init__(
        self,
        config: Config,
        local: LocalDatabase,
        index: LocalIndex,
        history: RemoteLog,
        *,
        on_logged: Callable[[WalPosition | None], None] = lambda position: None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.config = config
        self.local = local
        self.index = index
        self.history = history
        self.remote_id = remote_id_of(config, history.name)
        self.view = PageObjects(config, local, index, history)
        self.on_logged = on_logged
        self.fencing = Fencing(
            local, index, history, self.view, remote_id=self.remote_id, on_logged=lambda position: self.on_logged(position)
        )
        self.on_head: Callable[[int], None] = lambda txid: None
        """Called with the txid of each segment that this process stored.

        It is called under the lock, so it must be quick.
        """
        self._sleep = sleep
        self.is_paused = False
        """Whether nothing is sent before the next commit, not even by a close.

        Set for initial_replication=skip and for a new database.
        """
        self._backfilled: tuple[object, ...] | None = None
        self._suspect: tuple[Identity | None, float] | None = None

    # --- the batch -----------------------------------------------------------------------------------------------------

    def batch(self) -> IndexHeader:
        """Store everything that is committed now, and return the index's header.

        This writes the log, and the page objects as the option `pages` requires.

        Raises:
            FencedError: a second writer has stored a commit; this and all later batches fail.
            FilesLostError: the file at the path is not the one that is open, or it was truncated.
            ReplicationError: the log is stored, but page objects are not; or the local files kept
                changing.
            StoreError, CorruptionError: the log is not stored; everything stays pending.
        """
        if self.fencing.error is not None:
            raise self.fencing.error
        header = self.header()
        for _ in range(100):
            if not self.local.has_content(is_new=header.txid == 0):
                return header
            try:
                if header.in_doubt and (found := self.history.segment(header.txid, header.txid + 1)) is not None:
                    self.fencing.adopt_in_doubt(header, found)
                    raise IndexAdvanced("an earlier attempt was adopted")
                return self._cover()
            except IndexAdvanced:
                header = self.header()
            except SnapshotInvalidated as lost:
                logger.info("%s: %s: looking again", self.local.path, lost)
                header = self.header()
        raise ReplicationError(
            f"the WAL of {self.local.path} kept changing under the replicator", hint="The commit stays pending; see the log."
        )

    def header(self) -> IndexHeader:
        """Return the index's header.

        Raises:
            IndexCorrupt: the index has no header of this history, or the file is to be replaced.
        """
        header = self.index.load()
        if header is None or header.remote_id != self.remote_id or header.index_state is IndexState.BEING_REPLACED:
            raise IndexCorrupt(f"{self.index.path} is missing, damaged, of another history, or of a file that is to be replaced")
        # Another process may have set the flag at its own close; here the database is in use.
        return changed(header, clean=False) if header.clean else header

    def fresh(self) -> IndexHeader:
        """Return a new header over an empty index; it is not saved."""
        self.index.clear()
        failpoint("after clear")
        return self.unknown()

    def unknown(self) -> IndexHeader:
        """Return a header with nothing but its remote id; it is not saved.

        It ignores a WAL reset record that exists already.
        """
        record = self.index.last_reset_record()
        return IndexHeader(self.remote_id, secrets.token_bytes(16), boot_id(), reset_sequence=record.sequence if record is not None else 0)

    def _cover(self) -> IndexHeader:
        for look in range(_LOOKS):
            with self.local.read_transaction():
                header = self.header()
                tip = self.local.tip()
                found = position_status(self.local, header, tip)
                if found in (PositionStatus.CURRENT, PositionStatus.BEHIND):
                    header = self._refresh_identity(header, tip)
                    if header.in_doubt and tip.frames == (header.position.frame if header.position is not None else 0):
                        # An in-doubt attempt may still be stored. Only a put of the present state
                        # shows what the head is.
                        break
                    header, is_done = self._frames(header, tip)
                    if is_done:
                        return self._catch_up(header)
                    break
            if found is PositionStatus.INVALID or look == _LOOKS - 1:
                break
            self._sleep(0.005)
        return self.upload_difference(header)

    def _catch_up(self, header: IndexHeader) -> IndexHeader:
        """Put the page objects that earlier commits have missed.

        Objects of a second writer that has stored a commit since are not overwritten.
        """
        if self.view.has_missed(header):
            self.fencing.require_head(header)
            return self.view.catch_up(header)
        return header

    def _frames(self, header: IndexHeader, tip: WalState) -> tuple[IndexHeader, bool]:
        """Store everything from the position to the tip, commit by commit.

        Returns (header, False) when only a scan can find what changed from there on.
        """
        while header.position is not None and header.position.frame < tip.frames:
            change = stage_frames(self.local, self.index, self.history, header, tip, level=self.config.level)
            if change is None:
                return header, False
            header = self._commit(header, change)
        return header, True

    # --- scans ---------------------------------------------------------------------------------------------------------

    def upload_initial(self, header: IndexHeader) -> IndexHeader:
        """Store the whole database as the segment 0 -> 1.

        Its page objects are put in the background.
        """
        with self._scan() as (record, tip, shape):
            header = header.apply(record)
            return self._commit(header, self._whole(tip, shape, pre=0, post=1), scanned=True, background=True)

    def upload_reset(self, header: IndexHeader) -> IndexHeader:
        """Store the whole database as the next commit, which discards the earlier states.

        Its page objects are put in the background.
        """
        with self._scan() as (record, tip, shape):
            header = header.apply(record)
            change = self._whole(tip, shape, pre=header.txid, post=header.txid + 1, reset=header.txid > 0)
            return self._commit(header, change, scanned=True, background=True)

    def upload_rebased(self, header: IndexHeader) -> IndexHeader:
        """Store the whole database as the segment 0 -> txid of `header`.

        This is the first segment of a new log, and the txids continue. Its page objects are put in
        the background.
        """
        with self._scan() as (record, tip, shape):
            header = header.apply(record)
            return self._commit(header, self._whole(tip, shape, pre=0, post=header.txid), scanned=True, background=True)

    def upload_difference(self, header: IndexHeader) -> IndexHeader:
        """Store the pages that differ from the index as the next commit.

        At txid 0, or if the page size has changed, that is every page.
        """
        with self._scan() as (record, tip, shape):
            header = header.apply(record)
            change: Change | None
            if header.txid == 0:
                change = self._whole(tip, shape, pre=0, post=1)
            elif shape.page_size != header.page_size:
                logger.warning("%s: its page size became %d: the next commit is a reset", self.local.path, shape.page_size)
                change = self._whole(tip, shape, pre=header.txid, post=header.txid + 1, reset=True)
            else:
                change = stage_difference(self.local, self.index, self.history, header, tip, shape, level=self.config.level)
            if change is not None:
                return self._commit(header, change, scanned=True)
            return self._confirm(header, tip, shape)

    @contextlib.contextmanager
    def _scan(self) -> Iterator[tuple[WalResetRecord | None, WalState, DatabaseShape]]:
        """Hold a snapshot of the database for a scan.

        Yields the WAL reset record to apply, the snapshot and its shape.
        """
        # Read the record before the snapshot. Up to here the WAL reset records describe what the
        # snapshot will contain. A later one must be applied.
        record = self.index.last_reset_record()
        with self.local.snapshot() as tip:
            if self.local.wal.header() != tip.header:
                raise SnapshotInvalidated(f"the WAL of {self.local.path} was replaced")
            yield record, tip, self.local.shape(tip)

    def _whole(self, tip: WalState, shape: DatabaseShape, *, pre: int, post: int, reset: bool = False) -> Change:
        return stage_whole(self.local, self.history, tip, shape, pre=pre, post=post, reset=reset, level=self.config.level)

    def _confirm(self, header: IndexHeader, tip: WalState, shape: DatabaseShape) -> IndexHeader:
        """Record that a scan has found no difference: the state at `tip` is the head."""
        # A put would check it; a commit whose state is the head may wait for this.
        self.fencing.require_head_though_unchanged(header)
        header = self.index.confirm(header, position_of(self.local, tip), self.local.path, shape.change_counter)
        self.on_logged(header.position)
        return self._catch_up(header)

    # --- put -----------------------------------------------------------------------------------------------------------

    def _commit(self, header: IndexHeader, change: Change, *, scanned: bool = False, background: bool = False) -> IndexHeader:
        """Store `change` and record it, then put the page objects.

        With `background`, the page objects are left to the background.

        Commits that together changed nothing are stored, too. An earlier attempt may still be
        stored, and a second writer may have stored a commit. Only the put, which competes for the
        next key, proves that the acknowledged state is the head.
        """
        failpoint("before intent")
        header = self.index.add_in_doubt(header, change.post_hash, main=self.local.path, change_counter=change.change_counter)
        failpoint("before put")
        answered_ms = int(self.history.store.now() * 1000)
        now_ms = int(self.history.store.estimate() * 1000)
        edge = SegmentHeader(
            pre=change.pre,
            post=change.post,
            pre_hash=header.state if change.pre else 0,
            post_hash=change.post_hash,
            page_size=change.page_size,
            db_size=change.db_size,
            page_count=change.staged.page_count,
            reset=change.reset,
            view_txid=header.view_complete,
            time_ms=now_ms,
            writer=header.writer[:WRITER_ID_SIZE] + header.in_doubt[-1].attempt.to_bytes(8),
            commits=(CommitRecord(change.post, change.post_hash, now_ms),),
            positions=change.positions,
            body=change.staged.body,
        )
        if edge.body is not None:
            failpoint("after body")
        receipt = self.history.append(edge, change.staged.blocks)
        stored = time.monotonic()
        failpoint("after put")
        if not receipt.created:
            found = self.fencing.stored(edge.pre, edge.post)
            self.fencing.adopt_in_doubt(header, found)
            raise IndexAdvanced("an earlier attempt was adopted")
        date_ms = int(receipt.date * 1000)
        if header.proved_ms and date_ms - header.proved_ms > FENCE_HORIZON_SECONDS * 1000:
            self.fencing.verify_still_head(edge)
        if edge.body is not None and date_ms - answered_ms > FENCE_HORIZON_SECONDS * 1000:
            self.fencing.require_body(edge, edge.body)
        self.fencing.note_stored(edge.post, stored)
        self.on_head(edge.post)
        if scanned:
            header = self.index.scanned(header, change.position, self.local.path)
        else:
            header = changed(header, position=change.position)
        header = self.index.record_segment(
            header, edge, change.pgnos, change.hashes, proved_ms=date_ms, change_counter=change.change_counter
        )
        self.on_logged(header.position)
        if background:
            return self.view.postpone(header)
        return self.view.put(header, change.pages(), guard=lambda: self.fencing.require_recent_head(header))

    def note_pending(self) -> None:
        """Record the state hash of what a close leaves pending.

        By this hash the next open recognises that the file continues from the head. Unlike the
        other methods, this one takes the index's lock itself.
        """
        with self.index.locked():
            header = self.header()
            if (header.txid or header.in_doubt) and not self.is_paused:
                state = local_state(self.local, None).state
                if state != header.state:
                    self.index.add_pending(header, state)

    # --- identity ------------------------------------------------------------------------------------------------------

    def _refresh_identity(self, header: IndexHeader, tip: WalState) -> IndexHeader:
        """Record the change of the main file by checkpoints.

        A change that no checkpoint explains was made by other means than SQLite: scan. A checkpoint
        writes first and updates the wal-index afterwards. A change is therefore suspect only after
        it has stayed unexplained for a while.
        """
        identity = Identity.of(self.local.path)
        if identity == header.identity:
            self._backfilled, self._suspect = tip[:3], None
            return header if header.is_settled else self.index.identify(header, self.local.path)
        if header.identity is not None and self._backfilled == tip[:3]:
            if self._suspect is None or self._suspect[0] != identity:
                self._suspect = (identity, time.monotonic())
                return header
            if time.monotonic() - self._suspect[1] < _SUSPECT_SECONDS:
                return header
            logger.warning("%s was changed by other means than SQLite: scanning", self.local.path)
            header = header.needing_scan()
        if _was_cut(header, identity):
            # A checkpoint truncates the file only if the database has shrunk. Otherwise pages were
            # lost that no frame may hold.
            logger.warning("%s is shorter than it was at txid %d: scanning", self.local.path, header.txid)
            header = header.needing_scan()
        self._backfilled, self._suspect = tip[:3], None
        header = self.index.record_identity(header, self.local.path)
        if header.needs_scan:
            raise SnapshotInvalidated("the main file was changed behind SQLite's back")
        return header


def _was_cut(header: IndexHeader, identity: Identity | None) -> bool:
    """Return whether the main file is shorter than before and than the database.

    Both earlier sizes are those that the index records.
    """
    if header.identity is None or identity is None:
        return False
    return identity.size < min(header.identity.size, header.db_size * header.page_size)
