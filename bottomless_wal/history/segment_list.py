"""The edges of a history as a listing shows them, and the cheapest way through them to a state. No I/O.

Edges come in the order of their keys, by (pre, post), as stores list them. So they can be kept in few bytes each, and a way be found in one
pass: whatever leads to a state is listed before whatever leads on from it. Years of commits are millions of edges.
"""

from __future__ import annotations

import operator
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, overload

__all__ = ["SegmentInfo", "SegmentList"]


class SegmentInfo(NamedTuple):
    """A segment as a listing shows it; `size` in bytes, `modified` in unix seconds by the server's clock; `body`: bytes of its body."""

    pre: int
    post: int
    size: int
    modified: float
    body: int = 0


class SegmentList(Sequence[SegmentInfo]):
    """Edges in the order of their keys, in 32 bytes each. Immutable once it is made."""

    def __init__(self, edges: Iterable[SegmentInfo] = ()) -> None:
        self._pre, self._post, self._size, self._modified = array("Q"), array("Q"), array("Q"), array("d")
        self._bodies: dict[int, int] = {}
        self.listed_ms = 0
        """The server's time, ms since 1970, at (or a little before) which they were listed."""
        last = (-1, -1)
        for edge in edges:
            if not last <= edge[:2]:
                raise ValueError(f"{edge} after {last}: edges come in the order of their keys")
            last = edge[:2]
            if edge.body:
                self._bodies[len(self._pre)] = edge.body
            self._pre.append(edge.pre)
            self._post.append(edge.post)
            self._size.append(edge.size)
            self._modified.append(edge.modified)

    def with_bodies(self, sizes: dict[tuple[int, int], int]) -> SegmentList:
        """Itself, told the sizes of the bodies of the edges with these ends."""
        if sizes:
            for at, ends in enumerate(zip(self._pre, self._post, strict=True)):
                if ends in sizes:
                    self._bodies[at] = sizes[ends]
        return self

    def __len__(self) -> int:
        return len(self._pre)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SegmentList) and len(self) == len(other) and all(map(operator.eq, self, other))

    __hash__ = None  # type: ignore[assignment]

    @overload
    def __getitem__(self, at: int) -> SegmentInfo: ...
    @overload
    def __getitem__(self, at: slice) -> list[SegmentInfo]: ...
    def __getitem__(self, at: int | slice) -> SegmentInfo | list[SegmentInfo]:
        if isinstance(at, slice):
            return [self[number] for number in range(*at.indices(len(self)))]
        number = range(len(self))[at]
        return SegmentInfo(self._pre[number], self._post[number], self._size[number], self._modified[number], self._bodies.get(number, 0))

    def __iter__(self) -> Iterator[SegmentInfo]:
        bodies = self._bodies
        for at, row in enumerate(zip(self._pre, self._post, self._size, self._modified, strict=True)):
            yield SegmentInfo(*row, bodies.get(at, 0)) if bodies else SegmentInfo(*row)
