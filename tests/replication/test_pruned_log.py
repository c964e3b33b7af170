"""A history that is pruned, merged or damaged under those who rely on it: nobody acknowledges, deletes or believes what is not there."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import apsw
import pytest

import bottomless_wal
from bottomless_wal.admin import reset_from_local
from bottomless_wal.core import failpoints
from bottomless_wal.core.config import Config
from bottomless_wal.core.errors import ConflictError, CorruptionError, FencedError, ReplicationError, RestoreError, TransientError
from bottomless_wal.formats.segment import SegmentHeader
from bottomless_wal.history import compaction
from bottomless_wal.history.compaction import compact, snapshot
from bottomless_wal.history.log import RemoteLog
from bottomless_wal.history.retention import prune
from bottomless_wal.history.segment_list import SegmentInfo
from bottomless_wal.replication.index import IndexHeader, LocalIndex
from bottomless_wal.replication.index_rebuild import rebuild_index_from_log
from bottomless_wal.runtime.replica import INDEX_SUFFIX
from bottomless_wal.storage import Receipt, base, open_store
from bottomless_wal.storage.directory import DirectoryStore
from tests.support.cluster import Machine, World, child, refusal, rows
from tests.support.log_builder import Past

HOUR, DAY = 3600.0, 86400.0
QUIET = {"pages": "off", "ack": "log", "compaction": "off"}


class Clock:
    """The server's: `ahead` of ours by so many seconds."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Every answer of a directory store tells this clock's time, and what is stored is dated by it."""
    clock = Clock()
    doing, place = DirectoryStore._doing, DirectoryStore._place

    @contextlib.contextmanager
    def dated(self: DirectoryStore, *arguments: Any) -> Iterator[None]:
        with doing(self, *arguments):
            yield
        self._heard(clock())

    def placed(self: DirectoryStore, key: str, *arguments: Any) -> tuple[int, float]:
        size, _ = place(self, key, *arguments)
        date = clock()
        self._heard(date)
        os.utime(self._path(key), (date, date))
        return size, date

    monkeypatch.setattr(DirectoryStore, "_doing", dated)
    monkeypatch.setattr(DirectoryStore, "_place", placed)
    return clock


@pytest.fixture
def past(tmp_path: Path) -> Past:
    return Past(tmp_path)


def history(world: World) -> RemoteLog:
    """As another machine sees it."""
    return RemoteLog(open_store(Config.load(world.options, environ={})), "app.db")


def anew(past: Past) -> RemoteLog:
    """The same history, to one who remembers nothing of it."""
    past.history = RemoteLog(past.store, "app.db")
    return past.history


def ends(edges: Sequence[SegmentInfo]) -> list[tuple[int, int]]:
    return [(edge.pre, edge.post) for edge in edges]


def hurt(past: Past, pre: int, post: int) -> str:
    """Flips a bit of the edge, and leaves its date. Returns its key's last part."""
    path = past.root / "past" / f"app.db-wal/{pre:016x}-{post:016x}"
    status, data = path.stat(), bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(data)
    os.utime(path, (status.st_mtime, status.st_mtime))
    return path.name


def opened(world: World, commits: int = 1, **options: Any) -> tuple[Machine, apsw.Connection]:
    """A database at txid `commits`."""
    here = world.machine()
    con = here.connect(**{**QUIET, **options})
    con.execute("CREATE TABLE t(x)")
    for number in range(1, commits):
        con.execute("INSERT INTO t VALUES (?)", (number,))
    return here, con


def copied(world: World, machine: Machine) -> Machine:
    other = world.machine()
    shutil.copytree(machine.directory, other.directory, dirs_exist_ok=True)
    return other


def to_come(world: World, machine: Machine) -> dict[str, bytes]:
    """What five commits of that machine put into the log, and taken out of it again: `put` it back when they are to have happened."""
    before = world.bucket.content()
    con = machine.connect(**QUIET)
    for number in range(10, 15):
        con.execute("INSERT INTO t VALUES (?)", (number,))
    con.close()
    new = {key: data for key, data in world.bucket.content().items() if key not in before}
    for key in new:
        world.bucket.delete(key)
    assert world.bucket.content() == before
    return new


def put(world: World, objects: dict[str, bytes]) -> None:
    for key, data in objects.items():
        world.bucket.put(key, data)


