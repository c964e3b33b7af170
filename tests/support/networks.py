"""A world behind a bad line: its machines reach the server through a proxy with a script, its bucket is looked at past it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw
import pytest

from bottomless_wal.core.errors import ReplicationError
from bottomless_wal.runtime.registry import registry
from tests.support.cluster import Machine, World, replica_of, rows, until
from tests.support.endpoints import Endpoint, endpoint_of
from tests.support.faultproxy import Fault, FaultProxy, Request
from tests.support.independent_reader import Bucket

LOG = "app.db-wal/0"
"""In the path of every request for a segment, and of no other."""
VIEW = "app.db-0"
"""In the path of every request for a page object."""

_buckets: dict[str, Bucket] = {}


@dataclass
class Network(World):
    """A world whose options lead to the proxy `line`."""

    line: FaultProxy | None = None

    @property
    def bucket(self) -> Bucket:
        """The store from outside, past the proxy. (A client takes a tenth of a second to make: one for each server.)"""
        if self._bucket is None:
            if self.endpoint.url not in _buckets:
                _buckets[self.endpoint.url] = Bucket(self.endpoint)
            self._bucket = copy.copy(_buckets[self.endpoint.url])
            self._bucket._bucket = self.endpoint.bucket
        return self._bucket

    def script(self, *faults: Fault) -> None:
        assert self.line is not None
        self.line.script(*faults)

    def mend(self, *then: Fault) -> None:
        """All is well from here on, but for `then`."""
        assert self.line is not None
        self.line.clear(*then)

    def puts(self, path: str = LOG) -> int:
        """How many PUTs have come for `path`."""
        assert self.line is not None
        return self.line.count("PUT", path)

    def accounts(self, con: apsw.Connection, here: Machine, expected: int) -> None:
        """After whatever happened: everything arrives, each row once, and the history is one line, equal to the file it comes back as."""
        self.mend()
        patience(con, 30.0)
        until(lambda: _flushed(con))
        assert rows(con) == rows(con, "SELECT count(DISTINCT x) FROM t") == expected
        view = self.options.get("pages", "commit") != "off"
        self.stored(con, view=view)
        for other in self.connections:
            other.close()
        content = here.content()
        assert self.bucket.log_image("app.db") == content, "the log is not the file"
        assert not view or self.bucket.view_image("app.db") == content, "the page view is not the file"


def _flushed(con: apsw.Connection) -> bool:
    try:
        replica_of(con).worker.flush(60.0)
    except ReplicationError as error:  # an attempt that was under way when the line was mended
        assert error.hint
        return False
    return True


@contextlib.contextmanager
def network(kind: str, request: pytest.FixtureRequest, root: Path, **options: Any) -> Iterator[Network]:
    """A bucket of its own at a server of that kind, and a proxy before it."""
    endpoint: Endpoint = endpoint_of(kind, request)
    with FaultProxy(endpoint.url) as line:
        defaults = {"endpoint": line.url, "bucket": endpoint.bucket, "create_bucket": True, "retry_timeout": 30.0, "read_timeout": 10.0}
        world = Network(endpoint, root, {**defaults, **options}, line=line)
        try:
            yield world
        finally:
            line.clear()
            for con in world.connections:
                with contextlib.suppress(apsw.Error):
                    con.close()
            assert registry.all() == [], "a replica was left open"


def patience(con: apsw.Connection, seconds: float) -> None:
    """From now on requests are retried for so long: an open may need more patience than a test has."""
    store: Any = replica_of(con).store
    store._retrier._timeout = seconds


def of_writer(name: str) -> Any:
    """For `Fault.when`: only requests that are signed with the access key `name`, so that two processes have lines of their own."""

    def wanted(request: Request) -> bool:
        return f"Credential={name}/" in request.headers.get("authorization", "")

    return wanted
