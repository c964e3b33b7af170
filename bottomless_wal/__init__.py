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
    CompactionReport,
    Inspection,
    Listed,
    Problem,
    PruneReport,
    Report,
    Restored,
    SnapshotReport,
    compact,
    diagnose,
    inspect,
    listing,
    prune,
    reset_from_local,
    restore,
    snapshot,
    verify,
)

__all__ = [
    "BottomlessError",
    "Check",
    "CompactionReport",
    "ConfigError",
    "ConflictError",
    "CorruptionError",
    "FencedError",
    "Inspection",
    "Listed",
    "Problem",
    "PruneReport",
    "ReplicationError",
    "Report",
    "RestoreError",
    "Restored",
    "SnapshotReport",
    "Status",
    "StoreError",
    "__version__",
    "compact",
    "connect",
    "diagnose",
    "flush",
    "inspect",
    "listing",
    "prune",
    "register",
    "reset_from_local",
    "restore",
    "snapshot",
    "status",
    "verify",
]

__version__ = "0.1.0"
