"""Blocks of pages, which segments and their bodies are made of, and the hashes that name a page and a state. No I/O.

All integers are big-endian and unsigned.

    block
      4  n, the number of pages                           4  length of the zstd frame
     12  n times: page number 4, page hash 8
         one zstd frame: the n pages, concatenated; at most 1 MiB (written: 256 KiB) uncompressed

    page hash   first 8 bytes of SHA-256 over the page number (4 bytes) and the page
    state hash  XOR of the hashes of all pages but the one at offset 0x40000000 (SQLite's lock byte, never stored);
                0 for the empty database. It guards against accident, not against forgery.

Blocks follow each other without a gap, and page numbers ascend strictly through all of them. A reader bounds each block by
its first 8 bytes before it gathers or allocates anything, and hands out no page that is not what its hash says.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Final, NamedTuple, Protocol, TypeVar

from .errors import CorruptionError
from .zstd import Bytes, FormatError, NewerFormatError, compress, decompress

__all__ = [
    "BLOCK_BYTES",
    "Mapper",
    "Page",
    "ascending",
    "check_growth",
    "corrupt",
    "encode_block",
    "encode_blocks",
    "lock_page",
    "page_hash",
    "pages_between",
    "pages_per_block",
    "read_blocks",
    "read_tables",
    "repr_in_hex",
    "rows_of",
    "split",
    "state_hash",
    "unpack",
]

BLOCK_BYTES: Final = 256 << 10  # pages in one block, uncompressed

_BLOCK_LIMIT: Final = 1 << 20
_BLOCK: Final = struct.Struct(">II")
_ROW: Final = struct.Struct(">IQ")
_PGNO: Final = struct.Struct(">I")

T = TypeVar("T")
R = TypeVar("R")

_sha256 = hashlib.sha256
_pack_pgno = _PGNO.pack
_from_bytes = int.from_bytes


class Page(NamedTuple):
    """A page's number (1-based), its `page_hash`, its content."""

    pgno: int
    hash: int
    data: bytes


def page_hash(pgno: int, page: Bytes) -> int:
    """The hash of page `pgno` (1-based) with the content `page`: 64 bits."""
    return _from_bytes(_sha256(_pack_pgno(pgno) + page).digest()[:8], "big")


def repr_in_hex(name: str) -> Callable[[type[T]], type[T]]:
    """Return a class decorator for a dataclass or a named tuple: its repr shows the field `name`, a hash, as 16 hex digits."""

    def decorated(cls: type[T]) -> type[T]:
        names = getattr(cls, "_fields", None) or [field.name for field in dataclasses.fields(cls) if field.repr]  # type: ignore[arg-type]

        def shown(self: T) -> str:
            values = ((known, getattr(self, known)) for known in names)
            texts = (f"{known}={value:#018x}" if known == name else f"{known}={value!r}" for known, value in values)
            return f"{cls.__qualname__}({', '.join(texts)})"

        cls.__repr__ = shown  # type: ignore[assignment, method-assign]
        return cls

    return decorated


def state_hash(page_size: int, pages: Iterable[tuple[int, Bytes]]) -> int:
    """The state hash of a database of the given pages (number, content), the lock page passed over; 0 without pages."""
    lock, state = lock_page(page_size), 0
    for pgno, page in pages:
        if pgno != lock:
            state ^= page_hash(pgno, page)
    return state


def lock_page(page_size: int) -> int:
    """The number of the page at offset 0x40000000, which SQLite never uses: it is neither stored nor hashed."""
    return 0x40000000 // page_size + 1


def pages_between(before: int, after: int, page_size: int) -> int:
    """How many pages, the lock page aside, a database of `after` pages has beyond the first `before`."""
    return max(0, after - before - (before < lock_page(page_size) <= after))


def check_growth(name: str, before: int, after: int, grown: int, page_size: int) -> None:
    """A size is believed only with the pages to match: what walks over all pages of a database must come to an end.

    The edge `name` leads from `before` to `after` pages, and `grown` of its pages are beyond the first `before`.

    Raises:
        CorruptionError: they are not all that it grew by.
    """
    if grown != pages_between(before, after, page_size):
        raise CorruptionError(
            f"{name} says that the database grew from {before} to {after} pages, and has {grown} new ones",
            hint="`bottomless-wal verify DB` shows what can still be restored.",
        )


def pages_per_block(page_size: int) -> int:
    """How many pages the encoder puts into one block."""
    return max(1, BLOCK_BYTES // page_size)


def encode_block(pages: Sequence[Page], page_size: int, *, level: int = 3) -> bytes:
    """One block of 1 to `pages_per_block(page_size)` pages, ascending; their hashes are taken as they are.

    Raises:
        ValueError: no page or too many, a page of another size, out of order, or a number out of range.
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
    """The blocks of any number of pages, ascending; no more than one block's pages are held."""
    source, width = iter(pages), pages_per_block(page_size)
    while batch := list(islice(source, width)):
        yield encode_block(batch, page_size, level=level)


class Mapper(Protocol):
    """What `map` does; other ones do it in several threads."""

    def __call__(self, function: Callable[[T], R], items: Iterable[T], /) -> Iterable[R]: ...


def read_blocks(chunks: Iterable[Bytes], page_size: int, *, name: str, mapped: Mapper = map) -> Iterator[list[Page]]:
    """The pages of each block; `chunks` are the blocks' bytes, cut anywhere. At most two chunks and a block are held.

    Raises:
        CorruptionError: a page is not what its hash says, pages are out of order, the bytes end within a block, ...
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
    """(page number, page hash) of each block's pages, nothing decompressed. Otherwise as `read_blocks`."""
    try:
        last = 0
        for block in split(chunks, page_size):
            rows = rows_of(block)
            last = ascending(rows, last)
            yield rows
    except FormatError as error:
        raise corrupt(name, error) from error


def ascending(rows: Sequence[tuple[int, int]], last: int) -> int:
    """The last page number of `rows`; FormatError unless they ascend, from above `last`."""
    for pgno, _ in rows:
        if pgno <= last:
            raise FormatError(f"page {pgno} after page {last}")
        last = pgno
    return last


def split(chunks: Iterable[Bytes], page_size: int) -> Iterator[memoryview]:
    """Whole blocks out of chunks that are cut anywhere; one that is declared too long is refused before it is gathered."""
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
    """(page number, page hash) of the pages in a whole block."""
    count, _ = _BLOCK.unpack_from(block)
    return list(_ROW.iter_unpack(block[_BLOCK.size : _BLOCK.size + _ROW.size * count]))


def unpack(block: memoryview, rows: Sequence[tuple[int, int]], page_size: int) -> list[Page]:
    """The pages of a whole block with these `rows`, decompressed and verified."""
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
    """The error that names the object, out of the one that says what is wrong with it."""
    if isinstance(error, NewerFormatError):
        return CorruptionError(f"{name}: {error}", hint="Upgrade bottomless-wal.")
    return CorruptionError(
        f"{name} is not sound: {error}",
        hint="The object was damaged, or is not of this program. `bottomless-wal verify DB` shows what can still be restored.",
    )
