"""The command line: each command calls one library function and shows what it returns.

Exit codes: 0 it went well; 1 a problem was found (`verify`, `doctor`, `demo`); 2 the command or a setting cannot be meant; 3 an
error; 130 interrupted. Results go to stdout (with `--json` nothing else does), everything else to stderr.
"""

from __future__ import annotations

import errno
import logging
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

import apsw
import click

from . import __version__, maintenance
from .config import ENV_PREFIX
from .console import as_json, complain, configure_logging, console, human_bytes, human_time, progress_bar
from .errors import BottomlessError, ConfigError

__all__ = ["main"]

logger = logging.getLogger(__name__)

FOUND, USAGE, FAILED, INTERRUPTED = 1, 2, 3, 130

_SHOWN: Final = 20
_STATES: Final = {"ok": ("ok", "green"), "warning": ("warning", "yellow"), "failed": ("FAILED", "bold red")}

C = TypeVar("C", bound=Callable[..., Any])


class _Faces(click.Group):
    """Errors become a message, a hint and an exit code; nobody is shown a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.ClickException, click.Abort):
            raise
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)
        except (BottomlessError, apsw.Error) as error:
            complain(error)
            ctx.exit(USAGE if isinstance(error, ConfigError) else FAILED)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # click ends quietly when nobody reads on
            complain(error)
            ctx.exit(FAILED)
        except Exception as error:
            logger.debug("the error in full", exc_info=True)
            complain(error)
            console(stderr=True).print(f"  hint: This was not foreseen; {ENV_PREFIX}LOG=debug shows more.", style="dim")
            ctx.exit(FAILED)


def _json_option(command: C) -> C:
    return click.option("--json", "json", is_flag=True, help="The result as JSON, on stdout.")(command)


_DATABASE: Final = click.argument("database", metavar="DB", type=click.Path(dir_okay=True))


@click.group(cls=_Faces, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option("--endpoint", metavar="URL", help=f"The S3 server, file:///directory, or aws. [{ENV_PREFIX}ENDPOINT]")
@click.option("--bucket", metavar="NAME", help=f"The bucket. [{ENV_PREFIX}BUCKET]")
@click.option("--database-id", metavar="ID", help=f"The name in front of the file's. [{ENV_PREFIX}DATABASE_ID]")
@click.version_option(
    __version__,
    message=f"%(prog)s %(version)s (SQLite {apsw.sqlite_lib_version()}, APSW {apsw.apsw_version()}, Python {sys.version.split()[0]})",
    prog_name="bottomless-wal",
)
@click.pass_context
def main(ctx: click.Context, endpoint: str | None, bucket: str | None, database_id: str | None) -> None:
    """SQLite databases whose every commit is in S3 before COMMIT returns.

    Settings come from LIBSQL_BOTTOMLESS_* in the environment, credentials from where boto3 looks for them. DB is a database's file, or its
    name as `ls` shows it. LIBSQL_BOTTOMLESS_LOG=info tells what is going on.

    Exit codes: 0 well, 1 a problem was found (verify, doctor, demo), 2 wrong usage or settings, 3 an error.
    """
    given = {"endpoint": endpoint, "bucket": bucket, "database_id": database_id}
    ctx.obj = {name: value for name, value in given.items() if value is not None}
    configure_logging()


@main.command()
@click.option("--threads", type=click.IntRange(1, 32), default=4, show_default=True, help="Writing threads.")
@click.option("--orders", type=click.IntRange(1, 100_000), default=120, show_default=True, help="Commits before the kill.")
@click.option("--keep", is_flag=True, help="Leave the demo's objects in the bucket (only with --endpoint).")
@click.option("--endpoint", metavar="URL", help="A server of your own, instead of the embedded one.")
@click.pass_obj
def demo(options: dict[str, str], threads: int, orders: int, keep: bool, endpoint: str | None) -> None:
    """Write, kill -9, lose the files, and have every acknowledged row back. Takes some ten seconds."""
    from .demo import run

    if endpoint is not None:
        options = {**options, "endpoint": endpoint}
    sys.exit(0 if run(options, threads=threads, orders=orders, keep=keep) else FOUND)


@main.command(context_settings={"ignore_unknown_options": True})
@click.argument("file", required=False)
@click.argument("sql", nargs=-1)
@click.pass_obj
def shell(options: dict[str, str], file: str | None, sql: Sequence[str]) -> None:
    """APSW's SQLite shell with vfs=bottomless registered.

    FILE is opened replicated; without it, `.open file:test.db?vfs=bottomless` does it. SQL (or dot commands), if given, is run instead of
    what comes in on stdin.
    """
    from .shell import run

    sys.exit(run(file, sql, options))


@main.command()
@_DATABASE
@click.option("-o", "--output", type=click.Path(), help="Where to restore it to, instead of DB itself.")
@click.option("--txid", type=click.IntRange(min=1), help="An earlier state than the newest; `ls DB` shows them.")
@click.option("--force", is_flag=True, help="Replace a file that is there, once the new one is verified.")
@click.option("-v", "--verbose", is_flag=True, help="Tell the steps.")
@_json_option
@click.pass_obj
def restore(options: dict[str, str], database: str, output: str | None, txid: int | None, force: bool, verbose: bool, json: bool) -> None:
    """Restore a database from the bucket into a local file, verified."""
    if verbose:
        configure_logging("info")
    with progress_bar("restoring", unit="bytes") as progress:
        done = maintenance.restore(database, output=output, txid=txid, force=force, progress=progress, **options)
    if json:
        click.echo(as_json(done))
        return
    speaker = console()
    speaker.print(
        f"{done.path}: restored at txid {done.txid}, state {done.state_hash:016x}: {done.pages} pages, "
        f"{human_bytes(done.pages * done.page_size)}"
    )
    speaker.print(f"  {human_bytes(done.received)} in {done.requests} requests, {done.seconds:.2f} s", style="dim")
    if done.head is not None and done.txid < done.head and output is None:
        speaker.print(f"  The history goes on to txid {done.head}: opening the file through vfs=bottomless takes it there.")
        speaker.print(f"  To go on from txid {done.txid} instead: bottomless-wal reset --from-local {database}")


@main.command()
@click.option("--from-local", is_flag=True, help="Required: it is the local file that wins.")
@_DATABASE
@_json_option
@click.pass_obj
def reset(options: dict[str, str], from_local: bool, database: str, json: bool) -> None:
    """Make the local file the newest state, whatever the bucket has. Earlier states stay in the history."""
    if not from_local:
        raise click.UsageError("Say --from-local: the local file becomes the newest state of the history.")
    status = maintenance.reset_from_local(database, **options)
    if json:
        click.echo(as_json(status))
    else:
        console().print(f"{status.path}: is now txid {status.txid}, state {status.state_hash:016x}, in {status.store}")


@main.command(name="ls")
@click.argument("database", metavar="[DB]", required=False)
@click.option("--all", "everything", is_flag=True, help=f"With DB: all its segments, not only the last {_SHOWN}.")
@_json_option
@click.pass_obj
def list_(options: dict[str, str], database: str | None, everything: bool, json: bool) -> None:
    """List the databases in the bucket; with DB, the states of that one."""
    found = maintenance.listing(database, **options)
    if json:
        hidden = set() if database is not None else {"edges"}
        rows = [{**{name: getattr(row, name) for name in row.__slots__ if name not in hidden}, "segments": row.segments} for row in found]
        click.echo(as_json(rows))
        return
    speaker = console()
    if not found:
        speaker.print("nothing is stored" + (f" for {database}" if database else "") + " in this bucket")
        if database is not None:
            sys.exit(FOUND)
        return
    speaker.print(
        _table(
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
    if database is not None:
        edges = [edge for row in found for edge in row.edges]
        shown = edges if everything else edges[-_SHOWN:]
        if len(shown) < len(edges):
            speaker.print(f"the last {len(shown)} of {len(edges)} segments (--all shows all):")
        states = [
            [str(edge.pre), str(edge.post), human_bytes(edge.size), human_time(datetime.fromtimestamp(edge.modified, UTC))]
            for edge in shown
        ]
        speaker.print(_table([">from", ">to txid", ">size", "stored"], states))


@main.command()
@_DATABASE
@_json_option
@click.pass_obj
def status(options: dict[str, str], database: str, json: bool) -> None:
    """Show how a local file stands to its history, without opening it."""
    seen = maintenance.inspect(database, **options)
    if json:
        click.echo(as_json(seen))
        return
    size = "no file" if seen.size is None else human_bytes(seen.size)
    local = "no index"
    if seen.local is not None:
        pending = {True: "more is pending", False: "nothing pending", None: "what is pending only a scan can tell"}[seen.pending]
        local = f"txid {seen.local.txid}, state {seen.local.state:016x}, page view up to {seen.local.view_complete}; {pending}"
    head = "no history"
    if seen.head is not None:
        head = f"txid {seen.head.txid}, state {seen.head.state:016x}, {seen.head.db_size} pages of {seen.head.page_size} bytes"
    speaker = console()
    for name, text in (("file", f"{seen.path} ({size})"), ("index", local), ("stored as", f"{seen.name} in {seen.store}"), ("head", head)):
        speaker.print(f"{name + ':':<11}{text}")
    speaker.print(f"{'':<11}{seen.relation}", style="green" if seen.in_step else "yellow")


@main.command()
@_DATABASE
@click.option("--deep", is_flag=True, help="Decode every page of every segment.")
@click.option("--repair-view", is_flag=True, help="Put stale and missing page objects anew, delete superfluous ones.")
@click.option("--local", is_flag=True, help="Compare the local file DB with the head, page by page.")
@_json_option
@click.pass_obj
def verify(options: dict[str, str], database: str, deep: bool, repair_view: bool, local: bool, json: bool) -> None:
    """Verify what the bucket holds of a database: the log, the page objects, and with --local the file."""
    with progress_bar("verifying", unit="objects") as progress:
        report = maintenance.verify(
            database, deep=deep, repair_view=repair_view, local=database if local else None, progress=progress, **options
        )
    if json:
        click.echo(as_json({"ok": report.ok, **{name: getattr(report, name) for name in report.__slots__}}))
    else:
        _show_report(report)
    if not report.ok:
        sys.exit(FOUND)


def _show_report(report: maintenance.Report) -> None:
    speaker = console()
    for problem in report.problems:
        mark, style = ("repaired", "yellow") if problem.repaired else ("PROBLEM", "bold red")
        speaker.print(mark, style=style, end=" ")
        speaker.print(f"{problem.object}: {problem.message}")
    for note in report.notes:
        speaker.print(f"note: {note}", style="dim")
    well = "sound" if report.ok else "NOT sound"
    how = "every page decoded" if report.deep else "heads and hashes; --deep decodes every page"
    speaker.print(f"{report.name} in {report.store}: {well} ({how})", style="green" if report.ok else "bold red")
    speaker.print(
        f"  head: txid {report.txid}, state {report.state_hash:016x}, {report.pages} pages of {report.page_size} bytes; "
        f"{report.segments} segments, {report.bodies} bodies, {report.page_objects} page objects"
    )
    speaker.print(f"  {human_bytes(report.received)} in {report.requests} requests, {report.seconds:.2f} s", style="dim")


@main.command()
@_json_option
@click.pass_obj
def doctor(options: dict[str, str], json: bool) -> None:
    """Check server, credentials, bucket, create-only writes, round trip and clock, and say what to do."""
    checks = maintenance.diagnose(**options)
    if json:
        click.echo(as_json(checks))
    else:
        speaker = console()
        for check in checks:
            mark, style = _STATES[check.state]
            speaker.print(f"{mark:<8}", style=style, end="")
            speaker.print(f"{check.name}: {check.detail}")
            if check.hint and check.state != "ok":
                speaker.print(f"{'':<8}{check.hint}", style="dim")
    if not all(check.ok for check in checks):
        sys.exit(FOUND)


def _table(columns: list[str], rows: list[list[str]]) -> Any:
    """A table; columns whose title begins with `>` are numbers."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in columns:
        table.add_column(title.lstrip(">"), justify="right" if title.startswith(">") else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
