"""What an adversary could try, and what comes of it: secrets stay secret, names lead nowhere, files keep their modes, lies cost little.

Whoever can write the bucket can write a history (docs/reference/limits.md). He must not be able to do more than that: not write outside
the database's own files, not fill memory or disk, not keep a program busy for ever.
"""

from __future__ import annotations

import io
import json
import logging
import os
import stat
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zstandard

import bottomless_wal
from bottomless_wal import admin
from bottomless_wal.core.config import Config
from bottomless_wal.core.errors import BottomlessError, ConfigError, CorruptionError, RestoreError, StoreError
from bottomless_wal.formats import keys, segment
from bottomless_wal.formats.block import encode_block
from bottomless_wal.formats.page import Page, page_hash
from bottomless_wal.formats.page_object import PageTrailer, encode_page_object
from bottomless_wal.formats.segment import Body, CommitRecord, SegmentHeader
from tests.support.cluster import Machine, World, child, replica_of

SECRET, TOKEN, PASSWORD = "wJalrXUtnFEMIsecretkey", "FwoGZXIvYXdzEsessiontoken", "hunter2password"
NAME = "app.db"

# --- secrets ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def everything_logged() -> Iterator[io.StringIO]:
    """All that the package's loggers say, at DEBUG."""
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logger = logging.getLogger("bottomless_wal")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield said
    logger.removeHandler(handler)
    logger.setLevel(level)


def command(*arguments: str, **environ: str) -> str:
    """All that a command says, at its most talkative."""
    done = subprocess.run(
        [sys.executable, "-m", "bottomless_wal", *arguments],
        env={**os.environ, "LIBSQL_BOTTOMLESS_LOG": "debug", "LIBSQL_BOTTOMLESS_RETRY_TIMEOUT": "0", **environ},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    return f"{done.returncode}\n{done.stdout}{done.stderr}"


def told_by(error: BaseException) -> str:
    """All that an error tells whoever prints it, its traceback and causes included."""
    return "".join((str(error), repr(error), *traceback.format_exception(error)))


def test_no_secret_is_in_logs_errors_status_or_objects(
    any_world: World, everything_logged: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, machine = any_world, any_world.machine()
    if world.endpoint.kind == "moto":
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    con = machine.connect()
    con.execute("CREATE TABLE t(x); INSERT INTO t VALUES(1)")
    bottomless_wal.flush(con)
    replica = replica_of(con)
    said = [repr(bottomless_wal.status(con)), repr(replica), repr(replica.config), str(replica.config), repr(replica.store)]
    with pytest.raises(BottomlessError) as raised:
        bottomless_wal.restore(machine.path("none.db"), **world.options)
    said.append(told_by(raised.value))
    if world.endpoint.kind == "rclone":
        with monkeypatch.context() as wrong:
            wrong.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
            with pytest.raises(StoreError) as refused:
                machine.connect("b.db")
        said.append(told_by(refused.value))
    con.close()
    said += [everything_logged.getvalue(), *map(repr, machine.files().values()), *map(repr, world.bucket.content().items())]
    for text in said:
        assert all(word not in text for word in (secret, SECRET, TOKEN))


@pytest.mark.parametrize("variable", ["AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID"])
def test_credentials_with_a_line_end_are_not_repeated_and_not_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, everything_logged: io.StringIO, variable: str
) -> None:
    """As they come out of a file. The HTTP library refuses the header, and would say it."""
    monkeypatch.setenv(variable, f"{TOKEN}\n")
    with pytest.raises(StoreError) as raised:
        bottomless_wal.connect(tmp_path / "a.db", endpoint="http://127.0.0.1:9", retry_timeout=3600)
    assert TOKEN not in told_by(raised.value) + everything_logged.getvalue()
    assert "Signature=" not in told_by(raised.value)
    assert "AWS_ACCESS_KEY_ID" in raised.value.hint


@pytest.mark.parametrize(
    "endpoint",
    [
        f"http://user:{PASSWORD}@localhost:9",
        f"https://{PASSWORD}@localhost",
        f"http://user:12/{PASSWORD}@localhost",
        f"ftp://u:{PASSWORD}@x",
    ],
)
def test_a_password_in_the_endpoint_is_refused_and_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, everything_logged: io.StringIO, endpoint: str
) -> None:
    quoted = endpoint.replace("/", "%2F").replace("@", "%40").replace(":", "%3A")
    for attempt in (
        lambda: Config.load({"endpoint": endpoint}, environ={}),
        lambda: Config.load(environ={"LIBSQL_BOTTOMLESS_ENDPOINT": endpoint}),
        lambda: bottomless_wal.connect(tmp_path / "a.db", endpoint=endpoint),
        lambda: bottomless_wal.connect(f"file:{tmp_path}/a.db?endpoint={quoted}"),
        lambda: bottomless_wal.verify(tmp_path / "a.db", endpoint=endpoint),
    ):
        with pytest.raises(ConfigError) as raised:
            attempt()
        assert PASSWORD not in told_by(raised.value)
    assert PASSWORD not in everything_logged.getvalue()


