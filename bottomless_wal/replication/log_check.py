"""Does the log still lead to its head? Objects may expire, or be deleted, below a head that goes on, and no commit would notice.

    open     a look at the keys, and at the segment with which the way to the head begins: a few requests
    daily    a thorough look, by the upkeep's thread: every segment on the way, and its body; also at once where the open found no way
    mend     no way is there: the local file, at the state of a txid that is stored, becomes a snapshot, the new base of the log

Invariants:

* A gap is an error that names the first missing or wrong object. It stays in `LogCheck.error`, and so in `status()`, until it is mended.
* The snapshot is read within a read transaction of its own, outside the index's lock: commits go on. It is stored only if the pages that
  were read give the state hash that the log has at that txid.
* A way that was torn by somebody who prunes at that moment is not a gap: the log is listed anew before one is reported.
"""

from __future__ import annotations

import contextlib
import secrets
import shlex
from collections.abc import Callable, Iterator, Sequence
from enum import Enum, auto
from typing import Final

from ..core import pool
from ..core.errors import CorruptionError, ReplicationError, RestoreError
from ..core.logs import get_logger
from ..formats import keys
from ..formats.page import Page, page_hash
from ..formats.segment import WRITER_ID_SIZE, CommitRecord, SegmentHeader
from ..history.log import RemoteLog
from ..history.page_table import IndexCorrupt
from ..history.planner import ExcludedSegments, plan
from ..history.segment_list import SegmentInfo
from ..sqlite.database_reader import LocalDatabase
from ..sqlite.snapshot_reader import SnapshotInvalidated, WalState
from .index import IndexHeader
from .replicator import Replicator
from .wal_position import position_of

__all__ = ["Finding", "LogCheck", "find_gap"]

logger = get_logger(__name__)

_LISTED: Final = 1000  # objects: one request
_LOOKS: Final = 3
_WAYS: Final = 8
_WIDTH: Final = 4
_ATTEMPTS: Final = 10


def _on() -> None:
    """Pause for nothing."""


class Finding(Enum):
    """What the last look at the log has found."""

    SOUND = auto()
    OPEN = auto()  # too many objects for an open to look at: a thorough look should come soon
    GAP = auto()


