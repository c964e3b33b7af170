"""Parse all settings once into one frozen `Config`.

One table, `OPTIONS`, gives each option its name, its parser and its meaning. An option has the
same name in all four places, in rising precedence:

1. the defaults of the table;
2. the environment: `LIBSQL_BOTTOMLESS_<NAME>`;
3. keyword arguments of `register()` or `connect()`;
4. URI parameters: `file:app.db?vfs=bottomless&<name>=<value>`.

A name that is not in the table, or a value that its parser refuses, is a `ConfigError`, which
lists the known names or values. Credentials are not an option: they come from boto3's usual chain.
"""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Final

from .errors import ConfigError

__all__ = ["ENV_PREFIX", "OPTIONS", "Config", "Option"]

ENV_PREFIX: Final = "LIBSQL_BOTTOMLESS_"

# Only the command line reads them, so they are not options of a database.
_FACE_VARIABLES: Final = frozenset({"LOG"})

# SQLite's own URI parameters, which are not options of this package.
_SQLITE_PARAMETERS: Final = frozenset({"vfs", "mode", "cache", "psow", "nolock", "immutable", "modeof"})


@dataclass(frozen=True, slots=True)
class Config:
    """The settings of one database. Times are in seconds."""

    endpoint: str = "http://localhost:9000"
    bucket: str = "libsql"
    database_id: str = ""
    initial_replication: str = "error"
    ack: str = "pages"
    pages: str = "commit"
    interval: float = 0.0
    retry_timeout: float = 30.0
    connect_timeout: float = 5.0
    read_timeout: float = 20.0
    create_bucket: bool = False
    concurrency: int = 8
    level: int = 3
    compaction: bool = True
    snapshot_interval: float = 86400.0
    retention: float = 86400.0
    keep_snapshots: int = 30

    @classmethod
    def load(
        cls,
        *layers: Mapping[str, object],
        uri: Mapping[str, str] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Config:
        """Merge defaults, environment, arguments and URI parameters.

        Args:
            layers: keyword arguments, in rising precedence.
            uri: parameters of the URI. SQLite's own parameters are skipped.
            environ: the environment. None for `os.environ`.

        Raises:
            ConfigError: an unknown name or a bad value, in any of the four places.
        """
        chosen: dict[str, object] = {}
        for name, text in _from_environment(os.environ if environ is None else environ).items():
            chosen[name] = _parse(name, text, where=f"the environment ({ENV_PREFIX}{name.upper()})")
        for layer in layers:
            for name, value in layer.items():
                chosen[name] = _parse(name, value, where="an argument")
        for name, text in (uri or {}).items():
            if name not in _SQLITE_PARAMETERS:
                chosen[name] = _parse(name, text, where="the URI")
        if chosen.get("pages", "commit") != "commit":
            # ack=pages promises page objects at every commit. The other two values of `pages` do
            # not write them then.
            if chosen.setdefault("ack", "log") == "pages":
                raise ConfigError(
                    f"ack=pages waits for page objects, but pages={chosen['pages']} writes none at a commit",
                    hint="Use ack=log (or ack=local) with pages=checkpoint and pages=off.",
                    option="pages",
                    actual=str(chosen["pages"]),
                )
        return cls(**chosen)  # type: ignore[arg-type]  # every value went through its option's parser

    def changed(self, **changes: Any) -> Config:
        """Return a copy with some fields replaced, without parsing."""
        return replace(self, **changes)


@dataclass(frozen=True, slots=True)
class Option:
    """One row of the table: how a value is parsed, and what it means.

    A value is text, or an object that is taken as it is.
    """

    name: str
    parse: Callable[[object], object]
    known: str
    meaning: str


def _choice(*allowed: str) -> tuple[Callable[[object], object], str]:
    def parse(value: object) -> str:
        if value not in allowed:
            raise ValueError
        return str(value)

    return parse, " | ".join(allowed)


def _number(low: float, high: float) -> tuple[Callable[[object], object], str]:
    def parse(value: object) -> float:
        number = float(value)  # type: ignore[arg-type]  # a TypeError is reported like a ValueError
        if isinstance(value, bool) or not low <= number <= high:
            raise ValueError
        return number

    return parse, f"seconds, {low:g} to {high:g}"


def _integer(low: int, high: int) -> tuple[Callable[[object], object], str]:
    def parse(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int | str) or not low <= int(value) <= high:
            raise ValueError
        return int(value)

    return parse, f"a whole number, {low} to {high}"


_FLAGS: Final = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def _flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    try:
        return _FLAGS[str(value).lower()]
    except KeyError:
        raise ValueError from None


def _endpoint(value: object) -> str:
    text = str(value)
    if text == "aws":
        return text
    parts = urllib.parse.urlsplit(text)
    if parts.username or parts.password:
        raise ValueError
    if parts.scheme in ("http", "https") and parts.hostname and "@" not in text:  # a slash in a password hides it from urlsplit
        _ = parts.port  # raises ValueError for a port that is not a number
        if set("?#%") & set(text) or {".", ".."} & set(parts.path.split("/")):
            raise ValueError  # clients and proxies resolve these paths differently
        return text.rstrip("/")
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path.startswith("/"):
        return text
    raise ValueError


def _bucket(value: object) -> str:
    text = str(value)
    if not 1 <= len(text) <= 255 or text.startswith(".") or not all(c.isascii() and (c.isalnum() or c in "._-") for c in text):
        raise ValueError
    return text


def _text(value: object) -> str:
    if not isinstance(value, str) or "\0" in value or len(value) > 200:
        raise ValueError
    return value


def _option(name: str, parser: tuple[Callable[[object], object], str], meaning: str) -> Option:
    return Option(name, parser[0], parser[1], meaning)


OPTIONS: Final[Mapping[str, Option]] = {
    option.name: option
    for option in (
        _option(
            "endpoint",
            (_endpoint, "http(s)://host[:port][/path] without user and password | file:///directory | aws"),
            "the S3-compatible server; `aws` is Amazon's own of the region",
        ),
        _option("bucket", (_bucket, "letters, digits, '.', '_' and '-'"), "the bucket, or the directory below file:///"),
        _option("database_id", (_text, "text of at most 200 characters"), "a name before the file's, to tell databases apart"),
        _option("initial_replication", _choice("error", "force", "skip"), "what to do when the local file and the history diverged"),
        _option("ack", _choice("pages", "log", "local"), "what COMMIT waits for"),
        _option("pages", _choice("commit", "checkpoint", "off"), "when page objects are written"),
        _option("interval", _number(0, 3600), "how long ack=local gathers commits before it sends them"),
        _option("retry_timeout", _number(0, 86400), "how long a request is retried before it is given up"),
        _option("connect_timeout", _number(0.1, 3600), "how long a connection may take"),
        _option("read_timeout", _number(0.1, 3600), "how long the server may stay silent"),
        _option("create_bucket", (_flag, "1 | 0"), "create the bucket when it is missing"),
        _option("concurrency", _integer(1, 64), "requests in flight at once"),
        _option("level", _integer(1, 19), "zstd's compression level"),
        _option("compaction", (_flag, "1 | 0"), "the writer keeps its history short by itself"),
        _option("snapshot_interval", _number(60, 31622400), "the longest time between two snapshots of a database that is written to"),
        _option("retention", _number(0, 3162240000), "how long every single commit can be restored"),
        _option("keep_snapshots", _integer(0, 36600), "for how many days, beyond that, one snapshot of each day is kept"),
    )
}

if set(OPTIONS) != {field.name for field in fields(Config)}:
    raise AssertionError("OPTIONS and Config name different options")


def _from_environment(environ: Mapping[str, str]) -> dict[str, str]:
    found = {key[len(ENV_PREFIX) :]: value for key, value in environ.items() if key.startswith(ENV_PREFIX)}
    return {name.lower(): value for name, value in found.items() if name not in _FACE_VARIABLES}


def _parse(name: str, value: object, *, where: str) -> object:
    option = OPTIONS.get(name)
    if option is None:
        raise ConfigError(f"unknown option {name!r} in {where}", hint=f"Known options: {', '.join(OPTIONS)}.", option=name)
    try:
        return option.parse(value)
    except (ValueError, TypeError):
        # An endpoint may contain a password. Then the message must not repeat the value.
        is_secret = name == "endpoint" and "@" in str(value)
        shown = "the value" if is_secret else repr(value)
        raise ConfigError(
            f"{shown} is no {name} (from {where})",
            hint=f"{name}: {option.known}.",
            option=name,
            expected=option.known,
            actual=None if is_secret else str(value),
        ) from None