def test_no_command_repeats_a_password_or_a_secret() -> None:
    endpoint = f"http://user:{PASSWORD}@127.0.0.1:9"
    for arguments in (["doctor", "--json"], ["demo", "--endpoint", endpoint]):
        said = command(*arguments, LIBSQL_BOTTOMLESS_ENDPOINT=endpoint)
        assert said.startswith("2\n"), said
        assert PASSWORD not in said


def test_no_command_says_the_credentials_even_when_it_may_say_all(world: World, tmp_path: Path) -> None:
    secrets = {"AWS_SECRET_ACCESS_KEY": SECRET, "AWS_SESSION_TOKEN": TOKEN}
    said = command("--endpoint", "http://127.0.0.1:9", "doctor", "--json", **secrets)
    assert "127.0.0.1:9" in said
    assert SECRET not in said
    assert TOKEN not in said


# --- names -----------------------------------------------------------------------------------------------------------------


def made(world: World, name: str = NAME, rows: int = 3) -> Machine:
    """A machine whose database has been stored, and closed."""
    machine = world.machine()
    con = machine.connect(name)
    con.execute("CREATE TABLE t(x)")
    for _ in range(rows - 1):
        con.execute("INSERT INTO t VALUES(randomblob(2000))")
    con.close()
    return machine


@pytest.mark.parametrize("path", ["..", ".", "sub", "sub/..", "sub/.", "a\0b", ""])
def test_what_is_no_file_is_no_database(world: World, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    machine = world.machine()
    monkeypatch.chdir(machine.directory)
    os.mkdir("sub")
    with pytest.raises(ConfigError):
        bottomless_wal.connect(path, **world.options)
    for command in (bottomless_wal.restore, bottomless_wal.verify):
        with pytest.raises((ConfigError, RestoreError, ValueError)):
            command(path or ".", **world.options)
    assert os.listdir(".") == ["sub"], "something was left behind"
    assert not os.path.exists(f"{machine.directory}-bottomless")


def test_odd_names_and_ids_are_names_and_no_paths(world: World) -> None:
    machine = world.machine()
    for name, database_id in (("a%2Fb.db", "../.."), ("..db", "/etc/passwd"), ("=2E.db", "."), ("x\x1b[2J.db", "..")):
        con = machine.connect(name, database_id=database_id)
        con.execute("CREATE TABLE t(x)")
        con.close()
        stored = keys.database_name(database_id, name)
        assert world.bucket.log_image(stored) == machine.content(name)
        assert keys.split_name(stored) == (database_id, name)
    listed = {keys.parse_database_names(key) for key in world.bucket.listing()}
    assert len(listed) == 4
    assert None not in listed


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "body/../../../x", "a\0b", "body//x", "", "body/", "..", "body/x\n"])
def test_a_segment_cannot_name_a_body_elsewhere(name: str) -> None:
    header = hostile(1, 2, 1, [], body=Body("body/ok", 10, bytes(32)), page_count=1)
    with pytest.raises(ValueError):
        segment.validate(replace(header, body=Body(name, 10, bytes(32))))


def test_a_body_name_that_was_forged_into_a_segment_is_a_corruption(world: World) -> None:
    machine = made(world)
    data = segment.encode(hostile(3, 4, 1, [], body=Body("body/" + "x" * 14, 10, bytes(32)), page_count=1))
    tables = zstandard.ZstdDecompressor().decompress(data[128 : 128 + int.from_bytes(data[88:92], "big")])
    forged = zstandard.ZstdCompressor().compress(tables.replace(b"body/" + b"x" * 14, b"../../../../../x/yy"))
    head = bytearray(data[:120])
    head[88:92] = len(forged).to_bytes(4, "big")
    world.bucket.put(keys.segment_key(NAME, 3, 4), resealed(bytes(head), forged))
    (machine.directory / "app.db").unlink()
    with pytest.raises(CorruptionError, match="no body"):
        machine.connect()


