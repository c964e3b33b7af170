"""Keep the replicas of this process by real path.

    acquire    the first open makes a replica; all opens of one file share it and its settings
    release    the last close ends the replica, and waits; an open meanwhile waits, too
    hand_over  as `release`, for a connection that is deallocated; takes no lock and does not
               wait; the closer thread does the rest
    fork       the child drops all replicas and closes none
    exit       all replicas are drained while threads still run; a close after that takes no
               lock, because a stopped thread may hold it

Every connection and every `-wal` file finds its replica here. Two files of one process that map
to one name in one bucket are refused. Between machines, create-only writes refuse the second
writer.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Final

import apsw

from ..core import logs
from ..core.config import Config
from ..core.errors import ConfigError, ConflictError
from ..core.threads import EXITED, has_exited, is_held_here, is_own_thread, mark_own_thread
from .replica import Replica

__all__ = ["Registry", "registry"]

logger = logs.get_logger(__name__)

_LOG_SECONDS: Final = 5.0  # how long an exit waits until the application's handlers have written the last lines


class Registry:
    """Keep the replicas of this process, by real path."""

    def __init__(self) -> None:
        self._replicas: dict[str, Replica] = {}
        # Never freed: closing an inherited connection in the child would act on the parent's files.
        self._inherited: list[Replica] = []
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._handed_over: SimpleQueue[Replica] = SimpleQueue()
        self._closer: threading.Thread | None = None

    def get(self, path: str) -> Replica | None:
        """Return the replica of the file at `path`, or None if it is not open."""
        return self._replicas.get(path)

    def all(self) -> list[Replica]:
        """Return every open replica."""
        return list(self._replicas.values())

    def acquire(self, path: str, config: Config, connect: Callable[[str], apsw.Connection]) -> Replica:
        """Return the replica of `path` with one more open. Make it if needed.

        Raises:
            ConfigError: the file is open with other settings, or it cannot be opened here.
            ConflictError: another open file maps to the same name.
        """
        if has_exited():
            raise ConfigError(f"{path} cannot be opened: the interpreter is ending", hint="Open it before the exit.")
        if is_own_thread():
            raise ConfigError(
                f"{path} cannot be opened here: the garbage collector runs this code in a thread that replicates",
                hint="Open no database in a finalizer (__del__, weakref).",
            )
        logs.start()
        self._start_closer()
        with self._lock:
            if any(inherited.path == path for inherited in self._inherited):
                raise ConfigError(
                    f"{path} was open in the process that forked this one: SQLite's locks would not protect it here",
                    hint="Open it only after the fork, or close every connection to it before (gunicorn: in post_fork, not in a "
                    "preloaded app).",
                )
            made: Replica | None = None
            while True:
                # A signal handler may open the same file between any two of these steps.
                replica = self._replicas.get(path) if made is None else self._replicas.setdefault(path, made)
                if replica is None:
                    made = self._made(path, config, connect)
                elif not replica.closing and not (_is_left(replica) and replica.config != config):
                    break
                elif replica.closed_by == threading.get_ident():
                    raise ConfigError(f"{path} is being closed by this very thread", hint="Open no database in a signal handler.")
                else:
                    self._changed.wait()
            if made is not None and replica is not made:
                made.store.close()
            replica.opens += 1  # first: the garbage collector could close the replica's last connection in any later step
            if replica.config != config:
                self.release(replica)
                raise ConfigError(
                    f"{path} is open in this process with other settings",
                    hint="Use the same options for every connection to one file, or close the others first.",
                )
            return replica

    def _made(self, path: str, config: Config, connect: Callable[[str], apsw.Connection]) -> Replica:
        made = Replica(path, config, connect, self._on_close)
        for other in self.all():
            if (other.name, other.config.endpoint, other.config.bucket) == (made.name, config.endpoint, config.bucket):
                while self._replicas.get(other.path) is other and _is_left(other) and other.closed_by != threading.get_ident():
                    self._changed.wait()
                if self._replicas.get(other.path) is not other:
                    continue
                made.store.close()
                raise ConflictError(
                    f"{path} and {other.path} would both be stored as {made.name!r} in {made.store.describe()}",
                    hint="Give one of them another database_id.",
                )
        return made

    def borrow(self, path: str) -> Replica | None:
        """Return the replica of `path` with one more open, or None.

        None: the file is not open. The replica stays open until `release`. The garbage collector,
        which may run in the borrowing thread, cannot close it meanwhile.
        """
        if has_exited():
            return None
        with self._lock:
            replica = self._replicas.get(path)
            if replica is None or replica.closing or not replica.booted:
                return None
            replica.opens += 1
            return replica

    def release(self, replica: Replica) -> None:
        """Count one open less, and close the replica after its last open.

        An open of the file meanwhile waits. The closer thread closes the replica where waiting could
        not end:

        - in a thread of this package, which the close would wait for;
        - in a thread inside `acquire`, where a finalizer or a signal handler closes a connection.
        """
        if is_own_thread() or is_held_here(self._lock):
            self.hand_over(replica)
            return
        replica.dropped.append(None)
        if has_exited():
            return
        try:
            self._close_unused(replica)
        except KeyboardInterrupt:
            # Ctrl-C ends the wait, not the upload. The closer thread does the rest, and the exit waits for it.
            self._handed_over.put(replica)
            raise

    def hand_over(self, replica: Replica) -> None:
        """Count one open less as `release` does, without a lock or a wait."""
        replica.dropped.append(None)
        if not has_exited():
            self._handed_over.put(replica)

    def _on_close(self, replica: Replica, is_deallocated: bool) -> None:
        if is_deallocated:
            self.hand_over(replica)  # a deallocation must not wait
        else:
            self.release(replica)

    def _start_closer(self) -> None:
        """Start the closer thread at the first open.

        If it cannot be started, the interpreter is ending, and `exit` closes everything itself.
        """
        with self._lock:
            if self._closer is None:
                closer = threading.Thread(target=self._run, args=(self._handed_over,), name="bottomless closes", daemon=True)
                try:
                    closer.start()
                except RuntimeError as error:
                    logger.debug("no thread to close databases: %s", error)
                    return
                self._closer = closer

    def _run(self, handed_over: SimpleQueue[Replica]) -> None:
        mark_own_thread()
        while True:
            replica = handed_over.get()
            try:
                self._close_unused(replica)
            except Exception:
                logger.exception("closing %s failed", replica.path)
            del replica

    def _close_unused(self, replica: Replica) -> None:
        """Close `replica` if it has no open left.

        Do nothing if another thread is closing it.
        """
        me = threading.get_ident()
        try:
            with self._lock:
                while replica.dropped:
                    replica.dropped.pop()
                    replica.opens -= 1
                if replica.opens or replica.closed_by is not None:
                    return
                replica.closed_by = me
                replica.closing = True
            replica.close()
        except KeyboardInterrupt:
            if replica.closed_by == me:
                replica.closed_by = None
            raise
        except BaseException:
            self._forget(replica)
            raise
        self._forget(replica)

    def _forget(self, replica: Replica) -> None:
        with self._lock:
            self._replicas.pop(replica.path, None)
            self._changed.notify_all()

    def after_fork(self) -> None:
        """Disown every replica in the child of a fork: they are the parent's."""
        self._begin()
        for replica in self._replicas.values():
            replica.abandon()
        self._inherited.extend(self._replicas.values())
        self._replicas = {}

    def exit(self) -> None:
        """Close all replicas at the interpreter's exit, while threads still run.

        What is pending is sent. An error of one database does not keep the others from being closed.
        """
        for replica in self.all():
            if replica.pid == os.getpid():
                try:
                    replica.close()
                except Exception:
                    logger.exception("closing %s at exit failed", replica.path)
                except KeyboardInterrupt:
                    logger.error("interrupted at exit: what is not stored of %s stays pending, and goes with the next open", replica.path)
        logs.drain(_LOG_SECONDS)


