"""Facts about the WAL file: what its frames mean, and what happens to it at a restart, a truncation and a close."""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
from pathlib import Path
from typing import Any

import apsw
import pytest

PAGE = 4096
FRAME = 24 + PAGE


def _frame(number: int) -> bytes:
    """The bytes of the WAL's 1-based frame: header and page."""
    with open("a.db-wal", "rb") as file:
        file.seek(32 + (number - 1) * FRAME)
        return file.read(FRAME)


@pytest.fixture
def t(watch: Any, connect: Any) -> apsw.Connection:
    connection: apsw.Connection = connect(watched=True, wal=True)
    connection.execute("CREATE TABLE t(x); INSERT INTO t VALUES(1)")
    watch.events.clear()
    return connection


def test_a_restart_is_a_header_write_and_salt_1_plus_one(watch: Any, t: apsw.Connection, tools: Any) -> None:
    """The first commit after a full backfill rewrites the header, salt 1 up by one, salt 2 new: all the guard has to watch."""
    t.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
    before = tools.salts("a.db")
    found: list[tuple[int, int]] = []
    watch.on["header"] = lambda data: found.append((int.from_bytes(data[16:20]), int.from_bytes(data[20:24])))
    t.execute("INSERT INTO t VALUES(2)")
    after = tools.salts("a.db")
    assert watch.events == ["xWrite(0, 32 bytes)"]
    assert found == [after]
    assert after[0] == (before[0] + 1) & 0xFFFFFFFF
    assert after[1] != before[1]


def test_no_restart_without_a_full_backfill(watch: Any, t: apsw.Connection, connect: Any) -> None:
    """While a reader keeps frames from being backfilled the WAL only grows: a restart never loses a frame the main file lacks."""
    reader = connect()
    reader.execute("BEGIN; SELECT * FROM t").fetchall()
    t.execute("INSERT INTO t VALUES(2)")
    frames, backfilled = t.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
    assert backfilled < frames
    t.execute("INSERT INTO t VALUES(3)")
    assert watch.events == []


def test_a_reader_keeps_a_restart_away_only_from_frames_it_may_need(t: apsw.Connection, connect: Any, tools: Any) -> None:
    """A read transaction begun on a fully backfilled WAL does not stop a restart: the pin protects frames not yet backfilled."""
    reader = connect()
    t.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
    reader.execute("BEGIN; SELECT * FROM t").fetchall()
    before = tools.salts("a.db")
    t.execute("INSERT INTO t VALUES(2)")
    assert tools.salts("a.db") != before
    reader.execute("COMMIT; BEGIN; SELECT * FROM t").fetchall()
    before = tools.salts("a.db")
    t.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
    t.execute("INSERT INTO t VALUES(3)")
    assert tools.salts("a.db") == before


def test_truncate_is_xtruncate_0_and_the_next_commit_a_header(watch: Any, t: apsw.Connection, tools: Any) -> None:
    """TRUNCATE empties the file, and the next commit writes a header whose salt 1 goes on from the old one."""
    before = tools.salts("a.db")
    t.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    assert watch.events == ["xTruncate(0)"]
    t.execute("INSERT INTO t VALUES(2)")
    assert watch.events == ["xTruncate(0)", "xWrite(0, 32 bytes)"]
    assert 1 <= (tools.salts("a.db")[0] - before[0]) & 0xFFFFFFFF <= 2


def test_journal_size_limit_truncates_after_the_header(watch: Any, t: apsw.Connection) -> None:
    """With a size limit a restart is followed by an xTruncate to more than 0: no "gone", the header before it told everything."""
    t.execute("PRAGMA journal_size_limit=0; INSERT INTO t VALUES(zeroblob(100000))").fetchall()
    t.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
    watch.events.clear()
    t.execute("INSERT INTO t VALUES(2)")
    assert watch.events[0] == "xWrite(0, 32 bytes)"
    assert len(watch.events) == 2
    assert watch.events[1].startswith("xTruncate(")
    assert watch.events[1] != "xTruncate(0)"


def test_the_last_close_deletes_the_wal(watch: Any, t: apsw.Connection, connect: Any) -> None:
    """Only the last connection's close deletes the WAL: while monitor and pin are open, an application's close does not."""
    monitor = connect(watched=True)
    monitor.execute("SELECT * FROM t").fetchall()
    t.close()
    assert "xDelete a.db-wal" not in watch.events
    monitor.close()
    assert watch.events[-1] == "xDelete a.db-wal"
    assert not os.path.exists("a.db-wal")


