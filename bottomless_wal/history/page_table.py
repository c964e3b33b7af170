"""Keep the page hashes of one database state in a file: 24 bytes a page.

There is one entry for each page, in page number order, from a fixed offset of the file on. All
integers are big-endian:

      0  page hash                 8
      8  txid that last changed    8
     16  check: page hash XOR txid 8

A page that was never written has an entry of zeros. `TableReplay` applies segments to a table. It
is the only place that follows a segment's list of page hashes, growth and shrinking included.
Nothing here is synced: a table is a cache of the log.
"""

from __future__ import annotations

import functools
import operator
import os
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Final

from ..formats.block import check_growth
from ..formats.page import lock_page
from ..formats.segment import SegmentHeader

__all__ = ["ENTRY_SIZE", "IndexCorrupt", "PageTable", "TableReplay", "entry_is_valid"]

ENTRY_SIZE: Final = 24  # bytes
BATCH_PAGES: Final = 65536  # 1.5 MiB of entries are read or written at once

_REPLAY_BATCH_PAGES: Final = 4096


class IndexCorrupt(Exception):
    """A page table, or its index, is missing, damaged or inconsistent.

    It must be rebuilt.
    """


class PageTable:
    """The entries in the file that `descriptor` returns, from byte `offset` on.

    `path` is for messages.

    Raises:
        OSError: as the system does.
    """

    def __init__(self, path: str, descriptor: Callable[[], int], *, offset: int = 0) -> None:
        self._path = path
        self._descriptor = descriptor
        self._offset = offset

    def entries(self, first: int, count: int) -> tuple[Sequence[int], Sequence[int]]:
        """Return (page hashes, txids) of `count` pages from page `first` on.

        Pages that were never written have zeros.

        Raises:
            IndexCorrupt: a check does not match.
        """
        data = os.pread(self._descriptor(), count * ENTRY_SIZE, self._offset + (first - 1) * ENTRY_SIZE)
        numbers = array("Q", data[: len(data) // ENTRY_SIZE * ENTRY_SIZE])
        hashes, txids, checks = numbers[0::3], numbers[1::3], numbers[2::3]
        if int.from_bytes(hashes.tobytes()) ^ int.from_bytes(txids.tobytes()) != int.from_bytes(checks.tobytes()):
            raise IndexCorrupt(f"{self._path} is damaged: among its pages {first} to {first + count - 1}")
        missing = array("Q", bytes(8 * (count - len(hashes))))
        return _big_endian(hashes) + missing, _big_endian(txids) + missing

    def batches(self, first: int, last: int) -> Iterator[tuple[int, Sequence[int], Sequence[int]]]:
        """Yield (first page, page hashes, txids) of the pages `first` to `last`.

        Each item has a bounded number of pages.
        """
        for start in range(first, last + 1, BATCH_PAGES):
            yield start, *self.entries(start, min(BATCH_PAGES, last - start + 1))

    def state_hash(self, db_size: int) -> int:
        """Return the state hash that the entries of a database of `db_size` pages give."""
        # The entries past the end of the file are zeros, whatever size a header has.
        db_size = min(db_size, max(0, os.fstat(self._descriptor()).st_size - self._offset) // ENTRY_SIZE)
        state = 0
        for _, hashes, _ in self.batches(1, db_size):
            state = functools.reduce(operator.xor, hashes, state)
        return state

    def hashes(self, pgnos: Sequence[int]) -> list[int]:
        """Return the page hashes of `pgnos` (ascending)."""
        found: list[int] = []
        for start, stop in _runs(pgnos):
            found.extend(self.entries(pgnos[start], stop - start)[0])
        return found

    def record(self, pgnos: Sequence[int], hashes: Sequence[int], txid: int) -> None:
        """Write the entries of `pgnos` (ascending), all changed by `txid`."""
        for start, stop in _runs(pgnos):
            numbers = array("Q", bytes(ENTRY_SIZE * (stop - start)))
            numbers[0::3] = array("Q", hashes[start:stop])
            numbers[1::3] = array("Q", [txid]) * (stop - start)
            numbers[2::3] = array("Q", [known ^ txid for known in hashes[start:stop]])
            data = memoryview(_big_endian(numbers)).cast("B")
            if os.pwrite(self._descriptor(), data, self._offset + (pgnos[start] - 1) * ENTRY_SIZE) != len(data):
                raise OSError(f"short write to {self._path}")

    def remove(self, first: int, last: int, txid: int) -> None:
        """Record that the commit `txid` removed the pages `first` to `last`.

        A page that comes back must not find the hash that it had before.
        """
        for start in range(first, last + 1, BATCH_PAGES):
            count = min(BATCH_PAGES, last - start + 1)
            self.record(range(start, start + count), [0] * count, txid)

    def clear(self) -> None:
        """Remove all entries; what precedes them in the file stays."""
        fd = self._descriptor()
        os.ftruncate(fd, min(self._offset, os.fstat(fd).st_size))


class TableReplay:
    """Apply segments to a table, one after the other, from the empty database on.

    `state_hash` is the XOR of the hashes of all pages. It is computed, not read from a segment.
    `page_size` is in bytes, `db_size` in pages.
    """

    def __init__(self, table: PageTable) -> None:
        self._table = table
        self._grown = 0
        self._cached_first = 0
        self._cached: tuple[Sequence[int], Sequence[int]] = ((), ())
        self.clear()

    def clear(self) -> None:
        """Reset the table to the empty database."""
        self._table.clear()
        self._cached_first = 0
        self.state_hash = self.page_size = self.db_size = 0

    def apply(self, name: str, header: SegmentHeader, rows: Iterable[tuple[int, int]]) -> None:
        """Apply a whole segment whose pages have the (number, hash) in `rows`.

        Otherwise as `begin`, `add` and `finish`.
        """
        self.begin(header)
        source = iter(rows)
        while batch := list(islice(source, _REPLAY_BATCH_PAGES)):
            self.add(header, batch)
        self.finish(name, header)

    def begin(self, header: SegmentHeader) -> None:
        """Begin to apply the segment of `header`."""
        if header.whole:
            self.clear()
        self.page_size = header.page_size
        self._grown = self._cached_first = 0

    def add(self, header: SegmentHeader, rows: Sequence[tuple[int, int]]) -> None:
        """Apply some (number, hash) of the segment's pages, ascending."""
        pgnos, hashes = [pgno for pgno, _ in rows], [known for _, known in rows]
        size = self.db_size
        for pgno, old, new in zip(pgnos, self._table.hashes(pgnos), hashes, strict=True):
            if pgno > size:
                self._grown += 1
                old = 0
            self.state_hash ^= new ^ old
        self._table.record(pgnos, hashes, header.post)

    def finish(self, name: str, header: SegmentHeader) -> None:
        """Apply the size that the database has after the segment called `name`.

        Raises:
            CorruptionError: the database grew by more pages than the segment has.
        """
        check_growth(name, self.db_size, header.db_size, self._grown, header.page_size)
        lock = lock_page(header.page_size)
        for first, hashes, _ in self._table.batches(header.db_size + 1, self.db_size):
            for pgno, old in enumerate(hashes, first):
                self.state_hash ^= 0 if pgno == lock else old
        self._table.remove(header.db_size + 1, self.db_size, 0)
        self.db_size = header.db_size

    def page_hash(self, pgno: int) -> int:
        """Return the hash of page `pgno`. Fast if called in ascending order."""
        return self._entry(pgno)[0]

    def txid(self, pgno: int) -> int:
        """Return the txid at the end of the segment that last carried page `pgno`."""
        return self._entry(pgno)[1]

    def _entry(self, pgno: int) -> tuple[int, int]:
        if not self._cached_first <= pgno < self._cached_first + _REPLAY_BATCH_PAGES or not self._cached_first:
            self._cached_first = pgno
            self._cached = self._table.entries(pgno, _REPLAY_BATCH_PAGES)
        return self._cached[0][pgno - self._cached_first], self._cached[1][pgno - self._cached_first]


def entry_is_valid(data: bytes) -> bool:
    """Return whether `PageTable.record` wrote one of the entries in `data`.

    Only whole entries count.
    """
    rows = array("Q", data[: len(data) // ENTRY_SIZE * ENTRY_SIZE])
    return any(known and txid and known ^ txid == check for known, txid, check in zip(rows[0::3], rows[1::3], rows[2::3], strict=True))


def _big_endian(numbers: array[int]) -> array[int]:
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers


def _runs(pgnos: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield half-open ranges of positions in `pgnos` with consecutive numbers.

    The ranges are cut to a bounded length.
    """
    start = 0
    for at in range(1, len(pgnos) + 1):
        if at == len(pgnos) or pgnos[at] != pgnos[at - 1] + 1 or at - start == BATCH_PAGES:
            yield start, at
            start = at
