#!/usr/bin/env python3
"""Makes a history of many commits with a real writer, whose upkeep keeps it short, and shows what a restore of it costs.

    write       --commits small commits, with ack=log on a directory store; in between, as many blocks of another writer without upkeep
    restore     the head and --samples random txids, each compared with the state hash that the writer had then
    moment      the commits' times are looked up, and one is restored by --timestamp
    age, prune  all objects become three days old; what no promise needs goes; the head and all that is promised is restored again
    verify      deep: every object, every hash

Prints one line of JSON: the writer's latencies with and without upkeep (of the committing statement, in ms), and requests, bytes and
seconds of the rest. Exit status 1 if anything is not as it was.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import bottomless_wal
from bottomless_wal import admin

BLOCK = 2000
OPTIONS = {"bucket": "long", "create_bucket": True}


class Wrong(Exception):
    """Something is not as it was."""


def write(path: str, endpoint: str, compaction: str) -> None:
    """A writer: for each line on standard input so many commits; prints each one's milliseconds, txid and state hash."""
    con = bottomless_wal.connect(path, endpoint=endpoint, ack="log", pages="off", compaction=compaction, **OPTIONS)
    con.execute("CREATE TABLE IF NOT EXISTS t(id INTEGER PRIMARY KEY, at REAL, body TEXT)")
    rng = random.Random(1)
    for line in sys.stdin:
        for _ in range(int(line)):
            row = (rng.randrange(20000), time.time(), f"{rng.getrandbits(600):x}")
            began = time.perf_counter()
            con.execute("INSERT OR REPLACE INTO t VALUES (?, ?, ?)", row)
            took = time.perf_counter() - began
            status = bottomless_wal.status(con)
            print(took * 1e3, status.txid, status.state_hash)
        print("done", flush=True)
    con.close()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)


class Writer:
    """A writer in a process of its own, its times and its states."""

    def __init__(self, path: Path, endpoint: str, compaction: str) -> None:
        argv = [sys.executable, __file__, "--write", str(path), endpoint, compaction]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.times, self.states = array("d"), array("Q", [0])

    def commit(self, count: int) -> None:
        """So many commits."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line == "done\n":
                return
            took, txid, state = line.split()
            self.times.append(float(took))
            self.states.extend([0] * (int(txid) - len(self.states)))  # the table's own commits
            self.states.append(int(state))
        raise Wrong("a writer died")

    def close(self) -> int:
        """Its peak memory in MB."""
        peak, _ = self.process.communicate(timeout=600)
        return int(peak) >> 10

    def summary(self) -> dict[str, float]:
        cuts = statistics.quantiles(self.times, n=100)
        return {"p50": round(cuts[49], 2), "p99": round(cuts[98], 2), "max": round(max(self.times), 1), "count": len(self.times)}


def restored(endpoint: str, output: Path, states: array[int], **which: Any) -> dict[str, Any]:
    """A restore, and what it took."""
    found = bottomless_wal.restore("app.db", output=output, force=True, endpoint=endpoint, **OPTIONS, **which)
    if states[found.txid] and found.state_hash != states[found.txid]:
        raise Wrong(f"txid {found.txid} is restored as {found.state_hash:016x}: it was {states[found.txid]:016x}")
    return {"txid": found.txid, "requests": found.requests, "mb": round(found.received / 1e6, 2), "seconds": round(found.seconds, 2)}


def samples(endpoint: str, output: Path, writer: Writer, count: int, first: int) -> dict[str, Any]:
    rng = random.Random(2)
    done = [restored(endpoint, output, writer.states, txid=rng.randint(first, len(writer.states) - 1)) for _ in range(count)]
    return {"count": count, **{f"most {name}": max(one[name] for one in done) for name in ("requests", "mb", "seconds")}}


def run(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """All of it."""
    endpoint = (root / "store").as_uri()
    for name in ("with", "without"):
        (root / name).mkdir()
    kept = Writer(root / "with" / "app.db", endpoint, "on")
    plain = Writer(root / "without" / "plain.db", endpoint, "off")
    made = 0
    while made < args.commits:
        count = min(BLOCK, args.commits - made)
        kept.commit(count)
        if made < args.compare:
            plain.commit(count)
        made += count
    result: dict[str, Any] = {"commits": made}
    result["peak mb"] = {"with upkeep": kept.close(), "without": plain.close()}
    result["ms a commit"] = {"with upkeep": kept.summary(), "without": plain.summary()}
    output, log = root / "out.db", root / "store" / "long" / "app.db-wal"
    result["objects"] = len(os.listdir(log))
    result["head"] = restored(endpoint, output, kept.states)
    if output.read_bytes()[28:] and not bottomless_wal.verify("app.db", endpoint=endpoint, **OPTIONS).ok:
        raise Wrong("verify finds problems")
    result["random txids"] = samples(endpoint, output, kept, args.samples, 1)
    began = time.monotonic()
    told = admin.states("app.db", endpoint=endpoint, last=1000, **OPTIONS)
    result["timeline"] = {"states": told.count, "seconds": round(time.monotonic() - began, 2)}
    wanted = told.commits[len(told.commits) // 2]
    result["moment"] = restored(endpoint, output, kept.states, timestamp=wanted.time)
    if result["moment"]["txid"] < wanted.txid:
        raise Wrong(f"{wanted.time} leads to txid {result['moment']['txid']}, not {wanted.txid}")
    old = time.time() - 3 * 86400
    for path in log.iterdir():
        os.utime(path, (old, old))
    made_now = bottomless_wal.snapshot("app.db", endpoint=endpoint, **OPTIONS)
    os.utime(log / f"{0:016x}-{made_now.txid:016x}", (old, old))
    pruned = bottomless_wal.prune("app.db", endpoint=endpoint, retention=86400, keep_snapshots=30, **OPTIONS)
    result["pruned"] = {"segments": pruned.segments, "left": len(os.listdir(log)), "seconds": round(pruned.seconds, 2)}
    result["head after"] = restored(endpoint, output, kept.states)
    result["promised after"] = [restored(endpoint, output, kept.states, txid=txid)["requests"] for txid in pruned.snapshots]
    began = time.monotonic()
    if not bottomless_wal.verify("app.db", deep=True, endpoint=endpoint, **OPTIONS).ok:
        raise Wrong("verify --deep finds problems")
    result["verify --deep seconds"] = round(time.monotonic() - began, 2)
    result["peak mb"]["reader"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    return result


def main() -> int:
    if sys.argv[1:2] == ["--write"]:
        write(*sys.argv[2:5])
        return 0
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--commits", type=int, default=100_000)
    parser.add_argument("--compare", type=int, default=20_000, help="so many of the commits are made without upkeep, too")
    parser.add_argument("--samples", type=int, default=20, help="random txids to restore")
    parser.add_argument("--directory", default=None, help="where the database and the store are")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="long-history-", dir=args.directory) as base:
        try:
            result = run(args, Path(base))
        except Wrong as wrong:
            print(f"FAILED: {wrong}")
            return 1
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
