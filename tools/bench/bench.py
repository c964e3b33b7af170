#!/usr/bin/env python3
"""Measures the library against what it cannot beat (a raw request, plain SQLite) and against its peers (Litestream, sqlite-s3vfs).

Every figure is a ratio of two sides that were measured in one run, in turn. The server is rclone's on loopback; where a case says
20 ms, a proxy makes it so far away. `--quick` takes a few minutes and is rough; `--only NAME,...` runs some cases.

Exit status: 0, also when targets are missed; 1 when a case could not be run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import apsw
from rich.console import Console
from rich.table import Table

from tools.bench import commit_cases, database_cases
from tools.bench.environment import Line, World

CASES: Final[dict[str, Callable[[World], Iterator[Line]]]] = {
    "commit-log": commit_cases.commit_log,
    "commit-pages": commit_cases.commit_pages,
    "commit-local": commit_cases.commit_local,
    "threads": commit_cases.threads,
    "reads": commit_cases.reads,
    "import": commit_cases.imports,
    "loopback": commit_cases.loopback,
    "idle": commit_cases.idle,
    "lag": commit_cases.lag,
    "full-load": commit_cases.full_load,
    "initial": database_cases.initial,
    "page-view": database_cases.page_view,
    "restore": database_cases.restore,
    "restore-commits": database_cases.restore_commits,
    "stored": database_cases.stored,
    "memory": database_cases.memory,
    "reopen": database_cases.reopen,
    "growth": database_cases.growth,
}

WIDTH: Final = 200
"""Of the table, in a file."""


def measure(world: World, name: str) -> tuple[list[Line], float]:
    """The lines of one case; an error becomes a line."""
    lines: list[Line] = []
    began = time.monotonic()
    try:
        with world.case():
            for line in CASES[name](world):
                lines.append(line)
    except Exception as error:  # noqa: BLE001  (a case that cannot run is reported, and the others go on)
        traceback.print_exc(file=sys.stderr)
        lines.append(Line(name, "could not be measured", None, None, error=f"{type(error).__name__}: {error}"))
    return lines, time.monotonic() - began


def figure(value: float | None, unit: str) -> str:
    """Three digits that mean something."""
    if value is None:
        return ""
    digits = 0 if abs(value) >= 100 or value == int(value) else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}{' ' if unit and not unit.startswith('/') else ''}{unit}"


def table(lines: list[Line]) -> Table:
    shown = Table(show_lines=False, header_style="bold")
    for column in ("case", "what", "ours", "theirs", "against", "ratio", "target", "met"):
        shown.add_column(column, justify="right" if column in ("ours", "theirs", "ratio", "target") else "left", overflow="fold")
    shown.add_column("note", overflow="fold", style="dim")
    for line in lines:
        if line.error:
            shown.add_row(line.name, line.what, "", "", "", "", "", "[red]error", line.error[:300])
            continue
        met = {True: "[green]yes", False: "[red]no", None: ""}[line.met]
        target = f"{line.target[0].replace('<=', '≤').replace('>=', '≥')} {line.target[1]:g}" if line.target else ""
        ratio = "" if line.ratio is None else f"{line.ratio:.2f}"
        shown.add_row(
            line.name, line.what, figure(line.ours, line.unit), figure(line.theirs, line.unit), line.against, ratio, target, met, line.note
        )
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME[,NAME]", default="", help=f"of {', '.join(CASES)}")
    parser.add_argument("--quick", action="store_true", help="small sizes: a first impression in some five minutes")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write all figures there")
    args = parser.parse_args()
    names = [name for name in args.only.split(",") if name] or list(CASES)
    if unknown := set(names) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    # A plain `kill` is to clean up as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    progress = Console(stderr=True, width=None if sys.stderr.isatty() else WIDTH)
    machine = {"python": platform.python_version(), "sqlite": apsw.sqlite_lib_version(), "system": platform.system()}
    lines: list[Line] = []
    with contextlib.suppress(KeyboardInterrupt), World(quick=args.quick, say=lambda text: progress.log(text)) as world:
        # Modules are compiled before, as they are once they are installed, whatever this process was told.
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ["PYTHONPYCACHEPREFIX"] = str(world.fresh())
        for name in names:
            progress.log(f"[bold]{name}[/]: {(CASES[name].__doc__ or '').splitlines()[0]}")
            found, seconds = measure(world, name)
            lines += found
            progress.print(table(found))
            progress.log(f"{name} took {seconds:.0f} s")
            if args.json:  # after each case: what was measured for half an hour is not lost with the last one
                told = {"quick": args.quick, "on": machine, "lines": [line.as_json() for line in lines]}
                args.json.write_text(json.dumps(told, indent=1) + "\n")
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table(lines))
    if len({line.name for line in lines}) < len(names):
        return 130  # interrupted: what was measured before is told
    return int(any(line.error for line in lines))


if __name__ == "__main__":
    sys.exit(main())
