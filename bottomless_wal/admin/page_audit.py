"""Compare the page objects with the head, page by page, and repair them from the log, which alone is authoritative.

A repair stores only pages that the log has for the head. While it stores or deletes, it holds the lock of the local index, if there is
one. It checks then that the head has not changed, and stops if it has.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final

from ..core import pool
from ..core.errors import CorruptionError
from ..core.file_lock import FileLock
from ..formats import keys
from ..formats.page import Page, lock_page, page_hash
from ..formats.page_object import PAGE_OBJECT_LIMIT, PageTrailer, decode_page_object, encode_page_object
from ..history.log import Head
from ..history.page_table import TableReplay
from ..history.restore import Progress
from ..history.segment_list import SegmentInfo
from ..replication.index import LocalIndex
from ..replication.page_objects import LOCK_SUFFIX
from ..runtime.replica import INDEX_SUFFIX
from .problems import ProblemKind
from .stored_database import StoredDatabase

__all__ = ["Fault", "ViewAudit"]

_AT_ONCE: Final = 64  # page objects put while the local index is locked


@dataclass(frozen=True, slots=True)
class Fault:
    """The objects of the pages `first` to `last` are stale, missing, superfluous or damaged."""

    kind: ProblemKind
    first: int
    last: int
    detail: str


class ViewAudit:
    """The page objects of one database against `hashes`, the page hashes of its head."""

    def __init__(self, target: StoredDatabase, hashes: TableReplay, progress: Progress | None) -> None:
        self.target = target
        self.hashes = hashes
        self.progress = progress
        self.objects = 0

    def look(self, head: Head, *, among: Iterable[Fault] | None = None) -> list[Fault]:
        """Return what differs from `head`, in the order of the pages; with `among`, only the pages of these faults are compared."""
        if among is None:
            return list(_merged(self._all(head)))
        pgnos = [pgno for fault in among for pgno in range(fault.first, fault.last + 1)]
        lock = lock_page(head.page_size)
        checked = pool.ordered(lambda pgno: (pgno, self._read(pgno)), pgnos, self.target.config.concurrency)
        return list(_merged(fault for pgno, found in checked if (fault := self._judge(pgno, found, head, lock)) is not None))

    def unchanged_since(self, txid: int, faults: Iterable[Fault]) -> list[Fault]:
        """Return `faults` without the pages that were changed after `txid`: a writer may be storing their objects now."""
        return list(
            _merged(
                Fault(fault.kind, pgno, pgno, fault.detail)
                for fault in faults
                for pgno in range(fault.first, fault.last + 1)
                if self.hashes.txid(pgno) <= txid
            )
        )

    def _all(self, head: Head) -> Iterator[Fault]:
        """Yield the faults of all pages. The listing and the page numbers both ascend."""
        lock, expected = lock_page(head.page_size), 1
        listed = self._listed()
        checked = pool.ordered(
            lambda pgno: (pgno, self._read(pgno) if pgno <= head.db_size else None), listed, self.target.config.concurrency
        )
        for pgno, found in checked:
            self.objects += 1
            if self.progress is not None:
                self.progress(self.objects, max(head.db_size, self.objects))
            yield from self._missing(expected, min(pgno, head.db_size + 1), lock)
            expected = max(expected, pgno + 1)
            if pgno > head.db_size or pgno == lock:
                yield Fault(ProblemKind.SUPERFLUOUS, pgno, pgno, f"the database has {head.db_size} pages, this is none of them")
            elif (fault := self._judge(pgno, found, head, lock)) is not None:
                yield fault
        yield from self._missing(expected, head.db_size + 1, lock)

    def _listed(self) -> Iterator[int]:
        name = self.target.name
        for entry in self.target.store.list(keys.page_prefix(name)):
            pgno = keys.parse_page_key(name, entry.key)
            if pgno is not None:
                yield pgno

    @staticmethod
    def _missing(start: int, stop: int, lock: int) -> Iterator[Fault]:
        for first, last in ((start, min(stop, lock) - 1), (max(start, lock + 1), stop - 1)):
            if first <= last:
                yield Fault(ProblemKind.MISSING, first, last, "is missing")

    def _read(self, pgno: int) -> tuple[int, int] | CorruptionError | None:
        """Return (page hash, txid of its trailer, 0 without one), the error if it is damaged, or None if there is no object."""
        key = keys.page_key(self.target.name, pgno)
        try:
            data = self.target.store.get(key, limit=PAGE_OBJECT_LIMIT)
            if data is None:
                return None
            page, trailer = decode_page_object(data, name=key, pgno=pgno)
        except CorruptionError as error:
            return error
        return page_hash(pgno, page), trailer.txid if trailer is not None else 0

    def _judge(self, pgno: int, found: tuple[int, int] | CorruptionError | None, head: Head, lock: int) -> Fault | None:
        beyond = pgno > head.db_size or pgno == lock
        if found is None:
            return None if beyond else Fault(ProblemKind.MISSING, pgno, pgno, "is missing")
        if beyond:
            return Fault(ProblemKind.SUPERFLUOUS, pgno, pgno, f"the database has {head.db_size} pages, this is none of them")
        if isinstance(found, CorruptionError):
            return Fault(ProblemKind.DAMAGED, pgno, pgno, found.reason)
        known, txid = found
        if known == self.hashes.page_hash(pgno):
            return None
        if txid > head.txid:
            return Fault(ProblemKind.STALE, pgno, pgno, f"was written at txid {txid}, which the log does not have")
        written = f"as it was at txid {txid}" if txid else "another content"
        return Fault(
            ProblemKind.STALE, pgno, pgno, f"holds {written}; the head (txid {head.txid}) has the page from txid {self.hashes.txid(pgno)}"
        )

    # --- repair --------------------------------------------------------------------------------------------------------

    def repair(self, head: Head, chain: list[SegmentInfo], faults: list[Fault]) -> str | None:
        """Repair `faults` from the segments of `chain`. Return None if all are repaired, else the reason why not.

        Raises:
            StoreError, CorruptionError.
        """
        excess = [pgno for fault in faults if fault.kind is ProblemKind.SUPERFLUOUS for pgno in range(fault.first, fault.last + 1)]
        wanted = _Runs([fault for fault in faults if fault.kind is not ProblemKind.SUPERFLUOUS])
        pages = self._pages(chain, wanted)
        while some := list(islice(pages, _AT_ONCE)):
            with self._quiet():
                if self._moved(head):
                    return _MOVED
                pool.each(lambda page: self._put(page, head), some, self.target.config.concurrency)
        if excess:
            with self._quiet():
                if self._moved(head):
                    return _MOVED
                self.target.store.delete(keys.page_key(self.target.name, pgno) for pgno in excess)
        return None

    def _pages(self, chain: list[SegmentInfo], wanted: _Runs) -> Iterator[Page]:
        """Yield the wanted pages, each from the last edge that has it."""
        if not wanted:
            return
        for edge in chain:
            found = self.target.history.segment(edge.pre, edge.post)
            if found is None:
                raise CorruptionError(
                    f"the segment {edge.pre} -> {edge.post} vanished",
                    hint="Verify again.",
                    key=keys.segment_key(self.target.name, edge.pre, edge.post),
                )
            for block in self.target.history.blocks(found):
                for page in block:
                    if page.pgno in wanted and self.hashes.txid(page.pgno) == edge.post:
                        yield page

    def _put(self, page: Page, head: Head) -> None:
        trailer = PageTrailer(head.page_size, page.pgno, head.txid, page.hash, head.state, head.db_size)
        data = encode_page_object(page.data, trailer, self.target.config.level)
        self.target.store.put(keys.page_key(self.target.name, page.pgno), data)

    def _moved(self, head: Head) -> bool:
        return bool(self.target.history.edges(since=head.txid))

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[None]:
        """Keep the writers of this machine from storing page objects meanwhile."""
        path = self.target.path
        if path is None or not os.path.exists(path + INDEX_SUFFIX):
            yield
            return
        index = LocalIndex(path + INDEX_SUFFIX, beside=path)
        view = FileLock(index.path + LOCK_SUFFIX, beside=path)
        try:
            with view.locked(), index.locked():
                yield
        finally:
            index.close()
            view.remove()


_MOVED: Final = "the history went on during the repair, which has stopped: verify again when nobody writes"


class _Runs:
    """A set of page numbers, given as runs in ascending order. A lookup takes logarithmic time."""

    def __init__(self, faults: list[Fault]) -> None:
        self._runs = [range(fault.first, fault.last + 1) for fault in faults]

    def __bool__(self) -> bool:
        return bool(self._runs)

    def __contains__(self, pgno: int) -> bool:
        low, high = 0, len(self._runs)
        while low < high:
            middle = (low + high) // 2
            if self._runs[middle].stop <= pgno:
                low = middle + 1
            else:
                high = middle
        return low < len(self._runs) and pgno in self._runs[low]


def _merged(faults: Iterable[Fault]) -> Iterator[Fault]:
    """Yield neighbouring pages with the same kind of fault as one fault, with the first one's detail. Damaged objects stay single."""
    held: Fault | None = None
    for fault in faults:
        if held is not None and held.kind is fault.kind is not ProblemKind.DAMAGED and fault.first == held.last + 1:
            held = Fault(held.kind, held.first, fault.last, held.detail)
            continue
        if held is not None:
            yield held
        held = fault
    if held is not None:
        yield held
