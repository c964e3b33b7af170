"""Provide the command line: each command calls one library function.

Exit codes:

- 0: success;
- 1: a problem was found (`verify`, `doctor`, `demo`, `compact`);
- 2: the command or a setting is not valid;
- 3: an error;
- 130: interrupted.

Results go to stdout, and everything else to stderr. With `--json` stdout has only the result.
"""

from __future__ import annotations

import errno
import logging
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

import apsw
import click

from .. import __version__, admin
from ..core import logs
from ..core.config import ENV_PREFIX
from ..core.errors import BottomlessError, ConfigError
from . import history_commands
from .options import DATABASE, EXIT_PROBLEM, FAILED, INTERRUPTED, USAGE, json_option, moment
from .output import as_json, configure_logging, console, human_bytes, moment_text, print_error, progress_bar

__all__ = ["main"]

logger = logging.getLogger(__name__)

_LOG_SECONDS: Final = 5.0

_STATES: Final = {"ok": ("ok", "green"), "warning": ("warning", "yellow"), "failed": ("FAILED", "bold red")}


class _Faces(click.Group):
    """Turn errors into a message, a hint and an exit code, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            try:
                return super().invoke(ctx)
            finally:
                logs.drain(_LOG_SECONDS)  # the command's log lines must precede its error
        except (click.exceptions.Exit, click.ClickException, click.Abort):
            raise
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)
        except (BottomlessError, apsw.Error) as error:
            print_error(error)
            ctx.exit(USAGE if isinstance(error, ConfigError) else FAILED)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # click ends without a message when the reader has closed the pipe
            print_error(error)
            ctx.exit(FAILED)
        except Exception as error:
            logger.debug("the error in full", exc_info=True)
            print_error(error)
            console(stderr=True).print(f"  hint: This was not foreseen; {ENV_PREFIX}LOG=debug shows more.", style="dim")
            ctx.exit(FAILED)


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

    Exit codes: 0 well, 1 a problem was found (verify, doctor, demo, compact), 2 wrong usage or settings, 3 an error.
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
    sys.exit(0 if run(options, threads=threads, orders=orders, keep=keep) else EXIT_PROBLEM)


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
@DATABASE
@click.option("-o", "--output", type=click.Path(), help="Where to restore it to, instead of DB itself.")
@click.option("--txid", type=click.IntRange(min=1), help="An earlier state than the newest; `ls DB` shows them.")
@click.option(
    "--timestamp",
    callback=moment,
    metavar="TIME",
    help="The last state made not later, such as 2026-11-22T10:00:00Z, by the server's clock; UTC where it names no zone.",
)
@click.option("--force", is_flag=True, help="Replace a file that is there, once the new one is verified.")
@click.option("-v", "--verbose", is_flag=True, help="Tell the steps.")
@json_option
@click.pass_obj
def restore(
    options: dict[str, str],
    database: str,
    output: str | None,
    txid: int | None,
    timestamp: datetime | None,
    force: bool,
    verbose: bool,
    json: bool,
) -> None:
    """Restore a database from the bucket into a local file, verified."""
    if txid is not None and timestamp is not None:
        raise click.UsageError("Say --txid or --timestamp, not both.")
    if verbose:
        configure_logging("info")
    with progress_bar("restoring", unit="bytes") as progress:
        done = admin.restore(database, output=output, txid=txid, timestamp=timestamp, force=force, progress=progress, **options)
    if json:
        click.echo(as_json(done))
        return
    speaker = console()
    speaker.print(
        f"{done.path}: restored at txid {done.txid}, state {done.state_hash:016x}: {done.pages} pages, "
        f"{human_bytes(done.pages * done.page_size)}"
    )
    if done.committed is not None:
        speaker.print(f"  It was committed at {moment_text(done.committed)}.")
    speaker.print(f"  {human_bytes(done.received)} in {done.requests} requests, {done.seconds:.2f} s", style="dim")
    if done.head is not None and done.txid < done.head and output is None:
        instead = ""
        if done.log_error is None:
            instead = " instead"
            speaker.print(f"  The history goes on to txid {done.head}: opening the file through vfs=bottomless takes it there.")
        else:
            message = done.log_error.message.rstrip(".")
            speaker.print(
                f"  The history goes on to txid {done.head}, but opening the file cannot take it there: {message}.", style="yellow"
            )
        speaker.print(f"  To go on from txid {done.txid}{instead}: bottomless-wal reset --from-local {shlex.quote(database)}")


@main.command()
@click.option("--from-local", is_flag=True, help="Required: it is the local file that wins.")
@DATABASE
@json_option
@click.pass_obj
def reset(options: dict[str, str], from_local: bool, database: str, json: bool) -> None:
    """Make the local file the newest state, whatever the bucket has. Earlier states stay in the history."""
    if not from_local:
        raise click.UsageError("Say --from-local: the local file becomes the newest state of the history.")
    status = admin.reset_from_local(database, **options)
    if json:
        click.echo(as_json(status))
    else:
        console().print(f"{status.path}: is now txid {status.txid}, state {status.state_hash:016x}, in {status.store}")


@main.command()
@DATABASE
@json_option
@click.pass_obj
def status(options: dict[str, str], database: str, json: bool) -> None:
    """Show how a local file stands to its history, without opening it."""
    seen = admin.inspect(database, **options)
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
@DATABASE
@click.option("--deep", is_flag=True, help="Decode every page of every segment.")
@click.option("--integrity", is_flag=True, help="Restore the head to a temporary file and run SQLite's integrity_check.")
@click.option("--repair-view", is_flag=True, help="Put stale and missing page objects anew, delete superfluous ones.")
@click.option("--local", is_flag=True, help="Compare the local file DB with the head, page by page.")
@json_option
@click.pass_obj
def verify(options: dict[str, str], database: str, deep: bool, integrity: bool, repair_view: bool, local: bool, json: bool) -> None:
    """Verify what the bucket holds of a database: the log, the page objects, and with --local the file."""
    with progress_bar("verifying", unit="objects") as progress:
        report = admin.verify(
            database,
            deep=deep,
            integrity=integrity,
            repair_view=repair_view,
            local=database if local else None,
            progress=progress,
            **options,
        )
    if json:
        click.echo(as_json({"ok": report.ok, **{name: getattr(report, name) for name in report.__slots__}}))
    else:
        _show_report(report)
    if not report.ok:
        sys.exit(EXIT_PROBLEM)


def _show_report(report: admin.Report) -> None:
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
@json_option
@click.pass_obj
def doctor(options: dict[str, str], json: bool) -> None:
    """Check server, credentials, bucket, create-only writes, round trip and clock, and say what to do."""
    checks = admin.diagnose(**options)
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
        sys.exit(EXIT_PROBLEM)


for _command in history_commands.COMMANDS:
    main.add_command(_command)
