"""Define the protocols between the VFS and the replication.

    DatabaseOpener   decides whether a main file that SQLite opens is replicated, and finds the
                     listener of an open one
    CommitListener   one for each replicated database; is called at its commits, WAL resets,
                     checkpoints and closes

`runtime` implements both. The VFS imports nothing of the replication. Another observer of
commits can call a listener in the VFS's place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import apsw

from ..formats.wal import WalHeader
from .open_wals import OpenWals

__all__ = ["CommitListener", "DatabaseOpener"]


class CommitListener(Protocol):
    """The replication of one database.

    Its methods are called by any thread that uses a connection to it.
    """

    path: str
    """The main file, with links resolved."""
    look_seconds: float
    """How many seconds a check of a connection's files is valid.

    0: check at each commit.
    """
    wals: OpenWals
    """The WAL files that this process's connections have open.

    The VFS maintains it.
    """

    def on_commit(self) -> None:
        """Replicate a commit that stands locally.

        The method may block until the commit is acknowledged. SQLite's write lock is released, and
        the committer still holds its read lock.

        Raises:
            BottomlessError: the commit is not acknowledged. The local commit stands.
        """

    def on_commit_failed(self, error: BaseException) -> Callable[[], bool]:
        """Note that the commit has ended with `error`.

        The error is from `on_commit` or from the VFS.

        Returns:
            A function that returns whether the commit has been stored in the meantime.
        """

    def before_wal_reset(self, new: WalHeader | None) -> None:
        """Prepare for the restart, truncation or deletion of the WAL.

        SQLite's write lock is held.

        Args:
            new: the header of the restarted WAL. None if the WAL is truncated or deleted.
        """

    def on_checkpoint(self, wal_frames: int) -> None:
        """Note that a passive checkpoint has run on a WAL of `wal_frames` frames."""

    def on_file_rewritten(self) -> None:
        """Note that the main file was changed outside the WAL.

        Only a scan of all pages can find the changes.
        """

    def on_close(self, *, is_deallocated: bool) -> None:
        """Note that a connection has closed the main file.

        Each open has one close.

        Args:
            is_deallocated: whether the connection is being deallocated, at any point of the thread's
                work. Then the method must not wait.

        Raises:
            BottomlessError: it was the last close, and commits were lost.
        """


class DatabaseOpener(Protocol):
    """Decide which databases are replicated.

    Its methods are called by any thread.
    """

    def open(
        self,
        path: str,
        parameters: Mapping[str, str],
        open_file: Callable[[CommitListener | None], apsw.VFSFile],
        *,
        given_path: str,
        is_writable: bool,
    ) -> apsw.VFSFile:
        """Prepare the main file at `path`, and return what `open_file` returns.

        `open_file` is called while no other process changes the file. If no error is raised, one
        `on_close` of the listener follows.

        Args:
            path: the main file, with links resolved.
            parameters: the parameters of the URI.
            open_file: opens the file for a listener, or for None if the file is not replicated.
            given_path: the path as the application gave it.
            is_writable: whether SQLite opens the file for writing.

        Raises:
            BottomlessError: the file must not be opened.
        """

    def find(self, path: str) -> CommitListener | None:
        """Return the listener of the main file at `path`, or None.

        None: the file is not open, or not replicated.
        """
