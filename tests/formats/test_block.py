"""Blocks and hashes: round trips, any chunking, and nothing believed before it is bounded and verified."""

from __future__ import annotations

import hashlib
import struct
import threading
import tracemalloc
from collections.abc import Iterator
from functools import partial

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from bottomless_wal.core.errors import CorruptionError
from bottomless_wal.formats.block import encode_block, encode_blocks, pages_per_block, read_blocks, read_tables
from bottomless_wal.formats.page import Page, lock_page, page_hash, state_hash
from bottomless_wal.formats.segment import SegmentHeader
from tests.support.samples import PAGE_SIZES, attempt, content, flips, page, segments, xor


def read(data: bytes, page_size: int) -> list[Page]:
    return [each for block in read_blocks([data], page_size, name="D-wal/body/x") for each in block]


def test_a_page_hash_is_what_the_table_says() -> None:
    data = content(1, 4096)
    assert page_hash(7, data) == int.from_bytes(hashlib.sha256(b"\0\0\0\x07" + data).digest()[:8], "big")
    assert page_hash(7, memoryview(data)) == page_hash(7, bytearray(data)) == page_hash(7, data)
    assert page_hash(8, data) != page_hash(7, data)


def test_a_state_hash_passes_over_the_lock_page() -> None:
    assert [lock_page(size) for size in (512, 4096, 65536)] == [2097153, 262145, 16385]
    zero = bytes(65536)
    numbers = (16384, 16385, 16386)
    assert state_hash(65536, [(n, zero) for n in numbers]) == page_hash(16384, zero) ^ page_hash(16386, zero)
    assert state_hash(4096, []) == 0


@given(segments())
def test_blocks_give_their_pages_back(sample: tuple[SegmentHeader, list[Page]]) -> None:
    header, pages = sample
    data = b"".join(encode_blocks(iter(pages), header.page_size))
    assert read(data, header.page_size) == pages
    tables = [row for table in read_tables([data], header.page_size, name="x") for row in table]
    assert tables == [(each.pgno, each.hash) for each in pages]
    assert state_hash(header.page_size, ((each.pgno, each.data) for each in pages)) == xor(pages)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_blocks_are_filled_and_the_last_one_holds_the_rest(page_size: int) -> None:
    width = pages_per_block(page_size)
    assert width * page_size == 256 << 10
    pages = [page(n, page_size, seed=n % 3) for n in range(1, 2 * width + 2)]
    blocks = list(encode_blocks(pages, page_size))
    assert [struct.unpack_from(">I", block)[0] for block in blocks] == [width, width, 1]
    assert [len(block) for block in read_blocks(blocks, page_size, name="x")] == [width, width, 1]
    assert read(b"".join(blocks), page_size) == pages


