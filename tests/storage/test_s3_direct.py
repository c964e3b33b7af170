"""What is sent past boto3's client is what the client would have sent, and means the same: it is the reference, call by call."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from botocore.exceptions import ClientError

from bottomless_wal.storage import open_store, s3_client
from bottomless_wal.storage.s3_direct import DIRECT, DirectClient
from tests.support.endpoints import Endpoint, MakeConfig
from tests.support.faultproxy import Fault, FaultProxy

KEYS = ["plain", "a/b/c", "with space", "plus+and%25and&", "a=b?c#d", "Zürich/東京", "tilde~(1)!*'", "semi;colon:@,$"]


class Pair:
    """The two ways to one bucket."""

    def __init__(self, endpoint: Endpoint, make_config: MakeConfig, url: str | None = None) -> None:
        config = make_config(endpoint, endpoint=url or endpoint.url)
        self.bucket = config.bucket
        self.direct = DirectClient(config, lambda: None)
        self.client = s3_client._client(config, lambda: None)

    def ask_both(self, name: str, data: bytes | None = None, **parameters: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        body = {} if data is None else {"Body": data}
        ours = _told(lambda: self.direct.call(name, data, parameters))
        theirs = _told(lambda: getattr(self.client, name)(Bucket=self.bucket, **body, **parameters))
        return ours, theirs


def _told(ask: Any) -> dict[str, Any]:
    """What the store makes use of in an answer or an error."""
    try:
        answer = ask()
    except ClientError as error:
        meta = error.response["ResponseMetadata"]
        found = error.response["Error"]
        return {"code": found.get("Code"), "message": found.get("Message"), "status": meta["HTTPStatusCode"]}
    meta = answer["ResponseMetadata"]
    told = {name: answer.get(name) for name in ("ContentRange", "Contents", "IsTruncated") if answer.get(name) not in (None, [])}
    told["status"] = meta["HTTPStatusCode"]
    told["etag"] = meta["HTTPHeaders"].get("etag")
    for row in told.get("Contents", []):
        for name in set(row) - {"Key", "Size", "LastModified"}:
            del row[name]
    if "Body" in answer:
        told["body"] = answer["Body"].read()
        told["length"] = answer["ContentLength"]
    return told


@pytest.fixture
def pair(s3_endpoint: Endpoint, make_config: MakeConfig) -> Iterator[Pair]:
    pair = Pair(s3_endpoint, make_config)
    assert pair.direct.call("create_bucket", None, {})["ResponseMetadata"]["HTTPStatusCode"] == 200
    yield pair
    pair.direct.close()
    pair.client.close()


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("data", [b"", b"x" * 10, os.urandom(300_000)], ids=len)
def test_objects(pair: Pair, key: str, data: bytes) -> None:
    for name, body in (("put_object", data), ("get_object", None), ("head_object", None)):
        ours, theirs = pair.ask_both(name, body, Key=key)
        assert ours == theirs, name
    assert ours["status"] == 200
    assert pair.ask_both("get_object", Key=key)[0]["body"] == data
    assert pair.client.list_objects_v2(Bucket=pair.bucket)["Contents"][0]["Key"] == key


def test_ranges(pair: Pair) -> None:
    pair.direct.call("put_object", bytes(range(200)), {"Key": "k"})
    for wanted in ("bytes=0-0", "bytes=10-19", "bytes=190-500", "bytes=500-600"):
        ours, theirs = pair.ask_both("get_object", Key="k", Range=wanted)
        assert ours == theirs, wanted


def test_what_is_not_there(pair: Pair, s3_endpoint: Endpoint, make_config: MakeConfig) -> None:
    for name in ("get_object", "head_object", "delete_object"):
        ours, theirs = pair.ask_both(name, Key="absent")
        assert ours == theirs, name
    assert pair.ask_both("get_object", Key="absent")[0]["code"] == "NoSuchKey"
    elsewhere = Pair(Endpoint(s3_endpoint.kind, s3_endpoint.url, "no-such-bucket", {}), make_config)
    for name, parameters in (("get_object", {"Key": "k"}), ("list_objects_v2", {"Prefix": ""}), ("put_object", {"Key": "k"})):
        ours, theirs = elsewhere.ask_both(name, b"" if name == "put_object" else None, **parameters)
        assert ours == theirs, name
        assert ours["status"] == 404


def test_create_only_writes(moto_endpoint: Endpoint, make_config: MakeConfig) -> None:
    pair = Pair(moto_endpoint, make_config)
    pair.direct.call("create_bucket", None, {})
    assert pair.direct.call("put_object", b"1", {"Key": "k", "IfNoneMatch": "*"})["ResponseMetadata"]["HTTPStatusCode"] == 200
    ours, theirs = pair.ask_both("put_object", b"2", Key="k", IfNoneMatch="*")
    assert ours == theirs
    assert (ours["code"], ours["status"]) == ("PreconditionFailed", 412)


def test_listings(pair: Pair) -> None:
    for key in KEYS:
        pair.direct.call("put_object", key.encode(), {"Key": key})
    for parameters in ({"Prefix": ""}, {"Prefix": "a"}, {"Prefix": "Zü"}, {"Prefix": "none"}, {"Prefix": "", "StartAfter": "plain"}):
        ours, theirs = pair.ask_both("list_objects_v2", MaxKeys=1000, **parameters)
        assert ours == theirs, parameters
    found: list[str] = []
    where: dict[str, Any] = {}
    while True:
        page = pair.direct.call("list_objects_v2", None, {"Prefix": "", "MaxKeys": 3, **where})
        found += [row["Key"] for row in page["Contents"]]
        if not page["IsTruncated"]:
            break
        where = {"ContinuationToken": page["NextContinuationToken"]}
    assert found == sorted(KEYS, key=str.encode)


def test_requests_are_signed_alike(moto_endpoint: Endpoint, make_config: MakeConfig) -> None:
    """The same headers are signed, the contents among them; a session token goes along."""
    with FaultProxy(moto_endpoint.url) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_SESSION_TOKEN", "a-session-token")
        patch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
        pair = Pair(moto_endpoint, make_config, proxy.url)
        pair.client.create_bucket(Bucket=pair.bucket, CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
        for name, data, parameters in (
            ("put_object", b"data", {"Key": "a b", "IfNoneMatch": "*"}),
            ("get_object", None, {"Key": "a b", "Range": "bytes=0-1"}),
            ("list_objects_v2", None, {"Prefix": "a ", "MaxKeys": 7, "StartAfter": "a"}),
            ("delete_object", None, {"Key": "a b"}),
        ):
            del proxy.requests[:]
            pair.ask_both(name, data, **parameters)
            ours, theirs = proxy.requests
            assert (ours.method, ours.path.partition("?")[0]) == (theirs.method, theirs.path.partition("?")[0]), name
            assert sorted(ours.path.partition("?")[2].split("&")) == sorted(theirs.path.partition("?")[2].split("&"))
            for header in ("x-amz-content-sha256", "x-amz-security-token", "if-none-match", "range", "content-length"):
                assert ours.headers.get(header) == theirs.headers.get(header), (name, header)
            assert "/eu-central-1/s3/aws4_request" in ours.headers["authorization"]
            signed = ours.headers["authorization"].partition("SignedHeaders=")[2].partition(",")[0].split(";")
            assert {"host", "x-amz-content-sha256", "x-amz-date", "x-amz-security-token"} <= set(signed)


@pytest.mark.parametrize("blanks", [0, 300])
def test_a_failure_that_is_told_after_the_200_is_a_failure(moto_endpoint: Endpoint, make_config: MakeConfig, blanks: int) -> None:
    # (Blanks keep the line open until then.)
    said = b"<?xml version='1.0'?>" + blanks * b" " + b"<Error><Code>SlowDown</Code><Message>later</Message></Error>"
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: application/xml\r\nContent-Length: %d\r\n\r\n%s" % (len(said), said)
    with FaultProxy(moto_endpoint.url) as proxy:
        pair = Pair(moto_endpoint, make_config, proxy.url)
        for name, data in (("put_object", b"x"), *((("list_objects_v2", None),) if not blanks else ())):
            proxy.script(Fault(times=2, instead=answer))
            ours, theirs = pair.ask_both(name, data, **({"Key": "k"} if data else {"Prefix": ""}))
            assert ours["code"] == theirs["code"] == "SlowDown", name


def test_the_client_is_not_made_for_what_goes_past_it(moto_endpoint: Endpoint, make_config: MakeConfig) -> None:
    """Making it costs more than opening a database may."""
    store = open_store(make_config(moto_endpoint))
    store.prepare()
    assert store.create("k", b"1").created
    assert store.get("k", limit=1) == b"1"
    assert [entry.key for entry in store.list("")] == ["k"]
    store.delete(["k"])
    assert store._connection._client is None  # type: ignore[attr-defined]
    store.close()
    assert set(DIRECT) == {"put_object", "get_object", "head_object", "delete_object", "list_objects_v2", "create_bucket"}
