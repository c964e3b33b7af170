"""Encode and decode the local index: its header and its WAL reset record. No I/O.

All numbers are big-endian:

    offset  size  field
         0     8  magic "BWALIDX3"
         8     4  flags: 1 needs scan, 2 closed cleanly, 4 no WAL, 8 identity known, 16 identity settled,
                  32 successor known
        12     4  page size in bytes, 0 before the first commit
        16    16  remote id: hash of the endpoint, the bucket and the database's name in it
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
       128    20  WAL position (wal.WalPosition)
       148    40  identity of the main file: device, inode, size, mtime_ns, ctime_ns
       188    20  successor: the beginning of the WAL that, by its WAL reset records, followed, where the position
                  could not be carried across (wal.WalPosition)
       208     8  sequence number of the last WAL reset record that this header takes into account
       216     4  number of in-doubt attempts
       220   16n  in-doubt attempts: attempts to put txid + 1 whose outcome is unknown.
                  Each is a post hash u64 and an attempt nonce u64
             4  CRC-32 of everything before
     15872    84  WAL reset record: sequence u64, flags u32 (1 covered, 2 from no WAL, 4 to no WAL, 8 from anywhere,
                  16 identity known, 32 identity settled, 64 witnessed), salts u32 u32, position 20,
                  identity of the main file 40, CRC-32
     16384  24 a page  entries, page 1 first: u64 page hash, u64 txid of the last change, u64 check: the XOR of the two

An identity is *settled* if it was recorded at a later tick of the file system's clock than the
file's own timestamps. Only then does an equal identity prove that the file was not written since.
Timestamps may be coarse, and a write within the same tick does not change them.

A state hash is computed from the hashes of the entries. A wrong one, once stored in a segment,
could never be restored. The entries therefore have checks. The WAL reset record has its own
checksum, because it is written under SQLite's write lock, and the header under the index's lock.
"""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from .page import repr_in_hex
from .wal import WalPosition

__all__ = [
    "ENTRY_SIZE",
    "HEADER_SIZE",
    "MAX_IN_DOUBT",
    "RESET_RECORD_OFFSET",
    "RESET_RECORD_SIZE",
    "UNKNOWN_SIZE",
    "Attempt",
    "Backlog",
    "Identity",
    "IndexHeader",
    "IndexState",
    "WalResetRecord",
    "changed",
]

MAGIC: Final = b"BWALIDX3"
HEADER_SIZE: Final = 16384
ENTRY_SIZE: Final = 24
RESET_RECORD_OFFSET: Final = 15872
_FIXED: Final = struct.Struct(">8sII16s16s16sQQIIQQQIIQ20sQQQqq20sQI")
_SEAL: Final = struct.Struct(">QIII20sQQQqq")
_INTENT: Final = struct.Struct(">QQ")
MAX_IN_DOUBT: Final = (RESET_RECORD_OFFSET - _FIXED.size - 4) // _INTENT.size
_NEEDS_SCAN, _CLEAN, _GONE, _IDENTITY, _SETTLED, _SUCCESSOR = 1, 2, 4, 8, 16, 32
_NO_POSITION: Final = bytes(20)
RESET_RECORD_SIZE: Final = _SEAL.size + 4
UNKNOWN_SIZE: Final = 0xFFFFFFFF
"""As `IndexHeader.view_size`: page objects may exist past the end."""


