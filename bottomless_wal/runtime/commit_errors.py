"""The errors that end a commit's wait: each says that the commit stands locally, and when it is sent."""

from __future__ import annotations

from ..core.errors import BottomlessError, ConflictError, FencedError, ReplicationError

__all__ = ["for_another_waiter", "lock_is_held", "not_stored", "shut_down", "unforeseen"]


def shut_down(path: str) -> ReplicationError:
    """Return the error of a commit that no batch will send any more."""
    return ReplicationError(f"the commit to {path} stands, but replication has been shut down", hint="The next open sends it.")


def lock_is_held(path: str, waited: float) -> ReplicationError:
    """Return the error of a commit whose batch has waited `waited` seconds for the index's lock, which another process holds."""
    return ReplicationError(
        f"another process has held the lock of {path} for {waited:.0f} s: the commit stands, and is not stored",
        hint="It is stopped, or uploads something large (with ack=pages, the page view). The commit stays pending, and goes as "
        "soon as it lets go.",
    )


def not_stored(path: str, failure: BottomlessError) -> BottomlessError:
    """Return the error that a committer receives when its batch ended with `failure`."""
    if isinstance(failure, ReplicationError | FencedError | ConflictError):
        return failure
    error = failure.copy(
        f"commits to {path} stand, but are not stored: {failure.message}",
        kind=ReplicationError,
        hint="They stay pending, and are sent with the next commit, flush() or open. Do not repeat the statement. " + failure.hint,
        path=path,
    )
    error.__cause__ = failure
    return error


def unforeseen(path: str, failure: Exception) -> ReplicationError:
    """Return the error of a batch that ended with an exception of no kind that this package raises."""
    error = ReplicationError(
        f"commits to {path} stand, but are not stored: {failure!r}",
        hint="They stay pending. Please report the log of this process.",
    )
    error.__cause__ = failure
    return error


def for_another_waiter(error: BottomlessError | None) -> BottomlessError:
    """Return a copy of a batch's error: one exception raised in several threads would mix up their tracebacks."""
    if error is None:
        raise AssertionError("a commit has failed without an error")
    fresh = error.copy()
    fresh.__cause__ = error.__cause__
    return fresh
