"""Facts about SQLITE_FCNTL_COMMIT_PHASETWO, where a commit is caught, and the WAL hook, where an error is raised."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import apsw
import pytest

BIG = "INSERT INTO {} SELECT randomblob(3000) FROM b.r LIMIT 200"
NUMBERS = "WITH RECURSIVE c(v) AS (SELECT 1 UNION ALL SELECT v+1 FROM c WHERE v<2000) INSERT INTO {} SELECT v FROM c"


def _returning_closed_early(c: apsw.Connection) -> None:
    cursor = c.execute("INSERT INTO t(x) VALUES('r') RETURNING id")
    next(cursor)
    cursor.close()


def _returning_collected(c: apsw.Connection) -> None:
    cursor = c.execute("INSERT INTO t(x) VALUES('r') RETURNING id")
    cursor.fetchone()
    del cursor


def _or_fail(c: apsw.Connection) -> None:
    with pytest.raises(apsw.ConstraintError):
        c.execute("INSERT OR FAIL INTO t(id,x) VALUES(1000,'a'),(1001,'b'),(1000,'c')")


def _blob(c: apsw.Connection) -> None:
    with c.blob_open("main", "u", "b", 1, True) as blob:
        blob.write(b"hello")


def _backup(c: apsw.Connection) -> None:
    source = apsw.Connection("source.db")
    source.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, x); INSERT INTO t(x) VALUES('backup')")
    with c.backup("main", source, "main") as backup:
        backup.step()
    source.close()


def _context_manager(c: apsw.Connection) -> None:
    with c:
        c.execute("INSERT INTO t(x) VALUES('w')")


def _active_reader(c: apsw.Connection) -> None:
    cursor = c.execute("SELECT * FROM u")
    next(cursor)
    c.execute("INSERT INTO t(x) VALUES('a')")
    cursor.close()


WAYS: dict[str, tuple[Callable[[apsw.Connection], object], bool]] = {
    "autocommit": (lambda c: c.execute("INSERT INTO t(x) VALUES(1)"), True),
    "begin commit": (lambda c: c.execute("BEGIN; INSERT INTO t(x) VALUES(1); COMMIT"), True),
    "release": (lambda c: c.execute("SAVEPOINT s; INSERT INTO t(x) VALUES(1); RELEASE s"), True),
    "with": (_context_manager, True),
    "returning, all fetched": (lambda c: c.execute("INSERT INTO t(x) VALUES(1) RETURNING id").fetchall(), True),
    "active reader": (_active_reader, True),
    "vacuum": (lambda c: c.execute("VACUUM"), True),
    "ddl": (lambda c: c.execute("CREATE TABLE v(x)"), True),
    "returning, closed early": (_returning_closed_early, False),
    "returning, collected": (_returning_collected, False),
    "or fail": (_or_fail, False),
    "blob": (_blob, False),
    "backup": (_backup, False),
}


@pytest.fixture
def t(connect: Any) -> apsw.Connection:
    connection: apsw.Connection = connect(watched=True, wal=True)
    connection.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, x); CREATE TABLE u(b); INSERT INTO u VALUES(zeroblob(10))")
    return connection


@pytest.mark.parametrize("way", WAYS)
def test_fires_for_every_way_to_commit(watch: Any, t: apsw.Connection, way: str) -> None:
    """Phase two sees every WAL commit, also those that get no WAL hook: it, not the hook, is where a commit is caught."""
    hooked: list[int] = []

    def hook(c: apsw.Connection, name: str, frames: int) -> int:
        hooked.append(frames)
        return 0

    t.set_wal_hook(hook)
    watch.phases.clear()
    act, gets_hook = WAYS[way]
    act(t)
    assert watch.phases == ["a.db"]
    assert bool(hooked) == gets_hook


def test_fires_for_an_attached_database(watch: Any, connect: Any) -> None:
    """A database attached through the VFS is seen though its connection's main database is not ours."""
    plain = connect("plain.db", uri=True)
    connect("a.db", wal=True).execute("CREATE TABLE t(x)")
    plain.execute(f"ATTACH 'file:a.db?vfs={watch.name}' AS a")
    plain.execute("INSERT INTO a.t VALUES(1)")
    assert watch.phases == ["a.db"]


