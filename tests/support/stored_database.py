"""A shop: a database that has been replicated to a bucket of its own, and hands to damage what is there."""

from __future__ import annotations

import contextlib
import os
import random
import sys
from pathlib import Path
from typing import Any

import apsw
from click.testing import CliRunner, Result

import bottomless_wal
from bottomless_wal.cli.main import main
from bottomless_wal.core.config import ENV_PREFIX, Config
from bottomless_wal.formats import keys
from bottomless_wal.storage import Store, open_store
from tests.support.endpoints import Endpoint

COMMITS = 12  # of `Shop.trade`, one txid each


class Shop:
    """The database at `path`; its bucket is that of `endpoint`."""

    def __init__(self, endpoint: Endpoint, path: Path) -> None:
        self.endpoint = endpoint
        self.path = path
        self.options: dict[str, Any] = {"endpoint": endpoint.url, "bucket": endpoint.bucket, "create_bucket": True, "retry_timeout": 5.0}
        self._open: list[apsw.Connection] = []
        self._store: Store | None = None

    def open(self, path: Path | None = None, **options: object) -> apsw.Connection:
        """A connection through the VFS, closed at the end of the test at the latest."""
        connection = bottomless_wal.connect(path or self.path, **{**self.options, **options})  # type: ignore[arg-type]
        self._open.append(connection)
        return connection

    def close(self) -> None:
        for connection in self._open:
            with contextlib.suppress(apsw.Error):
                connection.close()
        if self._store is not None:
            self._store.close()

    def trade(self, **options: object) -> None:
        """COMMITS commits: a table, and then rows that fill a page each."""
        connection = self.open(**options)
        connection.execute("CREATE TABLE IF NOT EXISTS sales(id INTEGER PRIMARY KEY, goods BLOB)")
        for number in range(COMMITS - 1):
            connection.execute("INSERT INTO sales(goods) VALUES (?)", (random.Random(number).randbytes(3000),))
        bottomless_wal.flush(connection)
        connection.close()

    def rows(self, path: Path | None = None) -> int:
        """How many sales a file has, read by plain SQLite; -1 without the table."""
        connection = apsw.Connection(str(path or self.path), flags=apsw.SQLITE_OPEN_READWRITE)
        try:
            assert connection.execute("PRAGMA integrity_check").get == "ok"
            return int(connection.execute("SELECT count(*) FROM sales").get)
        except apsw.SQLError:
            return -1
        finally:
            connection.close()

    # --- the bucket ----------------------------------------------------------------------------------------------------

    @property
    def store(self) -> Store:
        if self._store is None:
            self._store = open_store(Config.load(self.options, environ={}))
        return self._store

    def get(self, key: str) -> bytes:
        data = self.store.get(key, limit=1 << 26)
        assert data is not None, key
        return data

    def put(self, key: str, data: bytes) -> None:
        self.store.put(key, data)

    def delete(self, *keys: str) -> None:
        self.store.delete(keys)

    def keys(self, prefix: str = "") -> list[str]:
        return [entry.key for entry in self.store.list(prefix)]

    def flip(self, key: str, at: int) -> None:
        """Changes one byte of an object."""
        data = bytearray(self.get(key))
        data[at] ^= 0x40
        self.put(key, bytes(data))

    @staticmethod
    def segment(post: int) -> str:
        """The key of the commit `post`."""
        return keys.segment_key("app.db", post - 1, post)

    @staticmethod
    def page(pgno: int) -> str:
        """The key of page `pgno`."""
        return keys.page_key("app.db", pgno)

    # --- other processes -----------------------------------------------------------------------------------------------

    def environ(self) -> dict[str, str]:
        """With which a process of its own finds the bucket, and this package."""
        return {
            **os.environ,
            ENV_PREFIX + "ENDPOINT": self.endpoint.url,
            ENV_PREFIX + "BUCKET": self.endpoint.bucket,
            ENV_PREFIX + "CREATE_BUCKET": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }


class Cli:
    """Runs commands against a shop's bucket."""

    def __call__(self, shop: Shop, *arguments: object) -> Result:
        place = ["--endpoint", shop.endpoint.url, "--bucket", shop.endpoint.bucket]
        return CliRunner().invoke(main, [*place, *map(str, arguments)], catch_exceptions=False)
