"""Show that every acknowledged row survives a kill and the loss of the files.

    1  start an S3 server (rclone, in a temporary directory), or use your own (`endpoint`)
    2  a second process writes, and reports each order when its COMMIT has returned
    3  list the objects that are stored
    4  SIGKILL the process during its work, and delete the local files
    5  open the same path again: check each acknowledged row, integrity_check, and the state hash
       against the newest segment's

All local files are in a temporary directory. At the end the demo's objects are deleted from your
own bucket.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import apsw

from .. import admin
from ..admin.stored_database import configured, opened
from ..core.config import ENV_PREFIX
from ..formats.page import state_hash
from ..history.log import Head
from ..runtime import api
from .demo_server import RcloneServer
from .demo_writer import CUSTOMERS, PRODUCTS
from .output import console, human_bytes, on_terminal

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["run"]

_PATIENCE: Final = 120.0  # seconds until all orders are acknowledged, on the slowest machines and servers
_SHOWN: Final = 4
_FOREIGN: Final = ("AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_CA_BUNDLE")


@dataclass(slots=True)
class _Order:
    token: str
    items: int


@dataclass(slots=True)
class _Story:
    """The progress of the demo. `wrong` lists the checks that failed."""

    speaker: Console
    options: dict[str, Any]
    path: str
    acknowledged: dict[int, _Order] = field(default_factory=dict)
    head: Head | None = None
    wrong: list[str] = field(default_factory=list)

    def say(self, text: str = "", style: str = "") -> None:
        self.speaker.print(text, style=style or None)

    def chapter(self, text: str) -> None:
        self.speaker.print()
        self.speaker.print(f"▸ {text}", style="bold cyan")

    def check(self, well: bool, text: str) -> None:
        self.speaker.print("  ✓ " if well else "  ✗ ", style="bold green" if well else "bold red", end="")
        self.speaker.print(text)
        if not well:
            self.wrong.append(text)


class _Failed(Exception):
    """The demo cannot continue."""


def run(options: Mapping[str, object], *, threads: int = 4, orders: int = 120, keep: bool = False) -> bool:
    """Run the demo on stdout, and return whether all checks passed.

    Args:
        options: those of `connect`. Without `endpoint` the embedded server is used.
        threads: writing threads.
        orders: commits before the kill.
        keep: leave the demo's objects in the bucket.

    Raises:
        BottomlessError: the server cannot be started or reached.
    """
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="bottomless-demo-"))
        story = _Story(console(), dict(options), os.path.join(directory, "machine", "shop.db"))
        story.say("bottomless-wal: every commit is in S3 before COMMIT returns", style="bold")
        try:
            _prepare(story, stack, keep=keep)
            _write_and_kill(story, threads, orders)
            _show_objects(story)
            _lose(story)
            _come_back(story)
        except _Failed as failure:
            story.check(False, str(failure))
        story.say()
        if story.wrong:
            story.say(f"FAILED: {'; '.join(story.wrong)}", style="bold red")
        else:
            story.say(f"Nothing acknowledged was lost. ({time.monotonic() - began:.1f} s in all)", style="bold green")
    return not story.wrong


def _prepare(story: _Story, stack: contextlib.ExitStack, *, keep: bool) -> None:
    os.mkdir(os.path.dirname(story.path))
    if "endpoint" in story.options:
        story.chapter(f"Your own server: {configured(story.options).endpoint}")  # an endpoint with a password is refused before it is shown
        story.options["database_id"] = f"demo-{secrets.token_hex(4)}"
        if not keep:
            stack.callback(_delete_objects, story)
    else:
        story.chapter("Starting an S3 server")
        began = time.monotonic()
        server = stack.enter_context(RcloneServer())
        stack.enter_context(_environment(server.environ()))
        story.options |= {"endpoint": server.endpoint, "bucket": "demo", "database_id": "", "create_bucket": True}
        story.say(f"  rclone serve s3 at {server.endpoint}, in {time.monotonic() - began:.1f} s")
        story.say("  (it does not know create-only writes: each commit looks before it writes, which costs a request)", style="dim")
    # The demo shows the default guarantees, whatever the environment sets.
    story.options |= {"ack": "pages", "pages": "commit"}


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Set the embedded server's environment in the context.

    The user's own settings are removed, because they are for another server.
    """
    before = dict(os.environ)
    for name in before:
        if name in _FOREIGN or (name.startswith(ENV_PREFIX) and name != ENV_PREFIX + "LOG"):
            del os.environ[name]
    os.environ.update(changes, NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


# --- writing, and the end of it ----------------------------------------------------------------------------------------


def _write_and_kill(story: _Story, threads: int, orders: int) -> None:
    story.chapter(f"A process opens {os.path.basename(story.path)} through vfs=bottomless and takes orders in {threads} threads")
    writer = subprocess.Popen(
        [sys.executable, "-m", f"{__package__}.demo_writer"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (*sys.path, os.environ.get("PYTHONPATH"))))},
        start_new_session=True,
    )
    if writer.stdin is None or writer.stdout is None:
        raise AssertionError("a process without pipes")
    try:
        writer.stdin.write(json.dumps({"path": story.path, "options": story.options, "threads": threads}) + "\n")
        writer.stdin.flush()
        took = _follow(story, writer.stdout, orders)
        # The threads are inside transactions, uploads and page objects: kill the process now.
        writer.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        # Orders that it reported before it was killed count, too.
        for line in writer.stdout:
            if line.endswith("\n"):
                _hear(story, json.loads(line))
    finally:
        writer.kill()
        writer.wait()
        writer.stdin.close()
        writer.stdout.close()
    rows = sum(1 + order.items for order in story.acknowledged.values())
    count = len(story.acknowledged)
    story.say(
        f"  {count} orders in {count} transactions ({rows} rows) acknowledged, each after it was stored: "
        f"{count / took:.0f} a second, {threads} at a time"
    )
    story.say(f"  kill -9 {writer.pid}, in mid-work ({(time.monotonic() - killed) * 1000:.0f} ms to die)", style="bold")


