"""What COMMIT promises: `ack` and `pages`, what is in the store when it returns, and what is said when the store fails."""

from __future__ import annotations

import signal
import threading
from typing import Any

import apsw
import pytest

import bottomless_wal
from bottomless_wal import ConfigError, ReplicationError
from tests.support.cluster import World, child, refusal, replica_of, rows, until


def _open(world: World, **options: Any) -> apsw.Connection:
    con = world.machine().connect(**options)
    con.execute("CREATE TABLE t(x)")
    bottomless_wal.flush(con)
    return con


# --- what is there when COMMIT returns -----------------------------------------------------------------------------------------


def test_ack_pages_is_the_default_and_waits_for_log_and_page_objects(world: World) -> None:
    con = _open(world)
    for n in range(5):
        con.execute("INSERT INTO t VALUES (?)", (n,))
        world.stored(con)


def test_ack_log_waits_for_the_segment_and_not_for_the_page_objects(world: World) -> None:
    con = _open(world, ack="log")
    store = refusal(con)
    hold = threading.Event()
    store.hold(hold, kind="put")
    con.execute("INSERT INTO t VALUES (1)")
    assert world.bucket.log_image("app.db") == con.serialize("main")
    hold.set()
    bottomless_wal.flush(con)
    world.stored(con)


def test_ack_local_returns_at_once_and_flush_waits(world: World) -> None:
    con = _open(world, ack="local")
    store = refusal(con)
    hold = threading.Event()
    store.hold(hold)
    before = world.bucket.head("app.db")
    con.execute("INSERT INTO t VALUES (1)")
    assert world.bucket.head("app.db") == before
    hold.set()
    bottomless_wal.flush(con)
    world.stored(con)


def test_ack_local_arrives_without_being_asked(world: World) -> None:
    con = _open(world, ack="local")
    con.execute("INSERT INTO t VALUES (1)")
    until(lambda: world.bucket.head("app.db") == 2)
    assert world.bucket.log_image("app.db") == con.serialize("main")


def test_ack_local_gathers_for_the_interval(world: World) -> None:
    con = _open(world, ack="local", interval=30)
    for n in range(20):
        con.execute("INSERT INTO t VALUES (?)", (n,))
    assert world.bucket.head("app.db") == 1
    bottomless_wal.flush(con)
    assert world.bucket.edges("app.db") == [(0, 1), (1, 2)]
    world.stored(con)


def test_the_interval_gathers_the_commits_of_its_time_into_one(world: World) -> None:
    con = _open(world, ack="local", interval=0.3)
    for n in range(10):
        con.execute("INSERT INTO t VALUES (?)", (n,))
    until(lambda: world.bucket.head("app.db") > 1)
    bottomless_wal.flush(con)
    assert world.bucket.head("app.db") <= 3
    assert sum(len(world.bucket.segment("app.db", pre, pre + 1).positions) for pre in range(1, world.bucket.head("app.db"))) == 10


def test_ack_local_a_commit_that_says_nothing_goes_with_those_that_did(world: World) -> None:
    """Once one has said that there is something to look for, the others spare themselves that: until a batch begins, none is lost by it."""
    con = _open(world, ack="local")
    worker = replica_of(con).worker
    store = refusal(con)
    gate = threading.Event()
    store.hold(gate, kind="create")
    con.execute("INSERT INTO t VALUES (1)")
    until(lambda: any(kind == "create" for kind, _ in store.seen))
    assert not worker.dirty, "the batch has looked: what comes now has to say so"
    con.execute("INSERT INTO t VALUES (2)")
    assert worker.dirty
    tickets = worker._submitted
    con.executemany("INSERT INTO t VALUES (?)", [(3,), (4,)])
    assert worker._submitted == tickets
    gate.set()
    until(lambda: world.bucket.log_image("app.db") == con.serialize("main"))
    until(lambda: not worker.dirty)


