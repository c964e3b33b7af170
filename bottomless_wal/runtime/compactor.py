"""Compact, snapshot and prune the log of one open database, off the commit path.

    told(txid): a commit is stored ──► txid is a multiple of 64, or a snapshot is overdue ──► a turn

    a turn:  list the new segments ──► merge complete runs ──► store a snapshot, if it is due
             ──► prune, after a snapshot, at most once an hour

A thread of its own does this work. Once a day a turn begins with a thorough check that the log
leads to its head (`log_check`), whatever `compaction` says. If the open found no unbroken chain
to the head, the check runs at once, and the close waits for the repair.

Of all processes that write, the one that stored the 64th commit takes the turn. A snapshot is
due in two cases:

- the commits since the last snapshot are larger than it;
- the last snapshot is older than `snapshot_interval` by the server's clock.

So snapshots at most double what is written. A page of a commit is written once more at each
level that it is merged at.

All changes go through the store, and are safe while other processes and machines do the same. A
step that fails is logged and done by a later turn. Neither a commit nor a restore depends on this
work. An idle writer sends nothing: work that is due waits for a commit.

After each millisecond of processor time the thread rests for three, so that commits are hardly
delayed. It rests for less when it falls behind the commits.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from ..core.config import Config
from ..core.errors import BottomlessError
from ..core.logs import get_logger
from ..core.threads import mark_own_thread
from ..history.compaction import LEVELS, Vanished, compact, snapshot
from ..history.log import RemoteLog
from ..history.planner import plan
from ..history.retention import prune
from ..history.segment_list import SegmentInfo
from ..replication.log_check import Finding, LogCheck

__all__ = ["Compactor"]

logger = get_logger(__name__)

_SMALLEST_SNAPSHOT: Final = 1 << 20  # bytes of commits: below this a snapshot speeds up no restore
_FIRST_LOOK: Final = 60.0  # seconds from the start of a process to its first check
_RETRY_FIRST: Final = 300.0  # seconds from the first failure of a snapshot to the next attempt
_LISTINGS: Final = 3
_PATIENCE: Final = 2.0
_GRACE: Final = 1.0  # seconds that a close gives a turn to finish
_CHECK_EVERY: Final = 86400.0  # seconds
_PRUNE_EVERY: Final = 3600.0  # seconds: less than the age below which no segment may be deleted
_STRETCH: Final = 0.001  # seconds of processor time between two rests
_LAGS: Final = ((1024, 3.0), (8192, 1.0))  # (commits behind at most, rest as a multiple of the work)


class _Stopped(Exception):
    """The replica is being closed."""


class Compactor:
    """Keep the log of one database short while it is open.

    `told` may be called from any thread.
    """

    def __init__(
        self,
        config: Config,
        history: RemoteLog,
        check: LogCheck | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] | None = None,
    ) -> None:
        self._config = config
        self._history = history
        self._check = check
        self._clock = clock
        self._pause = pause or self._rest
        self._worked = 0.0  # this thread's processor time at its last rest, in seconds
        self._lock = threading.RLock()  # `with` this, not the condition: Ctrl-C could end Condition.__enter__ with the lock held
        self._cond = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._closing = False
        self._stopping = False
        self._running = False
        self._turning = False
        self._head = 0
        self._complete = False  # whether a run is complete and has to be merged
        self._turned = 0  # the txid of the head at the last turn
        # Processes that start together check at different moments. One that ends soon does not
        # check at all.
        self._jitter = random.uniform(0.9, 1.0)
        self._due = clock() + min(_FIRST_LOOK, config.snapshot_interval) * self._jitter
        self._prune_at = clock()
        self._check_at = clock() + _CHECK_EVERY * self._jitter
        self._is_check_due = False
        self._failures = 0
        self._again_at = 0.0
        self._passed_over: set[tuple[int, int]] = set()
        # The segments that a turn does not list again.
        self._window: Sequence[SegmentInfo] = ()
        self._last: SegmentInfo | None = None
        self._bytes = 0
        self._listed = False

    def opened(self) -> None:
        """Start the log check at once if the open could not verify the log.

        The open has then not found an unbroken chain to the head.
        """
        if self._check is not None and self._check.finding is not Finding.SOUND:
            with self._cond:
                self._is_check_due = True
                self._begin()

    def told(self, txid: int) -> None:
        """Note that this process has stored the head `txid`."""
        is_check_due = self._check is not None and self._clock() >= self._check_at
        if not self._config.compaction and not is_check_due:
            return
        with self._lock:
            self._head = txid
            self._complete = self._config.compaction and (self._complete or txid % LEVELS[0] == 0)
            self._is_check_due = self._is_check_due or is_check_due
            if self._thread is None or self._complete or self._is_check_due or self._clock() >= self._due:
                self._begin()

    def _begin(self) -> None:
        """Start the thread, or wake it. Call it with the lock held."""
        if self._thread is None and not self._closing:
            thread = threading.Thread(target=self._run, name=f"bottomless upkeep {self._history.name}", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                logger.debug("no upkeep of %s: %s", self._history.name, error)  # the interpreter is ending
                return
            self._thread, self._running = thread, True
        else:
            self._cond.notify_all()

    def stop(self) -> None:
        """Stop the thread.

        A turn that is under way may finish, if that is soon. The close does not wait for a request
        that hangs.
        """
        with self._lock:
            self._closing = True  # no more rest
            self._cond.notify_all()
            while self._running and self._is_check_due and self._has_gap():
                self._cond.wait(1.0)
            self._cond.wait_for(lambda: not self._turning and not self._complete, _GRACE)
            self._stopping = True
            self._cond.notify_all()
            self._cond.wait_for(lambda: not self._running, _PATIENCE)

    def _run(self) -> None:
        mark_own_thread()
        try:
            while self._wait():
                try:
                    self._turn()
                except _Stopped:
                    return
                except Exception as error:
                    if self._stopping:
                        return  # the store was closed during the turn
                    expected = isinstance(error, BottomlessError)
                    logger.warning("upkeep of %s: %s", self._history.name, error, exc_info=not expected)
        finally:
            with self._lock:
                self._running = self._turning = False
                self._cond.notify_all()

    def _wait(self) -> bool:
        with self._lock:
            self._turning = False
            self._cond.notify_all()
            while not self._stopping:
                now = self._clock()
                if self._closing and not self._complete and not self._is_check_due:
                    return False
                if self._complete or self._is_check_due or (now >= self._due and self._head > self._turned):
                    self._complete, self._turning = False, True
                    return True
                self._cond.wait()  # work that is due waits for the next commit
            return False

    def _turn(self) -> None:
        if self._is_check_due and self._check is not None:
            self._look_at_the_log(self._check)
        if not self._config.compaction:
            return
        with self._lock:
            head = self._head
            self._turned = head
        for _ in range(_LISTINGS):
            try:
                self._merge(head)
                self._see_to_a_snapshot(head)
                return
            except Vanished as vanished:
                logger.info("%s: %s", self._history.name, vanished)
                self._listed = False

    def _has_gap(self) -> bool:
        return self._check is not None and self._check.finding is Finding.GAP

    def _look_at_the_log(self, check: LogCheck) -> None:
        """Check the log, and repair it.

        After a failure the check is done after a commit some minutes later, or at the next open.
        """
        self._check_at = self._clock() + _RETRY_FIRST
        try:
            check.run(self._breathe)
            self._check_at = self._clock() + _CHECK_EVERY * self._jitter
            self._listed = False  # the repair may have stored a snapshot
        finally:
            with self._cond:
                self._is_check_due = False
                self._cond.notify_all()

    def _merge(self, head: int) -> None:
        self._look(head)
        added = compact(self._history, self._window, level=self._config.level, throttle=self._breathe, passed_over=self._passed_over)
        # Every complete run of the highest level has been merged, or has a gap.
        begin = head // LEVELS[-1] * LEVELS[-1]
        self._window = sorted(edge for edges in (self._window, added) for edge in edges if edge.pre >= begin)

    def _look(self, head: int) -> None:
        """List the new segments.

        The window holds the segments that the next aligned segments may be merged from.
        """
        if self._listed:
            begin = max((edge.post for edge in self._window), default=0)
            new = self._history.edges(since=begin, bodies=True)
            self._window = sorted({edge[:2]: edge for edge in (*self._window, *new)}.values())
        else:
            # Segments before the last snapshot are needed only to restore earlier states.
            self._last = max(self._history.snapshots(), key=lambda edge: edge.post, default=None)
            begin = min(self._last.post if self._last is not None else 0, head) // LEVELS[-1] * LEVELS[-1]
            self._window = new = self._history.edges(since=begin, bodies=True)
            self._bytes = 0
        after = self._last.post if self._last is not None else 0
        self._bytes += sum(edge.size + edge.body for edge in new if edge.post == edge.pre + 1 and edge.pre >= after)
        self._listed = True

    def _due_now(self) -> tuple[bool, bool]:
        """Return whether a snapshot is due: by its commits' size, and by its age."""
        last = self._last
        if last is None:
            return True, False
        age = self._history.store.estimate() - last.modified
        left = self._config.snapshot_interval * self._jitter - age
        self._due = self._clock() + max(left, 0.0)
        return self._bytes > max(last.size + last.body, _SMALLEST_SNAPSHOT), left <= 0

    def _see_to_a_snapshot(self, head: int) -> None:
        if not any(self._due_now()):
            return
        if self._failures and self._clock() < self._again_at:
            self._due = self._again_at
            return
        # Another process may have stored a snapshot meanwhile.
        newest = max(self._history.snapshots(), key=lambda edge: edge.post, default=None)
        if newest is not None and (self._last is None or newest.post > self._last.post):
            self._last = newest
            self._bytes = sum(
                edge.size + edge.body for edge in self._history.edges(since=newest.post, bodies=True) if edge.post == edge.pre + 1
            )
        heavy, overdue = self._due_now()
        target = head if overdue else head // LEVELS[0] * LEVELS[0]
        if not (heavy or overdue) or (self._last is not None and target <= self._last.post):
            return
        # If a commit is missing, no snapshot can be made before a reset. To find that out again and
        # again would read the headers of all segments.
        self._failures += 1
        pause = _RETRY_FIRST * 2 ** min(self._failures - 1, 12)
        self._again_at = self._due = self._clock() + min(pause, max(self._config.snapshot_interval, _RETRY_FIRST))
        self._snapshot(target)
        self._failures = 0
        self._due_now()

    def _snapshot(self, target: int) -> None:
        last, level = self._last, self._config.level
        # Segments before the last snapshot are not needed, and there may be many of them.
        edges: Sequence[SegmentInfo] = [last, *self._history.edges(since=last.post)] if last is not None else self._history.edges()
        if last is not None and plan(edges, target) is None:
            edges = self._history.edges()
        made = snapshot(self._history, edges, target, level=level, throttle=self._breathe)
        if made is not None:
            self._last = made
            self._bytes = sum(edge.size + edge.body for edge in edges if edge.post == edge.pre + 1 and edge.pre >= made.post)
        if self._clock() >= self._prune_at:
            self._prune_at = self._clock() + _PRUNE_EVERY
            config = self._config
            prune(self._history, retention=config.retention, keep_snapshots=config.keep_snapshots, throttle=self._breathe)

    def _breathe(self) -> None:
        """Rest, so that commits come first.

        It is called often, because a close does not wait for it.

        Raises:
            _Stopped: the replica is being closed.
        """
        if self._stopping:
            raise _Stopped
        worked = time.thread_time() - self._worked
        if worked < _STRETCH:
            return
        behind = self._head - self._turned
        rest = next((rest for most, rest in _LAGS if behind <= most), 0.0)
        self._pause(0.0 if self._closing else worked * rest)
        self._worked = time.thread_time()

    def _rest(self, seconds: float) -> None:
        with self._lock:
            self._cond.wait_for(lambda: self._closing, seconds)
