"""The pages of the documentation, and the code blocks in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_BLOCK = re.compile(r"^(?P<marker><!-- not run: (?P<reason>.+?) -->\n)?```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^```$", re.M | re.S)
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


@dataclass(frozen=True)
class Block:
    """A fenced block. `line` is that of its first line of text, `reason` says why it is not run (empty: it is)."""

    page: Path
    line: int
    language: str
    text: str
    reason: str


def pages() -> list[Path]:
    """Return README.md and its neighbours, and all pages below docs/."""
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> Iterator[Block]:
    """Yield the fenced blocks of a page that are in one of `languages`."""
    text = page.read_text()
    for found in _BLOCK.finditer(text):
        if found["language"] in languages:
            line = text.count("\n", 0, found.start("text")) + 1
            yield Block(page, line, found["language"], found["text"], found["reason"] or "")


def inline_code(page: Path) -> Iterator[str]:
    """Yield the inline code of a page, outside fenced blocks."""
    outside = _BLOCK.sub("", page.read_text())
    for found in _INLINE.finditer(outside):
        yield found[1]
