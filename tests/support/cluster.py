"""Machines and the store between them: what the tests of the core set up, and the one comparison that they all end with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import apsw

import bottomless_wal
from bottomless_wal.core.errors import StoreError, TransientError
from bottomless_wal.formats import keys
from bottomless_wal.runtime.registry import registry
from bottomless_wal.runtime.replica import Replica
from tests.support.endpoints import Endpoint
from tests.support.independent_reader import Bucket

ROOT = Path(__file__).resolve().parents[2]
"""The checkout: `tests`, `tools` and the package are imported from there."""


@dataclass
class Machine:
    """A directory that can be lost."""

    world: World
    directory: Path

    def path(self, file: str = "app.db") -> str:
        return str(self.directory / file)

    def connect(self, file: str = "app.db", **options: Any) -> apsw.Connection:
        """A replicated connection with the world's options."""
        con = bottomless_wal.connect(self.path(file), **{**self.world.options, **options})
        self.world.connections.append(con)
        return con

    def stock(self, file: str = "app.db") -> apsw.Connection:
        """A connection that the replication knows nothing of."""
        flags = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE | apsw.SQLITE_OPEN_URI
        con = apsw.Connection(self.path(file), flags=flags)
        con.set_busy_timeout(5000)
        self.world.connections.append(con)
        return con

    def stock_killed(self, statements: str, file: str = "app.db") -> None:
        """Another program runs `statements` with the stock VFS and is killed: its WAL is left."""
        script = "con = apsw.Connection(argv[0]); con.execute(argv[1]).fetchall(); os.kill(os.getpid(), signal.SIGKILL)"
        child(script, self.path(file), statements, options={}, check=False)
        assert os.path.getsize(self.path(file) + "-wal"), "it left no WAL"

    def content(self, file: str = "app.db") -> bytes:
        return (self.directory / file).read_bytes()

    def files(self) -> dict[str, bytes]:
        """Every file and its content: to compare before and after."""
        return {entry.name: entry.read_bytes() for entry in self.directory.iterdir() if entry.is_file()}


@dataclass
class World:
    """One bucket, the machines around it, and the options that all connections use."""

    endpoint: Endpoint
    root: Path
    options: dict[str, Any]
    connections: list[apsw.Connection] = field(default_factory=list)
    count: int = 0
    _bucket: Bucket | None = None

    def machine(self) -> Machine:
        """A new, empty one."""
        self.count += 1
        directory = self.root / f"machine-{self.count}"
        directory.mkdir()
        return Machine(self, directory)

    @property
    def bucket(self) -> Bucket:
        """The store from outside."""
        if self._bucket is None:
            self._bucket = Bucket(self.endpoint)
        return self._bucket

    def stored(self, con: apsw.Connection, name: str = "app.db", *, schema: str = "main", view: bool = True) -> None:
        """What the store holds now is, byte for byte, what the connection sees: by the log, and by the page objects."""
        image = con.serialize(schema)
        assert self.bucket.log_image(name) == image, "the log is not the database"
        if view:
            assert self.bucket.view_image(name) == image, "the page view is not the database"

    def comes_back(self, machine: Machine, file: str = "app.db", name: str | None = None) -> bytes:
        """Nobody has the file open: its bytes are those of the log, of the page view, and of a boot on an empty machine."""
        name = name or keys.database_name(str(self.options.get("database_id", "")), file)
        content = machine.content(file)
        assert not os.path.exists(machine.path(file) + "-wal"), "the last close leaves no WAL"
        assert self.bucket.log_image(name) == content, "the log is not the file"
        assert self.bucket.view_image(name) == content, "the page view is not the file"
        size = len(content) // (int.from_bytes(content[16:18], "big") if content[16:18] != b"\0\1" else 65536)
        assert max(self.bucket.page_numbers(name)) <= size, "page objects past the end were not swept at the close"
        elsewhere = self.machine()
        con = elsewhere.connect(file)
        assert con.execute("PRAGMA integrity_check").get == "ok"
        con.close()
        assert elsewhere.content(file) == content, "what came back is not what was lost"
        return content


