"""A bucket that is a directory: `file:///srv/backup` and a bucket's name. For tests, a mounted disk, or an air-gapped copy.

An object is a file of that path below `<directory>/<bucket>`. It is written to `.tmp/` there, synced, and linked or renamed
into place (and the directory synced), so it appears at once and whole; `link(2)` refuses a name that is taken, which makes
`create` exact, between machines too if the file system keeps POSIX's promise. Times are those of the file system. Keys cannot
leave the directory.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from ..core.config import Config
from ..core.errors import ConfigError, CorruptionError, StoreError
from .base import Entry, Receipt, ServerClock, Stats, check_key

__all__ = ["DirectoryStore"]

_TEMPORARY: Final = ".tmp"
_STALE: Final = 86400.0  # seconds after which a temporary file is no longer one that is being written
_HINTS: Final = {
    errno.ENOSPC: "The disk is full: make room.",
    errno.EDQUOT: "The quota is used up: make room.",
    errno.EACCES: "This user may not do that: check owner and mode of the directory.",
    errno.EPERM: "Not allowed here, or a file system without hard links, which create-only writes need.",
    errno.ENOTSUP: "This file system has no hard links, which create-only writes need.",
    errno.EROFS: "The file system is mounted read-only.",
    errno.ENAMETOOLONG: "A shorter file name, or database_id, is needed.",
}


class _SourceError(Exception):
    """An `OSError` of the iterator that an upload reads from, which is not the directory's."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error)
        self.error = error


