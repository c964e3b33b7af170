"""Going back on purpose: a local file is made the head of its history."""

from __future__ import annotations

import contextlib
import os

import apsw

from ..core.errors import ConfigError, ConflictError
from ..runtime import api
from ..runtime.connect import VFS_NAME, install, pending_open
from ..runtime.registry import registry
from ..runtime.status import Status
from .stored_database import configured, stored_name

__all__ = ["reset_from_local"]


def reset_from_local(path: str | os.PathLike[str], **options: object) -> Status:
    """Makes the local file at `path` the head of its history, by one reset commit, whatever the two hold. Returns when all is stored.

    Earlier states stay in the history. `options` are those of `connect`.

    Raises:
        ConfigError: there is no such database. ConflictError: it is open in this process. ReplicationError, StoreError: not all was stored.
    """
    _, local = stored_name(path, configured(options).database_id)
    if local is None or not os.path.exists(local) or os.path.getsize(local) == 0:
        raise ConfigError(f"there is no database at {os.fspath(path)}", hint="A reset makes an existing local file the head.")
    if registry.get(local) is not None:
        raise ConflictError(f"{local} is open in this process", hint="Close every connection to it first.")
    install({})
    with pending_open(options, reset=True):
        connection = apsw.Connection(local, flags=apsw.SQLITE_OPEN_READWRITE, vfs=VFS_NAME)
    with contextlib.closing(connection):
        api.flush(connection)
        return api.status(connection)
