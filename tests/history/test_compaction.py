"""Compaction and snapshots: whatever is merged, every state that could be restored can be, byte for byte, and from fewer objects."""

from __future__ import annotations

import random
import resource
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bottomless_wal.core import failpoints
from bottomless_wal.core.errors import CorruptionError, RestoreError
from bottomless_wal.history import compaction
from bottomless_wal.history.compaction import LEVELS, Vanished, compact, merge, missing, snapshot
from bottomless_wal.history.planner import plan
from tests.support.log_builder import Past


@pytest.fixture
def past(tmp_path: Path) -> Past:
    return Past(tmp_path)


def test_runs_are_merged_at_aligned_places(past: Past) -> None:
    past.live(random.Random(1), 200)
    added = compact(past.history, past.history.edges())
    assert [(edge.pre, edge.post) for edge in added] == [(0, 64), (64, 128), (128, 192)]
    assert compact(past.history, past.history.edges()) == [], "what is merged is not merged again"
    assert all(past.image(txid) == past.states[txid].image for txid in (1, 63, 64, 65, 128, 191, 192, 200))


def test_runs_of_runs_are_merged(past: Past, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "LEVELS", (4, 16))
    past.live(random.Random(2), 70)
    added = {(edge.pre, edge.post) for edge in compact(past.history, past.history.edges())}
    assert {(0, 16), (16, 32), (32, 48), (48, 64)} <= added
    assert (64, 68) in added
    chain = plan(past.history.edges(), 70)
    assert chain is not None
    assert len(chain) <= 4 + 1 + 2
    assert all(past.image(txid) == past.states[txid].image for txid in range(1, 71, 5))


def test_a_merged_edge_lists_what_it_merged(past: Past) -> None:
    past.live(random.Random(3), 64)
    (edge,) = compact(past.history, past.history.edges())
    header = past.history.header(edge.pre, edge.post)
    assert header is not None
    assert [commit.txid for commit in header.commits] == list(range(1, 65))
    assert [commit.post for commit in header.commits] == [state.hash for state in past.states[1:]]
    assert [position.frame for position in header.positions] == list(range(1, 65))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), steps=st.lists(st.sampled_from(["live", "live", "reset", "compact", "snapshot", "merge"]), max_size=14))
def test_every_state_stays_what_it_was(tmp_path_factory: pytest.TempPathFactory, seed: int, steps: list[str]) -> None:
    past, rng = Past(tmp_path_factory.mktemp("past")), random.Random(seed)
    past.live(rng, 2)
    for step in steps:
        if step == "live":
            past.live(rng, rng.randint(1, 6))
        elif step == "reset":
            past.reset(rng)
        elif step == "compact":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(compaction, "LEVELS", (3, 9))
                compact(past.history, past.history.edges())
        elif step == "snapshot":
            snapshot(past.history, past.history.edges(), rng.randint(1, past.head))
        else:
            start = rng.randrange(past.head)
            chain = plan(past.history.edges(), rng.randint(start + 1, past.head), start=start)
            assert chain is not None
            merge(past.history, chain)
    for txid in rng.sample(range(1, past.head + 1), min(6, past.head)):
        assert past.image(txid) == past.states[txid].image, txid


def test_a_snapshot_needs_nothing_before_it(past: Past) -> None:
    past.live(random.Random(5), 30)
    made = snapshot(past.history, past.history.edges(), 25)
    assert made is not None
    assert made[:2] == (0, 25)
    assert snapshot(past.history, past.history.edges(), 25) is None
    past.store.delete([f"app.db-wal/{n:016x}-{n + 1:016x}" for n in range(25)])
    assert past.image(30) == past.states[30].image


def test_a_snapshot_of_a_long_chain_goes_by_way_of_others(past: Past) -> None:
    past.live(random.Random(6), compaction.FAN_IN * 2 + 7)
    assert snapshot(past.history, past.history.edges(), past.head) is not None
    assert plan(past.history.edges(), past.head) == [edge for edge in past.history.edges() if (edge.pre, edge.post) == (0, past.head)]
    assert past.image(past.head) == past.states[-1].image


def test_a_reset_is_where_a_snapshot_begins(past: Past) -> None:
    rng = random.Random(7)
    past.live(rng, 5)
    past.reset(rng)
    past.live(rng, 3)
    past.store.delete([f"app.db-wal/{2:016x}-{3:016x}"])
    snapshot(past.history, past.history.edges(), past.head)
    assert past.image(past.head) == past.states[-1].image


