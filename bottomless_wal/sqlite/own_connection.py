"""Connections of this package, and the application's connection hooks, which must not run on them.

APSW runs every hook of `apsw.connection_hooks` on every new connection, ours too. A hook of the application that writes would write
through the replicator's connections. So that attribute is replaced by a sequence that holds the application's list, and that an
`OwnConnection` iterates to no effect. It adds the hook of this package, which `run_first` names, in front of the application's.

The attribute is put back when the application has assigned another list: before a connection of ours opens, and when the VFS opens a
main file, for APSW reads the attribute only after that. (Assigned by another thread between that moment and the reading, such a list
is used once.)
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
    """A connection of this package to the file at `path`. It runs no hook and makes no checkpoint of its own accord."""

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
    """The application's hooks, in the very list that it made."""

    def __init__(self, hooks: Iterable[Hook] = ()) -> None:
        super().__init__()
        self.data = hooks if isinstance(hooks, list) else list(hooks)

    def __iter__(self) -> Iterator[Hook]:
        # A signal handler may open a connection of the application while this thread opens one of ours. So each hook is guarded.
        is_opening = getattr(_thread, "opening", False)
        if _first is not None:
            yield _Guarded(_first) if is_opening else _first
        for hook in self.data:
            if hook is not _first:
                yield _Guarded(hook) if is_opening else hook


class _Guarded:
    """A hook that leaves connections of this package alone."""

    def __init__(self, hook: Hook) -> None:
        self._hook: Final = hook

    def __call__(self, connection: apsw.Connection) -> None:
        if not isinstance(connection, OwnConnection):
            self._hook(connection)


def run_first(hook: Hook) -> None:
    """Run `hook` on each connection of the application, before the application's own hooks."""
    global _first
    _first = hook
    keep_hooks()


def keep_hooks() -> None:
    """Put our sequence in the place of a list that the application has assigned to `apsw.connection_hooks`."""
    hooks: object = apsw.connection_hooks
    if not isinstance(hooks, _Hooks):
        # APSW accepts any sequence; its type stub knows lists only.
        apsw.connection_hooks = cast("list[Hook]", _Hooks(cast("list[Hook]", hooks)))
