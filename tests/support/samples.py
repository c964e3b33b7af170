"""What the tests of the formats share: made-up pages and segments, and damage done to bytes."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator
from typing import TypeVar

from hypothesis import strategies as st

from bottomless_wal.core.errors import CorruptionError
from bottomless_wal.formats.block import encode_blocks
from bottomless_wal.formats.page import Page, lock_page, page_hash
from bottomless_wal.formats.segment import HEAD_SIZE, Body, CommitRecord, SegmentHeader
from bottomless_wal.formats.wal import WalPosition

PAGE_SIZES = tuple(512 << n for n in range(8))
WRITER = bytes(range(16))
U32, U64, TXID = 2**32 - 1, 2**64 - 1, 2**63 - 1

T = TypeVar("T")


def content(seed: int, page_size: int) -> bytes:
    """A page that depends on nothing but its arguments: half noise, half text, as pages are."""
    noise = b"".join(hashlib.sha256(struct.pack(">QI", seed, n)).digest() for n in range(page_size // 64))
    return (noise + f"row {seed} of a table, ".encode() * page_size)[:page_size]


def page(pgno: int, page_size: int, seed: int | None = None) -> Page:
    data = content(pgno if seed is None else seed, page_size)
    return Page(pgno, page_hash(pgno, data), data)


def xor(pages: list[Page]) -> int:
    state = 0
    for each in pages:
        state ^= each.hash
    return state


def header(pages: list[Page], page_size: int, **changes: object) -> SegmentHeader:
    """A sound header for `pages`: a commit 5 -> 6 unless `changes` say otherwise."""
    fields: dict[str, object] = {
        "pre": 5,
        "post": 6,
        "pre_hash": 0x1111111111111111,
        "post_hash": 0x2222222222222222,
        "page_size": page_size,
        "db_size": max([each.pgno for each in pages], default=1),
        "page_count": len(pages),
        "reset": False,
        "view_txid": 5,
        "time_ms": 1_700_000_000_123,
        "writer": WRITER,
        "positions": (WalPosition(1, 2, 3, 4, 5),),
    }
    fields.update(changes)
    fields.setdefault("commits", (CommitRecord(fields["post"], fields["post_hash"], fields["time_ms"]),))  # type: ignore[arg-type]
    return SegmentHeader(**fields)  # type: ignore[arg-type]


def body_of(pages: list[Page], page_size: int, name: str = "body/x") -> tuple[bytes, Body]:
    data = b"".join(encode_blocks(pages, page_size))
    return data, Body(name, len(data), hashlib.sha256(data).digest())


def reseal(data: bytes) -> bytes:
    """Mends both checksums of a segment, so that what stands under them is looked at."""
    (tables,) = struct.unpack_from(">I", data, 88)
    head = hashlib.sha256(data[:120] + data[HEAD_SIZE : HEAD_SIZE + tables]).digest()[:8]
    mended = data[:120] + head + data[HEAD_SIZE:-32]
    return mended + hashlib.sha256(mended).digest()


def patch(data: bytes, offset: int, new: bytes) -> bytes:
    return data[:offset] + new + data[offset + len(new) :]


def attempt(decoder: Callable[[], T]) -> T | CorruptionError:
    """What it gives, or the CorruptionError it raises; any other exception is a failure of the test."""
    try:
        return decoder()
    except CorruptionError as error:
        return error


def flips(data: bytes, masks: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 255)) -> Iterator[tuple[int, bytes]]:
    """Every copy of `data` with one bit, or one whole byte, inverted."""
    for at in range(len(data)):
        for mask in masks:
            yield at, patch(data, at, bytes((data[at] ^ mask,)))


positions = st.builds(WalPosition, *[st.integers(0, U32)] * 5)


@st.composite
def segments(draw: st.DrawFn, *, body: bool = False) -> tuple[SegmentHeader, list[Page]]:
    """Sound headers with their pages: commits, merges, snapshots, resets; all page sizes; numbers up to their limits."""
    page_size = draw(st.sampled_from(PAGE_SIZES))
    lock = lock_page(page_size)
    reset = draw(st.booleans())
    pre = draw(st.one_of(st.just(0), st.integers(0, TXID - 10)))
    if reset or pre == 0:
        db_size = draw(st.integers(1 if body else 0, 6))
        numbers = list(range(1, db_size + 1))
    else:
        near_lock = st.integers(lock - 3, lock + 3)
        picked = draw(st.sets(st.one_of(st.integers(1, 50), near_lock, st.just(U32 - 1)), min_size=int(body), max_size=8))
        numbers = sorted(picked - {lock})
        if body and not numbers:
            numbers = [1]
        db_size = draw(st.integers(max([*numbers, 1]), U32 - 1))
    seeds = draw(st.lists(st.integers(0, U64), min_size=len(numbers), max_size=len(numbers)))
    pages = [page(pgno, page_size, seed) for pgno, seed in zip(numbers, seeds, strict=True)]
    post_hash = xor(pages) if reset or pre == 0 else draw(st.integers(0, U64))
    txids = sorted(draw(st.sets(st.integers(pre + 1, min(pre + 1000, TXID)), min_size=1, max_size=5)))
    times = st.integers(0, TXID)
    commits = [CommitRecord(txid, draw(st.integers(0, U64)), draw(times)) for txid in txids]
    commits[-1] = commits[-1]._replace(post=post_hash)
    made = header(
        pages,
        page_size,
        pre=pre,
        post=txids[-1],
        pre_hash=0 if pre == 0 else draw(st.integers(0, U64)),
        post_hash=post_hash,
        db_size=db_size,
        reset=reset,
        view_txid=draw(st.integers(0, TXID)),
        time_ms=draw(times),
        writer=draw(st.binary(min_size=16, max_size=16)),
        commits=tuple(commits),
        positions=tuple(draw(st.lists(positions, max_size=4))),
        body=body_of(pages, page_size)[1] if body else None,
    )
    return made, pages
