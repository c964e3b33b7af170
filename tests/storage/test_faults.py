"""What S3 stores do when the network, a proxy or the server fails: between them and a real server stands `faultproxy`."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from bottomless_wal.core.config import Config
from bottomless_wal.core.errors import StoreError, TransientError
from bottomless_wal.core.pool import each
from bottomless_wal.storage import Store, open_store
from tests.support.endpoints import Endpoint, MakeConfig
from tests.support.faketime import FakeTime
from tests.support.faultproxy import Fault, FaultProxy, answer, hang, lost_answer, reset

LOG = "bottomless_wal.storage.retry"


@pytest.fixture
def proxy(moto_endpoint: Endpoint) -> Iterator[FaultProxy]:
    with FaultProxy(moto_endpoint.url) as proxy:
        yield proxy


@pytest.fixture
def fake() -> FakeTime:
    return FakeTime()


@pytest.fixture
def config(proxy: FaultProxy, moto_endpoint: Endpoint, make_config: MakeConfig) -> Config:
    return make_config(moto_endpoint, endpoint=proxy.url, retry_timeout=30.0, read_timeout=10.0)


@pytest.fixture
def store(config: Config, fake: FakeTime, proxy: FaultProxy) -> Iterator[Store]:
    """Ready, with a probe behind it, and whatever the proxy has seen so far forgotten."""
    store = open_store(config, sleep=fake.sleep, clock=fake.clock)
    store.prepare()
    assert store.conditional()
    store.put("k", b"0123456789")
    proxy.requests.clear()
    yield store
    store.close()


MAY_PASS = [
    pytest.param(lambda: reset(times=2), id="reset"),
    pytest.param(lambda: lost_answer(times=2), id="lost answer"),
    pytest.param(lambda: answer(500, "InternalError", times=2), id="500"),
    pytest.param(lambda: answer(502, body=b"<html>Bad Gateway</html>", times=2), id="502 in HTML"),
    pytest.param(lambda: answer(503, "SlowDown", times=2), id="SlowDown"),
    pytest.param(lambda: answer(503, times=2), id="503 with nothing"),
    pytest.param(lambda: answer(504, body=b"\xff\xfe\x00garbage", times=2), id="504 with garbage"),
    pytest.param(lambda: answer(429, times=2), id="429"),
    pytest.param(lambda: answer(400, "RequestTimeout", times=2), id="RequestTimeout"),
    pytest.param(lambda: answer(400, "ThrottlingException", times=2), id="throttled"),
    pytest.param(lambda: answer(400, "BadDigest", times=2), id="changed on its way"),
    pytest.param(lambda: answer(409, "OperationAborted", times=2), id="OperationAborted"),
    pytest.param(lambda: answer(409, "ConditionalRequestConflict", times=2), id="ConditionalRequestConflict"),
]

USES: list[tuple[str, Callable[[Store], object], object]] = [
    ("get", lambda store: store.get("k", limit=10), b"0123456789"),
    ("absent", lambda store: store.get("absent", limit=10), None),
    ("read", lambda store: store.read("k", 2, 3), b"234"),
    ("put", lambda store: store.put("k", b"").created, True),
    ("list", lambda store: [entry.key for entry in store.list("")], ["k"]),
    ("delete", lambda store: store.delete(["k"]), None),
    ("delete many", lambda store: store.delete(["k", "l"]), None),
    ("prepare", lambda store: store.prepare(), None),
]


@pytest.mark.parametrize("fault", MAY_PASS)
@pytest.mark.parametrize(("use", "expected"), [pytest.param(*use[1:], id=use[0]) for use in USES])
def test_what_may_pass_is_tried_again(
    store: Store, proxy: FaultProxy, fake: FakeTime, fault: Callable[[], Fault], use: Callable[[Store], object], expected: object
) -> None:
    proxy.script(fault())
    assert use(store) == expected
    assert len(proxy.requests) == 3
    assert store.stats.retries == 2
    assert len(fake.slept) == 2


@pytest.mark.parametrize("fault", [case for case in MAY_PASS if case.id != "lost answer"])
def test_a_create_is_tried_again(store: Store, proxy: FaultProxy, fault: Callable[[], Fault]) -> None:
    proxy.script(fault())
    assert store.create("new", b"1").created
    assert store.get("new", limit=10) == b"1"


def test_a_create_whose_answer_was_lost_finds_the_key_taken(store: Store, proxy: FaultProxy) -> None:
    proxy.script(lost_answer("PUT"))
    assert not store.create("new", b"1").created
    assert store.get("new", limit=10) == b"1"
    assert [request.headers.get("if-none-match") for request in proxy.requests if request.method == "PUT"] == ["*", "*"]


def test_a_create_is_conditional_at_every_attempt(store: Store, proxy: FaultProxy) -> None:
    proxy.script(answer(503, "SlowDown", "PUT", times=3))
    assert not store.create("k", b"other").created
    assert [request.headers.get("if-none-match") for request in proxy.requests] == ["*"] * 4
    assert store.get("k", limit=10) == b"0123456789"


def test_a_create_without_conditions_looks_at_every_attempt(rclone_endpoint: Endpoint, make_config: MakeConfig, fake: FakeTime) -> None:
    with FaultProxy(rclone_endpoint.url) as proxy:
        store = open_store(make_config(rclone_endpoint, endpoint=proxy.url), sleep=fake.sleep, clock=fake.clock)
        store.prepare()
        assert not store.conditional()
        proxy.requests.clear()
        proxy.script(lost_answer("PUT", path="new"))
        assert not store.create("new", b"1").created
        assert [request.method for request in proxy.requests] == ["HEAD", "PUT", "HEAD"]
        proxy.script(answer(503, "", "HEAD"), reset("PUT"))
        assert store.create("newer", b"1").created
        store.close()


@pytest.mark.parametrize(
    ("fault", "message", "hint"),
    [
        (lambda: answer(403, "AccessDenied"), "403 AccessDenied", "credentials"),
        (lambda: answer(403, "SignatureDoesNotMatch"), "403 SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY"),
        (lambda: answer(403, "RequestTimeTooSkewed"), "403 RequestTimeTooSkewed", "clock"),
        (lambda: answer(403, body=b"<html>Forbidden</html>"), "403", "credentials"),
        (lambda: answer(400, "ExpiredToken"), "400 ExpiredToken", "new ones"),
        (lambda: answer(404, "NoSuchBucket"), "404 NoSuchBucket", "create_bucket=1"),
        (lambda: answer(404, body=b"<html>Not Found</html>"), "404", "endpoint"),
        (lambda: answer(404), "404", "endpoint"),
        (lambda: answer(400, "InvalidBucketName"), "400 InvalidBucketName", "lower-case"),
        (lambda: answer(501, "NotImplemented"), "501 NotImplemented", ""),
    ],
    ids=lambda value: value if isinstance(value, str) and value else "",
)
@pytest.mark.parametrize("use", [pytest.param(use[1], id=use[0]) for use in USES if not use[0].startswith(("prepare", "delete"))])
def test_what_will_not_pass_is_not_tried_again(
    store: Store, proxy: FaultProxy, fault: Callable[[], Fault], message: str, hint: str, use: Callable[[Store], object]
) -> None:
    proxy.script(fault())
    with pytest.raises(StoreError) as raised:
        use(store)
    assert not isinstance(raised.value, TransientError)
    assert message in raised.value.message
    assert store.describe() in raised.value.message
    assert hint in raised.value.hint
    assert len(proxy.requests) == 1
    use(store)  # it goes on working


def test_a_portal_that_redirects_is_no_store(store: Store, proxy: FaultProxy) -> None:
    """(boto3, left alone, looks for the bucket's region then, is redirected again, and recurses until Python ends it.)"""
    proxy.script(answer(302, body=b"<html>log in first</html>", times=10_000))
    for use in (lambda: store.get("k", limit=10), lambda: store.put("k", b""), lambda: list(store.list(""))):
        with pytest.raises(StoreError, match="302") as raised:
            use()
        assert "endpoint" in raised.value.hint
    assert len(proxy.requests) == 3
    assert store.stats.retries == 0


# ------------------------------------------------------------------------------------------------ giving up


def test_giving_up_names_everything(store: Store, proxy: FaultProxy, fake: FakeTime) -> None:
    proxy.script(answer(503, "SlowDown", times=10_000))
    start = fake.seconds
    with pytest.raises(StoreError) as raised:
        store.put("some/key", b"")
    assert not isinstance(raised.value, TransientError)
    assert 20 < fake.seconds - start <= 30
    for part in (
        "PUT 'some/key'",
        store.describe(),
        f"{fake.seconds - start:.1f} s",
        f"{len(proxy.requests)} attempts",
        "SlowDown",
    ):
        assert part in raised.value.message
    assert raised.value.message.count("some/key") == 1
    assert "retry_timeout" in raised.value.hint
    assert isinstance(raised.value.__cause__, TransientError)
    assert len(proxy.requests) == len(fake.slept) + 1


def test_waits_grow_and_differ(store: Store, proxy: FaultProxy, fake: FakeTime) -> None:
    proxy.script(answer(503, times=10_000))
    for _ in range(4):
        with pytest.raises(StoreError):
            store.put("k", b"")
    assert all(0 <= wait <= 5 for wait in fake.slept)
    assert len(set(fake.slept)) == len(fake.slept)
    assert len(fake.slept) < 100


def test_an_unreachable_server_is_given_up_in_time(make_config: MakeConfig, fake: FakeTime) -> None:
    with FaultProxy("http://127.0.0.1:1") as closed:
        pass
    store = open_store(make_config(endpoint=closed.url, retry_timeout=30.0), sleep=fake.sleep, clock=fake.clock)
    for use in (store.prepare, lambda: store.get("k", limit=1), lambda: store.create("k", b""), lambda: list(store.list(""))):
        start = fake.seconds
        with pytest.raises(StoreError, match="Could not connect"):
            use()
        assert 20 < fake.seconds - start <= 30
    store.close()


def test_no_retries_at_all(config: Config, proxy: FaultProxy, fake: FakeTime) -> None:
    store = open_store(config.changed(retry_timeout=0.0), sleep=fake.sleep, clock=fake.clock)
    proxy.script(answer(503))
    with pytest.raises(StoreError, match="1 attempt:"):
        store.prepare()
    store.prepare()
    assert fake.slept == []
    store.close()


def test_a_silent_server_is_given_up_in_time(config: Config, proxy: FaultProxy) -> None:
    """In real time: the running attempt, too, has only what is left of the time."""
    store = open_store(config.changed(retry_timeout=0.5, read_timeout=30.0))
    store.prepare()
    proxy.script(hang(20, times=100))
    start = time.monotonic()
    with pytest.raises(StoreError, match="given up after"):
        store.get("k", limit=1)
    assert 0.3 < time.monotonic() - start < 2
    store.close()


def test_a_silent_server_is_asked_again(config: Config, proxy: FaultProxy, fake: FakeTime) -> None:
    store = open_store(config.changed(read_timeout=0.2), sleep=fake.sleep, clock=fake.clock)
    store.prepare()
    proxy.script(hang(20))
    assert store.put("k", b"").created
    assert store.stats.retries == 1
    store.close()


def test_closing_ends_the_waits(config: Config, proxy: FaultProxy) -> None:
    store = open_store(config.changed(retry_timeout=600.0))
    store.prepare()
    proxy.script(answer(503, times=10_000))
    raised: list[BaseException] = []

    def work() -> None:
        try:
            store.put("k", b"")
        except StoreError as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while store.stats.retries < 4:  # by now the waits may be long
        time.sleep(0.01)
    store.close()
    thread.join(timeout=5)
    assert not thread.is_alive()
    assert "was closed" in str(raised[0])


# ------------------------------------------------------------------------------------------------ deadlines


def test_a_deadline_bounds_all_requests_together(store: Store, proxy: FaultProxy, fake: FakeTime) -> None:
    start = fake.seconds
    proxy.script(answer(503, times=10_000))
    with store.deadline(8.0):
        for _ in range(5):
            with pytest.raises(StoreError):
                store.put("k", b"")
    assert fake.seconds - start <= 8
    start = fake.seconds
    with pytest.raises(StoreError):
        store.put("k", b"")
    assert fake.seconds - start > 20


def test_a_deadline_may_be_longer_than_retry_timeout(store: Store, proxy: FaultProxy, fake: FakeTime) -> None:
    start = fake.seconds
    proxy.script(answer(503, times=10_000))
    with store.deadline(300.0), pytest.raises(StoreError):
        store.put("k", b"")
    assert 200 < fake.seconds - start <= 300


def test_a_deadline_that_is_over_asks_nothing(store: Store, proxy: FaultProxy, fake: FakeTime) -> None:
    with store.deadline(1.0):
        fake.sleep(2.0)
        with pytest.raises(StoreError, match="time that was set"):
            store.put("k", b"")
    assert proxy.requests == []
    store.put("k", b"")


def test_the_nearest_of_nested_deadlines_holds(store: Store, proxy: FaultProxy, fake: FakeTime) -> None:
    proxy.script(answer(503, times=10_000))
    for outer, inner in ((3.0, 100.0), (100.0, 3.0)):
        start = fake.seconds
        with store.deadline(outer), store.deadline(inner), pytest.raises(StoreError):
            store.put("k", b"")
        assert fake.seconds - start <= 3


def test_a_deadline_is_for_this_thread_and_its_helpers(store: Store, proxy: FaultProxy, fake: FakeTime) -> None:
    with store.deadline(1.0):
        fake.sleep(2.0)
        stranger: list[bool] = []
        thread = threading.Thread(target=lambda: stranger.append(store.put("k", b"").created))
        thread.start()
        thread.join()
        assert stranger == [True]
        refused: list[str] = []

        def put(number: int) -> None:
            try:
                store.put(f"p{number}", b"")
            except StoreError as error:
                refused.append(str(error))

        each(put, range(8), 4)
        assert len(refused) == 8


# ------------------------------------------------------------------------------------------------ loud outages


def test_an_outage_is_two_warnings(store: Store, proxy: FaultProxy, fake: FakeTime, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOG)
    start = fake.seconds
    proxy.script(answer(503, "SlowDown", times=10_000))
    for _ in range(3):
        with pytest.raises(StoreError):
            store.put("k", b"secret content")
    proxy.clear()
    store.put("k", b"")
    store.put("k", b"")
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert "503 SlowDown" in warnings[0]
    assert f"after {fake.seconds - start:.1f} s" in warnings[1]
    retries = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert len(retries) == store.stats.retries
    assert all("SlowDown" in message and "'k'" in message for message in retries)
    assert "secret" not in caplog.text
    assert "testtesttest" not in caplog.text


def test_no_news_is_good_news(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOG)
    store.put("k", b"")
    store.get("absent", limit=1)
    assert [record for record in caplog.records if record.name.startswith("bottomless")] == []


# ------------------------------------------------------------------------------------------------ bad answers


@pytest.mark.parametrize("size", [0, 1, 5, 9])
def test_a_truncated_body_is_read_again(store: Store, proxy: FaultProxy, size: int) -> None:
    for use in (lambda: store.get("k", limit=100), lambda: store.read("k", 0, 10), lambda: store.read("k", 0, 100)):
        proxy.requests.clear()
        proxy.script(Fault("GET", truncate=size))
        assert use() == b"0123456789"
        assert len(proxy.requests) == 2


def test_a_truncated_listing_is_asked_for_again(store: Store, proxy: FaultProxy) -> None:
    proxy.script(Fault("GET", truncate=300), Fault("GET", truncate=40), Fault("GET", truncate=0))
    assert [entry.key for entry in store.list("")] == ["k"]
    assert len(proxy.requests) == 4


@pytest.mark.parametrize("body", [b"<html><body>Welcome!</body></html>", b"", b"<ListBucketResult/>", b"{}", b"\x00\xff"])
def test_a_page_that_is_no_listing_is_not_an_empty_bucket(store: Store, proxy: FaultProxy, body: bytes) -> None:
    proxy.script(answer(200, body=body, times=10_000))
    for use in (lambda: list(store.list("")), store.prepare):
        with pytest.raises(StoreError, match="given up after"):
            use()


def test_a_page_that_says_ok_is_not_a_stored_object(store: Store, proxy: FaultProxy) -> None:
    proxy.script(answer(200, body=b"<html>Welcome!</html>", method="PUT", times=10_000))
    for use in (lambda: store.put("k", b""), lambda: store.create("l", b"")):
        with pytest.raises(StoreError, match="not one of S3"):
            use()


def listing(*keys: str, token: str = "") -> bytes:
    rows = "".join(f"<Contents><Key>{key}</Key><Size>1</Size><LastModified>2026-01-01T00:00:00Z</LastModified></Contents>" for key in keys)
    more = f"<IsTruncated>true</IsTruncated>{token}" if token else "<IsTruncated>false</IsTruncated>"
    return f"<ListBucketResult>{more}{rows}</ListBucketResult>".encode()


def test_a_listing_out_of_order_is_refused(store: Store, proxy: FaultProxy) -> None:
    proxy.script(answer(200, body=listing("a", "c", "b")))
    with pytest.raises(StoreError, match="'b' came after 'c'"):
        list(store.list(""))


def test_a_server_that_knows_no_start_after(store: Store, proxy: FaultProxy) -> None:
    proxy.script(answer(200, body=listing("a", "b", "c", "d")))
    assert [entry.key for entry in store.list("", after="b")] == ["c", "d"]


def test_a_listing_that_never_ends_is_refused(store: Store, proxy: FaultProxy) -> None:
    for token in (" ", "<NextContinuationToken>same</NextContinuationToken>"):
        proxy.script(answer(200, body=listing(token=token), times=10))
        with pytest.raises(StoreError, match="there is more"):
            list(store.list(""))
        proxy.clear()


def test_ranges_of_a_server_that_knows_none(store: Store, proxy: FaultProxy) -> None:
    def whole(_: bytes) -> bytes:
        return b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\nConnection: close\r\n\r\n0123456789"

    proxy.script(Fault("GET", edit=whole, times=4))
    assert store.read("k", 3, 4) == b"3456"
    assert store.read("k", 8, 10) == b"89"
    assert store.read("k", 50, 10) == b""
    assert store.read("k", 0, 10) == b"0123456789"


def test_an_answer_to_another_range_is_not_taken(store: Store, proxy: FaultProxy) -> None:
    def other(_: bytes) -> bytes:
        return b"HTTP/1.1 206 OK\r\nContent-Length: 3\r\nContent-Range: bytes 4-6/10\r\nConnection: close\r\n\r\n456"

    def fewer(_: bytes) -> bytes:
        return b"HTTP/1.1 206 OK\r\nContent-Length: 2\r\nContent-Range: bytes 2-3/10\r\nConnection: close\r\n\r\n23"

    proxy.script(Fault("GET", edit=other), Fault("GET", edit=fewer))
    assert store.read("k", 2, 3) == b"234"
    assert len(proxy.requests) == 3


def test_without_a_date_our_own_clock_must_do(store: Store, proxy: FaultProxy) -> None:
    proxy.script(answer(200, method="PUT"), Fault("PUT", instead=b"HTTP/1.1 200 OK\r\nETag: x\r\nContent-Length: 0\r\n\r\n"))
    assert store.put("k", b"").date == pytest.approx(time.time(), abs=5)


def test_the_date_is_the_servers(store: Store, proxy: FaultProxy) -> None:
    head = b"HTTP/1.1 200 OK\r\nETag: x\r\nDate: Sat, 01 Jan 2000 00:00:10 GMT\r\nContent-Length: 0\r\n\r\n"
    taken = head.replace(b"200 OK", b"412 No")
    proxy.script(Fault("PUT", instead=head), Fault("PUT", instead=taken))
    assert store.put("k", b"").date == 946684810
    assert store.now() == 946684810
    receipt = store.create("k", b"")
    assert (receipt.created, receipt.date) == (False, 946684810)


# ------------------------------------------------------------------------------------------------ uploads and deletes


def chunks() -> Iterator[bytes]:
    for number in range(20):
        yield bytes([number]) * (1 << 20)


CONTENT = b"".join(chunks())


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "uploads"), ("PUT", "partNumber=1&"), ("PUT", "partNumber=3&"), ("POST", "uploadId"), ("HEAD", "up")],
)
@pytest.mark.parametrize("kind", [reset, lost_answer, lambda method, **more: answer(503, "SlowDown", method, **more)])
def test_uploads_survive_a_fault_at_each_request(
    store: Store, proxy: FaultProxy, kind: Callable[..., Fault], method: str, path: str
) -> None:
    proxy.script(kind(method, path=path))
    assert store.upload("up", chunks()) == len(CONTENT)
    assert store.get("up", limit=len(CONTENT)) == CONTENT
    assert store.stats.retries == 1


