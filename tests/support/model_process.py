"""The processes that the model drives: told over a socket what to do, one commit at a time, and killed at will.

One process has everything imported and forks the others, so that a new one costs milliseconds. Each answer carries the database's bytes
as they stand then. The limits that only large databases failpoint are small here.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import apsw

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # when it is run as a program

import bottomless_wal
from bottomless_wal import admin
from bottomless_wal.admin import compaction as admin_compaction
from bottomless_wal.core import failpoints
from bottomless_wal.core.errors import BottomlessError, TransientError
from bottomless_wal.history import compaction, log
from bottomless_wal.replication import index, page_objects, recovery, replicator
from bottomless_wal.runtime import commit_worker, compactor, replica
from bottomless_wal.runtime.registry import registry
from bottomless_wal.sqlite import checkpointer, vfs
from bottomless_wal.storage.directory import DirectoryStore

logger = logging.getLogger("bottomless_wal.model")

KINDS: Final = ("create", "put", "get", "read", "list", "upload", "delete")
_PATIENCE: Final = 90.0

# --- what is done to a database: the same on a replicated connection and on the model's ------------------------------------

_SETUP: Final = (
    "CREATE TABLE IF NOT EXISTS t(id INTEGER PRIMARY KEY, x UNIQUE, b BLOB)",
    "CREATE TABLE IF NOT EXISTS flag(id INTEGER PRIMARY KEY, v)",
    "INSERT OR IGNORE INTO flag VALUES(1, 10)",
)


def _blob(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


def change(con: apsw.Connection, op: list[Any]) -> None:
    """One statement or a few, within a transaction."""
    kind, seed, size = op
    if kind == "insert":
        con.execute("INSERT INTO t(b) VALUES(?)", (_blob(seed, size),))
    elif kind == "update":
        con.execute("UPDATE t SET b = ? WHERE id % 7 = ?", (_blob(seed, size), seed % 7))
    elif kind == "delete":
        con.execute("DELETE FROM t WHERE id % 5 = ? OR ?", (seed % 5, size > 2000))
    elif kind == "toggle":  # and back again: the very same bytes as before
        con.execute("UPDATE flag SET v = 21 - v")
    elif kind == "table":
        con.execute(f"CREATE TABLE IF NOT EXISTS e{seed % 3}(id INTEGER PRIMARY KEY, y)")
        con.execute(f"INSERT INTO e{seed % 3}(y) VALUES(?)", (seed,))
        con.execute("CREATE INDEX IF NOT EXISTS by_x ON t(x)")
    elif kind == "drop":
        con.execute(f"DROP TABLE IF EXISTS e{seed % 3}")
        con.execute("DROP INDEX IF EXISTS by_x")
    elif kind == "savepoint":
        con.execute("SAVEPOINT inner")
        con.execute("INSERT INTO t(b) VALUES(?)", (_blob(seed, size),))
        con.execute("ROLLBACK TO inner" if seed % 2 else "UPDATE flag SET v = v")
        con.execute("RELEASE inner")
    elif kind == "bulk":  # more than the cache holds: frames are written before the commit
        con.execute("PRAGMA cache_size=2")
        for number in range(20 + seed % 40):
            con.execute("INSERT INTO t(b) VALUES(?)", (_blob(seed + number, 700),))
            con.execute("UPDATE t SET b = ? WHERE id = ?", (_blob(seed - number, 700), number // 2))


def transact(con: apsw.Connection, ops: list[list[Any]], style: str, end: str) -> None:
    """One transaction."""
    with contextlib.ExitStack() as stack:
        if style == "with":
            stack.enter_context(con)
        else:
            con.execute("BEGIN IMMEDIATE" if style == "begin" else "SAVEPOINT outermost")
        for statement in _SETUP:
            con.execute(statement)
        for op in ops:
            change(con, op)
        if style == "with":
            if end == "rollback":
                raise ZeroDivisionError
        elif style == "begin":
            con.execute(end)
        elif end == "rollback":
            con.execute("ROLLBACK")
        else:
            con.execute("RELEASE outermost")


def odd(con: apsw.Connection, kind: str, seed: int) -> None:
    """One commit of a kind that no COMMIT makes."""
    if not con.execute("SELECT count(*) FROM sqlite_schema WHERE name = 't'").get:
        transact(con, [], "begin", "commit")
        return
    row = con.execute("SELECT max(id) FROM t WHERE length(b) > 5").get
    if kind == "blob" and row is not None:
        with con.blob_open("main", "t", "b", row, True) as blob:
            blob.write(_blob(seed, 5))
    elif kind == "returning":
        cursor = con.cursor()
        cursor.execute("INSERT INTO t(b) VALUES(?), (?), (?) RETURNING id", tuple(_blob(seed + n, 50) for n in range(3)))
        next(cursor)
        cursor.close()
    elif kind == "fail":
        with contextlib.suppress(apsw.ConstraintError):
            con.execute("INSERT OR FAIL INTO t(x, b) VALUES(?1, ?2), (?1, ?2)", (f"x{seed}", _blob(seed, 80)))
    elif kind == "backup":
        other = apsw.Connection(":memory:")
        load(other, con.serialize("main"))
        other.execute("INSERT INTO t(b) VALUES(?)", (_blob(seed, 200),))
        with con.backup("main", other, "main") as backup:
            backup.step(-1)
        other.close()
    else:
        con.execute("INSERT INTO t(b) VALUES(?)", (_blob(seed, 20),))


def vacuum(con: apsw.Connection, kind: str) -> None:
    """One commit that moves pages and changes nothing."""
    if kind == "incremental":
        con.execute("PRAGMA incremental_vacuum(3)").fetchall()
    else:
        if con.execute("PRAGMA auto_vacuum").get != int(kind):  # else the pragma is a commit of its own
            con.execute(f"PRAGMA auto_vacuum={kind}")
        con.execute("VACUUM")


def load(con: apsw.Connection, image: bytes | None) -> None:
    """The connection, in memory, takes the place of the database in `image`."""
    if image:
        con.deserialize("main", image[:18] + b"\1\1" + image[20:])


# --- the server's clock ----------------------------------------------------------------------------------------------------


def server_time(root: str) -> float:
    """What the store below `root` says the time is: hours may have passed there."""
    try:
        with open(os.path.join(root, "hours"), encoding="ascii") as file:
            return time.time() + 3600 * float(file.read() or 0)
    except FileNotFoundError:
        return time.time()


@contextlib.contextmanager
def server_clock() -> Iterator[None]:
    """Directory stores tell that time, and date by it what is stored."""
    doing, place = DirectoryStore._doing, DirectoryStore._place

    @contextlib.contextmanager
    def dated(self: DirectoryStore, *arguments: Any) -> Iterator[None]:
        with doing(self, *arguments):
            yield
        self._heard(server_time(os.path.dirname(self._root)))

    def placed(self: DirectoryStore, key: str, chunks: Any, move: Callable[[str, str], None]) -> tuple[int, float]:
        date = 0.0

        def dating(temporary: str, target: str) -> None:
            nonlocal date
            date = server_time(os.path.dirname(self._root))
            os.utime(temporary, (date, date))
            move(temporary, target)

        size, _ = place(self, key, chunks, dating)
        self._heard(date)
        return size, date

    changed = {"_doing": dated, "_place": placed}
    before = {name: getattr(DirectoryStore, name) for name in changed}
    for name, function in changed.items():
        setattr(DirectoryStore, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(DirectoryStore, name, function)


# --- one process -----------------------------------------------------------------------------------------------------------


class _Outage:
    """What the store refuses now: kinds of requests, before or after they were carried out, after `skip` of them, `times` (or -1) often."""

    def __init__(self) -> None:
        self.rule: dict[str, Any] | None = None
        self._lock = threading.Lock()

    def ask(self, kind: str, key: str, *, after: bool) -> None:
        with self._lock:
            rule = self.rule
            if rule is None or kind not in rule["kinds"] or rule["after"] != after:
                return
            if rule["part"] not in ("", "log" if "-wal/" in key else "pages"):
                return
            if rule["skip"]:
                rule["skip"] -= 1
                return
            if rule["times"] == 0:
                self.rule = None
                return
            rule["times"] -= 1
        raise TransientError(f"{kind} {key}: the store is away", hint="The model did that.")


class _Store:
    """A store that fails as its outage says."""

    def __init__(self, real: Any, outage: _Outage) -> None:
        self._real = real
        self._outage = outage

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._real, name)
        if name not in KINDS:
            return found

        def call(key: Any, *rest: Any, **more: Any) -> Any:
            keys = list(key) if name == "delete" else [key]
            for one in keys:
                self._outage.ask(name, one, after=False)
            answer = found(keys if name == "delete" else key, *rest, **more)
            for one in keys:
                self._outage.ask(name, one, after=True)
            return answer

        return call


class _Process:
    """Carries out requests. Each method is one."""

    def __init__(self, path: str, options: dict[str, Any], number: int) -> None:
        self.path = path
        self.options = options
        self.slots: dict[int, apsw.Connection] = {}
        self.outage = _Outage()
        if self.options.pop("coarse", False):
            _coarsen()
        for module in (index, recovery, replicator):
            vars(module)["boot_id"] = lambda: number.to_bytes(16, "big")
        real = replica.open_store
        vars(replica)["open_store"] = lambda config: _Store(real(config), self.outage)
        small = {
            log: {"_INLINE_BYTES": 30000}, page_objects: {"_MISSED_PAGES": 8}, vfs: {"AUTOCHECKPOINT_FRAMES": 60},
            checkpointer: {"AUTOCHECKPOINT_FRAMES": 60, "RESTART_FRAMES": 150}, replica: {"RESTART_FRAMES": 150},
            commit_worker: {"_RETRY_FIRST": 0.05}, compaction: {"LEVELS": (4, 16), "FAN_IN": 6},
            compactor: {"LEVELS": (4, 16), "_SMALLEST_SNAPSHOT": 20000}, admin_compaction: {"LEVELS": (4, 16)},
        }  # fmt: skip
        for module, names in small.items():
            vars(module).update(names)

    def open(self, slot: int, policy: str) -> None:
        self.slots[slot] = bottomless_wal.connect(self.path, initial_replication=policy, page_size=1024, **self.options)

    def close(self, slot: int) -> None:
        self.slots.pop(slot).close()

    def transact(self, slot: int, ops: list[list[Any]], style: str, end: str) -> None:
        with contextlib.suppress(ZeroDivisionError):
            self._upright(slot, lambda con: transact(con, ops, style, end))

    def odd(self, slot: int, kind: str, seed: int) -> None:
        self._upright(slot, lambda con: odd(con, kind, seed))

    def vacuum(self, slot: int, kind: str) -> None:
        self._upright(slot, lambda con: vacuum(con, kind))

    def checkpoint(self, slot: int, mode: str) -> None:
        with contextlib.suppress(apsw.BusyError):
            self.slots[slot].set_busy_timeout(20)
            self.slots[slot].wal_checkpoint(mode=getattr(apsw, f"SQLITE_CHECKPOINT_{mode}"))
        self.slots[slot].set_busy_timeout(5000)

    def hold(self, slot: int) -> None:
        self.slots[slot].execute("BEGIN")
        self.slots[slot].execute("SELECT count(*) FROM sqlite_schema").fetchall()

    def let_go(self, slot: int) -> bytes:
        seen = self.slots[slot].serialize("main")
        self.slots[slot].execute("COMMIT")
        return seen

    def collect(self, slot: int) -> None:
        """The connection is left to the collector; what its close hands over is waited for."""
        cycle: list[Any] = [self.slots.pop(slot)]
        cycle.append(cycle)
        del cycle
        gc.collect()
        end = time.monotonic() + _PATIENCE / 2
        while not self.slots and registry.all():
            if time.monotonic() > end:
                with tempfile.TemporaryFile("w+") as stacks:
                    faulthandler.dump_traceback(stacks)
                    stacks.seek(0)
                    raise AssertionError(f"the close that was handed over does not end: {stacks.read()}")
            time.sleep(0.001)

    def signalled(self, slot: int, other: int, ops: list[list[Any]], delay: float) -> None:
        """A transaction, and within it, or a little before or after, a signal whose handler commits by another connection."""
        done: list[apsw.Error | None] = []

        def commit(*_: Any) -> None:
            con = self.slots[other]
            con.set_busy_timeout(0)  # the very thread that holds the lock is below
            try:
                transact(con, [["toggle", 0, 0]], "begin", "commit")
                done.append(None)
            except apsw.Error as error:
                done.append(error)
            finally:
                if con.in_transaction:
                    con.execute("ROLLBACK")
                con.set_busy_timeout(5000)

        before = signal.signal(signal.SIGALRM, commit)
        try:
            signal.setitimer(signal.ITIMER_REAL, delay)
            self.transact(slot, ops, "begin", "commit")
            while not done:
                time.sleep(0.0005)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        if done[0] is not None:
            raise done[0]

    def flush(self, slot: int) -> None:
        bottomless_wal.flush(self.slots[slot])

    def arm(self, point: str, passes: int) -> None:
        left = [passes]

        def die() -> None:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        failpoints.disarm()
        failpoints.arm(point, die)

    def fail(self, rule: dict[str, Any] | None) -> None:
        self.outage.rule = rule

    def keep(self, what: str, **more: Any) -> None:
        """The upkeep of the history, as the commands do it."""
        getattr(admin, what)(self.path, **self.options, **more)

    def exit(self) -> None:
        sys.exit(0)

    def image(self) -> bytes | None:
        """The database as a connection outside any transaction sees it."""
        for con in self.slots.values():
            if not con.in_transaction:
                return con.serialize("main")
        return None

    def _upright(self, slot: int, work: Callable[[apsw.Connection], None]) -> None:
        con = self.slots[slot]
        try:
            work(con)
        finally:
            if con.in_transaction:  # an error of an outermost RELEASE
                con.execute("ROLLBACK")


def _coarsen() -> None:
    """The file system's clock stands still: only what else changes of a file tells that it was written to."""
    real = index.Identity.of.__func__  # type: ignore[attr-defined]

    def of(cls: type[index.Identity], path: str) -> index.Identity | None:
        found = real(cls, path)
        return found and found._replace(mtime_ns=1, ctime_ns=1)

    index.Identity.of = classmethod(of)  # type: ignore[method-assign,assignment]


