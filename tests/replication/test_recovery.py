"""Opening when something is wrong: a clear error that names the object, and the local file and the bucket as they were."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import struct
import subprocess
import threading
from pathlib import Path
from typing import Any

import apsw
import pytest
import zstandard

import bottomless_wal
from bottomless_wal import BottomlessError, ConfigError, ConflictError, CorruptionError, RestoreError, StoreError
from bottomless_wal.cli.demo_server import RcloneServer
from tests.support.cluster import Machine, World, child, rows, spawn
from tests.support.endpoints import Endpoint


def _history(world: World, commits: int = 4, **options: Any) -> Machine:
    """A machine that made `commits` commits, and was closed."""
    machine = world.machine()
    con = machine.connect(**options)
    con.execute("CREATE TABLE t(x)")
    for _ in range(commits - 1):
        con.execute("INSERT INTO t VALUES (randomblob(3000))")
    con.close()
    return machine


# --- leftovers ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["-wal", "-journal", "-shm"])
def test_a_leftover_beside_a_missing_database_is_set_aside(world: World, ending: str) -> None:
    lost = _history(world)
    here = world.machine()
    # The WAL of quite another database, with committed frames that a plain open would replay.
    other = world.machine()
    child(
        f"""
con = apsw.Connection({other.path()!r})
con.execute("PRAGMA journal_mode=wal; CREATE TABLE evil(x); INSERT INTO evil VALUES (1)").fetchall()
os.kill(os.getpid(), signal.SIGKILL)
""",
        options={},
        check=False,
    )
    leftover = other.content("app.db-shm" if ending == "-shm" else "app.db-wal")
    Path(here.path() + ending).write_bytes(leftover)
    con = here.connect()
    assert rows(con) == 3
    con.close()
    assert here.content() == lost.content()
    set_aside = [name for name in here.files() if "stale" in name]
    if ending == "-shm":
        assert set_aside == []
    else:
        assert [here.files()[name] for name in set_aside] == [leftover], "nothing is thrown away"
    world.comes_back(here)


def test_a_leftover_wal_beside_a_missing_database_and_an_empty_bucket(world: World) -> None:
    here = world.machine()
    Path(here.path("app.db-wal")).write_bytes(b"left over" * 1000)
    con = here.connect()
    con.execute("CREATE TABLE t(x)")
    world.stored(con)
    con.close()
    world.comes_back(here)


def test_leftovers_of_an_interrupted_restore_do_no_harm_and_go(world: World) -> None:
    lost = _history(world)
    here = world.machine()
    dead, alive, born = (Path(here.path(f"app.db-bottomless-{digit * 16}")) for digit in "abc")
    for path in (dead, alive, born):
        path.write_bytes(b"half a database")
    for path in (dead, alive):
        os.utime(path, (1, 1))
    with open(alive, "rb") as at_work:
        fcntl.flock(at_work, fcntl.LOCK_EX)
        con = here.connect()
    assert rows(con) == 3
    con.close()
    assert here.content() == lost.content()
    assert [path.exists() for path in (dead, alive, born)] == [False, True, True]


# --- two at once -------------------------------------------------------------------------------------------------------------------


def test_two_processes_open_a_lost_database_at_once(two_worlds: World) -> None:
    _history(two_worlds)
    here = two_worlds.machine()
    script = "con = connect(argv[0]); con.set_busy_timeout(10000)\nfor n in range(5): con.execute('INSERT INTO t VALUES (1)')\ncon.close()"
    processes = [spawn(script, here.path(), options=two_worlds.options) for _ in range(3)]
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, out + err
    con = here.connect()
    assert rows(con) == 3 + 15
    con.close()
    two_worlds.comes_back(here)


def test_two_processes_make_a_new_database_at_once(two_worlds: World) -> None:
    here = two_worlds.machine()
    script = (
        "con = connect(argv[0]); con.set_busy_timeout(10000)\n"
        "con.execute('CREATE TABLE IF NOT EXISTS t(x)')\nfor n in range(5): con.execute('INSERT INTO t VALUES (1)')\ncon.close()"
    )
    processes = [spawn(script, here.path(), options=two_worlds.options) for _ in range(3)]
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, out + err
    con = here.connect()
    assert rows(con) == 15
    con.close()
    two_worlds.comes_back(here)


def test_many_threads_open_a_lost_database_at_once(world: World) -> None:
    _history(world)
    here = world.machine()
    errors: list[BaseException] = []

    def open_it() -> None:
        try:
            con = here.connect()
            con.execute("INSERT INTO t VALUES (1)")
            con.close()
        except BaseException as error:  # noqa: BLE001 - shown below
            errors.append(error)

    threads = [threading.Thread(target=open_it) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    con = here.connect()
    assert rows(con) == 3 + 8
    con.close()
    world.comes_back(here)


def test_threads_that_open_while_others_close_for_the_last_time(world: World) -> None:
    here = _history(world)
    errors: list[BaseException] = []

    def again_and_again() -> None:
        try:
            for _ in range(15):
                con = here.connect()
                con.execute("INSERT INTO t VALUES (1)")
                con.close()
        except BaseException as error:  # noqa: BLE001 - shown below
            errors.append(error)

    threads = [threading.Thread(target=again_and_again) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    world.comes_back(here)


def test_fast_forward_waits_for_nobody_and_replaces_no_open_file(world: World) -> None:
    old = _history(world)
    child(f"connect({world.machine().path()!r}).execute('INSERT INTO t VALUES (1)')", options=world.options)
    reader = old.stock()
    assert rows(reader) == 3
    before = old.content()
    with pytest.raises(ConflictError, match="open elsewhere"):
        old.connect()
    assert old.content() == before
    reader.close()
    assert rows(old.connect()) == 4


# --- objects that are missing or wrong ------------------------------------------------------------------------------------------------


def _damage(world: World, key: str, how: str) -> None:
    data = bytearray(world.bucket.get(key))
    if how == "missing":
        world.bucket.delete(key)
        return
    if how == "truncated":
        del data[len(data) * 2 // 3 :]
    elif how == "empty":
        data.clear()
    elif how == "flipped":
        data[len(data) // 2] ^= 0x40
    elif how == "garbage":
        data[:] = os.urandom(len(data))
    elif how == "html":
        data[:] = b"<html><body>502 Bad Gateway</body></html>"
    world.bucket.put(key, bytes(data))


@pytest.mark.parametrize("how", ["missing", "truncated", "empty", "flipped", "garbage", "html"])
@pytest.mark.parametrize("which", [(0, 1), (1, 2), (3, 4)], ids=["first", "middle", "last"])
def test_a_bad_segment_is_named_and_nothing_is_half_restored(world: World, how: str, which: tuple[int, int]) -> None:
    _history(world)
    key = f"app.db-wal/{which[0]:016x}-{which[1]:016x}"
    _damage(world, key, how)
    here = world.machine()
    before = world.bucket.content()
    if how == "missing" and which == (3, 4):
        # Without the last edge the history simply ends earlier.
        assert rows(here.connect()) == 2
        return
    with pytest.raises(BottomlessError) as caught:
        here.connect()
    assert isinstance(caught.value, RestoreError | CorruptionError)
    assert key in str(caught.value)
    assert caught.value.hint
    assert [name for name in here.files() if name != "app.db-bottomless"] == []
    assert world.bucket.content() == before


def test_a_bad_body_is_named(world: World) -> None:
    machine = world.machine()
    con = machine.connect()
    con.execute("CREATE TABLE t(x)")
    with con:
        con.executemany("INSERT INTO t VALUES (randomblob(1000000))", [()] * 17)
    con.close()
    (key,) = [key for key in world.bucket.listing() if "/body/" in key]
    whole = world.bucket.get(key)
    for how in ("missing", "truncated", "flipped"):
        world.bucket.put(key, whole)
        _damage(world, key, how)
        here = world.machine()
        with pytest.raises(BottomlessError) as caught:
            here.connect()
        assert key in str(caught.value), how
        assert not os.path.exists(here.path())


def test_a_segment_under_another_key(world: World) -> None:
    _history(world)
    key = "app.db-wal/" + f"{1:016x}-{2:016x}"
    world.bucket.put(key, world.bucket.get("app.db-wal/" + f"{2:016x}-{3:016x}"))
    here = world.machine()
    with pytest.raises(BottomlessError) as caught:
        here.connect()
    assert key in str(caught.value)
    assert not os.path.exists(here.path())


def test_a_segment_of_another_database_with_the_same_txids(world: World) -> None:
    _history(world)
    other = world.machine()
    con = other.connect("other.db")
    con.execute("CREATE TABLE x(y)")
    con.execute("INSERT INTO x VALUES (1)")
    con.close()
    key = "-wal/" + f"{1:016x}-{2:016x}"
    world.bucket.put("app.db" + key, world.bucket.get("other.db" + key))
    with pytest.raises(RestoreError, match="app.db" + key):
        world.machine().connect()


def test_a_newer_format_says_upgrade(world: World) -> None:
    _history(world)
    key = "app.db-wal/" + f"{3:016x}-{4:016x}"
    data = bytearray(world.bucket.get(key)[:-32])
    data[8:10] = struct.pack(">H", 2)
    world.bucket.put(key, bytes(data) + hashlib.sha256(data).digest())
    here = world.machine()
    with pytest.raises(BottomlessError, match="newer") as caught:
        here.connect()
    assert key in str(caught.value)
    assert "pgrade" in caught.value.hint


def test_the_local_file_is_untouched_when_a_fast_forward_fails(world: World) -> None:
    old = _history(world)
    child(f"connect({world.machine().path()!r}).execute('INSERT INTO t VALUES (1)')", options=world.options)
    _damage(world, "app.db-wal/" + f"{0:016x}-{1:016x}", "flipped")
    before = old.content()
    with pytest.raises(BottomlessError):
        old.connect()
    assert old.content() == before
    stock = old.stock()
    assert rows(stock) == 3


def test_a_bucket_of_someone_elses_objects(two_worlds: World) -> None:
    two_worlds.bucket.make()
    foreign = {
        "holiday.jpg": b"\xff\xd8",
        "app.db": b"SQLite format 3\0",
        "app.db-wal": b"",
        "app.db-00000000001": b"eleven digits",
        "app.db-0000000000001": b"thirteen",
        "app.db-000000000000": b"page zero",
        "app.db2-000000000001": b"another database's",
        "app.db-wal/readme.txt": b"hello",
        "app.db-wal/0-1": b"",
        "zzz/app.db-wal/" + f"{0:016x}-{1:016x}": b"",
    }
    if two_worlds.endpoint.kind == "directory":
        del foreign["app.db-wal"]  # no file and directory of one name
    for key, data in foreign.items():
        two_worlds.bucket.put(key, data)
    here = two_worlds.machine()
    con = here.connect()
    con.execute("CREATE TABLE t(x)")
    con.close()
    two_worlds.comes_back(here)
    content = two_worlds.bucket.content()
    assert {key: content[key] for key in foreign} == foreign


def test_names_that_look_alike_never_see_each_other(world: World) -> None:
    here = world.machine()
    names = ["a.db", "a.db2", "a.db-wal", "a", "A.db", "a.db-000000000001", "b~a.db", "a.db-wal-wal"]
    names.remove("a.db-wal")  # SQLite would take that file for a WAL when it stands beside: its own directory
    images = {}
    for count, name in enumerate(names):
        con = here.connect(name)
        con.execute(f"CREATE TABLE t{count}(x)")
        con.close()
        images[name] = here.content(name)
    apart = world.machine()
    con = apart.connect("a.db-wal")
    con.execute("CREATE TABLE apart(x)")
    con.close()
    for name, image in images.items():
        elsewhere = world.machine()
        elsewhere.connect(name).close()
        assert elsewhere.content(name) == image
    elsewhere = world.machine()
    elsewhere.connect("a.db-wal").close()
    assert elsewhere.content("a.db-wal") == apart.content("a.db-wal")


def test_one_file_name_with_and_without_a_database_id(world: World) -> None:
    images = {}
    for database_id in ("", "one", "two", "a b/c"):
        machine = world.machine()
        con = machine.connect(database_id=database_id)
        con.execute(f"CREATE TABLE t(x DEFAULT '{database_id}')")
        con.close()
        images[database_id] = machine.content()
    for database_id, image in images.items():
        elsewhere = world.machine()
        elsewhere.connect(database_id=database_id).close()
        assert elsewhere.content() == image


# --- odd names and places ------------------------------------------------------------------------------------------------------------


ODD = ["my app#1.db", "100%?.db", "ünïcødé.db", "日本語.db", "sp ace", "a=b&c.db", "-dash.db", "quote'\".db", ".hidden"]


@pytest.mark.parametrize("any_world", ["rclone", "directory"], indirect=True)  # the third takes every name
def test_odd_names(any_world: World) -> None:
    here, elsewhere = any_world.machine(), any_world.machine()
    for name in ODD:
        con = here.connect(name)
        con.execute("CREATE TABLE t(x); INSERT INTO t VALUES (1)")
        con.close()
        con = elsewhere.connect(name)
        assert rows(con) == 1, name
        con.close()
        assert elsewhere.content(name) == here.content(name)


def test_a_name_that_is_no_utf8_is_refused_clearly(world: World) -> None:
    here = world.machine()
    for path in (here.path("latin-\udce4.db"), Path(here.path("latin-\udce4.db"))):
        with pytest.raises(ConfigError) as caught:
            bottomless_wal.connect(path, **world.options)
        assert caught.value.hint
    assert here.files() == {}


def test_a_name_that_is_too_long_is_refused(world: World) -> None:
    here = world.machine()
    with pytest.raises((ConfigError, apsw.CantOpenError)):
        here.connect("x" * 250)
    assert world.bucket.listing() == []


def test_a_symlink_is_the_database_that_it_points_to(world: World) -> None:
    here = world.machine()
    (here.directory / "real").mkdir()
    os.symlink("real/app.db", here.path("app.db"))
    con = here.connect("app.db")
    con.execute("CREATE TABLE t(x)")
    again = here.connect("real/app.db")
    again.execute("INSERT INTO t VALUES (1)")
    assert rows(con) == 1
    assert bottomless_wal.status(here.path("app.db")).path == here.path("real/app.db")
    con.close()
    again.close()
    assert os.path.islink(here.path("app.db"))
    os.unlink(here.path("real/app.db"))
    con = here.connect("app.db")
    assert rows(con) == 1
    assert os.path.islink(here.path("app.db"))


def test_relative_paths_and_a_changed_directory(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    here = world.machine()
    monkeypatch.chdir(here.directory)
    con = bottomless_wal.connect("app.db", **world.options)
    con.execute("CREATE TABLE t(x)")
    monkeypatch.chdir("/")
    con.execute("INSERT INTO t VALUES (1)")
    bottomless_wal.flush(con)
    world.stored(con)
    con.close()
    world.comes_back(here)


def test_the_restored_file_keeps_the_mode_of_the_one_it_replaces(world: World) -> None:
    old = _history(world)
    child(f"connect({world.machine().path()!r}).execute('INSERT INTO t VALUES (1)')", options=world.options)
    os.chmod(old.path(), 0o640)
    old.connect().close()
    assert os.stat(old.path()).st_mode & 0o777 == 0o640


def _as_nobody(script: str, *arguments: str, world: World) -> subprocess.CompletedProcess[str]:
    """Root may write anywhere: so the script runs as somebody else (as itself, if the tests do not run as root)."""
    # The package may lie where only root can read.
    drop = "bottomless_wal.register(**options)\nos.getuid() == 0 and os.setuid(65534)\n"
    return child(drop + script, *arguments, options=world.options)


def test_a_directory_that_cannot_be_written(world: World) -> None:
    _history(world)
    here = world.machine()
    # Somebody else may do everything, but in that directory.
    for path in (*world.root.rglob("*"), world.root):
        os.chmod(path, 0o777)
    for path in world.root.parents:
        if os.stat(path).st_uid == os.getuid() and not os.stat(path).st_mode & 0o5:
            os.chmod(path, os.stat(path).st_mode | 0o055)
    os.chmod(here.directory, 0o555)
    script = """