def test_a_gap_is_passed_over_and_a_snapshot_across_it_refused(past: Past) -> None:
    past.live(random.Random(8), 130)
    past.store.delete([f"app.db-wal/{70:016x}-{71:016x}"])
    assert [(edge.pre, edge.post) for edge in compact(past.history, past.history.edges())] == [(0, 64)]
    with pytest.raises(RestoreError, match="gap"):
        snapshot(past.history, past.history.edges(), past.head)


def test_a_damaged_edge_is_named_and_other_runs_are_merged(past: Past) -> None:
    past.live(random.Random(9), 128)
    path = past.root / "past" / f"app.db-wal/{30:016x}-{31:016x}"
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(data)
    told: list[CorruptionError] = []
    added = compact(past.elsewhere(), past.history.edges(), damaged=told.append)
    assert [edge[:2] for edge in added] == [(64, 128)]
    (error,) = told
    assert path.name in str(error)


def test_an_edge_of_another_line_is_not_merged(past: Past, tmp_path: Path) -> None:
    past.live(random.Random(10), 64)
    (tmp_path / "other").mkdir()
    other = Past(tmp_path / "other")
    other.live(random.Random(11), 64)
    name = f"app.db-wal/{30:016x}-{31:016x}"
    (past.root / "past" / name).write_bytes((other.root / "past" / name).read_bytes())
    told: list[CorruptionError] = []
    assert compact(past.elsewhere(), past.history.edges(), damaged=told.append) == []
    assert "does not follow" in str(told[0])


def test_what_is_pruned_meanwhile_asks_for_a_new_listing(past: Past) -> None:
    past.live(random.Random(12), 64)
    edges = past.history.edges()
    past.store.delete([f"app.db-wal/{30:016x}-{31:016x}"])
    with pytest.raises(Vanished):
        compact(past.elsewhere(), edges)


def test_two_compactors_make_one_edge(past: Past) -> None:
    past.live(random.Random(13), 64)
    edges = past.history.edges()
    assert merge(past.history, list(edges))[:2] == (0, 64)
    first = past.history.edges()[1]
    assert merge(past.history, list(edges))[:2] == (0, 64)
    assert past.history.edges()[1] == first, "what is there is never overwritten"


@pytest.mark.parametrize("point", ["before merged", "after merged"])
def test_killed_between_it_costs_nothing_but_work(past: Past, point: str) -> None:
    past.live(random.Random(14), 128)

    class Killed(BaseException):
        pass

    def die() -> None:
        raise Killed

    failpoints.arm(point, die)
    try:
        with pytest.raises(Killed):
            compact(past.history, past.history.edges())
    finally:
        failpoints.disarm()
    compact(past.history, past.history.edges())
    assert list(missing(past.history.edges(), LEVELS[0])) == []
    assert past.image(100) == past.states[100].image


def test_large_pages_in_bodies_are_merged_in_little_memory(past: Past) -> None:
    rng = random.Random(15)
    for _ in range(4):
        past.commit({number: rng.randbytes(65536) for number in range(1, 161)}, 160, page_size=65536)
    assert all(edge.body for edge in past.history.edges())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert snapshot(past.history, past.history.edges(), past.head) is not None
    past.live(rng, 3)
    assert snapshot(past.history, past.history.edges(), past.head) is not None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10, "kilobytes"
    assert past.image(past.head) == past.states[-1].image


def test_a_snapshot_over_more_commits_than_an_edge_can_list(past: Past, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are cut before their lists are too long, and a snapshot lists the last commits."""
    monkeypatch.setattr(compaction, "_MOST_COMMITS", 12)
    monkeypatch.setattr(compaction, "FAN_IN", 5)
    monkeypatch.setattr(compaction, "LISTED_ROWS", 20)
    past.live(random.Random(9), 60)
    made = snapshot(past.history, past.history.edges(), 60)
    assert made is not None
    assert max(edge.post - edge.pre for edge in past.history.edges() if edge.pre) <= 12
    header = past.history.header(0, 60)
    assert header is not None
    assert [commit.txid for commit in header.commits] == list(range(41, 61))
    assert past.image(60, [made]) == past.states[60].image
    assert made.size == (past.root / "past" / f"app.db-wal/{0:016x}-{60:016x}").stat().st_size
