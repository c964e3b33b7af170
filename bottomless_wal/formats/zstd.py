"""zstd with everything bounded before it is allocated, and one context per thread.

A context of `zstandard` is not thread-safe, and making one costs more than compressing a page: each thread keeps its own.
A frame's declared content size is checked against what the caller expects before a byte is decompressed, nothing may follow
the frame, and a frame cannot ask for a window larger than 8 MiB.
"""

from __future__ import annotations

import threading
from typing import Final

import zstandard

__all__ = ["Bytes", "FormatError", "NewerFormatError", "compress", "decompress"]

Bytes = bytes | bytearray | memoryview

_WINDOW_LIMIT: Final = 8 << 20
_UNKNOWN: Final = zstandard.CONTENTSIZE_UNKNOWN


class FormatError(ValueError):
    """Bytes, or values, that a format does not allow. A decoder turns it into a CorruptionError that names the object."""


class NewerFormatError(FormatError):
    """Bytes of a format that this program is too old for."""


class _Contexts(threading.local):
    def __init__(self) -> None:
        self.compressors: dict[tuple[int, bool], zstandard.ZstdCompressor] = {}
        self.decompressor = zstandard.ZstdDecompressor()


_contexts: Final = _Contexts()


def compress(data: Bytes, level: int, *, checksum: bool = False) -> bytes:
    """One zstd frame with its content size in it, and zstd's own checksum if asked for."""
    compressors = _contexts.compressors
    compressor = compressors.get((level, checksum))
    if compressor is None:
        compressor = zstandard.ZstdCompressor(level=level, write_checksum=checksum, write_content_size=True)
        compressors[level, checksum] = compressor
    return compressor.compress(data)


def decompress(frame: bytes | memoryview, limit: int, *, exact: bool = True) -> bytes:
    """The content of `frame`, which must be one whole frame of exactly `limit` bytes (`exact`), or of at most so many.

    Only when not `exact` may the frame leave its content size unsaid.

    Raises:
        FormatError: anything else.
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
