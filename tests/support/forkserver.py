"""Processes to be killed, by the dozen: forked from one that has imported everything, so that a start costs milliseconds.

A child is a real process with pipes of its own: SIGKILL, SIGSTOP and an ordinary exit (`atexit` and all) do to it what they do to any
other. What still runs when the tests end is killed.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

_PATHS: Final = [str(Path(__file__).resolve().parents[2])]
_LONGEST: Final = 1 << 20

# What the process does that all children are forked from: it imports, forks and waits, and never opens a database.
_PARENT: Final = """
import json, os, signal, socket, sys, threading, time
sys.path[:0] = json.loads(sys.argv[2])
import apsw, bottomless_wal
from bottomless_wal.core import failpoints
door = socket.socket(fileno=int(sys.argv[1]))
job = None
while job is None:
    data, fds, _, _ = socket.recv_fds(door, 1 << 20, 3)
    if not data:
        os._exit(0)
    request = json.loads(data)
    if "wait" in request:
        pid, status = os.waitpid(request["wait"], os.WNOHANG)
        door.send(json.dumps(os.waitstatus_to_exitcode(status) if pid else None).encode())
        continue
    pid = os.fork()
    if pid == 0:
        door.close()
        for number, fd in enumerate(fds):
            os.dup2(fd, number)
        job = request
    else:
        door.send(json.dumps(pid).encode())
    for fd in fds:
        os.close(fd)
os.environ.clear()
os.environ.update(job["environ"])
options, argv = job["options"], job["argv"]
def connect(path, **more):
    con = bottomless_wal.connect(path, **{**options, **more})
    con.set_busy_timeout(10000)
    return con
def die_at(point, passes=0, number=signal.SIGKILL):
    left = [passes]
    def reached():
        left[0] -= 1
        if left[0] < 0:
            # To this very thread: it goes no further, and with it the process is stopped or killed.
            signal.pthread_kill(threading.get_ident(), number)
    failpoints.arm(point, reached)
exec(compile(job["script"], "<child>", "exec"))
"""

# A child that does, line by line, what it is told, and answers each with "ok", or with the name of the error.
_OBEDIENT: Final = """
for line in sys.stdin:
    try:
        exec(json.loads(line))
    except Exception as error:
        print(json.dumps([type(error).__name__, str(error)]), flush=True)
    else:
        print(json.dumps(["ok", ""]), flush=True)
"""


class Child:
    """A process and its pipes. `code`, once it is known: as `subprocess` tells it, negative for a signal."""

    def __init__(self, script: str, argv: tuple[str, ...], options: Mapping[str, object]) -> None:
        self.code: int | None = None
        theirs_in, self._in = os.pipe()
        self._out, theirs_out = os.pipe()
        self._err, theirs_err = os.pipe()
        self._buffer = b""
        request = {"script": script, "argv": argv, "options": dict(options), "environ": dict(os.environ)}
        try:
            self.pid: int = _Parent.get().ask(request, (theirs_in, theirs_out, theirs_err))
        finally:
            for fd in (theirs_in, theirs_out, theirs_err):
                os.close(fd)
        _children.append(self)

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        if self.code is None:
            self.code = _Parent.get().ask({"wait": self.pid})
        return self.code

    def line(self, seconds: float = 60.0) -> str | None:
        """The next whole line that it prints; None when there is none any more (half a line, cut off by a kill, is none)."""
        end = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._out], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"process {self.pid} said nothing for {seconds} s"
            piece = os.read(self._out, 65536)
            if not piece:
                return None
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()

    def tell(self, command: str) -> None:
        """To an obedient one: do that. `told` gives the answer."""
        os.write(self._in, json.dumps(command).encode() + b"\n")

    def told(self) -> str:
        """ "ok", the name of the error, or "died"."""
        line = self.line()
        if line is None:
            return "died"
        self.said: str
        name, self.said = json.loads(line)
        return str(name)

    def do(self, command: str) -> str:
        """`tell` and `told`."""
        self.tell(command)
        return self.told()

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def end(self, seconds: float = 60.0) -> tuple[int, list[str]]:
        """(exit code, what lines it printed) when it has come to its end; an obedient one has no more to do."""
        with contextlib.suppress(OSError):
            os.close(self._in)
        lines: list[str] = []
        end = time.monotonic() + seconds
        while (line := self.line(max(0.1, end - time.monotonic()))) is not None:
            lines.append(line)
        while self.poll() is None:
            assert time.monotonic() < end, f"process {self.pid} does not end"
            time.sleep(0.001)
        self.errors = b"".join(iter(functools.partial(os.read, self._err, 65536), b"")).decode()
        os.close(self._out)
        os.close(self._err)
        assert self.code is not None
        assert self.code in (0, -signal.SIGKILL), f"exit {self.code}\n{lines}\n{self.errors}"
        return self.code, lines


def fork(script: str, *argv: str, options: Mapping[str, object]) -> Child:
    """Runs `script` in a process of its own; `connect(path, **more)`, `die_at(point, passes)`, `argv` and `options` are there."""
    return Child(script, argv, options)


def obedient(*, options: Mapping[str, object]) -> Child:
    """A child that does what it is told."""
    return Child(_OBEDIENT, (), options)


_children: list[Child] = []


@atexit.register
def _end_all() -> None:
    for child in _children:
        if child.code is None and child.poll() is None:
            child.signal(signal.SIGKILL)


class _Parent:
    """The process that they are forked from: started when first needed, gone with this one."""

    _only: _Parent | None = None

    def __init__(self) -> None:
        self._door, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._door, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LONGEST)
        with theirs:
            command = [sys.executable, "-c", _PARENT, str(theirs.fileno()), json.dumps(_PATHS)]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        self._lock = threading.Lock()

    @classmethod
    def get(cls) -> _Parent:
        if cls._only is None:
            cls._only = cls()
        return cls._only

    def ask(self, request: Mapping[str, Any], fds: tuple[int, ...] = ()) -> Any:
        with self._lock:
            socket.send_fds(self._door, [json.dumps(request).encode()], list(fds))
            return json.loads(self._door.recv(4096))
