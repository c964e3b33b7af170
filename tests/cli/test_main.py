"""The command line: what it prints where, its exit codes, and that it never shows a traceback."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from typing import Any

import pytest
from click.testing import CliRunner

import bottomless_wal
from bottomless_wal import admin
from bottomless_wal.cli import main as commands
from bottomless_wal.cli.main import main
from bottomless_wal.cli.output import as_json
from bottomless_wal.core.config import ENV_PREFIX
from tests.support.stored_database import COMMITS, Cli, Shop


def run(shop: Shop, *arguments: object, **environ: str) -> subprocess.CompletedProcess[str]:
    """A command as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "bottomless_wal", *map(str, arguments)],
        env={**shop.environ(), **environ},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("any_shop", ["rclone"], indirect=True)
def test_from_the_outside(any_shop: Shop) -> None:
    any_shop.trade()
    copy = any_shop.path.with_name("copy.db")
    done = run(any_shop, "restore", any_shop.path, "-o", copy)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"restored at txid {COMMITS}" in done.stdout
    assert copy.read_bytes() == any_shop.path.read_bytes()
    done = run(any_shop, "restore", any_shop.path)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("error: ")
    assert "hint: " in done.stderr
    assert "--force" in done.stderr
    assert run(any_shop, "verify", any_shop.path, "--deep", "--local").returncode == 0
    any_shop.delete(any_shop.page(2))
    done = run(any_shop, "verify", any_shop.path)
    assert done.returncode == 1
    assert f"PROBLEM {any_shop.page(2)}: is missing" in done.stdout
    assert "NOT sound" in done.stdout


def test_help_is_quick_and_complete() -> None:
    lazy = "import sys, bottomless_wal.cli.main; sys.exit(any(name in sys.modules for name in ('boto3', 'rich.table', 'apsw.shell')))"
    assert (
        subprocess.run([sys.executable, "-c", lazy], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, check=False).returncode
        == 0
    )
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    for name in ("demo", "shell", "restore", "reset", "ls", "status", "verify", "doctor", "compact", "snapshot", "prune", "rm", "stats"):
        assert f"  {name} " in result.output
        assert CliRunner().invoke(main, [name, "--help"]).exit_code == 0
    assert bottomless_wal.__version__ in CliRunner().invoke(main, ["--version"]).output


def test_enums_are_their_strings_in_json() -> None:
    assert json.loads(as_json(admin.Problem(admin.ProblemKind.NO_LOG, "k", "m")))["kind"] == "no-log"
    assert json.loads(as_json(admin.Check("clock", admin.CheckState.OK, "d")))["state"] == "ok"
    seen = admin.Inspection("/p", "n", "s", None, None, None, None, False, "in words", admin.Lineage.NO_FILE)
    assert list(json.loads(as_json(seen))) == ["path", "name", "store", "size", "local", "pending", "head", "in_step", "relation"]


def test_ls(shop: Shop, cli: Cli) -> None:
    shop.store.prepare()
    assert "nothing is stored" in cli(shop, "ls").stdout
    shop.trade()
    output = cli(shop, "ls").stdout
    assert "app.db" in output
    assert str(COMMITS) in output
    (row,) = json.loads(cli(shop, "ls", "--json").stdout)
    assert (row["name"], row["txid"], row["segments"]) == ("app.db", COMMITS, COMMITS)
    assert "edges" not in row
    (row,) = json.loads(cli(shop, "ls", "app.db", "--json").stdout)
    assert [edge["post"] for edge in row["edges"]] == list(range(1, COMMITS + 1))
    assert f"{COMMITS - 1}" in cli(shop, "ls", "app.db").stdout


def test_status(shop: Shop, cli: Cli) -> None:
    shop.trade()
    assert "the local file is at the head" in cli(shop, "status", shop.path).stdout
    seen: dict[str, Any] = json.loads(cli(shop, "status", shop.path, "--json").stdout)
    assert seen["in_step"] is True
    assert seen["local"]["state"] == seen["head"]["state"]
    assert len(seen["head"]["state"]) == 16


