"""Run SQLite's integrity_check on a database file."""

from __future__ import annotations

import contextlib
import urllib.parse
from typing import Final

import apsw

__all__ = ["integrity_fault"]

_MOST_FAULTS: Final = 3  # faults in a message


def integrity_fault(path: str) -> str | None:
    """Return the faults that SQLite's `integrity_check` finds in the database file at `path`; None if it is sound.

    No connection may have the file open.
    """
    try:
        # immutable: no WAL and no shared memory are made beside it.
        uri = f"file:{urllib.parse.quote(path)}?immutable=1"
        with contextlib.closing(apsw.Connection(uri, flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI)) as connection:
            answers = [str(row[0]) for row in connection.execute(f"PRAGMA integrity_check({_MOST_FAULTS})")]
    except apsw.Error as error:
        return str(error)
    return None if answers == ["ok"] else "; ".join(answers)
