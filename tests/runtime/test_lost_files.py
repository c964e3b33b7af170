"""Files that go under open connections: nothing that stands in them passes for stored, and it is said at every way out."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apsw
import pytest

import bottomless_wal
from bottomless_wal.core.errors import FilesLostError, ReplicationError
from bottomless_wal.runtime.connect import pending_open
from tests.support.cluster import Machine, World, refusal, replica_of, rows, until


def _unlink(here: Machine) -> None:
    for ending in ("", "-wal", "-shm"):
        os.unlink(here.path() + ending)


def _move(here: Machine) -> None:
    for ending in ("", "-wal", "-shm"):
        os.rename(here.path() + ending, here.path("moved.db") + ending)


def _replace(here: Machine) -> None:
    other = here.path("other.db")
    Path(other).write_bytes(here.content())
    os.replace(other, here.path())


def _truncate(here: Machine) -> None:
    os.truncate(here.path(), 0)


LOSSES = pytest.mark.parametrize("lose", [_unlink, _move, _replace, _truncate], ids=["deleted", "moved", "replaced", "truncated"])
Loss = Callable[[Machine], None]


def _opened(world: World, **options: Any) -> tuple[Machine, apsw.Connection]:
    here = world.machine()
    con = here.connect(**options)
    con.execute("CREATE TABLE t(x)")
    bottomless_wal.flush(con)
    return here, con


def _fails(con: apsw.Connection) -> bool:
    try:
        con.execute("INSERT INTO t VALUES (2)")
    except FilesLostError:
        return True
    return False


def _comes_back_elsewhere(world: World, here: Machine, expected: int) -> None:
    for entry in here.directory.iterdir():
        entry.unlink()
    con = here.connect()
    assert rows(con) == expected, "what was acknowledged"
    con.close()


@LOSSES
@pytest.mark.parametrize("ack", ["pages", "log"])
def test_a_commit_says_so_and_so_does_a_flush(world: World, lose: Loss, ack: str) -> None:
    here, con = _opened(world, ack=ack)
    con.execute("INSERT INTO t VALUES (1)")
    before = world.bucket.content()
    lose(here)
    for n in range(3):
        with pytest.raises(FilesLostError, match=r"app\.db was"):
            con.execute("INSERT INTO t VALUES (?)", (n,))
        with pytest.raises(FilesLostError):
            bottomless_wal.flush(con, timeout=20)
    assert world.bucket.content() == before
    status = bottomless_wal.status(con)
    assert isinstance(status.last_error, FilesLostError)
    con.close()
    assert world.bucket.content() == before
    _comes_back_elsewhere(world, here, 1)


@LOSSES
def test_a_flush_says_so_although_nothing_was_committed_since(world: World, lose: Loss) -> None:
    here, con = _opened(world, ack="log")
    bottomless_wal.flush(con)
    lose(here)
    with pytest.raises(FilesLostError):
        bottomless_wal.flush(con, timeout=20)
    con.close()


@LOSSES
def test_ack_local_says_it_at_the_next_commit_the_flush_and_the_close(world: World, lose: Loss) -> None:
    here, con = _opened(world, ack="local", interval=0)
    con.execute("INSERT INTO t VALUES (1)")
    bottomless_wal.flush(con)
    before = world.bucket.content()
    lose(here)
    replica_of(con).look_seconds = 3600.0  # the batch looks, not the commit: the first ones pass
    until(lambda: _fails(con))
    for _ in range(3):
        assert _fails(con)
    with pytest.raises(FilesLostError):
        bottomless_wal.flush(con, timeout=20)
    with pytest.raises(FilesLostError):
        con.close()
    assert world.bucket.content() == before
    _comes_back_elsewhere(world, here, 1)


@LOSSES
def test_ack_local_says_it_at_the_close_alone(world: World, lose: Loss) -> None:
    """No commit, and no flush, came after."""
    here, con = _opened(world, ack="local", interval=3600)
    con.execute("INSERT INTO t VALUES (1)")
    lose(here)
    with pytest.raises(FilesLostError):
        con.close()


@LOSSES
def test_what_an_outage_left_pending_is_not_stored_by_a_flush(world: World, lose: Loss) -> None:
    here, con = _opened(world, ack="log")
    store = refusal(con)
    store.log()
    with pytest.raises(ReplicationError):
        con.execute("INSERT INTO t VALUES (1)")
    store.nothing()
    lose(here)
    with pytest.raises(FilesLostError):
        bottomless_wal.flush(con, timeout=20)
    con.close()
    _comes_back_elsewhere(world, here, 0)


def test_a_file_that_comes_back_to_its_place_is_stored(world: World) -> None:
    here, con = _opened(world, ack="log")
    _move(here)
    with pytest.raises(FilesLostError):
        con.execute("INSERT INTO t VALUES (1)")
    for ending in ("", "-wal", "-shm"):
        os.rename(here.path("moved.db") + ending, here.path() + ending)
    con.execute("INSERT INTO t VALUES (2)")
    assert rows(con) == 2
    world.stored(con, view=False)
    con.close()
    world.comes_back(here)


def test_a_file_that_was_cut_short_is_looked_through(world: World) -> None:
    """Pages that are in the main file alone are gone with its end: no commit after that is stored upon a state that is not there."""
    here, con = _opened(world, ack="log", pages="off")
    con.executemany("INSERT INTO t VALUES (zeroblob(4000))", [()] * 50)
    con.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    con.execute("INSERT INTO t VALUES (1)")
    before = world.bucket.content()
    os.truncate(here.path(), 8 * 4096)
    with pytest.raises(ReplicationError, match="page"):
        con.execute("INSERT INTO t VALUES (2)")
    assert world.bucket.content() == before


def test_a_new_database_that_nobody_has_written_to_has_nothing_to_store(world: World) -> None:
    """A file of 0 bytes without a WAL is the empty database: no error, and nothing is stored."""
    here = world.machine()
    with pending_open(world.options):
        con = apsw.Connection(here.path(), vfs=bottomless_wal.register())
    assert os.path.getsize(here.path()) == 0
    bottomless_wal.flush(con, timeout=20)
    con.close()
    assert world.bucket.content() == {}


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
