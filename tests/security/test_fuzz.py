"""Random damage, to objects, to listings, to local files: nothing wrong is ever opened, and nothing but our own errors comes out.

`tools/stress/fuzz.py` says what a round is, and runs them for as long as one likes. Here are a few rounds of each kind, always the same.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bottomless_wal.core.errors import BottomlessError
from bottomless_wal.history import restore
from bottomless_wal.history.page_table import PageTable
from bottomless_wal.runtime.registry import registry
from tools.stress import fuzz

ROUNDS = 6


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> fuzz.Bench:
    with pytest.MonkeyPatch.context() as own:
        for name in [name for name in os.environ if name.startswith("LIBSQL_BOTTOMLESS_")]:
            own.delenv(name)
        return fuzz.Bench(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(autouse=True)
def nothing_is_left_open() -> Iterator[None]:
    yield
    assert registry.all() == []


def rounds(bench: fuzz.Bench, *seeds: int) -> None:
    for seed in seeds:
        bench.round(seed)


@pytest.mark.parametrize("first", range(0, 8 * ROUNDS, ROUNDS))
def test_whatever_is_damaged_nothing_wrong_is_opened(bench: fuzz.Bench, first: int) -> None:
    rounds(bench, *range(first, first + ROUNDS))


@pytest.mark.parametrize("stage", ["open at 3", "closed at 11", "reset", "closed at the head", "ahead"])
def test_an_undamaged_file_is_opened_wherever_it_stands(bench: fuzz.Bench, tmp_path: Path, stage: str) -> None:
    """So that what the rounds refuse, they refuse for the damage."""
    home = tmp_path / "home"
    fuzz.shutil.copytree(bench.root / "template", home)
    for end, data in bench.stages[stage].items():
        (home / f"app.db{end}").write_bytes(data)
    own = bench.own(home, bench.stages[stage])
    try:
        assert fuzz.boot(bench, Always(), home, "local", own) == "opened"
    except BottomlessError:
        assert stage == "ahead", "copied files have an inode of their own, and nothing tells that these follow the head"


class Always(random.Random):
    """Takes the first of what there is to choose, and does whatever may be done."""

    def choice(self, seq: Any) -> Any:
        return seq[0]

    def random(self) -> float:
        return 0.0


def test_the_rounds_find_a_restore_that_does_not_look(bench: fuzz.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A harness that could not fail would prove nothing."""
    real = restore._apply

    def careless(into: restore.Scratch, *arguments: Any) -> None:
        real(into, *arguments)
        os.pwrite(into.fd, b"?", 300)

    monkeypatch.setattr(restore, "_apply", careless)
    with pytest.raises(AssertionError, match="what was"):
        rounds(bench, *range(1000, 1100))


def test_the_rounds_find_a_commit_that_builds_on_a_lost_index(bench: fuzz.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real = PageTable.hashes
    monkeypatch.setattr(PageTable, "hashes", lambda table, pgnos: [known or 1 for known in real(table, pgnos)])
    with pytest.raises(AssertionError, match="acknowledged"):
        rounds(bench, 2092, 2253, 2325)  # of which any would do; they damage an index in use where it matters
