"""Options: the same names in four places, the later place wins, and what is unknown or bad is refused with the list of what is known."""

from __future__ import annotations

import os
import threading
from typing import Any

import apsw
import pytest

import bottomless_wal
from bottomless_wal import ConfigError
from bottomless_wal.core.config import OPTIONS, Config
from bottomless_wal.runtime import connect
from tests.support.cluster import World, replica_of, rows


@pytest.fixture(autouse=True)
def fresh_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """`register()` keeps its defaults for the process: each test starts without."""
    bottomless_wal.register()
    monkeypatch.setattr(connect._opener, "defaults", {})


def _uri(path: str, **parameters: object) -> str:
    return f"file:{path}?vfs=bottomless" + "".join(f"&{name}={value}" for name, value in parameters.items())


def _open(world: World, uri: str) -> apsw.Connection:
    con = apsw.Connection(uri, flags=apsw.SQLITE_OPEN_URI | apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE)
    world.connections.append(con)
    return con


def _environment(monkeypatch: pytest.MonkeyPatch, **options: object) -> None:
    for name, value in options.items():
        monkeypatch.setenv(f"LIBSQL_BOTTOMLESS_{name.upper()}", str(value))


def test_each_place_wins_over_the_one_before(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    path = world.machine().path()
    where = {"endpoint": world.options["endpoint"], "create_bucket": "1"}
    _environment(monkeypatch, **where, bucket="from-environment", level=4, concurrency=4, ack="log")

    def seen(con: apsw.Connection) -> tuple[str, int, int, str]:
        config = replica_of(con).config
        con.close()
        return config.bucket, config.level, config.concurrency, config.ack

    assert seen(_open(world, _uri(path))) == ("from-environment", 4, 4, "log")
    bottomless_wal.register(bucket="from-register", level=5, concurrency=5)
    assert seen(_open(world, _uri(path))) == ("from-register", 5, 5, "log")
    con = bottomless_wal.connect(path, bucket="from-connect", level=6)
    assert seen(con) == ("from-connect", 6, 5, "log")
    con = bottomless_wal.connect(_uri(path, bucket="from-uri"), bucket="from-connect", level=6)
    assert seen(con) == ("from-uri", 6, 5, "log")


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_has_one_name_in_all_four_places(world: World, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    values: dict[str, Any] = {
        "endpoint": world.options["endpoint"] + "/sub",
        "bucket": "other",
        "database_id": "x",
        "initial_replication": "skip",
        "ack": "local",
        "pages": "off",
        "interval": 0.5,
        "retry_timeout": 7.0,
        "connect_timeout": 3.0,
        "read_timeout": 4.0,
        "create_bucket": True,
        "concurrency": 3,
        "level": 9,
        "compaction": False,
        "snapshot_interval": 3600.0,
        "retention": 7200.0,
        "keep_snapshots": 3,
    }
    value = values[name]
    path = world.machine().path()
    where: dict[str, Any] = {"endpoint": world.options["endpoint"], "create_bucket": True}
    if name == "endpoint":
        os.mkdir(str(value).removeprefix("file://"))
    where.pop(name, None)

    def seen(con: apsw.Connection) -> object:
        found = getattr(replica_of(con).config, name)
        con.close()
        return found

    assert seen(bottomless_wal.connect(path, **where, **{name: value})) == value
    text = int(value) if isinstance(value, bool) else value
    assert seen(_open(world, _uri(path, **{**where, "create_bucket": 1}, **{name: text} if name != "create_bucket" else {}))) == value
    with monkeypatch.context() as patched:
        _environment(patched, **{**where, name: text})
        assert seen(_open(world, _uri(path))) == value
    bottomless_wal.register(**{**where, name: value})
    assert seen(_open(world, _uri(path))) == value


@pytest.mark.parametrize("place", ["environment", "register", "connect", "uri"])
@pytest.mark.parametrize(
    ("name", "value"), [("endpiont", "x"), ("ack", "maybe"), ("level", "99"), ("interval", "-1"), ("create_bucket", "perhaps")]
)
def test_what_is_unknown_or_bad_is_refused_with_what_is_known(
    world: World, monkeypatch: pytest.MonkeyPatch, place: str, name: str, value: str
) -> None:
    here = world.machine()
    options = {name: value}

    def try_it() -> None:
        if place == "environment":
            _environment(monkeypatch, **options)
            here.connect()
        elif place == "register":
            bottomless_wal.register(**options)
        elif place == "connect":
            here.connect(**options)
        else:
            _open(world, _uri(here.path(), **{**world.options, **options}))

    with pytest.raises(ConfigError) as caught:
        try_it()
    assert name in caught.value.message
    known = ("endpoint", "bucket", "retry_timeout") if name == "endpiont" else {"ack": ("pages", "log", "local")}.get(name, (name,))
    assert all(word in caught.value.hint for word in known)
    assert here.files() == {}


def test_a_refused_register_changes_nothing(world: World) -> None:
    bottomless_wal.register(level=5)
    with pytest.raises(ConfigError):
        bottomless_wal.register(level=6, ack="never")
    con = world.machine().connect()
    assert replica_of(con).config.level == 5


def test_register_is_idempotent_and_thread_safe(world: World) -> None:
    names: list[str] = []
    threads = [threading.Thread(target=lambda: names.append(bottomless_wal.register(level=4))) for _ in range(8)]
    hooks = len(apsw.connection_hooks)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names == ["bottomless"] * 8
    assert len(apsw.connection_hooks) == hooks, "one connection hook, however often it is registered"
    assert apsw.vfs_names().count("bottomless") == 1


def test_the_options_of_one_connect_are_gone_for_the_next(world: World) -> None:
    here = world.machine()
    here.connect(level=7).close()
    con = here.connect()
    assert replica_of(con).config.level == Config().level


def test_a_failed_connect_leaves_no_options_behind(world: World) -> None:
    here = world.machine()
    with pytest.raises(ConfigError):
        here.connect(level=7, bogus=1)
    con = here.connect()
    assert replica_of(con).config.level == Config().level


def test_attach_takes_its_own_parameters(world: World) -> None:
    here = world.machine()
    con = here.connect("a.db")
    options = {**world.options, "create_bucket": 1, "database_id": "b", "level": 8}
    con.execute(f"ATTACH '{_uri(here.path('b.db'), **options)}' AS b")
    assert replica_of(con, "b").config.level == 8
    assert con.execute("PRAGMA b.journal_mode=wal").get == "wal"
    con.execute("CREATE TABLE b.t(x)")
    world.stored(con, "b~b.db", schema="b")


def test_sqlites_own_parameters_pass_through(world: World) -> None:
    here = world.machine()
    con = bottomless_wal.connect(_uri(here.path(), mode="rwc", cache="private", psow=1), **world.options)
    world.connections.append(con)
    con.execute("CREATE TABLE t(x)")
    with pytest.raises(apsw.CantOpenError):
        bottomless_wal.connect(_uri(here.path("missing.db"), mode="rw"), **world.options)


def test_mode_rw_of_a_missing_file_restores_it_or_fails_but_never_starts_a_new_one(world: World) -> None:
    here = world.machine()
    con = here.connect()
    con.execute("CREATE TABLE t(x)")
    con.close()
    elsewhere = world.machine()
    con = bottomless_wal.connect(_uri(elsewhere.path(), mode="rw"), **world.options)
    world.connections.append(con)
    assert rows(con) == 0


def test_percent_escapes_in_a_uri(world: World) -> None:
    here = world.machine()
    con = bottomless_wal.connect(f"file:{here.path('my%20app%231.db')}?database_id=a%26b", **world.options)
    world.connections.append(con)
    con.execute("CREATE TABLE t(x)")
    assert os.path.exists(here.path("my app#1.db"))
    world.stored(con, "a=26b~my=20app=231.db")


def test_page_size_is_for_a_new_database_and_an_old_one_keeps_its_own(world: World) -> None:
    here = world.machine()
    con = here.connect(page_size=8192)
    con.execute("CREATE TABLE t(x)")
    con.close()
    con = here.connect(page_size=1024)
    assert con.execute("PRAGMA page_size").get == 8192
    con.execute("VACUUM")
    assert con.execute("PRAGMA page_size").get == 8192
    con.close()
    con = world.machine().connect(page_size=1024)
    assert con.execute("PRAGMA page_size").get == 8192


def test_the_progress_of_a_restore_is_reported(world: World) -> None:
    here = world.machine()
    seen: list[tuple[int, int]] = []
    con = here.connect(progress=lambda done, total: seen.append((done, total)))
    con.execute("CREATE TABLE t(x); INSERT INTO t VALUES (randomblob(100000))")
    con.close()
    here.connect(progress=lambda done, total: seen.append((done, total))).close()
    assert seen == [], "nothing was restored"
    con = world.machine().connect(progress=lambda done, total: seen.append((done, total)))
    assert rows(con) == 1
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] > 100000


def test_an_error_of_the_progress_ends_the_open(world: World) -> None:
    con = world.machine().connect()
    con.execute("CREATE TABLE t(x)")
    con.close()

    def stop(done: int, total: int) -> None:
        raise RuntimeError("enough")

    elsewhere = world.machine()
    with pytest.raises(RuntimeError, match="enough"):
        elsewhere.connect(progress=stop)
    assert not os.path.exists(elsewhere.path())
    assert rows(elsewhere.connect()) == 0


def test_the_arguments_of_a_connect_are_for_its_own_connection(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a connection that a hook opens meanwhile gets them, nor does it take them away."""
    here = world.machine()
    opened: list[apsw.Connection] = []

    def hook(con: apsw.Connection) -> None:
        if not opened:
            opened.append(con)
            opened.append(_open(world, _uri(here.path("other.db"), **{**world.options, "create_bucket": 1})))
            opened.append(here.connect("third.db", page_size=1024, level=8))

    monkeypatch.setattr(apsw, "connection_hooks", [hook])
    con = here.connect(page_size=8192, level=7)
    _, other, third = opened
    assert other.execute("PRAGMA journal_mode=wal").get == "wal"
    for each, size, level in ((con, 8192, 7), (other, 4096, Config().level), (third, 1024, 8)):
        assert (each.execute("PRAGMA page_size").get, replica_of(each).config.level) == (size, level)


def test_no_secret_is_repeated(world: World) -> None:
    with pytest.raises(ConfigError) as caught:
        world.machine().connect(endpoint="http://user:hunter2@localhost:9000")
    assert "hunter2" not in str(caught.value)
