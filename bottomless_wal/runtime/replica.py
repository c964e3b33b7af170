"""Manage one replicated database from its first open to its last close.

    first open   recovery, under the index's lock until the file is open
    commits      COMMIT_PHASETWO ──► commit worker
    last close   drain the worker, close our own connections, mark the index clean

`registry` decides when a replica is opened and closed, and handles forks and the exit.
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
    """Replicate the database at `path`, as the listener of its connections.

    Args:
        path: the main file, with links resolved.
        config: the settings of the database.
        connect: opens a connection of our own through the VFS.
        release: called when a connection of the application has closed the replica. Its arguments
            are the replica, and whether that connection is being deallocated.
    """

    def __init__(
        self, path: str, config: Config, connect: Callable[[str], apsw.Connection], release: Callable[[Replica, bool], None]
    ) -> None:
        from ..replication.log_check import LogCheck  # imported late, as in `_boot`
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
        """One entry for each finished open not yet subtracted from `opens`.

        Appending takes no lock.
        """
        self.closing = False
        self.closed_by: int | None = None
        """The identifier of the thread that closes the replica."""
        self._at_work = False  # whether the replica is being opened or closed
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
        """Recover the database at the first open, and keep the index locked.

        The caller opens the file in the context.

        Raises:
            BottomlessError: as `Recovery.run`.
            ConfigError: no file can be written beside the database.
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
                # SQLite may just have created the database: the files beside it then take its owner and mode.
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
        from ..replication.recovery import Recovery  # loaded at the first open: an import of the package stays short

        return Recovery(self.replicator, policy=self.config.initial_replication, progress=progress)

    # --- while it is open ----------------------------------------------------------------------------------------------

    def on_commit(self) -> None:
        """Submit a commit for replication, and wait according to `ack`.

        Raises:
            ReplicationError, FencedError, ConflictError: see `CommitWorker.wait`.
        """
        worker = self.worker
        if has_exited():
            raise worker.shut_down()
        if self._local:
            if not worker.dirty:
                worker.submit(must_run=True)
            # Commits left by an outage are sent later. Commits in lost files are never sent.
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
        # A signal handler or a finalizer may commit while its thread is inside one of these parts.
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
        """Return a function that returns whether the commit is stored by now.

        Args:
            error: the error that has ended the commit.
        """
        if isinstance(error, BottomlessError):
            sequence = error.sequence
        else:
            # Ctrl-C or a signal handler ended the wait, perhaps before the commit was submitted.
            sequence = self.worker.submit()
        return lambda: bool(sequence) and self.worker.has_done(sequence)

    def _cannot_wait(self, cause: str) -> ReplicationError:
        return ReplicationError(
            f"the commit to {self.path} stands and is pending: this thread cannot wait for it, because {cause}",
            hint="It is sent in the background. Do not repeat the statement. Commit outside of signal handlers and finalizers, or flush().",
        )

    def on_file_rewritten(self) -> None:
        """Request a scan by the next batch.

        The main file was written outside the WAL, by a switch of the journal mode.
        """
        LocalIndex.ask_for_scan(self.index.path)

    def before_wal_reset(self, new: WalHeader | None) -> None:
        """Write a WAL reset record, which carries the position over the reset.

        See `wal_position.write_wal_reset_record`.
        """
        try:
            write_wal_reset_record(self.index.path, self.path, new)
        except OSError as error:
            # Without a WAL reset record the position proves nothing, and the next batch scans.
            logger.warning("%s: no seal could be left: %s", self.path, error)

    def on_checkpoint(self, wal_frames: int) -> None:
        """Wake the worker, and request a checkpoint if the WAL is too long."""
        if has_exited():
            return
        self.worker.poke()
        if wal_frames >= RESTART_FRAMES:
            self.checkpointer.ask(wal_frames)

    def on_close(self, *, is_deallocated: bool) -> None:
        """Count one open less. See `Registry.release` and `Registry.hand_over`."""
        self._release(self, is_deallocated)

    # --- closing -------------------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Send what is pending and stop the worker.

        What could not be sent is logged and stays pending.
        """
        self.worker.stop(drain=True)
        error = self.worker.last_error
        if isinstance(error, FencedError):
            logger.error("%s is closed: %s", self.path, error.message)
        elif error is not None:
            logger.error("%s is closed with commits that are not stored: %s", self.path, error.message)

    def close(self) -> None:
        """Close the replica after the application's last close.

        The worker is drained, SQLite checkpoints and deletes the WAL, and the index is marked clean.

        A step that fails is logged, and the other steps are still done. SQLite's own close behaves the
        same: on a full disk it does not fail, and leaves the WAL to the next open. Ctrl-C ends the
        close, and a second call does the remaining steps.

        Raises:
            FilesLostError: commits of ack=local will never be stored. It is raised after everything is
                closed. With another `ack`, each of these commits has raised it.
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
                    self._try("the upkeep", self.upkeep.stop)  # a recovery that failed may have stored segments, and started the compactor
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
        # The pending commits may be those of another process, which was killed.
        if not stored and self.worker.fatal is None and self.worker.files_lost is None:
            self._try("the note of what is pending", self.replicator.note_pending)
        failpoint("before close")
        # Checkpoint only into the file at the path. A WAL copied into a truncated file would look like a
        # database, and the WAL of another file must not be deleted.
        self._try("the database", lambda: self.local.close(checkpoint=self.local.is_in_place()))
        failpoint("after close")
        if stored:
            self._try("the index", self._mark_clean)
        self._try("the index", self.index.close)
        self._try("the page view", self.replicator.view.lock.remove)

    def _try(self, what: str, step: Callable[[], None]) -> bool:
        """Run one step of a close. Return False if it failed."""
        try:
            step()
        except Exception as error:
            expected = isinstance(error, BottomlessError | apsw.Error | OSError)
            logger.warning("%s: closing %s failed: %s", self.path, what, error, exc_info=not expected)
            return False
        return True

    def _leave_nothing_to_do(self) -> None:
        """Checkpoint at exit, while the application's connections are still open.

        Then a later close of these connections copies no frames. It leaves the main file as the index
        describes it.

        The mode is not TRUNCATE. A thread that still commits would start a WAL with random salts,
        because SQLite keeps the count of restarts in each connection. The position would then not
        recognise that WAL as the successor of this one.
        """
        try:
            with contextlib.closing(self._connect(self.path)) as connection:
                connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
                connection.execute("PRAGMA schema_version").fetchall()
                connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_FULL)
        except (apsw.BusyError, apsw.LockedError) as error:
            # The application's connections may be busy. The WAL that stays is valid, and the next open reads it.
            logger.debug("%s: no checkpoint at exit: %s", self.path, error)

    def _mark_clean(self) -> None:
        try:
            with self.index.locked():
                self.index.follow()
                header = self.index.load()
                if header is None:
                    return
                if header.position is not None:
                    # Another process has the file open, or the exit has left its connections. The WAL proves its own
                    # content, but checkpoints have changed the main file: so its identity is recorded anew.
                    header = self.index.identify(header, self.path)
                # Otherwise the identity was recorded when the WAL was deleted, under SQLite's lock. If the file
                # has another identity by now, it was written to since.
                if not header.needs_scan and header.identity == Identity.of(self.path) is not None:
                    self.index.mark_closed(header)
        except (OSError, ConfigError) as error:
            logger.warning("%s: not marked as cleanly closed: %s", self.path, error)

    def abandon(self) -> None:
        """Drop the lock files in the child of a fork, and close nothing.

        The locks are not released, because they are the parent's.
        """
        self.index.abandon()
        self.replicator.view.lock.abandon()


def _hint(error: OSError, path: str) -> str:
    if isinstance(error, PermissionError) and error.filename and os.path.exists(error.filename):
        return f"Give {error.filename} the owner, group and mode of the database, or let its owner open the database once."
    return f"Make the directory writable.{_reading_hint(path)}"


def _reading_hint(path: str) -> str:
    """Return how to read the database at `path` where no file can be written.

    SQLite opens a database in WAL mode with `mode=ro` only if its WAL and shared memory exist.
    With `immutable=1` it ignores the WAL.
    """
    if not os.path.exists(path):
        return ""
    uri = f"file:{urllib.parse.quote(path)}"
    if not os.path.exists(path + "-wal"):
        return f" To read only, open '{uri}?immutable=1' while no program writes to it."
    if not os.path.exists(path + "-shm"):
        return " To read only, copy the file and its -wal to a directory that is writable."
    return f" To read only, open '{uri}?mode=ro'."
