"""The writer's own upkeep: its history stays short while it commits, off the commit path, and nothing of it can fail a commit."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apsw
import pytest

import bottomless_wal
from bottomless_wal.core import failpoints
from bottomless_wal.core.config import Config
from bottomless_wal.core.errors import RestoreError, TransientError
from bottomless_wal.history import compaction
from bottomless_wal.history.log import RemoteLog
from bottomless_wal.history.planner import plan
from bottomless_wal.runtime.compactor import Compactor
from bottomless_wal.storage import open_store
from tests.support.cluster import World, refusal, replica_of, rows, until
from tests.support.forkserver import fork
from tests.support.log_builder import Past


def history(world: World) -> RemoteLog:
    return RemoteLog(open_store(Config.load(world.options, environ={})), "app.db")


def commits(con: apsw.Connection, count: int) -> None:
    for number in range(count):
        con.execute("INSERT OR REPLACE INTO t VALUES (?, randomblob(300))", (number % 50,))


def opened(world: World, **options: Any) -> apsw.Connection:
    con = world.machine().connect(**{"pages": "off", "ack": "log", "compaction": "on", **options})
    con.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, x)")
    return con


def test_runs_are_merged_while_it_commits_and_come_back_from_few_objects(world: World) -> None:
    con = opened(world)
    commits(con, 300)
    edges = history(world).edges
    until(lambda: {(64, 128), (128, 192), (192, 256)} <= {edge[:2] for edge in edges()})
    chain = plan(edges(), 301)
    assert chain is not None
    assert len(chain) < 64
    image = con.serialize("main")
    con.close()
    assert world.bucket.log_image("app.db") == image
    elsewhere = world.machine().connect(pages="off", ack="log")
    assert elsewhere.serialize("main") == image


def test_what_was_just_stored_is_not_fetched_again(world: World) -> None:
    con = opened(world)
    commits(con, 130)
    until(lambda: any(edge[:2] == (64, 128) for edge in history(world).edges()))
    assert bottomless_wal.status(con).requests.get("get", 0) < 20
    con.close()


def test_compaction_off_leaves_it_to_the_command(world: World) -> None:
    before = set(threading.enumerate())
    con = opened(world, compaction="off")
    commits(con, 130)
    con.close()
    assert all(edge.post == edge.pre + 1 for edge in history(world).edges())
    assert not any("upkeep" in thread.name for thread in set(threading.enumerate()) - before)


def test_an_idle_writer_sends_nothing(world: World) -> None:
    con = opened(world)
    commits(con, 70)
    until(lambda: any(edge[:2] == (0, 64) for edge in history(world).edges()))
    upkeep = replica_of(con).upkeep
    until(lambda: upkeep._turned >= 64)
    store = refusal(con)
    upkeep._due = 0.0
    with upkeep._cond:
        upkeep._turned = upkeep._head
        upkeep._cond.notify_all()
    assert bottomless_wal.status(con).pending_frames == 0
    assert store.seen == []
    con.close()


def test_an_open_that_fails_leaves_no_thread_behind(world: World) -> None:
    here = world.machine()
    stock = here.stock()
    stock.execute("CREATE TABLE t(x)")
    stock.close()

    def fail() -> None:
        raise TransientError("no", hint="A test did that.")

    before = set(threading.enumerate())
    failpoints.arm("after open", fail)
    with pytest.raises(TransientError):
        here.connect()
    failpoints.disarm()
    assert world.bucket.head("app.db") == 1, "it had begun"
    until(lambda: not any("upkeep" in thread.name for thread in set(threading.enumerate()) - before))


def test_what_is_due_waits_for_a_commit(tmp_path: Path) -> None:
    """A minute after the first commits it would look whether there is a snapshot; an idle writer does not even that."""
    past = Past(tmp_path)
    now = [0.0]
    upkeep = Compactor(past.config.changed(compaction=True), past.history, clock=lambda: now[0], pause=lambda seconds: None)
    waits: list[float | None] = []
    real = upkeep._cond.wait

    def wait(timeout: float | None = None) -> bool:
        waits.append(timeout)
        return real(timeout)

    upkeep._cond.wait = wait  # type: ignore[method-assign]
    past.commit({n: past.page(n, 512) for n in range(1, 9)}, 8)
    upkeep.told(past.head)
    until(lambda: bool(waits))
    assert waits == [None]
    assert upkeep._turned == 0
    now[0] += 120
    past.commit({1: past.page(9, 512)}, 8)
    upkeep.told(past.head)
    until(lambda: upkeep._turned == past.head)
    upkeep.stop()


def test_its_failures_are_none_of_the_commits(world: World, caplog: pytest.LogCaptureFixture) -> None:
    con = opened(world)
    store = refusal(con)

    def refuse(kind: str, key: str) -> None:
        if kind == "create" and f"-{64:016x}" in key and f"/{0:016x}" in key:
            raise TransientError(f"{key}: no", hint="A test did that.")

    store.rules.append(refuse)
    commits(con, 70)
    until(lambda: "upkeep of app.db" in caplog.text)
    store.nothing()
    commits(con, 70)
    until(lambda: {(0, 64), (64, 128)} <= {edge[:2] for edge in history(world).edges()} or _again(con))
    con.close()


def _again(con: apsw.Connection) -> bool:
    commits(con, 64)
    return False


def test_a_close_does_not_wait_for_a_merge(world: World) -> None:
    con = opened(world)
    reached, on = threading.Event(), threading.Event()

    def hold() -> None:
        reached.set()
        on.wait(20)

    failpoints.arm("before merged", hold)
    commits(con, 70)
    assert reached.wait(20)
    image = con.serialize("main")
    con.close()
    on.set()
    assert world.bucket.log_image("app.db") == image


def test_a_snapshot_is_made_when_the_commits_outweigh_the_last_one_and_then_it_prunes(tmp_path: Any) -> None:
    past = Past(tmp_path)
    rng = random.Random(1)
    config = past.config.changed(compaction=True, retention=0.0, keep_snapshots=0)
    now = [0.0]
    upkeep = Compactor(config, past.history, clock=lambda: now[0], pause=lambda seconds: None)
    past.commit({n: past.page(n, 512) for n in range(1, 9)}, 8)
    for _ in range(20):
        past.commit({n: rng.randbytes(512) for n in range(1, 9)}, 8)
        upkeep.told(past.head)
    assert [edge[:2] for edge in past.history.edges() if edge.pre == 0] == [(0, 1)], "not before a run is complete"
    now[0] += config.snapshot_interval + 1
    past.clock += config.snapshot_interval + 1
    past.commit({1: rng.randbytes(512)}, 8)
    upkeep.told(past.head)
    with upkeep._cond:
        upkeep._cond.notify_all()
    until(lambda: (0, past.head) in {edge[:2] for edge in past.history.edges()})
    until(lambda: upkeep._turned == past.head)
    upkeep.stop()
    assert past.image(past.head) == past.states[-1].image


# argv: path, point. Commits until its upkeep has died at `point`, and the process with it; prints what was acknowledged.
DYING = """
path, point = argv
die_at(point)
con = connect(path, pages="off", ack="log")
con.execute("CREATE TABLE IF NOT EXISTS t(id INTEGER PRIMARY KEY, x)")
for number in range(1, 400):
    con.execute("INSERT INTO t VALUES (?, randomblob(300))", (number,))
    print(number, flush=True)
