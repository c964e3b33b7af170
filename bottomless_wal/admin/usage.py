"""What a database takes up in its bucket, and what that costs: counted by a listing, and the rest said to be extrapolated.

measured        objects and bytes by kind; commits of the last 24 hours that are still listed
sampled         page objects that a commit writes: from the headers of the last commits
extrapolated    a month of such days, at the prices of a list with a date

A process that has the database open knows more: its requests are counted one by one (`running_costs`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from ..core import pool
from ..core.errors import CorruptionError, RestoreError
from ..formats import keys
from ..history.compaction import LEVELS
from ..history.segment_list import SegmentInfo
from ..runtime.api import Status
from .prices import GIGABYTE, LIST_PRICES, Prices
from .stored_database import StoredDatabase, opened

__all__ = ["Cost", "Kind", "Usage", "running_costs", "stats"]

_DAY: Final = 86400.0
_MONTH_DAYS: Final = 365 / 12
_SAMPLE: Final = 16


@dataclass(slots=True)
class Kind:
    """Objects of one kind, and their bytes."""

    objects: int = 0
    bytes: int = 0

    def add(self, size: int) -> None:
        """One more."""
        self.objects += 1
        self.bytes += size


@dataclass(frozen=True, slots=True)
class Cost:
    """One line of a bill: so much a month, in the price list's currency, and where the figure comes from."""

    what: str
    amount: float
    basis: str


@dataclass(frozen=True, slots=True)
class Usage:
    """`kinds`: commits, merged, snapshots, bodies, page_objects. `commits_day`: of the last 24 hours, by the server's clock; a lower bound
    unless `commits_day_exact`. `pages_per_commit`: of the last commits, page objects that each wrote (None: no commit is left to ask)."""

    name: str
    store: str
    head: int
    kinds: dict[str, Kind]
    commits_day: int
    commits_day_exact: bool
    pages_per_commit: float | None
    prices: Prices
    costs: list[Cost] = field(default_factory=list)
    requests: int = 0
    seconds: float = 0.0

    @property
    def month(self) -> float:
        """All costs of a month together."""
        return sum(cost.amount for cost in self.costs)


def stats(database: str | os.PathLike[str], *, prices: Prices = LIST_PRICES, **options: object) -> Usage:
    """Counts what the bucket holds of a database, and what a month of it costs at `prices`, if all days are like the last one.

    Raises:
        RestoreError: nothing is stored. StoreError, ConfigError.
    """
    began = time.monotonic()
    with opened(database, options) as target:
        kinds = {name: Kind() for name in ("commits", "merged", "snapshots", "bodies", "page_objects")}
        commits: list[SegmentInfo] = []
        head = 0
        for edge in _counted(target, kinds):
            head = max(head, edge.post)
            if edge.post == edge.pre + 1:
                commits.append(edge)
        if not any(kind.objects for kind in kinds.values()):
            raise RestoreError(
                f"nothing is stored as {target.name!r} in {target.store.describe()}",
                hint="`bottomless-wal ls` shows what is. Is it the right bucket, and the right database_id?",
            )
        now = target.store.now()
        young = sum(edge.modified > now - _DAY for edge in commits)
        pages = _pages_per_commit(target, commits[-_SAMPLE:])
        # Where an older one is still there, or the very first, none of the day has been deleted.
        exact = young < len(commits) or any(edge.pre == 0 for edge in commits) or not head
        return Usage(
            name=target.name,
            store=target.store.describe(),
            head=head,
            kinds=kinds,
            commits_day=young,
            commits_day_exact=exact,
            pages_per_commit=pages,
            prices=prices,
            costs=_costs(target, kinds, young, pages, prices),
            requests=target.requests,
            seconds=time.monotonic() - began,
        )


def running_costs(status: Status, *, prices: Prices = LIST_PRICES) -> list[Cost]:
    """What a month of the requests costs that this process makes for a database, if it goes on as since it was opened; by kind."""
    share = _MONTH_DAYS * _DAY / max(status.seconds, 1.0)
    each = {"get": prices.get_per_1000, "head": prices.get_per_1000, "delete": 0.0}
    basis = f"extrapolated: {{}} requests in the {status.seconds:.0f} s since it was opened"
    return [
        Cost(kind, count * share * each.get(kind, prices.put_per_1000) / 1000, basis.format(count))
        for kind, count in sorted(status.requests.items())
    ]


def _counted(target: StoredDatabase, kinds: dict[str, Kind]) -> Iterator[SegmentInfo]:
    """The edges; everything is counted on the way."""
    name = target.name
    for entry in target.store.list(keys.log_prefix(name)):
        ends = keys.parse_segment_key(name, entry.key)
        if ends is not None:
            edge = SegmentInfo(*ends, entry.size, entry.modified)
            kinds["commits" if edge.post == edge.pre + 1 else "merged" if edge.pre else "snapshots"].add(entry.size)
            yield edge
        elif keys.parse_body_key(name, entry.key) is not None:
            kinds["bodies"].add(entry.size)
    for entry in target.store.list(keys.page_prefix(name)):
        if keys.parse_page_key(name, entry.key) is not None:
            kinds["page_objects"].add(entry.size)


def _pages_per_commit(target: StoredDatabase, commits: list[SegmentInfo]) -> float | None:
    def load(edge: SegmentInfo) -> int | None:
        try:
            header = target.history.header(edge.pre, edge.post)
        except CorruptionError:
            return None  # `verify` tells
        return header.page_count if header is not None else None

    # The first one is the whole database, if it was there before: that happens once.
    usual = [edge for edge in commits if edge.pre] or commits
    counts = [count for count in pool.ordered(load, usual, target.config.concurrency) if count is not None]
    return sum(counts) / len(counts) if counts else None


def _costs(target: StoredDatabase, kinds: dict[str, Kind], commits_day: int, pages: float | None, prices: Prices) -> list[Cost]:
    stored = sum(kind.bytes for kind in kinds.values())
    month = commits_day * _MONTH_DAYS
    put, get = prices.put_per_1000 / 1000, prices.get_per_1000 / 1000
    costs = [
        Cost("storage", stored / GIGABYTE * prices.storage_gb_month, "the bytes measured now, as if they stayed so many"),
        Cost("commits", month * put, f"extrapolated: the {commits_day} commits of the last 24 h, every day, one write each"),
    ]
    if target.config.pages == "commit":
        each = pages or 0.0
        basis = f"extrapolated: {each:.1f} page objects a commit (mean of the last ones, before any batching), as often"
        costs.append(Cost("page objects", month * each * put, basis))
    if target.config.compaction:
        upkeep = month / LEVELS[0] * (2 * put + LEVELS[0] * get)
        basis = f"estimated, not measured: for {LEVELS[0]} commits one write, one listing, at most {LEVELS[0]} reads"
        costs.append(Cost("upkeep", upkeep, basis))
    return costs
