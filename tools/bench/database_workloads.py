"""The jobs of `workloads` that have to do with whole databases: from nothing to stored, and back."""

from __future__ import annotations

import contextlib
import os
import random
import time
from pathlib import Path
from typing import Any

from tools.bench.commit_workloads import BUCKET, connect, prepare, raw_client, touch


def warm(options: dict[str, Any]) -> None:
    """Has boto3 loaded: what a program needs to start is taken off its peer's time, too. `reopen` measures it."""
    import bottomless_wal

    bottomless_wal.listing(**{name: value for name, value in options.items() if name in ("endpoint", "bucket", "create_bucket")})


def replicate(path: str, options: dict[str, Any], root: str = "") -> dict[str, Any]:
    """Opens an existing database for the first time, until its log, and then its page view, are complete.

    `view` tells of the time after the log was stored: seconds, and those of processor time here, of the server that keeps its objects in
    `root`, and of the whole machine.
    """
    import bottomless_wal

    warm(options)
    began, cpu = time.perf_counter(), time.process_time()
    connection = bottomless_wal.connect(path, **options)
    while not bottomless_wal.status(connection).txid:
        time.sleep(0.001)
    opened = (time.perf_counter(), time.process_time(), server_cpu(root), machine_cpu())
    bottomless_wal.flush(connection)
    ended = (time.perf_counter(), time.process_time(), server_cpu(root), machine_cpu())
    status = bottomless_wal.status(connection)
    connection.close()
    return {
        "seconds": opened[0] - began,
        "cpu": opened[1] - cpu,
        "view": [after - before for before, after in zip(opened, ended, strict=True)],
        "requests": status.requests,
        "sent": status.bytes_sent,
    }


def server_cpu(root: str) -> float:
    """Seconds of processor time that the server has used which keeps its objects in `root`."""
    ticks = 0
    for status in Path("/proc").glob("[0-9]*/stat") if root else ():
        try:
            words = status.read_text().rpartition(")")[2].split()
            command = (status.parent / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if command[1:3] == [b"serve", b"s3"] and root.encode() in command:
            ticks += int(words[11]) + int(words[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def machine_cpu() -> float:
    """Seconds of processor time that the whole machine has worked, for whomever; 0 where nobody tells."""
    try:
        words = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    return (sum(map(int, words[:3])) + sum(map(int, words[5:8]))) / os.sysconf("SC_CLK_TCK")


def restore(name: str, output: str, options: dict[str, Any]) -> dict[str, Any]:
    """Restores, with verification."""
    import bottomless_wal

    warm(options)
    began, cpu = time.perf_counter(), time.process_time()
    done = bottomless_wal.restore(name, output=output, **options)
    return {
        "seconds": time.perf_counter() - began,
        "cpu": time.process_time() - cpu,
        "requests": done.requests,
        "received": done.received,
        "txid": done.txid,
    }


def download(url: str, keys: list[str], output: str) -> dict[str, Any]:
    """Fetches objects whole, one after the other, with one plain GET each, into a file."""
    client = raw_client(url)
    client.list_objects_v2(Bucket=BUCKET, MaxKeys=1)
    began = time.perf_counter()
    with open(output, "wb") as file:
        for key in keys:
            for piece in client.get_object(Bucket=BUCKET, Key=key)["Body"].iter_chunks(1 << 20):
                file.write(piece)
        return {"seconds": time.perf_counter() - began, "bytes": file.tell()}


def one_put(url: str, path: str, page_size: int, count: int) -> dict[str, Any]:
    """What one PUT of a compressed page costs by itself, in seconds of this process, one after the other."""
    import zstandard

    client = raw_client(url)
    with open(path, "rb") as file:
        bodies = [zstandard.ZstdCompressor(level=3).compress(file.read(page_size)) for _ in range(count)]
    client.put_object(Bucket=BUCKET, Key="cost/warm", Body=b"")
    began, cpu = time.perf_counter(), time.process_time()
    for number, body in enumerate(bodies):
        client.put_object(Bucket=BUCKET, Key=f"cost/{number}", Body=body)
    return {"seconds": (time.perf_counter() - began) / count, "cpu": (time.process_time() - cpu) / count}


def transaction(path: str, options: dict[str, Any], size: int) -> dict[str, Any]:
    """One transaction that writes `size` bytes."""
    import bottomless_wal
    from tools.bench.environment import rows

    with contextlib.closing(bottomless_wal.connect(path, **options)) as connection:
        connection.execute("CREATE TABLE item(id INTEGER PRIMARY KEY, name TEXT, amount INTEGER, remark TEXT, token TEXT)")
        connection.execute("BEGIN")
        for seed in range(size // 890_000):  # bytes that 2000 rows take
            connection.executemany("INSERT INTO item(name, amount, remark, token) VALUES(?,?,?,?)", rows(seed, 2000))
        began = time.perf_counter()
        connection.execute("COMMIT")
        took = time.perf_counter() - began
        size = os.stat(path + "-wal").st_size
    return {"seconds": took, "wal": size}


def history(path: str, options: dict[str, Any], count: int) -> dict[str, Any]:
    """`count` small commits, each a segment."""
    rng = random.Random(7)
    with contextlib.closing(connect(path, options)) as connection:
        prepare(connection)
        began = time.perf_counter()
        for _ in range(count):
            touch(connection, rng)
        took = time.perf_counter() - began
    return {"seconds": took}


def shorten(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """`bottomless-wal compact`, as from cron."""
    import bottomless_wal

    began = time.perf_counter()
    report = bottomless_wal.compact(name, **options)
    return {"seconds": time.perf_counter() - began, "before": report.before, "after": report.after}


def reopen(path: str, options: dict[str, Any] | None) -> dict[str, Any]:
    """Opens a database and reads a row of it; and once more, when this process has loaded all that it needs for it."""
    connect(path + ".none", None).close()  # what the first connection of a process costs
    if options is not None:
        import bottomless_wal
    seconds: list[float] = []
    requests: dict[str, int] = {}
    for _ in range(2):
        began = time.perf_counter()
        with contextlib.closing(connect(path, options)) as connection:
            connection.execute("SELECT max(id) FROM item").fetchall()
            seconds.append(time.perf_counter() - began)
            if options is not None:
                requests = dict(bottomless_wal.status(connection).requests)
    return {"seconds": seconds, "requests": requests}