def test_not_for_a_rollback_or_a_read(watch: Any, t: apsw.Connection) -> None:
    """Neither a read nor a ROLLBACK comes to phase two: only commits cost anything."""
    watch.phases.clear()
    t.execute("SELECT * FROM t").fetchall()
    t.execute("BEGIN; INSERT INTO t(x) VALUES(1); ROLLBACK")
    assert watch.phases == []


def test_fires_in_rollback_mode_at_journal_mode_wal(watch: Any, connect: Any) -> None:
    """`journal_mode=wal` is a rollback-mode commit: phase two fires and there are no frames, so it may only mark needs-scan."""
    frames: list[int] = []
    watch.on["phase two"] = lambda _: frames.append(os.path.getsize("a.db-wal") if os.path.exists("a.db-wal") else 0)
    connect(watched=True, wal=True)
    assert set(frames) == {0}


def test_journal_mode_wal_writes_page_one_past_the_wal(watch: Any, connect: Any) -> None:
    """The conversion changes page 1 in the main file itself: reading frames alone would miss it."""
    connect().execute("CREATE TABLE t(x)")
    written: list[int] = []
    watch.on["main xWrite"] = lambda data, offset: written.append(offset)
    connect(watched=True).execute("PRAGMA journal_mode=wal").fetchall()
    assert 0 in written
    with open("a.db", "rb") as file:
        assert file.read(20)[18:] == b"\2\2"
    assert not os.path.exists("a.db-wal") or os.path.getsize("a.db-wal") == 0


@pytest.mark.parametrize("backfilled", [False, True])
def test_the_committers_read_lock_stops_a_restart(watch: Any, connect: Any, tools: Any, backfilled: bool) -> None:
    """In phase two nobody, not even through another VFS, can restart or truncate the WAL under us; commits of others pass."""
    writer, other = connect(watched=True, wal=True), connect()
    other.set_busy_timeout(0)
    writer.execute("CREATE TABLE t(x)")
    other.execute("SELECT * FROM t").fetchall()
    if backfilled:  # the committer's snapshot then began on the main file alone
        other.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_RESTART)
    seen: dict[str, object] = {}

    def attack(_: object) -> None:
        watch.on.clear()
        before = tools.salts("a.db")
        for mode in ("RESTART", "TRUNCATE"):
            try:
                seen[mode] = other.wal_checkpoint(mode=getattr(apsw, f"SQLITE_CHECKPOINT_{mode}"))
            except apsw.BusyError:
                seen[mode] = "busy"
        other.execute("INSERT INTO t VALUES('other')")
        seen["same WAL"] = tools.salts("a.db") == before

    watch.on["phase two"] = attack
    writer.execute("INSERT INTO t VALUES('ours')")
    assert seen == {"RESTART": "busy", "TRUNCATE": "busy", "same WAL": True}


def test_the_wal_hook_does_not_hold_a_restart_off(connect: Any) -> None:
    """In the WAL hook the read lock is gone and another connection may truncate the WAL: too late to read frames there."""
    writer, other = connect(wal=True), connect()
    writer.execute("CREATE TABLE t(x)")
    other.execute("SELECT * FROM t").fetchall()
    sizes: list[int] = []

    def hook(c: apsw.Connection, name: str, frames: int) -> int:
        other.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        sizes.append(os.path.getsize("a.db-wal"))
        return 0

    writer.set_wal_hook(hook)
    writer.execute("INSERT INTO t VALUES(1)")
    assert sizes == [0]


class Down(apsw.SQLError):
    """Stands for our ReplicationError."""


def _fail(watch: Any, error: Callable[[], BaseException] = lambda: Down("storage is down"), only: str = "") -> None:
    def action(file: Any) -> None:
        if only in ("", file.base):
            raise error()

    watch.on["phase two"] = action


