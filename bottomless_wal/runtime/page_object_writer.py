"""Write page objects in the background, behind the log.

    a turn:  view lock ─► index lock: choose pages that are in the log, and read them
             ─► index free: check that this is still the head, and PUT the pages
             ─► index lock: record the progress ─► both free

The thread works in turns, and commits never wait for it. A process that is killed, or a turn
that fails, leaves the record unchanged: its pages are PUT once more. The order of the locks is
view, then index. A thread that holds the index's lock never waits for the view's. If a page
changes while its object is being stored, a later turn PUTs it again. The view lock keeps that
turn behind this one.

While commits come, a turn waits `_PAUSE` after the one before, and longer when turns take long.
Otherwise turns follow each other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

import apsw

from ..core.config import Config
from ..core.errors import BottomlessError, ReplicationError, StoreError
from ..core.logs import get_logger
from ..core.threads import is_held_here, mark_own_thread
from ..history.page_table import IndexCorrupt
from ..replication.index import IndexHeader, LocalIndex
from ..replication.replicator import Replicator
from ..sqlite.database_reader import LocalDatabase
from ..sqlite.snapshot_reader import SnapshotInvalidated

__all__ = ["PageObjectWriter", "view_is_missing"]

logger = get_logger(__name__)

_LOOKS: Final = 100
_PAGES: Final = 16  # pages in one turn
_PAUSE: Final = 0.25  # seconds between two turns while commits come, in this process or another ...
_SHARE: Final = 0.2  # ... extended so that turns take no more than this share of the time
_CONTENDED: Final = 0.003  # seconds: after a longer wait for the view's lock, another process is writing


class PageObjectWriter:
    """Write page objects in the background. Thread-safe.

    `told(ticket, failure)` is called when the page objects are as complete as the flush `ticket`
    requested, or when a turn has failed. `ticket` is 0 if no flush waits. After a failure the
    thread pauses until `follow` is called.
    """

    def __init__(
        self,
        config: Config,
        replicator: Replicator,
        index: LocalIndex,
        local: LocalDatabase,
        *,
        told: Callable[[int, Exception | None], None],
        clock: Callable[[], float],
        pause: Callable[[float], None],
    ) -> None:
        self._config = config
        self._replicator = replicator
        self._view = replicator.view
        self._index = index
        self._local = local
        self._told = told
        self._clock = clock
        self._pause = pause
        self._lock = threading.RLock()  # `with` this, not the condition: Ctrl-C could end Condition.__enter__ with the lock held
        self._cond = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._running = False
        self._stopping = False
        self._wanted = False
        self._asked = 0  # how often a turn was requested: a request during a turn is not lost at its end
        self._held = False
        self._goal: tuple[int, int] | None = None  # (ticket of a flush, the txid up to which it needs the view complete)
        self._turn_at = 0.0
        self._active_at = -_PAUSE

    def is_held_here(self) -> bool:
        """Return whether the running thread is inside a method of this object.

        The worker may be waiting for that thread.
        """
        return is_held_here(self._lock)

    # --- called by the worker ------------------------------------------------------------------------------------------

    def active(self) -> None:
        """Note that a commit is being made."""
        self._active_at = self._clock()

    def wanted(self) -> None:
        """Note that there are page objects to write."""
        with self._lock:
            self._wanted = True
            self._asked += 1
            self._ensure_thread()

    def follow(self, behind: bool, goal: tuple[int, int] | None) -> None:
        """Resume after a batch is stored.

        With pages=checkpoint the page objects are behind on purpose, until a checkpoint or a flush
        requests them.

        Args:
            behind: whether page objects have to be written.
            goal: the ticket of a flush, and the txid up to which it needs the view complete.
        """
        with self._lock:
            self._held = False
            self._wanted = behind and (self._config.pages == "commit" or self._wanted or goal is not None)
            if goal is not None:
                self._goal = goal
            if self._wanted:
                self._asked += 1
                self._ensure_thread()

    def hold(self) -> None:
        """Pause after a failed batch, until a batch has succeeded."""
        with self._lock:
            self._held = True

    def stop(self) -> None:
        """Start no further turn."""
        with self._lock:
            self._stopping = True
            self._cond.notify_all()

    def join(self) -> None:
        """Wait until the thread has ended."""
        with self._lock:
            # Not Thread.join(): if Ctrl-C ends it, it marks a running thread as ended (CPython 3.11).
            while self._running and self._thread is not threading.current_thread():
                self._cond.wait(1.0)

    # --- called by the worker, at a close ------------------------------------------------------------------------------

    def fill_all(self) -> None:
        """Write all page objects that pages=checkpoint has left.

        Raises:
            ReplicationError: some page objects could not be stored.
        """
        try:
            lost = 0
            with self._index.locked():
                goal = self._replicator.header().txid  # a fixed goal, because other processes may commit without end
            more = goal > 0
            while more:
                try:
                    more = self._turn(_PAGES * 8, goal=goal)
                except SnapshotInvalidated:
                    lost += 1
                    if lost == _LOOKS:
                        raise
        except (SnapshotInvalidated, IndexCorrupt) as failure:
            raise ReplicationError(
                f"everything committed to {self._local.path} is in the log, but not all page objects could be put: {failure}",
                hint="Nothing is lost. They are put with the next flush(), or in the background.",
            ) from failure
        except StoreError as failure:
            raise view_is_missing(self._local.path, failure) from failure

    def finish(self) -> None:
        """Write the page objects that the last commits have left.

        A larger backlog is continued at the next open.
        """
        try:
            with self._view.lock.locked(), self._index.locked():
                header = self._replicator.header()
                with self._local.read_transaction():
                    self._replicator.fencing.require_head(header)
                    self._view.finish(header)
        except (StoreError, SnapshotInvalidated, IndexCorrupt) as failure:
            logger.warning("%s: page objects are left to the next open: %s", self._local.path, failure)

    def sweep(self) -> None:
        """Delete page objects past the end of a database that has shrunk."""
        try:
            with self._view.lock.locked(), self._index.locked():
                header = self._replicator.header()
                if self._view.to_sweep(header):
                    self._replicator.fencing.require_head(header)
                    self._view.sweep(header)
        except (StoreError, IndexCorrupt) as failure:
            # Superfluous objects do no harm.
            logger.warning("%s: page objects past its end stay until the next time: %s", self._local.path, failure)

    # --- the thread ----------------------------------------------------------------------------------------------------

    def _ensure_thread(self) -> None:
        if self._thread is None and not self._stopping:
            thread = threading.Thread(target=self._run, name=f"bottomless view {self._local.path}", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                logger.info("the page view of %s is left to the next open: %s", self._local.path, error)  # the interpreter is ending
                return
            self._thread, self._running = thread, True
        self._cond.notify_all()

    def _run(self) -> None:
        mark_own_thread()
        try:
            while self._wait():
                self._fill()
        finally:
            with self._lock:
                self._running = False
                self._cond.notify_all()

    def _wait(self) -> bool:
        """Wait until a turn is due. Return False when the thread has to end."""
        with self._lock:
            while not self._stopping:
                left: float | None = None
                if self._wanted and not self._held:
                    now = self._clock()
                    # A waiting flush() is served at once.
                    left = self._turn_at - now if self._goal is None and now - self._active_at < _PAUSE else 0.0
                    if left <= 0:
                        return True
                self._cond.wait(left)
            return False

    def _fill(self) -> None:
        with self._lock:
            goal, asked = self._goal, self._asked
        began = self._clock()
        try:
            more = self._turn(_PAGES * (4 if goal is not None else 1), goal=goal[1] if goal is not None else 0)
            if goal is not None and not more:
                self.sweep()
        except Exception as failure:
            expected = isinstance(failure, BottomlessError | SnapshotInvalidated | IndexCorrupt | OSError | apsw.Error)
            logger.warning("the page view of %s: %s", self._local.path, failure, exc_info=not expected)
            with self._lock:
                self._held = True
                if isinstance(failure, BottomlessError):
                    self._goal = None
            self._told(goal[0] if goal is not None else 0, failure)
            return
        reached = goal is not None and not more
        with self._lock:
            now = self._clock()
            self._turn_at = now + max(_PAUSE, (now - began) / _SHARE)
            if reached and self._goal == goal:
                self._goal = None
            self._wanted = more or reached or self._asked != asked
        if goal is not None and reached:
            self._told(goal[0], None)

    def _turn(self, most: int, *, goal: int = 0) -> bool:
        """Write some of the backlog, and return whether more is left.

        Args:
            most: the pages of this turn, at most.
            goal: the txid up to which the view has to be complete. 0 for no goal.
        """
        view, replicator = self._view, self._replicator
        began = self._clock()
        with view.lock.locked():
            if self._clock() - began > _CONTENDED:
                self._active_at = self._clock()
            with self._index.locked(), self._local.read_transaction():
                header = replicator.header()
                tip = self._local.tip()
                if self._local.wal.header() != tip.header:
                    self._pause(0.001)  # SQLite is restarting the WAL
                    return True
                turn = view.choose(header, tip, most=most)
            if turn is not None:
                if turn.pages:
                    self._require_head(turn.header)
                elif turn.cursor <= turn.header.db_size and not goal:
                    self._pause(0.01)  # the next pages are ahead of the log: a batch has to store them first
                view.put_turn(turn)
                with self._index.locked():
                    header = replicator.header()
                    header = view.advance(header, turn)
                    if goal and max(turn.backlog.cursor, 1) == turn.cursor <= turn.header.db_size:
                        # The next pages are ahead of the log, and the process that committed them may have been killed.
                        header = replicator.batch()
            if goal:
                return header.view_complete < goal
            if self._config.pages == "checkpoint":
                return header.backlog is not None
            return view.behind(header)

    def _require_head(self, header: IndexHeader) -> None:
        """Refuse to write page objects of a state that is not the head.

        A newer segment may also be a commit that this machine made meanwhile.

        Raises:
            FencedError: another writer has extended the history.
        """
        if self._replicator.fencing.is_recent_head(header) or not self._replicator.history.edges(since=header.txid):
            return
        with self._index.locked():
            self._replicator.fencing.require_head(self._replicator.header())


def view_is_missing(path: str, failure: BottomlessError) -> ReplicationError:
    """Return flush()'s error for a complete log with incomplete page objects."""
    return failure.copy(
        f"everything committed to {path} is in the log, but not all page objects are stored: {failure.message}",
        kind=ReplicationError,
        path=path,
        hint="Nothing is lost. They are put with the next flush(), or in the background. " + failure.hint,
    )
