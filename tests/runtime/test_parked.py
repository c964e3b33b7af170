"""An error of a commit that no caller received is raised at the next use of its connection, and an error that was received is not.

SQLite commits an INSERT ... RETURNING when its cursor is reset; if that is a deallocation, an error goes to `sys.unraisablehook`.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import apsw
import pytest

import bottomless_wal
from bottomless_wal import FencedError, ReplicationError
from bottomless_wal.runtime import connect
from bottomless_wal.runtime.registry import registry
from bottomless_wal.sqlite import parked
from tests.support.cluster import Machine, World, child, refusal, replica_of, rows, until

INSERT = "INSERT INTO t(x) VALUES (1) RETURNING id"
LATE = "an earlier commit of this connection was not acknowledged"


@pytest.fixture
def unraisable(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The exceptions that no caller received."""
    seen: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: seen.append(str(unraisable.exc_value)))
    yield seen
    assert parked._parked == {}, "an error outlives its connection"


def _start(world: World, **options: Any) -> tuple[Machine, apsw.Connection]:
    here = world.machine()
    con = here.connect(**{"ack": "log", **options})
    con.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, x); INSERT INTO t VALUES (1, zeroblob(10))")
    bottomless_wal.flush(con)
    return here, con


def _next(con: apsw.Connection) -> object:
    return next(con.execute(INSERT))


def _fetchone(con: apsw.Connection) -> object:
    return con.execute(INSERT).fetchone()


def _break(con: apsw.Connection) -> object:
    for row in con.execute(INSERT):
        return row
    return None


def _many(con: apsw.Connection) -> object:
    return next(con.executemany("INSERT INTO t(x) VALUES (?) RETURNING id", [(1,), (2,)]))


def _forced(con: apsw.Connection) -> None:
    cursor = con.execute(INSERT)
    next(cursor)
    cursor.close(True)


def _cycle(con: apsw.Connection) -> None:
    cursor = con.execute(INSERT)
    next(cursor)
    cycle: list[object] = [cursor]
    cycle.append(cycle)
    del cursor, cycle
    gc.collect()


def _blob(con: apsw.Connection) -> None:
    blob = con.blob_open("main", "t", "x", 1, True)
    blob.write(b"hello")
    del blob


LOST: dict[str, Callable[[apsw.Connection], object]] = {
    "next": _next,
    "fetchone": _fetchone,
    "break": _break,
    "executemany": _many,
    "forced close": _forced,
    "a cycle": _cycle,
    "blob": _blob,
}


@pytest.mark.parametrize("way", LOST)
def test_an_error_that_no_caller_received_is_raised_by_the_next_statement(world: World, unraisable: list[str], way: str) -> None:
    """Once, and that statement is not executed. The commits are stored with the next one that succeeds."""
    here, con = _start(world)
    before = rows(con)
    store = refusal(con)
    store.log()
    LOST[way](con)
    assert len(unraisable) == 1
    with pytest.raises(ReplicationError, match=LATE) as late:
        con.execute("INSERT INTO t(x) VALUES ('not executed')")
    assert "This statement was not executed" in late.value.hint
    store.nothing()
    assert rows(con, "SELECT count(*) FROM t WHERE x = 'not executed'") == 0
    assert rows(con) == before + (way != "blob")
    assert con.exec_trace is None
    con.execute("INSERT INTO t(x) VALUES (2)")
    bottomless_wal.flush(con)
    world.stored(con)
    con.close()
    world.comes_back(here)


def _with(con: apsw.Connection) -> None:
    try:
        with con:
            con.execute("INSERT INTO t(x) VALUES (1)")
    except apsw.SQLError as error:
        assert isinstance(error.__context__, ReplicationError)
        raise error.__context__ from None


def _closed(con: apsw.Connection) -> None:
    cursor = con.execute(INSERT)
    next(cursor)
    cursor.close()


def _used_again(con: apsw.Connection) -> None:
    cursor = con.execute(INSERT)
    next(cursor)
    cursor.execute("SELECT 1")


def _blob_closed(con: apsw.Connection) -> None:
    with con.blob_open("main", "t", "x", 1, True) as blob:
        blob.write(b"hello")


