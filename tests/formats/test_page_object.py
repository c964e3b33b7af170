"""The page object: the page for everybody, the trailer for us, and no damage believed."""

from __future__ import annotations

import hashlib
import io
import struct
import tracemalloc
from functools import partial

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from bottomless_wal.core.errors import CorruptionError
from bottomless_wal.formats.page import page_hash
from bottomless_wal.formats.page_object import PAGE_OBJECT_LIMIT, PageTrailer, decode_page_object, encode_page_object
from tests.support.samples import PAGE_SIZES, U32, U64, attempt, content, flips, patch

NAME = "app.db-000000000003"
PAGE = content(3, 512)
TRAILER = PageTrailer(512, 3, 77, page_hash(3, PAGE), 0x1234567890ABCDEF, 9)


def decoded(data: bytes) -> tuple[bytes, PageTrailer | None]:
    return decode_page_object(data, name=NAME, pgno=3)


def resealed(data: bytes) -> bytes:
    return data[:-8] + hashlib.sha256(data[-56:-8]).digest()[:8]


@given(
    st.sampled_from(PAGE_SIZES), st.integers(1, U32 - 1), st.integers(0, U64), st.integers(0, U64), st.integers(0, U32),
    st.integers(1, 19),
)  # fmt: skip
def test_a_page_object_gives_back_what_went_in(page_size: int, pgno: int, txid: int, state: int, db_size: int, level: int) -> None:
    page = content(state, page_size)
    trailer = PageTrailer(page_size, pgno, txid, page_hash(pgno, page), state, db_size)
    data = encode_page_object(page, trailer, level)
    assert decode_page_object(data, name="x", pgno=pgno) == (page, trailer)
    assert len(data) <= PAGE_OBJECT_LIMIT


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_any_zstd_decompressor_yields_exactly_the_page(page_size: int) -> None:
    page = content(3, page_size)
    data = encode_page_object(page, PageTrailer(page_size, 3, 77, page_hash(3, page), 1, 9))
    with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data), read_across_frames=True) as reader:
        assert reader.read() == page
    frame = zstandard.get_frame_parameters(data)
    assert (frame.content_size, frame.has_checksum) == (page_size, True)


def test_a_page_without_a_trailer_is_a_page() -> None:
    assert decoded(zstandard.ZstdCompressor().compress(PAGE)) == (PAGE, None)
    assert decoded(zstandard.ZstdCompressor(write_content_size=False).compress(PAGE)) == (PAGE, None)
    stream = zstandard.ZstdCompressor().compressobj()
    assert decoded(stream.compress(PAGE) + stream.flush()) == (PAGE, None)


def test_every_flip_is_found_or_harmless() -> None:
    for at, damaged in flips(encode_page_object(PAGE, TRAILER)):
        outcome = attempt(partial(decoded, damaged))
        if isinstance(outcome, CorruptionError):
            assert outcome.message.startswith(NAME)
            assert outcome.hint
        else:
            assert outcome == (PAGE, TRAILER), f"a flip at {at} was believed"


def test_every_truncation_is_found_but_the_one_that_leaves_the_page() -> None:
    data = encode_page_object(PAGE, TRAILER)
    for size in range(len(data)):
        if size == len(data) - 64:
            assert decoded(data[:size]) == (PAGE, None)
            continue
        with pytest.raises(CorruptionError, match=NAME):
            decoded(data[:size])
    for more in (b"\0", data, data[-64:]):
        with pytest.raises(CorruptionError):
            decoded(data + more)
    with pytest.raises(CorruptionError):
        decoded(data[-64:])


@pytest.mark.parametrize(
    "trailer",
    [
        TRAILER._replace(pgno=4),
        TRAILER._replace(page_hash=TRAILER.page_hash ^ 1),
        TRAILER._replace(page_hash=page_hash(4, PAGE), pgno=4),
    ],
)
def test_a_trailer_that_contradicts_the_page_or_its_key_is_refused(trailer: PageTrailer) -> None:
    with pytest.raises(CorruptionError, match=NAME):
        decoded(encode_page_object(PAGE, trailer))
    with pytest.raises(CorruptionError, match="not sound"):
        decode_page_object(encode_page_object(PAGE, TRAILER), name=NAME, pgno=4)
    swapped = zstandard.ZstdCompressor().compress(content(4, 512)) + encode_page_object(PAGE, TRAILER)[-64:]
    with pytest.raises(CorruptionError, match="not what its hash says"):
        decoded(swapped)


def test_a_trailer_of_another_page_size_is_refused() -> None:
    data = encode_page_object(PAGE, TRAILER)
    with pytest.raises(CorruptionError, match="1024 bytes"):
        decoded(resealed(patch(data, len(data) - 64 + 16, struct.pack(">I", 1024))))
    with pytest.raises(ValueError, match="1024"):
        encode_page_object(PAGE, TRAILER._replace(page_size=1024))


@pytest.mark.parametrize(("offset", "new"), [(12, b"\0\2"), (12, b"\xff\xff"), (14, b"\0\1"), (52, b"\1"), (55, b"\1")])
def test_a_newer_version_says_so(offset: int, new: bytes) -> None:
    data = encode_page_object(PAGE, TRAILER)
    with pytest.raises(CorruptionError, match="newer than this program") as caught:
        decoded(resealed(patch(data, len(data) - 64 + offset, new)))
    assert "Upgrade" in caught.value.hint


def test_there_was_no_version_0() -> None:
    data = encode_page_object(PAGE, TRAILER)
    with pytest.raises(CorruptionError, match="version 0"):
        decoded(resealed(patch(data, len(data) - 64 + 12, b"\0\0")))


@pytest.mark.parametrize("size", [0, 1, 256, 511, 513, 1000, 65537, 131072, 64 << 20])
@pytest.mark.parametrize("said", [True, False])
def test_what_is_no_page_is_refused_without_memory(size: int, said: bool) -> None:
    frame = zstandard.ZstdCompressor(write_content_size=said).compress(bytes(size))
    trailer = encode_page_object(PAGE, TRAILER)[-64:]
    tracemalloc.start()
    try:
        for forged in (frame, frame + trailer):
            with pytest.raises(CorruptionError):
                decoded(forged)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_pages_in_two_frames_or_in_none_are_refused() -> None:
    zstd = zstandard.ZstdCompressor().compress
    for forged in (zstd(PAGE[:256]) + zstd(PAGE[256:]), PAGE, b"", struct.pack("<II", 0x184D2A50, 512) + PAGE):
        with pytest.raises(CorruptionError):
            decoded(forged)


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data: bytes) -> None:
    for forged in (data, data + encode_page_object(PAGE, TRAILER)[-64:]):
        with pytest.raises(CorruptionError):
            decoded(forged)


@pytest.mark.parametrize("trailer", [TRAILER._replace(txid=-1), TRAILER._replace(pgno=2**32), TRAILER._replace(post_hash=2**64)])
def test_numbers_out_of_range_are_not_encoded(trailer: PageTrailer) -> None:
    with pytest.raises(ValueError, match="out of range"):
        encode_page_object(PAGE, trailer)
    with pytest.raises(ValueError):
        encode_page_object(b"", trailer._replace(page_size=0))
