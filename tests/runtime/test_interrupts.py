"""Ctrl-C, interrupt(), exceptions in an application's callbacks, the garbage collector: wherever they strike a commit, an open or a close.

The caller hears of it or not; afterwards everything goes on, nothing that was acknowledged is lost, and what stands locally is sent.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import apsw
import pytest

import bottomless_wal
from bottomless_wal import ReplicationError
from bottomless_wal.core import failpoints
from bottomless_wal.core.config import Config
from bottomless_wal.runtime.registry import registry
from tests.support.cluster import Machine, World, child, refusal, replica_of, rows, until


def _start(world: World, **options: Any) -> tuple[Machine, apsw.Connection]:
    here = world.machine()
    con = here.connect(**options)
    con.execute("CREATE TABLE t(x)")
    bottomless_wal.flush(con)
    return here, con


def _sound(world: World, con: apsw.Connection) -> None:
    """One more commit is as good as ever."""
    con.execute("INSERT INTO t VALUES ('afterwards')")
    bottomless_wal.flush(con)
    world.stored(con)
    assert rows(con, "PRAGMA integrity_check") == "ok"


@pytest.fixture
def no_collection() -> Iterator[None]:
    """The collector runs when the test says so."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def unraisable(monkeypatch: pytest.MonkeyPatch) -> list[BaseException | None]:
    """The exceptions that no caller received."""
    seen: list[BaseException | None] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: seen.append(unraisable.exc_value))
    return seen


# --- Ctrl-C -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["a commit", "flush", "close"])
def test_ctrl_c_while_the_worker_uploads(world: World, task: str) -> None:
    """It ends the wait of whoever waits. The upload goes on, and the file can be opened again at once."""
    here, con = _start(world, ack="log" if task == "a commit" else "local", interval=0 if task == "a commit" else 60)
    if task != "a commit":
        con.execute("INSERT INTO t VALUES (1)")
    go_on = threading.Event()
    struck: list[str] = []

    def strike() -> None:
        if not struck:
            struck.append(threading.current_thread().name)
            os.kill(os.getpid(), signal.SIGINT)
            assert go_on.wait(20)

    failpoints.arm("before put", strike)
    work = {"a commit": lambda: con.execute("INSERT INTO t VALUES (1)"), "flush": lambda: bottomless_wal.flush(con), "close": con.close}
    with pytest.raises(KeyboardInterrupt):
        work[task]()
    go_on.set()
    assert struck[0].startswith("bottomless")
    if task == "close":
        con = here.connect()
    assert rows(con) == 1
    _sound(world, con)
    until(lambda: world.bucket.head("app.db") == 3)
    con.close()
    world.comes_back(here)


@pytest.mark.parametrize(
    "point",
    [
        "after open",
        "before rename",
        "after rename",
        "before intent",
        "before put",
        "after put",
        "before header",
        "before view",
        "after seal",
    ],
)
@pytest.mark.parametrize("local", ["missing", "old", "descends"])
def test_ctrl_c_while_it_opens(world: World, local: str, point: str) -> None:
    """Wherever it strikes a restore, a fast-forward or a catch-up, nothing half done is left, and the next open is as good as ever."""
    first, con = _start(world)
    con.execute("INSERT INTO t VALUES (1)")
    con.close()
    here = world.machine()
    if local != "missing":
        here.connect().close()
    if local == "old":
        con = first.connect()
        con.execute("INSERT INTO t VALUES (2)")
        con.close()
    elif local == "descends":
        here.stock_killed("INSERT INTO t VALUES (2)")
    strikes = [1]

    def strike() -> None:
        if threading.current_thread() is threading.main_thread() and strikes:
            strikes.pop()
            signal.raise_signal(signal.SIGINT)

    failpoints.arm(point, strike)
    try:
        here.connect().close()
    except KeyboardInterrupt:
        assert not strikes
    else:
        assert strikes, "it struck, and nobody heard of it"
    failpoints.disarm()
    until(lambda: registry.all() == [])  # an interrupted close is finished by another thread
    assert [name for name in here.files() if name not in ("app.db", "app.db-bottomless", "app.db-wal", "app.db-shm")] == []
    con = here.connect()
    assert rows(con) == (1 if local == "missing" else 2)
    _sound(world, con)
    con.close()
    world.comes_back(here)


