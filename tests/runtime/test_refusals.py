"""Nothing may slip past replication: what would is refused, with an error that says why."""

from __future__ import annotations

import os
import shutil
import urllib.parse
from pathlib import Path

import apsw
import pytest

import bottomless_wal
from bottomless_wal import BottomlessError, ConfigError, ConflictError, ReplicationError
from bottomless_wal.runtime.connect import pending_open
from tests.support.cluster import World, rows


def _plain(world: World, path: str, flags: int | None = None, **options: object) -> apsw.Connection:
    """Through the VFS by hand, as connect() does it, without the switch to WAL."""
    bottomless_wal.register()
    with pending_open({**world.options, **options}):
        con = apsw.Connection(
            path, flags=flags or apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE | apsw.SQLITE_OPEN_URI, vfs="bottomless"
        )
    world.connections.append(con)
    return con


@pytest.mark.parametrize("statement", ["CREATE TABLE t(x)", "PRAGMA user_version=1", "BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"])
def test_a_write_while_the_database_is_not_in_wal_mode(world: World, statement: str) -> None:
    here = world.machine()
    con = _plain(world, here.path())
    with pytest.raises(ConfigError, match="not in WAL mode") as caught:
        con.execute(statement)
    assert "journal_mode=wal" in caught.value.hint
    if not con.get_autocommit():
        con.execute("ROLLBACK")
    assert con.execute("PRAGMA journal_mode=wal").get == "wal"
    con.execute("CREATE TABLE t(x)")
    world.stored(con)


def test_page_size_and_journal_mode_by_hand(world: World) -> None:
    here = world.machine()
    con = _plain(world, here.path())
    con.execute("PRAGMA page_size=512")
    assert con.execute("PRAGMA journal_mode=wal").get == "wal"
    con.execute("CREATE TABLE t(x)")
    world.stored(con)
    con.close()
    world.comes_back(here)


@pytest.mark.parametrize("mode", ["delete", "truncate", "persist", "memory", "off", "DELETE", "'delete'", '"delete"', " delete "])
@pytest.mark.parametrize("schema", ["", "main."])
def test_leaving_wal_mode(world: World, mode: str, schema: str) -> None:
    con = world.machine().connect()
    con.execute("CREATE TABLE t(x)")
    with pytest.raises(ConfigError, match="refused") as caught:
        con.execute(f"PRAGMA {schema}journal_mode={mode}").fetchall()
    assert caught.value.hint
    assert con.execute("PRAGMA journal_mode").get == "wal"
    con.execute("INSERT INTO t VALUES (1)")
    world.stored(con)


def test_leaving_wal_mode_before_the_first_write(world: World) -> None:
    con = _plain(world, world.machine().path())
    with pytest.raises(ConfigError):
        con.execute("PRAGMA journal_mode=memory").fetchall()
    with pytest.raises(ConfigError):
        con.execute("CREATE TABLE t(x)")


@pytest.mark.parametrize("spelling", ["wal", "WAL", "'wal'", '"WAL"'])
def test_wal_mode_may_be_asked_for_in_any_spelling(world: World, spelling: str) -> None:
    con = _plain(world, world.machine().path())
    assert con.execute(f"PRAGMA journal_mode={spelling}").get == "wal"
    con.execute("CREATE TABLE t(x)")
    assert con.execute(f"PRAGMA journal_mode({spelling})").get == "wal"
    con.execute("INSERT INTO t VALUES (1)")
    world.stored(con)


def test_a_function_call_spelling_of_the_pragma(world: World) -> None:
    con = world.machine().connect()
    con.execute("CREATE TABLE t(x)")
    with pytest.raises(ConfigError):
        con.execute("PRAGMA journal_mode(delete)").fetchall()
    assert con.execute("SELECT journal_mode FROM pragma_journal_mode").get == "wal"


def test_leaving_wal_mode_by_way_of_a_stock_main_database(world: World) -> None:
    """An unqualified journal_mode goes to every attached database, and its file control to `main` alone."""
    here = world.machine()
    here.connect("b.db").close()
    con = here.stock("plain.db")
    with pending_open(world.options):
        con.execute(f"ATTACH 'file:{here.path('b.db')}?vfs=bottomless' AS b")
    con.execute("CREATE TABLE main.t(x); CREATE TABLE b.t(x)")
    try:
        con.execute("PRAGMA journal_mode=delete").fetchall()
    except apsw.Error:
        con.execute("SELECT 1")
    assert con.execute("PRAGMA b.journal_mode").get == "wal"
    con.execute("INSERT INTO b.t VALUES (1)")
    world.stored(con, "b.db", schema="b")


