"""What another process does to the files while this one looks at the bucket."""

from __future__ import annotations

import threading
from pathlib import Path

import apsw
import pytest

import bottomless_wal
from bottomless_wal.runtime.connect import pending_open
from tests.support.cluster import World, spawn

# Opens argv[0], but stops once it has seen the local file and is about to see the bucket; goes on when the file argv[1] is there.
SLOW = """
from bottomless_wal.history.log import RemoteLog
real = RemoteLog.edges
def edges(self, *rest, **more):
    if not os.path.exists(argv[1]):
        print("looking", flush=True)
        while not os.path.exists(argv[1]):
            time.sleep(0.005)
    return real(self, *rest, **more)
RemoteLog.edges = edges
con = connect(argv[0])
con.set_busy_timeout(10000)
con.execute("CREATE TABLE IF NOT EXISTS t(x)")
con.execute("INSERT INTO t VALUES ('from the slow one')")
con.close()
"""


@pytest.mark.parametrize("head_start", [0.0, 0.3], ids=["at the same moment", "first"])
def test_a_database_that_is_just_being_made_is_no_leftover(world: World, head_start: float) -> None:
    here = world.machine()
    bottomless_wal.register()
    with pending_open({**world.options, "ack": "local"}):
        first = apsw.Connection(here.path(), vfs="bottomless")
    world.connections.append(first)
    first.set_busy_timeout(10000)
    go = here.path("go")
    slow = spawn(SLOW, here.path(), go, options={**world.options, "ack": "local"})
    assert slow.stdout is not None
    assert slow.stdout.readline() == "looking\n"

    def make() -> None:
        # It may have to wait for the slow one: so it does that in a thread of its own.
        assert first.execute("PRAGMA journal_mode=wal").get == "wal"
        first.execute("BEGIN IMMEDIATE; CREATE TABLE IF NOT EXISTS t(x); INSERT INTO t VALUES ('from the first one'); COMMIT")

    thread = threading.Thread(target=make)
    thread.start()
    thread.join(head_start)
    Path(go).touch()
    thread.join()
    out, err = slow.communicate(timeout=60)
    assert slow.returncode == 0, out + err
    assert set(first.execute("SELECT * FROM t")) == {("from the first one",), ("from the slow one",)}
    first.close()
    assert not [name for name in here.files() if "stale" in name]
    world.comes_back(here)
