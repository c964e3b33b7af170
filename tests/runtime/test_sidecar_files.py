"""Files beside the database: owner, group and mode, and names that belong to something else."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest

import bottomless_wal
from bottomless_wal import admin
from bottomless_wal.core import ownership
from bottomless_wal.core.errors import BottomlessError, ConfigError
from bottomless_wal.replication.index import HEADER_SIZE, IndexHeader, is_index
from tests.support.cluster import Machine, World, child, rows

ROOT = os.getuid() == 0
OWNER, GROUP = (1001, 2000) if ROOT else (os.getuid(), os.getgid())
"""The owner of a database that root works on; without root the tests are of one user's files."""


def mode(path: str | os.PathLike[str]) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


def access(path: str | os.PathLike[str]) -> tuple[int, int, int]:
    found = os.stat(path)
    return found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)


def made(world: World, commits: int = 1) -> Machine:
    machine = world.machine()
    con = machine.connect()
    con.execute("CREATE TABLE t(x)")
    for number in range(1, commits):
        con.execute("INSERT INTO t VALUES(?)", (number,))
    con.close()
    return machine


# --- modes -----------------------------------------------------------------------------------------------------------------

MODES = """
os.umask(int(argv[1]))
con = connect(argv[0])
con.execute("CREATE TABLE IF NOT EXISTS t(x)")
con.execute("INSERT INTO t VALUES(1)")
print(json.dumps([os.stat(argv[0] + end).st_mode & 0o777 for end in ("", "-wal", "-bottomless", "-bottomless-view")]))
con.close()
"""


@pytest.mark.parametrize("wanted", [0o660, 0o666, 0o600, 0o644])
def test_the_mode_of_the_database_whatever_the_umask(world: World, wanted: int) -> None:
    machine = world.machine()
    Path(machine.path()).touch()
    os.chmod(machine.path(), wanted)
    seen = json.loads(child(MODES, machine.path(), str(0o077), options=world.options).stdout)
    assert seen == [wanted] * 4
    assert mode(machine.path() + "-bottomless") == wanted


@pytest.mark.parametrize("umask", [0o000, 0o007, 0o027, 0o077])
def test_beside_a_new_database_the_mode_that_sqlite_gives_it(world: World, umask: int) -> None:
    seen = json.loads(child(MODES, world.machine().path(), str(umask), options=world.options).stdout)
    assert seen == [0o644 & ~umask] * 4


def test_a_new_database_that_takes_its_mode_from_another_file(world: World) -> None:
    machine = world.machine()
    pattern = machine.directory / "pattern"
    pattern.touch()
    os.chmod(pattern, 0o620)
    flags = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE | apsw.SQLITE_OPEN_URI
    con = bottomless_wal.connect(f"file:{machine.path()}?modeof={pattern}", flags=flags, **world.options)
    world.connections.append(con)
    assert [mode(machine.path() + end) for end in ("", "-bottomless", "-bottomless-view")] == [0o620] * 3


@pytest.mark.parametrize("when", ["closed", "open"])
@pytest.mark.parametrize("wanted", [0o660, 0o600])
def test_a_mode_that_is_changed_later(world: World, when: str, wanted: int) -> None:
    machine = made(world)
    con = machine.connect()
    if when == "closed":
        con.close()
    os.chmod(machine.path(), wanted)
    if when == "closed":
        con = machine.connect()
        assert mode(machine.path() + "-bottomless") == wanted
    con.close()
    assert mode(machine.path() + "-bottomless") == wanted


