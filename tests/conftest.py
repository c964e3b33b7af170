"""Fixtures that any test may use: S3 servers on loopback, a fresh bucket for each test, and an environment of its own.

The servers are started once per session (and per worker of pytest-xdist), when the first test wants them, and share nothing
between workers. A test never cleans a bucket up: it gets a new one, because servers may go on listing what was removed.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import pytest
from endpoints import Endpoint, MakeConfig, endpoint_of
from hypothesis import settings

from bottomless_wal.cli.demo_server import RcloneServer, guarded
from bottomless_wal.core import logs
from bottomless_wal.core.config import ENV_PREFIX, Config

# No example is wrong for being slow: on a machine that is busy any of them may be.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")


@pytest.fixture(scope="session")
def rclone_server() -> Iterator[RcloneServer]:
    """A real S3 server that checks signatures and ignores `If-None-Match`."""
    with RcloneServer() as server:
        yield server


@pytest.fixture(scope="session")
def moto_server() -> Iterator[str]:
    """The URL of a simulated S3 that honours `If-None-Match` and checks no credentials."""
    with tempfile.TemporaryFile() as log:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
        with guarded(command, log, dict(os.environ)) as process:
            end = time.monotonic() + 60
            while not (found := re.search(rb"http://127\.0\.0\.1:\d+", os.pread(log.fileno(), 1 << 16, 0))):
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(os.pread(log.fileno(), 1 << 16, 0).decode())
                time.sleep(0.05)
            yield found[0].decode()


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the developer's settings, and no request that leaves this machine."""
    for name in list(os.environ):
        if name.startswith(("AWS_", ENV_PREFIX)) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testtesttest")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


class DrainedLog:
    """pytest's `caplog`, seen once the log thread has written what was logged before."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    def __getattr__(self, name: str) -> Any:
        assert logs.drain(30), "the log thread hangs"
        return getattr(self._caplog, name)


@pytest.fixture
def caplog(caplog: pytest.LogCaptureFixture) -> DrainedLog:
    """Lines of the package are written by a thread of their own, a moment later."""
    return DrainedLog(caplog)


@pytest.fixture(params=["rclone", "moto"])
def s3_endpoint(request: pytest.FixtureRequest, own_environment: None) -> Endpoint:
    """Runs the test against both S3 servers, with a bucket of its own at each."""
    return endpoint_of(request.param, request)


@pytest.fixture(params=["rclone", "moto", "directory"])
def endpoint(request: pytest.FixtureRequest, own_environment: None) -> Endpoint:
    """Runs the test against every kind of store."""
    return endpoint_of(request.param, request)


@pytest.fixture
def moto_endpoint(request: pytest.FixtureRequest, own_environment: None) -> Endpoint:
    """A bucket of one's own at the simulated server."""
    return endpoint_of("moto", request)


@pytest.fixture
def rclone_endpoint(request: pytest.FixtureRequest, own_environment: None) -> Endpoint:
    """A bucket of one's own at the real server."""
    return endpoint_of("rclone", request)


@pytest.fixture
def make_config() -> MakeConfig:
    """`make_config(endpoint, **options)`: a Config for an `Endpoint` (or None), with patience that suits a test."""

    def make(place: Endpoint | None = None, /, **options: object) -> Config:
        where = {} if place is None else {"endpoint": place.url, "bucket": place.bucket}
        return Config(**{"create_bucket": True, "retry_timeout": 10.0, **where, **options})  # type: ignore[arg-type]

    return make
