"""Names <-> keys: inverse pairs, and no two databases share a key."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bottomless_wal.core.errors import ConfigError
from bottomless_wal.formats import keys

# Raw bytes as a file system knows them, and text as people type it.
bases = st.binary(min_size=1, max_size=40).filter(lambda raw: b"/" not in raw and raw not in (b".", b"..")).map(os.fsdecode)
tricky = st.text(alphabet="ab.-~=/_0127walé ", max_size=12)
ids = st.one_of(st.just(""), tricky, st.binary(max_size=20).map(os.fsdecode))
bases_or_tricky = st.one_of(bases, tricky.map(lambda text: text.replace("/", "")).filter(lambda text: text not in ("", ".", "..")))
names = st.builds(keys.database_name, ids, bases_or_tricky)
txids = st.integers(0, keys.MAX_TXID)
edges = st.tuples(txids, txids).filter(lambda pair: pair[0] != pair[1]).map(lambda pair: (min(pair), max(pair)))
close_edges = st.tuples(st.integers(0, 40), st.integers(1, 20)).map(lambda pair: (pair[0], pair[0] + pair[1]))
pgnos = st.integers(1, keys.MAX_PGNO)
uniques = st.text(alphabet="0123456789abcdefXYZ_-", min_size=1, max_size=64)


@given(ids, bases_or_tricky, st.sampled_from(["", "/srv/", "/a~b/=41/"]))
def test_a_name_can_be_split_again(database_id: str, base: str, directory: str) -> None:
    name = keys.database_name(database_id, directory + base)
    assert keys.split_name(name) == (database_id, base)
    assert name.isascii()
    assert "/" not in name


@given(tricky)
def test_what_can_be_split_is_canonical(name: str) -> None:
    try:
        database_id, base = keys.split_name(name)
    except ValueError:
        return
    assert keys.database_name(database_id, base) == name


@pytest.mark.parametrize(
    ("database_id", "path", "name"),
    [
        ("", "/data/app.db", "app.db"),
        ("", "app.db", "app.db"),
        ("prod", "/data/app.db", "prod~app.db"),
        ("a/b", "c~d=e", "a=2Fb~c=7Ed=3De"),
        ("", "Größe 1.db", "Gr=C3=B6=C3=9Fe=201.db"),
        ("", "raw\udcff.db", "raw=FF.db"),
        ("..", "x", "..~x"),
        ("", ".hidden", ".hidden"),
    ],
)
def test_names(database_id: str, path: str, name: str) -> None:
    assert keys.database_name(database_id, path) == name
    assert keys.split_name(name) == (database_id, os.path.basename(path))


@pytest.mark.parametrize("path", ["", "/", "/data/", ".", "/data/..", "\ud800"])
def test_a_path_without_a_name_is_refused(path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        keys.database_name("", path)
    assert caught.value.hint


def test_the_longest_name_still_gives_components_of_255_bytes() -> None:
    name = keys.database_name("i" * 100, "b" * 141)
    longest = [keys.page_key(name, keys.MAX_PGNO), keys.body_key(name, 0, keys.MAX_TXID, "u" * 64)]
    assert max(len(part) for key in longest for part in key.split("/")) == 255
    assert max(map(len, longest)) <= 1024
    for database_id, base in (("i" * 100, "b" * 142), ("", "b" * 243), ("", "é" * 41)):
        with pytest.raises(ConfigError, match="fit into a key"):
            keys.database_name(database_id, base)


@pytest.mark.parametrize(
    "name", ["", "~", "~a", "a~", "a~b~c", "a/b", "a=2Fb", "=41", "a=2", "a=2f", "é", "a b", ".", "..", "x~..", "b" * 243]
)
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError):
        keys.split_name(name)


@given(names, pgnos)
def test_page_keys(name: str, pgno: int) -> None:
    key = keys.page_key(name, pgno)
    assert keys.parse_page_key(name, key) == pgno
    assert keys.parse_segment_key(name, key) is None
    assert keys.parse_body_key(name, key) is None
    assert keys.parse_database_names(key) == name
    assert key.startswith(keys.page_prefix(name))


@given(names, edges)
def test_segment_keys(name: str, edge: tuple[int, int]) -> None:
    key = keys.segment_key(name, *edge)
    assert keys.parse_segment_key(name, key) == edge
    assert keys.parse_page_key(name, key) is None
    assert keys.parse_body_key(name, key) is None
    assert keys.parse_database_names(key) == name
    assert key.startswith(keys.log_prefix(name))
    assert not key.startswith(keys.page_prefix(name))


@given(names, edges, uniques)
def test_body_keys(name: str, edge: tuple[int, int], unique: str) -> None:
    key = keys.body_key(name, *edge, unique)
    assert keys.parse_body_key(name, key) == (*edge, unique)
    assert keys.parse_page_key(name, key) is None
    assert keys.parse_segment_key(name, key) is None
    assert keys.parse_database_names(key) == name
    assert key.startswith(keys.body_prefix(name))
    assert keys.body_prefix(name).startswith(keys.log_prefix(name))


@given(names, st.lists(close_edges, max_size=30), close_edges, st.integers(0, 45))
def test_a_listing_after_a_txid_gives_the_edges_from_there_on(
    name: str, made: list[tuple[int, int]], body: tuple[int, int], txid: int
) -> None:
    made_keys = sorted({keys.segment_key(name, *edge) for edge in made} | {keys.body_key(name, *body, "u")})
    listed = [key for key in made_keys if key > keys.log_after(name, txid)]
    parsed = [keys.parse_segment_key(name, key) for key in listed]
    assert parsed == [*sorted({edge for edge in made if edge[0] >= txid}), None]


@given(names, edges, edges)
def test_keys_sort_as_edges_do(name: str, one: tuple[int, int], other: tuple[int, int]) -> None:
    assert (keys.segment_key(name, *one) < keys.segment_key(name, *other)) == (one < other)
    assert keys.segment_key(name, *one) < keys.body_prefix(name)


@given(names, st.sampled_from(["-wal", "-000000000001", "-wal-000000000001", "2", "-", "~x", "-wal-wal"]), pgnos, edges)
def test_a_name_that_goes_on_like_a_key_is_another_database(name: str, more: str, pgno: int, edge: tuple[int, int]) -> None:
    other = name + more
    for key in (keys.page_key(other, pgno), keys.segment_key(other, *edge), keys.body_key(other, *edge, "u")):
        assert keys.parse_page_key(name, key) is None
        assert keys.parse_segment_key(name, key) is None
        assert keys.parse_body_key(name, key) is None
    for key in (keys.page_key(name, pgno), keys.segment_key(name, *edge), keys.body_key(name, *edge, "u")):
        assert keys.parse_page_key(other, key) is None
        assert keys.parse_segment_key(other, key) is None
        assert keys.parse_body_key(other, key) is None


@pytest.mark.parametrize(
    "key",
    [
        "a.db",
        "a.db-",
        "a.db-1",
        "a.db-000000000000",
        "a.db-00000000001x",
        "a.db-0000000000001",
        "a.db-004294967295",
        "a.db-00000000000\u0661",
        "a.db-000000000001\n",
        "a.db-wal/",
        "a.db-wal/0000000000000000-0000000000000000",
        "a.db-wal/0000000000000002-0000000000000001",
        "a.db-wal/0000000000000000-8000000000000000",
        "a.db-wal/000000000000000A-000000000000000B",
        "a.db-wal/0000000000000000-0000000000000001/",
        "a.db-wal/0000000000000000-0000000000000001\n",
        "a.db-wal/body/0000000000000000-0000000000000001",
        "a.db-wal/body/0000000000000000-0000000000000001-",
        "a.db-wal/body/0000000000000000-0000000000000001-a/b",
        "a.db-wal/body/0000000000000001-0000000000000001-a",
        "a b-000000000001",
        ".bottomless-probe-12",
        "",
        "/",
    ],
)
def test_what_is_no_key_is_passed_over(key: str) -> None:
    assert keys.parse_page_key("a.db", key) is None
    assert keys.parse_segment_key("a.db", key) is None
    assert keys.parse_body_key("a.db", key) is None
    assert keys.parse_database_names(key) is None


@given(st.text(max_size=60))
def test_any_key_of_anybody_can_be_parsed(key: str) -> None:
    assert keys.parse_page_key("a", key) is None or key.startswith("a-")
    name = keys.parse_database_names(key)
    assert name is None or key.startswith(name)


def test_numbers_out_of_range_give_no_key() -> None:
    for pgno in (0, -1, keys.MAX_PGNO + 1):
        with pytest.raises(ValueError):
            keys.page_key("a", pgno)
    for edge in ((1, 1), (2, 1), (-1, 1), (0, 2**63)):
        with pytest.raises(ValueError):
            keys.segment_key("a", *edge)
        with pytest.raises(ValueError):
            keys.body_key("a", *edge, "u")
    for unique in ("", "a/b", "..", "u" * 65):
        with pytest.raises(ValueError):
            keys.body_key("a", 0, 1, unique)
    for txid in (-1, 2**63):
        with pytest.raises(ValueError):
            keys.log_after("a", txid)
