#!/usr/bin/env python3
"""Write the parts of the documentation that come from the code into the pages below `docs/`.

A page marks such a part by two comments, and everything between them is replaced:

    <!-- generated: options -->
    <!-- end of generated part -->

`python tools/docs/reference.py` writes the pages; `--check` only names those that are out of date, and exits with 1.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import click

import bottomless_wal
from bottomless_wal import admin
from bottomless_wal.cli.main import main as command_line
from bottomless_wal.core import errors
from bottomless_wal.core.config import ENV_PREFIX, OPTIONS, Config
from bottomless_wal.formats import block, index_header, keys, page, page_object, segment

PAGES: Final = Path(__file__).resolve().parents[2] / "docs"

_BEGIN: Final = "<!-- generated: {} -->\n"
_END: Final = "<!-- end of generated part -->\n"
_SECTIONS: Final = ("Args:", "Raises:", "Returns:", "Yields:")
_WIDE: Final = 88  # columns of a signature on one line


def options() -> str:
    """Return the table of options, with the defaults of `Config`."""
    defaults = Config()
    rows = [
        (f"`{option.name}`", f"`{_default(getattr(defaults, option.name))}`", option.known, option.meaning) for option in OPTIONS.values()
    ]
    variables = "\n".join(f"{ENV_PREFIX}{name.upper()}" for name in OPTIONS)
    return _table(("option", "default", "values", "meaning"), rows) + f"\nIn the environment:\n\n```text\n{variables}\n```\n"


def _default(value: object) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) or '""'


def cli() -> str:
    """Return a section for each command: its usage, its help, its arguments and options."""
    assert isinstance(command_line, click.Group)
    parts = [_command(command_line, "bottomless-wal", 2)]
    parts += [_command(command, f"bottomless-wal {name}", 3) for name, command in sorted(command_line.commands.items())]
    return "\n".join(parts)


def _command(command: click.Command, name: str, level: int) -> str:
    arguments = [parameter for parameter in command.params if isinstance(parameter, click.Argument)]
    flags = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    pieces = ["[OPTIONS]", *(_argument(argument) for argument in arguments)]
    if isinstance(command, click.Group):
        pieces.append("COMMAND [ARGS]...")
    usage = " ".join((name, *pieces))
    text = inspect.cleandoc(command.help or "").split("\f")[0].strip()
    title = f"{'#' * level} {name.removeprefix('bottomless-wal ')}"
    rows = [(_names(flag), _sentence(flag)) for flag in flags]
    listed = "\n" + _table(("option", "meaning"), rows) if rows else ""
    return f"{title}\n\n```text\n{usage}\n```\n\n{text}\n{listed}"


def _argument(argument: click.Argument) -> str:
    name = argument.metavar or (argument.name or "").upper()
    if argument.required or name.startswith("["):
        return name
    return f"[{name}]..." if argument.nargs == -1 else f"[{name}]"


def _names(flag: click.Option) -> str:
    value = "" if flag.is_flag else " " + (flag.metavar or ("N" if isinstance(flag.type, click.IntRange) else flag.type.name.upper()))
    names = sorted((*flag.opts, *flag.secondary_opts), key=len)
    return ", ".join(f"`{name}{value if name == names[-1] else ''}`" for name in names)


def _sentence(flag: click.Option) -> str:
    default = f" Default: {flag.default}." if flag.show_default is True else ""
    return (flag.help or "Show the version and exit.") + default


def python() -> str:
    """Return a section for each public function and class, from their signatures and docstrings."""
    names = [name for name in bottomless_wal.__all__ if not name.startswith("_")]
    public = {name: getattr(bottomless_wal, name) for name in names}
    others = {name: getattr(admin, name) for name in admin.__all__ if name not in public}
    parts = ["## Functions of `bottomless_wal`\n"]
    parts += [_member(name, value) for name, value in sorted(public.items()) if inspect.isfunction(value)]
    parts += ["## Results\n"]
    parts += [_member(name, value) for name, value in sorted(public.items()) if inspect.isclass(value) and not _is_error(value)]
    parts += ["## More functions, in `bottomless_wal.admin`\n"]
    parts += [_member(name, value) for name, value in sorted(others.items()) if inspect.isfunction(value)]
    parts += [_member(name, value) for name, value in sorted(others.items()) if inspect.isclass(value)]
    return "\n".join(parts)


def _is_error(value: type) -> bool:
    return issubclass(value, BaseException)


def _member(name: str, value: Any) -> str:
    shown = f"```text\n{_signature(name, value)}\n```\n\n" if inspect.isfunction(value) else ""
    text = _docstring(inspect.getdoc(value) or "")
    fields = ""
    if inspect.isclass(value) and dataclasses.is_dataclass(value):
        # A list: a type such as `int | None` cannot stand in the cell of a table.
        fields = "\n" + "".join(f"- `{field.name}`: `{field.type}`\n" for field in dataclasses.fields(value))
    return f"### {name}\n\n{shown}{text}\n{fields}"


def _signature(name: str, function: Callable[..., Any]) -> str:
    """Return the signature as the source has it: defaults by their names."""
    node = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    assert isinstance(node, ast.FunctionDef)
    result = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
    line = f"{name}({ast.unparse(node.args)}){result}"
    if len(line) <= _WIDE:
        return line
    return f"{name}(\n" + "".join(f"    {part},\n" for part in _parameters(node.args)) + f"){result}"


def _parameters(arguments: ast.arguments) -> Iterator[str]:
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(plain) - len(arguments.defaults)) + list(arguments.defaults)
    yield from map(_parameter, plain, defaults)
    if arguments.vararg:
        yield f"*{ast.unparse(arguments.vararg)}"
    elif arguments.kwonlyargs:
        yield "*"
    yield from map(_parameter, arguments.kwonlyargs, arguments.kw_defaults)
    if arguments.kwarg:
        yield f"**{ast.unparse(arguments.kwarg)}"


def _parameter(argument: ast.arg, default: ast.expr | None) -> str:
    return ast.unparse(argument) + (f" = {ast.unparse(default)}" if default is not None else "")


def _docstring(text: str) -> str:
    """Return a docstring as Markdown: its sections become lists."""
    lines: list[str] = []
    section = False
    for line in text.splitlines():
        if line.strip() in _SECTIONS and not line.startswith(" "):
            section = True
            lines += [f"**{line.strip().rstrip(':')}**", ""]
        elif section and line and not line.startswith(" "):
            section = False
            lines += ["", line]
        elif section and line.strip():
            entry = line[4:]
            lines.append(entry.strip() if entry.startswith(" ") else f"- {entry}")
            if entry.startswith(" "):
                lines[-1] = "  " + lines[-1]
        else:
            lines.append(line)
    return "\n".join(lines).rstrip()


def exceptions() -> str:
    """Return the tree of exceptions as a table, each with the class above it and its docstring's text."""
    rows = []
    for name in ["BottomlessError", *sorted(set(errors.__all__) - {"BottomlessError"})]:
        kind = getattr(errors, name)
        text = " ".join((inspect.getdoc(kind) or "").split())
        rows.append((f"`{name}`", f"`{kind.__bases__[0].__name__}`", text))
    return _table(("exception", "is a", "meaning"), rows)


