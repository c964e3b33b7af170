"""However a process ends: what it was told is stored is stored, what it committed is sent at the exit or by the next open, and no thread of
ours leaves a trace on standard error.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

import bottomless_wal
from bottomless_wal.core.threads import UntilCleared
from bottomless_wal.replication.index import LocalIndex
from tests.support.cluster import World, child, rows, spawn
from tools.stress import exit_test

OURS = ("Traceback", "Exception ignored", "Fatal Python error", "terminate called")
"""What must not be on standard error, unless the application itself has raised it."""

OPEN = """
con = connect(argv[0])
con.execute("CREATE TABLE IF NOT EXISTS t(x)")
"""

LOCAL: dict[str, Any] = {"ack": "local", "interval": 60}

# How it ends: script, options, exit code, rows in the end, are they all in the log at once.
EXITS: dict[str, tuple[str, dict[str, Any], int, int, bool]] = {
    "connections are left open in globals": (OPEN + "con.execute('INSERT INTO t VALUES (1)')", LOCAL, 0, 1, True),
    "os._exit": (OPEN + "con.execute('INSERT INTO t VALUES (1)')\nos._exit(3)", LOCAL, 3, 1, False),
    "SIGTERM": (OPEN + "con.execute('INSERT INTO t VALUES (1)')\nos.kill(os.getpid(), signal.SIGTERM)", LOCAL, -15, 1, False),
    "an exception nobody handles": (OPEN + "con.execute('INSERT INTO t VALUES (1)')\nsys.exit('the end')", LOCAL, 1, 1, True),
    "sys.exit in a thread": (
        OPEN
        + """
def work():
    connect(argv[0]).execute("INSERT INTO t VALUES (1)")
    sys.exit(1)
thread = threading.Thread(target=work); thread.start(); thread.join()
""",
        LOCAL, 0, 1, True,
    ),
    "threads still commit": (
        OPEN
        + """
def work():
    own = connect(argv[0])
    for _ in range(10): own.execute("INSERT INTO t VALUES (1)")
for _ in range(2): threading.Thread(target=work).start()
""",
        {}, 0, 20, True,
    ),
    "a thread opens it when the main thread is through": (
        OPEN
        + """
def work():
    threading.main_thread().join()
    own = connect(argv[0])
    for _ in range(5): own.execute("INSERT INTO t VALUES (1)")
threading.Thread(target=work).start()
con.close()
""",
        LOCAL, 0, 5, True,
    ),
    "the application writes and closes at exit, before us": (
        OPEN
        + """
import atexit
def last(): con.execute("INSERT INTO t VALUES (1)"); con.close()
atexit.register(last)
""",
        LOCAL, 0, 1, True,
    ),
    "the application opens it at exit, for the first time": (
        """
import atexit
def last():
    global con
    con = connect(argv[0]); con.execute("CREATE TABLE t(x); INSERT INTO t VALUES (1)")
atexit.register(last)
""",
        LOCAL, 0, 1, True,
    ),
    "Ctrl-C at exit": (
        OPEN
        + """
from bottomless_wal.core import failpoints
def strike():
    failpoints.disarm()
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
con.execute("INSERT INTO t VALUES (1)")
failpoints.arm("before put", strike)
""",
        LOCAL, 0, 1, False,
    ),
    "a cancelled task of asyncio": (
        OPEN
        + """
import asyncio
from bottomless_wal.core import failpoints
started, go_on = threading.Event(), threading.Event()
def wait(): started.set(); go_on.wait(20)
async def main():
    failpoints.arm("before put", wait)
    task = asyncio.create_task(asyncio.to_thread(con.execute, "INSERT INTO t VALUES (1)"))
    await asyncio.to_thread(started.wait, 20)
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        go_on.set()
asyncio.run(main())
""",
        {}, 0, 1, True,
    ),
    "a spawned child of multiprocessing that imports as it works": (
        """
import subprocess
code = '''
import multiprocessing, sys
def work(path, options):
    import bottomless_wal
    con = bottomless_wal.connect(path, **options)
    con.execute("CREATE TABLE t(x)")
    con.execute("INSERT INTO t VALUES (1)")
    globals()["own"] = con
if __name__ == "__main__":
    import json
    process = multiprocessing.get_context("spawn").Process(target=work, args=(sys.argv[1], json.loads(sys.argv[2])))
    process.start(); process.join()
    assert process.exitcode == 0
'''
import json, pathlib
file = pathlib.Path(argv[0]).with_name("work.py")
file.write_text(code)
subprocess.run([sys.executable, file, argv[0], json.dumps(options)], check=True)
""",
        LOCAL, 0, 1, True,
    ),
    "a child of multiprocessing": (
        OPEN
        + """
