"""What S3 asks for storage and requests: a table with a date, which a file of one's own may replace."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, fields, replace
from typing import Final

from ..core.errors import ConfigError

__all__ = ["GIGABYTE", "LIST_PRICES", "Prices", "load_prices"]

GIGABYTE: Final = 1 << 30  # what S3 bills as a GB


@dataclass(frozen=True, slots=True)
class Prices:
    """A price list of `date`: per GB (2^30 bytes) and month stored, per 1000 writing or listing requests, per 1000 reading ones."""

    name: str
    date: str
    currency: str
    storage_gb_month: float
    put_per_1000: float
    get_per_1000: float


LIST_PRICES: Final = Prices("Amazon S3 Standard, us-east-1, first 50 TB", "2025-01", "USD", 0.023, 0.005, 0.0004)
"""Written down from memory of that month's public list; copies of older lists say the same of storage and of writing requests. Look at
your provider's own before you decide by it."""


def load_prices(path: str | os.PathLike[str]) -> Prices:
    """The price list in a JSON file: an object with some of the fields of `Prices`; what it leaves out is as in `LIST_PRICES`.

    Raises:
        ConfigError: there is no such file, or it is no price list.
    """
    known = {field.name for field in fields(Prices)}
    hint = f"A JSON object with some of: {', '.join(sorted(known))}."
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{os.fspath(path)} is no price list: {error}", hint=hint) from error
    if not isinstance(found, dict) or not found.keys() <= known:
        raise ConfigError(f"{os.fspath(path)} is no price list", hint=hint)
    for name, value in found.items():
        if isinstance(getattr(LIST_PRICES, name), str):
            well = isinstance(value, str)
        else:
            well = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
        if not well:
            raise ConfigError(f"{value!r} is no {name} (from {os.fspath(path)})", hint=hint)
    whose = {"name": os.fspath(path), "date": "not given"}
    return replace(LIST_PRICES, **{**whose, **found})
