"""What a failed S3 request means: it may pass (`TransientError`), or not (`StoreError`), and what to do about it.

The code in the answer's XML decides, where there is one; otherwise the HTTP status does: proxies and load balancers answer with
pages of their own. Nothing here ever means "absent": that takes an answer which says so (see `S3Store.get`).
"""

from __future__ import annotations

from typing import Any, Final

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    SSLError,
)
from botocore.exceptions import (
    ConnectionError as BotoConnectionError,
)
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from ..core.errors import Details, StoreError, TransientError

__all__ = ["FAILURES", "code_of", "has_secret", "headers_of", "status_of", "translated"]

FAILURES: Final = (BotoCoreError, ClientError, ResponseParserError, HTTPError, OSError)
"""Whatever a call of the client may raise because of the server, the line or the settings."""

_TRANSIENT: Final = frozenset(
    {
        "BadDigest",  # the bytes were changed on their way
        "BandwidthLimitExceeded",
        "Busy",
        "ConditionalRequestConflict",
        "IncompleteBody",
        "InternalError",
        "InternalFailure",
        "OperationAborted",
        "PriorRequestNotComplete",
        "ProvisionedThroughputExceededException",
        "RequestLimitExceeded",
        "RequestThrottled",
        "RequestThrottledException",
        "RequestTimeout",
        "RequestTimeoutException",
        "ServerBusy",
        "ServiceUnavailable",
        "SlowDown",
        "SlowDownRead",
        "SlowDownWrite",
        "Throttling",
        "ThrottlingException",
        "ThrottledException",
        "TooManyRequests",
        "TooManyRequestsException",
        "TransactionInProgressException",
        "XAmzContentSHA256Mismatch",
    }
)
_TRANSIENT_STATUS: Final = frozenset({408, 409, 425, 429})
_NOT_IMPLEMENTED: Final = 501

_CREDENTIALS: Final = (
    "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or any other source of credentials that boto3 knows "
    "(a profile, a role, a container's or a machine's)."
)
_DENIED: Final = "Check the credentials, and that they may list, read, write and delete in this bucket."
# An unknown authority, or a certificate that is over; one of another name; a file of authorities that is missing, or none.
_CERTIFICATE: Final = ("CERTIFICATE_VERIFY_FAILED", "doesn't match", "No such file", "[X509")
_AUTHORITY: Final = "For a certificate of your own, set AWS_CA_BUNDLE to its authority's file."
_OTHER_NAME: Final = "The certificate is another server's: check the host in the endpoint."
_HINTS: Final = {
    "NoSuchBucket": "Check the bucket's name, or set create_bucket=1 (LIBSQL_BOTTOMLESS_CREATE_BUCKET=1) to have it made.",
    "RequestTimeTooSkewed": "This machine's clock and the server's are too far apart: set this machine's (NTP).",
    "SignatureDoesNotMatch": "AWS_SECRET_ACCESS_KEY does not belong to AWS_ACCESS_KEY_ID, or a proxy changes the requests.",
    "InvalidAccessKeyId": "The server does not know this AWS_ACCESS_KEY_ID.",
    "ExpiredToken": "The session's credentials are over: get new ones.",
    "InvalidBucketName": "Most servers allow 3 to 63 lower-case letters, digits and '-' in the name of a bucket.",
    "MethodNotAllowed": "Is the endpoint an S3 server's?",
    "QuotaExceeded": "The bucket is full: raise its quota, or remove what is not needed.",
}


def code_of(error: BaseException | None) -> str:
    """The code in the answer, such as `NoSuchKey`; empty when there is none (HEAD answers, pages of a proxy)."""
    code = _answer(error, "Error").get("Code", "")
    return "" if not isinstance(code, str) or code.isdigit() else code


def status_of(error: BaseException | None) -> int:
    """The HTTP status of the answer; 0 when there was no answer."""
    return int(_answer(error, "ResponseMetadata").get("HTTPStatusCode") or 0)


def headers_of(error: BaseException) -> dict[str, str]:
    """The headers of the answer."""
    headers = _answer(error, "ResponseMetadata").get("HTTPHeaders")
    return dict(headers) if headers else {}


def _answer(error: BaseException | None, part: str) -> Any:
    return (error.response.get(part) or {}) if isinstance(error, ClientError) else {}


def has_secret(error: BaseException) -> bool:
    """Does the error's text repeat a header, and with it a session token or a signature?"""
    return not isinstance(error, ClientError) and any(sign in str(error) for sign in ("header value", "codec can't encode"))


def translated(error: BaseException, what: str, key: str | None = None) -> StoreError:
    """Our error for one of `FAILURES`. `what` names the request, its key and the store; `key` is the key of the one object it is about.

    Only ever called with the error of one attempt: whether it is repeated is decided by the class that comes out.
    """
    if isinstance(error, ClientError):
        return _refused(error, what, key)
    if has_secret(error):
        cause = "the credentials hold a character that no HTTP header can, such as a line's end"
        return StoreError.about(what, cause, key=key, hint=_CREDENTIALS)
    cause = " ".join(str(error).split()) or type(error).__name__
    code = type(error).__name__
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return StoreError.about(what, cause, key=key, hint=_CREDENTIALS, code=code)
    if isinstance(error, SSLError) and any(sign in cause for sign in _CERTIFICATE):
        return StoreError.about(what, cause, key=key, hint=_OTHER_NAME if "match" in cause else _AUTHORITY, code=code)
    if isinstance(error, CredentialRetrievalError):
        return TransientError.about(what, cause, key=key, hint=_CREDENTIALS, code=code)
    if isinstance(error, ResponseParserError):
        cause = f"the answer is not one of S3: {cause[:200]}"
        return TransientError.about(what, cause, key=key, hint="Is the endpoint an S3 server's?", code=code)
    if isinstance(error, HTTPClientError | BotoConnectionError | IncompleteReadError | HTTPError | OSError):
        return TransientError.about(what, cause, key=key, code=code)
    return StoreError.about(what, cause, key=key, hint="Check endpoint, bucket and boto3's own settings.", code=code)


def _refused(error: ClientError, what: str, key: str | None) -> StoreError:
    code, status = code_of(error), status_of(error)
    message = " ".join(str(_answer(error, "Error").get("Message") or "").split())[:300]
    reason = " ".join(part for part in (str(status or ""), code, message) if part)
    known: Details = {"key": key, "status": status or None, "code": code or None}
    hint = _HINTS.get(code, "")
    if status == 403 or code in ("AccessDenied", "InvalidToken"):
        return StoreError.about(what, reason, hint=hint or _DENIED, **known)
    if code in _TRANSIENT:
        return TransientError.about(what, reason, hint=hint, **known)
    if code in _HINTS:
        return StoreError.about(what, reason, hint=hint, **known)
    if status in _TRANSIENT_STATUS or (status >= 500 and status != _NOT_IMPLEMENTED):
        return TransientError.about(what, reason, **known)
    hint = "Check endpoint and bucket." if status in (301, 302, 307, 308, 400, 404, 405) else ""
    return StoreError.about(what, reason, hint=hint, **known)
