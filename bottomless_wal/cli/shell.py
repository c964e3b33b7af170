"""Run APSW's SQLite shell with the VFS registered.

`.open file:test.db?vfs=bottomless` works there, and a FILE is opened replicated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence

import apsw
import apsw.shell

from ..runtime import api
from ..runtime.connect import install
from ..runtime.registry import registry
from .output import print_error

__all__ = ["run"]


def run(file: str | None, sql: Sequence[str], options: Mapping[str, object]) -> int:
    """Run the shell on stdin, or the statements in `sql`, and close everything.

    The close sends what is pending.

    Returns:
        An exit code: 0, or that of `.exit`; 1 if an error ended the shell (`.bail on`); 3 if commits
        could not be stored.

    Raises:
        BottomlessError, apsw.Error: `file` cannot be opened.
    """
    install(options)
    connection = api.connect(file) if file is not None else None
    shell = apsw.shell.Shell(db=connection)
    code = 0
    try:
        if sql:
            for statement in sql:
                shell.process_complete_line(statement)  # type: ignore[no-untyped-call]
        else:
            shell.cmdloop()  # type: ignore[no-untyped-call]
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 0
    except (apsw.Error, shell.Error) as error:
        code = 1
        if not getattr(error, "_handle_exception_saw_this", False):  # otherwise the shell has printed it
            print_error(error)
    # Not every connection of this process: the replicas need their own ones until the end.
    return _close({connection, *shell.db_references}) or code


def _close(connections: Iterable[apsw.Connection | None]) -> int:
    """Close the connections. Return 3 if commits could not be stored."""
    replicas = registry.all()
    for connection in connections:
        if connection is not None:
            with contextlib.suppress(apsw.Error):  # an error of the upload is in the replica's last error
                connection.close(True)
    failed = [error for replica in replicas if (error := replica.worker.last_error) is not None]
    for error in failed:
        print_error(error)
    return 3 if failed else 0
