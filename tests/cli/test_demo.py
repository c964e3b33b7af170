"""The demo: it plays to its end everywhere, leaves nothing behind, and does not call a loss a success."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from bottomless_wal.cli import demo
from tests.support.stored_database import Shop


def play(shop: Shop, tmp_path: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bottomless_wal", "demo", "--orders", "25", *arguments],
        env={**shop.environ(), "TMPDIR": str(tmp_path), **environ},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


def test_with_the_embedded_server(shop: Shop, tmp_path: Path) -> None:
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    # Settings for another server do not disturb it.
    done = play(shop, scratch, AWS_PROFILE="nonsense", LIBSQL_BOTTOMLESS_ACK="local", AWS_SESSION_TOKEN="nonsense")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    for said in ("rclone serve s3", "kill -9", "acknowledged orders are back", "integrity_check: ok", "state hash", "Nothing acknowledged"):
        assert said in done.stdout
    assert "\x1b" not in done.stdout
    assert "✗" not in done.stdout
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("any_shop", ["moto", "directory"], indirect=True)
def test_with_a_server_of_ones_own(any_shop: Shop, tmp_path: Path) -> None:
    any_shop.store.prepare()
    bucket = ["--endpoint", any_shop.endpoint.url]
    done = play(any_shop, tmp_path, *bucket)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Nothing acknowledged was lost" in done.stdout
    assert any_shop.keys() == []  # its objects are gone again
    if any_shop.endpoint.kind == "directory":
        assert play(any_shop, tmp_path, *bucket, "--keep").returncode == 0
        assert any_shop.keys("demo-")


def test_a_server_that_is_not_there(shop: Shop, tmp_path: Path) -> None:
    done = play(shop, tmp_path, "--endpoint", "http://127.0.0.1:9", LIBSQL_BOTTOMLESS_RETRY_TIMEOUT="0")
    assert done.returncode != 0
    assert "Traceback" not in done.stderr + done.stdout


@pytest.mark.parametrize("loss", ["newest segment", "an order"])
def test_a_loss_is_no_success(
    shop: Shop, loss: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name, value in shop.environ().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    forget = demo._lose

    def lose_more(story: demo._Story) -> None:
        forget(story)
        if loss == "an order":
            story.acknowledged[10**6] = demo._Order("never seen", 3)
        else:
            shop.delete(max(key for key in shop.keys("demo-") if "-wal/" in key))

    monkeypatch.setattr(demo, "_lose", lose_more)
    assert not demo.run({"endpoint": shop.endpoint.url, "bucket": shop.endpoint.bucket}, orders=15, threads=2)
    said = capsys.readouterr().out
    assert "✗" in said
    assert "FAILED" in said
