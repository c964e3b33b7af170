"""A history kept short by hand: what the writer does by itself while it is open, done from beside, at once, and told in a report.

    compact     runs of commits merged          adds objects only
    snapshot    the whole database, at the head adds one object
    prune       what no promise needs           deletes
    forget      a snapshot, then prune          deletes all that is older than some time, whatever the settings promise

All of them are safe beside a writer, and beside each other: what vanishes meanwhile is listed once more.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..core.errors import ConfigError
from ..core.logs import get_logger
from ..history import compaction, retention
from ..history.compaction import LEVELS, Vanished
from ..history.log import FENCE_HORIZON_SECONDS
from ..history.planner import plan
from ..history.restore import Progress
from ..history.segment_list import SegmentInfo
from ..history.timeline import relisted
from .stored_database import StoredDatabase, opened

__all__ = ["CompactionReport", "PruneReport", "SnapshotReport", "compact", "forget", "prune", "snapshot"]

logger = get_logger(__name__)

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class CompactionReport:
    """What `compact` did: `merged` edges became `added` ones, of `size` bytes. A restore of the `head` read `before` segments and reads
    `after` now (None: no chain leads there). `damaged`: runs that stay as they are, and why."""

    name: str
    store: str
    head: int
    merged: int
    added: list[SegmentInfo]
    size: int
    before: int | None
    after: int | None
    damaged: list[str]
    requests: int
    seconds: float

    @property
    def ok(self) -> bool:
        """Nothing was found damaged."""
        return not self.damaged


@dataclass(frozen=True, slots=True)
class SnapshotReport:
    """The snapshot of txid `txid`: `size` bytes. `created` is False when it was there already."""

    name: str
    store: str
    txid: int
    created: bool
    size: int
    requests: int
    seconds: float


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What was deleted, or with `dry_run` would be: `segments` and `bodies`, `size` bytes together. Every commit from `base` to `head` is
    kept, and before it the `snapshots` (txids). `snapshot`: the one that was made for it, or would be (its txid). `rule`: in words."""

    name: str
    store: str
    dry_run: bool
    head: int
    base: int
    snapshots: list[int]
    segments: int
    bodies: int
    size: int
    snapshot: int | None
    rule: str
    requests: int
    seconds: float


def compact(path: str | os.PathLike[str], *, progress: Progress | None = None, **options: object) -> CompactionReport:
    """Merges every complete run of commits, of all levels, that is not merged yet. `progress` is called with (merges done, expected).

    Raises:
        RestoreError: nothing is stored. StoreError, ConfigError.
    """
    began = time.monotonic()
    with opened(path, options) as target:
        damaged: dict[str, None] = {}
        first: Sequence[SegmentInfo] = ()
        done = 0

        def merged() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, max(done, expected))

        expected = 0
        for edges in relisted(target.history):
            first = first or edges
            expected = done + sum(1 for size in LEVELS for _ in compaction.missing(edges, size))
            try:
                compaction.compact(
                    target.history, edges, level=target.config.level, merged=merged, damaged=lambda error: damaged.setdefault(error.message)
                )
            except Vanished as error:
                logger.info("%s: listed once more", error)
                continue
            break
        last = target.history.edges() if done else first
        known = {edge[:2] for edge in first}
        added = [edge for edge in last if edge[:2] not in known and edge.post - edge.pre in LEVELS]
        return CompactionReport(
            name=target.name,
            store=target.store.describe(),
            head=max(edge.post for edge in last),
            merged=_inside(first, added),
            added=added,
            size=sum(edge.size + edge.body for edge in added),
            before=_way(first),
            after=_way(last),
            damaged=list(damaged),
            requests=target.requests,
            seconds=time.monotonic() - began,
        )


def snapshot(path: str | os.PathLike[str], **options: object) -> SnapshotReport:
    """Stores the whole database as it is at the head of its history: a restore reads one segment, and retention can prune before it.

    Raises:
        RestoreError: nothing is stored, or no chain of segments leads to the head. CorruptionError, StoreError, ConfigError.
    """
    began = time.monotonic()
    with opened(path, options) as target:
        made, head, size = _retried(target, lambda edges: _snapshot(target, edges, max(edge.post for edge in edges)))
        return SnapshotReport(target.name, target.store.describe(), head, made, size, target.requests, time.monotonic() - began)


