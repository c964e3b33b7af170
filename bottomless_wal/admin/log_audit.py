"""Verify the log: each segment, whether segments contradict each other, and the chain of segments to the head.

`LogAudit` applies the page hashes of that chain to a table (`TableReplay`). After each segment they must give the state hash that the
segment states. Keys, heads and tables are enough for that. The pages themselves are decoded only with `deep`.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Final

from ..core import pool
from ..core.errors import CorruptionError
from ..formats import keys
from ..formats.segment import SegmentHeader
from ..history.log import Head
from ..history.page_table import TableReplay
from ..history.planner import plan, reachable
from ..history.restore import Progress
from ..history.retention import oldest_promised
from ..history.segment_list import SegmentInfo
from ..history.timeline import ranges
from .problems import Problem, ProblemKind
from .stored_database import StoredDatabase

__all__ = ["LogAudit"]

_READ_AHEAD: Final = 48 << 20
_FRESH_SECONDS: Final = 5.0


class LogAudit:
    """Verify the segments of one history. The findings are in `problems` and `notes`.

    `txid` is the head's, `restorable` the highest txid that sound segments lead to. `chain` is the chain to the head, if there is one;
    `hashes` has the page hashes of its end.
    """

    def __init__(self, target: StoredDatabase, hashes: TableReplay, *, deep: bool, progress: Progress | None) -> None:
        self.target = target
        self.history = target.history
        self.hashes = hashes
        self.deep = deep
        self.progress = progress
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self.segments = self.bodies = self.txid = self.restorable = 0
        self.chain: list[SegmentInfo] = []
        self._made = 0.0
        self._resets: set[tuple[int, int]] = set()
        self.told: Head | None = None  # the head as its own segment states it

    def run(self) -> Head | None:
        """Verify the log. Return the head; None if no chain of sound segments leads to it.

        Raises:
            StoreError: the bucket is missing or cannot be reached.
        """
        edges = self.history.edges()
        self.segments = len(edges)
        if not edges:
            return None
        self.txid = last = max(edge.post for edge in edges)
        sound = self._sound(edges)
        self._find_gaps(edges, sound)
        self._find_holes(edges, sound)
        while (chain := plan(sound, last) or self._from_a_reset(sound, last)) is not None:
            misfit = self._follow(chain)
            if misfit is None:
                self.chain, self.restorable = chain, last
                return self._head()
            sound.remove(misfit)
        self.restorable = max(reachable(sound))
        database = shlex.quote(self.target.path or self.target.name)
        can = f"txid {self.restorable} can (`bottomless-wal restore --txid {self.restorable} {database} -o PATH`)"
        self.notes.append(
            f"the head cannot be restored from the log, {can if self.restorable else 'no state can'}; "
            "page objects and local file were not compared"
        )
        return None

    def _from_a_reset(self, sound: Sequence[SegmentInfo], last: int) -> list[SegmentInfo] | None:
        """Return a chain that begins with a reset, which needs nothing before it; None without one."""
        resets = self.history.resets(sound, width=self.target.config.concurrency)
        return plan(sound, last, wholes={(edge.pre, edge.post) for edge in resets}) if resets else None

    def advance(self) -> Head:
        """Return the head as it is now, and update `hashes` and `chain`: writers may have added segments since `run`."""
        edges = self.history.edges(since=self.txid)
        for edge in plan(edges, max((edge.post for edge in edges), default=self.txid), start=self.txid) or []:
            if self._apply(edge) is not None:
                self._follow(self.chain)  # back to what was sound
                break
            self.chain.append(edge)
            self.txid = self.restorable = edge.post
        return self._head()

    def fresh(self) -> bool:
        """Return whether the head was stored within the last seconds, by the server's clock."""
        return self.target.store.now() - self._made < _FRESH_SECONDS

    def _head(self) -> Head:
        return Head(self.txid, self.hashes.state_hash, self.hashes.page_size, self.hashes.db_size)

    def _problem(self, kind: ProblemKind, key: str, message: str) -> None:
        if not any(known.object == key and known.kind == kind for known in self.problems):
            self.problems.append(Problem(kind, key, message))

    # --- each segment by itself, and all of them together ---------------------------------------------------------------

    def _sound(self, edges: Sequence[SegmentInfo]) -> list[SegmentInfo]:
        prefix = keys.log_prefix(self.history.name)
        stored = {
            entry.key.removeprefix(prefix): entry.size
            for entry in self.target.store.list(keys.body_prefix(self.history.name))
            if keys.parse_body_key(self.history.name, entry.key) is not None
        }
        self.bodies = len(stored)
        named: set[str] = set()
        sound: list[SegmentInfo] = []
        states: dict[int, tuple[int, str]] = {0: (0, "")}
        width = self.target.config.concurrency
        if self.deep:
            width = max(1, min(width, _READ_AHEAD // (max(edge.size for edge in edges) + 1)))
        for at, (edge, header) in enumerate(zip(edges, pool.ordered(self._load, edges, width), strict=True), 1):
            if self.progress is not None:
                self.progress(at, len(edges))
            key = keys.segment_key(self.history.name, edge.pre, edge.post)
            if header is None:
                continue  # retention has deleted it since it was listed
            if isinstance(header, CorruptionError):
                damaged = header.key or key  # an error about a body names the body
                is_body = keys.parse_body_key(self.history.name, damaged) is not None
                self._problem(ProblemKind.BODY if is_body else ProblemKind.CORRUPT, damaged, header.reason)
                continue
            if header.body is not None:
                named.add(header.body.name)
                if stored.get(header.body.name) != header.body.size:
                    found = stored.get(header.body.name)
                    what = "is missing" if found is None else f"is {found} bytes long, not {header.body.size}"
                    self._problem(ProblemKind.BODY, prefix + header.body.name, f"{what}: it holds the pages of {key}")
                    continue
            if edge.post == self.txid:
                self.told = Head(header.post, header.post_hash, header.page_size, header.db_size)
            if self._agrees(header, key, states):
                sound.append(edge)
                if header.reset:
                    self._resets.add(edge[:2])
        if orphans := stored.keys() - named:
            self.notes.append(f"{len(orphans)} bodies that no sound segment names (uploads cut off; retention removes them)")
        return sound

    def _load(self, edge: SegmentInfo) -> SegmentHeader | CorruptionError | None:
        try:
            if not self.deep:
                return self.history.header(edge.pre, edge.post)
            found = self.history.segment(edge.pre, edge.post)
            if found is None:
                return None
            for _ in self.history.blocks(found, width=2):
                pass
            return found.header
        except CorruptionError as error:
            return error

    def _agrees(self, header: SegmentHeader, key: str, states: dict[int, tuple[int, str]]) -> bool:
        told = {header.pre: header.pre_hash, **{commit.txid: commit.post for commit in header.commits}}
        for txid, state in told.items():
            known, by = states.get(txid, (state, ""))
            if known != state:
                self._problem(
                    ProblemKind.CONTRADICTION,
                    key,
                    f"says that txid {txid} has the state {state:016x}; {by or 'every history'} says {known:016x}",
                )
                return False
        for txid, state in told.items():
            states.setdefault(txid, (state, key))
        return True

    def _find_gaps(self, edges: Sequence[SegmentInfo], sound: Sequence[SegmentInfo]) -> None:
        """Report where no sound segment leads on. Segments that exist and are not sound are reported already."""
        last = self.txid
        reached = max(reachable(sound))
        while reached < last:
            beyond = [edge.pre for edge in sound if edge.pre > reached]
            resumed = min(beyond, default=last)
            if not any(edge.pre == reached for edge in edges):
                until = f"; the next segment begins at txid {resumed}" if beyond else ""
                self._problem(
                    ProblemKind.GAP,
                    keys.segment_key(self.history.name, reached, reached + 1),
                    f"is missing: nothing leads on from txid {reached}{until}",
                )
            reached = max(reachable(sound, start=resumed))

    def _find_holes(self, edges: Sequence[SegmentInfo], sound: Sequence[SegmentInfo]) -> None:
        """Report commits that `retention` promises and that are missing, although a longer segment leads past them to the head."""
        config = self.target.config
        oldest = oldest_promised(edges, now=self.target.store.now(), retention=config.retention)
        base = max((edge.post for edge in sound if edge.pre == 0 and edge.post <= oldest), default=1)
        begins = [edge._replace(pre=0) for edge in sound if edge[:2] in self._resets]
        within = {txid for txid in reachable(sorted([*sound, *begins])) if txid >= base}
        if self.txid not in within:
            return  # `_find_gaps` has reported it
        passed = [txid for txid in range(base, self.txid) if txid not in within]
        unsound = {edge[:2] for edge in edges} - {edge[:2] for edge in sound} if passed else set()
        begun = {pre for pre, _ in unsound}  # those are reported already
        for first, last in ranges(passed):
            if first - 1 not in begun:
                which = f"txid {first}" if first == last else f"txids {first} to {last}"
                self._problem(
                    ProblemKind.GAP,
                    keys.segment_key(self.history.name, first - 1, first),
                    f"is missing: {which} cannot be restored, though no older than retention={config.retention:g}; what follows can",
                )

    # --- the way to the head --------------------------------------------------------------------------------------------

    def _follow(self, chain: list[SegmentInfo]) -> SegmentInfo | None:
        """Apply the page hashes of `chain`. Return the first edge that is not sound or does not lead where it says; None: all are sound."""
        self.hashes.clear()
        for edge in chain:
            wrong = self._apply(edge)
            if wrong is not None:
                self._problem(*wrong)
                return edge
        return None

    def _apply(self, edge: SegmentInfo) -> tuple[ProblemKind, str, str] | None:
        key = keys.segment_key(self.history.name, edge.pre, edge.post)
        before = self.hashes.state_hash
        try:
            found = self.history.segment(edge.pre, edge.post)
            if found is None:
                return ProblemKind.GAP, key, "vanished while the history was verified"
            if not found.header.whole and found.header.pre_hash != before:
                return ProblemKind.CORRUPT, key, f"does not follow the state {before:016x}"
            self.hashes.apply(found.name, found.header, self.history.tables(found))
        except CorruptionError as error:
            return ProblemKind.CORRUPT, error.key or key, error.reason
        self._made = found.header.commits[-1].time_ms / 1000
        if self.hashes.state_hash != found.header.post_hash:
            return (
                ProblemKind.CORRUPT,
                key,
                f"leads to the state {self.hashes.state_hash:016x}, not to {found.header.post_hash:016x} as it says",
            )
        return None