def _is_left(replica: Replica) -> bool:
    """Return whether the last connection to `replica` is gone.

    Then another thread is closing the replica, or is about to.
    """
    return replica.closing or 0 < replica.opens <= len(replica.dropped)


registry: Final = Registry()


def _leave_by_finalizer() -> None:
    """Register the exit handlers with multiprocessing, if it is loaded.

    Its children leave by os._exit. There atexit does not run, but multiprocessing's finalizers do.
    When a child starts, multiprocessing clears all finalizers, and then calls the functions that
    are registered here.
    """
    util = sys.modules.get("multiprocessing.util")
    if util is not None:
        util.register_after_fork(registry, lambda owner: _finalize_by(util, owner))


def _finalize_by(util: Any, owner: Registry) -> None:
    util.Finalize(None, owner.exit, exitpriority=100)
    util.Finalize(None, EXITED.append, args=(None,), exitpriority=99)


def _after_fork() -> None:
    registry.after_fork()
    _leave_by_finalizer()


os.register_at_fork(after_in_child=_after_fork)
# The last registered runs first. Ctrl-C may end `exit` before its first step, but it cannot end a
# handler that is not Python code.
atexit.register(EXITED.append, None)
atexit.register(registry.exit)
_leave_by_finalizer()
if "multiprocessing.util" in sys.modules and sys.modules["multiprocessing.process"].parent_process() is not None:
    # This module was imported in a child of multiprocessing that has already started.
    _finalize_by(sys.modules["multiprocessing.util"], registry)
