"""The WAL is checkpointed, restarted, truncated and deleted between commits: the position is carried across, or a scan finds out."""

from __future__ import annotations

import ctypes
import os
import time
from typing import Any

import apsw
import pytest

import bottomless_wal
from bottomless_wal import ConflictError, ReplicationError
from bottomless_wal.formats.wal import frame_offset
from bottomless_wal.sqlite.database_reader import LocalDatabase
from tests.support.cluster import Machine, World, child, refusal, rows

CHECKPOINTS = {
    "passive": apsw.SQLITE_CHECKPOINT_PASSIVE,
    "full": apsw.SQLITE_CHECKPOINT_FULL,
    "restart": apsw.SQLITE_CHECKPOINT_RESTART,
    "truncate": apsw.SQLITE_CHECKPOINT_TRUNCATE,
}


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of databases that were read as a whole."""
    seen: list[str] = []
    real = LocalDatabase.pages

    def pages(self: LocalDatabase, *arguments: object) -> object:
        seen.append(self.path)
        return real(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(LocalDatabase, "pages", pages)
    return seen


def _opened(world: World, **options: Any) -> tuple[Machine, apsw.Connection]:
    here = world.machine()
    con = here.connect(**options)
    con.execute("CREATE TABLE t(x)")
    bottomless_wal.flush(con)
    return here, con


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_commits_before_and_after_checkpoints(world: World, scans: list[str], kind: str) -> None:
    here, con = _opened(world)
    scans.clear()
    for n in range(12):
        con.execute("INSERT INTO t VALUES (?)", (n,))
        if n % 3:
            con.wal_checkpoint(mode=CHECKPOINTS[kind])
        world.stored(con)
    assert scans == [], "a WAL that we restarted ourselves needs no scan"
    con.close()
    world.comes_back(here)


def test_automatic_checkpoints_keep_the_wal_small_and_need_no_scan(world: World, scans: list[str]) -> None:
    here, con = _opened(world, pages="off")
    scans.clear()
    for _ in range(60):
        con.execute("INSERT INTO t VALUES (randomblob(300000))")  # about 75 frames each
    assert os.path.getsize(here.path("app.db-wal")) < 8 << 20
    assert scans == []
    assert world.bucket.log_image("app.db") == con.serialize("main")


def test_a_reader_that_stays_lets_the_wal_grow_only_so_far(world: World) -> None:
    here, con = _opened(world, pages="off")
    reader = here.connect(pages="off")
    reader.execute("BEGIN; SELECT * FROM t")
    con.executemany("INSERT INTO t VALUES (randomblob(100000))", [()] * 60)
    reader.execute("COMMIT")
    con.executemany("INSERT INTO t VALUES (randomblob(100000))", [()] * 60)
    con.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    assert os.path.getsize(here.path("app.db-wal")) == 0
    assert world.bucket.log_image("app.db") == con.serialize("main")


def test_journal_size_limit_cuts_the_wal(world: World, scans: list[str]) -> None:
    here, con = _opened(world)
    con.execute("PRAGMA journal_size_limit=8192")
    scans.clear()
    for _ in range(3):
        con.execute("INSERT INTO t VALUES (randomblob(200000))")
        con.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_RESTART)
        con.execute("INSERT INTO t VALUES (1)")
        world.stored(con)
        assert os.path.getsize(here.path("app.db-wal")) <= 16 * 4120
    assert scans == []
    con.close()
    world.comes_back(here)


def test_persist_wal(world: World, scans: list[str]) -> None:
    here, con = _opened(world)
    on = ctypes.c_int(1)
    assert con.file_control("main", apsw.SQLITE_FCNTL_PERSIST_WAL, ctypes.addressof(on))
    con.execute("INSERT INTO t VALUES (1)")
    con.close()
    scans.clear()
    con = here.connect()
    con.execute("INSERT INTO t VALUES (2)")
    world.stored(con)
    assert scans == []


def test_a_rolled_back_first_transaction_of_a_new_wal(world: World, scans: list[str]) -> None:
    _, con = _opened(world)
    con.execute("PRAGMA cache_size=3")
    con.execute("INSERT INTO t VALUES (1)")
    con.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_RESTART)
    scans.clear()
    for _ in range(2):
        con.execute("BEGIN")
        con.executemany("INSERT INTO t VALUES (randomblob(4000))", [()] * 20)  # spills: the header and frames are written
        con.execute("ROLLBACK")
    con.execute("INSERT INTO t VALUES (2)")
    world.stored(con)
    assert scans == []


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_restarts_while_commits_are_pending(world: World, kind: str) -> None:
    here, con = _opened(world, ack="local", interval=60)
    for n in range(10):
        con.execute("INSERT INTO t VALUES (?)", (n,))
        if n % 4 == 3:
            con.wal_checkpoint(mode=CHECKPOINTS[kind])
    bottomless_wal.flush(con)
    world.stored(con)
    con.execute("INSERT INTO t VALUES (99)")
    con.close()
    world.comes_back(here)


# --- strangers ---------------------------------------------------------------------------------------------------------------------


def test_a_commit_by_the_stock_vfs_goes_with_the_next_one(world: World) -> None:
    here, con = _opened(world)
    stranger = here.stock()
    stranger.execute("INSERT INTO t VALUES (1)")
    con.execute("INSERT INTO t VALUES (2)")
    world.stored(con)
    stranger.execute("INSERT INTO t VALUES (3)")
    bottomless_wal.flush(con)
    world.stored(con)
    con.close()
    stranger.close()


@pytest.mark.parametrize("kind", ["restart", "truncate"])
@pytest.mark.parametrize("another_process", [False, True], ids=["here", "elsewhere"])
def test_a_stranger_restarts_the_wal(world: World, kind: str, another_process: bool) -> None:
    here, con = _opened(world)
    con.execute("INSERT INTO t VALUES (1)")
    for n in range(3):
        if another_process:
            child(
                f"""
