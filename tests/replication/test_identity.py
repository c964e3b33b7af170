"""What an equal identity of the main file proves: that nobody wrote to it since, unless the file system's clock is too coarse to tell."""

from __future__ import annotations

import os
import shutil
from typing import Any

import apsw
import pytest

import bottomless_wal
from bottomless_wal import ConflictError, ReplicationError
from bottomless_wal.formats.index_header import Identity
from bottomless_wal.replication import recovery_actions
from bottomless_wal.replication.index import LocalIndex
from bottomless_wal.sqlite.database_reader import LocalDatabase
from tests.support.cluster import Machine, World, _fail, child, refusal, rows


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """All timestamps of the file system are of one and the same tick."""
    real = Identity.of.__func__  # type: ignore[attr-defined]

    def of(cls: type[Identity], path: str) -> Identity | None:
        found = real(cls, path)
        return found and found._replace(mtime_ns=1, ctime_ns=1)

    monkeypatch.setattr(Identity, "of", classmethod(of))


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The databases that were looked through."""
    seen: list[str] = []
    real = LocalDatabase.pages

    def pages(self: LocalDatabase, *arguments: Any) -> Any:
        seen.append(self.path)
        return real(self, *arguments)

    monkeypatch.setattr(LocalDatabase, "pages", pages)
    return seen


def _closed(world: World, **options: Any) -> Machine:
    here = world.machine()
    con = here.connect(**options)
    con.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, k, v)")
    con.execute("CREATE INDEX i ON t(k)")
    con.executemany("INSERT INTO t VALUES (?, ?, 'x')", [(n, f"k{n:03}") for n in range(20)])
    con.close()
    return here


def _stranger(here: Machine, statement: str) -> None:
    stranger = here.stock()
    stranger.execute(statement)
    stranger.close()


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("statement", ["UPDATE t SET k = 'zzzz' WHERE id = 1", "UPDATE t SET v = 'y' WHERE id = 2"])
def test_a_write_within_the_tick_of_our_close_is_noticed(world: World, statement: str) -> None:
    """The timestamps, and the size, are what they were: only a scan can tell, and what it tells is not proved to follow."""
    here = _closed(world)
    before = world.bucket.content()
    _stranger(here, statement)
    with pytest.raises(ConflictError):
        here.connect()
    assert world.bucket.content() == before
    con = here.connect(initial_replication="skip")
    con.execute("UPDATE t SET v = 'y' WHERE id = 3")
    world.stored(con, view=False)
    assert rows(con, "PRAGMA integrity_check") == "ok"
    bottomless_wal.flush(con)
    con.close()
    world.comes_back(here)


@pytest.mark.usefixtures("coarse")
def test_with_a_coarse_clock_an_untouched_file_is_looked_through_and_goes_on(world: World, scans: list[str]) -> None:
    here = _closed(world)
    head = world.bucket.head("app.db")
    scans.clear()
    con = here.connect()
    assert scans
    con.execute("UPDATE t SET v = 'y' WHERE id = 2")
    assert world.bucket.head("app.db") == head + 1
    con.close()
    world.comes_back(here)


def test_with_a_fine_clock_it_is_not(world: World, scans: list[str]) -> None:
    here = _closed(world)
    header = LocalIndex.peek(here.path("app.db-bottomless"))
    assert header is not None
    assert header.clean
    assert header.is_settled, "the last close waits for the clock to go on"
    scans.clear()
    con = here.connect()
    assert not scans
    con.close()
    world.comes_back(here)


def test_a_write_between_the_last_close_and_its_note_is_noticed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The identity is of the moment when SQLite deleted the WAL, under its lock; not of a moment later, when anybody may have written."""
    here = world.machine()
    con = here.connect()
    con.execute("CREATE TABLE t(x)")
    real = LocalDatabase.close

    def close(self: LocalDatabase, **how: Any) -> None:
        real(self, **how)
        if how.get("checkpoint"):
            monkeypatch.setattr(LocalDatabase, "close", real)
            _stranger(here, "INSERT INTO t VALUES ('behind its back')")

    monkeypatch.setattr(LocalDatabase, "close", close)
    con.close()
    before = world.bucket.content()
    with pytest.raises(ConflictError):
        here.connect()
    assert world.bucket.content() == before


@pytest.mark.parametrize("how", ["cp", "mv"])
@pytest.mark.parametrize("kind", ["of a state between two batches", "by VACUUM INTO", "by the backup API"])
def test_an_old_backup_in_the_place_of_the_closed_file_is_never_taken_for_its_descendant(world: World, kind: str, how: str) -> None:
    here = world.machine()
    con = here.connect(ack="local", interval=3600)
    con.execute("CREATE TABLE t(x)")
    bottomless_wal.flush(con)
    con.execute("INSERT INTO t VALUES ('old')")
    backup = here.path("backup.db")
    con.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    if kind == "of a state between two batches":
        with open(backup, "wb") as file:
            file.write(here.content())
    elif kind == "by VACUUM INTO":
        con.execute("VACUUM INTO ?", (f"file:{backup}?vfs=unix",))
    else:
        target = apsw.Connection(backup)
        with target.backup("main", con, "main") as copy:
            copy.step()
        target.close()
    con.executemany("INSERT INTO t VALUES (?)", [(n,) for n in range(7)])
    con.close()
    before = world.bucket.content()
    if how == "mv":
        os.rename(backup, here.path())
    else:
        with open(here.path(), "r+b") as file:
            file.write(here.content("backup.db"))
            file.truncate()
    for _ in range(2):
        with pytest.raises(ConflictError):
            here.connect()
        assert world.bucket.content() == before


