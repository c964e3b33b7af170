"""Provide the VFS `bottomless`, which calls the `CommitListener` of a database.

| SQLite | here |
|---|---|
| opens a main file | `DatabaseOpener.open` brings the file up to date, or refuses |
| COMMIT_PHASETWO of a main file | `on_commit`: any commit stands, its read lock is still held |
| WAL hook | raises the errors that phase two parked |
| WAL hook | runs a passive checkpoint, as SQLite's own hook does: `on_checkpoint` |
| writes a WAL header, truncates or deletes the WAL | `before_wal_reset` |
| writes the main file in rollback mode, at the switch to WAL | `on_file_rewritten` |
| RESERVED on a main file, journal_mode, locking_mode | refused where a write would bypass the WAL |
| closes a main file | `on_close` |

An error must not be raised in phase two while another schema of the connection, temp included,
is still writing. It would corrupt that other database permanently. So phase two raises an error only
if its schema is the only one in a write transaction. Otherwise the WAL hook raises it, which runs
after all schemas have finished.

Until a caller has received an error, it is parked (`parked`). Connections of our own are opened
through a VFS of their own (`OwnVFS`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Final

import apsw

from ..core.errors import BottomlessError, ConfigError, ReplicationError
from ..core.logs import get_logger
from ..core.threads import UntilCleared
from ..formats.wal import WalHeader
from . import parked
from .busy import call_next, queue, sleep
from .checkpointer import AUTOCHECKPOINT_FRAMES
from .database_reader import main_file_lost, wal_vanished
from .listener import CommitListener, DatabaseOpener
from .own_connection import keep_hooks

__all__ = ["VFS_NAME", "BottomlessVFS", "OwnVFS"]

logger = get_logger(__name__)

VFS_NAME: Final = "bottomless"

_WAL_VERSION: Final = b"\x02\x02"  # bytes 18 and 19 of a database in WAL mode

_WATCHED: Final = frozenset({apsw.SQLITE_FCNTL_COMMIT_PHASETWO, apsw.SQLITE_FCNTL_PDB, apsw.SQLITE_FCNTL_PRAGMA})
_control: Final = apsw.VFSFile.xFileControl  # looked up once: super() costs as much as the call
_write: Final = apsw.VFSFile.xWrite
_getpid: Final = os.getpid
_now: Final = time.monotonic

_thread = threading.local()

# Connection pointer -> the connection, until it is deallocated. SQLite reuses a pointer for a later
# connection, whose entry replaces the old one.
_opened: dict[int, weakref.ref[apsw.Connection]] = {}


class _MainFile(apsw.VFSFile):
    """A main file of a database.

    `listener` is None for connections of our own, and for a file that is not replicated.
    """

    _until_cleared: Final = UntilCleared()

    def __init__(self, filename: Any, flags: list[int], listener: CommitListener | None) -> None:
        self._listener = listener
        self._pid = _getpid()
        self._connection = 0
        self._opened_by: Callable[[], apsw.Connection | None] = lambda: None  # see `_find`
        self._converting = False
        self._looked = 0.0  # when this connection last checked that its files are in place
        super().__init__("", filename, flags)
        self._read_only = bool(flags[1] & apsw.SQLITE_OPEN_READONLY)

    def xFileControl(self, op: int, ptr: int) -> bool:
        # Every read begins and ends with several operations that are not handled here: one test
        # passes them on.
        if op in _WATCHED:
            if op == apsw.SQLITE_FCNTL_COMMIT_PHASETWO:
                if self._listener is not None:
                    self._phase_two(self._listener)
            elif op == apsw.SQLITE_FCNTL_PDB:
                self._connection = ctypes.c_void_p.from_address(ptr).value or 0
            elif self._listener is not None:
                self._pragma(apsw.VFSFcntlPragma(ptr))
        return _control(self, op, ptr)

    def xLock(self, level: int) -> None:
        if self._read_only and level > apsw.SQLITE_LOCK_SHARED:
            # At the last close SQLite requests a higher lock, and handles BUSY. An error of the
            # operating system would reach the caller.
            raise apsw.BusyError("opened read-only")
        if level == apsw.SQLITE_LOCK_RESERVED and self._listener is not None:
            _require_process(self._listener.path, self._pid)
            if not self._converting:
                raise ConfigError(
                    f"{self._listener.path} is not in WAL mode: this write would not be replicated",
                    hint="Run PRAGMA journal_mode=wal (for an attached database PRAGMA <schema>.journal_mode=wal) before the first write, "
                    "and page_size before that. If a plain file is meant (VACUUM INTO, ATTACH), name it 'file:...?vfs=unix'.",
                )
        super().xLock(level)

    def xClose(self) -> None:
        late: parked.Parked | None = None
        with self._until_cleared:
            late = parked.take(self._connection, self._listener.path) if self._listener is not None else None
        super().xClose()
        with self._until_cleared:
            listener, self._listener = self._listener, None
            if listener is not None and self._pid == os.getpid():
                opened = _opened.get(self._connection)
                # The garbage collector deallocates a connection, or the code that dropped it, at an
                # arbitrary point.
                listener.on_close(is_deallocated=opened is not None and opened() is None)
            if late is not None and late.is_due():
                raise late.late_copy("The connection is closed.")

    def _phase_two(self, listener: CommitListener) -> None:
        connection = self._find()
        before: Any = None
        try:
            if connection is not None:
                before = connection.exec_trace
                connection.exec_trace = _refuse
            try:
                self._replicate(listener)
            finally:
                if connection is not None and connection.exec_trace is _refuse:  # not if another thread has set its own meanwhile
                    connection.exec_trace = before
        except BaseException as error:  # noqa: BLE001 (raised, or parked)
            self._failed(listener, error, connection)
        else:
            if parked.is_any():
                parked.take(self._connection, listener.path)

    def _replicate(self, listener: CommitListener) -> None:
        if queue:
            call_next()
        now = _now()
        # With ack=local no commit is reported as stored, and this check costs as much as a small
        # commit.
        if self._converting or now - self._looked >= listener.look_seconds:
            self._look(listener)
            self._looked = now  # last: after an error the next commit checks again
        else:
            self._commit(listener)

    def _commit(self, listener: CommitListener) -> None:
        if _getpid() != self._pid:
            _require_process(listener.path, self._pid)
        listener.on_commit()

    def _failed(self, listener: CommitListener, error: BaseException, connection: apsw.Connection | None) -> None:
        """Park the error of a commit, and raise it if no other schema is writing."""
        if isinstance(error, apsw.Error) and not isinstance(error, BottomlessError):
            # Phase two must not raise SQLite's own codes. BUSY, IOERR and FULL leave a transaction
            # that is neither committed nor rolled back.
            error = _not_looked_at(listener.path, error)
        entry = parked.Parked(listener.path, error, listener.on_commit_failed(error))
        parked.park(self._connection, entry)
        if connection is not None:
            parked.expect(connection)
        if not self._alone(connection):
            logger.debug("parked until the WAL hook: %s", error)
            return
        parked.drop_others(self._connection, entry)
        entry.raised(error, connection)
        try:
            raise error
        finally:
            del error  # its traceback has this frame: a cycle, which the reference count would not free

    def _look(self, listener: CommitListener) -> None:
        """Check that the files are in place, and then replicate the commit."""
        if self._has_moved():
            raise main_file_lost(listener.path, "deleted or replaced")
        if self._in_wal_mode(listener.path):
            if not listener.wals.are_in_place():
                raise wal_vanished(listener.path)
            self._commit(listener)
            return
        # A commit in rollback mode: the switch to WAL itself, which writes page 1 outside the WAL.
        self._converting = False
        listener.on_file_rewritten()
        if super().xRead(2, 18) != _WAL_VERSION:
            raise ReplicationError(
                f"a transaction was committed to {listener.path} outside WAL mode, after the switch to it had failed",
                hint="It stands locally. Run PRAGMA journal_mode=wal again: what was written then goes with the next commit.",
            )

    def _has_moved(self) -> bool:
        """Return whether the path has another file by now, or none."""
        answer = ctypes.c_int(0)
        super().xFileControl(apsw.SQLITE_FCNTL_HAS_MOVED, ctypes.addressof(answer))
        return bool(answer.value)

    def _in_wal_mode(self, path: str) -> bool:
        """Return whether the commit was made in WAL mode.

        A commit without a `-wal` file is the switch to WAL itself, or the file was deleted while it
        was open.
        """
        return not self._converting or os.path.exists(path + "-wal")

    def _find(self) -> apsw.Connection | None:
        """Return the connection that has this file open, or None during its open."""
        found = self._opened_by()
        if found is None:
            for connection in apsw.connections():
                with contextlib.suppress(apsw.Error):
                    if connection.sqlite3_pointer() == self._connection:
                        self._opened_by = weakref.ref(connection)
                        return connection
        return found

    @staticmethod
    def _alone(connection: apsw.Connection | None) -> bool:
        """Return whether no other schema of the connection is writing.

        Then an error can be raised here without damage to another database.
        """
        if connection is None:
            return False
        states = [connection.txn_state(name) for name in connection.db_names()]
        return states.count(apsw.SQLITE_TXN_WRITE) <= 1

    def _pragma(self, pragma: apsw.VFSFcntlPragma) -> None:
        name, value = pragma.name.lower(), (pragma.value or "").strip("'\" ").lower()
        if name == "journal_mode" and value:
            if value != "wal":
                raise ConfigError(
                    f"PRAGMA journal_mode={value} is refused: only commits to a WAL are replicated",
                    hint="Leave the database in WAL mode, or open it without vfs=bottomless.",
                )
            self._converting = super().xRead(2, 18) != _WAL_VERSION
        elif name == "locking_mode" and value == "exclusive":
            raise ConfigError(
                "PRAGMA locking_mode=exclusive is refused: it would shut out the connections that replicate",
                hint="Use locking_mode=normal.",
            )


class _WalFile(apsw.VFSFile):
    """The WAL of a replicated database."""

    _until_cleared: Final = UntilCleared()

    def __init__(self, filename: Any, flags: list[int], listener: CommitListener) -> None:
        self._listener = listener
        self._pid = _getpid()
        super().__init__("", filename, flags)
        self._fd = -1
        with contextlib.suppress(OSError):
            self._fd = os.open(listener.path + "-wal", os.O_RDONLY | os.O_CLOEXEC)
            listener.wals.add(id(self), self._fd)

    def xWrite(self, data: bytes, offset: int) -> None:
        if offset == 0 or _getpid() != self._pid:
            _require_process(self._listener.path, self._pid)
            if offset == 0:
                self._listener.before_wal_reset(WalHeader.parse(data))
        _write(self, data, offset)

    def xTruncate(self, size: int) -> None:
        if size == 0:
            _require_process(self._listener.path, self._pid)
            self._listener.before_wal_reset(None)
        super().xTruncate(size)

    def xSync(self, flags: int) -> None:
        # The inherited method syncs while it holds the GIL. The WAL has no POSIX locks, which
        # closing a descriptor of our own would release.
        if self._fd < 0:
            super().xSync(flags)
        else:
            os.fsync(self._fd)

    def xClose(self) -> None:
        with self._until_cleared:
            self._listener.wals.discard(id(self))
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
        super().xClose()


class BottomlessVFS(apsw.VFS):
    """The VFS, registered as `name`.

    `opener` decides which databases are replicated.
    """

    _until_cleared: Final = UntilCleared()

    def __init__(self, opener: DatabaseOpener, name: str = VFS_NAME) -> None:
        self._opener = opener
        super().__init__(name, "")

    def watch(self, connection: apsw.Connection) -> None:
        """Set the WAL hook of a new connection.

        Call it for each connection, whatever its VFS: it may attach a database of this VFS.
        """
        _opened[connection.sqlite3_pointer()] = weakref.ref(connection)
        connection.set_wal_hook(self._wal_hook)

    def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:
        if flags[0] & apsw.SQLITE_OPEN_MAIN_DB and name is not None:
            return self._open_main(name, flags)
        if flags[0] & apsw.SQLITE_OPEN_WAL and name is not None:
            path = name if isinstance(name, str) else name.filename()
            listener = self._opener.find(path.removesuffix("-wal"))
            if listener is not None:
                return _WalFile(name, flags, listener)
        return apsw.VFSFile("", name, flags)

    def xDelete(self, name: str, syncdir: bool) -> None:
        if name.endswith("-wal"):
            is_reported = False
            with self._until_cleared:
                listener = self._opener.find(name.removesuffix("-wal"))
                if listener is not None:
                    listener.before_wal_reset(None)
                is_reported = True
            if not is_reported:
                return  # the WAL stays: its checksums are verified at the next open
        super().xDelete(name, syncdir)

    def xFullPathname(self, name: str) -> str:
        resolved = os.path.realpath(name)
        _thread.typed = (resolved, name)  # for the xOpen that follows in this thread: it gets only the resolved name
        return resolved

    def xSleep(self, microseconds: int) -> int:
        return sleep(microseconds)

    def _open_main(self, name: Any, flags: list[int]) -> apsw.VFSFile:
        keep_hooks()
        path = name if isinstance(name, str) else name.filename()
        parameters = {} if isinstance(name, str) else {key: name.uri_parameter(key) or "" for key in name.parameters}
        resolved, typed = getattr(_thread, "typed", (path, path))
        return self._opener.open(
            path,
            parameters,
            lambda listener: _MainFile(name, flags, listener),
            given_path=typed if resolved == path else path,
            is_writable=bool(flags[0] & apsw.SQLITE_OPEN_READWRITE),
        )

    def _wal_hook(self, connection: apsw.Connection, schema: str, frames: int) -> int:
        if parked.is_any():
            _raise_parked(connection)
        if frames >= AUTOCHECKPOINT_FRAMES:
            try:
                connection.wal_checkpoint(schema, apsw.SQLITE_CHECKPOINT_PASSIVE)
            except apsw.Error as error:
                # The commit stands and is stored, so an error of its checkpoint must not fail it
                # (as in SQLite's own hook).
                logger.debug("checkpoint of %s: %s", schema, error)
            listener = self._opener.find(connection.db_filename(schema))
            if listener is not None:
                listener.on_checkpoint(frames)
        return apsw.SQLITE_OK


class OwnVFS(BottomlessVFS):
    """The VFS of our own connections.

    It reports what they do to the WAL, and does not replicate what they commit.
    """

    def _open_main(self, name: Any, flags: list[int]) -> apsw.VFSFile:
        return _MainFile(name, flags, None)


def _require_process(path: str, pid: int) -> None:
    """Refuse a connection that was inherited by a fork.

    Args:
        path: the main file.
        pid: the process that has opened the connection.

    Raises:
        ReplicationError: this is another process.
    """
    if os.getpid() != pid:
        raise ReplicationError(
            f"this connection to {path} was opened before a fork, by process {pid}",
            hint="Open a connection of its own in each process, after the fork.",
        )


def _not_looked_at(path: str, cause: apsw.Error) -> ReplicationError:
    error = ReplicationError(
        f"the commit to {path} stands, and is not known to be stored: {cause}",
        hint="It stays pending, and is sent in the background. Do not repeat the statement.",
    )
    error.__cause__ = cause
    return error


def _refuse(source: object, sql: str, bindings: object) -> bool:
    """Refuse any statement on a connection that is in phase two.

    This is the connection's exec tracer. SQLite's page cache is not in a state for another
    statement.
    """
    raise apsw.ThreadingViolationError(
        "this connection is in the middle of a commit: a signal handler or a finalizer cannot execute statements on it"
    )


def _raise_parked(connection: apsw.Connection) -> None:
    pointer = connection.sqlite3_pointer()
    waiting = parked.waiting(pointer)
    if waiting and not waiting[0].is_received:
        parked.drop_others(pointer, waiting[0])
        error = waiting[0].copy()
        waiting[0].raised(error, connection)
        try:
            raise error
        except BottomlessError:  # noqa: TRY203 (from here on it has a traceback, which shows how far it gets)
            raise
        finally:
            del error  # as in `_failed`


os.register_at_fork(after_in_child=parked.clear)
