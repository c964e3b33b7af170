"""Define one tree of errors: what happened, to which object, and what to do now.

    BottomlessError             every error that this package raises on purpose
    ├── ConfigError             an option, a name or a URI that is not valid
    ├── StoreError              the store refused a request, or could not be reached
    │   └── TransientError      ... in a way that may pass: only these errors are retried
    ├── ReplicationError        a commit stands locally and is not (wholly) stored: pending
    │   └── FilesLostError      ... in files that are no longer at the database's path
    ├── FencedError             another writer has extended the log: this replica has stopped
    ├── ConflictError           local file and remote log diverged, and the policy is `error`
    ├── CorruptionError         an object, or a local file, does not match its checksums
    └── RestoreError            no verified restore is possible: a gap, a missing or a wrong object

All of them are `apsw.SQLError`. So `except apsw.Error` also catches a statement, an ATTACH or an
open that fails for one of these reasons, and SQLite gets plain SQLITE_ERROR. A code such as
SQLITE_BUSY or SQLITE_FULL, raised after a local commit, would leave a transaction that is neither
committed nor rolled back.

Every error has the attributes below, so that no code has to parse its message. An attribute whose
value is not known is None.

    message    str         what happened, and to which object
    hint       str         what to do now; may be empty
    reason     str         what happened, without the name of the object or of the request that
                           `message` may begin with
    key        str         the key of the object in the store
    other_key  str         the key of a second object, which contradicts the first
    path       str         the local file
    txid       int         the transaction that the error is about: wanted, missing, pending or wrong
    expected   int or str  what the log, the format or the caller requires (a state hash, a number
                           of bytes or pages)
    actual     int or str  what was found instead, in the same unit
    option     str         the option of `connect` with a bad value (ConfigError); `actual` is the value
    status     int         the HTTP status of the store's answer
    code       str         the error code in the store's answer, such as "NoSuchBucket"; without an
                           answer, the name of the client's error ("NoCredentialsError") or of the
                           operating system's ("ENOSPC")

    is_transient  bool     the failure of the store may pass; a StoreError with it was retried until
                           `retry_timeout` was over

An error that is raised because of another one (a ReplicationError because of a StoreError) also
has the attributes of that one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Self, TypedDict, TypeVar, Unpack, overload

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

E = TypeVar("E", bound="BottomlessError")


class Details(TypedDict, total=False):
    """Attributes of an error besides its message and hint. See the module."""

    reason: str
    key: str | None
    other_key: str | None
    path: str | None
    txid: int | None
    expected: int | str | None
    actual: int | str | None
    option: str | None
    status: int | None
    code: str | None
    is_transient: bool


class BottomlessError(apsw.SQLError):
    """Base of the tree. The module describes its attributes."""

    reason: str
    key: str | None = None
    other_key: str | None = None
    path: str | None = None
    txid: int | None = None
    expected: int | str | None = None
    actual: int | str | None = None
    option: str | None = None
    status: int | None = None
    code: str | None = None
    is_transient: bool = False

    sequence: int = 0
    """The worker's ticket of the failed commit. 0: of no commit."""
    at_end: Callable[[BaseException], None] | None = None
    """Called when the error is deallocated, with the error.

    Its traceback still exists then.
    """

    def __init__(self, message: str, *, hint: str = "", **details: Unpack[Details]) -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint
        self.reason = message
        vars(self).update(details)

    @classmethod
    def about(cls, subject: str, reason: str, /, *, joint: str = ": ", hint: str = "", **details: Unpack[Details]) -> Self:
        """Return an error with the message `subject`, `joint` and `reason`.

        `subject` is the object, or the request.
        """
        details.setdefault("reason", reason)
        return cls(f"{subject}{joint}{reason}", hint=hint, **details)

    @property
    def details(self) -> Details:
        """Return the attributes that are known, as arguments for another error.

        Message, hint and reason are not among them.
        """
        found: Any = {name: getattr(self, name) for name in _COPIED if getattr(self, name) != getattr(BottomlessError, name)}
        return found  # type: ignore[no-any-return]

    @overload
    def copy(self, message: str | None = None, *, hint: str | None = None, **changes: Unpack[Details]) -> Self: ...
    @overload
    def copy(self, message: str | None = None, *, kind: type[E], hint: str | None = None, **changes: Unpack[Details]) -> E: ...
    def copy(
        self, message: str | None = None, *, kind: type[BottomlessError] | None = None, hint: str | None = None, **changes: Unpack[Details]
    ) -> BottomlessError:
        """Return a new error with the attributes of this one.

        It was not raised yet, and does not have the cause of this one.

        Args:
            message: the new message. It is the new reason, too, unless `changes` has one.
            kind: the class of the new error, if it differs.
            hint: the new hint.
            changes: attributes that differ.
        """
        details: Details = {**self.details, **changes}
        if message is None:
            message = self.message
            details.setdefault("reason", self.reason)
        return (kind or type(self))(message, hint=self.hint if hint is None else hint, **details)

    def __del__(self) -> None:
        if self.at_end is not None:
            self.at_end(self)

    def __reduce__(self) -> tuple[object, ...]:
        # An error that is pickled, as those of a worker process are, keeps its attributes.
        return _rebuild, (type(self), self.message, self.hint, {**self.details, "reason": self.reason})

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class ConfigError(BottomlessError):
    """An unknown option, or a value or a name that is not allowed."""


class StoreError(BottomlessError):
    """The store refused a request, or could not be reached.

    A store that could not be reached was retried for `retry_timeout` seconds.
    """


class TransientError(StoreError):
    """A failure of the store that may pass. Only these errors are retried.

    Examples are a lost connection, a timeout, 5xx and SlowDown.
    """

    is_transient = True


class ReplicationError(BottomlessError):
    """The local commit stands but is not (wholly) stored.

    It stays pending: the next commit, `flush()` or the next open sends it. Do not repeat the
    statement.
    """


class FilesLostError(ReplicationError):
    """The database's file or its WAL was lost under open connections.

    It was deleted, replaced or truncated. Commits since then are in files that no open of the path
    finds.
    """


class FencedError(BottomlessError):
    """Another writer has extended the log.

    This replica stops, and never overwrites.
    """


class ConflictError(BottomlessError):
    """The local file is not a state of the remote log. Nothing was changed.

    The option `initial_replication` is `error`.
    """


class CorruptionError(BottomlessError):
    """Bytes do not match their format or checksum.

    `key` is the object in the store, or `path` the local file.
    """


class RestoreError(BottomlessError):
    """The requested state cannot be rebuilt and verified from the store.

    No local file was changed.
    """


_COPIED: Final = tuple(name for name in Details.__annotations__ if name != "reason")


def _rebuild(kind: type[BottomlessError], message: str, hint: str, details: Details) -> BottomlessError:
    return kind(message, hint=hint, **details)
