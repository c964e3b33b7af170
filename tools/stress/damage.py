"""Damage done to bytes that stand for something: at random, or by somebody who knows the formats. For `fuzz`."""

from __future__ import annotations

import contextlib
import hashlib
import random
import struct
from dataclasses import replace
from pathlib import Path

from bottomless_wal.core.errors import CorruptionError
from bottomless_wal.formats import segment
from bottomless_wal.formats.page_object import decode_page_object, encode_page_object
from bottomless_wal.formats.wal import WalPosition
from bottomless_wal.formats.zstd import FormatError
from bottomless_wal.replication.index import HEADER_SIZE, Attempt, IndexHeader

__all__ = ["absurd_index", "damage", "hostile_page", "hostile_segment", "strange_keys"]

ABSURD = (0, 1, 2**31, 2**32 - 2, 2**32 - 1, 2**53, 2**63 - 2, 2**63 - 1, 2**64 - 1)
NUMBERS = ("txid", "state", "view_txid", "db_size", "view_size", "page_size")


def damage(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """`data` with one kind of damage."""
    raw = bytearray(data)
    size = len(raw)
    kind = rng.choice(("flip", "flip", "flip", "cut", "swap", "zero", "garbage", "splice", "repeat"))
    at = rng.randrange(size) if size else 0
    length = rng.choice((1, 8, 64, 512, 1024, 4096))
    if kind == "flip":
        for _ in range(rng.choice((1, 1, 2, 20))):
            if size:
                raw[rng.randrange(size)] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del raw[at:]
    elif kind == "swap":
        to = rng.randrange(size) if size else 0
        one, other = bytes(raw[at : at + length]), bytes(raw[to : to + length])
        raw[at : at + len(one)] = other[: len(one)].ljust(len(one), b"\0")
        raw[to : to + len(other)] = one[: len(other)].ljust(len(other), b"\0")
    elif kind == "zero":
        start = at // 1024 * 1024
        raw[start : start + length] = bytes(len(raw[start : start + length]))
    elif kind == "garbage":
        raw += rng.randbytes(length)
    elif kind == "splice" and others:
        other = rng.choice(others)
        start = rng.randrange(len(other)) if other else 0
        part = other[start : start + length]
        raw[at : at + len(part)] = part
    else:
        raw[at:at] = raw[at : at + length]
    return bytes(raw)


def absurd_index(rng: random.Random, data: bytes) -> bytes | None:
    """An index whose header is well formed, and a lie; None if there is no header."""
    header = IndexHeader.decode(data[:HEADER_SIZE])
    if header is None:
        return None
    for _ in range(rng.choice((1, 1, 3))):
        field = rng.choice((*NUMBERS, "position", "flags", "identity", "seal", "intents"))
        value = rng.choice(ABSURD)
        if field in NUMBERS:
            header = replace(header, **{field: value if field in ("txid", "state", "view_txid") else value & 0xFFFFFFFF})
        elif field == "position":
            known = header.position or WalPosition(1, 2, 3, 4, 5)
            restarted = replace(known, salt1=known.salt1 + 1 & 0xFFFFFFFF)
            told = rng.choice((None, replace(known, frame=value & 0xFFFFFFFF), replace(known, cks1=7), restarted))
            header = replace(header, position=told)
        elif field == "flags":
            header = replace(header, needs_scan=rng.random() < 0.5, clean=rng.random() < 0.5)
        elif field == "identity" and header.identity is not None:
            header = replace(header, identity=header.identity._replace(inode=value & 2**62, size=value & 2**40))
        elif field == "seal":
            header = replace(header, reset_sequence=value)
        else:
            header = replace(header, in_doubt=(Attempt(rng.choice(ABSURD), rng.choice(ABSURD)), Attempt(header.state, 0)))
    encoded = header.encode()
    return encoded + data[len(encoded) :]


def hostile_segment(rng: random.Random, data: bytes) -> bytes:
    """A segment that is well formed, and a lie; or `data` as it is, if it is none."""
    try:
        header = segment.decode_header(data, name="x")
    except CorruptionError:
        return damage(rng, data, [])
    tables = struct.unpack_from(">I", data, 88)[0]
    change: dict[str, object] = rng.choice(
        (
            {"db_size": rng.choice((header.db_size + 1, 1, 2**31, 2**32 - 2))},
            {"page_count": rng.choice((0, header.page_count + 1, 2**32 - 2))},
            {"pre_hash": rng.getrandbits(64)},
            {"reset": not header.reset},
            {"view_txid": rng.choice((0, 2**63 - 1))},
            {"page_size": rng.choice((512, 2048, 65536))},
            {"time_ms": 2**63 - 1},
            {"post_hash": 5, "commits": (segment.CommitRecord(header.post, 5, 0),)},
            {
                "commits": tuple(segment.CommitRecord(header.pre + 1 + n, n, 0) for n in range(header.post - header.pre - 1))
                + header.commits[-1:]
            },
            {"body": segment.Body("body/" + "x" * rng.choice((1, 190)), 2**60, bytes(32))},
            {"body": header.body and replace(header.body, size=rng.choice((1, header.body.size + 1, 2**62)))},
        )
    )
    try:
        made = replace(header, **change)  # type: ignore[arg-type]
        if made.body is not None:
            return segment.encode(made)
        whole = data[segment.HEAD_SIZE + tables : -32]
        blocks = [bytes(block) for block in segment.split((whole,), header.page_size)]
        return segment.encode(made, blocks)
    except (ValueError, FormatError):
        # What the encoder refuses, a rival's program may write: the numbers in the head, with the checksums mended.
        raw = bytearray(data)
        struct.pack_into(">I", raw, rng.choice((12, 48, 52, 88, 92)), rng.choice((0, 1, 2**31, 2**32 - 1)))
        tables = struct.unpack_from(">I", raw, 88)[0]
        raw[120:128] = hashlib.sha256(raw[:120] + raw[128 : 128 + tables]).digest()[:8]
        raw[-32:] = hashlib.sha256(raw[:-32]).digest()
        return bytes(raw)


def hostile_page(rng: random.Random, data: bytes, key: str) -> bytes:
    """A page object that is well formed, and a lie."""
    try:
        page, trailer = decode_page_object(data, name=key, pgno=int(key[-12:]))
    except (CorruptionError, ValueError):
        return damage(rng, data, [])
    if trailer is None:
        return data
    change: dict[str, int] = rng.choice(
        ({"txid": rng.choice(ABSURD)}, {"db_size": rng.choice((0, 1, 2**31, 2**32 - 1))}, {"post_hash": rng.getrandbits(64)})
    )
    return encode_page_object(page, trailer._replace(**change))


def strange_keys(rng: random.Random, bucket: Path) -> None:
    """Objects whose keys are nearly ours, or nobody's."""
    edge = "{:016x}-{:016x}".format
    names = [
        f"app.db-wal/{edge(2**63 - 2, 2**63 - 1)}", f"app.db-wal/{edge(3, 3)}", f"app.db-wal/{edge(4, 3)}", "app.db-wal/-1-2",
        f"app.db-wal/{edge(2**64 - 2, 2**64 - 1)}", f"app.db-wal/{edge(20, 21).upper()}", f"app.db-wal/ {edge(1, 2)}",
        f"app.db-wal/{edge(13, 15)}/x", f"app.db-wal/body/{edge(1, 2)}", f"app.db-wal/body/{edge(2, 1)}-x", "app.db-wal/body/../x",
        "app.db-wal/é/ü", "app.db-wal/\u2028", "app.db-wal/" + "n/" * 400 + "x", "app.db-000000000000", "app.db-0", "app.db-00000000001x",
        "app.db-004294967295", "app.db-004294967294", "app.db-001000000000", "app.db-000000000099", "=GG-000000000001", "~-000000000001",
        "a~b~c-000000000001", "app.db-wal", "=2E=2E-000000000001", "..-wal/x", f"=2Fetc=2Fpasswd-wal/{edge(0, 1)}",
    ]  # fmt: skip
    objects = sorted(path for path in bucket.rglob("*") if path.is_file() and ".tmp" not in path.parts)
    for name in rng.sample(names, rng.randrange(1, 6)):
        path = bucket / name
        with contextlib.suppress(FileExistsError, NotADirectoryError, IsADirectoryError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(rng.choice((b"", rng.randbytes(700), rng.choice(objects).read_bytes())))
