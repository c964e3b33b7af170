"""`restore` and `reset`: what is there is replaced only by something verified, and what opens afterwards is right."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shlex
import signal
import stat
from pathlib import Path

import apsw
import pytest

import bottomless_wal
from bottomless_wal import Restored
from bottomless_wal.core import failpoints
from bottomless_wal.core.errors import ConfigError, ConflictError, RestoreError, StoreError
from bottomless_wal.formats import keys
from tests.support.stored_database import COMMITS, Cli, Shop


def restore(shop: Shop, **more: object) -> Restored:
    return bottomless_wal.restore(shop.path, **{**shop.options, **more})  # type: ignore[arg-type]


def names(path: Path) -> set[str]:
    return {entry.name for entry in path.parent.iterdir()}


def test_to_another_path_and_an_earlier_state(any_shop: Shop) -> None:
    any_shop.trade()
    seen: list[tuple[int, int]] = []
    output = any_shop.path.with_name("copy.db")
    done = restore(any_shop, output=output, progress=lambda read, expected: seen.append((read, expected)))
    assert (done.path, done.name, done.txid, done.head) == (str(output), "app.db", COMMITS, COMMITS)
    assert output.read_bytes() == any_shop.path.read_bytes()
    assert done.pages * done.page_size == output.stat().st_size
    assert seen
    assert seen[-1][0] == seen[-1][1] == done.received
    assert done.requests > COMMITS
    earlier = any_shop.path.with_name("earlier.db")
    assert restore(any_shop, output=earlier, txid=4).txid == 4
    assert any_shop.rows(earlier) == 3
    assert names(any_shop.path) == {"app.db", "app.db-bottomless", "copy.db", "earlier.db"}


def test_in_place_it_can_be_opened_without_a_scan(any_shop: Shop) -> None:
    any_shop.trade()
    for entry in any_shop.path.parent.iterdir():
        entry.unlink()
    restore(any_shop)
    assert bottomless_wal.inspect(any_shop.path, **any_shop.options).in_step
    connection = any_shop.open()
    # Neither the segments nor the pages were read again, but the head's own.
    assert bottomless_wal.status(connection).requests.get("get", 0) <= 2
    connection.execute("INSERT INTO sales(goods) VALUES ('more')")
    bottomless_wal.flush(connection)
    connection.close()
    assert bottomless_wal.verify(any_shop.path, local=any_shop.path, deep=True, **any_shop.options).ok


def test_an_existing_file_is_refused_without_force(shop: Shop) -> None:
    shop.trade()
    before = shop.path.read_bytes()
    with pytest.raises(ConflictError, match="exists"):
        restore(shop)
    assert shop.path.read_bytes() == before
    assert names(shop.path) == {"app.db", "app.db-bottomless"}
    # An empty file is no database.
    output = shop.path.with_name("empty.db")
    output.touch()
    restore(shop, output=output)
    assert shop.rows(output) == COMMITS - 1


def leave_a_wal(path: Path) -> None:
    """Changes the file by plain SQLite, in a process that dies: what it wrote is in the WAL only."""
    child = os.fork()
    if child == 0:
        connection = apsw.Connection(str(path))
        connection.execute("PRAGMA journal_mode=wal")
        connection.execute("CREATE TABLE IF NOT EXISTS astray(x)")
        connection.execute("INSERT INTO astray VALUES (1)")
        os._exit(0)
    os.waitpid(child, 0)
    assert path.with_name(path.name + "-wal").stat().st_size > 0


def test_force_replaces_the_file_and_its_wal(shop: Shop) -> None:
    shop.trade()
    leave_a_wal(shop.path)
    shop.path.chmod(0o640)
    assert restore(shop, force=True).txid == COMMITS
    assert names(shop.path) == {"app.db", "app.db-bottomless"}
    assert stat.S_IMODE(shop.path.stat().st_mode) == 0o640
    connection = shop.open()
    assert connection.execute("SELECT count(*) FROM sqlite_schema WHERE name = 'astray'").get == 0
    assert bottomless_wal.status(connection).txid == COMMITS
    connection.close()


def test_a_stale_wal_beside_a_missing_file_is_kept_aside(shop: Shop) -> None:
    shop.trade()
    leave_a_wal(shop.path)
    shop.path.unlink()
    restore(shop)
    assert shop.rows() == COMMITS - 1
    left = names(shop.path) - {"app.db", "app.db-bottomless"}
    assert [name[: len("app.db-wal-stale-")] for name in left] == ["app.db-wal-stale-"]


def test_a_file_in_use_is_not_replaced(shop: Shop) -> None:
    shop.trade()
    connection = shop.open()
    with pytest.raises(ConflictError, match="open in this process"):
        restore(shop, force=True)
    connection.close()
    plain = apsw.Connection(str(shop.path))
    plain.execute("SELECT count(*) FROM sales").fetchall()
    with pytest.raises(ConflictError, match="open elsewhere"):
        restore(shop, force=True)
    plain.close()
    ready, done = multiprocessing.Pipe()
    child = os.fork()
    if child == 0:
        other = apsw.Connection(str(shop.path))
        other.execute("BEGIN; SELECT count(*) FROM sales").fetchall()
        done.send("open")
        signal.pause()
    assert ready.recv() == "open"
    with pytest.raises(ConflictError, match="open elsewhere"):
        restore(shop, force=True)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    restore(shop, force=True)
    assert shop.rows() == COMMITS - 1


@pytest.mark.parametrize("fault", ["missing", "corrupt", "unreachable", "full disk"])
def test_whatever_fails_leaves_the_old_file(shop: Shop, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.trade()
    leave_a_wal(shop.path)
    before = {entry.name: entry.read_bytes() for entry in shop.path.parent.iterdir()}
    expected: type[Exception] = RestoreError
    named = keys.segment_key("app.db", 4, 5)
    if fault == "missing":
        shop.delete(named)
    elif fault == "corrupt":
        shop.flip(named, -400)
    elif fault == "unreachable":
        shop.options["bucket"], expected, named = "elsewhere", StoreError, "elsewhere"
    else:
        write = os.pwrite

        def full(fd: int, data: bytes, offset: int) -> int:
            if offset >= 8192:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(fd, data, offset)

        monkeypatch.setattr(os, "pwrite", full)
        named = "No space left"
    with pytest.raises(expected, match=named):
        restore(shop, force=True)
    monkeypatch.undo()
    assert {entry.name: entry.read_bytes() for entry in shop.path.parent.iterdir()} == before


@pytest.mark.parametrize("point", ["before rename", "after rename"])
def test_killed_while_the_file_is_replaced(shop: Shop, point: str) -> None:
    shop.trade()
    leave_a_wal(shop.path)
    child = os.fork()
    if child == 0:
        failpoints.arm(point, lambda: os.kill(os.getpid(), signal.SIGKILL))
        restore(shop, force=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert "app.db-wal" not in names(shop.path)
    restore(shop, force=True)
    connection = shop.open()
    assert bottomless_wal.status(connection).txid == COMMITS
    assert connection.execute("SELECT count(*) FROM sqlite_schema WHERE name = 'astray'").get == 0
    connection.close()
    assert shop.rows() == COMMITS - 1


def test_what_cannot_be_restored(shop: Shop) -> None:
    shop.trade()
    output = shop.path.with_name("copy.db")
    with pytest.raises(RestoreError, match=f"no txid 99: its history goes from 1 to {COMMITS}"):
        restore(shop, output=output, txid=99)
    with pytest.raises(RestoreError, match="nothing is stored"):
        restore(shop, output=output, database_id="other")
    with pytest.raises(RestoreError, match="cannot restore to"):
        restore(shop, output=shop.path.parent / "nowhere" / "copy.db")
    with pytest.raises(ConfigError, match="directory"):
        restore(shop, output=shop.path.parent)
    with pytest.raises(ConfigError, match="unknown option"):
        restore(shop, output=output, bukket="x")
    assert names(shop.path) == {"app.db", "app.db-bottomless"}


def test_by_the_name_that_ls_shows(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.trade(database_id="branch 7")
    (listed,) = bottomless_wal.listing(**shop.options)
    assert (listed.name, listed.database_id, listed.file) == ("branch=207~app.db", "branch 7", "app.db")
    monkeypatch.chdir(shop.path.parent)
    with pytest.raises(ConfigError, match="not a path"):
        bottomless_wal.restore(listed.name, **shop.options)
    bottomless_wal.restore(listed.name, output="copy.db", **shop.options)
    assert shop.rows(shop.path.with_name("copy.db")) == COMMITS - 1


def test_through_a_symbolic_link(shop: Shop) -> None:
    shop.trade()
    link = shop.path.parent.parent / shop.path.name
    link.symlink_to(shop.path)
    shop.path.unlink()
    bottomless_wal.restore(link, **shop.options)
    assert link.is_symlink()
    assert shop.rows() == COMMITS - 1


def test_an_earlier_state_in_place_and_a_reset(any_shop: Shop) -> None:
    any_shop.trade()
    restore(any_shop, txid=5, force=True)
    assert any_shop.rows() == 4
    # Opened as it is it goes on to the head; a reset makes it the head.
    status = bottomless_wal.reset_from_local(any_shop.path, **any_shop.options)
    assert (status.txid, status.view_txid) == (COMMITS + 1, COMMITS + 1)
    connection = any_shop.open()
    assert connection.execute("SELECT count(*) FROM sales").get == 4
    connection.close()
    assert restore(any_shop, output=any_shop.path.with_name("old.db"), txid=COMMITS).txid == COMMITS
    assert any_shop.rows(any_shop.path.with_name("old.db")) == COMMITS - 1
    assert bottomless_wal.verify(any_shop.path, local=any_shop.path, **any_shop.options).ok


def test_a_reset_by_a_file_that_diverged(shop: Shop) -> None:
    shop.trade()
    shop.path.unlink()
    plain = apsw.Connection(str(shop.path))
    plain.execute("CREATE TABLE another(x)")
    plain.close()
    with pytest.raises(ConflictError):
        shop.open()
    assert bottomless_wal.reset_from_local(shop.path, **shop.options).txid == COMMITS + 1
    connection = shop.open()
    with pytest.raises(ConflictError, match="open in this process"):
        bottomless_wal.reset_from_local(shop.path, **shop.options)
    connection.close()
    with pytest.raises(ConfigError, match="no database"):
        bottomless_wal.reset_from_local(shop.path.with_name("missing.db"), **shop.options)


@pytest.mark.parametrize("damage", ["missing", "corrupt"])
@pytest.mark.parametrize("txid", [1, 3, 4])
def test_a_state_before_a_gap_is_told_so_and_the_hint_makes_it_the_head(shop: Shop, cli: Cli, txid: int, damage: str) -> None:
    """Restored in place: no edge leads on to the head, and an open says so. The hint works as it is printed."""
    shop.trade()
    key = shop.segment(5)
    if damage == "missing":
        shop.delete(key)
    else:
        shop.put(key, shop.get(key)[:90])
    told = cli(shop, "restore", shop.path, "--txid", txid, "--force")
    assert told.exit_code == 0
    assert "takes it there" not in told.output
    assert key in told.output
    command = f"bottomless-wal reset --from-local {shop.path}"
    assert command in told.output
    content = shop.path.read_bytes()
    for _ in range(2):
        with pytest.raises(RestoreError, match=f"is at txid {txid} of its history") as caught:
            shop.open()
        assert key in caught.value.message
        assert f"`{command}`" in caught.value.hint
        assert shop.path.read_bytes() == content
    if damage == "missing":
        assert "the log has a gap after txid 4" in caught.value.message
    assert cli(shop, *command.split()[1:]).exit_code == 0
    connection = shop.open()
    assert bottomless_wal.status(connection).txid == COMMITS + 1
    assert connection.execute("SELECT count(*) FROM sales").get == txid - 1
    connection.close()
    elsewhere = shop.path.parent / "elsewhere" / shop.path.name
    elsewhere.parent.mkdir()
    shop.open(elsewhere).close()
    assert shop.rows(elsewhere) == txid - 1


def test_a_restore_of_an_earlier_state_says_that_an_open_goes_on_to_the_head(shop: Shop, cli: Cli) -> None:
    shop.trade()
    told = cli(shop, "restore", shop.path, "--txid", 4, "--force")
    assert f"goes on to txid {COMMITS}: opening the file through vfs=bottomless takes it there" in told.output
    shop.open().close()
    assert shop.rows() == COMMITS - 1


def test_the_hint_of_a_gap_can_be_pasted(shop: Shop, cli: Cli) -> None:
    shop.trade()
    shop.delete(shop.segment(5))
    copy = shop.path.with_name("a copy.db")
    with pytest.raises(RestoreError, match="gap after txid 4") as caught:
        restore(shop, output=copy)
    command = caught.value.hint.split("`")[1]
    assert cli(shop, *shlex.split(command)[1:]).exit_code == 0
    assert shop.rows(copy) == 3
    for entry in shop.path.parent.glob("app.db*"):
        entry.unlink()
    with pytest.raises(RestoreError, match="gap after txid 4") as caught:
        shop.open()
    command = caught.value.hint.split("`")[1]
    assert cli(shop, *shlex.split(command)[1:]).exit_code == 0
    assert shop.rows() == 3
