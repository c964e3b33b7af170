"""The commit worker: a flush after its end, and a flush beside commits."""

from __future__ import annotations

import threading
import time

import pytest

import bottomless_wal
from bottomless_wal import ReplicationError
from bottomless_wal.storage import Receipt
from bottomless_wal.storage.directory import DirectoryStore
from tests.support.cluster import World, existing, replica_of, until


def _page_objects(world: World, name: str = "app.db") -> dict[str, bytes]:
    return {key: data for key, data in world.bucket.content().items() if key.startswith(f"{name}-0")}


@pytest.mark.parametrize("used", [False, True], ids=["never started", "ended"])
def test_a_flush_after_the_worker_has_stopped_raises(world: World, used: bool) -> None:
    """Nobody would ever serve it: it says so instead of waiting for ever."""
    con = world.machine().connect()
    if used:
        con.execute("CREATE TABLE t(x)")
    replica_of(con).worker.stop()
    answers: list[BaseException | None] = []

    def flush() -> None:
        try:
            bottomless_wal.flush(con)
            answers.append(None)
        except ReplicationError as error:
            answers.append(error)

    thread = threading.Thread(target=flush, daemon=True)
    thread.start()
    thread.join(10)
    assert len(answers) == 1, "it still waits"
    assert isinstance(answers[0], ReplicationError)


def test_a_flush_with_a_large_backlog_lets_commits_pass(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """While flush() of one thread completes the page view, a commit of another waits for a part of it at most."""
    total, put = 1500, []
    real = DirectoryStore.put

    def slow(self: DirectoryStore, key: str, data: bytes) -> Receipt:
        if "-wal/" not in key:
            time.sleep(0.004)
            put.append(key)
        return real(self, key, data)

    here = existing(world, total)
    monkeypatch.setattr(DirectoryStore, "put", slow)
    con = here.connect(ack="log")
    flusher = threading.Thread(target=bottomless_wal.flush, args=(here.path(),))
    flusher.start()
    until(lambda: len(put) > 100)
    held_up = []
    for n in range(3):
        start = len(put)
        con.execute("INSERT INTO t VALUES (?)", (n,))
        held_up.append(len(put) - start)
    assert flusher.is_alive(), "this test is worth nothing: the view was complete"
    assert max(held_up) < total / 3, held_up
    flusher.join()
    assert len(_page_objects(world)) >= total
    bottomless_wal.flush(con)
    world.stored(con)