def test_ack_local_commits_that_say_nothing_are_tried_again_with_the_others(world: World) -> None:
    con = _open(world, ack="local")
    store = refusal(con)
    store.log()
    con.executemany("INSERT INTO t VALUES (?)", [(n,) for n in range(50)])
    until(lambda: bottomless_wal.status(con).last_error is not None)
    store.nothing()
    con.execute("INSERT INTO t VALUES (50)")
    until(lambda: world.bucket.log_image("app.db") == con.serialize("main"))
    bottomless_wal.flush(con)
    world.stored(con)


def test_ack_local_is_all_there_after_the_close(world: World) -> None:
    here = world.machine()
    con = here.connect(ack="local", interval=60)
    con.execute("CREATE TABLE t(x)")
    con.executemany("INSERT INTO t VALUES (?)", ((n,) for n in range(20)))
    con.close()
    world.comes_back(here)


@pytest.mark.parametrize("how", ["return", "sys.exit(0)", "raise SystemExit", "multiprocessing"])
def test_ack_local_is_all_there_after_the_exit(world: World, how: str) -> None:
    here = world.machine()
    work = f"""
def main():
    global con
    con = connect({here.path()!r}, ack="local", interval=60)
    con.execute("CREATE TABLE t(x)")
    con.execute("INSERT INTO t VALUES (1)")
"""
    if how == "multiprocessing":
        script = f"""{work}
import multiprocessing
worker = multiprocessing.get_context("fork").Process(target=main)
worker.start()
worker.join()
assert worker.exitcode == 0
"""
    else:
        script = f"{work}    {how}\nmain()\n"
    child(script, options=world.options)
    con = world.machine().connect()
    assert rows(con) == 1


# --- pages -----------------------------------------------------------------------------------------------------------------------


def test_pages_off_writes_no_page_objects(world: World) -> None:
    here = world.machine()
    con = here.connect(pages="off")
    con.execute("CREATE TABLE t(x); INSERT INTO t VALUES (1)")
    bottomless_wal.flush(con)
    con.close()
    assert world.bucket.page_numbers("app.db") == []
    assert rows(world.machine().connect(pages="off")) == 1


def test_pages_checkpoint_writes_them_at_a_checkpoint_in_far_fewer_requests(world: World) -> None:
    con = world.machine().connect(pages="checkpoint")
    con.execute("CREATE TABLE t(x)")
    for n in range(100):
        con.execute("INSERT INTO t VALUES (?)", (n,))
    assert world.bucket.page_numbers("app.db") == []
    con.executemany("INSERT INTO t VALUES (randomblob(80000))", [()] * 60)  # the automatic checkpoint is at 1000 frames
    until(lambda: len(world.bucket.page_numbers("app.db")) > 500)
    assert bottomless_wal.status(con).requests["put"] < 3000
    bottomless_wal.flush(con)
    world.stored(con)


def test_pages_checkpoint_writes_them_at_flush_and_at_close(world: World) -> None:
    here = world.machine()
    con = here.connect(pages="checkpoint")
    con.execute("CREATE TABLE t(x)")
    con.execute("INSERT INTO t VALUES (1)")
    bottomless_wal.flush(con)
    world.stored(con)
    con.execute("INSERT INTO t VALUES (2)")
    con.close()
    assert world.bucket.view_image("app.db") == here.content()


def test_pages_checkpoint_keeps_up_while_commits_never_pause(world: World) -> None:
    here = world.machine()
    con = here.connect(pages="checkpoint")
    con.execute("CREATE TABLE t(x)")
    bottomless_wal.flush(con)
    stop = threading.Event()

    def commit() -> None:
        mine = here.connect(pages="checkpoint")
        while not stop.is_set():
            mine.execute("INSERT INTO t VALUES (randomblob(8000))")

    threads = [threading.Thread(target=commit) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: bottomless_wal.status(con).view_txid > 1, 30)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_ack_pages_without_pages_at_a_commit_is_refused(world: World) -> None:
    for pages in ("checkpoint", "off"):
        with pytest.raises(ConfigError, match="ack=log"):
            world.machine().connect(ack="pages", pages=pages)


# --- when the store fails --------------------------------------------------------------------------------------------------------


