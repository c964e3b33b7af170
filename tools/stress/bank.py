#!/usr/bin/env python3
"""A bank whose books tell when anything was lost, doubled or torn: the tellers that write it, and the auditor that accounts for it.

It is run as processes of their own, which are there to be killed: `bank.py open|write|audit`, with the job as JSON in the last argument.

Each transaction of a teller moves money between two accounts and leaves its traces in several tables (balances, two ledger rows, one
row of `done` with the next number, a counter; now and then some hundred KB of parcels), so that half of one would be seen.
Tellers commit in every way there is, roll back, vacuum, make checkpoints of every kind, close and reopen. What was acknowledged is a
line of a file, written by one `write` after COMMIT has returned.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import json
import operator
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import apsw

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import bottomless_wal
from tests.support.independent_reader import Bucket, page_hash, read_segment

ACCOUNTS = 20
NAME = "bank.db"
BUSY_MS = 60_000
AUDIT_SECONDS = 600

SCHEMA = """
CREATE TABLE account(id INTEGER PRIMARY KEY, balance INTEGER NOT NULL);
CREATE TABLE ledger(id INTEGER PRIMARY KEY, tag TEXT NOT NULL, account INTEGER NOT NULL, amount INTEGER NOT NULL, data BLOB);
CREATE INDEX by_tag ON ledger(tag);
CREATE INDEX heavy ON ledger(id) WHERE data IS NOT NULL;
CREATE TABLE done(seq INTEGER PRIMARY KEY, tag TEXT NOT NULL UNIQUE, parcels INTEGER NOT NULL, bytes INTEGER NOT NULL);
CREATE TABLE parcel(tag TEXT, number INTEGER, data BLOB, PRIMARY KEY(tag, number)) WITHOUT ROWID;
CREATE TABLE counter(transactions INTEGER NOT NULL);
INSERT INTO counter VALUES(0);
CREATE VIEW transfer AS SELECT '' AS tag, 0 AS one, 0 AS other, 0 AS amount, 0 AS size;
CREATE TRIGGER transferring INSTEAD OF INSERT ON transfer BEGIN
    UPDATE account SET balance = balance - new.amount WHERE id = new.one;
    INSERT INTO ledger(tag, account, amount, data) VALUES(new.tag, new.one, -new.amount, randomblob(new.size));
    UPDATE account SET balance = balance + new.amount WHERE id = new.other;
    INSERT INTO ledger(tag, account, amount) VALUES(new.tag, new.other, new.amount);
    INSERT INTO done SELECT coalesce(max(seq), 0) + 1, new.tag, 0, 0 FROM done;
    UPDATE counter SET transactions = transactions + 1;
END;
"""

# Each gives a row, and the number that it must have.
BOOKS = {
    "the accounts sum to zero": "SELECT coalesce(sum(balance), 0), 0 FROM account",
    "every balance is the sum of its ledger rows": (
        "SELECT count(*), 0 FROM account a LEFT JOIN (SELECT account, sum(amount) AS total FROM ledger GROUP BY account) l "
        "ON l.account = a.id WHERE a.balance != coalesce(l.total, 0)"
    ),
    "every transfer has two ledger rows that cancel out": (
        "SELECT count(*), 0 FROM (SELECT tag FROM ledger GROUP BY tag HAVING count(*) != 2 OR sum(amount) != 0)"
    ),
    "every ledger row is of a transaction that is done": "SELECT count(*), 0 FROM ledger WHERE tag NOT IN (SELECT tag FROM done)",
    "every transaction has its ledger rows": "SELECT (SELECT count(*) FROM ledger), 2 * (SELECT count(*) FROM done)",
    "transactions are numbered without a gap": "SELECT (SELECT coalesce(max(seq), 0) FROM done), (SELECT count(*) FROM done)",
    "the counter has counted every transaction": "SELECT (SELECT transactions FROM counter), (SELECT count(*) FROM done)",
    "every parcel is whole": (
        "SELECT count(*), 0 FROM (SELECT tag, count(*) AS parcels, sum(length(data)) AS bytes FROM parcel GROUP BY tag) p "
        "JOIN done d USING(tag) WHERE p.parcels != d.parcels OR p.bytes != d.bytes"
    ),
    "every parcel is of a transaction that is done": "SELECT count(*), 0 FROM parcel WHERE tag NOT IN (SELECT tag FROM done)",
}


@dataclass(frozen=True)
class Job:
    """What a process of the bank is to do. `store` is the bucket's own URL, which the auditor also looks at from outside."""

    directory: str
    options: dict[str, Any]
    store: str
    who: str = "nobody"
    seed: int = 0
    threads: int = 4
    vacuum: float = 0.0
    outages: bool = False

    @property
    def path(self) -> str:
        return os.path.join(self.directory, NAME)

    @property
    def bucket(self) -> Bucket:
        return Bucket(Place("", self.store, self.options["bucket"]))

    def connect(self) -> apsw.Connection:
        connection = bottomless_wal.connect(self.path, **self.options)
        connection.set_busy_timeout(BUSY_MS)
        return connection

    def argv(self, what: str) -> list[str]:
        """The command line of a process that does `what`."""
        return [sys.executable, __file__, what, json.dumps(asdict(self))]