def _cause(error: BaseException) -> BaseException:
    """The package's own error, where APSW's context manager has put its own on top."""
    at: BaseException | None = error
    while at is not None and not isinstance(at, BottomlessError):
        at = at.__context__
    return at or error


def _serve(line: socket.socket) -> None:
    with line.makefile("rwb") as stream:
        first = json.loads(stream.readline())
        if first["log"]:
            logging.basicConfig(filename=first["log"], level=logging.DEBUG, format="%(process)d %(asctime)s %(name)s %(message)s")
        process = _Process(first["path"], first["options"], first["boot"])
        stream.write(b"%d\n" % os.getpid())
        stream.flush()
        for request in stream:
            what = json.loads(request)
            error, text, image = "", "", None
            try:
                image = getattr(process, what.pop("do"))(**what)
            except apsw.Error as caught:
                cause = _cause(caught)
                error, text = type(cause).__name__, str(cause)
                del cause  # its traceback holds the connection
            except Exception as caught:
                logger.exception("%s was not foreseen", what)
                error, text = type(caught).__name__, traceback.format_exc()
            if image is None:
                image = process.image()
            failing = process.outage.rule is not None
            head = {"error": error, "text": text, "length": -1 if image is None else len(image), "failing": failing}
            stream.write(json.dumps(head).encode() + b"\n" + (image or b""))
            stream.flush()