@pytest.mark.parametrize("schema", ["", "main."])
def test_exclusive_locking(world: World, schema: str) -> None:
    con = world.machine().connect()
    con.execute("CREATE TABLE t(x)")
    with pytest.raises(ConfigError, match="locking_mode"):
        con.execute(f"PRAGMA {schema}locking_mode=EXCLUSIVE").fetchall()
    assert con.execute("PRAGMA locking_mode=normal").get == "normal"
    con.execute("INSERT INTO t VALUES (1)")
    world.stored(con)


def test_exclusive_locking_before_wal_mode(world: World) -> None:
    con = _plain(world, world.machine().path())
    with pytest.raises(ConfigError, match="locking_mode"):
        con.execute("PRAGMA locking_mode=exclusive").fetchall()
    con.execute("PRAGMA journal_mode=wal").fetchall()
    con.execute("CREATE TABLE t(x)")
    world.stored(con)


def test_exclusive_locking_by_way_of_a_stock_main_database(world: World) -> None:
    """An unqualified pragma goes past us; then SQLite cannot have the lock, and nothing is written that is not replicated."""
    here = world.machine()
    con = here.connect("b.db")
    con.execute("CREATE TABLE t(x)")
    con.close()
    con = here.stock("plain.db")
    con.set_busy_timeout(0)
    with pending_open(world.options):
        con.execute(f"ATTACH 'file:{here.path('b.db')}?vfs=bottomless' AS b")
    written = 0
    try:
        con.execute("PRAGMA locking_mode=exclusive").fetchall()
        con.execute("INSERT INTO b.t VALUES (1)")
        written = 1
    except apsw.Error:
        con.execute("PRAGMA locking_mode=normal").fetchall()
    assert rows(con, "SELECT count(*) FROM b.t") == written
    con.execute("INSERT INTO b.t VALUES (2)")
    world.stored(con, "b.db", schema="b")


# --- read-only ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["mode=ro", "immutable=1", "flag"])
def test_read_only_neither_boots_nor_uploads(world: World, how: str) -> None:
    here = world.machine()
    con = here.connect()
    con.execute("CREATE TABLE t(x); INSERT INTO t VALUES (1)")
    con.close()
    reading = world.machine()
    shutil.copy(here.path(), reading.path())
    before = world.bucket.content()
    if how == "flag":
        con = bottomless_wal.connect(reading.path(), flags=apsw.SQLITE_OPEN_READONLY, endpoint="http://127.0.0.1:1")
    else:
        con = bottomless_wal.connect(f"file:{reading.path()}?{how}", endpoint="http://127.0.0.1:1")
    world.connections.append(con)
    assert rows(con) == 1
    with pytest.raises(apsw.ReadOnlyError):
        con.execute("INSERT INTO t VALUES (2)")
    con.close()
    assert world.bucket.content() == before
    assert not os.path.exists(reading.path("app.db-bottomless"))
    assert reading.content() == here.content()


def test_read_only_of_a_missing_file_is_no_restore(world: World) -> None:
    here = world.machine()
    con = here.connect()
    con.execute("CREATE TABLE t(x)")
    con.close()
    empty = world.machine()
    with pytest.raises(apsw.CantOpenError):
        bottomless_wal.connect(f"file:{empty.path()}?mode=ro", **world.options)
    assert empty.files() == {}


def test_a_reader_beside_a_writer(world: World) -> None:
    here = world.machine()
    con = here.connect()
    con.execute("CREATE TABLE t(x)")
    reader = bottomless_wal.connect(f"file:{here.path()}?mode=ro", **world.options)
    world.connections.append(reader)
    for n in range(3):
        con.execute("INSERT INTO t VALUES (?)", (n,))
        assert rows(reader) == n + 1
    con.close()
    assert rows(reader) == 3


# --- names -------------------------------------------------------------------------------------------------------------------------


def test_two_files_of_one_name_in_one_process(world: World) -> None:
    one, two = world.machine(), world.machine()
    con = one.connect()
    con.execute("CREATE TABLE t(x)")
    with pytest.raises(ConflictError, match="both be stored") as caught:
        two.connect()
    assert "database_id" in caught.value.hint
    assert two.files() == {}
    other = two.connect(database_id="two")
    other.execute("CREATE TABLE u(x)")
    world.stored(con)
    world.stored(other, "two~app.db")


def test_one_file_with_different_settings_in_one_process(world: World) -> None:
    here = world.machine()
    con = here.connect()
    con.execute("CREATE TABLE t(x)")
    with pytest.raises(ConfigError, match="other settings"):
        here.connect(ack="local")
    con.execute("INSERT INTO t VALUES (1)")
    world.stored(con)
    con.close()
    assert rows(here.connect(ack="local")) == 1


