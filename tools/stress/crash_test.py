#!/usr/bin/env python3
"""Kills writers with SIGKILL at random moments, over and over on one history, and accounts for every acknowledged commit.

Each round starts `--processes` writers of `--threads` threads on one database and kills one after the other, or all at once (some
by SIGTERM, and some of these by SIGKILL in the midst of their orderly close; some are stopped for a while before). Then the machine
suffers one of

    nothing      the database is opened in place
    index lost   ... without the local index
    power lost   ... with a WAL that is cut somewhere past what checkpoints have copied, and an index of which parts are older
    wiped        all local files are gone: it is booted from the bucket

and an auditor opens the database (it too is killed now and then, and begins again): every acknowledged commit is there, the books
balance (`bank.BOOKS`), `integrity_check` is ok, the state hash of the file's own bytes is the one that the head's segment tells. At
the end the whole log is replayed, and the page objects are laid side by side, by a reader that shares no code with the package: both
are the file. With ack=local a loss of the machine may cost a suffix of the commits, and nothing else anything.

`--rolling SECONDS`: the writers run for so long, one of them is killed and started again every few seconds, and none may stand still.

A failing run prints the seed that repeats its choices, and leaves its directory behind.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.stress import backends, bank
from tools.stress.powerloss import age_index, cut_wal

STALL_SECONDS = 20.0
"""No process of a rolling run may go so long without a commit."""


class Failed(Exception):
    """The promise was broken; or something else that must not be."""


class Run:
    """One history and what was promised of it."""

    def __init__(self, args: argparse.Namespace, directory: Path, store: backends.Backend, rng: random.Random) -> None:
        self.args = args
        self.directory = directory
        self.store = store
        self.rng = rng
        self.aged = directory / "aged"
        """A copy of the local index, of some moment of the round."""
        patience: dict[str, Any] = {"retry_timeout": 20}
        if args.faults:
            patience = {"retry_timeout": 2 if args.outages else 20, "read_timeout": 1, "connect_timeout": 1}
        options = {"endpoint": store.url, "bucket": "bank", "create_bucket": True, "ack": args.ack, "pages": args.pages, **patience}
        self.job = bank.Job(str(directory), options, store.server, threads=args.threads, vacuum=args.vacuum, outages=args.outages)
        self.promised: dict[str, int] = {}
        self.commits: list[float] = []
        self.begins: list[float] = []
        self.counts: Counter[str] = Counter(kills=0, rounds=0)
        self.lost = 0
        self.head: dict[str, Any] = {}
        self._files = 0
        self._stderr = (directory / "stderr").open("ab")

    # --- processes -----------------------------------------------------------------------------------------------------

    def start(self, what: str, job: bank.Job) -> subprocess.Popen[str]:
        """A process of the bank, which is about to open the database when this returns."""
        process = subprocess.Popen(
            job.argv(what), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, text=True, cwd=Path(__file__).parent
        )
        assert process.stdout is not None
        if what != "open" and process.stdout.readline() != "ready\n":
            raise Failed(f"{what} did not start: exit {process.wait()}, see {self.directory}/stderr")
        return process

    def writer(self) -> tuple[str, subprocess.Popen[str]]:
        """A new process of tellers, and its name."""
        self._files += 1
        who = f"w{self._files}"
        return who, self.start("write", replace(self.job, who=who, seed=self.rng.randrange(1 << 32)))

    def works(self, who: str) -> None:
        """Waits until the writer has had its first commit acknowledged, or does not get on."""
        end = time.monotonic() + STALL_SECONDS
        while time.monotonic() < end and not (self.directory / f"acks-{who}").stat().st_size:
            time.sleep(0.01)

    def found(self) -> None:
        if self.start("open", self.job).wait() != 0:
            raise Failed(f"the bank could not be founded, see {self.directory}/stderr")

    def end(self, process: subprocess.Popen[str]) -> None:
        """SIGKILL; or SIGTERM, and SIGKILL when it takes longer than somebody is willing to wait."""
        if process.poll() is not None:
            raise Failed(f"a writer ended by itself, exit {process.returncode}: {self.errors()}")
        orderly = self.rng.random() < self.args.orderly
        if orderly:
            process.send_signal(signal.SIGTERM)
            patience = self.rng.choice((self.rng.uniform(0, 0.2), 60.0))
            try:
                if process.wait(patience) != 0:
                    raise Failed(f"an orderly close ended with exit {process.returncode}: {self.errors()}")
                self.counts["orderly closes"] += 1
                return
            except subprocess.TimeoutExpired:
                if patience == 60:
                    process.send_signal(signal.SIGUSR1)
                    time.sleep(1)
                    raise Failed(f"an orderly close hangs; see {self.directory}/stacks") from None
        process.kill()
        process.wait()
        self.counts["kills"] += 1

    def errors(self) -> str:
        """What tellers had to complain of."""
        file = self.directory / "errors"
        return file.read_text()[:3000] if file.exists() else ""

    # --- what machines suffer ------------------------------------------------------------------------------------------

    def suffer(self) -> str:
        """Nobody runs: something happens to the local files."""
        path = Path(self.job.path)
        if self.rng.random() < self.args.wipe:
            for file in self.directory.glob(f"{bank.NAME}*"):
                file.unlink()
            return "wiped"
        what = self.rng.choices(("in place", "index lost", "power lost"), (6, 1, 3))[0]
        if what == "index lost":
            path.with_name(path.name + "-bottomless").unlink(missing_ok=True)
        elif what == "power lost":
            cut_wal(path, self.rng)
            if self.aged.exists() and self.rng.random() < 0.7:
                age_index(path, self.aged, self.rng)
        return what

    def remember_index(self) -> None:
        index = Path(self.job.path + "-bottomless")
        if index.exists():
            shutil.copyfile(index, self.aged)

    # --- the accounts --------------------------------------------------------------------------------------------------

    def audit(self, suffered: str) -> None:
        """Raises Failed unless everything that was promised is there."""
        job = replace(self.job, options={**self.job.options, "retry_timeout": 30})
        while self.rng.random() < self.args.interrupt:
            victim = self.start("audit", job)
            time.sleep(self.rng.uniform(0, 0.4))
            victim.kill()
            victim.communicate()
            self.store.settle()
            self.counts["audits killed"] += 1
        auditor = self.start("audit", job)
        out, _ = auditor.communicate()
        if auditor.returncode != 0:
            said = (self.directory / "stderr").read_text(errors="replace")
            raise Failed(f"the auditor failed (exit {auditor.returncode}): {said[-3000:]}")
        self.head = json.loads(out)
        if self.head["wrong"]:
            raise Failed("; ".join(self.head["wrong"]))
        tags: dict[str, int] = self.head["tags"]
        fresh = bank.acks(self.directory)
        lost = [ack for ack in fresh if tags.get(ack.tag) != ack.seq]
        forgotten = [tag for tag, seq in self.promised.items() if tags.get(tag) != seq]
        if forgotten:
            raise Failed(f"{len(forgotten)} commits of earlier rounds are gone: {forgotten[:5]}")
        if lost:
            if self.args.ack != "local" or suffered not in ("wiped", "power lost"):
                raise Failed(f"{len(lost)} acknowledged commits are lost: {lost[:5]}")
            if min(ack.seq for ack in lost) < max((ack.seq for ack in fresh if tags.get(ack.tag) == ack.seq), default=0):
                raise Failed(f"what is lost is no suffix: {sorted(lost, key=lambda ack: ack.seq)[:5]}")
        self.lost += len(lost)
        self.promised.update((ack.tag, ack.seq) for ack in set(fresh) - set(lost))
        self.commits += [ack.commit for ack in fresh]
        self.begins += [ack.begin for ack in fresh]
        for file in self.directory.glob("acks-*"):
            file.unlink()

    def replay(self) -> None:
        """The log, and the page objects, read from outside: both are the file, byte for byte."""
        state, hashes = bank.state_of(self.job.path)
        if bank.replay(self.job.bucket) != (state, hashes):
            raise Failed("the log, replayed, is not the file")
        if self.args.pages != "off" and self.job.bucket.view_image(bank.NAME) != Path(self.job.path).read_bytes():
            raise Failed("the page objects are not the file")

    def result(self) -> dict[str, Any]:
        return {
            **self.counts, "acknowledged": len(self.promised), "lost": self.lost, "torn": 0, "txid": self.head["txid"],
            "commit seconds": spread(self.commits), "write lock seconds": spread(self.begins),
        }  # fmt: skip


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, the 99th percentile, and the worst."""
    ranked = sorted(seconds) or [0.0]
    return {
        name: round(ranked[min(len(ranked) - 1, int(len(ranked) * share))], 4) for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1))
    }


