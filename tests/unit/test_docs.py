"""What the documents promise of themselves: decisions say how one breaks them, and the table of wheels is whole."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("*.md"))
LOCKS = ROOT / "infra" / "locks"

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("decision", DECISIONS, ids=lambda file: file.stem)
def test_a_decision_is_short_and_ends_with_what_would_violate_it(decision: Path) -> None:
    text = decision.read_text().strip()
    assert text.startswith("# ")
    assert text.split("\n\n")[-1].startswith("A change violates this when ")
    assert len(text.splitlines()) <= 40


def test_every_repackaged_wheel_is_in_the_table_with_the_version_that_is_locked() -> None:
    """By their names: a wheel that packs another project's binary ends in -bin. Ray is there for completeness."""
    locked = {}
    for lock in ("platform", "dev", "serving"):
        locked |= dict(re.findall(r"^([a-z0-9-]+-bin|ray)==(\S+)", (LOCKS / f"{lock}.txt").read_text(), re.M))
    rows = [line.strip("| ").split(" | ") for line in DECISIONS[0].read_text().splitlines() if line.startswith("| ")]
    assert {row[0]: row[1] for row in rows[1:]} == locked
    assert all(len(row) == 6 and all(row) for row in rows)


@pytest.mark.parametrize("document", ["README.md", "docs/trace.md", *(f"docs/decisions/{d.name}" for d in DECISIONS)])
def test_files_that_a_document_links_to_are_there(document: str) -> None:
    file = ROOT / document
    for target in re.findall(r"\]\(([^)#:]+)\)", file.read_text()):
        assert (file.parent / target).exists(), target
