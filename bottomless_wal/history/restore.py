"""A state of the history, rebuilt into a file: the cheapest chain of edges, applied in order, verified, and only then put in place.

Invariants:

* Links are exact: an edge is applied only to the state whose hash it names, and must give the state hash it promises. An edge that
  does not is set aside and the way is planned anew without it; overlapping edges are tried only when no exact chain is left.
* The file is complete, verified and synced under a temporary name (mode 0600) before anything sees it. A failure leaves
  the previous file as it was, and names the object that is missing or wrong.
* Memory does not grow with the database: page hashes live in the local index, which is filled on the way.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Unpack

from ..core import pool
from ..core.errors import BottomlessError, CorruptionError, Details, RestoreError
from ..core.failpoints import failpoint
from ..core.logs import get_logger
from ..formats import keys
from ..formats.page import Page, lock_page, page_hash, pages_between
from ..formats.page_object import PAGE_OBJECT_LIMIT, PageTrailer, decode_page_object
from ..formats.segment import Segment, SegmentHeader
from .integrity import integrity_fault
from .log import RemoteLog
from .page_table import PageTable, TableReplay
from .planner import ExcludedSegments, plan
from .scratch import Scratch
from .segment_list import SegmentInfo

__all__ = ["Progress", "Rebuilt", "rebuild", "rebuild_from_pages"]

logger = get_logger(__name__)

Progress = Callable[[int, int], None]
"""Called with (bytes read so far, bytes expected); the second number may still grow."""

_ATTEMPTS: Final = 12
_LOOKS: Final = 2  # listings more, before it is believed that nothing leads there
_READ_AHEAD: Final = 48 << 20


@dataclass(slots=True)
class Rebuilt:
    """The state that a file under construction has: txid, state hash, page size in bytes, size in pages."""

    txid: int = 0
    state: int = 0
    page_size: int = 0
    db_size: int = 0
    view_txid: int = 0
    requests: int = 0


class _ChainError(Exception):
    """An edge does not belong where the plan put it, or vanished meanwhile."""

    def __init__(
        self,
        edge: SegmentInfo,
        cause: str,
        error: BottomlessError | None = None,
        *,
        before: SegmentInfo | None = None,
        **details: Unpack[Details],
    ) -> None:
        super().__init__(cause)
        self.details: Details = details if error is None else {**error.details, **details}
        self.edge = edge
        self.before = before  # the one that it does not follow
        self.cause = cause
        self.error = error


def rebuild(
    history: RemoteLog,
    into: Scratch,
    target: int,
    edges: Sequence[SegmentInfo],
    *,
    width: int = 8,
    progress: Progress | None = None,
    arguments: str = "DB",
) -> Rebuilt:
    """Fills `into` with the state of txid `target`, synced and verified.

    `arguments`: those of `bottomless-wal restore` that a hint names, the txid apart.

    Raises:
        RestoreError: no chain of sound edges leads to `target`; the message names what is missing or wrong.
    """
    suspects = ExcludedSegments()
    first: _ChainError | None = None
    for attempt in range(_ATTEMPTS):
        usable = suspects.without(edges)
        chain = plan(usable, target)
        overlapping = False
        if chain is None and first is None and attempt < _LOOKS:
            # Where somebody prunes, a listing may show what lies before a new snapshot no more, and the snapshot not yet.
            edges = history.edges()
            continue
        if chain is None:
            # A reset makes everything before it superfluous, gaps included; only its header tells that it is one.
            wholes = {(e.pre, e.post) for e in history.resets([e for e in usable if e.post <= target], width=width)}
            chain = plan(usable, target, wholes=wholes) if wholes else None
        if chain is None:
            chain = plan(usable, target, overlapping=True)
            overlapping = chain is not None
        if chain is None:
            raise _no_way(history, target, edges, first, arguments)
        state = Rebuilt()
        try:
            _apply_chain(history, into, chain, state, overlapping=overlapping, width=width, progress=progress)
            _require_listed(history, edges, chain, state)
        except _ChainError as misfit:
            first = first or misfit
            logger.warning("restoring %s: %s", history.name, misfit.cause)
            suspects.blame(misfit.edge, misfit.before, edges, target)
            into.pages.clear()
            os.ftruncate(into.fd, 0)
            if attempt + 1 < _ATTEMPTS:
                edges = history.edges()  # retention may have replaced what was listed, each time anew
            continue
        os.fsync(into.fd)
        return state
    raise _no_way(history, target, edges, first, arguments)


def rebuild_from_pages(history: RemoteLog, into: Scratch, *, width: int = 8, progress: Progress | None = None) -> Rebuilt | None:
    """Fills `into` from the page view alone; None when the bucket holds no page object of this database.

    Raises:
        RestoreError: the objects are no single state (the XOR of their hashes is not what the newest of them tells), or a page is missing.
        CorruptionError: an object is damaged.
    """
    listed = _listed_page_objects(history)
    if not listed:
        return None
    found = _read_page_objects(history, into, listed, width=width, progress=progress)
    db_size = _require_complete(history, found)
    lock = lock_page(found.page_size)
    pgnos = [pgno for pgno in range(1, db_size + 1) if pgno != lock]
    state = 0
    for pgno in pgnos:
        state ^= found.hashes[pgno]
    if found.proof is not None:
        _require_state(history, found.proof, state)
    os.ftruncate(into.fd, db_size * found.page_size)
    os.fsync(into.fd)
    if found.proof is None:
        _require_integrity(history, into)
    txid = found.proof.txid if found.proof is not None else 1
    into.pages.record(pgnos, [found.hashes[pgno] for pgno in pgnos], txid)
    return Rebuilt(txid, state, found.page_size, db_size, view_txid=txid)


@dataclass(slots=True)
class _PageObjects:
    """What the page objects hold and tell: page size in bytes, hash of each page, the newest trailer, how many have no trailer."""

    page_size: int = 0
    hashes: dict[int, int] = field(default_factory=dict)
    newest: PageTrailer | None = None
    bare: int = 0

    @property
    def proof(self) -> PageTrailer | None:
        """The trailer that tells the state hash of them all; None where one of them has no trailer."""
        return None if self.bare else self.newest


def _listed_page_objects(history: RemoteLog) -> list[tuple[int, str, int]]:
    """(page number, key, size in bytes) of each page object."""
    return [
        (pgno, entry.key, entry.size)
        for entry in history.store.list(keys.page_prefix(history.name))
        if (pgno := keys.parse_page_key(history.name, entry.key)) is not None
    ]


def _read_page_objects(
    history: RemoteLog, into: Scratch, listed: Sequence[tuple[int, str, int]], *, width: int, progress: Progress | None
) -> _PageObjects:
    """Write the page of each object to its place in `into`.

    Raises:
        RestoreError: an object vanished, has a page of another size, or was written at a txid that no history has.
        CorruptionError: an object is damaged.
    """

    def load(item: tuple[int, str, int]) -> tuple[int, bytes, PageTrailer | None, int]:
        pgno, key, size = item
        data = history.store.get(key, limit=PAGE_OBJECT_LIMIT)
        if data is None:
            raise RestoreError(f"{key} vanished during the restore", hint="Another program deletes objects. Try again.", key=key)
        return pgno, *decode_page_object(data, name=key, pgno=pgno), size

    found = _PageObjects()
    done, total = 0, sum(size for _, _, size in listed)
    for pgno, page, trailer, size in pool.ordered(load, listed, width):
        found.page_size = found.page_size or len(page)
        if len(page) != found.page_size:
            raise RestoreError(
                f"{keys.page_key(history.name, pgno)} holds a page of {len(page)} bytes, the pages before it have {found.page_size}",
                hint="Objects of two databases are mixed under one name. Remove the older ones, then try again.",
                key=keys.page_key(history.name, pgno),
                expected=found.page_size,
                actual=len(page),
            )
        found.bare += trailer is None
        if trailer is not None and (found.newest is None or trailer.txid > found.newest.txid):
            found.newest = trailer
        found.hashes[pgno] = page_hash(pgno, page)
        os.pwrite(into.fd, page, (pgno - 1) * found.page_size)
        failpoint("within restore")
        done += size
        if progress is not None:
            progress(done, total)
    if found.newest is not None and not 0 < found.newest.txid < keys.MAX_TXID:
        raise RestoreError(
            f"a page object of {history.name!r} says that it was written at txid {found.newest.txid}, which no history has",
            hint="Remove the page objects that are not of this program.",
            txid=found.newest.txid,
        )
    return found


def _require_complete(history: RemoteLog, found: _PageObjects) -> int:
    """Return the size of the database in pages. Raises RestoreError when one of them is missing."""
    db_size = found.newest.db_size if found.newest is not None else max(found.hashes)
    lock = lock_page(found.page_size)
    missing = pages_between(0, db_size, found.page_size) - sum(pgno <= db_size and pgno != lock for pgno in found.hashes)
    if missing:
        first = next(pgno for pgno in itertools.count(1) if pgno not in found.hashes and pgno != lock)
        raise RestoreError(
            f"{keys.page_key(history.name, first)} is missing: page {first} of {db_size} ({missing} missing in all)",
            hint="The page objects are no complete database, and there is no log to restore from.",
            key=keys.page_key(history.name, first),
            expected=db_size,
            actual=db_size - missing,
        )
    return db_size


def _require_state(history: RemoteLog, newest: PageTrailer, state: int) -> None:
    if state != newest.post_hash:
        raise RestoreError(
            f"the page objects of {history.name!r} are no single state: state hash {state:016x}, but the newest of them "
            f"(txid {newest.txid}) says {newest.post_hash:016x}",
            hint="A commit was cut off while they were written, and there is no log to restore from. Restore an older copy of the bucket.",
            txid=newest.txid,
            expected=newest.post_hash,
            actual=state,
        )


def _require_integrity(history: RemoteLog, into: Scratch) -> None:
    logger.warning("%s: page objects without trailers: no state hash to verify; running integrity_check", history.name)
    fault = integrity_fault(into.path)
    if fault is not None:
        raise RestoreError(f"the page objects are not a sound database: {fault}", hint="Restore an older copy of the bucket.")


def _apply_chain(
    history: RemoteLog, into: Scratch, chain: list[SegmentInfo], state: Rebuilt, *, overlapping: bool, width: int, progress: Progress | None
) -> None:
    ahead = max(1, min(width, _READ_AHEAD // max(edge.size + 1 for edge in chain))) if chain else 1
    done, total = 0, sum(edge.size for edge in chain)

    def load(edge: SegmentInfo) -> Segment | BottomlessError | None:
        try:
            return history.segment(edge.pre, edge.post)
        except CorruptionError as error:
            return error

    replay = TableReplay(into.pages)
    before: SegmentInfo | None = None
    for edge, found in zip(chain, pool.ordered(load, chain, ahead), strict=True):
        key = keys.segment_key(history.name, edge.pre, edge.post)
        if found is None:
            raise _ChainError(edge, f"{key} is missing", key=key)
        if isinstance(found, BottomlessError):
            raise _ChainError(edge, found.message, found)
        header = found.header
        if not header.whole and (header.page_size != state.page_size or (header.pre_hash != state.state and not overlapping)):
            raise _ChainError(
                edge,
                f"{key} does not follow state {state.state:016x} (txid {state.txid}): it says {header.pre_hash:016x} before it",
                before=before,
                key=key,
                expected=state.state,
                actual=header.pre_hash,
            )
        before = edge
        state.requests += 1
        if header.body is not None:
            total += header.body.size
        try:
            _apply(into, replay, key, header, history.blocks(found, width=min(width, 4)))
        except CorruptionError as error:
            raise _ChainError(edge, error.message, error) from error
        failpoint("within restore")
        state.txid, state.state, state.view_txid = header.post, replay.state_hash, header.view_txid
        state.page_size, state.db_size = replay.page_size, replay.db_size
        if state.state != header.post_hash:
            raise _ChainError(
                edge,
                f"{key} leads to state hash {state.state:016x}, not to {header.post_hash:016x} as it says",
                key=key,
                expected=header.post_hash,
                actual=state.state,
            )
        done += edge.size + (header.body.size if header.body is not None else 0)
        if progress is not None:
            progress(done, total)
    _require_every_page(into.pages, state, chain)


def _require_listed(history: RemoteLog, edges: Sequence[SegmentInfo], chain: list[SegmentInfo], state: Rebuilt) -> None:
    """An earlier state is one of the history if what leads on from it says so."""
    told = history.listed(edges, state.txid) if edges and state.txid < max(edge.post for edge in edges) else None
    if told is not None and told != state.state:
        key = keys.segment_key(history.name, chain[-1].pre, chain[-1].post)
        raise _ChainError(
            chain[-1],
            f"{key} leads to state hash {state.state:016x}, and the history has {told:016x} at txid {state.txid}: it is no part of it",
            key=key,
            expected=told,
            actual=state.state,
        )


def _apply(into: Scratch, replay: TableReplay, name: str, header: SegmentHeader, blocks: Iterator[list[Page]]) -> None:
    """Apply one segment to the file and to the table of page hashes."""
    if header.whole:
        os.ftruncate(into.fd, 0)
    replay.begin(header)
    for block in blocks:
        replay.add(header, [(page.pgno, page.hash) for page in block])
        start = 0
        for at in range(1, len(block) + 1):
            if at == len(block) or block[at].pgno != block[at - 1].pgno + 1:
                data = b"".join(page.data for page in block[start:at])
                if os.pwrite(into.fd, data, (block[start].pgno - 1) * header.page_size) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                start = at
    replay.finish(name, header)
    os.ftruncate(into.fd, header.db_size * header.page_size)


def _require_every_page(pages: PageTable, state: Rebuilt, chain: list[SegmentInfo]) -> None:
    lock = lock_page(state.page_size) if state.page_size else 0
    for first, hashes, _ in pages.batches(1, state.db_size):
        for pgno, known in enumerate(hashes, first):
            if not known and pgno != lock:
                raise _ChainError(chain[-1], f"no edge up to txid {state.txid} has page {pgno} of {state.db_size}")


def _no_way(history: RemoteLog, target: int, edges: Sequence[SegmentInfo], first: _ChainError | None, arguments: str) -> RestoreError:
    if first is not None:
        details: Details = {**first.details, "txid": target}
        return RestoreError(
            f"cannot restore {history.name!r} to txid {target}: {first.cause}",
            hint=(first.error.hint if first.error is not None else "")
            or "No other way leads there. `bottomless-wal verify DB` shows what can still be restored.",
            **details,
        )
    reached = 0
    for edge in sorted(edges, key=lambda e: (e.pre, e.post)):
        if edge.pre <= reached < edge.post <= target:
            reached = edge.post
    key = keys.segment_key(history.name, reached, reached + 1)
    return RestoreError(
        f"cannot restore {history.name!r} to txid {target}: the log has a gap after txid {reached} (missing object {key})",
        hint=f"Restore the state before the gap: `bottomless-wal restore --txid {reached} {arguments}`."
        if reached
        else "Check the bucket's name.",
        key=key,
        txid=target,
    )
