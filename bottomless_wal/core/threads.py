"""What threads, forked children and the interpreter's exit must know of each other.

own threads   those of this package serve threads that wait, and must not wait themselves
fork          locks, threads and connections do not survive a fork in a usable state: their owners are reset in the child
exit          threads freeze where they are once the exit handlers have run, with the locks that they hold
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol

__all__ = [
    "EXITED",
    "ForkAware",
    "UntilCleared",
    "as_own_thread",
    "fork_aware",
    "has_exited",
    "is_held_here",
    "is_own_thread",
    "mark_own_thread",
]


class ForkAware(Protocol):
    """Whatever holds locks, threads or connections, none of which survive a fork in a usable state."""

    def after_fork(self) -> None:
        """Called in the child: forget them, silently, and start afresh."""


def fork_aware(owner: ForkAware) -> None:
    """Has `owner.after_fork()` called in every child that this process forks, for as long as `owner` lives."""
    _fork_aware.add(owner)


_thread = threading.local()


def mark_own_thread() -> None:
    """Says that the running thread is one of this package: it serves those who wait, and must wait for nobody."""
    _thread.own = True


def is_own_thread() -> bool:
    """Has the running thread been marked?"""
    return getattr(_thread, "own", False)


@contextlib.contextmanager
def as_own_thread() -> Iterator[None]:
    """Marks the running thread for a while: it does the worker's part itself, where no thread can be started."""
    before = is_own_thread()
    _thread.own = True
    try:
        yield
    finally:
        _thread.own = before


def is_held_here(lock: threading.RLock) -> bool:
    """Does the running thread hold `lock`? Then the garbage collector, or a signal handler, has interrupted it."""
    owned: Any = lock
    return bool(owned._is_owned())


EXITED: Final[list[None]] = []
"""Not empty once the exit's handlers have run. A list, because `EXITED.append` is a handler that Ctrl-C cannot interrupt."""


class UntilCleared:
    """A context that ends quietly what fails because the interpreter, at its end, has cleared the modules that it needs.

    A connection that is deallocated so late finds None in place of functions and modules. All other errors pass. An instance has to be
    reached through an object: a global name is cleared, too.
    """

    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: object,
        error: BaseException | None,
        traceback: object,
        is_finalizing: Callable[[], bool] = sys.is_finalizing,  # bound here, for `sys` is cleared as well
    ) -> bool:
        return isinstance(error, AttributeError | TypeError) and is_finalizing() and "NoneType" in str(error)


def has_exited() -> bool:
    """Have the exit's handlers run? Threads stop where they are from here on, and never give back the locks that they hold."""
    return bool(EXITED)


_fork_aware: weakref.WeakSet[ForkAware] = weakref.WeakSet()


def _in_child() -> None:
    EXITED.clear()
    for owner in list(_fork_aware):
        owner.after_fork()


os.register_at_fork(after_in_child=_in_child)