def test_an_upload_completed_unheard_is_seen_to_be_there(rclone_endpoint: Endpoint, make_config: MakeConfig) -> None:
    """rclone, like S3, knows nothing of an upload that was completed: the object itself has to be looked at."""
    with FaultProxy(rclone_endpoint.url) as proxy:
        store = open_store(make_config(rclone_endpoint, endpoint=proxy.url))
        store.prepare()
        proxy.script(lost_answer("POST", path="uploadId"))
        assert store.upload("up", chunks()) == len(CONTENT)
        assert store.get("up", limit=len(CONTENT)) == CONTENT
        store.close()


def test_an_error_inside_a_200_is_an_error(store: Store, proxy: FaultProxy) -> None:
    body = b"<?xml version='1.0'?><Error><Code>InternalError</Code><Message>we are sorry</Message></Error>"
    proxy.script(answer(200, body=body, method="POST", path="uploadId"))
    assert store.upload("up", chunks()) == len(CONTENT)
    assert store.get("up", limit=len(CONTENT)) == CONTENT


def test_an_upload_that_fails_is_aborted(store: Store, proxy: FaultProxy) -> None:
    proxy.script(answer(403, "AccessDenied", "PUT", path="partNumber=2&"))
    with pytest.raises(StoreError, match="AccessDenied"):
        store.upload("up", chunks())
    assert proxy.count("DELETE", "uploadId") == 1
    assert proxy.requests[-1].method == "DELETE"  # nothing was still under way
    assert store.get("up", limit=len(CONTENT)) is None


