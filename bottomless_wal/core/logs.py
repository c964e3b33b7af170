"""Hand log lines to the logging module in a thread of its own.

    any thread: logger.warning(...) ──► queue ──► the log thread: handlers, formatters, filters

A handler of the application may do anything: wait for a lock of its own, or commit to a
replicated database, or open one. If the worker ran the handler, or a thread that holds a lock of
this package, that commit would wait for itself. No commit, open or close waits for the log
thread.

So the thread that a line is about does not write the line, and no function here takes a lock.
That includes logging's own lock, which `isEnabledFor` takes. An application holds it while it
configures its handlers.

A line keeps its logger, level, time, place and thread. Its arguments become strings at once.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from queue import Empty, SimpleQueue
from typing import Any, Final, NamedTuple, TypeAlias

from .threads import is_own_thread

__all__ = ["Logger", "defer", "drain", "get_logger", "start"]

_MOST_LINES: Final = 10_000  # lines in the queue at most: a handler that hangs must not use up the memory


class Logger:
    """Provide the methods of `logging.Logger` that this package uses.

    None of them waits, or runs code of the application.
    """

    def __init__(self, name: str) -> None:
        self._target = logging.getLogger(name)

    def debug(self, message: str, *args: object, exc_info: bool = False) -> None:
        """Log a line at DEBUG."""
        self._hand_over(logging.DEBUG, message, args, exc_info)

    def info(self, message: str, *args: object, exc_info: bool = False) -> None:
        """Log a line at INFO."""
        self._hand_over(logging.INFO, message, args, exc_info)

    def warning(self, message: str, *args: object, exc_info: bool = False) -> None:
        """Log a line at WARNING."""
        self._hand_over(logging.WARNING, message, args, exc_info)

    def error(self, message: str, *args: object, exc_info: bool = False) -> None:
        """Log a line at ERROR."""
        self._hand_over(logging.ERROR, message, args, exc_info)

    def exception(self, message: str, *args: object) -> None:
        """Log a line at ERROR, with the exception that is being handled."""
        self._hand_over(logging.ERROR, message, args, True)

    def _hand_over(self, level: int, message: str, args: tuple[object, ...], exc_info: bool) -> None:
        target = self._target
        # The same decision as isEnabledFor's, without the lock that it takes.
        if target.disabled or target.manager.disable >= level or level < target.getEffectiveLevel():
            return
        frame = sys._getframe(2)
        place = frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name
        plain = tuple(arg if isinstance(arg, int | float | str) else str(arg) for arg in args)
        thread = threading.get_ident(), threading.current_thread().name
        _put(_Line(target, level, place, message, plain, sys.exc_info() if exc_info else None, time.time(), thread))


class _Line(NamedTuple):
    target: logging.Logger
    level: int
    place: tuple[str, int, str]
    message: str
    args: tuple[int | float | str, ...]
    exc_info: Any
    created: float
    thread: tuple[int, str]


_Item: TypeAlias = "_Line | logging.LogRecord | _Mark"


class _Mark:
    """Mark a place in the queue.

    `reached` is free once every line before it is written.
    """

    def __init__(self) -> None:
        self.reached = threading.Lock()
        self.reached.acquire()


class _Deferred(logging.Filter):
    """Pass a record of another package on to the log thread.

    It does so for records that threads of this package made.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if not is_own_thread():
            return True
        _put(record)
        return False


_deferred: Final = _Deferred()
_lines: SimpleQueue[_Item] = SimpleQueue()
_writer: threading.Thread | None = None
_starting = threading.Lock()
_lost = 0


def get_logger(name: str) -> Logger:
    """Return the logger of the module `name`."""
    return Logger(name)


def defer(*packages: str) -> None:
    """Let the log thread write lines that our threads log in other `packages`.

    A filter applies only to the lines of its own logger. So call this again after further modules
    are loaded.
    """
    prefixes = tuple(f"{package}." for package in packages)
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if isinstance(logger, logging.Logger) and (name in packages or name.startswith(prefixes)) and _deferred not in logger.filters:
            logger.filters.append(_deferred)  # not addFilter(), which in some versions takes a lock


def start() -> bool:
    """Start the log thread, and return whether it runs.

    The first replica starts it. From Python 3.12 on, no thread can be started while the interpreter
    is ending.
    """
    global _writer
    if _writer is not None:
        return True
    if not _starting.acquire(blocking=False):
        return True  # another thread is starting it, or the garbage collector runs inside this function
    try:
        if _writer is None:
            thread = threading.Thread(target=_write, args=(_lines,), name="bottomless log", daemon=True)
            thread.start()
            _writer = thread
    except RuntimeError:
        return False
    finally:
        _starting.release()
    return True


def drain(seconds: float) -> bool:
    """Wait until every line logged so far has been handled.

    Args:
        seconds: the longest time to wait.

    Returns:
        False if some lines have not been handled.
    """
    if _writer is None:
        _write_here()
        return True
    if threading.current_thread() is _writer:
        return False
    mark = _Mark()
    _lines.put(mark)
    return mark.reached.acquire(timeout=seconds)


def _put(item: _Item) -> None:
    global _lost
    if _lines.qsize() >= _MOST_LINES:
        _lost += 1
        return
    _lines.put(item)
    if _writer is None and not is_own_thread() and not start():
        _write_here()


def _write(lines: SimpleQueue[_Item]) -> None:
    while True:
        _handle(lines.get())


def _write_here() -> None:
    """Write the queue in this thread, where the log thread cannot run.

    The interpreter is ending, or no database was opened yet.
    """
    while True:
        try:
            item = _lines.get_nowait()
        except Empty:
            return
        _handle(item)


def _handle(item: _Item) -> None:
    global _lost
    if isinstance(item, _Mark):
        item.reached.release()
        return
    try:
        if isinstance(item, logging.LogRecord):
            logging.getLogger(item.name).handle(item)
            return
        lost, _lost = _lost, 0
        if lost:
            item.target.warning("%d lines were not written: a handler was slower than they came", lost)
        if item.target.isEnabledFor(item.level):
            item.target.handle(_record(item))
    except Exception:  # noqa: BLE001
        # A handler's error is not an error of the operation that the line is about.
        if logging.raiseExceptions:
            traceback.print_exc()


def _record(line: _Line) -> logging.LogRecord:
    """Make the log record in the log thread.

    The application may have its own record factory, which must not run in other threads.
    """
    path, number, function = line.place
    record = line.target.makeRecord(line.target.name, line.level, path, number, line.message, line.args, line.exc_info, function)
    record.thread, record.threadName = line.thread
    record.relativeCreated -= (record.created - line.created) * 1000
    record.created, record.msecs = line.created, int(line.created % 1 * 1000) + 0.0
    return record


def _after_fork() -> None:
    global _lines, _writer, _starting
    _lines, _writer, _starting = SimpleQueue(), None, threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