class LogCheck:
    """Looks at the log of one open database and mends it. `reader` makes a second view of the local file.

    `finding` is that of the last look; `error` the gap that a thorough look has found, until it is mended; `repairs` counts the snapshots
    that mended one.
    """

    def __init__(self, replicator: Replicator, reader: Callable[[], LocalDatabase]) -> None:
        self._replicator = replicator
        self._history = replicator.history
        self._reader = reader
        self.error: RestoreError | None = None
        self.repairs = 0
        self.finding = Finding.SOUND

    def at_open(self, listed: Sequence[SegmentInfo] | None, txid: int) -> None:
        """Look whether a way leads to the head, by few requests.

        Args:
            listed: all segments of the log, as the open has just listed them; None if they are too many for one request.
            txid: the head's.

        Raises:
            StoreError: the log could not be read.
        """
        if txid:
            self.finding = self._look_briefly(listed or self._newest_part(txid))
        if self.finding is not Finding.SOUND:
            logger.info("%s: whether its log leads to txid %d is looked at thoroughly", self._history.name, txid)

    def run(self, throttle: Callable[[], None] = _on) -> None:
        """Look thoroughly, and mend what is found. `breathe` is called often, and may raise what ends it.

        Raises:
            BottomlessError: the log could not be read, or not be mended; `error` tells the gap.
        """
        # Where an open had too many objects before it, keys and base tell enough: the segments are looked at once a day.
        self.error = find_gap(self._history, throttle, is_thorough=self.finding is not Finding.OPEN)
        self.finding = Finding.SOUND if self.error is None else Finding.GAP
        if self.error is None:
            return
        logger.error("%s A new snapshot is made from the local file", self.error.message)
        self._mend(throttle)
        self.error = find_gap(self._history, throttle)
        if self.error is None:
            self.finding = Finding.SOUND
            self.repairs += 1
            logger.warning("%s: the log was mended by a new snapshot", self._history.name)

    def _newest_part(self, txid: int) -> Sequence[SegmentInfo]:
        """Return the newest snapshot and what follows it; nothing if these, too, are too many for one request."""
        edges, _ = self._history.some_edges(limit=_LISTED)
        base = max((edge for edge in edges if edge.pre == 0 and edge.post <= txid), key=lambda edge: edge.post, default=None)
        if base is None:
            return ()
        rest, is_complete = self._history.some_edges(since=base.post, limit=_LISTED)
        return [base, *rest] if is_complete else ()

    def _look_briefly(self, edges: Sequence[SegmentInfo]) -> Finding:
        if not edges:
            return Finding.OPEN
        chain = plan(edges, max(edge.post for edge in edges))
        try:
            is_sound = chain is not None and isinstance(_sound_header(self._history, chain[0]), SegmentHeader)
        except CorruptionError:
            is_sound = False
        return Finding.SOUND if is_sound else Finding.GAP

    # --- mending -------------------------------------------------------------------------------------------------------

    def _mend(self, throttle: Callable[[], None]) -> None:
        reader = self._reader()
        try:
            for attempt in range(_ATTEMPTS):
                with contextlib.ExitStack() as held:
                    # The order of the locks: SQLite's write lock, then the index's.
                    writers_wait = attempt >= _ATTEMPTS // 2
                    quiet = held.enter_context(reader.no_writers()) if writers_wait else None
                    found = self._pinned_state(reader, held)
                    if quiet is not None:
                        quiet.execute("ROLLBACK")
                    if found is not None and self._store(reader, *found, throttle):
                        return
        finally:
            reader.close()
        raise ReplicationError(
            f"cannot mend the log of {self._history.name!r}: {reader.path} kept changing",
            hint="The next commit tries again. "
            f"`bottomless-wal reset --from-local {shlex.quote(reader.path)}` stores the whole database at once.",
        )

    def _pinned_state(self, reader: LocalDatabase, held: contextlib.ExitStack) -> tuple[IndexHeader, WalState] | None:
        """Store what is pending, then pin in `reader` the state that the index is at. None: a commit came in between."""
        replicator = self._replicator
        with replicator.view.locked_to_commit(), replicator.index.locked():
            try:
                header = replicator.batch()
            except IndexCorrupt as lost:
                raise ReplicationError(f"cannot mend the log of {self._history.name!r}: {lost}", hint="The next commit goes on.") from lost
            tip = held.enter_context(reader.snapshot())
            try:
                return (header, tip) if header.txid and position_of(reader, tip) == header.position else None
            except SnapshotInvalidated:
                return None

    def _store(self, reader: LocalDatabase, header: IndexHeader, tip: WalState, throttle: Callable[[], None]) -> bool:
        """Store the pinned state as the segment 0 -> txid. False: the local files changed meanwhile.

        Raises:
            ReplicationError: there is such a segment, which is not sound: the state after the next commit can be stored.
        """
        history, state = self._history, 0
        key = keys.segment_key(history.name, 0, header.txid)
        if history.store.read(key, 0, 1) is not None:
            raise ReplicationError(f"cannot mend the log of {history.name!r}: {key} exists", hint="The next commit tries again.")

        def pages() -> Iterator[Page]:
            nonlocal state
            for pgno, data in reader.pages(tip, reader.shape(tip)):
                throttle()
                hashed = page_hash(pgno, data)
                state ^= hashed
                yield Page(pgno, hashed, data)

        try:
            staged = history.stage(0, header.txid, pages(), header.page_size, level=self._replicator.config.level)
        except SnapshotInvalidated as lost:
            logger.info("%s: %s: looking again", history.name, lost)
            return False
        if state != header.state or (tip.header is not None and not reader.unchanged(tip.header)):
            logger.warning("%s: the file has the state %016x, not %016x of txid %d", reader.path, state, header.state, header.txid)
            return False
        last = history.header(header.txid - 1, header.txid)
        time_ms = last.time_ms if last is not None else int(history.store.estimate() * 1000)
        made = SegmentHeader(
            pre=0,
            post=header.txid,
            pre_hash=0,
            post_hash=header.state,
            page_size=header.page_size,
            db_size=header.db_size,
            page_count=staged.page_count,
            reset=False,
            view_txid=header.view_complete,
            time_ms=time_ms,
            writer=header.writer[:WRITER_ID_SIZE] + secrets.token_bytes(8),
            commits=(CommitRecord(header.txid, header.state, time_ms),),
            body=staged.body,
        )
        return history.append(made, staged.blocks).created  # else another process was quicker, and the look after this tells