try:
    connect(argv[0])
    print("opened")
except bottomless_wal.BottomlessError as error:
    print(type(error).__name__, error)
"""
    out = _as_nobody(script, here.path(), world=world).stdout
    assert "cannot write beside" in out or "cannot restore" in out, out
    assert "ConfigError" in out or "RestoreError" in out
    assert "hint" in out
    assert here.files() == {}


@pytest.mark.parametrize("left", ["nothing", "-wal and -shm", "-wal"])
def test_what_is_said_of_a_directory_that_cannot_be_written_helps_to_read(world: World, left: str) -> None:
    here = world.machine()
    source = world.machine()
    con = source.connect()
    con.execute("CREATE TABLE t(x); INSERT INTO t VALUES (1)")
    if left == "nothing":
        con.close()
    for ending in ("", *re.findall("-[a-z]+", left)):
        shutil.copy(source.path() + ending, here.path() + ending)
    con.close()
    for path in (*world.root.rglob("*"), world.root):
        os.chmod(path, 0o777)
    for path in world.root.parents:
        if os.stat(path).st_uid == os.getuid() and not os.stat(path).st_mode & 0o5:
            os.chmod(path, os.stat(path).st_mode | 0o055)
    for path in here.directory.iterdir():
        os.chmod(path, 0o444)
    os.chmod(here.directory, 0o555)
    script = """
