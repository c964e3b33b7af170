"""The thread that fills the page view behind the log: in turns, beside the commits, which never wait for it.

    a turn:  view lock ─► index lock: choose pages that are in the log, read them ─► (index free) is this still the head? put them
             ─► index lock: note how far it is ─► both free

Whoever is killed, or fails, within a turn leaves the note as it was: its pages are put once more. The order of the locks is view, then
index; nobody who holds the index's waits for the view's. A page that changes while its object is under way is put again by a later
turn, which the view lock keeps behind this one.

While commits come, a turn waits `_PAUSE` after the one before, and longer when turns take long; else they follow each other.
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
_PAGES: Final = 16  # of a turn
_PAUSE: Final = 0.25  # between two turns while commits come, here or in another process ...
_SHARE: Final = 0.2  # ... and as much longer as leaves a turn no more than this share of the time
_CONTENDED: Final = 0.003  # who waits that long for the view's lock is not alone


class PageObjectWriter:
    """Puts page objects in the background. Thread-safe.

    `told(ticket, failure)` is called when the view is as complete as the flush `ticket` wanted it, or when a turn has failed (`ticket` 0
    when no flush waits): then the filler rests until it is told to `follow` again.
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
        self._asked = 0  # how often it was wanted: whoever asks during a turn is not forgotten at its end
        self._held = False
        self._goal: tuple[int, int] | None = None  # (ticket of a flush, the txid up to which it wants the view complete)
        self._turn_at = 0.0
        self._active_at = -_PAUSE

    def is_held_here(self) -> bool:
        """Is the running thread within a method of this object? The worker may wait for it."""
        return is_held_here(self._lock)

    # --- told by the worker --------------------------------------------------------------------------------------------

    def active(self) -> None:
        """A commit is being made."""
        self._active_at = self._clock()

    def wanted(self) -> None:
        """There is something to put."""
        with self._lock:
            self._wanted = True
            self._asked += 1
            self._ensure_thread()

    def follow(self, behind: bool, goal: tuple[int, int] | None) -> None:
        """A batch is stored. With pages=checkpoint the view is behind on purpose, until a checkpoint has asked for it, or a flush."""
        with self._lock:
            self._held = False
            self._wanted = behind and (self._config.pages == "commit" or self._wanted or goal is not None)
            if goal is not None:
                self._goal = goal
            if self._wanted:
                self._asked += 1
                self._ensure_thread()

    def hold(self) -> None:
        """A batch has failed: no page object is put before one has gone well."""
        with self._lock:
            self._held = True

    def stop(self) -> None:
        """No further turn is begun."""
        with self._lock:
            self._stopping = True
            self._cond.notify_all()

    def join(self) -> None:
        """Waits until the thread has ended."""
        with self._lock:
            # Not by Thread.join(): one that Ctrl-C ends takes the thread for dead, though it goes on (CPython 3.11).
            while self._running and self._thread is not threading.current_thread():
                self._cond.wait(1.0)

    # --- done by the worker, at a close --------------------------------------------------------------------------------

    def fill_all(self) -> None:
        """All that pages=checkpoint has left.

        Raises:
            ReplicationError: not all page objects could be put.
        """
        try:
            lost = 0
            with self._index.locked():
                goal = self._replicator.header().txid  # other processes may commit without end
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
        """What the last commits have left of the page view; what is more than that goes on at the next open."""
        try:
            with self._view.lock.locked(), self._index.locked():
                header = self._replicator.header()
                with self._local.read_transaction():
                    self._replicator.fencing.require_head(header)
                    self._view.finish(header)
        except (StoreError, SnapshotInvalidated, IndexCorrupt) as failure:
            logger.warning("%s: page objects are left to the next open: %s", self._local.path, failure)

    def sweep(self) -> None:
        """Page objects past the end of a database that has shrunk go."""
        try:
            with self._view.lock.locked(), self._index.locked():
                header = self._replicator.header()
                if self._view.to_sweep(header):
                    self._replicator.fencing.require_head(header)
                    self._view.sweep(header)
        except (StoreError, IndexCorrupt) as failure:
            # Superfluous objects harm nobody.
            logger.warning("%s: page objects past its end stay until the next time: %s", self._local.path, failure)

    # --- the thread ----------------------------------------------------------------------------------------------------

    def _ensure_thread(self) -> None:
        if self._thread is None and not self._stopping:
            thread = threading.Thread(target=self._run, name=f"bottomless view {self._local.path}", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                logger.info("the page view of %s is left to the next open: %s", self._local.path, error)  # the interpreter ends
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
        """Until a turn is due; False when it is over."""
        with self._lock:
            while not self._stopping:
                left: float | None = None
                if self._wanted and not self._held:
                    now = self._clock()
                    # Whoever waits in flush() does so now.
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
        """Puts some of the backlog; is there more (to do for the view to be complete up to `goal`)?"""
        view, replicator = self._view, self._replicator
        began = self._clock()
        with view.lock.locked():
            if self._clock() - began > _CONTENDED:
                self._active_at = self._clock()
            with self._index.locked(), self._local.read_transaction():
                header = replicator.header()
                tip = self._local.tip()
                if self._local.wal.header() != tip.header:
                    self._pause(0.001)  # a restart is under way
                    return True
                turn = view.choose(header, tip, most=most)
            if turn is not None:
                if turn.pages:
                    self._require_head(turn.header)
                elif turn.cursor <= turn.header.db_size and not goal:
                    self._pause(0.01)  # what is due is ahead of the log: a batch comes first
                view.put_turn(turn)
                with self._index.locked():
                    header = replicator.header()
                    header = view.advance(header, turn)
                    if goal and max(turn.backlog.cursor, 1) == turn.cursor <= turn.header.db_size:
                        # What is due next is ahead of the log, and the process that has committed it may have been killed.
                        header = replicator.batch()
            if goal:
                return header.view_complete < goal
            if self._config.pages == "checkpoint":
                return header.backlog is not None
            return view.behind(header)

    def _require_head(self, header: IndexHeader) -> None:
        """Raises FencedError when the history has gone on without this machine. What looks so may be a commit made here meanwhile."""
        if self._replicator.fencing.is_recent_head(header) or not self._replicator.history.edges(since=header.txid):
            return
        with self._index.locked():
            self._replicator.fencing.require_head(self._replicator.header())


def view_is_missing(path: str, failure: BottomlessError) -> ReplicationError:
    """What flush() raises when the log is complete and the page view is not."""
    return failure.copy(
        f"everything committed to {path} is in the log, but not all page objects are stored: {failure.message}",
        kind=ReplicationError,
        path=path,
        hint="Nothing is lost. They are put with the next flush(), or in the background. " + failure.hint,
    )
