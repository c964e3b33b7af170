"""Object storage: one protocol of keys and bytes (`base`), S3 (`s3`), and a directory that gives the same guarantees (`directory`)."""

from __future__ import annotations

import time
from collections.abc import Callable

from ..core.config import Config
from .base import Entry, Receipt, Stats, Store

__all__ = ["Entry", "Receipt", "Stats", "Store", "load_store", "open_store"]


def open_store(
    config: Config,
    *,
    sleep: Callable[[float], object] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Store:
    """The store that `config.endpoint` and `config.bucket` name. Sends nothing yet; see `Store.prepare`.

    `sleep` (by default a wait that `close()` ends) and `clock` are those of the retries.

    Raises:
        ConfigError: an endpoint that cannot be one.
    """
    if config.endpoint.startswith("file:"):
        from .directory import DirectoryStore

        return DirectoryStore(config, clock=clock)
    # boto3 takes a quarter of a second to import: only those who need it pay.
    from .s3 import S3Store

    return S3Store(config, sleep=sleep, clock=clock)


def load_store(config: Config) -> None:
    """Import and read everything that the store of `config` needs, late imports of its libraries too. Sends nothing.

    Raises:
        ConfigError: an endpoint that cannot be one. StoreError: the client of S3 cannot be made.
    """
    from . import directory  # noqa: F401  (small, and needed by a process that has both kinds)

    if not config.endpoint.startswith("file:"):
        from . import s3, s3_client  # noqa: F401

        s3_client.load(config)