class Refusal:
    """Makes a replica's store fail, or linger, by rules, before or after the request was carried out."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.rules: list[Callable[[str, str], None]] = []
        self.after: list[Callable[[str, str], None]] = []
        self.seen: list[tuple[str, str]] = []
        self._lock = threading.Lock()
        store = replica.store
        for kind in ("put", "create", "get", "read", "delete"):
            setattr(store, kind, self._wrapped(kind, getattr(store, kind)))

    def _wrapped(self, kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(key: Any, *rest: Any, **more: Any) -> Any:
            keys = list(key) if kind == "delete" else [key]
            for one in keys:
                with self._lock:
                    self.seen.append((kind, one))
                for rule in list(self.rules):
                    rule(kind, one)
            answer = real(keys if kind == "delete" else key, *rest, **more)
            for one in keys:
                for rule in list(self.after):
                    rule(kind, one)
            return answer

        return call

    def log(self) -> None:
        """From now on no segment is stored."""
        self.rules.append(lambda kind, key: _fail(kind == "create" and "-wal/" in key, key))

    def pages(self) -> None:
        """From now on no page object is stored."""
        self.rules.append(lambda kind, key: _fail(kind == "put" and "-wal/" not in key, key))

    def hold(self, until: threading.Event, kind: str = "") -> None:
        """From now on requests (of `kind` alone, if given) wait for the event."""

        def rule(what: str, key: str) -> None:
            if kind in ("", what):
                assert until.wait(30), f"{what} {key}: nobody let it go on"

        self.rules.append(rule)

    def lose_answers(self, times: int = 1) -> None:
        """The next `times` segments are stored, and nobody hears of it."""
        left = [times]

        def rule(kind: str, key: str) -> None:
            if kind == "create" and "-wal/" in key and left[0] > 0:
                left[0] -= 1
                raise StoreError(f"{key}: the answer was lost", hint="A test did that.")

        self.after.append(rule)

    def nothing(self) -> None:
        """All is well again."""
        self.rules.clear()
        self.after.clear()


def _fail(wanted: bool, key: str) -> None:
    if wanted:
        raise TransientError(f"{key}: the store refuses", hint="A test did that.")


def refusal(con: apsw.Connection, schema: str = "main") -> Refusal:
    """The store of an open database, to be made to fail."""
    return Refusal(replica_of(con, schema))


def replica_of(con: apsw.Connection, schema: str = "main") -> Replica:
    replica = registry.get(con.db_filename(schema))
    assert replica is not None
    return replica


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Waits for something another thread or process brings about."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.005)


def child(script: str, *arguments: str, options: Mapping[str, Any], check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs `script` in a process of its own; `connect(path, **more)` is there, with `options`; and `arguments` as `argv`."""
    process = spawn(script, *arguments, options=options)
    out, err = process.communicate(timeout=90)
    done = subprocess.CompletedProcess(process.args, process.returncode, out, err)
    if check:
        assert done.returncode == 0, f"exit {done.returncode}\n{out}\n{err}"
    return done


def spawn(script: str, *arguments: str, options: Mapping[str, Any]) -> subprocess.Popen[str]:
    """As `child`, without waiting."""
    prelude = (
        "import json, os, signal, sys, threading, time\n"
        f"sys.path[:0] = {[str(ROOT)]!r}\n"
        "import apsw, bottomless_wal\n"
        f"options = json.loads({json.dumps(dict(options))!r})\n"
        "argv = sys.argv[1:]\n"
        "def connect(path, **more):\n"
        "    return bottomless_wal.connect(path, **{**options, **more})\n"
    )
    return subprocess.Popen([sys.executable, "-c", prelude + script, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def existing(world: World, pages: int = 20) -> Machine:
    """A machine with a database that was never replicated."""
    here = world.machine()
    stock = here.stock()
    stock.execute("CREATE TABLE t(x)")
    stock.execute("BEGIN")
    stock.executemany("INSERT INTO t VALUES (zeroblob(4000))", [()] * pages)
    stock.execute("COMMIT")
    stock.close()
    return here


def rows(con: apsw.Connection, query: str = "SELECT count(*) FROM t") -> Any:
    """The one value that `query` gives."""
    return con.execute(query).get
