"""A proxy in a process of its own that makes a server on loopback as far away as one wants, and keeps books on what passes.

It is the fault proxy's sockets with another road for the bytes: the connection to the server stays open, large answers are passed on
as they come, no body is kept. So 20 ms mean one wait of 20 ms for each request, whoever sends it, and hardly any processor time.

It also honours `If-None-Match: *`, by looking whether the object's file is there: rclone ignores it, and a library that is made for
servers that know it would be measured with one request more than it needs.

Run as `python -m tests.support.latencyproxy UPSTREAM DIRECTORY`, it obeys lines of JSON on standard input (see `COMMANDS`) and ends
with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Final

from tests.support.faultproxy import FaultProxy, Request

_PIECE: Final = 1 << 20
_TAKEN: Final = b"<?xml version='1.0'?><Error><Code>PreconditionFailed</Code><Message>it is there</Message></Error>"
_REFUSED: Final = b"HTTP/1.1 412 Precondition Failed\r\nContent-Type: application/xml\r\nContent-Length: %d\r\n\r\n%s" % (
    len(_TAKEN),
    _TAKEN,
)


class LatencyProxy(FaultProxy):
    """`root` is the directory that the server keeps its objects in; `bodies`, while set, where those of PUTs are kept."""

    def __init__(self, upstream: str, root: Path) -> None:
        super().__init__(upstream)
        self.root = root
        self.bodies: Path | None = None
        self.counts: Counter[str] = Counter()
        self.log: list[tuple[str, str, float, float, int]] = []
        """(method, path, when it came, when it was answered, bytes of its body), by the wall clock."""
        self._creating: set[str] = set()

    def _serve(self, connection: socket.socket) -> None:
        upstream = socket.create_connection(self._target, timeout=120)
        upstream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # An OSError: the client is gone, or the measurement is over.
        with contextlib.suppress(OSError), connection, upstream, connection.makefile("rb") as reader, upstream.makefile("rb") as answers:
            while (request := _request(reader, connection)) is not None:
                came = time.time()
                if self.latency:
                    time.sleep(self.latency)
                good = self._pass(request, connection, upstream, answers)
                with self._lock:
                    self.counts[request.method] += 1
                    self.log.append((request.method, request.path, came, time.time(), len(request.body)))
                    number = len(self.log)
                if self.bodies is not None and request.method == "PUT":
                    (self.bodies / f"{number:08d}").write_bytes(request.body)
                if not good:
                    return
        with self._lock:
            self._open.discard(connection)

    def _pass(self, request: Request, connection: socket.socket, upstream: socket.socket, answers: IO[bytes]) -> bool:
        """Forwards one request and its answer; are both connections still good?"""
        key = urllib.parse.unquote(request.path.partition("?")[0]).lstrip("/")
        create = request.method == "PUT" and request.headers.get("if-none-match") == "*"
        if create:
            with self._lock:
                taken = key in self._creating or os.path.exists(self.root / key)
                if not taken:
                    self._creating.add(key)
            if taken:
                connection.sendall(_REFUSED)
                return True
        try:
            upstream.sendall(request.raw_headers + b"\r\n\r\n" + request.body)
            return _answer(request.method, answers, connection)
        finally:
            if create:
                with self._lock:
                    self._creating.discard(key)


def _request(reader: IO[bytes], connection: socket.socket) -> Request | None:
    """The next request, whole. `Expect` is answered here, and goes no further: it would cost the body a round trip of its own."""
    lines: list[bytes] = []
    while (line := reader.readline()) not in (b"\r\n", b""):
        lines.append(line.rstrip(b"\r\n"))
    if not lines:
        return None
    method, path, _ = lines[0].decode("latin-1").split(" ", 2)
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.decode("latin-1").partition(":") for line in lines[1:])}
    if headers.get("expect", "").lower() == "100-continue":
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        lines = [line for line in lines if not line.lower().startswith(b"expect:")]
    if headers.get("transfer-encoding", "").lower() == "chunked":
        raise ConnectionError("a request in chunks, which no client of S3 sends")
    body = reader.read(int(headers.get("content-length", 0)))
    return Request(method, path, headers, body, b"\r\n".join(lines))


def _answer(method: str, answers: IO[bytes], connection: socket.socket) -> bool:
    """Passes one answer on; may the connection go on?"""
    while True:
        lines: list[bytes] = []
        while (line := answers.readline()) not in (b"\r\n", b""):
            lines.append(line)
        if not lines:
            raise ConnectionError("the server has closed the connection")
        status = int(lines[0].split()[1])
        if status >= 200:  # (100 Continue is for nobody)
            break
    headers = {name.strip().lower(): value.strip().lower() for name, _, value in (line.partition(b":") for line in lines[1:])}
    head = b"".join(lines) + b"\r\n"
    if method == "HEAD" or status in (204, 304):
        connection.sendall(head)
    elif b"content-length" in headers:
        left = int(headers[b"content-length"])
        piece = answers.read(min(left, _PIECE))
        connection.sendall(head + piece)
        left -= len(piece)
        while left:
            piece = answers.read(min(left, _PIECE))
            connection.sendall(piece)
            left -= len(piece)
    elif headers.get(b"transfer-encoding") == b"chunked":
        connection.sendall(head)
        while True:
            size = answers.readline()
            connection.sendall(size + answers.read(int(size, 16) + 2))
            if int(size, 16) == 0:
                break
    else:
        connection.sendall(head)
        while piece := answers.read(_PIECE):
            connection.sendall(piece)
        return False
    return headers.get(b"connection") != b"close"


def _reset(proxy: LatencyProxy, _: Any) -> None:
    with proxy._lock:
        proxy.counts.clear()
        proxy.log.clear()


COMMANDS: Final[dict[str, Callable[[LatencyProxy, Any], Any]]] = {
    "latency": lambda proxy, seconds: setattr(proxy, "latency", seconds),
    "reset": _reset,
    "counts": lambda proxy, _: dict(proxy.counts),
    "log": lambda proxy, _: list(proxy.log),
    "bodies": lambda proxy, directory: setattr(proxy, "bodies", Path(directory) if directory else None),
}


def main() -> None:
    """Serves until standard input ends, as it does when whoever started this is gone."""
    with LatencyProxy(sys.argv[1], Path(sys.argv[2])) as proxy:
        threading.current_thread().name = "control"
        sys.setswitchinterval(0.0005)  # a request that is due must not wait for a thread that copies bytes
        print(json.dumps(proxy.url), flush=True)
        for line in sys.stdin:
            command, argument = json.loads(line)
            print(json.dumps(COMMANDS[command](proxy, argument)), flush=True)


if __name__ == "__main__":
    main()
