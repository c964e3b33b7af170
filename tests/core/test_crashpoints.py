"""Killed in every named window between two effects: reopened in place, and booted elsewhere, nothing acknowledged is missing."""

from __future__ import annotations

import json

import pytest
from worlds import Machine, World, spawn

import bottomless_wal
from bottomless_wal import crashpoints

# argv: path, point, how often it is passed over first, acks, pages. Prints each row that was acknowledged.
SCRIPT = """
from bottomless_wal import crashpoints
path, point, passes = argv[0], argv[1], int(argv[2])
left = [passes]
def die():
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
crashpoints.arm(point, die)
con = connect(path, **json.loads(argv[3]))
con.set_busy_timeout(10000)
print("opened", flush=True)
con.execute("CREATE TABLE IF NOT EXISTS t(name UNIQUE, x)")
def insert(name, size=10):
    con.execute("INSERT OR REPLACE INTO t VALUES (?, randomblob(?))", (name, size))
    print("row", name, flush=True)
for n in range(4):
    insert(f"{argv[4]} a {n}")
con.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_RESTART)
insert(f"{argv[4]} b", 30000)
con.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
insert(f"{argv[4]} c", 200000)
con.execute("DELETE FROM t WHERE length(x) > 100000"); print("gone", f"{argv[4]} c", flush=True)
con.execute("VACUUM")
bottomless_wal.flush(con)
with con:
    for n in range(3):
        con.execute("INSERT INTO t VALUES (?, randomblob(?))", (f"{argv[4]} d {n}", 6000000 if argv[5] == "large" else 100))
for n in range(3):
    print("row", f"{argv[4]} d {n}", flush=True)
con.close()
"""


@pytest.fixture
def acknowledged() -> set[str]:
    """The rows whose commit has returned."""
    return set()


def _die(
    world: World, machine: Machine, point: str, passes: int, tag: str, known: set[str], *, size: str = "small", **options: object
) -> bool:
    """Runs the script until it dies at `point`; whether it did."""
    process = spawn(SCRIPT, machine.path(), point, str(passes), json.dumps(options), tag, size, options=world.options)
    out, err = process.communicate(timeout=60)
    assert process.returncode in (0, -9), f"exit {process.returncode}\n{out}\n{err}"
    for line in out.splitlines(keepends=True):
        word, _, name = line.rstrip("\n").partition(" ")
        if not line.endswith("\n"):
            break  # cut off by the kill
        if word == "row":
            known.add(name)
        elif word == "gone":
            known.discard(name)
    return process.returncode == -9


def _whole(world: World, machine: Machine, known: set[str]) -> None:
    con = machine.connect()
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


# Where the script, on a machine that has never seen the database, comes by; the others need a machine of their own.
BY_COMMITS = sorted(
    crashpoints.POINTS - {"before rename", "after rename", "before reset", "before conversion", "within adopt", "after body"}
)


@pytest.mark.parametrize("passes", [0, 3])
@pytest.mark.parametrize("point", BY_COMMITS)
def test_killed_while_it_commits(world: World, acknowledged: set[str], point: str, passes: int) -> None:
    here = world.machine()
    died = _die(world, here, point, passes, "first", acknowledged)
    assert died or passes, f"{point!r} was never reached"
    if acknowledged:  # else there is nothing to come back, and elsewhere another history would begin
        # Elsewhere first: what was acknowledged is in the store, not only in the file.
        con = world.machine().connect()
        assert acknowledged <= {name for (name,) in con.execute("SELECT name FROM t")}
        con.close()
    # Then the machine that died comes back: it may know of commits that nobody was told of.
    _whole(world, here, acknowledged)
    world.comes_back(here)


@pytest.mark.parametrize("point", BY_COMMITS)
def test_killed_and_killed_again_in_place(world: World, acknowledged: set[str], point: str) -> None:
    here = world.machine()
    for round_ in range(3):
        _die(world, here, point, round_, f"round {round_}", acknowledged)
    _whole(world, here, acknowledged)
    world.comes_back(here)


@pytest.mark.parametrize("ack", ["log", "local"])
@pytest.mark.parametrize(
    "point", ["before intent", "before put", "after put", "before header", "before view", "within view", "before seal", "after seal"]
)
def test_killed_with_another_ack(world: World, acknowledged: set[str], point: str, ack: str) -> None:
    here = world.machine()
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


def test_killed_after_the_body_of_a_large_commit(world: World, acknowledged: set[str]) -> None:
    here = world.machine()
    assert _die(world, here, "after body", 0, "first", acknowledged, size="large")
    _whole(world, world.machine(), acknowledged)
    _whole(world, here, acknowledged)
    world.comes_back(here)


@pytest.mark.parametrize("point", ["before rename", "after rename", "after open"])
@pytest.mark.parametrize("old", [False, True], ids=["restore", "fast-forward"])
def test_killed_while_it_restores(world: World, acknowledged: set[str], point: str, old: bool) -> None:
    first = world.machine()
    assert not _die(world, first, "within adopt", 0, "first", acknowledged)
    here = first
    if old:
        assert not _die(world, world.machine(), "within adopt", 0, "second", acknowledged)
    else:
        here = world.machine()
    assert _die(world, here, point, 0, "third", set())
    _whole(world, here, acknowledged)
    world.comes_back(here)


def test_killed_while_it_adopts(world: World, acknowledged: set[str]) -> None:
    here = world.machine()
    assert _die(world, here, "after put", 3, "first", acknowledged)
    assert _die(world, here, "within adopt", 0, "second", acknowledged)
    _whole(world, here, acknowledged)
    world.comes_back(here)


@pytest.mark.parametrize("point", ["before conversion", "before put", "after put", "before header", "after open"])
@pytest.mark.parametrize("journal", ["delete", "wal"])
def test_killed_in_an_initial_replication(world: World, point: str, journal: str) -> None:
    here = world.machine()
    stock = here.stock()
    stock.execute(f"PRAGMA journal_mode={journal}").fetchall()
    stock.execute("CREATE TABLE t(name UNIQUE, x)")
    stock.executemany("INSERT INTO t VALUES (?, randomblob(2000))", ((f"old {n}",) for n in range(50)))
    stock.close()
    died = _die(world, here, point, 0, "first", set())
    assert died or (point, journal) == ("before conversion", "wal")
    _whole(world, here, {f"old {n}" for n in range(50)})
    world.comes_back(here)


@pytest.mark.parametrize("point", ["before reset", "before put", "after put", "before header", "after open"])
def test_killed_in_a_reset(world: World, point: str) -> None:
    _die(world, world.machine(), "within adopt", 0, "other", set())
    here = world.machine()
    stock = here.stock()
    stock.execute("CREATE TABLE t(name UNIQUE, x)")
    stock.executemany("INSERT INTO t VALUES (?, randomblob(2000))", ((f"old {n}",) for n in range(50)))
    stock.close()
    assert _die(world, here, point, 0, "first", set(), initial_replication="force")
    con = here.connect(initial_replication="force")
    con.close()
    _whole(world, here, {f"old {n}" for n in range(50)})
    world.comes_back(here)


def test_every_point_is_covered_here() -> None:
    elsewhere = {"before rename", "after rename", "before reset", "before conversion", "within adopt", "after body"}
    assert set(BY_COMMITS) | elsewhere == set(crashpoints.POINTS)


def test_an_unknown_point_is_refused() -> None:
    with pytest.raises(ValueError, match="no crash point"):
        crashpoints.arm("before lunch", lambda: None)
