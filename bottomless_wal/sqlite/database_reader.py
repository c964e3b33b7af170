"""Ask SQLite for the committed end of the WAL, and hold snapshots of the local database.

Two connections of our own stand beside the application's: the *monitor*, asked for the number of committed frames with
`wal_checkpoint(NOOP)`, and the *pin*, whose read transaction keeps the WAL from being restarted under a reader. They are two
because NOOP cannot be asked on a connection that is in a transaction.

The pages themselves are read by `snapshot_reader`.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

import apsw

from ..core.errors import BottomlessError, FilesLostError, ReplicationError
from ..core.logs import get_logger
from .own_connection import OwnConnection
from .snapshot_reader import SnapshotReader, WalState
from .wal_reader import WalFile

__all__ = ["LocalDatabase", "main_file_lost", "wal_vanished"]

logger = get_logger(__name__)

_ASK_AGAIN_SECONDS: Final = 10.0
_QUIET_LOOKS: Final = 200
_VANISHED_LOOKS: Final = 20
_OPEN_AGAIN_SECONDS: Final = 0.5
_UNSOUND: Final = (apsw.NotADBError, apsw.CorruptError)


def main_file_lost(path: str, how: str) -> FilesLostError:
    """Return the error for a main file that was `how` ("deleted or replaced", "truncated") while connections have it open."""
    return FilesLostError.about(
        path,
        f"was {how} while connections have it open: what they committed since the last acknowledged commit is not stored",
        joint=" ",
        path=path,
        hint="If the file was moved, move it back. Else close every connection to it, in all processes, and open the path again: that "
        "restores the state in the bucket, unless the WAL that is left fits the file. So look before you repeat a statement.",
    )


def wal_vanished(path: str) -> FilesLostError:
    """The error for a WAL that was deleted or replaced while connections have it open."""
    return FilesLostError(
        f"the WAL of {path} was deleted or replaced while it was in use: commits stand in a file without a name",
        hint="Close every connection to the database, in all processes, and open it again. What stood in that WAL alone is in the bucket "
        "as far as it was acknowledged.",
    )


class LocalDatabase(SnapshotReader):
    """The database at `path` (resolved), seen from beside.

    `connect` opens a connection of our own to it. Thread-safe where said so; the rest belongs to the holder of the
    replicator's lock.
    """

    def __init__(self, path: str, connect: Callable[[], apsw.Connection], *, sleep: Callable[[float], None] = time.sleep) -> None:
        super().__init__(path)
        self._file: tuple[int, int] | None = None  # (device, inode) of what the application's connections have open
        self._open = connect
        self._sleep = sleep
        self._monitor: apsw.Connection | None = None
        self._monitor_lock = threading.Lock()
        self._asking: set[int] = set()  # threads that hold, or wait for, that lock
        self._pin: apsw.Connection | None = None
        self._pinned = False
        # A descriptor of its own: committers ask for the state of the WAL while the worker reads frames.
        self._tip_wal = WalFile(path + "-wal")

    # --- the files at their places -------------------------------------------------------------------------------------

    def opened(self) -> None:
        """Note which file the application has just opened; its connections keep it until the last of them is closed."""
        found = os.stat(self.path)
        self._file = (found.st_dev, found.st_ino)

    def has_content(self, *, is_new: bool) -> bool:
        """Return whether there is anything to replicate: False only for a new database (`is_new`) that nobody has written to yet.

        Raises:
            FilesLostError: there is no file at the path, another one, or one that was truncated to nothing.
        """
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            raise main_file_lost(self.path, "deleted") from None
        if self._file not in (None, (found.st_dev, found.st_ino)):
            raise main_file_lost(self.path, "replaced")
        if found.st_size:
            return True
        if is_new and not self.tip().frames:
            return False
        raise main_file_lost(self.path, "truncated")

    def is_in_place(self) -> bool:
        """Return whether the file at the path is the one that the application has open, and holds something."""
        try:
            return self.has_content(is_new=True)
        except FilesLostError:
            return False

    # --- the tip -------------------------------------------------------------------------------------------------------

    def tip(self) -> WalState:
        """How far the WAL is committed. Thread-safe.

        Raises:
            ReplicationError: SQLite kept answering BUSY or failed, or this thread is in here already.
            apsw.NotADBError, apsw.CorruptError: the file is not a sound database.
        """
        vanished = 0
        if self.is_asking():
            raise ReplicationError(
                f"the WAL of {self.path} could not be looked at: this thread was interrupted while it did so",
                hint="Ask outside of signal handlers and finalizers.",
            )
        with self._monitoring():
            for _ in range(int(_ASK_AGAIN_SECONDS / 0.0005)):
                before = self._tip_wal.header()
                counts = self._ask()
                if counts is not None and before == self._tip_wal.header():
                    if before is not None or not counts[0]:
                        return WalState(before, *counts)
                    vanished += 1
                    if vanished == _VANISHED_LOOKS:
                        raise wal_vanished(self.path)
                self._sleep(0.0005)
        raise ReplicationError(
            f"the WAL of {self.path} could not be looked at: SQLite stayed busy",
            hint="Another process holds the database in recovery or exclusively; the commit stays pending.",
        )

    def is_asking(self) -> bool:
        """Return whether the running thread is within `tip` of this database.

        Then a second call deadlocks. A signal handler or a finalizer that commits can make one.
        """
        return threading.get_ident() in self._asking

    @contextlib.contextmanager
    def _monitoring(self) -> Iterator[None]:
        """Hold the monitor's lock. The thread is marked before it takes the lock, and until it has let go of it."""
        me = threading.get_ident()
        try:
            self._asking.add(me)
            with self._monitor_lock:
                yield
        finally:
            self._asking.discard(me)

    def _connect(self) -> apsw.Connection:
        """Open a connection of our own.

        Raises:
            ReplicationError: it could not be opened, even after a while. A shortage of file descriptors or memory may pass.
        """
        end = time.monotonic() + _OPEN_AGAIN_SECONDS
        while True:
            try:
                connection = self._open()
                # Ours must never be the close that checkpoints and deletes the WAL while the index is locked: see `close`.
                connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
                return connection
            except _UNSOUND:
                raise
            except apsw.Error as error:
                if isinstance(error, BottomlessError):
                    raise
                if time.monotonic() >= end:
                    raise self._cannot_look(error) from error
                self._sleep(0.02)

    def _cannot_look(self, cause: apsw.Error) -> ReplicationError:
        return ReplicationError.about(
            self.path,
            f"could not be looked at for replication: {cause}",
            joint=" ",
            path=self.path,
            hint="What is committed stays pending. Check the file's permissions, the disk, and the limit of file descriptors.",
        )

    def connect_plain(self) -> apsw.Connection:
        """A connection below our VFS, for what no replication must see; it leaves the WAL alone when it is closed."""
        connection = OwnConnection(self.path)
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        connection.set_busy_timeout(5000)
        return connection

    def _ask(self) -> tuple[int, int] | None:
        """(committed, backfilled) frames; None when SQLite is busy."""
        if self._monitor is None:
            self._monitor = self._connect()
        try:
            frames, backfilled = self._monitor.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_NOOP)
            if frames < 0:
                # A connection that has not yet seen the database in WAL mode says -1: it has to read first.
                self._touch(self._monitor)
                frames, backfilled = self._monitor.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_NOOP)
        except (apsw.BusyError, apsw.LockedError):
            return None
        except apsw.ConnectionClosedError:
            # An application that closes "all connections" of the process closes ours too: open another.
            self._monitor = None
            return None
        except _UNSOUND:
            raise
        except apsw.Error as error:
            if isinstance(error, BottomlessError):
                raise
            raise self._cannot_look(error) from error
        return max(frames, 0), max(backfilled, 0)

    @staticmethod
    def _touch(connection: apsw.Connection) -> None:
        connection.execute("PRAGMA schema_version").fetchall()

    # --- the pin -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def read_transaction(self) -> Iterator[None]:
        """Holds a read transaction: no frame that is committed now is overwritten or outdated in the main file. May be nested."""
        if self._pinned:
            yield
            return
        for attempt in range(int(_ASK_AGAIN_SECONDS / 0.0005)):
            if self._pin is None:
                self._pin = self._connect()
            pin = self._pin
            try:
                pin.execute("BEGIN")
                self._touch(pin)
                break
            except apsw.ConnectionClosedError:
                self._pin = None  # see `_ask`
            except (apsw.BusyError, apsw.LockedError):
                _end(pin)
                logger.debug("%s: busy while pinning (attempt %d)", self.path, attempt + 1)
                self._sleep(0.0005)
            except apsw.Error as error:
                _end(pin)
                if isinstance(error, (*_UNSOUND, BottomlessError)):
                    raise
                raise self._cannot_look(error) from error
        else:
            raise ReplicationError(f"no read transaction on {self.path}: SQLite stayed busy", hint="The commit stays pending.")
        self._pinned = True
        try:
            yield
        finally:
            self._pinned = False
            _end(pin)

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[WalState]:
        """Pins a read transaction whose content is exactly that of the tip it yields.

        The tip is looked at before and after the pin is taken: equal means that nothing was committed in between. Where writers leave
        no such moment, they are held off for one by SQLite's write lock (whose holders never wait for the replicator's).
        """
        for look in range(_QUIET_LOOKS):
            with contextlib.ExitStack() as stack:
                quiet = stack.enter_context(self.no_writers()) if look >= _QUIET_LOOKS // 2 else None
                before = self.tip()
                with self.read_transaction():
                    # Only what is committed counts: a checkpoint may go on beside.
                    if self.tip()[:2] == before[:2] and self.wal.header() == before.header:
                        if quiet is not None:
                            quiet.execute("ROLLBACK")
                        yield before
                        return
        raise ReplicationError(
            f"no moment of quiet on {self.path} to take a snapshot of it", hint="The next commit or flush() tries again."
        )

    @contextlib.contextmanager
    def no_writers(self) -> Iterator[apsw.Connection | None]:
        """Hold SQLite's write lock, if it is to be had in time (None if not)."""
        connection = self._connect()
        try:
            connection.set_busy_timeout(2000)
            try:
                connection.execute("BEGIN IMMEDIATE")
            except (apsw.BusyError, apsw.LockedError):
                yield None
            else:
                yield connection
        finally:
            connection.close()

    # --- the end -------------------------------------------------------------------------------------------------------

    def close(self, *, checkpoint: bool = False) -> None:
        """Closes connections and files. `checkpoint`: if ours is the last connection, it checkpoints and deletes the WAL, as SQLite
        does.

        Everything is let go of, whatever fails. As in SQLite, a WAL that cannot be checkpointed (a full disk) stays, and that is no error.
        """
        main = self._detach()
        pin, self._pin = self._pin, None
        with self._monitoring():
            monitor, self._monitor = self._monitor, None
            with contextlib.ExitStack() as stack:
                # In reverse: the connections last. Whatever one of them raises, the others are closed.
                for connection in (monitor, pin):
                    if connection is not None:
                        stack.callback(self._close_connection, connection, checkpoint=checkpoint)
                if main is not None:
                    stack.callback(main.xClose)
                stack.callback(self._tip_wal.close)
                stack.callback(self.wal.close)

    def _close_connection(self, connection: apsw.Connection, *, checkpoint: bool) -> None:
        try:
            if checkpoint:
                connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 0)
            connection.close()
        except apsw.ConnectionClosedError:
            pass  # an application that closes "all connections" of the process closes ours too
        except apsw.Error as error:
            logger.warning("%s: the WAL was not checkpointed at the close, and goes at the next open: %s", self.path, error)
            with contextlib.suppress(apsw.Error):
                connection.close(True)


def _end(pin: apsw.Connection) -> None:
    """Ends the pin's transaction, if SQLite (or an application that closes all connections) has not done so already."""
    with contextlib.suppress(apsw.ConnectionClosedError):
        if pin.in_transaction:
            pin.execute("ROLLBACK")
