"""How the index's position stands to the WAL that is there: a position is believed only if it proves itself.

It does, if the WAL in the file has its salts and the frame it names still carries its checksum. A WAL that was restarted, cut or replaced
proves nothing, unless a *seal* carried the position across: whoever is about to write a new WAL header, or to truncate or
delete the WAL, holds SQLite's write lock, and has had everything copied to the main file; it leaves in the index whether the position
covered all of the old WAL (`seal`). Everything else is scanned.
"""

from __future__ import annotations

from enum import Enum, auto

from ..core.failpoints import failpoint
from ..core.logs import get_logger
from ..formats.wal import WalHeader, WalPosition
from ..sqlite.database_reader import LocalDatabase
from ..sqlite.snapshot_reader import SnapshotInvalidated, WalState
from ..sqlite.wal_reader import WalFile
from .index import Identity, IndexHeader, LocalIndex

__all__ = ["PositionStatus", "position_of", "position_status", "write_wal_reset_record"]

logger = get_logger(__name__)


class PositionStatus(Enum):
    """How the index's position relates to the WAL that is there."""

    CURRENT = auto()
    BEHIND = auto()  # it is proved, and frames follow it
    RETRY = auto()  # a WAL header is just being written: look again
    INVALID = auto()  # it proves nothing: scan


def position_status(local: LocalDatabase, header: IndexHeader, tip: WalState) -> PositionStatus:
    """Does the index's position prove itself in the WAL that is there? Call it pinned."""
    if header.needs_scan:
        return PositionStatus.INVALID
    position, wal = header.position, tip.header
    if local.wal.header() != wal:
        return PositionStatus.RETRY
    if wal is None:
        if position is None:
            # Without a WAL the main file is all there is, and what it was is all that proves it. (Settled or not: since the open looked,
            # a connection of ours has it open, and nobody writes past the WAL.)
            return PositionStatus.CURRENT if Identity.of(local.path) == header.identity is not None else PositionStatus.INVALID
        return PositionStatus.RETRY if position.frame == 0 else PositionStatus.INVALID
    if position is None:
        return PositionStatus.INVALID
    if (position.salt1, position.salt2) != (wal.salt1, wal.salt2):
        return PositionStatus.RETRY if position.frame == 0 and tip.frames == 0 else PositionStatus.INVALID
    if tip.frames < position.frame:
        # 0: a restart has begun, and its header is not written yet. Fewer, but some: the WAL was cut by a power loss.
        covered = tip.frames == 0 and not local.wal.continues(position, wal)
        return PositionStatus.CURRENT if covered else PositionStatus.INVALID
    if local.wal.position(wal, position.frame) != position:
        return PositionStatus.INVALID
    return PositionStatus.CURRENT if tip.frames == position.frame else PositionStatus.BEHIND


def position_of(local: LocalDatabase, tip: WalState) -> WalPosition | None:
    """The position that a snapshot at `tip` has. Call it pinned."""
    wal = tip.header
    if wal is None:
        return None
    found = local.wal.position(wal, tip.frames)
    if found is None:
        raise SnapshotInvalidated(f"frame {tip.frames} of the WAL of {local.path} is gone")
    return found


def write_wal_reset_record(index_path: str, path: str, new: WalHeader | None) -> None:
    """The WAL is about to lose its frames: leaves behind whether the index's position can be carried across.

    Called with SQLite's write lock held, before a new WAL header is written (`new`), or the WAL is truncated or deleted (None). By then
    everything that was committed is in the main file. It waits for no lock, so for no upload. The position goes across only if it
    has the salts of the header still in the file and no frame there continues it, and with it the identity of the main file, which
    nobody writes to between here and the next commit; a batch that is under way meanwhile
    may have covered more, and the next one then scans for nothing.
    """
    wal = WalFile(path + "-wal")

    def judge(header: IndexHeader, identity: Identity | None) -> tuple[WalPosition | None, bool, bool] | None:
        old = wal.header()
        if new is not None and old is not None and (new.salt1, new.salt2) == (old.salt1, old.salt2):
            return None  # the same WAL once more: its first transaction was rolled back
        position = header.position
        if old is None:
            covered = position is None and header.identity == identity is not None
        elif position is None or (position.salt1, position.salt2) != (old.salt1, old.salt2):
            covered = False
        else:
            covered = wal.position(old, position.frame) == position and not wal.continues(position, old)
        if not covered and not header.needs_scan:
            logger.info("the WAL of %s is restarted before all of it is stored: a scan is needed", path)
        # What the index last knew of: salts say nothing by themselves, for SQLite may draw them at random for any new WAL.
        last = header.successor or position
        known = None if last is None else (last.salt1, last.salt2)
        is_witnessed = known == (None if old is None else (old.salt1, old.salt2))
        return (new.position() if new is not None else None), covered, is_witnessed

    failpoint("before seal")
    try:
        LocalIndex.write_reset_record(index_path, path, judge, is_last=new is None)
    finally:
        wal.close()
    failpoint("after seal")
