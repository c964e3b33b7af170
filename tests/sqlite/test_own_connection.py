"""`apsw.connection_hooks` of the application: they run on its connections, and on none of the replication's."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import apsw
import apsw.bestpractice
import pytest

import bottomless_wal
from bottomless_wal import ReplicationError
from bottomless_wal.runtime import connect
from bottomless_wal.sqlite import own_connection
from bottomless_wal.sqlite.own_connection import OwnConnection
from tests.support.cluster import World, child, refusal, replica_of, rows


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The list of hooks, as it is afterwards again, and so are the defaults."""
    bottomless_wal.register()
    monkeypatch.setattr(connect._opener, "defaults", {})
    before = apsw.connection_hooks
    kept = list(before.data)  # type: ignore[attr-defined]
    yield before
    before.data[:] = kept  # type: ignore[attr-defined]
    apsw.connection_hooks = before


@pytest.mark.parametrize("ack", ["log", "pages", "local"])
@pytest.mark.parametrize("is_first", [False, True])
def test_all_that_apsw_recommends(world: World, ack: str, is_first: bool) -> None:
    """Before and after `register()`: a new database is written, closed, opened, and comes back."""
    here = world.machine()
    done = child(
        """
import apsw.bestpractice
if argv[1] == "after":
    bottomless_wal.register()
apsw.bestpractice.apply(apsw.bestpractice.recommended)
for n in range(2):
    con = connect(argv[0], page_size=8192, ack=argv[2])
    con.execute("CREATE TABLE IF NOT EXISTS t(id INTEGER PRIMARY KEY, x UNIQUE, parent REFERENCES t)")
    for i in range(20):
        con.execute("INSERT INTO t(x) VALUES (?)", (100 * n + i,))
    bottomless_wal.flush(con)
    con.pragma("optimize")
    print(con.pragma("page_size"), con.pragma("foreign_keys"), con.pragma("recursive_triggers"), con.pragma("journal_mode"))
    assert con.wal_checkpoint() is not None
    con.close()
""",
        here.path(),
        "before" if is_first else "after",
        ack,
        options=world.options,
    )
    assert done.stdout == "8192 1 1 wal\n" * 2
    con = here.connect()
    assert rows(con) == 40
    con.close()
    world.comes_back(here)


def test_a_hook_that_writes_writes_once_for_each_connection_of_the_application(world: World, hooks: list[Any]) -> None:
    """Through all that opens connections of ours: boot, commits, scans, checkpoints, a look at the status, close, verification."""
    here = world.machine()
    con = here.connect()
    con.execute("CREATE TABLE opened(x); CREATE TABLE t(x)")
    con.close()
    seen: list[apsw.Connection] = []

    def audit(connection: apsw.Connection) -> None:
        seen.append(connection)
        if "opened" in [name for (name,) in connection.execute("SELECT name FROM sqlite_schema")]:
            connection.execute("INSERT INTO opened VALUES (1)")

    hooks.append(audit)
    os.unlink(here.path() + "-bottomless")  # scan
    con = here.connect()
    con.execute("INSERT INTO t VALUES (1)")
    replica_of(con).on_file_rewritten()
    con.execute("INSERT INTO t VALUES (1)")
    replica_of(con).local._connect().close()
    replica_of(con).local.connect_plain().close()
    bottomless_wal.status(con)
    bottomless_wal.flush(con)
    assert rows(con, "SELECT count(*) FROM opened") == 1
    world.stored(con)
    con.close()
    report = bottomless_wal.verify(here.path(), deep=True, **world.options)
    assert report.problems == []
    assert seen == [con]
    hooks.remove(audit)
    del seen[:]
    world.comes_back(here)


def test_the_commit_of_a_hook_is_replicated(world: World, hooks: list[Any]) -> None:
    here = world.machine()
    con = here.connect()
    con.execute("CREATE TABLE t(x)")
    hooks.append(lambda connection: connection.execute("INSERT INTO t VALUES (1)"))
    other = bottomless_wal.connect(here.path(), **world.options)
    assert rows(con) == 1
    bottomless_wal.flush(con)
    world.stored(con)
    refusal(con).log()
    with pytest.raises(ReplicationError, match="are not stored"):
        bottomless_wal.connect(here.path(), **world.options)
    hooks.clear()
    other.close()
    con.close()


