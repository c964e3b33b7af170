"""The segment: round trips, invariants on both sides, and every damage found."""

from __future__ import annotations

import hashlib
import struct
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from bottomless_wal.core.errors import CorruptionError
from bottomless_wal.formats import segment, segment_header
from bottomless_wal.formats.page import Page
from bottomless_wal.formats.segment import (
    Body,
    CommitRecord,
    SegmentHeader,
    decode,
    decode_header,
    encode,
    encode_block,
    encode_blocks,
    read_body,
)
from bottomless_wal.formats.wal import WalPosition
from tests.support.samples import WRITER, attempt, body_of, flips, header, page, patch, reseal, segments, xor

NAME = "app.db-wal/0000000000000005-0000000000000006"
SMALL = [page(1, 512), page(4, 512)]


def small(**changes: object) -> bytes:
    return encode(header(SMALL, 512, **changes), list(encode_blocks(SMALL, 512)))


def everything(data: bytes) -> tuple[SegmentHeader, list[Page]]:
    found = decode(data, name=NAME)
    return found.header, list(found.pages())


@given(segments())
def test_a_segment_gives_back_what_went_in(sample: tuple[SegmentHeader, list[Page]]) -> None:
    made, pages = sample
    data = encode(made, list(encode_blocks(pages, made.page_size)))
    assert everything(data) == (made, pages)
    assert list(decode(data, name=NAME).tables()) == [(each.pgno, each.hash) for each in pages]


@given(segments(), st.integers(0, 500))
def test_the_header_can_be_read_from_the_start_alone(sample: tuple[SegmentHeader, list[Page]], more: int) -> None:
    made, pages = sample
    data = encode(made, list(encode_blocks(pages, made.page_size)))
    length = segment.head_length(data[: segment.HEAD_SIZE], name=NAME)
    assert decode_header(data[: length + more], name=NAME) == made
    for short in (length - 1, segment.HEAD_SIZE, segment.HEAD_SIZE - 1, 8, 0):
        with pytest.raises(CorruptionError):
            decode_header(data[:short], name=NAME)