def _or_fail(con: apsw.Connection) -> None:
    con.execute("INSERT OR FAIL INTO t(id, x) VALUES (1000, 'a'), (1000, 'b')")


def _elsewhere(con: apsw.Connection) -> None:
    caught: list[BaseException] = []

    def work() -> None:
        try:
            con.execute("INSERT INTO t(x) VALUES (1)")
        except ReplicationError as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    raise caught[0]


def _stripped(con: apsw.Connection) -> None:
    try:
        con.execute("INSERT INTO t(x) VALUES (1)")
    except ReplicationError as error:
        error.__traceback__ = None
        world_keeps.append(error)
        raise ReplicationError("received") from None


world_keeps: list[BaseException] = []

RECEIVED: dict[str, Callable[[apsw.Connection], object]] = {
    "execute": lambda con: con.execute("INSERT INTO t(x) VALUES (1)"),
    "returning, all": lambda con: con.execute(INSERT).fetchall(),
    "get": lambda con: con.execute(INSERT).get,
    "commit": lambda con: con.execute("BEGIN; INSERT INTO t(x) VALUES (1); COMMIT"),
    "executemany": lambda con: con.executemany("INSERT INTO t(x) VALUES (?)", [(1,)]),
    "with": _with,
    "cursor closed": _closed,
    "cursor used again": _used_again,
    "blob": _blob_closed,
    "or fail": _or_fail,
    "another thread": _elsewhere,
    "traceback taken off": _stripped,
}


@pytest.mark.parametrize("is_kept", [False, True])
@pytest.mark.parametrize("way", RECEIVED)
def test_an_error_that_a_caller_received_is_raised_once(world: World, unraisable: list[str], way: str, is_kept: bool) -> None:
    """Whether or not the exception is still alive at the next use."""
    here, con = _start(world)
    store = refusal(con)
    store.log()
    kept: list[BaseException] = []
    try:
        RECEIVED[way](con)
    except ReplicationError as error:
        if is_kept:
            kept.append(error)
    else:
        pytest.fail("no error")
    world_keeps.clear()
    assert rows(con, "SELECT 1") == 1
    assert con.exec_trace is None
    assert unraisable == []
    store.nothing()
    con.execute("INSERT INTO t(x) VALUES (2)")
    bottomless_wal.flush(con)
    world.stored(con)
    con.close()
    world.comes_back(here)


def test_the_close_raises_it_after_everything_is_closed(world: World, unraisable: list[str]) -> None:
    here, con = _start(world)
    store = refusal(con)
    store.log()
    _next(con)
    with pytest.raises(ReplicationError, match=LATE):
        con.close()
    assert registry.all() == []
    again = here.connect()
    assert rows(again) == 2
    bottomless_wal.flush(again)
    world.stored(again)
    again.close()
    world.comes_back(here)


def test_what_has_been_stored_since_is_not_an_error_any_more(world: World, unraisable: list[str]) -> None:
    here, con = _start(world)
    for use in ("statement", "close"):
        store = refusal(con)
        store.log()
        _next(con)
        store.nothing()
        if use == "statement":
            bottomless_wal.flush(con)
            assert rows(con) == 2
    con.close()  # it sends what is pending
    world.comes_back(here)
    assert len(unraisable) == 2


