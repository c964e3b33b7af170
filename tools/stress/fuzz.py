#!/usr/bin/env python3
"""Damages what is stored, and what lies beside it, in random ways, and looks at what the package then makes of it.

A *bench* is one history (commits, a large one with a body, a shrinking one, a reset), a second database in the same bucket, and copies of
the local files at several moments. Each *round* takes a fresh copy, damages objects or local files, and does one thing with them. Then:

* what was opened or restored without an error is a state of the history, by its hash, or the local file's own content;
* every error is a BottomlessError, or SQLite's own where the local database was damaged; nothing crashes, hangs, or eats memory;
* a commit that was acknowledged over an undamaged bucket can be restored, whatever was done to the local index.

The choices of one seed are always the same (the content of the database is not). Run as a program it works in child processes with a
bounded address space, and prints one line of JSON; a failing round names its seed, which `--round` repeats.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import hashlib
import json
import logging
import random
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import apsw

import bottomless_wal
from bottomless_wal import admin
from bottomless_wal.core.errors import BottomlessError
from bottomless_wal.formats import keys
from bottomless_wal.history import log
from bottomless_wal.replication.index import ENTRY_SIZE, HEADER_SIZE
from tools.stress.damage import absurd_index, damage, hostile_page, hostile_segment, strange_keys

BUCKET = "objects"
FILES = ("", "-wal", "-bottomless")
SQLITES_OWN = (apsw.CorruptError, apsw.NotADBError, apsw.CantOpenError, apsw.IOError, apsw.SQLError)  # of a file that was damaged


def state_of(image: bytes) -> int:
    """The state hash of a database file, by the words of docs/internals/formats.md alone."""
    if not image:
        return 0
    size = int.from_bytes(image[16:18], "big")
    size = 65536 if size == 1 else size
    state = 0
    for number, start in enumerate(range(0, len(image), size), 1):
        state ^= int.from_bytes(hashlib.sha256(struct.pack(">I", number) + image[start : start + size]).digest()[:8], "big")
    return state


class Bench:
    """A history and what belongs to it, made once below `root`; `round` uses copies."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.states: dict[int, int] = {0: 0}
        self.images: dict[int, bytes] = {0: b""}
        self.stages: dict[str, dict[str, bytes]] = {"none": {}}
        self._made = 0
        self._make()

    def options(self, where: Path) -> dict[str, object]:
        return {"endpoint": where.as_uri(), "bucket": BUCKET, "create_bucket": True, "retry_timeout": 1.0}

    # --- the history -------------------------------------------------------------------------------------------------

    def _make(self) -> None:
        home = self.root / "template"
        home.mkdir(parents=True)
        path = home / "app.db"
        options = self.options(home)
        other = bottomless_wal.connect(home / "app.db2", page_size=1024, **options)
        other.execute("CREATE TABLE t(x); INSERT INTO t VALUES(randomblob(5000))")
        other.close()
        con = bottomless_wal.connect(path, page_size=1024, **options)
        inline, log._INLINE_BYTES = log._INLINE_BYTES, 30_000
        try:
            for number in range(1, 12):
                if number == 1:
                    con.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, x)")
                elif number == 5:  # the pages of this one are in a body
                    with con:
                        con.executemany("INSERT INTO t VALUES(?, randomblob(900))", [(row,) for row in range(101, 141)])
                elif number == 8:
                    con.execute("DELETE FROM t WHERE id > 105")
                elif number == 9:
                    con.execute("VACUUM")
                else:
                    con.execute("INSERT INTO t(x) VALUES(randomblob(?))", (300 * number,))
                self._remember(con)
                if number in (3, 7):
                    self._keep(f"open at {number}", path)
                if number == 6:
                    con.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
            con.close()
        finally:
            log._INLINE_BYTES = inline
        self._keep("closed at 11", path)
        admin.reset_from_local(path, **options)
        self._keep("reset", path)
        con = bottomless_wal.connect(path, **options)
        con.execute("INSERT INTO t(x) VALUES('after the reset')")
        self._remember(con)
        self._keep("open at the head", path)
        con.close()
        self._keep("closed at the head", path)
        plain = apsw.Connection(str(path))
        plain.execute("INSERT INTO t(x) VALUES('nobody saw this')")
        self.states.setdefault(state_of(plain.serialize("main")), -1)
        plain.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        plain.close()
        self._keep("ahead", path)
        for end in (*FILES, "-shm"):
            (home / f"app.db{end}").unlink(missing_ok=True)

    def _remember(self, con: apsw.Connection) -> None:
        image = con.serialize("main")
        txid = bottomless_wal.status(con).txid
        self.states[state_of(image)], self.images[txid] = txid, image

    def _keep(self, name: str, path: Path) -> None:
        found = {end: Path(f"{path}{end}") for end in FILES}
        self.stages[name] = {end: file.read_bytes() for end, file in found.items() if file.exists()}

    # --- one round ---------------------------------------------------------------------------------------------------

    def round(self, seed: int) -> str:
        """One damage, one deed; what was done and what came of it. AssertionError when something is not as it has to be."""
        rng = random.Random(seed)
        home = self.root / f"round-{self._made}"
        self._made += 1
        shutil.copytree(self.root / "template", home)
        try:
            deed = rng.choice(DEEDS)
            stage = rng.choice(sorted(self.stages))
            kinds = ("objects", "objects", "local", "index", "keys") if self.stages[stage] else ("objects", "keys")
            damaged = rng.choice(kinds)
            files = dict(self.stages[stage])
            if damaged in ("local", "index"):
                self._damage_local(rng, files, only_index=damaged == "index")
            else:
                bucket = home / BUCKET
                if damaged == "objects":
                    self._damage_objects(rng, bucket)
                else:
                    strange_keys(rng, bucket)
            for end, data in files.items():
                (home / f"app.db{end}").write_bytes(data)
            told = f"seed {seed}: {damaged} damaged, {stage}, {deed.__name__}"
            try:
                outcome = self._do(deed, rng, home, damaged, files)
            except AssertionError as error:
                raise AssertionError(f"{told}: {error}") from error
            return f"{deed.__name__}: {outcome}"
        finally:
            shutil.rmtree(home)

    def _do(self, deed: Deed, rng: random.Random, home: Path, damaged: str, files: dict[str, bytes]) -> str:
        own = self.own(home, files)
        try:
            return deed(self, rng, home, damaged, own)
        except BottomlessError as error:
            return type(error).__name__
        except SQLITES_OWN as error:
            if damaged != "local":
                raise
            return f"SQLite's {type(error).__name__}"
        finally:
            for connection in apsw.connections():
                connection.close()

    def own(self, home: Path, files: dict[str, bytes]) -> int | None:
        """The state that plain SQLite sees in the local files; None when it sees none."""
        with tempfile.TemporaryDirectory(dir=home) as directory:
            for end in ("", "-wal"):
                if end in files:
                    Path(directory, f"x{end}").write_bytes(files[end])
            try:
                con = apsw.Connection(f"{directory}/x", flags=apsw.SQLITE_OPEN_READWRITE)
                try:
                    con.execute("SELECT count(*) FROM sqlite_schema").fetchall()
                    return state_of(con.serialize("main"))
                finally:
                    con.close()
            except apsw.Error:
                return None

    # --- damage ------------------------------------------------------------------------------------------------------

    def _damage_local(self, rng: random.Random, files: dict[str, bytes], *, only_index: bool) -> None:
        for _ in range(rng.choice((1, 1, 2))):
            end = "-bottomless" if only_index else rng.choice(sorted(files))
            data = files.get(end, b"")
            olds = [stage[end] for stage in self.stages.values() if end in stage]
            if end == "-bottomless" and rng.random() < 0.4 and (absurd := absurd_index(rng, data)) is not None:
                files[end] = absurd
            elif rng.random() < 0.2 and olds:
                files[end] = rng.choice(olds)
            elif rng.random() < 0.1:
                files.pop(end, None)
            else:
                files[end] = damage(rng, data, olds)

    def _damage_objects(self, rng: random.Random, bucket: Path) -> None:
        objects = sorted(path for path in bucket.rglob("*") if path.is_file() and ".tmp" not in path.parts)
        mine = [path for path in objects if str(path.relative_to(bucket)).startswith(("app.db-wal/", "app.db-0"))]
        log = [path for path in mine if path.parent != bucket]
        if rng.random() < 0.15:  # only the page view is left
            shutil.rmtree(bucket / "app.db-wal")
            mine = [path for path in mine if path not in log]
            if rng.random() < 0.3:
                return
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            path = rng.choice([one for one in (log if rng.random() < 0.7 else mine) if one.exists()] or [bucket / "app.db-000000000001"])
            data = path.read_bytes() if path.exists() else b""
            others = [one.read_bytes() for one in rng.sample(objects, min(3, len(objects))) if one.exists()]
            what = rng.random()
            if what < 0.3:
                data = hostile_segment(rng, data) if path.parent != bucket else hostile_page(rng, data, path.name)
            elif what < 0.4:
                path.unlink(missing_ok=True)
                continue
            elif what < 0.5 and others:
                data = rng.choice(others)
            else:
                data = damage(rng, data, others)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)


