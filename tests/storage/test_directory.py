"""What is particular to a directory as a store: durability, temporary files, names that must not leave it, a disk's errors."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bottomless_wal.core.errors import ConfigError, StoreError
from bottomless_wal.storage import Store, open_store
from bottomless_wal.storage import directory as module
from tests.support.endpoints import MakeConfig


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "my bücket's" / "libsql"


@pytest.fixture
def store(root: Path, make_config: MakeConfig) -> Iterator[Store]:
    store = open_store(make_config(endpoint=root.parent.as_uri(), bucket="libsql"))
    store.prepare()
    yield store
    store.close()


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_objects_are_plain_files(store: Store, root: Path) -> None:
    store.put("app.db-000000000001", b"page")
    store.create("app.db-wal/1-2", b"segment")
    assert (root / "app.db-wal" / "1-2").read_bytes() == b"segment"
    assert files(root) == ["app.db-000000000001", "app.db-wal/1-2"]


def test_files_are_for_their_owner_alone(store: Store, root: Path) -> None:
    store.put("a/b", b"")
    assert stat.S_IMODE((root / "a/b").stat().st_mode) == 0o600
    assert stat.S_IMODE((root / "a").stat().st_mode) == 0o700
    assert stat.S_IMODE((root / ".tmp").stat().st_mode) == 0o700


def test_temporary_files_are_no_objects(store: Store, root: Path) -> None:
    (root / ".tmp").mkdir(exist_ok=True)
    (root / ".tmp" / "half").write_bytes(b"half an object")
    store.put("a", b"")
    assert [entry.key for entry in store.list("")] == ["a"]
    assert list(store.list(".tmp/")) == []
    for use in (lambda: store.get(".tmp/half", limit=100), lambda: store.put(".tmp/x", b""), lambda: store.delete([".tmp/half"])):
        with pytest.raises(ConfigError):
            use()


def test_only_stale_temporary_files_are_removed(store: Store, root: Path) -> None:
    old, new = root / ".tmp" / "old", root / ".tmp" / "new"
    store.put("a", b"")
    for path in (old, new):
        path.write_bytes(b"")
    os.utime(old, (time.time() - 90_000,) * 2)
    store.prepare()
    assert (old.exists(), new.exists()) == (False, True)


def test_no_key_leaves_the_directory(store: Store, root: Path) -> None:
    (root.parent / "outside").write_bytes(b"secret")
    for key in ("../outside", "a/../../outside", str(root.parent / "outside"), "./../outside"):
        with pytest.raises(ConfigError):
            store.get(key, limit=100)
        with pytest.raises(ConfigError):
            store.delete([key])
    assert (root.parent / "outside").read_bytes() == b"secret"


@pytest.mark.parametrize(
    "write",
    [
        lambda store: store.put("new/deep/key", b"data"),
        lambda store: store.create("new/deep/key", b"data"),
        lambda store: store.upload("new/deep/key", [b"da", b"ta"]),
    ],
)
def test_everything_is_synced_before_a_write_returns(
    store: Store, root: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Store], object]
) -> None:
    events: list[str] = []

    def name_of(fd: int) -> str:
        path = os.readlink(f"/proc/self/fd/{fd}")
        return "file" if "/.tmp/" in path else str(Path(path).relative_to(root))

    def watch(name: str, describe: Callable[..., str]) -> None:
        real = getattr(os, name)

        def watched(*args: object) -> object:
            events.append(describe(*args))
            return real(*args)

        monkeypatch.setattr(module.os, name, watched)

    store.put("warm", b"")
    watch("fsync", lambda fd: f"sync {name_of(fd)}")
    watch("replace", lambda source, target: "place")
    watch("link", lambda source, target: "place")
    write(store)
    # The directories are made when placing the file fails; a name that is not synced in its directory is not there.
    assert events == ["sync file", "place", "sync .", "sync new", "place", "sync new/deep"]
    assert store.get("new/deep/key", limit=10) == b"data"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("call", ["open", "write", "fsync"])
def test_a_disk_that_fails_is_a_store_error(store: Store, root: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str) -> None:
    store.put("k", b"before")

    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    for use in (
        lambda: store.put("k", b"after"),
        lambda: store.create("new", b"1"),
        lambda: store.upload("new", [b"1"]),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module.os, call, fail)
            with pytest.raises(StoreError, match=os.strerror(code)) as raised:
                use()
        assert bool(raised.value.hint) == (code != errno.EIO)
        assert str(root) in raised.value.message
    assert store.get("k", limit=10) == b"before"
    assert [entry.key for entry in store.list("")] == ["k"]
    assert files(root) == ["k"]


def test_a_disk_that_is_not_mounted_is_not_empty(store: Store, root: Path) -> None:
    store.put("a/b", b"")
    root.rename(root.with_name("elsewhere"))
    for use in (
        lambda: store.get("a/b", limit=1),
        lambda: store.read("a/b", 0, 1),
        lambda: list(store.list("")),
        lambda: store.put("a/b", b""),
        lambda: store.create("a/b", b""),
        lambda: store.upload("a/b", [b""]),
        lambda: store.delete(["a/b"]),
    ):
        with pytest.raises(StoreError, match="does not exist"):
            use()
    assert not root.exists()
    root.with_name("elsewhere").rename(root)
    assert store.get("a/b", limit=1) == b""


def test_names_in_the_way(store: Store) -> None:
    store.put("a", b"")
    for use in (lambda: store.put("a/b", b""), lambda: store.create("a/b", b"")):
        with pytest.raises(StoreError):
            use()
    store.put("d/e", b"")
    with pytest.raises(StoreError):
        store.put("d", b"")
    assert not store.create("d", b"").created


def test_a_name_too_long_for_the_file_system(store: Store) -> None:
    with pytest.raises(StoreError) as raised:
        store.put("x" * 256, b"")
    assert "shorter" in raised.value.hint


def test_files_that_come_and_go_while_they_are_listed(store: Store, root: Path) -> None:
    for name in ("a", "b/1", "b/2", "c/1", "d"):
        store.put(name, b"")
    rows = store.list("")
    assert next(rows).key == "a"
    store.delete(["d"])
    (root / "c/1").unlink()
    (root / "c").rmdir()
    assert [entry.key for entry in rows] == ["b/1", "b/2"]


def test_foreign_names_do_not_stop_a_listing(store: Store, root: Path) -> None:
    store.put("a", b"")
    (root / os.fsdecode(b"\xff\xfe")).write_bytes(b"")
    (root / "broken").symlink_to("nowhere")
    (root / "circle").symlink_to(root)
    os.mkfifo(root / "pipe")
    assert [entry.key for entry in store.list("")] == ["a"]


@pytest.mark.parametrize("endpoint", ["file:///tmp/%00x", "file://", "file:relative"])
def test_endpoints_that_name_no_directory(endpoint: str, make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError):
        open_store(make_config(endpoint=endpoint))


def test_percent_signs_in_the_endpoint_are_escapes(tmp_path: Path, make_config: MakeConfig) -> None:
    store = open_store(make_config(endpoint=(tmp_path / "a b%c").as_uri(), bucket="x"))
    store.prepare()
    assert (tmp_path / "a b%c" / "x").is_dir()
    store.close()
