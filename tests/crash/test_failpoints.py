"""Killed in every named window between two effects: reopened in place, and booted elsewhere, nothing acknowledged is missing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import apsw
import pytest

import bottomless_wal
from bottomless_wal import ReplicationError
from bottomless_wal.core import failpoints
from bottomless_wal.replication.index import ENTRY_SIZE, HEADER_SIZE
from tests.support.cluster import Machine, World, refusal, rows
from tests.support.forkserver import fork

# argv: path, point, how often it is passed over first, a tag. Prints each row that was acknowledged.
SCRIPT = """
path, point, passes, tag = argv
die_at(point, int(passes))
con = connect(path)
con.execute("CREATE TABLE IF NOT EXISTS t(name UNIQUE, x)")
def insert(name, size=10):
    con.execute("INSERT OR REPLACE INTO t VALUES (?, randomblob(?))", (name, size))
    print("row", name, flush=True)
for n in range(4):
    insert(f"{tag} a {n}")
con.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_RESTART)
insert(f"{tag} b", 30000)
con.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
insert(f"{tag} c", 200000)
print("gone", f"{tag} c", flush=True)  # from here on it may be: another thread may die at any moment
con.execute("DELETE FROM t WHERE length(x) > 100000")
con.execute("VACUUM")
bottomless_wal.flush(con)
with con:
    for n in range(3):
        con.execute("INSERT INTO t VALUES (?, randomblob(?))", (f"{tag} d {n}", 100))
for n in range(3):
    print("row", f"{tag} d {n}", flush=True)
