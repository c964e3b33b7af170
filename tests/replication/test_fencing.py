"""One writer, told by content: rivals never overwrite each other, and an own attempt whose answer was lost is recognised."""

from __future__ import annotations

import os
import shutil
import threading
from typing import Any

import apsw
import pytest

import bottomless_wal
from bottomless_wal import ConflictError, FencedError, ReplicationError, StoreError
from bottomless_wal.storage import Receipt
from tests.support.cluster import Machine, World, child, existing, refusal, replica_of, rows, spawn


def _opened(world: World, **options: Any) -> tuple[Machine, apsw.Connection]:
    here = world.machine()
    con = here.connect(**options)
    con.execute("CREATE TABLE t(x)")
    bottomless_wal.flush(con)
    return here, con


def _rival(world: World, script: str = "con.execute('INSERT INTO t VALUES (100)')") -> Machine:
    """Another machine opens the database and goes on."""
    there = world.machine()
    child(f"con = connect({there.path()!r})\n{script}\ncon.close()\n", options=world.options)
    return there


# --- rivals ------------------------------------------------------------------------------------------------------------------------


def test_a_replica_that_was_overtaken_stops_and_overwrites_nothing(any_world: World) -> None:
    _, con = _opened(any_world)
    _rival(any_world)
    before = any_world.bucket.content()
    for n in range(2):
        with pytest.raises(FencedError, match="another writer"):
            con.execute("INSERT INTO t VALUES (?)", (n,))
    with pytest.raises(FencedError):
        bottomless_wal.flush(con)
    assert any_world.bucket.content() == before
    assert isinstance(bottomless_wal.status(con).last_error, FencedError)
    assert rows(con) == 2, "the local commits stand"


def test_a_fenced_replica_is_a_conflict_at_the_next_open(world: World) -> None:
    here, con = _opened(world)
    _rival(world)
    with pytest.raises(FencedError):
        con.execute("INSERT INTO t VALUES (1)")
    con.close()
    before, files = world.bucket.content(), here.content()
    with pytest.raises(ConflictError) as caught:
        here.connect()
    assert "initial_replication=force" in caught.value.hint
    assert world.bucket.content() == before
    assert here.content() == files


def test_an_overtaken_replica_that_has_written_nothing_follows_at_the_next_open(world: World) -> None:
    here, con = _opened(world)
    _rival(world)
    con.close()
    con = here.connect()
    assert rows(con) == 1
    con.execute("INSERT INTO t VALUES (2)")
    con.close()
    world.comes_back(here)


def test_both_machines_write_in_turn_and_none_is_lost(world: World) -> None:
    here, there = world.machine(), world.machine()
    for n in range(4):
        con = (here, there)[n % 2].connect()
        con.execute("CREATE TABLE IF NOT EXISTS t(x)")
        con.execute("INSERT INTO t VALUES (?)", (n,))
        assert rows(con) == n + 1
        con.close()
    world.comes_back(there)


def test_force_makes_the_local_file_the_head_at_once(two_worlds: World) -> None:
    world = two_worlds
    here, con = _opened(world)
    there = _rival(world)
    with pytest.raises(FencedError):
        con.execute("INSERT INTO t VALUES (1)")
    con.close()
    con = here.connect(initial_replication="force")
    head = world.bucket.head("app.db")
    assert world.bucket.segment("app.db", head - 1, head).reset
    assert rows(con, "SELECT group_concat(x) FROM t") == "1"
    assert world.bucket.log_image("app.db") == con.serialize("main")
    con.execute("INSERT INTO t VALUES (2)")
    bottomless_wal.flush(con)
    world.stored(con)
    con.close()
    world.comes_back(here)
    # The one that lost is an earlier state of the history now.
    con = there.connect()
    assert rows(con, "SELECT group_concat(x) FROM t") == "1,2"


