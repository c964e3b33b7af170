"""Encode and decode the head and the tables of a segment: all of it but its pages. No I/O.

All integers are big-endian and unsigned. `segment` describes the object as a whole.

    offset  head (128 bytes)
      0  8  magic "BWALSEG" NUL
      8  2  format version: 1
     10  2  flags: 1 reset (the edge carries the whole new database, what came before it is discarded), 2 body
     12  4  page size, bytes
     16  8  pre: txid of the state before                24  8  post: txid of the state after
     32  8  state hash of pre                            40  8  state hash of post
     48  4  size of the database after, pages            52  4  pages in this edge
     56  8  view_txid: up to where the page view was complete
     64  8  the server's time, ms since 1970
     72 16  the writer: its id (8, for messages only), and the random number of the attempt that stored the segment (8)
     88  4  length of the tables, compressed             92  4  length of the tables, uncompressed
     96  8  length of the blocks (0 with flag body)
    104 16  reserved: 0
    120  8  first 8 bytes of the SHA-256 of head[0..119] and the tables: these can be read, and trusted, without the rest

    tables (one zstd frame)
      4  n, then n commits: txid 8, state hash after it 8, server's time in ms 8         ascending, the last one is post
      4  n, then n positions (`wal.Position`, 20): where each local commit of this edge ended in the local WAL
      with flag body: length of its name 2, name (the key after `layout.log_prefix`), size in bytes 8, SHA-256 32

Invariants (`validate`, and on top of it the decoder): pre < post; from txid 0 only with state hash 0; a whole edge (from 0, or a
reset) has every page, and their hashes give post's. Whatever does not hold is a CorruptionError that names the object.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Final, NamedTuple

from .block import ascending
from .page import lock_page
from .wal import POSITION_SIZE, WalPosition
from .zstd import Bytes, FormatError, NewerFormatError, decompress

__all__ = [
    "DIGEST_SIZE",
    "HEAD_SIZE",
    "INLINE_LIMIT",
    "LISTED_ROWS",
    "MAX_ROWS",
    "SEGMENT_LIMIT",
    "WRITER_ID_SIZE",
    "Body",
    "CommitRecord",
    "SegmentHeader",
    "Tally",
    "check_tables",
    "decode_head",
    "head_lengths",
    "pack_head",
    "pack_tables",
    "validate",
]

HEAD_SIZE: Final = 128
WRITER_ID_SIZE: Final = 8  # bytes
INLINE_LIMIT: Final = 16 << 20  # blocks above this belong into a body
SEGMENT_LIMIT: Final = 32 << 20  # no segment object is larger
MAX_ROWS: Final = 1 << 18  # commits in one segment, and positions: about 40 MB as Python objects
LISTED_ROWS: Final = 1 << 16  # positions that a merged edge lists, the last ones; a snapshot lists so many commits, too

_MAGIC: Final = b"BWALSEG\0"
_VERSION: Final = 1
_RESET, _BODY = 1, 2
_U64: Final = 2**64 - 1
_TXID_LIMIT: Final = 2**63
_PAGES_LIMIT: Final = 0xFFFFFFFE
DIGEST_SIZE: Final = 32  # bytes, of a SHA-256
_TABLES_LIMIT: Final = MAX_ROWS * (24 + POSITION_SIZE) + 4096

_HEAD: Final = struct.Struct(">8sHHIQQQQIIQQ16sIIQ16x")
_COUNT: Final = struct.Struct(">I")
_COMMIT: Final = struct.Struct(">QQQ")
_NAME_LENGTH: Final = struct.Struct(">H")
_BODY_REST: Final = struct.Struct(">Q32s")
_BODY_NAME: Final = re.compile(r"(?=.{1,200}\Z)[0-9A-Za-z_-]+(?:/[0-9A-Za-z_-]+)*")


class CommitRecord(NamedTuple):
    """A state of the history within an edge: its txid, its state hash, the server's time in ms since 1970."""

    txid: int
    post: int
    time_ms: int


@dataclass(frozen=True, slots=True)
class Body:
    """The object with the pages of a large segment: its key after `keys.log_prefix`, its size in bytes, its SHA-256 (32 bytes)."""

    name: str
    size: int
    sha256: bytes


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """All of a segment but its pages. `page_size` in bytes, `db_size` and `page_count` in pages, times in ms since 1970."""

    pre: int
    post: int
    pre_hash: int
    post_hash: int
    page_size: int
    db_size: int
    page_count: int
    reset: bool
    view_txid: int
    time_ms: int
    writer: bytes
    commits: tuple[CommitRecord, ...]
    positions: tuple[WalPosition, ...] = ()
    body: Body | None = None

    @property
    def attempt(self) -> int:
        """Return the random number that tells a writer's own attempt from a second writer's with the same change and time."""
        return int.from_bytes(self.writer[WRITER_ID_SIZE:])

    @property
    def whole(self) -> bool:
        """Whether the edge carries every page of the database, so that nothing before it is needed."""
        return self.reset or self.pre == 0


