"""Read the pages of one snapshot of the local database: from its WAL and its main file.

Rules:

* Never read past the wal-index: a frame with the right salts and checksum may have been rolled back.
* The main file is read through a file object of the base VFS, which shares SQLite's POSIX locks. Closing any other descriptor of it would
  drop all locks of the process. The `-wal` file carries no locks and is read with `pread`.
* A page of a snapshot is its last frame at or below the committed end, else what the main file holds. While a read transaction is held, no
  checkpoint writes a later frame of the page into the main file.
"""

from __future__ import annotations

import shlex
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

import apsw

from ..core.errors import CorruptionError
from ..formats.page import lock_page
from ..formats.wal import FRAME_HEADER_SIZE, FrameHeader, WalHeader, frame_offset
from .wal_reader import FrameMap, WalFile

__all__ = ["DatabaseShape", "SnapshotInvalidated", "SnapshotReader", "WalState"]

_READ_BYTES: Final = 256 * 1024
_BASE_VFS: Final = ""  # the default VFS below ours


class SnapshotInvalidated(Exception):
    """The WAL was restarted, cut or replaced under the reader: what was read is worth nothing, look again."""


class WalState(NamedTuple):
    """The end of the WAL: the header that stands in the file (None: no WAL, or an empty one), the committed frames, and how
    many of them checkpoints have copied to the main file."""

    header: WalHeader | None
    frames: int
    backfilled: int


class DatabaseShape(NamedTuple):
    """Page size in bytes, database size in pages, and page 1's change counter."""

    page_size: int
    db_size: int
    change_counter: int


