"""An HTTP proxy on loopback that does to requests, by a script, what networks and overloaded servers do.

It stands between a client and a real server, forwards the bytes as they are (signatures stay right), and applies to each request
the first fault of its script that wants it:

    with FaultProxy(server_url) as proxy:
        proxy.script(lost_answer("PUT"), answer(503, "SlowDown", method="GET", times=2))
        ... a client that uses proxy.url ...
        assert proxy.count("PUT") == 2
"""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, NamedTuple

ALWAYS: Final = 1 << 40
"""As `Fault.times`: until the script is cleared."""


class Request(NamedTuple):
    """What the client sent: `path` includes the query; header names are in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    raw_headers: bytes


@dataclass
class Fault:
    """What to do to the next `times` requests of `method` (any, when empty) whose path contains `path`, and that `when` wants.

    In this order: wait `delay` seconds; end the connection (`reset_before`); answer with `instead`; wait for `hold`; forward the request
    (without the header `strip`), or the first `cut` bytes of its body, after which both connections end; end the connection without an
    answer (`reset_after`); cut the answer's body to `truncate` bytes; change the answer with `edit`; send it byte by byte, `trickle`
    seconds for each.
    """

    method: str = ""
    path: str = ""
    times: int = 1
    delay: float = 0.0
    reset_before: bool = False
    reset_after: bool = False
    instead: bytes | None = None
    truncate: int | None = None
    edit: Callable[[bytes], bytes] | None = None
    when: Callable[[Request], bool] | None = None
    hold: threading.Event | None = None
    cut: int | None = None
    trickle: float = 0.0
    strip: str = ""

    def wants(self, request: Request) -> bool:
        if self.times <= 0 or self.method not in ("", request.method) or self.path not in request.path:
            return False
        return self.when is None or self.when(request)


def reset(method: str = "", **more: object) -> Fault:
    """The connection ends before the request has reached the server."""
    return Fault(method, reset_before=True, **more)  # type: ignore[arg-type]


def lost_answer(method: str = "", **more: object) -> Fault:
    """The server does what it was asked to do; nobody hears of it."""
    return Fault(method, reset_after=True, **more)  # type: ignore[arg-type]


def hang(seconds: float, method: str = "", **more: object) -> Fault:
    """Nothing happens for `seconds`, and then nothing more."""
    return Fault(method, delay=seconds, reset_before=True, **more)  # type: ignore[arg-type]


def answer(status: int, code: str = "", method: str = "", *, body: bytes | None = None, **more: object) -> Fault:
    """The proxy answers by itself, with an error in XML as S3 writes it, or with `body`."""
    if body is None:
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>said the proxy</Message></Error>".encode() if code else b""
    head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\nContent-Type: application/xml\r\n\r\n".encode()
    return Fault(method, instead=head + body, **more)  # type: ignore[arg-type]


def outage(method: str = "", **more: object) -> Fault:
    """Every request is cut off before it has reached the server, until the script is cleared."""
    return reset(method, **{"times": ALWAYS, **more})


def late(until: threading.Event, method: str = "", **more: object) -> Fault:
    """The request is carried out once `until` is set, however long its client has been gone by then."""
    return Fault(method, hold=until, reset_after=True, **more)  # type: ignore[arg-type]


def cut_off(sent: int, method: str = "PUT", **more: object) -> Fault:
    """The connection ends when `sent` bytes of the request's body have reached the server."""
    return Fault(method, cut=sent, **more)  # type: ignore[arg-type]


def portal(method: str = "", **more: object) -> Fault:
    """Something between client and server that says yes to everything, in HTML."""
    body = b"<html><body>Welcome! Please log in.</body></html>"
    head = f"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    return Fault(method, instead=head + body, **more)  # type: ignore[arg-type]


def damaged(method: str = "GET", **more: object) -> Fault:
    """One bit in the middle of the answer's body is another."""

    def flip(whole: bytes) -> bytes:
        head, gap, body = whole.partition(b"\r\n\r\n")
        middle = len(body) // 2
        return head + gap + body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :] if body else whole

    return Fault(method, edit=flip, **more)  # type: ignore[arg-type]


def misstated(by: int, method: str = "", **more: object) -> Fault:
    """The answer's Content-Length is `by` bytes off."""

    def edit(whole: bytes) -> bytes:
        return re.sub(rb"(?i)(content-length: *)(\d+)", lambda m: m[1] + str(max(0, int(m[2]) + by)).encode(), whole, count=1)

    return Fault(method, edit=edit, **more)  # type: ignore[arg-type]


