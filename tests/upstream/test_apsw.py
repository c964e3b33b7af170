"""Facts about APSW's VFS layer: names, nesting, locks, limits, and who holds the GIL."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import apsw
import pytest


def _asleep(vfs: apsw.VFS, seconds: float) -> float:
    """How long another Python thread that wanted 50 ms got none while `xSleep` slept."""
    sleeper = threading.Thread(target=vfs.xSleep, args=(int(seconds * 1e6),))
    started = time.perf_counter()
    sleeper.start()
    time.sleep(0.05)
    waited = time.perf_counter() - started
    sleeper.join()
    return waited


def test_the_inherited_xsleep_holds_the_gil(watch: Any) -> None:
    """APSW's own `xSleep` stops every Python thread for the whole busy wait: ours has to override it with `time.sleep`."""

    class Polite(apsw.VFS):
        def __init__(self) -> None:
            super().__init__(f"{watch.name}-polite", "")

        def xSleep(self, microseconds: int) -> int:
            time.sleep(microseconds / 1e6)
            return microseconds

    polite = Polite()
    try:
        # The best of three: a busy machine can only make a wait longer, the GIL holder makes all of them long.
        assert min(_asleep(watch, 0.4) for _ in range(3)) > 0.35
        assert min(_asleep(polite, 0.4) for _ in range(3)) < 0.35
    finally:
        polite.unregister()


def test_xwrite_of_a_mebibyte_is_refused() -> None:
    """`VFSFile.xWrite` of 1 MiB raises FullError, of 64 KiB not: write at most 64 KiB at a time."""
    flags = [apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE | apsw.SQLITE_OPEN_MAIN_DB, 0]
    file = apsw.VFSFile("", os.path.abspath("big"), flags)
    file.xWrite(bytes(1 << 16), 0)
    with pytest.raises(apsw.FullError):
        file.xWrite(bytes(1 << 20), 0)
    file.xClose()


OTHER_WRITER = """
import apsw
c = apsw.Connection("a.db")
try:
    c.execute("BEGIN IMMEDIATE")
    print("let in")
except apsw.BusyError:
    print("kept out")
"""


def test_closing_any_descriptor_of_the_main_file_drops_sqlites_locks(connect: Any, tools: Any) -> None:
    """POSIX locks go with the first close of any descriptor; a base VFSFile shares SQLite's bookkeeping and is safe."""
    c = connect()
    c.execute("CREATE TABLE t(x)")
    c.execute("BEGIN IMMEDIATE")
    file = apsw.VFSFile("", os.path.abspath("a.db"), [apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_MAIN_DB, 0])
    assert file.xRead(16, 0) == b"SQLite format 3\0"
    file.xClose()
    assert tools.python(OTHER_WRITER) == "kept out"
    os.close(os.open("a.db", os.O_RDONLY))
    assert tools.python(OTHER_WRITER) == "let in"


def test_closing_a_descriptor_of_the_wal_is_safe(connect: Any, tools: Any) -> None:
    """The WAL file carries no locks, those are on -shm: frames may be read with `os.pread` on a descriptor of our own."""
    c = connect(wal=True)
    c.execute("CREATE TABLE t(x)")
    c.execute("BEGIN IMMEDIATE")
    os.close(os.open("a.db-wal", os.O_RDONLY))
    assert tools.python(OTHER_WRITER) == "kept out"
    os.close(os.open("a.db-shm", os.O_RDONLY))
    assert tools.python(OTHER_WRITER) == "let in"


def test_open_vfs_does_not_know_a_vfs_named_in_the_uri(watch: Any, connect: Any) -> None:
    """`open_vfs` says what the constructor was given; `vfsname("main")` names the open file's class: the truth."""
    c = connect(f"file:a.db?vfs={watch.name}", uri=True)
    assert c.open_vfs == "unix"
    assert c.vfsname("main").endswith("MainFile/unix")
    assert connect("plain.db").vfsname("main") == "unix"


def test_only_xopen_of_the_main_file_sees_uri_parameters(watch: Any, connect: Any) -> None:
    """The main file's xOpen gets a URIFilename, valid only then; the WAL's a plain name: settings need a registry by path."""
    seen: dict[str, object] = {}

    def look(name: Any, flags: int) -> None:
        if flags & apsw.SQLITE_OPEN_MAIN_DB:
            seen["main"], seen["path"], seen["ack"] = name, name.filename(), name.uri_parameter("ack")
        elif flags & apsw.SQLITE_OPEN_WAL:
            seen["wal"] = name

    watch.on["open"] = look
    connect(f"file:a.db?vfs={watch.name}&ack=log", uri=True).execute("PRAGMA journal_mode=wal; CREATE TABLE t(x)").fetchall()
    assert seen["path"] == os.path.abspath("a.db")
    assert seen["ack"] == "log"
    assert type(seen["wal"]) is str
    assert seen["wal"] == f"{seen['path']}-wal"
    with pytest.raises(apsw.InvalidContextError):
        seen["main"].filename()  # type: ignore[attr-defined]


