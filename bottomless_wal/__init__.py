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
from .maintenance import (
    Check,
    Inspection,
    Listed,
    Problem,
    Report,
    Restored,
    diagnose,
    inspect,
    listing,
    reset_from_local,
    restore,
    verify,
)

__all__ = [
    "BottomlessError",
    "Check",
    "ConfigError",
    "ConflictError",
    "CorruptionError",
    "FencedError",
    "Inspection",
    "Listed",
    "Problem",
    "ReplicationError",
    "Report",
    "RestoreError",
    "Restored",
    "Status",
    "StoreError",
    "__version__",
    "connect",
    "diagnose",
    "flush",
    "inspect",
    "listing",
    "register",
    "reset_from_local",
    "restore",
    "status",
    "verify",
]

__version__ = "0.1.0"
