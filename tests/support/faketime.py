"""A clock that stands still until somebody sleeps: tests of waiting that do not wait."""

from __future__ import annotations

import threading
import time


class FakeTime:
    """A clock that only `sleep` moves. `skew` makes each look at the clock take so long, for attempts that take time."""

    def __init__(self) -> None:
        self.seconds = 1000.0
        self.slept: list[float] = []
        self._lock = threading.Lock()

    def clock(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self.slept.append(seconds)
            self.seconds += seconds
        time.sleep(0)
