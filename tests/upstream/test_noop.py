"""Facts about `wal_checkpoint(NOOP)`, the question the monitor asks: how many frames are committed?"""

from __future__ import annotations

import os
from typing import Any

import apsw
import pytest


def test_a_connection_that_never_read_gets_minus_one(connect: Any, tools: Any) -> None:
    """NOOP before any read says (-1, -1): the monitor has to read once before it is asked."""
    connect(wal=True).execute("CREATE TABLE t(x)")
    fresh = connect()
    assert tools.noop(fresh) == (-1, -1)
    fresh.execute("SELECT * FROM t").fetchall()
    assert tools.noop(fresh)[0] > 0


def test_commits_of_others_are_seen_without_a_new_read(connect: Any, tools: Any) -> None:
    """NOOP looks at the shared wal-index, so an idle monitor needs no transaction to see a commit."""
    writer, monitor = connect(wal=True), connect()
    writer.execute("CREATE TABLE t(x)")
    monitor.execute("SELECT * FROM t").fetchall()
    before = tools.noop(monitor)[0]
    writer.execute("INSERT INTO t VALUES(1)")
    assert tools.noop(monitor)[0] > before


def test_frames_of_an_open_transaction_are_not_counted(connect: Any, tools: Any) -> None:
    """A spilled transaction writes frames before it commits: only the wal-index says which are committed."""
    writer, monitor = connect(wal=True), connect()
    writer.execute("CREATE TABLE t(x); PRAGMA cache_size=2; PRAGMA cache_spill=1").fetchall()
    monitor.execute("SELECT * FROM t").fetchall()
    before, size = tools.noop(monitor)[0], os.path.getsize("a.db-wal")
    writer.execute("BEGIN")
    for _ in range(50):
        writer.execute("INSERT INTO t VALUES(randomblob(4000))")
    assert os.path.getsize("a.db-wal") > size + 20 * 4096
    assert tools.noop(monitor)[0] == before
    writer.execute("COMMIT")
    assert tools.noop(monitor)[0] > before + 20


@pytest.mark.parametrize("begin", ["BEGIN; SELECT * FROM t", "BEGIN IMMEDIATE"])
def test_noop_is_refused_inside_a_transaction(connect: Any, tools: Any, begin: str) -> None:
    """NOOP on a connection in a transaction raises LockedError: monitor and pin have to be two connections."""
    connection = connect(wal=True)
    connection.execute("CREATE TABLE t(x); INSERT INTO t VALUES(1)")
    connection.execute(begin).fetchall()
    with pytest.raises(apsw.LockedError):
        tools.noop(connection)
    connection.execute("ROLLBACK")
    assert tools.noop(connection)[0] > 0


def test_noop_writes_nothing(connect: Any, tools: Any) -> None:
    """NOOP backfills no frame, so asking it at every commit costs no checkpoint."""
    connection = connect(wal=True)
    connection.execute("CREATE TABLE t(x)")
    before = os.path.getsize("a.db"), os.path.getsize("a.db-wal")
    committed, backfilled = tools.noop(connection)
    assert committed > 0
    assert backfilled == 0
    assert (os.path.getsize("a.db"), os.path.getsize("a.db-wal")) == before


def test_noop_in_phase_two_counts_the_commit(watch: Any, connect: Any, tools: Any) -> None:
    """In phase two another connection's NOOP already covers the committer's frames: they can be read and sent there."""
    writer, monitor = connect(watched=True, wal=True), connect()
    writer.execute("CREATE TABLE t(x)")
    monitor.execute("SELECT * FROM t").fetchall()
    seen: list[int] = []
    watch.on["phase two"] = lambda _: seen.append(tools.noop(monitor)[0])
    before = tools.noop(monitor)[0]
    writer.execute("INSERT INTO t VALUES(1)")
    assert seen == [tools.noop(monitor)[0]]
    assert seen[0] > before


def test_noop_says_zero_inside_the_header_write(watch: Any, connect: Any, tools: Any) -> None:
    """While a restart writes the new WAL header NOOP already says 0: the guard there must not ask it for the position."""
    writer, monitor = connect(watched=True, wal=True), connect()
    writer.execute("CREATE TABLE t(x); INSERT INTO t VALUES(1)")
    monitor.execute("SELECT * FROM t").fetchall()
    writer.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
    seen: list[int] = []
    watch.on["header"] = lambda _: seen.append(tools.noop(monitor)[0])
    assert tools.noop(monitor)[0] > 0
    writer.execute("INSERT INTO t VALUES(2)")
    assert seen == [0]


def test_noop_is_not_stopped_by_a_checkpoint(watch: Any, connect: Any, tools: Any) -> None:
    """NOOP answers while somebody else is in the middle of a checkpoint: a long one does not hold up a commit."""
    writer, monitor = connect(watched=True, wal=True), connect()
    writer.execute("CREATE TABLE t(x)")
    monitor.execute("SELECT * FROM t").fetchall()
    seen: list[int] = []
    watch.on["main xWrite"] = lambda data, offset: seen.append(tools.noop(monitor)[0])
    writer.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
    assert set(seen) == {tools.noop(monitor)[0]}


TEAR = """
import sys
# The wal-index begins with two copies of one header: a reader between the two writes finds them different.
with open("a.db-shm", "r+b") as file:
    byte = file.read(9)[8]
    file.seek(8)
    file.write(bytes([byte ^ 1]))
"""


def test_noop_is_busy_while_a_writer_is_between_two_headers(connect: Any, tools: Any) -> None:
    """NOOP raises BusyError when it meets the wal-index header half written: that is no answer, ask again."""
    writer, monitor = connect(wal=True), connect()
    writer.execute("CREATE TABLE t(x)")
    monitor.execute("SELECT * FROM t").fetchall()
    committed = tools.noop(monitor)
    writer.execute("BEGIN IMMEDIATE")
    tools.python(TEAR)  # in a process of its own: closing the file here would drop SQLite's locks
    with pytest.raises(apsw.BusyError):
        tools.noop(monitor)
    tools.python(TEAR)
    assert tools.noop(monitor) == committed
    writer.execute("ROLLBACK")