def _others_see(path: str, table: str = "t") -> int:
    other = apsw.Connection(path)
    try:
        assert other.execute("PRAGMA integrity_check").get == "ok"
        return int(other.execute(f"SELECT count(*) FROM {table}").get)
    finally:
        other.close()


@pytest.mark.parametrize(
    ("sql", "still_open"),
    [
        ("INSERT INTO t(x) VALUES(1)", False),
        ("BEGIN; INSERT INTO t(x) VALUES(1); COMMIT", False),
        ("SAVEPOINT s; INSERT INTO t(x) VALUES(1); RELEASE s", True),
    ],
)
def test_raising_when_alone_is_clean(watch: Any, t: apsw.Connection, sql: str, still_open: bool) -> None:
    """Raised with one schema writing: the error arrives as itself, the commit stands; only after RELEASE must one ROLLBACK."""
    _fail(watch)
    with pytest.raises(Down):
        t.execute(sql)
    watch.on.clear()
    assert _others_see("a.db") == 1
    assert t.in_transaction == still_open
    if still_open:
        t.execute("ROLLBACK")
    t.execute("INSERT INTO t(x) VALUES(2)")
    assert _others_see("a.db") == 2


@pytest.mark.parametrize(
    ("error", "phantom"), [(apsw.SQLError, False), (apsw.IOError, False), (apsw.FullError, False), (apsw.BusyError, True)]
)
def test_busy_leaves_a_phantom_transaction(watch: Any, t: apsw.Connection, error: type[apsw.Error], phantom: bool) -> None:
    """After BUSY the connection believes its committed transaction open, and later writes never commit: never map to it."""
    _fail(watch, lambda: error("storage is down"))
    with pytest.raises(error):
        t.execute("BEGIN; INSERT INTO t(x) VALUES(1); COMMIT")
    watch.on.clear()
    assert _others_see("a.db") == 1
    assert t.in_transaction == phantom
    t.execute("INSERT INTO t(x) VALUES(2)")
    assert _others_see("a.db") == (1 if phantom else 2)


@pytest.mark.parametrize(("error", "arrives"), [(apsw.SQLError, apsw.SQLError), (apsw.IOError, apsw.IOError)])
def test_with_block_shows_the_code_not_the_exception(
    watch: Any, t: apsw.Connection, error: type[apsw.Error], arrives: type[apsw.Error]
) -> None:
    """What a `with` block raises is made anew from the result code: only `__context__` still is the object we raised."""
    mine = error("storage is down")
    _fail(watch, lambda: mine)
    with pytest.raises(arrives) as caught, t:
        t.execute("INSERT INTO t(x) VALUES(1)")
    if arrives is apsw.SQLError:
        assert caught.value is not mine
        assert caught.value.__context__ is mine


def test_raising_in_phase_two_calls_the_rollback_hook(watch: Any, t: apsw.Connection) -> None:
    """Raised in phase two, a user's rollback hook hears of a rollback that was none: one more reason to park the error."""
    rolled_back: list[int] = []
    t.set_rollback_hook(lambda: rolled_back.append(1))
    _fail(watch)
    with pytest.raises(Down):
        t.execute("INSERT INTO t(x) VALUES(1)")
    assert rolled_back == [1]
    assert _others_see("a.db") == 1