class SnapshotReader:
    """Read pages of the database at `path` (resolved). `wal` is its `-wal` file."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.wal = WalFile(path + "-wal")
        self._main: apsw.VFSFile | None = None
        self._map: FrameMap | None = None

    # --- frames --------------------------------------------------------------------------------------------------------

    def frame_headers(self, header: WalHeader, first: int, last: int) -> Iterator[tuple[int, FrameHeader]]:
        """(frame, its header) from `first` to `last`, both included.

        Raises:
            SnapshotInvalidated: a frame in the range is not of this WAL (any more).
        """
        step = FRAME_HEADER_SIZE + header.page_size
        # Small pages are read through together; of large ones only the headers.
        together = max(1, _READ_BYTES // step) if step <= 8192 else 1
        frame = first
        while frame <= last:
            count = min(together, last - frame + 1)
            length = (count - 1) * step + FRAME_HEADER_SIZE
            data = self.wal.read(length, frame_offset(frame, header.page_size))
            if len(data) < length:
                raise SnapshotInvalidated(f"the WAL of {self.path} ends before frame {frame + count - 1}")
            for at in range(count):
                found = FrameHeader._make(struct.unpack_from(">6I", data, at * step))
                if (found.salt1, found.salt2) != (header.salt1, header.salt2):
                    raise SnapshotInvalidated(f"frame {frame + at} of the WAL of {self.path} is of another WAL")
                yield frame + at, found
            frame += count

    def frame_map(self, header: WalHeader, upto: int) -> FrameMap:
        """The map of the frames 1..upto, kept from call to call and extended. Raises SnapshotInvalidated."""
        known = self._map
        if known is None or known.salts != (header.salt1, header.salt2) or known.upto > upto:
            known = self._map = FrameMap(header)
        for frame, found in self.frame_headers(header, known.upto + 1, upto):
            known.add(found.pgno, frame)
            known.upto = frame
        return known

    def frame_page(self, header: WalHeader, frame: int) -> bytes:
        """The page in frame `frame`. Raises SnapshotInvalidated when the file is shorter."""
        offset = frame_offset(frame, header.page_size) + FRAME_HEADER_SIZE
        data = self.wal.read(header.page_size, offset)
        if len(data) != header.page_size:
            raise SnapshotInvalidated(f"the WAL of {self.path} ends within frame {frame}")
        return data

    def unchanged(self, header: WalHeader) -> bool:
        """Does this very header still stand in the file? A restart writes the header before any frame: if it stands after a
        read, everything read was of its WAL."""
        return self.wal.header() == header

    # --- whole snapshots -----------------------------------------------------------------------------------------------

    def shape(self, tip: WalState) -> DatabaseShape:
        """Page size, size and change counter of the snapshot `tip`. Call it pinned.

        Raises:
            CorruptionError: the main file is no SQLite database, or shorter than its header says.
            SnapshotInvalidated: see `frame_headers`.
        """
        first = self.page(tip, 1, None)
        if first is None or len(first) < 100 or not first.startswith(b"SQLite format 3\0"):
            raise CorruptionError.about(
                self.path, "is not an SQLite database", joint=" ", hint="Open the right file, or move this one away.", path=self.path
            )
        page_size = 65536 if first[16:18] == b"\0\1" else int.from_bytes(first[16:18], "big")
        counter, stated = struct.unpack_from(">II", first, 24)
        if tip.frames and tip.header is not None:
            _, commit = next(iter(self.frame_headers(tip.header, tip.frames, tip.frames)))
            return DatabaseShape(tip.header.page_size, commit.db_size, counter)
        actual = self._main_file().xFileSize() // page_size
        if stated == 0 or counter != struct.unpack_from(">I", first, 92)[0]:
            stated = actual  # a writer older than SQLite 3.7 left the size in the header behind
        if actual < stated:
            raise CorruptionError.about(
                self.path,
                f"is cut short: {actual} pages of the {stated} that its header tells",
                joint=" ",
                path=self.path,
                expected=stated,
                actual=actual,
                hint=f"Restore it: `bottomless-wal restore --force {shlex.quote(self.path)}`.",
            )
        return DatabaseShape(page_size, stated, counter)

    def page(self, tip: WalState, pgno: int, page_size: int | None) -> bytes | None:
        """One page of the snapshot; None past the end of the file. `page_size` None: as its WAL or page 1 says."""
        if tip.header is not None and tip.frames:
            frame = self.frame_map(tip.header, tip.frames).get(pgno)
            if frame:
                return self.frame_page(tip.header, frame)
        main = self._main_file()
        if page_size is None:
            head = main.xRead(100, 0) if main.xFileSize() >= 100 else b""
            if len(head) < 100:
                return None
            page_size = 65536 if head[16:18] == b"\0\1" else int.from_bytes(head[16:18], "big")
            if page_size < 512 or page_size & (page_size - 1):
                return None
        if main.xFileSize() < pgno * page_size:
            return None
        return self._read_main(page_size, (pgno - 1) * page_size)

    def pages(self, tip: WalState, shape: DatabaseShape) -> Iterator[tuple[int, bytes]]:
        """Every (pgno, page) of the snapshot, ascending, but the lock-byte page. Call it pinned.

        Raises:
            CorruptionError: a page is in neither place.
            SnapshotInvalidated: the WAL was restarted meanwhile.
        """
        frames = self.frame_map(tip.header, tip.frames) if tip.header is not None and tip.frames else None
        main = self._main_file()
        main_pages = main.xFileSize() // shape.page_size
        skipped = lock_page(shape.page_size)
        together = max(1, _READ_BYTES // shape.page_size)
        for start in range(1, shape.db_size + 1, together):
            stop = min(start + together, shape.db_size + 1)
            length = (min(stop - 1, main_pages) - start + 1) * shape.page_size
            block = self._read_main(length, (start - 1) * shape.page_size) if length > 0 else b""
            for pgno in range(start, stop):
                if pgno == skipped:
                    continue
                frame = frames.get(pgno) if frames is not None else 0
                if frame and tip.header is not None:
                    yield pgno, self.frame_page(tip.header, frame)
                elif pgno <= main_pages:
                    yield pgno, block[(pgno - start) * shape.page_size : (pgno - start + 1) * shape.page_size]
                else:
                    raise CorruptionError(
                        f"page {pgno} of {self.path} is neither in the file nor in its WAL",
                        hint=f"Restore it: `bottomless-wal restore --force {shlex.quote(self.path)}`.",
                    )

    def _main_file(self) -> apsw.VFSFile:
        if self._main is None:
            self._main = apsw.VFSFile(_BASE_VFS, self.path, [apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_MAIN_DB, 0])
        return self._main

    def _read_main(self, length: int, offset: int) -> bytes:
        return self._main_file().xRead(length, offset)

    def _detach(self) -> apsw.VFSFile | None:
        """Forget the frames that were read, and hand the main file to the caller, which closes it."""
        self._map = None
        main, self._main = self._main, None
        return main
