"""Compare the index's position with the present WAL.

A position is used only if it is proved.

It is proved if the WAL in the file has its salts, and the frame that it names still has its
checksum. A WAL that was restarted, cut or replaced proves nothing, unless a *WAL reset record*
carried the position across.

The record is written by the connection that is about to write a new WAL header, or to truncate or
delete the WAL. That connection holds SQLite's write lock, and everything was checkpointed to the
main file. The record shows whether the position covered all of the old WAL
(`write_wal_reset_record`). In all other cases the database is scanned.
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
    """How the index's position relates to the present WAL."""

    CURRENT = auto()
    BEHIND = auto()  # proved, and frames follow it
    RETRY = auto()  # a WAL header is being written: read again
    INVALID = auto()  # not proved: scan


def position_status(local: LocalDatabase, header: IndexHeader, tip: WalState) -> PositionStatus:
    """Return whether the index's position is proved in the present WAL.

    Call it within a read transaction.
    """
    if header.needs_scan:
        return PositionStatus.INVALID
    position, wal = header.position, tip.header
    if local.wal.header() != wal:
        return PositionStatus.RETRY
    if wal is None:
        if position is None:
            # Without a WAL the main file holds everything, and only its identity can prove that it
            # is unchanged. The identity need not be settled: since the open checked it, an own
            # connection has the file open, and all writes go to the WAL.
            return PositionStatus.CURRENT if Identity.of(local.path) == header.identity is not None else PositionStatus.INVALID
        return PositionStatus.RETRY if position.frame == 0 else PositionStatus.INVALID
    if position is None:
        return PositionStatus.INVALID
    if (position.salt1, position.salt2) != (wal.salt1, wal.salt2):
        return PositionStatus.RETRY if position.frame == 0 and tip.frames == 0 else PositionStatus.INVALID
    if tip.frames < position.frame:
        # 0 frames: a restart has begun, and its header is not written yet.
        # Some, but fewer: the WAL was cut by a power loss.
        covered = tip.frames == 0 and not local.wal.continues(position, wal)
        return PositionStatus.CURRENT if covered else PositionStatus.INVALID
    if local.wal.position(wal, position.frame) != position:
        return PositionStatus.INVALID
    return PositionStatus.CURRENT if tip.frames == position.frame else PositionStatus.BEHIND


def position_of(local: LocalDatabase, tip: WalState) -> WalPosition | None:
    """Return the position of a snapshot at `tip`.

    Call it within a read transaction.

    Raises:
        SnapshotInvalidated: the last frame is not in the WAL any more.
    """
    wal = tip.header
    if wal is None:
        return None
    found = local.wal.position(wal, tip.frames)
    if found is None:
        raise SnapshotInvalidated(f"frame {tip.frames} of the WAL of {local.path} is gone")
    return found


def write_wal_reset_record(index_path: str, path: str, new: WalHeader | None) -> None:
    """Record whether the index's position survives a restart of the WAL.

    The WAL is about to lose its frames.

    The caller holds SQLite's write lock, and everything committed is in the main file. No other
    lock is taken, so this never waits for an upload.

    The position is carried across only if it has the salts of the header still in the file, and no
    frame there continues it. The identity of the main file is carried across with it: nothing
    writes to that file between here and the next commit. A batch that runs meanwhile may have
    covered more. The next batch then scans without need.

    Args:
        index_path: the index.
        path: the main file.
        new: the new WAL header, which is about to be written; None if the WAL is truncated or
            deleted.
    """
    wal = WalFile(path + "-wal")

    def judge(header: IndexHeader, identity: Identity | None) -> tuple[WalPosition | None, bool, bool] | None:
        old = wal.header()
        if new is not None and old is not None and (new.salt1, new.salt2) == (old.salt1, old.salt2):
            return None  # the same WAL again: its first transaction was rolled back
        position = header.position
        if old is None:
            covered = position is None and header.identity == identity is not None
        elif position is None or (position.salt1, position.salt2) != (old.salt1, old.salt2):
            covered = False
        else:
            covered = wal.position(old, position.frame) == position and not wal.continues(position, old)
        if not covered and not header.needs_scan:
            logger.info("the WAL of %s is restarted before all of it is stored: a scan is needed", path)
        # Compare with the last WAL that the index recorded. Salts alone prove nothing, because
        # SQLite may draw them at random for any new WAL.
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
