"""What the model knows: the line of states in the bucket, machines, their processes; and a database's bytes, seen from outside."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import apsw

from tests.support.independent_reader import Bucket, page_hash, read_page_object
from tests.support.model_process import Remote, server_time

NAME = "app.db"
RETENTION = 3 * 3600.0
"""Seconds, in which nobody prunes what is younger."""


def named(image: bytes | None) -> str:
    """A state's name: the hash of its bytes, nothing for none."""
    return hashlib.sha256(image).hexdigest()[:16] if image else ""


@dataclass(frozen=True)
class Place:
    """A bucket that is a directory."""

    url: str
    bucket: str = "bucket"
    kind: str = "directory"


class Line:
    """The history in the bucket, followed as it grows, and as what is old is deleted.

    `kept`: whatever may have been deleted, this state and all later ones must be within reach.
    """

    def __init__(self, bucket: Bucket, root: Path) -> None:
        self.bucket = bucket
        self.root = root
        self.images: list[bytes] = [b""]
        self.names = [""]
        self.states = [0]
        self.times = [0.0]
        self.kept = 1
        self.pages: dict[int, bytes] = {}
        self.known: set[tuple[int, int]] = set()  # (page, its hash): every content that the log has ever had
        self.view: dict[str, tuple[int, int]] = {}
        self.objects: dict[str, tuple[int, int]] = {}
        self.edges: dict[str, tuple[int, int, bool]] = {}  # of the history: pre, post, does it need nothing before?
        self.gone: set[str] = set()
        self.vanished: set[str] = set()  # deleted by somebody who should not
        self.merged = self.strays = 0

    @property
    def head(self) -> int:
        return len(self.names) - 1

    def now(self) -> float:
        return server_time(str(self.root.parent))

    def follow(self) -> list[str]:
        """The states that are new. Looks at the page objects first: what they hold must be in the log by then."""
        changed = []
        for key in self._changed(f"{NAME}-0*", self.view)[0]:
            with contextlib.suppress(FileNotFoundError):  # swept meanwhile
                changed.append((key, self.bucket.get(key)))
        before = self.head
        gone: dict[str, tuple[int, int]] = {}
        assert any(self._look(gone) for _ in range(20)), f"a gap after txid {self.head}"
        self._check_gone(gone)
        for key, data in changed:
            page, trailer = read_page_object(data)
            assert (trailer.pgno, page_hash(trailer.pgno, page)) in self.known, f"{key} holds what the log has never had"
            assert trailer.txid <= self.head, f"{key} is ahead of the log"
            assert self.states[trailer.txid] == trailer.post_hash, f"{key}: another history"
        return self.names[before + 1 :]

    def _look(self, gone: dict[str, tuple[int, int]]) -> bool:
        """Looks at the log. False if it grew meanwhile, so that it must be looked at once more."""
        new, lost = self._changed(f"{NAME}-wal/*-*", self.objects)
        gone |= lost
        ends = {key: tuple(int(part, 16) for part in key.rpartition("/")[2].split("-")) for key in new}
        for key in sorted(new, key=lambda key: (ends[key][1] - ends[key][0] > 1, ends[key])):
            pre, post = ends[key]
            try:
                edge = self.bucket.segment(NAME, pre, post)
            except FileNotFoundError:
                assert key not in self.edges
                self.objects.pop(key)  # a rival's, withdrawn
                continue
            if post > self.head + (post == pre + 1):
                for rest in new:
                    if rest not in self.edges:
                        self.objects.pop(rest, None)
                return False
            if post == pre + 1 and post <= self.head:
                assert key in self.gone, f"{key} after txid {self.head}: written twice"
                self.strays += 1
                continue
            if post == pre + 1:
                self._apply(edge)
                self.times.append(self.objects[key][1] / 1e9)
            else:
                self._check_merged(edge)
            self.edges[key] = (pre, post, edge.reset or pre == 0)
        return True

    def _check_gone(self, gone: dict[str, tuple[int, int]]) -> None:
        """What is gone was old, and nobody was promised what needs it."""
        known = {key: self.edges.pop(key) for key in gone if key in self.edges}
        self.gone |= known.keys()
        known = {key: ends for key, ends in known.items() if key not in self.vanished}
        if not known:
            return
        now, oldest, youngest = self.now(), 1, 0.0
        for key, (pre, post, _) in known.items():
            if post == pre + 1:
                assert post < self.head, f"{key} is gone, the head's own commit"
                assert gone[key][1] / 1e9 <= now - 2 * 3600, f"{key} is gone, and was young"
        for txid, time in enumerate(self.times[1:], 1):
            youngest = max(youngest, time)
            if youngest > now - RETENTION:
                break
            oldest = txid
        self.kept = max(self.kept, oldest)
        within, missing = self.within_reach(), range(self.kept, self.head + 1)
        assert all(txid in within for txid in missing), f"{sorted(known)} gone: {sorted(set(missing) - within)} cannot be restored"

    def within_reach(self) -> set[int]:
        """The txids that edges lead to."""
        found = {0}
        for pre, post, whole in sorted(self.edges.values()):
            if whole or pre in found:
                found.add(post)
        return found

    def _changed(self, pattern: str, seen: dict[str, tuple[int, int]]) -> tuple[list[str], dict[str, tuple[int, int]]]:
        """What is new, or new again, and what is gone."""
        found = {}
        for path in self.root.glob(pattern):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                found[str(path.relative_to(self.root))] = (status.st_ino, status.st_mtime_ns)
        changed = [key for key, stamp in found.items() if seen.get(key) != stamp]
        gone = {key: stamp for key, stamp in seen.items() if key not in found}
        seen.clear()
        seen.update(found)
        return changed, gone

    def _apply(self, edge: Any) -> None:
        assert edge.pre_hash == self.states[-1], f"{edge.pre} -> {edge.post} does not follow"
        pages = {} if edge.reset or edge.pre == 0 else self.pages
        pages.update(edge.pages)
        self.pages = {pgno: page for pgno, page in pages.items() if pgno <= edge.db_size}
        state = 0
        for pgno, page in self.pages.items():
            state ^= page_hash(pgno, page)
        self.known |= {(pgno, page_hash(pgno, page)) for pgno, page in edge.pages.items()}
        assert state == edge.post_hash, f"{edge.pre} -> {edge.post} gives another state than it says"
        self.images.append(b"".join(self.pages[pgno] for pgno in range(1, edge.db_size + 1)))
        self.names.append(named(self.images[-1]))
        self.states.append(state)

    def _check_merged(self, edge: Any) -> None:
        name = f"{edge.pre} -> {edge.post}"
        assert (edge.pre_hash, edge.post_hash) == (self.states[edge.pre], self.states[edge.post]), f"{name} joins what never was"
        listed = [row[:2] for row in edge.commits]
        passed = [(txid, self.states[txid]) for txid in range(edge.pre + 1, edge.post + 1)]
        if edge.pre == 0 and self.vanished:  # upon a snapshot that was made from a file, over a gap, of which nothing is listed
            passed = passed[-len(listed) :]
        assert listed == passed, name
        before, size = b"" if edge.reset else self.images[edge.pre], edge.page_size
        pages = {at // size + 1: before[at : at + size] for at in range(0, len(before), size)} | edge.pages
        assert b"".join(pages[pgno] for pgno in range(1, edge.db_size + 1)) == self.images[edge.post], f"{name} leads elsewhere"
        self.merged += 1


@dataclass
class Process:
    """A process and its connections: slot -> the state that its reader holds, or None."""

    site: Site
    remote: Remote
    slots: dict[int, str | None] = field(default_factory=dict)
    fenced: bool = False
    held: bool = False
    armed: bool = False
    policy: str = "error"


@dataclass
class Site:
    """A machine. `synced`: the txid that its local state goes on from; `pending`: the states since then."""

    directory: Path
    image: bytes | None = None
    synced: int = 0
    pending: list[str] = field(default_factory=list)
    loose: bool = False  # the descent from `synced` can no longer be proved
    processes: list[Process] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    boot: int = 1
    opened_in: int = 1  # the boot in which it was opened last
    saved: tuple[Path, bytes | None, int, list[str]] | None = None
    backup: Path | None = None  # a copy of the main file alone

    @property
    def path(self) -> Path:
        return self.directory / NAME

    def files(self) -> list[Path]:
        return sorted(self.directory.glob(f"{NAME}*"))


def content_of(con: apsw.Connection) -> str:
    """What the tables hold."""
    digest = hashlib.sha256()
    for kind, name, sql in con.execute("SELECT type, name, sql FROM sqlite_schema ORDER BY type, name"):
        digest.update(repr((kind, name, sql)).encode())
        if kind == "table":
            for row in con.execute(f"SELECT * FROM {name} ORDER BY 1"):
                digest.update(repr(row).encode())
    return digest.hexdigest()[:16]


def stock_image(path: Path) -> bytes | None:
    """The database at `path` as stock SQLite sees it; its WAL is left alone."""
    con = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
    try:
        con.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        con.set_busy_timeout(5000)
        return con.serialize("main") or None
    finally:
        con.close()