def _follow(story: _Story, lines: Iterator[str], orders: int) -> float:
    """Wait until so many orders are acknowledged.

    Returns:
        The seconds from the first order to the last.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    end = time.monotonic() + _PATIENCE
    first = 0.0
    bar = Progress(
        TextColumn("  acknowledged"), BarColumn(), MofNCompleteColumn(), console=story.speaker, transient=True,
        disable=not on_terminal(sys.stdout),
    )  # fmt: skip
    with bar:
        task = bar.add_task("", total=orders)
        for line in lines:
            message = json.loads(line)
            if "ready" in message:
                first = time.monotonic()
                story.say(
                    f"  4 tables, an index, {CUSTOMERS} customers and {PRODUCTS} products: one transaction, "
                    f"stored in {message['ready']:.1f} s"
                )
                continue
            _hear(story, message)
            bar.update(task, completed=len(story.acknowledged))
            if len(story.acknowledged) >= orders:
                return time.monotonic() - first
            if time.monotonic() > end:
                raise _Failed(f"only {len(story.acknowledged)} orders in {_PATIENCE:.0f} s: the server is too slow for this demo")
    raise _Failed("the writer ended by itself")


def _hear(story: _Story, message: dict[str, object]) -> None:
    if "error" in message:
        raise _Failed(f"the writer failed: {message['error']}")
    story.acknowledged[int(str(message["order"]))] = _Order(str(message["token"]), int(str(message["items"])))


# --- what is stored ----------------------------------------------------------------------------------------------------


def _show_objects(story: _Story) -> None:
    with opened(story.path, story.options) as target:
        story.chapter(f"In {target.store.describe()}")
        objects = [(entry.key, entry.size) for entry in target.store.list(target.name)]
        story.head = target.history.head(target.history.edges())
    if story.head is None:
        raise _Failed("there is no segment in the bucket")
    log = [row for row in objects if "/" in row[0]]
    view = [row for row in objects if "/" not in row[0]]
    for what, rows in (
        ("the log: one segment a batch of commits, created and never changed", log),
        ("the page view: the latest content of each page; `zstd -d` gives the page", view),
    ):
        story.say(f"  {what}", style="dim")
        shown = rows if len(rows) <= _SHOWN + 1 else [*rows[: _SHOWN // 2], None, *rows[-_SHOWN // 2 :]]
        for row in shown:
            story.say(f"    {row[0]:<48} {row[1]:>8} bytes" if row is not None else f"    ... {len(rows) - _SHOWN} more ...")
        story.say(f"    {len(rows)} objects, {human_bytes(sum(size for _, size in rows))}")
    story.say(f"  newest segment: txid {story.head.txid}, state hash {story.head.state:016x}, {story.head.db_size} pages")


def _lose(story: _Story) -> None:
    directory = os.path.dirname(story.path)
    story.chapter("The machine is lost")
    story.say(f"  rm {' '.join(sorted(os.listdir(directory)))}")
    shutil.rmtree(directory)
    os.mkdir(directory)


# --- coming back -------------------------------------------------------------------------------------------------------


def _come_back(story: _Story) -> None:
    story.chapter(f"Opening {os.path.basename(story.path)} again, elsewhere")
    began = time.monotonic()
    connection = api.connect(story.path, **story.options)
    took = time.monotonic() - began
    try:
        status = api.status(connection)
        story.say(f"  restored and open after {took:.2f} s: txid {status.txid}, {human_bytes(os.path.getsize(story.path))}")
        _check_rows(story, connection)
        story.check(connection.execute("PRAGMA integrity_check").get == "ok", "PRAGMA integrity_check: ok")
        story.check(connection.execute("PRAGMA foreign_key_check").fetchall() == [], "PRAGMA foreign_key_check: ok")
        api.flush(connection)  # the kill may have interrupted page objects: they are PUT again
    finally:
        connection.close()
    head = story.head
    if head is None:
        raise AssertionError("the objects were looked at before")
    state = _state_of(story.path, head.page_size)
    story.check(
        state == head.state, f"state hash of the restored file, {state:016x}, is the newest segment's (before the loss: {head.state:016x})"
    )
    report = admin.verify(story.path, local=story.path, deep=True, **story.options)
    for problem in report.problems:
        story.say(f"    {problem.object}: {problem.message}", style="red")
    story.check(
        report.ok,
        f"verify --deep --local: {report.segments} segments and {report.page_objects} page objects are sound and agree with the file",
    )


def _check_rows(story: _Story, connection: apsw.Connection) -> None:
    found = {
        order: (token, items)
        for order, token, items in connection.execute(
            'SELECT orders.id, token, count(items.id) FROM orders LEFT JOIN items ON items."order" = orders.id GROUP BY orders.id'
        )
    }
    lost = [order for order, said in story.acknowledged.items() if found.get(order) != (said.token, said.items)]
    story.check(
        not lost,
        f"all {len(story.acknowledged)} acknowledged orders are back, with every item"
        if not lost
        else f"{len(lost)} acknowledged orders are lost or changed: {lost[:5]}",
    )
    stock = tuple(connection.execute(f"SELECT count(*) FROM {table}").get for table in ("customers", "products"))
    story.check(stock == (CUSTOMERS, PRODUCTS), f"{stock[0]} customers and {stock[1]} products")
    more = len(found) - len(story.acknowledged)
    if more > 0:
        story.say(f"    ({more} more had been stored, and the process died before its COMMIT returned)", style="dim")


def _state_of(path: str, page_size: int) -> int:
    """Return the state hash of a closed file, computed from its bytes alone."""
    with open(path, "rb") as file:
        return state_hash(page_size, enumerate(iter(lambda: file.read(page_size), b""), 1))


def _delete_objects(story: _Story) -> None:
    with opened(story.path, story.options) as target:
        target.store.delete([entry.key for entry in target.store.list(target.name)])
