"""Several writers on one history, in processes and directories of their own: one goes on, the others are told, and write nothing more."""

from __future__ import annotations

import email.utils
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bottomless_wal.core.config import Config
from bottomless_wal.history.compaction import snapshot
from bottomless_wal.history.log import RemoteLog
from bottomless_wal.storage import open_store
from tests.support.cluster import Machine, World, rows, until
from tests.support.endpoints import endpoint_of
from tests.support.faultproxy import ALWAYS, Fault, FaultProxy
from tests.support.forkserver import Child, fork, obedient

INSERT = "con.execute('INSERT INTO t VALUES (?, randomblob(500))', ({!r},))"


def _writer(world: World, machine: Machine, **options: object) -> Child:
    """A process that has the database of `machine` open."""
    child = obedient(options={**world.options, **options})
    assert child.do(f"con = connect({machine.path()!r})") == "ok", child.said
    return child


def _inserts(child: Child, name: str) -> str:
    return child.do(INSERT.format(name))


def _history(world: World, machine: Machine) -> Child:
    """A writer that has begun a history."""
    child = _writer(world, machine)
    assert child.do("con.execute('CREATE TABLE t(name, x)')") == "ok", child.said
    assert _inserts(child, "first") == "ok", child.said
    return child


def _clone(world: World, machine: Machine) -> Machine:
    """The directory, copied as it is, its local index too."""
    clone = world.machine()
    for entry in machine.directory.iterdir():
        if not entry.name.endswith("-shm"):
            shutil.copy2(entry, clone.directory)
    return clone


def _names(world: World) -> list[str]:
    """What a machine that has lost everything gets back."""
    con = world.machine().connect()
    try:
        assert rows(con, "PRAGMA integrity_check") == "ok"
        assert world.bucket.log_image("app.db") == con.serialize("main")
        return [name for (name,) in con.execute("SELECT name FROM t ORDER BY rowid")]
    finally:
        con.close()


def _stops(child: Child, point: str, command: str) -> None:
    """Has it do `command` until it is stopped at `point`."""
    assert child.do(f"die_at({point!r}, 0, signal.SIGSTOP)") == "ok", child.said
    child.tell(command)
    until(lambda: Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T", 60)


def _command(world: World, *arguments: str) -> str:
    """The command line, as it is run by hand."""
    environ = {
        **os.environ,
        "LIBSQL_BOTTOMLESS_ENDPOINT": str(world.options["endpoint"]),
        "LIBSQL_BOTTOMLESS_BUCKET": str(world.options["bucket"]),
    }
    done = subprocess.run(
        [sys.executable, "-m", "bottomless_wal", *arguments], env=environ, capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- clones ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("any_world", "copied", "way"),
    [
        ("directory", "closed", "force"),
        ("directory", "running", "force"),
        ("directory", "pending", "restore"),
        ("directory", "pending", "force"),
        ("moto", "running", "restore"),
    ],
    indirect=["any_world"],
)
def test_of_a_directory_and_its_copy_one_goes_on(any_world: World, copied: str, way: str) -> None:
    world = any_world
    here = world.machine()
    one = _history(world, here)
    if copied == "closed":
        one.end()
    elif copied == "pending":
        # It is stopped with the commit's frames in the WAL and its intent in the index, and nothing stored.
        _stops(one, "before put", INSERT.format("pending"))
    copy = _clone(world, here)
    if copied == "closed":
        one = _writer(world, here)
    other = _writer(world, copy)
    assert _inserts(other, "other") == "ok", other.said
    if copied == "pending":
        one.signal(signal.SIGCONT)
        # The copy has stored that very commit: it is this one's own by its content, but the history has gone on.
        assert one.told() == "FencedError"
    expected = ["first", "pending", "other"] if copied == "pending" else ["first", "other"]
    before = world.bucket.content()
    for command in (INSERT.format("mine"), INSERT.format("mine too"), "bottomless_wal.flush(con)", "con.execute('VACUUM')"):
        assert one.do(command) == "FencedError", (command, one.said)
    one.end()
    again = obedient(options=world.options)
    assert again.do(f"connect({here.path()!r})") == "ConflictError", again.said
    again.end()
    assert world.bucket.content() == before, "who has lost writes nothing: no commit, no page object, nothing at its close or exit"
    assert _names(world) == expected
    # On purpose it goes on, and then the other one has lost.
    if way == "restore":
        assert "restored at txid" in _command(world, "restore", here.path(), "--force")
        one = _writer(world, here)
        assert _inserts(one, "again") == "ok", one.said
        expected = [*expected, "again"]
    else:
        one = _writer(world, here, initial_replication="force")
        expected = [*[name for name in expected if name != "other"], "mine", "mine too"]
    assert one.do("bottomless_wal.flush(con)") == "ok", one.said
    before = world.bucket.content()
    assert _inserts(other, "too late") == "FencedError", other.said
    other.end()
    assert world.bucket.content() == before
    one.end()
    assert _names(world) == expected
    world.comes_back(here)


# --- the same beginning ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("any_world", "size"), [("directory", 150000), ("moto", 100)], ids=["with a body", "small, on a server"], indirect=["any_world"]
)
def test_of_two_initial_replications_one_wins_and_the_other_is_told(any_world: World, size: int) -> None:
    world = any_world
    machines = [world.machine(), world.machine()]
    for n, machine in enumerate(machines):
        stock = machine.stock()
        stock.execute(f"PRAGMA page_size={65536 if size > 10000 else 4096}; CREATE TABLE t(name, x)")
        stock.executemany("INSERT INTO t VALUES (?, randomblob(?))", ((str(n), size) for _ in range(60)))
        stock.close()
    late = obedient(options=world.options)
    _stops(late, "before put", f"con = connect({machines[1].path()!r})")
    winner = _writer(world, machines[0])
    assert _inserts(winner, "more") == "ok", winner.said
    assert winner.do("bottomless_wal.flush(con)") == "ok", winner.said
    before = world.bucket.content()
    late.signal(signal.SIGCONT)
    assert late.told() in ("FencedError", "ConflictError"), late.said
    content = machines[1].content()
    assert late.do(f"con = connect({machines[1].path()!r})") == "ConflictError", late.said
    late.end()
    assert world.bucket.content() == before
    assert machines[1].content() == content
    winner.end()
    assert _names(world) == ["0"] * 60 + ["more"]
    world.comes_back(machines[0])