def resealed(head: bytes, tables: bytes, blocks: bytes = b"") -> bytes:
    from hashlib import sha256

    data = head + sha256(head + tables).digest()[:8] + tables + blocks
    return data + sha256(data).digest()


@pytest.mark.parametrize("end", ["-bottomless", "-wal", "-journal"])
@pytest.mark.parametrize("there", [True, False])
def test_a_link_planted_beside_the_database_is_not_written_through(world: World, tmp_path: Path, end: str, there: bool) -> None:
    made(world)
    victim = tmp_path / "victim"
    if there:
        victim.write_bytes(b"precious" * 100)
    machine = world.machine()
    os.symlink(victim, machine.path() + end)
    try:
        con = machine.connect()
        con.execute("INSERT INTO t VALUES('more')")
        con.close()
    except ConfigError:
        assert end == "-bottomless"
    assert (victim.read_bytes() == b"precious" * 100) if there else not victim.exists()


@pytest.mark.parametrize("dangling", [True, False])
def test_a_restore_through_a_link_replaces_what_it_leads_to_and_nothing_else(world: World, tmp_path: Path, dangling: bool) -> None:
    machine = made(world)
    target, link = tmp_path / "elsewhere" / "target.db", tmp_path / "link.db"
    target.parent.mkdir()
    if not dangling:
        target.write_bytes(b"")
    os.symlink(target, link)
    done = bottomless_wal.restore(machine.path(), output=link, **world.options)
    assert done.path == str(target)
    assert link.is_symlink()
    assert target.read_bytes() == machine.content()
    assert sorted(os.listdir(target.parent)) == ["target.db"]


def test_a_directory_store_does_not_wait_for_pipes_nor_read_devices(world: World) -> None:
    machine = made(world)
    root = Path(world.root, world.endpoint.bucket)
    con = machine.connect()
    store = replica_of(con).store
    for key, make in (("pipe", os.mkfifo), ("zero", lambda path: os.symlink("/dev/zero", path))):
        make(root / key)
        for read in (lambda key=key: store.get(key, limit=100), lambda key=key: store.read(key, 0, 100)):
            with pytest.raises(StoreError, match="no file"):
                read()
    assert [entry.key for entry in store.list("pipe")] == []
    con.close()


def test_a_directory_store_lists_what_it_reads_when_the_log_is_behind_a_link(world: World) -> None:
    """A history must not look empty that can be read and written: an empty database would begin in its place."""
    machine = made(world)
    root = Path(world.root, world.endpoint.bucket)
    os.rename(root / f"{NAME}-wal", root.parent / "other disk")
    os.symlink(root.parent / "other disk", root / f"{NAME}-wal")
    os.symlink(root, root / f"{NAME}-wal" / "circle")
    con = world.machine().connect()
    assert con.execute("SELECT count(*) FROM t").get == 2
    assert bottomless_wal.status(con).txid == 3
    con.close()
    assert bottomless_wal.verify(machine.path(), **world.options).ok


def test_a_directory_store_is_not_impressed_by_depth(world: World) -> None:
    machine = made(world)
    deep = Path(world.root, world.endpoint.bucket, f"{NAME}-wal")
    back = os.getcwd()
    try:
        os.chdir(deep)
        for _ in range(1500):
            os.mkdir("d")
            os.chdir("d")
    finally:
        os.chdir(back)
    try:
        assert [row.name for row in admin.listing(**world.options)] == [NAME]
        assert bottomless_wal.verify(machine.path(), **world.options).ok
    finally:
        subprocess.run(["rm", "-r", str(deep / "d")], check=True)  # Python's own removal is impressed


# --- modes -----------------------------------------------------------------------------------------------------------------


