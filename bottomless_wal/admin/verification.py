"""Is what the bucket holds of a database sound, and does it say the same everywhere? Only reads, but for `repair_view`.

    log       every segment's head and tables decode; all segments agree on the state hash of each txid; sound ones lead from 0 to the
              head, and the page hashes along that way give each state hash on it. deep: every page of every segment and body decodes
    integrity the head, restored to a temporary file, passes SQLite's integrity_check
    view      each page object is sound and holds the page of the head; none is missing, none too many (`view_audit`)
    local     the pages of a local file have the hashes of the head

Whatever does not hold is a `Problem` that names its object. Memory does not grow with the database: page hashes go to a temporary file.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

import apsw

from ..core.errors import BottomlessError, CorruptionError, RestoreError
from ..formats import keys
from ..formats.page import page_hash, repr_in_hex
from ..history.integrity import integrity_fault
from ..history.log import Head
from ..history.page_table import PageTable, TableReplay
from ..history.restore import Progress, rebuild, rebuild_from_pages
from ..history.scratch import Scratch, scratch
from ..sqlite.database_reader import LocalDatabase
from ..sqlite.own_connection import OwnConnection
from ..sqlite.snapshot_reader import SnapshotInvalidated
from .log_audit import LogAudit
from .page_audit import Fault, ViewAudit
from .problems import Problem, ProblemKind
from .stored_database import StoredDatabase, opened

__all__ = ["Report", "verify"]

_LOOKS: Final = 10
_LOOKS_AGAIN: Final = 6
_PAUSE: Final = 0.2


@repr_in_hex("state_hash")
@dataclass(slots=True)
class Report:
    """What `verify` found. `txid`, `state_hash`, `pages` (of `page_size` bytes) are the head's; `restorable` is the highest txid that
    sound segments lead to. `notes` are worth knowing, and no problems."""

    name: str
    store: str
    deep: bool
    txid: int = 0
    state_hash: int = 0
    page_size: int = 0
    pages: int = 0
    segments: int = 0
    bodies: int = 0
    page_objects: int = 0
    restorable: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    received: int = 0
    requests: int = 0
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """No problem was found, or all were repaired."""
        return all(problem.repaired for problem in self.problems)


def verify(
    database: str | os.PathLike[str],
    *,
    deep: bool = False,
    integrity: bool = False,
    repair_view: bool = False,
    local: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **options: object,
) -> Report:
    """Verifies what is stored for `database`, a path or a name in the bucket (see `listing`).

    `deep` decodes every page. `integrity` restores the head to a temporary file and runs SQLite's integrity_check on it: hashes say that a
    database is the one that was committed, and not that SQLite finds it sound. `repair_view` puts stale and missing page objects anew from
    the log and deletes superfluous ones. `local`: a file to compare with the head. `progress` is called with (objects looked at, objects
    known of). `options` are those of `connect`.

    Raises:
        RestoreError: nothing is stored under that name. StoreError: the bucket is missing or cannot be reached. ConfigError.
    """
    began = time.monotonic()
    with opened(database, options) as target, _page_hashes() as hashes:
        report = Report(target.name, target.store.describe(), deep)
        log = LogAudit(target, hashes, deep=deep, progress=progress)
        head = log.run()
        report.segments, report.bodies, report.txid, report.restorable = log.segments, log.bodies, log.txid, log.restorable
        report.problems, report.notes = log.problems, log.notes
        if log.told is not None:
            _, report.state_hash, report.page_size, report.pages = log.told
        if head is not None and integrity:
            _verify_integrity(target, report, head)
        if head is not None:
            head = _verify_view(target, report, log, head, repair=repair_view, progress=progress)
            if local is not None:
                _compare(os.path.realpath(local), hashes, head, report)
        elif not report.segments:
            _verify_view_alone(target, report)
        report.received = target.store.stats.bytes_received
        report.requests = target.requests
        report.seconds = time.monotonic() - began
        return report


@contextlib.contextmanager
def _page_hashes() -> Iterator[TableReplay]:
    with tempfile.TemporaryFile(prefix="bottomless-verify-") as file:
        yield TableReplay(PageTable("the table of page hashes", file.fileno))


@contextlib.contextmanager
def _temporary_scratch() -> Iterator[Scratch]:
    with tempfile.TemporaryDirectory(prefix="bottomless-verify-") as directory, tempfile.TemporaryFile(dir=directory) as file:
        with scratch(os.path.join(directory, "database"), PageTable("the table of page hashes", file.fileno)) as into:
            yield into


def _verify_integrity(target: StoredDatabase, report: Report, head: Head) -> None:
    try:
        with _temporary_scratch() as into:
            rebuild(target.history, into, head.txid, target.history.edges(), width=target.config.concurrency)
            fault = integrity_fault(into.path)
    except RestoreError as error:
        fault = error.message
    if fault is None:
        report.notes.append(f"SQLite's integrity_check finds txid {head.txid} sound")
    else:
        report.problems.append(Problem(ProblemKind.INTEGRITY, keys.log_prefix(target.name), f"txid {head.txid}: {fault}"))


# --- the page view -----------------------------------------------------------------------------------------------------


def _verify_view(
    target: StoredDatabase,
    report: Report,
    log: LogAudit,
    head: Head,
    *,
    repair: bool,
    progress: Progress | None,
    sleep: Callable[[float], None] = time.sleep,
) -> Head:
    audit = ViewAudit(target, log.hashes, progress)
    faults = audit.look(head)
    report.page_objects = audit.objects
    began = head.txid
    for look in range(_LOOKS_AGAIN):
        if not faults:
            break
        # A writer that is at work puts its page objects after its segment: what was wrong a moment ago may be right now.
        if look:
            sleep(_PAUSE)
        faults = audit.look(log.advance(), among=faults)
        head = log.advance()
        if head.txid > began:
            faults = audit.unchanged_since(began, faults)
        if not (audit.unchanged_since(head.txid - 1, faults) != faults and log.fresh()):
            break
    report.txid, report.state_hash, report.page_size, report.pages = head.txid, head.state, head.page_size, head.db_size
    report.restorable = head.txid
    repaired: list[Fault] = []
    if repair and faults:
        moved = audit.repair(head, log.chain, faults)
        if moved is not None:
            report.notes.append(moved)
        else:
            repaired, faults = faults, []
    promised = faults if target.config.pages == "commit" else []
    if promised and not repair:
        promised = _promised(target, log, audit, head, faults)
    if len(promised) < len(faults) or (faults and not promised):
        count = sum(fault.last - fault.first + 1 for fault in faults) - sum(fault.last - fault.first + 1 for fault in promised)
        report.notes.append(
            f"{count} page objects are not as the head has them; its writer did not say that they are (pages=checkpoint, pages=off, or a "
            "background fill): --repair-view would put them"
        )
    report.problems += [_of_view(target, fault, repaired=fault in repaired) for fault in [*repaired, *promised]]
    return head


def _promised(target: StoredDatabase, log: LogAudit, audit: ViewAudit, head: Head, faults: list[Fault]) -> list[Fault]:
    """Those faults that contradict what the head's segment says of the page view: that it was complete up to some txid before."""
    header = target.history.header(log.chain[-1].pre, log.chain[-1].post)
    if header is None or (audit.objects == 0 and header.view_txid == 0):
        return []
    kept_up = header.view_txid >= header.pre  # then the page objects of the head's own commit are due as well
    return faults if kept_up else audit.unchanged_since(header.view_txid, faults)


