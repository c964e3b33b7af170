"""Local commits become stored segments: one batch at a time, under the local index's lock.

A batch goes through these states; whoever is killed between two of them leaves what the next batch, in whatever process, mends:

    look      settle an attempt whose outcome is unknown; compare the index's position with the wal-index
    read      the new frames, the last of each page; or, when the position proves nothing, a scan of the whole snapshot
    intend    the post hash is appended to the index's intents         killed after: the next batch looks at the log first
    put       one create-only segment                                  killed after: the stored segment is ours by its intent: adopted
    record    page hashes, then the index's header                     killed between: as before
    view      page objects (`pageview`), then the view txid            killed within: the backlog is put by the next batch

Two rules carry the rest. *A position proves itself*: it is believed only if the frame it names still carries its checksum in a WAL
with its salts; a WAL that was restarted, cut or replaced without our seal (`seal`) is scanned. *Own attempts are told by content*:
a taken key is ours if and only if its pre hash is ours and its post hash is among our intents; anything else is a rival.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import secrets
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from . import layout
from .config import Config
from .crashpoints import reach
from .errors import CorruptionError, FencedError, ReplicationError, RestoreError
from .history import Edge, Head, History, Staged, plan
from .local_index import MAX_INTENTS, Identity, IndexHeader, LocalIndex, boot_id
from .pageview import UNKNOWN_SIZE, PageView
from .segment import Commit, Header, Page, Segment, lock_page, page_hash
from .snapshot import LocalDatabase, Shape, SnapshotLost, Tip, WalFile
from .wal import Position, WalHeader

__all__ = ["DRAINED", "FENCE_HORIZON_SECONDS", "IndexLost", "Replicator", "Standing", "home_of", "seal"]

logger = logging.getLogger(__name__)

FENCE_HORIZON_SECONDS: Final = 3600.0
"""After so long since txid was last proved the head, a successful put alone proves nothing: pruning may have freed the key."""

DRAINED: Final = 0xFFFFFFFF
"""As a position's frame: all of the WAL with these salts is covered, however long it is; its restart has begun already."""

_PIECE_BYTES: Final = 64 << 20  # of frames in one segment, unless one transaction alone is larger
_LOOKS: Final = 4
_FEW_PAGES: Final = 256


def home_of(config: Config, name: str) -> bytes:
    """16 bytes that tell whose history an index belongs to: endpoint, bucket and database name."""
    return hashlib.sha256("\0".join((config.endpoint, config.bucket, name)).encode()).digest()[:16]


class Standing(Enum):
    """How the index's position relates to the WAL that is there."""

    COVERED = auto()
    FRAMES = auto()  # it is proved, and frames follow it
    UNCLEAR = auto()  # a WAL header is just being written: look again
    LOST = auto()  # it proves nothing: scan


class IndexLost(Exception):
    """The local index vanished, was damaged or contradicts itself: boot has to find out anew where the local state stands."""


class _Again(Exception):
    """The index has moved on (an earlier attempt was adopted): start the batch anew."""


@dataclass(slots=True)
class _Change:
    """What is to become the next commit."""

    staged: Staged
    pgnos: Sequence[int]
    hashes: Sequence[int]
    post_hash: int
    page_size: int
    db_size: int
    change_counter: int
    position: Position | None
    positions: tuple[Position, ...]
    reset: bool
    pages: Callable[[], Iterator[Page]]


