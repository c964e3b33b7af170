"""`parallel`: everything is done, or stops at the first failure; and nobody waits for ever."""

from __future__ import annotations

import contextvars
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bottomless_wal.core.pool import Pool, each, ordered

WIDTHS = [1, 2, 3, 8]


class OddError(Exception):
    pass


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("count", [0, 1, 2, 7, 100])
@pytest.mark.parametrize("lazy", [False, True])
def test_each_does_everything_once(width: int, count: int, lazy: bool) -> None:
    done: list[int] = []
    each(done.append, iter(range(count)) if lazy else range(count), width)
    assert sorted(done) == list(range(count))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("count", [0, 1, 2, 7, 100])
@pytest.mark.parametrize("lazy", [False, True])
def test_ordered_keeps_the_order(width: int, count: int, lazy: bool) -> None:
    def slowly(number: int) -> int:
        time.sleep(0.001 * (number % 3))
        return number * 2

    assert list(ordered(slowly, iter(range(count)) if lazy else range(count), width)) == [number * 2 for number in range(count)]


@settings(max_examples=50, deadline=None)
@given(items=st.lists(st.integers()), width=st.integers(1, 10), bad=st.integers())
def test_the_first_error_in_order_is_raised_in_its_turn(items: list[int], width: int, bad: int) -> None:
    def check(item: int) -> int:
        if item == bad:
            raise OddError(item)
        return item

    got: list[int] = []
    try:
        for result in ordered(check, items, width):
            got.append(result)
    except OddError:
        assert bad in items
    assert got == (items[: items.index(bad)] if bad in items else items)


def meet(count: int) -> None:
    """Returns only if `count` threads are here at the same time."""
    barrier.wait(timeout=10)


barrier = threading.Barrier(4)


def test_each_works_at_once() -> None:
    each(meet, range(4), 4)
    each(meet, iter(range(8)), 4)


def test_ordered_works_at_once() -> None:
    # The consumer helps only when nobody else has begun.
    assert len(list(ordered(meet, range(8), 4))) == 8


@pytest.mark.parametrize("width", [1, 3])
def test_never_more_than_width_at_once(width: int) -> None:
    lock = threading.Lock()
    running = most = 0

    def work(_: int) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.002)
        with lock:
            running -= 1

    each(work, range(40), width)
    assert most <= width
    list(ordered(work, range(40), width))
    assert most <= width


@pytest.mark.parametrize("width", WIDTHS)
def test_items_are_taken_as_they_are_needed(width: int) -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        while True:
            taken += 1
            yield taken

    results = ordered(lambda item: item, items(), width)
    assert taken == 0
    for number in range(1, 20):
        assert next(results) == number
        assert taken <= number + width
    results.close()  # type: ignore[attr-defined]
    before = taken
    time.sleep(0.01)
    assert taken == before


@pytest.mark.parametrize("width", WIDTHS)
def test_after_a_failure_no_more_is_begun(width: int) -> None:
    begun: list[int] = []

    def work(number: int) -> None:
        begun.append(number)
        if number == 5:
            raise OddError(number)
        time.sleep(0.002)

    with pytest.raises(OddError, match="5"):
        each(work, range(1000), width)
    assert len(begun) <= 6 + 2 * width
    count = len(begun)
    time.sleep(0.02)
    assert len(begun) == count


def test_the_first_of_several_errors_is_raised() -> None:
    first = threading.Event()

    def work(number: int) -> None:
        if number:
            first.wait(10)
            time.sleep(0.01)
            raise OddError("second")
        first.set()
        raise OddError("first")

    with pytest.raises(OddError, match="first"):
        each(work, range(2), 2)


def test_what_runs_is_waited_for() -> None:
    started = threading.Event()
    finished: list[int] = []

    def work(number: int) -> None:
        if number == 0:
            started.set()
            time.sleep(0.05)
            finished.append(number)
        else:
            started.wait(10)
            raise OddError

    with pytest.raises(OddError):
        each(work, range(2), 2)
    assert finished == [0]
    started.clear()
    finished.clear()
    results = ordered(work, [1, 0], 2)
    with pytest.raises(OddError):
        next(results)
    assert finished in ([0], [])  # not begun, or finished: never under way
    count = len(finished)
    time.sleep(0.1)
    assert len(finished) == count


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_errors_of_any_kind_reach_the_caller(error: type[BaseException]) -> None:
    def work(number: int) -> None:
        if number == 3:
            raise error

    with pytest.raises(error):
        each(work, range(10), 3)
    with pytest.raises(error):
        list(ordered(work, range(10), 3))


