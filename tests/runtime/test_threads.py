"""Many threads, many connections, several processes on one file: all are covered, and company makes fewer segments than commits."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import apsw
import pytest

import bottomless_wal
from bottomless_wal.runtime.registry import registry
from tests.support.cluster import Machine, World, refusal, rows, spawn, until


def _together(count: int, work: Callable[[int], None]) -> None:
    """Runs `work(0..count-1)` in threads, and raises the first error of any."""
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@contextlib.contextmanager
def _another(machine: Machine, **options: Any) -> Iterator[apsw.Connection]:
    """A connection of a thread's own, patient, closed at the end."""
    con = machine.connect(**options)
    con.set_busy_timeout(30000)
    try:
        yield con
    finally:
        con.close()


def _made(world: World, **options: Any) -> tuple[Machine, apsw.Connection]:
    here = world.machine()
    con = here.connect(**options)
    con.execute("CREATE TABLE t(thread, n)")
    bottomless_wal.flush(con)
    return here, con


@pytest.mark.parametrize("ack", ["pages", "log", "local"])
def test_threads_with_a_connection_each(world: World, ack: str) -> None:
    here, con = _made(world, ack=ack)

    def work(number: int) -> None:
        with _another(here, ack=ack) as mine:
            for n in range(20):
                mine.execute("INSERT INTO t VALUES (?, ?)", (number, n))

    _together(8, work)
    assert rows(con) == 160
    bottomless_wal.flush(con)
    world.stored(con)
    con.close()
    world.comes_back(here)


def test_patience_with_the_write_lock_is_not_used_up_by_others(world: World) -> None:
    """SQLite counts how often it has slept: commits to another database, which wake who waits, must not count."""
    here, holder = _made(world, ack="local")
    other = here.connect("other.db", ack="local")
    other.execute("CREATE TABLE t(thread, n)")
    over = threading.Event()

    def noise() -> None:
        with contextlib.closing(here.connect("other.db", ack="local")) as mine:
            while not over.is_set():
                mine.execute("INSERT INTO t VALUES (0, 0)")

    with contextlib.closing(here.connect(ack="local")) as waiter:
        waiter.set_busy_timeout(2000)
        holder.execute("BEGIN IMMEDIATE; INSERT INTO t VALUES (1, 1)")
        thread = threading.Thread(target=noise)
        thread.start()
        letting_go = threading.Timer(1.0, lambda: holder.execute("COMMIT"))
        letting_go.start()
        try:
            waiter.execute("INSERT INTO t VALUES (2, 2)")
        finally:
            over.set()
            thread.join()
            letting_go.join()
    assert rows(holder) == 2


def test_each_row_is_stored_when_its_own_commit_returns(world: World) -> None:
    here, con = _made(world, ack="log")
    del con

    def work(number: int) -> None:
        with _another(here, ack="log") as mine:
            for n in range(8):
                mark = f"mark {number} {n} {os.urandom(4).hex()}"
                mine.execute("INSERT INTO t VALUES (?, ?)", (number, mark))
                assert mark.encode() in world.bucket.log_image("app.db")

    _together(4, work)


def test_group_commit_makes_fewer_segments_than_commits(world: World) -> None:
    here, con = _made(world)
    store = refusal(con)
    store.rules.append(lambda kind, key: time.sleep(0.02) if kind == "create" else None)
    before = world.bucket.head("app.db")

    def work(number: int) -> None:
        with _another(here) as mine:
            for n in range(10):
                mine.execute("INSERT INTO t VALUES (?, ?)", (number, n))

    began = time.monotonic()
    _together(8, work)
    took = time.monotonic() - began
    segments = world.bucket.head("app.db") - before
    assert segments < 45, "80 commits of 8 threads"
    assert took < 80 * 0.02, "which is what one at a time would take at least"
    positions = sum(len(world.bucket.segment("app.db", pre, post).positions) for pre, post in world.bucket.edges("app.db")[before:])
    assert positions == 80, "each local commit is listed"
    world.stored(con)


def test_one_connection_used_by_many_threads_in_turn(world: World) -> None:
    here, con = _made(world)
    lock = threading.Lock()

    def work(number: int) -> None:
        for n in range(10):
            with lock:
                con.execute("INSERT INTO t VALUES (?, ?)", (number, n))

    _together(4, work)
    world.stored(con)
    con.close()
    world.comes_back(here)


def test_threads_commit_while_others_checkpoint_and_vacuum(world: World) -> None:
    here, con = _made(world)
    stop = threading.Event()

    def checkpoints() -> None:
        kinds = [
            apsw.SQLITE_CHECKPOINT_PASSIVE,
            apsw.SQLITE_CHECKPOINT_FULL,
            apsw.SQLITE_CHECKPOINT_RESTART,
            apsw.SQLITE_CHECKPOINT_TRUNCATE,
        ]
        with contextlib.closing(here.connect()) as mine:
            for count in itertools.count():
                if stop.is_set():
                    return
                with contextlib.suppress(apsw.BusyError, apsw.LockedError):
                    mine.wal_checkpoint(mode=kinds[count % 4])
                    if count % 10 == 9:
                        mine.execute("VACUUM")

    other = threading.Thread(target=checkpoints)
    other.start()

    def work(number: int) -> None:
        with _another(here) as mine:
            for n in range(25):
                mine.execute("INSERT INTO t VALUES (?, randomblob(5000))", (number,))
                if n % 10 == 9:
                    mine.execute("DELETE FROM t WHERE thread = ? AND rowid % 2", (number,))

    try:
        _together(3, work)
    finally:
        stop.set()
        other.join()
    bottomless_wal.flush(con)
    world.stored(con)
    con.close()
    world.comes_back(here)