# --- a writer that was away ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["an empty machine", "an earlier state", "the head without its index"])
def test_who_restored_for_hours_while_the_log_was_pruned_acknowledges_nothing(world: World, clock: Clock, how: str) -> None:
    """What it restored was the head before the restore began, and nothing tells that it is at its end: the first commit has to look."""
    here, con = opened(world)
    con.close()
    elsewhere = world.machine()
    if how == "an earlier state":
        elsewhere = copied(world, here)
        con = here.connect(**QUIET)
        con.execute("INSERT INTO t VALUES (1)")
        con.close()
    elif how == "the head without its index":
        elsewhere = copied(world, here)
        os.unlink(elsewhere.path() + INDEX_SUFFIX)
    others = to_come(world, here)

    def meanwhile() -> None:
        failpoints.disarm()
        put(world, others)
        log = history(world)
        snapshot(log, log.edges(), max(edge.post for edge in log.edges()))
        clock.ahead += 3 * HOUR
        assert prune(history(world), retention=0, keep_snapshots=0).edges

    failpoints.arm("after clear" if how == "the head without its index" else "before rename", meanwhile)
    left: dict[str, bytes] = {}
    if how == "the head without its index":
        # Its scan finds nothing to store, asks for the head, and the open looks again: the file is moved forward.
        rival = elsewhere.connect(**QUIET)
        left = world.bucket.content()
        assert bottomless_wal.status(rival).txid == max(edge.post for edge in history(world).edges())
        rival.close()
    else:
        rival = elsewhere.connect(**QUIET)
        left = world.bucket.content()
        for _ in range(2):
            with pytest.raises(FencedError):
                rival.execute("INSERT INTO t VALUES ('lost')")
        rival.close()
    assert not failpoints._armed, "it was stopped on its way"
    assert world.bucket.content() == left, "nothing stays of what was not acknowledged"
    con = here.connect(**QUIET)
    con.execute("INSERT INTO t VALUES (15)")
    world.stored(con, view=False)
    image = con.serialize("main")
    con.close()
    assert world.machine().connect(**QUIET).serialize("main") == image


@pytest.mark.parametrize("name", ["writer", "bottomless-writer", "bottomless upkeep app.db"])
def test_a_thread_of_the_users_hears_of_its_commit_whatever_its_name(world: World, name: str) -> None:
    """A thread that is called as ours are is none of ours."""
    here, con = opened(world)
    store = refusal(con)
    store.log()
    raised: list[BaseException | None] = []

    def work() -> None:
        own = here.connect(**QUIET)
        try:
            own.execute("INSERT INTO t VALUES (1)")
            raised.append(None)
        except apsw.Error as error:
            raised.append(error)
        own.close()

    thread = threading.Thread(target=work, name=name)
    thread.start()
    thread.join(20)
    assert [type(error) for error in raised] == [ReplicationError]
    store.nothing()
    bottomless_wal.flush(con)
    world.stored(con, view=False)


@pytest.mark.parametrize("again", ["flush", "commit", "open"])
@pytest.mark.parametrize("point", ["before intent", "before put", "after body"])
def test_a_commit_whose_body_was_pruned_is_not_acknowledged_and_goes_anew(
    world: World, clock: Clock, monkeypatch: pytest.MonkeyPatch, point: str, again: str
) -> None:
    """Suspended for a week between a body and its segment: the body was forgotten by then, and nobody may name it."""
    monkeypatch.setattr("bottomless_wal.history.log._INLINE_BYTES", 1 << 16)
    here, con = opened(world)

    def asleep() -> None:
        failpoints.disarm()
        clock.ahead += 8 * DAY
        assert len(prune(history(world), retention=DAY, keep_snapshots=3).bodies) == 1

    failpoints.arm(point, asleep)
    with pytest.raises(ReplicationError):
        con.execute("INSERT INTO t VALUES (randomblob(1000000))")
    assert not failpoints._armed
    assert world.bucket.edges("app.db") == [(0, 1)], "what lacks its pages is not in the log"
    if again == "flush":
        bottomless_wal.flush(con)
    elif again == "commit":
        con.execute("INSERT INTO t VALUES (2)")
    else:
        con.close()
        con = here.connect(**QUIET)
        bottomless_wal.flush(con)
    world.stored(con, view=False)
    image = con.serialize("main")
    con.close()
    assert world.machine().connect(**QUIET).serialize("main") == image


