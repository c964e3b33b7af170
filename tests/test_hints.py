"""Commands that messages name can be pasted: what takes a database names it, or the placeholder DB."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import bottomless_wal
from bottomless_wal.cli.main import main

PACKAGE = Path(bottomless_wal.__file__).parent
COMMAND = re.compile(r"(?:`bottomless-wal |bottomless-wal |`)([a-z]+)\b((?: [^`]*)?)(`?)")


def _texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, text) of each string but the docstrings; `{}` stands for what is filled in."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            skipped.add(id(node.body[0].value))  # type: ignore[attr-defined]
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(id(node.value))
        if isinstance(node, ast.JoinedStr):
            skipped.update(id(part) for part in node.values)
            yield node.lineno, "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.lineno, node.value


def _takes_a_database(name: str) -> bool:
    command = main.commands.get(name)
    return command is not None and any(isinstance(given, click.Argument) and given.required for given in command.params)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_each_command_that_a_message_names_names_its_database(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for line, text in _texts(tree):
        for found in COMMAND.finditer(text):
            name, rest, is_closed = found.groups()
            if not _takes_a_database(name) or ("bottomless-wal" not in found.group() and not rest):
                continue
            words = rest.split()
            assert "DB" in words or "{}" in words, f"{path.name}:{line}: {found.group()}"
            assert is_closed or text.endswith(found.group()), f"{path.name}:{line}: the command has no end: {found.group()}"
