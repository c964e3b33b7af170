"""Behind its back: power losses, files deleted, replaced and garbled, disks that fill up. What opens again was once true, or it is refused.

The application of these tests writes one generation after the other, over all its rows at once: a state that mixes two never was.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from typing import Any

import apsw
import pytest

import bottomless_wal
from bottomless_wal import BottomlessError, ConflictError, FencedError
from bottomless_wal.core import failpoints
from tests.support.cluster import Machine, World, child, refusal, rows

PAGE = 1024
STEP = PAGE + 24
ROWS = 5


def _start(world: World, **options: Any) -> tuple[Machine, apsw.Connection]:
    """A database at generation 1, all of it stored, its WAL empty."""
    here = world.machine()
    con = here.connect(page_size=PAGE, **options)
    con.execute("PRAGMA synchronous=NORMAL")
    with con:
        con.execute("CREATE TABLE ledger(n INTEGER PRIMARY KEY); CREATE TABLE t(id INTEGER PRIMARY KEY, generation, pad)")
        con.execute("INSERT INTO ledger VALUES (1)")
        con.executemany("INSERT INTO t VALUES (?, 1, randomblob(900))", [(n,) for n in range(ROWS)])
    bottomless_wal.flush(con)
    con.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    return here, con


def _go_on(con: apsw.Connection, *generations: int) -> None:
    for generation in generations:
        with con:
            con.execute("INSERT INTO ledger VALUES (?)", (generation,))
            con.execute("UPDATE t SET generation = ?, pad = randomblob(900)", (generation,))


def _pending(con: apsw.Connection, generation: int) -> None:
    """One more, which the store refuses: it stands locally alone."""
    refusal(con).log()
    with pytest.raises(apsw.Error):
        _go_on(con, generation)


def _generation(image: bytes) -> int:
    """The one generation that a database file is at, its pages all sound."""
    con = apsw.Connection(":memory:")
    con.deserialize("main", image[:18] + b"\1\1" + image[20:])  # what is in memory cannot be in WAL mode
    assert con.execute("PRAGMA integrity_check").get == "ok"
    least, most, booked, lines = con.execute("SELECT min(generation), max(generation), (SELECT max(n) FROM ledger), "
                                             "(SELECT count(*) FROM ledger) FROM t").fetchall()[0]  # fmt: skip
    assert least == most == booked == lines, "a state that never was"
    con.close()
    return int(booked)


def _log(world: World) -> dict[str, bytes]:
    return {key: data for key, data in world.bucket.content().items() if "-wal/" in key}


def _opens(world: World, here: Machine, before: dict[str, bytes], *, at_least: int) -> int:
    """It opens, at one true generation; the log is the file, holds only true states, each newer, and nothing it had is gone."""
    con = here.connect()
    bottomless_wal.flush(con)
    world.stored(con)
    con.close()
    world_log = _log(world)
    assert before.items() <= world_log.items(), "what was acknowledged was taken out of the log"
    states = [_generation(world.bucket.log_image("app.db", upto=n)) for n in range(len(before), world.bucket.head("app.db") + 1)]
    assert states == sorted(states), "something acknowledged was reverted"
    assert states[-1] >= at_least, "something acknowledged was lost"
    return states[-1]


def _put_back(world: World, here: Machine, files: dict[str, bytes], bucket: dict[str, bytes]) -> None:
    """Machine and bucket as they were. A main file that did not change keeps its inode."""
    for name in set(here.files()) - set(files):
        os.unlink(here.path(name))
    for name, data in files.items():
        _write(here.path(name), data)
    shutil.rmtree(world.root / world.endpoint.bucket)
    for key, data in bucket.items():
        world.bucket.put(key, data)


def _write(path: str, data: bytes) -> None:
    """Into the same inode, as cp does it."""
    with open(path, "r+b" if os.path.exists(path) else "wb") as file:
        file.write(data)
        file.truncate()


def _move(path: str, data: bytes) -> None:
    """Another inode at the path, as mv does it."""
    with open(path + ".new", "wb") as file:
        file.write(data)
    os.rename(path + ".new", path)


PUT = {"cp": _write, "mv": _move}


@pytest.fixture
def reboot(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call it: from now on the machine has started anew."""

    def act() -> None:
        for module in ("recovery", "index", "replicator"):
            monkeypatch.setattr(f"bottomless_wal.replication.{module}.boot_id", lambda: b"another boot id!")

    return act


