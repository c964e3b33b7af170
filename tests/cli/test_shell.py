"""The shell, and the ancestor's smoke test, as processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import bottomless_wal
from tests.support.stored_database import COMMITS, Shop

ROOT = Path(__file__).resolve().parents[2]


def shell(shop: Shop, script: str, *arguments: object, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bottomless_wal", "shell", *map(str, arguments)],
        input=script,
        env={**shop.environ(), **environ},
        cwd=shop.path.parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`bottomless-wal` as an installed program, first in PATH."""
    program = tmp_path / "bin" / "bottomless-wal"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m bottomless_wal "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    return program


def test_smoke(any_shop: Shop, command: Path) -> None:
    environ = any_shop.environ()
    done = subprocess.run([str(ROOT / "tools" / "smoke_test.sh")], env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "smoke test passed" in done.stdout


def test_a_file_is_opened_replicated(shop: Shop) -> None:
    done = shell(shop, "CREATE TABLE sales(x);\nINSERT INTO sales VALUES (42);\nSELECT x FROM sales;\n", "app.db")
    assert (done.returncode, done.stdout, done.stderr) == (0, "42\n", "")
    shop.path.unlink()
    done = shell(shop, "", "app.db", "SELECT x FROM sales", "PRAGMA integrity_check")
    assert (done.returncode, done.stdout) == (0, "42\nok\n")
    assert bottomless_wal.verify(shop.path, local=shop.path, **shop.options).ok


def test_global_options_hold_for_open(shop: Shop) -> None:
    shop.trade()
    place = ["--endpoint", shop.endpoint.url, "--bucket", shop.endpoint.bucket]
    script = (
        ".open file:new.db?vfs=bottomless\nPRAGMA journal_mode=wal;\nCREATE TABLE t(x);\n"
        ".open file:app.db?vfs=bottomless\nSELECT count(*) FROM sales;\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "bottomless_wal", *place, "shell"],
        input=script,
        env={**shop.environ(), "LIBSQL_BOTTOMLESS_ENDPOINT": "http://127.0.0.1:9"},
        cwd=shop.path.parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, f"wal\n{COMMITS - 1}\n")
    assert {row.name: row.txid for row in bottomless_wal.listing(**shop.options)} == {"app.db": COMMITS, "new.db": 1}


def test_exit_codes(shop: Shop) -> None:
    assert shell(shop, ".exit 7\n").returncode == 7
    done = shell(shop, "SELECT * FROM nowhere;\nSELECT 5;\n", "app.db")
    assert (done.returncode, done.stdout) == (0, "5\n")
    assert "no such table" in done.stderr
    done = shell(shop, ".bail on\nSELECT * FROM nowhere;\nSELECT 5;\n", "app.db")
    assert (done.returncode, done.stdout) == (1, "")
    done = shell(shop, "", "app.db", "SELECT * FROM nowhere", "SELECT 5")
    assert done.returncode == 1
    assert done.stderr.count("no such table") == 1
    assert "Traceback" not in done.stderr


def test_commits_that_stay_behind_are_told(shop: Shop) -> None:
    shop.trade()
    bucket = Path(shop.store.describe().split("'")[1])
    script = f"INSERT INTO sales(goods) VALUES (1);\n.shell mv '{bucket}' '{bucket}-unplugged'\nINSERT INTO sales(goods) VALUES (2);\n"
    done = shell(shop, script, "app.db")
    assert done.returncode == 3
    assert "not stored" in done.stderr
    assert "Traceback" not in done.stderr
    Path(f"{bucket}-unplugged").rename(bucket)
    assert shell(shop, "SELECT count(*) FROM sales;\n", "app.db").stdout == f"{COMMITS + 1}\n"
    assert bottomless_wal.verify(shop.path, local=shop.path, **shop.options).ok
