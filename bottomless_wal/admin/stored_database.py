"""What a maintenance command is about: a bucket, and one database in it, reached without opening the database."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..core.config import Config
from ..core.errors import ConfigError
from ..formats import keys
from ..history.log import RemoteLog
from ..runtime.connect import installed_defaults
from ..sqlite.database_path import require_same_name
from ..storage import Store, open_store

__all__ = ["StoredDatabase", "configured", "opened", "stored_name"]


@dataclass(frozen=True, slots=True)
class StoredDatabase:
    """The database stored as `name`. `path`: the local file it belongs to, resolved; None when only its name was given."""

    config: Config
    store: Store
    history: RemoteLog
    name: str
    path: str | None

    @property
    def requests(self) -> int:
        """Requests made so far."""
        return sum(self.store.stats.requests.values())


def configured(options: Mapping[str, object]) -> Config:
    """The settings that `connect(**options)` would have.

    Raises:
        ConfigError: an unknown option or a bad value.
    """
    # The defaults given to register() hold for every database of this process.
    return Config.load(installed_defaults(), options)


def stored_name(database: str | os.PathLike[str], database_id: str) -> tuple[str, str | None]:
    """(name in the bucket, local path) of what a person typed: a path, or a name as `listing` shows it.

    A name is taken for one only where it cannot be meant as a path: it has characters that no plain name has, and no such file exists.

    Raises:
        ConfigError: the path has no base name, or one that cannot be stored.
    """
    text = os.fspath(database)
    if "/" not in text and not {"~", "="}.isdisjoint(text) and not os.path.lexists(text):
        with contextlib.suppress(ValueError):
            keys.split_name(text)
            return text, None
    if text.startswith("file:"):
        raise ConfigError(f"{text!r} is a URI", hint="Give the path of the file, and the rest as options.")
    path = os.path.realpath(text)
    if os.path.isdir(path):
        raise ConfigError(f"{path} is a directory", hint="Name the database's file.")
    require_same_name(text, path)
    return keys.database_name(database_id, path), path


@contextlib.contextmanager
def opened(database: str | os.PathLike[str], options: Mapping[str, object]) -> Iterator[StoredDatabase]:
    """The target of a command, its store open. Sends nothing yet.

    Raises:
        ConfigError: as `configured` and `stored_name`.
    """
    config = configured(options)
    name, path = stored_name(database, config.database_id)
    with contextlib.closing(open_store(config)) as store:
        yield StoredDatabase(config, store, RemoteLog(store, name), name, path)
