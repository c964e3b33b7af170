"""Tools for the facts: a VFS that tells a test what SQLite does, and lets the test act at that very moment.

Nothing here is our own VFS: these tests pin what SQLite, APSW, the operating system and the servers do by themselves, so that an
upgrade which changes a fact the design rests on fails here, with its reason, and not somewhere else, without.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest

_names = (f"watch-{os.getpid()}-{n}" for n in itertools.count())


class MainFile(apsw.VFSFile):
    def __init__(self, watch: Watch, name: Any, flags: list[int]) -> None:
        super().__init__("", name, flags)
        self.watch = watch
        self.base = os.path.basename(name.filename())
        self.connection_pointer: int | None = None

    def xFileControl(self, op: int, ptr: int) -> bool:
        if op == apsw.SQLITE_FCNTL_PDB:  # a `sqlite3 **`
            self.connection_pointer = ctypes.c_void_p.from_address(ptr).value
        elif op == apsw.SQLITE_FCNTL_COMMIT_PHASETWO:
            self.watch.phase_two(self)
        return super().xFileControl(op, ptr)

    def xWrite(self, data: bytes, offset: int) -> None:
        self.watch.happens("main xWrite", data, offset)
        super().xWrite(data, offset)

    def xLock(self, level: int) -> None:
        self.watch.locks.append(level)
        super().xLock(level)


class WalFile(apsw.VFSFile):
    def __init__(self, watch: Watch, name: Any, flags: list[int]) -> None:
        super().__init__("", name, flags)
        self.watch = watch

    def xWrite(self, data: bytes, offset: int) -> None:
        if offset == 0:
            self.watch.events.append(f"xWrite(0, {len(data)} bytes)")
            self.watch.happens("header", data)
        super().xWrite(data, offset)
        self.watch.happens("wal written", data, offset)

    def xTruncate(self, size: int) -> None:
        self.watch.events.append(f"xTruncate({size})")
        super().xTruncate(size)


class Watch(apsw.VFS):
    """Records WAL events, and calls `on[moment](...)` where a test has set one."""

    def __init__(self, name: str) -> None:
        super().__init__(name, "")
        self.name = name
        self.events: list[str] = []
        self.locks: list[int] = []
        self.phases: list[str] = []
        self.opened: list[tuple[int, Any]] = []
        self.on: dict[str, Callable[..., object]] = {}

    def happens(self, moment: str, *details: object) -> None:
        if action := self.on.get(moment):
            action(*details)

    def phase_two(self, file: MainFile) -> None:
        self.phases.append(file.base)
        self.happens("phase two", file)

    def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:
        self.opened.append((flags[0], name))
        self.happens("open", name, flags[0])
        if flags[0] & apsw.SQLITE_OPEN_MAIN_DB:
            return MainFile(self, name, flags)
        if flags[0] & apsw.SQLITE_OPEN_WAL:
            return WalFile(self, name, flags)
        return apsw.VFSFile("", name, flags)

    def xDelete(self, name: str, sync: bool) -> None:
        self.events.append(f"xDelete {os.path.basename(name)}")
        super().xDelete(name, sync)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def watch() -> Iterator[Watch]:
    vfs = Watch(next(_names))
    yield vfs
    vfs.on.clear()
    vfs.unregister()


Connect = Callable[..., apsw.Connection]


@pytest.fixture
def connect(watch: Watch) -> Iterator[Connect]:
    """`connect("a.db", watched=True)`: an APSW connection, closed when the test ends."""
    made: list[apsw.Connection] = []

    def make(path: str = "a.db", *, watched: bool = False, wal: bool = False, uri: bool = False) -> apsw.Connection:
        flags = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE | (apsw.SQLITE_OPEN_URI if uri else 0)
        connection = apsw.Connection(path, flags=flags, vfs=watch.name if watched else None)
        made.append(connection)
        if wal:
            assert connection.execute("PRAGMA journal_mode=wal").get == "wal"
        return connection

    yield make
    watch.on.clear()
    for connection in made:
        connection.close(True)


def noop(connection: apsw.Connection) -> tuple[int, int]:
    """(frames committed in the WAL, frames backfilled), nothing else done."""
    return connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_NOOP)


def salts(path: str) -> tuple[int, int]:
    with open(f"{path}-wal", "rb") as file:
        header = file.read(32)
    return int.from_bytes(header[16:20]), int.from_bytes(header[20:24])


def python(code: str, *arguments: str) -> str:
    """Runs `code` in a process of its own; its output."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class Tools:
    """The plain functions above, for tests (a conftest is not to be imported)."""

    noop = staticmethod(noop)
    salts = staticmethod(salts)
    python = staticmethod(python)


@pytest.fixture
def tools() -> type[Tools]:
    return Tools
