"""A replica that was overtaken while it was idle leaves the page objects of the new writer alone."""

from __future__ import annotations

import threading
from typing import Any

import apsw
import pytest

import bottomless_wal
from bottomless_wal import FencedError, ReplicationError
from tests.support.cluster import Machine, World, child, refusal, rows, until


def _opened(world: World, **options: Any) -> tuple[Machine, apsw.Connection]:
    here = world.machine()
    con = here.connect(**options)
    con.execute("CREATE TABLE t(x)")
    bottomless_wal.flush(con)
    return here, con


def _page_objects(world: World, name: str = "app.db") -> dict[str, bytes]:
    return {key: data for key, data in world.bucket.content().items() if key.startswith(f"{name}-0")}


GROW = """
con = connect(argv[0])
with con: con.executemany("INSERT INTO t VALUES (randomblob(4000))", [()] * 50)
con.execute("UPDATE t SET x = randomblob(4000)")
bottomless_wal.flush(con)
con.close()
"""


@pytest.mark.parametrize("how", ["flush", "close"])
def test_an_overtaken_replica_deletes_no_page_objects(world: World, how: str) -> None:
    """A machine that was restored and stayed idle leaves the page objects of the one that writes alone."""
    _, con = _opened(world)
    con.close()
    idle = world.machine()
    con = idle.connect()
    writer = world.machine()
    child(GROW, writer.path(), options=world.options)
    before = world.bucket.content()
    assert len(_page_objects(world)) > 50
    if how == "flush":
        with pytest.raises(FencedError):
            bottomless_wal.flush(con, timeout=20)
    con.close()
    assert world.bucket.content() == before
    world.comes_back(writer)


@pytest.mark.parametrize("how", ["flush", "close", "waiting"])
def test_an_overtaken_replica_overwrites_no_page_objects(world: World, how: str) -> None:
    """A backlog of the page view that was left when another machine took over is not put over the newer objects."""
    here, con = _opened(world)
    con.execute("INSERT INTO t VALUES (zeroblob(90000))")
    store = refusal(con)
    store.pages()
    with pytest.raises(ReplicationError):
        con.execute("UPDATE t SET x = randomblob(90000)")
    writer = world.machine()
    child(GROW, writer.path(), options=world.options)
    before = world.bucket.content()
    store.nothing()
    if how == "flush":
        with pytest.raises(FencedError):
            bottomless_wal.flush(con, timeout=20)
    elif how == "waiting":
        until(lambda: isinstance(bottomless_wal.status(con).last_error, FencedError), 5)
    con.close()
    assert world.bucket.content() == before
    world.comes_back(writer)
    con = here.connect()
    assert rows(con) == 51
    con.close()


@pytest.mark.parametrize("how", ["commit", "flush", "close"])
def test_a_replica_that_adopts_and_was_overtaken_overwrites_no_page_objects(world: World, how: str) -> None:
    """An own attempt that is stored, and that another machine has followed, is not put over the newer page objects."""
    _, con = _opened(world)
    con.execute("INSERT INTO t VALUES (zeroblob(90000))")
    store = refusal(con)
    store.lose_answers()
    store.after.append(lambda kind, key: store.log() if kind == "create" else None)  # nor is it found out in the background
    with pytest.raises(ReplicationError):
        con.execute("UPDATE t SET x = randomblob(90000)")
    store.hold(held := threading.Event())
    writer = world.machine()
    child(GROW, writer.path(), options=world.options)
    before = world.bucket.content()
    store.nothing()
    held.set()
    if how == "commit":
        with pytest.raises(FencedError):
            con.execute("INSERT INTO t VALUES (1)")
    elif how == "flush":
        with pytest.raises(FencedError):
            bottomless_wal.flush(con, timeout=20)
    con.close()
    assert world.bucket.content() == before
    world.comes_back(writer)