def _of_view(target: StoredDatabase, fault: Fault, *, repaired: bool) -> Problem:
    key = keys.page_key(target.name, fault.first)
    more = f" (and {fault.last - fault.first} more, up to page {fault.last})" if fault.last > fault.first else ""
    return Problem(fault.kind, key, fault.detail + more, repaired)


def _verify_view_alone(target: StoredDatabase, report: Report) -> None:
    """There is no log: are the page objects a database by themselves?"""
    try:
        with _temporary_scratch() as into:
            rebuilt = rebuild_from_pages(target.history, into, width=target.config.concurrency)
    except (RestoreError, CorruptionError) as error:
        report.problems.append(Problem(ProblemKind.DAMAGED, keys.page_prefix(target.name), error.message))
        rebuilt = None
    else:
        if rebuilt is None:
            raise RestoreError(
                f"nothing is stored as {target.name!r} in {target.store.describe()}",
                hint="`bottomless-wal ls` shows what is. Is it the right bucket, and the right database_id?",
            )
    if rebuilt is not None:
        report.txid, report.state_hash, report.page_size = rebuilt.txid, rebuilt.state, rebuilt.page_size
        report.pages = report.page_objects = rebuilt.db_size
        report.notes.append(f"the page objects alone are a sound database at txid {rebuilt.txid}")
    report.problems.append(
        Problem(ProblemKind.NO_LOG, keys.log_prefix(target.name), "there is no log; opening the database somewhere begins a new one")
    )


# --- a local file ------------------------------------------------------------------------------------------------------


def _compare(path: str, hashes: TableReplay, head: Head, report: Report) -> None:
    if not os.path.exists(path) or os.path.getsize(path) == 0:
        report.problems.append(Problem(ProblemKind.LOCAL, path, "there is no such file, or it is empty"))
        return

    def connect() -> apsw.Connection:
        return OwnConnection(path)

    closed = not os.path.exists(path + "-wal")
    local = LocalDatabase(path, connect)
    try:
        for look in range(_LOOKS):
            try:
                differing = list(_differing(local, hashes, head))
                break
            except SnapshotInvalidated:
                if look == _LOOKS - 1:
                    raise
    except (apsw.Error, SnapshotInvalidated) as error:
        report.problems.append(Problem(ProblemKind.LOCAL, path, error.reason if isinstance(error, BottomlessError) else str(error)))
        return
    finally:
        # Of a database that nobody has open, the files that looking at it has made go again.
        local.close(checkpoint=closed)
    if differing:
        report.problems.append(
            Problem(
                ProblemKind.LOCAL, path, f"differs from txid {head.txid}: {'; '.join(differing[:3])}" + ("; ..." if differing[3:] else "")
            )
        )
    else:
        report.notes.append(f"{path} holds exactly txid {head.txid}")


def _differing(local: LocalDatabase, hashes: TableReplay, head: Head) -> Iterator[str]:
    with local.snapshot() as tip:
        shape = local.shape(tip)
        if (shape.page_size, shape.db_size) != (head.page_size, head.db_size):
            yield f"{shape.db_size} pages of {shape.page_size} bytes, not {head.db_size} of {head.page_size}"
        if shape.page_size != head.page_size:
            return
        first = count = 0
        for pgno, page in local.pages(tip, shape):
            if pgno <= head.db_size and page_hash(pgno, page) != hashes.page_hash(pgno):
                first, count = first or pgno, count + 1
        if count:
            yield f"{count} of its pages have another content, the first of them is page {first}"