def test_hard_links_are_two_names_of_one_file(world: World) -> None:
    """SQLite warns of hard links too; here the second name is another database, and the first stays sound."""
    here = world.machine()
    con = here.connect()
    con.execute("CREATE TABLE t(x)")
    con.close()
    os.link(here.path(), here.path("link.db"))
    con = here.connect()
    con.execute("INSERT INTO t VALUES (1)")
    world.stored(con)


@pytest.mark.parametrize("path", [":memory:", ""])
def test_what_has_no_file_is_not_replicated(world: World, path: str) -> None:
    try:
        con = bottomless_wal.connect(path, **world.options)
    except BottomlessError as error:
        assert error.hint
        return
    world.connections.append(con)
    con.execute("CREATE TABLE t(x); INSERT INTO t VALUES (1)")
    assert world.bucket.listing() == []


def test_vacuum_into_makes_a_copy(world: World) -> None:
    """The copy is a database of its own, and no business of this bucket's: VACUUM INTO either works or says why not."""
    here = world.machine()
    con = here.connect()
    con.execute("CREATE TABLE t(x); INSERT INTO t VALUES (1)")
    before = world.bucket.edges("app.db")
    con.execute(f"VACUUM INTO 'file:{here.path('copy.db')}?vfs=unix'")
    copy = here.stock("copy.db")
    assert rows(copy) == 1
    assert world.bucket.edges("app.db") == before
    con.execute("INSERT INTO t VALUES (2)")
    world.stored(con)


def test_a_temporary_database_and_a_memory_database_may_be_attached(world: World) -> None:
    here = world.machine()
    con = here.connect()
    con.execute("CREATE TABLE t(x); ATTACH ':memory:' AS m; ATTACH '' AS s; CREATE TABLE m.t(x); CREATE TABLE s.t(x)")
    con.execute("BEGIN; INSERT INTO main.t VALUES (1); INSERT INTO m.t VALUES (2); INSERT INTO s.t VALUES (3); COMMIT")
    world.stored(con)
    assert {key.split("-")[0] for key in world.bucket.listing()} == {"app.db"}


def test_a_stock_database_may_be_attached_and_shares_a_transaction(world: World) -> None:
    here = world.machine()
    con = here.connect()
    con.execute("CREATE TABLE t(x)")
    con.execute(f"ATTACH 'file:{here.path('stock.db')}?vfs=unix' AS s")
    con.execute("CREATE TABLE s.t(x)")
    con.execute("BEGIN; INSERT INTO main.t VALUES (1); INSERT INTO s.t VALUES (2); COMMIT")
    world.stored(con)
    assert rows(here.stock("stock.db")) == 1


def test_an_unknown_file_beside_is_left_alone(world: World) -> None:
    here = world.machine()
    Path(here.path("app.db-bottomless-notes.txt")).write_text("mine")
    con = here.connect()
    con.execute("CREATE TABLE t(x)")
    con.close()
    assert Path(here.path("app.db-bottomless-notes.txt")).read_text() == "mine"


# --- a switch to WAL that fails ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["within a transaction", "busy"])
def test_a_write_after_a_failed_switch_to_wal_raises_and_is_replicated_later(world: World, how: str) -> None:
    """No write in rollback mode is acknowledged; once the switch succeeds, what was written goes along."""
    here = world.machine()
    options = "&".join(f"{name}={urllib.parse.quote(str(value), safe='')}" for name, value in world.options.items() if value is not True)
    bottomless_wal.register()
    flags = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE | apsw.SQLITE_OPEN_URI
    con = apsw.Connection(f"file:{here.path()}?vfs=bottomless&create_bucket=1&{options}", flags=flags)
    world.connections.append(con)
    if how == "busy":
        reader = here.stock()
        reader.execute("BEGIN; SELECT * FROM sqlite_master").fetchall()
        with pytest.raises(apsw.BusyError):
            con.execute("PRAGMA journal_mode=wal").fetchall()
        reader.execute("ROLLBACK")
        reader.close()
    else:
        con.execute("BEGIN")
        with pytest.raises(apsw.SQLError):
            con.execute("PRAGMA journal_mode=wal").fetchall()
        con.execute("ROLLBACK")
    with pytest.raises((ReplicationError, ConfigError)):
        con.execute("CREATE TABLE t(x)")
    with pytest.raises((ReplicationError, ConfigError)):
        con.execute("CREATE TABLE u(x)")
    assert con.execute("PRAGMA journal_mode=wal").get == "wal"
    con.execute("CREATE TABLE IF NOT EXISTS t(x); INSERT INTO t VALUES (1)")
    world.stored(con)
    con.close()
    world.comes_back(here)