con = apsw.Connection({here.path()!r})
con.execute("INSERT INTO t VALUES (10)")
con.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_{kind.upper()})
con.execute("INSERT INTO t VALUES (11)")
con.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_{kind.upper()})
""",
                options=world.options,
            )
        else:
            stranger = here.stock()
            stranger.execute("INSERT INTO t VALUES (10)")
            stranger.wal_checkpoint(mode=CHECKPOINTS[kind])
            stranger.execute("INSERT INTO t VALUES (11)")
            stranger.wal_checkpoint(mode=CHECKPOINTS[kind])
            stranger.close()
        con.execute("INSERT INTO t VALUES (?)", (n,))
        world.stored(con)
    assert rows(con) == 10
    con.close()
    world.comes_back(here)


def _conflict(world: World, here: Machine) -> None:
    """The open refuses, and changes neither side."""
    before, file = world.bucket.content(), here.content()
    with pytest.raises(ConflictError):
        here.connect()
    assert (world.bucket.content(), here.content()) == (before, file)


def test_a_stranger_writes_while_nobody_has_it_open(world: World, scans: list[str]) -> None:
    """Without a WAL its work looks like an old backup, copied over the file: the policy decides."""
    here, con = _opened(world)
    con.close()
    stranger = here.stock()
    stranger.execute("INSERT INTO t VALUES (1); PRAGMA user_version=5")
    stranger.close()
    _conflict(world, here)
    scans.clear()
    con = here.connect(initial_replication="skip")
    con.execute("INSERT INTO t VALUES (2)")
    assert world.bucket.log_image("app.db") == con.serialize("main")
    assert scans, "only a scan can find what was done behind our back"
    con.close()
    world.comes_back(here)


def test_a_stranger_reads_while_nobody_has_it_open(world: World, scans: list[str]) -> None:
    """To look is no change: nothing is asked, nothing is scanned."""
    here, con = _opened(world)
    con.execute("INSERT INTO t VALUES (1)")
    con.close()
    stranger = here.stock()
    assert rows(stranger) == 1
    stranger.close()
    scans.clear()
    con = here.connect()
    assert rows(con) == 1
    assert scans == []
    con.close()
    world.comes_back(here)


def test_a_stranger_leaves_a_wal_behind(world: World) -> None:
    here, con = _opened(world)
    con.close()
    child(
        f"""
