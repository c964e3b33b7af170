"""Print results to stdout, and progress, log lines and errors to stderr.

Colours and progress bars are for terminals only. Rich is imported when it is first used, so that
`--help` does not wait for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from enum import Enum, StrEnum
from typing import TYPE_CHECKING, Any, Final, TextIO

from ..core.config import ENV_PREFIX
from ..core.errors import BottomlessError, ConfigError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "as_json",
    "configure_logging",
    "console",
    "human_bytes",
    "human_time",
    "moment_text",
    "on_terminal",
    "print_error",
    "progress_bar",
]

LOG_VARIABLE: Final = ENV_PREFIX + "LOG"
_LEVELS: Final = ("debug", "info", "warning", "error")
_PIPE_WIDTH: Final = 160  # characters: the width of tables that are not printed to a terminal
_HASHES: Final = frozenset({"state_hash", "state"})


def on_terminal(stream: TextIO) -> bool:
    """Return whether `stream` is a terminal."""
    return stream.isatty()


def console(*, stderr: bool = False) -> Console:
    """Return a console on the current stdout or stderr.

    Texts are printed as they are, without markup or highlights.
    """
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(
        file=stream, width=None if on_terminal(stream) else _PIPE_WIDTH, markup=False, highlight=False, emoji=False, soft_wrap=True
    )


def configure_logging(level: str | None = None) -> None:
    """Send the package's log lines to stderr.

    LIBSQL_BOTTOMLESS_LOG sets the lowest level. Without it, `level` does, or else warnings are
    logged.

    Raises:
        ConfigError: the variable is not debug, info, warning or error.
    """
    chosen = os.environ.get(LOG_VARIABLE, "").strip().lower() or level or "warning"
    if chosen not in _LEVELS:
        raise ConfigError(f"{LOG_VARIABLE} is {chosen!r}", hint=f"Known levels: {', '.join(_LEVELS)}.")
    handler: logging.Handler
    if on_terminal(sys.stderr):
        from rich.logging import RichHandler

        handler = RichHandler(console=console(stderr=True), show_path=False, markup=False, log_time_format="%H:%M:%S")
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.set_name(__name__)
    logger = logging.getLogger("bottomless_wal")
    for old in list(logger.handlers):
        if old.get_name() == __name__:
            logger.removeHandler(old)
    logger.addHandler(handler)
    logger.setLevel(chosen.upper())
    logger.propagate = False


def print_error(error: BaseException) -> None:
    """Print what failed, and what to do now."""
    if isinstance(error, BottomlessError):
        message, hint = error.message, error.hint
    else:
        message, hint = " ".join(str(error).split()) or type(error).__name__, ""
    speaker = console(stderr=True)
    speaker.print("error: ", style="bold red", end="")
    speaker.print(message)
    if hint:
        speaker.print(f"  hint: {hint}", style="dim")


@contextlib.contextmanager
def progress_bar(what: str, *, unit: str) -> Iterator[Callable[[int, int], None] | None]:
    """Yield a callback (done, expected) that draws a progress bar on stderr.

    It is None if stderr is not a terminal.

    Args:
        what: the text before the bar.
        unit: "bytes" for a number of bytes, otherwise the bar counts objects.
    """
    if not on_terminal(sys.stderr):
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    amount = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        amount,
        TimeRemainingColumn(),
        console=console(stderr=True),
        transient=True,
    ) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, expected: bars.update(task, completed=done, total=expected)


def as_json(value: object) -> str:
    """Return any result as JSON.

    State hashes become 16 hexadecimal digits, and times ISO 8601.
    """
    return json.dumps(_plain(value), indent=2, ensure_ascii=False)


def _plain(value: Any, name: str = "") -> Any:
    if isinstance(value, int) and name in _HASHES:
        return f"{value:016x}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        shown = [field.name for field in dataclasses.fields(value) if field.metadata.get("json", True)]
        return {name: _plain(getattr(value, name), name) for name in shown}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(key): _plain(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, BottomlessError):
        return {"error": type(value).__name__, "message": value.message, "hint": value.hint}
    if isinstance(value, datetime):
        return value.isoformat(timespec="milliseconds" if value.microsecond else "seconds")
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, Enum):
        return value.name.lower()
    return value.hex() if isinstance(value, bytes) else value


def human_bytes(count: float) -> str:
    """Return a number of bytes with a unit: `4.2 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def human_time(moment: datetime | None) -> str:
    """Return a time in UTC to the second, as `--timestamp` accepts it."""
    return "" if moment is None else moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def moment_text(moment: datetime) -> str:
    """Return a time in UTC to the millisecond, as `--timestamp` accepts it."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