@given(segments(body=True), st.integers(1, 5000))
def test_a_body_gives_back_what_went_in(sample: tuple[SegmentHeader, list[Page]], width: int) -> None:
    made, pages = sample
    data = b"".join(encode_blocks(pages, made.page_size))
    found = decode(encode(made), name=NAME)
    assert found.header == made
    width = max(width, len(data) // 2000)
    chunks = [data[start : start + width] for start in range(0, len(data), width)]
    assert [each for block in read_body(found.header, chunks, name="body") for each in block] == pages
    for inline in (found.pages, found.tables):
        with pytest.raises(ValueError, match="in its body"):
            inline()


def test_every_flip_is_found() -> None:
    data = small()
    assert everything(data)[1] == SMALL
    for at, damaged in flips(data):
        with pytest.raises(CorruptionError) as caught:
            decode(damaged, name=NAME)
        assert caught.value.message.startswith(NAME), at
        assert caught.value.hint


def test_every_flip_in_the_head_is_found_in_the_head_alone() -> None:
    data = small()
    start = data[: segment.head_length(data, name=NAME)]
    for _, damaged in flips(start):
        with pytest.raises(CorruptionError):
            decode_header(damaged, name=NAME)


def test_every_truncation_is_found() -> None:
    data = small()
    for size in range(len(data)):
        with pytest.raises(CorruptionError):
            decode(data[:size], name=NAME)
    for more in (b"\0", data):
        with pytest.raises(CorruptionError):
            decode(data + more, name=NAME)


def test_a_flip_under_right_checksums_is_found_or_changes_no_page() -> None:
    data = small()
    for _, damaged in flips(data, (1, 2, 128, 255)):
        try:
            found, pages = everything(reseal(damaged))
        except CorruptionError:
            continue
        segment.validate(found)
        assert pages == SMALL  # only numbers that nothing contradicts may differ: a time, the writer, pre's hash, ...


@given(st.binary(max_size=400))
def test_any_bytes_are_refused(data: bytes) -> None:
    for forged in (data, b"BWALSEG\0\0\1\0\0" + data):
        with pytest.raises(CorruptionError):
            decode(forged, name=NAME)
        with pytest.raises(CorruptionError):
            decode_header(forged, name=NAME)


@given(st.data())
def test_any_tables_are_read_or_refused(data: st.DataObject) -> None:
    raw = data.draw(st.one_of(st.binary(min_size=1, max_size=120), st.just(segment_header.pack_tables(header(SMALL, 512)))))
    raw = patch(raw, data.draw(st.integers(0, len(raw) - 1)), data.draw(st.binary(max_size=4)))
    outcome = attempt(lambda: everything(with_tables(small(), raw)))
    assert isinstance(outcome, CorruptionError) or outcome[1] == SMALL


def with_tables(data: bytes, raw: bytes, *, frame: bytes | None = None, raw_length: int | None = None) -> bytes:
    """The segment with other tables under right checksums."""
    (old,) = struct.unpack_from(">I", data, 88)
    tables = zstandard.ZstdCompressor().compress(raw) if frame is None else frame
    head = patch(data[:128], 88, struct.pack(">II", len(tables), len(raw) if raw_length is None else raw_length))
    return reseal(head + tables + data[128 + old :])


# --- versions


@pytest.mark.parametrize("version", [2, 3, 65535])
def test_a_newer_version_says_so(version: int) -> None:
    damaged = patch(small(), 8, struct.pack(">H", version))
    for forged in (damaged, reseal(damaged), damaged[:200]):
        with pytest.raises(CorruptionError, match=f"format version {version} is newer than this program") as caught:
            decode(forged, name=NAME)
        assert "Upgrade" in caught.value.hint
    with pytest.raises(CorruptionError, match="newer"):
        segment.head_length(damaged, name=NAME)


@pytest.mark.parametrize(("offset", "new"), [(10, b"\0\4"), (10, b"\x80\0"), (104, b"\1"), (119, b"\1")])
def test_unknown_flags_and_fields_are_newer(offset: int, new: bytes) -> None:
    with pytest.raises(CorruptionError, match="newer than this program") as caught:
        decode(reseal(patch(small(), offset, new)), name=NAME)
    assert "Upgrade" in caught.value.hint


def test_there_was_no_version_0() -> None:
    with pytest.raises(CorruptionError, match="no format version 0"):
        decode(reseal(patch(small(), 8, b"\0\0")), name=NAME)


# --- absurd sizes, under right checksums


@pytest.mark.parametrize(
    ("offset", "new"),
    [
        (88, struct.pack(">I", 2**32 - 1)),
        (88, struct.pack(">I", 0)),
        (92, struct.pack(">I", 2**32 - 1)),
        (92, struct.pack(">I", 0)),
        (92, struct.pack(">I", 12_000_000)),
        (96, struct.pack(">Q", 2**64 - 1)),
        (96, struct.pack(">Q", 0)),
        (12, struct.pack(">I", 0)),
        (12, struct.pack(">I", 1024)),
        (12, struct.pack(">I", 131072)),
        (12, struct.pack(">I", 2**32 - 1)),
        (52, struct.pack(">I", 2**32 - 1)),
        (52, struct.pack(">I", 3)),
        (48, struct.pack(">I", 2**32 - 1)),
        (48, struct.pack(">I", 3)),
        (48, struct.pack(">I", 0)),
    ],
)
def test_absurd_lengths_are_refused_without_memory(offset: int, new: bytes) -> None:
    data = small()
    damaged = patch(data, offset, new)
    damaged = damaged if offset == 88 else reseal(damaged)
    tracemalloc.start()
    try:
        with pytest.raises(CorruptionError):
            everything(damaged)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_bombs_in_the_tables_are_refused_without_memory() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(200 << 20))
    rows = struct.pack(">I", 2**32 - 1)
    tracemalloc.start()
    try:
        for forged in (
            with_tables(small(), b"", frame=bomb, raw_length=100),
            with_tables(small(), b"", frame=bomb, raw_length=200 << 20),
            with_tables(small(), rows),
            with_tables(small(), struct.pack(">I", 0) + rows),
            with_tables(small(), rows + bytes(24)),
        ):
            with pytest.raises(CorruptionError):
                decode(forged, name=NAME)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_tables_end_where_they_say() -> None:
    raw = segment_header.pack_tables(header(SMALL, 512))
    assert everything(with_tables(small(), raw))[1] == SMALL
    for forged in (raw + b"\0", raw[:-1], raw[:4], raw[:3]):
        with pytest.raises(CorruptionError):
            decode(with_tables(small(), forged), name=NAME)