def test_the_error_says_that_the_log_is_missing(world: World) -> None:
    con = _open(world)
    store = refusal(con)
    store.log()
    with pytest.raises(ReplicationError, match="are not stored") as caught:
        con.execute("INSERT INTO t VALUES (1)")
    assert isinstance(caught.value, apsw.Error)
    assert "Do not repeat the statement" in caught.value.hint
    assert rows(con) == 1, "the local commit stands"
    assert con.get_autocommit()
    status = bottomless_wal.status(con)
    assert status.pending_frames
    assert isinstance(status.last_error, ReplicationError)


def test_the_error_says_that_the_page_objects_are_missing(world: World) -> None:
    con = _open(world)
    store = refusal(con)
    store.pages()
    with pytest.raises(ReplicationError, match=r"in the log, but not all of its page objects"):
        con.execute("INSERT INTO t VALUES (1)")
    assert world.bucket.log_image("app.db") == con.serialize("main")
    assert bottomless_wal.status(con).pending_frames == 0
    assert bottomless_wal.status(con).view_txid == 1


def test_ack_log_does_not_mind_missing_page_objects(world: World) -> None:
    con = _open(world, ack="log")
    store = refusal(con)
    store.pages()
    con.execute("INSERT INTO t VALUES (1)")
    with pytest.raises(ReplicationError, match="page objects"):
        bottomless_wal.flush(con)
    store.nothing()
    bottomless_wal.flush(con)
    world.stored(con)


@pytest.mark.parametrize("failing", ["log", "pages"])
@pytest.mark.parametrize("mended_by", ["commit", "flush", "open"])
def test_what_is_pending_goes_later_and_nothing_is_doubled(world: World, failing: str, mended_by: str) -> None:
    here = world.machine()
    con = here.connect()
    con.execute("CREATE TABLE t(x)")
    store = refusal(con)
    getattr(store, failing)()
    for n in range(3):
        with pytest.raises(ReplicationError):
            con.execute("INSERT INTO t VALUES (?)", (n,))
    if mended_by == "open":
        con.close()
        con = here.connect()
        if failing == "pages":
            bottomless_wal.flush(con)
    else:
        store.nothing()
        if mended_by == "commit":
            con.execute("INSERT INTO t VALUES (3)")
        else:
            bottomless_wal.flush(con)
    assert rows(con) == (4 if mended_by == "commit" else 3)
    if failing == "pages":
        bottomless_wal.flush(con)
    world.stored(con)
    assert bottomless_wal.status(con).last_error is None
    con.close()
    world.comes_back(here)


def test_what_is_pending_goes_by_itself_when_the_store_is_back(world: World) -> None:
    con = _open(world)
    store = refusal(con)
    store.log()
    with pytest.raises(ReplicationError):
        con.execute("INSERT INTO t VALUES (1)")
    store.nothing()
    until(lambda: world.bucket.head("app.db") == 2)
    assert world.bucket.log_image("app.db") == con.serialize("main")


def test_a_pending_commit_survives_a_restart_of_the_wal(world: World) -> None:
    here = world.machine()
    con = here.connect()
    con.execute("CREATE TABLE t(x)")
    store = refusal(con)
    store.log()
    with pytest.raises(ReplicationError):
        con.execute("INSERT INTO t VALUES (1)")
    con.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    with pytest.raises(ReplicationError):
        con.execute("INSERT INTO t VALUES (2)")
    store.nothing()
    con.execute("INSERT INTO t VALUES (3)")
    world.stored(con)
    con.close()
    world.comes_back(here)


@pytest.mark.parametrize(
    "statement",
    [
        "BEGIN; INSERT INTO t VALUES (1); COMMIT",
        "INSERT INTO t VALUES (1) RETURNING x",
        "CREATE TABLE u(x)",
        "CREATE TEMP TABLE s(x); BEGIN; INSERT INTO s VALUES (1); INSERT INTO t VALUES (1); COMMIT",
    ],
)
def test_the_error_reaches_the_caller_and_leaves_no_transaction_open(world: World, statement: str) -> None:
    con = _open(world)
    store = refusal(con)
    store.log()
    with pytest.raises(ReplicationError):
        con.execute(statement).fetchall()
    assert con.get_autocommit()
    assert con.txn_state("main") == apsw.SQLITE_TXN_NONE
    store.nothing()
    con.execute("INSERT INTO t VALUES (7)")
    world.stored(con)
    assert con.execute("PRAGMA integrity_check").get == "ok"


