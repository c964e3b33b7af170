"""The queue at the write lock."""

from __future__ import annotations

import threading
import time

from bottomless_wal.sqlite import busy


def _wait_for(length: int) -> None:
    end = time.monotonic() + 20
    while len(busy.queue) != length:
        assert time.monotonic() < end
        time.sleep(0.001)


def _sleeper(microseconds: int, woken: list[int], number: int) -> threading.Thread:
    def run() -> None:
        assert busy.sleep(microseconds) == microseconds
        woken.append(number)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_a_commit_wakes_the_first_in_the_queue_and_only_that() -> None:
    woken: list[int] = []
    threads = []
    for number in range(2):
        threads.append(_sleeper(20_000_000, woken, number))
        _wait_for(number + 1)
    busy.call_next()
    threads[0].join(10)
    assert woken == [0]
    busy.call_next()
    threads[1].join(10)
    assert woken == [0, 1]
    assert not busy.queue


def test_without_a_commit_the_sleep_ends_by_itself() -> None:
    busy.call_next()  # nobody waits: no effect
    began = time.monotonic()
    assert busy.sleep(20_000) == 20_000
    assert time.monotonic() - began >= 0.02
    assert not busy.queue


def test_a_thread_that_was_woken_early_sleeps_longer_the_next_time() -> None:
    times: list[float] = []

    def run() -> None:
        for _ in range(2):
            began = time.monotonic()
            busy.sleep(200_000)
            times.append(time.monotonic() - began)

    thread = threading.Thread(target=run)
    thread.start()
    _wait_for(1)
    busy.call_next()
    thread.join(10)
    assert times[0] < 0.2
    assert sum(times) >= 0.39, "SQLite counts what it asked for"
