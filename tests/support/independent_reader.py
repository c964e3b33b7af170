"""The bucket as a stranger sees it: plain boto3 (or files), zstandard, and the formats as they are documented. Nothing of the package.

`log_image` replays the log, `view_image` lays the page objects side by side; both give the bytes that the database file must have.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import urllib.parse
from typing import Any, NamedTuple, Protocol

import zstandard

_HEAD = struct.Struct(">8sHHIQQQQIIQQ16sIIQ16s")
_BLOCK = struct.Struct(">II")
_ENTRY = struct.Struct(">IQ")
_TRAILER = struct.Struct(">4sHHIIQQQI4x")


class Place(Protocol):
    """Where a test's store is: `endpoints.Endpoint`, or anything with these."""

    @property
    def kind(self) -> str: ...
    @property
    def url(self) -> str: ...
    @property
    def bucket(self) -> str: ...


class Bucket:
    """One bucket, seen from outside."""

    def __init__(self, place: Place) -> None:
        self._root: str | None = None
        self._client: Any = None
        self._bucket = place.bucket
        if place.url.startswith("file:"):
            self._root = os.path.join(urllib.parse.unquote(urllib.parse.urlsplit(place.url).path), place.bucket)
        else:
            import boto3
            from botocore.config import Config

            # A session of its own: the default one keeps the credentials that it found first.
            self._client = boto3.Session().client(
                "s3",
                endpoint_url=place.url,
                region_name="us-east-1",
                config=Config(
                    s3={"addressing_style": "path"},
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required",
                ),
            )

    def listing(self, prefix: str = "") -> list[str]:
        """All keys that begin with `prefix`, sorted; none if there is no bucket."""
        if self._root is not None:
            found = [
                os.path.relpath(os.path.join(directory, file), self._root) for directory, _, files in os.walk(self._root) for file in files
            ]
            return sorted(key for key in found if key.startswith(prefix) and not key.startswith(".tmp/"))
        try:
            pages = list(self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix))
        except self._client.exceptions.NoSuchBucket:
            return []
        return sorted(row["Key"] for page in pages for row in page.get("Contents", ()))

    def get(self, key: str) -> bytes:
        if self._root is not None:
            with open(os.path.join(self._root, key), "rb") as file:
                return file.read()
        body: bytes = self._client.get_object(Bucket=self._bucket, Key=key)["Body"].read()
        return body

    def put(self, key: str, data: bytes) -> None:
        if self._root is not None:
            path = os.path.join(self._root, key)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                file.write(data)
        else:
            self._client.put_object(Bucket=self._bucket, Key=key, Body=data)

    def delete(self, key: str) -> None:
        if self._root is not None:
            os.unlink(os.path.join(self._root, key))
        else:
            self._client.delete_object(Bucket=self._bucket, Key=key)

    def make(self) -> None:
        """Makes the bucket."""
        if self._root is not None:
            os.makedirs(self._root, exist_ok=True)
        else:
            self._client.create_bucket(Bucket=self._bucket)

    def content(self) -> dict[str, bytes]:
        """Every object: to compare before and after."""
        return {key: self.get(key) for key in self.listing()}

    # --- of one database -----------------------------------------------------------------------------------------------

    def edges(self, name: str) -> list[tuple[int, int]]:
        """(pre, post) of every segment of the database `name`, ascending."""
        found = (re.fullmatch(re.escape(name) + "-wal/([0-9a-f]{16})-([0-9a-f]{16})", key) for key in self.listing(f"{name}-wal/"))
        return sorted((int(match[1], 16), int(match[2], 16)) for match in found if match)

    def head(self, name: str) -> int:
        """The highest txid, 0 without a log."""
        return max((post for _, post in self.edges(name)), default=0)

    def segment(self, name: str, pre: int, post: int) -> Segment:
        return read_segment(self.get(f"{name}-wal/{pre:016x}-{post:016x}"), lambda suffix: self.get(f"{name}-wal/{suffix}"))

    def page_numbers(self, name: str) -> list[int]:
        """Which pages have an object."""
        found = (re.fullmatch(re.escape(name) + r"-(\d{12})", key) for key in self.listing(f"{name}-0"))
        return [int(match[1]) for match in found if match and int(match[1])]

    def log_image(self, name: str, upto: int | None = None) -> bytes:
        """The database file that the commits 0 -> 1 -> ... give, every hash and link looked at."""
        pages: dict[int, bytes] = {}
        state, txid, page_size, size = 0, 0, 0, 0
        for pre, post in self.edges(name):
            if upto is not None and post > upto:
                break
            if pre < txid:
                continue  # a merged one, of commits that are all there
            edge = self.segment(name, pre, post)
            assert (edge.pre, edge.post) == (pre, post)
            assert pre == txid, f"gap: {txid} -> {pre}"
            assert edge.pre_hash == state, f"edge {pre}-{post} does not follow"
            if edge.reset or pre == 0:
                pages = {}
            else:
                assert edge.page_size == page_size
            pages.update(edge.pages)
            page_size, size, txid = edge.page_size, edge.db_size, post
            pages = {pgno: page for pgno, page in pages.items() if pgno <= size}
            state = 0
            for pgno, page in pages.items():
                state ^= page_hash(pgno, page)
            assert edge.post_hash == state, f"edge {pre}-{post} gives {state:016x}, not {edge.post_hash:016x}"
        return _image(pages, page_size, size)

    def view_image(self, name: str) -> bytes:
        """The database file that the page objects are, every trailer looked at; asserts that they are one whole state."""
        pages: dict[int, bytes] = {}
        newest = (-1, 0, 0)
        for pgno in self.page_numbers(name):
            page, trailer = read_page_object(self.get(f"{name}-{pgno:012d}"))
            assert (trailer.pgno, trailer.page_size, trailer.hash) == (pgno, len(page), page_hash(pgno, page))
            pages[pgno] = page
            newest = max(newest, (trailer.txid, trailer.db_size, trailer.post_hash))
        _, size, post_hash = newest
        page_size = len(pages[1])
        pages = {pgno: page for pgno, page in pages.items() if pgno <= size}
        state = 0
        for pgno, page in pages.items():
            state ^= page_hash(pgno, page)
        assert state == post_hash, "the page objects are no single state"
        return _image(pages, page_size, size)


