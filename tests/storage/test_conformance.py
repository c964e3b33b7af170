"""One suite for every store: what `store.base` promises, each of them keeps."""

from __future__ import annotations

import os
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator

import pytest

from bottomless_wal.core.config import Config
from bottomless_wal.core.errors import ConfigError, CorruptionError, StoreError
from bottomless_wal.core.pool import each
from bottomless_wal.storage import Entry, Store, open_store, s3_client
from tests.support.endpoints import Endpoint, MakeConfig, endpoint_of

ABSENT = "no-such-object"


@pytest.fixture(params=["rclone", "moto", "directory", "moto by boto3's client"])
def endpoint(request: pytest.FixtureRequest, own_environment: None, monkeypatch: pytest.MonkeyPatch) -> Endpoint:
    """Every kind of store; and one that is asked as Amazon's is, of which there is none here."""
    kind, _, client = request.param.partition(" by ")
    if client:
        monkeypatch.setattr(s3_client, "DIRECT", {})
    return endpoint_of(kind, request)


@pytest.fixture
def config(endpoint: Endpoint, make_config: MakeConfig) -> Config:
    return make_config(endpoint)


@pytest.fixture
def store(config: Config) -> Iterator[Store]:
    store = open_store(config)
    store.prepare()
    yield store
    store.close()


def keys(store: Store, prefix: str = "", after: str = "") -> list[str]:
    return [entry.key for entry in store.list(prefix, after=after)]


# ------------------------------------------------------------------------------------------------ objects


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 300, os.urandom(3 << 20)], ids=len)
def test_what_was_put_is_got(store: Store, data: bytes) -> None:
    assert store.put("k", data).created
    assert store.get("k", limit=len(data)) == data
    assert list(store.list("k")) == [Entry("k", len(data), pytest.approx(time.time(), abs=60))]


def test_put_overwrites(store: Store) -> None:
    store.put("k", b"long content")
    store.put("k", b"short")
    assert store.get("k", limit=100) == b"short"
    assert [entry.size for entry in store.list("k")] == [5]


def test_a_put_is_seen_by_everybody_at_once(store: Store, config: Config) -> None:
    other = open_store(config)
    for number in range(20):
        assert store.get("k", limit=10) == (None if number == 0 else b"%d" % (number - 1))
        other.put("k", b"%d" % number)
        other.put(f"n/{number}", b"")
        assert len(keys(store, "n/")) == number + 1
    other.close()


def test_absence_is_a_value(store: Store) -> None:
    assert store.get(ABSENT, limit=10) is None
    assert store.get(f"{ABSENT}/below", limit=10) is None
    assert store.read(ABSENT, 0, 10) is None
    assert store.read(ABSENT, 5, 0) is None
    assert keys(store, ABSENT) == []
    store.delete([ABSENT])
    store.delete([])


def test_what_is_a_directory_to_some_is_no_object(store: Store) -> None:
    store.put("a/b/c", b"")
    assert store.get("a", limit=10) is None
    assert store.get("a/b", limit=10) is None
    assert store.read("a/b", 0, 1) is None
    assert keys(store) == ["a/b/c"]


def test_an_object_above_the_limit_is_not_read(store: Store) -> None:
    store.put("k", b"x" * 1_000_000)
    before = store.stats.bytes_received
    with pytest.raises(CorruptionError, match=r"'k'.*1000000 bytes"):
        store.get("k", limit=999_999)
    assert store.stats.bytes_received == before
    assert store.get("k", limit=1_000_000) is not None


@pytest.mark.parametrize(
    ("start", "length", "expected"),
    [
        (0, 10, b"0123456789"),
        (0, 3, b"012"),
        (3, 4, b"3456"),
        (9, 1, b"9"),
        (8, 100, b"89"),
        (10, 5, b""),
        (1000, 5, b""),
        (0, 0, b""),
        (4, 0, b""),
        (10, 0, b""),
    ],
)
def test_ranges(store: Store, start: int, length: int, expected: bytes) -> None:
    store.put("k", b"0123456789")
    assert store.read("k", start, length) == expected


