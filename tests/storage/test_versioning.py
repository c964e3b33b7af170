"""Buckets with versioning, and with Object Lock, above all where versioning is switched on while writers run.

The server that ignores `If-None-Match` in such a bucket, as Ceph does, is the simulated one behind a proxy that drops the header.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apsw
import boto3
import pytest

import bottomless_wal
from bottomless_wal.core.errors import FencedError, StoreError
from bottomless_wal.storage import Store, open_store, s3_client
from bottomless_wal.storage.s3_create import PROBE_SECONDS
from tests.support.endpoints import Endpoint, MakeConfig
from tests.support.faketime import FakeTime
from tests.support.faultproxy import ALWAYS, Fault, FaultProxy, answer, lost_answer


class Ceph:
    """A bucket without versioning, where the condition is honoured; and after `switch_on` with it, where it is ignored."""

    def __init__(self, proxy: FaultProxy, place: Endpoint, make_config: MakeConfig) -> None:
        self.proxy, self.bucket = proxy, place.bucket
        self.time = FakeTime()
        self._config = make_config(place, endpoint=proxy.url, retry_timeout=5.0)
        self.direct: Any = boto3.client("s3", endpoint_url=place.url, region_name="us-east-1")
        self.direct.create_bucket(Bucket=self.bucket)
        self.stores: list[Store] = []

    def open(self) -> Store:
        self.stores.append(open_store(self._config, sleep=self.time.sleep, clock=self.time.clock))
        return self.stores[-1]

    def switch_on(self) -> None:
        self.direct.put_bucket_versioning(Bucket=self.bucket, VersioningConfiguration={"Status": "Enabled"})
        self.ignore()

    def ignore(self, *first: Fault) -> None:
        self.proxy.clear(*first, Fault("PUT", strip="if-none-match", times=ALWAYS))

    def versions(self, key: str) -> list[bytes]:
        """What the versions of `key` hold."""
        rows = self.direct.list_object_versions(Bucket=self.bucket, Prefix=key).get("Versions", [])
        return [self.direct.get_object(Bucket=self.bucket, Key=key, VersionId=row["VersionId"])["Body"].read() for row in rows]

    def probes(self) -> int:
        return self.proxy.count("PUT", "bottomless-probe")

    def left_over(self) -> list[str]:
        """Keys with versions or markers that are a probe's."""
        answer = self.direct.list_object_versions(Bucket=self.bucket, Prefix=".bottomless")
        return [row["Key"] for row in (*answer.get("Versions", []), *answer.get("DeleteMarkers", []))]


@pytest.fixture(params=["direct", "by boto3's client"])
def ceph(
    request: pytest.FixtureRequest, moto_endpoint: Endpoint, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Ceph]:
    if request.param != "direct":
        monkeypatch.setattr(s3_client, "DIRECT", {})
    with FaultProxy(moto_endpoint.url) as proxy:
        ceph = Ceph(proxy, moto_endpoint, make_config)
        yield ceph
        for store in ceph.stores:
            store.close()
        ceph.direct.close()


def test_each_store_asks_anew(ceph: Ceph) -> None:
    assert ceph.open().conditional()
    ceph.switch_on()
    assert not ceph.open().conditional()
    assert ceph.left_over() == []


def test_the_answer_is_asked_again_when_it_is_old(ceph: Ceph, caplog: pytest.LogCaptureFixture) -> None:
    store = ceph.open()
    assert store.create("a", b"").created
    assert ceph.probes() == 2
    ceph.time.seconds += PROBE_SECONDS - 1
    assert store.create("b", b"").created
    assert ceph.probes() == 2
    ceph.time.seconds += 2 * PROBE_SECONDS
    store.get("a", limit=1)
    store.put("c", b"")
    assert ceph.probes() == 2  # only a create asks
    assert store.create("d", b"").created
    assert ceph.probes() == 4
    ceph.switch_on()
    ceph.time.seconds += PROBE_SECONDS
    ceph.proxy.requests.clear()
    assert not store.create("a", b"rival").created
    assert [request.method for request in ceph.proxy.requests] == ["PUT", "PUT", "DELETE", "DELETE", "HEAD"]
    assert ceph.versions("a") == [b""]
    ceph.time.seconds += PROBE_SECONDS
    assert not store.create("a", b"rival").created
    assert [record.levelno for record in caplog.records if "create-only" in record.message] == [logging.WARNING]  # said once
    assert ceph.left_over() == []


def test_a_write_that_covered_a_rivals_object_is_taken_back(ceph: Ceph, caplog: pytest.LogCaptureFixture) -> None:
    ours, rival = ceph.open(), ceph.open()
    assert ours.conditional()
    assert rival.create("n", b"the rival's").created
    ceph.switch_on()
    assert not ours.create("n", b"ours").created
    assert ours.get("n", limit=100) == b"the rival's"
    assert ceph.versions("n") == [b"the rival's"]
    assert "had covered a rival's object" in caplog.text
    assert not ours.conditional()
    assert ceph.left_over() == []