def test_skip_uploads_nothing_at_the_open_and_the_difference_with_the_next_commit(two_worlds: World) -> None:
    world = two_worlds
    here, con = _opened(world)
    _rival(world, "with con: con.executemany('INSERT INTO t VALUES (randomblob(2000))', [()] * 50)")
    with pytest.raises(FencedError):
        con.execute("INSERT INTO t VALUES (1)")
    con.close()
    before = world.bucket.content()
    con = here.connect(initial_replication="skip")
    assert world.bucket.content() == before
    assert rows(con) == 1
    con.execute("INSERT INTO t VALUES (2)")
    assert world.bucket.log_image("app.db") == con.serialize("main")
    bottomless_wal.flush(con)
    con.close()
    world.comes_back(here)


def test_an_ordinary_restart_never_trips_the_policy(world: World) -> None:
    for policy in ("error", "force", "skip"):
        here, con = _opened(world, database_id=policy, initial_replication=policy)
        con.execute("INSERT INTO t VALUES (1)")
        con.close()
        name = f"{policy}~app.db"
        before = world.bucket.edges(name)
        con = here.connect(database_id=policy, initial_replication=policy)
        con.close()
        assert world.bucket.edges(name) == before


# --- clones ------------------------------------------------------------------------------------------------------------------------


def test_a_cloned_directory_with_its_index_is_a_rival(two_worlds: World) -> None:
    here, con = _opened(two_worlds)
    con.execute("INSERT INTO t VALUES (0)")
    con.close()
    clone = two_worlds.machine()
    for entry in here.directory.iterdir():
        shutil.copy2(entry, clone.directory)
    child(f"connect({clone.path()!r}).execute('INSERT INTO t VALUES (1)')", options=two_worlds.options)
    con = here.connect()  # has written nothing meanwhile: follows
    assert rows(con) == 2
    child(f"connect({clone.path()!r}).execute('INSERT INTO t VALUES (2)')", options=two_worlds.options)
    with pytest.raises(FencedError):
        con.execute("INSERT INTO t VALUES (-1)")
    con.close()
    with pytest.raises(ConflictError):
        here.connect()


def test_a_clone_with_pending_commits_is_no_descendant_for_it_is_another_file(world: World) -> None:
    here, con = _opened(world)
    refusal(con).log()
    with pytest.raises(ReplicationError):
        con.execute("INSERT INTO t VALUES (1)")
    con.close()
    clone = world.machine()
    for entry in here.directory.iterdir():
        shutil.copy2(entry, clone.directory)
    con = here.connect()
    assert world.bucket.head("app.db") == 2
    con.close()
    con = clone.connect()  # what was pending is in the log now: the clone is at the head
    con.execute("INSERT INTO t VALUES (2)")
    con.close()
    world.comes_back(clone)


def test_an_old_backup_copied_over_the_file_is_no_descendant(world: World) -> None:
    here, con = _opened(world)
    con.execute("INSERT INTO t VALUES (1)")
    con.close()
    backup = here.content()
    con = here.connect()
    con.execute("INSERT INTO t VALUES (2)")
    for n in range(3):
        con.execute(f"PRAGMA user_version={n + 1}")  # page 1, and with it the change counter, moves on
    con.close()
    with open(here.path(), "r+b") as file:  # the same inode, as cp does it
        file.write(backup)
        file.truncate()
    con = here.connect()
    assert rows(con) == 2, "an earlier state is brought forward"
    con.close()
    # And one that is no state of the history at all, though made of one:
    stock = world.machine()
    with open(stock.path(), "wb") as file:
        file.write(backup)
    other = stock.stock()
    other.execute("INSERT INTO t VALUES ('from elsewhere')")
    other.close()
    with open(here.path(), "r+b") as file:
        file.write(stock.content())
        file.truncate()
    before = here.content()
    with pytest.raises(ConflictError):
        here.connect()
    assert here.content() == before


# --- the same beginning --------------------------------------------------------------------------------------------------------------


