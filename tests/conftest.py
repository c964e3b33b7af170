"""Fixtures of all tests: S3 servers on loopback, a bucket and an environment for each test, and what stands around a bucket.

A `world` has machines that can be lost, a `shop` has one database, and `cli` runs commands.

The servers are started once per session (and per worker of pytest-xdist), when the first test wants them, and share nothing
between workers. A test never cleans a bucket up: it gets a new one, because servers may go on listing what was removed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest
from hypothesis import settings

from bottomless_wal.cli.demo_server import RcloneServer, guarded
from bottomless_wal.core import failpoints, logs
from bottomless_wal.core.config import ENV_PREFIX, Config
from bottomless_wal.runtime.registry import registry
from tests.support.cluster import World, until
from tests.support.endpoints import Endpoint, MakeConfig, endpoint_of
from tests.support.stored_database import Cli, Shop

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


def _world(endpoint: Endpoint, root: Path) -> Iterator[World]:
    options = {"endpoint": endpoint.url, "bucket": endpoint.bucket, "create_bucket": True, "retry_timeout": 5.0}
    world = World(endpoint, root, options)
    try:
        yield world
    finally:
        failpoints.disarm()
        for con in world.connections:
            with contextlib.suppress(apsw.Error):
                con.close()
        until(lambda: registry.all() == [])  # a connection that the collector has closed is ended by another thread


@pytest.fixture
def world(request: pytest.FixtureRequest, own_environment: None, tmp_path: Path) -> Iterator[World]:
    """On a directory store: the quickest, and exact."""
    yield from _world(endpoint_of("directory", request), tmp_path)


@pytest.fixture(params=["rclone", "moto", "directory"])
def any_world(request: pytest.FixtureRequest, own_environment: None, tmp_path: Path) -> Iterator[World]:
    """On every kind of store."""
    yield from _world(endpoint_of(request.param, request), tmp_path)


@pytest.fixture(params=["moto", "directory"])
def two_worlds(request: pytest.FixtureRequest, own_environment: None, tmp_path: Path) -> Iterator[World]:
    """On one S3 server and on a directory store."""
    yield from _world(endpoint_of(request.param, request), tmp_path)


def _shop(endpoint: Endpoint, root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    monkeypatch.setenv(ENV_PREFIX + "CREATE_BUCKET", "1")
    shop = Shop(endpoint, root / "machine" / "app.db")
    shop.path.parent.mkdir()
    try:
        yield shop
    finally:
        failpoints.disarm()
        shop.close()
        assert registry.all() == [], "a replica was left open"


@pytest.fixture
def shop(request: pytest.FixtureRequest, own_environment: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    """In a directory store: the quickest, and exact."""
    yield from _shop(endpoint_of("directory", request), tmp_path, monkeypatch)


@pytest.fixture(params=["rclone", "moto", "directory"])
def any_shop(request: pytest.FixtureRequest, own_environment: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    """On every kind of store."""
    yield from _shop(endpoint_of(request.param, request), tmp_path, monkeypatch)


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """What a command does to the package's logger ends with the test."""
    logger = logging.getLogger("bottomless_wal")
    before = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before
    logger.setLevel(before[1])


@pytest.fixture
def cli() -> Cli:
    """`cli(shop, "verify", shop.path)`: a command in this process, its streams apart."""
    return Cli()
