"""One request to an S3 server is one attempt: sent past boto3's client where `s3_direct` knows how, else by one made to our measure; and
answers and errors are told in our terms.

boto3's own retries are off (`retry` does them), its optional checksums, its check of parameters and its `Expect: 100-continue`
too: what a commit waits for is the number and the length of its round trips. Contents are signed (SHA-256), over http and https:
a server that checks signatures refuses what was changed on its way.
"""

from __future__ import annotations

import base64
import concurrent.futures.thread  # noqa: F401  (boto3 wants it, and it cannot be imported any more when the interpreter ends)
import hashlib
import threading
import time
from collections.abc import Callable, Iterable
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import botocore.config
import botocore.handlers
import botocore.loaders
import botocore.session
from botocore.exceptions import BotoCoreError, ClientError

from ..core.config import Config
from ..core.errors import ConfigError, StoreError, TransientError
from ..core.logs import defer
from ..core.threads import fork_aware
from .base import ServerClock, Stats
from .s3_direct import DIRECT, DirectClient
from .s3_errors import FAILURES, code_of, has_secret, headers_of, status_of, translated
from .s3_http import BoundedSession

if TYPE_CHECKING:
    import boto3

__all__ = ["Answer", "Connection"]

_CHATTY: Final = ("boto3", "botocore", "s3transfer", "urllib3")
"""The packages that log while they send for us."""
_READING: Final = frozenset({"get", "head"})  # kinds of requests


class Answer(NamedTuple):
    """An answer that was expected: its fields, or the code of a refusal that means something to the caller."""

    fields: dict[str, Any]
    refusal: str
    date: float


class Connection:
    """A lazily made client of one bucket. `remaining` tells how many seconds the running attempt has left."""

    def __init__(self, config: Config, stats: Stats, remaining: Callable[[], float | None]) -> None:
        self._config = config
        self._stats = stats
        self._remaining = remaining
        self._has_endpoint = config.endpoint != "aws"
        self.clock = ServerClock()
        self.after_fork()
        fork_aware(self)

    def after_fork(self) -> None:
        """Drops the client, without a word to the server: in a forked child its connections are the parent's."""
        self._lock = threading.Lock()
        self._client: Any = None
        self._direct: DirectClient | None = None

    def request(
        self,
        kind: str,
        what: str,
        method: str,
        *,
        expected: Iterable[str] = (),
        data: bytes | None = None,
        parameters: dict[str, Any] | None = None,
    ) -> Answer:
        """One call of the client's `method`. `expected` names the codes, or else statuses, that are no failure to the caller.

        Raises:
            StoreError: or TransientError, see `s3_errors`.
        """
        parameters = dict(parameters or {})
        if data is not None:
            # A bucket with a default retention (Object Lock) refuses what has no checksum. All servers know this one. Some refuse
            # x-amz-checksum-crc32, and others do not look at it.
            parameters["ContentMD5"] = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        direct = self._made("_direct", DirectClient) if method in DIRECT and self._has_endpoint else None
        client = self._connected() if direct is None else None
        self._stats.request(kind, sent=len(data or b""))
        try:
            if direct is not None:
                fields = direct.call(method, data, parameters)
            else:
                more = {} if data is None else {"Body": data}
                fields = getattr(client, method)(Bucket=self._config.bucket, **parameters, **more)
        except FAILURES as error:
            date = self._dated(headers_of(error))
            refusal = next((name for name in (code_of(error), str(status_of(error))) if name in expected), None)
            if refusal is not None and isinstance(error, ClientError):
                return Answer({}, refusal, date)
            told = translated(error, what, parameters.get("Key"))
            # What no header can carry is a part of the credentials, and botocore repeats it.
            raise told from None if has_secret(error) else error
        headers = fields["ResponseMetadata"]["HTTPHeaders"]
        if kind in _READING and headers.get("content-type", "").startswith("text/html") and not _of_s3(headers):
            # A portal's page must pass neither for an object that is damaged nor for one that is there.
            if "Body" in fields:
                fields["Body"].close()
            raise TransientError.about(
                what, "the answer is a page in HTML", hint="Is the endpoint an S3 server's?", key=parameters.get("Key")
            )
        return Answer(fields, "", self._dated(headers))

    def put(self, kind: str, what: str, key: str, data: bytes, *, expected: Iterable[str] = (), **more: str) -> Answer:
        """PutObject, the answer to which must be that of an S3 server."""
        answer = self.request(kind, what, "put_object", expected=expected, data=data, parameters={"Key": key, **more})
        headers = answer.fields.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        if not answer.refusal and not _of_s3(headers):
            # A portal or a misdirected proxy may say 200 to everything. What it says is no proof that anything is stored.
            raise TransientError.about(what, "the answer is not one of S3", hint="Is the endpoint an S3 server's?", key=key)
        return answer

    def take(self, body: Any, count: int, what: str) -> bytes:
        """The next bytes of an answer's body: `count` of them, or fewer where the answer ends."""
        pieces = []
        while count > 0:
            try:
                piece: bytes = body.read(count)
            except FAILURES as error:
                raise translated(error, what) from error
            if not piece:
                break
            self._stats.received(len(piece))
            pieces.append(piece)
            count -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    @property
    def region(self) -> str:
        """The region that requests are signed for."""
        return str(self._connected().meta.region_name)

    def close(self) -> None:
        with self._lock:
            clients = [client for client in (self._client, self._direct) if client is not None]
            self._client = self._direct = None
        for client in clients:
            client.close()

    def _dated(self, headers: dict[str, str]) -> float:
        """The server's time in an answer; without one, as good as can be had, ours."""
        try:
            date = parsedate_to_datetime(headers["date"]).timestamp()
        except (KeyError, ValueError, TypeError):
            return time.time()
        self.clock.heard(date)
        return date

    def _connected(self) -> Any:
        return self._made("_client", _client)

    def _made(self, name: str, make: Callable[[Config, Callable[[], float | None]], Any]) -> Any:
        """The attribute `name`, made when it is first needed.

        Raises:
            ConfigError: the endpoint is none. StoreError: see `s3_errors`.
        """
        made = getattr(self, name)
        if made is not None:
            return made
        with self._lock:
            if getattr(self, name) is None:
                try:
                    setattr(self, name, make(self._config, self._remaining))
                except ValueError as error:
                    hint = "An endpoint is such as http://localhost:9000, or aws."
                    raise ConfigError(
                        f"{self._config.endpoint!r} is no endpoint: {error}", hint=hint, option="endpoint", actual=self._config.endpoint
                    ) from error
                except BotoCoreError as error:
                    raise translated(error, "setting up boto3") from error
                except (ImportError, OSError) as error:
                    raise StoreError(
                        f"cannot load boto3: {error}",
                        hint="Call bottomless_wal.register(endpoint=...) before the process gives up its privileges.",
                    ) from error
                defer(*_CHATTY)
            return getattr(self, name)


