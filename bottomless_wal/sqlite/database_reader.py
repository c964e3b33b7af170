"""The local database read as pages: how much of its WAL is committed, which frame holds a page, and whole snapshots.

Two connections of our own stand beside the application's: the *monitor*, asked for the number of committed frames with
`wal_checkpoint(NOOP)`, and the *pin*, whose read transaction keeps the WAL from being restarted under a reader. They are two
because NOOP cannot be asked on a connection that is in a transaction.

Rules:

* Never read past the wal-index: a frame with the right salts and checksum may have been rolled back.
* The main file is read through a file object of the base VFS, which shares SQLite's POSIX locks: closing any other descriptor
  of it would drop all locks of the process. The `-wal` file carries no locks and is read with `pread`.
* A page of a snapshot is its last frame at or below the tip, else what the main file holds. While the pin is held no
  checkpoint writes a later frame of it into the main file.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import apsw

from ..core.errors import BottomlessError, CorruptionError, FilesLostError, ReplicationError
from ..core.logs import get_logger
from ..formats.page import lock_page
from ..formats.wal import FRAME_HEADER_SIZE, FrameHeader, WalHeader, frame_offset
from .own_connection import OwnConnection
from .wal_reader import FrameMap, WalFile

__all__ = ["DatabaseShape", "LocalDatabase", "SnapshotInvalidated", "WalState", "main_file_lost", "wal_vanished"]

logger = get_logger(__name__)

_READ_BYTES: Final = 256 * 1024
_ASK_AGAIN_SECONDS: Final = 10.0
_QUIET_LOOKS: Final = 200
_VANISHED_LOOKS: Final = 20
_OPEN_AGAIN_SECONDS: Final = 0.5
_UNSOUND: Final = (apsw.NotADBError, apsw.CorruptError)
_BASE_VFS: Final = ""  # the default VFS below ours


class SnapshotInvalidated(Exception):
    """The WAL was restarted, cut or replaced under the reader: what was read is worth nothing, look again."""


class WalState(NamedTuple):
    """The end of the WAL: the header that stands in the file (None: no WAL, or an empty one), the committed frames, and how
    many of them checkpoints have copied to the main file."""

    header: WalHeader | None
    frames: int
    backfilled: int


class DatabaseShape(NamedTuple):
    """Page size in bytes, database size in pages, and page 1's change counter."""

    page_size: int
    db_size: int
    change_counter: int


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