def _nursery(place: str) -> None:
    """Forks a process for each connection to the socket at `place`, until standard input ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    logging.getLogger("bottomless_wal").addHandler(logging.NullHandler())
    bottomless_wal.register()
    with server_clock(), socket.socket(socket.AF_UNIX) as listener:
        listener.bind(place)
        listener.listen()
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        parent = os.getppid()
        listener.settimeout(1.0)
        while os.getppid() == parent:
            try:
                line, _ = listener.accept()
            except TimeoutError:
                continue
            if os.fork() == 0:
                listener.close()
                line.settimeout(None)
                _serve(line)
                os._exit(0)
            line.close()


# --- the other end ---------------------------------------------------------------------------------------------------------


class Died(Exception):
    """The process is no more."""


class Nursery:
    """Where processes come from."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="model-")
        self.place = os.path.join(self._directory.name, "socket")
        argv = [sys.executable, __file__, self.place]
        with open(os.path.join(self._directory.name, "errors"), "wb") as errors:
            self._process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=errors)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._directory.cleanup()


class Remote:
    """A process, seen from the model."""

    def __init__(self, nursery: Nursery, path: Path, options: dict[str, Any], boot: int, log: str) -> None:
        self._line = socket.socket(socket.AF_UNIX)
        self._line.settimeout(_PATIENCE)
        self._line.connect(nursery.place)
        self._stream = self._line.makefile("rwb")
        self._send({"path": str(path), "options": options, "boot": boot, "log": log})
        self.pid = int(self._stream.readline())
        self.failing = False

    def _send(self, what: dict[str, Any]) -> None:
        self._stream.write(json.dumps(what).encode() + b"\n")
        self._stream.flush()

    def ask(self, do: str, **more: Any) -> tuple[str, str, bytes | None]:
        """(error's name or nothing, its text, the database's bytes if they were to be had). Died if there is no answer."""
        try:
            self._send({"do": do, **more})
            head = self._stream.readline()
            if not head.endswith(b"\n"):
                raise ConnectionResetError
            told = json.loads(head)
            image = self._stream.read(told["length"]) if told["length"] >= 0 else None
        except TimeoutError:
            os.kill(self.pid, signal.SIGUSR1)
            time.sleep(1)
            raise AssertionError(f"no answer to {do} {more}") from None
        except (ConnectionResetError, BrokenPipeError):
            self.gone()
            raise Died from None
        self.failing = told["failing"]
        return told["error"], told["text"], image or None

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.gone()

    def gone(self) -> None:
        """Waits until it is."""
        end = time.monotonic() + _PATIENCE
        while _alive(self.pid):
            assert time.monotonic() < end, f"process {self.pid} does not die"
            time.sleep(0.0005)
        with contextlib.suppress(OSError):
            self._stream.close()
        self._line.close()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@contextlib.contextmanager
def nursery() -> Iterator[Nursery]:
    """A nursery, closed at the end."""
    made = Nursery()
    try:
        with server_clock():
            yield made
    finally:
        made.close()


if __name__ == "__main__":
    _nursery(sys.argv[1])