class Identity(NamedTuple):
    """Metadata of a file, as `stat` returns it.

    A write changes it, unless the write falls into the same tick of the file system's clock as the
    file's timestamps.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, path: str) -> Identity | None:
        """Return the identity of the file at `path`, or None if it does not exist."""
        try:
            st = os.stat(path)
        except FileNotFoundError:
            return None
        return cls(st.st_dev, st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns)

    def is_settled_by(self, witness: Identity | None) -> bool:
        """Return whether `witness` was written to at a later tick than this file.

        `witness` is a file of the same file system. Every later write to this file is then of a
        later tick, too, and changes its timestamps.
        """
        return witness is not None and witness.device == self.device and witness.ctime_ns > max(self.mtime_ns, self.ctime_ns)


class Attempt(NamedTuple):
    """An attempt to store a commit.

    It has the state hash after the commit, and a random number that identifies it.
    """

    post_hash: int
    attempt: int


class Backlog(NamedTuple):
    """Page objects still to be put.

    They are of pages `cursor` and beyond that commits in (after, upto] changed last.
    """

    after: int
    upto: int
    cursor: int


class WalResetRecord(NamedTuple):
    """Record of a restart of the WAL: the WAL with the salts `before` ended.

    `before` None: there was no WAL. `after` is the position in the WAL that follows; None: there is
    none. `covered`: the position of the index covered all of the old WAL. `anywhere`: no position
    of the index proves anything any more, whatever it was. `is_witnessed`: every reset from that
    WAL to `after` left a WAL reset record, so that what follows came from it.
    """

    sequence: int
    before: tuple[int, int] | None
    after: WalPosition | None
    covered: bool
    anywhere: bool = False
    identity: Identity | None = None
    is_settled: bool = False
    is_witnessed: bool = False

    def encode(self) -> bytes:
        """Return the record's bytes."""
        flags = self.covered | (self.before is None) << 1 | (self.after is None) << 2 | self.anywhere << 3
        flags |= (self.identity is not None) << 4 | self.is_settled << 5 | self.is_witnessed << 6
        after = self.after.pack() if self.after else _NO_POSITION
        body = _SEAL.pack(self.sequence, flags, *(self.before or (0, 0)), after, *(self.identity or (0, 0, 0, 0, 0)))
        return body + struct.pack(">I", zlib.crc32(body))

    @classmethod
    def decode(cls, data: bytes) -> WalResetRecord | None:
        """Decode the result of `encode`; return None for any other bytes."""
        if len(data) != _SEAL.size + 4 or zlib.crc32(data[:-4]) != struct.unpack_from(">I", data, _SEAL.size)[0]:
            return None
        sequence, flags, salt1, salt2, position, *identity = _SEAL.unpack_from(data)
        if not sequence:
            return None
        return cls(
            sequence,
            None if flags & 2 else (salt1, salt2),
            None if flags & 4 else WalPosition.unpack(position),
            bool(flags & 1),
            bool(flags & 8),
            Identity(*identity) if flags & 16 else None,
            bool(flags & 32),
            bool(flags & 64),
        )


class IndexState(Enum):
    """State of the main file as the index records it.

    The header's fields give it (`IndexHeader.index_state`).
    """

    NEW = auto()  # nothing is stored yet
    BEING_REPLACED = auto()  # the file is an earlier state, to be replaced by the head
    # The index is at a txid, and nothing proves that the file came from there.
    # Left by a reset, or by a restore from page objects.
    UNPROVED = auto()
    NEEDS_SCAN = auto()  # the file came from the txid; only a scan can find what has changed since
    IN_STEP = auto()  # the file came from the txid, and the position shows what has changed since


if TYPE_CHECKING:
    from dataclasses import replace as changed
else:

    def changed(header: IndexHeader, /, **changes: Any) -> IndexHeader:
        """Return `header` with `changes`.

        `dataclasses.replace` takes 20 times as long, and every commit makes some changes.
        """
        made = object.__new__(IndexHeader)
        made.__dict__.update(header.__dict__, **changes)
        return made


