"""Every way to commit: when the call has returned, the commit is in the store; and what comes back is what was lost, byte for byte."""

from __future__ import annotations

import gc
from collections.abc import Callable

import apsw
import pytest

import bottomless_wal
from tests.support.cluster import World, rows

Way = Callable[[apsw.Connection], object]


def _begin_commit(con: apsw.Connection) -> None:
    con.execute("BEGIN; INSERT INTO t VALUES (1, 'a'); INSERT INTO t VALUES (2, 'b'); COMMIT")


def _with_connection(con: apsw.Connection) -> None:
    with con:
        con.execute("INSERT INTO t VALUES (1, 'a')")
        with con:
            con.execute("INSERT INTO t VALUES (2, 'b')")


def _savepoints(con: apsw.Connection) -> None:
    con.execute("SAVEPOINT one; INSERT INTO t VALUES (1, 'a'); SAVEPOINT two; INSERT INTO t VALUES (2, 'b'); ROLLBACK TO two")
    con.execute("RELEASE one")


def _returning_closed_early(con: apsw.Connection) -> None:
    cursor = con.cursor()
    assert next(cursor.execute("INSERT INTO t VALUES (1, 'a'), (2, 'b'), (3, 'c') RETURNING id")) == (1,)
    cursor.close()


def _returning_deleted(con: apsw.Connection) -> None:
    cursor = con.cursor()
    next(cursor.execute("INSERT INTO t VALUES (1, 'a'), (2, 'b') RETURNING id"))
    del cursor
    gc.collect()


def _insert_or_fail(con: apsw.Connection) -> None:
    con.execute("CREATE UNIQUE INDEX single ON t(name)")
    with pytest.raises(apsw.ConstraintError):
        con.execute("INSERT OR FAIL INTO t VALUES (1, 'a'), (2, 'b'), (3, 'a'), (4, 'd')")
    assert rows(con) == 2  # the two before the failing one stand, and are committed


def _blob_write(con: apsw.Connection) -> None:
    con.execute("INSERT INTO t VALUES (1, zeroblob(20000))")
    with con.blob_open("main", "t", "name", 1, True) as blob:
        blob.seek(9000)
        blob.write(b"written in the middle" * 100)


def _backup_into(con: apsw.Connection) -> None:
    source = apsw.Connection(":memory:")
    source.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, name); CREATE TABLE more(x)")
    source.executemany("INSERT INTO t VALUES (?, ?)", ((n, "x" * 100) for n in range(1000)))
    with con.backup("main", source, "main") as backup:
        backup.step()
    assert rows(con) == 1000


def _executemany(con: apsw.Connection) -> None:
    con.executemany("INSERT INTO t VALUES (?, ?)", ((n, "x" * n) for n in range(20)))


def _ddl(con: apsw.Connection) -> None:
    con.execute("CREATE TABLE u(a, b)")
    con.execute("CREATE INDEX by_a ON u(a)")
    con.execute("CREATE VIEW v AS SELECT a FROM u")
    con.execute("CREATE TRIGGER g AFTER INSERT ON t BEGIN INSERT INTO u VALUES (new.id, new.name); END")
    con.execute("INSERT INTO t VALUES (1, 'a')")
    con.execute("ALTER TABLE u ADD COLUMN c DEFAULT 7")
    con.execute("DROP VIEW v")
    con.execute("ANALYZE; PRAGMA user_version=42; PRAGMA application_id=7")


def _vacuum(con: apsw.Connection) -> None:
    with con:
        con.executemany("INSERT INTO t VALUES (?, ?)", ((n, "x" * 500) for n in range(80)))
    con.execute("DELETE FROM t WHERE id % 7")
    con.execute("VACUUM")


def _shrink_and_grow(con: apsw.Connection) -> None:
    for _ in range(2):
        with con:
            con.executemany("INSERT INTO t VALUES (?, randomblob(900))", ((n,) for n in range(30)))
        con.execute("DELETE FROM t")
        con.execute("VACUUM")
    con.executemany("INSERT INTO t VALUES (?, randomblob(900))", ((n,) for n in range(10)))


