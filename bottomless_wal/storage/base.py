"""What the rest of the package may ask of object storage: keys and bytes, no more.

The promises every store keeps (`tests/storage/test_conformance.py` holds them against each):

- **Absence is a value, failure is an exception.** `get` and `read` answer None only when the store said that this key does
  not exist in a bucket that does. Whatever else goes wrong is a `StoreError`; a missing bucket is never "absent".
- **A write that returned is stored**, whole. One that raised may or may not be: a repeated `create` whose first answer was lost
  says `created=False`, and the caller tells its own object from a rival's by content.
- **Every request is bounded**: retried for `retry_timeout` seconds when the failure may pass, and then given up loudly.
- **Listings are in the order of the keys' UTF-8 bytes**, and complete.
- Any method may be called from any thread. No method needs more than some tens of MB of memory, whatever the objects' size.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final, Protocol

from ..core.errors import ConfigError
from ..core.threads import fork_aware

__all__ = ["PART_BYTES", "Entry", "Receipt", "ServerClock", "Stats", "Store", "check_key", "parts"]

PART_BYTES: Final = 8 << 20
"""How much of an `upload` travels in one request: at least 5 MiB by the rules of S3, and all but the last of one size."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of a listing. `size` in bytes; `modified` in unix seconds, by the server's clock."""

    key: str
    size: int
    modified: float


@dataclass(frozen=True, slots=True)
class Receipt:
    """The answer to a write. `created` is False when `create` found the key taken; `date` is the server's time, unix seconds."""

    created: bool
    date: float


_RUNNING: Final[int] = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
_ROUGH: Final = 2.0  # seconds that an answer may seem older than it is: it was on its way, and its date is rounded down


class Stats:
    """Counts, since the store was opened, what went over the line: the attempts that were made, failed ones included.

    Only the threads that send take the lock. A thread that reads copies the counters, each in one step: a commit that the garbage collector
    makes in it must not find the worker waiting for a lock of this very thread.
    """

    def __init__(self) -> None:
        self._requests: Counter[str] = Counter()
        self._sent: Counter[str] = Counter()
        self._received = 0
        self._retries = 0
        self.after_fork()
        fork_aware(self)

    def after_fork(self) -> None:
        self._lock = threading.Lock()

    def request(self, kind: str, *, sent: int = 0) -> None:
        """One request of `kind` (put, create, get, head, list, delete, part, ...) that carries `sent` bytes of content."""
        with self._lock:
            self._requests[kind] += 1
            self._sent[kind] += sent

    def received(self, count: int) -> None:
        """`count` bytes of content have arrived."""
        with self._lock:
            self._received += count

    def retry(self) -> None:
        """A failed request is about to be repeated."""
        with self._lock:
            self._retries += 1

    @property
    def requests(self) -> dict[str, int]:
        """Requests made, by kind."""
        return dict(self._requests)

    @property
    def sent(self) -> dict[str, int]:
        """Bytes of content sent, by kind of request (headers are not counted)."""
        return {kind: size for kind, size in dict(self._sent).items() if size}

    @property
    def bytes_sent(self) -> int:
        """All of them together."""
        return sum(dict(self._sent).values())

    @property
    def bytes_received(self) -> int:
        """Bytes of content received (headers and listings are not counted)."""
        return self._received

    @property
    def retries(self) -> int:
        """How many requests were repetitions of a failed one."""
        return self._retries


class ServerClock:
    """The server's time, by the dates of its answers: on S3 they are in whole seconds, so the one furthest ahead tells it best."""

    def __init__(self) -> None:
        self.last: float | None = None
        self._ahead: float | None = None

    def heard(self, date: float) -> None:
        """An answer of `date` (unix seconds) has come."""
        self.last = date
        ahead = date - _running()
        if self._ahead is None or not 0 <= self._ahead - ahead <= _ROUGH:  # further back: the server's clock was set
            self._ahead = ahead

    def estimate(self) -> float | None:
        """The server's time by now; None before the first answer."""
        return None if self._ahead is None else self._ahead + _running()


def _running() -> float:
    """Seconds that this machine has been running, those asleep included where the system counts them."""
    return time.clock_gettime(_RUNNING)