# --- power loss --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ack", ["log", "local"])
def test_a_power_loss_cuts_the_wal_anywhere_and_leaves_any_index(world: World, reboot: Any, ack: str) -> None:
    """The WAL was not synced and the index never is: whatever is left of both, everything acknowledged comes back, and nothing else."""
    here, con = _start(world, ack=ack, **({"interval": 60} if ack == "local" else {}))
    indexes: dict[str, bytes | None] = {"oldest": here.content("app.db-bottomless"), "none": None}

    def seen(point: str) -> None:
        indexes[point] = here.content("app.db-bottomless")

    _go_on(con, 2)
    failpoints.arm("before put", lambda: seen("an intent of old"))
    _go_on(con, 3)  # with ack=local, one commit in the log with the one before
    bottomless_wal.flush(con)
    for point in ("before put", "before header"):
        failpoints.arm(point, lambda point=point: seen(point))  # type: ignore[misc]
    _go_on(con, 4)
    bottomless_wal.flush(con)
    failpoints.disarm()
    before = _log(world)
    if ack == "log":
        _pending(con, 5)
    else:
        _go_on(con, 5)
    newest = here.content("app.db-bottomless")
    indexes["newest"] = newest
    indexes["a new header over old entries"] = newest[:16384] + (indexes["oldest"] or b"")[16384:]
    files, bucket = here.files(), world.bucket.content()
    refusal(con).log()
    con.close()
    reboot()
    wal = files["app.db-wal"]
    frames = len(wal) // STEP
    commits = [32 + STEP * (frames * part // 4) for part in range(1, 5)]
    torn = [0, 15, 16, 32, 33, commits[0] + 500, commits[0] + 501, commits[1] + STEP, commits[1] + STEP + 1]
    for name, index in indexes.items():
        for cut in torn + commits if name == "newest" else (0, commits[1] + STEP, commits[2], commits[3]):
            tail = wal[:cut] + (bytes(len(wal) - cut) if cut % 2 else b"")  # odd or even: the rest is zeros, or the file is shorter
            state = {**files, "app.db-wal": tail, "app.db-bottomless": index}
            _put_back(world, here, {key: data for key, data in state.items() if data is not None}, bucket)
            got = _opens(world, here, before, at_least=4)
            assert got == (5 if cut == len(wal) else 4), f"{name}, {cut} bytes"


@pytest.mark.parametrize("rebooted", [False, True], ids=["killed", "rebooted"])
def test_an_old_index_with_an_open_attempt_is_no_rival(world: World, reboot: Any, rebooted: bool) -> None:
    """An index from before an attempt, under a history that has gone on since by this very machine: it opens, and is not fenced off."""
    here, con = _start(world, ack="log")
    old: list[bytes] = []
    failpoints.arm("before put", lambda: old.append(here.content("app.db-bottomless")))
    _go_on(con, 2)
    failpoints.disarm()
    _go_on(con, 3, 4)
    bottomless_wal.flush(con)
    files, bucket = here.files(), world.bucket.content()
    con.close()
    _put_back(world, here, {**files, "app.db-bottomless": old[0]}, bucket)
    if rebooted:
        reboot()
    assert _opens(world, here, _log(world), at_least=4) == 4


# --- a WAL that is gone, or of another time ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", ["nothing", "an empty file", "zeros", "its header"])
def test_a_wal_deleted_after_a_crash_reverts_nothing(world: World, left: str) -> None:
    """The main file alone is an old state that no segment lists: it is no descendant of the head, though the index stood there."""
    here = world.machine()
    child(
        """
con = connect(argv[0], ack="local", interval=60)
con.execute("CREATE TABLE t(x)")
bottomless_wal.flush(con)
con.execute("INSERT OR REPLACE INTO t VALUES (1)")
con.execute("INSERT INTO t VALUES (2)")
con.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
con.execute("INSERT INTO t VALUES (3)")
bottomless_wal.flush(con)
os.kill(os.getpid(), signal.SIGKILL)
""",
        here.path(),
        options=world.options,
        check=False,
    )
    wal = here.content("app.db-wal")
    os.unlink(here.path("app.db-wal"))
    if left != "nothing":
        _write(here.path("app.db-wal"), {"an empty file": b"", "zeros": bytes(len(wal)), "its header": wal[:32]}[left])
    before = _log(world)
    for _ in range(2):
        with pytest.raises(ConflictError, match="no state of the history"):
            here.connect()
        assert _log(world) == before
    con = world.machine().connect()
    assert rows(con) == 3


@pytest.mark.parametrize("index", ["kept", "lost"])
@pytest.mark.parametrize("how", ["cp", "mv"])
@pytest.mark.parametrize("pending", [False, True], ids=["all stored", "pending"])
def test_an_old_backup_beside_a_newer_wal_never_gets_into_the_log(world: World, pending: bool, how: str, index: str) -> None:
    """SQLite would take the WAL for its own and show a mixture of two times: that is brought forward or refused, never stored."""
    here, con = _start(world, ack="log")
    _go_on(con, 2)
    con.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    backup = here.content()
    _go_on(con, 3, 4)
    con.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_RESTART)
    con.execute("UPDATE t SET pad = randomblob(900) WHERE id = 1")  # what the WAL holds is less than what has changed since
    bottomless_wal.flush(con)
    if pending:
        refusal(con).log()
        with pytest.raises(BottomlessError):
            con.execute("UPDATE t SET pad = randomblob(900) WHERE id = 2")
    files, bucket = here.files(), world.bucket.content()
    con.close()
    _put_back(world, here, files, bucket)
    os.unlink(here.path("app.db-shm"))
    if index == "lost":
        os.unlink(here.path("app.db-bottomless"))
    PUT[how](here.path(), backup)
    if not pending:
        assert _opens(world, here, _log(world), at_least=4) == 4
        return
    left = here.files()
    for _ in range(2):
        with pytest.raises(ConflictError, match="by other means than SQLite"):
            here.connect()
        assert _log(world).keys() == {key for key in bucket if "-wal/" in key}
        assert here.content() == backup
        assert here.content("app.db-wal") == left["app.db-wal"]
    con = here.connect(initial_replication="force")  # who wants it has it
    bottomless_wal.flush(con)
    world.stored(con)


@pytest.mark.parametrize("old_wal", ["no WAL", "its own WAL"])
@pytest.mark.parametrize("how", ["cp", "mv"])
def test_an_old_backup_with_or_without_a_wal_is_brought_forward(world: World, how: str, old_wal: str) -> None:
    """A state that the history lists, whatever lies beside it."""
    here, con = _start(world, ack="log")
    _go_on(con, 2)
    bottomless_wal.flush(con)
    backup = here.files()
    _go_on(con, 3, 4)
    con.close()
    PUT[how](here.path(), backup["app.db"])
    if old_wal == "its own WAL":
        _write(here.path("app.db-wal"), backup["app.db-wal"])
    assert _opens(world, here, _log(world), at_least=4) == 4


def test_another_database_copied_over_the_open_file_never_gets_into_the_log(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found out at the latest by the scan that the file's changed identity brings about: it stops, with the truth."""
    monkeypatch.setattr("bottomless_wal.replication.replicator._SUSPECT_SECONDS", 0.0)
    here, con = _start(world, ack="log")
    other = world.machine()
    stock = other.stock()
    stock.execute("PRAGMA page_size=1024; PRAGMA journal_mode=wal; CREATE TABLE foreign_one(x)").fetchall()
    stock.executemany("INSERT INTO foreign_one VALUES (randomblob(900))", [()] * 20)
    stock.close()
    _go_on(con, 2)
    bottomless_wal.flush(con)
    before = _log(world)
    subprocess.run(["cp", other.path(), here.path()], check=True)  # by another process: closing the file here would drop our locks
    with contextlib.suppress(ConflictError):
        bottomless_wal.flush(con, timeout=20)
    with pytest.raises(ConflictError, match="by other means than SQLite"):
        bottomless_wal.flush(con, timeout=20)
    assert _log(world) == before
    con.close()
    assert _log(world) == before
    con = world.machine().connect()
    assert _generation(con.serialize("main")) == 2


# --- strangers with a shell ----------------------------------------------------------------------------------------------------------


STRANGERS = {
    "writes": "INSERT OR REPLACE INTO t VALUES (100, 9, randomblob(3000))",
    "writes and truncates the WAL": "INSERT OR REPLACE INTO t VALUES (100, 9, 1); PRAGMA wal_checkpoint(truncate)",
    "vacuums": "DELETE FROM t WHERE id > 2; VACUUM",
    "drops all and vacuums": "DROP TABLE t; VACUUM; CREATE TABLE t(id, generation, pad)",
    "changes the page size": "PRAGMA journal_mode=delete; PRAGMA page_size=512; VACUUM",
    "goes back and forth": "PRAGMA journal_mode=delete; INSERT OR REPLACE INTO t VALUES (1, 9, 1); PRAGMA journal_mode=wal; DELETE FROM t",
}


@pytest.mark.parametrize("up", [False, True], ids=["down", "up"])
def test_what_a_stranger_does_with_the_stock_vfs_is_replicated(world: World, up: bool) -> None:
    """While nothing runs the policy decides; while the application has it open, its next commit brings it (and WAL mode stays)."""
    here, con = _start(world)
    for what, work in STRANGERS.items():
        if up and "journal_mode" in work:
            continue
        if up:
            child("for work in argv[1].split(';'): apsw.Connection(argv[0]).execute(work).fetchall()", here.path(), work, options={})
        else:
            con.close()
            stock = here.stock()
            for statement in work.split(";"):
                stock.execute(statement).fetchall()
            stock.close()
            before = _log(world)
            with pytest.raises(ConflictError):  # without a WAL it looks like an old backup that was copied over the file
                here.connect()
            assert _log(world) == before
            con = here.connect(initial_replication="skip")
        con.execute("INSERT INTO ledger VALUES (NULL)")
        bottomless_wal.flush(con)
        world.stored(con)
        assert rows(con, "PRAGMA integrity_check") == "ok", what
    con.close()
    world.comes_back(here)


# --- the index ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whose", ["an older one of its own", "another machine's"])
def test_an_index_that_is_not_the_present_one_stops_it_and_changes_nothing(world: World, whose: str) -> None:
    """Copied over the index in use: the next commit finds its key taken by other content, and the log stays as it is."""
    here, con = _start(world, ack="log")
    if whose == "another machine's":
        con.close()
        there = world.machine()
        con = there.connect()
        _go_on(con, 2)
        con.close()
        index = there.content("app.db-bottomless")
        con = here.connect()
    else:
        _go_on(con, 2)
        index = here.content("app.db-bottomless")
    _go_on(con, 3, 4, 5)
    bottomless_wal.flush(con)
    before = _log(world)
    _write(here.path("app.db-bottomless"), index)
    with pytest.raises(FencedError):
        con.execute("UPDATE t SET generation = 6")
    con.close()
    assert _log(world) == before
    with pytest.raises(ConflictError):
        here.connect()  # there is a commit that no one has stored, and no index that tells of what it follows
    assert _log(world) == before
    con = world.machine().connect()
    assert _generation(con.serialize("main")) == 5


@pytest.mark.parametrize("left", [0, 100, 16384, 16384 + 32])
def test_the_index_is_cut_short_while_it_is_in_use(world: World, left: int) -> None:
    """What it had of the pages is not taken for zeros: a wrong state hash in the log could never be restored."""
    here, con = _start(world)
    _go_on(con, 2)
    os.truncate(here.path("app.db-bottomless"), left)
    _go_on(con, 3, 4)
    bottomless_wal.flush(con)
    world.stored(con)
    con.close()
    world.comes_back(here)


# --- nothing left: disk, descriptors -------------------------------------------------------------------------------------------------

SHORT_OF = {
    "disk, in the index": """
import errno
real, left = os.pwrite, 0
def pwrite(fd, data, offset):
    global left
    if left and os.readlink(f"/proc/self/fd/{fd}").endswith("-bottomless"):
        left -= 1
        if left % 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, bytes(data)[: len(data) // 2], offset)
    return real(fd, data, offset)
os.pwrite = pwrite
for left in (1, 2, 3, 4, 5, 2, 3):
    attempt()
    con.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_RESTART)
left = 0
""",
    "disk, in the WAL": """
import resource
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
attempt("zeroblob(20000)")
for limit in range(24000, 70000, 3000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    attempt("randomblob(9000)")
    attempt()
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
""",
    "file descriptors": """
import resource
for spare in range(0, 14):
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + spare, 4096))
    attempt()
    if spare % 2:
        con.close()
        for _ in range(100):
            try:
                con = connect(argv[0])
                break
            except (apsw.Error, OSError) as error:
                errors.append(error)
                resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[0] + 1, 4096))
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
""",
}


@pytest.mark.parametrize("what", SHORT_OF)
def test_short_of(world: World, what: str) -> None:
    """Each commit returns and is stored, or raises; when there is room again everything that stands is stored, once."""
    here = world.machine()
    script = """
import bottomless_wal.storage.directory
con = connect(argv[0])
con.execute("CREATE TABLE t(n INTEGER PRIMARY KEY, x)")
bottomless_wal.flush(con)
n, done, errors = 0, [], []
def attempt(value="1"):
    global n
    n += 1
    try:
        con.execute(f"INSERT INTO t VALUES (?, {value})", (n,))
        done.append(n)
    except apsw.Error as error:
        errors.append(error)
""" + SHORT_OF[what]
    script += """
assert errors, "there was no shortage"
attempt()
assert done[-1] == n
there = {n for (n,) in con.execute("SELECT n FROM t")}
assert there >= set(done), "acknowledged and gone"
assert con.execute("PRAGMA integrity_check").get == "ok"
bottomless_wal.flush(con)
con.close()
"""  # fmt: skip
    child(script, here.path(), options=world.options)
    world.comes_back(here)