WATCH = """
os.umask(0)
path, out = argv
modes = {}
real = os.open
def watching(name, *rest, **more):
    fd = real(name, *rest, **more)
    if isinstance(name, str) and "-bottomless-" in name and "-bottomless-bottomless" not in name:
        modes[os.path.basename(name)[:len("app.db-bottomless-")]] = os.fstat(fd).st_mode & 0o777
    return fd
os.open = watching
con = connect(path)
con.execute("INSERT INTO t VALUES(1)")
beside = {end: os.stat(path + end).st_mode & 0o777 for end in ("", "-wal", "-bottomless")}
con.close()
bottomless_wal.restore(path, output=out, **options)
print(json.dumps([modes, beside, os.stat(out).st_mode & 0o777]))
"""


def test_without_a_umask_nothing_is_writable_by_others(world: World) -> None:
    """What appears is as SQLite makes it (0644), and what is under construction is for nobody else."""
    made(world)
    machine = world.machine()
    temporary, beside, restored = json.loads(child(WATCH, machine.path(), machine.path("out.db"), options=world.options).stdout)
    assert set(temporary.values()) == {0o600}
    assert beside == {"": 0o644, "-wal": 0o644, "-bottomless": 0o644}
    assert restored == 0o644
    for path in Path(world.root, world.endpoint.bucket).rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


@pytest.mark.parametrize("mode", [0o600, 0o640])
def test_a_file_that_is_replaced_keeps_its_mode(world: World, mode: int) -> None:
    machine = made(world)
    os.chmod(machine.path(), mode)
    os.unlink(machine.path() + "-bottomless")
    bottomless_wal.restore(machine.path(), txid=1, force=True, **world.options)
    assert stat.S_IMODE(os.stat(machine.path()).st_mode) == mode
    con = machine.connect()  # brought forward: replaced once more
    con.execute("INSERT INTO t VALUES(1)")
    for end in ("", "-wal", "-bottomless"):
        assert stat.S_IMODE(os.stat(machine.path() + end).st_mode) == mode
    con.close()


# --- a bucket that lies ----------------------------------------------------------------------------------------------------


def hostile(pre: int, post: int, db_size: int, pages: list[Page], **changes: Any) -> SegmentHeader:
    """A header that is well formed, of pages of 512 bytes."""
    state = 0
    for page in pages:
        state ^= page.hash
    header = SegmentHeader(
        pre=pre, post=post, pre_hash=0, post_hash=state, page_size=512, db_size=db_size, page_count=len(pages), reset=False, view_txid=0,
        time_ms=0, writer=bytes(16), commits=(CommitRecord(post, state, 0),),
    )  # fmt: skip
    header = replace(header, **changes)
    return replace(header, commits=(CommitRecord(post, header.post_hash, 0),)) if "commits" not in changes else header


def page(pgno: int, content: bytes = b"x") -> Page:
    data = content.ljust(512, b"\0")
    return Page(pgno, page_hash(pgno, data), data)


def put(world: World, header: SegmentHeader, pages: list[Page]) -> None:
    world.bucket.make()
    blocks = [encode_block(pages, 512)] if pages else []
    world.bucket.put(keys.segment_key(NAME, header.pre, header.post), segment.encode(header, blocks))


LIMITED = """
import resource, time
for what in argv[1:]:
    path = os.path.join(os.path.dirname(argv[0]) if what == "reopen" else tempfile.mkdtemp(dir=os.path.dirname(argv[0])), "app.db")
    began = time.monotonic()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    said = ""
    try:
        if what in ("open", "reopen"):
            connect(path).close()
        elif what == "restore":
            bottomless_wal.restore(path, **options)
        elif what == "verify":
            report = bottomless_wal.verify(path, deep=True, **options)
            said = "" if report.ok else f"not sound: {report.problems} {report.notes}"
        elif what == "look":
            bottomless_wal.admin.inspect(path, **options)
    except bottomless_wal.BottomlessError as error:
        said = f"{type(error).__name__}: {error.message}"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - grown
    beside = os.path.dirname(path)
    disk = sum(os.stat(os.path.join(beside, name)).st_blocks * 512 for name in os.listdir(beside))
    print(json.dumps([said, grown // 1024, disk >> 20, time.monotonic() - began]))
"""


