"""The writer of page objects: it works in the background, from the open on."""

from __future__ import annotations

from typing import Any

import apsw
import pytest

import bottomless_wal
from tests.support.cluster import Machine, World, existing, until


def _opened(world: World, **options: Any) -> tuple[Machine, apsw.Connection]:
    here = world.machine()
    con = here.connect(**options)
    con.execute("CREATE TABLE t(x)")
    bottomless_wal.flush(con)
    return here, con


@pytest.mark.parametrize("policy", ["error", "force"])
def test_the_page_view_of_an_existing_database_is_put_in_the_background(world: World, policy: str) -> None:
    """Opening is enough: neither a commit nor flush() nor a close is needed for its page objects."""
    if policy == "force":
        _, con = _opened(world)
        con.close()
    here = existing(world, 60)
    con = here.connect(initial_replication=policy)
    until(lambda: bottomless_wal.status(con).view_txid == world.bucket.head("app.db"))
    world.stored(con)
    con.close()
    world.comes_back(here)
