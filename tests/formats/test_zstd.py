"""zstd, bounded: what is refused is refused here, whoever calls."""

from __future__ import annotations

import struct

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from bottomless_wal.formats.zstd import FormatError, compress, decompress


@given(st.binary(max_size=5000), st.integers(1, 19), st.booleans())
def test_what_was_compressed_comes_back(data: bytes, level: int, checksum: bool) -> None:
    frame = compress(data, level, checksum=checksum)
    assert decompress(frame, len(data)) == decompress(memoryview(frame), len(data) + 1, exact=False) == data
    assert zstandard.get_frame_parameters(frame).has_checksum == checksum
    for limit in (len(data) - 1, len(data) + 1):
        with pytest.raises(FormatError):
            decompress(frame, limit)


@pytest.mark.parametrize("exact", [True, False])
def test_a_skippable_frame_has_no_content(exact: bool) -> None:
    with pytest.raises(FormatError):
        decompress(struct.pack("<II", 0x184D2A5B, 512) + bytes(512), 512, exact=exact)


def test_a_frame_without_a_content_size_may_give_up_to_the_limit() -> None:
    frame = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(512))
    assert decompress(frame, 512, exact=False) == bytes(512)
    with pytest.raises(FormatError):
        decompress(frame, 511, exact=False)
    with pytest.raises(FormatError):
        decompress(frame, 512)


def test_a_frame_with_a_large_window_is_refused() -> None:
    def frame(window_log: int, *, sized: bool) -> bytes:  # window descriptor, content size or none, one raw block
        size = struct.pack("<Q", 4) if sized else b""
        start = b"\x28\xb5\x2f\xfd" + (b"\xc0" if sized else b"\x00") + bytes(((window_log - 10) << 3,))
        return start + size + b"\x21\0\0" + b"data"

    assert decompress(frame(23, sized=True), 4) == decompress(frame(23, sized=False), 4, exact=False) == b"data"
    for sized in (True, False):
        with pytest.raises(FormatError, match="window"):
            decompress(frame(24, sized=sized), 4, exact=sized)
