"""The VFS `bottomless`: what SQLite does to a main file and its WAL, turned into calls of the database's replica.

| SQLite | here |
|---|---|
| opens a main file | boot: restore, fast-forward, initial replication; refused when that fails |
| COMMIT_PHASETWO of a main file | a commit of whatever kind stands locally, the committer's read lock is still held: replicate, wait |
| WAL hook | the errors that phase two parked are raised; a passive checkpoint, as SQLite's own hook makes it |
| writes a WAL header, truncates or deletes the WAL | the seal: the position is carried across the restart |
| RESERVED on a main file, journal_mode, locking_mode | refused where a write would slip past the WAL |
| closes a main file | after the last one everything is drained |

Where an error may be raised: raising in phase two while another schema of the connection, temp included, is still writing corrupts that
other database for good. So phase two raises only when its schema is the sole one in a write transaction; else the WAL hook, which runs
after all schemas are through, raises it. Until a caller has received an error it is parked (`parked`). Connections of our own are opened
through a VFS of their own, `bottomless-own`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import apsw

from ..core.config import Config
from ..core.errors import BottomlessError, ConfigError, ReplicationError
from ..core.logs import get_logger
from ..core.threads import UntilCleared
from ..formats.wal import WalHeader
from ..sqlite import parked
from ..sqlite.busy import call_next, queue, sleep
from ..sqlite.checkpointer import AUTOCHECKPOINT_FRAMES
from ..sqlite.database_path import require_free_name, require_same_name
from ..sqlite.database_reader import main_file_lost, wal_vanished
from ..sqlite.own_connection import OwnConnection, keep_hooks, run_first
from .registry import registry
from .replica import Replica

__all__ = ["VFS_NAME", "arguments", "connect_own", "defaults", "install"]

logger = get_logger(__name__)

VFS_NAME: Final = "bottomless"
_OWN_VFS_NAME: Final = "bottomless-own"

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
    """A main file. `replica` None: one of our own connections, or a read-only one."""

    _until_cleared: Final = UntilCleared()

    def __init__(self, filename: Any, flags: list[int], replica: Replica | None) -> None:
        self._replica = replica
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
                if self._replica is not None:
                    self._phase_two(self._replica)
            elif op == apsw.SQLITE_FCNTL_PDB:
                self._connection = ctypes.c_void_p.from_address(ptr).value or 0
            elif self._replica is not None:
                self._pragma(apsw.VFSFcntlPragma(ptr))
        return _control(self, op, ptr)

    def xLock(self, level: int) -> None:
        if self._read_only and level > apsw.SQLITE_LOCK_SHARED:
            # SQLite asks for more at the last close, and takes no for an answer; the system's own no would reach the caller as an error.
            raise apsw.BusyError("opened read-only")
        if level == apsw.SQLITE_LOCK_RESERVED and self._replica is not None:
            self._replica.check_process()
            if not self._converting:
                raise ConfigError(
                    f"{self._replica.path} is not in WAL mode: this write would not be replicated",
                    hint="Run PRAGMA journal_mode=wal (for an attached database PRAGMA <schema>.journal_mode=wal) before the first write, "
                    "and page_size before that. If a plain file is meant (VACUUM INTO, ATTACH), name it 'file:...?vfs=unix'.",
                )
        super().xLock(level)

    def xClose(self) -> None:
        late: parked.Parked | None = None
        with self._until_cleared:
            late = parked.take(self._connection, self._replica.path) if self._replica is not None else None
        super().xClose()
        with self._until_cleared:
            replica, self._replica = self._replica, None
            if replica is not None and replica.pid == os.getpid():
                opened = _opened.get(self._connection)
                if opened is not None and opened() is None:
                    # The connection is deallocated, by the collector or in the middle of whatever dropped it: nothing may be waited for.
                    registry.hand_over(replica)
                else:
                    registry.release(replica)
            if late is not None and late.is_due():
                raise late.late_copy("The connection is closed.")

    def _phase_two(self, replica: Replica) -> None:
        connection = self._find()
        before: Any = None
        try:
            if connection is not None:
                before = connection.exec_trace
                connection.exec_trace = _refuse
            try:
                self._replicate(replica)
            finally:
                if connection is not None and connection.exec_trace is _refuse:  # else another thread has set its own meanwhile
                    connection.exec_trace = before
        except BaseException as error:  # noqa: BLE001 (raised, or parked)
            self._failed(replica, error, connection)
        else:
            if parked.is_any():
                parked.take(self._connection, replica.path)

    def _replicate(self, replica: Replica) -> None:
        if queue:
            call_next()
        now = _now()
        # With ack=local nobody is told that anything is stored, and a look costs as much as a small commit.
        if self._converting or now - self._looked >= replica.look_seconds:
            self._look(replica)
            self._looked = now  # last: after an error the next commit looks again
        else:
            replica.committed()

    def _failed(self, replica: Replica, error: BaseException, connection: apsw.Connection | None) -> None:
        """Park the error of a commit. Raise it if no other schema is still writing."""
        if isinstance(error, apsw.Error) and not isinstance(error, BottomlessError):
            # SQLite's own codes must not come out of phase two: BUSY, IOERR and FULL leave a transaction that is neither.
            error = _not_looked_at(replica.path, error)
        entry = parked.Parked(replica.path, error, replica.storing(error))
        parked.park(self._connection, entry)
        if connection is not None:
            parked.expect(connection)
        if not self._alone(connection):
            logger.debug("parked until the WAL hook: %s", error)
            return
        _drop_others(self._connection, entry)
        entry.raised(error, connection)
        try:
            raise error
        finally:
            del error  # its traceback has this frame: a cycle, which the reference count would not end

    def _look(self, replica: Replica) -> None:
        """A commit, once it is seen that the files are where they should be."""
        if self._has_moved():
            raise main_file_lost(replica.path, "deleted or replaced")
        if self._in_wal_mode(replica):
            if not replica.wal_in_place():
                raise wal_vanished(replica.path)
            replica.committed()
            return
        # A rollback-mode commit: the switch to WAL itself, which writes page 1 past the WAL.
        self._converting = False
        replica.mark_scan()
        if super().xRead(2, 18) != _WAL_VERSION:
            raise ReplicationError(
                f"a transaction was committed to {replica.path} outside WAL mode, after the switch to it had failed",
                hint="It stands locally. Run PRAGMA journal_mode=wal again: what was written then goes with the next commit.",
            )

    def _has_moved(self) -> bool:
        """Is the file at the path another one by now, or none?"""
        answer = ctypes.c_int(0)
        super().xFileControl(apsw.SQLITE_FCNTL_HAS_MOVED, ctypes.addressof(answer))
        return bool(answer.value)

    def _in_wal_mode(self, replica: Replica) -> bool:
        """Without a `-wal` file it can only be the switch to WAL itself, or somebody deleted the file under us."""
        return not self._converting or os.path.exists(replica.path + "-wal")

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

    def __init__(self, filename: Any, flags: list[int], replica: Replica) -> None:
        self._replica = replica
        self._pid = replica.pid
        super().__init__("", filename, flags)
        self._fd = -1
        with contextlib.suppress(OSError):
            self._fd = os.open(replica.path + "-wal", os.O_RDONLY | os.O_CLOEXEC)
            replica.wals[id(self)] = os.fstat(self._fd)[1:3]

    def xWrite(self, data: bytes, offset: int) -> None:
        if offset == 0 or _getpid() != self._pid:
            self._replica.check_process()
            if offset == 0:
                self._replica.seal(WalHeader.parse(data))
        _write(self, data, offset)

    def xTruncate(self, size: int) -> None:
        if size == 0:
            self._replica.check_process()
            self._replica.seal(None)
        super().xTruncate(size)

    def xSync(self, flags: int) -> None:
        # The inherited method syncs while it holds the GIL. The WAL carries no locks: a descriptor of our own is harmless.
        if self._fd < 0:
            super().xSync(flags)
        else:
            os.fsync(self._fd)

    def xClose(self) -> None:
        with self._until_cleared:
            self._replica.wals.pop(id(self), None)
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
        super().xClose()


class _Bottomless(apsw.VFS):
    """The VFS itself. `defaults` are the arguments of `register()`."""

    _until_cleared: Final = UntilCleared()

    def __init__(self, defaults: Mapping[str, object], name: str = VFS_NAME) -> None:
        self.defaults = dict(defaults)
        super().__init__(name, "")

    def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:
        if flags[0] & apsw.SQLITE_OPEN_MAIN_DB and name is not None:
            return self._open_main(name, flags)
        if flags[0] & apsw.SQLITE_OPEN_WAL and name is not None:
            path = name if isinstance(name, str) else name.filename()
            replica = registry.get(path.removesuffix("-wal"))
            if replica is not None:
                return _WalFile(name, flags, replica)
        return apsw.VFSFile("", name, flags)

    def xDelete(self, name: str, syncdir: bool) -> None:
        if name.endswith("-wal"):
            is_sealed = False
            with self._until_cleared:
                replica = registry.get(name.removesuffix("-wal"))
                if replica is not None:
                    replica.check_process()
                    replica.seal(None)
                is_sealed = True
            if not is_sealed:
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
        given = _take_arguments()
        path = name if isinstance(name, str) else name.filename()
        if not flags[0] & apsw.SQLITE_OPEN_READWRITE:
            return _MainFile(name, flags, None)
        parameters = {} if isinstance(name, str) else {key: name.uri_parameter(key) or "" for key in name.parameters}
        if parameters.get("immutable", "0") not in ("0", "no", "false", "off"):
            return _MainFile(name, flags, None)
        config = Config.load(self.defaults, given.options, uri=parameters)
        if os.path.isdir(path):
            raise ConfigError(f"{path} is a directory", hint="Name the database's file.")
        resolved, typed = getattr(_thread, "typed", (path, path))
        require_same_name(typed if resolved == path else path, path)
        require_free_name(path)
        replica = registry.acquire(path, config, connect_own)
        try:
            with replica.opening(progress=given.progress, reset=given.reset):
                file = _MainFile(name, flags, replica)
            _thread.page_size = given.page_size
            return file
        except BaseException:
            registry.release(replica)
            raise


class _Own(_Bottomless):
    """The VFS of our own connections: what they do to the WAL is seen, and what they commit is not replicated."""

    def _open_main(self, name: Any, flags: list[int]) -> apsw.VFSFile:
        return _MainFile(name, flags, None)


_install_lock = threading.RLock()  # a signal handler may open a database while its thread is in `install`
_installed: _Bottomless | None = None
_own: _Own | None = None


def install(defaults: Mapping[str, object]) -> None:
    """Registers the VFS and the connection hook; a second call only merges `defaults` into those it has.

    Raises:
        ConfigError: an option that is not known, or a bad value.
    """
    global _installed, _own
    Config.load(defaults, environ={})
    with _install_lock:
        if _installed is None:
            _own = _Own({}, _OWN_VFS_NAME)
            _installed = _Bottomless({})
            run_first(_on_connect)
        if defaults:
            _installed.defaults = {**_installed.defaults, **defaults}


def defaults() -> dict[str, object]:
    """The defaults that `install` was given so far."""
    return dict(_installed.defaults) if _installed is not None else {}


class _Arguments(NamedTuple):
    """What `connect()` and its relatives ask of the one connection that they open."""

    options: Mapping[str, object] = MappingProxyType({})
    progress: Any = None
    reset: bool = False
    page_size: int | None = None


def _take_arguments() -> _Arguments:
    """The arguments for the file that is being opened. A connection that a hook or a signal handler opens meanwhile gets none."""
    given: _Arguments | None = getattr(_thread, "arguments", None)
    _thread.arguments = None
    return given or _Arguments()


@contextlib.contextmanager
def arguments(
    options: Mapping[str, object], *, progress: object = None, reset: bool = False, page_size: int | None = None
) -> Iterator[None]:
    """While a connection is opened in this thread: the options of `connect()`, between those of `register()` and the URI's."""
    before = getattr(_thread, "arguments", None)
    _thread.arguments = _Arguments(dict(options), progress, reset, page_size)
    try:
        yield
    finally:
        _thread.arguments = before
        _thread.page_size = None


