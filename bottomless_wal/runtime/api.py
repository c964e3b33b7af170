"""Open a replicated database, flush it, and return its status."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import apsw

from ..core.errors import ConfigError
from .connect import VFS_NAME, install, installed_defaults, pending_open
from .preload import load
from .registry import registry
from .replica import Replica
from .status import Status, status_of

if TYPE_CHECKING:
    from ..history.restore import Progress

__all__ = ["Status", "connect", "flush", "register", "status"]

_BUSY_TIMEOUT_MS: Final = 5000


def register(**defaults: object) -> str:
    """Register the VFS `bottomless`, and return its name.

    It may be called again, from any thread. Later defaults replace earlier ones. The modules for
    the defaults' endpoint are loaded now, for a process that drops its privileges after this call.

    Args:
        defaults: options (docs/reference/configuration.md) of every database opened by the VFS.

    Raises:
        ConfigError: an unknown option or a bad value.
    """
    install(defaults)
    load(installed_defaults())
    return VFS_NAME


def connect(
    path: str | os.PathLike[str],
    *,
    page_size: int | None = None,
    progress: Progress | None = None,
    flags: int = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE | apsw.SQLITE_OPEN_URI,
    **options: object,
) -> apsw.Connection:
    """Open a database in WAL mode, replicated.

    The busy timeout is 5 s.

    Args:
        path: the main file, or a `file:` URI.
        page_size: bytes, for a new database. An existing one keeps its page size.
        progress: called with (bytes read, bytes expected) while this call restores the database. An
            error that it raises ends the open.
        flags: SQLite's flags of the open.
        options: the options of this database (docs/reference/configuration.md).

    Raises:
        ConfigError: an unknown option or a bad value.
        ConflictError: local file and remote log diverged.
        StoreError: the bucket cannot be reached.
        RestoreError, CorruptionError: the bucket does not hold a valid log.
    """
    install({})
    text = os.fspath(path)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{text!r} is no UTF-8, which SQLite demands of file names", hint="Rename the file.") from error
    if "\0" in text:
        raise ConfigError(f"{text!r} has a NUL in it, which no file name can have", hint="Give the path of a file.")
    if text in ("", ":memory:") or text.startswith("file::memory:"):
        raise ConfigError(f"{text!r} is no file: there is nothing to replicate", hint="Give a path, or use apsw.Connection for it.")
    with pending_open(options, progress=progress, page_size=None if page_size is None else int(page_size)):
        connection = apsw.Connection(text, flags=flags, vfs=VFS_NAME)
    try:
        connection.set_busy_timeout(_BUSY_TIMEOUT_MS)
        if not connection.readonly("main"):
            if connection.execute("PRAGMA journal_mode").get != "wal":
                connection.execute("PRAGMA journal_mode=wal").fetchall()
    except BaseException:
        connection.close()
        raise
    return connection


def flush(database: apsw.Connection | str | os.PathLike[str], timeout: float | None = None) -> None:
    """Wait until every commit is in the log and the page objects are complete.

    Args:
        database: an open connection (its `main`), or the path of a file open in this process.
        timeout: seconds. None waits as long as it takes.

    Raises:
        ReplicationError: the store failed, or the timeout is over. What is pending stays pending.
        FencedError, ConflictError: this replica has stopped.
        ConfigError: the database is not open here.
    """
    with _borrowed(database) as replica:
        replica.worker.flush(timeout)


def status(database: apsw.Connection | str | os.PathLike[str]) -> Status:
    """Return the status of the replication of `database`. Send nothing.

    Args:
        database: as in `flush`.
    """
    with _borrowed(database) as replica:
        return status_of(replica)


@contextlib.contextmanager
def _borrowed(database: apsw.Connection | str | os.PathLike[str]) -> Iterator[Replica]:
    path = database.db_filename("main") if isinstance(database, apsw.Connection) else os.path.realpath(database)
    replica = registry.borrow(path)
    if replica is None:
        raise ConfigError(f"{path or 'this connection'} is not open through vfs=bottomless in this process", hint="connect() it.")
    try:
        yield replica
    finally:
        registry.release(replica)
