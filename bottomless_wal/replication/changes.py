"""Read and encode the next commit from the WAL frames or from a scan.

The source is the frames after a position, or the difference between a whole snapshot and the index.

Both give a `Change`: the pages whose hash differs from the index's, staged for upload, and the
state after them. This module does not write to the index. Memory: a few bytes a page. The pages
themselves are held only while they are few.
"""

from __future__ import annotations

import shlex
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

from ..core.errors import ConflictError
from ..core.logs import get_logger
from ..formats.page import Page, lock_page, page_hash
from ..formats.wal import FRAME_HEADER_SIZE, WalHeader, WalPosition
from ..history.log import EncodedPages, RemoteLog
from ..history.page_table import IndexCorrupt
from ..sqlite.database_reader import LocalDatabase
from ..sqlite.snapshot_reader import DatabaseShape, SnapshotInvalidated, WalState
from ..sqlite.wal_reader import FrameMap
from .index import IndexHeader, LocalIndex
from .wal_position import position_of

__all__ = ["Change", "stage_difference", "stage_frames", "stage_whole"]

logger = get_logger(__name__)

_PIECE_BYTES: Final = 64 << 20  # of frames in one commit, unless a single transaction is larger
_LOOKED_UP_BYTES: Final = 1 << 20  # of pages that a scan holds while it reads their hashes in the index
_KEPT_BYTES: Final = 4 << 20  # of pages kept for the page objects, so that they are not read twice
_MOST_POSITIONS: Final = 1 << 16  # positions that a scanned commit lists: the last ones


@dataclass(slots=True)
class Change:
    """The next segment, `pre` -> `post`.

    `pages` yields its pages again. It raises SnapshotInvalidated if they do not exist any more.
    """

    staged: EncodedPages
    pre: int
    post: int
    pgnos: Sequence[int]
    hashes: Sequence[int]
    post_hash: int
    page_size: int
    db_size: int
    change_counter: int
    position: WalPosition | None
    positions: tuple[WalPosition, ...]
    reset: bool
    pages: Callable[[], Iterable[Page]]


