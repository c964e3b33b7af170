"""One tree of errors; each says what happened, to which object, and what to do now.

    BottomlessError             everything this package raises on purpose
    ├── ConfigError             an option, a name or a URI that cannot be meant
    ├── StoreError              the store refused, or could not be reached
    │   └── TransientError      ... in a way that may pass: these, and only these, are retried
    ├── ReplicationError        a commit stands locally and is not (wholly) stored: pending
    │   └── FilesLostError      ... in files that are no longer at the database's path
    ├── FencedError             another writer has gone on: this replica has stopped for good
    ├── ConflictError           local file and remote history diverged, and the policy is `error`
    ├── CorruptionError         an object, or a local file, is not what its checksums say
    └── RestoreError            no verified restore is possible: a gap, a missing or a wrong object

All of them are `apsw.SQLError`, so that a statement, an ATTACH or an open that fails for one of these reasons is also caught by
`except apsw.Error`, and SQLite sees plain SQLITE_ERROR: a code such as SQLITE_BUSY or SQLITE_FULL, raised after a local
commit, would leave a transaction that is neither committed nor rolled back.
"""

from __future__ import annotations

from collections.abc import Callable

import apsw

__all__ = [
    "BottomlessError",
    "ConfigError",
    "ConflictError",
    "CorruptionError",
    "FencedError",
    "FilesLostError",
    "ReplicationError",
    "RestoreError",
    "StoreError",
    "TransientError",
]


class BottomlessError(apsw.SQLError):
    """Base of the tree. `message` says what happened and to what; `hint` what to do now (may be empty)."""

    ticket: int = 0
    """The worker's ticket of the commit that this is the error of; 0: of none."""
    at_end: Callable[[BaseException], None] | None = None
    """Called with the error when it is deallocated, while its traceback is still there."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __del__(self) -> None:
        if self.at_end is not None:
            self.at_end(self)

    def __reduce__(self) -> tuple[object, ...]:
        # An error crosses to another process whole, as those of a worker process do.
        return _rebuild, (type(self), self.message, self.hint)

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class ConfigError(BottomlessError):
    """An unknown option, a value that is not allowed, or a name that cannot be stored."""


class StoreError(BottomlessError):
    """The object store refused a request, or could not be reached for `retry_timeout` seconds."""


class TransientError(StoreError):
    """A failure of the store that may pass: a lost connection, a timeout, 5xx, SlowDown. The only kind that is retried."""


class ReplicationError(BottomlessError):
    """The local commit stands but is not (wholly) stored.

    It stays pending: the next commit, `flush()` or the next open sends it. Do not repeat the statement.
    """


class FilesLostError(ReplicationError):
    """The database's file or its WAL was deleted, replaced or truncated under connections that have it open.

    What was committed since stands in files that no open of the path finds.
    """


class FencedError(BottomlessError):
    """Another writer has extended the history: this replica stops, and never overwrites."""


class ConflictError(BottomlessError):
    """The local file is no state of the remote history, and `initial_replication` is `error`. Nothing was changed."""


class CorruptionError(BottomlessError):
    """Bytes that are not what their format or checksum says."""


class RestoreError(BottomlessError):
    """The wanted state cannot be rebuilt, and verified, from what the store holds. No local file was changed."""


def _rebuild(kind: type[BottomlessError], message: str, hint: str) -> BottomlessError:
    return kind(message, hint=hint)