def test_two_initial_replications_one_wins(world: World) -> None:
    machines = [world.machine(), world.machine()]
    for n, machine in enumerate(machines):
        stock = machine.stock()
        stock.execute("CREATE TABLE t(x)")
        stock.executemany("INSERT INTO t VALUES (?)", ((n,) for _ in range(1000)))
        stock.close()
    script = """
try:
    con = connect(argv[0])
    con.execute("INSERT INTO t VALUES (5)")
    print("won")
except (bottomless_wal.FencedError, bottomless_wal.ConflictError) as error:
    print("lost", type(error).__name__)
"""
    processes = [spawn(script, machine.path(), options=world.options) for machine in machines]
    answers = [process.communicate(timeout=60) for process in processes]
    words = sorted(out.split()[0] for out, _ in answers)
    assert words == ["lost", "won"], answers
    winner = [out.startswith("won") for out, _ in answers].index(True)
    loser = machines[1 - winner]
    content = loser.content()
    with pytest.raises(ConflictError):
        loser.connect()
    assert loser.content() == content
    con = world.machine().connect()
    assert rows(con, f"SELECT count(*) FROM t WHERE x = {winner}") == 1000


def test_the_very_same_file_replicated_twice_is_one_history(world: World) -> None:
    machines = [world.machine(), world.machine()]
    stock = machines[0].stock()
    stock.execute("PRAGMA journal_mode=wal; CREATE TABLE t(x); INSERT INTO t VALUES (1)").fetchall()
    stock.close()
    shutil.copy(machines[0].path(), machines[1].path())
    for machine in machines:
        con = machine.connect()
        assert rows(con) == 1
        con.close()
    assert world.bucket.edges("app.db") == [(0, 1)]


# --- lost answers ------------------------------------------------------------------------------------------------------------------


def test_an_attempt_whose_answer_was_lost_is_adopted(any_world: World) -> None:
    here, con = _opened(any_world)
    store = refusal(con)
    store.lose_answers()
    with pytest.raises(ReplicationError):
        con.execute("INSERT INTO t VALUES (1)")
    con.execute("INSERT INTO t VALUES (2)")
    assert any_world.bucket.edges("app.db") == [(0, 1), (1, 2), (2, 3)]
    bottomless_wal.flush(con)
    any_world.stored(con)
    con.close()
    any_world.comes_back(here)


def test_a_batch_that_has_grown_since_its_lost_attempt(world: World) -> None:
    here, con = _opened(world)
    store = refusal(con)
    # Attempt 1 is refused, attempt 2 has one commit more, is stored, and its answer lost; attempt 3 has another one.
    store.log()
    with pytest.raises(ReplicationError):
        con.execute("INSERT INTO t VALUES (1)")
    store.nothing()
    store.lose_answers()
    with pytest.raises(ReplicationError):
        con.execute("INSERT INTO t VALUES (2)")
    con.execute("INSERT INTO t VALUES (3)")
    assert world.bucket.edges("app.db") == [(0, 1), (1, 2), (2, 3)]
    assert len(world.bucket.segment("app.db", 1, 2).positions) == 2
    world.stored(con, view=False)
    bottomless_wal.flush(con)
    world.stored(con)
    con.close()
    world.comes_back(here)


@pytest.mark.parametrize("between", ["nothing", "checkpoint", "restart", "truncate", "stranger", "vacuum"])
def test_adopting_after_what_happened_between(world: World, between: str) -> None:
    here, con = _opened(world)
    con.executemany("INSERT INTO t VALUES (randomblob(2000))", [()] * 20)
    store = refusal(con)
    store.lose_answers()
    with pytest.raises(ReplicationError):
        con.execute("INSERT INTO t VALUES (1)")
    store.log()
    if between in ("checkpoint", "restart", "truncate"):
        mode = {"checkpoint": "PASSIVE"}.get(between, between.upper())
        con.wal_checkpoint(mode=getattr(apsw, f"SQLITE_CHECKPOINT_{mode}"))
        with pytest.raises(ReplicationError):
            con.execute("INSERT INTO t VALUES (2)")
    elif between == "stranger":
        stranger = here.stock()
        stranger.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        stranger.execute("DELETE FROM t")
        stranger.close()
    elif between == "vacuum":
        with pytest.raises(ReplicationError):
            con.execute("DELETE FROM t")
        with pytest.raises(ReplicationError):
            con.execute("VACUUM")
    store.nothing()
    con.execute("INSERT INTO t VALUES (3)")
    bottomless_wal.flush(con)
    world.stored(con)
    con.close()
    world.comes_back(here)


