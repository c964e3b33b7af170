"""Local commits become stored segments: one batch at a time, under the local index's lock.

A batch goes through these states; whoever is killed between two of them leaves what the next batch, in whatever process, mends:

    look      settle an attempt whose outcome is unknown; compare the index's position with the wal-index
    read      the new frames, the last of each page; or, when the position proves nothing, a scan of the whole snapshot
    intend    post hash and a random attempt number join the intents   killed after: the next batch looks at the log first
    put       one create-only segment                                  killed after: the stored segment is ours by its intent: adopted
    record    page hashes, then the index's header                     killed between: as before
    view      page objects (`pageview`), then the view txid            killed within: the backlog is put by the next batch

Two rules carry the rest. *A position proves itself* (`standing`), or everything is scanned. *Own attempts are told by attempt number and
content*: a taken key is ours if and only if its pre hash is ours, and its attempt number and post hash are one of our intents; anything
else is a rival. The number is drawn anew for each attempt with new content. So a second machine that makes the same change at the same
moment is a rival, and a copied directory shares with its original only the attempts made before the copy: those of one and the same commit.
"""

from __future__ import annotations

import hashlib
import secrets
import shlex
import time
from array import array
from collections.abc import Callable, Sequence
from typing import Final

from ..core.config import Config
from ..core.errors import CorruptionError, FencedError, ReplicationError, StoreError
from ..core.failpoints import reach
from ..core.logs import get_logger
from ..formats import keys
from ..formats.segment import WRITER_ID_SIZE, Body, Commit, Header, Segment
from ..formats.wal import Position
from ..history.log import FENCE_HORIZON_SECONDS, History
from ..history.page_table import IndexCorrupt
from ..history.segment_list import Edge
from ..sqlite.database_reader import LocalDatabase, SnapshotLost, Tip
from .changes import Change, stage_frames, stage_scan
from .index import MAX_INTENTS, Identity, IndexHeader, Intent, LocalIndex, boot_id
from .lineage import local_state
from .page_objects import UNKNOWN_SIZE, PageView
from .wal_position import Standing, position_of, standing

__all__ = ["Replicator", "home_of"]

logger = get_logger(__name__)

_LOOKS: Final = 4
_SUSPECT_SECONDS: Final = 2.0
_PAUSE_SECONDS: Final = 2.0


def home_of(config: Config, name: str) -> bytes:
    """16 bytes that tell whose history an index belongs to: endpoint, bucket and database name."""
    return hashlib.sha256("\0".join((config.endpoint, config.bucket, name)).encode()).digest()[:16]


