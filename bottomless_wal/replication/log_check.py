"""Check that the log still leads to its head.

Objects may expire, or be deleted, below a head that commits continue from. No commit would detect
that.

    open     check the keys, and the first segment of the chain to the head: a few requests
    daily    a thorough check by the upkeep's thread: every segment of the chain, and its body; also at once if
             the open found no chain
    mend     if there is no chain: the local file, at the state of a stored txid, becomes a snapshot, the new
             base of the log

Invariants:

* A gap is an error that names the first missing or wrong object. It stays in `LogCheck.error`, and
  so in `status()`, until it is mended.
* The snapshot is read in a read transaction of its own, outside the index's lock, so commits
  continue. It is stored only if the pages that were read give the state hash that the log has at
  that txid.
* A chain that pruning by another process interrupts at that moment is not a gap. The log is listed
  again before a gap is reported.
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

_LISTED: Final = 1000  # objects that one request lists
_LOOKS: Final = 3
_WAYS: Final = 8
_WIDTH: Final = 4
_ATTEMPTS: Final = 10


def _on() -> None:
    """Do nothing: continue without a pause."""


class Finding(Enum):
    """The result of the last check of the log."""

    SOUND = auto()
    OPEN = auto()  # too many objects for an open to check: a thorough check should follow soon
    GAP = auto()


class LogCheck:
    """Check the log of one open database, and mend it.

    `reader` opens a second reader of the local file. `finding` is the result of the last check.
    `error` is the gap that a thorough check has found, until it is mended. `repairs` counts the
    snapshots that mended a gap.
    """

    def __init__(self, replicator: Replicator, reader: Callable[[], LocalDatabase]) -> None:
        self._replicator = replicator
        self._history = replicator.history
        self._reader = reader
        self.error: RestoreError | None = None
        self.repairs = 0
        self.finding = Finding.SOUND

    def at_open(self, listed: Sequence[SegmentInfo] | None, txid: int) -> None:
        """Check with few requests whether a chain leads to the head.

        Args:
            listed: all segments of the log, as the open has just listed them; None if they are too
                many for one request.
            txid: the head's.

        Raises:
            StoreError: the log could not be read.
        """
        if txid:
            self.finding = self._look_briefly(listed or self._newest_part(txid))
        if self.finding is not Finding.SOUND:
            logger.info("%s: whether its log leads to txid %d is looked at thoroughly", self._history.name, txid)

    def run(self, throttle: Callable[[], None] = _on) -> None:
        """Check thoroughly, and mend a gap that is found.

        Args:
            throttle: called often; an exception that it raises ends the check.

        Raises:
            BottomlessError: the log could not be read, or not be mended; `error` has the gap.
        """
        # If the open had too many objects to check, keys and base are sufficient here. The segments
        # are checked once a day.
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
        """Return the newest snapshot and the segments after it.

        Returns nothing if these, too, are too many for one request.
        """
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
                    # Lock order: SQLite's write lock, then the index's.
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
        """Store what is pending, then hold a snapshot of that state in `reader`.

        Returns None if a commit came in between.
        """
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
        """Store the state of the snapshot as the segment 0 -> txid.

        Returns False if the local files changed meanwhile.

        Raises:
            ReplicationError: the segment exists, and is not sound. The state after the next commit
                can be stored.
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
        # If the key exists, another process stored it first; the check that follows shows whether
        # it mends the log.
        return history.append(made, staged.blocks).created


# --- looking -----------------------------------------------------------------------------------------------------------


def find_gap(history: RemoteLog, throttle: Callable[[], None] = _on, *, is_thorough: bool = True) -> RestoreError | None:
    """Return why the head of `history` cannot be restored.

    Returns None if every segment of some chain to the head exists and fits. Pages are not read:
    `verify` with `deep` does that.

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
    """Return the header of `edge`, or a message that names what is missing.

    Missing is the segment itself, or the body that it names.

    Raises:
        CorruptionError: it is damaged.
        StoreError: it could not be read.
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
    for edge in edges:  # listed in key order
        if edge.pre <= reached < edge.post:
            reached = edge.post
    return f"the log has a gap after txid {reached} (missing object {keys.segment_key(history.name, reached, reached + 1)})"
