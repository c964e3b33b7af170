"""Retention: everything promised can be restored afterwards, whatever clocks did; nothing young, nor the head, is ever deleted."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bottomless_wal.core import failpoints
from bottomless_wal.core.errors import CorruptionError, RestoreError
from bottomless_wal.history.compaction import snapshot
from bottomless_wal.history.log import FENCE_HORIZON_SECONDS
from bottomless_wal.history.planner import plan, reachable
from bottomless_wal.history.retention import prune, superfluous
from bottomless_wal.history.segment_list import SegmentInfo
from tests.support.log_builder import Past

HOUR, DAY = 3600.0, 86400.0


@pytest.fixture
def past(tmp_path: Path) -> Past:
    """Ten days of a commit every six hours, a snapshot each day, by the server's clock."""
    past, rng = Past(tmp_path), random.Random(1)
    for number in range(1, 41):
        past.clock += 6 * HOUR
        past.live(rng)
        if number % 4 == 0:
            snapshot(past.history, past.history.edges(), number)
            past.date(0, number)
    return past


def restorable(past: Past) -> set[int]:
    """The txids that can be restored, each of them tried."""
    found = set()
    for txid in range(1, past.head + 1):
        try:
            assert past.image(txid) == past.states[txid].image
        except RestoreError:
            continue
        found.add(txid)
    return found


def test_every_commit_of_the_retention_and_a_snapshot_a_day_remain(past: Past) -> None:
    report = prune(past.history, retention=2 * DAY, keep_snapshots=5)
    # Two days before commit 40 the state was that of commit 32, which has a snapshot.
    assert report.base == 32
    assert restorable(past) == {*range(32, 41), *report.snapshots}
    assert report.snapshots == (24, 28)
    assert not prune(past.history, retention=2 * DAY, keep_snapshots=5).edges


def test_a_dry_run_tells_the_same_and_deletes_nothing(past: Past) -> None:
    before = list(past.history.edges())
    told = prune(past.history, retention=2 * DAY, keep_snapshots=5, dry_run=True)
    assert list(past.history.edges()) == before
    assert prune(past.history, retention=2 * DAY, keep_snapshots=5) == told
    assert told.size == sum(edge.size for edge in told.edges) > 0


def test_without_a_snapshot_old_enough_nothing_goes(tmp_path: Path) -> None:
    past, rng = Past(tmp_path), random.Random(2)
    past.live(rng, 20)
    past.clock += 30 * DAY
    snapshot(past.history, past.history.edges(), 1)
    past.live(rng, 5)
    report = prune(past.history, retention=DAY, keep_snapshots=0)
    assert report.base == 1
    assert restorable(past) == set(range(1, 26))


def test_an_idle_database_keeps_its_head_and_the_heads_own_commit(past: Past) -> None:
    past.clock += 365 * DAY
    prune(past.history, retention=0, keep_snapshots=0)
    assert restorable(past) == {40}
    assert [(edge.pre, edge.post) for edge in past.history.edges()] == [(0, 40), (39, 40)]


def test_no_commit_younger_than_twice_the_fence_horizon_is_deleted(tmp_path: Path) -> None:
    past, rng = Past(tmp_path), random.Random(3)
    past.live(rng, 10)
    snapshot(past.history, past.history.edges(), 10)
    past.clock += 2 * FENCE_HORIZON_SECONDS - 1
    assert not prune(past.history, retention=0, keep_snapshots=0).edges
    past.clock += 2
    assert prune(past.history, retention=0, keep_snapshots=0).edges != ()
    assert restorable(past) == {10}


def test_a_clock_that_jumps_back_deletes_nothing_early(past: Past) -> None:
    rng = random.Random(4)
    # Commits 41 to 44 are dated a year ago, by a clock that is put right again afterwards.
    past.clock -= 365 * DAY
    past.live(rng, 4)
    past.clock += 365 * DAY
    past.live(rng, 1)
    prune(past.history, retention=2 * DAY, keep_snapshots=0)
    assert restorable(past) >= set(range(32, 46))


def test_a_clock_that_runs_ahead_costs_the_retention_and_never_the_head(past: Past) -> None:
    past.clock += 3650 * DAY
    prune(past.history, retention=2 * DAY, keep_snapshots=5)
    assert 40 in restorable(past)
    past.clock -= 3650 * DAY
    past.live(random.Random(5), 3)
    assert past.image(43) == past.states[43].image


