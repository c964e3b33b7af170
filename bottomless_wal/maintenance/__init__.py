"""What is done to databases from beside, without opening them: restore, reset, verify, list, inspect, diagnose.

These are library functions; the command line only shows what they return.
"""

from __future__ import annotations

from .diagnosis import Check, diagnose
from .inventory import Inspection, Listed, inspect, listing
from .log_audit import Problem
from .recovery import Restored, reset_from_local, restore
from .verification import Report, verify

__all__ = [
    "Check",
    "Inspection",
    "Listed",
    "Problem",
    "Report",
    "Restored",
    "diagnose",
    "inspect",
    "listing",
    "reset_from_local",
    "restore",
    "verify",
]