def test_a_connection_can_be_opened_inside_xopen(watch: Any, connect: Any) -> None:
    """A nested connection to the same file works inside xOpen: boot may look into the database before SQLite has it."""
    before = connect()
    before.execute("CREATE TABLE t(x)")
    seen: list[object] = []

    def look(name: Any, flags: int) -> None:
        if flags & apsw.SQLITE_OPEN_MAIN_DB:
            nested = apsw.Connection(name.filename(), vfs="unix")
            seen.append(nested.execute("SELECT name FROM sqlite_schema").get)
            nested.close()

    watch.on["open"] = look
    c = connect(watched=True)
    assert seen == ["t"]
    c.execute("INSERT INTO t VALUES(1)")


def test_an_error_in_xopen_reaches_the_opener_as_itself(watch: Any, connect: Any) -> None:
    """Refusing an open by raising in xOpen gives the caller our exception, from the constructor and from ATTACH alike."""

    class Conflict(apsw.SQLError):
        pass

    plain = connect("plain.db", uri=True)

    def refuse(name: Any, flags: int) -> None:
        raise Conflict("diverged")

    watch.on["open"] = refuse
    with pytest.raises(Conflict):
        connect(watched=True)
    with pytest.raises(Conflict):
        plain.execute(f"ATTACH 'file:a.db?vfs={watch.name}' AS a")
    assert not os.path.exists("a.db")


def test_several_statements_stop_at_the_first_row(connect: Any) -> None:
    """`execute()` of several statements stops at the first row until it is fetched, and a pragma returns rows: fetch them."""
    c = connect()
    c.execute("CREATE TABLE t(x)")
    cursor = c.execute("INSERT INTO t VALUES(1); PRAGMA user_version; INSERT INTO t VALUES(2)")
    assert c.execute("SELECT count(*) FROM t").get == 1
    cursor.fetchall()
    assert c.execute("SELECT count(*) FROM t").get == 2


def test_the_inherited_xfullpathname_refuses_symlinks(watch: Any, connect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a Python VFS a symlink cannot be opened until xFullPathname is overridden; then the file has one name for all."""
    connect("a.db").execute("CREATE TABLE t(x)")
    os.symlink("a.db", "link.db")
    with pytest.raises(apsw.Error, match="not an error"):  # SQLITE_OK_SYMLINK, taken for a failure
        connect("link.db", watched=True)
    monkeypatch.setattr(type(watch), "xFullPathname", lambda self, name: os.path.realpath(name), raising=False)
    opened: list[str] = []
    watch.on["open"] = lambda name, flags: opened.append(name.filename())
    connect("link.db", watched=True).execute("SELECT * FROM t").fetchall()
    assert opened == [os.path.realpath("a.db")]


def test_connection_hooks_run_for_every_connection(connect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`apsw.connection_hooks` sees each new connection, one opened by others too: that is how the WAL hook gets everywhere."""
    seen: list[apsw.Connection] = []
    monkeypatch.setattr(apsw, "connection_hooks", [seen.append])
    c = connect()
    assert seen == [c]


def test_setting_a_wal_hook_ends_automatic_checkpoints(connect: Any, tools: Any) -> None:
    """A connection has one WAL hook, and SQLite's automatic checkpoint is one: ours replaces it and has to checkpoint itself."""
    c = connect(wal=True)
    c.wal_autocheckpoint(1)
    c.execute("CREATE TABLE t(x)")
    assert tools.noop(c)[1] > 0
    calls: list[int] = []

    def hook(connection: apsw.Connection, name: str, frames: int) -> int:
        calls.append(frames)
        return 0

    c.set_wal_hook(hook)
    c.execute("INSERT INTO t VALUES(1)")
    c.execute("INSERT INTO t VALUES(2)")
    assert len(calls) == 2
    assert tools.noop(c)[1] == 0
    c.wal_autocheckpoint(1)
    c.execute("INSERT INTO t VALUES(3)")
    assert len(calls) == 2
    assert tools.noop(c)[1] > 0
