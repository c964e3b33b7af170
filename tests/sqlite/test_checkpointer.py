"""The checkpointer: its errors are not those of a commit, and it survives them."""

from __future__ import annotations

from typing import Any

import apsw
import pytest

import bottomless_wal
from bottomless_wal.sqlite import vfs
from bottomless_wal.sqlite.checkpointer import Checkpointer
from tests.support.cluster import Machine, World, replica_of, rows, until


def _opened(world: World, **options: Any) -> tuple[Machine, apsw.Connection]:
    here = world.machine()
    con = here.connect(**options)
    con.execute("CREATE TABLE t(x)")
    bottomless_wal.flush(con)
    return here, con


@pytest.mark.parametrize("error", [apsw.FullError, apsw.IOError, apsw.ReadOnlyError])
def test_an_error_of_the_checkpoint_is_not_the_commits(world: World, monkeypatch: pytest.MonkeyPatch, error: type[apsw.Error]) -> None:
    """A COMMIT that is stored returns, though the checkpoint that follows it failed."""
    here, con = _opened(world)

    def write(self: object, data: bytes, offset: int) -> None:
        raise error("the main file cannot be written")

    with monkeypatch.context() as patch:
        patch.setattr(vfs, "AUTOCHECKPOINT_FRAMES", 1)
        patch.setattr(vfs._MainFile, "xWrite", write, raising=False)
        for n in range(3):
            con.execute("INSERT INTO t VALUES (?)", (n,))
    assert rows(con) == 3
    world.stored(con)
    con.close()
    world.comes_back(here)


@pytest.mark.parametrize("how", ["error", "closed"])
def test_the_checkpointer_survives(world: World, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """After a checkpoint that failed, or a connection that was closed under it, the next one is made."""
    here, con = _opened(world)
    con.execute("INSERT INTO t VALUES (1)")
    checkpointer = replica_of(con).checkpointer
    seen: list[apsw.Connection] = []
    done: list[bool] = []
    real = Checkpointer._checkpoint

    def checkpoint(self: Checkpointer, connection: apsw.Connection, frames: int) -> None:
        seen.append(connection)
        if len(seen) == 1:
            if how == "error":
                raise apsw.FullError("the disk is full")
            connection.close()
        real(self, connection, frames)
        done.append(True)

    monkeypatch.setattr(Checkpointer, "_checkpoint", checkpoint)

    def asked() -> bool:
        checkpointer.ask(9000)
        return len(done) > 0

    until(asked, 10)
    con.execute("INSERT INTO t VALUES (2)")
    world.stored(con)
    con.close()
    world.comes_back(here)
