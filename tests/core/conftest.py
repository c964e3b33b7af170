"""Fixtures of the core's tests: a world (a bucket, and machines that can be lost), on each kind of store or on the quickest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest
from endpoints import Endpoint, endpoint_of
from worlds import World, until

from bottomless_wal.core import failpoints
from bottomless_wal.runtime.registry import registry


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
