"""The last close lets go of everything, whatever fails: as SQLite's own, it does not fail because the disk is full."""

from __future__ import annotations

import logging
import os
import resource
import stat
import threading
from collections.abc import Callable
from typing import Any

import apsw
import pytest

import bottomless_wal
from bottomless_wal.runtime.registry import registry
from bottomless_wal.sqlite import vfs
from tests.support.cluster import World, child, replica_of, rows

_MOST_DESCRIPTORS = 4096


def descriptors() -> set[tuple[int, int, int]]:
    """(descriptor, device, inode) of each regular file that this process has open."""
    found = set()
    for fd in range(min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], _MOST_DESCRIPTORS)):
        try:
            status = os.fstat(fd)
        except OSError:
            continue
        if stat.S_ISREG(status.st_mode):
            found.add((fd, status.st_dev, status.st_ino))
    return found


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No page can be written to a main file."""

    def refuse(self: apsw.VFSFile, data: bytes, offset: int) -> None:
        raise apsw.FullError("database or disk is full")

    monkeypatch.setattr(vfs._MainFile, "xWrite", refuse, raising=False)


@pytest.mark.parametrize("how", ["close", "exit"])
def test_the_disk_is_full_at_the_last_close(
    world: World, how: str, full_disk: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here = world.machine()
    before = descriptors()
    with monkeypatch.context() as room:
        room.setattr(vfs._MainFile, "xWrite", apsw.VFSFile.xWrite)
        con = here.connect()
        con.execute("CREATE TABLE t(x)")
    con.execute("INSERT INTO t VALUES (zeroblob(30000))")
    assert descriptors() > before
    replica = replica_of(con)
    if how == "exit":
        replica.close()
        con.execute("PRAGMA wal_autocheckpoint=0")
        con.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
    con.close()
    assert registry.all() == []
    assert descriptors() <= before
    assert os.path.exists(here.path() + "-wal"), "what cannot be checkpointed stays"
    assert not os.path.exists(here.path() + "-bottomless-view")
    said = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert any("full" in record.getMessage() for record in said)
    monkeypatch.undo()
    head = world.bucket.head("app.db")
    con = here.connect()
    assert rows(con) == 1
    assert world.bucket.head("app.db") == head, "the WAL that was left is known"
    bottomless_wal.flush(con)
    world.stored(con)
    con.close()
    world.comes_back(here)


STEPS = [
    "drain", "upkeep.stop", "checkpointer.stop", "local.close", "_mark_clean", "index.close", "replicator.view.lock.remove", "store.close"
]  # fmt: skip


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("error", [OSError("no space left on device"), apsw.FullError("full"), RuntimeError("can't start new thread")])
def test_a_step_that_fails_skips_no_other(
    world: World, step: str, error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here = world.machine()
    con = here.connect()
    con.execute("CREATE TABLE t(x)")
    replica = replica_of(con)
    done: list[str] = []

    def watched(real: Callable[..., None], name: str) -> Callable[..., None]:
        def run(*args: Any, **more: Any) -> None:
            done.append(name)
            real(*args, **more)
            if name == step:
                raise error

        return run

    for name in STEPS:
        *outer, method = name.split(".")
        owner: Any = replica
        for attribute in outer:
            owner = getattr(owner, attribute)

        monkeypatch.setattr(owner, method, watched(getattr(owner, method), name))
    con.close()
    expected = [name for name in STEPS if not (name == "_mark_clean" and step == "drain")]
    assert done == expected
    assert registry.all() == []
    assert any("failed" in record.getMessage() and record.levelno == logging.WARNING for record in caplog.records)
    con = here.connect()
    con.execute("INSERT INTO t VALUES (1)")
    con.close()
    world.comes_back(here)


def test_ctrl_c_in_a_close_leaves_the_rest_to_another_thread(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    here = world.machine()
    con = here.connect(ack="local", interval=60)
    con.execute("CREATE TABLE t(x)")
    con.execute("INSERT INTO t VALUES (1)")
    replica = replica_of(con)
    real = replica.drain
    struck: list[bool] = []

    def drain() -> None:
        if not struck:
            struck.append(True)
            raise KeyboardInterrupt
        real()

    monkeypatch.setattr(replica, "drain", drain)
    with pytest.raises(KeyboardInterrupt):
        con.close()
    again = here.connect(ack="local", interval=60)  # waits for the thread that closes it
    assert rows(again) == 1
    again.close()
    world.comes_back(here)


@pytest.mark.parametrize("end", ["close", "flush"])
def test_page_objects_wait_for_no_commit_of_a_process_that_was_killed(world: World, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    here = world.machine()
    con = here.connect(ack="log", pages="checkpoint")
    con.execute("CREATE TABLE t(x); INSERT INTO t VALUES (1); CREATE TABLE u(x)")
    filler = replica_of(con).worker._filler
    real = filler._turn
    killed: list[int] = []

    def turn(*arguments: Any, **more: Any) -> bool:
        if not killed:
            script = """
from bottomless_wal.core import failpoints
con = connect(argv[0], ack="log", pages="off")
failpoints.arm("before put", lambda: os.kill(os.getpid(), signal.SIGKILL))
con.execute("UPDATE t SET x = 2")
"""
            killed.append(child(script, here.path(), options=world.options, check=False).returncode)
        return real(*arguments, **more)

    monkeypatch.setattr(filler, "_turn", turn)
    thread = threading.Thread(target=con.close if end == "close" else lambda: bottomless_wal.flush(con), daemon=True)
    thread.start()
    thread.join(30)
    is_hanging = thread.is_alive()
    monkeypatch.setattr(filler, "_turn", lambda *arguments, **more: False)  # or the test would not end either
    thread.join(30)
    assert killed == [-9]
    assert not is_hanging