class DirectoryStore:
    """See `base.Store`. Nothing is retried: what a file system refuses once, it refuses again."""

    def __init__(self, config: Config, *, clock: Callable[[], float] = time.monotonic) -> None:
        parts = urllib.parse.urlsplit(config.endpoint)
        directory = urllib.parse.unquote(parts.path)
        if parts.scheme != "file" or not directory.startswith("/") or "\0" in directory:
            raise ConfigError(
                f"{config.endpoint!r} names no directory", hint="Such as file:///srv/backup.", option="endpoint", actual=config.endpoint
            )
        self.stats = Stats()
        self._root = os.path.join(directory, config.bucket)
        self._create_bucket = config.create_bucket
        self._clock = clock
        self._closed = False
        self._server = ServerClock()

    def describe(self) -> str:
        return f"directory '{self._root}'"

    def get(self, key: str, *, limit: int) -> bytes | None:
        with self._doing("reading", key, "get"):
            fd = self._open(key)
            if fd is None:
                return None
            with open(fd, "rb", buffering=0) as file:
                size = os.fstat(fd).st_size
                if size > limit:
                    raise CorruptionError.about(
                        f"{key!r} in {self.describe()}",
                        f"{size} bytes, where at most {limit} can be",
                        hint="It is none of ours.",
                        key=key,
                        path=self._path(key),
                        expected=limit,
                        actual=size,
                    )
                return self._taken(file.read())

    def read(self, key: str, start: int, length: int) -> bytes | None:
        if start < 0 or length < 0:
            raise ValueError("start and length must not be negative")
        with self._doing("reading", key, "get"):
            fd = self._open(key)
            if fd is None:
                return None
            with open(fd, "rb") as file:
                file.seek(start)
                return self._taken(file.read(length))

    def put(self, key: str, data: bytes) -> Receipt:
        with self._doing("writing", key, "put", len(data)):
            return Receipt(True, self._place(key, [data], os.replace)[1])

    def create(self, key: str, data: bytes) -> Receipt:
        with self._doing("creating", key, "create", len(data)):
            try:
                return Receipt(True, self._place(key, [data], os.link)[1])
            except FileExistsError:
                return Receipt(False, self.now())

    def upload(self, key: str, chunks: Iterable[bytes]) -> int:
        try:
            with self._doing("writing", key, "upload"):
                size, _ = self._place(key, self._counted(chunks), os.replace)
                return size
        except _SourceError as error:
            raise error.error from None

    def list(self, prefix: str, *, after: str = "") -> Iterator[Entry]:
        with self._doing("listing", prefix, "list"):
            self._check_root()
            yield from self._walk("", prefix, after)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            with self._doing("deleting", key, "delete"):
                try:
                    os.unlink(self._path(key))
                except (FileNotFoundError, NotADirectoryError):
                    self._check_root()

    def conditional(self) -> bool:
        return True

    def versioned(self) -> bool | None:
        return False

    def prepare(self) -> None:
        with self._doing("opening", "", "list"):
            if self._create_bucket:
                _make_all(self._root)
            self._check_root()
            with contextlib.suppress(FileNotFoundError), os.scandir(os.path.join(self._root, _TEMPORARY)) as entries:
                stale = self.now() - _STALE
                for entry in entries:
                    if entry.stat().st_mtime < stale:
                        os.unlink(entry.path)

    def now(self) -> float:
        if self._server.last is None:
            with self._doing("writing", "", "put"), self._temporary() as (fd, _):
                self._heard(os.fstat(fd).st_mtime)
        return self._server.last or 0.0

    def estimate(self) -> float:
        self.now()
        return self._server.estimate() or 0.0

    @contextlib.contextmanager
    def deadline(self, seconds: float) -> Iterator[None]:
        """Bounds nothing: a file system cannot be told to hurry."""
        yield

    def close(self) -> None:
        self._closed = True

    # ------------------------------------------------------------------------------------------- files

    def _path(self, key: str) -> str:
        if check_key(key).split("/")[0] == _TEMPORARY:
            raise ConfigError(f"{key!r} is no name for an object", hint=f"{_TEMPORARY!r} is for files that are being written.", key=key)
        return os.path.join(self._root, key)

    def _open(self, key: str) -> int | None:
        """A descriptor of the object; None when there is no such file, in a directory that is there."""
        try:
            # (Not to wait for the other end of a pipe.)
            fd = os.open(self._path(key), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError):
            self._check_root()
            return None
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            os.close(fd)
            if not stat.S_ISDIR(mode):
                raise StoreError.about(
                    f"{key!r} in {self.describe()}",
                    "is no file",
                    joint=" ",
                    hint="Remove it: it is none of ours.",
                    key=key,
                    path=self._path(key),
                )
            return None
        return fd

    def _taken(self, data: bytes) -> bytes:
        self.stats.received(len(data))
        return data

    def _counted(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        try:
            for chunk in chunks:
                self.stats.request("part", sent=len(chunk))
                yield chunk
        except OSError as error:
            raise _SourceError(error) from error

    def _place(self, key: str, chunks: Iterable[bytes], move: Callable[[str, str], None]) -> tuple[int, float]:
        """Writes `chunks` to a temporary file and moves it to its name; size, and the file system's time."""
        target = self._path(key)
        size = 0
        with self._temporary() as (fd, temporary):
            for chunk in chunks:
                view = memoryview(chunk)
                size += len(view)
                while view:
                    view = view[os.write(fd, view) :]
            os.fsync(fd)
            date = os.fstat(fd).st_mtime
            self._heard(date)
            parent = os.path.dirname(target)
            try:
                move(temporary, target)
            except FileNotFoundError:
                self._make_below(parent)
                move(temporary, target)
            _sync(parent)
        return size, date

    def _heard(self, date: float) -> None:
        self._server.heard(date)

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[tuple[int, str]]:
        """A new file in `.tmp`, open for writing; removed at the end if it is still there."""
        directory = os.path.join(self._root, _TEMPORARY)
        path = os.path.join(directory, uuid.uuid4().hex)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            fd = os.open(path, flags, 0o600)
        except FileNotFoundError:
            self._check_root()
            self._make_below(directory)
            fd = os.open(path, flags, 0o600)
        try:
            yield fd, path
        finally:
            os.close(fd)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def _make_below(self, directory: str) -> None:
        """Makes a directory, durably, but never the bucket itself: that of a disk not mounted would hide the real one."""
        self._check_root()
        if directory != self._root:
            self._make_below(os.path.dirname(directory))
            _make(directory)

    def _check_root(self) -> None:
        if not os.path.isdir(self._root):
            raise StoreError(
                f"{self.describe()} does not exist",
                hint="Is the disk mounted? create_bucket=1 (LIBSQL_BOTTOMLESS_CREATE_BUCKET=1) has it made.",
                path=self._root,
                code="NoSuchBucket",
            )

    def _walk(self, above: str, prefix: str, after: str) -> Iterator[Entry]:
        """The files below `above` (empty, or with a slash at its end), in the order of their keys' bytes."""
        with os.scandir(os.path.join(self._root, above)) as entries:
            # A directory sorts as what its files' keys go on with: its name and a slash.
            # Names that no key can have are not ours. Symbolic links are followed where the prefix itself leads through them, as reads
            # and writes do; not below it, where they may lead in circles.
            named = [entry for entry in entries if entry.name.isprintable() and len((above + entry.name).encode()) <= 1024]
            asked = [prefix.startswith(f"{above}{entry.name}/") for entry in named]
            rows = [
                (above + entry.name + ("/" if entry.is_dir(follow_symlinks=follow) else ""), entry)
                for entry, follow in zip(named, asked, strict=True)
            ]
        for key, entry in sorted(rows, key=lambda row: row[0].encode()):
            if key.endswith("/"):
                if above == "" and entry.name == _TEMPORARY:
                    continue
                ended = after >= key and not after.startswith(key)
                if not ended and (key.startswith(prefix) or prefix.startswith(key)):
                    with contextlib.suppress(FileNotFoundError):
                        yield from self._walk(key, prefix, after)
            elif key.startswith(prefix) and key > after:
                with contextlib.suppress(FileNotFoundError):  # deleted since
                    status = entry.stat()
                    if stat.S_ISREG(status.st_mode):
                        yield Entry(key, status.st_size, status.st_mtime)

    @contextlib.contextmanager
    def _doing(self, verb: str, key: str, kind: str, sent: int = 0) -> Iterator[None]:
        """Counts a request, and tells the operating system's errors in our terms."""
        if self._closed:
            raise StoreError(f"{self.describe()} was closed", hint="Open the database again.")
        self.stats.request(kind, sent=sent)
        try:
            yield
        except OSError as error:
            what = f"{verb} {key!r} in {self.describe()}" if key else f"{verb} {self.describe()}"
            raise StoreError.about(
                what,
                error.strerror or str(error),
                hint=_HINTS.get(error.errno or 0, ""),
                key=key or None,
                path=os.path.join(self._root, key) if key else self._root,
                code=errno.errorcode.get(error.errno or 0),
            ) from error


def _make_all(directory: str) -> None:
    """`os.makedirs`, made durable."""
    if not os.path.isdir(directory):
        _make_all(os.path.dirname(directory))
        _make(directory)


def _make(directory: str) -> None:
    with contextlib.suppress(FileExistsError):
        os.mkdir(directory, 0o700)
        _sync(os.path.dirname(directory))


def _sync(directory: str) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
