"""Answers that do not end: what is read of them has a limit in size and in time, by both ways to a server."""

from __future__ import annotations

import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator

import pytest

from bottomless_wal.core.config import Config
from bottomless_wal.core.errors import StoreError
from bottomless_wal.storage import Store, open_store, s3_client, s3_http
from bottomless_wal.storage.s3_http import ANSWER_BYTES, ERROR_BYTES
from tests.support.endpoints import Endpoint, MakeConfig
from tests.support.faultproxy import Fault, FaultProxy

HEAD = b"HTTP/1.1 %d X\r\nContent-Type: application/xml\r\nETag: x\r\nConnection: close\r\n\r\n"
LISTING = b"<ListBucketResult><IsTruncated>false</IsTruncated><Name>"


class Endless:
    """A server that answers every request with `status` and `beginning`, and then with x, `pause` seconds between pieces.

    A connection ends after 96 MiB or 8 seconds, so that a client that reads all of it fails a test and does not stop it.
    """

    def __init__(self, status: int, beginning: bytes, piece: int = 1 << 20, pause: float = 0.0) -> None:
        self._answer, self._piece, self._pause = HEAD % status + beginning, b"x" * piece, pause
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.sent = 0
        self.requests = 0

    def __enter__(self) -> Endless:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                connection.recv(1 << 16)
                self.requests += 1
                connection.sendall(self._answer)
                left, end = 96 << 20, time.monotonic() + 8
                while left > 0 and time.monotonic() < end:
                    connection.sendall(self._piece)
                    self.sent += len(self._piece)
                    left -= len(self._piece)
                    time.sleep(self._pause)
            except OSError:
                return


