"""The tree of errors: what a caller may catch, what is said, and what SQLite makes of it."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import apsw
import pytest

from bottomless_wal.core import errors
from bottomless_wal.core.config import Config
from bottomless_wal.core.errors import (
    BottomlessError,
    ConfigError,
    CorruptionError,
    FilesLostError,
    ReplicationError,
    StoreError,
    TransientError,
)
from bottomless_wal.formats import segment
from bottomless_wal.formats.page_object import decode_page_object
from bottomless_wal.storage.base import Stats
from bottomless_wal.storage.retry import Retrier

KINDS = [getattr(errors, name) for name in errors.__all__]


def test_the_tree() -> None:
    assert all(issubclass(kind, BottomlessError) for kind in KINDS)
    assert issubclass(TransientError, StoreError)
    assert issubclass(FilesLostError, ReplicationError)
    others = [kind for kind in KINDS if kind not in (BottomlessError, TransientError, FilesLostError)]
    assert all(kind.__bases__ == (BottomlessError,) for kind in others)


def test_the_docstring_draws_all_of_it() -> None:
    assert errors.__doc__ is not None
    for name in errors.__all__:
        assert f" {name} " in errors.__doc__


@pytest.mark.parametrize("kind", KINDS)
def test_message_and_hint(kind: type[BottomlessError]) -> None:
    error = kind("what happened", hint="What to do.")
    assert (error.message, error.hint) == ("what happened", "What to do.")
    assert str(error) == "what happened\n  hint: What to do."
    assert str(kind("what happened")) == "what happened"
    assert kind.__doc__


@pytest.mark.parametrize("kind", KINDS)
def test_whoever_catches_apsws_errors_catches_ours(kind: type[BottomlessError]) -> None:
    with pytest.raises(apsw.Error, match="what happened"):
        raise kind("what happened")


@pytest.mark.parametrize("kind", KINDS)
def test_a_statement_that_fails_for_it_raises_it_and_sqlite_sees_a_plain_error(kind: type[BottomlessError]) -> None:
    """Raised in a function, as in a hook: a code such as BUSY or FULL would change what becomes of the transaction."""
    connection = apsw.Connection(":memory:")

    def fail() -> None:
        raise kind("what happened", hint="What to do.")

    connection.create_scalar_function("fail", fail)
    connection.execute("CREATE TABLE t(x); BEGIN; INSERT INTO t VALUES (1)")
    with pytest.raises(kind) as raised:
        connection.execute("SELECT fail()").fetchall()
    assert raised.value.hint == "What to do."
    assert connection.in_transaction
    assert connection.execute("SELECT count(*) FROM t").get == 1
    connection.execute("COMMIT")
    connection.close()


@pytest.mark.parametrize("kind", KINDS)
def test_errors_can_be_sent_to_another_process(kind: type[BottomlessError]) -> None:
    error = pickle.loads(pickle.dumps(kind("what happened", hint="What to do.")))
    assert type(error) is kind
    assert (error.message, error.hint) == ("what happened", "What to do.")


DETAILS: errors.Details = {
    "reason": "why",
    "key": "app.db-wal/1",
    "other_key": "app.db-wal/2",
    "path": "/app.db",
    "txid": 7,
    "expected": 1,
    "actual": 0,
    "option": "ack",
    "status": 503,
    "code": "SlowDown",
}


@pytest.mark.parametrize("kind", KINDS)
def test_attributes_survive_a_copy_and_a_pickle(kind: type[BottomlessError]) -> None:
    error = kind("what happened", hint="What to do.", **DETAILS)
    for other in (error, error.copy(), pickle.loads(pickle.dumps(error)), error.copy().copy()):
        assert type(other) is kind
        assert (other.message, other.hint) == ("what happened", "What to do.")
        assert {name: getattr(other, name) for name in DETAILS} == DETAILS
        assert other.__traceback__ is None


@pytest.mark.parametrize("kind", KINDS)
def test_attributes_that_are_not_known_are_none(kind: type[BottomlessError]) -> None:
    error = kind("what happened")
    assert error.reason == "what happened"
    assert all(getattr(error, name) is None for name in DETAILS if name != "reason")
    assert error.is_transient is (kind is TransientError)


def test_an_error_that_another_one_caused_has_its_attributes() -> None:
    cause = TransientError.about("PUT k", "503 SlowDown", key="k", status=503, code="SlowDown", hint="Wait.")
    assert (cause.message, cause.reason) == ("PUT k: 503 SlowDown", "503 SlowDown")
    error = cause.copy("the commit is not stored", kind=ReplicationError, txid=7)
    assert type(error) is ReplicationError
    assert (error.message, error.reason, error.hint) == ("the commit is not stored", "the commit is not stored", "Wait.")
    assert (error.key, error.status, error.code, error.txid, error.is_transient) == ("k", 503, "SlowDown", 7, True)


def test_the_module_describes_every_attribute() -> None:
    assert errors.__doc__ is not None
    for name in ("message", "hint", *errors.Details.__annotations__):
        assert f"\n    {name} " in errors.__doc__


@pytest.mark.parametrize("decoder", [segment.decode, segment.decode_header, segment.head_length])
def test_a_damaged_segment_is_named_by_its_key(decoder: Callable[..., object]) -> None:
    with pytest.raises(CorruptionError) as raised:
        decoder(b"nonsense", name="app.db-wal/k")
    error = raised.value
    assert (error.key, error.message) == ("app.db-wal/k", f"app.db-wal/k {error.reason}")
    assert error.reason.startswith("is not sound: ")


def test_a_damaged_page_object_is_named_by_its_key() -> None:
    with pytest.raises(CorruptionError) as raised:
        decode_page_object(b"nonsense", name="app.db-000000000001", pgno=1)
    error = raised.value
    assert (error.key, error.message) == ("app.db-000000000001", f"app.db-000000000001 is not sound: {error.reason}")


def test_a_request_that_was_given_up_is_transient_and_has_the_answers_status_and_code() -> None:
    retrier = Retrier("the store", 0.0, Stats())

    def attempt() -> None:
        raise TransientError.about("PUT k", "503 SlowDown", status=503, code="SlowDown")

    with pytest.raises(StoreError) as raised:
        retrier.run("PUT k", attempt, key="k")
    error = raised.value
    assert type(error) is StoreError
    assert (error.key, error.status, error.code, error.is_transient) == ("k", 503, "SlowDown", True)
    assert error.message == f"PUT k: {error.reason}"
    assert error.reason.endswith("1 attempt: 503 SlowDown")


def test_a_bad_option_is_named_and_a_secret_is_not() -> None:
    with pytest.raises(ConfigError) as raised:
        Config.load({"ack": "never"}, environ={})
    assert (raised.value.option, raised.value.actual) == ("ack", "never")
    with pytest.raises(ConfigError) as raised:
        Config.load({"endpoint": "ftp://me:secret@host"}, environ={})
    assert (raised.value.option, raised.value.actual) == ("endpoint", None)
