"""Keep the local index `<db>-bottomless`: the record of what is in the log.

Like SQLite's `-shm` the index is only a cache. When it is missing, stale, dirty or damaged, one
scan of the database rebuilds it. Its file is also the replicator's lock between threads and
processes. `index_header` describes the bytes.

Invariants:

* Only this module saves a header. Each method that takes a header and is documented to save it
  changes it, saves it and returns it.
* Entries are written before the header that depends on them. A crash between the two leaves entries
  of txid + 1 under a header of txid with in-doubt attempts. The stored segment is then adopted,
  which writes the entries again.
* All reads and writes hold the index's lock, except for the *WAL reset record*. A WAL restart
  writes it while it holds SQLite's write lock, and that lock alone: a restart must never wait for
  an upload.
* The file is accessed by plain pread and pwrite. A mapping of a truncated file would kill the
  process.
* An identity of the main file is settled (see `index_header`) only if this file was touched before
  the main file's timestamps were read. This file must also have a later tick by then.
* Correctness does not depend on this file. It is therefore synced only at a clean close. After a
  power loss the boot id differs.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import time
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from ..core.failpoints import failpoint
from ..core.file_lock import FileLock
from ..core.logs import get_logger
from ..formats.index_header import (
    HEADER_SIZE,
    MAGIC,
    MAX_IN_DOUBT,
    RESET_RECORD_OFFSET,
    RESET_RECORD_SIZE,
    UNKNOWN_SIZE,
    Attempt,
    Backlog,
    Identity,
    IndexHeader,
    IndexState,
    WalResetRecord,
    changed,
)
from ..formats.segment import SegmentHeader
from ..formats.wal import WalPosition
from ..history.page_table import ENTRY_SIZE, IndexCorrupt, PageTable, entry_is_valid

__all__ = [
    "ENTRY_SIZE",
    "HEADER_SIZE",
    "MAX_IN_DOUBT",
    "UNKNOWN_SIZE",
    "Attempt",
    "Backlog",
    "Identity",
    "IndexCorrupt",
    "IndexHeader",
    "IndexState",
    "LocalIndex",
    "WalResetRecord",
    "boot_id",
    "changed",
    "is_index",
]

logger = get_logger(__name__)

_TICK_LOOKS: Final = 2  # the second is sufficient if the kernel keeps fine timestamps for files that were read by stat
_PATIENT_LOOKS: Final = 25
_LOOK_SECONDS: Final = 0.001  # a kernel's tick is 1 to 10 ms
_MAGIC: Final = MAGIC[:-1]  # common to all versions
_LOOK_SIZE: Final = HEADER_SIZE + 64 * ENTRY_SIZE

R = TypeVar("R")


def boot_id() -> bytes:
    """Return 16 bytes that change when the machine restarts.

    On a system without a boot id, every call returns different bytes. No index is then taken as
    proved.
    """
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return bytes.fromhex(file.read().strip().replace("-", ""))
    except (OSError, ValueError):
        return secrets.token_bytes(16)


def is_index(data: bytes) -> bool:
    """Return whether a file that begins with `data` is an index, intact or damaged.

    Otherwise it is a file of another program. An index may be empty, or short and all zeros after a
    power loss. In all other cases one of these is intact: the magic, the header's checksum with the
    magic corrected, the checksum of the WAL reset record, or the check of a page's entry.

    Args:
        data: the first 17 KiB of the file.
    """
    if data[: len(_MAGIC)] == _MAGIC[: len(data)]:
        return True
    if not any(data) and len(data) < _LOOK_SIZE:
        return True  # a longer file may begin with zeros, as other files do: an entry must be valid
    if IndexHeader.decode(MAGIC + data[len(MAGIC) : HEADER_SIZE]) is not None:
        return True
    if WalResetRecord.decode(data[RESET_RECORD_OFFSET : RESET_RECORD_OFFSET + RESET_RECORD_SIZE]) is not None:
        return True
    return entry_is_valid(data[HEADER_SIZE:])


class LocalIndex(FileLock):
    """The file `<db>-bottomless`: lock, header and entries.

    `path` is the index's own path. Every method but `locked` expects the lock to be held.

    Raises:
        OSError: as the system does.
    """

    def __init__(self, path: str, *, beside: str) -> None:
        super().__init__(path, beside=beside)
        self.pages = PageTable(path, lambda: self._fd, offset=HEADER_SIZE)

    def _is_own(self, fd: int) -> bool:
        return is_index(os.pread(fd, _LOOK_SIZE, 0))

    def load(self) -> IndexHeader | None:
        """Return the header with the last WAL reset record applied.

        Returns None if the file is empty or damaged.

        The result is saved. The next record then refers to the position that is on disk, and to no
        other.
        """
        header, record = _read(self._fd)
        if header is not None and record is not None and record.sequence > header.reset_sequence:
            header = self._save(header.apply(record))
        return header

    def last_reset_record(self) -> WalResetRecord | None:
        """Return the record of the last restart of the WAL; None if there was none."""
        return _read(self._fd)[1]

    def _save(self, header: IndexHeader) -> IndexHeader:
        """Save the header in one write.

        A killed process leaves the old header or the new one.
        """
        data = header.encode()
        if os.pwrite(self._fd, data, 0) != len(data):
            raise OSError(f"short write to {self.path}")
        return header

    # --- changes of the header that are left to be saved -----------------------------------------------------------------

    def identify(self, header: IndexHeader, main: str) -> IndexHeader:
        """Return `header`, not saved, with the present identity of the file at `main`."""
        identity, is_settled = _identify(self.path, self._fd, main, _TICK_LOOKS)
        return changed(header, identity=identity, is_settled=is_settled)

    def move(self, header: IndexHeader, position: WalPosition | None) -> tuple[IndexHeader, bool]:
        """Return (`header` at `position`, whether the WAL was restarted meanwhile).

        The header is not saved.

        A WAL reset record shows the restart. It refers to the WAL of the position on disk. Once
        that position is in another WAL, the record can no longer be interpreted, so it is applied
        first.
        """
        record = self.last_reset_record()
        if (
            record is None
            or record.sequence <= header.reset_sequence
            or _salts(position) in (_salts(header.position), _salts(record.after))
        ):
            return changed(header, position=position), False  # no record, or one for the next load, or an older one
        header = header.apply(record)
        return (changed(header, position=position) if record.after is not None else header), True

    def scanned(self, header: IndexHeader, position: WalPosition | None, main: str) -> IndexHeader:
        """Return `header`, not saved, as it is after a scan of `main`.

        The log must have what the scan found, up to `position`.
        """
        header, has_gone_on = self.move(header, position)
        if has_gone_on:
            return header.needing_scan()
        return self.identify(changed(header, needs_scan=False, successor=None), main)

    def adopted(self, header: IndexHeader, position: WalPosition | None) -> IndexHeader:
        """Return `header`, not saved, after an attempt was adopted that led to `position`.

        None: the position is not in the present WAL.
        """
        header, has_gone_on = self.move(header, position)
        if position is None or has_gone_on:
            return header.needing_scan()
        return changed(header, successor=None)  # the position is proof enough; and a power loss must not undo what it covers

    # --- changes of the header that are saved ------------------------------------------------------------------------------

    def mark_open(self, header: IndexHeader) -> IndexHeader:
        """Save that the database is in use; only a clean close clears that."""
        return self._save(changed(header, boot=boot_id(), clean=False))

    def mark_closed(self, header: IndexHeader) -> IndexHeader:
        """Save, durably, that the database was closed cleanly."""
        header = self._save(changed(header, clean=True))
        self.sync()
        return header

    def mark_being_replaced(self, header: IndexHeader, state: int) -> IndexHeader:
        """Save that the head is to replace the file, which is at the earlier `state`."""
        return self._save(changed(header, state=state, needs_scan=True))

    def mark_restored(self, header: IndexHeader, main: str, change_counter: int) -> IndexHeader:
        """Save that the file at `main` was restored at the state of `header`."""
        return self._save(changed(self.identify(header, main), change_counter=change_counter))

    def disown(self, header: IndexHeader) -> IndexHeader:
        """Save that the file does not come from the state of `header`.

        `reclaim` undoes it.
        """
        return self._save(changed(header, identity=None, needs_scan=True))

    def reclaim(self, header: IndexHeader) -> IndexHeader:
        """Save `header` as it was before `disown`."""
        return self._save(header)

    def begin_rebuild(self, header: IndexHeader, position: WalPosition | None, change_counter: int) -> IndexHeader:
        """Save that the entries of this state are about to be rebuilt."""
        return self._save(changed(header, position=position, change_counter=change_counter, needs_scan=True))

    def begin_rebased(self, header: IndexHeader, txid: int, state: int) -> IndexHeader:
        """Save that a new log is to begin at `txid`, with a file that is not in place yet."""
        return self._save(changed(header, txid=txid, state=state, needs_scan=True))

    def record_identity(self, header: IndexHeader, main: str) -> IndexHeader:
        """Save the present identity of the main file at `main`."""
        return self._save(self.identify(header, main))

    def add_in_doubt(self, header: IndexHeader, post_hash: int, *, main: str, change_counter: int) -> IndexHeader:
        """Save that txid + 1, with the state `post_hash`, is about to be put.

        The last in-doubt attempt is this one.
        """
        if header.txid == 0:
            # If the answer is lost and the WAL is removed before the next open, this identity
            # proves that the file continues from what was stored.
            header = changed(self.identify(header, main), change_counter=change_counter, needs_scan=True)
        last = header.in_doubt[-1] if header.in_doubt else None
        if last is None or not last.attempt or last.post_hash != post_hash:  # else it is a retry of the same attempt
            header = header.with_intent(Attempt(post_hash, secrets.randbits(63) + 1))
        return self._save(header)

    def add_pending(self, header: IndexHeader, state: int) -> IndexHeader:
        """Save that a close leaves the file at `state`, which was not put."""
        return self._save(header.with_intent(Attempt(state, 0)))

    def confirm(self, header: IndexHeader, position: WalPosition | None, main: str, change_counter: int) -> IndexHeader:
        """Save that a scan of `main`, up to `position`, found no difference."""
        return self._save(changed(self.scanned(header, position, main), change_counter=change_counter))

    def record_segment(
        self,
        header: IndexHeader,
        edge: SegmentHeader,
        pgnos: Sequence[int],
        hashes: Sequence[int],
        *,
        proved_ms: int,
        change_counter: int,
        noted: Sequence[Attempt] = (),
    ) -> IndexHeader:
        """Update the index from a stored segment.

        Page hashes are written first, then the header that depends on them.

        The attempts in `noted` stay in doubt.
        """
        if edge.whole:
            self._save(header.needing_scan())  # a process killed while the old entries are replaced must scan
            failpoint("within record")
        self.pages.record(pgnos, hashes, edge.post)
        self.pages.remove(edge.db_size + 1, header.db_size, edge.post)
        failpoint("before header")
        return self._save(
            changed(
                header,
                txid=edge.post,
                state=edge.post_hash,
                page_size=edge.page_size,
                db_size=edge.db_size,
                change_counter=change_counter,
                proved_ms=proved_ms,
                in_doubt=tuple(noted),
            )
        )

    def advance_page_objects(self, header: IndexHeader, upto: int | None = None) -> IndexHeader:
        """Save that the page objects of all commits up to `upto` were put.

        None: up to the view txid of `header`.
        """
        view_txid = header.view_txid if upto is None else upto
        return self._save(changed(header, view_txid=view_txid, view_size=max(header.view_size, header.db_size)))

    def postpone_page_objects(self, header: IndexHeader, *, view_size: int | None = None) -> IndexHeader:
        """Save that the page objects of all commits join the backlog.

        Args:
            header: the header to change.
            view_size: page objects may exist up to this page number.
        """
        if view_size is not None:
            header = changed(header, view_size=view_size)
        return self._save(header.pages_postponed(header.txid))

    def advance_backlog(self, header: IndexHeader, before: Backlog, cursor: int, db_size: int) -> IndexHeader:
        """Save that the pages of the backlog `before` were put up to `cursor`.

        `db_size` is the size of the database in pages at that state.
        """
        backlog = header.backlog
        if backlog == before:
            backlog = before._replace(cursor=cursor) if cursor <= db_size else None
        return self._save(changed(header, view_size=max(header.view_size, db_size), backlog=backlog))

    def record_sweep(self, header: IndexHeader) -> IndexHeader:
        """Save that no page object exists past the end of the database."""
        return self._save(changed(header, view_size=header.db_size))

    def clear(self) -> None:
        """Clear the index: the next batch or open scans the database."""
        os.ftruncate(self._fd, 0)

    def sync(self) -> None:
        """Make what was written durable."""
        os.fsync(self._fd)

    @staticmethod
    def peek(path: str) -> IndexHeader | None:
        """Do as `load`, for the index at `path`, without its lock and without saving.

        For readers that must not wait.
        """
        return _with_file(path, os.O_RDONLY, _header)

    @staticmethod
    def peek_header(path: str) -> IndexHeader | None:
        """Do as `peek`, without the last WAL reset record."""
        return _with_file(path, os.O_RDONLY, lambda fd: _read(fd)[0])

    @staticmethod
    def write_reset_record(
        path: str,
        main: str,
        judge: Callable[[IndexHeader, Identity | None], tuple[WalPosition | None, bool, bool] | None],
        *,
        is_last: bool,
    ) -> None:
        """Write the next WAL reset record of the index at `path`, if the index exists.

        The caller must hold SQLite's write lock, so that it is the only writer of records. If the
        header cannot be read, the record requests a scan.

        Args:
            path: the index.
            main: the main file.
            judge: called with the present header and the identity of the file at `main`. It returns
                (position after the restart, covered, witnessed), or None to write nothing.
            is_last: the WAL is removed, and from then on the identity alone shows whether the file
                was written to. It is worth waiting some milliseconds until the identity is settled:
                the lock keeps writers out.
        """

        def write(fd: int) -> None:
            header, last = _read(fd)
            sequence = (last.sequence if last is not None else 0) + 1
            if header is None:
                os.pwrite(fd, WalResetRecord(sequence, None, None, covered=False, anywhere=True).encode(), RESET_RECORD_OFFSET)
                return
            sequence = max(sequence, header.reset_sequence + 1)
            unabsorbed = None if header.position is None else (header.position.salt1, header.position.salt2)
            header = header.apply(last)
            identity, is_settled = _identify(path, fd, main, _PATIENT_LOOKS if is_last else _TICK_LOOKS)
            verdict = judge(header, identity)
            if verdict is None:
                return
            after, covered, is_witnessed = verdict
            covered = covered and not header.needs_scan
            record = WalResetRecord(
                sequence, unabsorbed, after, covered, identity=identity, is_settled=is_settled, is_witnessed=is_witnessed
            )
            os.pwrite(fd, record.encode(), RESET_RECORD_OFFSET)

        _with_own_file(path, write)

    @staticmethod
    def ask_for_scan(path: str) -> None:
        """Write a WAL reset record that invalidates any position.

        Otherwise as `write_reset_record`.
        """

        def write(fd: int) -> None:
            header, last = _read(fd)
            sequence = max(last.sequence if last is not None else 0, header.reset_sequence if header is not None else 0) + 1
            os.pwrite(fd, WalResetRecord(sequence, None, None, covered=False, anywhere=True).encode(), RESET_RECORD_OFFSET)

        _with_own_file(path, write)


def _read(fd: int) -> tuple[IndexHeader | None, WalResetRecord | None]:
    data = os.pread(fd, HEADER_SIZE, 0)
    return IndexHeader.decode(data), WalResetRecord.decode(data[RESET_RECORD_OFFSET : RESET_RECORD_OFFSET + RESET_RECORD_SIZE])


def _salts(position: WalPosition | None) -> tuple[int, int] | None:
    return None if position is None else (position.salt1, position.salt2)


def _header(fd: int) -> IndexHeader | None:
    header, record = _read(fd)
    return header.apply(record) if header is not None else None


def _identify(path: str, fd: int, main: str, looks: int) -> tuple[Identity | None, bool]:
    """Return (identity of the file at `main`, whether it is settled).

    `fd` is the index at `path`.
    """
    identity = None
    for look in range(looks):
        if look >= _TICK_LOOKS:
            time.sleep(_LOOK_SECONDS)
        os.utime(fd)
        # Keep this order: a write after the second stat is of the witness's tick, or of a later
        # one.
        witness = Identity.of(path)
        identity = Identity.of(main)
        if identity is None or identity.is_settled_by(witness):
            return identity, identity is not None
    return identity, False


def _with_file(path: str, flags: int, function: Callable[[int], R]) -> R | None:
    """Call `function` with a descriptor of the file at `path`.

    Returns None if it is not a regular file.
    """
    try:
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.EISDIR, errno.ENXIO):
            return None
        raise
    try:
        return function(fd) if stat.S_ISREG(os.fstat(fd).st_mode) else None
    finally:
        os.close(fd)


def _with_own_file(path: str, write: Callable[[int], None]) -> None:
    """Call `write` with the index at `path`, unless it is not an index any more.

    Such a file has no readable header. The next batch therefore classifies the local state again.
    """

    def checked(fd: int) -> None:
        if is_index(os.pread(fd, _LOOK_SIZE, 0)):
            write(fd)
        else:
            logger.warning("%s is not an index any more: it is left as it is", path)

    _with_file(path, os.O_RDWR, checked)