# --- deeds -----------------------------------------------------------------------------------------------------------------

Deed = Callable[[Bench, random.Random, Path, str, "int | None"], str]


def restore(bench: Bench, rng: random.Random, home: Path, damaged: str, own: int | None) -> str:
    txid = rng.choice((None, rng.choice(sorted(bench.images)[1:])))
    done = bottomless_wal.restore(home / "app.db", output=home / "copy.db", txid=txid, **bench.options(home))
    state = state_of((home / "copy.db").read_bytes())
    assert state == done.state_hash, "what was restored is not what was said"
    assert state in bench.states, "what was restored is no state of the history"
    if txid is not None and damaged in ("local", "index"):
        assert (home / "copy.db").read_bytes() == bench.images[txid], "another state than the one that was asked for"
    return "restored"


def verify(bench: Bench, rng: random.Random, home: Path, damaged: str, own: int | None) -> str:
    more = {} if damaged == "local" or not (home / "app.db").exists() else {"local": home / "app.db"}
    report = bottomless_wal.verify(home / "app.db", deep=rng.random() < 0.7, repair_view=rng.random() < 0.3, **more, **bench.options(home))
    restored = None
    with contextlib.suppress(BottomlessError):
        restored = bottomless_wal.restore(home / "app.db", output=home / "copy.db", **bench.options(home)).state_hash
    if report.ok:
        assert restored == report.state_hash, "verify finds everything sound, and it cannot be restored"
        assert restored in bench.states
    elif damaged in ("local", "index"):
        assert all(problem.kind == "local" for problem in report.problems), report.problems
    return "sound" if report.ok else "not sound"


