"""Our reading of SQLite's WAL against WAL files that SQLite wrote, and SQLite's reading of what we compute."""

from __future__ import annotations

import struct
from pathlib import Path

import apsw
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bottomless_wal.formats.wal import (
    FRAME_HEADER_SIZE,
    HEADER_SIZE,
    POSITION_SIZE,
    FrameHeader,
    WalHeader,
    WalPosition,
    checksum,
    frame_offset,
)
from tests.support.samples import PAGE_SIZES, flips, positions


def written(path: Path, page_size: int = 4096) -> tuple[bytes, bytes]:
    """The main file and the WAL of a small database, as a crash would leave them."""
    connection = apsw.Connection(str(path))
    connection.pragma("page_size", page_size)
    connection.pragma("journal_mode", "wal")
    connection.pragma("wal_autocheckpoint", 0)
    connection.execute("CREATE TABLE t(x)")
    connection.execute("INSERT INTO t VALUES(?)", ("first" * page_size,))
    connection.execute("INSERT INTO t VALUES('second')")
    files = path.read_bytes(), Path(f"{path}-wal").read_bytes()
    connection.close()
    return files


def frames(wal: bytes, header: WalHeader) -> list[tuple[int, FrameHeader]]:
    """(offset, header) of every frame in `wal`, which must end with a whole one."""
    size = FRAME_HEADER_SIZE + header.page_size
    count, rest = divmod(len(wal) - HEADER_SIZE, size)
    assert rest == 0
    offsets = [frame_offset(n, header.page_size) for n in range(1, count + 1)]
    return [(offset, FrameHeader.parse(wal[offset : offset + FRAME_HEADER_SIZE])) for offset in offsets]


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_every_frame_that_sqlite_wrote_has_the_checksum_that_we_compute(page_size: int, tmp_path: Path) -> None:
    _, wal = written(tmp_path / "a.db", page_size)
    header = WalHeader.parse(wal)
    assert header is not None
    assert header.page_size == page_size
    running, commits = (header.cks1, header.cks2), 0
    for offset, frame in frames(wal, header):
        running = checksum(wal[offset : offset + 8], running, header.big_endian)
        page_start = offset + FRAME_HEADER_SIZE
        running = checksum(memoryview(wal)[page_start : page_start + page_size], running, header.big_endian)
        assert (frame.cks1, frame.cks2) == running
        assert (frame.salt1, frame.salt2) == (header.salt1, header.salt2)
        assert frame.pgno > 0
        commits += frame.db_size > 0
    assert commits == 3


def test_a_restart_counts_on_and_changes_both_salts(tmp_path: Path) -> None:
    connection = apsw.Connection(str(tmp_path / "a.db"))
    connection.pragma("journal_mode", "wal")
    connection.execute("CREATE TABLE t(x)")
    headers = []
    for _ in range(3):
        connection.execute("INSERT INTO t VALUES(1)")
        header = WalHeader.parse((tmp_path / "a.db-wal").read_bytes())
        assert header is not None
        headers.append(header)
        connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_RESTART)
    connection.close()
    first = headers[0]
    assert [header.checkpoint_sequence - first.checkpoint_sequence for header in headers] == [0, 1, 2]
    assert [(header.salt1 - first.salt1) % 2**32 for header in headers] == [0, 1, 2]
    assert len({header.salt2 for header in headers}) == 3


def test_sqlite_accepts_big_endian_checksums_that_we_compute(tmp_path: Path) -> None:
    main, wal = written(tmp_path / "a.db")
    header = WalHeader.parse(wal)
    assert header is not None
    turned = bytearray(wal)
    struct.pack_into(">I", turned, 0, header.magic ^ 1)
    running = checksum(bytes(turned[:24]), (0, 0), not header.big_endian)
    struct.pack_into(">2I", turned, 24, *running)
    for offset, _ in frames(wal, header):
        running = checksum(bytes(turned[offset : offset + 8]), running, not header.big_endian)
        page = bytes(turned[offset + FRAME_HEADER_SIZE : offset + FRAME_HEADER_SIZE + header.page_size])
        running = checksum(page, running, not header.big_endian)
        struct.pack_into(">2I", turned, offset + 16, *running)
    other = WalHeader.parse(bytes(turned))
    assert other is not None
    assert other.big_endian is not header.big_endian

    copy = tmp_path / "copy.db"
    copy.write_bytes(main)
    Path(f"{copy}-wal").write_bytes(turned)
    connection = apsw.Connection(str(copy))
    try:
        assert connection.execute("SELECT count(*) FROM t").fetchall() == [(2,)]
    finally:
        connection.close()


def test_a_damaged_header_is_no_header(tmp_path: Path) -> None:
    _, wal = written(tmp_path / "a.db")
    assert WalHeader.parse(wal[:HEADER_SIZE]) == WalHeader.parse(memoryview(wal))
    for _, damaged in flips(wal[:HEADER_SIZE]):
        assert WalHeader.parse(damaged) is None
    for size in range(HEADER_SIZE):
        assert WalHeader.parse(wal[:size]) is None
    assert WalHeader.parse(bytes(HEADER_SIZE)) is None


@pytest.mark.parametrize(
    ("version", "page_size"), [(3007001, 4096), (3006000, 4096), (3007000, 0), (3007000, 256), (3007000, 1000), (3007000, 131072)]
)
def test_a_header_with_a_right_checksum_must_still_make_sense(version: int, page_size: int) -> None:
    start = struct.pack(">6I", 0x377F0682, version, page_size, 0, 1, 2)
    assert WalHeader.parse(start + struct.pack(">2I", *checksum(start, (0, 0), False))) is None


def test_positions_of_headers() -> None:
    start = struct.pack(">6I", 0x377F0683, 3007000, 65536, 7, 11, 12)
    cks = checksum(start, (0, 0), True)
    header = WalHeader.parse(start + struct.pack(">2I", *cks))
    assert header == (0x377F0683, True, 65536, 7, 11, 12, *cks)
    assert header.position() == WalPosition(11, 12, 0, *cks)
    assert FrameHeader(2, 0, 11, 12, 13, 14).position(3) == WalPosition(11, 12, 3, 13, 14)


@given(positions)
def test_a_position_packs_to_20_bytes_and_back(position: WalPosition) -> None:
    packed = position.pack()
    assert len(packed) == POSITION_SIZE
    assert WalPosition.unpack(packed) == position
    assert packed == b"".join(n.to_bytes(4, "big") for n in (position.salt1, position.salt2, position.frame, position.cks1, position.cks2))


@given(st.binary(min_size=POSITION_SIZE, max_size=POSITION_SIZE))
def test_any_20_bytes_are_a_position(data: bytes) -> None:
    assert WalPosition.unpack(data).pack() == data


@given(st.lists(st.binary(min_size=8, max_size=8), max_size=20), st.integers(0, 20), st.booleans())
def test_a_checksum_goes_on_where_the_last_one_ended(words: list[bytes], cut: int, big_endian: bool) -> None:
    head, tail = b"".join(words[:cut]), b"".join(words[cut:])
    seed = (0xFFFFFFFF, 0x12345678)
    assert checksum(tail, checksum(head, seed, big_endian), big_endian) == checksum(head + tail, seed, big_endian)


def test_a_checksum_takes_pairs_of_words() -> None:
    with pytest.raises(ValueError, match="pairs"):
        checksum(b"1234", (0, 0), False)


def test_frame_offsets() -> None:
    assert frame_offset(1, 512) == 32
    assert frame_offset(3, 65536) == 32 + 2 * 65560