# --- the application's own ----------------------------------------------------------------------------------------------------------


class Objection(Exception):
    """What a callback of the application raises."""


def _object(*_: object) -> Any:
    raise Objection("the application objects")


CALLBACKS: dict[str, Callable[[apsw.Connection], object]] = {
    "commit hook": lambda con: con.set_commit_hook(_object),
    "update hook": lambda con: con.set_update_hook(_object),
    "progress handler": lambda con: con.set_progress_handler(_object, 1),
    "progress handler that aborts": lambda con: con.set_progress_handler(lambda: True, 1),
    "authorizer": lambda con: con.set_authorizer(_object),
    "execution tracer": lambda con: con.set_exec_trace(_object),
    "row tracer": lambda con: con.set_row_trace(_object),
    "profiler": lambda con: con.set_profile(_object),
    "rollback hook": lambda con: con.set_rollback_hook(_object),
    "preupdate hook": lambda con: con.preupdate_hook(_object),
    "WAL hook": lambda con: con.set_wal_hook(_object),
    "function": lambda con: con.create_scalar_function("f", _object),
}


def test_an_exception_in_a_callback_of_the_application(world: World) -> None:
    """Whatever it does to the statement: what is committed is stored, what is not is nowhere, and the next commit is as good as ever."""
    here = _start(world)[0]
    for name, install in CALLBACKS.items():
        con = here.connect()
        before = rows(con)
        con.create_scalar_function("f", lambda value: value)
        try:
            install(con)
        except AttributeError:  # not every build of SQLite has a preupdate hook
            continue
        raised = False
        try:
            con.execute("INSERT INTO t VALUES (f(1)) RETURNING x").fetchall()
        except (Objection, apsw.Error):
            raised = True
        con.close()
        con = here.connect()
        assert raised or rows(con) == before + 1, name
        bottomless_wal.flush(con)
        world.stored(con)
        _sound(world, con)
        con.close()
    world.connections[0].close()
    world.comes_back(here)


def test_interrupt_during_the_upload_harms_no_commit(world: World) -> None:
    """`Connection.interrupt()` of another thread, while COMMIT waits: either answer is right, and the commit is stored."""
    here, con = _start(world, ack="log")
    strikes: list[BaseException | None] = []
    failpoints.arm("before put", con.interrupt)
    for n in range(3):
        try:
            con.execute("INSERT INTO t VALUES (?)", (n,))
            strikes.append(None)
        except apsw.InterruptError as error:
            strikes.append(error)
    failpoints.disarm()
    assert rows(con) == 3
    bottomless_wal.flush(con)
    world.stored(con)
    _sound(world, con)
    con.close()
    world.comes_back(here)


# --- the garbage collector ----------------------------------------------------------------------------------------------------------


def _leave(world: World, here: Machine, ack: str) -> None:
    """A RETURNING statement in the middle of its two rows, in a cycle: it commits when it is collected."""
    other = bottomless_wal.connect(here.path(), **{**world.options, "ack": ack})
    cursor = other.execute("INSERT INTO t VALUES (2), (3) RETURNING x")
    next(cursor)
    cycle: list[object] = [other, cursor]
    cycle.append(cycle)


