"""Decide what recovery at open does.

The relation of the local state to the remote history decides.

The logic is Git's fast-forward logic, as a pure function.

| local file | remote | relation | action |
|---|---|---|---|
| empty or missing | nothing | - | CREATE: the first commit is 0 -> 1 |
| empty or missing | page objects only | - | RESTORE_PAGES |
| empty or missing | a history | - | RESTORE its head |
| not empty | no history | - | INITIAL_UPLOAD: 0 -> 1 is the whole database |
| not empty | a history | AT_HEAD: the local state is the head | RESUME |
| | | BEHIND: it is an earlier state of that history | FAST_FORWARD |
| | | AHEAD: it came from the head by local commits | CATCH_UP: the difference is the next commit |
| | | DIVERGED | the policy: `error` CONFLICT, `force` RESET, `skip` KEEP_LOCAL |
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Final

from .lineage import Lineage

__all__ = ["POLICY", "Action", "Remote", "decide"]


class Remote(Enum):
    """What the bucket holds for this database."""

    NOTHING = auto()
    PAGES = auto()
    HISTORY = auto()


class Action(Enum):
    """What recovery at open does."""

    CREATE = auto()
    RESTORE = auto()
    RESTORE_PAGES = auto()
    INITIAL_UPLOAD = auto()
    RESUME = auto()
    FAST_FORWARD = auto()
    CATCH_UP = auto()
    CONFLICT = auto()
    RESET = auto()
    KEEP_LOCAL = auto()


POLICY: Final = {"error": Action.CONFLICT, "force": Action.RESET, "skip": Action.KEEP_LOCAL}


def decide(empty: bool, remote: Remote, relation: Lineage | None, policy: str) -> Action:
    """Return the action of the table above.

    `relation` is used only where there are two states to compare.
    """
    if empty:
        return {Remote.NOTHING: Action.CREATE, Remote.PAGES: Action.RESTORE_PAGES, Remote.HISTORY: Action.RESTORE}[remote]
    if remote is not Remote.HISTORY:
        return Action.INITIAL_UPLOAD
    if relation is Lineage.AT_HEAD:
        return Action.RESUME
    if relation is Lineage.BEHIND:
        return Action.FAST_FORWARD
    if relation is Lineage.AHEAD:
        return Action.CATCH_UP
    return POLICY[policy]
