"""bottomless-wal: an SQLite database whose every commit is in S3 before COMMIT returns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .core.errors import (
    BottomlessError,
    ConfigError,
    ConflictError,
    CorruptionError,
    FencedError,
    FilesLostError,
    ReplicationError,
    RestoreError,
    StoreError,
)
from .runtime.api import Status, connect, flush, register, status

if TYPE_CHECKING:
    from .admin import (
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
    "FilesLostError",
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


def __getattr__(name: str) -> object:
    # What is done from beside is loaded when it is first asked for: an application that writes needs none of it.
    if name in __all__:
        from . import admin

        value: object = getattr(admin, name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
