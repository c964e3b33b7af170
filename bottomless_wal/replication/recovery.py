"""Open a database: bring the local file and the remote history together.

As with Git's fast-forward, the relation of the two decides. `recovery_plan` has the table of
actions, and `recovery_actions` carries them out.

Invariants:

* Everything happens under the local index's lock.
* A bucket that cannot be reached is an error. It never counts as an empty bucket.
* A failure leaves the local file and the bucket as they were.
* A file is replaced only by a verified file, and only when no process has it open.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

import apsw

from ..core.errors import BottomlessError, ConflictError, CorruptionError, FencedError, ReplicationError
from ..core.logs import get_logger
from ..formats import keys
from ..history.page_table import IndexCorrupt
from ..history.planner import segments_reaching
from ..history.restore import Progress
from ..history.segment_list import SegmentInfo
from ..sqlite.snapshot_reader import SnapshotInvalidated
from .index import Identity, IndexHeader, IndexState, boot_id
from .lineage import Lineage, LocalState, Place, classify, earlier_txid, local_state
from .log_check import find_gap
from .recovery_actions import Actions, Situation, cut_off
from .recovery_plan import POLICY, Action, Remote, decide
from .replicator import Replicator
from .wal_position import PositionStatus, position_status

__all__ = ["Recovery"]

logger = get_logger(__name__)

_LOOKS: Final = 10
_LISTED: Final = 1000  # objects that one request lists; a short log is listed completely


class Recovery:
    """Recovery at open of one database.

    The caller must hold the lock of the index of `replicator`.
    """

    def __init__(self, replicator: Replicator, *, policy: str, progress: Progress | None = None) -> None:
        self.replicator = replicator
        self.local = replicator.local
        self.index = replicator.index
        self.history = replicator.history
        self.policy = policy
        self._actions = Actions(replicator, progress)
        self.action: Action | None = None
        self.listed: Sequence[SegmentInfo] | None = None
        """All segments of the log, as this open has listed them.

        None before they are listed, or if a resume has found too many to list.
        """
        self._distrusted = False  # the index was found damaged

    @property
    def goes_on(self) -> bool:
        """Return whether the log continues from a head that this open has not checked.

        The segments that lead to the head were not checked.

        This open has neither restored the head nor stored the whole database.
        """
        return self.action in (Action.RESUME, Action.CATCH_UP, Action.KEEP_LOCAL)

    def run(self, *, reset: bool = False) -> IndexHeader:
        """Run the recovery.

        Runs `_run` again if other processes changed the WAL meanwhile.
        """
        for _ in range(_LOOKS):
            try:
                return self._run(reset=reset)
            except SnapshotInvalidated as lost:
                logger.info("%s: %s: looking again", self.local.path, lost)
            except FencedError as error:
                if not self.replicator.fencing.forgive_unchanged():
                    raise
                logger.info("%s: looking again: %s", self.local.path, error.reason)
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
        """Carry out the row of the table that applies.

        Args:
            reset: make the local file the head, whatever its relation to the history. Never done
                with an empty file.

        Raises:
            ConflictError: the policy is `error` and the local file is not a state of the history.
            ConflictError: the local file must be replaced, and a process has it open.
            RestoreError: the head cannot be restored. No segments may lead from the local file's
                state to it.
            StoreError, CorruptionError: nothing was changed.
        """
        path = self.local.path
        identity = Identity.of(path)
        empty = not os.path.exists(path) or os.path.getsize(path) == 0
        if not empty:
            self.replicator.fencing.resolve_in_doubt()
        known = None if empty else self._known_header()
        if known is not None and not reset and self._still_head(known):
            self.action = Action.RESUME
            return self._actions.resume(known)
        found = self._look(identity)
        if reset and not empty and found.known_head is not None:
            self.action = Action.RESET
            return self._actions.reset(found)
        if not empty and found.known_head is not None:
            found = self._place(found, known)
        self.action = decide(empty, self._remote(found, empty), found.place.relation if found.place is not None else None, self.policy)
        logger.info("%s: %s", path, self.action.name.lower().replace("_", " "))
        return self._act(found)

    def _look(self, identity: Identity | None) -> Situation:
        """List the log and read its head."""
        edges = self.history.edges()
        self.listed = edges
        return Situation(identity, edges, edges.listed_ms, self.history.head(edges))

    def _remote(self, found: Situation, empty: bool) -> Remote:
        if found.known_head is not None:
            return Remote.HISTORY
        # Listing the page objects fails if the bucket is missing. It must not pass for an empty
        # one.
        return Remote.PAGES if empty and self._has_pages() else Remote.NOTHING

    def _place(self, found: Situation, known: IndexHeader | None) -> Situation:
        """Classify the local state against the history."""
        local = local_state(self.local, known)
        place = classify(
            local, found.head, found.edges, self.local, self.index, self.history,
            remote_id=self.replicator.remote_id, width=self.replicator.config.concurrency,
        )  # fmt: skip
        if place.relation is Lineage.DIVERGED and self._restarted_since(local):
            raise SnapshotInvalidated("its WAL was restarted while its place in the history was looked for")
        return replace(found, known_local=local, place=place)

    def _act(self, found: Situation) -> IndexHeader:
        """Carry out `action`."""
        actions = self._actions
        handlers: dict[Action, Callable[[Situation], IndexHeader]] = {
            Action.CREATE: actions.start,
            Action.RESTORE: actions.restore,
            Action.RESTORE_PAGES: actions.restore_pages,
            Action.INITIAL_UPLOAD: actions.initial,
            Action.RESUME: self._catch_up,
            Action.FAST_FORWARD: actions.fast_forward,
            Action.CATCH_UP: self._catch_up,
            Action.CONFLICT: self._refuse,
            Action.RESET: actions.reset,
            Action.KEEP_LOCAL: actions.keep_local,
        }
        if self.action is None:
            raise AssertionError("nothing was decided")
        return handlers[self.action](found)

    def _catch_up(self, found: Situation) -> IndexHeader:
        try:
            return self._actions.catch_up(found)
        except ConflictError:
            # A page changed that has no frame in the WAL: the local file does not come from the
            # head after all.
            leading = segments_reaching(found.edges, found.head.txid)
            txid = earlier_txid(found.local, leading, self.history, self.replicator.config.concurrency)
            if txid is not None:
                self.action = Action.FAST_FORWARD
                return self._act(replace(found, place=Place(Lineage.BEHIND, txid)))
            self.action = POLICY[self.policy]
            if self.action is Action.CONFLICT:
                raise
        return self._act(found)

    def _refuse(self, found: Situation) -> IndexHeader:
        raise self._conflict(found)

    # --- what is known without a scan ----------------------------------------------------------------------------------

    def _known_header(self) -> IndexHeader | None:
        """Return the index's header if it is proved without a scan; None otherwise."""
        header = self.index.load()
        if (
            header is None
            or header.remote_id != self.replicator.remote_id
            or header.index_state is not IndexState.IN_STEP
            or self._distrusted
        ):
            return None
        if not header.identifies(self.local.path) or not (header.clean or header.boot == boot_id()):
            return None
        if self.index.pages.state_hash(header.db_size) != header.state:
            logger.warning("%s is damaged: it will be made anew", self.index.path)
            return None
        with self.local.read_transaction():
            tip = self.local.tip()
            found = position_status(self.local, header, tip)
        if header.position is not None and tip.frames < header.position.frame:
            return None  # the WAL may have been cut by a power loss: scan
        return header if found in (PositionStatus.CURRENT, PositionStatus.BEHIND) else None

    def _still_head(self, header: IndexHeader) -> bool:
        """Return whether the index's state is the head.

        This takes two small requests, because the commit segment of the head is never deleted.
        """
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
        """Return whether another process has restarted the WAL since `found` was read.

        Such a process does not take the index's lock. After a restart no position proves anything.
        """
        wal, position = self.local.wal.header(), found.position
        if wal is None or position is None:
            return (wal is None) != (position is None)
        return (wal.salt1, wal.salt2) != (position.salt1, position.salt2)

    def _has_pages(self) -> bool:
        name = self.history.name
        return any(keys.parse_page_key(name, e.key) is not None for e in self.history.store.list(keys.page_prefix(name)))

    def _conflict(self, found: Situation) -> BottomlessError:
        local, head = found.local, found.head
        gap = find_gap(self.history, is_thorough=False)
        if gap is not None:
            # No segment before the gap leads to the head, so `classify` has not searched those.
            txid = earlier_txid(local, reversed(found.edges), self.history, self.replicator.config.concurrency)
            if txid is not None:
                return cut_off(self.local.path, f"txid {txid}", gap)
        return ConflictError(
            f"{self.local.path} (state {local.state:016x}, {local.db_size} pages) is no state of the history of {self.history.name!r} "
            f"in {self.history.store.describe()} (head: txid {head.txid}, state {head.state:016x}, {head.db_size} pages). "
            "Nothing was changed",
            hint="To go on from the remote history: move the local file away, or `bottomless-wal restore --force "
            f"{shlex.quote(self.local.path)}`. To make the local file the truth, because another program has written to it meanwhile: "
            f"`bottomless-wal reset --from-local {shlex.quote(self.local.path)}`, or open it with initial_replication=force (a reset at "
            "once) or skip (at the next commit).",
        )
