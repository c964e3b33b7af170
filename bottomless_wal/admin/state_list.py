"""What of a database can be restored, with the time of each state."""

from __future__ import annotations

import os
from array import array
from dataclasses import dataclass
from datetime import datetime

from ..core.logs import get_logger
from ..formats.page import repr_in_hex
from ..formats.segment import CommitRecord
from ..history.compaction import Vanished
from ..history.timeline import moment_of, ranges, relisted, restorable, timeline
from .stored_database import opened

__all__ = ["State", "States", "states"]

logger = get_logger(__name__)


@repr_in_hex("state_hash")
@dataclass(frozen=True, slots=True)
class State:
    """A state that can be restored. `time` by the server's clock; `size` in bytes, of the edge that leads there: of a snapshot, or of the
    commit itself (None: it has been merged with others, and its own segment is gone)."""

    txid: int
    state_hash: int
    time: datetime
    size: int | None


@dataclass(frozen=True, slots=True)
class States:
    """What of the database `name` can be restored: `count` states in all, `ranges` of txids (first, last), all snapshots, and
    `commits` (the last ones, where not all were asked for)."""

    name: str
    head: int
    count: int
    ranges: list[tuple[int, int]]
    snapshots: list[State]
    commits: list[State]


def states(database: str | os.PathLike[str], *, last: int | None = None, **options: object) -> States:
    """The states of a database that can be restored, with their times; of the commits only the `last` ones, if that is given.

    Raises:
        RestoreError: nothing is stored. StoreError, ConfigError.
    """
    with opened(database, options) as target:
        history = target.history
        for edges in relisted(history):
            known = restorable(history, edges)
            sizes = {edge[:2]: edge.size + edge.body for edge in edges if edge.pre == 0 or edge.post == edge.pre + 1}
            recent = known[-last:] if last else known
            snapshots = sorted(edge.post for edge in edges if edge.pre == 0 and edge.post > 1)
            wanted = array("Q", sorted({*recent, *snapshots}))
            try:
                told = {commit.txid: commit for commit in timeline(history, edges, wanted=wanted, width=target.config.concurrency)}
            except Vanished as error:
                logger.info("%s: listed once more", error)
                continue

            def state(txid: int, pre: int, told: dict[int, CommitRecord] = told, sizes: dict[tuple[int, int], int] = sizes) -> State:
                commit = told[txid]
                return State(txid, commit.post, moment_of(commit), sizes.get((pre, txid)))

            return States(
                name=target.name,
                head=known[-1] if known else 0,
                count=len(known),
                ranges=ranges(known),
                snapshots=[state(txid, 0) for txid in snapshots if txid in told],
                commits=[state(txid, txid - 1) for txid in recent if txid in told],
            )
    raise AssertionError("relisted() ends with an error")
