"""Name every window between two effects, so that a test can stop in exactly one.

Production code calls `failpoint(name)` between the effects, which does nothing. A test arms one
name with an action, usually a SIGKILL of its own process. It then checks that the next open is
right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

__all__ = ["POINTS", "arm", "disarm", "failpoint"]

POINTS: Final = frozenset(
    {
        # a batch
        "before intent",  # frames are read, nothing is recorded
        "within body",  # some pages of a large segment are uploaded
        "after body",  # the body of a large segment is stored, the segment is not
        "before put",  # the intent is in the index, the segment is not stored
        "after put",  # the segment is stored, the index is not updated
        "within adopt",  # an earlier attempt was recognised, the index is not updated
        "within record",  # a whole database is stored, and the index still describes the one before it
        "before header",  # the page hashes are in the index, its header is not
        # the page view
        "before view",  # the index is at the new commit, no page object is
        "within view",  # some page objects are written
        "after view",  # all are written, the index is not updated
        "after fill",  # some of the backlog's are written, the index is not updated
        "before sweep",  # page objects past the end are about to be deleted
        "after sweep",  # they are deleted, the index is not updated
        # the WAL, and the last close
        "before seal",  # the WAL reset record is about to be written
        "after seal",  # the record is written, the new WAL header is not
        "before close",  # drained, our own connections still open
        "after close",  # all connections are closed, the index is not marked clean
        # opening
        "before conversion",  # a database in rollback mode is about to be switched to WAL mode
        "after conversion",  # it is switched, and nothing is stored
        "before reset",  # a reset is decided, nothing is stored
        "after clear",  # the index is empty, its earlier content is lost
        "within learn",  # the index has the pages of some segments of the log
        "after fold",  # the WAL of a file that will be replaced is copied into its main file
        "within restore",  # a part of the database is rebuilt beside its path
        "before rename",  # a restored file is complete beside the path
        "after rename",  # it is in place, the index is not updated
        "before index",  # `restore` is about to put the index of the file in place
        # compaction and retention
        "before merged",  # segments are merged, the merged segment is not stored
        "after merged",  # it is
        "before prune",  # segments that retention does not need are about to be deleted
        "within prune",  # some of them are deleted
        # the first open
        "after open",  # the recovery is done, the file is not yet open
    }
)

_armed: dict[str, Callable[[], None]] = {}


def arm(name: str, action: Callable[[], None]) -> None:
    """Run `action` whenever the failpoint `name` is reached.

    Raises:
        ValueError: `name` is not in POINTS.
    """
    if name not in POINTS:
        raise ValueError(f"no crash point {name!r}; there are: {', '.join(sorted(POINTS))}")
    _armed[name] = action


def disarm() -> None:
    """Remove all actions."""
    _armed.clear()


def failpoint(name: str) -> None:
    """Run the action of the failpoint `name`, if it is armed."""
    if _armed and name in _armed:
        _armed[name]()
