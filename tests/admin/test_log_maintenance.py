"""compact, snapshot, prune, forget, the timeline and `stats`: what is promised stays, and what they tell is so."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import bottomless_wal
from bottomless_wal import admin
from bottomless_wal.admin import LIST_PRICES, load_prices
from bottomless_wal.core.errors import ConfigError, RestoreError
from bottomless_wal.formats import keys
from bottomless_wal.history import compaction
from bottomless_wal.history.compaction import Vanished
from bottomless_wal.history.log import RemoteLog
from bottomless_wal.history.planner import plan
from bottomless_wal.history.timeline import timeline, txid_at
from tests.support.log_builder import Past
from tests.support.stored_database import COMMITS, Cli, Shop

HOUR, DAY = 3600.0, 86400.0


def of(past: Past, **more: object) -> dict[str, Any]:
    """The options with which the library finds a made-up history."""
    return {"endpoint": past.config.endpoint, "bucket": past.config.bucket, **more}


def moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def image(past: Past, **more: object) -> tuple[int, bytes]:
    """What `restore` gives: the txid, and the file."""
    out = past.root / "out.db"
    done = bottomless_wal.restore("app.db", output=out, force=True, **of(past), **more)  # type: ignore[arg-type]
    return done.txid, out.read_bytes()


@pytest.fixture
def past(tmp_path: Path) -> Past:
    """A commit a minute, 200 of them, and a reset in the middle."""
    past, rng = Past(tmp_path), random.Random(7)
    for number in range(1, 201):
        past.clock += 60
        past.reset(rng) if number == 100 else past.live(rng)
    return past


@pytest.fixture
def days(tmp_path: Path) -> Past:
    """Ten days of a commit every six hours."""
    past, rng = Past(tmp_path), random.Random(1)
    for _ in range(40):
        past.clock += 6 * HOUR
        past.live(rng)
    return past


def server_time(monkeypatch: pytest.MonkeyPatch, past: Past) -> None:
    """Every store that is opened has the clock of that past."""
    monkeypatch.setattr("bottomless_wal.storage.directory.DirectoryStore.now", lambda self: past.clock)


# --- compact, snapshot -------------------------------------------------------------------------------------------------


def test_compact_merges_all_that_is_complete_and_says_so(past: Past) -> None:
    report = bottomless_wal.compact("app.db", **of(past))
    assert [edge[:2] for edge in report.added] == [(0, 64), (64, 128), (128, 192)]
    assert (report.head, report.merged, report.before, report.after, report.ok) == (200, 192, 200, 11, True)
    assert report.size > 0
    again = bottomless_wal.compact("app.db", **of(past))
    assert (again.merged, again.added, again.before) == (0, [], 11)
    for txid in (1, 64, 99, 100, 128, 150, 200):
        assert image(past, txid=txid) == (txid, past.states[txid].image)


def test_compact_lists_again_when_edges_vanish(past: Past, monkeypatch: pytest.MonkeyPatch) -> None:
    real, failures = compaction.merge, [1, 2]

    def merge(*arguments: Any, **more: Any) -> Any:
        if failures:
            failures.pop()
            raise Vanished("gone")
        return real(*arguments, **more)

    monkeypatch.setattr(compaction, "merge", merge)
    assert len(bottomless_wal.compact("app.db", **of(past)).added) == 3
    failures.extend(range(20))
    past.live(random.Random(3), 60)
    with pytest.raises(RestoreError, match="again and again"):
        bottomless_wal.compact("app.db", **of(past))


def test_a_damaged_run_stays_and_is_told(past: Past) -> None:
    key = keys.segment_key("app.db", 150, 151)
    data = past.store.get(key, limit=1 << 20)
    assert data is not None
    past.store.put(key, data[:-1] + bytes([data[-1] ^ 1]))
    report = bottomless_wal.compact("app.db", **of(past))
    assert [edge[:2] for edge in report.added] == [(0, 64), (64, 128)]
    assert not report.ok
    assert key in report.damaged[0]


def test_snapshot(past: Past) -> None:
    report = bottomless_wal.snapshot("app.db", **of(past))
    assert (report.txid, report.created) == (200, True)
    (edge,) = plan(past.history.edges(), 200) or []
    assert (edge[:2], edge.size + edge.body > 0) == ((0, 200), True)
    again = bottomless_wal.snapshot("app.db", **of(past))
    assert (again.txid, again.created, again.size) == (200, False, edge.size)
    assert image(past) == (200, past.states[200].image)


@pytest.mark.parametrize("command", ["compact", "snapshot", "prune", "stats", "states"])
def test_what_is_not_there(past: Past, command: str) -> None:
    with pytest.raises(RestoreError, match=r"nothing is stored as 'other\.db'"):
        getattr(admin, command)("other.db", **of(past))


# --- prune, forget -----------------------------------------------------------------------------------------------------


def test_prune_keeps_what_the_settings_promise(days: Past, monkeypatch: pytest.MonkeyPatch) -> None:
    server_time(monkeypatch, days)
    for txid in (20, 28, 32):
        compaction.snapshot(days.history, days.history.edges(), txid)
        days.clock, now = days.times[txid], days.clock
        days.date(0, txid)
        days.clock = now
    options = of(days, retention=2 * DAY, keep_snapshots=4)
    before = list(days.history.edges())
    told = bottomless_wal.prune("app.db", dry_run=True, **options)
    assert list(days.history.edges()) == before
    done = bottomless_wal.prune("app.db", **options)
    assert (done.base, done.head, done.snapshots) == (32, 40, [28])
    assert (told.segments, told.size, told.dry_run) == (done.segments, done.size, True)
    assert done.segments == len(before) - len(days.history.edges()) == 33
    # A txid that is gone: the error says what is left.
    with pytest.raises(RestoreError, match=r"txid 30 .* not kept any more, or missing; what can be restored: 28, 32 to 40"):
        image(days, txid=30)
    assert image(days, txid=28) == (28, days.states[28].image)
    assert image(days, timestamp=moment(days.times[31])) == (28, days.states[28].image)
    with pytest.raises(RestoreError, match="the earliest that can be restored is txid 28"):
        image(days, timestamp=moment(days.times[27]))
    told_states = admin.states("app.db", **of(days))
    assert (told_states.ranges, told_states.count) == ([(28, 28), (32, 40)], 10)
    assert [state.txid for state in told_states.snapshots] == [28, 32]


def test_forget_stands_on_a_snapshot_of_that_moment(days: Past, monkeypatch: pytest.MonkeyPatch) -> None:
    server_time(monkeypatch, days)
    compaction.snapshot(days.history, days.history.edges(), 8)
    before = list(days.history.edges())
    told = admin.forget("app.db", older_than=3 * DAY, dry_run=True, **of(days))
    assert list(days.history.edges()) == before
    done = admin.forget("app.db", older_than=3 * DAY, **of(days))
    assert (told.snapshot, told.segments, told.size, told.base) == (28, done.segments, done.size, 28)
    assert (done.snapshot, done.base, done.snapshots, done.segments) == (28, 28, [], 29)
    for txid in range(28, 41):
        assert image(days, txid=txid) == (txid, days.states[txid].image)
    # Nothing that is old is left to forget; what is younger than two hours, and the head, stay in any case.
    assert admin.forget("app.db", older_than=3 * DAY, **of(days)).segments == 0
    assert admin.forget("app.db", older_than=0, **of(days)).base == 39
    assert image(days) == (40, days.states[40].image)
    with pytest.raises(ConfigError, match="no age"):
        admin.forget("app.db", older_than=-1, **of(days))


# --- time --------------------------------------------------------------------------------------------------------------


def test_the_timeline_is_read_from_few_headers(past: Past) -> None:
    expected = [(number, past.states[number].hash, int(past.times[number] * 1000)) for number in range(1, 201)]
    assert list(timeline(past.history, past.history.edges())) == expected
    bottomless_wal.compact("app.db", **of(past))
    before = sum(past.store.stats.requests.values())
    edges = past.history.edges()
    assert list(timeline(past.history, edges)) == expected
    assert sum(past.store.stats.requests.values()) - before <= 1 + 3 + 8
    bottomless_wal.snapshot("app.db", **of(past))
    before = sum(past.store.stats.requests.values())
    edges = past.history.edges()
    assert list(timeline(past.history, edges)) == expected
    assert sum(past.store.stats.requests.values()) - before <= 3


def test_what_a_damaged_header_does_not_tell_another_does(past: Past) -> None:
    bottomless_wal.compact("app.db", **of(past))
    key = keys.segment_key("app.db", 64, 128)
    past.store.put(key, b"nonsense")
    assert [commit.txid for commit in timeline(past.history, past.history.edges())] == list(range(1, 201))


def test_a_vanished_edge_is_said(past: Past) -> None:
    edges = past.history.edges()
    past.store.delete([keys.segment_key("app.db", 4, 5)])
    with pytest.raises(Vanished):
        list(timeline(past.history, edges))


def test_a_moment(past: Past) -> None:
    edges = past.history.edges()
    for txid in (1, 99, 100, 101, 200):
        assert txid_at(past.history, edges, moment(past.times[txid])).txid == txid
        assert txid_at(past.history, edges, moment(past.times[txid] + 59)).txid == txid
        assert txid_at(past.history, edges, moment(past.times[txid]).replace(tzinfo=None)).txid == txid
    assert txid_at(past.history, edges, moment(past.times[200] + DAY)).txid == 200
    zone = moment(past.times[150]).astimezone(tz=None)
    assert image(past, timestamp=zone + timedelta(seconds=1)) == (150, past.states[150].image)
    with pytest.raises(RestoreError, match="the earliest that can be restored is txid 1"):
        txid_at(past.history, edges, moment(past.times[1] - 1))
    with pytest.raises(ConfigError, match="both"):
        image(past, timestamp=zone, txid=3)


def test_a_clock_that_jumps_back(tmp_path: Path) -> None:
    past, rng = Past(tmp_path), random.Random(4)
    start = past.clock
    for offset in (0, 10, 20, 500, 30, 40, 510, 520):
        past.clock = start + offset
        past.live(rng)
    edges = past.history.edges()
    found = [txid_at(past.history, edges, moment(start + offset)).txid for offset in (0, 15, 20, 30, 45, 499, 500, 509, 510, 600)]
    # What came after the jump counts as no earlier than it: nothing of it is in a state "of before".
    assert found == [1, 2, 3, 3, 3, 3, 6, 6, 7, 8]


def test_behind_a_gap_a_reset_begins_anew(past: Past) -> None:
    past.store.delete([keys.segment_key("app.db", 49, 50)])
    edges = past.history.edges()
    assert [commit.txid for commit in timeline(past.history, edges)] == [*range(1, 50), *range(100, 201)]
    assert txid_at(past.history, edges, moment(past.times[70])).txid == 49
    assert image(past, timestamp=moment(past.times[120])) == (120, past.states[120].image)


def test_a_restore_lists_again_each_time_something_is_missing(past: Past, monkeypatch: pytest.MonkeyPatch) -> None:
    """The history is shortened twice while it is read: each time what was planned with is gone."""
    real, listings = RemoteLog.edges, [0]

    def edges(self: RemoteLog, *, since: int = 0) -> Any:
        found = real(self, since=since)
        listings[0] += 1
        if listings[0] == 1:
            compaction.compact(past.history, found)
            past.store.delete([keys.segment_key("app.db", number, number + 1) for number in range(150)])
        elif listings[0] == 2:
            compaction.snapshot(past.history, found, 192)
            past.store.delete([keys.segment_key("app.db", *ends) for ends in ((0, 64), (64, 128), (128, 192))])
        return found

    monkeypatch.setattr(RemoteLog, "edges", edges)
    assert image(past) == (200, past.states[200].image)
    assert listings[0] >= 3


# --- the commands ------------------------------------------------------------------------------------------------------


def test_the_commands(shop: Shop, cli: Cli) -> None:
    shop.trade()
    done = cli(shop, "compact", shop.path)
    assert done.exit_code == 0
    assert "0 segments merged into 0 more" in done.stdout
    assert json.loads(cli(shop, "compact", shop.path, "--json").stdout)["ok"] is True
    done = cli(shop, "snapshot", shop.path)
    assert f"snapshot made of txid {COMMITS}" in done.stdout
    assert json.loads(cli(shop, "snapshot", shop.path, "--json").stdout)["created"] is False
    done = cli(shop, "prune", shop.path, "--dry-run")
    assert "0 segments and 0 bodies would be deleted" in done.stdout
    assert json.loads(cli(shop, "prune", shop.path, "--json").stdout)["segments"] == 0
    done = cli(shop, "rm", shop.path, "--older-than", "30d")
    assert (done.exit_code, "0 segments" in done.stdout) == (0, True)
    assert cli(shop, "rm", shop.path, "--older-than", "30").exit_code == 2
    assert cli(shop, "rm", shop.path).exit_code == 2
    assert cli(shop, "compact", "other.db").exit_code == 3


def test_rm_asks_first(days: Past, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    server_time(monkeypatch, days)
    shop: Any = type("Bucket", (), {"endpoint": type("E", (), {"url": days.config.endpoint, "bucket": "past"})})
    before = list(days.history.edges())
    done = cli(shop, "rm", "app.db", "--older-than", "3d")  # nobody answers
    assert done.exit_code == 130
    assert "28 segments and 0 bodies would be deleted" in done.stderr
    assert list(days.history.edges()) == before
    done = cli(shop, "rm", "app.db", "--older-than", "72h", "--yes", "--json")
    assert (done.exit_code, json.loads(done.stdout)["base"]) == (0, 28)


@pytest.mark.parametrize("any_shop", ["moto", "directory"], indirect=True)
def test_ls_tells_states_that_a_timestamp_restores(any_shop: Shop, cli: Cli) -> None:
    shop = any_shop
    shop.trade()
    bottomless_wal.snapshot(shop.path, **shop.options)
    output = cli(shop, "ls", shop.path).stdout
    assert f"{COMMITS} states that can be restored" in output
    assert "snapshot, " in output
    (row,) = json.loads(cli(shop, "ls", shop.path, "--json").stdout)
    assert row["restorable"] == [[1, COMMITS]]
    assert [commit["txid"] for commit in row["commits"]] == list(range(1, COMMITS + 1))
    assert [state["txid"] for state in row["snapshots"]] == [COMMITS]
    last = row["commits"][-1]
    assert last["time"].removesuffix("+00:00") in output
    copy = shop.path.with_name("copy.db")
    done = cli(shop, "restore", shop.path, "-o", copy, "--timestamp", last["time"], "-v")
    assert f"restored at txid {COMMITS}" in done.stdout
    assert "It was committed at" in done.stdout
    assert " requests, " in done.stdout
    assert cli(shop, "restore", shop.path, "-o", copy, "--timestamp", "2001-01-01").exit_code == 3
    assert cli(shop, "restore", shop.path, "--timestamp", "yesterday").exit_code == 2
    assert cli(shop, "restore", shop.path, "--timestamp", last["time"], "--txid", 3).exit_code == 2


def test_stats(shop: Shop, cli: Cli, tmp_path: Path) -> None:
    shop.trade()
    bottomless_wal.snapshot(shop.path, **shop.options)
    usage = admin.stats(shop.path, **shop.options)
    (listed,) = bottomless_wal.listing(shop.path, **shop.options)
    kinds = usage.kinds
    assert {name: kind.objects for name, kind in kinds.items()} == {
        "commits": COMMITS, "merged": 0, "snapshots": 1, "bodies": 0, "page_objects": listed.page_objects,
    }  # fmt: skip
    assert sum(kind.bytes for kind in kinds.values()) == listed.log_bytes + listed.page_bytes
    assert (usage.commits_day, usage.commits_day_exact, usage.prices) == (COMMITS, True, LIST_PRICES)
    assert usage.pages_per_commit is not None
    assert usage.month == sum(cost.amount for cost in usage.costs) > 0
    commits = next(cost for cost in usage.costs if cost.what == "commits")
    assert commits.amount == pytest.approx(COMMITS * 365 / 12 * 0.005 / 1000)
    assert "extrapolated" in commits.basis
    file = tmp_path / "prices.json"
    file.write_text('{"name": "ours", "currency": "EUR", "put_per_1000": 0, "storage_gb_month": 0, "get_per_1000": 0}')
    output = cli(shop, "stats", shop.path, "--price-file", file).stdout
    assert "EUR" in output
    assert "ours, as of not given" in output
    assert "measured" in output
    told = json.loads(cli(shop, "stats", shop.path, "--json", "--price-file", file).stdout)
    assert (told["month"], told["kinds"]["commits"]["objects"]) == (0, COMMITS)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"free": 1}', '{"put_per_1000": -1}', '{"put_per_1000": "1"}', '{"name": 3}', '{"put_per_1000": NaN}']
)
def test_what_is_no_price_list(tmp_path: Path, text: str) -> None:
    file = tmp_path / "prices.json"
    with pytest.raises(ConfigError, match="no price list"):
        load_prices(file)
    file.write_text(text)
    with pytest.raises(ConfigError, match="is no "):
        load_prices(file)


def test_a_process_that_has_it_open_counts_its_requests_and_what_they_cost_a_month(past: Past, tmp_path: Path) -> None:
    con = bottomless_wal.connect(tmp_path / "new.db", endpoint=past.config.endpoint, bucket="past", ack="log", pages="off")
    con.execute("CREATE TABLE t(x)")
    con.execute("INSERT INTO t VALUES (zeroblob(100))")
    status = bottomless_wal.status(con)
    con.close()
    assert status.requests["create"] == 2
    assert status.sent.keys() == {"create"}
    assert status.sent["create"] == status.bytes_sent > 200
    costs = {cost.what: cost for cost in admin.running_costs(replace(status, seconds=60.0))}
    assert costs.keys() == status.requests.keys()
    assert costs["create"].amount == pytest.approx(2 * 60 * 24 * 365 / 12 * 0.005 / 1000)
    assert "2 requests in the 60 s" in costs["create"].basis
    assert costs.get("get", costs["list"]).amount < 2 * costs["create"].amount