def trickling(seconds: float, method: str = "", **more: object) -> Fault:
    """The answer comes byte by byte: never silent for long, and never done."""
    return Fault(method, trickle=seconds, **more)  # type: ignore[arg-type]


@dataclass
class FaultProxy:
    """A context manager. `latency` in seconds is added to each request; `requests` and `connections` tell what came, and
    `carried_out` how many requests the server has done whole."""

    upstream: str
    latency: float = 0.0
    requests: list[Request] = field(default_factory=list)
    connections: int = 0
    carried_out: int = 0

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.upstream)
        self._target = (parts.hostname or "127.0.0.1", parts.port or 80)
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._closing = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def script(self, *faults: Fault) -> None:
        """Adds faults to what is left of the script."""
        with self._lock:
            self._faults.extend(faults)

    def clear(self, *then: Fault) -> None:
        """All is well from here on, but for `then`."""
        with self._lock:
            self._faults[:] = then

    def count(self, method: str, path: str = "") -> int:
        """How many requests of `method` have come whose path contains `path`."""
        return sum(1 for request in self.requests if request.method == method and path in request.path)

    def __enter__(self) -> FaultProxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self.connections += 1
                self._open.add(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            reader = connection.makefile("rb")
            try:
                # An OSError: the client is gone, or the test is over.
                with contextlib.suppress(OSError):
                    while (request := _read_request(reader)) is not None and self._one(connection, request):
                        continue
            finally:
                with self._lock:
                    self._open.discard(connection)
                with contextlib.suppress(OSError):
                    reader.close()

    def _one(self, connection: socket.socket, request: Request) -> bool:
        """Does one request; is the connection still good?"""
        with self._lock:
            self.requests.append(request)
            fault = next((fault for fault in self._faults if fault.wants(request)), None) or Fault()
            fault.times -= 1
        self._closing.wait(self.latency + fault.delay)
        if fault.reset_before:
            return _reset(connection)
        if fault.instead is not None:
            connection.sendall(fault.instead)
            return True
        while fault.hold is not None and not fault.hold.wait(0.1):
            if self._closing.is_set():
                return _reset(connection)
        if fault.cut is not None:
            self._forward_some(request, fault.cut)
            return _reset(connection)
        head, body = self._forward(request, fault.strip)
        with self._lock:
            self.carried_out += 1
        if fault.reset_after:
            return _reset(connection)
        if fault.trickle:
            return self._trickle(connection, head + b"\r\n\r\n" + body, fault.trickle)
        if fault.edit is not None:
            edited = fault.edit(head + b"\r\n\r\n" + body)
            connection.sendall(edited)
            return False
        keep = b"content-length:" in head.lower() and fault.truncate is None
        connection.sendall(head + (b"" if keep else b"\r\nConnection: close") + b"\r\n\r\n" + body[: fault.truncate])
        return keep

    def _trickle(self, connection: socket.socket, data: bytes, seconds: float) -> bool:
        for at in range(len(data)):
            if self._closing.wait(seconds):
                break
            connection.sendall(data[at : at + 1])
        return False

    def _forward_some(self, request: Request, count: int) -> None:
        with socket.create_connection(self._target, timeout=60) as upstream:
            upstream.sendall(_message(request, request.body[:count]))

    def _forward(self, request: Request, strip: str) -> tuple[bytes, bytes]:
        message = _message(request, request.body, strip)
        with socket.create_connection(self._target, timeout=60) as upstream:
            upstream.sendall(message)
            got = bytearray()
            while piece := upstream.recv(1 << 20):
                got += piece
        head, _, body = bytes(got).partition(b"\r\n\r\n")
        kept = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
        return b"\r\n".join(kept), body


def _message(request: Request, body: bytes, strip: str = "") -> bytes:
    gone = {b"connection", strip.lower().encode()}
    lines = [line for line in request.raw_headers.split(b"\r\n") if line.partition(b":")[0].lower() not in gone]
    return b"\r\n".join([*lines, b"Connection: close", b"", body])


def _read_request(reader: object) -> Request | None:
    lines: list[bytes] = []
    while (line := reader.readline()) not in (b"\r\n", b""):  # type: ignore[attr-defined]
        lines.append(line.rstrip(b"\r\n"))
    if not lines:
        return None
    method, path, _ = lines[0].decode("latin-1").split(" ", 2)
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.decode("latin-1").partition(":") for line in lines[1:])}
    body = reader.read(int(headers.get("content-length", 0)))  # type: ignore[attr-defined]
    return Request(method, path, headers, body, b"\r\n".join(lines))


def _reset(connection: socket.socket) -> bool:
    # Lingering for no time at all makes close() send RST, as a server that crashed does, and not an orderly FIN.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return False
