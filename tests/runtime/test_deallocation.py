"""A connection that the collector closes, a handler that commits, a signal that opens: nothing waits for what waits for it.

The collector, and signal handlers, run between any two steps of whatever thread they interrupt, also while it holds a lock.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import apsw
import pytest

import bottomless_wal
from bottomless_wal.core import logs, pool, threads
from bottomless_wal.core.errors import ConfigError, ReplicationError
from bottomless_wal.runtime.registry import registry
from tests.support.cluster import Machine, World, refusal, replica_of, rows, until


@pytest.fixture(autouse=True)
def collected_by_hand() -> Iterator[None]:
    """The collector runs where a test calls it."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def in_cycle(con: apsw.Connection) -> None:
    """Leaves the connection to the collector: the caller drops its own reference."""
    cycle: list[Any] = [con]
    cycle.append(cycle)


def opened(here: Machine, file: str = "app.db", **options: Any) -> apsw.Connection:
    """A connection that nothing else refers to."""
    con = bottomless_wal.connect(here.path(file), **{**here.world.options, **options})
    con.execute("CREATE TABLE IF NOT EXISTS t(x)")
    return con


def in_time(work: Callable[[], object], seconds: float = 20.0) -> None:
    """Runs `work` in a thread, which must come to its end."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  (it is raised in the calling thread)
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it hangs"
    if failed:
        raise failed[0]


# --- a close that comes from a deallocation --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["dropped", "collected", "collected by its owner's finalizer"])
def test_a_deallocated_connection_waits_for_nothing(world: World, how: str) -> None:
    """What it has left is sent all the same; a `close()` waits for it."""
    here = world.machine()
    con = opened(here, ack="local", interval=60)
    bottomless_wal.flush(con)
    con.execute("INSERT INTO t VALUES (1)")
    go_on = threading.Event()
    refusal(con).hold(go_on)
    if how == "dropped":
        del con
    elif how == "collected":
        in_cycle(con)
        del con
        gc.collect()
    else:

        class Owner:
            def __init__(self, con: apsw.Connection) -> None:
                self.con, self.me = con, self

            def __del__(self) -> None:
                self.con.close()

        Owner(con)
        del con
        gc.collect()
    assert len(registry.all()) == 1, "it was waited for"
    go_on.set()
    until(lambda: registry.all() == [])
    world.comes_back(here)


def test_a_close_waits(world: World) -> None:
    here = world.machine()
    con = opened(here, ack="local", interval=60)
    con.execute("INSERT INTO t VALUES (1)")
    con.close()
    assert registry.all() == []
    world.comes_back(here)


def test_the_last_close_waits_though_another_connection_was_collected_before(world: World) -> None:
    """The thread that closes collected connections may be busy with another database: the count does not wait for it."""
    here = world.machine()
    busy = opened(here, "busy.db", ack="local", interval=60)
    busy.execute("INSERT INTO t VALUES (1)")
    go_on = threading.Event()
    refusal(busy).hold(go_on)
    try:
        in_cycle(busy)
        del busy
        gc.collect()
        con, other = opened(here, ack="local", interval=60), opened(here, ack="local", interval=60)
        con.execute("INSERT INTO t VALUES (1)")
        in_cycle(other)
        del other
        gc.collect()
        con.close()
        assert [replica.path for replica in registry.all()] == [here.path("busy.db")]
        world.comes_back(here)
    finally:
        go_on.set()


def test_a_collected_connection_that_is_opened_again_shares_the_replica(world: World) -> None:
    here = world.machine()
    for _ in range(20):
        con = opened(here)
        con.execute("INSERT INTO t VALUES (1)")
        in_cycle(con)
        del con
        gc.collect()
    con = here.connect()
    assert rows(con) == 20
    world.stored(con)
    con.close()
    until(lambda: registry.all() == [])
    world.comes_back(here)


def test_the_collector_runs_while_the_registry_is_locked(world: World) -> None:
    here = world.machine()
    con = opened(here, ack="local", interval=60)
    con.execute("INSERT INTO t VALUES (1)")
    con.execute("PRAGMA user_version=1")

    def work() -> None:
        nonlocal con
        with registry._lock:
            in_cycle(con)
            del con
            gc.collect()

    in_time(work)
    until(lambda: registry.all() == [])
    world.comes_back(here)


def test_a_close_while_the_registry_is_locked_is_handed_over(world: World) -> None:
    """A finalizer, or a signal handler, calls close() there."""
    here = world.machine()
    con = opened(here, ack="local", interval=60)
    con.execute("INSERT INTO t VALUES (1)")

    def work() -> None:
        with registry._lock:
            con.close()

    in_time(work)
    until(lambda: registry.all() == [])
    world.comes_back(here)


def test_the_collector_closes_a_database_where_threads_are_started(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restore by several threads; while it starts one, the collector closes another database, whose worker wants threads, too."""
    here = world.machine()
    con = opened(here, "large.db")
    for _ in range(20):
        con.execute("INSERT INTO t VALUES (randomblob(3000))")
    con.close()
    os.unlink(here.path("large.db"))
    con = opened(here, ack="local", interval=60)
    bottomless_wal.flush(con)
    con.execute("INSERT INTO t VALUES (zeroblob(40000))")
    in_cycle(con)
    del con
    monkeypatch.setattr(pool, "_shared", pool.Pool(8, name="bottomless of a test"))
    real = threading.Thread.__init__
    collected: list[bool] = []

    def init(self: threading.Thread, *args: Any, **more: Any) -> None:
        if str(more.get("name")).startswith("bottomless of a test") and not collected:
            collected.append(True)
            gc.collect()
        real(self, *args, **more)

    monkeypatch.setattr(threading.Thread, "__init__", init)
    in_time(lambda: rows(here.connect("large.db")))
    assert collected
    until(lambda: [replica.path for replica in registry.all()] == [here.path("large.db")])
    world.comes_back(here)