class Segment(NamedTuple):
    """What a segment object says."""

    pre: int
    post: int
    pre_hash: int
    post_hash: int
    page_size: int
    db_size: int
    reset: bool
    view_txid: int
    commits: list[tuple[int, int, int]]
    positions: list[bytes]
    pages: dict[int, bytes]
    body: str | None


class Trailer(NamedTuple):
    """What the skippable frame of a page object says."""

    page_size: int
    pgno: int
    txid: int
    hash: int
    post_hash: int
    db_size: int


def page_hash(pgno: int, page: bytes) -> int:
    return int.from_bytes(hashlib.sha256(struct.pack(">I", pgno) + page).digest()[:8], "big")


def read_segment(data: bytes, get_body: Any) -> Segment:
    assert hashlib.sha256(data[:-32]).digest() == data[-32:]
    (
        magic, version, flags, page_size, pre, post, pre_hash, post_hash, db_size, count, view_txid, _time, _writer,
        packed, _unpacked, blocks, _reserved,
    ) = _HEAD.unpack_from(data)  # fmt: skip
    assert (magic, version) == (b"BWALSEG\0", 1)
    tables = zstandard.ZstdDecompressor().decompress(data[128 : 128 + packed])
    (rows,) = struct.unpack_from(">I", tables)
    commits = [struct.unpack_from(">QQQ", tables, 4 + 24 * row) for row in range(rows)]
    at = 4 + 24 * rows
    (rows,) = struct.unpack_from(">I", tables, at)
    positions = [tables[at + 4 + 20 * row : at + 24 + 20 * row] for row in range(rows)]
    at += 4 + 20 * rows
    body = data[128 + packed : 128 + packed + blocks]
    suffix: str | None = None
    if flags & 2:
        (length,) = struct.unpack_from(">H", tables, at)
        suffix = tables[at + 2 : at + 2 + length].decode()
        size, digest = struct.unpack_from(">Q32s", tables, at + 2 + length)
        body = get_body(suffix)
        assert (len(body), hashlib.sha256(body).digest()) == (size, digest)
    pages = _pages(body, page_size)
    assert len(pages) == count
    return Segment(
        pre, post, pre_hash, post_hash, page_size, db_size, bool(flags & 1), view_txid, commits, positions, pages, suffix
    )  # fmt: skip


def _pages(data: bytes, page_size: int) -> dict[int, bytes]:
    pages: dict[int, bytes] = {}
    at = 0
    while at < len(data):
        count, packed = _BLOCK.unpack_from(data, at)
        entries = [_ENTRY.unpack_from(data, at + 8 + 12 * row) for row in range(count)]
        start = at + 8 + 12 * count
        content = zstandard.ZstdDecompressor().decompress(data[start : start + packed])
        assert len(content) == count * page_size
        for row, (pgno, stated) in enumerate(entries):
            page = content[row * page_size : (row + 1) * page_size]
            assert page_hash(pgno, page) == stated
            assert pgno > max(pages, default=0), "page numbers must ascend"
            pages[pgno] = page
        at = start + packed
    return pages


def read_page_object(data: bytes) -> tuple[bytes, Trailer]:
    page = zstandard.ZstdDecompressor().decompress(data)  # the skippable frame is passed over
    magic, length = struct.unpack_from("<II", data, len(data) - 64)
    assert (magic, length) == (0x184D2A5B, 56)
    name, version, _, *fields = _TRAILER.unpack_from(data, len(data) - 56)
    assert (name, version) == (b"BWPG", 1)
    assert hashlib.sha256(data[-56:-8]).digest()[:8] == data[-8:]
    return page, Trailer(*fields)


def _image(pages: dict[int, bytes], page_size: int, size: int) -> bytes:
    """The pages side by side; the lock-byte page, which no one stores, is zeros."""
    lock = 0x40000000 // page_size + 1 if page_size else 0
    missing = [pgno for pgno in range(1, size + 1) if pgno not in pages and pgno != lock]
    assert not missing, f"pages {missing[:5]} are missing"
    assert lock not in pages
    empty = bytes(page_size)
    return b"".join(pages.get(pgno, empty) for pgno in range(1, size + 1))
