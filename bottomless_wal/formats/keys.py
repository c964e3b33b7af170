"""Names <-> object keys: every pair here is an inverse pair, and two databases never share a key.

A database's name `D` is made of the base name of its file and, in front of it, the database id where one is set:

    D    = escape(base)  |  escape(id) "~" escape(base)
    escape keeps the bytes A-Z a-z 0-9 . _ - and writes every other one (so '~', '=' and '/' too) as =XX, upper-case hex

    D-<pgno, 12 decimal digits>                              a page object
    D-wal/<pre, 16 hex digits>-<post, 16 hex digits>         a segment: the edge pre -> post
    D-wal/body/<pre>-<post>-<unique>                         the pages of a large segment

Why no two databases meet: in `D-wal/...` the name is what stands before the only "-wal/" that ends the first component (`D`
has no '/'); a page key has no '/', and its name is all but the last 13 characters. So `a.db-wal`, `a.db-000000000001` and `a~b`
are harmless names, and a listing by prefix is filtered by the parsers here, which accept nothing but the canonical key.

Order, which listings rely on: a txid is below 2**63, so a segment's key begins with 0 to 7 after the prefix and sorts by `pre`,
then `post`; the bodies come after all segments.
"""

from __future__ import annotations

import os
import re
from typing import Final

from ..core.errors import ConfigError

__all__ = [
    "MAX_PGNO",
    "MAX_TXID",
    "body_after",
    "body_key",
    "body_prefix",
    "database_name",
    "log_after",
    "log_prefix",
    "page_key",
    "page_prefix",
    "parse_body_key",
    "parse_database_names",
    "parse_page_key",
    "parse_segment_key",
    "segment_key",
    "split_name",
]

MAX_TXID: Final = 2**63 - 1
MAX_PGNO: Final = 0xFFFFFFFE  # SQLite's own limit: at most 10 of the 12 digits are ever used

_COMPONENT_LIMIT: Final = 255  # file systems; S3's limit of 1024 bytes for the whole key is then kept by itself
_LONGEST_SUFFIX: Final = len("-000000000001")

_KEPT: Final = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
_ESCAPED: Final = re.compile(r"(?:[A-Za-z0-9._-]|=[0-9A-F]{2})*")
_TXID: Final = "[0-7][0-9a-f]{15}"
_UNIQUE: Final = re.compile(r"[0-9A-Za-z_-]{1,64}")
_PAGE: Final = re.compile(r"([0-9]{12})")
_SEGMENT: Final = re.compile(f"({_TXID})-({_TXID})")
_BODY: Final = re.compile(f"body/({_TXID})-({_TXID})-({_UNIQUE.pattern})")


def database_name(database_id: str, path: str) -> str:
    """The name `D` under which the database at `path` (resolved already) is stored; `database_id` may be empty.

    Raises:
        ConfigError: the path has no base name, or the keys would be too long for a file system.
    """
    try:
        base, prefix = os.fsencode(os.path.basename(path)), os.fsencode(database_id)
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"the name of {path!r} (database_id {database_id!r}) cannot be written as bytes",
            hint="Give the file, and database_id, a name that the file system could store.",
            path=path,
        ) from error
    if base in (b"", b".", b".."):
        raise ConfigError(f"{path!r} has no file name to store the database under", hint="Open a file, not a directory.", path=path)
    name = f"{_escape(prefix)}~{_escape(base)}" if prefix else _escape(base)
    if len(name) + _LONGEST_SUFFIX > _COMPONENT_LIMIT:
        raise ConfigError(
            f"the name {name!r} is {len(name)} bytes long; {_COMPONENT_LIMIT - _LONGEST_SUFFIX} fit into a key",
            hint="Use a shorter file name or database_id (bytes outside A-Z a-z 0-9 . _ - count three times).",
            path=path,
            expected=_COMPONENT_LIMIT - _LONGEST_SUFFIX,
            actual=len(name),
        )
    return name


def split_name(name: str) -> tuple[str, str]:
    """The inverse of `database_name`: the database id ("" for none) and the base name.

    Raises:
        ValueError: `name` is nothing that `database_name` gives.
    """
    escaped_id, _, escaped_base = name.rpartition("~")
    if not (_ESCAPED.fullmatch(escaped_id) and _ESCAPED.fullmatch(escaped_base)):
        raise ValueError(f"{name!r} is no database name")
    database_id, base = os.fsdecode(_unescape(escaped_id)), os.fsdecode(_unescape(escaped_base))
    try:
        canonical = database_name(database_id, base) if "/" not in base else None
    except ConfigError:
        canonical = None
    if canonical != name:
        raise ValueError(f"{name!r} is no database name")
    return database_id, base