def validate(header: SegmentHeader) -> None:
    """Check the invariants of a header. The encoder and the decoder call this.

    Raises:
        ValueError: an invariant does not hold.
    """
    h = header
    if not 0 <= h.pre < h.post < _TXID_LIMIT:
        raise FormatError(f"no edge of a history: {h.pre} -> {h.post}")
    if not (512 <= h.page_size <= 65536 and h.page_size & (h.page_size - 1) == 0):
        raise FormatError(f"no page size: {h.page_size}")
    if not (0 <= h.pre_hash <= _U64 and 0 <= h.post_hash <= _U64):
        raise FormatError("a state hash of more than 64 bits")
    if h.pre == 0 and h.pre_hash != 0:
        raise FormatError("the state before the first commit is the empty database, whose hash is 0")
    if not 0 <= h.db_size <= _PAGES_LIMIT or (h.db_size == 0 and h.post_hash != 0):
        raise FormatError(f"no size of a database with state hash {h.post_hash:016x}: {h.db_size} pages")
    every = h.db_size - (h.db_size >= lock_page(h.page_size))
    if not 0 <= h.page_count <= every or (h.whole and h.page_count != every):
        raise FormatError(f"{h.page_count} pages in {'a whole' if h.whole else 'an'} edge to a database of {h.db_size} pages")
    if not (0 <= h.view_txid < _TXID_LIMIT and 0 <= h.time_ms < _TXID_LIMIT and len(h.writer) == 16):
        raise FormatError("view_txid, time or writer out of range")
    if len(h.commits) > MAX_ROWS or len(h.positions) > MAX_ROWS:
        raise FormatError(f"{len(h.commits)} commits and {len(h.positions)} positions; up to {MAX_ROWS} of each are allowed")
    before = h.pre
    for txid, post_hash, time_ms in h.commits:
        if not (before < txid and 0 <= post_hash <= _U64 and 0 <= time_ms < _TXID_LIMIT):
            raise FormatError(f"commit {txid} cannot follow {before}")
        before = txid
    if not h.commits or h.commits[-1][:2] != (h.post, h.post_hash):
        raise FormatError("the last commit of the edge is not the state after it")
    if h.body is not None:
        body = h.body
        if not (_BODY_NAME.fullmatch(body.name) and 0 < body.size < _TXID_LIMIT and len(body.sha256) == DIGEST_SIZE and h.page_count):
            raise FormatError(f"no body: {body.name!r}, {body.size} bytes for {h.page_count} pages")


class Tally:
    """Compare the tables of all blocks together with the header. FormatError if they contradict it."""

    def __init__(self, header: SegmentHeader) -> None:
        self.header, self.lock = header, lock_page(header.page_size)
        self.count = self.last = self.state = 0

    def add(self, rows: Sequence[tuple[int, int]]) -> None:
        self.last = ascending(rows, self.last)
        for pgno, hashed in rows:
            if pgno == self.lock:
                raise FormatError(f"it has page {pgno}, which SQLite never uses")
            self.state ^= hashed
        self.count += len(rows)
        if self.last > self.header.db_size:
            raise FormatError(f"page {self.last} in a database of {self.header.db_size}")

    def finish(self) -> None:
        if self.count != self.header.page_count:
            raise FormatError(f"{self.count} pages where {self.header.page_count} are expected")
        if self.header.whole and self.state != self.header.post_hash:
            raise FormatError(f"its pages give the state hash {self.state:016x}, not {self.header.post_hash:016x}")


def check_tables(header: SegmentHeader, tables: Iterable[Sequence[tuple[int, int]]]) -> None:
    """Check the tables of all blocks, (page number, page hash) each, against the header. FormatError if they contradict it."""
    tally = Tally(header)
    for rows in tables:
        tally.add(rows)
    tally.finish()


def pack_head(header: SegmentHeader, tables_length: int, raw_length: int, blocks_length: int) -> bytes:
    """Return the head without its checksum. Lengths in bytes: of the tables, compressed and uncompressed, and of the blocks."""
    flags = (_RESET if header.reset else 0) | (_BODY if header.body is not None else 0)
    return _HEAD.pack(
        _MAGIC, _VERSION, flags, header.page_size, header.pre, header.post, header.pre_hash, header.post_hash,
        header.db_size, header.page_count, header.view_txid, header.time_ms, header.writer, tables_length, raw_length, blocks_length,
    )  # fmt: skip


