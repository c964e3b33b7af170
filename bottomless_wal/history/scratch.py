"""A file under construction beside its destination: nothing half restored is ever seen at the destination itself."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from ..core.errors import RestoreError
from .page_table import PageTable

__all__ = ["Scratch", "as_restore_errors", "scratch"]

_NEWBORN_SECONDS: Final = 10.0  # between a file's creation and its lock


@dataclass(slots=True)
class Scratch:
    """A file under construction: `path` beside its destination, and the table of its page hashes."""

    path: str
    fd: int
    pages: PageTable


@contextlib.contextmanager
def scratch(destination: str, pages: PageTable) -> Iterator[Scratch]:
    """A temporary file beside `destination`, gone at the end unless it was renamed. What was left by those who were killed goes now.

    Raises:
        RestoreError: no file can be written there: no such directory, no permission, no space.
    """
    path = f"{destination}-bottomless-{secrets.token_hex(8)}"
    with as_restore_errors(destination):
        _tidy(destination)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)  # says, to whoever tidies up, that somebody is at work on it
        with as_restore_errors(destination):
            yield Scratch(path, fd, pages)
    finally:
        os.close(fd)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _tidy(destination: str) -> None:
    """Removes unfinished files that nobody is at work on: a killed process has let go of its lock."""
    folder, name = os.path.split(destination)
    leftover = re.compile(re.escape(name) + "-bottomless-[0-9a-f]{16}")
    for entry in os.listdir(folder or "."):
        if not leftover.fullmatch(entry):
            continue
        path = os.path.join(folder, entry)
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - os.fstat(fd).st_mtime > _NEWBORN_SECONDS:
                    os.unlink(path)
            finally:
                os.close(fd)


@contextlib.contextmanager
def as_restore_errors(destination: str) -> Iterator[None]:
    """OSErrors of writing beside `destination` as RestoreErrors."""
    try:
        yield
    except OSError as error:
        hint = "Nothing was changed. Make room, or restore elsewhere (-o)." if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise RestoreError(
            f"cannot restore to {destination}: {error.strerror or error}",
            hint=hint or "Nothing was changed. Check that the directory exists and can be written.",
            path=destination,
            code=errno.errorcode.get(error.errno or 0),
        ) from error
