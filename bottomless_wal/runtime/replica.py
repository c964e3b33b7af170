"""One replicated database in this process: its parts, and its life from the first open to the last close.

    first open   boot, under the index's lock until the file is open
    commits      phase two ──► worker
    last close   drained, our connections closed, the index marked clean

Who opens and closes it, and what a fork and an exit do to it, is the `registry`'s.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import urllib.parse
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

import apsw

from ..core.config import Config
from ..core.errors import BottomlessError, ConfigError, FencedError, ReplicationError
from ..core.failpoints import failpoint
from ..core.logs import get_logger
from ..core.threads import has_exited, is_own_thread
from ..formats import keys
from ..formats.wal import WalHeader, WalPosition
from ..history.log import RemoteLog
from ..replication.index import Identity, IndexHeader, LocalIndex
from ..replication.replicator import Replicator
from ..replication.wal_position import write_wal_reset_record
from ..sqlite.checkpointer import RESTART_FRAMES, Checkpointer
from ..sqlite.database_reader import LocalDatabase
from ..sqlite.open_wals import OpenWals
from ..storage import open_store
from .commit_worker import CommitWorker

if TYPE_CHECKING:
    from ..history.restore import Progress
    from ..replication.recovery import Recovery

__all__ = ["INDEX_SUFFIX", "Replica"]

logger = get_logger(__name__)

INDEX_SUFFIX: Final = "-bottomless"
_LOOK_SECONDS: Final = 0.02


class Replica:
    """The database at `path` (resolved), and the `CommitListener` of the connections to it.

    `connect` opens a connection of our own through the VFS. `release` is called with the replica when a connection of the application has
    closed it, and with whether that connection is being deallocated.
    """

    def __init__(
        self, path: str, config: Config, connect: Callable[[str], apsw.Connection], release: Callable[[Replica, bool], None]
    ) -> None:
        from ..replication.log_check import LogCheck  # as in `_boot`
        from .compactor import Compactor

        self.path = path
        self.config = config
        self.name = keys.database_name(config.database_id, path)
        self.pid = os.getpid()
        self.since = time.monotonic()
        self._connect = connect
        self._release = release
        self._local = config.ack == "local"
        self.look_seconds = _LOOK_SECONDS if self._local else 0.0
        self.wals = OpenWals(path)
        self.opens = 0
        self.dropped: deque[None] = deque()
        """One entry for each open that is over and not yet subtracted from `opens`: appending takes no lock."""
        self.closing = False
        self.closed_by: int | None = None
        """The thread that closes it."""
        self._at_work = False  # is it being opened or closed?
        self._closed = False
        self.lifecycle = threading.RLock()
        self.booted = False
        self.store = open_store(config)
        self.history = RemoteLog(self.store, self.name)
        self.local = LocalDatabase(path, lambda: connect(path))
        self.index = LocalIndex(path + INDEX_SUFFIX, beside=path)
        self.replicator = Replicator(config, self.local, self.index, self.history)
        self.checkpointer = Checkpointer(path, lambda: connect(path), local=self._local)
        self.log_check = LogCheck(self.replicator, lambda: LocalDatabase(path, lambda: connect(path)))
        self.upkeep = Compactor(config, self.history, self.log_check)
        self.replicator.on_head = self.upkeep.told
        self.worker = CommitWorker(config, self.replicator, self.index, self.local, self._reboot)

    # --- opening -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def opening(self, *, progress: Progress | None = None, reset: bool = False) -> Iterator[None]:
        """Boots when it is the first time; the index stays locked while the caller opens the file.

        Raises:
            BottomlessError: as `Boot.run`; and ConfigError when nothing can be written beside the file.
        """
        with self.lifecycle:
            if self._at_work:
                raise ConfigError(
                    f"{self.path} is being opened or closed by this very thread",
                    hint="Open no database in a signal handler or a finalizer (__del__, weakref).",
                )
            if self._closed:
                raise ConfigError(f"{self.path} cannot be opened: the interpreter is ending", hint="Open it before the exit.")
            if self.booted:
                yield
                return
            self._at_work = True
            try:
                with self._first_open(progress, reset=reset):
                    yield
            finally:
                self._at_work = False

    @contextlib.contextmanager
    def _first_open(self, progress: Progress | None, *, reset: bool) -> Iterator[None]:
        if self.config.create_bucket:
            self.store.prepare()
        existed = os.path.lexists(self.index.path)
        try:
            self.replicator.view.lock.require_free()
            with self.replicator.view.locked_to_commit(), self.index.locked():
                boot = self._boot(progress)
                header = boot.run(reset=reset)
                if boot.goes_on:
                    self.log_check.at_open(boot.listed, header.txid)
                failpoint("after open")
                yield
                self.local.opened()
                # SQLite may just have created the database.
                self.index.follow()
                self.replicator.view.lock.follow()
            self.booted = True
            self.worker.nudge(header)
            self.upkeep.opened()
        except OSError as error:
            raise ConfigError(f"cannot write beside {self.path}: {error}", hint=_hint(error, self.path)) from error
        finally:
            if not self.booted:
                self._forget(existed)

    def _forget(self, existed: bool) -> None:
        self.local.close()
        self.index.close()
        self.replicator.view.lock.remove()
        if not existed and not os.path.exists(self.path):
            with contextlib.suppress(OSError):
                os.unlink(self.index.path)

    def _reboot(self) -> IndexHeader:
        return self._boot().run()

    def _boot(self, progress: Progress | None = None) -> Recovery:
        from ..replication.recovery import Recovery  # what it takes to restore is loaded when a database is opened, not with the package

        return Recovery(self.replicator, policy=self.config.initial_replication, progress=progress)

    # --- while it is open ----------------------------------------------------------------------------------------------

    def on_commit(self) -> None:
        """Replicate a commit, and wait as `ack` says.

        Raises:
            ReplicationError, FencedError, ConflictError: see `Worker.wait`.
        """
        worker = self.worker
        if has_exited():
            raise worker.shut_down()
        if self._local:
            if not worker.dirty:
                worker.submit(must_run=True)
            # What an outage leaves is sent later; what stands in lost files never is.
            failure = worker.fatal or worker.files_lost
            if failure is not None:
                raise failure.copy()
            return
        sequence = worker.submit()
        try:
            self._wait(sequence)
        except BottomlessError as error:
            error.sequence = sequence
            raise

    def _wait(self, sequence: int) -> None:
        # A signal handler or a finalizer commits in the middle of what its thread was doing.
        if is_own_thread():
            raise self._cannot_wait("it is a thread of the replication")
        if self.local.is_asking():
            raise self._cannot_wait("it was interrupted in the middle of another commit to this database")
        if self.worker.needs_this_thread():
            raise self._cannot_wait("it holds a lock that the replication needs")
        tip = self.local.tip()
        place = WalPosition(tip.header.salt1, tip.header.salt2, tip.frames, 0, 0) if tip.header is not None else None
        try:
            self.worker.wait(sequence, place, for_pages=self.config.ack == "pages")
        except BottomlessError:
            self.checkpointer.ask(tip.frames)
            raise

    def on_commit_failed(self, error: BaseException) -> Callable[[], bool]:
        """Return a function that returns whether the commit that has ended with `error` is stored by now."""
        if isinstance(error, BottomlessError):
            sequence = error.sequence
        else:
            # The wait was ended by Ctrl-C or by a signal handler, perhaps before the commit was submitted.
            sequence = self.worker.submit()
        return lambda: bool(sequence) and self.worker.has_done(sequence)

    def _cannot_wait(self, cause: str) -> ReplicationError:
        return ReplicationError(
            f"the commit to {self.path} stands and is pending: this thread cannot wait for it, because {cause}",
            hint="It is sent in the background. Do not repeat the statement. Commit outside of signal handlers and finalizers, or flush().",
        )

    def on_file_rewritten(self) -> None:
        """Let the next batch scan: the main file was written past the WAL (a switch of the journal mode)."""
        LocalIndex.ask_for_scan(self.index.path)

    def before_wal_reset(self, new: WalHeader | None) -> None:
        """Leave a seal, by which the position is carried across the restart. See `wal_position.seal`."""
        try:
            write_wal_reset_record(self.index.path, self.path, new)
        except OSError as error:
            # Without a seal the position proves nothing, and the next batch scans.
            logger.warning("%s: no seal could be left: %s", self.path, error)

    def on_checkpoint(self, wal_frames: int) -> None:
        """Let the worker look, and the checkpointer, if the WAL is too long."""
        if has_exited():
            return
        self.worker.poke()
        if wal_frames >= RESTART_FRAMES:
            self.checkpointer.ask(wal_frames)

    def on_close(self, *, is_deallocated: bool) -> None:
        """Count one open less; see `Registry.release` and `Registry.hand_over`."""
        self._release(self, is_deallocated)

    # --- closing -------------------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Send what is pending and end the worker. What could not be sent is logged and stays pending."""
        self.worker.stop(drain=True)
        error = self.worker.last_error
        if isinstance(error, FencedError):
            logger.error("%s is closed: %s", self.path, error.message)
        elif error is not None:
            logger.error("%s is closed with commits that are not stored: %s", self.path, error.message)

    def close(self) -> None:
        """After the application's last close: drain, let SQLite check-point and delete the WAL, mark the index clean.

        Whatever fails is logged, and the rest is done all the same: SQLite's own close does not fail either when the disk is full, and
        leaves the WAL to the next open. Ctrl-C ends it; a second call does what is left.

        Raises:
            FilesLostError: after all is closed, if commits of ack=local will never be stored. (With another `ack` each has said so.)
        """
        with self.lifecycle:
            if self._at_work or self._closed:
                return
            self._at_work = True
            was_pending = self._local and self.booted and self.worker.pending
            try:
                if self.booted:
                    self._close_local()
                else:
                    self._try("the upkeep", self.upkeep.stop)  # begun by what a boot had stored before it failed
                self._try("the store", self.store.close)
                self.booted, self._closed = False, True
            finally:
                self._at_work = False
        lost = self.worker.files_lost
        if lost is not None and was_pending:
            raise lost.copy()

    def _close_local(self) -> None:
        drained = self._try("the worker", self.drain)
        self._try("the upkeep", self.upkeep.stop)
        self._try("the checkpoints", self.checkpointer.stop)
        stored = drained and self.worker.last_error is None
        if stored and self.opens > len(self.dropped):
            self._try("the checkpoint", self._leave_nothing_to_do)
        # Nothing was committed here, perhaps: another process has left it, and was killed.
        if not stored and self.worker.fatal is None and self.worker.files_lost is None:
            self._try("the note of what is pending", self.replicator.note_pending)
        failpoint("before close")
        # A WAL copied into a file that was cut to nothing would look like a database; that of another file is not ours to delete.
        self._try("the database", lambda: self.local.close(checkpoint=self.local.is_in_place()))
        failpoint("after close")
        if stored:
            self._try("the index", self._mark_clean)
        self._try("the index", self.index.close)
        self._try("the page view", self.replicator.view.lock.remove)

    def _try(self, what: str, step: Callable[[], None]) -> bool:
        """Does one step of a close; False when it failed."""
        try:
            step()
        except Exception as error:
            expected = isinstance(error, BottomlessError | apsw.Error | OSError)
            logger.warning("%s: closing %s failed: %s", self.path, what, error, exc_info=not expected)
            return False
        return True

    def _leave_nothing_to_do(self) -> None:
        """At exit, while the application's connections are still open: whatever closes them later finds nothing to copy, and leaves
        the main file as the index describes it.

        Not TRUNCATE: a thread that still commits would begin a WAL with random salts (SQLite keeps the count of restarts in each
        connection), and no longer be known as the one that goes on from here.
        """
        try:
            with contextlib.closing(self._connect(self.path)) as connection:
                connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
                connection.execute("PRAGMA schema_version").fetchall()
                connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_FULL)
        except (apsw.BusyError, apsw.LockedError) as error:
            # The application's connections may be busy. The WAL that stays is sound, and the next open looks at it.
            logger.debug("%s: no checkpoint at exit: %s", self.path, error)

    def _mark_clean(self) -> None:
        try:
            with self.index.locked():
                self.index.follow()
                header = self.index.load()
                if header is None:
                    return
                if header.position is not None:
                    # Others have it open, or an exit has left its connections. A WAL proves itself; checkpoints have changed the file.
                    header = self.index.identify(header, self.path)
                # Else it was recorded when the WAL went, under SQLite's lock: a file that is another by now was written to since.
                if not header.needs_scan and header.identity == Identity.of(self.path) is not None:
                    self.index.mark_closed(header)
        except (OSError, ConfigError) as error:
            logger.warning("%s: not marked as cleanly closed: %s", self.path, error)

    def abandon(self) -> None:
        """In the child of a fork: let go of the lock without releasing it for the parent, and close nothing."""
        self.index.abandon()
        self.replicator.view.lock.abandon()


def _hint(error: OSError, path: str) -> str:
    if isinstance(error, PermissionError) and error.filename and os.path.exists(error.filename):
        return f"Give {error.filename} the owner, group and mode of the database, or let its owner open the database once."
    return f"Make the directory writable.{_reading_hint(path)}"


def _reading_hint(path: str) -> str:
    """How to read the database at `path` where nothing can be written.

    SQLite opens a database in WAL mode with `mode=ro` only if its WAL and shared memory exist. With `immutable=1` it ignores the WAL.
    """
    if not os.path.exists(path):
        return ""
    uri = f"file:{urllib.parse.quote(path)}"
    if not os.path.exists(path + "-wal"):
        return f" To read only, open '{uri}?immutable=1' while no program writes to it."
    if not os.path.exists(path + "-shm"):
        return " To read only, copy the file and its -wal to a directory that is writable."
    return f" To read only, open '{uri}?mode=ro'."