# --- a long pause --------------------------------------------------------------------------------------------------------------------


def test_who_was_stopped_for_hours_before_its_put_does_not_acknowledge(
    request: pytest.FixtureRequest, own_environment: None, tmp_path: Path
) -> None:
    """Meanwhile another has gone on, and its commits were pruned: the key is free again, and the server takes the stale commit."""
    endpoint = endpoint_of("moto", request)
    options = {"endpoint": endpoint.url, "bucket": endpoint.bucket, "create_bucket": True, "retry_timeout": 20.0}
    world = World(endpoint, tmp_path, options)
    with FaultProxy(endpoint.url) as proxy:
        here = world.machine()
        stale = obedient(options={**options, "endpoint": proxy.url})
        assert stale.do(f"con = connect({here.path()!r}); con.execute('CREATE TABLE t(name, x)')") == "ok", stale.said
        assert _inserts(stale, "first") == "ok", stale.said
        _stops(stale, "before put", INSERT.format("stale"))
        rival = _writer(world, world.machine())
        for n in range(3):
            assert _inserts(rival, f"rival {n}") == "ok", rival.said
        rival.end()
        head = world.bucket.head("app.db")
        _prune(world, head)
        proxy.script(Fault(times=ALWAYS, edit=_two_hours_later))
        stale.signal(signal.SIGCONT)
        assert stale.told() == "FencedError", stale.said
        assert "pruned" in stale.said
        before = world.bucket.content()
        assert _inserts(stale, "once more") == "FencedError", stale.said
        stale.end()
    assert world.bucket.content() == before
    assert _names_of_the_head(world) == ["first", "rival 0", "rival 1", "rival 2"]
    assert world.bucket.head("app.db") == head


def test_who_was_stopped_before_its_page_objects_puts_none_over_newer_ones(world: World) -> None:
    here = world.machine()
    stale = obedient(options=world.options)
    assert stale.do(f"con = connect({here.path()!r}); con.execute('CREATE TABLE t(name, x)')") == "ok", stale.said
    assert stale.do("import bottomless_wal.replication.fencing; bottomless_wal.replication.fencing._PAUSE_SECONDS = 0.0") == "ok"
    _stops(stale, "before view", INSERT.format("stale"))
    rival = _writer(world, world.machine())
    assert _inserts(rival, "rival") == "ok", rival.said
    rival.end()
    before = world.bucket.content()
    stale.signal(signal.SIGCONT)
    assert stale.told() == "FencedError", stale.said
    stale.end()
    assert world.bucket.content() == before
    assert _names(world) == ["stale", "rival"]