class Replicator:
    """The log side of one database. Every method but the constructor expects `index` to be locked by the caller.

    `on_logged(position)` is called after each stored segment, still under the lock.
    """

    def __init__(
        self,
        config: Config,
        local: LocalDatabase,
        index: LocalIndex,
        history: History,
        *,
        on_logged: Callable[[Position | None], None] = lambda position: None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.config = config
        self.local = local
        self.index = index
        self.history = history
        self.home = home_of(config, history.name)
        self.view = PageView(config, local, index, history)
        self.on_logged = on_logged
        self._sleep = sleep
        self._fenced: FencedError | None = None
        self._backfilled: tuple[object, int] | None = None

    # --- the batch -----------------------------------------------------------------------------------------------------

    def batch(self) -> IndexHeader:
        """Stores everything that is committed now: log, and page objects as `pages` says. Returns the index's header.

        Raises:
            FencedError: another writer has gone on; this and all later batches fail.
            ReplicationError: the log is stored, but page objects are not; or the local files kept changing.
            StoreError, CorruptionError: the log is not stored; everything stays pending.
        """
        if self._fenced is not None:
            raise self._fenced
        header = self.header()
        for _ in range(100):
            if not _has_content(self.local.path):
                return header
            try:
                if header.intents and (found := self.history.segment(header.txid, header.txid + 1)) is not None:
                    self._adopt(header, found)
                    raise _Again
                self._cover(header)
                return header
            except _Again:
                header = self.header()
            except SnapshotLost as lost:
                logger.info("%s: %s: looking again", self.local.path, lost)
        raise ReplicationError(
            f"the WAL of {self.local.path} kept changing under the replicator", hint="The commit stays pending; see the log."
        )

    def header(self) -> IndexHeader:
        """The index's header. Raises IndexLost when there is none of this history."""
        header = self.index.load()
        if header is None or header.home != self.home:
            raise IndexLost(f"{self.index.path} is missing, damaged, or of another history")
        return header

    def fresh(self) -> IndexHeader:
        """A new header over an empty index; not saved."""
        self.index.clear()
        return IndexHeader(self.home, secrets.token_bytes(16), boot_id())

    def _cover(self, header: IndexHeader) -> None:
        for look in range(_LOOKS):
            with self.local.pinned():
                tip = self.local.tip()
                standing = self.standing(header, tip)
                if standing is Standing.UNCLEAR and look < _LOOKS - 1:
                    pass
                elif standing is Standing.COVERED:
                    self._refresh_identity(header, tip)
                    self.view.catch_up(header)
                    return
                elif standing is Standing.FRAMES:
                    self._refresh_identity(header, tip)
                    self._frames(header, tip)
                    return
                else:
                    break
            self._sleep(0.005)
        self.scan(header)

    def standing(self, header: IndexHeader, tip: Tip) -> Standing:
        """Does the index's position prove itself in the WAL that is there? Call it pinned."""
        if header.needs_scan:
            return Standing.LOST
        position, wal = header.position, tip.header
        if self.local.wal.header() != wal:
            return Standing.UNCLEAR
        if wal is None:
            if position is None:
                return Standing.COVERED
            return Standing.UNCLEAR if position.frame == 0 else Standing.LOST
        if position is None:
            return Standing.LOST
        if (position.salt1, position.salt2) != (wal.salt1, wal.salt2):
            return Standing.UNCLEAR if position.frame == 0 and tip.frames == 0 else Standing.LOST
        if position.frame == DRAINED:
            return Standing.COVERED if tip.frames == 0 else Standing.LOST
        if tip.frames < position.frame:
            # 0: a restart has begun, and its header is not written yet. Fewer, but some: the WAL was cut by a power loss.
            covered = tip.frames == 0 and not self.local.wal.continues(position, wal)
            return Standing.COVERED if covered else Standing.LOST
        if self.local.wal.position(wal, position.frame) != position:
            return Standing.LOST
        return Standing.COVERED if tip.frames == position.frame else Standing.FRAMES

    # --- frames --------------------------------------------------------------------------------------------------------

    def _frames(self, header: IndexHeader, tip: Tip) -> None:
        """Everything from the position to the tip, in pieces that end with a commit."""
        wal, position = tip.header, header.position
        if wal is None or position is None:
            raise AssertionError("frames without a WAL")
        step = wal.page_size + 24
        while position.frame < tip.frames:
            commits: list[Position] = []
            db_size = 0
            newest: dict[int, int] = {}
            for frame, found in self.local.frame_headers(wal, position.frame + 1, tip.frames):
                newest[found.pgno] = frame
                if found.db_size:
                    db_size = found.db_size
                    commits.append(found.position(frame))
                    if (frame - position.frame) * step >= _PIECE_BYTES:
                        break
            if not commits:
                raise SnapshotLost(f"the committed frames of {self.local.path} do not end with a commit")
            last = commits[-1]
            lock = lock_page(wal.page_size)
            if header.txid == 0 or header.page_size != wal.page_size:
                # A first commit is the whole database, and so is one with another page size.
                header.needs_scan = True
                raise SnapshotLost(f"{self.local.path} is not the database that the index describes")
            pgnos = array("I", sorted(pgno for pgno, frame in newest.items() if pgno <= db_size and frame <= last.frame))
            if any(pgno != lock and pgno not in newest for pgno in range(header.db_size + 1, db_size + 1)):
                header.needs_scan = True
                raise SnapshotLost(f"{self.local.path} grew by pages that are in no frame")
            frames = newest
            change = self._stage(header, wal, pgnos, frames, db_size, last, tuple(commits))
            if not self.local.unchanged(wal):
                raise SnapshotLost(f"the WAL of {self.local.path} was restarted while it was read")
            position = self._commit(header, tip, change)
            if position is None:
                raise AssertionError("a change of frames has a position")

    def _stage(
        self, header: IndexHeader, wal: WalHeader, pgnos: array[int], frames: dict[int, int], db_size: int, last: Position,
        commits: tuple[Position, ...],
    ) -> _Change:  # fmt: skip
        hashes = array("Q")
        counter = header.change_counter
        kept = array("I")
        state = header.state

        def pages() -> Iterator[Page]:
            nonlocal state, counter
            for start in range(0, len(pgnos), 4096):
                some = pgnos[start : start + 4096]
                for pgno, old in zip(some, self.index.hashes(some), strict=True):
                    data = self.local.frame_page(wal, frames[pgno])
                    new = page_hash(pgno, data)
                    if pgno == 1:
                        counter = int.from_bytes(data[24:28], "big")
                    if pgno > header.db_size:
                        old = 0
                    if new == old:
                        continue
                    state ^= old ^ new
                    kept.append(pgno)
                    hashes.append(new)
                    yield Page(pgno, new, data)

        def again() -> Iterator[Page]:
            for pgno, known in zip(kept, hashes, strict=True):
                yield Page(pgno, known, self.local.frame_page(wal, frames[pgno]))

        staged = self.history.stage(header.txid, header.txid + 1, pages(), wal.page_size, level=self.config.level)
        state ^= self._tail(header, db_size)
        return _Change(
            staged, kept, hashes, state, wal.page_size, db_size, counter, last, commits, reset=False, pages=again
        )  # fmt: skip

    def _tail(self, header: IndexHeader, db_size: int) -> int:
        """XOR of the hashes of the pages that a shrinking database loses."""
        gone = 0
        for first in range(db_size + 1, header.db_size + 1, 65536):
            for old in self.index.entries(first, min(65536, header.db_size - first + 1))[0]:
                gone ^= old
        return gone

    # --- scan ----------------------------------------------------------------------------------------------------------

    def scan(self, header: IndexHeader, *, reset: bool = False, target: int | None = None) -> None:
        """Hashes a whole snapshot and stores the pages that differ from the index as the next commit.

        `reset`: stores all pages, as the whole new database. `target`: as the edge 0 -> target (a log rebuilt from page objects).
        """
        with self.local.snapshot() as tip:
            wal = tip.header
            if self.local.wal.header() != wal:
                raise SnapshotLost(f"the WAL of {self.local.path} was replaced")
            shape = self.local.shape(tip)
            whole = reset or header.txid == 0
            if not whole and shape.page_size != header.page_size:
                logger.warning("%s: its page size became %d: the next commit is a reset", self.local.path, shape.page_size)
                whole = reset = True
            change = self._stage_scan(header, tip, shape, whole=whole, reset=reset, target=target)
            if wal is not None and not self.local.unchanged(wal):
                raise SnapshotLost(f"the WAL of {self.local.path} was restarted while it was scanned")
            if change is not None:
                reach("before reset")
                self._commit(header, tip, change, scanned=True, target=target)
            else:
                header.needs_scan = False
                header.position = self.position_of(tip)
                header.change_counter = shape.change_counter
                header.identity = Identity.of(self.local.path)
                self.index.save(header)
                self.on_logged(header.position)
                self.view.catch_up(header)

    def _stage_scan(
        self, header: IndexHeader, tip: Tip, shape: Shape, *, whole: bool, reset: bool, target: int | None
    ) -> _Change | None:
        pgnos, hashes = array("I"), array("Q")
        state = 0
        indexed = self._tail(header, shape.db_size)
        began = time.monotonic()

        def pages() -> Iterator[Page]:
            nonlocal state, indexed
            block: list[tuple[int, bytes]] = []
            source = self.local.pages(tip, shape)
            while True:
                block = [entry for _, entry in zip(range(4096), source, strict=False)]
                if not block:
                    return
                olds = self.index.hashes([pgno for pgno, _ in block])
                for (pgno, data), old in zip(block, olds, strict=True):
                    new = page_hash(pgno, data)
                    state ^= new
                    if pgno <= header.db_size:
                        indexed ^= old
                    if whole or pgno > header.db_size or new != old:
                        pgnos.append(pgno)
                        hashes.append(new)
                        yield Page(pgno, new, data)

        post = target if target is not None else header.txid + 1
        pre = 0 if target is not None else header.txid
        staged = self.history.stage(pre, post, pages(), shape.page_size, level=self.config.level)
        logger.info(
            "%s: scanned %d pages in %.2f s, %d differ", self.local.path, shape.db_size, time.monotonic() - began, len(pgnos)
        )
        if not whole and indexed != header.state:
            # Entries that a power loss tore: what differs from them is not what differs from the log.
            raise IndexLost(f"{self.index.path} contradicts itself")
        if not pgnos and shape.db_size == header.db_size and not whole:
            return None

        def again() -> Iterator[Page]:
            for pgno, known in zip(pgnos, hashes, strict=True):
                data = self.local.page(tip, pgno, shape.page_size)
                if data is None:
                    raise SnapshotLost(f"page {pgno} of {self.local.path} vanished")
                yield Page(pgno, known, data)

        position = self.position_of(tip)
        return _Change(
            staged, pgnos, hashes, state, shape.page_size, shape.db_size, shape.change_counter, position,
            (position,) if position is not None and position.frame != DRAINED else (), reset and header.txid > 0, again,
        )  # fmt: skip

    def learn(self, header: IndexHeader, head: Head, edges: list[Edge]) -> None:
        """The head's page hashes, from the tables of a chain of edges; no page is kept. `header` is left to be saved.

        Raises:
            RestoreError: no chain of edges leads to the head.
            CorruptionError: the hashes are not the head's state.
        """
        chain = plan(edges, head.txid)
        if chain is None:
            raise RestoreError(
                f"the history of {self.history.name!r} has a gap before txid {head.txid}",
                hint="`bottomless-wal verify` shows where. `bottomless-wal reset --from-local` starts over from the local file.",
            )
        for edge in chain:
            found = self.history.segment(edge.pre, edge.post)
            if found is None:
                raise RestoreError(f"the edge {edge.pre} -> {edge.post} vanished while it was read", hint="Try again.")
            if found.header.whole:
                self.index.clear()
            table = self.history.tables(found)
            while some := list(itertools.islice(table, 65536)):
                self.index.record([pgno for pgno, _ in some], [known for _, known in some], edge.post)
            header.view_txid = min(found.header.view_txid, head.txid)
        header.txid, header.state = head.txid, head.state
        header.page_size, header.db_size = head.page_size, head.db_size
        header.view_size = UNKNOWN_SIZE
        header.proved_ms = int(self.history.store.now() * 1000)
        state = 0
        for first in range(1, head.db_size + 1, 65536):
            for known in self.index.entries(first, min(65536, head.db_size - first + 1))[0]:
                state ^= known
        if state != head.state:
            raise CorruptionError(
                f"the segments of {self.history.name!r} give the state {state:016x} at txid {head.txid}, not {head.state:016x}",
                hint="`bottomless-wal verify` shows which is wrong.",
            )

    def position_of(self, tip: Tip) -> Position | None:
        """The position that a snapshot at `tip` has. Call it pinned."""
        wal = tip.header
        if wal is None:
            return None
        if tip.frames == 0 and self.local.wal.continues(wal.position(), wal):
            # The wal-index has let go of these frames: their content is in the main file.
            return Position(wal.salt1, wal.salt2, DRAINED, 0, 0)
        found = self.local.wal.position(wal, tip.frames)
        if found is None:
            raise SnapshotLost(f"frame {tip.frames} of the WAL of {self.local.path} is gone")
        return found

    # --- put -----------------------------------------------------------------------------------------------------------

    def _commit(
        self, header: IndexHeader, tip: Tip, change: _Change, *, scanned: bool = False, target: int | None = None
    ) -> Position | None:
        """Stores `change` as the edge txid -> txid + 1 and records it; then the page objects. Returns the new position."""
        if not change.pgnos and change.db_size == header.db_size and not change.reset and header.txid > 0:
            # Frames that changed nothing: the state is what it was, only the position moves.
            header.position = change.position
            self.index.save(header)
            self.on_logged(header.position)
            return header.position
        reach("before intent")
        if change.post_hash in header.intents:
            header.intents.remove(change.post_hash)
        header.intents = [*header.intents[-(MAX_INTENTS - 1) :], change.post_hash]
        self.index.save(header)
        reach("before put")
        post = target if target is not None else header.txid + 1
        now_ms = int(self.history.store.now() * 1000)
        edge = Header(
            pre=0 if target is not None else header.txid,
            post=post,
            pre_hash=0 if target is not None else header.state,
            post_hash=change.post_hash,
            page_size=change.page_size,
            db_size=change.db_size,
            page_count=change.staged.page_count,
            reset=change.reset,
            view_txid=header.view_complete,
            time_ms=now_ms,
            writer=header.writer,
            commits=(Commit(post, change.post_hash, now_ms),),
            positions=change.positions,
            body=change.staged.body,
        )
        if edge.body is not None:
            reach("after body")
        receipt = self.history.append(edge, change.staged.blocks)
        reach("after put")
        if not receipt.created:
            found = self._stored(header, edge.pre, post)
            self._adopt(header, found)
            raise _Again
        date_ms = int(receipt.date * 1000)
        if header.proved_ms and date_ms - header.proved_ms > FENCE_HORIZON_SECONDS * 1000:
            self._prove(post)
        header.position = change.position
        if scanned:
            header.needs_scan = False
            header.identity = Identity.of(self.local.path)
        self._record(header, edge, change.pgnos, change.hashes, date_ms, change.change_counter)
        self.on_logged(header.position)
        if edge.whole:
            self.view.postpone(header)
        else:
            pages = change.pages()
            self.view.put(header, list(pages) if len(change.pgnos) <= _FEW_PAGES else pages)
        return header.position

    def _record(
        self, header: IndexHeader, edge: Header, pgnos: Sequence[int], hashes: Sequence[int], date_ms: int, change_counter: int
    ) -> None:
        """The index follows an edge that is stored: page hashes first, then the header that counts on them."""
        if edge.whole:
            position, needs_scan = header.position, header.needs_scan
            header.needs_scan = True
            self.index.save(header)  # killed while the old entries go: scan
            header.position, header.needs_scan = position, needs_scan
        self.index.record(pgnos, hashes, edge.post)
        for first in range(edge.db_size + 1, header.db_size + 1, 65536):
            count = min(65536, header.db_size - first + 1)
            self.index.record(range(first, first + count), [0] * count, edge.post)
        reach("before header")
        header.txid, header.state = edge.post, edge.post_hash
        header.page_size, header.db_size = edge.page_size, edge.db_size
        header.change_counter = change_counter
        header.proved_ms = date_ms
        header.intents = []
        self.index.save(header)

    # --- attempts whose outcome is unknown, and rivals -----------------------------------------------------------------

    def settle(self) -> None:
        """Boot's look at an attempt whose outcome is unknown: adopted when it is stored and ours; a rival's is left to the policy."""
        header = self.index.load()
        if header is None or header.home != self.home or not header.intents:
            return
        found = self.history.segment(header.txid, header.txid + 1)
        if found is not None and self._is_own(header, found.header):
            self._adopt(header, found)

    @staticmethod
    def _is_own(header: IndexHeader, edge: Header) -> bool:
        return edge.pre_hash == header.state and edge.post_hash in header.intents

    def _stored(self, header: IndexHeader, pre: int, post: int) -> Segment:
        found = self.history.segment(pre, post)
        if found is None:
            raise ReplicationError(
                f"{layout.segment_key(self.history.name, pre, post)} was taken, and is not there",
                hint="Another program deletes objects of this history, or the store is not consistent. The commit stays pending.",
            )
        return found

    def _adopt(self, header: IndexHeader, found: Segment) -> None:
        """The stored edge is our own earlier attempt: the index follows it. Or it is a rival's: FencedError."""
        edge = found.header
        if not self._is_own(header, edge):
            self._fence(
                f"{found.name} was written by another writer ({edge.writer.hex()}): {self.local.path} is at txid {header.txid}, "
                f"and the history has gone on without it"
            )
        logger.info("%s: %s is our own, from an attempt whose answer was lost", self.local.path, found.name)
        reach("within adopt")
        position = edge.positions[-1] if edge.positions else None
        with self.local.pinned():
            tip = self.local.tip()
            wal = tip.header
            known = (
                position is not None
                and wal is not None
                and self.local.wal.header() == wal
                and (position.salt1, position.salt2) == (wal.salt1, wal.salt2)
                and position.frame <= tip.frames
                and self.local.wal.position(wal, position.frame) == position
            )
        header.position = position if known else None
        header.needs_scan = header.needs_scan or not known
        if edge.whole:
            self.index.clear()
        pgnos, hashes = array("I"), array("Q")
        for pgno, known_hash in self.history.tables(found):
            pgnos.append(pgno)
            hashes.append(known_hash)
        self._record(header, edge, pgnos, hashes, edge.time_ms, header.change_counter)

    def _prove(self, post: int) -> None:
        beyond = self.history.edges(since=post)
        if beyond:
            self._fence(
                f"{self.local.path} was away for too long: its commit {post} was stored where the history, which is at txid "
                f"{max(e.post for e in beyond)} by now, had been pruned"
            )

    def _fence(self, message: str) -> None:
        self._fenced = FencedError(
            message,
            hint="This replica has stopped and overwrites nothing. Re-base it with `bottomless-wal restore --force`, or make it the "
            "truth by opening it with initial_replication=force.",
        )
        raise self._fenced

    # --- identity ------------------------------------------------------------------------------------------------------

    def _refresh_identity(self, header: IndexHeader, tip: Tip) -> None:
        """Follows the main file's change by checkpoints; a change without one was made behind our back: scan."""
        seen = (tip.header, tip.backfilled)
        identity = Identity.of(self.local.path)
        if identity == header.identity:
            self._backfilled = seen
            return
        if header.identity is not None and identity is not None and self._backfilled == seen:
            logger.warning("%s was changed by other means than SQLite: scanning", self.local.path)
            header.needs_scan = True
            header.identity = identity
            self.index.save(header)
            raise SnapshotLost("the main file was changed behind SQLite's back")
        self._backfilled = seen
        header.identity = identity
        self.index.save(header)


def _has_content(path: str) -> bool:
    """A database without a page is the empty state, txid 0."""
    try:
        return os.stat(path).st_size > 0
    except FileNotFoundError:
        return False


def seal(index: LocalIndex, wal_path: str, new: WalHeader | None) -> None:
    """The WAL is about to lose its frames: carries the position across, or marks that a scan is needed.

    Called with SQLite's write lock held, before a new WAL header is written (`new`), or the WAL is truncated or deleted (None);
    `index` is not locked, and must not be one that the calling thread has locked elsewhere. By then everything that was committed is in
    the main file. The position goes across only if it has the salts of the header still in the file and no frame there continues it.
    """
    wal = WalFile(wal_path)
    try:
        with index.locked():
            header = index.load()
            if header is None or header.needs_scan:
                return
            old = wal.header()
            if new is not None and old is not None and (new.salt1, new.salt2) == (old.salt1, old.salt2):
                return  # the same WAL once more: its first transaction was rolled back
            position = header.position
            if old is None:
                covered = position is None
            elif position is None or (position.salt1, position.salt2) != (old.salt1, old.salt2):
                covered = False
            else:
                covered = position.frame == DRAINED or (
                    wal.position(old, position.frame) == position and not wal.continues(position, old)
                )
            reach("before seal")
            if covered:
                header.position = new.position() if new is not None else None
            else:
                logger.info("%s: the WAL is restarted before all of it is stored: a scan is needed", wal_path)
                header.needs_scan = True
            index.save(header)
            reach("after seal")
    finally:
        wal.close()

