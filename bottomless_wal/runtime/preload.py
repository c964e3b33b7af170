"""Load what is otherwise imported late, for a process that later gives up its privileges, its root directory or its packages.

`import bottomless_wal` is kept short: what only an open, an upload or the end of a process needs is imported when it is first used. After a
process has dropped its privileges the files of these modules may be out of reach. `register()` calls `load` for that reason.
"""

from __future__ import annotations

import codecs
from typing import Final

from ..core.config import Config
from ..core.errors import BottomlessError
from ..core.logs import get_logger
from ..storage import load_store

__all__ = ["load"]

logger = get_logger(__name__)

_loaded: Final[set[str]] = set()
"""The kinds of endpoints (http, https, aws, file) whose store was loaded: it takes a few hundred milliseconds, once."""


def load(defaults: dict[str, object]) -> None:
    """Load what opening, committing, restoring at an open, upkeep, closing and exit need.

    Sends nothing. What cannot be set up is logged only: the open fails with the reason, if it needs it.

    Args:
        defaults: those of `register()`. They, or the environment, name the endpoint whose store is loaded.
    """
    from ..replication import recovery  # noqa: F401  (loaded for later)
    from . import compactor  # noqa: F401  (loaded for later)

    for codec in ("ascii", "idna", "latin-1"):  # of boot_id, and of the names of hosts
        codecs.lookup(codec)
    try:
        config = Config.load(defaults)
        kind = config.endpoint.partition(":")[0]
        if kind not in _loaded:
            load_store(config)
            _loaded.add(kind)
    except BottomlessError as error:
        logger.info("not everything was loaded: %s", error.message)