def test_a_commit_that_the_collector_makes_in_a_thread_of_ours(
    world: World, no_collection: None, unraisable: list[BaseException | None]
) -> None:
    """A RETURNING statement commits when its cursor is collected: in the worker, which must not wait for itself, and says so."""
    here, con = _start(world, ack="log")
    made, collected = threading.Event(), threading.Event()
    real = replica_of(con).replicator.on_logged

    def collect(position: Any) -> None:
        if not collected.is_set():
            assert made.wait(20)
            gc.collect()
            collected.set()
        real(position)

    replica_of(con).replicator.on_logged = collect
    replica_of(con).worker.submit()
    thread = threading.Thread(target=con.execute, args=("INSERT INTO t VALUES (1)",), daemon=True)
    thread.start()
    until(lambda: world.bucket.head("app.db") == 2)

    _leave(world, here, "log")
    made.set()
    thread.join(20)
    assert collected.is_set()
    assert not thread.is_alive(), "the commit still waits"
    assert "a thread of the replication" in str(unraisable[0])
    assert rows(con) == 3
    _sound(world, con)
    con.close()
    world.comes_back(here)


@pytest.mark.parametrize("ack", ["log", "local"])
@pytest.mark.parametrize("place", ["submitting", "asking for the tip"])
def test_a_commit_that_the_collector_makes_within_another_one(
    world: World, no_collection: None, unraisable: list[BaseException | None], ack: str, place: str
) -> None:
    """In the thread that holds the worker's lock, or the one of the tip: it must not wait for itself, and says so where it cannot wait."""
    here, con = _start(world, ack=ack)
    replica = replica_of(con)
    collected: list[int] = []

    def collect() -> None:
        if threading.current_thread() is thread and not collected:
            collected.append(0)
            _leave(world, here, ack)  # the commit it is in stands already: the write lock is free
            collected[0] = gc.collect()

    if place == "submitting":
        real_clock = replica.worker._clock

        def clock() -> float:
            if replica.worker._cond._is_owned():  # type: ignore[attr-defined]
                collect()
            return real_clock()

        replica.worker._clock = clock
        replica.worker._oldest = None
    else:
        real_header = replica.local._tip_wal.header

        def header() -> Any:
            collect()
            return real_header()

        replica.local._tip_wal.header = header  # type: ignore[method-assign]
    thread = threading.Thread(target=con.execute, args=("INSERT INTO t VALUES (1)",), daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "the commit waits for itself"
    if ack == "log" or place == "submitting":
        assert collected
    if ack == "log" and place == "asking for the tip":
        assert "in the middle of another commit" in str(unraisable[0])
    else:
        assert unraisable == []
    assert rows(con) == 1 + 2 * len(collected)
    bottomless_wal.flush(con)
    world.stored(con)
    con.close()
    world.comes_back(here)


@pytest.mark.parametrize("ack", ["log", "pages"])
@pytest.mark.parametrize("file", ["app.db", "other.db"])
def test_a_signal_handler_commits_within_a_commit(world: World, file: str, ack: str) -> None:
    """To another database it waits as usual. To the same one it cannot, while its thread asks for the tip: then it raises."""
    here, con = _start(world, ack=ack)
    other = here.connect(file, ack=ack)
    other.execute("CREATE TABLE IF NOT EXISTS t(x)")
    replica = replica_of(con)
    outcomes: list[BaseException | int | None] = []

    def handle(*_: object) -> None:
        try:
            other.execute("INSERT INTO t VALUES ('handler')")
            outcomes.append(bottomless_wal.status(other).pending_frames)
        except ReplicationError as error:
            outcomes.append(error)

    real = replica.local._tip_wal.header

    def header() -> Any:
        if threading.current_thread() is threading.main_thread() and not outcomes:
            signal.raise_signal(signal.SIGUSR1)
        return real()

    before = signal.signal(signal.SIGUSR1, handle)
    replica.local._tip_wal.header = header  # type: ignore[method-assign]
    try:
        con.execute("INSERT INTO t VALUES ('main')")
    finally:
        signal.signal(signal.SIGUSR1, before)
    if file == "other.db":
        assert outcomes == [0], "it returned before it was stored"
    else:
        assert "stands and is pending: this thread cannot wait for it" in str(outcomes[0])
        bottomless_wal.flush(con)
        assert rows(con) == 2
    _sound(world, con)
    other.close()
    con.close()
    world.comes_back(here)


def test_a_signal_handler_uses_the_very_connection_that_commits(world: World) -> None:
    """SQLite would write into a cache that it is about to declare clean. It is refused, and the commit is as good as any."""
    here, con = _start(world, ack="log")
    outcomes: list[BaseException | None] = []

    def handle(*_: object) -> None:
        try:
            con.execute("INSERT INTO t VALUES ('handler')")
            outcomes.append(None)
        except apsw.ThreadingViolationError as error:
            outcomes.append(error)

    def strike() -> None:
        if not outcomes:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
            until(lambda: bool(outcomes))

    before = signal.signal(signal.SIGUSR1, handle)
    failpoints.arm("before put", strike)
    try:
        con.execute("INSERT INTO t VALUES ('main')")
    finally:
        failpoints.disarm()
        signal.signal(signal.SIGUSR1, before)
    assert "in the middle of a commit" in str(outcomes[0])
    assert con.exec_trace is None
    assert rows(con) == 1
    _sound(world, con)
    con.close()
    world.comes_back(here)


def test_an_error_of_sqlite_out_of_a_signal_handler(world: World) -> None:
    """BUSY out of phase two would leave a transaction that is neither committed nor rolled back: it comes as a ReplicationError."""
    here, con = _start(world, ack="log")
    struck: list[int] = []

    def handle(*_: object) -> None:
        raise apsw.BusyError("the handler's own")

    def strike() -> None:
        if not struck:
            struck.append(0)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, handle)
    failpoints.arm("before put", strike)
    try:
        with pytest.raises(ReplicationError, match="the handler's own"):
            con.execute("INSERT INTO t VALUES ('main')")
    finally:
        failpoints.disarm()
        signal.signal(signal.SIGUSR1, before)
    assert not con.in_transaction
    assert rows(con) == 1
    _sound(world, con)
    con.close()
    world.comes_back(here)


