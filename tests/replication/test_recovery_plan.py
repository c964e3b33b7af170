"""The decision table of booting: as a pure function, row by row, and each row again from end to end."""

from __future__ import annotations

import itertools
import logging
import shutil

import apsw
import pytest

import bottomless_wal
from bottomless_wal import ConflictError, FencedError, ReplicationError
from bottomless_wal.core import logs
from bottomless_wal.replication.lineage import Lineage
from bottomless_wal.replication.recovery import Recovery
from bottomless_wal.replication.recovery_plan import Action, Remote, decide
from tests.support.cluster import Machine, World, child, refusal, rows

POLICIES = ("error", "force", "skip")

# (local is empty, what the bucket holds, relation, policy) -> action; None stands for "whatever".
TABLE: list[tuple[bool, Remote, Lineage | None, str | None, Action]] = [
    (True, Remote.NOTHING, None, None, Action.CREATE),
    (True, Remote.PAGES, None, None, Action.RESTORE_PAGES),
    (True, Remote.HISTORY, None, None, Action.RESTORE),
    (False, Remote.NOTHING, None, None, Action.INITIAL_UPLOAD),
    (False, Remote.PAGES, None, None, Action.INITIAL_UPLOAD),
    (False, Remote.HISTORY, Lineage.AT_HEAD, None, Action.RESUME),
    (False, Remote.HISTORY, Lineage.BEHIND, None, Action.FAST_FORWARD),
    (False, Remote.HISTORY, Lineage.AHEAD, None, Action.CATCH_UP),
    (False, Remote.HISTORY, Lineage.DIVERGED, "error", Action.CONFLICT),
    (False, Remote.HISTORY, Lineage.DIVERGED, "force", Action.RESET),
    (False, Remote.HISTORY, Lineage.DIVERGED, "skip", Action.KEEP_LOCAL),
]


@pytest.mark.parametrize(("empty", "remote", "relation", "policy", "action"), TABLE)
def test_each_row(empty: bool, remote: Remote, relation: Lineage | None, policy: str | None, action: Action) -> None:
    for chosen in POLICIES if policy is None else (policy,):
        assert decide(empty, remote, relation, chosen) is action


def test_the_table_is_complete_and_each_action_is_in_it() -> None:
    for empty, remote, policy in itertools.product((True, False), Remote, POLICIES):
        for relation in Lineage if not empty and remote is Remote.HISTORY else (None,):
            fitting = [row for row in TABLE if row[:2] == (empty, remote) and row[2] in (relation, None) and row[3] in (policy, None)]
            assert len(fitting) == 1, (empty, remote, relation, policy)
    assert {row[4] for row in TABLE} == set(Action)


def test_the_policy_is_asked_in_the_last_row_alone() -> None:
    for empty, remote, relation in itertools.product((True, False), Remote, Lineage):
        answers = {decide(empty, remote, relation, policy) for policy in POLICIES}
        assert len(answers) == (3 if (empty, remote, relation) == (False, Remote.HISTORY, Lineage.DIVERGED) else 1)


# On the directory store with each policy, which must not matter; and on an S3 server.
EVERYWHERE = pytest.mark.parametrize(
    ("two_worlds", "policy"), [*(("directory", policy) for policy in POLICIES), ("moto", "error")], indirect=["two_worlds"]
)
DIVERGED = pytest.mark.parametrize(
    ("two_worlds", "how"),
    [
        ("directory", "another database"),
        ("directory", "overtaken"),
        ("directory", "overtaken while it wrote"),
        ("directory", "written to by another program"),
        ("directory", "an old backup"),
        ("moto", "overtaken"),
    ],
    indirect=["two_worlds"],
)

# --- end to end --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def actions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What each boot in this process has decided."""
    seen: list[str] = []
    real = Recovery.run

    def run(self: Recovery, **more: bool) -> object:
        try:
            return real(self, **more)
        finally:
            seen.append(self.action.name if self.action else "none")

    monkeypatch.setattr(Recovery, "run", run)
    return seen


