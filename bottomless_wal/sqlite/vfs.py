"""The VFS `bottomless`: what SQLite does to a main file and its WAL, turned into calls of the database's `CommitListener`.

| SQLite | here |
|---|---|
| opens a main file | `DatabaseOpener.open` brings the file up to date, or refuses |
| COMMIT_PHASETWO of a main file | a commit of whatever kind stands locally, the committer's read lock is still held: `on_commit` |
| WAL hook | the errors that phase two parked are raised; a passive checkpoint, as SQLite's own hook makes it: `on_checkpoint` |
| writes a WAL header, truncates or deletes the WAL | `before_wal_reset` |
| writes the main file in rollback mode, at the switch to WAL | `on_file_rewritten` |
| RESERVED on a main file, journal_mode, locking_mode | refused where a write would slip past the WAL |
| closes a main file | `on_close` |

Where an error may be raised: raising in phase two while another schema of the connection, temp included, is still writing corrupts that
other database for good. So phase two raises only when its schema is the sole one in a write transaction; else the WAL hook, which runs
after all schemas are through, raises it. Until a caller has received an error it is parked (`parked`). Connections of our own are opened
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
_control: Final = apsw.VFSFile.xFileControl  # found once: super() costs as much as the call
_write: Final = apsw.VFSFile.xWrite
_getpid: Final = os.getpid
_now: Final = time.monotonic

_thread = threading.local()

# Connection pointer -> the connection, while it lives. SQLite gives a pointer to a later connection, whose entry replaces the old one.
_opened: dict[int, weakref.ref[apsw.Connection]] = {}


class _MainFile(apsw.VFSFile):
    """A main file. `listener` None: one of our own connections, or a file that is not replicated."""

    _until_cleared: Final = UntilCleared()

    def __init__(self, filename: Any, flags: list[int], listener: CommitListener | None) -> None:
        self._listener = listener
        self._pid = _getpid()
        self._connection = 0
        self._opened_by: Callable[[], apsw.Connection | None] = lambda: None  # see `_find`
        self._converting = False
        self._looked = 0.0  # when this connection last looked whether its files are still in their places
        super().__init__("", filename, flags)
        self._read_only = bool(flags[1] & apsw.SQLITE_OPEN_READONLY)

    def xFileControl(self, op: int, ptr: int) -> bool:
        # Every read begins and ends with several that are none of ours: they go on first.
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
            # SQLite asks for more at the last close, and takes no for an answer; the system's own no would reach the caller as an error.
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
                # A connection is deallocated by the collector, or in the middle of whatever dropped it.
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
                if connection is not None and connection.exec_trace is _refuse:  # else another thread has set its own meanwhile
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
        # With ack=local nobody is told that anything is stored, and a look costs as much as a small commit.
        if self._converting or now - self._looked >= listener.look_seconds:
            self._look(listener)
            self._looked = now  # last: after an error the next commit looks again
        else:
            self._commit(listener)

    def _commit(self, listener: CommitListener) -> None:
        if _getpid() != self._pid:
            _require_process(listener.path, self._pid)
        listener.on_commit()

    def _failed(self, listener: CommitListener, error: BaseException, connection: apsw.Connection | None) -> None:
        """Park the error of a commit. Raise it if no other schema is still writing."""
        if isinstance(error, apsw.Error) and not isinstance(error, BottomlessError):
            # SQLite's own codes must not come out of phase two: BUSY, IOERR and FULL leave a transaction that is neither.
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
            del error  # its traceback has this frame: a cycle, which the reference count would not end

    def _look(self, listener: CommitListener) -> None:
        """A commit, once it is seen that the files are where they should be."""
        if self._has_moved():
            raise main_file_lost(listener.path, "deleted or replaced")
        if self._in_wal_mode(listener.path):
            if not listener.wals.are_in_place():
                raise wal_vanished(listener.path)
            self._commit(listener)
            return
        # A rollback-mode commit: the switch to WAL itself, which writes page 1 past the WAL.
        self._converting = False
        listener.on_file_rewritten()
        if super().xRead(2, 18) != _WAL_VERSION:
            raise ReplicationError(
                f"a transaction was committed to {listener.path} outside WAL mode, after the switch to it had failed",
                hint="It stands locally. Run PRAGMA journal_mode=wal again: what was written then goes with the next commit.",
            )

    def _has_moved(self) -> bool:
        """Is the file at the path another one by now, or none?"""
        answer = ctypes.c_int(0)
        super().xFileControl(apsw.SQLITE_FCNTL_HAS_MOVED, ctypes.addressof(answer))
        return bool(answer.value)

    def _in_wal_mode(self, path: str) -> bool:
        """Without a `-wal` file it can only be the switch to WAL itself, or somebody deleted the file under us."""
        return not self._converting or os.path.exists(path + "-wal")

    def _find(self) -> apsw.Connection | None:
        """Return the connection that has this file open; None while APSW is still opening it."""
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
        """Is this the only schema of its connection that is writing? Then raising here harms nobody."""
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
        # The inherited method syncs while it holds the GIL. The WAL carries no locks: a descriptor of our own is harmless.
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
    """The VFS itself, registered as `name`. `opener` decides which databases are replicated."""

    _until_cleared: Final = UntilCleared()

    def __init__(self, opener: DatabaseOpener, name: str = VFS_NAME) -> None:
        self._opener = opener
        super().__init__(name, "")

    def watch(self, connection: apsw.Connection) -> None:
        """Set the WAL hook of a new connection. To be called for each, of whatever VFS: it may attach a database of this one."""
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
                return  # the WAL stays: it proves itself at the next open
        super().xDelete(name, syncdir)

    def xFullPathname(self, name: str) -> str:
        resolved = os.path.realpath(name)
        _thread.typed = (resolved, name)  # SQLite hands only the resolved name on, to the xOpen that follows in this thread
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
                # The commit stands, and is stored: whatever hinders its checkpoint is none of its business (as in SQLite's own hook).
                logger.debug("checkpoint of %s: %s", schema, error)
            listener = self._opener.find(connection.db_filename(schema))
            if listener is not None:
                listener.on_checkpoint(frames)
        return apsw.SQLITE_OK


class OwnVFS(BottomlessVFS):
    """The VFS of our own connections: what they do to the WAL is seen, and what they commit is not replicated."""

    def _open_main(self, name: Any, flags: list[int]) -> apsw.VFSFile:
        return _MainFile(name, flags, None)


def _require_process(path: str, pid: int) -> None:
    """Refuse the use of a connection that was inherited by a fork. `pid` is the process that has opened it.

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
    """The exec tracer of a connection that is in phase two: SQLite's cache of pages is not in a state for another statement."""
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
        except BottomlessError:  # noqa: TRY203 (from here on it has a traceback, which tells how far it comes)
            raise
        finally:
            del error  # as in `_failed`


os.register_at_fork(after_in_child=parked.clear)