def test_verify_and_repair(shop: Shop, cli: Cli) -> None:
    shop.trade()
    shop.delete(shop.page(2))
    result = cli(shop, "verify", shop.path, "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert (report["ok"], [problem["object"] for problem in report["problems"]]) == (False, [shop.page(2)])
    result = cli(shop, "verify", shop.path, "--repair-view")
    assert result.exit_code == 0
    assert f"repaired {shop.page(2)}" in result.stdout
    assert cli(shop, "verify", "app.db").exit_code == 0


def test_restore_an_earlier_state_and_reset(shop: Shop, cli: Cli) -> None:
    shop.trade()
    result = cli(shop, "restore", shop.path, "--txid", 4, "--force", "-v")
    assert result.exit_code == 0
    assert "reset --from-local" in result.stdout
    assert "INFO" in result.stderr
    result = cli(shop, "reset", shop.path)
    assert result.exit_code == 2
    assert "--from-local" in result.stderr
    done = json.loads(cli(shop, "reset", "--from-local", shop.path, "--json").stdout)
    assert done["txid"] == COMMITS + 1
    assert shop.rows() == 3
    done = json.loads(cli(shop, "restore", shop.path, "-o", shop.path.with_name("b.db"), "--json").stdout)
    assert done["txid"] == COMMITS + 1


def test_doctor(shop: Shop, cli: Cli) -> None:
    result = cli(shop, "doctor")
    assert result.exit_code == 0
    assert "ok      bucket" in result.stdout
    checks = json.loads(cli(shop, "doctor", "--json").stdout)
    assert {check["name"] for check in checks} >= {"endpoint", "bucket", "objects", "create-only", "round trip", "clock"}
    shop.endpoint = type(shop.endpoint)("directory", "file:///no/such/place", "b", {})
    assert cli(shop, "doctor").exit_code in (0, 1)  # whether it could be made
    result = CliRunner().invoke(main, ["--endpoint", "http://127.0.0.1:9", "doctor"])
    assert result.exit_code == 1
    assert "FAILED  endpoint" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--endpoint", "nonsense", "ls"], 2, "is no endpoint"),
        (["--bucket", "a/b", "ls"], 2, "is no bucket"),
        (["--endpoint", "file:///no/such/place", "ls"], 3, "does not exist"),
        (["--endpoint", "http://127.0.0.1:9", "verify", "app.db"], 3, "given up"),
        (["nonsense"], 2, "No such command"),
        (["restore", "app.db", "--txid", "0"], 2, "txid"),
        (["status", "/"], 2, "directory"),
        (["--endpoint", "file:///no/such/place", "shell", "/no/such/place/app.db"], 3, "no/such/place"),
    ],
)
def test_errors_are_told_without_a_traceback(
    arguments: list[str], code: int, said: str, own_environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENV_PREFIX + "RETRY_TIMEOUT", "0")
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == code
    assert said in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_what_was_not_foreseen(shop: Shop, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*arguments: object, **options: object) -> None:
        raise RuntimeError("the roof is on fire")

    monkeypatch.setattr(admin, "listing", explode)
    result = cli(shop, "ls")
    assert result.exit_code == 3
    assert "the roof is on fire" in result.stderr
    assert "Traceback" not in result.stderr
    monkeypatch.setenv(commands.ENV_PREFIX + "LOG", "debug")
    assert "Traceback" in cli(shop, "ls").stderr

    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(admin, "listing", interrupt)
    assert cli(shop, "ls").exit_code == 130


def test_the_log_is_for_the_faces(shop: Shop, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.trade()
    assert cli(shop, "verify", shop.path).stderr == ""
    monkeypatch.setenv(ENV_PREFIX + "LOG", "info")
    result = cli(shop, "restore", shop.path, "-o", shop.path.with_name("b.db"))
    assert "restored at txid" in result.stderr
    assert "INFO" in result.stderr
    assert len(logging.getLogger("bottomless_wal").handlers) == 1
    monkeypatch.setenv(ENV_PREFIX + "LOG", "loud")
    result = cli(shop, "ls")
    assert result.exit_code == 2
    assert "debug, info, warning, error" in result.stderr


def test_a_bar_is_drawn_only_for_a_terminal(shop: Shop) -> None:
    shop.trade()
    done = run(shop, "verify", shop.path)
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
