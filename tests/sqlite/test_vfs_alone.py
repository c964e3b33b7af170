"""The VFS with a listener and an opener that only note what they are called for: no replication at all."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import apsw
import pytest

from bottomless_wal.core.errors import ConfigError, FilesLostError, ReplicationError
from bottomless_wal.formats.wal import WalHeader
from bottomless_wal.sqlite import parked, vfs
from bottomless_wal.sqlite.open_wals import OpenWals
from bottomless_wal.sqlite.vfs import BottomlessVFS, OwnVFS

_names = (f"alone-{os.getpid()}-{number}" for number in itertools.count())
FLAGS = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE | apsw.SQLITE_OPEN_URI


class Listener:
    """Notes its calls in `events`, and does what a test has put into `act`, by the name of the call."""

    def __init__(self, path: str, events: list[str]) -> None:
        self.path = path
        self.look_seconds = 0.0
        self.wals = OpenWals(path)
        self.events = events
        self.act: dict[str, Callable[..., object]] = {}
        self.is_stored = False

    def _note(self, call: str, what: str, *arguments: object) -> None:
        self.events.append(f"{os.path.basename(self.path)} {what}")
        if call in self.act:
            self.act[call](*arguments)

    def on_commit(self) -> None:
        self._note("commit", "commit")

    def on_commit_failed(self, error: BaseException) -> Callable[[], bool]:
        self._note("failed", f"failed: {type(error).__name__}")
        return lambda: self.is_stored

    def before_wal_reset(self, new: WalHeader | None) -> None:
        self._note("reset", "restart" if new is not None else "gone", new)

    def on_checkpoint(self, wal_frames: int) -> None:
        self._note("checkpoint", f"checkpoint of {wal_frames}")

    def on_file_rewritten(self) -> None:
        self._note("rewritten", "rewritten")

    def on_close(self, *, is_deallocated: bool) -> None:
        self._note("close", "deallocated" if is_deallocated else "close")


class Opener:
    """Has a listener for each path that is opened for writing."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.listeners: dict[str, Listener] = {}
        self.opened: list[tuple[str, str, dict[str, str], bool]] = []
        self.refusal: Exception | None = None

    def open(
        self,
        path: str,
        parameters: Mapping[str, str],
        open_file: Callable[[Any], apsw.VFSFile],
        *,
        given_path: str,
        is_writable: bool,
    ) -> apsw.VFSFile:
        self.opened.append((os.path.basename(path), os.path.basename(given_path), dict(parameters), is_writable))
        if self.refusal is not None:
            raise self.refusal
        if not is_writable:
            return open_file(None)
        return open_file(self.listeners.setdefault(path, Listener(path, self.events)))

    def find(self, path: str) -> Listener | None:
        return self.listeners.get(path)


