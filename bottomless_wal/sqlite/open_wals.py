"""The WAL files that the connections of this process have open, of one database."""

from __future__ import annotations

import os

__all__ = ["OpenWals"]


class OpenWals:
    """Which file each connection has open as the WAL of the main file at `path`. Takes no lock, at exit a stopped thread might hold it."""

    def __init__(self, path: str) -> None:
        self._path = path + "-wal"
        self._files: dict[int, tuple[int, int]] = {}  # key of the open file -> inode and device

    def add(self, key: int, fd: int) -> None:
        """Note that the WAL is open as `fd`, under a `key` of the caller's."""
        self._files[key] = os.fstat(fd)[1:3]

    def discard(self, key: int) -> None:
        """Forget the file that was added with `key`, if any."""
        self._files.pop(key, None)

    def are_in_place(self) -> bool:
        """Return whether the file at the WAL's path is the one that every connection has open. SQLite does not delete it while one has."""
        try:
            found = os.stat(self._path)[1:3]
        except FileNotFoundError:
            return False
        return all(file == found for file in list(self._files.values()))