def test_persist_wal_truncates_at_the_last_close(watch: Any, t: apsw.Connection) -> None:
    """With PERSIST_WAL and a size limit the last close empties the WAL: "gone" comes as xTruncate(0), not as xDelete."""
    flag = ctypes.c_int(1)
    t.file_control("main", apsw.SQLITE_FCNTL_PERSIST_WAL, ctypes.addressof(flag))
    t.execute("PRAGMA journal_size_limit=0").fetchall()
    t.close()
    assert "xDelete a.db-wal" not in watch.events
    assert watch.events == ["xTruncate(0)"]
    assert os.path.getsize("a.db-wal") == 0


def test_frames_cut_to_size_equal_the_checkpointed_file(t: apsw.Connection, tools: Any) -> None:
    """Base image + committed frames, cut to the size each commit names, is the checkpointed file byte for byte."""
    t.wal_autocheckpoint(0)
    t.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    base = Path("a.db").read_bytes()
    model = {n + 1: base[n * PAGE : (n + 1) * PAGE] for n in range(len(base) // PAGE)}
    t.execute("PRAGMA cache_size=5; PRAGMA cache_spill=1").fetchall()
    for n in range(30):
        t.execute("BEGIN")
        t.execute(f"CREATE TABLE IF NOT EXISTS t{n % 4}(x)")
        for _ in range(25):
            t.execute(f"INSERT INTO t{n % 4} VALUES(randomblob({(n * 397) % 3000}))")
        if n % 5 == 4:
            t.execute(f"DROP TABLE t{n % 4}")
        if n % 7 == 6:
            t.execute("SAVEPOINT s; CREATE TABLE z(x); INSERT INTO z VALUES(zeroblob(50000)); ROLLBACK TO s; RELEASE s")
        t.execute("COMMIT" if n % 6 else "ROLLBACK")
        if n % 10 == 9:
            t.execute("VACUUM")
    pending: dict[int, bytes] = {}
    sizes: list[int] = [len(model)]
    for number in range(1, tools.noop(t)[0] + 1):
        frame = _frame(number)
        pgno, size = int.from_bytes(frame[:4]), int.from_bytes(frame[4:8])
        pending[pgno] = frame[24:]
        if size:
            assert set(range(sizes[-1] + 1, size + 1)) <= set(pending), "a page of the growth has no frame"
            model = {n: page for n, page in (model | pending).items() if n <= size}
            pending.clear()
            sizes.append(size)
    assert any(b < a for a, b in itertools.pairwise(sizes)), "nothing shrank: the test lost its point"
    t.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    assert b"".join(model[n] for n in range(1, len(model) + 1)) == Path("a.db").read_bytes()


def test_an_interrupted_commit_leaves_a_phantom_frame(watch: Any, t: apsw.Connection, connect: Any, tools: Any) -> None:
    """Interrupted after its last page write a commit is rolled back, but its perfect-looking frame stays: ask the wal-index."""
    monitor = connect()
    monitor.execute("SELECT * FROM t").fetchall()
    committed = tools.noop(monitor)[0]
    header = b""

    def interrupt(data: bytes, offset: int) -> None:
        nonlocal header
        if len(data) == 24:
            header = bytes(data)
        elif header[4:8] != b"\0\0\0\0":  # the page of a commit frame is written
            raise KeyboardInterrupt

    watch.on["wal written"] = interrupt
    with pytest.raises(KeyboardInterrupt):
        t.execute("INSERT INTO t VALUES('phantom')")
    watch.on.clear()
    phantom = _frame(committed + 1)
    assert phantom[4:8] != b"\0\0\0\0"
    assert phantom[8:16] == _frame(committed)[8:16]
    assert b"phantom" in phantom
    assert tools.noop(monitor)[0] == committed
    t.execute("INSERT INTO t VALUES('real')")
    assert tools.noop(monitor)[0] == committed + 1
    assert b"phantom" not in _frame(committed + 1)
    assert _frame(committed + 1)[8:16] == phantom[8:16], "same salts, same place, another content"


def test_raising_in_the_commit_frames_write_rolls_back(watch: Any, t: apsw.Connection, connect: Any) -> None:
    """An error from the xWrite of the commit frame rolls the transaction back cleanly: a stricter mode is possible one day."""

    def refuse(data: bytes, offset: int) -> None:
        if len(data) == 24 and data[4:8] != b"\0\0\0\0":
            raise apsw.SQLError("not stored")

    watch.on["wal written"] = refuse
    with pytest.raises(apsw.SQLError):
        t.execute("INSERT INTO t VALUES('lost')")
    watch.on.clear()
    assert not t.in_transaction
    t.execute("INSERT INTO t VALUES('kept')")
    other = connect()
    assert other.execute("SELECT group_concat(x) FROM t").get == "1,kept"
    assert other.execute("PRAGMA integrity_check").get == "ok"


def test_a_stale_wal_beside_a_restored_file_opens_the_old_database(connect: Any) -> None:
    """SQLite replays whatever WAL lies beside the file: stale companions are set aside before a restored file gets its name."""
    old = connect("a.db", wal=True)
    old.execute("CREATE TABLE old(x)")
    shutil.copy("a.db-wal", "kept")
    old.close()
    new = connect("new.db", wal=True)
    new.execute("CREATE TABLE newer(x); CREATE TABLE newest(x)")
    new.close()
    os.replace("new.db", "a.db")
    os.replace("kept", "a.db-wal")
    names = connect("a.db").execute("SELECT group_concat(name) FROM sqlite_schema").get
    assert names == "old"


def test_the_second_of_two_restorers_hides_acknowledged_commits(connect: Any) -> None:
    """A rename over a file that is open sends its writers into an unlinked inode: boot needs a lock and a second look."""
    for name in ("one.db", "two.db"):
        c = connect(name, wal=True)
        c.execute("CREATE TABLE t(x)")
        c.close()
    os.rename("one.db", "a.db")
    first = connect("a.db")
    first.execute("INSERT INTO t VALUES('acknowledged')")
    os.rename("two.db", "a.db")
    os.remove("a.db-wal")
    os.remove("a.db-shm")
    first.execute("INSERT INTO t VALUES('acknowledged too')")
    assert connect("a.db").execute("SELECT count(*) FROM t").get == 0


def test_a_wal_commit_takes_no_reserved_lock_on_the_main_file(watch: Any, t: apsw.Connection, connect: Any) -> None:
    """WAL commits never lock the main file above SHARED, rollback-mode writes do: refusing RESERVED refuses exactly those."""
    watch.locks.clear()
    t.execute("INSERT INTO t VALUES(2)")
    t.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
    assert max(watch.locks, default=0) <= apsw.SQLITE_LOCK_SHARED
    for mode in ("delete", "memory", "off"):
        watch.locks.clear()
        c = connect(f"{mode}.db", watched=True)
        c.execute(f"PRAGMA journal_mode={mode}").fetchall()
        c.execute("CREATE TABLE t(x)")
        assert apsw.SQLITE_LOCK_RESERVED in watch.locks


def test_exclusive_locking_shuts_the_monitor_out(t: apsw.Connection, connect: Any) -> None:
    """`locking_mode=exclusive` lets no second connection in, so no monitor and no pin: it is refused."""
    t.execute("PRAGMA locking_mode=exclusive; INSERT INTO t VALUES(2)").fetchall()
    t.execute("INSERT INTO t VALUES(3)")
    other = connect()
    other.set_busy_timeout(0)
    with pytest.raises(apsw.BusyError):
        other.execute("SELECT * FROM t").fetchall()


def test_a_commit_holds_the_write_lock_while_it_restarts_the_wal(watch: Any, t: apsw.Connection, connect: Any) -> None:
    """The guard runs under SQLite's write lock: who holds our lock and wants SQLite's would deadlock. Hence the lock order."""
    other = connect()
    other.set_busy_timeout(0)
    other.execute("SELECT * FROM t").fetchall()
    t.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
    refused: list[bool] = []

    def want(_: object) -> None:
        with pytest.raises(apsw.BusyError):
            other.execute("BEGIN IMMEDIATE")
        refused.append(True)

    watch.on["header"] = want
    t.execute("INSERT INTO t VALUES(2)")
    assert refused == [True]
