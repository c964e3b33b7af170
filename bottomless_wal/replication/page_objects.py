"""Put the page objects: one object with the latest content of every page.

They are written after the log.

    commit n stored, ack=pages ──► put its pages, n = view txid ──► (killed or failed in between: n joins the backlog)
    ack=log, ack=local         ──► put in turns, beside the commits (`page_object_writer`), or at a checkpoint (pages=checkpoint)
    initial, reset             ──► backlog of the whole database, put in the background

Invariants:

* Only what is in the log is put. A page is put only while its hash is the one that the local index
  recorded from a stored segment. A page that has changed locally since is skipped, and stays due.
  The commit that carries the change puts it. If the page was changed back before the change was
  stored, no commit carries it, and a later turn puts it.
* Only one operation per key runs at a time. Putting or deleting page objects requires the *view
  lock*, `<db>-bottomless-view`, which is taken before the index's lock. A turn of
  `page_object_writer` releases the index's lock during its requests, so that commits continue.
* "The view is complete up to v" (`IndexHeader.view_complete`) means: the object of every page that
  has not changed since v is current. It is never claimed early. Only the log is authoritative.
* Objects past the end of a database that has shrunk are deleted later, off the commit path. There a
  late DELETE cannot hit a page that has come back.
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
"""Suffix of the view lock's file, after the index's name.

The file is empty, and is removed by the last close.
"""

_ENTRIES_AT_ONCE: Final = 16384
_MISSED_PAGES: Final = 1024
_MISSED_BYTES: Final = 16 << 20


class Turn(NamedTuple):
    """Pages of the backlog to put now, as of the state in `header`.

    The next turn starts at `cursor`.
    """

    pages: list[Page]
    header: IndexHeader
    backlog: Backlog
    cursor: int


class PageObjects:
    """Write the page objects of one database.

    The caller must hold the local index's lock, except for `put_turn`.
    """

    def __init__(self, config: Config, local: LocalDatabase, index: LocalIndex, history: RemoteLog) -> None:
        self.lock = FileLock(index.path + LOCK_SUFFIX, beside=local.path)
        self.config = config
        self.local = local
        self.index = index
        self.history = history

    def put(
        self, header: IndexHeader, pages: Iterable[Page], *, guard: Callable[[], None] = lambda: None, passed: Sequence[int] = ()
    ) -> IndexHeader:
        """Put the pages of the commit that the index has just recorded.

        This happens only with ack=pages, where the committer waits for it. Otherwise a turn does
        it.

        Args:
            header: the index's header, at that commit.
            pages: the pages of the commit.
            guard: called just before the first page is put. Its exceptions propagate.
            passed: read after all pages are put: the pages that could not be read.

        Raises:
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
        """Leave the page objects of the commit just recorded to the background.

        The commit carries the whole database.
        """
        if self.config.pages == "commit":
            return self.index.postpone_page_objects(header, view_size=UNKNOWN_SIZE)
        return header

    def catch_up(self, header: IndexHeader) -> IndexHeader:
        """Put the page objects that earlier commits have missed, if ack=pages.

        A committer may be waiting for them. Call it within a read transaction.

        Raises:
            ReplicationError: as `put`.
        """
        if self.has_missed(header):
            passed: list[int] = []
            return self.put(header, self._missed(header, header.txid - 1, header.txid, passed), passed=passed)
        return header

    def has_missed(self, header: IndexHeader) -> bool:
        """Return whether page objects of commits were neither put nor left to the backlog.

        This is never so unless ack=pages.
        """
        return self.config.ack == "pages" and header.view_txid < header.txid

    def behind(self, header: IndexHeader) -> bool:
        """Return whether there are pages to put."""
        return self.config.pages != "off" and (header.backlog is not None or header.view_txid < header.txid)

    def locked_to_commit(self) -> contextlib.AbstractContextManager[None]:
        """Hold the view lock if commits put page objects themselves (ack=pages).

        Take it before the index's lock.
        """
        return self.lock.locked() if self.config.ack == "pages" else contextlib.nullcontext()

    def choose(self, header: IndexHeader, tip: WalState, *, most: int) -> Turn | None:
        """Choose up to `most` pages to put next.

        They are of the backlog, and of what commits have left until now.

        Call it within a read transaction.

        Raises:
            SnapshotInvalidated: see `LocalDatabase.page`.
        """
        if header.backlog is None:
            # A pass has a fixed end. Pages that change meanwhile wait for the next pass; otherwise
            # no pass would ever end.
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
        # A skipped page may be changed back before the change is stored. Then no commit carries it,
        # and this backlog must put it.
        return Turn(pages, header, backlog, min(passed, default=cursor))

    def put_turn(self, turn: Turn) -> None:
        """Put the pages of `turn`. The caller holds the view lock, and not the index's.

        Raises:
            StoreError: not all of them were stored.
        """
        self._put(turn.header, turn.pages)
        failpoint("after fill")

    def advance(self, header: IndexHeader, turn: Turn) -> IndexHeader:
        """Record that the pages of `turn` were put.

        If the backlog was restarted meanwhile, they are put again.
        """
        return self.index.advance_backlog(header, turn.backlog, turn.cursor, turn.header.db_size)

    def finish(self, header: IndexHeader) -> None:
        """Put what the last commits have left, or add it to the backlog if it is much.

        Call it within a read transaction.

        Raises:
            StoreError: not all of them were stored.
            SnapshotInvalidated: see `LocalDatabase.page`.
        """
        if header.view_txid < header.txid:
            self.index.advance_page_objects(self._put_missed(header, upto=header.txid))

    def to_sweep(self, header: IndexHeader) -> bool:
        """Return whether page objects may exist past the end of the database."""
        return self.config.pages != "off" and header.view_size > header.db_size

    def sweep(self, header: IndexHeader) -> None:
        """Delete page objects past the end of a database that has shrunk.

        Raises:
            StoreError: the page objects could not be listed or deleted.
        """
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
        """Put the pages of the commits in (view txid, upto].

        If they are too many, they join the backlog.

        The header is not saved.
        """
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
        """Yield the pages that commits in (after, upto] changed last, as the log has them.

        See `_current` for `passed`.
        """
        tip = self.local.tip()
        if self.local.wal.header() != tip.header:
            raise SnapshotInvalidated(f"the WAL of {self.local.path} was restarted")
        for first in range(1, header.db_size + 1, _ENTRIES_AT_ONCE):
            hashes, txids = self.index.pages.entries(first, min(_ENTRIES_AT_ONCE, header.db_size - first + 1))
            rows = enumerate(zip(hashes, txids, strict=True), first)
            chosen = [(pgno, known) for pgno, (known, txid) in rows if after < txid <= upto and known]
            yield from self._current(header, tip, chosen, passed)

    def _current(self, header: IndexHeader, tip: WalState, chosen: list[tuple[int, int]], passed: list[int]) -> Iterator[Page]:
        """Yield the chosen pages, except those that have changed locally since.

        The numbers of those are added to `passed`.
        """
        for pgno, known in chosen:
            data = self.local.page(tip, pgno, header.page_size)
            page = Page(pgno, known, data) if data is not None else None
            if page is not None and page_hash(pgno, page.data) == known:
                yield page
            elif tip.header is not None and not self.local.unchanged(tip.header):
                # A read transaction does not protect the frames of a WAL that is wholly
                # checkpointed. The frame that was read belongs to another page, and this page did
                # not change.
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