def test_counters_are_read_without_a_lock(world: World) -> None:
    """A commit of the collector's in a thread that reads them waits for a worker that counts."""
    con = opened(world.machine())
    stats = replica_of(con).store.stats
    with stats._lock:
        in_time(lambda: bottomless_wal.status(con))
    con.close()


@pytest.mark.parametrize("ack", ["pages", "log", "local"])
def test_a_commit_within_the_view_fillers_lock_does_not_hang(world: World, ack: str) -> None:
    """The worker waits for that lock: what commits there is not waited for."""
    here = world.machine()
    con = opened(here, ack=ack)
    filler = replica_of(con).worker._filler

    def work() -> None:
        with filler._lock, contextlib.suppress(ReplicationError):
            con.execute("INSERT INTO t VALUES (1)")

    in_time(work)
    con.execute("INSERT INTO t VALUES (2)")
    bottomless_wal.flush(con)
    assert rows(con) == 2
    world.stored(con)
    con.close()


# --- handlers of logging ---------------------------------------------------------------------------------------------------


class ToDatabase(logging.Handler):
    """Writes each line to a replicated database."""

    def __init__(self, con: apsw.Connection) -> None:
        super().__init__()
        self.con = con
        self.written = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.con.execute("INSERT INTO t VALUES (?)", (record.getMessage(),))
        self.written += 1


@pytest.fixture
def handled() -> Iterator[Callable[[logging.Handler], None]]:
    """Attaches a handler to the root logger, at INFO."""
    root = logging.getLogger()
    level, attached = root.level, []

    def attach(handler: logging.Handler) -> None:
        attached.append(handler)
        root.addHandler(handler)
        root.setLevel(logging.INFO)

    yield attach
    for handler in attached:
        root.removeHandler(handler)
    root.setLevel(level)


@pytest.mark.parametrize("why", ["the worker scans", "the store fails and is asked again", "a library logs as the worker sends"])
def test_a_handler_that_writes_to_the_database_whose_worker_logs(
    two_worlds: World, handled: Callable[[logging.Handler], None], why: str
) -> None:
    """An application's line commits in its own thread while that holds the handler's lock, and the worker has something to say."""
    here = two_worlds.machine()
    con = opened(here, ack="log", pages="off", retry_timeout=10)
    handler = ToDatabase(con)
    handled(handler)
    if why == "the worker scans":
        os.unlink(here.path() + "-bottomless")
    elif why == "the store fails and is asked again":
        replica_of(con).store.stats.retry()
        refused = refusal(con)
        said = threading.Event()

        def once(kind: str, key: str) -> None:
            if kind == "create" and not said.is_set():
                said.set()
                logs.get_logger("bottomless_wal.storage.retry").warning("%s fails", key)

        refused.rules.append(once)
    else:
        library = logging.getLogger("urllib3.of_a_test")
        logs.defer("urllib3")
        refusal(con).rules.append(lambda kind, key: library.info("sending") if kind == "create" and handler.written == 0 else None)
    in_time(lambda: logging.getLogger("app").warning("something happened"))
    assert logs.drain(30)
    assert handler.written >= 2, "the worker has said nothing"
    logging.getLogger().removeHandler(handler)
    assert rows(con) == handler.written
    bottomless_wal.flush(con)
    two_worlds.stored(con, view=False)
    con.close()
    handler.con = None  # type: ignore[assignment]


def test_the_collector_closes_a_database_within_a_handler(world: World, handled: Callable[[logging.Handler], None]) -> None:
    """Its worker has lines to write, for which the handler's lock is needed."""
    here = world.machine()
    con = opened(here, ack="local", pages="off", interval=60)
    bottomless_wal.flush(con)
    con.execute("INSERT INTO t VALUES (1)")
    os.unlink(here.path() + "-bottomless")
    in_cycle(con)
    del con

    class Collecting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.name == "app":
                gc.collect()

    handled(Collecting())
    in_time(lambda: logging.getLogger("app").error("the commit failed"))
    until(lambda: registry.all() == [])
    assert logs.drain(30)