def test_blocks_beside_a_body_are_refused() -> None:
    _, body = body_of(SMALL, 512)
    with_body = encode(header(SMALL, 512, body=body))
    (blocks,) = encode_blocks(SMALL, 512)
    forged = patch(with_body[:-32], 96, struct.pack(">Q", len(blocks))) + blocks + bytes(32)
    with pytest.raises(CorruptionError, match="it has blocks and a body"):
        decode(reseal(forged), name=NAME)


def test_blocks_beyond_the_limit_are_refused_by_the_header_alone() -> None:
    forged = reseal(patch(small(), 96, struct.pack(">Q", segment.SEGMENT_LIMIT + 1)))
    with pytest.raises(CorruptionError, match="absurd lengths"):
        decode_header(forged, name=NAME)
    with pytest.raises(CorruptionError, match="absurd lengths"):
        segment.head_length(forged, name=NAME)


def test_the_name_of_a_body_is_ascii_and_stays_below_the_log() -> None:
    made = header(SMALL, 512, body=body_of(SMALL, 512, "body/0123")[1])
    raw = segment_header.pack_tables(made)
    assert decode(with_tables(encode(made), raw), name=NAME).header == made
    for name in (b"body/\xff123", b"../../012", b"/body/012"):
        with pytest.raises(CorruptionError):
            decode(with_tables(encode(made), raw.replace(b"body/0123", name)), name=NAME)


# --- invariants


def snapshot(pages: list[Page], **changes: object) -> SegmentHeader:
    return header(pages, 512, **{"pre": 0, "pre_hash": 0, "post_hash": xor(pages), **changes})