con.close()
"""

# argv: path, point, how often it is passed over first. Opens the database, and writes nothing.
OPENING = """
die_at(argv[1], int(argv[2]))
con = connect(argv[0])
bottomless_wal.flush(con)
"""

COMMITTING = sorted(
    {
        *("before intent", "before put", "after put", "before header", "before view", "within view", "after view"),
        *("before seal", "after seal", "before sweep", "after sweep", "before close", "after close", "after open"),
    }
)
"""Where SCRIPT comes by on a machine that has never seen the database; the others need a story of their own."""

REPLICATING = ["before conversion", "after conversion", "after clear", "before put", "after put", "within record", "before header"]
RESTORING = ["after clear", "within restore", "before rename", "after rename", "after open"]


def _die(world: World, machine: Machine, point: str, passes: int, tag: str, known: set[str], **options: object) -> bool:
    """Runs SCRIPT until it dies at `point`; whether it did. `known` are the rows whose commit has returned."""
    code, lines = fork(SCRIPT, machine.path(), point, str(passes), tag, options={**world.options, **options}).end()
    for line in lines:
        word, _, name = line.partition(" ")
        (known.add if word == "row" else known.discard)(name)
    return code < 0


def _dies_opening(world: World, machine: Machine, point: str, passes: int = 0, **options: object) -> None:
    code, _ = fork(OPENING, machine.path(), point, str(passes), options={**world.options, **options}).end()
    assert code < 0, f"{point!r} was never reached"


def _whole(world: World, machine: Machine, known: set[str], **options: object) -> None:
    """Opened on `machine`, the database has what is known, and is what the log says."""
    con = machine.connect(**options)
    try:
        assert con.execute("PRAGMA integrity_check").get == "ok"
        if known:
            there = {name for (name,) in con.execute("SELECT name FROM t")}
            assert known <= there, f"acknowledged and gone: {sorted(known - there)}"
        bottomless_wal.flush(con)
        status = bottomless_wal.status(con)
        assert status.pending_frames == 0
        if status.txid:
            assert world.bucket.log_image("app.db") == con.serialize("main")
            last = world.bucket.edges("app.db")[-1]
            assert world.bucket.segment("app.db", *last).post_hash == status.state_hash
    finally:
        con.close()


def _has(world: World, machine: Machine, known: set[str]) -> None:
    con = machine.connect()
    assert known <= {name for (name,) in con.execute("SELECT name FROM t")}
    con.close()


def _existing(machine: Machine, journal: str = "wal") -> set[str]:
    """A database that no replication has seen."""
    stock = machine.stock()
    stock.execute(f"PRAGMA journal_mode={journal}").fetchall()
    stock.execute("CREATE TABLE t(name UNIQUE, x)")
    stock.executemany("INSERT INTO t VALUES (?, randomblob(2000))", ((f"old {n}",) for n in range(50)))
    stock.close()
    return {f"old {n}" for n in range(50)}


def _replicated(world: World, machine: Machine, *names: str) -> set[str]:
    """A small history, made on `machine`, which has closed it."""
    con = machine.connect()
    con.execute("CREATE TABLE IF NOT EXISTS t(name UNIQUE, x)")
    for name in names or ("one", "two"):
        con.execute("INSERT INTO t VALUES (?, randomblob(3000))", (name,))
    known = {name for (name,) in con.execute("SELECT name FROM t")}
    con.close()
    return known


# --- while it commits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", COMMITTING)
def test_killed_while_it_commits_and_killed_again_in_place(world: World, point: str) -> None:
    here = world.machine()
    acknowledged: set[str] = set()
    assert _die(world, here, point, 0, "first", acknowledged), f"{point!r} was never reached"
    if acknowledged:  # else there is nothing to come back, and elsewhere another history would begin
        # Elsewhere first: what was acknowledged is in the store, not only in the file.
        _has(world, world.machine(), acknowledged)
    # Then the machine that died comes back: it may know of commits that nobody was told of.
    for passes in (3, 1):
        _die(world, here, point, passes, f"passes {passes}", acknowledged)
    _has(world, world.machine(), acknowledged)
    _whole(world, here, acknowledged)
    world.comes_back(here)


@pytest.mark.parametrize("ack", ["log", "local"])
@pytest.mark.parametrize(
    "point", ["before intent", "before put", "after put", "before header", "before view", "within view", "before seal", "after seal"]
)
def test_killed_with_another_ack(world: World, point: str, ack: str) -> None:
    here = world.machine()
    acknowledged: set[str] = set()
    for round_ in range(2):
        _die(world, here, point, 2 * round_, f"round {round_}", acknowledged, ack=ack)
    if ack == "log":
        _whole(world, world.machine(), acknowledged)
    # ack=local promises that it is on this machine's disk.
    con = here.connect(ack=ack)
    there = {name for (name,) in con.execute("SELECT name FROM t")} if acknowledged else set()
    con.close()
    assert acknowledged <= there
    if not acknowledged:
        return
    assert world.bucket.log_image("app.db") == here.content()


@pytest.mark.parametrize("point", ["within body", "after body"])
def test_killed_while_the_body_of_a_large_commit_is_stored(world: World, point: str) -> None:
    here = world.machine()
    known = _replicated(world, here)
    script = f"die_at({point!r})\nconnect(argv[0]).execute('INSERT INTO t VALUES (0, randomblob(9000000))')"
    assert fork(script, here.path(), options=world.options).end()[0] < 0
    _has(world, world.machine(), known)
    _whole(world, here, known)
    con = world.machine().connect()
    assert rows(con, "SELECT sum(length(x)) FROM t") == 9006000
    con.close()


def test_killed_while_it_adopts(world: World) -> None:
    here = world.machine()
    acknowledged: set[str] = set()
    assert _die(world, here, "after put", 3, "first", acknowledged)
    assert _die(world, here, "within adopt", 0, "second", acknowledged)
    _whole(world, here, acknowledged)
    world.comes_back(here)


@pytest.mark.parametrize("point", ["within adopt", "within record"])
def test_killed_while_it_adopts_a_whole_database_that_has_gone_on(world: World, point: str) -> None:
    here = world.machine()
    known = _existing(here)
    _dies_opening(world, here, "after put")
    # What was committed before the attempt is stored, what comes now is not; only the file as it was then, below a new WAL, tells that
    # it follows.
    here.stock_killed("INSERT INTO t VALUES ('since', 0)")
    _dies_opening(world, here, point)
    _whole(world, here, known | {"since"})
    world.comes_back(here)


@pytest.mark.parametrize("point", ["after put", "before header"])
def test_killed_and_overtaken_before_it_comes_back(world: World, point: str) -> None:
    here = world.machine()
    known = _replicated(world, here)
    script = f"die_at({point!r})\nconnect(argv[0]).execute('INSERT INTO t VALUES (0, 0)')"
    assert fork(script, here.path(), options=world.options).end()[0] < 0
    known = _replicated(world, world.machine(), "elsewhere")
    _whole(world, here, known)
    world.comes_back(here)


# --- while it opens ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", [*REPLICATING, "after open", "after fill"])
@pytest.mark.parametrize("journal", ["delete", "wal"])
def test_killed_in_an_initial_replication(world: World, point: str, journal: str) -> None:
    if (journal, "conversion" in point) == ("wal", True):
        return  # there is nothing to convert
    here = world.machine()
    known = _existing(here, journal)
    _dies_opening(world, here, point)
    _whole(world, here, known)
    assert world.bucket.edges("app.db")[0] == (0, 1)
    world.comes_back(here)


@pytest.mark.parametrize("point", ["before reset", *REPLICATING, "after open"])
def test_killed_in_a_reset(world: World, point: str) -> None:
    _replicated(world, world.machine(), *(f"larger {n}" for n in range(60)) if point == "after put" else ())
    here = world.machine()
    known = _existing(here, "delete")
    _dies_opening(world, here, point, initial_replication="force")
    _whole(world, here, known, initial_replication="force")
    assert len([edge for edge in world.bucket.edges("app.db") if world.bucket.segment("app.db", *edge).reset]) == 1
    world.comes_back(here)


@pytest.mark.parametrize("point", ["after clear", "within learn", "after open"])
def test_killed_while_it_keeps_the_local_file(world: World, point: str) -> None:
    _replicated(world, world.machine())
    here = world.machine()
    known = _existing(here)
    before = world.bucket.content()
    _dies_opening(world, here, point, initial_replication="skip")
    con = here.connect(initial_replication="skip")
    assert world.bucket.content() == before
    con.execute("INSERT INTO t VALUES ('new', 0)")
    con.close()
    _whole(world, here, known | {"new"})
    world.comes_back(here)


@pytest.mark.parametrize("point", [*RESTORING, "after fold"])
@pytest.mark.parametrize("old", [False, True], ids=["restore", "fast-forward"])
def test_killed_while_it_restores(world: World, point: str, old: bool) -> None:
    if point == ("after clear" if old else "after fold"):
        return  # one way keeps what the index says, the other has no file to fold a WAL into
    first = world.machine()
    known = _replicated(world, first)
    here = world.machine()
    if old:
        known = _replicated(world, here, "three")
        here = first
    _dies_opening(world, here, point)
    _whole(world, here, known)
    world.comes_back(here)


@pytest.mark.parametrize("point", [*RESTORING[1:], "after fold", "nowhere"])
def test_killed_while_it_brings_forward_what_only_its_place_in_the_wal_tells(world: World, point: str) -> None:
    """A power loss has cut the WAL between two commits that had been stored together: no segment lists the hash of that state."""
    here = world.machine()
    _replicated(world, here)
    con = here.connect()
    store = refusal(con)
    store.log()
    for name in ("three", "four", "five"):
        with pytest.raises(ReplicationError):
            con.execute("INSERT INTO t VALUES (?, 0)", (name,))
        if name == "three":
            # Nor does the main file hold a state that is listed: a checkpoint has copied half of them.
            reader = here.stock()
            reader.execute("BEGIN; SELECT * FROM t").fetchall()
            con.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
    reader.close()
    store.nothing()
    con.execute("INSERT INTO t VALUES ('six', 0)")
    bottomless_wal.flush(con)
    edge = world.bucket.segment("app.db", *world.bucket.edges("app.db")[-1])
    assert len(edge.positions) == 4
    page_size = edge.page_size
    lost = world.machine()
    for ending in ("", "-wal", "-bottomless"):
        shutil.copy2(here.path() + ending, lost.path() + ending)
    con.close()
    for ending in ("", "-wal", "-bottomless"):  # on the same inodes, for it is the same machine
        _overwrite(here.path() + ending, Path(lost.path() + ending).read_bytes())
    os.truncate(here.path() + "-wal", 32 + int.from_bytes(edge.positions[1][8:12], "big") * (24 + page_size))
    if point != "nowhere":
        _dies_opening(world, here, point)
    before = world.bucket.edges("app.db")
    _whole(world, here, {"one", "two", "three", "four", "five", "six"})
    assert world.bucket.edges("app.db") == before, "an earlier state is no commit"
    world.comes_back(here)


def _overwrite(path: str, data: bytes) -> None:
    with open(path, "r+b" if os.path.exists(path) else "wb") as file:
        file.write(data)
        file.truncate()


@pytest.mark.parametrize(
    "point", ["after clear", "within learn", "before intent", "before put", "after put", "before header", "after open"]
)
def test_killed_while_a_torn_index_is_made_anew(world: World, point: str) -> None:
    here = world.machine()
    known = _replicated(world, here)
    con = here.connect()
    refusal(con).log()
    with pytest.raises(ReplicationError):
        con.execute("INSERT INTO t VALUES ('pending', 0)")
    con.close()
    # A power loss has torn its entries; that the file descends from the head, it still tells, and nothing else does.
    with open(here.path("app.db-bottomless"), "r+b") as file:
        file.seek(HEADER_SIZE + ENTRY_SIZE)
        file.write(b"torn")
    _dies_opening(world, here, point)
    _whole(world, here, known | {"pending"})
    world.comes_back(here)


@pytest.mark.parametrize("point", ["after clear", "after open"])
def test_killed_while_a_lost_index_is_made_anew(world: World, point: str) -> None:
    here = world.machine()
    known = _replicated(world, here)
    os.unlink(here.path("app.db-bottomless"))
    _dies_opening(world, here, point)
    _whole(world, here, known)
    world.comes_back(here)


@pytest.mark.parametrize("point", [*RESTORING, "before put", "after put", "within record", "before header"])
def test_killed_while_it_restores_from_page_objects_alone(world: World, point: str) -> None:
    known = _replicated(world, world.machine())
    head = world.bucket.head("app.db")
    for key in world.bucket.listing("app.db-wal/"):
        world.bucket.delete(key)
    here = world.machine()
    _dies_opening(world, here, point)
    _whole(world, here, known)
    assert world.bucket.edges("app.db") == [(0, head)], "the line of txids goes on"
    known = _replicated(world, here, "three")
    world.comes_back(here)
    # And once more: the page objects alone are the newest state.
    for key in world.bucket.listing("app.db-wal/"):
        world.bucket.delete(key)
    _whole(world, world.machine(), known)


@pytest.mark.parametrize("point", ["before rename", "after rename", "before index"])
def test_killed_while_restore_replaces_the_file_and_opened_by_the_application(world: World, point: str) -> None:
    here = world.machine()
    known = _replicated(world, here)
    # A machine that died has left a WAL, and its main file a state that nobody ever committed to the log.
    con = here.connect()
    store = refusal(con)
    store.log()
    with pytest.raises(ReplicationError):
        con.execute("INSERT INTO t VALUES ('three', 0)")
    con.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
    store.nothing()
    con.execute("INSERT INTO t VALUES ('four', 0)")
    bottomless_wal.flush(con)
    known |= {"three", "four"}
    state = {ending: Path(here.path() + ending).read_bytes() for ending in ("", "-wal", "-bottomless")}
    con.close()
    for ending, data in state.items():
        _overwrite(here.path() + ending, data)
    before = world.bucket.edges("app.db")
    script = "die_at(argv[1])\nbottomless_wal.restore(argv[0], force=True, **options)"
    assert fork(script, here.path(), point, options=world.options).end()[0] < 0
    try:
        _whole(world, here, known)
    except bottomless_wal.ConflictError:
        assert point == "before rename", "the old file without its WAL is nobody's state: said, and nothing done"
    assert world.bucket.edges("app.db") == before
    bottomless_wal.restore(here.path(), force=True, **world.options)
    _whole(world, here, known)


# --- the list ------------------------------------------------------------------------------------------------------------------


def test_every_point_is_covered_here() -> None:
    alone = {"within body", "after body", "within adopt", "after fill", "before reset", "within learn", "after fold", "before index"}
    compacting = {"before merged", "after merged", "before prune", "within prune"}  # see the tests of compaction and retention
    assert {*COMMITTING, *REPLICATING, *RESTORING, *alone} == set(failpoints.POINTS) - compacting


def test_an_unknown_point_is_refused() -> None:
    with pytest.raises(ValueError, match="no crash point"):
        failpoints.arm("before lunch", lambda: None)
