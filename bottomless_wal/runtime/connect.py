"""Install the VFS `bottomless`, and open databases through it.

install        registers the VFS, its sibling for connections of our own, and this package's
               connection hook
pending_open   passes the arguments of `connect()` to the one connection that it opens, because
               SQLite's open has no arguments for them
_Opener        is the `DatabaseOpener` of the VFS: finds the options, acquires the replica, and
               brings the file up to date
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Final

import apsw

from ..core.config import Config
from ..core.errors import ConfigError
from ..sqlite.database_path import require_free_name, require_same_name
from ..sqlite.listener import CommitListener
from ..sqlite.own_connection import OwnConnection, run_first
from ..sqlite.vfs import VFS_NAME, BottomlessVFS, OwnVFS
from .registry import registry
from .replica import Replica

if TYPE_CHECKING:
    from ..history.restore import Progress

__all__ = ["VFS_NAME", "PendingOpen", "connect_own", "install", "installed_defaults", "pending_open"]

_OWN_VFS_NAME: Final = "bottomless-own"


class _Stage(Enum):
    """The progress of a `PendingOpen`."""

    WAITING = "its main file is not opened yet"
    OPENING = "its main file is being opened"
    OPENED = "its main file is open, its connection hook has not run yet"
    DONE = "nothing is left to apply"


class PendingOpen:
    """The arguments of `connect()` and similar functions, for one connection.

    Only that connection gets them, at most once. A connection that a hook or a signal handler
    opens meanwhile does not.
    """

    def __init__(
        self,
        options: Mapping[str, object],
        *,
        progress: Progress | None = None,
        reset: bool = False,
        page_size: int | None = None,
    ) -> None:
        self.options = options
        self.progress = progress
        self.reset = reset
        self.page_size = page_size
        self.stage = _Stage.WAITING


_thread = threading.local()  # `pending`: the PendingOpen of the thread, if any
_NOTHING_ASKED: Final[Mapping[str, object]] = {}


def _take(stage: _Stage, then: _Stage) -> PendingOpen | None:
    """Return this thread's pending open if it is at `stage`.

    Its stage becomes `then`.
    """
    pending: PendingOpen | None = getattr(_thread, "pending", None)
    if pending is None or pending.stage is not stage:
        return None
    pending.stage = then
    return pending


@contextlib.contextmanager
def pending_open(
    options: Mapping[str, object], *, progress: Progress | None = None, reset: bool = False, page_size: int | None = None
) -> Iterator[None]:
    """Pass arguments to the next database that this thread opens through the VFS.

    Args:
        options: rank between those of `register()` and those of the URI.
        progress: called during a restore with the bytes read and the bytes expected.
        reset: make the local file the head of its log.
        page_size: bytes, for a new database.
    """
    before = getattr(_thread, "pending", None)
    _thread.pending = PendingOpen(dict(options), progress=progress, reset=reset, page_size=page_size)
    try:
        yield
    finally:
        _thread.pending = before


class _Opener:
    """Open databases as the `DatabaseOpener` of this process.

    `defaults` are the arguments of `register()`.
    """

    def __init__(self) -> None:
        self.defaults: dict[str, object] = {}

    def open(
        self,
        path: str,
        parameters: Mapping[str, str],
        open_file: Callable[[CommitListener | None], apsw.VFSFile],
        *,
        given_path: str,
        is_writable: bool,
    ) -> apsw.VFSFile:
        pending = _take(_Stage.WAITING, _Stage.OPENING) or PendingOpen(_NOTHING_ASKED)
        if not is_writable or parameters.get("immutable", "0") not in ("0", "no", "false", "off"):
            return open_file(None)
        config = Config.load(self.defaults, pending.options, uri=parameters)
        if os.path.isdir(path):
            raise ConfigError(f"{path} is a directory", hint="Name the database's file.")
        require_same_name(given_path, path)
        require_free_name(path)
        replica = registry.acquire(path, config, connect_own)
        try:
            with replica.opening(progress=pending.progress, reset=pending.reset):
                file = open_file(replica)
            pending.stage = _Stage.OPENED
            return file
        except BaseException:
            registry.release(replica)
            raise

    def find(self, path: str) -> Replica | None:
        return registry.get(path)


_install_lock = threading.RLock()  # re-entrant: a signal handler may open a database while its thread is in `install`
_opener: Final = _Opener()
_installed: BottomlessVFS | None = None
_own: OwnVFS | None = None


def install(defaults: Mapping[str, object]) -> None:
    """Register the VFS and the connection hook.

    A second call only merges `defaults` into the existing ones.

    Raises:
        ConfigError: an unknown option, or a bad value.
    """
    global _installed, _own
    Config.load(defaults, environ={})
    with _install_lock:
        if _installed is None:
            _own = OwnVFS(_opener, _OWN_VFS_NAME)
            _installed = BottomlessVFS(_opener)
            run_first(_on_connect)
        if defaults:
            _opener.defaults = {**_opener.defaults, **defaults}


def installed_defaults() -> dict[str, object]:
    """Return the merged defaults of all `install` calls."""
    return dict(_opener.defaults)


def connect_own(path: str) -> apsw.Connection:
    """Open a connection of our own to `path`, which is not replicated.

    The VFS of our own connections reports what it does to the WAL.
    """
    return OwnConnection(path, vfs=_OWN_VFS_NAME)


def _on_connect(connection: apsw.Connection) -> None:
    if _installed is not None:
        _installed.watch(connection)
    pending = _take(_Stage.OPENED, _Stage.DONE)
    if pending is not None and pending.page_size is not None:
        # Before the application's hooks: a hook that switches to WAL mode creates the database,
        # with the page size of that moment.
        connection.execute(f"PRAGMA page_size={pending.page_size}")


def _after_fork() -> None:
    global _install_lock
    _install_lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)
