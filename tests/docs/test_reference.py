"""The generated parts of the reference are what the code gives."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    specification = importlib.util.spec_from_file_location("docs_reference", ROOT / "tools" / "docs" / "reference.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["docs_reference"] = module
    specification.loader.exec_module(module)
    return module


def test_the_pages_are_up_to_date(reference: ModuleType) -> None:
    stale = [page.name for page in reference.stale()]
    assert not stale, f"out of date: {stale}. Run: python tools/docs/reference.py"


def test_every_part_is_on_one_page(reference: ModuleType) -> None:
    texts = [page.read_text() for page in reference.PAGES.rglob("*.md")]
    assert {name: sum(f"<!-- generated: {name} -->" in text for text in texts) for name in reference.PARTS} == dict.fromkeys(
        reference.PARTS, 1
    )


def test_a_part_without_an_end_is_refused(reference: ModuleType) -> None:
    with pytest.raises(ValueError, match="has no end"):
        reference.filled("<!-- generated: options -->\n")


def test_only_the_generated_part_is_replaced(reference: ModuleType) -> None:
    text = "before\n<!-- generated: options -->\nold\n<!-- end of generated part -->\nafter\n"
    filled = reference.filled(text)
    assert filled.startswith("before\n")
    assert filled.endswith("after\n")
    assert "old" not in filled
    assert "`retry_timeout`" in filled
    assert reference.filled(filled) == filled
