"""bottomless-wal: an SQLite database whose every commit is in S3 before COMMIT returns."""

from __future__ import annotations

from .api import Status, connect, flush, register, status
from .errors import (
    BottomlessError,
    ConfigError,
    ConflictError,
    CorruptionError,
    FencedError,
    ReplicationError,
    RestoreError,
    StoreError,
)

__all__ = [
    "BottomlessError",
    "ConfigError",
    "ConflictError",
    "CorruptionError",
    "FencedError",
    "ReplicationError",
    "RestoreError",
    "Status",
    "StoreError",
    "__version__",
    "connect",
    "flush",
    "register",
    "status",
]

__version__ = "0.1.0"