def outcomes(world: World, *what: str, machine: Machine | None = None, megabytes: int = 60, disk: int = 50) -> list[str]:
    """What each deed comes to ("" for well), in a process that may take so much memory and disk for it, and not long."""
    path = (machine or world.machine()).path()
    said = child("import tempfile\n" + LIMITED, path, *what, options=world.options).stdout
    found = [json.loads(line) for line in said.splitlines()]
    assert len(found) == len(what)
    for told, grown, used, seconds in found:
        assert grown < megabytes, f"{grown} MB of memory ({told})"
        assert used < disk, f"{used} MB of disk ({told})"
        assert seconds < 30, f"{seconds} s ({told})"
    return [told for told, *_ in found]


def test_a_size_without_the_pages_to_match_is_not_believed(world: World) -> None:
    """The database is said to have grown to 2**32 - 2 pages, and to have shrunk again: whoever walked over them would never end."""
    first = page(1)
    put(world, hostile(0, 1, 1, [first]), [first])
    put(world, hostile(1, 2, 2**32 - 2, [], pre_hash=first.hash, post_hash=first.hash), [])
    put(world, hostile(2, 3, 1, [], pre_hash=first.hash, post_hash=first.hash), [])
    assert all("4294967294" in said for said in outcomes(world, "open", "restore", "verify"))


def test_a_local_file_does_not_learn_such_a_size(world: World) -> None:
    machine = made(world)
    con = machine.connect()
    status = bottomless_wal.status(con)
    con.close()
    size = int.from_bytes(machine.content()[16:18], "big")
    lie = hostile(
        3, 4, 2**32 - 2, [], pre_hash=status.state_hash, post_hash=status.state_hash, page_size=size
    )  # same state, so the file is the head, of another size
    world.bucket.put(keys.segment_key(NAME, 3, 4), segment.encode(lie))
    for path in machine.directory.glob("*-bottomless"):
        path.unlink()
    assert all("4294967294" in said for said in outcomes(world, "reopen", "open", machine=machine))


@pytest.mark.parametrize("db_size", [0, 2**32 - 2, 2**32 - 1])
@pytest.mark.parametrize("txid", [0, 7, 2**63 - 1, 2**64 - 1])
def test_page_objects_that_lie_about_size_or_txid_restore_nothing(world: World, db_size: int, txid: int) -> None:
    world.bucket.make()
    first = page(1)
    trailer = PageTrailer(512, 1, txid, first.hash, first.hash, db_size)
    world.bucket.put(keys.page_key(NAME, 1), encode_page_object(first.data, trailer))
    machine = world.machine()
    for attempt in (lambda: bottomless_wal.restore(machine.path(), **world.options), machine.connect):
        with pytest.raises((RestoreError, CorruptionError)):
            attempt()
    assert machine.files() == {}


def test_a_page_object_far_away_does_not_fill_the_disk(world: World) -> None:
    world.bucket.make()
    for pgno in (1, 2**32 - 2):
        one = page(pgno)
        trailer = PageTrailer(512, pgno, 5, one.hash, one.hash, 2**32 - 2)
        world.bucket.put(keys.page_key(NAME, pgno), encode_page_object(one.data, trailer))
    assert "is missing" in outcomes(world, "restore")[0]


def test_pages_beyond_the_end_are_refused(world: World) -> None:
    pages = [page(1), page(3)]
    with pytest.raises(ValueError):
        put(world, hostile(0, 1, 2, pages), pages)


def test_bombs_are_not_unpacked(world: World) -> None:
    """Frames that hold, or claim, far more than they may: in the tables, in the pages, in page objects."""
    made(world)
    data = world.bucket.get(keys.segment_key(NAME, 2, 3))
    tables = int.from_bytes(data[88:92], "big")
    for says_its_size in (True, False):
        bomb = zstandard.ZstdCompressor(level=1, write_content_size=says_its_size).compress(bytes(100 << 20))
        for key in world.bucket.listing(f"{NAME}-0"):
            world.bucket.put(key, bomb)
        head = bytearray(data[:120])
        head[88:92], head[92:96], head[96:104] = len(bomb).to_bytes(4, "big"), (11 << 20).to_bytes(4, "big"), bytes(8)
        world.bucket.put(keys.segment_key(NAME, 2, 3), resealed(bytes(head), bomb))
        in_tables = outcomes(world, "open", "verify", "look")
        head = bytearray(data[:120])
        block = (1).to_bytes(4, "big") + len(bomb).to_bytes(4, "big") + data[128 + tables + 8 : 128 + tables + 20] + bomb
        head[96:104] = len(block).to_bytes(8, "big")
        world.bucket.put(keys.segment_key(NAME, 2, 3), resealed(bytes(head), data[128 : 128 + tables], block))
        assert all(in_tables + outcomes(world, "open", "verify"))
    for key in world.bucket.listing(f"{NAME}-wal/"):
        world.bucket.delete(key)
    assert all(outcomes(world, "open", "verify")), "page objects alone"