@pytest.mark.parametrize("left", [False, True], ids=["withdrawn", "killed before it could withdraw it"])
def test_a_stray_commit_upon_a_kept_snapshot_makes_its_writer_no_earlier_state(world: World, clock: Clock, left: bool) -> None:
    """A daily snapshot leads to where the stray begins, and nothing leads on from it: its file diverged, and is not thrown away."""
    here, con = opened(world, 4)
    con.close()
    other = copied(world, here)
    others = to_come(world, other)
    con = here.connect(**QUIET)
    log = history(world)
    snapshot(log, log.edges(), 4)
    clock.ahead += DAY
    put(world, others)
    snapshot(log, log.edges(), 9)
    clock.ahead += 8 * DAY
    prune(history(world), retention=DAY, keep_snapshots=30)
    kept = world.bucket.edges("app.db")
    assert {(0, 4), (0, 9), (8, 9)} <= set(kept)
    assert (4, 5) not in kept
    stray: dict[str, bytes] = {}
    key = f"app.db-wal/{4:016x}-{5:016x}"
    failpoints.arm("after put", lambda: stray.update({key: world.bucket.get(key)}))
    with pytest.raises(FencedError):
        con.execute("INSERT INTO t VALUES ('local')")
    failpoints.disarm()
    con.close()
    assert stray
    assert world.bucket.edges("app.db") == kept, "what was not acknowledged is withdrawn"
    if left:
        world.bucket.put(key, stray[key])
    before, remote = here.content(), world.bucket.content()
    for _ in range(2):
        with pytest.raises(ConflictError):
            here.connect(**QUIET)
        assert here.content() == before
        assert world.bucket.content() == remote
    stock = here.stock()
    assert rows(stock, "SELECT count(*) FROM t WHERE x = 'local'") == 1
    stock.close()
    con = other.connect(**QUIET)
    con.execute("INSERT INTO t VALUES (20)")
    image = con.serialize("main")
    con.close()
    assert world.machine().connect(**QUIET).serialize("main") == image