def page_key(name: str, pgno: int) -> str:
    """The key of page `pgno` (1-based). ValueError if SQLite has no such page."""
    if not 1 <= pgno <= MAX_PGNO:
        raise ValueError(f"no page number: {pgno}")
    return f"{name}-{pgno:012d}"


def parse_page_key(name: str, key: str) -> int | None:
    """The page number of `key`; None if it is not the key of a page of exactly this database."""
    match = _PAGE.fullmatch(key, len(name) + 1) if key.startswith(f"{name}-") else None
    pgno = int(match[1]) if match else 0
    return pgno if 1 <= pgno <= MAX_PGNO else None


def page_prefix(name: str) -> str:
    """All page keys of the database begin with this, and no key of its log does. Filter with `parse_page_key`."""
    return f"{name}-00"


def segment_key(name: str, pre: int, post: int) -> str:
    """The key of the edge `pre` -> `post`. ValueError unless 0 <= pre < post < 2**63."""
    return f"{log_prefix(name)}{_edge(pre, post)}"


def parse_segment_key(name: str, key: str) -> tuple[int, int] | None:
    """(pre, post) of `key`; None if it is not the key of a segment of exactly this database (a body's is not)."""
    prefix = log_prefix(name)
    match = _SEGMENT.fullmatch(key, len(prefix)) if key.startswith(prefix) else None
    if match is None:
        return None
    pre, post = int(match[1], 16), int(match[2], 16)
    return (pre, post) if pre < post else None


def log_prefix(name: str) -> str:
    """All keys of the log begin with this; a `segment.Body.name` is what follows it."""
    return f"{name}-wal/"


def log_after(name: str, txid: int) -> str:
    """`after` of a listing of `log_prefix(name)` that is to give the edges with pre >= `txid` (and then the bodies)."""
    if not 0 <= txid <= MAX_TXID:
        raise ValueError(f"no txid: {txid}")
    return f"{log_prefix(name)}{txid:016x}"


def snapshot_prefix(name: str) -> str:
    """The keys of all edges from 0 begin with this, and no others."""
    return f"{log_prefix(name)}{0:016x}-"


def body_prefix(name: str) -> str:
    """All keys of bodies begin with this; they sort behind all segments."""
    return f"{name}-wal/body/"


def body_key(name: str, pre: int, post: int, unique: str) -> str:
    """The key of a body of the edge `pre` -> `post`. `unique`: 1 to 64 of A-Z a-z 0-9 _ -, else ValueError."""
    if not _UNIQUE.fullmatch(unique):
        raise ValueError(f"not fit for a key: {unique!r}")
    return f"{body_prefix(name)}{_edge(pre, post)}-{unique}"


def body_after(name: str, since: int) -> str:
    """A key before all bodies of edges with pre >= `since`, and behind all others: for a listing that begins there."""
    return f"{body_prefix(name)}{since:016x}"


def parse_body_key(name: str, key: str) -> tuple[int, int, str] | None:
    """(pre, post, unique) of `key`; None if it is not the key of a body of exactly this database."""
    prefix = log_prefix(name)
    match = _BODY.fullmatch(key, len(prefix)) if key.startswith(prefix) else None
    if match is None:
        return None
    pre, post = int(match[1], 16), int(match[2], 16)
    return (pre, post, match[3]) if pre < post else None


def parse_database_names(key: str) -> str | None:
    """The name of the database that `key` (a page's, a segment's or a body's) belongs to; None if it is no key of ours."""
    first, slash, _ = key.partition("/")
    name = first.removesuffix("-wal") if slash else first[:-_LONGEST_SUFFIX]
    if parse_page_key(name, key) is None and parse_segment_key(name, key) is None and parse_body_key(name, key) is None:
        return None
    try:
        split_name(name)
    except ValueError:
        return None
    return name


def _edge(pre: int, post: int) -> str:
    if not 0 <= pre < post <= MAX_TXID:
        raise ValueError(f"no edge of a history: {pre} -> {post}")
    return f"{pre:016x}-{post:016x}"


def _escape(raw: bytes) -> str:
    return "".join(chr(byte) if byte in _KEPT else f"={byte:02X}" for byte in raw)


def _unescape(text: str) -> bytes:
    return re.sub(rb"=([0-9A-F]{2})", lambda match: bytes((int(match[1], 16),)), text.encode("ascii"))