import multiprocessing
con.close()
def work():
    global own
    own = connect(argv[0]); own.execute("INSERT INTO t VALUES (1)")
process = multiprocessing.get_context("fork").Process(target=work); process.start(); process.join()
assert process.exitcode == 0
""",
        LOCAL, 0, 1, True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", EXITS)
def test_a_process_ends(world: World, how: str) -> None:
    """What stood is there at the next open, once, and nothing of ours is said on the way out."""
    script, options, code, count, at_once = EXITS[how]
    here = world.machine()
    process = spawn(script, here.path(), options={**world.options, **options})
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert not [word for word in OURS if word in said], said
    head = world.bucket.head("app.db")
    con = here.connect()
    assert rows(con) == count
    bottomless_wal.flush(con)
    world.stored(con)
    if at_once:
        assert world.bucket.head("app.db") == head, "the exit has left something to the next open"
    con.close()
    world.comes_back(here)


@pytest.mark.parametrize("ack", ["pages", "local"])
def test_the_application_writes_at_exit_after_us(world: World, ack: str) -> None:
    """A handler that was registered before the import runs after ours: its commit raises, whatever `ack` is, and the next open sends it."""
    here = world.machine()
    script = """
import atexit
from bottomless_wal.runtime.registry import registry
def last():
    try:
        con.execute("INSERT INTO t VALUES (1)")
        print("acknowledged")
    except bottomless_wal.ReplicationError as error:
        print(error.message)
    con.close()
atexit.unregister(registry.exit)
atexit.register(last)
atexit.register(registry.exit)
"""
    process = spawn(script + OPEN, here.path(), options={**world.options, "ack": ack})
    out, said = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "has been shut down" in out, out
    assert not [word for word in OURS if word in said], said
    con = here.connect()
    assert rows(con) == 1
    bottomless_wal.flush(con)
    world.stored(con)


@pytest.mark.parametrize("what", ["a large transaction", "a database that has shrunk"])
def test_what_takes_boto3s_client_is_done_at_exit_too(any_world: World, what: str) -> None:
    """It is loaded when it is first needed, and much cannot be loaded any more when the interpreter ends."""
    here = any_world.machine()
    script = f"""
con = connect(argv[0], ack="local", interval=30)
con.execute("CREATE TABLE t(x)")
bottomless_wal.flush(con)
assert "boto3" not in sys.modules
if {what!r} == "a large transaction":
    with con:
        con.executemany("INSERT INTO t VALUES (randomblob(1000000))", [()] * 20)
else:
    con.executemany("INSERT INTO t VALUES (randomblob(9000))", [()] * 20)
    bottomless_wal.flush(con)
    con.execute("DELETE FROM t; VACUUM")
"""
    any_world.options["pages"] = "commit" if "shrunk" in what else "off"
    errors = child(script, here.path(), options=any_world.options).stderr
    assert not any(sign in errors for sign in (*OURS, "not stored", "not foreseen")), errors
    header = LocalIndex.peek(here.path() + "-bottomless")
    assert header is not None
    assert header.clean
    assert any_world.bucket.head("app.db") == header.txid
    con = here.connect()
    bottomless_wal.flush(con)
    any_world.stored(con, view="shrunk" in what)


def test_daemon_threads_in_the_middle_of_a_commit(world: World) -> None:
    """Theirs may raise, and die where they stand: what they were told is stored is stored, and the process ends quietly."""
    here = world.machine()
    script = (
        OPEN
        + """
lock = threading.Lock()
def work():
    try:
        own = connect(argv[0])
        while True:
            own.execute("INSERT INTO t VALUES (1)")
            os.write(1, b"x")  # acknowledged
    except apsw.Error:
        pass
for _ in range(3): threading.Thread(target=work, daemon=True).start()
while con.execute("SELECT count(*) FROM t").get < 20: time.sleep(0.005)
"""
    )
    process = spawn(script, here.path(), options={**world.options, "ack": "log"})
    out, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert not [word for word in OURS if word in said], said
    lost = world.machine().connect()  # from the bucket alone
    assert rows(lost) >= out.count("x") >= 15
    lost.close()
    con = here.connect()
    assert rows(con) >= out.count("x")
    bottomless_wal.flush(con)
    world.stored(con)


NO_THREADS = """
import atexit
def no_more_threads():
    def refuse(*arguments, **more): raise RuntimeError("can't create new thread at interpreter shutdown")
    threading._start_new_thread = threading._start_joinable_thread = refuse
