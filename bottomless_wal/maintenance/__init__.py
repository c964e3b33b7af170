"""What is done to databases from beside, without opening them: restore, reset, verify, list, inspect, diagnose,
and the upkeep of their histories.

These are library functions; the command line only shows what they return.
"""

from __future__ import annotations

from .diagnosis import Check, diagnose
from .history_upkeep import CompactionReport, PruneReport, SnapshotReport, compact, forget, prune, snapshot
from .inventory import Inspection, Listed, inspect, listing
from .log_audit import Problem
from .prices import LIST_PRICES, Prices, load_prices
from .recovery import Restored, reset_from_local, restore
from .timeline import State, States, states
from .usage import Cost, Kind, Usage, running_costs, stats
from .verification import Report, verify

__all__ = [
    "LIST_PRICES",
    "Check",
    "CompactionReport",
    "Cost",
    "Inspection",
    "Kind",
    "Listed",
    "Prices",
    "Problem",
    "PruneReport",
    "Report",
    "Restored",
    "SnapshotReport",
    "State",
    "States",
    "Usage",
    "compact",
    "diagnose",
    "forget",
    "inspect",
    "listing",
    "load_prices",
    "prune",
    "reset_from_local",
    "restore",
    "running_costs",
    "snapshot",
    "states",
    "stats",
    "verify",
]
