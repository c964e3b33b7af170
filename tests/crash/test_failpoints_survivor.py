"""One process dies in a window between two effects, another one has the file open and goes on: it finishes or adopts what was begun."""

from __future__ import annotations

import signal

import pytest

from tests.crash.test_failpoints import COMMITTING, _whole
from tests.support.cluster import Machine, World, rows, until
from tests.support.forkserver import Child, fork, obedient

CHECKPOINT = """
def checkpoint(mode):
    try:
        con.wal_checkpoint(mode=getattr(apsw, f"SQLITE_CHECKPOINT_{mode}"))
    except apsw.BusyError:
        return  # another one is under way: SQLite does not wait for it
"""

# argv: path, point, how often it is passed over first, a tag. Prints each row that was acknowledged.
DYING = (
    CHECKPOINT
    + """
path, point, passes, tag = argv
die_at(point, int(passes))
con = connect(path)
def insert(name, size=10):
    con.execute("INSERT INTO t VALUES (?, randomblob(?))", (name, size))
    print(name, flush=True)
insert(f"{tag} a")
insert(f"{tag} b", 9000)
checkpoint("RESTART")
insert(f"{tag} c", 90000)
con.execute("UPDATE t SET x = 0 WHERE length(x) > 50000")
con.execute("VACUUM")
checkpoint("TRUNCATE")
insert(f"{tag} d")
bottomless_wal.flush(con)
con.close()
"""
)

COMPANION = (
    CHECKPOINT
    + """
con = connect(PATH)
con.execute("CREATE TABLE IF NOT EXISTS t(name, x)")
def insert(name):
    con.execute("INSERT INTO t VALUES (?, randomblob(500))", (name,))
"""
)


def _companion(world: World, here: Machine, **options: object) -> Child:
    """A process that has the database open, and has committed."""
    child = obedient(options={**world.options, **options})
    assert child.do(COMPANION.replace("PATH", repr(here.path()))) == "ok", child.said
    return child


def _done(child: Child, *commands: str) -> None:
    for command in commands:
        assert child.do(command) == "ok", f"{command}: {child.said}"


def _dying(world: World, here: Machine, point: str, passes: int, tag: str) -> Child:
    return fork(DYING, here.path(), point, str(passes), tag, options=world.options)


def _all_is_there(world: World, here: Machine, names: set[str]) -> None:
    """Nobody has the file open any more: every name is there once, here and elsewhere, and the history is one chain."""
    _whole(world, here, names)
    world.comes_back(here)
    con = here.connect()
    there = [name for (name,) in con.execute("SELECT name FROM t")]
    assert len(there) == len(set(there)), "something was done twice"
    assert names <= set(there)
    con.close()


@pytest.mark.parametrize("point", COMMITTING)
def test_the_other_goes_on(world: World, point: str) -> None:
    here = world.machine()
    companion = _companion(world, here)
    dead = 0
    names: set[str] = set()
    # Thrice: it commits at once; it restarts the WAL before it commits; it is in the middle of commits all the while.
    for passes, first in enumerate(("insert('one')", "checkpoint('TRUNCATE'); insert('two')", "")):
        if not first:
            companion.tell("for n in range(12): insert(f'all the while {n}'); checkpoint('RESTART') if n % 4 == 3 else None")
        code, lines = _dying(world, here, point, passes, f"passes {passes}").end()
        dead += code < 0
        names.update(lines)
        if first:
            _done(companion, first, f"insert('{passes} again')", "checkpoint('RESTART')", f"insert('{passes} in the next WAL')")
            names |= {f"{passes} again", f"{passes} in the next WAL"}
        else:
            assert companion.told() == "ok", companion.said
            names |= {"one", "two"} | {f"all the while {n}" for n in range(12)}
    assert dead, f"{point!r} was never reached"
    assert companion.end()[0] == 0
    _all_is_there(world, here, names)


@pytest.mark.parametrize("point", ["within adopt", "before header", "before view"])
def test_two_die_one_after_the_other_over_one_commit(world: World, point: str) -> None:
    here = world.machine()
    companion = _companion(world, here)
    _, first = _dying(world, here, "after put", 1, "first").end()
    code, second = _dying(world, here, point, 0, "second").end()
    assert code < 0
    _done(companion, "checkpoint('RESTART')", "insert('one')", "insert('two')")
    assert companion.end()[0] == 0
    _all_is_there(world, here, {*first, *second, "one", "two"})


@pytest.mark.parametrize("point", ["before intent", "before put", "after put", "before header", "before seal", "after seal"])
def test_the_other_only_restarts_the_wal_and_closes(world: World, point: str) -> None:
    here = world.machine()
    companion = _companion(world, here)
    code, names = _dying(world, here, point, 1, "first").end()
    assert code < 0
    _done(companion, "checkpoint('TRUNCATE')")
    assert companion.end()[0] == 0
    _all_is_there(world, here, set(names))


@pytest.mark.parametrize("point", ["before put", "after put"])
def test_the_first_commit_of_all_dies_and_the_other_has_never_written(world: World, point: str) -> None:
    here = world.machine()
    companion = obedient(options=world.options)
    _done(companion, f"con = connect({here.path()!r})")
    # Its open stores the empty database, which the other's has made; it dies with the first table.
    script = "die_at(argv[1], 1)\nconnect(argv[0]).execute('CREATE TABLE t(name, x)')"
    assert fork(script, here.path(), point, options=world.options).end()[0] < 0
    assert companion.end()[0] == 0
    con = here.connect()
    assert rows(con) == 0, "the commit stands locally, though nobody was told so"
    con.execute("INSERT INTO t VALUES ('one', 0)")
    con.close()
    _all_is_there(world, here, {"one"})


@pytest.mark.parametrize("point", ["before put", "after put"])
def test_the_other_waits_for_one_that_is_stopped_until_it_dies(world: World, point: str) -> None:
    here = world.machine()
    companion = _companion(world, here, retry_timeout=60.0)  # waits for the lock as long
    script = "die_at(argv[1], 0, signal.SIGSTOP)\nconnect(argv[0]).execute(\"INSERT INTO t VALUES ('stopped', 0)\")"
    stopped = fork(script, here.path(), point, options=world.options)
    until(lambda: _is_stopped(stopped.pid))
    companion.tell("insert('one')")
    until(lambda: _committed(here) == 2)
    stopped.signal(signal.SIGKILL)
    assert companion.told() == "ok", companion.said
    assert stopped.end()[0] < 0
    assert companion.end()[0] == 0
    _all_is_there(world, here, {"stopped", "one"})


def _is_stopped(pid: int) -> bool:
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        return file.read().rpartition(")")[2].split()[0] == "T"


def _committed(here: Machine) -> int:
    """How many rows stand locally, stored or not."""
    stock = here.stock()
    try:
        return int(rows(stock))
    finally:
        stock.close()
