"""Encode and decode segments, the edges `pre -> post` of a database's history. No I/O.

All integers are big-endian and unsigned. A segment object is

    head | tables | blocks | SHA-256 of all bytes before (32)

    head     128 bytes: what the segment is, and how long its parts are     `segment_header`
    tables   one zstd frame: commits, positions in the WAL, the body
    blocks   as in `block`, which also defines page hash and state hash

A body object is the blocks of a large segment and nothing else; the segment then has no blocks and names it.

Invariants are in `segment_header.validate`, which encoder and decoder call. Whatever does not hold is a CorruptionError that names the
object. The names of `block`, `page`, `segment_header` and `segment_reader` that users of segments need are offered here, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

from .block import (
    BLOCK_BYTES,
    Mapper,
    corrupt,
    encode_block,
    encode_blocks,
    pages_per_block,
    read_blocks,
    read_tables,
    rows_of,
    split,
)
from .page import Page, lock_page, page_hash, state_hash
from .segment_header import (
    DIGEST_SIZE,
    HEAD_SIZE,
    INLINE_LIMIT,
    LISTED_ROWS,
    MAX_ROWS,
    SEGMENT_LIMIT,
    WRITER_ID_SIZE,
    Body,
    CommitRecord,
    SegmentHeader,
    check_tables,
    decode_head,
    head_lengths,
    pack_head,
    pack_tables,
    validate,
)
from .segment_reader import read, read_body
from .zstd import FormatError, compress

__all__ = [
    "BLOCK_BYTES",
    "HEAD_SIZE",
    "INLINE_LIMIT",
    "LISTED_ROWS",
    "MAX_ROWS",
    "SEGMENT_LIMIT",
    "WRITER_ID_SIZE",
    "Body",
    "CommitRecord",
    "Mapper",
    "Page",
    "Segment",
    "SegmentHeader",
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


@dataclass(frozen=True, slots=True)
class Segment:
    """A decoded segment. Its checksum, head and tables are verified. `pages` verifies each page before it returns it."""

    header: SegmentHeader
    name: str
    _blocks: memoryview = field(repr=False)

    def pages(self) -> Iterator[Page]:
        """Return the pages in the segment itself, ascending.

        Raises:
            ValueError: they are in a body (`header.body`): use `read_body`.
            CorruptionError: a page does not match its hash.
        """
        return (page for block in self.blocks() for page in block)

    def blocks(self, *, mapped: Mapper = map) -> Iterator[list[Page]]:
        """Return the pages in the segment itself, block by block. Otherwise as `pages`.

        32 MB of blocks may decompress to a thousand times as much. Only one block is unpacked at a time, or as many as `mapped` works on
        at once.
        """
        self._refuse_body()
        return read_blocks((self._blocks,), self.header.page_size, name=self.name, mapped=mapped)

    def tables(self) -> Iterator[tuple[int, int]]:
        """Return (page number, page hash) of the pages in the segment itself, without decompressing them. ValueError with a body."""
        self._refuse_body()
        return (row for table in read_tables((self._blocks,), self.header.page_size, name=self.name) for row in table)

    def _refuse_body(self) -> None:
        if self.header.body is not None:
            raise ValueError(f"the pages of {self.name} are in its body, {self.header.body.name}")


def encode(header: SegmentHeader, blocks: Sequence[bytes] = ()) -> bytes:
    """Return the segment object. `blocks` come from `encode_block`; there are none if `header.body` names the object that has them.

    Everything that the decoder checks without the pages is checked here, so that what is returned can be decoded.

    Raises:
        ValueError: header and blocks contradict each other or an invariant, or the segment would exceed SEGMENT_LIMIT.
    """
    validate(header)
    if header.body is None:
        check_tables(header, (rows_of(block) for view in blocks for block in split((view,), header.page_size)))
    elif blocks:
        raise FormatError("blocks in a segment whose pages are in a body")
    raw = pack_tables(header)
    tables = compress(raw, 3)
    blocks_length = sum(map(len, blocks))
    head = pack_head(header, len(tables), len(raw), blocks_length)
    parts = [head, sha256(head + tables).digest()[:8], tables, *blocks]
    data = b"".join(parts)
    if len(data) + DIGEST_SIZE > SEGMENT_LIMIT:
        raise FormatError(f"a segment of more than {SEGMENT_LIMIT} bytes: its pages belong in a body")
    return data + sha256(data).digest()


def decode(data: bytes, *, name: str) -> Segment:
    """Return the segment in `data`, the whole object. `name` is its key, for errors.

    Everything is verified but the content of the pages, which `Segment.pages` verifies one by one.

    Raises:
        CorruptionError: `data` is not a valid segment, or has a newer format.
    """
    try:
        tables_length, raw_length, blocks_length = head_lengths(data)
        expected = HEAD_SIZE + tables_length + blocks_length + DIGEST_SIZE
        if len(data) != expected:
            raise FormatError(f"{len(data)} bytes where {expected} are expected")
        view = memoryview(data)
        if sha256(view[:-DIGEST_SIZE]).digest() != data[-DIGEST_SIZE:]:
            raise FormatError("its checksum is wrong")
        header = decode_head(view, tables_length, raw_length, blocks_length)
        blocks = view[HEAD_SIZE + tables_length : -DIGEST_SIZE]
        if header.body is None:
            check_tables(header, map(rows_of, split((blocks,), header.page_size)))
    except FormatError as error:
        raise corrupt(name, error) from error
    return Segment(header, name, blocks)


def head_length(data: bytes, *, name: str) -> int:
    """Return how many bytes `decode_header` needs. `data` has at least the first HEAD_SIZE bytes. CorruptionError as `decode`."""
    try:
        return HEAD_SIZE + head_lengths(data)[0]
    except FormatError as error:
        raise corrupt(name, error) from error


def decode_header(data: bytes, *, name: str) -> SegmentHeader:
    """Return the header, verified, from at least the first `head_length` bytes of the object. CorruptionError as `decode`."""
    try:
        return decode_head(memoryview(data), *head_lengths(data))
    except FormatError as error:
        raise corrupt(name, error) from error