def test_with_connection_raises_with_ours_as_context(world: World) -> None:
    con = _open(world)
    store = refusal(con)
    store.log()
    with pytest.raises(apsw.SQLError) as caught:
        with con:
            con.execute("INSERT INTO t VALUES (1)")
    assert isinstance(caught.value, ReplicationError) or isinstance(caught.value.__context__, ReplicationError)
    if not con.get_autocommit():
        con.execute("ROLLBACK")
    store.nothing()
    bottomless_wal.flush(con)
    world.stored(con)


def test_after_an_error_from_the_outermost_release_the_caller_rolls_back(world: World) -> None:
    con = _open(world)
    store = refusal(con)
    store.log()
    con.execute("SAVEPOINT s; INSERT INTO t VALUES (1)")
    with pytest.raises(ReplicationError):
        con.execute("RELEASE s")
    if not con.get_autocommit():
        con.execute("ROLLBACK")
    assert con.get_autocommit()
    store.nothing()
    con.execute("INSERT INTO t VALUES (2)")
    assert rows(con) == 2, "the local commit stood"
    world.stored(con)


@pytest.mark.parametrize("way", ["returning", "or-fail", "blob", "backup"])
def test_commits_without_a_wal_hook_raise_too(world: World, way: str) -> None:
    con = _open(world)
    con.execute("CREATE UNIQUE INDEX i ON t(x); INSERT INTO t VALUES (zeroblob(100))")
    store = refusal(con)
    store.log()
    if way == "returning":
        cursor = con.cursor()
        next(cursor.execute("INSERT INTO t VALUES (1), (2) RETURNING x"))
        with pytest.raises(ReplicationError):
            cursor.close()
    elif way == "or-fail":
        with pytest.raises(apsw.Error):
            con.execute("INSERT OR FAIL INTO t VALUES (1), (2), (1)")
    elif way == "blob":
        store.nothing()
        con.execute("DROP INDEX i")  # what is indexed cannot be written to in place
        store.log()
        blob = con.blob_open("main", "t", "x", 1, True)
        blob.write(b"changed")
        with pytest.raises(ReplicationError):
            blob.close()
    else:
        source = apsw.Connection(":memory:")
        source.execute("CREATE TABLE t(x); INSERT INTO t VALUES (1)")
        with pytest.raises(ReplicationError):
            with con.backup("main", source, "main") as backup:
                backup.step()
    assert bottomless_wal.status(con).last_error is not None
    store.nothing()
    bottomless_wal.flush(con)
    world.stored(con)
    assert con.execute("PRAGMA integrity_check").get == "ok"


@pytest.mark.parametrize("failing", ["main", "b", "both"])
def test_one_of_two_attached_databases_fails_and_neither_is_harmed(world: World, failing: str) -> None:
    here = world.machine()
    con = here.connect("a.db")
    with bottomless_wal.runtime.connect.pending_open(world.options):
        con.execute(f"ATTACH 'file:{here.path('b.db')}?vfs=bottomless' AS b")
    con.execute("PRAGMA b.journal_mode=wal").fetchall()
    con.execute("CREATE TABLE main.t(x); CREATE TABLE b.u(x); CREATE TEMP TABLE s(x)")
    stores = {schema: refusal(con, schema) for schema in ("main", "b")}
    for schema, store in stores.items():
        if failing in (schema, "both"):
            store.log()
    with pytest.raises(ReplicationError, match="b.db" if failing == "b" else r"[ab]\.db"):
        con.execute("BEGIN; INSERT INTO t VALUES (1); INSERT INTO u VALUES (2); INSERT INTO s VALUES (3); COMMIT")
    assert con.get_autocommit()
    assert (rows(con), rows(con, "SELECT count(*) FROM u"), rows(con, "SELECT count(*) FROM s")) == (1, 1, 1)
    for store in stores.values():
        store.nothing()
    con.execute("BEGIN; INSERT INTO t VALUES (1); INSERT INTO u VALUES (2); INSERT INTO s VALUES (3); COMMIT")
    for schema in ("main", "b"):
        assert con.execute(f"PRAGMA {schema}.integrity_check").get == "ok"
    world.stored(con, "a.db")
    world.stored(con, "b.db", schema="b")