def _of_s3(headers: dict[str, str]) -> bool:
    """Are these the headers of an S3 server's answer?"""
    return any(name == "etag" or name.startswith("x-amz") for name in headers)


_loaders: dict[str | None, botocore.loaders.Loader] = {}


def _session() -> boto3.session.Session:
    """A session of its own, with credentials of its own; what it reads of the description of S3, which takes some 80 ms, all share."""
    import boto3  # most processes never need it: see `s3_direct`

    session = botocore.session.get_session()
    path = session.get_config_variable("data_path")
    if path in _loaders:
        session.register_component("data_loader", _loaders[path])
    loader = _loaders[path] = session.get_component("data_loader")
    made = boto3.session.Session(botocore_session=session)
    loader.search_paths[:] = dict.fromkeys(loader.search_paths)  # boto3 adds its own to it each time
    return made


def load(config: Config) -> None:
    """Make a client of each kind, and forget it: what they import and read from files stays loaded.

    Raises:
        ConfigError: the endpoint is none. StoreError: see `s3_errors`.
    """
    # With credentials of its own, the client does not look for real ones, which may take requests to other services.
    credentials = {"aws_access_key_id": "none", "aws_secret_access_key": "none"}
    connection = Connection(config, Stats(), lambda: None)
    try:
        connection._made("_client", lambda config, remaining: _client(config, remaining, **credentials))
        if connection._has_endpoint:
            connection._made("_direct", DirectClient)
    finally:
        connection.close()


def _client(config: Config, remaining: Callable[[], float | None], **more: Any) -> Any:
    """A boto3 client, made to our measure. `more` are further arguments for it."""
    own = config.endpoint != "aws"
    settings: dict[str, Any] = {
        "signature_version": "s3v4",
        "s3": {"payload_signing_enabled": True, **({"addressing_style": "path"} if own else {})},
        "retries": {"total_max_attempts": 1, "mode": "standard"},
        "connect_timeout": config.connect_timeout,
        "read_timeout": config.read_timeout,
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
        "parameter_validation": False,
        # Deletes and restores of another thread must not throw a commit's connection out of the pool.
        "max_pool_connections": config.concurrency + 8,
        "tcp_keepalive": True,
        "user_agent_extra": "bottomless-wal",
        "ignore_configured_endpoint_urls": True,  # where the data goes is for our own option to say
    }
    session = _session()
    client = session.client(
        "s3",
        endpoint_url=config.endpoint if own else None,
        region_name=session.region_name or "us-east-1",
        config=botocore.config.Config(**settings),
        **more,
    )
    # It makes every upload wait for a round trip more, in case the server does not want it. Small ones lose half their speed.
    client.meta.events.unregister("before-call.s3", botocore.handlers.add_expect_header)

    def bounded(context: dict[str, Any], **_: Any) -> None:
        left = remaining()
        if left is not None and left < config.read_timeout:
            context["read_timeout"] = left
        if own and "s3_redirect" in context:
            # Looking for a bucket's region is for Amazon; at a portal that redirects everything it would recurse for ever.
            context["s3_redirect"]["redirected"] = True

    client.meta.events.register("before-call.s3", bounded)
    # No setting and no hook comes between the client and what it reads. (Where botocore names these otherwise, this fails.)
    client._endpoint.http_session = BoundedSession(client._endpoint.http_session, remaining)
    return client