WHOLE = [page(1, 512), page(2, 512)]
HOLE = [page(1, 512), page(3, 512)]
POST = 0x2222222222222222
BROKEN: dict[str, tuple[SegmentHeader, list[Page], str]] = {
    "pre is post": (header(SMALL, 512, pre=6), SMALL, "no edge"),
    "pre beyond post": (header(SMALL, 512, pre=7), SMALL, "no edge"),
    "pre negative": (header(SMALL, 512, pre=-1), SMALL, "no edge"),
    "txid beyond 63 bits": (header(SMALL, 512, post=2**63), SMALL, "no edge"),
    "hash beyond 64 bits": (header(SMALL, 512, post_hash=2**64), SMALL, "64 bits"),
    "pre hash beyond 64 bits": (header(SMALL, 512, pre_hash=2**64), SMALL, "64 bits"),
    "page size 1": (header([], 1), [], "no page size"),
    "page size 256": (header([], 256), [], "no page size"),
    "page size 1000": (header([], 1000), [], "no page size"),
    "page size 128 KiB": (header([], 131072), [], "no page size"),
    "more pages than the database": (header(SMALL, 512, db_size=1), SMALL, "2 pages in an edge to a database of 1"),
    "fewer pages than it says": (header(SMALL, 512, page_count=3), SMALL, "2 pages where 3"),
    "more pages than it says": (header(SMALL, 512, page_count=1), SMALL, "2 pages where 1"),
    "no pages": (header(SMALL, 512), [], "0 pages where 2"),
    "a page past the end": (header(SMALL, 512, db_size=3), SMALL, "page 4 in a database of 3"),
    "a size beyond SQLite's": (header(SMALL, 512, db_size=2**32 - 1), SMALL, "no size"),
    "an empty database with a hash": (header([], 512, db_size=0), [], "no size"),
    "view_txid negative": (header(SMALL, 512, view_txid=-1), SMALL, "out of range"),
    "time beyond 63 bits": (header(SMALL, 512, time_ms=2**63), SMALL, "out of range"),
    "writer too short": (header(SMALL, 512, writer=WRITER[:15]), SMALL, "out of range"),
    "no commits": (header(SMALL, 512, commits=()), SMALL, "last commit"),
    "the last commit is not post": (header(SMALL, 512, post=8, commits=(CommitRecord(7, POST, 0),)), SMALL, "last commit"),
    "the last commit has another hash": (header(SMALL, 512, commits=(CommitRecord(6, 1, 0),)), SMALL, "last commit"),
    "a commit at pre": (header(SMALL, 512, commits=(CommitRecord(5, 1, 0), CommitRecord(6, POST, 0))), SMALL, "cannot follow"),
    "commits out of order": (
        header(SMALL, 512, post=9, commits=(CommitRecord(8, 1, 0), CommitRecord(7, 1, 0), CommitRecord(9, POST, 0))),
        SMALL,
        "commit 7 cannot follow 8",
    ),
    "a commit with two rows": (header(SMALL, 512, commits=(CommitRecord(6, POST, 0),) * 2), SMALL, "commit 6 cannot follow 6"),
    "a commit's hash beyond 64 bits": (
        header(SMALL, 512, post=7, commits=(CommitRecord(6, 2**64, 0), CommitRecord(7, POST, 0))),
        SMALL,
        "cannot follow",
    ),
    "a commit's time negative": (header(SMALL, 512, commits=(CommitRecord(6, POST, -1),)), SMALL, "cannot follow"),
    "a position out of range": (header(SMALL, 512, positions=(WalPosition(1, 2, 2**32, 4, 5),)), SMALL, "out of range"),
    "from nothing, with a hash": (snapshot(WHOLE, pre_hash=1), WHOLE, "empty database"),
    "a snapshot with a hole": (snapshot(HOLE), HOLE, "2 pages in a whole edge to a database of 3"),
    "a snapshot of another state": (snapshot(WHOLE, post_hash=POST), WHOLE, "give the state hash"),
    "a reset with a hole": (
        header(HOLE, 512, reset=True, post_hash=xor(HOLE)),
        HOLE,
        "2 pages in a whole edge to a database of 3",
    ),
    "a reset to another state": (header(WHOLE, 512, reset=True), WHOLE, "give the state hash"),
    "a body and blocks": (header(SMALL, 512, body=Body("body/x", 1, bytes(32))), SMALL, "blocks in a segment"),
}


@pytest.mark.parametrize(("broken", "pages", "why"), [pytest.param(*row, id=what) for what, row in BROKEN.items()])
def test_what_breaks_an_invariant_is_not_encoded(broken: SegmentHeader, pages: list[Page], why: str) -> None:
    blocks = list(encode_blocks(pages, 512))
    with pytest.raises(ValueError, match=why):
        encode(broken, blocks)


@pytest.mark.parametrize(
    "body",
    [
        Body("", 1, bytes(32)),
        Body("/x", 1, bytes(32)),
        Body("x/", 1, bytes(32)),
        Body("a//b", 1, bytes(32)),
        Body("../x", 1, bytes(32)),
        Body("a\n", 1, bytes(32)),
        Body("é", 1, bytes(32)),
        Body("x" * 201, 1, bytes(32)),
        Body("x", 0, bytes(32)),
        Body("x", 1, bytes(31)),
    ],
)
def test_what_is_no_body_is_not_encoded(body: Body) -> None:
    with pytest.raises(ValueError, match="no body"):
        encode(header(SMALL, 512, body=body))
    with pytest.raises(ValueError, match="no body"):
        encode(header([], 512, body=Body("body/x", 1, bytes(32))))