@pytest.mark.parametrize("index", ["kept", "lost"])
def test_a_lost_answer_is_recognised_by_the_next_open(world: World, index: str) -> None:
    here, con = _opened(world)
    store = refusal(con)
    store.lose_answers(100)
    with pytest.raises(ReplicationError):
        con.execute("INSERT INTO t VALUES (1)")
    store.log()
    con.close()
    if index == "lost":
        os.unlink(here.path("app.db-bottomless"))
    con = here.connect()
    assert world.bucket.edges("app.db") == [(0, 1), (1, 2)]
    con.execute("INSERT INTO t VALUES (2)")
    bottomless_wal.flush(con)
    world.stored(con)
    con.close()
    world.comes_back(here)


def test_a_lost_answer_of_the_very_first_commit(world: World) -> None:
    here = world.machine()
    con = here.connect()
    refusal(con).lose_answers()
    with pytest.raises(ReplicationError):
        con.execute("CREATE TABLE t(x)")
    con.execute("INSERT INTO t VALUES (1)")
    bottomless_wal.flush(con)
    world.stored(con)
    con.close()
    world.comes_back(here)


def test_a_lost_answer_and_then_a_rival(world: World) -> None:
    _, con = _opened(world)
    store = refusal(con)
    store.lose_answers()
    with pytest.raises(ReplicationError):
        con.execute("INSERT INTO t VALUES (1)")
    _rival(world, "assert con.execute('SELECT count(*) FROM t').get == 1; con.execute('INSERT INTO t VALUES (100)')")
    with pytest.raises(FencedError):
        con.execute("INSERT INTO t VALUES (2)")
    assert world.bucket.head("app.db") == 3


# --- pruning must not reopen a key ---------------------------------------------------------------------------------------------------


def test_a_put_long_after_the_last_proof_looks_beyond_before_it_acknowledges(world: World) -> None:
    _, con = _opened(world)
    replica = replica_of(con)
    _rival(world, "[con.execute('INSERT INTO t VALUES (1)') for _ in range(3)]")
    for pre in (1, 2):  # retention has pruned the commits between
        world.bucket.delete(f"app.db-wal/{pre:016x}-{pre + 1:016x}")
    real = replica.store.create

    def later(key: str, data: bytes) -> Receipt:
        receipt = real(key, data)
        return Receipt(receipt.created, receipt.date + 2 * 3600)

    replica.store.create = later  # type: ignore[method-assign]
    with pytest.raises(FencedError, match="pruned"):
        con.execute("INSERT INTO t VALUES (2)")


def test_a_put_long_after_the_last_proof_is_fine_when_nobody_went_on(world: World) -> None:
    here, con = _opened(world)
    replica = replica_of(con)
    real = replica.store.create

    def later(key: str, data: bytes) -> Receipt:
        receipt = real(key, data)
        return Receipt(receipt.created, receipt.date + 2 * 3600)

    replica.store.create = later  # type: ignore[method-assign]
    con.execute("INSERT INTO t VALUES (2)")
    con.execute("INSERT INTO t VALUES (3)")
    world.stored(con)
    con.close()
    world.comes_back(here)


# --- one process ---------------------------------------------------------------------------------------------------------------------