try:
    connect(argv[0])
except bottomless_wal.ConfigError as error:
    hint = error.hint
    print(hint)
if "'" in hint:
    print("rows:", connect(hint.split("'")[1]).execute("SELECT count(*) FROM t").get)
"""
    out = _as_nobody(script, here.path(), world=world).stdout
    if left == "-wal":
        assert "copy the file and its -wal" in out, out
    else:
        assert "rows: 1" in out, out


def test_a_missing_directory(world: World) -> None:
    here = world.machine()
    with pytest.raises((BottomlessError, apsw.CantOpenError)):
        here.connect("no/such/directory/app.db")
    assert here.files() == {}


@pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_the_disk_is_full_during_a_restore(world: World, monkeypatch: pytest.MonkeyPatch, kind: int) -> None:
    old = _history(world, 10)
    child(f"connect({world.machine().path()!r}).execute('INSERT INTO t VALUES (1)')", options=world.options)
    missing = world.machine()
    real = os.pwrite

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        name = os.readlink(f"/proc/self/fd/{fd}")
        if "-bottomless-" in name and offset >= 8192:
            raise OSError(kind, os.strerror(kind))
        return real(fd, data, offset)

    before = old.content()
    monkeypatch.setattr(os, "pwrite", pwrite)
    for machine in (missing, old):
        with pytest.raises(RestoreError, match="cannot restore") as caught:
            machine.connect()
        assert caught.value.hint
    monkeypatch.undo()
    assert old.content() == before
    assert [name for name in missing.files() if name != "app.db-bottomless"] == []
    assert not [name for name in old.files() if "-bottomless-" in name]
    for machine in (missing, old):
        con = machine.connect()
        assert rows(con) == 10
        con.close()


def test_a_file_size_limit_during_a_restore(world: World) -> None:
    machine = world.machine()
    con = machine.connect()
    con.execute("CREATE TABLE t(x); INSERT INTO t VALUES (randomblob(300000))")
    con.close()
    here = world.machine()
    script = """