def test_ranges_of_an_empty_object(store: Store) -> None:
    store.put("k", b"")
    assert store.read("k", 0, 10) == b""
    assert store.read("k", 3, 10) == b""


@pytest.mark.parametrize(("start", "length"), [(-1, 5), (0, -1)])
def test_a_range_cannot_be_negative(store: Store, start: int, length: int) -> None:
    with pytest.raises(ValueError):
        store.read("k", start, length)


def test_large_ranges(store: Store) -> None:
    data = os.urandom(2 << 20)
    store.put("k", data)
    assert store.read("k", 123_456, 1_500_000) == data[123_456:1_623_456]


# ------------------------------------------------------------------------------------------------ keys

ODD_KEYS = [
    "a b",
    "a+b",
    "a%2Fb",
    "a=2F~b",
    "a&b?c#d",
    "quote\"and'",
    "<xml>&amp;",
    "back\\slash",
    "ümläut €",
    "\N{GRINNING FACE}",
    "\uffee",
    ".hidden",
    "..almost",
    "dir.with.dots/.hidden/file",
    "x" * 255,
    "/".join(["y" * 200] * 5),
    "app.db-wal/0000000000000001-0000000000000002",
    "app.db-000000000001",
]


def test_odd_keys(store: Store, endpoint: Endpoint) -> None:
    for number, key in enumerate(ODD_KEYS):
        store.put(key, b"%d" % number)
    for number, key in enumerate(ODD_KEYS):
        assert store.get(key, limit=10) == b"%d" % number
        assert keys(store, key) == [key]
    assert keys(store) == sorted(ODD_KEYS, key=str.encode)
    store.delete(ODD_KEYS)
    assert keys(store) == []


@pytest.mark.parametrize(
    "key",
    ["", "/a", "a/", "a//b", ".", "..", "../a", "a/../b", "a/./b", "a\0b", "a\nb", "a\x7f", "x" * 1025, "é" * 513, "\udcff"],
)
def test_keys_that_cannot_be(store: Store, key: str) -> None:
    for use in (
        lambda: store.get(key, limit=1),
        lambda: store.read(key, 0, 1),
        lambda: store.put(key, b""),
        lambda: store.create(key, b""),
        lambda: store.upload(key, [b""]),
        lambda: store.delete([key]),
        lambda: store.delete(["fine", key]),
    ):
        with pytest.raises(ConfigError, match="no name for an object"):
            use()
    assert keys(store) == []


# ------------------------------------------------------------------------------------------------ listings


def test_listings_are_sorted_by_bytes(store: Store) -> None:
    names = [*"aZzé", "a-", "a.b", "a-b/c", "b/1", "b/2", "b-", "b.", "b/10", "bb", "d/e/f", "d/e-", "d-", "d/e.x", "d0"]
    for name in names:
        store.put(name, b"")
    assert keys(store) == sorted(names, key=str.encode)


def test_listings_by_prefix(store: Store) -> None:
    for name in ("a.db-000000000001", "a.db-wal/1-2", "a.db-wal/2-3", "a.db2-000000000001", "a.db2-wal/1-2", "a.dc"):
        store.put(name, b"")
    assert keys(store, "a.db-") == ["a.db-000000000001", "a.db-wal/1-2", "a.db-wal/2-3"]
    assert keys(store, "a.db-wal/") == ["a.db-wal/1-2", "a.db-wal/2-3"]
    assert keys(store, "a.db-wal/2") == ["a.db-wal/2-3"]
    assert keys(store, "a.db-wa") == ["a.db-wal/1-2", "a.db-wal/2-3"]
    assert keys(store, "b") == []


def test_listings_after_a_key(store: Store) -> None:
    names = ["a", "b/1", "b/2", "b/3", "c", "d/1"]
    for name in names:
        store.put(name, b"")
    for after in ("", "a", "aa", "b", "b/", "b/1", "b/1x", "b/2", "b/3", "b/zzz", "b0", "c", "d/0", "d/1", "e"):
        assert keys(store, after=after) == [name for name in names if name > after], after
        assert keys(store, "b/", after) == [name for name in names if name > after and name.startswith("b/")], after
    assert keys(store, "b/", "a") == ["b/1", "b/2", "b/3"]
    assert keys(store, "b/", "z") == []


