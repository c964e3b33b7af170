"""Answers that are lost, late, cut, or another's: through the whole of VFS, worker and boot, an acknowledged commit is stored once.

Between the machines and a real server stands a proxy that ends connections before, within and after a request. Whatever it does, the
history stays one line, each row is in it once, and log, page view and file are the same bytes.
"""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest

import bottomless_wal
from bottomless_wal import BottomlessError, ReplicationError, StoreError
from bottomless_wal.history import log
from tests.support.cluster import Machine, child, rows, spawn, until
from tests.support.faultproxy import ALWAYS, Fault, answer, cut_off, damaged, late, lost_answer, misstated, outage, portal, reset
from tests.support.networks import LOG, VIEW, Network, network, of_writer, patience


@pytest.fixture
def net(request: pytest.FixtureRequest, own_environment: None, tmp_path: Path) -> Iterator[Network]:
    """Before a server that honours create-only writes."""
    with network("moto", request, tmp_path) as net:
        yield net


@pytest.fixture(params=["moto", "rclone"])
def any_net(request: pytest.FixtureRequest, own_environment: None, tmp_path: Path) -> Iterator[Network]:
    """Before one that honours them, and one that does not."""
    with network(request.param, request, tmp_path) as net:
        yield net


def opened(net: Network, **options: Any) -> tuple[Machine, apsw.Connection]:
    here = net.machine()
    con = here.connect(**options)
    con.execute("CREATE TABLE t(x)")
    bottomless_wal.flush(con)
    return here, con


def edge(pre: int, post: int) -> str:
    return f"{pre:016x}-{post:016x}"


def insert(con: apsw.Connection, *values: int) -> None:
    con.execute(f"INSERT INTO t VALUES {','.join(f'({value})' for value in values)}")


def refused(con: apsw.Connection, *values: int) -> None:
    """The commit stands, and is not acknowledged."""
    with pytest.raises(ReplicationError):
        insert(con, *values)
    assert not con.in_transaction
    assert rows(con, f"SELECT count(*) FROM t WHERE x IN ({','.join(map(str, values))})") == len(values)


def restart_wal(con: apsw.Connection) -> None:
    """The WAL begins anew, as soon as nobody reads it."""

    def truncated() -> bool:
        try:
            con.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        except apsw.BusyError:
            return False
        return True

    until(truncated)


# --- the answer to a commit is lost --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ack", ["pages", "log"])
def test_a_lost_answer_is_one_commit(any_net: Network, ack: str) -> None:
    here, con = opened(any_net, ack=ack)
    head = any_net.bucket.head("app.db")
    any_net.script(lost_answer("PUT", path=LOG), lost_answer("PUT", path=VIEW))
    insert(con, 1)
    bottomless_wal.flush(con)
    assert any_net.bucket.head("app.db") == head + 1
    any_net.accounts(con, here, 1)


def test_when_no_answer_comes_at_all_the_next_commit_finds_what_is_stored(any_net: Network) -> None:
    here, con = opened(any_net)
    patience(con, 0.5)
    any_net.script(lost_answer("PUT", path=LOG, times=ALWAYS), outage("HEAD", path=LOG, when=lambda _: any_net.puts(edge(1, 2)) > 0))
    refused(con, 1)
    assert any_net.bucket.head("app.db") == 2
    any_net.mend()
    insert(con, 2)
    assert any_net.bucket.head("app.db") == 3
    any_net.accounts(con, here, 2)


def test_a_batch_that_grows_while_its_answers_are_lost(any_net: Network) -> None:
    """Group commit: what is stored already stays one commit, whoever has joined meanwhile goes with the next."""
    here, con = opened(any_net, ack="log")
    patience(con, 0.6)
    any_net.script(
        lost_answer("PUT", path=edge(2, 3), times=ALWAYS), outage("HEAD", path=edge(2, 3), when=lambda _: any_net.puts(edge(2, 3)) > 0)
    )
    any_net.script(lost_answer("PUT", path=edge(1, 2), times=3))
    failed: list[BaseException] = []

    def work(thread: int) -> None:
        mine = here.connect(ack="log")
        for n in range(5):
            try:
                insert(mine, thread * 100 + n)
            except ReplicationError as error:
                failed.append(error)
            if failed:
                any_net.mend()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    any_net.accounts(con, here, 40)


