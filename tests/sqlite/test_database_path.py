"""A path that is a link: the name in the bucket is that of the file, so the link must have the same name."""

from __future__ import annotations

import os
import shutil
import urllib.parse
from collections.abc import Mapping
from typing import Any

import apsw
import pytest

import bottomless_wal
from bottomless_wal import admin
from bottomless_wal.core.errors import ConfigError
from tests.support.cluster import Machine, World, rows

FLAGS = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE | apsw.SQLITE_OPEN_URI


def uri(path: str, options: Mapping[str, Any]) -> str:
    """The URI that opens the database at `path` with `options`."""
    told = {name: "1" if value is True else value for name, value in options.items()}
    return f"file:{urllib.parse.quote(path)}?vfs=bottomless&{urllib.parse.urlencode(told)}"


def made(world: World, commits: int = 1) -> Machine:
    machine = world.machine()
    con = machine.connect()
    con.execute("CREATE TABLE t(x)")
    for number in range(1, commits):
        con.execute("INSERT INTO t VALUES(?)", (number,))
    con.close()
    return machine


@pytest.mark.parametrize("target", ["database", "empty", "missing"])
@pytest.mark.parametrize("steps", [1, 2])
def test_a_link_with_another_name_than_its_file_is_refused(world: World, target: str, steps: int) -> None:
    machine = made(world)
    volume = machine.directory / "volume"
    volume.mkdir()
    if target == "database":
        shutil.copy(machine.path(), volume / "v1.db")
    elif target == "empty":
        (volume / "v1.db").touch()
    link = machine.path("link.db")
    os.symlink("volume/v1.db", link if steps == 1 else machine.path("middle.db"))
    if steps == 2:
        os.symlink("middle.db", link)
    before = world.bucket.listing()
    name = bottomless_wal.register()
    other = machine.connect("main.db")
    attempts = {
        "connect": lambda: machine.connect("link.db"),
        "connect by URI": lambda: bottomless_wal.connect(f"file:{link}", **world.options),
        "apsw": lambda: apsw.Connection(link, vfs=name),
        "apsw by URI": lambda: apsw.Connection(uri(link, world.options), flags=FLAGS),
        "attach": lambda: other.execute("ATTACH ? AS a", (link,)),
        "attach by URI": lambda: other.execute("ATTACH ? AS a", (uri(link, world.options),)),
        "restore": lambda: bottomless_wal.restore(link, force=True, **world.options),
        "verify": lambda: bottomless_wal.verify(link, **world.options),
        "inspect": lambda: admin.inspect(link, **world.options),
        "reset": lambda: bottomless_wal.reset_from_local(link, **world.options),
        "compact": lambda: bottomless_wal.compact(link, **world.options),
    }
    for told, attempt in attempts.items():
        with pytest.raises(ConfigError, match="is a link to") as caught:
            attempt()
        assert str(volume / "v1.db") in caught.value.hint, told
    other.close()
    assert [key for key in world.bucket.listing() if not key.startswith("main.db")] == before
    assert (volume / "v1.db").exists() == (target != "missing")
    # Its own path is the way out.
    con = bottomless_wal.connect(volume / "v1.db", **world.options)
    con.execute("CREATE TABLE u(x)")
    assert bottomless_wal.status(con).name == "v1.db"
    con.close()


def test_links_that_hide_no_name(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = world.machine()
    volume = machine.directory / "volume"
    volume.mkdir()
    os.symlink("volume", machine.path("folder"))
    os.symlink("volume/app.db", machine.path("app.db"))  # leads nowhere yet
    con = machine.connect()
    con.execute("CREATE TABLE t(x); INSERT INTO t VALUES(1)")
    again = bottomless_wal.connect(machine.directory / "folder" / "app.db", **world.options)
    assert rows(again) == 1
    attached = machine.connect("main.db")
    attached.execute("ATTACH ? AS a", (uri(machine.path("folder/../volume/app.db"), world.options),))
    assert rows(attached, "SELECT count(*) FROM a.t") == 1
    for one in (con, again, attached):
        one.close()
    monkeypatch.chdir(volume)
    con = bottomless_wal.connect("app.db", **world.options)
    assert bottomless_wal.status(con).name == "app.db"
    con.close()
    assert bottomless_wal.verify(machine.path(), **world.options).ok
    assert os.path.islink(machine.path())
    there = world.machine().connect()
    assert rows(there) == 1


@pytest.mark.parametrize("how", ["mode=ro", "immutable=1", "flags", "vfs=unix", "own connections"])
def test_a_link_with_another_name_may_be_read(world: World, how: str) -> None:
    machine = made(world, 3)
    os.symlink("app.db", machine.path("link.db"))
    bottomless_wal.register()
    if how == "own connections":
        con = machine.connect()  # of its own, by the resolved path, while the link was the last name that SQLite resolved
        with pytest.raises(ConfigError):
            machine.connect("link.db")
        con.execute("INSERT INTO t VALUES(9)")
        bottomless_wal.flush(con)
        world.stored(con)
        return
    if how == "vfs=unix":
        con = machine.connect("other.db")
        con.execute(f"ATTACH 'file:{machine.path('link.db')}?vfs=unix' AS a")
        assert rows(con, "SELECT count(*) FROM a.t") == 2
        return
    flags = apsw.SQLITE_OPEN_READONLY if how == "flags" else apsw.SQLITE_OPEN_READWRITE
    name = machine.path("link.db") if how == "flags" else f"file:{machine.path('link.db')}?{how}"
    con = apsw.Connection(name, flags=flags | apsw.SQLITE_OPEN_URI, vfs="bottomless")
    world.connections.append(con)
    assert rows(con) == 2