def test_a_rivals_object_of_the_same_size(ceph: Ceph) -> None:
    ours = ceph.open()
    assert ours.conditional()
    ceph.switch_on()
    ceph.direct.put_object(Bucket=ceph.bucket, Key="n", Body=b"1st")
    assert not ours.create("n", b"2nd").created
    assert ceph.versions("n") == [b"1st"]


def test_a_free_key_stays_ours(ceph: Ceph) -> None:
    ours = ceph.open()
    assert ours.create("m", b"before").created
    ceph.switch_on()
    assert ours.create("n", b"ours").created
    assert ours.create("nn", b"ours").created  # a key with the same beginning
    assert ours.get("n", limit=10) == b"ours"
    assert ours.get("nn", limit=10) == b"ours"


def test_a_key_that_was_deleted_is_free(ceph: Ceph) -> None:
    ours = ceph.open()
    assert ours.create("n", b"withdrawn").created
    ceph.switch_on()
    time.sleep(1.1)  # the versions' times are in whole seconds here
    ours.delete(["n"])
    assert ours.get("n", limit=100) is None
    assert ours.create("n", b"again").created
    assert ours.get("n", limit=100) == b"again"


@pytest.mark.parametrize("under", [None, b"the rival's"])
def test_an_attempt_whose_answer_was_lost_is_ours_and_covers_nobody(ceph: Ceph, under: bytes | None) -> None:
    """The repetition stands over the first attempt, and that over the rival's object, if there is one."""
    ours = ceph.open()
    assert ours.conditional()
    if under is not None:
        ceph.direct.put_object(Bucket=ceph.bucket, Key="n", Body=under)
    ceph.switch_on()
    ceph.ignore(Fault("PUT", "/n", strip="if-none-match", reset_after=True))
    assert not ours.create("n", b"ours").created
    assert ours.get("n", limit=100) == under or (under is None and ours.get("n", limit=100) == b"ours")
    assert ceph.versions("n") == [under or b"ours"]


@pytest.mark.parametrize("read", [lambda store: store.get("n", limit=100), lambda store: store.read("n", 0, 100)], ids=["get", "read"])
def test_a_create_that_failed_has_covered_nobody(ceph: Ceph, read: Callable[[Store], bytes | None]) -> None:
    """The caller looks whether it was stored after all: it must see the rival's object, not its own over it."""
    ours = ceph.open()
    assert ours.conditional()
    ceph.direct.put_object(Bucket=ceph.bucket, Key="n", Body=b"the rival's")
    ceph.switch_on()
    ceph.ignore(Fault("PUT", "/n", strip="if-none-match", reset_after=True, times=ALWAYS))
    with pytest.raises(StoreError, match="given up"):
        ours.create("n", b"ours")
    assert len(ceph.versions("n")) > 1
    ceph.ignore()
    assert read(ours) == b"the rival's"
    assert ceph.versions("n") == [b"the rival's"]


def test_where_nothing_is_versioned_a_create_that_failed_costs_a_look(ceph: Ceph) -> None:
    ours = ceph.open()
    assert ours.conditional()
    ceph.proxy.script(lost_answer("PUT", path="/n", times=ALWAYS))
    with pytest.raises(StoreError, match="given up"):
        ours.create("n", b"ours")
    ceph.proxy.clear()
    ceph.proxy.requests.clear()
    assert ours.get("n", limit=100) == b"ours"
    assert [request.method for request in ceph.proxy.requests] == ["HEAD", "GET"]


@pytest.mark.parametrize(
    "fault",
    [
        lambda: answer(403, "AccessDenied", "GET", path="versions", times=ALWAYS),
        lambda: answer(403, "AccessDenied", "DELETE", path="/n?versionId", times=ALWAYS),
        lambda: answer(403, "AccessDenied", "GET", path="/n?versionId", times=ALWAYS),
    ],
    ids=["list", "delete", "read"],
)
def test_what_cannot_be_told_is_said(ceph: Ceph, fault: Callable[[], Fault]) -> None:
    ours = ceph.open()
    assert ours.conditional()
    ceph.direct.put_object(Bucket=ceph.bucket, Key="n", Body=b"thrs")
    ceph.switch_on()
    ceph.ignore(fault())
    for use in (lambda: ours.create("n", b"ours"), lambda: ours.get("n", limit=100), lambda: ours.read("n", 0, 1)):
        with pytest.raises(StoreError, match="cannot be told whether this write covers a rival's object") as raised:
            use()
        assert "AccessDenied" in raised.value.message
        assert "DeleteObjectVersion" in raised.value.hint
    ceph.ignore()
    assert ours.get("n", limit=100) == b"thrs"