def _prune(world: World, head: int) -> None:
    """What is left is a snapshot of the head, and the head's own commit."""
    store = open_store(Config.load(world.options, environ={}))
    history = RemoteLog(store, "app.db")
    assert snapshot(history, history.edges(), head) is not None
    store.close()
    for pre, post in world.bucket.edges("app.db"):
        if pre and post < head:
            world.bucket.delete(f"app.db-wal/{pre:016x}-{post:016x}")


def _two_hours_later(answer: bytes) -> bytes:
    head, separator, body = answer.partition(b"\r\n\r\n")
    date = email.utils.formatdate(time.time() + 7200, usegmt=True).encode()
    return re.sub(rb"(?im)^date: [^\r]*", b"Date: " + date, head) + b"\r\nConnection: close" + separator + body


def _names_of_the_head(world: World) -> list[str]:
    """As `_names`, where the log is more than one chain of commits."""
    con = world.machine().connect()
    try:
        return [name for (name,) in con.execute("SELECT name FROM t ORDER BY rowid")]
    finally:
        con.close()


# --- a server without conditions -----------------------------------------------------------------------------------------------------


@pytest.fixture
def unconditional(request: pytest.FixtureRequest, own_environment: None, tmp_path: Path) -> World:
    """On a server that ignores `If-None-Match`."""
    endpoint = endpoint_of("rclone", request)
    return World(endpoint, tmp_path, {"endpoint": endpoint.url, "bucket": endpoint.bucket, "create_bucket": True, "retry_timeout": 20.0})


def test_where_the_server_knows_no_condition_the_head_is_looked_at_before_each_put(unconditional: World) -> None:
    world = unconditional
    one = _history(world, world.machine())
    _stops(one, "before put", INSERT.format("one"))
    other = _writer(world, world.machine())
    assert _inserts(other, "other") == "ok", other.said
    other.end()
    before = world.bucket.content()
    one.signal(signal.SIGCONT)
    assert one.told() == "FencedError", one.said
    one.end()
    assert "create-only writes" in one.errors, "the warning is there"
    assert world.bucket.content() == before
    assert _names(world) == ["first", "other"]


def test_what_passes_unseen_between_that_look_and_the_put_is_found_by_the_next_commit(unconditional: World) -> None:
    """The window in the limits, as wide as one request can be delayed: what was lost in it is told, loudly, as soon as anybody looks."""
    world = unconditional
    with FaultProxy(str(world.options["endpoint"])) as proxy:
        machine = world.machine()
        one = obedient(options={**world.options, "endpoint": proxy.url})
        assert one.do(f"con = connect({machine.path()!r}); con.execute('CREATE TABLE t(name, x)')") == "ok", one.said
        released = threading.Event()
        other = _writer(world, world.machine())
        proxy.script(Fault("PUT", path="-wal/", hold=released))
        one.tell(INSERT.format("one"))
        until(lambda: proxy.count("HEAD", "0000000000000001-0000000000000002") > 0, 60)
        until(lambda: proxy.count("PUT", "0000000000000001-0000000000000002") > 0, 60)
        assert _inserts(other, "other") == "ok", other.said
        released.set()
        assert one.told() == "ok", one.said
        # Both were told "stored", and one segment is there. The loser finds its history gone with its next commit.
        assert _inserts(one, "one more") == "ok", one.said
        assert _inserts(other, "other more") == "FencedError", other.said
        one.end()
        other.end()
    assert _names(world) == ["one", "one more"]


# --- many --------------------------------------------------------------------------------------------------------------------------

