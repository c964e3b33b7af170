"""What a power loss leaves of files that nobody has synced: less of them, or parts of what they were at some moment before."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

from bottomless_wal.formats.index_header import HEADER_SIZE, IndexHeader

_BLOCK = 4096


def cut_wal(path: Path, rng: random.Random) -> None:
    """Of the WAL of the database at `path`, which was not synced: some of its bytes, but all that checkpoints have begun to copy."""
    wal, shm = path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm")
    if not wal.exists() or not shm.exists():
        return
    head, index = wal.read_bytes()[:32], shm.read_bytes()[:136]
    shm.unlink()
    if len(head) < 32 or len(index) < 136 or head[16:24] != index[32:40]:
        return  # a restart was under way: the main file holds more than the frames before the cut would tell
    page_size = int.from_bytes(head[8:12], "big")
    copied = int.from_bytes(index[128:132], sys.byteorder)  # nBackfillAttempted
    size, least = wal.stat().st_size, 32 + copied * (24 + page_size)
    if size > least:
        with wal.open("r+b") as file:
            file.truncate(rng.choice((least, rng.randint(least, size), rng.randint(least, size))))


def age_index(path: Path, before: Path, rng: random.Random) -> None:
    """Of the local index of the database at `path`: of each block the content it had in the copy `before`, or has now."""
    index = path.with_name(path.name + "-bottomless")
    if not index.exists():
        return
    now, then = index.read_bytes(), before.read_bytes()
    then = then[: len(now)].ljust(len(now), b"\0")
    aged = b"".join(rng.choice((now, then))[at : at + _BLOCK] for at in range(0, len(now), _BLOCK))
    header = IndexHeader.decode(aged[:HEADER_SIZE])
    if header is not None:
        header = replace(header, boot=rng.randbytes(16))
        aged = header.encode() + aged[len(header.encode()) :]
    index.write_bytes(aged)
