"""Crashes at random moments, many processes on one file, and servers that fork their workers: short runs of `tools/stress/crash_test.py`.

The long ones are for an evening: `tools/stress/crash_test.py --help`. And the accounts are tested themselves: they notice what they
are for.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import bottomless_wal
from bottomless_wal.replication import recovery
from tests.support.endpoints import Endpoint
from tools.stress import backends, bank, crash_test

TOOLS = Path(bank.__file__).parent


def crash_run(*arguments: str, directory: Path) -> dict[str, Any]:
    """What a run of the tool tells at its end."""
    command = [sys.executable, str(TOOLS / "crash_test.py"), "--directory", str(directory), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


# --- short runs ------------------------------------------------------------------------------------------------------------


def test_whoever_is_killed_whenever_and_whatever_the_machine_suffers_nothing_acknowledged_is_lost(tmp_path: Path) -> None:
    told = crash_run("--kills", "4", "--processes", "2", "--threads", "2", "--longest", "0.2", directory=tmp_path / "bank")
    assert told["kills"] >= 4
    assert told["acknowledged"] > 0
    assert (told["lost"], told["torn"]) == (0, 0)


def test_kills_meet_lost_answers(tmp_path: Path, moto_endpoint: Endpoint) -> None:
    arguments = ("--kills", "1", "--processes", "1", "--threads", "2", "--longest", "0.3", "--interrupt", "0", "--orderly", "0")
    told = crash_run("--server", moto_endpoint.url, "--faults", *arguments, directory=tmp_path / "bank")
    assert (told["kills"], told["lost"], told["torn"]) == (1, 0, 0)


def test_one_of_many_processes_is_killed_again_and_again_and_the_others_go_on(tmp_path: Path) -> None:
    arguments = ("--rolling", "1.2", "--every", "0.5", "--processes", "2", "--threads", "2", "--ack", "log", "--pages", "checkpoint")
    told = crash_run(*arguments, directory=tmp_path / "bank")
    assert told["kills"] + told.get("orderly closes", 0) >= 1
    assert told["acknowledged"] > 0
    assert told["lost"] == 0


# --- the accounts notice what they are for ---------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, own_environment: None) -> crash_test.Run:
    """A bank that was founded, with one transfer in its books, and nobody at work."""
    args = crash_test.arguments(["--interrupt", "0"])
    store = (tmp_path / "store").as_uri()
    run = crash_test.Run(args, tmp_path, backends.Backend(store, store), random.Random(1))
    bank.found(run.job)
    connection = run.job.connect()
    connection.execute("INSERT INTO transfer VALUES('w0.1', 0, 1, 5, 100)")
    connection.close()
    (tmp_path / "acks-w0").write_text("w0.1 1 0.0 0.1\n")
    return run


def test_a_segment_that_vanished_is_noticed_as_a_commit_that_was_lost(run: crash_test.Run) -> None:
    bucket = run.job.bucket
    head = bucket.head(bank.NAME)
    bucket.delete(f"{bank.NAME}-wal/{head - 1:016x}-{head:016x}")
    for file in run.directory.glob(f"{bank.NAME}*"):
        file.unlink()
    with pytest.raises(crash_test.Failed, match="1 acknowledged commits are lost"):
        run.audit("wiped")


def test_half_a_transaction_is_noticed(run: crash_test.Run) -> None:
    connection = run.job.connect()
    connection.execute("UPDATE account SET balance = balance + 1 WHERE id = 3")
    connection.close()
    with pytest.raises(crash_test.Failed, match="sum to zero"):
        run.audit("in place")


def test_a_sound_bank_passes_until_its_page_objects_or_its_log_tell_something_else(run: crash_test.Run) -> None:
    run.audit("in place")
    run.replay()
    assert run.promised == {"w0.1": 1}
    bucket = run.job.bucket
    bucket.put(f"{bank.NAME}-{2:012d}", bucket.get(f"{bank.NAME}-{3:012d}"))
    with pytest.raises(AssertionError):
        run.replay()
    path = run.job.path
    with open(path, "r+b") as file:
        file.seek(5000)
        file.write(b"another byte")
    with pytest.raises(crash_test.Failed, match="the log, replayed"):
        run.replay()


# --- what long runs have found ---------------------------------------------------------------------------------------------

FIRST_OF_A_NEW_WAL = """
import json, os, signal, sys, apsw, bottomless_wal
from bottomless_wal.core import failpoints
con = bottomless_wal.connect(sys.argv[1], **json.loads(sys.argv[2]))
con.execute("CREATE TABLE t(x)")
con.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_RESTART)
failpoints.arm("before put", lambda: os.kill(os.getpid(), signal.SIGKILL))
con.execute("INSERT INTO t VALUES('pending')")
"""


def test_a_commit_that_is_pending_in_a_new_wal_is_sent_though_the_local_index_is_lost(tmp_path: Path, own_environment: None) -> None:
    """A power loss can take the index, or leave an older one: it is written without a sync. An ordinary restart never asks."""
    path = tmp_path / "app.db"
    options = {"endpoint": (tmp_path / "store").as_uri(), "create_bucket": True}
    killed = subprocess.run([sys.executable, "-c", FIRST_OF_A_NEW_WAL, str(path), json.dumps(options)], timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    Path(f"{path}-bottomless").unlink()
    connection = bottomless_wal.connect(path, **options)
    assert connection.execute("SELECT x FROM t").get == "pending"
    bottomless_wal.flush(connection)
    connection.close()
    (tmp_path / "elsewhere").mkdir()
    connection = bottomless_wal.connect(tmp_path / "elsewhere" / "app.db", **options)
    assert connection.execute("SELECT x FROM t").get == "pending"
    connection.close()


NEIGHBOUR = """
import json, sys, apsw, bottomless_wal
con = bottomless_wal.connect(sys.argv[1], **json.loads(sys.argv[2]))
con.execute("CREATE TABLE t(x)")
bottomless_wal.flush(con)
con.execute("INSERT INTO t VALUES('pending')")
con.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
print("ready", flush=True)
sys.stdin.readline()
con.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_RESTART)
con.execute("INSERT INTO t VALUES('in the next WAL')")
print("restarted", flush=True)
sys.stdin.readline()
con.close()
"""


def test_a_wal_that_a_neighbour_restarts_while_the_file_is_looked_at_is_no_conflict(
    tmp_path: Path, own_environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "app.db"
    options = {"endpoint": (tmp_path / "store").as_uri(), "create_bucket": True, "ack": "local", "interval": 60.0}
    command = [sys.executable, "-c", NEIGHBOUR, str(path), json.dumps(options)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as neighbour:
        assert neighbour.stdin is not None
        assert neighbour.stdout is not None
        assert neighbour.stdout.readline() == "ready\n"
        classify, looks = recovery.classify, []

        def late(*arguments: Any, **more: Any) -> Any:
            if not looks:
                print(file=neighbour.stdin, flush=True)
                assert neighbour.stdout is not None
                assert neighbour.stdout.readline() == "restarted\n"
            looks.append(arguments)
            return classify(*arguments, **more)

        monkeypatch.setattr(recovery, "classify", late)
        connection = bottomless_wal.connect(path, **options)
        assert looks, "the window was not reached"
        print(file=neighbour.stdin, flush=True)
        assert neighbour.wait(60) == 0
    assert connection.execute("SELECT group_concat(x) FROM t").get == "pending,in the next WAL"
    connection.close()


# --- servers that fork their workers ---------------------------------------------------------------------------------------

# argv: path, options, workers. As gunicorn does it: bind, fork; each worker opens the database after the fork and serves from two
# threads; a worker that dies is replaced; SIGTERM is passed on. Every other worker leaves its connections to the exit.
ARBITER = """
import contextlib, faulthandler, json, os, signal, socket, sys, threading
import bottomless_wal

