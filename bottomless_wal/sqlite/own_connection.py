"""Open connections of this package, on which the application's hooks do not run.

APSW runs every hook of `apsw.connection_hooks` on every new connection, including ours. A hook
of the application that writes would write through the replicator's connections. So a sequence
replaces that attribute. It holds the application's list. For an `OwnConnection` its hooks do
nothing. It adds the hook of this package, set by `run_first`, before the application's.

If the application has assigned another list, the sequence is put back. This is done before a
connection of ours opens, and when the VFS opens a main file. APSW reads the attribute only after
that. (A list that another thread assigns between that moment and the reading is used once.)
"""

from __future__ import annotations

import threading
from collections import UserList
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Final, cast

import apsw

__all__ = ["OwnConnection", "keep_hooks", "run_first"]

Hook = Callable[[apsw.Connection], None]
if TYPE_CHECKING:
    _HookList = UserList[Hook]
else:
    _HookList = UserList

_thread = threading.local()
_first: Hook | None = None


class OwnConnection(apsw.Connection):
    """A connection of this package to the file at `path`.

    It runs no hook and no automatic checkpoint.
    """

    def __init__(self, path: str, *, flags: int = apsw.SQLITE_OPEN_READWRITE, vfs: str | None = None) -> None:
        keep_hooks()
        outer = getattr(_thread, "opening", False)
        try:
            _thread.opening = True
            super().__init__(path, flags=flags, vfs=vfs)
        finally:
            _thread.opening = outer
        self.wal_autocheckpoint(0)


class _Hooks(_HookList):
    """The application's hooks, in the same list object that the application made."""

    def __init__(self, hooks: Iterable[Hook] = ()) -> None:
        super().__init__()
        self.data = hooks if isinstance(hooks, list) else list(hooks)

    def __iter__(self) -> Iterator[Hook]:
        # While this thread opens a connection of ours, a signal handler may open one of the
        # application. So each hook is guarded.
        is_opening = getattr(_thread, "opening", False)
        if _first is not None:
            yield _Guarded(_first) if is_opening else _first
        for hook in self.data:
            if hook is not _first:
                yield _Guarded(hook) if is_opening else hook


class _Guarded:
    """A hook that skips connections of this package."""

    def __init__(self, hook: Hook) -> None:
        self._hook: Final = hook

    def __call__(self, connection: apsw.Connection) -> None:
        if not isinstance(connection, OwnConnection):
            self._hook(connection)


def run_first(hook: Hook) -> None:
    """Run `hook` on each connection of the application, before its own hooks."""
    global _first
    _first = hook
    keep_hooks()


def keep_hooks() -> None:
    """Replace a list that the application assigned to `apsw.connection_hooks`.

    The sequence of this module takes its place.
    """
    hooks: object = apsw.connection_hooks
    if not isinstance(hooks, _Hooks):
        # APSW accepts any sequence, but its type stub declares a list.
        apsw.connection_hooks = cast("list[Hook]", _Hooks(cast("list[Hook]", hooks)))