# --- the two kinds of runs -------------------------------------------------------------------------------------------------


def crashes(run: Run) -> None:
    """Rounds of work, kills, loss and audit, until `--kills` writers were killed."""
    args, rng = run.args, run.rng
    while run.counts["kills"] < args.kills:
        run.counts["rounds"] += 1
        writers = [run.writer() for _ in range(args.processes)]
        away = threading.Thread(target=_outage, args=(run.store, rng.uniform(0, args.longest), rng.uniform(1, 5)))
        outage = args.outages and rng.random() < 0.4
        if outage:
            run.counts["outages"] += 1
            away.start()
        run.aged.unlink(missing_ok=True)
        together = rng.random() < 0.3
        for number, (who, writer) in enumerate(rng.sample(writers, len(writers))):
            if rng.random() < 0.5:
                run.remember_index()
            if number == 0 or not together:
                if rng.random() < 0.8:  # the others may die while they boot
                    run.works(who)
                time.sleep(rng.uniform(0, args.longest))
                if rng.random() < 0.15:
                    writer.send_signal(signal.SIGSTOP)  # with whatever lock it has; the others have to wait for it
                    time.sleep(rng.uniform(0, args.longest))
                    writer.send_signal(signal.SIGCONT)
            run.end(writer)
        if outage:
            away.join()
        if run.errors():
            raise Failed(run.errors())
        if not args.ghosts:
            run.store.settle()
        suffered = run.suffer()
        run.counts[suffered] += 1
        try:
            run.audit(suffered)
        except Failed as failure:
            raise Failed(f"round {run.counts['rounds']}, {suffered}: {failure}") from failure
        run.store.forget()
        if run.counts["rounds"] % 10 == 0:
            print(json.dumps(run.result()), file=sys.stderr, flush=True)


