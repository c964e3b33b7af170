"""Put a verified file in the place of a database that no connection has open.

No file of the old database is left beside it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator

import apsw

from ..core.errors import ConflictError
from ..core.failpoints import failpoint
from ..core.logs import get_logger
from ..core.ownership import succeed

__all__ = ["exclusive_access", "open_elsewhere", "quarantine_sidecar_files", "replace_atomically"]

logger = get_logger(__name__)


def open_elsewhere(path: str) -> ConflictError:
    return ConflictError(
        f"{path} has to be replaced by the state in the bucket, and is open elsewhere",
        hint="Close every connection to it, in all processes, and open it again.",
    )


@contextlib.contextmanager
def exclusive_access(path: str) -> Iterator[None]:
    """Hold SQLite's exclusive lock on the file at `path`, if there is one.

    The file is replaced in the context.

    Raises:
        ConflictError: a connection, of any process, has the file open.
    """
    if not os.path.exists(path):
        yield
        return
    file = apsw.VFSFile("", path, [apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_MAIN_DB, 0])
    try:
        try:
            file.xLock(apsw.SQLITE_LOCK_SHARED)
            file.xLock(apsw.SQLITE_LOCK_EXCLUSIVE)
        except apsw.BusyError as error:
            raise open_elsewhere(path) from error
        try:
            yield
        finally:
            file.xUnlock(apsw.SQLITE_LOCK_NONE)
    finally:
        file.xClose()


def quarantine_sidecar_files(path: str) -> None:
    """Rename the WAL and the journal that an earlier file at `path` has left.

    Beside a restored file a stale WAL would silently open the old database.
    """
    for ending in ("-wal", "-journal"):
        # Also a symbolic link, whatever its target: SQLite would write its WAL through it.
        if os.path.lexists(path + ending) and os.lstat(path + ending).st_size == 0:
            os.unlink(path + ending)
        if os.path.lexists(path + ending):
            target = f"{path}{ending}-stale-{secrets.token_hex(4)}"
            logger.warning("%s belongs to no database: renamed to %s", path + ending, target)
            os.rename(path + ending, target)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path + "-shm")


def replace_atomically(temporary: str, fd: int, path: str) -> None:
    """Rename the complete and synced file `temporary` to `path`.

    Call it inside `exclusive_access`. The file gets the owner, group and mode of the file that it
    replaces, or those that SQLite gives a new one.

    Args:
        temporary: the path of the new file.
        fd: its open descriptor.
        path: the main file of the database.
    """
    succeed(fd, path)
    quarantine_sidecar_files(path)
    failpoint("before rename")
    os.rename(temporary, path)
    _sync_directory(path)
    failpoint("after rename")


def _sync_directory(path: str) -> None:
    fd = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