@pytest.mark.parametrize("how", ["close(force)", "collected"])
def test_an_error_at_a_forced_close_reaches_nobody(watch: Any, t: apsw.Connection, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a cursor closed by force or collected, the error goes to `sys.unraisablehook` only: log it, keep it in `status`."""
    printed: list[type[BaseException]] = []
    monkeypatch.setattr("sys.unraisablehook", lambda unraisable: printed.append(unraisable.exc_type))
    cursor = t.execute("INSERT INTO t(x) VALUES(1) RETURNING id")
    next(cursor)
    _fail(watch)
    if how == "close(force)":
        cursor.close(True)
    del cursor
    watch.on.clear()
    assert printed == [Down]
    assert _others_see("a.db") == 1


@pytest.mark.parametrize("parked", [False, True])
def test_raising_while_another_schema_writes_corrupts_it(watch: Any, connect: Any, parked: bool) -> None:
    """Raised in phase two of `main` while an attached database still writes, that one is corrupt for good; parked, it is not."""
    setup = connect("b.db", wal=True)
    setup.execute(f"CREATE TABLE t(x); CREATE TABLE r(y); {NUMBERS.format('r')}")
    setup.close()
    c = connect("a.db", watched=True, wal=True)
    c.execute("CREATE TABLE t(x)")
    c.execute("ATTACH 'b.db' AS b")
    reader = c.execute("SELECT * FROM b.r")
    next(reader)
    waiting: list[Down] = []
    if parked:
        watch.on["phase two"] = lambda file: waiting.append(Down("storage is down")) if file.base == "a.db" else None

        def hook(connection: apsw.Connection, name: str, frames: int) -> int:
            if waiting:
                raise waiting.pop()
            return 0

        c.set_wal_hook(hook)
    else:
        _fail(watch, only="a.db")
    with pytest.raises(Down):
        c.execute(f"BEGIN; INSERT INTO main.t VALUES('one'); {BIG.format('b.t')}; COMMIT")
    watch.on.clear()
    c.execute("UPDATE b.r SET y=-1 WHERE rowid=1")
    reader.close()
    c.close()
    fresh = connect("b.db")
    try:
        report = str(fresh.execute("PRAGMA integrity_check").get)
    except apsw.Error as error:
        report = repr(error)
    assert (report == "ok") == parked
    if parked:
        assert _others_see("a.db") == 1
        assert fresh.execute("SELECT count(*) FROM t").get == 200


def test_raising_while_temp_writes_loses_its_part(watch: Any, t: apsw.Connection) -> None:
    """`temp` counts as another schema: raised in phase two of `main`, temp's half is rolled back while main's stands."""
    t.execute("CREATE TEMP TABLE tt(x)")
    _fail(watch)
    with pytest.raises(Down):
        t.execute("BEGIN; INSERT INTO main.t(x) VALUES(1); INSERT INTO tt VALUES(1); COMMIT")
    watch.on.clear()
    assert t.execute("SELECT (SELECT count(*) FROM main.t), (SELECT count(*) FROM tt)").get == (1, 0)
    t.execute("BEGIN; INSERT INTO main.t(x) VALUES(2); INSERT INTO tt VALUES(2); COMMIT")
    assert t.execute("SELECT (SELECT count(*) FROM main.t), (SELECT count(*) FROM tt)").get == (2, 1)


def test_raising_in_phase_two_of_one_hides_the_commit_of_the_next(watch: Any, connect: Any) -> None:
    """Raised in phase two of the first of two databases, the second commits all the same, without a phase two: unnoticed."""
    c = connect("a.db", watched=True, wal=True)
    c.execute("ATTACH 'b.db' AS b")
    c.execute("PRAGMA b.journal_mode=wal").fetchall()
    c.execute("CREATE TABLE main.t(x); CREATE TABLE b.t(x)")
    watch.phases.clear()
    _fail(watch, only="a.db")
    with pytest.raises(Down):
        c.execute("BEGIN; INSERT INTO main.t VALUES(1); INSERT INTO b.t VALUES(1); COMMIT")
    watch.on.clear()
    assert watch.phases == ["a.db"]
    assert _others_see("b.db") == 1


@pytest.mark.parametrize("sql", ["BEGIN; INSERT INTO t(x) VALUES(1); COMMIT", "SAVEPOINT s; INSERT INTO t(x) VALUES(1); RELEASE s"])
def test_raising_in_the_wal_hook_is_clean(t: apsw.Connection, sql: str) -> None:
    """An error raised in the hook arrives as itself after the whole commit is done: the place to raise what phase two parked."""

    def hook(c: apsw.Connection, name: str, frames: int) -> int:
        raise Down("storage is down")

    rolled_back: list[int] = []
    t.set_rollback_hook(lambda: rolled_back.append(1))
    t.set_wal_hook(hook)
    with pytest.raises(Down):
        t.execute(sql)
    t.set_wal_hook(None)
    assert not rolled_back
    with contextlib.suppress(apsw.SQLError):
        t.execute("ROLLBACK")
    assert _others_see("a.db") == 1
    t.execute("INSERT INTO t(x) VALUES(2)")
    assert _others_see("a.db") == 2


def test_a_hook_that_fails_keeps_the_next_hook_from_running(watch: Any, connect: Any) -> None:
    """When the hook for `main` raises, the one for `b` never runs for that commit; both phase twos ran, so nothing is missed."""
    c = connect("a.db", watched=True, wal=True)
    c.execute("ATTACH 'b.db' AS b")
    c.execute("PRAGMA b.journal_mode=wal").fetchall()
    c.execute("CREATE TABLE main.t(x); CREATE TABLE b.t(x)")
    called: list[str] = []

    def hook(connection: apsw.Connection, name: str, frames: int) -> int:
        called.append(name)
        raise Down("storage is down")

    c.set_wal_hook(hook)
    watch.phases.clear()
    with pytest.raises(Down):
        c.execute("BEGIN; INSERT INTO main.t VALUES(1); INSERT INTO b.t VALUES(1); COMMIT")
    assert watch.phases == ["a.db", "b.db"]
    assert called == ["main"]


@pytest.mark.parametrize("where", ["hook", "phase two"])
def test_inside_a_with_block_the_error_is_the_context(watch: Any, t: apsw.Connection, where: str) -> None:
    """`with connection:` wraps: the caller gets a plain SQLError and finds ours as `__context__`."""

    def hook(c: apsw.Connection, name: str, frames: int) -> int:
        raise Down("storage is down")

    if where == "hook":
        t.set_wal_hook(hook)
    else:
        _fail(watch)
    with pytest.raises(apsw.SQLError) as caught, t:
        t.execute("INSERT INTO t(x) VALUES(1)")
    assert type(caught.value) is apsw.SQLError
    assert isinstance(caught.value.__context__, Down)


def test_the_pdb_pointer_names_the_connection(watch: Any, connect: Any) -> None:
    """SQLITE_FCNTL_PDB gives each file its connection's `sqlite3 *`: how a parked error finds the connection it belongs to."""
    one, two = connect("a.db", watched=True, wal=True), connect("a.db", watched=True)
    seen: list[int | None] = []
    watch.on["phase two"] = lambda file: seen.append(file.connection_pointer)
    one.execute("CREATE TABLE t(x)")
    two.execute("INSERT INTO t VALUES(1)")
    one.execute("INSERT INTO t VALUES(1)")
    assert seen == [one.sqlite3_pointer(), two.sqlite3_pointer(), one.sqlite3_pointer()]


def test_txn_state_in_phase_two_tells_who_still_writes(watch: Any, connect: Any) -> None:
    """`txn_state` may be asked inside phase two, and shows which schemas still are in WRITE: it decides whether to raise."""
    c = connect("a.db", watched=True, wal=True)
    c.execute("ATTACH 'b.db' AS b")
    c.execute("PRAGMA b.journal_mode=wal").fetchall()
    c.execute("CREATE TABLE main.t(x); CREATE TABLE b.t(x); CREATE TEMP TABLE tt(x)")
    seen: list[tuple[str, set[str]]] = []

    def look(file: Any) -> None:
        writing = {name for name in c.db_names() if c.txn_state(name) == apsw.SQLITE_TXN_WRITE}
        seen.append((file.base, writing))

    watch.on["phase two"] = look
    c.execute("INSERT INTO main.t VALUES(1)")
    c.execute("BEGIN; INSERT INTO main.t VALUES(1); INSERT INTO b.t VALUES(1); INSERT INTO tt VALUES(1); COMMIT")
    assert seen == [("a.db", {"main"}), ("a.db", {"main", "temp", "b"}), ("b.db", {"b"})]