import resource
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000))
try:
    connect(argv[0])
    print("opened")
except bottomless_wal.BottomlessError as error:
    print(type(error).__name__, error)
"""
    out = child(script, here.path(), options=world.options).stdout
    assert "RestoreError" in out, out
    assert not os.path.exists(here.path())


# --- no bucket, no server ------------------------------------------------------------------------------------------------------------


def test_a_missing_bucket_is_an_error_and_no_empty_bucket(any_world: World) -> None:
    here = any_world.machine()
    with pytest.raises(StoreError) as caught:
        here.connect(create_bucket=False)
    assert "create_bucket=1" in caught.value.hint
    assert not os.path.exists(here.path())
    stock = here.stock()
    stock.execute("CREATE TABLE t(x)")
    stock.close()
    before = here.content()
    with pytest.raises(StoreError):
        here.connect(create_bucket=False)
    assert here.content() == before


def test_a_server_that_cannot_be_reached_is_an_error_and_no_empty_bucket(world: World) -> None:
    here = _history(world)
    empty = world.machine()
    con_options: dict[str, Any] = {"endpoint": "http://127.0.0.1:1", "retry_timeout": 0.2, "create_bucket": False}
    before = here.files()
    for machine in (here, empty):
        with pytest.raises(StoreError, match=r"127\.0\.0\.1:1"):
            machine.connect(**con_options)
    assert here.content() == before["app.db"]
    assert not os.path.exists(empty.path())


def test_wrong_credentials(rclone_endpoint: Endpoint, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    here = world.machine()
    with pytest.raises(StoreError) as caught:
        here.connect(endpoint=rclone_endpoint.url, bucket=rclone_endpoint.bucket)
    assert caught.value.hint
    assert not os.path.exists(here.path())


def test_a_failed_open_leaves_no_half_open_replica_behind(world: World) -> None:
    here = _history(world)
    with pytest.raises(StoreError):
        here.connect(endpoint="http://127.0.0.1:1", retry_timeout=0.1, create_bucket=False)
    con = here.connect()
    assert rows(con) == 3


# --- not a database --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", [b"no database at all\n" * 100, b"SQLite format 3\0" + bytes(20), bytes(8192)], ids=["text", "only the magic", "zeros"]
)
def test_a_file_that_is_no_database(world: World, content: bytes) -> None:
    here = world.machine()
    Path(here.path()).write_bytes(content)
    with pytest.raises(CorruptionError) as caught:
        here.connect()
    assert "SQLite database" in caught.value.message
    assert here.path() in caught.value.message
    assert caught.value.hint
    assert here.content() == content
    assert world.bucket.listing() == []


def test_a_directory_in_the_databases_place(world: World) -> None:
    here = world.machine()
    os.mkdir(here.path())
    with pytest.raises((BottomlessError, apsw.CantOpenError)):
        here.connect()


def test_a_database_that_is_cut_short(world: World) -> None:
    here = _history(world, 10)
    os.unlink(here.path("app.db-bottomless"))
    os.truncate(here.path(), len(here.content()) - 4096)
    before = here.content()
    with pytest.raises(BottomlessError):
        here.connect()
    assert here.content() == before


# --- page objects only ---------------------------------------------------------------------------------------------------------------


def _without_log(world: World, rows_: int = 30) -> Machine:
    machine = world.machine()
    con = machine.connect()
    con.execute("CREATE TABLE t(x)")
    for _ in range(rows_):
        con.execute("INSERT INTO t VALUES (randomblob(3000))")
    bottomless_wal.flush(con)
    con.close()
    for key in world.bucket.listing():
        if "-wal/" in key:
            world.bucket.delete(key)
    return machine


def test_page_objects_alone_are_a_database(two_worlds: World) -> None:
    lost = _without_log(two_worlds)
    here = two_worlds.machine()
    con = here.connect()
    assert rows(con) == 30
    con.close()
    assert here.content() == lost.content()
    ((pre, post),) = two_worlds.bucket.edges("app.db")
    assert (pre, post) == (0, 31), "the line of txids goes on"
    con = here.connect()
    con.execute("INSERT INTO t VALUES (1)")
    con.close()
    assert two_worlds.bucket.edges("app.db") == [(0, 31), (31, 32)]
    elsewhere = two_worlds.machine()
    con = elsewhere.connect()
    assert rows(con) == 31
    con.close()
    assert elsewhere.content() == here.content()


def test_page_objects_without_trailers_are_taken_with_a_warning(world: World, caplog: pytest.LogCaptureFixture) -> None:
    lost = _without_log(world)
    for pgno in world.bucket.page_numbers("app.db"):
        key = f"app.db-{pgno:012d}"
        page = zstandard.ZstdDecompressor().decompress(world.bucket.get(key))
        world.bucket.put(key, zstandard.ZstdCompressor().compress(page))
    here = world.machine()
    con = here.connect()
    assert rows(con) == 30
    assert "without trailers" in caplog.text
    con.close()
    assert here.content() == lost.content()


@pytest.mark.parametrize("how", ["missing", "stale", "corrupt", "first missing"])
def test_page_objects_that_are_no_single_state_are_no_database(world: World, how: str) -> None:
    machine = world.machine()
    con = machine.connect()
    con.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, x)")
    con.executemany("INSERT INTO t(x) VALUES (randomblob(3000))", [()] * 10)
    bottomless_wal.flush(con)
    old = world.bucket.get("app.db-000000000006")
    con.execute("UPDATE t SET x = randomblob(3000)")
    bottomless_wal.flush(con)
    con.close()
    for key in world.bucket.listing():
        if "-wal/" in key:
            world.bucket.delete(key)
    key = "app.db-000000000001" if how == "first missing" else "app.db-000000000006"
    if how == "stale":
        world.bucket.put(key, old)
    elif how == "corrupt":
        _damage(world, key, "flipped")
    else:
        world.bucket.delete(key)
    before = world.bucket.content()
    here = world.machine()
    with pytest.raises((RestoreError, CorruptionError)) as caught:
        here.connect()
    if how != "stale":
        assert key in str(caught.value)
    assert not os.path.exists(here.path())
    assert world.bucket.content() == before


# --- progress --------------------------------------------------------------------------------------------------------------------------


def test_a_restore_of_a_long_history(tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """More edges than one listing has rows; and a directory is laid out as the bucket would be: an S3 server on it serves it."""
    here = world.machine()
    options: dict[str, Any] = {"bucket": "long", "pages": "off", "ack": "log"}
    con = here.connect(**options, endpoint=f"file://{tmp_path}/served", create_bucket=True)
    con.execute("PRAGMA synchronous=off")
    con.execute("CREATE TABLE t(x)")
    for _ in range(1004):
        con.execute("INSERT INTO t VALUES (1)")
    assert bottomless_wal.status(con).txid == 1005
    con.close()
    with RcloneServer(tmp_path / "served") as server:
        for name, value in server.environ().items():
            monkeypatch.setenv(name, value)
        con = world.machine().connect(**options, endpoint=server.endpoint)
        assert rows(con) == 1004
        con.close()
