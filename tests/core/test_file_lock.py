"""A lock on a file that may vanish: whoever holds it is alone, whatever has become of the file."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from bottomless_wal.core.file_lock import FileLock


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "lock")


def waits(lock: FileLock) -> tuple[threading.Thread, threading.Event]:
    """A thread that takes the lock and lets it go; set once it has had it."""
    had = threading.Event()

    def take() -> None:
        with lock.locked():
            had.set()

    thread = threading.Thread(target=take)
    thread.start()
    return thread, had


@pytest.mark.parametrize("same", [True, False])
def test_one_at_a_time(path: str, same: bool) -> None:
    one = FileLock(path, beside=path)
    other = one if same else FileLock(path, beside=path)
    with one.locked():
        thread, had = waits(other)
        assert not had.wait(0.05)
    thread.join(10)
    assert had.is_set()


@pytest.mark.parametrize("how", ["deleted", "replaced", "removed by its last user"])
def test_a_file_that_went_is_made_anew_and_locks_again(path: str, how: str) -> None:
    one, other = FileLock(path, beside=path), FileLock(path, beside=path)
    with other.locked():
        pass
    if how == "removed by its last user":
        other.remove()
    else:
        os.unlink(path)
        if how == "replaced":
            Path(path).touch()
    with one.locked():
        thread, had = waits(other)
        assert not had.wait(0.05)
    thread.join(10)
    assert had.is_set()
    assert os.path.exists(path)


def test_a_file_that_somebody_holds_is_not_removed(path: str) -> None:
    one, other = FileLock(path, beside=path), FileLock(path, beside=path)
    with other.locked():
        pass
    with one.locked():
        other.remove()
        assert os.path.exists(path)
    one.remove()
    assert not os.path.exists(path)
    one.remove()
