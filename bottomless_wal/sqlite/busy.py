"""Queue the threads that wait for SQLite's write lock, and wake them at commits.

SQLite's busy handler sleeps for up to 0.1 s between two attempts, even if the lock is free. So
the VFS's `xSleep` (`sleep` here) waits in this queue instead. Each commit of this process wakes
only the first thread in it (`call_next`). If all woke together, they would use up their busy
timeouts.
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
"""The threads that wait for a commit of this process to release the write lock.

Each has a lock here, held until it is woken. Appending and popping take no lock. The garbage
collector, or the exit, could otherwise find such a lock held for ever.
"""

_QUEUE_LOOK: Final = 10_000  # microseconds
_NAP_OVER: Final = 0.005  # seconds between two sleeps: after more, the second one belongs to another wait

_now: Final = time.monotonic
_thread = threading.local()


def sleep(microseconds: int) -> int:
    """Wait in the queue, and return the microseconds that SQLite has to count.

    APSW's own `xSleep` sleeps while it holds the GIL.

    Args:
        microseconds: the longest time to wait.
    """
    # SQLite counts the time that it requested as slept. Its busy timeout would end after some sixty
    # calls, whatever database they were for. So a thread that was woken early makes up for it at
    # its next sleep, when no commit can wake it.
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
        # In a queue, a thread that tries on its own takes the turn of the thread that was woken.
        turn.acquire(timeout=max(microseconds, _QUEUE_LOOK if len(queue) > 1 else 0) / 1e6)
    finally:
        with contextlib.suppress(ValueError):  # the thread was woken
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
