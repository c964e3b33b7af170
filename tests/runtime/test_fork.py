"""Forks: a child lets go of what it inherited, is refused on it, harms nothing, and may open the database for itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cluster import World, child, rows

INHERITED = """
con = connect(argv[0])
con.execute("CREATE TABLE t(x)")
con.execute("INSERT INTO t VALUES ('parent')")
pid = os.fork()
if pid == 0:
    code = 1
    try:
        con.execute("INSERT INTO t VALUES ('child')")
    except bottomless_wal.ReplicationError as error:
        code = 0 if "fork" in str(error) and error.hint else 2
    except BaseException as error:
        print(type(error), error, flush=True)
        code = 3
    if argv[1] == "close":
        con.close()
    if argv[1] in ("exit", "close"):
        sys.exit(code)
    os._exit(code)
_, status = os.waitpid(pid, 0)
print("child", os.waitstatus_to_exitcode(status))
for n in range(3):
    con.execute("INSERT INTO t VALUES ('parent')")
other = apsw.Connection(argv[0])
other.set_busy_timeout(0)
con.execute("BEGIN IMMEDIATE")
try:
    other.execute("BEGIN IMMEDIATE")
    print("no lock")
except apsw.BusyError:
    print("locked")
con.execute("COMMIT")
other.close()
print(con.execute("PRAGMA integrity_check").get, con.execute("SELECT group_concat(x) FROM t").get)
con.close()
"""


@pytest.mark.parametrize("leaves_by", ["_exit", "exit", "close"])
def test_an_inherited_connection_is_refused_and_the_parent_goes_on(world: World, leaves_by: str) -> None:
    here = world.machine()
    out = child(INHERITED, here.path(), leaves_by, options=world.options).stdout
    assert "child 0" in out, out
    assert "locked" in out, "the parent's locks still hold"
    assert "ok parent,parent,parent,parent" in out
    world.comes_back(here)


def test_a_child_opens_the_database_for_itself(world: World) -> None:
    here = world.machine()
    script = """
con = connect(argv[0])
con.execute("CREATE TABLE t(x)")
con.close()
children = []
for n in range(3):
    pid = os.fork()
    if pid == 0:
        try:
            mine = connect(argv[0])
            mine.set_busy_timeout(30000)
            for i in range(5):
                mine.execute("INSERT INTO t VALUES (?)", (n,))
            mine.close()
        except BaseException as error:
            print(type(error), error, flush=True)
            os._exit(1)
        os._exit(0)
    children.append(pid)
con = connect(argv[0])
con.set_busy_timeout(30000)
for i in range(5):
    con.execute("INSERT INTO t VALUES ('parent')")
print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children], flush=True)
con.execute("INSERT INTO t VALUES ('last')")
con.close()
"""
    out = child(script, here.path(), options=world.options).stdout
    assert "[0, 0, 0]" in out, out
    con = here.connect()
    assert rows(con) == 21
    con.close()
    world.comes_back(here)


def test_a_child_is_refused_what_its_parent_had_open(world: World) -> None:
    """SQLite in the child believes it has the parent's locks, which it has not: the parent's close would delete the WAL under it."""
    here = world.machine()
    script = """
con = connect(argv[0])
con.execute("CREATE TABLE t(x)")
pid = os.fork()
if pid == 0:
    try:
        connect(argv[0])
    except Exception as error:
        print(type(error).__name__, error, flush=True)
    os._exit(0)
os.waitpid(pid, 0)
con.execute("INSERT INTO t VALUES (1)")
con.close()
"""
    out = child(script, here.path(), options=world.options).stdout
    assert "ConfigError" in out
    assert "after the fork" in out
    world.comes_back(here)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_of_multiprocessing(world: World, method: str) -> None:
    here = world.machine()
    con = here.connect()
    con.execute("CREATE TABLE t(x)")
    con.close()
    source = here.directory / "workers.py"
    source.write_text(
        f"""
import multiprocessing, sys, json
import bottomless_wal
options = json.loads(sys.argv[1])
def work(n):
    con = bottomless_wal.connect(sys.argv[2], **options)
    con.set_busy_timeout(30000)
    con.execute("INSERT INTO t VALUES (?)", (n,))
    globals()["kept"] = con  # open until the process ends
if __name__ == "__main__":
    context = multiprocessing.get_context({method!r})
    workers = [context.Process(target=work, args=(n,)) for n in range(3)]
    [worker.start() for worker in workers]
    con = bottomless_wal.connect(sys.argv[2], **options)
    [worker.join() for worker in workers]
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    con.execute("INSERT INTO t VALUES ('parent')")
"""
    )
    root = Path(__file__).resolve().parents[2]
    arguments = [sys.executable, str(source), json.dumps({**world.options, "ack": "local", "interval": 30}), here.path()]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    con = world.machine().connect()
    assert rows(con) == 4


def test_a_fork_in_the_middle_of_an_upload(world: World) -> None:
    here = world.machine()
    script = """
con = connect(argv[0], ack="local")
con.execute("CREATE TABLE t(x)")
for n in range(30):
    con.execute("INSERT INTO t VALUES (?)", (n,))
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
con.close()
"""
    child(script, here.path(), options=world.options)
    assert rows(here.connect()) == 30
    world.connections[-1].close()
    world.comes_back(here)
