"""Doing several things at once with plain daemon threads, which work at interpreter exit, when executors refuse to.

Three rules make it safe to call from anywhere, workers included:

- the calling thread takes part, and runs a job that no worker has started itself: progress never waits for a free worker, and
  where no thread can be started any more (an `atexit` function of Python 3.12) everything is simply done in turn;
- after the first failure nothing new is started, and the call returns only when nothing it started is still running;
- a job runs in a copy of its caller's context variables (so a store's `deadline` goes with it).

The pool takes no lock. Python code runs while a thread holds one, so the garbage collector or a signal handler may commit there; and that
commit would wait for a worker that needs the same lock.

Idle workers stay for the next call: eight small uploads at each commit must not cost eight threads. A forked child starts afresh.
"""

from __future__ import annotations

import contextvars
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from itertools import count, islice
from queue import SimpleQueue
from typing import Final, Generic, TypeVar

from .threads import fork_aware, mark_own_thread

__all__ = [
    "Pool",
    "drain",
    "each",
    "ordered",
]

T = TypeVar("T")
R = TypeVar("R")

_MOST_THREADS: Final = 64


class Pool:
    """At most `width` worker threads, started when they are first needed."""

    def __init__(self, width: int, *, name: str = "bottomless") -> None:
        self.width = width
        self._name = name
        self.after_fork()
        fork_aware(self)

    def after_fork(self) -> None:
        self._jobs: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        # One entry for each thread that has been started, and for each that waits for a job. Appending and popping need no lock.
        self._threads: deque[None] = deque()
        self._idle: deque[None] = deque()
        self._closed = False

    def each(self, function: Callable[[T], object], items: Iterable[T], width: int | None = None) -> None:
        """Calls `function` with every item, up to `width` at a time, in any order.

        After the first failure, or when the caller is interrupted, no more items are taken; those being worked on are waited
        for; then the first error is raised. `items` is consumed as it is needed.
        """
        batch = _Batch(function, items)
        helpers = min(self.width if width is None else width, len(items) if isinstance(items, Sized) else _MOST_THREADS) - 1
        for _ in range(helpers):
            self._submit(_in_context(batch.work))
        try:
            batch.work()
        finally:
            batch.finish()
        if batch.error is not None:
            raise batch.error

    def ordered(self, function: Callable[[T], R], items: Iterable[T], width: int | None = None) -> Iterator[R]:
        """`map(function, items)`, worked on by up to `width` threads ahead of the consumer.

        An error is raised in its item's turn, after the results before it. Closing the iterator waits for what is running.
        """
        ahead = self.width if width is None else width
        if ahead <= 1 or (isinstance(items, Sized) and len(items) == 1):
            yield from map(function, items)
            return
        source = iter(items)
        started: deque[_Job[T, R]] = deque()
        try:
            for item in islice(source, ahead):
                started.append(self._start(function, item))
            while started:
                result = started.popleft().result()
                for item in islice(source, 1):
                    started.append(self._start(function, item))
                yield result
        finally:
            for job in started:
                job.cancel()
            for job in started:
                job.done.wait()

    def close(self) -> None:
        """Lets the workers end when they have done what they have. Who calls the pool later does the work alone."""
        self._closed = True
        for _ in range(len(self._threads)):
            self._jobs.put(None)

    def _start(self, function: Callable[[T], R], item: T) -> _Job[T, R]:
        job = _Job(function, item)
        self._submit(_in_context(job.run))
        return job

    def _submit(self, work: Callable[[], object]) -> None:
        """Puts `work` before the workers. It may be that nobody comes: callers must be ready to do it themselves."""
        if self._closed:
            return
        if not self._threads:
            self._grow()
            if not self._threads:
                return
        self._jobs.put(work)

    def _grow(self) -> None:
        """Starts one more worker, if the interpreter allows it. Two threads that come here at once may both start one."""
        self._threads.append(None)
        if len(self._threads) > self.width:
            self._threads.pop()
            return
        name = f"{self._name}-{next(_numbers)}"
        try:
            threading.Thread(target=self._work, args=(self._jobs,), name=name, daemon=True).start()
        except RuntimeError:
            self._threads.pop()

    def _work(self, jobs: SimpleQueue[Callable[[], object] | None]) -> None:
        mark_own_thread()
        idle = self._idle
        while True:
            idle.append(None)
            job = jobs.get()
            idle.pop()
            if job is None:
                return
            # The workers start each other: whoever submits never waits for a thread to come up.
            if jobs.qsize() > len(idle) and len(self._threads) < self.width and not self._closed:
                self._grow()
            job()
            # Holding on to a finished job while idle would keep its pages in memory.
            del job


