"""Frames that were written to the WAL before a scan and are committed after it."""

from __future__ import annotations

import os
from typing import Any

import apsw
import pytest

import bottomless_wal
from bottomless_wal import ReplicationError
from tests.support.cluster import Machine, World, refusal, replica_of


def _opened(world: World, **options: Any) -> tuple[Machine, apsw.Connection]:
    here = world.machine()
    con = here.connect(**options)
    con.execute("CREATE TABLE t(x)")
    bottomless_wal.flush(con)
    return here, con


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
