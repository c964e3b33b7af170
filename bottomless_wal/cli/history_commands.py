"""Define the commands about the stored log: list, count, compact and prune it.

As in `cli`, each command calls one library function.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Final

import click

from .. import admin
from .options import DATABASE, EXIT_PROBLEM, INTERRUPTED, age, json_option, table
from .output import as_json, console, human_bytes, human_time, moment_text, progress_bar

__all__ = ["COMMANDS"]

_SHOWN: Final = 20


@click.command(name="ls")
@click.argument("database", metavar="[DB]", required=False)
@click.option("--all", "everything", is_flag=True, help=f"With DB: all its commits, not only the last {_SHOWN}.")
@json_option
@click.pass_obj
def list_(options: dict[str, str], database: str | None, everything: bool, json: bool) -> None:
    """List the databases in the bucket; with DB, the states of that one that can be restored, and when they were made."""
    found = admin.listing(database, **options)
    states = None
    if database is not None and any(row.edges for row in found):
        states = admin.states(database, last=None if everything or json else _SHOWN, **options)
    if json:
        hidden = set() if database is not None else {"edges"}
        rows = [{**{name: getattr(row, name) for name in row.__slots__ if name not in hidden}, "segments": row.segments} for row in found]
        if states is not None:
            # `restorable`: (first, last) of each run of txids that can be restored
            told = {"restorable": states.ranges, "snapshots": states.snapshots, "commits": states.commits}
            rows = [{**row, **told} for row in rows]
        click.echo(as_json(rows))
        if database is not None and not found:
            sys.exit(EXIT_PROBLEM)
        return
    speaker = console()
    if not found:
        speaker.print("nothing is stored" + (f" for {database}" if database else "") + " in this bucket")
        if database is not None:
            sys.exit(EXIT_PROBLEM)
        return
    speaker.print(
        table(
            ["database", ">txid", ">segments", ">log", ">page objects", ">their size", "last commit"],
            [
                [
                    row.name,
                    str(row.txid) if row.edges else "no log",
                    str(row.segments),
                    human_bytes(row.log_bytes),
                    str(row.page_objects),
                    human_bytes(row.page_bytes),
                    human_time(row.last_commit),
                ]
                for row in found
            ],
        )
    )
    if states is not None:
        _show_states(states)


def _show_states(states: admin.States) -> None:
    speaker = console()
    kept = {state.txid for state in states.commits}
    rows = [(state, "snapshot") for state in states.snapshots if state.txid not in kept]
    marked = {state.txid: state for state in states.snapshots if state.txid in kept}
    shown = f"the last {len(states.commits)} of {states.count} states" if len(states.commits) < states.count else f"{states.count} states"
    speaker.print(f"{shown} that can be restored (--txid, or --timestamp with the time):")
    for state in states.commits:
        snapshot = marked.get(state.txid)
        note = f"snapshot, {human_bytes(snapshot.size or 0)}" if snapshot is not None else ""
        rows.append((state, note))
    speaker.print(
        table(
            [">txid", "made at", ">size", "", "state"],
            [
                [
                    str(state.txid),
                    moment_text(state.time),
                    human_bytes(state.size) if state.size is not None else "merged",
                    note,
                    f"{state.state_hash:016x}",
                ]
                for state, note in rows
            ],
        )
    )


@click.command(name="stats")
@DATABASE
@click.option("--price-file", type=click.Path(dir_okay=False), help="A JSON file with prices of your own; the built-in list's otherwise.")
@json_option
@click.pass_obj
def stats(options: dict[str, str], database: str, price_file: str | None, json: bool) -> None:
    """Count what the bucket holds of a database, and what that costs a month at list price."""
    prices = admin.load_prices(price_file) if price_file is not None else admin.LIST_PRICES
    usage = admin.stats(database, prices=prices, **options)
    if json:
        click.echo(as_json({**{name: getattr(usage, name) for name in usage.__slots__}, "month": usage.month}))
        return
    speaker = console()
    speaker.print(f"{usage.name} in {usage.store}, head txid {usage.head}")
    total = admin.Kind(sum(kind.objects for kind in usage.kinds.values()), sum(kind.bytes for kind in usage.kinds.values()))
    rows = [*((name.replace("_", " "), kind) for name, kind in usage.kinds.items()), ("together", total)]
    speaker.print(
        table(["stored (measured)", ">objects", ">bytes"], [[name, str(kind.objects), human_bytes(kind.bytes)] for name, kind in rows])
    )
    speaker.print(f"commits in the last 24 h (measured): {'' if usage.commits_day_exact else 'at least '}{usage.commits_day}")
    if usage.pages_per_commit is not None:
        speaker.print(f"pages per commit (measured, the last ones): {usage.pages_per_commit:.1f}")
    money = usage.prices.currency
    lines = [[cost.what, f"{cost.amount:.4f}", cost.basis] for cost in usage.costs]
    speaker.print(
        table(["cost of a month", f">{money}", "from"], [*lines, ["together", f"{usage.month:.4f}", "restores and transfers not counted"]])
    )
    speaker.print(f"  prices: {usage.prices.name}, as of {usage.prices.date}", style="dim")


@click.command(name="compact")
@DATABASE
@json_option
@click.pass_obj
def compact(options: dict[str, str], database: str, json: bool) -> None:
    """Merge runs of commits now: a restore then reads fewer objects. Nothing is deleted."""
    with progress_bar("merging", unit="merges") as progress:
        report = admin.compact(database, progress=progress, **options)
    if json:
        click.echo(as_json(_told(report, "ok")))
    else:
        speaker = console()
        for message in report.damaged:
            speaker.print("PROBLEM", style="bold red", end=" ")
            speaker.print(message)
        speaker.print(f"{report.name}: {report.merged} segments merged into {len(report.added)} more ({human_bytes(report.size)})")
        if report.after is not None:
            speaker.print(f"  a restore of the head (txid {report.head}) reads {report.before} segments before, {report.after} now")
        else:
            speaker.print(f"  no unbroken chain leads to the head (txid {report.head}): see verify")
        _show_effort(report)
    if not report.ok:
        sys.exit(EXIT_PROBLEM)


@click.command(name="snapshot")
@DATABASE
@json_option
@click.pass_obj
def snapshot(options: dict[str, str], database: str, json: bool) -> None:
    """Store the whole database, as it is at the head, as one object: what lies before can be pruned once it is old."""
    report = admin.snapshot(database, **options)
    if json:
        click.echo(as_json(report))
        return
    what = "snapshot made" if report.created else "there is a snapshot already"
    console().print(f"{report.name}: {what} of txid {report.txid} ({human_bytes(report.size)})")
    _show_effort(report)


@click.command(name="prune")
@DATABASE
@click.option("--dry-run", is_flag=True, help="Say what would be deleted, and delete nothing.")
@json_option
@click.pass_obj
def prune(options: dict[str, str], database: str, dry_run: bool, json: bool) -> None:
    """Delete what the settings `retention` and `keep_snapshots` do not promise."""
    report = admin.prune(database, dry_run=dry_run, **options)
    if json:
        click.echo(as_json(report))
    else:
        _show_pruned(report)


@click.command(name="rm")
@DATABASE
@click.option("--older-than", callback=age, metavar="AGE", required=True, help="Such as 30d, 12h, 90m; never less than two hours are kept.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@click.pass_obj
def remove(options: dict[str, str], database: str, older_than: float, yes: bool, json: bool) -> None:
    """Delete the states of a database that are older than AGE, snapshots too. What it is now always stays."""
    if not yes:
        plan = admin.forget(database, older_than=older_than, dry_run=True, **options)
        if plan.segments or plan.bodies or plan.snapshot is not None:
            click.echo(_pruned(plan), err=True)
            try:
                click.confirm("Delete them for good?", abort=True, err=True)
            except click.Abort:
                click.echo("\nNothing was deleted. (--yes does not ask.)", err=True)
                sys.exit(INTERRUPTED)
    report = admin.forget(database, older_than=older_than, dry_run=False, **options)
    if json:
        click.echo(as_json(report))
    else:
        _show_pruned(report)


def _pruned(report: admin.PruneReport) -> str:
    verb = "would be deleted" if report.dry_run else "deleted"
    return f"{report.name}: {report.segments} segments and {report.bodies} bodies {verb} ({human_bytes(report.size)})"


def _show_pruned(report: admin.PruneReport) -> None:
    speaker = console()
    if report.snapshot is not None:
        speaker.print(f"{report.name}: snapshot of txid {report.snapshot}, for what stays to stand on")
    speaker.print(_pruned(report))
    before = f", and the snapshots {', '.join(map(str, report.snapshots))}" if report.snapshots else ""
    speaker.print(f"  kept: every commit from txid {max(report.base, 1)} to {report.head}{before}")
    speaker.print(f"  {report.rule}", style="dim")
    if not report.base:
        speaker.print("  There is no snapshot that is old enough: without one nothing can go.", style="dim")
    _show_effort(report)


def _show_effort(report: admin.CompactionReport | admin.SnapshotReport | admin.PruneReport) -> None:
    console().print(f"  {report.requests} requests, {report.seconds:.2f} s", style="dim")


def _told(report: Any, *more: str) -> dict[str, Any]:
    """Return a report's fields, and the properties that `more` names."""
    return {name: getattr(report, name) for name in (*more, *report.__slots__)}


COMMANDS: Final[Sequence[click.Command]] = (list_, stats, compact, snapshot, prune, remove)
