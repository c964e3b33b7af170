"""The local index's header and seal: inverse pairs, damage is absence, and what a seal does to a position."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bottomless_wal.formats.index_header import (
    HEADER_SIZE,
    MAX_IN_DOUBT,
    RESET_RECORD_OFFSET,
    RESET_RECORD_SIZE,
    Attempt,
    Backlog,
    Identity,
    IndexHeader,
    IndexState,
    WalResetRecord,
    changed,
)
from bottomless_wal.formats.wal import WalPosition

VECTORS = Path(__file__).parent / "index_vectors"

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
positions = st.builds(WalPosition, u32, u32, u32, u32, u32)
times = st.integers(-(2**63), 2**63 - 1)
headers = st.builds(
    IndexHeader,
    remote_id=st.binary(min_size=16, max_size=16),
    writer=st.binary(min_size=16, max_size=16),
    boot=st.binary(min_size=16, max_size=16),
    page_size=u32,
    txid=u64,
    state=u64,
    db_size=u32,
    change_counter=u32,
    view_txid=u64,
    backlog=st.none() | st.builds(Backlog, u64, st.integers(1, 2**64 - 1), u32),
    view_size=u32,
    proved_ms=u64,
    position=st.none() | positions,
    needs_scan=st.booleans(),
    clean=st.booleans(),
    identity=st.none() | st.builds(Identity, u64, u64, u64, times, times),
    is_settled=st.booleans(),
    successor=st.none() | positions,
    reset_sequence=u64,
    in_doubt=st.lists(st.builds(Attempt, u64, u64), max_size=20).map(tuple),
)
seals = st.builds(
    WalResetRecord,
    sequence=st.integers(1, 2**64 - 1),
    before=st.none() | st.tuples(u32, u32),
    after=st.none() | positions,
    covered=st.booleans(),
    anywhere=st.booleans(),
    identity=st.none() | st.builds(Identity, u64, u64, u64, times, times),
    is_settled=st.booleans(),
    is_witnessed=st.booleans(),
)


@given(headers)
def test_a_header_comes_back_as_it_was(header: IndexHeader) -> None:
    assert IndexHeader.decode(header.encode()) == header
    # Whatever an earlier, longer header has left behind it does not matter.
    assert IndexHeader.decode(header.encode() + b"\xff" * 100) == header


@given(seals)
def test_a_seal_comes_back_as_it_was(seal: WalResetRecord) -> None:
    assert WalResetRecord.decode(seal.encode()) == seal
    assert len(seal.encode()) == RESET_RECORD_SIZE


def test_the_longest_header_ends_before_the_seal_and_that_before_the_entries() -> None:
    header = IndexHeader(bytes(16), bytes(16), bytes(16), in_doubt=tuple(Attempt(n, n) for n in range(MAX_IN_DOUBT)))
    assert len(header.encode()) <= RESET_RECORD_OFFSET
    assert RESET_RECORD_OFFSET + RESET_RECORD_SIZE <= HEADER_SIZE
    assert IndexHeader.decode(header.encode()) == header


@given(headers, st.data())
def test_a_damaged_header_is_no_header(header: IndexHeader, data: st.DataObject) -> None:
    raw = bytearray(header.encode())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    assert IndexHeader.decode(bytes(raw)) is None
    assert IndexHeader.decode(bytes(raw[:at])) is None


@given(seals, st.data())
def test_a_damaged_seal_is_no_seal(seal: WalResetRecord, data: st.DataObject) -> None:
    raw = bytearray(seal.encode())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    assert WalResetRecord.decode(bytes(raw)) is None
    assert WalResetRecord.decode(bytes(raw[:at])) is None


@pytest.mark.parametrize("raw", [b"", bytes(HEADER_SIZE), b"BWALIDX1", b"SQLite format 3\0" * 1024])
def test_what_is_no_index_is_no_header(raw: bytes) -> None:
    assert IndexHeader.decode(raw) is None


def _sealed(position: WalPosition | None, seal: WalResetRecord | None) -> IndexHeader:
    header = IndexHeader(bytes(16), bytes(16), bytes(16), position=position, reset_sequence=5)
    return header.apply(seal)


HERE = WalPosition(1, 2, 3, 4, 5)
NEXT = WalPosition(2, 9, 0, 6, 7)


@pytest.mark.parametrize(
    ("position", "seal", "expected", "needs_scan"),
    [
        (HERE, None, HERE, False),
        (HERE, WalResetRecord(6, (1, 2), NEXT, covered=True), NEXT, False),
        (HERE, WalResetRecord(6, (1, 2), None, covered=True), None, False),
        (None, WalResetRecord(6, None, NEXT, covered=True), NEXT, False),
        (HERE, WalResetRecord(6, (1, 2), NEXT, covered=False), HERE, True),
        (HERE, WalResetRecord(5, (1, 2), NEXT, covered=True), HERE, False),  # looked at before
        (HERE, WalResetRecord(6, (8, 8), NEXT, covered=True), HERE, False),  # of another WAL: the position has to prove itself
        (HERE, WalResetRecord(6, None, NEXT, covered=True), HERE, False),
        (None, WalResetRecord(6, (1, 2), NEXT, covered=True), None, False),
        (HERE, WalResetRecord(6, None, None, covered=False, anywhere=True), HERE, True),
    ],
)
def test_what_a_seal_does_to_a_position(
    position: WalPosition | None, seal: WalResetRecord | None, expected: WalPosition | None, needs_scan: bool
) -> None:
    header = _sealed(position, seal)
    assert (header.position, header.needs_scan) == (expected, needs_scan)


def test_the_view_is_complete_only_up_to_its_backlog() -> None:
    header = IndexHeader(bytes(16), bytes(16), bytes(16), txid=9, view_txid=9)
    assert header.view_complete == 9
    assert replace(header, backlog=Backlog(4, 7, 100)).view_complete == 4


def test_golden_vectors() -> None:
    meaning = json.loads((VECTORS / "index.json").read_text())
    for older in ("header.index", "header-2.index"):
        assert IndexHeader.decode((VECTORS / older).read_bytes()) is None, "an older layout: scanned anew, as if there were none"
    header = IndexHeader.decode((VECTORS / "header-3.index").read_bytes())
    assert header is not None
    assert header.position == WalPosition(*meaning["position"])
    assert header.backlog == Backlog(*meaning["backlog"])
    assert header.identity == Identity(*meaning["identity"])
    assert [header.remote_id.hex(), header.writer.hex(), header.boot.hex()] == meaning["names"]
    assert {name: getattr(header, name) for name in meaning["numbers"]} == meaning["numbers"]
    assert header.successor == WalPosition(*meaning["successor"])
    assert header.in_doubt == tuple(Attempt(*row) for row in meaning["intents"])
    assert header.encode() == (VECTORS / "header-3.index").read_bytes()
    seal = WalResetRecord.decode((VECTORS / "seal.index").read_bytes())
    told = meaning["seal"]
    assert seal is not None
    assert seal == WalResetRecord(
        told["sequence"], tuple(told["before"]), WalPosition(*told["after"]), covered=True, identity=Identity(*told["identity"])
    )
    assert seal.encode() == (VECTORS / "seal.index").read_bytes()
    settled = seal._replace(is_settled=True, is_witnessed=True)
    assert settled.encode() == (VECTORS / "seal-2.index").read_bytes()


def test_a_position_that_is_carried_across_takes_the_main_files_identity_with_it() -> None:
    identity = Identity(1, 2, 3, 4, 5)
    header = _sealed(HERE, WalResetRecord(6, (1, 2), None, covered=True, identity=identity))
    assert (header.position, header.identity) == (None, identity)
    assert _sealed(HERE, WalResetRecord(6, (1, 2), None, covered=False, identity=identity)).identity is None


def test_a_wal_that_goes_with_what_is_not_stored_leaves_the_files_identity_and_asks_for_a_scan() -> None:
    before, after = Identity(1, 2, 3, 4, 5), Identity(1, 2, 9, 9, 9)
    header = IndexHeader(bytes(16), bytes(16), bytes(16), position=HERE, reset_sequence=5, identity=before)
    header = header.apply(WalResetRecord(6, (1, 2), None, covered=False, identity=after))
    assert (header.position, header.identity, header.needs_scan) == (None, after, True)


def _identity(mtime_ns: int, ctime_ns: int, device: int = 1) -> Identity:
    return Identity(device, 2, 4096, mtime_ns, ctime_ns)


@pytest.mark.parametrize(
    ("identity", "witness", "expected"),
    [
        (_identity(5, 5), _identity(6, 6), True),
        (_identity(5, 5), _identity(5, 5), False),  # the same tick: a write may follow that changes nothing of this
        (_identity(5, 6), _identity(6, 6), False),
        (_identity(6, 5), _identity(6, 6), False),
        (_identity(9, 5), _identity(9, 8), False),  # a modification time that was set to the future
        (_identity(5, 5), _identity(6, 6, device=7), False),  # another file system, another clock
        (_identity(5, 5), None, False),
    ],
)
def test_an_identity_is_settled_by_a_later_tick(identity: Identity, witness: Identity | None, expected: bool) -> None:
    assert identity.is_settled_by(witness) is expected


def test_only_a_settled_identity_identifies(tmp_path: Path) -> None:
    file = tmp_path / "app.db"
    file.write_bytes(b"content")
    header = IndexHeader(bytes(16), bytes(16), bytes(16), identity=Identity.of(str(file)), is_settled=True)
    assert header.identifies(str(file))
    assert not replace(header, is_settled=False).identifies(str(file))
    file.write_bytes(b"another content")
    assert not header.identifies(str(file))
    file.unlink()
    assert not header.identifies(str(file))
    assert not replace(header, identity=None).identifies(str(file))


def test_a_witnessed_seal_tells_what_follows_though_the_position_is_lost() -> None:
    header = _sealed(HERE, WalResetRecord(6, (1, 2), NEXT, covered=False, is_witnessed=True))
    assert (header.position, header.successor, header.needs_scan) == (HERE, NEXT, True)
    header = header.apply(WalResetRecord(7, (1, 2), WalPosition(77, 9, 0, 1, 1), covered=False))
    assert header.successor is None, "somebody has restarted the WAL unseen"
    assert _sealed(HERE, WalResetRecord(6, (1, 2), NEXT, covered=True, is_witnessed=True)).successor is None
    assert _sealed(HERE, WalResetRecord(6, (8, 8), NEXT, covered=False, is_witnessed=True)).successor is None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, IndexState.NEW),
        ({"needs_scan": True, "identity": Identity(1, 2, 3, 4, 5)}, IndexState.NEW),  # a first commit is in doubt
        ({"state": 7, "needs_scan": True}, IndexState.BEING_REPLACED),
        ({"txid": 3, "state": 7, "needs_scan": True}, IndexState.UNPROVED),
        ({"txid": 3, "needs_scan": True, "identity": Identity(1, 2, 3, 4, 5)}, IndexState.NEEDS_SCAN),
        ({"txid": 3, "identity": Identity(1, 2, 3, 4, 5)}, IndexState.IN_STEP),
        ({"txid": 3, "position": HERE}, IndexState.IN_STEP),
    ],
)
def test_the_state_of_an_index_is_told_by_its_fields(fields: dict[str, Any], expected: IndexState) -> None:
    header = IndexHeader(bytes(16), bytes(16), bytes(16), **fields)
    assert header.index_state is expected
    decoded = IndexHeader.decode(header.encode())
    assert decoded is not None
    assert decoded.index_state is expected


@given(headers)
def test_a_header_is_a_value(header: IndexHeader) -> None:
    before = header.encode()
    assert changed(header, txid=7, needs_scan=True) == replace(header, txid=7, needs_scan=True)
    with pytest.raises(FrozenInstanceError):
        header.txid = 7  # type: ignore[misc]
    assert header.encode() == before


def test_commits_whose_pages_nobody_has_put_join_the_backlog() -> None:
    header = IndexHeader(bytes(16), bytes(16), bytes(16), txid=9, view_txid=5)
    later = header.pages_postponed(7)
    assert (later.view_txid, later.backlog, later.view_complete) == (7, Backlog(5, 7, 1), 5)
    last = changed(later, backlog=Backlog(5, 7, 40)).pages_postponed(9)
    assert (last.view_txid, last.backlog) == (9, Backlog(5, 9, 1)), "it begins anew"
    assert last.pages_postponed(9) is last


def test_where_there_are_too_many_intents_the_oldest_goes() -> None:
    header = IndexHeader(bytes(16), bytes(16), bytes(16), in_doubt=tuple(Attempt(n, n) for n in range(MAX_IN_DOUBT)))
    assert header.with_intent(Attempt(1, 2)).in_doubt == (*header.in_doubt[1:], Attempt(1, 2))
