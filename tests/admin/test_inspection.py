"""`listing` and `inspect`: what is in the bucket, and how a local file stands to it, without touching the file."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import apsw
import pytest

import bottomless_wal
from bottomless_wal import Inspection, admin
from bottomless_wal.admin import Lineage
from bottomless_wal.core.errors import ConfigError, StoreError
from tests.support.stored_database import COMMITS, Cli, Shop


def inspect(shop: Shop) -> Inspection:
    """Looks, and makes sure that looking changes nothing."""
    before = {entry.name: entry.stat().st_mtime_ns for entry in shop.path.parent.iterdir()}
    seen = bottomless_wal.inspect(shop.path, **shop.options)
    assert {entry.name: entry.stat().st_mtime_ns for entry in shop.path.parent.iterdir()} == before
    return seen


def test_a_bucket_of_several_databases(any_shop: Shop) -> None:
    any_shop.trade()
    any_shop.trade(database_id="two")
    other = any_shop.open(any_shop.path.with_name("app.db2"))
    other.execute("CREATE TABLE t(x)")
    other.close()
    any_shop.put("somebody-elses/object", b"hello")
    any_shop.put("app.db", b"a copy made by hand")
    rows = bottomless_wal.listing(**any_shop.options)
    assert [(row.name, row.txid, row.segments) for row in rows] == [
        ("app.db", COMMITS, COMMITS),
        ("app.db2", 1, 1),
        ("two~app.db", COMMITS, COMMITS),
    ]
    first = rows[0]
    assert first.page_objects == bottomless_wal.verify(any_shop.path, **any_shop.options).page_objects
    assert first.log_bytes > 3000 * (COMMITS - 1)
    assert 0 < first.page_bytes < first.log_bytes
    assert first.last_commit is not None
    assert abs(first.last_commit.timestamp() - any_shop.store.now()) < 120
    (alone,) = bottomless_wal.listing(any_shop.path, **any_shop.options)
    assert alone == first
    assert bottomless_wal.listing("two~app.db", **any_shop.options) == [rows[2]]
    assert bottomless_wal.listing(any_shop.path.with_name("nothing.db"), **any_shop.options) == []


def test_a_missing_bucket_is_no_empty_one(any_shop: Shop) -> None:
    with pytest.raises(StoreError):
        bottomless_wal.listing(**any_shop.options)
    with pytest.raises(ConfigError):
        bottomless_wal.listing(**{**any_shop.options, "endpoint": "nonsense"})


def test_a_file_and_its_history(shop: Shop) -> None:
    shop.trade()
    seen = inspect(shop)
    assert (seen.in_step, seen.pending, seen.relation) == (True, False, "the local file is at the head")
    assert seen.position_status is Lineage.AT_HEAD
    assert seen.head is not None
    assert seen.local is not None
    assert seen.head.txid == seen.local.txid == COMMITS

    connection = shop.open()
    connection.execute("INSERT INTO sales(goods) VALUES ('in the WAL')")
    seen = inspect(shop)
    assert (seen.in_step, seen.pending) == (True, False)
    shop.delete(shop.segment(COMMITS + 1))
    assert "beyond the head" in inspect(shop).relation
    assert inspect(shop).position_status is Lineage.BEYOND
    connection.close()


def test_a_file_with_commits_that_are_not_stored(shop: Shop, tmp_path: Path) -> None:
    shop.trade()
    bucket = tmp_path / shop.endpoint.bucket
    child = os.fork()
    if child == 0:
        connection = shop.open()
        bucket.rename(tmp_path / "unplugged")
        try:
            connection.execute("INSERT INTO sales(goods) VALUES ('not stored')")
        except bottomless_wal.ReplicationError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    (tmp_path / "unplugged").rename(bucket)
    seen = inspect(shop)
    assert (seen.in_step, seen.pending) == (False, True)
    assert "not stored yet" in seen.relation
    assert seen.position_status is Lineage.AT_HEAD


def test_a_file_left_behind(shop: Shop) -> None:
    shop.trade()
    kept = shop.path.parent.parent / "image"
    shutil.copytree(shop.path.parent, kept, copy_function=shutil.copy2)
    shop.trade()
    shutil.rmtree(shop.path.parent)
    shutil.copytree(kept, shop.path.parent, copy_function=shutil.copy2)
    seen = inspect(shop)
    assert not seen.in_step
    assert f"gone on by {COMMITS - 1} since the local file was at txid {COMMITS}" in seen.relation
    assert seen.position_status is Lineage.BEHIND
    connection = shop.open()
    assert bottomless_wal.status(connection).txid == 2 * COMMITS - 1
    connection.close()


def test_files_that_are_missing_empty_or_unknown(shop: Shop) -> None:
    shop.store.prepare()
    assert "starts one" in inspect(shop).relation
    assert inspect(shop).position_status is Lineage.NOTHING
    plain = apsw.Connection(str(shop.path))
    plain.execute("CREATE TABLE t(x)")
    plain.close()
    assert "uploads the whole database" in inspect(shop).relation
    assert inspect(shop).position_status is Lineage.NO_HISTORY
    connection = shop.open()
    connection.close()
    shop.path.with_name("app.db-bottomless").unlink()
    seen = inspect(shop)
    assert seen.local is None
    assert "page by page" in seen.relation
    assert seen.position_status is Lineage.DIVERGED
    shop.path.unlink()
    seen = inspect(shop)
    assert seen.size is None
    assert "restores txid 1" in seen.relation
    assert seen.position_status is Lineage.NO_FILE


def test_the_index_of_another_bucket(shop: Shop) -> None:
    shop.trade()
    shop.options["bucket"] = "another"
    bottomless_wal.diagnose(**shop.options)  # makes the bucket
    seen = inspect(shop)
    assert not seen.in_step
    assert "belongs to another bucket" in seen.relation


def test_a_repr_shows_state_hashes_as_the_commands_do(shop: Shop, cli: Cli) -> None:
    """As 16 hex digits. The attributes are integers."""
    shop.trade()
    connection = shop.open()
    status = bottomless_wal.status(connection)
    connection.close()
    digits = f"{status.state_hash:016x}"
    assert digits in cli(shop, "status", shop.path).output
    inspection = bottomless_wal.inspect(shop.path, **shop.options)
    report = bottomless_wal.verify(shop.path, **shop.options)
    restored = bottomless_wal.restore(shop.path, output=shop.path.with_name("copy.db"), **shop.options)
    state = admin.states(shop.path, **shop.options).commits[-1]
    for value in (status, report, restored, state, inspection.head, inspection.local, inspection):
        assert f"=0x{digits}" in repr(value)
        assert str(status.state_hash) not in repr(value)
    assert isinstance(status.state_hash, int)
    assert repr(status).startswith(f"Status(path={str(shop.path)!r}, name='app.db', ")
    assert repr(inspection.head).startswith(f"Head(txid={COMMITS}, state=0x")
