"""The bytes of a segment, an edge `pre -> post` of a database's history. No I/O.

All integers are big-endian and unsigned. A segment object is

    head | tables | blocks | SHA-256 of all bytes before (32)

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

    blocks: as in `block`, which also defines page hash and state hash; their names are offered here too

A body object is the blocks of a large segment and nothing else; the segment then has no blocks and names it.

Invariants (`validate`, and on top of it the decoder): pre < post; from txid 0 only with state hash 0; a whole edge (from 0, or a
reset) has every page, and their hashes give post's. Whatever does not hold is a CorruptionError that names the object.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from .block import (
    BLOCK_BYTES,
    Mapper,
    ascending,
    corrupt,
    encode_block,
    encode_blocks,
    pages_per_block,
    read_blocks,
    read_tables,
    rows_of,
    split,
    unpack,
)
from .page import Page, lock_page, page_hash, state_hash
from .wal import POSITION_SIZE, Position
from .zstd import Bytes, FormatError, NewerFormatError, compress, decompress

__all__ = [
    "BLOCK_BYTES",
    "HEAD_SIZE",
    "INLINE_LIMIT",
    "LISTED_ROWS",
    "MAX_ROWS",
    "SEGMENT_LIMIT",
    "WRITER_ID_SIZE",
    "Body",
    "Commit",
    "Header",
    "Mapper",
    "Page",
    "Segment",
    "decode",
    "decode_header",
    "encode",
    "encode_block",
    "encode_blocks",
    "head_length",
    "lock_page",
    "page_hash",
    "pages_per_block",
    "read",
    "read_blocks",
    "read_body",
    "read_tables",
    "state_hash",
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
_DIGEST: Final = 32
_TABLES_LIMIT: Final = MAX_ROWS * (24 + POSITION_SIZE) + 4096

_HEAD: Final = struct.Struct(">8sHHIQQQQIIQQ16sIIQ16x")
_COUNT: Final = struct.Struct(">I")
_COMMIT: Final = struct.Struct(">QQQ")
_NAME_LENGTH: Final = struct.Struct(">H")
_BODY_REST: Final = struct.Struct(">Q32s")
_BODY_NAME: Final = re.compile(r"(?=.{1,200}\Z)[0-9A-Za-z_-]+(?:/[0-9A-Za-z_-]+)*")

_sha256 = hashlib.sha256


class Commit(NamedTuple):
    """A state of the history that an edge passes: its txid, its state hash, the server's time in ms since 1970."""

    txid: int
    post: int
    time_ms: int


@dataclass(frozen=True, slots=True)
class Body:
    """Where the pages of a large segment are: the key after `layout.log_prefix`, the size in bytes, the SHA-256 (32 bytes)."""

    name: str
    size: int
    sha256: bytes


@dataclass(frozen=True, slots=True)
class Header:
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
    commits: tuple[Commit, ...]
    positions: tuple[Position, ...] = ()
    body: Body | None = None

    @property
    def attempt(self) -> int:
        """Return the number by which a writer knows its own attempt from a rival's that made the same change at the same time."""
        return int.from_bytes(self.writer[WRITER_ID_SIZE:])

    @property
    def whole(self) -> bool:
        """Whether the edge carries every page of the database, so that nothing before it is needed."""
        return self.reset or self.pre == 0


@dataclass(frozen=True, slots=True)
class Segment:
    """A decoded segment: its checksum, its head and its tables were verified; each page is, as `pages` hands it out."""

    header: Header
    name: str
    _blocks: memoryview = field(repr=False)

    def pages(self) -> Iterator[Page]:
        """The pages in the segment itself, ascending.

        Raises:
            ValueError: they are in a body (`header.body`): use `read_body`.
            CorruptionError: a page is not what its hash says.
        """
        return (page for block in self.blocks() for page in block)

    def blocks(self, *, mapped: Mapper = map) -> Iterator[list[Page]]:
        """As `pages`, block by block: 32 MB of blocks may hold a thousand times as much, and only one of them is unpacked at a time (or as
        many as `mapped` does at once)."""
        self._refuse_body()
        return read_blocks((self._blocks,), self.header.page_size, name=self.name, mapped=mapped)

    def tables(self) -> Iterator[tuple[int, int]]:
        """(page number, page hash) of the pages in the segment itself, nothing decompressed. ValueError with a body."""
        self._refuse_body()
        return (row for table in read_tables((self._blocks,), self.header.page_size, name=self.name) for row in table)

    def _refuse_body(self) -> None:
        if self.header.body is not None:
            raise ValueError(f"the pages of {self.name} are in its body, {self.header.body.name}")


