"""The golden vectors: bytes of every format as they were first written, under tests/formats/vectors, and how they are made.

A vector is a file and, beside it, a json that says what the file means. They are the promise that what one version stored,
every later one can read: append to `VECTORS`, never change a vector that is there.

    python -m tests.support.vectors      writes the vectors that are missing, and touches no other
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import zstandard

from bottomless_wal.formats.block import encode_blocks
from bottomless_wal.formats.page import Page, page_hash
from bottomless_wal.formats.page_object import PageTrailer, encode_page_object
from bottomless_wal.formats.segment import Body, CommitRecord, SegmentHeader, encode
from bottomless_wal.formats.wal import WalPosition
from tests.support.samples import body_of, content, header, page, xor

FOLDER: Final = Path(__file__).resolve().parents[1] / "formats" / "vectors"
ZSTD: Final = ".".join(map(str, zstandard.ZSTD_VERSION))

Meaning = dict[str, Any]


def segment_meaning(made: SegmentHeader, pages: list[Page]) -> Meaning:
    """The fields of the header, and of each page its number, its hash and the SHA-256 of its content."""
    fields = asdict(made) | {"writer": made.writer.hex(), "commits": list(map(list, made.commits))}
    fields["positions"] = [list(asdict(position).values()) for position in made.positions]
    if made.body is not None:
        fields["body"] = [made.body.name, made.body.size, made.body.sha256.hex()]
    return {"header": fields, "pages": [[each.pgno, each.hash, hashlib.sha256(each.data).hexdigest()] for each in pages]}


def header_of(fields: Meaning) -> SegmentHeader:
    """The inverse of what `segment_meaning` does to a header."""
    body = fields["body"]
    return SegmentHeader(
        **fields
        | {
            "writer": bytes.fromhex(fields["writer"]),
            "commits": tuple(CommitRecord(*row) for row in fields["commits"]),
            "positions": tuple(WalPosition(*row) for row in fields["positions"]),
            "body": None if body is None else Body(body[0], body[1], bytes.fromhex(body[2])),
        }
    )


def commit() -> tuple[SegmentHeader, list[Page]]:
    pages = [page(1, 4096), page(7, 4096)]
    marks = (WalPosition(0x01020304, 0x05060708, 12, 0x0A0B0C0D, 0x0E0F1011), WalPosition(0x01020304, 0x05060708, 15, 1, 2**32 - 1))
    return header(pages, 4096, db_size=300, positions=marks), pages


def snapshot() -> tuple[SegmentHeader, list[Page]]:
    pages = [page(n, 512, seed=n % 3) for n in range(1, 520)]  # two blocks
    history = tuple(CommitRecord(n, 0x0101010101010101 * n, 1_700_000_000_000 + n) for n in (1, 2, 40))
    last = CommitRecord(41, xor(pages), 1_700_000_000_041)
    made = header(
        pages, 512, pre=0, pre_hash=0, post=41, post_hash=xor(pages), view_txid=40, commits=(*history, last), positions=()
    )  # fmt: skip
    return made, pages


def reset() -> tuple[SegmentHeader, list[Page]]:
    pages = [page(1, 65536)]
    return header(pages, 65536, post_hash=xor(pages), reset=True, positions=()), pages


def emptied() -> tuple[SegmentHeader, list[Page]]:
    return header([], 1024, pre=2**63 - 2, post=2**63 - 1, db_size=0, post_hash=0, positions=()), []


def large() -> tuple[SegmentHeader, list[Page]]:
    pages = [page(n, 1024) for n in (2, 3, 5, 1048576, 1048578)]  # page 1048577 is the lock page
    body = body_of(pages, 1024, "body/0000000000000005-0000000000000006-abc_DEF-0")[1]
    return header(pages, 1024, body=body), pages


def inline(made: tuple[SegmentHeader, list[Page]]) -> bytes:
    blocks = [] if made[0].body is not None else list(encode_blocks(made[1], made[0].page_size))
    return encode(made[0], blocks)


def trailer(pgno: int, page_size: int) -> PageTrailer:
    return PageTrailer(page_size, pgno, 41, page_hash(pgno, content(pgno, page_size)), 0x1234567890ABCDEF, 300)


def page_meaning(pgno: int, page_size: int, *, trailing: bool = True) -> Meaning:
    made = trailer(pgno, page_size)._asdict() if trailing else None
    return {"pgno": pgno, "page_sha256": hashlib.sha256(content(pgno, page_size)).hexdigest(), "trailer": made}


# name -> (meaning, bytes)
VECTORS: Final[dict[str, tuple[Callable[[], Meaning], Callable[[], bytes]]]] = {
    "commit.segment": (lambda: segment_meaning(*commit()), lambda: inline(commit())),
    "snapshot.segment": (lambda: segment_meaning(*snapshot()), lambda: inline(snapshot())),
    "reset.segment": (lambda: segment_meaning(*reset()), lambda: inline(reset())),
    "emptied.segment": (lambda: segment_meaning(*emptied()), lambda: inline(emptied())),
    "large.segment": (lambda: segment_meaning(large()[0], []), lambda: inline(large())),
    "large.body": (lambda: segment_meaning(*large()), lambda: body_of(large()[1], 1024)[0]),
    "4096.page": (lambda: page_meaning(7, 4096), lambda: encode_page_object(content(7, 4096), trailer(7, 4096))),
    "512.page": (lambda: page_meaning(1, 512), lambda: encode_page_object(content(1, 512), trailer(1, 512))),
    "65536.page": (lambda: page_meaning(9, 65536), lambda: encode_page_object(content(9, 65536), trailer(9, 65536))),
    "bare.page": (
        lambda: page_meaning(5, 1024, trailing=False),
        lambda: zstandard.ZstdCompressor(level=3).compress(content(5, 1024)),
    ),
}


def rows_in_lines(says: Meaning) -> str:
    """json with one row of a table to a line."""
    text = json.dumps(says, indent=1)
    return re.sub(r"\[[^\[\]{}]*\]", lambda row: " ".join(row[0].split()), text) + "\n"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, (meaning, data) in VECTORS.items():
        path, made = FOLDER / name, data()
        if not path.exists():
            path.write_bytes(made)
            says = {"file": name, "sha256": hashlib.sha256(made).hexdigest(), "zstd": ZSTD, **meaning()}
            Path(f"{path}.json").write_text(rows_in_lines(says))
            print("written:", path)


if __name__ == "__main__":
    main()
