#!/usr/bin/env python3
"""Kills writers with SIGKILL at random moments, over and over on one history, and accounts for every acknowledged commit.

Each round starts `--processes` writers of `--threads` threads on one database, kills them after a random time, then either opens the
database in place or deletes the local files and boots from the bucket. After each round: every acknowledged commit is there, no
transaction is torn (accounts sum to zero, every ledger row has its twin), `integrity_check` is ok, and the state hash of the
restored file is the one that the head's segment tells. With ack=local only a suffix may be missing.

A failing run prints the seed that repeats its choices, and leaves its directory behind.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import apsw

import bottomless_wal

ACCOUNTS = 20


def options(args: argparse.Namespace) -> dict[str, object]:
    """The replication options of one run."""
    return {"endpoint": args.endpoint, "create_bucket": True, "ack": args.ack, "pages": args.pages, "retry_timeout": 5}


def writer(args: argparse.Namespace) -> None:
    """A child: threads that move money between accounts; each acknowledged transfer is one line of a file."""
    path = os.path.join(args.directory, "bank.db")
    log = os.open(os.path.join(args.directory, f"acks-{args.who}"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    errors = os.open(os.path.join(args.directory, "errors"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def work(thread: int) -> None:
        rng = random.Random(f"{args.seed}-{args.who}-{thread}")
        try:
            connection = bottomless_wal.connect(path, **options(args))
            connection.set_busy_timeout(60000)
            number = 0
            while True:
                number += 1
                tag = f"{args.who}.{os.getpid()}.{thread}.{number}"
                one, other = rng.sample(range(ACCOUNTS), 2)
                amount = rng.randint(1, 100)
                connection.execute("BEGIN IMMEDIATE")
                connection.execute("UPDATE account SET balance = balance - ? WHERE id = ?", (amount, one))
                connection.execute("INSERT INTO ledger VALUES(?, ?, ?, randomblob(?))", (tag, one, -amount, rng.choice((10, 300, 6000))))
                connection.execute("UPDATE account SET balance = balance + ? WHERE id = ?", (amount, other))
                connection.execute("INSERT INTO ledger VALUES(?, ?, ?, NULL)", (tag, other, amount))
                connection.execute("COMMIT")
                os.write(log, f"{tag}\n".encode())
                if rng.random() < 0.03:
                    mode = rng.choice((apsw.SQLITE_CHECKPOINT_PASSIVE, apsw.SQLITE_CHECKPOINT_RESTART, apsw.SQLITE_CHECKPOINT_TRUNCATE))
                    try:
                        connection.wal_checkpoint(mode=mode)
                    except apsw.BusyError:
                        continue
                if rng.random() < 0.01:
                    connection.close()
                    connection = bottomless_wal.connect(path, **options(args))
                    connection.set_busy_timeout(60000)
        except BaseException as error:
            os.write(errors, f"{args.who} {os.getpid()}: {type(error).__name__}: {error}\n".encode())
            raise

    for thread in range(args.threads):
        threading.Thread(target=work, args=(thread,), daemon=True).start()
    time.sleep(3600)


def setup(args: argparse.Namespace) -> None:
    connection = bottomless_wal.connect(os.path.join(args.directory, "bank.db"), **options(args))
    connection.execute("CREATE TABLE account(id INTEGER PRIMARY KEY, balance INTEGER)")
    connection.execute("CREATE TABLE ledger(tag TEXT, account INTEGER, amount INTEGER, data BLOB)")
    connection.execute("CREATE INDEX by_tag ON ledger(tag)")
    with connection:
        for number in range(ACCOUNTS):
            connection.execute("INSERT INTO account VALUES(?, 0)", (number,))
    bottomless_wal.flush(connection)
    connection.close()


def check(args: argparse.Namespace) -> dict[str, int]:
    """Opens the database and accounts for everything. Raises AssertionError."""
    path = os.path.join(args.directory, "bank.db")
    connection = bottomless_wal.connect(path, **options(args))
    connection.set_busy_timeout(10000)
    found = {row[0] for row in connection.execute("SELECT DISTINCT tag FROM ledger")}
    torn = connection.execute("SELECT count(*) FROM (SELECT tag FROM ledger GROUP BY tag HAVING sum(amount) != 0 OR count(*) != 2)").get
    total = connection.execute("SELECT sum(balance) FROM account").get
    sound = connection.execute("PRAGMA integrity_check").get
    wrong = connection.execute(
        "SELECT count(*) FROM account WHERE balance != (SELECT coalesce(sum(amount), 0) FROM ledger WHERE account = id)"
    ).get
    bottomless_wal.flush(connection)
    state = bottomless_wal.status(connection)
    connection.close()
    promised: set[str] = set()
    for file in Path(args.directory).glob("acks-*"):
        promised.update(file.read_text().split("\n")[:-1])
    lost = promised - found
    assert sound == "ok", f"integrity_check: {sound}"
    assert (total, torn, wrong) == (0, 0, 0), f"torn: total {total}, {torn} half transfers, {wrong} wrong balances"
    if args.ack == "local":
        by_writer: dict[str, list[int]] = {}
        for tag in promised:
            writer_name, number = tag.rsplit(".", 1)
            by_writer.setdefault(writer_name, []).append(int(number))
        for writer_name, numbers in by_writer.items():
            missing = [n for n in numbers if f"{writer_name}.{n}" not in found]
            assert sorted(numbers)[len(numbers) - len(missing) :] == sorted(missing), f"a hole, not a suffix: {writer_name} {missing[:5]}"
        for file in Path(args.directory).glob("acks-*"):
            kept = [line for line in file.read_text().split("\n")[:-1] if line in found]
            file.write_text("".join(f"{line}\n" for line in kept))
    else:
        assert not lost, f"{len(lost)} acknowledged commits lost: {sorted(lost)[:5]}"
    return {"promised": len(promised), "lost": len(lost), "txid": state.txid, "state": state.state_hash}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--ack", default="pages")
    parser.add_argument("--pages", default="commit")
    parser.add_argument("--wipe", type=float, default=0.4, help="share of the rounds that delete the local files")
    parser.add_argument("--longest", type=float, default=1.5, help="seconds of work in a round, at most")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--endpoint", default=None, help="default: a directory store")
    parser.add_argument("--directory", default=None)
    parser.add_argument("--who", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.who is not None:
        writer(args)
        return 0
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(1 << 32)
    rng = random.Random(seed)
    args.directory = args.directory or tempfile.mkdtemp(prefix="crash-test-")
    args.endpoint = args.endpoint or f"file://{args.directory}/store"
    args.seed = seed
    setup(args)
    kills = rounds = wipes = 0
    lost = 0
    began = time.monotonic()
    while kills < args.kills:
        rounds += 1
        children = []
        for number in range(args.processes):
            argv = [sys.executable, __file__, "--who", f"{rounds}-{number}", "--directory", args.directory, "--endpoint", args.endpoint]
            argv += ["--seed", str(rng.randrange(1 << 32)), "--threads", str(args.threads), "--ack", args.ack, "--pages", args.pages]
            children.append(subprocess.Popen(argv))
        rng.shuffle(children)
        for child in children:
            time.sleep(rng.uniform(0.15, args.longest))
            child.send_signal(signal.SIGKILL)
            child.wait()
            kills += 1
        wipe = rng.random() < args.wipe
        if wipe:
            wipes += 1
            for file in Path(args.directory).glob("bank.db*"):
                file.unlink()
        errors = Path(args.directory, "errors")
        try:
            assert not errors.exists() or not errors.read_text(), errors.read_text()[:2000]
            result = check(args)
        except (AssertionError, bottomless_wal.BottomlessError, apsw.Error) as error:
            print(f"FAILED in round {rounds} ({'wiped' if wipe else 'in place'}), seed {seed}, directory {args.directory}: {error}")
            return 1
        lost += result["lost"]
        if rounds % 10 == 0:
            print(f"{kills} kills, {wipes} wipes, {result['promised']} acknowledged, txid {result['txid']}", flush=True)
    print(
        json.dumps(
            {
                "kills": kills, "rounds": rounds, "wipes": wipes, "acknowledged": result["promised"], "lost": lost, "torn": 0,
                "txid": result["txid"], "seconds": round(time.monotonic() - began, 1), "seed": seed,
            }
        )
    )  # fmt: skip
    shutil.rmtree(args.directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
