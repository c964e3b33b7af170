"""Return the status of the replication of one database."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass

import apsw

from ..core.errors import BottomlessError, ConfigError, CorruptionError, ReplicationError, RestoreError
from ..formats.page import repr_in_hex
from ..replication.index import LocalIndex
from ..sqlite.snapshot_reader import WalState
from .replica import Replica

__all__ = ["Status", "status_of"]


@repr_in_hex("state_hash")
@dataclass(frozen=True, slots=True)
class Status:
    """The status of the replication of one database, in this process.

    - `pending_frames` counts committed WAL frames that are not in the log. None: only a scan could
      find out.
    - `lag` is the age, in seconds, of the oldest such commit that was made here.
    - `log_error` is a gap that was found in the log and is not repaired yet.
    - `log_repairs` counts the snapshots that repaired a gap.
    - `requests` and the bytes (`sent` by kind of request) are counted since the database was opened
      here, `seconds` ago.
    """

    path: str
    name: str
    store: str
    txid: int
    state_hash: int
    pending_frames: int | None
    view_txid: int
    lag: float
    last_error: BottomlessError | None
    log_error: RestoreError | None
    log_repairs: int
    requests: Mapping[str, int]
    sent: Mapping[str, int]
    bytes_sent: int
    bytes_received: int
    retries: int
    seconds: float


def status_of(replica: Replica) -> Status:
    """Return the status of the replication of `replica`. Send nothing.

    Raises:
        ConfigError: the local index is missing or damaged.
        CorruptionError: the database is damaged.
    """
    failure = replica.worker.last_error
    tip: WalState | None = None
    try:
        tip = replica.local.tip()
    except ReplicationError as error:
        failure = failure or error
    except (apsw.NotADBError, apsw.CorruptError) as error:
        raise CorruptionError(
            f"{replica.path} is damaged: {error}", hint=f"Restore it: `bottomless-wal restore --force {shlex.quote(replica.path)}`."
        ) from error
    header = LocalIndex.peek(replica.index.path)
    try:
        replica.local.has_content(is_new=header is None or not header.txid)
    except ReplicationError as error:
        failure = failure or error
    if header is None:
        raise ConfigError(f"{replica.index.path} is missing or damaged", hint="The next commit rebuilds it.")
    pending: int | None = None
    position = header.position
    if tip is not None and not header.needs_scan:
        if position is None or tip.header is None:
            pending = tip.frames
        elif (position.salt1, position.salt2) == (tip.header.salt1, tip.header.salt2):
            pending = max(0, tip.frames - position.frame)
    stats = replica.store.stats
    return Status(
        path=replica.path,
        name=replica.name,
        store=replica.store.describe(),
        txid=header.txid,
        state_hash=header.state,
        pending_frames=pending,
        view_txid=header.view_complete,
        lag=replica.worker.lag(),
        last_error=failure,
        log_error=replica.log_check.error,
        log_repairs=replica.log_check.repairs,
        requests=stats.requests,
        sent=stats.sent,
        bytes_sent=stats.bytes_sent,
        bytes_received=stats.bytes_received,
        retries=stats.retries,
        seconds=time.monotonic() - replica.since,
    )