class MovedOn(SnapshotLost):
    """The index has moved on (an earlier attempt was adopted): look anew."""


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
        self.on_head: Callable[[int], None] = lambda txid: None
        """Called with the txid of each segment that was stored here, under the lock: what it does is quick."""
        self._sleep = sleep
        self.held = False
        """Nothing is sent before the next commit, not even by a close: initial_replication=skip, or a new database."""
        self._fenced: FencedError | None = None
        self._backfilled: tuple[object, ...] | None = None
        self._suspect: tuple[Identity | None, float] | None = None
        self._stored_last = (0, 0.0)  # (txid, when)

    # --- the batch -----------------------------------------------------------------------------------------------------

    def batch(self) -> IndexHeader:
        """Stores everything that is committed now: log, and page objects as `pages` says. Returns the index's header.

        Raises:
            FencedError: another writer has gone on; this and all later batches fail.
            FilesLostError: the file at the path is not the one that is open, or it was truncated.
            ReplicationError: the log is stored, but page objects are not; or the local files kept changing.
            StoreError, CorruptionError: the log is not stored; everything stays pending.
        """
        if self._fenced is not None:
            raise self._fenced
        header = self.header()
        for _ in range(100):
            if not self.local.has_content(is_new=header.txid == 0):
                return header
            try:
                if header.intents and (found := self.history.segment(header.txid, header.txid + 1)) is not None:
                    self._adopt(header, found)
                    raise MovedOn("an earlier attempt was adopted")
                return self._cover()
            except MovedOn:
                header = self.header()
            except SnapshotLost as lost:
                logger.info("%s: %s: looking again", self.local.path, lost)
        raise ReplicationError(
            f"the WAL of {self.local.path} kept changing under the replicator", hint="The commit stays pending; see the log."
        )

    def header(self) -> IndexHeader:
        """The index's header. Raises IndexCorrupt when there is none of this history."""
        header = self.index.load()
        if header is None or header.home != self.home or (header.state and not header.txid):
            raise IndexCorrupt(f"{self.index.path} is missing, damaged, of another history, or of a file that is to be replaced")
        # Another process may have said so at its own close; here the database is in use.
        header.clean = False
        return header

    def fresh(self) -> IndexHeader:
        """A new header over an empty index; not saved."""
        self.index.clear()
        reach("after clear")
        return self.unknown()

    def unknown(self) -> IndexHeader:
        """A header that tells nothing but whose it is, and looks at no seal that is there already; not saved."""
        seal = self.index.last_seal()
        return IndexHeader(self.home, secrets.token_bytes(16), boot_id(), seal_sequence=seal.sequence if seal is not None else 0)

    def _cover(self) -> IndexHeader:
        for look in range(_LOOKS):
            with self.local.pinned():
                header = self.header()
                tip = self.local.tip()
                found = standing(self.local, header, tip)
                if found in (Standing.COVERED, Standing.FRAMES):
                    self._refresh_identity(header, tip)
                    if header.intents and tip.frames == (header.position.frame if header.position is not None else 0):
                        break  # an attempt may still arrive: only a put of the state as it is now tells what the head is
                    if self._frames(header, tip):
                        self._catch_up(header)
                        return header
                    break
            if found is Standing.LOST or look == _LOOKS - 1:
                break
            self._sleep(0.005)
        self.scan(header)
        return header

    def _catch_up(self, header: IndexHeader) -> None:
        """The page objects that earlier commits have missed; not over those of a writer that has gone on since."""
        if self.view.has_missed(header):
            self.require_head(header)
            self.view.catch_up(header)

    def _frames(self, header: IndexHeader, tip: Tip) -> bool:
        """Everything from the position to the tip, commit by commit. False: only a scan can tell what changed."""
        while header.position is not None and header.position.frame < tip.frames:
            change = stage_frames(self.local, self.index, self.history, header, tip, level=self.config.level)
            if change is None:
                return False
            self._commit(header, change)
        return True

    def scan(self, header: IndexHeader, *, reset: bool = False, target: int | None = None, background: bool = False) -> None:
        """Hashes a whole snapshot and stores the pages that differ from the index as the next commit.

        `reset`: stores all pages, as the whole new database. `target`: as the edge 0 -> target (a log rebuilt from page objects).
        `background`: nobody waits for the page objects of this one.
        """
        # Seals up to here speak of what the snapshot will contain; a later one must be looked at.
        header.absorb(self.index.last_seal())
        with self.local.snapshot() as tip:
            if self.local.wal.header() != tip.header:
                raise SnapshotLost(f"the WAL of {self.local.path} was replaced")
            shape = self.local.shape(tip)
            whole = reset or header.txid == 0 or target is not None
            if not whole and shape.page_size != header.page_size:
                logger.warning("%s: its page size became %d: the next commit is a reset", self.local.path, shape.page_size)
                whole = reset = True
            pre, post = (header.txid, header.txid + 1) if target is None else (0, target)
            change = stage_scan(
                self.local, self.index, self.history, header, tip, shape,
                whole=whole, reset=reset and pre > 0, pre=pre, post=post, level=self.config.level, even_if_same=bool(header.intents),
            )  # fmt: skip
            if change is not None:
                self._commit(header, change, scanned=True, target=target, background=background)
                return
            self.require_head(header)  # as a put would: a commit that has led back to the head may be waiting for it
            self._has_scanned(header, position_of(self.local, tip))
            header.change_counter = shape.change_counter
            self.index.save(header)
            self.on_logged(header.position)
            self._catch_up(header)

    # --- put -----------------------------------------------------------------------------------------------------------

    def _commit(
        self, header: IndexHeader, change: Change, *, scanned: bool = False, target: int | None = None, background: bool = False
    ) -> None:
        """Stores `change` as the edge txid -> txid + 1 and records it; then the page objects.

        Commits that together changed nothing are stored, too: an earlier attempt may still arrive, and another writer may have gone on.
        Only the put, which contends for the next key, tells that the state that is acknowledged is the head.
        """
        reach("before intent")
        if header.txid == 0:
            # Should the answer be lost and the WAL be gone by the next open, this tells that the file has gone on from what was stored.
            self.index.identify(header, self.local.path)
            header.change_counter, header.needs_scan = change.change_counter, True
        last = header.intents[-1] if header.intents else None
        if last is None or not last.attempt or last.post_hash != change.post_hash:  # else it is the same attempt, once more
            header.intents = [*header.intents[-(MAX_INTENTS - 1) :], Intent(change.post_hash, secrets.randbits(63) + 1)]
        self.index.save(header)
        reach("before put")
        post = target if target is not None else header.txid + 1
        answered_ms = int(self.history.store.now() * 1000)
        now_ms = int(self.history.store.estimate() * 1000)
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
            writer=header.writer[:WRITER_ID_SIZE] + header.intents[-1].attempt.to_bytes(8),
            commits=(Commit(post, change.post_hash, now_ms),),
            positions=change.positions,
            body=change.staged.body,
        )
        if edge.body is not None:
            reach("after body")
        receipt = self.history.append(edge, change.staged.blocks)
        stored = time.monotonic()
        reach("after put")
        if not receipt.created:
            found = self._stored(header, edge.pre, post)
            self._adopt(header, found)
            raise MovedOn("an earlier attempt was adopted")
        date_ms = int(receipt.date * 1000)
        if header.proved_ms and date_ms - header.proved_ms > FENCE_HORIZON_SECONDS * 1000:
            self._prove(edge)
        if edge.body is not None and date_ms - answered_ms > FENCE_HORIZON_SECONDS * 1000:
            self._require_body(edge, edge.body)
        self._stored_last = (post, stored)
        self.on_head(post)
        if scanned:
            self._has_scanned(header, change.position)
        else:
            header.position = change.position
        self._record(header, edge, change.pgnos, change.hashes, date_ms, change.change_counter, [])
        self.on_logged(header.position)
        if background:
            self.view.postpone(header)
        else:
            self.view.put(header, change.pages(), guard=lambda: self.require_recent_head(header))

    def _has_scanned(self, header: IndexHeader, position: Position | None) -> None:
        """What was scanned, up to `position`, is stored."""
        if self._move(header, position):
            header.needs_scan = True
        else:
            header.needs_scan, header.successor = False, None
            self.index.identify(header, self.local.path)

    def _move(self, header: IndexHeader, position: Position | None) -> bool:
        """The header's position becomes `position`. Returns whether a seal tells that the WAL has gone on from there meanwhile.

        A seal speaks of the WAL that the position on the disk is in: once that is another, nobody can tell what the seal has witnessed.
        """
        seal = self.index.last_seal()
        if seal is None or seal.sequence <= header.seal_sequence or _salts(position) in (_salts(header.position), _salts(seal.after)):
            header.position = position
            return False  # there is none, or it is for the next load, or of before
        header.absorb(seal)
        if seal.after is not None:
            header.position = position
        return True

    def _record(
        self, header: IndexHeader, edge: Header, pgnos: Sequence[int], hashes: Sequence[int], date_ms: int, change_counter: int,
        noted: list[Intent],
    ) -> None:  # fmt: skip
        """The index follows an edge that is stored: page hashes first, then the header that counts on them. `noted` stays pending."""
        if edge.whole:
            position, needs_scan = header.position, header.needs_scan
            header.needs_scan = True
            self.index.save(header)  # killed while the old entries go: scan
            header.position, header.needs_scan = position, needs_scan
            reach("within record")
        self.index.pages.record(pgnos, hashes, edge.post)
        self.index.pages.remove(edge.db_size + 1, header.db_size, edge.post)
        reach("before header")
        header.txid, header.state = edge.post, edge.post_hash
        header.page_size, header.db_size = edge.page_size, edge.db_size
        header.change_counter = change_counter
        header.proved_ms = date_ms
        header.intents = noted
        self.index.save(header)

    def note_pending(self) -> None:
        """Note the state hash of what a close leaves pending: the next open knows by it that the file goes on from the head.

        Unlike the other methods it takes the index's lock itself.
        """
        with self.index.locked():
            header = self.header()
            if (header.txid or header.intents) and not self.held:
                state = local_state(self.local, None).state
                if state != header.state:
                    header.intents = [*header.intents[-(MAX_INTENTS - 1) :], Intent(state, 0)]
                    self.index.save(header)

    # --- attempts whose outcome is unknown, and rivals -----------------------------------------------------------------

    def settle(self) -> None:
        """Boot's look at an attempt whose outcome is unknown: adopted when it is stored and ours; a rival's is left to the policy."""
        header = self.index.load()
        if header is None or header.home != self.home or not header.intents:
            return
        if len(self.history.edges(since=header.txid)) > 1:
            return  # the history is further than this index: an old copy of it (a power loss), or a rival; no attempt is open
        found = self.history.segment(header.txid, header.txid + 1)
        if found is not None and self._is_own(header, found.header):
            self._adopt(header, found)

    @staticmethod
    def _is_own(header: IndexHeader, edge: Header) -> bool:
        # (The edge with which a log begins anew, from page objects alone, leads from nothing to the state that the header tells.)
        return edge.pre_hash == (header.state if edge.pre else 0) and Intent(edge.post_hash, edge.attempt) in header.intents

    def _stored(self, header: IndexHeader, pre: int, post: int) -> Segment:
        found = self.history.segment(pre, post)
        if found is None:
            raise ReplicationError(
                f"{keys.segment_key(self.history.name, pre, post)} was taken, and is not there",
                hint="Another program deletes objects of this history, or the store is not consistent. The commit stays pending.",
            )
        return found

    def _adopt(self, header: IndexHeader, found: Segment) -> None:
        """The stored edge is our own earlier attempt: the index follows it. Or it is a rival's: FencedError."""
        edge = found.header
        if not self._is_own(header, edge):
            self._fence(
                f"{found.name} was written by another writer ({edge.writer[:WRITER_ID_SIZE].hex()}): {self.local.path} is at txid "
                f"{header.txid}, and the history has gone on without it"
            )
        logger.info("%s: %s is our own, from an attempt whose answer was lost", self.local.path, found.name)
        self._prove(edge)  # when it was stored nobody knows: perhaps where the history had been pruned
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
        has_gone_on = self._move(header, position if known else None)
        header.needs_scan = header.needs_scan or not known or has_gone_on
        if known and not has_gone_on:
            header.successor = None  # the position tells; and what it covers, a power loss must not undo
        if edge.whole:
            header.view_size = UNKNOWN_SIZE
        pgnos, hashes = array("I"), array("Q")
        for pgno, known_hash in self.history.tables(found):
            pgnos.append(pgno)
            hashes.append(known_hash)
        # What was reached after it, locally, goes on from it.
        own = header.intents.index(Intent(edge.post_hash, edge.attempt))
        noted = [Intent(later.post_hash, 0) for later in header.intents[own + 1 :]]
        self._record(header, edge, pgnos, hashes, edge.time_ms, header.change_counter, noted)
        if known:
            self.on_logged(position)
        self.require_head(header)
        self.view.put(header, (page for block in self.history.blocks(found) for page in block))

    def require_head(self, header: IndexHeader) -> None:
        """Off the commit path no create-only write tells of a rival: before page objects are put or deleted there, look.

        Raises:
            FencedError: the history has gone on without this replica.
        """
        beyond = self.history.edges(since=header.txid)
        if len(beyond) == 1 and header.intents:
            found = self.history.segment(header.txid, header.txid + 1)
            if found is not None and self._is_own(header, found.header):
                return  # our own attempt, which the next batch adopts
        if beyond:
            self._fence(
                f"{self.local.path} is at txid {header.txid}, and another writer has gone on to {max(edge.post for edge in beyond)}"
            )

    def require_recent_head(self, header: IndexHeader) -> None:
        """As `require_head`, unless this process has just stored the head itself."""
        if not self.is_recent_head(header):
            self.require_head(header)

    def is_recent_head(self, header: IndexHeader) -> bool:
        """Has this process stored this state itself, just now? Who was stopped since then may have been overtaken."""
        txid, stored = self._stored_last
        return txid >= header.txid and time.monotonic() - stored <= _PAUSE_SECONDS

    def _require_body(self, edge: Header, body: Body) -> None:
        """We were stopped between the upload of a body and its segment: a body that nobody names is garbage after a while."""
        if self.history.store.read(keys.log_prefix(self.history.name) + body.name, 0, 1) is None:
            self._withdraw(edge)
            raise ReplicationError(
                f"commit {edge.post} of {self.local.path} is not stored: its pages, uploaded long ago, were deleted meanwhile",
                hint="It stays pending, and goes anew with the next commit, flush() or open.",
            )

    def _withdraw(self, edge: Header) -> None:
        """Deletes a segment of our own that nobody was told of."""
        self.history.forget(edge.pre, edge.post)
        self.history.store.delete([keys.segment_key(self.history.name, edge.pre, edge.post)])

    def _prove(self, edge: Header) -> None:
        """Nothing lies beyond the edge that we have stored: it was stored at the head, not where the history had been pruned.

        Raises:
            FencedError: something does. If nothing leads on from the edge itself, it is no part of the history, and is withdrawn.
        """
        beyond = self.history.edges(since=edge.post)
        if not beyond:
            return
        head = max(other.post for other in beyond)
        if any(self._leads_on(edge, other) for other in beyond if other.pre == edge.post):
            self._fence(f"{self.local.path} stored commit {edge.post}, and another writer has gone on from it, to txid {head}, since then")
        try:
            self._withdraw(edge)
        except StoreError as error:
            logger.error("%s: a stray commit stays in the log, where no restore follows it: %s", self.local.path, error.message)
        self._fence(
            f"{self.local.path} was away for too long: its commit {edge.post} was stored where the history, which is at txid {head} "
            f"by now, had been pruned"
        )

    def _leads_on(self, edge: Header, other: Edge) -> bool:
        try:
            header = self.history.header(other.pre, other.post)
        except CorruptionError as error:
            logger.warning("%s", error.message)
            return True  # nobody can tell any more
        return header is not None and header.pre_hash == edge.post_hash

    def _fence(self, message: str) -> None:
        self._fenced = FencedError(
            message,
            hint="This replica has stopped and overwrites nothing. Re-base it with "
            f"`bottomless-wal restore --force {shlex.quote(self.local.path)}`, or make it the "
            "truth by opening it with initial_replication=force.",
        )
        raise self._fenced

    # --- identity ------------------------------------------------------------------------------------------------------

    def _refresh_identity(self, header: IndexHeader, tip: Tip) -> None:
        """Follows the main file's change by checkpoints; a change that none explains was made behind our back: scan.

        A checkpoint writes first and tells afterwards: a change is suspect only when it has stayed unexplained for a while.
        """
        identity = Identity.of(self.local.path)
        if identity == header.identity:
            self._backfilled, self._suspect = tip[:3], None
            if not header.is_settled:
                self.index.identify(header, self.local.path)
            return
        if header.identity is not None and self._backfilled == tip[:3]:
            if self._suspect is None or self._suspect[0] != identity:
                self._suspect = (identity, time.monotonic())
                return
            if time.monotonic() - self._suspect[1] < _SUSPECT_SECONDS:
                return
            logger.warning("%s was changed by other means than SQLite: scanning", self.local.path)
            header.needs_scan = True
        if _was_cut(header, identity):
            # A checkpoint cuts the file only where the database has shrunk. Else pages were cut off that no frame may hold.
            logger.warning("%s is shorter than it was at txid %d: scanning", self.local.path, header.txid)
            header.needs_scan = True
        self._backfilled, self._suspect = tip[:3], None
        self.index.identify(header, self.local.path)
        self.index.save(header)
        if header.needs_scan:
            raise SnapshotLost("the main file was changed behind SQLite's back")


def _salts(position: Position | None) -> tuple[int, int] | None:
    return None if position is None else (position.salt1, position.salt2)


def _was_cut(header: IndexHeader, identity: Identity | None) -> bool:
    """Return whether the main file is shorter than it was, and than the database that the index knows."""
    if header.identity is None or identity is None:
        return False
    return identity.size < min(header.identity.size, header.db_size * header.page_size)