def _made(world: World, machine: Machine, rows_: int = 3) -> None:
    con = machine.connect()
    con.execute("CREATE TABLE IF NOT EXISTS t(x)")
    for n in range(rows_):
        con.execute("INSERT INTO t VALUES (?)", (n,))
    con.close()


def _history(world: World) -> Machine:
    """A history of four commits, made on a machine that is the returned one."""
    machine = world.machine()
    _made(world, machine)
    return machine


@EVERYWHERE
@pytest.mark.parametrize("missing", [True, False], ids=["missing", "empty"])
def test_nothing_here_and_nothing_there(two_worlds: World, actions: list[str], policy: str, missing: bool) -> None:
    here = two_worlds.machine()
    if not missing:
        open(here.path(), "wb").close()
    con = here.connect(initial_replication=policy)
    assert actions == ["CREATE"]
    assert two_worlds.bucket.listing() == []
    con.execute("CREATE TABLE t(x)")
    assert two_worlds.bucket.edges("app.db") == [(0, 1)]
    con.close()
    two_worlds.comes_back(here)


@EVERYWHERE
@pytest.mark.parametrize("missing", [True, False], ids=["missing", "empty"])
def test_nothing_here_and_a_history_there(two_worlds: World, actions: list[str], policy: str, missing: bool) -> None:
    lost = _history(two_worlds)
    before = two_worlds.bucket.content()
    here = two_worlds.machine()
    if not missing:
        open(here.path(), "wb").close()
    actions.clear()
    con = here.connect(initial_replication=policy)
    assert actions == ["RESTORE"]
    assert rows(con) == 3
    assert two_worlds.bucket.content() == before, "restoring writes nothing"
    con.execute("INSERT INTO t VALUES (3)")
    assert two_worlds.bucket.edges("app.db")[-1] == (4, 5)
    con.close()
    assert here.content() != lost.content()
    two_worlds.comes_back(here)


@EVERYWHERE
@pytest.mark.parametrize("journal", ["wal", "delete"])
def test_a_database_here_and_nothing_there(two_worlds: World, actions: list[str], policy: str, journal: str) -> None:
    here = two_worlds.machine()
    stock = here.stock()
    stock.execute(f"PRAGMA journal_mode={journal}").fetchall()
    stock.execute("CREATE TABLE t(x)")
    stock.executemany("INSERT INTO t VALUES (randomblob(3000))", [()] * 20)
    stock.close()
    con = here.connect(initial_replication=policy)
    assert actions == ["INITIAL_UPLOAD"]
    assert two_worlds.bucket.edges("app.db") == [(0, 1)], "the whole database is one edge"
    assert con.execute("PRAGMA journal_mode").get == "wal"
    bottomless_wal.flush(con)
    two_worlds.stored(con)
    con.execute("INSERT INTO t VALUES (1)")
    con.close()
    two_worlds.comes_back(here)


@EVERYWHERE
@pytest.mark.parametrize("index", ["kept", "lost"])
def test_the_head_here(two_worlds: World, actions: list[str], policy: str, index: str) -> None:
    here = _history(two_worlds)
    if index == "lost":
        (here.directory / "app.db-bottomless").unlink()
    before = two_worlds.bucket.content()
    actions.clear()
    con = here.connect(initial_replication=policy)
    assert actions == ["RESUME"]
    assert two_worlds.bucket.content() == before
    con.execute("INSERT INTO t VALUES (3)")
    con.close()
    two_worlds.comes_back(here)