def test_a_server_that_honours_the_condition_with_versions_too(moto_endpoint: Endpoint, make_config: MakeConfig) -> None:
    with FaultProxy(moto_endpoint.url) as proxy:
        ceph = Ceph(proxy, moto_endpoint, make_config)
        store = ceph.open()
        assert store.create("a", b"").created
        ceph.switch_on()
        proxy.clear()
        assert store.create("b", b"1").created
        assert ceph.probes() == 4
        proxy.requests.clear()
        assert store.create("c", b"1").created
        assert not store.create("b", b"2").created
        assert [request.method for request in proxy.requests] == ["PUT", "PUT"]
        assert store.conditional()
        store.close()
        ceph.direct.close()


def test_two_machines_and_versioning_switched_on(moto_endpoint: Endpoint, make_config: MakeConfig, tmp_path: Path) -> None:
    """The second writer has probed before; its commit covers the first one's: it is fenced, and nothing is lost."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with FaultProxy(moto_endpoint.url) as proxy:  # in one process, another way to the server makes another machine of the second
        ceph = Ceph(proxy, moto_endpoint, make_config)

        def connect(machine: str) -> apsw.Connection:
            url = moto_endpoint.url if machine == "a" else proxy.url
            path = str(tmp_path / machine / "app.db")
            return bottomless_wal.connect(path, endpoint=url, bucket=ceph.bucket, ack="log", pages="off")

        first = connect("a")
        first.execute("create table t(x)")
        second = connect("b")
        second.execute("insert into t values('second')")
        first.close()
        first = connect("a")
        first.execute("insert into t values('first again')")
        ceph.switch_on()
        with pytest.raises(FencedError):
            second.execute("insert into t values('stale')")
        second.close()
        first.execute("insert into t values('and on')")
        first.close()
        with connect("a") as again:
            rows = [row[0] for row in again.execute("select x from t")]
        assert rows == ["second", "first again", "and on"]
        again.close()
        ceph.direct.close()


# ------------------------------------------------------------------------------------------------ Object Lock


@pytest.fixture(params=["direct", "by boto3's client"])
def locked(
    request: pytest.FixtureRequest, moto_endpoint: Endpoint, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Store]:
    """A bucket whose default retention keeps every version for a day; the server refuses a PUT without a checksum."""
    if request.param != "direct":
        monkeypatch.setattr(s3_client, "DIRECT", {})
    client: Any = boto3.client("s3", endpoint_url=moto_endpoint.url, region_name="us-east-1")
    client.create_bucket(Bucket=moto_endpoint.bucket, ObjectLockEnabledForBucket=True)
    rule = {"DefaultRetention": {"Mode": "COMPLIANCE", "Days": 1}}
    client.put_object_lock_configuration(
        Bucket=moto_endpoint.bucket, ObjectLockConfiguration={"ObjectLockEnabled": "Enabled", "Rule": rule}
    )
    client.close()
    store = open_store(make_config(moto_endpoint))
    store.prepare()
    yield store
    store.close()


def test_a_default_retention(locked: Store, caplog: pytest.LogCaptureFixture) -> None:
    """What a database needs works; a delete hides, and the probe's object stays without a failure."""
    assert locked.put("p", b"1").created
    assert locked.put("p", b"2").created
    assert locked.create("c", b"1").created
    assert not locked.create("c", b"2").created
    assert locked.upload("body", (b"x" * (5 << 20) for _ in range(4))) == 20 << 20
    assert [entry.key for entry in locked.list("")] == ["body", "c", "p"]
    locked.delete(["p"])
    locked.delete(["c", "body"])
    assert list(locked.list("")) == []
    assert locked.create("c", b"3").created
    assert locked.get("c", limit=10) == b"3"
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert locked.versioned()


def test_a_database_under_a_default_retention(locked: Store, moto_endpoint: Endpoint, tmp_path: Path) -> None:
    options: dict[str, object] = {"endpoint": moto_endpoint.url, "bucket": moto_endpoint.bucket}
    path = str(tmp_path / "app.db")
    connection = bottomless_wal.connect(path, **options)
    connection.execute("create table t(x)")
    for _ in range(30):
        connection.execute("insert into t values(zeroblob(5000))")
    connection.execute("delete from t where rowid > 3")
    connection.execute("vacuum")
    connection.close()
    assert bottomless_wal.verify(path, repair_view=True, **options).ok
    bottomless_wal.prune(path, **options)
    assert all(check.ok for check in bottomless_wal.diagnose(**options))


def test_every_write_carries_a_checksum(ceph: Ceph) -> None:
    store = ceph.open()
    store.put("p", b"1")
    store.create("c", b"1")
    store.upload("body", (b"x" * (5 << 20) for _ in range(4)))
    puts = [request for request in ceph.proxy.requests if request.method == "PUT"]
    assert len(puts) == 4 + 3  # with the probe's two; and the parts
    for request in puts:
        digest = base64.b64encode(hashlib.md5(request.body).digest()).decode()
        assert request.headers["content-md5"] == digest
        assert "content-md5" in request.headers["authorization"]
        assert "x-amz-trailer" not in request.headers
        assert not any(name.startswith("x-amz-checksum") for name in request.headers)