def test_ctrl_c_while_a_commit_with_ack_local_says_so(world: World) -> None:
    """Just before the worker is called: the commits that follow are sent, though nobody flushes."""
    here, con = _start(world, ack="local")
    worker = replica_of(con).worker
    bottomless_wal.flush(con)
    until(lambda: worker._idle)
    real = worker._wake.notify
    strikes: list[int] = []

    def notify(count: int = 1) -> None:
        if threading.current_thread() is threading.main_thread() and not strikes:
            strikes.append(count)
            raise KeyboardInterrupt
        real(count)

    worker._wake.notify = notify  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        con.execute("INSERT INTO t VALUES (1)")
    con.execute("INSERT INTO t VALUES (2)")
    until(lambda: world.bucket.log_image("app.db") == con.serialize("main"))
    assert strikes
    con.close()
    world.comes_back(here)


class CollectingDict(dict[str, Any]):
    """The collector runs right after something was found in it."""

    def get(self, key: str, default: Any = None) -> Any:
        found = super().get(key, default)
        gc.collect()
        return found


@pytest.mark.parametrize("ack", ["log", "local"])
@pytest.mark.parametrize("when", ["its replica was found", "the settings are compared"])
def test_the_last_connection_is_collected_while_the_next_one_opens(
    world: World, monkeypatch: pytest.MonkeyPatch, no_collection: None, when: str, ack: str
) -> None:
    """The new connection does not get the replica that the collector has just closed, nor wait for it for ever: what it commits is sent."""
    here = world.machine()

    def leave() -> None:
        con = bottomless_wal.connect(here.path(), **{**world.options, "ack": ack})
        con.execute("CREATE TABLE t(x)")
        bottomless_wal.flush(con)
        cycle: list[object] = [con]
        cycle.append(cycle)

    leave()
    real = Config.__eq__

    def collect(self: Config, other: object) -> bool:
        gc.collect()
        return real(self, other)

    opened: list[apsw.Connection] = []
    with monkeypatch.context() as patch:
        if when == "the settings are compared":
            patch.setattr(Config, "__eq__", collect)
        else:
            patch.setattr(registry, "_replicas", CollectingDict(registry._replicas))
        thread = threading.Thread(target=lambda: opened.append(here.connect(ack=ack)), daemon=True)
        thread.start()
        thread.join(20)
        assert opened, "it still waits"
        kept = dict(registry._replicas)
    registry._replicas.update(kept)
    con = opened[0]
    con.execute("INSERT INTO t VALUES (1)")
    until(lambda: world.bucket.head("app.db") == 2)
    _sound(world, con)
    con.close()
    world.comes_back(here)


