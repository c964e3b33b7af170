"""Every window between two effects has a name here, so that a test can die in exactly that one.

Production code calls `reach(name)` between the effects; it does nothing. A test arms one name with an action, as a rule a SIGKILL of
its own process, and then shows that the next open is right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

__all__ = ["POINTS", "arm", "disarm", "reach"]

POINTS: Final = frozenset(
    {
        "before intent",  # frames read, nothing written down
        "before put",  # the intent is in the index, the segment is not stored
        "after put",  # the segment is stored, the index does not know
        "before header",  # the page hashes are in the index, its header is not
        "before view",  # the index is at the new commit, no page object is
        "within view",  # some page objects are
        "after view",  # all are, the index does not know
        "after body",  # the body of a large segment is stored, the segment is not
        "before seal",  # a WAL restart is about to be noted
        "after seal",  # noted, and the new WAL header is not written
        "before rename",  # a restored file is complete beside the path
        "after rename",  # it is in place, the index does not know
        "before reset",  # a reset is decided, nothing is stored
        "before conversion",  # a rollback-journal database is about to become a WAL one
        "after open",  # boot is done, the file is not yet open
        "before close",  # drained, our own connections still open
        "within adopt",  # an earlier attempt was recognised, the index does not know
        "before sweep",  # page objects past the end are about to be deleted
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


def reach(name: str) -> None:
    """The code is at this point."""
    if _armed and name in _armed:
        _armed[name]()