def _cascades(con: apsw.Connection) -> None:
    con.execute("PRAGMA foreign_keys=on; CREATE TABLE kid(id INTEGER PRIMARY KEY, t REFERENCES t ON DELETE CASCADE ON UPDATE CASCADE)")
    con.execute("INSERT INTO t VALUES (1, 'a'), (2, 'b')")
    con.executemany("INSERT INTO kid(t) VALUES (?)", ((n % 2 + 1,) for n in range(20)))
    con.execute("UPDATE t SET id=9 WHERE id=1")
    con.execute("DELETE FROM t WHERE id=2")
    assert rows(con, "SELECT group_concat(DISTINCT t) FROM kid") == "9"


def _temp_beside(con: apsw.Connection) -> None:
    con.execute("CREATE TEMP TABLE scratch(x)")
    con.execute("BEGIN; INSERT INTO scratch VALUES (1); INSERT INTO t VALUES (1, 'a'); INSERT INTO scratch VALUES (2); COMMIT")
    con.execute("INSERT INTO scratch SELECT id FROM t")
    con.execute("INSERT INTO t SELECT x + 10, 'from temp' FROM scratch WHERE x = 2")


def _cte_upsert_replace(con: apsw.Connection) -> None:
    con.execute("WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n LIMIT 300) INSERT INTO t SELECT x, 'n' || x FROM n")
    con.execute("INSERT INTO t VALUES (1, 'again') ON CONFLICT(id) DO UPDATE SET name = excluded.name")
    con.execute("REPLACE INTO t VALUES (2, 'replaced')")
    con.execute("UPDATE OR IGNORE t SET id = 3 WHERE id = 4")
    con.execute("DELETE FROM t WHERE id > 200")


def _virtual_table(con: apsw.Connection) -> None:
    con.execute("CREATE VIRTUAL TABLE f USING fts5(body)")
    con.executemany("INSERT INTO f VALUES (?)", ((f"word{n} and word{n % 7}",) for n in range(15)))
    con.execute("INSERT INTO f(f) VALUES ('optimize')")


def _prepared_and_reset(con: apsw.Connection) -> None:
    # A statement that is stepped to its end by a fetch, while another reads.
    reader = con.cursor()
    con.execute("INSERT INTO t VALUES (1, 'a'), (2, 'b')")
    next(reader.execute("SELECT * FROM t"))
    con.execute("INSERT INTO t VALUES (3, 'c')")
    reader.close()


def _empty_again(con: apsw.Connection) -> None:
    con.execute("DROP TABLE t; VACUUM; CREATE TABLE t(id INTEGER PRIMARY KEY, name)")


def _spilled_and_rolled_back(con: apsw.Connection) -> None:
    # Rolled back work leaves frames in the WAL when the cache spills; none of them may be stored.
    con.execute("PRAGMA cache_size=5; PRAGMA cache_spill=1")
    con.execute("BEGIN")
    con.executemany("INSERT INTO t VALUES (?, randomblob(3000))", ((n,) for n in range(200)))
    con.execute("ROLLBACK")
    con.execute("INSERT INTO t VALUES (1, 'after the rollback')")
    con.execute("BEGIN")
    con.executemany("INSERT INTO t VALUES (?, randomblob(3000))", ((n,) for n in range(10, 200)))
    con.execute("SAVEPOINT s; DELETE FROM t WHERE id > 100; ROLLBACK TO s; DELETE FROM t WHERE id > 150; COMMIT")


WAYS: dict[str, Way] = {
    "autocommit": lambda con: con.execute("INSERT INTO t VALUES (1, 'a')"),
    "begin-commit": _begin_commit,
    "begin-immediate": lambda con: con.execute("BEGIN IMMEDIATE; INSERT INTO t VALUES (1, 'a'); END"),
    "begin-exclusive": lambda con: con.execute("BEGIN EXCLUSIVE; INSERT INTO t VALUES (1, 'a'); COMMIT"),
    "with-connection": _with_connection,
    "savepoints": _savepoints,
    "returning": lambda con: con.execute("INSERT INTO t VALUES (1, 'a') RETURNING *").fetchall(),
    "returning-closed-early": _returning_closed_early,
    "returning-deleted": _returning_deleted,
    "insert-or-fail": _insert_or_fail,
    "blob-write": _blob_write,
    "backup-into": _backup_into,
    "executemany": _executemany,
    "ddl": _ddl,
    "vacuum": _vacuum,
    "shrink-and-grow": _shrink_and_grow,
    "cascades": _cascades,
    "temp-beside": _temp_beside,
    "upsert-replace": _cte_upsert_replace,
    "virtual-table": _virtual_table,
    "while-reading": _prepared_and_reset,
    "empty-again": _empty_again,
    "spilled-and-rolled-back": _spilled_and_rolled_back,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_commit_is_stored_when_the_call_returns(world: World, way: str) -> None:
    here = world.machine()
    con = here.connect()
    con.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, name)")
    WAYS[way](con)
    world.stored(con)
    assert bottomless_wal.status(con).pending_frames == 0
    con.close()
    world.comes_back(here)


