"""Every window between two effects has a name here, so that a test can die in exactly that one.

Production code calls `reach(name)` between the effects; it does nothing. A test arms one name with an action, as a rule a SIGKILL of
its own process, and then shows that the next open is right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

__all__ = ["POINTS", "arm", "disarm", "failpoint"]

POINTS: Final = frozenset(
    {
        # a batch
        "before intent",  # frames read, nothing written down
        "within body",  # some pages of a large segment are uploaded
        "after body",  # the body of a large segment is stored, the segment is not
        "before put",  # the intent is in the index, the segment is not stored
        "after put",  # the segment is stored, the index does not know
        "within adopt",  # an earlier attempt was recognised, the index does not know
        "within record",  # a whole database is stored, and the index is about to forget the one before it
        "before header",  # the page hashes are in the index, its header is not
        # the page view
        "before view",  # the index is at the new commit, no page object is
        "within view",  # some page objects are
        "after view",  # all are, the index does not know
        "after fill",  # some of the backlog's are, the index does not know
        "before sweep",  # page objects past the end are about to be deleted
        "after sweep",  # they are, the index does not know
        # the WAL, and the last close
        "before seal",  # a WAL restart is about to be noted
        "after seal",  # noted, and the new WAL header is not written
        "before close",  # drained, our own connections still open
        "after close",  # all connections are closed, the index is not marked clean
        # opening
        "before conversion",  # a rollback-journal database is about to become a WAL one
        "after conversion",  # it is one, and nothing is stored
        "before reset",  # a reset is decided, nothing is stored
        "after clear",  # the index is empty, what it said is forgotten
        "within learn",  # the index has the pages of some edges of the history
        "after fold",  # the WAL of a file that is to be replaced is in its main file
        "within restore",  # a part of the database is rebuilt beside its path
        "before rename",  # a restored file is complete beside the path
        "after rename",  # it is in place, the index does not know
        "before index",  # `restore` is about to put the index of the file in its place
        # upkeep
        "before merged",  # edges are merged, the merged one is not stored
        "after merged",  # it is
        "before prune",  # what nobody needs is about to be deleted
        "within prune",  # some of it is
        # and at last
        "after open",  # boot is done, the file is not yet open
    }
)

_armed: dict[str, Callable[[], None]] = {}


def arm(name: str, action: Callable[[], None]) -> None:
    """Runs `action` whenever `name` is reached. ValueError for a name that is not in POINTS."""
    if name not in POINTS:
        raise ValueError(f"no crash point {name!r}; there are: {', '.join(sorted(POINTS))}")
    _armed[name] = action


def disarm() -> None:
    """Forgets all actions."""
    _armed.clear()


def failpoint(name: str) -> None:
    """The code is at this point."""
    if _armed and name in _armed:
        _armed[name]()