def prune(path: str | os.PathLike[str], *, dry_run: bool = False, **options: object) -> PruneReport:
    """Deletes what `retention` and `keep_snapshots` of the settings do not promise. Without a snapshot that is old enough nothing can go.

    Raises:
        RestoreError: nothing is stored. CorruptionError: the history has a gap; nothing was deleted. StoreError, ConfigError.
    """
    began = time.monotonic()
    with opened(path, options) as target:
        config = target.config
        for edges in relisted(target.history):
            done = retention.prune(target.history, retention=config.retention, keep_snapshots=config.keep_snapshots, dry_run=dry_run)
            rule = f"by retention={config.retention:g}, keep_snapshots={config.keep_snapshots} (as they are set here)"
            return _report(target, edges, done, began, rule, dry_run=dry_run)
    raise AssertionError("relisted() ends with an error")


def forget(path: str | os.PathLike[str], *, older_than: float, dry_run: bool = False, **options: object) -> PruneReport:
    """Deletes what is older than `older_than` seconds (never less than two hours), all older snapshots too.

    The state of that moment, and all later ones, stay: a snapshot of it is made first, where there is none.

    Raises:
        RestoreError: nothing is stored, or no snapshot can be made. CorruptionError: the history has a gap. StoreError, ConfigError.
    """
    began = time.monotonic()
    if not 0 <= older_than < float("inf"):
        raise ConfigError(f"{older_than!r} is no age in seconds", hint="Say how old what is to be forgotten is at least, such as 30d.")
    with opened(path, options) as target:
        made: list[int] = []
        kept = max(older_than, 2 * FENCE_HORIZON_SECONDS)
        rule = f"older than {kept:.0f} s" + (" (two hours are always kept)" if kept > older_than else "")

        def turn(edges: Sequence[SegmentInfo]) -> PruneReport:
            now = target.store.now()
            txid = retention.oldest_promised(edges, now=now, retention=older_than)
            if txid and (0, txid) not in {edge[:2] for edge in edges}:
                if dry_run:
                    planned = sorted([*edges, SegmentInfo(0, txid, 0, now)])
                    gone, base = retention.superfluous(planned, now=now, retention=older_than, keep_snapshots=0)
                    size = sum(edge.size + edge.body for edge in gone)
                    would = retention.Pruned(tuple(gone), (), size, base, ())
                    return _report(
                        target, edges, would, began, rule, dry_run=True, snapshot=txid, bodies=sum(edge.body > 0 for edge in gone)
                    )
                if _snapshot(target, edges, txid)[0]:
                    made.append(txid)
            done = retention.prune(target.history, retention=older_than, keep_snapshots=0, dry_run=dry_run)
            return _report(target, edges, done, began, rule, dry_run=dry_run, snapshot=made[-1] if made else None)

        return _retried(target, turn)


def _retried(target: StoredDatabase, step: Callable[[Sequence[SegmentInfo]], R]) -> R:
    for edges in relisted(target.history):
        try:
            return step(edges)
        except Vanished as error:
            logger.info("%s: listed once more", error)
    raise AssertionError("relisted() ends with an error")


def _snapshot(target: StoredDatabase, edges: Sequence[SegmentInfo], txid: int) -> tuple[bool, int, int]:
    """(was it made now, its txid, its size)"""
    made = compaction.snapshot(target.history, edges, txid, level=target.config.level)
    edge = made or next(edge for edge in edges if edge[:2] == (0, txid))
    return made is not None, edge.post, edge.size + edge.body


def _report(
    target: StoredDatabase,
    edges: Sequence[SegmentInfo],
    done: retention.Pruned,
    began: float,
    rule: str,
    *,
    dry_run: bool,
    snapshot: int | None = None,
    bodies: int | None = None,
) -> PruneReport:
    return PruneReport(
        name=target.name,
        store=target.store.describe(),
        dry_run=dry_run,
        head=max(edge.post for edge in edges),
        base=done.base,
        snapshots=list(done.snapshots),
        segments=len(done.edges),
        bodies=len(done.bodies) if bodies is None else bodies,
        size=done.size,
        snapshot=snapshot,
        rule=rule,
        requests=target.requests,
        seconds=time.monotonic() - began,
    )


def _inside(edges: Sequence[SegmentInfo], added: Sequence[SegmentInfo]) -> int:
    """How many of `edges` lie within one of the `added` ones. Both are in the order of their keys, and the added ones are aligned."""
    covered = {size: {edge.pre for edge in added if edge.post - edge.pre == size} for size in LEVELS}
    return sum(
        any(edge.pre // size * size in starts and edge.post <= edge.pre // size * size + size for size, starts in covered.items())
        for edge in edges
    )


def _way(edges: Sequence[SegmentInfo]) -> int | None:
    chain = plan(edges, max(edge.post for edge in edges))
    return None if chain is None else len(chain)