def test_an_outage_fails_all_waiters_at_once_and_each_with_an_exception_of_its_own(world: World) -> None:
    here = world.machine()
    con = here.connect()
    con.execute("CREATE TABLE t(x)")
    store = refusal(con)
    gate = threading.Event()
    store.hold(gate)
    store.log()
    errors: list[BaseException] = []

    def commit() -> None:
        mine = here.connect()
        try:
            mine.execute("INSERT INTO t VALUES (1)")
        except ReplicationError as error:
            errors.append(error)

    threads = [threading.Thread(target=commit) for _ in range(6)]
    for thread in threads:
        thread.start()
    until(lambda: rows(con) == 6)
    gate.set()
    for thread in threads:
        thread.join()
    assert len(errors) == 6
    assert len({id(error) for error in errors}) == 6
    assert len([1 for kind, key in store.seen if kind == "create"]) <= 6
    store.nothing()
    bottomless_wal.flush(con)
    world.stored(con)


def test_flush_with_a_timeout_gives_up_and_the_upload_goes_on(world: World) -> None:
    con = _open(world, ack="local")
    store = refusal(con)
    gate = threading.Event()
    store.hold(gate)
    con.execute("INSERT INTO t VALUES (1)")
    with pytest.raises(ReplicationError, match="not flushed within"):
        bottomless_wal.flush(con, timeout=0.05)
    gate.set()
    bottomless_wal.flush(con, timeout=20)
    world.stored(con)


def test_ctrl_c_ends_the_wait_and_not_the_upload(world: World) -> None:
    con = _open(world)
    store = refusal(con)
    gate = threading.Event()
    waiting = threading.Event()

    def rule(kind: str, key: str) -> None:
        if kind == "create":
            waiting.set()
            assert gate.wait(20)

    store.rules.append(rule)

    def interrupt() -> None:
        waiting.wait(20)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        con.execute("INSERT INTO t VALUES (1)")
    thread.join()
    assert con.get_autocommit()
    assert rows(con) == 1
    gate.set()
    bottomless_wal.flush(con)
    assert world.bucket.edges("app.db") == [(0, 1), (1, 2)]
    world.stored(con)


def test_an_error_at_close_loses_nothing(world: World) -> None:
    here = world.machine()
    con = here.connect(ack="local")
    con.execute("CREATE TABLE t(x)")
    bottomless_wal.flush(con)
    refusal(con).log()
    con.execute("INSERT INTO t VALUES (1)")
    con.close()
    assert world.bucket.head("app.db") == 1
    con = here.connect()
    assert rows(con) == 1
    world.stored(con, view=False)
    con.close()
    world.comes_back(here)


def test_status_counts_what_is_pending_and_its_age(world: World) -> None:
    con = _open(world, ack="local", interval=60)
    assert bottomless_wal.status(con).pending_frames == 0
    assert bottomless_wal.status(con).lag == 0
    con.execute("INSERT INTO t VALUES (1)")
    status = bottomless_wal.status(con)
    assert status.pending_frames == 1
    assert status.lag > 0
    assert status.path == con.db_filename("main")
    assert status.name == "app.db"
    bottomless_wal.flush(con)
    assert bottomless_wal.status(status.path).pending_frames == 0
    assert bottomless_wal.status(con).lag == 0
    assert replica_of(con).worker.last_error is None


def test_flush_and_status_of_what_is_not_open_here(world: World) -> None:
    with pytest.raises(ConfigError, match="not open"):
        bottomless_wal.flush(world.machine().path())
    with pytest.raises(ConfigError, match="not open"):
        bottomless_wal.status(apsw.Connection(":memory:"))