@pytest.mark.parametrize("way", ["autocommit", "returning-closed-early", "backup-into", "vacuum", "shrink-and-grow"])
def test_and_so_it_is_on_real_servers(any_world: World, way: str) -> None:
    here = any_world.machine()
    con = here.connect()
    con.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, name)")
    WAYS[way](con)
    any_world.stored(con)
    con.close()
    any_world.comes_back(here)


def test_each_commit_is_one_edge(world: World) -> None:
    con = world.machine().connect()
    con.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, name)")
    for n in range(5):
        con.execute("INSERT INTO t VALUES (?, 'x')", (n,))
        assert world.bucket.edges("app.db") == [(pre, pre + 1) for pre in range(n + 2)]
    status = bottomless_wal.status(con)
    assert (status.txid, status.view_txid) == (6, 6)
    assert world.bucket.segment("app.db", 5, 6).post_hash == status.state_hash


def test_the_first_commit_of_all_is_wholly_stored_too(world: World) -> None:
    con = world.machine().connect()
    con.execute("CREATE TABLE t(x)")
    world.stored(con)


def test_what_was_rolled_back_is_nowhere(world: World) -> None:
    con = world.machine().connect()
    con.execute("CREATE TABLE t(x)")
    before = world.bucket.edges("app.db")
    con.execute("BEGIN; INSERT INTO t VALUES (1); ROLLBACK")
    con.execute("SAVEPOINT s; INSERT INTO t VALUES (2); ROLLBACK TO s; RELEASE s")

    def half_way() -> None:
        with con:
            con.execute("INSERT INTO t VALUES (3)")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half_way()
    bottomless_wal.flush(con)
    for pre, post in set(world.bucket.edges("app.db")) - set(before):  # the savepoint's release is a commit that changes nothing
        assert world.bucket.segment("app.db", pre, post).pages == {}
    world.stored(con)
    assert rows(con) == 0


def test_reading_sends_nothing(world: World) -> None:
    here = world.machine()
    con = here.connect()
    con.execute("CREATE TABLE t(x); INSERT INTO t VALUES (1)")
    bottomless_wal.flush(con)
    before = bottomless_wal.status(con).requests
    for _ in range(10):
        assert rows(con) == 1
    con.execute("BEGIN; SELECT * FROM t; COMMIT")
    assert bottomless_wal.status(con).requests == before


@pytest.mark.parametrize("mode", ["full", "incremental"])
def test_auto_vacuum(world: World, mode: str) -> None:
    here = world.machine()
    # It has to be set before the file gets its first page, which is before WAL mode.
    stock = here.stock()
    stock.execute(f"PRAGMA auto_vacuum={mode}; CREATE TABLE t(id INTEGER PRIMARY KEY, name)")
    stock.close()
    con = here.connect()
    with con:
        con.executemany("INSERT INTO t VALUES (?, randomblob(2000))", ((n,) for n in range(200)))
    size = rows(con, "PRAGMA page_count")
    con.execute("DELETE FROM t WHERE id > 20")
    if mode == "incremental":
        con.execute("PRAGMA incremental_vacuum(10)").fetchall()
        con.execute("PRAGMA incremental_vacuum").fetchall()
    assert rows(con, "PRAGMA page_count") < size
    bottomless_wal.flush(con)
    world.stored(con)
    con.executemany("INSERT INTO t VALUES (?, randomblob(2000))", ((n,) for n in range(100, 110)))
    world.stored(con)
    con.close()
    world.comes_back(here)


def test_page_objects_past_the_end_are_swept_but_not_by_the_commit(world: World) -> None:
    here = world.machine()
    con = here.connect()
    con.execute("CREATE TABLE t(x)")
    with con:
        con.executemany("INSERT INTO t VALUES (randomblob(3000))", [()] * 50)
    many = len(world.bucket.page_numbers("app.db"))
    deletes = bottomless_wal.status(con).requests.get("delete", 0)
    con.execute("DELETE FROM t")
    con.execute("VACUUM")
    assert len(world.bucket.page_numbers("app.db")) == many
    assert bottomless_wal.status(con).requests.get("delete", 0) == deletes
    bottomless_wal.flush(con)
    assert len(world.bucket.page_numbers("app.db")) == rows(con, "PRAGMA page_count") < many
    con.close()
    world.comes_back(here)


