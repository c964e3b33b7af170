"""Handle threads of this package, forked children and the interpreter's exit.

own threads   Other threads wait for those of this package, which must not wait for them.
fork          Locks, threads and connections are not usable after a fork. Their owners are reset
              in the child.
exit          Once the exit handlers have run, threads stop where they are, and keep their locks.
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
    """An owner of locks, threads or connections, which a fork makes unusable."""

    def after_fork(self) -> None:
        """Discard them in the child, without a message, and start afresh."""


def fork_aware(owner: ForkAware) -> None:
    """Call `owner.after_fork()` in every child that this process forks.

    This ends when `owner` is deallocated.
    """
    _fork_aware.add(owner)


_thread = threading.local()


def mark_own_thread() -> None:
    """Mark the running thread as one of this package.

    Other threads wait for it, so it must not wait for any thread.
    """
    _thread.own = True


def is_own_thread() -> bool:
    """Return whether the running thread has been marked."""
    return getattr(_thread, "own", False)


@contextlib.contextmanager
def as_own_thread() -> Iterator[None]:
    """Mark the running thread in the context.

    It does the worker's part itself, where no thread can be started.
    """
    before = is_own_thread()
    _thread.own = True
    try:
        yield
    finally:
        _thread.own = before


def is_held_here(lock: threading.RLock) -> bool:
    """Return whether the running thread holds `lock`.

    Then the garbage collector, or a signal handler, has interrupted that thread.
    """
    owned: Any = lock
    return bool(owned._is_owned())


EXITED: Final[list[None]] = []
"""Not empty once the exit handlers have run.

It is a list, because Ctrl-C cannot interrupt the handler `EXITED.append`.
"""


class UntilCleared:
    """Suppress errors that arise after the interpreter has cleared modules.

    A connection that is deallocated so late finds None in place of functions and modules. All
    other errors are raised. An instance must be reached through an object, because a global name
    is cleared, too.
    """

    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: object,
        error: BaseException | None,
        traceback: object,
        is_finalizing: Callable[[], bool] = sys.is_finalizing,  # bound here, because `sys` is cleared as well
    ) -> bool:
        return isinstance(error, AttributeError | TypeError) and is_finalizing() and "NoneType" in str(error)


def has_exited() -> bool:
    """Return whether the exit handlers have run.

    From then on threads stop where they are, and never release the locks that they hold.
    """
    return bool(EXITED)


_fork_aware: weakref.WeakSet[ForkAware] = weakref.WeakSet()


def _in_child() -> None:
    EXITED.clear()
    for owner in list(_fork_aware):
        owner.after_fork()


os.register_at_fork(after_in_child=_in_child)