def test_an_adopted_commit_is_in_the_log_whatever_becomes_of_its_page_objects(net: Network) -> None:
    here, con = opened(net, ack="log")
    patience(con, 0.5)
    net.script(lost_answer("PUT", path=LOG), outage("PUT", path=VIEW))
    insert(con, 1)  # ack=log: the page objects are nobody's to wait for
    net.accounts(con, here, 1)


def test_a_lost_answer_and_then_a_restart_of_the_wal(net: Network) -> None:
    here, con = opened(net)
    patience(con, 0.4)
    net.script(lost_answer("PUT", path=LOG, times=ALWAYS))
    refused(con, 1)
    restart_wal(con)
    net.script(outage())
    refused(con, 2)
    restart_wal(con)
    refused(con, 3)
    net.accounts(con, here, 3)


def test_the_first_commit_of_all_lost_unheard_then_others_then_a_close(net: Network) -> None:
    """The close takes the WAL along, with it the place where the stored commit ends: the file goes on from it all the same."""
    here = net.machine()
    con = here.connect()
    patience(con, 0.4)
    net.script(lost_answer("PUT", path=LOG, times=ALWAYS), outage("GET", path=LOG))
    with pytest.raises(ReplicationError):
        con.execute("CREATE TABLE t(x)")
    refused(con, 1)
    con.close()
    net.mend()
    con = here.connect()
    net.accounts(con, here, 1)
    assert net.bucket.edges("app.db") == [(0, 1), (1, 2)]


def test_a_late_request_that_arrives_when_its_commit_has_grown(net: Network) -> None:
    """The first attempt is still under way somewhere; between the look for it and the next attempt it arrives."""
    here, con = opened(net)
    patience(con, 0.5)
    assert net.line is not None
    line, arrive = net.line, threading.Event()
    net.script(late(arrive, "PUT", path=LOG), outage("PUT", path=LOG), outage("GET", path=LOG))
    refused(con, 1)
    assert net.bucket.head("app.db") == 1

    def meanwhile(not_there: bytes) -> bytes:
        done = line.carried_out
        arrive.set()
        until(lambda: line.carried_out > done)
        return not_there

    patience(con, 30.0)
    net.mend(Fault("GET", LOG, edit=meanwhile))
    insert(con, 2)
    assert arrive.is_set()
    assert net.bucket.edges("app.db") == [(0, 1), (1, 2), (2, 3)]
    net.accounts(con, here, 2)


# --- ... and the process is killed, or another one goes on ------------------------------------------------------------------------


KILLED = """
con = connect(argv[0])
con.execute("CREATE TABLE t(x)")
con.execute("INSERT INTO t VALUES (1)")
print("acknowledged", flush=True)
"""


@pytest.mark.parametrize("where", ["in place", "elsewhere"])
def test_the_writer_is_killed_before_it_hears_the_answer(net: Network, where: str) -> None:
    here = net.machine()
    net.script(lost_answer("PUT", path=edge(1, 2), times=ALWAYS))
    process = spawn(KILLED, here.path(), options=net.options)
    until(lambda: net.bucket.head("app.db") == 2)
    process.send_signal(signal.SIGKILL)
    assert "acknowledged" not in process.communicate()[0]
    net.mend()
    there = here if where == "in place" else net.machine()
    con = there.connect()
    insert(con, 2)
    assert net.bucket.head("app.db") == 3
    net.accounts(con, there, 2)


WRITES = """
con = connect(argv[0], ack="log", retry_timeout=0.5)
con.execute("INSERT INTO t VALUES (2)")
con.close()
"""


