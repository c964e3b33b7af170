"""The replicas of this process, by real path: every connection, and the `-wal` file, finds its own here.

    acquire   the first open makes a replica; all opens of one file share it, with the same settings
    release   the last close ends it; whoever opens the file meanwhile waits
    fork      the child drops everything and closes nothing
    exit      all are drained while threads still run

Two files of one process that map to one name in one bucket are refused; between machines create-only writes do it.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Final

import apsw

from .config import Config
from .errors import BottomlessError, ConfigError, ConflictError
from .parallel import is_own_thread
from .replica import Replica

__all__ = ["Registry", "registry"]

logger = logging.getLogger(__name__)

OWN_THREADS: Final = "bottomless"
"""The names of all threads of this package begin with this."""


class Registry:
    """The replicas of this process, by real path."""

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._replicas: dict[str, Replica] = {}
        self._acquiring: set[int] = set()
        # Never freed: closing an inherited connection in a child would act on files that are the parent's.
        self._inherited: list[Replica] = []

    def get(self, path: str) -> Replica | None:
        """The replica of the file at `path`, if it is open."""
        return self._replicas.get(path)

    def all(self) -> list[Replica]:
        """Every open replica."""
        with self._lock:
            return list(self._replicas.values())

    def acquire(self, path: str, config: Config, connect: Callable[[str], apsw.Connection]) -> Replica:
        """The replica of `path`, made when there is none, with one more open counted.

        Raises:
            ConfigError: it is open with other settings. ConflictError: another file maps to its name.
        """
        with self._lock, self._marked():
            if any(inherited.path == path for inherited in self._inherited):
                raise ConfigError(
                    f"{path} was open in the process that forked this one: SQLite's locks would not protect it here",
                    hint="Open it only after the fork, or close every connection to it before (gunicorn: in post_fork, not in a "
                    "preloaded app).",
                )
            while (replica := self._replicas.get(path)) is not None and replica.closing:
                self._lock.wait()
            if replica is None:
                made = Replica(path, config, connect)
                for other in self._replicas.values():
                    if (other.name, other.config.endpoint, other.config.bucket) == (made.name, config.endpoint, config.bucket):
                        made.store.close()
                        raise ConflictError(
                            f"{path} and {other.path} would both be stored as {made.name!r} in {made.store.describe()}",
                            hint="Give one of them another database_id.",
                        )
                replica = self._replicas[path] = made
            replica.opens += 1  # before anything in which the collector could close the last connection that it has
            if replica.config != config:
                self.release(replica)
                raise ConfigError(
                    f"{path} is open in this process with other settings",
                    hint="Use the same options for every connection to one file, or close the others first.",
                )
            return replica

    @contextlib.contextmanager
    def _marked(self) -> Iterator[None]:
        me = threading.get_ident()
        self._acquiring.add(me)
        try:
            yield
        finally:
            self._acquiring.discard(me)

    def borrow(self, path: str) -> Replica | None:
        """The replica of `path`, kept open until `release`; None when it is not open. While a thread is inside it, the garbage
        collector, which may run in that very thread, cannot be the one that closes it."""
        with self._lock:
            replica = self._replicas.get(path)
            if replica is None or replica.closing or not replica.booted:
                return None
            replica.opens += 1
            return replica

    def release(self, replica: Replica) -> None:
        """One open less; the last one closes the replica. Who opens the file meanwhile waits.

        The garbage collector may close a connection in any thread, also in one of ours that the closing would wait for, or in the
        middle of `acquire`: then another thread closes the replica.
        """
        with self._lock:
            replica.opens -= 1
            if replica.opens:
                return
            replica.closing = True
        if threading.get_ident() in self._acquiring or is_own_thread():
            threading.Thread(target=self._close, args=(replica,), name=f"{OWN_THREADS} close {replica.path}").start()
        else:
            self._close(replica)

    def _close(self, replica: Replica) -> None:
        booted = replica.booted
        try:
            replica.close()
        except KeyboardInterrupt:
            # Ctrl-C ends the wait, not the upload: another thread, which the exit waits for, does what is left.
            replica.booted = booted
            threading.Thread(target=self._close, args=(replica,), name=f"{OWN_THREADS} close {replica.path}").start()
            raise
        except BaseException:
            self._forget(replica)
            raise
        self._forget(replica)

    def _forget(self, replica: Replica) -> None:
        with self._lock:
            del self._replicas[replica.path]
            self._lock.notify_all()

    def after_fork(self) -> None:
        """In the child: every inherited replica is the parent's."""
        self._lock = threading.Condition()
        self._acquiring = set()
        for replica in self._replicas.values():
            replica.abandon()
        self._inherited.extend(self._replicas.values())
        self._replicas = {}

    def exit(self) -> None:
        """At interpreter exit: what is pending is sent while threads still run."""
        for replica in self.all():
            if replica.pid == os.getpid():
                try:
                    replica.close()
                except (BottomlessError, apsw.Error, OSError) as error:
                    logger.error("closing %s at exit: %s", replica.path, error)
                except KeyboardInterrupt:
                    logger.error("interrupted at exit: what is not stored of %s stays pending, and goes with the next open", replica.path)


registry: Final = Registry()


def _leave_by_finalizer() -> None:
    """Children of multiprocessing leave by os._exit: atexit does not run there, its finalizers do. Without it in the process there is
    nothing to do; it clears all finalizers when such a child begins, and then calls what was registered."""
    util = sys.modules.get("multiprocessing.util")
    if util is not None:
        util.register_after_fork(registry, lambda owner: util.Finalize(None, owner.exit, exitpriority=100))


def _after_fork() -> None:
    registry.after_fork()
    _leave_by_finalizer()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(registry.exit)
_leave_by_finalizer()
if "multiprocessing.util" in sys.modules and sys.modules["multiprocessing.process"].parent_process() is not None:
    # Imported by what such a child does: it has begun long ago.
    sys.modules["multiprocessing.util"].Finalize(None, registry.exit, exitpriority=100)
