"""The model's books: what a step may leave behind, on a machine and in the bucket, and what an opened database must be.

`model.py` has the steps, and says what is held against them.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import apsw
from hypothesis.stateful import RuleBasedStateMachine, rule

from tests.support.independent_reader import Bucket
from tests.support.model_process import Died, Nursery, load
from tests.support.model_state import Line, Place, Process, Site, content_of, named, stock_image

FIGURES: Counter[str] = Counter()
"""What was done, over all runs of this process."""
FAILURES: list[str] = []
"""What failed first, step by step: a run with real processes need not fail twice in the same way."""


def step(**arguments: Any) -> Any:
    """A rule whose failure is kept."""

    def decorate(function: Callable[..., None]) -> Any:
        @functools.wraps(function)
        def recorded(self: Books, *values: Any, **named_values: Any) -> None:
            self.trace.append(f"{function.__name__}{values or ''} {named_values or ''}")
            try:
                function(self, *values, **named_values)
            except Exception:  # whatever it is goes on; the steps that led to it are kept
                self.failed()
                raise

        return rule(**arguments)(recorded)

    return decorate


class Books(RuleBasedStateMachine):
    """`nursery` and `base` are set by whoever runs it."""

    nursery: Nursery
    base: str | None = None
    log: str = ""

    def __init__(self) -> None:
        super().__init__()
        self.trace: list[str] = []
        self.root = Path(tempfile.mkdtemp(prefix="model-", dir=self.base))
        self.place = Place((self.root / "store").as_uri())
        (self.root / "store" / "bucket").mkdir(parents=True)
        self.line = Line(Bucket(self.place), self.root / "store" / "bucket")
        self.contents: dict[str, str] = {}
        self.passed: set[str] = set()  # states that went into the log within a later one
        self.sites: list[Site] = []
        self.calm = 0  # commits since the last blow
        self.idle = 0  # steps since the last commit
        self.hours = 0  # that have passed on the server
        self.new_site()
        FIGURES["runs"] += 1

    def new_site(self) -> Site:
        site = Site(self.root / f"machine-{len(self.sites)}")
        site.directory.mkdir()
        self.sites.append(site)
        return site

    # --- looking -------------------------------------------------------------------------------------------------------

    def content(self, image: bytes | None) -> str:
        """What the tables hold; the file is sound."""
        name = named(image)
        if name not in self.contents:
            con = apsw.Connection(":memory:")
            load(con, image)
            assert con.execute("PRAGMA integrity_check").get == "ok"
            self.contents[name] = content_of(con)
            con.close()
        return self.contents[name]

    def expected(self, image: bytes | None, work: Callable[[apsw.Connection], None] | None) -> str:
        """What stock SQLite makes of it."""
        if work is None:
            return self.content(image)
        con = apsw.Connection(":memory:")
        try:
            load(con, image)
            work(con)
            return content_of(con)
        finally:
            con.close()

    def peek(self, site: Site) -> bytes | None:
        """The local state as stock SQLite finds it, changing nothing."""
        if not site.path.exists() or not site.path.stat().st_size:
            return None
        if any(process.slots for process in site.processes):
            return stock_image(site.path)
        with tempfile.TemporaryDirectory(dir=self.root) as directory:
            for ending in ("", "-wal"):
                if os.path.exists(f"{site.path}{ending}"):
                    shutil.copy(f"{site.path}{ending}", f"{directory}/copy{ending}")
            return stock_image(Path(directory, "copy"))

    def observe(self, site: Site, image: bytes | None) -> None:
        """The local state is `image` now."""
        if named(image) != named(site.image):
            site.image = image
            site.pending.append(named(image))
        self.follow(site)

    def observe_two(self, site: Site, image: bytes | None, between: set[str]) -> None:
        """The local state is `image` now, after one or two commits; the content between them is one of `between`."""
        new = self.line.follow()
        for name, passed in zip(new, self.line.images[self.line.head - len(new) + 1 :], strict=True):
            assert name == named(image) or self.content(passed) in between, f"the log has a state that never was: {self.story()}"
            site.pending.append(name)
        if named(image) != (new[-1] if new else named(site.image)):
            site.pending.append(named(image))
        site.image = image
        self.follow(site, new)

    def follow(self, acting: Site | None = None, seen: Sequence[str] = ()) -> None:
        """Every new state in the log was had by a machine that had all before it. `seen`: those that were looked at already."""
        new = [*seen, *self.line.follow()]
        first = self.line.head - len(new) + 1
        for txid, name in enumerate(new, first):
            sites = sorted(self.sites, key=lambda site: site is not acting)
            writers = [site for site in sites if site.synced == txid - 1 and name in site.pending]
            if not writers and name == self.line.names[txid - 1]:
                # A commit that changed nothing is stored, too: of a machine that was there.
                idle = [site for site in sites if site.synced == txid - 1]
                assert idle, f"txid {txid}: nobody was at {txid - 1}: {self.story()}"
                idle[0].synced = txid
                FIGURES["empty"] += 1
                continue
            assert writers, f"txid {txid} ({name}) is no state of a machine that was at {txid - 1}: {self.story()}"
            for site in writers:  # several: copies of one another that did the same
                site.loose = site.loose or site is not writers[0]
                at = site.pending.index(name) + 1
                self.passed.update(site.pending[:at])
                site.pending, site.synced = site.pending[at:], txid
            FIGURES["stored"] += 1

    def stored(self, site: Site) -> None:
        """What was promised: the log is at the local state."""
        self.follow(site)
        assert self.line.names[-1] == named(site.image), f"acknowledged, and not stored: {self.story()}"
        self.based(site)

    def based(self, site: Site) -> None:
        self.passed.update(site.pending)
        site.pending, site.synced, site.loose = [], self.line.head, False

    def story(self) -> str:
        rows = [
            f"{site.directory.name}: at {named(site.image)}, synced {site.synced}, pending {site.pending}, loose {site.loose}"
            for site in self.sites
        ]
        return f"head {self.line.head}, line {self.line.names}; " + "; ".join(rows)

    # --- acting --------------------------------------------------------------------------------------------------------

    def ask(self, process: Process, do: str, *, may_be: Iterable[str] = (), **more: Any) -> tuple[str, str, bytes | None] | None:
        """The answer; None if the process died of it, and left one of the contents that `may_be` (or what was there)."""
        FIGURES[do] += 1
        self.idle += 1
        try:
            return process.remote.ask(do, **more)
        except Died:
            self.died(process, may_be)
            return None

    def died(self, process: Process, may_be: Iterable[str] = ()) -> None:
        FIGURES["crashes"] += 1
        self.calm = 0
        site = process.site
        site.processes.remove(process)
        before = self.content(site.image)
        found = self.peek(site)
        assert self.content(found) in {before, *may_be}, f"a crash left another state: {self.story()}"
        self.observe(site, found)

    def write(self, process: Process, do: str, work: Callable[[apsw.Connection], None] | None, **more: Any) -> None:
        """One commit, by `do`; `work` does the same to stock SQLite."""
        site = process.site
        after = self.expected(site.image, work)
        could_fail = process.remote.failing
        answer = self.ask(process, do, may_be=[after], **more)
        if answer is None:
            return
        error, text, image = answer
        process.held = False
        image = image if image is not None else self.peek(site)
        if error == "BusyError" and more.get("style") in ("with", "savepoint"):
            # It had read first: then SQLite does not wait while a checkpoint in the background holds the write lock.
            FIGURES[error] += 1
            assert named(image) == named(site.image)
            return
        assert self.content(image) == after, f"{do} {error} {text} left another content: {self.story()}"
        changed = named(image) != named(site.image)
        FIGURES["commits"] += changed
        self.calm, self.idle = self.calm + 1, 0
        self.observe(site, image)
        if error:
            self.excuse(process, error, text, could_fail)
        elif changed and site.options["ack"] != "local":
            self.stored(site)

    def excuse(self, process: Process, error: str, text: str, could_fail: bool) -> None:
        """Errors that have a reason."""
        site = process.site
        FIGURES[error] += 1
        behind = site.synced < self.line.head
        if error in ("ReplicationError", "StoreError"):
            assert could_fail or process.fenced, f"{text}: {self.story()}"
        elif error in ("FencedError", "ConflictError"):
            assert process.fenced or behind or site.loose, f"{text}: {self.story()}"
            process.fenced = True
        else:
            raise AssertionError(f"{error}: {text}: {self.story()}")

    def processes(self) -> list[Process]:
        return [process for site in self.sites for process in site.processes]

    def writers(self) -> list[tuple[Process, int]]:
        """Connections outside a transaction."""
        return [(process, slot) for process in self.processes() for slot, holds in process.slots.items() if holds is None]

    def open(self, process: Process, slot: int) -> None:
        """Opens a connection; the first of a process boots, and does what the model says."""
        site, policy = process.site, process.policy
        self.follow()
        first = not process.slots
        local, head = site.image, self.line.images[-1] or None
        could_fail = process.remote.failing
        others = any(other.slots for other in site.processes if other is not process)
        forgotten = self.forgotten(site)
        FIGURES["boots"] += first
        self.calm = 0
        answer = self.ask(process, "open", may_be=[self.content(head)], slot=slot, policy=policy)
        if answer is None:
            if head is not None and named(site.image) == named(head):
                self.based(site)  # the file was in place
            elif local is None:
                site.pending = [named(site.image)] if site.image else []
            return
        error, text, image = answer
        if error:
            FIGURES[error] += 1
            found = self.peek(site)
            assert named(found) == named(local), f"{error}: {text}: and the file was changed: {self.story()}"
            if error == "ConflictError":
                dirty = bool(site.pending) and (site.loose or site.synced < self.line.head)
                assert dirty or forgotten or (others and site.synced < self.line.head), f"{text}: {self.story()}"
            else:
                assert error in ("StoreError", "TransientError", "ReplicationError"), f"{error}: {text}"
                assert could_fail, f"{text}: {self.story()}"
            self.follow(site)
            return
        process.slots[slot] = None
        image = image if image is not None else self.peek(site)
        if not first:
            assert named(image) == named(local), f"opened once more, and changed: {self.story()}"
            return
        self.booted(process, local, head, image)

    def forgotten(self, site: Site) -> bool:
        """Is the local state an earlier one that may have been pruned? Then nothing tells that it was one."""
        name = named(site.image)
        known = [txid for txid, earlier in enumerate(self.line.names) if earlier == name]
        return bool(site.image) and (max(known) < self.line.kept if known else site.synced < self.line.kept)

    def booted(self, process: Process, local: bytes | None, head: bytes | None, image: bytes | None) -> None:
        site, policy = process.site, process.policy
        forgotten = self.forgotten(site)
        site.opened_in = site.boot
        # Another machine's worker may have gone on while this one booted: any head since then will do.
        before = self.line.head
        current = site.synced == before
        diverged = bool(local) and not current and (named(local) not in self.line.names or forgotten)
        if diverged and policy != "error":
            site.synced, site.pending = before, [named(local)]
        self.follow()
        heads = [txid for txid in range(before, self.line.head + 1) if txid and self.line.names[txid] == named(image)]
        keeps, follows = named(image) == named(local), bool(heads)
        if head is None and not (local is None and follows):
            if local is None:
                assert self.content(image) == self.content(None), "a new database is empty"
                site.image, site.pending = image, [named(image)]
                process.held = True
                return
            assert keeps, f"the first open changed the file: {self.story()}"
            self.stored(site)
        elif local is None or named(local) == named(head):
            assert follows, f"booted to another state than the head: {self.story()}"
            site.image = image
            self.based(site)
            site.synced = heads[-1]
        elif current:
            known = named(local) in self.line.names or named(local) in self.passed
            assert keeps or (follows and site.loose and known), f"local commits were thrown away: {self.story()}"
            site.image = image
            if policy == "skip" and site.loose and self.line.names[-1] != named(image):
                process.held = bool(site.pending)  # its descent was not proved
            else:
                self.stored(site)
        elif follows and not keeps and forgotten:
            site.image = image
            self.based(site)
            site.synced = heads[-1]
        elif not forgotten and (named(local) in self.line.names or (named(local) in self.passed and follows)):
            assert follows, f"not brought forward: {self.story()}"
            site.image = image
            self.based(site)
            site.synced = heads[-1]
        else:
            assert policy != "error", f"a diverged file was opened: {self.story()}"
            assert keeps, f"policy {policy} replaced the local file: {self.story()}"
            if policy == "force":
                self.stored(site)
            else:
                process.held = bool(site.pending)

    def end_all(self, site: Site) -> None:
        for process in list(site.processes):
            process.remote.kill()
            self.died(process)

    def quiet(self) -> bool:
        """Most steps are commits: something to lose has to be there before the next blow."""
        return self.calm >= 3 or not self.writers()

    def busy(self) -> bool:
        """There have been commits of late."""
        return self.idle < 4

    def failed(self) -> None:
        if not FAILURES:
            FAILURES.append("\n".join([*self.trace, traceback.format_exc()]))