@pytest.mark.parametrize("raw", [False, True])
def test_an_application_assigns_a_list_of_its_own(world: World, hooks: list[Any], raw: bool) -> None:
    """Its hooks run on its connections, none runs on ours, and errors still arrive through the WAL hook."""
    here = world.machine()
    con = here.connect(ack="log")
    con.execute("CREATE TABLE t(x)")
    seen: list[apsw.Connection] = []
    mine = [seen.append]
    apsw.connection_hooks = mine
    replica_of(con).local.connect_plain().close()
    assert seen == []
    apsw.connection_hooks = mine
    bottomless_wal.register(**{**world.options, "ack": "log"})
    other = apsw.Connection(here.path(), vfs="bottomless") if raw else here.connect(ack="log")
    other.execute("CREATE TEMP TABLE u(x)")
    refusal(other).log()
    with pytest.raises(ReplicationError):  # temp is still writing in phase two: this is the WAL hook's
        other.execute("BEGIN; INSERT INTO u VALUES (1); INSERT INTO t VALUES (1); COMMIT")
    assert seen == [other]
    mine.clear()
    assert list(apsw.connection_hooks)[1:] == []
    other.close()
    con.close()


def test_it_is_a_list_to_the_application(hooks: list[Any]) -> None:
    """Ours is not in it, so that nothing which an application does to it takes ours away."""
    alias = hooks.data  # type: ignore[attr-defined]
    seen: list[str] = []

    def one(_: apsw.Connection) -> None:
        seen.append("one")

    def two(_: apsw.Connection) -> None:
        seen.append("two")

    hooks.clear()
    assert len(hooks) == 0
    alias.append(two)
    hooks.insert(0, one)
    assert (hooks[0], hooks[-1], hooks.index(two), one in hooks, len(hooks)) == (one, two, 1, True, 2)
    apsw.Connection("").close()
    assert seen == ["one", "two"]
    OwnConnection("").close()
    assert seen == ["one", "two"]
    apsw.connection_hooks += [two]
    apsw.connection_hooks = apsw.connection_hooks + [one]
    apsw.connection_hooks[:] = list(apsw.connection_hooks)[2:]
    apsw.Connection("").close()
    assert seen[2:] == ["two", "two", "one"]
    hooks.remove(one)
    assert hooks.count(one) == 0


def test_a_signal_handler_opens_a_connection_while_one_of_ours_opens(world: World, hooks: list[Any]) -> None:
    """It is the application's: its hooks run, and what it commits is replicated."""
    here = world.machine()
    con = here.connect("other.db")
    con.execute("CREATE TABLE t(x)")
    opened: list[apsw.Connection] = []
    seen: list[apsw.Connection] = []
    hooks.append(seen.append)

    def handle(*_: object) -> None:
        opened.append(here.connect("app.db"))

    before = signal.signal(signal.SIGUSR1, handle)
    local = replica_of(con).local
    real = local._open

    def opening() -> apsw.Connection:
        outer = own_connection._thread.__dict__.get("opening", False)
        own_connection._thread.opening = True
        try:
            signal.raise_signal(signal.SIGUSR1)
        finally:
            own_connection._thread.opening = outer
        return real()

    try:
        local._open = opening
        local._connect().close()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == opened
    opened[0].execute("CREATE TABLE t(x)")
    bottomless_wal.flush(opened[0])
    world.stored(opened[0])
    opened[0].close()
    con.close()


def test_a_hook_opens_another_replicated_database(world: World, hooks: list[Any]) -> None:
    """The options of `connect()` are for the one that it opens."""
    here = world.machine()
    bottomless_wal.register(**world.options)
    others: list[apsw.Connection] = []

    def hook(connection: apsw.Connection) -> None:
        if not others:
            others.append(connection)
            others[0] = apsw.Connection(here.path("other.db"), vfs="bottomless")

    hooks.append(hook)
    con = here.connect(database_id="shop")
    assert (replica_of(con).config.database_id, replica_of(others[0]).config.database_id) == ("shop", "")
    others[0].close()
    con.close()


def test_our_own_connection_cannot_be_opened(world: World) -> None:
    """For a moment: nobody notices. For longer: a ReplicationError, and no transaction is left behind."""
    here = world.machine()
    con = here.connect(ack="log")
    con.execute("CREATE TABLE t(x)")
    local = replica_of(con).local
    real, fail = local._open, [0]

    def failing() -> apsw.Connection:
        if fail[0]:
            fail[0] -= 1
            raise apsw.CantOpenError("no file descriptor is left")
        return real()

    def lose_the_monitor() -> None:
        assert local._monitor is not None
        local._monitor.close()
        local._monitor = None

    local._open = failing
    lose_the_monitor()
    fail[0] = 3
    con.execute("INSERT INTO t VALUES (1)")
    bottomless_wal.flush(con)
    world.stored(con)
    lose_the_monitor()
    fail[0] = 1 << 30
    with pytest.raises(ReplicationError, match="no file descriptor is left"):
        con.execute("INSERT INTO t VALUES (2)")
    assert not con.in_transaction
    assert "no file descriptor is left" in str(bottomless_wal.status(con).last_error)
    fail[0] = 0
    con.execute("INSERT INTO t VALUES (3)")
    assert rows(con) == 3
    bottomless_wal.flush(con)
    world.stored(con)
    con.close()
    world.comes_back(here)
