"""List the segments of one database in the store."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from ..core.logs import get_logger
from ..formats import keys
from ..storage import Entry, Store
from .segment_list import SegmentInfo, SegmentList

__all__ = ["all_edges", "snapshots", "some_edges"]

logger = get_logger(__name__)


def all_edges(store: Store, name: str, *, since: int = 0, bodies: bool = False) -> SegmentList:
    """Return all edges with pre >= `since`, in the order of their keys.

    Keys below the prefix that this package does not write are logged and skipped.

    Args:
        store: the store.
        name: the database, as in `keys.database_name`.
        since: the lowest txid that an edge may begin at.
        bodies: list the sizes of bodies, too. Bodies sort behind all edges. With `since` 0 they are listed in any case.
    """
    body_prefix = keys.body_prefix(name)
    sizes: dict[tuple[int, int], int] = {}
    foreign: list[str] = []
    dates: list[float] = []

    def sized(entry: Entry) -> None:
        body = keys.parse_body_key(name, entry.key)
        if body is not None:
            sizes[body[:2]] = max(entry.size, sizes.get(body[:2], 0))

    def listed() -> Iterator[SegmentInfo]:
        for entry in store.list(keys.log_prefix(name), after=keys.log_after(name, since)):
            if not dates:
                dates.append(store.now())
            if entry.key.startswith(body_prefix):
                if since:
                    return
                sized(entry)
                continue
            ends = keys.parse_segment_key(name, entry.key)
            if ends is None:
                foreign[1:] = [entry.key]  # the first and the last
                continue
            yield SegmentInfo(*ends, entry.size, entry.modified)

    found = SegmentList(listed())
    if since and bodies:
        for entry in store.list(body_prefix, after=keys.body_after(name, since)):
            sized(entry)
    found = found.with_bodies(sizes)
    found.listed_ms = int(dates[0] * 1000) if dates else 0
    if foreign:
        logger.warning("%r to %r in %s are no objects of ours: passed over", foreign[0], foreign[-1], store.describe())
    return found


def snapshots(store: Store, name: str) -> list[SegmentInfo]:
    """Return all edges from 0, in the order of their keys. This is one request, as a rule."""
    ends = ((keys.parse_segment_key(name, entry.key), entry) for entry in store.list(keys.snapshot_prefix(name)))
    found = [SegmentInfo(*pair, entry.size, entry.modified) for pair, entry in ends if pair is not None]
    bodies: dict[tuple[int, int], int] = {}
    for entry in store.list(f"{keys.body_prefix(name)}{0:016x}-") if found else ():
        body = keys.parse_body_key(name, entry.key)
        if body is not None:
            bodies[body[:2]] = max(entry.size, bodies.get(body[:2], 0))
    return [edge._replace(body=bodies.get(edge[:2], 0)) for edge in found]


def some_edges(store: Store, name: str, *, since: int = 0, limit: int) -> tuple[list[SegmentInfo], bool]:
    """Return the edges among the first `limit` objects of the log with pre >= `since`, and whether these are all."""
    objects = store.list(keys.log_prefix(name), after=keys.log_after(name, since))
    rows = list(itertools.islice(objects, limit))
    named = ((keys.parse_segment_key(name, row.key), row) for row in rows)
    return [SegmentInfo(*ends, row.size, row.modified) for ends, row in named if ends is not None], len(rows) < limit