def test_a_log_that_begins_anew_from_page_objects_adopts_its_own_first_edge(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The edge was stored, its answer lost, and the repeated request told that the key is taken: no rival did that."""
    here = world.machine()
    con = here.connect()
    con.execute("CREATE TABLE t(x)")
    con.execute("INSERT INTO t VALUES (1)")
    bottomless_wal.flush(con)
    con.close()
    content = here.content()
    for key in world.bucket.listing("app.db-wal/"):
        world.bucket.delete(key)
    real = DirectoryStore.create
    lost: list[str] = []

    def create(self: DirectoryStore, key: str, data: bytes) -> Receipt:
        receipt = real(self, key, data)
        if not lost and "-wal/" in key:
            lost.append(key)
            receipt = real(self, key, data)
            assert not receipt.created
        return receipt

    monkeypatch.setattr(DirectoryStore, "create", create)
    elsewhere = world.machine()
    con = elsewhere.connect()
    assert lost == [f"app.db-wal/{0:016x}-{2:016x}"]
    assert con.serialize("main") == content
    con.execute("INSERT INTO t VALUES (2)")
    bottomless_wal.flush(con)
    world.stored(con)
    assert world.bucket.edges("app.db") == [(0, 2), (2, 3)]
    con.close()
    world.comes_back(elsewhere)


@pytest.mark.parametrize("later", ["at once", "by a flush"])
@pytest.mark.parametrize("ack", ["log", "pages"])
def test_a_stray_commit_whose_answer_was_lost_is_not_adopted(
    world: World, clock: Clock, monkeypatch: pytest.MonkeyPatch, ack: str, later: str
) -> None:
    """Away for days, its key pruned free: its request is stored, its answer lost, and the next one hears that the key is taken."""
    options = {"ack": ack, "pages": "commit" if ack == "pages" else "off"}
    here, con = opened(world, 3, **options)
    bottomless_wal.flush(con)
    con.close()
    others = to_come(world, copied(world, here))
    con = here.connect(**{**QUIET, **options})
    put(world, others)
    log = history(world)
    snapshot(log, log.edges(), 8)
    clock.ahead += 10 * DAY
    assert prune(history(world), retention=0, keep_snapshots=0).edges
    real = DirectoryStore.create
    lost: list[str] = []

    def create(self: DirectoryStore, key: str, data: bytes) -> Receipt:
        receipt = real(self, key, data)
        if not lost and "-wal/" in key:
            lost.append(key)
            if later == "by a flush":
                raise TransientError(f"{key}: no answer", hint="A test did that.")
            receipt = real(self, key, data)
            assert not receipt.created
        return receipt

    monkeypatch.setattr(DirectoryStore, "create", create)
    with pytest.raises((FencedError, ReplicationError) if later == "by a flush" else FencedError):
        con.execute("INSERT INTO t VALUES ('lost')")
    with pytest.raises(FencedError):
        bottomless_wal.flush(con)
    assert lost == [f"app.db-wal/{3:016x}-{4:016x}"]
    assert world.bucket.edges("app.db") == [(0, 8), (7, 8)], "and it is withdrawn"
    con.close()


def test_who_adopts_what_others_have_gone_on_from_leaves_it_in_the_history(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer was lost, another machine restored it, and has written since: it is fenced, and takes nothing away from them."""
    _, con = opened(world, 3)
    real = DirectoryStore.create
    elsewhere = world.machine()
    rivals: list[str] = []

    def create(self: DirectoryStore, key: str, data: bytes) -> Receipt:
        receipt = real(self, key, data)
        if not rivals and key.endswith(f"{4:016x}"):
            rivals.append(key)
            script = "con = connect(argv[0], pages='off', ack='log'); con.execute(\"INSERT INTO t VALUES ('went on')\"); con.close()"
            child(script, elsewhere.path(), options=world.options)
            receipt = real(self, key, data)
            assert not receipt.created
        return receipt

    monkeypatch.setattr(DirectoryStore, "create", create)
    with pytest.raises(FencedError, match="gone on from it"):
        con.execute("INSERT INTO t VALUES ('mine')")
    con.close()
    assert rivals
    assert world.bucket.edges("app.db") == [(n, n + 1) for n in range(5)]
    rival = elsewhere.connect(**QUIET)
    assert rows(rival, "SELECT count(*) FROM t WHERE x IN ('mine', 'went on')") == 2
    assert world.bucket.log_image("app.db") == rival.serialize("main")


def strayed(past: Past, rng: random.Random, txid: int) -> None:
    """The commit of a writer that was away: upon the state before `txid`, where all has been pruned; killed before it withdrew it."""
    states = past.states
    past.states = states[:txid]
    past.live(rng)
    past.states = states


def test_a_stray_commit_upon_a_kept_snapshot_is_restored_by_nobody(past: Past) -> None:
    rng = random.Random(21)
    past.live(rng, 3)
    snapshot(past.history, past.history.edges(), 3)
    past.date(0, 3)
    past.clock += HOUR
    past.live(rng, 1)
    past.clock += DAY
    past.live(rng, 17)
    snapshot(past.history, past.history.edges(), 21)
    past.date(0, 21)
    past.clock += 2 * DAY
    prune(past.history, retention=DAY, keep_snapshots=30)
    assert ends(past.history.edges()) == [(0, 3), (0, 21), (20, 21)]
    strayed(past, rng, 4)
    log = anew(past)
    with pytest.raises(RestoreError, match="no part of it"):
        past.image(4)
    assert past.image(21) == past.states[21].image
    assert past.image(3) == past.states[3].image
    with pytest.raises((CorruptionError, RestoreError)):
        snapshot(log, log.edges(), 4)
    assert (0, 4) not in ends(log.edges())


def test_a_stray_commit_that_ends_where_a_snapshot_does_keeps_nobody_from_the_head(past: Past) -> None:
    """The way over it is the cheaper one; what follows does not fit it, and is sound."""
    rng = random.Random(22)
    past.live(rng, 3)
    snapshot(past.history, past.history.edges(), 3)
    past.date(0, 3)
    past.clock += DAY
    past.commit({n: rng.randbytes(512) for n in range(1, 400)}, 399)
    snapshot(past.history, past.history.edges(), 4)
    past.date(0, 4)
    past.live(rng, 5)
    past.clock += 3 * DAY
    prune(past.history, retention=DAY, keep_snapshots=30)
    assert {(0, 3), (0, 4), (4, 5)} <= set(ends(past.history.edges()))
    strayed(past, rng, 4)
    for txid in (4, 5, 9):
        assert past.image(txid) == past.states[txid].image
    index = LocalIndex(str(past.root / "index"), beside=str(past.root))
    with index.locked():
        edges = past.history.edges()
        head = past.history.head(edges)
        assert head is not None
        header = IndexHeader(bytes(16), bytes(16), bytes(16))
        header = rebuild_index_from_log(past.history, index, header, head, edges, width=2)
        assert (header.txid, header.state) == (9, past.states[9].hash)
    index.close()


def test_a_listing_that_pruning_has_torn_is_made_once_more(past: Past) -> None:
    """What lies before the snapshot was listed, the snapshot not yet, and what lies behind no more."""
    past.live(random.Random(23), 30)
    torn = [edge for edge in past.history.edges() if edge.post <= 3 or edge.post == 30]
    snapshot(past.history, past.history.edges(), 30)
    assert past.image(30, torn) == past.states[30].image


def test_commits_are_dated_by_when_they_were_made_not_by_the_answer_before(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server was asked last hours ago: that is no time for a commit."""
    _, con = opened(world, 2)
    ahead = [0.0]
    real = base._running
    monkeypatch.setattr(base, "_running", lambda: real() + ahead[0])
    before = time.time()
    ahead[0] = 5 * HOUR
    con.execute("INSERT INTO t VALUES (9)")
    header = history(world).header(2, 3)
    assert header is not None
    assert 5 * HOUR - 1 < header.time_ms / 1000 - before < 5 * HOUR + 60
    con.close()


# --- a gap that a reset has healed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("txid", [5, 6, 7])
def test_an_earlier_state_after_a_healed_gap_is_fast_forwarded(world: World, txid: int) -> None:
    """No exact chain leads from nothing over the gap, and yet what leads on to the head is the history: after the gap, and at the reset."""
    images: dict[int, Machine] = {}
    here, con = opened(world)
    con.close()
    for number in range(2, 7):
        con = here.connect(**QUIET)
        con.execute("INSERT INTO t VALUES (?)", (number,))
        con.close()
        if number == txid:
            images[number] = copied(world, here)
    world.bucket.delete(f"app.db-wal/{2:016x}-{3:016x}")
    reset_from_local(here.path(), **world.options, **QUIET)
    if txid == 7:
        images[7] = copied(world, here)
    con = here.connect(**QUIET)
    con.execute("INSERT INTO t VALUES (8)")
    con.execute("INSERT INTO t VALUES (9)")
    image = con.serialize("main")
    con.close()
    assert max(world.bucket.edges("app.db")) == (8, 9)
    con = images[txid].connect(**QUIET)
    assert con.serialize("main") == image
    assert bottomless_wal.status(con).txid == 9


@pytest.mark.parametrize("damaged", [False, True])
def test_whose_state_is_none_of_a_long_history_is_told_so_by_few_headers(
    world: World, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    """A merged edge lists what it was merged from; where it is damaged those are asked."""
    here, con = opened(world, 5)
    early = copied(world, here)
    for number in range(150):
        con.execute("INSERT INTO t VALUES (?)", (number,))
    con.close()
    log = history(world)
    compact(log, log.edges())
    if damaged:
        key = f"app.db-wal/{0:016x}-{64:016x}"
        world.bucket.put(key, bytes(200) + world.bucket.get(key)[200:])
    stock = early.stock()
    stock.execute("INSERT INTO t VALUES ('elsewhere')")
    stock.close()
    os.unlink(early.path() + INDEX_SUFFIX)
    reads: list[str] = []
    real = DirectoryStore.read

    def read(self: DirectoryStore, key: str, start: int, length: int) -> bytes | None:
        reads.append(key)
        return real(self, key, start, length)

    monkeypatch.setattr(DirectoryStore, "read", read)
    with pytest.raises(ConflictError):
        early.connect(**QUIET)
    assert (len(set(reads)) > 80) if damaged else (len(set(reads)) < 40)


# --- damage --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["who made it", "another"])
@pytest.mark.parametrize("what", ["a flipped bit", "a missing body", "a missing segment"])
def test_over_a_base_that_is_not_sound_nothing_is_deleted(past: Past, monkeypatch: pytest.MonkeyPatch, what: str, who: str) -> None:
    """The base is all that is left of what lies before it: it is read, and what it lacks is named, before anything goes."""
    monkeypatch.setattr("bottomless_wal.history.log._INLINE_BYTES", 1 << 12)
    rng = random.Random(1)
    past.live(rng, 19)
    past.commit({number: rng.randbytes(512) for number in range(1, 41)}, 40)
    snapshot(past.history, past.history.edges(), 20)
    past.date(0, 20)
    log = past.history if who == "who made it" else anew(past)
    name = f"{0:016x}-{20:016x}"
    if what == "a flipped bit":
        hurt(past, 0, 20)
    else:
        if what == "a missing body":
            (path,) = (past.root / "past" / "app.db-wal" / "body").glob(f"{name}-*")
            path.unlink()
        past.live(rng, 1)
    past.clock += 10 * DAY
    before = ends(log.edges())
    if what == "a missing segment":
        listed = log.edges()
        past.store.delete([f"app.db-wal/{name}"])
        before.remove((0, 20))
        monkeypatch.setattr(log, "edges", lambda: listed)
        with pytest.raises(CorruptionError, match="nothing was deleted"):
            prune(log, retention=DAY, keep_snapshots=3)
        monkeypatch.undo()
    else:
        with pytest.raises(CorruptionError, match=name):
            prune(log, retention=DAY, keep_snapshots=3)
    assert ends(log.edges()) == before
    assert past.image(20) == past.states[20].image


def test_a_stray_commit_upon_a_kept_snapshot_is_not_merged(past: Past, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merged edge of the aligned size would stand where the history's own belongs, and lead to a state that it never had."""
    monkeypatch.setattr(compaction, "LEVELS", (4, 16))
    rng = random.Random(1)
    past.live(rng, 3)
    snapshot(past.history, past.history.edges(), 3)
    past.date(0, 3)
    past.clock += DAY
    past.live(rng, 17)
    snapshot(past.history, past.history.edges(), 20)
    past.date(0, 20)
    past.clock += 2 * DAY
    prune(past.history, retention=DAY, keep_snapshots=30)
    states, past.states = past.states, past.states[:4]
    past.live(random.Random(99), 1)
    past.states = states
    before = ends(past.history.edges())
    assert before == [(0, 3), (0, 20), (3, 4), (19, 20)]
    assert compact(past.history, past.history.edges()) == []
    assert ends(past.history.edges()) == before
    past.live(rng, 6)
    assert ends(compact(past.history, past.history.edges())) == [(20, 24)]
    for txid in (3, 20, 24, 26):
        assert past.image(txid) == past.states[txid].image


@pytest.mark.parametrize("told", [True, False], ids=["by a callback", "by a warning"])
def test_one_damaged_edge_does_not_keep_other_runs_from_being_merged(past: Past, caplog: pytest.LogCaptureFixture, told: bool) -> None:
    """The run that has it stays as it is, and the damage is told; all others are merged."""
    past.live(random.Random(2), 200)
    name = hurt(past, 30, 31)
    log = anew(past)
    found: list[CorruptionError] = []
    with caplog.at_level(logging.WARNING):
        added = compact(log, log.edges(), damaged=found.append) if told else compact(log, log.edges())
    assert ends(added) == [(64, 128), (128, 192)]
    assert [name in error.message for error in found] == [True] * told
    warned = any(name in record.getMessage() and record.levelno == logging.WARNING for record in caplog.records)
    assert warned is not told
    assert past.image(20) == past.states[20].image


@pytest.mark.parametrize("place", [(0, 64), (64, 128)])
def test_a_snapshot_goes_round_a_damaged_merged_edge(past: Past, place: tuple[int, int]) -> None:
    """Its commits are there, and lead as far."""
    past.live(random.Random(3), 200)
    compact(past.history, past.history.edges())
    hurt(past, *place)
    log = anew(past)
    made = snapshot(log, log.edges(), 200)
    assert made is not None
    assert past.image(200, [made]) == past.states[200].image


def test_a_snapshot_that_no_sound_way_leads_to_is_not_made(past: Past) -> None:
    """Where a commit itself is damaged nothing leads round it."""
    past.live(random.Random(4), 100)
    hurt(past, 30, 31)
    log = anew(past)
    with pytest.raises((RestoreError, CorruptionError)):
        snapshot(log, log.edges(), 100)
    assert (0, 100) not in ends(log.edges())


def test_a_snapshot_of_many_commits_stores_the_whole_database_twice_at_most(past: Past, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it costs grows with the commits, not with the commits times the database."""
    for number in range(1600):
        past.commit({number % 20 + 1: past.page(number, 512)} | ({} if number else {n: past.page(n, 512) for n in range(1, 21)}), 20)
    log = anew(past)
    real: Callable[..., Receipt] = log.append
    stored: list[tuple[int, int]] = []

    def append(header: SegmentHeader, blocks: Sequence[bytes] = ()) -> Receipt:
        stored.append((header.pre, header.post))
        return real(header, blocks)

    monkeypatch.setattr(log, "append", append)
    made = snapshot(log, log.edges(), 1600)
    assert made is not None
    assert 1 <= sum(pre == 0 for pre, _ in stored) <= 2
    assert past.image(1600, [made]) == past.states[1600].image
