"""The reader of the database file: an error while it takes its read transaction."""

from __future__ import annotations

from typing import Any

import apsw
import pytest

import bottomless_wal
from bottomless_wal.sqlite.database_reader import LocalDatabase
from tests.support.cluster import Machine, World, replica_of


def _opened(world: World, **options: Any) -> tuple[Machine, apsw.Connection]:
    here = world.machine()
    con = here.connect(**options)
    con.execute("CREATE TABLE t(x)")
    bottomless_wal.flush(con)
    return here, con


def test_one_error_while_pinning_fails_one_commit(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pin that could not read is let go: the next commit is replicated, and the failed one with it."""
    here, con = _opened(world)
    local = replica_of(con).local
    real = LocalDatabase._touch
    left = [1]

    def touch(connection: apsw.Connection) -> None:
        if left[0] and connection is local._pin:
            left[0] -= 1
            raise apsw.CantOpenError("unable to open database file")
        real(connection)

    monkeypatch.setattr(LocalDatabase, "_touch", staticmethod(touch))
    with pytest.raises(apsw.Error):
        con.execute("INSERT INTO t VALUES (1)")
    assert left == [0]
    con.execute("INSERT INTO t VALUES (2)")
    world.stored(con)
    con.close()
    world.comes_back(here)