def formats() -> str:
    """Return the docstring of each module that defines bytes, as it stands there."""
    modules = (keys, segment, block, page, page_object, index_header)
    parts = []
    for module in modules:
        name = module.__name__.replace(".", "/")
        summary, _, rest = (inspect.getdoc(module) or "").partition("\n\n")
        parts.append(f"## `{name}.py`\n\n{' '.join(summary.split())}\n" + (f"\n```text\n{rest.rstrip()}\n```\n" if rest else ""))
    return "\n".join(parts)


def _table(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    lines += [f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


PARTS: Final[dict[str, Callable[[], str]]] = {
    "options": options,
    "cli": cli,
    "python": python,
    "exceptions": exceptions,
    "formats": formats,
}


def filled(text: str) -> str:
    """Return the text of a page with each of its generated parts made anew."""
    for name, part in PARTS.items():
        begin = _BEGIN.format(name)
        if begin in text:
            before, rest = text.split(begin, 1)
            _, end, after = rest.partition(_END)
            if not end:
                raise ValueError(f"the generated part {name!r} has no end: expected {_END.strip()!r}")
            text = f"{before}{begin}\n{part()}\n{_END}{after}"
    return text


def stale() -> list[Path]:
    """Return the pages that differ from what the code gives."""
    return [page for page in sorted(PAGES.rglob("*.md")) if filled(page.read_text()) != page.read_text()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is out of date")
    check = parser.parse_args().check
    outdated = stale()
    for path in outdated:
        print(f"{path}: {'out of date' if check else 'written'}")
        if not check:
            path.write_text(filled(path.read_text()))
    return int(check and bool(outdated))


if __name__ == "__main__":
    sys.exit(main())