class Store(Protocol):
    """One bucket. See the module's docstring for what holds for every method; all raise `StoreError`."""

    stats: Stats

    def describe(self) -> str:
        """For messages: `bucket 'libsql' at http://localhost:9000`."""

    def get(self, key: str, *, limit: int) -> bytes | None:
        """The whole object, or None when there is none.

        Raises:
            CorruptionError: it is longer than `limit` bytes (it is not read then).
        """

    def read(self, key: str, start: int, length: int) -> bytes | None:
        """`length` bytes from offset `start`; fewer only where the object ends. None when there is no such object."""

    def put(self, key: str, data: bytes) -> Receipt:
        """Stores `data`, in one atomic request, over whatever was there."""

    def create(self, key: str, data: bytes) -> Receipt:
        """Stores `data` only if the key is free. `created=False`: it was taken, and nothing was changed.

        Where `conditional()` is False this is a look before the put, and two writers may both pass it at the same moment.
        """

    def upload(self, key: str, chunks: Iterable[bytes]) -> int:
        """Stores the concatenation of `chunks` under a name nobody else writes, in parts; its length in bytes.

        Nothing is visible under `key` before all of it is. An exception out of `chunks` ends the upload and is passed on.
        """

    def list(self, prefix: str, *, after: str = "") -> Iterator[Entry]:
        """The objects whose keys begin with `prefix` and sort after `after`, in order. Pages are fetched as they are needed."""

    def delete(self, keys: Iterable[str]) -> None:
        """Removes objects; a key that is not there is no error."""

    def conditional(self) -> bool:
        """Does the store refuse a `create` of a taken key by itself? Found out by trying, and tried again from time to time."""

    def versioned(self) -> bool | None:
        """Return whether the store keeps what is overwritten or deleted as older versions; None if it does not say."""

    def prepare(self) -> None:
        """Finds the bucket (one request), or makes it where `create_bucket` is set.

        Raises:
            StoreError: no such bucket, no such server, or no permission; the hint says what to do.
        """

    def now(self) -> float:
        """The server's time when it last answered, unix seconds; asks when it has not answered yet. Never ahead of it."""

    def estimate(self) -> float:
        """What the server's time is by now, as far as can be told without asking: for labels, and no proof of anything."""

    def deadline(self, seconds: float) -> AbstractContextManager[None]:
        """Within it, in this thread (and what `parallel` starts from it), all requests together end within `seconds`.

        It takes the place of `retry_timeout`. Of nested deadlines the nearest holds.
        """

    def close(self) -> None:
        """Ends the waits between retries and closes the connections. Requests raise `StoreError` from here on."""


def check_key(key: str) -> str:
    """The key itself, when every store can keep it under this very name.

    Raises:
        ConfigError: it is empty, too long (1024 bytes), not UTF-8, holds a control character, or has an empty, `.` or `..`
            part between its slashes: file systems, and S3 servers that keep objects as files, change or refuse those.
    """
    try:
        size = len(key.encode())
    except UnicodeEncodeError:
        size = 0
    if not 0 < size <= 1024 or not key.isprintable() or not {"", ".", ".."}.isdisjoint(key.split("/")):
        raise ConfigError(
            f"{key!r} is no name for an object",
            hint="A key has 1 to 1024 bytes of printable UTF-8 and no empty, '.' or '..' part between its slashes.",
            key=key,
        )
    return key


def parts(chunks: Iterable[bytes], size: int = PART_BYTES) -> Iterator[bytes]:
    """The same bytes in pieces of exactly `size`, but for the last, which may be shorter. No bytes, no piece."""
    gathered = bytearray()
    for chunk in chunks:
        view = memoryview(chunk)
        while view:
            taken = view[: size - len(gathered)]
            gathered += taken
            view = view[len(taken) :]
            if len(gathered) == size:
                yield _emptied(gathered)
    if gathered:
        yield _emptied(gathered)


def _emptied(gathered: bytearray) -> bytes:
    """What it held: while a piece is worked on, it is held once."""
    data = bytes(gathered)
    gathered.clear()
    return data
