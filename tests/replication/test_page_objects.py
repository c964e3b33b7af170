"""Page objects: which pages are due."""

from __future__ import annotations

import bottomless_wal
from tests.support.cluster import World, replica_of


def test_a_page_that_was_changed_and_changed_back_while_the_view_was_filled_is_put(world: World) -> None:
    """Locally ahead of the log when its turn came, and back at what the log has before it was stored: no commit carries it."""
    con = world.machine().connect(ack="local", interval=600, compaction=False)
    con.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, x)")
    con.execute("INSERT INTO t VALUES (1, 10)")
    bottomless_wal.flush(con)
    replica = replica_of(con)
    view, index, local = replica.replicator.view, replica.index, replica.local
    con.execute("UPDATE t SET x = 11")
    with view.lock.locked(), index.locked():
        header = replica.replicator.batch()
        logged = header.txid
    con.execute("UPDATE t SET x = 21 - x")
    with view.lock.locked(), index.locked(), local.read_transaction():
        header = replica.replicator.header()
        assert header.txid == logged
        turn = view.choose(header, local.tip(), most=100)
        assert turn is not None
        view.put_turn(turn)
        view.advance(header, turn)
    con.execute("UPDATE t SET x = 21 - x")
    bottomless_wal.flush(con)
    world.stored(con)
