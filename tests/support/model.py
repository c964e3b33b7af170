"""A model of the promise, driven by hypothesis: real processes commit, die, lose the store, meet rivals; the model knows what must remain.

The model of a machine is the bytes of its database as they stand locally, and the list of states since the one that the log has
(`pending`). The model of the bucket is the line of states that an independent reader makes of the log. After each step:

* the log has only grown, every hash and link of it is right, and each new state is one that a machine had, in the order it had them,
  and a machine that had everything before: nothing is invented, doubled, torn, or written by a fenced writer;
* merged edges and snapshots lead from states of that line to states of it; what is gone was old, and all that is promised is within reach;
* a step that returned (a commit, unless ack=local; flush, close, open) has left the log at exactly the local state;
* no page object is ahead of the log; after a flush the view is the database, byte for byte;
* what a process that died leaves is the state before or after its last step, and the next open keeps it, or brings it forward;
* the content of each new state is what stock SQLite makes of the same statements.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import apsw
from hypothesis import strategies as st
from hypothesis.stateful import precondition

import bottomless_wal
from bottomless_wal.core.errors import RestoreError
from bottomless_wal.core.failpoints import POINTS
from tests.support.invariants import FAILURES, FIGURES, Books, step
from tests.support.model_process import KINDS, Died, Remote, odd, transact
from tests.support.model_state import NAME, RETENTION, Process, Site, named

__all__ = ["FAILURES", "FIGURES", "Model"]

CHECKPOINTS = ("PASSIVE", "FULL", "RESTART", "TRUNCATE", "NOOP")


def _each(con: apsw.Connection, ops: list[list[Any]]) -> None:
    for op in ops:
        transact(con, [op], "begin", "commit")


class Model(Books):
    """See the module."""

    pick = st.integers(0, 30)
    seed = st.integers(0, 1 << 20)
    operation = st.tuples(
        st.sampled_from(["insert", "insert", "update", "delete", "toggle", "toggle", "table", "drop", "savepoint", "bulk"]),
        seed,
        st.sampled_from([10, 300, 3000]),
    ).map(list)

    @precondition(lambda self: not self.processes() or (self.quiet() and any(len(site.processes) < 2 for site in self.sites)))
    @step(
        pick=pick,
        ack=st.sampled_from(["pages", "pages", "log", "local"]),
        pages=st.sampled_from(["commit", "commit", "checkpoint", "off"]),
        compaction=st.booleans(),
        coarse=st.booleans(),
    )
    def start_a_process(self, pick: int, ack: str, pages: str, compaction: bool = False, coarse: bool = False) -> None:
        sites = [site for site in self.sites if len(site.processes) < 2]
        site = sites[pick % len(sites)]
        if not site.processes:
            site.options = {"ack": "log" if ack == "pages" and pages != "commit" else ack, "pages": pages, "compaction": compaction}
            site.options |= {"retention": RETENTION, "keep_snapshots": 2}
        options = {"endpoint": self.place.url, "bucket": self.place.bucket, "retry_timeout": 1.0, **site.options, "coarse": coarse}
        process = Process(site, Remote(self.nursery, site.path, options, site.boot, self.log))
        site.processes.append(process)
        self.open(process, 0)

    @precondition(lambda self: self.busy() and self.processes())
    @step(pick=pick)
    def open_a_connection(self, pick: int) -> None:
        process = self.processes()[pick % len(self.processes())]
        free = [slot for slot in range(3) if slot not in process.slots]
        if free:
            self.open(process, free[0])

    @precondition(lambda self: self.quiet() and self.writers())
    @step(pick=pick, how=st.sampled_from(["close", "close", "collect"]))
    def close_a_connection(self, pick: int, how: str = "close") -> None:
        """By hand, or by the collector."""
        process, slot = self.writers()[pick % len(self.writers())]
        could_fail = process.remote.failing
        held = process.held
        answer = self.ask(process, how, slot=slot)
        if answer is None:
            return
        assert not answer[0], answer
        del process.slots[slot]
        self.calm = 0
        self.at_rest(process, could_fail or held)

    def at_rest(self, process: Process, excused: bool) -> None:
        """A process has closed a connection, or all."""
        site = process.site
        self.observe(site, self.peek(site))
        if not process.slots:
            if not excused and not process.fenced and site.synced == self.line.head and not site.loose:
                self.stored(site)
            process.fenced = False

    @precondition(lambda self: self.writers())
    @step(
        pick=pick,
        ops=st.lists(operation, min_size=1, max_size=4),
        style=st.sampled_from(["begin", "with", "savepoint"]),
        end=st.sampled_from(["commit", "commit", "commit", "rollback"]),
    )
    def transaction(self, pick: int, ops: list[list[Any]], style: str, end: str) -> None:
        process, slot = self.writers()[pick % len(self.writers())]
        work = (lambda con: transact(con, ops, "begin", "commit")) if end == "commit" else None
        self.write(process, "transact", work, slot=slot, ops=ops, style=style, end=end)

    @precondition(lambda self: self.writers())
    @step(pick=pick, op=operation)
    def small_commit(self, pick: int, op: list[Any]) -> None:
        self.transaction(pick, [op], "begin", "commit")

    @precondition(lambda self: self.writers())
    @step(pick=pick, times=st.integers(1, 4))
    def there_and_back(self, pick: int, times: int) -> None:
        """Commits whose states have the very same bytes, over and over."""
        for _ in range(times):
            if self.writers():
                self.transaction(pick, [["toggle", 0, 0]], "begin", "commit")

    @precondition(lambda self: self.writers() and not any(process.remote.failing or process.armed for process in self.processes()))
    @step(pick=pick, seed=seed, times=st.integers(6, 20))
    def many_commits(self, pick: int, seed: int, times: int) -> None:
        """Enough for merged edges, and for edges merged from those."""
        for number in range(times):
            if self.writers():
                self.transaction(pick, [["update" if number % 3 else "insert", seed + number, 300]], "begin", "commit")

    @precondition(lambda self: self.writers())
    @step(pick=pick, kind=st.sampled_from(["blob", "returning", "fail", "backup"]), seed=seed)
    def odd_commit(self, pick: int, kind: str, seed: int) -> None:
        process, slot = self.writers()[pick % len(self.writers())]
        self.write(process, "odd", lambda con: odd(con, kind, seed), slot=slot, kind=kind, seed=seed)

    @precondition(lambda self: self.pairs() and not any(process.remote.failing or process.armed for process in self.processes()))
    @step(pick=pick, op=operation, delay=st.sampled_from([0.0001, 0.0005, 0.002, 0.005]))
    def a_signal_handler_commits(self, pick: int, op: list[Any], delay: float) -> None:
        """In the thread that is within a transaction, or within its commit, of another connection."""
        process, slot, other = self.pairs()[pick % len(self.pairs())]
        site, toggle = process.site, ["toggle", 0, 0]
        one_by_one = [[toggle], [op], [toggle, op], [op, toggle]]
        contents = {self.expected(site.image, lambda con, ops=ops: _each(con, ops)) for ops in one_by_one}
        FIGURES["signal handlers"] += 1
        answer = self.ask(process, "signalled", slot=slot, other=other, ops=[op], delay=delay)
        assert answer is not None
        error, text, image = answer
        process.held = False
        image = image if image is not None else self.peek(site)
        assert self.content(image) in contents | {self.content(site.image)}, f"{error} {text}: another content: {self.story()}"
        self.calm, self.idle = self.calm + 1, 0
        self.observe_two(site, image, contents)
        if error in ("FencedError", "ConflictError"):
            self.excuse(process, error, text, False)
        elif error:
            # The handler came while this very thread looked at the WAL, or held SQLite's lock: it is told, and nobody waits.
            FIGURES[f"signal handlers: {error}"] += 1
            assert error in ("BusyError", "ReplicationError"), f"{error}: {text}"
        else:
            self.stored(site)

    @precondition(lambda self: self.busy() and self.writers())
    @step(pick=pick, kind=st.sampled_from(["0", "2", "incremental", "incremental"]))
    def vacuum(self, pick: int, kind: str) -> None:
        process, slot = self.writers()[pick % len(self.writers())]
        self.write(process, "vacuum", None, slot=slot, kind=kind)

    @precondition(lambda self: self.busy() and self.writers())
    @step(pick=pick, mode=st.sampled_from(CHECKPOINTS))
    def checkpoint(self, pick: int, mode: str) -> None:
        process, slot = self.writers()[pick % len(self.writers())]
        answer = self.ask(process, "checkpoint", slot=slot, mode=mode)
        if answer is not None:
            assert not answer[0], answer[1]
            assert named(answer[2]) == named(process.site.image)
            self.follow(process.site)

    @precondition(lambda self: self.busy() and self.writers())
    @step(pick=pick)
    def hold_a_snapshot(self, pick: int) -> None:
        process, slot = self.writers()[pick % len(self.writers())]
        if self.ask(process, "hold", slot=slot) is not None:
            process.slots[slot] = named(process.site.image)

    @precondition(lambda self: any(holds is not None for process in self.processes() for holds in process.slots.values()))
    @step(pick=pick)
    def let_a_snapshot_go(self, pick: int) -> None:
        held = [(process, slot) for process in self.processes() for slot, holds in process.slots.items() if holds is not None]
        process, slot = held[pick % len(held)]
        answer = self.ask(process, "let_go", slot=slot)
        if answer is not None:
            assert (answer[0], named(answer[2])) == ("", process.slots[slot]), "the reader's snapshot changed"
            process.slots[slot] = None

    @precondition(lambda self: self.busy() and self.writers())
    @step(pick=pick)
    def flush(self, pick: int) -> None:
        process, slot = self.writers()[pick % len(self.writers())]
        could_fail = process.remote.failing
        answer = self.ask(process, "flush", slot=slot)
        if answer is None:
            return
        process.held = False
        assert named(answer[2]) == named(process.site.image), "a flush changed the database"
        self.follow(process.site)
        if answer[0]:
            self.excuse(process, answer[0], answer[1], could_fail)
            return
        if process.site.synced < self.line.head and not process.site.pending:
            return  # a rival has gone on, and this machine has nothing that it could hear of it by
        self.stored(process.site)
        if process.site.options["pages"] != "off":
            assert self.line.bucket.view_image(NAME) == process.site.image, f"the page view is not the database: {self.story()}"

    @precondition(lambda self: self.busy() and self.processes())
    @step(pick=pick, point=st.sampled_from(sorted(POINTS)), passes=st.integers(0, 3))
    def arm_a_crash(self, pick: int, point: str, passes: int) -> None:
        process = self.processes()[pick % len(self.processes())]
        process.armed = True
        self.ask(process, "arm", point=point, passes=passes)

    @precondition(lambda self: self.busy() and self.processes())
    @step(
        pick=pick,
        kinds=st.sampled_from([list(KINDS), ["create"], ["put"], ["list"], ["get", "read"], ["upload"], ["create", "put"], ["delete"]]),
        part=st.sampled_from(["", "", "log", "pages"]),
        after=st.booleans(),
        skip=st.integers(0, 4),
        times=st.sampled_from([-1, 1, 2, 5]),
    )
    def outage(self, pick: int, **rule: Any) -> None:
        FIGURES["outages"] += 1
        self.ask(self.processes()[pick % len(self.processes())], "fail", rule=rule)

    @precondition(lambda self: any(process.remote.failing for process in self.processes()))
    @step()
    def the_store_is_back(self) -> None:
        for process in self.processes():
            if process.remote.failing:
                self.ask(process, "fail", rule=None)

    @precondition(lambda self: self.quiet() and self.processes())
    @step(pick=pick)
    def kill(self, pick: int) -> None:
        process = self.processes()[pick % len(self.processes())]
        process.remote.kill()
        self.died(process)

    @precondition(lambda self: self.quiet() and self.processes())
    @step(pick=pick)
    def leave(self, pick: int) -> None:
        """The process exits, its connections open."""
        process = self.processes()[pick % len(self.processes())]
        excused = process.remote.failing or process.held or process.armed or not process.slots
        self.ask(process, "exit")
        assert process not in process.site.processes
        process.slots.clear()
        FIGURES["crashes"] -= 1
        self.at_rest(process, excused)

    @precondition(lambda self: self.quiet() and any(site.image for site in self.sites))
    @step(pick=pick, what=st.sampled_from(["everything", "everything", "index", "wal"]))
    def wipe(self, pick: int, what: str) -> None:
        site = self.sites[pick % len(self.sites)]
        self.calm = 0
        if what == "index":
            for path in site.directory.glob(f"{NAME}-bottomless"):
                path.unlink()
            site.loose = True
            return
        if what == "everything":
            FIGURES["wipes"] += 1
            self.end_all(site)
            for path in site.files():
                path.unlink()
            site.image, site.pending, site.synced, site.loose = None, [], 0, False

    @precondition(lambda self: self.quiet() and any(site.processes and site.image and site.synced > 0 for site in self.sites))
    @step(pick=pick)
    def the_file_is_truncated(self, pick: int) -> None:
        """To nothing, under those who have it open: nobody says any more that anything is stored, and the next open restores the head."""
        sites = [site for site in self.sites if site.processes and site.image and site.synced > 0]
        site = sites[pick % len(sites)]
        self.follow(site)
        FIGURES["truncated"] += 1
        self.calm = 0
        os.truncate(site.path, 0)
        for process in list(site.processes):
            for slot in process.slots:
                answer = process.remote.ask("flush", slot=slot)
                # Without its index the batch asks the store first; while the store is away, that is the error.
                errors = {"FilesLostError", "FencedError", "ConflictError"} | ({"ReplicationError"} if process.remote.failing else set())
                assert answer[0] in errors, f"{answer[:2]}: {self.story()}"
                break
            process.remote.kill()
            site.processes.remove(process)
        self.follow(site)  # what a batch had read before may have come in
        site.image, site.pending, site.synced, site.loose = None, [], 0, False

    @precondition(lambda self: any(site.image and not site.processes and not self.has_wal(site) for site in self.sites))
    @step(pick=pick)
    def save_a_backup(self, pick: int) -> None:
        """A copy of the main file, nothing else, as people make it."""
        sites = [site for site in self.sites if site.image and not site.processes and not self.has_wal(site)]
        site = sites[pick % len(sites)]
        site.backup = Path(tempfile.mkdtemp(dir=self.root)) / NAME
        shutil.copy(site.path, site.backup)

    @precondition(lambda self: any(site.image and site.processes for site in self.sites))
    @step(pick=pick)
    def save_a_backup_of_an_open_file(self, pick: int) -> None:
        """By VACUUM INTO of the state at this moment, which no segment may list."""
        sites = [site for site in self.sites if site.image and site.processes]
        site = sites[pick % len(sites)]
        site.backup = Path(tempfile.mkdtemp(dir=self.root)) / NAME
        site.backup.write_bytes(site.image or b"")

    @precondition(lambda self: self.quiet() and any(site.backup and site.image for site in self.sites))
    @step(pick=pick, how=st.sampled_from(["cp", "mv"]))
    def put_a_backup_in_place(self, pick: int, how: str) -> None:
        """Over the file at rest, its WAL removed; the index stays."""
        sites = [site for site in self.sites if site.backup and site.image]
        site = sites[pick % len(sites)]
        assert site.backup is not None
        self.end_all(site)
        self.follow()
        FIGURES["backups"] += 1
        self.calm = 0
        data = site.backup.read_bytes()
        for ending in ("-wal", "-shm"):
            Path(f"{site.path}{ending}").unlink(missing_ok=True)
        if how == "mv":
            copy = site.directory / "copy"
            copy.write_bytes(data)
            copy.rename(site.path)
        else:
            with open(site.path, "r+b") as file:
                file.write(data)
                file.truncate()
        site.image = self.peek(site)
        name = named(site.image)
        if name in self.line.names:
            site.synced, site.pending = max(n for n, known in enumerate(self.line.names) if known == name), []
        else:
            site.synced, site.pending = -1, [name]
        site.loose = True

    @precondition(lambda self: self.quiet() and self.line.head > 2 and self.at_head_and_at_rest())
    @step(pick=pick, share=st.integers(1, 4), seed=seed)
    def objects_vanish(self, pick: int, share: int, seed: int) -> None:
        """Segments below the head are deleted. Whoever opens the head next makes the log whole again by its close."""
        sites = self.at_head_and_at_rest()
        site = sites[pick % len(sites)]
        self.follow()
        head, rng = self.line.head, random.Random(seed)
        victims = [key for key, (pre, post, _) in self.line.edges.items() if post <= head and pre != head - 1 and rng.random() * 4 < share]
        self.line.vanished.update(victims)
        for key in victims:
            (self.line.root / key).unlink(missing_ok=True)
        FIGURES["vanished"] += len(victims)
        self.calm = 0
        self.line.kept = head
        self.line.follow()
        options = {"endpoint": self.place.url, "bucket": self.place.bucket, "ack": "log", "pages": "off"}
        site.options = {"ack": "log", "pages": "off"}
        process = Process(site, Remote(self.nursery, site.path, options, site.boot, self.log))
        site.processes.append(process)
        self.open(process, 0)
        if process not in site.processes or 0 not in process.slots:
            return
        answer = self.ask(process, "close", slot=0)
        assert answer is not None
        assert not answer[0], answer
        del process.slots[0]
        self.at_rest(process, False)
        process.remote.kill()
        site.processes.remove(process)
        assert self.line.head in self.line.within_reach(), f"the log was not mended: {self.story()}"

    @precondition(lambda self: self.quiet() and any(site.image and site.synced == self.line.head for site in self.sites))
    @step(pick=pick, seed=seed, restart=st.booleans())
    def foreign_write(self, pick: int, seed: int, restart: bool) -> None:
        """By a program that knows nothing of replication, while others have the file open, or nobody has.

        Not on an old state: that an edited old copy passes for a descendant is a limit that is told.
        """
        sites = [site for site in self.sites if site.image and site.synced == self.line.head]
        site = sites[pick % len(sites)]
        after = self.expected(site.image, lambda con: transact(con, [["insert", seed, 300]], "begin", "commit"))
        FIGURES["foreign"] += 1
        self.calm = 0
        if not any(process.slots for process in site.processes):
            site.loose = True  # it leaves no WAL: what it wrote looks like an old backup in the place of the file
        con = apsw.Connection(str(site.path))
        con.set_busy_timeout(5000)
        transact(con, [["insert", seed, 300]], "begin", "commit")
        if restart:
            try:
                con.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_RESTART)
            except apsw.BusyError:
                FIGURES["foreign checkpoints refused"] += 1
        image = con.serialize("main")
        con.close()
        assert self.content(image) == after
        self.observe(site, image)

    @precondition(lambda self: self.quiet() and len(self.sites) < 3)
    @step(pick=pick, copied=st.booleans())
    def another_machine(self, pick: int, copied: bool) -> None:
        source = self.sites[pick % len(self.sites)]
        self.calm = 0
        site = self.new_site()
        if copied:
            for path in source.files():
                shutil.copy2(path, site.directory)
            site.image, site.synced, site.pending, site.loose = self.peek(site), source.synced, list(source.pending), True
            assert named(site.image) == named(source.image), "a copy is no copy"

    @precondition(lambda self: any(not site.processes and site.image for site in self.sites))
    @step(pick=pick)
    def save_an_image(self, pick: int) -> None:
        sites = [site for site in self.sites if not site.processes and site.image]
        site = sites[pick % len(sites)]
        place = Path(tempfile.mkdtemp(dir=self.root))
        for path in site.files():
            shutil.copy2(path, place)
        site.saved = (place, site.image, site.synced, list(site.pending))

    @precondition(lambda self: self.quiet() and any(site.saved for site in self.sites))
    @step(pick=pick)
    def put_the_image_back(self, pick: int) -> None:
        sites = [site for site in self.sites if site.saved]
        site = sites[pick % len(sites)]
        assert site.saved is not None
        self.end_all(site)
        for path in site.files():
            path.unlink()
        place, site.image, site.synced, pending = site.saved
        for path in place.iterdir():
            shutil.copy2(path, site.directory)
        site.pending, site.loose = list(pending), True

    @precondition(lambda self: self.quiet() and any(site.image for site in self.sites))
    @step(pick=pick, share=st.integers(0, 8), torn=st.integers(0, 1100))
    def power_loss(self, pick: int, share: int, torn: int) -> None:
        """All processes die, and the end of the WAL, which no sync has reached, is lost."""
        sites = [site for site in self.sites if site.image]
        site = sites[pick % len(sites)]
        self.end_all(site)
        FIGURES["power losses"] += 1
        self.calm = 0
        site.boot += 1
        wal, shm = Path(f"{site.path}-wal"), Path(f"{site.path}-shm")
        if site.pending and (not wal.exists() or wal.stat().st_size < 32):
            site.loose = True  # written to by somebody else, and with the power went what could prove that it was upon the head
        if not wal.exists() or not shm.exists() or shm.stat().st_size < 200:
            return
        index, size = shm.read_bytes(), wal.stat().st_size
        last, copied = (int.from_bytes(index[at : at + 4], "little") for at in (16, 96))
        step = int.from_bytes(wal.read_bytes()[8:12], "big") + 24
        if size < 32 + last * step or copied > last:
            return  # the WAL is about to begin anew: its header is all that could be lost
        os.truncate(wal, min(size, 32 + (copied + (last - copied) * share // 8) * step + torn))
        shm.unlink()
        found = self.peek(site)
        name = named(found)
        assert name in self.contents, f"a power loss left a state that never was: {self.story()}"
        site.image = found
        if name in site.pending:
            site.pending = site.pending[: site.pending.index(name) + 1]
            # What was cut may reach back to a state before the head that had the same bytes.
            site.loose = site.loose or (share < 8 and name in self.line.names)
        elif name in self.line.names:
            site.synced, site.pending = max(n for n, known in enumerate(self.line.names) if known == name), []
        else:
            site.synced, site.pending, site.loose = -1, [name], True

    @precondition(lambda self: self.quiet() and self.conflicting())
    @step(pick=pick, how=st.sampled_from(["force", "skip", "restore", "reset"]))
    def rebase(self, pick: int, how: str) -> None:
        """The ways out of a conflict."""
        sites = self.conflicting()
        site = sites[pick % len(sites)]
        self.end_all(site)
        self.follow()
        options = {"endpoint": self.place.url, "bucket": self.place.bucket}
        FIGURES["rebased"] += 1
        if how == "restore" and not self.line.head:
            how = "force"  # nothing was ever stored
        if how == "restore":
            bottomless_wal.restore(site.path, force=True, **options)
            site.image = self.peek(site)
            self.stored(site)
        elif how == "reset" and site.image:
            bottomless_wal.reset_from_local(site.path, **options)
            site.synced, site.pending = self.line.head, [named(site.image)]
            self.stored(site)
        else:
            site.options = {"ack": "log", "pages": "commit"}
            process = Process(site, Remote(self.nursery, site.path, {**options, **site.options}, site.boot, self.log))
            process.policy = how if how != "reset" else "force"
            site.processes.append(process)
            self.open(process, 0)

    @precondition(lambda self: self.busy() and self.line.head)
    @step(pick=st.integers(0, 1000))
    def restore(self, pick: int) -> None:
        """Any txid, into a file of its own."""
        self.follow()
        self.idle += 1
        txid = 1 + pick % self.line.head
        output = self.root / "restored"
        FIGURES["restores"] += 1
        try:
            found = bottomless_wal.restore(NAME, output=output, txid=txid, force=True, endpoint=self.place.url, bucket=self.place.bucket)
        except RestoreError as error:
            self.follow()
            assert txid < self.line.kept, f"txid {txid} is promised: {error}: {self.story()}"
            FIGURES["states forgotten"] += 1
            return
        assert found.txid == txid
        assert output.read_bytes() == self.line.images[txid], f"txid {txid} is not restored byte for byte"

    # --- a history that stays short ------------------------------------------------------------------------------------

    @precondition(lambda self: self.quiet() and self.line.head > 2)
    @step(hours=st.sampled_from([1, 4, 4, 25, 200]))
    def hours_pass(self, hours: int) -> None:
        """On the server, and for all who ask it; nobody has a clock of his own that matters."""
        FIGURES["hours"] += hours
        self.hours += hours
        (self.root / "store" / "hours").write_text(str(self.hours))

    @precondition(lambda self: self.line.head > 4)
    @step(
        what=st.sampled_from(["compact", "snapshot", "prune", "prune", "forget"]),
        days=st.sampled_from([0, 2, 30]),
        point=st.sampled_from(["", "", "", "before merged", "after merged", "before prune", "within prune"]),
        passes=st.integers(0, 2),
    )
    def keep_it_short(self, what: str, days: int, point: str, passes: int) -> None:
        """By a command on some other machine, that may be killed."""
        self.idle += 1
        FIGURES[what] += 1
        options = {"endpoint": self.place.url, "bucket": self.place.bucket, "keep_snapshots": days, "retention": RETENTION}
        remote = Remote(self.nursery, self.root / NAME, options, 1, self.log)
        try:
            if point:
                remote.ask("arm", point=point, passes=passes)
            error, text, _ = remote.ask("keep", what=what, **({"older_than": RETENTION} if what == "forget" else {}))
            # What somebody has deleted cannot be the state that all the rest is to stand on.
            assert not error or (error == "RestoreError" and self.line.vanished), text
            remote.kill()
        except Died:
            assert point
            FIGURES["upkeep killed"] += 1
        self.follow()

    # --- which -----------------------------------------------------------------------------------------------------------

    def conflicting(self) -> list[Site]:
        """Machines whose file an open may refuse."""
        return [site for site in self.sites if site.pending and (site.synced < self.line.head or site.loose)]

    def at_head_and_at_rest(self) -> list[Site]:
        """Machines that hold the head, and nothing else, closed."""
        return [
            site
            for site in self.sites
            if not site.processes and not site.pending and not site.loose and site.image and site.synced == self.line.head
        ]

    def pairs(self) -> list[tuple[Process, int, int]]:
        """Two connections of one process, both outside a transaction, to a database that has tables.

        Not with ack=local: the state between the two commits, which is not seen from here, could be stored at any later time.
        """
        writers = self.writers()
        return [
            (process, slot, other)
            for process, slot in writers
            for process_of_other, other in writers
            if process is process_of_other and slot != other and self.line.head and process.site.options["ack"] != "local"
        ]

    @staticmethod
    def has_wal(site: Site) -> bool:
        """Is there a WAL beside the file?"""
        wal = Path(f"{site.path}-wal")
        return wal.exists() and wal.stat().st_size > 0

    # --- the end -------------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        try:
            for site in self.sites:
                self.end_all(site)
            self.follow()
            if self.line.head:
                self.epilogue()
        except Exception:  # whatever it is goes on; the steps that led to it are kept
            self.failed()
            raise
        finally:
            FIGURES["merged"] += self.line.merged
            FIGURES["strays"] += self.line.strays
            for process in self.processes():
                process.remote.kill()
            shutil.rmtree(self.root)

    def epilogue(self) -> None:
        """The machines are lost: what comes back is the head, and all is in order."""
        site = self.new_site()
        self.start_a_process(len([s for s in self.sites if len(s.processes) < 2]) - 1, "pages", "commit")
        assert named(site.image) == self.line.names[-1]
        (process,) = site.processes
        self.flush(self.writers().index((process, 0)))
        options = {"endpoint": self.place.url, "bucket": self.place.bucket, "retention": RETENTION}
        report = bottomless_wal.verify(NAME, deep=True, integrity=True, **options)
        # (Of what somebody has deleted, the earlier states stay lost.)
        assert not [problem for problem in report.problems if problem.kind != "gap" or not self.line.vanished], report.problems