class _Collector:
    """Collect the number and hash of each page.

    The pages themselves are kept only while they are few.
    """

    def __init__(self, page_size: int, again: Callable[[int], bytes]) -> None:
        self.pgnos = array("I")
        self.hashes = array("Q")
        self._again = again
        self._most = max(1, _KEPT_BYTES // page_size)
        self._kept: list[Page] | None = []

    def add(self, page: Page) -> Page:
        self.pgnos.append(page.pgno)
        self.hashes.append(page.hash)
        if self._kept is not None:
            if len(self._kept) < self._most:
                self._kept.append(page)
            else:
                self._kept = None
        return page

    def pages(self) -> Iterable[Page]:
        return self._kept if self._kept is not None else self._read_again()

    def _read_again(self) -> Iterator[Page]:
        for pgno, known in zip(self.pgnos, self.hashes, strict=True):
            data = self._again(pgno)
            if page_hash(pgno, data) != known:
                raise SnapshotInvalidated(f"page {pgno} is no longer what it was")
            yield Page(pgno, known, data)


def stage_frames(
    local: LocalDatabase, index: LocalIndex, history: RemoteLog, header: IndexHeader, tip: WalState, *, level: int
) -> Change | None:
    """Stage the commits after the header's position, up to a bounded number of frames.

    Returns None if only a scan can find the difference.

    Raises:
        IndexCorrupt: the index has lost the hash of a page.
        SnapshotInvalidated: the WAL was restarted while it was read.
    """
    wal, position = tip.header, header.position
    if wal is None or position is None:
        raise AssertionError("frames without a WAL")
    if header.txid == 0 or header.page_size != wal.page_size:
        return None  # a first commit is the whole database, and so is one with another page size
    newest, commits, db_size = _newest_frames(local, wal, position.frame, tip.frames)
    lock = lock_page(wal.page_size)
    if any(not newest.get(pgno) for pgno in range(header.db_size + 1, db_size + 1) if pgno != lock):
        return None  # the database grew by pages that are in no frame
    pgnos = newest.pages(db_size)
    counter, state = header.change_counter, header.state ^ _tail(index, header, db_size)
    passed = _Collector(wal.page_size, lambda pgno: local.frame_page(wal, newest.get(pgno)))

    def changed() -> Iterator[Page]:
        nonlocal counter, state
        for start in range(0, len(pgnos), 4096):
            some = pgnos[start : start + 4096]
            for pgno, old in zip(some, index.pages.hashes(some), strict=True):
                if not old and pgno <= header.db_size:
                    # The state hash is computed from the old hashes. A wrong one, once stored,
                    # could never be restored.
                    raise IndexCorrupt(f"{index.path} has lost the hash of page {pgno}")
                data = local.frame_page(wal, newest.get(pgno))
                new = page_hash(pgno, data)
                if pgno == 1:
                    counter = int.from_bytes(data[24:28], "big")
                known = old if pgno <= header.db_size else 0
                if new != known:
                    state ^= known ^ new
                    yield passed.add(Page(pgno, new, data))

    staged = history.stage(header.txid, header.txid + 1, changed(), wal.page_size, level=level)
    if not local.unchanged(wal):
        raise SnapshotInvalidated(f"the WAL of {local.path} was restarted while it was read")
    return Change(
        staged, header.txid, header.txid + 1, passed.pgnos, passed.hashes, state, wal.page_size, db_size, counter,
        commits[-1], tuple(commits), False, passed.pages,
    )  # fmt: skip


def _newest_frames(local: LocalDatabase, wal: WalHeader, after: int, upto: int) -> tuple[FrameMap, list[WalPosition], int]:
    """Return (last frame of each page, ends of commits, database size) after `after`.

    Only whole commits count. The database size is that after the last of them.
    """
    newest = FrameMap(wal)
    commits: list[WalPosition] = []
    db_size = 0
    # From the beginning of a WAL on, frames may be read that an earlier scan has covered. All of
    # them together lead to the present state. Cut into pieces, the first piece would lead back to
    # an earlier state.
    enough = _PIECE_BYTES // (FRAME_HEADER_SIZE + wal.page_size) if after else upto + 1
    for frame, found in local.frame_headers(wal, after + 1, upto):
        newest.add(found.pgno, frame)
        if found.db_size:
            db_size = found.db_size
            commits.append(found.position(frame))
            if frame - after >= enough:
                break
    if not commits or (commits[-1].frame < upto and commits[-1].frame - after < enough):
        raise SnapshotInvalidated(f"the committed frames of {local.path} do not end with a commit")
    return newest, commits, db_size


def stage_whole(
    local: LocalDatabase, history: RemoteLog, tip: WalState, shape: DatabaseShape, *, pre: int, post: int, reset: bool, level: int
) -> Change:
    """Stage all pages of the snapshot as the segment `pre` -> `post`.

    Call it within `LocalDatabase.snapshot`.

    Raises:
        SnapshotInvalidated, CorruptionError: as `LocalDatabase.pages`.
    """
    scan = _Scan(local, tip, shape)
    pages = (scan.passed.add(page) for some in scan.batches() for page in some)
    staged = history.stage(pre, post, pages, shape.page_size, level=level)
    scan.finish()
    return scan.change(staged, pre, post, reset=reset)


def stage_difference(
    local: LocalDatabase, index: LocalIndex, history: RemoteLog, header: IndexHeader, tip: WalState, shape: DatabaseShape, *, level: int
) -> Change | None:
    """Stage the pages of the snapshot that differ from the index.

    Call it within `LocalDatabase.snapshot`. Returns None when there is no difference, but an empty
    change if an attempt is in doubt.

    Raises:
        IndexCorrupt: the index's entries do not give the state of its header.
        ConflictError: a page changed that has no frame in the WAL, which is the same as before.
        SnapshotInvalidated, CorruptionError: as `LocalDatabase.pages`.
    """
    scan = _Scan(local, tip, shape)
    indexed = _tail(index, header, shape.db_size)
    frames = _frames_since(local, header.position, tip)
    covered = header.position.frame if header.position is not None else 0
    unexplained = 0

    def changed() -> Iterator[Page]:
        nonlocal indexed, unexplained
        for some in scan.batches():
            for page, old in zip(some, index.pages.hashes([page.pgno for page in some]), strict=True):
                is_indexed = page.pgno <= header.db_size
                if is_indexed:
                    indexed ^= old
                if not is_indexed or page.hash != old:
                    if is_indexed and not unexplained and frames is not None and frames.get(page.pgno) <= covered:
                        unexplained = page.pgno
                    yield scan.passed.add(page)

    staged = history.stage(header.txid, header.txid + 1, changed(), shape.page_size, level=level)
    scan.finish()
    if indexed != header.state:
        # A power loss tore the entries. The difference from them is not the difference from the
        # log.
        raise IndexCorrupt(f"{index.path} contradicts itself")
    if unexplained:
        raise _unexplained(local.path, unexplained, header.txid)
    if not scan.passed.pgnos and shape.db_size == header.db_size and not header.in_doubt:
        return None
    return scan.change(staged, header.txid, header.txid + 1, reset=False)


class _Scan:
    """One pass over a whole snapshot.

    It computes the hash of each page, and the state hash.
    """

    def __init__(self, local: LocalDatabase, tip: WalState, shape: DatabaseShape) -> None:
        self.passed = _Collector(shape.page_size, lambda pgno: _page_again(local, tip, pgno, shape.page_size))
        self._local, self._tip, self._shape = local, tip, shape
        self._state = 0
        self._began = time.monotonic()

    def batches(self) -> Iterator[list[Page]]:
        """Yield all pages, a bounded number at a time."""
        source, most = self._local.pages(self._tip, self._shape), max(1, _LOOKED_UP_BYTES // self._shape.page_size)
        while some := [Page(pgno, page_hash(pgno, data), data) for pgno, data in islice(source, most)]:
            for page in some:
                self._state ^= page.hash
            yield some

    def finish(self) -> None:
        """Check that the pages that were read are of one state.

        Raises:
            SnapshotInvalidated: the WAL was restarted during the scan.
        """
        local, wal = self._local, self._tip.header
        if wal is not None and not local.unchanged(wal):
            raise SnapshotInvalidated(f"the WAL of {local.path} was restarted while it was scanned")
        seconds = time.monotonic() - self._began
        logger.info("%s: scanned %d pages in %.2f s, %d differ", local.path, self._shape.db_size, seconds, len(self.passed.pgnos))

    def change(self, staged: EncodedPages, pre: int, post: int, *, reset: bool) -> Change:
        """Return the scanned pages as the segment `pre` -> `post`.

        The change lists the position of each commit that the WAL holds.
        """
        local, tip, shape, passed = self._local, self._tip, self._shape, self.passed
        position = position_of(local, tip)
        positions: tuple[WalPosition, ...] = (position,) if position is not None else ()
        if tip.header is not None and tip.frames:
            # A power loss may lead back to each of these states.
            rows = local.frame_headers(tip.header, 1, tip.frames)
            positions = tuple(row.position(frame) for frame, row in rows if row.db_size)[-_MOST_POSITIONS:]
        return Change(
            staged, pre, post, passed.pgnos, passed.hashes, self._state, shape.page_size, shape.db_size, shape.change_counter,
            position, positions, reset, passed.pages,
        )  # fmt: skip


def _unexplained(path: str, pgno: int, txid: int) -> ConflictError:
    return ConflictError(
        f"page {pgno} of {path} is not what it was at txid {txid}, and nothing in its WAL, which has gone on "
        "since, has changed it: the file was replaced, or written to, by other means than SQLite. Nothing of it was stored",
        hint="To go on from the remote history: close every connection, and move the file and its -wal away. To make the local "
        f"file the truth, if it is sound: `bottomless-wal reset --from-local {shlex.quote(path)}`.",
    )


def _frames_since(local: LocalDatabase, position: WalPosition | None, tip: WalState) -> FrameMap | None:
    """Return the WAL's frames if the WAL contains the index's position, else None.

    Every page that has changed since then has a frame after the position.
    """
    wal = tip.header
    if position is None or wal is None or (position.salt1, position.salt2) != (wal.salt1, wal.salt2) or position.frame > tip.frames:
        return None
    return local.frame_map(wal, tip.frames) if local.wal.position(wal, position.frame) == position else None


def _page_again(local: LocalDatabase, tip: WalState, pgno: int, page_size: int) -> bytes:
    data = local.page(tip, pgno, page_size)
    if data is None:
        raise SnapshotInvalidated(f"page {pgno} of {local.path} vanished")
    return data


def _tail(index: LocalIndex, header: IndexHeader, db_size: int) -> int:
    """Return the XOR of the hashes of the pages that a shrinking database loses.

    Raises:
        IndexCorrupt: the index has lost one of them.
    """
    gone, lock = 0, lock_page(header.page_size or 512)
    for first in range(db_size + 1, header.db_size + 1, 65536):
        for pgno, old in enumerate(index.pages.entries(first, min(65536, header.db_size - first + 1))[0], first):
            if not old and pgno != lock:
                raise IndexCorrupt(f"{index.path} has lost the hash of page {pgno}")
            gone ^= old
    return gone