# argv: path, a tag, how many rows. Whoever is fenced re-bases itself on what is stored, and tries again.
CONTENDER = """
path, tag, wanted = argv[0], argv[1], int(argv[2])
fenced = done = 0
con = connect(path)
while done < wanted:
    name = f"{tag} {done + fenced}"
    try:
        con.execute("INSERT INTO t VALUES (?, randomblob(300))", (name,))
        print("row", name, flush=True)
        done += 1
        continue
    except bottomless_wal.FencedError:
        fenced += 1
    try:
        con.execute("INSERT INTO t VALUES (?, 0)", ("never",))
        print("row never", flush=True)
    except bottomless_wal.FencedError:
        con.close()
    bottomless_wal.restore(path, force=True, **options)
    con = connect(path)
print("fenced", fenced, flush=True)
"""


def test_three_that_contend_under_load_make_one_chain_of_what_was_acknowledged(world: World) -> None:
    here = world.machine()
    _history(world, here).end()
    machines = [here, _clone(world, here), _clone(world, here)]
    contenders = [fork(CONTENDER, machine.path(), tag, "8", options=world.options) for machine, tag in zip(machines, "abc", strict=True)]
    acknowledged, fenced = {"first"}, 0
    for contender in contenders:
        for line in contender.end(120)[1]:
            word, _, rest = line.partition(" ")
            if word == "row":
                acknowledged.add(rest)
            else:
                fenced += int(rest)
    names = _names(world)
    assert sorted(names) == sorted(acknowledged), "of what was acknowledged nothing is lost, of the rest nothing is there"
    assert fenced, "they have never met"
    for pre, post in world.bucket.edges("app.db"):
        assert post == pre + 1
    for machine in machines:
        con = machine.connect()  # whoever has lost last has re-based itself: an earlier state of the one history
        assert sorted(name for (name,) in con.execute("SELECT name FROM t")) == sorted(names)
        con.close()


# --- the same change at the same time --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_kind", ["directory", "moto"])
@pytest.mark.parametrize("second", ["restored", "a copied directory"])
def test_two_machines_that_make_the_same_change_are_two_writers(
    request: pytest.FixtureRequest, own_environment: None, tmp_path: Path, world_kind: str, second: str
) -> None:
    """Equal commits have equal hashes: one of them is stored, and the other machine is told, not acknowledged."""
    endpoint = endpoint_of(world_kind, request)
    world = World(endpoint, tmp_path, {"endpoint": endpoint.url, "bucket": endpoint.bucket, "create_bucket": True, "pages": "off"})
    here = world.machine()
    one = _writer(world, here)
    assert one.do("con.execute('CREATE TABLE c(n); INSERT INTO c VALUES (0)')") == "ok", one.said
    if second == "restored":
        there = world.machine()
    else:
        one.end()
        there = _clone(world, here)
        one = _writer(world, here)
    two = _writer(world, there)
    increment = "con.execute('UPDATE c SET n = n + 1')"
    acknowledged = [child.do(increment) for child in (one, two, one, two, two, one)]
    assert acknowledged[0] == "ok", one.said
    assert [answer == "ok" for answer in acknowledged] == [True, False, True, False, False, True], "the fence holds at the first commit"
    assert all("FencedError" in answer for answer in acknowledged if answer != "ok"), acknowledged
    one.end()
    two.end()
    con = world.machine().connect()
    assert rows(con, "SELECT n FROM c") == 3
    con.close()


def test_two_machines_that_begin_with_the_same_first_commit_are_two_writers(world: World) -> None:
    one, two = (_writer(world, world.machine(), pages="off") for _ in range(2))
    first = "con.execute('CREATE TABLE IF NOT EXISTS t(x)')"
    assert one.do(first) == "ok", one.said
    assert "FencedError" in two.do(first)
    one.end()
    two.end()


def test_an_attempt_that_a_copied_directory_has_too_is_one_commit_of_both(world: World) -> None:
    """The copy was made while the answer to an attempt was lost: what it adopts is the commit that it holds itself. Then one goes on."""
    here = world.machine()
    one = _history(world, here)
    _stops(one, "before put", INSERT.format("pending"))
    there = _clone(world, here)
    os.kill(one.pid, signal.SIGCONT)
    until(lambda: world.bucket.head("app.db") == 3)
    two = _writer(world, there)
    assert _inserts(two, "the copy") == "ok", two.said
    assert one.told() == "ok", one.said
    assert one.do("import bottomless_wal.core.failpoints as points; points.disarm()") == "ok", one.said
    assert "FencedError" in _inserts(one, "the original")
    one.end()
    two.end()
    assert _names(world) == ["first", "pending", "the copy"]