class LocalDatabase:
    """The database at `path` (resolved), seen from beside.

    `connect` opens a connection of our own to it. Thread-safe where said so; the rest belongs to the holder of the
    replicator's lock.
    """

    def __init__(self, path: str, connect: Callable[[], apsw.Connection], *, sleep: Callable[[float], None] = time.sleep) -> None:
        self.path = path
        self._file: tuple[int, int] | None = None  # (device, inode) of what the application's connections have open
        self._open = connect
        self._sleep = sleep
        self._monitor: apsw.Connection | None = None
        self._monitor_lock = threading.Lock()
        self._asking: set[int] = set()  # threads that hold, or wait for, that lock
        self._pin: apsw.Connection | None = None
        self._pinned = False
        self._main: apsw.VFSFile | None = None
        # Two descriptors: committers ask for the tip while the worker reads frames.
        self._tip_wal = WalFile(path + "-wal")
        self.wal = WalFile(path + "-wal")
        self._map: FrameMap | None = None

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

    # --- frames --------------------------------------------------------------------------------------------------------

    def frame_headers(self, header: WalHeader, first: int, last: int) -> Iterator[tuple[int, FrameHeader]]:
        """(frame, its header) from `first` to `last`, both included.

        Raises:
            SnapshotLost: a frame in the range is not of this WAL (any more).
        """
        step = FRAME_HEADER_SIZE + header.page_size
        # Small pages are read through together; of large ones only the headers.
        together = max(1, _READ_BYTES // step) if step <= 8192 else 1
        frame = first
        while frame <= last:
            count = min(together, last - frame + 1)
            length = (count - 1) * step + FRAME_HEADER_SIZE
            data = self.wal.read(length, frame_offset(frame, header.page_size))
            if len(data) < length:
                raise SnapshotInvalidated(f"the WAL of {self.path} ends before frame {frame + count - 1}")
            for at in range(count):
                found = FrameHeader._make(struct.unpack_from(">6I", data, at * step))
                if (found.salt1, found.salt2) != (header.salt1, header.salt2):
                    raise SnapshotInvalidated(f"frame {frame + at} of the WAL of {self.path} is of another WAL")
                yield frame + at, found
            frame += count

    def frame_map(self, header: WalHeader, upto: int) -> FrameMap:
        """The map of the frames 1..upto, kept from call to call and extended. Raises SnapshotLost."""
        known = self._map
        if known is None or known.salts != (header.salt1, header.salt2) or known.upto > upto:
            known = self._map = FrameMap(header)
        for frame, found in self.frame_headers(header, known.upto + 1, upto):
            known.add(found.pgno, frame)
            known.upto = frame
        return known

    def frame_page(self, header: WalHeader, frame: int) -> bytes:
        """The page in frame `frame`. Raises SnapshotLost when the file is shorter."""
        offset = frame_offset(frame, header.page_size) + FRAME_HEADER_SIZE
        data = self.wal.read(header.page_size, offset)
        if len(data) != header.page_size:
            raise SnapshotInvalidated(f"the WAL of {self.path} ends within frame {frame}")
        return data

    def unchanged(self, header: WalHeader) -> bool:
        """Does this very header still stand in the file? A restart writes the header before any frame: if it stands after a
        read, everything read was of its WAL."""
        return self.wal.header() == header

    # --- whole snapshots -----------------------------------------------------------------------------------------------

    def shape(self, tip: WalState) -> DatabaseShape:
        """Page size, size and change counter of the snapshot `tip`. Call it pinned.

        Raises:
            CorruptionError: the main file is no SQLite database, or shorter than its header says.
            SnapshotLost: see `frame_headers`.
        """
        first = self.page(tip, 1, None)
        if first is None or len(first) < 100 or not first.startswith(b"SQLite format 3\0"):
            raise CorruptionError.about(
                self.path, "is not an SQLite database", joint=" ", hint="Open the right file, or move this one away.", path=self.path
            )
        page_size = 65536 if first[16:18] == b"\0\1" else int.from_bytes(first[16:18], "big")
        counter, stated = struct.unpack_from(">II", first, 24)
        if tip.frames and tip.header is not None:
            _, commit = next(iter(self.frame_headers(tip.header, tip.frames, tip.frames)))
            return DatabaseShape(tip.header.page_size, commit.db_size, counter)
        actual = self._main_file().xFileSize() // page_size
        if stated == 0 or counter != struct.unpack_from(">I", first, 92)[0]:
            stated = actual  # a writer older than SQLite 3.7 left the size in the header behind
        if actual < stated:
            raise CorruptionError.about(
                self.path,
                f"is cut short: {actual} pages of the {stated} that its header tells",
                joint=" ",
                path=self.path,
                expected=stated,
                actual=actual,
                hint=f"Restore it: `bottomless-wal restore --force {shlex.quote(self.path)}`.",
            )
        return DatabaseShape(page_size, stated, counter)

    def page(self, tip: WalState, pgno: int, page_size: int | None) -> bytes | None:
        """One page of the snapshot; None past the end of the file. `page_size` None: as its WAL or page 1 says."""
        if tip.header is not None and tip.frames:
            frame = self.frame_map(tip.header, tip.frames).get(pgno)
            if frame:
                return self.frame_page(tip.header, frame)
        main = self._main_file()
        if page_size is None:
            head = main.xRead(100, 0) if main.xFileSize() >= 100 else b""
            if len(head) < 100:
                return None
            page_size = 65536 if head[16:18] == b"\0\1" else int.from_bytes(head[16:18], "big")
            if page_size < 512 or page_size & (page_size - 1):
                return None
        if main.xFileSize() < pgno * page_size:
            return None
        return self._read_main(page_size, (pgno - 1) * page_size)

    def pages(self, tip: WalState, shape: DatabaseShape) -> Iterator[tuple[int, bytes]]:
        """Every (pgno, page) of the snapshot, ascending, but the lock-byte page. Call it pinned.

        Raises:
            CorruptionError: a page is in neither place.
            SnapshotLost: the WAL was restarted meanwhile.
        """
        frames = self.frame_map(tip.header, tip.frames) if tip.header is not None and tip.frames else None
        main = self._main_file()
        main_pages = main.xFileSize() // shape.page_size
        skipped = lock_page(shape.page_size)
        together = max(1, _READ_BYTES // shape.page_size)
        for start in range(1, shape.db_size + 1, together):
            stop = min(start + together, shape.db_size + 1)
            length = (min(stop - 1, main_pages) - start + 1) * shape.page_size
            block = self._read_main(length, (start - 1) * shape.page_size) if length > 0 else b""
            for pgno in range(start, stop):
                if pgno == skipped:
                    continue
                frame = frames.get(pgno) if frames is not None else 0
                if frame and tip.header is not None:
                    yield pgno, self.frame_page(tip.header, frame)
                elif pgno <= main_pages:
                    yield pgno, block[(pgno - start) * shape.page_size : (pgno - start + 1) * shape.page_size]
                else:
                    raise CorruptionError(
                        f"page {pgno} of {self.path} is neither in the file nor in its WAL",
                        hint=f"Restore it: `bottomless-wal restore --force {shlex.quote(self.path)}`.",
                    )

    def _main_file(self) -> apsw.VFSFile:
        if self._main is None:
            self._main = apsw.VFSFile(_BASE_VFS, self.path, [apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_MAIN_DB, 0])
        return self._main

    def _read_main(self, length: int, offset: int) -> bytes:
        return self._main_file().xRead(length, offset)

    # --- the end -------------------------------------------------------------------------------------------------------

    def close(self, *, checkpoint: bool = False) -> None:
        """Closes connections and files. `checkpoint`: if ours is the last connection, it checkpoints and deletes the WAL, as SQLite
        does.

        Everything is let go of, whatever fails. As in SQLite, a WAL that cannot be checkpointed (a full disk) stays, and that is no error.
        """
        self._map = None
        main, self._main = self._main, None
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
