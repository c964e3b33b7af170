"""Define exit codes, common arguments, ages, times and tables for the commands."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

import click

__all__ = ["DATABASE", "EXIT_PROBLEM", "FAILED", "INTERRUPTED", "USAGE", "age", "json_option", "moment", "table"]

EXIT_PROBLEM, USAGE, FAILED, INTERRUPTED = 1, 2, 3, 130

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}

C = TypeVar("C", bound=Callable[..., Any])

DATABASE: Final = click.argument("database", metavar="DB", type=click.Path(dir_okay=True))


def json_option(command: C) -> C:
    """Add the option `--json` to a command, as the argument `json`."""
    return click.option("--json", "json", is_flag=True, help="The result as JSON, on stdout.")(command)


def age(ctx: click.Context, param: click.Parameter, value: str) -> float:
    """Parse an option such as `90s`, `15m`, `12h` or `30d`, and return seconds."""
    text = value.strip()
    try:
        seconds = float(text[:-1]) * _UNITS[text[-1:]]
    except (KeyError, ValueError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise click.BadParameter(f"{value!r} is no age: a number and s, m, h or d, such as 30d.")
    return seconds


def moment(ctx: click.Context, param: click.Parameter, value: str | None) -> datetime | None:
    """Parse an option with a date and time in ISO 8601.

    The time zone is UTC if none is given.
    """
    if value is None:
        return None
    try:
        found = datetime.fromisoformat(value.strip())
    except ValueError:
        raise click.BadParameter(f"{value!r} is no moment: such as 2026-11-22T10:00:00Z.") from None
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found


def table(columns: list[str], rows: list[list[str]]) -> Any:
    """Return a table. Columns whose title begins with `>` are right-aligned."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in columns:
        table.add_column(title.lstrip(">"), justify="right" if title.startswith(">") else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