def test_an_abort_that_fails_hides_nothing(store: Store, proxy: FaultProxy, caplog: pytest.LogCaptureFixture) -> None:
    proxy.script(answer(403, "AccessDenied", "PUT", path="partNumber=2&"), answer(503, "", "DELETE", times=10_000))
    with pytest.raises(StoreError, match="AccessDenied"):
        store.upload("up", chunks())
    assert "stay in the bucket" in caplog.text


def test_an_upload_that_is_not_there_afterwards_is_no_upload(store: Store, proxy: FaultProxy) -> None:
    proxy.script(answer(404, "NoSuchUpload", "POST", path="uploadId"))
    with pytest.raises(StoreError, match="nothing is there"):
        store.upload("up", chunks())


@pytest.mark.parametrize("status", [400, 405, 501])
def test_a_server_that_deletes_only_single_objects(store: Store, proxy: FaultProxy, status: int) -> None:
    for name in "abc":
        store.put(name, b"")
    proxy.script(answer(status, "NotImplemented", "POST", times=10_000))
    store.delete(["a", "b", "absent"])
    store.delete(["c", "k"])
    assert list(store.list("")) == []
    assert proxy.count("POST") == 1
    assert proxy.count("DELETE") == 5


def test_what_a_batch_left_is_deleted_singly(store: Store, proxy: FaultProxy) -> None:
    rows = b"<Error><Key>a</Key><Code>InternalError</Code></Error><Error><Key>b</Key><Code>NoSuchKey</Code></Error>"
    body = b"<DeleteResult>" + rows + b"</DeleteResult>"
    store.put("a", b"")
    proxy.script(answer(200, body=body, method="POST"))
    store.delete(["a", "b", "c"])
    assert [request.path.split("/")[-1] for request in proxy.requests if request.method == "DELETE"] == ["a"]
    assert [entry.key for entry in store.list("")] == ["k"]


