"""The page hashes of one state of a history, gathered from the tables of segments: no page is kept, memory does not grow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Final

from ..block import check_growth
from ..local_index import LocalIndex
from ..segment import Header, lock_page

__all__ = ["PageHashes"]

_AT_ONCE: Final = 4096


class PageHashes:
    """Begins as the empty database; `apply` goes along one edge. `index` is a locked one of our own, whose header is not used.

    `state` is the XOR of the hashes of all pages, computed, not read.
    """

    def __init__(self, index: LocalIndex) -> None:
        self._index = index
        self._first = 0
        self._entries: tuple[Sequence[int], Sequence[int]] = ((), ())
        self.clear()

    def clear(self) -> None:
        """Back to the empty database."""
        self._index.clear()
        self._first = 0
        self.state = self.page_size = self.db_size = 0

    def apply(self, name: str, header: Header, table: Iterable[tuple[int, int]]) -> None:
        """Follows the edge `name` of `header`, whose pages have the (number, hash) in `table`. `state` tells whether it leads where it
        says.

        Raises:
            CorruptionError: the database grew by more pages than the edge has.
        """
        if header.whole:
            self.clear()
        self._first = 0
        self.page_size = header.page_size
        grown = 0
        rows = iter(table)
        while some := list(islice(rows, _AT_ONCE)):
            pgnos, hashes = [pgno for pgno, _ in some], [known for _, known in some]
            grown += sum(pgno > self.db_size for pgno in pgnos)
            for pgno, old, new in zip(pgnos, self._index.hashes(pgnos), hashes, strict=True):
                self.state ^= new ^ (old if pgno <= self.db_size else 0)
            self._index.record(pgnos, hashes, header.post)
        check_growth(name, self.db_size, header.db_size, grown, header.page_size)
        lock = lock_page(header.page_size)
        for first in range(header.db_size + 1, self.db_size + 1, _AT_ONCE):
            count = min(_AT_ONCE, self.db_size - first + 1)
            for pgno, old in enumerate(self._index.entries(first, count)[0], first):
                self.state ^= 0 if pgno == lock else old
            self._index.record(range(first, first + count), [0] * count, 0)
        self.db_size = header.db_size

    def of(self, pgno: int) -> int:
        """The hash of page `pgno`. Fast when asked in ascending order."""
        return self._entry(pgno)[0]

    def changed_by(self, pgno: int) -> int:
        """The end (txid) of the edge that carried page `pgno` last."""
        return self._entry(pgno)[1]

    def _entry(self, pgno: int) -> tuple[int, int]:
        if not self._first <= pgno < self._first + _AT_ONCE or not self._first:
            self._first = pgno
            self._entries = self._index.entries(pgno, _AT_ONCE)
        return self._entries[0][pgno - self._first], self._entries[1][pgno - self._first]
