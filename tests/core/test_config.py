"""Configuration: one name per option in all four places, a known precedence, and nothing that is silently ignored."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bottomless_wal.core.config import ENV_PREFIX, OPTIONS, Config
from bottomless_wal.core.errors import ConfigError

# Of each option: text that is allowed, the value it means, and other values that are not allowed.
CASES: dict[str, tuple[list[tuple[str, object]], list[str]]] = {
    "endpoint": (
        [
            ("http://localhost:9000", "http://localhost:9000"),
            ("http://localhost:9000/", "http://localhost:9000"),
            ("https://s3.example.com", "https://s3.example.com"),
            ("http://[::1]:9000", "http://[::1]:9000"),
            ("file:///srv/backup", "file:///srv/backup"),
            ("aws", "aws"),
        ],
        ["", "localhost:9000", "ftp://x", "http://", "http://x:port", "http://u:p@x", "file://host/x", "file:x", "AWS"],
    ),
    "bucket": ([("libsql", "libsql"), ("a.b-c_D", "a.b-c_D")], ["", ".", "..", ".a", "a/b", "a b", "ä", "x" * 256]),
    "database_id": ([("", ""), ("eu/1 ~=", "eu/1 ~=")], ["\0", "x" * 201]),
    "initial_replication": ([("error", "error"), ("force", "force"), ("skip", "skip")], ["", "Error", "ignore"]),
    "ack": ([("log", "log"), ("local", "local"), ("pages", "pages")], ["", "none"]),
    "pages": ([("commit", "commit")], ["", "never"]),
    "interval": ([("0", 0.0), ("0.25", 0.25), ("3600", 3600.0)], ["", "-1", "3601", "nan", "inf", "soon"]),
    "retry_timeout": ([("0", 0.0), ("86400", 86400.0)], ["", "-0.1", "86401", "nan"]),
    "connect_timeout": ([("0.1", 0.1), ("5", 5.0)], ["0", "nan", "3601"]),
    "read_timeout": ([("0.1", 0.1), ("5", 5.0)], ["0", "nan", "3601"]),
    "create_bucket": ([("1", True), ("0", False), ("TRUE", True), ("no", False)], ["", "2", "maybe"]),
    "concurrency": ([("1", 1), ("64", 64)], ["", "0", "65", "1.5", "x"]),
    "level": ([("1", 1), ("19", 19)], ["", "0", "20", "x"]),
    "compaction": ([("1", True), ("off", False)], ["", "2", "always"]),
    "snapshot_interval": ([("60", 60.0), ("86400", 86400.0)], ["", "59", "1d", "nan"]),
    "retention": ([("0", 0.0), ("604800", 604800.0)], ["", "-1", "7d", "inf"]),
    "keep_snapshots": ([("0", 0), ("365", 365)], ["", "-1", "1.5", "x"]),
}
ALLOWED = [(name, text, value) for name, (allowed, _) in CASES.items() for text, value in allowed]
REFUSED = [(name, text) for name, (_, refused) in CASES.items() for text in refused]


def load(place: str, name: str, value: object) -> Config:
    if place == "environment":
        return Config.load(environ={ENV_PREFIX + name.upper(): str(value)})
    if place == "argument":
        return Config.load({name: value}, environ={})
    return Config.load(uri={name: str(value)}, environ={})


PLACES = ["environment", "argument", "URI"]


def test_every_option_has_its_cases() -> None:
    assert set(CASES) == set(OPTIONS) == {field.name for field in dataclasses.fields(Config)}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("name", "text", "value"), ALLOWED)
def test_an_option_is_the_same_in_every_place(place: str, name: str, text: str, value: object) -> None:
    config = load(place, name, text)
    assert getattr(config, name) == value
    assert type(getattr(config, name)) is type(getattr(Config(), name))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("name", "text"), REFUSED)
def test_a_bad_value_is_refused_in_every_place(place: str, name: str, text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(place, name, text)
    assert name in raised.value.message
    assert place.lower() in raised.value.message.lower()
    assert OPTIONS[name].known in raised.value.hint


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["buckets", "bucket_name", "Bucket", "", "aws_secret_access_key", "endpoint "])
def test_an_unknown_name_is_refused_and_the_known_are_listed(place: str, name: str) -> None:
    if place == "environment" and name.upper().lower() in OPTIONS:
        name += "X"
    with pytest.raises(ConfigError) as raised:
        load(place, name, "x")
    for option in OPTIONS:
        assert option in raised.value.hint


def test_without_any_setting_the_defaults_hold() -> None:
    assert Config.load(environ={}) == Config()
    assert Config.load({}, {}, uri={}, environ={"HOME": "/", "LIBSQL": "x", "AWS_PROFILE": "y"}) == Config()


def test_the_default_is_that_commits_wait_for_everything() -> None:
    config = Config.load(environ={})
    assert (config.ack, config.pages, config.initial_replication) == ("pages", "commit", "error")


@pytest.mark.parametrize(("name", "values"), [(name, [text for text, _ in allowed]) for name, (allowed, _) in CASES.items()])
def test_the_nearer_place_wins(name: str, values: list[str]) -> None:
    four = [values[number % len(values)] for number in range(4)]
    environ = {ENV_PREFIX + name.upper(): four[0]}
    layers = ({name: four[1]}, {name: four[2]})
    assert getattr(Config.load(environ=environ), name) == getattr(load("argument", name, four[0]), name)
    assert getattr(Config.load(layers[0], environ=environ), name) == getattr(load("argument", name, four[1]), name)
    assert getattr(Config.load(*layers, environ=environ), name) == getattr(load("argument", name, four[2]), name)
    with_uri = Config.load(*layers, uri={name: four[3]}, environ=environ)
    assert getattr(with_uri, name) == getattr(load("argument", name, four[3]), name)


def test_a_bad_value_is_refused_even_where_a_nearer_one_wins() -> None:
    with pytest.raises(ConfigError):
        Config.load({"level": 3}, environ={ENV_PREFIX + "LEVEL": "high"})


def test_sqlites_own_parameters_pass() -> None:
    names = ("vfs", "mode", "cache", "psow", "nolock", "immutable", "modeof")
    assert Config.load(uri=dict.fromkeys(names, "x"), environ={}) == Config()


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_PREFIX + "BUCKET", "from-the-environment")
    assert Config.load().bucket == "from-the-environment"
    assert Config.load(environ={}).bucket == Config().bucket


def test_a_variable_of_the_command_line_is_no_option() -> None:
    assert Config.load(environ={ENV_PREFIX + "LOG": "debug"}) == Config()
    with pytest.raises(ConfigError):
        Config.load({"log": "debug"}, environ={})


@pytest.mark.parametrize("pages", ["checkpoint", "off"])
def test_waiting_for_pages_that_are_not_written(pages: str) -> None:
    assert Config.load({"pages": pages}, environ={}).ack == "log"
    assert Config.load({"pages": pages, "ack": "local"}, environ={}).ack == "local"
    with pytest.raises(ConfigError, match="waits for page objects"):
        Config.load({"pages": pages, "ack": "pages"}, environ={})
    with pytest.raises(ConfigError):
        Config.load({"ack": "pages"}, uri={"pages": pages}, environ={})


def test_pages_at_each_commit_go_with_every_ack() -> None:
    for ack in ("pages", "log", "local"):
        assert Config.load({"pages": "commit", "ack": ack}, environ={}).ack == ack
    assert Config.load({"pages": "commit"}, environ={}).ack == "pages"


@pytest.mark.parametrize(("name", "value"), [("concurrency", True), ("level", 2.5), ("level", None), ("interval", True), ("ack", 1)])
def test_arguments_of_the_wrong_type(name: str, value: object) -> None:
    with pytest.raises(ConfigError):
        Config.load({name: value}, environ={})


def test_arguments_may_have_the_right_type() -> None:
    config = Config.load({"concurrency": 4, "interval": 1, "create_bucket": True, "retry_timeout": 2.5}, environ={})
    assert (config.concurrency, config.interval, config.create_bucket, config.retry_timeout) == (4, 1.0, True, 2.5)


@pytest.mark.parametrize("endpoint", ["http://h?x=1", "http://h/#f", "http://h/a%20b", "http://h/a/../b", "http://h/./b", "https://h/a?"])
def test_an_endpoint_that_is_read_in_two_ways_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError):
        Config.load({"endpoint": endpoint}, environ={})


def test_a_password_in_an_endpoint_is_not_repeated() -> None:
    for place in PLACES:
        with pytest.raises(ConfigError) as raised:
            load(place, "endpoint", "http://user:hunter2@host")
        assert "hunter2" not in str(raised.value)


@given(st.dictionaries(st.text(max_size=12), st.text(max_size=12), max_size=4))
def test_whatever_comes_is_a_config_or_a_config_error(uri: dict[str, str]) -> None:
    try:
        config = Config.load(uri=uri, environ={})
    except ConfigError as error:
        assert error.hint
    else:
        assert isinstance(config, Config)


def test_a_config_does_not_change() -> None:
    config = Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.bucket = "other"  # type: ignore[misc]
    assert config.changed(bucket="other") == dataclasses.replace(config, bucket="other")
    assert config == Config()
    assert hash(config) == hash(Config())