def encode(header: Header, blocks: Sequence[bytes] = ()) -> bytes:
    """The segment object. `blocks` come from `encode_block`; none when `header.body` names the object that has them.

    What is returned can be decoded: everything that the decoder checks without the pages is checked here.

    Raises:
        ValueError: header and blocks contradict each other or an invariant, or the segment would exceed SEGMENT_LIMIT.
    """
    validate(header)
    if header.body is None:
        _check_tables(header, (rows_of(block) for view in blocks for block in split((view,), header.page_size)))
    elif blocks:
        raise FormatError("blocks in a segment whose pages are in a body")
    raw = _pack_tables(header)
    tables = compress(raw, 3)
    blocks_length = sum(map(len, blocks))
    flags = (_RESET if header.reset else 0) | (_BODY if header.body is not None else 0)
    head = _HEAD.pack(
        _MAGIC, _VERSION, flags, header.page_size, header.pre, header.post, header.pre_hash, header.post_hash,
        header.db_size, header.page_count, header.view_txid, header.time_ms, header.writer, len(tables), len(raw), blocks_length,
    )  # fmt: skip
    parts = [head, _sha256(head + tables).digest()[:8], tables, *blocks]
    data = b"".join(parts)
    if len(data) + _DIGEST > SEGMENT_LIMIT:
        raise FormatError(f"a segment of more than {SEGMENT_LIMIT} bytes: its pages belong in a body")
    return data + _sha256(data).digest()


def decode(data: bytes, *, name: str) -> Segment:
    """The segment in `data`, the whole object; `name` is its key, for errors.

    Everything is verified but the content of the pages, which `Segment.pages` verifies one by one.

    Raises:
        CorruptionError: `data` is no sound segment, or of a newer format.
    """
    try:
        tables_length, raw_length, blocks_length = _head_lengths(data)
        expected = HEAD_SIZE + tables_length + blocks_length + _DIGEST
        if len(data) != expected:
            raise FormatError(f"{len(data)} bytes where {expected} are expected")
        view = memoryview(data)
        if _sha256(view[:-_DIGEST]).digest() != data[-_DIGEST:]:
            raise FormatError("its checksum is wrong")
        header = _decode_head(view, tables_length, raw_length, blocks_length)
        blocks = view[HEAD_SIZE + tables_length : -_DIGEST]
        if header.body is None:
            _check_tables(header, map(rows_of, split((blocks,), header.page_size)))
    except FormatError as error:
        raise corrupt(name, error) from error
    return Segment(header, name, blocks)


def head_length(data: bytes, *, name: str) -> int:
    """How many bytes `decode_header` needs, told from (at least) the first HEAD_SIZE bytes. CorruptionError as `decode`."""
    try:
        return HEAD_SIZE + _head_lengths(data)[0]
    except FormatError as error:
        raise corrupt(name, error) from error


def decode_header(data: bytes, *, name: str) -> Header:
    """The header alone, verified, from (at least) the first `head_length` bytes of the object. CorruptionError as `decode`."""
    try:
        return _decode_head(memoryview(data), *_head_lengths(data))
    except FormatError as error:
        raise corrupt(name, error) from error


def read(chunks: Iterable[Bytes], *, name: str) -> tuple[Header, Iterator[list[Page]]]:
    """As `decode`, of an object that is not held whole: `chunks` are its bytes, cut anywhere. (header, the pages of each block).

    Each page is verified before it is handed out. What only the end can tell (the object's checksum, the number of pages, the state hash of
    a whole edge) is verified before the iterator is exhausted: keep nothing for good before that. With a body, no page comes.

    Raises:
        CorruptionError: as `decode`, here or while iterating.
    """
    source = _Source(chunks)
    try:
        head = source.take(HEAD_SIZE)
        tables_length, raw_length, blocks_length = _head_lengths(head)
        header = _decode_head(memoryview(head + source.take(tables_length)), tables_length, raw_length, blocks_length)
    except FormatError as error:
        raise corrupt(name, error) from error

    def blocks() -> Iterator[list[Page]]:
        try:
            tally = _Tally(header)
            for block in split(source.pieces(blocks_length), header.page_size):
                rows = rows_of(block)
                tally.add(rows)
                yield unpack(block, rows, header.page_size)
            digest = source.digest.digest()
            if source.take(_DIGEST) != digest or source.rest():
                raise FormatError("its checksum is wrong")
            if header.body is None:
                tally.finish()
        except FormatError as error:
            raise corrupt(name, error) from error

    return header, blocks()


class _Source:
    """Bytes that come in chunks, taken in other lengths; `digest` is the SHA-256 of all that was taken."""

    def __init__(self, chunks: Iterable[Bytes]) -> None:
        self.digest = _sha256()
        self._chunks = iter(chunks)
        self._left = memoryview(b"")

    def pieces(self, length: int) -> Iterator[memoryview]:
        """The next `length` bytes, as they come."""
        while length:
            if not self._left and not self.rest():
                raise FormatError(f"it ends {length} bytes early")
            piece, self._left = self._left[:length], self._left[length:]
            self.digest.update(piece)
            length -= len(piece)
            yield piece

    def take(self, length: int) -> bytes:
        return b"".join(self.pieces(length))

    def rest(self) -> bool:
        """Are there more bytes?"""
        while not self._left:
            chunk = next(self._chunks, None)
            if chunk is None:
                return False
            self._left = memoryview(chunk)
        return True


