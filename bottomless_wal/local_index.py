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
       188     8  sequence number of the last seal that this header takes into account
       196     4  number of intents
       200    8n  intents: post hashes under which txid + 1 may have been put
             4  CRC-32 of everything before
     15872    52  the seal: sequence u64, flags u32 (1 covered, 2 from gone, 4 to gone, 8 from anywhere), salts u32 u32,
                  position 20, CRC-32
     16384  16 a page  entries, page 1 first: u64 page hash, u64 txid of the last change

Invariants:

* Entries are written before the header that counts on them. A crash between the two leaves entries of txid + 1 under a
  header of txid with intents: the stored segment is then adopted, which writes them again.
* Whoever reads or writes holds the lock; but for the *seal*, which a WAL restart leaves behind while it holds SQLite's write lock,
  and that lock alone: it must never wait for an upload. Plain pread and pwrite: a truncated mapping would kill the process.
* Nothing here is needed for correctness, and so nothing is synced but at a clean close: after a power loss the boot id differs.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import operator
import os
import struct
import sys
import threading
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeVar

from .wal import Position

__all__ = ["ENTRY_SIZE", "HEADER_SIZE", "MAX_INTENTS", "Backlog", "Identity", "IndexHeader", "LocalIndex", "Seal", "boot_id"]

MAGIC: Final = b"BWALIDX1"
HEADER_SIZE: Final = 16384
ENTRY_SIZE: Final = 16
SEAL_OFFSET: Final = 15872
_FIXED: Final = struct.Struct(">8sII16s16s16sQQIIQQQIIQ20sQQQQQQI")
_SEAL: Final = struct.Struct(">QIII20s")
MAX_INTENTS: Final = (SEAL_OFFSET - _FIXED.size - 4) // 8
_NEEDS_SCAN, _CLEAN, _GONE, _IDENTITY = 1, 2, 4, 8
_NO_POSITION: Final = bytes(20)
_LONGEST_RUN: Final = 65536

R = TypeVar("R")


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


class Seal(NamedTuple):
    """What a restart of the WAL leaves behind: the WAL with the salts `before` ended, and `after` is the position in what follows.

    `covered`: the position that the index had then covered all of that WAL. `before` None: there was no WAL; `after` None: there is none now.
    `anywhere`: whatever the index's position was, it proves nothing any more.
    """

    sequence: int
    before: tuple[int, int] | None
    after: Position | None
    covered: bool
    anywhere: bool = False

    def encode(self) -> bytes:
        """The record's bytes."""
        flags = self.covered | (self.before is None) << 1 | (self.after is None) << 2 | self.anywhere << 3
        body = _SEAL.pack(self.sequence, flags, *(self.before or (0, 0)), self.after.pack() if self.after else _NO_POSITION)
        return body + struct.pack(">I", zlib.crc32(body))

    @classmethod
    def decode(cls, data: bytes) -> Seal | None:
        """The inverse; None for anything that `encode` did not write."""
        if len(data) != _SEAL.size + 4 or zlib.crc32(data[:-4]) != struct.unpack_from(">I", data, _SEAL.size)[0]:
            return None
        sequence, flags, salt1, salt2, position = _SEAL.unpack_from(data)
        if not sequence:
            return None
        return cls(
            sequence,
            None if flags & 2 else (salt1, salt2),
            None if flags & 4 else Position.unpack(position),
            bool(flags & 1),
            bool(flags & 8),
        )


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
    seal_sequence: int = 0
    intents: list[int] = field(default_factory=list)

    @property
    def view_complete(self) -> int:
        """The txid up to which the page view holds everything."""
        return self.view_txid if self.backlog is None else min(self.view_txid, self.backlog.after)

    def absorb(self, seal: Seal | None) -> None:
        """Follows what a restart of the WAL has left behind since this header was written."""
        if seal is None or seal.sequence <= self.seal_sequence:
            return
        self.seal_sequence = seal.sequence
        here = None if self.position is None else (self.position.salt1, self.position.salt2)
        if seal.anywhere or (seal.before == here and not seal.covered):
            self.needs_scan = True
        elif seal.before == here:
            self.position = seal.after

    def encode(self) -> bytes:
        """The header's bytes, at most HEADER_SIZE."""
        flags = (
            self.needs_scan * _NEEDS_SCAN | self.clean * _CLEAN | (self.position is None) * _GONE | (self.identity is not None) * _IDENTITY
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
            self.seal_sequence,
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
            seal_sequence,
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
            seal_sequence=seal_sequence,
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
        """The header, with what the last seal says; None when the file is empty or damaged."""
        header, seal = _read(self._fd)
        if header is not None:
            header.absorb(seal)
        return header

    def seal_sequence(self) -> int:
        """The number of the last seal: whoever scans from now on need not look at it."""
        seal = _read(self._fd)[1]
        return seal.sequence if seal is not None else 0

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

    def state(self, db_size: int) -> int:
        """The state hash that the entries of a database of `db_size` pages give."""
        state = 0
        for first in range(1, db_size + 1, _LONGEST_RUN):
            state = functools.reduce(operator.xor, self.entries(first, min(_LONGEST_RUN, db_size - first + 1))[0], state)
        return state

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

    @staticmethod
    def peek(path: str) -> IndexHeader | None:
        """As `load`, of the index at `path`, without its lock: for a look that must not wait."""
        return _with_file(path, os.O_RDONLY, _peek)

    @staticmethod
    def leave_seal(path: str, judge: Callable[[IndexHeader], tuple[Position | None, bool] | None]) -> None:
        """Writes the next seal of the index at `path`, if there is one. For the holder of SQLite's write lock, who alone does so.

        `judge` is given the header as it stands and answers (position after it, covered), or None to leave everything as it is. A header that
        cannot be read is answered by a seal that asks for a scan.
        """

        def write(fd: int) -> None:
            header, last = _read(fd)
            sequence = (last.sequence if last is not None else 0) + 1
            if header is None:
                os.pwrite(fd, Seal(sequence, None, None, covered=False, anywhere=True).encode(), SEAL_OFFSET)
                return
            sequence = max(sequence, header.seal_sequence + 1)
            unabsorbed = None if header.position is None else (header.position.salt1, header.position.salt2)
            header.absorb(last)
            verdict = judge(header)
            if verdict is None:
                return
            after, covered = verdict
            os.pwrite(fd, Seal(sequence, unabsorbed, after, covered and not header.needs_scan).encode(), SEAL_OFFSET)

        _with_file(path, os.O_RDWR, write)

    @staticmethod
    def ask_for_scan(path: str) -> None:
        """A seal that says: whatever the position was, it proves nothing any more. As `leave_seal`."""

        def write(fd: int) -> None:
            header, last = _read(fd)
            sequence = max(last.sequence if last is not None else 0, header.seal_sequence if header is not None else 0) + 1
            os.pwrite(fd, Seal(sequence, None, None, covered=False, anywhere=True).encode(), SEAL_OFFSET)

        _with_file(path, os.O_RDWR, write)

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


def _read(fd: int) -> tuple[IndexHeader | None, Seal | None]:
    data = os.pread(fd, HEADER_SIZE, 0)
    return IndexHeader.decode(data), Seal.decode(data[SEAL_OFFSET : SEAL_OFFSET + _SEAL.size + 4])


def _peek(fd: int) -> IndexHeader | None:
    header, seal = _read(fd)
    if header is not None:
        header.absorb(seal)
    return header


def _with_file(path: str, flags: int, function: Callable[[int], R]) -> R | None:
    try:
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        return function(fd)
    finally:
        os.close(fd)


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
