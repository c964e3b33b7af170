"""The remote log of one database: its edges, the way through them to a state, and the one place that appends to it.

A history is one line of states, txid 0 (the empty database) to the head (the highest txid). Every segment is an edge
`pre -> post` of it; `plan` finds the cheapest chain of edges to a wanted state. Keys tell txids only: whether an edge really leads
from the state before it is known when it is read, by its hashes. The commit edge of the head is never deleted,
so a listing from n - 1 on tells whether n is the head.
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
from ..core.failpoints import reach
from ..core.logs import get_logger
from ..formats import keys, segment
from ..formats.page import Page, repr_in_hex
from ..formats.segment import LISTED_ROWS, Body, Header, Mapper, Segment
from ..storage import Store
from . import listing
from .planner import leading_to
from .segment_list import Edge, Edges

__all__ = ["FENCE_HORIZON_SECONDS", "Head", "History", "Staged", "Stream"]

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

logger = get_logger(__name__)

FENCE_HORIZON_SECONDS: Final = 3600.0
"""After so long since a txid was last proved the head, a successful put alone proves nothing: pruning may have freed the key."""

_RANGE_BYTES: Final = 4 << 20
_RECENT_BYTES: Final = 4 << 20
_COMPRESSORS: Final = 3  # blocks that are packed, or unpacked, at once
_INLINE_BYTES: Final = 8 << 20  # encoded pages beyond this go into a body


def _twice(read: Callable[P, R]) -> Callable[P, R]:
    """What is no sound object is read once more: it may have been damaged on its way, and decisions hang on what it says."""

    @functools.wraps(read)
    def again(*arguments: P.args, **named: P.kwargs) -> R:
        try:
            return read(*arguments, **named)
        except CorruptionError as error:
            logger.info("%s: it is read once more", error.message)
            return read(*arguments, **named)

    return again


class Staged(NamedTuple):
    """The pages of an edge, encoded: as blocks for the segment itself, or stored already in a body."""

    blocks: Sequence[bytes]
    body: Body | None
    page_count: int


class Appended(NamedTuple):
    """Whether an edge was stored, the server's date (unix seconds), and the segment's size in bytes."""

    created: bool
    date: float
    size: int


class Stream(NamedTuple):
    """An edge that is not held whole: its key, its header, and, to be asked for once, the pages of each of its blocks."""

    name: str
    header: Header
    blocks: Callable[[], Iterator[list[Page]]]


@repr_in_hex("state")
class Head(NamedTuple):
    """The state at the end of a history."""

    txid: int
    state: int
    page_size: int
    db_size: int


class History:
    """The log of the database stored as `name`. Thread-safe; keeps no state but the store, and what it has just stored."""

    def __init__(self, store: Store, name: str) -> None:
        self.store = store
        self.name = name
        # What was stored here last, oldest first: compaction need not fetch it. An edge never changes.
        self._recent: dict[tuple[int, int], bytes] = {}
        self._recent_bytes = 0
        self._lock = threading.Lock()

    def edges(self, *, since: int = 0, bodies: bool = False) -> Edges:
        """All edges with pre >= `since`; see `listing.all_edges`."""
        return listing.all_edges(self.store, self.name, since=since, bodies=bodies)

    def snapshots(self) -> list[Edge]:
        """All edges from 0, in the order of their keys: one request, as a rule."""
        return listing.snapshots(self.store, self.name)

    def some_edges(self, *, since: int = 0, limit: int) -> tuple[list[Edge], bool]:
        """Return the edges among the first `limit` objects of the log with pre >= `since`, and whether these are all."""
        return listing.some_edges(self.store, self.name, since=since, limit=limit)

    @_twice
    def segment(self, pre: int, post: int) -> Segment | None:
        """The edge `pre -> post`, verified, its pages aside; None when it is not there.

        Raises:
            CorruptionError: the object is no sound segment, or one of other txids than its key says.
        """
        key = keys.segment_key(self.name, pre, post)
        data = self.store.get(key, limit=segment.SEGMENT_LIMIT)
        if data is None:
            return None
        found = segment.decode(data, name=key)
        _check_ends(found.header, pre, post, key)
        return found

    def resets(self, edges: Iterable[Edge], *, width: int) -> list[Edge]:
        """Those of `edges` that are resets, found by reading all their headers: for when nothing else leads on."""

        def load(edge: Edge) -> Edge | None:
            try:
                found = self.header(edge.pre, edge.post)
            except CorruptionError as error:
                logger.warning("%s", error.message)
                return None
            return edge if found is not None and found.reset else None

        return [edge for edge in pool.ordered(load, list(edges), width) if edge is not None]

    @_twice
    def header(self, pre: int, post: int) -> Header | None:
        """The header of the edge alone, without loading its pages; None when it is not there. Raises as `segment`."""
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

    def listed(self, edges: Sequence[Edge], txid: int) -> int | None:
        """The state hash that the history has at `txid`, as told by an edge that leads on from there, or past it; None if none does.

        A chain of edges may end with a commit that is no part of the history: one that was stored where all had been pruned.
        """
        head = max((edge.post for edge in edges), default=0)
        for edge in sorted((e for e in leading_to(edges, head) if e.pre <= txid < e.post), key=lambda e: (e.pre != txid, e.post)):
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

    def head(self, edges: Sequence[Edge]) -> Head | None:
        """The state with the highest txid among `edges`, read from one of them; None without edges.

        Raises:
            RestoreError: the edges that lead to it vanished, again and again.
        """
        if not edges:
            return None
        last = max(edge.post for edge in edges)
        # The commit itself if it is there: it is small, and what a writer's next commit follows.
        for edge in sorted((e for e in edges if e.post == last), key=lambda e: -e.pre):
            found = self.header(edge.pre, edge.post)
            if found is not None:
                return Head(found.post, found.post_hash, found.page_size, found.db_size)
        raise RestoreError(
            f"the newest segment of {self.name!r} (txid {last}) vanished while it was looked at",
            hint="Another program deletes objects of this history. Try again when it is done.",
            txid=last,
        )

    def stream(self, edge: Edge, *, chunk: int, stored: bool = False) -> Stream | None:
        """As `segment` and `blocks`, holding at most some `chunk` bytes of the edge at a time; None when it is not there.

        `stored`: read it from the store, even if it was stored here a moment ago.
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
        """The pages of a segment, in blocks, wherever they are; each page verified. A body is read in parallel ranges.

        What only the end of a body can tell is verified before the iterator is exhausted: keep nothing for good before.

        Raises:
            CorruptionError: a page, or the body as a whole, is not what the segment says; or the body is missing.
        """
        if found.header.body is None:
            few = found.header.page_count <= segment.pages_per_block(found.header.page_size)
            yield from found.blocks(mapped=map if few else _in_threads)
            return
        yield from self.body_blocks(found.header, found.name, width=width, mapped=_in_threads)

    def body_blocks(
        self, header: Header, name: str, *, width: int, chunk: int = _RANGE_BYTES, mapped: Mapper = map
    ) -> Iterator[list[Page]]:
        """As `blocks`, of the edge `name`, whose header names a body; read in ranges of `chunk` bytes, `width` at once."""
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
        """(page number, page hash) of every page of a segment, wherever they are."""
        if found.header.body is None:
            yield from found.tables()
            return
        for block in self.blocks(found):
            for page in block:
                yield page.pgno, page.hash

    def stage(self, pre: int, post: int, pages: Iterable[Page], page_size: int, *, level: int) -> Staged:
        """Encodes pages (ascending). Few stay in memory; of many, all are uploaded as a body while they are read."""
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
                body = self.upload_body(pre, post, itertools.chain(pool.let_go(kept), blocks))
                return Staged((), body, count)
        return Staged(kept, None, count)

    def upload_body(self, pre: int, post: int, blocks: Iterable[bytes]) -> Body:
        """Stores the blocks of a large edge under a name nobody else uses. The edge itself names it afterwards."""
        key = keys.body_key(self.name, pre, post, secrets.token_hex(16))
        digest = hashlib.sha256()

        def hashed() -> Iterator[bytes]:
            for block in blocks:
                digest.update(block)
                yield block
                reach("within body")

        size = self.store.upload(key, hashed())
        return Body(key.removeprefix(keys.log_prefix(self.name)), size, digest.digest())

    def append(self, header: Header, blocks: Sequence[bytes] = ()) -> Appended:
        """Stores an edge, create-only. `created` False: its key is taken, by an earlier attempt or by a rival."""
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
        """The edge, which was stored here, is about to be withdrawn."""
        with self._lock:
            self._recent_bytes -= len(self._recent.pop((pre, post), b""))


def _in_threads(function: Callable[[T], R], items: Iterable[T], /) -> Iterator[R]:
    """`map`, by several threads: most of what unpacking and packing take is done without Python's lock."""
    return pool.ordered(function, items, _COMPRESSORS)


def _encoded(pages: Iterator[Page], page_size: int, level: int) -> Iterator[bytes]:
    """`segment.encode_blocks`; where there are several, they are compressed while further pages are read."""
    size = segment.pages_per_block(page_size)
    batches = iter(lambda: list(itertools.islice(pages, size)), [])
    beginning = list(itertools.islice(batches, 2))

    def encode(batch: list[Page]) -> bytes:
        return segment.encode_block(batch, page_size, level=level)

    if len(beginning) < 2:
        return map(encode, beginning)
    return _in_threads(encode, itertools.chain(beginning, batches))


def _check_ends(header: Header, pre: int, post: int, key: str) -> None:
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