# --- looking -----------------------------------------------------------------------------------------------------------


def find_gap(history: RemoteLog, throttle: Callable[[], None] = _on, *, is_thorough: bool = True) -> RestoreError | None:
    """Return why the head of `history` cannot be restored, or None when every segment on some way to it is there and fits.

    Pages are not read: `verify` with `deep` does that.

    Raises:
        StoreError: the log could not be read.
    """
    gap: RestoreError | None = None
    for _ in range(_LOOKS):
        edges = history.edges()
        if not edges:
            return None
        gap = _gap_among(history, edges, throttle, is_thorough)
        if gap is None:
            return None
    return gap


def _gap_among(history: RemoteLog, edges: Sequence[SegmentInfo], throttle: Callable[[], None], is_thorough: bool) -> RestoreError | None:
    head = max(edge.post for edge in edges)
    suspects = ExcludedSegments()
    first = ""
    for _ in range(_WAYS):
        throttle()
        usable = suspects.without(edges)
        chain = plan(usable, head)
        if chain is None:
            wholes = {(edge.pre, edge.post) for edge in history.resets(usable, width=_WIDTH)}
            chain = plan(usable, head, wholes=wholes)
        if chain is None:
            break
        wrong = _first_wrong(history, chain if is_thorough else chain[:1], throttle)
        if wrong is None:
            return None
        edge, before, cause = wrong
        first = first or cause
        suspects.blame(edge, before, edges, head)
    return RestoreError(
        f"cannot restore {history.name!r} to txid {head}: {first or _gap_in(history, edges)}.",
        hint="Objects of the log were deleted. The writer makes a new snapshot from its file. No expiry rule may cover this prefix.",
    )


def _first_wrong(
    history: RemoteLog, chain: Sequence[SegmentInfo], throttle: Callable[[], None]
) -> tuple[SegmentInfo, SegmentInfo | None, str] | None:
    def load(edge: SegmentInfo) -> SegmentHeader | str:
        try:
            return _sound_header(history, edge)
        except CorruptionError as error:
            return error.message

    before: SegmentInfo | None = None
    state = page_size = 0
    for edge, found in zip(chain, pool.ordered(load, chain, _WIDTH), strict=True):
        throttle()
        if isinstance(found, str):
            return edge, None, found
        if not found.whole and (found.pre_hash, found.page_size) != (state, page_size):
            key = keys.segment_key(history.name, edge.pre, edge.post)
            return edge, before, f"{key} does not follow state {state:016x} of txid {edge.pre}"
        before, state, page_size = edge, found.post_hash, found.page_size
    return None


def _sound_header(history: RemoteLog, edge: SegmentInfo) -> SegmentHeader | str:
    """Return the header of `edge`, or what is missing: the segment itself, or the body that it names.

    Raises:
        CorruptionError: it is damaged. StoreError.
    """
    found = history.header(edge.pre, edge.post)
    if found is None:
        return f"{keys.segment_key(history.name, edge.pre, edge.post)} is missing"
    if found.body is not None:
        key = keys.log_prefix(history.name) + found.body.name
        if not history.store.read(key, found.body.size - 1, 1):
            return f"the body {key} is missing or cut short"
    return found


def _gap_in(history: RemoteLog, edges: Sequence[SegmentInfo]) -> str:
    reached = 0
    for edge in edges:  # in the order of their keys
        if edge.pre <= reached < edge.post:
            reached = edge.post
    return f"the log has a gap after txid {reached} (missing object {keys.segment_key(history.name, reached, reached + 1)})"
