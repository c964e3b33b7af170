"""The requests that commits and restores are made of, sent without boto3's client: its signer and its HTTP session around a request of
our own writing.

What the client does besides (it finds the endpoint anew, serializes by a description of S3, runs some twenty hooks) takes more
processor time than all the rest of a commit, and it is Python's lock that it takes. What stays botocore's: where credentials come
from, the signature (version 4, contents signed), connections, timeouts, proxies, certificates, and the reading of errors. Answers and
exceptions are those of the client, so that nobody needs to know which of the two has sent a request.

    put_object      PUT <bucket>/<key>       If-None-Match, Content-MD5
    get_object      GET <bucket>/<key>       Range; versionId
    head_object     HEAD <bucket>/<key>
    delete_object   DELETE <bucket>/<key>    versionId
    list_objects_v2 GET <bucket>?list-type=2 prefix, max-keys, start-after, continuation-token; keys come URL-encoded
    create_bucket   PUT <bucket>

Addresses are path-style: this is for servers with an endpoint of their own. At Amazon the client knows better: virtual hosts, regions
and their redirects.
"""

from __future__ import annotations

import io
import os
import socket
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import quote, unquote_plus
from xml.etree import ElementTree

import botocore
import botocore.awsrequest
import botocore.config
import botocore.parsers
import botocore.session
import botocore.utils
from botocore.auth import S3SigV4Auth
from botocore.exceptions import ClientError, NoCredentialsError
from botocore.httpsession import URLLib3Session
from botocore.response import StreamingBody
from botocore.utils import get_environ_proxies, is_valid_endpoint_url, is_valid_ipv6_endpoint_url

from ..core.config import Config
from .s3_http import BoundedSession

__all__ = ["DIRECT", "DirectClient"]

DIRECT: Final = {
    "put_object": "PUT",
    "get_object": "GET",
    "head_object": "HEAD",
    "delete_object": "DELETE",
    "list_objects_v2": "GET",
    "create_bucket": "PUT",
}
"""The calls of boto3's client that `DirectClient` knows, and their HTTP methods."""

_HEADERS: Final = {"Range": "Range", "IfNoneMatch": "If-None-Match", "ContentMD5": "Content-MD5"}
_QUERY: Final = {"Prefix": "prefix", "MaxKeys": "max-keys", "StartAfter": "start-after", "ContinuationToken": "continuation-token"}
_SIGNED: Final = botocore.config.Config(s3={"payload_signing_enabled": True})
_AGENT: Final = f"bottomless-wal Botocore/{botocore.__version__}"
_UNRESERVED: Final = "-._~"
_PIECE: Final = 64 << 10
_ROOT: Final = 200  # bytes in which the root of a listing begins
_MOST_DIGITS: Final = 20  # of a length that can be one
_PARSER: Final[Any] = botocore.parsers.RestXMLParser()