path, options, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
listener = socket.create_server(("127.0.0.1", 0))
listener.settimeout(0.05)
stop, leaving, workers, kept, born = threading.Event(), threading.Event(), [], [], 0

def serve():
    con = bottomless_wal.connect(path, **options)
    con.set_busy_timeout(60000)
    kept.append(con)
    while not stop.is_set():
        with contextlib.suppress(OSError):
            client, _ = listener.accept()
            client.settimeout(30)
            with client, client.makefile("rw") as talk:
                con.execute("INSERT INTO t VALUES(?)", (talk.readline().strip(),))
                talk.write("stored\\n")
                talk.flush()

def work(number):
    threads = [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    os.write(1, f"worker {os.getpid()}\\n".encode())  # in one piece
    for thread in threads:
        thread.join()
    if number % 2:
        for con in kept:
            con.close()
    sys.exit(0)

def close_down(*_):
    faulthandler.dump_traceback_later(50)
    stop.set()

def leave(*_):
    leaving.set()
    for pid in workers:
        os.kill(pid, signal.SIGTERM)

signal.signal(signal.SIGTERM, leave)
print("port", listener.getsockname()[1], flush=True)
codes = []
while not leaving.is_set() or workers:
    while len(workers) < count and not leaving.is_set():
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        born += 1
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGTERM, close_down)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
            work(born)
        workers.append(pid)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    pid, status = os.wait()
    workers.remove(pid)
    codes.append(os.waitstatus_to_exitcode(status))
