"""Lock a file that may be deleted or replaced at any time, between processes.

`flock` belongs to an open file description, so a mutex must exclude the threads of one object. Any
process may delete the file of a lock that is not held. A lock on a deleted file would exclude no
other process. So a process that gets one opens the path again.
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
    """The lock at `path`, created when it is first locked.

    The file gets the owner, group and mode of the file `beside` it (see `ownership`).

    Raises:
        OSError: as the operating system does.
        ConfigError: a file of another program is at the path.
    """

    def __init__(self, path: str, *, beside: str) -> None:
        self.path = path
        self._beside = beside
        self._fd = -1
        self._mutex = threading.Lock()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock in the context. Not re-entrant.

        A mutex excludes threads of this object, and `flock` other processes and objects.
        """
        with self._mutex:
            while True:
                if self._fd < 0:
                    self._fd = self._open()
                fcntl.flock(self._fd, fcntl.LOCK_EX)
                if self._still_there():
                    break
                # The file was deleted or replaced: a lock on the old one excludes no other process.
                self._drop()
            try:
                yield
            finally:
                fcntl.flock(self._fd, fcntl.LOCK_UN)

    def require_free(self) -> None:
        """Refuse a file of another program at the path. Create nothing.

        Call it before the lock is needed.

        Raises:
            ConfigError: there is such a file.
        """
        try:
            fd = existing_companion(self.path)
        except (FileNotFoundError, PermissionError):
            return  # `locked` waits until a file that is being created has its mode
        try:
            self._require_own(fd)
        finally:
            os.close(fd)

    def follow(self) -> None:
        """Give the open file the owner, group and mode of the one beside it.

        That file may have been created or changed since. If the lock's file is not open, nothing
        is done.
        """
        if self._fd >= 0:
            follow(self._fd, self._beside)

    def close(self) -> None:
        """Close the descriptor. A later `locked` opens the file again."""
        with self._mutex:
            self._drop()

    def remove(self) -> None:
        """Close the descriptor, and delete the file if the lock is free.

        A process that has the file open finds it deleted, and creates it again.
        """
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
        """Close the descriptor in the child of a fork, without unlocking.

        The lock is the parent's, too.
        """
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
        """Return whether this package created the file.

        A lock's own file is empty.
        """
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