def test_more_than_a_page(store: Store, endpoint: Endpoint) -> None:
    count = 2345 if endpoint.kind == "directory" else 1100
    names = [f"n/{number:05d}" for number in range(count)]
    store.put("m", b"")
    store.put("o", b"")
    each(lambda name: store.put(name, b""), names, 8)
    assert keys(store, "n/") == names
    assert keys(store, "n/", "n/00999") == names[1000:]
    # Pages come as they are asked for.
    before = store.stats.requests.get("list", 0)
    rows = store.list("n/")
    assert next(rows).key == "n/00000"
    assert store.stats.requests["list"] == before + 1
    store.delete(names)
    assert keys(store) == ["m", "o"]


# ------------------------------------------------------------------------------------------------ create-only


def test_create_refuses_a_taken_key(store: Store) -> None:
    first = store.create("k", b"first")
    second = store.create("k", b"second")
    assert (first.created, second.created) == (True, False)
    assert store.get("k", limit=100) == b"first"
    assert second.date >= first.date
    store.delete(["k"])
    assert store.create("k", b"third").created
    assert store.get("k", limit=100) == b"third"


def test_conditional_says_what_the_server_does(store: Store, endpoint: Endpoint) -> None:
    assert store.conditional() is (endpoint.kind != "rclone")
    assert keys(store) == []
    before = store.stats.requests
    store.conditional()
    assert store.stats.requests == before


def test_a_server_without_conditions_is_looked_at_first(
    rclone_endpoint: Endpoint, make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(make_config(rclone_endpoint))
    store.prepare()
    for number in range(5):
        assert store.create(f"k{number}", b"").created
        assert not store.create(f"k{number}", b"").created
    assert [record.levelname for record in caplog.records if "create-only" in record.message] == ["WARNING"]
    assert store.stats.requests["head"] == 10
    assert store.stats.requests["create"] == 5
    assert store.stats.requests["probe"] == 2
    store.close()


@pytest.mark.parametrize("kind", ["moto", "directory"])
def test_of_many_creators_one_wins(kind: str, request: pytest.FixtureRequest, make_config: MakeConfig) -> None:
    store = open_store(make_config(endpoint_of(kind, request)))
    store.prepare()
    assert store.conditional()
    for round_ in range(10):
        gate = threading.Barrier(8)
        winners: list[int] = []

        def race(number: int, gate: threading.Barrier = gate, winners: list[int] = winners, key: str = f"r/{round_}") -> None:
            gate.wait()
            if store.create(key, b"%d" % number).created:
                winners.append(number)

        threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(winners) == 1
        assert store.get(f"r/{round_}", limit=10) == b"%d" % winners[0]
    store.close()


# ------------------------------------------------------------------------------------------------ uploads


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [([], 0), ([0, 0], 0), ([5], 0), ([8 << 20], 0), ([(8 << 20) + 1], 2), ([1_000_003] * 21, 3), ([20 << 20], 3)],
    ids=["none", "empty", "small", "one part", "one part and a byte", "small chunks", "large chunk"],
)
def test_uploads(store: Store, endpoint: Endpoint, sizes: list[int], parts: int) -> None:
    chunks = [bytes([number % 251 + 1]) * size for number, size in enumerate(sizes)]
    assert store.upload("body/x", iter(chunks)) == sum(sizes)
    assert store.get("body/x", limit=64 << 20) == b"".join(chunks)
    assert [entry.size for entry in store.list("body/")] == [sum(sizes)]
    if endpoint.kind != "directory":
        assert store.stats.requests.get("part", 0) == parts


class OddError(Exception):
    pass


@pytest.mark.parametrize("error", [OddError("of the source"), OSError(28, "of the source"), KeyboardInterrupt()], ids=repr)
def test_an_upload_that_fails_leaves_nothing(store: Store, error: BaseException) -> None:
    store.put("old", b"before")

    def chunks() -> Iterator[bytes]:
        for _ in range(19):
            yield b"x" * (1 << 20)
        raise error

    for key in ("new", "old"):
        with pytest.raises(type(error)) as raised:
            store.upload(key, chunks())
        assert raised.value is error
    assert keys(store) == ["old"]
    assert store.get("old", limit=10) == b"before"