def test_another_process_on_the_file_adopts_what_this_one_could_not_hear_of(net: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, each with a line of its own, one of them bad."""
    here, con = opened(net)
    patience(con, 0.5)
    net.script(lost_answer("PUT", times=ALWAYS, when=of_writer("test")))
    refused(con, 1)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "other")
    child(WRITES, here.path(), options={**net.options, "retry_timeout": 30.0})
    assert net.bucket.head("app.db") == 3
    assert net.bucket.log_image("app.db") == con.serialize("main")
    status = bottomless_wal.status(con)
    assert status.pending_frames == 0
    net.accounts(con, here, 2)


# --- large ones, resets, and a log that begins with a snapshot --------------------------------------------------------------------


def existing(net: Network, megabytes: int = 0) -> Machine:
    """A machine with a database that nobody has replicated yet."""
    here = net.machine()
    con = here.stock()
    con.execute("CREATE TABLE t(x); CREATE TABLE filling(x); INSERT INTO t VALUES (1)")
    if megabytes:
        con.execute("INSERT INTO filling VALUES (randomblob(?))", (megabytes << 20,))
    con.close()
    return here


def test_a_large_database_whose_initial_replication_goes_unheard(net: Network) -> None:
    """Each of its requests: the beginning of the upload, a part, the completion, and the segment itself."""
    net.options["pages"] = "off"
    here = existing(net, megabytes=10)
    for method, path in [("POST", "uploads"), ("PUT", "partNumber=2&"), ("POST", "uploadId"), ("PUT", LOG)]:
        net.script(lost_answer(method, path=path), portal(method, path=path))
    con = here.connect()
    assert net.bucket.edges("app.db") == [(0, 1)]
    net.accounts(con, here, 1)


def test_a_large_first_commit_adopted_over_a_line_that_fails_again(net: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adopting has to read the body; where that fails, nothing is forgotten."""
    monkeypatch.setattr(log, "_INLINE_BYTES", 1 << 16)
    net.options["pages"] = "off"
    here = net.machine()
    con = here.connect()
    con.execute("BEGIN; CREATE TABLE t(x); CREATE TABLE filling(x); INSERT INTO filling VALUES (randomblob(300000))")
    patience(con, 5.0)
    net.script(answer(403, "AccessDenied", "GET"), *[lost_answer("PUT", path=LOG), answer(403, "AccessDenied", "PUT", path=LOG)])
    with pytest.raises(ReplicationError):
        con.execute("COMMIT")
    assert net.bucket.edges("app.db") == [(0, 1)]
    net.mend()
    net.script(answer(403, "AccessDenied", "GET", path="/body/", times=ALWAYS))
    refused(con, 1)
    restart_wal(con)
    refused(con, 2)
    net.accounts(con, here, 2)


@pytest.mark.parametrize("again", ["force", "error"])
def test_a_reset_that_goes_unheard_resets_once(net: Network, again: str) -> None:
    _, con = opened(net)
    con.close()
    here = existing(net)
    net.script(lost_answer("PUT", path=LOG), answer(403, "AccessDenied", "PUT", path=LOG, times=ALWAYS))
    with pytest.raises((StoreError, ReplicationError)):
        here.connect(initial_replication="force")
    net.mend()
    con = here.connect(initial_replication=again)
    assert net.bucket.edges("app.db") == [(0, 1), (1, 2)]
    assert net.bucket.segment("app.db", 1, 2).reset
    net.accounts(con, here, 1)


def test_a_log_that_begins_anew_with_a_snapshot_unheard(net: Network) -> None:
    """Only page objects are left: the log begins with the edge 0 -> n, the answer to which is lost."""
    _, con = opened(net)
    insert(con, 1)
    con.close()
    for key in net.bucket.listing("app.db-wal/"):
        net.bucket.delete(key)
    there = net.machine()
    net.script(lost_answer("PUT", path=LOG), answer(403, "AccessDenied", "PUT", path=LOG))
    with pytest.raises((StoreError, ReplicationError)):
        there.connect()
    net.mend()
    con = there.connect()
    bottomless_wal.flush(con)
    assert [post for _, post in net.bucket.edges("app.db")] == [2]
    assert (rows(con), con.serialize("main")) == (1, net.bucket.view_image("app.db"))
    insert(con, 2)
    assert net.bucket.view_image("app.db") == con.serialize("main")
    con.close()


# --- answers that are none ---------------------------------------------------------------------------------------------------------

BAD: list[tuple[str, Callable[..., Fault]]] = [
    ("cut off before", lambda **more: reset("PUT", **more)),
    ("cut off within the head", lambda **more: cut_off(0, **more)),
    ("cut off within the body", lambda **more: cut_off(100, **more)),
    ("500", lambda **more: answer(500, "InternalError", "PUT", **more)),
    ("503", lambda **more: answer(503, "SlowDown", "PUT", **more)),
    ("a portal", lambda **more: portal("PUT", **more)),
    ("a portal that redirects", lambda **more: answer(302, body=b"<html>log in</html>", method="PUT", **more)),
    ("a portal that moved", lambda **more: answer(307, body=b"<html>over there</html>", method="PUT", **more)),
    ("taken, says a proxy", lambda **more: answer(412, body=b"<html>Precondition Failed</html>", method="PUT", **more)),
    ("not found, says a proxy", lambda **more: answer(404, body=b"<html>Not Found</html>", method="PUT", **more)),
    ("nothing at all", lambda **more: answer(200, method="PUT", **more)),
]


def test_no_bad_answer_acknowledges_a_commit(net: Network) -> None:
    here, con = opened(net)
    for n, (name, fault) in enumerate(BAD, 1):
        patience(con, 0.1)
        net.script(fault(path=LOG, times=ALWAYS))
        refused(con, n)
        assert net.bucket.head("app.db") == n, name
        net.mend()
        patience(con, 30.0)
        net.script(fault(path=LOG))
        until(lambda: _flushed(con))
        assert net.bucket.head("app.db") == n + 1, name
        assert net.bucket.log_image("app.db") == con.serialize("main"), name
    net.accounts(con, here, len(BAD))


def _flushed(con: apsw.Connection) -> bool:
    try:
        bottomless_wal.flush(con)
    except ReplicationError as error:
        assert error.hint
        return False
    return True


def test_an_answer_of_another_length_than_it_says(net: Network) -> None:
    """The commit is stored, and whatever the client makes of the answer: it is stored once."""
    here, con = opened(net)
    for n, by in enumerate((-3, 3, 100_000)):
        net.script(misstated(by, "PUT", path=LOG), misstated(by, "PUT", path=VIEW))
        insert(con, n)
        assert net.bucket.head("app.db") == n + 2
    net.accounts(con, here, 3)


READING: list[tuple[str, Callable[..., Fault]]] = [
    ("cut off", lambda **more: reset("GET", **more)),
    ("503", lambda **more: answer(503, "SlowDown", "GET", **more)),
    ("truncated", lambda **more: Fault("GET", truncate=50, **more)),
    ("a portal", lambda **more: portal("GET", **more)),
    ("damaged", lambda **more: damaged("GET", **more)),
    ("longer, it says", lambda **more: misstated(7, "GET", **more)),
    ("shorter, it says", lambda **more: misstated(-7, "GET", **more)),
]


def two_states(net: Network) -> dict[str, bytes]:
    """Puts a history of two commits into the bucket, and returns the files of a machine that stayed behind at the first."""
    here, con = opened(net)
    con.close()
    earlier = here.files()
    con = here.connect()
    insert(con, 1)
    con.close()
    return earlier


def test_a_restore_over_a_bad_line_takes_longer_and_is_right(net: Network) -> None:
    two_states(net)
    image = net.bucket.log_image("app.db")
    for name, fault in READING:
        net.script(fault(path=edge(0, 1)), fault(path=edge(1, 2)))
        there = net.machine()
        there.connect().close()
        assert there.content() == image, name
        net.mend()


def test_an_old_machine_follows_over_a_bad_line_and_never_resets(net: Network) -> None:
    """An earlier state that a bad answer keeps from being recognised would, with this policy, become the head."""
    earlier = two_states(net)
    image = net.bucket.log_image("app.db")
    for name, fault in READING:
        old = net.machine()
        for file, content in earlier.items():
            (old.directory / file).write_bytes(content)
        net.script(fault(path=edge(0, 1)), fault(path=edge(1, 2)))
        old.connect(initial_replication="force").close()
        assert old.content() == image, name
        assert net.bucket.edges("app.db") == [(0, 1), (1, 2)], name
        net.mend()


@pytest.mark.parametrize("kind", ["segments", "page objects"])
def test_a_restore_from_nothing_but_bad_answers_leaves_nothing(net: Network, kind: str) -> None:
    two_states(net)
    if kind == "page objects":
        for key in net.bucket.listing("app.db-wal/"):
            net.bucket.delete(key)
    before = net.bucket.content()
    for name in ("damaged", "truncated", "a portal"):
        there = net.machine()
        net.script(dict(READING)[name](path=LOG if kind == "segments" else VIEW, times=ALWAYS))
        with pytest.raises(BottomlessError):
            there.connect(retry_timeout=0.5)
        assert there.files() == {}, name
        net.mend()
    assert net.bucket.content() == before
    con = net.machine().connect()
    assert rows(con) == 1
    con.close()


# --- throttling --------------------------------------------------------------------------------------------------------------------


def test_a_server_that_turns_away_every_third_request(net: Network) -> None:
    here, con = opened(net)
    dice = random.Random(20)
    net.script(answer(503, "SlowDown", times=ALWAYS, when=lambda _: dice.random() < 1 / 3))
    failed: list[BaseException] = []

    def work(thread: int) -> None:
        try:
            mine = here.connect()
            for n in range(3):
                insert(mine, thread * 100 + n)
        except apsw.Error as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert bottomless_wal.status(con).retries > 0
    net.accounts(con, here, 48)