# --- what a close leaves pending is known by its content ---------------------------------------------------------------------------


def _pending_at_close(world: World) -> Machine:
    here = world.machine()
    con = here.connect(ack="log", pages="off")
    con.execute("CREATE TABLE t(x); INSERT INTO t VALUES (1)")
    refusal(con).log()
    for n in (2, 3):
        with pytest.raises(ReplicationError):
            con.execute("INSERT INTO t VALUES (?)", (n,))
    con.close()
    return here


def _goes_on(world: World, here: Machine) -> None:
    con = here.connect(ack="log", pages="off")
    assert rows(con) == 3
    assert world.bucket.log_image("app.db") == con.serialize("main")
    con.close()


@pytest.mark.usefixtures("coarse")
def test_an_outage_at_the_close_is_no_conflict_where_clocks_are_coarse(world: World) -> None:
    _goes_on(world, _pending_at_close(world))


@pytest.mark.parametrize("act", ["chmod", "link", "copy"])
def test_an_outage_at_the_close_is_no_conflict_after_what_changes_timestamps_alone(world: World, act: str) -> None:
    here = _pending_at_close(world)
    if act == "chmod":
        os.chmod(here.path(), 0o600)
    elif act == "link":
        os.link(here.path(), here.path("other.db"))
        os.unlink(here.path("other.db"))
    else:
        shutil.copy2(here.path(), here.path("copy"))
        os.rename(here.path("copy"), here.path())
    _goes_on(world, here)


@pytest.mark.parametrize("act", ["", "chmod", "checkpoint"])
def test_a_pending_commit_that_leads_back_to_earlier_bytes_is_kept(world: World, act: str) -> None:
    """By its bytes it is an old image; the WAL that goes on, or the attempt that failed, tells otherwise."""
    here = world.machine()
    child(
        """
from tests.support.cluster import refusal
con = connect(argv[0], ack="log", pages="off")
con.execute("CREATE TABLE t(x); INSERT INTO t VALUES (13)")
con.execute("UPDATE t SET x = 14")
con.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_FULL)
refusal(con).log()
try:
    con.execute("UPDATE t SET x = 13")
except bottomless_wal.ReplicationError:
    pass
if argv[1] == "checkpoint":
    con.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
os.kill(os.getpid(), signal.SIGKILL)
""",
        here.path(),
        act,
        options={**world.options, "retry_timeout": 0},
        check=False,
    )
    if act == "chmod":
        os.chmod(here.path(), 0o600)
    con = here.connect()
    assert rows(con, "SELECT x FROM t") == 13
    assert world.bucket.log_image("app.db") == con.serialize("main")


def test_a_stranger_that_writes_before_the_first_read_after_a_restore_is_noticed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the rename of the restored file and the look at its timestamps."""
    _closed(world)
    here = world.machine()
    real = recovery_actions.replace_atomically

    def replace_atomically(*arguments: Any) -> None:
        real(*arguments)
        _stranger(here, "UPDATE t SET v = 'stranger' WHERE id = 1")

    monkeypatch.setattr(recovery_actions, "replace_atomically", replace_atomically)
    con = here.connect()
    con.execute("UPDATE t SET v = 'y' WHERE id = 2")
    assert world.bucket.log_image("app.db") == con.serialize("main")


@pytest.mark.usefixtures("coarse")
def test_what_another_process_left_pending_and_was_killed_is_known_by_its_content(world: World) -> None:
    here = world.machine()
    here.connect(ack="log", pages="off").execute("CREATE TABLE t(x); INSERT INTO t VALUES (1)")
    con = here.connect(ack="log", pages="off")
    child(
        """
from tests.support.cluster import _fail, refusal
con = connect(argv[0], ack="log", pages="off")
store = refusal(con)
store.log()
for _ in range(2):
    try:
        con.execute("INSERT INTO t VALUES (2)")
    except bottomless_wal.ReplicationError:
        pass
    store.rules.append(lambda kind, key: _fail(True, key))  # of the second one there is no attempt
os.kill(os.getpid(), signal.SIGKILL)
""",
        here.path(),
        options={**world.options, "retry_timeout": 0},
        check=False,
    )
    refusal(con).rules.append(lambda kind, key: _fail(True, key))
    for each in world.connections:
        each.close()
    _goes_on(world, here)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.usefixtures("coarse")
def test_what_a_close_left_pending_is_known_after_an_earlier_attempt_was_adopted(world: World, first: bool) -> None:
    here = world.machine()
    con = here.connect(ack="log", pages="off")
    if not first:
        con.execute("CREATE TABLE t(x); INSERT INTO t VALUES (1)")
    store = refusal(con)
    store.lose_answers()
    with pytest.raises(ReplicationError):
        con.execute("BEGIN; CREATE TABLE t(x); INSERT INTO t VALUES (1); COMMIT" if first else "INSERT INTO t VALUES (2)")
    store.rules.append(lambda kind, key: _fail(True, key))
    for n in range(2 if first else 1):
        with pytest.raises(ReplicationError):
            con.execute("INSERT INTO t VALUES (?)", (n,))
    con.close()
    _goes_on(world, here)
