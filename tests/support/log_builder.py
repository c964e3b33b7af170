"""Made-up histories: commits put into a log directly, as a writer would, with a model of every state that the database had."""

from __future__ import annotations

import hashlib
import os
import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bottomless_wal.core.config import Config
from bottomless_wal.formats.page import Page, page_hash, state_hash
from bottomless_wal.formats.segment import CommitRecord, SegmentHeader
from bottomless_wal.formats.wal import WalPosition
from bottomless_wal.history.log import RemoteLog
from bottomless_wal.history.restore import rebuild
from bottomless_wal.history.scratch import scratch
from bottomless_wal.history.segment_list import SegmentInfo
from bottomless_wal.replication.index import LocalIndex
from bottomless_wal.storage import Store
from bottomless_wal.storage.directory import DirectoryStore


@dataclass(frozen=True)
class State:
    """A database: its page size, and its pages."""

    page_size: int
    pages: tuple[bytes, ...]

    @property
    def hash(self) -> int:
        return state_hash(self.page_size, enumerate(self.pages, 1))

    @property
    def image(self) -> bytes:
        return b"".join(self.pages)


@dataclass
class Past:
    """The history `app.db` in a directory store below `root`; `states[n]` is the database at txid n. `clock` is the server's."""

    root: Path
    states: list[State] = field(default_factory=lambda: [State(512, ())])
    clock: float = 1_800_000_000.0
    times: list[float] = field(default_factory=lambda: [0.0])

    def __post_init__(self) -> None:
        self.config = Config(endpoint=self.root.as_uri(), bucket="past", create_bucket=True)
        self.store: Store = DirectoryStore(self.config)
        self.store.prepare()
        self.store.now = self.store.estimate = lambda: self.clock  # type: ignore[method-assign]
        self.history = RemoteLog(self.store, "app.db")

    def elsewhere(self) -> RemoteLog:
        """The same history, seen by who has stored nothing of it."""
        return RemoteLog(self.store, "app.db")

    @property
    def head(self) -> int:
        return len(self.states) - 1

    def page(self, seed: int, size: int) -> bytes:
        return (hashlib.sha256(struct.pack(">Q", seed)).digest() * (size // 32))[:size]

    def commit(self, changes: dict[int, bytes], db_size: int, *, page_size: int | None = None) -> None:
        """The next commit: `changes` (1-based), after which the database has `db_size` pages. With a page size it is a reset."""
        old = self.states[-1]
        reset = page_size is not None and self.head > 0
        base = () if page_size is not None else old.pages
        size = page_size or old.page_size
        pages = tuple(changes.get(number, base[number - 1] if number <= len(base) else b"") for number in range(1, db_size + 1))
        assert all(len(data) == size for data in pages), "it grew by pages that it has not"
        new = State(size, pages)
        sent = [Page(number, page_hash(number, data), data) for number, data in sorted(changes.items()) if number <= db_size]
        post = self.head + 1
        staged = self.history.stage(post - 1, post, sent, size, level=1)
        now_ms = int(self.clock * 1000)
        header = SegmentHeader(
            pre=post - 1, post=post, pre_hash=old.hash, post_hash=new.hash, page_size=size, db_size=db_size, page_count=len(sent),
            reset=reset, view_txid=0, time_ms=now_ms, writer=bytes(16), commits=(CommitRecord(post, new.hash, now_ms),),
            positions=(WalPosition(1, 2, post, 4, 5),), body=staged.body,
        )  # fmt: skip
        assert self.history.append(header, staged.blocks).created
        self.states.append(new)
        self.times.append(self.clock)
        self.date(post - 1, post)

    def date(self, pre: int, post: int) -> None:
        """The server dates the edge by its clock."""
        path = self.root / "past" / f"app.db-wal/{pre:016x}-{post:016x}"
        os.utime(path, (self.clock, self.clock))

    def live(self, rng: random.Random, commits: int = 1) -> None:
        """Commits as a database makes them: small changes, growth, now and then a shrink."""
        for _ in range(commits):
            size = self.states[-1].page_size
            before = len(self.states[-1].pages)
            after = max(1, before + rng.choice((0, 0, 0, 1, 2, -3)))
            numbers = {rng.randint(1, after) for _ in range(rng.randint(1, 4))} | set(range(before + 1, after + 1)) | {1}
            self.commit({number: self.page(rng.getrandbits(60), size) for number in numbers}, after)

    def reset(self, rng: random.Random) -> None:
        size = rng.choice((512, 1024))
        count = rng.randint(1, 6)
        self.commit({number: self.page(rng.getrandbits(60), size) for number in range(1, count + 1)}, count, page_size=size)

    def image(self, txid: int, edges: Sequence[SegmentInfo] | None = None) -> bytes:
        """What a restore of `txid` gives, by `edges` if they were listed before. RestoreError as `rebuild`."""
        out = str(self.root / "restored.db")
        index = LocalIndex(out + "-index", beside=out)
        try:
            with index.locked(), scratch(out, index.pages) as into:
                index.clear()
                rebuilt = rebuild(self.history, into, txid, list(edges or self.history.edges()))
                assert (rebuilt.txid, rebuilt.state) == (txid, self.states[txid].hash)
                return Path(into.path).read_bytes()
        finally:
            index.close()