def look(bench: Bench, rng: random.Random, home: Path, damaged: str, own: int | None) -> str:
    for row in admin.listing(None, **bench.options(home)):
        assert keys.split_name(row.name) == (row.database_id, row.file)
    seen = admin.inspect(home / "app.db", **bench.options(home))
    if seen.in_step and seen.head is not None and damaged not in ("objects", "keys"):
        assert own is None or own == seen.head.state, "in step with another state"
    return "looked"


def boot(bench: Bench, rng: random.Random, home: Path, damaged: str, own: int | None) -> str:
    policy = rng.choice(("error", "error", "force", "skip"))
    con = bottomless_wal.connect(home / "app.db", initial_replication=policy, **bench.options(home))
    try:
        state = state_of(con.serialize("main"))
        assert state in bench.states or state == own, "what was opened is neither a state of the history nor the local file's own"
        if rng.random() < 0.7:
            commit(bench, rng, con, home, damaged)
    finally:
        con.close()
    return "opened"


def commit(bench: Bench, rng: random.Random, con: apsw.Connection, home: Path, damaged: str) -> None:
    if damaged == "index" and rng.random() < 0.7:
        # Damaged while it is in use, in place: as by a disk, or a program that writes over it.
        entry = HEADER_SIZE + ENTRY_SIZE * rng.randrange(12)
        with open(home / "app.db-bottomless", "r+b") as file:
            way = rng.random()
            if way < 0.3:
                file.truncate(rng.choice((0, 100, HEADER_SIZE, entry)))
            elif way < 0.6:
                file.seek(rng.choice((0, 60, HEADER_SIZE, entry)))
                file.write(bytes(ENTRY_SIZE * rng.choice((1, 2, 32))))
            else:
                file.seek(entry + rng.randrange(ENTRY_SIZE))
                file.write(rng.randbytes(rng.choice((1, 4, 16, 100))))
    con.execute("CREATE TABLE IF NOT EXISTS u(x); INSERT INTO u VALUES(randomblob(3000))")
    if rng.random() < 0.5:
        con.execute("DELETE FROM u; CREATE TABLE IF NOT EXISTS v(x); INSERT INTO v VALUES(1)")
    if damaged in ("local", "index"):
        state = state_of(con.serialize("main"))
        try:
            bottomless_wal.restore(home / "app.db", output=home / "acknowledged.db", **bench.options(home))
        except BottomlessError as error:
            raise AssertionError(f"an acknowledged commit cannot be restored: {error.message}") from error
        # As SQLite sees it: of a file that is longer than its header says, the pages beyond are stored as well.
        again = bench.own(home, {"": (home / "acknowledged.db").read_bytes()})
        assert again == state, "an acknowledged commit is not what comes back"


