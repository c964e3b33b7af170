"""The problems that `verify` reports."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Problem", "ProblemKind"]


class ProblemKind(StrEnum):
    """What is not as it should be: in the log, in the page objects, in the head as SQLite sees it, or in a local file."""

    GAP = "gap"
    """A commit, or the way to it, is missing."""
    CORRUPT = "corrupt"
    CONTRADICTION = "contradiction"
    """Two segments name different state hashes for one txid."""
    BODY = "body"
    """The pages of a large segment are missing or damaged."""
    NO_LOG = "no-log"
    STALE = "stale"
    """A page object holds another content than the head."""
    MISSING = "missing"
    SUPERFLUOUS = "superfluous"
    """There is an object of a page that the head does not have."""
    DAMAGED = "damaged"
    INTEGRITY = "integrity"
    """SQLite's integrity_check fails."""
    LOCAL = "local"
    """The local file differs from the head."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as it should be. `object` is the key of the object (the first of them), or the path of the local file."""

    kind: ProblemKind
    object: str
    message: str
    repaired: bool = False
