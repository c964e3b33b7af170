"""The local index: what of this database is already in the log, kept in `<db>-bottomless` beside it.

Like SQLite's `-shm` it is only a cache: when it is missing, stale, dirty or damaged, one scan of the database rebuilds it.
Its file is also the replicator's lock between processes (`flock`, which belongs to an open file description, so that two
threads must still exclude each other by a mutex). All numbers are big-endian:

    offset  size  field
         0     8  magic "BWALIDX1"
         8     4  flags: 1 needs scan, 2 closed cleanly, 4 the WAL is gone, 8 identity known
        12     4  page size in bytes, 0 before the first commit
        16    16  home: hash of the endpoint, the bucket and the database's name in it
        32    16  writer id, for messages only
        48    16  boot id of the machine
        64     8  txid
        72     8  state hash
        80     4  database size in pages
        84     4  change counter of page 1
        88     8  view txid: the page objects of every commit up to here were put ...
        96    20  ... except those of a backlog: pages of commits in (from, to], from the cursor on (u64, u64, u32)
       116     4  view size: no page object beyond this number exists
       120     8  milliseconds since 1970, the server's, at which txid was last proved to be the head
       128    20  WAL position (wal.Position)
       148    40  identity of the main file: device, inode, size, mtime_ns, ctime_ns
       188     4  number of intents
       192    8n  intents: post hashes under which txid + 1 may have been put
             4  CRC-32 of everything before
     16384  16 a page  entries, page 1 first: u64 page hash, u64 txid of the last change

Invariants:

* Entries are written before the header that counts on them. A crash between the two leaves entries of txid + 1 under a
  header of txid with intents: the stored segment is then adopted, which writes them again.
* Whoever reads or writes holds the lock. Plain pread and pwrite: a truncated mapping would kill the process.
* Nothing here is needed for correctness, and so nothing is synced but at a clean close: after a power loss the boot id differs.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import sys
import threading
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from .wal import Position

__all__ = ["ENTRY_SIZE", "HEADER_SIZE", "MAX_INTENTS", "Backlog", "Identity", "IndexHeader", "LocalIndex", "boot_id"]

MAGIC: Final = b"BWALIDX1"
HEADER_SIZE: Final = 16384
ENTRY_SIZE: Final = 16
_FIXED: Final = struct.Struct(">8sII16s16s16sQQIIQQQIIQ20sQQQQQI")
MAX_INTENTS: Final = (HEADER_SIZE - _FIXED.size - 4) // 8
_NEEDS_SCAN, _CLEAN, _GONE, _IDENTITY = 1, 2, 4, 8
_NO_POSITION: Final = bytes(20)
_LONGEST_RUN: Final = 65536


class Identity(NamedTuple):
    """What `stat` says of the main file; any change behind our back changes it."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, path: str) -> Identity | None:
        """The identity of the file at `path`, or None when there is none."""
        try:
            st = os.stat(path)
        except FileNotFoundError:
            return None
        return cls(st.st_dev, st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns)


class Backlog(NamedTuple):
    """Page objects still to be put: of pages last changed by commits in (after, upto], page `cursor` and beyond."""

    after: int
    upto: int
    cursor: int


@dataclass(slots=True)
class IndexHeader:
    """The index's header, as a value. `position` None: there is no WAL, the main file holds everything."""

    home: bytes
    writer: bytes
    boot: bytes
    page_size: int = 0
    txid: int = 0
    state: int = 0
    db_size: int = 0
    change_counter: int = 0
    view_txid: int = 0
    backlog: Backlog | None = None
    view_size: int = 0
    proved_ms: int = 0
    position: Position | None = None
    needs_scan: bool = False
    clean: bool = False
    identity: Identity | None = None
    intents: list[int] = field(default_factory=list)

    @property
    def view_complete(self) -> int:
        """The txid up to which the page view holds everything."""
        return self.view_txid if self.backlog is None else min(self.view_txid, self.backlog.after)

    def encode(self) -> bytes:
        """The header's bytes, at most HEADER_SIZE."""
        flags = (
            self.needs_scan * _NEEDS_SCAN
            | self.clean * _CLEAN
            | (self.position is None) * _GONE
            | (self.identity is not None) * _IDENTITY
        )
        fixed = _FIXED.pack(
            MAGIC,
            flags,
            self.page_size,
            self.home,
            self.writer,
            self.boot,
            self.txid,
            self.state,
            self.db_size,
            self.change_counter,
            self.view_txid,
            *(self.backlog or (0, 0, 0)),
            self.view_size,
            self.proved_ms,
            self.position.pack() if self.position else _NO_POSITION,
            *(self.identity or (0, 0, 0, 0, 0)),
            len(self.intents),
        )
        body = fixed + struct.pack(f">{len(self.intents)}Q", *self.intents)
        return body + struct.pack(">I", zlib.crc32(body))

    @classmethod
    def decode(cls, data: bytes) -> IndexHeader | None:
        """The inverse of `encode`; None for anything that it did not write."""
        if len(data) < _FIXED.size + 4 or not data.startswith(MAGIC):
            return None
        (
            _magic,
            flags,
            page_size,
            home,
            writer,
            boot,
            txid,
            state,
            db_size,
            change_counter,
            view_txid,
            after,
            upto,
            cursor,
            view_size,
            proved_ms,
            position,
            *identity,
            intents,
        ) = _FIXED.unpack_from(data)
        end = _FIXED.size + 8 * intents
        if intents > MAX_INTENTS or len(data) < end + 4:
            return None
        if zlib.crc32(data[:end]) != struct.unpack_from(">I", data, end)[0]:
            return None
        return cls(
            home=home,
            writer=writer,
            boot=boot,
            page_size=page_size,
            txid=txid,
            state=state,
            db_size=db_size,
            change_counter=change_counter,
            view_txid=view_txid,
            backlog=Backlog(after, upto, cursor) if upto else None,
            view_size=view_size,
            proved_ms=proved_ms,
            position=None if flags & _GONE else Position.unpack(position),
            needs_scan=bool(flags & _NEEDS_SCAN),
            clean=bool(flags & _CLEAN),
            identity=Identity(*identity) if flags & _IDENTITY else None,
            intents=list(struct.unpack_from(f">{intents}Q", data, _FIXED.size)),
        )


