"""Encode and decode page objects: the latest committed content of one page, with a trailer that describes it. No I/O.

    zstd frame of the page (content size in it, zstd's checksum on) | zstd skippable frame (64 bytes)

`zstd -d` of the object gives the page and nothing else, because decompressors skip a skippable frame. Its first two fields are
little-endian, as zstd requires, and the others big-endian:

    offset
      0  4  0x184D2A5B (little-endian)               4  4  length of what follows: 56 (little-endian)
      8  4  magic "BWPG"                            12  2  version: 1               14  2  reserved: 0
     16  4  page size, bytes                        20  4  page number
     24  8  txid of the commit that wrote it        32  8  page hash (`block.page_hash`)
     40  8  state hash after that commit            48  4  size of the database after it, pages
     52  4  reserved: 0
     56  8  first 8 bytes of the SHA-256 of bytes 8..55

An object without the second frame is a valid page object without a trailer (written by another program, or by `zstd page`).
"""

from __future__ import annotations

import hashlib
import struct
from typing import Final, NamedTuple

from ..core.errors import CorruptionError
from .page import page_hash
from .zstd import Bytes, FormatError, compress, decompress

__all__ = ["PAGE_OBJECT_LIMIT", "PageTrailer", "decode_page_object", "encode_page_object"]

PAGE_OBJECT_LIMIT: Final = 128 << 10  # no page object is larger

_PAGE_LIMIT: Final = 65536
_VERSION: Final = 1
_PREAMBLE: Final = struct.pack("<II", 0x184D2A5B, 56) + b"BWPG"
_FIELDS: Final = struct.Struct(">4sHHIIQQQI4x")
_SIZE: Final = 8 + _FIELDS.size + 8
_NEWER_HINT: Final = "Upgrade bottomless-wal."
_DAMAGED_HINT: Final = "`bottomless-wal verify --repair-view DB` writes the page anew from the log, which alone is authoritative."


class PageTrailer(NamedTuple):
    """The description of a page in its page object. `page_size` in bytes, `db_size` in pages."""

    page_size: int
    pgno: int
    txid: int
    page_hash: int
    post_hash: int
    db_size: int


def encode_page_object(page: Bytes, trailer: PageTrailer, level: int = 3) -> bytes:
    """Return the object of a page. The hash in the trailer is not verified.

    Raises:
        ValueError: the trailer is for a page of another size, or one of its fields is out of range.
    """
    if len(page) != trailer.page_size or not _is_page_size(len(page)):
        raise FormatError(f"a page of {len(page)} bytes with a trailer that says {trailer.page_size}")
    try:
        fields = _FIELDS.pack(b"BWPG", _VERSION, 0, *trailer)
    except struct.error as error:
        raise FormatError(f"a field of {trailer} is out of range: {error}") from error
    return b"".join((compress(page, level, checksum=True), _PREAMBLE[:8], fields, hashlib.sha256(fields).digest()[:8]))


def decode_page_object(data: bytes, *, name: str, pgno: int) -> tuple[bytes, PageTrailer | None]:
    """Return the page in `data` and its trailer; None without a trailer.

    Args:
        data: the object.
        name: its key.
        pgno: the page number in its key.

    Raises:
        CorruptionError: `data` is not a page object, has a newer format, or its trailer contradicts the page or `pgno`.
    """
    try:
        fields = data[-_SIZE + 8 : -8] if data[-_SIZE : -_SIZE + len(_PREAMBLE)] == _PREAMBLE else None
        page = decompress(data[:-_SIZE] if fields is not None else data, _PAGE_LIMIT, exact=False)
        if not _is_page_size(len(page)):
            raise FormatError(f"{len(page)} bytes are no page")
        if fields is None:
            return page, None
        if hashlib.sha256(fields).digest()[:8] != data[-8:]:
            raise FormatError("the checksum of its trailer is wrong")
        _, version, reserved, *rest = _FIELDS.unpack(fields)
        if version > _VERSION or reserved or any(fields[-4:]):
            raise CorruptionError.about(name, f"format version {version} is newer than this program", hint=_NEWER_HINT, key=name)
        trailer = PageTrailer(*rest)
        if version != _VERSION or trailer.page_size != len(page) or trailer.pgno != pgno:
            raise FormatError(f"the trailer tells of page {trailer.pgno} with {trailer.page_size} bytes (version {version})")
        if page_hash(pgno, page) != trailer.page_hash:
            raise FormatError("the page is not what its hash says")
    except FormatError as error:
        raise CorruptionError.about(f"{name} is not sound", str(error), hint=_DAMAGED_HINT, key=name) from error
    return page, trailer


def _is_page_size(size: int) -> bool:
    return 512 <= size <= _PAGE_LIMIT and size & (size - 1) == 0
