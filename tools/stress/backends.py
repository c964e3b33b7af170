"""The stores of the crash runs: an embedded server, and between it and the client a network that fails by chance."""

from __future__ import annotations

import contextlib
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bottomless_wal.cli.demo_server import RcloneServer, guarded
from tests.support.faultproxy import Fault, FaultProxy, answer, lost_answer, reset

LONGEST_DELAY = 0.3
GHOST_SECONDS = 1.5
"""So long a request haunts the network after its client has given it up. Clients of such a network wait for an answer for less."""


@dataclass
class Backend:
    """Where the writers find the store (`url`), and where it is itself (`server`). `proxy` stands between, if it is not None."""

    url: str
    server: str
    proxy: FaultProxy | None = None
    outage: Outage | None = None

    def settle(self) -> None:
        """All clients are dead: waits until what they had sent has arrived, or been lost. A machine is not replaced before."""
        end = time.monotonic() + 60
        while self.proxy is not None and self.proxy._open and time.monotonic() < end:
            time.sleep(0.01)

    def forget(self) -> None:
        """Nobody wants to know what has come so far."""
        if self.proxy is not None:
            self.proxy.requests.clear()


class Outage(Fault):
    """While it is `on`, every request is answered 503."""

    on = False

    def wants(self, request: object) -> bool:
        return self.on


@dataclass
class Chance(Fault):
    """A fault that comes to a share `rate` of the requests that it is meant for."""

    rate: float = 0.0
    rng: random.Random = field(default_factory=random.Random)

    def wants(self, request: object) -> bool:
        return super().wants(request) and self.rng.random() < self.rate  # type: ignore[arg-type]


def _chance(rng: random.Random, rate: float, fault: Fault) -> Chance:
    return Chance(**{**vars(fault), "times": 1 << 60}, rate=rate, rng=rng)


def bad_network(rng: random.Random, *, ghosts: bool) -> list[Fault]:
    """Some six per cent of all requests fail, and some are late: unheard, or carried out and unanswered, refused, cut.

    `ghosts`: segments arrive after their writer has given them up, and tried again or died.
    """
    faults: list[Fault] = [
        _chance(rng, 0.02, lost_answer("PUT")),
        _chance(rng, 0.005, lost_answer()),
        _chance(rng, 0.01, reset()),
        _chance(rng, 0.01, answer(503, "SlowDown")),
        _chance(rng, 0.005, answer(500, "InternalError")),
        _chance(rng, 0.005, Fault("GET", truncate=50)),
        _chance(rng, 0.005, Fault("PUT", delay=LONGEST_DELAY, reset_after=True)),
        _chance(rng, 0.01, Fault(delay=LONGEST_DELAY)),
        _chance(rng, 0.02, Fault(delay=LONGEST_DELAY / 6)),
    ]
    if ghosts:
        faults.insert(0, _chance(rng, 0.05, Fault("PUT", path="-wal/", delay=GHOST_SECONDS, reset_after=True)))
    return faults


@contextlib.contextmanager
def backend(
    kind: str, directory: Path, rng: random.Random, *, faults: bool = False, ghosts: bool = False, latency: float = 0.0
) -> Iterator[Backend]:
    """A store of `kind` (directory, moto or rclone; or the URL of one that runs) that ends with the context.

    `latency` in seconds is added to each request. Credentials are put into the environment.
    """
    with contextlib.ExitStack() as stack:
        if kind == "directory":
            store = (directory / "store").as_uri()
            yield Backend(store, store)
            return
        server = kind if "://" in kind else stack.enter_context(_server(kind, directory))
        if not (faults or ghosts or latency):
            yield Backend(server, server)
            return
        proxy = stack.enter_context(FaultProxy(server, latency=latency))
        outage = Outage(times=1 << 60, instead=answer(503, "SlowDown").instead)
        proxy.script(outage)
        if faults or ghosts:
            proxy.script(*bad_network(rng, ghosts=ghosts))
        yield Backend(proxy.url, server, proxy, outage)


@contextlib.contextmanager
def _server(kind: str, directory: Path) -> Iterator[str]:
    if kind == "rclone":
        store = directory / "rclone"
        store.mkdir()
        with RcloneServer(store) as server:
            os.environ.update({name: value for name, value in server.environ().items() if name.startswith("AWS_")})
            yield server.endpoint
        return
    if kind != "moto":
        raise ValueError(f"no server of kind {kind!r}")
    os.environ.update(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="testtesttest", AWS_DEFAULT_REGION="us-east-1")
    with tempfile.TemporaryFile() as log:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
        with guarded(command, log, dict(os.environ)) as process:
            yield _url(process, log.fileno())


def _url(process: subprocess.Popen[bytes], log: int) -> str:
    end = time.monotonic() + 60
    while not (told := re.search(rb"http://127\.0\.0\.1:\d+", os.pread(log, 1 << 16, 0))):
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(os.pread(log, 1 << 16, 0).decode())
        time.sleep(0.05)
    return told[0].decode()
