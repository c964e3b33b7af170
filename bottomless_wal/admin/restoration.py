"""Going back on purpose: a state of the history put where no database is open, or a local file made the head.

`restore` builds and verifies the new file under a temporary name first. Only then, with the index's lock and SQLite's exclusive lock
held, it takes the place of what was there:

    old -wal and -journal set aside ──► rename ──► directory synced ──► what was set aside is removed ──► the index follows

Killed at any point, it leaves the old file as it was (its WAL beside it under another name at worst) or the new one; never the new
one beside the old WAL, which SQLite would take for the database's own.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import apsw

from ..core.errors import ConfigError, ConflictError, RestoreError
from ..core.failpoints import failpoint
from ..core.logs import get_logger
from ..core.ownership import succeed
from ..formats import keys
from ..formats.page import repr_in_hex
from ..history.compaction import Vanished
from ..history.restore import Progress, Rebuilt, rebuild, rebuild_from_pages
from ..history.scratch import Scratch, as_restore_errors, scratch
from ..history.segment_list import SegmentInfo
from ..history.timeline import ranges, relisted, restorable, txid_at
from ..replication.index import UNKNOWN_SIZE, IndexHeader, LocalIndex, boot_id
from ..replication.log_check import find_gap
from ..replication.replicator import remote_id_of
from ..runtime.registry import registry
from ..runtime.replica import INDEX_SUFFIX
from ..sqlite.database_path import require_free_name
from ..sqlite.replace import exclusive_access, quarantine_sidecar_files
from .stored_database import StoredDatabase, opened

__all__ = ["Restored", "restore"]

logger = get_logger(__name__)

_RANGES: Final = 8  # that a message lists


@repr_in_hex("state_hash")
@dataclass(frozen=True, slots=True)
class Restored:
    """What `restore` did. `head`: the history's last txid (None: there was no log, the page objects alone were used). `pages` of
    `page_size` bytes; `received`: bytes of content downloaded. `committed`: when that state was made, where a moment was asked for.

    `log_error`: why the log does not lead to the head, so that an open cannot move the file forward. It is looked for after the
    restore of an earlier state that the next open would move forward.
    """

    path: str
    name: str
    txid: int
    head: int | None
    state_hash: int
    page_size: int
    pages: int
    received: int
    requests: int
    seconds: float
    committed: datetime | None = None
    log_error: RestoreError | None = None


def restore(
    path: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str] | None = None,
    txid: int | None = None,
    timestamp: datetime | None = None,
    force: bool = False,
    progress: Progress | None = None,
    **options: object,
) -> Restored:
    """Restores the database that is stored for `path` (or under that name, see `listing`) to `output`, or to `path` itself.

    `txid`: an earlier state than the head. `timestamp`: the last one that was made not later (by the server's clock; naive: UTC); only one
    of the two may be given. `force`: replace a file that is there; it stays as it is until the new one is complete and
    verified. `progress` is called with (bytes read, bytes expected). `options` are those of `connect`.

    Raises:
        ConflictError: there is a file and `force` is not set, or somebody has it open. RestoreError: nothing is stored, no such txid, or
            no sound way to it; the message names the object. CorruptionError, StoreError, ConfigError. Nothing was changed then.
    """
    began = time.monotonic()
    if txid is not None and timestamp is not None:
        raise ConfigError("txid and timestamp were both given", hint="Say which state by one of them.")
    with opened(path, options) as target:
        destination = _destination(target, output)
        _check(destination, force=force)
        committed: datetime | None = None
        if timestamp is not None:
            txid, committed = _state_at(target, timestamp)
        edges = target.history.edges()
        head = max(edge.post for edge in edges) if edges else None
        # The lock that keeps others from opening the new file is let go last: closing our descriptor of it would drop SQLite's locks.
        with contextlib.ExitStack() as last, _temporary_index(destination) as index, scratch(destination, index.pages) as into:
            arguments = _arguments(path, output, force=force)
            rebuilt = _rebuild(target, into, edges, head, txid, progress, arguments)
            belongs = target.name == keys.database_name(target.config.database_id, destination)
            # Opening the very database that was restored need not look through it once more.
            own = belongs and rebuilt.txid == head
            # Before the file is replaced: a store that fails here leaves all as it was.
            log_error = find_gap(target.history) if belongs and head is not None and rebuilt.txid < head else None
            old = last.enter_context(_nobody_opens(destination))
            _check(destination, force=force)
            _put_in_place(destination, into, index, old, _index_header(target, rebuilt, edges.listed_ms) if own else None)
        logger.info("%s: restored at txid %d (%d pages)", destination, rebuilt.txid, rebuilt.db_size)
        return Restored(
            path=destination,
            name=target.name,
            txid=rebuilt.txid,
            head=head,
            state_hash=rebuilt.state,
            page_size=rebuilt.page_size,
            pages=rebuilt.db_size,
            received=target.store.stats.bytes_received,
            requests=target.requests,
            seconds=time.monotonic() - began,
            committed=committed,
            log_error=log_error,
        )


def _arguments(path: str | os.PathLike[str], output: str | os.PathLike[str] | None, *, force: bool) -> str:
    """The arguments of the command that restores as is asked for, the state apart."""
    words = [os.fspath(path), *(["-o", os.fspath(output)] if output is not None else []), *(["--force"] if force else [])]
    return shlex.join(words)


def _destination(target: StoredDatabase, output: str | os.PathLike[str] | None) -> str:
    if output is None:
        if target.path is None:
            raise ConfigError(f"{target.name!r} is a name in the bucket, not a path", hint="Say where to restore it to (-o PATH).")
        return target.path
    path = os.path.realpath(output)
    if os.path.isdir(path):
        raise ConfigError(f"{path} is a directory", hint="Name the file to restore to.")
    require_free_name(path)
    return path


def _check(destination: str, *, force: bool) -> None:
    """Refuses to replace a file that is wanted, or in use. An empty file is no database."""
    if registry.get(destination) is not None:
        raise ConflictError(f"{destination} is open in this process", hint="Close every connection to it first.")
    with as_restore_errors(destination):
        LocalIndex(destination + INDEX_SUFFIX, beside=destination).require_free()
    if os.path.exists(destination):
        if os.path.getsize(destination) and not force:
            raise ConflictError(f"{destination} exists", hint="Restore elsewhere (-o PATH), or replace it with --force (force=True).")
        with _exclusive(destination):
            pass


@contextlib.contextmanager
def _exclusive(destination: str) -> Iterator[None]:
    try:
        with exclusive_access(destination):
            yield
    except apsw.CantOpenError as error:
        raise RestoreError(
            f"{destination} cannot be opened for writing, and so not be replaced: {error}", hint="Check its owner and mode."
        ) from error


@contextlib.contextmanager
def _temporary_index(destination: str) -> Iterator[LocalIndex]:
    """A locked index of our own beside `destination`, gone at the end unless it was renamed."""
    index = LocalIndex(f"{destination}{INDEX_SUFFIX}-{secrets.token_hex(8)}", beside=destination)
    try:
        with as_restore_errors(destination), index.locked():
            yield index
    finally:
        index.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(index.path)


def _rebuild(
    target: StoredDatabase,
    into: Scratch,
    edges: Sequence[SegmentInfo],
    head: int | None,
    txid: int | None,
    progress: Progress | None,
    arguments: str,
) -> Rebuilt:
    width = target.config.concurrency
    if head is not None:
        if txid is not None and not 0 < txid <= head:
            raise RestoreError(
                f"{target.name!r} in {target.store.describe()} has no txid {txid}: its history goes from 1 to {head}",
                hint="`bottomless-wal ls DB` shows what can be restored.",
            )
        try:
            return rebuild(target.history, into, head if txid is None else txid, edges, width=width, progress=progress, arguments=arguments)
        except RestoreError as error:
            raise (_removed(target, txid) or error) from error
    rebuilt = rebuild_from_pages(target.history, into, width=width, progress=progress)
    if rebuilt is None:
        raise RestoreError(
            f"nothing is stored as {target.name!r} in {target.store.describe()}",
            hint="`bottomless-wal ls` shows what is. Is it the right bucket, and the right database_id?",
        )
    if txid is not None and txid != rebuilt.txid:
        raise RestoreError(
            f"{target.name!r} has no log, only page objects: they hold txid {rebuilt.txid}, not {txid}", hint="Leave the txid away."
        )
    logger.warning("%s has no log: restored from its page objects alone", target.name)
    return rebuilt


def _state_at(target: StoredDatabase, moment: datetime) -> tuple[int, datetime]:
    """The txid of the last state not later than `moment`, and its time."""
    for edges in relisted(target.history):
        try:
            found = txid_at(target.history, edges, moment, width=target.config.concurrency)
        except Vanished as error:
            logger.info("%s: listed once more", error)
            continue
        return found.txid, datetime.fromtimestamp(found.time_ms / 1000, UTC)
    raise AssertionError("relisted() ends with an error")


def _removed(target: StoredDatabase, txid: int | None) -> RestoreError | None:
    """The error for a state that retention has removed: it says what is left. None: it has not; the history is broken."""
    edges = target.history.edges()
    found = restorable(target.history, edges)
    if txid is None or not found or txid in found or found[-1] < txid:
        return None
    runs = [f"{first} to {last}" if first != last else str(first) for first, last in ranges(found)]
    shown = ", ".join(runs if len(runs) <= _RANGES else [*runs[:2], "...", *runs[2 - _RANGES :]])
    return RestoreError(
        f"nothing leads to txid {txid} of {target.name!r}, which is not kept any more, or missing; what can be restored: {shown}",
        hint="`retention` and `keep_snapshots` say what is kept. `bottomless-wal ls DB` shows the states.",
    )


def _index_header(target: StoredDatabase, rebuilt: Rebuilt, proved_ms: int) -> IndexHeader:
    """The index of a file that has just been restored at the head, but for what only the file in its place can tell."""
    header = IndexHeader(
        remote_id_of(target.config, target.name),
        secrets.token_bytes(16),
        boot_id(),
        page_size=rebuilt.page_size,
        txid=rebuilt.txid,
        state=rebuilt.state,
        db_size=rebuilt.db_size,
        view_txid=min(rebuilt.view_txid, rebuilt.txid),
        view_size=UNKNOWN_SIZE,
        proved_ms=proved_ms,
        clean=True,
    )
    return header.pages_postponed(header.txid) if target.config.pages == "commit" else header


@contextlib.contextmanager
def _nobody_opens(destination: str) -> Iterator[LocalIndex]:
    """Holds the lock of the index beside `destination`, which every boot takes first."""
    index = LocalIndex(destination + INDEX_SUFFIX, beside=destination)
    existed = os.path.exists(index.path)
    try:
        with index.locked():
            try:
                yield index
            except BaseException:
                if not existed:
                    os.unlink(index.path)
                raise
    finally:
        index.close()


def _put_in_place(destination: str, into: Scratch, index: LocalIndex, old: LocalIndex, header: IndexHeader | None) -> None:
    """`header` None: whoever opens the file next has to find out by itself where it stands."""
    with _exclusive(destination):
        succeed(into.fd, destination)
        with _unclaimed(old), _companions_gone(destination):
            failpoint("before rename")
            os.rename(into.path, destination)
    failpoint("after rename")
    if header is None:
        os.unlink(old.path)
        return
    index.mark_restored(header, destination, int.from_bytes(os.pread(into.fd, 4, 24), "big"))
    index.sync()
    failpoint("before index")
    os.rename(index.path, old.path)


@contextlib.contextmanager
def _unclaimed(old: LocalIndex) -> Iterator[None]:
    """From before its WAL is set aside the index no longer says that the old file comes from the head: killed in between, it would pass
    for a descendant of commits that it has lost."""
    claim = old.load()
    if claim is None:
        yield
        return
    old.disown(claim)
    try:
        yield
    except BaseException:
        old.reclaim(claim)
        raise


@contextlib.contextmanager
def _companions_gone(path: str) -> Iterator[None]:
    """While the file at `path` is replaced: its WAL and journal are set aside before, and removed after, or put back on failure."""
    if not os.path.exists(path):
        quarantine_sidecar_files(path)
        yield
        _sync_directory(path)
        return
    moved: list[tuple[str, str]] = []
    try:
        for name in (f"{path}-wal", f"{path}-journal"):
            kept = f"{name}-stale-{secrets.token_hex(4)}"
            with contextlib.suppress(FileNotFoundError):
                os.rename(name, kept)
                moved.append((name, kept))
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{path}-shm")
        yield
    except BaseException:
        for name, kept in moved:
            os.rename(kept, name)
        raise
    _sync_directory(path)
    for _, kept in moved:
        os.unlink(kept)


def _sync_directory(path: str) -> None:
    fd = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