def test_two_databases_do_not_hold_each_other_up(world: World) -> None:
    here, con = _made(world)
    other = here.connect("other.db")
    other.execute("CREATE TABLE t(x)")
    gate = threading.Event()
    refusal(con).hold(gate)
    thread = threading.Thread(target=lambda: con.execute("INSERT INTO t VALUES (1, 1)"))
    thread.start()
    try:
        other.execute("INSERT INTO t VALUES (1)")
        world.stored(other, "other.db")
    finally:
        gate.set()
        thread.join()


PROCESS = """
import threading
con = connect(argv[0])
con.set_busy_timeout(60000)
def work(number):
    mine = connect(argv[0])
    mine.set_busy_timeout(60000)
    for n in range(int(argv[2])):
        mine.execute("INSERT INTO t VALUES (?, ?)", (f"{argv[1]}.{number}", n))
        os.write(1, f"{argv[1]}.{number} {n}\\n".encode())  # in one piece
    mine.close()
threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
[t.start() for t in threads]; [t.join() for t in threads]
con.close()
"""


@pytest.mark.parametrize("ack", ["pages", "log", "local"])
def test_several_processes_on_one_file(two_worlds: World, ack: str) -> None:
    here, con = _made(two_worlds, ack=ack)
    if ack == "log":
        con.close()  # the processes come and go by themselves
    processes = [spawn(PROCESS, here.path(), str(n), "8", options={**two_worlds.options, "ack": ack}) for n in range(2)]
    for process in processes:
        out, err = process.communicate(timeout=90)
        assert process.returncode == 0, err
        assert len(out.splitlines()) == 24
    if ack == "log":
        con = here.connect(ack=ack)
    assert rows(con) == 48
    bottomless_wal.flush(con)
    two_worlds.stored(con)
    con.close()
    two_worlds.comes_back(here)


def test_a_process_that_is_killed_leaves_no_lock_behind(world: World) -> None:
    here, con = _made(world)
    process = spawn(PROCESS, here.path(), "0", "100000", options=world.options)
    assert process.stdout is not None
    acknowledged = [process.stdout.readline() for _ in range(10)]
    process.kill()
    acknowledged += process.communicate()[0].splitlines()[:-1]  # the last may be cut
    con.set_busy_timeout(30000)
    con.execute("INSERT INTO t VALUES ('survivor', 1)")
    bottomless_wal.flush(con)
    world.stored(con)
    # What it was told is stored; and at most one commit of each of its threads that it was not.
    done = {f"{thread} {n}" for thread, n in con.execute("SELECT thread, n FROM t")}
    assert {line.strip() for line in acknowledged if line.strip()} <= done
    con.close()
    world.comes_back(here)


def test_the_wal_does_not_grow_without_end_while_commits_never_pause(world: World) -> None:
    here, con = _made(world, pages="off")
    stop = threading.Event()
    sizes: list[int] = []

    def work(number: int) -> None:
        with _another(here, pages="off") as mine:
            while not stop.is_set():
                mine.execute("INSERT INTO t VALUES (?, randomblob(40000))", (number,))

    def watch() -> None:
        end = time.monotonic() + 30
        while time.monotonic() < end and rows(con) < 2500:  # some 27,000 frames
            time.sleep(0.05)
            sizes.append(os.path.getsize(here.path("app.db-wal")))
        stop.set()

    _together(5, lambda number: work(number) if number else watch())
    assert rows(con) >= 1500
    assert max(sizes) < 15000 * 4120, f"{max(sizes) // 4120} frames"
    bottomless_wal.flush(con)
    last = world.bucket.edges("app.db")[-1]
    assert world.bucket.segment("app.db", *last).post_hash == bottomless_wal.status(con).state_hash


def test_a_connection_that_the_collector_closes_in_a_thread_of_ours(world: World) -> None:
    """The last close waits for the worker: made by the worker itself, it must not wait for ever."""
    machine = world.machine()
    con = bottomless_wal.connect(machine.path(), **{**world.options, "ack": "local"})
    path = con.db_filename("main")
    replica = registry.get(path)
    assert replica is not None
    collected = threading.Event()
    committed = threading.Event()

    def collect(position: object) -> None:
        assert committed.wait(20)
        assert threading.current_thread().name.startswith("bottomless")
        gc.collect()
        collected.set()

    replica.replicator.on_logged = collect
    gc.disable()
    try:
        con.execute("CREATE TABLE t(x)")
        cycle: list[object] = [con]
        cycle.append(cycle)
        del con, cycle
        committed.set()
        assert collected.wait(20)
    finally:
        gc.enable()
    until(lambda: registry.get(path) is None)
    world.comes_back(machine)