def _outage(store: backends.Backend, after: float, seconds: float) -> None:
    if store.outage is None:
        raise AssertionError("no outage without a proxy")
    time.sleep(after)
    store.outage.on = True
    time.sleep(seconds)
    store.outage.on = False


def rolling(run: Run, seconds: float) -> None:
    """All writers at work, one killed and started again every few seconds; whoever makes no progress is a failure."""
    args, rng = run.args, run.rng
    writers = dict(run.writer() for _ in range(args.processes))
    end = time.monotonic() + seconds
    seen: dict[str, tuple[int, float]] = {}
    worst = 0.0
    next_kill = time.monotonic() + rng.uniform(args.every / 4, args.every)
    while (now := time.monotonic()) < end:
        time.sleep(0.05)
        for who, writer in writers.items():
            if writer.poll() is not None:
                raise Failed(f"a writer ended by itself, exit {writer.returncode}: {run.errors()}")
            file = run.directory / f"acks-{who}"
            size = file.stat().st_size if file.exists() else 0
            before, since = seen.get(who, (-1, now))
            if size != before:
                seen[who] = (size, now)
            worst = max(worst, now - since)
            if now - since > STALL_SECONDS:
                for other in writers.values():
                    other.send_signal(signal.SIGUSR1)
                time.sleep(1)
                raise Failed(f"writer {who} has made no progress for {now - since:.0f} s; see {run.directory}/stacks")
        if now >= next_kill:
            next_kill = now + rng.uniform(args.every / 4, args.every)
            who = rng.choice(sorted(writers))
            run.end(writers.pop(who))
            seen.pop(who, None)
            writers.update([run.writer()])
    for writer in writers.values():
        writer.send_signal(signal.SIGTERM)
    for writer in writers.values():
        if writer.wait(120) != 0:
            raise Failed(f"an orderly close ended with exit {writer.returncode}: {run.errors()}")
    if run.errors():
        raise Failed(run.errors())
    run.audit("in place")
    run.counts["longest without a commit, ms"] = int(worst * 1000)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--rolling", type=float, default=None, metavar="SECONDS")
    parser.add_argument("--every", type=float, default=4.0, help="seconds between two kills of a rolling run, at most")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--ack", default="pages")
    parser.add_argument("--pages", default="commit")
    parser.add_argument("--server", default="directory", help="directory (default), moto or rclone, started here; or the URL of a store")
    parser.add_argument("--faults", action="store_true", help="a network that fails at random")
    parser.add_argument("--outages", action="store_true", help="and a store that is away for longer than the writers' patience")
    parser.add_argument(
        "--ghosts", action="store_true", help="and segments that arrive long after their writer gave them up; nothing is wiped"
    )
    parser.add_argument("--latency", type=float, default=0.0, help="seconds added to each request of a server")
    parser.add_argument("--wipe", type=float, default=0.35, help="share of the rounds that lose all local files")
    parser.add_argument("--interrupt", type=float, default=0.25, help="share of the audits that are killed, and begin again")
    parser.add_argument("--orderly", type=float, default=0.15, help="share of the writers that get a SIGTERM first")
    parser.add_argument("--vacuum", type=float, default=0.0003, help="VACUUMs per transaction")
    parser.add_argument("--longest", type=float, default=0.8, help="seconds between two kills of a round, at most")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--directory", type=Path, default=None, help="must not exist")
    args = parser.parse_args(argv)
    args.faults = args.faults or args.outages or args.ghosts
    args.wipe = 0.0 if args.ghosts else args.wipe
    if args.faults and args.server == "directory":
        parser.error("faults need a server")
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(1 << 32)
    rng = random.Random(seed)
    if args.directory is not None:
        args.directory.mkdir(parents=True)
    directory = args.directory or Path(tempfile.mkdtemp(prefix="crash-test-"))
    began = time.monotonic()
    network = random.Random(rng.randrange(1 << 32))
    with backends.backend(args.server, directory, network, faults=args.faults, ghosts=args.ghosts, latency=args.latency) as store:
        run = Run(args, directory, store, rng)
        try:
            run.found()
            if args.rolling is not None:
                rolling(run, args.rolling)
            else:
                crashes(run)
            run.replay()
        except Exception as failure:  # noqa: BLE001  (whatever it is: the directory stays, the seed is told)
            traceback.print_exc()
            print(f"FAILED after {run.counts['kills']} kills, seed {seed}, directory {directory}", file=sys.stderr)
            print(json.dumps({"failed": str(failure), "seed": seed, "directory": str(directory)}))
            return 1
    print(json.dumps({**run.result(), "seconds": round(time.monotonic() - began, 1), "seed": seed}))
    shutil.rmtree(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
