"""Windows that were once open: each test stands in one, between two steps that everything else takes at a run."""

from __future__ import annotations

import os
import threading
import time
import urllib.parse
from collections.abc import Callable
from typing import Any

import apsw
import pytest
from worlds import Machine, World, child, refusal, replica_of, rows, until

import bottomless_wal
from bottomless_wal import ConfigError, ConflictError, FencedError, ReplicationError, StoreError
from bottomless_wal.sqlite import vfs
from bottomless_wal.sqlite.checkpointer import Checkpointer
from bottomless_wal.sqlite.database_reader import LocalDatabase
from bottomless_wal.storage import Receipt
from bottomless_wal.storage.directory import DirectoryStore


def _opened(world: World, **options: Any) -> tuple[Machine, apsw.Connection]:
    here = world.machine()
    con = here.connect(**options)
    con.execute("CREATE TABLE t(x)")
    bottomless_wal.flush(con)
    return here, con


def _existing(world: World, pages: int = 20) -> Machine:
    """A machine with a database that was never replicated."""
    here = world.machine()
    stock = here.stock()
    stock.execute("CREATE TABLE t(x)")
    stock.execute("BEGIN")
    stock.executemany("INSERT INTO t VALUES (zeroblob(4000))", [()] * pages)
    stock.execute("COMMIT")
    stock.close()
    return here


def _page_objects(world: World, name: str = "app.db") -> dict[str, bytes]:
    return {key: data for key, data in world.bucket.content().items() if key.startswith(f"{name}-0")}