print("codes", *codes, flush=True)
"""


@dataclass
class Server:
    """The arbiter, as its clients and its administrator see it."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    stored: list[str] = field(default_factory=list)
    leaving: bool = False

    def __post_init__(self) -> None:
        self._threads = [threading.Thread(target=self._listen), *(threading.Thread(target=self._ask, args=(n,)) for n in range(3))]
        for thread in self._threads:
            thread.start()

    def workers(self) -> list[int]:
        return self._said("worker")

    def _said(self, what: str) -> list[int]:
        return [int(word) for line in list(self.lines) if line.startswith(what) for word in line.split()[1:]]

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    def _ask(self, client: int) -> None:
        number = 0
        while not self.leaving:
            number += 1
            try:
                with socket.create_connection(("127.0.0.1", self._said("port")[0]), timeout=60) as connection:
                    connection.sendall(f"{client}.{number}\n".encode())
                    if connection.recv(100) == b"stored\n":
                        self.stored.append(f"{client}.{number}")
            except (OSError, IndexError):
                time.sleep(0.01)

    def serves(self, count: int) -> None:
        """Waits until `count` more were acknowledged."""
        goal = len(self.stored) + count
        until(lambda: len(self.stored) >= goal or self.process.poll() is not None)
        assert self.process.poll() is None

    def end(self) -> list[int]:
        """An orderly end; the exit codes of all workers there have been."""
        self.leaving = True
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(60) == 0
        for thread in self._threads:
            thread.join(60)
        return self._said("codes")


def test_workers_that_are_forked_before_they_open_may_die_and_be_replaced(tmp_path: Path, own_environment: None) -> None:
    """With ack=local the orderly ones have something to send when they leave."""
    path = tmp_path / "app.db"
    options = {"endpoint": (tmp_path / "store").as_uri(), "create_bucket": True, "ack": "local"}
    connection = bottomless_wal.connect(path, **options)
    connection.execute("CREATE TABLE t(token UNIQUE)")
    connection.close()
    command = [sys.executable, "-c", ARBITER, str(path), json.dumps(options), "3"]
    server = Server(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    try:
        for kill in range(2):
            server.serves(10)
            until(lambda born=kill + 3: len(server.workers()) >= born)
            os.kill(server.workers()[kill], signal.SIGKILL)
        server.serves(10)
        until(lambda: len(server.workers()) == 5)
        codes = server.end()
    finally:
        server.leaving = True
        server.process.kill()
        server.process.wait()
    assert sorted(codes) == [-signal.SIGKILL] * 2 + [0] * 3
    (tmp_path / "elsewhere").mkdir()
    connection = bottomless_wal.connect(tmp_path / "elsewhere" / "app.db", **options)
    there = {token for (token,) in connection.execute("SELECT token FROM t")}
    assert connection.execute("PRAGMA integrity_check").get == "ok"
    connection.close()
    assert set(server.stored) <= there, "acknowledged, and not stored"


PRELOADED = """
import faulthandler, json, os, signal, sys, threading, bottomless_wal
path, options = sys.argv[1], json.loads(sys.argv[2])
con = bottomless_wal.connect(path, **options)
con.execute("CREATE TABLE t(x)")
done, count = threading.Event(), 0
def commit():
    global count
    mine = bottomless_wal.connect(path, **options)
    while not done.is_set():
        mine.execute("INSERT INTO t VALUES(1)")
        count += 1
    mine.close()
busy = threading.Thread(target=commit)
busy.start()
codes = []
for n in range(4):
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        faulthandler.dump_traceback_later(20)
        code = 1
        try:
            bottomless_wal.connect(path, **options)
        except bottomless_wal.ConfigError as error:
            code = 7 if "after the fork" in error.hint and "post_fork" in error.hint else 2
        if n % 2:
            sys.exit(code)
        os._exit(code)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
done.set()
busy.join()
print(json.dumps([codes, count, con.execute("SELECT count(*) FROM t").get]))
con.close()
"""


def test_workers_of_a_preloaded_application_are_refused_and_the_busy_parent_goes_on(tmp_path: Path, own_environment: None) -> None:
    path = tmp_path / "app.db"
    options = {"endpoint": (tmp_path / "store").as_uri(), "create_bucket": True}
    command = [sys.executable, "-c", PRELOADED, str(path), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    codes, count, there = json.loads(done.stdout)
    assert codes == [7] * 4, done.stderr
    assert count == there > 0
    (tmp_path / "elsewhere").mkdir()
    connection = bottomless_wal.connect(tmp_path / "elsewhere" / "app.db", **options)
    assert connection.execute("SELECT count(*) FROM t").get == count
    connection.close()