def test_an_upload_needs_little_memory(store: Store) -> None:
    tracemalloc.start()
    try:
        assert store.upload("k", (bytes(1 << 20) for _ in range(72))) == 72 << 20
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 48 << 20
    store.delete(["k"])


# ------------------------------------------------------------------------------------------------ time, counts, ends


def test_time_is_the_servers(store: Store, config: Config) -> None:
    receipts = [store.put("a", b""), store.create("b", b""), store.create("b", b"")]
    for receipt in receipts:
        assert receipt.date == pytest.approx(time.time(), abs=60)
    assert store.now() >= receipts[0].date
    fresh = open_store(config)
    assert fresh.now() == pytest.approx(time.time(), abs=60)
    fresh.close()


def test_counts(store: Store) -> None:
    store.conditional()
    requests, sent, received = store.stats.requests, store.stats.bytes_sent, store.stats.bytes_received
    store.put("a", b"12345")
    store.create("b", b"123")
    store.get("a", limit=10)
    store.read("a", 1, 2)
    store.get(ABSENT, limit=10)
    keys(store)
    grown = {kind: count - requests.get(kind, 0) for kind, count in store.stats.requests.items()}
    assert {kind: grown[kind] for kind in ("put", "create", "get", "list")} == {"put": 1, "create": 1, "get": 3, "list": 1}
    assert store.stats.bytes_sent - sent == 8
    assert store.stats.bytes_received - received == 7
    assert store.stats.retries == 0


def test_a_closed_store_says_so(config: Config) -> None:
    store = open_store(config)
    store.prepare()
    store.close()
    store.close()
    for use in (lambda: store.put("k", b""), lambda: store.get("k", limit=1), lambda: list(store.list(""))):
        with pytest.raises(StoreError, match="was closed"):
            use()


def test_threads_may_share_a_store(store: Store) -> None:
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(15):
                store.put(f"t/{number}", b"%d" % turn)
                assert store.get(f"t/{number}", limit=10) == b"%d" % turn
        except BaseException as error:  # noqa: BLE001  (raised below)
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(keys(store, "t/")) == 8


def test_a_forked_child_uses_connections_of_its_own(store: Store) -> None:
    store.put("k", b"parent")
    child = os.fork()
    if child == 0:
        try:
            store.put("k", b"child")
            os._exit(0 if store.get("k", limit=10) == b"child" else 1)
        except BaseException:  # noqa: BLE001  (a forked child must not go on as pytest)
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert store.get("k", limit=10) == b"child"


# ------------------------------------------------------------------------------------------------ buckets


def test_a_missing_bucket_is_never_absence(endpoint: Endpoint, make_config: MakeConfig) -> None:
    store = open_store(make_config(endpoint, create_bucket=False))
    uses: list[Callable[[], object]] = [
        store.prepare,
        lambda: store.get("k", limit=1),
        lambda: store.read("k", 0, 1),
        lambda: keys(store),
        lambda: store.put("k", b""),
        lambda: store.create("k", b""),
        lambda: store.upload("k", [b"x" * (9 << 20)]),
        lambda: store.delete(["k"]),
        lambda: store.delete(["k", "l"]),
    ]
    if endpoint.kind != "directory":
        uses.append(store.conditional)
    for use in uses:
        with pytest.raises(StoreError) as raised:
            use()
        assert "create_bucket=1" in raised.value.hint
        assert endpoint.bucket in raised.value.message
    store.close()


def test_a_bucket_is_made_where_that_is_wanted(endpoint: Endpoint, make_config: MakeConfig) -> None:
    for _ in range(2):
        store = open_store(make_config(endpoint))
        store.prepare()
        store.close()
    store = open_store(make_config(endpoint, create_bucket=False))
    store.prepare()
    assert keys(store) == []
    store.close()


def test_describe_names_bucket_and_place(store: Store, endpoint: Endpoint) -> None:
    place = endpoint.url.removeprefix("file://") if endpoint.kind == "directory" else endpoint.url
    assert place in store.describe()
    assert endpoint.bucket in store.describe()
