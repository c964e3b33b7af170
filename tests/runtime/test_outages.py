"""The store is away: short outages are only time, long ones an error and nothing lost, and everything local goes on meanwhile."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import apsw
import pytest

import bottomless_wal
from bottomless_wal import ReplicationError, StoreError
from bottomless_wal.storage import open_store
from tests.support.cluster import Machine, child, rows, spawn, until
from tests.support.endpoints import MakeConfig
from tests.support.faketime import FakeTime
from tests.support.faultproxy import ALWAYS, Fault, FaultProxy, answer, hang, outage
from tests.support.networks import LOG, VIEW, Network, network, of_writer, patience


@pytest.fixture
def net(request: pytest.FixtureRequest, own_environment: None, tmp_path: Path) -> Iterator[Network]:
    with network("moto", request, tmp_path) as net:
        yield net


def opened(net: Network, **options: object) -> tuple[Machine, apsw.Connection]:
    here = net.machine()
    con = here.connect(**options)
    con.execute("CREATE TABLE t(x)")
    bottomless_wal.flush(con)
    return here, con


def insert(con: apsw.Connection, value: int) -> None:
    con.execute("INSERT INTO t VALUES (?)", (value,))


def down(net: Network) -> None:
    net.script(answer(503, "ServiceUnavailable", times=ALWAYS))


# --- how long ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [lambda: answer(503, "SlowDown", times=ALWAYS), lambda: hang(0.3, times=ALWAYS)],
    ids=["503", "silent"],
)
def test_an_outage_shorter_than_retry_timeout_is_only_time(net: Network, fault: Callable[[], Fault]) -> None:
    here, con = opened(net)
    assert net.line is not None
    before = len(net.line.requests)
    net.script(fault())

    def mend() -> None:
        assert net.line is not None
        line = net.line
        until(lambda: len(line.requests) >= before + 3)
        net.mend()

    thread = threading.Thread(target=mend)
    thread.start()
    insert(con, 1)
    thread.join()
    assert bottomless_wal.status(con).last_error is None
    assert bottomless_wal.status(con).retries >= 2
    net.accounts(con, here, 1)


@pytest.mark.parametrize("mended_by", ["itself", "the next commit", "flush", "the next open"])
def test_a_longer_one_is_an_error_and_what_is_pending_arrives(net: Network, mended_by: str) -> None:
    here, con = opened(net)
    patience(con, 0.3)
    down(net)
    with pytest.raises(ReplicationError, match=r"stand, but are not stored: .*503 ServiceUnavailable") as raised:
        insert(con, 1)
    assert "Do not repeat" in raised.value.hint
    status = bottomless_wal.status(con)
    assert status.pending_frames
    assert status.lag > 0
    net.mend()
    if mended_by == "flush":
        patience(con, 30.0)
        bottomless_wal.flush(con)
    elif mended_by == "the next commit":
        patience(con, 30.0)
        insert(con, 2)
    elif mended_by == "the next open":
        down(net)
        con.close()
        net.mend()
        con = here.connect()
    else:
        patience(con, 30.0)
    until(lambda: bottomless_wal.status(con).pending_frames == 0)
    assert net.bucket.log_image("app.db") == con.serialize("main")
    net.accounts(con, here, 2 if mended_by == "the next commit" else 1)


def test_what_is_missing_is_said(net: Network) -> None:
    here, con = opened(net)
    patience(con, 0.3)
    net.script(answer(503, "SlowDown", "PUT", path=VIEW, times=ALWAYS))
    with pytest.raises(ReplicationError, match="is in the log, but not all of its page objects are stored"):
        insert(con, 1)
    assert net.bucket.log_image("app.db") == con.serialize("main")
    net.accounts(con, here, 1)


def test_a_server_that_takes_requests_and_never_answers_is_given_up(net: Network) -> None:
    """Each attempt has read_timeout, and all together retry_timeout."""
    here, con = opened(net, read_timeout=0.3)
    patience(con, 1.0)
    net.script(hang(60.0, times=ALWAYS))
    began = time.monotonic()
    with pytest.raises(ReplicationError, match=r"not stored: .*given up after"):
        insert(con, 1)
    assert time.monotonic() - began < 20
    assert net.puts(f"{1:016x}-") >= 2
    net.accounts(con, here, 1)


def test_the_last_attempt_is_near_the_end_of_retry_timeout(make_config: MakeConfig) -> None:
    """Waits that grow beyond what is left would give up early, on a server that is just coming back."""
    fake = FakeTime()
    with FaultProxy("http://127.0.0.1:1") as closed:
        pass
    store = open_store(make_config(endpoint=closed.url, retry_timeout=30.0), sleep=fake.sleep, clock=fake.clock)
    for _ in range(5):
        began = fake.seconds
        with pytest.raises(StoreError, match="given up after"):
            store.put("k", b"")
        assert 29.5 < fake.seconds - began <= 30.0
    store.close()


# --- what goes on meanwhile -----------------------------------------------------------------------------------------------------


def test_reads_and_local_commits_go_on_while_a_request_hangs(net: Network) -> None:
    here, con = opened(net, ack="local")
    gate = threading.Event()
    net.script(Fault(hold=gate, times=ALWAYS))
    other = here.connect(ack="local")
    for n in range(300):
        insert(con, n)
        assert rows(other) == n + 1
    assert not gate.is_set()
    assert net.bucket.head("app.db") == 1
    gate.set()
    net.accounts(con, here, 300)


def test_those_who_commit_in_an_outage_fail_together(net: Network) -> None:
    """ack=log: not one after the other. Who comes while a batch is failing waits for the next, and that is all."""
    here, con = opened(net, ack="log")
    patience(con, 1.0)
    errors: list[str] = []

    def work(n: int) -> None:
        mine = here.connect(ack="log")
        try:
            insert(mine, n)
        except ReplicationError as error:
            errors.append(str(error))

    net.script(outage())
    threads = [threading.Thread(target=work, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 12
    assert len(set(errors)) <= 4
    net.accounts(con, here, 12)


def test_the_wal_stays_small_through_an_outage_of_thousands_of_commits(net: Network) -> None:
    here, con = opened(net, ack="local", pages="off")
    net.options["pages"] = "off"
    patience(con, 0.3)
    net.script(outage())
    largest = 0
    for n in range(3000):
        insert(con, n)
        largest = max(largest, os.path.getsize(here.path() + "-wal"))
    assert largest < 2500 * 4120
    net.accounts(con, here, 3000)


# --- opening ---------------------------------------------------------------------------------------------------------------------


STAGES = {"nothing answers": lambda: outage(), "the listing does": lambda: outage("GET", path=LOG)}


@pytest.mark.parametrize("stage", STAGES)
def test_an_outage_at_the_open_changes_nothing(net: Network, stage: str) -> None:
    """A bucket that cannot be reached is no empty one: neither is anything restored, nor is a history begun."""
    here, con = opened(net)
    con.close()
    old, missing = net.machine(), net.machine()
    for name, content in here.files().items():
        (old.directory / name).write_bytes(content)
    con = here.connect()
    insert(con, 1)
    con.close()
    stored = net.bucket.content()
    for machine in (old, missing):
        before = machine.files()
        net.script(STAGES[stage]())
        with pytest.raises(StoreError) as raised:
            machine.connect(retry_timeout=0.5, create_bucket=False)
        assert raised.value.hint
        net.mend()
        after = machine.files()
        assert {name: after[name] for name in after if not name.endswith("-bottomless")} == {
            name: before[name] for name in before if not name.endswith("-bottomless")
        }
        assert net.bucket.content() == stored
        con = machine.connect()
        assert rows(con) == 1
        con.close()


def test_a_close_in_an_outage_ends_and_says_what_is_pending(net: Network, caplog: pytest.LogCaptureFixture) -> None:
    here, con = opened(net, ack="local")
    patience(con, 0.3)
    net.script(hang(60.0, times=ALWAYS))
    insert(con, 1)
    began = time.monotonic()
    with caplog.at_level(logging.ERROR):
        con.close()
    assert time.monotonic() - began < 20
    assert "is closed with commits that are not stored" in caplog.text
    net.mend()
    con = here.connect()
    assert net.bucket.log_image("app.db") == con.serialize("main")
    net.accounts(con, here, 1)


EXITS = """
con = connect(argv[0], ack="local", retry_timeout=0.3)
con.execute("INSERT INTO t VALUES (1)")
print("leaving", flush=True)
"""


def test_an_exit_in_an_outage_ends_too(net: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    here, con = opened(net)
    con.close()
    net.script(outage("PUT", when=of_writer("other")))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "other")
    done = child(EXITS, here.path(), options={**net.options, "retry_timeout": 0.3})
    assert "leaving" in done.stdout
    assert "not stored" in done.stderr
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    con = here.connect()
    assert net.bucket.log_image("app.db") == con.serialize("main")
    net.accounts(con, here, 1)


# --- the page view, and flush -----------------------------------------------------------------------------------------------------


def test_the_page_view_of_a_new_replica_fills_when_the_store_is_back(net: Network) -> None:
    here = net.machine()
    stock = here.stock()
    stock.execute("CREATE TABLE t(x); CREATE TABLE filling(x); INSERT INTO filling VALUES (randomblob(200000))")
    stock.close()
    net.script(outage("PUT", path=VIEW))
    con = here.connect(retry_timeout=0.4)
    until(lambda: net.puts(VIEW) > 0)
    with pytest.raises(ReplicationError, match="not all page objects are stored"):
        bottomless_wal.flush(con)
    net.mend()
    patience(con, 30.0)
    until(lambda: bottomless_wal.status(con).view_txid == 1)
    net.stored(con)
    net.accounts(con, here, 0)


def test_flush_gives_up_in_its_own_time_and_the_rest_follows(net: Network) -> None:
    here, con = opened(net, ack="local")
    gate = threading.Event()
    net.script(Fault(hold=gate, times=ALWAYS))
    insert(con, 1)
    began = time.monotonic()
    with pytest.raises(ReplicationError, match="was not flushed within"):
        bottomless_wal.flush(con, timeout=0.3)
    assert time.monotonic() - began < 8  # a single request may hang for 10
    gate.set()
    net.accounts(con, here, 1)


# --- two processes, one of them cut off -------------------------------------------------------------------------------------------


def in_log(net: Network, value: int) -> bool:
    """Does the log, read past the proxy, hold that row?"""
    image = bytearray(net.bucket.log_image("app.db"))
    image[18:20] = b"\1\1"  # in memory there is no WAL
    con = apsw.Connection(":memory:")
    con.deserialize("main", bytes(image))
    return rows(con, f"SELECT count(*) FROM t WHERE x = {value}") == 1


STEADY = """
con = connect(argv[0], ack="log")
for n in range(int(argv[1])):
    con.execute("INSERT INTO t VALUES (?)", (1000 + n,))
con.close()
"""


def test_a_process_that_is_cut_off_is_carried_along_by_one_that_is_not(net: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own commits fail or are acknowledged rightly: an acknowledged one is stored, whoever has sent it."""
    here, con = opened(net, ack="log")
    patience(con, 0.4)
    net.script(outage(when=of_writer("test")))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "other")
    process = spawn(STEADY, here.path(), "8", options=net.options)
    count = 0
    while process.poll() is None:
        count += 1
        try:
            insert(con, count)
        except ReplicationError as error:
            assert error.hint
        else:
            assert in_log(net, count)
    _, err = process.communicate()
    assert process.returncode == 0, err
    net.accounts(con, here, 8 + count)
