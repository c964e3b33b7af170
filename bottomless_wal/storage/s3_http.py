"""An HTTP session whose answers are bounded, in size and in time; for the direct requests and for boto3's client alike.

botocore reads an answer whole before it looks at it, and a read timeout bounds only the silence between two pieces. A portal or a
broken proxy may send without end, or one byte at a time. So answers are read in pieces here:

    success, read whole     at most ANSWER_BYTES; more is an error, and the connection is closed
    error (status >= 300)   at most ERROR_BYTES; the rest is not read, and the status says what failed
    an object               as much as the caller asks for, which has limits of its own (`Store.get`)
    all of them             within the time that is left to the attempt, and a second more for each SLOWEST_BYTES that came

Headers are bounded in size by `http.client` (100 lines of 64 KiB), and in time by the read timeout of each piece.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from botocore.exceptions import HTTPClientError

__all__ = ["ANSWER_BYTES", "ERROR_BYTES", "SLOWEST_BYTES", "BoundedSession"]

ANSWER_BYTES: Final = 8 << 20
"""A page of a listing has 1,000 keys of 1,024 bytes, 3 characters for each when URL-encoded, and some 600 bytes of XML: 3.7 MB."""

ERROR_BYTES: Final = 64 << 10
"""Errors of S3 have some hundred bytes. Of a proxy's page only the status matters."""

SLOWEST_BYTES: Final = 16 << 10
"""A line that carries less in a second cannot be told from one that is broken."""

_PIECE: Final = 128 << 10  # measured: smaller ones take more processor time, and so do larger ones
_PATIENCE_SECONDS: Final = 60.0  # where the attempt itself has no end


class TooLongError(HTTPClientError):
    """An answer is longer than anything that was asked for."""

    fmt = "the answer has {came} bytes and goes on, where at most {limit} can be"


class TooSlowError(HTTPClientError):
    """An answer comes in, but would not end in time."""

    fmt = "the answer comes too slowly: {came} bytes in {seconds:.1f} s"


class BoundedSession:
    """Wraps `session` (a `URLLib3Session`). `remaining` tells how many seconds the running attempt has left."""

    def __init__(self, session: Any, remaining: Callable[[], float | None], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._session = session
        self._remaining = remaining
        self._clock = clock

    def send(self, request: Any) -> Any:
        """Send a request and return the answer, as `URLLib3Session.send` does.

        Raises:
            TooLongError, TooSlowError: and what the session raises.
        """
        is_object = request.stream_output
        request.stream_output = True  # else the session reads the answer itself
        left = self._remaining()
        response = self._session.send(request)
        body = _Body(response.raw, _PATIENCE_SECONDS if left is None else left, self._clock)
        if response.status_code >= 300:
            response.raw = _Read(body.whole(ERROR_BYTES, cut=True))
        elif is_object:
            response.raw = body
        else:
            response.raw = _Read(body.whole(ANSWER_BYTES))
        return response

    def close(self) -> None:
        """Close the connections that are idle."""
        self._session.close()


class _Read:
    """A body that has been read: what `AWSResponse.content` asks for."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def stream(self) -> Iterator[bytes]:
        yield self._data


class _Body:
    """The body of an answer, `raw` (of urllib3), which comes within `patience` seconds and the time for its bytes."""

    def __init__(self, raw: Any, patience: float, clock: Callable[[], float]) -> None:
        self._raw = raw
        self._patience = patience
        self._clock = clock
        self._began = clock()
        self._came = 0

    def read(self, amount: int | None = None) -> bytes:
        """Return the next `amount` bytes, or all; fewer only where the answer ends."""
        pieces: list[bytes] = []
        left = amount
        while left is None or left > 0:
            piece = self._piece(_PIECE if left is None else min(left, _PIECE))
            if not piece:
                break
            pieces.append(piece)
            left = None if left is None else left - len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def whole(self, limit: int, *, cut: bool = False) -> bytes:
        """Return the body, which has at most `limit` bytes; or, with `cut`, its beginning."""
        data = self.read(limit + 1)
        if len(data) <= limit:
            return data
        self.close()
        if cut:
            return data[:limit]
        raise TooLongError(came=len(data), limit=limit)

    def _piece(self, most: int) -> bytes:
        piece: bytes = self._raw.read1(most) or b""
        self._came += len(piece)
        seconds = self._clock() - self._began
        if piece and seconds > self._patience + self._came / SLOWEST_BYTES:
            self.close()
            raise TooSlowError(came=self._came, seconds=seconds)
        return piece

    def close(self) -> None:
        self._raw.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)