def pack_tables(header: SegmentHeader) -> bytes:
    """Return the tables, uncompressed. FormatError: a number is out of range."""
    try:
        parts = [_COUNT.pack(len(header.commits)), *(_COMMIT.pack(*commit) for commit in header.commits)]
        parts += [_COUNT.pack(len(header.positions)), *(position.pack() for position in header.positions)]
    except struct.error as error:
        raise FormatError(f"a number out of range: {error}") from error
    if header.body is not None:
        encoded = header.body.name.encode("ascii")
        parts += [_NAME_LENGTH.pack(len(encoded)), encoded, _BODY_REST.pack(header.body.size, header.body.sha256)]
    return b"".join(parts)


def head_lengths(data: Bytes) -> tuple[int, int, int]:
    """Check magic and version, and return the lengths (tables, tables uncompressed, blocks) in bytes, which are bounded here."""
    if bytes(data[:8]) != _MAGIC or len(data) < HEAD_SIZE:
        raise FormatError(f"no segment: {len(data)} bytes that begin with {bytes(data[:8])!r}")
    _, version, flags, *_, tables, raw, blocks = _HEAD.unpack_from(data)
    if version > _VERSION:
        raise NewerFormatError(f"format version {version} is newer than this program")
    if version != _VERSION:
        raise FormatError(f"there is no format version {version}")
    if flags & ~(_RESET | _BODY) or any(data[104:120]):
        raise NewerFormatError("it uses flags, or fields, that are newer than this program")
    if not 0 < raw <= _TABLES_LIMIT or not 0 < tables <= raw + (raw >> 7) + 512 or blocks > SEGMENT_LIMIT:
        raise FormatError(f"absurd lengths: tables of {raw} bytes in {tables}, blocks of {blocks}")
    return tables, raw, blocks


def decode_head(view: memoryview, tables_length: int, raw_length: int, blocks_length: int) -> SegmentHeader:
    """Return the header, verified. `view` begins with the head and the tables. FormatError if it is not valid."""
    end = HEAD_SIZE + tables_length
    if len(view) < end:
        raise FormatError(f"{len(view)} bytes, less than its tables need")
    hashed = sha256(view[: _HEAD.size])
    hashed.update(view[HEAD_SIZE:end])
    if hashed.digest()[:8] != view[_HEAD.size : HEAD_SIZE]:
        raise FormatError("the checksum of its head is wrong")
    fields = _HEAD.unpack_from(view)
    _, _, flags, page_size, pre, post, pre_hash, post_hash, db_size, count, view_txid, time_ms, writer, *_ = fields
    try:
        commits, positions, body = _unpack_tables(decompress(view[HEAD_SIZE:end], raw_length), bool(flags & _BODY))
    except (struct.error, UnicodeDecodeError) as error:
        raise FormatError("its tables are no tables") from error
    if body is not None and blocks_length:
        raise FormatError("it has blocks and a body")
    header = SegmentHeader(
        pre, post, pre_hash, post_hash, page_size, db_size, count, bool(flags & _RESET), view_txid, time_ms, writer,
        commits, positions, body,
    )  # fmt: skip
    validate(header)
    return header


def _unpack_tables(raw: bytes, has_body: bool) -> tuple[tuple[CommitRecord, ...], tuple[WalPosition, ...], Body | None]:
    (count,) = _COUNT.unpack_from(raw)
    start, end = 4, 4 + count * _COMMIT.size
    commits = tuple(map(CommitRecord._make, _COMMIT.iter_unpack(raw[start:end])))
    (rows,) = _COUNT.unpack_from(raw, end)
    start, end = end + 4, end + 4 + rows * POSITION_SIZE
    positions = tuple(WalPosition.unpack(raw[at : at + POSITION_SIZE]) for at in range(start, min(end, len(raw)), POSITION_SIZE))
    body = None
    if has_body:
        (length,) = _NAME_LENGTH.unpack_from(raw, end)
        name = raw[end + 2 : end + 2 + length].decode("ascii")
        size, digest = _BODY_REST.unpack_from(raw, end + 2 + length)
        body, end = Body(name, size, digest), end + 2 + length + _BODY_REST.size
    if end != len(raw) or len(commits) != count or len(positions) != rows:
        raise FormatError("its tables are not as long as they say")
    return commits, positions, body