@given(st.lists(st.integers(0, 9000), max_size=12))
def test_chunks_may_be_cut_anywhere(cuts: list[int]) -> None:
    pages = [page(n, 512) for n in (1, 2, 5, 9)]
    data = b"".join(encode_block(pages[start : start + 2], 512) for start in (0, 2))
    ends = sorted({min(cut, len(data)) for cut in cuts} | {len(data)})
    chunks = [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    assert [each for block in read_blocks(chunks, 512, name="x") for each in block] == pages


def test_chunks_may_be_single_bytes_or_empty() -> None:
    pages = [page(n, 512) for n in (1, 2, 5)]
    chunks = [bytes(part) for byte in encode_block(pages, 512) for part in ((byte,), ())]
    assert list(read_blocks(chunks, 512, name="x")) == [pages]
    assert list(read_blocks([], 512, name="x")) == list(read_blocks([b""], 512, name="x")) == []


def test_every_truncation_is_found_but_one_between_blocks() -> None:
    blocks = [encode_block([page(n, 512)], 512) for n in (1, 2)]
    data = b"".join(blocks)
    for size in range(len(data)):
        if size in (0, len(blocks[0])):  # for these the segment tells size, checksum and number of pages: read_body
            continue
        with pytest.raises(CorruptionError, match="D-wal/body/x"):
            read(data[:size], 512)
    with pytest.raises(CorruptionError, match="cut off"):
        read(data + b"\0", 512)


def test_every_flip_is_found_or_changes_no_page() -> None:
    pages = [page(1, 512), page(2, 512)]
    for at, damaged in flips(encode_block(pages, 512)):
        outcome = attempt(partial(read, damaged, 512))
        if isinstance(outcome, CorruptionError):
            assert outcome.message.startswith("D-wal/body/x ")
            assert outcome.hint
        else:
            assert outcome == pages, f"a flip at {at} was believed"


def test_pages_ascend_through_all_blocks() -> None:
    one, two = encode_block([page(1, 512), page(3, 512)], 512), encode_block([page(3, 512)], 512)
    for reader in (read_blocks, read_tables):
        with pytest.raises(CorruptionError, match="page 3 after page 3"):
            list(reader([one, two], 512, name="x"))
    zero = struct.pack(">IIIQ", 1, 5, 0, 0) + b"12345"
    with pytest.raises(CorruptionError, match="page 0 after page 0"):
        list(read_tables([zero], 512, name="x"))


@pytest.mark.parametrize(
    "pages",
    [
        [],
        [page(1, 512), page(1, 512)],
        [page(2, 512), page(1, 512)],
        [page(1, 1024)],
        [Page(0, 0, bytes(512))],
        [Page(1, 2**64, bytes(512))],
        [Page(2**32, 0, bytes(512))],
        [page(1, 512)._replace(pgno=n) for n in range(1, 514)],
    ],
)
def test_what_makes_no_block_is_refused(pages: list[Page]) -> None:
    with pytest.raises(ValueError):
        encode_block(pages, 512)


def forged(frame: bytes, pages: int = 1, length: int | None = None) -> bytes:
    rows = b"".join(struct.pack(">IQ", n + 1, page_hash(n + 1, bytes(512))) for n in range(pages))
    return struct.pack(">II", pages, len(frame) if length is None else length) + rows + frame


def forged_blocks() -> Iterator[tuple[str, bytes]]:
    zstd = zstandard.ZstdCompressor().compress
    good = zstd(bytes(512))
    yield "a bomb", forged(zstd(bytes(64 << 20)))
    yield "one byte more", forged(zstd(bytes(513)))
    yield "one byte less", forged(zstd(bytes(511)))
    yield "no content size", forged(zstandard.ZstdCompressor(write_content_size=False).compress(bytes(512)))
    # A frame header that lies: single segment, content size 512 (256 + 256), then a raw last block of another size.
    yield "less than declared", forged(b"\x28\xb5\x2f\xfd\x60\x00\x01" + struct.pack("<I", (100 << 3) | 1)[:3] + bytes(100))
    yield "more than declared", forged(b"\x28\xb5\x2f\xfd\x60\x00\x01" + struct.pack("<I", (600 << 3) | 1)[:3] + bytes(600))
    yield "a run of 128 KiB", forged(b"\x28\xb5\x2f\xfd\x60\x00\x01" + struct.pack("<I", (131072 << 3) | 3)[:3] + b"\0")
    yield "content of 2**62", forged(b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 2**62) + b"\x01\0\0")
    yield "a window of 1 TiB", forged(b"\x28\xb5\x2f\xfd\x40\xf0" + struct.pack("<H", 256) + b"\x01\0\0")
    yield "a skippable frame", forged(struct.pack("<II", 0x184D2A5B, 512) + bytes(512))
    yield "a frame behind the frame", forged(good + good)
    yield "a skippable frame behind it", forged(good + struct.pack("<II", 0x184D2A50, 0))
    yield "a byte behind the frame", forged(good + b"\0")
    yield "half a frame", forged(good[:-2])
    yield "no frame", forged(b"")
    yield "no zstd", forged(bytes(64))
    yield "a dictionary", forged(b"\x28\xb5\x2f\xfd\x61\x07\x00\x01" + b"\x01\0\0")
    yield "no pages", struct.pack(">II", 0, 0)
    yield "four billion pages", struct.pack(">II", 2**32 - 1, 8) + bytes(1000)
    yield "more than a MiB of pages", struct.pack(">II", 2049, 8) + bytes(1000)
    yield "a frame of 4 GiB", forged(good, length=2**32 - 1)
    yield "a frame longer than zstd makes them", forged(good, length=512 + 4 + 513)


@pytest.mark.parametrize(("data"), [pytest.param(data, id=what) for what, data in forged_blocks()])
def test_a_forged_block_is_refused_without_memory(data: bytes) -> None:
    assert read(forged(zstandard.ZstdCompressor().compress(bytes(512))), 512) == [Page(1, page_hash(1, bytes(512)), bytes(512))]
    tracemalloc.start()
    try:
        with pytest.raises(CorruptionError, match="D-wal/body/x is not sound"):
            read(data, 512)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_block_of_up_to_a_mib_is_read() -> None:
    def block(pages: int) -> bytes:
        return forged(zstandard.ZstdCompressor().compress(bytes(pages * 512)), pages)

    assert len(read(block(2048), 512)) == 2048
    with pytest.raises(CorruptionError, match="a block of 2049 pages of 512 bytes"):
        read(block(2049), 512)


def test_a_block_too_long_is_refused_before_more_of_it_is_asked_for() -> None:
    def chunks() -> Iterator[bytes]:
        yield struct.pack(">II", 1, 2**31)
        raise AssertionError("the reader went on")

    with pytest.raises(CorruptionError):
        list(read_blocks(chunks(), 512, name="x"))


def test_an_error_of_the_source_passes_through() -> None:
    def chunks() -> Iterator[bytes]:
        yield b"\0\0"
        raise ValueError("of the source")

    with pytest.raises(ValueError, match="of the source"):
        list(read_blocks(chunks(), 512, name="x"))


@given(st.binary(max_size=200), st.sampled_from(PAGE_SIZES))
def test_any_bytes_are_read_or_refused(data: bytes, page_size: int) -> None:
    outcome = attempt(lambda: read(data, page_size))
    assert isinstance(outcome, CorruptionError) == bool(data)


def test_threads_do_not_share_a_compressor() -> None:
    pages = [page(n, 4096) for n in range(1, 41)]
    expected, right = encode_block(pages, 4096), []

    def work() -> None:
        blocks = [encode_block(pages, 4096) for _ in range(30)]
        right.append(all(block == expected and read(block, 4096) == pages for block in blocks))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 4
