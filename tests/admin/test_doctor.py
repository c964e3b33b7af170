"""`diagnose`: each thing that can be wrong is told as what it is, with what to do."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import boto3
import pytest

import bottomless_wal
from bottomless_wal import Check
from bottomless_wal.admin import doctor
from bottomless_wal.core.config import ENV_PREFIX
from bottomless_wal.core.errors import StoreError
from bottomless_wal.storage import Receipt, Store, open_store
from tests.support.endpoints import Endpoint, MakeConfig
from tests.support.faultproxy import ALWAYS, Fault, FaultProxy, answer
from tests.support.stored_database import Shop


def states(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.state for check in checks}


def test_all_is_well(any_shop: Shop) -> None:
    checks = bottomless_wal.diagnose(**any_shop.options)
    expected = {
        "endpoint": "ok",
        "credentials": "ok",
        "bucket": "ok",
        "objects": "ok",
        "create-only": "ok",
        "versioning": "ok",
        "round trip": "ok",
        "clock": "ok",
    }
    if any_shop.endpoint.kind == "directory":
        del expected["credentials"]
    if any_shop.endpoint.kind == "rclone":
        expected["create-only"] = "warning"
    seen = states(checks)
    if seen["round trip"] == "warning":  # a machine with much to do
        expected["round trip"] = "warning"
    assert seen == expected
    assert all(check.ok for check in checks)
    assert any_shop.keys() == []  # nothing is left


@pytest.mark.parametrize("ignored", [False, True])
def test_versioning(moto_endpoint: Endpoint, make_config: MakeConfig, ignored: bool) -> None:
    """A warning either way: of what pruning does not free, or of a server that ignores create-only writes because of it."""
    with FaultProxy(moto_endpoint.url) as proxy:
        _versioned_bucket(moto_endpoint)
        if ignored:
            proxy.script(Fault("PUT", strip="if-none-match", times=ALWAYS))
        checks = bottomless_wal.diagnose(endpoint=proxy.url, bucket=moto_endpoint.bucket)
    seen = states(checks)
    assert (seen["create-only"], seen["versioning"]) == ("warning" if ignored else "ok", "warning")
    (told,) = (check for check in checks if check.name == "versioning")
    assert ("If-None-Match" if ignored else "noncurrent") in told.detail
    assert ("without versioning" if ignored else "lifecycle rule for noncurrent versions") in told.hint


def test_a_store_that_does_not_say_whether_it_keeps_versions(moto_endpoint: Endpoint, make_config: MakeConfig) -> None:
    with FaultProxy(moto_endpoint.url) as proxy:
        _versioned_bucket(moto_endpoint)
        proxy.script(answer(501, "NotImplemented", path="?versioning"))
        checks = bottomless_wal.diagnose(endpoint=proxy.url, bucket=moto_endpoint.bucket)
    assert "versioning" not in states(checks)
    assert checks[-1].name == "clock"


def _versioned_bucket(place: Endpoint) -> None:
    client = boto3.client("s3", endpoint_url=place.url, region_name="us-east-1")
    client.create_bucket(Bucket=place.bucket)
    client.put_bucket_versioning(Bucket=place.bucket, VersioningConfiguration={"Status": "Enabled"})
    client.close()


def failed(checks: list[Check], name: str) -> Check:
    """The last line, which failed; all before it are well."""
    assert [check.state for check in checks[:-1]] == ["ok"] * (len(checks) - 1)
    assert (checks[-1].name, checks[-1].state) == (name, "failed")
    assert checks[-1].hint
    return checks[-1]


def test_nobody_there(own_environment: None) -> None:
    check = failed(bottomless_wal.diagnose(endpoint="http://127.0.0.1:9", retry_timeout=0), "endpoint")
    assert "refused" in check.detail


def test_no_such_directory(own_environment: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = (tmp_path / "no" / "such").as_uri()
    check = failed(bottomless_wal.diagnose(endpoint=endpoint), "endpoint")
    assert ENV_PREFIX + "CREATE_BUCKET=1" in check.hint
    monkeypatch.setenv(ENV_PREFIX + "CREATE_BUCKET", "1")
    assert all(check.ok for check in bottomless_wal.diagnose(endpoint=endpoint))
    assert (tmp_path / "no" / "such").is_dir()


def test_wrong_credentials(rclone_endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "guessed")
    checks = bottomless_wal.diagnose(endpoint=rclone_endpoint.url, bucket=rclone_endpoint.bucket)
    assert "AWS_SECRET_ACCESS_KEY" in failed(checks, "credentials").hint


def test_no_credentials(rclone_endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    failed(bottomless_wal.diagnose(endpoint=rclone_endpoint.url, bucket=rclone_endpoint.bucket), "credentials")


def test_a_missing_bucket(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = bottomless_wal.diagnose(endpoint=endpoint.url, bucket=endpoint.bucket)
    assert "CREATE_BUCKET" in failed(checks, "bucket").hint
    monkeypatch.setenv(ENV_PREFIX + "CREATE_BUCKET", "1")
    assert all(check.ok for check in bottomless_wal.diagnose(endpoint=endpoint.url, bucket=endpoint.bucket))


class Odd:
    """A store that behaves, but for what a test overrides."""

    def __init__(self, store: Store, **overrides: Callable[..., object]) -> None:
        self._store = store
        self.__dict__.update(overrides)

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)


def checks_of(
    shop: Shop, make_config: MakeConfig, wall: Callable[[], float] = time.time, **overrides: Callable[..., object]
) -> list[Check]:
    config = make_config(shop.endpoint)
    store = Odd(open_store(config), **overrides)
    return list(doctor._checks(config, store, time.perf_counter, wall))  # type: ignore[arg-type]


@pytest.mark.parametrize(("seconds", "state"), [(0.0, "ok"), (3.0, "ok"), (60.0, "warning"), (-60.0, "warning"), (1000.0, "failed")])
def test_clocks(shop: Shop, make_config: MakeConfig, seconds: float, state: str) -> None:
    check = checks_of(shop, make_config, wall=lambda: time.time() + seconds)[-1]
    assert (check.name, check.state) == ("clock", state)
    if state != "ok":
        assert ("ahead of" if seconds > 0 else "behind") in check.detail
        assert f"{abs(seconds):.0f} s" in check.detail or f"{abs(seconds) - 1:.0f} s" in check.detail


def test_a_store_that_forgets(shop: Shop, make_config: MakeConfig) -> None:
    checks = checks_of(shop, make_config, list=lambda prefix, after="": iter(()))
    assert "listing" in failed(checks, "objects").detail
    checks = checks_of(shop, make_config, delete=lambda keys: None)
    assert "deleted" in failed(checks, "objects").detail


def test_read_only_credentials(shop: Shop, make_config: MakeConfig) -> None:
    def refuse(key: str, data: bytes) -> Receipt:
        raise StoreError("403 AccessDenied")

    check = failed(checks_of(shop, make_config, put=refuse), "objects")
    assert "writing" in check.detail
    assert "right" in check.hint