class Alone:
    """A VFS, its opener, and a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.opener = Opener()
        self.vfs_name, self.own_name = next(_names), next(_names)
        self.vfs = BottomlessVFS(self.opener, self.vfs_name)
        self.own = OwnVFS(self.opener, self.own_name)
        self.connections: list[apsw.Connection] = []

    @property
    def events(self) -> list[str]:
        return self.opener.events

    def path(self, file: str = "app.db") -> str:
        return str(self.directory / file)

    def uri(self, file: str) -> str:
        return f"file:{self.path(file)}?vfs={self.vfs_name}"

    def listener(self, file: str = "app.db") -> Listener:
        return self.opener.listeners[self.path(file)]

    def open(self, name: str, flags: int = FLAGS) -> apsw.Connection:
        """A connection, as the connection hook of the package would prepare it."""
        con = apsw.Connection(name, flags=flags, vfs=self.vfs_name)
        self.connections.append(con)
        self.vfs.watch(con)
        return con

    def connect(self, file: str = "app.db") -> apsw.Connection:
        """In WAL mode, with a table; the events so far are forgotten."""
        con = self.open(self.path(file))
        con.execute("PRAGMA journal_mode=wal").fetchall()
        con.execute("CREATE TABLE IF NOT EXISTS t(id INTEGER PRIMARY KEY, x)")
        self.events.clear()
        return con

    def stock(self, file: str = "app.db") -> apsw.Connection:
        """A connection that the VFS does not see."""
        con = apsw.Connection(self.path(file), vfs="unix")
        self.connections.append(con)
        return con


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Alone]:
    made = Alone(tmp_path.resolve())
    yield made
    for listener in made.opener.listeners.values():
        listener.act.clear()
    for con in made.connections:
        con.close(True)
    made.connections.clear()
    made.vfs.unregister()
    made.own.unregister()
    assert parked._parked == {}, "an error outlives its connection"


def _raiser(error: BaseException) -> Callable[..., object]:
    def act(*arguments: object) -> None:
        raise error

    return act


def _count(con: apsw.Connection, table: str = "t") -> int:
    return int(con.execute(f"SELECT count(*) FROM {table}").get)


# --- opening ---------------------------------------------------------------------------------------------------------------


def test_the_opener_is_asked_with_what_the_application_gave(alone: Alone) -> None:
    alone.connect().close()
    os.symlink(alone.path(), alone.path("link.db"))
    alone.opener.opened.clear()
    alone.open(f"file:{alone.path('link.db')}?ack=log&level=3")
    alone.open(alone.path(), flags=apsw.SQLITE_OPEN_READONLY)
    assert alone.opener.opened == [
        ("app.db", "link.db", {"ack": "log", "level": "3"}, True),
        ("app.db", "app.db", {}, False),
    ]


def test_a_refused_open_reaches_the_caller_and_leaves_no_file(alone: Alone) -> None:
    alone.opener.refusal = ConfigError("not this one")
    with pytest.raises(ConfigError, match="not this one"):
        alone.open(alone.path())
    assert not os.path.exists(alone.path())
    assert alone.events == []


def test_a_file_without_a_listener_and_an_own_connection_are_not_watched(alone: Alone) -> None:
    con = alone.connect()
    own = apsw.Connection(alone.path(), vfs=alone.own_name)
    alone.connections.append(own)
    own.execute("INSERT INTO t(x) VALUES (1)")
    reader = alone.open(alone.path(), flags=apsw.SQLITE_OPEN_READONLY)
    assert _count(reader) == _count(con) == 1
    reader.close()
    own.close()
    assert alone.events == []


# --- commits ---------------------------------------------------------------------------------------------------------------


def _blob(con: apsw.Connection) -> None:
    with con.blob_open("main", "t", "x", 1, True) as blob:
        blob.write(b"1")


def _backup(con: apsw.Connection) -> None:
    source = apsw.Connection(":memory:")
    source.execute("CREATE TABLE t(x); INSERT INTO t VALUES (1)")
    with con.backup("main", source, "main") as backup:
        backup.step()


@pytest.mark.parametrize(
    "commit",
    [
        lambda con: con.execute("INSERT INTO t(x) VALUES (2)"),
        lambda con: con.execute("BEGIN; INSERT INTO t(x) VALUES (2); COMMIT"),
        lambda con: con.execute("SAVEPOINT s; INSERT INTO t(x) VALUES (2); RELEASE s"),
        lambda con: con.execute("INSERT INTO t(x) VALUES (2) RETURNING id").fetchall(),
        lambda con: con.execute("VACUUM"),
        _blob,
        _backup,
    ],
    ids=["statement", "transaction", "savepoint", "returning", "vacuum", "blob", "backup"],
)
def test_a_commit_of_any_kind_is_reported_once(alone: Alone, commit: Callable[[apsw.Connection], object]) -> None:
    con = alone.connect()
    con.execute("INSERT INTO t VALUES (1, zeroblob(9))")
    alone.events.clear()
    commit(con)
    assert alone.events == ["app.db commit"]


def test_a_rollback_and_a_read_are_not_reported(alone: Alone) -> None:
    con = alone.connect()
    con.execute("BEGIN; INSERT INTO t(x) VALUES (1); ROLLBACK")
    assert _count(con) == 0
    assert alone.events == []


def test_a_commit_is_reported_when_it_stands_and_the_write_lock_is_free(alone: Alone) -> None:
    con, other = alone.connect(), alone.stock()
    seen: list[int] = []

    def act() -> None:
        seen.append(_count(other))
        other.execute("BEGIN IMMEDIATE; ROLLBACK")

    alone.listener().act["commit"] = act
    con.execute("INSERT INTO t(x) VALUES (1)")
    assert seen == [1], "the statement has returned before the listener"


def test_during_a_commit_the_wal_cannot_be_restarted(alone: Alone) -> None:
    con, other = alone.connect(), alone.stock()
    other.set_busy_timeout(0)
    assert _count(other) == 0  # a checkpoint on a connection that has never read does nothing
    refused: list[str] = []

    def act() -> None:
        try:
            other.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_RESTART)
        except apsw.BusyError as error:
            refused.append(str(error))

    alone.listener().act["commit"] = act
    con.execute("INSERT INTO t(x) VALUES (1)")
    assert len(refused) == 1


def test_a_statement_within_a_commit_is_refused(alone: Alone) -> None:
    con = alone.connect()
    refused: list[BaseException] = []

    def act() -> None:
        try:
            con.execute("SELECT 1")
        except apsw.Error as error:
            refused.append(error)

    alone.listener().act["commit"] = act
    con.execute("INSERT INTO t(x) VALUES (1)")
    assert [type(error) for error in refused] == [apsw.ThreadingViolationError]
    assert con.exec_trace is None


# --- errors ----------------------------------------------------------------------------------------------------------------


def test_an_error_is_raised_as_itself_once_and_the_commit_stands(alone: Alone) -> None:
    con = alone.connect()
    error = ReplicationError("not stored")
    alone.listener().act["commit"] = _raiser(error)
    with pytest.raises(ReplicationError) as caught:
        con.execute("INSERT INTO t(x) VALUES (1)")
    assert caught.value is error
    alone.listener().act.clear()
    assert _count(con) == 1
    con.execute("INSERT INTO t(x) VALUES (2)")
    assert alone.events == ["app.db commit", "app.db failed: ReplicationError", "app.db commit"]


def test_an_error_of_sqlite_comes_out_as_another(alone: Alone) -> None:
    con = alone.connect()
    alone.listener().act["commit"] = _raiser(apsw.BusyError("of the listener"))
    with pytest.raises(ReplicationError, match="is not known to be stored") as caught:
        con.execute("INSERT INTO t(x) VALUES (1)")
    assert isinstance(caught.value.__cause__, apsw.BusyError)
    assert not con.in_transaction


def test_while_another_schema_writes_the_error_waits_for_the_wal_hook(alone: Alone) -> None:
    con = alone.connect()
    alone.connect("other.db").close()
    con.execute(f"ATTACH '{alone.uri('other.db')}' AS other")
    alone.events.clear()
    alone.listener().act["commit"] = _raiser(ReplicationError("the first is not stored"))
    with pytest.raises(ReplicationError, match="the first is not stored"):
        con.execute("BEGIN; INSERT INTO main.t(x) VALUES (1); INSERT INTO other.t(x) VALUES (1); COMMIT")
    assert alone.events == ["other.db restart", "app.db commit", "app.db failed: ReplicationError", "other.db commit"]
    for schema in ("main", "other"):
        assert _count(con, f"{schema}.t") == 1
        assert con.execute(f"PRAGMA {schema}.integrity_check").get == "ok"


@pytest.mark.parametrize("is_stored", [False, True])
def test_an_error_that_no_caller_received_is_raised_at_the_next_statement(
    alone: Alone, monkeypatch: pytest.MonkeyPatch, is_stored: bool
) -> None:
    monkeypatch.setattr("sys.unraisablehook", lambda unraisable: None)
    con = alone.connect()
    alone.listener().act["commit"] = _raiser(ReplicationError("not stored"))
    next(con.execute("INSERT INTO t(x) VALUES (1) RETURNING id"))  # committed when the cursor is deallocated
    alone.listener().act.clear()
    alone.listener().is_stored = is_stored
    if not is_stored:
        with pytest.raises(ReplicationError, match="an earlier commit of this connection was not acknowledged"):
            con.execute("SELECT 1")
    assert _count(con) == 1


def test_an_error_that_no_caller_received_is_raised_at_the_close(alone: Alone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.unraisablehook", lambda unraisable: None)
    con = alone.connect()
    alone.listener().act["commit"] = _raiser(ReplicationError("not stored"))
    next(con.execute("INSERT INTO t(x) VALUES (1) RETURNING id"))
    with pytest.raises(ReplicationError, match="an earlier commit of this connection was not acknowledged"):
        con.close()
    assert alone.events[-1] == "app.db close"


@pytest.mark.parametrize("suffix", ["", "-wal"])
def test_a_commit_to_files_that_are_gone_is_refused_without_the_listener(alone: Alone, suffix: str) -> None:
    con = alone.connect()
    os.unlink(alone.path() + suffix)
    with pytest.raises(FilesLostError):
        con.execute("INSERT INTO t(x) VALUES (1)")
    assert alone.events == ["app.db failed: FilesLostError"]


def test_within_look_seconds_the_files_are_not_looked_at(alone: Alone) -> None:
    con = alone.connect()
    con.execute("INSERT INTO t(x) VALUES (1)")
    alone.listener().look_seconds = 3600.0
    os.unlink(alone.path() + "-wal")
    con.execute("INSERT INTO t(x) VALUES (2)")
    assert alone.events == ["app.db commit"] * 2


# --- the WAL ---------------------------------------------------------------------------------------------------------------


def test_a_restart_is_reported_before_the_header_is_written(alone: Alone) -> None:
    con = alone.connect()
    con.execute("INSERT INTO t(x) VALUES (1)")
    con.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_FULL)
    alone.events.clear()
    wal = Path(alone.path() + "-wal")
    before = wal.read_bytes()
    seen: list[tuple[bool, WalHeader]] = []
    alone.listener().act["reset"] = lambda new: seen.append((wal.read_bytes() == before, new))
    con.execute("INSERT INTO t(x) VALUES (2)")
    assert alone.events == ["app.db restart", "app.db commit"]
    assert seen == [(True, WalHeader.parse(wal.read_bytes()[:32]))]
    assert before[:32] != wal.read_bytes()[:32]


def test_a_truncation_is_reported_before_it_happens(alone: Alone) -> None:
    con = alone.connect()
    con.execute("INSERT INTO t(x) VALUES (1)")
    alone.events.clear()
    sizes: list[int] = []
    alone.listener().act["reset"] = lambda new: sizes.append(os.path.getsize(alone.path() + "-wal"))
    con.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    assert alone.events == ["app.db gone"]
    assert sizes[0] > 0 == os.path.getsize(alone.path() + "-wal")


def test_the_deletion_by_the_last_close_is_reported_before_it_happens(alone: Alone) -> None:
    con = alone.connect()
    there: list[bool] = []
    alone.listener().act["reset"] = lambda new: there.append(os.path.exists(alone.path() + "-wal"))
    con.close()
    assert alone.events == ["app.db gone", "app.db close"]
    assert there == [True]
    assert not os.path.exists(alone.path() + "-wal")


def test_an_own_connection_reports_what_it_does_to_the_wal(alone: Alone) -> None:
    con = alone.connect()
    con.execute("INSERT INTO t(x) VALUES (1)")
    alone.events.clear()
    own = apsw.Connection(alone.path(), vfs=alone.own_name)
    alone.connections.append(own)
    own.execute("SELECT * FROM t").fetchall()
    own.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    assert alone.events == ["app.db gone"]


def test_a_reset_that_cannot_be_noted_does_not_happen(alone: Alone) -> None:
    con = alone.connect()
    con.execute("INSERT INTO t(x) VALUES (1)")
    alone.listener().act["reset"] = _raiser(ReplicationError("cannot note it"))
    with pytest.raises(ReplicationError, match="cannot note it"):
        con.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    assert os.path.getsize(alone.path() + "-wal") > 0


def test_the_wal_hook_checkpoints_and_reports_it(alone: Alone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vfs, "AUTOCHECKPOINT_FRAMES", 8)
    con = alone.connect()
    con.execute("INSERT INTO t(x) VALUES (1)")
    assert alone.events == ["app.db commit"]
    con.execute("INSERT INTO t(x) VALUES (zeroblob(100000))")
    assert [event.partition(" of ")[0] for event in alone.events[1:]] == ["app.db commit", "app.db checkpoint"]
    done, backfilled = con.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
    assert done == backfilled > 8


# --- what would slip past the WAL ------------------------------------------------------------------------------------------


def test_a_write_in_rollback_mode_is_refused(alone: Alone) -> None:
    con = alone.open(alone.path())
    with pytest.raises(ConfigError, match="is not in WAL mode"):
        con.execute("CREATE TABLE t(x)")
    assert os.path.getsize(alone.path()) == 0
    assert alone.events == []


def test_the_switch_to_wal_mode_is_reported_as_a_rewrite(alone: Alone) -> None:
    con = alone.open(alone.path())
    con.execute("PRAGMA journal_mode=wal").fetchall()
    assert alone.events == ["app.db rewritten"]
    con.execute("PRAGMA journal_mode=wal").fetchall()
    con.execute("CREATE TABLE t(x)")
    assert "app.db commit" in alone.events
    assert alone.events.count("app.db rewritten") == 1


@pytest.mark.parametrize("pragma", ["journal_mode=delete", "journal_mode='off'", "main.journal_mode=MEMORY", "locking_mode=EXCLUSIVE"])
def test_pragmas_that_leave_the_wal_or_lock_others_out_are_refused(alone: Alone, pragma: str) -> None:
    con = alone.connect()
    with pytest.raises(ConfigError, match="is refused"):
        con.execute(f"PRAGMA {pragma}").fetchall()
    assert con.execute("PRAGMA journal_mode").get == "wal"
    assert con.execute("PRAGMA locking_mode").get == "normal"


# --- closing ---------------------------------------------------------------------------------------------------------------


def test_each_open_has_one_close(alone: Alone) -> None:
    first, second = alone.connect(), alone.connect()
    first.close()
    assert alone.events == ["app.db close"]
    second.close()
    second.close()
    assert alone.events == ["app.db close", "app.db gone", "app.db close"]


def test_a_deallocated_connection_says_so(alone: Alone) -> None:
    alone.connect()
    alone.connections.clear()
    gc.collect()
    assert alone.events[-1] == "app.db deallocated"


def test_an_error_of_the_close_reaches_the_caller(alone: Alone) -> None:
    con = alone.connect()
    alone.listener().act["close"] = _raiser(FilesLostError("commits were lost"))
    with pytest.raises(FilesLostError, match="commits were lost"):
        con.close()


def test_in_the_child_of_a_fork_an_inherited_connection_is_refused(alone: Alone) -> None:
    con = alone.connect()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            con.execute("INSERT INTO t(x) VALUES (1)")
        except ReplicationError as error:
            code = 0 if "before a fork" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert alone.events == []
