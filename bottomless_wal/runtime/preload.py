"""Load modules that are otherwise imported at first use.

A process may later drop its privileges, or lose its root directory or its packages. Then the files
of these modules may be out of reach. `register()` calls `load` for that reason. `import
bottomless_wal` is kept short: modules for an open, an upload or the end of a process are imported
at first use.
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
"""The kinds of endpoints (http, https, aws, file) whose store was loaded.

Loading takes a few hundred milliseconds, once.
"""


def load(defaults: dict[str, object]) -> None:
    """Load the modules for all operations of an open database.

    These are opening, committing, restoring at an open, compaction, closing and exit. Nothing is
    sent. A failure is only logged: an open that needs the module fails with the reason.

    Args:
        defaults: those of `register()`. They, or the environment, set the endpoint.
    """
    from ..replication import recovery  # noqa: F401  (loaded for later)
    from . import compactor  # noqa: F401  (loaded for later)

    for codec in ("ascii", "idna", "latin-1"):  # for boot_id, and for host names
        codecs.lookup(codec)
    try:
        config = Config.load(defaults)
        kind = config.endpoint.partition(":")[0]
        if kind not in _loaded:
            load_store(config)
            _loaded.add(kind)
    except BottomlessError as error:
        logger.info("not everything was loaded: %s", error.message)
