"""Compress and decompress zstd frames, with bounded memory and one context per thread.

A context of `zstandard` is not thread-safe, and creating one takes longer than compressing a page: each thread keeps its own.
`decompress` compares the content size that a frame declares with what the caller expects before it decompresses anything. It refuses
bytes after the frame and windows larger than 8 MiB.
"""

from __future__ import annotations

import threading
from typing import Final

import zstandard

__all__ = ["Bytes", "FormatError", "NewerFormatError", "compress", "decompress"]

Bytes = bytes | bytearray | memoryview

_WINDOW_LIMIT: Final = 8 << 20  # bytes
_UNKNOWN: Final = zstandard.CONTENTSIZE_UNKNOWN


class FormatError(ValueError):
    """A format does not allow these bytes or values. A decoder raises a CorruptionError with the object's key instead."""


class NewerFormatError(FormatError):
    """The bytes have a format version that is newer than this program."""


class _Contexts(threading.local):
    def __init__(self) -> None:
        self.compressors: dict[tuple[int, bool], zstandard.ZstdCompressor] = {}
        self.decompressor = zstandard.ZstdDecompressor()


_contexts: Final = _Contexts()


def compress(data: Bytes, level: int, *, checksum: bool = False) -> bytes:
    """Return one zstd frame with its content size, and with zstd's checksum if `checksum`."""
    compressors = _contexts.compressors
    compressor = compressors.get((level, checksum))
    if compressor is None:
        compressor = zstandard.ZstdCompressor(level=level, write_checksum=checksum, write_content_size=True)
        compressors[level, checksum] = compressor
    return compressor.compress(data)


def decompress(frame: bytes | memoryview, limit: int, *, exact: bool = True) -> bytes:
    """Return the content of `frame`, which must be one whole zstd frame.

    Args:
        frame: the bytes of the frame.
        limit: the size of the content, bytes; without `exact`, the largest size.
        exact: the content must have `limit` bytes, and the frame must declare its size.

    Raises:
        FormatError: the frame is not valid, or its content has another size.
    """
    try:
        parameters = zstandard.get_frame_parameters(frame)
        size = parameters.content_size
        if parameters.window_size > _WINDOW_LIMIT:
            raise FormatError(f"a zstd frame with a window of {parameters.window_size} bytes")
        if size != limit and (exact or (size > limit and size != _UNKNOWN)):
            raise FormatError(f"a zstd frame of {size} bytes where {limit} are expected")
        content = _contexts.decompressor.decompress(frame, max_output_size=limit, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise FormatError(f"no sound zstd frame: {error}") from error
    if len(content) > limit or (exact and len(content) != limit):
        raise FormatError(f"{len(content)} bytes out of a zstd frame where {limit} are expected")
    return content