atexit.register(no_more_threads)  # from here on as in Python 3.12 and later
"""

# What has no thread yet when the interpreter ends: script, options, rows in the end.
THREADLESS: dict[str, tuple[str, dict[str, Any], int]] = {
    "the first batch": (OPEN + "con.execute('INSERT INTO t VALUES (1)')" + NO_THREADS, LOCAL, 1),
    "a database that was only read, before another": (
        """
other = connect(argv[0] + "-other"); other.execute("CREATE TABLE t(x)"); other.close()
other = connect(argv[0] + "-other"); other.execute("SELECT * FROM t").fetchall()
"""
        + OPEN
        + "con.execute('INSERT INTO t VALUES (1)')"
        + NO_THREADS,
        LOCAL,
        1,
    ),
    "all, where the application opens it at exit": (
        """
import atexit
def last():
    global con
    con = connect(argv[0]); con.execute("CREATE TABLE t(x)"); con.execute("INSERT INTO t VALUES (1)")
atexit.register(last)
"""
        + NO_THREADS,
        LOCAL,
        1,
    ),
    "all, where commits and a flush wait at exit": (
        """
import atexit
def last():
    global con
    con = connect(argv[0]); con.execute("CREATE TABLE t(x)"); con.execute("INSERT INTO t VALUES (1)")
    bottomless_wal.flush(con)
    assert bottomless_wal.status(con).pending_frames == 0
    con.execute("INSERT INTO t VALUES (2)")
    con.close()
atexit.register(last)
"""
        + NO_THREADS,
        {},
        2,
    ),
    "the page view": (
        OPEN + "con.executemany('INSERT INTO t VALUES (randomblob(3000))', [()] * 50)" + NO_THREADS, {**LOCAL, "pages": "checkpoint"}, 50,
    ),
    "the upkeep, with 70 commits behind": (
        OPEN + "for _ in range(70): con.execute('INSERT INTO t VALUES (1)')" + NO_THREADS, {**LOCAL, "ack": "local"}, 70,
    ),
    "a checkpoint of a large WAL": (
        """
import atexit
def last():
    global con
    con = connect(argv[0]); con.execute("CREATE TABLE t(x)")
    for _ in range(3): con.execute("INSERT INTO t VALUES (zeroblob(9000000))")
atexit.register(last)
"""
        + NO_THREADS,
        LOCAL,
        3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", THREADLESS)
def test_where_no_thread_can_be_started_the_exiting_one_sends(world: World, what: str) -> None:
    script, options, count = THREADLESS[what]
    here = world.machine()
    process = spawn(script, here.path(), options={**world.options, **options})
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert not [word for word in (*OURS, "not stored") if word in said], said
    head = world.bucket.head("app.db")
    con = here.connect()
    assert rows(con) == count
    assert world.bucket.head("app.db") == head, "the exit has left something to the next open"
    bottomless_wal.flush(con)
    world.stored(con)
    con.close()
    world.comes_back(here)


def test_an_error_of_one_database_does_not_keep_the_others_from_being_drained(world: World) -> None:
    here = world.machine()
    script = (
        """
from bottomless_wal.runtime.registry import registry
first = connect(argv[0] + "-first"); first.execute("CREATE TABLE t(x)")
def fail(): raise LookupError("not foreseen")
registry.get(argv[0] + "-first").close = fail
"""
        + OPEN
        + "con.execute('INSERT INTO t VALUES (1)')"
    )
    process = spawn(script, here.path(), options={**world.options, **LOCAL})
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "closing " + here.path() + "-first at exit failed" in said
    assert "LookupError: not foreseen" in said
    lost = world.machine().connect()
    assert rows(lost) == 1


LATE = """
import atexit, gc
from bottomless_wal.core.threads import EXITED
from bottomless_wal.runtime.registry import registry
held, go_on = threading.Event(), threading.Event()
def hold():
    "Stands for a thread that has stopped where it was: it holds every lock and never gives one back."
    go_on.wait()
    replica = registry.all()[0]
    for lock in (registry._lock, replica.lifecycle, replica.worker._lock, replica.worker._filler._cond, replica.upkeep._cond,
                 replica.checkpointer._cond, replica.store.stats._lock):
        lock.acquire()
    held.set()
    threading.Event().wait()
threading.Thread(target=hold, daemon=True).start()
def freeze():
    go_on.set()
    held.wait()
    %s