@given(segments(), st.data())
def test_the_decoder_holds_the_encoders_invariants(sample: tuple[SegmentHeader, list[Page]], data: st.DataObject) -> None:
    """Whatever number of the head is replaced, under right checksums: what the decoder accepts, the encoder would have made."""
    made, pages = sample
    blocks = list(encode_blocks(pages, made.page_size))
    field = data.draw(st.sampled_from([(10, "H"), (12, "I"), *((n, "Q") for n in (16, 24, 32, 40, 56, 64)), (48, "I"), (52, "I")]))
    small_or_any = st.one_of(st.integers(0, 8), st.integers(0, 2 ** (8 * struct.calcsize(field[1])) - 1))
    forged = reseal(patch(encode(made, blocks), field[0], struct.pack(f">{field[1]}", data.draw(small_or_any))))
    try:
        found, found_pages = everything(forged)
    except CorruptionError:
        return
    assert found_pages == pages
    assert everything(encode(found, blocks)) == (found, pages)


def test_an_edge_may_leave_nothing() -> None:
    emptied = header([], 512, db_size=0, post_hash=0)
    assert everything(encode(emptied)) == (emptied, [])
    reset = replace(emptied, reset=True)
    assert everything(encode(reset)) == (reset, [])
    shrunk = header([], 512, db_size=3)
    assert everything(encode(shrunk)) == (shrunk, [])


def test_whole_edges() -> None:
    assert not header(SMALL, 512).whole
    assert header(WHOLE, 512, reset=True).whole
    assert snapshot(WHOLE).whole


def test_the_lock_page_is_neither_counted_nor_stored() -> None:
    page_size, lock = 65536, 16385
    around = [page(n, page_size) for n in (lock - 1, lock, lock + 1)]
    edge = header(around, page_size)
    with pytest.raises(ValueError, match="never uses"):
        encode(edge, [encode_block(around[:2], page_size), encode_block(around[2:], page_size)])
    without = [around[0], around[2]]
    sound = header(without, page_size)
    assert everything(encode(sound, [encode_block(without, page_size)]))[1] == without
    for db_size, count in ((lock - 1, lock - 1), (lock, lock - 1), (lock + 1, lock)):
        segment.validate(header([], page_size, reset=True, db_size=db_size, page_count=count))
        with pytest.raises(ValueError):
            segment.validate(header([], page_size, reset=True, db_size=db_size, page_count=count + 1))


def test_rows_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    position = WalPosition(1, 2, 3, 4, 5)
    many = header(SMALL, 512, positions=(position,) * 2000)
    assert everything(small(positions=many.positions))[0] == many
    monkeypatch.setattr(segment_header, "MAX_ROWS", 1999)
    with pytest.raises(ValueError, match="2000 positions"):
        small(positions=many.positions)


def test_a_full_set_of_rows_fits() -> None:
    count = segment.MAX_ROWS
    commits = (*(CommitRecord(n, n, n) for n in range(6, 5 + count)), CommitRecord(5 + count, POST, 9))
    made = header(SMALL, 512, post=5 + count, commits=commits, positions=(WalPosition(1, 2, 3, 4, 5),) * count)
    data = encode(made, list(encode_blocks(SMALL, 512)))
    assert decode_header(data, name=NAME) == made


def test_a_segment_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(small())
    monkeypatch.setattr(segment, "SEGMENT_LIMIT", size)
    assert len(small()) == size
    monkeypatch.setattr(segment, "SEGMENT_LIMIT", size - 1)
    with pytest.raises(ValueError, match="belong in a body"):
        small()


