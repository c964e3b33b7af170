"""A lock between processes, on a file that may be deleted or replaced at any time: `flock`, and a look whether it is still the same.

`flock` belongs to an open file description, so that two threads of one object must exclude each other by a mutex. The file of a lock that
nobody holds may be deleted by anyone; a lock on a deleted file would exclude nobody, so whoever has it opens the path anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Iterator

from .logs import get_logger
from .ownership import existing_companion, follow, occupied, open_companion

__all__ = ["FileLock"]

logger = get_logger(__name__)


class FileLock:
    """The lock `path`. The file is created when first locked, with owner, group and mode of the file `beside` it (see `companions`).

    Raises OSError as the system does, and ConfigError when a file of another program is at the path.
    """

    def __init__(self, path: str, *, beside: str) -> None:
        self.path = path
        self._beside = beside
        self._fd = -1
        self._mutex = threading.Lock()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the lock: threads of this object by a mutex, other processes and objects by `flock`. Not re-entrant."""
        with self._mutex:
            while True:
                if self._fd < 0:
                    self._fd = self._open()
                fcntl.flock(self._fd, fcntl.LOCK_EX)
                if self._still_there():
                    break
                # Somebody deleted or replaced the file: a lock on the old one excludes nobody.
                self._drop()
            try:
                yield
            finally:
                fcntl.flock(self._fd, fcntl.LOCK_UN)

    def require_free(self) -> None:
        """Refuse a file of another program at the path, before the lock is needed. Create nothing.

        Raises:
            ConfigError: there is one.
        """
        try:
            fd = existing_companion(self.path)
        except (FileNotFoundError, PermissionError):
            return  # `locked` waits for the mode of a file that is just being created
        try:
            self._require_own(fd)
        finally:
            os.close(fd)

    def follow(self) -> None:
        """Give the file, while it is open, owner, group and mode of the one beside it, which may have been created or changed since."""
        if self._fd >= 0:
            follow(self._fd, self._beside)

    def close(self) -> None:
        """Gives the descriptor back; a later `locked` opens the file again."""
        with self._mutex:
            self._drop()

    def remove(self) -> None:
        """As `close`; the file goes, too, unless somebody holds the lock just now. Whoever has it open finds it gone, and makes it anew."""
        with self._mutex:
            try:
                if self._fd >= 0:
                    fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if self._still_there() and self._is_own(self._fd):
                        os.unlink(self.path)
            except OSError as error:
                logger.debug("%s stays: %s", self.path, error)
            finally:
                self._drop()

    def abandon(self) -> None:
        """For the child of a fork: drops the descriptor without unlocking, for the lock is the parent's too."""
        self._mutex = threading.Lock()
        self._drop()

    def _open(self) -> int:
        fd = open_companion(self.path, self._beside)
        try:
            self._require_own(fd)
            follow(fd, self._beside)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _require_own(self, fd: int) -> None:
        if not self._is_own(fd):
            raise occupied(self.path, "a file of another program")

    def _is_own(self, fd: int) -> bool:
        """Is this a file that this package created? A lock's own file is empty."""
        return os.fstat(fd).st_size == 0

    def _still_there(self) -> bool:
        mine = os.fstat(self._fd)
        try:
            there = os.stat(self.path)
        except FileNotFoundError:
            return False
        return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)

    def _drop(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