def test_backup_into_a_replicated_database_in_steps(world: World) -> None:
    here = world.machine()
    con = here.connect()
    con.execute("CREATE TABLE old(x)")
    source = apsw.Connection(":memory:")
    source.execute("CREATE TABLE t(x)")
    source.executemany("INSERT INTO t VALUES (randomblob(3000))", [()] * 100)
    with con.backup("main", source, "main") as backup:
        while not backup.done:
            backup.step(7)
    world.stored(con)
    con.close()
    world.comes_back(here)


def test_backup_out_of_a_replicated_database(world: World) -> None:
    con = world.machine().connect()
    con.execute("CREATE TABLE t(x); INSERT INTO t VALUES (1)")
    copy = apsw.Connection(":memory:")
    with copy.backup("main", con, "main") as backup:
        backup.step()
    assert rows(copy) == 1


def test_two_attached_replicated_databases_in_one_transaction(world: World) -> None:
    here = world.machine()
    con = here.connect("a.db")
    with bottomless_wal.runtime.connect.pending_open(world.options):
        con.execute(f"ATTACH 'file:{here.path('b.db')}?vfs=bottomless' AS b")
    con.execute("PRAGMA b.journal_mode=wal").fetchall()
    con.execute("CREATE TABLE main.t(x); CREATE TABLE b.t(x)")
    con.execute("BEGIN; INSERT INTO main.t VALUES (1); INSERT INTO b.t VALUES (2); COMMIT")
    world.stored(con, "a.db")
    world.stored(con, "b.db", schema="b")
    con.execute("INSERT INTO b.t SELECT x FROM main.t")
    world.stored(con, "b.db", schema="b")
    con.execute("DETACH b")
    con.close()
    world.comes_back(here, "a.db")
    world.comes_back(here, "b.db")


def test_attached_to_a_connection_on_the_stock_vfs(world: World) -> None:
    here = world.machine()
    bottomless_wal.register()
    con = here.stock("plain.db")
    query = "&".join(f"{name}={value}" for name, value in world.options.items())
    con.execute(f"ATTACH 'file:{here.path('b.db')}?vfs=bottomless&{query}' AS b")
    assert con.execute("PRAGMA b.journal_mode=wal").get == "wal"
    con.execute("CREATE TABLE main.t(x); CREATE TABLE b.t(x)")
    con.execute("BEGIN; INSERT INTO main.t VALUES (1); INSERT INTO b.t VALUES (2); COMMIT")
    world.stored(con, "b.db", schema="b")
    assert world.bucket.edges("plain.db") == []
    con.close()
    world.comes_back(here, "b.db")


def test_journal_mode_wal_asked_again_hides_no_commit(world: World) -> None:
    con = world.machine().connect()
    con.execute("CREATE TABLE t(x)")
    for n in range(3):
        assert con.execute("PRAGMA journal_mode=wal").get == "wal"
        con.execute("INSERT INTO t VALUES (?)", (n,))
        world.stored(con)


def test_a_commit_after_a_user_replaced_the_wal_hook(world: World) -> None:
    con = world.machine().connect()
    con.execute("CREATE TABLE t(x)")
    con.set_wal_hook(None)
    con.execute("INSERT INTO t VALUES (1)")
    world.stored(con)
    con.set_wal_hook(lambda *_: apsw.SQLITE_OK)
    con.execute("INSERT INTO t VALUES (2)")
    world.stored(con)


def test_a_large_transaction_has_its_pages_in_a_body(world: World) -> None:
    here = world.machine()
    con = here.connect()
    con.execute("CREATE TABLE t(x)")
    con.execute("INSERT INTO t VALUES (randomblob(1000000))")
    assert not [key for key in world.bucket.listing() if "/body/" in key]
    with con:
        con.executemany("INSERT INTO t VALUES (randomblob(1000000))", [()] * 17)
    assert len([key for key in world.bucket.listing() if "/body/" in key]) == 1
    last = world.bucket.head("app.db")
    assert len(world.bucket.get(f"app.db-wal/{last - 1:016x}-{last:016x}")) < 4096
    world.stored(con)
    con.close()
    world.comes_back(here)
