"""List the databases of a bucket, and compare a local file with its history.

Nothing is written. A local file is compared by its index and its WAL alone: SQLite does not open it, and no lock is taken.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum

from ..core.errors import BottomlessError
from ..formats import keys
from ..history.log import Head
from ..history.planner import newest
from ..history.segment_list import SegmentInfo
from ..replication.index import IndexHeader, LocalIndex
from ..replication.replicator import remote_id_of
from ..runtime.replica import INDEX_SUFFIX
from ..sqlite.wal_reader import WalFile
from ..storage import Entry, open_store
from .stored_database import StoredDatabase, configured, opened, stored_name

__all__ = ["Inspection", "Lineage", "Listed", "inspect", "listing"]


@dataclass(slots=True)
class Listed:
    """A database in a bucket. Sizes in bytes; `last_commit` by the server's clock; `edges` are its segments, by (pre, post).

    `txid` 0: there are only page objects of it, and no log.
    """

    name: str
    database_id: str
    file: str
    txid: int = 0
    log_bytes: int = 0
    page_objects: int = 0
    page_bytes: int = 0
    last_commit: datetime | None = None
    edges: list[SegmentInfo] = field(default_factory=list)

    @property
    def segments(self) -> int:
        """The number of segments in its log."""
        return len(self.edges)


class Lineage(StrEnum):
    """How a local file, as its index knows it, stands to its history."""

    NOTHING = "nothing"
    """There is neither a file nor a history."""
    NO_FILE = "no-file"
    NO_HISTORY = "no-history"
    UNKNOWN = "unknown"
    """There is no index of this history beside the file."""
    AT_HEAD = "at-head"
    """The file is the head, but for commits that may not be stored yet (`Inspection.pending`)."""
    BEYOND = "beyond"
    """Its txid is higher than the head's."""
    BEHIND = "behind"
    """It is an earlier state of the history, but for commits that may not be stored yet (`Inspection.pending`)."""
    DIVERGED = "diverged"


@dataclass(frozen=True, slots=True)
class Inspection:
    """A local file and its history.

    `standing` is how they stand to each other; `relation` says it in words, and what opening the file would do.

    `local` is what its index knows (None: nothing); `pending` whether there are commits that are not in the log (None: only a scan could
    tell); `in_step` is True when the file is known to hold exactly the head.
    """

    path: str
    name: str
    store: str
    size: int | None
    local: IndexHeader | None
    pending: bool | None
    head: Head | None
    in_step: bool
    relation: str
    position_status: Lineage = field(metadata={"json": False})


def listing(database: str | os.PathLike[str] | None = None, **options: object) -> list[Listed]:
    """Return the databases in the bucket, by name; only `database` (a path, or a name in the bucket) if that is given.

    Raises:
        StoreError: the bucket is missing or cannot be reached. ConfigError.
    """
    config = configured(options)
    with closing(open_store(config)) as store:
        if database is None:
            return _gathered(store.list(""))
        name, _ = stored_name(database, config.database_id)
        return _gathered(entry for prefix in (keys.page_prefix(name), keys.log_prefix(name)) for entry in store.list(prefix))


def _gathered(entries: Iterable[Entry]) -> list[Listed]:
    found: dict[str, Listed] = {}
    for entry in entries:
        name = keys.parse_database_names(entry.key)
        if name is None:
            continue
        listed = found.get(name)
        if listed is None:
            listed = found[name] = Listed(name, *keys.split_name(name))
        ends = keys.parse_segment_key(name, entry.key)
        if ends is not None:
            listed.edges.append(SegmentInfo(*ends, entry.size, entry.modified))
            listed.log_bytes += entry.size
        elif keys.parse_body_key(name, entry.key) is not None:
            listed.log_bytes += entry.size
        else:
            listed.page_objects += 1
            listed.page_bytes += entry.size
    for listed in found.values():
        if listed.edges:
            # Of the edges that end at the head, the commit's own is the one that was stored when it was made.
            last = newest(listed.edges)
            listed.txid, listed.last_commit = last.post, datetime.fromtimestamp(last.modified, UTC)
    return sorted(found.values(), key=lambda listed: listed.name)


