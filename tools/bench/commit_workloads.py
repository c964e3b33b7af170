"""What the jobs of `workloads` share, and those of a writer's everyday life.

Only the committing statement is timed, never what prepares it.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from pathlib import Path
from typing import Any, Final

import apsw

MAIN: Final = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE
BUCKET: Final = "bench"
_ROWS: Final = 2000


def plain(path: str) -> apsw.Connection:
    """A connection to a database that nobody replicates, with what `bottomless_wal.connect` sets."""
    connection = apsw.Connection(path, flags=MAIN)
    connection.set_busy_timeout(5000)
    connection.execute("PRAGMA journal_mode=wal").fetchall()
    return connection


def connect(path: str, options: dict[str, Any] | None) -> apsw.Connection:
    """Through the library, or plainly when there are no options."""
    if options is None:
        return plain(path)
    import bottomless_wal

    return bottomless_wal.connect(path, **options)


def prepare(connection: apsw.Connection) -> None:
    """A table of rows that lie some nine to a page."""
    rng = random.Random(1)
    with connection:
        connection.execute("CREATE TABLE IF NOT EXISTS tick(id INTEGER PRIMARY KEY, seen INTEGER, token TEXT)")
        connection.executemany("INSERT INTO tick VALUES(?,0,?)", ((n, rng.randbytes(200).hex()) for n in range(_ROWS)))


def touch(connection: apsw.Connection, rng: random.Random, most: int = 4) -> float:
    """A transaction that changes 1 to `most` pages; the seconds that its COMMIT took."""
    connection.execute("BEGIN IMMEDIATE")
    for _ in range(rng.randint(1, most)):
        connection.execute("UPDATE tick SET seen=seen+1, token=? WHERE id=?", (rng.randbytes(200).hex(), rng.randrange(_ROWS)))
    began = time.perf_counter()
    connection.execute("COMMIT")
    return time.perf_counter() - began


def raw_client(url: str) -> Any:
    """boto3 with the same settings as the library's, and nothing else of the library."""
    import boto3
    import botocore.config
    import botocore.handlers

    client = boto3.session.Session().client(
        "s3",
        endpoint_url=url,
        config=botocore.config.Config(
            signature_version="s3v4",
            s3={"payload_signing_enabled": True, "addressing_style": "path"},
            retries={"total_max_attempts": 1, "mode": "standard"},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            parameter_validation=False,
            max_pool_connections=16,
            tcp_keepalive=True,
        ),
    )
    client.meta.events.unregister("before-call.s3", botocore.handlers.add_expect_header)
    return client


def commits_and_puts(path: str, options: dict[str, Any], root: str, blocks: int, each: int) -> dict[str, Any]:
    """Blocks of commits, and between them blocks of raw PUTs of the very segments that these have stored."""
    rng = random.Random(2)
    client = raw_client(options["endpoint"])
    log = Path(root) / BUCKET / "app.db-wal"
    commits: list[float] = []
    puts: list[float] = []
    sizes: list[int] = []
    with contextlib.closing(connect(path, options)) as connection:
        import bottomless_wal

        prepare(connection)
        bottomless_wal.flush(connection)
        for block in range(-1, blocks):
            done = [touch(connection, rng) for _ in range(each)]
            newest = sorted(name for name in os.listdir(log) if name != "body")[-each:]
            bodies = [(log / name).read_bytes() for name in newest]
            for number, body in enumerate(bodies):
                began = time.perf_counter()
                client.put_object(Bucket=BUCKET, Key=f"raw/{block}-{number}", Body=body)
                puts.append(time.perf_counter() - began)
            commits += done
            sizes += map(len, bodies)
            if block < 0:  # to warm up
                commits, puts = [], []
    return {"commits": commits, "puts": puts, "sizes": sizes}


def load(path: str, options: dict[str, Any] | None, seconds: float, pragmas: list[str], rows: int = 0) -> dict[str, Any]:
    """Commits as fast as they go, for a while: each changes 1 to 4 pages; or inserts `rows` rows, and then all of it is timed."""
    rng = random.Random(3)
    times: list[float] = []
    wal = 0
    with contextlib.closing(connect(path, options)) as connection:
        for pragma in pragmas:
            connection.execute(pragma).fetchall()
        prepare(connection)
        if options is not None:
            import bottomless_wal

            bottomless_wal.flush(connection)
        blobs = [rng.randbytes(300) for _ in range(64)]
        if rows:
            connection.execute("CREATE TABLE IF NOT EXISTS mass(id INTEGER PRIMARY KEY, what BLOB)")
        began = time.perf_counter()
        while (now := time.perf_counter()) - began < seconds:
            if rows:
                connection.execute("BEGIN IMMEDIATE")  # part of what is timed: whoever locks writers out, holds them up here
                connection.executemany("INSERT INTO mass(what) VALUES(?)", ((rng.choice(blobs),) for _ in range(rows)))
                connection.execute("COMMIT")
                times.append(time.perf_counter() - now)
            else:
                times.append(touch(connection, rng))
            if len(times) % 20 == 0:
                wal = max(wal, os.stat(path + "-wal").st_size)
        took = time.perf_counter() - began
    return {"rate": len(times) / took, "inside": len(times) / sum(times), "times": sorted(times), "wal": wal}


