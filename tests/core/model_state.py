"""What the model knows: the line of states in the bucket, machines, their processes; and a database's bytes, seen from outside."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import apsw
from model_process import Remote
from outside import Bucket, page_hash, read_page_object

NAME = "app.db"


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
    """The history in the bucket, followed as it grows."""

    def __init__(self, bucket: Bucket, root: Path) -> None:
        self.bucket = bucket
        self.root = root
        self.images: list[bytes] = [b""]
        self.names = [""]
        self.states = [0]
        self.pages: dict[int, bytes] = {}
        self.known: set[tuple[int, int]] = set()  # (page, its hash): every content that the log has ever had
        self.view: dict[str, tuple[int, int]] = {}
        self.objects: dict[str, tuple[int, int]] = {}

    @property
    def head(self) -> int:
        return len(self.names) - 1

    def follow(self) -> list[str]:
        """The states that are new. Looks at the page objects first: what they hold must be in the log by then."""
        changed = [(key, self.bucket.get(key)) for key in self._changed(f"{NAME}-0*", self.view)]
        before = self.head
        for key in sorted(self._changed(f"{NAME}-wal/*-*", self.objects)):
            pre, post = (int(part, 16) for part in key.rpartition("/")[2].split("-"))
            assert (pre, post) == (self.head, self.head + 1), f"{key} after txid {self.head}: a gap, or written twice"
            self._apply(self.bucket.segment(NAME, pre, post))
        for key, data in changed:
            page, trailer = read_page_object(data)
            assert (trailer.pgno, page_hash(trailer.pgno, page)) in self.known, f"{key} holds what the log has never had"
            assert trailer.txid <= self.head, f"{key} is ahead of the log"
            assert self.states[trailer.txid] == trailer.post_hash, f"{key}: another history"
        return self.names[before + 1 :]

    def _changed(self, pattern: str, seen: dict[str, tuple[int, int]]) -> list[str]:
        found = {}
        for path in self.root.glob(pattern):
            status = path.stat()
            found[str(path.relative_to(self.root))] = (status.st_ino, status.st_mtime_ns)
        changed = [key for key, stamp in found.items() if seen.get(key) != stamp]
        if seen is self.objects:
            assert seen.keys() <= found.keys(), f"gone from the log: {seen.keys() - found.keys()}"
        seen.clear()
        seen.update(found)
        return changed

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
