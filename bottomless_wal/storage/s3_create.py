"""Create-only writes to an S3 server, and what stands in for them where the server ignores `If-None-Match`.

    conditional() ──► a probe: two PUTs with `If-None-Match: *` to a key of its own. Does the second get a 412?
    create()      ──► honoured: one PUT with the condition
                      ignored:  HEAD, then the PUT. Two writers who look at the same moment may both put (docs/reference/limits.md)

The answer of a probe does not hold for ever. Ceph honours the condition in a bucket without versioning and ignores it in one with
versioning, and versioning may be switched on while writers run. So the probe is made again after `PROBE_SECONDS`, before a create:
an idle writer sends nothing. And it is made again when an answer carries a version that the answers to the last probe did not carry.
The PUT with that answer may have covered a rival's object, which is then an older version of the same key. If the server ignores the
condition now, the versions of the key decide:

* Versions that are older than the newest delete marker do not count: the key was free again.
* All that are left have the content of this writer's attempts: the oldest one stays, the others are deleted.
* Another content is among them: all versions of this writer are deleted, so the rival's object is the current one again.
* The versions cannot be listed or deleted: a `StoreError` says so, and the key cannot be read through this store before they can.

An attempt whose answer was lost may have covered an object, too. So the key stays *in doubt* after a create that failed. A look
at its version (HEAD) precedes the next read of that key, because the caller tells its own object from a rival's by what it reads.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import uuid
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

from ..core.errors import StoreError, TransientError
from ..core.logs import get_logger
from ..core.threads import fork_aware
from .base import Receipt
from .retry import Retrier
from .s3_client import Answer, Connection

__all__ = ["PROBE_SECONDS", "Creator"]

logger = get_logger(__name__)

PROBE_SECONDS: Final = 600.0
"""After so long a probe is made again, before a create. It costs three requests."""

_TAKEN: Final = frozenset({"PreconditionFailed", "412"})
_MOST_VERSIONS: Final = 1000  # of one key, in one answer
_HINT: Final = (
    "Let these credentials list and delete versions (s3:ListBucketVersions, s3:GetObjectVersion, s3:DeleteObjectVersion), and look at the "
    "versions of this key before the database is opened again."
)


class _Mode(NamedTuple):
    """What a probe found: is the condition honoured, did the answers carry versions, and when it was made (by the clock)."""

    honoured: bool
    versioned: bool
    made: float


class Creator:
    """The create-only writes of one store. `where` names the store in messages; `clock` in seconds. Thread-safe."""

    def __init__(self, connection: Connection, retrier: Retrier, where: str, clock: Callable[[], float]) -> None:
        self._connection = connection
        self._retrier = retrier
        self._where = where
        self._clock = clock
        self._mode: _Mode | None = None
        self._refuses_condition = False
        self._has_warned = False
        self._has_left = False
        # By key: size and SHA-256 of the attempts that may have covered an object unseen.
        self._doubts: dict[str, set[tuple[int, bytes]]] = {}
        self.after_fork()
        fork_aware(self)

    def after_fork(self) -> None:
        self._probing = threading.Lock()
        self._settling = threading.Lock()

    def conditional(self) -> bool:
        """Return whether the server honours `If-None-Match`, by a probe that is not too old.

        Raises:
            StoreError: the probe failed.
        """
        return self._current().honoured

    def create(self, what: str, key: str, data: bytes) -> Receipt:
        """Store `data` under `key` only if the key is free; see `Store.create`. `what` names the request in messages."""
        mode = self._current()
        attempts = 0

        def attempt() -> Answer:
            nonlocal attempts
            attempts += 1
            if not mode.honoured:
                seen = self._ask("head", what, "head_object", key, expected={"404"})
                if not seen.refusal:
                    return seen._replace(refusal="seen")
            return self._connection.put("create", what, key, data, expected=_TAKEN, **self._condition())

        can_cover = mode.honoured and not mode.versioned
        try:
            answer = self._retrier.run(what, attempt, key=key)
        except BaseException:
            if can_cover:
                self._doubt(key, data)
            raise
        if answer.refusal:
            if can_cover and attempts > 1:
                self._doubt(key, data)
            return Receipt(False, answer.date)
        if can_cover and _version(answer):
            self._doubt(key, data)
            with self._settling:
                return Receipt(self._resolve(what, key), answer.date)
        self._doubts.pop(key, None)
        return Receipt(True, answer.date)

    def resolve_in_doubt(self, key: str) -> None:
        """Before `key` is read: if an attempt of this store may have covered a rival's object there, uncover it.

        Raises:
            StoreError: it cannot be told, or not be done.
        """
        if key not in self._doubts:
            return
        with self._settling:
            if key not in self._doubts:
                return
            what = f"HEAD {key!r} in {self._where}"
            seen = self._retrier.run(what, lambda: self._ask("head", what, "head_object", key, expected={"404"}), key=key)
            # Without a version the condition held. The doubt stays: the lost attempt may still be on its way.
            if not seen.refusal and _version(seen):
                self._resolve(what, key)

    # --- the probe -----------------------------------------------------------------------------------------------------

    def _current(self) -> _Mode:
        mode = self._mode
        if mode is None or self._clock() - mode.made >= PROBE_SECONDS:
            mode = self._renew(mode)
        return mode

    def _renew(self, old: _Mode | None) -> _Mode:
        """Make a probe, unless another thread has made one since `old`."""
        with self._probing:
            if self._mode is None or self._mode is old:
                self._mode = self._probe()
            return self._mode

    def _probe(self) -> _Mode:
        made = self._clock()
        key = f".bottomless-probe-{uuid.uuid4().hex}"
        what = f"PUT (probe) {key!r} in {self._where}"
        versions: set[str] = set()

        def put(**condition: str) -> bool:
            """Return whether the write was refused because the key is taken."""
            answer = self._connection.put("probe", what, key, b"", expected=_TAKEN, **condition)
            versions.add(_version(answer))
            return bool(answer.refusal)

        try:
            # A 412 at the first of the two is an earlier attempt's doing, and as good a proof.
            honoured = self._retrier.run(what, lambda: any(put(IfNoneMatch="*") for _ in range(2)))
        except StoreError as error:
            if error.is_transient or error.status not in (400, 501):
                raise
            # Only where the same write without the condition is accepted is it the condition that the server refuses.
            self._retrier.run(what, put)
            honoured, self._refuses_condition = False, True
        versions.discard("")
        self._tidy(key, versions)
        if honoured:
            self._has_warned = False
        elif not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%s does not know create-only writes (If-None-Match on PutObject)%s: this replica looks before each write instead; "
                "two writers on different machines could pass each other unseen within that round trip (docs/reference/limits.md)",
                self._where,
                " in a bucket with versioning" if versions else "",
            )
        return _Mode(honoured, bool(versions), made)

    def _tidy(self, key: str, versions: Iterable[str]) -> None:
        """Delete the object of a probe: its versions, so that nothing is left; or, where that is refused, the key."""
        what = f"DELETE {key!r} in {self._where}"

        try:
            try:
                for version in versions:
                    self._delete(what, key, {"NoSuchVersion"}, VersionId=version)
            except StoreError as error:
                logger.info("the versions of %r stay in the bucket: %s", key, error.message)
                self._delete(what, key, {"NoSuchKey"})
            else:
                if not versions:
                    self._delete(what, key, {"NoSuchKey"})
        except StoreError as error:
            # A store that is open for long leaves one at each probe: one warning is enough.
            tell = logger.info if self._has_left else logger.warning
            tell("the empty object %r stays in the bucket: %s", key, error.message)
            self._has_left = True

    def _condition(self) -> dict[str, str]:
        # Also where it is ignored: it costs nothing, and one day the server may be replaced by one that knows it.
        return {} if self._refuses_condition else {"IfNoneMatch": "*"}

    # --- versions ------------------------------------------------------------------------------------------------------

    def _doubt(self, key: str, data: bytes) -> None:
        self._doubts.setdefault(key, set()).add((len(data), hashlib.sha256(data).digest()))

    def _resolve(self, what: str, key: str) -> bool:
        """Uncover what this store's attempts at `key` have covered. Return whether its one attempt stands there, alone.

        Raises:
            StoreError: the probe failed, or the versions cannot be listed, read or deleted. The doubt stays.
        """
        mode = self._renew(self._mode)  # made after the write in doubt, so it tells what the server did with it
        alone = mode.honoured and mode.versioned
        if not alone:
            try:
                alone = self._uncover(what, key, self._doubts[key])
            except StoreError as error:
                reason = (
                    "versioning was switched on in this bucket, and the server ignores If-None-Match there; it cannot be told "
                    f"whether this write covers a rival's object: {error.reason}"
                )
                raise error.copy(f"{what}: {reason}", kind=StoreError, hint=_HINT, reason=reason, key=key) from error
        del self._doubts[key]
        return alone

    def _uncover(self, what: str, key: str, attempts: set[tuple[int, bytes]]) -> bool:
        versions = self._versions(what, key)
        own = [version for version, size in versions if self._is_own(what, key, version, size, attempts)]
        if not own:
            return False
        rivals = len(versions) - len(own)
        for version in own if rivals else own[:-1]:
            self._delete(what, key, {"NoSuchVersion"}, VersionId=version)
        if rivals:
            logger.warning(
                "%s: versioning was switched on, and the server ignores If-None-Match there: a write of this replica to %r had covered "
                "a rival's object and was taken back",
                self._where,
                key,
            )
        return len(versions) == 1

    def _versions(self, what: str, key: str) -> list[tuple[str, int]]:
        """Return (id, size in bytes) of the versions of `key` since it was last deleted, newest first."""

        def attempt() -> dict[str, Any]:
            fields = self._connection.request(
                "versions", what, "list_object_versions", parameters={"Prefix": key, "MaxKeys": _MOST_VERSIONS}
            ).fields
            if "IsTruncated" not in fields:
                raise TransientError.about(what, "the answer is not a listing of versions", hint="Is the endpoint an S3 server's?")
            return fields

        fields = self._retrier.run(what, attempt, key=key)
        rows = [row for row in fields.get("Versions") or () if row["Key"] == key]
        if fields["IsTruncated"] and len(rows) >= _MOST_VERSIONS:
            raise StoreError.about(what, f"the key has more than {_MOST_VERSIONS} versions", key=key)
        markers = [row["LastModified"] for row in fields.get("DeleteMarkers") or () if row["Key"] == key]
        # Times may be in whole seconds: a version as old as the marker counts, for it may be a rival's.
        since = max(markers, default=None)
        rows = [row for row in rows if since is None or row["LastModified"] >= since]
        return [(str(row["VersionId"]), int(row["Size"])) for row in rows]

    def _is_own(self, what: str, key: str, version: str, size: int, attempts: set[tuple[int, bytes]]) -> bool:
        """Return whether the version has the content of one of `attempts`. (ETags tell nothing where objects are encrypted.)"""
        if all(size != length for length, _ in attempts):
            return False

        def attempt() -> bytes:
            answer = self._ask("get", what, "get_object", key, VersionId=version)
            with contextlib.closing(answer.fields["Body"]) as body:
                data = self._connection.take(body, size, what)
            if len(data) != size:
                raise TransientError.about(what, f"the answer ended after {len(data)} of {size} bytes", expected=size, actual=len(data))
            return data

        data = self._retrier.run(what, attempt, key=key)
        return (size, hashlib.sha256(data).digest()) in attempts

    def _delete(self, what: str, key: str, expected: Iterable[str], **version: str) -> None:
        self._retrier.run(what, lambda: self._ask("delete", what, "delete_object", key, expected=expected, **version), key=key)

    def _ask(self, kind: str, what: str, method: str, key: str, *, expected: Iterable[str] = (), **parameters: str) -> Answer:
        return self._connection.request(kind, what, method, expected=expected, parameters={"Key": key, **parameters})


def _version(answer: Answer) -> str:
    """Return the id of the version that an answer speaks of; empty in a bucket that keeps none."""
    version: str = answer.fields.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("x-amz-version-id", "")
    return "" if version == "null" else version
