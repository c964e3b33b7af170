"""The model of `model.py`, driven for a short while by hypothesis; and the sequences by which longer runs have found something."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.errors import Flaky, FlakyStrategyDefinition
from hypothesis.stateful import run_state_machine_as_test

import bottomless_wal
from tests.support.cluster import World, refusal, replica_of, until
from tests.support.model import FAILURES, Model
from tests.support.model_process import nursery


@pytest.fixture
def model_class(tmp_path: Path) -> Iterator[type[Model]]:
    """A model whose processes come from a nursery of its own."""
    with nursery() as source:
        FAILURES.clear()
        yield type("Model", (Model,), {"nursery": source, "base": str(tmp_path)})


def test_whatever_happens_nothing_acknowledged_is_lost_and_nothing_is_invented(model_class: type[Model]) -> None:
    how = settings(
        max_examples=4,
        stateful_step_count=25,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    try:
        run_state_machine_as_test(seed(4)(model_class), settings=how)
    except (Flaky, FlakyStrategyDefinition):
        assert not FAILURES, FAILURES[0]  # that processes do not do the same twice is no failure


@pytest.mark.parametrize("way", ["killed", "power lost", "truncated", "closed"])
def test_a_pending_commit_that_leads_back_to_earlier_bytes_is_not_taken_for_an_old_image(model_class: type[Model], way: str) -> None:
    model = model_class()
    model.start_a_process(0, "log", "commit")
    for _ in range(3):
        model.there_and_back(0, 1)
    model.outage(0, kinds=["create"], part="", after=False, skip=0, times=-1)
    model.there_and_back(0, 1)
    (site,) = model.sites
    assert site.pending == [model.line.names[-2]], "not stored, and the very bytes of the state before the head"
    if way == "power lost":
        model.power_loss(0, 8, 0)
    elif way == "closed":
        model.close_a_connection(0)
        model.kill(0)
    else:
        model.checkpoint(0, "RESTART" if way == "killed" else "TRUNCATE")
        model.kill(0)
    model.start_a_process(0, "log", "commit")
    assert (model.line.head, site.pending) == (4, [])
    model.teardown()


def test_a_wal_that_is_restarted_while_the_view_is_filled_leaves_no_hole_in_it(world: World) -> None:
    """The pin holds no frames of a WAL that is wholly in the main file: the next writer begins it anew, under whoever reads its frames."""
    con = world.machine().connect(ack="local", pages="checkpoint")
    con.execute("CREATE TABLE t(x)")
    con.execute("WITH RECURSIVE n(i) AS (VALUES(1) UNION ALL SELECT i + 1 FROM n LIMIT 100) INSERT INTO t SELECT randomblob(3000) FROM n")
    until(lambda: bottomless_wal.status(con).txid > 0 and bottomless_wal.status(con).pending_frames == 0)
    con.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
    store, on = refusal(con), threading.Event()
    store.hold(on, "put")
    replica_of(con).worker.poke()
    until(lambda: any(kind == "put" for kind, _ in store.seen))
    con.execute("VACUUM")  # every page once more, at another place in the WAL, and nearly all as they were
    on.set()
    bottomless_wal.flush(con)
    world.stored(con)
