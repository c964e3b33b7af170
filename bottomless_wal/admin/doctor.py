"""Check everything that replication needs, step by step, each with a hint if it fails; for `bottomless-wal doctor`.

    endpoint ──► credentials ──► bucket ──► write, read, list, delete ──► create-only writes ──► round trip ──► clock

A check that others depend on is the last one if it fails, because the later ones would fail for the same reason. The objects that are
written have keys that do not belong to any database. They are deleted again.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import statistics
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from ..core.config import Config
from ..core.errors import BottomlessError, StoreError
from ..storage import Store, open_store
from .stored_database import configured

__all__ = ["Check", "CheckState", "diagnose"]

_PATIENCE: Final = 5.0  # seconds of retries for one request
_PUTS: Final = 7  # writes of which the median is taken
_SLOW: Final = 0.25  # seconds for a small write
_CLOCK_WARNING, _CLOCK_REFUSED = 5.0, 900.0  # seconds; servers refuse requests that are 15 minutes off
_CREDENTIAL_CODES: Final = frozenset(
    {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}  # the server's
    | {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError", "ProfileNotFound"}
)


class CheckState(StrEnum):
    """The outcome of a check."""

    OK = "ok"
    WARNING = "warning"
    """It works, with less."""
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of a diagnosis. `detail` says what was seen, `hint` what to do."""

    name: str
    state: CheckState
    detail: str
    hint: str = ""

    @property
    def ok(self) -> bool:
        """Whether it did not fail."""
        return self.state is not CheckState.FAILED


def diagnose(**options: object) -> list[Check]:
    """Try out the store that `connect(**options)` would use.

    Raises:
        ConfigError: an unknown option or a bad value.
    """
    config = configured(options)
    config = config.changed(retry_timeout=min(config.retry_timeout, _PATIENCE))
    with contextlib.closing(open_store(config)) as store:
        return list(_checks(config, store, time.perf_counter, time.time))


def _checks(config: Config, store: Store, clock: Callable[[], float], wall: Callable[[], float]) -> Iterator[Check]:
    reached = _endpoint(config, clock)
    yield reached
    if not reached.ok:
        return
    found = _bucket(config, store)
    yield from found
    if not all(check.ok for check in found):
        return
    key = f".bottomless-doctor-{secrets.token_hex(8)}"
    try:
        written = _objects(store, key)
        yield written
        if not written.ok:
            return
        created = _create_only(store)
        yield created
        yield from _versioning(store, ignored=created.state is CheckState.WARNING)
        yield from _times(store, key, clock, wall)
    finally:
        with contextlib.suppress(BottomlessError):
            store.delete([key])


def _endpoint(config: Config, clock: Callable[[], float]) -> Check:
    parts = urllib.parse.urlsplit(config.endpoint)
    if config.endpoint == "aws":
        return Check("endpoint", CheckState.OK, "Amazon S3, of the region that boto3 is set to")
    if parts.scheme == "file":
        directory = urllib.parse.unquote(parts.path)
        if os.path.isdir(directory) or config.create_bucket:
            return Check("endpoint", CheckState.OK, f"the directory {directory}")
        hint = "Is the disk mounted? If it is, set create_bucket=1 (LIBSQL_BOTTOMLESS_CREATE_BUCKET=1) to have the directory made."
        return Check("endpoint", CheckState.FAILED, f"there is no directory {directory}", hint)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    began = clock()
    try:
        socket.create_connection((host, port), timeout=config.connect_timeout).close()
    except OSError as error:
        if any(name.lower() in ("http_proxy", "https_proxy", "all_proxy") for name in os.environ):
            return Check("endpoint", CheckState.OK, f"{config.endpoint} is not reached directly; a proxy is set")
        return Check(
            "endpoint",
            CheckState.FAILED,
            f"{config.endpoint} cannot be reached: {error}",
            "Is the server running, and the address right (LIBSQL_BOTTOMLESS_ENDPOINT, or --endpoint)?",
        )
    return Check("endpoint", CheckState.OK, f"{config.endpoint} answers after {_ms(clock() - began)}")


def _bucket(config: Config, store: Store) -> list[Check]:
    """Check the credentials and the bucket, with one request."""
    credentials = [] if config.endpoint.startswith("file:") else [Check("credentials", CheckState.OK, "accepted")]
    try:
        store.prepare()
    except StoreError as error:
        if not credentials:
            return [Check("bucket", CheckState.FAILED, error.message, error.hint)]
        failed = _blamed(error)
        what = Check(failed, CheckState.FAILED, error.message, error.hint)
        return [*credentials, what] if failed == "bucket" else [what]
    return [*credentials, Check("bucket", CheckState.OK, store.describe())]