def threads(path: str, options: dict[str, Any], many: int, seconds: float, rounds: int) -> dict[str, Any]:
    """Commits a second, of one committer and of many, in turn."""
    import bottomless_wal

    with contextlib.closing(connect(path, options)) as first:
        prepare(first)
        bottomless_wal.flush(first)
        connections = [bottomless_wal.connect(path, **options) for _ in range(many)]

        def rate(count: int) -> float:
            done = [0] * count
            end = time.perf_counter() + seconds

            def commit(number: int) -> None:
                rng = random.Random(number)
                while time.perf_counter() < end:
                    touch(connections[number], rng)
                    done[number] += 1

            began = time.perf_counter()
            running = [threading.Thread(target=commit, args=(number,)) for number in range(count)]
            for thread in running:
                thread.start()
            for thread in running:
                thread.join()
            return sum(done) / (time.perf_counter() - began)

        rates = [(rate(1), rate(many)) for _ in range(rounds)]
        for connection in connections:
            connection.close()
    return {"one": [a for a, _ in rates], "many": [b for _, b in rates]}


def loopback(path: str, options: dict[str, Any], peer: str, socket: str, count: int) -> dict[str, Any]:
    """A commit here, then one there and Litestream's sync, in turn."""
    from tools.bench.environment import sync_litestream

    rng = random.Random(4)
    ours: list[float] = []
    theirs: list[float] = []
    with contextlib.closing(connect(path, options)) as connection, contextlib.closing(plain(peer)) as other:
        prepare(connection)
        prepare(other)
        sync_litestream(socket, peer)
        for number in range(-20, count):
            ours.append(touch(connection, rng))
            took = touch(other, rng)
            began = time.perf_counter()
            sync_litestream(socket, peer)
            theirs.append(took + time.perf_counter() - began)
            if number < 0:
                ours, theirs = [], []
    return {"ours": ours, "theirs": theirs}


def reads(path: str, other: str, options: dict[str, Any], count: int, rounds: int) -> dict[str, Any]:
    """Point reads and scans through the VFS and plainly, in turn; lookups a second."""
    with contextlib.closing(connect(path, options)) as ours, contextlib.closing(plain(other)) as theirs:
        import bottomless_wal

        bottomless_wal.flush(ours)
        top = ours.execute("SELECT max(id) FROM item").get

        def lookups(connection: apsw.Connection, seed: int, span: int) -> float:
            keys = [random.Random(seed + n).randint(1, span) for n in range(count)]
            began = time.perf_counter()
            for key in keys:
                connection.execute("SELECT name, amount FROM item WHERE id=?", (key,)).fetchall()
            return count / (time.perf_counter() - began)

        def scan(connection: apsw.Connection) -> float:
            began = time.perf_counter()
            connection.execute("SELECT sum(amount), sum(length(token)) FROM item").fetchall()
            return 1 / (time.perf_counter() - began)

        results: dict[str, Any] = {}
        for name, cache, span in (("uncached", 10, top), ("cached", -200_000, min(top, 20_000))):
            pairs = []
            for connection in (ours, theirs):
                connection.execute(f"PRAGMA cache_size={cache}").fetchall()
                lookups(connection, 0, span)
            if name == "cached":
                for connection in (ours, theirs):
                    connection.execute("SELECT count(token) FROM item WHERE id<=?", (span,)).fetchall()
            for turn in range(rounds):
                pairs.append((lookups(ours, turn * count, span), lookups(theirs, turn * count, span)))
            results[name] = pairs
            if name == "uncached":
                results["scan"] = [(scan(ours), scan(theirs)) for _ in range(rounds)]
    return results


def idle(path: str, options: dict[str, Any], settle: float, seconds: float) -> dict[str, Any]:
    """Opens, commits, and then does nothing; from when to when, by the wall clock."""
    import bottomless_wal

    with contextlib.closing(connect(path, options)) as connection:
        prepare(connection)
        bottomless_wal.flush(connection)
        time.sleep(settle)
        began = time.time()
        time.sleep(seconds)
        return {"began": began, "ended": time.time()}


def paced(path: str, options: dict[str, Any] | None, count: int, seconds: float, settle: float, tail: float) -> dict[str, Any]:
    """`count` commits spread evenly over some time, each with a token of its own; when each was done, by the wall clock."""
    rng = random.Random(5)
    made: list[tuple[str, float]] = []
    with contextlib.closing(connect(path, options)) as connection:
        prepare(connection)
        connection.execute("CREATE TABLE mark(id INTEGER PRIMARY KEY, token TEXT)")
        if options is not None:
            import bottomless_wal

            bottomless_wal.flush(connection)
        time.sleep(settle)
        began = time.time()
        for number in range(count):
            time.sleep(max(0.0, began + seconds * number / count - time.time()))
            token = "<" + "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789", k=20)) + ">"
            connection.execute("INSERT INTO mark(token) VALUES(?)", (token,))
            made.append((token, time.time()))
        time.sleep(tail)
        ended = time.time()
    return {"made": made, "began": began, "ended": ended}


def s3vfs(url: str, count: int) -> dict[str, Any]:
    """Commits through sqlite-s3vfs, one object a page, in the one journal mode that costs no further objects."""
    import boto3
    import sqlite_s3vfs

    rng = random.Random(6)
    resource = boto3.session.Session().resource("s3", endpoint_url=url)
    vfs = sqlite_s3vfs.S3VFS(bucket=resource.Bucket(BUCKET), block_size=65536)
    times: list[float] = []
    with contextlib.closing(apsw.Connection("s3vfs.db", vfs=vfs.name)) as connection:
        connection.execute("PRAGMA journal_mode=memory").fetchall()
        prepare(connection)
        for _ in range(count):
            times.append(touch(connection, rng))
    return {"commits": times}