con = apsw.Connection({here.path()!r})
con.execute("INSERT INTO t VALUES (1)")
os.kill(os.getpid(), signal.SIGKILL)
""",
        options=world.options,
        check=False,
    )
    assert os.path.getsize(here.path("app.db-wal"))
    con = here.connect()
    assert rows(con) == 1
    bottomless_wal.flush(con)
    world.stored(con)


def test_a_stranger_goes_back_to_a_rollback_journal(world: World) -> None:
    here, con = _opened(world)
    con.close()
    stranger = here.stock()
    assert stranger.execute("PRAGMA journal_mode=delete").get == "delete"
    stranger.execute("INSERT INTO t VALUES (1)")
    stranger.close()
    _conflict(world, here)
    con = here.connect(initial_replication="force")
    assert con.execute("PRAGMA journal_mode").get == "wal"
    bottomless_wal.flush(con)
    world.stored(con)
    con.execute("INSERT INTO t VALUES (2)")
    con.close()
    world.comes_back(here)


def test_a_stranger_changes_the_page_size(world: World) -> None:
    here, con = _opened(world)
    con.executemany("INSERT INTO t VALUES (randomblob(3000))", [()] * 20)
    con.close()
    stranger = here.stock()
    stranger.execute("PRAGMA journal_mode=delete; PRAGMA page_size=1024; VACUUM; PRAGMA journal_mode=wal").fetchall()
    stranger.close()
    _conflict(world, here)
    con = here.connect(initial_replication="skip")
    assert rows(con, "PRAGMA page_size") == 1024
    con.execute("INSERT INTO t VALUES (1)")
    bottomless_wal.flush(con)
    world.stored(con)
    assert world.bucket.segment("app.db", world.bucket.head("app.db") - 1, world.bucket.head("app.db")).reset
    con.execute("INSERT INTO t VALUES (2)")
    con.close()
    world.comes_back(here)


# --- close and open again ----------------------------------------------------------------------------------------------------------


def test_a_clean_reopen_scans_nothing_and_takes_few_requests(two_worlds: World, scans: list[str]) -> None:
    here, con = _opened(two_worlds)
    con.executemany("INSERT INTO t VALUES (randomblob(2000))", [()] * 20)
    con.close()
    scans.clear()
    for n in range(3):
        con = here.connect()
        assert scans == [], "a clean reopen reads nothing as a whole"
        requests = bottomless_wal.status(con).requests
        if two_worlds.endpoint.kind != "directory":  # which has to write a file to know what time it is there
            assert sum(requests.values()) - requests.get("head", 0) <= 4, requests  # bucket, log, and the segments at both its ends
            assert requests.get("put", 0) == 0
        assert requests.get("create", 0) == 0
        if n != 1:
            con.execute("INSERT INTO t VALUES (1)")
        con.close()
    two_worlds.comes_back(here)


def test_a_reopen_after_a_kill_scans_nothing_while_the_machine_stays_up(world: World, scans: list[str]) -> None:
    here = world.machine()
    for _ in range(2):
        child(
            f"""
con = connect({here.path()!r})
con.execute("CREATE TABLE IF NOT EXISTS t(x)")
con.execute("INSERT INTO t VALUES (1)")
os.kill(os.getpid(), signal.SIGKILL)
""",
            options=world.options,
            check=False,
        )
    con = here.connect()
    assert rows(con) == 2
    assert scans == []
    bottomless_wal.flush(con)
    world.stored(con)


def test_after_a_reboot_of_the_machine_it_scans(world: World, scans: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    here = world.machine()
    child(
        f"""
