"""A history that stays short: runs of edges merged into one that leads as far, and snapshots, edges from 0. The last of each page wins.

    commits      ├┼┼┼┼┼┼┼┼┼┼┼┼┼┼┼┼┼┼┼┼┼┼┤        n -> n + 1
    level 64     ├───────┼───────┼───────┤        a -> a + 64, a a multiple of 64
    level 4096   ├───────────────────────┤        a -> a + 4096, a a multiple of 4096
    snapshot     0 ──────────────────────►        the whole database

Invariants:

* It works through the store alone, and only ever adds segments, create-only: two at work at once, or one that is killed anywhere, cost
  at worst a superfluous object. Deleting is `retention`'s.
* A merged edge joins states that the history has: each edge's pre hash is the post hash of the one before, and the hashes of the ends are
  taken over. A snapshot's pages must give its state hash before it is stored.
* It lists the commits that it merges (txid, state hash, time) and their positions in the WAL, so that what was known of them stays known.
* Memory: pages of all edges are read in step, in order of their numbers; no more than a block and a chunk of each is held, and of no
  more than `FAN_IN` edges at once.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Final

from ..core import pool
from ..core.errors import CorruptionError, RestoreError
from ..core.failpoints import failpoint
from ..core.logs import get_logger
from ..formats import keys
from ..formats.page import Page, lock_page
from ..formats.segment import LISTED_ROWS, CommitRecord
from ..formats.wal import WalPosition
from .log import RemoteLog
from .planner import plan
from .segment_list import SegmentInfo

__all__ = ["FAN_IN", "LEVELS", "Vanished", "compact", "merge", "missing", "snapshot"]

logger = get_logger(__name__)

LEVELS: Final = (64, 4096)
FAN_IN: Final = 80
"""Edges that are read at once: 64 of a level and some that remain."""

_ATTEMPTS: Final = 8
_MOST_COMMITS: Final = LISTED_ROWS  # in an edge that is on the way to a snapshot
_HEAVY: Final = 1 << 20  # bytes below which an edge is merged, whatever the others weigh
_WIDTH: Final = 8  # beginnings of edges that are fetched at once
_CHUNKS: Final = 8 << 20  # bytes read ahead, of all edges together
_SMALLEST_CHUNK: Final = 64 << 10
_LARGEST_CHUNK: Final = 4 << 20


class Vanished(Exception):
    """An edge that was listed is gone: somebody has pruned the history meanwhile. List it anew."""


def _on() -> None:
    """Nobody minds."""


def _warn(error: CorruptionError) -> None:
    logger.warning("%s", error.message)


def missing(edges: Iterable[SegmentInfo], size: int) -> Iterator[list[SegmentInfo]]:
    """The chains that aligned edges of `size` commits are to be merged from, where there is none yet. Gaps are passed over.

    `edges` are in the order of their keys; no more than one run of them is held.
    """
    for start, run in itertools.groupby(edges, lambda edge: edge.pre // size * size):
        inside = [edge for edge in run if edge.post <= start + size]
        if not any(edge.post - edge.pre == size for edge in inside):
            chain = plan(inside, start + size, start=start)
            if chain is not None:
                yield from _light(chain)


def _light(chain: list[SegmentInfo]) -> Iterator[list[SegmentInfo]]:
    """What of a chain is worth merging: an edge that outweighs all the others together, such as the whole database with which a history
    begins, stays as it is, and what lies before and behind it is merged."""
    total = sum(edge.size + edge.body for edge in chain)
    for heavy, run in itertools.groupby(chain, lambda edge: 2 * (edge.size + edge.body) > max(total, 2 * _HEAVY)):
        some = list(run)
        if not heavy and len(some) > 1:
            yield some


def compact(
    history: RemoteLog,
    edges: Sequence[SegmentInfo],
    *,
    level: int = 3,
    throttle: Callable[[], None] = _on,
    merged: Callable[[], None] = _on,
    damaged: Callable[[CorruptionError], None] = _warn,
    passed_over: set[tuple[int, int]] | None = None,
) -> list[SegmentInfo]:
    """Merges every complete run of commits that is aligned and not merged yet. Returns the edges added.

    `level` is zstd's. `breathe` is called at every edge and page, and may pause, or raise what ends it all; `merged` after each merge;
    `damaged` when a run has an edge that is damaged, or does not follow its predecessor: it stays as it is, and is noted in `passed_over`,
    from where a later call knows it.

    Raises:
        Vanished: list the edges anew. StoreError.
    """
    passed_over = set() if passed_over is None else passed_over
    added: list[SegmentInfo] = []
    head = max((edge.post for edge in edges), default=0)
    # A commit that leads nowhere is no part of the history (see `Fencing.verify_still_head`): it is not to be merged with what is.
    going_on = {edge.pre for edge in edges if edge.pre % LEVELS[0] == 0} | {head}
    for size in LEVELS:
        for chain in missing(heapq.merge(edges, sorted(added)), size):
            ends = (chain[0].pre, chain[-1].post)
            if (chain[0].pre // size + 1) * size not in going_on or ends in passed_over:
                continue
            try:
                added.append(merge(history, chain, level=level, throttle=throttle))
            except CorruptionError as error:
                passed_over.add(ends)
                damaged(error)
            merged()
    return added


def snapshot(
    history: RemoteLog, edges: Iterable[SegmentInfo], target: int, *, level: int = 3, throttle: Callable[[], None] = _on
) -> SegmentInfo | None:
    """Makes the edge 0 -> `target`. None when it is there already.

    Raises:
        RestoreError: no chain of edges leads to `target`. Otherwise as `compact`.
    """
    known_all = list(edges)
    known = [edge for edge in known_all if edge.post <= target]
    for attempt in itertools.count(1):
        chain = plan(known, target)
        if chain is None:
            chain = plan(known, target, wholes={(edge.pre, edge.post) for edge in history.resets(known, width=8)})
        if chain is None:
            raise RestoreError(
                f"no snapshot of {history.name!r} can be made: its history has a gap before txid {target}",
                hint="`bottomless-wal verify DB` shows where.",
                txid=target,
            )
        if len(chain) == 1 and chain[0].pre == 0:
            return None
        try:
            while len(chain) > FAN_IN:
                # The whole database is read, and written, but once.
                runs = list(_runs(chain[1:]))
                if len(runs) == len(chain) - 1:
                    break  # each is as long as an edge may be
                chain = [chain[0], *(merge(history, run, level=level, throttle=throttle) if len(run) > 1 else run[0] for run in runs)]
            _require_listed(history, known_all, chain[-1])
            return merge(history, chain, whole=True, level=level, throttle=throttle)
        except CorruptionError as error:
            named = [edge for edge in chain if edge[:2] in _ends_named(history, error)]
            if not named or attempt == _ATTEMPTS:
                raise
            logger.warning("%s", error.message)
            # Of two that do not fit it is the longer one, for the others may do without it.
            worst = max(named, key=lambda edge: edge.post - edge.pre)
            known = [edge for edge in known if edge[:2] != worst[:2]]
    raise AssertionError("unreachable")


def _ends_named(history: RemoteLog, error: CorruptionError) -> set[tuple[int, int]]:
    """Return (pre, post) of the edges that `error` is about; of a body, those of the edge that it belongs to."""
    named = {key for key in (error.key, error.other_key) if key is not None}
    bodies = (keys.parse_body_key(history.name, key) for key in named)
    segments = (keys.parse_segment_key(history.name, key) for key in named)
    return {ends for ends in segments if ends is not None} | {body[:2] for body in bodies if body is not None}


def _runs(chain: Sequence[SegmentInfo]) -> Iterator[list[SegmentInfo]]:
    """A chain cut into runs that one edge can take the place of: no more edges than are read at once, no more commits than it can list."""
    run: list[SegmentInfo] = []
    for edge in chain:
        if run and (len(run) == FAN_IN or edge.post - run[0].pre > _MOST_COMMITS):
            yield run
            run = []
        run.append(edge)
    if run:
        yield run


def _require_listed(history: RemoteLog, edges: Sequence[SegmentInfo], last: SegmentInfo) -> None:
    """A snapshot is one of the history if what leads on from there says so. Raises CorruptionError, Vanished."""
    told = history.listed(edges, last.post)
    header = history.header(last.pre, last.post) if told is not None else None
    if told is not None and header is None:
        raise Vanished(f"the edge {last.pre} -> {last.post} of {history.name!r} is gone")
    if header is not None and header.post_hash != told:
        key = keys.segment_key(history.name, last.pre, last.post)
        raise CorruptionError.about(
            key,
            f"leads to state hash {header.post_hash:016x}, and the history has {told:016x} at txid {last.post}: it is no part of it",
            joint=" ",
            key=key,
            txid=last.post,
            expected=told,
            actual=header.post_hash,
            hint="It was left by a writer that was away. `bottomless-wal prune DB` removes it in time.",
        )


def merge(
    history: RemoteLog, chain: list[SegmentInfo], *, whole: bool = False, level: int = 3, throttle: Callable[[], None] = _on
) -> SegmentInfo:
    """Stores the edge from the beginning of `chain` to its end; or, where that begins with the whole database (`whole`), from 0.

    Raises:
        Vanished: one of them is gone. CorruptionError: one is damaged, or does not follow its predecessor. StoreError.
    """
    pre = 0 if whole else chain[0].pre
    if history.header(pre, chain[-1].post) is not None:
        # Another one has been quicker: what it made is sound, and nothing is overwritten.
        return chain[-1]._replace(pre=pre)
    total = sum(edge.size + edge.body for edge in chain)
    parts: list[_Part] = []
    # Of a snapshot's commits the last ones will do; no header keeps its own.
    commits: deque[CommitRecord] = deque(maxlen=LISTED_ROWS if whole else None)
    positions: deque[WalPosition] = deque(maxlen=LISTED_ROWS)
    for part in pool.ordered(lambda edge: _Part(history, edge, total), chain, _WIDTH):
        throttle()
        commits.extend(part.header.commits)
        positions.extend(part.header.positions)
        part.header = replace(part.header, commits=(), positions=())
        parts.append(part)
    headers = [part.header for part in parts]
    for one, other in itertools.pairwise(parts):
        if not other.header.reset and (other.header.pre_hash, other.header.page_size) != (one.header.post_hash, one.header.page_size):
            raise CorruptionError.about(
                other.name,
                f"does not follow {one.name}: before it the state hash is {other.header.pre_hash:016x}, after that one "
                f"{one.header.post_hash:016x}",
                joint=" ",
                key=other.name,
                other_key=one.name,
                txid=other.header.pre,
                expected=one.header.post_hash,
                actual=other.header.pre_hash,
                hint="`bottomless-wal verify DB` shows what can still be restored.",
            )
    last = headers[-1]
    # What lies before the last reset is in none of the pages, only in the list of commits.
    begin = max((number for number, header in enumerate(headers) if header.whole), default=0)
    if whole and not headers[begin].whole:
        raise ValueError("a snapshot needs the whole database to begin with")
    state = 0

    def pages() -> Iterator[Page]:
        nonlocal state
        for page in _newest([part.blocks for part in parts[begin:]]):
            throttle()
            if page.pgno <= last.db_size and page.pgno != lock_page(last.page_size):
                state ^= page.hash
                yield page

    staged = history.stage(pre, last.post, pages(), last.page_size, level=level)
    header = replace(
        last,
        pre=pre,
        pre_hash=headers[0].pre_hash if pre else 0,
        page_count=staged.page_count,
        reset=pre > 0 and headers[begin].whole,
        commits=tuple(commits),
        positions=tuple(positions),
        body=staged.body,
    )
    if header.whole and state != header.post_hash:
        raise CorruptionError(
            f"the edges from {parts[begin].name} to {parts[-1].name} give the state hash {state:016x}, not {header.post_hash:016x}",
            key=parts[begin].name,
            other_key=parts[-1].name,
            txid=header.post,
            expected=header.post_hash,
            actual=state,
            hint="`bottomless-wal verify DB` shows what can still be restored.",
        )
    failpoint("before merged")
    receipt = history.append(header, staged.blocks)
    failpoint("after merged")
    logger.info("%s: %d edges merged into %d -> %d%s", history.name, len(chain), pre, last.post, "" if receipt.created else " by another")
    return SegmentInfo(pre, last.post, receipt.size, receipt.date, staged.body.size if staged.body is not None else 0)


class _Part:
    """One edge of a chain, its header read, its pages yet to come; once, in order."""

    def __init__(self, history: RemoteLog, edge: SegmentInfo, total: int) -> None:
        chunk = min(max(_CHUNKS * (edge.size + edge.body) // max(total, 1), _SMALLEST_CHUNK), _LARGEST_CHUNK)
        found = history.stream(edge, chunk=chunk)
        if found is None:
            raise Vanished(f"the edge {edge.pre} -> {edge.post} of {history.name!r} is gone")
        self.name, self.header, self.blocks = found.name, found.header, found.blocks


def _newest(streams: list[Callable[[], Iterator[list[Page]]]]) -> Iterator[Page]:
    """The pages of all streams in order of their numbers; of equal numbers the one of the last stream."""

    def ranked(rank: int, blocks: Iterator[list[Page]]) -> Iterator[tuple[int, int, Page]]:
        for block in blocks:
            for page in block:
                yield page.pgno, rank, page

    before = 0
    for pgno, _, page in heapq.merge(*(ranked(-rank, blocks()) for rank, blocks in enumerate(streams))):
        if pgno != before:
            before = pgno
            yield page
