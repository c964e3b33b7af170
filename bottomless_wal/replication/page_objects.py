"""The page view: the latest committed content of every page, one object each, written behind the log.

    commit n stored, ack=pages ──► put its pages, n = view txid ──► (killed, or failed, in between: n joins the backlog)
    ack=log, ack=local         ──► filled in turns, beside the commits (`page_object_writer`), or at a checkpoint (pages=checkpoint)
    initial, reset             ──► backlog of the whole database, filled in the background

Invariants:

* Nothing is put that is not in the log: a page is put only while its hash is the one that the local index recorded from a stored
  segment. A page that has changed locally since is passed over, and stays due: the commit that carries the change puts it, or, if it
  was changed back before it was stored, so that no commit carries it, a later turn does.
* One operation per key at a time: whoever puts or deletes page objects holds the *view lock*, `<db>-bottomless-view`, taken before the
  index's. A turn of `page_object_writer` lets go of the index while its requests are under way, so that commits go on.
* "The view is complete up to v" (`IndexHeader.view_complete`) means: the object of every page that has not changed since v is current.
  It is never claimed early. The log alone is authoritative.
* Objects past the end of a shrunken database are swept later, off the commit path, where a late DELETE cannot hit a page that
  has come back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Final, NamedTuple

from ..core import pool
from ..core.config import Config
from ..core.errors import ReplicationError, StoreError
from ..core.failpoints import failpoint
from ..core.file_lock import FileLock
from ..core.logs import get_logger
from ..formats import keys
from ..formats.page import Page, page_hash
from ..formats.page_object import PageTrailer, encode_page_object
from ..history.log import RemoteLog
from ..sqlite.database_reader import LocalDatabase
from ..sqlite.snapshot_reader import SnapshotInvalidated, WalState
from .index import UNKNOWN_SIZE, Backlog, IndexHeader, LocalIndex

__all__ = ["LOCK_SUFFIX", "PageObjects", "Turn"]

logger = get_logger(__name__)

LOCK_SUFFIX: Final = "-view"
"""Of the view lock's file: behind the index's name. The file is empty, and gone after the last close."""

_ENTRIES_AT_ONCE: Final = 16384
_MISSED_PAGES: Final = 1024
_MISSED_BYTES: Final = 16 << 20


class Turn(NamedTuple):
    """Pages of the backlog that are to be put now: as they were at the state that `header` tells. `cursor`: where the next turn goes on."""

    pages: list[Page]
    header: IndexHeader
    backlog: Backlog
    cursor: int


class PageObjects:
    """Writes the page objects of one database. Every method but `put_turn` expects the local index to be locked by the caller."""

    def __init__(self, config: Config, local: LocalDatabase, index: LocalIndex, history: RemoteLog) -> None:
        self.lock = FileLock(index.path + LOCK_SUFFIX, beside=local.path)
        self.config = config
        self.local = local
        self.index = index
        self.history = history

    def put(
        self, header: IndexHeader, pages: Iterable[Page], *, guard: Callable[[], None] = lambda: None, passed: Sequence[int] = ()
    ) -> IndexHeader:
        """Puts the pages of the commit that the index has just recorded, when somebody waits for them (ack=pages); else a turn does.

        `guard` is called just before; `passed`, when all is put, has the pages that could not be had. Raises whatever `guard` does, and:
            ReplicationError: the commit is in the log, but not all of its page objects are stored.
        """
        if self.config.ack != "pages":
            return header
        failpoint("before view")
        try:
            guard()
            header = self._put_missed(header, upto=header.txid - 1)
            self._put(header, pages)
        except StoreError as error:
            raise ReplicationError(
                f"commit {header.txid} of {self.local.path} is in the log, but not all of its page objects are stored: {error.message}",
                hint="Nothing is lost. The missing page objects are put with the next commit, flush() or open.",
            ) from error
        failpoint("after view")
        if passed:
            header = header.pages_postponed(header.txid)
        return self.index.advance_page_objects(header, header.txid)

    def postpone(self, header: IndexHeader) -> IndexHeader:
        """The commit just recorded carries the whole database: its page objects are put in the background."""
        if self.config.pages == "commit":
            return self.index.postpone_page_objects(header, view_size=UNKNOWN_SIZE)
        return header

    def catch_up(self, header: IndexHeader) -> IndexHeader:
        """Puts what commits the view has missed, for somebody may be waiting for it (nothing unless ack=pages). Call it pinned.

        Raises:
            ReplicationError: as `put`.
        """
        if self.has_missed(header):
            passed: list[int] = []
            return self.put(header, self._missed(header, header.txid - 1, header.txid, passed), passed=passed)
        return header

    def has_missed(self, header: IndexHeader) -> bool:
        """Are there commits whose page objects nobody has put, nor left to the backlog (never unless ack=pages)?"""
        return self.config.ack == "pages" and header.view_txid < header.txid

    def behind(self, header: IndexHeader) -> bool:
        """Is there anything to put?"""
        return self.config.pages != "off" and (header.backlog is not None or header.view_txid < header.txid)

    def locked_to_commit(self) -> contextlib.AbstractContextManager[None]:
        """The view lock, where commits put page objects themselves (ack=pages). To be taken before the index's."""
        return self.lock.locked() if self.config.ack == "pages" else contextlib.nullcontext()

    def choose(self, header: IndexHeader, tip: WalState, *, most: int) -> Turn | None:
        """Up to `most` pages of the backlog, and of what commits have left until now, to be put next. Call it pinned.

        Raises:
            SnapshotLost: see `LocalDatabase.page`.
        """
        if header.backlog is None:
            # A pass has a fixed end: pages that change meanwhile wait for the next, or no pass would ever come to its end.
            header = self.index.postpone_page_objects(header)
        backlog = header.backlog
        if backlog is None:
            return None
        chosen: list[tuple[int, int]] = []
        cursor = max(backlog.cursor, 1)
        while cursor <= header.db_size and len(chosen) < most:
            hashes, txids = self.index.pages.entries(cursor, min(_ENTRIES_AT_ONCE, header.db_size - cursor + 1))
            for known, txid in zip(hashes, txids, strict=True):
                if backlog.after < txid <= backlog.upto and known:
                    chosen.append((cursor, known))
                cursor += 1
                if len(chosen) == most:
                    break
        passed: list[int] = []
        pages = list(self._current(header, tip, chosen, passed))
        # What is ahead of the log locally may be back again before it is stored: then no commit carries it, and it is this one's to put.
        return Turn(pages, header, backlog, min(passed, default=cursor))

    def put_turn(self, turn: Turn) -> None:
        """Puts them: with the view locked, and not the index. Raises StoreError: they were not all stored."""
        self._put(turn.header, turn.pages)
        failpoint("after fill")

    def advance(self, header: IndexHeader, turn: Turn) -> IndexHeader:
        """They are put. (Where the backlog was begun anew meanwhile, so are they: they are put once more.)"""
        return self.index.advance_backlog(header, turn.backlog, turn.cursor, turn.header.db_size)

    def finish(self, header: IndexHeader) -> None:
        """Puts what the last commits have left, unless it is much: that joins the backlog. Call it pinned.

        Raises:
            StoreError: they were not all stored. SnapshotLost: see `LocalDatabase.page`.
        """
        if header.view_txid < header.txid:
            self.index.advance_page_objects(self._put_missed(header, upto=header.txid))

    def to_sweep(self, header: IndexHeader) -> bool:
        """May there be page objects past the end?"""
        return self.config.pages != "off" and header.view_size > header.db_size

    def sweep(self, header: IndexHeader) -> None:
        """Deletes page objects past the end of a database that has shrunk. Raises StoreError."""
        if not self.to_sweep(header):
            return
        prefix = keys.page_prefix(self.history.name)
        last = keys.page_key(self.history.name, header.db_size) if header.db_size else prefix
        beyond = [
            entry.key
            for entry in self.history.store.list(prefix, after=last)
            if keys.parse_page_key(self.history.name, entry.key) is not None
        ]
        failpoint("before sweep")
        if beyond:
            logger.info("%s: deleting %d page objects past its end", self.local.path, len(beyond))
            self.history.store.delete(beyond)
        failpoint("after sweep")
        self.index.record_sweep(header)

    def _put_missed(self, header: IndexHeader, *, upto: int) -> IndexHeader:
        """Puts the pages of commits in (view txid, upto]; where they are too many, they join the backlog. The header is not saved."""
        if header.view_txid >= upto:
            return header
        passed: list[int] = []
        most = min(_MISSED_PAGES, _MISSED_BYTES // header.page_size)
        missed = list(islice(self._missed(header, header.view_txid, upto, passed), most + 1))
        if len(missed) > most or passed:
            return header.pages_postponed(upto)
        self._put(header, missed)
        return header.pages_put(upto)

    def _missed(self, header: IndexHeader, after: int, upto: int, passed: list[int]) -> Iterator[Page]:
        """The pages that commits in (after, upto] changed last, as the log has them; see `_current` for `passed`."""
        tip = self.local.tip()
        if self.local.wal.header() != tip.header:
            raise SnapshotInvalidated(f"the WAL of {self.local.path} was restarted")
        for first in range(1, header.db_size + 1, _ENTRIES_AT_ONCE):
            hashes, txids = self.index.pages.entries(first, min(_ENTRIES_AT_ONCE, header.db_size - first + 1))
            rows = enumerate(zip(hashes, txids, strict=True), first)
            chosen = [(pgno, known) for pgno, (known, txid) in rows if after < txid <= upto and known]
            yield from self._current(header, tip, chosen, passed)

    def _current(self, header: IndexHeader, tip: WalState, chosen: list[tuple[int, int]], passed: list[int]) -> Iterator[Page]:
        """The chosen pages, but for those that have changed locally since: their numbers join `passed`."""
        for pgno, known in chosen:
            data = self.local.page(tip, pgno, header.page_size)
            page = Page(pgno, known, data) if data is not None else None
            if page is not None and page_hash(pgno, page.data) == known:
                yield page
            elif tip.header is not None and not self.local.unchanged(tip.header):
                # A pin holds no frames of a WAL that is wholly in the main file: what was read is another page's, and nobody changed this.
                raise SnapshotInvalidated(f"the WAL of {self.local.path} was restarted while page objects were put")
            else:
                passed.append(pgno)

    def _put(self, header: IndexHeader, pages: Iterable[Page]) -> None:
        name, store, level = self.history.name, self.history.store, self.config.level

        def put(page: Page) -> None:
            trailer = PageTrailer(header.page_size, page.pgno, header.txid, page.hash, header.state, header.db_size)
            store.put(keys.page_key(name, page.pgno), encode_page_object(page.data, trailer, level))
            failpoint("within view")

        pool.each(put, pages, self.config.concurrency)
