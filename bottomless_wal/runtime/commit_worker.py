"""The one thread of a database that stores its commits, and the committers that wait for it.

    committer: its commit stands locally ──► submit(its place in the WAL) ──► waits until that place is covered
    worker:    wanted ──► gathers company ──► batch, under the index's lock ──► served, or failed ──► tells the `filler` of page objects

A committer is served when the position that the log has reached covers its frame, or when a batch that looked at the WAL after
it had submitted came to its end. A failed batch fails everyone that had submitted before it began: an outage costs each one
`retry_timeout`. What is pending then is tried again in the background, and with the next commit, `flush()` or open. Ctrl-C ends a
wait, never an upload.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from itertools import count
from typing import Final

import apsw

from ..core.config import Config
from ..core.errors import BottomlessError, ConflictError, FencedError, FilesLostError, ReplicationError, StoreError
from ..core.logs import get_logger
from ..core.threads import as_own_thread, mark_own_thread
from ..formats.wal import WalPosition
from ..history.page_table import IndexCorrupt
from ..replication.index import IndexHeader, LocalIndex
from ..replication.replicator import Replicator
from ..sqlite.database_reader import LocalDatabase
from . import commit_errors
from .page_object_writer import PageObjectWriter, view_is_missing

__all__ = ["CommitWorker"]

logger = get_logger(__name__)

_GATHER_SHARE: Final = 0.5  # of a round trip, spent waiting for those that kept the last batch company, or came during it ...
_GATHER_MOST: Final = 0.025
_GATHER_GAP: Final = 0.1  # ... as long as another one comes within this share of it
_REST_SHARE: Final = 4.0  # with ack=local: of the processor time of a batch, rest before the next
_REST_MOST: Final = 0.1
_RETRY_FIRST: Final = 1.0
_RETRY_MOST: Final = 30.0


class CommitWorker:
    """Runs `replicator`'s batches. Thread-safe.

    `reboot` finds out anew, under the index's lock, where the local state stands: called when the index was lost.
    """

    def __init__(
        self,
        config: Config,
        replicator: Replicator,
        index: LocalIndex,
        local: LocalDatabase,
        reboot: Callable[[], IndexHeader],
        *,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._config = config
        self._replicator = replicator
        self._index = index
        self._local = local
        self._reboot = reboot
        self._clock = clock
        # The collector may end a statement that commits while its thread is in here: waiting gives the lock back however often it is held.
        # `with` the lock, not a condition: Ctrl-C could end Condition.__enter__ with the lock held.
        self._lock = threading.RLock()
        self._cond = threading.Condition(self._lock)  # who waits for the worker
        self._wake = threading.Condition(self._lock)  # the worker waits: apart, for each committer would wake all the others
        self._gathering = False
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._running = False
        self.dirty = False
        """A commit was submitted, and no batch has begun since: what stands by now will go with that one."""
        self._alone = False  # no thread can be started: who waits does the work
        self._tickets = count(1)
        self._submitted = 0  # the last sequence number given out
        self._done = 0  # sequence numbers up to here were covered
        self._failed = 0  # sequence numbers up to here have failed ...
        self._error: BottomlessError | None = None  # ... with this
        self._fatal: BottomlessError | None = None
        self._logged: WalPosition | None = None
        self._idle = False
        self._rest_until = 0.0
        self._waiting = 0
        self._group_size = 0
        self._round_trip = 0.0
        self._oldest: float | None = None
        self._locking: float | None = None  # since when the worker has been waiting for the index's lock
        self._urgent = 0
        self._flush_wanted = 0
        self._flush_done = 0
        self._retry_wait = 0.0
        self._retry_at: float | None = None
        self._filler = PageObjectWriter(config, replicator, index, local, told=self._filled, clock=clock, pause=pause)
        replicator.on_logged = self._publish

    # --- committers ----------------------------------------------------------------------------------------------------

    def submit(self, *, must_run: bool = False) -> int:
        """Ask for a batch, and return the sequence number that `wait` needs.

        Args:
            must_run: no caller will wait, so an end of all sending is raised here.

        Raises:
            ReplicationError: no batch will run any more: the interpreter exits, and the replica is closed.
        """
        with self._lock:
            self._replicator.is_paused = False
            sequence = self._submitted = next(self._tickets)
            if self._oldest is None:
                self._oldest = self._clock()
            self._ensure_thread()
            # Else it is about to look, and a switch of threads costs more than a commit.
            if self._idle or (self._config.ack != "local" and not self._gathering):
                self._wake.notify()
            self.dirty = self._running  # last of all: Ctrl-C before leaves it to the next commit
            if must_run and not self._running and (self._stopping or not self._alone):
                raise self.shut_down()
        self._filler.active()
        return sequence

    def wait(self, sequence: int, place: WalPosition | None, *, for_pages: bool) -> None:
        """Until what `sequence` stands for is in the log (`place`: where its commit ends in the WAL), and in the view if `for_pages`.

        Raises:
            ReplicationError: it is not, and stays pending. FencedError, ConflictError: it will never be.
        """
        began = self._clock()
        if not self._stopping:
            self._work_here(sequence)
        with self._lock:
            self._urgent = max(self._urgent, sequence)
            try:
                self._waiting += 1
                if not self._gathering or self._waiting >= self._group_size:
                    self._wake.notify()
                while not (self._done >= sequence or (not for_pages and self._is_logged(place))):
                    if self._failed >= sequence or self._fatal is not None:
                        raise commit_errors.for_another_waiter(self._fatal or self._error)
                    if self._thread is None or not self._thread.is_alive():
                        raise self.shut_down()
                    if self._locking is not None:
                        waited = self._clock() - max(self._locking, began)
                        if waited > max(self._config.retry_timeout, 1.0):
                            raise commit_errors.lock_is_held(self._local.path, waited)
                    self._cond.wait(1.0)
            finally:
                self._waiting -= 1

    def has_done(self, sequence: int) -> bool:
        """Return whether what `sequence` stands for is stored, as far as `ack` asks."""
        return self._done >= sequence

    def shut_down(self) -> ReplicationError:
        """Return what a commit raises when nothing will send it."""
        return commit_errors.shut_down(self._local.path)

    def flush(self, timeout: float | None = None) -> None:
        """Until everything committed is in the log and the page view is complete.

        Raises:
            ReplicationError: it is not, for `timeout` seconds or because the store gave up. FencedError, ConflictError.
        """
        began = self._clock()
        end = None if timeout is None else began + timeout
        with self._lock:
            self._replicator.is_paused = False
            sequence = self._submitted = next(self._tickets)
            self._urgent = sequence
            self._flush_wanted = sequence
            self._ensure_thread()
            self._wake.notify()
            stopping = self._stopping
        if not stopping:
            self._work_here(sequence)
        with self._lock:
            while self._flush_done < sequence:
                if self._failed >= sequence or self._fatal is not None:
                    raise commit_errors.for_another_waiter(self._fatal or self._error)
                if self._thread is None or not self._thread.is_alive():
                    raise ReplicationError(f"{self._local.path} was closed before it was flushed", hint="The next open sends the rest.")
                if end is None:
                    if self._locking is not None:
                        waited = self._clock() - max(self._locking, began)
                        if waited > max(self._config.retry_timeout, 1.0):
                            raise commit_errors.lock_is_held(self._local.path, waited)
                left = 1.0 if end is None else end - self._clock()
                if left <= 0:
                    raise ReplicationError(
                        f"{self._local.path} was not flushed within {timeout:g} s",
                        hint="The upload goes on in the background; flush() again, with more time.",
                    )
                self._cond.wait(min(left, 1.0))

    def nudge(self, header: IndexHeader) -> None:
        """The database is open: what its page view has missed is put in the background."""
        if self._config.pages == "commit" and self._replicator.view.behind(header) and not self._replicator.is_paused:
            self._filler.wanted()

    def poke(self) -> None:
        """A checkpoint has run: with pages=checkpoint, the time to write page objects."""
        if self._config.pages == "checkpoint":
            self._filler.wanted()

    @property
    def last_error(self) -> BottomlessError | None:
        """The error of the last batch; None when it went well."""
        with self._lock:
            return self._fatal or self._error

    @property
    def fatal(self) -> BottomlessError | None:
        """Why this replica has stopped for good; None while it has not."""
        return self._fatal

    @property
    def files_lost(self) -> FilesLostError | None:
        """Return the error of the last batch if what was committed stands in files that are no longer at the path."""
        error = self._error
        return error if isinstance(error, FilesLostError) else None

    @property
    def pending(self) -> bool:
        """Return whether a commit that was submitted here is not in the log."""
        return self._oldest is not None

    def lag(self) -> float:
        """Seconds since the oldest commit that is not in the log yet; 0 when there is none."""
        with self._lock:
            return 0.0 if self._oldest is None else self._clock() - self._oldest

    def stop(self, *, drain: bool = False) -> None:
        """Ends the thread when nothing is pending; `drain`: after one more batch, with what pages=checkpoint has left and the sweep.

        Errors are logged and kept in `last_error`.
        """
        with self._lock:
            sequence = 0
            if drain and self._fatal is None and not self._replicator.is_paused:
                sequence = self._submitted = next(self._tickets)
                self._ensure_thread()
            self._stopping = True
            self._wake.notify()
        self._work_here(sequence)
        self._filler.stop()
        with self._lock:
            # Not by Thread.join(): one that Ctrl-C ends takes the thread for dead, though it goes on (CPython 3.11).
            while self._running and self._thread is not threading.current_thread():
                self._cond.wait(1.0)
        self._filler.join()

    # --- the thread ----------------------------------------------------------------------------------------------------

    def _ensure_thread(self) -> None:
        if self._thread is None and not self._stopping:
            thread = threading.Thread(target=self._run, name=f"bottomless {self._local.path}", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                logger.info("%s: batches are run by whoever waits for them: %s", self._local.path, error)  # the interpreter ends
                self._alone = True
                return
            self._thread, self._running = thread, True

    def _work_here(self, sequence: int) -> None:
        """Runs the batch in this thread when the interpreter ends and no other can be started (Python 3.12 and later)."""
        if self._alone and not self._running and sequence > max(self._done, self._failed):
            with as_own_thread():
                self._batch()

    def needs_this_thread(self) -> bool:
        """Does the worker wait for a lock that the running thread holds? Then nothing that is submitted here can be waited for."""
        return self._filler.is_held_here()

    def _is_logged(self, place: WalPosition | None) -> bool:
        logged = self._logged
        return (
            place is not None
            and logged is not None
            and (logged.salt1, logged.salt2) == (place.salt1, place.salt2)
            and logged.frame >= place.frame
        )

    def _publish(self, position: WalPosition | None) -> None:
        with self._lock:
            self._logged = position
            self._cond.notify_all()

    def _run(self) -> None:
        mark_own_thread()
        try:
            while True:
                with self._lock:
                    if self._next_task() == "stop":
                        self._running = self.dirty = False  # who submits from here on hears that nobody will send it
                        return
                self._batch()
        finally:
            with self._lock:
                self._running = self.dirty = False
                self._cond.notify_all()

    def _next_task(self) -> str:
        """Waits, with the condition held, for something to do."""
        while True:
            now = self._clock()
            pending = self._submitted > max(self._done, self._failed)
            retry = self._retry_at is not None and now >= self._retry_at
            if self._fatal is not None:
                pending = retry = False
            if pending or retry:
                delay = 0.0
                if not self._stopping and self._urgent <= self._done and self._oldest is not None:
                    delay = max(self._oldest + self._config.interval, self._rest_until) - now
                if delay <= 0:
                    self._wait_for_group()
                    return "batch"
                self._wake.wait(delay)
                continue
            if self._stopping:
                return "stop"
            self._idle = True
            self._wake.wait(None if self._retry_at is None else max(0.0, self._retry_at - now))
            self._idle = False

    def _wait_for_group(self) -> None:
        """When the last batch served several, they are about to commit again: worth a part of a round trip, while they come."""
        if self._group_size < 2:
            return
        end = self._clock() + min(self._round_trip * _GATHER_SHARE, _GATHER_MOST)
        here = -1
        self._gathering = True
        while here < self._waiting < self._group_size and not self._stopping and (left := end - self._clock()) > 0:
            here = self._waiting
            self._wake.wait(min(left, self._round_trip * _GATHER_GAP))
        self._gathering = False

    def _batch(self) -> None:
        with self._lock:
            self.dirty = False  # before anything is looked at
            sequence, flushing, group_size = self._submitted, self._flush_wanted > self._flush_done, self._waiting
            stopping = self._stopping
        began, worked = self._clock(), time.thread_time()
        error: BottomlessError | None = None
        behind = False
        goal: int | None = None
        try:
            self._locking = began
            with self._replicator.view.locked_to_commit(), self._index.locked():
                self._locking = None
                try:
                    header = self._replicator.batch()
                except IndexCorrupt as lost:
                    logger.warning("%s: finding out anew where the local state stands", lost)
                    header = self._reboot()
                behind = self._replicator.view.behind(header)
            if behind and ((stopping and self._config.pages == "checkpoint") or (flushing and self._alone)):
                self._filler.fill_all()
                behind = False
            elif behind and stopping and self._config.ack != "pages":
                self._filler.finish()
            if stopping or (flushing and not behind):
                self._filler.sweep()
            goal = header.txid if flushing and behind else None
        except BottomlessError as failure:
            error = commit_errors.not_stored(self._local.path, failure)
        except OSError as failure:
            error = commit_errors.not_stored(self._local.path, StoreError(f"{self._index.path}: {failure}", hint="Is the disk full?"))
        except apsw.Error as failure:
            error = ReplicationError(
                f"commits to {self._local.path} stand, but could not be read for replication: {failure}",
                hint="They stay pending. Is the disk sound, and are there file descriptors left?",
            )
            error.__cause__ = failure
        except Exception as failure:
            logger.exception("replication of %s failed in a way that was not foreseen", self._local.path)
            error = commit_errors.unforeseen(self._local.path, failure)
        with self._lock:
            self._locking = None
            if self._config.ack == "local":
                # Nobody waits for it, and whoever commits wants the processor, and Python's lock.
                self._rest_until = self._clock() + min((time.thread_time() - worked) * _REST_SHARE, _REST_MOST)
            self._concluded(sequence, error, began, group_size)
            if error is None and goal is None:
                self._flush_done = sequence
            self._cond.notify_all()
        if error is not None:
            self._filler.hold()
        else:
            # Commits go on meanwhile: the page view is filled in turns.
            self._filler.follow(behind, (sequence, goal) if goal is not None else None)

    def _filled(self, sequence: int, failure: Exception | None) -> None:
        """The filler: the page view is as complete as the flush `sequence` (0: none) wanted it; or it could not be filled."""
        with self._lock:
            if failure is None:
                self._flush_done = max(self._flush_done, sequence)
            else:
                # Whatever it is, the log goes on; an IndexCorrupt is the next batch's to mend.
                self._retry_wait = min(max(self._retry_wait * 2, _RETRY_FIRST), _RETRY_MOST)
                self._retry_at = self._clock() + self._retry_wait
                if isinstance(failure, FencedError):
                    self._fatal = failure
                elif sequence and isinstance(failure, BottomlessError):
                    self._error = view_is_missing(self._local.path, failure)
                    self._failed = max(self._failed, sequence)
                if not self._stopping:
                    self._ensure_thread()
            self._wake.notify()
            self._cond.notify_all()

    def _concluded(self, sequence: int, error: BottomlessError | None, began: float, group_size: int) -> None:
        now = self._clock()
        if error is None:
            self._done = max(self._done, sequence)
            self._error = None
            self._retry_at, self._retry_wait = None, 0.0
            self._oldest = None if self._submitted == sequence else began
            # Those who came meanwhile wait for the next batch: with them, and those who were served now, all could go together.
            self._group_size = group_size + self._submitted - sequence
            self._round_trip = (self._round_trip * 3 + (now - began)) / 4 if self._round_trip else now - began
        else:
            if self._error is None or self._error.message != error.message:
                logger.error("%s", error.message)
            self._failed = sequence
            self._error = error
            if isinstance(error, FencedError | ConflictError):
                self._fatal = error
                self._retry_at = None
            else:
                self._retry_wait = min(max(self._retry_wait * 2, _RETRY_FIRST), _RETRY_MOST)
                self._retry_at = now + self._retry_wait
            if self._stopping:
                self._retry_at = None
        self._cond.notify_all()