def _blamed(error: StoreError) -> str:
    if error.code == "RequestTimeTooSkewed":
        return "clock"
    if error.code in _CREDENTIAL_CODES or error.status in (401, 403):
        return "credentials"
    return "bucket" if error.code == "NoSuchBucket" or 400 <= (error.status or 0) < 500 else "endpoint"


def _objects(store: Store, key: str) -> Check:
    data = secrets.token_bytes(1000)
    step = "writing"
    try:
        store.put(key, data)
        step = "reading"
        whole, part = store.get(key, limit=2000), store.read(key, 100, 50)
        step = "listing"
        listed = [entry.size for entry in store.list(key)]
        step = "deleting"
        store.delete([key])
        gone = store.get(key, limit=2000) is None
    except BottomlessError as error:
        return Check("objects", CheckState.FAILED, f"{step}: {error.message}", error.hint or "The credentials need the right to do this.")
    wrong = [
        what
        for what, well in (
            ("reading does not give what was written", whole == data),
            ("ranges are not what they should be", part == data[100:150]),
            ("the listing does not show what was just written", listed == [1000]),
            ("what was deleted can still be read", gone),
        )
        if not well
    ]
    if wrong:
        return Check("objects", CheckState.FAILED, "; ".join(wrong), "A store without read-after-write consistency cannot be used.")
    return Check("objects", CheckState.OK, "written, read, listed and deleted")


def _create_only(store: Store) -> Check:
    try:
        if store.conditional():
            return Check("create-only", CheckState.OK, "a second writer is refused (If-None-Match)")
    except BottomlessError as error:
        return Check("create-only", CheckState.FAILED, error.message, error.hint)
    return Check(
        "create-only",
        CheckState.WARNING,
        "this server ignores If-None-Match: each commit looks before it writes, one request more",
        "Make sure that only one machine writes a database, or use a server that knows create-only writes.",
    )


def _versioning(store: Store, *, ignored: bool) -> Iterator[Check]:
    """Check whether the bucket has versioning, which keeps what is deleted. No check if the store does not say so."""
    try:
        versioned = store.versioned()
    except BottomlessError as error:
        yield Check("versioning", CheckState.WARNING, error.message, error.hint)
        return
    if versioned is None:
        return
    if not versioned:
        yield Check("versioning", CheckState.OK, "off")
    elif ignored:
        yield Check(
            "versioning",
            CheckState.WARNING,
            "on, and create-only writes are ignored: some servers (Ceph) honour If-None-Match only while a bucket has no versioning",
            "Use a bucket without versioning: there a second writer is refused.",
        )
    else:
        yield Check(
            "versioning",
            CheckState.WARNING,
            "on: what retention and the page view delete or overwrite stays as noncurrent versions, and frees nothing",
            "Set a lifecycle rule for noncurrent versions and expired delete markers, and none for current objects.",
        )


def _times(store: Store, key: str, clock: Callable[[], float], wall: Callable[[], float]) -> Iterator[Check]:
    times: list[float] = []
    skews: list[float] = []
    try:
        for _ in range(_PUTS):
            before, began = wall(), clock()
            date = store.put(key, b"round trip").date
            times.append(clock() - began)
            # The answer's Date is in whole seconds, and of some moment between question and answer.
            skews.append(min(0.0, date + 1 - before) or max(0.0, date - wall()))
    except BottomlessError as error:
        yield Check("round trip", CheckState.FAILED, error.message, error.hint)
        return
    median = statistics.median(times)
    detail = f"{_ms(median)} for a small write (median of {_PUTS}, {_ms(min(times))} to {_ms(max(times))})"
    if median > _SLOW:
        yield Check(
            "round trip", CheckState.WARNING, detail, "A commit waits for two or more of them: ack=log, or a server nearby, is faster."
        )
    else:
        yield Check("round trip", CheckState.OK, detail)
    skew = min(skews, key=abs)
    if abs(skew) < _CLOCK_WARNING:
        yield Check("clock", CheckState.OK, f"this machine's and the server's agree, to {max(1.0, abs(skew)):.0f} s")
        return
    state = CheckState.FAILED if abs(skew) >= _CLOCK_REFUSED else CheckState.WARNING
    detail = f"this machine's is {abs(skew):.0f} s {'behind' if skew > 0 else 'ahead of'} the server's"
    yield Check("clock", state, detail, "Set this machine's clock (NTP): servers refuse requests that are minutes off.")


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds < 0.1 else f"{seconds * 1000:.0f} ms"
