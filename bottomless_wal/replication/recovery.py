"""Opening a database: where does the local state stand in the remote history? Git's fast-forward logic.

What there is leads to what is done by the table of `decision`.

Invariants: everything happens under the local index's lock; a bucket that cannot be reached is an error, never an empty bucket; whatever
fails leaves local file and bucket as they were; a file is replaced only by a verified one, and only when nobody has it open.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator, Sequence
from typing import Final

import apsw

from ..core.errors import BottomlessError, ConflictError, CorruptionError, ReplicationError, RestoreError, StoreError
from ..core.failpoints import reach
from ..core.logs import get_logger
from ..formats import keys
from ..history.log import Head
from ..history.page_table import IndexCorrupt
from ..history.planner import leading_to, newest
from ..history.restore import Progress, Rebuilt, rebuild, rebuild_from_pages
from ..history.scratch import Scratch, scratch
from ..history.segment_list import Edge
from ..sqlite.database_reader import SnapshotLost
from ..sqlite.replace import aside, nobody_else, open_elsewhere, put_in_place
from .index import Backlog, Identity, IndexHeader, boot_id
from .index_rebuild import learn, learn_locally
from .lineage import LocalState, Place, Relation, earlier_txid, local_state, relate
from .log_check import find_gap
from .page_objects import UNKNOWN_SIZE
from .recovery_plan import POLICY, Action, Remote, decide
from .replicator import Replicator
from .wal_position import Standing, standing

__all__ = ["Boot"]

logger = get_logger(__name__)

_LOOKS: Final = 10
_LISTED: Final = 1000  # objects, which one request lists, and in which the whole of a short log is seen


class Boot:
    """Brings one local file and its history together. Every method expects the index of `replicator` to be locked."""

    def __init__(self, replicator: Replicator, *, policy: str, progress: Progress | None = None) -> None:
        self.replicator = replicator
        self.local = replicator.local
        self.index = replicator.index
        self.history = replicator.history
        self.policy = policy
        self.progress = progress
        self.action: Action | None = None
        self.identity: Identity | None = None
        self._listed_ms = 0  # when the head was seen to be the head
        self.listed: Sequence[Edge] | None = None
        """All segments of the log, as this open has found them; None while they are not listed, or too many to be listed at a resume."""
        self._distrusted = False  # the index: it was found damaged

    @property
    def goes_on(self) -> bool:
        """Return whether the log goes on from a head whose way nobody has looked at: not restored, and not stored, by this open."""
        return self.action in (Action.RESUME, Action.CATCH_UP, Action.KEEP_LOCAL)

    def run(self, *, reset: bool = False) -> IndexHeader:
        """Looks, decides and acts (`_run`), and looks again when other processes changed the WAL meanwhile."""
        for _ in range(_LOOKS):
            try:
                return self._run(reset=reset)
            except SnapshotLost as lost:
                logger.info("%s: %s: looking again", self.local.path, lost)
            except IndexCorrupt as lost:
                logger.warning("%s: looking at the database itself", lost)
                self._distrusted = True
            except (apsw.NotADBError, apsw.CorruptError) as error:
                what = "not an SQLite database" if isinstance(error, apsw.NotADBError) else "a damaged SQLite database"
                raise CorruptionError(
                    f"{self.local.path} is {what}: {error}",
                    hint="Open the right file, or move this one away: with nothing at the path, the state in the bucket is restored.",
                ) from error
        raise ReplicationError(f"{self.local.path} kept changing while it was opened", hint="Open it again.")

    def _run(self, *, reset: bool) -> IndexHeader:
        """Carries out the table's row. `reset`: make the local file the head, whatever the relation (never an empty one).

        Raises:
            ConflictError: the policy is `error` and the local file is no state of the history; or it has to be replaced and is open.
            RestoreError: the head cannot be restored. The local file may be an earlier state of the history, from which nothing leads on.
            StoreError, CorruptionError: nothing was changed.
        """
        path = self.local.path
        self.identity = Identity.of(path)
        empty = not os.path.exists(path) or os.path.getsize(path) == 0
        if not empty:
            self.replicator.fencing.resolve_in_doubt()
        known = None if empty else self._known_header()
        if known is not None and not reset:
            head = self._still_head(known)
            if head:
                self.action = Action.RESUME
                return self._resume(known)
        edges = self.history.edges()
        self.listed, self._listed_ms = edges, edges.listed_ms
        head_state = self.history.head(edges)
        if head_state is None:
            # A missing bucket must not pass for an empty one.
            remote = Remote.PAGES if empty and self._has_pages() else Remote.NOTHING
        else:
            remote = Remote.HISTORY
        if reset and not empty and head_state is not None:
            self.action = Action.RESET
            return self._reset(head_state)
        local: LocalState | None = None
        place: Place | None = None
        if not empty and head_state is not None:
            local = local_state(self.local, known)
            place = relate(
                local, head_state, edges, self.local, self.index, self.history,
                home=self.replicator.home, width=self.replicator.config.concurrency,
            )  # fmt: skip
            if place.relation is Relation.UNKNOWN and self._restarted_since(local):
                raise SnapshotLost("its WAL was restarted while its place in the history was looked for")
        self.action = decide(empty, remote, place.relation if place is not None else None, self.policy)
        logger.info("%s: %s", path, self.action.name.lower().replace("_", " "))
        if self.action is Action.START:
            return self._start()
        if self.action is Action.RESTORE_PAGES:
            return self._restore_pages()
        if self.action is Action.INITIAL:
            self._say_what_is_gone()
            return self._initial()
        if head_state is None:
            raise AssertionError("every other action needs a history")
        if self.action is Action.RESTORE:
            return self._restore(head_state, edges)
        if local is None or place is None:
            raise AssertionError("every other action needs a local state")
        if self.action is Action.FAST_FORWARD:
            return self._fast_forward(local, place.txid, head_state, edges)
        if self.action in (Action.RESUME, Action.CATCH_UP):
            try:
                return self._catch_up(local, head_state, edges)
            except ConflictError:
                # It is not a descendant after all.
                leading = leading_to(edges, head_state.txid)
                txid = earlier_txid(local, leading, self.history, self.replicator.config.concurrency)
                if txid is not None:
                    self.action = Action.FAST_FORWARD
                    return self._fast_forward(local, txid, head_state, edges)
                self.action = POLICY[self.policy]
                if self.action is Action.CONFLICT:
                    raise
        if self.action is Action.RESET:
            return self._reset(head_state)
        if self.action is Action.KEEP_LOCAL:
            return self._keep_local(head_state, edges)
        raise self._conflict(local, head_state, edges)

    def _say_what_is_gone(self) -> None:
        """The bucket holds no history where the index knows one: somebody has deleted it, or an expiry rule has."""
        before = self.index.load()
        if before is not None and before.home == self.replicator.home and before.txid:
            logger.error(
                "the log of %s, which was at txid %d, is gone from %s: it begins anew with the local file",
                self.local.path,
                before.txid,
                self.history.store.describe(),
            )

    # --- what is known without a scan ----------------------------------------------------------------------------------

    def _known_header(self) -> IndexHeader | None:
        """The index's header, if it can be believed without a scan."""
        header = self.index.load()
        if header is None or header.home != self.replicator.home or header.needs_scan or header.txid == 0 or self._distrusted:
            return None
        if not header.identifies(self.local.path) or not (header.clean or header.boot == boot_id()):
            return None
        if self.index.pages.state_hash(header.db_size) != header.state:
            logger.warning("%s is damaged: it will be made anew", self.index.path)
            return None
        with self.local.pinned():
            tip = self.local.tip()
            found = standing(self.local, header, tip)
        if header.position is not None and tip.frames < header.position.frame:
            return None  # a WAL that was cut, until a scan says otherwise
        return header if found in (Standing.COVERED, Standing.FRAMES) else None

    def _still_head(self, header: IndexHeader) -> bool:
        """Is the index's state the head? Two small requests: the head's own commit edge is never deleted."""
        edges, is_complete = self.history.some_edges(limit=_LISTED)
        if is_complete:
            self.listed = edges
        else:
            edges = list(self.history.edges(since=header.txid - 1))
        if any(edge.post > header.txid for edge in edges) or not edges:
            return False
        head = self.history.head(edges)
        return head == (header.txid, header.state, header.page_size, header.db_size)

    def _restarted_since(self, found: LocalState) -> bool:
        """Another process commits, and restarts the WAL, without asking for our lock: then no position proves anything."""
        wal, position = self.local.wal.header(), found.position
        if wal is None or position is None:
            return (wal is None) != (position is None)
        return (wal.salt1, wal.salt2) != (position.salt1, position.salt2)

    def _has_pages(self) -> bool:
        name = self.history.name
        return any(keys.parse_page_key(name, e.key) is not None for e in self.history.store.list(keys.page_prefix(name)))

    def _convert(self) -> None:
        """A rollback-journal database becomes a WAL one. Only once it is decided that the local file stays."""
        self.local.close()
        with self._plain() as connection:
            if connection.execute("PRAGMA journal_mode").get == "wal":
                return
            reach("before conversion")
            if connection.execute("PRAGMA journal_mode=wal").get != "wal":
                raise ConflictError(
                    f"{self.local.path} cannot be switched to WAL mode",
                    hint="Another program has it open, or its file system has no shared memory. Close it and open again.",
                )
            reach("after conversion")

    @contextlib.contextmanager
    def _plain(self) -> Iterator[apsw.Connection]:
        connection = self.local.connect_plain()
        try:
            yield connection
        finally:
            connection.close()

    # --- the actions ---------------------------------------------------------------------------------------------------

    def _opened(self, header: IndexHeader) -> IndexHeader:
        """From here on the database is in use, and only a clean close says otherwise."""
        header.boot, header.clean = boot_id(), False
        self.index.save(header)
        return header

    def _start(self) -> IndexHeader:
        # Files beside an empty one are SQLite's to judge: another process may be making it a database right now.
        if not os.path.exists(self.local.path):
            aside(self.local.path)
        self.replicator.held = True
        return self._opened(self.replicator.fresh())

    def _resume(self, header: IndexHeader) -> IndexHeader:
        self._opened(header)
        return self.replicator.batch()

    def _initial(self) -> IndexHeader:
        self._convert()
        before = self.index.load()
        if before is not None and before.home == self.replicator.home and before.txid and before.identity is None and before.needs_scan:
            return self._begin_at(before)  # a restore from page objects alone was cut off
        header = self.replicator.fresh()
        self.replicator.upload_initial(header)
        return self._opened(header)

    def _catch_up(self, local: LocalState, head: Head, edges: Sequence[Edge]) -> IndexHeader:
        self._convert()
        header = self.index.load()
        if (
            header is not None
            and header.home == self.replicator.home
            and head == (header.txid, header.state, header.page_size, header.db_size)
        ):
            header.needs_scan = True
            self._opened(header)
            try:
                return self.replicator.batch()
            except IndexCorrupt as lost:
                logger.warning("%s: %s", self.local.path, lost)
        return self._take_over(local, head, edges)

    def _reset(self, head: Head) -> IndexHeader:
        reach("before reset")
        self._convert()
        header = self.replicator.fresh()
        header.txid, header.state = head.txid, head.state
        header.page_size, header.db_size = head.page_size, 0
        header.needs_scan = True
        # No identity: should this die half-way, the file must not pass for a descendant of the head.
        self.replicator.upload_reset(header)
        return self._opened(header)

    def _keep_local(self, head: Head, edges: Sequence[Edge]) -> IndexHeader:
        """The index takes the head's hashes; the next commit then carries every page that differs."""
        logger.warning(
            "%s diverged from its history (txid %d): kept as it is; the next commit carries every difference (initial_replication=skip)",
            self.local.path,
            head.txid,
        )
        self._convert()
        self.replicator.held = True
        header = self.replicator.fresh()
        self._learn(header, head, edges)
        header.needs_scan = True
        # No identity: until a commit has made it so, the file is no descendant of the head, and the policy is asked again.
        return self._opened(header)

    def _take_over(self, local: LocalState, head: Head, edges: Sequence[Edge]) -> IndexHeader:
        """The local file is, or descends from, the head, and the index was lost or stale: it is made anew."""
        before = self.index.load()
        header = self.replicator.unknown()
        # Killed, or cut off from the store, before the entries are there: this header keeps the file's descent, and asks for them.
        header.txid, header.state, header.page_size, header.db_size = head
        self.index.identify(header, self.local.path)
        if before is not None and before.home != header.home:
            before = None
        header.position = before.position if before is not None and before.txid <= head.txid else None
        if before is None and local.state != head.state:
            # It descends by its WAL, which begins with the head's frames: what differs has a frame beyond them.
            last = self.history.header(*newest(edges)[:2])
            header.position = last.positions[-1] if last is not None and last.positions else None
        header.change_counter = min(local.change_counter, before.change_counter) if before is not None else local.change_counter
        header.needs_scan = True
        self.index.save(header)
        self.index.pages.clear()
        reach("after clear")
        if local.state == head.state:
            learn_locally(self.local, self.history, self.index, header, head, edges)
            header.proved_ms = self._listed_ms
        else:
            self._learn(header, head, edges)
        header.needs_scan = True  # finds the position, and the difference if there is one
        header.change_counter = local.change_counter
        self.index.identify(header, self.local.path)
        self.replicator.upload_difference(header)
        return self._opened(header)

    def _learn(self, header: IndexHeader, head: Head, edges: Sequence[Edge]) -> None:
        learn(self.history, self.index, header, head, edges, width=self.replicator.config.concurrency)
        header.proved_ms = self._listed_ms

    def _fast_forward(self, local: LocalState, txid: int | None, head: Head, edges: Sequence[Edge]) -> IndexHeader:
        """Replace the local file, which is at `txid` (None: a fast-forward was cut off, so it is not known), by the head."""
        # By its hash the index now says that this is an earlier state (see `placing`): the place in the WAL, which may be all that told
        # it, goes before the file does.
        self.local.close()
        with nobody_else(self.local.path):
            pass  # a process that has it open needs the index as it is
        header = self.replicator.unknown()
        header.state, header.needs_scan = local.state, True
        self.index.save(header)
        self.index.pages.clear()
        # The main file must be whole by itself before its WAL goes: a crash in between leaves an earlier state, not a torn one.
        with self._plain() as connection:
            connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 0)
            connection.execute("PRAGMA schema_version").fetchall()  # one that has never read checkpoints nothing
            try:
                connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
            except apsw.BusyError as error:
                raise open_elsewhere(self.local.path) from error
        reach("after fold")
        self.identity = Identity.of(self.local.path)
        place = f"txid {txid}" if txid is not None else f"state {local.state:016x}"
        header = self._restore(head, edges, header, place)
        logger.warning(
            "%s was at %s, an earlier state of its history: moved forward to the head, txid %d", self.local.path, place, head.txid
        )
        return header

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody has the file open, and it is still what it was when the decision was made."""
        self.local.close()
        with nobody_else(self.local.path):
            if Identity.of(self.local.path) != self.identity:
                raise SnapshotLost(f"{self.local.path} was written to meanwhile")
            yield

    def _restore(self, head: Head, edges: Sequence[Edge], header: IndexHeader | None = None, place: str = "") -> IndexHeader:
        """Put the head in place of the local file, which is at `place` if it is not empty."""
        width, path = self.replicator.config.concurrency, shlex.quote(self.local.path)
        with self._alone(), scratch(self.local.path, self.index.pages) as into:
            header = header or self.replicator.fresh()
            try:
                rebuilt = rebuild(self.history, into, head.txid, edges, width=width, progress=self.progress, arguments=path)
            except RestoreError as error:
                if place:
                    raise self._cut_off(place, error) from error
                raise
            return self._put_in_place(into, rebuilt, header)

    def _restore_pages(self) -> IndexHeader:
        with self._alone(), scratch(self.local.path, self.index.pages) as into:
            header = self.replicator.fresh()
            rebuilt = rebuild_from_pages(self.history, into, width=self.replicator.config.concurrency, progress=self.progress)
            if rebuilt is None:
                raise StoreError(f"the page objects of {self.history.name!r} vanished while they were looked at", hint="Try again.")
            # No identity: should this die before the log begins anew, the next open lets it begin, at this very txid.
            header.txid, header.state, header.needs_scan = rebuilt.txid, rebuilt.state, True
            self.index.save(header)
            self.local.close()
            put_in_place(into.path, into.fd, self.local.path)
        self._begin_at(header)
        header.view_txid, header.backlog = header.txid, None
        return self._opened(header)

    def _begin_at(self, header: IndexHeader) -> IndexHeader:
        """The log begins anew with the snapshot edge 0 -> txid of `header`, so that the line of txids goes on."""
        self.replicator.upload_rebased(header)
        return self._opened(header)

    def _put_in_place(self, into: Scratch, rebuilt: Rebuilt, header: IndexHeader) -> IndexHeader:
        path = self.local.path
        self.local.close()
        made = os.fstat(into.fd)
        put_in_place(into.path, into.fd, path)
        header.txid, header.state = rebuilt.txid, rebuilt.state
        header.page_size, header.db_size = rebuilt.page_size, rebuilt.db_size
        header.view_txid = min(rebuilt.view_txid, rebuilt.txid)
        header.view_size = UNKNOWN_SIZE
        header.position, header.needs_scan = None, False
        header.proved_ms = self._listed_ms
        self.index.identify(header, path)
        # Until a connection reads, another program can write to it and leave no trace but in its timestamps.
        is_untouched = header.identity is not None and header.identity[1:4] == (
            made.st_ino,
            rebuilt.page_size * rebuilt.db_size,
            made.st_mtime_ns,
        )
        header.needs_scan = not (is_untouched and header.is_settled)
        header.change_counter = int.from_bytes(os.pread(into.fd, 4, 24), "big")
        if header.backlog is None and header.view_txid < header.txid and self.replicator.config.pages == "commit":
            header.backlog = Backlog(header.view_txid, header.txid, 1)
            header.view_txid = header.txid
        logger.info("%s: restored at txid %d (%d pages)", path, header.txid, header.db_size)
        return self._opened(header)

    def _cut_off(self, place: str, cause: RestoreError) -> RestoreError:
        path = shlex.quote(self.local.path)
        return RestoreError(
            f"{self.local.path} is at {place} of its history and cannot be moved forward to the head: {cause.message.rstrip('.')}. "
            "Its content was not changed",
            hint=f"Make the local file the head: `bottomless-wal reset --from-local {path}`. "
            f"`bottomless-wal ls {path}` shows the states that can be restored before.",
        )

    def _conflict(self, local: LocalState, head: Head, edges: Sequence[Edge]) -> BottomlessError:
        gap = find_gap(self.history, is_thorough=False)
        if gap is not None:
            # No edge before the gap leads on to the head, so `relate` has not looked there.
            txid = earlier_txid(local, reversed(edges), self.history, self.replicator.config.concurrency)
            if txid is not None:
                return self._cut_off(f"txid {txid}", gap)
        return ConflictError(
            f"{self.local.path} (state {local.state:016x}, {local.db_size} pages) is no state of the history of {self.history.name!r} "
            f"in {self.history.store.describe()} (head: txid {head.txid}, state {head.state:016x}, {head.db_size} pages). "
            "Nothing was changed",
            hint="To go on from the remote history: move the local file away, or `bottomless-wal restore --force "
            f"{shlex.quote(self.local.path)}`. To make the local file the truth, because another program has written to it meanwhile: "
            f"`bottomless-wal reset --from-local {shlex.quote(self.local.path)}`, or open it with initial_replication=force (a reset at "
            "once) or skip (at the next commit).",
        )
