"""Retry requests whose failure may pass, for a bounded time, and log outages.

Only `TransientError` is retried, at random intervals that grow exponentially, until `retry_timeout` or a `deadline` is over. Then
a `StoreError` states which request was given up, after how many seconds, and why. `Retrier.remaining` gives the running attempt the
time that is left to it. Each retry is logged at INFO. An outage is logged as one WARNING when it begins, and one, with its length,
when it ends.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Final, TypeVar

import tenacity

from ..core.errors import StoreError, TransientError
from ..core.logs import get_logger
from ..core.threads import fork_aware
from .base import Stats

__all__ = ["Retrier"]

R = TypeVar("R")

logger = get_logger(__name__)

_FIRST_WAIT: Final = 0.2  # seconds
_LONGEST_WAIT: Final = 5.0  # seconds
_LEAST_LEFT: Final = 0.2  # seconds; with less left, no further attempt is made
_BACKOFF: Final = tenacity.wait_random_exponential(multiplier=_FIRST_WAIT, max=_LONGEST_WAIT)

# Context variables, not thread-locals: `core.pool` copies them to the threads that work for a caller.
_deadline: ContextVar[float | None] = ContextVar("bottomless_deadline", default=None)
_attempt_end: ContextVar[float | None] = ContextVar("bottomless_attempt_end", default=None)


class Retrier:
    """Run the requests of one store, with retries.

    Args:
        where: the name of the store in messages.
        timeout: seconds until a request is given up; 0: one attempt only.
        stats: counts the retries.
        sleep: waits for so many seconds; None: a wait that `close` ends.
        clock: returns seconds, monotonic.
    """

    def __init__(
        self,
        where: str,
        timeout: float,
        stats: Stats,
        *,
        sleep: Callable[[float], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._where = where
        self._timeout = timeout
        self._stats = stats
        self._sleep = sleep
        self._clock = clock
        self._outage: float | None = None
        self._last_failure = 0.0
        self._closed = False
        self.after_fork()
        fork_aware(self)

    def after_fork(self) -> None:
        self._lock = threading.Lock()
        self._closing = threading.Event()
        if self._closed:
            self._closing.set()

    def run(self, what: str, attempt: Callable[[], R], *, key: str | None = None) -> R:
        """Return what `attempt()` returns. Repeat it while it raises `TransientError` and time is left.

        Args:
            what: the name of the request in messages.
            attempt: sends the request once.
            key: the key of the object that the request is about; None: none, or several.

        Raises:
            StoreError: `attempt` raised it, the time is over, or the store was closed.
        """
        start = self._clock()
        end = _deadline.get()
        if end is not None and start >= end:
            raise StoreError.about(what, "the time that was set for it is over", key=key, hint="Try again with more time.")
        if end is None and self._timeout > 0:
            end = start + self._timeout
        token = _attempt_end.set(end)
        state = tenacity.Retrying(
            sleep=self._wait,
            wait=lambda state: self._pause(state, end),
            stop=lambda _: end is None or end - self._clock() < _LEAST_LEFT,
            retry=tenacity.retry_if_exception_type(TransientError),
            before_sleep=lambda state: self._retrying(what, state),
            reraise=True,
        )
        try:
            answer: R = state(self._observed, attempt)
            return answer
        except TransientError as error:
            attempts = state.statistics["attempt_number"]
            effort = f"{self._clock() - start:.1f} s and {attempts} attempt{'s' if attempts > 1 else ''}"
            reason = f"given up after {effort}: {error.reason}"
            raise error.copy(
                f"{what}: {reason}",
                kind=StoreError,
                hint=error.hint or f"Is {self._where} up and reachable from here? retry_timeout sets how long it is tried.",
                reason=reason,
                key=error.key or key,
            ) from error
        finally:
            _attempt_end.reset(token)

    def _pause(self, state: tenacity.RetryCallState, end: float | None) -> float:
        # At most half of the time that is left, so that a server that comes back within that time is found.
        return _BACKOFF(state) if end is None else min(_BACKOFF(state), max(0.0, end - self._clock()) / 2)

    def remaining(self) -> float | None:
        """Return the seconds left to the running attempt, at least 0.05; None: only the timeouts limit it."""
        end = _attempt_end.get()
        return None if end is None else max(end - self._clock(), 0.05)

    @contextlib.contextmanager
    def deadline(self, seconds: float) -> Iterator[None]:
        """See `Store.deadline`."""
        end, outer = self._clock() + seconds, _deadline.get()
        token = _deadline.set(end if outer is None else min(end, outer))
        try:
            yield
        finally:
            _deadline.reset(token)

    def close(self) -> None:
        """End every wait between attempts, now and later."""
        self._closed = True
        self._closing.set()

    def _observed(self, attempt: Callable[[], R]) -> R:
        if self._closed:
            raise StoreError(f"{self._where} was closed", hint="Open the database again.")
        began = self._clock()
        try:
            answer = attempt()
        except TransientError as error:
            self._failed(error)
            raise
        except StoreError:
            # The server has answered, so the outage is over.
            self._succeeded(began)
            raise
        self._succeeded(began)
        return answer

    def _failed(self, error: TransientError) -> None:
        with self._lock:
            self._last_failure = self._clock()
            first = self._outage is None
            if first:
                self._outage = self._last_failure
        if first:
            logger.warning("%s fails: %s", self._where, error.message)

    def _succeeded(self, began: float) -> None:
        with self._lock:
            # A success that began before the last failure does not end the outage.
            if self._outage is None or began < self._last_failure:
                return
            length = self._clock() - self._outage
            self._outage = None
        logger.warning("%s answers again, after %.1f s", self._where, length)

    def _retrying(self, what: str, state: tenacity.RetryCallState) -> None:
        self._stats.retry()
        error = state.outcome and state.outcome.exception()
        cause = error.reason if isinstance(error, TransientError) else error
        logger.info("%s: attempt %d failed, again in %.2f s: %s", what, state.attempt_number, state.upcoming_sleep, cause)

    def _wait(self, seconds: float) -> None:
        if self._sleep is not None:
            self._sleep(seconds)
        else:
            self._closing.wait(seconds)