@pytest.mark.parametrize("width", WIDTHS)
def test_an_error_of_the_source_is_raised_after_its_items(width: int) -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        raise OddError("source")

    done: list[int] = []
    with pytest.raises(OddError, match="source"):
        each(done.append, items(), width)
    assert sorted(done) == list(range(5))
    with pytest.raises(OddError, match="source"):
        list(ordered(done.append, items(), width))


def test_calls_may_nest_deeper_than_there_are_threads() -> None:
    pool = Pool(2)

    def work(depth: int) -> int:
        if depth:
            pool.each(work, [depth - 1] * 3)
            assert list(pool.ordered(work, [depth - 1] * 3)) == [depth - 1] * 3
        return depth

    pool.each(work, [3] * 4)
    pool.close()


def test_many_callers_share_the_threads() -> None:
    totals: list[int] = []

    def caller() -> None:
        got: list[int] = []
        for _ in range(30):
            each(got.append, range(8), 8)
        totals.append(len(got))

    threads = [threading.Thread(target=caller) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert totals == [240] * 16


def test_a_pool_starts_no_more_threads_than_it_needs() -> None:
    pool = Pool(8, name="counted")

    def threads() -> int:
        return sum(1 for thread in threading.enumerate() if thread.name.startswith("counted"))

    pool.each(lambda _: None, [1])
    assert threads() == 0
    for _ in range(20):
        pool.each(lambda _: time.sleep(0.001), range(3))
    assert threads() <= 7
    for _ in range(20):
        pool.each(lambda _: time.sleep(0.001), range(100))
    assert threads() <= 8
    pool.close()
    end = time.monotonic() + 5
    while threads() and time.monotonic() < end:
        time.sleep(0.005)
    assert threads() == 0
    pool.each(lambda _: None, range(10))  # its caller does it
    assert list(pool.ordered(str, range(10))) == [str(number) for number in range(10)]


def test_context_goes_along() -> None:
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=0)
    variable.set(7)
    seen: list[int] = []

    def work(_: int) -> int:
        meet(4)
        seen.append(variable.get())
        return variable.get()

    each(work, range(4), 4)
    assert seen == [7] * 4
    assert list(ordered(work, range(4), 4)) == [7] * 4


def test_finished_work_is_let_go() -> None:
    class Big:
        alive = 0

        def __init__(self) -> None:
            Big.alive += 1

        def __del__(self) -> None:
            Big.alive -= 1

    each(lambda _: time.sleep(0.001), [Big() for _ in range(8)], 4)
    list(ordered(lambda _: time.sleep(0.001), [Big() for _ in range(8)], 4))
    end = time.monotonic() + 5
    while Big.alive and time.monotonic() < end:
        time.sleep(0.005)
    assert Big.alive == 0


def test_a_forked_child_has_threads_of_its_own() -> None:
    each(meet, range(4), 4)
    child = os.fork()
    if child == 0:
        try:
            each(meet, range(4), 4)
            os._exit(0)
        except BaseException:  # noqa: BLE001  (a forked child must not go on as pytest)
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def test_it_works_at_exit() -> None:
    """Where executors of concurrent.futures say «cannot schedule new futures», and new threads may be refused."""
    program = """
        import atexit, threading
        from bottomless_wal.core.pool import each, ordered

        def last():
            done = []
            each(done.append, range(20), 4)
            print(sorted(done) == list(range(20)), list(ordered(str, range(3), 2)), end="")

        atexit.register(last)
        {warm}
    """
    for warm in ("", "each(print, [], 4)", "each(lambda _: None, range(9), 4)"):
        code = textwrap.dedent(program.format(warm=warm))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
        assert done.stdout == "True ['0', '1', '2']"
        assert done.stderr == ""


def test_it_works_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    pool = Pool(4)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    done: list[int] = []
    pool.each(done.append, range(10))
    assert sorted(done) == list(range(10))
    assert list(pool.ordered(str, range(5))) == ["0", "1", "2", "3", "4"]


def test_small_batches_are_cheap() -> None:
    each(lambda _: None, range(8), 8)
    best = min(_timed() for _ in range(20))
    assert best < 0.01


def _timed() -> float:
    start = time.perf_counter()
    each(lambda _: None, range(8), 8)
    return time.perf_counter() - start
