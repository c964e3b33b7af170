"""What may pass is tried again, for so long and no longer; and an outage is never silent.

Only `TransientError` is retried, at exponentially growing random intervals, until `retry_timeout` (or a `deadline`) is over;
then a `StoreError` says what was given up, after how long, and why. `remaining()` tells the running attempt how much time is
left to it. Each retry is logged at INFO. An *outage* is one WARNING when it begins and one, with its length, when it ends.
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

_FIRST_WAIT: Final = 0.2
_LONGEST_WAIT: Final = 5.0
_LEAST_LEFT: Final = 0.2  # with less than this, no further attempt is worth it
_BACKOFF: Final = tenacity.wait_random_exponential(multiplier=_FIRST_WAIT, max=_LONGEST_WAIT)

# Context variables, and not thread-locals: `parallel` hands them on to the threads that do a caller's work.
_deadline: ContextVar[float | None] = ContextVar("bottomless_deadline", default=None)
_attempt_end: ContextVar[float | None] = ContextVar("bottomless_attempt_end", default=None)


class Retrier:
    """Runs the requests of one store. `where` names it in messages; `timeout` in seconds, 0 for one attempt only."""

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
        """The answer of `attempt()`, which is repeated while it raises `TransientError` and time is left.

        Raises:
            StoreError: what `attempt` raised, the time is over, or the store was closed. `what` names the request, `key` its object.
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
        # Never longer than half of what is left: a server that is back before the time is over is found.
        return _BACKOFF(state) if end is None else min(_BACKOFF(state), max(0.0, end - self._clock()) / 2)

    def remaining(self) -> float | None:
        """Seconds left to the running attempt, at least a twentieth; None for no limit but the timeouts."""
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
        """Ends every wait, now and later."""
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
            # An answer, if not the one that was hoped for: the server is there.
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
            # While some requests fail and others pass, it is still the same outage.
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