@EVERYWHERE
@pytest.mark.parametrize("index", ["kept", "lost"])
def test_an_earlier_state_here(two_worlds: World, actions: list[str], policy: str, index: str, caplog: pytest.LogCaptureFixture) -> None:
    old = _history(two_worlds)
    earlier = two_worlds.bucket.edges("app.db")[-1][1]
    there = two_worlds.machine()
    _made(two_worlds, there, 5)
    if index == "lost":
        (old.directory / "app.db-bottomless").unlink()
    before = two_worlds.bucket.content()
    actions.clear()
    con = old.connect(initial_replication=policy)
    assert actions == ["FAST_FORWARD"]
    logs.drain(5)
    (said,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert f"was at txid {earlier}," in said
    assert f"head, txid {two_worlds.bucket.edges('app.db')[-1][1]}" in said
    assert rows(con) == 8
    assert two_worlds.bucket.content() == before
    con.execute("INSERT INTO t VALUES (3)")
    con.close()
    two_worlds.comes_back(old)


def _pending(world: World) -> Machine:
    """A machine whose file has gone on from the head, by commits that nobody heard of."""
    here = _history(world)
    con = here.connect()
    refusal(con).log()
    for n in range(2):
        try:
            con.execute("INSERT INTO t VALUES (?)", (n,))
        except ReplicationError:
            continue
    con.close()
    return here


@EVERYWHERE
def test_a_descendant_of_the_head_here(two_worlds: World, actions: list[str], policy: str) -> None:
    here = _history(two_worlds)
    here.stock_killed("INSERT INTO t VALUES (9); PRAGMA user_version=9")
    actions.clear()
    con = here.connect(initial_replication=policy)
    assert actions == ["CATCH_UP"]
    assert two_worlds.bucket.edges("app.db")[-1] == (4, 5), "the difference is the next commit"
    assert two_worlds.bucket.log_image("app.db") == con.serialize("main")
    con.execute("INSERT INTO t VALUES (3)")
    con.close()
    two_worlds.comes_back(here)


@EVERYWHERE
def test_pending_commits_here(two_worlds: World, policy: str) -> None:
    here = _pending(two_worlds)
    assert two_worlds.bucket.head("app.db") == 4
    con = here.connect(initial_replication=policy)
    assert two_worlds.bucket.head("app.db") == 5
    assert rows(con) == 5
    con.close()
    two_worlds.comes_back(here)


def _backup_between_batches(world: World) -> Machine:
    """The file is a state that no segment lists, copied back over the file after its last close."""
    here = world.machine()
    con = here.connect(ack="local", interval=60)
    con.execute("CREATE TABLE t(x)")
    bottomless_wal.flush(con)
    con.execute("INSERT INTO t VALUES (1)")
    con.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    backup = here.content()
    con.execute("INSERT INTO t VALUES (2)")
    con.execute("INSERT INTO t VALUES (3)")
    con.close()
    assert len(backup) == len(here.content())
    with open(here.path(), "r+b") as file:  # as cp does it: the same inode
        file.write(backup)
    return here


def _diverged(world: World, how: str) -> Machine:
    if how == "another database":
        machine = world.machine()
        _history(world)
        stock = machine.stock()
        stock.execute("CREATE TABLE other(x); INSERT INTO other VALUES (1)")
        stock.close()
        return machine
    if how == "an old backup":
        return _backup_between_batches(world)
    here = _history(world)
    if how == "written to by another program":
        stranger = here.stock()
        stranger.execute("INSERT INTO t VALUES (9); PRAGMA user_version=9")
        stranger.close()
        return here
    there = world.machine()
    shutil.copy(here.path(), there.path())
    child(f"connect({there.path()!r}).execute('INSERT INTO t VALUES (100)')", options=world.options)
    if how == "overtaken while it wrote":
        con = here.connect()
        con.close()
        child(f"connect({there.path()!r}).execute('INSERT INTO t VALUES (101)')", options=world.options)
    stranger = here.stock()
    stranger.execute("INSERT INTO t VALUES (-1)")
    stranger.close()
    return here


@DIVERGED
def test_diverged_and_the_policy_is_error(two_worlds: World, actions: list[str], how: str) -> None:
    here = _diverged(two_worlds, how)
    before, file = two_worlds.bucket.content(), here.content()
    for _ in range(2):
        actions.clear()
        with pytest.raises(ConflictError) as caught:
            here.connect()
        assert actions == ["CONFLICT"]
    assert here.content() == file, "the local file is untouched"
    assert two_worlds.bucket.content() == before, "and so is the bucket"
    assert "txid" in caught.value.message
    for way in ("restore --force", "reset --from-local", "initial_replication=force", "skip"):
        assert way in caught.value.hint
    stock = here.stock()
    assert stock.execute("PRAGMA integrity_check").get == "ok"


@DIVERGED
def test_diverged_and_the_policy_is_force(two_worlds: World, actions: list[str], how: str) -> None:
    here = _diverged(two_worlds, how)
    head = two_worlds.bucket.head("app.db")
    actions.clear()
    con = here.connect(initial_replication="force")
    assert actions == ["RESET"]
    assert two_worlds.bucket.head("app.db") == head + 1
    assert two_worlds.bucket.segment("app.db", head, head + 1).reset
    assert two_worlds.bucket.log_image("app.db") == con.serialize("main")
    bottomless_wal.flush(con)
    two_worlds.stored(con)
    con.close()
    two_worlds.comes_back(here)


@DIVERGED
def test_diverged_and_the_policy_is_skip(two_worlds: World, actions: list[str], how: str) -> None:
    here = _diverged(two_worlds, how)
    before = two_worlds.bucket.content()
    actions.clear()
    con = here.connect(initial_replication="skip")
    assert actions == ["KEEP_LOCAL"]
    assert two_worlds.bucket.content() == before, "nothing is uploaded at open"
    con.execute("CREATE TABLE IF NOT EXISTS mine(x)")
    assert two_worlds.bucket.log_image("app.db") == con.serialize("main"), "the next commit carries every difference"
    bottomless_wal.flush(con)
    two_worlds.stored(con)
    con.close()
    two_worlds.comes_back(here)


def test_skip_and_then_a_close_without_a_commit_uploads_nothing(world: World) -> None:
    here = _diverged(world, "overtaken")
    before = world.bucket.content()
    con = here.connect(initial_replication="skip")
    con.close()
    assert world.bucket.content() == before


def test_a_diverged_rollback_database_is_not_even_converted(world: World) -> None:
    _history(world)
    here = world.machine()
    stock = here.stock()
    stock.execute("CREATE TABLE other(x); INSERT INTO other VALUES (1)")
    stock.close()
    files = here.files()
    with pytest.raises(ConflictError):
        here.connect()
    assert here.content() == files["app.db"]


def test_force_with_another_page_size(world: World) -> None:
    _history(world)
    here = world.machine()
    stock = here.stock()
    stock.execute("PRAGMA page_size=1024; CREATE TABLE other(x)")
    stock.executemany("INSERT INTO other VALUES (randomblob(700))", [()] * 40)
    stock.close()
    con = here.connect(initial_replication="force")
    assert rows(con, "PRAGMA page_size") == 1024
    bottomless_wal.flush(con)
    world.stored(con)
    con.execute("INSERT INTO other VALUES (1)")
    con.close()
    world.comes_back(here)


def test_skip_with_another_page_size(world: World) -> None:
    _history(world)
    here = world.machine()
    stock = here.stock()
    stock.execute("PRAGMA page_size=1024; CREATE TABLE other(x)")
    stock.executemany("INSERT INTO other VALUES (randomblob(700))", [()] * 40)
    stock.close()
    con = here.connect(initial_replication="skip")
    con.execute("INSERT INTO other VALUES (1)")
    bottomless_wal.flush(con)
    world.stored(con)
    con.close()
    world.comes_back(here)


def test_after_a_reset_the_old_line_is_an_earlier_state(world: World) -> None:
    old = _history(world)
    here = world.machine()
    stock = here.stock()
    stock.execute("CREATE TABLE other(x)")
    stock.close()
    con = here.connect(initial_replication="force")
    con.close()
    con = old.connect()
    assert con.execute("SELECT name FROM sqlite_schema").fetchall() == [("other",)]


def test_a_fence_at_boot_is_no_conflict_and_no_silence(world: World) -> None:
    here = _history(world)
    con = here.connect()
    child(f"connect({world.machine().path()!r}).execute('INSERT INTO t VALUES (100)')", options=world.options)
    with pytest.raises(FencedError):
        con.execute("INSERT INTO t VALUES (1)")
