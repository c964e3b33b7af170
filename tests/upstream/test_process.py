"""Facts about processes: exit, fork, threads and file locks."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from typing import Any

import pytest


def test_at_exit_threads_start_and_executors_refuse(tools: Any) -> None:
    """In an atexit function a plain thread still runs, an executor, old or new, refuses work: the drain at exit uses threads."""
    out = tools.python("""
        import atexit, concurrent.futures, threading
        pool = concurrent.futures.ThreadPoolExecutor(1)
        pool.submit(int).result()
        def refuses(pool):
            try:
                pool.submit(int)
            except RuntimeError:
                return "refuses"
            return "works"
        def at_exit():
            print("old", refuses(pool))
            print("new", refuses(concurrent.futures.ThreadPoolExecutor(1)))
            thread = threading.Thread(target=lambda: print("thread works"), daemon=True)
            thread.start()
            thread.join()
        atexit.register(at_exit)
    """)
    assert out.splitlines() == ["old refuses", "new refuses", "thread works"]


def test_daemon_threads_live_until_atexit_functions_are_done(tools: Any) -> None:
    """A daemon thread begun before exit goes on during atexit functions: the worker can drain while atexit waits for it."""
    out = tools.python("""
        import atexit, queue, threading
        work, done = queue.Queue(), threading.Event()
        def worker():
            work.get()
            print("drained")
            done.set()
        threading.Thread(target=worker, daemon=True).start()
        def at_exit():
            work.put(1)
            print(done.wait(10))
        atexit.register(at_exit)
    """)
    assert out.splitlines() == ["drained", "True"]


def test_a_connection_left_open_closes_only_after_atexit(tools: Any) -> None:
    """SQLite closes a connection left open after all atexit functions, if at all, in a dying interpreter: drain in atexit."""
    out = tools.python("""
        import apsw, atexit
        class Vfs(apsw.VFS):
            def __init__(self): super().__init__("told", "")
            def xDelete(self, name, sync, print=print):
                print(name)
                return super().xDelete(name, sync)
        vfs = Vfs()
        connection = apsw.Connection("a.db", vfs="told")
        connection.execute("PRAGMA journal_mode=wal").fetchall()
        connection.execute("CREATE TABLE t(x)")
        atexit.register(print, "atexit")
    """)
    lines = [line for line in out.splitlines() if not line.endswith("-journal")]
    assert lines[0] == "atexit"


def test_flock_belongs_to_the_open_file_description() -> None:
    """Two opens of one file exclude each other even in one process, a duplicated descriptor does not: the guard opens its own."""
    one = os.open("lock", os.O_CREAT | os.O_RDWR)
    two = os.open("lock", os.O_RDWR)
    same = os.dup(one)
    try:
        fcntl.flock(one, fcntl.LOCK_EX)
        fcntl.flock(same, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(BlockingIOError):
            fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        for descriptor in (one, two, same):
            os.close(descriptor)


def test_a_forked_child_shares_the_parents_flock(tools: Any) -> None:
    """After a fork parent and child hold one and the same lock: nothing keeps the child out, so it must drop the descriptor."""
    out = tools.python("""
        import fcntl, os
        descriptor = os.open("lock", os.O_CREAT | os.O_RDWR)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fork() == 0:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.wait()[1]))
    """)
    assert out == "0"


def test_an_unlinked_lock_file_locks_nobody_out() -> None:
    """A lock on a file that has been unlinked excludes no one who opens the name anew: compare fstat with stat after locking."""
    one = os.open("lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(one, fcntl.LOCK_EX)
    os.unlink("lock")
    two = os.open("lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert os.fstat(one).st_ino != os.stat("lock").st_ino
    finally:
        os.close(one)
        os.close(two)


def test_a_truncated_mapping_kills_the_process() -> None:
    """Touching a mapping behind the end of its file is a signal, no exception: the local index uses pread and pwrite."""
    code = """if True:
        import mmap, os
        descriptor = os.open("index", os.O_CREAT | os.O_RDWR)
        os.ftruncate(descriptor, 1 << 16)
        mapping = mmap.mmap(descriptor, 1 << 16)
        os.ftruncate(descriptor, 0)
        mapping[5000]
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, timeout=60)
    assert done.returncode in (-signal.SIGBUS, -signal.SIGSEGV)


def test_atexit_does_not_run_in_a_forked_multiprocessing_child(tools: Any) -> None:
    """Children of multiprocessing end with os._exit: no atexit there, but `multiprocessing.util.Finalize` runs."""
    out = tools.python("""
        import atexit, multiprocessing, multiprocessing.util
        def child():
            atexit.register(print, "atexit", flush=True)
            multiprocessing.util.Finalize(None, print, ("finalize",), {"flush": True}, exitpriority=1)
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join()
    """)
    assert out.splitlines() == ["finalize"]


def test_a_forked_child_that_unlocks_unlocks_its_parent(tools: Any) -> None:
    """LOCK_UN in a forked child ends the parent's flock, closing the descriptor does not: the child closes, never unlocks."""
    out = tools.python("""
        import fcntl, os
        one = os.open("lock", os.O_CREAT | os.O_RDWR)
        two = os.open("lock", os.O_RDWR)
        fcntl.flock(one, fcntl.LOCK_EX)
        for act in (lambda: os.close(one), lambda: fcntl.flock(one, fcntl.LOCK_UN)):
            if os.fork() == 0:
                act()
                os._exit(0)
            os.wait()
            try:
                fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
                print("free")
            except BlockingIOError:
                print("held")
    """)
    assert out.splitlines() == ["held", "free"]


def test_a_forked_child_does_not_have_sqlites_locks(tools: Any) -> None:
    """A forked child has no POSIX locks and yet can write, even commit its parent's transaction: its writes are refused."""
    out = tools.python("""
        import apsw, os, sys
        connection = apsw.Connection("a.db")
        connection.execute("PRAGMA journal_mode=wal").fetchall()
        connection.execute("CREATE TABLE t(x)")
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("INSERT INTO t VALUES('parent')")
        if os.fork() == 0:
            connection.execute("COMMIT")  # the parent's open transaction!
            os._exit(0)
        os.wait()
        other = apsw.Connection("a.db")
        print(other.execute("SELECT count(*) FROM t").get, connection.in_transaction, flush=True)
        os._exit(0)
    """)
    assert out == "1 True", "the parent's open transaction was committed by its child"


def test_after_in_child_runs_in_every_fork(tools: Any) -> None:
    """`os.register_at_fork` also works for multiprocessing's forks: the place to drop descriptors, locks and the worker."""
    out = tools.python("""
        import multiprocessing, os
        os.register_at_fork(after_in_child=lambda: print("dropped", flush=True))
        process = multiprocessing.get_context("fork").Process(target=int)
        process.start()
        process.join()
    """)
    assert out == "dropped"