DEEDS: list[Deed] = [restore, verify, look, boot, boot, boot]


# --- the program -----------------------------------------------------------------------------------------------------------


def _child(args: argparse.Namespace) -> None:
    """Rounds from `--round` on, one line of JSON each, until it is stopped."""
    faulthandler.enable()
    logging.getLogger("bottomless_wal").setLevel(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (args.megabytes << 20, args.megabytes << 20))
    with tempfile.TemporaryDirectory(prefix="bottomless-fuzz-") as directory:
        bench = Bench(Path(directory))
        end = time.monotonic() + args.seconds
        seed = args.round
        while time.monotonic() < end and seed < args.round + args.most:
            faulthandler.dump_traceback_later(args.patience, exit=True)
            began = time.monotonic()
            try:
                line = {"seed": seed, "outcome": bench.round(seed)}
            except AssertionError as error:
                line = {"seed": seed, "failed": str(error)}
            except Exception as error:  # noqa: BLE001  (whatever it is, it is a finding)
                line = {"seed": seed, "failed": f"seed {seed}: {type(error).__name__}: {error}"}
                faulthandler.cancel_dump_traceback_later()
                sys.excepthook(type(error), error, error.__traceback__)
            faulthandler.cancel_dump_traceback_later()
            print(json.dumps({**line, "seconds": time.monotonic() - began}), flush=True)
            seed += 1
        print(json.dumps({"peak_kb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}), flush=True)


def _rounds(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """What the children say; one that dies is a finding, and another goes on."""
    end, seed = time.monotonic() + args.seconds, args.seed
    while (left := end - time.monotonic()) > 0:
        command = [sys.executable, __file__, "--child", f"--round={seed}", f"--seconds={left}", f"--megabytes={args.megabytes}"]
        command += [f"--patience={args.patience}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            for text in child.stdout or ():
                line = json.loads(text)
                seed = int(line.get("seed", seed - 1)) + 1
                yield line
        if child.returncode:
            yield {"seed": seed, "failed": f"seed {seed}: the process ended with {child.returncode}"}
            seed += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1, help="of the first round")
    parser.add_argument("--round", type=int, help="only this one")
    parser.add_argument("--megabytes", type=int, default=2048, help="address space of the child")
    parser.add_argument("--patience", type=float, default=60, help="seconds that one round may take")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.most = 1 << 62 if args.child else 1
    if args.child or args.round is not None:
        _child(args)
        return
    began = time.monotonic()
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    rounds, slowest, peak = 0, 0.0, 0
    for line in _rounds(args):
        peak = max(peak, int(str(line.get("peak_kb", 0))))
        if "seed" not in line:
            continue
        rounds += 1
        slowest = max(slowest, float(str(line.get("seconds", 0))))
        if "failed" in line:
            failures.append(str(line["failed"]))
            print(line["failed"], file=sys.stderr)
        else:
            outcomes[str(line["outcome"])] += 1
    figures = {"rounds": rounds, "seconds": round(time.monotonic() - began, 1), "slowest_round": round(slowest, 2)}
    more = {"peak_mb": peak // 1024, "first_seed": args.seed, "failures": failures, "outcomes": dict(sorted(outcomes.items()))}
    print(json.dumps({**figures, **more}))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
