"""What was stored once can be read for ever: the golden vectors against decoder and encoder, and against the tables on paper."""

from __future__ import annotations

import hashlib
import json
import struct
from typing import Any

import pytest
import zstandard

from bottomless_wal.formats import keys
from bottomless_wal.formats.block import encode_blocks
from bottomless_wal.formats.page import Page
from bottomless_wal.formats.page_object import PageTrailer, decode_page_object, encode_page_object
from bottomless_wal.formats.segment import decode, decode_header, encode, head_length, read_body
from tests.support.vectors import FOLDER, VECTORS, ZSTD, header_of

NAMES = sorted(path.name for path in FOLDER.iterdir() if path.suffix not in (".json", ".md"))


def load(name: str) -> tuple[bytes, dict[str, Any]]:
    data, meaning = (FOLDER / name).read_bytes(), json.loads((FOLDER / f"{name}.json").read_text())
    assert hashlib.sha256(data).hexdigest() == meaning["sha256"], "a golden vector was changed"
    return data, meaning


def pages_of(name: str, data: bytes, meaning: dict[str, Any]) -> list[Page]:
    header = header_of(meaning["header"])
    if name.endswith(".body"):
        return [page for block in read_body(header, [data], name=name) for page in block]
    return [] if header.body is not None else list(decode(data, name=name).pages())


def of_kind(*endings: str) -> list[str]:
    return [name for name in NAMES if name.endswith(endings)]


def test_every_vector_is_there_and_known() -> None:
    assert set(NAMES) == set(VECTORS)
    assert {f"{name}.json" for name in NAMES} == {path.name for path in FOLDER.glob("*.json")} - {"names.json"}


@pytest.mark.parametrize("name", of_kind(".segment", ".body"))
def test_a_segment_means_what_its_json_says(name: str) -> None:
    data, meaning = load(name)
    header = header_of(meaning["header"])
    if name.endswith(".segment"):
        assert decode(data, name=name).header == header
        assert decode_header(data[: head_length(data, name=name)], name=name) == header
    pages = pages_of(name, data, meaning)
    assert [[page.pgno, page.hash, hashlib.sha256(page.data).hexdigest()] for page in pages] == meaning["pages"]


@pytest.mark.parametrize("name", of_kind(".segment", ".body"))
def test_a_segment_is_encoded_as_it_was(name: str) -> None:
    data, meaning = load(name)
    header, pages = header_of(meaning["header"]), pages_of(name, data, meaning)
    blocks = list(encode_blocks(pages, header.page_size))
    again = b"".join(blocks) if name.endswith(".body") else encode(header, blocks)
    if meaning["zstd"] == ZSTD:
        assert again == data
    elif name.endswith(".segment"):  # another zstd may compress otherwise: then it must mean the same
        assert decode(again, name=name).header == header
        assert pages_of(name, again, meaning) == pages


@pytest.mark.parametrize("name", of_kind(".page"))
def test_a_page_object_means_what_its_json_says(name: str) -> None:
    data, meaning = load(name)
    page, trailer = decode_page_object(data, name=name, pgno=meaning["pgno"])
    assert hashlib.sha256(page).hexdigest() == meaning["page_sha256"]
    assert (trailer and trailer._asdict()) == meaning["trailer"]
    if trailer is not None:
        again = encode_page_object(page, PageTrailer(**meaning["trailer"]))
        assert again == data or meaning["zstd"] != ZSTD
        assert decode_page_object(again, name=name, pgno=meaning["pgno"]) == (page, trailer)


@pytest.mark.parametrize("name", NAMES)
def test_the_generator_still_makes_the_vector(name: str) -> None:
    data, meaning = load(name)
    says, made = VECTORS[name]
    if meaning["zstd"] == ZSTD:
        assert made() == data
        assert json.loads(json.dumps(says())) == {key: meaning[key] for key in meaning if key not in ("file", "sha256", "zstd")}


