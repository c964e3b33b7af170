"""Decode segments and bodies from chunks, without holding them whole: pages are returned block by block. No I/O.

Each page is verified before it is returned. The checksum, the number of pages and the state hash of a whole edge are verified only at
the end, before the iterator is exhausted. Callers must not make the pages permanent before that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import sha256

from .block import Mapper, corrupt, rows_of, split, unpack
from .page import Page
from .segment_header import DIGEST_SIZE, HEAD_SIZE, Body, SegmentHeader, Tally, decode_head, head_lengths
from .zstd import Bytes, FormatError

__all__ = ["read", "read_body"]


def read(chunks: Iterable[Bytes], *, name: str) -> tuple[SegmentHeader, Iterator[list[Page]]]:
    """Return the header of a segment and an iterator over the pages of each block; no page if the pages are in a body.

    Args:
        chunks: the bytes of the object, cut anywhere.
        name: its key, for errors.

    Raises:
        CorruptionError: as `segment.decode`, here or while iterating.
    """
    source = _Source(chunks)
    try:
        head = source.take(HEAD_SIZE)
        tables_length, raw_length, blocks_length = head_lengths(head)
        header = decode_head(memoryview(head + source.take(tables_length)), tables_length, raw_length, blocks_length)
    except FormatError as error:
        raise corrupt(name, error) from error

    def blocks() -> Iterator[list[Page]]:
        try:
            tally = Tally(header)
            for block in split(source.pieces(blocks_length), header.page_size):
                rows = rows_of(block)
                tally.add(rows)
                yield unpack(block, rows, header.page_size)
            digest = source.digest.digest()
            if source.take(DIGEST_SIZE) != digest or source.rest():
                raise FormatError("its checksum is wrong")
            if header.body is None:
                tally.finish()
        except FormatError as error:
            raise corrupt(name, error) from error

    return header, blocks()


class _Source:
    """A reader of chunks. `digest` is the SHA-256 of all bytes that were taken."""

    def __init__(self, chunks: Iterable[Bytes]) -> None:
        self.digest = sha256()
        self._chunks = iter(chunks)
        self._left = memoryview(b"")

    def pieces(self, length: int) -> Iterator[memoryview]:
        """Yield the next `length` bytes, in pieces as the chunks are cut."""
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
        """Return whether there are more bytes."""
        while not self._left:
            chunk = next(self._chunks, None)
            if chunk is None:
                return False
            self._left = memoryview(chunk)
        return True


def read_body(header: SegmentHeader, chunks: Iterable[Bytes], *, name: str, mapped: Mapper = map) -> Iterator[list[Page]]:
    """Yield the pages of each block of the body that `header` names.

    Args:
        header: the header of the segment.
        chunks: the bytes of the body, cut anywhere.
        name: the key of the body, for errors.
        mapped: a function like `map`, perhaps one that uses threads.

    Raises:
        ValueError: `header` names no body.
        CorruptionError: as `read_blocks`, or the object is not the one that `header` names.
    """
    if header.body is None:
        raise ValueError("the segment has no body")
    return _read_body(header, header.body, chunks, name, mapped)


def _read_body(header: SegmentHeader, body: Body, chunks: Iterable[Bytes], name: str, mapped: Mapper) -> Iterator[list[Page]]:
    size, digest = 0, sha256()

    def hashed() -> Iterator[Bytes]:
        nonlocal size
        for chunk in chunks:
            size += len(chunk)
            if size > body.size:
                raise FormatError(f"more than the {body.size} bytes that its segment tells")
            digest.update(chunk)
            yield chunk

    try:
        tally = Tally(header)

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
