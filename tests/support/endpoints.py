"""Where a test's store is: the kinds of servers, and a bucket of its own at one of them. The fixtures are in `conftest`."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from bottomless_wal.core.config import Config

MakeConfig = Callable[..., Config]


@dataclass(frozen=True)
class Endpoint:
    """A server and a bucket that nobody else uses. `kind` is rclone, moto or directory; the bucket does not exist yet."""

    kind: str
    url: str
    bucket: str
    environ: dict[str, str]


def endpoint_of(kind: str, request: pytest.FixtureRequest) -> Endpoint:
    """A fresh bucket at the server of that kind, started if need be; its credentials are put into the environment."""
    bucket = f"test-{uuid.uuid4().hex[:16]}"
    if kind == "directory":
        return Endpoint(kind, request.getfixturevalue("tmp_path").as_uri(), bucket, {})
    monkeypatch = request.getfixturevalue("monkeypatch")
    if kind == "moto":
        environ = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "testtesttest"}
        endpoint = Endpoint(kind, request.getfixturevalue("moto_server"), bucket, environ)
    else:
        server = request.getfixturevalue("rclone_server")
        endpoint = Endpoint(kind, server.endpoint, bucket, server.environ())
    for name, value in endpoint.environ.items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value)
    return endpoint
