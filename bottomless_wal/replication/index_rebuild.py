"""Rebuild the local index of a state that is the head.

The page hashes come from the tables of the log alone, or from the local file if that is the head.
Either way they are accepted only if they give the head's state hash. The header is returned, not
saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Final

from ..core.errors import CorruptionError, RestoreError
from ..core.failpoints import failpoint
from ..core.logs import get_logger
from ..formats.block import check_growth
from ..formats.page import page_hash
from ..history.log import Head, RemoteLog
from ..history.planner import ExcludedSegments, newest, plan
from ..history.segment_list import SegmentInfo
from ..sqlite.database_reader import LocalDatabase
from ..sqlite.snapshot_reader import SnapshotInvalidated
from .index import UNKNOWN_SIZE, IndexHeader, LocalIndex, changed

__all__ = ["rebuild_index_from_file", "rebuild_index_from_log"]

logger = get_logger(__name__)

_ATTEMPTS: Final = 8


def rebuild_index_from_log(
    history: RemoteLog, index: LocalIndex, header: IndexHeader, head: Head, edges: Sequence[SegmentInfo], *, width: int
) -> IndexHeader:
    """Read the head's page hashes from the tables of a chain of segments.

    No page is kept. The new header is not saved.

    Raises:
        RestoreError: no chain of segments leads to the head.
        CorruptionError: the hashes do not give the head's state.
    """
    suspects = ExcludedSegments()
    first: CorruptionError | None = None
    view_txid = header.view_txid
    for _ in range(_ATTEMPTS):
        usable = suspects.without(edges)
        chain = plan(usable, head.txid)
        if chain is None:
            resets = history.resets(usable, width=width)
            chain = plan(usable, head.txid, wholes={(edge.pre, edge.post) for edge in resets})
        if chain is None:
            break
        index.pages.clear()
        try:
            view_txid = _learn_chain(history, index, chain)
            break
        except _ChainError as misfit:
            logger.warning("%s", misfit.error.message)
            first = first or misfit.error
            suspects.blame(misfit.edge, misfit.before, edges, head.txid)
    else:
        chain = None
    if chain is None and first is not None:
        raise first
    if chain is None:
        raise RestoreError(
            f"the history of {history.name!r} has a gap before txid {head.txid}",
            hint="`bottomless-wal verify DB` shows where. `bottomless-wal reset --from-local DB` starts over from the local file.",
        )
    state = index.pages.state_hash(head.db_size)
    if state != head.state:
        raise CorruptionError(
            f"the segments of {history.name!r} give the state {state:016x} at txid {head.txid}, not {head.state:016x}",
            hint="`bottomless-wal verify DB` shows which is wrong.",
        )
    return changed(header.at(*head), view_txid=view_txid, view_size=UNKNOWN_SIZE)


class _ChainError(Exception):
    """`edge` is damaged, or does not follow `before`."""

    def __init__(self, edge: SegmentInfo, before: SegmentInfo | None, error: CorruptionError) -> None:
        super().__init__(error.message)
        self.edge, self.before, self.error = edge, before, error


def _learn_chain(history: RemoteLog, index: LocalIndex, chain: Sequence[SegmentInfo]) -> int:
    """Record the page hashes at the end of `chain`.

    Returns the txid up to which the page objects were complete by then.
    """
    size, state, view_txid = 0, 0, 0
    before: SegmentInfo | None = None
    for edge in chain:
        try:
            found = history.segment(edge.pre, edge.post)
            if found is None:
                raise RestoreError(f"the edge {edge.pre} -> {edge.post} vanished while it was read", hint="Try again.")
            if found.header.whole:
                index.pages.clear()
                size = 0
            elif found.header.pre_hash != state:
                raise _ChainError(
                    edge,
                    before,
                    CorruptionError(f"{found.name} does not follow state {state:016x}", hint="`bottomless-wal verify DB` shows more."),
                )
            table = history.tables(found)
            grown = 0
            while some := list(islice(table, 65536)):
                grown += sum(pgno > size for pgno, _ in some)
                index.pages.record([pgno for pgno, _ in some], [known for _, known in some], edge.post)
            check_growth(found.name, size, found.header.db_size, grown, found.header.page_size)
        except CorruptionError as error:
            raise _ChainError(edge, None, error) from error
        size, state, before = found.header.db_size, found.header.post_hash, edge
        failpoint("within learn")
        view_txid = min(found.header.view_txid, edge.post)
    return view_txid


def rebuild_index_from_file(
    local: LocalDatabase, history: RemoteLog, index: LocalIndex, header: IndexHeader, head: Head, edges: Sequence[SegmentInfo]
) -> IndexHeader:
    """Rebuild the index from the pages of the local file, which is the head.

    Only the pages whose page objects are missing are read from the log.
    """
    last = newest(edges)
    found = history.header(last.pre, last.post)
    view_txid = min(found.view_txid, head.txid) if found is not None else 0
    with local.snapshot() as tip:
        rows = ((pgno, page_hash(pgno, page)) for pgno, page in local.pages(tip, local.shape(tip)))
        while some := list(islice(rows, 4096)):
            index.pages.record([pgno for pgno, _ in some], [known for _, known in some], view_txid)
    if index.pages.state_hash(head.db_size) != head.state:
        raise SnapshotInvalidated(f"{local.path} was written to meanwhile")
    chain = plan(edges, head.txid, start=view_txid)
    if chain is None or not _note_missed(history, index, chain, head):
        logger.info("%s: the page view is put anew, for nothing tells what it has missed", local.path)
        view_txid = 0
        for first in range(1, head.db_size + 1, 65536):
            hashes = index.pages.entries(first, min(65536, head.db_size - first + 1))[0]
            index.pages.record(range(first, first + len(hashes)), hashes, head.txid)
    return changed(header.at(*head), view_txid=view_txid, view_size=UNKNOWN_SIZE)


def _note_missed(history: RemoteLog, index: LocalIndex, chain: Sequence[SegmentInfo], head: Head) -> bool:
    """Record which segments of `chain` changed each page last.

    Returns False if one of them is gone.
    """
    for edge in chain:
        segment = history.segment(edge.pre, edge.post)
        if segment is None:
            return False
        table = history.tables(segment)
        while some := list(islice(table, 65536)):
            pgnos = [pgno for pgno, _ in some if pgno <= head.db_size]
            index.pages.record(pgnos, index.pages.hashes(pgnos), edge.post)
    return True
