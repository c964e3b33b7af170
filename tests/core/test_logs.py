"""Lines are written by one thread: whoever logs waits for nothing, and runs no code of the application."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from bottomless_wal.core import logs
from bottomless_wal.core.threads import mark_own_thread

NAME = "bottomless_wal.of_a_test"

logger = logs.get_logger(NAME)


class Kept(logging.Handler):
    """Keeps records, and does `act` at each."""

    def __init__(self, act: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.threads: list[str] = []
        self._act = act

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        self.threads.append(threading.current_thread().name)
        self._act()


@pytest.fixture
def attach() -> Iterator[Callable[[Kept], Kept]]:
    """Attaches a handler to the logger of this test."""
    assert logs.start()
    target = logging.getLogger(NAME)
    target.setLevel(logging.INFO)
    attached: list[Kept] = []

    def add(handler: Kept) -> Kept:
        target.addHandler(handler)
        attached.append(handler)
        return handler

    yield add
    assert logs.drain(30)
    for handler in attached:
        target.removeHandler(handler)
    target.setLevel(logging.NOTSET)


def in_own_thread(work: Callable[[], object], seconds: float = 10.0) -> None:
    """Runs `work` in a thread of the package, which must not hang."""

    def run() -> None:
        mark_own_thread()
        work()

    thread = threading.Thread(target=run, name="bottomless of a test", daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it waits"


def test_a_line_keeps_its_logger_level_place_thread_time_and_order(attach: Callable[[Kept], Kept]) -> None:
    handler = attach(Kept())
    before = time.time()

    def work() -> None:
        logger.debug("below the level")
        for number in range(20):
            logger.info("%s is line %d of %r", ValueError("this"), number, "a test")
        try:
            raise KeyError("why")
        except KeyError:
            logger.exception("with its reason")

    in_own_thread(work)
    between = time.time()
    assert logs.drain(30)
    records = handler.records
    assert [record.getMessage() for record in records[:20]] == [f"this is line {number} of 'a test'" for number in range(20)]
    assert {record.name for record in records} == {NAME}
    assert {record.threadName for record in records} == {"bottomless of a test"}
    assert {(os.path.basename(record.pathname), record.funcName) for record in records} == {("test_logs.py", "work")}
    assert records[20].lineno > records[0].lineno == work.__code__.co_firstlineno + 3
    assert all(before <= record.created <= between for record in records)
    assert [record.levelname for record in records[19:]] == ["INFO", "ERROR"]
    assert records[20].exc_info is not None
    assert "KeyError: 'why'" in logging.Formatter().format(records[20])
    assert set(handler.threads) == {"bottomless log"}


def test_a_handler_that_hangs_holds_up_nobody(attach: Callable[[Kept], Kept]) -> None:
    go_on = threading.Event()
    handler = attach(Kept(lambda: go_on.wait(30)))
    in_own_thread(lambda: [logger.warning("line %d", number) for number in range(3)])
    logger.warning("line 3")
    began = time.monotonic()
    assert not logs.drain(0.2)
    assert time.monotonic() - began < 10
    go_on.set()
    assert logs.drain(30)
    assert [record.getMessage() for record in handler.records] == [f"line {number}" for number in range(4)]


def test_the_lock_of_logging_is_not_waited_for(attach: Callable[[Kept], Kept]) -> None:
    """An application holds it while it configures its handlers, one of which may commit as it is made."""
    handler = attach(Kept())
    with logging._lock:  # type: ignore[attr-defined]
        logging.getLogger(NAME).manager._clear_cache()  # type: ignore[attr-defined]
        in_own_thread(lambda: logger.warning("it did not wait"))
    assert logs.drain(30)
    assert [record.getMessage() for record in handler.records] == ["it did not wait"]


def test_lines_of_other_packages_are_kept_from_threads_of_ours(attach: Callable[[Kept], Kept]) -> None:
    handler = attach(Kept())
    other = logging.getLogger(f"{NAME}.other")
    logs.defer(NAME)
    logs.defer(NAME)
    in_own_thread(lambda: other.warning("%s line", "their"))
    assert logs.drain(30)
    other.warning("the application's line")
    assert [record.getMessage() for record in handler.records] == ["their line", "the application's line"]
    assert handler.threads == ["bottomless log", threading.current_thread().name]
    assert handler.records[0].threadName == "bottomless of a test"


def test_too_many_lines_are_counted_and_not_kept(attach: Callable[[Kept], Kept], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_MOST_LINES", 5)
    go_on, began = threading.Event(), threading.Event()
    handler = attach(Kept(lambda: began.set() or go_on.wait(30)))
    logger.warning("line 0")
    assert began.wait(30)
    for number in range(1, 20):
        logger.warning("line %d", number)
    go_on.set()
    assert logs.drain(30)
    said = [record.getMessage() for record in handler.records]
    assert said[0] == "line 0"
    assert said[1].startswith("14 lines were not written")
    assert said[2:] == [f"line {number}" for number in range(1, 6)]


def test_a_handler_that_fails_ends_nothing(attach: Callable[[Kept], Kept], capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise OSError("no space left for logs")

    handler = attach(Kept(fail))
    logger.warning("first")
    logger.warning("second")
    assert logs.drain(30)
    assert len(handler.records) == 2
    assert "no space left for logs" in capsys.readouterr().err


def test_where_no_thread_can_be_started_the_caller_writes(attach: Callable[[Kept], Kept], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    handler = attach(Kept())
    monkeypatch.setattr(logs, "_writer", None)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    logger.warning("at the exit")
    assert [record.getMessage() for record in handler.records] == ["at the exit"]
    assert logs.drain(1)


def test_a_forked_child_writes_its_own_lines_and_not_its_parents(attach: Callable[[Kept], Kept]) -> None:
    go_on = threading.Event()
    handler = attach(Kept(lambda: go_on.wait(30)))
    logger.warning("the parent's")
    logger.warning("the parent's, too")
    child = os.fork()
    if child == 0:
        try:
            target = logging.getLogger(NAME)
            target.handlers.clear()
            own = Kept()
            target.addHandler(own)
            logger.warning("the child's")
            drained = logs.drain(10)
            os._exit(0 if drained and [record.getMessage() for record in own.records] == ["the child's"] else 1)
        except BaseException:  # noqa: BLE001  (a forked child must not go on as pytest)
            os._exit(2)
    go_on.set()
    assert os.waitpid(child, 0)[1] == 0
    assert logs.drain(30)
    assert len(handler.records) == 2