def test_an_index_that_its_user_may_not_open(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = made(world)
    _deny(monkeypatch, "-bottomless", 1000)
    with pytest.raises(ConfigError, match="Permission denied") as caught:
        machine.connect()
    assert "owner, group and mode" in caught.value.hint
    assert "app.db-bottomless" in caught.value.hint


def test_a_file_that_another_process_is_just_creating(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its mode is complete a moment after it can be seen."""
    machine = made(world)
    left = _deny(monkeypatch, "-bottomless", 5)
    con = machine.connect()
    assert left == [0]
    con.execute("INSERT INTO t VALUES(1)")
    con.close()


def _deny(monkeypatch: pytest.MonkeyPatch, end: str, times: int) -> list[int]:
    left, real = [times], os.open

    def denying(path: Any, *rest: Any, **more: Any) -> int:
        if isinstance(path, str) and path.endswith(end) and left[0] > 0:
            left[0] -= 1
            raise PermissionError(13, "Permission denied", path)
        return real(path, *rest, **more)

    monkeypatch.setattr(os, "open", denying)
    return left


def test_a_file_with_a_second_name_is_not_opened_up(world: World, tmp_path: Path) -> None:
    """In a directory of somebody else a hard link may lead to a file that the database's owner has no business with."""
    victim = tmp_path / "victim"
    victim.touch()
    os.chmod(victim, 0o600)
    machine = world.machine()
    Path(machine.path()).touch()
    os.chmod(machine.path(), 0o666)
    os.link(victim, machine.path() + "-bottomless")
    machine.connect().close()
    assert mode(victim) == 0o600


# --- owners ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def chowns(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Every change of an owner, refused by the system unless it leaves the user as it is."""
    asked: list[tuple[int, int]] = []

    def fchown(fd: int, uid: int, gid: int) -> None:
        asked.append((uid, gid))
        if uid not in (-1, os.getuid()):
            raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "fchown", fchown)
    return asked


@contextlib.contextmanager
def of_another(monkeypatch: pytest.MonkeyPatch, path: str, uid: int, gid: int) -> Iterator[None]:
    """The file at `path` belongs to somebody else, as far as `os.stat` says."""
    real = os.stat

    def told(name: Any, *rest: Any, **more: Any) -> os.stat_result:
        found = real(name, *rest, **more)
        if name == path:
            fields = list(found)
            fields[stat.ST_UID], fields[stat.ST_GID] = uid, gid
            return os.stat_result(fields, {f"st_{kind}time_ns": getattr(found, f"st_{kind}time_ns") for kind in "amc"})
        return found

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", told)
        yield


def test_the_owner_and_else_the_group_are_asked_for(tmp_path: Path, chowns: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    database = str(tmp_path / "app.db")
    Path(database).touch()
    with of_another(monkeypatch, database, 1, 2):
        fd = ownership.open_companion(database + "-bottomless", database)
        ownership.follow(fd, database)
        os.close(fd)
    assert chowns == [(1, 2), (-1, 2)]


def test_an_owner_that_cannot_be_kept_is_told(
    tmp_path: Path, chowns: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The file is replaced all the same, as cp and rsync do it, with the group and the mode."""
    database, new = str(tmp_path / "app.db"), tmp_path / "new"
    Path(database).touch()
    os.chmod(database, 0o664)
    new.touch(0o600)
    with of_another(monkeypatch, database, 1, 2), caplog.at_level(logging.WARNING), open(new, "rb") as file:
        ownership.succeed(file.fileno(), database)
    assert chowns == [(1, 2), (-1, 2)]
    assert mode(new) == 0o664
    assert f"{database} belonged to user 1 and group 2, and its new file belongs to user {os.getuid()}" in caplog.text


def test_what_was_kept_is_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    database, new = tmp_path / "app.db", tmp_path / "new"
    database.touch()
    os.chown(database, OWNER, GROUP)
    os.chmod(database, 0o640)
    with caplog.at_level(logging.WARNING), open(new, "xb") as file:
        ownership.succeed(file.fileno(), str(database))
    assert access(new) == (OWNER, GROUP, 0o640)
    assert caplog.text == ""


@pytest.mark.parametrize("how", ["forced", "fast-forward", "opened", "earlier"])
def test_root_keeps_the_owner_of_what_it_replaces(world: World, how: str) -> None:
    machine = made(world, 3)
    if how == "fast-forward":
        bottomless_wal.restore(machine.path(), txid=1, force=True, **world.options)
    index = machine.path() + "-bottomless"
    if how in ("forced", "earlier"):
        os.chown(index, OWNER, GROUP)
    else:
        os.path.exists(index) and os.unlink(index)
    os.chown(machine.path(), OWNER, GROUP)
    os.chmod(machine.path(), 0o640)
    before = os.stat(machine.path()).st_ino
    if how in ("forced", "earlier"):
        bottomless_wal.restore(machine.path(), force=True, txid=2 if how == "earlier" else None, **world.options)
    else:
        machine.connect().close()
    assert (os.stat(machine.path()).st_ino == before) == (how == "opened"), "the case is not what it was meant to be"
    for file in sorted(machine.directory.iterdir()):
        assert access(file) == (OWNER, GROUP, 0o640), file
    assert os.path.exists(index) == (how != "earlier")


def test_an_index_of_root_is_given_to_the_owner(world: World) -> None:
    """As it was left by a version that did not keep the owner."""
    machine = made(world)
    os.chown(machine.path(), OWNER, GROUP)
    os.chmod(machine.path(), 0o640)
    machine.connect().close()
    assert access(machine.path() + "-bottomless") == (OWNER, GROUP, 0o640)


# --- names that belong to something else -----------------------------------------------------------------------------------


def _sqlite(path: Path) -> None:
    con = sqlite3.connect(path)
    con.execute("CREATE TABLE precious(x)")
    con.executemany("INSERT INTO precious VALUES(?)", [(str(number) * 10,) for number in range(3000)])
    con.commit()
    con.close()


FOREIGN = {
    "database": _sqlite,
    "note": lambda path: path.write_text("mine"),
    "byte": lambda path: path.write_bytes(b"B?"),
    "large": lambda path: path.write_bytes(b"precious" * 10_000),
    "sparse": lambda path: path.write_bytes(bytes(4096) + b"precious" * 4096),
    "behind zeros": lambda path: path.write_bytes(b"x" + bytes(60_000)),
}


@pytest.mark.parametrize("end", ["-bottomless", "-bottomless-view"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_of_somebody_else_beside_the_database_is_left_alone(world: World, kind: str, end: str) -> None:
    machine = made(world)
    os.unlink(machine.path() + "-bottomless")
    theirs = Path(machine.path() + end)
    FOREIGN[kind](theirs)
    content, database = theirs.read_bytes(), machine.content()
    tries = [
        lambda: machine.connect(),
        lambda: machine.connect(ack="log"),
        lambda: machine.connect(ack="local", pages="off"),
        lambda: bottomless_wal.reset_from_local(machine.path(), **world.options),
    ]
    if end == "-bottomless":
        tries += [
            lambda: bottomless_wal.restore(machine.path(), force=True, **world.options),
            lambda: bottomless_wal.restore(machine.path(), txid=1, force=True, **world.options),
        ]
    for attempt in tries:
        with pytest.raises(ConfigError, match=f"app.db{end} is a file of another program") as caught:
            attempt()
        assert "Move it away" in caught.value.hint
        assert theirs.read_bytes() == content
        assert machine.content() == database
    theirs.rename(machine.directory / "moved away")
    con = machine.connect()
    con.execute("INSERT INTO t VALUES(1)")
    world.stored(con)
    con.close()


@pytest.mark.parametrize("kind", ["directory", "fifo", "link", "dangling link"])
@pytest.mark.parametrize("end", ["-bottomless", "-bottomless-view"])
def test_what_is_not_a_file_beside_the_database(world: World, tmp_path: Path, end: str, kind: str) -> None:
    machine = made(world)
    os.unlink(machine.path() + "-bottomless")
    path, victim = machine.path() + end, tmp_path / "victim"
    if kind == "directory":
        os.mkdir(path)
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        os.symlink(victim, path)
        if kind == "link":
            victim.write_bytes(b"")
    what = {"directory": "a directory", "fifo": "not a regular file"}.get(kind, "a symbolic link")
    for ack in ("pages", "log"):
        with pytest.raises(ConfigError, match=f"app.db{end} is {what}"):
            machine.connect(ack=ack)
    if end == "-bottomless":
        with pytest.raises(ConfigError, match=f"app.db{end} is {what}"):
            bottomless_wal.restore(machine.path(), force=True, **world.options)
    seen = admin.inspect(machine.path(), **world.options)
    assert seen.local is None
    assert os.path.lexists(path)
    assert victim.exists() == (kind == "link")


@pytest.mark.parametrize("by", ["commit", "close", "restart"])
def test_a_file_that_took_the_place_of_the_index_while_it_was_in_use(world: World, by: str) -> None:
    machine = world.machine()
    con = machine.connect()
    con.execute("CREATE TABLE t(x)")
    con.execute("INSERT INTO t VALUES(1)")
    theirs = machine.directory / "theirs"
    theirs.write_bytes(b"precious" * 10_000)
    os.replace(theirs, machine.path() + "-bottomless")
    if by == "restart":
        con.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_RESTART)
    if by == "close":
        con.close()
    else:
        with pytest.raises(BottomlessError, match=r"app\.db-bottomless"):
            con.execute("INSERT INTO t VALUES(2)")
    assert Path(machine.path() + "-bottomless").read_bytes() == b"precious" * 10_000
    os.unlink(machine.path() + "-bottomless")
    if by == "close":
        con = machine.connect()
    con.execute("INSERT INTO t VALUES(3)")
    assert rows(con) == (2 if by == "close" else 3)
    world.stored(con)
    con.close()


def test_a_lock_file_that_somebody_wrote_to_is_not_removed(world: World) -> None:
    machine = world.machine()
    con = machine.connect()
    con.execute("CREATE TABLE t(x)")
    Path(machine.path() + "-bottomless-view").write_text("mine")
    con.close()
    assert Path(machine.path() + "-bottomless-view").read_text() == "mine"


def test_an_index_is_known_by_one_sign_of_several(world: World) -> None:
    machine = made(world)
    con = machine.connect()
    con.execute("INSERT INTO t VALUES(1)")
    con.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)  # leaves a seal
    con.close()
    real = machine.content("app.db-bottomless")
    assert IndexHeader.decode(real[:HEADER_SIZE]) is not None
    fresh = IndexHeader(bytes(16), bytes(16), bytes(16)).encode()
    for data in (real, real[:HEADER_SIZE], fresh):
        for at in range(8):
            for bit in range(8):
                flipped = bytearray(data)
                flipped[at] ^= 1 << bit
                assert is_index(bytes(flipped)), (len(data), at, bit)
        for size in (0, 1, 7, 8, 100, HEADER_SIZE - 1):
            assert is_index(data[:size])
            assert is_index(bytes(size))
    assert is_index(bytes(HEADER_SIZE) + real[HEADER_SIZE:])
    assert not is_index(bytes(HEADER_SIZE) + b"whatever"), "other files, such as images of disks, begin with zeros, too"
    assert not is_index(bytes(4 * HEADER_SIZE))
    assert is_index(b"?" * HEADER_SIZE + real[HEADER_SIZE:])
    assert is_index(b"?" * (HEADER_SIZE // 2) + real[HEADER_SIZE // 2 : HEADER_SIZE])
    assert not is_index(b"?" * HEADER_SIZE)
    assert not is_index(b"BWALIDY" + real[8 : HEADER_SIZE // 2] + b"?" * HEADER_SIZE)
    assert not is_index(real[1:])


# --- names that are reserved ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shop-bottomless", "shop-bottomless-view", "shop-bottomless-0123456789abcdef"])
@pytest.mark.parametrize("order", ["after", "before", "alone"])
def test_the_name_of_an_index_is_not_one_of_a_database(world: World, name: str, order: str) -> None:
    machine = world.machine()
    if order == "after":
        machine.connect("shop").execute("CREATE TABLE t(x)")
    elif order == "before":
        machine.stock(name).execute("CREATE TABLE t(x)")
    before = machine.files()
    with pytest.raises(ConfigError, match="reserved") as caught:
        machine.connect(name)
    assert "Rename" in caught.value.hint
    with pytest.raises(ConfigError, match="reserved"):
        apsw.Connection(machine.path(name), vfs=bottomless_wal.register())
    made(world)
    with pytest.raises(ConfigError, match="reserved"):
        bottomless_wal.restore(machine.path("app.db"), output=machine.path(name), force=True, **world.options)
    assert machine.files() == before


def test_a_database_may_be_read_whatever_it_is_called(world: World) -> None:
    machine = world.machine()
    machine.stock("shop-bottomless").execute("CREATE TABLE t(x); INSERT INTO t VALUES(1)")
    bottomless_wal.register()
    con = apsw.Connection(machine.path("shop-bottomless"), flags=apsw.SQLITE_OPEN_READONLY, vfs="bottomless")
    world.connections.append(con)
    assert rows(con) == 1
