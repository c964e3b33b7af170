"""What the documentation points to exists: files, links, and pages in the navigation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from doc_pages import ROOT, inline_code, name_of, pages

_FILE = re.compile(r"(?:bottomless_wal|tests|tools|docs|\.ci)/[\w./*-]+")
_BARE = re.compile(r"\w+\.(?:py|toml|yml|yaml|sh)")
_LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")

# The changelog tells of files as they were named at the time.
_PAGES = [page for page in pages() if page.name != "CHANGELOG.md"]


@pytest.mark.parametrize("page", _PAGES, ids=name_of)
def test_named_files_exist(page: Path) -> None:
    missing = []
    for code in inline_code(page):
        for name in _FILE.findall(code):
            if not list(ROOT.glob(name.rstrip("/."))):
                missing.append(name)
        if _BARE.fullmatch(code) and not ((ROOT / code).exists() or any((ROOT / "tests").rglob(code))):
            missing.append(code)
    assert not missing


@pytest.mark.parametrize("page", _PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    links = [link for link in _LINK.findall(page.read_text()) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_page_is_in_the_navigation() -> None:
    navigation = set(re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    assert navigation == {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}


def test_the_readme_is_short() -> None:
    assert 500 <= len((ROOT / "README.md").read_text().split()) <= 700


def test_included_pages_exist() -> None:
    for page in (ROOT / "docs" / "project").glob("*.md"):
        for name in re.findall(r'^--8<-- "(.+)"$', page.read_text(), re.M):
            assert (ROOT / name).is_file(), f"{name_of(page)}: {name}"
