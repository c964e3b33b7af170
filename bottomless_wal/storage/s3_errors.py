"""Translate the errors of S3 requests to `TransientError` (the failure may pass) and `StoreError` (it does not).

The error code in the answer's XML decides. Proxies and load balancers answer with pages of their own, which have no code: then the
HTTP status decides. No error from here means that an object is absent: only an answer that says so does (see `S3Store.get`).
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
"""The exceptions that a call of the client raises because of the server, the network or the settings."""

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
# Parts of OpenSSL's messages: the authority is unknown or the certificate has expired; the certificate is for another host; the file of
# authorities is missing, or is not one.
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
    """Return the code in the answer, such as `NoSuchKey`; "" if there is none (answers to HEAD, pages of a proxy)."""
    code = _answer(error, "Error").get("Code", "")
    return "" if not isinstance(code, str) or code.isdigit() else code


def status_of(error: BaseException | None) -> int:
    """Return the HTTP status of the answer; 0 if there was no answer."""
    return int(_answer(error, "ResponseMetadata").get("HTTPStatusCode") or 0)


def headers_of(error: BaseException) -> dict[str, str]:
    """Return the headers of the answer; empty if there was no answer."""
    headers = _answer(error, "ResponseMetadata").get("HTTPHeaders")
    return dict(headers) if headers else {}


def _answer(error: BaseException | None, part: str) -> Any:
    return (error.response.get(part) or {}) if isinstance(error, ClientError) else {}


def has_secret(error: BaseException) -> bool:
    """Return whether the error's text repeats a header, and with it a session token or a signature."""
    return not isinstance(error, ClientError) and any(sign in str(error) for sign in ("header value", "codec can't encode"))


def translated(error: BaseException, what: str, key: str | None = None) -> StoreError:
    """Return the `StoreError` for one of `FAILURES`. Its class decides whether the attempt is repeated.

    Args:
        error: the error of one attempt.
        what: the request, its key and the store, for the message.
        key: the key of the object that the request is about; None: none, or several.
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