def test_the_tracer_of_the_application_is_called_and_comes_back(world: World, unraisable: list[str]) -> None:
    here, con = _start(world)
    seen: list[str] = []

    def trace(_: object, sql: str, __: object) -> bool:
        seen.append(sql)
        return True

    con.exec_trace = trace
    store = refusal(con)
    store.log()
    with pytest.raises(ReplicationError):
        con.execute("INSERT INTO t(x) VALUES (1)")
    armed = con.exec_trace
    assert armed is not trace
    assert rows(con, "SELECT 1") == 1
    assert con.exec_trace is trace
    con.exec_trace = armed  # an application puts back what it has found there
    assert rows(con, "SELECT 2") == 2
    assert con.exec_trace is trace
    assert seen == ["INSERT INTO t(x) VALUES (1)", "SELECT 1", "SELECT 2"]
    store.nothing()
    con.close()
    world.comes_back(here)


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_connection_that_is_dropped_after_an_error_is_closed_at_once(world: World, unraisable: list[str], is_lost: bool) -> None:
    """By its reference count alone: nothing here holds the exception, whose traceback holds the connection."""
    here, first = _start(world)
    first.close()
    gc.collect()
    gc.disable()
    try:

        def use() -> weakref.ref[apsw.Connection]:
            con = bottomless_wal.connect(here.path(), **{**world.options, "ack": "log"})
            refusal(con).log()
            if is_lost:
                _next(con)
            else:
                with contextlib.suppress(ReplicationError):
                    con.execute("INSERT INTO t(x) VALUES (1)")
            return weakref.ref(con)

        assert use()() is None
        until(lambda: registry.all() == [])  # the collector is off
        assert len(unraisable) == 2 * is_lost
    finally:
        gc.enable()
    again = here.connect()
    bottomless_wal.flush(again)
    world.stored(again)
    again.close()


def test_an_error_of_two_databases_whose_cursor_is_deallocated(world: World, unraisable: list[str]) -> None:
    """Phase two cannot raise while another schema is writing, and no WAL hook comes: it is raised at the next use."""
    here, con = _start(world)
    con.execute("CREATE TEMP TABLE log(x); CREATE TEMP TRIGGER r AFTER INSERT ON t BEGIN INSERT INTO log VALUES (new.x); END")
    store = refusal(con)
    store.log()
    _next(con)
    with pytest.raises(ReplicationError, match=LATE):
        con.execute("SELECT 1")
    store.nothing()
    con.execute("INSERT INTO t(x) VALUES (2)")
    assert rows(con, "SELECT count(*) FROM temp.log") == 2
    bottomless_wal.flush(con)
    world.stored(con)
    con.close()
    world.comes_back(here)


def test_a_fence_that_no_caller_was_told_of(world: World, unraisable: list[str]) -> None:
    _, con = _start(world)
    child("connect(argv[0]).execute('INSERT INTO t(x) VALUES (99)')", world.machine().path(), options=world.options)
    _next(con)
    with pytest.raises(FencedError, match=LATE):
        con.execute("SELECT 1")
    con.close()


def test_ctrl_c_that_a_deallocation_swallows(world: World, unraisable: list[str]) -> None:
    """The wait was ended, and its commit is not stored: the next statement says so."""
    here, con = _start(world)
    go_on = threading.Event()
    store = refusal(con)
    store.hold(go_on, "create")
    worker = replica_of(con).worker
    real = worker.wait

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    worker.wait = interrupted  # type: ignore[method-assign]
    _next(con)
    worker.wait = real  # type: ignore[method-assign]
    with pytest.raises(ReplicationError, match="KeyboardInterrupt"):
        con.execute("SELECT 1")
    worker.wait = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        con.execute("INSERT INTO t(x) VALUES (1)")
    worker.wait = real  # type: ignore[method-assign]
    assert rows(con) == 3
    go_on.set()
    until(lambda: world.bucket.log_image("app.db") == con.serialize("main"))
    con.close()
    world.comes_back(here)


def test_asynchronous_use(world: World, unraisable: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors arrive in the coroutine, once; a lost one at the connection's next use."""
    here, first = _start(world)
    store = refusal(first)

    monkeypatch.setattr(connect._opener, "defaults", {**world.options, "ack": "log"})

    async def main() -> None:
        con = await apsw.Connection.as_async(here.path(), vfs="bottomless")
        store.log()
        with pytest.raises(ReplicationError, match="are not stored"):
            await con.execute("INSERT INTO t(x) VALUES (1)")
        assert await (await con.execute("SELECT 1")).get == 1
        await con.async_run(lambda: _next(con))
        with pytest.raises(ReplicationError, match=LATE):
            await con.execute("SELECT 1")
        store.nothing()
        await con.execute("INSERT INTO t(x) VALUES (1)")
        await con.aclose()

    asyncio.run(main())
    assert len(unraisable) == 1
    assert rows(first) == 4
    bottomless_wal.flush(first)
    world.stored(first)
    first.close()
    world.comes_back(here)