def test_a_small_segment_of_a_large_transaction_is_restored_in_little_memory(world: World) -> None:
    """Zeros: a thousand pages take one kilobyte, so that gigabytes fit into the blocks of one segment."""
    world.options.update(pages="off", ack="log")
    con = world.machine().connect()
    con.execute("CREATE TABLE t(x); INSERT INTO t VALUES(zeroblob(80000000))")
    con.close()
    assert len(world.bucket.get(keys.segment_key(NAME, 1, 2))) < 1 << 20
    assert outcomes(world, "open", megabytes=40, disk=100) == [""]


def test_a_body_that_claims_to_be_endless_is_not_waited_for(world: World) -> None:
    first = page(1)
    world.bucket.make()
    lie = hostile(0, 1, 1, [first], body=Body("body/x", 2**60, bytes(32)))
    world.bucket.put(keys.segment_key(NAME, 0, 1), segment.encode(lie))
    world.bucket.put(f"{NAME}-wal/body/x", encode_block([first], 512))
    assert all("1152921504606846976" in said for said in outcomes(world, "open", "restore", "verify"))


def test_many_overlapping_edges_end_in_an_error(world: World) -> None:
    """None of them begins at 0, so every way there could be is looked for."""
    made(world)
    data = world.bucket.get(keys.segment_key(NAME, 2, 3))
    root = Path(world.root, world.endpoint.bucket)
    for number in range(800):
        root.joinpath(keys.segment_key(NAME, 5 + number, 4000 + number)).write_bytes(data)
    assert all(outcomes(world, "restore", "verify", "look"))


def test_many_foreign_objects_change_nothing(world: World, caplog: pytest.LogCaptureFixture) -> None:
    made(world)
    root = Path(world.root, world.endpoint.bucket)
    for number in range(600):
        (root / f"{NAME}-wal" / f"foreign {number}").touch()
        (root / f"{NAME}-00{number}").touch()
    assert outcomes(world, "open", "verify", "restore", "look") == [""] * 4
    replica = world.machine().connect()
    replica.close()
    said = [record for record in caplog.records if "foreign" in record.getMessage()]
    assert 0 < len(said) < 20, "one line for all of them, whenever they are listed"


def test_an_index_that_tells_of_pages_without_end_is_made_anew(world: World) -> None:
    """Well formed in every field, and its size is a lie that leaves the state hash as it is."""
    from bottomless_wal.replication.index import HEADER_SIZE, IndexHeader

    machine = made(world)
    index = Path(machine.path() + "-bottomless")
    data = index.read_bytes()
    header = IndexHeader.decode(data[:HEADER_SIZE])
    assert header is not None
    encoded = replace(header, db_size=2**32 - 1).encode()
    index.write_bytes(encoded + data[len(encoded) :])
    assert outcomes(world, "reopen", machine=machine) == [""]
    con = machine.connect()
    con.execute("INSERT INTO t VALUES(randomblob(5000)); DELETE FROM t; VACUUM")
    world.stored(con)
    con.close()


@pytest.mark.parametrize("left", ["nothing", "header", "half"])
def test_a_commit_over_an_index_that_was_cut_is_not_built_on_zeros(world: World, left: str) -> None:
    """The index is only a cache: what is lost of it must not become a wrong state hash in the log."""
    machine = world.machine()
    con = machine.connect()
    con.execute("CREATE TABLE t(x); INSERT INTO t VALUES(randomblob(20000))")
    index = Path(machine.path() + "-bottomless")
    os.truncate(index, {"nothing": 0, "header": 16384, "half": 16384 + 16 * 2}[left])
    con.execute("INSERT INTO t VALUES(randomblob(5000))")
    con.execute("DELETE FROM t WHERE rowid = 1")
    world.stored(con)
    con.close()
    world.comes_back(machine)