def read_body(header: Header, chunks: Iterable[Bytes], *, name: str, mapped: Mapper = map) -> Iterator[list[Page]]:
    """As `read_blocks`, for the body that `header` names; `name` is the body's key. `mapped` does what `map` does, perhaps in threads.

    Each page is verified before it is handed out. What only the end can tell (size, SHA-256, number of pages, the state hash of
    a whole edge) is verified before the iterator is exhausted: keep nothing for good before that.

    Raises:
        ValueError: `header` names no body.
        CorruptionError: as `read_blocks`, or the object is not the one that `header` names.
    """
    if header.body is None:
        raise ValueError("the segment has no body")
    return _read_body(header, header.body, chunks, name, mapped)


def _read_body(header: Header, body: Body, chunks: Iterable[Bytes], name: str, mapped: Mapper) -> Iterator[list[Page]]:
    size, digest = 0, _sha256()

    def hashed() -> Iterator[Bytes]:
        nonlocal size
        for chunk in chunks:
            size += len(chunk)
            if size > body.size:
                raise FormatError(f"more than the {body.size} bytes that its segment tells")
            digest.update(chunk)
            yield chunk

    try:
        tally = _Tally(header)

        def tallied() -> Iterator[tuple[memoryview, list[tuple[int, int]]]]:
            for block in split(hashed(), header.page_size):
                rows = rows_of(block)
                tally.add(rows)
                yield block, rows

        yield from mapped(lambda block: unpack(*block, header.page_size), tallied())
        if size != body.size or digest.digest() != body.sha256:
            raise FormatError(f"{size} bytes that are not the {body.size} which its segment names")
        tally.finish()
    except FormatError as error:
        raise corrupt(name, error) from error


def validate(header: Header) -> None:
    """Checks the invariants of a header, in the encoder and in the decoder.

    Raises:
        ValueError: one does not hold.
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
        if not (_BODY_NAME.fullmatch(body.name) and 0 < body.size < _TXID_LIMIT and len(body.sha256) == _DIGEST and h.page_count):
            raise FormatError(f"no body: {body.name!r}, {body.size} bytes for {h.page_count} pages")


class _Tally:
    """What the tables of all blocks together must be, by the header."""

    def __init__(self, header: Header) -> None:
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


def _check_tables(header: Header, tables: Iterable[Sequence[tuple[int, int]]]) -> None:
    tally = _Tally(header)
    for rows in tables:
        tally.add(rows)
    tally.finish()


def _pack_tables(header: Header) -> bytes:
    try:
        parts = [_COUNT.pack(len(header.commits)), *(_COMMIT.pack(*commit) for commit in header.commits)]
        parts += [_COUNT.pack(len(header.positions)), *(position.pack() for position in header.positions)]
    except struct.error as error:
        raise FormatError(f"a number out of range: {error}") from error
    if header.body is not None:
        encoded = header.body.name.encode("ascii")
        parts += [_NAME_LENGTH.pack(len(encoded)), encoded, _BODY_REST.pack(header.body.size, header.body.sha256)]
    return b"".join(parts)


def _head_lengths(data: Bytes) -> tuple[int, int, int]:
    """Magic and version first, then the lengths (tables, tables uncompressed, blocks), which are bounded here."""
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


def _decode_head(view: memoryview, tables_length: int, raw_length: int, blocks_length: int) -> Header:
    end = HEAD_SIZE + tables_length
    if len(view) < end:
        raise FormatError(f"{len(view)} bytes, less than its tables need")
    hashed = _sha256(view[: _HEAD.size])
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
    header = Header(
        pre, post, pre_hash, post_hash, page_size, db_size, count, bool(flags & _RESET), view_txid, time_ms, writer,
        commits, positions, body,
    )  # fmt: skip
    validate(header)
    return header


def _unpack_tables(raw: bytes, has_body: bool) -> tuple[tuple[Commit, ...], tuple[Position, ...], Body | None]:
    (count,) = _COUNT.unpack_from(raw)
    start, end = 4, 4 + count * _COMMIT.size
    commits = tuple(map(Commit._make, _COMMIT.iter_unpack(raw[start:end])))
    (rows,) = _COUNT.unpack_from(raw, end)
    start, end = end + 4, end + 4 + rows * POSITION_SIZE
    positions = tuple(Position.unpack(raw[at : at + POSITION_SIZE]) for at in range(start, min(end, len(raw)), POSITION_SIZE))
    body = None
    if has_body:
        (length,) = _NAME_LENGTH.unpack_from(raw, end)
        name = raw[end + 2 : end + 2 + length].decode("ascii")
        size, digest = _BODY_REST.unpack_from(raw, end + 2 + length)
        body, end = Body(name, size, digest), end + 2 + length + _BODY_REST.size
    if end != len(raw) or len(commits) != count or len(positions) != rows:
        raise FormatError("its tables are not as long as they say")
    return commits, positions, body