@repr_in_hex("state")
@dataclass(frozen=True)
class IndexHeader:
    """The index's header, as a value.

    `position` None: there is no WAL, the main file holds everything.

    Methods that change it return a new one. Only the index of `replication` saves it.
    """

    remote_id: bytes
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
    position: WalPosition | None = None
    needs_scan: bool = False
    clean: bool = False
    identity: Identity | None = None
    is_settled: bool = False
    successor: WalPosition | None = None
    reset_sequence: int = 0
    in_doubt: tuple[Attempt, ...] = ()

    @property
    def index_state(self) -> IndexState:
        """Return the state of the main file as this header records it."""
        if self.txid == 0:
            return IndexState.BEING_REPLACED if self.state else IndexState.NEW
        if not self.needs_scan:
            return IndexState.IN_STEP
        return IndexState.UNPROVED if self.identity is None else IndexState.NEEDS_SCAN

    def identifies(self, path: str) -> bool:
        """Return whether the file at `path` is unchanged since this header was written.

        A settled identity must prove it.
        """
        return self.is_settled and self.identity is not None and self.identity == Identity.of(path)

    @property
    def view_complete(self) -> int:
        """Return the txid up to which the page objects are complete."""
        return self.view_txid if self.backlog is None else min(self.view_txid, self.backlog.after)

    def apply(self, record: WalResetRecord | None) -> IndexHeader:
        """Return the header with a WAL reset record applied.

        A record that is not newer than the header changes nothing.
        """
        if record is None or record.sequence <= self.reset_sequence:
            return self
        new = changed(self, reset_sequence=record.sequence, successor=None)
        here = None if self.position is None else (self.position.salt1, self.position.salt2)
        if record.anywhere or (record.before == here and not record.covered):
            if record.after is None and record.before == here and None not in (self.identity, record.identity):
                # The WAL was removed with commits that are not stored. They are in this file,
                # unchanged since the record.
                return changed(new, needs_scan=True, position=None, identity=record.identity, is_settled=record.is_settled)
            if record.before == here and record.is_witnessed:
                return changed(new, needs_scan=True, successor=record.after)
            return changed(new, needs_scan=True)
        if record.before == here:
            return changed(new, position=record.after, identity=record.identity, is_settled=record.is_settled)
        return new

    def at(self, txid: int, state: int, page_size: int, db_size: int) -> IndexHeader:
        """Return the header at the given state of the history."""
        return changed(self, txid=txid, state=state, page_size=page_size, db_size=db_size)

    def needing_scan(self) -> IndexHeader:
        """Return the header with a scan requested: the position proves nothing."""
        return self if self.needs_scan else changed(self, needs_scan=True)

    def with_intent(self, intent: Attempt) -> IndexHeader:
        """Return the header with one more in-doubt attempt.

        If there are too many, the oldest is dropped.
        """
        return changed(self, in_doubt=(*self.in_doubt[-(MAX_IN_DOUBT - 1) :], intent))

    def pages_put(self, upto: int) -> IndexHeader:
        """Return the header with the view txid at `upto`.

        The page objects of all commits up to there were put, except the backlog.
        """
        return changed(self, view_txid=upto)

    def pages_postponed(self, upto: int) -> IndexHeader:
        """Return the header with the commits in (view txid, upto] in the backlog.

        Their page objects were not put.

        The view txid then counts them as seen.
        """
        if self.view_txid >= upto:
            return self
        after = self.view_txid if self.backlog is None else min(self.backlog.after, self.view_txid)
        return changed(self, backlog=Backlog(after, upto, 1), view_txid=upto)

    def encode(self) -> bytes:
        """Return the header's bytes, at most HEADER_SIZE."""
        flags = self.needs_scan * _NEEDS_SCAN | self.clean * _CLEAN | (self.position is None) * _GONE
        flags |= (self.identity is not None) * _IDENTITY | self.is_settled * _SETTLED
        flags |= (self.successor is not None) * _SUCCESSOR
        fixed = _FIXED.pack(
            MAGIC,
            flags,
            self.page_size,
            self.remote_id,
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
            self.successor.pack() if self.successor else _NO_POSITION,
            self.reset_sequence,
            len(self.in_doubt),
        )
        body = fixed + b"".join(_INTENT.pack(*intent) for intent in self.in_doubt)
        return body + struct.pack(">I", zlib.crc32(body))

    @classmethod
    def decode(cls, data: bytes) -> IndexHeader | None:
        """Decode the result of `encode`; return None for any other bytes."""
        if len(data) < _FIXED.size + 4 or not data.startswith(MAGIC):
            return None
        (
            _magic,
            flags,
            page_size,
            remote_id,
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
            successor,
            reset_sequence,
            in_doubt,
        ) = _FIXED.unpack_from(data)
        end = _FIXED.size + _INTENT.size * in_doubt
        if in_doubt > MAX_IN_DOUBT or len(data) < end + 4:
            return None
        if zlib.crc32(data[:end]) != struct.unpack_from(">I", data, end)[0]:
            return None
        return cls(
            remote_id=remote_id,
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
            position=None if flags & _GONE else WalPosition.unpack(position),
            needs_scan=bool(flags & _NEEDS_SCAN),
            clean=bool(flags & _CLEAN),
            identity=Identity(*identity) if flags & _IDENTITY else None,
            is_settled=bool(flags & _SETTLED),
            successor=WalPosition.unpack(successor) if flags & _SUCCESSOR else None,
            reset_sequence=reset_sequence,
            in_doubt=tuple(map(Attempt._make, _INTENT.iter_unpack(data[_FIXED.size : end]))),
        )
