"""Keep the WAL short where SQLite's own passive checkpoints cannot.

Committers that wait for an upload hold read locks. Under load there is always a reader, so even
a complete passive checkpoint never lets SQLite restart the WAL. Past a few thousand frames, a
connection of our own runs a RESTART checkpoint, outside the replicator's lock. It holds SQLite's
write lock until the current readers have finished, for a fraction of a second at most. After a
commit that failed to replicate no WAL hook runs. Then this module runs the passive checkpoint.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Final

import apsw

from ..core.logs import get_logger
from ..core.threads import is_held_here, mark_own_thread

__all__ = ["AUTOCHECKPOINT_FRAMES", "RESTART_FRAMES", "Checkpointer"]

logger = get_logger(__name__)

AUTOCHECKPOINT_FRAMES: Final = 1000  # SQLite's default
RESTART_FRAMES: Final = 4000
_BUSY_MS: Final = 250  # how long one attempt may block writers, in milliseconds, where they wait for uploads ...
_BUSY_LOCAL_MS: Final = 30  # ... and where they do not (ack=local)
_PAUSE_SECONDS: Final = 1.0  # between attempts
_SHORT_PAUSE_SECONDS: Final = 0.1  # ... once the WAL is twice as long as it should be


def _close(connection: apsw.Connection | None) -> None:
    with contextlib.suppress(apsw.ConnectionClosedError):
        if connection is not None:
            connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
            connection.close()


class Checkpointer:
    """Run checkpoints of one database in a thread of its own. Thread-safe.

    Args:
        path: the main file.
        connect: opens a connection of our own to it.
        local: whether the database has ack=local.
        clock: returns seconds.
    """

    def __init__(
        self, path: str, connect: Callable[[], apsw.Connection], *, local: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._path = path
        self._busy_ms = _BUSY_LOCAL_MS if local else _BUSY_MS
        self._connect = connect
        self._clock = clock
        self._lock = threading.RLock()  # `with` this, not the condition: Ctrl-C could end Condition.__enter__ with the lock held
        self._cond = threading.Condition(self._lock)
        self._frames = 0
        self._not_before = 0.0
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._running = False

    def ask(self, frames: int) -> None:
        """Request a checkpoint of a WAL of `frames` frames."""
        if frames < AUTOCHECKPOINT_FRAMES or is_held_here(self._lock):  # the collector commits here
            return
        with self._lock:
            if self._stopping or self._clock() < self._not_before:
                return
            self._frames = frames
            if self._thread is None:
                thread = threading.Thread(target=self._run, name=f"bottomless checkpoints {self._path}", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:
                    logger.debug("%s: no checkpoint: %s", self._path, error)  # the interpreter is ending
                    return
                self._thread, self._running = thread, True
            self._cond.notify()

    def stop(self) -> None:
        """Stop the thread, and close its connection."""
        with self._lock:
            self._stopping = True
            self._cond.notify()
            # Not Thread.join(): if Ctrl-C ends it, it marks a running thread as ended (CPython
            # 3.11).
            while self._running:
                self._cond.wait(1.0)

    def _run(self) -> None:
        mark_own_thread()
        connection: apsw.Connection | None = None
        try:
            while True:
                with self._lock:
                    while not self._frames and not self._stopping:
                        self._cond.wait()
                    if self._stopping:
                        return
                    frames, self._frames = self._frames, 0
                    self._not_before = self._clock() + (_PAUSE_SECONDS if frames < 2 * RESTART_FRAMES else _SHORT_PAUSE_SECONDS)
                try:
                    if connection is None:
                        connection = self._connect()
                        connection.set_busy_timeout(self._busy_ms)
                        # A connection that has never read has not opened the WAL, and checkpoints
                        # nothing.
                        connection.execute("PRAGMA schema_version").fetchall()
                    self._checkpoint(connection, frames)
                except apsw.Error as error:
                    # The disk may be full, or the application may be closing its connections. A
                    # later attempt may succeed.
                    logger.warning("%s: a checkpoint failed: %s", self._path, error)
                    _close(connection)
                    connection = None
        finally:
            _close(connection)
            with self._lock:
                self._running = False
                self._cond.notify_all()

    def _checkpoint(self, connection: apsw.Connection, frames: int) -> None:
        mode = apsw.SQLITE_CHECKPOINT_RESTART if frames >= RESTART_FRAMES else apsw.SQLITE_CHECKPOINT_PASSIVE
        try:
            total, copied = connection.wal_checkpoint(mode=mode)
        except (apsw.BusyError, apsw.LockedError):
            logger.debug("%s: readers kept a WAL of %d frames from being restarted", self._path, frames)
        else:
            logger.debug("%s: checkpoint of %d frames, %d copied", self._path, total, copied)