def test_blocks_of_another_page_size_are_not_encoded() -> None:
    other = [page(1, 1024), page(4, 1024)]
    with pytest.raises(CorruptionError):
        everything(reseal(patch(encode(header(other, 1024), [encode_block(other, 1024)]), 12, struct.pack(">I", 512))))


def test_half_a_block_is_not_encoded() -> None:
    (block,) = encode_blocks(SMALL, 512)
    for broken in (block[:-1], block + b"\0", block[:4], block + block):
        with pytest.raises(ValueError):
            encode(header(SMALL, 512), [broken])


def test_a_page_with_a_wrong_hash_is_not_handed_out() -> None:
    wrong = [SMALL[0], SMALL[1]._replace(hash=SMALL[1].hash ^ 1)]
    found = decode(encode(header(wrong, 512), [encode_block(wrong, 512)]), name=NAME)
    with pytest.raises(CorruptionError, match=f"{NAME} is not sound: page 4 is not what its hash says"):
        list(found.pages())


# --- bodies


def exhaust(made: SegmentHeader, data: bytes) -> list[Page]:
    return [each for block in read_body(made, [data], name="app.db-wal/body/x") for each in block]


def test_a_body_is_the_one_that_its_segment_names() -> None:
    data, body = body_of(SMALL, 512)
    made = header(SMALL, 512, body=body)
    assert exhaust(made, data) == SMALL
    others = [flipped for _, flipped in flips(data, (1, 255))] + [data[:size] for size in range(len(data))]
    others += [data + b"\0", data + data, body_of(SMALL[:1], 512)[0], body_of([SMALL[0], page(4, 512, seed=9)], 512)[0]]
    for other in others:
        with pytest.raises(CorruptionError, match=r"^app\.db-wal/body/x is not sound"):
            exhaust(made, other)


def test_a_body_must_have_the_pages_that_its_segment_promises() -> None:
    def broken(pages: list[Page], **changes: object) -> tuple[SegmentHeader, bytes]:
        data, body = body_of(pages, 512)
        return header(pages, 512, body=body, **changes), data

    for made, data in (
        broken(SMALL, page_count=1),
        broken(SMALL, page_count=3),
        broken(SMALL, db_size=3, page_count=2),
        broken(WHOLE, reset=True),
        broken(WHOLE, pre=0, pre_hash=0),
    ):
        with pytest.raises(CorruptionError):
            exhaust(made, data)


def test_a_body_is_not_read_on_beyond_its_size() -> None:
    data, body = body_of(SMALL, 512)
    asked: list[int] = []

    def chunks() -> Iterator[bytes]:
        for n in range(1000):
            asked.append(n)
            yield data

    with pytest.raises(CorruptionError, match="more than"):
        list(read_body(header(SMALL, 512, body=body), chunks(), name="x"))
    assert len(asked) == 2


def test_there_is_no_body_to_read() -> None:
    with pytest.raises(ValueError, match="no body"):
        read_body(header(SMALL, 512), [], name="x")


def test_a_large_body_is_read_in_bounded_memory() -> None:
    page_size, count = 65536, 320  # 20 MiB of pages, half of them noise
    blocks = list(encode_blocks((page(n, page_size, seed=n % 5) for n in range(1, count + 1)), page_size))
    state = 0
    for rows in segment.read_tables(blocks, page_size, name="x"):
        for _, page_hash in rows:
            state ^= page_hash
    data = b"".join(blocks)
    body = Body("body/x", len(data), hashlib.sha256(data).digest())
    made = header([], page_size, pre=0, pre_hash=0, post_hash=state, db_size=count, page_count=count, body=body)
    tracemalloc.start()
    try:
        chunks = (data[start : start + (1 << 20)] for start in range(0, len(data), 1 << 20))
        read = sum(len(block) for block in read_body(made, chunks, name="x"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert read == count
    assert peak < 6 << 20
