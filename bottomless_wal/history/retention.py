"""What a history keeps: every commit of the last while, then a snapshot a day, and the newest state whatever clocks say.

    0 ────────► s1   0 ────────► s2        0 ──► base ├┼┼┼┼┼┼┼┼┼┼┼┼┼┼┼┼┼┼┼┼┼┤ head
    snapshots, one a day, for some days          the cutoff ▲     every commit, and whatever shortens the way

The *base* is the newest snapshot that is no younger than the state at the cutoff. Everything that begins at the base or after it stays,
so every state from the cutoff on stays within reach. What lies before, or reaches across, goes, but for one snapshot a day.

Invariants:

* Whatever leads to the head leads there afterwards: it does not depend on any clock. If it would not, nothing is deleted.
* A commit counts as young as the youngest before it, by the server's clock, and "now" is the server's too. A clock that jumps ahead and
  back makes commits stay longer; a clock that stays ahead cuts the retention short, never the head.
* No commit key younger than twice the fence horizon is deleted, nor the head's: a writer that was away must find out about it.
* A segment goes before its body. A body that no segment names goes when it is a week old: whoever uploads one names it soon after.
* Nothing is deleted on the word of a key: the base is read, to its end, before.
* Killed anywhere, it leaves a history in which everything promised is there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from ..core.errors import CorruptionError
from ..core.failpoints import failpoint
from ..core.logs import get_logger
from ..formats import keys
from .log import FENCE_HORIZON_SECONDS, RemoteLog
from .planner import reachable
from .segment_list import SegmentInfo, SegmentList

__all__ = ["Pruned", "oldest_promised", "prune", "superfluous"]

logger = get_logger(__name__)

_DAY: Final = 86400.0
_ABANDONED: Final = 7 * _DAY
_AT_ONCE: Final = 1000
_CHUNK: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class Pruned:
    """What `prune` deleted, or would delete: edges, bodies (keys), and their bytes together. `base`: the oldest txid from which on
    every commit can be restored; `snapshots`: txids before it that can be, too."""

    edges: Sequence[SegmentInfo]
    bodies: tuple[str, ...]
    size: int
    base: int
    snapshots: tuple[int, ...]


def superfluous(edges: Sequence[SegmentInfo], *, now: float, retention: float, keep_snapshots: int) -> tuple[SegmentList, int]:
    """(the edges that no promised restore needs, the base's txid). Pure. Times in seconds; `keep_snapshots` in days, one a day.

    Raises:
        CorruptionError: the head, or a state that is promised, would not be within reach of what is left.
    """
    if not edges:
        return SegmentList(), 0
    head = max(edge.post for edge in edges)
    oldest = oldest_promised(edges, now=now, retention=retention)
    base = max((edge.post for edge in edges if edge.pre == 0 and edge.post <= oldest), default=0)
    daily: dict[int, int] = {}
    for edge in sorted((edge for edge in edges if edge.pre == 0), key=lambda edge: edge.post):
        if edge.post < base and edge.modified > now - keep_snapshots * _DAY:
            daily[int(edge.modified // _DAY)] = edge.post
    kept_days = set(daily.values())

    def stays(edge: SegmentInfo) -> bool:
        if edge.pre >= base or (edge.pre, edge.post) == (head - 1, head):
            return True
        return edge.pre == 0 and (edge.post >= base or edge.post in kept_days)

    gone = SegmentList(edge for edge in edges if not stays(edge))
    if gone:
        before = sum(txid >= base for txid in reachable(edges))
        after = [txid for txid in reachable(edge for edge in edges if stays(edge)) if txid >= base]
        if head not in after or before != len(after):
            raise CorruptionError(
                f"nothing was deleted: without what is old, some state of {base} to {head} could not be restored any more",
                hint="The history has a gap. `bottomless-wal verify DB` shows where. "
                "`bottomless-wal reset --from-local DB` and `bottomless-wal snapshot DB` close it.",
                expected=before,
                actual=len(after),
            )
    return gone, base


def prune(
    history: RemoteLog, *, retention: float, keep_snapshots: int, dry_run: bool = False, throttle: Callable[[], None] = lambda: None
) -> Pruned:
    """Deletes what no promised restore needs. Makes no snapshot: without one that is old enough, nothing can go.

    `breathe` is called often, and may pause, or raise what ends it all.

    Raises:
        CorruptionError: as `superfluous`, or the base is not sound. StoreError: some may have been deleted.
    """
    edges = history.edges()
    now = history.store.now()
    gone, base = superfluous(edges, now=now, retention=retention, keep_snapshots=keep_snapshots)
    bodies, size = _bodies(history, edges, gone, now)
    lost = {edge.post for edge in gone if edge.pre == 0}
    snapshots = sorted(edge.post for edge in edges if edge.pre == 0 and edge.post < base and edge.post not in lost)
    report = Pruned(gone, tuple(bodies), size + sum(edge.size for edge in gone), base, tuple(snapshots))
    if dry_run:
        return report
    if gone and base:
        _require_sound(history, edges, base, throttle)
    _delete(history, (keys.segment_key(history.name, edge.pre, edge.post) for edge in gone))
    _delete(history, bodies)
    if gone or bodies:
        logger.info("%s: %d segments and %d bodies deleted (%d bytes)", history.name, len(gone), len(bodies), report.size)
    return report


def _require_sound(history: RemoteLog, edges: Sequence[SegmentInfo], base: int, throttle: Callable[[], None]) -> None:
    """Reads the snapshot that all the rest will stand on, to its end, and sees that what follows stands on its state.

    Raises:
        CorruptionError: it is damaged, its body is missing, or another state follows.
    """
    (edge,) = (edge for edge in edges if (edge.pre, edge.post) == (0, base))
    found = history.stream(edge, chunk=_CHUNK, stored=True)
    if found is None:
        raise CorruptionError(
            f"nothing was deleted: the snapshot of txid {base} is gone",
            hint="Another program deletes objects. Try again.",
            key=keys.segment_key(history.name, 0, base),
            txid=base,
        )
    try:
        for _ in found.blocks():
            throttle()
    except CorruptionError as error:
        raise error.copy(f"nothing was deleted: {error.message}") from error
    for after in edges:
        if after.pre == base:
            follows = history.header(after.pre, after.post)
            if follows is not None and not follows.reset and follows.pre_hash != found.header.post_hash:
                key = keys.segment_key(history.name, *after[:2])
                raise CorruptionError(
                    f"nothing was deleted: {key} does not follow {found.name}",
                    hint="`bottomless-wal verify DB` shows what can still be restored.",
                    key=key,
                    other_key=found.name,
                    txid=base,
                    expected=found.header.post_hash,
                    actual=follows.pre_hash,
                )


def oldest_promised(edges: Iterable[SegmentInfo], *, now: float, retention: float) -> int:
    """The txid of the state that the database had when what is to be kept begins: it, and all later ones, are promised.

    `edges` are in the order of their keys.
    """
    cutoff = now - max(retention, 2 * FENCE_HORIZON_SECONDS)
    limit: int | None = None
    youngest = 0.0
    for edge in edges:
        if edge.post != edge.pre + 1:
            continue
        limit = edge.pre if limit is None else limit
        youngest = max(youngest, edge.modified)
        if youngest > cutoff:
            break
        limit = edge.post
    return limit or 0


def _bodies(history: RemoteLog, edges: Sequence[SegmentInfo], gone: Sequence[SegmentInfo], now: float) -> tuple[list[str], int]:
    """The bodies of the edges that go, and those that nobody names: their keys, and their bytes."""
    found = [
        (parsed[:2], entry)
        for entry in history.store.list(keys.body_prefix(history.name))
        if (parsed := keys.parse_body_key(history.name, entry.key)) is not None
    ]
    named = {ends for ends, _ in found}
    lost = {edge[:2]: edge.modified for edge in gone if edge[:2] in named}
    there = {edge[:2] for edge in edges if edge[:2] in named}
    garbage, size = [], 0
    for ends, entry in found:
        if ends in lost:
            wanted = entry.modified > lost[ends] and now - entry.modified < _ABANDONED
        elif now - entry.modified < _ABANDONED:
            wanted = True
        else:
            wanted = ends in there and _names(history, ends, entry.key)
        if not wanted:
            garbage.append(entry.key)
            size += entry.size
    return garbage, size


def _names(history: RemoteLog, ends: tuple[int, int], key: str) -> bool:
    """Is `key` the body of the edge? When that cannot be told, it is."""
    try:
        header = history.header(*ends)
    except CorruptionError as error:
        logger.warning("%s", error.message)
        return True
    return header is None or (header.body is not None and keys.log_prefix(history.name) + header.body.name == key)


def _delete(history: RemoteLog, garbage: Iterable[str]) -> None:
    rest = iter(garbage)
    while some := list(itertools.islice(rest, _AT_ONCE)):
        failpoint("before prune")
        history.store.delete(some)
        failpoint("within prune")
