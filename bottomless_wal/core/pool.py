"""Run several jobs at once in daemon threads, also at interpreter exit.

Executors refuse to start jobs at exit. Three rules make it safe to call the pool from any
thread, workers included:

- The calling thread takes part, and runs a job itself if no worker has started it. So progress
  never waits for a free worker. Where no thread can be started any more (an `atexit` function of
  Python 3.12), the calling thread runs all jobs in turn.
- After the first failure no new job is started. The call returns only when none of its jobs is
  still running.
- A job runs in a copy of its caller's context variables, which includes a store's `deadline`.

The pool takes no lock. Python code runs while a thread holds a lock, so the garbage collector or
a signal handler may commit there. That commit would wait for a worker that needs the same lock.

Idle workers stay for the next call: eight small uploads at each commit must not cost eight
threads. A forked child starts with an empty pool.
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
    """Run jobs in at most `width` worker threads, started at first need."""

    def __init__(self, width: int, *, name: str = "bottomless") -> None:
        self.width = width
        self._name = name
        self.after_fork()
        fork_aware(self)

    def after_fork(self) -> None:
        self._jobs: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        # One entry for each started thread, and one for each thread that waits for a job. Appending
        # and popping take no lock.
        self._threads: deque[None] = deque()
        self._idle: deque[None] = deque()
        self._closed = False

    def each(self, function: Callable[[T], object], items: Iterable[T], width: int | None = None) -> None:
        """Call `function` with every item, up to `width` at a time, in any order.

        After the first failure, or an interruption of the caller, no more items are taken. The
        call waits for the items that are being worked on. Then it raises the first error. `items`
        is consumed as it is needed.
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
        """Yield `map(function, items)`, computed by up to `width` threads ahead.

        An error is raised in its item's turn, after the results before it. Closing the iterator
        waits for the running jobs.
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
        """Let the workers end when they have done their jobs.

        A later call of the pool runs its jobs in the calling thread alone.
        """
        self._closed = True
        for _ in range(len(self._threads)):
            self._jobs.put(None)

    def _start(self, function: Callable[[T], R], item: T) -> _Job[T, R]:
        job = _Job(function, item)
        self._submit(_in_context(job.run))
        return job

    def _submit(self, work: Callable[[], object]) -> None:
        """Offer `work` to the workers.

        No worker may take it: a caller must be ready to do the work itself.
        """
        if self._closed:
            return
        if not self._threads:
            self._grow()
            if not self._threads:
                return
        self._jobs.put(work)

    def _grow(self) -> None:
        """Start one more worker, if the interpreter allows it.

        Two threads that call this at once may both start one.
        """
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
            # The workers start each other, so that no submitting thread waits for the start of a
            # thread.
            if jobs.qsize() > len(idle) and len(self._threads) < self.width and not self._closed:
                self._grow()
            job()
            # A reference to a finished job would keep its pages in memory while the worker is idle.
            del job


class _Batch(Generic[T]):
    """The state of one `each`: its items, its running jobs and its first error."""

    def __init__(self, function: Callable[[T], object], items: Iterable[T]) -> None:
        self._function = function
        self._source = iter(items)
        self._changed = threading.Condition(threading.Lock())
        self._over = False
        self._running = 0
        self.error: BaseException | None = None

    def work(self) -> None:
        """Take items and work on them until there are no more."""
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
        """Take no more items, and wait until no thread works on one."""
        with self._changed:
            self._over = True
            while self._running:
                self._changed.wait()

    def _stop(self, error: BaseException) -> None:
        self._over = True
        if self.error is None:
            self.error = error


class _Job(Generic[T, R]):
    """One call of `ordered`.

    A worker runs it, or the consumer that needs its result, whichever comes first.
    """

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
        """Prevent the job's start, if it has not been started."""
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
    """Call `Pool.each` of the pool that the whole process shares."""
    _shared.each(function, items, width)


def drain(items: list[T]) -> Iterator[T]:
    """Yield the items in order, and remove each from the list.

    So a list that is worked on piece by piece is not kept whole in memory.
    """
    items.reverse()
    while items:
        yield items.pop()


def ordered(function: Callable[[T], R], items: Iterable[T], width: int) -> Iterator[R]:
    """Call `Pool.ordered` of the pool that the whole process shares."""
    return _shared.ordered(function, items, width)


_numbers = count(1)
_shared: Final = Pool(_MOST_THREADS)