class _Batch(Generic[T]):
    """The state of one `each`: where the items come from, how many are being worked on, and what went wrong first."""

    def __init__(self, function: Callable[[T], object], items: Iterable[T]) -> None:
        self._function = function
        self._source = iter(items)
        self._changed = threading.Condition(threading.Lock())
        self._over = False
        self._running = 0
        self.error: BaseException | None = None

    def work(self) -> None:
        """Takes items and works on them until there are no more."""
        while True:
            with self._changed:
                if self._over:
                    return
                try:
                    item = next(self._source)
                except StopIteration:
                    self._over = True
                    return
                except BaseException as error:  # noqa: BLE001  (it is raised in the calling thread)
                    self._stop(error)
                    return
                self._running += 1
            try:
                self._function(item)
            except BaseException as error:  # noqa: BLE001  (it is raised in the calling thread)
                with self._changed:
                    self._stop(error)
            finally:
                with self._changed:
                    self._running -= 1
                    if not self._running:
                        self._changed.notify_all()

    def finish(self) -> None:
        """Takes no more items, and waits until nobody works on one."""
        with self._changed:
            self._over = True
            while self._running:
                self._changed.wait()

    def _stop(self, error: BaseException) -> None:
        self._over = True
        if self.error is None:
            self.error = error


class _Job(Generic[T, R]):
    """One call of `ordered`, run by whoever comes first: a worker, or the consumer that wants its result."""

    def __init__(self, function: Callable[[T], R], item: T) -> None:
        self._call: Callable[[], R] | None = lambda: function(item)
        self._claim = threading.Lock()
        self._results: list[R] = []
        self._error: BaseException | None = None
        self.done = threading.Event()

    def run(self) -> None:
        if not self._claim.acquire(blocking=False):
            return
        call, self._call = self._call, None
        try:
            if call is not None:
                self._results.append(call())
        except BaseException as error:  # noqa: BLE001  (it is raised in the calling thread)
            self._error = error
        finally:
            self.done.set()

    def cancel(self) -> None:
        """Never starts it, if it has not been started."""
        if self._claim.acquire(blocking=False):
            self._call = None
            self.done.set()

    def result(self) -> R:
        self.run()
        self.done.wait()
        if self._error is not None:
            raise self._error
        return self._results[0]


def _in_context(work: Callable[[], None]) -> Callable[[], None]:
    context = contextvars.copy_context()
    return lambda: context.run(work)


def each(function: Callable[[T], object], items: Iterable[T], width: int) -> None:
    """`Pool.each` with threads that all of the process shares."""
    _shared.each(function, items, width)


def drain(items: list[T]) -> Iterator[T]:
    """The items in order, each forgotten by the list when it is given out: what is worked on piece by piece is not kept whole."""
    items.reverse()
    while items:
        yield items.pop()


def ordered(function: Callable[[T], R], items: Iterable[T], width: int) -> Iterator[R]:
    """`Pool.ordered` with threads that all of the process shares."""
    return _shared.ordered(function, items, width)


_numbers = count(1)
_shared: Final = Pool(_MOST_THREADS)
