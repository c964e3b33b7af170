"""A state of the history, rebuilt into a file: the cheapest chain of edges, applied in order, verified, and only then put in place.

Invariants:

* Links are exact: an edge is applied only to the state whose hash it names, and must give the state hash it promises. An edge that
  does not is set aside and the way is planned anew without it; overlapping edges are tried only when no exact chain is left.
* The file is complete, verified and synced under a temporary name (mode 0600) before anything sees it. A failure leaves
  the previous file as it was, and names the object that is missing or wrong.
* Memory does not grow with the database: page hashes live in the local index, which is filled on the way.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import re
import secrets
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import apsw

from . import layout, parallel
from .block import check_growth, pages_between
from .crashpoints import reach
from .edges import Edge, Suspects, plan
from .errors import BottomlessError, CorruptionError, RestoreError
from .history import History
from .local_index import LocalIndex
from .logs import get_logger
from .page_object import PAGE_OBJECT_LIMIT, PageTrailer, decode_page_object
from .segment import Header, Page, Segment, lock_page, page_hash

__all__ = ["Progress", "Rebuilt", "Scratch", "integrity_fault", "rebuild", "rebuild_from_pages", "scratch"]

logger = get_logger(__name__)

Progress = Callable[[int, int], None]
"""Called with (bytes read so far, bytes expected); the second number may still grow."""

_ATTEMPTS: Final = 12
_LOOKS: Final = 2  # listings more, before it is believed that nothing leads there
_READ_AHEAD: Final = 48 << 20
_MOST_FAULTS: Final = 3  # that a message tells
_NEWBORN_SECONDS: Final = 10.0  # between a file's creation and its lock


@dataclass(slots=True)
class Rebuilt:
    """The state that a file under construction has: txid, state hash, page size in bytes, size in pages."""

    txid: int = 0
    state: int = 0
    page_size: int = 0
    db_size: int = 0
    view_txid: int = 0
    requests: int = 0


class _Misfit(Exception):
    """An edge does not belong where the plan put it, or vanished meanwhile."""

    def __init__(self, edge: Edge, cause: str, error: BottomlessError | None = None, *, before: Edge | None = None) -> None:
        super().__init__(cause)
        self.edge = edge
        self.before = before  # the one that it does not follow
        self.cause = cause
        self.error = error


@dataclass(slots=True)
class Scratch:
    """A file under construction: `path` beside its destination, and the index that holds its page hashes (locked)."""

    path: str
    fd: int
    index: LocalIndex


@contextlib.contextmanager
def scratch(destination: str, index: LocalIndex) -> Iterator[Scratch]:
    """A temporary file beside `destination`, gone at the end unless it was renamed. What was left by those who were killed goes now.

    Raises:
        RestoreError: no file can be written there: no such directory, no permission, no space.
    """
    path = f"{destination}-bottomless-{secrets.token_hex(8)}"
    with translated(destination):
        _tidy(destination)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)  # says, to whoever tidies up, that somebody is at work on it
        with translated(destination):
            yield Scratch(path, fd, index)
    finally:
        os.close(fd)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _tidy(destination: str) -> None:
    """Removes unfinished files that nobody is at work on: a killed process has let go of its lock."""
    folder, name = os.path.split(destination)
    leftover = re.compile(re.escape(name) + "-bottomless-[0-9a-f]{16}")
    for entry in os.listdir(folder or "."):
        if not leftover.fullmatch(entry):
            continue
        path = os.path.join(folder, entry)
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - os.fstat(fd).st_mtime > _NEWBORN_SECONDS:
                    os.unlink(path)
            finally:
                os.close(fd)


@contextlib.contextmanager
def translated(destination: str) -> Iterator[None]:
    """OSErrors of writing beside `destination` as RestoreErrors."""
    try:
        yield
    except OSError as error:
        hint = "Nothing was changed. Make room, or restore elsewhere (-o)." if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise RestoreError(
            f"cannot restore to {destination}: {error.strerror or error}",
            hint=hint or "Nothing was changed. Check that the directory exists and can be written.",
        ) from error


def rebuild(
    history: History,
    into: Scratch,
    target: int,
    edges: Sequence[Edge],
    *,
    width: int = 8,
    progress: Progress | None = None,
    arguments: str = "DB",
) -> Rebuilt:
    """Fills `into` with the state of txid `target`, synced and verified.

    `arguments`: those of `bottomless-wal restore` that a hint names, the txid apart.

    Raises:
        RestoreError: no chain of sound edges leads to `target`; the message names what is missing or wrong.
    """
    suspects = Suspects()
    first: _Misfit | None = None
    for attempt in range(_ATTEMPTS):
        usable = suspects.without(edges)
        chain = plan(usable, target)
        overlapping = False
        if chain is None and first is None and attempt < _LOOKS:
            # Where somebody prunes, a listing may show what lies before a new snapshot no more, and the snapshot not yet.
            edges = history.edges()
            continue
        if chain is None:
            # A reset makes everything before it superfluous, gaps included; only its header tells that it is one.
            wholes = {(e.pre, e.post) for e in history.resets([e for e in usable if e.post <= target], width=width)}
            chain = plan(usable, target, wholes=wholes) if wholes else None
        if chain is None:
            chain = plan(usable, target, overlapping=True)
            overlapping = chain is not None
        if chain is None:
            raise _no_way(history, target, edges, first, arguments)
        state = Rebuilt()
        try:
            _apply_chain(history, into, chain, state, overlapping=overlapping, width=width, progress=progress)
            _require_listed(history, edges, chain, state)
        except _Misfit as misfit:
            first = first or misfit
            logger.warning("restoring %s: %s", history.name, misfit.cause)
            suspects.blame(misfit.edge, misfit.before, edges, target)
            into.index.forget_pages()
            os.ftruncate(into.fd, 0)
            if attempt + 1 < _ATTEMPTS:
                edges = history.edges()  # retention may have replaced what was listed, each time anew
            continue
        os.fsync(into.fd)
        return state
    raise _no_way(history, target, edges, first, arguments)


def rebuild_from_pages(history: History, into: Scratch, *, width: int = 8, progress: Progress | None = None) -> Rebuilt | None:
    """Fills `into` from the page view alone; None when the bucket holds no page object of this database.

    Raises:
        RestoreError: the objects are no single state (the XOR of their hashes is not what the newest of them tells), or a page is missing.
        CorruptionError: an object is damaged.
    """
    keys = [
        (pgno, entry.key, entry.size)
        for entry in history.store.list(layout.page_prefix(history.name))
        if (pgno := layout.parse_page_key(history.name, entry.key)) is not None
    ]
    if not keys:
        return None
    total = sum(size for _, _, size in keys)

    def load(item: tuple[int, str, int]) -> tuple[int, bytes, PageTrailer | None, int]:
        pgno, key, size = item
        data = history.store.get(key, limit=PAGE_OBJECT_LIMIT)
        if data is None:
            raise RestoreError(f"{key} vanished during the restore", hint="Another program deletes objects. Try again.")
        return pgno, *decode_page_object(data, name=key, pgno=pgno), size

    newest: PageTrailer | None = None
    hashes: dict[int, int] = {}
    page_size, done, bare = 0, 0, 0
    for pgno, page, trailer, size in parallel.ordered(load, keys, width):
        page_size = page_size or len(page)
        if len(page) != page_size:
            raise RestoreError(
                f"{layout.page_key(history.name, pgno)} holds a page of {len(page)} bytes, the pages before it have {page_size}",
                hint="Objects of two databases are mixed under one name. Remove the older ones, then try again.",
            )
        bare += trailer is None
        if trailer is not None and (newest is None or trailer.txid > newest.txid):
            newest = trailer
        hashes[pgno] = page_hash(pgno, page)
        os.pwrite(into.fd, page, (pgno - 1) * page_size)
        reach("within restore")
        done += size
        if progress is not None:
            progress(done, total)
    if newest is not None and not 0 < newest.txid < layout.MAX_TXID:
        raise RestoreError(
            f"a page object of {history.name!r} says that it was written at txid {newest.txid}, which no history has",
            hint="Remove the page objects that are not of this program.",
        )
    db_size = newest.db_size if newest is not None else max(hashes)
    lock = lock_page(page_size)
    missing = pages_between(0, db_size, page_size) - sum(pgno <= db_size and pgno != lock for pgno in hashes)
    if missing:
        first = next(pgno for pgno in itertools.count(1) if pgno not in hashes and pgno != lock)
        raise RestoreError(
            f"{layout.page_key(history.name, first)} is missing: page {first} of {db_size} ({missing} missing in all)",
            hint="The page objects are no complete database, and there is no log to restore from.",
        )
    state = 0
    pgnos = [pgno for pgno in range(1, db_size + 1) if pgno != lock]
    for pgno in pgnos:
        state ^= hashes[pgno]
    if newest is not None and not bare and state != newest.post_hash:
        raise RestoreError(
            f"the page objects of {history.name!r} are no single state: state hash {state:016x}, but the newest of them "
            f"(txid {newest.txid}) says {newest.post_hash:016x}",
            hint="A commit was cut off while they were written, and there is no log to restore from. Restore an older copy of the bucket.",
        )
    os.ftruncate(into.fd, db_size * page_size)
    os.fsync(into.fd)
    if newest is None or bare:
        logger.warning("%s: page objects without trailers: no state hash to verify; running integrity_check", history.name)
        fault = integrity_fault(into.path)
        if fault is not None:
            raise RestoreError(f"the page objects are not a sound database: {fault}", hint="Restore an older copy of the bucket.")
    txid = newest.txid if newest is not None and not bare else 1
    into.index.record(pgnos, [hashes[pgno] for pgno in pgnos], txid)
    return Rebuilt(txid, state, page_size, db_size, view_txid=txid)


def _apply_chain(
    history: History, into: Scratch, chain: list[Edge], state: Rebuilt, *, overlapping: bool, width: int, progress: Progress | None
) -> None:
    ahead = max(1, min(width, _READ_AHEAD // max(edge.size + 1 for edge in chain))) if chain else 1
    done, total = 0, sum(edge.size for edge in chain)

    def load(edge: Edge) -> Segment | BottomlessError | None:
        try:
            return history.segment(edge.pre, edge.post)
        except CorruptionError as error:
            return error

    before: Edge | None = None
    for edge, found in zip(chain, parallel.ordered(load, chain, ahead), strict=True):
        key = layout.segment_key(history.name, edge.pre, edge.post)
        if found is None:
            raise _Misfit(edge, f"{key} is missing")
        if isinstance(found, BottomlessError):
            raise _Misfit(edge, found.message, found)
        header = found.header
        if not header.whole and (header.page_size != state.page_size or (header.pre_hash != state.state and not overlapping)):
            raise _Misfit(
                edge,
                f"{key} does not follow state {state.state:016x} (txid {state.txid}): it says {header.pre_hash:016x} before it",
                before=before,
            )
        before = edge
        state.requests += 1
        if header.body is not None:
            total += header.body.size
        try:
            _apply(into, history.name, header, history.blocks(found, width=min(width, 4)), state)
        except CorruptionError as error:
            raise _Misfit(edge, error.message, error) from error
        reach("within restore")
        if state.state != header.post_hash:
            raise _Misfit(edge, f"{key} leads to state hash {state.state:016x}, not to {header.post_hash:016x} as it says")
        done += edge.size + (header.body.size if header.body is not None else 0)
        if progress is not None:
            progress(done, total)
    _require_every_page(into.index, state, chain)


def _require_listed(history: History, edges: Sequence[Edge], chain: list[Edge], state: Rebuilt) -> None:
    """An earlier state is one of the history if what leads on from it says so."""
    told = history.listed(edges, state.txid) if edges and state.txid < max(edge.post for edge in edges) else None
    if told is not None and told != state.state:
        key = layout.segment_key(history.name, chain[-1].pre, chain[-1].post)
        raise _Misfit(
            chain[-1],
            f"{key} leads to state hash {state.state:016x}, and the history has {told:016x} at txid {state.txid}: it is no part of it",
        )


def _apply(into: Scratch, name: str, header: Header, blocks: Iterator[list[Page]], state: Rebuilt) -> None:
    """One edge onto the file and the index; `state` follows."""
    if header.whole:
        os.ftruncate(into.fd, 0)
        into.index.forget_pages()
        state.state, state.db_size, state.page_size = 0, 0, header.page_size
    grown = 0
    for block in blocks:
        pgnos = [page.pgno for page in block]
        grown += sum(pgno > state.db_size for pgno in pgnos)
        for pgno, old, page in zip(pgnos, into.index.hashes(pgnos), block, strict=True):
            state.state ^= page.hash ^ (old if pgno <= state.db_size else 0)
        into.index.record(pgnos, [page.hash for page in block], header.post)
        start = 0
        for at in range(1, len(block) + 1):
            if at == len(block) or pgnos[at] != pgnos[at - 1] + 1:
                data = b"".join(page.data for page in block[start:at])
                if os.pwrite(into.fd, data, (pgnos[start] - 1) * header.page_size) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                start = at
    check_growth(layout.segment_key(name, header.pre, header.post), state.db_size, header.db_size, grown, header.page_size)
    lock = lock_page(header.page_size)
    for first in range(header.db_size + 1, state.db_size + 1, 65536):
        count = min(65536, state.db_size - first + 1)
        for pgno, old in enumerate(into.index.entries(first, count)[0], first):
            state.state ^= 0 if pgno == lock else old
        # A page that comes back must not find the hash of its former life.
        into.index.record(range(first, first + count), [0] * count, 0)
    os.ftruncate(into.fd, header.db_size * header.page_size)
    state.txid, state.db_size, state.view_txid = header.post, header.db_size, header.view_txid


def _require_every_page(index: LocalIndex, state: Rebuilt, chain: list[Edge]) -> None:
    lock = lock_page(state.page_size) if state.page_size else 0
    for first in range(1, state.db_size + 1, 65536):
        hashes = index.entries(first, min(65536, state.db_size - first + 1))[0]
        for pgno, known in enumerate(hashes, first):
            if not known and pgno != lock:
                raise _Misfit(chain[-1], f"no edge up to txid {state.txid} has page {pgno} of {state.db_size}")


def _no_way(history: History, target: int, edges: Sequence[Edge], first: _Misfit | None, arguments: str) -> RestoreError:
    if first is not None:
        return RestoreError(
            f"cannot restore {history.name!r} to txid {target}: {first.cause}",
            hint=(first.error.hint if first.error is not None else "")
            or "No other way leads there. `bottomless-wal verify DB` shows what can still be restored.",
        )
    reached = 0
    for edge in sorted(edges, key=lambda e: (e.pre, e.post)):
        if edge.pre <= reached < edge.post <= target:
            reached = edge.post
    return RestoreError(
        f"cannot restore {history.name!r} to txid {target}: the log has a gap after txid {reached} "
        f"(missing object {layout.segment_key(history.name, reached, reached + 1)})",
        hint=f"Restore the state before the gap: `bottomless-wal restore --txid {reached} {arguments}`."
        if reached
        else "Check the bucket's name.",
    )


def integrity_fault(path: str) -> str | None:
    """Return what SQLite's `integrity_check` says against the database file at `path`, which nobody has open; None if it is sound."""
    try:
        # immutable: no WAL and no shared memory are made beside it.
        uri = f"file:{urllib.parse.quote(path)}?immutable=1"
        with contextlib.closing(apsw.Connection(uri, flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI)) as connection:
            answers = [str(row[0]) for row in connection.execute(f"PRAGMA integrity_check({_MOST_FAULTS})")]
    except apsw.Error as error:
        return str(error)
    return None if answers == ["ok"] else "; ".join(answers)