def boot_id() -> bytes:
    """16 bytes that change when the machine restarts; zeros where the system does not tell."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return bytes.fromhex(file.read().strip().replace("-", ""))
    except (OSError, ValueError):
        return bytes(16)


class LocalIndex:
    """The file `<db>-bottomless`: lock, header and entries.

    `path` is the index's own path. The file is created when first locked, with the permissions of the database beside it.
    Every method but `locked` expects the lock to be held. Raises OSError as the system does.
    """

    def __init__(self, path: str, *, beside: str) -> None:
        self.path = path
        self._beside = beside
        self._fd = -1
        self._mutex = threading.Lock()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the lock: threads of this object by a mutex, other processes and objects by `flock`. Not re-entrant."""
        with self._mutex:
            while True:
                if self._fd < 0:
                    self._fd = self._open()
                fcntl.flock(self._fd, fcntl.LOCK_EX)
                if self._still_there():
                    break
                # Somebody deleted or replaced the file: a lock on the old one excludes nobody.
                self._drop()
            try:
                yield
            finally:
                fcntl.flock(self._fd, fcntl.LOCK_UN)

    def load(self) -> IndexHeader | None:
        """The header, or None when the file is empty or damaged."""
        return IndexHeader.decode(os.pread(self._fd, HEADER_SIZE, 0))

    def save(self, header: IndexHeader) -> None:
        """Writes the header in one write: a killed process leaves the old one or the new one."""
        data = header.encode()
        if os.pwrite(self._fd, data, 0) != len(data):
            raise OSError(f"short write to {self.path}")

    def entries(self, first: int, count: int) -> tuple[Sequence[int], Sequence[int]]:
        """(page hashes, txids) of `count` pages from page `first` on; zeros for pages that were never written."""
        data = os.pread(self._fd, count * ENTRY_SIZE, HEADER_SIZE + (first - 1) * ENTRY_SIZE)
        numbers = _big_endian(array("Q", data[: len(data) // 8 * 8]))
        numbers.extend([0] * (2 * count - len(numbers)))
        return numbers[0::2], numbers[1::2]

    def hashes(self, pgnos: Sequence[int]) -> list[int]:
        """The page hashes of `pgnos` (ascending), read in runs."""
        found: list[int] = []
        for start, stop in _runs(pgnos):
            found.extend(self.entries(pgnos[start], stop - start)[0])
        return found

    def record(self, pgnos: Sequence[int], hashes: Sequence[int], txid: int) -> None:
        """Writes the entries of `pgnos` (ascending), all changed by `txid`."""
        for start, stop in _runs(pgnos):
            numbers = array("Q", bytes(16 * (stop - start)))
            numbers[0::2] = array("Q", hashes[start:stop])
            numbers[1::2] = array("Q", [txid]) * (stop - start)
            data = memoryview(_big_endian(numbers)).cast("B")
            if os.pwrite(self._fd, data, HEADER_SIZE + (pgnos[start] - 1) * ENTRY_SIZE) != len(data):
                raise OSError(f"short write to {self.path}")

    def clear(self) -> None:
        """Forgets everything: the next look at the database is a scan."""
        os.ftruncate(self._fd, 0)

    def sync(self) -> None:
        """Makes what was written durable."""
        os.fsync(self._fd)

    def close(self) -> None:
        """Gives the descriptor back; a later `locked` opens the file again."""
        with self._mutex:
            self._drop()

    def abandon(self) -> None:
        """For the child of a fork: drops the descriptor without unlocking, for the lock is the parent's too."""
        self._mutex = threading.Lock()
        self._drop()

    def _open(self) -> int:
        try:
            mode = os.stat(self._beside).st_mode & 0o777
        except FileNotFoundError:
            mode = 0o644
        return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, mode)

    def _still_there(self) -> bool:
        mine = os.fstat(self._fd)
        try:
            there = os.stat(self.path)
        except FileNotFoundError:
            return False
        return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)

    def _drop(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _big_endian(numbers: array[int]) -> array[int]:
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers


def _runs(pgnos: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Half-open ranges of positions in `pgnos` whose numbers follow each other, cut to a bounded length."""
    start = 0
    for at in range(1, len(pgnos) + 1):
        if at == len(pgnos) or pgnos[at] != pgnos[at - 1] + 1 or at - start == _LONGEST_RUN:
            yield start, at
            start = at
