"""SQLite's WAL bytes (https://sqlite.org/fileformat2.html, section 4), and a position in them. No I/O.

    WAL file = header | frame 1 | frame 2 | ...                 all integers big-endian, 32 bits

    offset  header (32 bytes)                       offset  frame header (24 bytes, then the page)
     0      magic 0x377f0682, or ...83 when the      0      page number
            checksums read big-endian words          4      of a commit: pages of the database after it; else 0
     4      version 3007000                          8      salt 1
     8      page size (65536 is written as such)    12      salt 2
    12      checkpoint sequence number              16      running checksum 1
    16      salt 1: +1 at each restart              20      running checksum 2
    20      salt 2: random at each restart
    24      checksum 1 of bytes 0..23               The running checksum goes on from the header's: over the first
    28      checksum 2                              8 bytes of each frame header and its page.

A frame whose salts and checksum are right is not therefore committed: only the wal-index knows that.
A position packs to 20 bytes: salt 1, salt 2, frame, checksum 1, checksum 2.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import islice
from typing import Final, NamedTuple

__all__ = [
    "FRAME_HEADER_SIZE",
    "HEADER_SIZE",
    "POSITION_SIZE",
    "FrameHeader",
    "WalHeader",
    "WalPosition",
    "checksum",
    "frame_offset",
]

HEADER_SIZE: Final = 32
FRAME_HEADER_SIZE: Final = 24
POSITION_SIZE: Final = 20

_MAGIC: Final = 0x377F0682
_VERSION: Final = 3007000
_HEADER: Final = struct.Struct(">8I")
_FRAME: Final = struct.Struct(">6I")
_POSITION: Final = struct.Struct(">5I")


@dataclass(frozen=True, slots=True, order=False)
class WalPosition:
    """A place in a WAL: everything up to and including `frame` (1-based; 0 is the bare header).

    `cks1` and `cks2` are the running checksum in that frame's header (frame 0: in the WAL's header). Equal positions
    mean equal content of the WAL up to there. All fields are unsigned 32-bit.
    """

    salt1: int
    salt2: int
    frame: int
    cks1: int
    cks2: int

    def pack(self) -> bytes:
        """20 bytes, big-endian."""
        return _POSITION.pack(self.salt1, self.salt2, self.frame, self.cks1, self.cks2)

    @classmethod
    def unpack(cls, data: bytes | memoryview) -> WalPosition:
        """The inverse of `pack`. struct.error unless `data` has exactly 20 bytes."""
        return cls(*_POSITION.unpack(data))


class WalHeader(NamedTuple):
    """The header of a WAL file."""

    magic: int
    big_endian: bool  # the byte order of the checksums' words, not of the fields
    page_size: int
    checkpoint_sequence: int
    salt1: int
    salt2: int
    cks1: int
    cks2: int

    @classmethod
    def parse(cls, data: bytes | memoryview) -> WalHeader | None:
        """The header in the first 32 bytes of `data`; None if there is no valid one (too short, magic, version, checksum)."""
        if len(data) < HEADER_SIZE:
            return None
        magic, version, page_size, sequence, salt1, salt2, cks1, cks2 = _HEADER.unpack_from(data)
        big_endian = bool(magic & 1)
        if magic & ~1 != _MAGIC or version != _VERSION or not _is_page_size(page_size):
            return None
        if checksum(data[:24], (0, 0), big_endian) != (cks1, cks2):
            return None
        return cls(magic, big_endian, page_size, sequence, salt1, salt2, cks1, cks2)

    def position(self) -> WalPosition:
        """The position of a WAL without frames."""
        return WalPosition(self.salt1, self.salt2, 0, self.cks1, self.cks2)


class FrameHeader(NamedTuple):
    """The header of one frame. `db_size` (pages) is not 0 in the last frame of a transaction."""

    pgno: int
    db_size: int
    salt1: int
    salt2: int
    cks1: int
    cks2: int

    @classmethod
    def parse(cls, data: bytes | memoryview) -> FrameHeader:
        """The header in the first 24 bytes of `data`. struct.error if it is shorter. Nothing is verified."""
        return cls._make(_FRAME.unpack_from(data))

    def position(self, frame: int) -> WalPosition:
        """The position that this header has as frame `frame` (1-based)."""
        return WalPosition(self.salt1, self.salt2, frame, self.cks1, self.cks2)


def frame_offset(frame: int, page_size: int) -> int:
    """Where the header of `frame` (1-based) stands in the file, in bytes; its page follows FRAME_HEADER_SIZE later."""
    return HEADER_SIZE + (frame - 1) * (FRAME_HEADER_SIZE + page_size)


def checksum(data: bytes | memoryview, seed: tuple[int, int], big_endian: bool) -> tuple[int, int]:
    """SQLite's WAL checksum of `data` (a multiple of 8 bytes, else ValueError), going on from `seed`.

    For a frame: over the first 8 bytes of its header, then its page; `seed` is the checksum before it.
    It costs 0.1 to 0.2 ms for a page of 4 KiB: compare recorded checksums where that is enough.
    """
    if len(data) % 8:
        raise ValueError(f"the checksum is over pairs of 32-bit words, not over {len(data)} bytes")
    words = struct.unpack(f"{'>' if big_endian else '<'}{len(data) // 4}I", data)
    s1, s2 = seed
    for even, odd in zip(islice(words, 0, None, 2), islice(words, 1, None, 2), strict=True):
        s1 = (s1 + even + s2) & 0xFFFFFFFF
        s2 = (s2 + odd + s1) & 0xFFFFFFFF
    return s1, s2


def _is_page_size(size: int) -> bool:
    return 512 <= size <= 65536 and size & (size - 1) == 0