def connect_own(path: str) -> apsw.Connection:
    """A connection of our own to `path`: through the VFS, so that what it does to the WAL is seen, and not replicated itself."""
    return OwnConnection(path, vfs=_OWN_VFS_NAME)


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


def _on_connect(connection: apsw.Connection) -> None:
    _opened[connection.sqlite3_pointer()] = weakref.ref(connection)
    connection.set_wal_hook(_wal_hook)
    page_size, _thread.page_size = getattr(_thread, "page_size", None), None
    if page_size is not None:
        # Before the application's hooks: one that switches to WAL mode makes a new database, with the page size of the moment.
        connection.execute(f"PRAGMA page_size={page_size}")


def _wal_hook(connection: apsw.Connection, schema: str, frames: int) -> int:
    if parked.is_any():
        _raise_parked(connection)
    if frames >= AUTOCHECKPOINT_FRAMES:
        try:
            connection.wal_checkpoint(schema, apsw.SQLITE_CHECKPOINT_PASSIVE)
        except apsw.Error as error:
            # The commit stands, and is stored: whatever hinders its checkpoint is none of its business (as in SQLite's own hook).
            logger.debug("checkpoint of %s: %s", schema, error)
        replica = registry.get(connection.db_filename(schema))
        if replica is not None:
            replica.checkpointed(frames)
    return apsw.SQLITE_OK


def _drop_others(pointer: int, raised: parked.Parked) -> None:
    """Of the errors of one transaction one is raised. The tracer has raised those of earlier ones before its first statement."""
    for other in parked.waiting(pointer):
        if other is not raised:
            parked.take(pointer, other.path)
            logger.error("also, in the same transaction: %s", other.copy())


def _raise_parked(connection: apsw.Connection) -> None:
    pointer = connection.sqlite3_pointer()
    waiting = parked.waiting(pointer)
    if waiting and not waiting[0].is_received:
        _drop_others(pointer, waiting[0])
        error = waiting[0].copy()
        waiting[0].raised(error, connection)
        try:
            raise error
        except BottomlessError:  # noqa: TRY203 (from here on it has a traceback, which tells how far it comes)
            raise
        finally:
            del error  # as in `_failed`


def _after_fork() -> None:
    global _install_lock
    _install_lock = threading.RLock()
    parked.clear()


os.register_at_fork(after_in_child=_after_fork)