con = connect({here.path()!r})
con.execute("CREATE TABLE t(x)")
con.execute("INSERT INTO t VALUES (1)")
os.kill(os.getpid(), signal.SIGKILL)
""",
        options=world.options,
        check=False,
    )
    for module in ("recovery", "index", "replicator"):
        monkeypatch.setattr(f"bottomless_wal.replication.{module}.boot_id", lambda: b"another boot id!")
    con = here.connect()
    assert scans
    assert rows(con) == 1
    con.execute("INSERT INTO t VALUES (2)")
    world.stored(con, view=False)


@pytest.mark.parametrize("damage", ["missing", "empty", "garbage", "torn-entry", "another's"])
def test_the_index_is_only_a_cache(world: World, damage: str) -> None:
    here, con = _opened(world)
    con.executemany("INSERT INTO t VALUES (randomblob(2000))", [()] * 20)
    con.close()
    path = here.path("app.db-bottomless")
    content = bytearray(here.content("app.db-bottomless"))
    if damage == "missing":
        os.unlink(path)
    else:
        if damage == "empty":
            content.clear()
        elif damage == "garbage":
            content[8:] = os.urandom(len(content) - 8)  # without the magic it could be anybody's file
        elif damage == "torn-entry":
            content[16384 + 16 * 5 : 16384 + 16 * 6] = bytes(16)
        else:
            other = world.machine()
            stranger = other.connect("other.db")
            stranger.execute("CREATE TABLE other(x)")
            stranger.close()
            content[:] = other.content("other.db-bottomless")
        with open(path, "wb") as file:
            file.write(content)
    con = here.connect()
    con.execute("INSERT INTO t VALUES (7)")
    if damage == "torn-entry":
        con.execute("DELETE FROM t")
        con.execute("VACUUM")
    bottomless_wal.flush(con)
    world.stored(con)
    con.close()
    world.comes_back(here)


@pytest.mark.parametrize("damage", ["missing", "empty", "garbage"])
def test_the_index_is_lost_while_the_database_is_open(world: World, damage: str) -> None:
    here, con = _opened(world)
    path = here.path("app.db-bottomless")
    con.execute("INSERT INTO t VALUES (1)")
    if damage == "missing":
        os.unlink(path)
    else:
        with open(path, "r+b") as file:
            if damage == "empty":
                file.truncate(0)
            else:
                file.write(os.urandom(16384))
    con.execute("INSERT INTO t VALUES (2)")
    con.execute("INSERT INTO t VALUES (3)")
    world.stored(con, view=False)
    bottomless_wal.flush(con)
    world.stored(con)
    con.close()
    world.comes_back(here)


def test_pending_commits_survive_a_close_a_restart_and_a_new_wal(world: World) -> None:
    here, con = _opened(world)
    refusal(con).log()
    for n in range(3):
        with pytest.raises(ReplicationError):
            con.execute("INSERT INTO t VALUES (?)", (n,))
    con.close()
    stranger = here.stock()
    stranger.execute("INSERT INTO t VALUES (9)")
    stranger.close()
    _conflict(world, here)
    con = here.connect(initial_replication="skip")
    con.execute("DELETE FROM t WHERE x = 9")
    assert rows(con) == 3
    assert world.bucket.log_image("app.db") == con.serialize("main")
    con.close()


@pytest.mark.parametrize("backfilled", [False, True])
@pytest.mark.parametrize("kind", ["RESTART", "TRUNCATE"])
def test_pending_commits_in_a_wal_of_random_salts_are_known_after_a_kill(world: World, kind: str, backfilled: bool) -> None:
    """SQLite draws the salts of a new WAL at random where the connection that begins it has never restarted one: the seals tell."""
    here = world.machine()
    child(
        """
from tests.support.cluster import refusal
one, two = (connect(argv[0], ack="log", pages="off") for _ in range(2))
one.execute("CREATE TABLE t(x)")
two.execute("SELECT * FROM t").fetchall()
refusal(one).log()
def commit(con):
    try:
        con.execute("INSERT INTO t VALUES (randomblob(3000))")
    except bottomless_wal.ReplicationError:
        pass
for con in (two, one, two):
    commit(con)
    one.wal_checkpoint(mode=getattr(apsw, "SQLITE_CHECKPOINT_" + argv[1]))
commit(two)
if argv[2]:
    one.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
commit(two)
os.kill(os.getpid(), signal.SIGKILL)
""",
        here.path(),
        kind,
        "yes" if backfilled else "",
        options={**world.options, "retry_timeout": 0},
        check=False,
    )
    con = here.connect()
    assert rows(con) == 5
    assert world.bucket.log_image("app.db") == con.serialize("main")
    con.close()
    world.comes_back(here)


@pytest.mark.parametrize("kind", ["RESTART", "TRUNCATE"])
def test_a_restart_while_a_scanned_commit_is_stored_is_witnessed(world: World, kind: str) -> None:
    """The seal speaks of the WAL of the position that the index had until then."""
    here = world.machine()
    child(
        """
from tests.support.cluster import _fail, refusal, replica_of, until
one, two, three = (connect(argv[0], ack="log", pages="off") for _ in range(3))
def commit(con):
    try:
        con.execute("INSERT INTO t VALUES (randomblob(3000))")
    except bottomless_wal.ReplicationError:
        pass
one.execute("CREATE TABLE t(x)")
for con in (two, three):
    con.execute("SELECT * FROM t").fetchall()
restart = getattr(apsw, "SQLITE_CHECKPOINT_" + argv[1])
store = refusal(one)
store.log()
commit(two)
one.wal_checkpoint(mode=restart)  # what is pending now takes a scan
commit(two)
one.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)  # the pin takes no lock on a WAL that is wholly in the main file
def meanwhile(kind, key):
    if kind == "create" and not threads:
        one.wal_checkpoint(mode=restart)
        threads.append(threading.Thread(target=commit, args=(three,)))
        threads[0].start()
        until(lambda: one.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_NOOP)[0] > 0)
        store.rules.append(lambda kind, key: _fail(True, key))
threads = []
store.nothing()
store.after.append(meanwhile)
try:
    bottomless_wal.flush(one)
except bottomless_wal.ReplicationError:
    pass