def test_a_handler_opens_the_database_that_is_being_opened(world: World, handled: Callable[[logging.Handler], None]) -> None:
    """A handler that connects when it first writes, while another thread opens the same database and logs."""
    here = world.machine()
    con = opened(here, "log.db")
    con.execute("INSERT INTO t VALUES (1)")
    con.close()
    os.unlink(here.path("log.db"))

    class Lazy(ToDatabase):
        def __init__(self) -> None:
            logging.Handler.__init__(self)
            self.written = 0

        def emit(self, record: logging.LogRecord) -> None:
            if not hasattr(self, "con"):
                self.con = here.connect("log.db")
            super().emit(record)

    handler = Lazy()
    handled(handler)
    in_time(lambda: here.connect("log.db").close())  # it is restored, and says so
    assert logs.drain(30)
    assert handler.written >= 1
    handler.con.close()


# --- signal handlers -------------------------------------------------------------------------------------------------------


def test_a_signal_that_opens_the_database_that_its_thread_is_opening_is_refused(world: World) -> None:
    """Else it would wait for the index's lock, which its own thread holds."""
    here = world.machine()
    con = opened(here)
    con.execute("INSERT INTO t VALUES (1)")
    con.close()
    said: list[str] = []

    def strike() -> None:
        with pytest.raises(ConfigError, match="by this very thread") as caught:
            here.connect()
        said.append(str(caught.value))

    from bottomless_wal.core import failpoints

    failpoints.arm("after open", strike)
    in_time(lambda: rows(here.connect()))
    assert len(said) == 1
    con = here.connect()
    assert rows(con) == 1
    con.close()


def test_a_signal_that_opens_the_database_that_its_thread_is_closing_is_refused(world: World) -> None:
    here = world.machine()
    con = opened(here)
    said: list[str] = []

    def strike() -> None:
        with pytest.raises(ConfigError, match="by this very thread") as caught:
            here.connect()
        said.append(str(caught.value))

    from bottomless_wal.core import failpoints

    failpoints.arm("before close", strike)
    in_time(con.close)
    assert len(said) == 1
    assert registry.all() == []


def test_a_thread_of_ours_opens_nothing(world: World) -> None:
    """A finalizer would: the collector runs it where a commit waits."""
    here = world.machine()

    def work() -> None:
        with threads.as_own_thread(), pytest.raises(ConfigError, match="in a thread that replicates"):
            here.connect()

    in_time(work)


def test_signals_that_open_commit_and_close_all_the_time(world: World) -> None:
    """Every millisecond, in the middle of whatever the main thread does: nothing hangs, and no commit is acknowledged in vain."""
    here = world.machine()
    done: list[int] = []
    acknowledged: list[int] = []
    busy = False
    options = {**world.options, "ack": "log", "pages": "off"}

    def strike(*_: object) -> None:
        nonlocal busy
        if busy or time.monotonic() > end:
            return
        busy = True
        number = len(done)
        done.append(number)
        try:
            with contextlib.closing(
                bottomless_wal.connect(here.path("signal.db"), **{**world.options, "ack": "log", "pages": "off"})
            ) as own:
                own.execute("CREATE TABLE IF NOT EXISTS t(x)")
                own.execute("INSERT INTO t VALUES (?)", (number,))
                acknowledged.append(number)
        except (bottomless_wal.BottomlessError, apsw.Error):
            pass
        finally:
            busy = False

    end = time.monotonic() + 3
    before = signal.signal(signal.SIGALRM, strike)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    count = 0
    try:
        while time.monotonic() < end:
            with contextlib.closing(bottomless_wal.connect(here.path(), **options)) as con:
                con.execute("CREATE TABLE IF NOT EXISTS t(x)")
                for _ in range(5):
                    con.execute("INSERT INTO t VALUES (1)")
                    count += 1
                bottomless_wal.status(con)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    until(lambda: registry.all() == [])
    assert acknowledged
    for file, expected in (("app.db", count), ("signal.db", len(acknowledged))):
        os.unlink(here.path(file))
        con = here.connect(file)
        assert rows(con) >= expected
        con.close()


def test_what_was_just_dropped_is_waited_for_where_it_would_be_in_the_way(world: World) -> None:
    """Other settings for the same file, and another file of the same name, right after the last connection was dropped."""
    here, there = world.machine(), world.machine()
    con = bottomless_wal.connect(here.path(), **{**world.options, "ack": "log"})
    con.execute("CREATE TABLE t(x)")
    del con
    con = bottomless_wal.connect(here.path(), **{**world.options, "ack": "local"})
    con.execute("INSERT INTO t VALUES (1)")
    del con
    con = there.connect()
    assert rows(con) == 1
