"""Fixtures of the faces' tests: a shop (a database in a bucket of its own), on each kind of store or on the quickest, and the commands."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from endpoints import Endpoint, endpoint_of
from shops import Cli, Shop

from bottomless_wal.core import failpoints
from bottomless_wal.core.config import ENV_PREFIX
from bottomless_wal.runtime.registry import registry


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