class Place(NamedTuple):
    """As `independent_reader.Place`."""

    kind: str
    url: str
    bucket: str


class Ack(NamedTuple):
    """A transaction that was acknowledged; the seconds it waited for SQLite's write lock, and those that its commit took."""

    tag: str
    seq: int
    begin: float
    commit: float


def acks(directory: str | os.PathLike[str]) -> list[Ack]:
    """Everything that was acknowledged since the files `acks-*` were begun."""
    rows = [line.split() for file in sorted(Path(directory).glob("acks-*")) for line in file.read_text().split("\n")[:-1]]
    return [Ack(tag, int(seq), float(begin), float(commit)) for tag, seq, begin, commit in rows]


class Refused(Exception):
    """The store was away for too long: the transaction was not acknowledged."""


# --- writing ---------------------------------------------------------------------------------------------------------------


@dataclass
class Teller:
    """One thread with one connection."""

    job: Job
    number: int
    out: int
    stop: threading.Event
    count: int = 0
    connection: apsw.Connection = field(init=False)
    rng: random.Random = field(init=False)

    def run(self) -> None:
        self.rng = random.Random(f"{self.job.seed}-{self.number}")
        self._open()
        while not self.stop.is_set():
            try:
                self._transact()
                self._about()
            except Refused:
                self.stop.wait(self.rng.uniform(0, 0.2))
        self.connection.close()

    def _open(self) -> None:
        while True:
            try:
                self.connection = self.job.connect()
                return
            except bottomless_wal.StoreError:
                if not self.job.outages or self.stop.wait(0.1):
                    raise

    def _transact(self) -> None:
        self.count += 1
        tag = f"{self.job.who}.{os.getpid()}.{self.number}.{self.count}"
        one, other = self.rng.sample(range(ACCOUNTS), 2)
        transfer = (tag, one, other, self.rng.randint(1, 100), self.rng.choice((0, 10, 300, 6000)))
        how = self.rng.choices(("begin", "with", "release", "statement", "rollback"), (60, 10, 10, 15, 5))[0]
        execute = self.connection.execute
        began = time.monotonic()
        if how == "statement":
            waited = 0.0
            with self._refusable():
                execute("INSERT INTO transfer VALUES(?, ?, ?, ?, ?)", transfer)
        elif how == "with":
            with self._refusable(), self.connection:
                waited = self._transfer(transfer, began)
                began = time.monotonic()
        elif how == "release":
            with self._refusable():
                execute("SAVEPOINT outermost")
                waited = self._transfer(transfer, began)
                began = time.monotonic()
                execute("RELEASE outermost")
        else:
            execute("BEGIN IMMEDIATE")
            waited = self._transfer(transfer, began)
            if how == "rollback":
                execute("ROLLBACK")
                return
            began = time.monotonic()
            with self._refusable():
                execute("COMMIT")
        took = time.monotonic() - began
        seq = execute("SELECT seq FROM done WHERE tag = ?", (tag,)).get
        os.write(self.out, f"{tag} {seq} {waited:.6f} {took:.6f}\n".encode())

    def _transfer(self, transfer: tuple[str, int, int, int, int], began: float) -> float:
        """All that a transaction of several statements does; the seconds until the first one held the write lock."""
        execute, rng, tag = self.connection.execute, self.rng, transfer[0]
        execute("UPDATE counter SET transactions = transactions")
        waited = time.monotonic() - began
        if rng.random() < 0.1:
            execute("SAVEPOINT doubt")
            execute("INSERT INTO transfer VALUES(?, 0, 1, 1000000, 20000)", (f"never-{tag}",))
            execute("ROLLBACK TO doubt")
            execute("RELEASE doubt")
        execute("INSERT INTO transfer VALUES(?, ?, ?, ?, ?)", transfer)
        if rng.random() < 0.05:
            execute("UPDATE ledger SET data = NULL WHERE id IN (SELECT id FROM ledger WHERE data IS NOT NULL ORDER BY id LIMIT 40)")
        if rng.random() < 0.01:
            parcels = [rng.randint(20_000, 90_000) for _ in range(rng.randint(3, 9))]
            execute("DELETE FROM parcel WHERE tag NOT IN (SELECT tag FROM done WHERE parcels ORDER BY seq DESC LIMIT 3)")
            execute("UPDATE done SET parcels = ?, bytes = ? WHERE tag = ?", (len(parcels), sum(parcels), tag))
            self.connection.executemany(
                "INSERT INTO parcel VALUES(?, ?, randomblob(?))", ((tag, number, size) for number, size in enumerate(parcels))
            )
        return waited

    def _about(self) -> None:
        """What else goes on between two transactions."""
        rng = self.rng
        if rng.random() < 0.03:
            modes = ("PASSIVE", "FULL", "RESTART", "TRUNCATE")
            mode: int = getattr(apsw, f"SQLITE_CHECKPOINT_{rng.choice(modes)}")
            self.connection.set_busy_timeout(rng.choice((0, 200)))
            with contextlib.suppress(apsw.BusyError):
                self.connection.wal_checkpoint(mode=mode)
            self.connection.set_busy_timeout(BUSY_MS)
        if rng.random() < 0.01:
            self.connection.close()
            self._open()
        if rng.random() < self.job.vacuum:
            with self._refusable(), contextlib.suppress(apsw.BusyError):
                self.connection.execute("VACUUM")

    @contextlib.contextmanager
    def _refusable(self) -> Iterator[None]:
        """A commit in here may fail, if the store has outages, as long as it says so. It stands locally then."""
        try:
            yield
        except apsw.SQLError as error:
            ours = error if isinstance(error, bottomless_wal.ReplicationError) else error.__context__
            if not self.job.outages or not isinstance(ours, bottomless_wal.ReplicationError):
                raise
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")
            raise Refused from error


