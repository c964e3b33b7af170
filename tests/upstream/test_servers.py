"""Facts about botocore and the two servers the tests run against, where they shape the store."""

from __future__ import annotations

import email.utils
import http.client
import io
import urllib.parse
import uuid
from typing import Any

import boto3
import botocore.awsrequest
import botocore.config
import botocore.exceptions
import botocore.handlers
import pytest
import urllib3

from bottomless_wal.cli.demo_server import RcloneServer


def _client(endpoint: str, key: str = "key", secret: str = "secret", **config: Any) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=key,
        aws_secret_access_key=secret,
        config=botocore.config.Config(
            signature_version="s3v4",
            s3={"addressing_style": "path"},
            retries={"total_max_attempts": 1},
            proxies={},
            **{"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required", **config},
        ),
    )


def _client_of(server: RcloneServer | str, **config: Any) -> Any:
    if isinstance(server, str):  # moto: a URL, and it checks no credentials
        return _client(server, **config)
    return _client(server.endpoint, server.access_key, server.secret_key, **config)


@pytest.fixture(params=["rclone", "moto"])
def s3(request: pytest.FixtureRequest) -> Any:
    return _client_of(request.getfixturevalue(f"{request.param}_server"))


def _bucket(client: Any) -> str:
    name = f"facts-{uuid.uuid4().hex[:12]}"
    client.create_bucket(Bucket=name)
    return name


def _code(error: botocore.exceptions.ClientError) -> str:
    return str(error.response["Error"]["Code"])


def test_botocore_adds_expect_to_put_object_until_told_not_to() -> None:
    """`Expect: 100-continue` costs a round trip at each commit; unregistering one handler, found under this name, removes it."""
    client = _client("http://127.0.0.1:1")
    sent: list[bool] = []

    def answer(request: Any, **_: object) -> Any:
        sent.append("Expect" in request.headers)
        empty: Any = urllib3.HTTPResponse(io.BytesIO(b""), preload_content=False)
        headers: Any = {}
        return botocore.awsrequest.AWSResponse(request.url, 200, headers, empty)

    client.meta.events.register("before-send.s3.PutObject", answer)
    client.put_object(Bucket="libsql", Key="k", Body=b"page")
    client.meta.events.unregister("before-call.s3", botocore.handlers.add_expect_header)
    client.put_object(Bucket="libsql", Key="k", Body=b"page")
    assert sent == [True, False]


def test_moto_honours_if_none_match(moto_server: str) -> None:
    """A create-only PUT of a taken key is answered 412 and changes nothing: what fencing rests on."""
    s3 = _client_of(moto_server)
    bucket = _bucket(s3)
    s3.put_object(Bucket=bucket, Key="k", Body=b"first", IfNoneMatch="*")
    with pytest.raises(botocore.exceptions.ClientError) as caught:
        s3.put_object(Bucket=bucket, Key="k", Body=b"second", IfNoneMatch="*")
    assert _code(caught.value) == "PreconditionFailed"
    assert s3.get_object(Bucket=bucket, Key="k")["Body"].read() == b"first"


def test_rclone_ignores_if_none_match(rclone_server: RcloneServer) -> None:
    """Some servers overwrite in spite of the condition and say 200: it has to be probed, and looked at before each put."""
    s3 = _client_of(rclone_server)
    bucket = _bucket(s3)
    s3.put_object(Bucket=bucket, Key="k", Body=b"first", IfNoneMatch="*")
    s3.put_object(Bucket=bucket, Key="k", Body=b"second", IfNoneMatch="*")
    assert s3.get_object(Bucket=bucket, Key="k")["Body"].read() == b"second"


def test_a_missing_key_and_a_missing_bucket_are_told_apart(s3: Any) -> None:
    """NoSuchKey and NoSuchBucket are different codes: the first is absence, the second a failure."""
    for bucket, code in ((_bucket(s3), "NoSuchKey"), ("facts-no-such-bucket", "NoSuchBucket")):
        with pytest.raises(botocore.exceptions.ClientError) as caught:
            s3.get_object(Bucket=bucket, Key="k")
        assert _code(caught.value) == code


def test_every_answer_carries_the_servers_date(s3: Any) -> None:
    """The Date header is in answers to PUT, GET and LIST: the only clock that fencing and pruning may read."""
    bucket = _bucket(s3)
    for answer in (
        s3.put_object(Bucket=bucket, Key="k", Body=b"x"),
        s3.get_object(Bucket=bucket, Key="k"),
        s3.list_objects_v2(Bucket=bucket),
    ):
        assert email.utils.parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"]).tzinfo is not None


def test_listings_are_sorted_and_start_after_is_exact(s3: Any) -> None:
    """Keys come in byte order and StartAfter excludes the key it names: the log is read from any txid on."""
    bucket = _bucket(s3)
    keys = [f"D-wal/{n:016x}-{n + 1:016x}" for n in range(18)]
    for key in reversed(keys):
        s3.put_object(Bucket=bucket, Key=key, Body=b"")
    answer = s3.list_objects_v2(Bucket=bucket, Prefix="D-wal/", StartAfter=keys[4])
    assert [row["Key"] for row in answer["Contents"]] == keys[5:]


def test_a_put_cut_in_mid_body_keeps_the_old_object(s3: Any) -> None:
    """A PUT whose connection is lost half-way neither makes nor changes an object: a segment is stored whole or not at all."""
    bucket = _bucket(s3)
    s3.put_object(Bucket=bucket, Key="old", Body=b"as it was")
    for key in ("old", "new"):
        url = urllib.parse.urlsplit(s3.generate_presigned_url("put_object", Params={"Bucket": bucket, "Key": key}))
        connection = http.client.HTTPConnection(url.netloc, timeout=10)
        connection.putrequest("PUT", f"{url.path}?{url.query}")
        connection.putheader("Content-Length", "100000")
        connection.endheaders(b"x" * 50000)
        connection.close()
    assert s3.get_object(Bucket=bucket, Key="old")["Body"].read() == b"as it was"
    assert [row["Key"] for row in s3.list_objects_v2(Bucket=bucket)["Contents"]] == ["old"]


def test_rclone_checks_credentials_moto_does_not(rclone_server: RcloneServer, moto_server: str) -> None:
    """Only rclone refuses a wrong key: tests of credentials have to run against it."""
    _client(moto_server, "nobody", "nothing").list_buckets()
    with pytest.raises(botocore.exceptions.ClientError) as caught:
        _client(rclone_server.endpoint, "nobody", "nothing").list_buckets()
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403


def test_rclone_and_default_checksums_fail_range_gets(rclone_server: RcloneServer) -> None:
    """botocore's default checksums break range GETs on some servers: both checksum settings have to be `when_required`."""
    careful = _client_of(rclone_server)
    default = _client_of(rclone_server, request_checksum_calculation="when_supported", response_checksum_validation="when_supported")
    bucket = _bucket(careful)
    default.put_object(Bucket=bucket, Key="k", Body=b"0123456789")
    assert careful.get_object(Bucket=bucket, Key="k", Range="bytes=2-4")["Body"].read() == b"234"
    with pytest.raises(botocore.exceptions.FlexibleChecksumError):
        default.get_object(Bucket=bucket, Key="k", Range="bytes=2-4")["Body"].read()
