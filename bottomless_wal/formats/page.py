"""Pages of a database, and the hashes that name a page and a state. No I/O.

page hash   first 8 bytes of SHA-256 over the page number (big-endian, 4 bytes) and the page
state hash  XOR of the hashes of all pages but the one at offset 0x40000000 (SQLite's lock byte, never stored);
            0 for the empty database. It guards against accident, not against forgery.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple, TypeVar

from .zstd import Bytes

__all__ = ["Page", "lock_page", "page_hash", "pages_between", "repr_in_hex", "state_hash"]

_PGNO: Final = struct.Struct(">I")

T = TypeVar("T")

_sha256 = hashlib.sha256
_pack_pgno = _PGNO.pack
_from_bytes = int.from_bytes


class Page(NamedTuple):
    """A page's number (1-based), its `page_hash`, its content."""

    pgno: int
    hash: int
    data: bytes


def page_hash(pgno: int, page: Bytes) -> int:
    """The hash of page `pgno` (1-based) with the content `page`: 64 bits."""
    return _from_bytes(_sha256(_pack_pgno(pgno) + page).digest()[:8], "big")


def repr_in_hex(name: str) -> Callable[[type[T]], type[T]]:
    """Return a class decorator for a dataclass or a named tuple: its repr shows the field `name`, a hash, as 16 hex digits."""

    def decorated(cls: type[T]) -> type[T]:
        names = getattr(cls, "_fields", None) or [field.name for field in dataclasses.fields(cls) if field.repr]  # type: ignore[arg-type]

        def shown(self: T) -> str:
            values = ((known, getattr(self, known)) for known in names)
            texts = (f"{known}={value:#018x}" if known == name else f"{known}={value!r}" for known, value in values)
            return f"{cls.__qualname__}({', '.join(texts)})"

        cls.__repr__ = shown  # type: ignore[assignment, method-assign]
        return cls

    return decorated


def state_hash(page_size: int, pages: Iterable[tuple[int, Bytes]]) -> int:
    """The state hash of a database of the given pages (number, content), the lock page passed over; 0 without pages."""
    lock, state = lock_page(page_size), 0
    for pgno, page in pages:
        if pgno != lock:
            state ^= page_hash(pgno, page)
    return state


def lock_page(page_size: int) -> int:
    """The number of the page at offset 0x40000000, which SQLite never uses: it is neither stored nor hashed."""
    return 0x40000000 // page_size + 1


def pages_between(before: int, after: int, page_size: int) -> int:
    """How many pages, the lock page aside, a database of `after` pages has beyond the first `before`."""
    return max(0, after - before - (before < lock_page(page_size) <= after))