def test_the_commit_reads_as_the_tables_in_the_docstrings_say() -> None:
    """A second reader, written from the tables and sharing no code with the first."""
    data, meaning = load("commit.segment")
    header = meaning["header"]

    def number(offset: int, size: int, source: bytes = data) -> int:
        return int.from_bytes(source[offset : offset + size], "big")

    assert data[:8] == b"BWALSEG\0"
    assert (number(8, 2), number(10, 2)) == (1, 0)
    for offset, size, field in (
        (12, 4, "page_size"), (16, 8, "pre"), (24, 8, "post"), (32, 8, "pre_hash"), (40, 8, "post_hash"), (48, 4, "db_size"),
        (52, 4, "page_count"), (56, 8, "view_txid"), (64, 8, "time_ms"),
    ):  # fmt: skip
        assert number(offset, size) == header[field], field
    assert data[72:88].hex() == header["writer"]
    tables_end = 128 + number(88, 4)
    tables = zstandard.ZstdDecompressor().decompress(data[128:tables_end])
    assert len(tables) == number(92, 4)
    assert data[104:120] == bytes(16)
    assert data[120:128] == hashlib.sha256(data[:120] + data[128:tables_end]).digest()[:8]
    assert data[-32:] == hashlib.sha256(data[:-32]).digest()

    commits, positions = header["commits"], header["positions"]
    assert number(0, 4, tables) == len(commits) == 1
    assert [number(4 + 8 * n, 8, tables) for n in range(3)] == commits[0]
    assert number(28, 4, tables) == len(positions) == 2
    assert [[number(32 + 20 * row + 4 * n, 4, tables) for n in range(5)] for row in range(2)] == positions
    assert len(tables) == 72

    blocks = data[tables_end:-32]
    assert len(blocks) == number(96, 8)
    assert number(0, 4, blocks) == len(meaning["pages"]) == 2
    assert 8 + 2 * 12 + number(4, 4, blocks) == len(blocks)
    content = zstandard.ZstdDecompressor().decompress(blocks[32:])
    for n, (pgno, hashed, digest) in enumerate(meaning["pages"]):
        page = content[4096 * n : 4096 * (n + 1)]
        assert [number(8 + 12 * n, 4, blocks), number(12 + 12 * n, 8, blocks)] == [pgno, hashed]
        assert hashlib.sha256(page).hexdigest() == digest
        assert int.from_bytes(hashlib.sha256(struct.pack(">I", pgno) + page).digest()[:8], "big") == hashed


def test_the_page_object_reads_as_the_table_in_the_docstring_says() -> None:
    data, meaning = load("4096.page")
    tail, trailer = data[-64:], meaning["trailer"]
    assert tail[:8] == bytes.fromhex("5b2a4d18 38000000")
    assert tail[8:16] == b"BWPG\0\1\0\0"
    assert struct.unpack(">IIQQQI", tail[16:52]) == tuple(
        trailer[field] for field in ("page_size", "pgno", "txid", "page_hash", "post_hash", "db_size")
    )
    assert tail[52:56] == bytes(4)
    assert tail[56:] == hashlib.sha256(tail[8:56]).digest()[:8]
    assert hashlib.sha256(zstandard.ZstdDecompressor().decompress(data[:-64])).hexdigest() == meaning["page_sha256"]


@pytest.mark.parametrize("row", json.loads((FOLDER / "names.json").read_text()), ids=lambda row: row["name"])
def test_names_and_keys_stay_what_they_were(row: dict[str, Any]) -> None:
    name = row["name"]
    assert keys.database_name(row["database_id"], row["path"]) == name
    assert keys.page_key(name, row["pgno"]) == row["page_key"]
    assert keys.segment_key(name, *row["edge"]) == row["segment_key"]
    assert keys.body_key(name, row["edge"][0], row["edge"][1], row["unique"]) == row["body_key"]
    for key in (row["page_key"], row["segment_key"], row["body_key"]):
        assert keys.parse_database_names(key) == name