threads[0].join()
commit(three)
os.kill(os.getpid(), signal.SIGKILL)
""",
        here.path(),
        kind,
        options={**world.options, "retry_timeout": 0},
        check=False,
    )
    con = here.connect()
    assert rows(con) == 4
    assert world.bucket.log_image("app.db") == con.serialize("main")
    con.close()
    world.comes_back(here)


def test_a_power_loss_after_an_adoption_in_a_restarted_wal_undoes_nothing(world: World) -> None:
    here = world.machine()
    done = child(
        """
from tests.support.cluster import refusal, replica_of
one, two = (connect(argv[0], ack="log", pages="off") for _ in range(2))
def commit(con):
    try:
        con.execute("INSERT INTO t VALUES (randomblob(3000))")
    except bottomless_wal.ReplicationError:
        pass
one.execute("CREATE TABLE t(x)")
two.execute("SELECT * FROM t").fetchall()
store = refusal(one)
store.log()
commit(two)
one.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_RESTART)
commit(two)
store.nothing()
store.lose_answers()
commit(two)
replicator = replica_of(one).replicator
adopt = replicator.fencing.adopt_in_doubt
def adopted(*arguments):
    adopt(*arguments)
    store.log()
replicator.fencing.adopt_in_doubt = adopted
commit(two)
print(replicator.index.peek(replicator.index.path).position.frame, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
""",
        here.path(),
        options={**world.options, "retry_timeout": 0},
        check=False,
    )
    image = world.bucket.log_image("app.db")
    os.truncate(here.path("app.db-wal"), frame_offset(int(done.stdout), 4096))  # the last commit that is stored is not whole
    os.unlink(here.path("app.db-shm"))
    con = here.connect()
    assert con.serialize("main") == image


def test_a_restart_while_a_batch_reads_is_witnessed_though_the_one_before_has_just_been_followed(world: World) -> None:
    """The seal speaks of the position that the index has on the disk: it is there as soon as a batch goes by it."""
    here = world.machine()
    child(
        """
from tests.support.cluster import _fail, refusal, replica_of
from bottomless_wal.core import failpoints
from bottomless_wal.formats.index_header import Identity
real_of = Identity.of.__func__
Identity.of = classmethod(lambda cls, path: (found := real_of(cls, path)) and found._replace(mtime_ns=1, ctime_ns=1))  # coarse clocks
one, two, three = (connect(argv[0], ack="local", pages="off", interval=0.01) for _ in range(3))
def commit(con):
    con.execute("INSERT INTO t VALUES (1)")
one.execute("CREATE TABLE t(x)")
bottomless_wal.flush(one)
for con in (two, three):
    con.execute("SELECT * FROM t").fetchall()
store = refusal(one)
one.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_RESTART)
def meanwhile():
    failpoints.disarm()
    one.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    commit(three)
    store.after.append(lambda kind, key: store.rules.append(lambda kind, key: _fail(True, key)))
    done.set()
def backfilled(*arguments):
    one.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)  # the pin takes no lock on a WAL that is wholly in the main file
    return real(*arguments)
done = threading.Event()
replicator = replica_of(one).replicator
real, replicator.batch = replicator.batch, backfilled
failpoints.arm("before intent", meanwhile)
commit(two)
done.wait(20)
while replicator.index.peek_header(replicator.index.path).txid < 2:
    time.sleep(0.01)
commit(three)
os.kill(os.getpid(), signal.SIGKILL)
""",
        here.path(),
        options={**world.options, "retry_timeout": 0},
        check=False,
    )
    con = here.connect()
    assert rows(con) == 3
    assert world.bucket.log_image("app.db") == con.serialize("main")
    con.close()
    world.comes_back(here)


# --- what the index says after a power loss ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rebooted", [True, False], ids=["the machine", "the processes"])
def test_another_process_that_closes_cleanly_vouches_for_nobody(world: World, monkeypatch: pytest.MonkeyPatch, rebooted: bool) -> None:
    """Acknowledged commits are not reverted in the log by a WAL that was cut to its header, whoever has closed the database before."""
    here = world.machine()
    child(
        """
from tests.support import cluster
con = connect(argv[0])
con.execute("CREATE TABLE t(x); INSERT INTO t VALUES ('base')")
con.execute("PRAGMA wal_checkpoint(truncate)").fetchall()
con.execute("INSERT INTO t VALUES (1)")
cluster.child("con = connect(argv[0]); con.execute('SELECT * FROM t').fetchall(); con.close()", argv[0], options=options)
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


MANY = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 300) INSERT INTO t SELECT randomblob(1000) FROM n"


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
