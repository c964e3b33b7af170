"""Keep errors of commits until a caller has received them.

SQLite commits an `INSERT ... RETURNING` when its cursor is reset. If the cursor is deallocated,
an error of that commit goes to `sys.unraisablehook`. An error that is parked for the WAL hook is
lost in the same way if no WAL hook runs. So each error of a commit is kept here, by connection
and file, until a caller has received it. Otherwise the connection's next statement, or its
close, raises it. An error is dropped when its commit has been stored in the meantime.

The traceback of an exception shows whether a caller has received it. If the exception reached
Python code, the outermost frame is that of this code. Otherwise the outermost frame is one of
our VFS, or one that APSW made up for its C code.

No exception is kept alive. Its traceback holds the caller's frames, and these the connection,
which would never be closed. An error of this package reports its own end instead
(`BottomlessError.at_end`). Other exceptions cannot do that. The connection's exec tracer holds
them, where the garbage collector can find the cycle.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any, Final, cast

import apsw

from ..core.errors import BottomlessError, ReplicationError
from ..core.logs import get_logger

__all__ = ["Parked", "clear", "drop_others", "expect", "is_any", "is_received", "park", "take", "waiting"]

logger = get_logger(__name__)

ExecTracer = Callable[[apsw.Cursor, str, Any], bool]

RAISING_MODULE: Final = "bottomless_wal.sqlite.vfs"
"""The module whose frames raise these errors: SQLite calls it."""

_parked: dict[int, dict[str, Parked]] = {}
"""Connection pointer -> path of the file -> the error of its last commit.

Entries are removed with the file, because SQLite reuses pointers.
"""


class Parked:
    """Keep the error of one commit to the file at `path`.

    `is_stored` returns whether that commit has been stored by now.
    """

    def __init__(self, path: str, error: BaseException, is_stored: Callable[[], bool]) -> None:
        self.path = path
        self.is_received = False
        self._is_stored = is_stored
        self._raised: Callable[[], BaseException | None] = lambda: None
        if isinstance(error, BottomlessError):
            self._error: BottomlessError = error.copy()
        else:
            self._error = ReplicationError(
                f"the commit to {path} stands, but the wait until it is stored was ended by {error!r}",
                hint="It is sent in the background.",
                path=path,
            )

    def raised(self, error: BaseException, connection: apsw.Connection | None) -> None:
        """Note that `error` is about to be raised for this commit."""
        if isinstance(error, BottomlessError):
            self._raised = weakref.ref(error)
            error.at_end = self._ended
            return
        tracer = connection.exec_trace if connection is not None else None
        if isinstance(tracer, _Tracer):
            held = _Held(error)
            tracer.held.append(held)
            there = weakref.ref(held)
            self._raised = lambda: found.error if (found := there()) is not None else None
        else:
            self.is_received = True  # cannot be found out

    def _ended(self, error: BaseException) -> None:
        self.is_received = self.is_received or is_received(error)

    def is_due(self) -> bool:
        """Return whether the error still has to be raised.

        No caller has received it, and its commit is still not stored.
        """
        error = self._raised()
        return not (self.is_received or (error is not None and is_received(error)) or self._is_stored())

    def copy(self) -> BottomlessError:
        """Return a new copy of the error, for the WAL hook.

        The hook raises it in the statement that committed.
        """
        return self._error.copy()

    def late_copy(self, what: str) -> BottomlessError:
        """Return a new copy of the error, for a later use of the connection.

        Args:
            what: what happened to this use.
        """
        message = f"an earlier commit of this connection was not acknowledged: {self._error.message}"
        return self._error.copy(message, hint=f"{what} {self._error.hint}".strip())


class _Held:
    """Hold a strong reference, and allow weak references to itself.

    Most exceptions cannot be referred to weakly.
    """

    def __init__(self, error: BaseException) -> None:
        self.error = error


class _Tracer:
    """Raise parked errors at the next statement of a connection.

    This exec tracer ends with that statement. It then calls the application's tracer.
    """

    def __init__(self, before: ExecTracer | None) -> None:
        self._before = before
        self.held: list[_Held] = []

    def __call__(self, source: apsw.Cursor | apsw.Connection, sql: str, bindings: Any) -> bool:
        connection = source if isinstance(source, apsw.Connection) else source.connection
        pointer = connection.sqlite3_pointer()
        if sql.lstrip()[:8].upper() == "ROLLBACK":
            if source is connection:
                # `with connection:` rolls back after its commit has failed. It then raises another
                # error, with ours as the context.
                for parked in waiting(pointer):
                    parked.is_received = True
        else:
            # This frame keeps the tracer alive while APSW still refers to it.
            tracer: object = connection.exec_trace
            if tracer is self:
                connection.exec_trace = self._before
            late = [parked for parked in _parked.pop(pointer, {}).values() if parked.is_due()]
            self.held.clear()
            for other in late[1:]:
                logger.error("also: %s", other.copy())
            if late:
                raise late[0].late_copy("This statement was not executed, the earlier one was.")
        return True if self._before is None else self._before(cast("apsw.Cursor", source), sql, bindings)


def park(pointer: int, parked: Parked) -> None:
    """Keep `parked` for the connection at `pointer`.

    It replaces an earlier error of the same file.
    """
    _parked.setdefault(pointer, {})[parked.path] = parked


def expect(connection: apsw.Connection) -> None:
    """Raise the parked errors of `connection` at its next statement."""
    before: object = connection.exec_trace
    if not isinstance(before, _Tracer):
        connection.exec_trace = _Tracer(cast("ExecTracer | None", before))


def is_any() -> bool:
    """Return whether an error is parked for any connection."""
    return bool(_parked)


def waiting(pointer: int) -> list[Parked]:
    """Return the errors that are parked for the connection at `pointer`."""
    return list(_parked.get(pointer, {}).values())


def take(pointer: int, path: str) -> Parked | None:
    """Remove and return the error that is parked for the file at `path`."""
    of_connection = _parked.get(pointer)
    if of_connection is None:
        return None
    found = of_connection.pop(path, None)
    if not of_connection:
        with contextlib.suppress(KeyError):
            del _parked[pointer]
    return found


def drop_others(pointer: int, raised: Parked) -> None:
    """Log and remove the other errors of the transaction of `raised`.

    The tracer has raised those of earlier transactions before the first statement of this one.
    """
    for other in waiting(pointer):
        if other is not raised:
            take(pointer, other.path)
            logger.error("also, in the same transaction: %s", other.copy())


def clear() -> None:
    """Remove all errors: in the child of a fork they are the parent's."""
    _parked.clear()


def is_received(error: BaseException) -> bool:
    """Return whether `error` has reached Python code beyond our VFS."""
    traceback = error.__traceback__
    if traceback is None:
        return True  # the code that received it has taken the traceback off
    frame = traceback.tb_frame
    return frame.f_globals.get("__name__") != RAISING_MODULE and not frame.f_code.co_filename.endswith(".c")