def write(job: Job) -> int:
    """Tellers at work until SIGTERM, which lets each finish what it does and close. An error of any of them ends the process."""
    # Waited for, in all threads, and not handled: a handler could run while this very one holds the lock of the event it would set.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    directory = Path(job.directory)
    out = os.open(directory / f"acks-{job.who}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    errors = os.open(directory / "errors", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    stacks = os.open(directory / "stacks", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    stop = threading.Event()
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def work(teller: Teller) -> None:
        try:
            teller.run()
        except BaseException:  # noqa: BLE001  (told, and the process ends)
            os.write(errors, f"{job.who} {os.getpid()}: {traceback.format_exc()}\n".encode())
            os._exit(1)

    threads = [threading.Thread(target=work, args=(Teller(job, number, out, stop),)) for number in range(job.threads)]
    print("ready", flush=True)
    for thread in threads:
        thread.start()
    signal.sigwait([signal.SIGTERM])
    stop.set()
    for thread in threads:
        thread.join()
    return 0


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(2)


def found(job: Job) -> int:
    """Founds the bank."""
    connection = job.connect()
    with connection:
        connection.execute(SCHEMA)
        connection.executemany("INSERT INTO account VALUES(?, 0)", ((number,) for number in range(ACCOUNTS)))
    bottomless_wal.flush(connection)
    connection.close()
    return 0


# --- auditing --------------------------------------------------------------------------------------------------------------


def audit(job: Job) -> int:
    """Opens the database, alone, and prints as JSON what it finds: `tags` that are done (with their numbers), and `wrong`."""
    faulthandler.dump_traceback_later(AUDIT_SECONDS, exit=True)
    print("ready", flush=True)
    connection = job.connect()
    wrong = [] if (sound := connection.execute("PRAGMA integrity_check").get) == "ok" else [f"integrity_check: {sound}"]
    for rule, query in BOOKS.items():
        is_, should = connection.execute(query).fetchall()[0]
        if is_ != should:
            wrong.append(f"not true that {rule}: {is_}, not {should}")
    tags = dict(connection.execute("SELECT tag, seq FROM done").fetchall())
    wrong += [f"{tag} was rolled back, and is there" for tag in tags if tag.startswith("never")]
    bottomless_wal.flush(connection)
    status = bottomless_wal.status(connection)
    connection.close()
    state, _ = state_of(job.path)
    bucket = job.bucket
    head = bucket.head(NAME)
    stored = bucket.segment(NAME, head - 1, head).post_hash
    if (status.txid, status.state_hash) != (head, stored):
        wrong.append(f"status says txid {status.txid}, state {status.state_hash:016x}; the head is {head}, state {stored:016x}")
    if state != stored:
        wrong.append(f"the bytes of the file have the state {state:016x}; the head, txid {head}, has {stored:016x}")
    print(json.dumps({"tags": tags, "wrong": wrong, "txid": head, "state": f"{state:016x}"}), flush=True)
    return 0


def state_of(path: str) -> tuple[int, dict[int, int]]:
    """The state hash of a file that nobody has open, and the hash of each of its pages, from its bytes."""
    content = Path(path).read_bytes()
    if os.path.exists(path + "-wal"):
        raise AssertionError("the last close left a WAL")
    size = int.from_bytes(content[16:18], "big")
    size = 65536 if size == 1 else size
    hashes = {number + 1: page_hash(number + 1, content[number * size : (number + 1) * size]) for number in range(len(content) // size)}
    return functools.reduce(operator.xor, hashes.values(), 0), hashes


def replay(bucket: Bucket) -> tuple[int, dict[int, int]]:
    """The log, edge by edge, as it is documented: every link looked at, every state hash computed. The last state, its page hashes."""
    hashes: dict[int, int] = {}
    state = txid = 0
    for pre, post in bucket.edges(NAME):
        if pre < txid:
            continue  # a merged one, of commits that are all there
        edge = read_segment(bucket.get(f"{NAME}-wal/{pre:016x}-{post:016x}"), lambda suffix: bucket.get(f"{NAME}-wal/{suffix}"))
        if (edge.pre, edge.post, pre, edge.pre_hash) != (pre, post, txid, state):
            raise AssertionError(f"{pre} -> {post} does not follow txid {txid}, state {state:016x}")
        if edge.reset:
            raise AssertionError(f"{pre} -> {post} is a reset: nobody asked for one")
        for pgno, page in edge.pages.items():
            hashes[pgno], before = page_hash(pgno, page), hashes.get(pgno, 0)
            state ^= before ^ hashes[pgno]
        for pgno in [pgno for pgno in hashes if pgno > edge.db_size]:
            state ^= hashes.pop(pgno)
        if state != edge.post_hash:
            raise AssertionError(f"{pre} -> {post} gives the state {state:016x}, not {edge.post_hash:016x}")
        txid = post
    return state, hashes


if __name__ == "__main__":
    sys.exit({"open": found, "write": write, "audit": audit}[sys.argv[1]](Job(**json.loads(sys.argv[2]))))
