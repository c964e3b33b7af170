"""Segments that were stored though their answers were lost: the commit is adopted, and its page objects with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import apsw
import pytest

import bottomless_wal
from bottomless_wal import ReplicationError
from bottomless_wal.storage import Receipt
from bottomless_wal.storage.directory import DirectoryStore
from tests.support.cluster import Machine, World, existing, refusal


def _opened(world: World, **options: Any) -> tuple[Machine, apsw.Connection]:
    here = world.machine()
    con = here.connect(**options)
    con.execute("CREATE TABLE t(x)")
    bottomless_wal.flush(con)
    return here, con


@pytest.fixture
def answer_lost(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it: the next segment is stored, its answer lost, and the repetition within the same request finds the key taken."""
    left = [0]
    real = DirectoryStore.create

    def create(self: DirectoryStore, key: str, data: bytes) -> Receipt:
        receipt = real(self, key, data)
        if left[0] and "-wal/" in key:
            left[0] -= 1
            receipt = real(self, key, data)
            assert not receipt.created
        return receipt

    monkeypatch.setattr(DirectoryStore, "create", create)

    def arm() -> None:
        left[0] += 1

    return arm


@pytest.mark.parametrize("ack", ["pages", "log", "local"])
@pytest.mark.parametrize("first", [True, False], ids=["the first commit", "a later one"])
def test_a_commit_whose_repeated_request_finds_its_own_object_is_adopted(
    world: World, answer_lost: Callable[[], None], ack: str, first: bool
) -> None:
    """An attempt whose answer was lost, and whose repetition is told that the key is taken, is a commit like any other."""
    here = world.machine()
    con = here.connect(ack=ack)
    if not first:
        con.execute("CREATE TABLE u(x)")
        bottomless_wal.flush(con)
    answer_lost()
    con.execute("CREATE TABLE t(x)")
    if ack == "local":
        bottomless_wal.flush(con)
    world.stored(con, view=ack != "log")
    answer_lost()
    with con:
        con.executemany("INSERT INTO t VALUES (randomblob(3000))", [()] * 20)
    bottomless_wal.flush(con)
    world.stored(con)
    assert world.bucket.head("app.db") == (2 if first else 3)
    con.close()
    world.comes_back(here)


def test_an_existing_database_is_opened_though_the_answer_was_lost(world: World, answer_lost: Callable[[], None]) -> None:
    """The initial replication adopts its own segment."""
    here = existing(world)
    answer_lost()
    con = here.connect()
    assert world.bucket.edges("app.db") == [(0, 1)]
    bottomless_wal.flush(con)
    world.stored(con)
    con.close()
    world.comes_back(here)


def test_a_reset_is_carried_out_though_the_answer_was_lost(world: World, answer_lost: Callable[[], None]) -> None:
    """initial_replication=force adopts its own segment, and resets once."""
    _, con = _opened(world)
    con.close()
    here = existing(world)
    answer_lost()
    con = here.connect(initial_replication="force")
    assert world.bucket.edges("app.db") == [(0, 1), (1, 2)]
    assert world.bucket.segment("app.db", 1, 2).reset
    bottomless_wal.flush(con)
    world.stored(con)
    con.close()
    world.comes_back(here)


def test_what_was_done_while_it_was_closed_is_sent_though_the_answer_was_lost(world: World, answer_lost: Callable[[], None]) -> None:
    """The difference that an open sends is adopted when its answer was lost."""
    here, con = _opened(world)
    con.close()
    here.stock_killed("INSERT INTO t VALUES (1)")
    answer_lost()
    con = here.connect()
    assert world.bucket.edges("app.db") == [(0, 1), (1, 2)]
    bottomless_wal.flush(con)
    world.stored(con)
    con.close()
    world.comes_back(here)


def test_an_adopted_commit_is_acknowledged_with_its_page_objects_only(world: World, answer_lost: Callable[[], None]) -> None:
    """With ack=pages a COMMIT that was adopted raises when its page objects could not be stored."""
    here, con = _opened(world)
    store = refusal(con)
    store.pages()
    answer_lost()
    with pytest.raises(ReplicationError, match="page objects"):
        con.execute("INSERT INTO t VALUES (1)")
    world.stored(con, view=False)
    store.nothing()
    con.execute("INSERT INTO t VALUES (2)")
    world.stored(con)
    con.close()
    world.comes_back(here)


def test_a_commit_adopted_by_the_next_one_has_its_page_objects(world: World) -> None:
    """When a COMMIT returns with ack=pages, the page objects of the attempt that it adopted are there too."""
    _, con = _opened(world)
    with con:
        con.executemany("INSERT INTO t VALUES (zeroblob(4000))", [()] * 20)
    refusal(con).lose_answers()
    with pytest.raises(ReplicationError):
        con.execute("UPDATE t SET x = randomblob(4000)")
    con.execute("INSERT INTO t VALUES (2)")
    world.stored(con)
