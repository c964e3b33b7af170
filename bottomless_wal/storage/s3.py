"""A bucket of an S3-compatible server.

What is asked of the server is kept small, so that most will do: the plain requests of 2006, ListObjectsV2, path-style addresses,
signature version 4, no ETag that matters, and `If-None-Match: *` on PutObject if it knows it.

Whether it does is for `s3_create` to find out.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Final, TypeAlias

from ..core.config import Config
from ..core.errors import CorruptionError, StoreError, TransientError
from ..core.logs import get_logger
from ..core.pool import drain, each, ordered
from .base import Entry, Receipt, Stats, check_key, parts
from .retry import Retrier
from .s3_client import Answer, Connection
from .s3_create import Creator

__all__ = ["S3Store"]

logger = get_logger(__name__)

_MOST_PARTS: Final = 10_000  # of one upload, by the rules of S3
_PARTS_IN_FLIGHT: Final = 3
_IDLE_PAGES: Final = 1000  # of a listing, in a row, that bring nothing new: some servers send empty ones over what was deleted
_BATCH: Final = 1000  # keys in one DeleteObjects, by the rules of S3
_ABORT_SECONDS: Final = 5.0  # for tidying up after a failed upload
_SKIP: Final = 128 << 10  # bytes read at once that nobody wants
_UNKNOWN_STATUS: Final = frozenset({400, 403, 404, 405, 501})  # of an answer of a server without versioning, or one that keeps it secret

_Part: TypeAlias = dict[str, object]
_Keys: TypeAlias = list[str]  # in the class, `list` is the method


class S3Store:
    """See `base.Store`. `sleep` and `clock` are those of the retries."""

    def __init__(
        self,
        config: Config,
        *,
        sleep: Callable[[float], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stats = Stats()
        self._config = config
        self._bucket = config.bucket
        self._retrier = Retrier(self.describe(), config.retry_timeout, self.stats, sleep=sleep, clock=clock)
        self._connection = Connection(config, self.stats, self._retrier.remaining)
        self._creator = Creator(self._connection, self._retrier, self.describe(), clock)
        self._bulk_delete = True

    def describe(self) -> str:
        place = "Amazon S3" if self._config.endpoint == "aws" else self._config.endpoint
        return f"bucket '{self._bucket}' at {place}"

    # ---------------------------------------------------------------------------------------------- reading

    def get(self, key: str, *, limit: int) -> bytes | None:
        what = self._what("GET", check_key(key))
        self._creator.resolve_in_doubt(key)

        def attempt() -> bytes | None:
            answer = self._ask("get", what, "get_object", Key=key, expected={"NoSuchKey"})
            if answer.refusal:
                return None
            with contextlib.closing(answer.fields["Body"]) as body:
                length = answer.fields.get("ContentLength")
                if length is not None and length > limit:
                    raise CorruptionError.about(
                        what,
                        f"{length} bytes, where at most {limit} can be",
                        hint="It is none of ours.",
                        key=key,
                        expected=limit,
                        actual=length,
                    )
                data = self._connection.take(body, limit + 1 if length is None else length, what)
            if length is None and len(data) > limit:
                raise CorruptionError.about(
                    what, f"more than the {limit} bytes that can be", hint="It is none of ours.", key=key, expected=limit, actual=len(data)
                )
            if length is not None and len(data) != length:
                raise TransientError.about(
                    what, f"the answer ended after {len(data)} of {length} bytes", key=key, expected=length, actual=len(data)
                )
            return data

        return self._retrier.run(what, attempt, key=key)

    def read(self, key: str, start: int, length: int) -> bytes | None:
        if start < 0 or length < 0:
            raise ValueError("start and length must not be negative")
        what = self._what("GET", check_key(key))
        self._creator.resolve_in_doubt(key)
        # There is no range of no bytes: one is asked for, to learn whether the object is there.
        wanted = f"bytes={start}-{start + max(length, 1) - 1}"

        def attempt() -> bytes | None:
            answer = self._ask("get", what, "get_object", Key=key, Range=wanted, expected={"NoSuchKey", "InvalidRange", "416"})
            if answer.refusal:
                return None if answer.refusal == "NoSuchKey" else b""
            with contextlib.closing(answer.fields["Body"]) as body:
                first, end, size = _extent(answer.fields, what)
                if first > start or end < min(start + length, size):
                    raise TransientError.about(what, f"asked for {wanted}, answered with bytes {first} to {end - 1} of {size}", key=key)
                skip = start - first
                while skip > 0:  # a server that does not know ranges sends the object from its beginning
                    skipped = len(self._connection.take(body, min(skip, _SKIP), what))
                    if not skipped:
                        break
                    skip -= skipped
                count = max(0, min(start + length, end) - start)
                data = self._connection.take(body, count, what) if count else b""
            if len(data) != count:
                raise TransientError.about(
                    what, f"the answer ended after {len(data)} of {count} bytes", key=key, expected=count, actual=len(data)
                )
            return data

        return self._retrier.run(what, attempt, key=key)

    def list(self, prefix: str, *, after: str = "") -> Iterator[Entry]:
        last, token, seen, idle = after, "", "", 0
        while True:
            page = self._page(prefix, after, token)
            rows = page.get("Contents") or ()
            idle = 0 if rows and rows[-1]["Key"] > seen else idle + 1
            if idle > _IDLE_PAGES:
                raise StoreError.about(
                    self._what("LIST", prefix), f"{idle} answers without a new key, and the server says there is more", key=seen or None
                )
            for row in rows:
                seen = key = row["Key"]
                if key <= after or not key.startswith(prefix):
                    continue  # a server that does not know StartAfter
                if key <= last and last != after:
                    raise StoreError.about(
                        self._what("LIST", prefix),
                        f"{key!r} came after {last!r}",
                        hint="This server does not list in the order of the keys, which is relied upon: use another.",
                        key=key,
                        other_key=last,
                    )
                last = key
                yield Entry(key, int(row["Size"]), row["LastModified"].timestamp())
            if not page["IsTruncated"]:
                return
            previous, token = token, page.get("NextContinuationToken") or ""
            if token in ("", previous):
                raise StoreError.about(self._what("LIST", prefix), "the server says there is more, but not how to get it")

    def _page(self, prefix: str, after: str, token: str, size: int = 1000) -> dict[str, Any]:
        what = self._what("LIST", prefix)
        where: dict[str, Any] = {"ContinuationToken": token} if token else {"StartAfter": after} if after else {}

        def attempt() -> dict[str, Any]:
            fields = self._ask("list", what, "list_objects_v2", Prefix=prefix, MaxKeys=size, **where).fields
            if "IsTruncated" not in fields:
                # An empty listing is a statement that people's data depends on: it must be one of S3, not any page in XML.
                raise TransientError.about(what, "the answer is no listing", hint="Is the endpoint an S3 server's?")
            return fields

        return self._retrier.run(what, attempt)

    # ---------------------------------------------------------------------------------------------- writing

    def put(self, key: str, data: bytes) -> Receipt:
        what = self._what("PUT", check_key(key))
        return self._retrier.run(what, lambda: Receipt(True, self._connection.put("put", what, key, data).date), key=key)

    def create(self, key: str, data: bytes) -> Receipt:
        return self._creator.create(self._what("PUT (create)", check_key(key)), key, data)

    def upload(self, key: str, chunks: Iterable[bytes]) -> int:
        what = self._what("upload of", check_key(key))
        pieces = parts(chunks)
        beginning = list(itertools.islice(pieces, 2))
        if len(beginning) < 2:
            data = beginning[0] if beginning else b""
            self.put(key, data)
            return len(data)
        upload: dict[str, Any] = {"Key": key, "UploadId": self._retrier.run(what, lambda: self._begin(what, key), key=key)}
        try:
            sent: list[tuple[_Part, int]] = list(
                ordered(
                    lambda numbered: self._part(what, upload, *numbered),
                    enumerate(itertools.chain(drain(beginning), pieces), 1),
                    _PARTS_IN_FLIGHT,
                )
            )
            size = sum(length for _, length in sent)
            self._complete(what, upload, [part for part, _ in sent], size)
        except BaseException:
            self._abort(what, upload)
            raise
        return size

    def _begin(self, what: str, key: str) -> str:
        fields = self._ask("begin", what, "create_multipart_upload", Key=key).fields
        if not fields.get("UploadId"):
            raise TransientError.about(what, "the answer begins no upload", hint="Is the endpoint an S3 server's?")
        return str(fields["UploadId"])

    def _part(self, what: str, upload: dict[str, Any], number: int, data: bytes) -> tuple[_Part, int]:
        if number > _MOST_PARTS:
            raise StoreError.about(
                what, f"more than {_MOST_PARTS} parts of {len(data)} bytes", hint="Make smaller transactions.", key=upload["Key"]
            )

        def attempt() -> _Part:
            fields = self._ask("part", what, "upload_part", PartNumber=number, data=data, **upload).fields
            if not fields.get("ETag"):
                raise TransientError.about(what, f"the answer to part {number} is not one of S3", hint="Is the endpoint an S3 server's?")
            return {"PartNumber": number, "ETag": fields["ETag"]}

        return self._retrier.run(what, attempt, key=upload["Key"]), len(data)

    def _complete(self, what: str, upload: dict[str, Any], done: Iterable[_Part], size: int) -> None:
        """Ends the upload; that the object is there, and whole, is seen, not concluded."""

        def complete() -> None:
            # An upload that is not known any more may have been completed by an attempt whose answer was lost: seen below.
            self._ask(
                "complete",
                what,
                "complete_multipart_upload",
                MultipartUpload={"Parts": list(done)},
                expected={"NoSuchUpload"},
                **upload,
            )

        def check() -> None:
            seen = self._ask("head", what, "head_object", Key=upload["Key"], expected={"404"})
            found = None if seen.refusal else seen.fields.get("ContentLength")
            if found != size:
                raise TransientError.about(
                    what, f"{size} bytes were uploaded, {'nothing' if found is None else found} is there", expected=size, actual=found
                )

        self._retrier.run(what, complete, key=upload["Key"])
        self._retrier.run(what, check, key=upload["Key"])

    def _abort(self, what: str, upload: dict[str, Any]) -> None:
        def attempt() -> None:
            self._ask("abort", what, "abort_multipart_upload", expected={"NoSuchUpload"}, **upload)

        try:
            with self.deadline(_ABORT_SECONDS):
                self._retrier.run(what, attempt)
        except StoreError as error:
            logger.warning("%s: its parts stay in the bucket until a lifecycle rule removes them: %s", what, error.message)

    def delete(self, keys: Iterable[str]) -> None:
        remaining = iter(keys)
        while batch := list(itertools.islice(remaining, _BATCH)):
            if len(batch) > 1 and self._bulk_delete:
                batch = self._delete_many(batch)
            each(self._delete_one, batch, self._config.concurrency)

    def _delete_one(self, key: str) -> None:
        what = self._what("DELETE", check_key(key))
        self._retrier.run(what, lambda: self._ask("delete", what, "delete_object", Key=key, expected={"NoSuchKey"}), key=key)

    def _delete_many(self, batch: _Keys) -> _Keys:
        """Deletes what it can in one request; the keys that have to be deleted one by one."""
        what = self._what(f"DELETE of {len(batch)} objects from", check_key(batch[0]))
        objects = {"Objects": [{"Key": check_key(key)} for key in batch], "Quiet": True}

        def attempt() -> _Keys:
            try:
                answer = self._ask("delete", what, "delete_objects", Delete=objects)
            except StoreError as error:
                # Some servers do not know this request, or want a checksum of another kind with it. Bucket and permissions
                # are looked at by the single deletes, too.
                if error.is_transient or error.status not in (400, 405, 411, 501):
                    raise
                logger.info("%s deletes only single objects: %s", self.describe(), error.message)
                self._bulk_delete = False
                return batch
            failed = {row.get("Key"): row.get("Code") for row in answer.fields.get("Errors") or ()}
            # A single delete says better what is wrong with it, and is retried if that may pass.
            return [key for key in batch if failed.get(key, "NoSuchKey") != "NoSuchKey"]

        return self._retrier.run(what, attempt)

    # ---------------------------------------------------------------------------------------------- the bucket

    def conditional(self) -> bool:
        return self._creator.conditional()

    def versioned(self) -> bool | None:
        what = self._what("versioning of", "")
        try:
            status = self._retrier.run(what, lambda: self._ask("versioning", what, "get_bucket_versioning").fields.get("Status"))
        except StoreError as error:
            if error.is_transient or error.status not in _UNKNOWN_STATUS:
                raise
            logger.info("%s: %s", what, error.message)
            return None
        return status == "Enabled"

    def prepare(self) -> None:
        try:
            self._page("", "", "", size=1)
        except StoreError as error:
            if not self._config.create_bucket or error.code != "NoSuchBucket":
                raise
            self._make_bucket()
            self._page("", "", "", size=1)

    def _make_bucket(self) -> None:
        what = self._what("creation of", "")
        place: dict[str, Any] = {}
        if self._config.endpoint == "aws" and (region := self._connection.region) != "us-east-1":
            place = {"CreateBucketConfiguration": {"LocationConstraint": region}}
        taken = {"BucketAlreadyOwnedByYou", "BucketAlreadyExists"}
        answer = self._retrier.run(what, lambda: self._ask("bucket", what, "create_bucket", expected=taken, **place))
        if not answer.refusal:
            logger.info("%s: created", self.describe())

    def now(self) -> float:
        if self._connection.clock.last is None:
            self._page("", "", "", size=1)
        # (Without a single Date header in its answers there is no better guess than ours.)
        return self._connection.clock.last or time.time()

    def estimate(self) -> float:
        self.now()
        return self._connection.clock.estimate() or time.time()

    def deadline(self, seconds: float) -> AbstractContextManager[None]:
        return self._retrier.deadline(seconds)

    def close(self) -> None:
        self._retrier.close()
        self._connection.close()

    def _ask(
        self, kind: str, what: str, method: str, *, expected: Iterable[str] = (), data: bytes | None = None, **parameters: Any
    ) -> Answer:
        return self._connection.request(kind, what, method, expected=expected, data=data, parameters=parameters)

    def _what(self, verb: str, key: str) -> str:
        return f"{verb} {key!r} in {self.describe()}" if key else f"{verb} {self.describe()}"


def _extent(fields: dict[str, Any], what: str) -> tuple[int, int, int]:
    """First byte, and the one after the last, of what the answer holds, and the object's size.

    Not all servers answer a range with that range, nor with the status for it.
    """
    span = fields.get("ContentRange")
    try:
        if span:
            covered, size = span.removeprefix("bytes").split("/")
            first, last = covered.split("-")
            return int(first), int(last) + 1, int(size)
        length = int(fields["ContentLength"])
    except (KeyError, TypeError, ValueError):
        raise TransientError.about(what, f"it cannot be told which bytes the answer holds ({span!r})") from None
    return 0, length, length
