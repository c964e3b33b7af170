"""The queue at SQLite's write lock: a thread that waits for it is woken when a commit of this process has released the lock.

SQLite's busy handler sleeps for up to 0.1 s between two attempts, while the lock is free. So the VFS's `xSleep` (`sleep` here) waits in
this queue instead, and each commit wakes the first thread in it (`call_next`): all together would use up their patience.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from typing import Final

__all__ = ["call_next", "queue", "sleep"]

queue: Final[deque[threading.Lock]] = deque()
"""The threads that wait for a commit of this process to release the write lock: a lock each, held until it is their turn. Appending and
popping need no lock of their own, which the collector, or the exit, could find held for ever."""

_QUEUE_LOOK: Final = 10_000  # microseconds
_NAP_OVER: Final = 0.005  # seconds between two sleeps that are not of one wait any more

_now: Final = time.monotonic
_thread = threading.local()


def sleep(microseconds: int) -> int:
    """Wait in the queue for `microseconds` at most, and return what SQLite is to count as slept.

    APSW's own `xSleep` sleeps while it holds the GIL.
    """
    # SQLite takes for slept what it has asked for: its patience would be over after some sixty calls, to whatever database they were.
    # So a thread that was called too early makes up for it the next time, when no commit can call it.
    began = _now()
    debt, until = getattr(_thread, "nap", (0.0, 0.0))
    if began - until > _NAP_OVER:
        debt = 0.0
    if debt > 0:
        time.sleep(debt)
    turn = threading.Lock()
    turn.acquire()
    queue.append(turn)
    try:
        # In a queue, a thread that looks of its own accord takes the turn of the one that was called.
        turn.acquire(timeout=max(microseconds, _QUEUE_LOOK if len(queue) > 1 else 0) / 1e6)
    finally:
        with contextlib.suppress(ValueError):  # it was called
            queue.remove(turn)
    ended = _now()
    _thread.nap = (max(0.0, debt + microseconds / 1e6 - (ended - began)), ended)
    return microseconds


def call_next() -> None:
    """Wake the first thread in the queue."""
    with contextlib.suppress(IndexError):
        queue.popleft().release()


# The threads of the parent do not exist in the child of a fork.
os.register_at_fork(after_in_child=queue.clear)
