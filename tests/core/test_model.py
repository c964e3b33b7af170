"""The model of `model.py`, driven for a short while by hypothesis; and the sequences by which longer runs have found something."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.errors import Flaky, FlakyStrategyDefinition
from hypothesis.stateful import run_state_machine_as_test
from model import FAILURES, Model
from model_process import nursery


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


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_pending_commit_that_leads_back_to_earlier_bytes_is_not_taken_for_an_old_image(
    model_class: type[Model], checkpoint: bool
) -> None:
    model = model_class()
    model.start_a_process(0, "log", "commit")
    for _ in range(3):
        model.there_and_back(0, 1)
    model.outage(0, kinds=["create"], part="", after=False, skip=0, times=-1)
    model.there_and_back(0, 1)
    (site,) = model.sites
    assert site.pending == [model.line.names[-2]], "not stored, and the very bytes of the state before the head"
    if checkpoint:
        model.checkpoint(0, "RESTART")
        model.kill(0)
    else:
        model.power_loss(0, 8, 0)
    model.start_a_process(0, "log", "commit")
    assert (model.line.head, site.pending) == (4, [])
    model.teardown()