@pytest.fixture(params=["direct", "by boto3's client"])
def way(request: pytest.FixtureRequest, own_environment: None, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param != "direct":
        monkeypatch.setattr(s3_client, "DIRECT", {})
    return str(request.param)


@pytest.fixture
def opened(way: str, make_config: MakeConfig) -> Iterator[Callable[..., Store]]:
    stores: list[Store] = []

    def make(server: Endless, **options: object) -> Store:
        stores.append(open_store(make_config(endpoint=server.url, **{"retry_timeout": 0.0, "read_timeout": 5.0, **options})))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


USES: list[tuple[str, Callable[[Store], object]]] = [
    ("list", lambda store: list(store.list(""))),
    ("put", lambda store: store.put("k", b"1")),
    ("delete", lambda store: store.delete(["k"])),
    ("delete many", lambda store: store.delete(["k", "l"])),
    ("upload", lambda store: store.upload("k", [b"x" * (9 << 20)])),
    ("versioned", lambda store: store.versioned()),
]


@pytest.mark.parametrize("use", [pytest.param(use[1], id=use[0]) for use in USES])
def test_an_answer_without_end(opened: Callable[..., Store], use: Callable[[Store], object]) -> None:
    with Endless(200, LISTING) as server:
        store = opened(server)
        with pytest.raises(StoreError, match=rf"given up.*{ANSWER_BYTES + 1} bytes and goes on, where at most {ANSWER_BYTES} can be"):
            use(store)
        assert server.sent < 4 * ANSWER_BYTES  # (what lies in buffers)


def test_it_costs_no_memory(opened: Callable[..., Store]) -> None:
    with Endless(200, LISTING) as server:
        store = opened(server)
        tracemalloc.start()
        try:
            with pytest.raises(StoreError, match="given up"):
                list(store.list(""))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 3 * ANSWER_BYTES


@pytest.mark.parametrize(("status", "told"), [(503, "given up.* 503"), (403, "403"), (404, "404")])
@pytest.mark.parametrize("use", [pytest.param(use[1], id=use[0]) for use in USES[:3]] + [lambda store: store.get("k", limit=1)])
def test_an_error_without_end_is_told_by_its_status(
    opened: Callable[..., Store], use: Callable[[Store], object], status: int, told: str
) -> None:
    with Endless(status, b"<html>") as server:
        with pytest.raises(StoreError, match=told):
            use(opened(server))
        assert server.sent < 4 * ANSWER_BYTES


def test_an_object_without_end_is_read_to_its_limit(opened: Callable[..., Store]) -> None:
    with Endless(200, b"") as server:
        with pytest.raises(StoreError, match="cannot be told which bytes"):
            opened(server).read("k", 0, 10)
        with pytest.raises(Exception, match="more than the 1000 bytes"):
            opened(server).get("k", limit=1000)
        assert server.sent < 4 * ANSWER_BYTES


@pytest.mark.parametrize("use", [USES[0][1], USES[1][1], lambda store: store.get("k", limit=1 << 20)], ids=["list", "put", "get"])
@pytest.mark.parametrize("status", [200, 503])
def test_an_answer_that_drips(
    opened: Callable[..., Store], monkeypatch: pytest.MonkeyPatch, use: Callable[[Store], object], status: int
) -> None:
    """No piece takes as long as the read timeout, and the whole would never be there."""
    monkeypatch.setattr(s3_http, "_PATIENCE_SECONDS", 0.5)
    with Endless(status, LISTING, piece=1, pause=0.05) as server:
        began = time.monotonic()
        with pytest.raises(StoreError, match="comes too slowly"):
            use(opened(server))
        assert time.monotonic() - began < 4
        # The time that is left to the attempt counts where there is one.
        monkeypatch.setattr(s3_http, "_PATIENCE_SECONDS", 1000.0)
        began = time.monotonic()
        with pytest.raises(StoreError, match="comes too slowly"):
            use(opened(server, retry_timeout=1.0))
        assert time.monotonic() - began < 5


def test_a_page_of_the_longest_keys_passes(way: str, moto_endpoint: Endpoint, config: Config) -> None:
    """1,000 keys of 1,024 bytes, URL-encoded and with all that a server may say of each."""
    row = (
        "<Contents><Key>%s</Key><LastModified>2024-01-01T00:00:00.000Z</LastModified><ETag>&quot;{0}&quot;</ETag>"
        "<ChecksumAlgorithm>CRC64NVME</ChecksumAlgorithm><ChecksumType>FULL_OBJECT</ChecksumType><Size>123456789</Size>"
        "<Owner><ID>{0}{0}</ID><DisplayName>{0}</DisplayName></Owner><StorageClass>INTELLIGENT_TIERING</StorageClass></Contents>"
    ).replace("{0}", "0" * 32)
    names = [f"{number:04d}" + "é" * 510 for number in range(1000)]
    rows = "".join(row % (name[:4] + "%C3%A9" * 510) for name in names)
    body = f"<ListBucketResult><EncodingType>url</EncodingType><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>".encode()
    assert 3 << 20 < len(body) < ANSWER_BYTES
    with FaultProxy(moto_endpoint.url) as proxy:
        proxy.script(Fault(instead=b"HTTP/1.1 200 OK\r\nContent-Type: application/xml\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)))
        store = open_store(config.changed(endpoint=proxy.url))
        assert [entry.key for entry in store.list("")] == names
        store.close()


def test_a_long_error_of_s3_is_read(way: str, moto_endpoint: Endpoint, config: Config) -> None:
    said = f"<Error><Code>AccessDenied</Code><Message>{'because ' * 1000}</Message></Error>".encode()
    assert len(said) < ERROR_BYTES
    with FaultProxy(moto_endpoint.url) as proxy:
        proxy.script(Fault(instead=b"HTTP/1.1 403 Forbidden\r\nContent-Length: %d\r\n\r\n%s" % (len(said), said)))
        store = open_store(config.changed(endpoint=proxy.url))
        with pytest.raises(StoreError, match="403 AccessDenied because"):
            list(store.list(""))
        store.close()


def test_connections_are_used_again(way: str, moto_endpoint: Endpoint, config: Config) -> None:
    """An answer that was read to its end leaves its connection to the next request, errors too."""
    with FaultProxy(moto_endpoint.url) as proxy:
        store = open_store(config.changed(endpoint=proxy.url))
        store.prepare()
        assert store.conditional()
        before = proxy.connections
        for _ in range(5):
            store.put("k", b"x" * 100_000)
            assert store.get("k", limit=1 << 20)
            assert store.get("absent", limit=1) is None
            assert not store.create("k", b"").created
            list(store.list(""))
        assert proxy.connections <= before + 1
        store.close()


@pytest.fixture
def config(moto_endpoint: Endpoint, make_config: MakeConfig) -> Config:
    return make_config(moto_endpoint)