# The last registered runs first: `freeze` runs after the exit's own handlers.
for handler in (registry.exit, EXITED.append): atexit.unregister(handler)
atexit.register(freeze)
atexit.register(EXITED.append, None)
atexit.register(registry.exit)
"""


@pytest.mark.parametrize("late", ["pass", "con.close()", "globals().pop('con')", "collect()", "commit()", "status()", "opens()"])
def test_what_comes_after_the_exit_waits_for_no_lock(world: World, late: str) -> None:
    """A thread that stopped in the middle of something may hold any of them."""
    here = world.machine()
    script = (
        LATE % late
        + OPEN
        + """
con.execute("INSERT INTO t VALUES (1)")
def collect():
    global con
    cycle = [con]; cycle.append(cycle)
    del con, cycle
    gc.collect()
def refused(call, error):
    try:
        call()
        print("not refused")
    except error as refusal:
        print(refusal)
def commit(): refused(lambda: con.execute("INSERT INTO t VALUES (2)"), bottomless_wal.ReplicationError)
def status(): refused(lambda: bottomless_wal.status(con), bottomless_wal.ConfigError)
def opens(): refused(lambda: connect(argv[0]), bottomless_wal.ConfigError)
"""
    )
    process = spawn(script, here.path(), options={**world.options, **LOCAL})
    try:
        out, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0, said
    assert "not refused" not in out
    assert not [word for word in OURS if word in said], said
    con = here.connect()
    bottomless_wal.flush(con)
    world.stored(con)


@pytest.mark.parametrize("keeper", ["apsw", "sys", "threading", "bottomless_wal"])
@pytest.mark.parametrize("options", [{}, LOCAL], ids=["pages", "local"])
def test_a_connection_that_outlives_the_modules_closes_silently(world: World, keeper: str, options: dict[str, Any]) -> None:
    """It is deallocated when the interpreter has cleared them: in place of each function there is None."""
    here = world.machine()
    script = OPEN + f"con.execute('INSERT INTO t VALUES (1)')\n{keeper}.kept = con\ndel con"
    done = child(script, here.path(), options={**world.options, **options})
    assert not [word for word in OURS if word in done.stderr], done.stderr
    con = here.connect()
    assert rows(con) == 1
    con.execute("INSERT INTO t VALUES (2)")
    bottomless_wal.flush(con)
    world.stored(con)
    con.close()
    world.comes_back(here)


@pytest.mark.parametrize("error", [TypeError("'NoneType' object is not callable"), AttributeError("'NoneType' object has no attribute")])
def test_the_same_error_before_the_end_of_the_interpreter_is_raised(error: Exception) -> None:
    with pytest.raises(type(error)), UntilCleared():
        raise error


def test_ctrl_c_at_the_very_first_step_of_the_exit(world: World) -> None:
    """Python raises it within our handler, before anything there can catch it."""
    here = world.machine()
    script = (
        OPEN
        + """
from bottomless_wal.runtime.registry import registry
import atexit
atexit.unregister(registry.exit)
def strike(): raise KeyboardInterrupt
atexit.register(strike)
con.execute("INSERT INTO t VALUES (1)")
"""
    )
    process = spawn(script, here.path(), options={**world.options, **LOCAL})
    try:
        process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0
    con = here.connect()
    assert rows(con) == 1
    bottomless_wal.flush(con)
    world.stored(con)


def test_threads_that_commit_while_the_exit_closes_are_known_at_the_next_open(world: World) -> None:
    """Theirs raise, and stand locally, before the exit's checkpoint and after it, in whatever WAL that leaves them."""
    script = (
        OPEN
        + """
from bottomless_wal.runtime.registry import registry
other = connect(argv[0]); other.execute("SELECT * FROM t").fetchall()
con.execute("INSERT INTO t VALUES (1)")
replica = registry.get(argv[0])
real = replica._leave_nothing_to_do
def commit(own):
    try:
        own.execute("INSERT INTO t VALUES (2)")
    except bottomless_wal.ReplicationError:
        pass
def between():
    commit(con); real(); commit(other)
replica._leave_nothing_to_do = between
registry.exit()
os._exit(0)
"""
    )
    for _ in range(6):  # random salts follow the old ones half of the time
        here = world.machine()
        process = spawn(script, here.path(), options={**world.options, "ack": "log", "database_id": str(world.count)})
        assert process.wait(60) == 0
        con = here.connect(database_id=str(world.count))
        assert rows(con) == 3
        con.close()


def test_processes_that_end_at_random_moments(tmp_path: Path) -> None:
    told = exit_test.run(tmp_path, 12, None, random.Random(3))
    assert (told["exits"], told["hangs"], told["missing"]) == (12, 0, 0), json.dumps(told)
    assert told["acknowledged"] > 100
