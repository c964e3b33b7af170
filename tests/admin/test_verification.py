"""`verify`: it is quiet about what is sound, names whatever is not, and mends the page view from the log."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import apsw
import pytest

import bottomless_wal
from bottomless_wal import Report
from bottomless_wal.admin.page_audit import ViewAudit
from bottomless_wal.core.errors import RestoreError
from bottomless_wal.formats import keys
from tests.support.stored_database import COMMITS, Shop


def found(report: Report) -> list[tuple[str, str]]:
    return [(problem.kind, problem.object) for problem in report.problems]


def verify(shop: Shop, **more: object) -> Report:
    return bottomless_wal.verify(shop.path, **{**shop.options, **more})  # type: ignore[arg-type]


def test_what_is_sound(any_shop: Shop) -> None:
    any_shop.trade()
    seen: list[tuple[int, int]] = []
    for deep in (False, True):
        report = verify(any_shop, deep=deep, local=any_shop.path, progress=lambda done, known: seen.append((done, known)))
        assert report.ok
        assert found(report) == []
        assert (report.txid, report.restorable, report.segments, report.bodies) == (COMMITS, COMMITS, COMMITS, 0)
        assert report.pages == report.page_objects > COMMITS - 2
        assert report.notes == [f"{any_shop.path} holds exactly txid {COMMITS}"]
        assert report.requests > 0
        assert report.received > 0
    assert (COMMITS, COMMITS) in seen


def test_each_fault_is_named_and_the_view_is_mended(any_shop: Shop) -> None:
    any_shop.trade()
    pages = verify(any_shop).pages
    old = any_shop.get(any_shop.page(1))
    connection = any_shop.open()
    connection.execute("CREATE TABLE later(x)")
    connection.close()
    good = {key: any_shop.get(key) for key in any_shop.keys(keys.page_prefix("app.db"))}
    any_shop.put(any_shop.page(1), old)
    any_shop.delete(any_shop.page(3), any_shop.page(4))
    any_shop.flip(any_shop.page(6), 20)
    any_shop.put(any_shop.page(pages + 40), old)
    expected = [
        ("stale", any_shop.page(1)),
        ("missing", any_shop.page(3)),
        ("damaged", any_shop.page(6)),
        ("superfluous", any_shop.page(pages + 40)),
    ]
    report = verify(any_shop)
    assert not report.ok
    assert found(report) == expected
    assert "txid" in report.problems[0].message
    assert "1 more, up to page 4" in report.problems[1].message

    report = verify(any_shop, repair_view=True)
    assert report.ok
    assert found(report) == expected
    assert all(problem.repaired for problem in report.problems)
    assert found(verify(any_shop)) == []
    assert set(good) == set(any_shop.keys(keys.page_prefix("app.db")))
    untouched = set(good) - {any_shop.page(n) for n in (1, 3, 4, 6)}
    assert all(any_shop.get(key) == good[key] for key in untouched)

    # It is a database by itself again.
    any_shop.delete(*any_shop.keys(keys.log_prefix("app.db")))
    done = bottomless_wal.restore(any_shop.path, output=any_shop.path.with_name("again.db"), **any_shop.options)
    assert done.head is None
    assert any_shop.rows(any_shop.path.with_name("again.db")) == COMMITS - 1


def test_a_missing_segment(any_shop: Shop) -> None:
    any_shop.trade()
    any_shop.delete(any_shop.segment(5))
    report = verify(any_shop)
    assert not report.ok
    assert found(report) == [("gap", any_shop.segment(5))]
    assert (report.txid, report.restorable) == (COMMITS, 4)
    assert f"`bottomless-wal restore --txid 4 {any_shop.path} -o PATH`" in report.notes[0]
    assert bottomless_wal.restore(any_shop.path, output=any_shop.path.with_name("b.db"), txid=4, **any_shop.options).txid == 4


def test_where_the_first_segment_is_missing_no_txid_is_named(shop: Shop) -> None:
    shop.trade()
    shop.delete(shop.segment(1))
    report = verify(shop)
    assert report.restorable == 0
    assert "no state can" in report.notes[0]


def test_several_gaps(shop: Shop) -> None:
    shop.trade()
    shop.delete(*(shop.segment(n) for n in (3, 4, 8, COMMITS)))
    report = verify(shop)
    assert found(report) == [("gap", shop.segment(3)), ("gap", shop.segment(8))]
    assert "begins at txid 4" in report.problems[0].message
    assert report.txid == COMMITS - 1  # what was the head cannot be known any more


def test_a_hole_that_a_snapshot_spans_is_a_gap_while_retention_promises_it(shop: Shop) -> None:
    shop.trade()
    bottomless_wal.snapshot(shop.path, **shop.options)
    shop.delete(shop.segment(4))
    report = verify(shop)
    assert found(report) == [("gap", shop.segment(4))]
    assert f"txids 4 to {COMMITS - 1} cannot be restored" in report.problems[0].message
    assert report.restorable == COMMITS
    bottomless_wal.restore(shop.path, output=shop.path.with_name("copy.db"), **shop.options)


@pytest.mark.parametrize(("at", "deep"), [(20, False), (60, False), (-500, False), (-1, False), (-500, True)])
def test_a_corrupt_segment(shop: Shop, at: int, deep: bool) -> None:
    shop.trade()
    shop.flip(shop.segment(5), at)
    report = verify(shop, deep=deep)
    assert not report.ok
    assert found(report) == [("corrupt", shop.segment(5))]
    assert report.restorable == 4
    assert report.pages > 0  # the head is told, though it cannot be rebuilt


def test_a_truncated_segment_and_an_empty_one(shop: Shop) -> None:
    shop.trade()
    shop.put(shop.segment(5), shop.get(shop.segment(5))[:90])
    shop.put(shop.segment(7), b"")
    report = verify(shop)
    assert found(report) == [("corrupt", shop.segment(5)), ("corrupt", shop.segment(7))]


def test_a_segment_of_another_history(shop: Shop) -> None:
    shop.trade()
    other = Shop(shop.endpoint, shop.path.with_name("other.db"))
    connection = other.open()
    connection.execute("CREATE TABLE t(x)")
    for number in range(4):
        connection.execute("INSERT INTO t VALUES (?)", (number,))
    connection.close()
    shop.put(shop.segment(4), shop.get(keys.segment_key("other.db", 3, 4)))
    report = verify(shop)
    assert found(report) == [("contradiction", shop.segment(4))]
    assert shop.segment(3) in report.problems[0].message
    # A key that is not its own.
    shop.put(shop.segment(4), shop.get(shop.segment(6)))
    assert found(verify(shop)) == [("corrupt", shop.segment(4))]


def test_bodies(shop: Shop) -> None:
    connection = shop.open()
    connection.execute("CREATE TABLE sales(x)")
    connection.execute("INSERT INTO sales VALUES (randomblob(10000000))")
    bottomless_wal.flush(connection)
    connection.close()
    (body,) = shop.keys(keys.body_prefix("app.db"))
    report = verify(shop, deep=True)
    assert report.ok
    assert report.bodies == 1
    data = shop.get(body)
    shop.put(keys.body_key("app.db", 0, 1, "cut-off"), b"nothing")
    assert "1 bodies" in verify(shop).notes[0]

    shop.put(body, data[:-1])
    assert found(verify(shop)) == [("body", body)]
    shop.put(body, data[:5_000_000] + b"?" + data[5_000_001:])
    for deep in (False, True):
        report = verify(shop, deep=deep)
        assert {problem.object for problem in report.problems} == {body}
        assert report.restorable == 1
    shop.delete(body)
    assert found(verify(shop)) == [("body", body)]
    shop.put(body, data)
    assert verify(shop, repair_view=True).ok


@pytest.mark.parametrize("page_size", [512, 65536])
def test_page_sizes_and_a_database_that_has_shrunk(shop: Shop, page_size: int) -> None:
    connection = shop.open(page_size=page_size)
    connection.execute("PRAGMA auto_vacuum=full")
    connection.execute("VACUUM")
    connection.execute("CREATE TABLE sales(x)")
    for _ in range(5):
        connection.execute("INSERT INTO sales VALUES (randomblob(?))", (page_size * 3,))
    connection.execute("DELETE FROM sales")
    bottomless_wal.flush(connection)
    connection.close()
    report = verify(shop, deep=True, local=shop.path)
    assert found(report) == []
    assert report.page_size == page_size


def test_an_emptied_table_and_a_reset(shop: Shop) -> None:
    shop.trade()
    bottomless_wal.restore(shop.path, txid=3, force=True, **shop.options)
    assert bottomless_wal.reset_from_local(shop.path, **shop.options).txid == COMMITS + 1
    report = verify(shop, deep=True, local=shop.path)
    assert found(report) == []
    assert report.txid == COMMITS + 1


def test_a_writer_at_work_is_no_problem(shop: Shop) -> None:
    shop.trade()
    connection = shop.open()
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            connection.execute("INSERT INTO sales(goods) VALUES (randomblob(100))")

    thread = threading.Thread(target=write)
    thread.start()
    try:
        heads = set()
        for _ in range(6):
            report = verify(shop)
            assert found(report) == []
            heads.add(report.txid)
    finally:
        stop.set()
        thread.join()
    assert len(heads) > 1


def test_a_repair_stops_when_the_history_goes_on(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.trade()
    shop.delete(shop.page(2))
    monkeypatch.setattr(ViewAudit, "_moved", lambda self, head: True)
    report = verify(shop, repair_view=True)
    assert not report.ok
    assert found(report) == [("missing", shop.page(2))]
    assert "went on during the repair" in report.notes[-1]
    assert shop.page(2) not in shop.keys(keys.page_prefix("app.db"))


def test_a_view_that_nobody_promised(shop: Shop) -> None:
    shop.trade(pages="off")
    report = verify(shop, pages="off")
    assert report.ok
    assert found(report) == []
    assert "its writer did not say" in report.notes[-1]
    report = verify(shop)  # whatever pages= the one who asks has set
    assert report.ok
    assert "its writer did not say" in report.notes[-1]
    report = verify(shop, repair_view=True)
    assert found(report) == [("missing", shop.page(1))]
    assert report.ok
    assert verify(shop).ok


def rollback_copy(path: Path) -> Path:
    """The same rows, in a file that is not in WAL mode."""
    copy = path.with_name("copy.db")
    connection = apsw.Connection(str(path))
    connection.execute("VACUUM INTO ?", (str(copy),))
    connection.close()
    return copy


def truncated(path: Path) -> Path:
    copy = path.with_name("copy.db")
    copy.write_bytes(path.read_bytes()[:-4096])
    return copy


def no_database(path: Path) -> Path:
    copy = path.with_name("copy.db")
    copy.write_bytes(b"This is a letter to my aunt." * 1000)
    return copy


def missing(path: Path) -> Path:
    return path.with_name("copy.db")


@pytest.mark.parametrize("make", [rollback_copy, truncated, no_database, missing])
def test_a_local_file_that_differs(shop: Shop, make: Callable[[Path], Path]) -> None:
    shop.trade()
    copy = make(shop.path)
    before = copy.read_bytes() if copy.exists() else None
    report = verify(shop, local=copy)
    assert found(report) == [("local", str(copy))]
    assert (copy.read_bytes() if copy.exists() else None) == before


def test_a_local_file_in_use_is_compared_with_its_wal(shop: Shop) -> None:
    shop.trade()
    connection = shop.open()
    connection.execute("INSERT INTO sales(goods) VALUES ('in the WAL')")
    assert found(verify(shop, local=shop.path)) == []
    shop.delete(shop.segment(COMMITS + 1))
    report = verify(shop, local=shop.path)
    assert ("local", str(shop.path)) in found(report)
    assert "pages" in next(problem.message for problem in report.problems if problem.kind == "local")
    assert connection.execute("SELECT count(*) FROM sales").get == COMMITS


def test_page_objects_without_a_log(shop: Shop) -> None:
    shop.trade()
    log = {key: shop.get(key) for key in shop.keys(keys.log_prefix("app.db"))}
    shop.delete(*log)
    report = verify(shop)
    assert [problem.kind for problem in report.problems] == ["no-log"]
    assert report.txid == COMMITS
    shop.delete(shop.page(3))
    report = verify(shop)
    assert [problem.kind for problem in report.problems] == ["damaged", "no-log"]
    assert shop.page(3) in report.problems[0].message


def test_nothing_is_stored(shop: Shop) -> None:
    shop.trade()
    with pytest.raises(RestoreError, match=r"nothing is stored as 'nothing\.db'"):
        bottomless_wal.verify(shop.path.with_name("nothing.db"), **shop.options)


def test_a_head_that_is_stored_well_and_is_not_a_sound_database(any_shop: Shop) -> None:
    """Its hashes are those that were committed: only SQLite itself tells that an index misses a row."""
    any_shop.trade()
    sound = verify(any_shop, integrity=True)
    assert sound.ok
    assert any("integrity_check" in note for note in sound.notes)
    connection = any_shop.open()
    connection.execute("CREATE TABLE i(x); CREATE INDEX ix ON i(x); INSERT INTO i VALUES (1), (2), (3)")
    connection.execute("PRAGMA writable_schema=ON")
    root = connection.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'ix'").get
    empty = connection.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'i'").get
    assert root != empty
    connection.execute("DELETE FROM sqlite_schema WHERE name = 'ix'")
    connection.execute("PRAGMA writable_schema=RESET")  # a page that nothing leads to
    connection.close()
    assert verify(any_shop, deep=True).ok
    report = verify(any_shop, deep=True, integrity=True)
    assert not report.ok
    assert [kind for kind, _ in found(report)] == ["integrity"]