@pytest.fixture
def answer_lost(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it: the next segment is stored, its answer lost, and the repetition within the same request finds the key taken."""
    left = [0]
    real = DirectoryStore.create

    def create(self: DirectoryStore, key: str, data: bytes) -> Receipt:
        receipt = real(self, key, data)
        if left[0] and "-wal/" in key:
            left[0] -= 1
            receipt = real(self, key, data)
            assert not receipt.created
        return receipt

    monkeypatch.setattr(DirectoryStore, "create", create)

    def arm() -> None:
        left[0] += 1

    return arm


# --- frames that are written, and not yet committed --------------------------------------------------------------------------------


def _spill(con: apsw.Connection, *work: str) -> None:
    """Begins a transaction and leaves it open, most of its frames in the WAL."""
    con.execute("PRAGMA cache_size=5")
    con.execute("BEGIN IMMEDIATE")
    for statement in work:
        con.execute(statement)


MANY = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 300) INSERT INTO t SELECT randomblob(1000) FROM n"


@pytest.mark.parametrize("existing", [False, True], ids=["the first of all", "the first of a fresh WAL"])
def test_what_was_spilled_before_a_scan_is_stored_when_its_commit_returns(world: World, existing: bool) -> None:
    """With ack=log a COMMIT returns only when it is stored, though a scan ran while its frames stood in the WAL."""
    here = world.machine()
    con = here.connect(ack="log")
    if existing:
        con.execute("CREATE TABLE t(x)")
        con.close()
        con = here.connect(ack="log")
        replica_of(con).on_file_rewritten()
        _spill(con, MANY)
    else:
        _spill(con, "CREATE TABLE t(x)", MANY)
    assert os.path.getsize(here.path("app.db-wal")) > 100_000
    bottomless_wal.flush(con)
    store = refusal(con)
    store.log()
    with pytest.raises(ReplicationError):
        con.execute("COMMIT")
    assert bottomless_wal.status(con).pending_frames
    store.nothing()
    con.execute("INSERT INTO t VALUES (1)")
    world.stored(con, view=False)
    bottomless_wal.flush(con)
    world.stored(con)
    con.close()
    world.comes_back(here)


def test_what_was_spilled_before_a_scan_is_stored_at_once_when_the_store_is_well(world: World) -> None:
    """COMMIT of a transaction whose frames a flush() has passed over leaves nothing pending."""
    here, con = _opened(world)
    con.close()
    con = here.connect(ack="log")
    replica_of(con).on_file_rewritten()
    _spill(con, MANY)
    bottomless_wal.flush(con)
    con.execute("COMMIT")
    world.stored(con, view=False)


@pytest.mark.parametrize("mode", [apsw.SQLITE_CHECKPOINT_RESTART, apsw.SQLITE_CHECKPOINT_TRUNCATE], ids=["restart", "truncate"])
def test_what_was_spilled_before_a_scan_outlives_an_outage_and_a_new_wal(world: World, mode: int) -> None:
    """A commit that is pending when the WAL is restarted is in the next batch, though a scan ran before it was committed."""
    here, con = _opened(world, ack="log")
    con.execute(MANY)
    con.execute("CREATE TABLE u(y)")
    con.close()
    con = here.connect(ack="log")
    replica_of(con).on_file_rewritten()
    _spill(con, "UPDATE t SET x = randomblob(1000)")
    bottomless_wal.flush(con)
    store = refusal(con)
    store.log()
    with pytest.raises(ReplicationError):
        con.execute("COMMIT")
    con.wal_checkpoint(mode=mode)
    with pytest.raises(ReplicationError):
        con.execute("INSERT INTO u VALUES (1)")
    store.nothing()
    con.execute("INSERT INTO u VALUES (2)")
    world.stored(con, view=False)
    bottomless_wal.flush(con)
    world.stored(con)
    con.close()
    world.comes_back(here)


# --- a WAL that is taken away ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ack", ["pages", "log"])
@pytest.mark.parametrize("how", ["deleted", "replaced", "renamed"])
def test_a_wal_that_is_taken_away_is_an_error_and_stores_no_old_state(world: World, how: str, ack: str) -> None:
    """Without the WAL the main file is an old state: a commit raises, and the log stays what it was until a new open brings all of it."""
    here, con = _opened(world, ack=ack)
    con.execute("INSERT INTO t VALUES (1)")
    bottomless_wal.flush(con)
    before = world.bucket.content()
    wal = here.path("app.db-wal")
    if how == "deleted":
        os.unlink(wal)
    elif how == "renamed":
        os.rename(wal, wal + "x")
    else:
        with open(wal + "x", "wb") as file:
            file.write(here.content("app.db-wal")[:32])
        os.replace(wal + "x", wal)
    for n in range(2):
        with pytest.raises(ReplicationError, match="deleted or replaced"):
            con.execute("INSERT INTO t VALUES (?)", (2 + n,))
    with pytest.raises(ReplicationError):
        bottomless_wal.flush(con, timeout=20)
    assert world.bucket.content() == before
    con.close()
    assert world.bucket.content() == before
    con = here.connect()
    assert rows(con) >= 1, "what was acknowledged"
    bottomless_wal.flush(con)
    world.stored(con)
    con.close()
    world.comes_back(here)


# --- what the index says after a power loss ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rebooted", [True, False], ids=["the machine", "the processes"])
def test_another_process_that_closes_cleanly_vouches_for_nobody(world: World, monkeypatch: pytest.MonkeyPatch, rebooted: bool) -> None:
    """Acknowledged commits are not reverted in the log by a WAL that was cut to its header, whoever has closed the database before."""
    here = world.machine()
    child(
        """
import worlds
con = connect(argv[0])
con.execute("CREATE TABLE t(x); INSERT INTO t VALUES ('base')")
con.execute("PRAGMA wal_checkpoint(truncate)").fetchall()
con.execute("INSERT INTO t VALUES (1)")
worlds.child("con = connect(argv[0]); con.execute('SELECT * FROM t').fetchall(); con.close()", argv[0], options=options)
con.execute("INSERT INTO t VALUES (2)")
con.execute("INSERT INTO t VALUES (3)")
os.kill(os.getpid(), signal.SIGKILL)
""",
        here.path(),
        options=world.options,
        check=False,
    )
    os.truncate(here.path("app.db-wal"), 32)
    os.unlink(here.path("app.db-shm"))
    if rebooted:
        for module in ("recovery", "index", "replicator"):
            monkeypatch.setattr(f"bottomless_wal.replication.{module}.boot_id", lambda: b"another boot id!")
    con = here.connect()
    assert rows(con, "SELECT group_concat(x) FROM t") == "base,1,2,3"
    con.execute("INSERT INTO t VALUES (4)")
    assert rows(con) == 5
    world.stored(con, view=False)
    bottomless_wal.flush(con)
    world.stored(con)
    con.close()
    world.comes_back(here)


# --- no WAL: the main file is all there is -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noticed", ["flush", "commit", "close"])
@pytest.mark.parametrize("idle", ["reopened", "restored", "truncated"])
def test_a_foreign_commit_that_leaves_no_wal_behind_is_replicated(world: World, idle: str, noticed: str) -> None:
    """A stranger's commit and TRUNCATE checkpoint, while we have an empty WAL, goes with the next batch."""
    here, con = _opened(world)
    con.execute(MANY)
    if idle != "truncated":
        con.close()
        here = here if idle == "reopened" else world.machine()
        con = here.connect()
        assert rows(con) == 300
    else:
        con.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    time.sleep(0.02)  # beyond the file system's idea of one moment
    stranger = here.stock()
    stranger.execute("UPDATE t SET x = randomblob(1000)")
    stranger.execute("PRAGMA wal_checkpoint(truncate)").fetchall()
    stranger.close()
    if noticed == "flush":
        bottomless_wal.flush(con)
        world.stored(con)
    elif noticed == "commit":
        con.execute("INSERT INTO t VALUES (1)")
        world.stored(con)
    con.close()
    world.comes_back(here)


# --- answers that were lost ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ack", ["pages", "log", "local"])
@pytest.mark.parametrize("first", [True, False], ids=["the first commit", "a later one"])
def test_a_commit_whose_repeated_request_finds_its_own_object_is_adopted(
    world: World, answer_lost: Callable[[], None], ack: str, first: bool
) -> None:
    """An attempt whose answer was lost, and whose repetition is told that the key is taken, is a commit like any other."""
    here = world.machine()
    con = here.connect(ack=ack)
    if not first:
        con.execute("CREATE TABLE u(x)")
        bottomless_wal.flush(con)
    answer_lost()
    con.execute("CREATE TABLE t(x)")
    if ack == "local":
        bottomless_wal.flush(con)
    world.stored(con, view=ack != "log")
    answer_lost()
    with con:
        con.executemany("INSERT INTO t VALUES (randomblob(3000))", [()] * 20)
    bottomless_wal.flush(con)
    world.stored(con)
    assert world.bucket.head("app.db") == (2 if first else 3)
    con.close()
    world.comes_back(here)


def test_an_existing_database_is_opened_though_the_answer_was_lost(world: World, answer_lost: Callable[[], None]) -> None:
    """The initial replication adopts its own segment."""
    here = _existing(world)
    answer_lost()
    con = here.connect()
    assert world.bucket.edges("app.db") == [(0, 1)]
    bottomless_wal.flush(con)
    world.stored(con)
    con.close()
    world.comes_back(here)


def test_a_reset_is_carried_out_though_the_answer_was_lost(world: World, answer_lost: Callable[[], None]) -> None:
    """initial_replication=force adopts its own segment, and resets once."""
    _, con = _opened(world)
    con.close()
    here = _existing(world)
    answer_lost()
    con = here.connect(initial_replication="force")
    assert world.bucket.edges("app.db") == [(0, 1), (1, 2)]
    assert world.bucket.segment("app.db", 1, 2).reset
    bottomless_wal.flush(con)
    world.stored(con)
    con.close()
    world.comes_back(here)


def test_what_was_done_while_it_was_closed_is_sent_though_the_answer_was_lost(world: World, answer_lost: Callable[[], None]) -> None:
    """The difference that an open sends is adopted when its answer was lost."""
    here, con = _opened(world)
    con.close()
    here.stock_killed("INSERT INTO t VALUES (1)")
    answer_lost()
    con = here.connect()
    assert world.bucket.edges("app.db") == [(0, 1), (1, 2)]
    bottomless_wal.flush(con)
    world.stored(con)
    con.close()
    world.comes_back(here)


def test_an_adopted_commit_is_acknowledged_with_its_page_objects_only(world: World, answer_lost: Callable[[], None]) -> None:
    """With ack=pages a COMMIT that was adopted raises when its page objects could not be stored."""
    here, con = _opened(world)
    store = refusal(con)
    store.pages()
    answer_lost()
    with pytest.raises(ReplicationError, match="page objects"):
        con.execute("INSERT INTO t VALUES (1)")
    world.stored(con, view=False)
    store.nothing()
    con.execute("INSERT INTO t VALUES (2)")
    world.stored(con)
    con.close()
    world.comes_back(here)


def test_a_commit_adopted_by_the_next_one_has_its_page_objects(world: World) -> None:
    """When a COMMIT returns with ack=pages, the page objects of the attempt that it adopted are there too."""
    _, con = _opened(world)
    with con:
        con.executemany("INSERT INTO t VALUES (zeroblob(4000))", [()] * 20)
    refusal(con).lose_answers()
    with pytest.raises(ReplicationError):
        con.execute("UPDATE t SET x = randomblob(4000)")
    con.execute("INSERT INTO t VALUES (2)")
    world.stored(con)


# --- an idle replica that was overtaken ----------------------------------------------------------------------------------------------


GROW = """
con = connect(argv[0])
with con: con.executemany("INSERT INTO t VALUES (randomblob(4000))", [()] * 50)
con.execute("UPDATE t SET x = randomblob(4000)")
bottomless_wal.flush(con)
con.close()
"""


@pytest.mark.parametrize("how", ["flush", "close"])
def test_an_overtaken_replica_deletes_no_page_objects(world: World, how: str) -> None:
    """A machine that was restored and stayed idle leaves the page objects of the one that writes alone."""
    _, con = _opened(world)
    con.close()
    idle = world.machine()
    con = idle.connect()
    writer = world.machine()
    child(GROW, writer.path(), options=world.options)
    before = world.bucket.content()
    assert len(_page_objects(world)) > 50
    if how == "flush":
        with pytest.raises(FencedError):
            bottomless_wal.flush(con, timeout=20)
    con.close()
    assert world.bucket.content() == before
    world.comes_back(writer)


@pytest.mark.parametrize("how", ["flush", "close", "waiting"])
def test_an_overtaken_replica_overwrites_no_page_objects(world: World, how: str) -> None:
    """A backlog of the page view that was left when another machine took over is not put over the newer objects."""
    here, con = _opened(world)
    con.execute("INSERT INTO t VALUES (zeroblob(90000))")
    store = refusal(con)
    store.pages()
    with pytest.raises(ReplicationError):
        con.execute("UPDATE t SET x = randomblob(90000)")
    writer = world.machine()
    child(GROW, writer.path(), options=world.options)
    before = world.bucket.content()
    store.nothing()
    if how == "flush":
        with pytest.raises(FencedError):
            bottomless_wal.flush(con, timeout=20)
    elif how == "waiting":
        until(lambda: isinstance(bottomless_wal.status(con).last_error, FencedError), 5)
    con.close()
    assert world.bucket.content() == before
    world.comes_back(writer)
    con = here.connect()
    assert rows(con) == 51
    con.close()


@pytest.mark.parametrize("how", ["commit", "flush", "close"])
def test_a_replica_that_adopts_and_was_overtaken_overwrites_no_page_objects(world: World, how: str) -> None:
    """An own attempt that is stored, and that another machine has followed, is not put over the newer page objects."""
    _, con = _opened(world)
    con.execute("INSERT INTO t VALUES (zeroblob(90000))")
    store = refusal(con)
    store.lose_answers()
    store.after.append(lambda kind, key: store.log() if kind == "create" else None)  # nor is it found out in the background
    with pytest.raises(ReplicationError):
        con.execute("UPDATE t SET x = randomblob(90000)")
    store.hold(held := threading.Event())
    writer = world.machine()
    child(GROW, writer.path(), options=world.options)
    before = world.bucket.content()
    store.nothing()
    held.set()
    if how == "commit":
        with pytest.raises(FencedError):
            con.execute("INSERT INTO t VALUES (1)")
    elif how == "flush":
        with pytest.raises(FencedError):
            bottomless_wal.flush(con, timeout=20)
    con.close()
    assert world.bucket.content() == before
    world.comes_back(writer)


# --- the worker ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("used", [False, True], ids=["never started", "ended"])
def test_a_flush_after_the_worker_has_stopped_raises(world: World, used: bool) -> None:
    """Nobody would ever serve it: it says so instead of waiting for ever."""
    con = world.machine().connect()
    if used:
        con.execute("CREATE TABLE t(x)")
    replica_of(con).worker.stop()
    answers: list[BaseException | None] = []

    def flush() -> None:
        try:
            bottomless_wal.flush(con)
            answers.append(None)
        except ReplicationError as error:
            answers.append(error)

    thread = threading.Thread(target=flush, daemon=True)
    thread.start()
    thread.join(10)
    assert len(answers) == 1, "it still waits"
    assert isinstance(answers[0], ReplicationError)


def test_a_flush_with_a_large_backlog_lets_commits_pass(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """While flush() of one thread completes the page view, a commit of another waits for a part of it at most."""
    total, put = 1500, []
    real = DirectoryStore.put

    def slow(self: DirectoryStore, key: str, data: bytes) -> Receipt:
        if "-wal/" not in key:
            time.sleep(0.004)
            put.append(key)
        return real(self, key, data)

    here = _existing(world, total)
    monkeypatch.setattr(DirectoryStore, "put", slow)
    con = here.connect(ack="log")
    flusher = threading.Thread(target=bottomless_wal.flush, args=(here.path(),))
    flusher.start()
    until(lambda: len(put) > 100)
    held_up = []
    for n in range(3):
        start = len(put)
        con.execute("INSERT INTO t VALUES (?)", (n,))
        held_up.append(len(put) - start)
    assert flusher.is_alive(), "this test is worth nothing: the view was complete"
    assert max(held_up) < total / 3, held_up
    flusher.join()
    assert len(_page_objects(world)) >= total
    bottomless_wal.flush(con)
    world.stored(con)


# --- errors that must not stay ---------------------------------------------------------------------------------------------------------


def test_one_error_while_pinning_fails_one_commit(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pin that could not read is let go: the next commit is replicated, and the failed one with it."""
    here, con = _opened(world)
    local = replica_of(con).local
    real = LocalDatabase._touch
    left = [1]

    def touch(connection: apsw.Connection) -> None:
        if left[0] and connection is local._pin:
            left[0] -= 1
            raise apsw.CantOpenError("unable to open database file")
        real(connection)

    monkeypatch.setattr(LocalDatabase, "_touch", staticmethod(touch))
    with pytest.raises(apsw.Error):
        con.execute("INSERT INTO t VALUES (1)")
    assert left == [0]
    con.execute("INSERT INTO t VALUES (2)")
    world.stored(con)
    con.close()
    world.comes_back(here)


@pytest.mark.parametrize("error", [apsw.FullError, apsw.IOError, apsw.ReadOnlyError])
def test_an_error_of_the_checkpoint_is_not_the_commits(world: World, monkeypatch: pytest.MonkeyPatch, error: type[apsw.Error]) -> None:
    """A COMMIT that is stored returns, though the checkpoint that follows it failed."""
    here, con = _opened(world)

    def write(self: object, data: bytes, offset: int) -> None:
        raise error("the main file cannot be written")

    with monkeypatch.context() as patch:
        patch.setattr(vfs, "AUTOCHECKPOINT_FRAMES", 1)
        patch.setattr(vfs._MainFile, "xWrite", write, raising=False)
        for n in range(3):
            con.execute("INSERT INTO t VALUES (?)", (n,))
    assert rows(con) == 3
    world.stored(con)
    con.close()
    world.comes_back(here)


@pytest.mark.parametrize("how", ["error", "closed"])
def test_the_checkpointer_survives(world: World, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """After a checkpoint that failed, or a connection that was closed under it, the next one is made."""
    here, con = _opened(world)
    con.execute("INSERT INTO t VALUES (1)")
    checkpointer = replica_of(con).checkpointer
    seen: list[apsw.Connection] = []
    done: list[bool] = []
    real = Checkpointer._checkpoint

    def checkpoint(self: Checkpointer, connection: apsw.Connection, frames: int) -> None:
        seen.append(connection)
        if len(seen) == 1:
            if how == "error":
                raise apsw.FullError("the disk is full")
            connection.close()
        real(self, connection, frames)
        done.append(True)

    monkeypatch.setattr(Checkpointer, "_checkpoint", checkpoint)

    def asked() -> bool:
        checkpointer.ask(9000)
        return len(done) > 0

    until(asked, 10)
    con.execute("INSERT INTO t VALUES (2)")
    world.stored(con)
    con.close()
    world.comes_back(here)


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


# --- the horizon after which a put alone proves nothing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rival", [True, False], ids=["a rival went on", "nobody went on"])
def test_the_proof_is_made_up_for_when_it_could_not_be_made_at_once(world: World, rival: bool) -> None:
    """A put long after the last proof is acknowledged only when a look beyond was possible, be it at the next attempt."""
    here, con = _opened(world)
    replica = replica_of(con)
    if rival:
        there = world.machine()
        child("con = connect(argv[0])\nfor n in range(3): con.execute('INSERT INTO t VALUES (1)')", there.path(), options=world.options)
        for pre in (1, 2):  # retention has pruned the commits between
            world.bucket.delete(f"app.db-wal/{pre:016x}-{pre + 1:016x}")
    create, now, listing = replica.store.create, replica.store.now, replica.store.list
    left = [1]

    def later(key: str, data: bytes) -> Receipt:
        receipt = create(key, data)
        return Receipt(receipt.created, receipt.date + 86400)

    def failing(prefix: str, *, after: str = "") -> Any:
        if left[0]:
            left[0] -= 1
            raise StoreError("the listing timed out", hint="A test did that.")
        return listing(prefix, after=after)

    replica.store.create = later  # type: ignore[method-assign]
    replica.store.now = lambda: now() + 86400  # type: ignore[method-assign]
    replica.store.list = failing  # type: ignore[method-assign]
    with pytest.raises(ReplicationError):
        con.execute("INSERT INTO t VALUES (2)")
    assert left == [0]
    for n in range(2):
        if rival:
            with pytest.raises(FencedError, match="pruned"):
                con.execute("INSERT INTO t VALUES (?)", (3 + n,))
        else:
            con.execute("INSERT INTO t VALUES (?)", (3 + n,))
    if not rival:
        world.stored(con)
        con.close()
        world.comes_back(here)


# --- after the open, without a commit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["error", "force"])
def test_the_page_view_of_an_existing_database_is_put_in_the_background(world: World, policy: str) -> None:
    """Opening is enough: neither a commit nor flush() nor a close is needed for its page objects."""
    if policy == "force":
        _, con = _opened(world)
        con.close()
    here = _existing(world, 60)
    con = here.connect(initial_replication=policy)
    until(lambda: bottomless_wal.status(con).view_txid == world.bucket.head("app.db"))
    world.stored(con)
    con.close()
    world.comes_back(here)


def test_a_skip_that_was_followed_by_no_commit_settles_nothing(world: World) -> None:
    """The next open asks the policy again, and until then the bucket stays what it was."""
    _, con = _opened(world)
    con.close()
    here = _existing(world)
    before = world.bucket.content()
    for _ in range(2):
        con = here.connect(initial_replication="skip")
        assert rows(con) == 20
        con.close()
        assert world.bucket.content() == before
        with pytest.raises(ConflictError):
            here.connect()
        assert world.bucket.content() == before
    con = here.connect(initial_replication="force")
    bottomless_wal.flush(con)
    world.stored(con)
    con.close()
    world.comes_back(here)


def test_a_page_that_was_changed_and_changed_back_while_the_view_was_filled_is_put(world: World) -> None:
    """Locally ahead of the log when its turn came, and back at what the log has before it was stored: no commit carries it."""
    con = world.machine().connect(ack="local", interval=600, compaction=False)
    con.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, x)")
    con.execute("INSERT INTO t VALUES (1, 10)")
    bottomless_wal.flush(con)
    replica = replica_of(con)
    view, index, local = replica.replicator.view, replica.index, replica.local
    con.execute("UPDATE t SET x = 11")
    with view.lock.locked(), index.locked():
        header = replica.replicator.batch()
        logged = header.txid
    con.execute("UPDATE t SET x = 21 - x")
    with view.lock.locked(), index.locked(), local.pinned():
        header = replica.replicator.header()
        assert header.txid == logged
        turn = view.choose(header, local.tip(), most=100)
        assert turn is not None
        view.put_turn(turn)
        view.advance(header, turn)
    con.execute("UPDATE t SET x = 21 - x")
    bottomless_wal.flush(con)
    world.stored(con)
