"""Read and append to the remote log of one database.

A history is one line of states, from txid 0 (the empty database) to the head (the highest txid). Every segment is an edge
`pre -> post` of it. `plan` finds the cheapest chain of edges to a wanted state. Keys contain only txids: whether an edge leads on from
the state before it is known by its hashes, when it is read. The commit edge of the head is never deleted, so a listing from n - 1 on
shows whether n is the head. Only this module appends to the log.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, NamedTuple, ParamSpec, TypeVar

from ..core import pool
from ..core.errors import CorruptionError, RestoreError
from ..core.failpoints import failpoint
from ..core.logs import get_logger
from ..formats import keys, segment
from ..formats.page import Page, repr_in_hex
from ..formats.segment import LISTED_ROWS, Body, Mapper, Segment, SegmentHeader
from ..storage import Store
from . import listing
from .planner import segments_reaching
from .segment_list import SegmentInfo, SegmentList

__all__ = ["FENCE_HORIZON_SECONDS", "EncodedPages", "Head", "RemoteLog", "Stream"]

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

logger = get_logger(__name__)

FENCE_HORIZON_SECONDS: Final = 3600.0
"""So long after a txid was last proved to be the head, a successful put proves nothing: pruning may have freed the key."""

_RANGE_BYTES: Final = 4 << 20
_RECENT_BYTES: Final = 4 << 20
_COMPRESSORS: Final = 3  # threads that pack or unpack blocks
_INLINE_BYTES: Final = 8 << 20  # encoded pages beyond this go into a body


def _twice(read: Callable[P, R]) -> Callable[P, R]:
    """Make `read` try once more after a CorruptionError: the object may have been damaged only on its way here."""

    @functools.wraps(read)
    def again(*arguments: P.args, **named: P.kwargs) -> R:
        try:
            return read(*arguments, **named)
        except CorruptionError as error:
            logger.info("%s: it is read once more", error.message)
            return read(*arguments, **named)

    return again


class EncodedPages(NamedTuple):
    """The encoded pages of an edge: blocks for the segment itself, or a body that is already stored."""

    blocks: Sequence[bytes]
    body: Body | None
    page_count: int


class Appended(NamedTuple):
    """Whether an edge was stored, the server's date (unix seconds), and the segment's size in bytes."""

    created: bool
    date: float
    size: int


class Stream(NamedTuple):
    """An edge that is not held whole: its key, its header, and a function that yields the pages of each block. Call it once."""

    name: str
    header: SegmentHeader
    blocks: Callable[[], Iterator[list[Page]]]


@repr_in_hex("state")
class Head(NamedTuple):
    """The state at the end of a history."""

    txid: int
    state: int
    page_size: int
    db_size: int


class RemoteLog:
    """The log of the database stored as `name`. Thread-safe. Its only state is the store and a cache of what it has just stored."""

    def __init__(self, store: Store, name: str) -> None:
        self.store = store
        self.name = name
        # The last edges stored here, oldest first: compaction does not have to fetch them. An edge never changes.
        self._recent: dict[tuple[int, int], bytes] = {}
        self._recent_bytes = 0
        self._lock = threading.Lock()

    def edges(self, *, since: int = 0, bodies: bool = False) -> SegmentList:
        """Return all edges with pre >= `since`; see `listing.all_edges`."""
        return listing.all_edges(self.store, self.name, since=since, bodies=bodies)

    def snapshots(self) -> list[SegmentInfo]:
        """Return all edges from 0, in the order of their keys. This is one request, as a rule."""
        return listing.snapshots(self.store, self.name)

    def some_edges(self, *, since: int = 0, limit: int) -> tuple[list[SegmentInfo], bool]:
        """Return the edges among the first `limit` objects of the log with pre >= `since`, and whether these are all."""
        return listing.some_edges(self.store, self.name, since=since, limit=limit)

    @_twice
    def segment(self, pre: int, post: int) -> Segment | None:
        """Return the edge `pre -> post`, verified but for its pages; None if it does not exist.

        Raises:
            CorruptionError: the object is not a valid segment, or has other txids than its key.
        """
        key = keys.segment_key(self.name, pre, post)
        data = self.store.get(key, limit=segment.SEGMENT_LIMIT)
        if data is None:
            return None
        found = segment.decode(data, name=key)
        _check_ends(found.header, pre, post, key)
        return found

    def resets(self, edges: Iterable[SegmentInfo], *, width: int) -> list[SegmentInfo]:
        """Return those of `edges` that are resets. This reads all headers, so call it only if no chain is found otherwise."""

        def load(edge: SegmentInfo) -> SegmentInfo | None:
            try:
                found = self.header(edge.pre, edge.post)
            except CorruptionError as error:
                logger.warning("%s", error.message)
                return None
            return edge if found is not None and found.reset else None

        return [edge for edge in pool.ordered(load, list(edges), width) if edge is not None]

    @_twice
    def header(self, pre: int, post: int) -> SegmentHeader | None:
        """Return the header of the edge, without loading its pages; None if the edge does not exist. Raises as `segment`."""
        key = keys.segment_key(self.name, pre, post)
        data = self.store.read(key, 0, 4096)
        if data is None:
            return None
        needed = segment.head_length(data, name=key)
        if needed > len(data):
            rest = self.store.read(key, len(data), needed - len(data))
            if rest is None:
                return None
            data += rest
        found = segment.decode_header(data, name=key)
        _check_ends(found, pre, post, key)
        return found

    def listed(self, edges: Sequence[SegmentInfo], txid: int) -> int | None:
        """Return the state hash of the history at `txid`, from an edge that leads on from there or past it; None if there is none.

        A chain of edges may end with a commit that is not part of the history: one that a writer stored at a txid whose
        segments had been pruned.
        """
        head = max((edge.post for edge in edges), default=0)
        for edge in sorted((e for e in segments_reaching(edges, head) if e.pre <= txid < e.post), key=lambda e: (e.pre != txid, e.post)):
            if edge.pre == 0 and edge.post - txid >= LISTED_ROWS:
                continue
            try:
                header = self.header(edge.pre, edge.post)
            except CorruptionError as error:
                logger.warning("%s", error.message)
                continue
            if header is None:
                continue
            if edge.pre == txid:
                return header.pre_hash
            told = next((commit.post for commit in header.commits if commit.txid == txid), None)
            if told is not None:
                return told
        return None

    def head(self, edges: Sequence[SegmentInfo]) -> Head | None:
        """Return the state with the highest txid among `edges`, read from one of them; None without edges.

        Raises:
            RestoreError: all edges that lead to it vanished.
        """
        if not edges:
            return None
        last = max(edge.post for edge in edges)
        # First the commit itself: it is small, and a writer's next commit follows it.
        for edge in sorted((e for e in edges if e.post == last), key=lambda e: -e.pre):
            found = self.header(edge.pre, edge.post)
            if found is not None:
                return Head(found.post, found.post_hash, found.page_size, found.db_size)
        raise RestoreError(
            f"the newest segment of {self.name!r} (txid {last}) vanished while it was looked at",
            hint="Another program deletes objects of this history. Try again when it is done.",
            txid=last,
        )

    def stream(self, edge: SegmentInfo, *, chunk: int, stored: bool = False) -> Stream | None:
        """Return the edge as a stream; None if it does not exist.

        Args:
            edge: the edge.
            chunk: how many bytes of it are in memory at a time, about.
            stored: read it from the store, even if it is in the cache of what was just stored.
        """
        key = keys.segment_key(self.name, edge.pre, edge.post)
        with self._lock:
            recent = None if stored else self._recent.get(edge[:2])
        first = recent if recent is not None else self.store.read(key, 0, chunk)
        if first is None:
            return None

        def rest() -> Iterator[bytes]:
            start, data = 0, first
            while data:
                yield data
                if len(data) < chunk or recent is not None:
                    return
                start += len(data)
                more = self.store.read(key, start, chunk)
                if more is None:
                    raise CorruptionError.about(
                        key, "vanished while it was read", joint=" ", hint="Another program deletes objects. Try again.", key=key
                    )
                data = more

        header, blocks = segment.read(rest(), name=key)
        _check_ends(header, edge.pre, edge.post, key)
        if header.body is None:
            return Stream(key, header, lambda: blocks)
        return Stream(key, header, lambda: self.body_blocks(header, key, width=1, chunk=chunk))

    def blocks(self, found: Segment, *, width: int = 4) -> Iterator[list[Page]]:
        """Yield the pages of a segment, block by block, from the segment or its body. A body is read in parallel ranges.

        Each page is verified before it is yielded, and the body as a whole before the iterator is exhausted. Callers must not make the
        pages permanent before that.

        Raises:
            CorruptionError: a page or the body as a whole does not match the segment, or the body is missing.
        """
        if found.header.body is None:
            few = found.header.page_count <= segment.pages_per_block(found.header.page_size)
            yield from found.blocks(mapped=map if few else _in_threads)
            return
        yield from self.body_blocks(found.header, found.name, width=width, mapped=_in_threads)

    def body_blocks(
        self, header: SegmentHeader, name: str, *, width: int, chunk: int = _RANGE_BYTES, mapped: Mapper = map
    ) -> Iterator[list[Page]]:
        """Yield the pages of the edge `name`, whose header names a body. Read ranges of `chunk` bytes, `width` at once."""
        body = header.body
        if body is None:
            raise ValueError(f"{name} has no body")
        key = keys.log_prefix(self.name) + body.name
        starts = range(0, body.size, chunk)

        def load(start: int) -> bytes:
            length = min(chunk, body.size - start)
            data = self.store.read(key, start, length)
            if data is None:
                raise CorruptionError(
                    f"{key}, which holds the pages of {name}, is missing",
                    key=key,
                    other_key=name,
                    hint="Objects of this history were deleted. `bottomless-wal verify DB` shows what can still be restored.",
                )
            if len(data) != length:
                raise CorruptionError.about(
                    key,
                    f"is {start + len(data)} bytes long; {name} says {body.size}",
                    joint=" ",
                    key=key,
                    other_key=name,
                    expected=body.size,
                    actual=start + len(data),
                    hint="The object was damaged. `bottomless-wal verify DB` shows what can still be restored.",
                )
            return data

        yield from segment.read_body(header, pool.ordered(load, starts, width), name=key, mapped=mapped)

    def tables(self, found: Segment) -> Iterator[tuple[int, int]]:
        """Yield (page number, page hash) of every page of a segment, from the segment or its body."""
        if found.header.body is None:
            yield from found.tables()
            return
        for block in self.blocks(found):
            for page in block:
                yield page.pgno, page.hash

    def stage(self, pre: int, post: int, pages: Iterable[Page], page_size: int, *, level: int) -> EncodedPages:
        """Encode pages (ascending). Few pages stay in memory; many are uploaded as a body while they are read."""
        count = 0

        def counted() -> Iterator[Page]:
            nonlocal count
            for page in pages:
                count += 1
                yield page

        blocks = _encoded(counted(), page_size, level)
        kept: list[bytes] = []
        size = 0
        for block in blocks:
            kept.append(block)
            size += len(block)
            if size > _INLINE_BYTES:
                body = self.upload_body(pre, post, itertools.chain(pool.drain(kept), blocks))
                return EncodedPages((), body, count)
        return EncodedPages(kept, None, count)

    def upload_body(self, pre: int, post: int, blocks: Iterable[bytes]) -> Body:
        """Store the blocks of a large edge as a body with a unique key. The edge itself names it afterwards."""
        key = keys.body_key(self.name, pre, post, secrets.token_hex(16))
        digest = hashlib.sha256()

        def hashed() -> Iterator[bytes]:
            for block in blocks:
                digest.update(block)
                yield block
                failpoint("within body")

        size = self.store.upload(key, hashed())
        return Body(key.removeprefix(keys.log_prefix(self.name)), size, digest.digest())

    def append(self, header: SegmentHeader, blocks: Sequence[bytes] = ()) -> Appended:
        """Store an edge, create-only. `created` False: the key exists, from an earlier attempt or a second writer."""
        data = segment.encode(header, blocks)
        receipt = self.store.create(keys.segment_key(self.name, header.pre, header.post), data)
        if receipt.created and len(data) < _RECENT_BYTES:
            with self._lock:
                self._recent[header.pre, header.post] = data
                self._recent_bytes += len(data)
                while self._recent_bytes > _RECENT_BYTES:
                    self._recent_bytes -= len(self._recent.pop(next(iter(self._recent))))
        return Appended(receipt.created, receipt.date, len(data))

    def forget(self, pre: int, post: int) -> None:
        """Remove an edge that is about to be deleted from the cache of what was stored here."""
        with self._lock:
            self._recent_bytes -= len(self._recent.pop((pre, post), b""))


def _in_threads(function: Callable[[T], R], items: Iterable[T], /) -> Iterator[R]:
    """Do what `map` does, with several threads: zstd and the hashes release the GIL for most of their time."""
    return pool.ordered(function, items, _COMPRESSORS)


def _encoded(pages: Iterator[Page], page_size: int, level: int) -> Iterator[bytes]:
    """Return the encoded blocks. If there are several, they are compressed while further pages are read."""
    size = segment.pages_per_block(page_size)
    batches = iter(lambda: list(itertools.islice(pages, size)), [])
    beginning = list(itertools.islice(batches, 2))

    def encode(batch: list[Page]) -> bytes:
        return segment.encode_block(batch, page_size, level=level)

    if len(beginning) < 2:
        return map(encode, beginning)
    return _in_threads(encode, itertools.chain(beginning, batches))


def _check_ends(header: SegmentHeader, pre: int, post: int, key: str) -> None:
    if (header.pre, header.post) != (pre, post):
        raise CorruptionError.about(
            key,
            f"holds the edge {header.pre} -> {header.post}",
            joint=" ",
            key=key,
            expected=f"{pre} -> {post}",
            actual=f"{header.pre} -> {header.post}",
            hint="An object was copied to a key that is not its own: remove it from the bucket.",
        )
