"""Blocks of pages, which segments and their bodies are made of. No I/O.

All integers are big-endian and unsigned.

    block
      4  n, the number of pages                           4  length of the zstd frame
     12  n times: page number 4, page hash 8
         one zstd frame: the n pages, concatenated; at most 1 MiB (written: 256 KiB) uncompressed

Blocks follow each other without a gap, and page numbers ascend strictly through all of them. A reader bounds each block by
its first 8 bytes before it gathers or allocates anything, and hands out no page that is not what its hash says.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Final, Protocol, TypeVar

from ..core.errors import CorruptionError
from .page import Page, page_hash, pages_between
from .zstd import Bytes, FormatError, NewerFormatError, compress, decompress

__all__ = [
    "BLOCK_BYTES",
    "Mapper",
    "ascending",
    "check_growth",
    "corrupt",
    "encode_block",
    "encode_blocks",
    "pages_per_block",
    "read_blocks",
    "read_tables",
    "rows_of",
    "split",
    "unpack",
]

BLOCK_BYTES: Final = 256 << 10  # pages in one block, uncompressed

_BLOCK_LIMIT: Final = 1 << 20
_BLOCK: Final = struct.Struct(">II")
_ROW: Final = struct.Struct(">IQ")

T = TypeVar("T")
R = TypeVar("R")


def check_growth(name: str, before: int, after: int, grown: int, page_size: int) -> None:
    """Check that a segment has every page by which the database grew.

    Otherwise a wrong size in a header could make a loop over all pages of a database endless.

    Args:
        name: the key of the segment.
        before: the size of the database before it, pages.
        after: the size of the database after it, pages.
        grown: the number of its pages beyond the first `before`.
        page_size: bytes.

    Raises:
        CorruptionError: the database grew by more or fewer pages.
    """
    if grown != pages_between(before, after, page_size):
        raise CorruptionError.about(
            name,
            f"says that the database grew from {before} to {after} pages, and has {grown} new ones",
            joint=" ",
            hint="`bottomless-wal verify DB` shows what can still be restored.",
            key=name,
            expected=pages_between(before, after, page_size),
            actual=grown,
        )


def pages_per_block(page_size: int) -> int:
    """Return the number of pages that the encoder puts into one block."""
    return max(1, BLOCK_BYTES // page_size)


def encode_block(pages: Sequence[Page], page_size: int, *, level: int = 3) -> bytes:
    """Return one block of 1 to `pages_per_block(page_size)` pages, ascending. Their hashes are not verified.

    Raises:
        ValueError: there is no page or there are too many, or a page has another size, is out of order or has a number out of range.
    """
    if not 1 <= len(pages) <= pages_per_block(page_size):
        raise FormatError(f"{len(pages)} pages of {page_size} bytes do not make a block")
    last = 0
    for pgno, _, data in pages:
        if pgno <= last or len(data) != page_size:
            raise FormatError(f"page {pgno} ({len(data)} bytes) cannot follow page {last} in a block of {page_size}-byte pages")
        last = pgno
    try:
        rows = b"".join([_ROW.pack(pgno, hashed) for pgno, hashed, _ in pages])
    except struct.error as error:
        raise FormatError(f"a page number or hash out of range: {error}") from error
    frame = compress(b"".join([page.data for page in pages]), level)
    return b"".join((_BLOCK.pack(len(pages), len(frame)), rows, frame))


def encode_blocks(pages: Iterable[Page], page_size: int, *, level: int = 3) -> Iterator[bytes]:
    """Yield the blocks of any number of pages, ascending. The pages of one block are in memory at a time."""
    source, width = iter(pages), pages_per_block(page_size)
    while batch := list(islice(source, width)):
        yield encode_block(batch, page_size, level=level)


class Mapper(Protocol):
    """A function like `map`. Other implementations use several threads."""

    def __call__(self, function: Callable[[T], R], items: Iterable[T], /) -> Iterable[R]: ...


def read_blocks(chunks: Iterable[Bytes], page_size: int, *, name: str, mapped: Mapper = map) -> Iterator[list[Page]]:
    """Yield the pages of each block. `chunks` are the bytes of the blocks, cut anywhere.

    At most two chunks and one block are in memory.

    Raises:
        CorruptionError: a page does not match its hash, pages are out of order, the bytes end within a block, ...
    """
    try:
        last = 0

        def opened(block: memoryview) -> tuple[list[tuple[int, int]], list[Page]]:
            rows = rows_of(block)
            return rows, unpack(block, rows, page_size)

        for rows, pages in mapped(opened, split(chunks, page_size)):
            last = ascending(rows, last)
            yield pages
    except FormatError as error:
        raise corrupt(name, error) from error


def read_tables(chunks: Iterable[Bytes], page_size: int, *, name: str) -> Iterator[list[tuple[int, int]]]:
    """Yield (page number, page hash) of the pages of each block, without decompressing them. Otherwise as `read_blocks`."""
    try:
        last = 0
        for block in split(chunks, page_size):
            rows = rows_of(block)
            last = ascending(rows, last)
            yield rows
    except FormatError as error:
        raise corrupt(name, error) from error


def ascending(rows: Sequence[tuple[int, int]], last: int) -> int:
    """Return the last page number of `rows`. FormatError unless all of them ascend, from above `last`."""
    for pgno, _ in rows:
        if pgno <= last:
            raise FormatError(f"page {pgno} after page {last}")
        last = pgno
    return last


def split(chunks: Iterable[Bytes], page_size: int) -> Iterator[memoryview]:
    """Yield whole blocks out of chunks that are cut anywhere. FormatError before a block that is declared too long is gathered."""
    source = iter(chunks)
    view = memoryview(b"")

    def gather(size: int) -> bool:
        nonlocal view
        parts, held = [view] if view else [], len(view)
        while held < size:
            chunk = next(source, None)
            if chunk is None:
                break
            parts.append(memoryview(chunk))
            held += len(chunk)
        view = parts[0] if len(parts) == 1 else memoryview(b"".join(parts))
        return held >= size

    while gather(_BLOCK.size) or view:
        if len(view) < _BLOCK.size:
            raise FormatError("its last block is cut off")
        count, frame_length = _BLOCK.unpack_from(view)
        raw = count * page_size
        if not 0 < raw <= _BLOCK_LIMIT or not 0 < frame_length <= raw + (raw >> 7) + 512:  # zstd's own bound is lower
            raise FormatError(f"a block of {count} pages of {page_size} bytes in {frame_length}")
        length = _BLOCK.size + _ROW.size * count + frame_length
        if not gather(length):
            raise FormatError("its last block is cut off")
        yield view[:length]
        view = view[length:]


def rows_of(block: memoryview) -> list[tuple[int, int]]:
    """Return (page number, page hash) of the pages in a whole block."""
    count, _ = _BLOCK.unpack_from(block)
    return list(_ROW.iter_unpack(block[_BLOCK.size : _BLOCK.size + _ROW.size * count]))


def unpack(block: memoryview, rows: Sequence[tuple[int, int]], page_size: int) -> list[Page]:
    """Return the pages of a whole block with these `rows`, decompressed and verified. FormatError if one does not match its hash."""
    content = decompress(block[_BLOCK.size + _ROW.size * len(rows) :], len(rows) * page_size)
    pages, start = [], 0
    for pgno, hashed in rows:
        data = content[start : start + page_size]
        if page_hash(pgno, data) != hashed:
            raise FormatError(f"page {pgno} is not what its hash says")
        pages.append(Page(pgno, hashed, data))
        start += page_size
    return pages


def corrupt(name: str, error: FormatError) -> CorruptionError:
    """Return a CorruptionError for the object with the key `name`, in which `error` was found."""
    if isinstance(error, NewerFormatError):
        return CorruptionError.about(name, str(error), hint="Upgrade bottomless-wal.", key=name)
    return CorruptionError.about(
        name,
        f"is not sound: {error}",
        joint=" ",
        key=name,
        hint="The object was damaged, or is not of this program. `bottomless-wal verify DB` shows what can still be restored.",
    )