"""


@pytest.mark.parametrize("point", ["before merged", "after merged"])
def test_a_writer_killed_in_its_upkeep_has_lost_nothing_and_the_next_one_does_the_rest(world: World, point: str) -> None:
    here = world.machine()
    code, lines = fork(DYING, here.path(), point, options=world.options).end()
    assert code == -signal.SIGKILL
    known = int(lines[-1])
    assert known >= 62
    merged = [edge for edge in world.bucket.edges("app.db") if edge[1] - edge[0] == 64]
    assert merged == ([(0, 64)] if point == "after merged" else [])
    elsewhere = world.machine().connect(pages="off", ack="log")
    assert rows(elsewhere, "SELECT count(*) FROM t") >= known
    assert world.bucket.log_image("app.db") == elsewhere.serialize("main")
    commits(elsewhere, 130)
    until(lambda: {(0, 64), (64, 128)} <= set(world.bucket.edges("app.db")) or _again(elsewhere))
    image = elsewhere.serialize("main")
    elsewhere.close()
    assert world.machine().connect(pages="off", ack="log").serialize("main") == image


# argv: path, point. The command `prune`, or `forget`, killed at `point`.
PRUNING = """
path, point, what = argv
die_at(point)
from bottomless_wal import admin
if what == "prune":
    admin.prune(path, retention=86400, keep_snapshots=0, **options)