def test_a_connection_collected_in_the_middle_of_another_ones_commit(world: World, no_collection: None) -> None:
    """With a cursor still open, in a cycle, of this database and of another one: each is closed and drained, nothing waits for ever."""
    here, con = _start(world, ack="log")
    for file in ("app.db", "other.db"):
        other = bottomless_wal.connect(here.path(file), **{**world.options, "ack": "log"})
        other.execute("CREATE TABLE IF NOT EXISTS t(x); INSERT INTO t VALUES (1), (2)")
        cycle: list[object] = [other, other.execute("SELECT x FROM t")]
        cycle.append(cycle)
        del other, cycle
        before = rows(con)
        con.set_commit_hook(lambda: bool(gc.collect()) and False)
        failpoints.arm("before put", lambda: print(gc.collect()))
        con.execute("INSERT INTO t VALUES (3)")
        failpoints.disarm()
        con.set_commit_hook(None)
        assert rows(con) == before + 1
    until(lambda: registry.get(os.path.realpath(here.path("other.db"))) is None)
    assert world.bucket.log_image("other.db") == here.content("other.db")
    _sound(world, con)
    con.close()
    world.comes_back(here)


def test_a_connection_opened_here_is_closed_there(world: World) -> None:
    """The last close may be another thread's, and drains there."""
    here, con = _start(world, ack="local", interval=60)
    con.execute("INSERT INTO t VALUES (1)")
    thread = threading.Thread(target=con.close)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    world.comes_back(here)


def test_a_worker_that_somebody_has_ended_is_an_error_and_no_silence(world: World) -> None:
    """Some program ends threads that it does not know, by an exception: commits raise, or go later, and the next open sends everything."""
    here = world.machine()
    child(
        """
import ctypes
con = connect(argv[0])
con.execute("CREATE TABLE t(x)")
for thread in threading.enumerate():
    if thread.name.startswith("bottomless"):
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
for n in range(3):
    try:
        con.execute("INSERT INTO t VALUES (?)", (n,))
    except bottomless_wal.ReplicationError:
        pass
con.close()
""",
        here.path(),
        options=world.options,
    )
    con = here.connect()
    assert rows(con) == 3
    _sound(world, con)


def test_a_refused_commit_and_ctrl_c_at_once(world: World) -> None:
    """The error is not lost with the interrupt: what is pending stays pending, and goes with the next commit."""
    here, con = _start(world, ack="log")
    store = refusal(con)
    store.log()
    strikes = [signal.SIGINT]  # once: a retry in the background would strike the test itself

    def strike() -> None:
        if strikes:
            signal.pthread_kill(threading.main_thread().ident or 0, strikes.pop())

    failpoints.arm("before put", strike)
    with pytest.raises((KeyboardInterrupt, ReplicationError)):
        con.execute("INSERT INTO t VALUES (1)")
    failpoints.disarm()
    assert rows(con) == 1
    store.nothing()
    _sound(world, con)
    con.close()
    world.comes_back(here)