def test_a_history_with_a_gap_is_left_alone(past: Past) -> None:
    past.store.delete([f"app.db-wal/{37:016x}-{38:016x}", f"app.db-wal/{0:016x}-{40:016x}"])
    before = list(past.history.edges())
    with pytest.raises(CorruptionError, match="nothing was deleted"):
        prune(past.history, retention=2 * DAY, keep_snapshots=5)
    assert list(past.history.edges()) == before


def test_bodies_go_with_their_edges_and_forgotten_ones_after_a_week(tmp_path: Path) -> None:
    past, rng = Past(tmp_path), random.Random(6)
    for _ in range(3):
        past.commit({number: rng.randbytes(65536) for number in range(1, 161)}, 160, page_size=65536)
    forgotten = past.history.upload_body(5, 6, [b"x" * 100])
    folder = past.root / "past" / "app.db-wal"
    for path in folder.glob("body/*"):
        os.utime(path, (past.clock, past.clock))
    snapshot(past.history, past.history.edges(), 3)
    past.date(0, 3)
    assert len(list(folder.glob("body/*"))) == 5
    past.clock += 2 * DAY
    report = prune(past.history, retention=DAY, keep_snapshots=0)
    # The head's own commit stays, and with it its body; the other two commits go.
    assert len(report.bodies) == 2
    assert (folder / forgotten.name).exists()
    past.clock += 6 * DAY
    assert prune(past.history, retention=DAY, keep_snapshots=0).bodies == (f"app.db-wal/{forgotten.name}",)
    assert past.image(3) == past.states[3].image


@pytest.mark.parametrize("point", ["before prune", "within prune"])
def test_killed_in_between_everything_promised_is_there(past: Past, point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bottomless_wal.history.retention._AT_ONCE", 7)

    class Killed(BaseException):
        pass

    left = [2]

    def die() -> None:
        left[0] -= 1
        if not left[0]:
            raise Killed

    failpoints.arm(point, die)
    try:
        with pytest.raises(Killed):
            prune(past.history, retention=2 * DAY, keep_snapshots=5)
    finally:
        failpoints.disarm()
    assert restorable(past) >= {24, 28, *range(32, 41)}
    prune(past.history, retention=2 * DAY, keep_snapshots=5)
    assert restorable(past) == {24, 28, *range(32, 41)}


def test_a_restore_whose_edges_vanish_plans_again(past: Past) -> None:
    real, left = past.store.get, [3]

    def get(key: str, *, limit: int) -> bytes | None:
        left[0] -= 1
        if not left[0]:
            prune(past.history, retention=2 * DAY, keep_snapshots=0)
        return real(key, limit=limit)

    past.store.delete([f"app.db-wal/{0:016x}-{n:016x}" for n in (36, 40)])
    past.store.get = get  # type: ignore[method-assign]
    edges = [edge for edge in past.history.edges() if (edge.pre, edge.post) != (0, 32)]  # as it was listed before that snapshot was made
    assert plan(edges, 40) is not None
    assert past.image(40, edges) == past.states[40].image


days = st.floats(0, 40).map(lambda number: number * DAY)
clocks = st.lists(st.floats(-9, 9), max_size=40)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 40), days, st.integers(0, 40), st.lists(st.integers(1, 40), max_size=6), clocks)
def test_of_any_history_what_is_promised_remains(
    commits: int, retention: float, keep: int, snapshots: list[int], jumps: list[float]
) -> None:
    now = 100 * DAY
    times = [now - (commits - n) * DAY / 2 + (jumps[n] * DAY if n < len(jumps) else 0) for n in range(commits)]
    edges = {SegmentInfo(n, n + 1, 100, times[n]) for n in range(commits)}
    edges |= {SegmentInfo(0, n, 100, times[n - 1]) for n in snapshots if 1 < n <= commits}
    edges |= {SegmentInfo(n, n + 4, 100, times[n + 3]) for n in range(0, commits - 4, 4) if n}
    listed = sorted(edges)
    gone, base = superfluous(listed, now=now, retention=retention, keep_snapshots=keep)
    left = [edge for edge in listed if edge not in set(gone)]
    there = set(reachable(left))
    cutoff = now - max(retention, 2 * FENCE_HORIZON_SECONDS)
    assert commits in there
    assert (commits - 1, commits) in {edge[:2] for edge in left}
    youngest = 0.0
    for n in range(commits):
        youngest = max(youngest, times[n])
        if youngest > cutoff:
            assert n + 1 in there, "a commit within the retention"
            assert n in there, "the state that it replaced"
    assert not any(edge.modified > cutoff for edge in gone if edge.post == edge.pre + 1)
    assert not superfluous(left, now=now, retention=retention, keep_snapshots=keep)[0] or base