else:
    admin.forget(path, older_than=86400, **options)
"""


@pytest.mark.parametrize(
    ("what", "point"),
    [("prune", "before prune"), ("prune", "within prune")]
    + [("forget", point) for point in ("before merged", "after merged", "before prune", "within prune")],
)
def test_a_command_killed_while_it_prunes_leaves_all_that_is_promised(world: World, what: str, point: str) -> None:
    con = opened(world, compaction="off")
    commits(con, 40)
    if what == "prune":
        log = history(world)
        compaction.snapshot(log, log.edges(), 30)
    image = con.serialize("main")
    log_directory = Path(world.options["endpoint"].removeprefix("file://")) / world.options["bucket"] / "app.db-wal"
    for path in log_directory.iterdir():
        os.utime(path, (1_700_000_000, 1_700_000_000))
    con.execute("INSERT INTO t VALUES (1000, 'young')")
    young = con.serialize("main")
    place = str(con.filename)
    code, _ = fork(PRUNING, place, point, what, options=world.options).end()
    assert code == -signal.SIGKILL
    for txid, expected in ((41, image), (42, young)):
        bottomless_wal.restore(place, output=f"{place}.{txid}", txid=txid, **world.options)
        assert Path(f"{place}.{txid}").read_bytes() == expected
    code, _ = fork(PRUNING, place, "before view", what, options=world.options).end()
    assert code == 0
    left = world.bucket.edges("app.db")
    assert (0, 41 if what == "forget" else 30) in left
    assert (3, 4) not in left
    con.execute("INSERT INTO t VALUES (1001, 'still here')")
    image = con.serialize("main")
    con.close()
    assert world.machine().connect(pages="off", ack="log").serialize("main") == image


def keeper(past: Past, **options: Any) -> Compactor:
    """Upkeep that is turned by hand."""
    config = past.config.changed(compaction=True, **options)
    upkeep = Compactor(config, past.history, clock=lambda: past.clock, pause=lambda seconds: None)
    upkeep._thread = threading.current_thread()
    return upkeep


def turned(upkeep: Compactor, head: int) -> None:
    upkeep.told(head)
    upkeep._turn()


def counted(past: Past) -> Callable[[str], int]:
    return lambda kind: past.store.stats.requests.get(kind, 0)


def test_the_whole_database_with_which_a_history_begins_is_not_written_again_for_few_commits(tmp_path: Path) -> None:
    past, rng = Past(tmp_path), random.Random(1)
    past.commit({n: rng.randbytes(512) for n in range(1, 5001)}, 5000)
    for _ in range(63):
        past.commit({1: rng.randbytes(512)}, 5000)
    before = past.store.stats.bytes_sent
    turned(keeper(past), past.head)
    assert past.store.stats.bytes_sent - before < 100_000
    assert {edge[:2] for edge in past.history.edges() if edge.post - edge.pre > 1} == {(1, 64)}
    assert past.image(past.head) == past.states[-1].image
    requests = counted(past)("create")
    turned(keeper(past), past.head)
    assert counted(past)("create") == requests, "and it is done once"


def test_several_processes_make_no_more_snapshots_than_one(tmp_path: Path) -> None:
    """Each looks whether another has made one before it does."""
    past, rng = Past(tmp_path, clock=time.time()), random.Random(2)
    past.commit({n: rng.randbytes(512) for n in range(1, 4001)}, 4000)
    keepers = [keeper(past) for _ in range(4)]
    for number in range(1, 5):
        for _ in range(64):
            past.commit({n: rng.randbytes(512) for n in rng.sample(range(1, 4001), 40)}, 4000)
        turned(keepers[number % 4], past.head)
        for other in keepers:
            other._turn()
    made = [edge for edge in past.history.edges() if edge.pre == 0]
    commits = sum(edge.size + edge.body for edge in past.history.edges() if edge.post == edge.pre + 1 and edge.pre)
    assert sum(edge.size + edge.body for edge in made[1:]) <= commits
    assert past.image(past.head) == past.states[-1].image


def test_over_a_history_with_a_gap_it_does_not_look_again_and_again(tmp_path: Path) -> None:
    past = Past(tmp_path)
    past.live(random.Random(3), 300)
    (tmp_path / "past" / f"app.db-wal/{100:016x}-{101:016x}").unlink()
    upkeep = keeper(past, snapshot_interval=86400.0)
    past.clock += 86400
    with pytest.raises(RestoreError):
        turned(upkeep, past.head)
    reads = counted(past)("get")
    for _ in range(5):
        past.live(random.Random(past.head), 64)
        upkeep._bytes = 1 << 30
        turned(upkeep, past.head)
    assert counted(past)("get") - reads < 300
    past.clock += 86400
    with pytest.raises(RestoreError):
        turned(upkeep, past.head)
    assert upkeep._failures == 2


def test_a_snapshot_is_due_by_its_own_age_and_not_by_the_age_of_the_process(tmp_path: Path) -> None:
    past = Past(tmp_path)
    for day in range(6):
        for half in range(2):
            upkeep = keeper(past, retention=86400.0, keep_snapshots=3)
            past.live(random.Random(day * 2 + half), 20)
            past.clock += upkeep._due - past.clock + 1  # a minute or so later it looks
            past.live(random.Random(day), 1)
            before = set(past.history.edges())
            turned(upkeep, past.head)
            for edge in set(past.history.edges()) - before:
                past.date(edge.pre, edge.post)
            past.clock += 43200
    snapshots = [edge for edge in past.history.edges() if edge.pre == 0]
    assert 2 <= len(snapshots) <= 6
    assert min(edge.post for edge in past.history.edges()) > 20, "and so what is old is pruned"
    assert past.image(past.head) == past.states[-1].image


def test_a_process_that_ends_soon_finishes_the_run_that_it_has_completed(world: World) -> None:
    here = world.machine()
    script = (
        "con = connect(argv[0], pages='off', ack='log'); con.execute('CREATE TABLE IF NOT EXISTS t(x)')\n"
        "for n in range(10): con.execute('INSERT INTO t VALUES (1)')\ncon.close()"
    )
    for _ in range(14):
        code, _ = fork(script, here.path(), options=world.options).end()
        assert code == 0
    assert {(0, 64), (64, 128)} <= set(world.bucket.edges("app.db"))


def test_two_processes_on_one_file_do_it_together(world: World) -> None:
    from tests.support.cluster import child

    con = opened(world)
    path = str(con.filename)
    script = (
        "con = connect(argv[0], pages='off', ack='log', compaction='on'); con.set_busy_timeout(20000)\n"
        "for n in range(100): con.execute('INSERT INTO t(x) VALUES (1)')\ncon.close()"
    )
    child(script, path, options=world.options)
    commits(con, 100)
    assert rows(con) >= 100
    image = con.serialize("main")
    con.close()
    assert world.bucket.log_image("app.db") == image
    assert os.path.exists(path)
