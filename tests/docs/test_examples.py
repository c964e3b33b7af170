"""The examples of README and docs run, and the commands that they show exist.

The python blocks of a page are run in order, in one process and one namespace. Directory and store are temporary.
A block that cannot be run has the line `<!-- not run: REASON -->` before it.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from doc_pages import ROOT, blocks, inline_code, name_of, pages

from bottomless_wal.cli.main import main as command_line
from bottomless_wal.core.config import ENV_PREFIX, OPTIONS

_PROGRAM = "bottomless-wal"
_MOST_NOT_RUN = 3


def _python_pages() -> list[Path]:
    """Return the pages that have a Python block to run."""
    return [page for page in pages() if any(not block.reason for block in blocks(page, "python"))]


def _shell_lines(page: Path) -> list[str]:
    lines = [line.removeprefix("$ ") for block in blocks(page, "console") for line in block.text.splitlines() if line.startswith("$ ")]
    lines += [code for code in inline_code(page) if code.startswith(f"{_PROGRAM} ")]
    return lines


def _commands(line: str) -> list[list[str]]:
    """Return the arguments of each call of the program in a shell line."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)  # it also drops comments
    lexer.whitespace_split = True
    calls: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("|&;()"):
            calls.append([])
        else:
            calls[-1].append(word)
    return [words[1:] for words in calls if words[:1] == [_PROGRAM]]


def _parse(arguments: list[str]) -> None:
    """Parse as the program does, and run nothing.

    Raises:
        click.ClickException: no such command or option, or a bad value.
    """
    group = command_line
    assert isinstance(group, click.Group)
    names = [
        option for parameter in group.params if isinstance(parameter, click.Option) and not parameter.is_flag for option in parameter.opts
    ]
    while arguments and arguments[0] in names:
        arguments = arguments[2:]
    if not arguments or arguments[0] in ("--version", "--help", "-h"):
        return
    with click.Context(group, info_name=_PROGRAM) as context:
        name, command, rest = group.resolve_command(context, list(arguments))
        assert command is not None
        command.make_context(name, rest, parent=context)


@pytest.mark.parametrize("page", _python_pages(), ids=name_of)
def test_python_blocks_run(page: Path, tmp_path: Path) -> None:
    run = [block for block in blocks(page, "python") if not block.reason]
    # Each block stands at its own line, so that a traceback names the line of the page.
    source = ""
    for block in run:
        source += "\n" * (block.line - 1 - source.count("\n")) + block.text
    script = tmp_path / "example.py"
    script.write_text(source)
    work = tmp_path / "work"
    work.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
    environment |= {
        f"{ENV_PREFIX}ENDPOINT": (tmp_path / "store").as_uri(),
        f"{ENV_PREFIX}CREATE_BUCKET": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    (tmp_path / "store").mkdir()
    done = subprocess.run([sys.executable, script], cwd=work, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{name_of(page)} (lines as in the page):\n{done.stderr}"
    assert "Traceback" not in done.stderr


def test_few_blocks_are_not_run() -> None:
    skipped = [
        f"{name_of(block.page)}:{block.line}: {block.reason}" for page in pages() for block in blocks(page, "python") if block.reason
    ]
    assert len(skipped) <= _MOST_NOT_RUN, skipped


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_shell_commands_exist(page: Path) -> None:
    for line in _shell_lines(page):
        for arguments in _commands(line):
            try:
                _parse(arguments)
            except click.ClickException as error:
                pytest.fail(f"{name_of(page)}: {line!r}: {error.format_message()}")


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_scripts_exist(page: Path) -> None:
    for line in _shell_lines(page):
        for word in line.split():
            if word.startswith(("./", "tools/")):
                assert (ROOT / word).is_file(), f"{name_of(page)}: {line!r}"


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_settings_exist(page: Path) -> None:
    known = {f"{ENV_PREFIX}{name.upper()}" for name in OPTIONS} | {f"{ENV_PREFIX}LOG"}
    assert set(re.findall(rf"{ENV_PREFIX}[A-Z_]+", page.read_text())) <= known


@pytest.mark.parametrize(
    "arguments", [["nothing"], ["restore", "app.db", "--nothing"], ["restore", "app.db", "--txid", "none"], ["rm", "app.db"]]
)
def test_a_wrong_command_is_found(arguments: list[str]) -> None:
    with pytest.raises(click.ClickException):
        _parse(arguments)
