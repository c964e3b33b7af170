"""What the VFS needs of the code that replicates: two protocols, which `runtime` implements.

    DatabaseOpener   decides whether a main file that SQLite opens is replicated, and finds the listener of one that is open
    CommitListener   one for each replicated database: is called at its commits, WAL resets, checkpoints and closes

The VFS imports nothing of the replication. Every other observer of commits can call a listener in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import apsw

from ..formats.wal import WalHeader
from .open_wals import OpenWals

__all__ = ["CommitListener", "DatabaseOpener"]


class CommitListener(Protocol):
    """The replication of one database. Its methods are called by any thread that uses a connection to it."""

    path: str
    """The main file, with links resolved."""
    look_seconds: float
    """How long a look at the files of a connection is valid: 0 to look at each commit."""
    wals: OpenWals
    """The WAL files that the connections of this process have open. The VFS keeps it."""

    def on_commit(self) -> None:
        """A commit stands locally. May block until it is acknowledged.

        SQLite's write lock is released, and the committer still holds its read lock.

        Raises:
            BottomlessError: the commit is not acknowledged. The local commit stands.
        """

    def on_commit_failed(self, error: BaseException) -> Callable[[], bool]:
        """The commit has ended with `error`, of `on_commit` or of the VFS.

        Returns:
            A function that returns whether the commit has been stored in the meantime.
        """

    def before_wal_reset(self, new: WalHeader | None) -> None:
        """The WAL is about to be restarted with the header `new`, or truncated or deleted (None). SQLite's write lock is held."""

    def on_checkpoint(self, wal_frames: int) -> None:
        """A passive checkpoint has run on a WAL of `wal_frames` frames."""

    def on_file_rewritten(self) -> None:
        """The main file was changed outside the WAL: only a scan of all pages can find what has changed."""

    def on_close(self, *, is_deallocated: bool) -> None:
        """A connection has closed the main file. Each open has one close.

        Args:
            is_deallocated: the connection is being deallocated, at an arbitrary point of the thread's work. The method must not wait then.

        Raises:
            BottomlessError: it was the last close, and commits were lost.
        """


class DatabaseOpener(Protocol):
    """Decides which databases are replicated. Its methods are called by any thread."""

    def open(
        self,
        path: str,
        parameters: Mapping[str, str],
        open_file: Callable[[CommitListener | None], apsw.VFSFile],
        *,
        given_path: str,
        is_writable: bool,
    ) -> apsw.VFSFile:
        """Prepare the main file at `path`, call `open_file` while no other process changes it, and return what that returns.

        If no error is raised, one `on_close` of the listener follows.

        Args:
            path: the main file, with links resolved.
            parameters: of the URI.
            open_file: opens the file for a listener, or for None if the file is not replicated.
            given_path: as the application gave it.
            is_writable: whether SQLite opens the file for writing.

        Raises:
            BottomlessError: the file must not be opened.
        """

    def find(self, path: str) -> CommitListener | None:
        """Return the listener of the main file at `path`, or None if it is not open, or not replicated."""