class DirectClient:
    """Requests to `config.bucket` at `config.endpoint`. `remaining` tells how many seconds the running attempt has left. Thread-safe.

    Raises:
        ValueError: the endpoint is none.
    """

    def __init__(self, config: Config, remaining: Callable[[], float | None]) -> None:
        if not (is_valid_endpoint_url(config.endpoint) or is_valid_ipv6_endpoint_url(config.endpoint)):
            raise ValueError(f"Invalid endpoint: {config.endpoint}")
        # Its hooks are for the clients that some sources of credentials make; putting them in place takes longer than all the rest here.
        self._session = botocore.session.Session(include_builtin_handlers=not os.environ.get("AWS_ACCESS_KEY_ID"))
        self._region = self._session.get_config_variable("region") or "us-east-1"
        self._base = f"{config.endpoint.rstrip('/')}/{quote(config.bucket, safe=_UNRESERVED)}"
        self._read_timeout = config.read_timeout
        self._remaining = remaining
        self._lock = threading.Lock()
        self._credentials: Any = None
        # As botocore makes its own: first the variable of AWS, then the one that most of Python's HTTP clients know.
        verify: Any = self._session.get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE") or True
        timeouts: Any = (config.connect_timeout, config.read_timeout)
        sockets: list[Any] = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1), (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
        session = URLLib3Session(
            verify=verify,
            proxies=get_environ_proxies(config.endpoint),
            timeout=timeouts,
            # Deletes and restores of another thread must not throw a commit's connection out of the pool.
            max_pool_connections=config.concurrency + 8,
            socket_options=sockets,
        )
        self._http = BoundedSession(session, remaining)

    def call(self, name: str, data: bytes | None, parameters: dict[str, Any]) -> dict[str, Any]:
        """What boto3's client answers to its method `name`, one of `DIRECT`, with `parameters` and the body `data`: of that, the
        fields that this package reads.

        Raises:
            ClientError, BotoCoreError, ResponseParserError: as the client does.
        """
        reading = name == "get_object"
        request = botocore.awsrequest.AWSRequest(
            DIRECT[name],
            self._url(parameters),
            # From a file it goes in pieces, each of which has the timeout to itself.
            data=io.BytesIO(data) if data is not None and len(data) > _PIECE else data or b"",
            headers={"User-Agent": _AGENT} | {header: parameters[field] for field, header in _HEADERS.items() if field in parameters},
            stream_output=reading,
        )
        request.context.update(client_config=_SIGNED, has_streaming_input=False)
        left = self._remaining()
        if left is not None and left < self._read_timeout:
            request.context["read_timeout"] = left
        S3SigV4Auth(self._frozen(), "s3", self._region).add_auth(request)
        response = self._http.send(request.prepare())
        status = response.status_code
        if status >= 300:
            raise _refusal(name, status, response)
        headers = {field.lower(): value for field, value in response.headers.items()}
        answer: dict[str, Any] = {"ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": headers}}
        told = headers.get("content-length", "")
        length: Any = int(told) if told.isdecimal() and len(told) < _MOST_DIGITS else None
        if length is not None:
            answer["ContentLength"] = length
        if reading:
            answer["Body"] = StreamingBody(response.raw, length)
            if "content-range" in headers:
                answer["ContentRange"] = headers["content-range"]
        elif b"<Error" in (response.content[:_ROOT] if name == "list_objects_v2" else response.content):
            raise _refusal(name, 500, response)  # S3 may find out that it failed when it has said 200 already
        elif name == "list_objects_v2":
            answer.update(_listing(response.content))
        return answer

    def close(self) -> None:
        """Closes the connections that are idle."""
        self._http.close()

    def _url(self, parameters: dict[str, Any]) -> str:
        if "Key" in parameters:
            version = parameters.get("VersionId")
            query = "" if version is None else f"?versionId={quote(version, safe=_UNRESERVED)}"
            return f"{self._base}/{quote(parameters['Key'], safe='/' + _UNRESERVED)}{query}"
        if not parameters:
            return self._base
        listing = {"list-type": "2", "encoding-type": "url"} | {_QUERY[field]: str(value) for field, value in parameters.items()}
        return self._base + "?" + "&".join(f"{field}={quote(value, safe=_UNRESERVED)}" for field, value in sorted(listing.items()))

    def _frozen(self) -> Any:
        """The credentials as they are now: some of the sources renew them."""
        if self._credentials is None:
            with self._lock:
                self._credentials = self._session.get_credentials()
        if self._credentials is None:
            raise NoCredentialsError
        return self._credentials.get_frozen_credentials()


def _refusal(name: str, status: int, response: Any) -> ClientError:
    """The error in an answer."""
    answer = {"status_code": status, "headers": response.headers, "body": response.content, "context": {"operation_name": name}}
    return ClientError(_PARSER.parse(answer, None), name)


def _listing(body: bytes) -> dict[str, Any]:
    """The fields of a listing; none, if it is not one.

    Raises:
        ResponseParserError: it is not XML, or holds a number or a time that is none.
    """
    try:
        root = ElementTree.fromstring(body)
        if _name(root) != "ListBucketResult":
            return {}
        fields = {_name(child): child.text or "" for child in root}
        encoded = fields.get("EncodingType") == "url"
        answer: dict[str, Any] = {"Contents": [_row(child, encoded) for child in root if _name(child) == "Contents"]}
    except (ElementTree.ParseError, KeyError, ValueError) as error:
        raise botocore.parsers.ResponseParserError(f"Unable to parse the listing: {error!r}; it begins with {body[:100]!r}") from error
    if "IsTruncated" in fields:
        answer["IsTruncated"] = fields["IsTruncated"] == "true"
    if fields.get("NextContinuationToken"):
        answer["NextContinuationToken"] = fields["NextContinuationToken"]
    return answer


def _row(contents: ElementTree.Element, encoded: bool) -> dict[str, Any]:
    fields = {_name(child): child.text or "" for child in contents}
    return {
        "Key": unquote_plus(fields["Key"]) if encoded else fields["Key"],
        "Size": int(fields["Size"]),
        "LastModified": _time(fields["LastModified"]),
    }


def _time(text: str) -> datetime:
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        time = botocore.utils.parse_timestamp(text)  # it knows more forms, and takes a hundred times as long
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)


def _name(element: ElementTree.Element) -> str:
    """A tag without its namespace, which some servers leave out."""
    return element.tag.rpartition("}")[2]
