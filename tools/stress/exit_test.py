#!/usr/bin/env python3
"""Ends processes at random moments, in all the ways a process ends, and counts hangs and lost commits. Prints one line of JSON.

Each process opens the same two databases (ack=log and ack=local), commits from daemon threads or an executor, and ends. One that has not
ended after 30 seconds has its stacks printed and is killed. In the end every acknowledged commit must be in the database that is restored
from the bucket alone; of ack=local after one more open, which sends what an interrupted exit has left.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import faulthandler
import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import apsw

import bottomless_wal

KINDS: Final = ("end", "sysexit", "executor", "drain", "drain", "drain twice", "interrupt", "interrupt twice", "terminate")
"""How a process ends. `drain` is Ctrl-C while the exit sends what ack=local has left, and no thread of the application runs."""

OPENED: Final = b"x"
"""What a process writes when it has opened both databases."""

KEPT: Final[list[apsw.Connection]] = []
"""Connections that stay open to the end: the interpreter closes them when it clears the modules."""

_HANG_SECONDS: Final = 30.0
_THREADS: Final = 3
_LONGEST_SECONDS: Final = 0.4  # from the first commit to the end, and to the signal
_DRAIN_SECONDS: Final = 0.06  # in which most of the drains come to their end
_LEFT: Final = 100  # commits that an exit sends
_ACKS: Final = ("log", "local")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--exits", type=int, default=100)
    parser.add_argument("--kind", choices=sorted(set(KINDS)), help="one way to end only")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--directory", type=Path, default=None, help="an empty one; a file system in memory is quicker")
    parser.add_argument("--child", nargs=3, metavar=("KIND", "SECONDS", "NUMBER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        work(args.directory, args.child[0], float(args.child[1]), int(args.child[2]))
        return 0
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(1 << 32)
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        told = {"seed": seed, **run(Path(directory), args.exits, args.kind, random.Random(seed))}
    print(json.dumps(told))
    return 1 if told["hangs"] or told["missing"] else 0


# --- the process that ends -------------------------------------------------------------------------------------------------


def options(directory: Path, ack: str) -> dict[str, Any]:
    """The options of the database `ack`."""
    more: dict[str, Any] = {"interval": 60} if ack == "local" else {}
    return {"endpoint": (directory / "store").as_uri(), "create_bucket": True, "ack": ack, "pages": "off", **more}


def work(directory: Path, kind: str, seconds: float, number: int) -> None:
    """Commits for `seconds`, and ends as `kind` says."""
    # Open until the process has ended: a hang at the very end is the one that is looked for.
    stacks = os.open(directory / "stacks", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    faulthandler.register(signal.SIGUSR1, stacks, all_threads=True)
    books = {ack: os.open(directory / f"acknowledged-{ack}", os.O_WRONLY | os.O_CREAT | os.O_APPEND) for ack in _ACKS}

    def commits(thread: int, most: int) -> None:
        connections = {ack: bottomless_wal.connect(directory / f"{ack}.db", **options(directory, ack)) for ack in _ACKS}
        cycle: list[object] = [connections]
        cycle.append(cycle)  # only the collector closes them
        for count in range(most):
            row = (number * _THREADS + thread) * 1_000_000 + count
            for ack, connection in connections.items():
                try:
                    connection.execute("INSERT INTO t VALUES (?)", (row,))
                except apsw.Error:
                    return
                os.write(books[ack], b"%d\n" % row)

    for ack in _ACKS:
        connection = bottomless_wal.connect(directory / f"{ack}.db", **options(directory, ack))
        connection.execute("CREATE TABLE IF NOT EXISTS t(id INTEGER PRIMARY KEY)")
        KEPT.append(connection)
    if kind == "executor":
        executor = concurrent.futures.ThreadPoolExecutor(_THREADS)
        for thread in range(_THREADS):
            executor.submit(commits, thread, 10)
    elif kind.startswith("drain"):
        local = KEPT[-1]
        for count in range(_LEFT):
            local.execute("INSERT INTO t VALUES (?)", (number * _THREADS * 1_000_000 + count,))
            os.write(books["local"], b"%d\n" % (number * _THREADS * 1_000_000 + count))
        seconds = 0.0
    else:
        for thread in range(_THREADS):
            threading.Thread(target=commits, args=(thread, 1_000_000), daemon=True).start()
    os.write(1, OPENED)
    time.sleep(seconds)
    if kind == "sysexit":
        sys.exit(3)


# --- who ends it -----------------------------------------------------------------------------------------------------------


def run(directory: Path, exits: int, kind: str | None, chance: random.Random) -> dict[str, int | float]:
    """Ends `exits` processes, and looks for what they were told is stored."""
    told: Counter[str] = Counter(exits=exits, hangs=0)
    slowest = 0.0
    for number in range(exits):
        how = kind or chance.choice(KINDS)
        began = time.monotonic()
        if not end_one(directory, how, number, chance):
            told["hangs"] += 1
            print(f"hangs ({how}):\n{(directory / 'stacks').read_text(encoding='utf-8')}", file=sys.stderr)
        slowest = max(slowest, time.monotonic() - began)
    for ack in _ACKS:
        expected = {int(line) for line in (directory / f"acknowledged-{ack}").read_text(encoding="ascii").split()}
        told["acknowledged"] += len(expected)
        missing = expected - stored(directory, ack)
        told["missing"] += len(missing)
    return {**told, "slowest": round(slowest, 1)}


def end_one(directory: Path, kind: str, number: int, chance: random.Random) -> bool:
    """Runs one process until it has ended; False when it hangs."""
    seconds = chance.uniform(0.0, _LONGEST_SECONDS / 2)
    command = [sys.executable, __file__, "--directory", str(directory), "--child", kind, str(seconds), str(number)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        if process.stdout.read(1) != OPENED:
            raise RuntimeError(f"process {number} ({kind}) could not open what the ones before it have left")
        longest = _DRAIN_SECONDS if kind.startswith("drain") else _LONGEST_SECONDS
        signals = {"interrupt": [signal.SIGINT], "drain": [signal.SIGINT], "terminate": [signal.SIGTERM]}
        for each in signals.get(kind.removesuffix(" twice"), []) * (2 if kind.endswith(" twice") else 1):
            time.sleep(chance.uniform(0.0, longest))
            process.send_signal(each)
        try:
            process.wait(_HANG_SECONDS)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGUSR1)
            time.sleep(1.0)
            process.kill()
            return False
    return True


def stored(directory: Path, ack: str) -> set[int]:
    """The rows in the bucket."""
    if ack == "local":
        with contextlib.closing(bottomless_wal.connect(directory / "local.db", **options(directory, ack))) as connection:
            bottomless_wal.flush(connection)
    copy = directory / f"copy-{ack}.db"
    bottomless_wal.restore(directory / f"{ack}.db", output=copy, endpoint=(directory / "store").as_uri())
    with contextlib.closing(apsw.Connection(str(copy))) as connection:
        return {row for (row,) in connection.execute("SELECT id FROM t")}


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    sys.exit(main())
