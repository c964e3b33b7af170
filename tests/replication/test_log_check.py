"""Objects of the log that expire, or are deleted, below a head that goes on: it is found, told, and mended from the local file."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apsw
import pytest

import bottomless_wal
from bottomless_wal.core.config import Config
from bottomless_wal.core.errors import CorruptionError, RestoreError, StoreError
from bottomless_wal.history.compaction import snapshot
from bottomless_wal.history.log import RemoteLog
from bottomless_wal.replication import log_check
from bottomless_wal.replication.log_check import find_gap
from bottomless_wal.storage import open_store
from tests.support.cluster import Machine, World, refusal, replica_of, rows, until
from tests.support.log_builder import Past


def _history(world: World) -> RemoteLog:
    return RemoteLog(open_store(Config.load(world.options, environ={})), "app.db")


def _opened(world: World, count: int = 5, **options: Any) -> tuple[Machine, apsw.Connection]:
    here = world.machine()
    con = here.connect(**options)
    con.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, x)")
    for _ in range(count):
        con.execute("INSERT INTO t(x) VALUES (randomblob(1000))")
    return here, con


def _expire(world: World, keep: Callable[[str], bool] = lambda key: False) -> None:
    """All objects go but those that `keep` says yes to."""
    with contextlib.closing(open_store(Config.load(world.options, environ={}))) as store:
        store.delete([key for key in world.bucket.content() if not keep(key)])


def _restored(world: World) -> int:
    """The rows that a restore from the log alone brings back."""
    target = world.machine()
    options = {name: value for name, value in world.options.items() if name != "create_bucket"}
    bottomless_wal.restore(target.path(), output=target.path("copy.db"), **options)
    con = target.stock("copy.db")
    assert rows(con, "PRAGMA integrity_check") == "ok"
    return int(rows(con))


def _mended(con: apsw.Connection) -> None:
    until(lambda: bottomless_wal.status(con).log_repairs == 1)
    assert bottomless_wal.status(con).log_error is None


def _daily(con: apsw.Connection) -> None:
    """A day has passed."""
    replica_of(con).upkeep._check_at = 0.0


@pytest.mark.parametrize("compaction", [False, True])
def test_what_expires_while_it_is_open_is_mended_within_a_day(
    two_worlds: World, compaction: bool, caplog: pytest.LogCaptureFixture
) -> None:
    _, con = _opened(two_worlds, compaction=compaction)
    _expire(two_worlds)
    for _ in range(3):
        con.execute("INSERT INTO t(x) VALUES (1)")
    bottomless_wal.flush(con)
    with pytest.raises(RestoreError):
        _restored(two_worlds)
    assert bottomless_wal.status(con).log_error is None, "nobody has looked yet"
    _daily(con)
    con.execute("INSERT INTO t(x) VALUES (2)")
    _mended(con)
    assert "cannot restore 'app.db'" in caplog.text
    con.close()
    assert _restored(two_worlds) == 9


def test_what_expires_between_two_opens_is_mended_by_the_second(two_worlds: World) -> None:
    here, con = _opened(two_worlds)
    con.close()
    head = two_worlds.bucket.head("app.db")
    _expire(two_worlds, lambda key: key.endswith(f"-{head:016x}"))
    con = here.connect()
    con.close()
    assert (0, head) in two_worlds.bucket.edges("app.db"), "the close waits for the mending"
    assert _restored(two_worlds) == 5


def test_all_of_it_is_gone_between_two_opens_and_the_log_begins_anew(world: World, caplog: pytest.LogCaptureFixture) -> None:
    here, con = _opened(world)
    con.close()
    _expire(world)
    con = here.connect()
    assert "is gone from" in caplog.text
    con.close()
    assert world.bucket.edges("app.db") == [(0, 1)]
    assert _restored(world) == 5


def test_a_commit_in_the_middle_that_is_gone(world: World) -> None:
    _, con = _opened(world)
    _expire(world, lambda key: not key.endswith(f"{3:016x}-{4:016x}"))
    _daily(con)
    con.execute("INSERT INTO t(x) VALUES (2)")
    _mended(con)
    con.close()
    assert _restored(world) == 6


def test_a_base_whose_body_is_gone(world: World) -> None:
    """Its segment is there, so that the keys look sound."""
    here = world.machine()
    stock = here.stock()
    stock.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, x)")
    stock.executemany("INSERT INTO t(x) VALUES (randomblob(1000000))", [()] * 12)
    stock.close()
    con = here.connect(pages="off")
    con.execute("INSERT INTO t(x) VALUES (1)")
    con.close()
    assert any("/body/" in key for key in world.bucket.content())
    _expire(world, lambda key: "/body/" not in key)
    con = here.connect(pages="off")
    con.close()
    assert (0, 2) in world.bucket.edges("app.db")
    assert _restored(world) == 13


def test_the_mending_goes_on_beside_commits(world: World) -> None:
    _, con = _opened(world, 50)
    _expire(world)
    _daily(con)
    wanted = 50
    while not bottomless_wal.status(con).log_repairs:
        con.execute("INSERT INTO t(x) VALUES (randomblob(3000))")
        wanted += 1
        assert wanted < 5000
    con.close()
    assert _restored(world) == wanted


def test_a_gap_that_cannot_be_mended_now_stays_in_the_status_and_is_mended_later(world: World) -> None:
    _, con = _opened(world)
    _expire(world)
    store = refusal(con)

    def refuse(kind: str, key: str) -> None:
        if kind == "create" and f"/{0:016x}-" in key:
            raise StoreError(f"{key}: no", hint="A test did that.")

    store.rules.append(refuse)
    _daily(con)
    con.execute("INSERT INTO t(x) VALUES (1)")
    until(lambda: bottomless_wal.status(con).log_error is not None and not replica_of(con).upkeep._is_check_due)
    error = bottomless_wal.status(con).log_error
    assert isinstance(error, RestoreError)
    assert "app.db-wal/" in error.message
    assert error.hint
    store.nothing()
    _daily(con)
    con.execute("INSERT INTO t(x) VALUES (1)")
    _mended(con)
    con.close()
    assert _restored(world) == 7


def test_a_damaged_snapshot_of_the_head_is_taken_over_after_the_next_commit(world: World) -> None:
    """The key of the snapshot that would mend it is taken: the next txid has another one."""
    _, con = _opened(world)
    head = world.bucket.head("app.db")
    snapshot(_history(world), _history(world).edges(), head)
    key = f"app.db-wal/{0:016x}-{head:016x}"
    data = world.bucket.content()[key]
    _expire(world, lambda key: key.endswith(f"{head - 1:016x}-{head:016x}"))
    world.bucket.put(key, data[:-1] + bytes([data[-1] ^ 1]) + b"x")
    world.bucket.put(key, b"no segment")
    _daily(con)
    con.execute("INSERT INTO t(x) VALUES (1)")
    until(lambda: bottomless_wal.status(con).log_repairs == 1 or not replica_of(con).upkeep._is_check_due)
    _daily(con)
    con.execute("INSERT INTO t(x) VALUES (1)")
    until(lambda: bottomless_wal.status(con).log_repairs == 1)
    con.close()
    assert _restored(world) == 7


def test_a_log_of_many_objects_is_looked_at_from_its_newest_snapshot(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_check, "_LISTED", 20)
    monkeypatch.setattr("bottomless_wal.replication.recovery._LISTED", 20)
    here, con = _opened(world, 40, compaction=False, pages="off", ack="log")
    snapshot(_history(world), _history(world).edges(), 30)
    con.close()
    con = here.connect(compaction=False, pages="off", ack="log")
    assert replica_of(con).log_check.finding is log_check.Finding.SOUND
    assert replica_of(con).upkeep._thread is None, "no thorough look was needed"
    con.close()
    for _ in range(2):  # more than one request tells, behind the snapshot
        con = here.connect(compaction=False, pages="off", ack="log")
        con.executemany("INSERT INTO t(x) VALUES (?)", [(n,) for n in range(20)])
        con.close()
    con = here.connect(compaction=False, pages="off", ack="log")
    until(lambda: replica_of(con).log_check.finding is log_check.Finding.SOUND)
    assert bottomless_wal.status(con).log_error is None
    con.close()


def test_no_gap_in_a_sound_log_with_snapshots_merges_and_resets(tmp_path: Path) -> None:
    past, rng = Past(tmp_path), random.Random(5)
    for number in range(1, 40):
        past.commit({n: rng.randbytes(512) for n in range(1, 4 + number % 3)}, 3 + number % 3)
    assert find_gap(past.history) is None
    snapshot(past.history, past.history.edges(), 20)
    assert find_gap(past.history) is None
    keys = [entry.key for entry in past.store.list("")]
    for txid in range(20):  # below the snapshot nothing is needed
        past.store.delete([key for key in keys if key.endswith(f"{txid:016x}-{txid + 1:016x}")])
    assert find_gap(past.history) is None
    past.store.delete([key for key in keys if key.endswith(f"{25:016x}-{26:016x}")])
    gap = find_gap(past.history)
    assert gap is not None
    assert "after txid 25" in gap.message
    assert f"{25:016x}-{26:016x}" in gap.message


def test_a_torn_listing_is_no_gap(tmp_path: Path) -> None:
    """Somebody prunes between the listing and the reading: it is listed anew."""
    past, rng = Past(tmp_path), random.Random(5)
    for _ in range(10):
        past.commit({1: rng.randbytes(512)}, 1)
    listed = past.history.edges()
    real = past.history.edges

    def edges(**how: Any) -> Any:
        past.history.edges = real  # type: ignore[method-assign]
        snapshot(past.history, real(), 10)
        past.store.delete([f"{past.history.name}-wal/{n:016x}-{n + 1:016x}" for n in range(9)])
        return listed

    past.history.edges = edges  # type: ignore[method-assign]
    assert find_gap(past.history) is None


def test_a_damaged_segment_that_others_lead_round_is_no_gap(tmp_path: Path) -> None:
    past, rng = Past(tmp_path), random.Random(5)
    for _ in range(10):
        past.commit({1: rng.randbytes(512)}, 1)
    snapshot(past.history, past.history.edges(), 6)
    past.store.put(f"{past.history.name}-wal/{0:016x}-{6:016x}", b"no segment")
    with pytest.raises(CorruptionError):
        past.history.header(0, 6)
    assert find_gap(past.history) is None
