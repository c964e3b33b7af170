"""SQLite's own judgement of a database file."""

from __future__ import annotations

import contextlib
import urllib.parse
from typing import Final

import apsw

__all__ = ["integrity_fault"]

_MOST_FAULTS: Final = 3  # that a message tells


def integrity_fault(path: str) -> str | None:
    """Return what SQLite's `integrity_check` says against the database file at `path`, which nobody has open; None if it is sound."""
    try:
        # immutable: no WAL and no shared memory are made beside it.
        uri = f"file:{urllib.parse.quote(path)}?immutable=1"
        with contextlib.closing(apsw.Connection(uri, flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI)) as connection:
            answers = [str(row[0]) for row in connection.execute(f"PRAGMA integrity_check({_MOST_FAULTS})")]
    except apsw.Error as error:
        return str(error)
    return None if answers == ["ok"] else "; ".join(answers)