def test_a_delete_that_is_denied_is_an_error(store: Store, proxy: FaultProxy) -> None:
    body = b"<DeleteResult><Error><Key>k</Key><Code>AccessDenied</Code></Error></DeleteResult>"
    proxy.script(answer(200, body=body, method="POST"), answer(403, "AccessDenied", "DELETE"))
    with pytest.raises(StoreError, match=r"'k'.*AccessDenied"):
        store.delete(["k", "l"])


def test_a_server_that_refuses_the_condition_is_asked_without(
    config: Config, proxy: FaultProxy, fake: FakeTime, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(config, sleep=fake.sleep, clock=fake.clock)
    store.prepare()
    proxy.script(answer(501, "NotImplemented", "PUT", path="bottomless-probe"))
    assert not store.conditional()
    assert store.create("k", b"1").created
    assert not store.create("k", b"2").created
    assert [request.headers.get("if-none-match") for request in proxy.requests if request.method == "PUT"][-1] is None
    assert "create-only" in caplog.text
    store.close()


@pytest.mark.parametrize("code", ["ExpiredToken", "InvalidRequest"])
def test_a_probe_that_fails_for_another_reason_proves_nothing(config: Config, proxy: FaultProxy, code: str) -> None:
    """Else credentials that are over at the wrong moment would cost a store its exact create-only writes for good."""
    store = open_store(config)
    store.prepare()
    proxy.script(answer(400, code, "PUT", times=2))
    with pytest.raises(StoreError, match=code):
        store.create("k", b"")
    assert store.create("k", b"").created
    assert store.conditional()
    store.close()


def test_a_probe_needs_no_right_to_delete(config: Config, proxy: FaultProxy, caplog: pytest.LogCaptureFixture) -> None:
    store = open_store(config)
    store.prepare()
    proxy.script(answer(403, "AccessDenied", "DELETE"))
    assert store.conditional()
    assert "stays in the bucket" in caplog.text
    store.close()


# ------------------------------------------------------------------------------------------------ the line


def test_requests_are_lean(rclone_endpoint: Endpoint, make_config: MakeConfig) -> None:
    with FaultProxy(rclone_endpoint.url) as proxy:
        store = open_store(make_config(rclone_endpoint, endpoint=proxy.url))
        store.prepare()
        for size in (10, 100_000, 1_000_000):
            for _ in range(5):
                store.put("k", b"x" * size)
                store.get("k", limit=size)
                store.read("k", 0, 5)
                store.get("absent", limit=1)
                list(store.list(""))
        assert proxy.connections == 1
        for request in proxy.requests:
            assert "expect" not in request.headers
            assert not any("checksum" in name for name in request.headers)
            assert "bottomless-wal" in request.headers["user-agent"]
            if request.method == "PUT":
                assert len(request.headers["x-amz-content-sha256"]) == 64
        store.close()


def test_parallel_requests_keep_their_connections(rclone_endpoint: Endpoint, make_config: MakeConfig) -> None:
    with FaultProxy(rclone_endpoint.url, latency=0.005) as proxy:
        store = open_store(make_config(rclone_endpoint, endpoint=proxy.url, concurrency=8))
        store.prepare()
        for _ in range(10):
            each(lambda number: store.put(f"p/{number}", b""), range(8), 8)
        assert proxy.connections <= 8
        store.close()


def test_a_slow_line_is_no_failure(moto_endpoint: Endpoint, make_config: MakeConfig) -> None:
    """A body may take longer than connect_timeout, as long as it moves: each piece of it has the timeout to itself."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        listener.settimeout(10)

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                got, size = b"", 4 << 20
                while b"\r\n\r\n" not in got:
                    got += connection.recv(1 << 16)
                left = size - len(got.partition(b"\r\n\r\n")[2])
                while left > 0:
                    left -= len(connection.recv(1 << 16))
                    time.sleep(0.01)
                connection.sendall(b"HTTP/1.1 200 OK\r\nETag: x\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        store = open_store(make_config(endpoint=f"http://127.0.0.1:{listener.getsockname()[1]}", connect_timeout=0.2))
        start = time.monotonic()
        assert store.put("k", bytes(4 << 20)).created
        assert time.monotonic() - start > 0.5
        assert store.stats.retries == 0
        store.close()
        thread.join()


def test_wrong_credentials(rclone_endpoint: Endpoint, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, hint in (("AWS_SECRET_ACCESS_KEY", "AWS_SECRET_ACCESS_KEY"), ("AWS_ACCESS_KEY_ID", "AWS_ACCESS_KEY_ID")):
        with monkeypatch.context() as patch:
            patch.setenv(name, "wrongwrongwrong")
            store = open_store(make_config(rclone_endpoint))
            for use in (store.prepare, lambda store=store: store.get("k", limit=1), lambda store=store: store.create("k", b"")):
                with pytest.raises(StoreError, match="403") as raised:
                    use()
                assert hint in raised.value.hint
                assert "wrongwrongwrong" not in str(raised.value) or name == "AWS_ACCESS_KEY_ID"
            assert store.stats.retries == 0
            store.close()


def test_missing_credentials(moto_endpoint: Endpoint, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    store = open_store(make_config(moto_endpoint))
    with pytest.raises(StoreError, match="credentials") as raised:
        store.prepare()
    assert "AWS_ACCESS_KEY_ID" in raised.value.hint
    assert store.stats.retries == 0
    store.close()