def inspect(path: str | os.PathLike[str], **options: object) -> Inspection:
    """How the file at `path` stands to its history in the bucket, as far as that can be told without opening it.

    Raises:
        StoreError: the bucket is missing or cannot be reached. ConfigError, CorruptionError.
    """
    with opened(path, options) as target:
        local_path = target.path or os.path.realpath(path)
        edges = target.history.edges()
        head = target.history.head(edges)
        size = os.path.getsize(local_path) if os.path.exists(local_path) else None
        local = _index_of(local_path) if size else None
        foreign = local is not None and local.remote_id != remote_id_of(target.config, target.name)
        pending = None if local is None else _pending(local_path, local)
        in_step, position_status, relation = _relation(target, size, None if foreign else local, pending, head, edges)
        if foreign:
            relation = f"its index belongs to another bucket, endpoint or name; {relation}"
        return Inspection(local_path, target.name, target.store.describe(), size, local, pending, head, in_step, relation, position_status)


def _index_of(path: str) -> IndexHeader | None:
    """Return the index's header, read without its lock: it is written in one piece, and has a checksum."""
    return LocalIndex.peek_header(path + INDEX_SUFFIX)


def _pending(path: str, local: IndexHeader) -> bool | None:
    """Return whether the WAL has commits after the last one that the index has as stored; None: that cannot be told from outside."""
    if local.needs_scan or local.identity is None:
        return None
    position = local.position
    wal = WalFile(path + "-wal")
    try:
        header = wal.header()
        if header is None:
            return False if position is None and local.identifies(path) else None
        if position is None or (position.salt1, position.salt2) != (header.salt1, header.salt2):
            return None
        if wal.position(header, position.frame) != position:
            return None
        return wal.continues(position, header)
    finally:
        wal.close()


def _relation(
    target: StoredDatabase,
    size: int | None,
    local: IndexHeader | None,
    pending: bool | None,
    head: Head | None,
    edges: Sequence[SegmentInfo],
) -> tuple[bool, Lineage, str]:
    """Return whether the file is known to hold exactly the head, its standing, and that in words."""
    if not size:
        if head is None:
            return False, Lineage.NOTHING, "there is neither a local file nor a history: opening it starts one"
        return False, Lineage.NO_FILE, f"there is no local file: opening it restores txid {head.txid}"
    if head is None:
        return False, Lineage.NO_HISTORY, "the bucket has no history of it: opening it uploads the whole database"
    if local is None:
        words = "nothing is known about the local file: opening it compares it with the history, page by page"
        return False, Lineage.DIVERGED, words
    more = {True: ", and has commits that are not stored yet", False: "", None: ", and may have changed since"}[pending]
    if (local.txid, local.state) == (head.txid, head.state):
        if pending is False:
            return True, Lineage.AT_HEAD, "the local file is at the head"
        words = f"the local file was at the head{more}: opening stores the difference if its WAL proves it, else is a conflict"
        return False, Lineage.AT_HEAD, words
    if local.txid > head.txid:
        words = f"the local file was at txid {local.txid}, beyond the head: objects were deleted, or this is another bucket"
        return False, Lineage.BEYOND, words
    if _is_past(target, local, edges):
        ahead = f"the history has gone on by {head.txid - local.txid} since the local file was at txid {local.txid}"
        return False, Lineage.BEHIND, ahead + (": opening it fast-forwards" if pending is False else more)
    words = f"the local file (txid {local.txid}, state {local.state:016x}) is no state of the history: they diverged"
    return False, Lineage.DIVERGED, words


def _is_past(target: StoredDatabase, local: IndexHeader, edges: Sequence[SegmentInfo]) -> bool:
    """Return whether the history has the state of the index at txid `local.txid`."""
    if local.txid == 0:
        return True
    for edge in edges:
        if not edge.pre <= local.txid <= edge.post:
            continue
        try:
            header = target.history.header(edge.pre, edge.post)
        except BottomlessError:
            continue  # another edge may list that txid
        if header is None:
            continue
        if header.pre == local.txid:
            return header.pre_hash == local.state
        for commit in header.commits:
            if commit.txid == local.txid:
                return commit.post == local.state
    return False