def test_rivals_at_the_same_moment_have_one_winner_for_each_txid(world: World) -> None:
    """Two machines, each from the same state: of all they write, one line of history comes out."""
    here, con = _opened(world)
    con.close()
    there = world.machine()
    for entry in here.directory.iterdir():
        shutil.copy2(entry, there.directory)
    script = """
con = connect(argv[0], retry_timeout=5)
done = 0
try:
    for n in range(30):
        con.execute("INSERT INTO t VALUES (?)", (argv[1] + str(n),))
        done += 1
except bottomless_wal.FencedError:
    pass
print(done)
"""
    processes = [spawn(script, machine.path(), tag, options=world.options) for machine, tag in ((here, "a"), (there, "b"))]
    answers = [int(process.communicate(timeout=60)[0].split()[-1]) for process in processes]
    con = world.machine().connect()
    for tag, acknowledged in zip("ab", answers, strict=True):
        assert rows(con, f"SELECT count(*) FROM t WHERE x LIKE '{tag}%'") >= acknowledged
    assert rows(con) == sum(answers)


def test_a_fence_reaches_every_connection_and_thread(world: World) -> None:
    here, con = _opened(world)
    _rival(world)
    errors: list[BaseException] = []

    def commit() -> None:
        mine = here.connect()
        try:
            mine.execute("INSERT INTO t VALUES (1)")
        except apsw.Error as error:
            errors.append(error)
        mine.close()

    threads = [threading.Thread(target=commit) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [type(error) for error in errors] == [FencedError] * 5
    con.close()


# --- commits that lead back to the head's own state ------------------------------------------------------------------------------


def test_a_commit_that_undoes_a_lost_attempt_is_stored_before_that_attempt_arrives(world: World) -> None:
    """Its state is the head's, by every hash. But the request whose answer was lost is still on its way, and would be the next head."""
    here = world.machine()
    con = here.connect(ack="log", pages="off")
    con.execute("CREATE TABLE t(x); INSERT INTO t VALUES (13)")
    store = replica_of(con).store
    late: list[tuple[str, bytes]] = []
    real = store.create

    def create(key: str, data: bytes) -> Any:
        if late:
            return real(key, data)
        late.append((key, data))
        raise StoreError(f"{key}: the answer was lost", hint="A test did that.")

    store.create = create  # type: ignore[method-assign]
    with pytest.raises(ReplicationError):
        con.execute("UPDATE t SET x = 14")
    con.execute("UPDATE t SET x = 13")
    assert not real(*late[0]).created, "its key is taken"
    image = con.serialize("main")
    assert world.bucket.log_image("app.db") == image
    con.close()


def test_a_commit_that_leads_back_to_the_head_is_fenced_by_a_rival(world: World) -> None:
    here = world.machine()
    con = here.connect(ack="log", pages="off")
    con.execute("CREATE TABLE t(x); INSERT INTO t VALUES (13)")
    store = refusal(con)
    store.log()
    with pytest.raises(ReplicationError):
        con.execute("UPDATE t SET x = 14")
    child("connect(argv[0], pages='off').execute('UPDATE t SET x = 77')", world.machine().path(), options=world.options)
    store.nothing()
    with pytest.raises(FencedError):
        con.execute("UPDATE t SET x = 13")


def test_a_commit_that_leads_back_to_the_head_by_a_scan_is_fenced_by_a_rival(world: World) -> None:
    here = world.machine()
    con = here.connect(ack="log", pages="off")
    con.execute("CREATE TABLE t(x); INSERT INTO t VALUES (13)")
    child("connect(argv[0], pages='off').execute('UPDATE t SET x = 77')", world.machine().path(), options=world.options)
    stranger = here.stock()
    stranger.execute("SELECT * FROM t").fetchall()
    stranger.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)  # without a seal
    with pytest.raises(FencedError):
        con.execute("UPDATE t SET x = 13")


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


def test_a_skip_that_was_followed_by_no_commit_settles_nothing(world: World) -> None:
    """The next open asks the policy again, and until then the bucket stays what it was."""
    _, con = _opened(world)
    con.close()
    here = existing(world)
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
