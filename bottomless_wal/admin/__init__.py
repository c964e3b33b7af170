"""Administrative operations on stored databases: restore, reset, verify, list, inspect, diagnose, compact and prune.

These are library functions; the command line only shows what they return.
"""

from __future__ import annotations

from .compaction import CompactionReport, PruneReport, SnapshotReport, compact, forget, prune, snapshot
from .doctor import Check, CheckState, diagnose
from .inspection import Inspection, Lineage, Listed, inspect, listing
from .prices import LIST_PRICES, Prices, load_prices
from .problems import Problem, ProblemKind
from .reset import reset_from_local
from .restoration import Restored, restore
from .state_list import State, States, states
from .usage import Cost, Kind, Usage, running_costs, stats
from .verification import Report, verify

__all__ = [
    "LIST_PRICES",
    "Check",
    "CheckState",
    "CompactionReport",
    "Cost",
    "Inspection",
    "Kind",
    "Lineage",
    "Listed",
    "Prices",
    "Problem",
    "ProblemKind",
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
