"""Record the WAL files that the connections of this process have open."""

from __future__ import annotations

import os

__all__ = ["OpenWals"]


class OpenWals:
    """Record which file each connection has open as the WAL of one database.

    It takes no lock, because at exit a stopped thread might hold that lock.

    Args:
        path: the main file.
    """

    def __init__(self, path: str) -> None:
        self._path = path + "-wal"
        self._files: dict[int, tuple[int, int]] = {}  # key of the open file -> inode and device

    def add(self, key: int, fd: int) -> None:
        """Record that the WAL is open as the descriptor `fd`.

        Args:
            key: identifies the open file for `discard`.
            fd: its descriptor.
        """
        self._files[key] = os.fstat(fd)[1:3]

    def discard(self, key: int) -> None:
        """Remove the file that was added with `key`, if any."""
        self._files.pop(key, None)

    def are_in_place(self) -> bool:
        """Return whether every connection has open the file at the WAL's path.

        SQLite does not delete the file while a connection has it open.
        """
        try:
            found = os.stat(self._path)[1:3]
        except FileNotFoundError:
            return False
        return all(file == found for file in list(self._files.values()))
