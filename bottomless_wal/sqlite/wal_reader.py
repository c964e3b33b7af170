"""Read the file `<db>-wal` beside SQLite, and find the last frame of each page.

SQLite takes no locks on the `-wal` file, so a descriptor of our own does no harm. The content is
valid only as far as the wal-index says. `database_reader` reads the wal-index.
"""

from __future__ import annotations

import contextlib
import os
from array import array
from typing import Final

from ..formats.wal import FRAME_HEADER_SIZE, HEADER_SIZE, FrameHeader, WalHeader, WalPosition, checksum, frame_offset

__all__ = ["FrameMap", "WalFile"]


class FrameMap:
    """Map page number -> its last frame, for the frames of one WAL up to `upto`.

    It is a dict while it is small. A dict costs a hundred bytes a page, so a large transaction
    uses an array indexed by page number.
    """

    _SMALL: Final = 65536

    def __init__(self, header: WalHeader) -> None:
        self.salts = (header.salt1, header.salt2)
        self.upto = 0
        self._dict: dict[int, int] = {}
        self._array: array[int] | None = None

    def add(self, pgno: int, frame: int) -> None:
        """Record that `frame` is the newest frame of page `pgno`."""
        if self._array is None:
            self._dict[pgno] = frame
            if len(self._dict) > self._SMALL:
                self._array = array("I", bytes(4 * (max(self._dict) + 1)))
                for known, at in self._dict.items():
                    self._array[known] = at
                self._dict = {}
            return
        if pgno >= len(self._array):
            self._array.frombytes(bytes(4 * (pgno + 1 - len(self._array) + 65536)))
        self._array[pgno] = frame

    def get(self, pgno: int) -> int:
        """Return the last frame of page `pgno`, or 0 if it has none."""
        if self._array is None:
            return self._dict.get(pgno, 0)
        return self._array[pgno] if pgno < len(self._array) else 0

    def pages(self, limit: int) -> array[int]:
        """Return the pages up to number `limit` that have a frame, ascending."""
        if self._array is None:
            return array("I", sorted(pgno for pgno in self._dict if pgno <= limit))
        return array("I", (pgno for pgno, at in enumerate(self._array) if at and pgno <= limit))


class WalFile:
    """Read the file that is at `<db>-wal` now.

    It has one descriptor, which is opened again when the file was replaced.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = -1
        self._parsed: tuple[bytes, WalHeader | None] = (b"", None)  # cached: read often, and seldom changed

    def header(self) -> WalHeader | None:
        """Return the header of the file that is at the path now.

        None: there is no file, or its header is not valid.
        """
        self._follow()
        data = self.read(HEADER_SIZE, 0)
        known, header = self._parsed
        if data != known:
            header = WalHeader.parse(data)
            self._parsed = (data, header)
        return header

    def read(self, length: int, offset: int) -> bytes:
        """Return bytes of the file last seen by `header`.

        Fewer bytes are returned at its end, and none without a file.
        """
        return os.pread(self._fd, length, offset) if self._fd >= 0 else b""

    def position(self, header: WalHeader, frame: int) -> WalPosition | None:
        """Return the position that `frame` records now.

        None: there is no frame of this WAL at that offset.
        """
        if frame == 0:
            return header.position()
        data = self.read(FRAME_HEADER_SIZE, frame_offset(frame, header.page_size))
        if len(data) < FRAME_HEADER_SIZE:
            return None
        found = FrameHeader.parse(data)
        return found.position(frame) if (found.salt1, found.salt2) == (header.salt1, header.salt2) else None

    def continues(self, position: WalPosition, header: WalHeader) -> bool:
        """Return whether the next frame continues the checksum of `position`."""
        start = frame_offset(position.frame + 1, header.page_size)
        data = self.read(FRAME_HEADER_SIZE + header.page_size, start)
        if len(data) < FRAME_HEADER_SIZE + header.page_size:
            return False
        found = FrameHeader.parse(data)
        if (found.salt1, found.salt2) != (header.salt1, header.salt2):
            return False
        seed = checksum(data[:8], (position.cks1, position.cks2), header.big_endian)
        return checksum(data[FRAME_HEADER_SIZE:], seed, header.big_endian) == (found.cks1, found.cks2)

    def _follow(self) -> None:
        try:
            there = os.stat(self.path)
        except FileNotFoundError:
            self.close()
            return
        if self._fd >= 0:
            mine = os.fstat(self._fd)
            if (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino):
                return
            self.close()
        with contextlib.suppress(FileNotFoundError):
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Close the descriptor. `header` opens the file again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
