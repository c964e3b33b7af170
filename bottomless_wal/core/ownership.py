"""Give the files beside a database its owner, group and mode.

    open_companion   opens the index or a lock file; creates it when it is missing
    follow           gives an open file the owner, group and mode of the database
    succeed          gives a restored file those of the file that it is about to replace

SQLite does the same for `-wal` and `-shm`. The mode is exactly that of the database, whatever the
umask. Only root can give a file to another owner. A member of a group can give a file to that
group. A new file beside a missing database has the mode that SQLite gives to a new database:
0644, less the umask.
"""

from __future__ import annotations

import os
import stat
import threading
import time
from typing import Final

from .errors import ConfigError
from .logs import get_logger

__all__ = ["existing_companion", "follow", "occupied", "open_companion", "succeed"]

logger = get_logger(__name__)

_NEW_MODE: Final = 0o644
_FLAGS: Final = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # a FIFO at the path must not block the open
_DENIALS: Final = 20
_DENIED_SECONDS: Final = 0.005


def occupied(path: str, what: str) -> ConfigError:
    """Return the error for a path that is occupied. `what` describes by what."""
    return ConfigError(
        f"{path} is {what}: bottomless-wal needs this name for a file of its own beside the database",
        hint="Move it away, or rename the database.",
    )


def open_companion(path: str, database: str) -> int:
    """Open the file at `path`, beside `database`, for reading and writing.

    It is created when it is missing.

    Raises:
        ConfigError: something other than a regular file is at the path.
        OSError: as the operating system does.
    """
    denials = 0
    while True:
        try:
            return existing_companion(path)
        except FileNotFoundError:
            pass
        except PermissionError:
            # Another process may have created the file, and not yet set its mode.
            denials += 1
            if denials > _DENIALS:
                raise
            time.sleep(_DENIED_SECONDS)
            continue
        try:
            # O_CREAT without O_EXCL is refused, even to root, for a file of another user in a
            # sticky directory (fs.protected_regular).
            return os.open(path, _FLAGS | os.O_CREAT | os.O_EXCL, _mode_beside(database))
        except FileExistsError:
            continue


def existing_companion(path: str) -> int:
    """Open the existing file at `path` for reading and writing.

    Raises:
        ConfigError: something other than a regular file is at the path.
        FileNotFoundError: nothing is at the path.
        OSError: as the operating system does.
    """
    try:
        fd = os.open(path, _FLAGS)
    except FileNotFoundError:
        raise
    except OSError as error:
        kind = _kind(os.lstat(path).st_mode)
        if kind:
            raise occupied(path, kind) from error
        raise
    kind = _kind(os.fstat(fd).st_mode)
    if kind:
        os.close(fd)
        raise occupied(path, kind)
    return fd


def follow(fd: int, database: str) -> None:
    """Give the open file the owner, group and mode of the file `database`.

    This is done if there is such a file, and as far as this process has the permission.
    """
    mine = os.fstat(fd)
    try:
        wanted = os.stat(database)
    except FileNotFoundError:
        return
    # An attacker may have placed a hard link. Root must not give away, or open up, a file that has
    # another name elsewhere.
    if mine.st_nlink == 1:
        _adopt_in_doubt(fd, mine, wanted)


def succeed(fd: int, path: str) -> None:
    """Give the open file the owner, group and mode of the file at `path`.

    The open file is about to be renamed to `path`. If there is no file at `path`, it gets the mode
    that SQLite gives to a new database. An owner or a group that cannot be kept is logged as a
    warning.
    """
    try:
        wanted = os.stat(path)
    except FileNotFoundError:
        os.fchmod(fd, _NEW_MODE & ~_umask())
        return
    _adopt_in_doubt(fd, os.fstat(fd), wanted)
    now = os.fstat(fd)
    if (now.st_uid, now.st_gid) != (wanted.st_uid, wanted.st_gid):
        logger.warning(
            "%s belonged to user %d and group %d, and its new file belongs to user %d and group %d: only root can keep another owner. "
            "Give it back with chown, or run restores as its owner.",
            path, wanted.st_uid, wanted.st_gid, now.st_uid, now.st_gid,
        )  # fmt: skip


def _adopt_in_doubt(fd: int, mine: os.stat_result, wanted: os.stat_result) -> None:
    if (mine.st_uid, mine.st_gid) != (wanted.st_uid, wanted.st_gid) and not _chown(fd, wanted.st_uid, wanted.st_gid):
        _chown(fd, -1, wanted.st_gid)
    mode = stat.S_IMODE(wanted.st_mode) & 0o777
    if stat.S_IMODE(os.fstat(fd).st_mode) != mode:
        try:
            os.fchmod(fd, mode)
        except OSError as error:
            logger.debug("mode %o not set: %s", mode, error)  # a file of another user, or a file system without modes


def _chown(fd: int, uid: int, gid: int) -> bool:
    try:
        os.fchown(fd, uid, gid)
    except OSError as error:
        logger.debug("owner %d and group %d not set: %s", uid, gid, error)
        return False
    return True


def _mode_beside(database: str) -> int:
    try:
        return os.stat(database).st_mode & 0o777
    except FileNotFoundError:
        return _NEW_MODE


def _kind(mode: int) -> str:
    """Return what a file is, or an empty text for a regular file."""
    if stat.S_ISREG(mode):
        return ""
    if stat.S_ISDIR(mode):
        return "a directory"
    return "a symbolic link" if stat.S_ISLNK(mode) else "not a regular file"


_asking = threading.Lock()


def _umask() -> int:
    """Return the umask.

    Where `/proc` does not contain it, the umask is changed for a moment to read it. Only one thread
    does so at a time, because otherwise the changed umask could stay.
    """
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("Umask:"):
                    return int(line.split()[1], 8)
    except OSError as error:
        logger.debug("no /proc/self/status: %s", error)
    with _asking:
        current = os.umask(0o077)
        os.umask(current)
        return current
