"""Check which paths may be a replicated database, which is stored by file name.

links            Links of directories may be followed. A link of the file itself must have the
                 name of the file it leads to. Otherwise the same path on another machine, without
                 the link, would be another database, and an empty one.
reserved names   `<db>-bottomless`, `<db>-bottomless-view` and `<db>-bottomless-<16 hex digits>`
                 are files of this package beside <db>.
"""

from __future__ import annotations

import os
import re
from typing import Final

from ..core.errors import ConfigError

__all__ = ["require_free_name", "require_same_name"]

_RESERVED: Final = re.compile(r"(.+)-bottomless(-view|-[0-9a-f]{16})?", re.DOTALL)


def require_same_name(given: str, resolved: str) -> None:
    """Refuse a link to a file with another name.

    Args:
        given: the path as the caller gave it.
        resolved: the same path with its links resolved.

    Raises:
        ConfigError: their last components differ.
    """
    name, target = os.path.basename(os.path.normpath(given)), os.path.basename(resolved)
    if name != target:
        raise ConfigError(
            f"{given} is a link to {resolved}: the database is stored under the name of its file, {target!r}, not as {name!r}, and "
            "the path would not find it on a machine without the link",
            hint=f"Open {resolved} itself, or rename one of the two so that both have one name.",
        )


def require_free_name(path: str) -> None:
    """Refuse the name of a file that this package keeps beside another database.

    Raises:
        ConfigError: `path` has such a name.
    """
    match = _RESERVED.fullmatch(os.path.basename(path))
    if match is not None:
        raise ConfigError(
            f"{path} cannot be a replicated database: the name is reserved for a file beside the database {match[1]!r}",
            hint="Rename it: the name of a database must not end in -bottomless.",
        )
